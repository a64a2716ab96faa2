//! Starting programs as the database's operating system user, and finding and killing them again.

use crate::{Failure, Result, Scratch};
use rustix::process::{Pid, Signal, geteuid, kill_process};
use std::ffi::OsStr;
use std::fs;
use std::io::Write as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

/// The user and group that PostgreSQL's programs run as: `postgres` when we are root (PostgreSQL refuses
/// root), ourselves otherwise.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Runas {
    Ourselves,
    Postgres { uid: u32, gid: u32 },
}

impl Runas {
    pub(crate) fn database_user() -> Self {
        static USER: OnceLock<Runas> = OnceLock::new();
        *USER.get_or_init(|| {
            if !geteuid().is_root() {
                return Runas::Ourselves;
            }
            let id = |flag| {
                let out = Command::new("id").args([flag, "postgres"]).output().expect("id runs");
                let text = String::from_utf8_lossy(&out.stdout).trim().to_owned();
                text.parse().unwrap_or_else(|_| {
                    panic!("PostgreSQL refuses root and there is no user `postgres` to run it as")
                })
            };
            Runas::Postgres { uid: id("-u"), gid: id("-g") }
        })
    }

    pub(crate) fn give(self, path: &Path) {
        if let Runas::Postgres { uid, gid } = self {
            std::os::unix::fs::lchown(path, Some(uid), Some(gid))
                .unwrap_or_else(|e| panic!("cannot give {} to postgres: {e}", path.display()));
        }
    }

    pub(crate) fn apply(self, command: &mut Command) {
        if let Runas::Postgres { uid, gid } = self {
            command.gid(gid).uid(uid);
        }
    }
}

/// What a finished program left: its status and what it wrote.
#[derive(Clone, Debug)]
pub struct Output {
    /// The command line, for messages.
    pub command: String,
    /// The exit status; a program ended by signal N has 128 + N, as in a shell.
    pub status: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// How long it ran.
    pub took: Duration,
}

impl Output {
    /// Panics with everything the program wrote unless its status is 0.
    #[track_caller]
    pub fn assert_ok(self) -> Self {
        self.assert_status(0)
    }

    /// Panics with everything the program wrote unless its status is this one.
    #[track_caller]
    pub fn assert_status(self, status: i32) -> Self {
        assert!(self.status == status, "expected exit status {status}\n{}", self.describe());
        self
    }

    /// The result form of [`Output::assert_ok`].
    pub fn into_result(self) -> Result<Self> {
        if self.status == 0 { Ok(self) } else { Err(Failure::new(self.describe())) }
    }

    /// Command line, status and everything written, as one text.
    pub fn describe(&self) -> String {
        format!(
            "$ {}\nexit status {} after {:.1?}\n--- stdout ---\n{}\n--- stderr ---\n{}",
            self.command, self.status, self.took, self.stdout, self.stderr
        )
    }
}

/// A command about to be run with a clean environment: the C locale, no `PG*` and no `WALTIDE_*` of the
/// developer's shell.
#[derive(Debug)]
pub struct Runner {
    command: Command,
    stdin: Option<Vec<u8>>,
}

impl Runner {
    /// A program to be run as the database's operating system user.
    pub fn as_postgres(program: impl AsRef<OsStr>) -> Self {
        Self::new(program.as_ref(), Runas::database_user())
    }

    /// A program to be run as the user of this process.
    pub fn as_self(program: impl AsRef<OsStr>) -> Self {
        Self::new(program.as_ref(), Runas::Ourselves)
    }

    fn new(program: &OsStr, user: Runas) -> Self {
        let mut command = Command::new(program);
        for (key, _) in std::env::vars_os() {
            let name = key.to_string_lossy();
            if name.starts_with("PG") || name.starts_with("WALTIDE_") || name.starts_with("LC_") {
                command.env_remove(&key);
            }
        }
        command
            .env("LC_ALL", "C")
            .env("TZ", "UTC")
            .env_remove("LANGUAGE")
            .current_dir("/")
            .stdin(Stdio::null());
        if matches!(user, Runas::Postgres { .. }) {
            command.env("HOME", "/var/lib/postgresql").env("USER", "postgres").env("LOGNAME", "postgres");
        }
        user.apply(&mut command);
        Self { command, stdin: None }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    pub fn args<I: IntoIterator<Item: AsRef<OsStr>>>(mut self, args: I) -> Self {
        self.command.args(args);
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Sets the working directory, which is `/` unless said.
    pub fn current_dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Gives the program this on its standard input.
    pub fn stdin(mut self, text: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(text.into());
        self.command.stdin(Stdio::piped());
        self
    }

    /// Runs to the end. Only a program that cannot be started panics; its status is the caller's to judge.
    #[track_caller]
    pub fn run(mut self) -> Output {
        let line = command_line(&self.command);
        let started = Instant::now();
        let mut child = self
            .command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {line}: {e}"));
        // From another thread, because a program may write more than a pipe holds before it has read all.
        let writer = self.stdin.take().and_then(|text| {
            let mut pipe = child.stdin.take()?;
            Some(thread::spawn(move || {
                // A program that ends early closes the pipe; its status tells why.
                let _ = pipe.write_all(&text);
            }))
        });
        let output = child.wait_with_output().expect("a child can be waited for");
        if let Some(writer) = writer {
            writer.join().expect("the writer does not panic");
        }
        Output {
            command: line,
            status: exit_code(output.status),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            took: started.elapsed(),
        }
    }

    /// Starts the program and leaves it running, its output going to files in the scratch.
    #[track_caller]
    pub fn spawn(mut self, scratch: &Scratch, label: &str) -> Background {
        let line = command_line(&self.command);
        let stdout_path = scratch.fresh_path(&format!("{label}.out"));
        let stderr_path = stdout_path.with_extension("err");
        let file = |path: &Path| {
            fs::File::create(path).unwrap_or_else(|e| panic!("cannot create {}: {e}", path.display()))
        };
        let child = self
            .command
            .stdout(file(&stdout_path))
            .stderr(file(&stderr_path))
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {line}: {e}"));
        Background {
            child,
            line,
            stdout_path,
            stderr_path,
            started: Instant::now(),
            _scratch: scratch.clone(),
        }
    }

    /// The command itself, for what this type does not offer.
    pub fn into_command(self) -> Command {
        self.command
    }
}

/// A program running beside the test; killed when dropped.
#[derive(Debug)]
pub struct Background {
    child: Child,
    line: String,
    stdout_path: PathBuf,
    stderr_path: PathBuf,
    started: Instant,
    _scratch: Scratch,
}

impl Background {
    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child can be asked").is_none()
    }

    /// What it has written to standard output so far.
    pub fn stdout(&self) -> String {
        read_lossy(&self.stdout_path)
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        read_lossy(&self.stderr_path)
    }

    /// Sends a signal; one that has ended already is left alone.
    pub fn signal(&mut self, signal: Signal) {
        if self.is_running() {
            // It may end between the question and the signal; its id stays ours until we wait for it.
            let _ = kill_process(pid(self.child.id()), signal);
        }
    }

    /// Sends SIGKILL and waits.
    pub fn kill9(mut self) -> Output {
        self.signal(Signal::KILL);
        self.wait()
    }

    /// Sends SIGINT, as ctrl-c does, and waits.
    pub fn interrupt(mut self) -> Output {
        self.signal(Signal::INT);
        self.wait()
    }

    /// Sends SIGTERM, as systemd does, and waits.
    pub fn terminate(mut self) -> Output {
        self.signal(Signal::TERM);
        self.wait()
    }

    /// Waits for the end.
    pub fn wait(mut self) -> Output {
        let status = self.child.wait().expect("a child can be waited for");
        Output {
            command: self.line.clone(),
            status: exit_code(status),
            stdout: self.stdout(),
            stderr: self.stderr(),
            took: self.started.elapsed(),
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks again and again until the answer is a value, every 20 ms for at most `limit`.
#[track_caller]
pub fn poll_until<T>(what: &str, limit: Duration, ask: impl FnMut() -> Option<T>) -> T {
    try_poll_until(limit, ask).unwrap_or_else(|| panic!("waited {limit:?} in vain for {what}"))
}

pub(crate) fn try_poll_until<T>(limit: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if Instant::now() >= deadline {
            return None;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Every live process whose working directory is `dir` or lies below it. A PostgreSQL server and all it
/// starts (backends, archive and restore commands) work in the data directory, even when their postmaster
/// is dead and they belong to init.
pub(crate) fn processes_below(dir: &Path) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let ourselves = std::process::id().to_string();
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let name = entry.file_name().into_string().ok()?;
            let id: i32 = name.parse().ok().filter(|_| name != ourselves)?;
            let cwd = fs::read_link(entry.path().join("cwd")).ok()?;
            // A removed directory reads as "/path (deleted)".
            let cwd = cwd.to_string_lossy().trim_end_matches(" (deleted)").to_owned();
            Path::new(&cwd).starts_with(dir).then(|| Pid::from_raw(id)).flatten()
        })
        .collect()
}

/// Kills with SIGKILL every process that works below `dir`, until there is none. `reap` is called in
/// between, for children of ours among them.
pub(crate) fn kill_processes_below(dir: &Path, mut reap: impl FnMut()) {
    let gone = try_poll_until(Duration::from_secs(30), || {
        let found = processes_below(dir);
        for process in &found {
            // It may have ended since it was listed.
            let _ = kill_process(*process, Signal::KILL);
        }
        reap();
        found.is_empty().then_some(())
    });
    if gone.is_none() {
        eprintln!("processes below {} do not die", dir.display());
    }
}

pub(crate) fn pid(id: u32) -> Pid {
    i32::try_from(id).ok().and_then(Pid::from_raw).expect("a process id is positive")
}

pub(crate) fn read_lossy(path: &Path) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn command_line(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
