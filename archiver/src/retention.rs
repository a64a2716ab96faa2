//! What may go: catalogue, inventory and policy in, plan out. Pure; `prune.rs` carries the plan out.
//!
//! What holds of every plan, and is checked by the property tests below:
//! - the last backup that can be restored stays, and so does every pinned one;
//! - whatever a backup that stays refers to stays: its extent maps, the packs they name, its WAL from start to end
//!   and, unless it is kept alone by a pin, the run of WAL that follows, along every timeline it reaches;
//! - what cannot be understood is not removed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::Serialize;
use waltide_format::archive::{BackupEntry, Catalog, Coverage, RecoveryWindow, StartedBackup, WalObject};
use waltide_format::{BackupId, Lsn, SegmentName, SystemId, TimelineId, TimestampTz, WalFileName};

use crate::catalog::BackupObject;
use crate::inventory::{Inventory, Stored, is_live};
use crate::merged::retired;
use crate::status::INTERRUPTED_AFTER;

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

/// Announced backups that may still be made: those whose process lives, and those of which something was heard
/// lately. Their parents come with them.
fn live_backups(
    catalog: &Catalog,
    inventory: &Inventory,
    policy: &Policy,
    now: TimestampTz,
    running: impl Fn(&StartedBackup) -> Option<bool>,
) -> BTreeMap<BackupId, Option<BackupId>> {
    let mut heard: BTreeMap<BackupId, TimestampTz> = BTreeMap::new();
    let announced = inventory.backups.iter().filter(|(_, part, _)| *part == BackupObject::Started);
    let chunks =
        inventory.packs.iter().chain(inventory.maps.iter().map(|(name, (stored, _))| (name, stored)));
    let signs = announced.map(|(id, _, stored)| (Some(id.clone()), stored));
    for (id, stored) in signs.chain(chunks.map(|(name, stored)| (owner(name), stored))) {
        let Some(id) = id else { continue };
        let last = heard.entry(id).or_insert(stored.modified);
        *last = (*last).max(stored.modified);
    }
    let complete: BTreeSet<&BackupId> = catalog.backups.iter().map(|b| &b.head.id).collect();
    let lately = |at: TimestampTz| now.seconds_since(at) < policy.give_up_after.as_secs_f64();
    let mut live = BTreeMap::new();
    for (id, at) in heard {
        let started = catalog.started.iter().find(|s| s.id == id);
        let lives = started.and_then(&running) == Some(true);
        if !complete.contains(&id) && (lately(at) || lives) {
            live.insert(id, started.and_then(|s| s.parent.clone()));
        }
    }
    live
}

/// Which backup wrote a map or a pack: its name begins with the backup's.
fn owner(name: &str) -> Option<BackupId> {
    let id = name.get(..21)?;
    let rest = name.get(21..)?;
    (rest.is_empty() || rest.starts_with(['-', '.'])).then(|| id.parse().ok()).flatten()
}

/// Applies the rules.
fn judge(
    catalog: &Catalog,
    inventory: &Inventory,
    coverage: &Coverage,
    policy: &Policy,
    live: &BTreeMap<BackupId, Option<BackupId>>,
    now: TimestampTz,
) -> BTreeMap<BackupId, Verdict> {
    let broken: BTreeSet<&BackupId> = coverage.broken_backups.iter().map(|b| &b.backup).collect();
    let mut newest_first: Vec<&BackupEntry> = catalog.backups.iter().collect();
    newest_first.sort_by(|a, b| (b.head.stopped, &b.head.id).cmp(&(a.head.stopped, &a.head.id)));
    // A backup that cannot be restored takes no other's place, unless there is none that can.
    let mut good: Vec<&BackupEntry> =
        newest_first.iter().copied().filter(|b| !broken.contains(&b.head.id)).collect();
    if good.is_empty() {
        good = newest_first.clone();
    }
    let age_days = |at: TimestampTz| now.seconds_since(at) / DAY_SECONDS;
    let within = |at: TimestampTz, days: u32| age_days(at) < f64::from(days);
    let mut reasons: BTreeMap<&BackupId, Vec<String>> = BTreeMap::new();
    let mut keep = |b: &'_ BackupEntry, why: String| {
        if let Some(entry) = catalog.backup(&b.head.id) {
            reasons.entry(&entry.head.id).or_default().push(why);
        }
    };

    if !policy.has_rules() {
        newest_first.iter().for_each(|b| keep(b, "there is no rule".to_owned()));
    }
    for b in good.iter().take(1) {
        keep(b, "the last backup".to_owned());
    }
    // Somebody archives these, though a newer backup may lie on another branch.
    let archived = timelines_archived_within(inventory, now, policy.give_up_after.as_secs_f64());
    for (timeline, b) in bases(catalog, archived, &good, |_| true) {
        keep(b, format!("the last from which timeline {timeline}, which is being archived, can be reached"));
    }
    for b in good.iter().take(policy.count.unwrap_or(0) as usize) {
        keep(b, format!("one of the last {}", policy.count.unwrap_or(0)));
    }
    let periods = [
        (policy.hourly, "hours", "%Y-%m-%d %H h"),
        (policy.daily, "days", "%Y-%m-%d"),
        (policy.weekly, "weeks", "%G-W%V"),
        (policy.monthly, "months", "%Y-%m"),
    ];
    for (wanted, period, form) in periods {
        let Some(wanted) = wanted else { continue };
        let mut seen = BTreeSet::new();
        for b in &good {
            let name = format(b.head.started, form);
            if seen.len() as u64 >= u64::from(wanted) {
                break;
            }
            if seen.insert(name.clone()) {
                keep(b, format!("the last of {name}, one of the last {wanted} {period}"));
            }
        }
    }
    if let Some(days) = policy.days {
        for b in newest_first.iter().filter(|b| within(b.head.stopped, days)) {
            keep(b, format!("younger than {days} days"));
        }
    }
    if let Some(days) = policy.window_days {
        for b in newest_first.iter().filter(|b| within(b.head.stopped, days)) {
            keep(b, format!("in the recovery window of {days} days"));
        }
        let span = DAY_SECONDS * f64::from(days);
        let mut timelines = timelines_archived_within(inventory, now, span);
        timelines.extend(good.first().map(|b| b.head.timeline));
        for (_, b) in bases(catalog, timelines, &good, |b| !within(b.head.stopped, days)) {
            keep(b, format!("the base of the recovery window of {days} days"));
        }
    }
    if let Some(days) = policy.min_age_days {
        for b in newest_first.iter().filter(|b| within(b.head.stopped, days)) {
            keep(b, format!("younger than the minimum age of {days} days"));
        }
    }
    for b in newest_first.iter().filter(|b| b.head.stopped > now) {
        keep(b, "it ended in the future: check the clocks".to_owned());
    }
    for b in &newest_first {
        for child in live.iter().filter(|(_, parent)| parent.as_ref() == Some(&b.head.id)) {
            keep(b, format!("{}, which is being made, refers to it", child.0));
        }
        if let Some(pin) = &b.keep {
            keep(b, pin.reason.as_ref().map_or("pinned".to_owned(), |r| format!("pinned: {r}")));
        }
    }
    // One that cannot be restored may be mended: it goes only with everything older than it.
    let oldest = good.iter().filter(|b| reasons.contains_key(&b.head.id)).map(|b| b.head.stopped).min();
    for b in newest_first.iter().filter(|b| broken.contains(&b.head.id)) {
        if oldest.is_some_and(|oldest| b.head.stopped > oldest) {
            reasons
                .entry(&b.head.id)
                .or_default()
                .push("it cannot be restored, an older one stays".to_owned());
        }
    }
    let verdict = |b: &BackupEntry| {
        let found = reasons.get(&b.head.id).cloned();
        let keep = found.is_some();
        let reasons = found.unwrap_or_else(|| vec!["no rule keeps it".to_owned()]);
        (b.head.id.clone(), Verdict { id: b.head.id.clone(), stopped: b.head.stopped, keep, reasons })
    };
    catalog.backups.iter().map(verdict).collect()
}

fn format(t: TimestampTz, form: &str) -> String {
    t.to_jiff().map_or_else(|| t.to_string(), |t| t.strftime(form).to_string())
}

/// The timelines of which WAL was stored within so many seconds.
fn timelines_archived_within(inventory: &Inventory, now: TimestampTz, seconds: f64) -> BTreeSet<TimelineId> {
    let fresh = inventory.wal.iter().filter(|(_, stored)| now.seconds_since(stored.modified) < seconds);
    fresh.filter_map(|(object, _)| Some(segment_of(object)?.timeline())).collect()
}

/// For each timeline the newest backup that it can be reached from and that `fits`.
fn bases<'a>(
    catalog: &Catalog,
    timelines: BTreeSet<TimelineId>,
    newest_first: &[&'a BackupEntry],
    fits: impl Fn(&BackupEntry) -> bool,
) -> Vec<(TimelineId, &'a BackupEntry)> {
    let base = |timeline: TimelineId| {
        let line = catalog.lineage(timeline);
        let found = newest_first.iter().find(|b| fits(b) && line.holds(b.head.timeline, b.head.stop_lsn));
        found.map(|b| (timeline, *b))
    };
    timelines.into_iter().filter_map(base).collect()
}

/// The segment an object below `wal/` belongs to; none for a history file.
fn segment_of(object: &WalObject) -> Option<SegmentName> {
    let (WalObject::File(name) | WalObject::Longer { of: name, .. }) = object;
    match name {
        WalFileName::Segment(s) | WalFileName::Partial(s) => Some(*s),
        WalFileName::BackupHistory(b) => Some(b.segment),
        WalFileName::History(_) => None,
    }
}

/// What the parts of a plan have in common.
struct Parts<'a> {
    catalog: &'a Catalog,
    inventory: &'a Inventory,
    policy: &'a Policy,
    now: TimestampTz,
    kept: &'a [&'a BackupEntry],
    live: &'a BTreeMap<BackupId, Option<BackupId>>,
}

impl Parts<'_> {
    fn is_old(&self, stored: &Stored) -> bool {
        self.now.seconds_since(stored.modified) >= self.policy.give_up_after.as_secs_f64()
    }

    fn delete(stored: &Stored, role: ObjectRole) -> Deletion {
        Deletion { path: stored.path.clone(), role, bytes: stored.bytes }
    }

    /// Manifests of backups that go, oldest first.
    fn manifests(&self, verdicts: &BTreeMap<BackupId, Verdict>) -> Vec<Deletion> {
        let goes = |id: &BackupId| verdicts.get(id).is_some_and(|v| !v.keep);
        let manifests = self.inventory.backups.iter().filter(|(_, part, _)| *part == BackupObject::Manifest);
        manifests
            .filter(|(id, _, _)| goes(id))
            .map(|(_, _, s)| Self::delete(s, ObjectRole::Manifest))
            .collect()
    }

    /// Manifests that the catalogue does not know: damaged ones, or such as came after it was read.
    fn unreadable_manifests(&self) -> Vec<Deletion> {
        let manifests = self.inventory.backups.iter().filter(|(_, part, _)| *part == BackupObject::Manifest);
        let unknown = manifests.filter(|(id, _, _)| self.catalog.backup(id).is_none());
        unknown.map(|(_, _, s)| Self::delete(s, ObjectRole::Manifest)).collect()
    }

    /// Announcements of backups that were given up or are complete, and pins on nothing.
    fn announcements(&self) -> (Vec<Deletion>, Vec<BackupId>) {
        let has_manifest = |wanted: &BackupId| {
            let mut parts = self.inventory.backups.iter();
            parts.any(|(id, part, _)| id == wanted && *part == BackupObject::Manifest)
        };
        let mut interrupted = BTreeSet::new();
        let chunks = self.inventory.packs.keys().chain(self.inventory.maps.keys());
        let orphans = chunks.filter_map(|name| owner(name)).filter(|id| !has_manifest(id));
        interrupted.extend(orphans.filter(|id| !self.live.contains_key(id)));
        let mut deletions = Vec::new();
        for (id, part, stored) in &self.inventory.backups {
            let role = match part {
                BackupObject::Manifest => continue,
                BackupObject::Started => ObjectRole::Started,
                BackupObject::Keep => ObjectRole::Keep,
            };
            let gone = match part {
                // A backup looks at its announcement once more behind its manifest.
                BackupObject::Started if has_manifest(id) => {
                    let of = self.inventory.backups.iter().filter(|(other, _, _)| other == id);
                    of.map(|(_, _, stored)| stored).all(|stored| self.is_old(stored))
                }
                BackupObject::Started => !self.live.contains_key(id),
                _ => !has_manifest(id) && self.is_old(stored),
            };
            if gone {
                if role == ObjectRole::Started && !has_manifest(id) {
                    interrupted.insert(id.clone());
                }
                deletions.push(Self::delete(stored, role));
            }
        }
        (deletions, interrupted.into_iter().collect())
    }

    /// Extent maps and packs that nothing which stays refers to.
    fn chunks(&self, held_back: &mut Vec<String>) -> Vec<Deletion> {
        let parents: BTreeSet<&BackupId> = self.live.values().flatten().collect();
        let referring = self
            .catalog
            .backups
            .iter()
            .filter(|b| parents.contains(&b.head.id) || self.kept.iter().any(|k| k.head.id == b.head.id));
        let maps: BTreeSet<&str> = referring.flat_map(|b| b.head.maps.iter().map(String::as_str)).collect();
        let is_live = |name: &str| owner(name).is_none_or(|id| self.live.contains_key(&id));
        let needed = |name: &str| maps.contains(name) || is_live(name);
        let mut packs: BTreeSet<&str> = BTreeSet::new();
        let mut unknown = Vec::new();
        for map in maps.iter().copied().filter(|m| !self.inventory.maps.contains_key(*m)) {
            unknown.push(format!("extent map {map} is missing"));
        }
        let mut deletions = Vec::new();
        for (name, (stored, named)) in &self.inventory.maps {
            match named {
                _ if !needed(name) => deletions.push(Self::delete(stored, ObjectRole::Map)),
                Ok(named) => packs.extend(named.iter().map(String::as_str)),
                Err(error) => unknown.push(format!("extent map {name} cannot be read ({error})")),
            }
        }
        if !unknown.is_empty() {
            held_back.push(format!(
                "{}, so it is not known which packs are needed: none goes; run verify",
                unknown.join(", ")
            ));
            return deletions;
        }
        let free =
            self.inventory.packs.iter().filter(|(name, _)| !packs.contains(name.as_str()) && !is_live(name));
        deletions.extend(free.map(|(_, stored)| Self::delete(stored, ObjectRole::Pack)));
        deletions
    }

    /// WAL that nothing which stays needs, oldest first.
    fn wal(
        &self,
        verdicts: &BTreeMap<BackupId, Verdict>,
        before: &Coverage,
        held_back: &mut Vec<String>,
    ) -> Vec<Deletion> {
        // Without a backup all WAL waits for the first one; without a rule nothing was asked for.
        if self.kept.is_empty() || !self.policy.has_rules() {
            return Vec::new();
        }
        let needs = self.needs(verdicts);
        let size = self.catalog.system.segment_size;
        let reached: BTreeSet<TimelineId> = needs.iter().map(|n| n.timeline).collect();
        let announced =
            self.catalog.started.iter().filter(|s| self.live.contains_key(&s.id)).map(|s| s.started);
        let unknown_start = self.live.len() > announced.clone().count();
        let first_announced = announced.min();
        let margin = self.policy.give_up_after.as_secs_f64();
        let goes = |(object, stored): &&(WalObject, Stored)| {
            let Some(name) = segment_of(object) else { return false };
            let Some((start, end)) = name.start(size).zip(name.end(size)) else { return false };
            let needed = needs.iter().any(|n| n.covers(name.timeline(), start, end));
            // A backup that is being made, perhaps from a standby that lags, has not said yet where it starts.
            let awaited = unknown_start && !self.is_old(stored)
                || first_announced.is_some_and(|at| at.seconds_since(stored.modified) < margin);
            // A branch that no backup reaches may be a new one whose history file is still on its way.
            let branch = !reached.contains(&name.timeline()) && !self.is_old(stored);
            !needed && !awaited && !branch
        };
        let mut going: Vec<_> = self.inventory.wal.iter().filter(goes).collect();
        going.sort_by_key(|(object, stored)| {
            (segment_of(object).map(|s| (s.timeline(), s.start(size))), &stored.path)
        });
        let role = |object: &WalObject| match object {
            WalObject::File(WalFileName::BackupHistory(_)) => ObjectRole::BackupHistory,
            _ => ObjectRole::Wal,
        };
        let deletions: Vec<_> =
            going.iter().map(|(object, stored)| Self::delete(stored, role(object))).collect();
        // Looked at from the other side: what could be restored from a backup that stays still can.
        match self.harmed(verdicts, before, &without(self.catalog, &deletions, verdicts).coverage()) {
            None => deletions,
            Some(id) => {
                held_back
                    .push(format!("all WAL: backup {id} would lose some it needs, which is a fault of ours"));
                Vec::new()
            }
        }
    }

    /// The stretches of WAL that must stay.
    fn needs(&self, verdicts: &BTreeMap<BackupId, Verdict>) -> Vec<Need> {
        let lines = self.catalog.lines();
        let mut needs = Vec::new();
        for backup in self.kept {
            let head = &backup.head;
            let alone = is_alone(backup, verdicts);
            let last = if alone { Some(head.stop_lsn) } else { None };
            for line in lines.iter().filter(|l| l.holds(head.timeline, head.start_lsn)) {
                if alone && line.timeline != head.timeline {
                    continue;
                }
                needs.extend(line.newest_first().map(|(timeline, _, end)| Need {
                    timeline,
                    from: head.start_lsn,
                    until: end.into_iter().chain(last).min(),
                }));
            }
            // A timeline whose history is not known may descend from this backup's.
            let unknown = lines
                .iter()
                .map(|l| l.timeline)
                .filter(|t| *t > head.timeline && !self.catalog.lineages.contains_key(t));
            if !alone {
                needs.extend(unknown.map(|timeline| Need { timeline, from: head.start_lsn, until: None }));
            }
        }
        needs
    }

    /// A backup that stays and could reach less afterwards.
    fn harmed(
        &self,
        verdicts: &BTreeMap<BackupId, Verdict>,
        before: &Coverage,
        after: &Coverage,
    ) -> Option<BackupId> {
        let broken = |c: &Coverage, id: &BackupId| c.broken_backups.iter().any(|b| b.backup == *id);
        let reach = |c: &Coverage, id: &BackupId| {
            let windows = c.windows.iter().filter(|w| w.backups.contains(id));
            windows.map(|w| (w.timeline, w.to)).collect::<BTreeMap<_, _>>()
        };
        let reaches_less = |id: &BackupId| {
            let after = reach(after, id);
            reach(before, id).iter().any(|(timeline, to)| after.get(timeline).is_none_or(|now| now < to))
        };
        let harmed = |b: &&&BackupEntry| {
            let id = &b.head.id;
            let less = !is_alone(b, verdicts) && reaches_less(id);
            less || (broken(after, id) && !broken(before, id))
        };
        self.kept.iter().find(harmed).map(|b| b.head.id.clone())
    }

    /// Merged indexes over segments that are all gone once `deletions` are, and those that others replace.
    fn merged(&self, deletions: &[Deletion]) -> Vec<Deletion> {
        let going: BTreeSet<&str> = deletions.iter().map(|d| d.path.as_str()).collect();
        let stays = self.inventory.wal.iter().filter(|(_, stored)| !going.contains(stored.path.as_str()));
        let left: BTreeSet<SegmentName> = stays
            .filter(|(object, _)| !matches!(object, WalObject::File(WalFileName::BackupHistory(_))))
            .filter_map(|(object, _)| segment_of(object))
            .collect();
        let gone = retired(self.catalog, &self.inventory.merged, &left);
        gone.into_iter().map(|stored| Self::delete(stored, ObjectRole::MergedIndex)).collect()
    }

    /// What prunes that are gone announced.
    fn marks(&self) -> Vec<Deletion> {
        let stale = self.inventory.marks.iter().filter(|(stored, mark)| match mark {
            Ok(mark) => !is_live(mark, self.now),
            Err(_) => self.is_old(stored),
        });
        stale.map(|(stored, _)| Self::delete(stored, ObjectRole::Mark)).collect()
    }
}

/// Whether a backup stays only by a pin that says it stays alone.
fn is_alone(backup: &BackupEntry, verdicts: &BTreeMap<BackupId, Verdict>) -> bool {
    let by_pin_only = verdicts.get(&backup.head.id).is_some_and(|v| v.reasons.len() == 1);
    backup.is_standalone() && by_pin_only
}

/// A stretch of WAL that must stay.
#[derive(Debug, Clone, Copy)]
struct Need {
    timeline: TimelineId,
    from: Lsn,
    /// Inclusive: the segment that begins there stays as well.
    until: Option<Lsn>,
}

impl Need {
    fn covers(&self, timeline: TimelineId, start: Lsn, end: Lsn) -> bool {
        self.timeline == timeline && end > self.from && self.until.is_none_or(|until| start <= until)
    }
}

/// The catalogue as it will be.
fn without(catalog: &Catalog, deletions: &[Deletion], verdicts: &BTreeMap<BackupId, Verdict>) -> Catalog {
    let gone: BTreeSet<&str> = deletions.iter().map(|d| d.path.as_str()).collect();
    let mut after = catalog.clone();
    after.segments.retain(|s| !gone.contains(s.path.as_str()));
    after.backups.retain(|b| verdicts.get(&b.head.id).is_none_or(|v| v.keep));
    after
}

/// What can be restored to before and not after.
fn lost_windows(before: &Coverage, after: &Coverage) -> Vec<LostWindow> {
    let mut lost = Vec::new();
    for window in &before.windows {
        let mut left = after.windows.iter().filter(|w| w.timeline == window.timeline).collect::<Vec<_>>();
        left.sort_by_key(|w| w.from);
        let mut from = (window.from, window.from_time);
        for kept in left.iter().filter(|w| w.from <= window.to && w.to >= window.from) {
            if kept.from > from.0 {
                lost.push(lost_window(window, from, (kept.from, Some(kept.from_time))));
            }
            let after_kept = (kept.to, kept.to_time.unwrap_or(kept.from_time));
            from = from.max(after_kept);
        }
        if from.0 < window.to {
            lost.push(lost_window(window, from, (window.to, window.to_time)));
        }
    }
    lost
}

fn lost_window(
    window: &RecoveryWindow,
    from: (Lsn, TimestampTz),
    to: (Lsn, Option<TimestampTz>),
) -> LostWindow {
    LostWindow { timeline: window.timeline, from: from.0, from_time: from.1, to: to.0, to_time: to.1 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use waltide_format::archive::{BackupKind, Keep, Lineage, SegmentEntry};

    use super::*;
    use crate::testing::*;

    fn stored(path: String, at: TimestampTz) -> Stored {
        Stored { path, bytes: 10, modified: at }
    }

    /// The archive of these parts. Each backup has a map of its own over two packs of its own and whatever maps it
    /// names already; an object is as old as what it holds.
    fn archive(segments: Vec<SegmentEntry>, mut backups: Vec<BackupEntry>) -> (Catalog, Inventory) {
        let names = waltide_format::archive::Layout::new("main").unwrap().system(42.into());
        backups.sort_by_key(|b| (b.head.started, b.head.id.clone()));
        backups.dedup_by(|a, b| a.head.id == b.head.id);
        let mut inventory = Inventory::default();
        for s in &segments {
            let at = s.info.last_commit_time.unwrap();
            inventory.wal.push((names.parse_wal(&s.path).unwrap(), stored(s.path.clone(), at)));
        }
        for b in &mut backups {
            let (id, at) = (b.head.id.clone(), b.head.started);
            inventory.backups.push((id.clone(), BackupObject::Manifest, stored(names.manifest(&id), at)));
            let packs = [format!("{id}-0"), format!("{id}-1")];
            inventory.maps.insert(id.to_string(), (stored(names.map(id.as_str()), at), Ok(packs.to_vec())));
            for pack in packs {
                inventory.packs.insert(pack.clone(), stored(names.pack(&pack), at));
            }
            b.head.maps.push(id.to_string());
        }
        (catalog(segments, backups), inventory)
    }

    fn make(catalog: &Catalog, inventory: &Inventory, policy: &Policy, now: i64) -> PrunePlan {
        plan(catalog, inventory, policy, hour(now), |_| None)
    }

    fn kept(plan: &PrunePlan) -> Vec<i64> {
        let hours = plan.backups.iter().filter(|v| v.keep).map(|v| v.stopped.postgres_micros() / HOUR);
        hours.collect()
    }

    fn gone(plan: &PrunePlan, role: ObjectRole) -> Vec<&str> {
        let of_role = plan.deletions.iter().filter(|d| d.role == role);
        of_role.map(|d| d.path.rsplit('/').next().unwrap()).collect()
    }

    #[test]
    fn the_last_so_many_stay_with_their_wal_and_the_rest_goes() {
        let backups = [3, 6, 9].map(|n| backup(1, n, 0));
        let (c, i) = archive((2..12).map(|n| segment(1, n)).collect(), backups.to_vec());
        let plan = make(&c, &i, &Policy { count: Some(2), ..Policy::default() }, 100);
        assert_eq!(kept(&plan), [9, 6]);
        let first = c.backups[0].head.id.as_str();
        assert_eq!(gone(&plan, ObjectRole::Manifest), [first]);
        assert_eq!(gone(&plan, ObjectRole::Map), [first]);
        assert_eq!(gone(&plan, ObjectRole::Pack), [format!("{first}-0"), format!("{first}-1")]);
        let wal: Vec<String> = (2..6).map(|n| segment(1, n).info.name.to_string()).collect();
        assert_eq!(gone(&plan, ObjectRole::Wal), wal);
        let [lost] = plan.lost.as_slice() else { panic!("{:?}", plan.lost) };
        assert_eq!((lost.from, lost.to), (c.backups[0].head.stop_lsn, c.backups[1].head.stop_lsn));
        assert_eq!((plan.held_back, plan.interrupted), (vec![], vec![]));
    }

    #[test]
    fn a_policy_without_a_rule_removes_no_backup_and_no_wal() {
        let (c, i) = archive((2..12).map(|n| segment(1, n)).collect(), vec![backup(1, 6, 0)]);
        let plan = make(&c, &i, &Policy { min_age_days: Some(1), ..Policy::default() }, 10_000);
        assert_eq!((kept(&plan), plan.deletions), (vec![6], vec![]));
    }

    #[test]
    fn without_a_backup_all_wal_waits_for_the_first() {
        let (c, i) = archive((2..12).map(|n| segment(1, n)).collect(), vec![]);
        assert_eq!(make(&c, &i, &Policy { count: Some(1), ..Policy::default() }, 10_000).deletions, []);
    }

    #[test]
    fn buckets_keep_the_last_backup_of_each_hour_day_week_and_month() {
        // 2000-01-01 was a Saturday: hours 0..48 are the first weekend, ISO week 52 of 1999.
        let backups: Vec<_> = (1..24 * 45).step_by(6).map(|n| backup(1, n, 0)).collect();
        let (c, i) = archive((1..24 * 46).map(|n| segment(1, n)).collect(), backups);
        let rule = |policy: Policy| kept(&make(&c, &i, &policy, 24 * 100));
        let last = 24 * 44 + 19;
        let policy = Policy { daily: Some(3), ..Policy::default() };
        assert_eq!(rule(policy), [last, last - 24, last - 48]);
        assert_eq!(rule(Policy { hourly: Some(2), ..Policy::default() }), [last, last - 6]);
        // Day 44 is Monday 14 February, day 43 the Sunday before.
        let sundays = [last, 43 * 24 + 19, 36 * 24 + 19];
        assert_eq!(rule(Policy { weekly: Some(3), ..Policy::default() }), sundays);
        assert_eq!(rule(Policy { monthly: Some(12), ..Policy::default() }), [last, 30 * 24 + 19]);
        let both = Policy { monthly: Some(2), hourly: Some(2), ..Policy::default() };
        assert_eq!(rule(both), [last, last - 6, 30 * 24 + 19]);
    }

    #[test]
    fn age_and_minimum_age_and_the_window_keep_what_they_say() {
        let backups: Vec<_> = [24, 48, 72, 96].map(|n| backup(1, n, 0)).to_vec();
        let (c, i) = archive((20..100).map(|n| segment(1, n)).collect(), backups);
        let rule = |policy: Policy| kept(&make(&c, &i, &policy, 24 * 6));
        assert_eq!(rule(Policy { days: Some(3), ..Policy::default() }), [96]);
        assert_eq!(rule(Policy { days: Some(3), min_age_days: Some(4), ..Policy::default() }), [96, 72]);
        assert_eq!(rule(Policy { window_days: Some(3), ..Policy::default() }), [96, 72]);
        assert_eq!(rule(Policy { days: Some(1), ..Policy::default() }), [96], "the last stays, however old");
    }

    #[test]
    fn a_pin_keeps_all_wal_behind_it_unless_it_stands_alone() {
        for standalone in [false, true] {
            let mut backups = [3, 6, 9].map(|n| backup(1, n, 1)).to_vec();
            backups[0].keep = Some(Keep { standalone, ..Keep::default() });
            let (c, i) = archive((2..12).map(|n| segment(1, n)).collect(), backups);
            let plan = make(&c, &i, &Policy { count: Some(1), ..Policy::default() }, 100);
            assert_eq!(kept(&plan), [10, 4]);
            let wal: &[u64] = if standalone { &[2, 5, 6, 7, 8] } else { &[2] };
            let wal: Vec<_> = wal.iter().map(|n| segment(1, *n).info.name.to_string()).collect();
            assert_eq!(gone(&plan, ObjectRole::Wal), wal);
        }
    }

    #[test]
    fn a_backup_that_cannot_be_restored_takes_no_others_place() {
        let mut segments: Vec<_> = (2..12).map(|n| segment(1, n)).collect();
        segments.retain(|s| s.info.name != segment(1, 9).info.name);
        let (c, i) = archive(segments, [3, 6, 9].map(|n| backup(1, n, 1)).to_vec());
        let plan = make(&c, &i, &Policy { count: Some(1), ..Policy::default() }, 100);
        assert_eq!(kept(&plan), [10, 7]);
    }

    #[test]
    fn the_branch_that_is_being_archived_keeps_its_base() {
        let mut segments: Vec<_> = (2..40).map(|n| segment(1, n)).collect();
        segments.extend((10..20).map(|n| segment(2, n)));
        let (mut c, i) = archive(segments, vec![backup(1, 5, 0), backup(2, 15, 0)]);
        c.lineages
            .insert(t(2), Lineage { ancestors: vec![(t(1), Lsn::from(10 * SIZE + 50))], timeline: t(2) });
        let policy = Policy { count: Some(1), ..Policy::default() };
        assert_eq!(kept(&make(&c, &i, &policy, 45)), [15, 5], "timeline 1 received WAL six hours ago");
        let later = make(&c, &i, &policy, 100);
        assert_eq!(kept(&later), [15]);
        assert_eq!(gone(&later, ObjectRole::Wal).len(), 38 + 5);
    }

    fn unfinished(c: &mut Catalog, i: &mut Inventory, at: i64, parent: Option<BackupId>) -> BackupId {
        let names = waltide_format::archive::Layout::new("main").unwrap().system(42.into());
        let id = BackupId::new(hour(at), 7);
        let (started, kind) = (hour(at), BackupKind::Full);
        c.started.push(StartedBackup {
            id: id.clone(),
            started,
            host: "elsewhere".into(),
            pid: 1,
            kind,
            parent,
        });
        i.backups.push((id.clone(), BackupObject::Started, stored(names.started(&id), hour(at))));
        i.packs.insert(format!("{id}-0"), stored(names.pack(&format!("{id}-0")), hour(at + 1)));
        id
    }

    #[test]
    fn what_a_backup_left_goes_once_nothing_is_heard_of_it() {
        let (mut c, mut i) = archive((2..12).map(|n| segment(1, n)).collect(), vec![backup(1, 6, 0)]);
        let id = unfinished(&mut c, &mut i, 10, None);
        let policy = Policy::default();
        assert_eq!(make(&c, &i, &policy, 34).deletions, [], "a pack was stored within the day");
        let plan = make(&c, &i, &policy, 35);
        assert_eq!(plan.interrupted, std::slice::from_ref(&id));
        assert_eq!(gone(&plan, ObjectRole::Started), [format!("{id}.started")]);
        assert_eq!(gone(&plan, ObjectRole::Pack), [format!("{id}-0")]);
        let alive = super::plan(&c, &i, &policy, hour(500), |_| Some(true));
        assert_eq!(alive.deletions, [], "its process lives");
        // A prune that was stopped after the announcement left the pack.
        i.backups.retain(|(_, part, _)| *part == BackupObject::Manifest);
        c.started.clear();
        assert_eq!(gone(&make(&c, &i, &policy, 35), ObjectRole::Pack), [format!("{id}-0")]);
    }

    #[test]
    fn the_parent_of_a_backup_that_is_being_made_stays() {
        let (mut c, mut i) =
            archive((2..60).map(|n| segment(1, n)).collect(), [6, 9].map(|n| backup(1, n, 0)).to_vec());
        let parent = c.backups[0].head.id.clone();
        unfinished(&mut c, &mut i, 99, Some(parent));
        let plan = make(&c, &i, &Policy { count: Some(1), ..Policy::default() }, 100);
        assert_eq!(kept(&plan), [9, 6]);
    }

    #[test]
    fn what_cannot_be_read_is_not_guessed_at() {
        let (mut c, mut i) =
            archive((2..12).map(|n| segment(1, n)).collect(), [3, 6, 9].map(|n| backup(1, n, 0)).to_vec());
        let policy = Policy { count: Some(1), ..Policy::default() };
        let last = c.backups[2].head.id.to_string();
        i.maps.get_mut(&last).unwrap().1 = Err("crc".into());
        let plan = make(&c, &i, &policy, 100);
        assert_eq!((gone(&plan, ObjectRole::Pack).len(), gone(&plan, ObjectRole::Map).len()), (0, 2));
        assert_eq!(plan.held_back.len(), 1);
        let damaged = c.backups.remove(1);
        let plan = make(&c, &i, &policy, 100);
        assert_eq!(gone(&plan, ObjectRole::Manifest), [c.backups[0].head.id.as_str()]);
        assert_eq!(plan.deletions.len(), 1, "{:?}", plan.deletions);
        let dropping = make(&c, &i, &Policy { drop_damaged: true, ..policy }, 100);
        assert!(gone(&dropping, ObjectRole::Manifest).contains(&damaged.head.id.as_str()));
        assert_eq!(gone(&dropping, ObjectRole::Wal).len(), 7);
    }

    prop_compose! {
        fn archives()(
            forks in proptest::collection::vec((8u64..40, 1u64..SIZE), 0..3),
            missing in proptest::collection::btree_set((1u32..4, 1u64..50), 0..5),
            backups in proptest::collection::vec((1u32..4, 1u64..45, 0u64..3, any::<Option<bool>>(), any::<proptest::sample::Index>(), 0u8..3), 1..9),
            unfinished_at in proptest::option::of((1i64..60, any::<bool>())),
            unknown_history: bool,
        ) -> (Catalog, Inventory) {
            let mut lineages = BTreeMap::new();
            let mut line = Lineage::root(t(1));
            for (n, (number, offset)) in (2u32..).zip(&forks) {
                let at = Lsn::from(number * SIZE + offset).max(line.begin());
                let mut ancestors = line.ancestors.clone();
                ancestors.push((line.timeline, at));
                line = Lineage { ancestors, timeline: t(n) };
                lineages.insert(t(n), line.clone());
            }
            let mut segments = Vec::new();
            for timeline in 1..=(forks.len() as u32 + 1) {
                let begin = lineages.get(&t(timeline)).map_or(1, |l: &Lineage| l.begin().get() / SIZE);
                segments.extend((begin.max(1)..50).filter(|n| !missing.contains(&(timeline, *n))).map(|n| segment(timeline, n)));
            }
            let backups: Vec<_> = backups.into_iter().filter(|b| b.0 <= forks.len() as u32 + 1).map(|(timeline, number, span, pin, shares, link)| {
                let mut entry = backup(timeline, number, span);
                entry.keep = pin.map(|standalone| Keep { standalone, ..Keep::default() });
                (entry, shares, link)
            }).collect();
            // A chain refers to older maps; once several were made one, only to older packs.
            let shared: Vec<_> = backups.iter().map(|(_, shares, _)| backups[shares.index(backups.len())].0.head.id.to_string()).collect();
            let mut merged = Vec::new();
            let backups = backups.into_iter().zip(shared).map(|((mut entry, _, link), other)| {
                match link {
                    0 if other != entry.head.id.as_str() => entry.head.maps.push(other),
                    1 => merged.push((entry.head.id.to_string(), format!("{other}-1"))),
                    _ => {}
                }
                entry
            }).collect();
            let (mut c, mut i) = archive(segments, backups);
            for (map, pack) in merged {
                i.maps.get_mut(&map).unwrap().1.as_mut().unwrap().push(pack);
            }
            if unknown_history {
                lineages.pop_last();
            }
            c.lineages = lineages;
            if let Some((at, with_parent)) = unfinished_at {
                let parent = c.backups.first().filter(|_| with_parent).map(|b| b.head.id.clone());
                unfinished(&mut c, &mut i, at, parent);
            }
            (c, i)
        }
    }

    prop_compose! {
        fn policies()(
            days in proptest::option::of(0u32..4), count in proptest::option::of(0u32..5), hourly in proptest::option::of(0u32..5),
            daily in proptest::option::of(0u32..4), weekly in proptest::option::of(0u32..2), window_days in proptest::option::of(0u32..3),
            min_age_days in proptest::option::of(0u32..2), drop_damaged: bool,
        ) -> Policy {
            Policy { days, count, hourly, daily, weekly, window_days, min_age_days, drop_damaged, ..Policy::default() }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        #[test]
        fn what_stays_loses_nothing_it_needs((c, i) in archives(), policy in policies(), now in 0i64..200) {
            let plan = make(&c, &i, &policy, now);
            let gone: BTreeSet<&str> = plan.deletions.iter().map(|d| d.path.as_str()).collect();
            prop_assert!(plan.held_back.iter().all(|h| !h.contains("fault of ours")), "{:?}", plan.held_back);
            prop_assert_eq!(gone.len(), plan.deletions.len());
            prop_assert!(gone.iter().all(|path| !path.ends_with(".history")));

            let before = c.coverage();
            let verdict = |id: &BackupId| plan.backups.iter().find(|v| v.id == *id).unwrap();
            let broken = |coverage: &Coverage, id: &BackupId| coverage.broken_backups.iter().any(|b| b.backup == *id);
            let good = c.backups.iter().filter(|b| !broken(&before, &b.head.id));
            let newest = good.max_by_key(|b| (b.head.stopped, &b.head.id)).or_else(|| c.backups.iter().max_by_key(|b| (b.head.stopped, &b.head.id)));
            if let Some(newest) = newest {
                prop_assert!(verdict(&newest.head.id).keep);
            }

            let mut after = c.clone();
            after.segments.retain(|s| !gone.contains(s.path.as_str()));
            let mut pruned = after.clone();
            pruned.backups.retain(|b| verdict(&b.head.id).keep);
            let left = pruned.coverage();
            prop_assert!(!before.is_whole() || left.is_whole(), "a whole archive stays whole: {:?}", left.holes);
            let after = after.coverage();
            for b in &c.backups {
                let v = verdict(&b.head.id);
                prop_assert!(v.keep || b.keep.is_none(), "a pinned backup goes");
                prop_assert!(v.keep || policy.has_rules());
                if !v.keep {
                    continue;
                }
                for map in &b.head.maps {
                    let (stored, packs) = &i.maps[map];
                    prop_assert!(!gone.contains(stored.path.as_str()));
                    prop_assert!(packs.iter().flatten().all(|p| !gone.contains(i.packs[p].path.as_str())));
                }
                prop_assert!(broken(&before, &b.head.id) || !broken(&after, &b.head.id));
                if b.is_standalone() && v.reasons == ["pinned"] {
                    continue;
                }
                // Its runs, along every line, end where they ended.
                for line in c.lines().iter().filter(|l| l.holds(b.head.timeline, b.head.start_lsn)) {
                    let mut left = c.clone();
                    left.segments.retain(|s| !gone.contains(s.path.as_str()));
                    let end = |c: &Catalog| c.run(line, b.head.start_lsn).range();
                    prop_assert_eq!(end(&c), end(&left));
                }
            }
            for s in &c.started {
                prop_assert!(now >= 24 || plan.interrupted.is_empty());
                for parent in s.parent.iter().filter(|_| !plan.interrupted.contains(&s.id)) {
                    prop_assert!(verdict(parent).keep);
                }
            }
        }
    }
}
