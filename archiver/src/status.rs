//! How an archive stands: what can be restored to, what is wrong, how far it lags. Pure: a catalogue and a moment in.

use std::time::Duration;

use serde::Serialize;
use waltide_format::archive::{
    BackupKind, BrokenBackup, Catalog, DamagedObject, Hole, RecoveryWindow, StartedBackup,
};
use waltide_format::{BackupId, Lsn, PgMajor, SegmentName, SystemId, TimelineId, TimestampTz};

/// A backup that was announced so long ago, and is not known to run, was interrupted.
pub const INTERRUPTED_AFTER: Duration = Duration::from_secs(24 * 3600);

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// Nothing to do.
    Ok,
    /// Something the operator should look at; nothing is lost.
    Warning,
    /// The archive is damaged or incomplete.
    Damaged,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Alert {
    /// How bad.
    pub health: Health,
    /// What, and what to do.
    pub text: String,
}

/// The backup that ended last.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LastBackup {
    /// Its name.
    pub id: BackupId,
    /// Its kind.
    pub kind: BackupKind,
    /// When it ended.
    pub stopped: TimestampTz,
    /// How long ago that was.
    pub age_seconds: f64,
}

/// How far the archived WAL reaches on the newest timeline that has any.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LastWal {
    /// The timeline.
    pub timeline: TimelineId,
    /// The last segment there.
    pub segment: SegmentName,
    /// Where its valid records end.
    pub end: Lsn,
    /// The last commit archived on that timeline's line.
    pub last_commit: Option<TimestampTz>,
    /// How long ago that was: what would be lost if the server were lost now, at the most.
    pub lag_seconds: Option<f64>,
}

/// A backup without a manifest.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Unfinished {
    /// What announced it.
    #[serde(flatten)]
    pub started: StartedBackup,
    /// How long ago.
    pub age_seconds: f64,
    /// Whether it was given up: its process is gone, or nothing is known of it and it is old.
    pub interrupted: bool,
}

/// How an archive stands.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Status {
    /// The cluster.
    pub cluster: String,
    /// Its system identifier.
    pub system_id: SystemId,
    /// Its major version.
    pub major: PgMajor,
    /// The worst of the alerts.
    pub health: Health,
    /// What is wrong, the worst first.
    pub alerts: Vec<Alert>,
    /// How many complete backups.
    pub backups: usize,
    /// The one that ended last.
    pub last_backup: Option<LastBackup>,
    /// Backups being made, or given up.
    pub unfinished: Vec<Unfinished>,
    /// How far the WAL reaches.
    pub wal: Option<LastWal>,
    /// How many segments.
    pub segments: usize,
    /// What they take in the archive.
    pub wal_stored_bytes: u64,
    /// What can be restored to.
    pub windows: Vec<RecoveryWindow>,
    /// Backups that cannot be restored.
    pub broken_backups: Vec<BrokenBackup>,
    /// Holes in the WAL.
    pub holes: Vec<Hole>,
    /// Objects that cannot be read.
    pub damaged: Vec<DamagedObject>,
}

/// Judges the archive at `now`. `running` says whether a started backup's process lives, where that is known; with
/// `max_age`, a last backup older than that is an alert.
pub fn status(
    catalog: &Catalog,
    now: TimestampTz,
    max_age: Option<Duration>,
    running: impl Fn(&StartedBackup) -> Option<bool>,
) -> Status {
    let coverage = catalog.coverage();
    let last = catalog.backups.iter().max_by_key(|b| b.head.stopped);
    let last_backup = last.map(|b| LastBackup {
        id: b.head.id.clone(),
        kind: b.head.kind,
        stopped: b.head.stopped,
        age_seconds: now.seconds_since(b.head.stopped),
    });
    let unfinished = catalog.started.iter().map(|s| {
        let age_seconds = now.seconds_since(s.started);
        let old = age_seconds > INTERRUPTED_AFTER.as_secs_f64();
        Unfinished { interrupted: !running(s).unwrap_or(!old), age_seconds, started: s.clone() }
    });
    let mut status = Status {
        cluster: catalog.cluster.clone(),
        system_id: catalog.system.system_id,
        major: catalog.system.major,
        health: Health::Ok,
        alerts: Vec::new(),
        backups: catalog.backups.len(),
        last_backup,
        unfinished: unfinished.collect(),
        wal: last_wal(catalog, now),
        segments: catalog.segments.len(),
        wal_stored_bytes: catalog.segments.iter().fold(0, |sum, s| sum.saturating_add(s.stored_bytes)),
        windows: coverage.windows,
        broken_backups: coverage.broken_backups,
        holes: coverage.holes,
        damaged: catalog.damaged.clone(),
    };
    status.alerts = alerts(&status, max_age);
    status.health = status.alerts.iter().map(|a| a.health).max().unwrap_or(Health::Ok);
    status
}

fn last_wal(catalog: &Catalog, now: TimestampTz) -> Option<LastWal> {
    let last = catalog.segments.iter().map(|s| s.info.name).max()?;
    let timeline = last.timeline();
    let entry = catalog.best_copy(last)?;
    // A timeline that has just begun may have no commit yet: its ancestor's last is meant.
    let line = catalog.lineage(timeline);
    let commits = |timeline| catalog.best_copies(timeline).filter_map(|s| s.info.last_commit_time).last();
    let last_commit = line.newest_first().find_map(|(timeline, _, _)| commits(timeline));
    Some(LastWal {
        timeline,
        segment: last,
        end: entry.info.valid_end,
        last_commit,
        lag_seconds: last_commit.map(|t| now.seconds_since(t).max(0.0)),
    })
}

fn alerts(status: &Status, max_age: Option<Duration>) -> Vec<Alert> {
    let mut alerts = Vec::new();
    let mut add = |health, text| alerts.push(Alert { health, text });
    for object in &status.damaged {
        add(Health::Damaged, format!("{} is damaged: {}", object.path, object.error));
    }
    for hole in status.holes.iter().filter(|h| !h.by_retention) {
        let harms = match hole.harms.as_slice() {
            [] => "no backup needs it".to_owned(),
            [one] => format!("{one} cannot recover past it"),
            [first, .., last] => {
                format!("{} backups from {first} to {last} cannot recover past it", hole.harms.len())
            }
        };
        add(Health::Damaged, format!("timeline {}: {}; {harms}", hole.gap.timeline, hole.gap));
    }
    for broken in &status.broken_backups {
        let text = format!(
            "backup {} cannot be restored: its WAL is whole up to {} and needed up to {}: {}",
            broken.backup, broken.whole_until, broken.needed_until, broken.reason
        );
        add(Health::Damaged, text);
    }
    match (&status.last_backup, max_age) {
        (None, _) => add(Health::Warning, "there is no backup; make one with `waltide backup`".to_owned()),
        (Some(last), Some(max)) if last.age_seconds > max.as_secs_f64() => {
            let hours = |seconds: f64| format!("{:.1} h", seconds / 3600.0);
            let (age, max) = (hours(last.age_seconds), hours(max.as_secs_f64()));
            add(Health::Warning, format!("the last backup, {}, is {age} old, more than {max}", last.id));
        }
        _ => {}
    }
    for unfinished in status.unfinished.iter().filter(|u| u.interrupted) {
        let (id, host) = (&unfinished.started.id, &unfinished.started.host);
        add(
            Health::Warning,
            format!("backup {id} on {host} was interrupted; `waltide prune` removes what it left"),
        );
    }
    alerts.sort_by_key(|a| std::cmp::Reverse(a.health));
    alerts
}
