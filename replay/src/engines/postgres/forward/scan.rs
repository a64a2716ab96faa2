//! Reads segments from the newest to the oldest and takes them apart side by side.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use tokio::sync::oneshot;
use waltide_format::Lsn;
use waltide_format::archive::StoredWal;
use waltide_format::engines::postgres::wal::{Expected, Record, SegmentSpan};
use waltide_storage::Progress;

use super::super::indexes::{ArchivedIndexes, SearchError};
use super::super::restore::blocking;
use super::ForwardError;
use super::decode::{DecodeError, Decoded, KEPT_BYTES, Pools, Source, Wanted, decode_record, decode_segment};
use super::keep::{Keeper, Log};
use super::newer::Newer;
use super::point::LogSegment;
use super::pool::{Pool, Pooled};

/// So many segments more than there are threads are being taken apart, or wait to be added.
pub(super) const UNDER_WAY: usize = 2;
/// So much of the segment that follows is read for the end of a record. Of a longer one it is read again.
const END_BYTES: usize = 64 << 10;

type Taken = Result<Pooled<Decoded>, DecodeError>;

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
    let pools = (Pool::default(), Pool::default(), keeper.pools());
    let read = |number: usize| async move {
        let Some(segment) = segments.get(number) else { return Ok((number, Bytes::new())) };
        Ok::<_, SearchError>((number, indexes.object(&segment.entry).await?))
    };
    let mut objects = stream::iter(numbers).map(read).buffered(threads.max(1));
    let mut next: Option<(usize, Bytes)> = None;
    let mut taking: VecDeque<(Wal, oneshot::Receiver<Taken>)> = VecDeque::new();
    let crew = crew(threads, keeper.newer());
    loop {
        let object = objects.try_next().await?;
        let more = object.is_some();
        if let Some((number, here)) = object {
            // A segment is also read for the end of a record that begins in the one before.
            let after = next.take().filter(|(n, _)| *n == number.saturating_add(1)).map(|(_, object)| object);
            next = Some((number, here.clone()));
            let (segments, (buffers, ends, pools)) = (Arc::clone(segments), pools.clone());
            let wal = Wal { segments, number, here, after, wanted, buffers, ends, pools };
            let (done, taken) = oneshot::channel();
            let _ = crew.send((wal.clone(), done));
            taking.push_back((wal, taken));
        }
        // While what one segment's records do is added, the others are taken apart.
        while taking.len() > if more { threads.saturating_add(UNDER_WAY) } else { 0 } {
            let Some((wal, taken)) = taking.pop_front() else { break };
            let Some(segment) = segments.get(wal.number) else { continue };
            let taken = taken.await.expect("taking a segment apart does not panic");
            let taken = match taken {
                // A copy of a database was met since: what is of no use behind it may be of use to it.
                Ok(decoded) if !keeper.fits(&decoded) => blocking(|| wal.take(keeper.newer())),
                taken => taken,
            };
            let mut decoded = taken.map_err(|e| failed(e, segment))?;
            if let Some(at) = decoded.unfinished
                && let Some(mut long) = long_record(indexes, segments, wal.number, at).await?
            {
                blocking(|| keeper.add(&mut long))?;
            }
            blocking(|| keeper.add(&mut decoded))?;
            progress.advance(segment.entry.info.size.bytes());
        }
        if !more {
            return Ok(keeper.finish());
        }
    }
}

/// Threads that take segments apart, until nobody has any for them. Each takes the next at once. They are none of the
/// runtime's: of those it has a certain number, which it reads the archive with.
fn crew(threads: usize, newer: &Newer) -> mpsc::Sender<(Wal, oneshot::Sender<Taken>)> {
    let (sender, segments) = mpsc::channel::<(Wal, oneshot::Sender<Taken>)>();
    let segments = Arc::new(Mutex::new(segments));
    for _ in 0..threads.max(1) {
        let (segments, newer) = (Arc::clone(&segments), newer.clone());
        std::thread::spawn(move || {
            loop {
                let next = segments.lock().unwrap_or_else(PoisonError::into_inner).recv();
                let Ok((wal, done)) = next else { return };
                // Where reading the log has ended early nobody waits for it.
                if !done.is_closed() {
                    let _ = done.send(wal.take(&newer));
                }
            }
        });
    }
    sender
}

/// A segment that is being taken apart, and the one that follows.
#[derive(Clone)]
struct Wal {
    segments: Arc<Vec<LogSegment>>,
    number: usize,
    here: Bytes,
    after: Option<Bytes>,
    wanted: Wanted,
    /// Memory for segments, and for the first parts of those that follow.
    buffers: Pool<Vec<u8>>,
    ends: Pool<Vec<u8>>,
    pools: Pools,
}

impl Wal {
    fn take(&self, newer: &Newer) -> Taken {
        let Some(segment) = self.segments.get(self.number) else { return Ok(Pooled::default()) };
        let info = &segment.entry.info;
        let Some(span) = SegmentSpan::containing(segment.start, info.size) else {
            return Ok(Pooled::default());
        };
        let expected = Expected { major: Some(info.major), ..Expected::default() };
        let wanted = Wanted { until: self.wanted.until.min(segment.usable_end), ..self.wanted };
        // What is wrong with the segment that follows was told when that was taken apart.
        let mut end = self.ends.take();
        let next = self.after.as_ref().and_then(|object| {
            let mut wal = StoredWal::open(object, std::mem::take(&mut *end)).ok()?;
            wal.reach(END_BYTES).ok()?;
            *end = wal.into_bytes();
            Some(end.as_slice())
        });
        let source = Source { object: &self.here, next, span, expected, kept: KEPT_BYTES };
        decode_segment(source, &mut self.buffers.take(), wanted, newer, &self.pools)
    }
}

fn failed(e: DecodeError, segment: &LogSegment) -> ForwardError {
    match e {
        DecodeError::Stored(source) => {
            SearchError::Damaged { path: segment.entry.path.clone(), source }.into()
        }
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
    let look = move |record: &Record<'_>| -> Option<Option<Result<Decoded, DecodeError>>> {
        (record.start >= at).then(|| (record.start == at).then(|| decode_record(record)))
    };
    let found = indexes.records(&entries, look).await?;
    let Some(segment) = segments.get(number) else { return Ok(None) };
    found.flatten().transpose().map_err(|e| failed(e, segment))
}
