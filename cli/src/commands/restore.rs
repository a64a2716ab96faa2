//! `waltide restore`, also called `restore-pitr`: a cluster as it was at a moment.

use std::path::PathBuf;
use std::sync::Arc;

use jiff::tz::TimeZone;
use serde::Serialize;
use waltide_format::archive::{Catalog, DrillRecord, Envelope, Layout, ObjectKind, Rates};
use waltide_format::engines::postgres::catalogue::TablePattern;
use waltide_format::{BackupId, Lsn, TimestampTz, Xid};
use waltide_replay::engines::postgres::{
    Actions, ArchivedIndexes, ChosenDatabases, DatabasesError, MomentError, Outcome, Owner, Reads, Replay,
    ReplayMode, Restore, RestoreError, RestoreOptions, Restored, Server, choose_databases, choose_replay,
    find_moment, made_tablespaces, restore_command,
};
use waltide_replay::{
    Goal, Loss, MomentRequest, Plan, PlanError, Target, TargetAction, TargetTimeline, plan,
};
use waltide_storage::Archive;

use super::log::size;
use crate::context::{Context, named_backup};
use crate::exit::Failure;
use crate::output;

/// No drill's record is larger.
const DRILL_BYTES_MAX: u64 = 1 << 20;
/// So many of the last drills say how fast things go.
const DRILLS: usize = 5;

/// Restore the cluster as it was at a time, transaction, LSN or restore point
///
/// A plan is made first: the base backup, the WAL, the exact position at which PostgreSQL will stop, or why the target
/// cannot be reached and which near it can. Nothing is touched before that. The cluster is left ready to start;
/// PostgreSQL's own recovery then brings it to the target, with `waltide fetch` as its restore_command (but see --finish).
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where the cluster goes
    #[arg(long, short = 'D', value_name = "DIR")]
    data_dir: PathBuf,
    /// What and how
    #[command(flatten)]
    goal: GoalArgs,
    /// Start from this backup instead of the best one
    #[arg(long, value_name = "BACKUP")]
    backup: Option<String>,
    /// Put a tablespace elsewhere: the place it lay at or its OID, and the new place. Repeatable
    #[arg(long, value_name = "OLD=NEW", value_parser = mapping)]
    tablespace_map: Vec<(String, PathBuf)>,
    /// Delete what lies in the data directory and the tablespaces' places [env: BACKUP_ALLOW_CLEAR=true]
    #[arg(long)]
    allow_clear: bool,
    /// Keep what is there and the same, and rewrite only what differs
    #[arg(long)]
    delta: bool,
    /// Make it a standby that follows the archive; takes no target
    #[arg(long, conflicts_with = "moment")]
    standby: bool,
    /// Restore this database, those that initdb makes and what all share; of others nothing is read. Repeatable
    #[arg(long, value_name = "NAME")]
    database: Vec<String>,
    /// How the WAL is replayed: native as far as possible, native or not at all, or by PostgreSQL alone
    #[arg(long, value_name = "auto|native|server", default_value = "auto")]
    replay: ReplayMode,
    /// Who goes on to the target where the WAL is replayed natively: PostgreSQL from the last checkpoint before it, or native
    /// replay itself, where that is possible (auto) or else not at all; the server then starts as after a shutdown
    #[arg(long, value_name = "auto|native|server", default_value = "server")]
    finish: ReplayMode,
    /// So much of the WAL native replay keeps in memory; the rest goes to a file
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = size)]
    memory: u64,
    /// Whether the restored server archives its WAL [default: preserve; off with --database]
    #[arg(long, value_name = "off|preserve", value_parser = ["off", "preserve"])]
    archive_mode: Option<String>,
    /// Whose the files will be: a user, or uid:gid; unless given the owner of the directory, or postgres
    #[arg(long, value_name = "USER", value_parser = owner)]
    owner: Option<Owner>,
    /// Print the plan and what would be deleted and written, and touch nothing
    #[arg(long)]
    dry_run: bool,
    /// Start the server and watch it until it has reached the target
    #[arg(long)]
    start: bool,
    /// Where PostgreSQL's programs lie [default: /usr/lib/postgresql/MAJOR/bin, or the PATH]
    #[arg(long, value_name = "DIR")]
    pg_bin: Option<PathBuf>,
}

/// A target in PostgreSQL's words; the end of the archived WAL unless one is given.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("moment"))]
pub(crate) struct GoalArgs {
    /// To a time: RFC 3339, PostgreSQL's form, or @UNIX; in the local time zone where it names none
    #[arg(long, group = "moment", visible_alias = "recovery-target-time", value_name = "TIME", value_parser = time)]
    target_time: Option<TimestampTz>,
    /// To a time in seconds since 1970
    #[arg(long, group = "moment", value_name = "UNIX", value_parser = unix_time)]
    timestamp: Option<TimestampTz>,
    /// To the end of a transaction
    #[arg(long, group = "moment", visible_aliases = ["recovery-target-txid", "recovery-target-xid", "target-txid"], value_name = "XID")]
    target_xid: Option<Xid>,
    /// To just before the end of a transaction
    #[arg(long, group = "moment", value_name = "XID")]
    before_xid: Option<Xid>,
    /// To just before a table was dropped: table, schema.table or database.schema.table, as in SQL
    #[arg(long, group = "moment", value_name = "TABLE")]
    before_drop: Option<TablePattern>,
    /// To just before a table was truncated
    #[arg(long, group = "moment", value_name = "TABLE")]
    before_truncate: Option<TablePattern>,
    /// Of --before-drop and --before-truncate: the last time it happened by then [default: the last time of all]
    #[arg(long, value_name = "TIME", value_parser = time, conflicts_with_all = ["target_time", "timestamp", "target_xid", "before_xid", "target_lsn", "target_name", "target"])]
    until: Option<TimestampTz>,
    /// To an LSN
    #[arg(long, group = "moment", visible_alias = "recovery-target-lsn", value_name = "LSN")]
    target_lsn: Option<Lsn>,
    /// To a restore point
    #[arg(long, group = "moment", visible_alias = "recovery-target-name", value_name = "NAME")]
    target_name: Option<String>,
    /// To the end of the archived WAL, or to the earliest moment the backup allows
    #[arg(long, group = "moment", visible_alias = "recovery-target", value_name = "latest|immediate", value_parser = ["latest", "immediate"])]
    target: Option<String>,
    /// Along a timeline: latest, current (the backup's own) or a number
    #[arg(long, visible_alias = "recovery-target-timeline", value_name = "TIMELINE", default_value_t)]
    target_timeline: TargetTimeline,
    /// Leave the target itself out
    #[arg(long)]
    target_exclusive: bool,
    /// What the server does at the target: promote, pause or shutdown
    #[arg(long, visible_alias = "recovery-target-action", value_name = "ACTION", default_value = "promote")]
    target_action: TargetAction,
}

/// The new place is an absolute path, and the old one may have `=` in it.
fn mapping(text: &str) -> Result<(String, PathBuf), String> {
    let at = text.find("=/").or_else(|| text.find('=')).ok_or("write OLD=NEW")?;
    let (from, to) = text.split_at(at);
    Ok((from.to_owned(), PathBuf::from(to.trim_start_matches('='))))
}

fn owner(text: &str) -> Result<Owner, String> {
    Owner::parse(text).ok_or_else(|| format!("there is no user {text:?}"))
}

pub(super) fn time(text: &str) -> Result<TimestampTz, String> {
    time_in(text, TimeZone::try_system().ok(), std::env::var("TZ").ok())
}

/// A time where the machine's zone is `system`, and `TZ` is `named`.
fn time_in(text: &str, system: Option<TimeZone>, named: Option<String>) -> Result<TimestampTz, String> {
    let read = |zone: &TimeZone| TimestampTz::parse_in(text, zone).map_err(|e| e.to_string());
    match (system, named.filter(|name| !name.is_empty())) {
        (Some(zone), _) => read(&zone),
        // Who names a zone that nobody knows does not mean UTC.
        (None, Some(name)) => {
            let moment = read(&TimeZone::UTC)?;
            match read(&TimeZone::fixed(jiff::tz::offset(1)))? == moment {
                true => Ok(moment),
                false => {
                    Err(format!("{text:?} has no offset, and TZ is {name:?}, which is no time zone: say one"))
                }
            }
        }
        (None, None) => read(&TimeZone::UTC),
    }
}

fn unix_time(text: &str) -> Result<TimestampTz, String> {
    let text = text.trim();
    time(&format!("@{}", text.strip_prefix('@').unwrap_or(text)))
}

impl GoalArgs {
    /// The moment that was asked for by a table's name, if it was.
    fn moment(&self) -> Result<Option<MomentRequest>, Failure> {
        let (loss, table) = match (&self.before_drop, &self.before_truncate) {
            (Some(table), _) => (Loss::Drop, table),
            (None, Some(table)) => (Loss::Truncate, table),
            (None, None) if self.until.is_some() => {
                return Err(Failure::usage("--until goes with --before-drop or --before-truncate"));
            }
            (None, None) => return Ok(None),
        };
        Ok(Some(MomentRequest { loss, table: table.clone(), until: self.until }))
    }

    /// Refuses what contradicts itself, before anything is looked at.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        match self.moment()? {
            Some(_) => Ok(()),
            None => self.plain_goal().map(|_| ()),
        }
    }

    /// Whether what is archived last matters to the target.
    pub(crate) fn is_open_ended(&self) -> Result<bool, Failure> {
        Ok(self.moment()?.is_some() || matches!(self.plain_goal()?.target, Target::Latest | Target::Time(_)))
    }

    /// The target that was asked for, looked for in the archive where it is named by a table.
    pub(crate) async fn goal(
        &self,
        archive: &Archive,
        layout: &Layout,
        catalog: &Catalog,
    ) -> Result<Goal, Failure> {
        let Some(request) = self.moment()? else { return self.plain_goal() };
        let found = find_moment(archive, layout, catalog, self.target_timeline, &request).await;
        let moment = found.map_err(|e| {
            let status = match &e {
                MomentError::Plan(e) => plan_status(e),
                MomentError::Ambiguous { .. } => 2,
                MomentError::Names(_) if e.is_damage() => 3,
                MomentError::Names(_) | MomentError::NotFound { .. } => 1,
            };
            Failure::from(e).status(status)
        })?;
        Ok(Goal { timeline: self.target_timeline, action: self.target_action, ..Goal::before(moment) })
    }

    fn plain_goal(&self) -> Result<Goal, Failure> {
        let time = self.target_time.or(self.timestamp).map(Target::Time);
        let xid = self.target_xid.or(self.before_xid).map(Target::Xid);
        let name = self.target_name.clone().map(Target::Name);
        let target = time.or(xid).or(self.target_lsn.map(Target::Lsn)).or(name);
        let target = target.unwrap_or(match self.target.as_deref() {
            Some("immediate") => Target::Immediate,
            _ => Target::Latest,
        });
        let goal = Goal {
            target,
            inclusive: !self.target_exclusive && self.before_xid.is_none(),
            timeline: self.target_timeline,
            action: self.target_action,
        };
        goal.check().map_err(|e| Failure::usage(e.to_string()))?;
        Ok(goal)
    }
}

/// What was planned and what was done.
#[derive(Debug, Serialize)]
struct Answer<'a> {
    dry_run: bool,
    plan: &'a Plan,
    actions: &'a Actions,
    part: Option<&'a Part>,
    restored: Option<&'a Restored>,
    outcome: Option<&'a Outcome>,
}

/// What is restored where that is not everything, and what that reads.
#[derive(Debug, Serialize)]
struct Part {
    #[serde(flatten)]
    databases: ChosenDatabases,
    reads: Reads,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<(), Failure> {
    args.goal.check()?;
    if !args.database.is_empty() {
        check_part(&args)?;
    }
    if args.finish == ReplayMode::Native {
        check_finish(&args)?;
    }
    let (archive, layout) = (context.archive().await?, context.layout()?);
    let catalog = context.catalog(&archive, &layout).await?;
    let goal = args.goal.goal(&archive, &layout, &catalog).await?;
    let backup = named_backup(&catalog, args.backup.as_deref())?;
    let mut plan = make_plan(&archive, &layout, &catalog, &goal, backup.as_ref()).await?;
    let made = made_tablespaces(&archive, &layout, &catalog, &plan).await;
    let made = made.map_err(|e| {
        let status = if e.is_damage() { 3 } else { 1 };
        Failure::from(e).status(status)
    })?;
    // A standby goes on replaying. Of a part the server that recovers tells what is missing.
    let handed_over = args.standby || !args.database.is_empty();
    let finish = if handed_over { ReplayMode::Server } else { args.finish };
    let replay = choose(&archive, &layout, &catalog, &plan, (args.replay, finish), args.memory).await?;
    let databases = match args.database.is_empty() {
        true => None,
        false => {
            let chosen = choose_databases(&archive, &layout, &catalog, &plan, &args.database).await;
            Some(chosen.map_err(|e: DatabasesError| {
                let status = if e.is_damage() { 3 } else { 1 };
                Failure::from(e).status(status)
            })?)
        }
    };
    let archive_mode = args.archive_mode.as_deref();
    // Its WAL would pass for the whole cluster's.
    let archive_mode = archive_mode.unwrap_or(if databases.is_some() { "off" } else { "preserve" });
    let options = RestoreOptions {
        selection: databases.as_ref().and_then(ChosenDatabases::selection),
        replay,
        data_dir: args.data_dir,
        tablespace_map: args.tablespace_map,
        made,
        allow_clear: args.allow_clear || context.env("BACKUP_ALLOW_CLEAR").is_some_and(|v| v == "true"),
        delta: args.delta,
        standby: args.standby,
        archive_off: archive_mode == "off",
        owner: args.owner,
        restore_command: own_restore_command(context)?,
        settings: Vec::new(),
        threads: context.threads,
        files_only: false,
    };
    let restore = Restore::prepare(&archive, &layout, &plan, options).await.map_err(failed)?;
    plan.estimate = restore.way().estimate(&plan);
    let actions = restore.actions();
    let selection = databases.as_ref().and_then(ChosenDatabases::selection);
    let part = match databases {
        Some(databases) => Some(Part { databases, reads: restore.reads().map_err(failed)? }),
        None => None,
    };
    let part = part.as_ref();
    let server = match args.start {
        true => Some(Server::find(args.pg_bin.as_deref(), plan.major, actions.owner)?),
        false => None,
    };
    if args.dry_run {
        let answer = Answer { dry_run: true, plan: &plan, actions, part, restored: None, outcome: None };
        let part = part.map_or(String::new(), |p| format!("{}read      {}\n", p.databases, p.reads));
        return output::answer(context, &answer, || format!("{plan}{part}{actions}nothing was touched"));
    }
    let progress = context.progress();
    let absent = part.and_then(|p| p.databases.note());
    for note in plan.notes.iter().chain(&actions.notes).chain(&absent) {
        tracing::warn!("{note}");
    }
    // How long a part takes is not known.
    if part.is_none() {
        progress.expect(&plan.estimate.phases(server.is_some()));
    }
    let restored = restore.carry_out(&progress).await.map_err(failed)?;
    let from = restored.replayed.as_ref().map_or(plan.start_lsn, |replayed| replayed.redo);
    let mut outcome = None;
    if let Some(server) = server {
        let (data_dir, plan, progress) = (actions.data_dir.clone(), plan.clone(), Arc::clone(&progress));
        let started = tokio::task::spawn_blocking(move || {
            server.start(&data_dir, &plan, from, selection.as_ref(), args.standby, progress.as_ref())
        });
        outcome = Some(started.await.map_err(|e| Failure::failed("the server could not be watched", e))??);
    }
    drop(progress);
    let (done, outcome) = (Some(&restored), outcome.as_ref());
    let answer = Answer { dry_run: false, plan: &plan, actions, part, restored: done, outcome };
    output::answer(context, &answer, || told(&plan, part, &restored, outcome))?;
    match outcome {
        Some(Outcome { missing_page: Some(line), .. }) => {
            let text = format!("recovery needed a page of what was restored, which is not there: {line}");
            Err(Failure::message(3, text)
                .hint("run `waltide verify`, and restore everything, without --database"))
        }
        Some(Outcome { as_planned: Some(false), reached_lsn: Some(reached), .. }) => {
            let text = format!("recovery ended at {reached}, planned was {}", plan.stop.lsn);
            Err(Failure::message(1, text).hint("look at the server's log before you use this cluster"))
        }
        _ => Ok(()),
    }
}

/// Refuses what does not go with native replay to the target.
fn check_finish(args: &Args) -> Result<(), Failure> {
    if args.standby {
        return Err(Failure::usage("--finish native goes to a target, and --standby has none"));
    }
    if !args.database.is_empty() {
        return Err(Failure::usage("--finish native restores everything, and --database a part"));
    }
    if args.replay == ReplayMode::Server {
        return Err(Failure::usage("--finish native is native replay, and --replay server is none"));
    }
    Ok(())
}

/// Refuses what does not go with a part of a cluster.
fn check_part(args: &Args) -> Result<(), Failure> {
    if args.standby {
        return Err(Failure::usage(
            "--database restores a part of the cluster, and a standby follows all of it",
        ));
    }
    if args.delta {
        let text = "--database leaves the files of other databases empty, and --delta keeps what is there";
        return Err(Failure::usage(text).hint("restore into an empty place, or with --allow-clear alone"));
    }
    Ok(())
}

/// How to come to the plan's target: how the log is replayed, and who goes on to its end. A failure where that is to be native
/// and cannot be.
pub(super) async fn choose(
    archive: &Archive,
    layout: &Layout,
    catalog: &Catalog,
    plan: &Plan,
    (mode, finish): (ReplayMode, ReplayMode),
    memory: u64,
) -> Result<Replay, Failure> {
    let memory = usize::try_from(memory).unwrap_or(usize::MAX);
    let chosen = choose_replay(archive, layout, catalog, plan, mode, finish, memory).await;
    let chosen = chosen.map_err(|e| {
        let status = if e.is_damage() { 3 } else { 1 };
        Failure::from(e).status(status)
    })?;
    match &chosen {
        Replay::Server(Some(reason)) if finish == ReplayMode::Native => {
            Err(Failure::message(1, format!("the WAL cannot be replayed natively to the target: {reason}"))
                .hint("restore with --finish auto or --finish server"))
        }
        Replay::Server(Some(reason)) if mode == ReplayMode::Native => {
            Err(Failure::message(1, format!("the WAL cannot be replayed natively: {reason}"))
                .hint("restore with --replay auto or --replay server"))
        }
        _ => Ok(chosen),
    }
}

/// The plan, or a failure that says whose fault it is.
pub(crate) async fn make_plan(
    archive: &Archive,
    layout: &Layout,
    catalog: &Catalog,
    goal: &Goal,
    backup: Option<&BackupId>,
) -> Result<Plan, Failure> {
    let rates = measured_rates(archive, layout, catalog).await;
    let names = layout.system(catalog.system.system_id);
    let source = ArchivedIndexes::new(archive.clone()).with_merged(names);
    plan(catalog, goal, backup, rates, &source).await.map_err(|e| {
        let status = plan_status(&e);
        Failure::from(e).status(status)
    })
}

const fn plan_status(e: &PlanError) -> u8 {
    match e {
        PlanError::Goal(_) | PlanError::UnknownBackup { .. } | PlanError::NoTimeline { .. } => 2,
        PlanError::NoBackup { .. } | PlanError::Unreachable(_) | PlanError::Source(_) => 3,
    }
}

/// How fast the last drills were. An archive without any, or with ones that cannot be read, has none.
pub(super) async fn measured_rates(archive: &Archive, layout: &Layout, catalog: &Catalog) -> Rates {
    let dir = layout.system(catalog.system.system_id).drills();
    let listed = archive.list_names(&dir).await.unwrap_or_default();
    let mut drills: Vec<DrillRecord> = Vec::new();
    for object in listed.objects.iter().rev().take(DRILLS) {
        if let Ok(bytes) = archive.get(&object.path, DRILL_BYTES_MAX).await {
            drills.extend(Envelope::open_json::<DrillRecord>(&bytes, ObjectKind::Json));
        }
    }
    Rates::from_drills(&drills)
}

/// `restore-pitr` lies beside `waltide`, and only that one fetches.
pub(crate) fn own_restore_command(context: &Context) -> Result<String, Failure> {
    let program = std::env::current_exe()?.with_file_name("waltide");
    if !program.is_file() {
        return Err(Failure::message(1, format!("{} is not there", program.display()))
            .hint("PostgreSQL's recovery needs it as restore_command: install it beside restore-pitr"));
    }
    restore_command(&program, &context.own_arguments()?)
        .ok_or_else(|| Failure::message(1, "the program's path cannot stand in a setting of PostgreSQL"))
}

fn failed(e: RestoreError) -> Failure {
    let status = if e.is_damage() { 3 } else { 1 };
    Failure::from(e).status(status)
}

fn told(plan: &Plan, part: Option<&Part>, restored: &Restored, outcome: Option<&Outcome>) -> String {
    let mut text = plan.to_string();
    if let Some(Part { databases, reads }) = part {
        let (read, whole) = (output::bytes(restored.read_bytes), output::bytes(reads.whole_bytes));
        text.push_str(&format!("{databases}read      {read} of the backup's packs; all of it is {whole}\n"));
    }
    text.push_str(&format!(
        "restored  {} files, {} in {} to {}\n",
        restored.files,
        output::bytes(restored.bytes),
        output::duration(restored.seconds),
        restored.data_dir.display()
    ));
    if let Some(replayed) = &restored.replayed {
        text.push_str(&format!(
            "replayed  {} records natively to {}: {}, {} changes kept, {} pages written, in {}\n",
            replayed.records,
            replayed.redo,
            replayed.segments(),
            replayed.changes,
            replayed.pages,
            output::duration(replayed.scan_seconds + replayed.apply_seconds)
        ));
    }
    match outcome {
        None if restored.replayed.as_ref().is_some_and(|replayed| replayed.finished) => {
            text.push_str("next      start the server: it is at the target, and has nothing to recover\n");
        }
        None => text.push_str("next      start the server: it recovers to the target by itself\n"),
        Some(outcome) => {
            let at = outcome.reached_lsn.map_or(String::new(), |lsn| format!(" at {lsn}"));
            let timeline = outcome.timeline.map_or(String::new(), |t| format!(" on timeline {t}"));
            let time =
                outcome.last_xact_time.as_ref().map_or(String::new(), |t| format!(", last transaction {t}"));
            let state = output::word(&outcome.state).replace('_', " ");
            let seconds = output::duration(outcome.seconds);
            text.push_str(&format!("server    {state}{at}{timeline}{time}, after {seconds}\n"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tablespace_is_mapped_to_an_absolute_path_whatever_its_old_one_is_called() {
        let map = |text| mapping(text).map(|(from, to)| (from, to.to_str().unwrap().to_owned()));
        for (text, from, to) in [
            ("/a=/b", "/a", "/b"),
            ("/a = b=/c=d", "/a = b", "/c=d"),
            ("16410=/b", "16410", "/b"),
            ("/a=b", "/a", "b"),
        ] {
            assert_eq!(map(text), Ok((from.to_owned(), to.to_owned())), "{text}");
        }
        assert!(map("/a").is_err());
    }

    #[test]
    fn a_zone_that_nobody_knows_is_not_taken_for_utc() {
        let bogus = || Some("Bogus/Zone".to_owned());
        let refused = time_in("2026-01-31 12:00:00", None, bogus()).unwrap_err();
        assert_eq!(
            refused,
            "\"2026-01-31 12:00:00\" has no offset, and TZ is \"Bogus/Zone\", which is no time zone: say one"
        );
        for (text, zone, named) in [
            ("2026-01-31 12:00:00+02", None, bogus()),
            ("@1769853600", None, bogus()),
            ("2026-01-31 10:00:00", None, None),
            ("2026-01-31 12:00:00", TimeZone::get("Europe/Helsinki").ok(), bogus()),
        ] {
            assert_eq!(time_in(text, zone, named).unwrap().to_string(), "2026-01-31 10:00:00+00", "{text}");
        }
    }
}
