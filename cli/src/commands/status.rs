//! `waltide status`: how the archive stands.

use std::time::Duration;

use waltide_archiver::catalog::load_settled;
use waltide_archiver::status::{Health, Lag, Status, status};
use waltide_archiver::{host, window_ends};
use waltide_format::TimestampTz;
use waltide_format::archive::{TimelineHistory, WindowRestore};

use super::restore::measured_rates;
use crate::context::{Context, catalog_failure};
use crate::exit::Failure;
use crate::output;

/// Show what can be restored to, what is missing or damaged, and how far the archive lags
///
/// Ends with 0 when all is well, 3 when the archive is damaged or incomplete, 1 for any other alert.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Raise an alert where the last backup is older than this many hours (26 if no number is given)
    #[arg(long, value_name = "HOURS", num_args = 0..=1, default_missing_value = "26")]
    max_age: Option<f64>,
}

pub(crate) async fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let max_age = args.max_age.map(|hours| Duration::try_from_secs_f64(hours * 3600.0));
    let max_age = max_age.transpose().map_err(|_| Failure::usage("--max-age is not a number of hours"))?;
    let (archive, layout) = (context.archive().await?, context.layout()?);
    let cache = context.cache(&archive);
    let loaded = load_settled(&archive, &layout, context.system, cache.as_ref(), context.threads).await;
    let catalog = loaded.map_err(catalog_failure)?;
    let now = TimestampTz::from_jiff(jiff::Timestamp::now());
    let mut found = status(&catalog, now, max_age, |s| host::is_running(&s.host, s.pid));
    window_ends::fill(&archive, &catalog, &mut found.windows).await?;
    let rates = measured_rates(&archive, &layout, &catalog).await;
    for window in &mut found.windows {
        window.restore = catalog.restore_to_end(window, &rates);
    }
    output::answer(context, &found, || text(&found))?;
    match found.health {
        Health::Ok => Ok(()),
        Health::Warning => Err(Failure::silent(1)),
        Health::Damaged => Err(Failure::silent(3)),
    }
}

fn text(s: &Status) -> String {
    let mut facts =
        vec![("cluster", format!("{}, PostgreSQL {}, system {}", s.cluster, s.major, s.system_id))];
    facts.push(match &s.last_backup {
        Some(b) => {
            let (kind, age) = (output::word(&b.kind), output::duration(b.age_seconds));
            ("backups", format!("{}, the last {} ({kind}) ended {age} ago", s.backups, b.id))
        }
        None => ("backups", "none".to_owned()),
    });
    for u in &s.unfinished {
        let what = if u.interrupted { "interrupted" } else { "running" };
        let (age, started) = (output::duration(u.age_seconds), &u.started);
        let text = format!("{} on {}, process {}, started {age} ago", started.id, started.host, started.pid);
        facts.push((what, text));
    }
    if let Some(wal) = &s.wal {
        let (stored, reach) = (output::bytes(s.wal_stored_bytes), &wal.reach);
        let text = format!("{} segments, {stored}, up to {} in {}", s.segments, reach.end, reach.segment);
        facts.push(("WAL", text));
    }
    facts.extend(s.histories.iter().map(|history| ("history", history_text(history))));
    facts.extend(s.timelines.iter().map(|lag| ("lag", lag_text(lag))));
    for w in &s.windows {
        let to = w.to_time.map_or(String::new(), |t| format!(" ({})", output::time(t)));
        let range = format!("{} ({}) to {}{to}", w.from, output::time(w.from_time), w.to);
        let n = w.backups.len();
        let backups = if n == 1 { "1 backup".to_owned() } else { format!("{n} backups") };
        let commits = match (w.first_commit, w.last_commit) {
            (Some(first), Some(last)) => format!(", transactions {} to {}", first.xid, last.xid),
            _ => String::new(),
        };
        facts.push(("window", format!("timeline {}: {range}{commits}, from {backups}", w.timeline)));
        facts.extend(w.restore.iter().map(|restore| ("restore", restore_text(restore))));
    }
    let label = |health| match health {
        Health::Damaged => "DAMAGED",
        Health::Warning => "warning",
        Health::Ok => "note",
    };
    facts.extend(s.alerts.iter().map(|a| (label(a.health), a.text.clone())));
    if s.alerts.is_empty() {
        facts.push(("alerts", "none".to_owned()));
    }
    output::facts(&facts)
}

fn restore_text(restore: &WindowRestore) -> String {
    let (work, estimate) = (&restore.work, &restore.estimate);
    let basis = if estimate.measured { "as drills measured" } else { "not measured here yet" };
    format!(
        "to its end from {}: {}, then {} of WAL in {} segments with {} records, about {} ({basis})",
        restore.backup,
        output::bytes(work.base_bytes),
        output::bytes(work.wal_bytes),
        work.segments,
        work.records,
        output::duration(estimate.total_seconds)
    )
}

fn history_text(history: &TimelineHistory) -> String {
    let mut text = format!("timeline {}", history.timeline);
    if let (Some(parent), Some(at)) = (history.parent, history.forked_at) {
        text.push_str(&format!(" left timeline {parent} at {at}"));
        text.extend(history.reason.iter().filter(|r| !r.is_empty()).map(|r| format!(" ({r})")));
        text.extend(history.history_pushed_by.iter().map(|s| format!(", said {}:{}", s.host, s.directory)));
    }
    let pushers = history.pushed_by.iter().map(|p| {
        let role = if p.recovering == Some(true) { ", a standby," } else { "" };
        format!("{} of {}:{}{role} until {}", p.segments, p.host, p.directory, output::time(p.last_pushed))
    });
    let pushers: Vec<_> = pushers.collect();
    match pushers.is_empty() {
        true => text,
        false => format!("{text}; segments: {}", pushers.join(", ")),
    }
}

fn lag_text(lag: &Lag) -> String {
    let reach = &lag.reach;
    let told = |commit: Option<TimestampTz>, lag: Option<f64>| match (commit, lag) {
        (Some(commit), Some(lag)) => format!("{}, {} ago", output::time(commit), output::duration(lag)),
        _ => "none".to_owned(),
    };
    let archived = told(reach.last_commit, lag.lag_seconds);
    let recoverable = match reach.recoverable_to {
        None => "nothing of it can be restored".to_owned(),
        Some(_) if reach.last_recoverable_commit == reach.last_commit => "which can be restored".to_owned(),
        Some(_) => {
            let commit = told(reach.last_recoverable_commit, lag.recoverable_lag_seconds);
            format!("the last that can be restored {commit}")
        }
    };
    format!("timeline {}: last commit {archived}; {recoverable}", reach.timeline)
}
