//! Which relations a restore brings back, where not all are wanted.

use std::collections::BTreeSet;

use waltide_format::engines::postgres::catalogue::{FIRST_NORMAL_OID, LARGE_OBJECTS};
use waltide_format::engines::postgres::cluster::RelationSegment;
use waltide_format::{Oid, RelFileLocator};

/// The relations of some databases that are wanted, beside their catalogues and what all databases share.
///
/// The files of all others are made as long as they would be, and hold nothing: they take no room, and recovery, which
/// takes a page of zeros for one that is gone, finds every file it looks for at its length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    databases: BTreeSet<Oid>,
    files: Files,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Files {
    All,
    /// By their numbers.
    These(BTreeSet<Oid>),
}

impl Selection {
    /// Whole databases.
    pub const fn databases(databases: BTreeSet<Oid>) -> Self {
        Self { databases, files: Files::All }
    }

    /// Files of databases.
    pub const fn files(databases: BTreeSet<Oid>, files: BTreeSet<Oid>) -> Self {
        Self { databases, files: Files::These(files) }
    }

    /// Adds files, by their numbers.
    pub fn add(&mut self, more: impl IntoIterator<Item = Oid>) {
        if let Files::These(files) = &mut self.files {
            files.extend(more);
        }
    }

    /// Whether a file of a wanted database is wanted.
    pub fn wants_number(&self, number: Oid) -> bool {
        match &self.files {
            Files::All => true,
            Files::These(files) => {
                (number < FIRST_NORMAL_OID && !LARGE_OBJECTS.contains(&number)) || files.contains(&number)
            }
        }
    }

    /// Whether something of a database is wanted.
    pub fn wants_database(&self, database: Oid) -> bool {
        self.databases.contains(&database)
    }

    /// Whether a relation's pages are wanted.
    pub fn wants(&self, relation: RelFileLocator) -> bool {
        relation.db_oid == 0
            || (self.databases.contains(&relation.db_oid) && self.wants_number(relation.rel_number))
    }

    /// Whether the content of a file of a backup is wanted: of everything that is no relation's it is.
    pub fn wants_file(&self, path: &str) -> bool {
        RelationSegment::locate(path).is_none_or(|(relation, part)| !part.temporary && self.wants(relation))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_other_relations_no_content_is_wanted() {
        let mut selection = Selection::files(BTreeSet::from([5]), BTreeSet::from([16500]));
        selection.add([16510]);
        for path in [
            "PG_VERSION",
            "global/1262",
            "global/pg_control",
            "pg_xact/0000",
            "base/5/1259",
            "base/5/1259_fsm",
            "base/5/2619.1",
            "base/5/16500",
            "base/5/16500.2",
            "base/5/16510_vm",
            "base/5/pg_filenode.map",
            "base/4/pg_filenode.map",
            "base/4/PG_VERSION",
            "pg_tblspc/16400/PG_15_202209061/5/16500",
        ] {
            assert!(selection.wants_file(path), "{path}");
        }
        for path in
            ["base/5/16501", "base/5/2613", "base/5/2683", "base/5/t3_16500", "base/4/1259", "base/4/16500"]
        {
            assert!(!selection.wants_file(path), "{path}");
        }
        let whole = Selection::databases(BTreeSet::from([1, 5]));
        for (path, wanted) in [("base/5/2613", true), ("base/1/16500", true), ("base/4/1259", false)] {
            assert_eq!(whole.wants_file(path), wanted, "{path}");
        }
    }
}
