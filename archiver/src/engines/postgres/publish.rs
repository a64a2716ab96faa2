//! A backup on its way into the archive: announced, its WAL awaited, and only then seen.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::time::{Duration, Instant};

use waltide_format::archive::{
    BackupKind, Ending, Envelope, ExtentMap, Layout, Manifest, ManifestFile, ObjectKind, SegmentEntry,
    StartedBackup, SystemInfo, SystemLayout,
};
use waltide_format::engines::postgres::cluster::ControlFile;
use waltide_format::{
    BackupId, Corrupt, Lsn, PgMajor, SegmentName, SegmentSize, SystemId, TimelineId, TimestampTz, WalFileName,
};
use waltide_storage::{Archive, Bytes, Progress, Put, StorageError};

use super::backup::{ChangesError, LostCopy};
use super::copy::{BadPage, Copied};
use super::files::Scan;
use crate::catalog::{MANIFEST_BYTES_MAX, read_segment};
use crate::put::put_own;

/// No JSON object of the archive but a manifest is larger.
const JSON_BYTES_MAX: u64 = 1 << 20;
/// A manifest names no more damaged pages than this; where there are more, the disk is beyond lists.
pub(super) const DAMAGED_PAGES_MAX: usize = 10_000;
/// How often the archive is asked for a segment that is on its way.
const POLL_MIN: Duration = Duration::from_millis(100);
const POLL_MAX: Duration = Duration::from_secs(2);

/// Why a backup did not come into the archive.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// The archive does not know the cluster.
    #[error(
        "cluster {cluster} of {archive} has no system {system_id}\nhint: waltide init --data-dir DIR makes it; --cluster names another"
    )]
    UnknownSystem {
        /// The archive's address.
        archive: String,
        /// The cluster's name.
        cluster: String,
        /// What the data directory's pg_control says.
        system_id: SystemId,
    },
    /// The archive knows the cluster with other properties.
    #[error("{path} says {what} {expected}, the data directory says {found}")]
    Mismatch {
        /// The object.
        path: String,
        /// Which property.
        what: &'static str,
        /// What the archive says.
        expected: String,
        /// What the data directory says.
        found: String,
    },
    /// An object of the archive is damaged.
    #[error("{path} is damaged")]
    Damaged {
        /// The object.
        path: String,
        /// What is wrong with it.
        source: Corrupt,
    },
    /// A prune took the backup for dead.
    #[error(
        "a prune took backup {id} for given up and removed its announcement\nhint: prune with a longer --give-up-hours, and take the backup again."
    )]
    GivenUp {
        /// The backup.
        id: BackupId,
    },
    /// A segment that the backup needs has not come.
    #[error("the backup needs segment {segment}, which has not reached the archive in {seconds} s; {hint}")]
    WalMissing {
        /// The first segment that is missing.
        segment: SegmentName,
        /// How long none has come.
        seconds: u64,
        /// Why that may be.
        hint: String,
    },
    /// A segment that the backup needs is in the archive, and cannot be used.
    #[error("the backup needs {path}, {why}\nhint: the backup cannot be used without it; take another one.")]
    WalUnusable {
        /// The object.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// What the backup's WAL does to databases cannot be read.
    #[error(transparent)]
    Changes(#[from] ChangesError),
    /// Recovery could not make a database of what the backup has.
    #[error(transparent)]
    LostCopy(#[from] LostCopy),
    /// The archive failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

impl PublishError {
    /// Whether the archive is at fault.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            Self::Damaged { .. } | Self::WalUnusable { .. } | Self::Changes(ChangesError::Unknown(_))
        )
    }
}

/// What a backup's WAL comes from.
pub(super) trait WalSource {
    /// A number that changes when any segment was archived, where that is known.
    async fn archived(&self) -> Option<i64>;
    /// Why a segment may not have come.
    async fn why_not(&self) -> String;
}

/// The system that a data directory belongs to, in the archive.
#[derive(Debug, Clone)]
pub(super) struct Destination {
    pub(super) archive: Archive,
    pub(super) system: SystemLayout,
    pub(super) segment_size: SegmentSize,
}

impl Destination {
    /// Finds the system of `control` in the archive, and refuses one with other properties.
    pub(super) async fn find(
        archive: &Archive,
        layout: &Layout,
        control: &ControlFile,
    ) -> Result<Self, PublishError> {
        let system = layout.system(control.system_id);
        let path = system.system_json();
        let object = archive.get(&path, JSON_BYTES_MAX).await.map_err(|e| match e.is_not_found() {
            true => PublishError::UnknownSystem {
                archive: archive.url().to_owned(),
                cluster: layout.cluster().to_owned(),
                system_id: control.system_id,
            },
            false => e.into(),
        })?;
        let info: SystemInfo = Envelope::open_json(&object, ObjectKind::Json)
            .map_err(|source| PublishError::Damaged { path: path.clone(), source })?;
        let mismatch = |what, expected: String, found: String| PublishError::Mismatch {
            path: path.clone(),
            what,
            expected,
            found,
        };
        let text = |major: PgMajor| format!("PostgreSQL {major}");
        if info.system_id != control.system_id {
            return Err(mismatch(
                "system identifier",
                info.system_id.to_string(),
                control.system_id.to_string(),
            ));
        }
        if info.major != control.major {
            return Err(mismatch("version", text(info.major), text(control.major)));
        }
        if info.segment_size != control.segment_size {
            let [expected, found] = [info.segment_size, control.segment_size].map(|s| s.bytes().to_string());
            return Err(mismatch("wal_segment_size", expected, found));
        }
        if info.block_bytes != control.block_bytes {
            return Err(mismatch(
                "block_size",
                info.block_bytes.to_string(),
                control.block_bytes.to_string(),
            ));
        }
        Ok(Self { archive: archive.clone(), system, segment_size: info.segment_size })
    }

    /// A system that the catalogue has.
    pub(super) fn of_system(archive: &Archive, layout: &Layout, system: &SystemInfo) -> Self {
        Self {
            archive: archive.clone(),
            system: layout.system(system.system_id),
            segment_size: system.segment_size,
        }
    }

    /// Announces a backup under a name that no other has.
    pub(super) async fn announce(
        &self,
        started: TimestampTz,
        kind: BackupKind,
        parent: Option<&BackupId>,
    ) -> Result<BackupId, PublishError> {
        loop {
            let salt = u16::try_from(RandomState::new().build_hasher().finish() & 0xFFFF).unwrap_or(0);
            let id = BackupId::new(started, salt);
            let note = StartedBackup {
                id: id.clone(),
                started,
                host: crate::host::name(),
                pid: std::process::id(),
                kind,
                parent: parent.cloned(),
            };
            let object = Bytes::from(Envelope::seal_json(ObjectKind::Json, &note));
            let taken = self.archive.head(&self.system.manifest(&id)).await?.is_some();
            if !taken && self.archive.put_new(&self.system.started(&id), object).await? == Put::Created {
                return Ok(id);
            }
        }
    }

    /// Takes the announcement of a backup back that has stored nothing. It is of no harm where that fails.
    pub(super) async fn withdraw(&self, id: &BackupId) {
        if let Err(e) = self.archive.delete(&self.system.started(id)).await {
            tracing::debug!("the announcement of {id} stays: {e}");
        }
    }

    /// Puts the map of a backup's extents.
    pub(super) async fn put_map(&self, id: &BackupId, map: &ExtentMap) -> Result<u64, PublishError> {
        let object = Bytes::from(map.encode());
        let bytes = object.len() as u64;
        put_own(&self.archive, &self.system.map(id.as_str()), object).await?;
        Ok(bytes)
    }

    /// A map that another backup put.
    pub(super) async fn get_map(&self, name: &str) -> Result<ExtentMap, PublishError> {
        let path = self.system.map(name);
        let object = self.archive.get(&path, MANIFEST_BYTES_MAX).await?;
        let decoded = tokio::task::spawn_blocking(move || ExtentMap::decode(&object)).await;
        let decoded = decoded.expect("a decoder does not panic");
        decoded.map_err(|source| PublishError::Damaged { path, source })
    }

    /// Makes the backup seen. What announced it goes; if that fails, readers know better. A prune that took this
    /// backup for given up removes the announcement first and looks for the manifest afterwards, so an announcement
    /// that is gone says that the backup's data may go too.
    pub(super) async fn publish(&self, manifest: &Manifest) -> Result<(), PublishError> {
        let object = Bytes::from(manifest.encode());
        let path = self.system.manifest(&manifest.id);
        put_own(&self.archive, &path, object).await?;
        if self.archive.head(&self.system.started(&manifest.id)).await?.is_none() {
            self.archive.delete(&path).await?;
            return Err(PublishError::GivenUp { id: manifest.id.clone() });
        }
        if let Err(e) = self.archive.delete(&self.system.started(&manifest.id)).await {
            tracing::warn!("the backup is complete, but its announcement stays: {e}");
        }
        Ok(())
    }

    /// Waits until the archive holds all WAL from `start` to `stop`, on the first of `timelines` or another of them: in
    /// the segments that are returned.
    /// `patience` is how long nothing may come; `source` may know of what comes before the first of these segments.
    pub(super) async fn await_wal(
        &self,
        timelines: &[TimelineId],
        (start, stop): (Lsn, Lsn),
        patience: Duration,
        progress: &dyn Progress,
        source: &impl WalSource,
    ) -> Result<Vec<SegmentEntry>, PublishError> {
        let timeline = timelines.first().copied().unwrap_or(TimelineId::FIRST);
        let segments = segments(timeline, start, stop, self.segment_size);
        let mut found = Vec::with_capacity(segments.len());
        progress.phase("wal", Some((segments.len() as u64).saturating_mul(self.segment_size.bytes())));
        let mut moved = Instant::now();
        let mut archived = None;
        for segment in segments {
            let mut pause = POLL_MIN;
            let entry = loop {
                if let Some(entry) = self.find_segment(timelines, segment, stop).await? {
                    break entry;
                }
                let now = source.archived().await;
                if now != archived {
                    (archived, moved) = (now, Instant::now());
                }
                if moved.elapsed() >= patience {
                    let hint = source.why_not().await;
                    return Err(PublishError::WalMissing { segment, seconds: patience.as_secs(), hint });
                }
                tokio::time::sleep(pause).await;
                pause = pause.saturating_mul(2).min(POLL_MAX);
            };
            found.push(entry);
            progress.advance(self.segment_size.bytes());
            moved = Instant::now();
        }
        Ok(found)
    }

    /// A copy of the segment in the archive that can be used, up to `stop` where it lies inside. A copy that ends too
    /// early may have a longer one to come; one that is damaged, or was admitted with a fault, is the end.
    pub(super) async fn find_segment(
        &self,
        timelines: &[TimelineId],
        segment: SegmentName,
        stop: Lsn,
    ) -> Result<Option<SegmentEntry>, PublishError> {
        let mut unusable = None;
        for timeline in timelines {
            let name = segment.on(*timeline);
            let path = self.system.wal_file(WalFileName::Segment(name));
            let Some(object) = self.archive.head(&path).await? else { continue };
            let mut copies = vec![object];
            let mut listed = false;
            while let Some(object) = copies.pop() {
                match read_segment(&self.archive, &object).await? {
                    None => {}
                    Some(Err(why)) => unusable = Some((object.path, format!("which is damaged: {why}"))),
                    Some(Ok(entry)) => match self.fault(&entry, name) {
                        Some(why) => unusable = Some((object.path, why)),
                        None if self.reaches(&entry, name, stop) => return Ok(Some(entry)),
                        None => {}
                    },
                }
                if !listed {
                    // Longer copies lie beside it; they are rare, and so looked for only where this one does not serve.
                    listed = true;
                    let beside = format!("{path}@");
                    let listing = self.archive.list_names(&self.system.timeline(*timeline)).await?;
                    copies.extend(listing.objects.into_iter().filter(|o| o.path.starts_with(&beside)));
                }
            }
        }
        unusable.map_or(Ok(None), |(path, why)| Err(PublishError::WalUnusable { path, why }))
    }

    /// Why a stored segment cannot serve at all.
    fn fault(&self, entry: &SegmentEntry, name: SegmentName) -> Option<String> {
        if entry.info.name != name {
            return Some(format!("which holds {}", entry.info.name));
        }
        entry.faults.first().map(|fault| format!("which was admitted with a fault at {}", fault.at))
    }

    /// Whether a stored segment holds all WAL up to `stop`, or all that a segment can hold.
    fn reaches(&self, entry: &SegmentEntry, name: SegmentName, stop: Lsn) -> bool {
        let whole = matches!(entry.info.ending, Ending::Full | Ending::Switch);
        let end = name.end(self.segment_size).unwrap_or(Lsn::MAX);
        entry.info.valid_end >= stop || (whole && stop > end)
    }
}

/// The segments that hold the WAL from `start` to `stop`.
pub(super) fn segments(timeline: TimelineId, start: Lsn, stop: Lsn, size: SegmentSize) -> Vec<SegmentName> {
    let first = SegmentName::containing(timeline, start, size);
    let last = SegmentName::containing(timeline, stop.saturating_sub(1).max(start), size);
    let next = |name: &SegmentName| if *name == last { None } else { name.next(size) };
    std::iter::successors(Some(first), next).collect()
}

/// The damaged pages' names, and a warning of them. A page was excused because its LSN said that the log has it; one
/// with an LSN that the log had not even reached when the backup ended said so falsely.
pub(super) fn damaged_pages(
    scan: &Scan,
    copied: &mut Copied,
    stop_lsn: Lsn,
    warnings: &mut Vec<String>,
) -> Vec<String> {
    let false_excuses: Vec<BadPage> =
        copied.excused.iter().filter(|page| page.lsn > stop_lsn).copied().collect();
    copied.damaged.extend(false_excuses);
    copied.damaged.sort_unstable();
    let name = |page: &BadPage| scan.files.get(page.file).map(|file| format!("{}:{}", file.path, page.block));
    let named: Vec<String> = copied.damaged.iter().take(DAMAGED_PAGES_MAX).filter_map(name).collect();
    if !named.is_empty() {
        let some = named.iter().take(10).map(String::as_str).collect::<Vec<_>>().join(", ");
        let more = if named.len() > 10 { ", …" } else { "" };
        let count = copied.damaged.len();
        warnings.push(format!("{count} damaged pages are in the backup as they are on disk: {some}{more}"));
    }
    named
}

/// The files of a manifest and the map over their extents.
pub(super) fn assemble(scan: &Scan, copied: Copied) -> (ExtentMap, Vec<ManifestFile>) {
    let mut map = ExtentMap { packs: copied.packs, files: Vec::new() };
    let mut files = Vec::with_capacity(scan.files.len());
    for (source, copied) in scan.files.iter().zip(copied.files) {
        let Some(copied) = copied else { continue };
        let mut extents = Vec::new();
        if !copied.extents.is_empty() {
            let number = u32::try_from(map.files.len()).expect("fewer files than a manifest could hold");
            extents.push((0, number));
            map.files.push(copied.extents);
        }
        files.push(ManifestFile {
            path: source.path.clone(),
            bytes: copied.bytes,
            mode: source.mode,
            modified: source.modified,
            extents,
        });
    }
    (map, files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_segment_that_holds_the_last_byte_is_the_last() {
        let size = SegmentSize::new(1 << 20).unwrap();
        let names = |start: u64, stop: u64| {
            let found = segments(TimelineId::FIRST, start.into(), stop.into(), size);
            found.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(names(0x10_0028, 0x10_0100), ["000000010000000000000001"]);
        assert_eq!(names(0x10_0028, 0x20_0000), ["000000010000000000000001"]);
        assert_eq!(names(0x10_0028, 0x20_0001), ["000000010000000000000001", "000000010000000000000002"]);
        assert_eq!(
            names(0xFFFF_0028, 0x1_0000_0100),
            ["000000010000000000000FFF", "000000010000000100000000"]
        );
    }
}
