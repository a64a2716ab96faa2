//! The tar archives of a base backup, plain or compressed: which there are, and what is in them.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use ::tar::Archive;
use waltide_format::Oid;
use waltide_storage::Progress;

use super::super::copy::{CopyError, FileStream};
use super::super::files::SourceFile;
use super::ImportError;
use super::compression::{Compression, Decoded};

/// What may be read between the contents of two files: a header, and what other programs than pg_basebackup put before
/// it for long names.
const HEADERS_BYTES_MAX: u64 = 1 << 20;
/// No system takes a longer path.
const NAME_BYTES_MAX: usize = 4096;

/// A tar archive of a base backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tar {
    pub(super) path: PathBuf,
    /// Where in the data directory its paths lie.
    pub(super) prefix: String,
    pub(super) compression: Option<Compression>,
}

/// What lies in a tar archive.
pub(super) struct Entry<'a> {
    tar: &'a Path,
    /// In the data directory.
    pub(super) path: String,
    pub(super) kind: Kind,
    pub(super) mode: u32,
    /// Seconds since 1970.
    pub(super) modified: i64,
    pub(super) bytes: u64,
    /// Where in the archive its bytes start, if that can be said.
    pub(super) at: Option<u64>,
    pub(super) contents: &'a mut dyn Read,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
    /// To this.
    Link(String),
}

impl Entry<'_> {
    /// The error that says this of it.
    pub(super) fn wrong(&self, why: impl AsRef<str>) -> CopyError {
        wrong(self.tar, self.path.as_bytes(), why.as_ref())
    }
}

fn wrong(tar: &Path, name: &[u8], why: &str) -> CopyError {
    let text = format!("{:?} {why}", String::from_utf8_lossy(name));
    CopyError::Read { path: tar.to_owned(), source: io::Error::other(text) }
}

impl Tar {
    /// Finds the tar archives that lie in a directory, base.tar first; none where that is not there.
    pub(super) fn find(dir: &Path) -> Result<Vec<Self>, ImportError> {
        let failed = |source| ImportError::Read { path: dir.to_owned(), source };
        let mut found: Vec<Self> = Vec::new();
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(failed)? {
            paths.push(entry.map_err(failed)?.path());
        }
        paths.sort_unstable();
        for path in paths {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let (stem, compression) = match name.rsplit_once('.') {
                Some((stem, "tar")) => (stem, None),
                Some((rest, suffix)) => match (rest.strip_suffix(".tar"), Compression::of_suffix(suffix)) {
                    (Some(stem), Some(compression)) => (stem, Some(compression)),
                    _ => continue,
                },
                None => continue,
            };
            let prefix = match stem {
                "base" => Some(String::new()),
                "pg_wal" => Some(stem.to_owned()),
                _ => stem.parse::<Oid>().ok().map(|oid| format!("pg_tblspc/{oid}")),
            };
            let Some(prefix) = prefix.filter(|_| path.is_file()) else {
                return Err(ImportError::Stranger { path });
            };
            if let Some(other) = found.iter().find(|other| other.prefix == prefix) {
                return Err(ImportError::TwoForms { path: other.path.clone(), other: path });
            }
            found.push(Self { path, prefix, compression });
        }
        found.sort_unstable_by(|a, b| a.prefix.cmp(&b.prefix));
        if found.first().is_none_or(|tar| !tar.prefix.is_empty()) {
            found.clear();
        }
        Ok(found)
    }

    /// Whether it holds a tablespace.
    pub(super) fn is_tablespace(&self) -> bool {
        self.prefix.starts_with("pg_tblspc/")
    }

    /// Gives all entries to `each`, in their order. A plain archive is only read where they say what comes; a compressed
    /// one whole, to its very end.
    pub(super) fn walk(
        &self,
        progress: &dyn Progress,
        each: &mut dyn FnMut(&mut Entry<'_>) -> Result<(), CopyError>,
    ) -> Result<(), CopyError> {
        let failed = |e| CopyError::Read { path: self.path.clone(), source: e };
        let file = File::open(&self.path).map_err(failed)?;
        let allowed = Rc::new(Cell::new(HEADERS_BYTES_MAX));
        match self.compression {
            None => {
                let length = file.metadata().map_err(failed)?.len();
                let mut archive = Archive::new(Metered { inner: file, allowed: Rc::clone(&allowed) });
                for entry in archive.entries_with_seek().map_err(failed)? {
                    self.entry(entry.map_err(failed)?, Some(length), &allowed, each)?;
                    allowed.set(HEADERS_BYTES_MAX);
                }
            }
            Some(compression) => {
                let mut contents = compression.decode(Watched { file, progress }).map_err(failed)?;
                let inner: &mut Decoded<'_> = &mut contents;
                let mut archive = Archive::new(Metered { inner, allowed: Rc::clone(&allowed) });
                for entry in archive.entries().map_err(failed)? {
                    self.entry(entry.map_err(failed)?, None, &allowed, each)?;
                    allowed.set(HEADERS_BYTES_MAX);
                }
                io::copy(&mut contents, &mut io::sink()).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Checks an entry and hands it on; `length` is that of the archive, where contents can be passed over.
    fn entry<R: Read>(
        &self,
        mut entry: ::tar::Entry<'_, R>,
        length: Option<u64>,
        allowed: &Cell<u64>,
        each: &mut dyn FnMut(&mut Entry<'_>) -> Result<(), CopyError>,
    ) -> Result<(), CopyError> {
        let failed = |e| CopyError::Read { path: self.path.clone(), source: e };
        let name = entry.path_bytes().into_owned();
        let wrong = |why: &str| wrong(&self.path, name.get(..NAME_BYTES_MAX).unwrap_or(&name), why);
        let target = entry.link_name_bytes().map(|link| link.into_owned());
        if name.len() > NAME_BYTES_MAX || target.as_ref().is_some_and(|link| link.len() > NAME_BYTES_MAX) {
            return Err(wrong("has too long a name"));
        }
        let path = std::str::from_utf8(&name).map_err(|_| wrong("is no UTF-8 name"))?;
        let path = path.trim_start_matches("./").trim_end_matches('/');
        if path.starts_with('/') || path.split('/').any(|part| matches!(part, "." | "..")) {
            return Err(wrong("leads out of the data directory"));
        }
        let header = entry.header();
        let kind = match header.entry_type() {
            kind if kind.is_dir() => Kind::Directory,
            kind if kind.is_file() => Kind::File,
            kind if kind.is_symlink() => match target.and_then(|link| String::from_utf8(link).ok()) {
                Some(target) => Kind::Link(target),
                None => return Err(wrong("is a link to nowhere")),
            },
            _ => return Err(wrong("is neither a file, a directory nor a link")),
        };
        let mode = header.mode().map_err(failed)? & 0o7777;
        let modified = i64::try_from(header.mtime().map_err(failed)?).unwrap_or(i64::MAX);
        let (bytes, at) = (entry.size(), entry.raw_file_position());
        if length.is_some_and(|length| at.checked_add(bytes).is_none_or(|end| end > length)) {
            return Err(wrong("is cut short"));
        }
        allowed.set(bytes);
        // The archive's own top directory says nothing.
        if !path.is_empty() {
            if path.split('/').any(str::is_empty) {
                return Err(wrong("leads out of the data directory"));
            }
            let path = match self.prefix.as_str() {
                "" => path.to_owned(),
                prefix => format!("{prefix}/{path}"),
            };
            let at = length.map(|_| at);
            each(&mut Entry {
                tar: &self.path,
                path,
                kind,
                mode,
                modified,
                bytes,
                at,
                contents: &mut entry,
            })?;
        }
        if length.is_none() {
            io::copy(&mut entry, &mut io::sink()).map_err(failed)?;
            if allowed.get() > 0 {
                return Err(wrong("is cut short"));
            }
        }
        Ok(())
    }

    /// Puts those of its files that are `wanted`, by their paths, where they are wanted.
    pub(super) fn extract(
        &self,
        wanted: &[(String, PathBuf)],
        progress: &dyn Progress,
    ) -> Result<(), ImportError> {
        self.walk(progress, &mut |entry| {
            let Some((_, to)) = wanted.iter().find(|(path, _)| *path == entry.path) else { return Ok(()) };
            let failed = |source| CopyError::Read { path: to.clone(), source };
            let mut out = File::create_new(to).map_err(failed)?;
            let copied = io::copy(entry.contents, &mut out);
            copied.map(drop).map_err(|source| CopyError::Read { path: self.path.clone(), source })
        })?;
        Ok(())
    }
}

/// The files of a compressed archive that are to be copied.
pub(super) struct TarStream<'a> {
    pub(super) tar: &'a Tar,
    /// All files of the job, by path.
    pub(super) files: &'a [SourceFile],
}

impl FileStream for TarStream<'_> {
    fn read(
        &self,
        take: &mut dyn FnMut(usize, &mut dyn Read) -> Result<(), CopyError>,
    ) -> Result<(), CopyError> {
        let mut seen = BTreeSet::new();
        self.tar.walk(&waltide_storage::NoProgress, &mut |entry| {
            let place = self.files.binary_search_by(|file| file.path.as_str().cmp(&entry.path));
            let listed = place.ok().and_then(|place| Some((place, self.files.get(place)?)));
            let Some((place, file)) = listed.filter(|(_, file)| file.source == self.tar.path) else {
                return Ok(());
            };
            // What was listed is what is read: nobody changes a backup at rest.
            if entry.kind != Kind::File || entry.bytes != file.bytes || !seen.insert(place) {
                return Err(entry.wrong("has changed since the archive was listed"));
            }
            take(place, entry.contents)
        })
    }
}

/// Gives no more than is allowed, so that what a header says of itself cannot fill the memory.
struct Metered<R> {
    inner: R,
    allowed: Rc<Cell<u64>>,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let allowed = usize::try_from(self.allowed.get()).unwrap_or(usize::MAX);
        if allowed == 0 && !buffer.is_empty() {
            let text = format!("between two files are more than {HEADERS_BYTES_MAX} bytes of headers");
            return Err(io::Error::other(text));
        }
        let room = buffer.len().min(allowed);
        let found = self.inner.read(buffer.get_mut(..room).unwrap_or_default())?;
        self.allowed.set(self.allowed.get().saturating_sub(found as u64));
        Ok(found)
    }
}

impl<R: Seek> Seek for Metered<R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.inner.seek(to)
    }
}

/// Tells how much of a file was read.
struct Watched<'a> {
    file: File,
    progress: &'a dyn Progress,
}

impl Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let found = self.file.read(buffer)?;
        self.progress.advance(found as u64);
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write as _;

    use ::tar::{Builder, EntryType, Header};
    use waltide_storage::NoProgress;

    fn header(name: &str, bytes: u64, kind: EntryType) -> Header {
        let mut header = Header::new_gnu();
        header.set_path(name).unwrap();
        header.set_size(bytes);
        header.set_mode(0o600);
        header.set_entry_type(kind);
        header.set_cksum();
        header
    }

    /// The archive in all forms, each in a directory of its own.
    fn forms(scratch: &Path, bytes: &[u8]) -> Vec<Tar> {
        let mut tars = Vec::new();
        for (suffix, packed) in [
            ("tar", bytes.to_vec()),
            ("tar.gz", {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(bytes).unwrap();
                encoder.finish().unwrap()
            }),
            ("tar.lz4", {
                let mut encoder = lz4_flex::frame::FrameEncoder::new(Vec::new());
                encoder.write_all(bytes).unwrap();
                encoder.finish().unwrap()
            }),
            ("tar.zst", zstd::bulk::compress(bytes, 1).unwrap()),
        ] {
            let dir = scratch.join(suffix);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join(format!("base.{suffix}")), packed).unwrap();
            tars.extend(Tar::find(&dir).unwrap());
        }
        assert_eq!(tars.len(), 4);
        tars
    }

    fn names(tar: &Tar) -> Result<Vec<String>, String> {
        let mut names = Vec::new();
        let walked = tar.walk(&NoProgress, &mut |entry| {
            let mut contents = String::new();
            if entry.kind == Kind::File && entry.bytes < 100 {
                entry.contents.read_to_string(&mut contents).unwrap();
            }
            names.push(format!("{} {} {contents}", entry.path, entry.bytes));
            Ok(())
        });
        match walked {
            Ok(()) => Ok(names),
            Err(CopyError::Read { path, source }) => {
                assert_eq!(path, tar.path);
                Err(source.to_string())
            }
            Err(e) => panic!("{e}"),
        }
    }

    #[test]
    fn every_form_gives_the_same_entries() {
        let scratch = tempfile::tempdir().unwrap();
        let mut builder = Builder::new(Vec::new());
        let long = format!("base/5/{}", "x".repeat(200));
        for (name, contents) in [("PG_VERSION", "15"), ("base/5/1", ""), (long.as_str(), "long")] {
            let mut header = header("x", contents.len() as u64, EntryType::Regular);
            builder.append_data(&mut header, name, contents.as_bytes()).unwrap();
        }
        builder.append(&header("./", 0, EntryType::Directory), io::empty()).unwrap();
        builder.append(&header("./global/", 0, EntryType::Directory), io::empty()).unwrap();
        builder.append(&header("large", 3 << 20, EntryType::Regular), &vec![7; 3 << 20][..]).unwrap();
        let expected =
            ["PG_VERSION 2 15", "base/5/1 0 ", &format!("{long} 4 long"), "global 0 ", "large 3145728 "];
        for tar in forms(scratch.path(), &builder.into_inner().unwrap()) {
            assert_eq!(names(&tar).unwrap(), expected, "{tar:?}");
        }
    }

    #[test]
    fn what_a_header_says_of_itself_is_not_believed() {
        let scratch = tempfile::tempdir().unwrap();
        let archive = |headers: &[(&str, u64, EntryType, usize)]| {
            let mut bytes = Vec::new();
            for (name, said, kind, there) in headers {
                bytes.extend(header(name, *said, *kind).as_bytes());
                bytes.resize(bytes.len() + there.next_multiple_of(512), b'a');
            }
            bytes
        };
        let file = EntryType::Regular;
        for (headers, expected) in [
            (archive(&[("a", 2000, file, 1000)]), "\"a\" is cut short"),
            (archive(&[("a", 1 << 62, file, 1000)]), "\"a\" is cut short"),
            (archive(&[("a", u64::MAX, file, 1000)]), "size overflow"),
            (archive(&[("a", 10, EntryType::Directory, 0)]), "\"a\" is cut short"),
            (archive(&[("a", 0, EntryType::Link, 0)]), "\"a\" is neither a file, a directory nor a link"),
            (archive(&[("a", 0, EntryType::Fifo, 0)]), "\"a\" is neither a file, a directory nor a link"),
            (
                archive(&[("a", 64 << 20, EntryType::GNULongName, 64 << 20), ("b", 0, file, 0)]),
                "between two files are more than 1048576 bytes of headers",
            ),
            (
                archive(&[("a", 64 << 20, EntryType::XHeader, 64 << 20), ("b", 0, file, 0)]),
                "between two files are more than 1048576 bytes of headers",
            ),
        ] {
            for tar in forms(scratch.path(), &headers) {
                assert_eq!(names(&tar).unwrap_err(), expected, "{tar:?}");
            }
        }
        let long = archive(&[("a", 5000, EntryType::GNULongName, 5000), ("b", 0, file, 0)]);
        for tar in forms(scratch.path(), &long) {
            let refused = names(&tar).unwrap_err();
            assert!(
                refused.starts_with("\"aaa") && refused.ends_with("a\" has too long a name"),
                "{refused}"
            );
        }
        for name in ["../a", "/a", "a//b", "a/../b"] {
            let mut bytes = header("x", 0, file);
            bytes.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
            bytes.set_cksum();
            for tar in forms(scratch.path(), bytes.as_bytes()) {
                assert_eq!(names(&tar).unwrap_err(), format!("{name:?} leads out of the data directory"));
            }
        }
    }

    #[test]
    fn each_part_of_a_backup_is_there_once() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path();
        let put = |name: &str| fs::write(dir.join(name), "").unwrap();
        let find = || Tar::find(dir).map_err(|e| e.to_string().replace(dir.to_str().unwrap(), "DIR"));
        put("16384.tar.lz4");
        put("notes.txt");
        assert_eq!(find(), Ok(Vec::new()), "there is no base.tar");
        put("base.tar.gz");
        put("pg_wal.tar");
        let found: Vec<_> = find().unwrap().into_iter().map(|tar| (tar.prefix, tar.compression)).collect();
        let expected = [
            (String::new(), Some(Compression::Gzip)),
            ("pg_tblspc/16384".to_owned(), Some(Compression::Lz4)),
            ("pg_wal".to_owned(), None),
        ];
        assert_eq!(found, expected);
        for (name, expected) in [
            (
                "base.tar",
                "DIR/base.tar and DIR/base.tar.gz are the same part of a base backup\nhint: move one of them elsewhere",
            ),
            (
                "base.tar.zst",
                "DIR/base.tar.gz and DIR/base.tar.zst are the same part of a base backup\nhint: move one of them elsewhere",
            ),
            (
                "016384.tar",
                "DIR/016384.tar and DIR/16384.tar.lz4 are the same part of a base backup\nhint: move one of them elsewhere",
            ),
            (
                "pg_wal.tar.gz",
                "DIR/pg_wal.tar and DIR/pg_wal.tar.gz are the same part of a base backup\nhint: move one of them elsewhere",
            ),
            ("other.tar.gz", "DIR/other.tar.gz is no part of a base backup\nhint: move it elsewhere"),
        ] {
            put(name);
            assert_eq!(find().unwrap_err(), expected);
            fs::remove_file(dir.join(name)).unwrap();
        }
        fs::create_dir(dir.join("16385.tar")).unwrap();
        assert_eq!(find().unwrap_err(), "DIR/16385.tar is no part of a base backup\nhint: move it elsewhere");
    }
}
