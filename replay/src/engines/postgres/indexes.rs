//! The planner's eyes: segments' indexes out of their objects' tails, and the WAL itself where those end.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use waltide_format::archive::{
    CommitKind, FileEvent, MergedDirectory, MergedSection, NamesLog, RelationSegments, SegmentDirectory,
    SegmentEntry, SegmentIndex, Step, StoredSegment, SystemLayout, XactEnd,
};
use waltide_format::engines::postgres::catalogue::CatalogueFiles;
use waltide_format::engines::postgres::effects::xact_end;
use waltide_format::engines::postgres::wal::{
    Damage, Expected, Next, PreviousTail, Record, RecordStream, SegmentSpan, XlogRecord,
};
use waltide_format::{Corrupt, Lsn, SegmentSize, Xid};
use waltide_storage::{Archive, StorageError};

use super::covers::{Cover, Covers, Listing};
use super::fetch::SEGMENT_OBJECT_BYTES_MAX;
use super::merged::may_end;
use crate::log::{Question, WantedRelations};
use crate::resolve::{Events, Source};

/// Most indexes lie in this much of their object's end.
const TAIL_BYTES: u64 = 64 << 10;

/// Why a segment could not be searched.
#[derive(Debug, thiserror::Error)]
pub enum SearchError {
    /// The archive failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The object is damaged.
    #[error("{path} is damaged\nhint: run `waltide verify`")]
    Damaged {
        /// The object.
        path: String,
        /// What is wrong with it.
        source: Corrupt,
    },
    /// The WAL in it is damaged.
    #[error("the WAL in {path} is damaged\nhint: run `waltide verify`")]
    Wal {
        /// The object.
        path: String,
        /// What is wrong with it.
        source: Damage,
    },
}

impl SearchError {
    /// Whether the archive is at fault, rather than the way to it.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Storage(e) => matches!(
                e,
                StorageError::NotFound { .. }
                    | StorageError::TooLarge { .. }
                    | StorageError::OutOfRange { .. }
            ),
            Self::Damaged { .. } | Self::Wal { .. } => true,
        }
    }
}

/// What a merged index tells the log, of all its segments.
#[derive(Debug)]
pub(super) struct MergedSigns {
    /// Ends of transactions: all, or those with which relations go.
    pub(super) ends: Vec<XactEnd>,
    /// What happened to files.
    pub(super) events: Vec<FileEvent>,
    /// Which segments touch the relations that are asked for.
    pub(super) touched: Vec<RelationSegments>,
}

/// Reads indexes out of an archive.
#[derive(Debug, Clone)]
pub struct ArchivedIndexes {
    archive: Archive,
    merged: Option<SystemLayout>,
    listing: Listing,
}

impl ArchivedIndexes {
    /// Those of the segments in `archive`.
    pub fn new(archive: Archive) -> Self {
        Self { archive, merged: None, listing: Listing::default() }
    }

    /// The same, which asks the system's merged indexes first where those spare reading segments.
    #[must_use]
    pub fn with_merged(self, names: SystemLayout) -> Self {
        Self { merged: Some(names), ..self }
    }

    /// A segment's index.
    pub(crate) async fn index(&self, entry: &SegmentEntry) -> Result<SegmentIndex, SearchError> {
        let path = &entry.path;
        let read = self.archive.read_end(path, TAIL_BYTES, SegmentDirectory::with_index).await?;
        let (_, index) = read.map_err(|source| SearchError::Damaged { path: path.clone(), source })?;
        Ok(index)
    }

    /// A list out of the indexes of those steps that merged indexes tell of; one that every step of those has.
    pub(super) async fn merged_lists(
        &self,
        steps: &[&Step<'_>],
        section: MergedSection,
    ) -> Result<Vec<Cover<SegmentIndex>>, SearchError> {
        let Some(layout) = &self.merged else { return Ok(Vec::new()) };
        let covers = self.covers(layout, steps, false);
        let read = move |directory: &MergedDirectory, stored: &[Vec<u8>]| {
            let stored = stored.first().map(Vec::as_slice).unwrap_or_default();
            directory.read_lists(&[(section, stored)]).map(Some)
        };
        covers.find(&[section], read, |_, _| true).await
    }

    /// What was running, and what happened to files, of those steps that merged indexes of the first step tell of.
    pub(super) async fn merged_horizons(
        &self,
        steps: &[&Step<'_>],
    ) -> Result<Vec<Cover<SegmentIndex>>, SearchError> {
        let Some(layout) = &self.merged else { return Ok(Vec::new()) };
        let sections = [MergedSection::RunningXacts, MergedSection::Checkpoints, MergedSection::FileEvents];
        let read = move |directory: &MergedDirectory, stored: &[Vec<u8>]| {
            let parts: Vec<_> = sections.into_iter().zip(stored.iter().map(Vec::as_slice)).collect();
            directory.read_lists(&parts).map(Some)
        };
        self.covers(layout, steps, true).find(&sections, read, |_, _| true).await
    }

    fn covers<'a>(&'a self, layout: &'a SystemLayout, steps: &'a [&'a Step<'a>], whole: bool) -> Covers<'a> {
        Covers { archive: &self.archive, layout, steps, whole, listing: &self.listing }
    }

    /// How many of these steps merged indexes tell of, by their names.
    pub(super) async fn merged_count(&self, steps: &[&Step<'_>]) -> Result<usize, SearchError> {
        let Some(layout) = &self.merged else { return Ok(0) };
        self.covers(layout, steps, false).count().await
    }

    /// What the log asks for of those steps that merged indexes tell of.
    pub(super) async fn merged_signs(
        &self,
        steps: &[&Step<'_>],
        question: &Question,
    ) -> Result<Vec<Cover<MergedSigns>>, SearchError> {
        let Some(layout) = &self.merged else { return Ok(Vec::new()) };
        let covers = self.covers(layout, steps, question.databases);
        let ends = if question.databases { MergedSection::Xacts } else { MergedSection::Drops };
        let mut sections = vec![ends, MergedSection::FileEvents];
        sections.extend(question.relations.as_ref().map(|_| MergedSection::Relations));
        let wanted = question.relations.clone();
        let read = move |directory: &MergedDirectory, stored: &[Vec<u8>]| {
            let [drops, events, relations @ ..] = stored else { return Ok(None) };
            let lists = match ends {
                MergedSection::Xacts => vec![(ends, &drops[..]), (MergedSection::FileEvents, &events[..])],
                _ => vec![(MergedSection::FileEvents, &events[..])],
            };
            let mut lists = directory.read_lists(&lists)?;
            if ends == MergedSection::Drops {
                lists.xacts = directory.read_drops(drops)?;
            }
            if let (MergedSection::Xacts, Some(wanted)) = (ends, &wanted) {
                lists.xacts = telling_ends(lists.xacts, wanted, directory.first.size);
            }
            let mut touched = Vec::new();
            if let (Some(wanted), Some(stored)) = (&wanted, relations.first()) {
                touched = directory.read_relations(stored)?;
                touched.retain(|relation| wanted.has(relation.relation));
            }
            Ok(Some(MergedSigns { ends: lists.xacts, events: lists.file_events, touched }))
        };
        covers.find(&sections, read, |_, _| true).await
    }

    /// A whole segment's bytes.
    pub(super) async fn wal(&self, entry: &SegmentEntry) -> Result<Vec<u8>, SearchError> {
        let object = self.object(entry).await?;
        let decode = move || StoredSegment::decode_wal(&object).map(|(_, wal)| wal);
        let decoded = tokio::task::spawn_blocking(decode).await.expect("decoding a segment does not panic");
        decoded.map_err(|source| SearchError::Damaged { path: entry.path.clone(), source })
    }

    /// A whole segment as it is stored.
    pub(super) async fn object(&self, entry: &SegmentEntry) -> Result<Bytes, SearchError> {
        Ok(self.archive.get(&entry.path, SEGMENT_OBJECT_BYTES_MAX).await?)
    }

    /// What a segment says about names, out of its index and, where that does not tell all, out of its WAL.
    pub(super) async fn names(
        &self,
        entry: &SegmentEntry,
        index: &SegmentIndex,
        files: &CatalogueFiles,
    ) -> Result<NamesLog, SearchError> {
        let wal = match NamesLog::needs_wal(index, files) {
            true => match self.names_at_edges(entry, index, files).await? {
                Some(log) => return Ok(log),
                None => Some(self.wal(entry).await?),
            },
            false => None,
        };
        let (index, files) = (index.clone(), files.clone());
        let read = move || NamesLog::of_segment(&index, wal.as_deref(), &files);
        let read = tokio::task::spawn_blocking(read).await.expect("reading records does not panic");
        read.map_err(|source| SearchError::Wal { path: entry.path.clone(), source })
    }

    /// The same out of the WAL at the segment's edges; none where that is not enough.
    async fn names_at_edges(
        &self,
        entry: &SegmentEntry,
        index: &SegmentIndex,
        files: &CatalogueFiles,
    ) -> Result<Option<NamesLog>, SearchError> {
        let Some(edges) = NamesLog::edges(index, files) else { return Ok(None) };
        let damaged = |source| SearchError::Damaged { path: entry.path.clone(), source };
        let directory = self.archive.read_end(&entry.path, TAIL_BYTES, SegmentDirectory::decode).await?;
        let directory = directory.map_err(damaged)?;
        let mut wal = vec![0; usize::try_from(index.info.size.bytes()).unwrap_or(0)];
        for edge in edges.iter().filter(|edge| !edge.is_empty()) {
            let stored = self.archive.get_range(&entry.path, directory.chunks(edge)).await?;
            let (begin, bytes) = directory.read_chunks(edge, &stored).map_err(damaged)?;
            let begin = usize::try_from(begin).unwrap_or(usize::MAX);
            if let Some(place) = wal.get_mut(begin..begin.saturating_add(bytes.len())) {
                place.copy_from_slice(&bytes);
            }
        }
        let (index, files) = (index.clone(), files.clone());
        let read = move || NamesLog::of_edges(&index, &wal, &files);
        Ok(tokio::task::spawn_blocking(read).await.expect("reading records does not panic"))
    }

    /// Calls `look` with the records of `segments`, neighbours in order, until it has found something.
    pub(super) async fn records<T: Send + 'static>(
        &self,
        segments: &[&SegmentEntry],
        look: impl Fn(&Record<'_>) -> Option<T> + Clone + Send + 'static,
    ) -> Result<Option<T>, SearchError> {
        let mut tail: Option<PreviousTail> = None;
        for entry in segments {
            let wal = self.wal(entry).await?;
            let (info, look, before) = (entry.info.clone(), look.clone(), tail.take());
            let search = move || -> Result<(Option<T>, Option<PreviousTail>), Damage> {
                let start = info.name.start(info.size).unwrap_or(Lsn::MAX);
                let Some(span) = SegmentSpan::containing(start, info.size) else { return Ok((None, None)) };
                let expected = Expected { major: Some(info.major), ..Expected::default() };
                let mut stream = RecordStream::new(&wal, span, expected, before)?;
                while let Next::Record(record) = stream.next_record()? {
                    if let Some(found) = look(&record) {
                        return Ok((Some(found), None));
                    }
                }
                Ok((None, stream.into_tail()))
            };
            let searched = tokio::task::spawn_blocking(search).await.expect("reading records does not panic");
            let (found, left) =
                searched.map_err(|source| SearchError::Wal { path: entry.path.clone(), source })?;
            if found.is_some() {
                return Ok(found);
            }
            tail = left;
        }
        Ok(None)
    }
}

impl Source for ArchivedIndexes {
    type Error = SearchError;

    async fn may_end(&self, entries: &[&SegmentEntry], xid: Xid) -> Result<Vec<bool>, SearchError> {
        match &self.merged {
            Some(names) => Ok(may_end(&self.archive, names, entries, xid).await?),
            None => Ok(vec![true; entries.len()]),
        }
    }

    async fn events(&self, entry: &SegmentEntry) -> Result<Arc<Events>, SearchError> {
        Ok(Arc::new(Events::of(self.index(entry).await?)))
    }

    async fn straddler(
        &self,
        before: &SegmentEntry,
        after: &SegmentEntry,
    ) -> Result<Arc<Events>, SearchError> {
        let edge = before.info.name.end(before.info.size).unwrap_or(Lsn::MAX);
        let look = move |record: &Record<'_>| {
            let over = record.start < edge && record.end > edge;
            (over || record.start >= edge).then(|| if over { events_of(record) } else { Events::default() })
        };
        Ok(Arc::new(self.records(&[before, after], look).await?.unwrap_or_default()))
    }

    async fn record_from(
        &self,
        segments: &[&SegmentEntry],
        from: Lsn,
    ) -> Result<Option<(Lsn, Lsn)>, SearchError> {
        let look = move |record: &Record<'_>| (record.start >= from).then_some((record.start, record.end));
        self.records(segments, look).await
    }
}

/// Of the ends of transactions those with which relations go, and of each segment as many others as tell whether one in
/// the databases asked for ended in it or was prepared.
fn telling_ends(ends: Vec<XactEnd>, wanted: &WantedRelations, size: SegmentSize) -> Vec<XactEnd> {
    let mut kept: Vec<XactEnd> = Vec::new();
    // The last of a segment may run over its edge, so that the first tells of it and the last of the next.
    let mut first_of: HashSet<(Lsn, bool)> = HashSet::new();
    let mut last_of: HashMap<(Lsn, bool), XactEnd> = HashMap::new();
    for end in ends {
        if !end.dropped.is_empty() {
            kept.push(end);
        } else if end.db_oid.is_some_and(|oid| wanted.has_database(oid)) {
            let place = (size.floor(end.start), end.kind == CommitKind::Prepare);
            if first_of.insert(place) {
                kept.push(end);
            } else {
                last_of.insert(place, end);
            }
        }
    }
    kept.extend(last_of.into_values());
    kept.sort_by_key(|end| end.start);
    kept
}

/// What a target can mean by a record.
fn events_of(record: &Record<'_>) -> Events {
    let mut events = Events::default();
    if let Some(Ok(XlogRecord::RestorePoint(point))) = XlogRecord::decode(record) {
        events.restore_points.push((point.name, point.time, record.start, record.end));
    }
    if let Some(Ok(end)) = xact_end(record).filter(|end| end.as_ref().is_ok_and(|end| end.kind.is_end())) {
        events.xacts.push(end);
    }
    events
}
