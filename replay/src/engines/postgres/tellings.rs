//! What stored segments tell about transactions, read out of their WAL.

use waltide_format::Lsn;
use waltide_format::archive::{SegmentEntry, SegmentIndex, Step};
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

    fn is_damage(&self, error: &SearchError) -> bool {
        error.is_damage()
    }
}
