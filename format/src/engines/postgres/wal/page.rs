//! The header at the start of every WAL page. Layout: docs/wal.md, "Page header".

use crate::engines::postgres::wal::Damage;
use crate::ids::{Lsn, PgMajor, SystemId, TimelineId};
use crate::reader::Reader;
use crate::segment::SegmentSize;

/// `XLOG_BLCKSZ` of every build that is supported.
pub const PAGE_BYTES: usize = 8192;
/// The header of every page but a segment's first.
pub const SHORT_HEADER_BYTES: usize = 24;
/// The header of a segment's first page.
pub const LONG_HEADER_BYTES: usize = 40;

/// `xlp_info`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageFlags(u16);

impl PageFlags {
    const FIRST_IS_CONTRECORD: u16 = 1;
    const LONG_HEADER: u16 = 2;
    const BKP_REMOVABLE: u16 = 4;
    const FIRST_IS_OVERWRITE_CONTRECORD: u16 = 8;
    const ALL: u16 = 15;

    /// Whether the page starts with the rest of a record (`XLP_FIRST_IS_CONTRECORD`).
    pub const fn continues_record(self) -> bool {
        self.0 & Self::FIRST_IS_CONTRECORD != 0
    }

    /// Whether the header is the long one (`XLP_LONG_HEADER`).
    pub const fn is_long(self) -> bool {
        self.0 & Self::LONG_HEADER != 0
    }

    /// Whether full-page images after it may be left out (`XLP_BKP_REMOVABLE`).
    pub const fn backup_blocks_removable(self) -> bool {
        self.0 & Self::BKP_REMOVABLE != 0
    }

    /// Whether the record that should go on here was aborted (`XLP_FIRST_IS_OVERWRITE_CONTRECORD`).
    pub const fn overwrites_contrecord(self) -> bool {
        self.0 & Self::FIRST_IS_OVERWRITE_CONTRECORD != 0
    }
}

/// What only a segment's first page says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LongHeader {
    /// `xlp_sysid`.
    pub system_id: SystemId,
    /// `xlp_seg_size`.
    pub segment_size: SegmentSize,
}

/// A page's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageHeader {
    /// The major version, from `xlp_magic`.
    pub major: PgMajor,
    /// `xlp_info`.
    pub flags: PageFlags,
    /// `xlp_tli`: the timeline the page was first written on.
    pub timeline: TimelineId,
    /// `xlp_pageaddr`.
    pub address: Lsn,
    /// `xlp_rem_len`: bytes of the record that goes on here, this page's and those after it.
    pub continued_bytes: u32,
    /// What a segment's first page says besides.
    pub long: Option<LongHeader>,
}

impl PageHeader {
    /// Decodes the header of the page at `at`. A page that claims another position is a recycled segment's
    /// old content, so it is refused here rather than trusted by the caller.
    pub fn decode(bytes: &[u8], at: Lsn) -> Result<Self, Damage> {
        let header = Self::decode_anywhere(bytes, at)?;
        if header.address != at {
            let lsn = at.saturating_add(8);
            return Err(Damage::mismatch("xlp_pageaddr", lsn, header.address.get(), at.get()));
        }
        Ok(header)
    }

    /// Decodes a header that may belong elsewhere; `at` is only where it was found.
    pub fn decode_anywhere(bytes: &[u8], at: Lsn) -> Result<Self, Damage> {
        Self::decode_fields(&mut Reader::new(bytes)).map_err(|corrupt| Damage {
            lsn: at.saturating_add(corrupt.at),
            record: None,
            corrupt,
        })
    }

    fn decode_fields(r: &mut Reader<'_>) -> Result<Self, crate::Corrupt> {
        let magic = r.u16("xlp_magic")?;
        let major = PgMajor::from_page_magic(magic).ok_or(crate::Corrupt::invalid(
            "xlp_magic",
            0,
            u64::from(magic),
        ))?;
        let info = r.u16("xlp_info")?;
        if info & !PageFlags::ALL != 0 {
            return Err(crate::Corrupt::invalid("xlp_info", 2, u64::from(info)));
        }
        let flags = PageFlags(info);
        let timeline = r.parse_u32("xlp_tli", TimelineId::new)?;
        let address =
            r.parse_u64("xlp_pageaddr", |v| v.is_multiple_of(PAGE_BYTES as u64).then(|| Lsn::from(v)))?;
        let continued_bytes = r.u32("xlp_rem_len")?;
        if flags.continues_record() == (continued_bytes == 0) {
            return Err(crate::Corrupt::invalid("xlp_rem_len", 16, u64::from(continued_bytes)));
        }
        r.take(4, "padding")?;
        let long = if flags.is_long() {
            let system_id = SystemId::from(r.u64("xlp_sysid")?);
            let segment_size = r.parse_u32("xlp_seg_size", |v| SegmentSize::new(u64::from(v)))?;
            r.parse_u32("xlp_xlog_blcksz", |v| (u64::from(v) == PAGE_BYTES as u64).then_some(()))?;
            Some(LongHeader { system_id, segment_size })
        } else {
            None
        };
        Ok(Self { major, flags, timeline, address, continued_bytes, long })
    }

    /// How many bytes the header takes.
    pub const fn bytes(&self) -> usize {
        if self.flags.is_long() { LONG_HEADER_BYTES } else { SHORT_HEADER_BYTES }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engines::postgres::wal::testing::{WalBuilder, small_segments};

    #[test]
    fn a_header_is_refused_at_every_truncation_and_at_another_position() {
        let wal = WalBuilder::new(PgMajor::V15, small_segments()).finish_segments();
        let (name, bytes) = &wal[0];
        let at = name.start(small_segments()).unwrap();
        let header = PageHeader::decode(bytes, at).unwrap();
        assert_eq!(header.major, PgMajor::V15);
        assert_eq!(header.long.unwrap().segment_size, small_segments());
        for cut in 0..LONG_HEADER_BYTES {
            assert!(PageHeader::decode(&bytes[..cut], at).is_err(), "{cut}");
        }
        let elsewhere = PageHeader::decode(bytes, Lsn::from(0x200_0000)).unwrap_err();
        assert_eq!(elsewhere.corrupt.field, "xlp_pageaddr");
    }

    #[test]
    fn flags_that_no_version_has_are_refused() {
        let wal = WalBuilder::new(PgMajor::V18, small_segments()).finish_segments();
        let (name, bytes) = &wal[0];
        let mut bytes = bytes.clone();
        bytes[2] |= 0x10;
        let err = PageHeader::decode(&bytes, name.start(small_segments()).unwrap()).unwrap_err();
        assert_eq!(err.to_string(), "xlp_info at byte 2 is 0x12, LSN 0/1000002");
    }
}
