//! How transactions end: commit, abort, prepare. Layout: docs/wal.md, "Transactions".

use crate::engines::postgres::wal::Record;
use crate::engines::postgres::wal::record::read_relation;
use crate::engines::postgres::wal::rmgr::Rmgr;
use crate::engines::postgres::wal::xlog::{read_i32, read_time};
use crate::error::Corrupt;
use crate::ids::{Lsn, Oid, PgMajor, RelFileLocator, Xid};
use crate::reader::{Reader, Writer};
use crate::time::TimestampTz;

const OPMASK: u8 = 0x70;
const COMMIT: u8 = 0x00;
const PREPARE: u8 = 0x10;
const ABORT: u8 = 0x20;
const COMMIT_PREPARED: u8 = 0x30;
const ABORT_PREPARED: u8 = 0x40;
const ASSIGNMENT: u8 = 0x50;
/// From 14.
const INVALIDATIONS: u8 = 0x60;
const HAS_INFO: u8 = 0x80;

const XINFO_HAS_DBINFO: u32 = 1;
const XINFO_HAS_SUBXACTS: u32 = 1 << 1;
const XINFO_HAS_RELFILELOCATORS: u32 = 1 << 2;
const XINFO_HAS_INVALS: u32 = 1 << 3;
const XINFO_HAS_TWOPHASE: u32 = 1 << 4;
const XINFO_HAS_ORIGIN: u32 = 1 << 5;
const XINFO_HAS_AE_LOCKS: u32 = 1 << 6;
const XINFO_HAS_GID: u32 = 1 << 7;
/// From 15.
const XINFO_HAS_DROPPED_STATS: u32 = 1 << 8;
const COMPLETION_APPLY_FEEDBACK: u32 = 1 << 29;
const COMPLETION_UPDATE_RELCACHE_FILE: u32 = 1 << 30;
const COMPLETION_FORCE_SYNC_COMMIT: u32 = 1 << 31;

const RELATION_BYTES: usize = 12;
const INVALIDATION_BYTES: usize = 16;
/// `GIDSIZE`.
const GID_BYTES_MAX: usize = 200;
/// `TWOPHASE_MAGIC`.
const TWOPHASE_MAGIC: u32 = 0x57F9_4534;

/// Which end of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XactKind {
    /// COMMIT.
    Commit,
    /// ABORT.
    Abort,
    /// COMMIT PREPARED.
    CommitPrepared,
    /// ROLLBACK PREPARED.
    AbortPrepared,
}

/// A commit or abort.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XactRecord {
    /// Which of them.
    pub kind: XactKind,
    /// The transaction that ended; of a prepared one, that one and not the one that said COMMIT PREPARED.
    pub xid: Xid,
    /// `xact_time`.
    pub time: TimestampTz,
    /// `xinfo`.
    pub info: u32,
    /// `dbId`, where the record says it.
    pub db_oid: Option<Oid>,
    /// `tsId`, where the record says it.
    pub spc_oid: Option<Oid>,
    /// Subtransactions that end with it.
    pub subxacts: Vec<Xid>,
    /// Relations whose files go.
    pub dropped: Vec<RelFileLocator>,
    /// How many statistics entries go, from 15.
    pub dropped_stats: u32,
    /// `SharedInvalidationMessage`s, as they are.
    pub invalidations: u32,
    /// The global identifier of a prepared transaction, where the record says it.
    pub gid: Option<String>,
    /// `origin_lsn` and `origin_timestamp` of a replicated transaction.
    pub origin: Option<(Lsn, TimestampTz)>,
}

/// The head of a PREPARE record, which is also the head of a file in pg_twophase.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepare {
    /// `xid`.
    pub xid: Xid,
    /// `total_len`: of the state file, its CRC included.
    pub total_bytes: u32,
    /// `database`.
    pub db_oid: Oid,
    /// `prepared_at`.
    pub time: TimestampTz,
    /// `owner`.
    pub owner: Oid,
    /// `initfileinval`.
    pub init_file_invalidated: bool,
    /// The global identifier.
    pub gid: String,
    /// Subtransactions.
    pub subxacts: Vec<Xid>,
    /// Relations whose files go if it commits.
    pub dropped_on_commit: Vec<RelFileLocator>,
    /// Relations whose files go if it aborts.
    pub dropped_on_abort: Vec<RelFileLocator>,
    /// `origin_lsn` and `origin_timestamp`, where replicated.
    pub origin: Option<(Lsn, TimestampTz)>,
}

/// Subtransactions assigned to their top-level transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XactAssignment {
    /// `xtop`.
    pub top: Xid,
    /// `xsub`.
    pub subxacts: Vec<Xid>,
}

/// Takes an array of `count` items of `item_bytes` each; the count is checked against what is left.
fn items<'a>(
    r: &mut Reader<'a>,
    count: i32,
    item_bytes: usize,
    at: u64,
    field: &'static str,
) -> Result<Reader<'a>, Corrupt> {
    let max = r.left().checked_div(item_bytes).unwrap_or(0);
    let count = usize::try_from(count).ok().filter(|count| *count <= max);
    let count = count.ok_or(Corrupt::too_large(field, at, u64::MAX, max as u64))?;
    let base = r.position();
    let bytes = count.saturating_mul(item_bytes);
    Ok(Reader::with_base(r.take(bytes, field)?, base))
}

/// Takes a count and that many items.
fn counted<'a>(r: &mut Reader<'a>, item_bytes: usize, field: &'static str) -> Result<Reader<'a>, Corrupt> {
    let at = r.position();
    let count = read_i32(r, field)?;
    if usize::try_from(count).is_err() {
        return Err(Corrupt::invalid(field, at, u64::from(count.cast_unsigned())));
    }
    items(r, count, item_bytes, at, field)
}

fn all<T>(
    mut r: Reader<'_>,
    mut read: impl FnMut(&mut Reader<'_>) -> Result<T, Corrupt>,
) -> Result<Vec<T>, Corrupt> {
    let mut out = Vec::new();
    while !r.is_empty() {
        out.push(read(&mut r)?);
    }
    Ok(out)
}

fn read_xid(r: &mut Reader<'_>) -> Result<Xid, Corrupt> {
    r.u32("xid").map(Xid::from)
}

fn stats_item_bytes(major: PgMajor) -> usize {
    // 18 made `objid` 64 bits wide.
    if major >= PgMajor::V18 { 16 } else { 12 }
}

/// Takes text up to its zero byte.
fn read_gid(r: &mut Reader<'_>) -> Result<String, Corrupt> {
    let rest = r.rest();
    let len = rest.iter().take(GID_BYTES_MAX).position(|b| *b == 0);
    let len =
        len.ok_or(Corrupt::too_large("twophase_gid", r.position(), rest.len() as u64, GID_BYTES_MAX as u64))?;
    let gid = String::from_utf8_lossy(r.take(len, "twophase_gid")?).into_owned();
    r.u8("twophase_gid")?;
    Ok(gid)
}

impl XactRecord {
    /// Decodes a commit or abort; `None` for any other record. Errors count bytes from the start of the
    /// main data.
    pub fn decode(record: &Record<'_>) -> Option<Result<Self, Corrupt>> {
        if record.rmgr() != Rmgr::XACT {
            return None;
        }
        let kind = match record.kind() & OPMASK {
            COMMIT => XactKind::Commit,
            ABORT => XactKind::Abort,
            COMMIT_PREPARED => XactKind::CommitPrepared,
            ABORT_PREPARED => XactKind::AbortPrepared,
            _ => return None,
        };
        let has_info = record.kind() & HAS_INFO != 0;
        Some(Self::decode_main(kind, has_info, record.header.xid, record.main_data(), record.major))
    }

    fn decode_main(
        kind: XactKind,
        has_info: bool,
        xid: Xid,
        main: &[u8],
        major: PgMajor,
    ) -> Result<Self, Corrupt> {
        let known = XINFO_HAS_DBINFO
            | XINFO_HAS_SUBXACTS
            | XINFO_HAS_RELFILELOCATORS
            | XINFO_HAS_INVALS
            | XINFO_HAS_TWOPHASE
            | XINFO_HAS_ORIGIN
            | XINFO_HAS_AE_LOCKS
            | XINFO_HAS_GID
            | if major >= PgMajor::V15 { XINFO_HAS_DROPPED_STATS } else { 0 }
            | COMPLETION_APPLY_FEEDBACK
            | COMPLETION_UPDATE_RELCACHE_FILE
            | COMPLETION_FORCE_SYNC_COMMIT;
        let r = &mut Reader::new(main);
        let time = read_time(r, "xact_time")?;
        let info_at = r.position();
        let info = if has_info { r.u32("xinfo")? } else { 0 };
        if info & !known != 0 {
            return Err(Corrupt::invalid("xinfo", info_at, u64::from(info)));
        }
        let has = |flag: u32| info & flag != 0;
        let mut out = Self {
            kind,
            xid,
            time,
            info,
            db_oid: None,
            spc_oid: None,
            subxacts: Vec::new(),
            dropped: Vec::new(),
            dropped_stats: 0,
            invalidations: 0,
            gid: None,
            origin: None,
        };
        if has(XINFO_HAS_DBINFO) {
            out.db_oid = Some(r.u32("dbId")?);
            out.spc_oid = Some(r.u32("tsId")?);
        }
        if has(XINFO_HAS_SUBXACTS) {
            out.subxacts = all(counted(r, 4, "nsubxacts")?, read_xid)?;
        }
        if has(XINFO_HAS_RELFILELOCATORS) {
            out.dropped = all(counted(r, RELATION_BYTES, "nrels")?, read_relation)?;
        }
        if has(XINFO_HAS_DROPPED_STATS) {
            let item_bytes = stats_item_bytes(major);
            let taken = counted(r, item_bytes, "nitems")?.left().checked_div(item_bytes).unwrap_or(0);
            out.dropped_stats = u32::try_from(taken).unwrap_or(u32::MAX);
        }
        if has(XINFO_HAS_INVALS) {
            let taken =
                counted(r, INVALIDATION_BYTES, "nmsgs")?.left().checked_div(INVALIDATION_BYTES).unwrap_or(0);
            out.invalidations = u32::try_from(taken).unwrap_or(u32::MAX);
        }
        if has(XINFO_HAS_TWOPHASE) {
            out.xid = read_xid(r)?;
            if has(XINFO_HAS_GID) {
                out.gid = Some(read_gid(r)?);
            }
        }
        if has(XINFO_HAS_ORIGIN) {
            out.origin = Some((r.u64("origin_lsn")?.into(), read_time(r, "origin_timestamp")?));
        }
        Ok(out)
    }

    /// Whether a record is a commit or abort that has no replication origin; cheaper than to decode it.
    pub fn is_without_origin(record: &Record<'_>) -> bool {
        let is_end = record.rmgr() == Rmgr::XACT
            && matches!(record.kind() & OPMASK, COMMIT | ABORT | COMMIT_PREPARED | ABORT_PREPARED);
        let info = record.main_data().get(8..).and_then(|rest| rest.first_chunk());
        let info = info.filter(|_| record.kind() & HAS_INFO != 0).map_or(0, |info| u32::from_le_bytes(*info));
        is_end && record.origin().is_none() && info & XINFO_HAS_ORIGIN == 0
    }

    /// Whether a record of this resource manager is of no use to recovery without standby queries.
    pub fn is_for_queries(record: &Record<'_>) -> bool {
        record.rmgr() == Rmgr::XACT && matches!(record.kind() & OPMASK, ASSIGNMENT | INVALIDATIONS)
    }

    /// `xl_info` and main data of a record that says the same, but for what only a running server needs to know: the
    /// database, statistics that go, invalidations and the global identifier are left out.
    pub fn encode(&self) -> (u8, Vec<u8>) {
        let (kind, is_prepared) = match self.kind {
            XactKind::Commit => (COMMIT, false),
            XactKind::Abort => (ABORT, false),
            XactKind::CommitPrepared => (COMMIT_PREPARED, true),
            XactKind::AbortPrepared => (ABORT_PREPARED, true),
        };
        let flag = |has: bool, flag: u32| if has { flag } else { 0 };
        let parts = flag(!self.subxacts.is_empty(), XINFO_HAS_SUBXACTS)
            | flag(!self.dropped.is_empty(), XINFO_HAS_RELFILELOCATORS)
            | flag(is_prepared, XINFO_HAS_TWOPHASE)
            | flag(self.origin.is_some(), XINFO_HAS_ORIGIN);
        let mut w = Writer::new();
        w.i64(self.time.postgres_micros());
        if parts == 0 {
            return (kind, w.into_bytes());
        }
        let count = |items: usize| u32::try_from(items).unwrap_or(u32::MAX);
        w.u32(parts);
        if !self.subxacts.is_empty() {
            w.u32(count(self.subxacts.len()));
            for xid in &self.subxacts {
                w.u32(xid.get());
            }
        }
        if !self.dropped.is_empty() {
            w.u32(count(self.dropped.len()));
            for RelFileLocator { spc_oid, db_oid, rel_number } in &self.dropped {
                w.u32(*spc_oid).u32(*db_oid).u32(*rel_number);
            }
        }
        if is_prepared {
            w.u32(self.xid.get());
        }
        if let Some((remote, time)) = self.origin {
            w.u64(remote.get()).i64(time.postgres_micros());
        }
        (kind | HAS_INFO, w.into_bytes())
    }
}

impl Prepare {
    /// Decodes a PREPARE; `None` for any other record.
    pub fn decode(record: &Record<'_>) -> Option<Result<Self, Corrupt>> {
        let is_prepare = record.rmgr() == Rmgr::XACT && record.kind() & OPMASK == PREPARE;
        is_prepare.then(|| Self::decode_main(record.main_data(), record.major))
    }

    /// Decodes the record's main data, or the file in pg_twophase.
    pub fn decode_main(main: &[u8], major: PgMajor) -> Result<Self, Corrupt> {
        let r = &mut Reader::new(main);
        let magic = r.u32("magic")?;
        if magic != TWOPHASE_MAGIC {
            return Err(Corrupt::mismatch("magic", 0, u64::from(magic), u64::from(TWOPHASE_MAGIC)));
        }
        let total_bytes = r.u32("total_len")?;
        let xid = read_xid(r)?;
        let db_oid = r.u32("database")?;
        let time = read_time(r, "prepared_at")?;
        let owner = r.u32("owner")?;
        let counts_at = r.position();
        let subxacts = read_i32(r, "nsubxacts")?;
        let commit_rels = read_i32(r, "ncommitrels")?;
        let abort_rels = read_i32(r, "nabortrels")?;
        if major >= PgMajor::V15 {
            r.take(8, "ncommitstats, nabortstats")?;
        }
        r.take(4, "ninvalmsgs")?;
        let init_file_invalidated = r.u8("initfileinval")? != 0;
        r.take(1, "padding")?;
        let gid_bytes = usize::from(r.u16("gidlen")?);
        let origin_lsn: Lsn = r.u64("origin_lsn")?.into();
        let origin_time = read_time(r, "origin_timestamp")?;
        let gid = aligned(r, gid_bytes, "gid")?;
        let gid = gid.split(|b| *b == 0).next().unwrap_or_default();
        let mut array = |count: i32, item_bytes: usize, field: &'static str| {
            let list = items(r, count, item_bytes, counts_at, field)?;
            // Each array is padded to eight bytes.
            let padding = list.left().wrapping_neg() & 7;
            r.take(padding.min(r.left()), "padding")?;
            Ok(list)
        };
        Ok(Self {
            xid,
            total_bytes,
            db_oid,
            time,
            owner,
            init_file_invalidated,
            gid: String::from_utf8_lossy(gid).into_owned(),
            subxacts: all(array(subxacts, 4, "nsubxacts")?, read_xid)?,
            dropped_on_commit: all(array(commit_rels, RELATION_BYTES, "ncommitrels")?, read_relation)?,
            dropped_on_abort: all(array(abort_rels, RELATION_BYTES, "nabortrels")?, read_relation)?,
            origin: (!origin_lsn.is_zero()).then_some((origin_lsn, origin_time)),
        })
    }
}

/// Takes `len` bytes and the padding to a multiple of eight behind them.
fn aligned<'a>(r: &mut Reader<'a>, len: usize, field: &'static str) -> Result<&'a [u8], Corrupt> {
    let taken = r.take(len, field)?;
    r.take(len.wrapping_neg() & 7, "padding")?;
    Ok(taken)
}

impl XactAssignment {
    /// Decodes an assignment; `None` for any other record.
    pub fn decode(record: &Record<'_>) -> Option<Result<Self, Corrupt>> {
        if record.rmgr() != Rmgr::XACT || record.kind() & OPMASK != ASSIGNMENT {
            return None;
        }
        let r = &mut Reader::new(record.main_data());
        let decoded = read_xid(r)
            .and_then(|top| Ok(Self { top, subxacts: all(counted(r, 4, "nsubxacts")?, read_xid)? }));
        Some(decoded)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_end_of_a_transaction_is_read_as_it_was_put_down(
            kind in prop::sample::select(vec![XactKind::Commit, XactKind::Abort, XactKind::CommitPrepared, XactKind::AbortPrepared]),
            xid in 3u32..,
            time: i64,
            subxacts in proptest::collection::vec(any::<u32>().prop_map(Xid::from), 0..4),
            dropped in proptest::collection::vec(any::<[u32; 3]>(), 0..4),
            origin in proptest::option::of(any::<(u64, i64)>()),
        ) {
            let relation = |[spc_oid, db_oid, rel_number]: [u32; 3]| RelFileLocator { spc_oid, db_oid, rel_number };
            let end = XactRecord {
                kind,
                xid: xid.into(),
                time: TimestampTz::from_postgres_micros(time),
                info: 0,
                db_oid: None,
                spc_oid: None,
                subxacts,
                dropped: dropped.into_iter().map(relation).collect(),
                dropped_stats: 0,
                invalidations: 0,
                gid: None,
                origin: origin.map(|(remote, time)| (remote.into(), TimestampTz::from_postgres_micros(time))),
            };
            let (info, main) = end.encode();
            // Of a prepared one the record's own transaction is another.
            let own = if info & 0x40 != 0 || info & OPMASK == COMMIT_PREPARED { Xid::INVALID } else { end.xid };
            let has_info = info & HAS_INFO != 0;
            let read = XactRecord::decode_main(kind, has_info, own, &main, PgMajor::V15).unwrap();
            prop_assert_eq!(XactRecord { info: 0, ..read }, end);
        }
    }

    fn commit_main(info: u32, stats_bytes: usize) -> Vec<u8> {
        let mut w = Writer::new();
        w.i64(7_000_000).u32(info).u32(5).u32(1663);
        w.u32(2).u32(741).u32(742);
        w.u32(1).u32(1663).u32(5).u32(16384);
        if info & XINFO_HAS_DROPPED_STATS != 0 {
            w.u32(1).bytes(&vec![7; stats_bytes]);
        }
        w.u32(1).bytes(&[9; 16]);
        w.u32(740).bytes(b"gid one\0");
        w.u64(0x99).i64(8_000_000);
        w.into_bytes()
    }

    const ALL_BUT_STATS: u32 = 0xBF;

    #[test]
    fn a_commit_with_every_part_is_read_in_each_major_and_refused_at_every_truncation() {
        let with_stats = ALL_BUT_STATS | XINFO_HAS_DROPPED_STATS;
        for (major, info, stats_bytes) in [
            (PgMajor::V13, ALL_BUT_STATS, 0),
            (PgMajor::V15, with_stats, 12),
            (PgMajor::V17, with_stats, 12),
            (PgMajor::V18, with_stats, 16),
        ] {
            let main = commit_main(info, stats_bytes);
            let decode = |main: &[u8]| {
                XactRecord::decode_main(XactKind::CommitPrepared, true, Xid::from(999), main, major)
            };
            let c = decode(&main).unwrap();
            assert_eq!((c.xid, c.db_oid, c.gid.as_deref()), (Xid::from(740), Some(5), Some("gid one")));
            assert_eq!(c.subxacts, [Xid::from(741), Xid::from(742)]);
            assert_eq!(c.dropped[0].to_string(), "1663/5/16384");
            assert_eq!(c.origin.unwrap().0, Lsn::from(0x99));
            assert_eq!((c.invalidations, c.dropped_stats), (1, u32::from(stats_bytes > 0)));
            for cut in 0..main.len() {
                assert!(decode(&main[..cut]).is_err(), "{major} {cut}");
            }
        }
    }

    #[test]
    fn a_part_that_the_major_does_not_have_is_refused() {
        let main = commit_main(ALL_BUT_STATS | XINFO_HAS_DROPPED_STATS, 12);
        let err =
            XactRecord::decode_main(XactKind::Commit, true, Xid::from(1), &main, PgMajor::V14).unwrap_err();
        assert_eq!(err.to_string(), "xinfo at byte 8 is 0x1BF");
    }

    #[test]
    fn a_count_that_the_record_cannot_hold_is_refused() {
        let mut w = Writer::new();
        w.i64(0).u32(XINFO_HAS_SUBXACTS).u32(0x7FFF_FFFF).u32(1);
        let err = XactRecord::decode_main(XactKind::Commit, true, Xid::from(1), w.as_bytes(), PgMajor::V15)
            .unwrap_err();
        assert_eq!(err.field, "nsubxacts");
    }

    #[test]
    fn a_commit_without_xinfo_has_only_its_time() {
        let c =
            XactRecord::decode_main(XactKind::Commit, false, Xid::from(7), &5i64.to_le_bytes(), PgMajor::V13)
                .unwrap();
        assert_eq!((c.time.postgres_micros(), c.xid, c.info), (5, Xid::from(7), 0));
    }

    #[test]
    fn a_prepare_is_read_before_and_after_the_statistics_came() {
        for major in [PgMajor::V14, PgMajor::V15] {
            let mut w = Writer::new();
            w.u32(TWOPHASE_MAGIC).u32(400).u32(740).u32(5).i64(9).u32(10).u32(1).u32(1).u32(1);
            if major >= PgMajor::V15 {
                w.u32(0).u32(0);
            }
            w.u32(0).u8(0).u8(0).u16(4).u64(0).i64(0);
            w.bytes(b"abc\0\0\0\0\0").u32(741).u32(0);
            for rel in [16384, 16400] {
                w.u32(1663).u32(5).u32(rel).u32(0);
            }
            let p = Prepare::decode_main(w.as_bytes(), major).unwrap();
            assert_eq!((p.gid.as_str(), p.subxacts.as_slice()), ("abc", &[Xid::from(741)][..]));
            assert_eq!(p.dropped_on_commit[0].rel_number, 16384);
            assert_eq!(p.dropped_on_abort[0].rel_number, 16400);
            for cut in 0..w.len() - 4 {
                assert!(Prepare::decode_main(&w.as_bytes()[..cut], major).is_err(), "{major} {cut}");
            }
        }
    }
}
