//! What stored segments tell about transactions, read out of their WAL.

use waltide_format::Lsn;
use waltide_format::archive::{MergedSegment, SegmentEntry, SegmentIndex, SegmentInfo, Step};
use waltide_format::engines::postgres::detail::{Telling, tell_head, tell_segment};
use waltide_format::engines::postgres::wal::{Expected, PreviousTail, SegmentSpan};

use super::indexes::{ArchivedIndexes, SearchError};
use crate::log::{Joined, Tellings};

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

    async fn drops(&self, steps: &[&Step<'_>]) -> Result<Vec<Option<SegmentIndex>>, SearchError> {
        let mut known = vec![None; steps.len()];
        for cover in self.merged_drops(steps).await? {
            let (ends, events) = &cover.told;
            let mut before: Option<&SegmentInfo> = None;
            let place = known.get_mut(cover.steps).unwrap_or_default();
            for (known, MergedSegment { info, .. }) in place.iter_mut().zip(&cover.segments) {
                let here = |start: Lsn| is_indexed(start, info, before, cover.from_first);
                let mut index = SegmentIndex::new(info.clone());
                index.xacts = ends.iter().filter(|x| here(x.start)).cloned().collect();
                index.file_events = events.iter().filter(|e| here(e.start)).cloned().collect();
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
