//! The transactions in the archive, in the order of their commits, with what each did.
//!
//! Segments are read ahead on several threads and put together in order (`join`); what is read is decided from
//! the catalogue and the indexes alone (`windows`, `filter`).

mod fates;
mod filter;
mod join;
mod names;
mod transaction;
mod windows;

use std::ops::{ControlFlow, Range};

use futures_util::StreamExt as _;
use waltide_format::archive::{Catalog, Lineage, SegmentEntry, SegmentIndex, Step, Stretch};
use waltide_format::engines::postgres::detail::Telling;
use waltide_format::engines::postgres::wal::{Damage, PreviousTail};
use waltide_format::{Lsn, Oid, RelFileLocator};

use fates::{Evidence, Fates, fates};
use join::{Effects, Ended, Joiner};
use windows::{LookBack, Windows};

pub use filter::{DatabaseMatch, LogFilter, RelationMatch};
pub use names::{Names, Numbers, RelationName};
pub use transaction::{
    NamedDatabase, NamedRelation, Prepared, RelationCounts, RelationDone, TableFate, TableFateKind,
    Transaction,
};

/// Memory for segments that are being read, all threads together.
const SEGMENT_MEMORY_BYTES: u64 = 1 << 30;

/// What a segment tells once it is put to the one before.
#[derive(Debug, Default)]
pub struct Joined {
    /// What it tells.
    pub telling: Telling,
    /// Why it does not continue the segment before, where it should.
    pub torn: Option<Damage>,
}

/// Where the log reads what segments tell.
pub trait Tellings: Sync {
    /// What can go wrong.
    type Error: std::error::Error + Send + Sync + 'static;
    /// A segment read by itself.
    type Part: Send;

    /// Reads a segment by itself. Several are read at a time.
    fn read(&self, step: &Step<'_>) -> impl Future<Output = Result<Self::Part, Self::Error>> + Send;

    /// Puts it to what the segment before left, `None` where that is not known. Called in order.
    fn join(&self, part: Self::Part, tail: Option<PreviousTail>) -> Joined;

    /// A segment's index.
    fn segment_index(
        &self,
        entry: &SegmentEntry,
    ) -> impl Future<Output = Result<SegmentIndex, Self::Error>> + Send;

    /// Of steps, in their order, what is known without reading their segments: an index that says with which ends of
    /// transactions relations go and what happened to files, and nothing else. None of a step of which that is not known.
    fn drops(
        &self,
        steps: &[&Step<'_>],
    ) -> impl Future<Output = Result<Vec<Option<SegmentIndex>>, Self::Error>> + Send {
        let none = vec![None; steps.len()];
        async move { Ok(none) }
    }

    /// Whether an error is the archive's fault, so that the log goes on behind it.
    fn is_damage(&self, error: &Self::Error) -> bool;
}

/// Takes what the log tells, as it comes.
pub trait LogSink {
    /// A transaction. The log ends where this breaks.
    fn transaction(&mut self, transaction: Transaction) -> ControlFlow<()>;

    /// Something is missing here, in words.
    fn hole(&mut self, text: &str);
}

/// What to tell, and out of what.
#[derive(Debug)]
pub struct Log<'a, S> {
    /// The archive's content.
    pub catalog: &'a Catalog,
    /// Along which timelines.
    pub line: &'a Lineage,
    /// Which transactions.
    pub filter: &'a LogFilter,
    /// Where segments are read.
    pub source: &'a S,
    /// How many segments are read at a time.
    pub threads: usize,
}

/// How much was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LogSummary {
    /// Transactions.
    pub transactions: u64,
    /// Segments that were read for them.
    pub segments: u64,
    /// Places where something is missing.
    pub holes: u64,
}

/// The log's place while it goes on.
struct Course<'s, K> {
    sink: &'s mut K,
    joiner: Joiner,
    summary: LogSummary,
}

impl<K: LogSink> Course<'_, K> {
    fn hole(&mut self, text: &str) {
        self.summary.holes = self.summary.holes.saturating_add(1);
        self.joiner.broken();
        self.sink.hole(text);
    }
}

impl<S: Tellings> Log<'_, S> {
    /// Tells the transactions to `sink`, with what `names` knows.
    pub async fn run(&self, names: &mut impl Names, sink: &mut impl LogSink) -> Result<LogSummary, S::Error> {
        let mut course = Course { sink, joiner: Joiner::default(), summary: LogSummary::default() };
        let stretches = self.catalog.stretches(self.line);
        let mut told_up_to_hole = false;
        for (nth, stretch) in stretches.iter().enumerate() {
            let steps = &stretch.run.steps;
            let windows = self.windows(steps).await?;
            let last = windows.last().and_then(|w| steps.get(w.end.checked_sub(1)?));
            let until = last.map_or(Lsn::ZERO, |step| step.usable_end);
            for window in windows {
                if window.start > 0 || !told_up_to_hole {
                    course.joiner = Joiner::default();
                }
                told_up_to_hole = window.end == steps.len();
                let segments = steps.get(window).unwrap_or_default();
                if self.window(segments, until, names, &mut course).await?.is_break() {
                    return Ok(course.summary);
                }
            }
            if let Some(hole) = &stretch.hole
                && self.matters(stretch, stretches.get(nth.saturating_add(1)))
            {
                course.hole(&hole.to_string());
            }
        }
        Ok(course.summary)
    }

    /// Whether a wanted transaction can have ended in the hole between two stretches: not where one that ended before
    /// it is past the range already, nor where one that ended behind it is still before the range.
    fn matters(&self, before: &Stretch<'_>, after: Option<&Stretch<'_>>) -> bool {
        let last = before.run.steps.iter().rev().find_map(|s| s.entry.info.last_time);
        let first = after.and_then(|after| after.run.steps.iter().find_map(|s| s.entry.info.first_time));
        let too_late = self.filter.until.zip(last).is_some_and(|(until, last)| until < last);
        let too_early = self.filter.since.zip(first).is_some_and(|(since, first)| first < since);
        !too_late && !too_early
    }

    /// The segments that must be read.
    async fn windows(&self, steps: &[Step<'_>]) -> Result<Vec<Range<usize>>, S::Error> {
        let mut windows = Windows::default();
        let known = match self.filter.needs_drops_alone() {
            true => self.source.drops(&steps.iter().collect::<Vec<_>>()).await?,
            false => vec![None; steps.len()],
        };
        let candidates = steps.iter().zip(known).enumerate();
        let candidates = candidates.filter(|(_, (step, _))| self.filter.may_end_in(&step.entry.info));
        let judged =
            futures_util::stream::iter(candidates).map(|(nth, (step, known))| self.judged(nth, step, known));
        let mut candidates = std::pin::pin!(judged.buffered(self.at_once()));
        while let Some(candidate) = candidates.next().await {
            let (nth, Some(last)) = candidate? else { continue };
            let from =
                if windows.continues(nth) { nth } else { self.look_back(steps, nth, windows.end()).await? };
            windows.add(from, last.min(steps.len().saturating_sub(1)));
        }
        Ok(windows.into_ranges())
    }

    /// A segment, and the last one in which a wanted transaction may end because of it. `known` is what is known of its
    /// index, where that is enough.
    async fn judged(
        &self,
        nth: usize,
        step: &Step<'_>,
        known: Option<SegmentIndex>,
    ) -> Result<(usize, Option<usize>), S::Error> {
        if !self.filter.needs_index() {
            return Ok((nth, Some(nth)));
        }
        let index = match known {
            Some(known) => Ok(known),
            None => self.source.segment_index(step.entry).await,
        };
        match index {
            Ok(index) if self.filter.may_end_soon(&index) => Ok((nth, Some(nth.saturating_add(1)))),
            Ok(index) => Ok((nth, self.filter.may_end_by(&index).then_some(nth))),
            Err(e) if self.source.is_damage(&e) => Ok((nth, Some(nth))),
            Err(e) => Err(e),
        }
    }

    /// The segment in which everything begins that may end in segment `nth`, no further back than `no_further`.
    async fn look_back(&self, steps: &[Step<'_>], nth: usize, no_further: usize) -> Result<usize, S::Error> {
        let mut search = LookBack::default();
        for (earlier, step) in steps.iter().enumerate().take(nth).skip(no_further).rev() {
            match self.source.segment_index(step.entry).await {
                Ok(index) if search.reaches(&index) => return Ok(earlier),
                Ok(_) => {}
                // Whatever lies before it is of no use without it.
                Err(e) if self.source.is_damage(&e) => return Ok(earlier),
                Err(e) => return Err(e),
            }
        }
        Ok(no_further)
    }

    fn at_once(&self) -> usize {
        let each = self.catalog.system.segment_size.bytes().saturating_mul(3);
        let room = SEGMENT_MEMORY_BYTES.checked_div(each).unwrap_or(1);
        self.threads.clamp(1, usize::try_from(room).unwrap_or(1).max(1))
    }

    /// Tells the transactions that end in segments that follow one another.
    async fn window(
        &self,
        steps: &[Step<'_>],
        until: Lsn,
        names: &mut impl Names,
        course: &mut Course<'_, impl LogSink>,
    ) -> Result<ControlFlow<()>, S::Error> {
        let parts = futures_util::stream::iter(steps).map(|step| self.source.read(step));
        let mut parts = std::pin::pin!(parts.buffered(self.at_once()));
        let mut tail = None;
        for step in steps {
            let Some(part) = parts.next().await else { break };
            let name = step.entry.info.name;
            let Joined { mut telling, torn } = match part {
                Ok(part) => self.source.join(part, tail.take()),
                Err(e) if self.source.is_damage(&e) => {
                    course.hole(&said(&e));
                    continue;
                }
                Err(e) => return Err(e),
            };
            course.summary.segments = course.summary.segments.saturating_add(1);
            if let Some(torn) = torn {
                course.hole(&format!("{name} does not continue the segment before: {torn}"));
            }
            names.come_to(step.start(), until).await;
            tail = telling.tail.take();
            let damage = telling.damage.take();
            for ended in course.joiner.add(telling) {
                if !self.filter.wants(&ended) || !self.filter.may_take_files(&ended) {
                    continue;
                }
                let transaction = self.transaction(ended, names);
                if self.filter.takes(&transaction) {
                    course.summary.transactions = course.summary.transactions.saturating_add(1);
                    if course.sink.transaction(transaction).is_break() {
                        return Ok(ControlFlow::Break(()));
                    }
                }
            }
            if let Some(damage) = damage {
                course.hole(&format!("the WAL of {name} is damaged: {damage}"));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn transaction(&self, ended: Ended, names: &impl Names) -> Transaction {
        let Ended { end, top, prepared, complete, work, effects } = ended;
        let name = |file: RelFileLocator| names.relation(file, end.start);
        let made: Vec<_> = effects.made.iter().map(|(_, file)| *file).collect();
        let evidence = Evidence {
            gone: &end.dropped,
            made: &made,
            relations: &work.relations,
            emptied: &effects.emptied,
            truncate_logged: !effects.truncates.is_empty(),
        };
        let judged = match end.kind.is_commit() {
            true => fates(&evidence, |file| name(file).map(|name| name.oid), names.events(end.start)),
            // What it had made went again, and nothing else.
            false => Fates::default(),
        };
        let named = |files: Vec<RelFileLocator>| -> Vec<NamedRelation> {
            files.into_iter().map(|relation| NamedRelation { relation, name: name(relation) }).collect()
        };
        let done = |work| {
            let work = RelationCounts::from(work);
            RelationDone { name: name(work.relation), work }
        };
        let database_name = |oid: Oid| names.database(oid, end.start);
        // A database that moves to another tablespace is made there and dropped here.
        let databases = |these: &[Oid], others: &[Oid]| -> Vec<NamedDatabase> {
            let here = these.iter().filter(|oid| end.kind.is_commit() && !others.contains(oid));
            here.map(|oid| NamedDatabase { oid: *oid, name: database_name(*oid) }).collect()
        };
        let Effects { created_databases, dropped_databases, .. } = &effects;
        Transaction {
            xid: end.xid,
            top,
            kind: end.kind,
            time: end.time,
            prepared,
            timeline: self.line.timeline_at(end.start),
            database: end.db_oid,
            database_name: end.db_oid.and_then(database_name),
            start_lsn: work.first.min(end.start),
            commit_lsn: end.start,
            end_lsn: end.end,
            volume: work.volume,
            complete,
            relations: work.relations.iter().map(done).collect(),
            tables: names.events(end.start).iter().map(TableFate::from).collect(),
            created_databases: databases(created_databases, dropped_databases),
            dropped_databases: databases(dropped_databases, created_databases),
            created: named(judged.created),
            dropped: named(judged.dropped),
            truncated: named(judged.truncated),
            rewritten: named(judged.rewritten),
            subxacts: end.subxacts,
            gid: end.gid,
        }
    }
}

/// An error with what is behind it, on one line.
fn said(error: &dyn std::error::Error) -> String {
    let first = error.to_string();
    let mut text = first.lines().next().unwrap_or_default().to_owned();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
