//! Logs that no record refers to by block: pages begun, pages cut off. Units: docs/wal.md, "State besides pages".

use crate::engines::postgres::wal::Record;
use crate::engines::postgres::wal::rmgr::Rmgr;
use crate::error::Corrupt;
use crate::ids::PgMajor;
use crate::reader::Reader;

/// A log in pages of its own (PostgreSQL calls them SLRUs) that replay keeps up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Slru {
    /// How transactions ended.
    Xact,
    /// When transactions were committed.
    CommitTs,
    /// Where each multixact's members start.
    MultiXactOffset,
    /// The members of multixacts.
    MultiXactMember,
}

impl Slru {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Xact, Self::CommitTs, Self::MultiXactOffset, Self::MultiXactMember];
    /// `SLRU_PAGES_PER_SEGMENT`: pages in a file.
    pub const PAGES_PER_FILE: u32 = 32;

    /// Its directory in the data directory.
    pub const fn directory(self) -> &'static str {
        match self {
            Self::Xact => "pg_xact",
            Self::CommitTs => "pg_commit_ts",
            Self::MultiXactOffset => "pg_multixact/offsets",
            Self::MultiXactMember => "pg_multixact/members",
        }
    }

    /// How many numbers a page tells of.
    pub const fn entries_per_page(self) -> u32 {
        match self {
            Self::Xact => 32768,
            Self::CommitTs => 819,
            Self::MultiXactOffset => 2048,
            Self::MultiXactMember => 1636,
        }
    }

    /// The page that tells of a transaction, a multixact or a member.
    pub const fn page_of(self, number: u32) -> u32 {
        match number.checked_div(self.entries_per_page()) {
            Some(page) => page,
            None => 0,
        }
    }

    /// The entry in that page.
    pub const fn entry_of(self, number: u32) -> u32 {
        match number.checked_rem(self.entries_per_page()) {
            Some(entry) => entry,
            None => 0,
        }
    }

    /// The last page there can be.
    pub const fn page_max(self) -> u32 {
        self.page_of(u32::MAX)
    }

    /// The name of the file with these pages: page divided by [`Self::PAGES_PER_FILE`].
    pub fn file_name(file: u32) -> String {
        format!("{file:04X}")
    }

    /// The number of the file of that name; `None` for a name that no file of such a log has.
    pub fn file_number(name: &str) -> Option<u32> {
        let hex = |b: u8| b.is_ascii_digit() || (b'A'..=b'F').contains(&b);
        let is_one = (4..=6).contains(&name.len()) && name.bytes().all(hex);
        is_one.then(|| u32::from_str_radix(name, 16).ok()).flatten()
    }
}

/// A record about the pages of such a log: all kinds of CLOG and CommitTs, and the two of MultiXact that begin pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlruRecord {
    /// A page begins with zeros.
    ZeroPage {
        /// In this log.
        slru: Slru,
        /// The page.
        page: u32,
    },
    /// Files whose pages all lie before this one go.
    Truncate {
        /// In this log.
        slru: Slru,
        /// The first page that is needed.
        page: u32,
    },
}

impl SlruRecord {
    /// Decodes it; `None` for any other record. Errors count bytes from the start of the main data.
    pub fn decode(record: &Record<'_>) -> Option<Result<Self, Corrupt>> {
        let decode = match (record.rmgr(), record.kind()) {
            (Rmgr::CLOG, 0x00) => Self::decode_zero(Slru::Xact, record),
            (Rmgr::CLOG, 0x10) => Self::decode_truncate(Slru::Xact, record),
            (Rmgr::COMMIT_TS, 0x00) => Self::decode_zero(Slru::CommitTs, record),
            (Rmgr::COMMIT_TS, 0x10) => Self::decode_truncate(Slru::CommitTs, record),
            (Rmgr::MULTIXACT, 0x00) => Self::decode_zero(Slru::MultiXactOffset, record),
            (Rmgr::MULTIXACT, 0x10) => Self::decode_zero(Slru::MultiXactMember, record),
            (Rmgr::CLOG | Rmgr::COMMIT_TS, other) => Err(Corrupt::invalid("xl_info", 0, other.into())),
            _ => return None,
        };
        Some(decode)
    }

    fn decode_zero(slru: Slru, record: &Record<'_>) -> Result<Self, Corrupt> {
        let mut r = Reader::new(record.main_data());
        let page = read_page(&mut r, slru, record.major)?;
        r.finish("pageno")?;
        Ok(Self::ZeroPage { slru, page })
    }

    fn decode_truncate(slru: Slru, record: &Record<'_>) -> Result<Self, Corrupt> {
        let mut r = Reader::new(record.main_data());
        let page = read_page(&mut r, slru, record.major)?;
        r.u32("oldestXid")?;
        if slru == Slru::Xact {
            r.u32("oldestXactDb")?;
        }
        r.finish("oldestXid")?;
        Ok(Self::Truncate { slru, page })
    }
}

/// Takes a page's number, which 17 made 64 bits wide.
fn read_page(r: &mut Reader<'_>, slru: Slru, major: PgMajor) -> Result<u32, Corrupt> {
    let at = r.position();
    let found = if major >= PgMajor::V17 { r.u64("pageno")? } else { r.u32("pageno")?.into() };
    let page = u32::try_from(found).ok().filter(|page| *page <= slru.page_max());
    page.ok_or(Corrupt::too_large("pageno", at, found, slru.page_max().into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engines::postgres::wal::testing::with_record;

    fn decode(major: PgMajor, rmid: u8, info: u8, main: &[u8]) -> Option<Result<SlruRecord, Corrupt>> {
        with_record(major, rmid, info, main, SlruRecord::decode)
    }

    #[test]
    fn a_page_is_read_in_both_widths_and_refused_at_every_truncation_and_beyond_the_last() {
        for (rmid, info, slru, behind) in [
            (3, 0x00, Slru::Xact, 0),
            (3, 0x10, Slru::Xact, 8),
            (18, 0x00, Slru::CommitTs, 0),
            (18, 0x10, Slru::CommitTs, 4),
            (6, 0x00, Slru::MultiXactOffset, 0),
            (6, 0x10, Slru::MultiXactMember, 0),
        ] {
            for (major, width) in [(PgMajor::V15, 4), (PgMajor::V17, 8)] {
                let main = |page: u64| [&page.to_le_bytes()[..width], &vec![0; behind]].concat();
                let page = slru.page_max();
                let expected = match (rmid, info) {
                    (3 | 18, 0x10) => SlruRecord::Truncate { slru, page },
                    _ => SlruRecord::ZeroPage { slru, page },
                };
                let good = main(page.into());
                assert_eq!(decode(major, rmid, info, &good), Some(Ok(expected)));
                assert!(decode(major, rmid, info, &main(u64::from(page) + 1)).unwrap().is_err());
                for cut in 0..good.len() {
                    assert!(decode(major, rmid, info, &good[..cut]).unwrap().is_err());
                }
            }
        }
        assert!(decode(PgMajor::V15, 3, 0x20, &[0; 12]).unwrap().is_err());
        assert_eq!(decode(PgMajor::V15, 6, 0x20, &[0; 12]), None);
    }

    #[test]
    fn the_last_pages_are_those_of_the_last_numbers() {
        let last = Slru::ALL.map(|slru| (slru.page_max(), slru.page_max() / Slru::PAGES_PER_FILE));
        assert_eq!(last, [(131_071, 0xFFF), (5_244_160, 0x28028), (2_097_151, 0xFFFF), (2_625_285, 0x14078)]);
        assert_eq!((Slru::file_name(0x14078).as_str(), Slru::file_number("14078")), ("14078", Some(0x14078)));
        for no in ["000", "00a0", "0000000", "0000.tmp", "+123"] {
            assert_eq!(Slru::file_number(no), None);
        }
    }
}
