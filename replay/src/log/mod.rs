//! The transactions in the archive, in the order of their commits, with what each did.
//!
//! Segments are read ahead on several threads and put together in order (`join`); what is read is decided from
//! the catalogue and the indexes alone (`windows`, `filter`, `signs`).

mod fates;
mod filter;
mod join;
mod names;
mod signs;
mod transaction;
mod windows;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{ControlFlow, Range};

use futures_util::StreamExt as _;
use waltide_format::archive::{Catalog, Lineage, MERGE_STEPS, SegmentEntry, SegmentIndex, Step, Stretch};
use waltide_format::engines::postgres::detail::Telling;
use waltide_format::engines::postgres::wal::{Damage, PreviousTail};
use waltide_format::{Lsn, Oid, RelFileLocator};

use fates::{Evidence, Fates, fates};
use join::{Effects, Ended, Joiner};
use signs::{CLAIMED_WITHIN, Criterion, Sign};
use windows::{LookAhead, LookBack, Windows};

pub use filter::{DatabaseMatch, LogFilter, RelationMatch};
pub use names::{Names, Numbers, RelationName};
pub use signs::{Known, Meant, Question, WantedRelations};
pub use transaction::{
    NamedDatabase, NamedRelation, Prepared, RelationCounts, RelationDone, TableFate, TableFateKind,
    Transaction,
};

/// Memory for segments that are being read, all threads together.
const SEGMENT_MEMORY_BYTES: u64 = 1 << 30;

/// How many segments a merged index of the first step covers, and one of the last.
const FIRST_STEP: u64 = {
    let [first, ..] = MERGE_STEPS;
    first
};
const LAST_STEP: u64 = {
    let [.., last] = MERGE_STEPS;
    last
};

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

    /// Whether merged indexes tell of enough of these steps that it is worth asking them.
    fn has_merged(&self, _steps: &[&Step<'_>]) -> impl Future<Output = Result<bool, Self::Error>> + Send {
        async { Ok(false) }
    }

    /// Of steps, in their order, what is known without reading their segments. None of a step of which that is not known.
    fn known(
        &self,
        steps: &[&Step<'_>],
        _question: &Question,
    ) -> impl Future<Output = Result<Vec<Option<Known>>, Self::Error>> + Send {
        let none = vec![None; steps.len()];
        async move { Ok(none) }
    }

    /// Of steps, in their order, what is known of which transactions ran, and of the files made, without reading their
    /// segments.
    fn horizons(
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

/// What segments say of which transactions ran, as far as it was asked.
struct Horizons<'s> {
    steps: &'s [Step<'s>],
    /// Nothing of one that is damaged.
    known: BTreeMap<usize, Option<SegmentIndex>>,
    /// Where those begin of which merged indexes were asked.
    asked: BTreeSet<usize>,
}

impl<'s> Horizons<'s> {
    const fn new(steps: &'s [Step<'s>]) -> Self {
        Self { steps, known: BTreeMap::new(), asked: BTreeSet::new() }
    }

    /// This segment and those around it that one merged index of a step would tell of.
    fn together(&self, nth: usize, of_step: u64) -> Range<usize> {
        let group = |place: usize| {
            let step = self.steps.get(place)?;
            let number = step.start().get().checked_div(step.entry.info.size.bytes())?;
            Some((step.entry.info.name.timeline(), number.checked_div(of_step)?))
        };
        let ours = |place: &usize| group(*place) == group(nth);
        let before = (0..nth).rev().take_while(ours).count();
        let behind = (nth..self.steps.len()).take_while(ours).count();
        nth.saturating_sub(before)..nth.saturating_add(behind)
    }
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
            let windows = self.windows(steps, names).await?;
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
    async fn windows(
        &self,
        steps: &[Step<'_>],
        names: &mut impl Names,
    ) -> Result<Vec<Range<usize>>, S::Error> {
        let mut windows = Windows::default();
        let mut horizons = Horizons::new(steps);
        let may_end = self.may_end(&mut horizons, names).await?;
        for (nth, _) in may_end.into_iter().enumerate().filter(|(_, may)| *may) {
            let from = match windows.continues(nth) {
                true => nth,
                false => self.look_back(&mut horizons, nth, windows.end()).await?,
            };
            windows.add(from, nth);
            // Nothing before it is looked at again.
            horizons.known = horizons.known.split_off(&nth);
        }
        Ok(windows.into_ranges())
    }

    /// Of each segment whether a wanted transaction may end in it.
    async fn may_end(
        &self,
        horizons: &mut Horizons<'_>,
        names: &mut impl Names,
    ) -> Result<Vec<bool>, S::Error> {
        let (filter, steps) = (self.filter, horizons.steps);
        let in_time: Vec<_> = steps.iter().map(|step| filter.may_end_in(&step.entry.info)).collect();
        let all = || if filter.is_narrow() { in_time.clone() } else { vec![true; steps.len()] };
        let places = in_time.iter().enumerate().filter(|(_, may)| **may).map(|(nth, _)| nth);
        let (Some(first), Some(last)) = (places.clone().min(), places.max()) else { return Ok(all()) };
        // Names are followed as far as they would be without this.
        let criteria = self.criteria(steps.get(..=last).unwrap_or_default(), names).await?;
        if criteria.is_empty() {
            return Ok(all());
        }
        let looks_at_work = criteria.iter().any(|criterion| criterion.looks_at_work(filter));
        // What ends in the range began no earlier than this.
        let from = match looks_at_work && filter.since.is_some() {
            true => self.look_back(horizons, first, 0).await?,
            false => 0,
        };
        let wanted = |nth: usize| match looks_at_work {
            true => (from..=last).contains(&nth),
            false => in_time.get(nth) == Some(&true),
        };
        let question = Question::of(&criteria);
        let mut found = vec![vec![Sign::default(); steps.len()]; criteria.len()];
        // Some at a time, so that memory does not grow with the archive.
        let mut next = 0usize;
        while next < steps.len() {
            let together = next..Horizons::new(steps).together(next, LAST_STEP).end;
            next = together.end;
            if !together.clone().any(wanted) {
                continue;
            }
            let asked: Vec<_> = steps.get(together.clone()).unwrap_or_default().iter().collect();
            let known = self.source.known(&asked, &question).await?;
            let asked = together.zip(asked.into_iter().zip(known)).filter(|(nth, _)| wanted(*nth));
            let asked = asked.map(|(nth, (step, known))| self.signs(nth, step, known, &criteria));
            let mut asked = std::pin::pin!(futures_util::stream::iter(asked).buffered(self.at_once()));
            while let Some(signs) = asked.next().await {
                let (nth, signs) = signs?;
                for (found, sign) in found.iter_mut().zip(signs) {
                    if let Some(found) = found.get_mut(nth) {
                        *found = sign;
                    }
                }
            }
        }
        let mut may_end = in_time.clone();
        for signs in found {
            let places = self.ends(horizons, last, &signs).await?;
            for (may, also) in may_end.iter_mut().zip(places) {
                *may &= also;
            }
        }
        Ok(may_end)
    }

    /// What is asked for that indexes tell; nothing where they do not spare more than it takes to ask them.
    async fn criteria(&self, steps: &[Step<'_>], names: &mut impl Names) -> Result<Vec<Criterion>, S::Error> {
        let filter = self.filter;
        let (Some(first), Some(last)) = (steps.first(), steps.last()) else { return Ok(Vec::new()) };
        let needs_meaning = filter.relation.is_some() || filter.database.is_some();
        if !needs_meaning && !filter.needs_index() && !filter.truncated {
            return Ok(Vec::new());
        }
        let all: Vec<_> = steps.iter().collect();
        // What is meant is found by following names.
        let has_merged = self.source.has_merged(&all).await?;
        let meant = match needs_meaning && has_merged {
            true => names.meant(filter, first.start(), last.usable_end).await,
            false => None,
        };
        match has_merged || filter.needs_index() {
            true => Ok(filter.criteria(meant.as_ref())),
            false => Ok(Vec::new()),
        }
    }

    /// What a segment shows of each thing that is asked for, by what is known of it, else by its index.
    async fn signs(
        &self,
        nth: usize,
        step: &Step<'_>,
        known: Option<Known>,
        criteria: &[Criterion],
    ) -> Result<(usize, Vec<Sign>), S::Error> {
        let asks_for_xid = criteria.iter().any(|criterion| matches!(criterion, Criterion::Xid(_)));
        let index = match known {
            // A range of numbers is not yet the number.
            Some(known) if !asks_for_xid || !known.may_end => Ok(known.index),
            _ => self.source.segment_index(step.entry).await,
        };
        match index {
            Ok(index) => Ok((nth, criteria.iter().map(|c| c.sign(self.filter, &index)).collect())),
            Err(e) if self.source.is_damage(&e) => {
                Ok((nth, criteria.iter().map(|c| c.any(self.filter)).collect()))
            }
            Err(e) => Err(e),
        }
    }

    /// Of each segment up to `last` whether a transaction may end in it that left these signs.
    async fn ends(
        &self,
        horizons: &mut Horizons<'_>,
        last: usize,
        signs: &[Sign],
    ) -> Result<Vec<bool>, S::Error> {
        let mut ends: Vec<_> = signs.iter().map(|sign| sign.end).collect();
        let mut mark = |from: usize, to: usize| {
            ends.iter_mut().take(to.saturating_add(1)).skip(from).for_each(|end| *end = true)
        };
        // Where others wrote who may end later, it need not be known when those before them have ended.
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for (nth, sign) in signs.iter().enumerate() {
            if !sign.work {
                continue;
            }
            let to = if sign.unclaimed { nth.saturating_add(CLAIMED_WITHIN) } else { nth };
            match runs.last_mut() {
                Some((_, end)) if nth <= end.saturating_add(1) => *end = to.max(*end),
                _ => runs.push((nth, to)),
            }
        }
        let nexts = runs.iter().skip(1).map(|(next, _)| *next).chain([last.saturating_add(1)]);
        for ((from, to), next) in runs.iter().zip(nexts) {
            mark(*from, self.look_ahead(horizons, *to, next).await?);
        }
        Ok(ends)
    }

    /// The segment in which the last of those ends, at the latest, that wrote up to the end of segment `nth`; no later than
    /// `no_later`.
    async fn look_ahead(
        &self,
        horizons: &mut Horizons<'_>,
        nth: usize,
        no_later: usize,
    ) -> Result<usize, S::Error> {
        let mut search = LookAhead::default();
        for later in nth.saturating_add(1)..no_later.min(horizons.steps.len()) {
            if self.horizon(horizons, later).await?.is_some_and(|index| search.reaches(index)) {
                return Ok(later);
            }
        }
        Ok(no_later)
    }

    /// The segment in which everything begins that may end in segment `nth`, no further back than `no_further`.
    async fn look_back(
        &self,
        horizons: &mut Horizons<'_>,
        nth: usize,
        no_further: usize,
    ) -> Result<usize, S::Error> {
        let mut search = LookBack::default();
        for earlier in (no_further..nth).rev() {
            match self.horizon(horizons, earlier).await? {
                Some(index) if search.reaches(index) => {
                    return self.claimed(horizons, earlier, no_further).await;
                }
                Some(_) => {}
                // Whatever lies before it is of no use without it.
                None => return Ok(earlier),
            }
        }
        Ok(no_further)
    }

    /// The first of this segment and those just before it in which a file was made by a transaction without a number yet,
    /// or else this one.
    async fn claimed(
        &self,
        horizons: &mut Horizons<'_>,
        nth: usize,
        no_further: usize,
    ) -> Result<usize, S::Error> {
        for earlier in nth.saturating_sub(CLAIMED_WITHIN).max(no_further)..nth {
            if self.horizon(horizons, earlier).await?.is_some_and(signs::makes_unclaimed) {
                return Ok(earlier);
            }
        }
        Ok(nth)
    }

    /// What a segment says of which transactions ran; none where it is damaged. Its neighbours are asked with it where one
    /// merged index tells of all.
    async fn horizon<'h>(
        &self,
        horizons: &'h mut Horizons<'_>,
        nth: usize,
    ) -> Result<Option<&'h SegmentIndex>, S::Error> {
        if !horizons.known.contains_key(&nth) {
            let together = horizons.together(nth, FIRST_STEP);
            if horizons.asked.insert(together.start) {
                let steps: Vec<_> = horizons.steps.get(together.clone()).unwrap_or_default().iter().collect();
                for (place, index) in together.zip(self.source.horizons(&steps).await?) {
                    if let Some(index) = index {
                        horizons.known.insert(place, Some(index));
                    }
                }
            }
        }
        if !horizons.known.contains_key(&nth)
            && let Some(step) = horizons.steps.get(nth)
        {
            let index = match self.source.segment_index(step.entry).await {
                Ok(index) => Some(index),
                Err(e) if self.source.is_damage(&e) => None,
                Err(e) => return Err(e),
            };
            horizons.known.insert(nth, index);
        }
        Ok(horizons.known.get(&nth).and_then(Option::as_ref))
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

#[cfg(test)]
mod tests;
