//! The server whose data directory is being copied: that it is this one's, and what it says of the backup.

use std::path::{Path, PathBuf};

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use waltide_format::engines::postgres::cluster::ControlFile;
use waltide_format::{Lsn, PgMajor, SegmentName, SystemId, TimelineId};

use super::super::connect::{ConnectRequest, connect};
use super::super::postmaster::Postmaster;
use super::super::publish::WalSource;
use super::BackupError;

/// Between writing postmaster.pid and taking the time that it answers as its start, a server sets up its memory.
const START_SECONDS_MAX: f64 = 600.0;

/// A server that a backup is taken from.
pub(super) struct Server {
    pub(super) client: Client,
    pub(super) major: PgMajor,
    pub(super) version: String,
    pub(super) is_standby: bool,
}

/// What the server says at the end of a backup.
#[derive(Debug)]
pub(super) struct Stopped {
    pub(super) lsn: Lsn,
    pub(super) label: String,
    pub(super) tablespace_map: String,
}

impl Server {
    /// Connects to the server of `data_dir`, whose pg_control is `control`, and refuses any other.
    pub(super) async fn of(
        request: &ConnectRequest,
        data_dir: &Path,
        control: &ControlFile,
    ) -> Result<Self, BackupError> {
        let client = connect(request).await?;
        client
            .batch_execute(
                "SET statement_timeout = 0; SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0; \
                 SET client_min_messages = error; SET search_path = pg_catalog",
            )
            .await?;
        let row = client
            .query_one(
                "SELECT current_setting('server_version_num')::int4, current_setting('server_version'), \
                 pg_is_in_recovery(), (SELECT system_identifier FROM pg_control_system()), \
                 extract(epoch FROM pg_postmaster_start_time())::float8",
                &[],
            )
            .await?;
        let number: i32 = row.try_get(0)?;
        let system_id = SystemId::from(row.try_get::<_, i64>(3)?.cast_unsigned());
        let another = |why: String| BackupError::AnotherServer { data_dir: data_dir.to_owned(), why };
        if system_id != control.system_id {
            return Err(another(format!("its system identifier is {system_id}, not {}", control.system_id)));
        }
        let major = u16::try_from(number.wrapping_div(10_000)).ok().and_then(PgMajor::new);
        let major = major.filter(|major| *major == control.major);
        let version: String = row.try_get(1)?;
        let major =
            major.ok_or_else(|| another(format!("it is PostgreSQL {version}, not {}", control.major)))?;
        if major >= PgMajor::V14 {
            client.batch_execute("SET idle_session_timeout = 0").await?;
        }
        let server = Self { client, major, version, is_standby: row.try_get(2)? };
        server.check_identity(data_dir, row.try_get(4)?).await?;
        Ok(server)
    }

    /// A copy of the cluster, a standby above all, has the same system identifier. What tells it apart is
    /// postmaster.pid, which a server writes when it starts.
    async fn check_identity(&self, data_dir: &Path, started: f64) -> Result<(), BackupError> {
        let another =
            |why: &str| BackupError::AnotherServer { data_dir: data_dir.to_owned(), why: why.to_owned() };
        let read = Postmaster::read(data_dir);
        let local = read.map_err(|source| BackupError::PidFile { data_dir: data_dir.to_owned(), source })?;
        let local = local.ok_or_else(|| another("the directory has no running server's postmaster.pid"))?;
        let theirs = self.ask("SELECT pg_read_file('postmaster.pid')").await?;
        if let Some(theirs) = theirs {
            return match Postmaster::parse(&theirs, data_dir).as_ref() == Some(&local) {
                true => Ok(()),
                false => Err(another("its postmaster.pid is not the one in the directory")),
            };
        }
        // A role that may not read files may still be allowed to see where the server says it is.
        if let Some(theirs) = self.ask("SELECT current_setting('data_directory')").await?
            && !is_same_directory(Path::new(&theirs), data_dir)
        {
            return Err(another(&format!("its data_directory is {theirs}")));
        }
        #[allow(clippy::cast_precision_loss)] // seconds since 1970 are exact in a double
        let later = started - local.started as f64;
        if !(-1.0..START_SECONDS_MAX).contains(&later) {
            return Err(another("it was not started when the directory's postmaster.pid says"));
        }
        Ok(())
    }

    /// The answer to a question; none where this role may not ask it.
    async fn ask(&self, query: &str) -> Result<Option<String>, BackupError> {
        match self.client.query_one(query, &[]).await {
            Ok(row) => Ok(row.try_get(0)?),
            Err(e) if e.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Begins a backup that lasts as long as the session does.
    pub(super) async fn start(&self, label: &str, fast: bool) -> Result<Lsn, BackupError> {
        let query = match self.major >= PgMajor::V15 {
            true => "SELECT pg_backup_start($1, $2)::text",
            false => "SELECT pg_start_backup($1, $2, false)::text",
        };
        let text: String = self.client.query_one(query, &[&label, &fast]).await?.try_get(0)?;
        parse_lsn(&text)
    }

    /// The timeline that is being written; none on a standby, which writes none.
    pub(super) async fn timeline(&self) -> Result<Option<TimelineId>, BackupError> {
        if self.is_standby {
            return Ok(None);
        }
        let query = "SELECT pg_walfile_name(pg_current_wal_insert_lsn())";
        let name: String = self.client.query_one(query, &[]).await?.try_get(0)?;
        match name.parse::<SegmentName>() {
            Ok(name) => Ok(Some(name.timeline())),
            Err(_) => Err(BackupError::Answer { what: "a segment's name", found: name }),
        }
    }

    /// Ends the segment that is being written. False where this role may not.
    pub(super) async fn switch_wal(&self) -> Result<bool, BackupError> {
        match self.client.query_one("SELECT pg_switch_wal()::text", &[]).await {
            Ok(_) => Ok(true),
            Err(e) if e.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Ends it. Whether its WAL has reached the archive is for the archive to say.
    pub(super) async fn stop(&self) -> Result<Stopped, BackupError> {
        let query = match self.major >= PgMajor::V15 {
            true => "SELECT lsn::text, labelfile, spcmapfile FROM pg_backup_stop(false)",
            false => "SELECT lsn::text, labelfile, spcmapfile FROM pg_stop_backup(false, false)",
        };
        let row = self.client.query_one(query, &[]).await?;
        let text: String = row.try_get(0)?;
        let map: Option<String> = row.try_get(2)?;
        Ok(Stopped {
            lsn: parse_lsn(&text)?,
            label: row.try_get(1)?,
            tablespace_map: map.unwrap_or_default(),
        })
    }
}

impl WalSource for Server {
    async fn archived(&self) -> Option<i64> {
        if self.is_standby {
            return None;
        }
        let row = self.client.query_one("SELECT archived_count FROM pg_stat_archiver", &[]).await.ok()?;
        row.try_get(0).ok()
    }

    async fn why_not(&self) -> String {
        if self.is_standby {
            return "a standby cannot end a segment\nhint: run SELECT pg_switch_wal() on the primary, and see that it \
                    archives"
                .to_owned();
        }
        // Only the failures since the last success say something of now.
        let query = "SELECT current_setting('archive_mode'), CASE WHEN last_archived_time IS NULL OR \
                     last_failed_time > last_archived_time THEN last_failed_wal END FROM pg_stat_archiver";
        let Ok(row) = self.client.query_one(query, &[]).await else {
            return "the server no longer answers".to_owned();
        };
        let (mode, failed): (Option<String>, Option<String>) =
            (row.try_get(0).unwrap_or_default(), row.try_get(1).unwrap_or_default());
        match (mode.as_deref(), failed) {
            (Some("off"), _) => {
                "archive_mode is off\nhint: waltide init prints the settings that ship WAL".to_owned()
            }
            (_, Some(failed)) => {
                format!("archive_command fails for {failed}\nhint: the server's log has what it said")
            }
            _ => "archive_command has not failed\nhint: it may archive into another place".to_owned(),
        }
    }
}

fn parse_lsn(text: &str) -> Result<Lsn, BackupError> {
    text.parse().map_err(|_| BackupError::Answer { what: "an LSN", found: text.to_owned() })
}

fn is_same_directory(theirs: &Path, ours: &Path) -> bool {
    let real = |path: &Path| -> Option<PathBuf> { std::fs::canonicalize(path).ok() };
    real(theirs).is_some_and(|theirs| Some(theirs) == real(ours))
}
