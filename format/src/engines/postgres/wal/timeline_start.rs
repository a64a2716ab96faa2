//! How a timeline begins: with a shutdown checkpoint, as PostgreSQL's recovery writes one where it ends (docs/wal.md,
//! "The start of a timeline"). The bytes behind the last record that came before, page headers included.

use super::page::{LONG_HEADER_BYTES, PAGE_BYTES, SHORT_HEADER_BYTES};
use super::record::{RECORD_HEADER_BYTES, crc_of};
use super::rmgr::Rmgr;
use super::xlog::{CHECKPOINT_SHUTDOWN, Checkpoint};
use crate::ids::{Lsn, PgMajor, SystemId};
use crate::reader::Writer;
use crate::segment::SegmentSize;

/// `XLR_BLOCK_ID_DATA_SHORT`.
const DATA_SHORT: u8 = 255;
/// `XLP_FIRST_IS_CONTRECORD` and `XLP_LONG_HEADER`.
const CONTINUES: u16 = 1;
const LONG: u16 = 2;

/// Where a timeline begins.
#[derive(Debug, Clone, Copy)]
pub struct TimelineStart {
    /// Where the last record before it ends.
    pub at: Lsn,
    /// Start of that record.
    pub last_record: Lsn,
    /// The major version.
    pub major: PgMajor,
    /// Whose log it is.
    pub system_id: SystemId,
    /// Its segments' size.
    pub segment_size: SegmentSize,
}

impl TimelineStart {
    /// The record that makes `checkpoint` the state of a cluster that was shut down there. Its `redo` is where the record
    /// starts, whatever was in it; its `timeline` is the one that begins. Gives it, and the log from `at` to the record's end.
    pub fn write(&self, checkpoint: Checkpoint) -> (Checkpoint, Vec<u8>) {
        let redo = self.at.saturating_add(self.header_bytes(self.at) as u64);
        let checkpoint = Checkpoint { redo, ..checkpoint };
        let main = checkpoint.encode();
        let total = RECORD_HEADER_BYTES.saturating_add(2).saturating_add(main.len());
        let mut record = Writer::new();
        record.u32(u32::try_from(total).unwrap_or(u32::MAX)).u32(0).u64(self.last_record.get());
        record.u8(CHECKPOINT_SHUTDOWN).u8(Rmgr::XLOG.get()).u16(0).u32(0);
        record.u8(DATA_SHORT).u8(u8::try_from(main.len()).unwrap_or(u8::MAX)).bytes(&main);
        let mut record = record.into_bytes();
        let crc = crc_of(&record);
        if let Some(place) = record.get_mut(RECORD_HEADER_BYTES.saturating_sub(4)..RECORD_HEADER_BYTES) {
            place.copy_from_slice(&crc.to_le_bytes());
        }
        (checkpoint, self.paged(&checkpoint, &record))
    }

    /// The record with the header of each page that it begins or enters.
    fn paged(&self, checkpoint: &Checkpoint, record: &[u8]) -> Vec<u8> {
        let mut log = Writer::new();
        let mut left = record;
        while !left.is_empty() {
            let at = self.at.saturating_add(log.len() as u64);
            if self.header_bytes(at) > 0 {
                let continued = if left.len() < record.len() { left.len() } else { 0 };
                let is_long = self.segment_size.floor(at) == at;
                let info = if continued > 0 { CONTINUES } else { 0 } | if is_long { LONG } else { 0 };
                log.u16(self.major.page_magic()).u16(info).u32(checkpoint.timeline.get()).u64(at.get());
                log.u32(u32::try_from(continued).unwrap_or(u32::MAX)).u32(0);
                if is_long {
                    let size = u32::try_from(self.segment_size.bytes()).unwrap_or(u32::MAX);
                    let page = u32::try_from(PAGE_BYTES).unwrap_or(u32::MAX);
                    log.u64(self.system_id.get()).u32(size).u32(page);
                }
            }
            let at = self.at.saturating_add(log.len() as u64);
            let (here, rest) = left.split_at(left.len().min(PAGE_BYTES.saturating_sub(in_page(at))));
            log.bytes(here);
            left = rest;
        }
        log.into_bytes()
    }

    /// Bytes of the header that a page has which begins there; none where none does.
    fn header_bytes(&self, at: Lsn) -> usize {
        match in_page(at) {
            0 if self.segment_size.floor(at) == at => LONG_HEADER_BYTES,
            0 => SHORT_HEADER_BYTES,
            _ => 0,
        }
    }
}

/// How far into its page a position lies.
fn in_page(at: Lsn) -> usize {
    let into = at.get() & (PAGE_BYTES as u64).wrapping_sub(1);
    usize::try_from(into).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{WalBuilder, small_segments, system_id};
    use super::*;
    use crate::ids::{TimelineId, Xid};

    fn checkpoint() -> Checkpoint {
        Checkpoint {
            redo: Lsn::ZERO,
            timeline: TimelineId::new(2).unwrap(),
            previous_timeline: TimelineId::FIRST,
            full_page_writes: true,
            wal_level: None,
            next_full_xid: 1 << 32 | 740,
            next_oid: 24_576,
            next_multi: 5,
            next_multi_offset: 9,
            oldest_xid: Xid::from(722),
            oldest_xid_db: 1,
            oldest_multi: 1,
            oldest_multi_db: 5,
            time_unix_seconds: 1_763_659_800,
            oldest_commit_ts_xid: Xid::INVALID,
            newest_commit_ts_xid: Xid::INVALID,
            oldest_active_xid: Xid::INVALID,
        }
    }

    /// What a log holds from its first segment on.
    fn bytes(wal: &WalBuilder) -> Vec<u8> {
        wal.finish_segments().into_iter().flat_map(|(_, bytes)| bytes).collect()
    }

    /// The log is left at every place around the edge of a page, and of a segment.
    #[test]
    fn it_is_what_a_log_goes_on_with_wherever_it_was_left() {
        let size = small_segments();
        let (segment, page) = (usize::try_from(size.bytes()).unwrap(), PAGE_BYTES);
        let mut headers = [0; 3];
        for edge in [2 * page, segment] {
            for left in (0..200).step_by(8) {
                let mut wal = WalBuilder::new(PgMajor::V15, size);
                match edge == segment {
                    true => wal.fill_segment(left),
                    false => {
                        wal.message(page);
                        let at = usize::try_from(wal.at().get()).unwrap() % page;
                        wal.message(page - at - left - 26 - 8);
                    }
                }
                let (at, last_record) = (wal.at(), *wal.records.last().unwrap());
                let begin = TimelineStart {
                    at,
                    last_record,
                    major: PgMajor::V15,
                    system_id: system_id(),
                    segment_size: size,
                };
                let (written, found) = begin.write(checkpoint());
                assert_eq!(written, Checkpoint { redo: written.redo, ..checkpoint() });
                wal.switch_timeline(written.timeline);
                assert_eq!(wal.push(0, CHECKPOINT_SHUTDOWN, 0, &[], &written.encode()), written.redo);
                let from = usize::try_from(at.bytes_since(Lsn::from(0x100_0000))).unwrap();
                assert!(bytes(&wal)[from..].starts_with(&found), "{left} bytes before {edge}");
                assert!(bytes(&wal)[from + found.len()..].iter().all(|b| *b == 0));
                headers[[0, SHORT_HEADER_BYTES, LONG_HEADER_BYTES]
                    .iter()
                    .position(|n| found.len() == 114 + n)
                    .unwrap()] += 1;
            }
        }
        assert!(headers.iter().all(|n| *n > 5), "{headers:?}");
    }
}
