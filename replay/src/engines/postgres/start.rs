//! Starts PostgreSQL on a restored cluster and watches until recovery has come to its end.

use std::fs;
use std::io::{self, BufRead as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde::Serialize;
use waltide_format::engines::postgres::cluster::{ClusterState, ControlFile, History, RelationSegment};
use waltide_format::{Lsn, PgMajor, TimelineId};
use waltide_storage::Progress;

use super::install::{InstallError, Installation};
use super::restore::Owner;
use super::selection::Selection;
use crate::plan::Plan;
use crate::resolve::StopKind;
use crate::target::TargetAction;

/// The server's words until its own log takes over.
const LOG: &str = "waltide-restore.log";
/// How often the server is looked at.
const POLL: Duration = Duration::from_millis(100);
/// A server that has not written its postmaster.pid by then has ended.
const FIRST_SIGN: Duration = Duration::from_secs(20);
/// So much of the log is told.
const TAIL_LINES: usize = 25;
/// A record that starts on a new page starts behind that page's header.
const PAGE_HEADER_BYTES_MAX: u64 = 40;

/// Why a server did not get to the target.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// There are no programs of that version.
    #[error(transparent)]
    Install(#[from] InstallError),
    /// A program could not be run.
    #[error("cannot run {}", program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The server ended.
    #[error("the server ended before it reached the target; its last words:\n{log}")]
    Ended {
        /// The last lines of its log.
        log: String,
    },
}

/// What became of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerState {
    /// It takes writes, on a timeline of its own.
    Promoted,
    /// It waits at the target.
    Paused,
    /// It ended at the target, as it was told.
    ShutDown,
    /// It follows.
    Standby,
}

/// How a recovery ended.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// What became of the server.
    pub state: ServerState,
    /// The timeline it is on.
    pub timeline: Option<TimelineId>,
    /// How far it replayed, where that is known.
    pub reached_lsn: Option<Lsn>,
    /// How far it was to replay.
    pub planned_lsn: Lsn,
    /// Whether that is the same.
    pub as_planned: Option<bool>,
    /// The last transaction's time, as the server says it.
    pub last_xact_time: Option<String>,
    /// What the server said of a page that recovery needed of what was restored, and that is not there.
    pub missing_page: Option<String>,
    /// Seconds from the start until the target.
    pub seconds: f64,
    /// Where the server writes.
    pub log: PathBuf,
}

/// The programs of one PostgreSQL, and who runs them.
#[derive(Debug, Clone)]
pub struct Server {
    bin: PathBuf,
    owner: Option<Owner>,
}

impl Server {
    /// Finds the programs as [`Installation::find`] does; `owner` is who runs them.
    pub fn find(bin: Option<&Path>, major: PgMajor, owner: Option<Owner>) -> Result<Self, StartError> {
        let bin = Installation::find(major, bin)?.bin().to_owned();
        Ok(Self { bin, owner })
    }

    /// The directory of the programs.
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command.current_dir("/").stdin(std::process::Stdio::null());
        if let Some(owner) = self.owner {
            command.gid(owner.gid).uid(owner.uid);
        }
        command
    }

    /// Starts the server on `data_dir` and waits until it has done what the plan says. Blocks. It replays `from` there on.
    /// `selection` is what was restored, where that is not everything.
    pub fn start(
        &self,
        data_dir: &Path,
        plan: &Plan,
        from: Lsn,
        selection: Option<&Selection>,
        standby: bool,
        progress: &dyn Progress,
    ) -> Result<Outcome, StartError> {
        let started = Instant::now();
        let log = data_dir.join(LOG);
        let mut command = self.command("pg_ctl");
        command.args(["start", "-W", "-s", "-D"]).arg(data_dir).arg("-l").arg(&log);
        let done = command.output();
        let done = done.map_err(|source| StartError::Run { program: self.bin.join("pg_ctl"), source })?;
        if !done.status.success() {
            let said = String::from_utf8_lossy(&done.stderr).into_owned();
            return Err(StartError::Ended { log: format!("{said}{}", tail(data_dir)) });
        }
        let share = plan.wal_bytes.checked_div(plan.segments.len() as u64).unwrap_or(0);
        let left = plan.left_from(from);
        progress.phase("recover", Some(left));
        let shown = plan.wal_bytes.saturating_sub(left).checked_div(share).unwrap_or(0);
        let shown = usize::try_from(shown).unwrap_or(usize::MAX);
        let mut watch = Watch { data_dir, plan, shown, share };
        let mut seen = false;
        loop {
            watch.show(progress);
            let postmaster = Postmaster::read(data_dir);
            seen |= postmaster.is_some();
            let state = match &postmaster {
                Some(postmaster) if postmaster.lives() => self.state(data_dir, postmaster, plan, standby),
                _ if !seen && started.elapsed() < FIRST_SIGN => None,
                _ => match control(data_dir).map(|c| c.state) {
                    Some(ClusterState::ShutDownInRecovery) if plan.goal.action == TargetAction::Shutdown => {
                        Some(ServerState::ShutDown)
                    }
                    _ => return Err(StartError::Ended { log: tail(data_dir) }),
                },
            };
            if let Some(state) = state {
                let missing_page = selection.and_then(|selection| missing_page(data_dir, selection));
                let outcome = self.outcome(data_dir, plan, state, postmaster.as_ref(), started);
                return Ok(Outcome { missing_page, ..outcome });
            }
            std::thread::sleep(POLL);
        }
    }

    /// What the server has become, if recovery has come to its end.
    fn state(
        &self,
        data_dir: &Path,
        postmaster: &Postmaster,
        plan: &Plan,
        standby: bool,
    ) -> Option<ServerState> {
        if standby {
            return matches!(postmaster.status.as_str(), "ready" | "standby").then_some(ServerState::Standby);
        }
        if postmaster.status != "ready" {
            return None;
        }
        let promoted = !data_dir.join("recovery.signal").exists()
            && control(data_dir).is_some_and(|c| c.state == ClusterState::InProduction);
        if promoted {
            return Some(ServerState::Promoted);
        }
        let paused = plan.goal.action == TargetAction::Pause
            && self.ask(postmaster, "SELECT pg_is_wal_replay_paused()").is_some_and(|answer| answer == "t");
        paused.then_some(ServerState::Paused)
    }

    fn outcome(
        &self,
        data_dir: &Path,
        plan: &Plan,
        state: ServerState,
        postmaster: Option<&Postmaster>,
        started: Instant,
    ) -> Outcome {
        let (timeline, reached_lsn) = match state {
            ServerState::Promoted => match newest_history(data_dir, plan.timeline) {
                Some(history) => (Some(history.timeline()), history.ancestors().last().map(|e| e.switch)),
                None => (None, None),
            },
            ServerState::Paused | ServerState::Standby => {
                let answer = postmaster.and_then(|p| self.ask(p, "SELECT pg_last_wal_replay_lsn()"));
                (Some(plan.timeline), answer.and_then(|lsn| lsn.parse().ok()))
            }
            ServerState::ShutDown => (Some(plan.timeline), control(data_dir).map(|c| c.min_recovery_point)),
        };
        let time = "SELECT to_char(pg_last_xact_replay_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || '+00'";
        let last_xact_time = match state {
            ServerState::ShutDown => None,
            _ => postmaster.and_then(|p| self.ask(p, time)).filter(|t| !t.is_empty()),
        };
        let as_planned = match (state, reached_lsn) {
            (ServerState::Promoted | ServerState::Paused, Some(lsn)) => Some(is_as_planned(plan, lsn)),
            _ => None,
        };
        Outcome {
            state,
            timeline,
            reached_lsn,
            planned_lsn: plan.stop.lsn,
            as_planned,
            last_xact_time,
            missing_page: None,
            seconds: started.elapsed().as_secs_f64(),
            log: data_dir.join(LOG),
        }
    }

    /// One value, asked of the server over its socket as the user it runs as; none where it does not let us.
    fn ask(&self, postmaster: &Postmaster, sql: &str) -> Option<String> {
        let us = self.owner.unwrap_or(Owner {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        });
        let mut users: Vec<String> = us.name().into_iter().collect();
        users.push("postgres".to_owned());
        users.dedup();
        users.into_iter().find_map(|user| {
            let mut command = self.command("psql");
            for (name, _) in std::env::vars_os().filter(|(n, _)| n.to_string_lossy().starts_with("PG")) {
                command.env_remove(name);
            }
            command.arg("-h").arg(&postmaster.socket_dir).args(["-p", &postmaster.port, "-U", &user]);
            command.args(["-d", "postgres", "-XAtwqc", sql]);
            let done = command.output().ok()?;
            done.status.success().then(|| String::from_utf8_lossy(&done.stdout).trim().to_owned())
        })
    }
}

/// A stop before a record is where the record before ends, but for the header of a page between them.
fn is_as_planned(plan: &Plan, reached: Lsn) -> bool {
    let planned = plan.stop.lsn;
    match plan.stop.kind {
        StopKind::Before => reached <= planned && planned.bytes_since(reached) <= PAGE_HEADER_BYTES_MAX,
        StopKind::After => reached == planned,
        // More may have been archived meanwhile; consistency comes with a record.
        StopKind::End | StopKind::Consistent => reached.saturating_add(PAGE_HEADER_BYTES_MAX) >= planned,
    }
}

/// Tells how far recovery is, by the segments that the server's log names.
struct Watch<'a> {
    data_dir: &'a Path,
    plan: &'a Plan,
    shown: usize,
    share: u64,
}

impl Watch<'_> {
    fn show(&mut self, progress: &dyn Progress) {
        let log = tail(self.data_dir);
        let segments = self.plan.segments.iter().enumerate();
        let reached = segments.rev().find(|(_, s)| log.contains(&s.name.to_string())).map_or(0, |(i, _)| i);
        if reached > self.shown {
            let more = reached.saturating_sub(self.shown) as u64;
            progress.advance(more.saturating_mul(self.share));
            self.shown = reached;
        } else {
            // How long it takes is shown, too.
            progress.advance(0);
        }
    }
}

/// What postmaster.pid says.
struct Postmaster {
    pid: i32,
    port: String,
    socket_dir: PathBuf,
    status: String,
}

impl Postmaster {
    fn read(data_dir: &Path) -> Option<Self> {
        let text = fs::read_to_string(data_dir.join("postmaster.pid")).ok()?;
        let line = |n: usize| text.lines().nth(n).map(str::trim).unwrap_or_default().to_owned();
        let socket_dir = data_dir.join(line(4));
        Some(Self { pid: line(0).parse().ok()?, port: line(3), socket_dir, status: line(7) })
    }

    /// Whether the process is there, and not only its remains that nobody has collected.
    fn lives(&self) -> bool {
        let Some(pid) = rustix::process::Pid::from_raw(self.pid) else { return false };
        if rustix::process::test_kill_process(pid) == Err(rustix::io::Errno::SRCH) {
            return false;
        }
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z')
    }
}

fn control(data_dir: &Path) -> Option<ControlFile> {
    ControlFile::decode(&fs::read(data_dir.join("global/pg_control")).ok()?).ok()
}

/// The history file of the timeline that the server made for itself.
fn newest_history(data_dir: &Path, after: TimelineId) -> Option<History> {
    let names = fs::read_dir(data_dir.join("pg_wal")).ok()?.flatten().filter_map(|e| {
        let name = e.file_name().into_string().ok()?;
        let digits = name.strip_suffix(".history")?;
        let timeline = TimelineId::new(u32::from_str_radix(digits, 16).ok()?)?;
        (timeline > after).then_some((timeline, e.path()))
    });
    let (timeline, path) = names.max_by_key(|(timeline, _)| *timeline)?;
    History::parse(timeline, &fs::read(path).ok()?).ok()
}

/// The files that a server has logged to since it was started.
fn logs(data_dir: &Path) -> Vec<PathBuf> {
    let own = fs::read_to_string(data_dir.join("current_logfiles")).unwrap_or_default();
    let own = own.lines().filter_map(|line| line.split_once(' ')).map(|(_, path)| data_dir.join(path));
    std::iter::once(data_dir.join(LOG)).chain(own).collect()
}

/// A line of the log that names a file of what was restored. Where not everything was, recovery goes on over pages that
/// are not there, and names the file of each; in whatever language, for that is not translated.
fn missing_page(data_dir: &Path, selection: &Selection) -> Option<String> {
    for log in logs(data_dir) {
        let Ok(file) = fs::File::open(&log) else { continue };
        let lines = io::BufReader::new(file).split(b'\n').map_while(Result::ok);
        let mut lines = lines.map(|line| String::from_utf8_lossy(&line).into_owned());
        if let Some(line) = lines.find(|line| names_file(line, selection)) {
            return Some(line);
        }
    }
    None
}

fn names_file(line: &str, selection: &Selection) -> bool {
    let words = line.split(|c: char| !(c.is_ascii_alphanumeric() || "/_.".contains(c)));
    let mut files = words.filter_map(RelationSegment::locate);
    files.any(|(relation, part)| !part.temporary && selection.wants(relation))
}

/// The last lines of what the server wrote before its own log took over, and of that log.
fn tail(data_dir: &Path) -> String {
    let own = fs::read_to_string(data_dir.join("current_logfiles")).unwrap_or_default();
    let own = own.lines().find_map(|l| l.strip_prefix("stderr ")).map(|path| data_dir.join(path));
    let files = std::iter::once(data_dir.join(LOG)).chain(own);
    let lines = files.map(|path| {
        let text = read_end(&path).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(TAIL_LINES);
        lines.get(from..).unwrap_or_default().join("\n")
    });
    lines.filter(|l| !l.is_empty()).collect::<Vec<_>>().join("\n")
}

fn read_end(path: &Path) -> io::Result<String> {
    use std::io::{Read as _, Seek as _, SeekFrom};
    let mut file = fs::File::open(path)?;
    let bytes = file.metadata()?.len();
    file.seek(SeekFrom::Start(bytes.saturating_sub(16 << 10)))?;
    let mut end = Vec::new();
    file.take(16 << 10).read_to_end(&mut end)?;
    Ok(String::from_utf8_lossy(&end).into_owned())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn only_files_of_what_was_restored_are_a_fault() {
        let selection = Selection::databases(BTreeSet::from([5]));
        for (line, is_fault) in [
            ("WARNING:  page 3 of relation base/5/16400 is uninitialized", true),
            ("WARNUNG:  Seite 3 von Relation base/5/16400_vm existiert nicht", true),
            ("a,\"page 3 of relation pg_tblspc/16390/PG_15_202209061/5/16400 is uninitialized\",,", true),
            ("WARNING:  page 3 of relation global/1262 does not exist", true),
            ("WARNING:  page 3 of relation base/4/16400 is uninitialized", false),
            ("WARNING:  page 3 of relation pg_tblspc/16390/PG_15_202209061/4/16400 is uninitialized", false),
            ("LOG:  restored log file \"000000010000000000000005\" from archive", false),
        ] {
            assert_eq!(names_file(line, &selection), is_fault, "{line}");
        }
    }
}
