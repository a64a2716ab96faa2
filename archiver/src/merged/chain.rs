//! Where hash chains begin, and what a manifest keeps of them.

use std::path::Path;

use waltide_format::archive::{BackupChain, Catalog, ChainHead, Layout};
use waltide_format::{Lsn, TimelineId};
use waltide_storage::{Archive, CatalogueCache, StorageError};

use super::read::{ListedIndex, list, summary};
use crate::catalog::{CatalogError, load};

/// Heads that were written down where a run begins now: prune may have removed what came before.
pub(super) async fn anchors(
    archive: &Archive,
    catalog: &Catalog,
    listed: &[ListedIndex],
) -> Result<Vec<ChainHead>, StorageError> {
    let size = catalog.system.segment_size;
    let mut begins = Vec::new();
    for line in catalog.lines() {
        let firsts =
            catalog.runs(&line).into_iter().filter_map(|r| r.steps.first().map(|s| s.entry.info.name));
        begins.extend(firsts);
    }
    begins.sort_unstable();
    begins.dedup();
    // One that ends right before, or that covers what is gone and what is there.
    let near = |l: &&ListedIndex| {
        let ends = l.name.last.end(size);
        begins.iter().any(|b| {
            let start = b.start(size);
            l.name.first.timeline() == b.timeline() && l.name.first.start(size) <= start && ends >= start
        })
    };
    let mut anchors: Vec<_> = catalog.manifest_heads().map(|(_, head)| head).collect();
    for listed in listed.iter().filter(near) {
        match summary(archive, listed).await {
            Ok(Ok(found)) => anchors.extend(catalog.merged_heads(&found)),
            Ok(Err(e)) => tracing::warn!("{} is damaged: {e}", listed.object.path),
            Err(e) if e.is_not_found() || e.is_bad_object() => {}
            Err(e) => return Err(e),
        }
    }
    Ok(anchors)
}

/// What a backup's chain is told out of.
#[derive(Debug)]
pub(crate) struct Chaining<'a> {
    pub(crate) archive: &'a Archive,
    pub(crate) layout: &'a Layout,
    pub(crate) threads: usize,
}

impl Chaining<'_> {
    /// The chain over a backup's WAL, which is archived; where it cannot be told that is a warning, for the backup is
    /// good without it.
    pub(crate) async fn of_backup(
        &self,
        cache: Option<&Path>,
        timeline: TimelineId,
        start: Lsn,
        stop: Lsn,
    ) -> Option<BackupChain> {
        let told = self.tell(cache, timeline, start, stop).await;
        told.unwrap_or_else(|e| {
            tracing::warn!("the manifest keeps no hash chain: {e}");
            None
        })
    }

    async fn tell(
        &self,
        cache: Option<&Path>,
        timeline: TimelineId,
        start: Lsn,
        stop: Lsn,
    ) -> Result<Option<BackupChain>, CatalogError> {
        let cache = cache.map(CatalogueCache::open);
        let catalog = load(self.archive, self.layout, None, cache.as_ref(), self.threads).await?;
        let listed = list(self.archive, &self.layout.system(catalog.system.system_id)).await?;
        let anchors = anchors(self.archive, &catalog, &listed).await?;
        Ok(catalog.backup_chain(timeline, start, stop, &anchors))
    }
}
