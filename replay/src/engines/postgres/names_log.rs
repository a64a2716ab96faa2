//! The log that names are followed along, in parts: out of merged indexes as far as there are any, else segment by segment.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Range;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use waltide_format::archive::{
    CommitKind, FileEvent, MergedDirectory, MergedSection, MergedSegment, NamesLog, RelationSegments, Step,
    SystemLayout, XactEnd,
};
use waltide_format::engines::postgres::catalogue::{
    CatalogueChange, CatalogueFiles, Commit, Fates, Follower,
};
use waltide_format::engines::postgres::wal::PreviousTail;
use waltide_format::{Lsn, Xid};
use waltide_storage::Archive;

use super::covers::{Cover, Covers, Listing};
use super::indexes::{ArchivedIndexes, SearchError};

/// How many indexes are read at once.
const AT_ONCE: usize = 8;
/// How many segments' WAL is read at once.
const WALS_AT_ONCE: usize = 2;

/// A part of the log to be followed.
pub(super) struct Log<'a> {
    pub(super) archive: &'a Archive,
    pub(super) layout: &'a SystemLayout,
    /// The segments, in order.
    pub(super) steps: &'a [&'a Step<'a>],
    pub(super) from: Lsn,
    pub(super) until: Lsn,
    /// Where catalogues lie.
    pub(super) files: &'a CatalogueFiles,
}

/// What became of the transactions that matter to names.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub(super) fates: Fates,
    /// Those that were prepared, each with its global identifier where the log says it.
    pub(super) prepared: HashMap<Xid, Option<String>>,
}

/// What some of the steps say.
struct Part {
    steps: Range<usize>,
    log: NamesLog,
    /// What a merged index says of those segments; nothing of one that was read itself.
    merged: Vec<MergedSegment>,
}

/// What has been seen of transactions.
#[derive(Default)]
struct Seen {
    told: Told,
    /// Those that ended.
    ended: HashSet<Xid>,
    /// Prepared ones whose PREPARE was not met, with the end that was.
    unprepared: BTreeMap<u32, Lsn>,
}

impl Log<'_> {
    /// Gives the follower what happened, and says what became of the transactions.
    pub(super) async fn tell(&self, follower: &mut Follower) -> Result<Told, SearchError> {
        let indexes = &ArchivedIndexes::new(self.archive.clone());
        let merged = self.merged().await?;
        let alone = self.steps.len().saturating_sub(merged.iter().map(|part| part.steps.len()).sum());
        tracing::info!("names: {} merged indexes and {alone} segments to read", merged.len());
        let covered: Vec<usize> = merged.iter().flat_map(|part| part.steps.clone()).collect();
        let read = self.in_order(merged).into_iter().map(|part| async move {
            match part {
                Ok(part) => Ok((part, None)),
                Err(number) => {
                    let Some(step) = self.steps.get(number) else { return Ok((Part::none(number), None)) };
                    Ok((Part::none(number), Some((step.entry, indexes.index(step.entry).await?))))
                }
            }
        });
        let parts = stream::iter(read).buffered(AT_ONCE).map_ok(|(part, alone)| async move {
            match alone {
                None => Ok::<_, SearchError>(part),
                Some((entry, index)) => {
                    Ok(Part { log: indexes.names(entry, &index, self.files).await?, ..part })
                }
            }
        });
        let mut parts = std::pin::pin!(parts.try_buffered(WALS_AT_ONCE));
        let mut seen = Seen::default();
        let mut tail: Option<PreviousTail> = None;
        let mut last: Option<&Step<'_>> = None;
        while let Some(part) = parts.try_next().await? {
            let Some(steps) = self.steps.get(part.steps.clone()) else { break };
            let [first, ..] = steps else { continue };
            let over =
                NamesLog::over_edge(tail.take(), part.log.head.as_deref(), &first.entry.info, self.files);
            let over = over.map_err(|source| SearchError::Wal { path: first.entry.path.clone(), source })?;
            tail = over.tail;
            if let Some(last) = last {
                self.take(follower, over.log, last, &mut seen);
            }
            last = steps.last().copied();
            if let Some(last) = last {
                tail = tail.or(part.log.tail.clone());
                self.take(follower, part.log, last, &mut seen);
                self.take_open(indexes, follower, steps, &part.merged, &mut seen).await?;
            }
        }
        self.find_prepares(indexes, &covered, &mut seen).await?;
        Ok(seen.told)
    }

    fn is_here(&self, start: Lsn, last: &Step<'_>) -> bool {
        self.from <= start && start < self.until.min(last.usable_end)
    }

    /// Gives the follower what a stretch of the log says that ends with the step `last`.
    fn take(&self, follower: &mut Follower, log: NamesLog, last: &Step<'_>, seen: &mut Seen) {
        for unread in &log.unread {
            tracing::warn!("{unread}");
        }
        for xid in log.writers() {
            seen.ended.remove(&xid);
        }
        let NamesLog { changes, events, ends, .. } = log;
        self.take_changes(follower, changes, events, last);
        for end in ends {
            self.take_end(follower, end, last, seen);
        }
    }

    /// Changes and what happened to files, in the order of the log.
    fn take_changes(
        &self,
        follower: &mut Follower,
        changes: Vec<CatalogueChange>,
        events: Vec<FileEvent>,
        last: &Step<'_>,
    ) {
        let mut events = events.into_iter().filter(|e| self.is_here(e.start, last)).peekable();
        for change in changes.into_iter().filter(|c| self.is_here(c.lsn, last)) {
            while let Some(event) = events.next_if(|e| e.start <= change.lsn) {
                follower.apply_event(&event);
            }
            follower.apply(&change);
        }
        for event in events {
            follower.apply_event(&event);
        }
    }

    fn take_end(&self, follower: &Follower, end: XactEnd, last: &Step<'_>, seen: &mut Seen) {
        if !self.is_here(end.start, last) {
            return;
        }
        if !follower.concerns(end.xid) && !end.subxacts.iter().any(|xid| follower.concerns(*xid)) {
            return;
        }
        let XactEnd { kind, xid, start, end, time, subxacts, gid, .. } = end;
        if kind.is_end() {
            seen.ended.extend(std::iter::once(xid).chain(subxacts.iter().copied()));
        }
        if kind.is_commit() {
            seen.told.fates.add(Commit { xid, start, end, time }, &subxacts);
        }
        if matches!(kind, CommitKind::Prepare | CommitKind::CommitPrepared) {
            let known = seen.told.prepared.entry(xid).or_insert(None);
            *known = known.take().or(gid);
            match known {
                Some(_) => seen.unprepared.remove(&xid.get()),
                None => seen.unprepared.insert(xid.get(), start),
            };
        }
    }

    /// A merged index has the ends of those transactions that wrote what it tells. Of one that wrote earlier, or that
    /// the base shows, it says only in which segments it may have ended.
    async fn take_open(
        &self,
        indexes: &ArchivedIndexes,
        follower: &Follower,
        steps: &[&Step<'_>],
        merged: &[MergedSegment],
        seen: &mut Seen,
    ) -> Result<(), SearchError> {
        if merged.is_empty() {
            return Ok(());
        }
        let open: BTreeSet<u32> =
            follower.xids().filter(|xid| !seen.ended.contains(xid)).map(Xid::get).collect();
        let may_end = |segment: &MergedSegment| {
            segment.xids.is_some_and(|(least, greatest)| {
                least <= greatest && open.range(least..=greatest).next().is_some()
            })
        };
        let wanted = steps.iter().zip(merged).filter(|(_, segment)| may_end(segment));
        let read = wanted
            .map(|(step, _)| async move { Ok::<_, SearchError>((step, indexes.index(step.entry).await?)) });
        let mut read = stream::iter(read.collect::<Vec<_>>()).buffered(AT_ONCE);
        while let Some((step, index)) = read.try_next().await? {
            for end in index.xacts {
                self.take_end(follower, end, step, seen);
            }
        }
        Ok(())
    }

    /// Looks for the PREPAREs of transactions that wrote and were prepared under different merged indexes.
    async fn find_prepares(
        &self,
        indexes: &ArchivedIndexes,
        covered: &[usize],
        seen: &mut Seen,
    ) -> Result<(), SearchError> {
        let Some(latest) = seen.unprepared.values().max().copied() else { return Ok(()) };
        let steps = covered.iter().rev().filter_map(|n| self.steps.get(*n)).filter(|s| s.start() < latest);
        let read =
            steps.map(|step| async move { Ok::<_, SearchError>((step, indexes.index(step.entry).await?)) });
        let mut read = stream::iter(read.collect::<Vec<_>>()).buffered(AT_ONCE);
        while !seen.unprepared.is_empty()
            && let Some((step, index)) = read.try_next().await?
        {
            for end in index.xacts.into_iter().filter(|end| self.is_here(end.start, step)) {
                let before = seen.unprepared.get(&end.xid.get()).is_some_and(|lsn| end.start < *lsn);
                if before && end.kind == CommitKind::Prepare {
                    seen.told.prepared.insert(end.xid, end.gid);
                    seen.unprepared.remove(&end.xid.get());
                }
            }
        }
        Ok(())
    }

    /// The parts of all steps: merged ones, and the numbers of steps that none covers.
    fn in_order(&self, merged: Vec<Part>) -> Vec<Result<Part, usize>> {
        let mut by_start: BTreeMap<usize, Part> =
            merged.into_iter().map(|part| (part.steps.start, part)).collect();
        let (mut parts, mut next) = (Vec::new(), 0usize);
        while next < self.steps.len() {
            match by_start.remove(&next) {
                Some(part) => {
                    next = part.steps.end;
                    parts.push(Ok(part));
                }
                None => {
                    parts.push(Err(next));
                    next = next.saturating_add(1);
                }
            }
        }
        parts
    }

    /// What merged indexes say, that were made of these very segments.
    async fn merged(&self) -> Result<Vec<Part>, SearchError> {
        let mut sections = vec![MergedSection::Names];
        sections.extend(self.files.leaves_out().then_some(MergedSection::Relations));
        let (archive, layout, listing) = (self.archive, self.layout, &Listing::default());
        let covers = Covers { archive, layout, steps: self.steps, whole: false, listing };
        let read = |directory: &MergedDirectory, stored: &[Vec<u8>]| {
            let [names, relations @ ..] = stored else { return Ok(None) };
            let relations = relations.first().map(|stored| directory.read_relations(stored)).transpose()?;
            Ok(directory.read_names(names)?.map(|log| (log, relations.unwrap_or_default())))
        };
        let fits =
            |(_, relations): &(_, Vec<_>), covered: &[MergedSegment]| !self.is_moved(covered, relations);
        let found = covers.find(&sections, read, fits).await?;
        Ok(found.into_iter().map(Part::merged).collect())
    }

    /// Whether segments may touch catalogues, or files of theirs, that a merged index takes for other relations.
    fn is_moved(&self, segments: &[MergedSegment], relations: &[RelationSegments]) -> bool {
        // What runs over an edge and was joined nowhere is in no list of relations.
        let unjoined = |pair: &[MergedSegment]| match pair {
            [a, b] => a.info.pending.is_some_and(|p| !p.joined) && !b.info.head_joined,
            _ => false,
        };
        let touched = relations.iter().any(|r| self.files.is_left_out(r.relation));
        self.files.leaves_out() && (touched || segments.windows(2).any(unjoined))
    }
}

impl Part {
    fn merged(cover: Cover<(NamesLog, Vec<RelationSegments>)>) -> Self {
        let Cover { steps, segments, from_first, to_last, told: (mut log, _), .. } = cover;
        // Its edges are not those of what is wanted of it.
        log.head = log.head.filter(|_| from_first);
        log.tail = log.tail.filter(|_| to_last);
        Self { steps, log, merged: segments }
    }

    fn none(step: usize) -> Self {
        Self { steps: step..step.saturating_add(1), log: NamesLog::default(), merged: Vec::new() }
    }
}
