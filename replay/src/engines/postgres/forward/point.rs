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
use super::finish::Finish;
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

/// Where native replay ends.
#[derive(Debug, Clone)]
pub(super) enum End {
    /// At a checkpoint, from which PostgreSQL goes on.
    HandOver(Point),
    /// At the target.
    Target(Finish),
}

impl End {
    /// Records that start before are replayed.
    pub(super) const fn until(&self) -> Lsn {
        match self {
            Self::HandOver(point) => point.redo,
            Self::Target(finish) => finish.lsn,
        }
    }
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
        for segment in forward.segments.iter().filter(|segment| segment.start < forward.end.until()) {
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
    /// Where it ends without PostgreSQL.
    pub finish: Option<Finish>,
    /// Why native replay has no part, or does not go on to the target, where that was thought of.
    pub because: Option<String>,
}

impl From<&Replay> for ReplayPlan {
    fn from(replay: &Replay) -> Self {
        let (how, because) = match replay {
            Replay::Server(because) => ("server", because.clone()),
            Replay::Native(forward) => ("native", forward.because.clone()),
        };
        let end = match replay {
            Replay::Server(_) => None,
            Replay::Native(forward) => Some(&forward.end),
        };
        let (hand_over, finish) = match end {
            Some(End::HandOver(point)) => (Some(*point), None),
            Some(End::Target(finish)) => (None, Some(finish.clone())),
            None => (None, None),
        };
        Self { how, hand_over, finish, because }
    }
}

impl fmt::Display for ReplayPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.hand_over, &self.finish) {
            (Some(Point { redo, checkpoint, .. }), _) => write!(
                f,
                "native to {redo}, the redo point of the checkpoint at {checkpoint}, then by PostgreSQL"
            )?,
            (None, Some(Finish { lsn, timeline, .. })) => {
                write!(f, "native to the target, {lsn}, where timeline {timeline} begins")?;
            }
            (None, None) => f.write_str("by PostgreSQL")?,
        }
        match &self.because {
            Some(because) => write!(f, ": {because}"),
            None => Ok(()),
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
    /// How it was asked to go on to the target.
    to_target: ReplayMode,
    memory: usize,
    line: Lineage,
    /// No checkpoint of a later time is taken.
    by: Option<TimestampTz>,
    end: End,
    /// Where the plan ends.
    stop: Lsn,
    /// Why it does not go on to the target, where that was thought of.
    because: Option<String>,
}

/// Chooses how to come to a plan's target. `finish` says whether native replay goes on to the target itself: as far as
/// that is possible, or else not at all, or not. `memory` bounds what it keeps, in bytes.
pub async fn choose_replay(
    archive: &Archive,
    layout: &Layout,
    catalog: &Catalog,
    plan: &Plan,
    mode: ReplayMode,
    finish: ReplayMode,
    memory: usize,
) -> Result<Replay, SearchError> {
    if mode == ReplayMode::Server {
        return Ok(Replay::Server(None));
    }
    // What is to end natively is not handed over.
    let mode = if finish == ReplayMode::Native { finish } else { mode };
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
    let (target, because) = match finish {
        ReplayMode::Server => (None, None),
        ReplayMode::Auto | ReplayMode::Native => match Finish::of(catalog, plan) {
            Ok(target) => (Some(target), None),
            Err(because) if finish == ReplayMode::Native => return server(&because),
            Err(because) => (None, Some(because)),
        },
    };
    let nowhere = Point {
        checkpoint: Lsn::ZERO,
        redo: Lsn::ZERO,
        timeline: plan.timeline,
        before: plan.timeline,
        time: plan.backup_stopped,
    };
    let forward = Forward {
        indexes,
        segments: Arc::new(segments.collect()),
        merged,
        from: plan.start_lsn,
        consistent: plan.consistent_lsn,
        mode,
        to_target: finish,
        memory,
        line: plan.lineage.clone(),
        by: None,
        end: target.map_or(End::HandOver(nowhere), End::Target),
        stop: plan.stop.lsn,
        because,
    };
    if forward.finish().is_some() {
        return Ok(Replay::Native(Box::new(forward)));
    }
    match forward.newest(forward.stop, Lsn::MAX).await? {
        Some(point) => Ok(Replay::Native(Box::new(Forward { end: End::HandOver(point), ..forward }))),
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
    /// Where PostgreSQL goes on, if it does.
    pub const fn hand_over(&self) -> Option<Point> {
        match &self.end {
            End::HandOver(point) => Some(*point),
            End::Target(_) => None,
        }
    }

    /// The target, if replay ends there without PostgreSQL.
    pub const fn finish(&self) -> Option<&Finish> {
        match &self.end {
            End::HandOver(_) => None,
            End::Target(finish) => Some(finish),
        }
    }

    /// The same up to the newest checkpoint that was not made later than this.
    pub async fn made_by(self, time: TimestampTz) -> Result<Replay, SearchError> {
        let (end, redo) = match &self.end {
            End::HandOver(point) if point.time <= time => {
                return Ok(Replay::Native(Box::new(Self { by: Some(time), ..self })));
            }
            End::HandOver(point) => (point.checkpoint, point.redo),
            End::Target(_) => (self.stop, Lsn::MAX),
        };
        let forward = Self { by: Some(time), ..self };
        Ok(match forward.newest(end, redo).await? {
            Some(point) => Replay::Native(Box::new(Self { end: End::HandOver(point), ..forward })),
            None => Replay::Server(Some(NO_CHECKPOINT.to_owned())),
        })
    }

    /// Whether nothing but that will do.
    pub const fn is_required(&self) -> bool {
        matches!(self.mode, ReplayMode::Native)
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
            segment.start >= self.from && end <= segment.usable_end.min(self.end.until())
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
        self.end.until().get().saturating_sub(self.from.get())
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
        let mut because = None;
        let unknown = loop {
            progress.phase("read the log", Some(self.wal_bytes()));
            let wanted = Wanted { from: self.from, until: self.end.until() };
            let keeper = Keeper::new(Spill::new(scratch)?, self.budget(threads), selection.clone());
            let scanned = scan::scan(&self.indexes, &self.segments, wanted, keeper, threads, progress);
            match scanned.await {
                Ok(log) => {
                    let at = match &self.end {
                        End::HandOver(point) => point.checkpoint,
                        End::Target(finish) => finish.base,
                    };
                    let checkpoint = self.checkpoint_bytes(at).await?;
                    let segment = match (&self.end, log.last_record) {
                        (End::Target(_), Some((_, end))) => self.segment_before(end)?,
                        _ => None,
                    };
                    let scan_seconds = started.elapsed().as_secs_f64();
                    let end = self.end.clone();
                    return Ok(Ok(Ready { log, end, checkpoint, segment, scan_seconds, because }));
                }
                Err(ForwardError::Unknown(unknown)) if !self.may_end_earlier() => break unknown,
                Err(ForwardError::Unknown(unknown)) => {
                    let (end, redo) = match (&self.end, self.mode) {
                        (End::HandOver(point), _) => (point.checkpoint, unknown.at),
                        // Where replay would have ended at first: what is unknown before that is an error.
                        (End::Target(_), ReplayMode::Native) => (self.stop, Lsn::MAX),
                        (End::Target(_), _) => (self.stop, unknown.at),
                    };
                    match self.newest(end, redo).await? {
                        Some(point) => {
                            let reason = format!("{unknown}: it ends earlier, at {}", point.redo);
                            progress.warn(&reason);
                            because = Some(reason);
                            self.end = End::HandOver(point);
                        }
                        None => break unknown,
                    }
                }
                Err(e) => return Err(e),
            }
        };
        Ok(Err(unknown))
    }

    /// Whether the end may be moved to a checkpoint: to the newest alone, where replay has to be native, but need not go to the
    /// target.
    const fn may_end_earlier(&self) -> bool {
        match &self.end {
            End::HandOver(_) => !matches!(self.mode, ReplayMode::Native),
            End::Target(_) => !matches!(self.to_target, ReplayMode::Native),
        }
    }

    /// The segment that holds the log right before a place inside it.
    fn segment_before(&self, at: Lsn) -> Result<Option<SegmentEntry>, ForwardError> {
        let Some(segment) = self.segments.iter().rev().find(|segment| segment.start < at) else {
            return Ok(None);
        };
        if segment.entry.info.size.floor(at) == at {
            return Ok(None);
        }
        match at <= segment.usable_end {
            true => Ok(Some(segment.entry.clone())),
            false => Err(ForwardError::Short { at }),
        }
    }

    async fn checkpoint_bytes(&self, at: Lsn) -> Result<[u8; Checkpoint::BYTES], ForwardError> {
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
