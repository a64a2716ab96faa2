//! How far each timeline's archived WAL reaches, and how far a restore along it does: a hole may lie between the two.

use serde::Serialize;

use super::catalog::{Catalog, Step};
use super::windows::RecoveryWindow;
use crate::ids::{Lsn, TimelineId};
use crate::segment::SegmentName;
use crate::time::TimestampTz;

/// How far one timeline reaches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reach {
    /// The timeline.
    pub timeline: TimelineId,
    /// The last segment of it that is archived.
    pub segment: SegmentName,
    /// Where that one's valid records end.
    pub end: Lsn,
    /// The last commit that is archived on the timeline's line, in the order of the log.
    pub last_commit: Option<TimestampTz>,
    /// Up to where a restore along the line can go; none where no backup leads there.
    pub recoverable_to: Option<Lsn>,
    /// The last commit before that, which may be in the base backup. It lies before `last_commit` where a hole does.
    pub last_recoverable_commit: Option<TimestampTz>,
}

impl Catalog {
    /// How far each timeline that has a segment reaches, oldest first. `windows` are the catalogue's own.
    pub fn reaches(&self, windows: &[RecoveryWindow]) -> Vec<Reach> {
        self.timelines().into_iter().filter_map(|timeline| self.reach(timeline, windows)).collect()
    }

    fn reach(&self, timeline: TimelineId, windows: &[RecoveryWindow]) -> Option<Reach> {
        let last = self.best_copies(timeline).last()?;
        let window = windows.iter().filter(|w| w.timeline == timeline).max_by_key(|w| w.to);
        Some(Reach {
            timeline,
            segment: last.info.name,
            end: last.info.valid_end,
            last_commit: self.last_commit(timeline, None),
            recoverable_to: window.map(|w| w.to),
            last_recoverable_commit: window
                .and_then(|w| w.to_time.or_else(|| self.last_commit(timeline, Some(w.to)))),
        })
    }

    /// The last commit on a timeline's line, in what ends by `until`. A timeline that has just begun may have none yet:
    /// its ancestor's last one before the fork is meant.
    fn last_commit(&self, timeline: TimelineId, until: Option<Lsn>) -> Option<TimestampTz> {
        let line = self.lineage(timeline);
        line.newest_first().find_map(|(timeline, _, end)| {
            let steps = self.best_copies(timeline).map(|entry| {
                let usable_end = end.map_or(entry.info.valid_end, |end| entry.info.valid_end.min(end));
                Step { entry, usable_end }
            });
            let counted = steps.filter(|step| until.is_none_or(|until| step.usable_end <= until));
            counted.filter_map(|step| step.last_commit()).last()
        })
    }
}

impl Step<'_> {
    /// The last commit in the part of the segment that lies on the line. Of a segment that the line leaves inside, only
    /// its records would tell: there is none then.
    pub(super) fn last_commit(&self) -> Option<TimestampTz> {
        let info = &self.entry.info;
        info.last_commit_time.filter(|_| self.usable_end >= info.valid_end)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Lineage;
    use super::super::catalog::samples::*;
    use super::*;

    fn at(hour: i64) -> Option<TimestampTz> {
        Some(TimestampTz::from_postgres_micros(hour * 3_600_000_000))
    }

    /// Segments of a timeline, each with a commit at the hour of its number.
    fn hourly(timeline: u32, numbers: impl IntoIterator<Item = u64>) -> Vec<super::super::SegmentEntry> {
        let entry = |n: u64| {
            let mut entry = segment(timeline, n);
            entry.info.last_commit_time = at(n as i64);
            entry
        };
        numbers.into_iter().map(entry).collect()
    }

    #[test]
    fn what_can_be_recovered_ends_at_a_hole_although_more_is_archived() {
        let mut c = catalog(hourly(1, [3, 4, 5, 7, 8]));
        let reach = |c: &Catalog| {
            let reaches = c.reaches(&c.coverage().windows);
            let [reach] = reaches.as_slice() else { panic!("{reaches:?}") };
            (reach.end, reach.last_commit, reach.recoverable_to, reach.last_recoverable_commit)
        };
        let end = Lsn::from(9 * SIZE);
        assert_eq!(reach(&c), (end, at(8), None, None), "without a backup nothing can be recovered");
        c.backups = vec![backup(1, 4 * SIZE + 40, 4 * SIZE + 900)];
        assert_eq!(reach(&c), (end, at(8), Some(Lsn::from(6 * SIZE)), at(5)));
        c.segments = hourly(1, 3..9);
        assert_eq!(reach(&c), (end, at(8), Some(end), at(8)));
    }

    #[test]
    fn what_a_backup_holds_can_be_recovered_though_nothing_was_committed_since() {
        let mut segments = hourly(1, 3..5);
        segments.extend([segment(1, 5), segment(1, 6)]);
        for quiet in &mut segments[2..] {
            quiet.info.last_commit_time = None;
        }
        let mut c = catalog(segments);
        c.backups = vec![backup(1, 5 * SIZE + 40, 5 * SIZE + 900)];
        let reach = |c: &Catalog| c.reaches(&c.coverage().windows)[0].clone();
        let (found, end) = (reach(&c), Lsn::from(7 * SIZE));
        assert_eq!((found.recoverable_to, found.last_recoverable_commit), (Some(end), at(4)));
        // Behind a hole there is a commit that nothing brings back.
        c.segments.extend(hourly(1, [8]));
        let found = reach(&c);
        assert_eq!(
            (found.last_commit, found.recoverable_to, found.last_recoverable_commit),
            (at(8), Some(end), at(4))
        );
    }

    #[test]
    fn each_timeline_has_a_reach_and_a_new_one_has_its_ancestors_last_commit() {
        let mut segments = hourly(1, 3..8);
        segments.push(segment(2, 6));
        segments.last_mut().unwrap().info.last_commit_time = None;
        let mut c = catalog(segments);
        c.lineages
            .insert(t(2), Lineage { ancestors: vec![(t(1), Lsn::from(6 * SIZE + 1000))], timeline: t(2) });
        c.backups = vec![backup(1, 4 * SIZE + 40, 4 * SIZE + 900)];
        let reaches = c.reaches(&c.coverage().windows);
        let told: Vec<_> =
            reaches.iter().map(|r| (r.timeline.get(), r.last_commit, r.last_recoverable_commit)).collect();
        // Whether the commit in the segment that the line leaves inside was before the fork, no catalogue knows.
        assert_eq!(told, [(1, at(7), at(7)), (2, at(5), at(5))]);
    }
}
