//! Keeps the replay of CREATE TABLESPACE away from the place that the record names.
//!
//! The record holds an absolute path. Replay on the machine it was written on would make files in the tablespace of the
//! running server, over its own. With an empty path PostgreSQL makes the tablespace inside the data directory instead.

use crate::engines::postgres::wal::record::crc_of;
use crate::engines::postgres::wal::{
    LONG_HEADER_BYTES, PAGE_BYTES, RECORD_HEADER_BYTES, Rmgr, SHORT_HEADER_BYTES,
};
use crate::error::Corrupt;
use crate::ids::{Lsn, Oid};
use crate::reader::Reader;
use crate::segment::SegmentSize;

/// `XLOG_TBLSPC_CREATE`.
const CREATE: u8 = 0x00;
const INFO_OFFSET: u64 = 16;
const CRC_OFFSET: usize = 20;
/// No CREATE TABLESPACE record is longer: its path has `MAXPGPATH` bytes at the most.
const RECORD_BYTES_MAX: u64 = 4096;

/// A segment's bytes and where they lie in the log.
#[derive(Debug)]
pub struct SegmentBytes<'a> {
    /// Where the segment starts.
    pub start: Lsn,
    /// All of it.
    pub wal: &'a mut [u8],
}

/// What a CREATE TABLESPACE record said before its path was taken out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedirectedTablespace {
    /// The tablespace.
    pub spc_oid: Oid,
    /// Where it was made.
    pub path: String,
}

/// Takes the path out of the CREATE TABLESPACE record that starts at `record`. `segments` are the one it starts in and, where
/// it runs over the edge, the next.
pub fn make_tablespace_in_place(
    segments: &mut [SegmentBytes<'_>],
    size: SegmentSize,
    record: Lsn,
) -> Result<RedirectedTablespace, Corrupt> {
    let short = || Corrupt::invalid("xl_tot_len", record.get(), 0);
    let mut bytes = Vec::new();
    let mut places = Vec::new();
    let mut at = record.get();
    let mut total = RECORD_HEADER_BYTES as u64;
    while (bytes.len() as u64) < total {
        at = past_page_header(at, size);
        let byte = *byte_at(segments, at).ok_or_else(short)?;
        bytes.push(byte);
        places.push(at);
        at = at.saturating_add(1);
        if let [a, b, c, d] = *bytes.as_slice() {
            let told = u64::from(u32::from_le_bytes([a, b, c, d]));
            if !(total..=RECORD_BYTES_MAX).contains(&told) {
                return Err(Corrupt::too_large("xl_tot_len", record.get(), told, RECORD_BYTES_MAX));
            }
            total = told;
        }
    }
    let main_data = main_data_offset(&bytes)?;
    let path_from = main_data.saturating_add(size_of::<Oid>());
    let mut r = Reader::new(bytes.get(main_data..).unwrap_or_default());
    let spc_oid = r.u32("ts_id")?;
    let path = bytes.get_mut(path_from..).ok_or_else(short)?;
    let end =
        path.iter().position(|b| *b == 0).ok_or_else(|| Corrupt::invalid("ts_path", record.get(), 0))?;
    let told = String::from_utf8_lossy(path.get(..end).unwrap_or_default()).into_owned();
    path.fill(0);
    let crc = crc_of(&bytes).to_le_bytes();
    if let Some(field) = bytes.get_mut(CRC_OFFSET..RECORD_HEADER_BYTES) {
        field.copy_from_slice(&crc);
    }
    for (at, byte) in places.into_iter().zip(bytes) {
        if let Some(place) = byte_at(segments, at) {
            *place = byte;
        }
    }
    Ok(RedirectedTablespace { spc_oid, path: told })
}

/// The first position from `at` on that is not a page header's.
fn past_page_header(at: u64, size: SegmentSize) -> u64 {
    let in_page = at.checked_rem(PAGE_BYTES as u64).unwrap_or(0);
    let page = at.saturating_sub(in_page);
    let header = match page == size.floor(page.into()).get() {
        true => LONG_HEADER_BYTES,
        false => SHORT_HEADER_BYTES,
    };
    page.saturating_add(in_page.max(header as u64))
}

fn byte_at<'s>(segments: &'s mut [SegmentBytes<'_>], at: u64) -> Option<&'s mut u8> {
    segments.iter_mut().find_map(|s| {
        let offset = usize::try_from(at.checked_sub(s.start.get())?).ok()?;
        s.wal.get_mut(offset)
    })
}

/// Where the main data of a CREATE TABLESPACE record starts.
fn main_data_offset(record: &[u8]) -> Result<usize, Corrupt> {
    let mut r = Reader::new(record);
    r.take(usize::try_from(INFO_OFFSET).unwrap_or(0), "header")?;
    let (info, rmid) = (r.u8("xl_info")?, r.u8("xl_rmid")?);
    if rmid != Rmgr::TBLSPC.get() || info & 0xF0 != CREATE {
        return Err(Corrupt::invalid("xl_rmid", INFO_OFFSET.saturating_add(1), u64::from(rmid)));
    }
    r.take(6, "padding and xl_crc")?;
    loop {
        let at = r.position();
        let told = match r.u8("block id")? {
            255 => u64::from(r.u8("main data length")?),
            254 => u64::from(r.u32("main data length")?),
            253 => {
                r.take(2, "origin")?;
                continue;
            }
            252 => {
                r.take(4, "toplevel xid")?;
                continue;
            }
            other => return Err(Corrupt::invalid("block id", at, u64::from(other))),
        };
        let from = record.len().saturating_sub(r.left());
        return match r.left() as u64 == told {
            true => Ok(from),
            false => Err(Corrupt::mismatch("main data length", at, told, r.left() as u64)),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engines::postgres::wal::testing::{WalBuilder, small_segments};
    use crate::engines::postgres::wal::{Expected, Next, RecordStream, SegmentSpan, TablespaceRecord};
    use crate::ids::PgMajor;
    use proptest::prelude::*;

    const PATH: &str = "/srv/pg/fast";

    fn create(b: &mut WalBuilder) -> Lsn {
        let main = [&16500u32.to_le_bytes()[..], PATH.as_bytes(), b"\0"].concat();
        b.push(Rmgr::TBLSPC.get(), CREATE, 9, &[], &main)
    }

    /// The tablespaces that the log makes; every CRC in it is checked on the way.
    fn made(segments: &[Vec<u8>]) -> Vec<(Lsn, TablespaceRecord)> {
        let (mut found, mut tail) = (Vec::new(), None);
        for (i, wal) in segments.iter().enumerate() {
            let span = SegmentSpan::containing(Lsn::from(0x100_0000 + ((i as u64) << 20)), small_segments())
                .unwrap();
            let mut stream = RecordStream::new(wal, span, Expected::default(), tail).unwrap();
            while let Next::Record(r) = stream.next_record().unwrap() {
                found.extend(TablespaceRecord::decode(&r).map(|t| (r.start, t.unwrap())));
            }
            tail = stream.into_tail();
        }
        found
    }

    fn redirect(segments: &mut [Vec<u8>], at: Lsn) -> Result<RedirectedTablespace, Corrupt> {
        let starts = (0x100_0000u64..).step_by(1 << 20);
        let mut all: Vec<_> =
            starts.zip(segments).map(|(s, wal)| SegmentBytes { start: s.into(), wal }).collect();
        make_tablespace_in_place(&mut all, small_segments(), at)
    }

    #[test]
    fn a_tablespace_is_made_in_place_wherever_its_record_lies() {
        // Left of the segment before the record: none of the edges, within its header, within its path.
        for left in [4000, 16, 24, 32, 40, 48] {
            let mut b = WalBuilder::new(PgMajor::V15, small_segments());
            b.fill_segment(left);
            let at = create(&mut b);
            b.message(100);
            let mut segments: Vec<_> = b.finish_segments().into_iter().map(|(_, wal)| wal).collect();
            let told = redirect(&mut segments, at).unwrap();
            assert_eq!(told, RedirectedTablespace { spc_oid: 16500, path: PATH.into() });
            let empty = TablespaceRecord::Create { spc_oid: 16500, path: String::new() };
            assert_eq!(made(&segments), [(at, empty)], "{left} bytes before the edge");
        }
        // Over the edge of a page.
        let mut b = WalBuilder::new(PgMajor::V15, small_segments());
        while 8192 - b.at().get() % 8192 > 40 {
            b.message(6);
        }
        let at = create(&mut b);
        let mut segments: Vec<_> = b.finish_segments().into_iter().map(|(_, wal)| wal).collect();
        redirect(&mut segments, at).unwrap();
        assert_eq!(made(&segments)[0].1, TablespaceRecord::Create { spc_oid: 16500, path: String::new() });
    }

    #[test]
    fn another_record_is_left_alone() {
        let mut b = WalBuilder::new(PgMajor::V15, small_segments());
        let other = b.message(50);
        let drop = b.push(Rmgr::TBLSPC.get(), 0x10, 9, &[], &16500u32.to_le_bytes());
        let segments: Vec<_> = b.finish_segments().into_iter().map(|(_, wal)| wal).collect();
        for at in [other, drop, Lsn::from(0x100_0000 + (1 << 19)), Lsn::from(8)] {
            let mut changed = segments.clone();
            assert!(redirect(&mut changed, at).is_err(), "{at}");
            assert!(changed == segments);
        }
    }

    proptest! {
        #[test]
        fn bytes_that_are_no_record_are_refused_without_a_panic(
            noise in proptest::collection::vec(any::<u8>(), 0..9000),
            at in 0x100_0000u64..0x100_2400,
        ) {
            let _ = redirect(&mut [noise], at.into());
        }
    }
}
