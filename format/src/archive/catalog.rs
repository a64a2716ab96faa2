//! What an archive holds for one cluster, as a value: a listing in, backups and unbroken runs of WAL out.

use std::collections::BTreeMap;

use serde::Serialize;

use super::index::{AdmittedFault, SegmentInfo};
use super::joins::join_fault;
use super::manifest::{Manifest, StartedBackup, SystemInfo};
use super::source::PushSource;
use crate::ids::{BackupId, Lsn, TimelineId};
use crate::segment::SegmentName;
use crate::time::TimestampTz;

/// One cluster's part of an archive, under its newest system identifier.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Catalog {
    /// The cluster's name.
    pub cluster: String,
    /// The system the rest belongs to.
    pub system: SystemInfo,
    /// Complete backups, oldest first.
    pub backups: Vec<BackupEntry>,
    /// Backups being made, or left behind by one that died.
    pub started: Vec<StartedBackup>,
    /// Every copy of every segment, by timeline and position.
    pub segments: Vec<SegmentEntry>,
    /// What the history files say, by the timeline each is for.
    pub lineages: BTreeMap<TimelineId, Lineage>,
    /// How each of those timelines began.
    pub beginnings: BTreeMap<TimelineId, Beginning>,
    /// Objects that are there and cannot be read.
    pub damaged: Vec<DamagedObject>,
}

/// A complete backup.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BackupEntry {
    /// Its manifest, files and directories left out.
    pub head: Manifest,
    /// How many files it has.
    pub files: u64,
    /// Whether the operator pinned it, and why.
    pub keep: Option<Keep>,
}

/// `<id>.keep`: a pin against retention.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, serde::Deserialize)]
pub struct Keep {
    /// When it was pinned.
    pub since: TimestampTz,
    /// The operator's words.
    pub reason: Option<String>,
    /// Whether it is kept as it is, restorable to its own end only: the WAL behind that may go.
    #[serde(default)]
    pub standalone: bool,
}

/// A stored copy of a segment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct SegmentEntry {
    /// Its object.
    pub path: String,
    /// The object's length.
    pub stored_bytes: u64,
    /// What its index says first.
    pub info: SegmentInfo,
    /// Named restore points in it.
    pub restore_points: Vec<String>,
    /// Faults it was admitted with.
    pub faults: Vec<AdmittedFault>,
    /// SHA-256 over its WAL, in hexadecimal.
    pub digest: String,
    /// Who pushed it, where that was noted.
    pub pushed_by: Option<PushSource>,
}

/// An object that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DamagedObject {
    /// Its name.
    pub path: String,
    /// What is wrong.
    pub error: String,
}

/// A timeline and its ancestors, oldest first; what a history file says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct Lineage {
    /// The ancestors with the position each was left at, then the timeline itself.
    pub ancestors: Vec<(TimelineId, Lsn)>,
    /// The timeline.
    pub timeline: TimelineId,
}

impl Lineage {
    /// A timeline without ancestors.
    pub const fn root(timeline: TimelineId) -> Self {
        Self { ancestors: Vec::new(), timeline }
    }

    /// Where the timeline starts: where its last ancestor was left.
    pub fn begin(&self) -> Lsn {
        self.ancestors.last().map_or(Lsn::ZERO, |(_, end)| *end)
    }

    /// The timelines from the newest to the oldest, each with where it begins and, but for the newest, ends. What an ancestor
    /// wrote behind a place where a later one was left is not on the line; one that was left before it began holds nothing.
    pub fn newest_first(&self) -> impl Iterator<Item = (TimelineId, Lsn, Option<Lsn>)> + '_ {
        let begins = self.ancestors.iter().rev().map(|(_, end)| *end).chain([Lsn::ZERO]);
        let timelines = self.ancestors.iter().rev().map(|(t, _)| *t);
        let mut end = None;
        std::iter::once(self.timeline).chain(timelines).zip(begins).map(move |(timeline, begin)| {
            let begin = end.map_or(begin, |end| begin.min(end));
            let range = (timeline, begin, end);
            end = Some(begin);
            range
        })
    }

    /// The timeline that holds `lsn`: a record that starts where an ancestor was left is the successor's.
    pub fn timeline_at(&self, lsn: Lsn) -> TimelineId {
        self.newest_first().find(|(_, begin, _)| *begin <= lsn).map_or(self.timeline, |(t, ..)| t)
    }

    /// Whether a position on `timeline` lies on this line.
    pub fn holds(&self, timeline: TimelineId, lsn: Lsn) -> bool {
        self.newest_first()
            .any(|(t, begin, end)| t == timeline && begin <= lsn && end.is_none_or(|end| lsn <= end))
    }
}

/// How a timeline began, beside where: its history file's last line, and who brought that file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct Beginning {
    /// Why it left its ancestor, in the words of the server that did it.
    pub reason: Option<String>,
    /// Who pushed the history file, where that was noted.
    pub pushed_by: Option<PushSource>,
}

/// Segments that follow one another without a hole along a line of timelines.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WalRange {
    /// The first segment's position, or where its first whole record starts if nothing precedes it.
    pub start: Lsn,
    /// Where the last valid record ends.
    pub end: Lsn,
    /// The first segment.
    pub first: SegmentName,
    /// The last segment.
    pub last: SegmentName,
    /// How many.
    pub segments: u64,
    /// Bytes they take in the archive.
    pub stored_bytes: u64,
    /// The first commit or abort in it.
    pub first_time: Option<TimestampTz>,
    /// The last commit in it.
    pub last_commit_time: Option<TimestampTz>,
}

/// A hole in a line of WAL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gap {
    /// The timeline it is on.
    pub timeline: TimelineId,
    /// Where the WAL before it ends.
    pub from: Lsn,
    /// Where the WAL after it starts.
    pub to: Lsn,
    /// Why it is one.
    pub kind: GapKind,
}

/// Why there is a hole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum GapKind {
    /// Segments are not there.
    Missing {
        /// The first of them.
        first: SegmentName,
        /// The last of them.
        last: SegmentName,
        /// How many.
        count: u64,
    },
    /// Both neighbours are there and do not continue one another.
    Broken {
        /// What does not fit.
        reason: String,
    },
    /// A segment was admitted with a fault on purpose.
    Admitted {
        /// The fault.
        fault: String,
    },
}

impl Catalog {
    /// The line of `timeline`: its history file's, or its own alone.
    pub fn lineage(&self, timeline: TimelineId) -> Lineage {
        self.lineages.get(&timeline).cloned().unwrap_or(Lineage::root(timeline))
    }

    /// Every timeline that has a segment, a history file or a backup, oldest first.
    pub fn timelines(&self) -> Vec<TimelineId> {
        let segments = self.segments.iter().map(|s| s.info.name.timeline());
        let backups = self.backups.iter().map(|b| b.head.timeline);
        let mut all: Vec<_> = segments.chain(self.lineages.keys().copied()).chain(backups).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// The timeline that `recovery_target_timeline = 'latest'` means for a backup made on `from`: the
    /// highest whose line holds that backup.
    pub fn latest_timeline(&self, from: TimelineId, at: Lsn) -> TimelineId {
        let reaches = |t: &TimelineId| self.lineage(*t).holds(from, at);
        self.lineages.keys().copied().filter(reaches).max().map_or(from, |t| t.max(from))
    }

    /// A backup by name.
    pub fn backup(&self, id: &BackupId) -> Option<&BackupEntry> {
        self.backups.iter().find(|b| b.head.id == *id)
    }

    /// The copy readers take of a segment: the one whose valid records reach furthest, the plain one among equals, a
    /// `.partial` last.
    pub fn best_copy(&self, name: SegmentName) -> Option<&SegmentEntry> {
        let from = self.segments.partition_point(|s| s.info.name < name);
        let copies = self.segments.iter().skip(from).take_while(|s| s.info.name == name);
        copies.max_by_key(|s| (s.info.valid_end, !s.is_partial(), std::cmp::Reverse(&s.path)))
    }

    /// The segments along `line` from the one that holds `from`, as PostgreSQL would ask for them: of every
    /// position the newest timeline's that is there. Ends at the first hole by name.
    pub fn walk<'a>(&'a self, line: &Lineage, from: Lsn) -> Vec<Step<'a>> {
        let size = self.system.segment_size;
        let mut steps: Vec<Step<'a>> = Vec::new();
        let mut at = size.floor(from);
        let timelines: Vec<_> = line.newest_first().collect();
        loop {
            let candidates = timelines.iter().filter(|(_, begin, _)| size.floor(*begin) <= at);
            let found = candidates.filter_map(|(timeline, _, end)| {
                let entry = self.best_copy(SegmentName::containing(*timeline, at, size))?;
                // What an ancestor wrote past the fork is not on this line.
                let usable = end.map_or(entry.info.valid_end, |end| entry.info.valid_end.min(end));
                (usable > at || end.is_none()).then_some(Step { entry, usable_end: usable })
            });
            let mut found = found;
            let Some(step) = found.next() else { break };
            steps.push(step);
            match at.checked_add(size.bytes()) {
                Some(next) => at = next,
                None => break,
            }
        }
        steps
    }

    /// The unbroken run of WAL along `line` from `from` on, and what ends it if more follows in the archive.
    pub fn run(&self, line: &Lineage, from: Lsn) -> Run<'_> {
        let mut steps = self.walk(line, from);
        let mut broken = None;
        let mut last_record = None;
        let mut keep = 0usize;
        let mut previous: Option<&Step<'_>> = None;
        for step in &steps {
            if let Some(before) = previous
                && let Some(kind) = join_fault(before, step, last_record)
            {
                let timeline = step.entry.info.name.timeline();
                broken = Some(Gap { timeline, from: before.usable_end, to: step.start(), kind });
                break;
            }
            last_record = step.entry.info.last_record.or(last_record);
            keep = keep.saturating_add(1);
            previous = Some(step);
        }
        steps.truncate(keep);
        Run { steps, broken }
    }

    /// Every hole on every timeline, by name and by content, between the first and the last segment there.
    pub fn gaps(&self) -> Vec<Gap> {
        let mut gaps = Vec::new();
        for timeline in self.timelines() {
            self.timeline_gaps(timeline, &mut gaps);
        }
        gaps
    }

    fn timeline_gaps(&self, timeline: TimelineId, gaps: &mut Vec<Gap>) {
        let mut previous: Option<Step<'_>> = None;
        let mut last_record = None;
        for entry in self.best_copies(timeline) {
            let step = Step { entry, usable_end: entry.info.valid_end };
            if let Some(before) = &previous {
                let kind =
                    self.missing_between(before, &step).or_else(|| join_fault(before, &step, last_record));
                if matches!(kind, Some(GapKind::Missing { .. })) {
                    last_record = None;
                }
                if let Some(kind) = kind {
                    gaps.push(Gap { timeline, from: before.usable_end, to: step.start(), kind });
                }
            }
            if let Some(fault) = entry.faults.first() {
                let kind = GapKind::Admitted { fault: fault.message.clone() };
                let to = entry.info.name.end(entry.info.size).unwrap_or(fault.at);
                gaps.push(Gap { timeline, from: fault.at, to, kind });
            }
            last_record = entry.info.last_record.or(last_record);
            previous = Some(step);
        }
    }

    /// The copy readers take of each segment of a timeline, in order.
    pub fn best_copies(&self, timeline: TimelineId) -> impl Iterator<Item = &SegmentEntry> {
        let mut names: Vec<_> =
            self.segments.iter().map(|s| s.info.name).filter(|n| n.timeline() == timeline).collect();
        names.dedup();
        names.into_iter().filter_map(|name| self.best_copy(name))
    }

    fn missing_between(&self, before: &Step<'_>, after: &Step<'_>) -> Option<GapKind> {
        let size = self.system.segment_size;
        let first = before.entry.info.name.next(size)?;
        if first == after.entry.info.name {
            return None;
        }
        let last = after.entry.info.name.previous(size)?;
        let bytes = last.end(size)?.bytes_since(first.start(size)?);
        Some(GapKind::Missing { first, last, count: bytes.checked_div(size.bytes()).unwrap_or(0) })
    }
}

/// A segment on a line, and how far it may be used there.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step<'a> {
    /// The copy.
    pub entry: &'a SegmentEntry,
    /// Where its valid records end, or the fork if that comes first.
    pub usable_end: Lsn,
}

impl Step<'_> {
    /// Where the segment starts.
    pub fn start(&self) -> Lsn {
        self.entry.info.name.start(self.entry.info.size).unwrap_or_default()
    }
}

/// Segments that follow one another, and the fault that ends them if it is one.
#[derive(Debug, Clone, PartialEq)]
pub struct Run<'a> {
    /// The segments.
    pub steps: Vec<Step<'a>>,
    /// Why the next one, which is there, does not continue them.
    pub broken: Option<Gap>,
}

impl Run<'_> {
    /// Where the run's last whole record ends: one that is cut by the run's end does not count.
    pub fn end(&self) -> Option<Lsn> {
        let last = self.steps.last()?;
        let pending = last.entry.info.pending.map(|p| p.start).filter(|start| *start < last.usable_end);
        if let Some(start) = pending {
            return Some(start);
        }
        // A record that began segments earlier and still is not whole ends the run where it began.
        let size = last.entry.info.size.bytes();
        let through =
            last.entry.info.first_record.is_none() && u64::from(last.entry.info.continued_bytes) >= size;
        if !through {
            return Some(last.usable_end);
        }
        self.steps.iter().rev().find_map(|s| s.entry.info.pending.map(|p| p.start))
    }

    /// The run as a range.
    pub fn range(&self) -> Option<WalRange> {
        let (first, last) = (self.steps.first()?, self.steps.last()?);
        let infos = || self.steps.iter().map(|s| &s.entry.info);
        Some(WalRange {
            start: first.start(),
            end: self.end()?,
            first: first.entry.info.name,
            last: last.entry.info.name,
            segments: self.steps.len() as u64,
            stored_bytes: self.steps.iter().fold(0, |sum, s| sum.saturating_add(s.entry.stored_bytes)),
            first_time: infos().find_map(|i| i.first_time),
            last_commit_time: self.steps.iter().rev().find_map(Step::last_commit),
        })
    }
}

impl SegmentEntry {
    /// Whether it is a copy of a `.partial` file.
    pub fn is_partial(&self) -> bool {
        self.path.rsplit('/').next().is_some_and(|file| file.contains(".partial"))
    }
}

/// Catalogues for the tests of this crate.
#[cfg(test)]
pub(crate) mod samples {
    use super::super::stored_segment::samples;
    use super::super::{BackupKind, BackupMethod, ManifestStats};
    use super::*;
    use crate::ids::SystemId;
    use crate::segment::SegmentSize;
    use crate::{PgMajor, TimelineId};

    pub(crate) const SIZE: u64 = 16 << 20;

    pub(crate) fn t(n: u32) -> TimelineId {
        TimelineId::new(n).unwrap()
    }

    /// A segment whose neighbours join: one record starts 100 bytes in and one ends it.
    pub(crate) fn segment(timeline: u32, number: u64) -> SegmentEntry {
        let start = number * SIZE;
        let name = SegmentName::containing(t(timeline), Lsn::from(start), SegmentSize::DEFAULT);
        let mut info = samples::info(SIZE);
        info.name = name;
        info.continued_bytes = 0;
        info.pending = None;
        info.first_record = Some(Lsn::from(start + 40));
        info.first_prev = Some(Lsn::from(start - 100));
        info.last_record = Some(Lsn::from(start + SIZE - 100));
        info.valid_end = Lsn::from(start + SIZE);
        SegmentEntry {
            path: format!("main/42/wal/{:08X}/{name}", timeline),
            stored_bytes: 10,
            info,
            restore_points: Vec::new(),
            faults: Vec::new(),
            digest: String::new(),
            pushed_by: None,
        }
    }

    pub(crate) fn catalog(segments: Vec<SegmentEntry>) -> Catalog {
        let system = SystemInfo {
            system_id: SystemId::from(42),
            major: PgMajor::V15,
            block_bytes: 8192,
            segment_size: SegmentSize::DEFAULT,
            created: TimestampTz::default(),
        };
        let mut segments = segments;
        segments.sort_by(|a, b| (a.info.name, &a.path).cmp(&(b.info.name, &b.path)));
        Catalog {
            cluster: "main".into(),
            system,
            backups: Vec::new(),
            started: Vec::new(),
            segments,
            lineages: BTreeMap::new(),
            beginnings: BTreeMap::new(),
            damaged: Vec::new(),
        }
    }

    /// Segments of timeline 1 that follow one another, each with a digest of its own.
    pub(crate) fn digested(numbers: impl IntoIterator<Item = u64>) -> Catalog {
        let mut c = catalog(numbers.into_iter().map(|n| segment(1, n)).collect());
        for (n, entry) in c.segments.iter_mut().enumerate() {
            entry.digest = format!("{n:064x}");
        }
        c
    }

    /// A full backup; its name and its times come from where it starts.
    pub(crate) fn backup(timeline: u32, start: u64, stop: u64) -> BackupEntry {
        let at = |lsn: u64| TimestampTz::from_postgres_micros(i64::try_from(lsn).unwrap());
        let head = Manifest {
            id: BackupId::new(at(start), u16::try_from(start % SIZE / 1024).unwrap()),
            kind: BackupKind::Full,
            method: BackupMethod::Backup,
            parent: None,
            full_because: None,
            description: None,
            started: at(start),
            stopped: at(stop),
            system_id: SystemId::from(42),
            major: PgMajor::V15,
            server_version: "15.18".into(),
            segment_size: SegmentSize::DEFAULT,
            data_checksums: true,
            timeline: t(timeline),
            start_lsn: Lsn::from(start),
            stop_lsn: Lsn::from(stop),
            checkpoint_lsn: Lsn::from(start),
            backup_label: String::new(),
            tablespace_map: String::new(),
            from_standby: false,
            tablespaces: Vec::new(),
            config_files: Vec::new(),
            maps: Vec::new(),
            directories: Vec::new(),
            files: Vec::new(),
            damaged_pages: Vec::new(),
            chain: None,
            stats: ManifestStats::default(),
        };
        BackupEntry { head, files: 0, keep: None }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Ending;
    use super::samples::*;
    use super::*;

    #[test]
    fn a_timeline_that_was_left_before_it_began_holds_nothing() {
        let [one, two, three] = [1, 2, 3].map(|n| TimelineId::new(n).unwrap());
        let line = Lineage { ancestors: vec![(one, Lsn::from(9)), (two, Lsn::from(4))], timeline: three };
        assert_eq!(
            [0, 3, 4, 8, 9, 10].map(|lsn| line.timeline_at(Lsn::from(lsn))),
            [one, one, three, three, three, three]
        );
        let ranges: Vec<_> =
            line.newest_first().map(|(t, begin, end)| (t, begin.get(), end.map(Lsn::get))).collect();
        assert_eq!(ranges, [(three, 4, None), (two, 4, Some(4)), (one, 0, Some(4))]);
        let line = Lineage { ancestors: vec![(one, Lsn::from(4)), (two, Lsn::from(9))], timeline: three };
        assert_eq!([3, 4, 8, 9].map(|lsn| line.timeline_at(Lsn::from(lsn))), [one, two, two, three]);
    }

    #[test]
    fn segments_that_follow_one_another_are_one_run() {
        let c = catalog((3..9).map(|n| segment(1, n)).collect());
        assert_eq!(c.gaps(), []);
        let run = c.run(&Lineage::root(t(1)), Lsn::from(4 * SIZE + 77));
        assert_eq!(run.end(), Some(Lsn::from(9 * SIZE)));
        assert_eq!((run.steps.len(), run.broken), (5, None));
    }

    #[test]
    fn a_missing_segment_is_a_gap_by_name() {
        let c = catalog([3, 4, 7].into_iter().map(|n| segment(1, n)).collect());
        let gaps = c.gaps();
        let kind = GapKind::Missing {
            first: "000000010000000000000005".parse().unwrap(),
            last: "000000010000000000000006".parse().unwrap(),
            count: 2,
        };
        assert_eq!(gaps, [Gap { timeline: t(1), from: Lsn::from(5 * SIZE), to: Lsn::from(7 * SIZE), kind }]);
        assert_eq!(c.run(&Lineage::root(t(1)), Lsn::from(3 * SIZE)).end(), Some(Lsn::from(5 * SIZE)));
    }

    #[test]
    fn a_segment_that_does_not_continue_its_neighbour_is_a_gap_by_content() {
        let mut segments: Vec<_> = (3..6).map(|n| segment(1, n)).collect();
        segments[1].info.first_prev = Some(Lsn::from(7));
        let c = catalog(segments);
        assert_eq!(c.gaps().len(), 1);
        assert!(c.run(&Lineage::root(t(1)), Lsn::from(3 * SIZE)).broken.is_some());
    }

    #[test]
    fn a_record_over_the_edge_must_be_continued_by_as_much_as_it_lacks() {
        let mut segments: Vec<_> = (3..5).map(|n| segment(1, n)).collect();
        segments[0].info.pending = Some(super::super::index::PendingRecord {
            start: Lsn::from(4 * SIZE - 100),
            total_bytes: 300,
            here_bytes: 100,
            joined: false,
        });
        segments[1].info.continued_bytes = 200;
        assert_eq!(catalog(segments.clone()).gaps(), []);
        segments[1].info.continued_bytes = 100;
        assert_eq!(catalog(segments.clone()).gaps().len(), 1);
        segments.pop();
        let end = catalog(segments).run(&Lineage::root(t(1)), Lsn::from(3 * SIZE)).end();
        assert_eq!(end, Some(Lsn::from(4 * SIZE - 100)), "a record that is cut off does not count");
    }

    #[test]
    fn a_run_follows_the_line_over_a_fork_and_leaves_the_ancestor_there() {
        let fork = Lsn::from(5 * SIZE + 1000);
        let mut segments: Vec<_> = (3..9).map(|n| segment(1, n)).collect();
        segments.extend((5..7).map(|n| segment(2, n)));
        let mut c = catalog(segments);
        c.lineages.insert(t(2), Lineage { ancestors: vec![(t(1), fork)], timeline: t(2) });
        let names =
            |run: &Run<'_>| run.steps.iter().map(|s| s.entry.info.name.to_string()).collect::<Vec<_>>();
        let run = c.run(&c.lineage(t(2)), Lsn::from(4 * SIZE));
        assert_eq!(
            names(&run),
            ["000000010000000000000004", "000000020000000000000005", "000000020000000000000006"]
        );
        assert_eq!(run.end(), Some(Lsn::from(7 * SIZE)));
        let old = c.run(&c.lineage(t(1)), Lsn::from(4 * SIZE));
        assert_eq!(old.end(), Some(Lsn::from(9 * SIZE)));
        // Without the successor's first segment the ancestor's serves up to the fork.
        c.segments.retain(|s| s.info.name.timeline() == t(1));
        let cut = c.run(&c.lineage(t(2)), Lsn::from(4 * SIZE));
        assert_eq!(cut.end(), Some(fork));
        assert_eq!(c.latest_timeline(t(1), Lsn::from(4 * SIZE)), t(2));
        assert_eq!(c.latest_timeline(t(1), Lsn::from(8 * SIZE)), t(1));
    }

    #[test]
    fn readers_take_the_copy_that_reaches_furthest() {
        let mut short = segment(1, 3);
        short.info.valid_end = Lsn::from(3 * SIZE + 500);
        short.info.ending = Ending::EndOfLog;
        let mut long = segment(1, 3);
        long.path.push_str("@0000000004000000");
        let c = catalog(vec![short, long, segment(1, 4)]);
        assert!(c.best_copy("000000010000000000000003".parse().unwrap()).unwrap().path.contains('@'));
        assert_eq!(c.gaps(), []);
    }

    #[test]
    fn a_fault_admitted_on_purpose_stays_a_gap() {
        let mut bad = segment(1, 4);
        bad.faults.push(AdmittedFault { at: Lsn::from(4 * SIZE + 8), message: "xl_crc".into() });
        let c = catalog(vec![segment(1, 3), bad, segment(1, 5)]);
        assert!(c.gaps().iter().all(|g| matches!(g.kind, GapKind::Admitted { .. })));
        assert!(!c.gaps().is_empty());
    }
}
