//! The directory that WAL lies in: segments, timeline histories, and what is ready to be archived.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use waltide_format::archive::PushSource;
use waltide_format::engines::postgres::cluster::{ClusterState, ControlFile, History};
use waltide_format::engines::postgres::wal::{LONG_HEADER_BYTES, PAGE_BYTES, PageHeader};
use waltide_format::{Lsn, SegmentName, SegmentSize, SystemId, TimelineId, TimestampTz, WalFileName};

/// The largest segment there is.
pub(crate) const SEGMENT_BYTES_MAX: u64 = 1 << 30;
/// No history file comes near this: a line for each promotion in the cluster's life.
pub(crate) const TEXT_BYTES_MAX: u64 = 1 << 20;

/// How much of a segment's end is read first: a page behind whose header a record starts is nearly always there.
const ENDS_BYTES: usize = 128 << 10;
/// How often and at what distance the place of the resident shipper is asked for.
const LOCK_TRIES: u32 = 20;
const LOCK_STEP: Duration = Duration::from_millis(10);

/// `pg_wal`, or any directory that files of it were copied to.
#[derive(Debug, Clone)]
pub(crate) struct WalDir {
    path: PathBuf,
}

impl WalDir {
    /// The directory at `path`.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// The directory that `file` lies in.
    pub(crate) fn of(file: &Path) -> Self {
        Self::new(file.parent().unwrap_or(Path::new("")).to_owned())
    }

    pub(crate) fn file(&self, name: impl ToString) -> PathBuf {
        self.path.join(name.to_string())
    }

    pub(crate) fn archive_status(&self) -> PathBuf {
        self.path.join("archive_status")
    }

    /// A segment that lies here, whole; none where there is no such file or it cannot be one.
    pub(crate) fn segment(&self, name: SegmentName) -> Option<Vec<u8>> {
        read_whole(&self.file(name), SEGMENT_BYTES_MAX).ok()
    }

    /// The first `bytes` bytes of a segment that lies here.
    pub(crate) fn segment_head(&self, name: SegmentName, bytes: u64) -> Option<Vec<u8>> {
        read_head(&self.file(name), bytes).ok()
    }

    /// The first page and the last bytes of a segment that lies here, in their places, and zeros between them.
    pub(crate) fn segment_ends(&self, name: SegmentName, size: SegmentSize) -> Option<Vec<u8>> {
        let file = File::open(self.file(name)).ok()?;
        if file.metadata().ok()?.len() != size.bytes() {
            return None;
        }
        // Memory that nobody touches is never taken.
        let mut bytes = vec![0; usize::try_from(size.bytes()).ok()?];
        let tail_at = bytes.len().checked_sub(ENDS_BYTES)?;
        file.read_exact_at(bytes.get_mut(..PAGE_BYTES)?, 0).ok()?;
        file.read_exact_at(bytes.get_mut(tail_at..)?, tail_at as u64).ok()?;
        Some(bytes)
    }

    /// The history of a timeline, where its file lies here and is one. The first timeline has none.
    pub(crate) fn history(&self, timeline: TimelineId) -> Option<History> {
        let text = read_whole(&self.file(WalFileName::History(timeline)), TEXT_BYTES_MAX).ok()?;
        History::parse(timeline, &text).ok()
    }

    /// Takes the place of the one resident shipper; none where another has it. It ends with the file, whatever ends the
    /// process, and nothing is written into the data directory for it.
    pub(crate) fn lock(&self) -> io::Result<Option<File>> {
        let status = File::open(self.archive_status())?;
        for _ in 0..LOCK_TRIES {
            match flock(&status, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Some(status)),
                // It may also be a push that only asks, which takes no time.
                Err(Errno::WOULDBLOCK) => std::thread::sleep(LOCK_STEP),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(None)
    }

    /// Whether a resident shipper works here. A file system without locks says no.
    pub(crate) fn is_watched(&self) -> bool {
        let status = File::open(self.archive_status());
        status.is_ok_and(|status| {
            flock(&status, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
        })
    }

    /// What PostgreSQL waits to have archived, in the order in which it would ask: histories first, then by name.
    pub(crate) fn ready(&self) -> io::Result<Vec<WalFileName>> {
        let mut ready = Vec::new();
        for entry in std::fs::read_dir(self.archive_status())? {
            let name = entry?.file_name();
            let stem = name.to_str().and_then(|name| name.strip_suffix(".ready"));
            ready.extend(stem.and_then(|stem| stem.parse::<WalFileName>().ok()));
        }
        ready.sort_unstable_by_key(|name| (!matches!(name, WalFileName::History(_)), name.to_string()));
        Ok(ready)
    }

    /// Whether PostgreSQL still waits to have this file archived.
    pub(crate) fn is_ready(&self, name: WalFileName) -> bool {
        self.archive_status().join(format!("{name}.ready")).exists()
    }

    /// Who pushes what lies here: this machine, the data directory, and what its pg_control says now.
    pub(crate) fn source(&self) -> PushSource {
        let path = std::path::absolute(&self.path).unwrap_or_else(|_| self.path.clone());
        let is_wal = path.file_name().is_some_and(|name| name == "pg_wal");
        let directory = if is_wal { path.parent().unwrap_or(&path) } else { &path };
        let control = self.control();
        PushSource {
            host: crate::host::name(),
            directory: directory.to_string_lossy().into_owned(),
            pushed: TimestampTz::from_jiff(jiff::Timestamp::now()),
            timeline: control.as_ref().map(|c| c.checkpoint_copy.timeline),
            recovering: control.as_ref().map(|c| c.state == ClusterState::InArchiveRecovery),
        }
    }

    /// What pg_control says beside `pg_wal`.
    fn control(&self) -> Option<ControlFile> {
        let path = self.path.parent()?.join("global/pg_control");
        ControlFile::decode(&read_whole(&path, TEXT_BYTES_MAX).ok()?).ok()
    }

    /// Which cluster's directory this is: what pg_control says beside `pg_wal`, or else a segment that lies here.
    pub(crate) fn system(&self) -> Option<SystemId> {
        if let Some(control) = self.control() {
            return Some(control.system_id);
        }
        let directory = if self.path.as_os_str().is_empty() { Path::new(".") } else { &self.path };
        let entries = std::fs::read_dir(directory).ok()?;
        entries.flatten().find_map(|entry| {
            let name: SegmentName = entry.file_name().to_str()?.parse().ok()?;
            let head = self.segment_head(name, LONG_HEADER_BYTES as u64)?;
            let long = PageHeader::decode_anywhere(&head, Lsn::ZERO).ok()?.long?;
            Some(long.system_id)
        })
    }
}

/// A file of at most `max` bytes; its size is checked before memory is taken.
pub(crate) fn read_whole(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let (file, length) = open_whole(path, max)?;
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
    file.take(max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A file in pg_wal that is open, so that all of its bytes are of one file, whatever gets its name.
#[derive(Debug)]
pub(crate) struct OpenFile {
    file: File,
    length: u64,
}

impl OpenFile {
    /// Opens a file of at most `max` bytes.
    pub(crate) fn open(path: &Path, max: u64) -> io::Result<Self> {
        let (file, length) = open_whole(path, max)?;
        Ok(Self { file, length })
    }

    /// How long it was when it was opened.
    pub(crate) const fn length(&self) -> u64 {
        self.length
    }

    /// Its bytes from `at` on, as many as `part` takes.
    pub(crate) fn read(&self, at: u64, part: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(part, at)
    }

    /// Its first `bytes` bytes, or all of a shorter one.
    pub(crate) fn head(&self, bytes: u64) -> io::Result<Vec<u8>> {
        let mut head = vec![0; usize::try_from(self.length.min(bytes)).map_err(io::Error::other)?];
        self.read(0, &mut head)?;
        Ok(head)
    }

    /// All of it.
    pub(crate) fn whole(&self) -> io::Result<Vec<u8>> {
        self.head(self.length)
    }
}

fn open_whole(path: &Path, max: u64) -> io::Result<(File, u64)> {
    let file = File::open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    if meta.len() > max {
        let text = format!("it has {} bytes where {max} are the most", meta.len());
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
    }
    Ok((file, meta.len()))
}

/// The first `bytes` bytes of a file, or all of a shorter one.
pub(crate) fn read_head(path: &Path, bytes: u64) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let length = usize::try_from(file.metadata()?.len().min(bytes)).unwrap_or(0);
    let mut head = Vec::with_capacity(length);
    file.take(bytes).read_to_end(&mut head)?;
    Ok(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ready_is_told_histories_first_and_oldest_first() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = WalDir::new(scratch.path().to_owned());
        std::fs::create_dir(dir.archive_status()).unwrap();
        let names = [
            "000000010000000000000010.ready",
            "000000010000000000000002.ready",
            "000000010000000000000001.done",
            "000000010000000000000003.partial.ready",
            "000000010000000000000002.00000028.backup.ready",
            "00000002.history.ready",
            "nonsense.ready",
        ];
        for name in names {
            std::fs::write(dir.archive_status().join(name), "").unwrap();
        }
        let ready: Vec<_> = dir.ready().unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(
            ready,
            [
                "00000002.history",
                "000000010000000000000002",
                "000000010000000000000002.00000028.backup",
                "000000010000000000000003.partial",
                "000000010000000000000010",
            ]
        );
        assert!(dir.is_ready("00000002.history".parse().unwrap()));
        assert!(!dir.is_watched());
        let lock = dir.lock().unwrap();
        assert!(lock.is_some() && dir.is_watched() && dir.lock().unwrap().is_none());
        drop(lock);
        // A process that another test starts at this moment has the lock too, until it runs its own program.
        let is_free = || {
            std::thread::sleep(LOCK_STEP);
            !dir.is_watched()
        };
        assert!((0..1000).any(|_| is_free()));
        assert!(!dir.is_ready("000000010000000000000001".parse().unwrap()));
    }

    #[test]
    fn a_file_that_is_too_large_or_no_file_is_refused_before_it_is_read() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("x");
        std::fs::write(&path, [7; 100]).unwrap();
        assert_eq!(read_whole(&path, 100).unwrap().len(), 100);
        assert_eq!(read_whole(&path, 99).unwrap_err().to_string(), "it has 100 bytes where 99 are the most");
        assert_eq!(read_head(&path, 9).unwrap().len(), 9);
        assert!(read_whole(scratch.path(), 99).is_err());
    }
}
