//! What a catalogue and the hash chain need of a merged index: one read of its end.

use super::merge::MergedSegment;
use super::object::{MergedDirectory, MergedSection};
use crate::archive::catalog::SegmentEntry;
use crate::archive::chain::{ChainHead, ChainStart};
use crate::archive::index::RestorePoint;
use crate::archive::layout::{MergedName, SystemLayout};
use crate::error::Corrupt;

/// What is read of an object's end at first, and as much more for each segment that it covers.
const TAIL_BYTES: u64 = 16 << 10;
const TAIL_BYTES_PER_SEGMENT: u64 = 192;

/// What a catalogue needs of a merged index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MergedSummary {
    /// The segments.
    pub segments: Vec<MergedSegment>,
    /// Their restore points.
    pub restore_points: Vec<RestorePoint>,
    /// The hash chain before the first of them.
    pub chain: ChainStart,
}

impl MergedSummary {
    /// How much of the object's end most likely holds it.
    pub const fn tail_bytes(name: &MergedName) -> u64 {
        TAIL_BYTES.saturating_add(name.step.saturating_mul(TAIL_BYTES_PER_SEGMENT))
    }

    /// The chain's head behind each segment.
    pub fn heads(&self) -> impl Iterator<Item = ChainHead> + '_ {
        let ChainStart { origin, before } = self.chain;
        self.segments.iter().scan(before, move |hash, segment| {
            *hash = hash.link(&segment.link());
            Some(ChainHead { origin, last: segment.info.name, hash: *hash })
        })
    }

    /// The segments as a catalogue has them.
    pub fn entries(self, names: &SystemLayout) -> impl Iterator<Item = SegmentEntry> {
        let points = self.restore_points;
        self.segments.into_iter().map(move |segment| {
            let info = segment.info.clone();
            let (start, end) = (info.name.start(info.size), info.name.end(info.size));
            // A record that runs over the edge may be in both indexes.
            let here =
                |p: &&RestorePoint| end.is_some_and(|end| p.start < end) && start.is_some_and(|s| p.end > s);
            SegmentEntry {
                path: names.wal_object(segment.object()),
                stored_bytes: segment.stored_bytes,
                restore_points: points.iter().filter(here).map(|p| p.name.clone()).collect(),
                faults: Vec::new(),
                pushed_by: segment.pushed_by,
                digest: segment.digest.iter().map(|b| format!("{b:02x}")).collect(),
                info,
            }
        })
    }

    /// Reads it out of `tail`, the last bytes of an object of `size` bytes. `Ok(Err(n))` says that `n` bytes of tail are
    /// needed.
    pub fn decode(name: &MergedName, tail: &[u8], size: u64) -> Result<Result<Self, u64>, Corrupt> {
        let directory = match MergedDirectory::decode(tail, size)? {
            Ok(directory) => directory,
            Err(needed) => return Ok(Err(needed)),
        };
        if directory.first.name != name.first || u64::from(directory.segments) != name.step {
            let found = u64::from(directory.segments);
            return Err(Corrupt::mismatch("segments", 0, found, name.step));
        }
        let part = |section| directory.in_tail(section, tail, size);
        let (segments, points) = match (part(MergedSection::Segments), part(MergedSection::RestorePoints)) {
            (Ok(segments), Ok(points)) => (segments, points),
            (a, b) => return Ok(Err(a.err().max(b.err()).unwrap_or(size))),
        };
        let segments = directory.read_segments(segments)?;
        let points = directory.read_lists(&[(MergedSection::RestorePoints, points)])?;
        let chain = directory.chain;
        Ok(Ok(Self { chain, segments, restore_points: points.restore_points }))
    }
}
