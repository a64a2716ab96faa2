//! Which transactions committed, and where.

use std::collections::{BTreeMap, HashMap};

use super::tuple::Hint;
use crate::ids::{Lsn, Xid};
use crate::time::TimestampTz;

/// A commit record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Commit {
    /// The transaction; of a prepared one that one.
    pub xid: Xid,
    /// Start of the record.
    pub start: Lsn,
    /// End of the record.
    pub end: Lsn,
    /// `xact_time`.
    pub time: TimestampTz,
}

/// What became of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It committed before the log that was read begins.
    Before,
    /// It committed in that log, by the record that starts here.
    At(Lsn),
    /// It did not, as far as the log goes.
    Never,
}

/// Which transactions committed, and where.
#[derive(Debug, Clone, Default)]
pub struct Fates {
    commits: BTreeMap<Lsn, Commit>,
    /// Where each transaction and subtransaction committed, in LSN order: numbers come again after four thousand million.
    by_xid: HashMap<Xid, Vec<Lsn>>,
    before: HashMap<Xid, bool>,
}

impl Fates {
    /// Adds a commit record, with the subtransactions that committed with it. The same one twice counts once.
    pub fn add(&mut self, commit: Commit, subxacts: &[Xid]) {
        if self.commits.insert(commit.start, commit).is_some() {
            return;
        }
        for xid in std::iter::once(&commit.xid).chain(subxacts) {
            let at = self.by_xid.entry(*xid).or_default();
            let place = at.partition_point(|lsn| *lsn < commit.start);
            at.insert(place, commit.start);
        }
    }

    /// Says whether a transaction had committed before the log that was read begins (`pg_xact`).
    pub fn add_before(&mut self, xid: Xid, committed: bool) {
        self.before.insert(xid, committed);
    }

    /// The commit record that starts there.
    pub(super) fn commit(&self, start: Lsn) -> Option<&Commit> {
        self.commits.get(&start)
    }

    /// What became of the transaction that wrote something that is in the log, or in a page, at `seen`.
    pub(super) fn of(&self, xid: Xid, hint: Hint, seen: Lsn) -> Fate {
        // What no transaction wrote is always there.
        if !xid.is_normal() {
            return Fate::Before;
        }
        if let Some(at) = self.by_xid.get(&xid) {
            let after = at.iter().find(|lsn| **lsn >= seen);
            if let Some(lsn) = after.or(at.last()) {
                return Fate::At(*lsn);
            }
        }
        match (hint, self.before.get(&xid)) {
            (Hint::Committed, _) | (Hint::Unknown, Some(true)) => Fate::Before,
            _ => Fate::Never,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_in_the_log_beats_what_a_page_or_pg_xact_says() {
        let mut fates = Fates::default();
        let commit = |xid: u32, start: u64| Commit {
            xid: xid.into(),
            start: start.into(),
            end: (start + 40).into(),
            time: TimestampTz::default(),
        };
        fates.add(commit(700, 0x500), &[Xid::from(701)]);
        fates.add(commit(700, 0x500), &[Xid::from(701)]);
        fates.add(commit(700, 0x9000), &[]);
        fates.add_before(702.into(), true);
        fates.add_before(703.into(), false);
        let of = |xid: u32, hint, seen: u64| fates.of(xid.into(), hint, seen.into());
        assert_eq!(of(700, Hint::Committed, 0), Fate::At(0x500.into()));
        assert_eq!(of(700, Hint::Unknown, 0x600), Fate::At(0x9000.into()), "the number came again");
        assert_eq!(of(701, Hint::Unknown, 0x600), Fate::At(0x500.into()), "seen in a page after its commit");
        assert_eq!((of(702, Hint::Unknown, 0), of(703, Hint::Unknown, 0)), (Fate::Before, Fate::Never));
        assert_eq!((of(703, Hint::Committed, 0), of(704, Hint::Aborted, 0)), (Fate::Before, Fate::Never));
        assert_eq!((of(2, Hint::Unknown, 0), of(705, Hint::Unknown, 0)), (Fate::Before, Fate::Never));
    }
}
