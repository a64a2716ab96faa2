//! How an archive stands: what can be restored to, what is wrong, how far it lags. Pure: a catalogue and a moment in.

use std::time::Duration;

use serde::Serialize;
use waltide_format::archive::{
    BackupKind, BrokenBackup, Catalog, DamagedObject, Hole, Moment, Reach, RecoveryWindow, StartedBackup,
    TimelineHistory,
};
use waltide_format::{BackupId, PgMajor, SystemId, TimestampTz};

/// A backup that was announced so long ago, and is not known to run, was interrupted.
pub const INTERRUPTED_AFTER: Duration = Duration::from_secs(24 * 3600);

/// Clocks of two machines that are kept right differ by less.
const CLOCKS_DIFFER_SECONDS: f64 = 5.0;

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

/// How far a timeline's archived WAL reaches, and how far behind a moment that is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Lag {
    /// How far.
    #[serde(flatten)]
    pub reach: Reach,
    /// From the last archived commit until now. The server dated the commit, this machine says now.
    pub lag_seconds: Option<f64>,
    /// From the last commit that a restore brings back until now: what is lost if the server is lost now, at the most.
    pub recoverable_lag_seconds: Option<f64>,
    /// How far the last commit lies in the future, where that is more than clocks that are kept right differ.
    pub clock_ahead_seconds: Option<f64>,
}

impl Lag {
    fn of(reach: Reach, now: TimestampTz) -> Self {
        let since = |t: Option<TimestampTz>| t.map(|t| now.seconds_since(t));
        let lag = since(reach.last_commit);
        Self {
            lag_seconds: lag.map(|s| s.max(0.0)),
            recoverable_lag_seconds: since(reach.last_recoverable_commit).map(|s| s.max(0.0)),
            clock_ahead_seconds: lag.filter(|s| *s < -CLOCKS_DIFFER_SECONDS).map(|s| -s),
            reach,
        }
    }
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
    /// How far the newest timeline that has any WAL reaches.
    pub wal: Option<Lag>,
    /// The same of every timeline, oldest first.
    pub timelines: Vec<Lag>,
    /// Which history each timeline is, oldest first.
    pub histories: Vec<TimelineHistory>,
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
    let reaches = catalog.reaches(&coverage.windows);
    let timelines: Vec<_> = reaches.into_iter().map(|reach| Lag::of(reach, now)).collect();
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
        wal: timelines.last().cloned(),
        timelines,
        histories: catalog.histories(),
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
        let windows = hole.ends.iter().map(|w| {
            format!("; it ends the window on timeline {} that begins at {}, at {}", w.timeline, w.from, w.to)
        });
        let windows: String = windows.collect();
        let side = |moment: Option<Moment>| match moment {
            Some(Moment { lsn, time: Some(time) }) => format!("{lsn} ({time})"),
            Some(Moment { lsn, time: None }) => lsn.to_string(),
            None => "nothing".to_owned(),
        };
        let (before, after) = (side(hole.before), side(hole.after));
        let text = format!(
            "timeline {}: {}; {harms}{windows}; the nearest that can be restored to: before it {before}, after it {after}",
            hole.gap.timeline, hole.gap
        );
        add(Health::Damaged, text);
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
    if let Some(ahead) = status.wal.as_ref().and_then(|w| w.clock_ahead_seconds) {
        let text = format!(
            "the last commit is dated {ahead:.0} s ahead of this machine's clock: one of the two clocks is wrong, and with \
             it the lag"
        );
        add(Health::Ok, text);
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

#[cfg(test)]
mod tests {
    use waltide_format::{Lsn, TimelineId};

    use super::*;

    #[test]
    fn the_lag_is_told_from_both_last_commits_and_a_clock_ahead_is_noticed() {
        let at = |s: i64| TimestampTz::from_postgres_micros(s * 1_000_000);
        let reach = |last, recoverable| Reach {
            timeline: TimelineId::FIRST,
            segment: "000000010000000000000003".parse().unwrap(),
            end: Lsn::from(1),
            last_commit: Some(at(last)),
            recoverable_to: None,
            last_recoverable_commit: recoverable,
        };
        let told = |reach| {
            let lag = Lag::of(reach, at(100));
            (lag.lag_seconds, lag.recoverable_lag_seconds, lag.clock_ahead_seconds)
        };
        assert_eq!(told(reach(90, Some(at(40)))), (Some(10.0), Some(60.0), None));
        assert_eq!(told(reach(104, None)), (Some(0.0), None, None));
        assert_eq!(told(reach(120, None)), (Some(0.0), None, Some(20.0)));
    }
}
