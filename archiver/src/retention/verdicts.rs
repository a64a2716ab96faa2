//! Which backups stay, and by which rule.

use std::collections::{BTreeMap, BTreeSet};

use waltide_format::archive::{BackupEntry, Catalog, Coverage, StartedBackup};
use waltide_format::{BackupId, TimelineId, TimestampTz};

use super::parts::segment_of;
use super::{DAY_SECONDS, Policy, Verdict};
use crate::catalog::BackupObject;
use crate::inventory::Inventory;

/// Announced backups that may still be made: those whose process lives, and those of which something was heard
/// lately. Their parents come with them.
pub(super) fn live_backups(
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
pub(super) fn owner(name: &str) -> Option<BackupId> {
    let id = name.get(..21)?;
    let rest = name.get(21..)?;
    (rest.is_empty() || rest.starts_with(['-', '.'])).then(|| id.parse().ok()).flatten()
}

/// Applies the rules.
pub(super) fn judge(
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
