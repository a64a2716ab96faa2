//! Which merged indexes there are, and what their ends say.

use std::collections::BTreeMap;

use waltide_format::archive::{
    ChainLink, MergedIndex, MergedName, MergedObject, MergedSummary, SegmentEntry, SystemLayout, WalObject,
};
use waltide_format::{Corrupt, SegmentName, WalFileName};
use waltide_storage::{Archive, ObjectInfo, StorageError};

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

/// What an object's end says. The outer error is the archive's, the inner one the object's.
pub(crate) async fn summary(
    archive: &Archive,
    listed: &ListedIndex,
) -> Result<Result<MergedSummary, Corrupt>, StorageError> {
    let name = &listed.name;
    let bytes = MergedSummary::tail_bytes(name);
    archive.read_end(&listed.object.path, bytes, |tail, size| MergedSummary::decode(name, tail, size)).await
}

/// No merged index comes near this.
const OBJECT_BYTES_MAX: u64 = 1 << 30;

/// A whole merged index of the segments that `links` speak of; none where the object is gone, damaged, or about others.
pub(crate) async fn get(
    archive: &Archive,
    path: &str,
    links: &[ChainLink],
) -> Result<Option<MergedIndex>, StorageError> {
    let bytes = match archive.get(path, OBJECT_BYTES_MAX).await {
        Ok(bytes) => bytes,
        Err(e) if e.is_not_found() || e.is_bad_object() => return Ok(None),
        Err(e) => return Err(e),
    };
    let decoded = tokio::task::spawn_blocking(move || MergedObject::decode(&bytes)).await;
    match decoded.expect("a decoder does not panic") {
        Ok(object) if object.index.links().eq(links.iter().copied()) => Ok(Some(object.index)),
        Ok(_) => {
            tracing::warn!("{path} is not about the segments that its name speaks of");
            Ok(None)
        }
        Err(e) => {
            tracing::warn!("{path} is damaged: {e}");
            Ok(None)
        }
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
        let found = match summary(archive, listed).await {
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
