//! What the newer log, read before the older, makes irrelevant of it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use foldhash::{HashMap, HashSet};
use waltide_format::{BlockNumber, ForkNumber, Oid, RelFileLocator};

use super::batch::{PART_BLOCKS, PartTag};
use super::decode::PageTag;

const WORDS: usize = (PART_BLOCKS / u64::BITS) as usize;

/// Some of a part's blocks, for all who look at them while there come to be more.
#[derive(Debug)]
pub(super) struct Blocks(Box<[AtomicU64; WORDS]>);

impl Default for Blocks {
    fn default() -> Self {
        Self(Box::new([const { AtomicU64::new(0) }; WORDS]))
    }
}

impl Blocks {
    /// A block's word, and its bit there.
    fn place(&self, block: BlockNumber) -> (Option<&AtomicU64>, u64) {
        let within = block % PART_BLOCKS;
        (self.0.get((within / u64::BITS) as usize), 1 << (within % u64::BITS))
    }

    /// Whether it is one of them.
    pub(super) fn contains(&self, block: BlockNumber) -> bool {
        let (word, bit) = self.place(block);
        word.is_some_and(|word| word.load(Ordering::Relaxed) & bit != 0)
    }

    /// Makes it one of them; whether it was not.
    pub(super) fn insert(&self, block: BlockNumber) -> bool {
        let (word, bit) = self.place(block);
        word.is_some_and(|word| word.fetch_or(bit, Ordering::Relaxed) & bit == 0)
    }
}

/// What the log makes anew or removes behind a moment.
#[derive(Debug, Default)]
pub(super) struct MadeAnew {
    parts: HashMap<PartTag, Arc<Blocks>>,
    /// Of what forks had before, so many blocks at the most are left.
    caps: HashMap<(RelFileLocator, ForkNumber), BlockNumber>,
    /// Databases, each in a tablespace.
    gone: HashSet<(Oid, Oid)>,
}

impl MadeAnew {
    /// Whether nothing that was done to a page before matters.
    pub(super) fn contains(&self, tag: PageTag) -> bool {
        self.parts.get(&tag.part()).is_some_and(|blocks| blocks.contains(tag.block))
            || self.cap(tag.relation, tag.fork).is_some_and(|cap| tag.block >= cap)
            || self.has_lost(tag.relation)
    }

    /// Of what a fork had before, so many blocks at the most are left, if it is cut.
    pub(super) fn cap(&self, relation: RelFileLocator, fork: ForkNumber) -> Option<BlockNumber> {
        self.caps.get(&(relation, fork)).copied()
    }

    pub(super) fn cut(&mut self, relation: RelFileLocator, fork: ForkNumber, blocks: BlockNumber) {
        let cap = self.caps.entry((relation, fork)).or_insert(blocks);
        *cap = blocks.min(*cap);
    }

    /// Those of a part's blocks of which nothing that was done before matters, if there is one.
    pub(super) fn blocks(&self, part: PartTag) -> Option<&Arc<Blocks>> {
        self.parts.get(&part)
    }

    /// The same, to add to them.
    pub(super) fn blocks_mut(&mut self, part: PartTag) -> &Blocks {
        self.parts.entry(part).or_default()
    }

    /// Whether the relation's database is removed later.
    pub(super) fn has_lost(&self, relation: RelFileLocator) -> bool {
        !self.gone.is_empty() && self.gone.contains(&(relation.spc_oid, relation.db_oid))
    }

    pub(super) fn lose_database(&mut self, spc_oid: Oid, db_oid: Oid) {
        self.gone.insert((spc_oid, db_oid));
    }
}

/// The same of the stretch that is being read, for all who read it.
#[derive(Debug, Clone, Default)]
pub(super) struct Newer(Arc<RwLock<Stretch>>);

#[derive(Debug, Default)]
pub(super) struct Stretch {
    /// How many stretches lie behind it.
    number: usize,
    made_anew: MadeAnew,
}

impl Stretch {
    /// Which stretch it is, counted from the log's end.
    pub(super) const fn stretch(&self) -> usize {
        self.number
    }

    pub(super) const fn made_anew(&self) -> &MadeAnew {
        &self.made_anew
    }

    pub(super) const fn made_anew_mut(&mut self) -> &mut MadeAnew {
        &mut self.made_anew
    }
}

impl Newer {
    pub(super) fn read(&self) -> RwLockReadGuard<'_, Stretch> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, Stretch> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the stretch: what lies before it begins anew. What it made anew.
    pub(super) fn begin_stretch(&self) -> MadeAnew {
        let mut newer = self.write();
        newer.number = newer.number.saturating_add(1);
        std::mem::take(&mut newer.made_anew)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tag() -> impl Strategy<Value = PageTag> {
        let block = prop_oneof![0u32..3, PART_BLOCKS - 2..PART_BLOCKS + 2, 60u32..70, u32::MAX - 1..u32::MAX];
        let fork = prop_oneof![Just(ForkNumber::Main), Just(ForkNumber::Vm)];
        (0u32..2, 0u32..2, fork, block).prop_map(|(db_oid, rel_number, fork, block)| {
            let relation = RelFileLocator { spc_oid: 1663, db_oid, rel_number };
            PageTag { relation, fork, block }
        })
    }

    proptest! {
        #[test]
        fn what_is_made_anew_is_what_was_put_in_and_what_its_database_took_along(
            put in proptest::collection::vec(tag(), 0..60),
            lost in proptest::option::of(0u32..2),
            cut in proptest::collection::vec((tag(), 0u32..3), 0..3),
            asked in proptest::collection::vec(tag(), 0..60),
        ) {
            let newer = Newer::default();
            for tag in &put {
                newer.write().made_anew_mut().blocks_mut(tag.part()).insert(tag.block);
            }
            if let Some(db_oid) = lost {
                newer.write().made_anew_mut().lose_database(1663, db_oid);
            }
            for (tag, less) in &cut {
                newer.write().made_anew_mut().cut(tag.relation, tag.fork, tag.block.saturating_sub(*less));
            }
            let is_cut = |tag: &PageTag| {
                let mut cuts = cut.iter().filter(|(of, _)| (of.relation, of.fork) == (tag.relation, tag.fork));
                cuts.any(|(of, less)| tag.block >= of.block.saturating_sub(*less))
            };
            for tag in asked.iter().chain(&put).chain(cut.iter().map(|(tag, _)| tag)) {
                let expected = put.contains(tag) || lost == Some(tag.relation.db_oid) || is_cut(tag);
                prop_assert_eq!(newer.read().made_anew().contains(*tag), expected);
            }
            prop_assert_eq!(newer.read().stretch(), 0);
            let before = newer.begin_stretch();
            prop_assert_eq!(newer.read().stretch(), 1);
            for tag in &put {
                prop_assert!(before.contains(*tag) && !newer.read().made_anew().contains(*tag));
            }
        }
    }
}
