//! Partitioned tables: they have no files of their own, so what became of one is what became of its partitions.

use std::collections::{BTreeMap, BTreeSet};

use super::events::{TableEvent, TableEventKind};
use super::names::Names;
use super::row::ClassRow;
use super::table_name::TableName;
use crate::ids::{Lsn, Oid};

const KIND_PARTITIONED: u8 = b'p';
const KIND_TABLE: u8 = b'r';

/// Partitions of a partitioned table that one transaction truncated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionsTruncated {
    /// That the partitioned table was truncated, if that were all of them.
    pub event: TableEvent,
    /// How many it had that hold rows, those of its partitions that are partitioned themselves among them.
    pub partitions: usize,
    /// Those that were truncated.
    pub truncated: Vec<TableName>,
}

impl PartitionsTruncated {
    /// Whether the table as a whole was truncated.
    pub fn is_whole(&self) -> bool {
        self.truncated.len() == self.partitions
    }
}

impl Names {
    /// Whether a partitioned table was ever so called.
    pub fn has_partitioned(&self, wanted: impl Fn(&TableName) -> bool) -> bool {
        self.relations.iter().any(|((database, _), spans)| {
            let partitioned = spans.iter().filter(|span| span.row.kind == KIND_PARTITIONED);
            partitioned.flat_map(|span| self.names_of(*database, &span.row)).any(|name| wanted(&name))
        })
    }

    /// What the truncations among `events` did to partitioned tables, in their order; nothing unless pg_inherits was
    /// followed.
    pub fn partitions_truncated(&self, events: &[TableEvent]) -> Vec<PartitionsTruncated> {
        let mut by_commit: BTreeMap<(Lsn, Oid), Vec<&TableEvent>> = BTreeMap::new();
        for event in events.iter().filter(|event| event.kind == TableEventKind::Truncated) {
            by_commit.entry((event.commit.start, event.database)).or_default().push(event);
        }
        let mut found = Vec::new();
        for ((at, database), truncated) in by_commit {
            let children = self.children_at(database, at);
            let partitioned = children.keys().filter_map(|oid| {
                let row = self.row_at(database, *oid, at)?;
                (row.kind == KIND_PARTITIONED).then_some((*oid, row))
            });
            for (oid, row) in partitioned {
                let leaves = self.leaves(database, oid, &children, at);
                let gone: Vec<_> = truncated.iter().filter(|event| leaves.contains(&event.oid)).collect();
                let Some(first) = gone.first() else { continue };
                let table = self.name(database, row, at, at);
                let event = TableEvent { table, oid, relkind: row.kind, ..(**first).clone() };
                let truncated = gone.iter().map(|event| event.table.clone()).collect();
                found.push(PartitionsTruncated { event, partitions: leaves.len(), truncated });
            }
        }
        found
    }

    /// What a relation's row was just before the record at `at`.
    fn row_at(&self, database: Oid, oid: Oid, at: Lsn) -> Option<&ClassRow> {
        let spans = self.relations.get(&(database, oid))?;
        spans.iter().rev().find(|span| span.holds_before(at)).map(|span| &span.row)
    }

    /// The children of each relation of a database just before the record at `at`.
    fn children_at(&self, database: Oid, at: Lsn) -> BTreeMap<Oid, Vec<Oid>> {
        let mut children: BTreeMap<Oid, Vec<Oid>> = BTreeMap::new();
        for ((_, child), spans) in self.parents.range((database, 0)..=(database, Oid::MAX)) {
            for span in spans.iter().filter(|span| span.holds_before(at)) {
                children.entry(span.row.parent).or_default().push(*child);
            }
        }
        children
    }

    /// The tables with rows below a partitioned one.
    fn leaves(
        &self,
        database: Oid,
        parent: Oid,
        children: &BTreeMap<Oid, Vec<Oid>>,
        at: Lsn,
    ) -> BTreeSet<Oid> {
        let (mut seen, mut left) = (BTreeSet::from([parent]), vec![parent]);
        let mut leaves = BTreeSet::new();
        while let Some(oid) = left.pop() {
            let below = children.get(&oid).into_iter().flatten().filter(|child| seen.insert(**child));
            for child in below {
                match self.row_at(database, *child, at).map(|row| row.kind) {
                    Some(KIND_PARTITIONED) => left.push(*child),
                    Some(KIND_TABLE) => drop(leaves.insert(*child)),
                    _ => {}
                }
            }
        }
        leaves
    }
}
