//! Which table is which file, and what became of each table, at every moment that was followed.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::fate::{Commit, Fate, Fates};
use super::follow::Version;
use super::row::{ClassRow, DatabaseRow, InheritsRow, NamespaceRow, Row};
use super::table_name::TableName;
use super::tuple::Hint;
use crate::ids::{Lsn, Oid, RelFileLocator, Xid};

/// `relkind` of a TOAST table.
const KIND_TOAST: u8 = b't';

/// What a row said for a while.
#[derive(Debug, Clone)]
pub(super) struct Span<R> {
    pub(super) row: R,
    /// The commit that made it so; none where it was so before the log that was read.
    pub(super) from: Option<Commit>,
    /// The commit that ended it; none where the log ends first.
    pub(super) to: Option<Commit>,
    /// Where a database became invalid, before the commit that ended it.
    pub(super) invalid_from: Option<Lsn>,
}

impl<R> Span<R> {
    /// Whether anybody but its own transaction ever saw it.
    pub(super) fn was_seen(&self) -> bool {
        match (&self.from, &self.to) {
            (Some(from), Some(to)) => from.start != to.start,
            _ => true,
        }
    }

    /// Where it began; zero for before the log.
    pub(super) fn begin(&self) -> Lsn {
        self.from.map_or(Lsn::ZERO, |commit| commit.start)
    }

    /// Whether it was so for all just before the record that starts at `at`.
    pub(super) fn holds_before(&self, at: Lsn) -> bool {
        self.was_seen()
            && self.from.is_none_or(|from| from.start < at)
            && self.to.is_none_or(|to| to.start >= at)
    }
}

/// What the rows of one object said, in order.
pub(super) type Spans<R> = Vec<Span<R>>;

/// A relation that a file belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedRelation {
    /// `pg_class.oid`.
    pub oid: Oid,
    /// `relkind`.
    pub kind: u8,
    /// Its name.
    pub name: TableName,
    /// The table whose long values it holds, where it is a TOAST table.
    pub toast_of: Option<TableName>,
}

/// Names at every moment from a base backup on, as far as the log was followed.
#[derive(Debug, Clone)]
pub struct Names {
    start: Lsn,
    pub(super) relations: BTreeMap<(Oid, Oid), Spans<ClassRow>>,
    pub(super) namespaces: BTreeMap<(Oid, Oid), Spans<NamespaceRow>>,
    pub(super) databases: BTreeMap<Oid, Spans<DatabaseRow>>,
    /// Database and child: what it belonged to, where that was followed.
    pub(super) parents: BTreeMap<(Oid, Oid), Spans<InheritsRow>>,
    /// Database and file number: the relations that ever had it.
    pub(super) by_file: HashMap<(Oid, Oid), Vec<Oid>>,
    /// Database and TOAST table: its table.
    toast: HashMap<(Oid, Oid), Oid>,
    /// Database and file number of mapped catalogues.
    mapped: BTreeMap<(Oid, Oid), Oid>,
    /// Tables that a transaction emptied after it had already given them a new file: commit, database, file.
    pub(super) cut: HashSet<(Lsn, Oid, Oid)>,
    /// Where the files of databases went.
    pub(super) dropped: Vec<(Lsn, Oid)>,
    /// Databases that were copied file by file into others: from and to.
    copied: Vec<(Oid, Oid)>,
}

impl Names {
    pub(super) fn new(
        start: Lsn,
        versions: impl Iterator<Item = Version>,
        fates: &Fates,
        mapped: BTreeMap<(Oid, Oid), Oid>,
        cut: &[(Xid, RelFileLocator)],
        dropped: &[(Lsn, Oid)],
        copied: Vec<(Oid, Oid)>,
    ) -> Self {
        let mut names = Self {
            start,
            relations: BTreeMap::new(),
            namespaces: BTreeMap::new(),
            databases: BTreeMap::new(),
            parents: BTreeMap::new(),
            by_file: HashMap::new(),
            toast: HashMap::new(),
            mapped,
            cut: HashSet::new(),
            dropped: dropped.to_vec(),
            copied,
        };
        for (xid, file) in cut {
            if let Fate::At(lsn) = fates.of(*xid, Hint::Unknown, Lsn::ZERO) {
                names.cut.insert((lsn, file.db_oid, file.rel_number));
            }
        }
        for version in versions {
            names.add(version, fates);
        }
        names.sort();
        names
    }

    fn add(&mut self, version: Version, fates: &Fates) {
        let commit = |fate: Fate| match fate {
            Fate::At(start) => fates.commit(start).copied(),
            Fate::Before | Fate::Never => None,
        };
        let begun = fates.of(version.xmin, version.xmin_hint, version.seen);
        let ended = version.end.map(|(xid, hint, seen)| fates.of(xid, hint, seen));
        // What never was and what was over when the log begins is nothing to us.
        if begun == Fate::Never || ended == Some(Fate::Before) {
            return;
        }
        let (from, to, invalid_from) = (commit(begun), ended.and_then(commit), version.invalid_from);
        let database = version.database;
        match version.row {
            Row::Class(row) => {
                if row.file != 0 {
                    self.by_file.entry((database, row.file)).or_default().push(row.oid);
                }
                if row.toast != 0 {
                    self.toast.insert((database, row.toast), row.oid);
                }
                let spans = self.relations.entry((database, row.oid)).or_default();
                spans.push(Span { row, from, to, invalid_from });
            }
            Row::Namespace(row) => {
                let spans = self.namespaces.entry((database, row.oid)).or_default();
                spans.push(Span { row, from, to, invalid_from });
            }
            Row::Database(row) => {
                self.databases.entry(row.oid).or_default().push(Span { row, from, to, invalid_from });
            }
            Row::Inherits(row) => {
                let spans = self.parents.entry((database, row.child)).or_default();
                spans.push(Span { row, from, to, invalid_from });
            }
        }
    }

    /// Puts spans in order. They came as they were seen, which is the order within a transaction.
    fn sort(&mut self) {
        fn by_begin<R: PartialEq>(spans: &mut Spans<R>) {
            spans.sort_by_key(|span| (span.begin(), span.was_seen()));
            // A page that was newer than the log is told again by the log.
            spans.dedup_by(|a, b| a.row == b.row && a.from == b.from && a.to == b.to);
        }
        self.relations.values_mut().for_each(by_begin);
        self.namespaces.values_mut().for_each(by_begin);
        self.databases.values_mut().for_each(by_begin);
        self.parents.values_mut().for_each(by_begin);
        for oids in self.by_file.values_mut() {
            oids.sort_unstable();
            oids.dedup();
        }
    }

    /// Where the log that was followed begins: names are known from there on.
    pub const fn start(&self) -> Lsn {
        self.start
    }

    /// The relation that a file belongs to when the record at `at` starts or, where that commits it, ends.
    pub fn of_file(&self, file: RelFileLocator, at: Lsn) -> Option<NamedRelation> {
        let known = self.by_file.get(&(file.db_oid, file.rel_number));
        let mut found: Option<(&Span<ClassRow>, u8)> = None;
        for oid in known.into_iter().flatten() {
            let spans = self.relations.get(&(file.db_oid, *oid)).into_iter().flatten();
            for span in spans.filter(|span| self.is_file(span, file)) {
                // What all saw comes first, then what only its transaction saw, then what was not yet.
                let rank = match (span.begin() <= at, span.was_seen()) {
                    (true, true) => 2,
                    (true, false) => 1,
                    (false, _) => 0,
                };
                let better = found.is_none_or(|(best, best_rank)| {
                    let later = (rank, span.begin()) >= (best_rank, best.begin());
                    if rank == 0 { rank == best_rank && span.begin() < best.begin() } else { later }
                });
                if better {
                    found = Some((span, rank));
                }
            }
        }
        if let Some((span, _)) = found {
            return Some(self.named(file.db_oid, &span.row, at));
        }
        let oid = *self.mapped.get(&(file.db_oid, file.rel_number))?;
        self.mapped_relation(file.db_oid, oid, at)
    }

    /// A database's name when the record at `at` starts, else just after it, else the last it had.
    pub fn database(&self, oid: Oid, at: Lsn) -> Option<&str> {
        let spans = self.databases.get(&oid)?;
        let held = |lsn| spans.iter().rev().find(|span| span.holds_before(lsn));
        let span = held(at).or_else(|| held(at.saturating_add(1))).or(spans.last())?;
        Some(&span.row.name)
    }

    /// The files that ever were those of a relation that is wanted by its OID or by a name it may have had, with those of
    /// its TOAST table: each by database and number. More than were so called at one time, never fewer.
    pub fn files_where(&self, wanted: impl Fn(Oid, &TableName) -> bool) -> BTreeSet<(Oid, Oid)> {
        let mut files = BTreeSet::new();
        let is_wanted = |database: Oid, oid: Oid, spans: &Spans<ClassRow>| {
            spans.iter().any(|span| self.names_of(database, &span.row).iter().any(|name| wanted(oid, name)))
        };
        for ((database, oid), spans) in &self.relations {
            if !is_wanted(*database, *oid, spans) {
                continue;
            }
            self.add_files(*database, *oid, spans, &mut files);
            let toasts: BTreeSet<Oid> =
                spans.iter().map(|s| s.row.toast).filter(|toast| *toast != 0).collect();
            for toast in toasts {
                if let Some(spans) = self.relations.get(&(*database, toast)) {
                    self.add_files(*database, toast, spans, &mut files);
                }
            }
        }
        files
    }

    fn add_files(&self, database: Oid, oid: Oid, spans: &Spans<ClassRow>, files: &mut BTreeSet<(Oid, Oid)>) {
        files.extend(spans.iter().map(|s| s.row.file).filter(|file| *file != 0).map(|file| (database, file)));
        // A mapped catalogue, which all databases may share.
        let mapped =
            self.mapped.iter().filter(|((place, _), of)| **of == oid && [0, database].contains(place));
        files.extend(mapped.map(|(file, _)| *file));
    }

    /// Every name that a relation may have had while its row was this one.
    pub(super) fn names_of(&self, database: Oid, row: &ClassRow) -> Vec<TableName> {
        fn all<R>(spans: Option<&Spans<R>>, number: Oid, name: impl Fn(&R) -> &String) -> BTreeSet<String> {
            let known = spans.into_iter().flatten().map(|span| name(&span.row).clone());
            let mut names: BTreeSet<String> = known.collect();
            if names.is_empty() {
                names.insert(number.to_string());
            }
            names
        }
        let databases = all(self.databases.get(&database), database, |row| &row.name);
        let schemas = all(self.namespaces.get(&(database, row.namespace)), row.namespace, |row| &row.name);
        let name = |(database, schema): (&String, &String)| TableName {
            database: database.clone(),
            schema: schema.clone(),
            table: row.name.clone(),
        };
        databases.iter().flat_map(|d| schemas.iter().map(move |s| name((d, s)))).collect()
    }

    /// The databases that ever were called so.
    pub fn databases_named(&self, name: &str) -> BTreeSet<Oid> {
        let is_so = |spans: &Spans<DatabaseRow>| spans.iter().any(|span| span.row.name == name);
        self.databases.iter().filter(|(_, spans)| is_so(spans)).map(|(oid, _)| *oid).collect()
    }

    /// Databases, and those that they were copied from file by file, directly or not, since the log began: such a copy
    /// has what lay in the other's files, of which the log says nothing.
    pub fn with_sources(&self, databases: impl IntoIterator<Item = Oid>) -> BTreeSet<Oid> {
        let mut found: BTreeSet<Oid> = databases.into_iter().collect();
        // A copy of a copy comes later.
        for (from, to) in self.copied.iter().rev() {
            if found.contains(to) {
                found.insert(*from);
            }
        }
        found
    }

    /// The numbers of all files that mapped catalogues of a database ever lay in.
    pub(super) fn mapped_files(&self, database: Oid) -> impl Iterator<Item = Oid> + '_ {
        self.mapped.range((database, 0)..=(database, Oid::MAX)).map(|((_, file), _)| *file)
    }

    fn is_file(&self, span: &Span<ClassRow>, file: RelFileLocator) -> bool {
        let row = &span.row;
        let own = || self.databases.get(&file.db_oid).into_iter().flatten();
        row.file == file.rel_number
            && match row.tablespace {
                0 => {
                    !self.databases.contains_key(&file.db_oid)
                        || own().any(|span| span.row.tablespace == file.spc_oid)
                }
                tablespace => tablespace == file.spc_oid,
            }
    }

    /// A mapped catalogue; a shared one stands in every database's pg_class.
    fn mapped_relation(&self, database: Oid, oid: Oid, at: Lsn) -> Option<NamedRelation> {
        let shared = || self.relations.iter().find(|((_, found), _)| *found == oid);
        let own = self.relations.get_key_value(&(database, oid));
        let ((found_in, _), spans) = if database == 0 { shared()? } else { own? };
        let span = spans.iter().rev().find(|span| span.begin() <= at).or(spans.first())?;
        Some(self.named(*found_in, &span.row, at))
    }

    fn named(&self, database: Oid, row: &ClassRow, at: Lsn) -> NamedRelation {
        let after = at.saturating_add(1);
        let name = self.name(database, row, at, after);
        let owner = (row.kind == KIND_TOAST).then(|| self.toast.get(&(database, row.oid))).flatten();
        let owner = owner.and_then(|oid| {
            let spans = self.relations.get(&(database, *oid))?;
            spans.iter().rev().find(|span| span.begin() <= at && span.row.toast == row.oid).or(spans.last())
        });
        let toast_of = owner.map(|span| self.name(database, &span.row, at, after));
        NamedRelation { oid: row.oid, kind: row.kind, name, toast_of }
    }

    /// A relation's full name: its schema and database as they were just before the record at `before`, else just before
    /// the one at `after`, else as they ever were.
    pub(super) fn name(&self, database: Oid, row: &ClassRow, before: Lsn, after: Lsn) -> TableName {
        fn pick<R>(spans: Option<&Spans<R>>, before: Lsn, after: Lsn) -> Option<&R> {
            let spans = spans?;
            let at = |lsn| spans.iter().rev().find(|span| span.holds_before(lsn));
            at(before).or_else(|| at(after)).or(spans.last()).map(|span| &span.row)
        }
        let schema = pick(self.namespaces.get(&(database, row.namespace)), before, after);
        let database_row = pick(self.databases.get(&database), before, after);
        TableName {
            database: database_row.map_or_else(|| database.to_string(), |row| row.name.clone()),
            schema: schema.map_or_else(|| row.namespace.to_string(), |row| row.name.clone()),
            table: row.name.clone(),
        }
    }
}
