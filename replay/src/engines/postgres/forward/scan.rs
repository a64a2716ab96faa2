//! Reads segments from the newest to the oldest and takes them apart side by side.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use tokio::sync::oneshot;
use waltide_format::Lsn;
use waltide_format::archive::{SegmentDirectory, SegmentIndex, StoredWal};
use waltide_format::engines::postgres::wal::{Expected, Record, SegmentSpan};
use waltide_storage::{Counted, Progress};

use super::super::indexes::{ArchivedIndexes, SearchError};
use super::super::restore::blocking;
use super::ForwardError;
use super::decode::{DecodeError, Decoded, KEPT_BYTES, Pools, Source, Wanted, decode_record, decode_segment};
use super::keep::{Keeper, Log, Segments};
use super::newer::Newer;
use super::point::LogSegment;
use super::pool::{Pool, Pooled};
use super::told;

/// So many segments more than there are threads are being taken apart, or wait to be added.
pub(super) const UNDER_WAY: usize = 2;
/// So much of the segment that follows is read for the end of a record. Of a longer one it is read again.
const END_BYTES: usize = 64 << 10;

/// Where one segment's index does not spare reading it, those of so many before it are not looked at, unless pages are selected.
const PASSED_BY: usize = 7;

type Taken = Result<Pooled<Decoded>, DecodeError>;

/// A segment as it was read.
#[derive(Debug, Clone)]
enum Got {
    /// Its object.
    Object(Bytes),
    /// Its index, which tells all that matters.
    Index(Arc<SegmentIndex>),
}

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
    let sparing = Sparing::new(segments, wanted, keeper.newer().clone(), pools.2.clone());
    let read = |number: usize| {
        let sparing = &sparing;
        async move {
            let Some(segment) = segments.get(number) else { return Ok((number, Got::Object(Bytes::new()))) };
            if sparing.is_thinkable(segments, number)
                // Where it cannot be read, the segment is.
                && let Ok(index) = indexes.index(&segment.entry).await
                && sparing.is_enough(number, &index)
            {
                return Ok((number, Got::Index(Arc::new(index))));
            }
            Ok::<_, SearchError>((number, Got::Object(indexes.object(&segment.entry).await?)))
        }
    };
    let mut objects = stream::iter(numbers).map(read).buffered(threads.max(1));
    let mut next: Option<(usize, Got)> = None;
    let mut taking: VecDeque<(Wal, oneshot::Receiver<Option<Taken>>)> = VecDeque::new();
    let mut count = Segments::default();
    let crew = crew(threads, keeper.newer());
    loop {
        let got = objects.try_next().await?;
        let more = got.is_some();
        if let Some((number, here)) = got {
            // A segment is also read for the end of a record that begins in the one before.
            let after = next.take().filter(|(n, _)| *n == number.saturating_add(1)).map(|(_, got)| got);
            next = Some((number, here.clone()));
            let (segments, (buffers, ends, pools)) = (Arc::clone(segments), pools.clone());
            let wal = Wal { segments, number, here, after, wanted, buffers, ends, pools };
            let (done, taken) = oneshot::channel();
            let _ = crew.send((wal.clone(), done));
            taking.push_back((wal, taken));
        }
        // While what one segment's records do is added, the others are taken apart.
        while taking.len() > if more { threads.saturating_add(UNDER_WAY) } else { 0 } {
            let Some((mut wal, taken)) = taking.pop_front() else { break };
            let Some(segment) = segments.get(wal.number) else { continue };
            let mut taken = taken.await.expect("taking a segment apart does not panic");
            let mut is_over_added = false;
            let mut decoded = loop {
                let usable = taken.transpose().map_err(|e| failed(e, segment))?;
                if let Some(decoded) = usable.filter(|decoded| keeper.fits(decoded)) {
                    let Some(at) = decoded.unfinished.filter(|_| !is_over_added) else { break decoded };
                    // The last record of all has to be seen.
                    let may_be_told = keeper.has_last_record();
                    let told = may_be_told.then(|| blocking(|| wal.head(at, keeper.newer()))).flatten();
                    // Where the end of the one that goes over the edge is not told, it may matter what it is.
                    if told.is_some() || matches!(wal.here, Got::Object(_)) {
                        let over = match told {
                            Some(told) => Some(told),
                            None => long_record(indexes, segments, wal.number, at).await?,
                        };
                        if let Some(mut over) = over {
                            blocking(|| keeper.add(&mut over))?;
                        }
                        is_over_added = true;
                        if keeper.fits(&decoded) {
                            break decoded;
                        }
                    }
                }
                // Its index does not tell all, or a copy of a database was met since: what is of no use behind it may be of
                // use to it.
                if let Got::Index(_) = wal.here {
                    wal.here = Got::Object(indexes.object(&segment.entry).await?);
                }
                taken = blocking(|| wal.take(keeper.newer()));
            };
            progress.count(Counted::Records, decoded.count);
            blocking(|| keeper.add(&mut decoded))?;
            match wal.here {
                Got::Object(_) => count.read = count.read.saturating_add(1),
                Got::Index(_) => count.spared = count.spared.saturating_add(1),
            }
            progress.advance(segment.entry.info.size.bytes());
        }
        if !more {
            return Ok(keeper.finish(count));
        }
    }
}

/// Which segments' indexes are looked at, and whether those tell all that matters.
struct Sparing {
    wanted: Wanted,
    newer: Newer,
    pools: Pools,
    /// The last record in the range begins in this segment or before; it has to be seen.
    last: usize,
    /// No segment behind this one is looked at.
    next: AtomicUsize,
}

impl Sparing {
    fn new(segments: &[LogSegment], wanted: Wanted, newer: Newer, pools: Pools) -> Self {
        let begins = |s: &LogSegment| s.entry.info.first_record.is_some_and(|first| first < wanted.until);
        let last = segments.iter().rposition(begins).unwrap_or(0);
        Self { wanted, newer, pools, last, next: AtomicUsize::new(usize::MAX) }
    }

    /// Whether a segment's index might tell all that matters.
    fn is_thinkable(&self, segments: &[LogSegment], number: usize) -> bool {
        let Some(segment) = segments.get(number) else { return false };
        let info = &segment.entry.info;
        let end = segment.start.saturating_add(info.size.bytes());
        let is_whole = segment.start >= self.wanted.from && end <= segment.usable_end.min(self.wanted.until);
        // Of the record over its end the one that follows tells, or at least that it was not cut off by a crash.
        let after = segments.get(number.saturating_add(1));
        let has_end = info.pending.is_none() || after.is_some_and(|after| after.entry.info.head_joined);
        is_whole && has_end && number < self.last && number <= self.next.load(Ordering::Relaxed)
    }

    fn is_enough(&self, number: usize, index: &SegmentIndex) -> bool {
        let is_enough = told::is_enough(index, self.newer.read().made_anew(), &self.pools);
        if !is_enough && !self.pools.selects_some() {
            self.next.store(number.saturating_sub(PASSED_BY.saturating_add(1)), Ordering::Relaxed);
        }
        is_enough
    }
}

/// Threads that take segments apart, until nobody has any for them. Each takes the next at once. They are none of the
/// runtime's: of those it has a certain number, which it reads the archive with.
fn crew(threads: usize, newer: &Newer) -> mpsc::Sender<(Wal, oneshot::Sender<Option<Taken>>)> {
    let (sender, segments) = mpsc::channel::<(Wal, oneshot::Sender<Option<Taken>>)>();
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
    here: Got,
    after: Option<Got>,
    wanted: Wanted,
    /// Memory for segments, and for the first parts of those that follow.
    buffers: Pool<Vec<u8>>,
    ends: Pool<Vec<u8>>,
    pools: Pools,
}

impl Wal {
    /// What its records do; none where its index does not tell that after all.
    fn take(&self, newer: &Newer) -> Option<Taken> {
        match &self.here {
            Got::Index(index) => told::segment(index, newer, &self.pools).map(Ok),
            Got::Object(object) => Some(self.take_apart(object, newer)),
        }
    }

    fn take_apart(&self, object: &[u8], newer: &Newer) -> Taken {
        let Some(segment) = self.segments.get(self.number) else { return Ok(Pooled::default()) };
        let info = &segment.entry.info;
        let Some(span) = SegmentSpan::containing(segment.start, info.size) else {
            return Ok(Pooled::default());
        };
        let expected = Expected { major: Some(info.major), ..Expected::default() };
        let wanted = Wanted { until: self.wanted.until.min(segment.usable_end), ..self.wanted };
        // What is wrong with the segment that follows was told when that was taken apart.
        let mut end = self.ends.take();
        let next = self.after.as_ref().and_then(|after| {
            let Got::Object(object) = after else { return None };
            let mut wal = StoredWal::open(object, std::mem::take(&mut *end)).ok()?;
            wal.reach(END_BYTES).ok()?;
            *end = wal.into_bytes();
            Some(end.as_slice())
        });
        let source = Source { object, next, span, expected, kept: KEPT_BYTES };
        decode_segment(source, &mut self.buffers.take(), wanted, newer, &self.pools)
    }

    /// What the record does that starts at `at` and ends in the segment that follows, where that segment's index tells it.
    fn head(&self, at: Lsn, newer: &Newer) -> Option<Pooled<Decoded>> {
        match self.after.as_ref()? {
            Got::Index(index) => told::head(index, at, newer, &self.pools),
            Got::Object(object) => {
                let (_, index) = SegmentDirectory::with_index(object, object.len() as u64).ok()?.ok()?;
                told::head(&index, at, newer, &self.pools)
            }
        }
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
) -> Result<Option<Pooled<Decoded>>, ForwardError> {
    let entries: Vec<_> = segments.iter().skip(number).map(|s| &s.entry).collect();
    let look = move |record: &Record<'_>| -> Option<Option<Result<Decoded, DecodeError>>> {
        (record.start >= at).then(|| (record.start == at).then(|| decode_record(record)))
    };
    let found = indexes.records(&entries, look).await?;
    let Some(segment) = segments.get(number) else { return Ok(None) };
    let found = found.flatten().transpose().map_err(|e| failed(e, segment))?;
    Ok(found.map(Pooled::from))
}
