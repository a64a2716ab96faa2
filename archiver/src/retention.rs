//! What may go: catalogue, inventory and policy in, plan out. Pure; `prune.rs` carries the plan out.
//!
//! What holds of every plan, and is checked by the property tests:
//! - the last backup that can be restored stays, and so does every pinned one;
//! - whatever a backup that stays refers to stays: its extent maps, the packs they name, its WAL from start to end
//!   and, unless it is kept alone by a pin, the run of WAL that follows, along every timeline it reaches;
//! - what cannot be understood is not removed.

mod lost;
mod parts;
mod verdicts;

use std::time::Duration;

use serde::Serialize;
use waltide_format::archive::{BackupEntry, Catalog, StartedBackup};
use waltide_format::{BackupId, Lsn, SystemId, TimelineId, TimestampTz};

use crate::inventory::Inventory;
use crate::status::INTERRUPTED_AFTER;
use lost::{lost_windows, without};
use parts::Parts;
use verdicts::{judge, live_backups};

const DAY_SECONDS: f64 = 86_400.0;

/// Which backups to keep. A backup stays if any rule keeps it; without a rule every backup stays.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Policy {
    /// Keep what ended within so many days.
    pub days: Option<u32>,
    /// Keep the newest so many.
    pub count: Option<u32>,
    /// Keep the newest of each of the last so many hours that have one.
    pub hourly: Option<u32>,
    /// The same by day, in UTC.
    pub daily: Option<u32>,
    /// The same by ISO week.
    pub weekly: Option<u32>,
    /// The same by month.
    pub monthly: Option<u32>,
    /// Keep what it takes to restore to any moment of the last so many days.
    pub window_days: Option<u32>,
    /// Never remove a backup that ended within so many days, whatever the rules say.
    pub min_age_days: Option<u32>,
    /// How long nothing may have been heard of an unfinished backup before it counts as given up.
    pub give_up_after: Duration,
    /// Whether manifests that cannot be read go as well. While one is there nothing is known of what it refers to,
    /// so no extent map, pack or WAL goes either.
    pub drop_damaged: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            days: None,
            count: None,
            hourly: None,
            daily: None,
            weekly: None,
            monthly: None,
            window_days: None,
            min_age_days: None,
            give_up_after: INTERRUPTED_AFTER,
            drop_damaged: false,
        }
    }
}

impl Policy {
    /// Whether any rule says what to keep. Without one only what interrupted backups left is removed.
    pub fn has_rules(&self) -> bool {
        let rules =
            [self.days, self.count, self.hourly, self.daily, self.weekly, self.monthly, self.window_days];
        rules.iter().any(Option::is_some)
    }
}

/// What becomes of a backup, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// The backup.
    pub id: BackupId,
    /// When it ended.
    pub stopped: TimestampTz,
    /// Whether it stays.
    pub keep: bool,
    /// The rules that keep it, or that none does.
    pub reasons: Vec<String>,
}

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ObjectRole {
    /// A backup's manifest.
    Manifest,
    /// What announced a backup.
    Started,
    /// A pin on a backup that is not there.
    Keep,
    /// An extent map.
    Map,
    /// A pack.
    Pack,
    /// A segment, or a copy of one.
    Wal,
    /// A backup history file.
    BackupHistory,
    /// A merged index.
    MergedIndex,
    /// What a prune announced.
    Mark,
}

/// An object that goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Deletion {
    /// Its name.
    pub path: String,
    /// What it is.
    pub role: ObjectRole,
    /// Its length.
    pub bytes: u64,
}

/// A stretch of time that can no longer be restored to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LostWindow {
    /// Along which timeline.
    pub timeline: TimelineId,
    /// From here,
    pub from: Lsn,
    /// which was then,
    pub from_time: TimestampTz,
    /// up to here,
    pub to: Lsn,
    /// which was then.
    pub to_time: Option<TimestampTz>,
}

/// What goes and what stays. Only a plan can be carried out.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PrunePlan {
    /// The system it is for.
    pub system_id: SystemId,
    /// The moment it is for.
    pub now: TimestampTz,
    /// Every complete backup, newest first.
    pub backups: Vec<Verdict>,
    /// Backups that were given up: what they left goes.
    pub interrupted: Vec<BackupId>,
    /// Objects that go, in the order they must go.
    pub deletions: Vec<Deletion>,
    /// What can be restored to now and not afterwards.
    pub lost: Vec<LostWindow>,
    /// Why something that might go stays.
    pub held_back: Vec<String>,
}

impl PrunePlan {
    /// Bytes that the deletions free.
    pub fn freed_bytes(&self) -> u64 {
        self.deletions.iter().fold(0, |sum, d| sum.saturating_add(d.bytes))
    }

    /// Complete backups that go.
    pub fn removed(&self) -> impl Iterator<Item = &BackupId> {
        self.backups.iter().filter(|v| !v.keep).map(|v| &v.id)
    }
}

/// Decides what goes. `running` says whether an announced backup's process lives, where that is known.
pub fn plan(
    catalog: &Catalog,
    inventory: &Inventory,
    policy: &Policy,
    now: TimestampTz,
    running: impl Fn(&StartedBackup) -> Option<bool>,
) -> PrunePlan {
    let coverage = catalog.coverage();
    let mut held_back = Vec::new();
    let live = live_backups(catalog, inventory, policy, now, running);
    let verdicts = judge(catalog, inventory, &coverage, policy, &live, now);
    let kept: Vec<&BackupEntry> =
        catalog.backups.iter().filter(|b| verdicts.get(&b.head.id).is_some_and(|v| v.keep)).collect();
    let parts = Parts { catalog, inventory, policy, now, kept: &kept, live: &live };

    let mut deletions = parts.manifests(&verdicts);
    let (announcements, interrupted) = parts.announcements();
    deletions.extend(announcements);
    let unreadable = parts.unreadable_manifests();
    if unreadable.is_empty() || policy.drop_damaged {
        deletions.extend(unreadable);
        deletions.extend(parts.chunks(&mut held_back));
        deletions.extend(parts.wal(&verdicts, &coverage, &mut held_back));
    } else {
        let paths: Vec<_> = unreadable.iter().map(|d| d.path.as_str()).collect();
        held_back.push(format!(
            "{} cannot be read, so it is not known which extent maps, packs and WAL are needed: none goes; verify \
             says what is wrong, --drop-damaged gives the backup up",
            paths.join(", ")
        ));
    }
    deletions.extend(parts.merged(&deletions));
    deletions.extend(parts.marks());
    let lost = lost_windows(&coverage, &without(catalog, &deletions, &verdicts).coverage());
    let mut backups: Vec<_> = verdicts.into_values().collect();
    backups.sort_by(|a, b| (b.stopped, &b.id).cmp(&(a.stopped, &a.id)));
    PrunePlan { system_id: catalog.system.system_id, now, backups, interrupted, deletions, lost, held_back }
}

#[cfg(test)]
mod tests;
