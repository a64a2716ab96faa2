//! Any record is told of or refused; what is told is checked.

use proptest::prelude::*;

use super::*;
use crate::testing::with_record;

fn words(fields: &[u32]) -> Vec<u8> {
    fields.iter().flat_map(|field| field.to_le_bytes()).collect()
}

fn told(rmid: u8, info: u8, origin: Option<u16>, main: &[u8]) -> Result<Vec<Effect>, String> {
    with_record((PgMajor::V15, rmid, info), origin, main, |record| {
        let told = effects(record);
        assert_eq!(vouches_for(record), told.is_ok(), "{rmid} {info:#X}");
        assert!(changes_state(record) || told == Ok(Vec::new()));
        told.map_err(|e| e.to_string())
    })
}

fn map() -> Vec<u8> {
    let mut map = words(&[0x0059_2717, 1, 1259, 1259]);
    map.resize(504, 0);
    map.extend(crc32c::crc32c(&map).to_le_bytes());
    map.resize(512, 0);
    map
}

/// The main data of a PREPARE.
fn prepare(xid: u32, remote: u64) -> Vec<u8> {
    let mut main = words(&[0x57F9_4534, 84, xid, 5, 9, 0, 10, 0, 0, 0, 0, 0, 0]);
    main.extend([0, 0, 4, 0]);
    main.extend(remote.to_le_bytes());
    main.extend([0; 8]);
    main.extend(b"abc\0\0\0\0\0");
    main
}

#[test]
fn a_replicated_commit_of_a_prepared_transaction_has_every_effect_in_postgresqls_order() {
    let mut main = 7i64.to_le_bytes().to_vec();
    // Subtransactions, two-phase, origin.
    main.extend(words(&[1 << 1 | 1 << 4 | 1 << 5, 2, 742, 743, 741]));
    main.extend(0x1234u64.to_le_bytes());
    main.extend(99i64.to_le_bytes());
    let xids: Vec<_> = [741, 742, 743].map(Xid::from).to_vec();
    let time = TimestampTz::from_postgres_micros(99);
    let expected = vec![
        Effect::CommitTimestamps { xids: xids.clone(), time, origin: 3 },
        Effect::SetStatus { status: Ended::Committed, xids: xids.clone() },
        Effect::SetOrigin { origin: 3, remote: Lsn::from(0x1234), backward: false },
        Effect::Finish { xid: Xid::from(741) },
    ];
    assert_eq!(told(1, 0xB0, Some(3), &main), Ok(expected.clone()));
    // Rolled back it was never committed.
    let rolled_back =
        [Effect::SetStatus { status: Ended::Aborted, xids }, expected[2].clone(), expected[3].clone()];
    assert_eq!(told(1, 0xC0, Some(3), &main), Ok(rolled_back.to_vec()));
    // Its origin must be said where its progress is.
    assert_eq!(told(1, 0xB0, None, &main), Err("origin at byte 0 is 0x0".to_owned()));
    assert_eq!(told(1, 0xB0, Some(0), &main), Err("origin at byte 0 is 0x0".to_owned()));
}

#[test]
fn a_prepare_tells_its_state_and_its_origins_progress() {
    let main = prepare(741, 0x77);
    let expected = [
        Effect::Prepare { xid: Xid::from(741), state: main.clone() },
        Effect::SetOrigin { origin: 2, remote: Lsn::from(0x77), backward: false },
    ];
    assert_eq!(told(1, 0x10, Some(2), &main), Ok(expected.to_vec()));
    assert_eq!(told(1, 0x10, None, &main), Ok(expected[..1].to_vec()));
    let longer = [main, vec![0; 8]].concat();
    assert_eq!(told(1, 0x10, None, &longer), Err("total_len at byte 4 is 0x54, expected 0x5C".to_owned()));
}

#[test]
fn each_other_kind_is_told() {
    let xid = |xid: u32| Xid::from(xid);
    for (rmid, info, main, expected) in [
        (3, 0x00, words(&[7]), Effect::ZeroPage { slru: Slru::Xact, page: 7 }),
        (3, 0x10, words(&[7, 740, 5]), Effect::Truncate { slru: Slru::Xact, page: 7 }),
        (4, 0x10, words(&[5, 1663]), Effect::CreateDatabase { db_oid: 5, spc_oid: 1663 }),
        (
            4,
            0x20,
            words(&[5, 2, 1663, 16400]),
            Effect::DropDatabase { db_oid: 5, spc_oids: vec![1663, 16400] },
        ),
        (
            5,
            0x00,
            [words(&[16400]), b"/x\0".to_vec()].concat(),
            Effect::CreateTablespace { spc_oid: 16400, path: "/x".to_owned() },
        ),
        (5, 0x10, words(&[16400]), Effect::DropTablespace { spc_oid: 16400 }),
        (6, 0x00, words(&[3]), Effect::ZeroPage { slru: Slru::MultiXactOffset, page: 3 }),
        (6, 0x10, words(&[3]), Effect::ZeroPage { slru: Slru::MultiXactMember, page: 3 }),
        (
            6,
            0x20,
            words(&[9, 30, 1, 740, 4]),
            Effect::MultiXact { multi: 9, offset: 30, members: vec![(xid(740), 4)] },
        ),
        (6, 0x30, words(&[5, 1, 9, 1, 30]), Effect::TruncateMultiXacts { end: 9, members: (1, 30) }),
        (
            7,
            0x00,
            [words(&[0, 1664, 512]), map()].concat(),
            Effect::RelationMap { db_oid: 0, spc_oid: 1664, map: map() },
        ),
        (18, 0x00, words(&[7]), Effect::ZeroPage { slru: Slru::CommitTs, page: 7 }),
        (18, 0x10, words(&[7, 740]), Effect::Truncate { slru: Slru::CommitTs, page: 7 }),
        (
            19,
            0x00,
            words(&[5, 0, 0x1_0002, 0]),
            Effect::SetOrigin { origin: 2, remote: Lsn::from(5), backward: true },
        ),
        (19, 0x10, vec![2, 0], Effect::DropOrigin { origin: 2 }),
    ] {
        assert_eq!(told(rmid, info, None, &main), Ok(vec![expected]), "{rmid} {info:#X}");
        assert!(told(rmid, 0x70, None, &main).is_err(), "{rmid} has no kind 0x70");
        for cut in 0..main.len().min(12) {
            // A path may be cut anywhere.
            assert!(
                told(rmid, info, None, &main[..cut]).is_err() || rmid == 5 && cut >= 4,
                "{rmid} {info:#X} {cut}"
            );
        }
    }
}

#[test]
fn numbers_that_nothing_has_are_refused() {
    for (rmid, info, main, message) in [
        (1, 0x80, [words(&[1, 0, 2, 1, 2])].concat(), "xid at byte 0 is 0x2"),
        (4, 0x10, words(&[0, 1663]), "db_id at byte 0 is 0x0"),
        (4, 0x20, words(&[5, 1, 1664]), "tablespace_id at byte 4 is 0x680"),
        (5, 0x00, words(&[1663]), "ts_id at byte 0 is 0x67F"),
        (7, 0x00, [words(&[0, 1663, 512]), map()].concat(), "db_id at byte 0 is 0x0"),
        (7, 0x00, [words(&[5, 1663, 511]), map()].concat(), "nbytes at byte 8 is 0x1FF, expected 0x200"),
        (7, 0x00, words(&[5, 1663, 0]), "nbytes at byte 8 is 0x0, expected 0x200"),
    ] {
        assert_eq!(told(rmid, info, None, &main), Err(message.to_owned()));
    }
    let mut damaged = [words(&[0, 1664, 512]), map()].concat();
    damaged[300] ^= 1;
    assert!(told(7, 0, None, &damaged).unwrap_err().starts_with("crc at byte 516"));
}

#[test]
fn what_is_not_known_whole_is_not_vouched_for() {
    let vouched = |major, rmid, info, main: &[u8]| with_record((major, rmid, info), None, main, vouches_for);
    let v15 = |rmid, info, main: &[u8]| vouched(PgMajor::V15, rmid, info, main);
    let settings = |wal_level| [words(&[100, 8, 10, 0, 64, wal_level]), vec![0, 1]].concat();
    for (rmid, info) in
        [(0, 0x20), (0, 0x40), (0, 0xA0), (1, 0x50), (1, 0x60), (8, 0x20), (10, 0x30), (21, 0x00)]
    {
        assert!(v15(rmid, info, &[]), "{rmid} {info:#X}");
        assert!(v15(rmid, info | 3, &[]), "{rmid} {info:#X}: both of xl_info's flags");
        assert!(!v15(rmid, info | 4, &[]), "{rmid} {info:#X}: a flag that is none");
        assert!(!vouched(PgMajor::V16, rmid, info, &[]), "{rmid} {info:#X} of 16");
    }
    let pages =
        [(9, 0xD0), (10, 0xC0), (11, 0xD0), (12, 0xC0), (13, 0x90), (14, 0x70), (16, 0x80), (17, 0xA0)];
    for (rmid, info) in pages {
        assert!(v15(rmid, info, &[]), "{rmid} {info:#X}");
    }
    let none = [
        (9, 0x80),
        (10, 0x90),
        (11, 0xF0),
        (12, 0xD0),
        (13, 0x00),
        (14, 0x40),
        (15, 0x10),
        (16, 0x00),
        (17, 0x80),
        (20, 0x10),
    ];
    for (rmid, info) in none {
        assert!(!v15(rmid, info, &[]), "{rmid} {info:#X}");
    }
    for (rmid, info) in
        [(0, 0xC0), (0, 0xE0), (1, 0x70), (2, 0x30), (8, 0x30), (21, 0x10), (128, 0), (255, 0)]
    {
        assert!(!v15(rmid, info, &[0; 8]), "{rmid} {info:#X}");
    }
    assert!(v15(0, 0x60, &settings(1)) && v15(0, 0x60, &settings(2)));
    assert!(!v15(0, 0x60, &settings(0)), "what is not logged cannot be replayed");
    assert!(v15(1, 0x00, &[0; 8]));
    let commit = |info: u32| [vec![0; 8], words(&[info, 0])].concat();
    assert!(v15(1, 0x80, &commit(1 << 1)) && !v15(1, 0x80, &commit(1 << 9)), "a flag of xinfo");
    assert!(v15(2, 0x10, &words(&[1663, 5, 16384, 0])) && !v15(2, 0x10, &words(&[1663, 5, 16384, 4])));
    // Copied file by file.
    assert!(!v15(4, 0x00, &words(&[5, 1663, 1, 1663])));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(800))]

    #[test]
    fn any_record_is_told_of_or_refused(
        rmid in 0u8..22,
        info in any::<u8>(),
        origin in proptest::option::of(0u16..4),
        main in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..90),
            proptest::collection::vec(prop_oneof![Just(0u8), 0u8..8], 0..90),
            (0u32..9, proptest::collection::vec(0usize..80, 0..4), any::<u8>()).prop_map(|(xid, at, byte)| {
                let mut main = prepare(xid, 0);
                at.into_iter().for_each(|at| main[at] = byte);
                main
            }),
        ],
    ) {
        with_record((PgMajor::V15, rmid, info), origin, &main, |record| {
            let told = effects(record);
            let known = vouches_for(record);
            prop_assert!(changes_state(record) || told == Ok(Vec::new()));
            prop_assert!(!known || told.is_ok());
            Ok(())
        })?;
    }
}
