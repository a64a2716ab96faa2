//! Which transactions are wanted, and which segments cannot hold the end of one.

use std::str::FromStr;

use waltide_format::archive::{SegmentIndex, SegmentInfo, XactEnd};
use waltide_format::{Oid, RelFileLocator, TimestampTz, Xid};

use super::join::Ended;
use super::transaction::{NamedRelation, Transaction};

/// Which transactions are wanted. All of them unless said; what is said must all hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogFilter {
    /// Ended then or later.
    pub since: Option<TimestampTz>,
    /// Ended then or earlier.
    pub until: Option<TimestampTz>,
    /// This one, or the one that it is a subtransaction of.
    pub xid: Option<Xid>,
    /// Touched this relation; with `dropped` or `truncated`, did that to it.
    pub relation: Option<RelationMatch>,
    /// In this database.
    pub database: Option<DatabaseMatch>,
    /// Dropped a relation. With `truncated`: did either.
    pub dropped: bool,
    /// Emptied a relation.
    pub truncated: bool,
    /// Wrote more WAL than this.
    pub larger_than: Option<u64>,
    /// Also what was rolled back.
    pub aborted: bool,
}

/// How a relation is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RelationMatch {
    /// By its files.
    Files(RelFileLocator),
    /// By its files' number, or by its OID.
    Number(Oid),
}

/// How a database is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DatabaseMatch {
    /// By its OID.
    Oid(Oid),
}

impl RelationMatch {
    fn is(&self, relation: &NamedRelation) -> bool {
        match self {
            Self::Files(files) => relation.relation == *files,
            Self::Number(number) => {
                relation.relation.rel_number == *number
                    || relation.name.as_ref().is_some_and(|name| name.oid == *number)
            }
        }
    }
}

impl FromStr for RelationMatch {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let number = s.parse().map(Self::Number);
        let found = number.ok().or_else(|| s.parse().ok().map(Self::Files));
        found.ok_or_else(|| {
            format!("{s:?} is no relation: say 16384 or 1663/5/16384, as `waltide log` shows it")
        })
    }
}

impl FromStr for DatabaseMatch {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        s.parse().map(Self::Oid).map_err(|_| format!("{s:?} is no database: say its OID"))
    }
}

impl LogFilter {
    /// Whether a moment is in the range.
    pub(super) fn covers(&self, time: TimestampTz) -> bool {
        self.since.is_none_or(|since| since <= time) && self.until.is_none_or(|until| time <= until)
    }

    /// Whether a segment can hold the end of a wanted transaction, by what the catalogue knows of it.
    pub(super) fn may_end_in(&self, info: &SegmentInfo) -> bool {
        match (info.min_time, info.max_time) {
            (Some(min), Some(max)) => {
                self.since.is_none_or(|since| since <= max) && self.until.is_none_or(|until| min <= until)
            }
            // A commit over the edge may be in nobody's index.
            _ => info.continued_bytes > 0 && !info.head_joined || !self.is_narrow(),
        }
    }

    fn is_narrow(&self) -> bool {
        self.since.is_some() || self.until.is_some() || self.needs_index()
    }

    /// Whether a segment's index says more about that.
    pub(super) const fn needs_index(&self) -> bool {
        self.xid.is_some() || (self.dropped && !self.truncated)
    }

    /// The same by its index.
    pub(super) fn may_end_by(&self, index: &SegmentIndex) -> bool {
        let open = index.info.continued_bytes > 0 && !index.info.head_joined;
        open || index.xacts.iter().any(|end| self.may_be(end))
    }

    fn may_be(&self, end: &XactEnd) -> bool {
        let is_wanted = |xid: Xid| end.xid == xid || end.subxacts.contains(&xid);
        end.kind.is_end()
            && self.covers(end.time)
            && self.xid.is_none_or(is_wanted)
            && (!self.dropped || self.truncated || !end.dropped.is_empty())
            && (self.aborted || end.kind.is_commit())
    }

    /// What can be told before names are looked up.
    pub(super) fn wants(&self, ended: &Ended) -> bool {
        self.may_be(&ended.end)
            && self.larger_than.is_none_or(|bytes| ended.work.volume.wal_bytes > bytes)
            && self.database.as_ref().is_none_or(|DatabaseMatch::Oid(oid)| ended.end.db_oid == Some(*oid))
    }

    /// The rest.
    pub(super) fn takes(&self, transaction: &Transaction) -> bool {
        let is = |relation: &&NamedRelation| self.relation.as_ref().is_none_or(|r| r.is(relation));
        let Transaction { dropped, truncated, created, rewritten, .. } = transaction;
        if self.dropped || self.truncated {
            return self.dropped && dropped.iter().any(|r| is(&r))
                || self.truncated && truncated.iter().any(|r| is(&r));
        }
        let touched = transaction
            .relations
            .iter()
            .map(|r| NamedRelation { relation: r.work.relation, name: r.name.clone() });
        self.relation.is_none()
            || [dropped, truncated, created, rewritten].into_iter().flatten().any(|r| is(&r))
            || touched.into_iter().any(|r| is(&&r))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{info, segment_name};
    use waltide_format::archive::Ending;

    fn at(micros: i64) -> TimestampTz {
        TimestampTz::from_postgres_micros(micros)
    }

    #[test]
    fn a_segment_is_left_out_only_where_no_wanted_end_can_be_in_it() {
        let mut segment = info(7, segment_name(3), Ending::Full);
        let since = LogFilter { since: Some(at(50)), ..LogFilter::default() };
        let until = LogFilter { until: Some(at(50)), ..LogFilter::default() };
        assert!(LogFilter::default().may_end_in(&segment), "nobody said what is wanted");
        assert!(!since.may_end_in(&segment), "nothing ends here");
        (segment.continued_bytes, segment.head_joined) = (10, false);
        assert!(since.may_end_in(&segment), "a commit may run over the edge");
        (segment.min_time, segment.max_time) = (Some(at(10)), Some(at(40)));
        assert!(!since.may_end_in(&segment) && until.may_end_in(&segment));
        segment.max_time = Some(at(60));
        assert!(since.may_end_in(&segment) && until.may_end_in(&segment), "clocks step back");
        segment.min_time = Some(at(51));
        assert!(!until.may_end_in(&segment));
    }

    #[test]
    fn relations_are_read_as_they_are_shown() {
        let files = RelFileLocator { spc_oid: 1663, db_oid: 5, rel_number: 16384 };
        assert_eq!("1663/5/16384".parse(), Ok(RelationMatch::Files(files)));
        assert_eq!("16384".parse(), Ok(RelationMatch::Number(16384)));
        let err = "a/b".parse::<RelationMatch>().unwrap_err();
        assert_eq!(err, "\"a/b\" is no relation: say 16384 or 1663/5/16384, as `waltide log` shows it");
    }
}
