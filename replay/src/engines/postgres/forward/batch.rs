//! What records do to one part of a fork, as it is put down when a segment is taken apart and kept until it is applied:
//! entries in their order, each told by how it differs from the one before.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use waltide_format::engines::postgres::wal::{PackedFor, vm_block_of};
use waltide_format::{BlockNumber, ForkNumber, Lsn, RelFileLocator, Xid};

use super::decode::How;
use super::newer::Blocks;

/// Blocks that are kept, and applied, together: 32 MiB of pages. `relseg_size` is a multiple.
pub(in super::super) const PART_BLOCKS: u32 = 4096;
/// How much lies in one piece of memory, and goes to the file so; a longer entry is a piece of its own.
pub(super) const PIECE_BYTES: usize = 128 << 10;
/// So many pieces of memory wait for their next use.
const IDLE_MAX: usize = 64;
/// What says that an entry is no block reference's.
const CLEAR_VISIBILITY: u8 = u8::MAX;
const CUT_VISIBILITY: u8 = u8::MAX - 1;
/// Beside a block reference's number, which is 32 at the most: nothing of the page as it was is needed; what is packed is
/// told by how it differs from what was before.
const ANEW: u8 = 0x40;
const DIFFERS: u8 = 0x80;
const ID_MASK: u8 = 0x3F;
/// So many bytes of what is packed are told so at the most, in words.
pub(super) const BASE_BYTES: usize = 64;
pub(super) const WORD_BYTES: usize = 8;

/// A part of a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct PartTag {
    pub(super) relation: RelFileLocator,
    pub(super) fork: ForkNumber,
    pub(super) part: u32,
}

/// A record and what it is kept for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry<'a> {
    pub(super) start: Lsn,
    pub(super) end: Lsn,
    pub(super) xid: Xid,
    pub(super) how: How,
    /// The block; zero for what is no page.
    pub(super) block: BlockNumber,
    /// Whether nothing of the page as it was is needed.
    pub(super) anew: bool,
    /// What is packed of the record for that.
    pub(super) packed: &'a [u8],
}

/// What of an entry is told by how it differs from the one before.
#[derive(Debug, Clone, Copy, Default)]
struct Mark {
    start: u64,
    xid: u32,
    /// Of the heap, where a part of a visibility map is cut.
    block: BlockNumber,
}

/// Entries of one part, or of what is no page.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// The part.
    pub(super) of: Option<PartTag>,
    pub(super) bytes: Vec<u8>,
    last: Mark,
    base: Base,
    /// So many blocks the fork has at least.
    pub(super) reach: BlockNumber,
    /// The lowest and the highest block, counted from the part's first.
    span: Option<(u16, u16)>,
    pub(super) count: u32,
    /// Blocks that are made anew, with how many entries come before.
    anew: Vec<(BlockNumber, u32)>,
}

/// What stands behind a batch: its length, its lowest and its highest block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Foot {
    bytes: u32,
    span: (u16, u16),
}

/// The first bytes of what was packed last.
#[derive(Debug, Clone, Copy)]
struct Base {
    bytes: [u8; BASE_BYTES],
    length: usize,
}

impl Default for Base {
    fn default() -> Self {
        Self { bytes: [0; BASE_BYTES], length: 0 }
    }
}

/// How the first bytes of what is packed differ from those before: of each word which bytes do, then those.
struct Differences {
    bytes: [u8; BASE_BYTES + BASE_BYTES / WORD_BYTES],
    used: usize,
    /// So many bytes of what is packed they tell.
    of: usize,
}

impl Differences {
    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.used).unwrap_or_default()
    }
}

impl Base {
    /// Of so many bytes, how many are told by how they differ.
    fn shared(&self, length: usize) -> usize {
        self.length.min(length) & !(WORD_BYTES - 1)
    }

    /// How `packed` differs, where that is shorter.
    fn differences(&self, packed: &[u8]) -> Option<Differences> {
        let of = self.shared(packed.len());
        let mut told =
            Differences { bytes: [0; BASE_BYTES + BASE_BYTES / WORD_BYTES], used: of / WORD_BYTES, of };
        let words = packed.as_chunks::<WORD_BYTES>().0.iter().zip(self.bytes.as_chunks::<WORD_BYTES>().0);
        for (number, (now, before)) in words.take(of / WORD_BYTES).enumerate() {
            let mut differs = u64::from_le_bytes(*now) ^ u64::from_le_bytes(*before);
            let mut which = 0u8;
            while differs != 0 {
                let bit = differs.trailing_zeros();
                let at = bit / u8::BITS;
                which |= 1 << at;
                *told.bytes.get_mut(told.used)? = *now.get(at as usize)?;
                told.used = told.used.saturating_add(1);
                differs &= !0xFF_u64.rotate_left(bit & !7);
            }
            *told.bytes.get_mut(number)? = which;
        }
        (told.used < of).then_some(told)
    }

    /// Puts down what is packed from the byte `from` on.
    fn set(&mut self, from: usize, packed: &[u8]) {
        let length = packed.len().min(BASE_BYTES.saturating_sub(from));
        if let (Some(to), Some(packed)) =
            (self.bytes.get_mut(from..from.saturating_add(length)), packed.get(..length))
        {
            to.copy_from_slice(packed);
        }
        self.length = from.saturating_add(length);
    }

    /// Becomes what was packed of `length` bytes, as far as differences tell; how many bytes that is, and what is behind the
    /// differences.
    fn become_next<'a>(&mut self, length: usize, told: &'a [u8]) -> Option<(usize, &'a [u8])> {
        let of = self.shared(length);
        let (which, mut bytes) = told.split_at_checked(of / WORD_BYTES)?;
        for (word, which) in self.bytes.as_chunks_mut::<WORD_BYTES>().0.iter_mut().zip(which) {
            let mut which = *which;
            while which != 0 {
                let (byte, rest) = bytes.split_first()?;
                *word.get_mut(which.trailing_zeros() as usize)? = *byte;
                bytes = rest;
                which &= which.wrapping_sub(1);
            }
        }
        Some((of, bytes))
    }
}

/// A difference, of which the sign is the lowest bit.
const fn zigzag(from: u32, to: u32) -> u64 {
    let difference = to.wrapping_sub(from).cast_signed();
    ((difference << 1) ^ (difference >> 31)).cast_unsigned() as u64
}

fn unzigzag(from: u32, coded: u64) -> Option<u32> {
    let coded = u32::try_from(coded).ok()?;
    Some(from.wrapping_add((coded >> 1) ^ (coded & 1).wrapping_neg()))
}

/// Records begin and end at multiples of eight: so that is left out where it is so.
const LOW_BITS: u32 = 3;

/// What stands before an entry's packed record: how, and varints.
struct Head {
    bytes: [u8; Self::BYTES_MAX],
    used: usize,
}

impl Head {
    const BYTES_MAX: usize = 1 + 10 + 10 + 5 + 5 + 10;

    const fn new() -> Self {
        Self { bytes: [0; Self::BYTES_MAX], used: 0 }
    }

    fn byte(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(self.used) {
            *place = byte;
        }
        self.used = self.used.saturating_add(1);
    }

    fn varint(&mut self, mut v: u64) {
        while v >= 0x80 {
            self.byte((v & 0x7F) as u8 | 0x80);
            v >>= 7;
        }
        self.byte((v & 0x7F) as u8);
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.used).unwrap_or_default()
    }
}

impl Entry<'_> {
    /// What is known of its record here.
    pub(super) const fn of(&self, relation: RelFileLocator) -> PackedFor {
        PackedFor { start: self.start, end: self.end, xid: self.xid, relation, block: self.block }
    }
}

impl Batch {
    /// Makes it one of another part, without entries.
    pub(super) fn begin(&mut self, of: Option<PartTag>) {
        let Self { bytes, anew, .. } = std::mem::take(self);
        *self = Self { of, bytes, anew, ..Self::default() };
        self.bytes.clear();
        self.anew.clear();
    }

    /// Whether there is nothing to tell.
    pub(super) const fn is_empty(&self) -> bool {
        self.count == 0 && self.reach == 0
    }

    /// Whether a record of which so much is packed belongs into the next one.
    pub(super) const fn is_full_for(&self, packed: usize) -> bool {
        let needed = self.bytes.len().saturating_add(Self::most(packed));
        self.count > 0 && needed > PIECE_BYTES
    }

    /// An entry takes no more, with what stands behind the batch. What is told by how it differs is shorter.
    const fn most(packed: usize) -> usize {
        packed.saturating_add(Head::BYTES_MAX).saturating_add(Foot::BYTES)
    }

    /// Adds an entry.
    pub(super) fn put(&mut self, entry: &Entry<'_>, idle: &Idle) {
        let told = match entry.how {
            How::Block(_) => self.base.differences(entry.packed),
            _ => None,
        };
        let (how, block) = match entry.how {
            How::Block(id) => {
                let differs = if told.is_some() { DIFFERS } else { 0 };
                (id | differs | if entry.anew { ANEW } else { 0 }, entry.block)
            }
            How::ClearVisibility => (CLEAR_VISIBILITY, entry.block),
            // The page follows from the heap's block.
            How::CutVisibility(heap) => (CUT_VISIBILITY, heap),
        };
        let mark = Mark { start: entry.start.get(), xid: entry.xid.get(), block };
        let before = std::mem::replace(&mut self.last, mark);
        let mut head = Head::new();
        head.byte(how);
        head.varint(entry.packed.len() as u64);
        head.varint(mark.start.wrapping_sub(before.start).rotate_right(LOW_BITS));
        head.varint(entry.end.get().wrapping_sub(mark.start).rotate_right(LOW_BITS));
        head.varint(zigzag(before.xid, mark.xid));
        head.varint(zigzag(before.block, mark.block));
        idle.reserve(&mut self.bytes, Self::most(entry.packed.len()));
        self.bytes.extend_from_slice(head.bytes());
        let rest = told.map_or(entry.packed, |told| {
            self.bytes.extend_from_slice(told.bytes());
            entry.packed.get(told.of..).unwrap_or_default()
        });
        self.bytes.extend_from_slice(rest);
        self.base.set(0, entry.packed);
        #[allow(clippy::cast_possible_truncation)] // a part has 4096 blocks
        let within = (entry.block % PART_BLOCKS) as u16;
        let (lowest, highest) = self.span.unwrap_or((within, within));
        self.span = Some((lowest.min(within), highest.max(within)));
        if entry.anew {
            self.anew.push((entry.block, self.count));
        }
        self.count = self.count.saturating_add(1);
    }

    /// Whether it is about a block from this one on.
    pub(super) fn goes_beyond(&self, cap: BlockNumber) -> bool {
        let first = self.of.map_or(0, |of| of.part.saturating_mul(PART_BLOCKS));
        self.span.is_some_and(|(_, highest)| first.saturating_add(highest.into()) >= cap)
    }

    /// What was added.
    pub(super) fn entries(&self) -> Entries<'_> {
        Entries::new(&self.bytes)
    }

    /// The blocks that are made anew.
    pub(super) fn anew(&self) -> impl Iterator<Item = BlockNumber> {
        self.anew.iter().map(|(block, _)| *block)
    }

    /// Whether a page is made anew that `newer` ones are, or that is made anew once more.
    pub(super) fn repeats(&self, newer: Option<&Blocks>) -> bool {
        let here = Blocks::default();
        self.anew().any(|block| newer.is_some_and(|newer| newer.contains(block)) || !here.insert(block))
    }

    /// Leaves out what is about other blocks than those that `matter`, and what was done to a page before it is made anew.
    pub(super) fn leave_out(&mut self, matter: impl Fn(BlockNumber) -> bool, idle: &Idle) {
        let mut left = Self::default();
        left.begin(self.of);
        left.reach = self.reach;
        let mut from: Vec<(BlockNumber, u32)> = self.anew.clone();
        from.sort_unstable();
        let mut entries = self.entries();
        for number in 0..self.count {
            let Some(entry) = entries.next_entry() else { break };
            let next = from.partition_point(|(block, _)| *block <= entry.block).checked_sub(1);
            let last = next.and_then(|i| from.get(i)).filter(|(block, _)| *block == entry.block);
            if matter(entry.block) && last.is_none_or(|(_, last)| number >= *last) {
                left.put(&entry, idle);
            }
        }
        *self = left;
    }

    /// Puts down what it is read by from behind.
    pub(super) fn finish(&mut self) {
        let foot = Foot {
            bytes: u32::try_from(self.bytes.len()).unwrap_or(u32::MAX),
            span: self.span.unwrap_or_default(),
        };
        self.bytes.extend_from_slice(&foot.encode());
    }
}

impl Foot {
    const BYTES: usize = 8;

    fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let (length, span) = bytes.split_at_mut(4);
        length.copy_from_slice(&self.bytes.to_le_bytes());
        let (lowest, highest) = span.split_at_mut(2);
        lowest.copy_from_slice(&self.span.0.to_le_bytes());
        highest.copy_from_slice(&self.span.1.to_le_bytes());
        bytes
    }

    const fn decode([a, b, c, d, e, f, g, h]: [u8; Self::BYTES]) -> Self {
        let span = (u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
        Self { bytes: u32::from_le_bytes([a, b, c, d]), span }
    }
}

/// The last batch of those that lie behind each other in `bytes`, and what is before it. Without its entries where those are
/// not about the blocks that are `wanted`, which are counted from the part's first. None where it is broken.
pub(super) fn last_batch<'a>(
    bytes: &'a [u8],
    wanted: &std::ops::Range<u32>,
) -> Option<(Entries<'a>, &'a [u8])> {
    let (rest, foot) = bytes.split_last_chunk()?;
    let foot = Foot::decode(*foot);
    let at = rest.len().checked_sub(foot.bytes as usize)?;
    let (before, entries) = rest.split_at_checked(at)?;
    let (lowest, highest) = foot.span;
    let is_wanted = u32::from(lowest) < wanted.end && wanted.start <= u32::from(highest);
    Some((Entries::new(if is_wanted { entries } else { &[] }), before))
}

/// Entries, taken one after the other.
#[derive(Debug)]
pub(super) struct Entries<'a> {
    bytes: &'a [u8],
    last: Mark,
    base: Base,
    /// What is packed where differences tell only a part of it.
    whole: Vec<u8>,
}

impl<'a> Entries<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, last: Mark::default(), base: Base::default(), whole: Vec::new() }
    }

    /// Whether all were taken.
    pub(super) const fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn byte(&mut self) -> Option<u8> {
        let (byte, rest) = self.bytes.split_first()?;
        self.bytes = rest;
        Some(*byte)
    }

    fn varint(&mut self) -> Option<u64> {
        let first = self.byte()?;
        if first & 0x80 == 0 {
            return Some(first.into());
        }
        let mut value = u64::from(first & 0x7F);
        for shift in (7..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    /// The next; none where what is there is none.
    #[inline]
    pub(super) fn next_entry(&mut self) -> Option<Entry<'_>> {
        let how = self.byte()?;
        let length = usize::try_from(self.varint()?).ok()?;
        let start = self.last.start.wrapping_add(self.varint()?.rotate_left(LOW_BITS));
        let end = start.wrapping_add(self.varint()?.rotate_left(LOW_BITS));
        let xid = unzigzag(self.last.xid, self.varint()?)?;
        let block = unzigzag(self.last.block, self.varint()?)?;
        self.last = Mark { start, xid, block };
        let (start, end, xid) = (start.into(), end.into(), xid.into());
        let (how, block, anew, differs) = match how {
            CLEAR_VISIBILITY => (How::ClearVisibility, block, false, false),
            CUT_VISIBILITY => (How::CutVisibility(block), vm_block_of(block), false, false),
            id => (How::Block(id & ID_MASK), block, id & ANEW != 0, id & DIFFERS != 0),
        };
        let packed = self.packed(length, differs)?;
        Some(Entry { start, end, xid, how, block, anew, packed })
    }

    /// What is packed of a record, `length` bytes.
    fn packed(&mut self, length: usize, differs: bool) -> Option<&[u8]> {
        if !differs {
            let (packed, rest) = self.bytes.split_at_checked(length)?;
            self.bytes = rest;
            self.base.set(0, packed);
            return Some(packed);
        }
        let (of, bytes) = self.base.become_next(length, self.bytes)?;
        let (tail, rest) = bytes.split_at_checked(length.checked_sub(of)?)?;
        self.bytes = rest;
        self.base.set(of, tail);
        if length <= BASE_BYTES {
            return self.base.bytes.get(..length);
        }
        self.whole.clear();
        self.whole.extend_from_slice(self.base.bytes.get(..of)?);
        self.whole.extend_from_slice(tail);
        Some(&self.whole)
    }
}

/// Pieces of memory that wait for their next use.
#[derive(Debug, Clone, Default)]
pub(super) struct Idle(Arc<Mutex<Vec<Vec<u8>>>>);

impl Idle {
    fn pieces(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A whole piece.
    fn take(&self) -> Vec<u8> {
        self.pieces().pop().unwrap_or_else(|| Vec::with_capacity(PIECE_BYTES))
    }

    /// Takes a piece back.
    pub(super) fn give(&self, mut bytes: Vec<u8>) {
        let mut pieces = self.pieces();
        if bytes.capacity() == PIECE_BYTES && pieces.len() < IDLE_MAX {
            bytes.clear();
            pieces.push(bytes);
        }
    }

    /// Sees to it that so much fits behind what is there, without taking much more memory than that needs.
    pub(super) fn reserve(&self, bytes: &mut Vec<u8>, more: usize) {
        let wanted = bytes.len().saturating_add(more);
        if wanted <= bytes.capacity() {
            return;
        }
        let doubled = bytes.capacity().saturating_mul(2);
        if wanted.max(doubled) >= PIECE_BYTES && wanted <= PIECE_BYTES {
            let mut piece = self.take();
            piece.extend_from_slice(bytes);
            *bytes = piece;
        } else {
            bytes.reserve_exact(wanted.max(doubled).saturating_sub(bytes.len()));
        }
    }
}
