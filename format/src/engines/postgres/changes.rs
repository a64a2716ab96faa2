//! What a stretch of WAL changes of a cluster's files: the union of its segments' indexes.
//!
//! A block that no record of the stretch touches is on disk what it was at the stretch's start, but for changes that
//! PostgreSQL itself can lose in a crash. What of the files changes otherwise is told here as changed whole: docs/wal.md,
//! "What an index says of changed blocks".

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::archive::{BlockSet, FileEventKind, MergedIndex, SegmentIndex};
use crate::engines::postgres::wal::vm_block_of;
use crate::ids::{BlockNumber, ForkNumber, Lsn, Oid, RelFileLocator};

/// The first resource manager of an extension's.
const CUSTOM_RMGR_MIN: u8 = 128;

/// What a stretch of WAL changes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ChangedBlocks {
    forks: BTreeMap<(RelFileLocator, ForkNumber), ForkChanges>,
    /// Relations whose files went: of one with the same number that came later nothing is as it was.
    dropped: BTreeSet<RelFileLocator>,
    /// Directories of databases, by tablespace and database, that were made or went.
    databases: BTreeSet<(Oid, Oid)>,
    /// Tablespaces that were made or went.
    tablespaces: BTreeSet<Oid>,
}

/// What changed of one fork.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForkChanges {
    /// Blocks that records touch.
    pub blocks: BlockSet,
    /// From this block on everything changed: the fork was cut there, or made anew.
    pub all_from: BlockNumber,
}

impl Default for ForkChanges {
    fn default() -> Self {
        Self { blocks: BlockSet::default(), all_from: BlockNumber::MAX }
    }
}

/// What changed of a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Changes<'a> {
    /// Nothing.
    Nothing,
    /// Some blocks.
    Some(&'a ForkChanges),
    /// Everything may have.
    Everything,
}

/// Why a segment's index does not tell all that its records change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Doubt {
    /// A fault was admitted, or a record could not be read.
    Fault {
        /// Where.
        at: Lsn,
        /// What push said of it.
        message: String,
    },
    /// An extension's resource manager may change files that no block reference names.
    CustomRmgr {
        /// `xl_rmid`.
        rmid: u8,
    },
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fault { at, message } => {
                write!(f, "it was admitted with a fault at {at}: {message}")
            }
            Self::CustomRmgr { rmid } => {
                write!(f, "it has records of the resource manager {rmid}, which is an extension's")
            }
        }
    }
}

impl ChangedBlocks {
    /// Takes in what a segment's records change.
    pub fn add(&mut self, index: &SegmentIndex) -> Result<(), Doubt> {
        if let Some(fault) = index.faults.first() {
            return Err(Doubt::Fault { at: fault.at, message: fault.message.clone() });
        }
        if let Some(custom) = index.rmgrs.iter().find(|c| c.rmid >= CUSTOM_RMGR_MIN) {
            return Err(Doubt::CustomRmgr { rmid: custom.rmid });
        }
        // Free space maps change without a record too: nothing that is said of them is enough.
        for fork in index.blocks.iter().filter(|f| f.fork != ForkNumber::Fsm) {
            let changes = self.forks.entry((fork.relation, fork.fork)).or_default();
            fork.blocks.iter().for_each(|b| changes.blocks.insert(b.block));
        }
        self.dropped.extend(index.xacts.iter().flat_map(|x| x.dropped.iter().copied()));
        for event in &index.file_events {
            self.add_event(&event.kind);
        }
        Ok(())
    }

    /// Takes in what the records of many segments change.
    pub fn add_merged(&mut self, index: &MergedIndex) -> Result<(), Doubt> {
        self.add(&index.all)?;
        for fork in index.touched.iter().filter(|f| f.fork != ForkNumber::Fsm) {
            let changes = self.forks.entry((fork.relation, fork.fork)).or_default();
            let blocks = fork.runs.iter().flat_map(|(first, count)| *first..first.saturating_add(*count));
            blocks.for_each(|block| changes.blocks.insert(block));
        }
        self.dropped.extend(index.drops.iter().flat_map(|x| x.dropped.iter().copied()));
        Ok(())
    }

    fn add_event(&mut self, event: &FileEventKind) {
        match event {
            FileEventKind::Create { relation, fork } => self.cut(*relation, *fork, 0),
            FileEventKind::Truncate { relation, blocks, .. } => {
                // Which forks the flags name does not matter: to tell more of one as changed harms nothing.
                self.cut(*relation, ForkNumber::Main, *blocks);
                // Of the last page of the map that stays the bits behind the cut are cleared.
                self.cut(*relation, ForkNumber::Vm, vm_block_of(*blocks));
            }
            FileEventKind::DatabaseCopy { to, .. } => {
                self.databases.insert(*to);
            }
            FileEventKind::DatabaseCreate { database } => {
                self.databases.insert(*database);
            }
            FileEventKind::DatabaseDrop { db_oid, tablespaces } => {
                self.databases.extend(tablespaces.iter().map(|spc_oid| (*spc_oid, *db_oid)));
            }
            FileEventKind::TablespaceCreate { spc_oid, .. } | FileEventKind::TablespaceDrop { spc_oid } => {
                self.tablespaces.insert(*spc_oid);
            }
            // Relation maps are no relations' files.
            FileEventKind::RelationMap { .. } => {}
        }
    }

    fn cut(&mut self, relation: RelFileLocator, fork: ForkNumber, blocks: BlockNumber) {
        let changes = self.forks.entry((relation, fork)).or_default();
        changes.all_from = changes.all_from.min(blocks);
    }

    /// Tells a block as changed for a reason that is not in the WAL.
    pub fn touch(&mut self, relation: RelFileLocator, fork: ForkNumber, block: BlockNumber) {
        self.forks.entry((relation, fork)).or_default().blocks.insert(block);
    }

    /// What changed of a fork.
    pub fn of(&self, relation: RelFileLocator, fork: ForkNumber) -> Changes<'_> {
        let RelFileLocator { spc_oid, db_oid, .. } = relation;
        let made_anew = self.dropped.contains(&relation)
            || self.databases.contains(&(spc_oid, db_oid))
            || self.tablespaces.contains(&spc_oid);
        if made_anew || fork == ForkNumber::Fsm {
            return Changes::Everything;
        }
        match self.forks.get(&(relation, fork)) {
            None => Changes::Nothing,
            Some(changes) if changes.all_from == 0 => Changes::Everything,
            Some(changes) => Changes::Some(changes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::{AdmittedFault, FileEvent, ForkBlocks, IndexedBlock, RmgrCount, XactEnd};
    use crate::archive::{CommitKind, SegmentInfo, samples};
    use crate::ids::Xid;
    use crate::time::TimestampTz;

    fn relation(rel_number: Oid) -> RelFileLocator {
        RelFileLocator { spc_oid: 1663, db_oid: 5, rel_number }
    }

    fn info() -> SegmentInfo {
        samples::info(1 << 20)
    }

    fn index(
        blocks: &[(Oid, ForkNumber, &[u32])],
        events: &[FileEventKind],
        dropped: &[Oid],
    ) -> SegmentIndex {
        let mut index = SegmentIndex::new(info());
        let block = |block: &u32| IndexedBlock { block: *block, last_image: None, records_after: 1 };
        let fork = |(number, fork, blocks): &(Oid, ForkNumber, &[u32])| ForkBlocks {
            relation: relation(*number),
            fork: *fork,
            blocks: blocks.iter().map(block).collect(),
        };
        index.blocks = blocks.iter().map(fork).collect();
        let event =
            |kind: &FileEventKind| FileEvent { start: Lsn::ZERO, xid: Xid::from(7), kind: kind.clone() };
        index.file_events = events.iter().map(event).collect();
        index.xacts.push(XactEnd {
            kind: CommitKind::Abort,
            xid: Xid::from(7),
            start: Lsn::ZERO,
            end: Lsn::ZERO,
            time: TimestampTz::default(),
            db_oid: None,
            subxacts: Vec::new(),
            dropped: dropped.iter().map(|n| relation(*n)).collect(),
            gid: None,
        });
        index
    }

    fn some(changed: &ChangedBlocks, number: Oid, fork: ForkNumber) -> (Vec<u32>, u32) {
        let Changes::Some(changes) = changed.of(relation(number), fork) else {
            panic!("not some of {number}")
        };
        let blocks = (0..1000).filter(|block| changes.blocks.contains(*block)).collect();
        (blocks, changes.all_from)
    }

    #[test]
    fn what_segments_touch_is_put_together() {
        let mut changed = ChangedBlocks::default();
        changed.add(&index(&[(9, ForkNumber::Main, &[3, 5])], &[], &[])).unwrap();
        changed
            .add(&index(&[(9, ForkNumber::Main, &[5, 900]), (9, ForkNumber::Vm, &[0])], &[], &[]))
            .unwrap();
        assert_eq!(some(&changed, 9, ForkNumber::Main), (vec![3, 5, 900], u32::MAX));
        assert_eq!(some(&changed, 9, ForkNumber::Vm), (vec![0], u32::MAX));
        assert_eq!(changed.of(relation(8), ForkNumber::Main), Changes::Nothing);
        assert_eq!(changed.of(relation(8), ForkNumber::Fsm), Changes::Everything);
        changed.touch(relation(8), ForkNumber::Main, 4);
        assert_eq!(some(&changed, 8, ForkNumber::Main), (vec![4], u32::MAX));
    }

    #[test]
    fn a_cut_changes_all_behind_it_and_the_map_page_it_cuts_through() {
        let truncate = |blocks| FileEventKind::Truncate { relation: relation(9), blocks, flags: 7 };
        let mut changed = ChangedBlocks::default();
        changed.add(&index(&[], &[truncate(50), truncate(40_000)], &[])).unwrap();
        assert_eq!(some(&changed, 9, ForkNumber::Main), (vec![], 50));
        assert_eq!(changed.of(relation(9), ForkNumber::Vm), Changes::Everything);
        let mut changed = ChangedBlocks::default();
        changed.add(&index(&[], &[truncate(40_000)], &[])).unwrap();
        assert_eq!(some(&changed, 9, ForkNumber::Vm), (vec![], 1));
        assert_eq!(changed.of(relation(9), ForkNumber::Init), Changes::Nothing);
    }

    #[test]
    fn what_was_made_or_went_changed_whole() {
        let everything = |events: &[FileEventKind], dropped: &[Oid]| {
            let mut changed = ChangedBlocks::default();
            changed.add(&index(&[], events, dropped)).unwrap();
            changed.of(relation(9), ForkNumber::Main) == Changes::Everything
        };
        let (there, elsewhere) = ((1663, 5), (1663, 6));
        assert!(everything(&[], &[9]));
        assert!(!everything(&[], &[8]));
        assert!(everything(&[FileEventKind::Create { relation: relation(9), fork: ForkNumber::Main }], &[]));
        assert!(!everything(&[FileEventKind::Create { relation: relation(9), fork: ForkNumber::Vm }], &[]));
        assert!(everything(&[FileEventKind::DatabaseCopy { to: there, from: elsewhere }], &[]));
        assert!(!everything(&[FileEventKind::DatabaseCopy { to: elsewhere, from: there }], &[]));
        assert!(everything(&[FileEventKind::DatabaseCreate { database: there }], &[]));
        assert!(everything(&[FileEventKind::DatabaseDrop { db_oid: 5, tablespaces: vec![1663] }], &[]));
        assert!(everything(&[FileEventKind::TablespaceDrop { spc_oid: 1663 }], &[]));
        assert!(!everything(&[FileEventKind::RelationMap { spc_oid: 1663, db_oid: 5 }], &[]));
    }

    #[test]
    fn a_segment_that_does_not_tell_all_is_a_doubt() {
        let mut changed = ChangedBlocks::default();
        let mut faulty = index(&[], &[], &[]);
        faulty.faults.push(AdmittedFault { at: Lsn::from(0x28), message: "xl_crc".into() });
        let doubt = changed.add(&faulty).unwrap_err();
        assert_eq!(doubt.to_string(), "it was admitted with a fault at 0/28: xl_crc");
        let mut custom = index(&[], &[], &[]);
        custom.rmgrs.push(RmgrCount { rmid: 128, records: 1, record_bytes: 30, image_bytes: 0 });
        let doubt = changed.add(&custom).unwrap_err();
        let expected = "it has records of the resource manager 128, which is an extension's";
        assert_eq!(doubt.to_string(), expected);
    }
}
