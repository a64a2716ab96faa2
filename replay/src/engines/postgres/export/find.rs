//! What an operator means, by the names there are at the target.

use std::collections::BTreeSet;

use waltide_format::engines::postgres::catalogue::{
    DatabaseThere, Names, TableEventKind, TableName, TablePattern, TableThere,
};
use waltide_format::{Lsn, Oid};

use super::{ExportError, ExportFormat, ExportTables};
use crate::engines::postgres::selection::Selection;

/// As many names as are worth telling.
const LISTED_MAX: usize = 8;

/// What is exported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) database: String,
    database_oid: Oid,
    /// Whole schemas.
    pub(super) schemas: Vec<String>,
    /// Tables that are named, or lie in the schemas, or in the database where nothing is named.
    pub(super) tables: Vec<TableThere>,
    is_whole: bool,
}

impl Found {
    /// Whether it is a whole database.
    pub(super) const fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// The files that are wanted, as far as names tell.
    pub(super) fn selection(&self, names: &Names) -> Selection {
        let databases = names.with_sources([self.database_oid]);
        if self.is_whole {
            return Selection::databases(databases);
        }
        let tables: BTreeSet<Oid> = self.tables.iter().map(|t| t.oid).collect();
        let files = names.files_of(self.database_oid, &tables);
        Selection::files(databases, files)
    }

    /// What is true, in SQL, of pg_class `c` and pg_namespace `n` for what is exported; nothing for a whole database,
    /// which has everything.
    pub(super) fn condition(&self) -> Option<String> {
        if self.is_whole {
            return None;
        }
        let listed = |items: Vec<String>| items.join(", ");
        Some(match self.schemas.as_slice() {
            [] => {
                let oids = self.tables.iter().map(|t| t.oid.to_string()).collect();
                format!("c.oid in ({})", listed(oids))
            }
            schemas => {
                let names = schemas.iter().map(|s| format!("'{}'", s.replace('\'', "''"))).collect();
                format!("n.nspname in ({}) and c.relkind in ('r', 'p', 'm', 'S', 'v', 'f')", listed(names))
            }
        })
    }
}

/// Finds what is meant at `at`.
pub(super) fn find(
    names: &Names,
    at: Lsn,
    asked: &ExportTables,
    format: ExportFormat,
) -> Result<Found, ExportError> {
    let named = asked.database.as_deref();
    let mut databases: Vec<DatabaseThere<'_>> = names.databases_at(at).collect();
    if let Some(name) = named {
        databases.retain(|d| d.name == name);
        if databases.is_empty() {
            let known: Vec<_> = names.databases_at(at).map(|d| d.name).collect();
            let near = vec![format!("there are {}", known.join(", "))];
            return Err(ExportError::NotFound { what: format!("database {name}"), at, near });
        }
    }
    let is_here = |database: Oid| databases.iter().any(|d| d.oid == database);
    let all: Vec<TableThere> = names.tables_at(at).filter(|t| is_here(t.database)).collect();
    let mut tables = Vec::new();
    for pattern in &asked.tables {
        tables.push(one_table(names, at, &all, pattern)?);
    }
    let mut schemas: Vec<(Oid, String)> = Vec::new();
    for pattern in &asked.schemas {
        let (database, schema) = one_schema(names, at, &databases, pattern)?;
        tables.extend(all.iter().filter(|t| t.database == database && t.name.schema == schema).cloned());
        schemas.push((database, schema));
    }
    let is_whole = asked.tables.is_empty() && asked.schemas.is_empty();
    if is_whole {
        tables.clone_from(&all);
    }
    let lie_in: BTreeSet<Oid> =
        tables.iter().map(|t| t.database).chain(schemas.iter().map(|(database, _)| *database)).collect();
    let lie_in: Vec<DatabaseThere<'_>> = match is_whole {
        true => databases.clone(),
        false => databases.iter().filter(|d| lie_in.contains(&d.oid)).copied().collect(),
    };
    let [database] = lie_in.as_slice() else {
        return Err(ExportError::Databases { found: lie_in.iter().map(|d| d.name.to_owned()).collect() });
    };
    let table = matches!(tables.as_slice(), [table] if matches!(table.kind, b'r' | b'p'));
    if format == ExportFormat::Csv && !(table && schemas.is_empty() && !is_whole) {
        let what = match tables.as_slice() {
            [one] if schemas.is_empty() && !is_whole => one.name.to_string(),
            _ => "more than one table".to_owned(),
        };
        return Err(ExportError::NotCsv { what });
    }
    tables.sort_by(|a, b| a.name.cmp(&b.name));
    tables.dedup();
    Ok(Found {
        database: database.name.to_owned(),
        database_oid: database.oid,
        schemas: schemas.into_iter().map(|(_, schema)| schema).collect(),
        tables,
        is_whole,
    })
}

fn one_table(
    names: &Names,
    at: Lsn,
    all: &[TableThere],
    pattern: &TablePattern,
) -> Result<TableThere, ExportError> {
    let mut found: Vec<_> = all.iter().filter(|t| pattern.matches(&t.name)).collect();
    // A bare name means public's, as for most sessions.
    let is_public = |t: &TableThere| t.name.schema == "public";
    if pattern.is_bare() && found.iter().filter(|t| is_public(t)).count() == 1 {
        found.retain(|t| is_public(t));
    }
    match found.as_slice() {
        [one] => Ok((*one).clone()),
        [] => {
            let (what, near) = (format!("table {pattern}"), near(names, at, all, pattern));
            Err(ExportError::NotFound { what, at, near })
        }
        several => {
            let found = several.iter().map(|t| t.name.to_string()).collect();
            Err(ExportError::Ambiguous { what: pattern.to_string(), found })
        }
    }
}

/// What the WAL says of tables of the name, and where else there are some.
fn near(names: &Names, at: Lsn, all: &[TableThere], pattern: &TablePattern) -> Vec<String> {
    let mut lines = Vec::new();
    for event in names.table_events().iter().rev().filter(|e| e.before < at && pattern.matches(&e.table)) {
        let what = match &event.kind {
            TableEventKind::Renamed { to } => format!("renamed to {to}"),
            TableEventKind::Dropped { .. } => "dropped".to_owned(),
            _ => continue,
        };
        let (xid, time) = (event.commit.xid, event.commit.time);
        lines.push(format!("{} was {what} by transaction {xid} of {time}", event.table));
    }
    let same = all.iter().filter(|t| t.name.table.eq_ignore_ascii_case(pattern.table()));
    lines.extend(same.map(|t| format!("there is {}", t.name)));
    lines.truncate(LISTED_MAX);
    lines
}

fn one_schema(
    names: &Names,
    at: Lsn,
    databases: &[DatabaseThere<'_>],
    pattern: &TablePattern,
) -> Result<(Oid, String), ExportError> {
    let mut found: Vec<(&DatabaseThere<'_>, &str)> = Vec::new();
    for database in databases {
        let is_it = |schema: &&str| {
            // The pattern's last part is the schema, the one before it the database.
            let (table, schema) = ((*schema).to_owned(), database.name.to_owned());
            pattern.matches(&TableName { database: String::new(), schema, table })
        };
        found.extend(names.schemas_at(database.oid, at).filter(is_it).map(|schema| (database, schema)));
    }
    match found.as_slice() {
        [(database, schema)] => Ok((database.oid, (*schema).to_owned())),
        [] => Err(ExportError::NotFound { what: format!("schema {pattern}"), at, near: Vec::new() }),
        several => {
            let found =
                several.iter().map(|(database, schema)| format!("{}.{schema}", database.name)).collect();
            Err(ExportError::Ambiguous { what: pattern.to_string(), found })
        }
    }
}
