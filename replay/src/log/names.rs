//! The seam to the catalogues: which relation a file was.

use std::fmt;

use serde::Serialize;
use waltide_format::{Lsn, Oid, RelFileLocator, Xid};

/// What a file belonged to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RelationName {
    /// `pg_class.oid`, which stays the same when the relation gets other files.
    pub oid: Oid,
    /// `database.schema.relation`.
    pub name: String,
}

impl fmt::Display for RelationName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// Says what files and databases were called.
pub trait Names: Sync {
    /// The relation that `file` held or, where it had got another by then, had held last, under the name that
    /// transaction `xid` knew it by just before the record at `before`.
    fn relation(&self, file: RelFileLocator, before: Lsn, xid: Xid) -> Option<RelationName>;

    /// A database's name just before the record at `before`.
    fn database(&self, oid: Oid, before: Lsn) -> Option<String>;
}

/// Knows none: everything is shown by number.
#[derive(Debug, Clone, Copy, Default)]
pub struct Numbers;

impl Names for Numbers {
    fn relation(&self, _: RelFileLocator, _: Lsn, _: Xid) -> Option<RelationName> {
        None
    }

    fn database(&self, _: Oid, _: Lsn) -> Option<String> {
        None
    }
}
