//! A stored segment's WAL, decompressed while it is read: what was just decompressed is read out of the processor's caches.

use std::ops::Range;

use super::envelope::{Decompressor, Footer, ObjectKind};
use super::stored_segment::SegmentDirectory;
use crate::engines::postgres::wal::WalBytes;
use crate::error::Corrupt;

/// The WAL of a whole stored segment under its checksums, decompressed as far as it was asked for.
#[derive(Debug)]
pub struct StoredWal<'a> {
    object: &'a [u8],
    directory: SegmentDirectory,
    /// What is there of it, from the byte `begin` on.
    wal: Vec<u8>,
    begin: usize,
    /// How much of what was asked for stays there.
    kept: usize,
    /// The first chunk that was not asked for.
    next: usize,
    fault: Option<Corrupt>,
    decompressor: Decompressor,
}

impl<'a> StoredWal<'a> {
    /// The WAL of a whole object, in place of what `wal` holds. Nothing is decompressed yet.
    pub fn open(object: &'a [u8], mut wal: Vec<u8>) -> Result<Self, Corrupt> {
        wal.clear();
        Footer::check(object, ObjectKind::Segment)?;
        let object_bytes = object.len() as u64;
        let directory = SegmentDirectory::decode(object, object_bytes)?;
        let directory =
            directory.map_err(|needed| Corrupt::too_large("directory", 0, needed, object_bytes))?;
        let (begin, kept, next, fault) = (0, usize::MAX, 0, None);
        Ok(Self { object, directory, wal, begin, kept, next, fault, decompressor: Decompressor::default() })
    }

    /// Keeps little more than `bytes` of what was read before, and the chunk that is being read: so little that it stays in
    /// the processor's caches.
    #[must_use]
    pub fn keeping(self, bytes: usize) -> Self {
        Self { kept: bytes, ..self }
    }

    /// Where everything lies.
    pub const fn directory(&self) -> &SegmentDirectory {
        &self.directory
    }

    /// Decompresses up to byte `end` of the WAL at least, or to its end where that is before.
    pub fn reach(&mut self, end: usize) -> Result<(), Corrupt> {
        while self.end() < end
            && let Some(chunk) = self.directory.chunks.get(self.next)
        {
            if let Some(fault) = self.fault {
                return Err(fault);
            }
            let cut = self.wal.len().saturating_sub(self.kept);
            // Chunks may be short, and to cut moves what is kept.
            if cut > self.kept / 4 {
                self.wal.drain(..cut);
                self.begin = self.begin.saturating_add(cut);
            }
            let read = chunk.read_onto(&mut self.wal, self.object, "chunk", &mut self.decompressor);
            read.inspect_err(|fault| self.fault = Some(*fault))?;
            self.next = self.next.saturating_add(1);
        }
        Ok(())
    }

    /// As far as it was decompressed.
    fn end(&self) -> usize {
        self.begin.saturating_add(self.wal.len())
    }

    /// What is there of what was decompressed so far, and where it begins.
    pub fn reached(&self) -> (usize, &[u8]) {
        (self.begin, &self.wal)
    }

    /// The damage that was met, which kept what is behind it from being read.
    pub const fn fault(&self) -> Option<Corrupt> {
        self.fault
    }

    /// What is there of what was decompressed.
    pub fn into_bytes(self) -> Vec<u8> {
        self.wal
    }
}

impl WalBytes for StoredWal<'_> {
    fn length(&self) -> usize {
        usize::try_from(self.directory.wal_bytes).unwrap_or(usize::MAX)
    }

    fn part(&mut self, range: Range<usize>) -> Option<&[u8]> {
        self.reach(range.end).ok()?;
        self.wal.get(range.start.checked_sub(self.begin)?..range.end.checked_sub(self.begin)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::stored_segment::{CHUNK_BYTES, encode_segment, samples};
    use proptest::prelude::*;

    fn stored(wal: &[u8]) -> Vec<u8> {
        let index = crate::archive::SegmentIndex::new(samples::info(wal.len() as u64));
        encode_segment(wal, &index, 1, 1)
    }

    fn wal(length: usize) -> Vec<u8> {
        (0..length as u64).map(|i| (i.wrapping_mul(0x9E37_79B9) >> 12) as u8).collect()
    }

    #[test]
    fn no_more_is_decompressed_than_was_asked_for() {
        let wal = wal(3 * CHUNK_BYTES + 9);
        let object = stored(&wal);
        let mut read = StoredWal::open(&object, b"before".to_vec()).unwrap();
        assert_eq!((read.length(), read.reached()), (wal.len(), (0, &[][..])));
        for (range, reached) in [
            (0..CHUNK_BYTES, CHUNK_BYTES),
            (5..6, CHUNK_BYTES),
            (CHUNK_BYTES - 1..CHUNK_BYTES + 1, 2 * CHUNK_BYTES),
            (3 * CHUNK_BYTES..wal.len(), wal.len()),
        ] {
            assert_eq!(read.part(range.clone()), wal.get(range));
            assert_eq!(read.reached().1.len(), reached);
        }
        assert_eq!(read.part(wal.len()..wal.len() + 1), None);
        assert_eq!((read.fault(), read.into_bytes()), (None, wal));
    }

    #[test]
    fn little_more_is_kept_than_was_said() {
        let wal = wal(3 * CHUNK_BYTES);
        let object = stored(&wal);
        let mut read = StoredWal::open(&object, Vec::new()).unwrap().keeping(100);
        assert_eq!(read.part(0..CHUNK_BYTES), wal.get(..CHUNK_BYTES));
        assert_eq!(
            read.part(CHUNK_BYTES - 100..CHUNK_BYTES + 1),
            wal.get(CHUNK_BYTES - 100..CHUNK_BYTES + 1)
        );
        assert_eq!(read.reached(), (CHUNK_BYTES - 100, &wal[CHUNK_BYTES - 100..2 * CHUNK_BYTES]));
        assert_eq!(read.part(CHUNK_BYTES - 101..CHUNK_BYTES), None);
        assert_eq!(read.part(wal.len() - 1..wal.len()), wal.last_chunk::<1>().map(|b| &b[..]));
        assert_eq!((read.reached().0, read.fault()), (2 * CHUNK_BYTES - 100, None));
    }

    #[test]
    fn a_damaged_chunk_ends_what_is_read_and_is_told() {
        let wal = wal(3 * CHUNK_BYTES);
        let mut object = stored(&wal);
        let at = StoredWal::open(&object, Vec::new())
            .unwrap()
            .directory()
            .chunks(&(CHUNK_BYTES as u64..CHUNK_BYTES as u64 + 1));
        object[at.start as usize + 100] ^= 1;
        assert!(StoredWal::open(&object, Vec::new()).is_err());
        // A chunk has a checksum of its own too.
        let covered = object.len() - 8;
        let crc = crc32fast::hash(&object[..covered]).to_le_bytes();
        object[covered..covered + 4].copy_from_slice(&crc);
        let mut read = StoredWal::open(&object, Vec::new()).unwrap();
        assert_eq!(read.part(0..10), wal.get(..10));
        assert_eq!(read.part(CHUNK_BYTES..CHUNK_BYTES + 1), None);
        let fault = read.fault().unwrap();
        assert_eq!((fault.field, fault.at), ("chunk", at.start));
        assert_eq!(read.reach(2 * CHUNK_BYTES), Err(fault));
        assert_eq!(read.part(10..20), wal.get(10..20));
    }

    proptest! {
        #[test]
        fn any_object_is_read_or_refused(object in proptest::collection::vec(any::<u8>(), 0..300), end in any::<usize>()) {
            if let Ok(mut read) = StoredWal::open(&object, Vec::new()) {
                let _ = read.reach(end);
            }
        }
    }
}
