//! The only code that changes the place a restore writes to.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::unix::fs::{
    DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use waltide_format::archive::{Manifest, ManifestFile};
use waltide_format::{Corrupt, Oid, PgMajor};
use waltide_storage::Progress;

use super::super::file_system::is_local;
use super::super::selection::Selection;
use super::pieces::{Job, Piece, zeros};
use super::place::{self, Owner, Placed};
use super::{Actions, CONTROL_FILE, MARKER, RestoreError, STALE, io_error, marker_text};

/// How much of a file is compared or zeroed at once.
const CHUNK_BYTES: u64 = 1 << 20;
/// How many files are synced at once. Measured on ext4: eight take a twentieth of one's time, more gain nothing.
const SYNC_THREADS: usize = 8;

/// From this release of Linux on `syncfs` says what could not be written.
const SYNCFS_TELLS: (u32, u32) = (5, 8);
/// Why a part could not be written.
pub(super) enum WriteError {
    Io(RestoreError),
    Damaged(Corrupt),
}

/// The data directory, and the tablespaces that its links lead to.
#[derive(Debug, Clone)]
pub(super) struct Place(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    data_dir: PathBuf,
    tablespaces: Vec<PathBuf>,
    /// What our directories in them begin with.
    version: String,
    owner: Option<Owner>,
    /// A directory of each file system, by its device, open since before anything was written there.
    file_systems: Mutex<BTreeMap<u64, File>>,
}

/// The bytes of a piece, out of its frame.
pub(super) fn frame(stored: &[u8], job: &Job, piece: &Piece) -> Result<Vec<u8>, Corrupt> {
    let wrong = Corrupt::invalid("frame", piece.extent.offset, u64::from(piece.extent.stored_bytes));
    let from = piece.extent.offset.checked_sub(job.range.start).and_then(|at| usize::try_from(at).ok());
    let bytes = usize::try_from(piece.extent.stored_bytes).unwrap_or(usize::MAX);
    let frame = from.and_then(|from| stored.get(from..from.checked_add(bytes)?)).ok_or(wrong)?;
    let mut raw = piece.extent.decode_frame(frame)?;
    raw.truncate(usize::try_from(piece.to).unwrap_or(usize::MAX));
    raw.drain(..usize::try_from(piece.from).unwrap_or(0).min(raw.len()));
    Ok(raw)
}

impl Place {
    pub(super) fn new(data_dir: &Path, major: PgMajor, actions: &Actions) -> Self {
        let tablespaces = actions.tablespaces.iter().map(|t| t.to.clone()).collect();
        let file_systems = Mutex::default();
        Self(Arc::new(Inner {
            data_dir: data_dir.to_owned(),
            tablespaces,
            version: format!("PG_{major}_"),
            owner: actions.owner,
            file_systems,
        }))
    }

    pub(super) fn path(&self, relative: &str) -> PathBuf {
        self.0.data_dir.join(relative)
    }

    /// Gives a file or directory its owner.
    pub(super) fn own(&self, path: &Path) -> Result<(), RestoreError> {
        match self.0.owner {
            Some(Owner { uid, gid }) => {
                std::os::unix::fs::lchown(path, Some(uid), Some(gid)).map_err(io_error("give away", path))
            }
            None => Ok(()),
        }
    }

    /// Deletes what is to be deleted, pg_control first: from then on no server starts here.
    pub(super) fn clear(&self, actions: &Actions) -> Result<(), RestoreError> {
        self.remove(CONTROL_FILE)?;
        if self.path("global").is_dir() {
            sync_dir(&self.path("global"))?;
        }
        for path in actions.deletions.iter().map(|d| &d.path) {
            remove_all(path).map_err(io_error("delete", path))?;
        }
        Ok(())
    }

    /// Makes directories, links and files at their lengths, and removes what lies in the way of them.
    pub(super) fn make(
        &self,
        manifest: &Manifest,
        tablespaces: &[Placed],
        threads: usize,
    ) -> Result<(), RestoreError> {
        let group = manifest.directories.iter().any(|d| d.mode & 0o050 == 0o050);
        let root_mode = if group { 0o750 } else { 0o700 };
        self.make_dir(&self.0.data_dir, root_mode)?;
        self.hold_file_system(&self.0.data_dir)?;
        self.put(MARKER, marker_text(manifest, tablespaces).as_bytes(), 0o600)?;
        for t in tablespaces {
            self.make_dir(&t.to, root_mode)?;
            self.hold_file_system(&t.to)?;
        }
        let link = |oid| format!("pg_tblspc/{oid}");
        self.make_dir(&self.path("pg_tblspc"), root_mode)?;
        for t in tablespaces {
            let at = self.path(&link(t.oid));
            if fs::read_link(&at).ok().as_deref() != Some(&t.to) {
                remove_all(&at).map_err(io_error("delete", &at))?;
                std::os::unix::fs::symlink(&t.to, &at).map_err(io_error("make", &at))?;
                self.own(&at)?;
            }
        }
        let links: BTreeSet<_> = tablespaces.iter().map(|t| link(t.oid)).collect();
        for directory in manifest.directories.iter().filter(|d| !links.contains(&d.path)) {
            self.make_dir(&self.path(&directory.path), directory.mode & 0o777)?;
        }
        for directory in ["global", "pg_wal", "pg_wal/archive_status"] {
            self.make_dir(&self.path(directory), root_mode)?;
        }
        // A directory makes one file after the other, and those of one lie together here.
        let share = manifest.files.len().div_ceil(threads.max(1)).max(1);
        std::thread::scope(|scope| {
            let make = |files: &[ManifestFile]| files.iter().try_for_each(|file| self.make_file(file));
            let handles: Vec<_> =
                manifest.files.chunks(share).map(|files| scope.spawn(move || make(files))).collect();
            handles.into_iter().try_for_each(|h| h.join().expect("making files does not panic"))
        })
    }

    fn make_file(&self, file: &ManifestFile) -> Result<(), RestoreError> {
        if file.path == CONTROL_FILE {
            return Ok(());
        }
        let path = self.path(&file.path);
        if fs::symlink_metadata(&path).is_ok_and(|m| !m.is_file()) {
            remove_all(&path).map_err(io_error("delete", &path))?;
        }
        let mut options = fs::OpenOptions::new();
        let made = options.write(true).create(true).truncate(false).mode(0o600).open(&path);
        let made = made.map_err(io_error("make", &path))?;
        made.set_len(file.bytes).map_err(io_error("make", &path))?;
        let mode = fs::Permissions::from_mode(file.mode & 0o777);
        made.set_permissions(mode).map_err(io_error("make", &path))?;
        self.own(&path)
    }

    fn make_dir(&self, path: &Path, mode: u32) -> Result<(), RestoreError> {
        if fs::symlink_metadata(path).is_ok() && !path.is_dir() {
            remove_all(path).map_err(io_error("delete", path))?;
        }
        let mut missing: Vec<_> = path.ancestors().take_while(|p| !p.is_dir()).collect();
        while let Some(dir) = missing.pop() {
            fs::DirBuilder::new().mode(0o700).create(dir).map_err(io_error("make", dir))?;
            self.own(dir)?;
        }
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(io_error("make", path))?;
        self.own(path)
    }

    /// The pieces of a file whose bytes differ from what the file has, once its zeros are zeros.
    pub(super) fn differing(
        &self,
        relative: &str,
        bytes: u64,
        pieces: &[Piece],
    ) -> Result<Vec<Piece>, RestoreError> {
        let path = self.path(relative);
        let open = fs::OpenOptions::new().read(true).write(true).open(&path);
        let file = open.map_err(io_error("open", &path))?;
        for range in zeros(pieces, bytes) {
            zero(&file, range).map_err(io_error("write", &path))?;
        }
        let mut left = Vec::new();
        let mut buffer = Vec::new();
        for piece in pieces.iter().filter(|p| !p.is_zeros()) {
            buffer.resize(usize::try_from(piece.bytes()).unwrap_or(0), 0);
            let same = piece.is_whole() && {
                file.read_exact_at(&mut buffer, piece.file_offset()).map_err(io_error("read", &path))?;
                crc32fast::hash(&buffer) == piece.extent.crc
            };
            if !same {
                left.push(*piece);
            }
        }
        Ok(left)
    }

    /// Writes the pieces of a stretch; `paths` are their files.
    pub(super) fn write(
        &self,
        stored: &[u8],
        job: &Job,
        paths: &[String],
        progress: &dyn Progress,
    ) -> Result<(), WriteError> {
        let mut open: Option<(usize, File)> = None;
        for (piece, relative) in job.pieces.iter().zip(paths) {
            let raw = frame(stored, job, piece).map_err(WriteError::Damaged)?;
            let path = self.path(relative);
            let failed = |e| WriteError::Io(io_error("write", &path)(e));
            let file = match open.take() {
                Some((number, file)) if number == piece.file => file,
                _ => fs::OpenOptions::new().write(true).open(&path).map_err(failed)?,
            };
            file.write_all_at(&raw, piece.file_offset()).map_err(failed)?;
            open = Some((piece.file, file));
            progress.advance(piece.bytes());
        }
        Ok(())
    }

    /// Puts a small file, whatever was there.
    pub(super) fn put(&self, relative: &str, contents: &[u8], mode: u32) -> Result<(), RestoreError> {
        let path = self.path(relative);
        let unfinished = self.path(&format!("{relative}.waltide"));
        let put = || {
            let mut options = fs::OpenOptions::new();
            let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
            file.write_all(contents)?;
            file.set_permissions(fs::Permissions::from_mode(mode))?;
            file.sync_all()
        };
        put().map_err(io_error("write", &path))?;
        self.own(&unfinished)?;
        fs::rename(&unfinished, &path).map_err(io_error("write", &path))
    }

    pub(super) fn remove(&self, relative: &str) -> Result<(), RestoreError> {
        let path = self.path(relative);
        match fs::remove_file(&path) {
            Err(e) if !matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Err(io_error("delete", &path)(e))
            }
            _ => Ok(()),
        }
    }

    /// Makes a server refuse sessions in the databases that are not wanted, by its first look at one: it would end, with
    /// all its sessions, at the first catalogue that it finds empty.
    pub(super) fn close_databases(&self, selection: &Selection) -> Result<(), RestoreError> {
        let below = |dir: &Path| -> Result<Vec<PathBuf>, RestoreError> {
            let found = fs::read_dir(dir).map_err(io_error("list", dir))?;
            let paths = found.map(|entry| entry.map(|e| e.path())).collect::<Result<Vec<_>, _>>();
            let mut paths = paths.map_err(io_error("list", dir))?;
            paths.retain(|path| path.is_dir());
            Ok(paths)
        };
        let mut databases = below(&self.path("base"))?;
        for space in below(&self.path("pg_tblspc"))? {
            for version in below(&space)? {
                databases.extend(below(&version)?);
            }
        }
        let number = |path: &Path| path.file_name()?.to_str()?.parse::<Oid>().ok();
        for path in databases {
            if number(&path).is_some_and(|database| !selection.wants_database(database)) {
                let version = path.join("PG_VERSION");
                match fs::OpenOptions::new().write(true).truncate(true).open(&version) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    opened => opened.map(drop).map_err(io_error("write", &version))?,
                }
            }
        }
        Ok(())
    }

    /// Throws away what a restore wrote, but for the mark that there is one.
    pub(super) fn discard(&self, tablespaces: &[Placed]) -> Result<(), RestoreError> {
        self.remove(CONTROL_FILE)?;
        let wal = self.path("pg_wal");
        let mut found: Vec<_> = place::contents(&self.0.data_dir)?;
        found.retain(|d| d.path != self.path(MARKER) && d.path != wal);
        found.extend(place::contents(&wal)?);
        for t in tablespaces {
            let versions = place::contents(&t.to)?;
            let is_ours = |name: &str| name.starts_with(&self.0.version);
            found.extend(
                versions
                    .into_iter()
                    .filter(|d| d.path.file_name().and_then(|n| n.to_str()).is_some_and(is_ours)),
            );
        }
        for path in found.iter().map(|d| &d.path) {
            remove_all(path).map_err(io_error("delete", path))?;
        }
        Ok(())
    }

    /// Every directory and file of the data directory and its tablespaces.
    fn everything(&self) -> Result<Vec<PathBuf>, RestoreError> {
        let mut left = vec![self.0.data_dir.clone()];
        for space in &self.0.tablespaces {
            // Other versions' directories may lie beside ours.
            let versions = place::contents(space)?.into_iter().map(|found| found.path);
            let is_ours = |name: &str| name.starts_with(&self.0.version);
            left.extend(
                versions.filter(|path| path.file_name().and_then(|n| n.to_str()).is_some_and(is_ours)),
            );
        }
        left.extend(Some(self.path("pg_wal")).filter(|wal| wal.is_symlink()));
        let mut found = Self::below(left)?;
        found.extend(self.0.tablespaces.iter().cloned());
        Ok(found)
    }

    /// Directories, and every directory and file below them.
    fn below(mut left: Vec<PathBuf>) -> Result<Vec<PathBuf>, RestoreError> {
        let mut found: Vec<PathBuf> = Vec::new();
        while let Some(directory) = left.pop() {
            for entry in fs::read_dir(&directory).map_err(io_error("list", &directory))? {
                let entry = entry.map_err(io_error("list", &directory))?;
                let kind = entry.file_type().map_err(io_error("look at", &entry.path()))?;
                match kind.is_dir() {
                    true => left.push(entry.path()),
                    false if kind.is_file() => found.push(entry.path()),
                    false => {}
                }
            }
            found.push(directory);
        }
        Ok(found)
    }

    /// Gives everything its owner.
    pub(super) fn own_everything(&self) -> Result<(), RestoreError> {
        match self.0.owner {
            Some(_) => self.everything()?.iter().try_for_each(|path| self.own(path)),
            None => Ok(()),
        }
    }

    /// Gives a directory, and everything below it, its owner.
    pub(super) fn own_everything_below(&self, relative: &str) -> Result<(), RestoreError> {
        match self.0.owner {
            Some(_) => Self::below(vec![self.path(relative)])?.iter().try_for_each(|path| self.own(path)),
            None => Ok(()),
        }
    }

    /// Every file and directory of a backup.
    fn of_backup(&self, manifest: &Manifest) -> Vec<PathBuf> {
        let files = manifest.files.iter().map(|f| f.path.as_str());
        let files =
            files.filter(|path| *path != CONTROL_FILE && !STALE.contains(path)).map(|path| self.path(path));
        let directories = manifest.directories.iter().map(|d| self.path(&d.path));
        let tops = ["", "global", "pg_tblspc", "pg_wal", "pg_wal/archive_status"].map(|d| self.path(d));
        files.chain(directories).chain(tops).chain(self.0.tablespaces.clone()).collect()
    }

    /// Syncs many at once, because file systems do them together.
    fn sync(paths: &[PathBuf]) -> Result<(), RestoreError> {
        let next = AtomicUsize::new(0);
        let sync = || {
            while let Some(path) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
                File::open(path).and_then(|file| file.sync_all()).map_err(io_error("sync", path))?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..SYNC_THREADS).map(|_| scope.spawn(sync)).collect();
            threads.into_iter().try_for_each(|t| t.join().expect("syncing files does not panic"))
        })
    }

    /// Opens a file system that is written to: what cannot be written there from now on is told by its sync.
    fn hold_file_system(&self, path: &Path) -> Result<(), RestoreError> {
        let open = || {
            let file = File::open(path)?;
            let device = file.metadata()?.dev();
            let mut held = self.0.file_systems.lock().unwrap_or_else(PoisonError::into_inner);
            held.entry(device).or_insert(file);
            Ok(())
        };
        open().map_err(io_error("open", path))
    }

    /// Syncs the whole file systems that paths lie on, which takes a fraction of the time that file after file does, but
    /// also waits for what others wrote. False where that cannot be relied on, or something could not be written: perhaps
    /// none of ours.
    fn sync_file_systems(&self, paths: &[PathBuf]) -> Result<bool, RestoreError> {
        if !syncfs_tells(rustix::system::uname().release().to_bytes()) {
            return Ok(false);
        }
        for path in paths {
            let device = fs::symlink_metadata(path).map_err(io_error("look at", path))?.dev();
            let is_held = |held: &BTreeMap<u64, File>| held.contains_key(&device);
            if !is_held(&self.0.file_systems.lock().unwrap_or_else(PoisonError::into_inner)) {
                self.hold_file_system(path)?;
            }
        }
        let held = self.0.file_systems.lock().unwrap_or_else(PoisonError::into_inner);
        let served = held.values().all(is_local);
        Ok(served && held.values().all(|file| rustix::fs::syncfs(file).is_ok()))
    }

    /// Makes everything durable, and only then puts pg_control down.
    pub(super) fn finish(
        &self,
        synced: Synced<'_>,
        control_path: &str,
        control: &[u8],
        control_mode: u32,
    ) -> Result<(), RestoreError> {
        let paths = match synced {
            Synced::Backup(manifest) => self.of_backup(manifest),
            Synced::Everything => self.everything()?,
        };
        if !self.sync_file_systems(&paths)? {
            Self::sync(&paths)?;
        }
        self.put(control_path, control, control_mode)?;
        sync_dir(&self.path("global"))?;
        self.remove(MARKER)?;
        sync_dir(&self.0.data_dir)?;
        match self.0.data_dir.parent() {
            Some(parent) => sync_dir(parent),
            None => Ok(()),
        }
    }
}

/// What is synced at the end.
pub(super) enum Synced<'a> {
    /// The files that the backup has.
    Backup(&'a Manifest),
    /// Whatever is there.
    Everything,
}

/// Whether `syncfs` of a Linux of that release says what could not be written.
fn syncfs_tells(release: &[u8]) -> bool {
    let mut numbers =
        release.split(|b| !b.is_ascii_digit()).map_while(|digits| std::str::from_utf8(digits).ok());
    let mut next = || numbers.next()?.parse::<u32>().ok();
    next().zip(next()).is_some_and(|found| found >= SYNCFS_TELLS)
}

/// Writes zeros where there is anything else.
fn zero(file: &File, range: Range<u64>) -> io::Result<()> {
    let mut at = range.start;
    let mut buffer = Vec::new();
    while at < range.end {
        let bytes = range.end.saturating_sub(at).min(CHUNK_BYTES);
        buffer.resize(usize::try_from(bytes).unwrap_or(0), 0);
        file.read_exact_at(&mut buffer, at)?;
        if buffer.iter().any(|b| *b != 0) {
            buffer.fill(0);
            file.write_all_at(&buffer, at)?;
        }
        at = at.saturating_add(bytes);
    }
    Ok(())
}

fn remove_all(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
        Ok(about) if about.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    }
}

fn sync_dir(path: &Path) -> Result<(), RestoreError> {
    File::open(path).and_then(|d| d.sync_all()).map_err(io_error("sync", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syncfs_is_relied_on_where_it_tells_what_failed() {
        for release in ["5.8.0", "5.10.0-28-amd64", "6.18.44-fc", "10.0"] {
            assert!(syncfs_tells(release.as_bytes()), "{release}");
        }
        for release in ["5.7.19", "4.18.0-553.el8.x86_64", "5", "", "x.9.1", "-5.9"] {
            assert!(!syncfs_tells(release.as_bytes()), "{release}");
        }
    }
}
