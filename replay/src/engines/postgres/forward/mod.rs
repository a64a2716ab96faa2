//! Native replay of a whole cluster: the log is read once, newest segment first; what still matters is kept by page, in a
//! file beyond a bound of memory, and written range by range on all cores. It ends at the redo point of a checkpoint,
//! from which PostgreSQL's own recovery goes on. Facts: docs/wal.md, "Redo".

mod apply;
mod batch;
mod counters;
mod decode;
mod finish;
mod keep;
mod newer;
mod point;
mod pool;
mod scan;
mod spill;
mod told;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use waltide_format::archive::SegmentEntry;
use waltide_format::engines::postgres::cluster::{
    BackupLabel, CleanEnd, ControlError, ControlFile, HandOver,
};
use waltide_format::engines::postgres::wal::{Checkpoint, ParameterChange, Record, TimelineStart};
use waltide_format::{
    BlockNumber, ForkNumber, Lsn, Oid, Reader, RelFileLocator, SegmentName, SegmentSize, TimelineId,
    TimestampTz, Xid,
};
use waltide_storage::Progress;

use super::indexes::SearchError;
use super::redo::{self, RedoError, State, StateError};
use crate::drill::now;
use counters::Counters;
use decode::NO_RELATION;
use keep::Log;
use point::End;

pub(super) use batch::PART_BLOCKS;
pub use decode::Unknown;
pub(super) use finish::Begun;
pub use finish::Finish;
pub use point::{Forward, Point, Replay, ReplayMode, ReplayPlan, choose_replay};

/// Why native replay came to no end.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The archived WAL could not be read.
    #[error(transparent)]
    Search(#[from] SearchError),
    /// A record that the engine cannot vouch for.
    #[error(transparent)]
    Unknown(#[from] Unknown),
    /// A record does not fit the page.
    #[error(transparent)]
    Redo(#[from] RedoError),
    /// What is not in relations' files could not be brought forward.
    #[error(transparent)]
    State(#[from] StateError),
    /// A record changes a page that is not there.
    #[error("the record at {at} changes block {block} of {relation}{}, which is not there", fork.suffix())]
    Missing {
        /// The relation.
        relation: RelFileLocator,
        /// The fork.
        fork: ForkNumber,
        /// The block.
        block: BlockNumber,
        /// Start of the record.
        at: Lsn,
    },
    /// A record that was set aside reads differently.
    #[error(
        "the record at {at} was set aside and does not read back\nhint: the disk or the memory of this machine fails"
    )]
    Kept {
        /// Start of the record.
        at: Lsn,
    },
    /// The segment that a record ends in does not reach so far by its index.
    #[error("the record before {at} ends in a segment whose index ends before\nhint: run `waltide verify`")]
    Short {
        /// Where the record ends.
        at: Lsn,
    },
    /// There is no such checkpoint where the index has one.
    #[error("there is no checkpoint at {at}, where the archive's index has one\nhint: run `waltide verify`")]
    NoCheckpoint {
        /// Where it should start.
        at: Lsn,
    },
    /// The base backup's pg_control cannot be rewritten.
    #[error("the backup's pg_control cannot be rewritten")]
    Control(#[from] ControlError),
    /// A file could not be read or written.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// What is set aside of the log could not be read or written.
    #[error(
        "what is set aside of the log could not be read or written\nhint: give the restore's file system more room, or --memory more"
    )]
    Spill(#[from] io::Error),
}

impl ForwardError {
    fn io<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::Io { doing, path: path.to_owned(), source }
    }

    /// Whether the archive is at fault.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Search(e) => e.is_damage(),
            Self::NoCheckpoint { .. } | Self::Short { .. } => true,
            _ => false,
        }
    }
}

/// What native replay did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Replayed {
    /// Whether the target was reached: then the checkpoint is the shutdown checkpoint that a timeline was begun with.
    pub finished: bool,
    /// Start of the checkpoint's record at which PostgreSQL goes on.
    pub checkpoint: Lsn,
    /// Its redo point: everything before it is in the files.
    pub redo: Lsn,
    /// Its timeline.
    pub timeline: TimelineId,
    /// When it was made.
    pub time: TimestampTz,
    /// Records read, or told of by indexes.
    pub records: u64,
    /// Segments that were read.
    pub segments_read: u64,
    /// Segments of which the index told all that matters, so that they were not read.
    pub segments_spared: u64,
    /// Changes to pages that mattered.
    pub changes: u64,
    /// Pages written.
    pub pages: u64,
    /// Of them, pages that were read first.
    pub pages_read: u64,
    /// Bytes that were set aside in a file.
    pub spilled_bytes: u64,
    /// Seconds that reading the log took.
    pub scan_seconds: f64,
    /// Seconds that writing the pages took.
    pub apply_seconds: f64,
}

impl Replayed {
    /// How much of the log was read, for people.
    pub fn segments(&self) -> String {
        let (read, spared) = (self.segments_read, self.segments_spared);
        match spared {
            0 => format!("{read} segments read"),
            _ => format!("{read} segments read, of {spared} only the index"),
        }
    }

    /// The backup_label that makes recovery go on there: as pg_rewind leaves one, so that no end of a backup is awaited.
    pub(super) fn backup_label(&self, size: SegmentSize) -> String {
        let label = BackupLabel {
            start_lsn: self.redo,
            start_segment: SegmentName::containing(self.timeline, self.redo, size),
            checkpoint_lsn: self.checkpoint,
            method: "pg_rewind".to_owned(),
            from_standby: true,
            start_time: self.time.to_string(),
            label: "waltide".to_owned(),
            timeline: self.timeline,
            incremental_from: None,
        };
        label.to_text()
    }
}

impl Log {
    /// Whether hint bits are logged at a place in the log.
    fn logs_hints(&self, control: &ControlFile, at: Lsn) -> bool {
        let before = self.settings.partition_point(|(lsn, _)| *lsn <= at);
        let last = before.checked_sub(1).and_then(|i| self.settings.get(i));
        control.has_data_checksums()
            || last.map_or(control.settings.wal_log_hints, |(_, settings)| settings.wal_log_hints)
    }

    fn last_settings(&self) -> Option<ParameterChange> {
        self.settings.last().map(|(_, settings)| *settings)
    }
}

/// A cluster whose log was read, ready to be written.
pub(super) struct Ready {
    log: Log,
    end: End,
    /// The checkpoint that is handed over at, or that the backup begins with.
    checkpoint: [u8; Checkpoint::BYTES],
    /// Where it ends at the target: the segment that the last record ends in, where it does not end with it.
    segment: Option<SegmentEntry>,
    scan_seconds: f64,
    /// Why it ends earlier than it was to.
    because: Option<String>,
}

/// What native replay leaves.
pub(super) struct Over {
    pub(super) replayed: Replayed,
    /// The cluster's new pg_control.
    pub(super) control: Vec<u8>,
    /// The timeline that begins, where replay went to the target.
    pub(super) begun: Option<Begun>,
}

/// Where the cluster is being restored.
pub(super) struct Place<'a> {
    pub(super) data_dir: &'a Path,
    /// Where each tablespace goes.
    pub(super) tablespaces: &'a BTreeMap<Oid, PathBuf>,
    /// The backup's pg_control.
    pub(super) control: &'a [u8],
    /// Permission bits of new files.
    pub(super) mode: u32,
    pub(super) threads: usize,
    /// Whether all files are synced afterwards: much is then on its way to the disk already.
    pub(super) durable: bool,
}

impl Ready {
    /// Why replay ends earlier than it was to, if it does.
    pub(super) fn because(&self) -> Option<&str> {
        self.because.as_deref()
    }

    /// The number of the timeline that is to begin, where one is.
    pub(super) const fn timeline_mut(&mut self) -> Option<&mut TimelineId> {
        match &mut self.end {
            End::HandOver(_) => None,
            End::Target(finish) => Some(&mut finish.timeline),
        }
    }

    /// Whether what the base backup has of a block is of no use.
    pub(super) fn is_superseded(
        &self,
        relation: RelFileLocator,
        fork: ForkNumber,
        block: BlockNumber,
    ) -> bool {
        let tag = decode::PageTag { relation, fork, block };
        self.log.stretches.first().is_some_and(|kept| kept.is_superseded(tag))
    }

    /// Brings the restored files forward.
    pub(super) fn apply(&self, place: &Place<'_>, progress: &dyn Progress) -> Result<Over, ForwardError> {
        let started = std::time::Instant::now();
        let kept = self.log.stretches.iter().map(keep::Kept::page_bytes);
        progress.phase("replay", Some(kept.fold(0, u64::saturating_add)));
        let control = ControlFile::decode(place.control)?;
        let files = apply::Files::new(place, control);
        let mut state = State::open(place.data_dir, place.tablespaces, &control)?;
        let mut written = apply::Written::default();
        let mut counters = self.counters(&control)?;
        let mut newest_xids = self.log.newest_xids.iter().peekable();
        for kept in &self.log.stretches {
            if let Some(copy) = kept.begins_with {
                apply::copy_database(&files, copy.from, copy.to)?;
            }
            let mut blocks = Vec::new();
            kept.state.oldest_first(
                &self.log.spill,
                &(0..PART_BLOCKS),
                |entry| -> Result<(), ForwardError> {
                    let record =
                        Record::unpack(entry.packed, entry.of(NO_RELATION), control.major, &mut blocks);
                    let kept = |_| ForwardError::Kept { at: entry.start };
                    let record = record.map_err(kept)?;
                    while let Some((_, xid)) = newest_xids.next_if(|(at, _)| *at <= entry.start) {
                        state.saw(*xid);
                        counters.iter_mut().for_each(|counters| counters.saw(*xid));
                    }
                    if let Some(counters) = &mut counters {
                        counters.follow(&record).map_err(kept)?;
                    }
                    let effects = redo::effects(&record).map_err(kept)?;
                    for effect in &effects {
                        state.apply(effect, (entry.start, entry.end))?;
                    }
                    Ok(())
                },
            )?;
            apply::shape(&files, kept)?;
            written.add(&apply::pages(&files, &self.log, kept, place.threads, progress)?);
        }
        state.finish(self.end.until())?;
        newest_xids.for_each(|(_, xid)| counters.iter_mut().for_each(|counters| counters.saw(*xid)));
        let (point, control, begun) = match &self.end {
            End::HandOver(point) => {
                let over = HandOver {
                    checkpoint: point.checkpoint,
                    checkpoint_bytes: &self.checkpoint,
                    redo: point.redo,
                    timeline: point.before,
                    settings: self.log.last_settings(),
                };
                (*point, over.rewrite(place.control, control.major)?, None)
            }
            End::Target(finish) => {
                finish::reset_unlogged(place.data_dir, &control)?;
                let counters = counters.expect("they are followed where a checkpoint has to be written");
                let (checkpoint, begun) = self.begin(finish, &counters, &control)?;
                let end = CleanEnd { checkpoint, settings: self.log.last_settings() };
                let Checkpoint { redo, timeline, previous_timeline: before, .. } = checkpoint;
                let point = Point { checkpoint: redo, redo, timeline, before, time: checkpoint.time() };
                (point, end.rewrite(place.control, control.major)?, Some(begun))
            }
        };
        let replayed = Replayed {
            finished: begun.is_some(),
            checkpoint: point.checkpoint,
            redo: point.redo,
            timeline: point.timeline,
            time: point.time,
            records: self.log.records,
            segments_read: self.log.segments.read,
            segments_spared: self.log.segments.spared,
            changes: written.changes,
            pages: written.pages,
            pages_read: written.read,
            spilled_bytes: self.log.spill.bytes(),
            scan_seconds: self.scan_seconds,
            apply_seconds: started.elapsed().as_secs_f64(),
        };
        Ok(Over { replayed, control, begun })
    }

    /// What checkpoints say, followed from the one that the backup begins with, where one has to be written.
    fn counters(&self, control: &ControlFile) -> Result<Option<Counters>, ForwardError> {
        let End::Target(_) = &self.end else { return Ok(None) };
        let base = Checkpoint::decode(&mut Reader::new(&self.checkpoint), control.major);
        let base = base.map_err(ControlError::from)?;
        Ok(Some(Counters::new(base, control.settings.track_commit_timestamp)))
    }

    /// The timeline that begins at the target, with the checkpoint that its log begins with.
    fn begin(
        &self,
        finish: &Finish,
        counters: &Counters,
        control: &ControlFile,
    ) -> Result<(Checkpoint, Begun), ForwardError> {
        let (last_record, at) = self.log.last_record.ok_or(ForwardError::NoCheckpoint { at: finish.base })?;
        let (timeline, before) = (finish.timeline, finish.before(at));
        let checkpoint = Checkpoint {
            timeline,
            previous_timeline: before,
            time_unix_seconds: now().unix_micros().div_euclid(1_000_000),
            oldest_active_xid: Xid::INVALID,
            ..counters.now()
        };
        let start = TimelineStart {
            at,
            last_record,
            major: control.major,
            system_id: control.system_id,
            segment_size: control.segment_size,
        };
        let (checkpoint, bytes) = start.write(checkpoint);
        let (reason, segment) = (finish.reason(last_record), self.segment.clone());
        Ok((checkpoint, Begun { timeline, at, before, reason, segment, bytes }))
    }
}
