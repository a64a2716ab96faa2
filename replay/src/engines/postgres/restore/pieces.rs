//! Which bytes of which pack belong where: a manifest's layers of extents, laid flat.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use waltide_format::Corrupt;
use waltide_format::archive::{Extent, ExtentMap, ManifestFile};

/// Frames that lie no further apart in a pack are read together.
const GAP_BYTES_MAX: u64 = 64 << 10;
/// So much of a pack is read at once.
const READ_BYTES_MAX: u64 = 8 << 20;

/// A part of an extent that shows in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// The file, by its place in the manifest.
    pub(super) file: usize,
    /// The map that names the extent's pack.
    pub(super) map: usize,
    /// The extent.
    pub(super) extent: Extent,
    /// The part's first byte in the extent.
    pub(super) from: u32,
    /// The byte after its last.
    pub(super) to: u32,
}

impl Piece {
    /// Where in the file the part lies.
    pub(super) fn file_offset(&self) -> u64 {
        self.extent.file_offset().saturating_add(u64::from(self.from))
    }

    /// How long it is.
    pub(super) fn bytes(&self) -> u64 {
        u64::from(self.to.saturating_sub(self.from))
    }

    /// Whether it is the whole extent, whose checksum is known.
    pub(super) fn is_whole(&self) -> bool {
        self.from == 0 && self.to == self.extent.raw_bytes
    }

    /// Whether no frame was stored because it is all zeros.
    pub(super) fn is_zeros(&self) -> bool {
        self.extent.stored_bytes == 0
    }
}

/// The parts that show in a file, later layers over earlier ones. What none covers is zeros.
pub(super) fn flatten(
    file_number: usize,
    file: &ManifestFile,
    maps: &[ExtentMap],
) -> Result<Vec<Piece>, Corrupt> {
    let mut covered = Covered::default();
    let mut pieces = Vec::new();
    for (map_number, number) in file.extents.iter().rev() {
        let wrong = Corrupt::invalid("files.extents", file_number as u64, u64::from(*number));
        let map = usize::try_from(*map_number).unwrap_or(usize::MAX);
        let number = usize::try_from(*number).unwrap_or(usize::MAX);
        let extents = maps.get(map).and_then(|m| m.files.get(number)).ok_or(wrong)?;
        for extent in extents {
            let start = extent.file_offset();
            let end = start.saturating_add(u64::from(extent.raw_bytes)).min(file.bytes);
            for shown in covered.missing(start..end) {
                let within = |at: u64| u32::try_from(at.saturating_sub(start)).unwrap_or(u32::MAX);
                let (from, to) = (within(shown.start), within(shown.end));
                pieces.push(Piece { file: file_number, map, extent: *extent, from, to });
            }
        }
        for extent in extents {
            let start = extent.file_offset();
            covered.add(start..start.saturating_add(u64::from(extent.raw_bytes)));
        }
    }
    pieces.sort_by_key(Piece::file_offset);
    Ok(pieces)
}

/// The stretches of `0..bytes` in which no piece with bytes of its own lies.
pub(super) fn zeros(pieces: &[Piece], bytes: u64) -> Vec<Range<u64>> {
    let mut covered = Covered::default();
    for piece in pieces.iter().filter(|p| !p.is_zeros()) {
        let at = piece.file_offset();
        covered.add(at..at.saturating_add(piece.bytes()));
    }
    covered.missing(0..bytes)
}

/// Stretches of a file that touch neither each other.
#[derive(Debug, Default)]
struct Covered(BTreeMap<u64, u64>);

impl Covered {
    fn missing(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut missing = Vec::new();
        let mut at = range.start;
        let before = self.0.range(..=range.start).next_back();
        let within =
            self.0.range(range.start.saturating_add(1)..range.end.max(range.start.saturating_add(1)));
        for (start, end) in before.into_iter().chain(within) {
            if *start > at {
                missing.push(at..*start);
            }
            at = at.max(*end);
        }
        if at < range.end {
            missing.push(at..range.end);
        }
        missing
    }

    fn add(&mut self, range: Range<u64>) {
        let (mut start, mut end) = (range.start, range.end);
        while let Some((from, to)) = self.0.range(..=end).next_back().map(|(f, t)| (*f, *t)) {
            if to < start {
                break;
            }
            self.0.remove(&from);
            start = start.min(from);
            end = end.max(to);
        }
        self.0.insert(start, end);
    }
}

/// A stretch of a pack, and what of it goes where.
#[derive(Debug, Clone)]
pub(super) struct Job {
    /// The pack's name.
    pub(super) pack: Arc<str>,
    /// The stretch.
    pub(super) range: Range<u64>,
    /// In the pack's order.
    pub(super) pieces: Vec<Piece>,
}

/// Groups pieces by where they lie in the archive: each stretch of a pack is read once. Zeros are left out.
pub(super) fn jobs(pieces: Vec<Piece>, maps: &[ExtentMap]) -> Result<Vec<Job>, Corrupt> {
    let mut packs: BTreeMap<&str, Vec<Piece>> = BTreeMap::new();
    for piece in pieces.into_iter().filter(|p| !p.is_zeros()) {
        let wrong = Corrupt::invalid("pack", piece.extent.offset, u64::from(piece.extent.pack));
        let pack = usize::try_from(piece.extent.pack).unwrap_or(usize::MAX);
        let name = maps.get(piece.map).and_then(|m| m.packs.get(pack)).ok_or(wrong)?;
        packs.entry(name).or_default().push(piece);
    }
    let mut jobs = Vec::new();
    for (name, mut pieces) in packs {
        pieces.sort_by_key(|p| (p.extent.offset, p.file, p.from));
        let pack: Arc<str> = name.into();
        let mut current: Option<Job> = None;
        for piece in pieces {
            let start = piece.extent.offset;
            let end = start.saturating_add(u64::from(piece.extent.stored_bytes));
            if let Some(job) = &mut current
                && start <= job.range.end.saturating_add(GAP_BYTES_MAX)
                && end.saturating_sub(job.range.start) <= READ_BYTES_MAX
            {
                job.range.end = job.range.end.max(end);
                job.pieces.push(piece);
                continue;
            }
            jobs.extend(current.take());
            current = Some(Job { pack: Arc::clone(&pack), range: start..end, pieces: vec![piece] });
        }
        jobs.extend(current);
    }
    Ok(jobs)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use waltide_format::BLOCK_BYTES;

    use super::*;

    /// A layer: runs of (blocks skipped, blocks, zeros).
    fn layer() -> impl Strategy<Value = Vec<(u32, u32, bool)>> {
        proptest::collection::vec((0u32..6, 1u32..7, prop::bool::weighted(0.2)), 0..8)
    }

    fn map(layer: &[(u32, u32, bool)], n: u32) -> ExtentMap {
        let mut next = 0;
        let mut offset = 16;
        let extents = layer.iter().map(|(skip, blocks, zeros)| {
            let first_block = next + skip;
            next = first_block + blocks;
            let stored_bytes = if *zeros { 0 } else { 100 };
            let extent = Extent {
                pack: 0,
                offset,
                stored_bytes,
                first_block,
                raw_bytes: blocks * BLOCK_BYTES as u32,
                crc: n,
            };
            offset += u64::from(stored_bytes);
            extent
        });
        ExtentMap { packs: vec![format!("pack{n}")], files: vec![extents.collect()] }
    }

    proptest! {
        #[test]
        fn each_block_comes_from_the_last_layer_that_has_it(layers in proptest::collection::vec(layer(), 1..4), blocks in 1u64..40, odd in 0u64..8192) {
            let maps: Vec<_> = (0..).zip(&layers).map(|(n, l)| map(l, n)).collect();
            let file = ManifestFile {
                path: "f".into(), bytes: blocks * 8192 + odd, mode: 0o600, modified: 0,
                extents: (0..maps.len() as u32).map(|m| (m, 0)).collect(),
            };
            let pieces = flatten(7, &file, &maps).unwrap();
            for block in 0..=blocks {
                let at = block * 8192;
                if at >= file.bytes { continue; }
                let want = maps.iter().rev().find_map(|m| {
                    m.files[0].iter().find(|e| e.file_offset() <= at && at < e.file_offset() + u64::from(e.raw_bytes))
                });
                let found: Vec<_> = pieces.iter().filter(|p| p.file_offset() <= at && at < p.file_offset() + p.bytes()).collect();
                prop_assert!(found.len() <= 1);
                prop_assert_eq!(found.first().map(|p| &p.extent), want);
            }
            prop_assert!(pieces.iter().all(|p| p.file == 7 && p.to > p.from && p.file_offset() + p.bytes() <= file.bytes));

            let holes: u64 = zeros(&pieces, file.bytes).iter().map(|r| r.end - r.start).sum();
            let full: u64 = pieces.iter().filter(|p| !p.is_zeros()).map(Piece::bytes).sum();
            prop_assert_eq!(holes + full, file.bytes);

            let stored = pieces.iter().filter(|p| !p.is_zeros()).count();
            let jobs = jobs(pieces, &maps).unwrap();
            prop_assert_eq!(jobs.iter().map(|j| j.pieces.len()).sum::<usize>(), stored);
            for job in &jobs {
                let holds = |p: &Piece| {
                    let end = p.extent.offset + u64::from(p.extent.stored_bytes);
                    job.range.start <= p.extent.offset && end <= job.range.end
                };
                prop_assert!(job.pieces.iter().all(holds), "a piece outside its job");
            }
        }
    }

    #[test]
    fn a_manifest_that_names_no_extents_is_refused() {
        let file = ManifestFile { path: "f".into(), bytes: 1, mode: 0, modified: 0, extents: vec![(0, 3)] };
        let err = flatten(2, &file, &[map(&[], 0)]).unwrap_err();
        assert_eq!(err.to_string(), "files.extents at byte 2 is 0x3");
    }
}
