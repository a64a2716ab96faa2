//! Timeline history files: which timelines a timeline descends from, and where it left each.

use std::fmt;

use crate::ids::{Lsn, TimelineId};

/// Where a timeline was left for the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryEntry {
    /// The timeline that was left.
    pub timeline: TimelineId,
    /// Where its descendant begins.
    pub switch: Lsn,
    /// Why, in the words of the server that did it.
    pub reason: String,
}

/// What `<timeline>.history` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    timeline: TimelineId,
    ancestors: Vec<HistoryEntry>,
}

/// A line of a history file that is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryError {
    /// The line, from one.
    pub line: usize,
    problem: &'static str,
}

impl fmt::Display for HistoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.problem)
    }
}

impl std::error::Error for HistoryError {}

impl History {
    /// The history of a timeline without ancestors, which has no file.
    pub const fn root(timeline: TimelineId) -> Self {
        Self { timeline, ancestors: Vec::new() }
    }

    /// Reads the file of `timeline`. Each line holds a timeline, where it was left, and why; `#` starts a
    /// comment. The positions need not rise: a server that was recovered along a timeline to a point
    /// before that timeline began leaves a range of nothing.
    pub fn parse(timeline: TimelineId, text: &[u8]) -> Result<Self, HistoryError> {
        let mut ancestors: Vec<HistoryEntry> = Vec::new();
        for (line, text) in text.split(|b| *b == b'\n').enumerate() {
            let error = |problem| HistoryError { line: line.saturating_add(1), problem };
            let text = String::from_utf8_lossy(text);
            let text = text.trim();
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let mut fields = text.splitn(3, char::is_whitespace);
            let id = fields.next().and_then(|id| id.parse::<u32>().ok()).and_then(TimelineId::new);
            let id = id.ok_or(error("a timeline is expected first"))?;
            let switch = fields.next().and_then(|lsn| lsn.trim().parse().ok());
            let switch =
                switch.ok_or(error("a position like 16/B374D848 is expected behind the timeline"))?;
            if ancestors.last().is_some_and(|last| last.timeline >= id) {
                return Err(error("timelines must rise from line to line"));
            }
            if id >= timeline {
                return Err(error("a timeline descends only from those with smaller numbers"));
            }
            let reason = fields.next().unwrap_or_default().trim().to_owned();
            ancestors.push(HistoryEntry { timeline: id, switch, reason });
        }
        if ancestors.is_empty() && timeline != TimelineId::FIRST {
            return Err(HistoryError { line: 1, problem: "the timeline that this one left is expected" });
        }
        Ok(Self { timeline, ancestors })
    }

    /// The history of a timeline that leaves this one at `switch`; `None` if its number is not larger.
    pub fn branch(&self, timeline: TimelineId, switch: Lsn, reason: &str) -> Option<Self> {
        if timeline <= self.timeline {
            return None;
        }
        let mut ancestors = self.ancestors.clone();
        ancestors.push(HistoryEntry { timeline: self.timeline, switch, reason: reason.to_owned() });
        Some(Self { timeline, ancestors })
    }

    /// The file's text, as PostgreSQL writes it.
    pub fn to_text(&self) -> String {
        let line = |e: &HistoryEntry| {
            let reason: String = e.reason.chars().map(|c| if c == '\n' { ' ' } else { c }).collect();
            format!("{}\t{}\t{}\n", e.timeline, e.switch, reason)
        };
        self.ancestors.iter().map(line).collect()
    }

    /// The timeline.
    pub const fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// The timelines it descends from, oldest first.
    pub fn ancestors(&self) -> &[HistoryEntry] {
        &self.ancestors
    }

    /// Every timeline with the range of positions it holds, newest first; the end is exclusive and the
    /// newest has none.
    pub fn ranges(&self) -> impl Iterator<Item = (TimelineId, Lsn, Option<Lsn>)> + '_ {
        let ends = self.ancestors.iter().rev().map(|e| (e.timeline, Some(e.switch)));
        let begins = self.ancestors.iter().rev().map(|e| e.switch).chain(std::iter::once(Lsn::ZERO));
        std::iter::once((self.timeline, None))
            .chain(ends)
            .zip(begins)
            .map(|((t, end), begin)| (t, begin, end))
    }

    /// Whether the byte at `lsn` was written on `timeline`.
    pub fn timeline_at(&self, lsn: Lsn) -> TimelineId {
        let holds = |(_, begin, end): &(TimelineId, Lsn, Option<Lsn>)| {
            *begin <= lsn && end.is_none_or(|end| lsn < end)
        };
        // Ranges cover everything from zero on, so one always holds it.
        self.ranges().find(holds).map_or(self.timeline, |(t, _, _)| t)
    }

    /// Where `timeline` was left, for an ancestor.
    pub fn switch_from(&self, timeline: TimelineId) -> Option<Lsn> {
        self.ancestors.iter().find(|e| e.timeline == timeline).map(|e| e.switch)
    }

    /// Whether `timeline` is this one or an ancestor.
    pub fn contains(&self, timeline: TimelineId) -> bool {
        timeline == self.timeline || self.switch_from(timeline).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tli(v: u32) -> TimelineId {
        TimelineId::new(v).unwrap()
    }

    const TEXT: &str =
        "1\t0/5000000\tno recovery target specified\n\n2\t0/7000028\tbefore transaction 740 at 2026-01-01\n";

    #[test]
    fn the_timeline_of_a_position_is_the_one_that_wrote_it() {
        let h = History::parse(tli(3), TEXT.as_bytes()).unwrap();
        for (lsn, want) in
            [(0, 1), (0x4FF_FFFF, 1), (0x500_0000, 2), (0x700_0027, 2), (0x700_0028, 3), (u64::MAX, 3)]
        {
            assert_eq!(h.timeline_at(Lsn::from(lsn)), tli(want), "{lsn:X}");
        }
        assert_eq!(h.to_text(), TEXT.replace("\n\n", "\n"));
        assert_eq!(h.switch_from(tli(2)), Some(Lsn::from(0x700_0028)));
        assert!(h.contains(tli(1)) && h.contains(tli(3)) && !h.contains(tli(4)));
    }

    #[test]
    fn a_timeline_that_ends_before_it_begins_holds_nothing() {
        let h = History::parse(tli(3), b"1\t0/9000000\tx\n2\t0/4000000\ty\n").unwrap();
        assert_eq!(h.timeline_at(Lsn::from(0x3FF_FFFF)), tli(1));
        assert_eq!(h.timeline_at(Lsn::from(0x400_0000)), tli(3));
    }

    #[test]
    fn lines_that_are_none_are_refused_with_their_number() {
        for (text, want) in [
            ("x", "line 1: a timeline is expected first"),
            ("# c\n1", "line 2: a position like 16/B374D848 is expected behind the timeline"),
            ("2\t0/1\n1\t0/2", "line 2: timelines must rise from line to line"),
            ("5\t0/1", "line 1: a timeline descends only from those with smaller numbers"),
            ("", "line 1: the timeline that this one left is expected"),
            ("# nothing\n\n", "line 1: the timeline that this one left is expected"),
        ] {
            assert_eq!(History::parse(tli(5), text.as_bytes()).unwrap_err().to_string(), want);
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(switches in proptest::collection::vec((1u32..1000, any::<u64>(), "[ -~]{0,40}"), 0..6)) {
            let mut h = History::root(TimelineId::FIRST);
            for (step, switch, reason) in switches {
                h = h.branch(tli(h.timeline().get() + step), Lsn::from(switch), reason.trim()).unwrap();
            }
            prop_assert_eq!(History::parse(h.timeline(), h.to_text().as_bytes()), Ok(h));
        }

        #[test]
        fn any_bytes_are_a_history_or_an_error(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = History::parse(tli(9), &text);
        }
    }
}
