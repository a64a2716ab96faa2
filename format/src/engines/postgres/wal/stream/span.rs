//! Which part of the log is read, and what its pages must agree with.

use crate::engines::postgres::cluster::History;
use crate::ids::{Lsn, PgMajor, SystemId, TimelineId};
use crate::segment::SegmentSize;

/// Which part of the log a segment holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentSpan {
    pub(super) start: Lsn,
    pub(super) size: SegmentSize,
}

impl SegmentSpan {
    /// The segment of `size` that holds `lsn`; `None` where the log would end inside it.
    pub fn containing(lsn: Lsn, size: SegmentSize) -> Option<Self> {
        let start = size.floor(lsn);
        start.checked_add(size.bytes()).map(|_| Self { start, size })
    }

    /// Where it starts.
    pub const fn start(self) -> Lsn {
        self.start
    }

    /// Where the next starts.
    pub const fn end(self) -> Lsn {
        self.start.saturating_add(self.size.bytes())
    }

    /// `wal_segment_size`.
    pub const fn size(self) -> SegmentSize {
        self.size
    }

    pub(super) fn bytes(self) -> usize {
        usize::try_from(self.size.bytes()).unwrap_or(usize::MAX)
    }

    pub(super) fn lsn(self, offset: usize) -> Lsn {
        self.start.saturating_add(offset as u64)
    }
}

/// What a segment's pages must agree with. What is left open is not checked.
#[derive(Debug, Clone, Copy, Default)]
pub struct Expected<'a> {
    /// System identifiers, one of which the segment carries; any where empty.
    pub system_ids: &'a [SystemId],
    /// The major version.
    pub major: Option<PgMajor>,
    /// The timeline in the segment's name: no page is of a later one.
    pub timeline: Option<TimelineId>,
    /// That timeline's history: each page is of the timeline that held its position.
    pub history: Option<&'a History>,
}
