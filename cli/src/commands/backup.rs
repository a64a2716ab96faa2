//! `waltide backup`.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use waltide_archiver::engines::postgres::backup::{Backup, BackupRequest, DEFAULT_LEVEL, backup};
use waltide_archiver::merged::catch_up;
use waltide_format::archive::{BackupKind, ConfigFile, ManifestStats, Tablespace};
use waltide_format::{BackupId, Lsn, TimelineId, TimestampTz};

use crate::context::Context;
use crate::exit::Failure;
use crate::output;

/// Take a base backup of the running server, from its files
///
/// It is seen only when every file and all the WAL that it needs are in the archive. Several may run at once.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The data directory
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// What to read: everything, or the blocks that the archived WAL changed since the last backup or the last full one
    /// [default: incremental where that can be, else full]
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<Kind>,
    /// Words to find the backup again by
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
    /// How to reach the server: libpq keywords or a URI [default: by the data directory's postmaster.pid]
    #[arg(long, value_name = "CONNINFO")]
    connection: Option<String>,
    /// Make the checkpoint that the backup starts with at once, or spread over time as the server's own
    #[arg(long, value_name = "HOW", default_value = "fast")]
    checkpoint: Checkpoint,
    /// What to do about pages that do not have their checksum: back them up and warn, or refuse
    #[arg(long, value_name = "WHAT", default_value = "warn")]
    damaged_pages: DamagedPages,
    /// zstd's level, 1 to 19 [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=19))]
    compression_level: Option<i32>,
    /// How many seconds to wait for the next segment of the backup's WAL to reach the archive
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    archive_timeout: u64,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Kind {
    /// Everything
    Full,
    /// What changed since the last backup
    Incremental,
    /// What changed since the last full backup
    Differential,
}

impl From<Kind> for BackupKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Full => Self::Full,
            Kind::Incremental => Self::Incremental,
            Kind::Differential => Self::Differential,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
enum Checkpoint {
    Fast,
    Spread,
}

#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
pub(super) enum DamagedPages {
    Warn,
    Refuse,
}

/// What a finished backup is told as, by `import` too.
#[derive(Serialize)]
pub(super) struct Answer<'a> {
    id: &'a BackupId,
    kind: BackupKind,
    parent: Option<&'a BackupId>,
    full_because: Option<&'a str>,
    description: Option<&'a str>,
    started: TimestampTz,
    stopped: TimestampTz,
    timeline: TimelineId,
    start_lsn: Lsn,
    stop_lsn: Lsn,
    from_standby: bool,
    files: usize,
    tablespaces: &'a [Tablespace],
    config_files: Vec<&'a str>,
    damaged_pages: &'a [String],
    #[serde(flatten)]
    stats: ManifestStats,
    warnings: &'a [String],
}

impl<'a> Answer<'a> {
    pub(super) fn new(backup: &'a Backup) -> Self {
        let manifest = &backup.manifest;
        Self {
            id: &manifest.id,
            kind: manifest.kind,
            parent: manifest.parent.as_ref(),
            full_because: manifest.full_because.as_deref(),
            description: manifest.description.as_deref(),
            started: manifest.started,
            stopped: manifest.stopped,
            timeline: manifest.timeline,
            start_lsn: manifest.start_lsn,
            stop_lsn: manifest.stop_lsn,
            from_standby: manifest.from_standby,
            files: manifest.files.len(),
            tablespaces: &manifest.tablespaces,
            config_files: manifest.config_files.iter().map(|file: &ConfigFile| file.path.as_str()).collect(),
            damaged_pages: &manifest.damaged_pages,
            stats: manifest.stats,
            warnings: &backup.warnings,
        }
    }

    pub(super) fn text(&self) -> String {
        let read = match self.parent {
            Some(parent) => {
                format!(
                    "{} of it read, the rest referred to through {parent}, ",
                    output::bytes(self.stats.read_bytes)
                )
            }
            None => String::new(),
        };
        format!(
            "{} backup {} is in the archive: {} in {} files, {read}{} stored, in {}\nit can be restored to any moment \
             from {} on, on timeline {}",
            output::word(&self.kind),
            self.id,
            output::bytes(self.stats.cluster_bytes),
            self.files,
            output::bytes(self.stats.stored_bytes),
            output::duration(self.stats.total_seconds),
            self.stop_lsn,
            self.timeline,
        )
    }
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<(), Failure> {
    let data_dir = context.data_dir(args.data_dir)?;
    let archive = context.archive().await?;
    let request = BackupRequest {
        archive: archive.clone(),
        layout: context.layout()?,
        data_dir,
        kind: args.kind.map(BackupKind::from),
        cache: context.cache_path(&archive),
        connection: args.connection.or_else(|| context.config.connection.clone()),
        description: args.description,
        fast_checkpoint: args.checkpoint == Checkpoint::Fast,
        refuse_damaged_pages: args.damaged_pages == DamagedPages::Refuse,
        threads: context.threads,
        level: args.compression_level.or(context.config.compression_level).unwrap_or(DEFAULT_LEVEL),
        archive_timeout: Duration::from_secs(args.archive_timeout),
    };
    let progress = context.progress();
    let done = backup(&request, progress).await.map_err(|e| {
        let status = if e.is_damage() { 3 } else { 1 };
        Failure::from(e).status(status)
    })?;
    for warning in &done.warnings {
        tracing::warn!("{warning}");
    }
    let answer = Answer::new(&done);
    output::answer(context, &answer, || answer.text())?;
    // The backup is there whatever becomes of this.
    catch_up(&request.archive, &request.layout, request.threads).await;
    Ok(())
}
