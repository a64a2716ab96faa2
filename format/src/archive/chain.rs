//! The hash chain over the WAL of a line of timelines: what is removed, reordered or replaced changes every head
//! behind it.
//!
//! A chain begins with the first segment of an unbroken run (its *origin*) and goes on for as long as each segment
//! continues the one before, over forks too: a timeline's chain is that of its line.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::catalog::{Run, SegmentEntry};
use super::index::Ending;
use crate::ids::{Lsn, ParseIdError, SystemId, serde_as_text};
use crate::segment::SegmentName;

/// What the hash of a chain's beginning starts with.
const SEED_TAG: &[u8; 16] = b"waltide chain 1\n";

/// SHA-256 over everything in a chain up to some segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChainHash([u8; 32]);

impl ChainHash {
    /// Before the first segment of a chain.
    pub fn seed(system: SystemId, origin: SegmentName) -> Self {
        let mut hash = Sha256::new();
        hash.update(SEED_TAG);
        hash.update(system.get().to_le_bytes());
        hash.update(origin.to_string());
        Self(hash.finalize().into())
    }

    /// Behind one more segment.
    #[must_use]
    pub fn link(self, segment: &ChainLink) -> Self {
        let mut hash = Sha256::new();
        hash.update(self.0);
        hash.update(segment.name.to_string());
        hash.update(segment.digest);
        hash.update(segment.valid_end.get().to_le_bytes());
        Self(hash.finalize().into())
    }

    /// The bytes.
    pub const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<[u8; 32]> for ChainHash {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for ChainHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// 32 bytes written as 64 lower-case hexadecimal digits.
pub fn digest_from_hex(s: &str) -> Option<[u8; 32]> {
    let lower = s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if s.len() != 64 || !lower {
        return None;
    }
    let mut out = [0; 32];
    for (byte, at) in out.iter_mut().zip((0..64usize).step_by(2)) {
        *byte = u8::from_str_radix(s.get(at..at.checked_add(2)?)?, 16).ok()?;
    }
    Some(out)
}

impl FromStr for ChainHash {
    type Err = ParseIdError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let parsed = digest_from_hex(s).map(Self);
        parsed.ok_or_else(|| ParseIdError::new("a hash", "with 64 lower-case hexadecimal digits", s))
    }
}
serde_as_text!(ChainHash);

/// What a segment puts into a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainLink {
    /// The segment.
    pub name: SegmentName,
    /// SHA-256 over its WAL.
    pub digest: [u8; 32],
    /// Where its valid records end.
    pub valid_end: Lsn,
}

impl ChainLink {
    /// What a stored copy puts into the chain; none where its digest is none.
    pub fn of(entry: &SegmentEntry) -> Option<Self> {
        let digest = digest_from_hex(&entry.digest)?;
        Some(Self { name: entry.info.name, digest, valid_end: entry.info.valid_end })
    }
}

/// A chain up to a segment: what is to be noted elsewhere, `ORIGIN..LAST:HASH`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChainHead {
    /// The segment it begins with.
    pub origin: SegmentName,
    /// The last segment in it.
    pub last: SegmentName,
    /// The hash behind that.
    pub hash: ChainHash,
}

impl fmt::Display for ChainHead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}:{}", self.origin, self.last, self.hash)
    }
}

impl FromStr for ChainHead {
    type Err = ParseIdError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let parsed = || {
            let (range, hash) = s.split_once(':')?;
            let (origin, last) = range.split_once("..")?;
            Some(Self { origin: origin.parse().ok()?, last: last.parse().ok()?, hash: hash.parse().ok()? })
        };
        parsed().ok_or_else(|| ParseIdError::new("the head of a chain", "as SEGMENT..SEGMENT:HASH", s))
    }
}
serde_as_text!(ChainHead);

/// Where a chain stands before a segment, and where it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainStart {
    /// The segment the chain begins with; the segment itself where it is the first.
    pub origin: SegmentName,
    /// The hash before the segment.
    pub before: ChainHash,
}

impl ChainStart {
    /// A chain that begins with `origin`.
    pub fn new(system: SystemId, origin: SegmentName) -> Self {
        Self { origin, before: ChainHash::seed(system, origin) }
    }

    /// The head behind `links`, which follow one another; none where there are none.
    pub fn head<'a>(&self, links: impl IntoIterator<Item = &'a ChainLink>) -> Option<ChainHead> {
        let fold = |(_, hash): (Option<SegmentName>, ChainHash), link: &ChainLink| {
            (Some(link.name), hash.link(link))
        };
        let (last, hash) = links.into_iter().fold((None, self.before), fold);
        last.map(|last| ChainHead { origin: self.origin, last, hash })
    }
}

impl Run<'_> {
    /// The segments of the run that a chain takes in: whole ones. A log that ends inside its last segment may still
    /// be followed by a longer copy, so that one waits.
    pub fn links(&self) -> Vec<ChainLink> {
        let whole = self.steps.iter().take_while(|s| !s.entry.is_partial());
        let mut links: Vec<(bool, ChainLink)> = whole
            .map_while(|s| {
                let open = matches!(s.entry.info.ending, Ending::EndOfLog | Ending::Fault);
                // What an ancestor wrote past a fork is not on this line.
                let cut = s.usable_end < s.entry.info.valid_end;
                Some((open || cut, ChainLink::of(s.entry)?))
            })
            .collect();
        if links.last().is_some_and(|(open, _)| *open) {
            links.pop();
        }
        links.into_iter().map(|(_, link)| link).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::catalog::samples::*;
    use super::super::{Catalog, Lineage};
    use super::*;

    fn head(c: &Catalog, timeline: u32) -> ChainHead {
        let links = c.runs(&c.lineage(t(timeline)))[0].links();
        ChainStart::new(c.system.system_id, links[0].name).head(&links).unwrap()
    }

    #[test]
    fn whatever_changes_in_a_chain_changes_its_head() {
        let whole = digested(3..9);
        let noted = head(&whole, 1);
        assert_eq!(noted, head(&whole, 1));
        let mut replaced = whole.clone();
        replaced.segments[2].digest = format!("{:064x}", 99);
        let mut shorter = whole.clone();
        shorter.segments[3].info.valid_end = Lsn::from(7 * SIZE - 8);
        let mut swapped = whole.clone();
        (swapped.segments[1].digest, swapped.segments[2].digest) =
            (whole.segments[2].digest.clone(), whole.segments[1].digest.clone());
        for other in [replaced, shorter, swapped, digested(3..8), digested(4..9)] {
            assert_ne!(head(&other, 1).hash, noted.hash);
        }
        let text = noted.to_string();
        assert_eq!(text.parse::<ChainHead>(), Ok(noted));
        for cut in 0..text.len() {
            assert!(text[..cut].parse::<ChainHead>().is_err(), "{cut}");
        }
    }

    #[test]
    fn a_timeline_continues_the_chain_of_the_one_it_left() {
        let mut c = digested(3..9);
        let mut child = segment(2, 6);
        child.digest = format!("{:064x}", 77);
        c.segments.push(child);
        let fork = Lsn::from(6 * SIZE + 1000);
        c.lineages.insert(t(2), Lineage { ancestors: vec![(t(1), fork)], timeline: t(2) });
        let (parent, child) = (head(&c, 1), head(&c, 2));
        assert_eq!((parent.origin, child.origin), (c.segments[0].info.name, c.segments[0].info.name));
        assert_eq!(child.last.to_string(), "000000020000000000000006");
        let shared: Vec<_> = c.segments[..3].iter().filter_map(ChainLink::of).collect();
        let start = ChainStart::new(c.system.system_id, shared[0].name);
        let at_fork = start.head(&shared).unwrap().hash;
        let link = ChainLink::of(c.segments.last().unwrap()).unwrap();
        assert_eq!(at_fork.link(&link), child.hash);
    }

    #[test]
    fn a_segment_in_which_the_log_ends_is_taken_in_once_another_follows() {
        let mut c = digested(3..6);
        c.segments[2].info.ending = Ending::EndOfLog;
        assert_eq!(head(&c, 1).last.to_string(), "000000010000000000000004");
        let mut next = segment(1, 6);
        next.digest = format!("{:064x}", 7);
        next.info.overwrites_contrecord = true;
        c.segments.push(next);
        assert_eq!(head(&c, 1).last.to_string(), "000000010000000000000006");
    }
}
