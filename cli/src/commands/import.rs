//! `waltide import`.

use std::path::PathBuf;
use std::time::Duration;

use waltide_archiver::engines::postgres::backup::DEFAULT_LEVEL;
use waltide_archiver::engines::postgres::import::{ImportRequest, import};

use super::backup::{Answer, DamagedPages};
use crate::context::Context;
use crate::exit::Failure;
use crate::output;

/// Take in a base backup that pg_basebackup made: a directory of files, or of tar archives
///
/// The archives may be compressed with gzip, LZ4 or zstd. Every file is checked against its backup_manifest. WAL that came with the backup and is not in the archive is
/// shipped. The backup's own directory is not changed, and not needed afterwards.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What pg_basebackup wrote
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Words to find the backup again by
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
    /// Take it even if it has no backup_manifest, so that nothing says that it is whole
    #[arg(long)]
    no_manifest: bool,
    /// What to do about pages that do not have their checksum: take them in and warn, or refuse
    #[arg(long, value_name = "WHAT", default_value = "warn")]
    damaged_pages: DamagedPages,
    /// zstd's level, 1 to 19 [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=19))]
    compression_level: Option<i32>,
    /// How many seconds to wait for WAL that neither the archive nor the backup has
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    archive_timeout: u64,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<(), Failure> {
    let request = ImportRequest {
        archive: context.archive().await?,
        layout: context.layout()?,
        dir: args.dir,
        description: args.description,
        require_manifest: !args.no_manifest,
        refuse_damaged_pages: args.damaged_pages == DamagedPages::Refuse,
        threads: context.threads,
        level: args.compression_level.or(context.config.compression_level).unwrap_or(DEFAULT_LEVEL),
        archive_timeout: Duration::from_secs(args.archive_timeout),
    };
    let done = import(&request, context.progress()).await.map_err(|e| {
        let status = if e.is_damage() { 3 } else { 1 };
        Failure::from(e).status(status)
    })?;
    for warning in &done.warnings {
        tracing::warn!("{warning}");
    }
    let answer = Answer::new(&done);
    output::answer(context, &answer, || answer.text())
}
