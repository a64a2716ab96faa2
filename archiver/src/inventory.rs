//! Everything of a cluster that a prune may remove, and which extent map refers to which packs.

use std::collections::BTreeMap;

use waltide_format::archive::{Catalog, ExtentMap, Layout, MergedName, PruneMark, WalObject};
use waltide_format::{BackupId, SystemId, TimestampTz};
use waltide_storage::{Archive, CatalogueCache, ObjectInfo, StorageError};

use crate::catalog::{
    BackupObject, CatalogError, MANIFEST_BYTES_MAX, Read, Reading, backup_object, fetch, find_system,
    load_system, read_json,
};
use crate::status::INTERRUPTED_AFTER;

/// An object, as a listing has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Its name.
    pub path: String,
    /// Its length.
    pub bytes: u64,
    /// When it was stored.
    pub modified: TimestampTz,
}

/// What lies in the archive beside what the catalogue says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Inventory {
    /// Objects below `wal/`.
    pub wal: Vec<(WalObject, Stored)>,
    /// Manifests, announcements and pins, whether they can be read or not.
    pub backups: Vec<(BackupId, BackupObject, Stored)>,
    /// Extent maps by name, with the packs each names or why that is not known.
    pub maps: BTreeMap<String, (Stored, Result<Vec<String>, String>)>,
    /// Packs by name.
    pub packs: BTreeMap<String, Stored>,
    /// Merged indexes.
    pub merged: Vec<(MergedName, Stored)>,
    /// What prunes announced, or why that is not known.
    pub marks: Vec<(Stored, Result<PruneMark, String>)>,
}

impl From<&ObjectInfo> for Stored {
    fn from(object: &ObjectInfo) -> Self {
        let modified = TimestampTz::from_unix_micros(object.modified_unix_ms.saturating_mul(1000));
        Self { path: object.path.clone(), bytes: object.size, modified }
    }
}

/// Reads inventory and catalogue. Packs and maps are listed first: one that is there belongs to a backup that was
/// announced before, so that the announcement or the manifest is in what is listed later.
pub async fn survey(
    archive: &Archive,
    layout: &Layout,
    system: Option<SystemId>,
    cache: Option<&CatalogueCache>,
    threads: usize,
) -> Result<(Catalog, Inventory), CatalogError> {
    let system = find_system(archive, layout, system).await?;
    let names = layout.system(system.system_id);
    let packs = archive.list(&names.packs()).await?;
    let maps = archive.list(&names.maps()).await?;
    let (backups, wal) = (archive.list(&names.backups()).await?, archive.list(&names.wal()).await?);
    let marks = archive.list(&names.pruning()).await?;
    let merged = archive.list(&names.merged()).await?;
    let reader = Reading::new(archive, cache, threads);
    let maps = reader.all(maps.iter().collect(), |object| read_packs(archive, object)).await?;
    let marks =
        Reading::new(archive, None, threads).all(marks.iter().collect(), |o| read_json(archive, o)).await?;
    let name = |path: &str| path.rsplit('/').next().unwrap_or_default().to_owned();
    let inventory = Inventory {
        wal: wal.iter().filter_map(|o| Some((names.parse_wal(&o.path)?, o.into()))).collect(),
        backups: backups
            .iter()
            .filter_map(|o| backup_object(&names, &o.path).map(|(id, part)| (id, part, o.into())))
            .collect(),
        maps: maps.into_iter().map(|(o, packs)| (name(&o.path), (o.into(), packs))).collect(),
        merged: merged.iter().filter_map(|o| Some((names.parse_merged(&o.path)?, o.into()))).collect(),
        packs: packs.iter().map(|o| (name(&o.path), o.into())).collect(),
        marks: marks.into_iter().map(|(o, mark)| (o.into(), mark)).collect(),
    };
    Ok((load_system(archive, layout, system, cache.into(), threads).await?, inventory))
}

/// The packs an extent map names.
async fn read_packs(archive: &Archive, object: &ObjectInfo) -> Read<Vec<String>> {
    let bytes = match fetch(archive, &object.path, MANIFEST_BYTES_MAX).await? {
        Some(Ok(bytes)) => bytes,
        Some(Err(error)) => return Ok(Some(Err(error))),
        None => return Ok(None),
    };
    let decode = move || ExtentMap::decode(&bytes).map(|map| map.packs).map_err(|e| e.to_string());
    let decoded = tokio::task::spawn_blocking(decode).await;
    Ok(Some(decoded.expect("a decoder does not panic")))
}

/// The backups that prunes are about to remove. Whoever is going to refer to a backup (a pin, an incremental's
/// announcement) writes that first, asks this afterwards, and gives up if the backup is among them.
pub async fn being_pruned(
    archive: &Archive,
    layout: &Layout,
    system: SystemId,
    now: TimestampTz,
) -> Result<Vec<BackupId>, StorageError> {
    let marks = archive.list(&layout.system(system).pruning()).await?;
    let read = Reading::new(archive, None, 1);
    let marks = read.all(marks.iter().collect(), |o| read_json::<PruneMark>(archive, o)).await?;
    let live = marks.into_iter().filter_map(|(_, mark)| mark.ok()).filter(|m| is_live(m, now));
    Ok(live.flat_map(|m| m.backups).collect())
}

/// Whether the prune that wrote a mark may still be at it.
pub(crate) fn is_live(mark: &PruneMark, now: TimestampTz) -> bool {
    crate::host::is_running(&mark.host, mark.pid)
        .unwrap_or_else(|| now.seconds_since(mark.started) < INTERRUPTED_AFTER.as_secs_f64())
}
