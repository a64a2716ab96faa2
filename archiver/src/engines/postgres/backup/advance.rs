//! A newer backup out of an older one: its files, which replay brought to a checkpoint's redo point, are stored as far as
//! the archived WAL since then changed them. No server has a part in it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tokio::runtime::Handle;
use waltide_format::archive::{
    BackupKind, BackupMethod, Catalog, CheckpointInfo, Layout, Lineage, Manifest, ManifestStats,
    SegmentEntry, Step, SystemInfo, Tablespace,
};
use waltide_format::engines::postgres::cluster::{
    BackupLabel, ControlFile, HandOver, tablespace_map_text, version_directory,
};
use waltide_format::{BackupId, Lsn, TimestampTz};
use waltide_storage::{Archive, Progress, StorageError};

use super::super::control::{ControlFileError, read_control_bytes};
use super::super::copy::{Copied, CopyJob, Last, copy};
use super::super::files::{CONTROL_FILE, Scan, scan};
use super::super::pages::PageRule;
use super::super::publish::{DAMAGED_PAGES_MAX, Destination, PublishError, damaged_pages};
use super::super::wanted::touch_damaged;
use super::base::Base;
use super::changes::{ChangesError, changed_blocks, join, unjoined};
use super::layers::{Layered, lay};
use super::parent::{Cover, cover, needed_end};
use super::{Against, Backup, BackupError, now};
use crate::catalog::MANIFEST_BYTES_MAX;
use crate::inventory::being_pruned;
use crate::merged::Chaining;
use crate::stored_segments::{ReadError, read_index};

/// What to advance, and how.
#[derive(Debug, Clone)]
pub struct AdvanceRequest {
    /// The archive.
    pub archive: Archive,
    /// The cluster in it.
    pub layout: Layout,
    /// Where the catalogue cache lies, if it is used.
    pub cache: Option<PathBuf>,
    /// The backup that is brought forward.
    pub backup: BackupId,
    /// The operator's words.
    pub description: Option<String>,
    /// Whether damaged pages end it, rather than being written down.
    pub refuse_damaged_pages: bool,
    /// How many threads copy.
    pub threads: usize,
    /// zstd's level.
    pub level: i32,
}

/// The backup's files, as replay left them.
#[derive(Debug, Clone)]
pub struct AdvancedFiles {
    /// Where they are; its pg_control names the checkpoint.
    pub data_dir: PathBuf,
    /// Every tablespace that they may have, and where it lay.
    pub tablespaces: Vec<Tablespace>,
    /// The timelines that were followed.
    pub line: Lineage,
    /// The backup_label with which recovery goes on.
    pub backup_label: String,
}

/// An advanced backup on its way: announced, so that no prune removes what it refers to.
#[derive(Debug)]
pub struct Advance {
    request: AdvanceRequest,
    to: Destination,
    id: BackupId,
    parent: Manifest,
    begun: Instant,
}

/// What a backup starts from.
struct Start {
    checkpoint: CheckpointInfo,
    /// The latest time that a transaction before it ended at.
    latest: Option<TimestampTz>,
}

impl Advance {
    /// Announces the backup.
    pub async fn begin(request: AdvanceRequest, system: &SystemInfo) -> Result<Self, BackupError> {
        let begun = Instant::now();
        let to = Destination::of_system(&request.archive, &request.layout, system);
        let parent = read_parent(&to, &request.backup).await?;
        let started = now();
        let id = to.announce(started, BackupKind::Advanced, Some(&parent.id)).await?;
        let advance = Self { request, to, id, parent, begun };
        let (archive, layout) = (&advance.request.archive, &advance.request.layout);
        let pruned = being_pruned(archive, layout, system.system_id, started).await;
        let unfit = match &pruned {
            Ok(pruned) if pruned.contains(&advance.parent.id) => Some("it is being removed by a prune"),
            _ if advance.parent.damaged_pages.len() >= DAMAGED_PAGES_MAX => {
                Some("it has more damaged pages than it names")
            }
            _ => None,
        };
        if let Some(why) = unfit {
            let failed = advance.cannot(why);
            advance.give_up().await;
            return Err(failed);
        }
        match pruned {
            Ok(_) => Ok(advance),
            Err(e) => {
                advance.give_up().await;
                Err(PublishError::from(e).into())
            }
        }
    }

    /// The name of the new backup.
    pub const fn id(&self) -> &BackupId {
        &self.id
    }

    /// Takes the announcement back. Nothing was stored.
    pub async fn give_up(self) {
        self.to.withdraw(&self.id).await;
    }

    fn cannot(&self, why: impl Into<String>) -> BackupError {
        BackupError::NotAdvanced { backup: self.parent.id.clone(), why: why.into() }
    }

    /// Stores what changed, and makes the backup seen.
    pub async fn store(
        &self,
        catalog: &Catalog,
        files: AdvancedFiles,
        progress: &Arc<dyn Progress>,
    ) -> Result<Backup, BackupError> {
        let stored = Instant::now();
        let request = &self.request;
        let (control_bytes, control) = read_control_bytes(&files.data_dir)?;
        let label = BackupLabel::parse(&files.backup_label)?;
        let redo = control.checkpoint_copy.redo;
        let until = needed_end(redo, self.to.segment_size);
        if !files.line.holds(self.parent.timeline, self.parent.stop_lsn) {
            let why = format!("it is not in the past of timeline {}", files.line.timeline);
            return Err(self.cannot(why));
        }
        let steps = match cover(catalog, &files.line, self.parent.start_lsn, until) {
            Cover::Whole(steps) => steps,
            Cover::Broken(why) => return Err(self.cannot(why)),
            Cover::NotYet(from) => {
                return Err(self.cannot(format!("the WAL since then ends at {from}, before {until}")));
            }
        };
        let start = self.start(catalog, &files.line, &steps, control.checkpoint).await?;
        let checkpoint = &start.checkpoint;
        if (checkpoint.redo, label.start_lsn, label.checkpoint_lsn) != (redo, redo, control.checkpoint) {
            return Err(self.cannot("its pg_control and its label are not of one checkpoint"));
        }
        let changed =
            changed_blocks(&request.archive, &self.to.system, &steps, self.parent.start_lsn, request.threads);
        let mut changed = match changed.await {
            Ok(changed) => changed,
            Err(e) => return Err(self.changes(e)),
        };
        touch_damaged(&self.parent, &mut changed, control.relation_file_blocks);
        let base = Base { parent: self.parent.clone(), changed };
        let base = Arc::new(Against { base, segment_blocks: control.relation_file_blocks });

        // The cluster needs the checkpoint's record too: before its end there is none.
        let over = HandOver {
            checkpoint: checkpoint.start,
            checkpoint_bytes: ControlFile::checkpoint_bytes(&control_bytes)
                .ok_or_else(|| self.cannot("its pg_control is too short"))?,
            redo: checkpoint.end,
            timeline: checkpoint.timeline,
            settings: None,
        };
        let control_bytes = over.rewrite(&control_bytes, control.major).map_err(|source| {
            ControlFileError::Control { path: files.data_dir.join(CONTROL_FILE), source }
        })?;
        let (scan, mut copied) =
            self.copy_files(&files, &control, control_bytes, Arc::clone(&base), progress).await?;
        let copy_seconds = stored.elapsed().as_secs_f64();
        let mut warnings = scan.warnings.clone();
        let damaged_pages = damaged_pages(&scan, &mut copied, Lsn::MAX, &mut warnings);
        if let Some(first) = damaged_pages.first().filter(|_| request.refuse_damaged_pages) {
            return Err(BackupError::DamagedPages { count: copied.damaged.len(), first: first.clone() });
        }
        let tablespaces = self.tablespaces(&scan, &files.tablespaces)?;

        let (read_bytes, pack_bytes) = (copied.read_bytes, copied.stored_bytes);
        let mut layered = lay(&scan, copied, &self.parent, &base.kept(&scan));
        self.date(&mut layered, checkpoint.time);
        layered.compact(&self.to).await?;
        let Layered { map, files: manifest_files, mut maps, referred_bytes } = layered;
        let map_bytes = self.to.put_map(&self.id, &map).await?;
        maps.push(self.id.as_str().to_owned());

        let range = (redo, checkpoint.end);
        let chain = Chaining { archive: &request.archive, layout: &request.layout, threads: request.threads };
        let chain = chain.of_backup(request.cache.as_deref(), checkpoint.timeline, range.0, range.1).await;
        let links = tablespaces.iter().map(|t| (t.oid, t.path.as_str()));
        let manifest = Manifest {
            id: self.id.clone(),
            kind: BackupKind::Advanced,
            method: BackupMethod::Advance,
            parent: Some(self.parent.id.clone()),
            full_because: None,
            description: request.description.clone(),
            started: checkpoint.time,
            stopped: self.stopped(&start),
            system_id: self.parent.system_id,
            major: self.parent.major,
            server_version: self.parent.server_version.clone(),
            segment_size: self.parent.segment_size,
            data_checksums: control.has_data_checksums(),
            timeline: checkpoint.timeline,
            start_lsn: redo,
            stop_lsn: checkpoint.end,
            checkpoint_lsn: checkpoint.start,
            tablespace_map: tablespace_map_text(links),
            backup_label: files.backup_label,
            from_standby: self.parent.from_standby,
            tablespaces,
            config_files: self.parent.config_files.clone(),
            maps,
            directories: scan.directories,
            stats: ManifestStats {
                cluster_bytes: manifest_files.iter().fold(0, |sum, file| sum.saturating_add(file.bytes)),
                read_bytes,
                referred_bytes,
                stored_bytes: pack_bytes.saturating_add(map_bytes),
                copy_seconds,
                total_seconds: self.begun.elapsed().as_secs_f64(),
            },
            files: manifest_files,
            damaged_pages,
            chain,
        };
        self.to.publish(&manifest).await?;
        Ok(Backup { manifest, warnings })
    }

    fn changes(&self, e: ChangesError) -> BackupError {
        match e {
            ChangesError::Unknown(why) => self.cannot(why),
            ChangesError::Storage(e) => PublishError::from(e).into(),
        }
    }

    /// The checkpoint, as its record's index has it, and what ended before its redo point.
    async fn start(
        &self,
        catalog: &Catalog,
        line: &Lineage,
        steps: &[Step<'_>],
        checkpoint: Lsn,
    ) -> Result<Start, BackupError> {
        let archive = &self.request.archive;
        let read = async |entry: &SegmentEntry| {
            read_index(archive, &entry.path).await.map_err(|e| match e {
                ReadError::Storage(e) => PublishError::from(e).into(),
                e @ ReadError::Damaged { .. } => self.cannot(e.to_string()),
            })
        };
        let mut found = None;
        // The record may run over the segment's edge, and is then in one index or the other.
        for step in catalog.walk(line, checkpoint).into_iter().take(2) {
            let index = read(step.entry).await?;
            found = found.or_else(|| index.checkpoints.into_iter().find(|c| c.start == checkpoint));
        }
        let Some(checkpoint) = found else {
            return Err(self.cannot(format!("the archived WAL has no checkpoint at {checkpoint}")));
        };
        let mut latest = None;
        for step in steps {
            latest = latest.max(match step.usable_end <= checkpoint.redo {
                true => step.entry.info.max_time,
                false => {
                    let index = read(step.entry).await?;
                    let before = index.xacts.iter().filter(|x| x.start < checkpoint.redo);
                    before.map(|x| x.time).max()
                }
            });
        }
        let entries: Vec<&SegmentEntry> = steps.iter().map(|step| step.entry).collect();
        for open in unjoined(&entries, self.parent.start_lsn) {
            let index = join(archive, entries.get(open).unwrap_or_default()).await;
            let index = index.map_err(|e| self.changes(e))?;
            latest = latest.max(index.xacts.iter().map(|x| x.time).max());
        }
        Ok(Start { checkpoint, latest })
    }

    /// No transaction before the redo point ended at this time or later, so what a later time means lies behind it: of
    /// those before the parent's start the parent says so.
    fn stopped(&self, start: &Start) -> TimestampTz {
        let behind =
            |t: TimestampTz| TimestampTz::from_postgres_micros(t.postgres_micros().saturating_add(1));
        start.latest.map(behind).max(Some(self.parent.stopped)).unwrap_or_default().max(start.checkpoint.time)
    }

    /// Gives files that nothing was stored of the time that they had.
    fn date(&self, layered: &mut Layered, time: TimestampTz) {
        let own = u32::try_from(layered.maps.len()).unwrap_or(u32::MAX);
        let had: BTreeMap<&str, i64> =
            self.parent.files.iter().map(|f| (f.path.as_str(), f.modified)).collect();
        let seconds = time.unix_micros().div_euclid(1_000_000);
        for file in &mut layered.files {
            let kept = had.get(file.path.as_str()).filter(|_| file.extents.iter().all(|(map, _)| *map < own));
            file.modified = kept.copied().unwrap_or(seconds);
        }
    }

    /// The tablespaces that are there, and where each lay.
    fn tablespaces(&self, scan: &Scan, known: &[Tablespace]) -> Result<Vec<Tablespace>, BackupError> {
        let lay = |found: &Tablespace| {
            let known = known.iter().find(|t| t.oid == found.oid).cloned();
            known.ok_or_else(|| self.cannot(format!("nobody knows where tablespace {} lay", found.oid)))
        };
        scan.tablespaces.iter().map(lay).collect()
    }

    async fn copy_files(
        &self,
        files: &AdvancedFiles,
        control: &ControlFile,
        control_bytes: Vec<u8>,
        base: Arc<Against>,
        progress: &Arc<dyn Progress>,
    ) -> Result<(Scan, Copied), BackupError> {
        let stop = StopOnDrop(Arc::new(AtomicBool::new(false)));
        let runtime = Handle::current();
        let (to, id, progress) = (self.to.clone(), self.id.clone(), Arc::clone(progress));
        let (threads, level, stopped) = (self.request.threads, self.request.level, Arc::clone(&stop.0));
        let (data_dir, control) = (files.data_dir.clone(), *control);
        let work = move || -> Result<(Scan, Copied), BackupError> {
            let version = version_directory(control.major, control.catalog_version);
            let scan = scan(&data_dir, control.major, &version)?;
            let wanted = base.wanted(&scan);
            let sizes = scan.files.iter().zip(&wanted).map(|(f, w)| w.bytes(f.bytes));
            progress.phase("copy", Some(sizes.fold(0, u64::saturating_add)));
            // Nobody is writing any page.
            let rule = PageRule { start_lsn: Lsn::MAX, segment_blocks: control.relation_file_blocks };
            let job = CopyJob {
                archive: &to.archive,
                system: &to.system,
                id: &id,
                files: &scan.files,
                checksums: &[],
                wanted: &wanted,
                streams: &[],
                pages: control.has_data_checksums().then_some(rule),
                threads,
                level,
                progress: &*progress,
                stop: &stopped,
            };
            let read = || Ok(control_bytes.clone());
            let last = scan.files.iter().position(|file| file.path == CONTROL_FILE);
            let copied = copy(&job, &runtime, last.map(|file| Last { file, read: &read }))?;
            Ok((scan, copied))
        };
        let copied = tokio::task::spawn_blocking(work).await.expect("copying does not panic")?;
        let gone = copied.0.files.iter().zip(&copied.1.files).find(|(_, copied)| copied.is_none());
        match gone {
            Some((file, _)) => Err(self.cannot(format!("{} has gone meanwhile", file.source.display()))),
            None => Ok(copied),
        }
    }
}

/// Ends a copy that nobody waits for any more.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

async fn read_parent(to: &Destination, id: &BackupId) -> Result<Manifest, BackupError> {
    let path = to.system.manifest(id);
    let get = async || -> Result<_, StorageError> { to.archive.get(&path, MANIFEST_BYTES_MAX).await };
    let object = get().await.map_err(PublishError::from)?;
    let decoded = tokio::task::spawn_blocking(move || Manifest::decode(&object)).await;
    let decoded = decoded.expect("a decoder does not panic");
    Ok(decoded.map_err(|source| PublishError::Damaged { path, source })?)
}
