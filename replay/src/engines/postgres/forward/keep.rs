//! What of the log still matters, found by walking it from its end: what a later image, a cut or a drop made
//! irrelevant is passed over.

use std::collections::BTreeMap;
use std::io;

use foldhash::{HashMap, HashSet};
use waltide_format::engines::postgres::wal::{ParameterChange, SmgrRecord, VM_HEAP_BLOCKS_PER_PAGE};
use waltide_format::{BlockNumber, ForkNumber, Lsn, Oid, RelFileLocator};

use super::super::selection::Selection;
use super::decode::{DatabaseCopy, Decoded, Deed, How, PageTag};
use super::spill::{CHUNK_BYTES, Chain, Entry, Spill};

/// Blocks that are kept, and applied, together: 32 MiB of pages. `relseg_size` is a multiple.
pub(in super::super) const PART_BLOCKS: u32 = 4096;
const FORKS: [ForkNumber; 4] = [ForkNumber::Main, ForkNumber::Fsm, ForkNumber::Vm, ForkNumber::Init];

/// Blocks of a fork that lie side by side.
#[derive(Debug, Default)]
pub(super) struct Part {
    /// A bit for each block of which everything that matters is kept.
    closed: Vec<u64>,
    pub(super) chain: Chain,
}

impl Part {
    fn is_closed(&self, within: u32) -> bool {
        self.closed.get(within as usize / 64).is_some_and(|word| word >> (within % 64) & 1 == 1)
    }

    fn close(&mut self, within: u32) {
        let at = within as usize / 64;
        if self.closed.len() <= at {
            self.closed.resize(at.saturating_add(1), 0);
        }
        if let Some(word) = self.closed.get_mut(at) {
            *word |= 1 << (within % 64);
        }
    }
}

/// What becomes of a fork.
#[derive(Debug, Default)]
pub(super) struct Fork {
    /// Of what was there before the log, so many blocks at the most are left.
    pub(super) cap: Option<BlockNumber>,
    /// So many blocks it has at least.
    pub(super) blocks: BlockNumber,
    /// Whether its file is there at the end, where the log says so.
    pub(super) exists: Option<bool>,
    pub(super) parts: BTreeMap<u32, Part>,
}

impl Fork {
    /// Whether what the base backup has of a block is of no use.
    fn is_superseded(&self, block: BlockNumber) -> bool {
        let part = self.parts.get(&(block / PART_BLOCKS));
        self.cap.is_some_and(|cap| block >= cap) || part.is_some_and(|p| p.is_closed(block % PART_BLOCKS))
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
    /// Databases, each in a tablespace, of which nothing from before is left.
    gone: HashSet<(Oid, Oid)>,
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
        parts.fold(0, |sum, part| sum.saturating_add(part.chain.bytes()))
    }

    /// Whether what the base backup has of a block is of no use.
    pub(super) fn is_superseded(&self, tag: PageTag) -> bool {
        let PageTag { relation, fork, block } = tag;
        let found = self.relations.get(&relation);
        let fork = found.and_then(|r| r.forks().find(|(number, _)| *number == fork));
        fork.is_some_and(|(_, fork)| fork.is_superseded(block))
            || self.gone.contains(&(relation.spc_oid, relation.db_oid))
    }
}

/// Takes segments apart from the newest to the oldest.
#[derive(Debug)]
pub(super) struct Keeper {
    spill: Spill,
    /// The newest stretch first; the last is being added to.
    newer: Vec<Kept>,
    kept: Kept,
    settings: Vec<(Lsn, ParameterChange)>,
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
        let (newer, kept, settings) = (Vec::new(), Kept::default(), Vec::new());
        Self { spill, newer, kept, settings, buffered: 0, memory, selection, records: 0 }
    }

    /// Adds what lies before all that was added.
    pub(super) fn add(&mut self, decoded: &Decoded) -> io::Result<()> {
        self.records = self.records.saturating_add(decoded.count);
        self.settings.extend(decoded.settings.iter().rev());
        for (number, deed) in decoded.deeds.iter().rev() {
            let Some((span, record)) = decoded.record(*number) else { continue };
            let entry = |how, block| Entry { start: span.start, end: span.end, how, block, record };
            match deed {
                Deed::Page { tag, how, anew } => self.page(*tag, *anew, &entry(*how, tag.block))?,
                Deed::State => {
                    let more = self.kept.state.push(&entry(How::Block(0), 0));
                    self.buffered = self.buffered.saturating_add(more);
                }
                Deed::Create { relation, fork } => {
                    if !self.is_gone(*relation) {
                        let relation = self.kept.relations.entry(*relation).or_default();
                        relation.fork_mut(*fork).exists.get_or_insert(true);
                    }
                }
                Deed::Cut { relation, blocks, flags } => self.cut(*relation, *blocks, *flags),
                Deed::Drop(relation) => self.drop(*relation),
                Deed::DropDatabase { spc_oid, db_oid } => {
                    self.kept.gone.insert((*spc_oid, *db_oid));
                }
                Deed::Copy(copy) => {
                    self.kept.begins_with = Some(*copy);
                    self.newer.push(std::mem::take(&mut self.kept));
                }
            }
            if self.buffered > self.memory {
                self.make_room()?;
            }
        }
        Ok(())
    }

    pub(super) fn finish(mut self) -> Log {
        self.newer.push(self.kept);
        self.newer.reverse();
        self.settings.reverse();
        Log { spill: self.spill, stretches: self.newer, settings: self.settings, records: self.records }
    }

    fn is_gone(&self, relation: RelFileLocator) -> bool {
        self.kept.gone.contains(&(relation.spc_oid, relation.db_oid))
    }

    fn page(&mut self, tag: PageTag, anew: bool, entry: &Entry<'_>) -> io::Result<()> {
        if self.is_gone(tag.relation) {
            return Ok(());
        }
        let fork = self.kept.relations.entry(tag.relation).or_default().fork_mut(tag.fork);
        // Clearing the map of blocks that are cut makes nothing that was not there.
        if !matches!(entry.how, How::CutVisibility(_)) {
            fork.exists.get_or_insert(true);
            fork.grow(tag.block.saturating_add(1));
        }
        let wanted = self.selection.as_ref().is_none_or(|selection| selection.wants(tag.relation));
        if !wanted || fork.is_superseded(tag.block) {
            return Ok(());
        }
        let part = fork.parts.entry(tag.block / PART_BLOCKS).or_default();
        if anew {
            part.close(tag.block % PART_BLOCKS);
        }
        self.buffered = self.buffered.saturating_add(part.chain.push(entry));
        self.kept.changes = self.kept.changes.saturating_add(1);
        Ok(())
    }

    fn cut(&mut self, relation: RelFileLocator, blocks: BlockNumber, flags: u32) {
        if self.is_gone(relation) {
            return;
        }
        let relation = self.kept.relations.entry(relation).or_default();
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
        if self.is_gone(relation) {
            return;
        }
        let relation = self.kept.relations.entry(relation).or_default();
        for fork in FORKS {
            let fork = relation.fork_mut(fork);
            fork.exists.get_or_insert(false);
            fork.cut(0);
        }
    }

    /// Moves buffers to the file, the long ones first.
    fn make_room(&mut self) -> io::Result<()> {
        for least in [CHUNK_BYTES, CHUNK_BYTES / 16, 1] {
            for kept in self.newer.iter_mut().chain([&mut self.kept]) {
                let forks = kept.relations.values_mut().flat_map(|r| &mut r.0);
                let chains = forks.flat_map(|fork| fork.parts.values_mut()).map(|part| &mut part.chain);
                for chain in chains.chain([&mut kept.state]).filter(|chain| chain.buffered() >= least) {
                    self.buffered = self.buffered.saturating_sub(chain.flush(&self.spill)?);
                }
            }
            if self.buffered <= self.memory / 2 {
                break;
            }
        }
        Ok(())
    }
}
