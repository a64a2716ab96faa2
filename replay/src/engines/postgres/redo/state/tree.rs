//! The data directory as a tree that is written to, and never left but for the places that tablespaces have.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, symlink,
};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use waltide_format::Oid;
use waltide_format::engines::postgres::cluster::ControlFile;

use super::error::{StateError, io_error};
use crate::engines::postgres::redo::effects::DEFAULT_TABLESPACE;

/// The directories that effects write to, which every cluster has.
pub(super) const DIRECTORIES: [&str; 11] = [
    "",
    "base",
    "global",
    "pg_commit_ts",
    "pg_logical",
    "pg_multixact",
    "pg_multixact/members",
    "pg_multixact/offsets",
    "pg_tblspc",
    "pg_twophase",
    "pg_xact",
];

/// Whether a file is made where there is none, and what becomes of one that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// It is kept.
    Kept,
    /// It goes.
    Replaced,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Tree {
    root: PathBuf,
    places: BTreeMap<Oid, PathBuf>,
    /// `PG_VERSION`'s text.
    pub(super) version: String,
    /// The directory in a tablespace that belongs to this version.
    version_directory: String,
    directory_mode: u32,
    file_mode: u32,
    touched: BTreeSet<PathBuf>,
}

impl Tree {
    pub(super) fn open(
        root: &Path,
        places: &BTreeMap<Oid, PathBuf>,
        control: &ControlFile,
    ) -> Result<Self, StateError> {
        for directory in DIRECTORIES {
            let path = root.join(directory);
            // The data directory's own name may be a link.
            let found = if directory.is_empty() { fs::metadata(&path) } else { fs::symlink_metadata(&path) };
            if !found.is_ok_and(|found| found.is_dir()) {
                return Err(StateError::NotADirectory { path });
            }
        }
        let mode = fs::metadata(root).map_err(io_error("look at", root))?.mode();
        // What the server does too: the group may read where it may read the data directory.
        let group = mode & 0o050 == 0o050;
        Ok(Self {
            root: root.to_owned(),
            places: places.clone(),
            version: format!("{}\n", control.major),
            version_directory: format!("PG_{}_{}", control.major, control.catalog_version),
            directory_mode: if group { 0o750 } else { 0o700 },
            file_mode: if group { 0o640 } else { 0o600 },
            touched: BTreeSet::new(),
        })
    }

    /// What was written to, made, or lost an entry.
    pub(super) fn into_touched(self) -> Vec<PathBuf> {
        self.touched.into_iter().collect()
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The directory that a tablespace's databases lie in; `None` where the tablespace is not there.
    pub(super) fn tablespace(&self, spc_oid: Oid) -> Result<Option<PathBuf>, StateError> {
        if spc_oid == DEFAULT_TABLESPACE {
            return Ok(Some(self.path("base")));
        }
        let link = self.link(spc_oid);
        let place = match fs::symlink_metadata(&link) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io_error("look at", &link)(e)),
            Ok(found) if found.is_dir() => link,
            // Where the link leads is of no matter: it is said where the tablespace lies.
            Ok(_) => self.place(spc_oid, "")?,
        };
        Ok(Some(place.join(&self.version_directory)))
    }

    fn link(&self, spc_oid: Oid) -> PathBuf {
        self.path("pg_tblspc").join(spc_oid.to_string())
    }

    fn place(&self, spc_oid: Oid, path: &str) -> Result<PathBuf, StateError> {
        let place = self.places.get(&spc_oid).cloned();
        place.ok_or_else(|| StateError::NoPlace { spc_oid, path: path.to_owned() })
    }

    /// Makes a tablespace where it goes in this restore, and the link to it; in the data directory where nothing else is said
    /// and the log says so.
    pub(super) fn make_tablespace(&mut self, spc_oid: Oid, path: &str) -> Result<(), StateError> {
        let link = self.link(spc_oid);
        let place = match self.place(spc_oid, path) {
            Err(_) if path.is_empty() => link.clone(),
            place => place?,
        };
        self.touch(&self.path("pg_tblspc"));
        if place == link {
            self.make_directory(&link)?;
            return self.make_directory(&link.join(&self.version_directory));
        }
        DirBuilder::new()
            .recursive(true)
            .mode(self.directory_mode)
            .create(&place)
            .map_err(io_error("make", &place))?;
        let mode = fs::Permissions::from_mode(self.directory_mode);
        fs::set_permissions(&place, mode).map_err(io_error("set the mode of", &place))?;
        self.touch(&place);
        self.make_directory(&place.join(&self.version_directory))?;
        // Recovery replaces a link that is there.
        self.remove_link(&link)?;
        symlink(&place, &link).map_err(io_error("make the link", &link))
    }

    /// Makes a tablespace's directory inside the data directory, to stand for one that the backup came too late for.
    pub(super) fn make_stand_in(&mut self, spc_oid: Oid) -> Result<PathBuf, StateError> {
        let link = self.link(spc_oid);
        self.make_directory(&link)?;
        let directory = link.join(&self.version_directory);
        self.make_directory(&directory)?;
        Ok(directory)
    }

    /// Removes a tablespace with all that lies in it, and its link.
    pub(super) fn remove_tablespace(&mut self, spc_oid: Oid) -> Result<(), StateError> {
        if let Some(directory) = self.tablespace(spc_oid)? {
            self.remove_tree(&directory)?;
        }
        let link = self.link(spc_oid);
        self.remove_link(&link)
    }

    fn remove_link(&mut self, link: &Path) -> Result<(), StateError> {
        let removed = match fs::symlink_metadata(link) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => Err(e),
            Ok(found) if found.is_dir() => fs::remove_dir(link),
            Ok(_) => fs::remove_file(link),
        };
        removed.map_err(io_error("remove", link))?;
        self.forget(link);
        Ok(())
    }

    /// Makes a directory, unless there is one.
    pub(super) fn make_directory(&mut self, path: &Path) -> Result<(), StateError> {
        match DirBuilder::new().mode(self.directory_mode).create(path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                if !self.is_directory(path)? {
                    return Err(StateError::NotADirectory { path: path.to_owned() });
                }
            }
            made => made.map_err(io_error("make", path))?,
        }
        self.touch(path);
        if let Some(parent) = path.parent() {
            self.touch(parent);
        }
        Ok(())
    }

    /// Whether there is a directory of that name; something else of it is an error.
    pub(super) fn is_directory(&self, path: &Path) -> Result<bool, StateError> {
        match fs::symlink_metadata(path) {
            Ok(found) if found.is_dir() => Ok(true),
            Ok(_) => Err(StateError::NotADirectory { path: path.to_owned() }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(io_error("look at", path)(e)),
        }
    }

    /// Removes a directory with all that lies in it, where it is there.
    pub(super) fn remove_tree(&mut self, path: &Path) -> Result<(), StateError> {
        if self.is_directory(path)? {
            fs::remove_dir_all(path).map_err(io_error("remove", path))?;
            self.forget(path);
        }
        Ok(())
    }

    /// Removes a file, where it is there.
    pub(super) fn remove_file(&mut self, path: &Path) -> Result<(), StateError> {
        match fs::remove_file(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            removed => removed.map_err(io_error("remove", path))?,
        }
        self.forget(path);
        Ok(())
    }

    /// Opens a file to write to it, making it where it is not there.
    pub(super) fn open_to_write(&mut self, path: &Path, content: Content) -> Result<File, StateError> {
        let opened = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(content == Content::Replaced)
            .mode(self.file_mode)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(path);
        let file = opened.map_err(io_error("write", path))?;
        if self.touch(path)
            && let Some(parent) = path.parent()
        {
            self.touch(parent);
        }
        Ok(file)
    }

    /// Opens a file to read it; `None` where it is not there.
    pub(super) fn open_to_read(&self, path: &Path) -> Result<Option<File>, StateError> {
        let flags = OFlags::NOFOLLOW.bits().cast_signed();
        match OpenOptions::new().read(true).custom_flags(flags).open(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            opened => opened.map(Some).map_err(io_error("read", path)),
        }
    }

    /// Writes a file of these bytes.
    pub(super) fn write(&mut self, path: &Path, bytes: &[u8]) -> Result<(), StateError> {
        let mut file = self.open_to_write(path, Content::Replaced)?;
        file.write_all(bytes).map_err(io_error("write", path))
    }

    /// Reads a file of at most `max` bytes, and one byte more of a longer one; `None` where it is not there.
    pub(super) fn read(&self, path: &Path, max: u64) -> Result<Option<Vec<u8>>, StateError> {
        let Some(file) = self.open_to_read(path)? else { return Ok(None) };
        let mut bytes = Vec::new();
        file.take(max.saturating_add(1)).read_to_end(&mut bytes).map_err(io_error("read", path))?;
        Ok(Some(bytes))
    }

    /// The names in a directory that are text.
    pub(super) fn names(&self, directory: &Path) -> Result<Vec<String>, StateError> {
        let mut names = Vec::new();
        for entry in fs::read_dir(directory).map_err(io_error("list", directory))? {
            let name = entry.map_err(io_error("list", directory))?.file_name();
            names.extend(name.into_string().ok());
        }
        Ok(names)
    }

    /// Notes what is to be synced; whether it was not noted before.
    fn touch(&mut self, path: &Path) -> bool {
        !self.touched.contains(path) && self.touched.insert(path.to_owned())
    }

    /// Notes that what was there is no more.
    fn forget(&mut self, path: &Path) {
        let gone: Vec<_> =
            self.touched.range(path.to_owned()..).take_while(|p| p.starts_with(path)).cloned().collect();
        for path in gone {
            self.touched.remove(&path);
        }
        if let Some(parent) = path.parent() {
            self.touch(parent);
        }
    }
}
