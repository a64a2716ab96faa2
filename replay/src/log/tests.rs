//! Logs that pass over segments against those that read everything.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use proptest::prelude::*;
use waltide_format::archive::*;
use waltide_format::{ForkNumber, TimelineId, TimestampTz, Xid};

use super::*;
use crate::testing;

const MIB: u64 = 1 << 20;
const FIRST: u64 = 3;

/// One thing in a made-up log: what, which of the open transactions, which relation, how far behind the one before, and
/// two choices.
type Thing = (u8, usize, u8, u64, (bool, bool));

const fn relation(n: u8) -> RelFileLocator {
    // Two databases, and what they share.
    RelFileLocator { spc_oid: 1663, db_oid: [5, 5, 6, 0][(n % 4) as usize], rel_number: 16_384 + n as u32 }
}

/// A log in segments, as an archive has it.
#[derive(Debug, Clone, Default)]
struct Segment {
    telling: Telling,
    xacts: Vec<XactEnd>,
}

#[derive(Debug, Clone)]
struct Open {
    xid: Xid,
    subxacts: Vec<Xid>,
    is_prepared: bool,
    database: Option<Oid>,
}

/// Writes a log as transactions make it, in the order of its records.
struct Writer {
    at: u64,
    next: u32,
    open: Vec<Open>,
    segments: Vec<Segment>,
}

impl Writer {
    fn here(&mut self) -> &mut Segment {
        let number = usize::try_from(self.at / MIB - FIRST).unwrap();
        if self.segments.len() <= number {
            self.segments.resize_with(number + 1, Segment::default);
        }
        &mut self.segments[number]
    }

    fn advance(&mut self, bytes: u64) {
        self.at += bytes.max(64) & !7;
        self.here();
    }

    fn number(&mut self) -> Xid {
        self.next += 1;
        Xid::from(self.next - 1)
    }

    fn begin(&mut self) -> usize {
        let xid = self.number();
        self.open.push(Open { xid, subxacts: vec![], is_prepared: false, database: None });
        self.open.len() - 1
    }

    /// One of the open ones that may still do something, or a new one.
    fn pick(&mut self, index: usize) -> usize {
        let active: Vec<_> = (0..self.open.len()).filter(|i| !self.open[*i].is_prepared).collect();
        if active.is_empty() { self.begin() } else { active[index % active.len()] }
    }

    fn touch(&mut self, which: usize, rel: u8, in_sub: bool) {
        let xid = match in_sub {
            true => {
                let sub = self.number();
                self.open[which].subxacts.push(sub);
                sub
            }
            false => self.open[which].xid,
        };
        let relations = vec![RelationWork {
            relation: relation(rel),
            records: 1,
            inserted: 1,
            ..RelationWork::default()
        }];
        let at = Lsn::from(self.at);
        let volume = Volume { records: 1, wal_bytes: 60, image_bytes: 0 };
        let work = vec![XactWork { xid, first: at, last: at, volume, relations }];
        self.here().telling.detail.add(SegmentDetail { work, ..SegmentDetail::default() });
    }

    fn event(&mut self, xid: Xid, kind: FileEventKind) {
        let start = Lsn::from(self.at);
        self.here().telling.file_events.push(FileEvent { start, xid, kind });
    }

    fn end(&mut self, which: usize, kind: CommitKind, dropped: Vec<RelFileLocator>, jitter: bool) {
        let open = self.open[which].clone();
        let start = Lsn::from(self.at);
        let end = XactEnd {
            kind,
            xid: open.xid,
            start,
            end: start.saturating_add(40),
            // Clocks step back.
            time: TimestampTz::from_postgres_micros(
                i64::try_from(self.at / 1000).unwrap() - if jitter { 700 } else { 0 },
            ),
            db_oid: open.database,
            subxacts: open.subxacts,
            dropped,
            gid: None,
        };
        let here = self.here();
        here.xacts.push(end.clone());
        here.telling.xacts.push(end);
    }

    fn running(&mut self) {
        let next_xid = Xid::from(self.next);
        let oldest = self.open.iter().map(|o| o.xid.get()).min().unwrap_or(self.next);
        let start = Lsn::from(self.at);
        let running = RunningXacts { start, next_xid, oldest_running_xid: oldest.into(), running: 0 };
        self.here().telling.running_xacts.push(running);
    }

    fn thing(&mut self, (what, index, rel, gap, (a, b)): &Thing) {
        self.advance(*gap);
        match what {
            0..=3 => {
                let which = self.pick(*index);
                self.touch(which, *rel, *a);
            }
            4 => {
                let which = self.begin();
                self.open[which].database = a.then_some(if *b { 5 } else { 6 });
            }
            5..=7 if !self.open.is_empty() => {
                let which = index % self.open.len();
                let kind = match (self.open[which].is_prepared, *what == 7) {
                    (false, false) => CommitKind::Commit,
                    (false, true) => CommitKind::Abort,
                    (true, false) => CommitKind::CommitPrepared,
                    (true, true) => CommitKind::AbortPrepared,
                };
                // What COMMIT PREPARED says of the database may be nothing.
                if self.open[which].is_prepared && *a {
                    self.open[which].database = None;
                }
                let dropped = if *b { vec![relation(*rel)] } else { vec![] };
                self.end(which, kind, dropped, *a);
                self.open.remove(which);
            }
            8 => self.running(),
            9 => {
                let made = FileEventKind::Create { relation: relation(*rel), fork: ForkNumber::Main };
                if *a {
                    let which = self.pick(*index);
                    let xid = self.open[which].xid;
                    self.event(xid, made);
                } else {
                    // Who made it gets a number with its first record.
                    self.event(Xid::INVALID, made);
                    self.advance(gap / 2);
                    if *b {
                        self.running();
                        self.advance(gap / 2);
                    }
                    let which = self.begin();
                    // It fills the file, or has it locked.
                    self.touch(which, if index % 2 == 0 { *rel } else { 2 }, false);
                    let RelFileLocator { db_oid, rel_number: rel_oid, .. } = relation(*rel);
                    let locks = vec![ExclusiveLock { xid: self.open[which].xid, db_oid, rel_oid }];
                    self.here().telling.detail.add(SegmentDetail { locks, ..SegmentDetail::default() });
                }
            }
            10 => {
                let which = self.pick(*index);
                let xid = self.open[which].xid;
                let made = FileEventKind::Create { relation: relation(*rel), fork: ForkNumber::Main };
                if *a {
                    self.event(xid, made);
                    self.advance(*gap);
                }
                self.event(xid, FileEventKind::Truncate { relation: relation(*rel), blocks: 0, flags: 7 });
            }
            11 => {
                let which = self.pick(*index);
                let xid = self.open[which].xid;
                self.event(xid, FileEventKind::DatabaseDrop { db_oid: 6, tablespaces: vec![1663] });
                self.advance(*gap);
                self.end(which, CommitKind::Commit, vec![], false);
                self.open.remove(which);
            }
            12 => {
                let which = if *a || self.open.is_empty() { self.begin() } else { index % self.open.len() };
                if *a {
                    self.open[which].database = Some(if *b { 5 } else { 6 });
                }
                if !self.open[which].is_prepared {
                    self.end(which, CommitKind::Prepare, vec![], false);
                    self.open[which].is_prepared = true;
                }
            }
            // A crash takes all but what is prepared.
            13 if *a && *b => self.open.retain(|open| open.is_prepared),
            _ => {}
        }
    }
}

/// An archive of such a log.
struct Made {
    catalog: Catalog,
    segments: Vec<Segment>,
    /// Which segments merged indexes tell of.
    merged: Vec<bool>,
    /// Whether indexes can be read.
    is_indexed: bool,
    reads: AtomicU64,
}

#[derive(Debug, thiserror::Error)]
#[error("it cannot be read")]
struct Unreadable;

impl Made {
    fn new(things: &[Thing], merged: impl Fn(usize) -> bool) -> Self {
        let mut writer = Writer { at: FIRST * MIB, next: 700, open: vec![], segments: vec![] };
        for thing in things {
            writer.thing(thing);
        }
        let segments = writer.segments;
        let entry = |(n, segment): (u64, &Segment)| {
            let ending = if n as usize + 1 == segments.len() { Ending::EndOfLog } else { Ending::Full };
            let name = testing::segment_name(FIRST + n);
            let mut info = testing::info(7, name, ending);
            info.valid_end = Lsn::from((FIRST + n + 1) * MIB);
            let ends = || segment.xacts.iter().filter(|x| x.kind.is_end());
            (info.min_time, info.max_time) = (ends().map(|x| x.time).min(), ends().map(|x| x.time).max());
            (info.first_time, info.last_time) =
                (ends().next().map(|x| x.time), ends().next_back().map(|x| x.time));
            SegmentEntry {
                path: name.to_string(),
                stored_bytes: 1,
                info,
                restore_points: vec![],
                faults: vec![],
                digest: String::new(),
                pushed_by: None,
            }
        };
        let catalog = Catalog {
            cluster: "main".into(),
            system: testing::system(7),
            backups: vec![],
            started: vec![],
            segments: (0u64..).zip(&segments).map(entry).collect(),
            lineages: Default::default(),
            beginnings: Default::default(),
            damaged: vec![],
        };
        let merged = (0..segments.len()).map(merged).collect();
        Self { catalog, segments, merged, is_indexed: true, reads: AtomicU64::default() }
    }

    fn nth(&self, entry: &SegmentEntry) -> usize {
        self.catalog.segments.iter().position(|e| e.path == entry.path).unwrap()
    }

    fn index(&self, nth: usize) -> SegmentIndex {
        let mut index = SegmentIndex::new(self.catalog.segments[nth].info.clone());
        let Segment { telling, xacts } = &self.segments[nth];
        index.xacts.clone_from(xacts);
        index.file_events.clone_from(&telling.file_events);
        index.running_xacts.clone_from(&telling.running_xacts);
        let relations = telling.detail.work.iter().flat_map(|w| &w.relations);
        let fork =
            |r: &RelationWork| ForkBlocks { relation: r.relation, fork: ForkNumber::Main, blocks: vec![] };
        index.blocks = relations.map(fork).collect();
        index
    }

    /// What a filter takes, a line each.
    fn log(&self, filter: &LogFilter) -> Vec<(TimestampTz, String)> {
        #[derive(Default)]
        struct Lines(Vec<(TimestampTz, String)>);
        impl LogSink for Lines {
            fn transaction(&mut self, transaction: Transaction) -> ControlFlow<()> {
                self.0.push((transaction.time, serde_json::to_string(&transaction).unwrap()));
                ControlFlow::Continue(())
            }
            fn hole(&mut self, text: &str) {
                panic!("{text}");
            }
        }
        let line = Lineage::root(TimelineId::FIRST);
        let log = Log { catalog: &self.catalog, line: &line, filter, source: self, threads: 2 };
        let mut lines = Lines::default();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(log.run(&mut Numbers, &mut lines)).unwrap();
        lines.0
    }
}

impl Tellings for Made {
    type Error = Unreadable;
    type Part = Telling;

    async fn read(&self, step: &Step<'_>) -> Result<Telling, Unreadable> {
        self.reads.fetch_add(1, Relaxed);
        Ok(self.segments[self.nth(step.entry)].telling.clone())
    }

    fn join(&self, part: Telling, _: Option<PreviousTail>) -> Joined {
        Joined { telling: part, torn: None }
    }

    async fn segment_index(&self, entry: &SegmentEntry) -> Result<SegmentIndex, Unreadable> {
        if self.is_indexed { Ok(self.index(self.nth(entry))) } else { Err(Unreadable) }
    }

    async fn has_merged(&self, _: &[&Step<'_>]) -> Result<bool, Unreadable> {
        Ok(self.is_indexed)
    }

    async fn known(
        &self,
        steps: &[&Step<'_>],
        question: &Question,
    ) -> Result<Vec<Option<Known>>, Unreadable> {
        let known = |step: &&Step<'_>| {
            let nth = self.nth(step.entry);
            let mut index = self.index(nth);
            let may_end = question.xid.is_some_and(|xid| {
                let near = |x: &Xid| x.get().abs_diff(xid.get()) < 4;
                index.xacts.iter().any(|x| near(&x.xid) || x.subxacts.iter().any(near))
            });
            index.running_xacts.clear();
            index.xacts.retain(|x| question.databases || x.kind.is_end() && !x.dropped.is_empty());
            index.blocks.retain(|b| question.relations.as_ref().is_some_and(|wanted| wanted.has(b.relation)));
            self.merged[nth].then_some(Known { index, may_end })
        };
        Ok(steps.iter().map(known).collect())
    }

    async fn horizons(&self, steps: &[&Step<'_>]) -> Result<Vec<Option<SegmentIndex>>, Unreadable> {
        let known = |step: &&Step<'_>| {
            let nth = self.nth(step.entry);
            let mut index = self.index(nth);
            index.xacts.clear();
            index.blocks.clear();
            (self.is_indexed && self.merged[nth]).then_some(index)
        };
        Ok(steps.iter().map(known).collect())
    }

    fn is_damage(&self, _: &Unreadable) -> bool {
        true
    }
}

fn hour(n: i64) -> TimestampTz {
    TimestampTz::from_postgres_micros(n * 3_600_000_000)
}

fn things() -> impl Strategy<Value = Vec<Thing>> {
    let gap = prop_oneof![3 => 64u64..4096, 1 => 4096u64..3 * MIB];
    proptest::collection::vec((0u8..14, 0usize..100, 0u8..8, gap, any::<(bool, bool)>()), 5..90)
}

fn filters() -> impl Strategy<Value = LogFilter> {
    let relation = prop_oneof![
        2 => Just(None),
        2 => (0u8..8).prop_map(|n| Some(RelationMatch::Files(relation(n)))),
        1 => (0u8..8).prop_map(|n| Some(RelationMatch::Number(relation(n).rel_number))),
    ];
    let database = proptest::option::weighted(0.3, (5u32..7).prop_map(DatabaseMatch::Oid));
    let xid = proptest::option::weighted(0.2, (700u32..740).prop_map(Xid::from));
    (relation, database, xid, any::<(bool, bool, bool)>()).prop_map(
        |(relation, database, xid, (dropped, truncated, aborted))| LogFilter {
            relation,
            database,
            xid,
            dropped,
            truncated,
            aborted,
            ..LogFilter::default()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]
    #[test]
    fn what_is_passed_over_holds_no_answer(
        things in things(), filter in filters(), merged in proptest::collection::vec(any::<bool>(), 40),
        times in any::<Option<(usize, usize)>>(),
    ) {
        let made = Made::new(&things, |n| merged[n % merged.len()]);
        // Where something may have ended in each segment and no index can be read, everything is.
        let mut blind = Made { is_indexed: false, ..Made::new(&things, |_| false) };
        for entry in &mut blind.catalog.segments {
            (entry.info.min_time, entry.info.max_time) = (Some(hour(0)), Some(hour(9)));
        }
        let mut all = blind.log(&filter);
        let xacts: Vec<_> = made.segments.iter().flat_map(|s| &s.xacts).map(|x| x.time).collect();
        let mut filter = filter;
        if let Some((a, b)) = times.filter(|_| !xacts.is_empty()) {
            (filter.since, filter.until) = (Some(xacts[a % xacts.len()]), Some(xacts[b % xacts.len()]));
            all.retain(|(time, _)| filter.covers(*time));
        }
        let found = made.log(&filter);
        prop_assert_eq!(found, all);
    }
}

#[test]
fn few_segments_are_read_for_a_relation_that_few_touch() {
    let touch = |rel: u8| {
        [
            (4, 0, 0, 64, (false, false)),
            (0, 0, rel, 64, (false, false)),
            (5, 0, 0, 64, (false, false)),
            (8, 0, 0, MIB / 2, (false, false)),
        ]
    };
    let mut things: Vec<Thing> = Vec::new();
    for n in 0..400u64 {
        things.extend(touch(if n == 150 { 1 } else { 2 }));
    }
    let made = Made::new(&things, |_| true);
    for filter in [
        LogFilter { relation: Some(RelationMatch::Files(relation(1))), ..LogFilter::default() },
        LogFilter { relation: Some(RelationMatch::Number(16_385)), ..LogFilter::default() },
        LogFilter { database: Some(DatabaseMatch::Oid(5)), ..LogFilter::default() },
    ] {
        made.reads.store(0, Relaxed);
        assert_eq!(made.log(&filter).len(), 1, "{filter:?}");
        assert!(
            made.reads.load(Relaxed) <= 6 && made.segments.len() > 150,
            "{:?} of {}",
            made.reads,
            made.segments.len()
        );
    }
}
