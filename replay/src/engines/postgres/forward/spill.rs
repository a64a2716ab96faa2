//! What is kept, newest first, in memory as far as that goes and in a file beyond.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use waltide_format::{BlockNumber, Lsn};

use super::decode::How;

/// Buffers of this size and longer go to the file first.
pub(super) const CHUNK_BYTES: usize = 1 << 20;
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
    buffer: Vec<u8>,
    chunks: Vec<Chunk>,
}

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
    pub(super) fn buffered(&self) -> usize {
        self.buffer.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.buffer.is_empty() && self.chunks.is_empty()
    }

    /// Bytes of all entries.
    pub(super) fn bytes(&self) -> u64 {
        let chunks = self.chunks.iter().map(|chunk| chunk.bytes as u64);
        chunks.fold(self.buffer.len() as u64, u64::saturating_add)
    }

    /// Adds an entry; how many bytes more are buffered.
    pub(super) fn push(&mut self, entry: &Entry<'_>) -> usize {
        let (how, argument) = match entry.how {
            How::Block(id) => (id, entry.block),
            How::ClearVisibility => (u8::MAX, entry.block),
            // The page follows from the heap's block.
            How::CutVisibility(heap) => (u8::MAX - 1, heap),
        };
        let before = self.buffer.len();
        self.buffer.extend_from_slice(&entry.start.get().to_le_bytes());
        self.buffer.extend_from_slice(&entry.end.get().to_le_bytes());
        self.buffer.push(how);
        self.buffer.extend_from_slice(&argument.to_le_bytes());
        self.buffer.extend_from_slice(entry.record);
        // Read from behind, so the length comes last.
        let bytes = u32::try_from(entry.record.len()).unwrap_or(u32::MAX);
        self.buffer.extend_from_slice(&bytes.to_le_bytes());
        self.buffer.len().saturating_sub(before)
    }

    /// Moves the buffer to the file; how many bytes less are buffered.
    pub(super) fn flush(&mut self, spill: &Spill) -> io::Result<usize> {
        if self.buffer.is_empty() {
            return Ok(0);
        }
        self.chunks.push(spill.put(&self.buffer)?);
        Ok(std::mem::take(&mut self.buffer).len())
    }

    /// Calls `each` with the entries, oldest first.
    pub(super) fn oldest_first<E: From<io::Error>>(
        &self,
        spill: &Spill,
        mut each: impl FnMut(Entry<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        backwards(&self.buffer, &mut each)?;
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

    proptest! {
        #[test]
        fn what_was_added_newest_first_comes_back_oldest_first(
            entries in proptest::collection::vec((any::<u64>(), how(), any::<u32>(), proptest::collection::vec(any::<u8>(), 0..50), any::<bool>()), 0..40)
        ) {
            let dir = tempfile::tempdir().unwrap();
            let spill = Spill::new(dir.path()).unwrap();
            prop_assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
            let mut chain = Chain::default();
            let mut expected = Vec::new();
            let mut buffered = 0;
            for (at, how, block, record, flush) in &entries {
                let block = match how {
                    How::CutVisibility(heap) => waltide_format::engines::postgres::wal::vm_block_of(*heap),
                    _ => *block,
                };
                let entry = Entry { start: (*at).into(), end: at.wrapping_add(8).into(), how: *how, block, record };
                buffered += chain.push(&entry);
                if *flush {
                    buffered -= chain.flush(&spill).unwrap();
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
