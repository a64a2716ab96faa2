//! Any record on any page is applied or refused; what it leaves is a page; twice is once.

use proptest::prelude::*;
use waltide_format::engines::postgres::wal::{PackedFor, RECORD_HEADER_BYTES, Record};
use waltide_format::{BLOCK_BYTES, Lsn, PgMajor, RelFileLocator, Writer};

use super::page::{Page, tid};
use super::posting::{self, Entry};
use super::{Applied, Cluster, apply};

const SETTING: Cluster = Cluster { logs_hints: true };
const END: u64 = 0x2000;
const RELATION: RelFileLocator = RelFileLocator { spc_oid: 1663, db_oid: 5, rel_number: 16384 };

/// A record with one block reference per item of `blocks`: number, flags (fork and `BKPBLOCK_WILL_INIT`), block, data.
fn record_bytes(rmid: u8, info: u8, main: &[u8], blocks: &[(u8, u8, u32, Vec<u8>)]) -> Vec<u8> {
    let mut body = Vec::new();
    for (id, flags, block, data) in blocks {
        body.extend([*id, flags | if data.is_empty() { 0 } else { 0x20 }]);
        body.extend((data.len() as u16).to_le_bytes());
        let RelFileLocator { spc_oid, db_oid, rel_number } = RELATION;
        body.extend([spc_oid, db_oid, rel_number, *block].iter().flat_map(|v| v.to_le_bytes()));
    }
    body.extend([255, main.len() as u8]);
    blocks.iter().for_each(|(.., data)| body.extend(data));
    body.extend(main);
    let mut record = ((RECORD_HEADER_BYTES + body.len()) as u32).to_le_bytes().to_vec();
    record.extend(77u32.to_le_bytes());
    record.extend(0x900u64.to_le_bytes());
    record.extend([info, rmid, 0, 0]);
    let crc = crc32c::crc32c_append(crc32c::crc32c(&body), &record);
    record.extend(crc.to_le_bytes());
    record.extend(body);
    record
}

/// A page as an access method leaves it: a special space, and items of these lengths.
fn page_with(special: usize, items: &[Vec<u8>]) -> Page {
    let mut page = Page::default();
    page.init(special);
    for (number, item) in (1u16..).zip(items) {
        if page.insert_item(number, item).is_err() {
            break;
        }
    }
    page
}

/// An index entry whose header says its length.
fn entry() -> impl Strategy<Value = Vec<u8>> {
    (proptest::collection::vec(any::<u8>(), 8..40), any::<bool>()).prop_map(|(mut entry, alt)| {
        let info = entry.len() as u16 | if alt { 0x2000 } else { 0 };
        entry[6..8].copy_from_slice(&info.to_le_bytes());
        entry
    })
}

/// A list of rows behind a key.
fn list() -> impl Strategy<Value = Vec<u8>> {
    (proptest::collection::vec(any::<u8>(), 8..24), proptest::collection::vec(any::<[u8; 6]>(), 2..12))
        .prop_map(|(mut key, rows)| {
            key.resize(key.len().next_multiple_of(8), 0);
            let info = key.len() as u16;
            key[6..8].copy_from_slice(&info.to_le_bytes());
            posting::form(&key, &rows).unwrap()
        })
}

fn item() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![entry(), list(), proptest::collection::vec(any::<u8>(), 1..90)]
}

fn page() -> impl Strategy<Value = Page> {
    prop_oneof![
        4 => (prop_oneof![Just(0usize), Just(4), Just(16)], proptest::collection::vec(item(), 0..12))
            .prop_map(|(special, items)| page_with(special, &items)),
        1 => (any::<[u8; 24]>(), any::<[u8; 64]>()).prop_map(|(header, pointers)| {
            let mut bytes = [0; BLOCK_BYTES];
            bytes[..24].copy_from_slice(&header);
            bytes[24..88].copy_from_slice(&pointers);
            bytes.into()
        }),
        1 => Just(Page::default()),
    ]
}

/// Main data of small numbers, so that many of them name something.
fn main_data() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..40),
        proptest::collection::vec(prop_oneof![Just(0u8), 0u8..6], 0..40),
    ]
}

fn block_data() -> impl Strategy<Value = Vec<u8>> {
    let small = || proptest::collection::vec(prop_oneof![Just(0u8), 0u8..9], 0..24);
    prop_oneof![
        small(),
        proptest::collection::vec(any::<u8>(), 0..80),
        proptest::collection::vec(item(), 0..4).prop_map(|items| {
            let padded = |mut item: Vec<u8>| {
                item.resize(item.len().next_multiple_of(8), 0);
                item
            };
            items.into_iter().flat_map(padded).collect()
        }),
        (small(), item()).prop_map(|(front, item)| [front, item].concat()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn any_record_on_any_page_is_applied_once_or_refused(
        rmid in prop_oneof![Just(9u8), Just(10), Just(11), Just(15), Just(20), 0u8..22],
        kind in (0u8..16).prop_map(|kind| kind << 4),
        main in main_data(),
        blocks in proptest::collection::btree_map(0u8..5, (prop_oneof![4 => Just(0u8), 1 => Just(2), 1 => Just(0x40)], 0u32..3, block_data()), 1..4),
        page in page(),
    ) {
        let blocks: Vec<_> = blocks.into_iter().map(|(id, (flags, block, data))| (id, flags, block, data)).collect();
        let bytes = record_bytes(rmid, kind, &main, &blocks);
        let mut refs = Vec::new();
        let record = Record::decode(&bytes, Lsn::from(0x1000), Lsn::from(END), PgMajor::V15, &mut refs).unwrap();
        for (id, _, number, _) in &blocks {
            let mut once = page.clone();
            let was_whole = page.check().is_ok();
            let applied = apply(&record, *id, &mut once, SETTING);
            // What is packed of the record for this page says as much.
            let (mut packed, mut refs, mut other) = (Writer::new(), Vec::new(), page.clone());
            record.pack(Some(*id), RELATION, &mut packed);
            let of = PackedFor { start: record.start, end: record.end, xid: record.header.xid, relation: RELATION, block: *number };
            let unpacked = Record::unpack(packed.as_bytes(), of, PgMajor::V15, &mut refs).unwrap();
            prop_assert_eq!(apply(&unpacked, *id, &mut other, SETTING), applied);
            prop_assert!(applied.is_err() || other == once);
            match applied {
                Ok(Applied::Changed) => {
                    prop_assert_eq!(once.lsn(), Lsn::from(END));
                    prop_assert!(once.check().is_ok() || !was_whole, "{:?}", once.check());
                    let mut twice = once.clone();
                    let again = apply(&record, *id, &mut twice, SETTING);
                    prop_assert!(again.is_ok(), "{:?}", again);
                    prop_assert!(twice == once);
                }
                Ok(Applied::Nothing | Applied::Ahead) => prop_assert!(once == page),
                Ok(Applied::Unstamped) => prop_assert!(once.check().is_ok() || !was_whole),
                Err(e) => prop_assert!(e.to_string().contains("0/1000"), "{}", e),
            }
        }
    }

    #[test]
    fn items_come_go_and_change_as_in_a_list(
        steps in proptest::collection::vec((0u8..4, any::<u16>(), proptest::collection::vec(any::<u8>(), 1..300)), 1..60),
    ) {
        let (mut page, mut model) = (page_with(16, &[]), Vec::<Vec<u8>>::new());
        for (step, number, item) in steps {
            let count = model.len() as u16;
            let free = page.upper() - page.lower();
            let number = number % (count + 1);
            match step {
                0 | 1 => {
                    let fits = item.len().next_multiple_of(8) + 4 <= free;
                    prop_assert_eq!(page.insert_item(number + 1, &item).is_ok(), fits);
                    if fits {
                        model.insert(number.into(), item);
                    }
                }
                2 if number < count => {
                    let room = free + model[usize::from(number)].len().next_multiple_of(8);
                    let fits = item.len().next_multiple_of(8) <= room;
                    prop_assert_eq!(page.replace_item(number + 1, &item).is_ok(), fits);
                    if fits {
                        model[usize::from(number)] = item;
                    }
                }
                _ => {
                    let gone: Vec<u16> = (1..=count).filter(|n| (u32::from(*n) * 7 + u32::from(number)).is_multiple_of(3)).collect();
                    page.delete_items(&gone).unwrap();
                    let mut n = 0;
                    model.retain(|_| {
                        n += 1;
                        !gone.contains(&n)
                    });
                }
            }
            page.check().unwrap();
            let found: Vec<_> = (1..=page.items()).map(|n| page.item(n).unwrap().to_vec()).collect();
            prop_assert_eq!(&found, &model);
            // No room is lost.
            let used: usize = model.iter().map(|item| item.len().next_multiple_of(8)).sum();
            prop_assert_eq!(page.special() - page.upper(), used);
        }
    }

    #[test]
    fn a_list_keeps_its_rows(key in proptest::collection::vec(any::<u8>(), 8..24), rows in proptest::collection::vec(any::<[u8; 6]>(), 3..20), at in 1usize..20) {
        let mut key = key;
        key.resize(key.len().next_multiple_of(8), 0);
        let info = key.len() as u16;
        key[6..8].copy_from_slice(&info.to_le_bytes());
        let list = posting::form(&key, &rows).unwrap();
        let read = |entry: &[u8]| {
            let mut rows = Vec::new();
            Entry(entry).rows(&mut rows).unwrap();
            rows
        };
        prop_assert_eq!(&read(&list), &rows);
        let at = at.min(rows.len() - 1);
        let mut new = tid(7, 9).to_vec();
        new.extend([8, 0]);
        let swapped = posting::swap(&mut new, &list, at as u16).unwrap();
        let mut expected = rows.clone();
        expected.insert(at, tid(7, 9));
        prop_assert_eq!(read(&new), [expected.pop().unwrap()]);
        prop_assert_eq!(read(&swapped), expected);
        let rest = posting::without(&list, &[at as u16]).unwrap();
        let mut expected = rows;
        expected.remove(at);
        prop_assert_eq!(read(&rest), expected);
    }
}

#[test]
fn what_cannot_be_applied_is_named() {
    let bytes = record_bytes(10, 0x10, &[0, 0, 0, 0, 3, 0, 0, 0], &[(0, 0, 42, Vec::new())]);
    let mut refs = Vec::new();
    let record = Record::decode(&bytes, Lsn::from(0x1000), Lsn::from(END), PgMajor::V15, &mut refs).unwrap();
    let e = apply(&record, 0, &mut page_with(0, &[]), SETTING).unwrap_err();
    assert_eq!(
        e.to_string(),
        "the Heap record at 0/1000 (kind 0x10) cannot be applied to block 42 of 1663/5/16384"
    );
    assert_eq!(e.source.to_string(), "offnum at byte 0 is 3, more than the 0 allowed");
}
