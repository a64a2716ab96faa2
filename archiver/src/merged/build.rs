//! Makes the merged indexes that an archive can have and does not have yet.
//!
//! Objects appear whole or not at all and are never replaced, so several builders at once, and builders that are killed,
//! do no harm: at worst the same is made twice, and one of the two is kept.

use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use serde::Serialize;
use waltide_format::Corrupt;
use waltide_format::archive::{
    Catalog, ChainLink, Layout, MERGE_BUILDER, MERGE_STEPS, MergeGroup, MergedIndex, MergedName,
    MergedObject, NamesLog, SegmentDirectory, SegmentEntry, SegmentIndex, SystemLayout,
};
use waltide_format::engines::postgres::catalogue::CatalogueFiles;
use waltide_storage::{Archive, Bytes, Progress, Put, StorageError};

use crate::stored_segments::{ReadError, read_stored};

use super::chain::anchors;
use super::read::{ListedIndex, get, list};

/// Most indexes lie in this much of their object's end.
const TAIL_BYTES: u64 = 64 << 10;
/// Indexes read at once for one group.
const AT_ONCE: usize = 8;
/// Segments' WAL read at once for one group.
const WALS_AT_ONCE: usize = 2;

/// Why the builder stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// The archive failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// What the builder works on.
#[allow(missing_debug_implementations)] // a dyn Progress has none
pub struct Merging<'a> {
    /// The archive.
    pub archive: &'a Archive,
    /// The cluster.
    pub layout: &'a Layout,
    /// What it holds.
    pub catalog: &'a Catalog,
    /// Whether what is there is read, and made once more where it is damaged.
    pub rebuild: bool,
    /// How many groups are worked on at a time.
    pub threads: usize,
    /// Who wants to know how far it is.
    pub progress: &'a dyn Progress,
}

/// What a builder did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Indexed {
    /// Merged indexes that were made.
    pub made: Vec<MadeIndex>,
    /// Merged indexes that were there already.
    pub present: u64,
    /// Merged indexes that were there, damaged, and have been made once more.
    pub damaged: Vec<String>,
    /// Those that could not be made.
    pub skipped: Vec<SkippedIndex>,
}

/// A merged index that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MadeIndex {
    /// Its name.
    pub path: String,
    /// How many segments it covers.
    pub segments: u64,
    /// Its length.
    pub stored_bytes: u64,
}

/// A merged index that could not be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SkippedIndex {
    /// The object in the way.
    pub path: String,
    /// What is wrong with it.
    pub reason: String,
}

/// An object that keeps a group from being made.
type InTheWay = SkippedIndex;

/// What became of a group.
enum Done {
    Made(MadeIndex),
    Present,
    Skipped(SkippedIndex),
}

impl Merging<'_> {
    /// Makes what is missing, lower steps first, since higher ones are made of them.
    pub async fn run(&self) -> Result<Indexed, MergeError> {
        let names = self.layout.system(self.catalog.system.system_id);
        let mut listed = list(self.archive, &names).await?;
        let anchors = anchors(self.archive, self.catalog, &listed).await?;
        let groups = self.catalog.merge_groups(&anchors);
        let mut indexed = Indexed::default();
        self.progress.phase("index", None);
        for step in MERGE_STEPS {
            let of_step = groups.iter().filter(|g| g.name.step == step);
            let mut jobs = Vec::new();
            for group in of_step {
                let name = match self.missing(&names, group, &listed, &mut indexed).await? {
                    Some(name) => name,
                    None => {
                        indexed.present = indexed.present.saturating_add(1);
                        continue;
                    }
                };
                jobs.push(self.group(&names, group, name, &listed));
            }
            let done: Vec<Done> =
                stream::iter(jobs).buffer_unordered(self.threads.clamp(1, 64)).try_collect().await?;
            let before = indexed.made.len();
            for done in done {
                match done {
                    Done::Made(made) => indexed.made.push(made),
                    Done::Present => indexed.present = indexed.present.saturating_add(1),
                    Done::Skipped(skipped) => indexed.skipped.push(skipped),
                }
            }
            if indexed.made.len() > before {
                listed = list(self.archive, &names).await?;
            }
        }
        indexed.made.sort_by(|a, b| a.path.cmp(&b.path));
        indexed.skipped.sort_by(|a, b| a.path.cmp(&b.path));
        indexed.skipped.dedup();
        Ok(indexed)
    }

    /// The name under which a group is to be made; none where a good object of it is there.
    async fn missing(
        &self,
        names: &SystemLayout,
        group: &MergeGroup<'_>,
        listed: &[ListedIndex],
        indexed: &mut Indexed,
    ) -> Result<Option<MergedName>, MergeError> {
        let same = |l: &&ListedIndex| {
            l.name.is_same_range(&group.name)
                && l.name.key == group.name.key
                && l.name.builder >= MERGE_BUILDER
        };
        let Some(newest) = listed.iter().filter(same).max_by_key(|l| (l.name.builder, l.name.generation))
        else {
            return Ok(Some(group.name));
        };
        if !self.rebuild || self.object(group, newest).await?.is_some() {
            return Ok(None);
        }
        indexed.damaged.push(names.merged_index(&newest.name));
        let generation = newest.name.generation.saturating_add(1);
        Ok(Some(MergedName { generation, builder: MERGE_BUILDER, ..group.name }))
    }

    async fn group(
        &self,
        names: &SystemLayout,
        group: &MergeGroup<'_>,
        name: MergedName,
        listed: &[ListedIndex],
    ) -> Result<Done, MergeError> {
        let index = match self.of_step(&group.entries, group.name.step, listed).await? {
            Ok(index) => index,
            Err(in_the_way) => return Ok(Done::Skipped(in_the_way)),
        };
        let object = MergedObject { builder: MERGE_BUILDER, chain: group.chain, index };
        let bytes = tokio::task::spawn_blocking(move || Bytes::from(object.encode())).await;
        let bytes = bytes.expect("an encoder does not panic");
        let path = names.merged_index(&name);
        let stored_bytes = bytes.len() as u64;
        self.progress.advance(stored_bytes);
        Ok(match self.archive.put_new(&path, bytes).await? {
            Put::Created => Done::Made(MadeIndex { path, segments: name.step, stored_bytes }),
            // Another builder was faster.
            Put::Exists => Done::Present,
        })
    }

    /// What segments of a step say together: out of the steps below as far as they are there and good, else out of the
    /// segments. The same comes out either way: of each sixteen those ends are kept that concern names there.
    fn of_step<'s>(
        &'s self,
        entries: &'s [&'s SegmentEntry],
        step: u64,
        listed: &'s [ListedIndex],
    ) -> BoxFuture<'s, Result<Result<MergedIndex, InTheWay>, MergeError>> {
        Box::pin(async move {
            let below = MERGE_STEPS.into_iter().take_while(|below| *below < step).last();
            let Some((below, count)) = below.and_then(|b| Some((b, usize::try_from(b).ok()?))) else {
                return self.of_segments(entries).await;
            };
            let mut parts = Vec::new();
            for entries in entries.chunks(count) {
                let part = match self.part(entries, listed).await? {
                    Some(part) => part,
                    None => match self.of_step(entries, below, listed).await? {
                        Ok(part) => part,
                        Err(in_the_way) => return Ok(Err(in_the_way)),
                    },
                };
                parts.push(part.reduced());
            }
            Ok(merged(parts, entries).await)
        })
    }

    /// The object of the step below that covers `entries`, if it is good.
    async fn part(
        &self,
        entries: &[&SegmentEntry],
        listed: &[ListedIndex],
    ) -> Result<Option<MergedIndex>, MergeError> {
        let Some(links) = entries.iter().map(|e| ChainLink::of(e)).collect::<Option<Vec<_>>>() else {
            return Ok(None);
        };
        let key = MergedName::key_of(self.catalog.system.system_id, &links);
        let first = links.first().map(|link| link.name);
        let same = |l: &&ListedIndex| {
            Some(l.name.first) == first
                && l.name.step == links.len() as u64
                && l.name.key == key
                && l.name.builder >= MERGE_BUILDER
        };
        let newest = listed.iter().filter(same).max_by_key(|l| (l.name.builder, l.name.generation));
        let Some(newest) = newest else { return Ok(None) };
        self.read(newest, links).await
    }

    /// A group's object that is there; none where it is damaged, or not what its name says.
    async fn object(
        &self,
        group: &MergeGroup<'_>,
        listed: &ListedIndex,
    ) -> Result<Option<MergedIndex>, MergeError> {
        let links: Vec<_> = group.entries.iter().filter_map(|e| ChainLink::of(e)).collect();
        self.read(listed, links).await
    }

    async fn read(
        &self,
        listed: &ListedIndex,
        links: Vec<ChainLink>,
    ) -> Result<Option<MergedIndex>, MergeError> {
        Ok(get(self.archive, &listed.object.path, &links).await?)
    }

    async fn of_segments(
        &self,
        entries: &[&SegmentEntry],
    ) -> Result<Result<MergedIndex, InTheWay>, MergeError> {
        let jobs: Vec<_> = entries.iter().map(|entry| self.segment(entry)).collect();
        let read: Vec<Result<ReadSegment<'_>, InTheWay>> =
            stream::iter(jobs).buffered(AT_ONCE).try_collect().await?;
        let read = match read.into_iter().collect::<Result<Vec<_>, _>>() {
            Ok(read) => read,
            Err(in_the_way) => return Ok(Err(in_the_way)),
        };
        let jobs: Vec<_> = read.into_iter().map(|segment| self.with_names(segment)).collect();
        let parts: Vec<MergedIndex> = stream::iter(jobs).buffered(WALS_AT_ONCE).try_collect().await?;
        Ok(merged(parts, entries).await.map(MergedIndex::narrowed))
    }

    async fn segment<'e>(
        &self,
        entry: &'e SegmentEntry,
    ) -> Result<Result<ReadSegment<'e>, InTheWay>, MergeError> {
        let path = &entry.path;
        let skipped = |reason: String| Ok(Err(SkippedIndex { path: path.clone(), reason }));
        let read = self.archive.read_end(path, TAIL_BYTES, |tail, size| {
            let found = SegmentDirectory::with_index(tail, size)?;
            Ok::<_, Corrupt>(found.map(|(directory, index)| (index, directory.digest, size)))
        });
        let (index, digest, stored_bytes) = match read.await {
            Ok(Ok(found)) => found,
            Ok(Err(e)) => return skipped(e.to_string()),
            Err(e) if e.is_not_found() || e.is_bad_object() => return skipped(e.to_string()),
            Err(e) => return Err(e.into()),
        };
        let found = ChainLink { name: index.info.name, digest, valid_end: index.info.valid_end };
        if Some(found) != ChainLink::of(entry) {
            return skipped("it has changed since the catalogue was read".to_owned());
        }
        Ok(Ok(ReadSegment { path, index, digest, stored_bytes }))
    }

    async fn with_names(&self, segment: ReadSegment<'_>) -> Result<MergedIndex, MergeError> {
        let names = self.names(segment.path, &segment.index).await;
        let names = match names {
            Ok(names) => Some(names),
            Err(ReadError::Storage(e)) if !e.is_not_found() && !e.is_bad_object() => return Err(e.into()),
            // Names are an extra, and verify tells of the segment.
            Err(e) => {
                tracing::warn!("names are not merged: {e}");
                None
            }
        };
        let ReadSegment { path, index, digest, stored_bytes } = segment;
        Ok(MergedIndex::of_segment(index, stored_bytes, digest, path.contains('@'), names))
    }

    /// What a segment says about names.
    async fn names(&self, path: &str, index: &SegmentIndex) -> Result<NamesLog, ReadError> {
        let files = CatalogueFiles::default();
        let wal = match NamesLog::needs_wal(index, &files) {
            true => Some(read_stored(self.archive, path).await?.wal),
            false => None,
        };
        let (index, path) = (index.clone(), path.to_owned());
        let read = move || {
            let names = NamesLog::of_segment(&index, wal.as_deref(), &files);
            names.map_err(|damage| ReadError::Damaged { path, source: damage.corrupt })
        };
        tokio::task::spawn_blocking(read).await.expect("reading records does not panic")
    }
}

/// A segment as its object's end tells it.
struct ReadSegment<'a> {
    path: &'a str,
    index: SegmentIndex,
    digest: [u8; 32],
    stored_bytes: u64,
}

async fn merged(parts: Vec<MergedIndex>, of: &[&SegmentEntry]) -> Result<MergedIndex, InTheWay> {
    let merge = move || MergedIndex::merge(parts);
    let merged = tokio::task::spawn_blocking(merge).await.expect("merging does not panic");
    let path = of.first().map(|entry| entry.path.clone()).unwrap_or_default();
    let reason = "its index and those that follow do not speak of neighbours".to_owned();
    merged.ok_or(SkippedIndex { path, reason })
}
