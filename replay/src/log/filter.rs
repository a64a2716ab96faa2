//! Which transactions are wanted, and which segments cannot hold the end of one.

use std::str::FromStr;

use waltide_format::archive::{SegmentInfo, XactEnd};
use waltide_format::engines::postgres::catalogue::{TableEvent, TableName, TablePattern, TablePatternError};
use waltide_format::{Oid, RelFileLocator, TimestampTz, Xid};

use super::join::{Effects, Ended};
use super::transaction::{NamedRelation, TableFate, TableFateKind, Transaction};

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
    /// By name. Of a TOAST table, its table's is meant too.
    Name(TablePattern),
}

/// How a database is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DatabaseMatch {
    /// By its OID.
    Oid(Oid),
    /// By name.
    Name(String),
}

impl RelationMatch {
    fn is(&self, relation: &NamedRelation) -> bool {
        match self {
            Self::Files(files) => relation.relation == *files,
            Self::Number(number) => {
                relation.relation.rel_number == *number
                    || relation.name.as_ref().is_some_and(|name| name.oid == *number)
            }
            Self::Name(pattern) => relation.name.as_ref().is_some_and(|known| {
                pattern.matches(&known.name) || known.toast_of.as_ref().is_some_and(|t| pattern.matches(t))
            }),
        }
    }

    fn is_table(&self, fate: &TableFate) -> bool {
        match self {
            Self::Files(_) => false,
            Self::Number(number) => fate.oid == *number,
            Self::Name(pattern) => {
                pattern.matches(&fate.name) || fate.to.as_ref().is_some_and(|to| pattern.matches(to))
            }
        }
    }

    /// Whether it can only be found where names are known.
    const fn is_name(&self) -> bool {
        matches!(self, Self::Name(_))
    }

    /// The number that its files, or it, may have.
    pub(super) const fn number(&self) -> Option<Oid> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Files(_) | Self::Name(_) => None,
        }
    }

    /// Whether a relation is meant that had this number, and this name at some time, or is the TOAST table of such a one.
    pub(crate) fn may_be(&self, oid: Oid, name: &TableName) -> bool {
        match self {
            Self::Files(_) => false,
            Self::Number(number) => *number == oid,
            Self::Name(pattern) => pattern.matches(name),
        }
    }

    /// Whether what became of a table became of one that is meant.
    pub(crate) fn has_event(&self, event: &TableEvent) -> bool {
        self.is_table(&TableFate::from(event))
    }
}

impl FromStr for RelationMatch {
    type Err = TablePatternError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let number = s.parse().map(Self::Number);
        let files = number.ok().or_else(|| s.parse().ok().map(Self::Files));
        files.map_or_else(|| s.parse().map(Self::Name), Ok)
    }
}

impl FromStr for DatabaseMatch {
    type Err = std::convert::Infallible;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Ok(s.parse().map_or_else(|_| Self::Name(s.to_owned()), Self::Oid))
    }
}

impl DatabaseMatch {
    /// Whether it can only be found where names are known.
    const fn is_name(&self) -> bool {
        matches!(self, Self::Name(_))
    }
}

impl LogFilter {
    /// Whether it asks for a name, so that nothing is found where names are not known.
    pub fn needs_names(&self) -> bool {
        self.relation.as_ref().is_some_and(RelationMatch::is_name)
            || self.database.as_ref().is_some_and(DatabaseMatch::is_name)
    }

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
            _ => info.continued_bytes > 0 && !info.head_joined,
        }
    }

    /// Whether it asks for a range of times, or for what indexes say without merged ones.
    pub(super) const fn is_narrow(&self) -> bool {
        self.since.is_some() || self.until.is_some() || self.needs_index()
    }

    /// Whether segments' own indexes are worth reading for what they say, where no merged index tells it: all of them
    /// are, for what few transactions do.
    pub(super) const fn needs_index(&self) -> bool {
        self.xid.is_some() || (self.dropped && !self.truncated)
    }

    /// What can be told of an end.
    pub(super) fn may_be(&self, end: &XactEnd) -> bool {
        let is_wanted = |xid: Xid| end.xid == xid || end.subxacts.contains(&xid);
        end.kind.is_end()
            && self.covers(end.time)
            && self.xid.is_none_or(is_wanted)
            && (self.aborted || end.kind.is_commit())
    }

    /// What can be told before names are looked up.
    pub(super) fn wants(&self, ended: &Ended) -> bool {
        self.may_be(&ended.end)
            && self.larger_than.is_none_or(|bytes| ended.work.volume.wal_bytes > bytes)
            && match &self.database {
                Some(DatabaseMatch::Oid(oid)) => ended.end.db_oid == Some(*oid),
                Some(DatabaseMatch::Name(_)) | None => true,
            }
    }

    /// Whether the files that it made and removed may be those of a relation that it dropped or emptied.
    pub(super) fn may_take_files(&self, ended: &Ended) -> bool {
        let Effects { made, dropped_databases, .. } = &ended.effects;
        let gone = !ended.end.dropped.is_empty();
        !(self.dropped || self.truncated)
            || (self.dropped && (gone || !dropped_databases.is_empty()))
            || (self.truncated && (gone || !made.is_empty()))
    }

    /// The rest.
    pub(super) fn takes(&self, transaction: &Transaction) -> bool {
        if let Some(DatabaseMatch::Name(name)) = &self.database
            && transaction.database_name.as_ref() != Some(name)
        {
            return false;
        }
        let is = |r: &NamedRelation| self.relation.as_ref().is_none_or(|wanted| wanted.is(r));
        let is_table = |t: &TableFate| self.relation.as_ref().is_none_or(|wanted| wanted.is_table(t));
        let Transaction { dropped, truncated, created, rewritten, tables, .. } = transaction;
        let became = |kind| tables.iter().any(|t: &TableFate| t.event == kind && is_table(t));
        if self.dropped || self.truncated {
            let database_went = self.relation.is_none() && !transaction.dropped_databases.is_empty();
            let dropped = dropped.iter().any(is) || became(TableFateKind::Dropped) || database_went;
            let truncated = truncated.iter().any(is) || became(TableFateKind::Truncated);
            return self.dropped && dropped || self.truncated && truncated;
        }
        let touched = |r: &super::transaction::RelationDone| {
            is(&NamedRelation { relation: r.work.relation, name: r.name.clone() })
        };
        self.relation.is_none()
            || tables.iter().any(is_table)
            || [dropped, truncated, created, rewritten].into_iter().flatten().any(is)
            || transaction.relations.iter().any(touched)
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
        assert!(!LogFilter::default().is_narrow() && since.is_narrow());
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
        let by_name = "shop.public.orders".parse::<RelationMatch>().unwrap();
        assert!(by_name.is_name() && !"16384".parse::<RelationMatch>().unwrap().is_name());
        assert!("a.b.c.d".parse::<RelationMatch>().is_err());
        assert_eq!("5".parse(), Ok(DatabaseMatch::Oid(5)));
    }
}
