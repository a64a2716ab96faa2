//! What standbys are told: running transactions and exclusive locks.

use crate::engines::postgres::wal::Record;
use crate::engines::postgres::wal::rmgr::Rmgr;
use crate::engines::postgres::wal::xlog::read_i32;
use crate::error::Corrupt;
use crate::ids::{Oid, Xid};
use crate::reader::Reader;

const LOCK: u8 = 0x00;
const RUNNING_XACTS: u8 = 0x10;

/// `xl_running_xacts`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunningXactsRecord {
    /// `subxid_overflow`: subtransactions are missing from the list.
    pub subxid_overflow: bool,
    /// `nextXid`.
    pub next_xid: Xid,
    /// `oldestRunningXid`.
    pub oldest_running_xid: Xid,
    /// `latestCompletedXid`.
    pub latest_completed_xid: Xid,
    /// Running transactions (`xcnt`), then subtransactions (`subxcnt`).
    pub xids: Vec<Xid>,
    /// `xcnt`: how many of them are top-level.
    pub running: u32,
}

impl RunningXactsRecord {
    /// Decodes it; `None` for any other record. Errors count bytes from the start of the main data.
    pub fn decode(record: &Record<'_>) -> Option<Result<Self, Corrupt>> {
        let is_one = record.rmgr() == Rmgr::STANDBY && record.kind() == RUNNING_XACTS;
        is_one.then(|| Self::decode_main(record.main_data()))
    }

    fn decode_main(main: &[u8]) -> Result<Self, Corrupt> {
        let r = &mut Reader::new(main);
        let running = count(r, "xcnt")?;
        let subxacts = count(r, "subxcnt")?;
        let subxid_overflow = r.u8("subxid_overflow")? != 0;
        r.take(3, "padding")?;
        let next_xid = r.u32("nextXid")?.into();
        let oldest_running_xid = r.u32("oldestRunningXid")?.into();
        let latest_completed_xid = r.u32("latestCompletedXid")?.into();
        let bytes = (running as usize).saturating_add(subxacts as usize).saturating_mul(4);
        let xids = r.take(bytes, "xids")?.chunks_exact(4);
        let xids = xids.filter_map(|x| x.first_chunk::<4>()).map(|x| u32::from_le_bytes(*x).into()).collect();
        Ok(Self { subxid_overflow, next_xid, oldest_running_xid, latest_completed_xid, xids, running })
    }
}

/// `xl_standby_locks`: who holds a relation all alone (`AccessExclusiveLock`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExclusiveLocks {
    /// The (sub)transaction, the database, and the relation's OID, which is not its file's number.
    pub locks: Vec<(Xid, Oid, Oid)>,
}

impl ExclusiveLocks {
    /// Decodes it; `None` for any other record. Errors count bytes from the start of the main data.
    pub fn decode(record: &Record<'_>) -> Option<Result<Self, Corrupt>> {
        let is_one = record.rmgr() == Rmgr::STANDBY && record.kind() == LOCK;
        is_one.then(|| Self::decode_main(record.main_data()))
    }

    fn decode_main(main: &[u8]) -> Result<Self, Corrupt> {
        let r = &mut Reader::new(main);
        let nlocks = count(r, "nlocks")? as usize;
        let locks = &mut Reader::with_base(r.take(nlocks.saturating_mul(12), "locks")?, 4);
        let lock = |_| Ok((locks.u32("xid")?.into(), locks.u32("dbOid")?, locks.u32("relOid")?));
        (0..nlocks).map(lock).collect::<Result<_, _>>().map(|locks| Self { locks })
    }
}

fn count(r: &mut Reader<'_>, field: &'static str) -> Result<u32, Corrupt> {
    let at = r.position();
    let found = read_i32(r, field)?;
    u32::try_from(found).map_err(|_| Corrupt::invalid(field, at, u64::from(found.cast_unsigned())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reader::Writer;

    #[test]
    fn running_transactions_are_read_and_refused_at_every_truncation() {
        let mut w = Writer::new();
        w.u32(2).u32(1).u8(0).bytes(&[0; 3]).u32(750).u32(740).u32(748).u32(740).u32(745).u32(746);
        let x = RunningXactsRecord::decode_main(w.as_bytes()).unwrap();
        assert_eq!((x.running, x.xids.len(), x.oldest_running_xid), (2, 3, Xid::from(740)));
        for cut in 0..w.len() {
            assert!(RunningXactsRecord::decode_main(&w.as_bytes()[..cut]).is_err());
        }
        let mut hostile = Writer::new();
        hostile.u32(0x7FFF_FFFF).u32(0x7FFF_FFFF).bytes(&[0; 32]);
        assert!(RunningXactsRecord::decode_main(hostile.as_bytes()).is_err());
    }

    #[test]
    fn locks_are_read_and_refused_at_every_truncation() {
        let mut w = Writer::new();
        w.u32(2).u32(740).u32(5).u32(16384).u32(741).u32(5).u32(16390);
        let found = ExclusiveLocks::decode_main(w.as_bytes()).unwrap();
        assert_eq!(found.locks, [(Xid::from(740), 5, 16384), (Xid::from(741), 5, 16390)]);
        for cut in 0..w.len() {
            assert!(ExclusiveLocks::decode_main(&w.as_bytes()[..cut]).is_err());
        }
        let mut hostile = Writer::new();
        hostile.u32(0x7FFF_FFFF).bytes(&[0; 32]);
        assert!(ExclusiveLocks::decode_main(hostile.as_bytes()).is_err());
    }
}
