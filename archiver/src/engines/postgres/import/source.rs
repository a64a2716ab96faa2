//! The files of a base backup, as pg_basebackup left them: in a directory, or in tar archives.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use waltide_format::Oid;
use waltide_format::archive::{ManifestDirectory, Tablespace};
use waltide_format::engines::postgres::cluster::{
    ControlFile, RelationSegment, parse_tablespace_map, version_directory,
};

use super::super::control::read_version;
use super::super::files::{CONTROL_FILE, Scan, SourceFile, is_left_out, scan};
use super::ImportError;

/// backup_label, tablespace_map and their like are texts of a few lines.
const TEXT_BYTES_MAX: u64 = 16 << 20;
/// A backup_manifest has about 150 bytes a file.
const MANIFEST_BYTES_MAX: u64 = 1 << 30;

/// A base backup that was found.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) scan: Scan,
    pub(super) control: ControlFile,
    /// backup_label and tablespace_map, which are no files of the cluster.
    pub(super) notes: Vec<SourceFile>,
    pub(super) label: String,
    pub(super) tablespace_map: Option<String>,
    pub(super) manifest: Option<Vec<u8>>,
    pub(super) wal: WalFiles,
}

/// Where the backup's own WAL is.
#[derive(Debug)]
pub(super) enum WalFiles {
    /// In a directory.
    Directory(PathBuf),
    /// In a tar archive, by name.
    Tar(BTreeMap<String, SourceFile>),
}

impl Source {
    /// Finds what lies in `dir`.
    pub(super) fn open(dir: &Path) -> Result<Self, ImportError> {
        if dir.join("PG_VERSION").is_file() {
            return Self::open_directory(dir);
        }
        if dir.join("base.tar").is_file() {
            return Self::open_tar(dir);
        }
        for (suffix, tool) in [("gz", "gunzip"), ("lz4", "unlz4"), ("zst", "unzstd")] {
            let path = dir.join(format!("base.tar.{suffix}"));
            if path.is_file() {
                return Err(ImportError::Compressed { path, tool });
            }
        }
        Err(ImportError::NoBackup { dir: dir.to_owned() })
    }

    fn open_directory(dir: &Path) -> Result<Self, ImportError> {
        let major = read_version(dir)?;
        let control =
            parse_control(&dir.join(CONTROL_FILE), &read_file(&dir.join(CONTROL_FILE), TEXT_BYTES_MAX)?)?;
        let scan = scan(dir, major, &version_directory(control.major, control.catalog_version))?;
        let mut notes = Vec::new();
        for name in ["backup_label", "tablespace_map"] {
            let source = dir.join(name);
            match std::fs::metadata(&source) {
                Ok(about) => notes.push(SourceFile {
                    path: name.to_owned(),
                    source,
                    inside_at: None,
                    bytes: about.len(),
                    mode: about.mode() & 0o7777,
                    modified: about.mtime(),
                    relation: None,
                }),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(ImportError::Read { path: source, source: e }),
            }
        }
        let wal = WalFiles::Directory(dir.join("pg_wal"));
        Self::complete(dir, scan, notes, control, wal)
    }

    fn open_tar(dir: &Path) -> Result<Self, ImportError> {
        let mut found = TarFiles::default();
        found.read(&dir.join("base.tar"), "")?;
        let listed =
            std::fs::read_dir(dir).map_err(|source| ImportError::Read { path: dir.to_owned(), source })?;
        for entry in listed {
            let path = entry.map_err(|source| ImportError::Read { path: dir.to_owned(), source })?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            match name.strip_suffix(".tar") {
                None | Some("base") => {}
                Some("pg_wal") => found.read(&path, "pg_wal")?,
                Some(oid) if oid.parse::<Oid>().is_ok() => found.read(&path, &format!("pg_tblspc/{oid}"))?,
                Some(_) => return Err(ImportError::Stranger { path }),
            }
        }
        let control =
            found.files.get(CONTROL_FILE).ok_or(ImportError::Missing { path: CONTROL_FILE.to_owned() })?;
        let control = parse_control(&control.source, &read_source(control, TEXT_BYTES_MAX)?)?;
        let TarFiles { files, directories, mut tablespaces } = found;
        let mut scan = Scan::default();
        let (mut notes, mut wal) = (Vec::new(), BTreeMap::new());
        for (path, file) in files {
            match path.as_str() {
                "backup_label" | "tablespace_map" => notes.push(file),
                path if path.starts_with("pg_wal/") => {
                    wal.insert(path.trim_start_matches("pg_wal/").to_owned(), file);
                }
                path if is_left_out(path) => {}
                _ => scan.files.push(file),
            }
        }
        if let Some(map) = notes.iter().find(|note| note.path == "tablespace_map") {
            let text = read_text(map)?;
            tablespaces.extend(parse_tablespace_map(&text)?);
        }
        scan.directories =
            directories.into_iter().map(|(path, mode)| ManifestDirectory { path, mode }).collect();
        scan.directories.retain(|directory| !is_left_out(&directory.path));
        scan.tablespaces = tablespaces.into_iter().map(|(oid, path)| Tablespace { oid, path }).collect();
        Self::complete(dir, scan, notes, control, WalFiles::Tar(wal))
    }

    fn complete(
        dir: &Path,
        scan: Scan,
        notes: Vec<SourceFile>,
        control: ControlFile,
        wal: WalFiles,
    ) -> Result<Self, ImportError> {
        let note = |name: &str| notes.iter().find(|note| note.path == name).map(read_text).transpose();
        let label = note("backup_label")?.ok_or(ImportError::Missing { path: "backup_label".to_owned() })?;
        let tablespace_map = note("tablespace_map")?;
        let path = dir.join("backup_manifest");
        let manifest = match path.exists() {
            true => Some(read_file(&path, MANIFEST_BYTES_MAX)?),
            false => None,
        };
        Ok(Self { scan, control, notes, label, tablespace_map, manifest, wal })
    }
}

fn parse_control(path: &Path, bytes: &[u8]) -> Result<ControlFile, ImportError> {
    ControlFile::decode(bytes).map_err(|source| ImportError::Control { path: path.to_owned(), source })
}

fn read_file(path: &Path, max: u64) -> Result<Vec<u8>, ImportError> {
    let failed = |source| ImportError::Read { path: path.to_owned(), source };
    super::super::wal_dir::read_whole(path, max).map_err(failed)
}

/// The bytes of a small file, wherever they are.
pub(super) fn read_source(file: &SourceFile, max: u64) -> Result<Vec<u8>, ImportError> {
    let failed = |source| ImportError::Read { path: file.source.clone(), source };
    let Some(at) = file.inside_at else { return read_file(&file.source, max) };
    let length = usize::try_from(file.bytes.min(max)).unwrap_or(0);
    if length as u64 != file.bytes {
        return Err(failed(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("{} is too large", file.path),
        )));
    }
    let mut bytes = vec![0; length];
    File::open(&file.source).and_then(|open| open.read_exact_at(&mut bytes, at)).map_err(failed)?;
    Ok(bytes)
}

fn read_text(file: &SourceFile) -> Result<String, ImportError> {
    let bytes = read_source(file, TEXT_BYTES_MAX)?;
    String::from_utf8(bytes)
        .map_err(|e| ImportError::Read { path: file.source.clone(), source: io::Error::other(e) })
}

/// What tar archives hold, by the path that it has in a data directory.
#[derive(Default)]
struct TarFiles {
    files: BTreeMap<String, SourceFile>,
    directories: BTreeMap<String, u32>,
    tablespaces: BTreeMap<Oid, String>,
}

impl TarFiles {
    /// Lists a tar archive, whose paths lie below `prefix` in the data directory.
    fn read(&mut self, source: &Path, prefix: &str) -> Result<(), ImportError> {
        let failed = |e| ImportError::Read { path: source.to_owned(), source: e };
        let mut file = File::open(source).map_err(failed)?;
        let length =
            file.seek(SeekFrom::End(0)).and_then(|end| file.rewind().map(|()| end)).map_err(failed)?;
        if prefix.starts_with("pg_tblspc/") {
            self.directories.entry(prefix.to_owned()).or_insert(0o700);
        }
        let mut tar = tar::Archive::new(file);
        for entry in tar.entries_with_seek().map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let wrong = |why: &str| {
                let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
                failed(io::Error::other(format!("{name:?} {why}")))
            };
            let name =
                std::str::from_utf8(&entry.path_bytes()).map_err(|_| wrong("is no UTF-8 name"))?.to_owned();
            let name = name.trim_start_matches("./").trim_end_matches('/');
            if name.is_empty() {
                continue;
            }
            if name.starts_with('/') || name.split('/').any(|part| matches!(part, "" | "." | "..")) {
                return Err(wrong("leads out of the data directory"));
            }
            let path = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
            let header = entry.header();
            let mode = header.mode().map_err(failed)? & 0o7777;
            let kind = header.entry_type();
            if kind.is_dir() {
                self.directories.insert(path, mode);
            } else if kind.is_symlink() {
                let oid = path.strip_prefix("pg_tblspc/").and_then(|oid| oid.parse().ok());
                let target =
                    entry.link_name_bytes().and_then(|link| String::from_utf8(link.into_owned()).ok());
                let (Some(oid), Some(target)) = (oid, target) else {
                    return Err(wrong("is a link to nowhere"));
                };
                self.directories.entry(path).or_insert(0o700);
                self.tablespaces.insert(oid, target);
            } else if kind.is_file() {
                let (at, bytes) = (entry.raw_file_position(), entry.size());
                if at.checked_add(bytes).is_none_or(|end| end > length) {
                    return Err(wrong("is cut short"));
                }
                let modified = i64::try_from(header.mtime().map_err(failed)?).unwrap_or(i64::MAX);
                let relation = relation_of(&path);
                let file = SourceFile {
                    path: path.clone(),
                    source: source.to_owned(),
                    inside_at: Some(at),
                    bytes,
                    mode,
                    modified,
                    relation,
                };
                if self.files.insert(path, file).is_some() {
                    return Err(wrong("is there twice"));
                }
            } else {
                return Err(wrong("is neither a file, a directory nor a link"));
            }
        }
        Ok(())
    }
}

/// Which relation's file a path is, by where a data directory has them.
fn relation_of(path: &str) -> Option<RelationSegment> {
    let parts: Vec<&str> = path.split('/').collect();
    match parts.as_slice() {
        ["global", name] | ["base", _, name] | ["pg_tblspc", _, _, _, name] => RelationSegment::parse(name),
        _ => None,
    }
}

/// A segment out of a tar archive, in a file of its name below `to`.
pub(super) fn extract(file: &SourceFile, to: &Path) -> Result<(), ImportError> {
    let failed = |source| ImportError::Read { path: file.source.clone(), source };
    let copy = || -> io::Result<()> {
        let mut from = File::open(&file.source)?;
        from.seek(SeekFrom::Start(file.inside_at.unwrap_or(0)))?;
        let mut out = File::create_new(to)?;
        let copied = io::copy(&mut from.take(file.bytes), &mut out)?;
        if copied == file.bytes { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    };
    copy().map_err(failed)
}
