//! Merging when there is time: whoever does it has something else to do, so trouble is told and is nobody's failure.

use tokio::task::JoinHandle;
use waltide_format::archive::Layout;
use waltide_storage::{Archive, NoProgress};

use super::build::{Indexed, MergeError, Merging};
use crate::catalog::{CatalogError, Known, load};

/// After so many new segments there may be another step to make.
const WORTH_IT: u64 = 16;

#[derive(Debug, thiserror::Error)]
#[error(transparent)]
enum IdleError {
    Catalog(#[from] CatalogError),
    Merge(#[from] MergeError),
}

/// Makes the merged indexes that are missing.
pub async fn catch_up(archive: &Archive, layout: &Layout, threads: usize) {
    match make(archive, layout, threads).await {
        Ok(indexed) if indexed.made.is_empty() => {}
        Ok(indexed) => tracing::info!("{} merged indexes made", indexed.made.len()),
        Err(e) => tracing::warn!("no merged indexes made, the next run does it: {e}"),
    }
}

async fn make(archive: &Archive, layout: &Layout, threads: usize) -> Result<Indexed, IdleError> {
    let catalog = load(archive, layout, None, Known::Merged, threads).await?;
    let progress = &NoProgress;
    let merging = Merging { archive, layout, catalog: &catalog, rebuild: false, threads, progress };
    Ok(merging.run().await?)
}

/// Merges beside other work, once at first and then whenever enough has come.
#[derive(Debug)]
pub(crate) struct IdleMerge {
    archive: Archive,
    layout: Layout,
    shipped: Option<u64>,
    running: Option<JoinHandle<()>>,
}

impl IdleMerge {
    pub(crate) const fn new(archive: Archive, layout: Layout) -> Self {
        Self { archive, layout, shipped: None, running: None }
    }

    /// There is time now, and `shipped` segments have come since the beginning.
    pub(crate) fn look(&mut self, shipped: u64) {
        let is_running = self.running.as_ref().is_some_and(|running| !running.is_finished());
        let is_due = self.shipped.is_none_or(|then| shipped.saturating_sub(then) >= WORTH_IT);
        if is_due && !is_running {
            self.shipped = Some(shipped);
            let (archive, layout) = (self.archive.clone(), self.layout.clone());
            self.running = Some(tokio::spawn(async move { catch_up(&archive, &layout, 1).await }));
        }
    }
}

impl Drop for IdleMerge {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            running.abort();
        }
    }
}
