//! A base backup as pg_basebackup left it: a directory, or tar archives.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use waltide_format::Oid;
use waltide_format::archive::{ManifestDirectory, Tablespace};
use waltide_format::engines::postgres::cluster::{
    ControlFile, RelationSegment, parse_tablespace_map, version_directory,
};
use waltide_storage::Progress;

use super::super::control::read_version;
use super::super::copy::CopyError;
use super::super::files::{CONTROL_FILE, Lies, Scan, SourceFile, is_left_out, scan};
use super::ImportError;
use super::manifest::BackupManifest;
use super::tar::{Entry, Kind, Tar};

/// backup_label, tablespace_map and their like are texts of a few lines.
const TEXT_BYTES_MAX: u64 = 16 << 20;
/// A backup_manifest has about 150 bytes a file.
const MANIFEST_BYTES_MAX: u64 = 1 << 30;
/// Files that tell how to read the others.
const NOTES: [&str; 2] = ["backup_label", "tablespace_map"];
/// What a file or directory takes while an import runs, besides its path twice.
const LISTED_BYTES: u64 = 256;
/// Memory for what backup_manifest does not list: directories, WAL, and what is left out.
const UNLISTED_BYTES_MAX: u64 = 256 << 20;

/// A base backup that was found.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) scan: Scan,
    pub(super) control: ControlFile,
    /// backup_label and tablespace_map, which are no files of the cluster: their bytes.
    pub(super) notes: BTreeMap<String, Vec<u8>>,
    pub(super) label: String,
    pub(super) tablespace_map: Option<String>,
    pub(super) manifest: Option<BackupManifest>,
    /// The compressed archives that files of the cluster lie in.
    pub(super) compressed: Vec<Tar>,
    pub(super) wal: WalFiles,
}

/// Where the backup's own WAL is.
#[derive(Debug)]
pub(super) enum WalFiles {
    /// In a directory.
    Directory(PathBuf),
    /// In tar archives, by name.
    Tars(Vec<Tar>, BTreeMap<String, SourceFile>),
}

impl Source {
    /// Finds what lies in `dir`; without a backup_manifest only where that is not `required`.
    pub(super) fn open(dir: &Path, required: bool, progress: &dyn Progress) -> Result<Self, ImportError> {
        if dir.join("PG_VERSION").is_file() {
            return Self::open_directory(dir, required);
        }
        match Tar::find(dir) {
            Ok(tars) if !tars.is_empty() => Self::open_tars(dir, tars, required, progress),
            Err(e) if dir.is_dir() => Err(e),
            _ => Err(ImportError::NoBackup { dir: dir.to_owned() }),
        }
    }

    fn open_directory(dir: &Path, required: bool) -> Result<Self, ImportError> {
        let (manifest, _) = read_manifest(dir, required)?;
        let major = read_version(dir)?;
        let path = dir.join(CONTROL_FILE);
        let control = parse_control(&path, &read_file(&path, TEXT_BYTES_MAX)?)?;
        let scan = scan(dir, major, &version_directory(control.major, control.catalog_version))?;
        let mut notes = BTreeMap::new();
        for name in NOTES {
            let path = dir.join(name);
            if path.exists() {
                notes.insert(name.to_owned(), read_file(&path, TEXT_BYTES_MAX)?);
            }
        }
        let label = text(dir, &notes, "backup_label")?
            .ok_or(ImportError::Missing { path: "backup_label".to_owned() })?;
        let tablespace_map = text(dir, &notes, "tablespace_map")?;
        let wal = WalFiles::Directory(dir.join("pg_wal"));
        Ok(Self { scan, control, notes, label, tablespace_map, manifest, compressed: Vec::new(), wal })
    }

    fn open_tars(
        dir: &Path,
        tars: Vec<Tar>,
        required: bool,
        progress: &dyn Progress,
    ) -> Result<Self, ImportError> {
        let (manifest, manifest_bytes) = read_manifest(dir, required)?;
        let compressed = tars.iter().filter(|tar| tar.compression.is_some());
        let bytes = |tar: &Tar| std::fs::metadata(&tar.path).map_or(0, |about| about.len());
        let all = compressed.clone().fold(0, |sum: u64, tar| sum.saturating_add(bytes(tar)));
        if compressed.count() > 0 {
            progress.phase("list", Some(all));
        }
        // Four bytes for each that a manifest has are more than its files take.
        let room = manifest_bytes.saturating_mul(4).saturating_add(UNLISTED_BYTES_MAX);
        let mut found = Listing { room, ..Listing::default() };
        for tar in &tars {
            found.read(tar, progress)?;
        }
        let Listing { files, directories, mut tablespaces, mut small, .. } = found;
        let control =
            small.remove(CONTROL_FILE).ok_or(ImportError::Missing { path: CONTROL_FILE.to_owned() })?;
        let base = tars.first().map(|tar| tar.path.clone()).unwrap_or_default();
        let control = parse_control(&base, &control)?;
        let notes = small;
        let label = text(&base, &notes, "backup_label")?
            .ok_or(ImportError::Missing { path: "backup_label".to_owned() })?;
        let tablespace_map = text(&base, &notes, "tablespace_map")?;
        if let Some(map) = &tablespace_map {
            tablespaces.extend(parse_tablespace_map(map)?);
        }
        let (mut scan, mut wal) = (Scan::default(), BTreeMap::new());
        for (path, file) in files {
            if let Some(name) = path.strip_prefix("pg_wal/") {
                wal.insert(name.to_owned(), file);
            } else if !is_left_out(&path) {
                scan.files.push(file);
            }
        }
        scan.directories =
            directories.into_iter().map(|(path, mode)| ManifestDirectory { path, mode }).collect();
        scan.directories.retain(|directory| !is_left_out(&directory.path));
        scan.tablespaces = tablespaces.into_iter().map(|(oid, path)| Tablespace { oid, path }).collect();
        let mut compressed = tars.clone();
        compressed.retain(|tar| tar.compression.is_some() && tar.prefix != "pg_wal");
        let wal = WalFiles::Tars(tars, wal);
        Ok(Self { scan, control, notes, label, tablespace_map, manifest, compressed, wal })
    }
}

/// backup_manifest, and how long it is.
fn read_manifest(dir: &Path, required: bool) -> Result<(Option<BackupManifest>, u64), ImportError> {
    let path = dir.join("backup_manifest");
    if !path.exists() {
        return match required {
            true => Err(ImportError::NoManifest { dir: dir.to_owned() }),
            false => Ok((None, 0)),
        };
    }
    let bytes = read_file(&path, MANIFEST_BYTES_MAX)?;
    let manifest = BackupManifest::parse(&bytes).map_err(|why| ImportError::Manifest { why })?;
    Ok((Some(manifest), bytes.len() as u64))
}

fn parse_control(path: &Path, bytes: &[u8]) -> Result<ControlFile, ImportError> {
    ControlFile::decode(bytes).map_err(|source| ImportError::Control { path: path.to_owned(), source })
}

fn read_file(path: &Path, max: u64) -> Result<Vec<u8>, ImportError> {
    let failed = |source| ImportError::Read { path: path.to_owned(), source };
    super::super::wal_dir::read_whole(path, max).map_err(failed)
}

/// One of the notes, which lies in `place`.
fn text(place: &Path, notes: &BTreeMap<String, Vec<u8>>, name: &str) -> Result<Option<String>, ImportError> {
    let Some(bytes) = notes.get(name) else { return Ok(None) };
    let failed = |e| ImportError::Read {
        path: place.to_owned(),
        source: io::Error::other(format!("{name} is no text: {e}")),
    };
    String::from_utf8(bytes.clone()).map(Some).map_err(failed)
}

/// What tar archives hold, by the path that it has in a data directory.
#[derive(Default)]
struct Listing {
    files: BTreeMap<String, SourceFile>,
    directories: BTreeMap<String, u32>,
    tablespaces: BTreeMap<Oid, String>,
    /// The bytes of those that tell how to read the others.
    small: BTreeMap<String, Vec<u8>>,
    /// Memory that is left for what compressed archives hold: a few bytes of them can hold very much.
    room: u64,
}

impl Listing {
    fn read(&mut self, tar: &Tar, progress: &dyn Progress) -> Result<(), ImportError> {
        if tar.is_tablespace() {
            self.directories.entry(tar.prefix.clone()).or_insert(0o700);
        }
        tar.walk(progress, &mut |entry| {
            if tar.compression.is_some() {
                self.take_room(tar, entry)?;
            }
            self.entry(tar, entry)
        })?;
        Ok(())
    }

    fn take_room(&mut self, tar: &Tar, entry: &Entry<'_>) -> Result<(), CopyError> {
        let link = if let Kind::Link(target) = &entry.kind { target.len() } else { 0 };
        let paths = (entry.path.len() as u64).saturating_mul(2).saturating_add(link as u64);
        match self.room.checked_sub(paths.saturating_add(LISTED_BYTES)) {
            Some(room) => self.room = room,
            None => {
                let tool = tar.compression.map_or("", |compression| compression.tool());
                return Err(entry.wrong(format!(
                    "comes after more files and directories than a compressed backup with this backup_manifest may have\n\
                     hint: if so many are meant, run {tool} on the archives, and import what that makes"
                )));
            }
        }
        Ok(())
    }

    fn entry(&mut self, tar: &Tar, entry: &mut Entry<'_>) -> Result<(), CopyError> {
        let path = entry.path.clone();
        match &entry.kind {
            Kind::Directory => drop(self.directories.insert(path, entry.mode)),
            Kind::Link(target) => {
                let oid = path.strip_prefix("pg_tblspc/").and_then(|oid| oid.parse().ok());
                let oid = oid.ok_or_else(|| entry.wrong("is a link to nowhere"))?;
                self.tablespaces.insert(oid, target.clone());
                self.directories.entry(path).or_insert(0o700);
            }
            Kind::File => {
                let note = NOTES.contains(&path.as_str());
                if note || path == CONTROL_FILE {
                    if entry.bytes > TEXT_BYTES_MAX {
                        return Err(entry.wrong(format!("has {} bytes, which it never has", entry.bytes)));
                    }
                    let mut bytes = Vec::new();
                    let read = entry.contents.read_to_end(&mut bytes);
                    read.map_err(|source| CopyError::Read { path: tar.path.clone(), source })?;
                    if self.small.insert(path.clone(), bytes).is_some() {
                        return Err(entry.wrong("is there twice"));
                    }
                }
                if note {
                    return Ok(());
                }
                let file = SourceFile {
                    path: path.clone(),
                    source: tar.path.clone(),
                    lies: entry.at.map_or(Lies::Compressed, Lies::From),
                    bytes: entry.bytes,
                    mode: entry.mode,
                    modified: entry.modified,
                    relation: relation_of(&path),
                };
                if self.files.insert(path, file).is_some() {
                    return Err(entry.wrong("is there twice"));
                }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    use waltide_storage::NoProgress;

    #[test]
    fn a_few_bytes_do_not_hold_more_names_than_there_is_room_for() {
        let scratch = tempfile::tempdir().unwrap();
        let mut bytes = Vec::new();
        for n in 0..1000 {
            let mut header = ::tar::Header::new_gnu();
            header.set_path(format!("base/5/{n}")).unwrap();
            header.set_mode(0o600);
            header.set_size(0);
            header.set_cksum();
            bytes.extend(header.as_bytes());
        }
        fs::write(scratch.path().join("base.tar.zst"), zstd::bulk::compress(&bytes, 1).unwrap()).unwrap();
        let tar = Tar::find(scratch.path()).unwrap().remove(0);
        let list = |room| Listing { room, ..Listing::default() }.read(&tar, &NoProgress);
        list(1000 * (256 + 2 * 10)).unwrap();
        let Err(ImportError::Copy(CopyError::Read { path, source })) = list(100 * (256 + 2 * 10)) else {
            panic!("there was room")
        };
        assert_eq!(path, tar.path);
        let expected = "comes after more files and directories than a compressed backup with this backup_manifest may \
                        have\nhint: if so many are meant, run unzstd on the archives, and import what that makes";
        assert!(source.to_string().ends_with(expected), "{source}");
        // A plain one is as long as it says.
        fs::write(scratch.path().join("base.tar"), &bytes).unwrap();
        fs::remove_file(scratch.path().join("base.tar.zst")).unwrap();
        let plain = Tar::find(scratch.path()).unwrap().remove(0);
        Listing::default().read(&plain, &NoProgress).unwrap();
    }
}
