//! `pg_filenode.map`: in which files the catalogues lie whose rows in pg_class do not say it.

use crate::error::Corrupt;
use crate::ids::{Oid, PgMajor};
use crate::reader::Reader;

/// `RELMAPPER_FILEMAGIC`.
const MAGIC: u32 = 0x0059_2717;
const MAPPING_BYTES: usize = 8;

/// How many mappings the file has room for.
const fn mappings_max(major: PgMajor) -> usize {
    if major.get() >= 16 { 64 } else { 62 }
}

/// A relation map.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RelationMap {
    mappings: Vec<(Oid, Oid)>,
}

impl RelationMap {
    /// Decodes the file, or what a record says that becomes of it, and checks its CRC.
    pub fn decode(bytes: &[u8], major: PgMajor) -> Result<Self, Corrupt> {
        let max = mappings_max(major);
        let r = &mut Reader::new(bytes);
        let magic = r.u32("magic")?;
        if magic != MAGIC {
            return Err(Corrupt::mismatch("magic", 0, u64::from(magic), u64::from(MAGIC)));
        }
        let count = r.u32("num_mappings")?;
        if count as usize > max {
            return Err(Corrupt::too_large("num_mappings", 4, u64::from(count), max as u64));
        }
        let all = r.take(max.saturating_mul(MAPPING_BYTES), "mappings")?;
        let crc_at = r.position();
        let crc = r.u32("crc")?;
        let covered = bytes.get(..usize::try_from(crc_at).unwrap_or(0)).unwrap_or_default();
        let computed = crc32c::crc32c(covered);
        if crc != computed {
            return Err(Corrupt::mismatch("crc", crc_at, u64::from(crc), u64::from(computed)));
        }
        let mut mappings = Reader::new(all);
        let mapping = |_| Ok((mappings.u32("mapoid")?, mappings.u32("mapfilenumber")?));
        Ok(Self { mappings: (0..count).map(mapping).collect::<Result<_, _>>()? })
    }

    /// A map of these mappings: catalogue, file number.
    pub const fn new(mappings: Vec<(Oid, Oid)>) -> Self {
        Self { mappings }
    }

    /// The number of the file that a mapped catalogue lies in.
    pub fn file_of(&self, oid: Oid) -> Option<Oid> {
        self.mappings.iter().find(|(mapped, _)| *mapped == oid).map(|(_, file)| *file)
    }

    /// The mappings: catalogue, file number.
    pub fn mappings(&self) -> &[(Oid, Oid)] {
        &self.mappings
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reader::Writer;

    fn file(major: PgMajor, mappings: &[(Oid, Oid)]) -> Vec<u8> {
        let mut w = Writer::new();
        w.u32(MAGIC).u32(mappings.len() as u32);
        for (oid, file) in mappings {
            w.u32(*oid).u32(*file);
        }
        w.bytes(&vec![0; (mappings_max(major) - mappings.len()) * MAPPING_BYTES]);
        let crc = crc32c::crc32c(w.as_bytes());
        w.u32(crc);
        if major < PgMajor::V16 {
            w.u32(0);
        }
        w.into_bytes()
    }

    #[test]
    fn a_map_is_read_in_each_major_and_damage_and_truncation_are_refused() {
        for (major, bytes) in
            [(PgMajor::V13, 512), (PgMajor::V15, 512), (PgMajor::V16, 524), (PgMajor::V18, 524)]
        {
            let good = file(major, &[(1259, 16400), (1249, 1249)]);
            assert_eq!(good.len(), bytes);
            let map = RelationMap::decode(&good, major).unwrap();
            assert_eq!((map.file_of(1259), map.file_of(1), map.mappings().len()), (Some(16400), None, 2));
            let covered = 8 + mappings_max(major) * 8 + 4;
            for at in 0..covered {
                let mut bad = good.clone();
                bad[at] ^= 1;
                assert!(RelationMap::decode(&bad, major).is_err(), "{major} byte {at}");
                assert!(RelationMap::decode(&good[..at], major).is_err(), "{major} cut at {at}");
            }
        }
    }
}
