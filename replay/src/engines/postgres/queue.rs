//! Segments brought ahead of PostgreSQL's asking, in a bounded place beside pg_wal's own files.
//!
//! An entry is named `<segment>.<source>.<crc>`: the source says which archive, cluster and system it came out
//! of, the checksum covers its bytes. What does not fit its name is never handed over. PostgreSQL ignores the
//! directory, and backups leave pg_wal's contents out.
//!
//! A restore fills it before there is a server. Recovery first asks for history files, then for the checkpoint's segment,
//! then for those from the redo point on, the checkpoint's among them once more: until it is past that, nothing is
//! given away for good. Nor is what a restore put there where that is all there is: recovery asks for the last segment
//! again, more than once, before it ends. A note beside the entries says so.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use waltide_format::{Lsn, SegmentName, SegmentSize, SystemId, TimelineId};

/// The directory's name in pg_wal.
const DIR: &str = "waltide-queue";
/// The file whose lock says that someone is filling the queue.
const LOCK: &str = "lock";
/// What a restore notes of what it put there: the target's timeline, and as far as recovery comes back.
const FILLED: &str = "filled";
/// There as long as no segment was asked for since.
const UNASKED: &str = "unasked";
/// So much of an entry is in memory at once.
const PIECE_BYTES: usize = 128 << 10;

/// How far to read ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadAhead {
    /// So many segments at the most.
    pub segments: u64,
    /// So many bytes at the most.
    pub bytes: u64,
}

impl Default for ReadAhead {
    fn default() -> Self {
        Self { segments: 8, bytes: 128 << 20 }
    }
}

impl ReadAhead {
    /// How many segments of this size that is.
    pub(crate) fn count(self, size: SegmentSize) -> u64 {
        self.segments.min(self.bytes.checked_div(size.bytes()).unwrap_or(0))
    }
}

/// What a reader that goes ahead should bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// The segment that PostgreSQL was given last.
    pub after: SegmentName,
    /// Its size.
    pub size: SegmentSize,
    /// The system it belongs to.
    pub system: SystemId,
}

/// What a restore filled the queue for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Filled {
    /// The timeline that recovery goes to.
    pub(crate) timeline: TimelineId,
    /// Segments that begin by here are asked for more than once.
    pub(crate) again_until: Lsn,
}

/// When an entry is safe from a crash of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Durable {
    /// Before it has its name.
    Now,
    /// Once everything around it is synced: no server has seen it before.
    Later,
}

/// The queue of one pg_wal, as filled from one source.
#[derive(Debug, Clone)]
pub(crate) struct Queue {
    dir: PathBuf,
    source: String,
}

struct Entry {
    path: PathBuf,
    name: SegmentName,
    source: String,
    crc: u32,
    bytes: u64,
}

impl Queue {
    /// The queue beside `dest`, where that is a file in the pg_wal of a data directory; none elsewhere.
    pub(crate) fn beside(dest: &Path, data_dir: &Path, source: impl std::hash::Hash) -> Option<Self> {
        let dest = data_dir.join(dest);
        let pg_wal = dest.parent().filter(|p| *p == data_dir.join("pg_wal"))?;
        data_dir.join("PG_VERSION").is_file().then_some(())?;
        // The key need only be the same in the runs of one build: entries live for minutes.
        let mut hasher = DefaultHasher::new();
        (source, env!("CARGO_PKG_VERSION")).hash(&mut hasher);
        Some(Self { dir: pg_wal.join(DIR), source: format!("{:016x}", hasher.finish()) })
    }

    fn entries(&self) -> Vec<Entry> {
        let Ok(dir) = fs::read_dir(&self.dir) else { return Vec::new() };
        let entry = |e: fs::DirEntry| {
            let file = e.file_name().into_string().ok()?;
            let mut parts = file.split('.');
            let (name, source, crc) = (parts.next()?, parts.next()?, parts.next()?);
            let crc = u32::from_str_radix(crc, 16).ok().filter(|_| parts.next().is_none())?;
            let bytes = e.metadata().ok()?.len();
            Some(Entry { path: e.path(), name: name.parse().ok()?, source: source.to_owned(), crc, bytes })
        };
        dir.flatten().filter_map(entry).collect()
    }

    /// Whether a segment is there; its bytes are not looked at.
    pub(crate) fn holds(&self, name: SegmentName) -> bool {
        self.entries().iter().any(|e| e.name == name && e.source == self.source)
    }

    /// Notes what a restore fills the queue for; [`Queue::lock`] made it.
    pub(crate) fn note_filled(&self, filled: Filled) -> io::Result<()> {
        let text = format!("{} {}\n", filled.timeline, filled.again_until);
        for (name, text) in [(UNASKED, ""), (FILLED, text.as_str())] {
            let mut options = fs::OpenOptions::new();
            let file = options.write(true).create(true).truncate(true).mode(0o600).open(self.dir.join(name));
            file?.write_all(text.as_bytes())?;
        }
        Ok(())
    }

    fn filled(&self) -> Option<Filled> {
        let text = fs::read_to_string(self.dir.join(FILLED)).ok()?;
        let (timeline, again_until) = text.trim_end().split_once(' ')?;
        Some(Filled { timeline: timeline.parse().ok()?, again_until: again_until.parse().ok()? })
    }

    /// Whether recovery comes back to a segment after it was given it.
    pub(crate) fn is_asked_again(&self, name: SegmentName, size: SegmentSize) -> bool {
        let start = name.start(size);
        self.filled().is_some_and(|filled| start.is_some_and(|start| start <= filled.again_until))
    }

    /// A history file was asked for: recovery begins, and has no use for what an earlier one left, or it ends.
    pub(crate) fn history_asked(&self, timeline: TimelineId) {
        let begins = self.dir.join(UNASKED).exists();
        let is_ours = self.filled().is_some_and(|filled| begins || timeline <= filled.timeline);
        if !is_ours {
            self.clear();
        }
    }

    /// A segment was asked for.
    pub(crate) fn segment_asked(&self) {
        let _ = fs::remove_file(self.dir.join(UNASKED));
    }

    /// Hands a segment over under the name `dest` and says whether it was there: moved, or kept as well where recovery
    /// comes back to it. One whose bytes are not what they were is removed.
    pub(crate) fn take(&self, name: SegmentName, dest: &Path) -> io::Result<Option<u64>> {
        for entry in self.entries().into_iter().filter(|e| e.name == name && e.source == self.source) {
            let size = SegmentSize::new(entry.bytes);
            let crc = File::open(&entry.path).and_then(crc_of)?;
            if let Some(size) = size.filter(|_| crc == entry.crc) {
                match self.is_asked_again(name, size) {
                    true => self.share(&entry.path, dest)?,
                    false => fs::rename(&entry.path, dest)?,
                }
                return Ok(Some(entry.bytes));
            }
            tracing::warn!("{} is damaged and was not used", entry.path.display());
            fs::remove_file(&entry.path)?;
        }
        Ok(None)
    }

    /// Gives a segment a second name, whole or not at all. PostgreSQL reads what it was given; should it come to write there
    /// after all, the checksum tells. A file system that knows no second names gets a copy.
    fn share(&self, entry: &Path, dest: &Path) -> io::Result<()> {
        let unfinished = self.dir.join(format!("copy.tmp-{}", std::process::id()));
        let _ = fs::remove_file(&unfinished);
        if fs::hard_link(entry, &unfinished).is_err() {
            fs::copy(entry, &unfinished)?;
            File::open(&unfinished)?.sync_data()?;
        }
        fs::rename(&unfinished, dest)?;
        // Two names of one file are both still there.
        let _ = fs::remove_file(&unfinished);
        Ok(())
    }

    /// Puts a whole, checked segment down. False where the queue holds as much as it may or was taken away.
    pub(crate) fn put(
        &self,
        name: SegmentName,
        wal: &[u8],
        limit: ReadAhead,
        durable: Durable,
    ) -> io::Result<bool> {
        let held = self.entries().iter().fold(0u64, |sum, e| sum.saturating_add(e.bytes));
        if held.saturating_add(wal.len() as u64) > limit.bytes || !self.dir.is_dir() {
            return Ok(false);
        }
        let unfinished = self.dir.join(format!("{name}.tmp-{}", std::process::id()));
        let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished);
        let written = file.and_then(|mut file| {
            file.write_all(wal)?;
            if durable == Durable::Now {
                file.sync_data()?;
            }
            let name = format!("{name}.{}.{:08x}", self.source, crc32fast::hash(wal));
            fs::rename(&unfinished, self.dir.join(name))
        });
        match written {
            Ok(()) => Ok(true),
            Err(e) => {
                let _ = fs::remove_file(&unfinished);
                if e.kind() == io::ErrorKind::NotFound { Ok(false) } else { Err(e) }
            }
        }
    }

    /// Removes what PostgreSQL, now given `current`, has no more use for, and what killed writers left.
    pub(crate) fn tidy(&self, current: SegmentName, size: SegmentSize, limit: ReadAhead) {
        let Some(start) = current.start(size) else { return };
        if self.is_asked_again(current, size) {
            return;
        }
        let reach = limit.count(size).saturating_mul(2).saturating_mul(size.bytes());
        for entry in self.entries() {
            let useful = entry.source == self.source
                && entry.name.start(size).is_some_and(|s| s > start && s.bytes_since(start) <= reach);
            if !useful {
                let _ = fs::remove_file(&entry.path);
            }
        }
        remove_unfinished(&self.dir, "");
    }

    /// Removes the queue. Someone who is filling it finds it gone and stops.
    pub(crate) fn clear(&self) {
        let _ = fs::remove_dir_all(&self.dir);
    }

    /// Makes the queue where it is missing, and takes it for filling. None while another process fills it.
    pub(crate) fn lock(&self) -> io::Result<Option<File>> {
        match fs::DirBuilder::new().mode(0o700).create(&self.dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        let mut options = fs::OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).mode(0o600).open(self.dir.join(LOCK))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Whether the file system has much more room than the queue may take.
    pub(crate) fn has_room(&self, limit: ReadAhead) -> bool {
        let parent = self.dir.parent().unwrap_or(&self.dir);
        let Ok(found) = rustix::fs::statvfs(parent) else { return false };
        found.f_bavail.saturating_mul(found.f_frsize) / 4 >= limit.bytes
    }
}

/// The checksum of what is left of a file, read piece by piece.
fn crc_of(mut file: File) -> io::Result<u32> {
    let (mut hasher, mut piece) = (crc32fast::Hasher::new(), vec![0; PIECE_BYTES]);
    loop {
        match file.read(&mut piece) {
            Ok(0) => return Ok(hasher.finalize()),
            Ok(read) => hasher.update(piece.get(..read).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Removes `<stem>*.tmp-<pid>` in `dir` where that process is gone.
pub(crate) fn remove_unfinished(dir: &Path, stem: &str) {
    let Ok(found) = fs::read_dir(dir) else { return };
    for entry in found.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let pid = name.strip_prefix(stem).and_then(|rest| rest.rsplit_once(".tmp-")).map(|(_, pid)| pid);
        let pid = pid.and_then(|pid| pid.parse::<i32>().ok()).and_then(rustix::process::Pid::from_raw);
        let gone = |pid| rustix::process::test_kill_process(pid) == Err(rustix::io::Errno::SRCH);
        if pid.is_some_and(gone) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    const LIMIT: ReadAhead = ReadAhead { segments: 4, bytes: 4 << 20 };

    fn size() -> SegmentSize {
        SegmentSize::new(1 << 20).unwrap()
    }

    fn name(n: u64) -> SegmentName {
        let timeline = TimelineId::FIRST;
        SegmentName::containing(timeline, (n << 20).into(), size())
    }

    fn wal(byte: u8) -> Vec<u8> {
        vec![byte; 1 << 20]
    }

    fn place() -> (tempfile::TempDir, Queue) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("pg_wal")).unwrap();
        fs::write(dir.path().join("PG_VERSION"), "15\n").unwrap();
        let queue = Queue::beside(Path::new("pg_wal/RECOVERYXLOG"), dir.path(), "a").unwrap();
        assert!(Queue::beside(Path::new("RECOVERYXLOG"), dir.path(), "a").is_none());
        (dir, queue)
    }

    #[test]
    fn a_segment_is_taken_once_and_only_from_its_source() {
        let (dir, queue) = place();
        let lock = queue.lock().unwrap().unwrap();
        assert!(queue.lock().unwrap().is_none(), "one process fills it");
        drop(lock);
        assert!(queue.put(name(5), &wal(5), LIMIT, Durable::Now).unwrap());
        let dest = dir.path().join("pg_wal/RECOVERYXLOG");
        let other = Queue::beside(&dest, dir.path(), "b").unwrap();
        assert_eq!(other.take(name(5), &dest).unwrap(), None);
        assert_eq!(queue.take(name(5), &dest).unwrap(), Some(1 << 20));
        assert!(fs::read(&dest).unwrap() == wal(5));
        assert_eq!(queue.take(name(5), &dest).unwrap(), None);
    }

    #[test]
    fn a_damaged_entry_is_removed_and_not_handed_over() {
        let (dir, queue) = place();
        queue.lock().unwrap().unwrap();
        for damage in [|b: &mut Vec<u8>| b[777] ^= 1, |b: &mut Vec<u8>| b.truncate(1 << 19)] {
            queue.put(name(5), &wal(5), LIMIT, Durable::Now).unwrap();
            let entry = queue.entries().remove(0).path;
            let mut bytes = fs::read(&entry).unwrap();
            damage(&mut bytes);
            fs::write(&entry, bytes).unwrap();
            let dest = dir.path().join("pg_wal/RECOVERYXLOG");
            assert_eq!(queue.take(name(5), &dest).unwrap(), None);
            assert!(!dest.exists() && !entry.exists());
        }
    }

    #[test]
    fn the_queue_is_bounded_and_what_was_passed_is_removed() {
        let (_dir, queue) = place();
        assert!(!queue.put(name(1), &wal(1), LIMIT, Durable::Now).unwrap(), "there is no queue yet");
        queue.lock().unwrap().unwrap();
        let kept: Vec<_> =
            (1..8).map(|n| queue.put(name(n), &wal(1), LIMIT, Durable::Now).unwrap()).collect();
        assert_eq!(kept, [true, true, true, true, false, false, false]);
        fs::write(queue.dir.join(format!("{}.tmp-{}", name(3), i32::MAX)), "x").unwrap();
        queue.tidy(name(3), size(), LIMIT);
        assert_eq!(queue.entries().iter().map(|e| e.name).collect::<Vec<_>>(), [name(4)]);
        assert_eq!(fs::read_dir(&queue.dir).unwrap().count(), 2, "the entry and the lock");
        queue.clear();
        assert!(!queue.dir.exists());
    }

    #[test]
    fn a_segment_that_was_written_to_under_its_other_name_is_not_handed_over_again() {
        let (dir, queue) = place();
        drop(queue.lock().unwrap().unwrap());
        queue.note_filled(Filled { timeline: TimelineId::FIRST, again_until: (5 << 20).into() }).unwrap();
        assert!(queue.put(name(5), &wal(5), LIMIT, Durable::Later).unwrap());
        let (dest, given) = (dir.path().join("pg_wal/RECOVERYXLOG"), dir.path().join("pg_wal/5"));
        assert_eq!(queue.take(name(5), &dest).unwrap(), Some(1 << 20));
        fs::rename(&dest, &given).unwrap();
        assert_eq!(queue.take(name(5), &dest).unwrap(), Some(1 << 20));
        fs::write(&given, wal(6)).unwrap();
        assert_eq!(queue.take(name(5), &dest).unwrap(), None);
        assert_eq!(names_of(&queue), []);
    }

    fn names_of(queue: &Queue) -> Vec<SegmentName> {
        let mut names: Vec<_> = queue.entries().iter().map(|e| e.name).collect();
        names.sort();
        names
    }

    #[test]
    fn what_a_restore_put_there_is_kept_until_recovery_is_past_it() {
        let (dir, queue) = place();
        let dest = dir.path().join("pg_wal/RECOVERYXLOG");
        let timeline = |n| TimelineId::new(n).unwrap();
        drop(queue.lock().unwrap().unwrap());
        // Redo begins in 3, the checkpoint's record lies in 4.
        queue.note_filled(Filled { timeline: timeline(2), again_until: (5 << 20).into() }).unwrap();
        for n in 3..7 {
            assert!(queue.put(name(n), &wal(1), LIMIT, Durable::Now).unwrap());
        }
        for n in [2, 3] {
            queue.history_asked(timeline(n));
        }
        for n in [4, 3, 4, 5] {
            queue.segment_asked();
            assert_eq!(queue.take(name(n), &dest).unwrap(), Some(1 << 20), "{n}");
            assert_eq!(fs::metadata(&dest).unwrap().nlink(), 2, "{n}");
            // It may still lie there.
            assert_eq!(queue.take(name(n), &dest).unwrap(), Some(1 << 20), "{n}");
            assert!(fs::read(&dest).unwrap() == wal(1));
            assert_eq!(fs::read_dir(&queue.dir).unwrap().count(), 4 + 2, "nothing unfinished: {n}");
            queue.tidy(name(n), size(), LIMIT);
            queue.history_asked(timeline(2));
            assert_eq!(names_of(&queue), [3, 4, 5, 6].map(name), "{n}");
        }
        assert_eq!(queue.take(name(6), &dest).unwrap(), Some(1 << 20));
        queue.tidy(name(6), size(), LIMIT);
        assert_eq!(names_of(&queue), []);
        assert!(queue.dir.exists());
        // Recovery looks for the number of its own timeline.
        queue.history_asked(timeline(3));
        assert!(!queue.dir.exists());
        // Without a restore's note it begins with nothing.
        drop(queue.lock().unwrap().unwrap());
        queue.history_asked(timeline(2));
        assert!(!queue.dir.exists());
    }
}
