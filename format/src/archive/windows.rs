//! What can be restored to, which backups cannot be restored, and which hole is to blame.

use serde::Serialize;

use super::catalog::{BackupEntry, Catalog, Gap, GapKind, Lineage, Run};
use super::estimate::{Estimate, Rates, RestoreWork};
use crate::ids::{BackupId, Lsn, TimelineId, Xid};
use crate::segment::SegmentName;
use crate::time::TimestampTz;

/// A stretch of WAL along one timeline's line whose every moment can be restored to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RecoveryWindow {
    /// The timeline to recover along.
    pub timeline: TimelineId,
    /// The backups it can be reached from, oldest first.
    pub backups: Vec<BackupId>,
    /// The end of the first of them: no target lies before.
    pub from: Lsn,
    /// When that was.
    pub from_time: TimestampTz,
    /// The end of the last whole record before the first hole, or before the archive ends.
    pub to: Lsn,
    /// The last commit before that.
    pub to_time: Option<TimestampTz>,
    /// How many segments it takes, from the first backup's start on.
    pub segments: u64,
    /// The first commit behind `from`. A catalogue does not know it: it stands in the index of a segment.
    pub first_commit: Option<WindowCommit>,
    /// The last commit before `to`, likewise.
    pub last_commit: Option<WindowCommit>,
    /// The hole that ends it, where more WAL follows.
    pub ended_by: Option<Gap>,
    /// What a restore to its end takes, where that was asked for.
    pub restore: Option<WindowRestore>,
}

/// A restore to a window's end, from the newest backup that leads there.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WindowRestore {
    /// The backup.
    pub backup: BackupId,
    /// What there is to do.
    #[serde(flatten)]
    pub work: RestoreWork,
    /// How long it will take.
    pub estimate: Estimate,
}

/// A commit at an end of a window: a target that can be named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct WindowCommit {
    /// The transaction.
    pub xid: Xid,
    /// When it was committed.
    pub time: TimestampTz,
    /// End of its record.
    pub lsn: Lsn,
}

/// A moment that can be restored to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Moment {
    /// Its position.
    pub lsn: Lsn,
    /// Its time, as near as it is known.
    pub time: Option<TimestampTz>,
}

/// A window that a hole ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EndedWindow {
    /// The timeline it is along, which may be a descendant of the hole's.
    pub timeline: TimelineId,
    /// Where it begins.
    pub from: Lsn,
    /// Where it ends, because of the hole.
    pub to: Lsn,
}

/// A backup that cannot be restored: the WAL from its start to its end is not whole.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BrokenBackup {
    /// The backup.
    pub backup: BackupId,
    /// Its timeline.
    pub timeline: TimelineId,
    /// Up to where its WAL is there and whole.
    pub whole_until: Lsn,
    /// Up to where it would have to be.
    pub needed_until: Lsn,
    /// What is missing or broken there.
    pub reason: String,
}

/// A hole, and the backups that cannot recover past it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Hole {
    /// The hole.
    #[serde(flatten)]
    pub gap: Gap,
    /// The backups whose recovery ends there, oldest first.
    pub harms: Vec<BackupId>,
    /// The windows that it ends.
    pub ends: Vec<EndedWindow>,
    /// The last moment before it, on its timeline, that can be restored to.
    pub before: Option<Moment>,
    /// The first moment after it, on its timeline, that can be restored to.
    pub after: Option<Moment>,
    /// Whether retention made it on purpose: it lies between the end of a backup that is kept alone and the start
    /// of the first that is not, where nothing is to be recovered.
    pub by_retention: bool,
}

/// A run along a line, and what is missing behind it.
#[derive(Debug, Clone, PartialEq)]
pub struct Stretch<'a> {
    /// The segments.
    pub run: Run<'a>,
    /// The hole between its end and the next stretch; `None` where the line ends.
    pub hole: Option<Gap>,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Coverage {
    /// By timeline, then position.
    pub windows: Vec<RecoveryWindow>,
    /// Oldest first.
    pub broken_backups: Vec<BrokenBackup>,
    /// By timeline, then position.
    pub holes: Vec<Hole>,
}

impl Coverage {
    /// Whether nothing is missing.
    pub fn is_whole(&self) -> bool {
        self.broken_backups.is_empty() && self.holes.iter().all(|h| h.by_retention)
    }
}

impl BackupEntry {
    /// Whether recovery from it can follow `line`: one that was still being made when the line left its timeline
    /// ends elsewhere.
    pub fn is_on(&self, line: &Lineage) -> bool {
        let head = &self.head;
        line.holds(head.timeline, head.start_lsn) && line.holds(head.timeline, head.stop_lsn)
    }

    /// Whether the operator pinned it without the WAL that follows it.
    pub fn is_standalone(&self) -> bool {
        self.keep.as_ref().is_some_and(|k| k.standalone)
    }
}

impl Catalog {
    /// The lines of all timelines, oldest first.
    pub fn lines(&self) -> Vec<Lineage> {
        self.timelines().into_iter().map(|t| self.lineage(t)).collect()
    }

    /// Everything there is along a line, from its first segment to its last.
    pub fn stretches(&self, line: &Lineage) -> Vec<Stretch<'_>> {
        let mut stretches = Vec::new();
        let mut from = Lsn::ZERO;
        loop {
            let run = self.run(line, from);
            let hole = run.broken.clone().or_else(|| self.next_along(line, &run, from));
            let next = hole.as_ref().map(|gap| gap.to).filter(|next| *next > from);
            if !run.steps.is_empty() {
                stretches.push(Stretch { run, hole });
            }
            match next {
                Some(next) => from = next,
                None => return stretches,
            }
        }
    }

    /// What can be restored to, and what stands in the way of more.
    pub fn coverage(&self) -> Coverage {
        let mut found = Coverage::default();
        let mut gaps = self.gaps();
        for line in self.lines() {
            self.line_windows(&line, &mut found, &mut gaps);
        }
        for window in &found.windows {
            gaps.extend(window.ended_by.clone());
        }
        // A run that ends inside a record names the same hole with an earlier start than the list by name.
        gaps.sort_by_key(|g| (g.timeline, g.to, g.from));
        gaps.dedup_by(|b, a| a.timeline == b.timeline && a.to == b.to);
        found.holes = gaps.into_iter().map(|gap| self.judge(gap, &found.windows)).collect();
        found.broken_backups.sort_by(|a, b| a.backup.cmp(&b.backup));
        found
    }

    /// The windows along one line. A backup whose start lies in the run of an older one shares its run.
    fn line_windows(&self, line: &Lineage, found: &mut Coverage, gaps: &mut Vec<Gap>) {
        let on_line = |b: &&BackupEntry| b.is_on(line);
        let mut backups: Vec<_> = self.backups.iter().filter(on_line).collect();
        backups.sort_by_key(|b| (b.head.start_lsn, b.head.stop_lsn));
        let mut rest = backups.as_slice();
        while let Some((first, others)) = rest.split_first() {
            let run = self.run(line, first.head.start_lsn);
            let end = run.end().unwrap_or(first.head.start_lsn);
            let shared = others.iter().take_while(|b| b.head.start_lsn < end).count();
            let (sharing, after) = others.split_at_checked(shared).unwrap_or((&[], others));
            rest = after;
            let hole = run.broken.clone().or_else(|| self.next_along(line, &run, first.head.start_lsn));
            let all = std::iter::once(first).chain(sharing);
            let (whole, cut): (Vec<&BackupEntry>, Vec<&BackupEntry>) =
                all.copied().partition(|b| b.head.stop_lsn <= end);
            for backup in cut.iter().filter(|b| b.head.timeline == line.timeline) {
                let missing = SegmentName::containing(line.timeline, end, self.system.segment_size);
                let reason = match &hole {
                    Some(gap) => gap.to_string(),
                    None => format!("{missing} is not there, or ends early"),
                };
                found.broken_backups.push(BrokenBackup {
                    backup: backup.head.id.clone(),
                    timeline: backup.head.timeline,
                    whole_until: end,
                    needed_until: backup.head.stop_lsn,
                    reason,
                });
            }
            let Some(oldest) = whole.iter().min_by_key(|b| b.head.stop_lsn) else {
                gaps.extend(hole);
                continue;
            };
            found.windows.push(RecoveryWindow {
                timeline: line.timeline,
                from: oldest.head.stop_lsn,
                from_time: oldest.head.stopped,
                to: end,
                to_time: run.range().and_then(|r| r.last_commit_time),
                first_commit: None,
                last_commit: None,
                segments: run.steps.len() as u64,
                ended_by: hole,
                restore: None,
                backups: whole.iter().map(|b| b.head.id.clone()).collect(),
            });
        }
    }

    /// What a restore to a window's end takes.
    pub fn restore_to_end(&self, window: &RecoveryWindow, rates: &Rates) -> Option<WindowRestore> {
        let of_window = self.backups.iter().filter(|b| window.backups.contains(&b.head.id));
        let newest = of_window.max_by_key(|b| b.head.stop_lsn)?;
        let run = self.run(&self.lineage(window.timeline), newest.head.start_lsn);
        let work = RestoreWork {
            base_bytes: newest.head.stats.cluster_bytes,
            files: newest.files,
            wal_bytes: window.to.bytes_since(newest.head.start_lsn),
            segments: run.steps.len() as u64,
            records: run.steps.iter().fold(0, |sum, s| sum.saturating_add(s.entry.info.records)),
        };
        Some(WindowRestore { backup: newest.head.id.clone(), work, estimate: rates.estimate(&work) })
    }

    /// The hole behind a run that ends by name, where the line goes on later.
    fn next_along(&self, line: &Lineage, run: &Run<'_>, from: Lsn) -> Option<Gap> {
        let size = self.system.segment_size;
        let at = match run.steps.last() {
            Some(step) => step.entry.info.name.end(size)?,
            None => size.floor(from),
        };
        let held = |name: SegmentName| {
            let begin = line.newest_first().find(|(t, _, _)| *t == name.timeline());
            begin.is_some_and(|(_, begin, end)| {
                let start = name.start(size).unwrap_or_default();
                size.floor(begin) <= start && start >= at && end.is_none_or(|end| start < end)
            })
        };
        let later = self.segments.iter().map(|s| s.info.name).filter(|n| held(*n));
        let next = later.filter_map(|n| n.start(size)).min()?;
        let newest = |lsn: Lsn| {
            let holder = line.newest_first().find(|(_, begin, _)| size.floor(*begin) <= lsn);
            SegmentName::containing(holder.map_or(line.timeline, |(t, _, _)| t), lsn, size)
        };
        let (first, last) = (newest(at), newest(next.saturating_sub(1)));
        // A hole over a fork is one of this line alone: the ancestor went on elsewhere.
        let timeline = if first.timeline() == last.timeline() { first.timeline() } else { line.timeline };
        let count = next.bytes_since(at).checked_div(size.bytes()).unwrap_or(0);
        let kind = GapKind::Missing { first, last, count };
        Some(Gap { timeline, from: run.end().unwrap_or(at), to: next, kind })
    }

    /// Whom a hole harms.
    fn judge(&self, gap: Gap, windows: &[RecoveryWindow]) -> Hole {
        let line = self.lineage(gap.timeline);
        let passes = |b: &&BackupEntry| b.is_on(&line) && gap.to > b.head.start_lsn;
        let passing: Vec<_> = self.backups.iter().filter(passes).collect();
        let harmed = |b: &&&BackupEntry| !(b.is_standalone() && gap.from >= b.head.stop_lsn);
        let harms: Vec<_> = passing.iter().filter(harmed).map(|b| b.head.id.clone()).collect();
        // Retention leaves a hole only behind a backup that is kept alone.
        let by_retention = harms.is_empty() && passing.iter().any(|b| b.is_standalone());
        let is_this = |g: &Gap| (g.timeline, g.to) == (gap.timeline, gap.to);
        let ended = windows.iter().filter(|w| w.ended_by.as_ref().is_some_and(is_this));
        let ends = ended.map(|w| EndedWindow { timeline: w.timeline, from: w.from, to: w.to }).collect();
        let here = || windows.iter().filter(|w| w.timeline == gap.timeline);
        let before = here().filter(|w| w.to <= gap.to).max_by_key(|w| w.to);
        let after = here().filter(|w| w.from >= gap.from).min_by_key(|w| w.from);
        let before = before.map(|w| Moment { lsn: w.to, time: Some(w.to_time.unwrap_or(w.from_time)) });
        let after = after.map(|w| Moment { lsn: w.from, time: Some(w.from_time) });
        Hole { gap, harms, ends, before, after, by_retention }
    }
}

impl std::fmt::Display for Gap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.kind {
            GapKind::Missing { first, count: 1, .. } => write!(f, "{first} is missing"),
            GapKind::Missing { first, last, count } => {
                write!(f, "{count} segments are missing, {first} to {last}")
            }
            GapKind::Broken { reason } => write!(f, "the WAL breaks at {}: {reason}", self.from),
            GapKind::Admitted { fault } => {
                write!(f, "the WAL at {} was admitted with a fault: {fault}", self.from)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::catalog::samples::*;
    use super::super::{Keep, Lineage};
    use super::*;

    #[test]
    fn a_window_runs_from_the_first_backups_end_to_the_end_of_the_wal() {
        let mut c = catalog((3..9).map(|n| segment(1, n)).collect());
        c.backups = vec![backup(1, 4 * SIZE + 40, 4 * SIZE + 900), backup(1, 6 * SIZE + 40, 7 * SIZE + 900)];
        let found = c.coverage();
        assert!(found.is_whole());
        let [window] = found.windows.as_slice() else { panic!("{found:?}") };
        assert_eq!((window.from, window.to), (Lsn::from(4 * SIZE + 900), Lsn::from(9 * SIZE)));
        assert_eq!((window.backups.len(), window.segments), (2, 5));
    }

    #[test]
    fn a_hole_names_the_backups_it_harms_and_splits_the_window() {
        let mut c = catalog([3, 4, 5, 7, 8].into_iter().map(|n| segment(1, n)).collect());
        c.backups = vec![backup(1, 4 * SIZE + 40, 4 * SIZE + 900), backup(1, 7 * SIZE + 40, 7 * SIZE + 900)];
        let found = c.coverage();
        let ends: Vec<_> = found.windows.iter().map(|w| (w.from, w.to)).collect();
        let lsn = |n: u64| Lsn::from(n);
        assert_eq!(ends, [(lsn(4 * SIZE + 900), lsn(6 * SIZE)), (lsn(7 * SIZE + 900), lsn(9 * SIZE))]);
        let [hole] = found.holes.as_slice() else { panic!("{found:?}") };
        assert_eq!(hole.gap.to_string(), "000000010000000000000006 is missing");
        assert_eq!((hole.harms.as_slice(), hole.by_retention), (&[c.backups[0].head.id.clone()][..], false));
        let [ended] = hole.ends.as_slice() else { panic!("{hole:?}") };
        assert_eq!((ended.from, ended.to), (lsn(4 * SIZE + 900), lsn(6 * SIZE)));
        let sides = (hole.before.map(|m| m.lsn), hole.after.map(|m| m.lsn));
        assert_eq!(sides, (Some(lsn(6 * SIZE)), Some(lsn(7 * SIZE + 900))));
        assert!(!found.is_whole());
    }

    #[test]
    fn a_backup_whose_own_wal_is_missing_is_broken() {
        let mut c = catalog([3, 4, 6].into_iter().map(|n| segment(1, n)).collect());
        c.backups = vec![backup(1, 4 * SIZE + 40, 5 * SIZE + 900)];
        let found = c.coverage();
        assert_eq!(found.windows, []);
        let [broken] = found.broken_backups.as_slice() else { panic!("{found:?}") };
        assert_eq!(broken.reason, "000000010000000000000005 is missing");
        assert_eq!((broken.whole_until, broken.needed_until), ((5 * SIZE).into(), (5 * SIZE + 900).into()));
        c.segments.clear();
        assert_eq!(c.coverage().broken_backups.len(), 1, "no WAL at all");
        assert_eq!(
            c.coverage().broken_backups[0].reason,
            "000000010000000000000004 is not there, or ends early"
        );
    }

    #[test]
    fn a_hole_behind_a_backup_that_is_kept_alone_harms_nobody() {
        let mut c = catalog([3, 4, 7, 8].into_iter().map(|n| segment(1, n)).collect());
        c.backups = vec![backup(1, 4 * SIZE + 40, 4 * SIZE + 900), backup(1, 7 * SIZE + 40, 7 * SIZE + 900)];
        c.backups[0].keep = Some(Keep { standalone: true, ..Keep::default() });
        let found = c.coverage();
        assert!(found.is_whole() && found.holes[0].by_retention, "{found:?}");
        c.segments.retain(|s| s.info.name.start(s.info.size) != Some(Lsn::from(4 * SIZE)));
        assert!(!c.coverage().is_whole(), "its own WAL is still needed");
    }

    #[test]
    fn a_successor_whose_first_segment_is_missing_ends_where_it_begins() {
        let fork = Lsn::from(5 * SIZE + 1000);
        let mut segments: Vec<_> = (3..7).map(|n| segment(1, n)).collect();
        segments.extend((6..8).map(|n| segment(2, n)));
        let mut c = catalog(segments);
        c.lineages.insert(t(2), Lineage { ancestors: vec![(t(1), fork)], timeline: t(2) });
        c.backups = vec![backup(1, 4 * SIZE + 40, 4 * SIZE + 900)];
        let found = c.coverage();
        let ends: Vec<_> = found.windows.iter().map(|w| (w.timeline.get(), w.to)).collect();
        assert_eq!(ends, [(1, Lsn::from(7 * SIZE)), (2, fork)]);
        let [hole] = found.holes.as_slice() else { panic!("{found:?}") };
        assert_eq!(hole.gap.to_string(), "000000020000000000000005 is missing");
        assert_eq!(hole.harms.len(), 1);
    }

    #[test]
    fn a_line_is_walked_over_its_holes() {
        let fork = Lsn::from(7 * SIZE + 1000);
        let mut segments: Vec<_> = [3, 4, 6, 7].into_iter().map(|n| segment(1, n)).collect();
        segments.extend((7..9).map(|n| segment(2, n)));
        segments[3].info.first_prev = Some(Lsn::from(7));
        let mut c = catalog(segments);
        c.lineages.insert(t(2), Lineage { ancestors: vec![(t(1), fork)], timeline: t(2) });
        let told = |timeline| {
            let found = c.stretches(&c.lineage(t(timeline)));
            let hole = |s: &Stretch<'_>| s.hole.as_ref().map(ToString::to_string).unwrap_or_default();
            found.iter().map(|s| (s.run.steps.len(), hole(s))).collect::<Vec<_>>()
        };
        let missing = "000000010000000000000005 is missing".to_owned();
        assert_eq!(told(2), [(2, missing.clone()), (3, String::new())]);
        let [first, second, third] = &told(1)[..] else { panic!("{:?}", told(1)) };
        assert_eq!((first, second.0, third), (&(2, missing), 1, &(1, String::new())));
        assert!(second.1.starts_with("the WAL breaks at 0/7000000: "), "{}", second.1);
        c.segments.clear();
        assert_eq!(c.stretches(&c.lineage(t(1))), []);
    }
}
