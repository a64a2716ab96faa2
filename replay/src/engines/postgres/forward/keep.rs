//! What of the log still matters, found by walking it from its end: what a later image, a cut or a drop made
//! irrelevant is passed over.

use std::collections::BTreeMap;
use std::io;

use foldhash::HashMap;
use waltide_format::engines::postgres::wal::{ParameterChange, SmgrRecord, VM_HEAP_BLOCKS_PER_PAGE};
use waltide_format::{BlockNumber, ForkNumber, Lsn, Oid, RelFileLocator};

use super::super::selection::Selection;
use super::decode::{DatabaseCopy, Decoded, Deed, How, Noted, PageTag, Seen};
use super::newer::{MadeAnew, Newer};
use super::spill::{CHUNK_BYTES, Chain, Entry, Idle, Spill};

/// Blocks that are kept, and applied, together: 32 MiB of pages. `relseg_size` is a multiple.
pub(in super::super) const PART_BLOCKS: u32 = 4096;
const FORKS: [ForkNumber; 4] = [ForkNumber::Main, ForkNumber::Fsm, ForkNumber::Vm, ForkNumber::Init];

/// What becomes of a fork.
#[derive(Debug, Default)]
pub(super) struct Fork {
    /// Of what was there before the log, so many blocks at the most are left.
    pub(super) cap: Option<BlockNumber>,
    /// So many blocks it has at least.
    pub(super) blocks: BlockNumber,
    /// Whether its file is there at the end, where the log says so.
    pub(super) exists: Option<bool>,
    /// What is kept of so many blocks that lie side by side.
    pub(super) parts: BTreeMap<u32, Chain>,
}

impl Fork {
    /// Whether a block is cut off later.
    fn cuts(&self, block: BlockNumber) -> bool {
        self.cap.is_some_and(|cap| block >= cap)
    }

    fn cut(&mut self, blocks: BlockNumber) {
        self.cap = Some(self.cap.map_or(blocks, |cap| cap.min(blocks)));
    }

    fn grow(&mut self, blocks: BlockNumber) {
        self.blocks = self.blocks.max(self.cap.map_or(blocks, |cap| cap.min(blocks)));
    }
}

/// What becomes of a relation.
#[derive(Debug, Default)]
pub(super) struct Relation([Fork; 4]);

impl Relation {
    fn fork_mut(&mut self, fork: ForkNumber) -> &mut Fork {
        let [main, fsm, vm, init] = &mut self.0;
        match fork {
            ForkNumber::Main => main,
            ForkNumber::Fsm => fsm,
            ForkNumber::Vm => vm,
            ForkNumber::Init => init,
        }
    }

    /// Its forks.
    pub(super) fn forks(&self) -> impl Iterator<Item = (ForkNumber, &Fork)> {
        FORKS.into_iter().zip(&self.0)
    }
}

/// What is kept of a stretch of the log.
#[derive(Debug, Default)]
pub(super) struct Kept {
    pub(super) relations: HashMap<RelFileLocator, Relation>,
    /// Pages and databases of which nothing from before is left.
    made_anew: MadeAnew,
    /// Records that change what is not in relations' files.
    pub(super) state: Chain,
    /// The stretch begins with this copy.
    pub(super) begins_with: Option<DatabaseCopy>,
    /// Changes to pages that are kept.
    pub(super) changes: u64,
}

impl Kept {
    /// Bytes of what is kept of pages.
    pub(super) fn page_bytes(&self) -> u64 {
        let forks = self.relations.values().flat_map(|r| &r.0);
        let parts = forks.flat_map(|fork| fork.parts.values());
        parts.fold(0, |sum, chain| sum.saturating_add(chain.bytes()))
    }

    /// Takes note of what a record does; where it is kept, if it is needed.
    fn chain(
        &mut self,
        deed: &Deed,
        selection: Option<&Selection>,
        known: &mut Known<'_>,
    ) -> Option<&mut Chain> {
        match deed {
            Deed::Page { tag, how, anew } => return self.page_chain(*tag, *how, *anew, selection, known),
            Deed::State => return Some(&mut self.state),
            Deed::Create { relation, fork } if !known.has_lost(*relation) => {
                let relation = self.relations.entry(*relation).or_default();
                relation.fork_mut(*fork).exists.get_or_insert(true);
            }
            Deed::Cut { relation, blocks, flags } if !known.has_lost(*relation) => {
                self.cut(*relation, *blocks, *flags);
            }
            Deed::Drop(relation) if !known.has_lost(*relation) => self.drop(*relation),
            Deed::DropDatabase { spc_oid, db_oid } => known.gone.push((*spc_oid, *db_oid)),
            Deed::Create { .. } | Deed::Cut { .. } | Deed::Drop(_) | Deed::Copy(_) => {}
        }
        None
    }

    fn page_chain(
        &mut self,
        tag: PageTag,
        how: How,
        anew: bool,
        selection: Option<&Selection>,
        known: &mut Known<'_>,
    ) -> Option<&mut Chain> {
        if known.has_lost(tag.relation) {
            return None;
        }
        let fork = self.relations.entry(tag.relation).or_default().fork_mut(tag.fork);
        // Clearing the map of blocks that are cut makes nothing that was not there.
        if !matches!(how, How::CutVisibility(_)) {
            fork.exists.get_or_insert(true);
            fork.grow(tag.block.saturating_add(1));
        }
        let wanted = selection.is_none_or(|selection| selection.wants(tag.relation));
        if !wanted || fork.cuts(tag.block) || known.newer.contains(tag) {
            return None;
        }
        if anew {
            known.pages.push(tag);
        }
        self.changes = self.changes.saturating_add(1);
        Some(fork.parts.entry(tag.block / PART_BLOCKS).or_default())
    }

    fn cut(&mut self, relation: RelFileLocator, blocks: BlockNumber, flags: u32) {
        let relation = self.relations.entry(relation).or_default();
        if flags & SmgrRecord::TRUNCATE_HEAP != 0 {
            relation.fork_mut(ForkNumber::Main).cut(blocks);
        }
        if flags & SmgrRecord::TRUNCATE_VM != 0 {
            relation.fork_mut(ForkNumber::Vm).cut(blocks.div_ceil(VM_HEAP_BLOCKS_PER_PAGE));
        }
        if flags & SmgrRecord::TRUNCATE_FSM != 0 {
            // A map without entries is legal; one that speaks of blocks that are gone was not always.
            relation.fork_mut(ForkNumber::Fsm).cut(0);
        }
    }

    fn drop(&mut self, relation: RelFileLocator) {
        let relation = self.relations.entry(relation).or_default();
        for fork in FORKS {
            let fork = relation.fork_mut(fork);
            fork.exists.get_or_insert(false);
            fork.cut(0);
        }
    }

    /// Whether what the base backup has of a block is of no use.
    pub(super) fn is_superseded(&self, tag: PageTag) -> bool {
        let found = self.relations.get(&tag.relation);
        let fork = found.and_then(|r| r.forks().find(|(number, _)| *number == tag.fork));
        fork.is_some_and(|(_, fork)| fork.cuts(tag.block)) || self.made_anew.contains(tag)
    }
}

/// What is known of the newer log while deeds are added.
struct Known<'a> {
    /// Of what was added before.
    newer: &'a MadeAnew,
    /// Pages that these deeds make anew, and databases that they remove.
    pages: Vec<PageTag>,
    gone: Vec<(Oid, Oid)>,
}

impl Known<'_> {
    /// Whether the relation's database is removed later.
    fn has_lost(&self, relation: RelFileLocator) -> bool {
        self.newer.has_lost(relation) || self.gone.contains(&(relation.spc_oid, relation.db_oid))
    }
}

/// Takes segments apart from the newest to the oldest.
#[derive(Debug)]
pub(super) struct Keeper {
    spill: Spill,
    /// The stretches that are complete, the newest first.
    complete: Vec<Kept>,
    /// The one that is being added to, and what it makes anew.
    kept: Kept,
    newer: Newer,
    settings: Vec<(Lsn, ParameterChange)>,
    idle: Idle,
    /// Bytes of memory that chains have.
    buffered: usize,
    memory: usize,
    /// Of other relations' pages nothing is kept, but how many there are.
    selection: Option<Selection>,
    /// Records seen.
    records: u64,
}

/// Everything that is kept.
#[derive(Debug)]
pub(super) struct Log {
    pub(super) spill: Spill,
    /// Oldest first.
    pub(super) stretches: Vec<Kept>,
    /// Changes of settings, oldest first.
    pub(super) settings: Vec<(Lsn, ParameterChange)>,
    /// Records seen.
    pub(super) records: u64,
}

impl Keeper {
    /// Keeps up to about `memory` bytes, and the rest in `spill`.
    pub(super) fn new(spill: Spill, memory: usize, selection: Option<Selection>) -> Self {
        let (complete, kept, newer, settings) = (Vec::new(), Kept::default(), Newer::default(), Vec::new());
        let (idle, buffered, records) = (Idle::default(), 0, 0);
        Self { spill, complete, kept, newer, settings, idle, buffered, memory, selection, records }
    }

    /// What was added so far makes irrelevant.
    pub(super) const fn newer(&self) -> &Newer {
        &self.newer
    }

    /// Whether what was left out of a segment is of no use to the stretch that it would be added to.
    pub(super) fn fits(&self, decoded: &Decoded) -> bool {
        decoded.stretch == self.complete.len()
    }

    /// Adds what lies before all that was added.
    pub(super) fn add(&mut self, decoded: &Decoded) -> io::Result<()> {
        self.records = self.records.saturating_add(decoded.count);
        self.settings.extend(decoded.settings.iter().rev());
        let mut deeds = decoded.deeds.as_slice();
        loop {
            let copy = deeds.iter().rposition(|noted| matches!(noted.deed, Deed::Copy(_)));
            let (before, after) =
                deeds.split_at_checked(copy.map_or(0, |at| at.saturating_add(1))).unwrap_or((&[], deeds));
            self.add_stretch(decoded, after)?;
            let Some((Noted { deed: Deed::Copy(copy), .. }, rest)) = before.split_last() else {
                return Ok(());
            };
            self.kept.begins_with = Some(*copy);
            self.complete_stretch();
            deeds = rest;
        }
    }

    fn complete_stretch(&mut self) {
        self.kept.made_anew = self.newer.begin_stretch();
        self.complete.push(std::mem::take(&mut self.kept));
    }

    /// Adds deeds of one stretch. A segment was taken apart so that none of them is about a page that a later one of the
    /// same segment makes anew: so what they make anew is told to others when all are added, who read until then.
    fn add_stretch(&mut self, decoded: &Decoded, deeds: &[Noted]) -> io::Result<()> {
        let shared = self.newer.clone();
        let newer = shared.read();
        let mut known = Known { newer: newer.made_anew(), pages: Vec::new(), gone: Vec::new() };
        for noted in deeds.iter().rev() {
            let Self { kept, selection, idle, .. } = &mut *self;
            let (how, block) = match &noted.deed {
                Deed::Page { tag, how, .. } => (*how, tag.block),
                _ => (How::Block(0), 0),
            };
            let Some(chain) = kept.chain(&noted.deed, selection.as_ref(), &mut known) else { continue };
            let Some((Seen { start, end, xid, .. }, packed)) = decoded.record(noted) else { continue };
            let more = chain.push(&Entry { start, end, xid, how, block, packed }, idle);
            self.buffered = self.buffered.saturating_add(more);
            if self.buffered > self.memory {
                self.make_room()?;
            }
        }
        let Known { pages, gone, .. } = known;
        drop(newer);
        let mut newer = shared.write();
        pages.into_iter().for_each(|tag| newer.made_anew_mut().insert(tag));
        gone.into_iter().for_each(|(spc_oid, db_oid)| newer.made_anew_mut().lose_database(spc_oid, db_oid));
        Ok(())
    }

    pub(super) fn finish(mut self) -> Log {
        self.complete_stretch();
        self.complete.reverse();
        self.settings.reverse();
        Log { spill: self.spill, stretches: self.complete, settings: self.settings, records: self.records }
    }

    /// Moves buffers to the file, the long ones first, until a part of the memory is free: so little that the threads that take
    /// segments apart have enough to do until then.
    fn make_room(&mut self) -> io::Result<()> {
        let enough = self.memory.saturating_sub(self.memory / 32);
        for least in [CHUNK_BYTES, CHUNK_BYTES / 16, 1] {
            for kept in self.complete.iter_mut().chain([&mut self.kept]) {
                let forks = kept.relations.values_mut().flat_map(|r| &mut r.0);
                let chains = forks.flat_map(|fork| fork.parts.values_mut());
                for chain in chains.chain([&mut kept.state]).filter(|chain| chain.buffered() >= least) {
                    let wanted = self.buffered.saturating_sub(enough);
                    let freed = chain.flush(wanted, &self.spill, &mut self.idle)?;
                    self.buffered = self.buffered.saturating_sub(freed);
                    if self.buffered <= enough {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }
}
