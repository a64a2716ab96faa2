//! Relation files made and cut.

use crate::engines::postgres::wal::Record;
use crate::engines::postgres::wal::record::read_relation;
use crate::engines::postgres::wal::rmgr::Rmgr;
use crate::error::Corrupt;
use crate::ids::{BlockNumber, ForkNumber, RelFileLocator};
use crate::reader::Reader;

const CREATE: u8 = 0x10;
const TRUNCATE: u8 = 0x20;

/// A record of the resource manager Storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SmgrRecord {
    /// A fork's file was made.
    Create {
        /// The relation.
        relation: RelFileLocator,
        /// The fork.
        fork: ForkNumber,
    },
    /// A relation was cut.
    Truncate {
        /// The relation.
        relation: RelFileLocator,
        /// The main fork's new length; the other forks' follow from it.
        blocks: BlockNumber,
        /// Which forks: `SMGR_TRUNCATE_HEAP`, `_VM`, `_FSM`.
        flags: u32,
    },
}

impl SmgrRecord {
    /// Of the flags: the main fork.
    pub const TRUNCATE_HEAP: u32 = 1;
    /// Of the flags: the visibility map.
    pub const TRUNCATE_VM: u32 = 2;
    /// Of the flags: the free space map.
    pub const TRUNCATE_FSM: u32 = 4;

    /// Decodes it; `None` for any other record. Errors count bytes from the start of the main data.
    pub fn decode(record: &Record<'_>) -> Option<Result<Self, Corrupt>> {
        if record.rmgr() != Rmgr::SMGR {
            return None;
        }
        let r = &mut Reader::new(record.main_data());
        match record.kind() {
            CREATE => Some(Self::decode_create(r)),
            TRUNCATE => Some(Self::decode_truncate(r)),
            _ => None,
        }
    }

    fn decode_create(r: &mut Reader<'_>) -> Result<Self, Corrupt> {
        let relation = read_relation(r)?;
        let fork = r.parse_u32("forkNum", |v| u8::try_from(v).ok().and_then(ForkNumber::new))?;
        Ok(Self::Create { relation, fork })
    }

    fn decode_truncate(r: &mut Reader<'_>) -> Result<Self, Corrupt> {
        let blocks = r.u32("blkno")?;
        let relation = read_relation(r)?;
        let flags = r.parse_u32("flags", |v| (v <= 7).then_some(v))?;
        Ok(Self::Truncate { relation, blocks, flags })
    }
}
