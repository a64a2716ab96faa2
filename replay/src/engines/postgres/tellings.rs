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
                let here = |start: Lsn| is_indexed(start, info, before, cover.from_first);
                let mut index = SegmentIndex::new(info.clone());
                index.xacts = ends.iter().filter(|x| here(x.start)).cloned().collect();
                index.file_events = events.iter().filter(|e| here(e.start)).cloned().collect();
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
                let here = |start: Lsn| is_indexed(start, info, before, cover.from_first);
                let mut index = SegmentIndex::new(info.clone());
                let all = &cover.told;
                index.running_xacts = all.running_xacts.iter().filter(|r| here(r.start)).cloned().collect();
                index.checkpoints = all.checkpoints.iter().filter(|c| here(c.start)).cloned().collect();
                index.file_events = all.file_events.iter().filter(|e| here(e.start)).cloned().collect();
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

/// Whether the record that starts there is in a segment's own index. `before` is the segment before it, where that is
/// covered too; where the segment is the object's first, what starts earlier runs over its edge.
fn is_indexed(start: Lsn, info: &SegmentInfo, before: Option<&SegmentInfo>, from_first: bool) -> bool {
    let (Some(begin), Some(end)) = (info.name.start(info.size), info.name.end(info.size)) else {
        return false;
    };
    if begin <= start {
        return start < end && info.pending.is_none_or(|p| p.start != start || p.joined);
    }
    let runs_over = match before {
        Some(before) => before.pending.is_some_and(|p| p.start == start),
        None => from_first,
    };
    info.head_joined && runs_over
}
