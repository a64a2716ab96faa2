//! Where PostgreSQL's recovery would stop, computed from the segments' indexes.
//!
//! The rules are recovery's own. Before it applies a record it asks whether to stop there: at the first commit or
//! abort past a time, at that of a transaction it must not contain, at the first record from an LSN on. After it
//! has applied one, it asks again: a transaction's end, a restore point, the first record from an LSN on. It looks
//! at every record from the backup's start, and a stop before the backup's end is a failure.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::{StreamExt as _, TryStreamExt as _};
use serde::Serialize;
use waltide_format::archive::{Run, SegmentEntry, SegmentIndex, Step, XactEnd};
use waltide_format::{Lsn, TimestampTz, Xid};

use crate::target::{Goal, Target};

/// What a part of the log says that a target can mean, in LSN order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Events {
    /// Commits and aborts.
    pub xacts: Vec<XactEnd>,
    /// Restore points: name, start, end.
    pub restore_points: Vec<(String, TimestampTz, Lsn, Lsn)>,
}

impl Events {
    /// Those of an index.
    pub fn of(index: SegmentIndex) -> Self {
        let ends = |x: &XactEnd| x.kind.is_end();
        let points = index.restore_points.into_iter().map(|p| (p.name, p.time, p.start, p.end)).collect();
        Self { xacts: index.xacts.into_iter().filter(ends).collect(), restore_points: points }
    }
}

/// Where the planner reads what the catalogue does not say.
pub trait Source: Sync {
    /// What can go wrong.
    type Error: std::error::Error + Send + Sync + 'static;

    /// The events of a segment's records.
    fn events(&self, entry: &SegmentEntry) -> impl Future<Output = Result<Arc<Events>, Self::Error>> + Send;

    /// Which of `entries` may hold the end of a transaction: all, where nothing says more than that.
    fn may_end(
        &self,
        entries: &[&SegmentEntry],
        _xid: Xid,
    ) -> impl Future<Output = Result<Vec<bool>, Self::Error>> + Send {
        let all = vec![true; entries.len()];
        async move { Ok(all) }
    }

    /// The events of the record that begins in `before` and ends in `after`, which neither's index has.
    fn straddler(
        &self,
        before: &SegmentEntry,
        after: &SegmentEntry,
    ) -> impl Future<Output = Result<Arc<Events>, Self::Error>> + Send;

    /// Start and end of the first record of `segments`, neighbours in order, that starts at `from` or later.
    fn record_from(
        &self,
        segments: &[&SegmentEntry],
        from: Lsn,
    ) -> impl Future<Output = Result<Option<(Lsn, Lsn)>, Self::Error>> + Send;
}

/// How recovery stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StopKind {
    /// Before a record.
    Before,
    /// After a record.
    After,
    /// At the end of the archived WAL.
    End,
    /// Once the backup is consistent.
    Consistent,
}

/// Where recovery stops.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stop {
    /// How.
    pub kind: StopKind,
    /// How far replay comes: the start of the record it stops before, the end of the one it stops after.
    pub lsn: Lsn,
    /// End of the record that must be read to see that this is the place.
    pub read_to: Lsn,
    /// The transaction whose end it is; where the target is a subtransaction, the one that it is a part of.
    pub xid: Option<Xid>,
    /// Its time, or the restore point's.
    pub time: Option<TimestampTz>,
}

/// A commit that will be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct LastCommit {
    /// The transaction.
    pub xid: Xid,
    /// When it was committed.
    pub time: TimestampTz,
    /// End of its record.
    pub lsn: Lsn,
}

/// What is archived behind the place where recovery stops, and will not be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Lost {
    /// Transactions that committed.
    pub transactions: u64,
    /// When the first of them did.
    pub first_time: TimestampTz,
    /// When the last of them did.
    pub last_time: TimestampTz,
    /// End of the last one's record.
    pub last_lsn: Lsn,
}

/// What a search along one backup's WAL found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Resolution {
    /// Recovery stops here.
    Stops(Stop),
    /// Nothing in the WAL is the target.
    NotFound,
}

/// A part of a run in which to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Segment(usize),
    /// The record that begins in this segment and ends in the next, in neither's index.
    Straddler(usize),
}

/// No less WAL than this tells of as many transactions as there are numbers: each is named by four bytes at least.
const XIDS_BYTES_MIN: u64 = 4 << 32;
/// How many indexes are read at once.
const AT_ONCE: usize = 8;

/// Reads through what was read already.
pub(crate) struct Reading<'a, S: Source> {
    source: &'a S,
    known: std::sync::Mutex<BTreeMap<String, Arc<Events>>>,
    /// Which segments' objects may hold the transaction's end, as far as that was asked.
    may_end: std::sync::Mutex<BTreeMap<String, bool>>,
}

impl<'a, S: Source> Reading<'a, S> {
    pub(crate) fn new(source: &'a S) -> Self {
        Self { source, known: std::sync::Mutex::default(), may_end: std::sync::Mutex::default() }
    }

    /// Asks which segments of all these runs may hold the end of a transaction; what was asked before is not asked again.
    pub(crate) async fn ask_where<'r>(
        &self,
        runs: impl Iterator<Item = &'r Run<'r>>,
        xid: Xid,
    ) -> Result<(), S::Error> {
        let known = || self.may_end.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let entries: BTreeMap<_, _> =
            runs.flat_map(|run| run.steps.iter().map(|step| (&step.entry.path, step.entry))).collect();
        let entries: Vec<_> =
            entries.into_values().filter(|entry| !known().contains_key(&entry.path)).collect();
        if !entries.is_empty() {
            let may = self.source.may_end(&entries, xid).await?;
            known().extend(entries.iter().map(|entry| entry.path.clone()).zip(may));
        }
        Ok(())
    }

    async fn part(&self, steps: &[Step<'_>], part: Part) -> Result<(Part, Arc<Events>), S::Error> {
        let entry = |i: usize| steps.get(i).map(|s| s.entry);
        let known = || self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (key, index) = match part {
            Part::Segment(i) => (entry(i).map(|e| e.path.clone()), i),
            Part::Straddler(i) => (entry(i).map(|e| format!("{}+", e.path)), i),
        };
        let key = key.unwrap_or_default();
        if let Some(found) = known().get(&key).cloned() {
            return Ok((part, found));
        }
        let found = match (part, entry(index), entry(index.saturating_add(1))) {
            (Part::Segment(_), Some(entry), _) => self.source.events(entry).await?,
            (Part::Straddler(_), Some(before), Some(after)) => self.source.straddler(before, after).await?,
            _ => Arc::default(),
        };
        known().insert(key, Arc::clone(&found));
        Ok((part, found))
    }

    /// Where recovery from `start` along `run` stops for `goal`. `consistent` is where the backup ends.
    pub(crate) async fn resolve(
        &self,
        run: &Run<'_>,
        start: Lsn,
        consistent: Lsn,
        goal: &Goal,
    ) -> Result<Resolution, S::Error> {
        let Some(end) = run.end() else { return Ok(Resolution::NotFound) };
        let plain = |kind, lsn| Stop { kind, lsn, read_to: lsn, xid: None, time: None };
        let stops = |stop| Ok(Resolution::Stops(stop));
        match &goal.target {
            Target::Latest => stops(plain(StopKind::End, end)),
            Target::Immediate => stops(plain(StopKind::Consistent, consistent)),
            Target::Lsn(lsn) => self.resolve_lsn(run, start.max(*lsn), *lsn, end, goal.inclusive).await,
            Target::Moment(moment) => {
                let lsn = moment.lsn;
                let here = |step: &Step<'_>| step.start() <= lsn && lsn < step.usable_end;
                let known = moment.commit_end.filter(|read_to| {
                    lsn == moment.commit_lsn && start <= lsn && *read_to <= end && run.steps.iter().any(here)
                });
                let found = match known {
                    Some(read_to) if !goal.inclusive => {
                        Resolution::Stops(Stop { read_to, ..plain(StopKind::Before, lsn) })
                    }
                    _ => self.resolve_lsn(run, start.max(lsn), lsn, end, goal.inclusive).await?,
                };
                Ok(match found {
                    Resolution::Stops(stop) => Resolution::Stops(Stop {
                        xid: (lsn == moment.commit_lsn).then_some(moment.xid),
                        time: Some(moment.time),
                        ..stop
                    }),
                    Resolution::NotFound => Resolution::NotFound,
                })
            }
            Target::Time(_) | Target::Xid(_) | Target::Name(_) => {
                let mut parts = parts(run, start, &goal.target, goal.inclusive);
                if let Target::Xid(xid) = goal.target {
                    self.ask_where(std::iter::once(run), xid).await?;
                    let may = self.may_end.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    let fits = |part: &Part| match part {
                        Part::Segment(i) => {
                            run.steps.get(*i).and_then(|s| may.get(&s.entry.path)) != Some(&false)
                        }
                        Part::Straddler(_) => true,
                    };
                    parts.retain(fits);
                }
                let find =
                    |step: &Step<'_>, events: &Events| first_stop(events, start, step.usable_end, end, goal);
                let found = match goal.target {
                    Target::Xid(xid) => self.end_of(run, parts, xid, find).await?,
                    _ => self.first(run, parts, find).await?,
                };
                Ok(found.map_or(Resolution::NotFound, Resolution::Stops))
            }
        }
    }

    /// Where a transaction ends. Numbers are given out in order and transactions end in nearly that order, so the parts
    /// to read first are those whose transactions have numbers near this one. One that ran for long ends later than
    /// its neighbours: from there on the rest is read in both directions, the nearest first.
    async fn end_of(
        &self,
        run: &Run<'_>,
        parts: Vec<Part>,
        xid: Xid,
        find: impl Fn(&Step<'_>, &Events) -> Option<Stop>,
    ) -> Result<Option<Stop>, S::Error> {
        let (mut low, mut high) = (0, parts.len());
        while low < high {
            let middle = low.midpoint(high);
            let Some(part) = parts.get(middle) else { break };
            let (_, events) = self.part(&run.steps, *part).await?;
            // Those of two neighbours overlap; the guess need not be right.
            match events.xacts.iter().map(|x| x.xid).find(|x| !x.precedes(xid)) {
                None => low = middle.saturating_add(1),
                Some(_) => high = middle,
            }
        }
        let mut nearest: Vec<_> = parts.iter().copied().enumerate().collect();
        nearest.sort_by_key(|(i, _)| i.abs_diff(low));
        let nearest = nearest.into_iter().map(|(_, part)| part).collect();
        let Some(found) = self.first(run, nearest, &find).await? else { return Ok(None) };
        // A number comes again once all others were given out. Then the first one counts, which lies that far before.
        let reused = |part: &Part| {
            let (Part::Segment(i) | Part::Straddler(i)) = part;
            let step = run.steps.get(*i);
            step.is_some_and(|s| found.lsn.bytes_since(s.start()) >= XIDS_BYTES_MIN)
        };
        let earlier = self.first(run, parts.into_iter().filter(reused).collect(), &find).await?;
        Ok(Some(earlier.unwrap_or(found)))
    }

    async fn first<T>(
        &self,
        run: &Run<'_>,
        parts: Vec<Part>,
        find: impl Fn(&Step<'_>, &Events) -> Option<T>,
    ) -> Result<Option<T>, S::Error> {
        let read = futures_util::stream::iter(parts).map(|part| self.part(&run.steps, part));
        let mut read = std::pin::pin!(read.buffered(AT_ONCE));
        while let Some((Part::Segment(i) | Part::Straddler(i), events)) = read.try_next().await? {
            if let Some(found) = run.steps.get(i).and_then(|step| find(step, &events)) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    async fn resolve_lsn(
        &self,
        run: &Run<'_>,
        from: Lsn,
        target: Lsn,
        end: Lsn,
        inclusive: bool,
    ) -> Result<Resolution, S::Error> {
        if target > end {
            return Ok(Resolution::NotFound);
        }
        let holds = |s: &&Step<'_>| s.entry.info.name.end(s.entry.info.size).is_some_and(|e| e > from);
        let segments: Vec<_> = run.steps.iter().filter(holds).map(|s| s.entry).collect();
        let found = self.source.record_from(&segments, from).await?;
        let stop = match found.filter(|(_, record_end)| *record_end <= end) {
            Some((record, read_to)) => {
                let (kind, lsn) =
                    if inclusive { (StopKind::After, read_to) } else { (StopKind::Before, record) };
                Stop { kind, lsn, read_to, xid: None, time: None }
            }
            // Everything up to it is there and nothing follows.
            None => Stop { kind: StopKind::End, lsn: end, read_to: end, xid: None, time: None },
        };
        Ok(Resolution::Stops(stop))
    }

    /// The last commit that is there once replay has come to `stop`.
    pub(crate) async fn last_commit(&self, run: &Run<'_>, stop: Lsn) -> Result<Option<LastCommit>, S::Error> {
        let mut parts: Vec<_> = (0..run.steps.len())
            .filter(|i| {
                run.steps.get(*i).is_some_and(|s| s.entry.info.last_commit_time.is_some() && s.start() < stop)
            })
            .map(Part::Segment)
            .collect();
        parts.extend(straddlers(run).filter(
            |p| matches!(p, Part::Straddler(i) if run.steps.get(*i).is_some_and(|s| s.start() < stop)),
        ));
        parts.sort_by_key(|p| match p {
            Part::Segment(i) => (std::cmp::Reverse(*i), 1),
            Part::Straddler(i) => (std::cmp::Reverse(*i), 0),
        });
        self.first(run, parts, |step, events| {
            let done = |x: &&XactEnd| x.kind.is_commit() && x.end <= stop && x.start < step.usable_end;
            let last = events.xacts.iter().rev().find(done)?;
            Some(LastCommit { xid: last.xid, time: last.time, lsn: last.end })
        })
        .await
    }
}

impl<S: Source> Reading<'_, S> {
    /// What committed behind `stop`, as far as the run goes; `None` for nothing. Only the segments at both ends are
    /// looked into: of those between, the catalogue knows the number.
    pub(crate) async fn lost(&self, run: &Run<'_>, stop: Lsn) -> Result<Option<Lost>, S::Error> {
        let after = |part: &Part| {
            let (Part::Segment(i) | Part::Straddler(i)) = part;
            run.steps
                .get(*i)
                .is_some_and(|s| s.entry.info.name.end(s.entry.info.size).is_some_and(|e| e > stop))
        };
        let has_commits =
            |i: &usize| run.steps.get(*i).is_some_and(|s| s.entry.info.last_commit_time.is_some());
        let segments = (0..run.steps.len()).filter(has_commits).map(Part::Segment);
        let parts = in_order(segments.chain(straddlers(run)).filter(after).collect());
        let Some(end) = run.end() else { return Ok(None) };
        // One that runs over an edge may be in the later segment's index only, where its number does not count it.
        let brings = |i: usize| {
            let before = i.checked_sub(1).and_then(|i| run.steps.get(i));
            before.is_some_and(|b| b.entry.info.pending.is_some_and(|p| !p.joined))
        };
        let mut lost: Option<Lost> = None;
        for (number, part) in parts.iter().enumerate() {
            let (Part::Segment(i) | Part::Straddler(i)) = part;
            let Some(step) = run.steps.get(*i) else { continue };
            let whole = step.start() >= stop && step.usable_end >= step.entry.info.valid_end;
            // One record can be cut off by the run's end: of the last two segments one has the last that is not.
            let inner = lost.is_some() && number.saturating_add(2) < parts.len();
            if inner && whole && matches!(part, Part::Segment(_)) && !brings(*i) {
                lost = lost.map(|l| Lost {
                    transactions: l.transactions.saturating_add(step.entry.info.commits),
                    ..l
                });
                continue;
            }
            let (_, events) = self.part(&run.steps, *part).await?;
            let behind = |x: &&XactEnd| {
                x.kind.is_commit() && x.start >= stop && x.end <= end && x.start < step.usable_end
            };
            for commit in events.xacts.iter().filter(behind) {
                let known = lost.unwrap_or(Lost {
                    transactions: 0,
                    first_time: commit.time,
                    last_time: commit.time,
                    last_lsn: commit.end,
                });
                let begins = matches!(part, Part::Straddler(_)) || commit.start >= step.start() || brings(*i);
                let transactions = known.transactions.saturating_add(u64::from(begins));
                let last_time = if commit.end >= known.last_lsn { commit.time } else { known.last_time };
                let last_lsn = known.last_lsn.max(commit.end);
                lost = Some(Lost { transactions, last_time, last_lsn, ..known });
            }
        }
        Ok(lost)
    }
}

/// The parts of a run that can hold the target, in LSN order.
fn parts(run: &Run<'_>, start: Lsn, target: &Target, inclusive: bool) -> Vec<Part> {
    let matters = |entry: &SegmentEntry| match target {
        Target::Time(t) if inclusive => entry.info.max_time.is_some_and(|max| max > *t),
        Target::Time(t) => entry.info.max_time.is_some_and(|max| max >= *t),
        Target::Xid(_) => entry.info.max_time.is_some(),
        Target::Name(name) => entry.restore_points.contains(name),
        _ => false,
    };
    let after_start = |i: &usize| {
        let step = run.steps.get(*i);
        step.is_some_and(|s| s.entry.info.name.end(s.entry.info.size).is_some_and(|end| end > start))
    };
    let segments = (0..run.steps.len()).filter(after_start);
    let segments =
        segments.filter(|i| run.steps.get(*i).is_some_and(|s| matters(s.entry))).map(Part::Segment);
    in_order(segments.chain(straddlers(run)).collect())
}

/// The parts in the order of the log.
fn in_order(mut parts: Vec<Part>) -> Vec<Part> {
    parts.sort_by_key(|p| match p {
        Part::Segment(i) => (*i, 0),
        Part::Straddler(i) => (*i, 1),
    });
    parts
}

/// Records that run over an edge and were never put together.
fn straddlers<'a>(run: &'a Run<'_>) -> impl Iterator<Item = Part> + 'a {
    run.steps.windows(2).enumerate().filter_map(|(i, pair)| {
        let [before, after] = pair else { return None };
        let pending = before.entry.info.pending.filter(|p| !p.joined && p.start < before.usable_end)?;
        let open = !after.entry.info.head_joined && !after.entry.info.overwrites_contrecord;
        (open && pending.start < before.usable_end).then_some(Part::Straddler(i))
    })
}

/// The first event at which recovery stops, of those that start in `from..until` and are whole at `end`.
pub(crate) fn first_stop(events: &Events, from: Lsn, until: Lsn, end: Lsn, goal: &Goal) -> Option<Stop> {
    let here = |start: Lsn, record_end: Lsn| from <= start && start < until && record_end <= end;
    let stop = |x: &XactEnd, kind| {
        let lsn = if kind == StopKind::After { x.end } else { x.start };
        Stop { kind, lsn, read_to: x.end, xid: Some(x.xid), time: Some(x.time) }
    };
    let mut xacts = events.xacts.iter().filter(|x| here(x.start, x.end));
    match &goal.target {
        Target::Time(t) => {
            let past = |x: &&XactEnd| if goal.inclusive { x.time > *t } else { x.time >= *t };
            xacts.find(past).map(|x| stop(x, StopKind::Before))
        }
        Target::Xid(xid) => {
            let kind = if goal.inclusive { StopKind::After } else { StopKind::Before };
            xacts.find(|x| x.xid == *xid || x.subxacts.contains(xid)).map(|x| stop(x, kind))
        }
        Target::Name(name) => {
            let mut points = events.restore_points.iter();
            let (_, time, _, lsn) = points.find(|(n, _, start, end)| n == name && here(*start, *end))?;
            Some(Stop { kind: StopKind::After, lsn: *lsn, read_to: *lsn, xid: None, time: Some(*time) })
        }
        Target::Latest | Target::Immediate | Target::Lsn(_) | Target::Moment(_) => None,
    }
}
