//! Where native replay ends: the redo point of a checkpoint between the backup's end and the target.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use waltide_format::archive::{
    Catalog, CheckpointInfo, Estimate, Layout, Lineage, MergedSection, NativeWork, RestoreWork, Run,
    SegmentEntry, SegmentInfo, Step,
};
use waltide_format::engines::postgres::wal::{Checkpoint, Record, XlogRecord};
use waltide_format::{BLOCK_BYTES, Lsn, PgMajor, SegmentName, TimelineId, TimestampTz};
use waltide_storage::{Archive, Progress};

use super::super::indexes::{ArchivedIndexes, SearchError};
use super::super::selection::Selection;
use super::batch::PART_BLOCKS;
use super::decode::{Unknown, Wanted};
use super::keep::Keeper;
use super::scan::UNDER_WAY;
use super::spill::Spill;
use super::{ForwardError, Ready, scan};
use crate::plan::Plan;

/// Why there is none to hand over at.
const NO_CHECKPOINT: &str = "no checkpoint lies between the backup's end and the target";

/// Which way to the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum ReplayMode {
    /// Native as far as the engine vouches for, then PostgreSQL.
    #[default]
    Auto,
    /// Native, or an error.
    Native,
    /// PostgreSQL alone.
    Server,
}

impl FromStr for ReplayMode {
    type Err = &'static str;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        match s {
            "auto" => Ok(Self::Auto),
            "native" => Ok(Self::Native),
            "server" => Ok(Self::Server),
            _ => Err("one of auto, native, server"),
        }
    }
}

/// A checkpoint that PostgreSQL goes on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Point {
    /// Start of its record.
    pub checkpoint: Lsn,
    /// Its redo point.
    pub redo: Lsn,
    /// The timeline both are on.
    pub timeline: TimelineId,
    /// The timeline of the last byte before the redo point: another one where a promotion begins with the checkpoint.
    pub before: TimelineId,
    /// When it was made.
    pub time: TimestampTz,
}

/// The way that was chosen.
#[derive(Debug, Clone)]
pub enum Replay {
    /// PostgreSQL replays everything; why, where native replay was thought of.
    Server(Option<String>),
    /// Native replay comes first.
    Native(Box<Forward>),
}

impl Replay {
    /// How long a plan takes this way.
    pub fn estimate(&self, plan: &Plan) -> Estimate {
        let Self::Native(forward) = self else { return plan.estimate };
        let work = RestoreWork {
            base_bytes: plan.base_bytes,
            files: plan.base_files,
            wal_bytes: plan.wal_bytes,
            segments: plan.segments.len() as u64,
            records: plan.records,
        };
        let mut native = NativeWork { wal_bytes: forward.wal_bytes(), ..NativeWork::default() };
        for segment in forward.segments.iter().filter(|segment| segment.start < forward.point.redo) {
            let SegmentInfo { records, image_bytes, .. } = segment.entry.info;
            native.segments = native.segments.saturating_add(1);
            native.records = native.records.saturating_add(records);
            native.image_bytes = native.image_bytes.saturating_add(image_bytes);
        }
        plan.rates.estimate_native(&work, &native)
    }
}

/// The way that was chosen, as a restore says it beforehand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReplayPlan {
    /// `native` or `server`.
    pub how: &'static str,
    /// Where native replay hands over to PostgreSQL.
    pub hand_over: Option<Point>,
    /// Why native replay has no part, where it was thought of.
    pub because: Option<String>,
}

impl From<&Replay> for ReplayPlan {
    fn from(replay: &Replay) -> Self {
        match replay {
            Replay::Server(because) => Self { how: "server", hand_over: None, because: because.clone() },
            Replay::Native(forward) => Self { how: "native", hand_over: Some(forward.point), because: None },
        }
    }
}

impl fmt::Display for ReplayPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.hand_over, &self.because) {
            (Some(Point { redo, checkpoint, .. }), _) => {
                write!(
                    f,
                    "native to {redo}, the redo point of the checkpoint at {checkpoint}, then by PostgreSQL"
                )
            }
            (None, Some(because)) => write!(f, "by PostgreSQL: {because}"),
            (None, None) => f.write_str("by PostgreSQL"),
        }
    }
}

/// A segment of the log that is replayed.
#[derive(Debug, Clone)]
pub(super) struct LogSegment {
    pub(super) entry: SegmentEntry,
    /// Its records are used up to here.
    pub(super) usable_end: Lsn,
    pub(super) start: Lsn,
}

/// Native replay up to a checkpoint.
#[derive(Debug, Clone)]
pub struct Forward {
    indexes: ArchivedIndexes,
    segments: Arc<Vec<LogSegment>>,
    /// The checkpoints of those segments that merged indexes tell of.
    merged: BTreeMap<SegmentName, Vec<CheckpointInfo>>,
    from: Lsn,
    consistent: Lsn,
    mode: ReplayMode,
    memory: usize,
    line: Lineage,
    /// No checkpoint of a later time is taken.
    by: Option<TimestampTz>,
    point: Point,
}

/// Chooses how to come to a plan's target. `memory` bounds what native replay keeps, in bytes.
pub async fn choose_replay(
    archive: &Archive,
    layout: &Layout,
    catalog: &Catalog,
    plan: &Plan,
    mode: ReplayMode,
    memory: usize,
) -> Result<Replay, SearchError> {
    if mode == ReplayMode::Server {
        return Ok(Replay::Server(None));
    }
    let server = |reason: &str| Ok(Replay::Server(Some(reason.to_owned())));
    if plan.major != PgMajor::V15 {
        return server(&format!("native replay knows PostgreSQL 15, this is {}", plan.major));
    }
    if plan.segments.iter().any(|s| s.partial) {
        return server("the last segment is a .partial");
    }
    let system = layout.system(catalog.system.system_id);
    let indexes = ArchivedIndexes::new(archive.clone()).with_merged(system);
    let run = catalog.run(&plan.lineage, plan.start_lsn);
    let merged = merged_checkpoints(&indexes, &run, plan).await?;
    let segments = run.steps.iter().filter(|step| step.start() < plan.stop.read_to);
    let segments = segments.map(|step| LogSegment {
        entry: step.entry.clone(),
        usable_end: step.usable_end,
        start: step.start(),
    });
    let forward = Forward {
        indexes,
        segments: Arc::new(segments.collect()),
        merged,
        from: plan.start_lsn,
        consistent: plan.consistent_lsn,
        mode,
        memory,
        line: plan.lineage.clone(),
        by: None,
        point: Point {
            checkpoint: Lsn::ZERO,
            redo: Lsn::ZERO,
            timeline: plan.timeline,
            before: plan.timeline,
            time: plan.backup_stopped,
        },
    };
    match forward.newest(plan.stop.lsn, Lsn::MAX).await? {
        Some(point) => Ok(Replay::Native(Box::new(Forward { point, ..forward }))),
        None => server(NO_CHECKPOINT),
    }
}

/// The checkpoints between a backup's end and a plan's stop, of those segments that merged indexes tell of.
async fn merged_checkpoints(
    indexes: &ArchivedIndexes,
    run: &Run<'_>,
    plan: &Plan,
) -> Result<BTreeMap<SegmentName, Vec<CheckpointInfo>>, SearchError> {
    let here = |s: &&Step<'_>| s.usable_end > plan.consistent_lsn && s.start() < plan.stop.read_to;
    let steps: Vec<_> = run.steps.iter().filter(here).collect();
    let mut told = BTreeMap::new();
    for cover in indexes.merged_lists(&steps, MergedSection::Checkpoints).await? {
        for segment in &cover.segments {
            let SegmentInfo { name, size, .. } = segment.info;
            // One that runs over an edge counts where it begins, and is told of both.
            let (start, end) = (name.start(size), name.end(size));
            let checkpoints = cover.told.checkpoints.iter();
            let ours =
                checkpoints.filter(|c| start.is_some_and(|s| c.end > s) && end.is_some_and(|e| c.start < e));
            told.insert(name, ours.cloned().collect());
        }
    }
    Ok(told)
}

impl Forward {
    /// Where PostgreSQL goes on.
    pub const fn point(&self) -> Point {
        self.point
    }

    /// The same up to the newest checkpoint that was not made later than this.
    pub async fn made_by(self, time: TimestampTz) -> Result<Replay, SearchError> {
        let Point { checkpoint, redo, time: found, .. } = self.point;
        let forward = Self { by: Some(time), ..self };
        if found <= time {
            return Ok(Replay::Native(Box::new(forward)));
        }
        Ok(match forward.newest(checkpoint, redo).await? {
            Some(point) => Replay::Native(Box::new(Self { point, ..forward })),
            None => Replay::Server(Some(NO_CHECKPOINT.to_owned())),
        })
    }

    /// How native replay was asked for.
    pub const fn mode(&self) -> ReplayMode {
        self.mode
    }

    /// What is left of the memory for what is kept: while the log is read, segments under way need some, each as it is stored
    /// and for what its records do; while pages are written, ranges of them do.
    fn budget(&self, threads: usize) -> usize {
        let segments = Self::under_way(threads).saturating_mul(2).saturating_add(threads as u64);
        let reading = segments.saturating_mul(self.segment_bytes());
        let writing =
            (threads as u64).saturating_mul(u64::from(PART_BLOCKS)).saturating_mul(BLOCK_BYTES as u64);
        let others = usize::try_from(reading.max(writing)).unwrap_or(usize::MAX);
        // The allocator has its own share.
        (self.memory.saturating_sub(others) / 4).saturating_mul(3).max(self.memory / 4)
    }

    /// So many bytes may have to be set aside in a file, where the files have `file_bytes`: what is kept of the log, but for
    /// what is kept in memory. Of a page's images that is the newest, beside those in segments that are taken apart at the
    /// same time: no more than there are pages. Of all else it is less where records are made irrelevant by later ones,
    /// which is not known before they are read. Where databases were copied file by file, each stretch between two copies
    /// keeps a newest image of its own, which is not reckoned with. What is packed of a record is shorter than the record;
    /// only one that changes several pages can come out longer.
    pub fn set_aside_max(&self, threads: usize, file_bytes: u64) -> u64 {
        let (wal, size) = (self.wal_bytes(), self.segment_bytes());
        // Of a segment that is not read whole nobody knows how much of it is images.
        let is_whole = |segment: &&LogSegment| {
            let end = segment.start.saturating_add(size);
            segment.start >= self.from && end <= segment.usable_end.min(self.point.redo)
        };
        let images = self.segments.iter().filter(is_whole).map(|segment| segment.entry.info.image_bytes);
        let images = images.fold(0, u64::saturating_add).min(wal);
        let at_once = Self::under_way(threads).saturating_mul(size);
        let kept = wal.saturating_sub(images).saturating_add(images.min(file_bytes.saturating_add(at_once)));
        kept.saturating_sub(self.budget(threads) as u64)
    }

    fn segment_bytes(&self) -> u64 {
        self.segments.first().map_or(0, |s| s.entry.info.size.bytes())
    }

    /// So many segments are being taken apart, or wait for what their records do to be added.
    const fn under_way(threads: usize) -> u64 {
        threads.saturating_add(UNDER_WAY).saturating_add(1) as u64
    }

    /// Bytes of log that are read.
    pub fn wal_bytes(&self) -> u64 {
        self.point.redo.get().saturating_sub(self.from.get())
    }

    /// The newest checkpoint whose record ends by `end` and whose redo point is not behind `redo`.
    async fn newest(&self, end: Lsn, redo: Lsn) -> Result<Option<Point>, SearchError> {
        let on_line = |timeline, lsn| self.line.timeline_at(lsn) == timeline;
        for segment in self.segments.iter().rev() {
            if segment.start >= end {
                continue;
            }
            if segment.usable_end <= self.consistent {
                break;
            }
            let read = match self.merged.get(&segment.entry.info.name) {
                Some(_) => Vec::new(),
                None => self.indexes.index(&segment.entry).await?.checkpoints,
            };
            let checkpoints = self.merged.get(&segment.entry.info.name).unwrap_or(&read);
            let fits = checkpoints.iter().rev().find(|c| {
                c.end <= end
                    && self.by.is_none_or(|by| c.time <= by)
                    && c.start < segment.usable_end
                    && c.redo >= self.consistent
                    && c.redo <= redo
                    && on_line(c.timeline, c.redo)
                    && on_line(c.timeline, c.start)
            });
            if let Some(c) = fits {
                let CheckpointInfo { start: checkpoint, redo, timeline, time, .. } = *c;
                let before = self.line.timeline_at(Lsn::from(redo.get().saturating_sub(1)));
                return Ok(Some(Point { checkpoint, redo, timeline, before, time }));
            }
        }
        Ok(None)
    }

    /// Reads the log, and moves the end to an earlier checkpoint where a record is met that the engine does not know.
    /// Keeps only what changes pages of the `selection`, where there is one. Changes no file but one without a name in
    /// `scratch`.
    pub(in super::super) async fn read(
        &mut self,
        scratch: &Path,
        selection: Option<&Selection>,
        threads: usize,
        progress: &dyn Progress,
    ) -> Result<Result<Ready, Unknown>, ForwardError> {
        let started = Instant::now();
        let selection = selection.cloned().map(Arc::new);
        let unknown = loop {
            progress.phase("read the log", Some(self.wal_bytes()));
            let wanted = Wanted { from: self.from, until: self.point.redo };
            let keeper = Keeper::new(Spill::new(scratch)?, self.budget(threads), selection.clone());
            let scanned = scan::scan(&self.indexes, &self.segments, wanted, keeper, threads, progress);
            match scanned.await {
                Ok(log) => {
                    let checkpoint_bytes = self.checkpoint_bytes().await?;
                    let scan_seconds = started.elapsed().as_secs_f64();
                    return Ok(Ok(Ready { log, point: self.point, checkpoint_bytes, scan_seconds }));
                }
                Err(ForwardError::Unknown(unknown)) if self.mode == ReplayMode::Native => break unknown,
                Err(ForwardError::Unknown(unknown)) => {
                    match self.newest(self.point.checkpoint, unknown.at).await? {
                        Some(point) => {
                            progress.message(&format!("{unknown}: it ends earlier, at {}", point.redo));
                            self.point = point;
                        }
                        None => break unknown,
                    }
                }
                Err(e) => return Err(e),
            }
        };
        Ok(Err(unknown))
    }

    async fn checkpoint_bytes(&self) -> Result<[u8; Checkpoint::BYTES], ForwardError> {
        let at = self.point.checkpoint;
        let from = self.segments.iter().position(|s| s.start <= at && at < s.usable_end).unwrap_or(0);
        let entries: Vec<_> = self.segments.iter().skip(from).map(|s| &s.entry).collect();
        let look = move |record: &Record<'_>| {
            let is = matches!(
                XlogRecord::decode(record),
                Some(Ok(XlogRecord::CheckpointOnline(_) | XlogRecord::CheckpointShutdown(_)))
            );
            let bytes = record.main_data().first_chunk().copied().filter(|_| is && record.start == at);
            (record.start >= at).then_some(bytes)
        };
        let found = self.indexes.records(&entries, look).await?;
        found.flatten().ok_or(ForwardError::NoCheckpoint { at })
    }
}
