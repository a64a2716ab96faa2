//! A place for one restored cluster and the server on it, kept apart from the world, gone when it is dropped.
//!
//! The place is a directory only its owner can enter. All the server writes lies in it: the data directory, the
//! tablespaces, the socket, the log. It listens on nothing else, reads a configuration of ours alone, and has a cleaned
//! environment. The place's name says which process of which machine it belongs to, so that what a killed one left
//! behind is recognised and removed by the next.

use std::cell::Cell;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{self, Read as _, Seek as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use tokio::net::UnixStream;
use tokio_postgres::{Client, NoTls};

use super::amcheck::LOCK_TIMEOUT;
use super::conf_file::quote;
use super::install::{Installation, ServerUser};
use super::scratch_settings::ScratchSettings;

/// What the names of scratch places start with.
const PREFIX: &str = "waltide-drill-";
/// What those start with that an advance works in.
const ADVANCE_PREFIX: &str = "waltide-advance-";
/// What those start with that are to stay.
const KEPT_PREFIX: &str = "waltide-kept-";
/// The number in the socket's name; nothing listens on it.
const PORT: u16 = 5432;
/// How often a server's state is looked at.
const POLL: Duration = Duration::from_millis(20);
/// How long a server may take to end once it was told to.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long the last resort waits before it kills.
const LAST_PATIENCE: Duration = Duration::from_secs(8);
/// As much of a log as is worth telling.
const LOG_TAIL_BYTES: u64 = 16 << 10;
/// What `fetch` may need to reach the archive, out of our own environment.
const ENVIRONMENT: [&str; 12] = [
    "WALTIDE_",
    "AWS_",
    "AZURE_",
    "GOOGLE_",
    "GCLOUD_",
    "SSL_CERT_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
];

/// What went wrong with a scratch place or its server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScratchError {
    /// A file or directory could not be used.
    #[error("cannot {doing} {}", path.display())]
    Local {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// What was restored leads out of the scratch place.
    #[error("{} leads to {}, out of the scratch place; the server was not started", link.display(), to.display())]
    LeadsOut {
        /// The link.
        link: PathBuf,
        /// Where it leads.
        to: PathBuf,
    },
    /// There is no room.
    #[error(
        "{} has {free_bytes} bytes free and {needed_bytes} are needed\nhint: name a roomier place with --scratch DIR",
        path.display()
    )]
    NoRoom {
        /// The place.
        path: PathBuf,
        /// Its free bytes.
        free_bytes: u64,
        /// The bytes needed.
        needed_bytes: u64,
    },
    /// The server ended by itself.
    #[error("the scratch server ended with {status}\nits log ends with:\n{log}")]
    Ended {
        /// How.
        status: ExitStatus,
        /// Whether it had begun to recover: then what it met was in the archive.
        recovering: bool,
        /// What it said last.
        log: String,
    },
    /// The server does not end.
    #[error("the scratch server does not end after {} s", PATIENCE.as_secs())]
    Stuck,
    /// The server does not let us in.
    #[error("cannot connect to database {database:?} of the scratch server as {user:?}")]
    Connect {
        /// The database.
        database: String,
        /// As whom.
        user: String,
        /// What the server said.
        source: tokio_postgres::Error,
    },
}

impl ScratchError {
    /// Whether the archive is at fault: recovery began and met what it could not go on from.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Ended { recovering, log, .. } => *recovering && !log.contains("No space left on device"),
            _ => false,
        }
    }
}

fn local(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ScratchError {
    let path = path.to_owned();
    move |source| ScratchError::Local { doing, path, source }
}

/// A directory of our own, removed with everything in it when it is dropped.
#[derive(Debug)]
pub struct ScratchPlace {
    path: PathBuf,
    user: ServerUser,
    keep: bool,
}

impl ScratchPlace {
    /// Makes the place below `parent`, after removing there what killed processes of this machine left behind.
    pub fn create(parent: &Path, id: &str, user: ServerUser, keep: bool) -> Result<Self, ScratchError> {
        let name = match keep {
            true => format!("{KEPT_PREFIX}{id}"),
            false => format!("{PREFIX}{id}-{}", Owner::ourselves()),
        };
        let place = Self::make(parent, &name, user, keep)?;
        place.directory("server")?;
        place.directory("server/socket")?;
        Ok(place)
    }

    /// Makes a place for files alone, after removing what killed processes left behind.
    pub fn for_files(parent: &Path, id: &str) -> Result<Self, ScratchError> {
        let name = format!("{ADVANCE_PREFIX}{id}-{}", Owner::ourselves());
        Self::make(parent, &name, ServerUser::ourselves(), false)
    }

    fn make(parent: &Path, name: &str, user: ServerUser, keep: bool) -> Result<Self, ScratchError> {
        let parent = parent.canonicalize().map_err(local("find", parent))?;
        sweep(&parent, user);
        let path = parent.join(name);
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(local("create", &path))?;
        let place = Self { path, user, keep };
        user.give(&place.path).map_err(local("give away", &place.path))?;
        Ok(place)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The data directory in it, which is not made here.
    pub fn data_dir(&self) -> PathBuf {
        self.path.join("data")
    }

    /// A directory in it, made if it is not there, that the server can use.
    pub fn directory(&self, name: &str) -> Result<PathBuf, ScratchError> {
        let path = self.path.join(name);
        match fs::DirBuilder::new().mode(0o700).create(&path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(local("create", &path)(e)),
            _ => {}
        }
        self.user.give(&path).map_err(local("give away", &path))?;
        Ok(path)
    }

    /// A file in it that the server can read.
    pub fn file(&self, name: &str, contents: &[u8]) -> Result<PathBuf, ScratchError> {
        use std::io::Write as _;
        use std::os::unix::fs::OpenOptionsExt as _;
        let path = self.path.join(name);
        let mut options = fs::OpenOptions::new();
        let file = options.write(true).create(true).truncate(true).mode(0o600).open(&path);
        file.and_then(|mut file| file.write_all(contents)).map_err(local("write", &path))?;
        self.user.give(&path).map_err(local("give away", &path))?;
        Ok(path)
    }

    /// Whether there is room for `needed_bytes`.
    pub fn check_room(&self, needed_bytes: u64) -> Result<(), ScratchError> {
        let found = rustix::fs::statvfs(&self.path).map_err(|e| local("look at", &self.path)(e.into()))?;
        let free_bytes = found.f_bavail.saturating_mul(found.f_frsize);
        if free_bytes < needed_bytes {
            return Err(ScratchError::NoRoom { path: self.path.clone(), free_bytes, needed_bytes });
        }
        Ok(())
    }

    /// Refuses a restored cluster that has a link out of the place, whatever it is a link to, and gives every file
    /// in it to the server's user.
    pub fn admit(&self, dir: &Path) -> Result<(), ScratchError> {
        for entry in fs::read_dir(dir).map_err(local("read", dir))? {
            let entry = entry.map_err(local("read", dir))?;
            let path = entry.path();
            let kind = entry.file_type().map_err(local("look at", &path))?;
            self.user.give(&path).map_err(local("give away", &path))?;
            if kind.is_symlink() {
                let to = path.canonicalize().map_err(local("follow", &path))?;
                if !to.starts_with(&self.path) {
                    return Err(ScratchError::LeadsOut { link: path, to });
                }
            } else if kind.is_dir() {
                self.admit(&path)?;
            }
        }
        Ok(())
    }
}

impl Drop for ScratchPlace {
    fn drop(&mut self) {
        if !self.keep {
            remove(&self.path);
        }
    }
}

/// Ends what still runs in a place and removes it.
fn remove(path: &Path) {
    end_processes_below(path);
    // Someone who was restoring when we were stopped may still write a file or two.
    let deadline = Instant::now().checked_add(LAST_PATIENCE);
    loop {
        match fs::remove_dir_all(path) {
            Ok(()) => return,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return,
            Err(_) if deadline.is_some_and(|d| Instant::now() < d) => std::thread::sleep(POLL),
            Err(e) => {
                tracing::warn!("the scratch place {} cannot be removed: {e}", path.display());
                return;
            }
        }
    }
}

/// Removes the places below `parent` whose process is gone.
fn sweep(parent: &Path, user: ServerUser) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    let ours = [Some(rustix::process::geteuid().as_raw()), user.owner().map(|(uid, _)| uid)];
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let rest = [PREFIX, ADVANCE_PREFIX].into_iter().find_map(|prefix| name.strip_prefix(prefix));
        let owner = rest.and_then(Owner::parse);
        let Ok(found) = entry.metadata() else { continue };
        let is_ours = found.is_dir() && ours.contains(&Some(found.uid()));
        if is_ours && owner.is_some_and(Owner::is_gone) {
            tracing::warn!(
                "{} was left behind by a command that was killed; removed",
                entry.path().display()
            );
            remove(&entry.path());
        }
    }
}

/// Which process a place belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Owner {
    host: u32,
    pid: i32,
    /// When the process started, in the kernel's ticks: process ids come again.
    started: u64,
}

impl Owner {
    fn ourselves() -> Self {
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        Self { host: host(), pid, started: started(pid).unwrap_or(0) }
    }

    fn parse(name: &str) -> Option<Self> {
        let mut parts = name.rsplit('-');
        let started = parts.next()?.parse().ok()?;
        let pid = parts.next()?.parse().ok()?;
        let host = u32::from_str_radix(parts.next()?, 16).ok()?;
        Some(Self { host, pid, started })
    }

    fn is_gone(self) -> bool {
        if self.host != host() {
            return false;
        }
        let Some(pid) = Pid::from_raw(self.pid) else { return false };
        let dead = rustix::process::test_kill_process(pid) == Err(rustix::io::Errno::SRCH);
        dead || started(self.pid).is_some_and(|s| s != self.started)
    }
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:08x}-{}-{}", self.host, self.pid, self.started)
    }
}

/// Tells machines that share a file system apart.
fn host() -> u32 {
    let mut hasher = DefaultHasher::new();
    rustix::system::uname().nodename().to_bytes().hash(&mut hasher);
    u32::try_from(hasher.finish() & 0xFFFF_FFFF).unwrap_or(0)
}

/// When a process started.
fn started(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name, in parentheses, may hold anything.
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(19)?.parse().ok()
}

/// Every process that works below `dir`: a server, its backends and the commands it runs.
fn processes_below(dir: &Path) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let ourselves = rustix::process::getpid();
    let below = |entry: fs::DirEntry| {
        let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
        let cwd = fs::read_link(entry.path().join("cwd")).ok()?;
        (pid != ourselves && cwd.starts_with(dir)).then_some(pid)
    };
    entries.flatten().filter_map(below).collect()
}

/// Ends every process that works below `dir`: first as an immediate shutdown, then for good.
fn end_processes_below(dir: &Path) {
    for (signal, patience) in [(Signal::QUIT, LAST_PATIENCE), (Signal::KILL, LAST_PATIENCE)] {
        let deadline = Instant::now().checked_add(patience);
        let mut told = Vec::new();
        loop {
            let found = processes_below(dir);
            if found.is_empty() {
                return;
            }
            for pid in found {
                if !told.contains(&pid) {
                    // It may have ended since it was listed.
                    let _ = rustix::process::kill_process(pid, signal);
                    told.push(pid);
                }
            }
            if deadline.is_none_or(|d| Instant::now() >= d) {
                break;
            }
            std::thread::sleep(POLL);
        }
    }
}

/// A real server on a restored cluster. Ended when dropped.
#[derive(Debug)]
pub struct ScratchServer {
    child: Child,
    data_dir: PathBuf,
    log: PathBuf,
    socket: File,
    user: ServerUser,
    work_dir: PathBuf,
}

impl ScratchServer {
    /// Starts the server on the data directory of `place`, with these settings and nothing else.
    pub(crate) fn start(
        install: &Installation,
        place: &ScratchPlace,
        settings: &ScratchSettings,
    ) -> Result<Self, ScratchError> {
        let data_dir = place.data_dir();
        place.admit(&place.path)?;
        let hba = place.file("server/pg_hba.conf", b"local all all trust\n")?;
        let ident = place.file("server/pg_ident.conf", b"")?;
        // PostgreSQL reads this one whatever it is told.
        place.file("data/postgresql.auto.conf", b"")?;
        let mut conf = String::new();
        let paths = [
            ("hba_file", hba.display().to_string()),
            ("ident_file", ident.display().to_string()),
            // From the data directory, where the server works: a socket's whole path has 107 bytes at the most.
            ("unix_socket_directories", "../server/socket".to_owned()),
            ("unix_socket_permissions", "0700".to_owned()),
            ("port", PORT.to_string()),
        ];
        let decided = settings.values.iter().map(|(k, v)| (k.as_str(), v.clone()));
        for (name, value) in decided.chain(paths) {
            conf.push_str(&format!("{name} = {}\n", quote(&value)));
        }
        let conf = place.file("server/postgresql.conf", conf.as_bytes())?;
        let log = place.file("server/log", b"")?;
        let out = fs::OpenOptions::new().append(true).open(&log).map_err(local("write", &log))?;
        let both = out.try_clone().map_err(local("write", &log))?;
        let socket_dir = place.path.join("server/socket");
        let socket = File::open(&socket_dir).map_err(local("open", &socket_dir))?;
        let program = install.bin().join("postgres");
        let mut command = Command::new(&program);
        command.arg("-D").arg(&data_dir).arg("-c").arg(format!("config_file={}", conf.display()));
        command.stdin(Stdio::null()).stdout(out).stderr(both).current_dir(place.path());
        clean_environment(&mut command, place.path());
        // Ctrl-C at the terminal is ours to answer, not the server's.
        command.process_group(0);
        place.user.apply(&mut command);
        let child = command.spawn().map_err(local("start", &program))?;
        let work_dir = place.path().to_owned();
        Ok(Self { child, data_dir, log, socket, user: place.user, work_dir })
    }

    /// Waits until the server takes connections. `on_line` hears every line it logs meanwhile.
    pub async fn wait_ready(&mut self, mut on_line: impl FnMut(&str)) -> Result<(), ScratchError> {
        let mut follow = LogFollower::new(&self.log);
        let began = Cell::new(false);
        let mut hear = |line: &str| {
            let begins = ["starting point-in-time recovery", "starting archive recovery", "redo starts at"];
            if begins.iter().any(|words| line.contains(words)) {
                began.set(true);
            }
            on_line(line);
        };
        loop {
            let ended = self.child.try_wait().map_err(local("wait for", &self.log))?;
            follow.read(&mut hear);
            if let Some(status) = ended {
                return Err(ScratchError::Ended { status, recovering: began.get(), log: self.log_tail() });
            }
            if self.is_ready() {
                return Ok(());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// What the server says of itself in the last line of postmaster.pid.
    fn is_ready(&self) -> bool {
        let Ok(text) = fs::read_to_string(self.data_dir.join("postmaster.pid")) else { return false };
        let mut lines = text.lines();
        let ours = lines.next().and_then(|l| l.trim().parse().ok()) == Some(self.child.id());
        ours && lines.nth(6).is_some_and(|status| status.trim() == "ready")
    }

    /// Connects over the private socket.
    pub async fn connect(
        &self,
        database: &str,
        user: &str,
        statement_timeout: Duration,
    ) -> Result<Client, ScratchError> {
        let path = format!("/proc/self/fd/{}/.s.PGSQL.{PORT}", self.socket.as_raw_fd());
        let stream = UnixStream::connect(&path).await.map_err(local("connect to", Path::new(&path)))?;
        let mut config = tokio_postgres::Config::new();
        config.user(user).dbname(database).application_name("waltide drill");
        // These beat what ALTER DATABASE and ALTER ROLE have set.
        let options = [
            "session_preload_libraries=".to_owned(),
            "local_preload_libraries=".to_owned(),
            "synchronous_commit=off".to_owned(),
            "default_transaction_read_only=off".to_owned(),
            format!("statement_timeout={}", statement_timeout.as_millis()),
            format!("lock_timeout={}", LOCK_TIMEOUT.as_millis()),
        ];
        config.options(options.map(|o| format!("-c {o}")).join(" "));
        let connected = config.connect_raw(stream, NoTls).await;
        let (client, connection) = connected.map_err(|source| ScratchError::Connect {
            database: database.to_owned(),
            user: user.to_owned(),
            source,
        })?;
        tokio::spawn(async move {
            if let Err(e) = connection.await {
                tracing::debug!("a connection to the scratch server has ended: {e}");
            }
        });
        Ok(client)
    }

    /// One of PostgreSQL's client programs, about to connect to this server.
    pub(crate) fn client(&self, program: &Path, user: &str) -> Command {
        let mut command = Command::new(program);
        clean_environment(&mut command, &self.work_dir);
        // The socket's whole path may be too long, so it is reached from where the program works.
        command.current_dir(&self.work_dir).args(["--host", "/proc/self/cwd/server/socket"]);
        command.args(["--port", &PORT.to_string(), "--username", user, "--no-password"]);
        let options = format!(
            "-c session_preload_libraries= -c local_preload_libraries= -c lc_messages=C -c lock_timeout={}",
            LOCK_TIMEOUT.as_millis()
        );
        command.env("PGOPTIONS", options);
        command.stdin(Stdio::null()).process_group(0);
        self.user.apply(&mut command);
        command
    }

    /// Ends the server as `pg_ctl stop -m fast` does: with all pages written.
    pub async fn stop(&mut self) -> Result<(), ScratchError> {
        self.signal(Signal::INT);
        let deadline = Instant::now().checked_add(PATIENCE);
        loop {
            if let Some(status) = self.child.try_wait().map_err(local("wait for", &self.log))? {
                return match status.success() {
                    true => Ok(()),
                    false => Err(ScratchError::Ended { status, recovering: false, log: self.log_tail() }),
                };
            }
            if deadline.is_none_or(|d| Instant::now() >= d) {
                return Err(ScratchError::Stuck);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// The last lines of the log.
    pub fn log_tail(&self) -> String {
        let read = || -> io::Result<String> {
            let mut file = File::open(&self.log)?;
            let from = file.metadata()?.len().saturating_sub(LOG_TAIL_BYTES);
            file.seek(io::SeekFrom::Start(from))?;
            let mut bytes = Vec::new();
            file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let text = read().unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines.get(lines.len().saturating_sub(30)..).unwrap_or_default().join("\n")
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid {
            // It is our child: until we have waited for it, its id is nobody else's.
            let _ = rustix::process::kill_process(pid, signal);
        }
    }
}

impl Drop for ScratchServer {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        self.signal(Signal::QUIT);
        let deadline = Instant::now().checked_add(LAST_PATIENCE);
        while matches!(self.child.try_wait(), Ok(None)) {
            if deadline.is_none_or(|d| Instant::now() >= d) {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(POLL);
        }
    }
}

/// Leaves of our environment what `fetch` needs, and sends temporary files to the scratch place.
fn clean_environment(command: &mut Command, place: &Path) {
    command.env_clear();
    for (name, value) in std::env::vars_os() {
        if name.to_str().is_some_and(|n| ENVIRONMENT.iter().any(|prefix| n.starts_with(prefix))) {
            command.env(&name, value);
        }
    }
    command.env("PATH", "/usr/local/bin:/usr/bin:/bin").env("LC_ALL", "C").env("TZ", "UTC");
    command.env("HOME", place).env("TMPDIR", place);
}

/// Reads what is added to a log, line by line.
struct LogFollower {
    path: PathBuf,
    at: u64,
    open: String,
}

impl LogFollower {
    fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), at: 0, open: String::new() }
    }

    fn read(&mut self, mut hear: impl FnMut(&str)) {
        let read = || -> io::Result<Vec<u8>> {
            let mut file = File::open(&self.path)?;
            file.seek(io::SeekFrom::Start(self.at))?;
            let mut bytes = Vec::new();
            file.take(1 << 20).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let bytes = read().unwrap_or_default();
        self.at = self.at.saturating_add(bytes.len() as u64);
        self.open.push_str(&String::from_utf8_lossy(&bytes));
        while let Some((line, rest)) = self.open.split_once('\n') {
            hear(line);
            self.open = rest.to_owned();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_says_whose_it_is_and_what_a_killed_process_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let user = ServerUser::find().unwrap();
        let place = ScratchPlace::create(dir.path(), "20260131T235959Z-1f4e", user, false).unwrap();
        let name = place.path().file_name().unwrap().to_str().unwrap();
        let owner = Owner::parse(name.strip_prefix(PREFIX).unwrap()).unwrap();
        assert_eq!(owner, Owner::ourselves());
        assert!(!owner.is_gone());
        assert_eq!(fs::metadata(place.path()).unwrap().mode() & 0o777, 0o700);
        let dead = |owner: Owner| {
            let path = dir.path().join(format!("{PREFIX}x-{owner}"));
            fs::create_dir_all(path.join("data")).unwrap();
            path
        };
        let gone = dead(Owner { pid: i32::MAX, ..owner });
        let earlier = dead(Owner { started: owner.started - 1, ..owner });
        let elsewhere = dead(Owner { host: owner.host ^ 1, pid: i32::MAX, ..owner });
        let unknown = dir.path().join("waltide-drill-of-mine");
        fs::create_dir(&unknown).unwrap();
        let second = ScratchPlace::create(dir.path(), "20260131T235959Z-1f4f", user, false).unwrap();
        assert!(!gone.exists() && !earlier.exists());
        assert!(elsewhere.exists() && unknown.exists() && place.path().exists());
        let path = second.path().to_owned();
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn a_cluster_that_leads_out_of_the_place_is_not_started() {
        let dir = tempfile::tempdir().unwrap();
        let user = ServerUser::find().unwrap();
        let place = ScratchPlace::create(dir.path(), "x", user, false).unwrap();
        let space = place.directory("space").unwrap();
        let data = place.directory("data").unwrap();
        std::os::unix::fs::symlink(&space, data.join("inside")).unwrap();
        place.admit(place.path()).unwrap();
        std::os::unix::fs::symlink(dir.path(), space.join("outside")).unwrap();
        let error = place.admit(place.path()).unwrap_err();
        assert!(matches!(error, ScratchError::LeadsOut { .. }), "{error}");
        assert!(matches!(place.check_room(u64::MAX), Err(ScratchError::NoRoom { .. })));
    }

    #[test]
    fn a_log_is_heard_line_by_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut follow = LogFollower::new(&path);
        let mut heard = Vec::new();
        for (text, lines) in [("a", 0), ("a\nb\nc", 2), ("a\nb\nc\n", 3)] {
            fs::write(&path, text).unwrap();
            follow.read(|line| heard.push(line.to_owned()));
            assert_eq!(heard.len(), lines, "{text:?}");
        }
        assert_eq!(heard, ["a", "b", "c"]);
    }
}
