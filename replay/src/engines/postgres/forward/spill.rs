//! What is kept, newest first, in memory as far as that goes and in a file beyond.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use waltide_format::engines::postgres::wal::{PackedFor, vm_block_of};
use waltide_format::{BlockNumber, Lsn, RelFileLocator, Xid};

use super::decode::How;

/// How much is buffered in one piece, and goes to the file so; a longer entry is a piece of its own.
pub(super) const CHUNK_BYTES: usize = 128 << 10;
/// What a chain begins with: most stay short.
const FIRST_BYTES: usize = 512;
/// So many pieces of memory wait for their next use.
const IDLE_MAX: usize = 64;
/// What says that an entry is no block reference's.
const CLEAR_VISIBILITY: u8 = u8::MAX;
const CUT_VISIBILITY: u8 = u8::MAX - 1;

/// A file that has no name: it is gone with the process.
#[derive(Debug)]
pub(super) struct Spill {
    file: File,
    written: AtomicU64,
}

impl Spill {
    /// Makes it in a directory.
    pub(super) fn new(directory: &Path) -> io::Result<Self> {
        let path = directory.join(format!(".waltide-replay.{}", std::process::id()));
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(Self { file, written: AtomicU64::new(0) })
    }

    /// Bytes written so far.
    pub(super) fn bytes(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    fn put(&self, piece: &Piece) -> io::Result<Chunk> {
        let Piece { bytes, last } = piece;
        let at = self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.file.write_all_at(bytes, at)?;
        Ok(Chunk { at, bytes: bytes.len(), crc: crc32fast::hash(bytes), last: *last })
    }

    fn get(&self, chunk: &Chunk, bytes: &mut Vec<u8>) -> io::Result<()> {
        bytes.resize(chunk.bytes, 0);
        self.file.read_exact_at(bytes, chunk.at)?;
        if crc32fast::hash(bytes) == chunk.crc { Ok(()) } else { Err(broken()) }
    }
}

/// What of an entry is told by how it differs from the next newer one.
#[derive(Debug, Clone, Copy, Default)]
struct Mark {
    start: u64,
    xid: u32,
    /// Of the heap, where a part of a visibility map is cut.
    block: BlockNumber,
}

/// Entries in memory.
#[derive(Debug, Default)]
struct Piece {
    bytes: Vec<u8>,
    /// The oldest entry: from it on the others are told.
    last: Mark,
}

/// Entries in the file.
#[derive(Debug, Clone, Copy)]
struct Chunk {
    at: u64,
    bytes: usize,
    crc: u32,
    last: Mark,
}

/// Entries, added newest first and read oldest first.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// The newest entries in the file, in their order.
    chunks: Vec<Chunk>,
    /// What came after them.
    pieces: Vec<Piece>,
}

/// Memory that chains hand on to each other.
#[derive(Debug, Default)]
pub(super) struct Idle(Vec<Vec<u8>>);

/// A record and what it is kept for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry<'a> {
    pub(super) start: Lsn,
    pub(super) end: Lsn,
    pub(super) xid: Xid,
    pub(super) how: How,
    /// The block; zero for what is no page.
    pub(super) block: BlockNumber,
    /// What is packed of the record for that.
    pub(super) packed: &'a [u8],
}

impl Chain {
    /// Bytes of memory.
    pub(super) fn buffered(&self) -> usize {
        self.pieces.iter().map(|piece| piece.bytes.capacity()).fold(0, usize::saturating_add)
    }

    /// Bytes of all entries.
    pub(super) fn bytes(&self) -> u64 {
        let chunks = self.chunks.iter().map(|chunk| chunk.bytes as u64);
        let pieces = self.pieces.iter().map(|piece| piece.bytes.len() as u64);
        chunks.chain(pieces).fold(0, u64::saturating_add)
    }

    /// Adds an entry; how many bytes of memory that took.
    pub(super) fn push(&mut self, entry: &Entry<'_>, idle: &mut Idle) -> usize {
        let more = self.make_room(entry.packed.len().saturating_add(Head::BYTES_MAX), idle);
        if let Some(piece) = self.pieces.last_mut() {
            entry.put(piece);
        }
        more
    }

    /// Sees to it that so much fits behind what is buffered; how much memory that took.
    fn make_room(&mut self, needed: usize, idle: &mut Idle) -> usize {
        let is_first = self.pieces.is_empty() && self.chunks.is_empty();
        if let Some(Piece { bytes: last, .. }) = self.pieces.last_mut() {
            let (len, capacity) = (last.len(), last.capacity());
            let wanted = len.saturating_add(needed);
            if wanted <= capacity {
                return 0;
            }
            if wanted <= CHUNK_BYTES {
                last.reserve_exact(capacity.saturating_mul(2).clamp(wanted, CHUNK_BYTES).saturating_sub(len));
                return last.capacity().saturating_sub(capacity);
            }
        }
        let used = if is_first || needed > CHUNK_BYTES { None } else { idle.0.pop() };
        let fresh = needed.max(if is_first { FIRST_BYTES } else { CHUNK_BYTES });
        let bytes = used.unwrap_or_else(|| Vec::with_capacity(fresh));
        let more = bytes.capacity();
        self.pieces.push(Piece { bytes, last: Mark::default() });
        more
    }

    /// Moves what is buffered to the file, piece by piece, until so much memory is free; how much that gives back.
    pub(super) fn flush(&mut self, wanted: usize, spill: &Spill, idle: &mut Idle) -> io::Result<usize> {
        let (mut freed, mut count) = (0usize, 0usize);
        for piece in &self.pieces {
            if freed >= wanted {
                break;
            }
            self.chunks.push(spill.put(piece)?);
            freed = freed.saturating_add(piece.bytes.capacity());
            count = count.saturating_add(1);
        }
        for mut piece in self.pieces.drain(..count) {
            if piece.bytes.capacity() == CHUNK_BYTES && idle.0.len() < IDLE_MAX {
                piece.bytes.clear();
                idle.0.push(piece.bytes);
            }
        }
        Ok(freed)
    }

    /// Calls `each` with the entries, oldest first.
    pub(super) fn oldest_first<E: From<io::Error>>(
        &self,
        spill: &Spill,
        mut each: impl FnMut(Entry<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        for piece in self.pieces.iter().rev() {
            backwards(&piece.bytes, piece.last, &mut each)?;
        }
        let mut bytes = Vec::new();
        for chunk in self.chunks.iter().rev() {
            spill.get(chunk, &mut bytes)?;
            backwards(&bytes, chunk.last, &mut each)?;
        }
        Ok(())
    }
}

/// Reads entries from behind, the oldest first: `last` is that one.
fn backwards<E: From<io::Error>>(
    bytes: &[u8],
    last: Mark,
    each: &mut impl FnMut(Entry<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let (mut left, mut mark) = (Behind(bytes), last);
    while !left.0.is_empty() {
        each(left.entry(&mut mark).ok_or_else(broken)?)?;
    }
    Ok(())
}

fn broken() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "what was set aside of the log does not read back")
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

/// What stands behind an entry's packed record, read from behind: how, and varints.
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
        // From behind, as it is read.
        self.used = self.used.saturating_add(1);
        if let Some(place) = Self::BYTES_MAX.checked_sub(self.used).and_then(|at| self.bytes.get_mut(at)) {
            *place = byte;
        }
    }

    fn varint(&mut self, mut v: u64) {
        while v >= 0x80 {
            self.byte((v & 0x7F) as u8 | 0x80);
            v >>= 7;
        }
        self.byte((v & 0x7F) as u8);
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(Self::BYTES_MAX.saturating_sub(self.used)..).unwrap_or_default()
    }
}

impl Entry<'_> {
    /// What is known of its record here.
    pub(super) const fn of(&self, relation: RelFileLocator) -> PackedFor {
        PackedFor { start: self.start, end: self.end, xid: self.xid, relation, block: self.block }
    }

    fn put(&self, piece: &mut Piece) {
        let (how, block) = match self.how {
            How::Block(id) => (id, self.block),
            How::ClearVisibility => (CLEAR_VISIBILITY, self.block),
            // The page follows from the heap's block.
            How::CutVisibility(heap) => (CUT_VISIBILITY, heap),
        };
        let mark = Mark { start: self.start.get(), xid: self.xid.get(), block };
        let newer = std::mem::replace(&mut piece.last, mark);
        let mut head = Head::new();
        head.byte(how);
        head.varint(self.packed.len() as u64);
        head.varint(self.end.get().wrapping_sub(mark.start).rotate_right(LOW_BITS));
        head.varint(newer.start.wrapping_sub(mark.start).rotate_right(LOW_BITS));
        head.varint(zigzag(mark.xid, newer.xid));
        head.varint(zigzag(mark.block, newer.block));
        piece.bytes.extend_from_slice(self.packed);
        piece.bytes.extend_from_slice(head.bytes());
    }
}

/// Entries, taken from behind.
struct Behind<'a>(&'a [u8]);

impl<'a> Behind<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (byte, rest) = self.0.split_last()?;
        self.0 = rest;
        Some(*byte)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    /// The entry that ends here; of it `mark` says what is not told, and then of the next newer one.
    fn entry(&mut self, mark: &mut Mark) -> Option<Entry<'a>> {
        let how = self.byte()?;
        let length = usize::try_from(self.varint()?).ok()?;
        let end = mark.start.wrapping_add(self.varint()?.rotate_left(LOW_BITS));
        let newer = Mark {
            start: mark.start.wrapping_add(self.varint()?.rotate_left(LOW_BITS)),
            xid: unzigzag(mark.xid, self.varint()?)?,
            block: unzigzag(mark.block, self.varint()?)?,
        };
        let (rest, packed) = self.0.len().checked_sub(length).and_then(|at| self.0.split_at_checked(at))?;
        self.0 = rest;
        let Mark { start, xid, block } = std::mem::replace(mark, newer);
        let (how, block) = match how {
            CLEAR_VISIBILITY => (How::ClearVisibility, block),
            CUT_VISIBILITY => (How::CutVisibility(block), vm_block_of(block)),
            id => (How::Block(id), block),
        };
        Some(Entry { start: start.into(), end: end.into(), xid: xid.into(), how, block, packed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn how() -> impl Strategy<Value = How> {
        prop_oneof![
            (0u8..33).prop_map(How::Block),
            Just(How::ClearVisibility),
            any::<u32>().prop_map(How::CutVisibility)
        ]
    }

    /// As in a log, and anywhere.
    fn place() -> impl Strategy<Value = (u64, u64, u32)> {
        prop_oneof![
            any::<(u64, u64, u32)>(),
            (0u64..1000, 1u64..100, 1000u32..1010).prop_map(|(at, length, xid)| (
                at * 8,
                (at + length) * 8,
                xid
            )),
        ]
    }

    /// A packed record of any length: a buffer holds many, or less than one.
    fn record() -> impl Strategy<Value = Vec<u8>> {
        let length = prop_oneof![9 => 0usize..50, 3 => 1_000usize..20_000, 1 => 100_000usize..200_000];
        (any::<u8>(), length).prop_map(|(byte, length)| vec![byte; length])
    }

    /// Now and then something is moved to the file, all or less.
    fn flush() -> impl Strategy<Value = Option<usize>> {
        proptest::option::weighted(0.1, prop_oneof![Just(usize::MAX), 1usize..400_000])
    }

    proptest! {
        #[test]
        fn what_was_added_newest_first_comes_back_oldest_first(
            entries in proptest::collection::vec((place(), how(), any::<u32>(), record(), flush()), 0..40)
        ) {
            let dir = tempfile::tempdir().unwrap();
            let spill = Spill::new(dir.path()).unwrap();
            prop_assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
            let (mut chain, mut idle) = (Chain::default(), Idle::default());
            let mut expected = Vec::new();
            let mut buffered = 0;
            for ((start, end, xid), how, block, packed, flush) in &entries {
                let block = match how {
                    How::CutVisibility(heap) => vm_block_of(*heap),
                    _ => *block,
                };
                let (start, end) = ((*start).into(), (*end).into());
                let entry = Entry { start, end, xid: (*xid).into(), how: *how, block, packed };
                buffered += chain.push(&entry, &mut idle);
                if let Some(wanted) = flush {
                    buffered -= chain.flush(*wanted, &spill, &mut idle).unwrap();
                }
                prop_assert_eq!(chain.buffered(), buffered);
                expected.insert(0, (start, end, entry.xid, *how, block, packed.clone()));
            }
            let mut found = Vec::new();
            chain.oldest_first(&spill, |e| -> io::Result<()> {
                found.push((e.start, e.end, e.xid, e.how, e.block, e.packed.to_vec()));
                Ok(())
            }).unwrap();
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn any_bytes_are_entries_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let (mut count, mut length) = (0, 0);
            let read = backwards(&bytes, Mark::default(), &mut |e| -> io::Result<()> {
                (count, length) = (count + 1, length + e.packed.len());
                Ok(())
            });
            prop_assert!(length + count * 6 <= bytes.len());
            prop_assert!(read.is_err() || bytes.len() <= length + count * Head::BYTES_MAX);
        }

        #[test]
        fn what_reads_back_otherwise_is_refused(at in 0usize..5000, bit in 0u8..8) {
            let dir = tempfile::tempdir().unwrap();
            let spill = Spill::new(dir.path()).unwrap();
            let (mut chain, mut idle) = (Chain::default(), Idle::default());
            let entry = Entry { start: 8.into(), end: 16.into(), xid: 3.into(), how: How::Block(0), block: 1, packed: &[7; 5000] };
            chain.push(&entry, &mut idle);
            chain.flush(1, &spill, &mut idle).unwrap();
            spill.file.write_all_at(&[7 ^ 1 << bit], at as u64).unwrap();
            let read = chain.oldest_first(&spill, |_| -> io::Result<()> { Ok(()) });
            prop_assert_eq!(read.unwrap_err().to_string(), "what was set aside of the log does not read back");
        }
    }
}
