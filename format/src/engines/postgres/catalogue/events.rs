//! What became of tables: made, renamed, moved to new files, emptied, dropped.

use std::collections::BTreeSet;

use super::fate::Commit;
use super::names::{Names, Span, Spans};
use super::row::{ClassRow, DatabaseRow};
use super::table_name::TableName;
use crate::ids::{Lsn, Oid};

/// What became of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TableEventKind {
    /// It was made.
    Created,
    /// It got another name, or went to another schema.
    Renamed {
        /// Its name from then on.
        to: TableName,
    },
    /// It moved to a new file with its rows, as VACUUM FULL, CLUSTER and some of ALTER TABLE do.
    Rewritten,
    /// TRUNCATE emptied it.
    Truncated,
    /// It was dropped.
    Dropped {
        /// Whether with its whole database.
        with_database: bool,
    },
}

/// Something that became of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableEvent {
    /// What.
    pub kind: TableEventKind,
    /// The table, by the name it had before.
    pub table: TableName,
    /// The database's OID.
    pub database: Oid,
    /// `pg_class.oid`.
    pub oid: Oid,
    /// `relkind`.
    pub relkind: u8,
    /// The transaction that did it.
    pub commit: Commit,
    /// Where recovery must stop so that it did not happen: before the record that starts here. It is the commit record,
    /// but for a database's end, which does not wait for one.
    pub before: Lsn,
}

/// Whether people know it by name and can miss it: tables, partitioned and foreign ones, views, sequences; not indexes,
/// TOAST tables, types, or what is a session's own.
pub(super) fn is_table(row: &ClassRow) -> bool {
    matches!(row.kind, b'r' | b'p' | b'm' | b'v' | b'f' | b'S')
        && row.persistence != b't'
        && row.rewrites == 0
}

impl Names {
    /// Everything that became of tables, in LSN order.
    pub fn table_events(&self) -> Vec<TableEvent> {
        let mut events = Vec::new();
        for ((database, oid), spans) in &self.relations {
            self.relation_events(*database, *oid, spans, &mut events);
        }
        events.sort_by(|a, b| (a.before, &a.table).cmp(&(b.before, &b.table)));
        events
    }

    /// The tables that are there where the log that was followed ends.
    pub fn tables(&self) -> impl Iterator<Item = TableName> + '_ {
        let gone = |database: &Oid| {
            self.databases.get(database).is_some_and(|spans| spans.iter().all(|span| span.to.is_some()))
        };
        let there = self.relations.iter().filter(move |((database, _), _)| !gone(database));
        there.filter_map(|((database, _), spans)| {
            let span = spans.iter().rev().find(|span| span.to.is_none() && is_table(&span.row))?;
            Some(self.name(*database, &span.row, Lsn::MAX, Lsn::MAX))
        })
    }

    fn relation_events(
        &self,
        database: Oid,
        oid: Oid,
        spans: &Spans<ClassRow>,
        events: &mut Vec<TableEvent>,
    ) {
        let seen: Vec<_> = spans.iter().filter(|span| span.was_seen()).collect();
        if !seen.iter().any(|span| is_table(&span.row)) {
            return;
        }
        let mut push = |kind, row: &ClassRow, commit: Commit, before: Lsn, at: Lsn| {
            let table = self.name(database, row, at, at.saturating_add(1));
            events.push(TableEvent { kind, table, database, oid, relkind: row.kind, commit, before });
        };
        let end = self.database_end(database);
        // A copied database has its template's rows, and what became of those came before it.
        let made = self.databases.get(&database).and_then(|spans| spans.first()).and_then(|span| span.from);
        let lived = |commit: &Commit| {
            made.is_none_or(|made| made.start <= commit.start)
                && end.is_none_or(|(to, _)| commit.start < to.start)
        };
        if let Some(first) = seen.first()
            && let Some(commit) = first.from.filter(lived)
        {
            push(TableEventKind::Created, &first.row, commit, commit.start, commit.start);
        }
        for (number, span) in seen.iter().enumerate() {
            let Some(commit) = span.to.filter(lived) else { continue };
            let next = seen.get(number.saturating_add(1));
            let Some(next) = next.filter(|next| next.from.is_some_and(|from| from.start == commit.start))
            else {
                // The number of what was dropped may be given again.
                let kind = TableEventKind::Dropped { with_database: false };
                push(kind, &span.row, commit, commit.start, commit.start);
                if let Some(next) = next
                    && let Some(made) = next.from.filter(lived)
                {
                    push(TableEventKind::Created, &next.row, made, made.start, made.start);
                }
                continue;
            };
            if (&next.row.name, next.row.namespace) != (&span.row.name, span.row.namespace) {
                let after = commit.start.saturating_add(1);
                let to = self.name(database, &next.row, after, after);
                push(TableEventKind::Renamed { to }, &span.row, commit, commit.start, commit.start);
            }
            if (next.row.file, next.row.tablespace) != (span.row.file, span.row.tablespace) {
                let kind = match self.was_truncated(database, oid, span, next, &commit) {
                    true => TableEventKind::Truncated,
                    false => TableEventKind::Rewritten,
                };
                push(kind, &span.row, commit, commit.start, commit.start);
            }
        }
        if let (Some((commit, before)), Some(last)) = (end, seen.last())
            && last.to.is_none_or(|to| to.start >= commit.start)
            && last.from.is_none_or(|from| from.start < commit.start)
        {
            push(TableEventKind::Dropped { with_database: true }, &last.row, commit, before, before);
        }
    }

    /// Whether one of the new files that a transaction gave a table came without a rewrite, or was cut to nothing.
    ///
    /// A rewrite fills the new file as a table of its own, `pg_temp_<oid>`, and then swaps: both had both files. What
    /// cannot be reached by such swaps from the old file, nor from one that the table had when it came to another
    /// tablespace, came by TRUNCATE, in whatever order all that happened.
    fn was_truncated(
        &self,
        database: Oid,
        oid: Oid,
        before: &Span<ClassRow>,
        after: &Span<ClassRow>,
        commit: &Commit,
    ) -> bool {
        if !matches!(after.row.kind, b'r' | b'm') {
            return false;
        }
        let made_here = |span: &&Span<ClassRow>| !span.was_seen() && span.begin() == commit.start;
        let spans = self.relations.get(&(database, oid)).into_iter().flatten();
        let rows = spans.filter(made_here).chain([after]).map(|span| &span.row);
        // Files' numbers rise, until they begin anew; rows need not be known in the order they were written.
        let since = |file: Oid| file.wrapping_sub(before.row.file);
        let files: BTreeSet<_> = rows.map(|row| (since(row.file), row.file, row.tablespace)).collect();
        if files.iter().any(|(_, file, _)| self.cut.contains(&(commit.start, database, *file))) {
            return true;
        }
        let mut place = before.row.tablespace;
        let mut reached = BTreeSet::new();
        self.reach(database, oid, before.row.file, commit, &mut reached);
        files.into_iter().any(|(_, file, tablespace)| {
            // One that went to another tablespace was copied there.
            if tablespace != place {
                place = tablespace;
                self.reach(database, oid, file, commit, &mut reached);
            }
            !reached.contains(&file)
        })
    }

    /// Adds a file, and all that rewrites of the table swapped it for.
    fn reach(&self, database: Oid, oid: Oid, file: Oid, commit: &Commit, reached: &mut BTreeSet<Oid>) {
        let mut left = vec![file];
        while let Some(file) = left.pop() {
            if reached.insert(file) {
                left.extend(self.swapped(database, oid, file, commit));
            }
        }
    }

    /// The files that a rewrite of the table swapped for this one, or this one for.
    fn swapped(&self, database: Oid, oid: Oid, file: Oid, commit: &Commit) -> Vec<Oid> {
        let transient = format!("pg_temp_{oid}");
        let for_it = |row: &ClassRow| row.rewrites == oid || row.name == transient;
        let others = self.by_file.get(&(database, file)).into_iter().flatten().filter(|other| **other != oid);
        let spans = others.filter_map(|other| self.relations.get(&(database, *other))).flatten();
        let made_here = |span: &&Span<ClassRow>| !span.was_seen() && span.begin() == commit.start;
        spans.filter(made_here).map(|span| &span.row).filter(|row| for_it(row)).map(|row| row.file).collect()
    }

    /// The commit that ended a database, and where its end began: it is marked and its files go before the commit.
    fn database_end(&self, database: Oid) -> Option<(Commit, Lsn)> {
        let spans: &Spans<DatabaseRow> = self.databases.get(&database)?;
        let last = spans.iter().rev().find(|span| span.was_seen())?;
        let commit = last.to?;
        let gone = self.dropped.iter().filter(|(lsn, oid)| *oid == database && *lsn < commit.start);
        // A database also leaves a tablespace with such a record.
        let began = gone.map(|(lsn, _)| *lsn).filter(|lsn| *lsn > last.begin()).max();
        let before = [Some(commit.start), began, last.invalid_from].into_iter().flatten().min();
        Some((commit, before.unwrap_or(commit.start)))
    }
}
