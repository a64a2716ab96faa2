//! The WAL as its own oracle: with `wal_consistency_checking` each record carries the page as it must be afterwards.
//! Each record is applied to the page as the records before left it, and the two are compared under PostgreSQL's masks.

use std::collections::{BTreeMap, HashMap};
use std::fs;

use waltide_format::engines::postgres::wal::{
    Expected, Next, Record, RecordStream, Rmgr, SegmentSpan, implicit_vm_blocks,
};
use waltide_format::{BLOCK_BYTES, BlockNumber, ForkNumber, RelFileLocator, SegmentName, SegmentSize};
use waltide_replay::engines::postgres::redo::{
    Applied, Cluster as Setting, Page, apply, clear_visibility, knows,
};
use waltide_tests::pages::masked;
use waltide_tests::workload::{EVERY_RMGR_SETTINGS, every_rmgr};
use waltide_tests::{Cluster, Scratch, StopMode};

type Place = (RelFileLocator, ForkNumber, BlockNumber);

#[derive(Default)]
struct Replay {
    pages: HashMap<Place, Page>,
    /// How many after-images were compared, by resource manager and kind of record.
    compared: BTreeMap<(u8, u8), u64>,
    /// Kinds that redo does not know.
    unknown: BTreeMap<(u8, u8), u64>,
}

impl Replay {
    fn take(&mut self, record: &Record<'_>) {
        let setting = Setting { logs_hints: true };
        let kind = (record.rmgr().get(), record.kind());
        for block in record.blocks() {
            let place = (block.relation, block.fork, block.block);
            let is_whole = block.makes_page_anew();
            if !knows(record) && !block.image.is_some_and(|image| image.apply()) {
                *self.unknown.entry(kind).or_default() += 1;
            } else if is_whole || self.pages.contains_key(&place) {
                let page = self.pages.entry(place).or_default();
                let applied = apply(record, block.id, page, setting);
                let applied = applied.unwrap_or_else(|e| panic!("{e}: {}", e.source));
                assert_ne!(applied, Applied::Ahead, "{}", record.start);
                if applied == Applied::Changed {
                    assert_eq!(page.lsn(), record.end);
                }
            }
            let Some(image) = block.image else { continue };
            let mut expected = [0; BLOCK_BYTES];
            image.restore(&mut expected).unwrap();
            if let Some(page) = self.pages.get(&place).filter(|_| knows(record) && !image.apply()) {
                compare(record, &place, page, &expected);
                *self.compared.entry(kind).or_default() += 1;
            }
            if !knows(record) || !self.pages.contains_key(&place) {
                self.pages.insert(place, expected.into());
            }
        }
        for (relation, map) in implicit_vm_blocks(record) {
            if let Some(page) = self.pages.get_mut(&(relation, ForkNumber::Vm, map)) {
                clear_visibility(record, relation, map, page);
            }
        }
    }
}

fn compare(record: &Record<'_>, place: &Place, found: &Page, expected: &[u8; BLOCK_BYTES]) {
    let mask = |page: &[u8; BLOCK_BYTES]| {
        // Of a sequence the common masks leave nothing, but here nothing differs.
        let whole = record.rmgr() == Rmgr::SEQ;
        if whole { without_position(page) } else { masked(&settled(page, record, place), Some(place.1)) }
    };
    let (ours, theirs) = (mask(found.bytes()), mask(expected));
    if let Some(at) = (0..BLOCK_BYTES).find(|at| ours[*at] != theirs[*at]) {
        let to = (at + 16).min(BLOCK_BYTES);
        panic!(
            "{} at {} (kind {:#04X}) left {place:?} different at byte {at}: {:02X?} instead of {:02X?}",
            record.rmgr(),
            record.start,
            record.kind(),
            &ours[at..to],
            &theirs[at..to],
        );
    }
}

/// A row that is inserted on trial carries a token in place of its own position, which replay leaves out.
fn settled(page: &[u8; BLOCK_BYTES], record: &Record<'_>, place: &Place) -> [u8; BLOCK_BYTES] {
    let mut page = *page;
    let [lower, upper] = [12, 14].map(|at| usize::from(u16::from_le_bytes([page[at], page[at + 1]])));
    if [Rmgr::BTREE, Rmgr::HASH, Rmgr::GIST, Rmgr::SPGIST].contains(&record.rmgr()) {
        // The common masks leave the hole of an empty index page, which might be GIN's.
        page[lower..upper].fill(0);
    }
    if record.rmgr() == Rmgr::GIN && page[8190] & 4 != 0 {
        // Of a deleted page nothing counts but that it is one.
        page[12..16].copy_from_slice(&[24, 0, 0xF8, 0x1F]);
        page[24..].fill(0);
    }
    if record.rmgr() != Rmgr::HEAP {
        return page;
    }
    for (number, at) in (1u16..).zip((24..lower).step_by(4)) {
        let pointer = u32::from_le_bytes(page[at..at + 4].try_into().unwrap());
        let row = (pointer & 0x7FFF) as usize;
        if pointer >> 15 & 3 == 1 && page[row + 16..row + 18] == [0xFE, 0xFF] {
            let [high, low] = [(place.2 >> 16) as u16, place.2 as u16].map(u16::to_le_bytes);
            let position = [high, low, number.to_le_bytes()].concat();
            page[row + 12..row + 18].copy_from_slice(&position);
        }
    }
    page
}

fn without_position(page: &[u8; BLOCK_BYTES]) -> [u8; BLOCK_BYTES] {
    let mut page = *page;
    page[..10].fill(0);
    page
}

/// Of the kinds of record that docs/wal.md says were compared, those that no chance keeps out: resource manager, kind.
const KINDS: [(u8, u8); 57] = [
    (9, 0x10),
    (9, 0x20),
    (9, 0x30),
    (9, 0x40),
    (9, 0x50),
    (9, 0x60),
    (9, 0xD0),
    (10, 0x00),
    (10, 0x10),
    (10, 0x20),
    (10, 0x40),
    (10, 0x50),
    (10, 0x60),
    (10, 0x70),
    (10, 0x80),
    (10, 0xA0),
    (11, 0x00),
    (11, 0x10),
    (11, 0x20),
    (11, 0x30),
    (11, 0x40),
    (11, 0x50),
    (11, 0x60),
    (11, 0x80),
    (11, 0x90),
    (11, 0xA0),
    (11, 0xB0),
    (11, 0xC0),
    (11, 0xE0),
    (12, 0x00),
    (12, 0x10),
    (12, 0x20),
    (12, 0x30),
    (12, 0x40),
    (12, 0x60),
    (12, 0x80),
    (12, 0x90),
    (12, 0xA0),
    (12, 0xB0),
    (13, 0x10),
    (13, 0x20),
    (13, 0x60),
    (13, 0x70),
    (13, 0x80),
    (14, 0x00),
    (14, 0x30),
    (15, 0x00),
    (16, 0x10),
    (16, 0x20),
    (16, 0x50),
    (16, 0x80),
    (17, 0x00),
    (17, 0x10),
    (17, 0x30),
    (17, 0x40),
    (17, 0x90),
    (20, 0x00),
];

/// Kinds of record that the common workload does not make: rows locked through an update that is not committed, entries
/// put into lists of rows, a tree that shrinks to one page below its root and grows again.
const RARE: &str = "
create table listed (k int, filler text) with (autovacuum_enabled = off);
insert into listed select i % 5, repeat('x', 60) from generate_series(1, 3000) i;
create index listed_k on listed (k);
delete from listed where ctid < '(15,0)' and random() < 0.5;
vacuum (index_cleanup on, truncate off) listed;
insert into listed select i % 5, repeat('y', 60) from generate_series(1, 700) i;
create table followed (id int primary key, v int);
insert into followed values (1, 1);
begin; update followed set v = 2; prepare transaction 'followed';
begin; select * from followed for key share; commit;
commit prepared 'followed';
create table shrunk (id int primary key) with (autovacuum_enabled = off);
insert into shrunk select generate_series(1, 3000);
delete from shrunk where id < 2990;
vacuum (index_cleanup on) shrunk;
vacuum (index_cleanup on) shrunk;
insert into shrunk select generate_series(10000, 11000);
create table killed (k int, p point) with (autovacuum_enabled = off);
create index killed_hash on killed using hash (k);
create index killed_gist on killed using gist (p);
insert into killed select 1, point(i % 7, i % 5) from generate_series(1, 330) i;
delete from killed;
set enable_seqscan = off; set enable_bitmapscan = off;
select count(*) from killed where k = 1;
select count(*) from killed where k = 1;
select count(*) from killed where p <@ box '((0,0),(9,9))';
select count(*) from killed where p <@ box '((0,0),(9,9))';
insert into killed select 1, point(i % 7, i % 5) from generate_series(1, 330) i;
insert into killed select 1, point(i % 7, i % 5) from generate_series(1, 4000) i;
delete from killed where ctid >= '(3,0)' and random() < 0.6;
vacuum (index_cleanup on) killed;
create table prefixes (t text) with (autovacuum_enabled = off);
create index prefixes_spgist on prefixes using spgist (t);
insert into prefixes select repeat('a', 40) || i from generate_series(1, 1500) i;
insert into prefixes values ('ab'), (repeat('a', 20) || 'z');
delete from prefixes where random() < 0.3;
vacuum (index_cleanup on) prefixes;
insert into prefixes select repeat('a', 40) || i from generate_series(1, 300) i;
";

#[test]
fn each_record_leaves_the_page_as_its_after_image_says() {
    let scratch = Scratch::new("redo-after-images");
    let mut cluster = Cluster::builder("primary")
        .scratch(&scratch)
        .settings(EVERY_RMGR_SETTINGS)
        .setting("wal_consistency_checking", "all")
        .setting("wal_keep_size", "10GB")
        .start();
    every_rmgr(&cluster);
    let rare = scratch.file("rare.sql", RARE);
    cluster.sql_file("postgres", &rare).unwrap();
    let names = cluster.wal_segments();
    cluster.stop(StopMode::Fast);
    let size = SegmentSize::new(1 << 20).unwrap();
    let (mut replay, mut tail) = (Replay::default(), None);
    for name in names {
        let bytes = fs::read(cluster.data_dir().join("pg_wal").join(&name)).unwrap();
        let name: SegmentName = name.parse().unwrap();
        let span = SegmentSpan::containing(name.start(size).unwrap(), size).unwrap();
        let mut stream = RecordStream::new(&bytes, span, Expected::default(), tail).unwrap();
        while let Next::Record(record) = stream.next_record().unwrap() {
            replay.take(&record);
        }
        tail = stream.into_tail();
    }
    let missing: Vec<_> = KINDS.iter().filter(|kind| !replay.compared.contains_key(kind)).collect();
    assert!(missing.is_empty(), "the workload did not make {missing:02X?}");
    assert!(replay.unknown.is_empty(), "{:?}", replay.unknown);
}
