//! Whether a merged index says what the segments say.

use std::collections::BTreeMap;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use waltide_format::archive::{
    Catalog, ChainLink, MergedDirectory, MergedIndex, MergedName, MergedObject, MergedSegment, MergedSummary,
    NamesLog, SegmentEntry, SegmentIndex, SystemLayout,
};
use waltide_format::engines::postgres::catalogue::CatalogueFiles;
use waltide_format::{SegmentName, Xid};
use waltide_storage::{Archive, ObjectInfo, StorageError};

use super::indexes::{ArchivedIndexes, SearchError};

/// No merged index comes near this.
const OBJECT_BYTES_MAX: u64 = 1 << 30;
/// What is read of an object's end where only its directory is asked for.
const TAIL_BYTES: u64 = 16 << 10;
/// Segments' indexes read at once, and merged before the next are read.
const AT_ONCE: usize = 16;
/// Segments' WAL read at once.
const WALS_AT_ONCE: usize = 2;

/// Something wrong with a merged index, or with a segment that it speaks of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IndexFault {
    /// The object at fault.
    pub(crate) object: String,
    /// The byte in it, where it is one.
    pub(crate) byte: Option<u64>,
    /// What.
    pub(crate) text: String,
}

/// What a look at a merged index found.
#[derive(Debug, Default)]
pub(crate) struct CheckedIndex {
    pub(crate) faults: Vec<IndexFault>,
    /// Bytes read of the object.
    pub(crate) bytes: u64,
}

/// Compares merged indexes with the segments that they were made from.
#[derive(Debug)]
pub(crate) struct IndexCheck<'a> {
    pub(crate) archive: &'a Archive,
    pub(crate) names: &'a SystemLayout,
    pub(crate) catalog: &'a Catalog,
    /// Whether only directories are looked at.
    pub(crate) quick: bool,
}

impl IndexCheck<'_> {
    /// Looks at one.
    pub(crate) async fn check(
        &self,
        name: &MergedName,
        object: &ObjectInfo,
    ) -> Result<CheckedIndex, StorageError> {
        let path = &object.path;
        let fault = |byte, text: String| CheckedIndex {
            faults: vec![IndexFault { object: path.clone(), byte, text }],
            bytes: object.size,
        };
        if self.quick {
            let read = self.archive.read_end(path, TAIL_BYTES, MergedDirectory::decode);
            return match read.await {
                Ok(Ok(_)) => Ok(CheckedIndex { faults: Vec::new(), bytes: TAIL_BYTES.min(object.size) }),
                Ok(Err(e)) => Ok(fault(Some(e.at), e.to_string())),
                Err(e) if e.is_not_found() => Ok(CheckedIndex::default()),
                Err(e) if e.is_bad_object() => Ok(fault(None, e.to_string())),
                Err(e) => Err(e),
            };
        }
        let bytes = match self.archive.get(path, OBJECT_BYTES_MAX).await {
            Ok(bytes) => bytes,
            Err(e) if e.is_not_found() => return Ok(CheckedIndex::default()),
            Err(e) if e.is_bad_object() => return Ok(fault(None, e.to_string())),
            Err(e) => return Err(e),
        };
        let decoded = tokio::task::spawn_blocking(move || MergedObject::decode(&bytes)).await;
        let stored = match decoded.expect("a decoder does not panic") {
            Ok(stored) => stored,
            Err(e) => return Ok(fault(Some(e.at), e.to_string())),
        };
        let mut checked = CheckedIndex { faults: Vec::new(), bytes: object.size };
        let links: Vec<_> = stored.index.links().collect();
        if let Some(text) = self.misnamed(name, &stored, &links) {
            checked.faults.push(IndexFault { object: path.clone(), byte: None, text });
            return Ok(checked);
        }
        let copies = self.copies(path, &stored.index.segments, &mut checked.faults);
        if let Some(text) = self.difference(&stored.index, &copies).await? {
            checked.faults.push(IndexFault { object: path.clone(), byte: None, text });
        }
        Ok(checked)
    }

    /// Why an object is not what its name says.
    fn misnamed(&self, name: &MergedName, stored: &MergedObject, links: &[ChainLink]) -> Option<String> {
        let (first, last) = (links.first()?, links.last()?);
        let system = stored.index.all.info.system_id;
        let key = MergedName::key_of(system, links);
        let found = MergedName {
            first: first.name,
            last: last.name,
            step: links.len() as u64,
            builder: stored.builder,
            key,
            ..*name
        };
        if system != self.catalog.system.system_id {
            return Some(format!("it speaks of system {system}"));
        }
        (found != *name).then(|| {
            let of = self.names.merged_index(&found);
            format!("it is not what its name says, its contents are those of {of}")
        })
    }

    /// The copies that it was made from, as far as they are there. A name under which only other WAL lies is a fault of
    /// that segment: one that readers prefer is stored beside the one that was there, not in its place.
    fn copies(
        &self,
        path: &str,
        segments: &[MergedSegment],
        faults: &mut Vec<IndexFault>,
    ) -> BTreeMap<usize, &SegmentEntry> {
        let mut copies = BTreeMap::new();
        for (at, segment) in segments.iter().enumerate() {
            let name = segment.info.name;
            let of_name = || self.catalog.segments.iter().filter(move |e| e.info.name == name);
            if let Some(entry) = of_name().find(|e| segment.is_of(e)) {
                copies.insert(at, entry);
            } else if let Some(other) = of_name().next() {
                let was: String = segment.digest.iter().map(|b| format!("{b:02x}")).collect();
                let text = format!(
                    "it was replaced: its WAL has the SHA-256 {} and had {was} when {path} was made",
                    other.digest
                );
                faults.push(IndexFault { object: other.path.clone(), byte: None, text });
            }
        }
        copies
    }

    /// What differs from what the segments say that are still there.
    async fn difference(
        &self,
        stored: &MergedIndex,
        copies: &BTreeMap<usize, &SegmentEntry>,
    ) -> Result<Option<String>, StorageError> {
        let source = ArchivedIndexes::new(self.archive.clone());
        let present: Vec<(usize, &SegmentEntry)> = copies.iter().map(|(at, entry)| (*at, *entry)).collect();
        let mut parts = Vec::new();
        let mut unreadable = false;
        for chunk in present.chunks(AT_ONCE) {
            let jobs = chunk.iter().map(|(at, entry)| {
                let (source, at, entry) = (&source, *at, *entry);
                async move {
                    match source.index(entry).await {
                        Ok(index) => Ok(Some((at, entry, index))),
                        Err(SearchError::Storage(e)) if !e.is_not_found() && !e.is_bad_object() => Err(e),
                        // Damage of a segment is told where segments are looked at.
                        Err(_) => Ok(None),
                    }
                }
            });
            let read: Vec<_> = stream::iter(jobs.collect::<Vec<_>>()).buffered(AT_ONCE).try_collect().await?;
            let names = match stored.names {
                Some(_) => self.names(&read).await?,
                None => Vec::new(),
            };
            unreadable |= names.iter().any(Option::is_none);
            let mut names = names.into_iter();
            let Some(read) = read.into_iter().collect::<Option<Vec<_>>>() else { return Ok(None) };
            let mut of_chunk = Vec::new();
            for (at, entry, index) in read {
                let Some(digest) = ChainLink::of(entry).map(|link| link.digest) else { return Ok(None) };
                let is_longer = entry.path.contains('@');
                let names = names.next().flatten();
                let part = MergedIndex::of_segment(index, entry.stored_bytes, digest, is_longer, names);
                let expected = stored.segments.get(at);
                if part.segments.first() != expected {
                    let name = entry.info.name;
                    return Ok(Some(format!("it is not what the segments say: segments differs for {name}")));
                }
                of_chunk.push(if stored.is_reduced { part.reduced() } else { part });
            }
            parts.push(of_chunk);
        }
        if copies.len() != stored.segments.len() {
            return Ok(None);
        }
        let merge = move || {
            let chunk = |part: Vec<MergedIndex>| MergedIndex::merge(part).map(MergedIndex::narrowed);
            let parts = parts.into_iter().map(chunk).collect::<Option<Vec<_>>>()?;
            MergedIndex::merge(parts)
        };
        let whole = tokio::task::spawn_blocking(merge).await.expect("merging does not panic");
        let Some(mut whole) = whole else { return Ok(None) };
        // Not every object has them, and they cannot be told of WAL that is damaged.
        if stored.names.is_none() || unreadable {
            whole.names.clone_from(&stored.names);
        }
        Ok(section_that_differs(&whole, stored)
            .map(|section| format!("it is not what the segments say: {section} differs")))
    }

    /// What segments say about names; none of one whose WAL cannot be read, which is told where segments are looked at.
    async fn names(
        &self,
        segments: &[Option<(usize, &SegmentEntry, SegmentIndex)>],
    ) -> Result<Vec<Option<NamesLog>>, StorageError> {
        let source = ArchivedIndexes::new(self.archive.clone());
        let jobs = segments.iter().flatten().map(|(_, entry, index)| {
            let source = &source;
            async move {
                match source.names(entry, index, &CatalogueFiles::default()).await {
                    Ok(names) => Ok(Some(names)),
                    Err(SearchError::Storage(e)) if !e.is_not_found() && !e.is_bad_object() => Err(e),
                    Err(_) => Ok(None),
                }
            }
        });
        stream::iter(jobs.collect::<Vec<_>>()).buffered(WALS_AT_ONCE).try_collect().await
    }
}

/// Fewer segments than these are asked themselves.
const WORTH_IT: usize = 4;

/// Which of `entries` may hold the end of a transaction, as far as merged indexes made from these very copies tell.
pub(crate) async fn may_end(
    archive: &Archive,
    names: &SystemLayout,
    entries: &[&SegmentEntry],
    xid: Xid,
) -> Result<Vec<bool>, StorageError> {
    let mut may = vec![true; entries.len()];
    let mut open: BTreeMap<SegmentName, usize> =
        entries.iter().zip(0usize..).map(|(entry, at)| (entry.info.name, at)).collect();
    if open.len() < WORTH_IT {
        return Ok(may);
    }
    let listed = archive.list(&names.merged()).await?.into_iter();
    let mut listed: Vec<_> = listed.filter_map(|o| Some((names.parse_merged(&o.path)?, o.path))).collect();
    // Those that cover most come first, and of one range the newest.
    listed.sort_by_key(|(name, _)| std::cmp::Reverse((name.step, name.builder, name.generation)));
    for (name, path) in listed {
        if open.range(name.first..=name.last).count() < WORTH_IT {
            continue;
        }
        let read = archive.read_end(&path, MergedSummary::tail_bytes(&name), |tail, size| {
            MergedSummary::decode(&name, tail, size)
        });
        let index = match read.await {
            Ok(Ok(index)) => index,
            Ok(Err(e)) => {
                tracing::warn!("{path} is damaged, reading the segments instead: {e}");
                continue;
            }
            Err(e) if e.is_not_found() || e.is_bad_object() => continue,
            Err(e) => return Err(e),
        };
        for segment in &index.segments {
            let Some(at) = open.get(&segment.info.name).copied() else { continue };
            let made_of_it = entries.get(at).is_some_and(|entry| segment.is_of(entry));
            if let Some(may) = may.get_mut(at).filter(|_| made_of_it) {
                *may = segment.may_end(xid);
                open.remove(&segment.info.name);
            }
        }
    }
    Ok(may)
}

/// The first section in which two differ.
fn section_that_differs(a: &MergedIndex, b: &MergedIndex) -> Option<&'static str> {
    let parts = [
        ("segments", a.segments == b.segments),
        ("xacts", a.all.xacts == b.all.xacts),
        ("drops", a.drops == b.drops),
        ("restore_points", a.all.restore_points == b.all.restore_points),
        ("checkpoints", a.all.checkpoints == b.all.checkpoints),
        ("timeline_ends", a.all.timeline_ends == b.all.timeline_ends),
        ("running_xacts", a.all.running_xacts == b.all.running_xacts),
        ("file_events", a.all.file_events == b.all.file_events),
        ("blocks", a.all.blocks == b.all.blocks),
        ("touched", a.touched == b.touched),
        ("relations", a.relations == b.relations),
        ("rmgrs", a.all.rmgrs == b.all.rmgrs),
        ("names", a.names == b.names),
    ];
    parts.into_iter().find(|(_, same)| !same).map(|(name, _)| name)
}
