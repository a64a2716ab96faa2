//! What indexes show of wanted transactions, so that segments in which none can end are passed over.
//!
//! Each thing that is asked for looks for its own signs, and a transaction that has it all leaves a sign of each: where
//! it ends, or where it did something. What it did, it did before it ended, and running-xacts records say by when all
//! have ended that wrote up to a place.

use std::collections::BTreeSet;

use waltide_format::archive::{CommitKind, FileEvent, FileEventKind, SegmentIndex, SegmentInfo};
use waltide_format::{ForkNumber, Lsn, Oid, RelFileLocator, Xid};

use super::filter::{DatabaseMatch, LogFilter, RelationMatch};
use super::join::UNCLAIMED_SEGMENTS;

/// What a relation or a database that is asked for may have been at any time: rather too much than too little.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meant {
    /// Files, by database and number.
    pub files: BTreeSet<(Oid, Oid)>,
    /// Start and end of the records that committed what became of tables.
    pub commits: Vec<(Lsn, Lsn)>,
    /// Databases.
    pub databases: BTreeSet<Oid>,
}

/// What is looked for in segments' indexes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Question {
    /// The end of this transaction.
    pub xid: Option<Xid>,
    /// Work on these relations, if any are asked for.
    pub relations: Option<WantedRelations>,
    /// Which database transactions were in, not only what went with them.
    pub databases: bool,
}

/// Relations that are asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WantedRelations {
    files: BTreeSet<(Oid, Oid)>,
    number: Option<Oid>,
    databases: BTreeSet<Oid>,
}

impl WantedRelations {
    /// Whether a database is one of those that all relations of are asked for.
    pub fn has_database(&self, oid: Oid) -> bool {
        self.databases.contains(&oid)
    }

    /// Whether it is one of them.
    pub fn has(&self, relation: RelFileLocator) -> bool {
        self.files.contains(&(relation.db_oid, relation.rel_number))
            || self.number == Some(relation.rel_number)
            || self.databases.contains(&relation.db_oid)
    }
}

/// What is known of a segment without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// What of its index was asked for: ends, what happened to files, the relations asked for that it touches, without
    /// their blocks.
    pub index: SegmentIndex,
    /// Whether the transaction that is asked for may end in it.
    pub may_end: bool,
}

/// What a segment shows of transactions that have one of the things that are asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Sign {
    /// One may end here.
    pub(super) end: bool,
    /// One may have worked here: it ends here or later.
    pub(super) work: bool,
    /// And it may have had no number yet.
    pub(super) unclaimed: bool,
}

/// How many segments later a transaction may get its number whose file was made in one.
pub(super) const CLAIMED_WITHIN: usize = UNCLAIMED_SEGMENTS as usize - 1;

/// A thing that is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Criterion {
    /// This transaction.
    Xid(Xid),
    /// That relations went, any.
    Loss,
    /// That relations went, these.
    LossOf(WantedRelations, Vec<(Lsn, Lsn)>),
    /// Anything done to these relations.
    WorkOn(WantedRelations, Vec<(Lsn, Lsn)>),
    /// In these databases.
    In(WantedRelations),
}

impl Criterion {
    /// Whether what was done long before a transaction's end can be its sign.
    pub(super) const fn looks_at_work(&self, filter: &LogFilter) -> bool {
        match self {
            Self::Xid(_) => false,
            Self::LossOf(..) => filter.truncated,
            Self::Loss | Self::WorkOn(..) | Self::In(_) => true,
        }
    }

    /// What a segment shows of it that may hold anything.
    pub(super) const fn any(&self, filter: &LogFilter) -> Sign {
        let work = self.looks_at_work(filter);
        Sign { end: true, work, unclaimed: work }
    }

    /// What a segment shows of it.
    pub(super) fn sign(&self, filter: &LogFilter, index: &SegmentIndex) -> Sign {
        let info = &index.info;
        // What was joined nowhere stands in no index.
        if info.continued_bytes > 0 && !info.head_joined {
            return self.any(filter);
        }
        let mut sign = Sign::default();
        let ends = || index.xacts.iter().filter(|end| filter.may_be(end));
        match self {
            Self::Xid(_) => sign.end = ends().next().is_some(),
            Self::Loss => {
                sign.end = ends().any(|end| !end.dropped.is_empty());
                // The commit that ends a database lists no files.
                let gone =
                    |e: &FileEvent| filter.dropped && matches!(e.kind, FileEventKind::DatabaseDrop { .. });
                let cut = |e: &FileEvent| filter.truncated && emptied(e).is_some();
                sign.work = index.file_events.iter().any(|e| gone(e) || cut(e));
            }
            Self::LossOf(relations, commits) => {
                let gone = |file: &RelFileLocator| relations.has(*file);
                sign.end = ends().any(|end| end.dropped.iter().any(gone)) || is_in(commits, info);
                let ours = |e: &FileEvent| emptied(e).is_some_and(|file| relations.has(file));
                sign.work = filter.truncated && index.file_events.iter().any(ours);
            }
            Self::WorkOn(relations, commits) => {
                let gone = |file: &RelFileLocator| relations.has(*file);
                sign.end = ends().any(|end| end.dropped.iter().any(gone)) || is_in(commits, info);
                sign.work = index.blocks.iter().any(|fork| relations.has(fork.relation));
                for event in &index.file_events {
                    if made(event).is_some_and(|file| relations.has(file)) {
                        sign.work = true;
                        sign.unclaimed |= event.xid.is_invalid();
                    }
                }
            }
            Self::In(relations) => {
                let here = |db_oid: Option<Oid>| db_oid.is_some_and(|oid| relations.databases.contains(&oid));
                let mut ours = index.xacts.iter().filter(|end| here(end.db_oid));
                sign.end = ours.clone().next().is_some();
                sign.work = ours.any(|end| end.kind == CommitKind::Prepare)
                    || index.blocks.iter().any(|fork| relations.has(fork.relation));
            }
        }
        sign
    }
}

/// A relation that a transaction cut to no block.
fn emptied(event: &FileEvent) -> Option<RelFileLocator> {
    match event.kind {
        FileEventKind::Truncate { relation, blocks: 0, .. } if !event.xid.is_invalid() => Some(relation),
        _ => None,
    }
}

/// A relation whose file was made.
const fn made(event: &FileEvent) -> Option<RelFileLocator> {
    match event.kind {
        FileEventKind::Create { relation, fork: ForkNumber::Main | ForkNumber::Init } => Some(relation),
        _ => None,
    }
}

/// Whether a file was made in a segment by a transaction that had no number yet.
pub(super) fn makes_unclaimed(index: &SegmentIndex) -> bool {
    index.file_events.iter().any(|event| event.xid.is_invalid() && made(event).is_some())
}

/// Whether a part of such a record lies in a segment.
fn is_in(records: &[(Lsn, Lsn)], info: &SegmentInfo) -> bool {
    let (Some(begin), Some(end)) = (info.name.start(info.size), info.name.end(info.size)) else {
        return true;
    };
    records.iter().any(|(from, to)| *from < end && *to > begin)
}

impl LogFilter {
    /// What is meant whatever the names are.
    pub(crate) fn meant_by_number(&self) -> Meant {
        let mut meant = Meant::default();
        if let Some(RelationMatch::Files(file)) = &self.relation {
            meant.files.insert((file.db_oid, file.rel_number));
        }
        if let Some(DatabaseMatch::Oid(oid)) = &self.database {
            meant.databases.insert(*oid);
        }
        meant
    }

    /// The things that are asked for that leave signs in indexes, where it is known what they mean.
    pub(super) fn criteria(&self, meant: Option<&Meant>) -> Vec<Criterion> {
        let mut criteria: Vec<_> = self.xid.map(Criterion::Xid).into_iter().collect();
        let is_loss = self.dropped || self.truncated;
        let relations = self.relation.is_some().then_some(meant).flatten().map(|meant| {
            let number = self.relation.as_ref().and_then(RelationMatch::number);
            let relations =
                WantedRelations { files: meant.files.clone(), number, databases: BTreeSet::new() };
            (relations, meant.commits.clone())
        });
        criteria.extend(match (relations, is_loss) {
            (Some((relations, commits)), true) => Some(Criterion::LossOf(relations, commits)),
            (Some((relations, commits)), false) => Some(Criterion::WorkOn(relations, commits)),
            (None, true) => Some(Criterion::Loss),
            (None, false) => None,
        });
        if let (Some(_), Some(meant)) = (&self.database, meant) {
            let databases = meant.databases.clone();
            criteria.push(Criterion::In(WantedRelations { databases, ..WantedRelations::default() }));
        }
        criteria
    }
}

impl Question {
    /// What must be known of segments to look for the signs of all that is asked for.
    pub(super) fn of(criteria: &[Criterion]) -> Self {
        let mut question = Self::default();
        for criterion in criteria {
            match criterion {
                Criterion::Xid(xid) => question.xid = Some(*xid),
                Criterion::Loss | Criterion::LossOf(..) => {}
                Criterion::WorkOn(relations, _) => question.add(relations),
                Criterion::In(relations) => {
                    question.add(relations);
                    question.databases = true;
                }
            }
        }
        question
    }

    fn add(&mut self, more: &WantedRelations) {
        let relations = self.relations.get_or_insert_default();
        relations.files.extend(&more.files);
        relations.number = relations.number.or(more.number);
        relations.databases.extend(&more.databases);
    }
}
