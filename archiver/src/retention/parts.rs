//! Which objects go once it is known which backups stay.

use std::collections::{BTreeMap, BTreeSet};

use waltide_format::archive::{BackupEntry, Catalog, Coverage, WalObject};
use waltide_format::{BackupId, Lsn, SegmentName, TimelineId, TimestampTz, WalFileName};

use super::lost::without;
use super::verdicts::owner;
use super::{Deletion, ObjectRole, Policy, Verdict};
use crate::catalog::BackupObject;
use crate::inventory::{Inventory, Stored, is_live};
use crate::merged::retired;

/// What the parts of a plan have in common.
pub(super) struct Parts<'a> {
    pub(super) catalog: &'a Catalog,
    pub(super) inventory: &'a Inventory,
    pub(super) policy: &'a Policy,
    pub(super) now: TimestampTz,
    pub(super) kept: &'a [&'a BackupEntry],
    pub(super) live: &'a BTreeMap<BackupId, Option<BackupId>>,
}

impl Parts<'_> {
    fn is_old(&self, stored: &Stored) -> bool {
        self.now.seconds_since(stored.modified) >= self.policy.give_up_after.as_secs_f64()
    }

    fn delete(stored: &Stored, role: ObjectRole) -> Deletion {
        Deletion { path: stored.path.clone(), role, bytes: stored.bytes }
    }

    /// Manifests of backups that go, oldest first.
    pub(super) fn manifests(&self, verdicts: &BTreeMap<BackupId, Verdict>) -> Vec<Deletion> {
        let goes = |id: &BackupId| verdicts.get(id).is_some_and(|v| !v.keep);
        let manifests = self.inventory.backups.iter().filter(|(_, part, _)| *part == BackupObject::Manifest);
        manifests
            .filter(|(id, _, _)| goes(id))
            .map(|(_, _, s)| Self::delete(s, ObjectRole::Manifest))
            .collect()
    }

    /// Manifests that the catalogue does not know: damaged ones, or such as came after it was read.
    pub(super) fn unreadable_manifests(&self) -> Vec<Deletion> {
        let manifests = self.inventory.backups.iter().filter(|(_, part, _)| *part == BackupObject::Manifest);
        let unknown = manifests.filter(|(id, _, _)| self.catalog.backup(id).is_none());
        unknown.map(|(_, _, s)| Self::delete(s, ObjectRole::Manifest)).collect()
    }

    /// Announcements of backups that were given up or are complete, and pins on nothing.
    pub(super) fn announcements(&self) -> (Vec<Deletion>, Vec<BackupId>) {
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
    pub(super) fn chunks(&self, held_back: &mut Vec<String>) -> Vec<Deletion> {
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
    pub(super) fn wal(
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
    pub(super) fn merged(&self, deletions: &[Deletion]) -> Vec<Deletion> {
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
    pub(super) fn marks(&self) -> Vec<Deletion> {
        let stale = self.inventory.marks.iter().filter(|(stored, mark)| match mark {
            Ok(mark) => !is_live(mark, self.now),
            Err(_) => self.is_old(stored),
        });
        stale.map(|(stored, _)| Self::delete(stored, ObjectRole::Mark)).collect()
    }
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

/// Whether a backup stays only by a pin that says it stays alone.
fn is_alone(backup: &BackupEntry, verdicts: &BTreeMap<BackupId, Verdict>) -> bool {
    let by_pin_only = verdicts.get(&backup.head.id).is_some_and(|v| v.reasons.len() == 1);
    backup.is_standalone() && by_pin_only
}

/// The segment an object below `wal/` belongs to; none for a history file.
pub(super) fn segment_of(object: &WalObject) -> Option<SegmentName> {
    let (WalObject::File(name) | WalObject::Longer { of: name, .. }) = object;
    match name {
        WalFileName::Segment(s) | WalFileName::Partial(s) => Some(*s),
        WalFileName::BackupHistory(b) => Some(b.segment),
        WalFileName::History(_) => None,
    }
}
