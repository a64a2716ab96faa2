//! Where a restore writes to: what lies there, whose it is to be, whether there is room.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use serde::Serialize;
use waltide_format::Oid;
use waltide_format::archive::{Manifest, Tablespace};
use waltide_storage::real_path;

use super::MARKER;

/// A user and a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Owner {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

impl Owner {
    /// Reads `user`, `uid` or `uid:gid`; names as /etc/passwd has them.
    pub fn parse(text: &str) -> Option<Self> {
        if let Some((uid, gid)) = text.split_once(':') {
            return Some(Self { uid: uid.parse().ok()?, gid: gid.parse().ok()? });
        }
        let passwd = fs::read_to_string("/etc/passwd").ok()?;
        Self::in_passwd(&passwd, text).map(|(owner, _)| owner)
    }

    /// The user's name, where /etc/passwd has it.
    pub(crate) fn name(self) -> Option<String> {
        let passwd = fs::read_to_string("/etc/passwd").ok()?;
        let line = passwd.lines().find(|l| l.split(':').nth(2) == Some(&self.uid.to_string()))?;
        line.split(':').next().map(str::to_owned)
    }

    fn in_passwd(passwd: &str, user: &str) -> Option<(Self, String)> {
        let mut lines = passwd.lines().map(|l| l.split(':').collect::<Vec<_>>());
        let line = lines.find(|l| l.first() == Some(&user) || l.get(2) == Some(&user))?;
        let owner = Self { uid: line.get(2)?.parse().ok()?, gid: line.get(3)?.parse().ok()? };
        Some((owner, (*line.first()?).to_owned()))
    }
}

/// A tablespace and where it goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Placed {
    /// The tablespace.
    pub oid: Oid,
    /// Where it lay.
    pub from: String,
    /// Where it goes.
    pub to: PathBuf,
}

/// Something that will be deleted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Deletion {
    /// The file, or the directory with all that is in it.
    pub path: PathBuf,
    /// How many files that is.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Why nothing can be written to the place.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// A server runs on the data directory.
    #[error("a server is running on {} (process {pid})\nhint: stop it first; nothing was touched", path.display())]
    Running {
        /// The data directory.
        path: PathBuf,
        /// The server.
        pid: i32,
    },
    /// Something is there.
    #[error(
        "{} is not empty: {}\nhint: --allow-clear (or BACKUP_ALLOW_CLEAR=true) deletes what is there, and shows with --dry-run what that is; nothing was touched",
        path.display(), found.join(", ")
    )]
    NotEmpty {
        /// The directory.
        path: PathBuf,
        /// Some of its entries.
        found: Vec<String>,
    },
    /// The place is no directory.
    #[error("{} is not a directory", path.display())]
    NotADirectory {
        /// The place.
        path: PathBuf,
    },
    /// The place is a link, and what it leads to is not there.
    #[error("{} is a link to what is not there\nhint: mount what it leads to, or remove the link; nothing was touched", path.display())]
    Dangling {
        /// The place.
        path: PathBuf,
    },
    /// The place holds the archive, or lies in it.
    #[error(
        "{} and the archive at {} lie one in the other, and a restore clears its place\nhint: restore elsewhere (--data-dir, --tablespace-map); nothing was touched",
        path.display(), archive.display()
    )]
    Archive {
        /// The place.
        path: PathBuf,
        /// The archive.
        archive: PathBuf,
    },
    /// A tablespace's place cannot be one.
    #[error("tablespace {oid} cannot be put at {}: {why}", path.display())]
    Tablespace {
        /// The tablespace.
        oid: Oid,
        /// The place.
        path: PathBuf,
        /// Why not.
        why: &'static str,
    },
    /// A mapping names no tablespace.
    #[error("no tablespace of the backup lies at {from}; they lie at {known}")]
    NoSuchTablespace {
        /// The mapping's left side.
        from: String,
        /// Where they lie.
        known: String,
    },
    /// Root restores, and nobody says whose the files are to be.
    #[error("{} would belong to root, and PostgreSQL refuses to run as root\nhint: say --owner USER", path.display())]
    NoOwner {
        /// The data directory.
        path: PathBuf,
    },
    /// Another user's directory.
    #[error("{} belongs to user {found}, and this process is user {ours}\nhint: restore as that user or as root", path.display())]
    NotOurs {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        found: u32,
        /// Who we are.
        ours: u32,
    },
    /// There is too little room.
    #[error("{} has room for {free} bytes, {needed} are needed\nhint: make room, or restore elsewhere (--data-dir, --tablespace-map); nothing was touched", path.display())]
    NoRoom {
        /// The directory.
        path: PathBuf,
        /// What is free.
        free: u64,
        /// What is needed.
        needed: u64,
    },
    /// The operating system does not let us.
    #[error("cannot use {}", path.display())]
    Io {
        /// The place.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

pub(super) fn io_at(path: &Path) -> impl FnOnce(io::Error) -> PlaceError + '_ {
    |source| PlaceError::Io { path: path.to_owned(), source }
}

/// Where each tablespace goes. A mapping's left side is the old path or the OID. Those that recovery makes go where the
/// WAL says: someone else's files there are as much in the way as anywhere.
pub(super) fn map_tablespaces(
    tablespaces: &[Tablespace],
    made: &[Tablespace],
    map: &[(String, PathBuf)],
    data_dir: &Path,
) -> Result<Vec<Placed>, PlaceError> {
    let means = |t: &Tablespace, from: &str| t.path == from || t.oid.to_string() == from;
    if let Some((from, _)) = map.iter().find(|(from, _)| !tablespaces.iter().any(|t| means(t, from))) {
        if let Some(t) = made.iter().find(|t| means(t, from)) {
            return Err(made_there(t));
        }
        let known: Vec<_> = tablespaces.iter().map(|t| t.path.as_str()).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        return Err(PlaceError::NoSuchTablespace { from: from.clone(), known });
    }
    let mut placed: Vec<Placed> = Vec::new();
    let moved = tablespaces.iter().map(|t| (t, map.iter().rev().find(|(from, _)| means(t, from))));
    for (tablespace, mapped) in moved.chain(made.iter().map(|t| (t, None))) {
        let to = mapped.map_or_else(|| PathBuf::from(&tablespace.path), |(_, to)| to.clone());
        if placed.iter().any(|p| p.oid == tablespace.oid && p.to != to) {
            return Err(made_there(tablespace));
        }
        // Made while the backup ran, or dropped and made again: one place all the same.
        if placed.iter().any(|p| p.from == tablespace.path && p.to == to) {
            continue;
        }
        let refuse = |why| Err(PlaceError::Tablespace { oid: tablespace.oid, path: to.clone(), why });
        let plain = to.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
        if !to.is_absolute() || !plain || to.parent().is_none() {
            return refuse("an absolute path below / is needed");
        }
        if to.starts_with(data_dir) || data_dir.starts_with(&to) {
            return refuse("it lies in the data directory, or around it");
        }
        if placed.iter().any(|p| p.to.starts_with(&to) || to.starts_with(&p.to)) {
            return refuse("another tablespace goes there too");
        }
        placed.push(Placed { oid: tablespace.oid, from: tablespace.path.clone(), to });
    }
    Ok(placed)
}

fn made_there(t: &Tablespace) -> PlaceError {
    let why = "the WAL makes it where it lay, and replay follows no mapping; a later backup can be moved";
    PlaceError::Tablespace { oid: t.oid, path: PathBuf::from(&t.path), why }
}

/// The server that runs on a data directory, if one does. A postmaster.pid that was left behind names a process
/// that is gone, or one that works elsewhere.
pub(super) fn running_server(data_dir: &Path) -> Result<Option<i32>, PlaceError> {
    let path = data_dir.join("postmaster.pid");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(e) => return Err(io_at(&path)(e)),
    };
    let pid = text.lines().next().and_then(|l| l.trim().parse::<i32>().ok()).map(i32::saturating_abs);
    let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) else { return Ok(None) };
    if rustix::process::test_kill_process(pid) == Err(rustix::io::Errno::SRCH) {
        return Ok(None);
    }
    let number = pid.as_raw_nonzero().get();
    let elsewhere = match (fs::read_link(format!("/proc/{number}/cwd")), fs::canonicalize(data_dir)) {
        (Ok(cwd), Ok(here)) => cwd != here,
        _ => false,
    };
    Ok((!elsewhere).then_some(number))
}

/// What is in a directory, with all that is below each entry; links are not followed.
pub(super) fn contents(dir: &Path) -> Result<Vec<Deletion>, PlaceError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound && dir.is_symlink() => {
            return Err(PlaceError::Dangling { path: dir.to_owned() });
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
            return Err(PlaceError::NotADirectory { path: dir.to_owned() });
        }
        Err(e) => return Err(io_at(dir)(e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(io_at(dir))?.path();
        let (files, bytes) = measure(&path)?;
        found.push(Deletion { path, files, bytes });
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// What a directory holds that the backup does not, and every file of pg_wal. Links at the top are followed only for
/// pg_wal and the tablespaces.
pub(super) fn strangers(
    manifest: &Manifest,
    data_dir: &Path,
    tablespaces: &[Placed],
) -> Result<Vec<Deletion>, PlaceError> {
    let mut known: BTreeSet<String> = manifest.files.iter().map(|f| f.path.clone()).collect();
    known.extend(manifest.directories.iter().map(|d| d.path.clone()));
    known.extend(tablespaces.iter().map(|t| format!("pg_tblspc/{}", t.oid)));
    known.retain(|path| !path.starts_with("pg_wal/"));
    known.extend(["pg_tblspc", "pg_wal", "pg_wal/archive_status", "global", MARKER].map(str::to_owned));
    let mut left = vec![(data_dir.to_owned(), String::new())];
    for t in tablespaces {
        // Beside the directories of this version, others may lie there.
        let link = format!("pg_tblspc/{}/", t.oid);
        let below = manifest.directories.iter().filter_map(|d| d.path.strip_prefix(&link)?.split('/').next());
        let below: BTreeSet<_> = below.collect();
        left.extend(below.into_iter().map(|name| (t.to.join(name), format!("{link}{name}/"))));
    }
    let mut found = Vec::new();
    while let Some((dir, prefix)) = left.pop() {
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(io_at(&dir)(e)),
        };
        for entry in entries {
            let entry = entry.map_err(io_at(&dir))?;
            let path = entry.path();
            let name = entry.file_name().to_str().map(|n| format!("{prefix}{n}"));
            let about = fs::symlink_metadata(&path).map_err(io_at(&path))?;
            match name.filter(|n| known.contains(n)) {
                None => {
                    let (files, bytes) = measure(&path)?;
                    found.push(Deletion { path, files, bytes });
                }
                Some(name) if about.is_dir() || name == "pg_wal" => left.push((path, format!("{name}/"))),
                Some(_) => {}
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

fn measure(path: &Path) -> Result<(u64, u64), PlaceError> {
    let (mut files, mut bytes) = (0u64, 0u64);
    let mut left = vec![path.to_owned()];
    while let Some(path) = left.pop() {
        let about = fs::symlink_metadata(&path).map_err(io_at(&path))?;
        if about.is_dir() {
            for entry in fs::read_dir(&path).map_err(io_at(&path))? {
                left.push(entry.map_err(io_at(&path))?.path());
            }
        } else {
            files = files.saturating_add(1);
            bytes = bytes.saturating_add(about.blocks().saturating_mul(512));
        }
    }
    Ok((files, bytes))
}

/// Whose the files are to be: none where they become ours by themselves.
pub(super) fn owner(data_dir: &Path, named: Option<Owner>) -> Result<Option<Owner>, PlaceError> {
    let ours = rustix::process::geteuid().as_raw();
    let existing = nearest(data_dir);
    let about = fs::metadata(&existing).map_err(io_at(&existing))?;
    if ours != 0 {
        if existing == data_dir && about.uid() != ours {
            return Err(PlaceError::NotOurs { path: existing, found: about.uid(), ours });
        }
        return match named {
            Some(owner) if owner.uid != ours => {
                Err(PlaceError::NotOurs { path: data_dir.to_owned(), found: owner.uid, ours })
            }
            _ => Ok(None),
        };
    }
    let here = Owner { uid: about.uid(), gid: about.gid() };
    let found = named.or((here.uid != 0).then_some(here)).or_else(|| Owner::parse("postgres"));
    let found = found.filter(|o| o.uid != 0);
    found.map(Some).ok_or_else(|| PlaceError::NoOwner { path: data_dir.to_owned() })
}

/// The directory itself, or the nearest one above that exists.
pub(super) fn nearest(path: &Path) -> PathBuf {
    path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/")).to_owned()
}

/// Refuses a place that has the archive in it, or lies in the archive itself.
pub(super) fn apart_from(archive: &Path, places: &[&Path]) -> Result<(), PlaceError> {
    let real = |path: &Path| real_path(path).map_err(io_at(path));
    let archive = real(archive)?;
    for path in places {
        let place = real(path)?;
        if archive.starts_with(&place) || place.starts_with(&archive) {
            return Err(PlaceError::Archive { path: path.to_path_buf(), archive });
        }
    }
    Ok(())
}

/// Whether we may make entries there.
pub(super) fn check_writable(path: &Path) -> Result<(), PlaceError> {
    let dir = nearest(path);
    if !dir.is_dir() {
        return Err(PlaceError::NotADirectory { path: dir });
    }
    let wanted = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    rustix::fs::access(&dir, wanted).map_err(|e| io_at(&dir)(e.into()))
}

/// Whether `needed` bytes go onto the file system of each place, those that will be deleted counted as free.
pub(super) fn check_room(places: &[(PathBuf, u64, u64)]) -> Result<(), PlaceError> {
    let mut by_device: Vec<(u64, PathBuf, u64, u64)> = Vec::new();
    for (path, needed, freed) in places {
        let dir = nearest(path);
        let device = fs::metadata(&dir).map_err(io_at(&dir))?.dev();
        match by_device.iter_mut().find(|(d, ..)| *d == device) {
            Some((_, _, n, f)) => (*n, *f) = (n.saturating_add(*needed), f.saturating_add(*freed)),
            None => by_device.push((device, path.clone(), *needed, *freed)),
        }
    }
    for (_, path, needed, freed) in by_device {
        let dir = nearest(&path);
        let found = rustix::fs::statvfs(&dir).map_err(|e| io_at(&dir)(e.into()))?;
        let free = found.f_bavail.saturating_mul(found.f_frsize).saturating_add(freed);
        if free < needed {
            return Err(PlaceError::NoRoom { path, free, needed });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spaces() -> Vec<Tablespace> {
        vec![Tablespace { oid: 16400, path: "/ts/a".into() }, Tablespace { oid: 16401, path: "/ts/b".into() }]
    }

    fn mapped(map: &[(&str, &str)]) -> Result<Vec<PathBuf>, String> {
        let map: Vec<_> = map.iter().map(|(a, b)| ((*a).to_owned(), PathBuf::from(b))).collect();
        let placed = map_tablespaces(&spaces(), &[], &map, Path::new("/data"));
        placed.map(|p| p.into_iter().map(|p| p.to).collect()).map_err(|e| e.to_string())
    }

    #[test]
    fn a_tablespace_goes_where_it_is_mapped_or_where_it_was() {
        assert_eq!(
            mapped(&[("/ts/a", "/new/a"), ("16401", "/new/b")]).unwrap(),
            [Path::new("/new/a"), Path::new("/new/b")]
        );
        assert_eq!(mapped(&[]).unwrap(), [Path::new("/ts/a"), Path::new("/ts/b")]);
        assert_eq!(
            mapped(&[("/ts/c", "/x")]).unwrap_err(),
            "no tablespace of the backup lies at /ts/c; they lie at /ts/a, /ts/b"
        );
        for (to, why) in [
            ("/data/x", "it lies in the data directory, or around it"),
            ("/ts", "another tablespace goes there too"),
            ("rel", "an absolute path below / is needed"),
            ("/x/../data", "an absolute path below / is needed"),
            ("/", "an absolute path below / is needed"),
        ] {
            let err = mapped(&[("16401", to)]).unwrap_err();
            assert_eq!(err, format!("tablespace 16401 cannot be put at {to}: {why}"));
        }
    }

    #[test]
    fn a_link_to_what_is_not_there_is_no_empty_place() {
        let scratch = tempfile::tempdir().unwrap();
        let (link, disk) = (scratch.path().join("data"), scratch.path().join("disk"));
        std::os::unix::fs::symlink(&disk, &link).unwrap();
        let err = contents(&link).unwrap_err().to_string();
        assert!(err.starts_with(&format!("{} is a link to what is not there\n", link.display())), "{err}");
        fs::create_dir(&disk).unwrap();
        assert_eq!(contents(&link).unwrap(), []);
        assert_eq!(contents(&scratch.path().join("nothing")).unwrap(), []);
    }

    #[test]
    fn no_place_holds_the_archive_or_lies_in_it() {
        let scratch = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(scratch.path()).unwrap();
        fs::create_dir_all(root.join("site/archive/main")).unwrap();
        std::os::unix::fs::symlink(root.join("site"), root.join("link")).unwrap();
        let archive = root.join("site/archive");
        for near in
            ["site", "site/archive", "site/archive/new/x", "link", "link/archive/new", "site/new/../archive"]
        {
            let near = root.join(near);
            let err = apart_from(&archive, &[&root.join("elsewhere"), &near]).unwrap_err().to_string();
            let want =
                format!("{} and the archive at {} lie one in the other", near.display(), archive.display());
            assert!(err.starts_with(&want), "{err}");
        }
        for apart in ["site/archive2", "site/data", "archive", "link/data/x"] {
            apart_from(&archive, &[&root.join(apart)]).unwrap();
        }
    }

    #[test]
    fn a_tablespace_that_the_wal_makes_goes_where_the_wal_says_and_is_not_moved() {
        let made = |oid, path: &str| [Tablespace { oid, path: path.into() }];
        let place = |made: &[Tablespace], map: &[(&str, &str)]| {
            let map: Vec<_> = map.iter().map(|(a, b)| ((*a).to_owned(), PathBuf::from(b))).collect();
            let placed = map_tablespaces(&spaces(), made, &map, Path::new("/data"));
            placed
                .map(|p| p.into_iter().map(|p| p.to.display().to_string()).collect::<Vec<_>>().join(" "))
                .map_err(|e| e.to_string())
        };
        assert_eq!(place(&made(16500, "/ts/c"), &[]).unwrap(), "/ts/a /ts/b /ts/c");
        assert_eq!(place(&made(16401, "/ts/b"), &[]).unwrap(), "/ts/a /ts/b", "made while the backup ran");
        assert_eq!(place(&made(16500, "/ts/b"), &[]).unwrap(), "/ts/a /ts/b", "dropped and made again");
        assert_eq!(place(&made(16500, "/ts/b"), &[("/ts/b", "/x")]).unwrap(), "/ts/a /x /ts/b");
        for (made, map) in [(made(16500, "/ts/c"), ("/ts/c", "/x")), (made(16401, "/ts/b"), ("/ts/b", "/x"))]
        {
            let error = place(&made, &[map]).unwrap_err();
            assert!(error.contains("replay follows no mapping"), "{error}");
        }
    }

    #[test]
    fn a_pid_file_counts_only_while_its_process_works_there() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(running_server(dir.path()).unwrap(), None);
        let sleeper =
            |at: &Path| std::process::Command::new("sleep").arg("100").current_dir(at).spawn().unwrap();
        for (at, runs) in [(dir.path(), true), (Path::new("/"), false)] {
            let mut child = sleeper(at);
            fs::write(dir.path().join("postmaster.pid"), format!("{}\n/x\n", child.id())).unwrap();
            assert_eq!(running_server(dir.path()).unwrap().is_some(), runs, "{at:?}");
            child.kill().unwrap();
            child.wait().unwrap();
            assert_eq!(running_server(dir.path()).unwrap(), None);
        }
    }

    #[test]
    fn users_are_named_as_passwd_has_them() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\npostgres:x:107:115::/var/lib/postgresql:/bin/bash\n";
        let (owner, name) = Owner::in_passwd(passwd, "postgres").unwrap();
        assert_eq!((owner, name.as_str()), (Owner { uid: 107, gid: 115 }, "postgres"));
        assert_eq!(Owner::in_passwd(passwd, "107").unwrap().1, "postgres");
        assert_eq!(Owner::parse("7:8"), Some(Owner { uid: 7, gid: 8 }));
        assert_eq!(Owner::parse("7:x"), None);
    }
}
