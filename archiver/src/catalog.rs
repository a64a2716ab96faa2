//! Reads what an archive holds for one cluster, out of the archive alone, into format's [`Catalog`].
//!
//! The cache saves reading again what has not changed. It decides nothing: without it the answer is the same.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use futures_util::stream::{self, StreamExt, TryStreamExt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use waltide_format::archive::{
    BackupEntry, Beginning, Catalog, DamagedObject, Envelope, GapKind, Keep, Layout, Lineage, Manifest,
    ObjectKind, SegmentDirectory, SegmentEntry, StartedBackup, SystemInfo, SystemLayout, WalFile, WalObject,
};
use waltide_format::engines::postgres::cluster::History;
use waltide_format::{BackupId, Corrupt, SegmentName, SystemId, TimelineId, WalFileName};
use waltide_storage::{Archive, Bytes, CatalogueCache, ObjectInfo, StorageError};

use crate::merged;

/// A segment's catalogue entry lies in this much of its end, but for a segment with very many restore points.
const TAIL_BYTES: u64 = 16 << 10;
/// No JSON object but a manifest, and no history file, comes near this.
pub(crate) const SMALL_BYTES_MAX: u64 = 1 << 20;
/// No manifest or extent map comes near this: a manifest of ten million files has a few hundred megabytes.
pub const MANIFEST_BYTES_MAX: u64 = 1 << 30;
/// Part of every cache entry's version: raise it when a cached value's form or meaning changes.
const CACHE_FORM: u32 = 2;

/// Why there is no catalogue.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CatalogError {
    /// The archive has no such cluster.
    #[error("the archive {archive} has no cluster {cluster}; {there}")]
    NoCluster {
        /// The archive's address.
        archive: String,
        /// The name asked for.
        cluster: String,
        /// Which there are.
        there: String,
    },
    /// The cluster has no such system identifier.
    #[error("cluster {cluster} has no system {system}; it has {there}")]
    NoSystem {
        /// The cluster.
        cluster: String,
        /// The system asked for.
        system: SystemId,
        /// Which there are.
        there: String,
    },
    /// An object without which nothing else can be understood is damaged.
    #[error("{path} is damaged")]
    Damaged {
        /// The object.
        path: String,
        /// What is wrong.
        source: Corrupt,
    },
    /// The archive failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

impl CatalogError {
    /// Whether the archive is at fault, rather than the way to it or the question.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged { .. })
    }
}

/// What may be believed without looking at the segment that it speaks of.
#[derive(Debug, Clone, Copy)]
pub enum Known<'a> {
    /// Nothing: what is true now is asked for.
    Nothing,
    /// Merged indexes that are younger than the segment.
    Merged,
    /// These, and what the cache kept of an object of this version.
    Cached(&'a CatalogueCache),
}

impl<'a> From<Option<&'a CatalogueCache>> for Known<'a> {
    fn from(cache: Option<&'a CatalogueCache>) -> Self {
        cache.map_or(Self::Merged, Self::Cached)
    }
}

/// Reads the catalogue of `system`, or of the cluster's newest system. Every object below `wal/` and `backups/` is
/// listed, and what the cache does not know is read, `threads` objects at a time. An object that cannot be read
/// is in [`Catalog::damaged`]; one that vanishes meanwhile was pruned, and is left out.
pub async fn load<'a>(
    archive: &Archive,
    layout: &Layout,
    system: Option<SystemId>,
    known: impl Into<Known<'a>>,
    threads: usize,
) -> Result<Catalog, CatalogError> {
    let system = find_system(archive, layout, system).await?;
    load_system(archive, layout, system, known.into(), threads).await
}

/// How long after a segment was stored the one before it may still be on its way: several are shipped at once.
const IN_FLIGHT: Duration = Duration::from_secs(15);
/// How often, a second apart, a segment that may be on its way is waited for.
const LOOKS: u32 = 5;

/// [`load`], but a segment that is missing before one that came just now is waited for a little: it may be in flight,
/// and that is no hole.
pub async fn load_settled<'a>(
    archive: &Archive,
    layout: &Layout,
    system: Option<SystemId>,
    known: impl Into<Known<'a>>,
    threads: usize,
) -> Result<Catalog, CatalogError> {
    let known = known.into();
    for _ in 0..LOOKS {
        let catalog = load(archive, layout, system, known, threads).await?;
        if !may_be_in_flight(archive, &catalog).await? {
            return Ok(catalog);
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    load(archive, layout, system, known, threads).await
}

/// Whether any segment that is missing by name comes before one that was stored just now.
async fn may_be_in_flight(archive: &Archive, catalog: &Catalog) -> Result<bool, StorageError> {
    let missing = catalog.gaps().into_iter().filter(|g| matches!(g.kind, GapKind::Missing { .. }));
    for gap in missing {
        let next = SegmentName::containing(gap.timeline, gap.to, catalog.system.segment_size);
        let Some(entry) = catalog.best_copy(next) else { continue };
        let Some(object) = archive.head(&entry.path).await? else { continue };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let stored = Duration::from_millis(u64::try_from(object.modified_unix_ms).unwrap_or(0));
        if now.abs_diff(stored) < IN_FLIGHT {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The catalogue of a system whose system.json was read.
pub(crate) async fn load_system(
    archive: &Archive,
    layout: &Layout,
    system: SystemInfo,
    known: Known<'_>,
    threads: usize,
) -> Result<Catalog, CatalogError> {
    let cache = match known {
        Known::Cached(cache) => Some(cache),
        Known::Nothing | Known::Merged => None,
    };
    let names = layout.system(system.system_id);
    let (wal_dir, backups_dir) = (names.wal(), names.backups());
    let (wal, backups) = futures_util::try_join!(archive.list(&wal_dir), archive.list(&backups_dir))?;
    let reader = Reading::new(archive, cache, threads);
    let segments = wal.iter().filter(|o| is_segment(&names, &o.path));
    let segments: Vec<&ObjectInfo> = segments.collect();
    let mut slots = reader.kept(&segments);
    if !matches!(known, Known::Nothing) {
        let missing = segments.iter().zip(&slots).filter(|(_, slot)| slot.is_none());
        let missing = missing.map(|(object, _)| *object).collect();
        let mut told = merged::tell(archive, &names, missing).await?;
        for (slot, object) in slots.iter_mut().zip(&segments).filter(|(slot, _)| slot.is_none()) {
            *slot = told.remove(&object.path).map(Slot::Told);
        }
    }
    let segments = reader.others(segments, slots, |object| read_segment(archive, object)).await?;
    let histories = wal.iter().filter_map(|o| match names.parse_wal(&o.path) {
        Some(WalObject::File(WalFileName::History(timeline))) => Some((o, timeline)),
        _ => None,
    });
    let (objects, timelines): (Vec<_>, BTreeMap<_, _>) =
        histories.map(|(o, t)| (o, (o.path.clone(), t))).unzip();
    let lineages = reader
        .all(objects, |object| read_lineage(archive, object, timelines.get(&object.path).copied()))
        .await?;
    let notes = read_backups(&reader, &names, &system, &backups).await?;

    let mut damaged = Vec::new();
    let mut report = |path: &str, error: String| damaged.push(DamagedObject { path: path.to_owned(), error });
    let mut catalog_segments = Vec::new();
    for (object, found) in segments {
        match found {
            Ok(entry) => match misplaced(&names, &system, &entry) {
                None => catalog_segments.push(entry),
                Some(error) => report(&object.path, error),
            },
            Err(error) => report(&object.path, error),
        }
    }
    catalog_segments.sort_by(|a: &SegmentEntry, b| (a.info.name, &a.path).cmp(&(b.info.name, &b.path)));
    let (mut by_timeline, mut beginnings) = (BTreeMap::new(), BTreeMap::new());
    for (object, found) in lineages {
        match found {
            Ok(HistoryFile { lineage, beginning }) => {
                beginnings.insert(lineage.timeline, beginning);
                by_timeline.insert(lineage.timeline, lineage);
            }
            Err(error) => report(&object.path, error),
        }
    }
    damaged.extend(notes.damaged);
    damaged.sort_by(|a, b| a.path.cmp(&b.path));
    reader.forget_gone(&names, wal.iter().chain(&backups));
    Ok(Catalog {
        cluster: layout.cluster().to_owned(),
        system,
        backups: notes.backups,
        started: notes.started,
        segments: catalog_segments,
        lineages: by_timeline,
        beginnings,
        damaged,
    })
}

/// Where the cache of an archive lies unless the operator says otherwise: `$XDG_CACHE_HOME/waltide` or
/// `~/.cache/waltide`, under a name that no other archive has. None where neither variable is set.
pub fn default_cache_path(url: &str, archive_id: &str) -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let dir = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    let mut hash = Sha256::new();
    hash.update((url.len() as u64).to_le_bytes());
    hash.update(url);
    hash.update(archive_id);
    let name: String = hash.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect();
    Some(dir.join("waltide").join(format!("{name}.redb")))
}

/// The system asked for, or the one created last.
pub(crate) async fn find_system(
    archive: &Archive,
    layout: &Layout,
    wanted: Option<SystemId>,
) -> Result<SystemInfo, CatalogError> {
    let listing = archive.list_names(&layout.prefix()).await?;
    let there: Vec<SystemId> = listing.dirs.iter().filter_map(|name| name.parse().ok()).collect();
    if there.is_empty() {
        let clusters = archive.list_names("").await?.dirs;
        let there = match clusters.as_slice() {
            [] => "it has none".to_owned(),
            names => format!("it has {}", names.join(", ")),
        };
        return Err(CatalogError::NoCluster {
            archive: archive.url().to_owned(),
            cluster: layout.cluster().to_owned(),
            there,
        });
    }
    if let Some(system) = wanted.filter(|id| !there.contains(id)) {
        let there = there.iter().map(SystemId::to_string).collect::<Vec<_>>().join(", ");
        return Err(CatalogError::NoSystem { cluster: layout.cluster().to_owned(), system, there });
    }
    let mut found: Vec<SystemInfo> = Vec::new();
    for id in wanted.map_or(there, |id| vec![id]) {
        let path = layout.system(id).system_json();
        let object = match archive.get(&path, SMALL_BYTES_MAX).await {
            // Its maker was stopped before it got that far: the system has nothing in it.
            Err(e) if e.is_not_found() && wanted.is_none() => continue,
            object => object?,
        };
        let damaged = |source| CatalogError::Damaged { path: path.clone(), source };
        let info: SystemInfo = Envelope::open_json(&object, ObjectKind::Json).map_err(damaged)?;
        if info.system_id != id {
            let source = Corrupt::mismatch("system_id", 0, info.system_id.get(), id.get());
            return Err(CatalogError::Damaged { path, source });
        }
        found.push(info);
    }
    let newest = found.into_iter().max_by_key(|info| (info.created, info.system_id));
    newest.ok_or_else(|| CatalogError::NoCluster {
        archive: archive.url().to_owned(),
        cluster: layout.cluster().to_owned(),
        there: "its directory is there and holds no system.json".to_owned(),
    })
}

/// A value read from an object, or what is wrong with the object.
pub(crate) type Found<T> = Result<T, String>;
/// The same for an object that may be gone.
pub(crate) type Read<T> = Result<Option<Found<T>>, StorageError>;

/// What is known of an object before it is read.
enum Slot<T> {
    /// The cache kept it.
    Kept(T),
    /// Another object tells it.
    Told(T),
}

/// Under which version the cache keeps what an object says.
fn version(object: &ObjectInfo) -> String {
    format!("{CACHE_FORM} {} {}", object.size, object.version)
}

/// Reads many objects, through the cache.
pub(crate) struct Reading<'a> {
    archive: &'a Archive,
    cache: Option<&'a CatalogueCache>,
    threads: usize,
    wrote: AtomicBool,
}

impl<'a> Reading<'a> {
    pub(crate) fn new(archive: &'a Archive, cache: Option<&'a CatalogueCache>, threads: usize) -> Self {
        Self { archive, cache, threads, wrote: AtomicBool::new(false) }
    }

    /// The value of every object that is there, in the order given.
    pub(crate) async fn all<'o, T, F>(
        &self,
        objects: Vec<&'o ObjectInfo>,
        read: impl Fn(&'o ObjectInfo) -> F,
    ) -> Result<Vec<(&'o ObjectInfo, Found<T>)>, StorageError>
    where
        T: Serialize + DeserializeOwned,
        F: Future<Output = Read<T>>,
    {
        let kept = self.kept(&objects);
        self.others(objects, kept, read).await
    }

    /// What the cache kept of each object.
    fn kept<T: DeserializeOwned>(&self, objects: &[&ObjectInfo]) -> Vec<Option<Slot<T>>> {
        let versions: Vec<String> = objects.iter().map(|o| version(o)).collect();
        let keys = objects.iter().zip(&versions).map(|(o, v)| (o.path.as_str(), v.as_str()));
        let Some(cache) = self.cache else { return objects.iter().map(|_| None).collect() };
        let known = cache.get_many(keys).into_iter();
        known.map(|bytes| Some(Slot::Kept(serde_json::from_slice(&bytes?).ok()?))).collect()
    }

    /// Reads the objects of which nothing is known, and lets the cache keep what is new.
    async fn others<'o, T, F>(
        &self,
        objects: Vec<&'o ObjectInfo>,
        known: Vec<Option<Slot<T>>>,
        read: impl Fn(&'o ObjectInfo) -> F,
    ) -> Result<Vec<(&'o ObjectInfo, Found<T>)>, StorageError>
    where
        T: Serialize + DeserializeOwned,
        F: Future<Output = Read<T>>,
    {
        let versions: Vec<String> = objects.iter().map(|o| version(o)).collect();
        let mut found: Vec<Option<(bool, Found<T>)>> = known
            .into_iter()
            .map(|slot| {
                Some(match slot? {
                    Slot::Kept(value) => (false, Ok(value)),
                    Slot::Told(value) => (true, Ok(value)),
                })
            })
            .collect();
        let missing: Vec<_> = (0usize..)
            .zip(objects.iter().copied())
            .filter(|(i, _)| matches!(found.get(*i), Some(None)))
            .collect();
        let jobs = missing.into_iter().map(|(i, object)| {
            let job = read(object);
            async move { Ok::<_, StorageError>((i, job.await?)) }
        });
        // Collected, so that the closure is no part of a future that a caller may want to send to another thread.
        let jobs: Vec<_> = jobs.collect();
        let mut done = stream::iter(jobs).buffer_unordered(self.threads.clamp(1, 64).saturating_mul(4));
        while let Some((i, value)) = done.try_next().await? {
            if let Some(slot) = found.get_mut(i) {
                *slot = value.map(|value| (true, value));
            }
        }
        if let Some(cache) = self.cache {
            let fresh =
                objects.iter().zip(versions).zip(&found).filter_map(
                    |((object, version), found)| match found {
                        Some((true, Ok(value))) => {
                            Some((object.path.clone(), version, serde_json::to_vec(value).ok()?))
                        }
                        _ => None,
                    },
                );
            let fresh: Vec<_> = fresh.collect();
            if !fresh.is_empty() {
                cache.put_many(fresh);
                self.wrote.store(true, Ordering::Relaxed);
            }
        }
        Ok(objects.into_iter().zip(found).filter_map(|(object, found)| Some((object, found?.1))).collect())
    }

    /// Lets the cache forget objects that are gone, where it was written to anyway.
    fn forget_gone<'o>(&self, names: &SystemLayout, live: impl Iterator<Item = &'o ObjectInfo>) {
        if let Some(cache) = self.cache.filter(|_| self.wrote.load(Ordering::Relaxed)) {
            cache.retain(&format!("{}/", names.prefix()), live.map(|o| o.path.clone()));
        }
    }
}

/// An object's bytes; none where it is gone, a text where it cannot be what its name says.
pub(crate) async fn fetch(archive: &Archive, path: &str, max_bytes: u64) -> Read<Bytes> {
    sort_out(archive.get(path, max_bytes).await)
}

/// Tells an object that is gone and one that is damaged from an archive that fails.
fn sort_out<T>(result: Result<T, StorageError>) -> Read<T> {
    match result {
        Ok(value) => Ok(Some(Ok(value))),
        Err(e) if e.is_not_found() => Ok(None),
        Err(e) if e.is_bad_object() => Ok(Some(Err(e.to_string()))),
        Err(e) => Err(e),
    }
}

fn is_segment(names: &SystemLayout, path: &str) -> bool {
    let file = match names.parse_wal(path) {
        Some(WalObject::File(name) | WalObject::Longer { of: name, .. }) => name,
        None => return false,
    };
    matches!(file, WalFileName::Segment(_) | WalFileName::Partial(_))
}

/// What a segment's end says about it.
pub(crate) async fn read_segment(archive: &Archive, object: &ObjectInfo) -> Read<SegmentEntry> {
    // The footer says how long the directory is, the directory how long the sections are.
    let read = archive.read_end(&object.path, TAIL_BYTES, |tail, size| summary(&object.path, tail, size));
    Ok(sort_out(read.await)?.map(|found| found.and_then(|entry| entry.map_err(|e| e.to_string()))))
}

fn summary(path: &str, tail: &[u8], size: u64) -> Result<Result<SegmentEntry, u64>, Corrupt> {
    let directory = match SegmentDirectory::decode(tail, size)? {
        Ok(directory) => directory,
        Err(needed) => return Ok(Err(needed)),
    };
    Ok(directory.summary(tail, size)?.map(|index| SegmentEntry {
        path: path.to_owned(),
        stored_bytes: size,
        info: index.info,
        restore_points: index.restore_points.into_iter().map(|p| p.name).collect(),
        faults: index.faults,
        digest: directory.digest.iter().map(|b| format!("{b:02x}")).collect(),
        pushed_by: index.pushed_by,
    }))
}

/// Why a segment cannot belong where it lies.
fn misplaced(names: &SystemLayout, system: &SystemInfo, entry: &SegmentEntry) -> Option<String> {
    let info = &entry.info;
    let named = match names.parse_wal(&entry.path)? {
        WalObject::File(name) | WalObject::Longer { of: name, .. } => name,
    };
    let (WalFileName::Segment(name) | WalFileName::Partial(name)) = named else { return None };
    let extent = name.start(system.segment_size).zip(name.end(system.segment_size));
    let (found, expected) = match extent {
        _ if info.system_id != system.system_id => {
            (format!("system {}", info.system_id), format!("system {}", system.system_id))
        }
        _ if info.size != system.segment_size => {
            let (found, expected) = (info.size.bytes(), system.segment_size.bytes());
            (format!("segments of {found} bytes"), format!("{expected} bytes"))
        }
        _ if info.name != name => (info.name.to_string(), name.to_string()),
        None => (name.to_string(), "the name of a segment".to_owned()),
        Some((start, end)) if !(start..=end).contains(&info.valid_end) => {
            (format!("an end at {}", info.valid_end), format!("one from {start} to {end}"))
        }
        Some(_) => return None,
    };
    Some(format!("its index speaks of {found}, expected {expected}"))
}

/// What a history file says.
#[derive(Serialize, Deserialize)]
struct HistoryFile {
    lineage: Lineage,
    beginning: Beginning,
}

async fn read_lineage(
    archive: &Archive,
    object: &ObjectInfo,
    timeline: Option<TimelineId>,
) -> Read<HistoryFile> {
    let (Some(timeline), Some(bytes)) = (timeline, fetch(archive, &object.path, SMALL_BYTES_MAX).await?)
    else {
        return Ok(None);
    };
    let parse = |bytes: Bytes| {
        let file = WalFile::decode(&bytes).map_err(|e| e.to_string())?;
        if file.name != WalFileName::History(timeline) {
            return Err(format!("it holds {}", file.name));
        }
        let history = History::parse(timeline, &file.contents).map_err(|e| e.to_string())?;
        let ancestors = history.ancestors().iter().map(|a| (a.timeline, a.switch)).collect();
        let reason = history.ancestors().last().map(|a| a.reason.clone());
        let beginning = Beginning { reason, pushed_by: file.pushed_by };
        Ok(HistoryFile { lineage: Lineage { ancestors, timeline }, beginning })
    };
    Ok(Some(bytes.and_then(parse)))
}

/// What lies in the backups' directory.
struct Backups {
    backups: Vec<BackupEntry>,
    started: Vec<StartedBackup>,
    damaged: Vec<DamagedObject>,
}

/// A manifest without its files and directories.
#[derive(Serialize, Deserialize)]
struct ManifestHead {
    head: Manifest,
    files: u64,
}

/// Which part of a backup an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BackupObject {
    /// The manifest.
    Manifest,
    /// What announces it.
    Started,
    /// What pins it.
    Keep,
}

/// What an object in the backups' directory is, by its name.
pub(crate) fn backup_object(names: &SystemLayout, path: &str) -> Option<(BackupId, BackupObject)> {
    let file = path.strip_prefix(names.backups().as_str())?.strip_prefix('/')?;
    let (id, part) = match file.split_once('.') {
        None => (file, BackupObject::Manifest),
        Some((id, "started")) => (id, BackupObject::Started),
        Some((id, "keep")) => (id, BackupObject::Keep),
        Some(_) => return None,
    };
    Some((id.parse().ok()?, part))
}

async fn read_backups(
    reader: &Reading<'_>,
    names: &SystemLayout,
    system: &SystemInfo,
    listed: &[ObjectInfo],
) -> Result<Backups, StorageError> {
    let named: Vec<_> =
        listed.iter().filter_map(|o| backup_object(names, &o.path).map(|(id, part)| (o, id, part))).collect();
    let of = |part| named.iter().filter(move |(_, _, p)| *p == part).map(|(o, _, _)| *o).collect::<Vec<_>>();
    let id_of: BTreeMap<&str, &BackupId> = named.iter().map(|(o, id, _)| (o.path.as_str(), id)).collect();
    let archive = reader.archive;
    let manifests = reader.all(of(BackupObject::Manifest), |o| read_manifest(archive, o)).await?;
    let started = reader.all(of(BackupObject::Started), |o| read_json::<StartedBackup>(archive, o)).await?;
    let keeps = reader.all(of(BackupObject::Keep), |o| read_json::<Keep>(archive, o)).await?;

    let mut damaged = Vec::new();
    let mut report = |path: &str, error: String| damaged.push(DamagedObject { path: path.to_owned(), error });
    let mut pins = BTreeMap::new();
    for (object, keep) in keeps {
        let keep = keep.unwrap_or_else(|error| {
            let reason = Some(format!("the pin cannot be read: {error}"));
            report(&object.path, error);
            Keep { reason, ..Keep::default() }
        });
        if let Some(id) = id_of.get(object.path.as_str()) {
            pins.insert((*id).clone(), keep);
        }
    }
    let mut backups = Vec::new();
    for (object, found) in manifests {
        let Some(id) = id_of.get(object.path.as_str()) else { continue };
        match found {
            Ok(ManifestHead { head, files }) if head.id == **id && head.system_id == system.system_id => {
                backups.push(BackupEntry { files, keep: pins.get(&head.id).cloned(), head });
            }
            Ok(ManifestHead { head, .. }) => {
                report(&object.path, format!("it is backup {} of system {}", head.id, head.system_id));
            }
            Err(error) => report(&object.path, error),
        }
    }
    backups.sort_by(|a: &BackupEntry, b| (a.head.started, &a.head.id).cmp(&(b.head.started, &b.head.id)));
    let complete: BTreeSet<&str> = of(BackupObject::Manifest).into_iter().map(|o| o.path.as_str()).collect();
    let mut running = Vec::new();
    for (object, found) in started {
        match found {
            // Its backup is complete; what announced it is only not removed yet.
            Ok(s) if complete.contains(names.manifest(&s.id).as_str()) => {}
            Ok(s) if names.started(&s.id) == object.path => running.push(s),
            Ok(s) => report(&object.path, format!("it announces backup {}", s.id)),
            Err(error) => report(&object.path, error),
        }
    }
    Ok(Backups { backups, started: running, damaged })
}

async fn read_manifest(archive: &Archive, object: &ObjectInfo) -> Read<ManifestHead> {
    let bytes = match fetch(archive, &object.path, MANIFEST_BYTES_MAX).await? {
        Some(Ok(bytes)) => bytes,
        Some(Err(error)) => return Ok(Some(Err(error))),
        None => return Ok(None),
    };
    let decode = move || {
        let mut head = Manifest::decode(&bytes).map_err(|e| e.to_string())?;
        let files = head.files.len() as u64;
        (head.files, head.directories) = (Vec::new(), Vec::new());
        Ok(ManifestHead { head, files })
    };
    let decoded = tokio::task::spawn_blocking(decode).await;
    Ok(Some(decoded.expect("a decoder does not panic")))
}

pub(crate) async fn read_json<T: DeserializeOwned>(archive: &Archive, object: &ObjectInfo) -> Read<T> {
    let bytes = fetch(archive, &object.path, SMALL_BYTES_MAX).await?;
    let open = |bytes: Bytes| Envelope::open_json(&bytes, ObjectKind::Json).map_err(|e| e.to_string());
    Ok(bytes.map(|bytes| bytes.and_then(open)))
}
