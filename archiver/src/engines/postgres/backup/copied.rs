//! Databases that were made of another's files while a backup ran: CREATE DATABASE with `file_copy`, and ALTER DATABASE
//! SET TABLESPACE, which removes the files it copied. Recovery from the backup copies once more, of what the backup has
//! of them, and where they are gone it makes an empty directory and says nothing.

use std::collections::BTreeMap;

use waltide_format::archive::{FileEvent, FileEventKind, SegmentEntry};
use waltide_format::{Lsn, Oid, RelFileLocator};

use super::super::publish::{Destination, PublishError};
use super::changes::{Index, each_index};

/// A tablespace and a database in it.
type Directory = (Oid, Oid);

/// A copy that recovery cannot make again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the files of database {} (tablespace {}) were copied from database {} (tablespace {}) at {at}, while the backup ran, \
     and {}: PostgreSQL's recovery copies them once more, of what the backup has of them, and would leave the database \
     without files\nhint: take another backup, while no database is moved",
    to.1, to.0, from.1, from.0, self.gone()
)]
pub struct LostCopy {
    /// Where the copy's record starts.
    pub at: Lsn,
    /// Tablespace and database copied.
    pub from: (Oid, Oid),
    /// Tablespace and database made.
    pub to: (Oid, Oid),
    /// The record of the removal of what was copied, if the backup's WAL has it: files go before it is written.
    pub removed: Option<Lsn>,
}

impl LostCopy {
    fn gone(&self) -> String {
        match self.removed {
            Some(at) => format!("those were removed (logged at {at})"),
            None => "a move removes those".to_owned(),
        }
    }
}

/// What the WAL of a backup says of databases' directories.
#[derive(Debug, Default)]
pub(crate) struct DatabaseCopies {
    /// Records that make or remove them, by start.
    events: BTreeMap<Lsn, FileEventKind>,
    /// The end of the last WAL that changes files in them.
    changed: BTreeMap<Directory, Lsn>,
}

impl DatabaseCopies {
    /// Takes in what `entries`, which join without a hole, say of the WAL from `start` to `stop`.
    pub(crate) async fn read(
        &mut self,
        to: &Destination,
        entries: &[SegmentEntry],
        (start, stop): (Lsn, Lsn),
        threads: usize,
    ) -> Result<(), PublishError> {
        let entries: Vec<&SegmentEntry> = entries.iter().collect();
        let read = each_index(&to.archive, &to.system, &entries, start, threads, |_, index| {
            let all = index.all();
            let (end, touched) = match index {
                Index::Segment(index) => (index.info.valid_end, [].iter()),
                Index::Merged(merged) => {
                    let last = merged.segments.last().map_or(stop, |s| s.info.valid_end);
                    (last, merged.touched.iter())
                }
            };
            let relations = all.blocks.iter().map(|f| f.relation).chain(touched.map(|f| f.relation));
            relations.for_each(|relation| self.change(relation, end.min(stop)));
            let events = all.file_events.iter().filter(|e| (start..stop).contains(&e.start));
            events.for_each(|event| self.add(event));
            Ok(())
        });
        Ok(read.await?)
    }

    fn add(&mut self, event: &FileEvent) {
        match &event.kind {
            FileEventKind::Create { relation, .. } | FileEventKind::Truncate { relation, .. } => {
                self.change(*relation, event.start);
            }
            FileEventKind::DatabaseCopy { .. }
            | FileEventKind::DatabaseCreate { .. }
            | FileEventKind::DatabaseDrop { .. } => {
                self.events.insert(event.start, event.kind.clone());
            }
            FileEventKind::RelationMap { spc_oid, db_oid } => {
                self.change(
                    RelFileLocator { spc_oid: *spc_oid, db_oid: *db_oid, rel_number: 0 },
                    event.start,
                );
            }
            FileEventKind::TablespaceCreate { .. } | FileEventKind::TablespaceDrop { .. } => {}
        }
    }

    fn change(&mut self, relation: RelFileLocator, end: Lsn) {
        let last = self.changed.entry((relation.spc_oid, relation.db_oid)).or_insert(end);
        *last = end.max(*last);
    }

    /// A directory that is there at the end, and of which recovery cannot make what it was; else warnings of those that
    /// may come out as what they were copied from is later.
    ///
    /// Files are removed before the record of it is written, so what a move copied may be gone with no record yet.
    pub(crate) fn judge(&self) -> Result<Vec<String>, LostCopy> {
        let removed = |directory: Directory, after: Lsn| {
            let mut behind = self.events.range(after..);
            behind.find(|(_, kind)| removes(kind, directory)).map(|(at, _)| *at)
        };
        let mut lost: BTreeMap<Directory, LostCopy> = BTreeMap::new();
        // What recovery makes whole, of the WAL alone or of what the backup has; with what there is to say of it.
        let mut made: BTreeMap<Directory, Option<String>> = BTreeMap::new();
        for (at, kind) in &self.events {
            match kind {
                FileEventKind::DatabaseCreate { database } => {
                    made.insert(*database, None);
                }
                FileEventKind::DatabaseCopy { to, from } => {
                    let removed = removed(*from, *at);
                    if let Some(source) = lost.get(from) {
                        // What is copied of a copy that is lost is lost with it.
                        lost.insert(*to, LostCopy { to: *to, ..*source });
                    } else if let Some(warning) = made.get(from) {
                        made.insert(*to, warning.clone());
                    } else if removed.is_some() || from.1 == to.1 {
                        lost.insert(*to, LostCopy { at: *at, from: *from, to: *to, removed });
                    } else {
                        let changed = self.changed.get(from).is_some_and(|end| end > at);
                        made.insert(*to, changed.then(|| changed_source(*at, *from, *to)));
                    }
                }
                FileEventKind::DatabaseDrop { db_oid, tablespaces } => {
                    for spc_oid in tablespaces {
                        lost.remove(&(*spc_oid, *db_oid));
                        made.remove(&(*spc_oid, *db_oid));
                    }
                }
                _ => {}
            }
        }
        match lost.into_values().next() {
            Some(copy) => Err(copy),
            None => Ok(made.into_values().flatten().collect()),
        }
    }
}

fn removes(kind: &FileEventKind, directory: Directory) -> bool {
    matches!(kind, FileEventKind::DatabaseDrop { db_oid, tablespaces }
        if *db_oid == directory.1 && tablespaces.contains(&directory.0))
}

fn changed_source(at: Lsn, from: Directory, to: Directory) -> String {
    format!(
        "database {} was made of the files of database {} at {at}, while the backup ran, and these may have changed \
         since: recovery copies them as they are in the backup; take another backup before you rely on database {}",
        to.1, from.1, to.1
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Directory = (1663, 5);
    const B: Directory = (16_400, 5);
    const C: Directory = (1663, 6);
    const D: Directory = (1663, 7);

    fn copy(from: Directory, to: Directory) -> FileEventKind {
        FileEventKind::DatabaseCopy { to, from }
    }

    fn removal(of: Directory) -> FileEventKind {
        FileEventKind::DatabaseDrop { db_oid: of.1, tablespaces: vec![of.0] }
    }

    /// Events at 10, 20, 30 and so on.
    fn copies(events: &[FileEventKind]) -> DatabaseCopies {
        let mut copies = DatabaseCopies::default();
        for (n, kind) in (1..).zip(events) {
            copies.add(&FileEvent { start: Lsn::from(n * 10), xid: 0.into(), kind: kind.clone() });
        }
        copies
    }

    fn lost(events: &[FileEventKind]) -> Option<(u64, Directory, Directory, Option<u64>)> {
        let found = copies(events).judge().err();
        found.map(|copy| (copy.at.get(), copy.from, copy.to, copy.removed.map(Lsn::get)))
    }

    #[test]
    fn a_copy_is_lost_whose_source_went_and_which_is_still_there() {
        assert_eq!(lost(&[]), None);
        assert_eq!(lost(&[copy(A, C)]), None);
        assert_eq!(lost(&[copy(A, C), removal(A)]), Some((10, A, C, Some(20))));
        // Removed before it was copied: it had come back since.
        assert_eq!(lost(&[removal(A), copy(A, C)]), None);
        // Another tablespace's, another database's.
        assert_eq!(lost(&[copy(A, C), removal(B)]), None);
        assert_eq!(lost(&[copy(A, C), removal(D)]), None);
        // What was made is gone as well.
        assert_eq!(lost(&[copy(A, C), copy(A, D), removal(A), removal(C)]), Some((20, A, D, Some(30))));
        assert_eq!(lost(&[copy(A, C), removal(A), removal(C)]), None);
    }

    #[test]
    fn what_a_move_copied_is_lost_before_its_removal_is_logged() {
        assert_eq!(lost(&[copy(A, B)]), Some((10, A, B, None)));
        assert_eq!(lost(&[copy(A, B), removal(A)]), Some((10, A, B, Some(20))));
        // The removal of what the move before left says nothing of this one.
        assert_eq!(lost(&[removal(A), copy(A, B)]), Some((20, A, B, None)));
        let both = FileEventKind::DatabaseDrop { db_oid: 5, tablespaces: vec![1663, 16_400] };
        assert_eq!(lost(&[copy(A, B), removal(A), both]), None);
    }

    #[test]
    fn what_is_copied_of_a_lost_copy_is_lost_too() {
        // There and back: at the end the files are where they were, and recovery begins with none.
        assert_eq!(lost(&[copy(A, B), removal(A), copy(B, A), removal(B)]), Some((10, A, A, Some(20))));
        assert_eq!(lost(&[copy(A, B), removal(A), copy(B, C), removal(B)]), Some((10, A, C, Some(20))));
    }

    #[test]
    fn what_recovery_makes_itself_it_can_move() {
        let create = |database| FileEventKind::DatabaseCreate { database };
        assert_eq!(lost(&[create(A), copy(A, B), removal(A)]), None);
        assert_eq!(lost(&[copy(C, A), copy(A, B), removal(A)]), None);
        assert_eq!(lost(&[copy(C, A), copy(A, B), removal(A), removal(C)]), Some((10, C, B, Some(40))));
        assert_eq!(lost(&[create(A), removal(A), copy(A, B)]), Some((30, A, B, None)));
    }

    #[test]
    fn a_source_that_changed_behind_the_copy_is_a_warning() {
        let relation = RelFileLocator { spc_oid: A.0, db_oid: A.1, rel_number: 7 };
        let warned = |events: &[FileEventKind], end: u64| {
            let mut copies = copies(events);
            copies.change(relation, Lsn::from(end));
            copies.judge().unwrap()
        };
        assert_eq!(warned(&[copy(A, C)], 10), [""; 0]);
        let warnings = warned(&[copy(A, C)], 11);
        assert!(
            warnings[0].starts_with("database 6 was made of the files of database 5 at 0/A, "),
            "{warnings:?}"
        );
        assert_eq!(warned(&[copy(A, C), removal(C)], 50), [""; 0]);
        assert_eq!(warned(&[copy(C, A)], 50), [""; 0]);
        // What was made of it in turn is no better.
        let moved = warned(&[copy(A, C), copy(C, (16_400, 6)), removal(C)], 50);
        assert!(moved.len() == 1 && moved[0].starts_with("database 6 was made of "), "{moved:?}");
        let cut = FileEventKind::Truncate { relation, blocks: 0, flags: 7 };
        assert_eq!(copies(&[copy(A, C), cut]).judge().unwrap().len(), 1);
    }
}
