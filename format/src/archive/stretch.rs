//! A part of an object that is compressed and checked on its own: a chunk of WAL, a section of an index.

use super::envelope::decompress;
use crate::error::{Corrupt, Problem};

/// No section is larger; the blocks of a 1 GiB segment stay far below.
pub(super) const SECTION_BYTES_MAX: u64 = 1 << 30;

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

    /// The stretch's bytes out of `object`, checked and decompressed. Equal lengths say it was stored as it was.
    pub(super) fn read(self, object: &[u8], field: &'static str) -> Result<Vec<u8>, Corrupt> {
        let damaged = Corrupt { field, at: self.at, problem: Problem::Compression };
        let range = usize::try_from(self.at).ok().zip(usize::try_from(self.end()).ok());
        let stored = range.and_then(|(from, to)| object.get(from..to)).ok_or(damaged)?;
        let found = crc32fast::hash(stored);
        if found != self.crc {
            return Err(Corrupt::mismatch(field, self.at, u64::from(found), u64::from(self.crc)));
        }
        if self.stored_bytes == self.raw_bytes {
            return Ok(stored.to_vec());
        }
        decompress(stored, self.raw_bytes).ok_or(damaged)
    }
}

/// Compresses `raw` unless that makes it longer.
pub(super) fn pack_with(compressor: Option<&mut zstd::bulk::Compressor<'_>>, raw: &[u8]) -> Vec<u8> {
    match compressor.map_or_else(|| Ok(raw.to_vec()), |c| c.compress(raw)) {
        Ok(packed) if packed.len() < raw.len() => packed,
        _ => raw.to_vec(),
    }
}
