//! What of the log still matters, found by walking it from its end: what a later image, a cut or a drop made
//! irrelevant is passed over.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use foldhash::HashMap;
use waltide_format::engines::postgres::wal::{ParameterChange, SmgrRecord, VM_HEAP_BLOCKS_PER_PAGE};
use waltide_format::{BlockNumber, ForkNumber, Lsn, RelFileLocator, Xid};

use super::super::selection::Selection;
use super::batch::{Batch, Idle, PIECE_BYTES, PartTag};
use super::decode::{DatabaseCopy, Decoded, Deed, PageTag, Pools, Step};
use super::newer::{Blocks, MadeAnew, Newer};
use super::spill::{Chain, Spill};

const FORKS: [ForkNumber; 4] = [ForkNumber::Main, ForkNumber::Fsm, ForkNumber::Vm, ForkNumber::Init];

/// What becomes of a fork.
#[derive(Debug, Default)]
pub(super) struct Fork {
    /// So many blocks it has at least.
    pub(super) blocks: BlockNumber,
    /// Whether its file is there at the end, where the log says so.
    pub(super) exists: Option<bool>,
    /// What is kept of so many blocks that lie side by side.
    pub(super) parts: BTreeMap<u32, Chain>,
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
}

impl Kept {
    /// Bytes of what is kept of pages.
    pub(super) fn page_bytes(&self) -> u64 {
        let forks = self.relations.values().flat_map(|r| &r.0);
        let parts = forks.flat_map(|fork| fork.parts.values());
        parts.fold(0, |sum, chain| sum.saturating_add(chain.bytes()))
    }

    /// Takes note of what a record does to files, where the `newer` log has not lost them.
    fn note(&mut self, deed: &Deed, newer: &mut MadeAnew) {
        match deed {
            Deed::Create { relation, fork } if !newer.has_lost(*relation) => {
                let relation = self.relations.entry(*relation).or_default();
                relation.fork_mut(*fork).exists.get_or_insert(true);
            }
            Deed::Cut { relation, blocks, flags } if !newer.has_lost(*relation) => {
                self.cut(*relation, *blocks, *flags, newer);
            }
            Deed::Drop(relation) if !newer.has_lost(*relation) => self.drop(*relation, newer),
            Deed::DropDatabase { spc_oid, db_oid } => newer.lose_database(*spc_oid, *db_oid),
            Deed::Create { .. } | Deed::Cut { .. } | Deed::Drop(_) | Deed::Copy(_) => {}
        }
    }

    fn cut(&mut self, of: RelFileLocator, blocks: BlockNumber, flags: u32, newer: &mut MadeAnew) {
        self.relations.entry(of).or_default();
        let mut cut = |fork: ForkNumber, blocks: BlockNumber| newer.cut(of, fork, blocks);
        if flags & SmgrRecord::TRUNCATE_HEAP != 0 {
            cut(ForkNumber::Main, blocks);
        }
        if flags & SmgrRecord::TRUNCATE_VM != 0 {
            cut(ForkNumber::Vm, blocks.div_ceil(VM_HEAP_BLOCKS_PER_PAGE));
        }
        if flags & SmgrRecord::TRUNCATE_FSM != 0 {
            // A map without entries is legal; one that speaks of blocks that are gone was not always.
            cut(ForkNumber::Fsm, 0);
        }
    }

    fn drop(&mut self, of: RelFileLocator, newer: &mut MadeAnew) {
        let relation = self.relations.entry(of).or_default();
        for fork in FORKS {
            newer.cut(of, fork, 0);
            relation.fork_mut(fork).exists.get_or_insert(false);
        }
    }

    /// Those of a part's blocks of which nothing from before is left because they are made anew.
    pub(super) fn made_anew(&self, part: PartTag) -> Option<&Blocks> {
        self.made_anew.blocks(part).map(|blocks| &**blocks)
    }

    /// Of what a fork had before the log, so many blocks at the most are left, if it is cut.
    pub(super) fn cap(&self, relation: RelFileLocator, fork: ForkNumber) -> Option<BlockNumber> {
        self.made_anew.cap(relation, fork)
    }

    /// Whether what the base backup has of a block is of no use.
    pub(super) fn is_superseded(&self, tag: PageTag) -> bool {
        self.made_anew.contains(tag)
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
    newest_xids: Vec<(Lsn, Xid)>,
    last_record: Option<(Lsn, Lsn)>,
    idle: Idle,
    /// Bytes of memory that chains have.
    buffered: usize,
    memory: usize,
    /// Of other relations' pages nothing is kept, but how many there are.
    selection: Option<Arc<Selection>>,
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
    /// The newest transactions that wrote anything before certain places, oldest first; one that is far older than the one
    /// before is none.
    pub(super) newest_xids: Vec<(Lsn, Xid)>,
    /// Start and end of the last record.
    pub(super) last_record: Option<(Lsn, Lsn)>,
    /// Records seen.
    pub(super) records: u64,
    pub(super) segments: Segments,
}

/// How many segments the log was read out of.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Segments {
    pub(super) read: u64,
    /// Of so many the index told all that matters.
    pub(super) spared: u64,
}

impl Keeper {
    /// Keeps up to about `memory` bytes, and the rest in `spill`.
    pub(super) fn new(spill: Spill, memory: usize, selection: Option<Arc<Selection>>) -> Self {
        let (complete, kept, newer, settings) = (Vec::new(), Kept::default(), Newer::default(), Vec::new());
        let (idle, buffered, records) = (Idle::default(), 0, 0);
        let (newest_xids, last_record) = (Vec::new(), None);
        Self {
            spill,
            complete,
            kept,
            newer,
            settings,
            newest_xids,
            last_record,
            idle,
            buffered,
            memory,
            selection,
            records,
        }
    }

    /// What was added so far makes irrelevant.
    pub(super) const fn newer(&self) -> &Newer {
        &self.newer
    }

    /// Whether what was left out of a segment is of no use to the stretch that it would be added to.
    pub(super) fn fits(&self, decoded: &Decoded) -> bool {
        decoded.stretch == self.complete.len()
    }

    /// Whether the last record in the range was added.
    pub(super) const fn has_last_record(&self) -> bool {
        self.last_record.is_some()
    }

    /// What segments are taken apart with.
    pub(super) fn pools(&self) -> Pools {
        Pools::new(self.idle.clone(), self.selection.clone())
    }

    /// Adds what lies before all that was added, and takes it away from where it was.
    pub(super) fn add(&mut self, decoded: &mut Decoded) -> io::Result<()> {
        self.records = self.records.saturating_add(decoded.count);
        self.settings.extend(decoded.settings.iter().rev());
        self.newest_xids.extend(decoded.newest_xids.iter().rev());
        self.last_record = self.last_record.or(decoded.last_record);
        while let Some(step) = decoded.steps.pop() {
            match step {
                Step::Entries(mut batch) => {
                    self.add_batch(&mut batch)?;
                    decoded.take_back(batch);
                }
                Step::Files(Deed::Copy(copy)) => {
                    self.kept.begins_with = Some(copy);
                    self.complete_stretch();
                }
                Step::Files(deed) => self.kept.note(&deed, self.newer.write().made_anew_mut()),
            }
        }
        Ok(())
    }

    fn complete_stretch(&mut self) {
        self.kept.made_anew = self.newer.begin_stretch();
        self.complete.push(std::mem::take(&mut self.kept));
    }

    /// Adds what was done to a part before all that was added of it. What the newer log makes irrelevant is left out where
    /// that says much; the rest of it is passed over when it is applied.
    fn add_batch(&mut self, batch: &mut Batch) -> io::Result<()> {
        let Self { kept, idle, newer, selection, .. } = self;
        let chain = match batch.of {
            None => &mut kept.state,
            Some(part) => {
                let (is_lost, cap, made_anew) = {
                    let newer = newer.read();
                    let newer = newer.made_anew();
                    let (relation, fork) = (part.relation, part.fork);
                    (newer.has_lost(relation), newer.cap(relation, fork), newer.blocks(part).cloned())
                };
                if is_lost {
                    return Ok(());
                }
                let fork = kept.relations.entry(part.relation).or_default().fork_mut(part.fork);
                if batch.reach > 0 {
                    fork.exists.get_or_insert(true);
                    fork.blocks = fork.blocks.max(cap.map_or(batch.reach, |cap| cap.min(batch.reach)));
                }
                if !selection.as_ref().is_none_or(|selection| selection.wants(part.relation)) {
                    return Ok(());
                }
                let made_anew = made_anew.as_deref();
                if cap.is_some_and(|cap| batch.goes_beyond(cap)) || batch.repeats(made_anew) {
                    let is_anew = |block| made_anew.is_some_and(|blocks| blocks.contains(block));
                    let is_cut = |block| cap.is_some_and(|cap| block >= cap);
                    batch.leave_out(|block| !is_cut(block) && !is_anew(block), idle);
                }
                if batch.count == 0 {
                    return Ok(());
                }
                if batch.anew().next().is_some() {
                    let mut newer = newer.write();
                    let blocks = newer.made_anew_mut().blocks_mut(part);
                    for block in batch.anew() {
                        blocks.insert(block);
                    }
                }
                fork.parts.entry(part.part).or_default()
            }
        };
        let more = chain.push(batch, idle);
        self.buffered = self.buffered.saturating_add(more);
        if self.buffered > self.memory {
            self.make_room()?;
        }
        Ok(())
    }

    /// Ends it. Of the log so many segments were read.
    pub(super) fn finish(mut self, segments: Segments) -> Log {
        self.complete_stretch();
        self.complete.reverse();
        self.settings.reverse();
        self.newest_xids.reverse();
        Log {
            spill: self.spill,
            stretches: self.complete,
            settings: self.settings,
            newest_xids: self.newest_xids,
            last_record: self.last_record,
            records: self.records,
            segments,
        }
    }

    /// Moves buffers to the file, the long ones first, until a part of the memory is free: so little that the threads that take
    /// segments apart have enough to do until then.
    fn make_room(&mut self) -> io::Result<()> {
        let enough = self.memory.saturating_sub(self.memory / 32);
        for least in [PIECE_BYTES, PIECE_BYTES / 16, 1] {
            for kept in self.complete.iter_mut().chain([&mut self.kept]) {
                let forks = kept.relations.values_mut().flat_map(|r| &mut r.0);
                let chains = forks.flat_map(|fork| fork.parts.values_mut());
                for chain in chains.chain([&mut kept.state]).filter(|chain| chain.buffered() >= least) {
                    let wanted = self.buffered.saturating_sub(enough);
                    let freed = chain.flush(wanted, &self.spill, &self.idle)?;
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

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::super::batch::PART_BLOCKS;
    use super::*;

    /// Some relations of two databases.
    fn relation(number: u32) -> RelFileLocator {
        RelFileLocator { spc_oid: 1663, db_oid: number % 2, rel_number: 16384 + number }
    }

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Page { number: u32, block: BlockNumber, anew: bool },
        Files(Deed),
    }

    fn step() -> impl Strategy<Value = Step> {
        let block = prop_oneof![9 => 0u32..5, 1 => PART_BLOCKS..PART_BLOCKS + 2];
        let number = 0u32..4;
        let copy = DatabaseCopy { at: Lsn::ZERO, from: (1663, 0), to: (1663, 7) };
        prop_oneof![
            60 => (number.clone(), block, prop::bool::weighted(0.3))
                .prop_map(|(number, block, anew)| Step::Page { number, block, anew }),
            4 => (number.clone(), 0u32..6).prop_map(|(number, blocks)| {
                Step::Files(Deed::Cut { relation: relation(number), blocks, flags: SmgrRecord::TRUNCATE_HEAP })
            }),
            2 => number.clone().prop_map(|number| Step::Files(Deed::Drop(relation(number)))),
            2 => number.prop_map(|number| {
                Step::Files(Deed::Create { relation: relation(number), fork: ForkNumber::Main })
            }),
            1 => (0u32..2).prop_map(|db_oid| Step::Files(Deed::DropDatabase { spc_oid: 1663, db_oid })),
            2 => Just(Step::Files(Deed::Copy(copy))),
        ]
    }

    /// What a relation comes to, step by step in their order.
    #[derive(Debug, Clone, Default)]
    struct Plain {
        pages: BTreeMap<BlockNumber, Vec<(u64, bool)>>,
        cap: Option<BlockNumber>,
        blocks: BlockNumber,
        exists: Option<bool>,
        is_lost: bool,
    }

    impl Plain {
        fn cut(&mut self, blocks: BlockNumber) {
            self.pages.retain(|block, _| *block < blocks);
            self.cap = Some(self.cap.map_or(blocks, |cap| cap.min(blocks)));
            self.blocks = self.blocks.min(blocks);
        }

        fn does(&mut self, number: u32, at: u64, step: &Step) {
            let own = relation(number);
            match step {
                Step::Page { number: n, block, anew } if *n == number => {
                    self.pages.entry(*block).or_default().push((at, *anew));
                    self.blocks = self.blocks.max(block + 1);
                    self.exists = Some(true);
                }
                Step::Files(Deed::Cut { relation, blocks, .. }) if *relation == own => self.cut(*blocks),
                Step::Files(Deed::Create { relation, .. }) if *relation == own => self.exists = Some(true),
                Step::Files(Deed::Drop(relation)) if *relation == own => {
                    self.cut(0);
                    self.exists = Some(false);
                }
                Step::Files(Deed::DropDatabase { db_oid, .. }) if *db_oid == own.db_oid => {
                    *self = Self { is_lost: true, ..Self::default() };
                }
                Step::Files(Deed::Copy(_)) => *self = Self::default(),
                _ => {}
            }
        }
    }

    /// What is applied to each page of a fork.
    fn applied(
        log: &Log,
        kept: &Kept,
        relation: RelFileLocator,
        fork: &Fork,
    ) -> BTreeMap<BlockNumber, Vec<(u64, bool)>> {
        let mut pages: BTreeMap<BlockNumber, Vec<(u64, bool)>> = BTreeMap::new();
        for (part, chain) in &fork.parts {
            let tag = PartTag { relation, fork: ForkNumber::Main, part: *part };
            let made_anew = kept.made_anew(tag);
            let each = |e: super::super::batch::Entry<'_>| -> io::Result<()> {
                let to_come = !e.anew && made_anew.is_some_and(|blocks| blocks.contains(e.block));
                if pages.contains_key(&e.block) || !to_come {
                    pages.entry(e.block).or_default().push((e.start.get(), e.anew));
                }
                Ok(())
            };
            chain.oldest_first(&log.spill, &(0..PART_BLOCKS), each).unwrap();
        }
        pages
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// However many segments are taken apart while newer ones are still to be added.
        #[test]
        fn what_is_kept_of_a_log_is_what_comes_of_it(
            segments in proptest::collection::vec(proptest::collection::vec(step(), 0..20), 1..8),
            ahead in 0usize..4,
            memory in prop_oneof![Just(usize::MAX), 0usize..4000],
        ) {
            let dir = tempfile::tempdir().unwrap();
            let mut keeper = Keeper::new(Spill::new(dir.path()).unwrap(), memory, None);
            let told: Vec<Vec<_>> = segments.iter().enumerate().map(|(s, steps)| {
                steps.iter().enumerate().map(|(i, step)| match *step {
                    Step::Page { number, block, anew } => {
                        let tag = PageTag { relation: relation(number), fork: ForkNumber::Main, block };
                        Ok((tag, anew, Lsn::from((s * 1000 + i) as u64 * 8)))
                    }
                    Step::Files(deed) => Err(deed),
                }).collect()
            }).collect();
            let taken = |s: usize, newer: &Newer| {
                Decoded::of(&told[s], newer, true).unwrap_or_else(|| Decoded::of(&told[s], newer, false).unwrap())
            };
            let mut under_way = VecDeque::new();
            for s in (0..segments.len()).rev() {
                under_way.push_back((s, taken(s, keeper.newer())));
                while under_way.len() > if s == 0 { 0 } else { ahead } {
                    let (s, mut decoded) = under_way.pop_front().unwrap();
                    if !keeper.fits(&decoded) {
                        decoded = taken(s, keeper.newer());
                    }
                    keeper.add(&mut decoded).unwrap();
                    prop_assert!(keeper.buffered <= memory);
                }
            }
            let log = keeper.finish(Segments::default());
            let mut stretches = log.stretches.iter();
            let mut expected = vec![Plain::default(); 4];
            let all = segments.iter().enumerate().flat_map(|(s, steps)| {
                steps.iter().enumerate().map(move |(i, step)| ((s * 1000 + i) as u64 * 8, step))
            });
            for (at, step) in all.map(|(at, step)| (at, Some(step))).chain([(0, None)]) {
                if step.is_none_or(|step| matches!(step, Step::Files(Deed::Copy(_)))) {
                    let kept = stretches.next().unwrap();
                    for (number, plain) in (0u32..).zip(&expected) {
                        let own = relation(number);
                        let none = Relation::default();
                        let found = kept.relations.get(&own).unwrap_or(&none);
                        let (_, fork) = found.forks().next().unwrap();
                        prop_assert_eq!((kept.cap(own, ForkNumber::Main), fork.blocks, fork.exists), (plain.cap, plain.blocks, plain.exists));
                        let pages = applied(&log, kept, own, fork);
                        prop_assert!(pages.keys().eq(plain.pages.keys()), "{:?} {:?}", pages, plain);
                        for (block, all) in &plain.pages {
                            let found = &pages[block];
                            let tag = PageTag { relation: own, fork: ForkNumber::Main, block: *block };
                            // From somewhere on, where nothing from before is needed, and no later than it is made anew last.
                            prop_assert!(all.ends_with(found), "{} of {:?} of {:?}", block, found, all);
                            let last = all.iter().rposition(|(_, anew)| *anew);
                            prop_assert!(found.len() >= all.len() - last.unwrap_or(0));
                            prop_assert!(last.is_none() || found[0].1);
                            prop_assert_eq!(kept.is_superseded(tag), plain.is_lost || last.is_some() || plain.cap.is_some_and(|cap| *block >= cap));
                        }
                    }
                }
                for (number, plain) in (0u32..).zip(&mut expected) {
                    if let Some(step) = step {
                        plain.does(number, at, step);
                    }
                }
            }
            prop_assert!(stretches.next().is_none());
        }
    }
}
