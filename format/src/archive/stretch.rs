//! A part of an object that is compressed and checked on its own: a chunk of WAL, a section of an index.

use super::envelope::{Decompressor, HEADER_BYTES};
use crate::error::{Corrupt, Problem};
use crate::reader::Reader;

/// No section is larger; the blocks of a 1 GiB segment stay far below.
const SECTION_BYTES_MAX: u64 = 1 << 30;

/// One stretch of an object: where it lies, its checksum, its length once decompressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stretch {
    pub(super) at: u64,
    pub(super) stored_bytes: u64,
    pub(super) raw_bytes: u64,
    pub(super) crc: u32,
}

impl Stretch {
    pub(super) fn end(self) -> u64 {
        self.at.saturating_add(self.stored_bytes)
    }

    /// The stretch's bytes out of `object`, checked and decompressed.
    pub(super) fn read(self, object: &[u8], field: &'static str) -> Result<Vec<u8>, Corrupt> {
        let mut bytes = Vec::new();
        self.read_onto(&mut bytes, object, field, &mut Decompressor::default())?;
        Ok(bytes)
    }

    /// The same, behind what `bytes` holds. Equal lengths say it was stored as it was.
    pub(super) fn read_onto(
        self,
        bytes: &mut Vec<u8>,
        object: &[u8],
        field: &'static str,
        decompressor: &mut Decompressor,
    ) -> Result<(), Corrupt> {
        let damaged = Corrupt { field, at: self.at, problem: Problem::Compression };
        let range = usize::try_from(self.at).ok().zip(usize::try_from(self.end()).ok());
        let stored = range.and_then(|(from, to)| object.get(from..to)).ok_or(damaged)?;
        let found = crc32fast::hash(stored);
        if found != self.crc {
            return Err(Corrupt::mismatch(field, self.at, u64::from(found), u64::from(self.crc)));
        }
        if self.stored_bytes == self.raw_bytes {
            bytes.extend_from_slice(stored);
            return Ok(());
        }
        decompressor.decompress_onto(bytes, stored, self.raw_bytes).ok_or(damaged)
    }
}

/// A section as a directory names it: its number, its version, where it lies.
pub(super) type SectionAt = (u16, u16, Stretch);

/// Reads a directory's stretches, which lie one behind the other from the header to the directory.
#[derive(Debug)]
pub(super) struct Stretches {
    next: u64,
    directory_at: u64,
}

impl Stretches {
    pub(super) const fn before(directory_at: u64) -> Self {
        Self { next: HEADER_BYTES as u64, directory_at }
    }

    /// Where the next stretch begins.
    pub(super) const fn next_at(&self) -> u64 {
        self.next
    }

    /// Reads the next stretch; its decompressed length too, unless that is known.
    pub(super) fn read(&mut self, r: &mut Reader<'_>, raw_bytes: Option<u64>) -> Result<Stretch, Corrupt> {
        let at = r.position();
        let stored_bytes = r.varint("stored_bytes")?;
        let raw_bytes = match raw_bytes {
            Some(raw_bytes) => raw_bytes,
            None => r.varint("raw_bytes")?,
        };
        if raw_bytes > SECTION_BYTES_MAX {
            return Err(Corrupt::too_large("raw_bytes", at, raw_bytes, SECTION_BYTES_MAX));
        }
        let found = Stretch { at: self.next, stored_bytes, raw_bytes, crc: r.u32("crc")? };
        self.next = found.end();
        match self.next > self.directory_at {
            true => Err(Corrupt::too_large("stored_bytes", at, self.next, self.directory_at)),
            false => Ok(found),
        }
    }

    /// Reads the sections, which are the last stretches and end the directory.
    pub(super) fn read_sections(mut self, mut r: Reader<'_>) -> Result<Vec<SectionAt>, Corrupt> {
        let count = r.count(10, "sections")?;
        let mut sections = Vec::with_capacity(count);
        for _ in 0..count {
            let (number, version) = (r.u16("section")?, r.u16("section_version")?);
            sections.push((number, version, self.read(&mut r, None)?));
        }
        if self.next != self.directory_at {
            return Err(Corrupt::mismatch("directory_at", self.directory_at, self.directory_at, self.next));
        }
        r.finish("directory")?;
        Ok(sections)
    }
}

/// Compresses `raw` unless that makes it longer.
pub(super) fn pack_with(compressor: Option<&mut zstd::bulk::Compressor<'_>>, raw: &[u8]) -> Vec<u8> {
    match compressor.map_or_else(|| Ok(raw.to_vec()), |c| c.compress(raw)) {
        Ok(packed) if packed.len() < raw.len() => packed,
        _ => raw.to_vec(),
    }
}
