//! What of a data directory belongs into a base backup, and what PostgreSQL makes anew.

use std::collections::BTreeSet;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use waltide_format::archive::{ManifestDirectory, Tablespace};
use waltide_format::engines::postgres::cluster::RelationSegment;
use waltide_format::{ForkNumber, Oid, PgMajor};

/// The file that is read last.
pub const CONTROL_FILE: &str = "global/pg_control";

/// Directories whose contents are of no use to a restored server, or would harm it. They are kept, empty.
const EMPTIED: [&str; 8] = [
    "pg_dynshmem",
    "pg_notify",
    "pg_replslot",
    "pg_serial",
    "pg_snapshots",
    "pg_stat_tmp",
    "pg_subtrans",
    "pg_wal",
];

/// Files of the data directory itself that belong to the running server, or are put there by a restore.
const LEFT_OUT: [&str; 9] = [
    "postmaster.pid",
    "postmaster.opts",
    "backup_label",
    "backup_label.old",
    "tablespace_map",
    "tablespace_map.old",
    "backup_manifest",
    "postgresql.auto.conf.tmp",
    "current_logfiles.tmp",
];

/// Why a data directory could not be listed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScanError {
    /// A directory or file could not be looked at.
    #[error("cannot read {}", path.display())]
    Io {
        /// Which one.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A name that a manifest cannot hold.
    #[error("{} is no UTF-8 name\nhint: rename the file, or move it out of the data directory.", path.display())]
    Name {
        /// The file.
        path: PathBuf,
    },
}

/// How a file's bytes lie in their source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lies {
    /// They are all that is there, and may have become more or fewer since.
    Alone,
    /// From this byte on, among others, as many as there were.
    From(u64),
    /// Somewhere in what a compressed source gives, which can only be read from its start.
    Compressed,
}

/// A file to be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// What the manifest calls it.
    pub path: String,
    /// Where its bytes are.
    pub source: PathBuf,
    /// How they lie there.
    pub lies: Lies,
    /// How many there were when it was found.
    pub bytes: u64,
    /// Permission bits.
    pub mode: u32,
    /// Seconds since 1970 of its last modification.
    pub modified: i64,
    /// Which part of a relation's fork it is, if it is one.
    pub relation: Option<RelationSegment>,
}

/// What a data directory holds of a backup.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scan {
    /// Directories, parents before children.
    pub directories: Vec<ManifestDirectory>,
    /// Files, by path.
    pub files: Vec<SourceFile>,
    /// Tablespaces that lie elsewhere.
    pub tablespaces: Vec<Tablespace>,
    /// What was left out though it may be somebody's: links and special files.
    pub warnings: Vec<String>,
}

impl Scan {
    /// All bytes of the files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().fold(0, |sum, file| sum.saturating_add(file.bytes))
    }
}

/// What a directory is, which decides what its entries are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// The data directory.
    Root,
    /// `base`, or the version's directory of a tablespace: databases lie in it.
    Databases,
    /// A database's directory.
    Database,
    /// `global`.
    Global,
    /// `pg_tblspc`.
    Tablespaces,
    /// A tablespace.
    Tablespace,
    /// Anything else.
    Plain,
}

/// Whether a path below a data directory is one that a backup leaves out.
pub(super) fn is_left_out(path: &str) -> bool {
    let (first, rest) = path.split_once('/').unwrap_or((path, ""));
    let within = EMPTIED.contains(&first) && !rest.is_empty();
    let kept = path == "pg_wal/archive_status" || path == "pg_wal/summaries";
    (within && !kept) || LEFT_OUT.contains(&path) || path.split('/').any(is_passing)
}

/// Whether a file or directory of this name is never of use after the server that made it.
fn is_passing(name: &str) -> bool {
    name.starts_with("pgsql_tmp") || name.starts_with("pg_internal.init")
}

/// Lists a data directory and its tablespaces. Files and directories that vanish meanwhile are not there; that is
/// for the log to explain. `version_directory` is the name PostgreSQL gives to its directory in a tablespace.
pub fn scan(data_dir: &Path, major: PgMajor, version_directory: &str) -> Result<Scan, ScanError> {
    let mut walk = Walk { scan: Scan::default(), inside: BTreeSet::new(), major, version_directory };
    let root = std::fs::canonicalize(data_dir);
    let root = root.map_err(|source| ScanError::Io { path: data_dir.to_owned(), source })?;
    // A tablespace inside the data directory is taken as a tablespace, not twice.
    for entry in entries(&root.join("pg_tblspc"))? {
        if let Ok(target) = std::fs::canonicalize(&entry.path)
            && entry.about.is_symlink()
            && target.starts_with(&root)
        {
            walk.inside.insert(target);
        }
    }
    walk.directory(&root, "", Place::Root)?;
    walk.scan.files.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok(walk.scan)
}

struct Walk<'a> {
    scan: Scan,
    inside: BTreeSet<PathBuf>,
    major: PgMajor,
    version_directory: &'a str,
}

struct Entry {
    name: String,
    path: PathBuf,
    about: Metadata,
}

/// What is in a directory, by name, links not followed.
fn entries(directory: &Path) -> Result<Vec<Entry>, ScanError> {
    let error = |path: &Path, source| ScanError::Io { path: path.to_owned(), source };
    let listed = match std::fs::read_dir(directory) {
        Ok(listed) => listed,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(error(directory, e)),
    };
    let mut found = Vec::new();
    for entry in listed {
        let entry = entry.map_err(|e| error(directory, e))?;
        let path = entry.path();
        let about = match std::fs::symlink_metadata(&path) {
            Ok(about) => about,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(error(&path, e)),
        };
        let name = entry.file_name().into_string().map_err(|_| ScanError::Name { path: path.clone() })?;
        found.push(Entry { name, path, about });
    }
    found.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

impl Walk<'_> {
    fn directory(&mut self, directory: &Path, relative: &str, place: Place) -> Result<(), ScanError> {
        let found = entries(directory)?;
        let unlogged: BTreeSet<Oid> = match place {
            Place::Database => {
                let parts = found.iter().filter_map(|e| RelationSegment::parse(&e.name));
                parts.filter(|r| r.fork == ForkNumber::Init).map(|r| r.number).collect()
            }
            _ => BTreeSet::new(),
        };
        for entry in found {
            let relation = match place {
                Place::Database | Place::Global => RelationSegment::parse(&entry.name),
                _ => None,
            };
            if !self.is_wanted(&entry.name, place, relation, &unlogged) {
                continue;
            }
            let path = match relative {
                "" => entry.name.clone(),
                _ => format!("{relative}/{}", entry.name),
            };
            self.entry(entry, path, place, relation)?;
        }
        Ok(())
    }

    fn is_wanted(
        &self,
        name: &str,
        place: Place,
        relation: Option<RelationSegment>,
        unlogged: &BTreeSet<Oid>,
    ) -> bool {
        if is_passing(name) {
            return false;
        }
        match (place, relation) {
            (Place::Root, _) => !LEFT_OUT.contains(&name),
            (Place::Tablespace, _) => name == self.version_directory,
            (Place::Database, Some(relation)) => {
                let reset = unlogged.contains(&relation.number) && relation.fork != ForkNumber::Init;
                !relation.temporary && !reset
            }
            _ => true,
        }
    }

    fn entry(
        &mut self,
        entry: Entry,
        path: String,
        place: Place,
        relation: Option<RelationSegment>,
    ) -> Result<(), ScanError> {
        let mut about = entry.about;
        let own = place == Place::Root
            && (matches!(entry.name.as_str(), "base" | "global") || entry.name.starts_with("pg_"));
        if about.is_symlink() {
            let linked = std::fs::metadata(&entry.path);
            match (place, linked) {
                (Place::Tablespaces, linked) => {
                    let linked =
                        linked.map_err(|source| ScanError::Io { path: entry.path.clone(), source })?;
                    if let Ok(oid) = entry.name.parse() {
                        let target = std::fs::read_link(&entry.path);
                        let target =
                            target.map_err(|source| ScanError::Io { path: entry.path.clone(), source })?;
                        let target = target.into_os_string().into_string();
                        let target = target.map_err(|path| ScanError::Name { path: path.into() })?;
                        self.scan.tablespaces.push(Tablespace { oid, path: target });
                    }
                    about = linked;
                }
                // A directory of the server's own may lie on another disk; what other links lead to may be anything.
                (_, Ok(linked)) if linked.is_file() || (own && linked.is_dir()) => about = linked,
                _ => {
                    self.scan
                        .warnings
                        .push(format!("{path} is a link out of the data directory and is left out"));
                    return Ok(());
                }
            }
        } else if self.inside.contains(&entry.path) {
            return Ok(());
        }
        if about.is_dir() {
            self.scan.directories.push(ManifestDirectory { path: path.clone(), mode: about.mode() & 0o7777 });
            if place == Place::Root && EMPTIED.contains(&entry.name.as_str()) {
                self.emptied(&path, &about);
                return Ok(());
            }
            let below = match (place, entry.name.as_str()) {
                (Place::Root, "base") | (Place::Tablespace, _) => Place::Databases,
                (Place::Root, "global") => Place::Global,
                (Place::Root, "pg_tblspc") => Place::Tablespaces,
                (Place::Tablespaces, _) => Place::Tablespace,
                (Place::Databases, _) => Place::Database,
                _ => Place::Plain,
            };
            self.directory(&entry.path, &path, below)?;
        } else if about.is_file() {
            self.scan.files.push(SourceFile {
                path,
                source: entry.path,
                lies: Lies::Alone,
                bytes: about.len(),
                mode: about.mode() & 0o7777,
                modified: about.mtime(),
                relation,
            });
        } else {
            self.scan.warnings.push(format!("{path} is neither a file nor a directory and is left out"));
        }
        Ok(())
    }

    /// What the server expects to find in a directory that is emptied.
    fn emptied(&mut self, path: &str, about: &Metadata) {
        if path == "pg_wal" {
            let mut names = vec!["archive_status"];
            if self.major >= PgMajor::V17 {
                names.push("summaries");
            }
            for name in names {
                let path = format!("{path}/{name}");
                self.scan.directories.push(ManifestDirectory { path, mode: about.mode() & 0o7777 });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_the_server_makes_anew_is_left_out() {
        let scratch = tempfile::tempdir().unwrap();
        let data = scratch.path().join("data");
        let space = scratch.path().join("space");
        let wal = scratch.path().join("wal");
        let put = |path: &Path, text: &str| {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        for (path, text) in [
            ("PG_VERSION", "15\n"),
            ("postmaster.pid", "1"),
            ("postmaster.opts", "x"),
            ("backup_label.old", "x"),
            ("postgresql.auto.conf", ""),
            ("postgresql.auto.conf.tmp", "x"),
            ("global/pg_control", "c"),
            ("global/1260", "page"),
            ("global/pg_internal.init.17", "x"),
            ("base/pgsql_tmp/pgsql_tmp1.0", "x"),
            ("base/5/1259", "page"),
            ("base/5/1259_vm", "page"),
            ("base/5/t3_100", "x"),
            ("base/5/200", "x"),
            ("base/5/200.1", "x"),
            ("base/5/200_fsm", "x"),
            ("base/5/200_init", "init"),
            ("base/5/pg_internal.init", "x"),
            ("pg_replslot/slot/state", "x"),
            ("pg_subtrans/0000", "x"),
            ("pg_xact/0000", "commits"),
            ("log/postmaster.pid", "kept"),
            ("inside/PG_15_1/5/400", "page"),
        ] {
            put(&data.join(path), text);
        }
        put(&space.join("PG_15_1/5/300"), "page");
        put(&space.join("PG_15_1/pgsql_tmp/x"), "x");
        put(&space.join("PG_14_1/5/300"), "another server's");
        put(&wal.join("000000010000000000000001"), "x");
        fs::create_dir_all(data.join("pg_tblspc")).unwrap();
        fs::create_dir_all(data.join("pg_commit_ts")).unwrap();
        symlink(&space, data.join("pg_tblspc/16400")).unwrap();
        symlink(data.join("inside"), data.join("pg_tblspc/16401")).unwrap();
        symlink(&wal, data.join("pg_wal")).unwrap();
        symlink(&space, data.join("elsewhere")).unwrap();
        symlink(scratch.path().join("nowhere"), data.join("dangling")).unwrap();
        put(&scratch.path().join("server.key"), "key");
        symlink(scratch.path().join("server.key"), data.join("server.key")).unwrap();

        let found = scan(&data, PgMajor::V15, "PG_15_1").unwrap();
        let files: Vec<_> = found.files.iter().map(|f| f.path.as_str()).collect();
        let expected = [
            "PG_VERSION",
            "base/5/1259",
            "base/5/1259_vm",
            "base/5/200_init",
            "global/1260",
            "global/pg_control",
            "log/postmaster.pid",
            "pg_tblspc/16400/PG_15_1/5/300",
            "pg_tblspc/16401/PG_15_1/5/400",
            "pg_xact/0000",
            "postgresql.auto.conf",
            "server.key",
        ];
        assert_eq!(files, expected);
        let directories: Vec<_> = found.directories.iter().map(|d| d.path.as_str()).collect();
        let expected = [
            "base",
            "base/5",
            "global",
            "log",
            "pg_commit_ts",
            "pg_replslot",
            "pg_subtrans",
            "pg_tblspc",
            "pg_tblspc/16400",
            "pg_tblspc/16400/PG_15_1",
            "pg_tblspc/16400/PG_15_1/5",
            "pg_tblspc/16401",
            "pg_tblspc/16401/PG_15_1",
            "pg_tblspc/16401/PG_15_1/5",
            "pg_wal",
            "pg_wal/archive_status",
            "pg_xact",
        ];
        assert_eq!(directories, expected);
        let spaces: Vec<_> = found.tablespaces.iter().map(|t| (t.oid, t.path.as_str())).collect();
        let inside = data.join("inside");
        assert_eq!(spaces, [(16400, space.to_str().unwrap()), (16401, inside.to_str().unwrap())]);
        let warnings = [
            "dangling is a link out of the data directory and is left out",
            "elsewhere is a link out of the data directory and is left out",
        ];
        assert_eq!(found.warnings, warnings);
        let newer = scan(&data, PgMajor::V17, "PG_15_1").unwrap();
        assert!(newer.directories.iter().any(|d| d.path == "pg_wal/summaries"));
    }

    #[test]
    fn a_tablespace_that_is_not_there_is_an_error() {
        let scratch = tempfile::tempdir().unwrap();
        fs::create_dir(scratch.path().join("pg_tblspc")).unwrap();
        symlink("/nonexistent", scratch.path().join("pg_tblspc/16400")).unwrap();
        let message = scan(scratch.path(), PgMajor::V15, "PG_15_1").unwrap_err().to_string();
        let link = fs::canonicalize(scratch.path()).unwrap().join("pg_tblspc/16400");
        assert_eq!(message, format!("cannot read {}", link.display()));
    }
}
