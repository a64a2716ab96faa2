//! A set of blocks of one fork, in memory that is bounded by the fork's length.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::ids::BlockNumber;

/// Blocks of one chunk; a chunk's number is the upper half of its blocks'.
const CHUNK_BITS: u32 = 16;
const WORDS: usize = 1 << (CHUNK_BITS - 6);
/// A sorted list takes less room than a bitmap up to here.
const LIST_MAX: usize = WORDS * 4;

/// A set of blocks: two bytes a block, or a bit for every block around, whichever is less.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BlockSet(BTreeMap<u16, Chunk>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Chunk {
    List(Vec<u16>),
    Bits(Box<[u64; WORDS]>),
}

fn split(block: BlockNumber) -> (u16, u16) {
    let [a, b, c, d] = block.to_be_bytes();
    (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
}

fn join(chunk: u16, low: u16) -> BlockNumber {
    u32::from(chunk) << CHUNK_BITS | u32::from(low)
}

fn word_of(low: u16) -> (usize, u64) {
    (usize::from(low >> 6), 1 << (low & 63))
}

impl BlockSet {
    /// Puts a block in.
    pub fn insert(&mut self, block: BlockNumber) {
        let (chunk, low) = split(block);
        self.0.entry(chunk).or_insert_with(|| Chunk::List(Vec::new())).insert(low);
    }

    /// Whether a block is in.
    pub fn contains(&self, block: BlockNumber) -> bool {
        let (chunk, low) = split(block);
        self.0.get(&chunk).is_some_and(|chunk| chunk.contains(low))
    }

    /// Whether no block is in.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first block in the set from `from` on.
    pub fn next_in(&self, from: BlockNumber) -> Option<BlockNumber> {
        let (first, low) = split(from);
        self.0.range(first..).find_map(|(number, chunk)| {
            let from = if *number == first { low } else { 0 };
            chunk.next_in(from).map(|low| join(*number, low))
        })
    }

    /// The first run of blocks of the set within `within`.
    pub fn next_run(&self, within: Range<BlockNumber>) -> Option<Range<BlockNumber>> {
        let start = self.next_in(within.start).filter(|start| *start < within.end)?;
        let mut end = start.saturating_add(1);
        while end < within.end && self.contains(end) {
            end = end.saturating_add(1);
        }
        Some(start..end)
    }
}

impl Chunk {
    fn insert(&mut self, low: u16) {
        match self {
            Self::List(list) => {
                // A segment's blocks come in order.
                let at = if list.last().is_some_and(|last| *last < low) {
                    Err(list.len())
                } else {
                    list.binary_search(&low)
                };
                let Err(at) = at else { return };
                if list.len() < LIST_MAX {
                    list.insert(at, low);
                    return;
                }
                let mut bits = Box::new([0; WORDS]);
                for low in list.iter().copied().chain([low]) {
                    set(&mut bits, low);
                }
                *self = Self::Bits(bits);
            }
            Self::Bits(bits) => set(bits, low),
        }
    }

    fn contains(&self, low: u16) -> bool {
        match self {
            Self::List(list) => list.binary_search(&low).is_ok(),
            Self::Bits(bits) => {
                let (word, bit) = word_of(low);
                bits.get(word).is_some_and(|found| found & bit != 0)
            }
        }
    }

    fn next_in(&self, from: u16) -> Option<u16> {
        match self {
            Self::List(list) => list.get(list.partition_point(|low| *low < from)).copied(),
            Self::Bits(bits) => {
                let (first, bit) = word_of(from);
                let at_or_behind = bit.wrapping_sub(1) ^ u64::MAX;
                bits.iter().enumerate().skip(first).find_map(|(i, word)| {
                    let word = if i == first { word & at_or_behind } else { *word };
                    let low = u16::try_from(i).ok()?.checked_shl(6)?;
                    let within = u16::try_from(word.trailing_zeros()).ok().filter(|_| word != 0)?;
                    Some(low | within)
                })
            }
        }
    }
}

fn set(bits: &mut [u64; WORDS], low: u16) {
    let (word, bit) = word_of(low);
    if let Some(found) = bits.get_mut(word) {
        *found |= bit;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Scattered blocks and dense stretches, around the edges of chunks too.
    fn blocks() -> impl Strategy<Value = Vec<u32>> {
        let near = |at: u32, span: u32| (0..span).prop_map(move |n| at.saturating_add(n));
        let one =
            prop_oneof![any::<u32>(), near(0, 200), near((1 << 16) - 100, 200), near(u32::MAX - 99, 100)];
        let dense = (any::<u32>(), 0u32..9000).prop_map(|(at, n)| (at..at.saturating_add(n)).collect());
        prop_oneof![proptest::collection::vec(one, 0..300), dense]
    }

    proptest! {
        #[test]
        fn a_set_of_blocks_is_a_set(lists in proptest::collection::vec(blocks(), 0..3), probes in blocks()) {
            let mut set = BlockSet::default();
            let mut plain = BTreeSet::new();
            for block in lists.into_iter().flatten() {
                set.insert(block);
                plain.insert(block);
            }
            prop_assert_eq!(set.is_empty(), plain.is_empty());
            for probe in probes.into_iter().take(200) {
                prop_assert_eq!(set.contains(probe), plain.contains(&probe));
                prop_assert_eq!(set.next_in(probe), plain.range(probe..).next().copied());
            }
            let mut found = Vec::new();
            let mut at = 0;
            while let Some(run) = set.next_run(at..u32::MAX) {
                prop_assert!(run.start >= at && !set.contains(run.end) || run.end == u32::MAX);
                found.extend(run.clone());
                at = run.end;
            }
            plain.remove(&u32::MAX);
            prop_assert!(found.iter().eq(plain.iter()));
        }
    }

    #[test]
    fn a_run_ends_where_it_is_told_to() {
        let mut set = BlockSet::default();
        (10..20).for_each(|block| set.insert(block));
        assert_eq!(set.next_run(0..15), Some(10..15));
        assert_eq!(set.next_run(12..100), Some(12..20));
        assert_eq!(set.next_run(0..10), None);
        assert_eq!(set.next_run(20..u32::MAX), None);
    }

    #[test]
    fn many_blocks_take_a_bit_each() {
        let mut set = BlockSet::default();
        (0..1 << 16).for_each(|block| set.insert(block * 2));
        assert_eq!(set.0.len(), 2);
        assert!(set.0.values().all(|chunk| matches!(chunk, Chunk::Bits(_))));
        assert_eq!(set.next_run(5..9), Some(6..7));
    }
}
