//! `waltide drill`: restores to a scratch place, starts the real server there, asks it, and measures all of it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, SimpleQueryMessage};
use waltide_format::archive::{
    Catalog, DrillCommit, DrillRecord, DrillVerdict, Layout, Lineage, Rates, Run, XactEnd,
};
use waltide_format::engines::postgres::cluster::ControlFile;
use waltide_format::{BLOCK_BYTES, BackupId, Lsn, TimelineId, TimestampTz, Xid};
use waltide_storage::{Archive, Progress};

use super::amcheck::Complaints;
use super::forward::{Replay, ReplayMode, Replayed, choose_replay};
use super::indexes::{ArchivedIndexes, SearchError};
use super::install::{InstallError, Installation, ServerUser};
use super::pages::check_pages;
use super::restore::{Restore, RestoreError, RestoreOptions};
use super::scratch_cluster::{self, Reached};
use super::scratch_server::{ScratchError, ScratchPlace, ScratchServer};
use super::scratch_settings::{ScratchSettings, memory_bytes};
use super::tablespaces::{self, Redirected};
use crate::drill::{Checks, Dice, Stopwatch, now, random_seed};
use crate::plan::{Plan, PlanError, plan, reachable_windows};
use crate::resolve::{Source as _, StopKind};
use crate::target::{Goal, Target, TargetTimeline};

/// PostgreSQL's superuser unless initdb was told otherwise.
const SUPERUSER: &str = "postgres";
/// Databases to ask questions of no database in, in order.
const DATABASES: [&str; 2] = ["postgres", "template1"];
/// Room for what recovery itself writes.
const SPARE_BYTES: u64 = 64 << 20;
/// As much of a program's output as is worth telling.
const OUTPUT_LINES: usize = 20;

/// What to drill, and how.
#[derive(Debug, Clone)]
pub struct DrillRequest {
    /// The target. Its action is promotion, whatever it says: checks may have to write.
    pub goal: Goal,
    /// The backup to start from; the newest that reaches the target unless named.
    pub backup: Option<BackupId>,
    /// `[db:]SQL`: each passes when its single value is true or a number other than zero.
    pub checks: Vec<String>,
    /// Below which directory the scratch place is made.
    pub scratch: PathBuf,
    /// Whether it stays.
    pub keep_scratch: bool,
    /// Where the programs of PostgreSQL lie.
    pub pg_bin: Option<PathBuf>,
    /// `shared_preload_libraries` of the scratch server.
    pub preload: String,
    /// The superuser to ask as.
    pub user: String,
    /// `statement_timeout` of the checks.
    pub statement_timeout: Duration,
    /// How many threads to work with.
    pub threads: usize,
    /// How the WAL is replayed.
    pub replay: ReplayMode,
    /// Whether native replay goes on to the target; where it does, the WAL is replayed natively.
    pub finish: ReplayMode,
    /// So many bytes of WAL native replay keeps in memory.
    pub memory: usize,
    /// The command that brings WAL, with `%f` and `%p`.
    pub restore_command: String,
    /// What chose the target, where chance did.
    pub seed: Option<u64>,
    /// The first drill of the same call.
    pub series: Option<String>,
    /// When the work began, if before the call.
    pub began: Option<Instant>,
}

impl DrillRequest {
    /// A drill of `goal` that asks as `postgres` and works below the directory for temporary files.
    pub fn new(goal: Goal, restore_command: String) -> Self {
        Self {
            goal,
            backup: None,
            checks: Vec::new(),
            scratch: std::env::temp_dir(),
            keep_scratch: false,
            pg_bin: None,
            preload: String::new(),
            user: SUPERUSER.to_owned(),
            statement_timeout: Duration::from_secs(3600),
            threads: 1,
            replay: ReplayMode::Server,
            finish: ReplayMode::Server,
            memory: 1 << 30,
            restore_command,
            seed: None,
            series: None,
            began: None,
        }
    }
}

/// Why a drill ended before its checks.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DrillError {
    /// There is no plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The WAL could not be looked through.
    #[error(transparent)]
    Search(#[from] SearchError),
    /// Native replay was asked for and is not possible.
    #[error(
        "the WAL cannot be replayed natively: {because}\nhint: drill with --replay auto or --replay server, without --finish native"
    )]
    Replay {
        /// Why not.
        because: String,
    },
    /// There is no server to start.
    #[error(transparent)]
    Install(#[from] InstallError),
    /// The scratch place or its server failed.
    #[error(transparent)]
    Scratch(#[from] ScratchError),
    /// The files could not be put back.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The server was asked and did not answer.
    #[error("the scratch server does not answer")]
    Ask(#[from] tokio_postgres::Error),
    /// A file of the restored cluster could not be read.
    #[error("cannot read {}", path.display())]
    Local {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The restored pg_control is none.
    #[error("the restored pg_control cannot be read")]
    Control(#[from] waltide_format::engines::postgres::cluster::ControlError),
}

impl DrillError {
    /// Whose fault it is.
    pub fn verdict(&self) -> DrillVerdict {
        let archive = match self {
            Self::Plan(PlanError::Goal(_) | PlanError::UnknownBackup { .. }) => false,
            Self::Plan(PlanError::Source(e)) => {
                e.downcast_ref::<SearchError>().is_none_or(SearchError::is_damage)
            }
            Self::Plan(_) | Self::Control(_) => true,
            Self::Search(e) => e.is_damage(),
            Self::Restore(e) => e.is_damage(),
            Self::Scratch(e) => e.is_damage(),
            Self::Replay { .. } | Self::Install(_) | Self::Ask(_) | Self::Local { .. } => false,
        };
        if archive { DrillVerdict::ArchiveAtFault } else { DrillVerdict::Failed }
    }

    /// The text and what was behind it, and what to do where PostgreSQL's own words do not say so.
    fn told(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(e) = cause {
            let because = e.to_string();
            if !text.contains(&because) {
                text.push_str(&format!("\nbecause: {because}"));
            }
            cause = e.source();
        }
        if let Self::Scratch(ScratchError::Ended { log, .. }) = self
            && log.contains("resource manager with ID")
        {
            text.push_str("\nhint: the WAL needs a library: name it with --preload");
        }
        text
    }
}

/// Where to drill from.
#[derive(Clone, Copy)]
pub struct DrillSource<'a> {
    /// The archive.
    pub archive: &'a Archive,
    /// The names of the cluster's objects.
    pub layout: &'a Layout,
    /// What the archive holds.
    pub catalog: &'a Catalog,
    /// How fast earlier drills were.
    pub rates: Rates,
    /// Who wants to know how far it is.
    pub progress: &'a Arc<dyn Progress>,
}

/// Drills once. Whatever happens is in the record; nothing is left behind but that, unless the request says so.
pub async fn drill(source: DrillSource<'_>, request: &DrillRequest) -> DrillRecord {
    let started = now();
    let mut drill = Drill {
        source,
        request,
        watch: Stopwatch::since(request.began),
        checks: Checks::new(),
        record: empty_record(started, request),
    };
    let result = drill.run().await;
    let Drill { watch, checks, mut record, .. } = drill;
    record.phases = watch.into_phases();
    record.checks = checks.done;
    record.verdict = checks.verdict;
    if let Err(e) = result {
        record.verdict = record.verdict.or(e.verdict());
        record.error = Some(e.told());
    }
    record.ended = now();
    record
}

fn empty_record(started: TimestampTz, request: &DrillRequest) -> DrillRecord {
    DrillRecord {
        id: BackupId::new(started, u16::try_from(random_seed() & 0xFFFF).unwrap_or(0)).to_string(),
        series: request.series.clone(),
        started,
        ended: started,
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        verdict: DrillVerdict::Failed,
        error: None,
        target: request.goal.to_string(),
        seed: request.seed,
        backup: None,
        server_version: None,
        timeline: None,
        end_lsn: None,
        last_commit: None,
        phases: Vec::new(),
        checks: Vec::new(),
        rto_seconds: None,
        rpo_seconds: None,
        restored_bytes: 0,
        restored_files: 0,
        native_bytes: 0,
        wal_bytes: 0,
        segments: 0,
        settings: Vec::new(),
        notes: Vec::new(),
    }
}

struct Drill<'a> {
    source: DrillSource<'a>,
    request: &'a DrillRequest,
    watch: Stopwatch,
    checks: Checks,
    record: DrillRecord,
}

impl Drill<'_> {
    async fn run(&mut self) -> Result<(), DrillError> {
        let DrillSource { archive, catalog, progress, .. } = self.source;
        self.watch.phase("plan");
        progress.phase("plan", None);
        let indexes = ArchivedIndexes::new(archive.clone());
        let goal = &self.request.goal;
        let plan = plan(catalog, goal, self.request.backup.as_ref(), self.source.rates, &indexes).await?;
        self.note_plan(&plan);
        let run = catalog.run(&plan.lineage, plan.start_lsn);
        self.check_wal(&plan, &run);
        let beyond = next_commit(&indexes, &run, plan.stop.lsn).await?;
        let redirected = tablespaces::redirect(&indexes, &run, plan.start_lsn, plan.stop.read_to).await?;
        let install = Installation::find(plan.major, self.request.pg_bin.as_deref())?;
        self.record.server_version = Some(install.version().to_owned());
        let user = ServerUser::find()?;
        let place =
            ScratchPlace::create(&self.request.scratch, &self.record.id, user, self.request.keep_scratch)?;
        let segment_bytes = catalog.system.segment_size.bytes();
        let wal_room = segment_bytes.saturating_mul(8).saturating_add(SPARE_BYTES);
        place.check_room(plan.base_bytes.saturating_add(plan.base_bytes / 20).saturating_add(wal_room))?;

        self.watch.phase("restore");
        let replayed = self.restore(&plan, &place, user, &redirected).await?;
        let from = replayed.as_ref().map_or(plan.start_lsn, |replayed| replayed.redo);
        let but = if replayed.is_some() { ", but for pages that replay makes anew" } else { "" };
        let detail = format!("{} files, {} bytes{but}", plan.base_files, plan.base_bytes);
        self.checks.hold("every checksum of the base backup", true, detail, DrillVerdict::ArchiveAtFault);
        if let Some(replayed) = replayed {
            let Replayed { redo, records, pages, finished, .. } = replayed;
            if finished {
                self.record
                    .notes
                    .push("replay went to the target: the server had nothing to recover".to_owned());
            }
            self.record.native_bytes = redo.bytes_since(plan.start_lsn);
            self.record.notes.push(format!("{records} records were replayed natively to {redo}, {pages} pages written; its time is part of restore's"));
        }

        self.watch.phase("recovery");
        progress.phase("recover", Some(plan.left_from(from)));
        let settings = self.settings(&place, &redirected)?;
        let mut server = ScratchServer::start(&install, &place, &settings)?;
        let recovered = server.wait_ready(|line| {
            if line.contains("restored log file") {
                progress.advance(segment_bytes);
            }
        });
        recovered.await?;
        let client = self.first_answer(&server).await?;
        self.record.rto_seconds = Some(self.watch.seconds());

        self.watch.phase("checks");
        progress.phase("check", None);
        self.checks.begin();
        self.check_position(&client, &plan).await?;
        self.check_commits(&client, &plan, beyond.as_ref()).await?;
        self.end_prepared(&server, &client, &plan).await?;
        drop(client);
        for check in &self.request.checks {
            self.check_sql(&server, check).await;
        }
        self.check_amcheck(&server, &install).await?;
        self.checks.begin();
        server.stop().await?;
        self.check_pages(&place).await
    }

    fn note_plan(&mut self, plan: &Plan) {
        let record = &mut self.record;
        record.backup = Some(plan.backup.clone());
        record.timeline = Some(plan.timeline);
        record.restored_bytes = plan.base_bytes;
        record.restored_files = plan.base_files;
        record.wal_bytes = plan.wal_bytes;
        record.segments = plan.segments.len() as u64;
        record.last_commit =
            plan.last_commit.map(|c| DrillCommit { xid: c.xid.get(), lsn: c.lsn, time: c.time });
        let wanted = match plan.goal.target {
            Target::Latest => Some(record.started),
            Target::Time(time) => Some(time),
            _ => plan.stop.time,
        };
        record.rpo_seconds =
            wanted.zip(plan.last_commit).map(|(wanted, last)| wanted.seconds_since(last.time).max(0.0));
        record.notes.extend(plan.notes.iter().cloned());
        record.notes.push("WAL is fetched while recovery runs; its time is part of recovery's".to_owned());
    }

    /// A target that is reached by leaving archived WAL aside shows that something is missing.
    fn check_wal(&mut self, plan: &Plan, run: &Run<'_>) {
        let catalog = self.source.catalog;
        let end = run.end().unwrap_or_default();
        let past = |e: &&waltide_format::archive::SegmentEntry| {
            let start = e.info.name.start(e.info.size).unwrap_or_default();
            start >= end && plan.lineage.holds(e.info.name.timeline(), start)
        };
        let name = "the archived WAL has no hole";
        let fault = DrillVerdict::ArchiveAtFault;
        let after = catalog.segments.iter().filter(past).min_by_key(|e| e.info.name.start(e.info.size));
        // A target that lies before the hole is whole all the same.
        let matters = plan.stop.kind == StopKind::End;
        match (&run.broken, after) {
            (Some(gap), _) if matters => {
                self.checks.hold(
                    name,
                    false,
                    format!("it ends at {}, {:?} follows", gap.from, gap.kind),
                    fault,
                );
            }
            (None, Some(after)) if matters => {
                let detail = format!("it ends at {end}, and {} is archived behind that", after.info.name);
                self.checks.hold(name, false, detail, fault);
            }
            _ => {
                let detail =
                    format!("{} to {}, {} segments", plan.start_lsn, plan.stop.lsn, plan.segments.len());
                self.checks.hold(name, true, detail, fault);
            }
        }
    }

    /// Puts the base backup into the place, every tablespace in it too.
    async fn restore(
        &mut self,
        plan: &Plan,
        place: &ScratchPlace,
        user: ServerUser,
        redirected: &Redirected,
    ) -> Result<Option<Replayed>, DrillError> {
        let DrillSource { archive, catalog, .. } = self.source;
        let DrillRequest { replay: mode, finish, memory, .. } = *self.request;
        let mode = match (mode, finish) {
            (_, ReplayMode::Native) => ReplayMode::Native,
            (ReplayMode::Server, ReplayMode::Auto) => ReplayMode::Auto,
            (mode, _) => mode,
        };
        let replay = match redirected.segments.is_empty() {
            true => choose_replay(archive, self.source.layout, catalog, plan, mode, finish, memory).await?,
            // Native replay reads the segments as they are archived.
            false => Replay::Server(Some("the WAL makes a tablespace outside the scratch place".to_owned())),
        };
        if let (Replay::Server(Some(because)), false) = (&replay, mode == ReplayMode::Server) {
            if mode == ReplayMode::Native {
                return Err(DrillError::Replay { because: because.clone() });
            }
            self.record.notes.push(format!("PostgreSQL replayed everything: {because}"));
        }
        place.directory("spaces")?;
        let (command, threads) = (self.request.restore_command.clone(), self.request.threads);
        let options = scratch_cluster::restore_options(plan, place.path(), user, command, threads);
        let options = RestoreOptions { replay, ..options };
        let DrillSource { archive, layout, progress, .. } = self.source;
        let restore = Restore::prepare(archive, layout, plan, options).await?;
        progress.expect(&restore.way().estimate(plan).phases(true));
        let restored = restore.carry_out(progress).await?;
        self.record.notes.extend(restored.because);
        Ok(restored.replayed)
    }

    /// What the scratch server is told, out of what the restore left in the data directory.
    fn settings(
        &mut self,
        place: &ScratchPlace,
        redirected: &Redirected,
    ) -> Result<ScratchSettings, DrillError> {
        let backup = self.record.backup.as_ref().and_then(|id| self.source.catalog.backup(id));
        let brought = backup.map(|b| b.head.config_files.as_slice()).unwrap_or_default();
        let cluster = scratch_cluster::settings(place, brought, redirected)?;
        for tablespace in &redirected.tablespaces {
            self.record.notes.push(format!(
                "tablespace {} was made at {} after the backup; in the drill it lies in the data directory",
                tablespace.spc_oid, tablespace.path
            ));
        }
        let mut decided = ScratchSettings::decide(&cluster, &self.request.preload, memory_bytes());
        self.record.settings = std::mem::take(&mut decided.neutralised);
        if !decided.left_out.is_empty() {
            let names = decided.left_out.join(", ");
            self.record.notes.push(format!("left out, of no consequence for what was checked: {names}"));
        }
        if !cluster.unread.is_empty() {
            let names = cluster.unread.join(", ");
            self.record.notes.push(format!("configuration files that the backup does not have: {names}"));
        }
        Ok(decided)
    }

    /// Waits for the first answer of a server that has ended recovery.
    async fn first_answer(&self, server: &ScratchServer) -> Result<Client, DrillError> {
        let mut failed = None;
        for database in DATABASES {
            match server.connect(database, &self.request.user, self.request.statement_timeout).await {
                Ok(client) => {
                    client.simple_query("select not pg_is_in_recovery()").await?;
                    return Ok(client);
                }
                Err(e) => failed = failed.or(Some(e)),
            }
        }
        Err(failed.map_or_else(|| ScratchError::Stuck.into(), DrillError::from))
    }

    /// Whether replay ended where the plan said.
    async fn check_position(&mut self, client: &Client, plan: &Plan) -> Result<(), DrillError> {
        let size = self.source.catalog.system.segment_size;
        let Reached { at, holds, detail } = scratch_cluster::reached(client, plan, size).await?;
        self.record.end_lsn = at;
        self.checks.hold("the target was reached", holds, detail, DrillVerdict::ArchiveAtFault);
        Ok(())
    }

    /// Whether the last commit that the index knows is there, and the next one is not.
    async fn check_commits(
        &mut self,
        client: &Client,
        plan: &Plan,
        beyond: Option<&XactEnd>,
    ) -> Result<(), DrillError> {
        let name = "the last commit of the index is there";
        match &plan.last_commit {
            Some(commit) => {
                let status = xact_status(client, commit.xid).await?;
                let told = format!("transaction {} of {} is {status}", commit.xid, commit.time);
                match status {
                    XactStatus::Forgotten => self.checks.skip(name, told),
                    _ => self.checks.hold(
                        name,
                        status == XactStatus::Known("committed".to_owned()),
                        told,
                        DrillVerdict::ArchiveAtFault,
                    ),
                }
                self.check_commit_time(client, commit.xid, commit.time).await?;
            }
            None => self.checks.skip(name, "the archived WAL up to the target has no commit"),
        }
        if let Some(next) = beyond {
            let status = xact_status(client, next.xid).await?;
            let told = format!("transaction {} of {} is {status}", next.xid, next.time);
            let holds = status != XactStatus::Known("committed".to_owned());
            let name = "the next commit is not there";
            self.checks.hold(name, holds, told, DrillVerdict::ArchiveAtFault);
        }
        Ok(())
    }

    async fn check_commit_time(
        &mut self,
        client: &Client,
        xid: Xid,
        expected: TimestampTz,
    ) -> Result<(), DrillError> {
        let sql = format!(
            "select case when current_setting('track_commit_timestamp') = 'on'
                 then (extract(epoch from pg_xact_commit_timestamp('{xid}'::xid)) * 1000000)::int8 end"
        );
        // A transaction from before the setting was turned on has none.
        let Ok(row) = client.query_one(&sql, &[]).await else { return Ok(()) };
        if let Some(found) = row.get::<_, Option<i64>>(0) {
            let found = TimestampTz::from_unix_micros(found);
            let detail = format!("{found}, in the index {expected}");
            let fault = DrillVerdict::ArchiveAtFault;
            self.checks.hold("its commit time is that of the index", found == expected, detail, fault);
        }
        Ok(())
    }

    /// Rolls back the prepared transaction whose commit the target leaves out: it keeps its tables locked, and no check
    /// could look at them.
    async fn end_prepared(
        &mut self,
        server: &ScratchServer,
        client: &Client,
        plan: &Plan,
    ) -> Result<(), DrillError> {
        let Target::Moment(moment) = &plan.goal.target else { return Ok(()) };
        let xid = moment.xid;
        let sql = format!(
            "select quote_literal(gid), database::text from pg_prepared_xacts where transaction = '{xid}'::xid"
        );
        let Some(row) = client.query_opt(&sql, &[]).await? else { return Ok(()) };
        let (gid, database): (String, String) = (row.get(0), row.get(1));
        let timeout = self.request.statement_timeout;
        let there = server.connect(&database, &self.request.user, timeout).await?;
        there.simple_query(&format!("rollback prepared {gid}")).await?;
        self.record.notes.push(format!("before the checks, ROLLBACK PREPARED {gid} ended transaction {xid}"));
        Ok(())
    }

    /// The prepared transactions that are there: nobody else keeps a lock.
    async fn lock_holders(&self, server: &ScratchServer) -> String {
        let sql = "select format('prepared transaction %L (%s) in database %s', gid, transaction, database)
             from pg_prepared_xacts order by prepared limit 5";
        let asked = async {
            let client = self.first_answer(server).await?;
            Ok::<_, DrillError>(client.query(sql, &[]).await?)
        };
        match asked.await {
            Ok(rows) => rows.iter().map(|row| row.get::<_, String>(0)).collect::<Vec<_>>().join(", "),
            Err(e) => format!("somebody: {}", e.told()),
        }
    }

    async fn check_sql(&mut self, server: &ScratchServer, check: &str) {
        let (database, sql) = split_check(check);
        let answer = async {
            let timeout = self.request.statement_timeout;
            let client = server
                .connect(database, &self.request.user, timeout)
                .await
                .map_err(|e| DrillError::from(e).told())?;
            let rows = match client.simple_query(sql).await {
                Ok(rows) => rows,
                Err(e) => {
                    let told = match e.as_db_error() {
                        Some(e) => format!("{}: {}", e.severity(), e.message()),
                        None => e.to_string(),
                    };
                    return Err(match e.code() {
                        Some(&SqlState::LOCK_NOT_AVAILABLE) => {
                            format!("{told}; held by {}", self.lock_holders(server).await)
                        }
                        _ => told,
                    });
                }
            };
            single_value(&rows)
        };
        let (holds, detail) = match answer.await {
            Ok(value) => (is_true(&value), value),
            Err(why) => (false, why),
        };
        self.checks.hold(check, holds, detail, DrillVerdict::Failed);
    }

    async fn check_amcheck(
        &mut self,
        server: &ScratchServer,
        install: &Installation,
    ) -> Result<(), DrillError> {
        const NAME: &str = "pg_amcheck --heapallindexed";
        let Some(program) = install.program("pg_amcheck") else {
            self.checks.skip(NAME, format!("{} has no pg_amcheck", install.bin().display()));
            return Ok(());
        };
        let client = self.first_answer(server).await?;
        let sql = "select count(*) from pg_available_extensions where name = 'amcheck'";
        let known: i64 = client.query_one(sql, &[]).await?.get(0);
        drop(client);
        if known == 0 {
            self.checks.skip(NAME, "the extension amcheck is not installed");
            return Ok(());
        }
        let mut command = server.client(&program, &self.request.user);
        command.args(["--all", "--install-missing", "--heapallindexed"]);
        command.arg(format!("--jobs={}", self.request.threads.clamp(1, 64)));
        let ran = tokio::task::spawn_blocking(move || command.output()).await;
        let ran = ran.expect("running a program does not panic");
        let output = match ran {
            Ok(output) => output,
            Err(e) => {
                self.checks.hold(NAME, false, format!("it cannot be run: {e}"), DrillVerdict::Failed);
                return Ok(());
            }
        };
        let text = [output.stdout, output.stderr].concat();
        let Complaints { corrupt, locked } = Complaints::read(&String::from_utf8_lossy(&text));
        let shown =
            |lines: &[String]| lines.get(..lines.len().min(OUTPUT_LINES)).unwrap_or_default().join("\n");
        let (holds, fault, detail) = match output.status.code() {
            Some(0) => (true, DrillVerdict::Failed, "no corruption in any table or index".to_owned()),
            // It takes what it could not lock for corrupt.
            Some(2) if corrupt.is_empty() && !locked.is_empty() => {
                (true, DrillVerdict::Failed, "no corruption in any other table or index".to_owned())
            }
            // It is documented to say so for corruption alone.
            Some(2) => (false, DrillVerdict::ArchiveAtFault, shown(&corrupt)),
            _ => (
                false,
                DrillVerdict::Failed,
                format!("it ended with {}: {}", output.status, shown(&[corrupt, locked.clone()].concat())),
            ),
        };
        if !locked.is_empty() {
            let holders = self.lock_holders(server).await;
            let why = format!("{} not looked at, locked by {holders}:\n{}", locked.len(), shown(&locked));
            self.checks.skip("pg_amcheck of what is locked", why);
        }
        self.checks.hold(NAME, holds, detail, fault);
        Ok(())
    }

    async fn check_pages(&mut self, place: &ScratchPlace) -> Result<(), DrillError> {
        let data_dir = place.data_dir();
        let path = data_dir.join("global/pg_control");
        let local = |source| DrillError::Local { path: path.clone(), source };
        let control = ControlFile::decode(&std::fs::read(&path).map_err(local)?)?;
        let name = if control.has_data_checksums() { "every page's checksum" } else { "every page's header" };
        if usize::try_from(control.block_bytes) != Ok(BLOCK_BYTES) {
            self.checks
                .skip(name, format!("pages have {} bytes, {BLOCK_BYTES} are known", control.block_bytes));
            return Ok(());
        }
        let threads = self.request.threads;
        let looked = tokio::task::spawn_blocking(move || check_pages(&data_dir, &control, threads)).await;
        let report = looked.expect("looking at pages does not panic").map_err(local)?;
        let mut detail = format!("{} pages in {} files", report.pages, report.files);
        if report.bad > 0 {
            detail = format!("{} of {detail} are wrong:\n{}", report.bad, report.named.join("\n"));
        }
        self.checks.hold(name, report.bad == 0, detail, DrillVerdict::ArchiveAtFault);
        Ok(())
    }
}

/// The first commit that begins at `stop` or later.
async fn next_commit(
    indexes: &ArchivedIndexes,
    run: &Run<'_>,
    stop: Lsn,
) -> Result<Option<XactEnd>, SearchError> {
    for step in &run.steps {
        let ends = step.entry.info.name.end(step.entry.info.size).unwrap_or(Lsn::MAX);
        if ends <= stop || step.entry.info.commits == 0 {
            continue;
        }
        let events = indexes.events(step.entry).await?;
        let next = |x: &&XactEnd| x.kind.is_commit() && x.start >= stop && x.start < step.usable_end;
        if let Some(found) = events.xacts.iter().find(next) {
            return Ok(Some(found.clone()));
        }
    }
    Ok(None)
}

/// What a server says of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
enum XactStatus {
    /// In its own words: committed, aborted or in progress.
    Known(String),
    /// It is older than what the server remembers.
    Forgotten,
    /// It has not begun.
    Future,
}

impl std::fmt::Display for XactStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Known(status) => status,
            Self::Forgotten => "older than what the server remembers",
            Self::Future => "not begun",
        })
    }
}

async fn xact_status(client: &Client, xid: Xid) -> Result<XactStatus, DrillError> {
    let next = client.query_one("select pg_snapshot_xmax(pg_current_snapshot())::text", &[]).await?;
    let next: u64 = next.get::<_, String>(0).parse().unwrap_or(0);
    let Some(full) = full_xid(xid, next) else { return Ok(XactStatus::Future) };
    let row = client.query_one(&format!("select pg_xact_status('{full}'::xid8)"), &[]).await?;
    Ok(row.get::<_, Option<String>>(0).map_or(XactStatus::Forgotten, XactStatus::Known))
}

/// A transaction's number with its epoch, if it comes before `next`.
fn full_xid(xid: Xid, next: u64) -> Option<u64> {
    let next_low = u32::try_from(next & 0xFFFF_FFFF).unwrap_or(0);
    let back = next_low.wrapping_sub(xid.get());
    // Half of all numbers lie ahead.
    if back == 0 || back > u32::MAX / 2 { None } else { next.checked_sub(u64::from(back)) }
}

/// `[db:]SQL` in its parts.
fn split_check(check: &str) -> (&str, &str) {
    let name = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | '$');
    match check.split_once(':') {
        Some((db, sql)) if !db.is_empty() && db.chars().all(name) && !sql.starts_with(':') => (db, sql),
        _ => (SUPERUSER, check),
    }
}

/// The one value of the last statement's one row.
fn single_value(messages: &[SimpleQueryMessage]) -> Result<String, String> {
    let mut rows = Vec::new();
    let mut answered = false;
    for message in messages {
        match message {
            SimpleQueryMessage::RowDescription(_) => {
                rows.clear();
                answered = true;
            }
            SimpleQueryMessage::Row(row) => rows.push(row),
            _ => {}
        }
    }
    match rows.as_slice() {
        [row] if row.len() == 1 => {
            row.get(0).map(str::to_owned).ok_or_else(|| "its value is null".to_owned())
        }
        [row] => Err(format!("it answers {} columns, one is needed", row.len())),
        [] if answered => Err("it answers no row".to_owned()),
        [] => Err("it answers nothing".to_owned()),
        rows => Err(format!("it answers {} rows, one is needed", rows.len())),
    }
}

/// Whether PostgreSQL printed true, or a number other than zero.
fn is_true(value: &str) -> bool {
    match value.trim() {
        "t" | "true" => true,
        number => number.parse::<f64>().is_ok_and(|n| n.is_finite() && n != 0.0),
    }
}

/// Draws `count` targets that the archive should be able to reach: commits, called by their transaction, their time
/// or the position they end at. The same seed draws the same from the same archive.
pub async fn random_targets(
    archive: &Archive,
    catalog: &Catalog,
    count: usize,
    seed: u64,
) -> Result<Vec<Goal>, DrillError> {
    let indexes = ArchivedIndexes::new(archive.clone());
    let windows = reachable_windows(catalog, TargetTimeline::Latest)?;
    let mut dice = Dice::new(seed);
    let mut goals = Vec::new();
    let line = windows.iter().map(|w| (w.from.lsn, w.to.lsn)).collect::<Vec<_>>();
    let reachable = |lsn: Lsn| line.iter().any(|(from, to)| *from < lsn && lsn <= *to);
    // A segment is as likely as it has commits.
    let holds = |line: &Lineage| catalog.backups.iter().any(|b| line.holds(b.head.timeline, b.head.stop_lsn));
    let newest = catalog.timelines().into_iter().rev().map(|t| catalog.lineage(t)).find(holds);
    let lineage = newest.unwrap_or(Lineage::root(TimelineId::FIRST));
    let first = windows.iter().map(|w| w.from.lsn).min().unwrap_or_default();
    let steps = catalog.walk(&lineage, first);
    let steps: Vec<_> = steps.iter().filter(|s| s.entry.info.commits > 0).collect();
    let total = steps.iter().fold(0u64, |sum, s| sum.saturating_add(s.entry.info.commits));
    let mut attempts = count.saturating_mul(50);
    while goals.len() < count && total > 0 && attempts > 0 {
        attempts = attempts.saturating_sub(1);
        let mut place = dice.below(total);
        let step = steps.iter().find(|s| match place.checked_sub(s.entry.info.commits) {
            Some(rest) => {
                place = rest;
                false
            }
            None => true,
        });
        let Some(step) = step else { continue };
        let events = indexes.events(step.entry).await?;
        let commits: Vec<_> = events
            .xacts
            .iter()
            .filter(|x| x.kind.is_commit() && x.end <= step.usable_end && reachable(x.end))
            .collect();
        let chosen = dice.below(commits.len() as u64);
        let Some(commit) = usize::try_from(chosen).ok().and_then(|i| commits.get(i)) else { continue };
        goals.push(Goal::new(match dice.below(3) {
            0 => Target::Xid(commit.xid),
            1 => Target::Time(commit.time),
            _ => Target::Lsn(commit.end),
        }));
    }
    // An archive without commits still has its end.
    goals.resize(count, Goal::new(Target::Latest));
    Ok(goals)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_may_name_its_database() {
        for (check, parts) in [
            ("select true", ("postgres", "select true")),
            ("app:select true", ("app", "select true")),
            ("app-2:select 'a:b' = x", ("app-2", "select 'a:b' = x")),
            ("select 'a:b'", ("postgres", "select 'a:b'")),
            ("true::bool", ("postgres", "true::bool")),
            (":x", ("postgres", ":x")),
        ] {
            assert_eq!(split_check(check), parts);
        }
    }

    #[test]
    fn true_and_numbers_other_than_zero_pass() {
        for value in ["t", "true", "1", "-3", "0.5", "1e3", " 7 "] {
            assert!(is_true(value), "{value}");
        }
        for value in ["f", "false", "0", "0.000", "-0", "NaN", "Infinity", "", "yes it is", "null"] {
            assert!(!is_true(value), "{value}");
        }
    }

    #[test]
    fn a_transaction_gets_the_epoch_before_the_next_one() {
        let epoch = 1u64 << 32;
        assert_eq!(full_xid(750.into(), 755), Some(750));
        assert_eq!(full_xid(755.into(), 755), None);
        assert_eq!(full_xid(760.into(), 755), None);
        assert_eq!(full_xid(750.into(), 3 * epoch + 755), Some(3 * epoch + 750));
        assert_eq!(full_xid((u32::MAX - 5).into(), 3 * epoch + 755), Some(3 * epoch - 6));
        assert_eq!(full_xid((u32::MAX - 5).into(), 755), None, "before the first epoch");
    }
}
