//! What each transaction did in a stretch of WAL: rows, bytes, relations. Summed up from the records when it is
//! asked for, or kept in typed sections; no part of what push writes.

use serde::Serialize;

use super::index::{get_lsn, get_relation, items, list, put_lsn, put_relation};
use crate::error::Corrupt;
use crate::ids::{Lsn, Oid, RelFileLocator, Xid};
use crate::reader::{Reader, Writer};

/// What each transaction did in a stretch of WAL. A record belongs to the stretch that it ends in.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct SegmentDetail {
    /// By rising number, one for each; a subtransaction's work stands under its own.
    pub work: Vec<XactWork>,
    /// Records that carry no transaction's number.
    pub unowned: Volume,
    /// Records whose CRC is right and of which this program cannot read what they say.
    pub unread_records: u64,
    /// Subtransactions of which the records say whose they are, by rising number.
    pub parents: Vec<SubXact>,
    /// Relations that a transaction held all alone, by rising number of it, database and relation; each once.
    pub locks: Vec<ExclusiveLock>,
    /// What TRUNCATE named, in the order of the records; only where `wal_level` is `logical`.
    pub truncates: Vec<TruncatedOid>,
}

/// How many records, and their bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Volume {
    /// Records.
    pub records: u64,
    /// `xl_tot_len`, images included.
    pub wal_bytes: u64,
    /// Bytes of full-page images.
    pub image_bytes: u64,
}

impl Volume {
    /// Adds another's.
    pub const fn add(&mut self, other: Self) {
        self.records = self.records.saturating_add(other.records);
        self.wal_bytes = self.wal_bytes.saturating_add(other.wal_bytes);
        self.image_bytes = self.image_bytes.saturating_add(other.image_bytes);
    }
}

/// What one (sub)transaction did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct XactWork {
    /// `xl_xid` of its records.
    pub xid: Xid,
    /// Start of its first record.
    pub first: Lsn,
    /// Start of its last record.
    pub last: Lsn,
    /// How much it wrote.
    #[serde(flatten)]
    pub volume: Volume,
    /// The relations whose blocks it changed, in order.
    pub relations: Vec<RelationWork>,
}

/// What one transaction did to one relation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct RelationWork {
    /// Its files.
    pub relation: RelFileLocator,
    /// Records that refer to its blocks.
    pub records: u64,
    /// Those among them that are not the heap's: of an index, a sequence, or bare images.
    pub other_records: u64,
    /// Rows that came, those taken back included.
    pub inserted: u64,
    /// Rows that were inserted on trial (`ON CONFLICT`) and taken back, perhaps in a later stretch.
    pub taken_back: u64,
    /// Rows that got a new version.
    pub updated: u64,
    /// Those among them whose new version is on the same page and in no index.
    pub hot: u64,
    /// Rows that went. Locked rows count nowhere.
    pub deleted: u64,
}

impl RelationWork {
    /// Rows that came to stay.
    pub const fn rows_inserted(&self) -> u64 {
        self.inserted.saturating_sub(self.taken_back)
    }

    /// Whether any row came, changed or went.
    pub const fn has_rows(&self) -> bool {
        self.rows_inserted() > 0 || self.updated > 0 || self.deleted > 0
    }

    /// Adds another's, of the same relation.
    pub const fn add(&mut self, other: &Self) {
        self.records = self.records.saturating_add(other.records);
        self.other_records = self.other_records.saturating_add(other.other_records);
        self.inserted = self.inserted.saturating_add(other.inserted);
        self.taken_back = self.taken_back.saturating_add(other.taken_back);
        self.updated = self.updated.saturating_add(other.updated);
        self.hot = self.hot.saturating_add(other.hot);
        self.deleted = self.deleted.saturating_add(other.deleted);
    }

    const fn counters(&self) -> [u64; 7] {
        let Self { records, other_records, inserted, taken_back, updated, hot, deleted, .. } = *self;
        [records, inserted, updated, hot, deleted, other_records, taken_back]
    }

    const fn of_counters(relation: RelFileLocator, counters: [u64; 7]) -> Self {
        let [records, inserted, updated, hot, deleted, other_records, taken_back] = counters;
        Self { relation, records, other_records, inserted, taken_back, updated, hot, deleted }
    }
}

/// A subtransaction and the transaction it is a part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct SubXact {
    /// The subtransaction.
    pub xid: Xid,
    /// The top-level transaction.
    pub top: Xid,
}

/// An `AccessExclusiveLock` that a transaction held: whatever drops, truncates or rewrites a relation takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ExclusiveLock {
    /// The (sub)transaction.
    pub xid: Xid,
    /// Its database; zero for a shared relation.
    pub db_oid: Oid,
    /// The relation, by its own number in `pg_class` and not its file's. A new relation's are the same.
    pub rel_oid: Oid,
}

impl ExclusiveLock {
    /// What these are kept in the order of.
    pub(crate) const fn key(&self) -> (u32, Oid, Oid) {
        (self.xid.get(), self.db_oid, self.rel_oid)
    }
}

/// A relation that a TRUNCATE command named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TruncatedOid {
    /// The (sub)transaction.
    pub xid: Xid,
    /// Its database.
    pub db_oid: Oid,
    /// The relation, by its own number in `pg_class`.
    pub rel_oid: Oid,
}

/// The sections, by number, in the same space as the index's. A number is never used again for something else.
mod section {
    pub(super) const WORK: u16 = 11;
    pub(super) const UNOWNED: u16 = 12;
    pub(super) const PARENTS: u16 = 13;
    pub(super) const LOCKS: u16 = 14;
    pub(super) const TRUNCATES: u16 = 15;
    pub(super) const ALL: [u16; 5] = [WORK, UNOWNED, PARENTS, LOCKS, TRUNCATES];
}

/// The version of every section that is written.
const SECTION_VERSION: u16 = 1;

/// Every section of a detail: its name on docs/format.md, its number, its version.
pub const DETAIL_SECTIONS: [(&str, u16, u16); 5] = [
    ("work", section::WORK, SECTION_VERSION),
    ("unowned", section::UNOWNED, SECTION_VERSION),
    ("parents", section::PARENTS, SECTION_VERSION),
    ("locks", section::LOCKS, SECTION_VERSION),
    ("truncates", section::TRUNCATES, SECTION_VERSION),
];

impl SegmentDetail {
    /// What a transaction did, if anything.
    pub fn work_of(&self, xid: Xid) -> Option<&XactWork> {
        let found = self.work.binary_search_by_key(&xid.get(), |w| w.xid.get()).ok()?;
        self.work.get(found)
    }

    /// Adds the detail of the stretch that follows, so that the two are one.
    pub fn add(&mut self, later: Self) {
        self.unowned.add(later.unowned);
        self.unread_records = self.unread_records.saturating_add(later.unread_records);
        let mine = std::mem::take(&mut self.work);
        self.work = merged(mine, later.work, |w| w.xid.get(), XactWork::add);
        let mine = std::mem::take(&mut self.parents);
        self.parents = merged(mine, later.parents, |s| s.xid.get(), |_, _| {});
        let mine = std::mem::take(&mut self.locks);
        self.locks = merged(mine, later.locks, ExclusiveLock::key, |_, _| {});
        self.truncates.extend(later.truncates);
    }

    /// The sections' bytes, by number and version, those that say nothing left out. Positions are written as
    /// distances from `base`, either way.
    pub fn encode_sections(&self, base: Lsn) -> Vec<(u16, u16, Vec<u8>)> {
        let encode = |id| {
            let mut w = Writer::new();
            self.encode_section(id, base, &mut w);
            (id, SECTION_VERSION, w.into_bytes())
        };
        section::ALL.into_iter().map(encode).filter(|(_, _, bytes)| !bytes.is_empty()).collect()
    }

    fn encode_section(&self, id: u16, base: Lsn, w: &mut Writer) {
        match id {
            section::WORK => self.encode_work(base, w),
            section::UNOWNED => {
                if self.unowned != Volume::default() || self.unread_records > 0 {
                    put_volume(w, self.unowned);
                    w.varint(self.unread_records);
                }
            }
            section::PARENTS => list(w, &self.parents, |w, s| {
                w.u32(s.xid.get()).u32(s.top.get());
            }),
            section::LOCKS => list(w, &self.locks, |w, l| {
                w.u32(l.xid.get()).varint(l.db_oid.into()).varint(l.rel_oid.into());
            }),
            _ => list(w, &self.truncates, |w, t| {
                w.u32(t.xid.get()).varint(t.db_oid.into()).varint(t.rel_oid.into());
            }),
        }
    }

    /// The relations first, so that each transaction names them by their place in that list.
    fn encode_work(&self, base: Lsn, w: &mut Writer) {
        if self.work.is_empty() {
            return;
        }
        let mut relations: Vec<_> =
            self.work.iter().flat_map(|work| &work.relations).map(|r| r.relation).collect();
        relations.sort_unstable();
        relations.dedup();
        w.varint(relations.len() as u64);
        relations.iter().for_each(|r| put_relation(w, *r));
        let mut before = 0;
        list(w, &self.work, |w, work| {
            w.varint(work.xid.get().wrapping_sub(before).into());
            before = work.xid.get();
            put_lsn(w, base, work.first);
            w.varint(work.last.bytes_since(work.first));
            put_volume(w, work.volume);
            w.varint(work.relations.len() as u64);
            for done in &work.relations {
                let place = relations.binary_search(&done.relation).unwrap_or(0);
                w.varint(place as u64);
                let counters = done.counters();
                // Which of them are not zero, then those.
                w.u8(counters.iter().rev().fold(0, |bits, c| bits << 1 | u8::from(*c > 0)));
                counters.iter().filter(|c| **c > 0).for_each(|c| {
                    w.varint(*c);
                });
            }
        });
    }

    /// Puts a section's content in place; one of a number or version that this reader does not know is left alone.
    pub fn decode_section(&mut self, id: u16, version: u16, base: Lsn, bytes: &[u8]) -> Result<(), Corrupt> {
        if version != SECTION_VERSION {
            return Ok(());
        }
        let mut r = Reader::new(bytes);
        match id {
            section::WORK => self.work = decode_work(&mut r, base)?,
            section::UNOWNED => {
                self.unowned = get_volume(&mut r)?;
                self.unread_records = r.varint("unread_records")?;
            }
            section::PARENTS => {
                self.parents = items(&mut r, 8, |r| {
                    Ok(SubXact { xid: r.u32("xid")?.into(), top: r.u32("top")?.into() })
                })?;
                rising(&self.parents, |s| s.xid, "xid")?;
            }
            section::LOCKS => {
                self.locks = items(&mut r, 6, |r| {
                    let (xid, db_oid, rel_oid) = get_oids(r)?;
                    Ok(ExclusiveLock { xid, db_oid, rel_oid })
                })?;
            }
            section::TRUNCATES => {
                self.truncates = items(&mut r, 6, |r| {
                    let (xid, db_oid, rel_oid) = get_oids(r)?;
                    Ok(TruncatedOid { xid, db_oid, rel_oid })
                })?;
            }
            _ => return Ok(()),
        }
        r.finish("section")
    }
}

impl XactWork {
    /// Adds what the same transaction did later.
    pub fn add(&mut self, later: Self) {
        self.first = self.first.min(later.first);
        self.last = self.last.max(later.last);
        self.volume.add(later.volume);
        let mine = std::mem::take(&mut self.relations);
        self.relations = merged(mine, later.relations, |r| r.relation, |r, other| r.add(&other));
    }
}

/// Two sorted lists as one; what both have is put together by `join`.
fn merged<T, K: Ord>(
    mine: Vec<T>,
    theirs: Vec<T>,
    key: impl Fn(&T) -> K,
    join: impl Fn(&mut T, T),
) -> Vec<T> {
    if mine.is_empty() {
        return theirs;
    }
    let mut all = mine;
    all.extend(theirs);
    // A stable sort over two sorted runs, which it finds.
    all.sort_by_key(|a| key(a));
    let mut out: Vec<T> = Vec::with_capacity(all.len());
    for item in all {
        match out.last_mut() {
            Some(last) if key(last) == key(&item) => join(last, item),
            _ => out.push(item),
        }
    }
    out
}

fn put_volume(w: &mut Writer, v: Volume) {
    w.varint(v.records).varint(v.wal_bytes).varint(v.image_bytes);
}

fn get_volume(r: &mut Reader<'_>) -> Result<Volume, Corrupt> {
    Ok(Volume {
        records: r.varint("records")?,
        wal_bytes: r.varint("wal_bytes")?,
        image_bytes: r.varint("image_bytes")?,
    })
}

fn get_oids(r: &mut Reader<'_>) -> Result<(Xid, Oid, Oid), Corrupt> {
    Ok((r.u32("xid")?.into(), r.varint_u32("dbOid")?, r.varint_u32("relOid")?))
}

fn decode_work(r: &mut Reader<'_>, base: Lsn) -> Result<Vec<XactWork>, Corrupt> {
    let relations = items(r, 3, get_relation)?;
    let mut before = 0u32;
    let work = items(r, 7, |r| {
        let at = r.position();
        let step = r.varint_u32("xid")?;
        before = before.checked_add(step).ok_or(Corrupt::invalid("xid", at, step.into()))?;
        let first = get_lsn(r, base)?;
        Ok(XactWork {
            xid: before.into(),
            first,
            last: first.saturating_add(r.varint("last")?),
            volume: get_volume(r)?,
            relations: items(r, 2, |r| decode_relation_work(r, &relations))?,
        })
    })?;
    rising(&work, |w| w.xid, "xid")?;
    Ok(work)
}

fn decode_relation_work(r: &mut Reader<'_>, relations: &[RelFileLocator]) -> Result<RelationWork, Corrupt> {
    let at = r.position();
    let place = r.varint("relation")?;
    let relation = usize::try_from(place).ok().and_then(|place| relations.get(place));
    let relation = *relation.ok_or(Corrupt::invalid("relation", at, place))?;
    let at = r.position();
    let mut bits = r.u8("counters")?;
    if bits & 0x80 != 0 {
        return Err(Corrupt::invalid("counters", at, bits.into()));
    }
    let mut counters = [0; 7];
    for counter in &mut counters {
        if bits & 1 != 0 {
            *counter = r.varint("counter")?;
        }
        bits >>= 1;
    }
    Ok(RelationWork::of_counters(relation, counters))
}

/// Readers search these lists by number.
fn rising<T>(list: &[T], xid: impl Fn(&T) -> Xid, field: &'static str) -> Result<(), Corrupt> {
    let numbers = || list.iter().map(|item| xid(item).get());
    match numbers().zip(numbers().skip(1)).find(|(a, b)| a >= b) {
        Some((_, found)) => Err(Corrupt::invalid(field, 0, found.into())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn relation() -> impl Strategy<Value = RelFileLocator> {
        (1663u32..1665, 0u32..3, prop_oneof![1000u32..1010, any::<u32>()])
            .prop_map(|(spc_oid, db_oid, rel_number)| RelFileLocator { spc_oid, db_oid, rel_number })
    }

    fn relation_work() -> impl Strategy<Value = RelationWork> {
        let counter = || prop_oneof![Just(0), 0u64..9, 0..u64::from(u32::MAX)];
        let counters = [counter(), counter(), counter(), counter(), counter(), counter(), counter()];
        (relation(), counters).prop_map(|(relation, c)| RelationWork::of_counters(relation, c))
    }

    fn volume() -> impl Strategy<Value = Volume> {
        (0..1u64 << 40, 0..1u64 << 40, 0..1u64 << 40).prop_map(|(records, wal_bytes, image_bytes)| Volume {
            records,
            wal_bytes,
            image_bytes,
        })
    }

    fn work() -> impl Strategy<Value = XactWork> {
        let relations = proptest::collection::btree_map(relation(), relation_work(), 0..5);
        let xid = prop_oneof![3u32..20, any::<u32>()];
        (xid, 0..1u64 << 50, 0..1u64 << 20, volume(), relations).prop_map(
            |(xid, first, distance, volume, relations)| XactWork {
                xid: xid.into(),
                first: first.into(),
                last: Lsn::from(first + distance),
                volume,
                relations: relations
                    .into_iter()
                    .map(|(relation, work)| RelationWork { relation, ..work })
                    .collect(),
            },
        )
    }

    fn detail() -> impl Strategy<Value = SegmentDetail> {
        let ids = || (3u32..40, 0u32..3, any::<u32>());
        (
            proptest::collection::vec(work(), 0..8),
            volume(),
            0u64..3,
            proptest::collection::btree_map(3u32..40, 3u32..40, 0..5),
            proptest::collection::btree_set(ids(), 0..4),
            proptest::collection::vec(ids(), 0..4),
        )
            .prop_map(|(work, unowned, unread_records, parents, locks, truncates)| {
                let mut detail = SegmentDetail { unowned, unread_records, ..SegmentDetail::default() };
                for work in work {
                    detail.add(SegmentDetail { work: vec![work], ..SegmentDetail::default() });
                }
                let parent = |(xid, top): (u32, u32)| SubXact { xid: xid.into(), top: top.into() };
                detail.parents = parents.into_iter().map(parent).collect();
                for (xid, db_oid, rel_oid) in locks {
                    detail.locks.push(ExclusiveLock { xid: xid.into(), db_oid, rel_oid });
                }
                for (xid, db_oid, rel_oid) in truncates {
                    detail.truncates.push(TruncatedOid { xid: xid.into(), db_oid, rel_oid });
                }
                detail
            })
    }

    fn decode(sections: &[(u16, u16, Vec<u8>)], base: Lsn) -> Result<SegmentDetail, Corrupt> {
        let mut detail = SegmentDetail::default();
        for (id, version, bytes) in sections {
            detail.decode_section(*id, *version, base, bytes)?;
        }
        Ok(detail)
    }

    proptest! {
        #[test]
        fn a_detail_comes_back_and_every_truncation_is_refused(detail in detail(), base in 0..1u64 << 50) {
            let sections = detail.encode_sections(base.into());
            prop_assert_eq!(decode(&sections, base.into()), Ok(detail));
            for (id, version, bytes) in &sections {
                for cut in 0..bytes.len() {
                    let cut = [(*id, *version, bytes[..cut].to_vec())];
                    prop_assert!(decode(&cut, base.into()).is_err());
                }
            }
        }

        #[test]
        fn any_bytes_are_read_or_refused(id in 10u16..17, bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = decode(&[(id, 1, bytes)], Lsn::ZERO);
        }

        #[test]
        fn adding_details_one_by_one_or_in_groups_is_the_same(parts in proptest::collection::vec(detail(), 1..5), at in 0usize..5) {
            let sum = |parts: &[SegmentDetail]| {
                let mut sum = SegmentDetail::default();
                parts.iter().for_each(|part| sum.add(part.clone()));
                sum
            };
            let (first, rest) = parts.split_at(at.min(parts.len()));
            let mut grouped = sum(first);
            grouped.add(sum(rest));
            let all = sum(&parts);
            let records = |d: &SegmentDetail| d.work.iter().map(|w| w.volume.records).sum::<u64>();
            prop_assert_eq!(records(&all), parts.iter().map(records).sum::<u64>());
            prop_assert_eq!(grouped, all);
        }
    }

    #[test]
    fn a_section_of_another_version_is_left_alone() {
        let mut detail = SegmentDetail::default();
        detail.decode_section(section::WORK, 2, Lsn::ZERO, &[0xFF]).unwrap();
        detail.decode_section(99, 1, Lsn::ZERO, &[0xFF]).unwrap();
        assert_eq!(detail, SegmentDetail::default());
    }

    #[test]
    fn a_count_that_the_section_cannot_hold_is_refused_before_memory_is_taken() {
        let mut w = Writer::new();
        w.varint(0).varint(1 << 40).bytes(&[0; 70]);
        let err = decode(&[(section::WORK, 1, w.into_bytes())], Lsn::ZERO).unwrap_err();
        assert_eq!(err.to_string(), "count at byte 1 is 1099511627776, more than the 10 allowed");
    }

    #[test]
    fn transactions_out_of_order_are_refused() {
        let mut w = Writer::new();
        w.varint(0).varint(2).bytes(&[5, 0, 0, 1, 30, 0, 0]).bytes(&[0, 0, 0, 1, 30, 0, 0]);
        let err = decode(&[(section::WORK, 1, w.into_bytes())], Lsn::ZERO).unwrap_err();
        assert_eq!(err.field, "xid");
    }
}
