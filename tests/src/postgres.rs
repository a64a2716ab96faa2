//! Real PostgreSQL clusters: made, started, asked, killed, promoted, thrown away.

use crate::process::{kill_processes_below, pid, processes_below, read_lossy, try_poll_until};
use crate::{Background, Failure, Output, Result, Runner, Scratch, poll_until};
use rustix::process::{Signal, kill_process};
use std::fs;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(120);
const PORT: u16 = 5432;
/// Where Debian puts version 15.
const DEBIAN_BIN: &str = "/usr/lib/postgresql/15/bin";
/// Programs that speak with a server of any version.
const CLIENTS: [&str; 2] = ["psql", "pgbench"];

/// One installed PostgreSQL.
#[derive(Clone, Debug)]
pub struct PgInstall {
    bin: PathBuf,
}

impl PgInstall {
    /// The one named by `WALTIDE_PG_BIN`, else Debian's version 15.
    pub fn find() -> Self {
        static FOUND: OnceLock<PgInstall> = OnceLock::new();
        FOUND
            .get_or_init(|| {
                let bin = std::env::var_os("WALTIDE_PG_BIN").map(PathBuf::from);
                let bin = bin.unwrap_or_else(|| PathBuf::from(DEBIAN_BIN));
                assert!(
                    bin.join("initdb").exists(),
                    "no PostgreSQL in {}; scripts/test installs it, WALTIDE_PG_BIN names another",
                    bin.display()
                );
                Self { bin }
            })
            .clone()
    }

    /// The directory of the programs.
    pub fn bin_dir(&self) -> &Path {
        &self.bin
    }

    /// The path of one program. A server that came without clients is asked with those of Debian's version 15.
    pub fn program(&self, name: &str) -> PathBuf {
        let own = self.bin.join(name);
        let clients = Path::new(DEBIAN_BIN).join(name);
        if !own.exists() && CLIENTS.contains(&name) && clients.exists() { clients } else { own }
    }

    /// One of its programs, to be run as the database's user.
    pub fn runner(&self, name: &str) -> Runner {
        Runner::as_postgres(self.program(name))
    }
}

/// How a server is asked to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopMode {
    /// Waits for the clients to leave.
    Smart,
    /// Throws the clients out and writes a shutdown checkpoint.
    Fast,
    /// Just ends; the next start is a crash recovery.
    Immediate,
}

/// What a new cluster shall be like.
#[derive(Clone, Debug)]
pub struct ClusterBuilder {
    name: String,
    scratch: Option<Scratch>,
    segment_mb: u32,
    checksums: bool,
    initdb_args: Vec<String>,
    settings: Vec<(String, String)>,
}

impl ClusterBuilder {
    /// Makes it in this place instead of one of its own.
    pub fn scratch(mut self, scratch: &Scratch) -> Self {
        self.scratch = Some(scratch.clone());
        self
    }

    /// The size of a WAL segment in MiB; 1 unless said, to be quick.
    pub fn segment_mb(mut self, size: u32) -> Self {
        self.segment_mb = size;
        self
    }

    /// Whether pages have checksums; they do unless said.
    pub fn checksums(mut self, on: bool) -> Self {
        self.checksums = on;
        self
    }

    /// Whether the server syncs its files; it does not unless said.
    pub fn fsync(self, on: bool) -> Self {
        self.setting("fsync", if on { "on" } else { "off" })
    }

    /// A line of postgresql.conf. A later one overrides an earlier one.
    pub fn setting(mut self, key: &str, value: &str) -> Self {
        self.settings.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Several of them.
    pub fn settings(mut self, settings: &[(&str, &str)]) -> Self {
        for (key, value) in settings {
            self = self.setting(key, value);
        }
        self
    }

    /// Archiving with this command, and an archive_timeout of none.
    pub fn archive_command(self, command: &str) -> Self {
        self.setting("archive_mode", "on").setting("archive_command", command)
    }

    /// Another argument for initdb.
    pub fn initdb_arg(mut self, arg: &str) -> Self {
        self.initdb_args.push(arg.to_owned());
        self
    }

    /// Runs initdb and writes the settings; the server is not started.
    #[track_caller]
    pub fn create(self) -> Cluster {
        let install = PgInstall::find();
        let scratch = self.scratch.unwrap_or_else(|| Scratch::new(&self.name));
        let data_dir = scratch.dir(&self.name);
        let mut initdb = install
            .runner("initdb")
            .arg("-D")
            .arg(&data_dir)
            .args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"])
            .arg(format!("--wal-segsize={}", self.segment_mb));
        if self.checksums {
            initdb = initdb.arg("--data-checksums");
        }
        initdb.args(&self.initdb_args).run().assert_ok();
        let cluster = Cluster::with_data_dir(&self.name, &scratch, data_dir);
        cluster.set("fsync", "off");
        cluster.set("listen_addresses", "");
        cluster.set("unix_socket_directories", &cluster.socket_dir.display().to_string());
        cluster.set("port", &PORT.to_string());
        cluster.set("timezone", "UTC");
        cluster.set("shared_buffers", "32MB");
        cluster.set("log_line_prefix", "%m [%p] %b ");
        for (key, value) in &self.settings {
            cluster.set(key, value);
        }
        cluster
    }

    /// [`ClusterBuilder::create`] and [`Cluster::start`].
    #[track_caller]
    pub fn start(self) -> Cluster {
        let mut cluster = self.create();
        cluster.start();
        cluster
    }
}

/// A cluster in a scratch place, with a private socket and no TCP. Killed when dropped.
#[derive(Debug)]
pub struct Cluster {
    name: String,
    install: PgInstall,
    scratch: Scratch,
    data_dir: PathBuf,
    log: PathBuf,
    socket_dir: PathBuf,
    port: u16,
    server: Option<Child>,
    /// The System V shared memory that a killed postmaster left: the kernel has few, and only a start in the same
    /// directory would clean it up.
    left_memory: Option<String>,
    _socket_place: Scratch,
}

impl Cluster {
    /// Starts to describe a new cluster.
    pub fn builder(name: &str) -> ClusterBuilder {
        ClusterBuilder {
            name: name.to_owned(),
            scratch: None,
            segment_mb: 1,
            checksums: true,
            initdb_args: Vec::new(),
            settings: Vec::new(),
        }
    }

    /// A data directory made by someone else (a restore, a copy), not running. Its server will be started
    /// with a socket of its own whatever its configuration says.
    pub fn with_data_dir(name: &str, scratch: &Scratch, data_dir: impl Into<PathBuf>) -> Self {
        let socket_place = scratch.for_socket();
        let number = socket_place.fresh_path("s");
        let socket_dir = socket_place.dir(&number.file_name().expect("it has a name").to_string_lossy());
        Self {
            name: name.to_owned(),
            install: PgInstall::find(),
            data_dir: data_dir.into(),
            log: scratch.fresh_path(&format!("{name}.log")),
            scratch: scratch.clone(),
            socket_dir,
            port: PORT,
            server: None,
            left_memory: None,
            _socket_place: socket_place,
        }
    }

    /// A server that someone else has started (`restore --start`): socket and port are read from its
    /// postmaster.pid.
    pub fn attach(name: &str, scratch: &Scratch, data_dir: impl Into<PathBuf>) -> Result<Self> {
        let mut cluster = Self::with_data_dir(name, scratch, data_dir);
        let path = cluster.data_dir.join("postmaster.pid");
        let text = fs::read_to_string(&path).map_err(|e| Failure::new(format!("{}: {e}", path.display())))?;
        let mut lines = text.lines().skip(3);
        let port = lines.next().and_then(|line| line.trim().parse().ok());
        let socket_dir = lines.next().map(str::trim).filter(|dir| !dir.is_empty());
        let (Some(port), Some(socket_dir)) = (port, socket_dir) else {
            return Err(Failure::new(format!("{} names no port or socket:\n{text}", path.display())));
        };
        cluster.port = port;
        cluster.socket_dir = PathBuf::from(socket_dir);
        Ok(cluster)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The place it lives in.
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// Its programs.
    pub fn install(&self) -> &PgInstall {
        &self.install
    }

    /// The data directory.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// The directory of its socket.
    pub fn socket_dir(&self) -> &Path {
        &self.socket_dir
    }

    /// The number in its socket's name.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A libpq connection string for its superuser and the database `postgres`.
    pub fn connection(&self) -> String {
        self.connection_to("postgres")
    }

    /// A libpq connection string for its superuser and this database.
    pub fn connection_to(&self, db: &str) -> String {
        format!("host={} port={} user=postgres dbname={db}", self.socket_dir.display(), self.port)
    }

    /// Everything its server has logged since this value was made.
    pub fn log_text(&self) -> String {
        read_lossy(&self.log)
    }

    /// Appends a setting to postgresql.conf; a running server sees it after [`Cluster::reload`].
    pub fn set(&self, key: &str, value: &str) {
        let path = self.data_dir.join("postgresql.conf");
        let mut file = fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap_or_else(|e| panic!("cannot open {}: {e}", path.display()));
        let value = value.replace('\'', "''");
        writeln!(file, "{key} = '{value}'").expect("the configuration can be written");
    }

    /// Makes the server read its configuration again.
    pub fn reload(&self) {
        self.query("select pg_reload_conf()");
    }

    /// Starts the server and waits until it takes connections (a standby: read-only ones).
    #[track_caller]
    pub fn start(&mut self) {
        self.try_start().unwrap_or_else(|e| panic!("{e}"));
    }

    /// Starts the server and waits until it takes connections; an error, with its log, if it ends instead.
    pub fn try_start(&mut self) -> Result<()> {
        self.spawn();
        self.wait_ready(PATIENCE)
    }

    /// Starts the server without waiting for anything.
    #[track_caller]
    pub fn spawn(&mut self) {
        assert!(!self.is_running(), "{} is already running", self.name);
        let log =
            fs::OpenOptions::new().create(true).append(true).open(&self.log).expect("the log can be written");
        let mut command = self.install.runner("postgres").into_command();
        command
            .arg("-D")
            .arg(&self.data_dir)
            .arg("-k")
            .arg(&self.socket_dir)
            .args(["-p", &self.port.to_string(), "-c", "listen_addresses="])
            .stdout(log.try_clone().expect("a file can be shared"))
            .stderr(log)
            .stdin(Stdio::null())
            // So that ctrl-c at the test does not reach the server before its Drop does.
            .process_group(0);
        self.server = Some(command.spawn().expect("postgres can be started"));
    }

    /// Waits until the server takes connections.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        let answer = try_poll_until(limit, || {
            if !self.is_running() {
                return Some(Err(Failure::new(format!(
                    "{} has ended; its log:\n{}",
                    self.name,
                    self.log_tail()
                ))));
            }
            (self.postmaster_status().as_deref() == Some("ready")).then_some(Ok(()))
        });
        answer.unwrap_or_else(|| {
            Err(Failure::new(format!(
                "{} takes no connections after {limit:?}; its log:\n{}",
                self.name,
                self.log_tail()
            )))
        })
    }

    /// Waits until the server has ended by itself (a target action of shutdown, a recovery that fails).
    #[track_caller]
    pub fn wait_stopped(&mut self) {
        let name = self.name.clone();
        poll_until(&format!("{name} to end"), PATIENCE, || (!self.is_running()).then_some(()));
    }

    /// The status word in postmaster.pid: `starting`, `stopping`, `ready`, or `standby` (up, but without
    /// connections).
    pub fn postmaster_status(&self) -> Option<String> {
        let text = fs::read_to_string(self.data_dir.join("postmaster.pid")).ok()?;
        let mut lines = text.lines();
        let id: u32 = lines.next()?.trim().parse().ok()?;
        // A file left by a killed server, before ours has written its own.
        if self.server.as_ref().is_some_and(|child| child.id() != id) {
            return None;
        }
        Some(lines.nth(6)?.trim().to_owned())
    }

    /// The postmaster's process id, if it lives.
    pub fn postmaster_pid(&mut self) -> Option<u32> {
        if let Some(child) = &mut self.server {
            match child.try_wait().expect("a child can be asked") {
                None => return Some(child.id()),
                Some(_) => self.server = None,
            }
        }
        let text = fs::read_to_string(self.data_dir.join("postmaster.pid")).ok()?;
        let id: u32 = text.lines().next()?.trim().parse().ok()?;
        processes_below(&self.data_dir).contains(&pid(id)).then_some(id)
    }

    /// Whether its postmaster lives.
    pub fn is_running(&mut self) -> bool {
        self.postmaster_pid().is_some()
    }

    /// Stops the server and waits; one that is not running is left alone.
    #[track_caller]
    pub fn stop(&mut self, mode: StopMode) {
        let signal = match mode {
            StopMode::Smart => Signal::TERM,
            StopMode::Fast => Signal::INT,
            StopMode::Immediate => Signal::QUIT,
        };
        let Some(id) = self.postmaster_pid() else { return };
        // It may end between the question and the signal.
        let _ = kill_process(pid(id), signal);
        let ended = try_poll_until(PATIENCE, || (!self.is_running()).then_some(()));
        assert!(ended.is_some(), "{} does not stop; its log:\n{}", self.name, self.log_tail());
    }

    /// Kills with SIGKILL the postmaster, every backend and every command they run, all at once, as losing
    /// the machine does.
    pub fn kill9(&mut self) {
        if let Some(id) = self.postmaster_pid() {
            self.left_memory = self.shared_memory();
            // Stopped first, so that it does not begin a restart or a new backend while it is being killed.
            let _ = kill_process(pid(id), Signal::STOP);
        }
        let server = &mut self.server;
        kill_processes_below(&self.data_dir, || {
            if let Some(child) = server {
                let _ = child.try_wait();
            }
        });
        if let Some(mut child) = self.server.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// What postmaster.pid says of it: a key and a number.
    fn shared_memory(&self) -> Option<String> {
        let text = fs::read_to_string(self.data_dir.join("postmaster.pid")).ok()?;
        Some(text.lines().nth(6)?.split_whitespace().nth(1)?.to_owned())
    }

    /// Stops fast and starts again.
    #[track_caller]
    pub fn restart(&mut self) {
        self.stop(StopMode::Fast);
        self.start();
    }

    /// Ends recovery and waits until the server takes writes.
    #[track_caller]
    pub fn promote(&self) {
        self.pg_ctl("promote").arg("-w").run().assert_ok();
        self.wait_until("select not pg_is_in_recovery()");
    }

    /// Waits until recovery has ended by itself.
    #[track_caller]
    pub fn wait_promoted(&self) {
        self.wait_until("select not pg_is_in_recovery()");
    }

    fn pg_ctl(&self, verb: &str) -> Runner {
        self.install.runner("pg_ctl").arg("-D").arg(&self.data_dir).arg(verb)
    }

    /// psql with this input, statement by statement, stopping at the first error; the bare answer.
    pub fn sql(&self, db: &str, text: &str) -> Result<String> {
        let out = self.psql(db).stdin(text).run().into_result()?;
        Ok(out.stdout.trim_end_matches('\n').to_owned())
    }

    /// [`Cluster::sql`] in the database `postgres`, panicking on an error.
    #[track_caller]
    pub fn query(&self, text: &str) -> String {
        self.sql("postgres", text).unwrap_or_else(|e| panic!("{e}"))
    }

    /// psql with this file.
    pub fn sql_file(&self, db: &str, path: &Path) -> Result<String> {
        self.sql_file_with(db, path, &[])
    }

    /// psql with this file and these variables.
    pub fn sql_file_with(&self, db: &str, path: &Path, variables: &[(&str, &str)]) -> Result<String> {
        let text = fs::read(path).map_err(|e| Failure::new(format!("{}: {e}", path.display())))?;
        let mut psql = self.psql(db);
        for (key, value) in variables {
            psql = psql.arg("-v").arg(format!("{key}={value}"));
        }
        Ok(psql.stdin(text).run().into_result()?.stdout)
    }

    /// psql (-XAtq, ON_ERROR_STOP) connected to this database, reading from standard input.
    pub fn psql(&self, db: &str) -> Runner {
        self.client("psql").args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", db])
    }

    /// One of PostgreSQL's client programs with this cluster's socket, port and superuser as arguments.
    pub fn client(&self, program: &str) -> Runner {
        self.install.runner(program).arg("-h").arg(&self.socket_dir).args([
            "-p",
            &self.port.to_string(),
            "-U",
            "postgres",
        ])
    }

    /// Asks this (in `postgres`) until the answer is `t`; errors count as no.
    #[track_caller]
    pub fn wait_until(&self, sql: &str) {
        let mut last = String::new();
        let found = try_poll_until(PATIENCE, || {
            match self.sql("postgres", sql) {
                Ok(answer) if answer == "t" => return Some(()),
                Ok(answer) => last = answer,
                Err(e) => last = e.to_string(),
            }
            None
        });
        assert!(
            found.is_some(),
            "waited in vain for {sql}\nlast answer: {last}\nlog of {}:\n{}",
            self.name,
            self.log_tail()
        );
    }

    /// Ends the current WAL segment, which always has a record in it, and says its name.
    #[track_caller]
    pub fn switch_wal(&self) -> String {
        // A switch at the very start of a segment does nothing, hence the message.
        self.query(
            "select pg_logical_emit_message(false, 'waltide', 'switch'); select pg_walfile_name(pg_switch_wal())",
        )
        .lines()
        .last()
        .expect("there is an answer")
        .to_owned()
    }

    /// Waits until the server has marked this segment as archived.
    #[track_caller]
    pub fn wait_archived(&self, segment: &str) {
        let status = self.data_dir.join("pg_wal/archive_status");
        let done = status.join(format!("{segment}.done"));
        let ready = status.join(format!("{segment}.ready"));
        let file = self.data_dir.join("pg_wal").join(segment);
        // A segment that is archived and no longer needed loses its file and its mark.
        let found =
            try_poll_until(PATIENCE, || (done.exists() || (!ready.exists() && !file.exists())).then_some(()));
        assert!(found.is_some(), "{segment} is not archived; log of {}:\n{}", self.name, self.log_tail());
    }

    /// [`Cluster::switch_wal`] and [`Cluster::wait_archived`]: all that is committed is in the archive.
    #[track_caller]
    pub fn archive_all(&self) -> String {
        let segment = self.switch_wal();
        self.wait_archived(&segment);
        segment
    }

    /// The names of the segments in pg_wal that hold WAL (not those kept for reuse), in order.
    pub fn wal_segments(&self) -> Vec<String> {
        let current = self.query("select pg_walfile_name(pg_current_wal_insert_lsn())");
        let mut names = self.wal_file_names();
        names.retain(|name| *name <= current);
        names
    }

    /// The names of all segment files in pg_wal, recycled ones included, in order.
    pub fn wal_file_names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.data_dir.join("pg_wal")).expect("pg_wal is there");
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.len() == 24 && name.bytes().all(|b| b.is_ascii_hexdigit()))
            .collect();
        names.sort();
        names
    }

    /// Fills the database `postgres` with pgbench's tables.
    #[track_caller]
    pub fn pgbench_init(&self, scale: u32) {
        self.client("pgbench").args(["-i", "-q", "-s", &scale.to_string(), "postgres"]).run().assert_ok();
    }

    /// Runs pgbench on the database `postgres` to its end.
    #[track_caller]
    pub fn pgbench(&self, args: &[&str]) -> Output {
        self.client("pgbench").arg("-n").args(args).arg("postgres").run().assert_ok()
    }

    /// Runs pgbench beside the test.
    #[track_caller]
    pub fn pgbench_background(&self, args: &[&str]) -> Background {
        self.client("pgbench").arg("-n").args(args).arg("postgres").spawn(&self.scratch, "pgbench")
    }

    /// pg_basebackup of this cluster into a directory of this name; other arguments (`-R`, `-Ft`,
    /// `-X none`) as given.
    #[track_caller]
    pub fn base_backup(&self, name: &str, args: &[&str]) -> PathBuf {
        let dir = self.scratch.dir(name);
        let mut command = self.client("pg_basebackup").args(["-c", "fast", "--no-sync", "-D"]).arg(&dir);
        if !args.contains(&"-Ft") {
            for (location, place) in self.tablespaces() {
                let moved = self.scratch.dir(&format!("{name}-{place}"));
                command = command.arg("-T").arg(format!("{location}={}", moved.display()));
            }
        }
        command.args(args).run().assert_ok();
        dir
    }

    fn tablespaces(&self) -> Vec<(String, String)> {
        let answer = self.query(
            "select pg_tablespace_location(oid) || '=' || spcname from pg_tablespace
             where pg_tablespace_location(oid) <> ''",
        );
        answer
            .lines()
            .filter_map(|line| line.rsplit_once('='))
            .map(|(location, name)| (location.to_owned(), name.to_owned()))
            .collect()
    }

    /// A started hot standby of this cluster, made by pg_basebackup, streaming from it.
    #[track_caller]
    pub fn make_standby(&self, name: &str) -> Self {
        let dir = self.base_backup(name, &["-R", "-X", "stream"]);
        let mut standby = Self::with_data_dir(name, &self.scratch, dir);
        standby.set("archive_mode", "off");
        standby.set("unix_socket_directories", &standby.socket_dir.display().to_string());
        standby.start();
        standby
    }

    /// Turns this stopped cluster (a restored directory) into a standby that streams from `primary`.
    pub fn follow(&self, primary: &Self) {
        self.set("primary_conninfo", &primary.connection());
        self.scratch.file(&self.data_dir.join("standby.signal").display().to_string(), "");
    }

    /// Waits until this standby has replayed all that the primary has written by now.
    #[track_caller]
    pub fn wait_caught_up(&self, primary: &Self) {
        let lsn = primary.query("select pg_current_wal_lsn()");
        self.wait_until(&format!("select pg_last_wal_replay_lsn() >= '{lsn}'::pg_lsn"));
    }

    /// Makes a tablespace in a directory of its own and says which.
    #[track_caller]
    pub fn create_tablespace(&self, name: &str) -> PathBuf {
        let dir = self.scratch.dir(&format!("{}-{name}", self.name));
        self.query(&format!("create tablespace {name} location '{}'", dir.display()));
        dir
    }

    /// The last lines of the log, for messages.
    pub fn log_tail(&self) -> String {
        const LINES: usize = 60;
        let text = self.log_text();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LINES)..].join("\n")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.kill9();
        if let Some(id) = &self.left_memory {
            // A later start of the same directory may have removed it.
            let mut remove = Runner::as_postgres("ipcrm").args(["-m", id]).into_command();
            let _ = remove.stderr(Stdio::null()).status();
        }
    }
}
