//! Which segments must be read to tell the wanted transactions whole.
//!
//! A transaction that ends in a segment may have begun long before it. Running-xacts records say how far back: where
//! one says that the oldest transaction still running is X, all that X did lies behind any earlier one that says X is
//! yet to come.

use std::ops::Range;

use waltide_format::Xid;
use waltide_format::archive::{CheckpointKind, SegmentIndex};

use super::join::next_xid;

/// The search backwards from a segment, fed with the indexes of those before it, newest first.
#[derive(Debug, Default)]
pub(super) struct LookBack {
    oldest: Option<Xid>,
}

impl LookBack {
    /// Whether what was open is known to begin no earlier than in this segment.
    pub(super) fn reaches(&mut self, index: &SegmentIndex) -> bool {
        let running = index.running_xacts.iter().map(|r| (r.start, r.next_xid, Some(r.oldest_running_xid)));
        // A shutdown checkpoint comes when nothing runs, but for what is prepared.
        let shutdown = index.checkpoints.iter().filter(|c| c.kind == CheckpointKind::Shutdown);
        let shutdown = shutdown.map(|c| (c.start, next_xid(c.next_full_xid), None));
        let mut said: Vec<_> = running.chain(shutdown).collect();
        said.sort_by_key(|(start, ..)| *start);
        said.into_iter().rev().any(|(_, next, oldest)| {
            self.oldest = self.oldest.or(oldest);
            self.oldest.is_some_and(|oldest| !oldest.precedes(next))
        })
    }
}

/// The search forwards from a segment, fed with the indexes of those behind it, in order.
#[derive(Debug, Default)]
pub(super) struct LookAhead {
    /// Of all numbers that were given out when the search began, the next.
    next: Option<Xid>,
}

impl LookAhead {
    /// Whether all that wrote before the search began are known to have ended in this segment or before it. Shutdown
    /// checkpoints do not say that: what is prepared goes on.
    pub(super) fn reaches(&mut self, index: &SegmentIndex) -> bool {
        let mut running: Vec<_> = index.running_xacts.iter().collect();
        running.sort_by_key(|r| r.start);
        running.into_iter().any(|r| {
            let next = *self.next.get_or_insert(r.next_xid);
            !r.oldest_running_xid.precedes(next)
        })
    }
}

/// Windows of segments to read, in order and apart from one another.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Windows(Vec<Range<usize>>);

impl Windows {
    /// Where the last window ends.
    pub(super) fn end(&self) -> usize {
        self.0.last().map_or(0, |w| w.end)
    }

    /// Whether this segment continues the last window, so that nothing need be looked for before it.
    pub(super) fn continues(&self, segment: usize) -> bool {
        self.0.last().is_some_and(|w| segment <= w.end)
    }

    /// Adds the segments from where the search came to up to this one.
    pub(super) fn add(&mut self, from: usize, segment: usize) {
        let end = segment.saturating_add(1);
        match self.0.last_mut() {
            Some(last) if from <= last.end => last.end = last.end.max(end),
            _ => self.0.push(from..end),
        }
    }

    /// The windows.
    pub(super) fn into_ranges(self) -> Vec<Range<usize>> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{info, segment_name};
    use waltide_format::Lsn;
    use waltide_format::archive::{Ending, RunningXacts};

    fn index(said: &[(u64, u32, u32)]) -> SegmentIndex {
        let mut index = SegmentIndex::new(info(7, segment_name(3), Ending::Full));
        let running = |(at, next, oldest): &(u64, u32, u32)| RunningXacts {
            start: Lsn::from(*at),
            next_xid: (*next).into(),
            oldest_running_xid: (*oldest).into(),
            running: 0,
        };
        index.running_xacts = said.iter().map(running).collect();
        index
    }

    #[test]
    fn it_goes_back_to_where_the_oldest_open_transaction_was_yet_to_come() {
        let mut search = LookBack::default();
        assert!(!search.reaches(&index(&[])), "nothing is said");
        assert!(!search.reaches(&index(&[(10, 95, 80), (20, 100, 90)])), "90 runs, and 95 is no earlier");
        assert!(!search.reaches(&index(&[(8, 91, 90)])), "90 runs there too");
        assert!(search.reaches(&index(&[(5, 90, 70)])), "90 is the next");
        assert!(LookBack::default().reaches(&index(&[(5, 90, 90)])), "nothing runs");
    }

    #[test]
    fn it_goes_on_until_what_was_open_has_ended() {
        let mut search = LookAhead::default();
        assert!(!search.reaches(&index(&[])), "nothing is said");
        assert!(!search.reaches(&index(&[(10, 100, 80)])), "some below 100 may have written");
        assert!(!search.reaches(&index(&[(20, 120, 99)])), "99 still runs");
        assert!(search.reaches(&index(&[(40, 130, 99), (50, 131, 100)])), "all below 100 have ended");
        assert!(LookAhead::default().reaches(&index(&[(5, 90, 90)])), "nothing runs");
    }

    #[test]
    fn windows_that_touch_are_one() {
        let mut windows = Windows::default();
        windows.add(2, 4);
        assert!(windows.continues(5) && !windows.continues(6));
        windows.add(5, 5);
        windows.add(9, 9);
        windows.add(10, 12);
        assert_eq!((windows.end(), windows.into_ranges()), (13, vec![2..6, 9..13]));
    }
}
