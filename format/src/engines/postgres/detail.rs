//! The pass over a segment's records that sums up what each transaction did. It is made when somebody asks, and
//! apart from the one that checks a segment when it arrives.

use std::collections::{BTreeSet, HashMap};

use crate::archive::{
    CheckpointInfo, CheckpointKind, ExclusiveLock, FileEvent, RelationWork, RunningXacts, SegmentDetail,
    SubXact, TruncatedOid, Volume, XactEnd, XactWork,
};
use crate::engines::postgres::effects::{checkpoint, file_event, running_xacts, xact_end};
use crate::engines::postgres::wal::{
    Damage, ExclusiveLocks, Expected, HeapTruncate, Next, PreviousTail, Record, RecordStream, Rmgr,
    RowChange, SegmentSpan, XactAssignment, XlogRecord,
};
use crate::error::Corrupt;
use crate::ids::{Lsn, RelFileLocator, Xid};

/// What a segment's records tell about transactions. A record that runs over the edge belongs to the segment that
/// it ends in, so that it counts once.
#[derive(Debug, Clone, Default)]
pub struct Telling {
    /// What each transaction did.
    pub detail: SegmentDetail,
    /// Ends of transactions, in LSN order.
    pub xacts: Vec<XactEnd>,
    /// Files made, cut, dropped and copied, in LSN order.
    pub file_events: Vec<FileEvent>,
    /// The horizons that running-xacts records tell, in LSN order.
    pub running_xacts: Vec<RunningXacts>,
    /// Checkpoints, in LSN order.
    pub checkpoints: Vec<CheckpointInfo>,
    /// What the next segment has to go on from; `None` where the log stops inside this one.
    pub tail: Option<PreviousTail>,
    /// What ended the reading, where that is no end of a log.
    pub damage: Option<Damage>,
}

impl Telling {
    /// Puts what was told before this, by a record that runs over the edge, in front.
    pub fn preceded_by(&mut self, head: Self) {
        let mut detail = head.detail;
        detail.add(std::mem::take(&mut self.detail));
        self.detail = detail;
        self.xacts.splice(0..0, head.xacts);
        self.file_events.splice(0..0, head.file_events);
        self.running_xacts.splice(0..0, head.running_xacts);
        self.checkpoints.splice(0..0, head.checkpoints);
    }
}

/// Reads the segment at `span` up to the last record that begins before `until`. `tail` is what the segment before
/// left; without it, what goes on from there is passed over.
pub fn tell_segment(
    wal: &[u8],
    span: SegmentSpan,
    expected: Expected<'_>,
    tail: Option<PreviousTail>,
    until: Lsn,
) -> Telling {
    tell(wal, span, expected, tail, |record| record.start < until)
}

/// Reads no more of the segment than the record that began in the segments before, and says whether the next record
/// continues them. A tail is told only where that record fills the segment: the segment's own is told by
/// [`tell_segment`].
pub fn tell_head(wal: &[u8], span: SegmentSpan, expected: Expected<'_>, tail: PreviousTail) -> Telling {
    tell(wal, span, expected, Some(tail), |record| record.start < span.start())
}

fn tell(
    wal: &[u8],
    span: SegmentSpan,
    expected: Expected<'_>,
    tail: Option<PreviousTail>,
    wanted: impl Fn(&Record<'_>) -> bool,
) -> Telling {
    let mut teller = Teller::default();
    let mut stream = match RecordStream::new(wal, span, expected, tail) {
        Ok(stream) => stream,
        Err(damage) => return Telling { damage: Some(damage), ..Telling::default() },
    };
    let damage = loop {
        match stream.next_record() {
            Ok(Next::Record(record)) if wanted(&record) => teller.add(&record),
            Ok(_) => break None,
            Err(damage) => break Some(damage),
        }
    };
    Telling { tail: stream.into_tail(), damage, ..teller.finish() }
}

/// Sums up while the records go by.
#[derive(Debug, Default)]
struct Teller {
    told: Telling,
    by_xid: HashMap<u32, usize>,
    by_relation: HashMap<(u32, RelFileLocator), usize>,
    parents: HashMap<u32, Xid>,
    locks: BTreeSet<(u32, u32, u32)>,
}

impl Teller {
    fn add(&mut self, record: &Record<'_>) {
        let volume = Volume {
            records: 1,
            wal_bytes: record.header.total_bytes.into(),
            image_bytes: record.image_bytes().into(),
        };
        let xid = record.header.xid;
        if xid.is_invalid() {
            self.told.detail.unowned.add(volume);
        } else {
            if let Some(top) = record.toplevel_xid() {
                self.parents.insert(xid.get(), top);
            }
            self.add_work(record, volume);
        }
        let effects = match record.rmgr() {
            Rmgr::XACT | Rmgr::SMGR | Rmgr::STANDBY | Rmgr::DBASE | Rmgr::TBLSPC | Rmgr::RELMAP => {
                self.add_effects(record)
            }
            Rmgr::HEAP => self.add_truncate(record),
            Rmgr::XLOG => self.add_checkpoint(record),
            _ => Ok(()),
        };
        if effects.is_err() {
            self.told.detail.unread_records = self.told.detail.unread_records.saturating_add(1);
        }
    }

    fn add_work(&mut self, record: &Record<'_>, volume: Volume) {
        let (xid, all) = (record.header.xid, &mut self.told.detail.work);
        let next = all.len();
        let place = *self.by_xid.entry(xid.get()).or_insert(next);
        if place == next {
            let first = record.start;
            all.push(XactWork { xid, first, last: first, volume: Volume::default(), relations: Vec::new() });
        }
        let Some(work) = all.get_mut(place) else { return };
        work.last = record.start;
        work.volume.add(volume);
        let is_heap = matches!(record.rmgr(), Rmgr::HEAP | Rmgr::HEAP2);
        for (nth, block) in record.blocks().enumerate() {
            let relation = block.relation;
            if record.blocks().take(nth).any(|b| b.relation == relation) {
                continue;
            }
            let one = RelationWork {
                relation,
                records: 1,
                other_records: u64::from(!is_heap),
                ..RelationWork::default()
            };
            add_to(work, &mut self.by_relation, &one);
        }
        match RowChange::decode(record) {
            None => {}
            Some(Err(_)) => {
                self.told.detail.unread_records = self.told.detail.unread_records.saturating_add(1);
            }
            Some(Ok((relation, change))) => {
                let mut rows = RelationWork { relation, ..RelationWork::default() };
                match change {
                    RowChange::Inserted(count) => rows.inserted = count.into(),
                    RowChange::TakenBack => rows.taken_back = 1,
                    RowChange::Updated { hot } => (rows.updated, rows.hot) = (1, u64::from(hot)),
                    RowChange::Deleted => rows.deleted = 1,
                }
                add_to(work, &mut self.by_relation, &rows);
            }
        }
    }

    fn add_effects(&mut self, record: &Record<'_>) -> Result<(), Corrupt> {
        if let Some(end) = xact_end(record) {
            self.told.xacts.push(end?);
        } else if let Some(assignment) = XactAssignment::decode(record) {
            let XactAssignment { top, subxacts } = assignment?;
            self.parents.extend(subxacts.iter().map(|sub| (sub.get(), top)));
        } else if let Some(running) = running_xacts(record) {
            self.told.running_xacts.push(running?);
        } else if let Some(locks) = ExclusiveLocks::decode(record) {
            self.locks.extend(locks?.locks.iter().map(|(xid, db, rel)| (xid.get(), *db, *rel)));
        } else if let Some(event) = file_event(record)? {
            self.told.file_events.push(event);
        }
        Ok(())
    }

    fn add_checkpoint(&mut self, record: &Record<'_>) -> Result<(), Corrupt> {
        let (kind, found) = match XlogRecord::decode(record).transpose()? {
            Some(XlogRecord::CheckpointShutdown(found)) => (CheckpointKind::Shutdown, found),
            Some(XlogRecord::CheckpointOnline(found)) => (CheckpointKind::Online, found),
            _ => return Ok(()),
        };
        self.told.checkpoints.push(checkpoint(record, kind, &found));
        Ok(())
    }

    fn add_truncate(&mut self, record: &Record<'_>) -> Result<(), Corrupt> {
        if let Some(truncate) = HeapTruncate::decode(record) {
            let HeapTruncate { db_oid, rel_oids } = truncate?;
            let xid = record.header.xid;
            let named = rel_oids.into_iter().map(|rel_oid| TruncatedOid { xid, db_oid, rel_oid });
            self.told.detail.truncates.extend(named);
        }
        Ok(())
    }

    fn finish(self) -> Telling {
        let mut told = self.told;
        let detail = &mut told.detail;
        detail.work.sort_unstable_by_key(|w| w.xid.get());
        for work in &mut detail.work {
            work.relations.sort_unstable_by_key(|r| r.relation);
        }
        detail.parents =
            self.parents.iter().map(|(xid, top)| SubXact { xid: (*xid).into(), top: *top }).collect();
        detail.parents.sort_unstable_by_key(|s| s.xid.get());
        let lock =
            |(xid, db_oid, rel_oid): (u32, u32, u32)| ExclusiveLock { xid: xid.into(), db_oid, rel_oid };
        detail.locks = self.locks.into_iter().map(lock).collect();
        told
    }
}

/// Adds to the transaction's counters of a relation.
fn add_to(work: &mut XactWork, places: &mut HashMap<(u32, RelFileLocator), usize>, done: &RelationWork) {
    let next = work.relations.len();
    let place = *places.entry((work.xid.get(), done.relation)).or_insert(next);
    if place == next {
        work.relations.push(*done);
    } else if let Some(mine) = work.relations.get_mut(place) {
        mine.add(done);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engines::postgres::wal::testing::{RELATION, TestBlock, WalBuilder, small_segments};
    use crate::ids::{ForkNumber, PgMajor};
    use crate::reader::Writer;
    use crate::segment::SegmentName;
    use proptest::prelude::*;

    const INDEX: RelFileLocator = RelFileLocator { rel_number: 16390, ..RELATION };

    fn heap() -> Vec<TestBlock> {
        vec![TestBlock::data(0, ForkNumber::Main, 3, b"row")]
    }

    fn span(name: SegmentName) -> SegmentSpan {
        SegmentSpan::containing(name.start(small_segments()).unwrap(), small_segments()).unwrap()
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    /// What all the segments tell, each given what the one before left.
    fn in_turn(segments: &[(SegmentName, Vec<u8>)]) -> Telling {
        let mut all = Telling::default();
        let mut tail = None;
        for (name, wal) in segments {
            let mut told = tell_segment(wal, span(*name), Expected::default(), tail.take(), Lsn::MAX);
            assert_eq!(told.damage, None);
            tail = told.tail.take();
            told.preceded_by(all);
            all = told;
        }
        all
    }

    /// The same, each segment read alone, and the records over the edges put in between.
    fn apart(segments: &[(SegmentName, Vec<u8>)]) -> Telling {
        let mut all = Telling::default();
        let mut tail: Option<PreviousTail> = None;
        for (name, wal) in segments {
            let mut told = tell_segment(wal, span(*name), Expected::default(), None, Lsn::MAX);
            let mut left = told.tail.take();
            if let Some(tail) = tail {
                let mut head = tell_head(wal, span(*name), Expected::default(), tail);
                assert_eq!(head.damage, None);
                left = head.tail.take().or(left);
                told.preceded_by(head);
            }
            tail = left;
            told.preceded_by(all);
            all = told;
        }
        all
    }

    #[test]
    fn rows_bytes_and_relations_stand_under_the_transaction_that_wrote_them() {
        let mut b = WalBuilder::new(PgMajor::V15, small_segments());
        let delete = |flags| [0, 0, 0, 0, 1, 0, 0, flags];
        let first = b.push(10, 0x00, 740, &heap(), &[1, 0, 8]);
        b.push(10, 0x00, 741, &heap(), &[1, 0, 8]);
        b.push(9, 0x50, 740, &heap(), &[0, 0, 3, 0, 1, 0, 2, 0, 3, 0]);
        let leaf = TestBlock { relation: INDEX, ..heap().remove(0) };
        b.push(11, 0x00, 740, &[leaf.clone(), TestBlock { id: 1, ..leaf }], &[0; 8]);
        b.push(10, 0x20, 740, &heap(), &[0; 14]);
        b.push(10, 0x40, 740, &heap(), &[0; 14]);
        b.push(10, 0x10, 740, &heap(), &delete(0));
        b.push(10, 0x60, 740, &heap(), &[0; 8]);
        let last = b.push(10, 0x10, 740, &heap(), &delete(8));
        b.push(10, 0x10, 742, &heap(), &[0; 3]);
        b.push(10, 0x30, 742, &[], &words(&[5, 1, 0, 16384]));
        b.push(1, 0x50, 743, &[], &words(&[740, 2, 741, 743]));
        b.push(8, 0x00, 0, &[], &words(&[2, 742, 5, 16384, 740, 5, 16400]));
        b.push(1, 0x00, 740, &[], &100i64.to_le_bytes());
        b.switch();
        let (name, wal) = b.finish_segments().remove(0);
        let told = tell_segment(&wal, span(name), Expected::default(), None, Lsn::MAX);
        let detail = &told.detail;
        assert_eq!(detail.work.iter().map(|w| w.xid.get()).collect::<Vec<_>>(), [740, 741, 742, 743]);
        let work = detail.work_of(Xid::from(740)).unwrap();
        assert_eq!((work.first, work.volume.records), (first, 9));
        assert!(work.last > last, "its commit is its last record");
        let [heap, index] = work.relations.as_slice() else { panic!("{work:?}") };
        let expected = RelationWork {
            relation: RELATION,
            records: 7,
            other_records: 0,
            inserted: 4,
            taken_back: 1,
            updated: 2,
            hot: 1,
            deleted: 1,
        };
        assert_eq!((*heap, heap.rows_inserted()), (expected, 3));
        assert_eq!((index.relation, index.records, index.other_records), (INDEX, 1, 1));
        assert!(!index.has_rows());
        assert_eq!(detail.unread_records, 1, "the delete that is cut off");
        let truncated = TruncatedOid { xid: 742.into(), db_oid: 5, rel_oid: 16384 };
        assert_eq!(detail.truncates, [truncated]);
        let parents: Vec<_> = detail.parents.iter().map(|s| (s.xid.get(), s.top.get())).collect();
        assert_eq!(parents, [(741, 740), (743, 740)]);
        let locks: Vec<_> = detail.locks.iter().map(|l| (l.xid.get(), l.rel_oid)).collect();
        assert_eq!(locks, [(740, 16400), (742, 16384)]);
        assert_eq!(detail.unowned.records, 2, "the locks and the switch");
        assert_eq!((told.xacts.len(), told.xacts[0].xid), (1, 740.into()));
        let bytes: u64 = detail.work.iter().map(|w| w.volume.wal_bytes).sum();
        let records: usize = b.records.len();
        assert!(bytes + detail.unowned.wal_bytes > 24 * records as u64);
    }

    #[test]
    fn a_record_over_the_edge_counts_once_and_where_it_ends() {
        let mut b = WalBuilder::new(PgMajor::V15, small_segments());
        b.fill_segment(64);
        let rows = vec![TestBlock { data: vec![5; 4000], ..heap().remove(0) }];
        let over = b.push(10, 0x00, 740, &rows, &[1, 0, 8]);
        b.switch();
        let segments = b.finish_segments();
        let alone = |nth: usize, tail| {
            let (name, wal) = &segments[nth];
            tell_segment(wal, span(*name), Expected::default(), tail, Lsn::MAX)
        };
        let first = alone(0, None);
        assert_eq!(first.detail.work_of(740.into()), None);
        let second = alone(1, first.tail.clone());
        let work = second.detail.work_of(740.into()).unwrap();
        assert_eq!((work.first, work.volume.records, work.relations[0].inserted), (over, 1, 1));
        assert_eq!(alone(1, None).detail.work_of(740.into()), None, "not without what came before");
    }

    #[test]
    fn nothing_past_the_fork_is_told() {
        let mut b = WalBuilder::new(PgMajor::V15, small_segments());
        b.push(10, 0x00, 740, &heap(), &[1, 0, 8]);
        let fork = b.push(10, 0x00, 741, &heap(), &[1, 0, 8]);
        b.switch();
        let (name, wal) = b.finish_segments().remove(0);
        let told = tell_segment(&wal, span(name), Expected::default(), None, fork);
        assert_eq!(told.detail.work.len(), 1);
        assert_eq!(told.tail, None);
    }

    #[test]
    fn damage_ends_the_telling_and_is_told() {
        let mut b = WalBuilder::new(PgMajor::V15, small_segments());
        b.push(10, 0x00, 740, &heap(), &[1, 0, 8]);
        let second = b.push(10, 0x00, 741, &heap(), &[1, 0, 8]);
        b.fill_segment(64);
        b.switch();
        let (name, mut wal) = b.finish_segments().remove(0);
        wal[second.bytes_since(span(name).start()) as usize + 30] ^= 1;
        let told = tell_segment(&wal, span(name), Expected::default(), None, Lsn::MAX);
        assert_eq!(told.detail.work.len(), 1);
        assert_eq!(told.damage.unwrap().lsn, second.saturating_add(20), "its CRC");
        let told = tell_segment(&wal[..8], span(name), Expected::default(), None, Lsn::MAX);
        assert!(told.damage.is_some() && told.detail == SegmentDetail::default());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn every_record_counts_once_however_the_segments_are_read(
            records in proptest::collection::vec((0u32..6, 1usize..200_000, 0u32..4), 5..40),
        ) {
            let mut b = WalBuilder::new(PgMajor::V15, small_segments());
            for (xid, bytes, rows) in &records {
                let mut main = Writer::new();
                main.u16(0).u16(*rows as u16).bytes(&vec![7; *bytes]);
                b.push(9, 0x50, *xid, &heap(), main.as_bytes());
            }
            b.switch();
            let segments = b.finish_segments();
            let told = in_turn(&segments);
            for xid in 1..6 {
                let of = || records.iter().filter(|r| r.0 == xid);
                let work = told.detail.work_of(xid.into());
                prop_assert_eq!(work.map_or(0, |w| w.volume.records), of().count() as u64);
                let rows = work.and_then(|w| w.relations.first()).map_or(0, |r| r.inserted);
                prop_assert_eq!(rows, of().map(|r| u64::from(r.2)).sum::<u64>());
            }
            let all = told.detail.work.iter().map(|w| w.volume.records).sum::<u64>();
            prop_assert_eq!(all + told.detail.unowned.records, b.records.len() as u64);
            prop_assert_eq!(apart(&segments).detail, told.detail);
        }
    }
}
