//! What the WAL between two backups changed: read from the segments' indexes, and from the WAL itself where an index
//! cannot tell. Memory is bounded by the cluster's blocks, a bit for each at the most, and by a few indexes at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use futures_util::stream::{self, StreamExt as _};
use waltide_format::archive::{
    ChainLink, CheckpointKind, MergedIndex, MergedName, SegmentEntry, SegmentIndex, Step, SystemLayout,
};
use waltide_format::engines::postgres::changes::{ChangedBlocks, Doubt};
use waltide_format::engines::postgres::scan::{Previous, PreviousLog, ScanContext, ScanMode, scan_segment};
use waltide_format::engines::postgres::wal::{
    Damage, Expected, LONG_HEADER_BYTES, Next, PAGE_BYTES, PreviousTail, RecordStream, SHORT_HEADER_BYTES,
    SegmentSpan, XlogRecord,
};
use waltide_format::{Lsn, SegmentName, SegmentSize};
use waltide_storage::{Archive, StorageError};

use crate::merged::{self, ListedIndex};
use crate::stored_segments::{ReadError, read_index, read_stored};

/// Merged indexes are looked for where so many segments are to be read; the least of them covers as many.
const MERGED_WORTH: usize = 16;
/// `WAL_LEVEL_MINIMAL`: the log does not say what is written into new files.
const WAL_LEVEL_MINIMAL: i32 = 0;

/// Why it is not known what changed.
#[derive(Debug, thiserror::Error)]
pub enum ChangesError {
    /// The archive failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The WAL does not tell; a full backup does.
    #[error("{0}")]
    Unknown(String),
}

impl ChangesError {
    fn of(error: ReadError) -> Self {
        match error {
            e if e.is_bad_object() => Self::Unknown(e.to_string()),
            ReadError::Storage(e) => Self::Storage(e),
            e @ ReadError::Damaged { .. } => Self::Unknown(e.to_string()),
        }
    }

    fn in_segment(entry: &SegmentEntry, why: impl std::fmt::Display) -> Self {
        Self::Unknown(format!("{} does not tell all that changed: {why}", entry.info.name))
    }
}

/// What the records from `from` to the end of `steps`, which join without a hole, change. Indexes of many segments are
/// read where `names` has them.
pub async fn changed_blocks(
    archive: &Archive,
    names: &SystemLayout,
    steps: &[Step<'_>],
    from: Lsn,
    threads: usize,
) -> Result<ChangedBlocks, ChangesError> {
    let entries: Vec<&SegmentEntry> = steps.iter().map(|step| step.entry).collect();
    for entry in &entries {
        if let Some(fault) = entry.faults.first() {
            let doubt = Doubt::Fault { at: fault.at, message: fault.message.clone() };
            return Err(ChangesError::in_segment(entry, doubt));
        }
    }
    let mut changed = ChangedBlocks::default();
    let mut restarts: Vec<Lsn> = Vec::new();
    each_index(archive, names, &entries, from, threads, |entry, index| {
        let added = match index {
            Index::Segment(index) => changed.add(index),
            Index::Merged(index) => changed.add_merged(index),
        };
        added.map_err(|doubt| ChangesError::in_segment(entry, doubt))?;
        let all = index.all();
        let shutdowns = all.checkpoints.iter().filter(|c| c.kind == CheckpointKind::Shutdown);
        restarts.extend(shutdowns.map(|c| c.start).chain(all.timeline_ends.iter().map(|e| e.start)));
        Ok(())
    })
    .await?;
    for entry in restarted(&entries, &restarts, from) {
        check_wal_level(archive, entry, from).await?;
    }
    Ok(changed)
}

/// Gives `take` all that indexes say of `entries`, which join without a hole, each with the first segment that it is of:
/// those of many segments where `names` has them, and in the end once more those of segments to which a record had to be
/// joined that began at `from` or later.
pub(super) async fn each_index(
    archive: &Archive,
    names: &SystemLayout,
    entries: &[&SegmentEntry],
    from: Lsn,
    threads: usize,
    mut take: impl FnMut(&SegmentEntry, &Index) -> Result<(), ChangesError>,
) -> Result<(), ChangesError> {
    let parts = find(archive, names, entries).await?;
    let reads: Vec<_> = parts.into_iter().map(|part| read(archive, part)).collect();
    let mut reads = stream::iter(reads).buffered(threads.clamp(1, 16));
    while let Some(part) = reads.next().await {
        for (entry, index) in part? {
            take(entry, &index)?;
        }
    }
    for open in unjoined(entries, from) {
        let run = entries.get(open).unwrap_or_default();
        let index = join(archive, run).await?;
        if let Some(last) = run.last() {
            take(last, &Index::Segment(Box::new(index)))?;
        }
    }
    Ok(())
}

/// Segments that are read together.
enum Part<'a> {
    Segment(&'a SegmentEntry),
    Merged(&'a [&'a SegmentEntry], String),
}

/// What is said of them.
pub(super) enum Index {
    Segment(Box<SegmentIndex>),
    Merged(Box<MergedIndex>),
}

impl Index {
    /// What is said of all in the same words.
    pub(super) fn all(&self) -> &SegmentIndex {
        match self {
            Self::Segment(index) => index,
            Self::Merged(index) => &index.all,
        }
    }
}

/// The fewest objects that tell of all segments.
async fn find<'a>(
    archive: &Archive,
    names: &SystemLayout,
    entries: &'a [&'a SegmentEntry],
) -> Result<Vec<Part<'a>>, ChangesError> {
    let listed = match entries.len() {
        0..MERGED_WORTH => Vec::new(),
        _ => merged::list(archive, names).await?,
    };
    let mut by_first: BTreeMap<SegmentName, Vec<&ListedIndex>> = BTreeMap::new();
    for listed in merged::newest(&listed) {
        by_first.entry(listed.name.first).or_default().push(listed);
    }
    let mut parts = Vec::new();
    let mut rest = entries;
    while let Some((first, behind)) = rest.split_first() {
        let starting = by_first.get(&first.info.name).into_iter().flatten();
        let fitting = starting.filter_map(|listed| {
            let (part, behind) = rest.split_at_checked(usize::try_from(listed.name.step).ok()?)?;
            let links = part.iter().map(|e| ChainLink::of(e)).collect::<Option<Vec<_>>>()?;
            let same = MergedName::key_of(first.info.system_id, &links) == listed.name.key;
            same.then(|| (part, behind, listed.object.path.clone()))
        });
        match fitting.max_by_key(|(part, ..)| part.len()) {
            Some((part, behind, path)) => {
                parts.push(Part::Merged(part, path));
                rest = behind;
            }
            None => {
                parts.push(Part::Segment(first));
                rest = behind;
            }
        }
    }
    Ok(parts)
}

/// Reads a part; one that is not what its name says is read segment by segment.
async fn read<'a>(archive: &Archive, part: Part<'a>) -> Result<Vec<(&'a SegmentEntry, Index)>, ChangesError> {
    let of_segment = async |entry: &'a SegmentEntry| {
        let index = read_index(archive, &entry.path).await.map_err(ChangesError::of)?;
        Ok::<_, ChangesError>((entry, Index::Segment(Box::new(index))))
    };
    let (entries, path) = match part {
        Part::Segment(entry) => return Ok(vec![of_segment(entry).await?]),
        Part::Merged(entries, path) => (entries, path),
    };
    let links: Option<Vec<_>> = entries.iter().map(|e| ChainLink::of(e)).collect();
    let merged = merged::get(archive, &path, &links.unwrap_or_default()).await?;
    if let Some((first, merged)) = entries.first().zip(merged) {
        return Ok(vec![(first, Index::Merged(Box::new(merged)))]);
    }
    let mut found = Vec::with_capacity(entries.len());
    for entry in entries {
        found.push(of_segment(entry).await?);
    }
    Ok(found)
}

/// Segments over which a record runs that no index has: each came before its neighbour was there.
pub(super) fn unjoined(entries: &[&SegmentEntry], from: Lsn) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut open: Option<usize> = None;
    for (i, entry) in entries.iter().enumerate() {
        let info = &entry.info;
        if info.head_joined || info.overwrites_contrecord {
            open = None;
        }
        if u64::from(info.continued_bytes) > data_bytes(info.size) {
            // It only runs through.
            continue;
        }
        found.extend(open.take().map(|first| first..i.saturating_add(1)));
        open = info.pending.filter(|p| !p.joined && p.start >= from).map(|_| i);
    }
    found
}

/// How much of a record a segment can hold between its page headers.
fn data_bytes(size: SegmentSize) -> u64 {
    let pages = size.bytes().checked_div(PAGE_BYTES as u64).unwrap_or(0);
    let headers = pages.saturating_sub(1).saturating_mul(SHORT_HEADER_BYTES as u64);
    size.bytes().saturating_sub(headers).saturating_sub(LONG_HEADER_BYTES as u64)
}

/// Segments in which a server that was started again writes down its settings: right behind the sign of its start, which
/// may be a segment's last record.
fn restarted<'a>(entries: &[&'a SegmentEntry], restarts: &[Lsn], from: Lsn) -> Vec<&'a SegmentEntry> {
    let start = |entry: &SegmentEntry| entry.info.name.start(entry.info.size).unwrap_or(Lsn::MAX);
    let mut places: BTreeSet<usize> = BTreeSet::new();
    for restart in restarts.iter().filter(|restart| **restart >= from) {
        let place = entries.partition_point(|entry| start(entry) <= *restart).saturating_sub(1);
        places.insert(place);
        if entries.get(place).is_some_and(|entry| Some(*restart) >= entry.info.last_record) {
            places.insert(place.saturating_add(1));
        }
    }
    places.into_iter().filter_map(|place| entries.get(place).copied()).collect()
}

/// The index of the last of `entries` with the record in it that began in the first and runs over all of them.
pub(super) async fn join(archive: &Archive, entries: &[&SegmentEntry]) -> Result<SegmentIndex, ChangesError> {
    let mut tail: Option<(&SegmentEntry, PreviousTail)> = None;
    for (entry, is_last) in (1..).map(|n| n == entries.len()).zip(entries).map(|(is_last, e)| (*e, is_last)) {
        let stored = read_stored(archive, &entry.path).await.map_err(ChangesError::of)?;
        let info = entry.info.clone();
        let previous =
            tail.take().map(|(entry, tail)| Previous { name: entry.info.name, log: PreviousLog::Tail(tail) });
        let system_ids = [info.system_id];
        let scan = move || {
            let context = ScanContext {
                system_ids: &system_ids,
                major: Some(info.major),
                previous,
                mode: ScanMode::Partial,
                ..ScanContext::new(info.name, info.size)
            };
            scan_segment(&stored.wal, &context)
        };
        let scanned = tokio::task::spawn_blocking(scan).await.expect("a scan does not panic");
        let scanned = scanned.map_err(|e| ChangesError::in_segment(entry, e))?;
        if is_last && scanned.index.info.head_joined {
            return Ok(scanned.index);
        }
        tail = scanned.tail.map(|tail| (entry, tail));
    }
    let names = entries.iter().map(|entry| entry.info.name.to_string()).collect::<Vec<_>>().join(", ");
    Err(ChangesError::Unknown(format!(
        "the record that runs over the edges of {names} cannot be put together"
    )))
}

/// Refuses WAL in which the server writes down that it goes on with a `wal_level` that does not log everything. It does
/// so right after it has started.
async fn check_wal_level(archive: &Archive, entry: &SegmentEntry, from: Lsn) -> Result<(), ChangesError> {
    let stored = read_stored(archive, &entry.path).await.map_err(ChangesError::of)?;
    let info = entry.info.clone();
    let search = move || {
        let start = info.name.start(info.size).unwrap_or(Lsn::MAX);
        let Some(span) = SegmentSpan::containing(start, info.size) else { return Ok(None) };
        let expected = Expected { major: Some(info.major), ..Expected::default() };
        let mut stream = RecordStream::new(&stored.wal, span, expected, None)?;
        while let Next::Record(record) = stream.next_record()? {
            if let Some(Ok(XlogRecord::ParameterChange(change))) = XlogRecord::decode(&record)
                && change.wal_level == WAL_LEVEL_MINIMAL
                && record.start >= from
            {
                return Ok(Some(record.start));
            }
        }
        Ok(None)
    };
    let found: Result<Option<Lsn>, Damage> =
        tokio::task::spawn_blocking(search).await.expect("reading records does not panic");
    match found.map_err(|damage| ChangesError::in_segment(entry, damage))? {
        Some(at) => Err(ChangesError::in_segment(entry, format!("wal_level was minimal from {at} on"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use waltide_format::archive::PendingRecord;

    use super::*;
    use crate::testing::*;

    /// A record that begins in segment `n` and runs over its edge by `bytes`.
    fn over_the_edge(segments: &mut [SegmentEntry], n: usize, bytes: u32, joined: bool) {
        let start = segments[n].info.valid_end.saturating_sub(100);
        let (total_bytes, here_bytes) = (100 + bytes, 100);
        segments[n].info.pending = Some(PendingRecord { start, total_bytes, here_bytes, joined });
        let mut left = bytes;
        let space = u32::try_from(data_bytes(size())).unwrap();
        for segment in &mut segments[n + 1..] {
            segment.info.continued_bytes = left;
            if left <= space {
                break;
            }
            segment.info.first_record = None;
            left -= space;
        }
    }

    /// The first segment of each and the one behind the last.
    fn joins(segments: &[SegmentEntry], from: u64) -> Vec<(usize, usize)> {
        let found = unjoined(&segments.iter().collect::<Vec<_>>(), Lsn::from(from));
        found.into_iter().map(|range| (range.start, range.end)).collect()
    }

    #[test]
    fn a_record_that_no_index_has_is_put_together_of_all_segments_it_runs_over() {
        let mut segments: Vec<_> = (1..8).map(|n| segment(1, n)).collect();
        assert_eq!(joins(&segments, 0), []);
        over_the_edge(&mut segments, 0, 500, false);
        over_the_edge(&mut segments, 1, 500, true);
        over_the_edge(&mut segments, 2, 500, false);
        segments[3].info.head_joined = true;
        over_the_edge(&mut segments, 3, (2 << 20) + 500, false);
        assert_eq!(joins(&segments, 0), [(0, 2), (3, 7)]);
        // What began before the parent did is not asked for.
        assert_eq!(joins(&segments, 2 * SIZE), [(3, 7)]);
        // A crash cut it off.
        segments[1].info.overwrites_contrecord = true;
        assert_eq!(joins(&segments, 0), [(3, 7)]);
    }

    #[test]
    fn a_record_that_ends_exactly_where_its_segment_does_does_not_run_through() {
        let mut segments: Vec<_> = (1..4).map(|n| segment(1, n)).collect();
        let space = u32::try_from(data_bytes(size())).unwrap();
        assert_eq!(space, (1 << 20) - 40 - 127 * 24);
        over_the_edge(&mut segments, 0, space, false);
        assert_eq!(joins(&segments, 0), [(0, 2)]);
        over_the_edge(&mut segments, 0, space + 1, false);
        assert_eq!(joins(&segments, 0), [(0, 3)]);
    }

    #[test]
    fn settings_are_looked_for_behind_each_start() {
        let segments: Vec<_> = (1..5).map(|n| segment(1, n)).collect();
        let entries: Vec<_> = segments.iter().collect();
        let at = |restarts: &[u64], from: u64| {
            let restarts: Vec<Lsn> = restarts.iter().map(|lsn| Lsn::from(*lsn)).collect();
            let found = restarted(&entries, &restarts, Lsn::from(from));
            found.iter().map(|e| e.info.name.start(size()).unwrap().get() / SIZE).collect::<Vec<_>>()
        };
        assert_eq!(at(&[2 * SIZE + 50], 0), [2]);
        assert_eq!(at(&[2 * SIZE + 50], 3 * SIZE), [0u64; 0]);
        // The sign is the segment's last record.
        assert_eq!(at(&[3 * SIZE - 100, 4 * SIZE + 40], 0), [2, 3, 4]);
        assert_eq!(at(&[5 * SIZE - 100], 0), [4]);
    }
}
