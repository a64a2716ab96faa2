//! Takes a PostgreSQL cluster into an archive: its system, and the settings that make it archive.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use serde::Serialize;
use tokio_postgres::Client;
use waltide_format::archive::{Layout, SystemInfo};
use waltide_format::engines::postgres::cluster::ControlFile;
use waltide_format::{BLOCK_BYTES, PgMajor, SegmentSize, SystemId, TimestampTz};
use waltide_storage::{Archive, ArchiveUrl, Put, StorageError, real_path};

use super::connect::{ConnectError, ConnectRequest, connect};
use super::control::{ControlFileError, read_control, read_version};
use super::postmaster::Postmaster;
use super::settings::{ArchiveSettings, conf_string, sql_string};
use crate::init::{
    self, InitError as ArchiveError, Made, create_json, make_archive, make_cluster, read_json,
};

/// What `cluster.json` calls this engine.
pub const ENGINE: &str = "postgres";

/// What to take into which archive.
#[derive(Debug, Clone)]
pub struct InitRequest {
    /// The archive, which may not be there yet.
    pub url: ArchiveUrl,
    /// The cluster in it.
    pub layout: Layout,
    /// The data directory; its server may run or not.
    pub data_dir: PathBuf,
    /// Whether the cluster may get another system identifier: pg_upgrade gives it a new one.
    pub upgrade: bool,
    /// Now, by the caller's clock.
    pub now: TimestampTz,
}

/// What was made, and of which database.
#[derive(Debug, Clone, Serialize)]
pub struct Initialised {
    /// The archive's address.
    pub archive: String,
    /// The cluster in it.
    pub cluster: String,
    /// The database.
    pub system_id: SystemId,
    /// Its major version.
    pub major: PgMajor,
    /// `wal_segment_size`.
    pub segment_size: SegmentSize,
    /// Whether its pages carry checksums.
    pub data_checksums: bool,
    /// waltide.json.
    pub archive_json: Made,
    /// cluster.json.
    pub cluster_json: Made,
    /// system.json.
    pub system_json: Made,
}

/// Why a cluster was not taken in.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InitError {
    /// The data directory says nothing about itself.
    #[error(transparent)]
    DataDir(#[from] ControlFileError),
    /// Two files of the data directory disagree.
    #[error("PG_VERSION says {version}, global/pg_control is of PostgreSQL {control}: {} is no whole data directory", data_dir.display())]
    Disagree {
        /// The data directory.
        data_dir: PathBuf,
        /// What PG_VERSION says.
        version: PgMajor,
        /// Which version wrote pg_control.
        control: PgMajor,
    },
    /// The server was built with another page size.
    #[error("{} has pages of {found} bytes; waltide reads those of 8192 bytes, PostgreSQL's default", data_dir.display())]
    BlockSize {
        /// The data directory.
        data_dir: PathBuf,
        /// Its block size, of data or of WAL.
        found: u32,
    },
    /// The cluster's name belongs to another database.
    #[error(
        "{cluster} in {archive} is another database: it has system identifier {known}, this one {found}\nhint: give this \
         one its own --cluster. If pg_upgrade made it out of that one, say --upgrade."
    )]
    OtherSystem {
        /// The cluster.
        cluster: String,
        /// The archive's address.
        archive: String,
        /// The system identifiers it has had.
        known: String,
        /// The data directory's.
        found: SystemId,
    },
    /// The archive would go with the database that it is there for.
    #[error(
        "{archive} lies in the data directory: it would be lost with it, deleted by a restore, and be a part of every \
         backup\nhint: put the archive elsewhere, best on another machine's disks."
    )]
    InDataDir {
        /// The archive's address.
        archive: String,
    },
    /// The archive knows the system with other properties.
    #[error(
        "{path} says {field} {stored}, the data directory has {found}\nhint: pg_resetwal may have changed it; give the \
         cluster as it is now its own --cluster."
    )]
    Changed {
        /// system.json.
        path: String,
        /// Which property.
        field: &'static str,
        /// What is stored.
        stored: u64,
        /// What was found.
        found: u64,
    },
    /// The archive or the cluster in it.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
}

impl From<StorageError> for InitError {
    fn from(e: StorageError) -> Self {
        Self::Archive(e.into())
    }
}

/// Makes what is missing of waltide.json, cluster.json and system.json. Nothing is made before the data directory has
/// been read; doing it again changes nothing.
pub async fn init(request: &InitRequest) -> Result<(Archive, Initialised), InitError> {
    let InitRequest { url, layout, data_dir, upgrade, now } = request;
    let control = check_data_dir(data_dir)?;
    let info = SystemInfo {
        system_id: control.system_id,
        major: control.major,
        block_bytes: control.block_bytes,
        segment_size: control.segment_size,
        created: *now,
    };
    if url.local_path().is_some_and(|archive| lies_in(archive, data_dir)) {
        return Err(InitError::InDataDir { archive: url.to_string() });
    }
    let (archive, archive_json) = make_archive(url, *now).await?;
    let known = init::systems(&archive, layout).await?;
    if !known.is_empty() && !known.contains(&info.system_id) && !upgrade {
        let known: Vec<String> = known.iter().map(ToString::to_string).collect();
        return Err(InitError::OtherSystem {
            cluster: layout.cluster().to_owned(),
            archive: archive.url().to_owned(),
            known: known.join(", "),
            found: info.system_id,
        });
    }
    let cluster_json = make_cluster(&archive, layout, ENGINE, *now).await?;
    let system_json = make_system(&archive, layout, &info).await?;
    let made = Initialised {
        archive: archive.url().to_owned(),
        cluster: layout.cluster().to_owned(),
        system_id: info.system_id,
        major: info.major,
        segment_size: info.segment_size,
        data_checksums: control.data_checksum_version != 0,
        archive_json,
        cluster_json,
        system_json,
    };
    Ok((archive, made))
}

/// Whether a path, which may not be there yet, leads into a directory.
fn lies_in(path: &Path, dir: &Path) -> bool {
    real_path(path).is_ok_and(|path| real_path(dir).is_ok_and(|dir| path.starts_with(dir)))
}

fn check_data_dir(data_dir: &Path) -> Result<ControlFile, InitError> {
    let version = read_version(data_dir)?;
    let control = read_control(data_dir)?;
    let data_dir = data_dir.to_owned();
    if control.major != version {
        return Err(InitError::Disagree { data_dir, version, control: control.major });
    }
    let other =
        [control.block_bytes, control.wal_block_bytes].into_iter().find(|b| *b as usize != BLOCK_BYTES);
    match other {
        Some(found) => Err(InitError::BlockSize { data_dir, found }),
        None => Ok(control),
    }
}

async fn make_system(archive: &Archive, layout: &Layout, info: &SystemInfo) -> Result<Made, InitError> {
    let path = layout.system(info.system_id).system_json();
    if create_json(archive, &path, info).await? == Put::Created {
        return Ok(Made::Created);
    }
    let Some(stored) = read_json::<SystemInfo>(archive, &path).await? else { return Ok(Made::Existing) };
    let fields = [
        ("major version", u64::from(stored.major.get()), u64::from(info.major.get())),
        ("block size", u64::from(stored.block_bytes), u64::from(info.block_bytes)),
        ("wal_segment_size", stored.segment_size.bytes(), info.segment_size.bytes()),
    ];
    match fields.into_iter().find(|(_, stored, found)| stored != found) {
        Some((field, stored, found)) => Err(InitError::Changed { path, field, stored, found }),
        None => Ok(Made::Existing),
    }
}

/// Settings that were set, and what is still to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Applied {
    /// Name and value of each setting that was changed.
    pub changed: Vec<(String, String)>,
    /// Those that take effect only once the server has been restarted.
    pub restart_needed_for: Vec<String>,
    /// Where they were written: `ALTER SYSTEM`, or the file.
    pub written_to: String,
}

/// Why settings were not set.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// The server runs and cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The server refused.
    #[error("the server does not take {setting}")]
    Server {
        /// What was tried.
        setting: String,
        /// What it said.
        source: tokio_postgres::Error,
    },
    /// postgresql.auto.conf could not be written.
    #[error("{} cannot be written", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

/// Sets what is not set yet: through a connection where the server runs or `connection` says where it is, else in its
/// files.
pub async fn apply(
    data_dir: &Path,
    connection: Option<&str>,
    wanted: &ArchiveSettings,
) -> Result<Applied, ApplyError> {
    if connection.is_none() && !is_running(data_dir) {
        return apply_to_files(data_dir, wanted);
    }
    let connection = connection.map(str::to_owned);
    let request = ConnectRequest { connection, data_dir: Some(data_dir.to_owned()) };
    apply_to_server(&connect(&request).await?, wanted).await
}

/// Whether a server runs on the data directory.
pub(crate) fn is_running(data_dir: &Path) -> bool {
    let pid =
        Postmaster::read(data_dir).ok().flatten().and_then(|p| i32::try_from(p.pid.unsigned_abs()).ok());
    match pid.and_then(Pid::from_raw).map(test_kill_process) {
        // One that belongs to another user answers, too.
        Some(Ok(()) | Err(Errno::PERM)) => true,
        Some(Err(_)) | None => false,
    }
}

/// Sets what is not set yet with `ALTER SYSTEM`, and makes the server read it.
pub async fn apply_to_server(client: &Client, wanted: &ArchiveSettings) -> Result<Applied, ApplyError> {
    let failed = |setting: &str| {
        let setting = setting.to_owned();
        move |source| ApplyError::Server { setting, source }
    };
    let mut changed = Vec::new();
    for (name, value) in wanted.needed() {
        let row = client.query_one("select current_setting($1)", &[&name]).await.map_err(failed(name))?;
        let current: String = row.get(0);
        if ArchiveSettings::suffices(name, &current, value) {
            continue;
        }
        let statement = format!("alter system set {name} = {}", sql_string(value));
        client.batch_execute(&statement).await.map_err(failed(name))?;
        changed.push((name.to_owned(), value.to_owned()));
    }
    let what = "pg_reload_conf()";
    client.execute("select pg_reload_conf()", &[]).await.map_err(failed(what))?;
    // archive_mode and wal_level are fixed when the server starts. pending_restart is known only once the postmaster
    // has read the file, so the context says it.
    let restart = "select name from pg_settings where context = 'postmaster' and name = any($1)";
    let names: Vec<&str> = changed.iter().map(|(name, _)| name.as_str()).collect();
    let rows = client.query(restart, &[&names]).await.map_err(failed("pg_settings"))?;
    let restart_needed_for = rows.iter().map(|row| row.get(0)).collect();
    Ok(Applied { changed, restart_needed_for, written_to: "ALTER SYSTEM".to_owned() })
}

/// Writes the settings into postgresql.auto.conf of a server that does not run, which is what `ALTER SYSTEM` does.
pub fn apply_to_files(data_dir: &Path, wanted: &ArchiveSettings) -> Result<Applied, ApplyError> {
    let path = data_dir.join("postgresql.auto.conf");
    let failed = |source| ApplyError::Write { path: path.clone(), source };
    let old = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(failed(e)),
    };
    // More than is needed is somebody's wish: wal_level logical, archive_mode always.
    let conf = fs::read_to_string(data_dir.join("postgresql.conf")).unwrap_or_default();
    let is_more = |name: &str, value: &str| {
        let current = set_value(&old, name).or_else(|| set_value(&conf, name));
        current.is_some_and(|current| current != value && ArchiveSettings::suffices(name, current, value))
    };
    let needed: Vec<_> = wanted.needed().filter(|(name, value)| !is_more(name, value)).collect();
    let named = |line: &str| needed.iter().any(|(name, _)| setting_name(line) == Some(name));
    let mut text: String = old.lines().filter(|line| !named(line)).flat_map(|line| [line, "\n"]).collect();
    for (name, value) in &needed {
        text.push_str(&format!("{name} = {}\n", conf_string(value)));
    }
    let changed: Vec<(String, String)> = needed
        .iter()
        .filter(|(name, value)| !old.lines().any(|line| line == format!("{name} = {}", conf_string(value))))
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    if !changed.is_empty() {
        replace(&path, &text, data_dir).map_err(failed)?;
    }
    Ok(Applied { changed, restart_needed_for: Vec::new(), written_to: path.display().to_string() })
}

/// The name that a line of postgresql.conf sets.
fn setting_name(line: &str) -> Option<&str> {
    let name = line.trim_start().split(|c: char| c == '=' || c.is_whitespace()).next()?;
    (!name.is_empty() && !name.starts_with('#')).then_some(name)
}

/// The value that the last line for a setting gives it, of those that are a plain word.
fn set_value<'a>(conf: &'a str, name: &str) -> Option<&'a str> {
    let line = conf.lines().rev().find(|line| setting_name(line) == Some(name))?;
    let value = line.trim_start().strip_prefix(name)?.trim_start_matches([' ', '\t', '=']);
    let value = value.split([' ', '\t', '#']).next()?;
    Some(value.trim_matches('\''))
}

/// Replaces a file of the data directory at once; the new one belongs to whoever owns the directory.
fn replace(path: &Path, text: &str, data_dir: &Path) -> io::Result<()> {
    let staged = path.with_extension("conf.waltide");
    let mut file = fs::File::create(&staged)?;
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    let owner = fs::metadata(data_dir)?;
    let ours = file.metadata()?;
    if (owner.uid(), owner.gid()) != (ours.uid(), ours.gid()) {
        chown(&staged, Some(owner.uid()), Some(owner.gid()))?;
    }
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&staged, path)?;
    fs::File::open(data_dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_written_once_and_others_are_kept() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path();
        let file = dir.join("postgresql.auto.conf");
        fs::write(&file, "# Do not edit\nwork_mem = '8MB'\narchive_mode = 'off'\n  archive_mode='on'\n")
            .unwrap();
        let url = "/it's/here".parse().unwrap();
        let wanted = ArchiveSettings::new(Path::new("/usr/bin/waltide"), &url, "main", None).unwrap();
        let applied = apply_to_files(dir, &wanted).unwrap();
        let names: Vec<_> = applied.changed.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["wal_level", "archive_mode", "archive_command"]);
        let text = fs::read_to_string(&file).unwrap();
        assert_eq!(
            text,
            "# Do not edit\nwork_mem = '8MB'\nwal_level = 'replica'\narchive_mode = 'on'\narchive_command = \
             '/usr/bin/waltide --archive ''/it''\\\\''''s/here'' --cluster main push %p'\n"
        );
        let again = apply_to_files(dir, &wanted).unwrap();
        assert_eq!(again.changed, []);
        assert_eq!(fs::read_to_string(&file).unwrap(), text);
    }

    #[test]
    fn what_is_more_than_needed_stays() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path();
        let file = dir.join("postgresql.auto.conf");
        fs::write(
            dir.join("postgresql.conf"),
            "wal_level = minimal\nwal_level=logical # slots\n#wal_level = minimal\n",
        )
        .unwrap();
        fs::write(&file, "archive_mode = 'always'\n").unwrap();
        let wanted = ArchiveSettings::new(Path::new("/w"), &"/a".parse().unwrap(), "main", None).unwrap();
        let applied = apply_to_files(dir, &wanted).unwrap();
        let names: Vec<_> = applied.changed.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["archive_command"]);
        let text = fs::read_to_string(&file).unwrap();
        assert_eq!(
            text,
            "archive_mode = 'always'\narchive_command = '/w --archive /a --cluster main push %p'\n"
        );
        // ALTER SYSTEM beats the file.
        fs::write(&file, "wal_level = 'minimal'\n").unwrap();
        let applied = apply_to_files(dir, &wanted).unwrap();
        assert_eq!(applied.changed.first().unwrap(), &("wal_level".to_owned(), "replica".to_owned()));
    }

    #[test]
    fn an_archive_in_the_data_directory_is_found_whatever_it_is_called() {
        let scratch = tempfile::tempdir().unwrap();
        let data = scratch.path().join("data");
        fs::create_dir_all(data.join("pg_wal")).unwrap();
        std::os::unix::fs::symlink(&data, scratch.path().join("link")).unwrap();
        for inside in ["data", "data/archive", "data/pg_wal/new/archive", "link/archive"] {
            assert!(lies_in(&scratch.path().join(inside), &data), "{inside}");
        }
        for outside in ["", "archive", "data2", "link2/archive"] {
            assert!(!lies_in(&scratch.path().join(outside), &data), "{outside}");
        }
    }
}
