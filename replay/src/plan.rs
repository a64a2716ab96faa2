//! What a restore will do, known before it does anything: the base backup, the WAL, the exact end; or why not.

mod damage;

use std::fmt;

use serde::Serialize;
use waltide_format::archive::{
    BackupEntry, BackupKind, Catalog, Estimate, Gap, GapKind, Lineage, Rates, RestoreWork, Run, Tablespace,
};
use waltide_format::{BackupId, Lsn, PgMajor, SegmentName, SystemId, TimelineId, TimestampTz};

use crate::resolve::{LastCommit, Lost, Reading, Resolution, Source, Stop, StopKind};
use crate::target::{Goal, GoalError, Target, TargetTimeline};
use damage::Damage;

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The target contradicts itself.
    #[error(transparent)]
    Goal(#[from] GoalError),
    /// The archive has no complete backup.
    #[error("cluster {cluster} has no complete backup{damaged}\nhint: {}", if damaged.is_empty() { "make one with `waltide backup`" } else { "run `waltide verify`" })]
    NoBackup {
        /// The cluster's name.
        cluster: String,
        /// What of it cannot be read, a line each.
        damaged: String,
    },
    /// The backup named is not there.
    #[error(
        "cluster {cluster} has no complete backup {backup}{damaged}\nhint: `waltide list` shows those there are"
    )]
    UnknownBackup {
        /// The cluster's name.
        cluster: String,
        /// What of it cannot be read, a line each.
        damaged: String,
        /// The backup asked for.
        backup: BackupId,
    },
    /// Nothing in the archive is of this timeline.
    #[error("the archive has nothing of timeline {timeline}; it has {known}{damaged}")]
    NoTimeline {
        /// What cannot be read, a line each.
        damaged: String,
        /// The timeline asked for.
        timeline: TimelineId,
        /// Those there are.
        known: String,
    },
    /// The target cannot be reached.
    #[error(transparent)]
    Unreachable(Box<Unreachable>),
    /// A segment's index could not be read.
    #[error("the archived WAL could not be searched for the target")]
    Source(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A target that cannot be reached: why, and which can.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Unreachable {
    /// The target, in words.
    pub target: String,
    /// Why not.
    pub reason: String,
    /// The latest moment before it that can be reached.
    pub before: Option<Reachable>,
    /// The earliest moment after it that can be reached.
    pub after: Option<Reachable>,
    /// What stood in the way of each backup, newest first.
    pub attempts: Vec<Attempt>,
}

/// A backup that was looked at, and what stood in its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Attempt {
    /// The backup.
    pub backup: BackupId,
    /// What stood in its way.
    pub reason: String,
}

/// A moment that can be reached.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Reachable {
    /// Its position.
    pub lsn: Lsn,
    /// Its time, as near as it is known.
    pub time: Option<TimestampTz>,
    /// The backup that it can be reached from.
    pub backup: BackupId,
}

impl fmt::Display for Reachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LSN {}", self.lsn)?;
        if let Some(time) = self.time {
            write!(f, ", {time}")?;
        }
        write!(f, " (backup {})", self.backup)
    }
}

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cannot be reached: {}", self.target, self.reason)?;
        let side = |r: &Option<Reachable>| r.as_ref().map_or("none".to_owned(), ToString::to_string);
        write!(f, "\nnearest before: {}", side(&self.before))?;
        write!(f, "\nnearest after: {}", side(&self.after))
    }
}

impl std::error::Error for Unreachable {}

/// A segment that recovery will ask for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlannedSegment {
    /// Its name.
    pub name: SegmentName,
    /// The object that will be read.
    pub path: String,
    /// The object's length.
    pub stored_bytes: u64,
    /// Whether only a `.partial` is there, which PostgreSQL does not ask for by itself.
    pub partial: bool,
}

/// What a restore will do.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// The cluster's name in the archive.
    pub cluster: String,
    /// Its system identifier.
    pub system_id: SystemId,
    /// Its major version.
    pub major: PgMajor,
    /// What was asked for.
    pub goal: Goal,
    /// The base backup.
    pub backup: BackupId,
    /// How it was made.
    pub backup_kind: BackupKind,
    /// When it was complete.
    pub backup_stopped: TimestampTz,
    /// Where replay begins.
    pub start_lsn: Lsn,
    /// Where the backup is consistent.
    pub consistent_lsn: Lsn,
    /// The timeline that is followed.
    pub timeline: TimelineId,
    /// That timeline and its ancestors.
    pub lineage: Lineage,
    /// Where recovery stops.
    pub stop: Stop,
    /// The last commit that will be there, where the archive's WAL has it.
    pub last_commit: Option<LastCommit>,
    /// What is archived behind that and will not be there.
    pub lost: Option<Lost>,
    /// The segments, in order.
    pub segments: Vec<PlannedSegment>,
    /// Bytes of WAL from start to stop.
    pub wal_bytes: u64,
    /// Records in the segments.
    pub records: u64,
    /// Bytes of their objects.
    pub wal_stored_bytes: u64,
    /// Bytes of the base backup's files.
    pub base_bytes: u64,
    /// How many they are.
    pub base_files: u64,
    /// Tablespaces and where they lay.
    pub tablespaces: Vec<Tablespace>,
    /// The settings that name the target.
    pub settings: Vec<(String, String)>,
    /// How long it will take where PostgreSQL replays everything; see also
    /// [`Replay::estimate`](crate::engines::postgres::Replay::estimate).
    pub estimate: Estimate,
    /// What that was made of.
    #[serde(skip)]
    pub(crate) rates: Rates,
    /// What the operator should know.
    pub notes: Vec<String>,
}

/// Moments between which every target can be reached from one backup.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Window {
    /// The backup.
    pub backup: BackupId,
    /// The earliest.
    pub from: Reachable,
    /// The latest.
    pub to: Reachable,
}

/// The backup that recovery could start from, along one line.
pub(crate) struct Candidate<'a> {
    pub(crate) entry: &'a BackupEntry,
    pub(crate) line: Lineage,
    pub(crate) run: Run<'a>,
}

/// Finds the newest backup from which the goal can be reached, and everything that follows from it.
pub async fn plan<S: Source>(
    catalog: &Catalog,
    goal: &Goal,
    backup: Option<&BackupId>,
    rates: Rates,
    source: &S,
) -> Result<Plan, PlanError> {
    goal.check()?;
    let candidates = candidates(catalog, goal.timeline, backup)?;
    let damage = Damage::of(catalog);
    let reading = Reading::new(source);
    let fail = |e: S::Error| PlanError::Source(Box::new(e));
    let mut attempts: Vec<Attempt> = Vec::new();
    let mut late = Vec::new();
    let mut searched = 0usize;
    for candidate in &candidates {
        let head = &candidate.entry.head;
        let mut refuse = |reason: String| attempts.push(Attempt { backup: head.id.clone(), reason });
        if let Some(history) = damage.history(&candidate.line, goal.timeline) {
            let told = damage::told(history);
            refuse(match goal.timeline {
                TargetTimeline::Latest => {
                    format!(
                        "which timelines there are is not known: {told}\nhint: --target-timeline names one"
                    )
                }
                _ => format!("where its timeline comes from is not known: {told}"),
            });
            continue;
        }
        if let Err(reason) = candidate.usable(catalog) {
            refuse(reason);
            continue;
        }
        let (start, consistent) = (head.start_lsn, head.stop_lsn);
        if let Some(lsn) = goal.target.lsn()
            && lsn <= head.checkpoint_lsn
        {
            refuse(format!("it ends later, at {consistent}"));
            late.push(candidate);
            continue;
        }
        // Of the commits before its start only this is known: they were earlier than its end.
        if let Target::Time(time) = goal.target
            && time < head.stopped
        {
            refuse(format!("it ended later, at {}", head.stopped));
            late.push(candidate);
            continue;
        }
        // Most targets are behind the newest backup. Where it does not have this one, all others are asked at once.
        if let Target::Xid(xid) = goal.target
            && searched > 0
        {
            reading.ask_where(candidates.iter().map(|c| &c.run), xid).await.map_err(fail)?;
        }
        searched = searched.saturating_add(1);
        let found = reading.resolve(&candidate.run, start, consistent, goal).await.map_err(fail)?;
        let found = match found {
            Resolution::NotFound => {
                candidate.past_the_end(catalog, &damage, goal).map_err(|reason| (reason, false))
            }
            // Recovery would go on to what cannot be read, and fail there.
            Resolution::Stops(stop)
                if stop.kind == StopKind::End
                    && let Some(object) = damage.behind(&candidate.line, &candidate.run) =>
            {
                let (end, told) = (stop.lsn, damage::told(object));
                Err((
                    format!(
                        "its WAL ends at {end}: {told}\nhint: put a good copy of it back; without it, moved away, recovery ends there"
                    ),
                    false,
                ))
            }
            Resolution::Stops(stop) if stop.lsn < consistent => {
                Err((format!("it ends later, at {consistent}"), true))
            }
            Resolution::Stops(stop) => Ok(stop),
        };
        match found {
            Err((reason, too_late)) => {
                refuse(reason);
                if too_late {
                    late.push(candidate);
                }
            }
            Ok(stop) => {
                let last = reading.last_commit(&candidate.run, stop.lsn).await.map_err(fail)?;
                let lost = reading.lost(&candidate.run, stop.lsn).await.map_err(fail)?;
                return Ok(make(catalog, &damage, goal, candidate, stop, (last, lost), rates));
            }
        }
    }
    let outside = match (&goal.target, candidates.first()) {
        (Target::Xid(_) | Target::Name(_), Some(candidate)) => {
            archived_at(catalog, &candidate.line, goal, &reading).await.map_err(fail)?
        }
        _ => None,
    };
    let why = unreachable(catalog, &damage, goal, outside, &candidates, &late, attempts);
    Err(PlanError::Unreachable(Box::new(why)))
}

/// Where a target that no backup leads to lies in the archived WAL along a line, if it does.
async fn archived_at<S: Source>(
    catalog: &Catalog,
    line: &Lineage,
    goal: &Goal,
    reading: &Reading<'_, S>,
) -> Result<Option<Lsn>, S::Error> {
    for stretch in catalog.stretches(line) {
        let Some(start) = stretch.run.steps.first().map(|step| step.start()) else { continue };
        if let Resolution::Stops(stop) = reading.resolve(&stretch.run, start, start, goal).await? {
            return Ok(Some(stop.lsn));
        }
    }
    Ok(None)
}

/// Every backup on the line that `timeline` means, newest first.
pub(crate) fn candidates<'a>(
    catalog: &'a Catalog,
    timeline: TargetTimeline,
    backup: Option<&BackupId>,
) -> Result<Vec<Candidate<'a>>, PlanError> {
    let cluster = || catalog.cluster.clone();
    let damaged = || Damage::of(catalog).told();
    if catalog.backups.is_empty() {
        return Err(PlanError::NoBackup { cluster: cluster(), damaged: damaged() });
    }
    if let Some(id) = backup
        && catalog.backup(id).is_none()
    {
        return Err(PlanError::UnknownBackup { cluster: cluster(), damaged: damaged(), backup: id.clone() });
    }
    let wanted = |entry: &&BackupEntry| backup.is_none_or(|id| entry.head.id == *id);
    let timelines = catalog.timelines();
    if let TargetTimeline::Id(id) = timeline
        && !timelines.contains(&id)
    {
        let known = timelines.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        return Err(PlanError::NoTimeline { damaged: damaged(), timeline: id, known });
    }
    let on = |line: &Lineage, e: &BackupEntry| line.holds(e.head.timeline, e.head.stop_lsn);
    let line = match timeline {
        TargetTimeline::Current => None,
        TargetTimeline::Id(id) => Some(catalog.lineage(id)),
        TargetTimeline::Latest => timelines
            .iter()
            .rev()
            .map(|t| catalog.lineage(*t))
            .find(|line| catalog.backups.iter().filter(wanted).any(|e| on(line, e))),
    };
    let candidate = |entry: &'a BackupEntry| {
        let line = line.clone().unwrap_or_else(|| catalog.lineage(entry.head.timeline));
        let run = catalog.run(&line, entry.head.start_lsn);
        on(&line, entry).then_some(Candidate { entry, line, run })
    };
    let mut found: Vec<_> = catalog.backups.iter().filter(wanted).filter_map(candidate).collect();
    found.sort_by_key(|c| std::cmp::Reverse((c.entry.head.stop_lsn, c.entry.head.started)));
    Ok(found)
}

impl Candidate<'_> {
    /// Whether the WAL that the backup itself needs is there.
    pub(crate) fn usable(&self, catalog: &Catalog) -> Result<(), String> {
        let head = &self.entry.head;
        let damage = Damage::of(catalog);
        match self.run.end() {
            Some(end) if end >= head.stop_lsn => Ok(()),
            Some(end) => Err(format!(
                "the WAL it needs up to {} ends at {end}{}",
                head.stop_lsn,
                self.hole(catalog, &damage).map_or(String::new(), |h| format!(": {h}"))
            )),
            None => Err(match damage.at(&self.line, head.start_lsn) {
                Some(object) => {
                    format!("it starts in a segment that cannot be read: {}", damage::told(object))
                }
                None => format!(
                    "the segment {} that it starts in is not in the archive",
                    SegmentName::containing(head.timeline, head.start_lsn, head.segment_size)
                ),
            }),
        }
    }

    /// What ends the run although WAL follows in the archive.
    fn hole(&self, catalog: &Catalog, damage: &Damage<'_>) -> Option<String> {
        if let Some(gap) = &self.run.broken {
            return Some(told(gap));
        }
        if let Some(object) = damage.behind(&self.line, &self.run) {
            return Some(damage::told(object));
        }
        let last = self.run.steps.last()?;
        if last.usable_end < last.entry.info.valid_end {
            return None;
        }
        let next = last.entry.info.name.end(last.entry.info.size)?;
        let on_line = |e: &&waltide_format::archive::SegmentEntry| {
            let start = e.info.name.start(e.info.size);
            start.is_some_and(|s| s >= next && self.line.holds(e.info.name.timeline(), s))
        };
        let after = catalog.segments.iter().filter(on_line).min_by_key(|e| e.info.name.start(e.info.size))?;
        Some(format!("nothing is archived between {} and {}", last.entry.info.name, after.info.name))
    }

    /// What a target that no record is means: the end, if it may.
    fn past_the_end(&self, catalog: &Catalog, damage: &Damage<'_>, goal: &Goal) -> Result<Stop, String> {
        let end = self.run.end().unwrap_or_default();
        let hole = self.hole(catalog, damage);
        match (&goal.target, hole) {
            (Target::Time(_), None) => {
                Ok(Stop { kind: StopKind::End, lsn: end, read_to: end, xid: None, time: None })
            }
            (Target::Time(_), Some(hole)) => Err(format!("its WAL ends at {end}: {hole}")),
            (Target::Lsn(_) | Target::Moment(_), hole) => Err(match hole {
                Some(hole) => format!("its WAL ends at {end}: {hole}"),
                None => format!("the archived WAL ends at {end}"),
            }),
            (target, hole) => Err(match hole {
                Some(hole) => format!("{target} is not in its WAL, which ends at {end}: {hole}"),
                None => format!("{target} is not in its WAL, which ends at {end}"),
            }),
        }
    }

    fn window(&self) -> Option<Window> {
        let head = &self.entry.head;
        let end = self.run.end().filter(|end| *end >= head.stop_lsn)?;
        let range = self.run.range();
        let id = || head.id.clone();
        let time = range.and_then(|r| r.last_commit_time).filter(|t| *t >= head.stopped);
        Some(Window {
            backup: id(),
            from: Reachable { lsn: head.stop_lsn, time: Some(head.stopped), backup: id() },
            to: Reachable { lsn: end, time: time.or(Some(head.stopped)), backup: id() },
        })
    }
}

/// What can be reached along the line that `timeline` means, oldest backup first.
pub fn reachable_windows(catalog: &Catalog, timeline: TargetTimeline) -> Result<Vec<Window>, PlanError> {
    Ok(candidates(catalog, timeline, None)?.iter().rev().filter_map(Candidate::window).collect())
}

fn told(gap: &Gap) -> String {
    match &gap.kind {
        GapKind::Missing { first, last, count: 1 } if first == last => format!("{first} is missing"),
        GapKind::Missing { first, last, count } => {
            format!("{count} segments, {first} to {last}, are missing")
        }
        GapKind::Broken { reason } => reason.clone(),
        GapKind::Admitted { fault } => format!("a segment was archived with a fault: {fault}"),
    }
}

fn unreachable(
    catalog: &Catalog,
    damage: &Damage<'_>,
    goal: &Goal,
    outside: Option<Lsn>,
    candidates: &[Candidate<'_>],
    late: &[&Candidate<'_>],
    attempts: Vec<Attempt>,
) -> Unreachable {
    let windows: Vec<_> = candidates.iter().filter_map(Candidate::window).collect();
    // Of a transaction or a name that is nowhere, no moment is before or after.
    let (ends, begins): (Vec<_>, Vec<_>) = match (&goal.target, goal.target.lsn().or(outside)) {
        (&Target::Time(t), _) => (
            windows.iter().filter(|w| w.to.time.is_some_and(|to| to < t)).collect(),
            windows.iter().filter(|w| w.from.time.is_some_and(|from| from >= t)).collect(),
        ),
        (_, Some(lsn)) => (
            windows.iter().filter(|w| w.to.lsn < lsn).collect(),
            windows.iter().filter(|w| w.from.lsn >= lsn).collect(),
        ),
        (Target::Latest, _) => (windows.iter().collect(), Vec::new()),
        _ => {
            let lates: Vec<_> = late.iter().map(|c| &c.entry.head.id).collect();
            (Vec::new(), windows.iter().filter(|w| lates.contains(&&w.backup)).collect())
        }
    };
    let before = ends.iter().max_by_key(|w| w.to.lsn).map(|w| w.to.clone());
    let after = begins.iter().min_by_key(|w| w.from.lsn).map(|w| w.from.clone());
    let reason = if candidates.is_empty() {
        let line = match goal.timeline {
            TargetTimeline::Id(id) => format!("timeline {id}"),
            other => format!("the {other} timeline"),
        };
        format!("no backup lies on {line}{}", damage.told())
    } else if late.len() == attempts.len() {
        format!("no backup is old enough{}", damage.told())
    } else if let Some(lsn) = outside {
        format!("it is archived at {lsn}, where no backup leads{}", damage.told())
    } else {
        // The backup that came nearest says what is in the way.
        let lates: Vec<_> = late.iter().map(|c| &c.entry.head.id).collect();
        let told = attempts.iter().find(|a| !lates.contains(&&a.backup));
        told.map_or(String::new(), |a| format!("from backup {}, {}", a.backup, a.reason))
    };
    let reason = match elsewhere(catalog, goal, candidates) {
        Some(hint) => format!("{reason}\nhint: {hint}"),
        None => reason,
    };
    Unreachable { target: goal.to_string(), reason, before, after, attempts }
}

/// Another timeline that reaches the target, as far as positions and times can tell.
fn elsewhere(catalog: &Catalog, goal: &Goal, candidates_here: &[Candidate<'_>]) -> Option<String> {
    let here: Vec<_> = candidates_here.iter().map(|c| c.line.timeline).collect();
    let reaches = |w: &Window| match (&goal.target, goal.target.lsn()) {
        (&Target::Time(t), _) => {
            w.from.time.is_some_and(|from| from <= t) && w.to.time.is_some_and(|to| t <= to)
        }
        (_, Some(lsn)) => w.from.lsn <= lsn && lsn <= w.to.lsn,
        _ => false,
    };
    let others = catalog.timelines().into_iter().rev().filter(|t| !here.contains(t));
    let mut reached = others.filter(|t| {
        reachable_windows(catalog, TargetTimeline::Id(*t)).is_ok_and(|windows| windows.iter().any(reaches))
    });
    reached.next().map(|t| format!("timeline {t} reaches it: --target-timeline {t}"))
}

fn make(
    catalog: &Catalog,
    damage: &Damage<'_>,
    goal: &Goal,
    candidate: &Candidate<'_>,
    stop: Stop,
    (last_commit, lost): (Option<LastCommit>, Option<Lost>),
    rates: Rates,
) -> Plan {
    let head = &candidate.entry.head;
    let needed =
        |s: &&waltide_format::archive::Step<'_>| stop.kind == StopKind::End || s.start() < stop.read_to;
    let steps: Vec<_> = candidate.run.steps.iter().filter(needed).collect();
    let segments: Vec<_> = steps
        .iter()
        .map(|s| PlannedSegment {
            name: s.entry.info.name,
            path: s.entry.path.clone(),
            stored_bytes: s.entry.stored_bytes,
            partial: s.entry.is_partial(),
        })
        .collect();
    let mut notes = Vec::new();
    for object in damage.manifests() {
        notes.push(format!("a backup that cannot be read was not considered: {}", damage::told(object)));
    }
    let hole = candidate.hole(catalog, damage);
    let said_latest = !matches!(goal.target, Target::Latest) && stop.kind == StopKind::End;
    if said_latest {
        notes.push(format!(
            "nothing is archived past {}: the target is the end of the archived WAL (latest), {}",
            goal.target, stop.lsn
        ));
    }
    if stop.kind == StopKind::End
        && let Some(hole) = &hole
    {
        notes.push(format!(
            "the archived WAL is not whole, and this is the end of what can be replayed: {hole}"
        ));
    }
    if let Target::Name(name) = &goal.target {
        let named = |s: &&waltide_format::archive::Step<'_>| s.entry.restore_points.contains(name);
        let count = candidate.run.steps.iter().filter(named).count();
        if count > 1 {
            notes
                .push(format!("{count} segments have a restore point {name:?}; recovery stops at the first"));
        }
    }
    if let Target::Moment(moment) = &goal.target {
        notes.extend(moment.told());
    }
    if let (Target::Xid(xid), Some(top)) = (&goal.target, stop.xid)
        && top != *xid
    {
        notes.push(format!(
            "{xid} is a subtransaction and ended with transaction {top}: the target is that one's end"
        ));
    }
    if !head.damaged_pages.is_empty() {
        let count = head.damaged_pages.len();
        notes.push(format!("{count} pages had a wrong checksum when backup {} was made", head.id));
    }
    // Past a fork, the last segment of an ancestor goes on with what is not on this line.
    let cut = steps.last().filter(|s| s.usable_end < s.entry.info.valid_end).map(|s| s.usable_end);
    let settings = settings(catalog, goal, &candidate.line, &stop, cut);
    let wal_bytes = stop.lsn.bytes_since(head.start_lsn);
    let base_bytes = head.stats.cluster_bytes;
    let work = RestoreWork {
        base_bytes,
        files: candidate.entry.files,
        wal_bytes,
        segments: segments.len() as u64,
        records: steps.iter().fold(0, |sum, s| sum.saturating_add(s.entry.info.records)),
    };
    Plan {
        cluster: catalog.cluster.clone(),
        system_id: catalog.system.system_id,
        major: head.major,
        goal: goal.clone(),
        backup: head.id.clone(),
        backup_kind: head.kind,
        backup_stopped: head.stopped,
        start_lsn: head.start_lsn,
        consistent_lsn: head.stop_lsn,
        timeline: candidate.line.timeline,
        lineage: candidate.line.clone(),
        last_commit,
        lost,
        wal_bytes,
        wal_stored_bytes: segments.iter().fold(0, |sum, s| sum.saturating_add(s.stored_bytes)),
        segments,
        base_bytes,
        base_files: candidate.entry.files,
        tablespaces: head.tablespaces.clone(),
        settings,
        records: work.records,
        estimate: rates.estimate(&work),
        rates,
        notes,
        stop,
    }
}

/// The settings that make PostgreSQL stop where the plan says.
fn settings(
    catalog: &Catalog,
    goal: &Goal,
    line: &Lineage,
    stop: &Stop,
    cut: Option<Lsn>,
) -> Vec<(String, String)> {
    let mut settings: Vec<(String, String)> = Vec::new();
    let mut set = |name: &str, value: String| settings.push((name.to_owned(), value));
    let mut inclusive = goal.inclusive;
    match (&goal.target, stop.kind) {
        // PostgreSQL takes a target that it never meets for a failure.
        (_, StopKind::End) => {
            if let Some(fork) = cut {
                set("recovery_target_lsn", fork.to_string());
                inclusive = false;
            }
        }
        (Target::Latest, _) => {}
        (Target::Immediate, _) => set("recovery_target", "immediate".to_owned()),
        (Target::Time(time), _) => set("recovery_target_time", time.to_string()),
        // PostgreSQL knows a transaction by the number that its end is logged under.
        (Target::Xid(xid), _) => set("recovery_target_xid", stop.xid.unwrap_or(*xid).to_string()),
        (Target::Lsn(lsn), _) => set("recovery_target_lsn", lsn.to_string()),
        (Target::Moment(moment), _) => set("recovery_target_lsn", moment.lsn.to_string()),
        (Target::Name(name), _) => set("recovery_target_name", name.clone()),
    }
    set("recovery_target_inclusive", if inclusive { "on" } else { "off" }.to_owned());
    // PostgreSQL wants a history file of every timeline but the first.
    let known = line.timeline == TimelineId::FIRST || catalog.lineages.contains_key(&line.timeline);
    set("recovery_target_timeline", if known { line.timeline.to_string() } else { "current".to_owned() });
    set("recovery_target_action", goal.action.word().to_owned());
    settings
}

impl Plan {
    /// So many bytes of its WAL lie behind a position.
    pub fn left_from(&self, from: Lsn) -> u64 {
        self.wal_bytes.saturating_sub(from.bytes_since(self.start_lsn))
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stop = &self.stop;
        writeln!(f, "target    {}", self.goal)?;
        write!(f, "stops     ")?;
        match stop.kind {
            StopKind::Before => write!(f, "before {}", stop.lsn)?,
            StopKind::After => write!(f, "after the record that ends at {}", stop.lsn)?,
            StopKind::End => write!(f, "at the end of the archived WAL, {}", stop.lsn)?,
            StopKind::Consistent => write!(f, "once the backup is consistent, {}", stop.lsn)?,
        }
        if let Some(xid) = stop.xid {
            write!(f, ", the end of transaction {xid}")?;
        }
        if let Some(time) = stop.time {
            write!(f, " at {time}")?;
        }
        writeln!(f)?;
        if let Some(last) = &self.last_commit {
            writeln!(f, "contains  transaction {} of {} as the last", last.xid, last.time)?;
        }
        if let Some(Lost { transactions, first_time, last_time, .. }) = self.lost {
            write!(f, "leaves    {transactions} archived ")?;
            match transactions {
                1 => writeln!(f, "transaction behind, of {first_time}")?,
                _ => writeln!(f, "transactions behind, of {first_time} to {last_time}")?,
            }
        }
        writeln!(
            f,
            "base      backup {} of {}: {} in {} files",
            self.backup,
            self.backup_stopped,
            bytes(self.base_bytes),
            self.base_files
        )?;
        write!(
            f,
            "WAL       {} from {} on timeline {}",
            bytes(self.wal_bytes),
            self.start_lsn,
            self.timeline
        )?;
        if let (Some(first), Some(last)) = (self.segments.first(), self.segments.last()) {
            let (count, stored) = (self.segments.len(), bytes(self.wal_stored_bytes));
            write!(
                f,
                ", {count} segments {} to {} with {} records ({stored} stored)",
                first.name, last.name, self.records
            )?;
        }
        writeln!(f)?;
        for tablespace in &self.tablespaces {
            writeln!(f, "space     {} at {}", tablespace.oid, tablespace.path)?;
        }
        let e = &self.estimate;
        let basis = if e.measured { "as drills measured" } else { "not measured here yet" };
        writeln!(
            f,
            "takes     about {:.1} s: {:.1} s to restore, {:.1} s to recover ({basis})",
            e.total_seconds, e.restore_seconds, e.recovery_seconds
        )?;
        for note in &self.notes {
            writeln!(f, "note      {note}")?;
        }
        Ok(())
    }
}

#[allow(clippy::cast_precision_loss)]
fn bytes(n: u64) -> String {
    match n {
        0..1024 => format!("{n} B"),
        1024..1_048_576 => format!("{:.1} KiB", n as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", n as f64 / 1_048_576.0),
        _ => format!("{:.1} GiB", n as f64 / 1_073_741_824.0),
    }
}

#[cfg(test)]
mod tests;
