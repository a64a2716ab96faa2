//! `waltide watch`.

use std::path::PathBuf;

use tokio::signal::unix::{SignalKind, signal};
use waltide_archiver::engines::postgres::push::{DEFAULT_LEVEL, Shipper};
use waltide_archiver::engines::postgres::watch::{WatchRequest, watch};

use crate::context::Context;
use crate::exit::Failure;
use crate::output;

/// Ship WAL as soon as it is ready, several files at once, until SIGTERM or SIGINT
///
/// archive_command stays set to `waltide push`, which returns at once for what is shipped already. It may be stopped,
/// killed and started again at any time.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The data directory
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// zstd's level, 1 to 19; for WAL 1 to 3 are the same
    #[arg(long, value_name = "LEVEL", value_parser = clap::value_parser!(i32).range(1..=19))]
    compression_level: Option<i32>,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<(), Failure> {
    let data_dir = context.data_dir(args.data_dir)?;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let level = args.compression_level.or(context.config.compression_level).unwrap_or(DEFAULT_LEVEL);
    let shipper = Shipper::new(context.archive().await?, context.layout()?, level);
    let request = WatchRequest { data_dir, threads: context.threads };
    let watched = watch(&shipper, &request, stop).await?;
    output::answer(context, &watched, || {
        format!(
            "shipped {}, found {} there already, {} failures",
            watched.shipped, watched.found, watched.failures
        )
    })
}
