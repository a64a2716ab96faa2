//! The merge itself: indexes of consecutive segments in, one that says the same of all of them out.

use std::collections::BTreeMap;

use crate::archive::catalog::SegmentEntry;
use crate::archive::chain::ChainLink;
use crate::archive::index::{ForkBlocks, IndexedBlock, RmgrCount, SegmentIndex, SegmentInfo, XactEnd};
use crate::archive::layout::WalObject;
use crate::archive::source::PushSource;
use crate::ids::{BlockNumber, ForkNumber, Lsn, RelFileLocator, Xid};
use crate::segment::WalFileName;

use super::names::NamesLog;

/// Consecutive segments of one timeline, and what their indexes say together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MergedIndex {
    /// The segments, in order.
    pub segments: Vec<MergedSegment>,
    /// The lists of all of them, in LSN order; its `info` is the first segment's. Without transactions' ends, blocks and
    /// counts where [`MergedIndex::is_reduced`].
    pub all: SegmentIndex,
    /// The ends of transactions with which relations go, in LSN order.
    pub drops: Vec<XactEnd>,
    /// Which segments touch a relation, by relation.
    pub relations: Vec<RelationSegments>,
    /// The blocks touched, by relation and fork, where [`MergedIndex::is_reduced`].
    pub touched: Vec<TouchedFork>,
    /// What they say about names; none where that was not read, or is too much.
    pub names: Option<NamesLog>,
    /// Whether what is bulky was left out, as in all steps but the first.
    pub is_reduced: bool,
}

/// A segment in a merged index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MergedSegment {
    /// What its own index says first.
    pub info: SegmentInfo,
    /// Whether the copy is one that was stored beside a shorter one.
    pub is_longer_copy: bool,
    /// The stored object's length.
    pub stored_bytes: u64,
    /// SHA-256 over its WAL.
    pub digest: [u8; 32],
    /// Who pushed it, where its index says so.
    pub pushed_by: Option<PushSource>,
    /// The least and the greatest number of the transactions that end here, subtransactions included.
    pub xids: Option<(u32, u32)>,
}

impl MergedSegment {
    /// What it puts into the chain.
    pub const fn link(&self) -> ChainLink {
        ChainLink { name: self.info.name, digest: self.digest, valid_end: self.info.valid_end }
    }

    /// The object it was made from, by name.
    pub const fn object(&self) -> WalObject {
        let of = WalFileName::Segment(self.info.name);
        match self.is_longer_copy {
            true => WalObject::Longer { of, valid_end: self.info.valid_end },
            false => WalObject::File(of),
        }
    }

    /// Whether it was made from this stored copy, as far as that says of itself.
    pub fn is_of(&self, entry: &SegmentEntry) -> bool {
        ChainLink::of(entry) == Some(self.link())
    }

    /// Whether the end of this transaction may be here.
    pub fn may_end(&self, xid: Xid) -> bool {
        self.xids.is_some_and(|(least, greatest)| (least..=greatest).contains(&xid.get()))
    }
}

/// The segments that touch a relation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelationSegments {
    /// The relation.
    pub relation: RelFileLocator,
    /// The segments by their place in [`MergedIndex::segments`]: the first of a run and how many it has, in order.
    pub segments: Vec<(u32, u32)>,
}

/// The blocks of one fork that some record touches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TouchedFork {
    /// The relation.
    pub relation: RelFileLocator,
    /// The fork.
    pub fork: ForkNumber,
    /// First block and how many follow it without a gap, it included; in order, never adjoining.
    pub runs: Vec<(BlockNumber, u32)>,
}

impl MergedIndex {
    /// A segment's index, and what the segment says about names, as a merged one of a single segment.
    pub fn of_segment(
        mut index: SegmentIndex,
        stored_bytes: u64,
        digest: [u8; 32],
        is_longer_copy: bool,
        names: Option<NamesLog>,
    ) -> Self {
        let ended = index.xacts.iter().filter(|x| x.kind.is_end());
        let xids = ended.flat_map(|x| std::iter::once(&x.xid).chain(&x.subxacts)).map(|xid| xid.get());
        let xids = xids.fold(None, |range: Option<(u32, u32)>, xid| {
            Some(range.map_or((xid, xid), |(least, greatest)| (least.min(xid), greatest.max(xid))))
        });
        let mut relations: Vec<_> = index.blocks.iter().map(|b| b.relation).collect();
        relations.sort_unstable();
        relations.dedup();
        Self {
            segments: vec![MergedSegment {
                info: index.info.clone(),
                is_longer_copy,
                stored_bytes,
                digest,
                pushed_by: index.pushed_by.take(),
                xids,
            }],
            drops: index.xacts.iter().filter(|x| x.kind.is_end() && !x.dropped.is_empty()).cloned().collect(),
            relations: relations
                .into_iter()
                .map(|relation| RelationSegments { relation, segments: vec![(0, 1)] })
                .collect(),
            // Of use only to one who has the segment at hand.
            all: SegmentIndex { state: None, ..index },
            touched: Vec::new(),
            names: names.filter(NamesLog::is_storable),
            is_reduced: false,
        }
    }

    /// One index of several that follow one another. None where they do not, or there are none, or only some were reduced.
    pub fn merge(parts: impl IntoIterator<Item = Self>) -> Option<Self> {
        let mut parts = parts.into_iter();
        let mut merged = parts.next()?;
        // Kept by relation while parts come, as lists again at the end.
        let mut blocks = BlockUnion::default();
        let mut touched = RunUnion::default();
        let mut relations: BTreeMap<RelFileLocator, Vec<(u32, u32)>> = BTreeMap::new();
        let mut rmgrs: BTreeMap<u8, RmgrCount> = BTreeMap::new();
        blocks.add(std::mem::take(&mut merged.all.blocks));
        touched.add(std::mem::take(&mut merged.touched));
        add_relations(&mut relations, std::mem::take(&mut merged.relations), 0);
        add_counts(&mut rmgrs, &std::mem::take(&mut merged.all.rmgrs));
        for part in parts {
            let size = merged.all.info.size;
            let last = merged.segments.last()?.info.name;
            let first = part.segments.first()?;
            if last.next(size) != Some(first.info.name)
                || first.info.size != size
                || part.is_reduced != merged.is_reduced
            {
                return None;
            }
            let edge = first.info.name.start(size)?;
            let names = merged.names.take().zip(part.names).and_then(|(a, b)| a.then(b, &first.info));
            merged.names = names.filter(NamesLog::is_storable);
            let offset = u32::try_from(merged.segments.len()).ok()?;
            let (all, other) = (&mut merged.all, part.all);
            append(&mut all.xacts, other.xacts, edge, |x| x.start);
            append(&mut all.restore_points, other.restore_points, edge, |p| p.start);
            append(&mut all.checkpoints, other.checkpoints, edge, |c| c.start);
            append(&mut all.timeline_ends, other.timeline_ends, edge, |e| e.start);
            append(&mut all.running_xacts, other.running_xacts, edge, |r| r.start);
            append(&mut all.file_events, other.file_events, edge, |e| e.start);
            append(&mut merged.drops, part.drops, edge, |x| x.start);
            blocks.add(other.blocks);
            touched.add(part.touched);
            add_relations(&mut relations, part.relations, offset);
            add_counts(&mut rmgrs, &other.rmgrs);
            merged.segments.extend(part.segments);
        }
        merged.all.blocks = blocks.into_list();
        merged.touched = touched.into_list();
        merged.relations = relations
            .into_iter()
            .map(|(relation, segments)| RelationSegments { relation, segments })
            .collect();
        merged.all.rmgrs = rmgrs.into_values().collect();
        Some(merged)
    }

    /// The same without what is bulky: of the ends of transactions only those that drop relations, of blocks only that
    /// they are touched, no running transactions.
    #[must_use]
    pub fn reduced(mut self) -> Self {
        if !self.is_reduced {
            let mut touched = RunUnion::default();
            let runs = |blocks: &[IndexedBlock]| blocks.iter().map(|b| (b.block, 1)).collect();
            let forks = std::mem::take(&mut self.all.blocks);
            let forks = forks.into_iter().map(|f| TouchedFork {
                relation: f.relation,
                fork: f.fork,
                runs: runs(&f.blocks),
            });
            touched.add(forks.collect());
            self.touched = touched.into_list();
            self.all.xacts = Vec::new();
            self.all.running_xacts = Vec::new();
            self.is_reduced = true;
        }
        self
    }

    /// The same with [narrowed](NamesLog::narrowed) names, as every object of the first step has them.
    #[must_use]
    pub fn narrowed(mut self) -> Self {
        self.names = self.names.map(NamesLog::narrowed);
        self
    }

    /// What the segments put into the chain, in order.
    pub fn links(&self) -> impl Iterator<Item = ChainLink> + '_ {
        self.segments.iter().map(MergedSegment::link)
    }
}

/// Puts a later part's items behind. A record that runs over the `edge` between them may be in both, and is taken once.
pub(super) fn append<T>(to: &mut Vec<T>, from: Vec<T>, edge: Lsn, start: impl Fn(&T) -> Lsn) {
    let known = to.last().map(&start);
    to.extend(from.into_iter().filter(|item| {
        let at = start(item);
        at >= edge || known.is_none_or(|known| known < at)
    }));
}

fn add_relations(
    to: &mut BTreeMap<RelFileLocator, Vec<(u32, u32)>>,
    from: Vec<RelationSegments>,
    offset: u32,
) {
    for RelationSegments { relation, segments } in from {
        let known = to.entry(relation).or_default();
        for (first, count) in segments {
            let first = first.saturating_add(offset);
            match known.last_mut() {
                Some((start, length)) if start.checked_add(*length) == Some(first) => {
                    *length = length.saturating_add(count);
                }
                _ => known.push((first, count)),
            }
        }
    }
}

fn add_counts(to: &mut BTreeMap<u8, RmgrCount>, from: &[RmgrCount]) {
    for count in from {
        let sum = to.entry(count.rmid).or_insert(RmgrCount {
            rmid: count.rmid,
            records: 0,
            record_bytes: 0,
            image_bytes: 0,
        });
        sum.records = sum.records.saturating_add(count.records);
        sum.record_bytes = sum.record_bytes.saturating_add(count.record_bytes);
        sum.image_bytes = sum.image_bytes.saturating_add(count.image_bytes);
    }
}

/// Blocks by fork, each with its last image and what follows that.
#[derive(Default)]
struct BlockUnion(BTreeMap<(RelFileLocator, ForkNumber), BTreeMap<BlockNumber, IndexedBlock>>);

impl BlockUnion {
    fn add(&mut self, forks: Vec<ForkBlocks>) {
        for fork in forks {
            let known = self.0.entry((fork.relation, fork.fork)).or_default();
            for later in fork.blocks {
                let found = known.entry(later.block).or_insert(IndexedBlock {
                    block: later.block,
                    last_image: None,
                    records_after: 0,
                });
                match later.last_image {
                    Some(_) => *found = later,
                    None => found.records_after = found.records_after.saturating_add(later.records_after),
                }
            }
        }
    }

    fn into_list(self) -> Vec<ForkBlocks> {
        let fork = |((relation, fork), blocks): (_, BTreeMap<_, _>)| ForkBlocks {
            relation,
            fork,
            blocks: blocks.into_values().collect(),
        };
        self.0.into_iter().map(fork).collect()
    }
}

/// Touched blocks by fork: where a run starts, and where it ends.
#[derive(Default)]
struct RunUnion(BTreeMap<(RelFileLocator, ForkNumber), BTreeMap<u64, u64>>);

impl RunUnion {
    fn add(&mut self, forks: Vec<TouchedFork>) {
        for fork in forks {
            let known = self.0.entry((fork.relation, fork.fork)).or_default();
            for (first, count) in fork.runs {
                let (mut start, mut end) =
                    (u64::from(first), u64::from(first).saturating_add(u64::from(count)));
                // Every run that meets this one becomes part of it; they lie one before the other.
                while let Some((s, e)) = known.range(..=end).next_back().map(|(s, e)| (*s, *e)) {
                    if e < start {
                        break;
                    }
                    known.remove(&s);
                    (start, end) = (start.min(s), end.max(e));
                }
                known.insert(start, end);
            }
        }
    }

    fn into_list(self) -> Vec<TouchedFork> {
        let number = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let fork = |((relation, fork), runs): (_, BTreeMap<u64, u64>)| TouchedFork {
            relation,
            fork,
            runs: runs.into_iter().map(|(s, e)| (number(s), number(e.saturating_sub(s)))).collect(),
        };
        self.0.into_iter().map(fork).collect()
    }
}
