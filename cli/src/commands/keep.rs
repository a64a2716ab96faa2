//! `waltide keep`: pins a backup against retention.

use serde::Serialize;
use waltide_archiver::prune::{KeepError, keep, release};
use waltide_format::archive::Keep;
use waltide_format::{BackupId, TimestampTz};

use crate::context::{Context, find_backup};
use crate::exit::Failure;
use crate::output;

/// Pin a backup, so that no prune removes it
///
/// With the backup all WAL from its start on stays, so that every later moment can be restored to from it;
/// --standalone keeps only what it needs itself.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its name or the beginning of it, or `latest`
    #[arg(value_name = "BACKUP")]
    backup: String,
    /// Why; `list` and `info` show it
    #[arg(long, value_name = "TEXT", conflicts_with = "release")]
    reason: Option<String>,
    /// Keep only the WAL that the backup itself needs; it can then be restored to its own end alone
    #[arg(long, conflicts_with = "release")]
    standalone: bool,
    /// Take the pin away
    #[arg(long)]
    release: bool,
}

#[derive(Debug, Serialize)]
struct Answer {
    id: BackupId,
    keep: Option<Keep>,
}

pub(crate) async fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let (archive, layout) = (context.archive().await?, context.layout()?);
    let catalog = context.catalog(&archive, &layout).await?;
    let id = find_backup(&catalog, &args.backup)?.head.id.clone();
    if args.release {
        let was = release(&archive, &layout, &catalog, &id).await?;
        let text = if was { format!("{id} is no longer pinned") } else { format!("{id} was not pinned") };
        return output::answer(context, &Answer { id, keep: None }, || text);
    }
    let since = TimestampTz::from_jiff(jiff::Timestamp::now());
    let pin = Keep { since, reason: args.reason.clone(), standalone: args.standalone };
    keep(&archive, &layout, &catalog, &id, &pin).await.map_err(|e| match e {
        KeepError::BeingPruned(_) => {
            Failure::from(e).hint("choose another backup, or make one with `waltide backup`")
        }
        KeepError::Pinned(..) => Failure::from(e).hint("release it first: `waltide keep BACKUP --release`"),
        e => e.into(),
    })?;
    let alone = if args.standalone { " alone, without the WAL behind its end" } else { "" };
    let text = format!("{id} is pinned{alone}");
    output::answer(context, &Answer { id, keep: Some(pin) }, || text)
}
