//! Which merged indexes there are, and what their ends say.

use std::collections::BTreeMap;

use waltide_format::archive::{
    ChainHead, MergedDirectory, MergedName, MergedSection, MergedSegment, RestorePoint, SegmentEntry,
    SystemLayout, WalObject,
};
use waltide_format::{Corrupt, SegmentName, WalFileName};
use waltide_storage::{Archive, ObjectInfo, StorageError};

/// What is read of an object's end at first, and as much more for each segment that it covers.
const TAIL_BYTES: u64 = 16 << 10;
const TAIL_BYTES_PER_SEGMENT: u64 = 192;

/// A merged index that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ListedIndex {
    pub(crate) name: MergedName,
    pub(crate) object: ObjectInfo,
}

/// Every merged index of a system, by name.
pub(crate) async fn list(archive: &Archive, names: &SystemLayout) -> Result<Vec<ListedIndex>, StorageError> {
    let objects = archive.list(&names.merged()).await?;
    let named = objects.into_iter().filter_map(|object| {
        let name = names.parse_merged(&object.path)?;
        Some(ListedIndex { name, object })
    });
    Ok(named.collect())
}

/// Of the objects over the same segments the one that readers take: a newer builder's, made again, stored last.
pub(crate) fn newest(listed: &[ListedIndex]) -> Vec<&ListedIndex> {
    let mut best: Vec<&ListedIndex> = listed.iter().collect();
    let range = |l: &ListedIndex| (l.name.step, l.name.first, l.name.last);
    let rank = |l: &ListedIndex| (l.name.builder, l.name.generation, l.object.modified_unix_ms, l.name.key);
    best.sort_by(|a, b| range(a).cmp(&range(b)).then(rank(b).cmp(&rank(a))));
    best.dedup_by(|later, kept| range(later) == range(kept));
    best
}

/// What a catalogue needs of a merged index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Summaries {
    pub(crate) segments: Vec<MergedSegment>,
    pub(crate) restore_points: Vec<RestorePoint>,
    /// The chain before the first segment and behind the last, where there is a segment before.
    pub(crate) anchors: Vec<ChainHead>,
}

impl Summaries {
    /// Reads the object's end. The outer error is the archive's, the inner one the object's.
    pub(crate) async fn read(
        archive: &Archive,
        listed: &ListedIndex,
    ) -> Result<Result<Self, Corrupt>, StorageError> {
        let bytes = TAIL_BYTES.saturating_add(listed.name.step.saturating_mul(TAIL_BYTES_PER_SEGMENT));
        archive
            .read_end(&listed.object.path, bytes, |tail, size| Self::decode(&listed.name, tail, size))
            .await
    }

    /// The segments as a catalogue has them.
    fn entries(self, names: &SystemLayout) -> impl Iterator<Item = SegmentEntry> {
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

    fn decode(name: &MergedName, tail: &[u8], size: u64) -> Result<Result<Self, u64>, Corrupt> {
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
        // Behind every segment there is an anchor: prune may remove what comes before it.
        let mut hash = directory.chain.before;
        let anchors = segments.iter().map(|s| {
            hash = hash.link(&s.link());
            ChainHead { origin: directory.chain.origin, last: s.info.name, hash }
        });
        let anchors: Vec<_> = anchors.collect();
        Ok(Ok(Self { anchors, segments, restore_points: points.restore_points }))
    }
}

/// Segments of which the catalogue would need to read this many are looked for in merged indexes.
const WORTH_IT: usize = 4;

/// What merged indexes tell of segments, by path: of those that have the length they had then, and that lay there before.
/// What is damaged tells nothing.
pub(crate) async fn tell(
    archive: &Archive,
    names: &SystemLayout,
    wanted: Vec<&ObjectInfo>,
) -> Result<BTreeMap<String, SegmentEntry>, StorageError> {
    let mut told = BTreeMap::new();
    if wanted.len() < WORTH_IT {
        return Ok(told);
    }
    let mut wanted: BTreeMap<SegmentName, Vec<&ObjectInfo>> =
        wanted.into_iter().fold(BTreeMap::new(), |mut by_name, object| {
            if let Some(
                WalObject::File(WalFileName::Segment(name))
                | WalObject::Longer { of: WalFileName::Segment(name), .. },
            ) = names.parse_wal(&object.path)
            {
                by_name.entry(name).or_insert_with(Vec::new).push(object);
            }
            by_name
        });
    let listed = list(archive, names).await?;
    // Those that cover most come first; a lower step only adds what they leave.
    let mut objects = newest(&listed);
    objects.sort_by_key(|l| std::cmp::Reverse(l.name.step));
    for listed in objects {
        if wanted.range(listed.name.first..=listed.name.last).count() < WORTH_IT {
            continue;
        }
        let found = match Summaries::read(archive, listed).await {
            Ok(Ok(found)) => found,
            Ok(Err(e)) => {
                tracing::warn!("{} is damaged, reading the segments instead: {e}", listed.object.path);
                continue;
            }
            Err(e) if e.is_not_found() || e.is_bad_object() => continue,
            Err(e) => return Err(e),
        };
        for entry in found.entries(names) {
            let name = entry.info.name;
            let fits = |o: &ObjectInfo| {
                o.path == entry.path
                    && o.size == entry.stored_bytes
                    && o.modified_unix_ms < listed.object.modified_unix_ms
            };
            let Some(objects) = wanted.get_mut(&name) else { continue };
            if let Some(at) = objects.iter().position(|o| fits(o)) {
                objects.remove(at);
                told.insert(entry.path.clone(), entry);
            }
            if wanted.get(&name).is_some_and(Vec::is_empty) {
                wanted.remove(&name);
            }
        }
    }
    Ok(told)
}
