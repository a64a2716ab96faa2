//! `waltide drill`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use waltide_format::archive::{Catalog, DrillOutcome, DrillRecord, DrillVerdict, Rates};
use waltide_replay::engines::postgres::{DrillRequest, DrillSource, ReplayMode, drill, random_targets};
use waltide_replay::{
    DrillReport, Goal, TargetAction, html, past_drills, random_seed, record_drill, summary, verdict_words,
};
use waltide_storage::Archive;

use crate::commands::log::size;
use crate::commands::restore::{GoalArgs, own_restore_command};
use crate::context::{Context, named_backup};
use crate::exit::Failure;
use crate::output;

/// As many earlier drills as are looked at.
const HISTORY: usize = 100;
/// So many of them say how fast things go.
const MEASURED: usize = 5;
/// How long a hole in the WAL may last before it is one: segments are shipped side by side.
const SETTLE: Duration = Duration::from_secs(5);

/// Restore to a scratch place, start the real server there, check it, measure it, and record all that
///
/// The scratch server acts on nothing outside its place: no archiving, no network, no subscriptions, no jobs. Ends with
/// 0 when everything holds, 3 when the archive is at fault, 1 when something else is.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: GoalArgs,
    /// A question to ask of what was restored, in the database postgres unless another is named: its single value must
    /// be true or a number other than zero. May be given several times
    #[arg(long = "check", value_name = "[DB:]SQL")]
    checks: Vec<String>,
    /// Write a report for people: one HTML page
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// Drill so many targets drawn by chance from the commits that can be reached
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000), conflicts_with = "moment")]
    random: Option<u16>,
    /// Draw the same targets again
    #[arg(long, value_name = "N", requires = "random")]
    seed: Option<u64>,
    /// Start from this backup [default: the newest that reaches the target]
    #[arg(long, value_name = "BACKUP")]
    backup: Option<String>,
    /// Below which directory to restore [default: the one for temporary files]
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Leave the restored cluster there
    #[arg(long)]
    keep_scratch: bool,
    /// How the WAL is replayed: by PostgreSQL alone, native as far as possible, or native or not at all
    #[arg(long, value_name = "auto|native|server", default_value = "server")]
    replay: ReplayMode,
    /// Who goes on to the target: PostgreSQL, or native replay itself where that is possible (auto) or else not at all. What is
    /// not `server` replays natively, whatever --replay says
    #[arg(long, value_name = "auto|native|server", default_value = "server")]
    finish: ReplayMode,
    /// So much of the WAL native replay keeps in memory; the rest goes to a file
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = size)]
    memory: u64,
    /// Where the programs of PostgreSQL lie
    #[arg(long, value_name = "DIR")]
    pg_bin: Option<PathBuf>,
    /// Libraries that the scratch server loads (shared_preload_libraries); none unless named
    #[arg(long, value_name = "LIBRARIES", default_value = "")]
    preload: String,
    /// The superuser to ask as
    #[arg(long, value_name = "NAME", default_value = "postgres")]
    user: String,
    /// How many seconds a check may take
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    statement_timeout: u32,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<(), Failure> {
    let mut stopped = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal);
    let [Ok(interrupt), Ok(terminate), Ok(hangup)] = &mut stopped else {
        return Err(Failure::message(1, "the signals that stop a drill cannot be heard"));
    };
    // What is under way ends its server and removes its place where it is dropped.
    tokio::select! {
        result = drills(args, context) => result,
        _ = interrupt.recv() => Err(Failure::message(1, "the drill was stopped; nothing of it is left or recorded")),
        _ = terminate.recv() => Err(Failure::message(1, "the drill was stopped; nothing of it is left or recorded")),
        _ = hangup.recv() => Err(Failure::message(1, "the drill was stopped; nothing of it is left or recorded")),
    }
}

async fn drills(args: Args, context: &Context) -> Result<(), Failure> {
    let began = Instant::now();
    let (archive, layout) = (context.archive().await?, context.layout()?);
    args.target.check()?;
    let to_the_end = args.random.is_none() && args.target.is_open_ended()?;
    let catalog = settled_catalog(context, &archive, to_the_end).await?;
    let names = layout.system(catalog.system.system_id);
    let history = past_drills(&archive, &names, HISTORY).await?;
    let backup = named_backup(&catalog, args.backup.as_deref())?;
    let command = own_restore_command(context)?;
    let mut seed = None;
    let goals = match args.random {
        Some(count) => {
            let chosen = args.seed.unwrap_or_else(random_seed);
            seed = Some(chosen);
            random_targets(&archive, &catalog, count.into(), chosen).await.map_err(|e| {
                let status = if e.verdict() == DrillVerdict::ArchiveAtFault { 3 } else { 1 };
                Failure::from(e).status(status)
            })?
        }
        None => {
            let goal = args.target.goal(&archive, &layout, &catalog).await?;
            vec![Goal { action: TargetAction::Promote, ..goal }]
        }
    };
    let progress = context.progress();
    let mut done: Vec<DrillRecord> = Vec::new();
    let mut unkept = Ok(());
    for goal in goals {
        let mut request = DrillRequest::new(goal, command.clone());
        request.backup = backup.clone();
        request.checks.clone_from(&args.checks);
        if let Some(place) = &args.scratch {
            request.scratch.clone_from(place);
        }
        request.keep_scratch = args.keep_scratch;
        request.pg_bin.clone_from(&args.pg_bin);
        request.preload.clone_from(&args.preload);
        request.user.clone_from(&args.user);
        request.statement_timeout = Duration::from_secs(args.statement_timeout.into());
        request.threads = context.threads;
        request.replay = args.replay;
        request.finish = args.finish;
        request.memory = usize::try_from(args.memory).unwrap_or(usize::MAX);
        request.seed = seed;
        request.began = done.is_empty().then_some(began);
        request.series = done.first().map(|first| first.id.clone());
        let source = DrillSource {
            archive: &archive,
            layout: &layout,
            catalog: &catalog,
            rates: Rates::from_drills(
                history.get(history.len().saturating_sub(MEASURED)..).unwrap_or_default(),
            ),
            progress: &progress,
        };
        let mut record = drill(source, &request).await;
        if seed.is_some() && record.series.is_none() {
            record.series = Some(record.id.clone());
        }
        let recorded = record_drill(&archive, &names, &record).await;
        done.push(record);
        if let Err(e) = recorded {
            unkept = Err(Failure::from(e));
            break;
        }
    }
    drop(progress);
    let report = DrillReport::new(archive.url(), layout.cluster(), done, history);
    let page = args.report.as_deref();
    let unkept = unkept.and_then(|()| page.map_or(Ok(()), |path| write_report(path, &html(&report))));
    // What was found is told, and its status counts, whether or not it could be kept.
    output::answer(context, &report, || text(&report, page.filter(|_| unkept.is_ok())))?;
    match report.verdict {
        DrillVerdict::Passed => unkept,
        DrillVerdict::Failed => Err(unkept.err().unwrap_or_else(|| Failure::silent(1))),
        DrillVerdict::ArchiveAtFault => Err(unkept.err().unwrap_or_else(|| Failure::silent(3)).status(3)),
    }
}

/// The catalogue, once it has no hole, or the hole has lasted: what is shipped side by side arrives out of order.
async fn settled_catalog(context: &Context, archive: &Archive, to_the_end: bool) -> Result<Catalog, Failure> {
    let layout = context.layout()?;
    let began = Instant::now();
    loop {
        let catalog = context.catalog(archive, &layout).await?;
        if !to_the_end || catalog.gaps().is_empty() || began.elapsed() > SETTLE {
            return Ok(catalog);
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Writes the page beside its name first, so that a reader never sees half of one.
fn write_report(path: &Path, page: &str) -> Result<(), Failure> {
    let failed = |e| Failure::failed(format!("the report {} cannot be written", path.display()), e);
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(format!(".tmp-{}", std::process::id()));
    let unfinished = PathBuf::from(unfinished);
    let written = std::fs::write(&unfinished, page).and_then(|()| std::fs::rename(&unfinished, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&unfinished);
    }
    written.map_err(failed)
}

fn text(report: &DrillReport, page: Option<&Path>) -> String {
    let mut out = String::new();
    for (i, drill) in report.drills.iter().enumerate() {
        if i > 0 {
            out.push('\n');
        }
        // Writing to a String does not fail.
        let _ = write_drill(&mut out, drill);
    }
    if report.drills.len() > 1 {
        let passed = report.drills.iter().filter(|d| d.verdict.passed()).count();
        let seed =
            report.drills.iter().find_map(|d| d.seed).map(|s| format!(" (--seed {s})")).unwrap_or_default();
        let _ = writeln!(out, "\n{passed} of {} drills passed{seed}", report.drills.len());
    }
    if let Some(page) = page {
        let _ = writeln!(out, "report    {}", page.display());
    }
    out
}

fn write_drill(out: &mut String, drill: &DrillRecord) -> std::fmt::Result {
    let verdict = verdict_words(drill.verdict).to_uppercase();
    writeln!(out, "{verdict}: {}", summary(drill))?;
    if let Some(error) = &drill.error {
        for line in error.lines() {
            writeln!(out, "  {line}")?;
        }
    }
    let mut facts = vec![("drill", drill.id.clone())];
    if let Some(backup) = &drill.backup {
        let bytes = output::bytes(drill.restored_bytes);
        facts.push(("backup", format!("{backup}, {bytes}, and {} of WAL", output::bytes(drill.wal_bytes))));
    }
    if let Some(commit) = &drill.last_commit {
        facts.push((
            "last",
            format!("transaction {} at {}, {}", commit.xid, commit.lsn, output::time(commit.time)),
        ));
    }
    let phases: Vec<_> =
        drill.phases.iter().map(|p| format!("{} {}", p.name, output::duration(p.seconds))).collect();
    facts.push(("phases", phases.join(", ")));
    let measured = |seconds: Option<f64>, without: &str| seconds.map_or(without.to_owned(), output::duration);
    facts.push(("RTO", measured(drill.rto_seconds, "none: the server did not answer")));
    facts.push(("RPO", measured(drill.rpo_seconds, "unknown")));
    writeln!(out, "{}", output::facts(&facts))?;
    for check in &drill.checks {
        let word = match check.outcome {
            DrillOutcome::Passed => "ok",
            DrillOutcome::Failed => "FAILED",
            DrillOutcome::Skipped => "skipped",
        };
        writeln!(out, "  {word:8} {}: {}", check.name, check.detail.replace('\n', "\n           "))?;
    }
    let names: Vec<_> = drill.settings.iter().map(|s| s.name.as_str()).collect();
    if !names.is_empty() {
        writeln!(out, "  without  {}", names.join(", "))?;
    }
    for note in &drill.notes {
        writeln!(out, "  note     {note}")?;
    }
    Ok(())
}
