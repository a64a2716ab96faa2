//! `waltide push`.

use std::path::PathBuf;

use waltide_archiver::engines::postgres::push::{DEFAULT_LEVEL, Outcome, PushRequest, Pushed, push};

use crate::context::Context;
use crate::exit::Failure;
use crate::output;

/// Ship a file of pg_wal into the archive: PostgreSQL's archive_command
///
/// Exits 0 only when the file is durable in the archive. Other segments that are ready go along.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The file: %p
    path: PathBuf,
    /// Archive a damaged segment with a note of its faults instead of refusing it
    #[arg(long)]
    force_admit: bool,
    /// zstd's level, 1 to 19; for WAL 1 to 3 are the same
    #[arg(long, value_name = "LEVEL", value_parser = clap::value_parser!(i32).range(1..=19))]
    compression_level: Option<i32>,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<(), Failure> {
    let request = PushRequest {
        archive: context.archive().await?,
        layout: context.layout()?,
        path: args.path,
        threads: context.threads,
        level: args.compression_level.or(context.config.compression_level).unwrap_or(DEFAULT_LEVEL),
        force_admit: args.force_admit,
    };
    let pushed = push(&request).await?;
    for fault in &pushed.faults {
        tracing::warn!("{} is archived with a fault at {}: {}", pushed.name, fault.at, fault.message);
    }
    match context.json {
        true => output::answer(context, &pushed, String::new),
        false => {
            tracing::info!("{}", text(&pushed));
            Ok(())
        }
    }
}

fn text(pushed: &Pushed) -> String {
    let Pushed { name, object, .. } = pushed;
    match pushed.outcome {
        Outcome::Stored | Outcome::StoredBeside => {
            format!("{name} is stored as {object}, {}", output::bytes(pushed.stored_bytes))
        }
        Outcome::AlreadyThere => format!("{name} was there already, as {object}"),
        Outcome::Contained => format!("{name} adds nothing to {object}"),
    }
}
