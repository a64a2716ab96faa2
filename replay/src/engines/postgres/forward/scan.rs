//! Reads segments from the newest to the oldest and takes them apart side by side.

use std::collections::VecDeque;
use std::sync::Arc;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use waltide_format::Lsn;
use waltide_format::engines::postgres::wal::{Expected, Record, SegmentSpan};
use waltide_storage::Progress;

use super::super::indexes::{ArchivedIndexes, SearchError};
use super::super::restore::blocking;
use super::ForwardError;
use super::decode::{DecodeError, Decoded, Unknown, Wanted, decode_record, decode_segment};
use super::keep::{Keeper, Log};
use super::point::LogSegment;

type Taken = Result<Decoded, DecodeError>;

/// Keeps what matters of the records in a range of the log.
pub(super) async fn scan(
    indexes: &ArchivedIndexes,
    segments: &Arc<Vec<LogSegment>>,
    wanted: Wanted,
    mut keeper: Keeper,
    threads: usize,
    progress: &dyn Progress,
) -> Result<Log, ForwardError> {
    let numbers: Vec<usize> = (0..segments.len())
        .rev()
        .filter(|i| segments.get(*i).is_some_and(|s| s.start < wanted.until && s.usable_end > wanted.from))
        .collect();
    // A segment is also read for the end of a record that begins in the one before.
    let read = |number: usize| async move {
        let Some(segment) = segments.get(number) else { return Ok((number, Arc::default())) };
        indexes.wal(&segment.entry).await.map(|wal| (number, Arc::new(wal)))
    };
    let mut wals = stream::iter(numbers).map(read).buffered(threads.max(1));
    let mut next: Option<(usize, Arc<Vec<u8>>)> = None;
    let mut taking: VecDeque<(usize, tokio::task::JoinHandle<Taken>)> = VecDeque::new();
    loop {
        let wal: Option<(usize, Arc<Vec<u8>>)> = wals.try_next().await?;
        let more = wal.is_some();
        if let Some((number, wal)) = wal {
            let segments = Arc::clone(segments);
            let (here, after) =
                (Arc::clone(&wal), next.take().filter(|(n, _)| *n == number.saturating_add(1)));
            let take =
                move || take(&segments, number, &here, after.as_ref().map(|(_, w)| w.as_slice()), wanted);
            taking.push_back((number, tokio::task::spawn_blocking(take)));
            next = Some((number, wal));
        }
        while taking.len() > if more { threads } else { 0 } {
            let Some((number, handle)) = taking.pop_front() else { break };
            let Some(segment) = segments.get(number) else { continue };
            let taken = handle.await.expect("taking a segment apart does not panic");
            let decoded = taken.map_err(|e| failed(e, segment))?;
            if let Some(at) = decoded.unfinished
                && let Some(long) = long_record(indexes, segments, number, at).await?
            {
                blocking(|| keeper.add(&long))?;
            }
            blocking(|| keeper.add(&decoded))?;
            progress.advance(segment.entry.info.size.bytes());
        }
        if !more {
            return Ok(keeper.finish());
        }
    }
}

fn take(segments: &[LogSegment], number: usize, wal: &[u8], next: Option<&[u8]>, wanted: Wanted) -> Taken {
    let Some(segment) = segments.get(number) else { return Ok(Decoded::default()) };
    let info = &segment.entry.info;
    let Some(span) = SegmentSpan::containing(segment.start, info.size) else { return Ok(Decoded::default()) };
    let expected = Expected { major: Some(info.major), ..Expected::default() };
    let until = wanted.until.min(segment.usable_end);
    decode_segment(wal, next, span, expected, Wanted { until, ..wanted })
}

fn failed(e: DecodeError, segment: &LogSegment) -> ForwardError {
    match e {
        DecodeError::Damage(source) => SearchError::Wal { path: segment.entry.path.clone(), source }.into(),
        DecodeError::Unknown(unknown) => unknown.into(),
    }
}

/// A record that goes over more than one segment's edge; none where a crash kept it from being finished.
async fn long_record(
    indexes: &ArchivedIndexes,
    segments: &[LogSegment],
    number: usize,
    at: Lsn,
) -> Result<Option<Decoded>, ForwardError> {
    let entries: Vec<_> = segments.iter().skip(number).map(|s| &s.entry).collect();
    let look = move |record: &Record<'_>| -> Option<Option<Result<Decoded, Unknown>>> {
        (record.start >= at).then(|| (record.start == at).then(|| decode_record(record)))
    };
    let found = indexes.records(&entries, look).await?;
    Ok(found.flatten().transpose()?)
}
