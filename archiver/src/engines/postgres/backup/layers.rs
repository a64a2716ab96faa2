//! An incremental's files: what was read laid over what the parent has.

use std::collections::{BTreeMap, BTreeSet};

use waltide_format::archive::{ExtentMap, Manifest, ManifestFile, merge_maps};

use super::super::copy::Copied;
use super::super::files::Scan;
use super::super::publish::{Destination, PublishError, assemble};

/// No manifest names more maps than this. Where there would be more, all but the oldest, which is the largest as a rule,
/// become one with the new; the oldest too, once the others together are larger.
const MAPS_MAX: usize = 16;

/// An incremental's part of its manifest.
pub(super) struct Layered {
    pub(super) map: ExtentMap,
    pub(super) files: Vec<ManifestFile>,
    /// The maps of the manifest but for its own, which is the last.
    pub(super) maps: Vec<String>,
    pub(super) referred_bytes: u64,
}

/// Lays what was copied over the parent's files; `kept` has those of them whose blocks are still of use, by path.
pub(super) fn lay(
    scan: &Scan,
    copied: Copied,
    parent: &Manifest,
    kept: &BTreeMap<&str, &ManifestFile>,
) -> Layered {
    let (map, mut files) = assemble(scan, copied);
    let used: BTreeSet<u32> =
        kept.values().flat_map(|file| file.extents.iter().map(|(map, _)| *map)).collect();
    let maps: Vec<u32> = used.into_iter().collect();
    let place = |map: u32| u32::try_from(maps.partition_point(|used| *used < map)).unwrap_or(u32::MAX);
    let own = u32::try_from(maps.len()).unwrap_or(u32::MAX);
    let mut referred_bytes = 0u64;
    for file in &mut files {
        let read = std::mem::take(&mut file.extents);
        if let Some(below) = kept.get(file.path.as_str()) {
            file.extents.extend(below.extents.iter().map(|(map, number)| (place(*map), *number)));
            let new = read.iter().filter_map(|(_, number)| map.files.get(usize::try_from(*number).ok()?));
            let new = new.flatten().fold(0u64, |sum, e| sum.saturating_add(u64::from(e.raw_bytes)));
            referred_bytes = referred_bytes.saturating_add(file.bytes.saturating_sub(new));
        }
        file.extents.extend(read.into_iter().map(|(_, number)| (own, number)));
    }
    let name = |map: &u32| parent.maps.get(usize::try_from(*map).ok()?).cloned();
    Layered { map, files, maps: maps.iter().filter_map(name).collect(), referred_bytes }
}

impl Layered {
    /// Makes one map of several where there are too many.
    pub(super) async fn compact(&mut self, to: &Destination) -> Result<(), PublishError> {
        if self.maps.len() < MAPS_MAX {
            return Ok(());
        }
        let mut sizes = Vec::with_capacity(self.maps.len());
        for name in &self.maps {
            let path = to.system.map(name);
            sizes.push(to.archive.head(&path).await?.map_or(0, |object| object.size));
        }
        let (oldest, others) = sizes.split_first().map_or((0, 0), |(oldest, others)| {
            (
                *oldest,
                others.iter().fold(self.map.encode().len() as u64, |sum, size| sum.saturating_add(*size)),
            )
        });
        let first = usize::from(others <= oldest);
        let mut merging = Vec::new();
        for name in self.maps.split_off(first) {
            merging.push(to.get_map(&name).await?);
        }
        merging.push(std::mem::take(&mut self.map));
        let place = u32::try_from(first).unwrap_or(u32::MAX);
        let mut files = std::mem::take(&mut self.files);
        let path = to.system.maps();
        let merge = move || merge_maps(&merging, place, &mut files).map(|map| (map, files));
        let merged = tokio::task::spawn_blocking(merge).await.expect("merging maps does not panic");
        let (map, files) = merged.map_err(|source| PublishError::Damaged { path, source })?;
        (self.map, self.files) = (map, files);
        Ok(())
    }
}
