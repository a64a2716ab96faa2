//! The seam to the catalogues: which relation a file was, and what became of tables.

use std::fmt;

use serde::{Serialize, Serializer};
use waltide_format::engines::postgres::catalogue::{NamedRelation as Known, TableEvent, TableName};
use waltide_format::{Lsn, Oid, RelFileLocator};

use super::filter::LogFilter;
use super::signs::Meant;

/// What a file belonged to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RelationName {
    /// `pg_class.oid`, which stays the same when the relation gets other files.
    pub oid: Oid,
    /// `database.schema.relation`, as SQL writes it.
    #[serde(serialize_with = "as_text")]
    pub name: TableName,
    /// The table whose long values it holds, where it is a TOAST table.
    #[serde(serialize_with = "as_optional_text", skip_serializing_if = "Option::is_none")]
    pub toast_of: Option<TableName>,
}

impl From<Known> for RelationName {
    fn from(known: Known) -> Self {
        let Known { oid, name, toast_of, .. } = known;
        Self { oid, name, toast_of }
    }
}

impl fmt::Display for RelationName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.toast_of {
            Some(table) => write!(f, "{table} (TOAST)"),
            None => self.name.fmt(f),
        }
    }
}

pub(super) fn as_text<S: Serializer>(name: &TableName, s: S) -> Result<S::Ok, S::Error> {
    s.collect_str(name)
}

pub(super) fn as_optional_text<S: Serializer>(name: &Option<TableName>, s: S) -> Result<S::Ok, S::Error> {
    match name {
        Some(name) => s.collect_str(name),
        None => s.serialize_none(),
    }
}

/// Says what files and databases were called, and what became of tables.
pub trait Names {
    /// The log has come to `at` and will go on to `until` at least.
    fn come_to(&mut self, at: Lsn, until: Lsn) -> impl Future<Output = ()>;

    /// The relation that `file` held just before the record at `commit` or, where that commits it, just after.
    fn relation(&self, file: RelFileLocator, commit: Lsn) -> Option<RelationName>;

    /// A database's name.
    fn database(&self, oid: Oid, commit: Lsn) -> Option<String>;

    /// What became of tables with the transaction whose commit record starts there.
    fn events(&self, commit: Lsn) -> &[TableEvent];

    /// What the relation and the database that a filter asks for may have been between two places; none where that cannot
    /// be told.
    fn meant(&mut self, filter: &LogFilter, from: Lsn, until: Lsn) -> impl Future<Output = Option<Meant>>;
}

/// Knows none: everything is shown by number.
#[derive(Debug, Clone, Copy, Default)]
pub struct Numbers;

impl Names for Numbers {
    async fn come_to(&mut self, _: Lsn, _: Lsn) {}

    fn relation(&self, _: RelFileLocator, _: Lsn) -> Option<RelationName> {
        None
    }

    fn database(&self, _: Oid, _: Lsn) -> Option<String> {
        None
    }

    fn events(&self, _: Lsn) -> &[TableEvent] {
        &[]
    }

    async fn meant(&mut self, filter: &LogFilter, _: Lsn, _: Lsn) -> Option<Meant> {
        Some(filter.meant_by_number())
    }
}
