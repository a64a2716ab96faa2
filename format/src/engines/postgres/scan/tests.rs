use super::*;
use crate::archive::{CheckpointKind, CommitKind, FileEventKind};
use crate::engines::postgres::wal::Compression;
use crate::engines::postgres::wal::testing::{
    RELATION, TestBlock, TestImage, WalBuilder, small_segments, system_id,
};
use crate::ids::{ForkNumber, TimelineId, Xid};
use crate::reader::Writer;

const MB: usize = 1 << 20;

fn tli(v: u32) -> TimelineId {
    TimelineId::new(v).unwrap()
}

fn context(name: SegmentName) -> ScanContext<'static> {
    ScanContext::new(name, small_segments())
}

fn commit(builder: &mut WalBuilder, xid: u32, time: i64) -> Lsn {
    builder.push(1, 0, xid, &[], &time.to_le_bytes())
}

/// A checkpoint's payload of 15.
fn checkpoint(redo: Lsn, timeline: u32, previous: u32) -> Vec<u8> {
    let mut w = Writer::new();
    w.u64(redo.get()).u32(timeline).u32(previous).u8(1).bytes(&[0; 7]).u64(740);
    w.bytes(&[0; 32]).i64(1_763_659_800).bytes(&[0; 16]);
    w.into_bytes()
}

fn full_segment() -> (WalBuilder, Vec<(SegmentName, Vec<u8>)>) {
    let mut b = WalBuilder::new(PgMajor::V15, small_segments());
    commit(&mut b, 740, 100);
    b.fill_segment(504);
    b.message(4000);
    commit(&mut b, 741, 90);
    b.switch();
    let segments = b.finish_segments();
    (b, segments)
}

#[test]
fn what_the_records_say_is_in_the_index() {
    let mut b = WalBuilder::new(PgMajor::V15, small_segments());
    let heap = |id, block| TestBlock::data(id, ForkNumber::Main, block, b"tuple");
    b.push(10, 0x00, 740, &[heap(0, 40_000)], &[1, 0, 1]);
    let image = b.push(
        10,
        0x00,
        740,
        &[TestBlock::image(0, 7, TestImage::new(3, (100, 900), Compression::Lz4))],
        &[1, 0, 0],
    );
    b.push(10, 0x00, 740, &[heap(0, 7)], &[1, 0, 0]);
    let mut only_checked = TestImage::new(3, (0, 0), Compression::None);
    only_checked.apply = false;
    b.push(10, 0x00, 740, &[TestBlock::image(0, 7, only_checked)], &[1, 0, 0]);
    let init = TestBlock { will_init: true, ..heap(0, 8) };
    let init = b.push(10, 0x80, 740, &[init], &[1, 0, 0]);

    let mut main = 100i64.to_le_bytes().to_vec();
    main.extend_from_slice(&(1u32 | 1 << 2).to_le_bytes());
    for v in [5u32, 1663, 1, 1663, 5, 16500] {
        main.extend_from_slice(&v.to_le_bytes());
    }
    let dropper = b.push(1, 0x80, 740, &[], &main);
    b.push(1, 0x20, 741, &[], &90i64.to_le_bytes());
    let mut point = 95i64.to_le_bytes().to_vec();
    point.extend_from_slice(b"before migration");
    point.resize(72, 0);
    b.push(0, 0x70, 0, &[], &point);
    let redo = b.at();
    b.push(0, 0x10, 0, &[], &checkpoint(redo, 1, 1));
    let mut truncate = Writer::new();
    truncate.u32(3).u32(1663).u32(5).u32(16384).u32(7);
    b.push(2, 0x20, 742, &[], truncate.as_bytes());
    let mut running = Writer::new();
    running.u32(1).u32(0).u32(0).u32(750).u32(742).u32(741).u32(742);
    b.push(8, 0x10, 0, &[], running.as_bytes());
    b.switch();

    let (name, bytes) = b.finish_segments().remove(0);
    let scan = scan_segment(&bytes, &context(name)).unwrap();
    let index = &scan.index;
    assert_eq!(index.info.records, b.records.len() as u64);
    assert_eq!(
        (index.info.first_record, index.info.last_record),
        (b.records.first().copied(), b.records.last().copied())
    );
    assert_eq!(
        (index.info.system_id, index.info.major, index.info.ending),
        (system_id(), PgMajor::V15, Ending::Switch)
    );
    assert_eq!(index.info.valid_end, name.end(small_segments()).unwrap());
    assert!(scan.void.unwrap().blank);

    let kinds: Vec<_> = index.xacts.iter().map(|x| (x.kind, x.xid, x.time.postgres_micros())).collect();
    assert_eq!(kinds, [(CommitKind::Commit, Xid::from(740), 100), (CommitKind::Abort, Xid::from(741), 90)]);
    assert_eq!((index.xacts[0].start, index.xacts[0].db_oid), (dropper, Some(5)));
    assert_eq!(index.xacts[0].dropped[0].rel_number, 16500);
    let times = [
        index.info.first_time,
        index.info.last_time,
        index.info.min_time,
        index.info.max_time,
        index.info.last_commit_time,
    ];
    assert_eq!(times.map(|t| t.unwrap().postgres_micros()), [100, 90, 90, 100, 100]);
    assert_eq!(index.info.commits, 1);
    assert_eq!(index.restore_points[0].name, "before migration");
    assert_eq!((index.checkpoints[0].kind, index.checkpoints[0].redo), (CheckpointKind::Online, redo));
    assert_eq!(
        index.file_events[0].kind,
        FileEventKind::Truncate { relation: RELATION, blocks: 3, flags: 7 }
    );
    assert_eq!(
        (index.running_xacts[0].running, index.running_xacts[0].oldest_running_xid),
        (1, Xid::from(742))
    );
    assert!(index.timeline_ends.is_empty() && index.faults.is_empty());

    let forks: Vec<_> = index.blocks.iter().map(|f| (f.relation, f.fork)).collect();
    assert_eq!(forks, [(RELATION, ForkNumber::Main), (RELATION, ForkNumber::Vm)]);
    let main: Vec<_> =
        index.blocks[0].blocks.iter().map(|b| (b.block, b.last_image, b.records_after)).collect();
    assert_eq!(main, [(7, Some(image), 2), (8, Some(init), 0), (40_000, None, 1)]);
    assert_eq!((index.blocks[1].blocks[0].block, index.blocks[1].blocks[0].records_after), (1, 1));
    let heap_count = index.rmgrs.iter().find(|c| c.rmid == 10).unwrap();
    assert_eq!((heap_count.records, heap_count.image_bytes > 8000), (5, true));
    let total: u64 = index.rmgrs.iter().map(|c| c.records).sum();
    assert_eq!(total, index.info.records);
}

#[test]
fn a_record_over_the_edge_is_pending_until_a_neighbour_joins_it() {
    let (b, segments) = full_segment();
    let over = b.records[b.records.len() - 3];
    let [(first, first_bytes), (second, second_bytes)] = &segments[..] else { panic!() };

    let alone = scan_segment(first_bytes, &context(*first)).unwrap();
    let pending = alone.index.info.pending.unwrap();
    assert_eq!((pending.start, pending.here_bytes, pending.joined), (over, 504, false));
    assert_eq!((alone.index.info.ending, alone.index.info.last_record), (Ending::Full, Some(over)));
    assert_eq!(alone.index.info.records, b.records.len() as u64 - 2);

    let joined =
        scan_segment(first_bytes, &ScanContext { next: Some(second_bytes), ..context(*first) }).unwrap();
    assert!(joined.index.info.pending.unwrap().joined);
    assert_eq!(joined.index.info.records, alone.index.info.records);
    assert_eq!(joined.tail, alone.tail);

    let unjoined = scan_segment(second_bytes, &context(*second)).unwrap();
    assert!(!unjoined.index.info.head_joined && unjoined.index.info.continued_bytes > 0);
    for log in [PreviousLog::Bytes(first_bytes), PreviousLog::Tail(alone.tail.clone().unwrap())] {
        let previous = Some(Previous { name: *first, log });
        let scan = scan_segment(second_bytes, &ScanContext { previous, ..context(*second) }).unwrap();
        assert!(scan.index.info.head_joined);
        // It is counted where it begins.
        assert_eq!(scan.index.info.records, 2);
        assert_eq!(scan.index.info.first_prev, Some(over));
    }
}

/// A transaction's end that says where it came from.
fn replicated(builder: &mut WalBuilder, xid: u32) -> Lsn {
    let mut main = Writer::new();
    main.i64(100).u32(1 << 5).u64(0x99).i64(80);
    builder.push(1, 0x80, xid, &[], main.as_bytes())
}

#[test]
fn what_is_no_page_is_listed_where_no_other_list_tells_it() {
    let mut b = WalBuilder::new(PgMajor::V15, small_segments());
    commit(&mut b, 740, 100);
    let replicated = replicated(&mut b, 741);
    b.push(1, 0x50, 742, &[], &[0; 8]);
    let oid = b.push(0, 0x30, 0, &[], &30_000u32.to_le_bytes());
    b.push(8, 0x10, 0, &[], &[0; 24]);
    b.message(4000);
    let heap = |block| TestBlock::data(0, ForkNumber::Main, block, b"tuple");
    b.push(10, 0x00, 743, &[heap(40_000)], &[1, 0, 0]);
    b.push(10, 0x80, 743, &[TestBlock { will_init: true, ..heap(8) }], &[7; 99]);
    b.push(10, 0x00, 743, &[heap(9)], &[1, 0, 0]);
    // Over the edge, with the page of the visibility map that it clears without naming it.
    b.fill_segment(40);
    let over = b.push(10, 0x00, 750, &[heap(40_001)], &[1, 0, 1]);
    b.switch();
    let segments = b.finish_segments();
    let [(first, first_bytes), (second, second_bytes)] = &segments[..] else { panic!() };

    let scan = scan_segment(first_bytes, &context(*first)).unwrap();
    let state = scan.index.state.unwrap();
    assert_eq!(state.kinds, [(1, 0x50), (8, 0x10), (10, 0x00), (10, 0x80), (21, 0x00)]);
    let listed: Vec<_> = state.records.iter().map(|r| (r.start, r.rmid, r.xid.get(), r.main.len())).collect();
    assert_eq!(listed, [(replicated, 1, 741, 28), (oid, 0, 0, 4)]);
    assert_eq!(state.records[1].end, state.records[1].start.saturating_add(32));
    assert_eq!((state.newest_xid, state.page_main_bytes, state.head), (Xid::from(743), 99, None));

    let alone = scan_segment(second_bytes, &context(*second)).unwrap().index.state.unwrap();
    let switch = |state: &crate::archive::SegmentState| (state.records.len(), state.records[0].info);
    assert_eq!((switch(&alone), alone.head, alone.kinds.len()), ((1, 0x40), None, 0));
    let previous = Some(Previous { name: *first, log: PreviousLog::Bytes(first_bytes) });
    let joined = scan_segment(second_bytes, &ScanContext { previous, ..context(*second) }).unwrap();
    let state = joined.index.state.unwrap();
    let head = state.head.as_ref().unwrap();
    assert_eq!((head.start, head.xid, state.newest_xid), (over, Xid::from(750), Xid::INVALID));
    let pages = [(RELATION, ForkNumber::Main, 40_001), (RELATION, ForkNumber::Vm, 1)];
    assert_eq!((head.pages.as_slice(), switch(&state)), (&pages[..], (1, 0x40)));
    assert_eq!(state.kinds, [(10, 0x00)]);
    // Where what follows is at hand it is a record as any other.
    let next = ScanContext { next: Some(second_bytes), ..context(*first) };
    assert_eq!(scan_segment(first_bytes, &next).unwrap().index.state.unwrap().newest_xid, Xid::from(750));
}

#[test]
fn more_than_an_index_should_hold_is_not_listed() {
    let mut b = WalBuilder::new(PgMajor::V15, small_segments());
    for _ in 0..4 {
        b.push(1, 0x10, 740, &[], &vec![1; 64 << 10]);
    }
    let all = b.finish_segments().remove(0);
    b.push(0, 0x30, 0, &[], &30_000u32.to_le_bytes());
    let more = b.finish_segments().remove(0);
    let state = |(name, bytes): &(SegmentName, Vec<u8>)| {
        let partial = ScanContext { mode: ScanMode::Partial, ..context(*name) };
        scan_segment(bytes, &partial).unwrap().index.state
    };
    assert_eq!(state(&all).unwrap().records.len(), 4);
    assert_eq!(state(&more), None);
}

#[test]
fn a_segment_that_does_not_go_on_with_the_one_before_is_refused() {
    let (_, segments) = full_segment();
    let [(first, first_bytes), (second, second_bytes)] = &segments[..] else { panic!() };
    let mut other = WalBuilder::new(PgMajor::V15, small_segments());
    other.message(3);
    other.fill_segment(504);
    other.message(5000);
    let other_bytes = other.finish_segments().remove(0).1;
    let previous = Some(Previous { name: *first, log: PreviousLog::Bytes(&other_bytes) });
    let err = scan_segment(second_bytes, &ScanContext { previous, ..context(*second) }).unwrap_err();
    assert!(matches!(err, ScanError::Damaged(d) if d.corrupt.field == "xlp_rem_len"), "{err}");

    // One bit of the part that lies in the segment before is this record's damage too.
    let mut torn = first_bytes.clone();
    torn[MB - 100] ^= 1;
    let previous = Some(Previous { name: *first, log: PreviousLog::Bytes(&torn) });
    let err = scan_segment(second_bytes, &ScanContext { previous, ..context(*second) }).unwrap_err();
    assert!(matches!(err, ScanError::Damaged(d) if d.corrupt.field == "xl_crc"), "{err}");

    // What cannot be read up to its end says nothing.
    let mut broken = first_bytes.clone();
    broken[MB - 3 * PAGE_BYTES..MB - PAGE_BYTES].fill(0x11);
    broken[MB - PAGE_BYTES + 16] ^= 1;
    let previous = Some(Previous { name: *first, log: PreviousLog::Bytes(&broken) });
    assert!(
        !scan_segment(second_bytes, &ScanContext { previous, ..context(*second) })
            .unwrap()
            .index
            .info
            .head_joined
    );
}

#[test]
fn another_timelines_segment_is_not_this_ones_past() {
    let (_, segments) = full_segment();
    let (first, first_bytes) = &segments[0];
    // Timeline 2 left timeline 1 inside the first segment, so its second goes on with its own copy of it.
    let mut b = WalBuilder::new(PgMajor::V15, small_segments());
    commit(&mut b, 740, 100);
    let fork = b.at();
    b.switch_timeline(tli(2));
    b.fill_segment(0);
    b.message(10);
    b.switch();
    let of_two = b.finish_segments();
    let (second, second_bytes) = &of_two[1];
    let previous = Some(Previous { name: *first, log: PreviousLog::Bytes(first_bytes) });
    let without_history = ScanContext { previous: previous.clone(), ..context(*second) };
    assert!(scan_segment(second_bytes, &without_history).is_ok());
    let history = History::root(tli(1)).branch(tli(2), fork, "test").unwrap();
    let with_history = ScanContext { history: Some(&history), ..without_history };
    assert!(scan_segment(second_bytes, &with_history).is_ok());

    // Its first segment carries pages of timeline 1 up to the fork.
    let (name, bytes) = &of_two[0];
    assert_eq!(name.timeline(), tli(2));
    let scan = scan_segment(bytes, &ScanContext { history: Some(&history), ..context(*name) }).unwrap();
    assert_eq!((scan.index.info.first_page_timeline, scan.index.info.last_page_timeline), (tli(1), tli(2)));
    let err = scan_segment(bytes, &context(name.on(tli(1)))).unwrap_err();
    assert!(err.to_string().starts_with("xlp_tli at byte 8196 is 2, more than the 1 allowed"), "{err}");
}

#[test]
fn names_lengths_and_positions_are_checked() {
    let (_, segments) = full_segment();
    let (name, bytes) = &segments[0];
    let short = scan_segment(&bytes[..MB - 1], &context(*name)).unwrap_err();
    assert_eq!(short.to_string(), "it has 1048575 bytes, a segment has 1048576");
    let next = name.next(small_segments()).unwrap();
    let elsewhere = scan_segment(bytes, &context(next)).unwrap_err();
    assert_eq!(
        elsewhere.to_string(),
        "xlp_pageaddr at byte 8 is 0x1000000, expected 0x1100000, LSN 0/1100008"
    );
    let odd: SegmentName = "000000010000000000001000".parse().unwrap();
    let err = scan_segment(bytes, &context(odd)).unwrap_err();
    assert_eq!(err.to_string(), "no segment of 1048576 bytes is called 000000010000000000001000");
    let others = [SystemId::from(1)];
    let err = scan_segment(bytes, &ScanContext { system_ids: &others, ..context(*name) }).unwrap_err();
    assert!(matches!(err, ScanError::Damaged(d) if d.corrupt.field == "xlp_sysid"));
}

#[test]
fn a_log_that_stops_early_is_told_from_a_hole_in_it() {
    let mut b = WalBuilder::new(PgMajor::V15, small_segments());
    b.fill_segment(MB / 2);
    let end = b.at();
    let (name, bytes) = b.finish_segments().remove(0);
    let err = scan_segment(&bytes, &context(name)).unwrap_err();
    assert!(matches!(err, ScanError::EndsEarly(e) if e.valid_end == end), "{err}");
    let partial = ScanContext { mode: ScanMode::Partial, ..context(name) };
    for bytes in [&bytes[..], &bytes[..MB / 2 + 5]] {
        let scan = scan_segment(bytes, &partial).unwrap();
        assert_eq!((scan.index.info.ending, scan.index.info.valid_end), (Ending::EndOfLog, end));
        assert_eq!((scan.tail, scan.index.faults.len()), (None, 0));
    }

    let (_, segments) = full_segment();
    let (name, bytes) = &segments[0];
    let mut hole = bytes.clone();
    hole[10 * PAGE_BYTES..12 * PAGE_BYTES].fill(0);
    let err = scan_segment(&hole, &context(*name)).unwrap_err();
    assert!(matches!(err, ScanError::Damaged(d) if d.corrupt.field == "xlp_magic"), "{err}");
    let forced = scan_segment(&hole, &ScanContext { mode: ScanMode::Forced, ..context(*name) }).unwrap();
    assert_eq!((forced.index.info.ending, forced.index.faults.len()), (Ending::Fault, 1));
    assert!(forced.index.info.valid_end <= Lsn::from(0x100_0000 + 10 * PAGE_BYTES as u64));
}

#[test]
fn damage_is_refused_or_written_down_when_forced() {
    let (_, segments) = full_segment();
    let (name, bytes) = &segments[0];
    let mut damaged = bytes.clone();
    damaged[MB / 2 + 77] ^= 4;
    let err = scan_segment(&damaged, &context(*name)).unwrap_err();
    assert!(matches!(err, ScanError::Damaged(d) if d.corrupt.field == "xl_crc"), "{err}");
    let forced = scan_segment(&damaged, &ScanContext { mode: ScanMode::Forced, ..context(*name) }).unwrap();
    assert_eq!(forced.index.faults[0].message, err.to_string());
    assert_eq!((forced.index.info.ending, forced.end.reason), (Ending::Fault, EndReason::Damage));
    assert_eq!(forced.index.xacts.len(), 1);
}

#[test]
fn a_record_that_is_whole_but_not_understood_is_noted_and_admitted() {
    let mut b = WalBuilder::new(PgMajor::V15, small_segments());
    let at = b.push(1, 0x80, 740, &[], &[0; 9]);
    b.switch();
    let (name, bytes) = b.finish_segments().remove(0);
    let scan = scan_segment(&bytes, &context(name)).unwrap();
    assert_eq!(
        scan.index.faults[0].message,
        format!("the Transaction record at {at} cannot be read: xinfo at byte 8 needs 4 bytes, 1 are left")
    );
    assert_eq!(scan.index.info.ending, Ending::Switch);
}

#[test]
fn old_content_behind_a_switch_is_legal() {
    let mut b = WalBuilder::new(PgMajor::V15, small_segments());
    b.message(100);
    b.switch();
    let (name, mut bytes) = b.finish_segments().remove(0);
    bytes[5 * PAGE_BYTES..].fill(0x77);
    let scan = scan_segment(&bytes, &context(name)).unwrap();
    assert!(!scan.void.unwrap().blank);
    assert_eq!(scan.index.info.ending, Ending::Switch);
}

#[test]
fn copies_are_compared_as_far_as_the_shorter_goes() {
    let mut b = WalBuilder::new(PgMajor::V15, small_segments());
    b.fill_segment(MB / 2 + 104);
    let middle = b.at();
    let mut short = b.clone();
    b.message(100);
    let long = b.finish_segments().remove(0).1;
    short.switch_timeline(tli(1));
    let short_bytes = short.finish_segments().remove(0).1;
    let span = SegmentSpan::containing(Lsn::from(0x100_0000), small_segments()).unwrap();
    let compare = |a: &[u8], b: &[u8]| common_prefix(a, b, span).unwrap();
    assert_eq!(compare(&long, &short_bytes), Agreement::FirstIsLonger);
    assert_eq!(compare(&short_bytes, &long), Agreement::SecondIsLonger);
    assert_eq!(compare(&long, &long), Agreement::Same);
    assert_eq!(compare(&long, &long[..MB / 2 + PAGE_BYTES]), Agreement::Same);
    let mut old_content = short_bytes.clone();
    old_content[MB / 2 + PAGE_BYTES..].fill(0x33);
    assert_eq!(compare(&short_bytes, &old_content), Agreement::Same);
    short.message(99);
    let other = short.finish_segments().remove(0).1;
    assert_eq!(compare(&long, &other), Agreement::Diverge { at: middle });

    // A record over the edge counts with what of it lies here.
    let (_, segments) = full_segment();
    let full = &segments[0].1;
    let mut cut = full.clone();
    cut[MB - 504..].fill(0);
    assert_eq!(compare(full, &cut), Agreement::FirstIsLonger);
    let mut other_end = full.clone();
    other_end[MB - 9] ^= 1;
    assert!(matches!(compare(full, &other_end), Agreement::Diverge { .. }));
    let second = SegmentSpan::containing(Lsn::from(0x110_0000), small_segments()).unwrap();
    let mut other_head = segments[1].1.clone();
    other_head[100] ^= 1;
    let compared = common_prefix(&segments[1].1, &other_head, second).unwrap();
    assert_eq!(compared, Agreement::Diverge { at: second.start() });
}

/// Bytes that are given only as [`WalBytes`] promises that they are asked for.
struct Strict<'a> {
    bytes: &'a [u8],
    page: usize,
}

impl WalBytes for Strict<'_> {
    fn length(&self) -> usize {
        self.bytes.len()
    }

    fn part(&mut self, range: std::ops::Range<usize>) -> Option<&[u8]> {
        let page = range.start / PAGE_BYTES;
        assert!(range.is_empty() || (range.end - 1) / PAGE_BYTES == page, "{range:?} is more than a page");
        assert!(page >= self.page, "page {page} is asked for after page {}", self.page);
        self.page = page;
        self.bytes.get(range)
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(200))]
    #[test]
    fn a_segment_is_read_forwards_whatever_it_holds(
        messages in 0usize..450,
        switched: bool,
        large in 0usize..100_000,
        damage in proptest::collection::vec((0usize..MB, 1u8..), 0..3),
        blank in proptest::option::of((0usize..128, 0usize..128)),
        length in 0usize..2 * MB,
        mode in 0usize..3,
    ) {
        let mut b = WalBuilder::new(PgMajor::V15, small_segments());
        commit(&mut b, 740, 100);
        b.message(large);
        for _ in 0..messages {
            b.message(2500);
        }
        if switched {
            b.switch();
        }
        let segments = b.finish_segments();
        for (name, bytes) in &segments {
            let mut bytes = bytes.clone();
            for (at, by) in &damage {
                bytes[*at] ^= by;
            }
            if let Some((from, pages)) = blank {
                let from = from * PAGE_BYTES;
                bytes[from..(from + pages * PAGE_BYTES).min(MB)].fill(0);
            }
            let bytes = &bytes[..length.min(MB)];
            let mode = [ScanMode::Whole, ScanMode::Partial, ScanMode::Forced][mode];
            let context = ScanContext { mode, ..context(*name) };
            let forwards = scan_segment(Strict { bytes, page: 0 }, &context);
            proptest::prop_assert_eq!(format!("{forwards:?}"), format!("{:?}", scan_segment(bytes, &context)));
        }
    }
}
