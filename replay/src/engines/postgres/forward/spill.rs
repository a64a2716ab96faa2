//! What is kept, newest first, in memory as far as that goes and in a file beyond.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::batch::{Batch, Entry, Idle, PIECE_BYTES, last_batch};

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

    fn put(&self, bytes: &[u8]) -> io::Result<Chunk> {
        let at = self.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.file.write_all_at(bytes, at)?;
        Ok(Chunk { at, bytes: bytes.len(), crc: crc32fast::hash(bytes) })
    }

    fn get(&self, chunk: &Chunk, bytes: &mut Vec<u8>) -> io::Result<()> {
        bytes.resize(chunk.bytes, 0);
        self.file.read_exact_at(bytes, chunk.at)?;
        if crc32fast::hash(bytes) == chunk.crc { Ok(()) } else { Err(broken()) }
    }
}

/// Batches in the file.
#[derive(Debug, Clone, Copy)]
struct Chunk {
    at: u64,
    bytes: usize,
    crc: u32,
}

/// Batches, added newest first and read oldest first.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// The newest in the file, in their order.
    chunks: Vec<Chunk>,
    /// What came after them, as pieces of memory in which they lie behind each other.
    pieces: Vec<Vec<u8>>,
}

impl Chain {
    /// Bytes of memory.
    pub(super) fn buffered(&self) -> usize {
        self.pieces.iter().map(Vec::capacity).fold(0, usize::saturating_add)
    }

    /// Bytes of all entries.
    pub(super) fn bytes(&self) -> u64 {
        let chunks = self.chunks.iter().map(|chunk| chunk.bytes as u64);
        let pieces = self.pieces.iter().map(|piece| piece.len() as u64);
        chunks.chain(pieces).fold(0, u64::saturating_add)
    }

    /// Adds a batch; how many bytes of memory that took. A long one is taken as it lies there.
    pub(super) fn push(&mut self, batch: &mut Batch, idle: &Idle) -> usize {
        batch.finish();
        if batch.bytes.len() >= PIECE_BYTES / 2 {
            let bytes = std::mem::take(&mut batch.bytes);
            let more = bytes.capacity();
            self.pieces.push(bytes);
            return more;
        }
        let fits = |piece: &&mut Vec<u8>| piece.len().saturating_add(batch.bytes.len()) <= PIECE_BYTES;
        let (piece, before) = match self.pieces.last_mut().filter(fits) {
            Some(piece) => {
                let before = piece.capacity();
                (piece, before)
            }
            None => (self.pieces.push_mut(Vec::new()), 0),
        };
        idle.reserve(piece, batch.bytes.len());
        piece.extend_from_slice(&batch.bytes);
        piece.capacity().saturating_sub(before)
    }

    /// Moves what is buffered to the file, piece by piece, until so much memory is free; how much that gives back.
    pub(super) fn flush(&mut self, wanted: usize, spill: &Spill, idle: &Idle) -> io::Result<usize> {
        let (mut freed, mut count) = (0usize, 0usize);
        for piece in &self.pieces {
            if freed >= wanted {
                break;
            }
            self.chunks.push(spill.put(piece)?);
            freed = freed.saturating_add(piece.capacity());
            count = count.saturating_add(1);
        }
        self.pieces.drain(..count).for_each(|piece| idle.give(piece));
        Ok(freed)
    }

    /// Calls `each` with the entries, oldest first: with all that are about the blocks that are `wanted`, which are counted
    /// from the part's first, and maybe with others.
    pub(super) fn oldest_first<E: From<io::Error>>(
        &self,
        spill: &Spill,
        wanted: &Range<u32>,
        mut each: impl FnMut(Entry<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        for piece in self.pieces.iter().rev() {
            batches(piece, wanted, &mut each)?;
        }
        let mut bytes = Vec::new();
        for chunk in self.chunks.iter().rev() {
            spill.get(chunk, &mut bytes)?;
            batches(&bytes, wanted, &mut each)?;
        }
        Ok(())
    }
}

/// Reads batches from behind.
fn batches<E: From<io::Error>>(
    bytes: &[u8],
    wanted: &Range<u32>,
    each: &mut impl FnMut(Entry<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let mut left = bytes;
    while !left.is_empty() {
        let (mut entries, before) = last_batch(left, wanted).ok_or_else(broken)?;
        while !entries.is_empty() {
            each(entries.next_entry().ok_or_else(broken)?)?;
        }
        left = before;
    }
    Ok(())
}

fn broken() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "what was set aside of the log does not read back")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use waltide_format::engines::postgres::wal::vm_block_of;
    use waltide_format::{ForkNumber, RelFileLocator};

    use super::super::batch::{BASE_BYTES, PART_BLOCKS, PartTag, WORD_BYTES};
    use super::super::decode::How;

    const PART: u32 = 3;

    fn part() -> PartTag {
        let relation = RelFileLocator { spc_oid: 1663, db_oid: 5, rel_number: 16384 };
        PartTag { relation, fork: ForkNumber::Main, part: PART }
    }

    fn how() -> impl Strategy<Value = How> {
        prop_oneof![4 => (0u8..33).prop_map(How::Block), 1 => Just(How::ClearVisibility)]
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

    /// A packed record of any length, like the one before or not: a piece of memory holds many, or less than one.
    fn record() -> impl Strategy<Value = Vec<u8>> {
        let length = prop_oneof![9 => 0usize..50, 3 => 1_000usize..20_000, 1 => 100_000usize..200_000];
        let one = (any::<u8>(), length).prop_map(|(byte, length)| vec![byte; length]);
        let alike = proptest::collection::vec(prop_oneof![9 => Just(7u8), 1 => any::<u8>()], 30..80);
        prop_oneof![one, alike]
    }

    type Told = (u64, u64, u32, How, u32, bool, Vec<u8>);

    fn entry() -> impl Strategy<Value = Told> {
        let block = prop_oneof![0u32..4, 0..PART_BLOCKS].prop_map(|within| PART * PART_BLOCKS + within);
        (place(), how(), block, any::<bool>(), record()).prop_map(
            |((start, end, xid), how, block, anew, packed)| {
                (start, end, xid, how, block, anew && matches!(how, How::Block(_)), packed)
            },
        )
    }

    fn told(e: &Entry<'_>) -> Told {
        (e.start.get(), e.end.get(), e.xid.get(), e.how, e.block, e.anew, e.packed.to_vec())
    }

    fn put(batch: &mut Batch, (start, end, xid, how, block, anew, packed): &Told, idle: &Idle) {
        let (start, end, xid) = ((*start).into(), (*end).into(), (*xid).into());
        batch.put(&Entry { start, end, xid, how: *how, block: *block, anew: *anew, packed }, idle);
    }

    fn read(chain: &Chain, spill: &Spill, wanted: &Range<u32>) -> Vec<Told> {
        let mut found = Vec::new();
        let each = |e: Entry<'_>| -> io::Result<()> {
            found.push(told(&e));
            Ok(())
        };
        chain.oldest_first(spill, wanted, each).unwrap();
        found
    }

    proptest! {
        #[test]
        fn what_was_added_newest_first_comes_back_oldest_first(
            batches in proptest::collection::vec(
                (proptest::collection::vec(entry(), 0..8), proptest::option::weighted(0.2, prop_oneof![Just(usize::MAX), 1usize..400_000])),
                0..12,
            ),
            from in 0..PART_BLOCKS,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let spill = Spill::new(dir.path()).unwrap();
            prop_assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
            let (mut chain, idle, mut batch) = (Chain::default(), Idle::default(), Batch::default());
            let (mut expected, mut buffered) = (Vec::new(), 0);
            for (entries, flush) in &batches {
                batch.begin(Some(part()));
                entries.iter().for_each(|entry| put(&mut batch, entry, &idle));
                buffered += chain.push(&mut batch, &idle);
                if let Some(wanted) = flush {
                    buffered -= chain.flush(*wanted, &spill, &idle).unwrap();
                }
                prop_assert_eq!(chain.buffered(), buffered);
                expected.splice(0..0, entries.iter().cloned());
            }
            prop_assert!(read(&chain, &spill, &(0..PART_BLOCKS)) == expected);
            // All that are wanted, and some that are not.
            let is_wanted = |told: &Told| told.4 % PART_BLOCKS >= from;
            let mut found = read(&chain, &spill, &(from..PART_BLOCKS));
            prop_assert!(found.len() <= expected.len());
            found.retain(is_wanted);
            expected.retain(is_wanted);
            prop_assert!(found == expected);
        }

        #[test]
        fn no_more_is_left_out_of_a_batch_than_does_not_matter(
            entries in proptest::collection::vec(entry(), 0..20),
            irrelevant in proptest::collection::hash_set(0u32..4, 0..4),
        ) {
            let idle = Idle::default();
            let mut batch = Batch::default();
            batch.begin(Some(part()));
            entries.iter().for_each(|entry| put(&mut batch, entry, &idle));
            let matters = |block: u32| !irrelevant.contains(&(block % PART_BLOCKS));
            batch.leave_out(matters, &idle);
            let is_anew_later = |i: usize, block| entries.iter().skip(i + 1).any(|later| later.5 && later.4 == block);
            let left = entries.iter().enumerate().filter(|(i, e)| matters(e.4) && !is_anew_later(*i, e.4));
            let left: Vec<_> = left.map(|(_, entry)| entry.clone()).collect();
            prop_assert_eq!(batch.count as usize, left.len());
            let anew: Vec<_> = left.iter().filter(|e| e.5).map(|e| e.4).collect();
            prop_assert_eq!(batch.anew().collect::<Vec<_>>(), anew);
            prop_assert!(!batch.repeats(None));
            let highest = left.iter().map(|e| e.4).max();
            prop_assert!(highest.is_none_or(|highest| batch.goes_beyond(highest) && !batch.goes_beyond(highest + 1)));
            let dir = tempfile::tempdir().unwrap();
            let (mut chain, spill) = (Chain::default(), Spill::new(dir.path()).unwrap());
            chain.push(&mut batch, &idle);
            prop_assert!(read(&chain, &spill, &(0..PART_BLOCKS)) == left);
        }

        #[test]
        fn a_cut_of_a_map_is_about_the_page_of_its_heap_block(heap in any::<u32>()) {
            let (idle, mut batch) = (Idle::default(), Batch::default());
            let block = vm_block_of(heap);
            let tag = PartTag { fork: ForkNumber::Vm, part: block / PART_BLOCKS, ..part() };
            batch.begin(Some(tag));
            let cut = (8, 16, 3, How::CutVisibility(heap), block, false, Vec::new());
            put(&mut batch, &cut, &idle);
            let dir = tempfile::tempdir().unwrap();
            let (mut chain, spill) = (Chain::default(), Spill::new(dir.path()).unwrap());
            chain.push(&mut batch, &idle);
            let within = block % PART_BLOCKS;
            prop_assert_eq!(read(&chain, &spill, &(within..within + 1)), [cut]);
            prop_assert_eq!(read(&chain, &spill, &(within + 1..u32::MAX)), []);
        }

        #[test]
        fn any_bytes_are_entries_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200), length in 0u32..200) {
            // Seldom do bytes end with a length that fits.
            let mut bytes = bytes;
            bytes.extend(length.min(bytes.len() as u32).to_le_bytes());
            bytes.extend([0, 0, 0xFF, 0x0F]);
            let (mut count, mut sum) = (0, 0);
            let _ = batches(&bytes, &(0..PART_BLOCKS), &mut |e| -> io::Result<()> {
                (count, sum) = (count + 1, sum + e.packed.len());
                Ok(())
            });
            // A head of six bytes at the least; of what is told by how it differs, a byte for each word.
            let most = BASE_BYTES - BASE_BYTES / WORD_BYTES;
            prop_assert!(sum + count * 6 <= bytes.len() + count * most, "{count} entries of {sum} bytes");
        }

        #[test]
        fn what_reads_back_otherwise_is_refused(at in 0u64..5000, bit in 0u8..8) {
            let dir = tempfile::tempdir().unwrap();
            let spill = Spill::new(dir.path()).unwrap();
            let (mut chain, idle, mut batch) = (Chain::default(), Idle::default(), Batch::default());
            batch.begin(Some(part()));
            put(&mut batch, &(8, 16, 3, How::Block(0), PART * PART_BLOCKS, false, vec![7; 5000]), &idle);
            chain.push(&mut batch, &idle);
            chain.flush(1, &spill, &idle).unwrap();
            let mut was = [0];
            spill.file.read_exact_at(&mut was, at).unwrap();
            spill.file.write_all_at(&[was[0] ^ 1 << bit], at).unwrap();
            let read = chain.oldest_first(&spill, &(0..PART_BLOCKS), |_| -> io::Result<()> { Ok(()) });
            prop_assert_eq!(read.unwrap_err().to_string(), "what was set aside of the log does not read back");
        }
    }
}
