//! The numbers PostgreSQL names things by, each printed exactly as PostgreSQL prints it.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An object identifier, as in `pg_class.oid`.
pub type Oid = u32;
/// A block's number in its fork.
pub type BlockNumber = u32;
/// PostgreSQL's page size; other builds are refused at `init`.
pub const BLOCK_BYTES: usize = 8192;

/// The text is not of the form the type is written in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseIdError {
    what: &'static str,
    form: &'static str,
    found: String,
}

impl ParseIdError {
    pub(crate) fn new(what: &'static str, form: &'static str, found: &str) -> Self {
        Self { what, form, found: found.chars().take(80).collect() }
    }
}

impl fmt::Display for ParseIdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not {}, which is written {}", self.found, self.what, self.form)
    }
}

impl std::error::Error for ParseIdError {}

/// Serialises a type as the text it prints and reads.
macro_rules! serde_as_text {
    ($t:ty) => {
        impl serde::Serialize for $t {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
        impl<'de> serde::Deserialize<'de> for $t {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = <String as serde::Deserialize>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
pub(crate) use serde_as_text;

/// A position in the write-ahead log, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(u64);

impl Lsn {
    /// PostgreSQL's `InvalidXLogRecPtr`.
    pub const ZERO: Self = Self(0);
    /// The largest position there is.
    pub const MAX: Self = Self(u64::MAX);

    /// The position as a number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Whether this is PostgreSQL's invalid position.
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// The position `bytes` later, where there is one.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }

    /// The position `bytes` later, or the last one.
    #[must_use]
    pub const fn saturating_add(self, bytes: u64) -> Self {
        Self(self.0.saturating_add(bytes))
    }

    /// The position `bytes` earlier, or the first one.
    #[must_use]
    pub const fn saturating_sub(self, bytes: u64) -> Self {
        Self(self.0.saturating_sub(bytes))
    }

    /// The bytes from `earlier` to here; zero where it is later.
    pub const fn bytes_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl From<u64> for Lsn {
    fn from(v: u64) -> Self {
        Self(v)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Lsn {
    type Err = ParseIdError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let half = |part: &str| {
            let digits = (1..=8).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_hexdigit());
            digits.then(|| u64::from_str_radix(part, 16).ok()).flatten()
        };
        s.split_once('/')
            .and_then(|(high, low)| Some(Self(half(high)? << 32 | half(low)?)))
            .ok_or_else(|| ParseIdError::new("an LSN", "16/B374D848", s))
    }
}
serde_as_text!(Lsn);

/// A transaction's 32-bit number. It wraps, so it has no order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Xid(u32);

impl Xid {
    /// `InvalidTransactionId`.
    pub const INVALID: Self = Self(0);

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Whether this is no transaction.
    pub const fn is_invalid(self) -> bool {
        self.0 == 0
    }

    /// Whether it is one that ends: the numbers before `FirstNormalTransactionId` are given to none.
    pub const fn is_normal(self) -> bool {
        self.0 >= 3
    }

    /// The transaction that is given its number after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        match Self(self.0.wrapping_add(1)) {
            next if next.is_normal() => next,
            _ => Self(3),
        }
    }

    /// Whether this transaction came before `other`, in the half circle of 2^31 transactions.
    pub const fn precedes(self, other: Self) -> bool {
        let (a, b) = (self.0, other.0);
        if a < 3 || b < 3 {
            return a < b;
        }
        b.wrapping_sub(a) != 0 && b.wrapping_sub(a) < 1 << 31
    }
}

impl From<u32> for Xid {
    fn from(v: u32) -> Self {
        Self(v)
    }
}

impl fmt::Display for Xid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for Xid {
    type Err = ParseIdError;

    /// Reads an `xid`, or an `xid8` whose epoch is dropped, as `recovery_target_xid` does.
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let number = s.parse::<u64>().ok();
        number
            .map(|v| Self((v & 0xFFFF_FFFF) as u32))
            .ok_or_else(|| ParseIdError::new("a transaction ID", "as a decimal number", s))
    }
}
serde_as_text!(Xid);

/// A timeline's number; it is never zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TimelineId(NonZeroU32);

impl TimelineId {
    /// The timeline every cluster starts on.
    pub const FIRST: Self = Self(NonZeroU32::MIN);

    /// The timeline of that number, if it can be one.
    pub fn new(v: u32) -> Option<Self> {
        NonZeroU32::new(v).map(Self)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for TimelineId {
    type Err = ParseIdError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let number = match s.strip_prefix("0x") {
            Some(hex) => u32::from_str_radix(hex, 16).ok(),
            None => s.parse().ok(),
        };
        number.and_then(Self::new).ok_or_else(|| ParseIdError::new("a timeline", "as a number from 1", s))
    }
}

impl Serialize for TimelineId {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u32(self.get())
    }
}

impl<'de> Deserialize<'de> for TimelineId {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Self::new(u32::deserialize(d)?).ok_or_else(|| serde::de::Error::custom("timeline 0 does not exist"))
    }
}

/// The number `initdb` gave the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SystemId(u64);

impl SystemId {
    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl From<u64> for SystemId {
    fn from(v: u64) -> Self {
        Self(v)
    }
}

impl fmt::Display for SystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for SystemId {
    type Err = ParseIdError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        s.parse().map(Self).map_err(|_| ParseIdError::new("a system identifier", "as a decimal number", s))
    }
}
serde_as_text!(SystemId);

/// A major version of PostgreSQL whose WAL is understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct PgMajor(u16);

impl PgMajor {
    /// PostgreSQL 13.
    pub const V13: Self = Self(13);
    /// PostgreSQL 14.
    pub const V14: Self = Self(14);
    /// PostgreSQL 15.
    pub const V15: Self = Self(15);
    /// PostgreSQL 16.
    pub const V16: Self = Self(16);
    /// PostgreSQL 17.
    pub const V17: Self = Self(17);
    /// PostgreSQL 18.
    pub const V18: Self = Self(18);
    /// Every major that is understood, oldest first, with its `XLOG_PAGE_MAGIC`.
    pub const ALL: [(Self, u16); 6] = [
        (Self::V13, 0xD106),
        (Self::V14, 0xD10D),
        (Self::V15, 0xD110),
        (Self::V16, 0xD113),
        (Self::V17, 0xD116),
        (Self::V18, 0xD118),
    ];

    /// The major whose pages carry this `xlp_magic`.
    pub fn from_page_magic(magic: u16) -> Option<Self> {
        Self::ALL.iter().find(|(_, m)| *m == magic).map(|(v, _)| *v)
    }

    /// The major version of that number.
    pub fn new(v: u16) -> Option<Self> {
        Self::ALL.iter().map(|(m, _)| *m).find(|m| m.0 == v)
    }

    /// The `xlp_magic` of this major's pages.
    pub fn page_magic(self) -> u16 {
        Self::ALL.iter().find(|(v, _)| *v == self).map_or(0, |(_, m)| *m)
    }

    /// The number, as in `PG_VERSION`.
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<u16> for PgMajor {
    type Error = String;

    fn try_from(v: u16) -> Result<Self, Self::Error> {
        Self::new(v).ok_or_else(|| format!("PostgreSQL {v} is not one of the supported majors 13 to 18"))
    }
}

impl From<PgMajor> for u16 {
    fn from(v: PgMajor) -> Self {
        v.0
    }
}

impl fmt::Display for PgMajor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Where a relation's files lie: tablespace, database, file number (`RelFileNode` before 16).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RelFileLocator {
    /// `spcOid`.
    pub spc_oid: Oid,
    /// `dbOid`; zero for shared relations.
    pub db_oid: Oid,
    /// `relNumber`.
    pub rel_number: Oid,
}

impl fmt::Display for RelFileLocator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.spc_oid, self.db_oid, self.rel_number)
    }
}

impl FromStr for RelFileLocator {
    type Err = ParseIdError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let mut parts = s.split('/').map(|p| p.parse::<Oid>().ok());
        let mut next = || parts.next().flatten();
        let found = next().zip(next()).zip(next());
        match found {
            Some(((spc_oid, db_oid), rel_number)) if s.split('/').count() == 3 => {
                Ok(Self { spc_oid, db_oid, rel_number })
            }
            _ => Err(ParseIdError::new("a relation's files", "1663/5/16384", s)),
        }
    }
}
serde_as_text!(RelFileLocator);

/// A fork of a relation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ForkNumber {
    /// The data.
    Main,
    /// The free space map.
    Fsm,
    /// The visibility map.
    Vm,
    /// What an unlogged relation is reset to.
    Init,
}

impl ForkNumber {
    /// The fork of that number in the WAL.
    pub const fn new(v: u8) -> Option<Self> {
        match v {
            0 => Some(Self::Main),
            1 => Some(Self::Fsm),
            2 => Some(Self::Vm),
            3 => Some(Self::Init),
            _ => None,
        }
    }

    /// The number in the WAL.
    pub const fn get(self) -> u8 {
        match self {
            Self::Main => 0,
            Self::Fsm => 1,
            Self::Vm => 2,
            Self::Init => 3,
        }
    }

    /// What the fork's file names end with.
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::Main => "",
            Self::Fsm => "_fsm",
            Self::Vm => "_vm",
            Self::Init => "_init",
        }
    }
}

/// A backup's name: the UTC second it started and four hexadecimal digits that keep two apart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackupId(String);

impl BackupId {
    /// The name of a backup started at `started`.
    pub fn new(started: crate::TimestampTz, salt: u16) -> Self {
        Self(format!("{}-{salt:04x}", started.compact()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for BackupId {
    type Err = ParseIdError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let shape = s.len() == 21
            && s.bytes().enumerate().all(|(i, b)| match i {
                8 => b == b'T',
                15 => b == b'Z',
                16 => b == b'-',
                17.. => matches!(b, b'0'..=b'9' | b'a'..=b'f'),
                _ => b.is_ascii_digit(),
            });
        if shape {
            Ok(Self(s.to_owned()))
        } else {
            Err(ParseIdError::new("a backup", "20260131T235959Z-1f4e", s))
        }
    }
}
serde_as_text!(BackupId);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_lsn_is_read_as_it_is_printed(v: u64) {
            let lsn = Lsn::from(v);
            prop_assert_eq!(lsn.to_string().parse::<Lsn>(), Ok(lsn));
        }

        #[test]
        fn any_text_is_an_id_or_an_error(s in ".{0,30}") {
            let _ = (s.parse::<Lsn>(), s.parse::<Xid>(), s.parse::<TimelineId>(), s.parse::<BackupId>());
            let _ = (s.parse::<RelFileLocator>(), s.parse::<SystemId>());
        }
    }

    #[test]
    fn an_lsn_looks_like_postgresqls() {
        assert_eq!(Lsn::from(0x16_B374_D848).to_string(), "16/B374D848");
        assert_eq!("0/0".parse::<Lsn>(), Ok(Lsn::ZERO));
        for bad in ["", "/", "0", "0/", "/0", "123456789/0", "0/+1", "0/1/2", "g/0"] {
            assert!(bad.parse::<Lsn>().is_err(), "{bad}");
        }
    }

    #[test]
    fn transactions_are_compared_around_the_circle() {
        assert!(Xid::from(4_294_967_290).precedes(Xid::from(5)));
        assert!(!Xid::from(5).precedes(Xid::from(4_294_967_290)));
        assert!(!Xid::from(9).precedes(Xid::from(9)));
        assert!(Xid::from(2).precedes(Xid::from(4_294_967_290)));
    }
}
