//! Files in `pg_twophase`: prepared transactions that outlive a checkpoint. Layout: docs/wal.md, "State besides pages".

use crate::engines::postgres::wal::Prepare;
use crate::error::Corrupt;
use crate::ids::{PgMajor, Xid};
use crate::reader::Reader;

/// The CRC-32C at the end.
const CRC_BYTES: usize = 4;
/// The server never reads a longer one (`MaxAllocSize`).
pub const TWO_PHASE_BYTES_MAX: u64 = 0x3FFF_FFFF;

/// The file that belongs to a PREPARE record's main data.
pub fn two_phase_file(main: &[u8]) -> Vec<u8> {
    [main, &crc32c::crc32c(main).to_le_bytes()].concat()
}

/// Decodes the main data of a PREPARE record, checking that it makes a file that the server reads.
pub fn check_two_phase(main: &[u8], major: PgMajor) -> Result<Prepare, Corrupt> {
    let prepare = Prepare::decode_main(main, major)?;
    let length = main.len().saturating_add(CRC_BYTES) as u64;
    if length > TWO_PHASE_BYTES_MAX {
        return Err(Corrupt::too_large("total_len", 4, length, TWO_PHASE_BYTES_MAX));
    }
    if u64::from(prepare.total_bytes) != length || !main.len().is_multiple_of(8) {
        return Err(Corrupt::mismatch("total_len", 4, prepare.total_bytes.into(), length));
    }
    Ok(prepare)
}

/// Decodes a file, its CRC and its length checked.
pub fn read_two_phase_file(bytes: &[u8], major: PgMajor) -> Result<Prepare, Corrupt> {
    let mut r = Reader::new(bytes);
    let main = r.take(bytes.len().saturating_sub(CRC_BYTES), "state")?;
    let at = r.position();
    let (found, computed) = (r.u32("crc")?, crc32c::crc32c(main));
    if found != computed {
        return Err(Corrupt::mismatch("crc", at, found.into(), computed.into()));
    }
    check_two_phase(main, major)
}

/// The name of a transaction's file before 17, which put the epoch before it.
pub fn two_phase_name(xid: Xid) -> String {
    format!("{:08X}", xid.get())
}

/// The transaction whose file has this name; `None` for a name that none has.
pub fn two_phase_xid(name: &str) -> Option<Xid> {
    let hex = |b: u8| b.is_ascii_digit() || (b'A'..=b'F').contains(&b);
    let is_one = name.len() == 8 && name.bytes().all(hex);
    is_one.then(|| u32::from_str_radix(name, 16).ok()).flatten().map(Xid::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reader::Writer;

    fn main_data() -> Vec<u8> {
        let mut w = Writer::new();
        w.u32(0x57F9_4534).u32(84).u32(740).u32(5).i64(9).u32(10);
        for _ in 0..6 {
            w.u32(0);
        }
        w.u8(0).u8(0).u16(4).u64(0).i64(0).bytes(b"abc\0\0\0\0\0");
        w.into_bytes()
    }

    #[test]
    fn a_file_is_the_record_and_its_crc_and_any_change_is_refused() {
        let file = two_phase_file(&main_data());
        assert_eq!(file.len(), 84);
        let read = read_two_phase_file(&file, PgMajor::V15).unwrap();
        assert_eq!((read.xid, read.gid.as_str()), (Xid::from(740), "abc"));
        for at in 0..file.len() {
            let mut bad = file.clone();
            bad[at] ^= 1;
            assert!(read_two_phase_file(&bad, PgMajor::V15).is_err(), "byte {at}");
            assert!(read_two_phase_file(&file[..at], PgMajor::V15).is_err(), "cut at {at}");
        }
        let longer = two_phase_file(&[main_data(), vec![0; 8]].concat());
        let error = read_two_phase_file(&longer, PgMajor::V15).unwrap_err();
        assert_eq!(error.to_string(), "total_len at byte 4 is 0x54, expected 0x5C");
    }

    #[test]
    fn a_file_is_named_after_its_transaction() {
        assert_eq!(two_phase_name(Xid::from(0x2E4)), "000002E4");
        assert_eq!(two_phase_xid("000002E4"), Some(Xid::from(0x2E4)));
        for no in ["000002e4", "2E4", "00000000000002E4", "0000.2E4"] {
            assert_eq!(two_phase_xid(no), None);
        }
    }
}
