//! An end-to-end check of the set-up: settings, rights, space, clocks, and a segment that goes all the way and back.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde::Serialize;
use tokio_postgres::Client;
use waltide_format::archive::{Layout, StoredSegment, SystemInfo, wal_digest};
use waltide_format::{SystemId, WalFileName};
use waltide_storage::{Archive, ArchiveUrl, Put, StorageError};

use super::connect::{ConnectRequest, connect};
use super::control::read_control;
use super::neighbours::one_line;
use super::settings::shell_words;
use super::wal_dir::{SEGMENT_BYTES_MAX, WalDir, read_whole};
use crate::init::read_json;

/// How far two clocks may be apart before it is worth saying: commit times are what time targets are compared with.
const CLOCK_SECONDS_MAX: f64 = 5.0;
/// Below this share of free space, or below so many segments, an archive is as good as full.
const FREE_SHARE_MIN: f64 = 0.05;
const FREE_SEGMENTS_MIN: u64 = 16;
/// Rights to create are tried with an object of this name and a number.
const PROBE: &str = "doctor-probe";

/// What to check.
#[derive(Debug, Clone)]
pub struct DoctorRequest {
    /// The archive.
    pub archive: Archive,
    /// Its address.
    pub url: ArchiveUrl,
    /// The cluster in it.
    pub layout: Layout,
    /// The data directory.
    pub data_dir: PathBuf,
    /// How to reach the server, where postmaster.pid does not say it.
    pub connection: Option<String>,
    /// Whether a segment may be switched, so that there is one to follow.
    pub switch: bool,
    /// How long that segment may take.
    pub wait: Duration,
}

/// What was found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Checkup {
    /// The checks, in the order they were made.
    pub checks: Vec<Check>,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was checked.
    pub name: &'static str,
    /// How it went.
    pub result: CheckResult,
    /// What was found.
    pub found: String,
    /// What to do about it.
    pub hint: Option<String>,
    /// Whether the archive is at fault: it is damaged, or what was acknowledged is not there.
    pub archive_at_fault: bool,
}

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckResult {
    /// As it should be.
    Ok,
    /// It works, and could be better.
    Warning,
    /// It does not work.
    Failed,
    /// Not asked for, or not possible after what failed before.
    Skipped,
}

impl Checkup {
    /// Whether a check failed.
    pub fn has_failed(&self) -> bool {
        self.checks.iter().any(|check| check.result == CheckResult::Failed)
    }

    /// Whether the archive is at fault.
    pub fn is_archive_at_fault(&self) -> bool {
        self.checks.iter().any(|check| check.archive_at_fault)
    }

    fn push(&mut self, name: &'static str, result: CheckResult, found: impl Into<String>) -> &mut Check {
        self.checks.push(Check { name, result, found: found.into(), hint: None, archive_at_fault: false });
        self.checks.last_mut().expect("one was just pushed")
    }

    fn ok(&mut self, name: &'static str, found: impl Into<String>) {
        self.push(name, CheckResult::Ok, found);
    }

    fn warn(&mut self, name: &'static str, found: impl Into<String>, hint: &str) {
        self.push(name, CheckResult::Warning, found).hint = Some(hint.to_owned());
    }

    fn fail(&mut self, name: &'static str, found: impl Into<String>, hint: &str) {
        self.push(name, CheckResult::Failed, found).hint = Some(hint.to_owned());
    }

    fn skip(&mut self, name: &'static str, why: &str) {
        self.push(name, CheckResult::Skipped, why);
    }

    fn blame_archive(&mut self, name: &'static str, found: impl Into<String>) {
        let check = self.push(name, CheckResult::Failed, found);
        check.archive_at_fault = true;
        check.hint = Some("run `waltide verify`".to_owned());
    }
}

/// Makes every check that can be made; one that fails does not keep the others from being made.
pub async fn doctor(request: &DoctorRequest) -> Checkup {
    let mut checkup = Checkup::default();
    let system = check_data_dir(request, &mut checkup).await;
    check_rights(request, system.as_ref(), &mut checkup).await;
    check_space(request, system.as_ref(), &mut checkup);
    let asked =
        ConnectRequest { connection: request.connection.clone(), data_dir: Some(request.data_dir.clone()) };
    let client = match connect(&asked).await {
        Ok(client) => client,
        Err(e) => {
            checkup.fail("server", one_line(&e), "start the server, or say with --connection where it is");
            for name in ["settings", "archiver", "round trip"] {
                checkup.skip(name, "there is no connection");
            }
            return checkup;
        }
    };
    if let Err(e) = check_server(request, &client, system.as_ref(), &mut checkup).await {
        checkup.fail("server", one_line(&e), "log in as a superuser or as a member of pg_read_all_settings");
    }
    checkup
}

/// Whether the data directory is one, and the archive knows it.
async fn check_data_dir(request: &DoctorRequest, checkup: &mut Checkup) -> Option<SystemInfo> {
    let name = "data directory";
    let control = match read_control(&request.data_dir) {
        Ok(control) => control,
        Err(e) => {
            checkup.fail(name, one_line(&e), "run doctor as the server's operating system user");
            return None;
        }
    };
    let checksums = control.data_checksum_version != 0;
    checkup.ok(name, format!("PostgreSQL {}, system {}", control.major, control.system_id));
    match checksums {
        true => checkup.ok("data_checksums", "on"),
        false => checkup.warn(
            "data_checksums",
            "off",
            "without them a damaged page is only found by whoever reads it; pg_checksums --enable turns them on",
        ),
    }
    let path = request.layout.system(control.system_id).system_json();
    match read_json::<SystemInfo>(&request.archive, &path).await {
        Ok(Some(info)) => {
            checkup.ok(
                "cluster in the archive",
                format!("{} of {}", request.layout.cluster(), request.archive.url()),
            );
            Some(info)
        }
        Ok(None) => {
            let found = format!("{} does not know system {}", request.layout.cluster(), control.system_id);
            checkup.fail(
                "cluster in the archive",
                found,
                "run `waltide init`, after pg_upgrade with --upgrade",
            );
            None
        }
        Err(e) => {
            let found = one_line(&e);
            match e {
                crate::init::InitError::Damaged { .. } => {
                    checkup.blame_archive("cluster in the archive", found)
                }
                _ => checkup.fail("cluster in the archive", found, "see that the archive can be reached"),
            }
            None
        }
    }
}

/// Whether objects can be created and removed, and whose clock dates them.
async fn check_rights(request: &DoctorRequest, system: Option<&SystemInfo>, checkup: &mut Checkup) {
    let rights = "rights in the archive";
    let Some(system) = system else {
        checkup.skip(rights, "the cluster is not in the archive");
        return;
    };
    let number = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    let path = format!("{}/{PROBE}-{number:x}", request.layout.system(system.system_id).prefix());
    let archive = &request.archive;
    let probe = async {
        if archive.put_new(&path, Bytes::from_static(PROBE.as_bytes())).await? == Put::Exists {
            return Ok(None);
        }
        let made = unix_seconds();
        let read = archive.get(&path, 1 << 10).await;
        let info = archive.head(&path).await;
        archive.delete(&path).await?;
        Ok::<_, StorageError>(Some((read?, info?, made)))
    };
    match probe.await {
        Ok(None) => checkup.warn(rights, format!("{path} is in the way"), "remove it"),
        Ok(Some((read, info, made))) if read == PROBE.as_bytes() => {
            checkup.ok(rights, "objects can be created, read and removed");
            #[allow(clippy::cast_precision_loss)] // milliseconds since 1970 fit
            let dated = info.map_or(made, |info| info.modified_unix_ms as f64 / 1e3);
            check_clock(checkup, "clock of the archive", dated - made);
        }
        Ok(Some(_)) => checkup.blame_archive(rights, format!("{path} does not read as it was written")),
        Err(e) => {
            checkup.fail(rights, one_line(&e), "see that the archive is mounted and writable for this user")
        }
    }
}

fn check_clock(checkup: &mut Checkup, name: &'static str, apart: f64) {
    let found = format!("{apart:+.1} s from this machine's");
    match apart.abs() <= CLOCK_SECONDS_MAX {
        true => checkup.ok(name, found),
        false => checkup.warn(
            name,
            found,
            "time targets and retention compare times of both: keep the clocks together with NTP",
        ),
    }
}

/// Seconds since 1970.
fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

fn check_space(request: &DoctorRequest, system: Option<&SystemInfo>, checkup: &mut Checkup) {
    let name = "space in the archive";
    let Some(path) = request.url.local_path() else {
        checkup.skip(name, "an object store has no limit that it tells");
        return;
    };
    match rustix::fs::statvfs(path) {
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            #[allow(clippy::cast_precision_loss)] // a share needs no more
            let share = stat.f_bavail as f64 / (stat.f_blocks.max(1)) as f64;
            let least = system.map_or(16 << 20, |s| s.segment_size.bytes()).saturating_mul(FREE_SEGMENTS_MIN);
            let found = format!("{} MiB free, {:.0} %", free >> 20, share * 100.0);
            if free < least {
                checkup.fail(
                    name,
                    found,
                    "add space, or prune: a full archive stops the archiver, and pg_wal fills",
                );
            } else if share < FREE_SHARE_MIN {
                checkup.warn(name, found, "add space, or prune");
            } else {
                checkup.ok(name, found);
            }
        }
        Err(e) => checkup.warn(name, format!("it cannot be asked: {e}"), "look yourself"),
    }
}

async fn check_server(
    request: &DoctorRequest,
    client: &Client,
    system: Option<&SystemInfo>,
    checkup: &mut Checkup,
) -> Result<(), tokio_postgres::Error> {
    let sent = unix_seconds();
    let sql = "select current_setting('server_version'), extract(epoch from clock_timestamp())::float8, \
               pg_is_in_recovery(), (select system_identifier::text from pg_control_system())";
    let row = client.query_one(sql, &[]).await?;
    let received = unix_seconds();
    let (version, clock, is_standby): (String, f64, bool) = (row.get(0), row.get(1), row.get(2));
    let identifier: Option<String> = row.get(3);
    let server_system: Option<SystemId> = identifier.and_then(|text| text.parse().ok());
    if system.is_some_and(|info| Some(info.system_id) != server_system) {
        let found = format!("the connection leads to another database, PostgreSQL {version}");
        checkup.fail("server", found, "say with --connection where the data directory's own server is");
        return Ok(());
    }
    checkup.ok("server", format!("{version}{}", if is_standby { ", a standby" } else { "" }));
    check_clock(checkup, "clock of the server", clock - f64::midpoint(sent, received));
    check_settings(request, client, checkup).await?;
    check_archiver(client, checkup).await?;
    match system {
        Some(system) => check_round_trip(request, client, system, is_standby, checkup).await,
        None => {
            checkup.skip("round trip", "the cluster is not in the archive");
            Ok(())
        }
    }
}

async fn check_settings(
    request: &DoctorRequest,
    client: &Client,
    checkup: &mut Checkup,
) -> Result<(), tokio_postgres::Error> {
    let names = ["wal_level", "archive_mode", "full_page_writes", "fsync"];
    let hints = [
        "set wal_level = replica and restart the server",
        "set archive_mode = on and restart the server",
        "without it a torn page cannot be repaired by replay: set full_page_writes = on",
        "without it a crash can lose what was committed: set fsync = on",
    ];
    for (name, hint) in names.into_iter().zip(hints) {
        let value: String = client.query_one("select current_setting($1)", &[&name]).await?.get(0);
        match (name, value.as_str()) {
            ("wal_level", "replica" | "logical") | (_, "on" | "always") => checkup.ok(name, value),
            ("fsync", _) => checkup.warn(name, value, hint),
            _ => checkup.fail(name, value, hint),
        }
    }
    let seconds = "select setting::int8 from pg_settings where name = 'archive_timeout'";
    let timeout: i64 = client.query_one(seconds, &[]).await?.get(0);
    match timeout {
        0 => checkup.warn(
            "archive_timeout",
            "off",
            "a quiet server keeps its last commits to itself until a segment is full: set archive_timeout = 60s",
        ),
        n => checkup.ok("archive_timeout", format!("{n} s")),
    }
    let library = "select setting from pg_settings where name = 'archive_library'";
    let library: Option<String> = client.query_opt(library, &[]).await?.map(|row| row.get(0));
    let command: String = client.query_one("select current_setting('archive_command')", &[]).await?.get(0);
    let name = "archive_command";
    match library.filter(|library| !library.is_empty()) {
        Some(library) => checkup.warn(
            name,
            format!("archive_library {library} is used instead"),
            "unset archive_library to ship with waltide",
        ),
        None => match judge_command(&command, request) {
            Command::Ours => checkup.ok(name, command),
            Command::Unclear(why) => {
                checkup.warn(name, format!("{command}: {why}"), "`waltide init` prints the right one")
            }
            Command::Wrong(why) => {
                checkup.fail(name, format!("{command}: {why}"), "`waltide init` prints the right one")
            }
        },
    }
    Ok(())
}

/// What an archive_command does.
#[derive(Debug, PartialEq, Eq)]
enum Command {
    Ours,
    Unclear(String),
    Wrong(String),
}

fn judge_command(command: &str, request: &DoctorRequest) -> Command {
    if command.is_empty() || command == "(disabled)" {
        return Command::Wrong("nothing is archived".to_owned());
    }
    let command = command.replace("%%", "%");
    let Some(words) = shell_words(&command) else {
        return Command::Wrong("its quotes are not closed".to_owned());
    };
    // Assignments before the command are part of its environment.
    let mut words =
        words.into_iter().skip_while(|w| w.split_once('=').is_some_and(|(n, _)| !n.contains('/')));
    let program = words.next().unwrap_or_default();
    let words: Vec<String> = words.collect();
    let path = Path::new(&program);
    if path.is_absolute() && !path.exists() {
        return Command::Wrong(format!("there is no {program}"));
    }
    let is_ours = path.file_name().is_some_and(|name| name == "waltide") && words.iter().any(|w| w == "push");
    if !is_ours {
        return Command::Unclear("it does not call `waltide push`".to_owned());
    }
    if !path.is_absolute() {
        return Command::Unclear("the program's path is not absolute".to_owned());
    }
    let value = |flag: &str| {
        let at = words.iter().position(|w| w == flag);
        let next = at.and_then(|at| words.get(at.saturating_add(1))).cloned();
        next.or_else(|| words.iter().find_map(|w| w.strip_prefix(flag)?.strip_prefix('=').map(str::to_owned)))
    };
    match value("--archive").map(|text| text.parse::<ArchiveUrl>()) {
        None => return Command::Unclear("it names no --archive, so its environment decides".to_owned()),
        Some(Ok(url)) if same_place(&url, &request.url) => {}
        Some(_) => return Command::Wrong(format!("it ships to another archive than {}", request.url)),
    }
    let cluster = value("--cluster").unwrap_or_else(|| "main".to_owned());
    if cluster != request.layout.cluster() {
        return Command::Wrong(format!("it ships to cluster {cluster}, not {}", request.layout.cluster()));
    }
    Command::Ours
}

fn same_place(a: &ArchiveUrl, b: &ArchiveUrl) -> bool {
    let real = |url: &ArchiveUrl| url.local_path().and_then(|path| path.canonicalize().ok());
    a == b || real(a).is_some_and(|path| Some(path) == real(b))
}

async fn check_archiver(client: &Client, checkup: &mut Checkup) -> Result<(), tokio_postgres::Error> {
    let sql = "select archived_count, failed_count, last_archived_wal, last_failed_wal, \
               coalesce(last_failed_time > coalesce(last_archived_time, '-infinity'), false) from pg_stat_archiver";
    let row = client.query_one(sql, &[]).await?;
    let (archived, failed): (i64, i64) = (row.get(0), row.get(1));
    let (last, last_failed): (Option<String>, Option<String>) = (row.get(2), row.get(3));
    let is_failing: bool = row.get(4);
    let last = last.unwrap_or_else(|| "none".to_owned());
    let found = format!("{archived} archived, the last {last}; {failed} failures");
    match is_failing {
        true => checkup.fail(
            "archiver",
            format!("{found}, the last {} and nothing since", last_failed.unwrap_or_default()),
            "the server's log has what archive_command said",
        ),
        false => checkup.ok("archiver", found),
    }
    Ok(())
}

/// Follows a segment into the archive and back.
async fn check_round_trip(
    request: &DoctorRequest,
    client: &Client,
    system: &SystemInfo,
    is_standby: bool,
    checkup: &mut Checkup,
) -> Result<(), tokio_postgres::Error> {
    let name = "round trip";
    let switches = request.switch && !is_standby;
    let segment: Option<String> = if switches {
        // The message gives the segment a record, for an empty one is not switched.
        let sql = "select pg_walfile_name(pg_switch_wal()) from \
                   (select pg_logical_emit_message(false, 'waltide', 'doctor')) as record";
        client.query_one(sql, &[]).await?.get(0)
    } else {
        client.query_one("select last_archived_wal from pg_stat_archiver", &[]).await?.get(0)
    };
    let file: Option<WalFileName> = segment.and_then(|text| text.parse().ok());
    let segment = match file {
        Some(WalFileName::Segment(segment)) => segment,
        // It is made behind the segment that it is named after.
        Some(WalFileName::BackupHistory(backup)) => backup.segment,
        Some(file @ (WalFileName::Partial(_) | WalFileName::History(_))) => {
            checkup.skip(name, &format!("what was archived last is no whole segment: {file}"));
            return Ok(());
        }
        None => {
            checkup.skip(name, "no segment has been archived since the statistics were reset");
            return Ok(());
        }
    };
    let file = WalFileName::Segment(segment);
    let object = request.layout.system(system.system_id).wal_file(file);
    let started = Instant::now();
    loop {
        match request.archive.head(&object).await {
            Ok(Some(_)) => break,
            Ok(None) if !switches => {
                let found = format!("{segment} counts as archived and is not in the archive");
                checkup.blame_archive(name, found);
                return Ok(());
            }
            Ok(None) if started.elapsed() >= request.wait => {
                let found = format!("{segment} is not in the archive after {} s", request.wait.as_secs());
                let hint = "the server's log has what archive_command said; --wait gives it longer";
                checkup.fail(name, found, hint);
                return Ok(());
            }
            Ok(None) => tokio::time::sleep(Duration::from_millis(100)).await,
            Err(e) => {
                checkup.fail(name, one_line(&e), "see that the archive can be reached");
                return Ok(());
            }
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let stored = match request.archive.get(&object, SEGMENT_BYTES_MAX.saturating_mul(2)).await {
        Ok(stored) => stored,
        Err(e) => {
            checkup.fail(name, one_line(&e), "see that the archive can be read");
            return Ok(());
        }
    };
    let path = WalDir::new(request.data_dir.join("pg_wal")).file(file);
    let read = tokio::task::spawn_blocking(move || {
        let stored = StoredSegment::decode(&stored)?;
        let original = read_whole(&path, SEGMENT_BYTES_MAX).ok();
        Ok::<_, waltide_format::Corrupt>((stored, original.map(|wal| wal_digest(&wal))))
    });
    match read.await {
        Ok(Ok((stored, original))) if original.is_none_or(|digest| digest == stored.digest) => {
            let compared =
                if original.is_some() { "the same as in pg_wal" } else { "its checksums are right" };
            let waited = if switches { format!(" after {seconds:.1} s") } else { String::new() };
            checkup.ok(name, format!("{segment} was in the archive{waited}, and comes back {compared}"));
        }
        Ok(Ok(_)) => {
            checkup.blame_archive(name, format!("{object} is not the {segment} that lies in pg_wal"))
        }
        Ok(Err(e)) => checkup.blame_archive(name, format!("{object} is damaged: {e}")),
        Err(_) => checkup.fail(name, "reading it was cut short", "try again"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn request(archive: &Path) -> DoctorRequest {
        let url: ArchiveUrl = archive.to_str().unwrap().parse().unwrap();
        DoctorRequest {
            archive: Archive::create(&url).await.unwrap(),
            url,
            layout: Layout::new("main").unwrap(),
            data_dir: PathBuf::new(),
            connection: None,
            switch: true,
            wait: Duration::ZERO,
        }
    }

    #[tokio::test]
    async fn an_archive_command_is_ours_where_it_ships_to_this_archive() {
        let scratch = tempfile::tempdir().unwrap();
        let archive = scratch.path().join("a b");
        let request = request(&archive).await;
        let program = scratch.path().join("waltide");
        std::fs::write(&program, "").unwrap();
        let (archive, program) = (archive.display(), program.display());
        let ours = [
            format!("{program} --archive '{archive}' --cluster main push %p"),
            format!("TZ=UTC '{program}' push --archive=\"{archive}\" %p"),
            format!("{program} --archive {} push %p", request.url.to_string().replace('%', "%%")),
        ];
        for command in ours {
            assert_eq!(judge_command(&command, &request), Command::Ours, "{command}");
        }
        for (command, why) in [
            (String::new(), "nothing is archived".to_owned()),
            ("/nowhere/waltide push %p".to_owned(), "there is no /nowhere/waltide".to_owned()),
            (format!("{program} --archive '/x push %p"), "its quotes are not closed".to_owned()),
            (
                format!("{program} --archive /x push %p"),
                format!("it ships to another archive than {}", request.url),
            ),
            (
                format!("{program} --archive '{archive}' --cluster b push %p"),
                "it ships to cluster b, not main".to_owned(),
            ),
        ] {
            assert_eq!(judge_command(&command, &request), Command::Wrong(why), "{command}");
        }
        for command in ["cp %p /x/%f".to_owned(), format!("{program} push %p"), "waltide push %p".to_owned()]
        {
            assert!(matches!(judge_command(&command, &request), Command::Unclear(_)), "{command}");
        }
    }
}
