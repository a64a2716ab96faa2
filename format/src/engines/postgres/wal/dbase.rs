//! Databases, tablespaces and relation maps: what happens to whole directories.

use crate::engines::postgres::wal::Record;
use crate::engines::postgres::wal::rmgr::Rmgr;
use crate::engines::postgres::wal::xlog::read_i32;
use crate::error::Corrupt;
use crate::ids::{Oid, PgMajor};
use crate::reader::Reader;

/// A record of the resource manager Database. Its kinds were dealt out anew in 15.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DatabaseRecord {
    /// A database's directory in one tablespace was copied file by file.
    Copy {
        /// The database made.
        db_oid: Oid,
        /// Where.
        spc_oid: Oid,
        /// The database copied.
        from_db_oid: Oid,
        /// From where.
        from_spc_oid: Oid,
    },
    /// A database's directory was made, its pages follow in the log (from 15).
    Create {
        /// The database.
        db_oid: Oid,
        /// Where.
        spc_oid: Oid,
    },
    /// A database's directories were removed.
    Drop {
        /// The database.
        db_oid: Oid,
        /// From where.
        spc_oids: Vec<Oid>,
    },
}

impl DatabaseRecord {
    /// Decodes it; `None` for any other record. Errors count bytes from the start of the main data.
    pub fn decode(record: &Record<'_>) -> Option<Result<Self, Corrupt>> {
        if record.rmgr() != Rmgr::DBASE {
            return None;
        }
        let r = &mut Reader::new(record.main_data());
        Some(match (record.kind(), record.major >= PgMajor::V15) {
            (0x00, _) => Self::decode_copy(r),
            (0x10, true) => Self::decode_create(r),
            (0x10, false) | (0x20, true) => Self::decode_drop(r),
            (other, _) => Err(Corrupt::invalid("xl_info", 0, u64::from(other))),
        })
    }

    fn decode_copy(r: &mut Reader<'_>) -> Result<Self, Corrupt> {
        Ok(Self::Copy {
            db_oid: r.u32("db_id")?,
            spc_oid: r.u32("tablespace_id")?,
            from_db_oid: r.u32("src_db_id")?,
            from_spc_oid: r.u32("src_tablespace_id")?,
        })
    }

    fn decode_create(r: &mut Reader<'_>) -> Result<Self, Corrupt> {
        Ok(Self::Create { db_oid: r.u32("db_id")?, spc_oid: r.u32("tablespace_id")? })
    }

    fn decode_drop(r: &mut Reader<'_>) -> Result<Self, Corrupt> {
        let db_oid = r.u32("db_id")?;
        let at = r.position();
        let count = read_i32(r, "ntablespaces")?;
        let found = u64::from(count.cast_unsigned());
        let max = r.left().checked_div(4).unwrap_or(0);
        let count = usize::try_from(count).ok().filter(|count| *count <= max);
        let count = count.ok_or(Corrupt::too_large("ntablespaces", at, found, max as u64))?;
        let spc_oids = (0..count).map(|_| r.u32("tablespace_ids")).collect::<Result<_, _>>()?;
        Ok(Self::Drop { db_oid, spc_oids })
    }
}

/// A record of the resource manager Tablespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TablespaceRecord {
    /// A tablespace was made.
    Create {
        /// The tablespace.
        spc_oid: Oid,
        /// Its location.
        path: String,
    },
    /// A tablespace was dropped.
    Drop {
        /// The tablespace.
        spc_oid: Oid,
    },
}

impl TablespaceRecord {
    /// Decodes it; `None` for any other record. Errors count bytes from the start of the main data.
    pub fn decode(record: &Record<'_>) -> Option<Result<Self, Corrupt>> {
        if record.rmgr() != Rmgr::TBLSPC {
            return None;
        }
        let r = &mut Reader::new(record.main_data());
        Some(r.u32("ts_id").and_then(|spc_oid| match record.kind() {
            0x00 => {
                let path = r.rest().split(|b| *b == 0).next().unwrap_or_default();
                Ok(Self::Create { spc_oid, path: String::from_utf8_lossy(path).into_owned() })
            }
            0x10 => Ok(Self::Drop { spc_oid }),
            other => Err(Corrupt::invalid("xl_info", 0, u64::from(other))),
        }))
    }
}

/// `xl_relmap_update`: a database's relation map was replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelationMapUpdate<'a> {
    /// `dbid`; zero for the map of shared relations.
    pub db_oid: Oid,
    /// `tsid`.
    pub spc_oid: Oid,
    /// The file's new content.
    pub map: &'a [u8],
}

impl<'a> RelationMapUpdate<'a> {
    /// Decodes it; `None` for any other record. Errors count bytes from the start of the main data.
    pub fn decode(record: &Record<'a>) -> Option<Result<Self, Corrupt>> {
        let is_one = record.rmgr() == Rmgr::RELMAP && record.kind() == 0;
        is_one.then(|| Self::decode_main(record.main_data()))
    }

    fn decode_main(main: &'a [u8]) -> Result<Self, Corrupt> {
        let r = &mut Reader::new(main);
        let db_oid = r.u32("dbid")?;
        let spc_oid = r.u32("tsid")?;
        let len = r.parse_u32("nbytes", |v| usize::try_from(v).ok())?;
        Ok(Self { db_oid, spc_oid, map: r.take(len, "data")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drop_lists_its_tablespaces_and_a_count_too_large_is_refused() {
        let bytes: Vec<u8> = [5u32, 2, 1663, 16500].iter().flat_map(|v| v.to_le_bytes()).collect();
        let drop = DatabaseRecord::decode_drop(&mut Reader::new(&bytes)).unwrap();
        assert_eq!(drop, DatabaseRecord::Drop { db_oid: 5, spc_oids: vec![1663, 16500] });
        for cut in 0..bytes.len() {
            assert!(DatabaseRecord::decode_drop(&mut Reader::new(&bytes[..cut])).is_err());
        }
    }
}
