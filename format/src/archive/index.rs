//! What a stored segment says about its records, made in the same pass that checks them.
//!
//! The index is a list of typed, versioned sections: a reader skips a type it does not know. Positions
//! within a segment are written as distances from its start.

use serde::{Deserialize, Serialize};

use super::source::PushSource;
use super::state::SegmentState;
use crate::error::Corrupt;
use crate::ids::{BlockNumber, ForkNumber, Lsn, Oid, PgMajor, RelFileLocator, SystemId, TimelineId, Xid};
use crate::reader::{Reader, Writer};
use crate::segment::{SegmentName, SegmentSize};
use crate::time::TimestampTz;

/// Everything a segment's records say that Waltide needs later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SegmentIndex {
    /// Identity, extent, and how the segment joins its neighbours.
    pub info: SegmentInfo,
    /// Ends of transactions, in LSN order.
    pub xacts: Vec<XactEnd>,
    /// `pg_create_restore_point`, in LSN order.
    pub restore_points: Vec<RestorePoint>,
    /// Checkpoints and their redo points, in LSN order.
    pub checkpoints: Vec<CheckpointInfo>,
    /// End-of-recovery records: where a timeline starts.
    pub timeline_ends: Vec<TimelineEnd>,
    /// The horizons that running-xacts records tell, in LSN order.
    pub running_xacts: Vec<RunningXacts>,
    /// Files made, cut, dropped and copied, in LSN order.
    pub file_events: Vec<FileEvent>,
    /// Blocks touched, by relation and fork, in that order.
    pub blocks: Vec<ForkBlocks>,
    /// Record and byte counts by resource manager.
    pub rmgrs: Vec<RmgrCount>,
    /// What `--force-admit` let through.
    pub faults: Vec<AdmittedFault>,
    /// What its records do besides changing pages, where that was noted.
    pub state: Option<SegmentState>,
    /// Who pushed it, where that was noted.
    pub pushed_by: Option<PushSource>,
}

/// Identity, extent, and how a segment joins its neighbours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentInfo {
    /// The cluster.
    pub system_id: SystemId,
    /// The major version, from `xlp_magic`.
    pub major: PgMajor,
    /// The segment.
    pub name: SegmentName,
    /// `wal_segment_size`.
    pub size: SegmentSize,
    /// `xlp_tli` of the first page, an ancestor's in the first segment after a promotion.
    pub first_page_timeline: TimelineId,
    /// `xlp_tli` of the last valid page.
    pub last_page_timeline: TimelineId,
    /// `xlp_rem_len` of the first page: bytes of a record that began in the segment before.
    pub continued_bytes: u32,
    /// Whether the first page says that the record before was aborted (`XLP_FIRST_IS_OVERWRITE_CONTRECORD`).
    pub overwrites_contrecord: bool,
    /// Start of the first record that begins here.
    pub first_record: Option<Lsn>,
    /// `xl_prev` of that record: the start of the last record that begins in the segments before.
    pub first_prev: Option<Lsn>,
    /// Start of the last record that begins here.
    pub last_record: Option<Lsn>,
    /// End of the last byte that is known to be valid WAL. The segment's end where a record runs over it.
    pub valid_end: Lsn,
    /// How the segment ends.
    pub ending: Ending,
    /// A record that begins here and runs over the edge.
    pub pending: Option<PendingRecord>,
    /// Whether the bytes that continue the record before were joined with it and its CRC checked.
    pub head_joined: bool,
    /// Records that begin here.
    pub records: u64,
    /// The first commit or abort's time in LSN order.
    pub first_time: Option<TimestampTz>,
    /// The last commit or abort's time in LSN order.
    pub last_time: Option<TimestampTz>,
    /// The earliest time of any commit or abort (clocks step back).
    pub min_time: Option<TimestampTz>,
    /// The latest time of any commit or abort.
    pub max_time: Option<TimestampTz>,
    /// The last commit's time in LSN order.
    pub last_commit_time: Option<TimestampTz>,
    /// Commits, prepared ones included.
    pub commits: u64,
    /// Bytes of full-page images.
    pub image_bytes: u64,
}

/// How a segment's log ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// Records, or one that runs over the edge, fill it.
    Full,
    /// `XLOG_SWITCH`: the rest is void.
    Switch,
    /// The log stops inside: a `.partial`, or the last segment of a crashed server.
    EndOfLog,
    /// Damage that was admitted on purpose stops the reading.
    Fault,
}

/// A record that begins in one segment and ends in a later one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingRecord {
    /// Its start.
    pub start: Lsn,
    /// Its whole length, `xl_tot_len`; zero where even that runs over the edge.
    pub total_bytes: u32,
    /// How much of it lies in this segment.
    pub here_bytes: u32,
    /// Whether the rest was there and the CRC over the whole record was right.
    pub joined: bool,
}

/// A commit, abort or prepare.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct XactEnd {
    /// Which of them.
    pub kind: CommitKind,
    /// The transaction; of COMMIT PREPARED and ROLLBACK PREPARED the prepared one.
    pub xid: Xid,
    /// Start of the record: what `recovery_target_lsn` compares.
    pub start: Lsn,
    /// End of the record: where replay stands once it is applied.
    pub end: Lsn,
    /// `xact_time`.
    pub time: TimestampTz,
    /// The database, where the record says it.
    pub db_oid: Option<Oid>,
    /// Committed or aborted subtransactions.
    pub subxacts: Vec<Xid>,
    /// Relations whose files go with this record.
    pub dropped: Vec<RelFileLocator>,
    /// The global identifier of a prepared transaction, where the record says it.
    pub gid: Option<String>,
}

/// How a transaction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CommitKind {
    /// COMMIT.
    Commit,
    /// ABORT.
    Abort,
    /// PREPARE TRANSACTION.
    Prepare,
    /// COMMIT PREPARED.
    CommitPrepared,
    /// ROLLBACK PREPARED.
    AbortPrepared,
}

impl CommitKind {
    const ALL: [Self; 5] =
        [Self::Commit, Self::Abort, Self::Prepare, Self::CommitPrepared, Self::AbortPrepared];

    /// Whether changes become visible with it.
    pub const fn is_commit(self) -> bool {
        matches!(self, Self::Commit | Self::CommitPrepared)
    }

    /// Whether recovery compares it with a target time or xid.
    pub const fn is_end(self) -> bool {
        !matches!(self, Self::Prepare)
    }
}

/// A relation whose files a transaction dropped.
pub type DroppedRelation = RelFileLocator;

/// A named restore point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RestorePoint {
    /// `rp_name`.
    pub name: String,
    /// `rp_time`.
    pub time: TimestampTz,
    /// Start of the record.
    pub start: Lsn,
    /// End of the record: where recovery stops.
    pub end: Lsn,
}

/// Which kind of checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckpointKind {
    /// `XLOG_CHECKPOINT_SHUTDOWN`.
    Shutdown,
    /// `XLOG_CHECKPOINT_ONLINE`.
    Online,
}

/// A checkpoint record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CheckpointInfo {
    /// Shutdown or online.
    pub kind: CheckpointKind,
    /// Start of the record.
    pub start: Lsn,
    /// End of the record.
    pub end: Lsn,
    /// `redo`.
    pub redo: Lsn,
    /// `ThisTimeLineID`.
    pub timeline: TimelineId,
    /// `PrevTimeLineID`.
    pub previous_timeline: TimelineId,
    /// `fullPageWrites`.
    pub full_page_writes: bool,
    /// `nextXid`, epoch in the upper half.
    pub next_full_xid: u64,
    /// `oldestActiveXid`.
    pub oldest_active_xid: Xid,
    /// `time`, in whole seconds.
    pub time: TimestampTz,
}

/// Where recovery ended and a timeline began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TimelineEnd {
    /// Start of the record.
    pub start: Lsn,
    /// `ThisTimeLineID`.
    pub timeline: TimelineId,
    /// `PrevTimeLineID`.
    pub previous_timeline: TimelineId,
    /// `end_time`.
    pub time: TimestampTz,
}

/// What a running-xacts record tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RunningXacts {
    /// Start of the record.
    pub start: Lsn,
    /// `nextXid`.
    pub next_xid: Xid,
    /// `oldestRunningXid`.
    pub oldest_running_xid: Xid,
    /// How many transactions were running.
    pub running: u32,
}

/// Something that happened to files rather than to pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileEvent {
    /// Start of the record.
    pub start: Lsn,
    /// The transaction, if any.
    pub xid: Xid,
    /// What happened.
    pub kind: FileEventKind,
}

/// What happened to files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FileEventKind {
    /// `XLOG_SMGR_CREATE`.
    Create {
        /// The relation.
        relation: RelFileLocator,
        /// The fork.
        fork: ForkNumber,
    },
    /// `XLOG_SMGR_TRUNCATE`.
    Truncate {
        /// The relation.
        relation: RelFileLocator,
        /// Its new length in blocks, of the main fork.
        blocks: BlockNumber,
        /// `SMGR_TRUNCATE_HEAP`, `_VM`, `_FSM`.
        flags: u32,
    },
    /// A database's directory was made by copying files.
    DatabaseCopy {
        /// Tablespace and database made.
        to: (Oid, Oid),
        /// Tablespace and database copied.
        from: (Oid, Oid),
    },
    /// A database's directory was made empty, its pages follow in the WAL.
    DatabaseCreate {
        /// Tablespace and database.
        database: (Oid, Oid),
    },
    /// A database was dropped.
    DatabaseDrop {
        /// The database.
        db_oid: Oid,
        /// Its tablespaces.
        tablespaces: Vec<Oid>,
    },
    /// A tablespace was made.
    TablespaceCreate {
        /// Its OID.
        spc_oid: Oid,
        /// Its location.
        path: String,
    },
    /// A tablespace was dropped.
    TablespaceDrop {
        /// Its OID.
        spc_oid: Oid,
    },
    /// A relation map was replaced.
    RelationMap {
        /// Tablespace.
        spc_oid: Oid,
        /// Database; zero for the shared map.
        db_oid: Oid,
    },
}

/// The blocks of one fork that a segment's records touch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ForkBlocks {
    /// The relation.
    pub relation: RelFileLocator,
    /// The fork.
    pub fork: ForkNumber,
    /// The blocks, in order.
    pub blocks: Vec<IndexedBlock>,
}

/// A block that a segment's records touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct IndexedBlock {
    /// The block.
    pub block: BlockNumber,
    /// Start of the last record here that makes the page anew, by image or re-initialisation.
    pub last_image: Option<Lsn>,
    /// Records after that one that touch it; all of them where there is none.
    pub records_after: u32,
}

/// How much of the segment a resource manager wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RmgrCount {
    /// `xl_rmid`.
    pub rmid: u8,
    /// Records.
    pub records: u64,
    /// Their bytes, images apart.
    pub record_bytes: u64,
    /// Bytes of their full-page images.
    pub image_bytes: u64,
}

/// A fault that the operator chose to archive with the segment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdmittedFault {
    /// Where it is.
    pub at: Lsn,
    /// What push would have said.
    pub message: String,
}

/// The sections, by number. A number is never used again for something else.
pub(super) mod section {
    pub(in crate::archive) const INFO: u16 = 1;
    pub(in crate::archive) const XACTS: u16 = 2;
    pub(in crate::archive) const RESTORE_POINTS: u16 = 3;
    pub(in crate::archive) const CHECKPOINTS: u16 = 4;
    pub(in crate::archive) const TIMELINE_ENDS: u16 = 5;
    pub(in crate::archive) const RUNNING_XACTS: u16 = 6;
    pub(in crate::archive) const FILE_EVENTS: u16 = 7;
    pub(in crate::archive) const BLOCKS: u16 = 8;
    pub(in crate::archive) const RMGRS: u16 = 9;
    pub(in crate::archive) const FAULTS: u16 = 10;
    pub(super) const SOURCE: u16 = 16;
    pub(super) const STATE: u16 = 17;
    /// In the order they are written: what a catalogue needs comes last, so that one short read of an
    /// object's end holds it.
    pub(super) const WRITTEN: [u16; 12] = [
        BLOCKS,
        STATE,
        XACTS,
        FILE_EVENTS,
        RUNNING_XACTS,
        CHECKPOINTS,
        TIMELINE_ENDS,
        RMGRS,
        RESTORE_POINTS,
        FAULTS,
        SOURCE,
        INFO,
    ];
    pub(super) const SUMMARY: [u16; 4] = [RESTORE_POINTS, FAULTS, SOURCE, INFO];
}

/// Every section that is written: its name on docs/format.md, its number, its version.
pub const SECTIONS: [(&str, u16, u16); 12] = [
    ("info", section::INFO, SECTION_VERSION),
    ("xacts", section::XACTS, SECTION_VERSION),
    ("restore_points", section::RESTORE_POINTS, SECTION_VERSION),
    ("checkpoints", section::CHECKPOINTS, SECTION_VERSION),
    ("timeline_ends", section::TIMELINE_ENDS, SECTION_VERSION),
    ("running_xacts", section::RUNNING_XACTS, SECTION_VERSION),
    ("file_events", section::FILE_EVENTS, SECTION_VERSION),
    ("blocks", section::BLOCKS, SECTION_VERSION),
    ("rmgrs", section::RMGRS, SECTION_VERSION),
    ("faults", section::FAULTS, SECTION_VERSION),
    ("source", section::SOURCE, SECTION_VERSION),
    ("state", section::STATE, SECTION_VERSION),
];

/// The number of the section that [`SegmentInfo`] is.
pub(crate) const INFO_SECTION: u16 = section::INFO;
/// The sections that a catalogue needs.
pub(crate) const SUMMARY_SECTIONS: [u16; 4] = section::SUMMARY;
/// The version of every section that is written.
pub(crate) const SECTION_VERSION: u16 = 1;

impl SegmentIndex {
    /// An index that says only `info`.
    pub fn new(info: SegmentInfo) -> Self {
        Self {
            info,
            xacts: Vec::new(),
            restore_points: Vec::new(),
            checkpoints: Vec::new(),
            timeline_ends: Vec::new(),
            running_xacts: Vec::new(),
            file_events: Vec::new(),
            blocks: Vec::new(),
            rmgrs: Vec::new(),
            faults: Vec::new(),
            state: None,
            pushed_by: None,
        }
    }

    /// The sections' bytes, by number, those that say nothing left out.
    pub(crate) fn encode_sections(&self) -> Vec<(u16, Vec<u8>)> {
        let encode = |id| {
            let mut w = Writer::new();
            self.encode_section(id, &mut w);
            (id, w.into_bytes())
        };
        section::WRITTEN.into_iter().map(encode).filter(|(_, bytes)| !bytes.is_empty()).collect()
    }

    pub(super) fn encode_section(&self, id: u16, w: &mut Writer) {
        let base = self.base();
        match id {
            section::INFO => encode_info(w, &self.info),
            section::XACTS => list(w, &self.xacts, |w, x| encode_xact(w, base, x)),
            section::RESTORE_POINTS => list(w, &self.restore_points, |w, p| {
                put_lsn(w, base, p.start);
                put_lsn(w, base, p.end);
                w.i64(p.time.postgres_micros()).text(&p.name);
            }),
            section::CHECKPOINTS => list(w, &self.checkpoints, |w, c| encode_checkpoint(w, base, c)),
            section::TIMELINE_ENDS => list(w, &self.timeline_ends, |w, e| {
                put_lsn(w, base, e.start);
                w.u32(e.timeline.get()).u32(e.previous_timeline.get()).i64(e.time.postgres_micros());
            }),
            section::RUNNING_XACTS => list(w, &self.running_xacts, |w, x| {
                put_lsn(w, base, x.start);
                w.u32(x.next_xid.get()).u32(x.oldest_running_xid.get()).varint(u64::from(x.running));
            }),
            section::FILE_EVENTS => list(w, &self.file_events, |w, e| encode_file_event(w, base, e)),
            section::BLOCKS => list(w, &self.blocks, |w, b| encode_fork(w, base, b)),
            section::RMGRS => list(w, &self.rmgrs, |w, c| {
                w.u8(c.rmid).varint(c.records).varint(c.record_bytes).varint(c.image_bytes);
            }),
            section::SOURCE => self.pushed_by.iter().for_each(|source| source.encode(w)),
            section::STATE => self.state.iter().for_each(|state| state.encode(base, w)),
            _ => list(w, &self.faults, |w, f| {
                put_lsn(w, base, f.at);
                w.text(&f.message);
            }),
        }
    }

    /// Puts a section's content in place; one this reader does not know is left alone.
    pub(crate) fn decode_section(&mut self, id: u16, bytes: &[u8]) -> Result<(), Corrupt> {
        let base = self.base();
        let mut r = Reader::new(bytes);
        match id {
            section::XACTS => self.xacts = items(&mut r, 19, |r| decode_xact(r, base))?,
            section::RESTORE_POINTS => {
                self.restore_points = items(&mut r, 11, |r| {
                    let (start, end) = (get_lsn(r, base)?, get_lsn(r, base)?);
                    let time = get_time(r, "rp_time")?;
                    Ok(RestorePoint { start, end, time, name: r.text("rp_name")?.to_owned() })
                })?;
            }
            section::CHECKPOINTS => self.checkpoints = items(&mut r, 30, |r| decode_checkpoint(r, base))?,
            section::TIMELINE_ENDS => {
                self.timeline_ends = items(&mut r, 17, |r| {
                    Ok(TimelineEnd {
                        start: get_lsn(r, base)?,
                        timeline: get_timeline(r, "ThisTimeLineID")?,
                        previous_timeline: get_timeline(r, "PrevTimeLineID")?,
                        time: get_time(r, "end_time")?,
                    })
                })?;
            }
            section::RUNNING_XACTS => {
                self.running_xacts = items(&mut r, 10, |r| {
                    Ok(RunningXacts {
                        start: get_lsn(r, base)?,
                        next_xid: r.u32("nextXid")?.into(),
                        oldest_running_xid: r.u32("oldestRunningXid")?.into(),
                        running: r.varint_u32("xcnt")?,
                    })
                })?;
            }
            section::FILE_EVENTS => self.file_events = items(&mut r, 6, |r| decode_file_event(r, base))?,
            section::BLOCKS => self.blocks = items(&mut r, 5, |r| decode_fork(r, base))?,
            section::RMGRS => {
                self.rmgrs = items(&mut r, 4, |r| {
                    Ok(RmgrCount {
                        rmid: r.u8("xl_rmid")?,
                        records: r.varint("records")?,
                        record_bytes: r.varint("record_bytes")?,
                        image_bytes: r.varint("image_bytes")?,
                    })
                })?;
            }
            section::FAULTS => {
                self.faults = items(&mut r, 2, |r| {
                    Ok(AdmittedFault { at: get_lsn(r, base)?, message: r.text("message")?.to_owned() })
                })?;
            }
            section::SOURCE => self.pushed_by = Some(PushSource::decode(&mut r)?),
            section::STATE => self.state = Some(SegmentState::decode(&mut r, base)?),
            _ => return Ok(()),
        }
        r.finish("section")
    }

    /// Positions are written as distances from here.
    fn base(&self) -> Lsn {
        self.info.name.start(self.info.size).unwrap_or_default()
    }
}

/// Writes a list behind its length, or nothing where it is empty.
pub(super) fn list<T>(w: &mut Writer, of: &[T], mut put: impl FnMut(&mut Writer, &T)) {
    if of.is_empty() {
        return;
    }
    w.varint(of.len() as u64);
    for item in of {
        put(w, item);
    }
}

/// Reads a list; `item_bytes` is the least an item takes, so that no length can claim more memory than there is input.
pub(super) fn items<'a, T>(
    r: &mut Reader<'a>,
    item_bytes: usize,
    mut get: impl FnMut(&mut Reader<'a>) -> Result<T, Corrupt>,
) -> Result<Vec<T>, Corrupt> {
    let count = r.count(item_bytes, "count")?;
    (0..count).map(|_| get(r)).collect()
}

/// A position as its distance from `base`, either way (a checkpoint's redo point lies before the segment).
pub(super) fn put_lsn(w: &mut Writer, base: Lsn, lsn: Lsn) {
    let distance = lsn.get().wrapping_sub(base.get()).cast_signed();
    w.varint((distance.wrapping_shl(1) ^ distance.wrapping_shr(63)).cast_unsigned());
}

pub(super) fn get_lsn(r: &mut Reader<'_>, base: Lsn) -> Result<Lsn, Corrupt> {
    let zigzag = r.varint("lsn")?;
    let distance = (zigzag >> 1) ^ (zigzag & 1).wrapping_neg();
    Ok(Lsn::from(base.get().wrapping_add(distance)))
}

fn get_time(r: &mut Reader<'_>, field: &'static str) -> Result<TimestampTz, Corrupt> {
    r.i64(field).map(TimestampTz::from_postgres_micros)
}

pub(super) fn get_timeline(r: &mut Reader<'_>, field: &'static str) -> Result<TimelineId, Corrupt> {
    r.parse_u32(field, TimelineId::new)
}

pub(super) fn put_option<T>(w: &mut Writer, v: Option<T>, put: impl FnOnce(&mut Writer, T)) {
    w.u8(u8::from(v.is_some()));
    if let Some(v) = v {
        put(w, v);
    }
}

pub(super) fn get_option<'a, T>(
    r: &mut Reader<'a>,
    field: &'static str,
    get: impl FnOnce(&mut Reader<'a>) -> Result<T, Corrupt>,
) -> Result<Option<T>, Corrupt> {
    if get_bool(r, field)? { get(r).map(Some) } else { Ok(None) }
}

pub(super) fn get_bool(r: &mut Reader<'_>, field: &'static str) -> Result<bool, Corrupt> {
    let at = r.position();
    match r.u8(field)? {
        0 => Ok(false),
        1 => Ok(true),
        v => Err(Corrupt::invalid(field, at, u64::from(v))),
    }
}

pub(super) fn encode_info(w: &mut Writer, i: &SegmentInfo) {
    w.u64(i.system_id.get()).u16(i.major.get()).text(&i.name.to_string()).u64(i.size.bytes());
    w.u32(i.first_page_timeline.get()).u32(i.last_page_timeline.get()).u32(i.continued_bytes);
    w.u8(u8::from(i.overwrites_contrecord));
    for lsn in [i.first_record, i.first_prev, i.last_record] {
        put_option(w, lsn, |w, lsn| {
            w.u64(lsn.get());
        });
    }
    w.u64(i.valid_end.get());
    w.u8(match i.ending {
        Ending::Full => 0,
        Ending::Switch => 1,
        Ending::EndOfLog => 2,
        Ending::Fault => 3,
    });
    put_option(w, i.pending, |w, p| {
        w.u64(p.start.get()).u32(p.total_bytes).u32(p.here_bytes).u8(u8::from(p.joined));
    });
    w.u8(u8::from(i.head_joined)).varint(i.records);
    for time in [i.first_time, i.last_time, i.min_time, i.max_time, i.last_commit_time] {
        put_option(w, time, |w, time| {
            w.i64(time.postgres_micros());
        });
    }
    w.varint(i.commits).varint(i.image_bytes);
}

/// Reads the section that every index has.
pub(crate) fn decode_info(bytes: &[u8]) -> Result<SegmentInfo, Corrupt> {
    let mut r = Reader::new(bytes);
    let info = get_info(&mut r)?;
    r.finish("info")?;
    Ok(info)
}

pub(super) fn get_info(r: &mut Reader<'_>) -> Result<SegmentInfo, Corrupt> {
    let lsn = |r: &mut Reader<'_>| r.u64("lsn").map(Lsn::from);
    let time = |r: &mut Reader<'_>| get_time(r, "time");
    let system_id = r.u64("system_id")?.into();
    let at = r.position();
    let major = r.u16("major")?;
    let major = PgMajor::new(major).ok_or(Corrupt::invalid("major", at, u64::from(major)))?;
    let at = r.position();
    let name = r.text("name")?;
    let name = name.parse::<SegmentName>().map_err(|_| Corrupt::invalid("name", at, name.len() as u64))?;
    let size = r.parse_u64("size", SegmentSize::new)?;
    let info = SegmentInfo {
        system_id,
        major,
        name,
        size,
        first_page_timeline: get_timeline(r, "xlp_tli")?,
        last_page_timeline: get_timeline(r, "xlp_tli")?,
        continued_bytes: r.u32("xlp_rem_len")?,
        overwrites_contrecord: get_bool(r, "overwrites_contrecord")?,
        first_record: get_option(r, "first_record", lsn)?,
        first_prev: get_option(r, "first_prev", lsn)?,
        last_record: get_option(r, "last_record", lsn)?,
        valid_end: lsn(r)?,
        ending: {
            let at = r.position();
            match r.u8("ending")? {
                0 => Ending::Full,
                1 => Ending::Switch,
                2 => Ending::EndOfLog,
                3 => Ending::Fault,
                v => return Err(Corrupt::invalid("ending", at, u64::from(v))),
            }
        },
        pending: get_option(r, "pending", |r| {
            Ok(PendingRecord {
                start: lsn(r)?,
                total_bytes: r.u32("xl_tot_len")?,
                here_bytes: r.u32("here_bytes")?,
                joined: get_bool(r, "joined")?,
            })
        })?,
        head_joined: get_bool(r, "head_joined")?,
        records: r.varint("records")?,
        first_time: get_option(r, "first_time", time)?,
        last_time: get_option(r, "last_time", time)?,
        min_time: get_option(r, "min_time", time)?,
        max_time: get_option(r, "max_time", time)?,
        last_commit_time: get_option(r, "last_commit_time", time)?,
        commits: r.varint("commits")?,
        image_bytes: r.varint("image_bytes")?,
    };
    if info.name.start(info.size).is_none() {
        return Err(Corrupt::invalid("name", at, info.size.bytes()));
    }
    Ok(info)
}

pub(super) fn put_relation(w: &mut Writer, r: RelFileLocator) {
    w.varint(u64::from(r.spc_oid)).varint(u64::from(r.db_oid)).varint(u64::from(r.rel_number));
}

pub(super) fn get_relation(r: &mut Reader<'_>) -> Result<RelFileLocator, Corrupt> {
    Ok(RelFileLocator {
        spc_oid: r.varint_u32("spcOid")?,
        db_oid: r.varint_u32("dbOid")?,
        rel_number: r.varint_u32("relNumber")?,
    })
}

pub(super) fn get_fork(r: &mut Reader<'_>) -> Result<ForkNumber, Corrupt> {
    let at = r.position();
    let v = r.u8("fork")?;
    ForkNumber::new(v).ok_or(Corrupt::invalid("fork", at, u64::from(v)))
}

pub(super) fn encode_xact(w: &mut Writer, base: Lsn, x: &XactEnd) {
    let kind = CommitKind::ALL.iter().position(|k| *k == x.kind).unwrap_or(0);
    w.u8(u8::try_from(kind).unwrap_or(0)).u32(x.xid.get());
    put_lsn(w, base, x.start);
    put_lsn(w, base, x.end);
    w.i64(x.time.postgres_micros());
    put_option(w, x.db_oid, |w, oid| {
        w.u32(oid);
    });
    w.varint(x.subxacts.len() as u64);
    for sub in &x.subxacts {
        w.u32(sub.get());
    }
    w.varint(x.dropped.len() as u64);
    for relation in &x.dropped {
        put_relation(w, *relation);
    }
    put_option(w, x.gid.as_deref(), |w, gid| {
        w.text(gid);
    });
}

pub(super) fn decode_xact(r: &mut Reader<'_>, base: Lsn) -> Result<XactEnd, Corrupt> {
    let at = r.position();
    let kind = r.u8("kind")?;
    let known = CommitKind::ALL.get(usize::from(kind)).copied();
    Ok(XactEnd {
        kind: known.ok_or(Corrupt::invalid("kind", at, u64::from(kind)))?,
        xid: r.u32("xid")?.into(),
        start: get_lsn(r, base)?,
        end: get_lsn(r, base)?,
        time: get_time(r, "xact_time")?,
        db_oid: get_option(r, "dbId", |r| r.u32("dbId"))?,
        subxacts: items(r, 4, |r| r.u32("subxact").map(Xid::from))?,
        dropped: items(r, 3, get_relation)?,
        gid: get_option(r, "gid", |r| r.text("gid").map(str::to_owned))?,
    })
}

fn encode_checkpoint(w: &mut Writer, base: Lsn, c: &CheckpointInfo) {
    w.u8(u8::from(c.kind == CheckpointKind::Online));
    for lsn in [c.start, c.end, c.redo] {
        put_lsn(w, base, lsn);
    }
    w.u32(c.timeline.get()).u32(c.previous_timeline.get()).u8(u8::from(c.full_page_writes));
    w.u64(c.next_full_xid).u32(c.oldest_active_xid.get()).i64(c.time.postgres_micros());
}

fn decode_checkpoint(r: &mut Reader<'_>, base: Lsn) -> Result<CheckpointInfo, Corrupt> {
    Ok(CheckpointInfo {
        kind: if get_bool(r, "online")? { CheckpointKind::Online } else { CheckpointKind::Shutdown },
        start: get_lsn(r, base)?,
        end: get_lsn(r, base)?,
        redo: get_lsn(r, base)?,
        timeline: get_timeline(r, "ThisTimeLineID")?,
        previous_timeline: get_timeline(r, "PrevTimeLineID")?,
        full_page_writes: get_bool(r, "fullPageWrites")?,
        next_full_xid: r.u64("nextXid")?,
        oldest_active_xid: r.u32("oldestActiveXid")?.into(),
        time: get_time(r, "time")?,
    })
}

pub(super) fn encode_file_event(w: &mut Writer, base: Lsn, e: &FileEvent) {
    put_lsn(w, base, e.start);
    w.u32(e.xid.get());
    match &e.kind {
        FileEventKind::Create { relation, fork } => {
            w.u8(1);
            put_relation(w, *relation);
            w.u8(fork.get());
        }
        FileEventKind::Truncate { relation, blocks, flags } => {
            w.u8(2);
            put_relation(w, *relation);
            w.u32(*blocks).u32(*flags);
        }
        FileEventKind::DatabaseCopy { to, from } => {
            w.u8(3).u32(to.0).u32(to.1).u32(from.0).u32(from.1);
        }
        FileEventKind::DatabaseCreate { database } => {
            w.u8(4).u32(database.0).u32(database.1);
        }
        FileEventKind::DatabaseDrop { db_oid, tablespaces } => {
            w.u8(5).u32(*db_oid).varint(tablespaces.len() as u64);
            for spc in tablespaces {
                w.u32(*spc);
            }
        }
        FileEventKind::TablespaceCreate { spc_oid, path } => {
            w.u8(6).u32(*spc_oid).text(path);
        }
        FileEventKind::TablespaceDrop { spc_oid } => {
            w.u8(7).u32(*spc_oid);
        }
        FileEventKind::RelationMap { spc_oid, db_oid } => {
            w.u8(8).u32(*spc_oid).u32(*db_oid);
        }
    }
}

pub(super) fn decode_file_event(r: &mut Reader<'_>, base: Lsn) -> Result<FileEvent, Corrupt> {
    let (start, xid) = (get_lsn(r, base)?, r.u32("xid")?.into());
    let at = r.position();
    let kind = match r.u8("event")? {
        1 => FileEventKind::Create { relation: get_relation(r)?, fork: get_fork(r)? },
        2 => FileEventKind::Truncate {
            relation: get_relation(r)?,
            blocks: r.u32("blkno")?,
            flags: r.u32("flags")?,
        },
        3 => FileEventKind::DatabaseCopy {
            to: (r.u32("tablespace_id")?, r.u32("db_id")?),
            from: (r.u32("src_tablespace_id")?, r.u32("src_db_id")?),
        },
        4 => FileEventKind::DatabaseCreate { database: (r.u32("tablespace_id")?, r.u32("db_id")?) },
        5 => FileEventKind::DatabaseDrop {
            db_oid: r.u32("db_id")?,
            tablespaces: items(r, 4, |r| r.u32("tablespace_ids"))?,
        },
        6 => {
            FileEventKind::TablespaceCreate { spc_oid: r.u32("ts_id")?, path: r.text("ts_path")?.to_owned() }
        }
        7 => FileEventKind::TablespaceDrop { spc_oid: r.u32("ts_id")? },
        8 => FileEventKind::RelationMap { spc_oid: r.u32("tsid")?, db_oid: r.u32("dbid")? },
        v => return Err(Corrupt::invalid("event", at, u64::from(v))),
    };
    Ok(FileEvent { start, xid, kind })
}

fn encode_fork(w: &mut Writer, base: Lsn, b: &ForkBlocks) {
    put_relation(w, b.relation);
    w.u8(b.fork.get()).varint(b.blocks.len() as u64);
    let mut next = 0;
    for block in &b.blocks {
        w.varint(u64::from(block.block.wrapping_sub(next)));
        next = block.block.wrapping_add(1);
        // Zero says there is no image; a distance from the segment's start is written one larger.
        w.varint(block.last_image.map_or(0, |lsn| lsn.bytes_since(base).saturating_add(1)));
        w.varint(u64::from(block.records_after));
    }
}

fn decode_fork(r: &mut Reader<'_>, base: Lsn) -> Result<ForkBlocks, Corrupt> {
    let (relation, fork) = (get_relation(r)?, get_fork(r)?);
    let mut next = 0u32;
    let blocks = items(r, 3, |r| {
        let at = r.position();
        let skip = r.varint_u32("block")?;
        let block = next.checked_add(skip).ok_or(Corrupt::invalid("block", at, u64::from(skip)))?;
        next = block.wrapping_add(1);
        let image = r.varint("last_image")?;
        let last_image = image.checked_sub(1).map(|distance| base.saturating_add(distance));
        Ok(IndexedBlock { block, last_image, records_after: r.varint_u32("records_after")? })
    })?;
    Ok(ForkBlocks { relation, fork, blocks })
}
