use proptest::prelude::*;

use super::*;
use crate::archive::chain::ChainStart;
use crate::archive::envelope::{FOOTER_BYTES, Footer};
use crate::archive::index::*;
use crate::archive::stored_segment::samples;
use crate::engines::postgres::catalogue::{CatalogueChange, ChangeKind, TupleId};
use crate::{ForkNumber, Lsn, RelFileLocator, SegmentName, SegmentSize, TimelineId, TimestampTz};

const SIZE: u64 = 16 << 20;
const FIRST: u64 = 16;

fn relation(number: u32) -> RelFileLocator {
    RelFileLocator { spc_oid: 1663, db_oid: 5, rel_number: number }
}

/// A record as the tests have it: where it starts, how long it is, what it touches, whether it ends a transaction.
#[derive(Debug, Clone)]
struct Rec {
    start: u64,
    end: u64,
    rel: u32,
    block: u32,
    image: bool,
    ends: bool,
    drops: bool,
}

fn records(segments: u64) -> impl Strategy<Value = Vec<Rec>> {
    let one = (0u64..1 << 20, 1u64..4, 0u32..3, 0u32..40, any::<[bool; 3]>());
    proptest::collection::vec(one, 1..200).prop_map(move |parts| {
        let step = segments * SIZE / (parts.len() as u64 + 1);
        let mut at = FIRST * SIZE;
        let mut records = Vec::new();
        for (gap, length, rel, block, [image, ends, drops]) in parts {
            // Long ones, so that many run over an edge.
            let length = (step * length / 4).clamp(40, SIZE - 1);
            let start = at + gap.min(step / 8);
            let end = start + length;
            if end > (FIRST + segments) * SIZE {
                break;
            }
            records.push(Rec { start, end, rel, block, image, ends, drops });
            at = end;
        }
        records
    })
}

fn xact(r: &Rec) -> XactEnd {
    XactEnd {
        kind: CommitKind::Commit,
        xid: (r.block + 700).into(),
        start: r.start.into(),
        end: r.end.into(),
        time: TimestampTz::from_postgres_micros(r.start.cast_signed()),
        db_oid: None,
        subxacts: vec![(r.rel + 3).into()],
        dropped: if r.drops { vec![relation(r.rel)] } else { Vec::new() },
        gid: None,
    }
}

/// The index of the segments `from..to` over `records`; those that run over the first edge are joined where `joined` says.
fn index_of(records: &[Rec], from: u64, to: u64, joined: bool) -> SegmentIndex {
    let (start, end) = (from * SIZE, to * SIZE);
    let mut info = samples::info(SIZE);
    info.name = SegmentName::containing(TimelineId::FIRST, Lsn::from(start), SegmentSize::DEFAULT);
    info.valid_end = Lsn::from(end);
    let mut index = SegmentIndex::new(info);
    let mut blocks: std::collections::BTreeMap<(u32, u32), IndexedBlock> = std::collections::BTreeMap::new();
    for r in records.iter().filter(|r| r.start < end && r.end > start && (r.start >= start || joined)) {
        if r.ends {
            index.xacts.push(xact(r));
        }
        let found = blocks.entry((r.rel, r.block)).or_insert(IndexedBlock {
            block: r.block,
            last_image: None,
            records_after: 0,
        });
        match r.image && r.start >= start {
            true => {
                *found = IndexedBlock { block: r.block, last_image: Some(r.start.into()), records_after: 0 }
            }
            false => found.records_after += 1,
        }
        if r.start >= start {
            index.rmgrs = vec![RmgrCount {
                rmid: 1,
                records: index.rmgrs.first().map_or(0, |c| c.records) + 1,
                record_bytes: 1,
                image_bytes: 0,
            }];
        }
    }
    for ((rel, _), block) in blocks {
        match index.blocks.last_mut().filter(|f| f.relation == relation(rel)) {
            Some(fork) => fork.blocks.push(block),
            None => index.blocks.push(ForkBlocks {
                relation: relation(rel),
                fork: ForkNumber::Main,
                blocks: vec![block],
            }),
        }
    }
    index
}

/// A row that went, at the start of the segment.
fn names(number: u64) -> NamesLog {
    let change = CatalogueChange {
        lsn: (number * SIZE).into(),
        xid: 700.into(),
        file: relation(1259),
        kind: ChangeKind::Delete { at: TupleId { block: 1, offset: 2 } },
    };
    NamesLog { changes: vec![change], ..NamesLog::default() }
}

fn part(records: &[Rec], number: u64) -> MergedIndex {
    MergedIndex::of_segment(
        index_of(records, number, number + 1, true),
        number,
        [number as u8; 32],
        number.is_multiple_of(2),
        Some(names(number)),
    )
}

fn merged(records: &[Rec], numbers: std::ops::Range<u64>) -> MergedIndex {
    MergedIndex::merge(numbers.map(|n| part(records, n))).unwrap()
}

fn sealed(index: MergedIndex) -> MergedObject {
    let chain = ChainStart::new(42.into(), "000000010000000000000003".parse().unwrap());
    MergedObject { builder: MERGE_BUILDER, chain, index }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn what_is_merged_says_what_one_index_of_the_whole_would(records in records(8)) {
        let merged = merged(&records, FIRST..FIRST + 8);
        let whole = index_of(&records, FIRST, FIRST + 8, false);
        prop_assert_eq!(&merged.all.xacts, &whole.xacts);
        let drops: Vec<_> = whole.xacts.iter().filter(|x| !x.dropped.is_empty()).cloned().collect();
        prop_assert_eq!(&merged.drops, &drops);
        prop_assert_eq!(merged.all.rmgrs.first().map(|c| c.records), whole.rmgrs.first().map(|c| c.records));
        // The same blocks with the same images; a record that runs over an edge may be counted on both sides.
        let shape = |i: &SegmentIndex| i.blocks.iter().flat_map(|f| f.blocks.iter().map(|b| (f.relation, b.block, b.last_image))).collect::<Vec<_>>();
        prop_assert_eq!(shape(&merged.all), shape(&whole));
        for (a, b) in merged.all.blocks.iter().flat_map(|f| &f.blocks).zip(whole.blocks.iter().flat_map(|f| &f.blocks)) {
            prop_assert!(a.records_after >= b.records_after);
        }
        for x in &whole.xacts {
            let holds = merged.segments.iter().filter(|s| s.may_end(x.xid)).count();
            prop_assert!(holds >= 1);
        }
    }

    #[test]
    fn merging_in_steps_is_merging_at_once(records in records(8)) {
        let at_once = merged(&records, FIRST..FIRST + 8);
        let steps = [merged(&records, FIRST..FIRST + 3), merged(&records, FIRST + 3..FIRST + 4), merged(&records, FIRST + 4..FIRST + 8)];
        prop_assert_eq!(&MergedIndex::merge(steps.clone()).unwrap(), &at_once);
        let reduced = MergedIndex::merge(steps.map(MergedIndex::reduced)).unwrap();
        prop_assert_eq!(&reduced, &at_once.clone().reduced());
        // What is left of the blocks is which they are.
        let whole: Vec<_> = at_once.all.blocks.iter().flat_map(|f| f.blocks.iter().map(|b| (f.relation, b.block))).collect();
        let runs = reduced.touched.iter().flat_map(|f| f.runs.iter().flat_map(move |(first, n)| (0..*n).map(move |i| (f.relation, first + i))));
        prop_assert_eq!(runs.collect::<Vec<_>>(), whole);
        prop_assert!(reduced.touched.iter().all(|f| f.runs.windows(2).all(|w| w[0].0 + w[0].1 < w[1].0)));
    }

    #[test]
    fn an_object_comes_back_whole_and_by_its_sections(records in records(4), reduce: bool) {
        let index = merged(&records, FIRST..FIRST + 4);
        let object = sealed(if reduce { index.reduced() } else { index });
        let bytes = object.encode();
        prop_assert_eq!(&MergedObject::decode(&bytes).unwrap(), &object);
        let size = bytes.len() as u64;
        let directory = MergedDirectory::decode(&bytes, size).unwrap().unwrap();
        let Err(needed) = MergedDirectory::decode(&bytes[bytes.len() - 32..], size).unwrap() else { panic!() };
        prop_assert_eq!(&MergedDirectory::decode(&bytes[bytes.len() - needed as usize..], size).unwrap().unwrap(), &directory);
        let read = |s| directory.range(s).map_or(&[][..], |r| &bytes[r.start as usize..r.end as usize]);
        prop_assert_eq!(&directory.read_segments(read(MergedSection::Segments)).unwrap(), &object.index.segments);
        prop_assert_eq!(&directory.read_drops(read(MergedSection::Drops)).unwrap(), &object.index.drops);
        prop_assert_eq!(&directory.read_relations(read(MergedSection::Relations)).unwrap(), &object.index.relations);
        prop_assert_eq!(&directory.read_touched(read(MergedSection::Touched)).unwrap(), &object.index.touched);
        let lists = [MergedSection::Xacts, MergedSection::Blocks, MergedSection::Rmgrs].map(|s| (s, read(s)));
        prop_assert_eq!(&directory.read_lists(&lists).unwrap(), &object.index.all);
        prop_assert_eq!(&directory.read_names(read(MergedSection::Names)).unwrap(), &object.index.names);
        prop_assert_eq!(object.index.names.as_ref().map(|n| n.changes.len()), Some(4));
        prop_assert_eq!(object.head().unwrap().hash, directory.after);
    }

    #[test]
    fn any_list_of_a_segments_index_comes_back(mut index in samples::index()) {
        // Segments with faults are not merged.
        index.faults.clear();
        let pushed_by = index.pushed_by.clone();
        let object = sealed(MergedIndex::of_segment(index, 7, [3; 32], false, None));
        prop_assert_eq!(&object.index.segments[0].pushed_by, &pushed_by);
        prop_assert_eq!(MergedObject::decode(&object.encode()).unwrap(), object);
    }

    #[test]
    fn any_bytes_are_a_merged_index_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(MergedObject::decode(&bytes).is_err());
        let _ = MergedDirectory::decode(&bytes, bytes.len() as u64);
    }
}

fn some_records() -> Vec<Rec> {
    (0..30u64)
        .map(|n| {
            let start = FIRST * SIZE + n * SIZE / 9;
            Rec {
                start,
                end: start + SIZE / 9,
                rel: n as u32 % 3,
                block: n as u32,
                image: n % 2 == 0,
                ends: n % 3 == 0,
                drops: n % 6 == 0,
            }
        })
        .collect()
}

#[test]
fn the_last_step_made_of_the_steps_below_says_what_its_segments_say() {
    let [first_step, .., last_step] = MERGE_STEPS;
    let gap = SIZE / 3;
    let record = |n: u64| Rec {
        start: FIRST * SIZE + n * gap,
        // Every third runs over an edge.
        end: FIRST * SIZE + n * gap + gap * 9 / 10,
        rel: (n % 5 + 7 * u64::from(n.is_multiple_of(1000))) as u32,
        block: (n / 40 % 3000) as u32,
        image: n.is_multiple_of(4),
        ends: n.is_multiple_of(7),
        drops: n.is_multiple_of(49),
    };
    let records: Vec<_> = (0..last_step * 3).map(record).collect();
    // Of each segment only what lies near it.
    let near = |n: u64| {
        let place = usize::try_from((n - FIRST) * 3).unwrap();
        part(&records[place.saturating_sub(2)..(place + 4).min(records.len())], n)
    };
    let all = || (FIRST..FIRST + last_step).map(near);
    // As objects, read back at each step.
    let mut parts: Vec<MergedIndex> = all().collect();
    let mut sizes = Vec::new();
    while parts.len() > 1 {
        let merge = |chunk: &[MergedIndex]| {
            let is_first = chunk[0].segments.len() == 1;
            let parts = chunk.iter().cloned().map(|part| if is_first { part } else { part.reduced() });
            let merged = MergedIndex::merge(parts).unwrap();
            let bytes = sealed(if is_first { merged.narrowed() } else { merged }).encode();
            MergedObject::decode(&bytes).unwrap().index
        };
        parts = parts.chunks(first_step as usize).map(merge).collect();
        sizes.push(parts.len() as u64);
    }
    assert_eq!(sizes, MERGE_STEPS.map(|step| last_step / step));
    let last = parts.remove(0);
    assert_eq!(last, MergedIndex::merge(all()).unwrap().reduced());
    assert_eq!((last.segments.len() as u64, last.is_reduced), (last_step, true));
    // Which segments touch a relation, and which drop one, is still told one by one.
    let touching = |rel: u32| {
        let runs = last.relations.iter().find(|r| r.relation == relation(rel)).map(|r| &r.segments);
        runs.into_iter().flatten().flat_map(|(first, count)| *first..first + count).collect::<Vec<_>>()
    };
    for rel in 0..12 {
        let touches =
            |n: &u32| near(FIRST + u64::from(*n)).relations.iter().any(|r| r.relation == relation(rel));
        assert_eq!(touching(rel), (0..last_step as u32).filter(touches).collect::<Vec<_>>(), "{rel}");
    }
    let dropping = records.iter().filter(|r| r.ends && r.drops).map(|r| Lsn::from(r.start));
    assert_eq!(last.drops.iter().map(|x| x.start).collect::<Vec<_>>(), dropping.collect::<Vec<_>>());
}

#[test]
fn every_flipped_byte_and_every_truncation_is_refused() {
    let object = sealed(merged(&some_records(), FIRST..FIRST + 3)).encode();
    assert!(MergedObject::decode(&object).is_ok());
    for i in 0..object.len() {
        let mut bad = object.clone();
        bad[i] ^= 0x40;
        assert!(MergedObject::decode(&bad).is_err(), "byte {i}");
        assert!(MergedObject::decode(&object[..i]).is_err(), "cut at {i}");
    }
}

#[test]
fn segments_that_do_not_follow_one_another_are_not_merged() {
    let records = some_records();
    let parts = |numbers: &[u64]| MergedIndex::merge(numbers.iter().map(|n| part(&records, *n)));
    assert!(parts(&[]).is_none());
    assert!(parts(&[FIRST, FIRST + 2]).is_none());
    assert!(parts(&[FIRST + 1, FIRST]).is_none());
    let mixed = [part(&records, FIRST), part(&records, FIRST + 1).reduced()];
    assert!(MergedIndex::merge(mixed).is_none());
}

#[test]
fn names_are_merged_where_all_parts_have_them() {
    let records = some_records();
    let parts = || (FIRST..FIRST + 3).map(|n| part(&records, n));
    let places =
        |m: &MergedIndex| m.names.as_ref().map(|n| n.changes.iter().map(|c| c.lsn).collect::<Vec<_>>());
    let all = [FIRST, FIRST + 1, FIRST + 2].map(|n| Lsn::from(n * SIZE)).to_vec();
    assert_eq!(places(&MergedIndex::merge(parts()).unwrap()), Some(all));
    let lacking = parts().enumerate().map(|(n, part)| match n {
        1 => MergedIndex { names: None, ..part },
        _ => part,
    });
    let merged = MergedIndex::merge(lacking).unwrap();
    assert_eq!(places(&merged), None);
    // An object without them says so, and is read for the rest.
    let bytes = sealed(merged.clone()).encode();
    assert_eq!(MergedObject::decode(&bytes).unwrap().index, merged);
    let directory = MergedDirectory::decode(&bytes, bytes.len() as u64).unwrap().unwrap();
    assert_eq!((directory.range(MergedSection::Names), directory.read_names(&[])), (None, Ok(None)));
}

#[test]
fn a_chain_that_is_not_the_segments_is_refused() {
    let object = sealed(merged(&some_records(), FIRST..FIRST + 3));
    let mut bytes = object.encode();
    let footer = Footer::decode(&bytes, bytes.len() as u64).unwrap();
    // Another hash behind the last segment, under checksums that are right.
    let after = object.head().unwrap().hash;
    let at = bytes.windows(32).position(|w| w == after.bytes()).unwrap();
    bytes[at] ^= 1;
    bytes.truncate(bytes.len() - FOOTER_BYTES);
    Footer::append(&mut bytes, footer.directory_bytes);
    let error = MergedObject::decode(&bytes).unwrap_err();
    assert_eq!(error.field, "chain");
}
