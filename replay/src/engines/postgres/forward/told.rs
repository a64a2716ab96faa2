//! A segment of whose pages nothing matters, out of its index alone: how long files are, and what its records do besides changing
//! pages. Pure: no I/O.

use std::borrow::Cow;

use foldhash::{HashMap, HashSet};
use waltide_format::archive::{Ending, FileEventKind, SegmentIndex, SegmentState, StateRecord, XactEnd};
use waltide_format::engines::postgres::effects::record_of;
use waltide_format::engines::postgres::wal::{Record, RecordHeader, Rmgr, XlogRecord};
use waltide_format::{BlockNumber, ForkNumber, Lsn, PgMajor, RelFileLocator};

use super::super::redo;
use super::decode::{Decoded, MAIN_DATA_MAX, PageTag, Pools};
use super::newer::{MadeAnew, Newer};
use super::pool::Pooled;

/// Whether nothing matters of the pages that a segment's records change, and its index tells all else.
pub(super) fn is_enough(index: &SegmentIndex, newer: &MadeAnew, pools: &Pools) -> bool {
    let whole = matches!(index.info.ending, Ending::Full | Ending::Switch);
    // Without it the record that goes over the segment's beginning is read where it begins, and where it ends.
    let has_head = index.info.continued_bytes == 0 || index.info.head_joined;
    whole
        && has_head
        && index.faults.is_empty()
        && index.state.as_ref().is_some_and(|state| is_known(state, index.info.major))
        && !order_matters(index)
        && index.blocks.iter().all(|fork| {
            let blocks = fork.blocks.iter().map(|block| block.block);
            !pools.selects(fork.relation) || are_irrelevant(fork.relation, fork.fork, blocks, newer)
        })
}

/// What the records do that begin in a segment, but for one that only the segment that follows has the end of. None where its
/// index is not [enough](is_enough).
pub(super) fn segment(index: &SegmentIndex, newer: &Newer, pools: &Pools) -> Option<Pooled<Decoded>> {
    let start = index.info.name.start(index.info.size)?;
    let end = index.info.name.end(index.info.size)?;
    let mut decoded = pools.take();
    {
        let newer = newer.read();
        if !is_enough(index, newer.made_anew(), pools) {
            return None;
        }
        decoded.stretch = newer.stretch();
    }
    for fork in &index.blocks {
        if let Some(last) = fork.blocks.last() {
            let tag = PageTag { relation: fork.relation, fork: fork.fork, block: last.block };
            decoded.add_reach(tag, newer);
        }
    }
    add_records(&mut decoded, index, |at| at >= start, newer)?;
    let pending = index.info.pending.filter(|pending| !pending.joined);
    decoded.unfinished = pending.map(|pending| pending.start);
    let newest_xid = index.state.as_ref()?.newest_xid;
    decoded.end_told(index.info.records.saturating_sub(u64::from(pending.is_some())), (end, newest_xid));
    Some(decoded)
}

/// What the record does that starts at `at`, in the segment before, and ends in this one. None where something matters of its
/// pages, the index does not tell, or it copies a database: then it matters to the segment before what was left out of it.
pub(super) fn head(index: &SegmentIndex, at: Lsn, newer: &Newer, pools: &Pools) -> Option<Pooled<Decoded>> {
    let state = index.state.as_ref()?;
    let head = state.head.as_ref().filter(|head| head.start == at && index.info.head_joined)?;
    if !index.faults.is_empty() || !is_known(state, index.info.major) {
        return None;
    }
    let mut decoded = pools.take();
    {
        let newer = newer.read();
        let matters = |(relation, fork, block): &(RelFileLocator, ForkNumber, BlockNumber)| {
            let block = std::iter::once(*block);
            pools.selects(*relation) && !are_irrelevant(*relation, *fork, block, newer.made_anew())
        };
        if head.pages.iter().any(matters) {
            return None;
        }
        decoded.stretch = newer.stretch();
    }
    for (relation, fork, block) in &head.pages {
        decoded.add_reach(PageTag { relation: *relation, fork: *fork, block: *block }, newer);
    }
    add_records(&mut decoded, index, |start| start == at, newer)?;
    if decoded.copies_database() {
        return None;
    }
    decoded.end_told(1, (index.info.name.start(index.info.size)?, head.xid));
    Some(decoded)
}

/// Whether the engine vouches for all records of which the index tells only the kind.
fn is_known(state: &SegmentState, major: PgMajor) -> bool {
    let is_known = |(rmid, info): &(u8, u8)| {
        Rmgr::new(*rmid, major).is_some_and(|rmgr| redo::vouches_for_pages(major, rmgr, *info))
    };
    state.page_main_bytes as usize <= MAIN_DATA_MAX && state.kinds.iter().all(is_known)
}

/// Whether it matters which of a segment's records came first: the index tells of pages only that they were changed.
fn order_matters(index: &SegmentIndex) -> bool {
    let touched: HashSet<_> = index.blocks.iter().map(|fork| fork.relation).collect();
    let dropped = index.xacts.iter().flat_map(|x| x.dropped.iter().map(|relation| (*relation, x.start)));
    let dropped: HashMap<_, _> = dropped.collect();
    index.file_events.iter().any(|event| match &event.kind {
        FileEventKind::Truncate { relation, .. } => touched.contains(relation),
        FileEventKind::Create { relation, .. } => dropped.get(relation).is_some_and(|at| *at < event.start),
        FileEventKind::DatabaseCopy { .. }
        | FileEventKind::DatabaseCreate { .. }
        | FileEventKind::DatabaseDrop { .. } => true,
        FileEventKind::TablespaceCreate { .. }
        | FileEventKind::TablespaceDrop { .. }
        | FileEventKind::RelationMap { .. } => false,
    })
}

/// Whether nothing matters of what was done to these blocks.
fn are_irrelevant(
    relation: RelFileLocator,
    fork: ForkNumber,
    mut blocks: impl Iterator<Item = BlockNumber>,
    newer: &MadeAnew,
) -> bool {
    newer.has_lost(relation) || blocks.all(|block| newer.contains(PageTag { relation, fork, block }))
}

/// Adds what the records do that start in such places and refer to no blocks. None where one is not known.
fn add_records(
    decoded: &mut Decoded,
    index: &SegmentIndex,
    starts: impl Fn(Lsn) -> bool,
    newer: &Newer,
) -> Option<()> {
    let listed = || index.state.iter().flat_map(|state| &state.records).filter(|record| starts(record.start));
    // Of an end that is listed too, that tells more.
    let is_listed: HashSet<Lsn> = listed().map(|record| record.start).collect();
    let ends = index.xacts.iter().filter(|end| starts(end.start) && !is_listed.contains(&end.start));
    let ends = ends.map(|end| record_of_end(end).map(Cow::Owned));
    let records: Option<Vec<_>> = listed().map(|record| Some(Cow::Borrowed(record))).chain(ends).collect();
    let mut records = records?;
    records.sort_by_key(|record| record.start);
    records.iter().try_for_each(|record| add_record(decoded, record, index.info.major, newer))
}

/// The end of a transaction as a record; none of a PREPARE, which is always listed.
fn record_of_end(end: &XactEnd) -> Option<StateRecord> {
    let (info, main) = record_of(end)?;
    let rmid = Rmgr::XACT.get();
    Some(StateRecord { start: end.start, end: end.end, xid: end.xid, rmid, info, origin: None, main })
}

fn add_record(decoded: &mut Decoded, record: &StateRecord, major: PgMajor, newer: &Newer) -> Option<()> {
    let rmgr = Rmgr::new(record.rmid, major)?;
    let header =
        RecordHeader { total_bytes: 0, xid: record.xid, prev: Lsn::ZERO, info: record.info, rmgr, crc: 0 };
    let record =
        Record::without_blocks(header, (record.start, record.end), major, record.origin, &record.main);
    // Which transaction was the newest before a change of settings is not told.
    if matches!(XlogRecord::decode(&record), Some(Ok(XlogRecord::ParameterChange(_)))) {
        return None;
    }
    decoded.add_told(&record, newer).ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use waltide_format::archive::{HeadRecord, SegmentDirectory};
    use waltide_format::engines::postgres::wal::PackedFor;

    use super::super::decode::tests::{Told, golden, taken, told};
    use super::super::decode::{Deed, NO_RELATION, Step};
    use super::*;

    /// Everything that was taken of a segment.
    #[derive(Debug, Default, PartialEq)]
    struct Everything {
        /// What it does to pages.
        pages: Vec<Told>,
        /// What it does to what is in no relation's file.
        state: Vec<(Lsn, Lsn, Vec<redo::Effect>)>,
        deeds: Vec<Deed>,
        /// So many blocks forks have at least.
        reach: BTreeMap<(RelFileLocator, ForkNumber), BlockNumber>,
        records: u64,
        newest_xid: u32,
    }

    fn everything(decoded: Vec<Decoded>) -> Everything {
        let mut all = Everything::default();
        for decoded in decoded {
            for step in &decoded.steps {
                if let Step::Entries(batch) = step
                    && let Some(of) = batch.of
                    && batch.reach > 0
                {
                    let reach = all.reach.entry((of.relation, of.fork)).or_default();
                    *reach = batch.reach.max(*reach);
                }
            }
            all.records += decoded.count;
            all.newest_xid =
                decoded.newest_xids.iter().map(|(_, xid)| xid.get()).fold(all.newest_xid, u32::max);
            let (entries, deeds) = told(decoded);
            let (state, pages): (Vec<Told>, Vec<Told>) = entries.into_iter().partition(|e| e.1.is_none());
            all.pages.extend(pages);
            all.state.extend(state.into_iter().map(|(start, _, _, _, end, xid, packed)| {
                let of = PackedFor { start, end, xid, relation: NO_RELATION, block: 0 };
                let mut blocks = Vec::new();
                let record = Record::unpack(&packed, of, PgMajor::V15, &mut blocks).unwrap();
                (start, end, redo::effects(&record).unwrap())
            }));
            all.deeds.extend(deeds);
        }
        all
    }

    /// What the index of one segment tells, and that of the next of the record between them; none where they do not.
    fn by_index(indexes: &[SegmentIndex], number: usize, newer: &Newer) -> Option<Everything> {
        let pools = Pools::default();
        let mut all = vec![std::mem::take(&mut *segment(&indexes[number], newer, &pools)?)];
        if let Some(at) = all[0].unfinished {
            all.push(std::mem::take(&mut *head(indexes.get(number + 1)?, at, newer, &pools)?));
        }
        Some(everything(all))
    }

    #[test]
    fn an_index_tells_what_its_segment_does_where_no_page_matters() {
        let segments = golden();
        let index =
            |object: &[u8]| SegmentDirectory::with_index(object, object.len() as u64).unwrap().unwrap().1;
        let indexes: Vec<SegmentIndex> = segments.iter().map(|(_, object)| index(object)).collect();
        let (mut spared, mut effects, mut heads) = (0, 0, 0);
        for number in 0..segments.len() {
            let newer = Newer::default();
            let (all, _) = told(taken(&segments, number, usize::MAX, &newer));
            let pages: Vec<PageTag> = all.iter().filter_map(|(_, tag, ..)| *tag).collect();
            if let Some((last, others)) = pages.split_last() {
                let mark =
                    |tag: &PageTag| newer.write().made_anew_mut().blocks_mut(tag.part()).insert(tag.block);
                for tag in others.iter().filter(|tag| *tag != last) {
                    mark(tag);
                }
                assert!(by_index(&indexes, number, &newer).is_none(), "{number}: {last:?} matters");
                mark(last);
            }
            let mut expected = everything(vec![taken(&segments, number, usize::MAX, &newer)]);
            let head_pages = indexes[number].state.as_ref().and_then(|state| state.head.as_ref());
            for (relation, fork, block) in head_pages.iter().flat_map(|head| &head.pages) {
                let tag = PageTag { relation: *relation, fork: *fork, block: *block };
                newer.write().made_anew_mut().blocks_mut(tag.part()).insert(tag.block);
                // The record that began before is among the index's blocks.
                let reach = expected.reach.entry((*relation, *fork)).or_default();
                *reach = (*block + 1).max(*reach);
            }
            let Some(found) = by_index(&indexes, number, &newer) else { continue };
            assert_eq!(found, expected, "{number}");
            assert!(found.pages.is_empty() && found.reach.len() > 20, "{number}");
            spared += 1;
            effects += found.state.len();
            heads += usize::from(indexes[number].info.pending.is_some());
        }
        assert!(spared > 0 && effects > 10 && heads > 0, "{spared} {effects} {heads}");
    }

    /// Of a record over the edge that is told by the index of the segment behind it.
    #[test]
    fn what_the_segment_before_must_know_of_is_not_told() {
        let (start, object) = &golden()[0];
        let (_, mut index) = SegmentDirectory::with_index(object, object.len() as u64).unwrap().unwrap();
        let at = start.saturating_sub(48);
        index.info.head_joined = true;
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        let settings = [words(&[100, 8, 10, 0, 64, 1]).as_slice(), &[0, 1]].concat();
        for (rmgr, info, main, is_told) in [
            (Rmgr::XLOG, 0x30, words(&[30_000]), true),
            (Rmgr::XLOG, 0x60, settings, false),
            (Rmgr::DBASE, 0x00, words(&[16_500, 1663, 16_400, 1663]), false),
            (Rmgr::DBASE, 0x20, words(&[16_500, 1, 1663]), true),
        ] {
            let state = index.state.as_mut().unwrap();
            let (end, xid, rmid) = (start.saturating_add(80), 740.into(), rmgr.get());
            state.records = vec![StateRecord { start: at, end, xid, rmid, info, origin: None, main }];
            state.head = Some(HeadRecord { start: at, xid, pages: Vec::new() });
            let (newer, pools) = (Newer::default(), Pools::default());
            assert_eq!(head(&index, at, &newer, &pools).is_some(), is_told, "{rmgr} {info:#X}");
            assert!(head(&index, at.saturating_add(8), &newer, &pools).is_none());
        }
    }
}
