//! Puts transactions together out of what segments tell, one after another. Pure: no I/O.
//!
//! Memory is bounded by the transactions that are open: one that ended is handed over and forgotten, and one of which
//! no end will come (a crash took it) is forgotten once the log says that nothing so old runs any more.

use std::collections::HashMap;

use waltide_format::archive::{
    CheckpointInfo, CheckpointKind, CommitKind, FileEventKind, RunningXacts, TruncatedOid, Volume, XactEnd,
    XactWork,
};
use waltide_format::engines::postgres::detail::Telling;
use waltide_format::{ForkNumber, Lsn, Oid, RelFileLocator, Xid};

use super::transaction::Prepared;

/// A file made by nobody yet known is asked about in so many segments.
pub(super) const UNCLAIMED_SEGMENTS: u32 = 3;

/// A transaction that ended, by numbers.
#[derive(Debug, Clone)]
pub(super) struct Ended {
    pub(super) end: XactEnd,
    pub(super) top: Option<Xid>,
    pub(super) prepared: Option<Prepared>,
    pub(super) complete: bool,
    /// What it did, its subtransactions with it.
    pub(super) work: XactWork,
    pub(super) effects: Effects,
}

/// What a transaction did besides rows.
#[derive(Debug, Clone, Default)]
pub(super) struct Effects {
    /// Files made, each with the record's start.
    pub(super) made: Vec<(Lsn, RelFileLocator)>,
    /// Relations cut to no block.
    pub(super) emptied: Vec<RelFileLocator>,
    /// What TRUNCATE named, where the log says so.
    pub(super) truncates: Vec<TruncatedOid>,
    /// Databases made.
    pub(super) created_databases: Vec<Oid>,
    /// Databases dropped.
    pub(super) dropped_databases: Vec<Oid>,
}

impl Effects {
    fn add(&mut self, other: Self) {
        self.made.extend(other.made);
        self.emptied.extend(other.emptied);
        self.truncates.extend(other.truncates);
        self.created_databases.extend(other.created_databases);
        self.dropped_databases.extend(other.dropped_databases);
    }

    fn make(&mut self, at: Lsn, relation: RelFileLocator) {
        if self.made.iter().all(|(_, made)| *made != relation) {
            self.made.push((at, relation));
        }
    }
}

/// A (sub)transaction of which no end came yet.
#[derive(Debug, Clone, Default)]
struct Open {
    work: Option<XactWork>,
    effects: Effects,
    prepared: Option<PreparedAs>,
}

/// What a PREPARE said.
#[derive(Debug, Clone)]
struct PreparedAs {
    at: Prepared,
    gid: Option<String>,
    db_oid: Option<Oid>,
}

/// A file that was made before its transaction had a number.
#[derive(Debug, Clone, Copy)]
struct Unclaimed {
    at: Lsn,
    relation: RelFileLocator,
    segments: u32,
}

/// Transactions out of tellings, which are added in the order of the log.
#[derive(Debug, Default)]
pub(super) struct Joiner {
    open: HashMap<u32, Open>,
    tops: HashMap<u32, Xid>,
    unclaimed: Vec<Unclaimed>,
    /// Of this transaction and those after it, all is known.
    known_from: Option<Xid>,
}

impl Joiner {
    /// What follows does not continue what came before: of transactions that were open, something is missing.
    pub(super) fn broken(&mut self) {
        self.known_from = None;
        self.unclaimed.clear();
    }

    /// How many transactions are open.
    #[cfg(test)]
    pub(super) fn open(&self) -> usize {
        self.open.len()
    }

    /// Takes in what a segment tells; gives the transactions that end in it, in order.
    pub(super) fn add(&mut self, told: Telling) -> Vec<Ended> {
        self.tops.extend(told.detail.parents.iter().map(|s| (s.xid.get(), s.top)));
        self.take_events(&told);
        for work in told.detail.work {
            let open = self.open.entry(work.xid.get()).or_default();
            match &mut open.work {
                Some(mine) => mine.add(work),
                none => *none = Some(work),
            }
        }
        for truncate in told.detail.truncates {
            self.open.entry(truncate.xid.get()).or_default().effects.truncates.push(truncate);
        }
        let mut ended = Vec::new();
        for event in in_order(told.xacts, &told.running_xacts, &told.checkpoints) {
            match event {
                Event::End(end) if end.kind == CommitKind::Prepare => self.prepare(*end),
                Event::End(end) => ended.push(self.end(*end)),
                Event::Running(running) => {
                    self.known_from.get_or_insert(running.next_xid);
                    let oldest = running.oldest_running_xid;
                    self.open.retain(|xid, _| !Xid::from(*xid).precedes(oldest));
                    self.tops.retain(|xid, _| !Xid::from(*xid).precedes(oldest));
                }
                Event::Next(next_xid) => {
                    self.known_from.get_or_insert(next_xid);
                }
            }
        }
        ended
    }

    /// Files made and cut, under the transactions that did it.
    fn take_events(&mut self, told: &Telling) {
        for event in &told.file_events {
            match event.kind {
                FileEventKind::Create { relation, fork: ForkNumber::Main | ForkNumber::Init } => {
                    if event.xid.is_invalid() {
                        self.unclaimed.push(Unclaimed { at: event.start, relation, segments: 0 });
                    } else {
                        let open = self.open.entry(event.xid.get()).or_default();
                        open.effects.make(event.start, relation);
                    }
                }
                FileEventKind::Truncate { relation, blocks: 0, .. } if !event.xid.is_invalid() => {
                    self.open.entry(event.xid.get()).or_default().effects.emptied.push(relation);
                }
                FileEventKind::DatabaseCopy { to: (_, oid), .. }
                | FileEventKind::DatabaseCreate { database: (_, oid) }
                    if !event.xid.is_invalid() =>
                {
                    self.open.entry(event.xid.get()).or_default().effects.created_databases.push(oid);
                }
                FileEventKind::DatabaseDrop { db_oid, .. } if !event.xid.is_invalid() => {
                    self.open.entry(event.xid.get()).or_default().effects.dropped_databases.push(db_oid);
                }
                _ => {}
            }
        }
        for waiting in std::mem::take(&mut self.unclaimed) {
            let Unclaimed { at, relation, segments } = waiting;
            match claimant(told, relation) {
                Some(xid) => self.open.entry(xid.get()).or_default().effects.make(at, relation),
                None if segments.saturating_add(1) < UNCLAIMED_SEGMENTS => {
                    self.unclaimed.push(Unclaimed { segments: segments.saturating_add(1), ..waiting });
                }
                None => {}
            }
        }
    }

    fn prepare(&mut self, end: XactEnd) {
        let at = Prepared { lsn: end.start, time: end.time };
        self.gather(end.xid, &end.subxacts);
        let open = self.open.entry(end.xid.get()).or_default();
        open.prepared = Some(PreparedAs { at, gid: end.gid, db_oid: end.db_oid });
    }

    /// Puts the subtransactions' work to their transaction's.
    fn gather(&mut self, xid: Xid, subxacts: &[Xid]) {
        for sub in subxacts {
            self.tops.remove(&sub.get());
            let Some(sub) = self.open.remove(&sub.get()) else { continue };
            let open = self.open.entry(xid.get()).or_default();
            open.effects.add(sub.effects);
            match (&mut open.work, sub.work) {
                (Some(mine), Some(theirs)) => {
                    let relations = theirs.relations;
                    mine.add(XactWork { xid, relations, ..theirs });
                }
                (none @ None, Some(theirs)) => *none = Some(XactWork { xid, ..theirs }),
                (_, None) => {}
            }
        }
    }

    fn end(&mut self, mut end: XactEnd) -> Ended {
        self.gather(end.xid, &end.subxacts);
        let Open { work, mut effects, prepared } = self.open.remove(&end.xid.get()).unwrap_or_default();
        let top = self.tops.remove(&end.xid.get());
        effects.made.sort_by_key(|(at, _)| *at);
        let known = self.known_from.is_some_and(|from| !end.xid.precedes(from));
        let none = || XactWork {
            xid: end.xid,
            first: end.start,
            last: end.start,
            volume: Volume::default(),
            relations: Vec::new(),
        };
        let work = work.unwrap_or_else(none);
        if let Some(prepared) = &prepared {
            end.gid = end.gid.or_else(|| prepared.gid.clone());
            end.db_oid = end.db_oid.or(prepared.db_oid);
        }
        let database = || work.relations.iter().map(|r| r.relation.db_oid).find(|oid| *oid != 0);
        end.db_oid = end.db_oid.or_else(database);
        Ended { end, top, prepared: prepared.map(|p| p.at), complete: known, work, effects }
    }
}

/// Who made a file: the transaction that locks the new relation, whose OID is the file's number, or fills it.
fn claimant(told: &Telling, relation: RelFileLocator) -> Option<Xid> {
    let locks = &told.detail.locks;
    let locked = locks.iter().find(|l| (l.db_oid, l.rel_oid) == (relation.db_oid, relation.rel_number));
    let fills = |w: &&XactWork| w.relations.binary_search_by_key(&relation, |r| r.relation).is_ok();
    locked.map(|l| l.xid).or_else(|| told.detail.work.iter().find(fills).map(|w| w.xid))
}

/// What happens to the set of open transactions.
enum Event {
    End(Box<XactEnd>),
    Running(RunningXacts),
    Next(Xid),
}

/// Everything that bears on open transactions, in LSN order.
fn in_order(ends: Vec<XactEnd>, running: &[RunningXacts], checkpoints: &[CheckpointInfo]) -> Vec<Event> {
    let ends = ends.into_iter().map(|end| (end.start, Event::End(Box::new(end))));
    let running = running.iter().map(|r| (r.start, Event::Running(r.clone())));
    // Transactions go on while an online checkpoint is made, so its nextXid is that of an earlier moment.
    let shutdown = checkpoints.iter().filter(|c| c.kind == CheckpointKind::Shutdown);
    let next = shutdown.map(|c| (c.start, Event::Next(next_xid(c.next_full_xid))));
    let mut all: Vec<_> = ends.chain(running).chain(next).collect();
    all.sort_by_key(|(start, _)| *start);
    all.into_iter().map(|(_, event)| event).collect()
}

/// A full transaction number without its epoch.
pub(super) fn next_xid(full: u64) -> Xid {
    Xid::from(u32::try_from(full & 0xFFFF_FFFF).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use waltide_format::TimestampTz;
    use waltide_format::archive::{ExclusiveLock, FileEvent, RelationWork, SegmentDetail, SubXact};

    const TABLE: RelFileLocator = RelFileLocator { spc_oid: 1663, db_oid: 5, rel_number: 16384 };

    fn work(xid: u32, at: u64, rows: u64) -> XactWork {
        let relations =
            vec![RelationWork { relation: TABLE, records: rows, inserted: rows, ..Default::default() }];
        let volume = Volume { records: rows, wal_bytes: rows * 100, image_bytes: 0 };
        XactWork { xid: xid.into(), first: at.into(), last: at.into(), volume, relations }
    }

    fn end(kind: CommitKind, xid: u32, at: u64, subxacts: &[u32]) -> XactEnd {
        XactEnd {
            kind,
            xid: xid.into(),
            start: at.into(),
            end: (at + 40).into(),
            time: TimestampTz::default(),
            db_oid: None,
            subxacts: subxacts.iter().map(|x| Xid::from(*x)).collect(),
            dropped: Vec::new(),
            gid: (kind == CommitKind::Prepare).then(|| "gid".to_owned()),
        }
    }

    fn running(at: u64, next: u32, oldest: u32) -> RunningXacts {
        let (next_xid, oldest_running_xid) = (next.into(), oldest.into());
        RunningXacts { start: at.into(), next_xid, oldest_running_xid, running: 0 }
    }

    fn telling(work: Vec<XactWork>, xacts: Vec<XactEnd>, running_xacts: Vec<RunningXacts>) -> Telling {
        let mut told = Telling { xacts, running_xacts, ..Telling::default() };
        told.detail.work = work;
        told
    }

    #[test]
    fn work_of_several_segments_and_subtransactions_comes_together() {
        let mut joiner = Joiner::default();
        let first = telling(
            vec![work(740, 10, 1), work(741, 20, 2), work(742, 30, 4)],
            vec![],
            vec![running(5, 740, 740)],
        );
        assert!(joiner.add(first).is_empty());
        let undone = end(CommitKind::Abort, 742, 105, &[]);
        let ends = vec![undone, end(CommitKind::Commit, 740, 130, &[741])];
        let mut second = telling(vec![work(740, 110, 8), work(741, 120, 16)], ends, vec![]);
        second.detail.parents = vec![SubXact { xid: 742.into(), top: 740.into() }];
        let ended = joiner.add(second);
        let told: Vec<_> =
            ended.iter().map(|e| (e.end.xid.get(), e.work.volume.records, e.work.first.get())).collect();
        assert_eq!(told, [(742, 4, 30), (740, 27, 10)]);
        assert_eq!(
            ended[1].work.relations,
            [RelationWork { records: 27, inserted: 27, ..work(1, 1, 1).relations[0] }]
        );
        assert_eq!((ended[0].top, ended[1].top), (Some(740.into()), None));
        assert_eq!((ended[1].complete, ended[1].end.db_oid), (true, Some(5)));
        assert_eq!((joiner.open(), joiner.tops.len()), (0, 0));
    }

    #[test]
    fn a_prepared_transaction_is_told_where_it_is_committed() {
        let mut joiner = Joiner::default();
        let prepare = end(CommitKind::Prepare, 740, 20, &[741]);
        assert!(
            joiner.add(telling(vec![work(740, 10, 1), work(741, 15, 1)], vec![prepare], vec![])).is_empty()
        );
        let mut late = telling(vec![], vec![end(CommitKind::CommitPrepared, 740, 900, &[741])], vec![]);
        late.running_xacts = vec![running(800, 760, 740)];
        let [ended] = joiner.add(late).try_into().unwrap();
        assert_eq!((ended.end.gid.as_deref(), ended.work.volume.records), (Some("gid"), 2));
        assert_eq!(ended.prepared.map(|p| p.lsn), Some(Lsn::from(20)));
        assert!(!ended.complete, "nothing says that the log begins before 740 did");
    }

    #[test]
    fn what_a_crash_took_is_forgotten_once_nothing_so_old_runs() {
        let mut joiner = Joiner::default();
        joiner.add(telling(vec![work(740, 10, 1), work(741, 20, 1), work(750, 30, 1)], vec![], vec![]));
        joiner.add(telling(vec![], vec![], vec![running(100, 760, 750)]));
        assert_eq!(joiner.open(), 1);
        let [ended] = joiner
            .add(telling(vec![], vec![end(CommitKind::Commit, 750, 200, &[])], vec![]))
            .try_into()
            .unwrap();
        assert_eq!(ended.work.volume.records, 1);
    }

    #[test]
    fn behind_a_hole_only_what_begins_there_is_known_whole() {
        let mut joiner = Joiner::default();
        joiner.add(telling(vec![work(740, 10, 1)], vec![], vec![running(5, 740, 740)]));
        joiner.broken();
        let ends = [745, 740, 751].iter().zip([100, 110, 130]);
        let ends: Vec<_> = ends.map(|(xid, at)| end(CommitKind::Commit, *xid, at, &[])).collect();
        let ended = joiner.add(telling(vec![work(740, 105, 1)], ends, vec![running(120, 750, 740)]));
        let told: Vec<_> =
            ended.iter().map(|e| (e.end.xid.get(), e.complete, e.work.volume.records)).collect();
        assert_eq!(told, [(745, false, 0), (740, false, 2), (751, true, 0)]);
    }

    #[test]
    fn a_file_made_before_its_transaction_had_a_number_is_its_own() {
        let create = |xid: u32, at: u64, rel_number: u32, fork| FileEvent {
            start: at.into(),
            xid: xid.into(),
            kind: FileEventKind::Create { relation: RelFileLocator { rel_number, ..TABLE }, fork },
        };
        let mut joiner = Joiner::default();
        let file_events = vec![
            create(0, 10, 16384, ForkNumber::Main),
            create(0, 11, 16400, ForkNumber::Main),
            create(740, 12, 16390, ForkNumber::Main),
            create(740, 13, 16390, ForkNumber::Init),
            create(740, 14, 16390, ForkNumber::Vm),
        ];
        joiner.add(Telling { file_events, ..Telling::default() });
        let mut second = telling(vec![], vec![end(CommitKind::Commit, 740, 100, &[])], vec![]);
        second.detail.locks = vec![ExclusiveLock { xid: 740.into(), db_oid: 5, rel_oid: 16384 }];
        let [ended] = joiner.add(second).try_into().unwrap();
        let made: Vec<_> = ended.effects.made.iter().map(|(_, f)| f.rel_number).collect();
        assert_eq!(made, [16384, 16390]);
        joiner.add(Telling::default());
        assert_eq!(joiner.unclaimed.len(), 0, "nobody came for 16400");
    }

    /// Pieces of a log: what a transaction writes, or its end.
    fn told(part: &[(u64, u32, Option<u64>)]) -> Telling {
        let mut told = Telling::default();
        for (at, xid, rows) in part {
            match rows {
                Some(rows) => {
                    let work = vec![work(*xid, *at, *rows)];
                    told.detail.add(SegmentDetail { work, ..SegmentDetail::default() });
                }
                None => told.xacts.push(end(CommitKind::Commit, *xid, *at, &[])),
            }
        }
        told
    }

    proptest! {
        #[test]
        fn however_the_log_is_cut_the_same_transactions_come_out(
            writes in proptest::collection::vec((700u32..712, 1u64..5), 1..60),
            ended in proptest::collection::btree_set(700u32..712, 0..12),
            cuts in proptest::collection::btree_set(0usize..70, 0..8),
        ) {
            let mut log = Vec::new();
            for (nth, (xid, rows)) in writes.iter().enumerate() {
                log.push((log.len() as u64, *xid, Some(*rows)));
                let goes_on = writes[nth + 1..].iter().any(|w| w.0 == *xid);
                if ended.contains(xid) && !goes_on {
                    log.push((log.len() as u64, *xid, None));
                }
            }
            let (mut joiner, mut from, mut out) = (Joiner::default(), 0, Vec::new());
            for cut in cuts.into_iter().filter(|c| *c < log.len()).chain([log.len()]) {
                out.extend(joiner.add(told(&log[from..cut])));
                from = cut;
            }
            let found: Vec<_> = out.iter().map(|e| (e.end.start.get(), e.work.volume.records)).collect();
            let ends = log.iter().filter(|l| l.2.is_none());
            let rows = |xid| writes.iter().filter(|w| w.0 == xid).map(|w| w.1).sum::<u64>();
            prop_assert_eq!(found, ends.map(|(at, xid, _)| (*at, rows(*xid))).collect::<Vec<_>>());
            let left: std::collections::BTreeSet<_> = writes.iter().map(|w| w.0).filter(|x| !ended.contains(x)).collect();
            prop_assert_eq!(joiner.open(), left.len());
        }
    }
}
