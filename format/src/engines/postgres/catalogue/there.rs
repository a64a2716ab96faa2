//! What is there at a moment, and the files that belong to it.

use std::collections::BTreeSet;

use serde::Serialize;

use super::events::is_table;
use super::names::{Names, Spans};
use super::row::{ClassRow, NamespaceRow};
use super::table_name::TableName;
use crate::ids::{Lsn, Oid};

/// `FirstNormalObjectId`: what has a number below it was made by initdb.
pub const FIRST_NORMAL_OID: Oid = 16384;
/// pg_largeobject and its index: what they hold belongs to no table.
pub const LARGE_OBJECTS: [Oid; 2] = [2613, 2683];
const KIND_SEQUENCE: u8 = b'S';
const KIND_INDEX: u8 = b'i';

/// A table that is there at a moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TableThere {
    /// Its database.
    #[serde(skip)]
    pub database: Oid,
    /// `pg_class.oid`.
    pub oid: Oid,
    /// `relkind`.
    #[serde(skip)]
    pub kind: u8,
    /// Its name.
    pub name: TableName,
}

/// A database that is there at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatabaseThere<'a> {
    /// `pg_database.oid`.
    pub oid: Oid,
    /// Its name.
    pub name: &'a str,
}

impl Names {
    /// The databases that are there just before the record at `at` starts.
    pub fn databases_at(&self, at: Lsn) -> impl Iterator<Item = DatabaseThere<'_>> {
        self.databases.iter().filter_map(move |(oid, spans)| {
            let span = spans.iter().rev().find(|span| span.holds_before(at) && !span.row.invalid)?;
            Some(DatabaseThere { oid: *oid, name: &span.row.name })
        })
    }

    /// Tables and what else people know by name that is there, in a database that is, just before the record at `at`
    /// starts.
    pub fn tables_at(&self, at: Lsn) -> impl Iterator<Item = TableThere> + '_ {
        let databases: BTreeSet<Oid> = self.databases_at(at).map(|d| d.oid).collect();
        let known = self.relations.iter().filter(move |((database, _), _)| databases.contains(database));
        known.filter_map(move |((database, oid), spans)| {
            let span = spans.iter().rev().find(|span| span.holds_before(at))?;
            is_table(&span.row).then(|| TableThere {
                database: *database,
                oid: *oid,
                kind: span.row.kind,
                name: self.name(*database, &span.row, at, at),
            })
        })
    }

    /// The schemas of a database just before the record at `at` starts.
    pub fn schemas_at(&self, database: Oid, at: Lsn) -> impl Iterator<Item = &str> {
        let own = self.namespaces.range((database, 0)..=(database, Oid::MAX));
        own.filter_map(move |(_, spans): (_, &Spans<NamespaceRow>)| {
            let span = spans.iter().rev().find(|span| span.holds_before(at))?;
            Some(span.row.name.as_str())
        })
    }

    /// The numbers of all files in which, at any moment that was followed, lay one of `tables` of a database, its long
    /// values and their index, a sequence, or a catalogue. Indexes of users' tables are not among them, nor are large objects.
    pub fn files_of(&self, database: Oid, tables: &BTreeSet<Oid>) -> BTreeSet<Oid> {
        let own = || self.relations.range((database, 0)..=(database, Oid::MAX));
        let rows = |spans: &'_ Spans<ClassRow>| spans.iter().map(|span| span.row.clone()).collect::<Vec<_>>();
        let of_tables = own().filter(|((_, oid), _)| tables.contains(oid));
        let toast: BTreeSet<Oid> = of_tables
            .flat_map(|(_, spans)| rows(spans))
            .map(|row| row.toast)
            .filter(|oid| *oid != 0)
            .collect();
        let of_toast = own().filter(|((_, oid), _)| toast.contains(oid));
        let toast_indexes: BTreeSet<(Oid, String)> = of_toast
            .flat_map(|(_, spans)| rows(spans))
            .map(|row| (row.namespace, format!("{}_index", row.name)))
            .collect();
        let is_wanted = |oid: Oid, row: &ClassRow| {
            (oid < FIRST_NORMAL_OID && !LARGE_OBJECTS.contains(&oid))
                || row.kind == KIND_SEQUENCE
                || tables.contains(&oid)
                || toast.contains(&oid)
                || (row.kind == KIND_INDEX && toast_indexes.contains(&(row.namespace, row.name.clone())))
        };
        let mut files = BTreeSet::new();
        for ((_, oid), spans) in own() {
            if spans.iter().any(|span| is_wanted(*oid, &span.row)) {
                files.extend(spans.iter().map(|span| span.row.file).filter(|file| *file != 0));
            }
        }
        files.extend(self.mapped_files(database));
        files
    }
}
