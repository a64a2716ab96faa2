//! What a record does besides changing pages: one ordered list of effects, which [`State`](super::State) carries out. Pure and total.
//! Facts: docs/wal.md, "State besides pages". What happens to relations' files is not among them.

use waltide_format::engines::postgres::catalogue::RelationMap;
use waltide_format::engines::postgres::cluster::check_two_phase;
use waltide_format::engines::postgres::wal::{
    DatabaseRecord, MultiXactRecord, OriginRecord, Prepare, Record, RelationMapUpdate, Rmgr, Slru,
    SlruRecord, SmgrRecord, TablespaceRecord, XactKind, XactRecord, XlogRecord,
};
use waltide_format::{Corrupt, Lsn, Oid, PgMajor, TimestampTz, Xid};

/// `XLR_SPECIAL_REL_UPDATE` and `XLR_CHECK_CONSISTENCY`: all that `xl_info` has besides the kind.
const INFO_FLAGS: u8 = 0x03;

const XACT_OPMASK: u8 = 0x70;
const XACT_ASSIGNMENT: u8 = 0x50;
const XACT_INVALIDATIONS: u8 = 0x60;
const XLOG_CHECKPOINT_SHUTDOWN: u8 = 0x00;
const XLOG_CHECKPOINT_ONLINE: u8 = 0x10;
const XLOG_PARAMETER_CHANGE: u8 = 0x60;
const XLOG_FPI_FOR_HINT: u8 = 0xA0;
const XLOG_FPI: u8 = 0xB0;
const DBASE_FILE_COPY: u8 = 0x00;
/// The highest kinds that Standby and LogicalMessage have.
const STANDBY_INVALIDATIONS: u8 = 0x20;
const LOGICAL_MESSAGE: u8 = 0x00;

/// `GLOBALTABLESPACE_OID`: where what all databases share lies.
pub(super) const GLOBAL_TABLESPACE: Oid = 1664;
/// `DEFAULTTABLESPACE_OID`.
pub(super) const DEFAULT_TABLESPACE: Oid = 1663;
/// `RELMAP` files' length in 13 to 15.
const RELATION_MAP_BYTES: usize = 512;

/// How a transaction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Its changes hold.
    Committed,
    /// They do not.
    Aborted,
}

/// A change of something that is not a page of a relation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
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
    /// Transactions ended.
    SetStatus {
        /// How.
        status: Ended,
        /// The transaction and its subtransactions.
        xids: Vec<Xid>,
    },
    /// Transactions were committed then; matters where commit timestamps are kept.
    CommitTimestamps {
        /// The transaction and its subtransactions.
        xids: Vec<Xid>,
        /// When.
        time: TimestampTz,
        /// The replication origin; zero for none.
        origin: u16,
    },
    /// Commit timestamps are kept from here on, or are not and go.
    TrackCommitTimestamps(bool),
    /// A multixact was made.
    MultiXact {
        /// The multixact.
        multi: u32,
        /// Its first member's number.
        offset: u32,
        /// The members: transaction and `MultiXactStatus`.
        members: Vec<(Xid, u8)>,
    },
    /// Multixacts are needed no more.
    TruncateMultiXacts {
        /// The first that is needed.
        end: u32,
        /// Members that go, the end not included.
        members: (u32, u32),
    },
    /// A transaction was prepared.
    Prepare {
        /// The transaction.
        xid: Xid,
        /// Its state: the record's main data.
        state: Vec<u8>,
    },
    /// A prepared transaction was committed or rolled back.
    Finish {
        /// The transaction.
        xid: Xid,
    },
    /// A relation map was replaced.
    RelationMap {
        /// Whose; zero for the map of shared relations.
        db_oid: Oid,
        /// Where.
        spc_oid: Oid,
        /// The file.
        map: Vec<u8>,
    },
    /// A database's directory was made.
    CreateDatabase {
        /// The database.
        db_oid: Oid,
        /// Where.
        spc_oid: Oid,
    },
    /// A database's directories were removed.
    DropDatabase {
        /// The database.
        db_oid: Oid,
        /// From where.
        spc_oids: Vec<Oid>,
    },
    /// A tablespace was made.
    CreateTablespace {
        /// The tablespace.
        spc_oid: Oid,
        /// Where the log says; empty for one in the data directory.
        path: String,
    },
    /// A tablespace was dropped.
    DropTablespace {
        /// The tablespace.
        spc_oid: Oid,
    },
    /// A replication origin came so far.
    SetOrigin {
        /// The origin.
        origin: u16,
        /// Where it is there.
        remote: Lsn,
        /// Whether even where that is less than before.
        backward: bool,
    },
    /// A replication origin was dropped.
    DropOrigin {
        /// The origin.
        origin: u16,
    },
    /// The next transaction's number.
    NextXid {
        /// It, without the epoch.
        xid: Xid,
        /// Whether it is that and not only not less.
        exact: bool,
    },
}

/// Whether [`effects`] may have any: cheap, to decide which records are kept.
pub fn changes_state(record: &Record<'_>) -> bool {
    let kind = record.kind();
    match record.rmgr() {
        Rmgr::XACT => !matches!(kind & XACT_OPMASK, XACT_ASSIGNMENT | XACT_INVALIDATIONS),
        Rmgr::XLOG => {
            matches!(kind, XLOG_CHECKPOINT_SHUTDOWN | XLOG_CHECKPOINT_ONLINE | XLOG_PARAMETER_CHANGE)
        }
        Rmgr::DBASE => kind != DBASE_FILE_COPY,
        Rmgr::CLOG | Rmgr::TBLSPC | Rmgr::MULTIXACT | Rmgr::RELMAP | Rmgr::COMMIT_TS | Rmgr::REPLORIGIN => {
            true
        }
        _ => false,
    }
}

/// Whether replay knows all that a record does: [`effects`] what is not a page, [`apply`](super::apply) what is one, and what
/// happens to relations' files. A database copied file by file is not known here, nor what an extension's resource manager does.
pub fn vouches_for(record: &Record<'_>) -> bool {
    let kind = record.kind();
    if !vouches_for_flags(record.major, record.header.info) {
        return false;
    }
    match record.rmgr() {
        // Without the pages in it the log cannot be replayed, and PostgreSQL refuses it too.
        Rmgr::XLOG => match XlogRecord::decode(record) {
            Some(Ok(XlogRecord::ParameterChange(settings))) => settings.wal_level > 0,
            Some(decoded) => decoded.is_ok(),
            None => false,
        },
        Rmgr::XACT => effects(record).is_ok(),
        Rmgr::SMGR => SmgrRecord::decode(record).is_some_and(|decoded| decoded.is_ok()),
        Rmgr::DBASE => kind != DBASE_FILE_COPY && effects(record).is_ok(),
        Rmgr::CLOG | Rmgr::TBLSPC | Rmgr::MULTIXACT | Rmgr::RELMAP | Rmgr::COMMIT_TS | Rmgr::REPLORIGIN => {
            effects(record).is_ok()
        }
        rmgr => changes_only_pages(rmgr, kind),
    }
}

/// The same of a record of which no more is known than that it changes only pages, if anything.
pub fn vouches_for_pages(major: PgMajor, rmgr: Rmgr, info: u8) -> bool {
    let kind = info & 0xF0;
    vouches_for_flags(major, info)
        && match rmgr {
            Rmgr::XLOG => matches!(kind, XLOG_FPI | XLOG_FPI_FOR_HINT),
            Rmgr::XACT => matches!(kind & XACT_OPMASK, XACT_ASSIGNMENT | XACT_INVALIDATIONS),
            rmgr => changes_only_pages(rmgr, kind),
        }
}

const fn vouches_for_flags(major: PgMajor, info: u8) -> bool {
    major.get() == PgMajor::V15.get() && info & !0xF0 & !INFO_FLAGS == 0
}

/// Whether this is a known kind of a resource manager whose records change pages, or nothing.
fn changes_only_pages(rmgr: Rmgr, kind: u8) -> bool {
    match rmgr {
        Rmgr::STANDBY => kind <= STANDBY_INVALIDATIONS,
        Rmgr::LOGICALMSG => kind == LOGICAL_MESSAGE,
        rmgr => has_page_kind(rmgr, kind) && super::knows_kind(rmgr, kind),
    }
}

/// Whether 15 has this kind of record about pages, those included that change none.
const fn has_page_kind(rmgr: Rmgr, kind: u8) -> bool {
    match rmgr {
        // All eight, and whether a page is made anew besides.
        Rmgr::HEAP | Rmgr::HEAP2 => true,
        Rmgr::BTREE => kind <= 0xE0,
        Rmgr::HASH => kind <= 0xC0,
        Rmgr::GIN => kind >= 0x10 && kind <= 0x90,
        Rmgr::GIST => matches!(kind, 0x00..=0x30 | 0x60 | 0x70),
        Rmgr::SPGIST => kind >= 0x10 && kind <= 0x80,
        // An entry and an update may make a page anew besides.
        Rmgr::BRIN => matches!(kind, 0x00..=0x50 | 0x90 | 0xA0),
        Rmgr::SEQ | Rmgr::GENERIC => kind == 0x00,
        _ => false,
    }
}

/// What a record does besides changing pages, in order. Errors count bytes from the start of the main data.
pub fn effects(record: &Record<'_>) -> Result<Vec<Effect>, Corrupt> {
    if !changes_state(record) {
        return Ok(Vec::new());
    }
    if record.major != PgMajor::V15 {
        return Err(unknown(record));
    }
    if let Some(xact) = XactRecord::decode(record) {
        return ended(record, xact?);
    }
    let one = match record.rmgr() {
        Rmgr::XACT => return prepared(record),
        Rmgr::XLOG => of_the_log(record)?,
        Rmgr::DBASE => database(record)?,
        Rmgr::TBLSPC => tablespace(record)?,
        Rmgr::RELMAP => relation_map(record)?,
        Rmgr::REPLORIGIN => origin(record)?,
        _ => slru(record)?,
    };
    Ok(vec![one])
}

fn ended(record: &Record<'_>, xact: XactRecord) -> Result<Vec<Effect>, Corrupt> {
    let xids: Vec<Xid> = std::iter::once(xact.xid).chain(xact.subxacts).collect();
    for xid in &xids {
        check_xid(*xid)?;
    }
    let mut effects = Vec::with_capacity(3);
    let progress = match (xact.origin, record.origin()) {
        (Some((remote, time)), Some(origin)) if origin != 0 => Some((origin, remote, time)),
        (Some(_), origin) => return Err(Corrupt::invalid("origin", 0, origin.unwrap_or(0).into())),
        (None, _) => None,
    };
    let committed = matches!(xact.kind, XactKind::Commit | XactKind::CommitPrepared);
    if committed {
        // Of a replicated transaction its time at home.
        let time = progress.map_or(xact.time, |(_, _, time)| time);
        let origin = record.origin().unwrap_or(0);
        effects.push(Effect::CommitTimestamps { xids: xids.clone(), time, origin });
    }
    let status = if committed { Ended::Committed } else { Ended::Aborted };
    effects.push(Effect::SetStatus { status, xids });
    if let Some((origin, remote, _)) = progress {
        effects.push(Effect::SetOrigin { origin, remote, backward: false });
    }
    if matches!(xact.kind, XactKind::CommitPrepared | XactKind::AbortPrepared) {
        effects.push(Effect::Finish { xid: xact.xid });
    }
    Ok(effects)
}

fn prepared(record: &Record<'_>) -> Result<Vec<Effect>, Corrupt> {
    let prepare = Prepare::decode(record).ok_or(unknown(record))??;
    check_two_phase(record.main_data(), record.major)?;
    check_xid(prepare.xid)?;
    let mut effects = vec![Effect::Prepare { xid: prepare.xid, state: record.main_data().to_vec() }];
    if let Some(origin) = record.origin().filter(|origin| *origin != 0) {
        let remote = prepare.origin.map_or(Lsn::ZERO, |(remote, _)| remote);
        effects.push(Effect::SetOrigin { origin, remote, backward: false });
    }
    Ok(effects)
}

fn of_the_log(record: &Record<'_>) -> Result<Effect, Corrupt> {
    let next =
        |full_xid: u64, exact| Effect::NextXid { xid: ((full_xid & 0xFFFF_FFFF) as u32).into(), exact };
    match XlogRecord::decode(record).ok_or(unknown(record))?? {
        XlogRecord::CheckpointShutdown(checkpoint) => Ok(next(checkpoint.next_full_xid, true)),
        XlogRecord::CheckpointOnline(checkpoint) => Ok(next(checkpoint.next_full_xid, false)),
        XlogRecord::ParameterChange(s) => Ok(Effect::TrackCommitTimestamps(s.track_commit_timestamp)),
        _ => Err(unknown(record)),
    }
}

fn database(record: &Record<'_>) -> Result<Effect, Corrupt> {
    match DatabaseRecord::decode(record).ok_or(unknown(record))?? {
        DatabaseRecord::Create { db_oid, spc_oid } => {
            check_database(db_oid, spc_oid)?;
            Ok(Effect::CreateDatabase { db_oid, spc_oid })
        }
        DatabaseRecord::Drop { db_oid, spc_oids } => {
            spc_oids.iter().try_for_each(|spc_oid| check_database(db_oid, *spc_oid))?;
            Ok(Effect::DropDatabase { db_oid, spc_oids })
        }
        DatabaseRecord::Copy { .. } => Err(unknown(record)),
    }
}

fn tablespace(record: &Record<'_>) -> Result<Effect, Corrupt> {
    let (effect, spc_oid) = match TablespaceRecord::decode(record).ok_or(unknown(record))?? {
        TablespaceRecord::Create { spc_oid, path } => (Effect::CreateTablespace { spc_oid, path }, spc_oid),
        TablespaceRecord::Drop { spc_oid } => (Effect::DropTablespace { spc_oid }, spc_oid),
    };
    if matches!(spc_oid, 0 | DEFAULT_TABLESPACE | GLOBAL_TABLESPACE) {
        return Err(Corrupt::invalid("ts_id", 0, spc_oid.into()));
    }
    Ok(effect)
}

fn relation_map(record: &Record<'_>) -> Result<Effect, Corrupt> {
    let RelationMapUpdate { db_oid, spc_oid, map } =
        RelationMapUpdate::decode(record).ok_or(unknown(record))??;
    if db_oid != 0 || spc_oid != GLOBAL_TABLESPACE {
        check_database(db_oid, spc_oid)?;
    }
    if map.len() != RELATION_MAP_BYTES {
        return Err(Corrupt::mismatch("nbytes", 8, map.len() as u64, RELATION_MAP_BYTES as u64));
    }
    RelationMap::decode(map, record.major).map_err(|damage| damage.offset_by(12))?;
    Ok(Effect::RelationMap { db_oid, spc_oid, map: map.to_vec() })
}

fn origin(record: &Record<'_>) -> Result<Effect, Corrupt> {
    Ok(match OriginRecord::decode(record).ok_or(unknown(record))?? {
        OriginRecord::Set { origin, remote, backward } => Effect::SetOrigin { origin, remote, backward },
        OriginRecord::Drop { origin } => Effect::DropOrigin { origin },
    })
}

fn slru(record: &Record<'_>) -> Result<Effect, Corrupt> {
    if let Some(slru) = SlruRecord::decode(record) {
        return Ok(match slru? {
            SlruRecord::ZeroPage { slru, page } => Effect::ZeroPage { slru, page },
            SlruRecord::Truncate { slru, page } => Effect::Truncate { slru, page },
        });
    }
    Ok(match MultiXactRecord::decode(record).ok_or(unknown(record))?? {
        MultiXactRecord::Create { multi, offset, members } => Effect::MultiXact { multi, offset, members },
        MultiXactRecord::Truncate { offsets: (_, end), members, .. } => {
            Effect::TruncateMultiXacts { end, members }
        }
    })
}

fn check_xid(xid: Xid) -> Result<(), Corrupt> {
    if !xid.is_normal() {
        return Err(Corrupt::invalid("xid", 0, xid.get().into()));
    }
    Ok(())
}

/// A database lies in a tablespace that is not the shared relations'.
fn check_database(db_oid: Oid, spc_oid: Oid) -> Result<(), Corrupt> {
    if db_oid == 0 {
        return Err(Corrupt::invalid("db_id", 0, 0));
    }
    if matches!(spc_oid, 0 | GLOBAL_TABLESPACE) {
        return Err(Corrupt::invalid("tablespace_id", 4, spc_oid.into()));
    }
    Ok(())
}

/// The record is of a kind that is not known.
fn unknown(record: &Record<'_>) -> Corrupt {
    Corrupt::invalid("xl_info", 16, record.header.info.into())
}

#[cfg(test)]
mod tests;
