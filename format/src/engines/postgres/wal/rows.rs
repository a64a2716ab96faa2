//! What heap records do to rows. Field orders: docs/wal.md, "Records that are read for what they say".

use crate::engines::postgres::wal::Record;
use crate::engines::postgres::wal::rmgr::Rmgr;
use crate::error::Corrupt;
use crate::ids::{Oid, RelFileLocator};
use crate::reader::Reader;

const OPMASK: u8 = 0x70;
const HEAP_INSERT: u8 = 0x00;
const HEAP_DELETE: u8 = 0x10;
const HEAP_UPDATE: u8 = 0x20;
const HEAP_TRUNCATE: u8 = 0x30;
const HEAP_HOT_UPDATE: u8 = 0x40;
const HEAP2_MULTI_INSERT: u8 = 0x50;

/// `XLH_DELETE_IS_SUPER`: a speculative insertion lost its race.
const DELETE_IS_SUPER: u8 = 1 << 3;

/// What a heap record does to rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowChange {
    /// So many rows came.
    Inserted(u32),
    /// A row that was inserted on trial (`ON CONFLICT`) went again.
    TakenBack,
    /// A row got a new version.
    Updated {
        /// On the same page and in no index.
        hot: bool,
    },
    /// A row went.
    Deleted,
}

impl RowChange {
    /// Decodes it, with the relation whose rows they are; `None` for a record that changes no row: locks,
    /// confirmations of an insertion, updates in place. Errors count bytes from the start of the main data.
    pub fn decode(record: &Record<'_>) -> Option<Result<(RelFileLocator, Self), Corrupt>> {
        let decode = match (record.rmgr(), record.kind() & OPMASK) {
            (Rmgr::HEAP, HEAP_INSERT) => |_: &mut Reader<'_>| Ok(Self::Inserted(1)),
            (Rmgr::HEAP, HEAP_DELETE) => Self::decode_delete,
            (Rmgr::HEAP, HEAP_UPDATE) => |_: &mut Reader<'_>| Ok(Self::Updated { hot: false }),
            (Rmgr::HEAP, HEAP_HOT_UPDATE) => |_: &mut Reader<'_>| Ok(Self::Updated { hot: true }),
            (Rmgr::HEAP2, HEAP2_MULTI_INSERT) => Self::decode_multi_insert,
            _ => return None,
        };
        let change = decode(&mut Reader::new(record.main_data()));
        let block = record.block(0).ok_or(Corrupt::invalid("block_id", 0, 0));
        Some(change.and_then(|change| Ok((block?.relation, change))))
    }

    fn decode_delete(r: &mut Reader<'_>) -> Result<Self, Corrupt> {
        r.take(7, "xmax, offnum, infobits_set")?;
        let flags = r.u8("flags")?;
        Ok(if flags & DELETE_IS_SUPER != 0 { Self::TakenBack } else { Self::Deleted })
    }

    fn decode_multi_insert(r: &mut Reader<'_>) -> Result<Self, Corrupt> {
        r.take(2, "flags")?;
        Ok(Self::Inserted(r.u16("ntuples")?.into()))
    }
}

/// A TRUNCATE command, which is in the WAL where `wal_level` is `logical`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeapTruncate {
    /// `dbId`.
    pub db_oid: Oid,
    /// `relids`: of the relations themselves, not of their files.
    pub rel_oids: Vec<Oid>,
}

impl HeapTruncate {
    /// Decodes it; `None` for any other record. Errors count bytes from the start of the main data.
    pub fn decode(record: &Record<'_>) -> Option<Result<Self, Corrupt>> {
        let is_one = record.rmgr() == Rmgr::HEAP && record.kind() & OPMASK == HEAP_TRUNCATE;
        is_one.then(|| Self::decode_main(record.main_data()))
    }

    fn decode_main(main: &[u8]) -> Result<Self, Corrupt> {
        let r = &mut Reader::new(main);
        let db_oid = r.u32("dbId")?;
        let count_at = r.position();
        let count = r.u32("nrelids")?;
        r.take(4, "flags")?;
        let max = r.left() as u64 / 4;
        if u64::from(count) > max {
            return Err(Corrupt::too_large("nrelids", count_at, u64::from(count), max));
        }
        let rel_oids = (0..count).map(|_| r.u32("relids")).collect::<Result<_, _>>()?;
        Ok(Self { db_oid, rel_oids })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engines::postgres::wal::testing::{RELATION, TestBlock, record_bytes};
    use crate::ids::{ForkNumber, Lsn, PgMajor};

    fn change(rmid: u8, info: u8, main: &[u8]) -> Option<Result<RowChange, Corrupt>> {
        let blocks = [TestBlock::data(0, ForkNumber::Main, 3, b"x")];
        let bytes = record_bytes(PgMajor::V15, rmid, info, 7, Lsn::from(0x28), &blocks, main);
        let mut refs = Vec::new();
        let record =
            Record::decode(&bytes, Lsn::from(0x100), Lsn::from(0x200), PgMajor::V15, &mut refs).unwrap();
        RowChange::decode(&record).map(|found| {
            found.map(|(relation, change)| {
                assert_eq!(relation, RELATION);
                change
            })
        })
    }

    #[test]
    fn each_heap_record_tells_its_rows() {
        let changed = |rmid, info, main: &[u8]| change(rmid, info, main).map(Result::unwrap);
        let delete = |flags| [0, 0, 0, 0, 1, 0, 0, flags];
        // The highest bit says that the page is made anew.
        assert_eq!(changed(10, 0x80, &[1, 0, 0]), Some(RowChange::Inserted(1)));
        assert_eq!(changed(10, 0x10, &delete(0)), Some(RowChange::Deleted));
        assert_eq!(changed(10, 0x10, &delete(0x08)), Some(RowChange::TakenBack));
        assert_eq!(changed(10, 0x20, &[0; 14]), Some(RowChange::Updated { hot: false }));
        assert_eq!(changed(10, 0x40, &[0; 14]), Some(RowChange::Updated { hot: true }));
        assert_eq!(changed(9, 0xD0, &[0, 0, 0x2C, 1, 9, 9]), Some(RowChange::Inserted(300)));
        for (rmid, info) in [(10, 0x30), (10, 0x50), (10, 0x60), (10, 0x70), (9, 0x10), (9, 0x60), (11, 0)] {
            assert_eq!(changed(rmid, info, &[0; 16]), None, "{rmid} {info:#x}");
        }
    }

    #[test]
    fn rows_that_are_cut_off_are_refused() {
        for (rmid, info, len) in [(10, 0x10, 8), (9, 0x50, 4)] {
            for cut in 1..len {
                assert!(change(rmid, info, &vec![0; cut]).unwrap().is_err(), "{rmid} {cut}");
            }
            assert!(change(rmid, info, &vec![0; len]).unwrap().is_ok());
        }
    }

    #[test]
    fn a_truncate_names_its_relations_and_no_more_than_it_holds() {
        let main: Vec<u8> = [5u32, 2, 0, 16384, 16390].iter().flat_map(|v| v.to_le_bytes()).collect();
        let found = HeapTruncate::decode_main(&main).unwrap();
        assert_eq!((found.db_oid, found.rel_oids.as_slice()), (5, &[16384, 16390][..]));
        for cut in 0..main.len() {
            assert!(HeapTruncate::decode_main(&main[..cut]).is_err(), "{cut}");
        }
        let mut hostile = main;
        hostile[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        let err = HeapTruncate::decode_main(&hostile).unwrap_err();
        assert_eq!(err.to_string(), "nrelids at byte 4 is 4294967295, more than the 2 allowed");
    }
}
