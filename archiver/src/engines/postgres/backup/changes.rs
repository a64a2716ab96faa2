//! What the WAL between two backups changed: read from the segments' indexes, and from the WAL itself where an index
//! cannot tell. Memory is bounded by the cluster's blocks, a bit for each at the most, and by a few indexes at a time.

use std::collections::VecDeque;

use futures_util::stream::{self, StreamExt as _};
use waltide_format::Lsn;
use waltide_format::archive::{CheckpointKind, SegmentEntry, SegmentIndex, Step};
use waltide_format::engines::postgres::changes::ChangedBlocks;
use waltide_format::engines::postgres::scan::{Previous, PreviousLog, ScanContext, ScanMode, scan_segment};
use waltide_format::engines::postgres::wal::{
    Expected, Next, PreviousTail, RecordStream, SegmentSpan, XlogRecord,
};
use waltide_storage::{Archive, StorageError};

use crate::stored_segments::{ReadError, read_index, read_stored};

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

/// What the records from `from` to the end of `steps`, which join without a hole, change.
pub async fn changed_blocks(
    archive: &Archive,
    steps: &[Step<'_>],
    from: Lsn,
    threads: usize,
) -> Result<ChangedBlocks, ChangesError> {
    let mut changed = ChangedBlocks::default();
    let reads = steps.iter().map(|step| read_index(archive, &step.entry.path));
    let reads: Vec<_> = reads.collect();
    let mut indexes = stream::iter(reads).buffered(threads.clamp(1, 16).saturating_mul(2));
    // The segments over which a record runs that no index has so far.
    let mut open: VecDeque<&SegmentEntry> = VecDeque::new();
    let mut restarted = false;
    for step in steps {
        let entry = step.entry;
        let Some(index) = indexes.next().await else { break };
        let mut index = index.map_err(ChangesError::of)?;
        let info = &index.info;
        if info.head_joined || info.overwrites_contrecord {
            open.clear();
        }
        let through =
            info.first_record.is_none() && u64::from(info.continued_bytes) > 0 && info.pending.is_none();
        if !open.is_empty() && !through {
            index = join(archive, &open, entry).await?;
            open.clear();
        }
        changed.add(&index).map_err(|doubt| ChangesError::in_segment(entry, doubt))?;
        if index.info.pending.is_some_and(|p| !p.joined && p.start >= from) || !open.is_empty() {
            open.push_back(entry);
        }
        let restart = last_restart(&index);
        if restarted || restart.is_some() {
            check_wal_level(archive, entry, from).await?;
        }
        restarted = restart.is_some() && restart >= index.info.last_record;
    }
    Ok(changed)
}

/// The index of `last` with the record in it that began in the first of `before` and runs over all of them. A segment
/// that came before its neighbour was indexed without it.
async fn join(
    archive: &Archive,
    before: &VecDeque<&SegmentEntry>,
    last: &SegmentEntry,
) -> Result<SegmentIndex, ChangesError> {
    let mut tail: Option<(&SegmentEntry, PreviousTail)> = None;
    for entry in before.iter().copied().chain([last]) {
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
        if std::ptr::eq(entry, last) && scanned.index.info.head_joined {
            return Ok(scanned.index);
        }
        tail = scanned.tail.map(|tail| (entry, tail));
    }
    Err(ChangesError::in_segment(last, "the record that runs over its beginning cannot be put together"))
}

/// Where the last sign of a server that was started again stands: it may have come back with other settings.
fn last_restart(index: &SegmentIndex) -> Option<Lsn> {
    let shutdowns = index.checkpoints.iter().filter(|c| c.kind == CheckpointKind::Shutdown).map(|c| c.start);
    shutdowns.chain(index.timeline_ends.iter().map(|e| e.start)).max()
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
    let found: Result<Option<Lsn>, waltide_format::engines::postgres::wal::Damage> =
        tokio::task::spawn_blocking(search).await.expect("reading records does not panic");
    match found.map_err(|damage| ChangesError::in_segment(entry, damage))? {
        Some(at) => Err(ChangesError::in_segment(entry, format!("wal_level was minimal from {at} on"))),
        None => Ok(()),
    }
}
