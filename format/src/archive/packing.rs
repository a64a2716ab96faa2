//! Compresses a segment while it is read: chunk by chunk, in few buffers, on several threads.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use zstd::zstd_safe::{CParameter, Strategy};

use super::stored_segment::{CHUNK_BYTES, WalDigest};
use crate::engines::postgres::wal::WalBytes;

pub(super) type Compressor<'a> = zstd::bulk::Compressor<'a>;

/// Up to this level WAL has settings of its own: what zstd has for the highest of these levels takes longer and makes no kind
/// of WAL that was tried notably smaller (docs/performance.md).
const TUNED_LEVEL_MAX: i32 = 3;
/// Numbers of relations, blocks and transactions recur in so few bytes; zstd's own level 1 does not see matches so short.
const MIN_MATCH: u32 = 5;
/// Its table stays in the nearest cache.
const HASH_LOG: u32 = 14;

fn compressor(level: i32) -> Option<Compressor<'static>> {
    let mut compressor = Compressor::new(level).ok()?;
    if (1..=TUNED_LEVEL_MAX).contains(&level) {
        let strategy = CParameter::Strategy(Strategy::ZSTD_fast);
        for parameter in [strategy, CParameter::MinMatch(MIN_MATCH), CParameter::HashLog(HASH_LOG)] {
            compressor.set_parameter(parameter).ok()?;
        }
    }
    Some(compressor)
}

/// What a segment became.
#[derive(Debug)]
pub(super) struct Packed<T> {
    pub(super) digest: [u8; 32],
    pub(super) chunks: Chunks,
    /// What was made of its bytes meanwhile.
    pub(super) made: T,
}

/// Compressed chunks one behind the other.
#[derive(Debug, Clone, Default)]
pub(super) struct Chunks {
    pub(super) stored: Vec<u8>,
    /// How long each is, and its checksum.
    pub(super) each: Vec<(usize, u32)>,
}

/// Compresses the `length` bytes that `read` gives on `threads` threads, this one among them, and puts them behind `before`.
/// `make` sees the same bytes meanwhile, and what it leaves is read after it. `add` then works on what was made, while the
/// last chunks are compressed. Every byte is read once.
pub(super) fn pack<T, U, E>(
    length: usize,
    read: impl FnMut(usize, &mut [u8]) -> io::Result<()>,
    level: i32,
    threads: usize,
    before: &[u8],
    make: impl FnOnce(&mut dyn WalBytes) -> Result<T, E>,
    add: impl FnOnce(T, Option<&mut Compressor<'_>>) -> U,
) -> io::Result<Result<Packed<U>, E>> {
    let helpers = threads.saturating_sub(1).min(length.div_ceil(CHUNK_BYTES).saturating_sub(1));
    let belt = Belt::new(before);
    let mut press = Press::new(level);
    let (digest, made) = std::thread::scope(|scope| {
        // However this ends, the helpers end as well.
        let _ending = Ending(&belt);
        for _ in 0..helpers {
            scope.spawn(|| belt.help(&mut Press::new(level)));
        }
        let mut feed = Feed {
            belt: &belt,
            read,
            length,
            // One in each helper's hands, two that wait for it, and this thread's own.
            buffers_left: helpers.saturating_mul(3).saturating_add(1),
            current: None,
            failed: None,
            press: &mut press,
        };
        let made = make(&mut feed);
        if made.is_ok() {
            while feed.advance().is_some() {}
        }
        match (feed.failed, made) {
            (Some(e), _) => Err(e),
            (None, Err(e)) => Ok(([0; 32], Err(e))),
            (None, Ok(made)) => {
                let made = add(made, press.compressor.as_mut());
                Ok((belt.finish(&mut press), Ok(made)))
            }
        }
    })?;
    let chunks = belt.out.into_inner().unwrap_or_else(PoisonError::into_inner).chunks;
    Ok(made.map(|made| Packed { digest, chunks, made }))
}

/// A chunk's number and its WAL.
#[derive(Debug)]
struct Chunk {
    number: usize,
    wal: Vec<u8>,
}

/// A compressor and the place that it writes to.
struct Press<'a> {
    compressor: Option<Compressor<'a>>,
    scratch: Vec<u8>,
}

impl Press<'_> {
    fn new(level: i32) -> Self {
        let bound = zstd::zstd_safe::compress_bound(CHUNK_BYTES);
        Self { compressor: compressor(level), scratch: Vec::with_capacity(bound) }
    }

    /// Compresses a chunk unless that makes it longer.
    fn press<'s>(&'s mut self, wal: &'s [u8]) -> &'s [u8] {
        let compressor = self.compressor.as_mut();
        let bytes = compressor.and_then(|c| c.compress_to_buffer(wal, &mut self.scratch).ok());
        match bytes {
            Some(bytes) if bytes < wal.len() => &self.scratch,
            _ => wal,
        }
    }
}

/// What waits to be done, the buffers that wait for another chunk, and what is compressed.
#[derive(Debug)]
struct Belt {
    state: Mutex<State>,
    changed: Condvar,
    out: Mutex<Out>,
}

#[derive(Debug)]
struct State {
    /// Chunks to compress.
    plain: VecDeque<Arc<Chunk>>,
    /// Chunks to sum up, in their order.
    unsummed: VecDeque<Arc<Chunk>>,
    /// The sum so far; none while somebody adds to it.
    digest: Option<WalDigest>,
    idle: Vec<Vec<u8>>,
    is_over: bool,
    /// A helper ended before its time: what it had in hand never comes.
    is_broken: bool,
}

/// Something that whoever is free can do.
enum Work {
    Sum(Arc<Chunk>, WalDigest),
    Compress(Arc<Chunk>),
}

impl State {
    /// What comes next. One chunk after the other can be summed up, so that must not lag behind.
    fn next(&mut self) -> Option<Work> {
        if let Some(digest) = self.digest.take() {
            match self.unsummed.pop_front() {
                Some(chunk) => return Some(Work::Sum(chunk, digest)),
                None => self.digest = Some(digest),
            }
        }
        self.plain.pop_front().map(Work::Compress)
    }
}

#[derive(Debug, Default)]
struct Out {
    chunks: Chunks,
    /// What was done before its turn.
    early: BTreeMap<usize, (Vec<u8>, u32)>,
}

impl Belt {
    fn new(before: &[u8]) -> Self {
        let chunks = Chunks { stored: before.to_vec(), each: Vec::new() };
        let out = Mutex::new(Out { chunks, early: BTreeMap::new() });
        let (plain, unsummed, idle) = (VecDeque::new(), VecDeque::new(), Vec::new());
        let state =
            State { plain, unsummed, digest: Some(WalDigest::new()), idle, is_over: false, is_broken: false };
        Self { state: Mutex::new(state), changed: Condvar::new(), out }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for something to change, where something still can.
    fn wait<'s>(&self, state: MutexGuard<'s, State>) -> MutexGuard<'s, State> {
        assert!(!state.is_broken, "a thread that compresses ended early");
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, chunk: &Arc<Chunk>) {
        let mut state = self.state();
        state.plain.push_back(Arc::clone(chunk));
        state.unsummed.push_back(Arc::clone(chunk));
        self.changed.notify_all();
    }

    /// Does what comes until nothing more does.
    fn help(&self, press: &mut Press<'_>) {
        let _alarm = Alarm(self);
        let mut state = self.state();
        loop {
            state = match state.next() {
                Some(work) => self.work(state, work, press),
                None if state.is_over => return,
                None => self.wait(state),
            };
        }
    }

    /// Does what is left, and gives the sum of all chunks.
    fn finish(&self, press: &mut Press<'_>) -> [u8; 32] {
        let mut state = self.state();
        loop {
            state = match state.next() {
                Some(work) => self.work(state, work, press),
                // Nothing is left to be summed up where the sum is here.
                None => match state.digest.take() {
                    Some(digest) => return digest.finish(),
                    None => self.wait(state),
                },
            };
        }
    }

    /// Does it while others go on. The chunk's buffer comes back if nobody else looks at it any more.
    fn work<'s>(
        &'s self,
        state: MutexGuard<'s, State>,
        work: Work,
        press: &mut Press<'_>,
    ) -> MutexGuard<'s, State> {
        drop(state);
        let (chunk, digest) = match work {
            Work::Sum(chunk, mut digest) => {
                digest.update(&chunk.wal);
                (chunk, Some(digest))
            }
            Work::Compress(chunk) => {
                let stored = press.press(&chunk.wal);
                let crc = crc32fast::hash(stored);
                self.out.lock().unwrap_or_else(PoisonError::into_inner).add(chunk.number, stored, crc);
                (chunk, None)
            }
        };
        let mut state = self.state();
        state.digest = state.digest.take().or(digest);
        state.idle.extend(Arc::into_inner(chunk).map(|chunk| chunk.wal));
        self.changed.notify_all();
        state
    }
}

impl Out {
    /// Puts a chunk in its place, and behind it what waited for it.
    fn add(&mut self, number: usize, stored: &[u8], crc: u32) {
        if number != self.chunks.each.len() {
            self.early.insert(number, (stored.to_vec(), crc));
            return;
        }
        self.chunks.push(stored, crc);
        while let Some((stored, crc)) = self.early.remove(&self.chunks.each.len()) {
            self.chunks.push(&stored, crc);
        }
    }
}

impl Chunks {
    fn push(&mut self, stored: &[u8], crc: u32) {
        self.stored.extend_from_slice(stored);
        self.each.push((stored.len(), crc));
    }
}

/// Tells the others that a helper is gone.
struct Alarm<'b>(&'b Belt);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.state().is_broken = true;
            self.0.changed.notify_all();
        }
    }
}

/// Tells the helpers that nothing more comes.
struct Ending<'b>(&'b Belt);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.state().is_over = true;
        self.0.changed.notify_all();
    }
}

/// A segment's bytes as they are read. Each chunk is summed up and compressed by whoever is free while it is looked at here.
struct Feed<'b, 'c, R> {
    belt: &'b Belt,
    read: R,
    length: usize,
    /// How many more buffers there may be.
    buffers_left: usize,
    current: Option<Arc<Chunk>>,
    failed: Option<io::Error>,
    press: &'b mut Press<'c>,
}

impl<R: FnMut(usize, &mut [u8]) -> io::Result<()>> Feed<'_, '_, R> {
    /// Reads the next chunk. None behind the last, and where reading failed.
    fn advance(&mut self) -> Option<()> {
        if self.failed.is_some() {
            return None;
        }
        let number = self.current.as_ref().map_or(0, |chunk| chunk.number.saturating_add(1));
        let from = number.saturating_mul(CHUNK_BYTES);
        let bytes = self.length.checked_sub(from).filter(|left| *left > 0)?.min(CHUNK_BYTES);
        let mut wal = self.buffer();
        wal.resize(bytes, 0);
        if let Err(e) = (self.read)(from, &mut wal) {
            self.failed = Some(e);
            return None;
        }
        let chunk = Arc::new(Chunk { number, wal });
        self.belt.add(&chunk);
        self.current = Some(chunk);
        Some(())
    }

    /// A buffer that nobody uses any more, the last chunk's among them.
    fn buffer(&mut self) -> Vec<u8> {
        if let Some(chunk) = self.current.take().and_then(Arc::into_inner) {
            return chunk.wal;
        }
        let mut state = self.belt.state();
        loop {
            if let Some(idle) = state.idle.pop() {
                return idle;
            }
            if let Some(left) = self.buffers_left.checked_sub(1) {
                self.buffers_left = left;
                return Vec::new();
            }
            state = match state.next() {
                // Everybody is busy: so is this thread.
                Some(work) => self.belt.work(state, work, self.press),
                None => self.belt.wait(state),
            };
        }
    }
}

impl<R: FnMut(usize, &mut [u8]) -> io::Result<()>> WalBytes for Feed<'_, '_, R> {
    fn length(&self) -> usize {
        self.length
    }

    fn part(&mut self, range: Range<usize>) -> Option<&[u8]> {
        let wanted = range.start.checked_div(CHUNK_BYTES)?;
        while self.current.as_ref().is_none_or(|chunk| chunk.number < wanted) {
            self.advance()?;
        }
        let chunk = self.current.as_ref().filter(|chunk| chunk.number == wanted)?;
        let begin = wanted.saturating_mul(CHUNK_BYTES);
        chunk.wal.get(range.start.checked_sub(begin)?..range.end.checked_sub(begin)?)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::archive::{read_from, wal_digest};

    const BEFORE: &[u8] = b"before";

    /// Whether it ends before it is waited for or meanwhile.
    #[test]
    fn nobody_waits_for_a_helper_that_is_gone() {
        for before in [true, false] {
            let belt = Belt::new(BEFORE);
            // It has the sum in hand.
            belt.state().digest = None;
            let waited = std::thread::scope(|scope| {
                let helper = scope.spawn(|| {
                    let _alarm = Alarm(&belt);
                    if !before {
                        std::thread::sleep(std::time::Duration::from_millis(200));
                    }
                    panic!("on purpose");
                });
                if before {
                    while !belt.state().is_broken {
                        std::thread::yield_now();
                    }
                }
                let finish = || belt.finish(&mut Press::new(1));
                let waited = std::panic::catch_unwind(std::panic::AssertUnwindSafe(finish));
                assert!(helper.join().is_err());
                waited
            });
            let why = *waited.unwrap_err().downcast::<&str>().unwrap();
            assert_eq!(why, "a thread that compresses ended early");
        }
    }

    fn wal(bytes: usize, seed: u64) -> Vec<u8> {
        (0..bytes as u64).map(|i| (i.wrapping_mul(seed | 1) >> 58) as u8).collect()
    }

    fn unpacked(chunks: &Chunks, length: usize) -> Vec<u8> {
        let mut left = chunks.stored.strip_prefix(BEFORE).unwrap();
        let mut wal = Vec::new();
        for (bytes, crc) in &chunks.each {
            let (stored, rest) = left.split_at(*bytes);
            assert_eq!(crc32fast::hash(stored), *crc);
            let raw = CHUNK_BYTES.min(length - wal.len());
            match stored.len() == raw {
                true => wal.extend_from_slice(stored),
                false => wal.extend(zstd::bulk::decompress(stored, raw).unwrap()),
            }
            left = rest;
        }
        assert!(left.is_empty());
        wal
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_is_seen_and_what_is_packed_are_what_was_read(
            bytes in 0usize..(5 << 20) + 17,
            seed: u64,
            threads in 0usize..5,
            mut seen in proptest::collection::vec(0usize..5 << 20, 0..20),
        ) {
            let wal = wal(bytes, seed);
            seen.sort_unstable();
            let reads = std::cell::RefCell::new(Vec::new());
            let mut memory = read_from(&wal);
            let read = |from: usize, part: &mut [u8]| {
                reads.borrow_mut().push((from, part.len()));
                memory(from, part)
            };
            let look = |feed: &mut dyn WalBytes| {
                assert_eq!(feed.length(), wal.len());
                for at in seen {
                    let page = at & !8191;
                    assert_eq!(feed.part(page..page + 8192), wal.get(page..page + 8192), "{page}");
                }
                Ok::<_, std::convert::Infallible>(7)
            };
            let packed = pack(bytes, read, 1, threads, BEFORE, look, |seven, _| seven + 1).unwrap().unwrap();
            prop_assert_eq!(packed.made, 8);
            prop_assert_eq!(packed.digest, wal_digest(&wal));
            prop_assert!(unpacked(&packed.chunks, bytes) == wal);
            let whole: Vec<_> = (0..bytes).step_by(CHUNK_BYTES).map(|at| (at, CHUNK_BYTES.min(bytes - at))).collect();
            prop_assert_eq!(reads.into_inner(), whole);
        }
    }

    #[test]
    fn short_matches_count_at_low_levels_and_a_high_one_is_zstds_own() {
        // Records of six bytes that were there before and six that were not.
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.to_be_bytes()
        };
        let known: Vec<[u8; 8]> = (0..64).map(|_| next()).collect();
        let record = |_| {
            let (bytes, which) = (next(), usize::from(next()[0] & 63));
            known[which][..6].iter().chain(&bytes[..6]).copied().collect::<Vec<u8>>()
        };
        let wal: Vec<u8> = (0..40_000).flat_map(record).collect();
        let pressed = |level| compressor(level).unwrap().compress(&wal).unwrap();
        let of_zstd = |level| zstd::bulk::compress(&wal, level).unwrap();
        assert!(pressed(1).len() * 10 < of_zstd(1).len() * 9, "{} {}", pressed(1).len(), of_zstd(1).len());
        assert!(pressed(1) == pressed(2) && pressed(1) == pressed(3));
        assert!(pressed(6) == of_zstd(6));
        assert!(zstd::bulk::decompress(&pressed(1), wal.len()).unwrap() == wal);
    }

    #[test]
    fn a_read_that_fails_ends_it_wherever_it_is_met() {
        for (threads, fails_at, looks) in
            [1, 2, 4].into_iter().flat_map(|t| (0..4).flat_map(move |f| [(t, f, true), (t, f, false)]))
        {
            let read = |from: usize, _: &mut [u8]| match from == fails_at * CHUNK_BYTES {
                true => Err(io::Error::other("worn out")),
                false => Ok(()),
            };
            let look = |feed: &mut dyn WalBytes| match looks {
                true if feed.part(3 * CHUNK_BYTES..3 * CHUNK_BYTES + 9).is_none() => {
                    Err("its log stops early")
                }
                _ => Ok(()),
            };
            let failed = pack(4 * CHUNK_BYTES, read, 1, threads, BEFORE, look, |(), _| ()).unwrap_err();
            assert_eq!(failed.to_string(), "worn out");
        }
    }

    #[test]
    fn what_is_refused_is_not_read_to_its_end() {
        for threads in [1, 3] {
            let mut reads = 0;
            let read = |_: usize, _: &mut [u8]| {
                reads += 1;
                Ok(())
            };
            let look = |feed: &mut dyn WalBytes| {
                feed.part(CHUNK_BYTES..CHUNK_BYTES + 1).map_or(Ok(()), |_| Err("no"))
            };
            let refused = pack(16 * CHUNK_BYTES, read, 1, threads, BEFORE, look, |(), _| ()).unwrap();
            assert_eq!((refused.unwrap_err(), reads), ("no", 2));
        }
    }
}
