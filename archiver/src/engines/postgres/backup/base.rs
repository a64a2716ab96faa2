//! Finds the parent of an incremental, waits for the WAL since then, and reads from it what has changed.

use waltide_format::archive::{BackupEntry, BackupKind, Catalog, Manifest};
use waltide_format::engines::postgres::changes::ChangedBlocks;
use waltide_format::engines::postgres::cluster::ControlFile;
use waltide_format::{Lsn, TimestampTz};
use waltide_storage::{CatalogueCache, Progress};

use super::super::publish::{Destination, PublishError};
use super::super::wanted::touch_damaged;
use super::changes::{ChangesError, changed_blocks};
use super::parent::{Cover, Here, choose, cover, needed_end, unfit_for_start};
use super::server::Server;
use super::{BackupError, BackupRequest};
use crate::catalog::{MANIFEST_BYTES_MAX, load_settled};
use crate::inventory::being_pruned;
use crate::stored_segments::{ReadError, read_index};

/// What an incremental is made against, or why a full is made.
pub(super) type Found<T> = Result<T, String>;

/// What an incremental needs to know before it reads a file.
#[derive(Debug)]
pub(super) struct Base {
    pub(super) parent: Manifest,
    pub(super) changed: ChangedBlocks,
}

/// Looks for parents and for WAL.
pub(super) struct Search<'a> {
    pub(super) request: &'a BackupRequest,
    pub(super) to: &'a Destination,
    pub(super) server: &'a Server,
    pub(super) progress: &'a dyn Progress,
}

impl Search<'_> {
    async fn catalog(&self, control: &ControlFile) -> Result<Catalog, BackupError> {
        let cache = self.request.cache.as_deref().map(CatalogueCache::open);
        let (archive, layout) = (&self.request.archive, &self.request.layout);
        let system = Some(control.system_id);
        Ok(load_settled(archive, layout, system, cache.as_ref(), self.request.threads).await?)
    }

    /// The parent, as far as it can be known before the backup starts.
    pub(super) async fn parent(
        &self,
        kind: BackupKind,
        control: &ControlFile,
        now: TimestampTz,
    ) -> Result<Found<BackupEntry>, BackupError> {
        let pruned = self.being_pruned(control, now).await?;
        // A server that was promoted just now may not have written its timeline into pg_control yet.
        let timeline = self.server.timeline().await?.unwrap_or(control.checkpoint_copy.timeline);
        let here = Here { timeline, data_checksums: control.has_data_checksums() };
        Ok(choose(&self.catalog(control).await?, kind, here, &pruned))
    }

    async fn being_pruned(
        &self,
        control: &ControlFile,
        now: TimestampTz,
    ) -> Result<Vec<waltide_format::BackupId>, BackupError> {
        let (archive, layout) = (&self.request.archive, &self.request.layout);
        Ok(being_pruned(archive, layout, control.system_id, now).await.map_err(PublishError::from)?)
    }

    /// What changed between the parent's start and `start`, where the new backup starts. The new backup is announced by
    /// now, so a prune that began later leaves the parent alone.
    pub(super) async fn base(
        &self,
        parent: &BackupEntry,
        control: &ControlFile,
        start: Lsn,
        now: TimestampTz,
    ) -> Result<Found<Base>, BackupError> {
        let id = &parent.head.id;
        if self.being_pruned(control, now).await?.contains(id) {
            return Ok(Err(format!("backup {id} is being removed by a prune")));
        }
        let manifest = match self.manifest(parent).await? {
            Ok(manifest) => manifest,
            Err(why) => return Ok(Err(why)),
        };
        if let Some(why) = unfit_for_start(&manifest, start) {
            return Ok(Err(why));
        }
        let until = needed_end(start, self.to.segment_size);
        let mut changed = match self.changed(&manifest, control, until).await? {
            Ok(changed) => changed,
            Err(why) => return Ok(Err(why)),
        };
        touch_damaged(&manifest, &mut changed, control.relation_file_blocks);
        Ok(Ok(Base { parent: manifest, changed }))
    }

    async fn manifest(&self, parent: &BackupEntry) -> Result<Found<Manifest>, BackupError> {
        let id = &parent.head.id;
        let object = match self.to.archive.get(&self.to.system.manifest(id), MANIFEST_BYTES_MAX).await {
            Ok(object) => object,
            Err(e) if e.is_not_found() => return Ok(Err(format!("backup {id} has just been removed"))),
            Err(e) if e.is_bad_object() => return Ok(Err(e.to_string())),
            Err(e) => return Err(PublishError::from(e).into()),
        };
        let decoded = tokio::task::spawn_blocking(move || Manifest::decode(&object)).await;
        let manifest = match decoded.expect("a decoder does not panic") {
            Ok(manifest) => manifest,
            Err(e) => return Ok(Err(format!("the manifest of backup {id} is damaged: {e}"))),
        };
        for name in &manifest.maps {
            let path = self.to.system.map(name);
            if self.to.archive.head(&path).await.map_err(PublishError::from)?.is_none() {
                return Ok(Err(format!("{path}, which backup {id} needs, is missing")));
            }
        }
        Ok(Ok(manifest))
    }

    async fn changed(
        &self,
        parent: &Manifest,
        control: &ControlFile,
        until: Lsn,
    ) -> Result<Found<ChangedBlocks>, BackupError> {
        let mut waited = false;
        loop {
            let catalog = self.catalog(control).await?;
            let line = catalog.lineage(control.checkpoint_copy.timeline);
            if !line.holds(parent.timeline, parent.stop_lsn) {
                let why = format!("backup {} is not in the past of timeline {}", parent.id, line.timeline);
                return Ok(Err(why));
            }
            let from = match cover(&catalog, &line, parent.start_lsn, until) {
                Cover::Broken(why) => return Ok(Err(why)),
                Cover::NotYet(from) if waited => {
                    return Ok(Err(format!("the WAL since then ends at {from}, before {until}")));
                }
                Cover::NotYet(from) => from,
                Cover::Whole(steps) => {
                    let threads = self.request.threads;
                    let archive = &self.to.archive;
                    let names = &self.to.system;
                    return match changed_blocks(archive, names, &steps, parent.start_lsn, threads).await {
                        Ok(changed) => Ok(Ok(changed)),
                        Err(ChangesError::Unknown(why)) => Ok(Err(why)),
                        Err(ChangesError::Storage(e)) => Err(PublishError::from(e).into()),
                    };
                }
            };
            waited = true;
            if !self.server.is_standby
                && until != self.to.segment_size.floor(until)
                && !self.server.switch_wal().await?
            {
                return Ok(Err(
                    "the WAL that changed blocks are read from has to be archived first, and this role may not run \
                     pg_switch_wal"
                        .to_owned(),
                ));
            }
            let timelines = [line.timeline];
            let range = (from, until);
            let patience = self.request.archive_timeout;
            match self.to.await_wal(&timelines, range, patience, self.progress, self.server).await {
                Err(PublishError::WalUnusable { path, why }) => {
                    return Ok(Err(format!("the WAL since then is not whole: {path}, {why}")));
                }
                awaited => drop(awaited?),
            }
        }
    }

    /// Whether the archived WAL is what this server wrote: it has the checkpoint that the backup starts with, at its
    /// place. Then, with nothing missing in between, the changes were this server's too.
    pub(super) async fn is_ours(
        &self,
        control: &ControlFile,
        checkpoint: Lsn,
        redo: Lsn,
    ) -> Result<bool, BackupError> {
        let catalog = self.catalog(control).await?;
        let line = catalog.lineage(control.checkpoint_copy.timeline);
        // The record may run over the segment's edge, and is then in one index or the other.
        for step in catalog.walk(&line, checkpoint).into_iter().take(2) {
            let index = match read_index(&self.to.archive, &step.entry.path).await {
                Ok(index) => index,
                Err(e) if e.is_bad_object() => return Ok(false),
                Err(ReadError::Storage(e)) => return Err(PublishError::from(e).into()),
                Err(ReadError::Damaged { .. }) => return Ok(false),
            };
            let pending = index.info.pending.is_some_and(|p| p.start == checkpoint);
            if pending || index.checkpoints.iter().any(|c| c.start == checkpoint && c.redo == redo) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
