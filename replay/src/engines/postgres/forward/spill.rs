//! What is kept, newest first, in memory as far as that goes and in a file beyond.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use waltide_format::{BlockNumber, Lsn};

use super::decode::How;

/// How much is buffered in one piece, and goes to the file so; a longer entry is a piece of its own.
pub(super) const CHUNK_BYTES: usize = 128 << 10;
/// What a chain begins with: most stay short.
const FIRST_BYTES: usize = 512;
/// So many pieces of memory wait for their next use.
const IDLE_MAX: usize = 64;
/// `start`, `end`, how, argument.
const HEAD_BYTES: usize = 8 + 8 + 1 + 4;

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
        Ok(Chunk { at, bytes: bytes.len() })
    }

    fn get(&self, chunk: Chunk) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; chunk.bytes];
        self.file.read_exact_at(&mut bytes, chunk.at)?;
        Ok(bytes)
    }
}

#[derive(Debug, Clone, Copy)]
struct Chunk {
    at: u64,
    bytes: usize,
}

/// Entries, added newest first and read oldest first.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// The newest entries in the file, in their order.
    chunks: Vec<Chunk>,
    /// What came after them.
    buffers: Vec<Vec<u8>>,
}

/// Memory that chains hand on to each other.
#[derive(Debug, Default)]
pub(super) struct Idle(Vec<Vec<u8>>);

/// A record and what it is kept for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry<'a> {
    pub(super) start: Lsn,
    pub(super) end: Lsn,
    pub(super) how: How,
    /// The block; zero for what is no page.
    pub(super) block: BlockNumber,
    pub(super) record: &'a [u8],
}

impl Chain {
    /// Bytes of memory.
    pub(super) fn buffered(&self) -> usize {
        self.buffers.iter().map(Vec::capacity).fold(0, usize::saturating_add)
    }

    /// Bytes of all entries.
    pub(super) fn bytes(&self) -> u64 {
        let chunks = self.chunks.iter().map(|chunk| chunk.bytes as u64);
        let buffers = self.buffers.iter().map(|buffer| buffer.len() as u64);
        chunks.chain(buffers).fold(0, u64::saturating_add)
    }

    /// Adds an entry; how many bytes of memory that took.
    pub(super) fn push(&mut self, entry: &Entry<'_>, idle: &mut Idle) -> usize {
        let (how, argument) = match entry.how {
            How::Block(id) => (id, entry.block),
            How::ClearVisibility => (u8::MAX, entry.block),
            // The page follows from the heap's block.
            How::CutVisibility(heap) => (u8::MAX - 1, heap),
        };
        let needed = HEAD_BYTES.saturating_add(entry.record.len()).saturating_add(4);
        let more = self.make_room(needed, idle);
        let Some(buffer) = self.buffers.last_mut() else { return more };
        buffer.extend_from_slice(&entry.start.get().to_le_bytes());
        buffer.extend_from_slice(&entry.end.get().to_le_bytes());
        buffer.push(how);
        buffer.extend_from_slice(&argument.to_le_bytes());
        buffer.extend_from_slice(entry.record);
        // Read from behind, so the length comes last.
        let bytes = u32::try_from(entry.record.len()).unwrap_or(u32::MAX);
        buffer.extend_from_slice(&bytes.to_le_bytes());
        more
    }

    /// Sees to it that so much fits behind what is buffered; how much memory that took.
    fn make_room(&mut self, needed: usize, idle: &mut Idle) -> usize {
        let is_first = self.buffers.is_empty() && self.chunks.is_empty();
        if let Some(last) = self.buffers.last_mut() {
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
        let buffer = used.unwrap_or_else(|| Vec::with_capacity(fresh));
        let more = buffer.capacity();
        self.buffers.push(buffer);
        more
    }

    /// Moves what is buffered to the file; how much memory that gives back.
    pub(super) fn flush(&mut self, spill: &Spill, idle: &mut Idle) -> io::Result<usize> {
        let freed = self.buffered();
        for mut buffer in std::mem::take(&mut self.buffers) {
            self.chunks.push(spill.put(&buffer)?);
            if buffer.capacity() == CHUNK_BYTES && idle.0.len() < IDLE_MAX {
                buffer.clear();
                idle.0.push(buffer);
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
        for buffer in self.buffers.iter().rev() {
            backwards(buffer, &mut each)?;
        }
        for chunk in self.chunks.iter().rev() {
            backwards(&spill.get(*chunk)?, &mut each)?;
        }
        Ok(())
    }
}

fn backwards<E: From<io::Error>>(
    mut bytes: &[u8],
    each: &mut impl FnMut(Entry<'_>) -> Result<(), E>,
) -> Result<(), E> {
    while let Some((rest, length)) = bytes.split_last_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let (before, entry) = length
            .checked_add(HEAD_BYTES)
            .and_then(|taken| rest.len().checked_sub(taken))
            .and_then(|at| rest.split_at_checked(at))
            .ok_or_else(broken)?;
        each(Entry::read(entry).ok_or_else(broken)?)?;
        bytes = before;
    }
    Ok(())
}

fn broken() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "what was set aside of the log does not read back")
}

impl<'a> Entry<'a> {
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let (start, rest) = bytes.split_first_chunk::<8>()?;
        let (end, rest) = rest.split_first_chunk::<8>()?;
        let (how, rest) = rest.split_first()?;
        let (argument, record) = rest.split_first_chunk::<4>()?;
        let argument = u32::from_le_bytes(*argument);
        let (how, block) = match *how {
            u8::MAX => (How::ClearVisibility, argument),
            254 => {
                let block = waltide_format::engines::postgres::wal::vm_block_of(argument);
                (How::CutVisibility(argument), block)
            }
            id => (How::Block(id), argument),
        };
        let (start, end) = (Lsn::from(u64::from_le_bytes(*start)), Lsn::from(u64::from_le_bytes(*end)));
        Some(Self { start, end, how, block, record })
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

    /// A record of any length: a buffer holds many, or less than one.
    fn record() -> impl Strategy<Value = Vec<u8>> {
        let length = prop_oneof![9 => 0usize..50, 3 => 1_000usize..20_000, 1 => 100_000usize..200_000];
        (any::<u8>(), length).prop_map(|(byte, length)| vec![byte; length])
    }

    proptest! {
        #[test]
        fn what_was_added_newest_first_comes_back_oldest_first(
            entries in proptest::collection::vec((any::<u64>(), how(), any::<u32>(), record(), prop::bool::weighted(0.1)), 0..40)
        ) {
            let dir = tempfile::tempdir().unwrap();
            let spill = Spill::new(dir.path()).unwrap();
            prop_assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
            let (mut chain, mut idle) = (Chain::default(), Idle::default());
            let mut expected = Vec::new();
            let mut buffered = 0;
            for (at, how, block, record, flush) in &entries {
                let block = match how {
                    How::CutVisibility(heap) => waltide_format::engines::postgres::wal::vm_block_of(*heap),
                    _ => *block,
                };
                let entry = Entry { start: (*at).into(), end: at.wrapping_add(8).into(), how: *how, block, record };
                buffered += chain.push(&entry, &mut idle);
                if *flush {
                    buffered -= chain.flush(&spill, &mut idle).unwrap();
                }
                prop_assert_eq!(chain.buffered(), buffered);
                expected.insert(0, (entry.start, entry.end, *how, block, record.clone()));
            }
            let mut found = Vec::new();
            chain.oldest_first(&spill, |e| -> io::Result<()> {
                found.push((e.start, e.end, e.how, e.block, e.record.to_vec()));
                Ok(())
            }).unwrap();
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn any_bytes_are_entries_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = backwards(&bytes, &mut |_| -> io::Result<()> { Ok(()) });
        }
    }
}
