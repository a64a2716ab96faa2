use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use waltide_format::archive::{BackupKind, Coverage, Keep, Lineage, SegmentEntry};

use super::*;
use crate::catalog::BackupObject;
use crate::inventory::Stored;
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
    c.lineages.insert(t(2), Lineage { ancestors: vec![(t(1), Lsn::from(10 * SIZE + 50))], timeline: t(2) });
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
    c.started.push(StartedBackup { id: id.clone(), started, host: "elsewhere".into(), pid: 1, kind, parent });
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
