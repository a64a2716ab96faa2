//! `pg_logical/replorigin_checkpoint`: how far replication origins have come. Layout: docs/wal.md, "State besides pages".

use crate::error::Corrupt;
use crate::ids::Lsn;
use crate::reader::{Reader, Writer};

/// `REPLICATION_STATE_MAGIC`.
const MAGIC: u32 = 0x1257_DADE;
const ENTRY_BYTES: usize = 16;
const CRC_BYTES: usize = 4;
/// More origins cannot be told apart.
const ENTRIES_MAX: usize = 0xFFFF;

/// The file's length with every origin there can be.
pub const ORIGINS_BYTES_MAX: u64 = (4 + ENTRIES_MAX * ENTRY_BYTES + CRC_BYTES) as u64;

/// Decodes the file: origin and `remote_lsn`, in the file's order.
pub fn read_origins(bytes: &[u8]) -> Result<Vec<(u16, Lsn)>, Corrupt> {
    let mut r = Reader::new(bytes);
    let magic = r.u32("magic")?;
    if magic != MAGIC {
        return Err(Corrupt::mismatch("magic", 0, magic.into(), MAGIC.into()));
    }
    let at = r.position();
    let count = r.left().checked_div(ENTRY_BYTES).unwrap_or(0);
    if count > ENTRIES_MAX {
        return Err(Corrupt::too_large("entries", at, count as u64, ENTRIES_MAX as u64));
    }
    let mut entries = Vec::with_capacity(count);
    for _ in 0..count {
        let origin = r.u16("roident")?;
        r.take(6, "padding")?;
        entries.push((origin, Lsn::from(r.u64("remote_lsn")?)));
    }
    let crc_at = r.position();
    let covered = bytes.get(..usize::try_from(crc_at).unwrap_or(0)).unwrap_or_default();
    let (found, computed) = (r.u32("crc")?, crc32c::crc32c(covered));
    if found != computed {
        return Err(Corrupt::mismatch("crc", crc_at, found.into(), computed.into()));
    }
    r.finish("crc")?;
    Ok(entries)
}

/// Encodes the file.
pub fn write_origins(entries: &[(u16, Lsn)]) -> Vec<u8> {
    let mut w = Writer::new();
    w.u32(MAGIC);
    for (origin, remote) in entries {
        w.u16(*origin).bytes(&[0; 6]).u64(remote.get());
    }
    let crc = crc32c::crc32c(w.as_bytes());
    w.u32(crc);
    w.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_any_change_is_refused() {
        for entries in [vec![], vec![(1, Lsn::from(0x1234)), (7, Lsn::ZERO)]] {
            let file = write_origins(&entries);
            assert_eq!(file.len(), 8 + 16 * entries.len());
            assert_eq!(read_origins(&file), Ok(entries));
            for at in 0..file.len() {
                let mut bad = file.clone();
                bad[at] ^= 1;
                assert!(read_origins(&bad).is_err(), "byte {at}");
                assert!(read_origins(&file[..at]).is_err(), "cut at {at}");
            }
        }
    }
}
