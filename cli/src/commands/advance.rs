//! `waltide advance`.

use std::path::PathBuf;
use std::str::FromStr;

use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use waltide_archiver::engines::postgres::backup::{
    Advance, AdvanceRequest, AdvancedFiles, Backup, BackupError, DEFAULT_LEVEL,
};
use waltide_format::archive::{Catalog, Layout, Tablespace};
use waltide_format::{BackupId, Lsn, TimestampTz};
use waltide_replay::engines::postgres::{
    Point, Replay, ReplayMode, Replayed, Restore, RestoreError, RestoreOptions, ScratchError, ScratchPlace,
    SearchError, choose_replay, made_tablespaces,
};
use waltide_replay::{Goal, Plan, Target, TargetAction, TargetTimeline};
use waltide_storage::Archive;

use super::backup::{Answer, DamagedPages};
use super::log::size;
use super::restore::{make_plan, time};
use crate::context::{Context, find_backup};
use crate::exit::Failure;
use crate::output;

/// Make a newer backup out of an older one and the archived WAL, without the database
///
/// The backup is restored into a scratch place, the WAL is replayed there natively up to the newest checkpoint, and what
/// that changed is stored; everything else the new backup refers to. It restores on its own.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The backup to bring forward [default: the newest from which that can be reached]
    #[arg(long, value_name = "BACKUP")]
    backup: Option<String>,
    /// To the newest checkpoint that was complete at an LSN or a time [default: the newest in the archive]
    #[arg(long, value_name = "LSN|TIME")]
    to: Option<Until>,
    /// Along a timeline: latest, current (the backup's own) or a number
    #[arg(long, value_name = "TIMELINE", default_value_t)]
    target_timeline: TargetTimeline,
    /// Below which directory to restore: it needs room for the whole cluster [default: the one for temporary files]
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// How much memory replay may take for what it keeps of the WAL; more goes to a file in the scratch place
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = size)]
    memory: u64,
    /// Words to find the backup again by
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
    /// What to do about pages that do not have their checksum: take them in and warn, or refuse
    #[arg(long, value_name = "WHAT", default_value = "warn")]
    damaged_pages: DamagedPages,
    /// zstd's level, 1 to 19 [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=19))]
    compression_level: Option<i32>,
    /// Print what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
}

/// How far to go.
#[derive(Debug, Clone, Copy)]
enum Until {
    Lsn(Lsn),
    Time(TimestampTz),
}

impl FromStr for Until {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse() {
            Ok(lsn) => Ok(Self::Lsn(lsn)),
            Err(_) => time(text).map(Self::Time).map_err(|e| format!("neither an LSN nor a time: {e}")),
        }
    }
}

/// What is told of it.
#[derive(Serialize)]
struct Told<'a> {
    dry_run: bool,
    /// The backup that is brought forward.
    from: &'a BackupId,
    /// The checkpoint.
    to: Point,
    segments: usize,
    wal_bytes: u64,
    /// What the scratch place takes.
    scratch_bytes: u64,
    replayed: Option<&'a Replayed>,
    #[serde(flatten)]
    backup: Option<Answer<'a>>,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<(), Failure> {
    let mut stopped = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal);
    let [Ok(interrupt), Ok(terminate), Ok(hangup)] = &mut stopped else {
        return Err(Failure::message(1, "the signals that stop an advance cannot be heard"));
    };
    let was_stopped = || Failure::message(1, "the advance was stopped; no backup was made");
    // What is under way removes its scratch place where it is dropped.
    tokio::select! {
        result = advance(args, context) => result,
        _ = interrupt.recv() => Err(was_stopped()),
        _ = terminate.recv() => Err(was_stopped()),
        _ = hangup.recv() => Err(was_stopped()),
    }
}

async fn advance(args: Args, context: &Context) -> Result<(), Failure> {
    let (archive, layout) = (context.archive().await?, context.layout()?);
    let catalog = context.catalog(&archive, &layout).await?;
    let backup = args.backup.as_deref().map(|text| find_backup(&catalog, text)).transpose()?;
    let backup = backup.map(|entry| entry.head.id.clone());
    let goal = goal(&args);
    let plan = make_plan(&archive, &layout, &catalog, &goal, backup.as_ref()).await?;
    let memory = usize::try_from(args.memory).unwrap_or(usize::MAX);
    let search_failure = |e: SearchError| {
        let status = if e.is_damage() { 3 } else { 1 };
        Failure::from(e).status(status)
    };
    let (native, handed_over) = (ReplayMode::Native, ReplayMode::Server);
    let chosen = choose_replay(&archive, &layout, &catalog, &plan, native, handed_over, memory).await;
    let chosen = match (chosen.map_err(search_failure)?, args.to) {
        // A backup of a later checkpoint would be no base for that time.
        (Replay::Native(forward), Some(Until::Time(by))) => {
            forward.made_by(by).await.map_err(search_failure)?
        }
        (chosen, _) => chosen,
    };
    let (forward, point) = match chosen {
        Replay::Native(forward) => {
            let point = forward.hand_over().expect("it was not asked to end anywhere else");
            (forward, point)
        }
        Replay::Server(why) => return Err(cannot(&plan, &why.unwrap_or_default())),
    };
    let mut told = Told {
        dry_run: args.dry_run,
        from: &plan.backup,
        to: point,
        segments: plan.segments.len(),
        wal_bytes: forward.wal_bytes(),
        scratch_bytes: plan.base_bytes,
        replayed: None,
        backup: None,
    };
    if args.dry_run {
        return output::answer(context, &told, || format!("{}nothing was touched", text(&told)));
    }
    let request = AdvanceRequest {
        archive: archive.clone(),
        layout: layout.clone(),
        cache: context.cache_path(&archive),
        backup: plan.backup.clone(),
        description: args.description.clone(),
        refuse_damaged_pages: args.damaged_pages == DamagedPages::Refuse,
        threads: context.threads,
        level: args.compression_level.or(context.config.compression_level).unwrap_or(DEFAULT_LEVEL),
    };
    let advance = Advance::begin(request, &catalog.system).await.map_err(backup_failure)?;
    let scratch = args.scratch.clone().unwrap_or_else(std::env::temp_dir);
    let done = async {
        let place = ScratchPlace::for_files(&scratch, advance.id().as_str()).map_err(scratch_failure)?;
        let made = made_before(&archive, &layout, &catalog, &plan, point.redo).await?;
        let options = options(context, &plan, &made, &place, Replay::Native(forward));
        let restore = Restore::prepare(&archive, &layout, &plan, options)
            .await
            .map_err(|e| restore_failure(&plan, e))?;
        let progress = context.progress();
        let brought = restore.bring_forward(&progress).await.map_err(|e| restore_failure(&plan, e))?;
        Ok((place, made, brought))
    };
    let (place, made, brought) = match done.await {
        Ok(done) => done,
        Err(e) => {
            advance.give_up().await;
            return Err(e);
        }
    };
    let files = AdvancedFiles {
        data_dir: place.data_dir(),
        tablespaces: plan.tablespaces.iter().cloned().chain(made).collect(),
        line: plan.lineage.clone(),
        backup_label: brought.backup_label,
    };
    let progress = context.progress();
    let stored: Backup = advance.store(&catalog, files, &progress).await.map_err(backup_failure)?;
    drop(progress);
    drop(place);
    for warning in &stored.warnings {
        tracing::warn!("{warning}");
    }
    (told.replayed, told.backup) = (Some(&brought.replayed), Some(Answer::new(&stored)));
    output::answer(context, &told, || text(&told))
}

/// What makes the planner find the newest backup and the WAL behind it.
fn goal(args: &Args) -> Goal {
    let (target, inclusive) = match args.to {
        None => (Target::Latest, true),
        Some(Until::Lsn(lsn)) => (Target::Lsn(lsn), false),
        Some(Until::Time(time)) => (Target::Time(time), false),
    };
    Goal { target, inclusive, timeline: args.target_timeline, action: TargetAction::default() }
}

/// The tablespaces that the log makes before a position and the backup does not have, where it says.
async fn made_before(
    archive: &Archive,
    layout: &Layout,
    catalog: &Catalog,
    plan: &Plan,
    until: Lsn,
) -> Result<Vec<Tablespace>, Failure> {
    let mut before = plan.clone();
    before.stop.read_to = until;
    let mut made = made_tablespaces(archive, layout, catalog, &before).await.map_err(|e| {
        let status = if e.is_damage() { 3 } else { 1 };
        Failure::from(e).status(status)
    })?;
    made.retain(|t| !plan.tablespaces.iter().any(|there| there.oid == t.oid));
    made.dedup_by_key(|t| t.oid);
    Ok(made)
}

/// Everything into the scratch place, tablespaces that the log makes too.
fn options(
    context: &Context,
    plan: &Plan,
    made: &[Tablespace],
    place: &ScratchPlace,
    replay: Replay,
) -> RestoreOptions {
    let space = |oid: u32| place.path().join("tablespaces").join(oid.to_string());
    let here = |t: &Tablespace| Tablespace { oid: t.oid, path: space(t.oid).display().to_string() };
    RestoreOptions {
        data_dir: place.data_dir(),
        tablespace_map: plan.tablespaces.iter().map(|t| (t.oid.to_string(), space(t.oid))).collect(),
        made: made.iter().map(here).collect(),
        allow_clear: false,
        delta: false,
        standby: false,
        replay,
        archive_off: true,
        owner: None,
        restore_command: String::new(),
        settings: Vec::new(),
        selection: None,
        threads: context.threads,
        files_only: true,
    }
}

fn cannot(plan: &Plan, why: &str) -> Failure {
    Failure::message(1, format!("backup {} cannot be advanced: {why}", plan.backup))
}

fn scratch_failure(e: ScratchError) -> Failure {
    Failure::from(e).status(1)
}

fn restore_failure(plan: &Plan, e: RestoreError) -> Failure {
    match e {
        RestoreError::Unknown(unknown) => {
            cannot(plan, &unknown.to_string()).hint("--to before that; or take a new backup of the database")
        }
        RestoreError::Forward(e) => {
            let status = if e.is_damage() { 3 } else { 1 };
            Failure::failed(format!("backup {} cannot be advanced: native replay failed", plan.backup), e)
                .status(status)
        }
        e => {
            let status = if e.is_damage() { 3 } else { 1 };
            Failure::from(e).status(status)
        }
    }
}

fn backup_failure(e: BackupError) -> Failure {
    let status = if e.is_damage() { 3 } else { 1 };
    Failure::from(e).status(status)
}

fn text(told: &Told<'_>) -> String {
    let Point { redo, checkpoint, timeline, time, .. } = told.to;
    let mut text = format!(
        "from      backup {}\nto        {redo} on timeline {timeline}, the redo point of the checkpoint at {checkpoint}, {}\n\
         replay    {} of WAL in {} segments\nscratch   {}\n",
        told.from,
        output::time(time),
        output::bytes(told.wal_bytes),
        told.segments,
        output::bytes(told.scratch_bytes),
    );
    if let Some(replayed) = told.replayed {
        text.push_str(&format!(
            "replayed  {} records: {}, {} changes kept, {} pages written, in {}\n",
            replayed.records,
            replayed.segments(),
            replayed.changes,
            replayed.pages,
            output::duration(replayed.scan_seconds + replayed.apply_seconds)
        ));
    }
    if let Some(backup) = &told.backup {
        text.push_str(&backup.text());
    }
    text
}
