//! `waltide prune`: retention.

use std::time::Duration;

use serde::Serialize;
use waltide_archiver::prune::{PruneError, Pruning};
use waltide_archiver::retention::{Deletion, ObjectRole, Policy, PrunePlan};
use waltide_format::TimestampTz;

use crate::context::{Context, catalog_failure};
use crate::exit::Failure;
use crate::output;

/// Remove backups that no rule keeps, the WAL that no backup left needs, and what interrupted backups left
///
/// A backup stays if any rule keeps it. The last backup that can be restored and pinned ones (`waltide keep`) always
/// stay, and so does whatever a backup that stays refers to, its WAL included. Without a rule only what interrupted
/// backups left is removed.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Keep the backups of the last N days
    #[arg(long, visible_alias = "retention-days", value_name = "N")]
    older_than_days: Option<u32>,
    /// Keep the last N backups
    #[arg(long, value_name = "N")]
    keep_count: Option<u32>,
    /// Keep the last backup of each of the last N hours that have one
    #[arg(long, visible_alias = "hourly-hours", value_name = "N")]
    hourly: Option<u32>,
    /// Keep the last backup of each of the last N days (UTC) that have one
    #[arg(long, visible_alias = "daily-days", value_name = "N")]
    daily: Option<u32>,
    /// Keep the last backup of each of the last N ISO weeks that have one
    #[arg(long, visible_alias = "weekly-weeks", value_name = "N")]
    weekly: Option<u32>,
    /// Keep the last backup of each of the last N months that have one
    #[arg(long, visible_alias = "monthly-months", value_name = "N")]
    monthly: Option<u32>,
    /// Keep what it takes to restore to any moment of the last N days
    #[arg(long, visible_alias = "wal-days", value_name = "N")]
    window_days: Option<u32>,
    /// Never remove a backup younger than N days
    #[arg(long, value_name = "N")]
    min_age_days: Option<u32>,
    /// Give backups up whose manifest cannot be read; while one is there, no data and no WAL goes
    #[arg(long)]
    drop_damaged: bool,
    /// How many seconds to wait between announcing and deleting
    #[arg(long, value_name = "SECONDS", default_value_t = 2)]
    grace: u64,
    /// After how many hours without a sign of life an unfinished backup counts as given up
    #[arg(long, value_name = "HOURS", default_value_t = 24)]
    give_up_hours: u64,
    /// Show what would go, and remove nothing
    #[arg(long)]
    dry_run: bool,
}

impl Args {
    fn policy(&self) -> Policy {
        Policy {
            days: self.older_than_days,
            count: self.keep_count,
            hourly: self.hourly,
            daily: self.daily,
            weekly: self.weekly,
            monthly: self.monthly,
            window_days: self.window_days,
            min_age_days: self.min_age_days,
            give_up_after: Duration::from_secs(self.give_up_hours.saturating_mul(3600)),
            drop_damaged: self.drop_damaged,
        }
    }
}

#[derive(Debug, Serialize)]
struct Answer {
    dry_run: bool,
    #[serde(flatten)]
    plan: PrunePlan,
    /// Objects that were planned to go and stayed: something came to need them.
    spared: Vec<String>,
    deleted: u64,
    freed_bytes: u64,
    /// Unfinished files of killed writers.
    swept: Vec<String>,
}

pub(crate) async fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let (archive, layout) = (context.archive().await?, context.layout()?);
    let cache = context.cache(&archive);
    let policy = args.policy();
    let pruning = Pruning {
        archive: &archive,
        layout: &layout,
        system: context.system,
        cache: cache.as_ref(),
        threads: context.threads,
    };
    let plan = pruning.plan(&policy, TimestampTz::from_jiff(jiff::Timestamp::now())).await.map_err(failed)?;
    let answer = if args.dry_run {
        let swept = pruning.leftovers(&policy, true).await.map_err(failed)?;
        let freed_bytes = plan.freed_bytes();
        Answer { dry_run: true, plan, spared: Vec::new(), deleted: 0, freed_bytes, swept }
    } else {
        let grace = Duration::from_secs(args.grace);
        let done = pruning.carry_out(&plan, &policy, grace, context.progress().as_ref()).await;
        let done = done.map_err(failed)?;
        let (deleted, freed_bytes) = (done.deleted, done.freed_bytes);
        Answer {
            dry_run: false,
            plan: done.plan,
            spared: done.spared,
            deleted,
            freed_bytes,
            swept: done.swept,
        }
    };
    output::answer(context, &answer, || text(&answer))
}

fn failed(e: PruneError) -> Failure {
    match e {
        PruneError::Catalog(e) => catalog_failure(e),
        e => e.into(),
    }
}

fn text(answer: &Answer) -> String {
    let plan = &answer.plan;
    let mut lines = Vec::new();
    let rows = plan.backups.iter().map(|v| {
        let what = if v.keep { "stays" } else { "goes" };
        vec![v.id.to_string(), output::time(v.stopped), what.to_owned(), v.reasons.join("; ")]
    });
    let rows: Vec<_> = rows.collect();
    if !rows.is_empty() {
        lines.push(output::table(&["backup", "ended", "", "why"], &rows));
    }
    lines.extend(plan.interrupted.iter().map(|id| format!("backup {id} was interrupted: what it left goes")));
    for l in &plan.lost {
        let to = l.to_time.map_or(String::new(), |t| format!(" ({})", output::time(t)));
        let from = output::time(l.from_time);
        lines.push(format!(
            "timeline {}: no restore any more to {} ({from}) up to {}{to}",
            l.timeline, l.from, l.to
        ));
    }
    lines.extend(plan.held_back.iter().map(|why| format!("held back: {why}")));
    lines.extend(answer.spared.iter().map(|path| format!("stays after all, it is needed again: {path}")));
    if answer.dry_run {
        lines.extend(plan.deletions.iter().map(|d| format!("would remove {}", d.path)));
        lines.extend(answer.swept.iter().map(|path| format!("would remove the unfinished file {path}")));
    }
    let verb = if answer.dry_run { "would free" } else { "freed" };
    lines.push(format!("{verb} {}: {}", output::bytes(answer.freed_bytes), summary(&plan.deletions)));
    lines.join("\n")
}

/// How many of what.
fn summary(deletions: &[Deletion]) -> String {
    let count = |roles: &[ObjectRole]| deletions.iter().filter(|d| roles.contains(&d.role)).count();
    let wal = [ObjectRole::Wal, ObjectRole::BackupHistory];
    let (backups, segments) = (count(&[ObjectRole::Manifest]), count(&wal));
    let data = count(&[ObjectRole::Map, ObjectRole::Pack]);
    format!("{backups} backups, {data} objects of their data, {segments} of WAL")
}
