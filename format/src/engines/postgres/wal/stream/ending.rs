//! How a log stands at the end of what was read, and why it stops.

use std::fmt;

use super::SegmentSpan;
use crate::engines::postgres::wal::Damage;
use crate::ids::{Lsn, TimelineId};

/// A record whose beginning is known and whose end lies in a later segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    /// Where it starts.
    pub start: Lsn,
    /// Its whole length, `xl_tot_len`.
    pub total_bytes: u32,
    /// What is known of it, page headers taken out.
    pub bytes: Vec<u8>,
}

impl Pending {
    /// How many bytes are still to come.
    pub fn missing_bytes(&self) -> u32 {
        self.total_bytes.saturating_sub(u32::try_from(self.bytes.len()).unwrap_or(u32::MAX))
    }
}

/// How the log stands at the end of a segment: what the next one has to go on from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreviousTail {
    /// Start of the last record that was read whole: what the next record's `xl_prev` says.
    pub last_record: Option<Lsn>,
    /// A record that runs over the edge.
    pub pending: Option<Pending>,
    /// `xlp_tli` of the last page.
    pub timeline: TimelineId,
    /// The end of the segment, where the next one starts.
    pub end: Lsn,
}

/// Why the log stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// The segment ends, and the last record with it or earlier in `XLOG_SWITCH`.
    SegmentEnd {
        /// Whether `XLOG_SWITCH` ended it; what follows that record is void.
        switched: bool,
    },
    /// A record that began in an earlier, unknown segment fills all of this one and goes on.
    Continues,
    /// Where a record should start there are zeros.
    ZeroLength,
    /// Where a page should start there are zeros.
    ZeroPage,
    /// The next page holds an earlier position: a recycled segment's old content.
    OldPage {
        /// The position it claims.
        address: Lsn,
    },
    /// The bytes given end before the segment does.
    BytesEnd,
    /// A page or record is broken, where a broken one may end the log.
    Damage,
}

impl EndReason {
    /// Whether the log stops inside the segment.
    pub const fn is_inside(self) -> bool {
        !matches!(self, Self::SegmentEnd { .. } | Self::Continues)
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SegmentEnd { switched: false } | Self::Continues => f.write_str("the segment ends"),
            Self::SegmentEnd { switched: true } => f.write_str("the server switched to the next segment"),
            Self::ZeroLength => f.write_str("there are zeros where a record should start"),
            Self::ZeroPage => f.write_str("there are zeros where a page should start"),
            Self::OldPage { address } => write!(f, "the next page is an old one, of {address}"),
            Self::BytesEnd => f.write_str("the file ends"),
            Self::Damage => f.write_str("what follows is broken"),
        }
    }
}

/// Where and why the log stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogEnd {
    /// Why.
    pub reason: EndReason,
    /// The end of the last record that is whole.
    pub valid_end: Lsn,
    /// Where the reason was found.
    pub found_at: Lsn,
}

impl LogEnd {
    /// The same, for a log that should go on there.
    pub(crate) fn as_damage(&self, span: SegmentSpan) -> Damage {
        let at = self.found_at;
        let damage = match self.reason {
            EndReason::OldPage { address } => {
                Damage::mismatch("xlp_pageaddr", at.saturating_add(8), address.get(), at.get())
            }
            EndReason::ZeroLength => Damage::invalid("xl_tot_len", at, 0),
            _ => Damage::invalid("xlp_magic", at, 0),
        };
        damage.in_segments_of(span.size.bytes())
    }
}
