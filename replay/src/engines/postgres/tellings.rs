//! What stored segments tell about transactions, read out of their WAL.

use waltide_format::archive::{ForkBlocks, RelationSegments, SegmentEntry, SegmentIndex, SegmentInfo, Step};
use waltide_format::engines::postgres::detail::{Telling, tell_head, tell_segment};
use waltide_format::engines::postgres::wal::{Expected, PreviousTail, SegmentSpan};

use waltide_format::{ForkNumber, Lsn, RelFileLocator};

use super::indexes::{ArchivedIndexes, MergedSigns, SearchError};
use crate::log::{Joined, Known, Question, Tellings};

/// A segment read by itself, kept with its WAL until what the one before left is known.
#[derive(Debug)]
pub struct SegmentPart {
    wal: Vec<u8>,
    span: SegmentSpan,
    expected: Expected<'static>,
    telling: Telling,
}

impl Tellings for ArchivedIndexes {
    type Error = SearchError;
    type Part = SegmentPart;

    async fn read(&self, step: &Step<'_>) -> Result<SegmentPart, SearchError> {
        let (info, until) = (&step.entry.info, step.usable_end);
        let expected = Expected { major: Some(info.major), ..Expected::default() };
        let start = info.name.start(info.size).unwrap_or(Lsn::ZERO);
        let span = SegmentSpan::containing(start, info.size);
        let span = span.expect("a catalogue's segments have names of their size");
        let wal = self.wal(step.entry).await?;
        let tell = move || {
            let telling = tell_segment(&wal, span, expected, None, until);
            SegmentPart { wal, span, expected, telling }
        };
        Ok(tokio::task::spawn_blocking(tell).await.expect("reading records does not panic"))
    }

    fn join(&self, part: SegmentPart, tail: Option<PreviousTail>) -> Joined {
        let SegmentPart { wal, span, expected, mut telling } = part;
        let Some(tail) = tail else { return Joined { telling, torn: None } };
        let mut head = tell_head(&wal, span, expected, tail);
        let torn = head.damage.take();
        // A record that fills the segment and goes on.
        if let Some(tail) = head.tail.take() {
            telling.tail = Some(tail);
        }
        if torn.is_none() {
            telling.preceded_by(head);
        }
        Joined { telling, torn }
    }

    async fn segment_index(&self, entry: &SegmentEntry) -> Result<SegmentIndex, SearchError> {
        self.index(entry).await
    }

    async fn has_merged(&self, steps: &[&Step<'_>]) -> Result<bool, SearchError> {
        // Each of the others takes a call for its index.
        Ok(self.merged_count(steps).await? >= steps.len().div_ceil(2))
    }

    async fn known(
        &self,
        steps: &[&Step<'_>],
        question: &Question,
    ) -> Result<Vec<Option<Known>>, SearchError> {
        let mut known = vec![None; steps.len()];
        for cover in self.merged_signs(steps, question).await? {
            let MergedSigns { ends, events, touched } = &cover.told;
            let mut before: Option<&SegmentInfo> = None;
            let place = known.get_mut(cover.steps).unwrap_or_default();
            for ((known, segment), nth) in place.iter_mut().zip(&cover.segments).zip(cover.offset..) {
                let info = &segment.info;
                let place = Place { info, before, from_first: cover.from_first };
                let mut index = SegmentIndex::new(info.clone());
                index.xacts = place.indexed(ends, |x| x.start);
                index.file_events = place.indexed(events, |e| e.start);
                let touches = |r: &&RelationSegments| r.segments.iter().any(|run| is_in_run(*run, nth));
                index.blocks = touched.iter().filter(touches).map(|r| without_blocks(r.relation)).collect();
                let may_end = question.xid.is_some_and(|xid| segment.may_end(xid));
                *known = Some(Known { index, may_end });
                before = Some(info);
            }
        }
        Ok(known)
    }

    async fn horizons(&self, steps: &[&Step<'_>]) -> Result<Vec<Option<SegmentIndex>>, SearchError> {
        let mut known = vec![None; steps.len()];
        for cover in self.merged_horizons(steps).await? {
            let mut before: Option<&SegmentInfo> = None;
            let place = known.get_mut(cover.steps).unwrap_or_default();
            for (known, segment) in place.iter_mut().zip(&cover.segments) {
                let info = &segment.info;
                let place = Place { info, before, from_first: cover.from_first };
                let mut index = SegmentIndex::new(info.clone());
                index.running_xacts = place.indexed(&cover.told.running_xacts, |r| r.start);
                index.checkpoints = place.indexed(&cover.told.checkpoints, |c| c.start);
                index.file_events = place.indexed(&cover.told.file_events, |e| e.start);
                *known = Some(index);
                before = Some(info);
            }
        }
        Ok(known)
    }

    fn is_damage(&self, error: &SearchError) -> bool {
        error.is_damage()
    }
}

fn is_in_run((first, count): (u32, u32), nth: usize) -> bool {
    u32::try_from(nth).is_ok_and(|nth| first <= nth && nth.checked_sub(first).is_some_and(|n| n < count))
}

/// That a relation is touched.
const fn without_blocks(relation: RelFileLocator) -> ForkBlocks {
    ForkBlocks { relation, fork: ForkNumber::Main, blocks: Vec::new() }
}

/// A segment among those of a merged index.
#[derive(Debug, Clone, Copy)]
struct Place<'a> {
    info: &'a SegmentInfo,
    /// The segment before it, where that is covered too.
    before: Option<&'a SegmentInfo>,
    /// Whether it, or the first of those that are covered, is the object's first: what starts earlier runs over its edge.
    from_first: bool,
}

impl Place<'_> {
    /// Those of a merged index's records, in the order of their starts, that are in the segment's own index.
    fn indexed<T: Clone>(&self, all: &[T], start: impl Fn(&T) -> Lsn) -> Vec<T> {
        let (Some(begin), Some(end)) =
            (self.info.name.start(self.info.size), self.info.name.end(self.info.size))
        else {
            return Vec::new();
        };
        let first_from = |at: Lsn| all.partition_point(|item| start(item) < at);
        let from = match self.before {
            Some(before) => first_from(before.pending.map_or(begin, |p| p.start)),
            None if self.from_first => 0,
            None => first_from(begin),
        };
        let near = all.get(from..first_from(end)).unwrap_or_default();
        near.iter().filter(|item| self.is_indexed(start(item), begin, end)).cloned().collect()
    }

    /// Whether the record that starts there is in the index of the segment from `begin` to `end`.
    fn is_indexed(&self, start: Lsn, begin: Lsn, end: Lsn) -> bool {
        let info = self.info;
        if begin <= start {
            return start < end && info.pending.is_none_or(|p| p.start != start || p.joined);
        }
        let runs_over = match self.before {
            Some(before) => before.pending.is_some_and(|p| p.start == start),
            None => self.from_first,
        };
        info.head_joined && runs_over
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{info, segment_name};
    use proptest::prelude::*;
    use waltide_format::archive::{Ending, PendingRecord};

    const MIB: u64 = 1 << 20;

    proptest! {
        #[test]
        fn a_segments_part_of_a_list_is_what_its_own_index_would_have(
            starts in proptest::collection::btree_set(3 * MIB..7 * MIB, 0..40),
            joins in proptest::collection::vec(any::<(bool, bool, bool)>(), 4),
            from_first: bool,
        ) {
            let starts: Vec<Lsn> = starts.into_iter().map(Lsn::from).collect();
            // Of each segment the last record may run over the edge, and be joined on either side.
            let mut infos: Vec<SegmentInfo> = (3..7).map(|n| info(7, segment_name(n), Ending::Full)).collect();
            for (n, (over, joined, head_joined)) in joins.into_iter().enumerate() {
                let (begin, end) = (Lsn::from((3 + n as u64) * MIB), Lsn::from((4 + n as u64) * MIB));
                let last = starts.iter().rfind(|s| begin <= **s && **s < end).filter(|_| over);
                infos[n].pending = last.map(|start| PendingRecord { start: *start, total_bytes: 9, here_bytes: 1, joined });
                if let Some(next) = infos.get_mut(n + 1) {
                    next.head_joined = head_joined;
                }
            }
            infos[0].head_joined = from_first;
            for (n, info) in infos.iter().enumerate() {
                let before = n.checked_sub(1).map(|n| &infos[n]);
                let (begin, end) = (Lsn::from((3 + n as u64) * MIB), Lsn::from((4 + n as u64) * MIB));
                let own = |start: &Lsn| match info.pending.filter(|p| p.start == *start) {
                    Some(pending) => pending.joined,
                    None => begin <= *start && *start < end,
                };
                let over = |start: &Lsn| before.is_some_and(|b| b.pending.is_some_and(|p| p.start == *start));
                let expected = starts.iter().filter(|s| own(s) || info.head_joined && over(s)).copied();
                let place = Place { info, before, from_first };
                prop_assert_eq!(place.indexed(&starts, |s| *s), expected.collect::<Vec<_>>());
            }
            // What starts before the object's first segment runs over its edge.
            let all = [vec![Lsn::from(3 * MIB - 8)], starts].concat();
            let first = Place { info: &infos[0], before: None, from_first };
            prop_assert_eq!(first.indexed(&all, |s| *s).first() == all.first(), from_first);
        }
    }
}
