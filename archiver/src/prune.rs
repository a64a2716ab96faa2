//! Carries a prune plan out: mark, wait, look again, then delete what is still free to go.
//!
//! Killed at any point it leaves nothing half visible: manifests go first, then what nothing refers to any more, WAL
//! from its old end. What is left over is found by the next prune.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Serialize;
use waltide_format::archive::{Catalog, Envelope, Keep, Layout, ObjectKind, PruneMark, StartedBackup};
use waltide_format::{BackupId, TimestampTz};
use waltide_storage::{Archive, CatalogueCache, Leftover, Progress, Put, StorageError};

use crate::catalog::{BackupObject, CatalogError, backup_object};
use crate::host;
use crate::inventory::{being_pruned, survey};
use crate::retention::{Deletion, ObjectRole, Policy, PrunePlan, plan};

/// Why a prune stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PruneError {
    /// The catalogue cannot be read.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// The archive failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PruneReport {
    /// The plan, as it was carried out: after the second look.
    pub plan: PrunePlan,
    /// Objects that were planned to go and stayed, because something came to need them.
    pub spared: Vec<String>,
    /// How many objects went.
    pub deleted: u64,
    /// How many bytes.
    pub freed_bytes: u64,
    /// Unfinished files of killed writers that went.
    pub swept: Vec<String>,
}

/// Where and how a prune works.
#[derive(Debug)]
pub struct Pruning<'a> {
    /// The archive.
    pub archive: &'a Archive,
    /// The cluster.
    pub layout: &'a Layout,
    /// The system, or the newest.
    pub system: Option<waltide_format::SystemId>,
    /// The catalogue cache.
    pub cache: Option<&'a CatalogueCache>,
    /// How many objects are read at a time.
    pub threads: usize,
}

fn running(started: &StartedBackup) -> Option<bool> {
    host::is_running(&started.host, started.pid)
}

impl Pruning<'_> {
    /// What would go at `now`.
    pub async fn plan(&self, policy: &Policy, now: TimestampTz) -> Result<PrunePlan, PruneError> {
        let (catalog, inventory) =
            survey(self.archive, self.layout, self.system, self.cache, self.threads).await?;
        Ok(plan(&catalog, &inventory, policy, now, running))
    }

    /// The unfinished files of killed writers that would go.
    pub async fn leftovers(&self, policy: &Policy, dry_run: bool) -> Result<Vec<String>, PruneError> {
        let swept = self.archive.sweep(&self.layout.prefix(), policy.give_up_after, dry_run).await?;
        Ok(swept.into_iter().map(|Leftover { path, .. }| path).collect())
    }

    /// Announces `first`, waits for `grace`, looks again, and deletes what is in the plan both times.
    pub async fn carry_out(
        &self,
        first: &PrunePlan,
        policy: &Policy,
        grace: Duration,
        progress: &dyn Progress,
    ) -> Result<PruneReport, PruneError> {
        let mark = self.announce(first).await?;
        let done = self.after_mark(first, policy, grace, progress).await;
        // A mark that stays holds up pins and incrementals until the next prune, so it goes whatever happened.
        let unmarked = match &mark {
            Some(path) => self.archive.delete(path).await,
            None => Ok(()),
        };
        let report = done?;
        unmarked?;
        Ok(report)
    }

    async fn announce(&self, plan: &PrunePlan) -> Result<Option<String>, PruneError> {
        let backups: Vec<BackupId> = plan.removed().chain(&plan.interrupted).cloned().collect();
        if backups.is_empty() {
            return Ok(None);
        }
        let mark = PruneMark { started: plan.now, host: host::name(), pid: std::process::id(), backups };
        let bytes = Envelope::seal_json(ObjectKind::Json, &mark);
        let names = self.layout.system(plan.system_id);
        // Two prunes of one process in one second need two names.
        for n in 0u32..=u32::MAX {
            let path = names.prune_mark(&format!("{}-{}-{n}", plan.now.compact(), std::process::id()));
            if self.archive.put_new(&path, bytes.clone().into()).await? == Put::Created {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    async fn after_mark(
        &self,
        first: &PrunePlan,
        policy: &Policy,
        grace: Duration,
        progress: &dyn Progress,
    ) -> Result<PruneReport, PruneError> {
        tokio::time::sleep(grace).await;
        let (catalog, inventory) =
            survey(self.archive, self.layout, Some(first.system_id), self.cache, self.threads).await?;
        let mut second = plan(&catalog, &inventory, policy, first.now, running);
        let planned: BTreeSet<&str> = first.deletions.iter().map(|d| d.path.as_str()).collect();
        second.deletions.retain(|d| planned.contains(d.path.as_str()));
        let listed: BTreeSet<&BackupId> = inventory.backups.iter().map(|(id, _, _)| id).collect();

        let mut report =
            PruneReport { plan: second, spared: Vec::new(), deleted: 0, freed_bytes: 0, swept: Vec::new() };
        let (visible, rest): (Vec<Deletion>, Vec<Deletion>) =
            report.plan.deletions.iter().cloned().partition(|d| {
                matches!(d.role, ObjectRole::Manifest | ObjectRole::Started | ObjectRole::Keep)
            });
        progress.phase("prune", Some(report.plan.freed_bytes()));
        self.delete(&visible, &mut report, progress).await?;
        // A backup that came while manifests went may refer to what they referred to.
        let names = self.layout.system(catalog.system.system_id);
        let now = self.archive.list(&names.backups()).await?;
        let newcomer = |path: &str| {
            let part = backup_object(&names, path);
            part.is_some_and(|(id, part)| part != BackupObject::Keep && !listed.contains(&id))
        };
        let rest = match now.iter().find(|o| newcomer(&o.path)) {
            None => rest,
            Some(object) => {
                let text = format!("{} came meanwhile: data stays until the next prune", object.path);
                report.plan.held_back.push(text);
                Vec::new()
            }
        };
        self.delete(&rest, &mut report, progress).await?;
        let gone: BTreeSet<&str> = visible.iter().chain(&rest).map(|d| d.path.as_str()).collect();
        report.spared = planned.into_iter().filter(|p| !gone.contains(p)).map(str::to_owned).collect();
        report.plan.deletions.retain(|d| gone.contains(d.path.as_str()));
        report.swept = self.leftovers(policy, false).await?;
        Ok(report)
    }

    /// One after the other, so that whatever stops it leaves an old end without a hole.
    async fn delete(
        &self,
        deletions: &[Deletion],
        report: &mut PruneReport,
        progress: &dyn Progress,
    ) -> Result<(), StorageError> {
        for deletion in deletions {
            self.archive.delete(&deletion.path).await?;
            report.deleted = report.deleted.saturating_add(1);
            report.freed_bytes = report.freed_bytes.saturating_add(deletion.bytes);
            progress.advance(deletion.bytes);
        }
        Ok(())
    }
}

/// Why a backup could not be pinned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeepError {
    /// A prune is removing it, or has.
    #[error("backup {0} is being removed by a prune")]
    BeingPruned(BackupId),
    /// It is pinned in another way.
    #[error("backup {0} is pinned already, {1}")]
    Pinned(BackupId, String),
    /// The archive failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// Pins a backup against retention. The pin is written first and prunes are looked for afterwards: a prune does it
/// the other way round, so that one of the two sees the other.
pub async fn keep(
    archive: &Archive,
    layout: &Layout,
    catalog: &Catalog,
    id: &BackupId,
    pin: &Keep,
) -> Result<(), KeepError> {
    let names = layout.system(catalog.system.system_id);
    let path = names.keep(id);
    let there = catalog.backup(id).and_then(|b| b.keep.as_ref());
    if let Some(found) = there.filter(|found| found.standalone != pin.standalone) {
        let how = if found.standalone { "without the WAL behind its end" } else { "with all WAL from it on" };
        return Err(KeepError::Pinned(id.clone(), how.to_owned()));
    }
    let put = archive.put_new(&path, Envelope::seal_json(ObjectKind::Json, pin).into()).await?;
    let pruned = being_pruned(archive, layout, catalog.system.system_id, pin.since).await?.contains(id);
    if pruned || archive.head(&names.manifest(id)).await?.is_none() {
        if put == Put::Created {
            archive.delete(&path).await?;
        }
        return Err(KeepError::BeingPruned(id.clone()));
    }
    Ok(())
}

/// Takes a pin away; says whether there was one.
pub async fn release(
    archive: &Archive,
    layout: &Layout,
    catalog: &Catalog,
    id: &BackupId,
) -> Result<bool, StorageError> {
    let path = layout.system(catalog.system.system_id).keep(id);
    let there = archive.head(&path).await?.is_some();
    archive.delete(&path).await?;
    Ok(there)
}
