use std::sync::Arc;

use proptest::prelude::*;
use waltide_format::archive::*;
use waltide_format::{Lsn, SegmentName, TimestampTz, Xid};

use super::*;
use crate::resolve::Events;
use crate::testing::{self, size, timeline};

const SYSTEM: u64 = 42;
const MIB: u64 = 1 << 20;

#[derive(Debug, Clone, PartialEq)]
enum What {
    Commit,
    Abort,
    Point(String),
    Other,
}

#[derive(Debug, Clone)]
struct Rec {
    start: u64,
    end: u64,
    what: What,
    xid: u32,
    /// The subtransactions that end with it.
    subxacts: Vec<u32>,
    time: i64,
    /// Whether it was put together when the segment that it begins in was pushed, should it run over an edge.
    joined: bool,
    /// Whether it was put together when the segment that it ends in was pushed.
    head_joined: bool,
}

/// A log, as it is, and what an archive says of it.
#[derive(Debug, Clone)]
struct World {
    records: Vec<Rec>,
    catalog: Catalog,
}

fn lsn(v: u64) -> Lsn {
    Lsn::from(v)
}

fn moment(t: i64) -> TimestampTz {
    TimestampTz::from_postgres_micros(t)
}

fn xact(r: &Rec) -> XactEnd {
    XactEnd {
        kind: if r.what == What::Commit { CommitKind::Commit } else { CommitKind::AbortPrepared },
        xid: Xid::from(r.xid),
        start: lsn(r.start),
        end: lsn(r.end),
        time: moment(r.time),
        db_oid: None,
        subxacts: r.subxacts.iter().map(|xid| Xid::from(*xid)).collect(),
        dropped: vec![],
        gid: None,
    }
}

fn events<'a>(records: impl Iterator<Item = &'a Rec>) -> Events {
    let mut events = Events::default();
    for r in records {
        match &r.what {
            What::Commit | What::Abort => events.xacts.push(xact(r)),
            What::Point(name) => {
                events.restore_points.push((name.clone(), moment(r.time), lsn(r.start), lsn(r.end)));
            }
            What::Other => {}
        }
    }
    events
}

impl Rec {
    /// Whether the index of the segment `from..to` has it.
    fn is_indexed_in(&self, from: u64, to: u64) -> bool {
        let begins = from <= self.start && self.start < to && (self.end <= to || self.joined);
        begins || (self.is_over(from) && self.head_joined)
    }

    /// Whether it ends a transaction, or the one that this is a part of.
    fn ends(&self, xid: Xid) -> bool {
        let is_end = matches!(self.what, What::Commit | What::Abort);
        is_end && (self.xid == xid.get() || self.subxacts.contains(&xid.get()))
    }

    fn is_over(&self, edge: u64) -> bool {
        self.start < edge && self.end > edge
    }
}

impl World {
    /// Segments `first..` over the records; those of `missing` are not archived.
    fn new(records: Vec<Rec>, backups: &[(usize, usize)], missing: &[u64]) -> Self {
        let last = records.last().unwrap().end.div_ceil(MIB);
        let first = records[0].start / MIB;
        let segment = |n: u64| {
            let (from, to) = (n * MIB, n * MIB + MIB);
            let name = SegmentName::containing(timeline(1), lsn(from), size());
            let mut info = testing::info(SYSTEM, name, Ending::Full);
            let here: Vec<_> = records.iter().filter(|r| from <= r.start && r.start < to).collect();
            let known: Vec<_> = records.iter().filter(|r| r.is_indexed_in(from, to)).collect();
            let open = records.iter().find(|r| r.is_over(from));
            info.continued_bytes = open.map_or(0, |r| (r.end - from) as u32);
            info.head_joined = open.is_some_and(|r| r.head_joined);
            info.first_record = here.first().map(|r| lsn(r.start));
            info.first_prev = here
                .first()
                .and_then(|f| records.iter().rev().find(|r| r.start < f.start).map(|r| lsn(r.start)));
            info.last_record = here.last().map(|r| lsn(r.start));
            info.pending = here.iter().find(|r| r.is_over(to)).map(|r| PendingRecord {
                start: lsn(r.start),
                total_bytes: (r.end - r.start) as u32,
                here_bytes: (to - r.start) as u32,
                joined: r.joined,
            });
            info.valid_end = lsn(to);
            if n + 1 == last {
                info.valid_end = lsn(records.last().unwrap().end);
                info.ending = Ending::EndOfLog;
            }
            let ends = || known.iter().filter(|r| matches!(r.what, What::Commit | What::Abort));
            info.min_time = ends().map(|r| moment(r.time)).min();
            info.max_time = ends().map(|r| moment(r.time)).max();
            info.commits = ends().filter(|r| r.what == What::Commit && r.start >= from).count() as u64;
            info.last_commit_time = ends().rfind(|r| r.what == What::Commit).map(|r| moment(r.time));
            let points = known.iter().filter_map(|r| match &r.what {
                What::Point(name) => Some(name.clone()),
                _ => None,
            });
            SegmentEntry {
                path: format!("wal/{name}"),
                stored_bytes: 100,
                info,
                restore_points: points.collect(),
                faults: vec![],
                digest: String::new(),
                pushed_by: None,
            }
        };
        let segments = (first..last).filter(|n| !missing.contains(n)).map(segment).collect();
        let backup = |(n, (i, j)): (usize, &(usize, usize))| {
            let mut head = testing::manifest(SYSTEM, n as u16);
            head.start_lsn = lsn(records[*i].start);
            head.checkpoint_lsn = head.start_lsn;
            head.stop_lsn = lsn(records[*j].end);
            head.stopped = moment(records[*j].time);
            BackupEntry { head, files: 7, keep: None }
        };
        let catalog = Catalog {
            cluster: "main".into(),
            system: testing::system(SYSTEM),
            backups: backups.iter().enumerate().map(backup).collect(),
            started: vec![],
            segments,
            lineages: Default::default(),
            beginnings: Default::default(),
            damaged: vec![],
        };
        Self { records, catalog }
    }

    /// Reads every record from a backup on and asks at each what PostgreSQL asks.
    fn naive(&self, goal: &Goal) -> Option<(BackupId, StopKind, u64)> {
        let mut backups: Vec<_> = self.catalog.backups.iter().map(|b| &b.head).collect();
        backups.sort_by_key(|b| std::cmp::Reverse((b.stop_lsn, b.started)));
        let there =
            |n: u64| self.catalog.segments.iter().any(|s| s.info.name.start(size()) == Some(lsn(n * MIB)));
        for backup in backups {
            if matches!(goal.target, Target::Time(t) if t < backup.stopped) {
                continue;
            }
            let whole: Vec<_> = self
                .records
                .iter()
                .filter(|r| r.start >= backup.start_lsn.get())
                .take_while(|r| (r.start / MIB..r.end.div_ceil(MIB)).all(there))
                .collect();
            if whole.last().is_none_or(|l| lsn(l.end) < backup.stop_lsn) {
                continue;
            }
            let first_missing = (backup.start_lsn.get() / MIB..).find(|n| !there(*n)).unwrap() * MIB;
            let hole = (first_missing / MIB..100).any(there);
            let open = self.records.iter().find(|r| r.is_over(first_missing));
            let last = self.records.last().unwrap().end;
            let end = open.map_or(first_missing, |r| r.start).min(last);
            let mut stop = None;
            for r in &whole {
                let ends = matches!(r.what, What::Commit | What::Abort);
                let before = match &goal.target {
                    Target::Lsn(l) => !goal.inclusive && r.start >= l.get(),
                    Target::Xid(x) => !goal.inclusive && r.ends(*x),
                    Target::Time(t) if goal.inclusive => ends && moment(r.time) > *t,
                    Target::Time(t) => ends && moment(r.time) >= *t,
                    _ => false,
                };
                if before {
                    stop = Some((StopKind::Before, r.start));
                    break;
                }
                let after = match &goal.target {
                    Target::Lsn(l) => goal.inclusive && r.start >= l.get(),
                    Target::Xid(x) => goal.inclusive && r.ends(*x),
                    Target::Name(n) => r.what == What::Point(n.clone()),
                    _ => false,
                };
                if after {
                    stop = Some((StopKind::After, r.end));
                    break;
                }
            }
            let stop = stop.or(match &goal.target {
                Target::Latest => Some((StopKind::End, end)),
                Target::Immediate => Some((StopKind::Consistent, backup.stop_lsn.get())),
                Target::Time(_) if !hole => Some((StopKind::End, end)),
                Target::Lsn(l) if l.get() <= end => Some((StopKind::End, end)),
                _ => None,
            });
            match stop {
                Some((kind, at)) if lsn(at) >= backup.stop_lsn => return Some((backup.id.clone(), kind, at)),
                _ => {}
            }
        }
        None
    }
}

impl Source for World {
    type Error = std::convert::Infallible;

    async fn events(&self, entry: &SegmentEntry) -> Result<Arc<Events>, Self::Error> {
        let from = entry.info.name.start(size()).unwrap().get();
        let known = |r: &&Rec| r.is_indexed_in(from, from + MIB);
        Ok(Arc::new(events(self.records.iter().filter(known))))
    }

    async fn straddler(&self, before: &SegmentEntry, _: &SegmentEntry) -> Result<Arc<Events>, Self::Error> {
        let edge = before.info.name.end(size()).unwrap().get();
        Ok(Arc::new(events(self.records.iter().filter(|r| r.is_over(edge) && r.start >= edge - MIB))))
    }

    async fn record_from(
        &self,
        segments: &[&SegmentEntry],
        from: Lsn,
    ) -> Result<Option<(Lsn, Lsn)>, Self::Error> {
        let first = segments.first().unwrap().info.name.start(size()).unwrap();
        let last = segments.last().unwrap().info.name.end(size()).unwrap();
        let here = |r: &&Rec| lsn(r.start) >= from && lsn(r.start) >= first && lsn(r.end) <= last;
        Ok(self.records.iter().find(here).map(|r| (lsn(r.start), lsn(r.end))))
    }
}

fn run_plan(world: &World, goal: &Goal) -> Result<Plan, PlanError> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(plan(&world.catalog, goal, None, Rates::default(), world))
}

prop_compose! {
    fn world()(
        steps in proptest::collection::vec((8u64..90_000, 0u64..60_000, 0u8..12, 0i64..9, any::<(bool, bool)>()), 30..120),
        picks in proptest::collection::vec((any::<prop::sample::Index>(), 1usize..6), 1..4),
        missing in proptest::option::of(3u64..9),
    ) -> World {
        let mut at = 3 * MIB;
        let mut records: Vec<Rec> = Vec::new();
        let mut open = Vec::new();
        for (i, (len, _, kind, jitter, (joined, head_joined))) in steps.into_iter().enumerate() {
            let len = len & !7;
            let what = match kind {
                0..=4 => What::Commit,
                5 => What::Abort,
                6 => What::Point(format!("p{}", jitter % 3)),
                _ => What::Other,
            };
            let (xid, time) = (700 + i as u32, (i as i64 * 3 + jitter * 4) * 1_000_000);
            // Every number that no record ends is a subtransaction of the next that does.
            let subxacts = match what {
                What::Commit | What::Abort => std::mem::take(&mut open),
                _ => {
                    open.push(xid);
                    Vec::new()
                }
            };
            let r = Rec { start: at, end: at + len.max(8), what, xid, subxacts, time, joined, head_joined };
            // The fake puts one edge together at the most, as the archive's own joins do.
            at = r.end;
            records.push(r);
        }
        let backups: Vec<_> = picks.iter().map(|(index, length)| {
            let i = index.index(records.len() - 1);
            (i, (i + length).min(records.len() - 1))
        }).collect();
        World::new(records, &backups, &missing.into_iter().collect::<Vec<_>>())
    }
}

fn goals() -> impl Strategy<Value = Goal> {
    let target = prop_oneof![
        Just(Target::Latest),
        Just(Target::Immediate),
        (0i64..420).prop_map(|t| Target::Time(moment(t * 1_000_000))),
        (695u32..830).prop_map(|x| Target::Xid(x.into())),
        (2 * MIB..12 * MIB).prop_map(|l| Target::Lsn(lsn(l))),
        (0u8..4).prop_map(|n| Target::Name(format!("p{n}"))),
    ];
    (target, any::<bool>()).prop_map(|(target, inclusive)| {
        let inclusive = inclusive || !matches!(target, Target::Time(_) | Target::Xid(_) | Target::Lsn(_));
        Goal { inclusive, ..Goal::new(target) }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn a_plan_stops_where_a_reader_of_every_record_would_and_has_every_segment_up_to_there(
        world in world(), goal in goals(), exact in any::<Option<prop::sample::Index>>(),
    ) {
        // Every other goal is a record's own position, time or transaction.
        let goal = match (exact.map(|i| i.get(&world.records)), &goal.target) {
            (Some(r), Target::Lsn(_)) => Goal { target: Target::Lsn(lsn(r.start)), ..goal },
            (Some(r), Target::Time(_)) => Goal { target: Target::Time(moment(r.time)), ..goal },
            (Some(r), Target::Xid(_)) => Goal { target: Target::Xid(r.xid.into()), ..goal },
            _ => goal,
        };
        match (run_plan(&world, &goal), world.naive(&goal)) {
            (Ok(plan), Some((backup, kind, at))) => {
                prop_assert_eq!((&plan.backup, plan.stop.kind, plan.stop.lsn), (&backup, kind, lsn(at)));
                let starts: Vec<_> = plan.segments.iter().map(|s| s.name.start(size()).unwrap().get()).collect();
                prop_assert_eq!(starts[0], plan.start_lsn.get() / MIB * MIB);
                prop_assert!(starts.windows(2).all(|w| w[0] + MIB == w[1]), "a hole: {:?}", starts);
                prop_assert!(starts[starts.len() - 1] + MIB >= plan.stop.read_to.get());
                prop_assert!(plan.stop.lsn >= plan.consistent_lsn);
                if let Target::Xid(xid) = goal.target {
                    let top = world.records.iter().find(|r| r.ends(xid)).unwrap().xid;
                    let setting = plan.settings.iter().find(|(name, _)| name == "recovery_target_xid").unwrap();
                    prop_assert_eq!(&setting.1, &top.to_string());
                    let told = plan.notes.iter().any(|note| note.contains(&format!("ended with transaction {top}")));
                    prop_assert_eq!(told, top != xid.get());
                }
                let known = |r: &&Rec| {
                    r.start >= starts[0] || (r.is_over(starts[0]) && r.head_joined)
                };
                let mut commits = world.records.iter().filter(known).filter(|r| r.what == What::Commit);
                let last = commits.rfind(|r| r.end <= at);
                prop_assert_eq!(plan.last_commit.map(|c| c.lsn), last.map(|r| lsn(r.end)));
                let line = world.catalog.lineage(timeline(1));
                let end = world.catalog.run(&line, plan.start_lsn).end().unwrap();
                let behind = |r: &&Rec| r.what == What::Commit && r.start >= at && lsn(r.end) <= end;
                let behind: Vec<_> = world.records.iter().filter(behind).collect();
                prop_assert_eq!(plan.lost.map_or(0, |l| l.transactions), behind.len() as u64);
                let times = |l: Lost| (l.first_time, l.last_time, l.last_lsn);
                let expected = behind.first().zip(behind.last());
                let expected = expected.map(|(f, l)| (moment(f.time), moment(l.time), lsn(l.end)));
                prop_assert_eq!(plan.lost.map(times), expected);
            }
            (Err(PlanError::Unreachable(why)), None) => {
                if let (Some(before), Target::Time(t)) = (&why.before, &goal.target) {
                    prop_assert!(before.time.is_some_and(|b| b < *t));
                }
                if let (Some(after), Target::Lsn(l)) = (&why.after, &goal.target) {
                    prop_assert!(after.lsn >= *l);
                }
            }
            (ours, naive) => prop_assert!(false, "{:?} is not {:?}", ours, naive),
        }
    }
}

/// Commits of transactions 700, 701 … every 100 000 bytes from 3 MiB on, a second apart; backups over
/// the records given.
fn plain(backups: &[(usize, usize)], missing: &[u64]) -> World {
    let record = |i: u64| Rec {
        start: 3 * MIB + i * 100_000,
        end: 3 * MIB + (i + 1) * 100_000,
        what: if i == 33 { What::Point("here".into()) } else { What::Commit },
        xid: 700 + i as u32,
        subxacts: vec![],
        time: i as i64 * 1_000_000,
        joined: true,
        head_joined: true,
    };
    World::new((0..60).map(record).collect(), backups, missing)
}

#[test]
fn what_cannot_be_reached_is_told_with_its_neighbours() {
    let told = |world: &World, target: &str| {
        let goal = match target.parse::<u32>() {
            Ok(xid) => Goal::new(Target::Xid(xid.into())),
            Err(_) if target.contains('/') => Goal::new(Target::Lsn(target.parse().unwrap())),
            Err(_) => Goal::new(Target::Time(target.parse().unwrap())),
        };
        run_plan(world, &goal).unwrap_err().to_string()
    };
    let world = plain(&[(10, 12)], &[]);
    assert_eq!(
        told(&world, "2000-01-01 00:00:05Z"),
        "time 2000-01-01 00:00:05+00 cannot be reached: no backup is old enough\n\
         nearest before: none\n\
         nearest after: LSN 0/43D620, 2000-01-01 00:00:12+00 (backup 20260131T235959Z-0000)"
    );
    assert_eq!(
        told(&world, "0/9000000"),
        "LSN 0/9000000 cannot be reached: from backup 20260131T235959Z-0000, the archived WAL ends at 0/8B8D80\n\
         nearest before: LSN 0/8B8D80, 2000-01-01 00:00:59+00 (backup 20260131T235959Z-0000)\n\
         nearest after: none"
    );
    assert_eq!(
        told(&world, "4711"),
        "transaction 4711 cannot be reached: from backup 20260131T235959Z-0000, transaction 4711 is not in its WAL, which ends at 0/8B8D80\n\
         nearest before: none\n\
         nearest after: none"
    );
    let early = world.records[5].end;
    assert_eq!(
        told(&world, "705"),
        format!(
            "transaction 705 cannot be reached: it is archived at {}, where no backup leads\n\
             nearest before: none\n\
             nearest after: LSN 0/43D620, 2000-01-01 00:00:12+00 (backup 20260131T235959Z-0000)",
            lsn(early)
        )
    );
    let world = plain(&[(10, 12), (50, 51)], &[6]);
    let between = told(&world, "748");
    assert!(between.starts_with("transaction 748 cannot be reached: it is archived at 0/7"), "{between}");
    assert!(
        between.ends_with(
            "nearest before: LSN 0/5F4D60, 2000-01-01 00:00:31+00 (backup 20260131T235959Z-0000)\n\
             nearest after: LSN 0/7F5880, 2000-01-01 00:00:51+00 (backup 20260131T235959Z-0001)"
        ),
        "{between}"
    );
    assert_eq!(
        told(&world, "2000-01-01 00:00:45Z"),
        "time 2000-01-01 00:00:45+00 cannot be reached: from backup 20260131T235959Z-0000, its WAL ends at 0/5F4D60: nothing is archived between 000000010000000000000005 and 000000010000000000000007\n\
         nearest before: LSN 0/5F4D60, 2000-01-01 00:00:31+00 (backup 20260131T235959Z-0000)\n\
         nearest after: LSN 0/7F5880, 2000-01-01 00:00:51+00 (backup 20260131T235959Z-0001)"
    );
    assert_eq!(
        run_plan(&plain(&[], &[]), &Goal::new(Target::Latest)).unwrap_err().to_string(),
        "cluster main has no complete backup\nhint: make one with `waltide backup`"
    );
    let goal = Goal { timeline: TargetTimeline::Id(timeline(9)), ..Goal::new(Target::Latest) };
    assert_eq!(
        run_plan(&world, &goal).unwrap_err().to_string(),
        "the archive has nothing of timeline 9; it has 1"
    );
}

#[test]
fn an_object_that_cannot_be_read_is_named_by_the_plan_that_it_stands_in_the_way_of() {
    let path = |file: &str| format!("main/{SYSTEM}/{file}");
    let damage = |world: &mut World, file: &str| {
        world.catalog.damaged.push(DamagedObject { path: path(file), error: "crc is wrong".into() });
    };
    let refused = |world: &World, goal: &Goal| run_plan(world, goal).unwrap_err().to_string();
    let latest = Goal::new(Target::Latest);
    // The newest segment: recovery would ask for it, and fail.
    let mut world = plain(&[(10, 12)], &[]);
    world.catalog.segments.pop();
    let last = "wal/00000001/000000010000000000000008";
    damage(&mut world, last);
    assert_eq!(
        refused(&world, &latest),
        "the end of the archived WAL cannot be reached: from backup 20260131T235959Z-0000, its WAL ends at 0/7F5880: main/42/wal/00000001/000000010000000000000008 is damaged: crc is wrong\n\
         hint: put a good copy of it back; without it, moved away, recovery ends there\n\
         nearest before: LSN 0/7F5880, 2000-01-01 00:00:52+00 (backup 20260131T235959Z-0000)\n\
         nearest after: none"
    );
    let late = refused(&world, &Goal::new(Target::Time(moment(1 << 50))));
    assert!(late.contains(&path(last)), "{late}");
    run_plan(&world, &Goal::new(Target::Xid(720.into()))).unwrap();
    // The segment that the only backup starts in.
    let mut world = plain(&[(10, 12)], &[]);
    world.catalog.segments.remove(0);
    world.catalog.segments.retain(|s| s.info.name.start(size()) != Some(lsn(3 * MIB)));
    let first = "wal/00000001/000000010000000000000003";
    damage(&mut world, first);
    let err = refused(&world, &latest);
    assert!(err.contains(&format!("cannot be read: {} is damaged", path(first))), "{err}");
    // Another copy of a segment that is whole harms nobody; of one whose log ends inside it does.
    let mut world = plain(&[(10, 12)], &[]);
    damage(&mut world, "wal/00000001/000000010000000000000007@0000000000800000");
    run_plan(&world, &latest).unwrap();
    let longer = "wal/00000001/000000010000000000000008@0000000000900000";
    damage(&mut world, longer);
    let err = refused(&world, &latest);
    assert!(err.contains(&path(longer)), "{err}");
    // A history file: nobody knows which timeline is the latest.
    let mut world = plain(&[(10, 12)], &[]);
    damage(&mut world, "wal/00000002.history");
    let err = refused(&world, &latest);
    let history = path("wal/00000002.history");
    assert!(err.contains(&format!("which timelines there are is not known: {history} is damaged")), "{err}");
    let goal = |n| Goal { timeline: TargetTimeline::Id(timeline(n)), ..latest.clone() };
    run_plan(&world, &goal(1)).unwrap();
    let err = refused(&world, &goal(2));
    assert_eq!(
        err,
        format!("the archive has nothing of timeline 2; it has 1\n{history} is damaged: crc is wrong")
    );
    // A manifest: another backup serves, which is said; or none does.
    let manifest = "backups/20260131T235959Z-0007";
    let mut world = plain(&[(10, 12)], &[]);
    damage(&mut world, manifest);
    let plan = run_plan(&world, &latest).unwrap();
    assert!(plan.notes[0].contains(&path(manifest)), "{:?}", plan.notes);
    world.catalog.backups.clear();
    assert_eq!(
        refused(&world, &latest),
        "cluster main has no complete backup\nmain/42/backups/20260131T235959Z-0007 is damaged: crc is wrong\nhint: run `waltide verify`"
    );
}

#[test]
fn a_time_past_the_last_commit_is_the_end_and_that_is_said() {
    let plan = run_plan(
        &plain(&[(1, 2)], &[]),
        &Goal::new(Target::Time("2026-01-01Z".parse::<TimestampTz>().unwrap_or(moment(1 << 50)))),
    )
    .unwrap();
    assert_eq!(plan.stop.kind, StopKind::End);
    assert!(plan.notes[0].contains("the target is the end of the archived WAL (latest)"), "{:?}", plan.notes);
    assert!(plan.settings.iter().all(|(name, _)| name != "recovery_target_time"), "{:?}", plan.settings);
}

#[test]
fn a_clock_that_steps_back_does_not_move_the_stop() {
    let mut world = plain(&[(1, 2)], &[]);
    world.records[20].time = 50_000_000;
    let world = World::new(world.records, &[(1, 2)], &[]);
    let plan = run_plan(&world, &Goal::new(Target::Time(moment(40_000_000)))).unwrap();
    assert_eq!((plan.stop.xid, plan.stop.kind), (Some(720.into()), StopKind::Before));
}

#[test]
fn the_newest_timeline_that_a_backup_lies_on_is_followed_and_its_fork_kept() {
    let mut world = plain(&[(1, 2), (40, 41)], &[]);
    let fork = lsn(3 * MIB + 2_000_000);
    let mut segments = world.catalog.segments.clone();
    for s in segments.iter_mut() {
        s.info.name = s.info.name.on(timeline(2));
        s.path = format!("wal/{}", s.info.name);
    }
    segments.retain(|s| s.info.name.end(size()).unwrap() > fork);
    world.catalog.segments.extend(segments);
    world
        .catalog
        .lineages
        .insert(timeline(2), Lineage { ancestors: vec![(timeline(1), fork)], timeline: timeline(2) });
    let goal = |target, timeline| Goal { timeline, ..Goal::new(target) };
    // The second backup lies behind the fork, on the timeline that was left.
    let plan = run_plan(&world, &goal(Target::Latest, TargetTimeline::Latest)).unwrap();
    assert_eq!((plan.timeline, plan.backup.as_str()), (timeline(2), "20260131T235959Z-0000"));
    let timelines: Vec<_> = plan.segments.iter().map(|s| s.name.timeline().get()).collect();
    assert_eq!(timelines, [1, 2, 2, 2, 2, 2], "the segment of the fork is the descendant's");
    let plan = run_plan(&world, &goal(Target::Latest, TargetTimeline::Current)).unwrap();
    assert_eq!((plan.timeline, plan.backup.as_str()), (timeline(1), "20260131T235959Z-0001"));
    let plan = run_plan(&world, &goal(Target::Xid(745.into()), TargetTimeline::Id(timeline(1)))).unwrap();
    assert_eq!(plan.timeline, timeline(1));
    assert!(plan.settings.contains(&("recovery_target_timeline".into(), "1".into())));

    // Without a segment of its own the descendant ends at the fork, and recovery must not run past it.
    world.catalog.segments.retain(|s| s.info.name.timeline() == timeline(1));
    let plan = run_plan(&world, &goal(Target::Latest, TargetTimeline::Latest)).unwrap();
    assert_eq!((plan.stop.kind, plan.stop.lsn), (StopKind::End, fork));
    assert!(plan.settings.contains(&("recovery_target_lsn".into(), fork.to_string())), "{:?}", plan.settings);
    assert!(plan.settings.contains(&("recovery_target_inclusive".into(), "off".into())));
}

#[test]
fn a_plan_reads_as_a_dry_run_and_as_json() {
    let plan = run_plan(&plain(&[(1, 2)], &[]), &Goal::new(Target::Name("here".into()))).unwrap();
    let text = plan.to_string();
    assert!(
        text.starts_with(
            "target    restore point \"here\"\nstops     after the record that ends at 0/63E140"
        ),
        "{text}"
    );
    assert!(text.contains("contains  transaction 732 of 2000-01-01 00:00:32+00 as the last\n"), "{text}");
    let json = serde_json::to_value(&plan).unwrap();
    assert_eq!(json["stop"]["lsn"], "0/63E140");
    assert_eq!(json["goal"]["target"]["value"], "here");
    assert_eq!(json["segments"].as_array().unwrap().len(), 4);
}

/// A source that counts what is read of it.
struct Counting<'a> {
    world: &'a World,
    reads: std::sync::atomic::AtomicUsize,
}

impl Source for Counting<'_> {
    type Error = std::convert::Infallible;

    async fn events(&self, entry: &SegmentEntry) -> Result<Arc<Events>, Self::Error> {
        self.reads.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        self.world.events(entry).await
    }

    async fn straddler(
        &self,
        before: &SegmentEntry,
        after: &SegmentEntry,
    ) -> Result<Arc<Events>, Self::Error> {
        self.world.straddler(before, after).await
    }

    async fn record_from(
        &self,
        segments: &[&SegmentEntry],
        from: Lsn,
    ) -> Result<Option<(Lsn, Lsn)>, Self::Error> {
        self.world.record_from(segments, from).await
    }
}

#[tokio::test]
async fn a_transaction_among_many_segments_is_found_in_a_few_of_them() {
    // Two commits in each of 500 segments; a hundredth transaction runs for 300 segments longer than its neighbours.
    let at = |i: u64| 3 * MIB + i * (MIB / 2);
    let record = |i: u64, xid: u32| Rec {
        start: at(i),
        end: at(i) + 80,
        what: What::Commit,
        xid,
        subxacts: vec![],
        time: i as i64 * 1_000_000,
        joined: false,
        head_joined: false,
    };
    let mut records: Vec<_> = (0..1000).map(|i| record(i, 700 + i as u32)).collect();
    let long = records[100].xid;
    records[100].xid = records[700].xid;
    records[700].xid = long;
    let world = World::new(records, &[(0, 1)], &[]);
    for (xid, most) in [(1234, 30), (705, 30), (1690, 30), (long, 400)] {
        let source = Counting { world: &world, reads: Default::default() };
        let goal = Goal::new(Target::Xid(xid.into()));
        let plan = plan(&world.catalog, &goal, None, Rates::default(), &source).await.unwrap();
        assert_eq!(plan.stop.xid, Some(xid.into()));
        let reads = source.reads.into_inner();
        assert!(reads <= most, "{xid}: {reads} of 500 indexes were read");
    }
}
