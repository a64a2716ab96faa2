//! What a record does besides changing pages, in the words of the archive's indexes.

use crate::archive::{
    CheckpointInfo, CheckpointKind, CommitKind, FileEvent, FileEventKind, RunningXacts, XactEnd,
};
use crate::engines::postgres::wal::{
    Checkpoint, DatabaseRecord, Prepare, Record, RelationMapUpdate, RunningXactsRecord, SmgrRecord,
    TablespaceRecord, XactKind, XactRecord,
};
use crate::error::Corrupt;

/// The end of a transaction that a record is, its PREPARE included; `None` for any other record.
pub fn xact_end(record: &Record<'_>) -> Option<Result<XactEnd, Corrupt>> {
    match XactRecord::decode(record) {
        Some(xact) => Some(xact.map(|xact| ended(record, xact))),
        None => Prepare::decode(record).map(|prepare| Ok(prepared(record, prepare?))),
    }
}

/// `xl_info` and main data of a record that says the same as a transaction's end without an origin; none of a PREPARE, whose
/// record says more. See [`XactRecord::encode`].
pub fn record_of(end: &XactEnd) -> Option<(u8, Vec<u8>)> {
    let kind = match end.kind {
        CommitKind::Commit => XactKind::Commit,
        CommitKind::Abort => XactKind::Abort,
        CommitKind::CommitPrepared => XactKind::CommitPrepared,
        CommitKind::AbortPrepared => XactKind::AbortPrepared,
        CommitKind::Prepare => return None,
    };
    let xact = XactRecord {
        kind,
        xid: end.xid,
        time: end.time,
        info: 0,
        db_oid: None,
        spc_oid: None,
        subxacts: end.subxacts.clone(),
        dropped: end.dropped.clone(),
        dropped_stats: 0,
        invalidations: 0,
        gid: None,
        origin: None,
    };
    Some(xact.encode())
}

fn ended(record: &Record<'_>, xact: XactRecord) -> XactEnd {
    XactEnd {
        kind: match xact.kind {
            XactKind::Commit => CommitKind::Commit,
            XactKind::Abort => CommitKind::Abort,
            XactKind::CommitPrepared => CommitKind::CommitPrepared,
            XactKind::AbortPrepared => CommitKind::AbortPrepared,
        },
        xid: xact.xid,
        start: record.start,
        end: record.end,
        time: xact.time,
        db_oid: xact.db_oid,
        subxacts: xact.subxacts,
        dropped: xact.dropped,
        gid: xact.gid,
    }
}

fn prepared(record: &Record<'_>, prepare: Prepare) -> XactEnd {
    XactEnd {
        kind: CommitKind::Prepare,
        xid: prepare.xid,
        start: record.start,
        end: record.end,
        time: prepare.time,
        db_oid: Some(prepare.db_oid),
        subxacts: prepare.subxacts,
        // What it drops goes with its COMMIT PREPARED or ROLLBACK PREPARED, which lists it again.
        dropped: Vec::new(),
        gid: Some(prepare.gid),
    }
}

/// What a checkpoint's record says.
pub(super) const fn checkpoint(record: &Record<'_>, kind: CheckpointKind, c: &Checkpoint) -> CheckpointInfo {
    CheckpointInfo {
        kind,
        start: record.start,
        end: record.end,
        redo: c.redo,
        timeline: c.timeline,
        previous_timeline: c.previous_timeline,
        full_page_writes: c.full_page_writes,
        next_full_xid: c.next_full_xid,
        oldest_active_xid: c.oldest_active_xid,
        time: c.time(),
    }
}

/// The horizons that a running-xacts record tells; `None` for any other record.
pub fn running_xacts(record: &Record<'_>) -> Option<Result<RunningXacts, Corrupt>> {
    let told = |running: RunningXactsRecord| RunningXacts {
        start: record.start,
        next_xid: running.next_xid,
        oldest_running_xid: running.oldest_running_xid,
        running: running.running,
    };
    RunningXactsRecord::decode(record).map(|running| running.map(told))
}

/// What a record does to files.
pub fn file_event(record: &Record<'_>) -> Result<Option<FileEvent>, Corrupt> {
    let found = |kind| Ok(Some(FileEvent { start: record.start, xid: record.header.xid, kind }));
    if let Some(smgr) = SmgrRecord::decode(record) {
        return found(match smgr? {
            SmgrRecord::Create { relation, fork } => FileEventKind::Create { relation, fork },
            SmgrRecord::Truncate { relation, blocks, flags } => {
                FileEventKind::Truncate { relation, blocks, flags }
            }
        });
    }
    if let Some(database) = DatabaseRecord::decode(record) {
        return found(match database? {
            DatabaseRecord::Copy { db_oid, spc_oid, from_db_oid, from_spc_oid } => {
                FileEventKind::DatabaseCopy { to: (spc_oid, db_oid), from: (from_spc_oid, from_db_oid) }
            }
            DatabaseRecord::Create { db_oid, spc_oid } => {
                FileEventKind::DatabaseCreate { database: (spc_oid, db_oid) }
            }
            DatabaseRecord::Drop { db_oid, spc_oids } => {
                FileEventKind::DatabaseDrop { db_oid, tablespaces: spc_oids }
            }
        });
    }
    if let Some(tablespace) = TablespaceRecord::decode(record) {
        return found(match tablespace? {
            TablespaceRecord::Create { spc_oid, path } => FileEventKind::TablespaceCreate { spc_oid, path },
            TablespaceRecord::Drop { spc_oid } => FileEventKind::TablespaceDrop { spc_oid },
        });
    }
    if let Some(map) = RelationMapUpdate::decode(record) {
        let RelationMapUpdate { db_oid, spc_oid, .. } = map?;
        return found(FileEventKind::RelationMap { spc_oid, db_oid });
    }
    Ok(None)
}
