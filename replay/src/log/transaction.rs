//! One transaction, as the log tells it.

use serde::Serialize;
use waltide_format::archive::{CommitKind, RelationWork, Volume};
use waltide_format::engines::postgres::catalogue::{TableEvent, TableEventKind, TableName};
use waltide_format::{Lsn, Oid, RelFileLocator, TimelineId, TimestampTz, Xid};

use super::names::{RelationName, as_optional_text, as_text};

/// A transaction that ended, with its subtransactions' work; what a savepoint rolled back is not in it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Transaction {
    /// Its number.
    pub xid: Xid,
    /// Its subtransactions that ended with it.
    pub subxacts: Vec<Xid>,
    /// Of a subtransaction that was rolled back by itself, the transaction it was a part of, where the log says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top: Option<Xid>,
    /// How it ended.
    pub kind: CommitKind,
    /// What a prepared transaction was called.
    pub gid: Option<String>,
    /// When it was committed or rolled back.
    pub time: TimestampTz,
    /// Of a prepared transaction, when and where it was prepared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prepared: Option<Prepared>,
    /// The timeline it ended on.
    pub timeline: TimelineId,
    /// Its database, by number.
    pub database: Option<Oid>,
    /// That database's name.
    pub database_name: Option<String>,
    /// Start of its first record.
    pub start_lsn: Lsn,
    /// Start of the record that ends it: `recovery_target_lsn` with this stops before it where exclusive.
    pub commit_lsn: Lsn,
    /// End of that record.
    pub end_lsn: Lsn,
    /// How much it wrote.
    #[serde(flatten)]
    pub volume: Volume,
    /// Whether all it did is told; else its beginning lies before the archive's, or in a hole.
    pub complete: bool,
    /// The relations whose blocks it changed.
    pub relations: Vec<RelationDone>,
    /// What became of tables, views and sequences, by name; nothing where names are not known.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tables: Vec<TableFate>,
    /// Databases it made.
    pub created_databases: Vec<NamedDatabase>,
    /// Databases it dropped, with all that was in them.
    pub dropped_databases: Vec<NamedDatabase>,
    /// Relations it made.
    pub created: Vec<NamedRelation>,
    /// Relations it dropped, by the files that went.
    pub dropped: Vec<NamedRelation>,
    /// Relations it emptied (TRUNCATE).
    pub truncated: Vec<NamedRelation>,
    /// Relations it put into other files: VACUUM FULL, CLUSTER, REINDEX, ALTER TABLE.
    pub rewritten: Vec<NamedRelation>,
}

/// When and where a transaction was prepared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Prepared {
    /// Start of the record.
    pub lsn: Lsn,
    /// When.
    pub time: TimestampTz,
}

/// What became of a table, view or sequence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TableFate {
    /// What.
    pub event: TableFateKind,
    /// `pg_class.oid`.
    pub oid: Oid,
    /// Its name, before.
    #[serde(serialize_with = "as_text")]
    pub name: TableName,
    /// Its name from then on, where it got another.
    #[serde(serialize_with = "as_optional_text", skip_serializing_if = "Option::is_none")]
    pub to: Option<TableName>,
}

/// What can become of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TableFateKind {
    /// It was made.
    Created,
    /// It got another name, or went to another schema.
    Renamed,
    /// It moved to new files with its rows.
    Rewritten,
    /// It was emptied.
    Truncated,
    /// It was dropped.
    Dropped,
}

impl From<&TableEvent> for TableFate {
    fn from(event: &TableEvent) -> Self {
        let (kind, to) = match &event.kind {
            TableEventKind::Created => (TableFateKind::Created, None),
            TableEventKind::Renamed { to } => (TableFateKind::Renamed, Some(to.clone())),
            TableEventKind::Rewritten => (TableFateKind::Rewritten, None),
            TableEventKind::Truncated => (TableFateKind::Truncated, None),
            TableEventKind::Dropped { .. } => (TableFateKind::Dropped, None),
        };
        Self { event: kind, oid: event.oid, name: event.table.clone(), to }
    }
}

/// A database, by number and, where it is known, by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NamedDatabase {
    /// Its OID.
    pub oid: Oid,
    /// Its name.
    pub name: Option<String>,
}

impl std::fmt::Display for NamedDatabase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.name {
            Some(name) => f.write_str(name),
            None => self.oid.fmt(f),
        }
    }
}

/// A relation, by its files and, where it is known, by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NamedRelation {
    /// Its files.
    pub relation: RelFileLocator,
    /// Its name.
    #[serde(flatten)]
    pub name: Option<RelationName>,
}

/// What a transaction did to a relation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RelationDone {
    /// Its name.
    #[serde(flatten)]
    pub name: Option<RelationName>,
    /// Its files, and the counts.
    #[serde(flatten)]
    pub work: RelationCounts,
}

/// What was done to a relation, in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RelationCounts {
    /// Its files.
    pub relation: RelFileLocator,
    /// Records that refer to its blocks.
    pub records: u64,
    /// Rows that came.
    pub inserted: u64,
    /// Rows that got a new version.
    pub updated: u64,
    /// Those among them whose new version is on the same page and in no index.
    pub hot: u64,
    /// Rows that went.
    pub deleted: u64,
}

impl From<&RelationWork> for RelationCounts {
    fn from(work: &RelationWork) -> Self {
        Self {
            relation: work.relation,
            records: work.records,
            inserted: work.rows_inserted(),
            updated: work.updated,
            hot: work.hot,
            deleted: work.deleted,
        }
    }
}

impl std::fmt::Display for NamedRelation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.name {
            Some(name) => name.fmt(f),
            None => self.relation.fmt(f),
        }
    }
}
