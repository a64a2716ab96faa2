//! Resource managers, by the names that pg_waldump prints. The list is the same from 13 to 18.

use std::fmt;

use crate::ids::PgMajor;

/// A resource manager: who wrote a record and who replays it (`xl_rmid`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rmgr(u8);

/// The built-in ones, by number.
const NAMES: [&str; 22] = [
    "XLOG",
    "Transaction",
    "Storage",
    "CLOG",
    "Database",
    "Tablespace",
    "MultiXact",
    "RelMap",
    "Standby",
    "Heap2",
    "Heap",
    "Btree",
    "Hash",
    "Gin",
    "Gist",
    "Sequence",
    "SPGist",
    "BRIN",
    "CommitTs",
    "ReplicationOrigin",
    "Generic",
    "LogicalMessage",
];

impl Rmgr {
    /// Checkpoints, switches, bare full-page images.
    pub const XLOG: Self = Self(0);
    /// Commits and aborts.
    pub const XACT: Self = Self(1);
    /// Files made and cut.
    pub const SMGR: Self = Self(2);
    /// Commit status pages.
    pub const CLOG: Self = Self(3);
    /// Databases.
    pub const DBASE: Self = Self(4);
    /// Tablespaces.
    pub const TBLSPC: Self = Self(5);
    /// Multixacts.
    pub const MULTIXACT: Self = Self(6);
    /// Relation maps.
    pub const RELMAP: Self = Self(7);
    /// Locks and running transactions, for standbys.
    pub const STANDBY: Self = Self(8);
    /// The heap's second set.
    pub const HEAP2: Self = Self(9);
    /// The heap.
    pub const HEAP: Self = Self(10);
    /// B-trees.
    pub const BTREE: Self = Self(11);
    /// Hash indexes.
    pub const HASH: Self = Self(12);
    /// GIN.
    pub const GIN: Self = Self(13);
    /// GiST.
    pub const GIST: Self = Self(14);
    /// Sequences.
    pub const SEQ: Self = Self(15);
    /// SP-GiST.
    pub const SPGIST: Self = Self(16);
    /// BRIN.
    pub const BRIN: Self = Self(17);
    /// Commit timestamps.
    pub const COMMIT_TS: Self = Self(18);
    /// Replication origins.
    pub const REPLORIGIN: Self = Self(19);
    /// Byte deltas of pages.
    pub const GENERIC: Self = Self(20);
    /// Messages for logical decoding.
    pub const LOGICALMSG: Self = Self(21);
    /// The first number an extension may take, from 15.
    const CUSTOM_MIN: u8 = 128;

    /// The resource manager of that number, where `major` has one.
    pub fn new(rmid: u8, major: PgMajor) -> Option<Self> {
        let built_in = usize::from(rmid) < NAMES.len();
        let custom = rmid >= Self::CUSTOM_MIN && major >= PgMajor::V15;
        (built_in || custom).then_some(Self(rmid))
    }

    /// `xl_rmid`.
    pub const fn get(self) -> u8 {
        self.0
    }

    /// Whether an extension brought it.
    pub const fn is_custom(self) -> bool {
        self.0 >= Self::CUSTOM_MIN
    }
}

impl fmt::Display for Rmgr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.get(usize::from(self.0)) {
            Some(name) => f.pad(name),
            None => write!(f, "custom{:03}", self.0),
        }
    }
}

/// The name pg_waldump prints for `xl_rmid`.
pub fn rmgr_name(rmid: u8) -> String {
    Rmgr(rmid).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_have_numbers_from_128_since_15() {
        assert_eq!(Rmgr::new(21, PgMajor::V13).unwrap().to_string(), "LogicalMessage");
        assert_eq!(Rmgr::new(22, PgMajor::V18), None);
        assert_eq!(Rmgr::new(128, PgMajor::V14), None);
        assert_eq!(Rmgr::new(128, PgMajor::V15).unwrap().to_string(), "custom128");
    }
}
