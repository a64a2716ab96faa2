//! Collects a segment's index while its records go by.

use foldhash::{HashMap, HashMapExt as _};

use super::state_builder::StateBuilder;
use crate::archive::{
    AdmittedFault, CheckpointInfo, CheckpointKind, FileEvent, ForkBlocks, IndexedBlock, RestorePoint,
    RmgrCount, RunningXacts, SegmentIndex, SegmentInfo, TimelineEnd, XactEnd,
};
use crate::engines::postgres::effects::{checkpoint, file_event, running_xacts, xact_end};
use crate::engines::postgres::wal::{Record, Rmgr, SegmentSpan, XlogRecord, implicit_vm_blocks};
use crate::error::Corrupt;
use crate::ids::{BlockNumber, ForkNumber, Lsn, RelFileLocator};

/// Counts of one resource manager.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    records: u64,
    record_bytes: u64,
    image_bytes: u64,
}

/// What is known of a block so far.
#[derive(Debug, Clone, Copy, Default)]
struct Touched {
    last_image: Option<Lsn>,
    records_after: u32,
}

/// The blocks of one fork.
#[derive(Debug)]
struct Fork {
    relation: RelFileLocator,
    fork: ForkNumber,
    blocks: HashMap<BlockNumber, Touched>,
}

/// Collects a segment's index while its records go by.
#[derive(Debug)]
pub(super) struct IndexBuilder {
    span: SegmentSpan,
    first: Option<(Lsn, Lsn)>,
    last: Option<Lsn>,
    counts: Vec<Counts>,
    forks: Vec<Fork>,
    by_fork: HashMap<(RelFileLocator, ForkNumber), usize>,
    /// The fork that the last record touched; most often the next one does too.
    recent: [usize; 2],
    xacts: Vec<XactEnd>,
    restore_points: Vec<RestorePoint>,
    checkpoints: Vec<CheckpointInfo>,
    timeline_ends: Vec<TimelineEnd>,
    running_xacts: Vec<RunningXacts>,
    file_events: Vec<FileEvent>,
    state: StateBuilder,
    not_understood: Vec<AdmittedFault>,
}

impl IndexBuilder {
    pub(super) fn new(span: SegmentSpan) -> Self {
        Self {
            span,
            first: None,
            last: None,
            counts: vec![Counts::default(); 256],
            forks: Vec::new(),
            by_fork: HashMap::new(),
            recent: [0; 2],
            xacts: Vec::new(),
            restore_points: Vec::new(),
            checkpoints: Vec::new(),
            timeline_ends: Vec::new(),
            running_xacts: Vec::new(),
            file_events: Vec::new(),
            state: StateBuilder::default(),
            not_understood: Vec::new(),
        }
    }

    /// Start and `xl_prev` of the first whole record that begins here.
    pub(super) const fn first_record(&self) -> Option<(Lsn, Lsn)> {
        self.first
    }

    /// Start of the last whole record that begins here.
    pub(super) const fn last_record(&self) -> Option<Lsn> {
        self.last
    }

    /// Takes a record in. One that began in the segment before and was joined here is indexed too, so that it
    /// is in some index even if this segment was not yet there when the other was archived; it is counted only
    /// where it begins.
    pub(super) fn add(&mut self, record: &Record<'_>) {
        if record.start >= self.span.start() {
            self.first.get_or_insert((record.start, record.header.prev));
            self.last = Some(record.start);
            let image_bytes = record.image_bytes();
            if let Some(counts) = self.counts.get_mut(usize::from(record.rmgr().get())) {
                let total = u64::from(record.header.total_bytes);
                counts.records = counts.records.saturating_add(1);
                counts.record_bytes =
                    counts.record_bytes.saturating_add(total.saturating_sub(u64::from(image_bytes)));
                counts.image_bytes = counts.image_bytes.saturating_add(u64::from(image_bytes));
            }
        }
        self.state.add(record, record.start < self.span.start());
        for block in record.blocks() {
            self.touch(record.start, block.relation, block.fork, block.block, block.makes_page_anew());
        }
        match record.rmgr() {
            Rmgr::HEAP | Rmgr::HEAP2 => {
                for (relation, block) in implicit_vm_blocks(record) {
                    self.touch(record.start, relation, ForkNumber::Vm, block, false);
                }
            }
            Rmgr::XACT
            | Rmgr::XLOG
            | Rmgr::SMGR
            | Rmgr::STANDBY
            | Rmgr::DBASE
            | Rmgr::TBLSPC
            | Rmgr::RELMAP => {
                if let Err(corrupt) = self.add_effects(record) {
                    // Its CRC is right, so this is what PostgreSQL wrote, and a gap in what we know of it. That
                    // must be seen, but it is no reason to stop an archiver.
                    let message =
                        format!("the {} record at {} cannot be read: {corrupt}", record.rmgr(), record.start);
                    self.not_understood.push(AdmittedFault { at: record.start, message });
                }
            }
            _ => {}
        }
    }

    fn add_effects(&mut self, record: &Record<'_>) -> Result<(), Corrupt> {
        if let Some(end) = xact_end(record) {
            self.xacts.push(end?);
        } else if let Some(xlog) = XlogRecord::decode(record) {
            self.add_xlog(record, xlog?);
        } else if let Some(running) = running_xacts(record) {
            self.running_xacts.push(running?);
        } else if let Some(event) = file_event(record)? {
            self.file_events.push(event);
        }
        Ok(())
    }

    fn add_xlog(&mut self, record: &Record<'_>, xlog: XlogRecord) {
        match xlog {
            XlogRecord::CheckpointShutdown(c) => {
                // A recovery that ends with a checkpoint has no end-of-recovery record.
                if c.timeline != c.previous_timeline {
                    self.timeline_ends.push(TimelineEnd {
                        start: record.start,
                        timeline: c.timeline,
                        previous_timeline: c.previous_timeline,
                        time: c.time(),
                    });
                }
                self.checkpoints.push(checkpoint(record, CheckpointKind::Shutdown, &c));
            }
            XlogRecord::CheckpointOnline(c) => {
                self.checkpoints.push(checkpoint(record, CheckpointKind::Online, &c));
            }
            XlogRecord::EndOfRecovery(e) => self.timeline_ends.push(TimelineEnd {
                start: record.start,
                timeline: e.timeline,
                previous_timeline: e.previous_timeline,
                time: e.time,
            }),
            XlogRecord::RestorePoint(p) => self.restore_points.push(RestorePoint {
                name: p.name,
                time: p.time,
                start: record.start,
                end: record.end,
            }),
            _ => {}
        }
    }

    fn touch(
        &mut self,
        start: Lsn,
        relation: RelFileLocator,
        fork: ForkNumber,
        block: BlockNumber,
        anew: bool,
    ) {
        let index = self.fork_index(relation, fork);
        let Some(fork) = self.forks.get_mut(index) else { return };
        let touched = fork.blocks.entry(block).or_default();
        // The index places images within the segment; one that began before it only counts as a change.
        if anew && start >= self.span.start() {
            *touched = Touched { last_image: Some(start), records_after: 0 };
        } else {
            touched.records_after = touched.records_after.saturating_add(1);
        }
    }

    fn fork_index(&mut self, relation: RelFileLocator, fork: ForkNumber) -> usize {
        let [first, second] = self.recent;
        let is =
            |index: usize| self.forks.get(index).is_some_and(|f| f.relation == relation && f.fork == fork);
        if is(first) {
            return first;
        }
        if is(second) {
            self.recent = [second, first];
            return second;
        }
        let next = self.forks.len();
        let index = *self.by_fork.entry((relation, fork)).or_insert(next);
        if index == next {
            self.forks.push(Fork { relation, fork, blocks: HashMap::new() });
        }
        self.recent = [index, first];
        index
    }

    /// Fills in what the segment's info says of its records. `pending` is whether one more begins here than
    /// was read.
    pub(super) fn fill(&self, info: &mut SegmentInfo, pending: bool) {
        let total = |of: fn(&Counts) -> u64| self.counts.iter().map(of).fold(0, u64::saturating_add);
        info.records = total(|c| c.records).saturating_add(u64::from(pending));
        info.image_bytes = total(|c| c.image_bytes);
        let ends = || self.xacts.iter().filter(|x| x.kind.is_end());
        info.first_time = ends().map(|x| x.time).next();
        info.last_time = ends().next_back().map(|x| x.time);
        info.min_time = ends().map(|x| x.time).min();
        info.max_time = ends().map(|x| x.time).max();
        let commits = || ends().filter(|x| x.kind.is_commit());
        info.last_commit_time = commits().next_back().map(|x| x.time);
        info.commits = commits().filter(|x| x.start >= self.span.start()).count() as u64;
    }

    /// Hands over everything that was collected.
    pub(super) fn finish(self, index: &mut SegmentIndex) {
        let mut blocks: Vec<_> = self.forks.into_iter().map(Fork::into_blocks).collect();
        blocks.sort_unstable_by_key(|f| (f.relation, f.fork));
        index.blocks = blocks;
        index.xacts = self.xacts;
        index.restore_points = self.restore_points;
        index.checkpoints = self.checkpoints;
        index.timeline_ends = self.timeline_ends;
        index.running_xacts = self.running_xacts;
        index.file_events = self.file_events;
        index.state = self.state.finish();
        index.faults = self.not_understood;
        let counted = (0u8..=255).zip(self.counts).filter(|(_, c)| c.records > 0);
        index.rmgrs = counted
            .map(|(rmid, c)| RmgrCount {
                rmid,
                records: c.records,
                record_bytes: c.record_bytes,
                image_bytes: c.image_bytes,
            })
            .collect();
    }
}

impl Fork {
    fn into_blocks(self) -> ForkBlocks {
        let block = |(block, t): (BlockNumber, Touched)| IndexedBlock {
            block,
            last_image: t.last_image,
            records_after: t.records_after,
        };
        let mut blocks: Vec<_> = self.blocks.into_iter().map(block).collect();
        blocks.sort_unstable_by_key(|b| b.block);
        ForkBlocks { relation: self.relation, fork: self.fork, blocks }
    }
}
