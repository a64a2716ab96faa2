//! WAL segments: how large, how named. A segment's name means a position only with a [`SegmentSize`].

use std::fmt;
use std::str::FromStr;

use crate::ids::{Lsn, ParseIdError, TimelineId, serde_as_text};

/// `wal_segment_size`: a power of two from 1 MiB to 1 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentSize(u32);

impl SegmentSize {
    /// PostgreSQL's default, 16 MiB.
    pub const DEFAULT: Self = Self(16 << 20);

    /// A legal segment size.
    pub const fn new(bytes: u64) -> Option<Self> {
        if bytes.is_power_of_two() && bytes >= 1 << 20 && bytes <= 1 << 30 {
            #[allow(clippy::cast_possible_truncation)] // at most 1 GiB
            return Some(Self(bytes as u32));
        }
        None
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0 as u64
    }

    /// How many segments share the upper half of a position.
    const fn per_xlog_id(self) -> u64 {
        (1 << 32) >> self.0.trailing_zeros()
    }

    /// The number of the segment that holds `lsn`.
    pub const fn segment_number(self, lsn: Lsn) -> u64 {
        lsn.get() >> self.0.trailing_zeros()
    }

    /// Where the segment that holds `lsn` starts.
    pub const fn floor(self, lsn: Lsn) -> Lsn {
        Lsn::ZERO.saturating_add(lsn.get() & !(self.bytes().wrapping_sub(1)))
    }
}

impl TryFrom<u64> for SegmentSize {
    type Error = String;

    fn try_from(v: u64) -> Result<Self, Self::Error> {
        Self::new(v)
            .ok_or_else(|| format!("{v} is no wal_segment_size: a power of two from 1048576 to 1073741824"))
    }
}

impl serde::Serialize for SegmentSize {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u64(self.bytes())
    }
}

impl<'de> serde::Deserialize<'de> for SegmentSize {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Self::try_from(u64::deserialize(d)?).map_err(serde::de::Error::custom)
    }
}

/// The 24 hexadecimal digits that name a segment: timeline, then position in two halves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    timeline: TimelineId,
    log: u32,
    seg: u32,
}

impl SegmentName {
    /// The segment on `timeline` that holds `lsn`.
    pub fn containing(timeline: TimelineId, lsn: Lsn, size: SegmentSize) -> Self {
        let number = size.segment_number(lsn);
        let per_id = size.per_xlog_id();
        let half =
            |v: Option<u64>| u32::try_from(v.unwrap_or(0)).expect("a 64-bit position has 32-bit halves");
        Self { timeline, log: half(number.checked_div(per_id)), seg: half(number.checked_rem(per_id)) }
    }

    /// The timeline in the name.
    pub const fn timeline(self) -> TimelineId {
        self.timeline
    }

    /// The same position on another timeline.
    #[must_use]
    pub const fn on(self, timeline: TimelineId) -> Self {
        Self { timeline, ..self }
    }

    /// Where the segment starts; `None` where the name is none that `size` makes.
    pub fn start(self, size: SegmentSize) -> Option<Lsn> {
        if u64::from(self.seg) >= size.per_xlog_id() {
            return None;
        }
        let low = u64::from(self.seg).checked_mul(size.bytes())?;
        Some(Lsn::from(u64::from(self.log) << 32 | low))
    }

    /// Where the segment ends: the start of the next.
    pub fn end(self, size: SegmentSize) -> Option<Lsn> {
        self.start(size)?.checked_add(size.bytes())
    }

    /// The next segment on the same timeline.
    pub fn next(self, size: SegmentSize) -> Option<Self> {
        Some(Self::containing(self.timeline, self.end(size)?, size))
    }

    /// The segment before on the same timeline.
    pub fn previous(self, size: SegmentSize) -> Option<Self> {
        let start = self.start(size)?;
        (start.get() >= size.bytes()).then(|| Self::containing(self.timeline, start.saturating_sub(1), size))
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}{:08X}{:08X}", self.timeline.get(), self.log, self.seg)
    }
}

/// Eight upper-case hexadecimal digits, as PostgreSQL's names have them.
fn hex8(s: &str, at: usize) -> Option<u32> {
    let part = s.get(at..at.checked_add(8)?)?;
    let upper = part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'));
    upper.then(|| u32::from_str_radix(part, 16).ok()).flatten()
}

impl FromStr for SegmentName {
    type Err = ParseIdError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let parsed = || {
            let timeline = TimelineId::new(hex8(s, 0)?)?;
            Some(Self { timeline, log: hex8(s, 8)?, seg: hex8(s, 16)? })
        };
        (s.len() == 24)
            .then(parsed)
            .flatten()
            .ok_or_else(|| ParseIdError::new("a WAL segment", "with 24 upper-case hexadecimal digits", s))
    }
}
serde_as_text!(SegmentName);

/// `<segment>.<offset>.backup`: the note PostgreSQL archives when a base backup ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackupHistoryName {
    /// The segment the backup starts in.
    pub segment: SegmentName,
    /// Where in it, in bytes.
    pub offset: u32,
}

/// Every kind of file that PostgreSQL hands to archive_command or asks of restore_command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WalFileName {
    /// A whole segment.
    Segment(SegmentName),
    /// `<segment>.partial`: the last segment of a timeline that was left.
    Partial(SegmentName),
    /// `<segment>.<offset>.backup`.
    BackupHistory(BackupHistoryName),
    /// `<timeline>.history`.
    History(TimelineId),
}

impl fmt::Display for WalFileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment(s) => write!(f, "{s}"),
            Self::Partial(s) => write!(f, "{s}.partial"),
            Self::BackupHistory(b) => write!(f, "{}.{:08X}.backup", b.segment, b.offset),
            Self::History(t) => write!(f, "{:08X}.history", t.get()),
        }
    }
}

impl FromStr for WalFileName {
    type Err = ParseIdError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let parsed = || {
            if let Some(stem) = s.strip_suffix(".history") {
                let timeline = TimelineId::new(hex8(stem, 0)?)?;
                return (stem.len() == 8).then_some(Self::History(timeline));
            }
            if let Some(stem) = s.strip_suffix(".partial") {
                return stem.parse().ok().map(Self::Partial);
            }
            if let Some(stem) = s.strip_suffix(".backup") {
                let (segment, offset) = stem.split_once('.')?;
                let offset = (offset.len() == 8).then(|| hex8(offset, 0)).flatten()?;
                return Some(Self::BackupHistory(BackupHistoryName {
                    segment: segment.parse().ok()?,
                    offset,
                }));
            }
            s.parse().ok().map(Self::Segment)
        };
        parsed().ok_or_else(|| {
            ParseIdError::new(
                "a file of pg_wal that is archived",
                "as a segment, .partial, .backup or .history name",
                s,
            )
        })
    }
}
serde_as_text!(WalFileName);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sizes() -> impl Strategy<Value = SegmentSize> {
        (20u32..=30).prop_map(|shift| SegmentSize::new(1 << shift).unwrap())
    }

    proptest! {
        #[test]
        fn a_segment_name_comes_back_and_holds_its_position(t in 1u32.., lsn in 0u64..u64::MAX >> 1, size in sizes()) {
            let name = SegmentName::containing(TimelineId::new(t).unwrap(), Lsn::from(lsn), size);
            prop_assert_eq!(name.to_string().parse::<SegmentName>(), Ok(name));
            let start = name.start(size).unwrap();
            prop_assert_eq!(start, size.floor(Lsn::from(lsn)));
            prop_assert!(start.get() <= lsn && lsn < name.end(size).unwrap().get());
            prop_assert_eq!(name.next(size).unwrap().previous(size), Some(name));
        }

        #[test]
        fn any_text_is_a_wal_file_name_or_an_error(s in "[0-9A-Fa-f.hbpistoryackul]{0,45}") {
            if let Ok(name) = s.parse::<WalFileName>() {
                prop_assert_eq!(name.to_string(), s);
            }
        }
    }

    #[test]
    fn the_kinds_of_names_are_told_apart() {
        let kinds = [
            "000000010000000000000003",
            "000000010000000000000003.partial",
            "000000010000000000000003.00000028.backup",
            "00000002.history",
        ];
        for text in kinds {
            assert_eq!(text.parse::<WalFileName>().unwrap().to_string(), text);
        }
        for bad in [
            "",
            "00000000.history",
            "000000000000000000000003",
            "000000010000000000000003.",
            "é".repeat(12).as_str(),
        ] {
            assert!(bad.parse::<WalFileName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_name_that_the_segment_size_cannot_make_has_no_position() {
        let name: SegmentName = "0000000100000000000000FF".parse().unwrap();
        assert!(name.start(SegmentSize::DEFAULT).is_some());
        assert_eq!(name.start(SegmentSize::new(64 << 20).unwrap()), None);
    }
}
