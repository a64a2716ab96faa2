//! Files into packs, on several threads: read, checked, compressed, put.

mod run;
mod streams;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use waltide_format::archive::{Extent, FrameCompressor, PackBuilder, SystemLayout};
use waltide_format::{BLOCK_BYTES, BackupId, Lsn};
use waltide_storage::{Archive, Bytes, Progress, StorageError};

use self::run::ExtentRun;
pub(super) use self::streams::FileStream;
use self::streams::{Feeder, Stretch, Taker};
use super::checksum::{Checksum, Hasher};
use super::control::ControlFileError;
use super::files::{Lies, SourceFile};
use super::pages::{PageRule, Verdict};
use super::wanted::Wanted;
use crate::put::put_own;

/// A frame holds this many blocks. Measured on a pgbench cluster at level 1, against frames of 1 MiB: 8 KiB take 93 % more
/// room, 128 KiB 9 %, 256 KiB 4 %; and whoever needs one page reads a whole frame.
const FRAME_BLOCKS: u32 = 32;
const FRAME_BYTES: usize = FRAME_BLOCKS as usize * BLOCK_BYTES;
/// The bits of a position that say where in a page it is.
const WITHIN_PAGE: u64 = BLOCK_BYTES as u64 - 1;
/// A pack is put when it has grown to this.
const PACK_BYTES: usize = 16 << 20;
/// A file is shared among threads in parts of this size, a multiple of a frame's.
const PART_BYTES: u64 = 64 << 20;

/// Why the files could not be copied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A file is larger than a map can say.
    #[error(
        "{path} has {bytes} bytes, more than a backup can hold of one file\nhint: move it out of the data directory."
    )]
    TooLarge {
        /// The file.
        path: String,
        /// Its size.
        bytes: u64,
    },
    /// A file is not what its backup says it is.
    #[error("{path} has the {algorithm} checksum {found}, backup_manifest says {expected}")]
    Checksum {
        /// The file.
        path: String,
        /// Which checksum.
        algorithm: &'static str,
        /// What was computed.
        found: String,
        /// What was said.
        expected: String,
    },
    /// The archive failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The caller has given up.
    #[error("the copy was interrupted")]
    Interrupted,
    /// pg_control could not be read.
    #[error(transparent)]
    Control(#[from] ControlFileError),
}

/// What to copy, and where to.
pub(super) struct CopyJob<'a> {
    pub(super) archive: &'a Archive,
    pub(super) system: &'a SystemLayout,
    pub(super) id: &'a BackupId,
    pub(super) files: &'a [SourceFile],
    /// What each file's bytes must add up to, by place; empty where nobody has said.
    pub(super) checksums: &'a [Option<Checksum>],
    /// What of each file is read, by place; empty where everything is.
    pub(super) wanted: &'a [Wanted<'a>],
    /// What gives the files that lie in something compressed.
    pub(super) streams: &'a [&'a dyn FileStream],
    /// How pages are checked; none where they carry no checksums.
    pub(super) pages: Option<PageRule>,
    pub(super) threads: usize,
    pub(super) level: i32,
    pub(super) progress: &'a dyn Progress,
    /// Set when the copy is of no use any more.
    pub(super) stop: &'a AtomicBool,
}

impl CopyJob<'_> {
    /// What a file's bytes must add up to, if somebody has said.
    fn checksum(&self, file: usize) -> Option<&Checksum> {
        self.checksums.get(file).and_then(Option::as_ref)
    }
}

/// The file that is read when all others have been.
pub(super) struct Last<'a> {
    /// Its place in the job.
    pub(super) file: usize,
    /// Gives its bytes.
    pub(super) read: &'a dyn Fn() -> Result<Vec<u8>, CopyError>,
}

/// A file as it was copied.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct CopiedFile {
    /// Where its bytes end.
    pub(super) bytes: u64,
    pub(super) extents: Vec<Extent>,
}

/// A page that did not have its checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct BadPage {
    /// The file, by its place in the job.
    pub(super) file: usize,
    /// The block in that file.
    pub(super) block: u32,
    /// The page's LSN.
    pub(super) lsn: Lsn,
}

/// What was copied.
#[derive(Debug, Default)]
pub(super) struct Copied {
    /// By place in the job; none where the file was gone.
    pub(super) files: Vec<Option<CopiedFile>>,
    /// The packs' names.
    pub(super) packs: Vec<String>,
    /// Pages that nothing excuses.
    pub(super) damaged: Vec<BadPage>,
    /// Pages that the server was writing: the log has them.
    pub(super) excused: Vec<BadPage>,
    pub(super) read_bytes: u64,
    pub(super) stored_bytes: u64,
}

/// A stretch of a file.
struct Part {
    file: usize,
    from: u64,
    /// None: to wherever the file ends when it is opened.
    to: Option<u64>,
}

/// Copies the files; `last` (pg_control) once all others are done, with the bytes that it gives. Blocks.
pub(super) fn copy(job: &CopyJob<'_>, runtime: &Handle, last: Option<Last<'_>>) -> Result<Copied, CopyError> {
    let parts = parts(job, last.as_ref().map(|last| last.file));
    let shared = Shared {
        job,
        runtime,
        parts,
        next: AtomicUsize::new(0),
        packs: AtomicU32::new(0),
        failed: AtomicBool::new(false),
    };
    let threads = match job.streams {
        [] => job.threads.clamp(1, shared.parts.len().max(1)),
        _ => job.threads.max(1),
    };
    let mut workers = std::thread::scope(|scope| {
        let shared = &shared;
        let run = |first: bool, taker: Option<Taker>| {
            scope.spawn(move || {
                let mut worker = Worker::new(shared);
                let done = worker.run(taker).and_then(|()| if first { Ok(()) } else { worker.flush() });
                done.map(|()| worker).inspect_err(|_| shared.failed.store(true, Ordering::Relaxed))
            })
        };
        let (feeder, taker) = match job.streams {
            [] => (None, None),
            _ => Some(streams::pipe(threads)).unzip(),
        };
        let feed = |feeder: Feeder| {
            scope.spawn(move || {
                feeder.run(shared).inspect_err(|_| shared.failed.store(true, Ordering::Relaxed))
            })
        };
        let feeding = feeder.map(feed);
        let handles: Vec<_> = (0..threads).map(|i| run(i == 0, taker.clone())).collect();
        drop(taker);
        let joined = handles.into_iter().map(|h| h.join().expect("a copying thread does not panic"));
        // The first failure is the cause of the others, which only say that they were interrupted.
        let (done, failed): (Vec<_>, Vec<_>) = joined.partition(Result::is_ok);
        let mut failed: Vec<CopyError> = failed.into_iter().filter_map(Result::err).collect();
        let fed = feeding.map(|h| h.join().expect("a thread that reads a stream does not panic"));
        failed.extend(fed.and_then(Result::err));
        failed.sort_by_key(|e| matches!(e, CopyError::Interrupted));
        match failed.into_iter().next() {
            Some(e) => Err(e),
            None => Ok(done.into_iter().filter_map(Result::ok).collect::<Vec<_>>()),
        }
    })?;
    if let (Some(last), Some(worker)) = (last, workers.first_mut()) {
        worker.whole(last.file, &(last.read)()?)?;
    }
    if let Some(worker) = workers.first_mut() {
        worker.flush()?;
    }
    let packs = shared.packs.load(Ordering::Relaxed);
    let mut copied = Copied {
        files: vec![None; job.files.len()],
        packs: (0..packs).map(|n| pack_name(job.id, n)).collect(),
        ..Copied::default()
    };
    for worker in workers {
        copied.read_bytes = copied.read_bytes.saturating_add(worker.read_bytes);
        copied.stored_bytes = copied.stored_bytes.saturating_add(worker.stored_bytes);
        copied.damaged.extend(worker.damaged);
        copied.excused.extend(worker.excused);
        for done in worker.done {
            let Some(file) = copied.files.get_mut(done.file) else { continue };
            let file = file.get_or_insert_default();
            file.bytes = file.bytes.max(done.end);
            file.extents.extend(done.extents);
        }
    }
    for file in copied.files.iter_mut().flatten() {
        file.extents.sort_unstable_by_key(|e| e.first_block);
    }
    copied.damaged.sort_unstable();
    Ok(copied)
}

/// The stretches to copy, in the files' order, so that a pack holds neighbours.
fn parts(job: &CopyJob<'_>, last: Option<usize>) -> Vec<Part> {
    let mut parts = Vec::with_capacity(job.files.len());
    let alone =
        |(file, source): &(usize, &SourceFile)| Some(*file) != last && source.lies != Lies::Compressed;
    for (file, source) in job.files.iter().enumerate().filter(alone) {
        let whole = job.checksum(file).is_some();
        let mut from = 0u64;
        while !whole && source.bytes.saturating_sub(from) > PART_BYTES {
            let to = from.saturating_add(PART_BYTES);
            parts.push(Part { file, from, to: Some(to) });
            from = to;
        }
        parts.push(Part { file, from, to: None });
    }
    parts
}

fn pack_name(id: &BackupId, number: u32) -> String {
    format!("{id}-{number:04}")
}

struct Shared<'a> {
    job: &'a CopyJob<'a>,
    runtime: &'a Handle,
    parts: Vec<Part>,
    next: AtomicUsize,
    packs: AtomicU32,
    failed: AtomicBool,
}

impl Shared<'_> {
    /// Fails once somebody else has, or the caller has given up.
    fn go_on(&self) -> Result<(), CopyError> {
        match self.failed.load(Ordering::Relaxed) || self.job.stop.load(Ordering::Relaxed) {
            true => Err(CopyError::Interrupted),
            false => Ok(()),
        }
    }
}

impl SourceFile {
    /// Where in its source it starts.
    fn start(&self) -> u64 {
        if let Lies::From(at) = self.lies { at } else { 0 }
    }

    /// How much of `length` bytes is copied: a page that was just being added is not there yet, unless somebody has said
    /// what the bytes must add up to.
    fn copied_bytes(&self, length: u64, checksum: Option<&Checksum>) -> u64 {
        match self.relation {
            Some(_) if checksum.is_none() => length & !WITHIN_PAGE,
            _ => length,
        }
    }

    /// Whether what went through `hasher` is what the file should be.
    fn compare(&self, checksum: Option<&Checksum>, hasher: Option<Hasher>) -> Result<(), CopyError> {
        let (Some(checksum), Some(hasher)) = (checksum, hasher) else { return Ok(()) };
        checksum.compare(hasher).map_err(|(found, expected)| CopyError::Checksum {
            path: self.path.clone(),
            algorithm: checksum.algorithm(),
            found,
            expected,
        })
    }
}

/// A stretch that was copied.
struct Done {
    file: usize,
    end: u64,
    extents: Vec<Extent>,
}

/// One thread's share: the pack being filled, the one being put, and what has become of the stretches.
struct Worker<'a> {
    shared: &'a Shared<'a>,
    compressor: FrameCompressor,
    pack: Option<(u32, PackBuilder)>,
    putting: Option<JoinHandle<Result<(), StorageError>>>,
    done: Vec<Done>,
    damaged: Vec<BadPage>,
    excused: Vec<BadPage>,
    read_bytes: u64,
    stored_bytes: u64,
}

impl<'a> Worker<'a> {
    fn new(shared: &'a Shared<'a>) -> Self {
        Self {
            shared,
            compressor: FrameCompressor::new(shared.job.level),
            pack: None,
            putting: None,
            done: Vec::new(),
            damaged: Vec::new(),
            excused: Vec::new(),
            read_bytes: 0,
            stored_bytes: 0,
        }
    }

    fn run(&mut self, taker: Option<Taker>) -> Result<(), CopyError> {
        let mut buffer = vec![0; FRAME_BYTES];
        while let Some(part) = self.shared.parts.get(self.shared.next.fetch_add(1, Ordering::Relaxed)) {
            self.part(part, &mut buffer)?;
        }
        let Some(taker) = taker else { return Ok(()) };
        while let Some(mut stretch) = taker.next() {
            self.stretch(&mut stretch)?;
            taker.give_back(stretch);
        }
        Ok(())
    }

    /// What was read of a stream.
    fn stretch(&mut self, stretch: &mut Stretch) -> Result<(), CopyError> {
        let Some(source) = self.shared.job.files.get(stretch.file) else { return Ok(()) };
        let mut run = ExtentRun::default();
        let (file, mut at) = (stretch.file, stretch.at);
        for raw in stretch.bytes_mut().chunks_mut(FRAME_BYTES) {
            self.shared.go_on()?;
            self.frame_of(&mut run, (file, source), None, at, raw)?;
            at = at.saturating_add(raw.len() as u64);
        }
        self.done.push(Done { file, end: at, extents: run.finish() });
        Ok(())
    }

    fn part(&mut self, part: &Part, buffer: &mut [u8]) -> Result<(), CopyError> {
        let job = self.shared.job;
        let Some(source) = job.files.get(part.file) else { return Ok(()) };
        let failed = |e| CopyError::Read { path: source.source.clone(), source: e };
        let file = match File::open(&source.source) {
            Ok(file) => file,
            // Gone since it was listed: the log says why.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(failed(e)),
        };
        let wanted = job.wanted.get(part.file).unwrap_or(&Wanted::Whole);
        let advice = match wanted {
            Wanted::Whole => rustix::fs::Advice::Sequential,
            Wanted::Blocks { .. } => rustix::fs::Advice::Random,
        };
        let _ = rustix::fs::fadvise(&file, 0, None, advice);
        let checksum = job.checksum(part.file);
        let start = source.start();
        let length = match (part.to, source.lies) {
            (Some(to), _) => to,
            (None, Lies::Alone) => file.metadata().map_err(failed)?.len(),
            (None, _) => source.bytes,
        };
        let length = source.copied_bytes(length, checksum);
        let mut hasher = checksum.map(Checksum::hasher);
        let mut run = ExtentRun::default();
        let mut at = part.from;
        while at < length {
            self.shared.go_on()?;
            let Some(stretch) = wanted.next_stretch(at..length) else {
                at = length;
                break;
            };
            at = stretch.start;
            let room =
                usize::try_from(stretch.end.saturating_sub(at)).unwrap_or(usize::MAX).min(buffer.len());
            let room = buffer.get_mut(..room).unwrap_or_default();
            let found = read_full(&file, room, start.saturating_add(at)).map_err(failed)?;
            if found < room.len() && source.lies != Lies::Alone {
                return Err(failed(io::ErrorKind::UnexpectedEof.into()));
            }
            let mut raw = room.get_mut(..found).unwrap_or_default();
            if source.relation.is_some() && hasher.is_none() {
                let pages = usize::try_from(raw.len() as u64 & !WITHIN_PAGE).unwrap_or(0);
                raw = raw.get_mut(..pages).unwrap_or_default();
            }
            if raw.is_empty() {
                break;
            }
            if let Some(hasher) = &mut hasher {
                hasher.update(raw);
            }
            self.frame_of(&mut run, (part.file, source), Some(&file), at, raw)?;
            at = at.saturating_add(raw.len() as u64);
        }
        source.compare(checksum, hasher)?;
        self.done.push(Done { file: part.file, end: at, extents: run.finish() });
        Ok(())
    }

    /// Checks and keeps what of a file starts at `at`, a frame at the most.
    fn frame_of(
        &mut self,
        run: &mut ExtentRun,
        (number, source): (usize, &SourceFile),
        file: Option<&File>,
        at: u64,
        raw: &mut [u8],
    ) -> Result<(), CopyError> {
        let job = self.shared.job;
        let first_block = self.block_number(source, at)?;
        if let Some(rule) = job.pages {
            self.check_pages(file, number, source, first_block, raw, &rule);
        }
        self.frame(run, first_block, raw)?;
        job.progress.advance(raw.len() as u64);
        Ok(())
    }

    fn block_number(&self, source: &SourceFile, at: u64) -> Result<u32, CopyError> {
        let block = at.checked_div(BLOCK_BYTES as u64).and_then(|block| u32::try_from(block).ok());
        // One less than the most, so that the block behind the last has a number too.
        block
            .filter(|block| *block < u32::MAX - FRAME_BLOCKS)
            .ok_or_else(|| CopyError::TooLarge { path: source.path.clone(), bytes: source.bytes })
    }

    /// Checks the pages of a frame of a relation; those that the server was writing are read again where that can be,
    /// and replaced by what is there.
    fn check_pages(
        &mut self,
        file: Option<&File>,
        number: usize,
        source: &SourceFile,
        first_block: u32,
        raw: &mut [u8],
        rule: &PageRule,
    ) {
        let Some(relation) = source.relation else { return };
        for (block, page) in (first_block..).zip(raw.chunks_exact_mut(BLOCK_BYTES)) {
            let Some(page): Option<&mut [u8; BLOCK_BYTES]> = page.try_into().ok() else { continue };
            let at = source.start().saturating_add(u64::from(block).saturating_mul(BLOCK_BYTES as u64));
            let block_of_fork = rule.block_of_fork(relation.segment, block);
            let verdict = match file {
                Some(file) => rule.judge(page, block_of_fork, |page| {
                    read_full(file, page, at).is_ok_and(|found| found == BLOCK_BYTES)
                }),
                None => rule.judge_once(page, block_of_fork),
            };
            match verdict {
                Verdict::Good => {}
                Verdict::BeingWritten(lsn) => self.excused.push(BadPage { file: number, block, lsn }),
                Verdict::Damaged(lsn) => self.damaged.push(BadPage { file: number, block, lsn }),
            }
        }
    }

    /// A file that was read already.
    fn whole(&mut self, file: usize, bytes: &[u8]) -> Result<(), CopyError> {
        let mut run = ExtentRun::default();
        for (i, raw) in (0u32..).zip(bytes.chunks(FRAME_BYTES)) {
            self.frame(&mut run, i.saturating_mul(FRAME_BLOCKS), raw)?;
            self.shared.job.progress.advance(raw.len() as u64);
        }
        self.done.push(Done { file, end: bytes.len() as u64, extents: run.finish() });
        Ok(())
    }

    fn frame(&mut self, run: &mut ExtentRun, first_block: u32, raw: &[u8]) -> Result<(), CopyError> {
        self.read_bytes = self.read_bytes.saturating_add(raw.len() as u64);
        let frame = self.compressor.frame(raw);
        if frame.is_empty() {
            run.zeros(first_block, raw);
            return Ok(());
        }
        let shared = self.shared;
        let (number, pack) = self
            .pack
            .get_or_insert_with(|| (shared.packs.fetch_add(1, Ordering::Relaxed), PackBuilder::default()));
        let offset = pack.push(&frame);
        run.push(Extent {
            pack: *number,
            offset,
            stored_bytes: u32::try_from(frame.len()).expect("a frame is at most as long as its run"),
            first_block,
            raw_bytes: u32::try_from(raw.len()).expect("a run is at most a frame's length"),
            crc: crc32fast::hash(raw),
        });
        if pack.len() >= PACK_BYTES {
            self.put_pack()?;
        }
        Ok(())
    }

    /// Hands the pack over; at most one is being put at a time.
    fn put_pack(&mut self) -> Result<(), CopyError> {
        let Some((number, pack)) = self.pack.take() else { return Ok(()) };
        self.wait()?;
        let job = self.shared.job;
        let object = Bytes::from(pack.finish());
        self.stored_bytes = self.stored_bytes.saturating_add(object.len() as u64);
        let (archive, path) = (job.archive.clone(), job.system.pack(&pack_name(job.id, number)));
        self.putting = Some(self.shared.runtime.spawn(async move { put_own(&archive, &path, object).await }));
        Ok(())
    }

    fn wait(&mut self) -> Result<(), CopyError> {
        match self.putting.take() {
            None => Ok(()),
            Some(putting) => match self.shared.runtime.block_on(putting) {
                Ok(done) => Ok(done?),
                Err(_) => Err(CopyError::Interrupted),
            },
        }
    }

    fn flush(&mut self) -> Result<(), CopyError> {
        self.put_pack()?;
        self.wait()
    }
}

/// Reads until the buffer is full or the file ends.
fn read_full(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0usize;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, at.saturating_add(done as u64)) {
            Ok(0) => break,
            Ok(n) => done = done.saturating_add(n),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}
