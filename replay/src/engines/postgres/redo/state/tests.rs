//! Each effect by itself, and any effects in any order: an error or done, nothing outside, no panic.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use tempfile::TempDir;
use waltide_format::engines::postgres::cluster::{
    ControlFile, read_origins, two_phase_file, two_phase_name, write_origins,
};
use waltide_format::engines::postgres::wal::Slru;
use waltide_format::{BLOCK_BYTES, Lsn, Oid, TimestampTz, Xid};

use super::{State, StateError};
use crate::engines::postgres::redo::effects::{Effect, Ended};

const NEXT_XID: u32 = 740;
const REDO: u64 = 0x5000;
const AT: (u64, u64) = (0x1000, 0x1100);

/// What pg_control says of a cluster of 15.
fn control(tracked: bool, next_xid: u32) -> ControlFile {
    let mut bytes: Vec<u8> = [77u64, 1300 | 202_209_061 << 32, 6, 0, 0x200_0060, 0x200_0028, 1 | 1 << 32, 1]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    bytes.extend(u64::from(next_xid).to_le_bytes());
    bytes.extend([16384u32, 1, 0].iter().flat_map(|v| v.to_le_bytes()));
    bytes.resize(172, 0);
    bytes.extend([1u32, 0, 100, 8, 10, 0, 64, tracked.into(), 8].iter().flat_map(|v| v.to_le_bytes()));
    bytes.resize(216, 0);
    bytes.extend([8192u32, 131_072, 8192, 16 << 20].iter().flat_map(|v| v.to_le_bytes()));
    bytes.resize(288, 0);
    let crc = crc32c::crc32c(&bytes);
    bytes.extend(crc.to_le_bytes());
    bytes.resize(ControlFile::FILE_BYTES, 0);
    ControlFile::decode(&bytes).unwrap()
}

struct Restored {
    scratch: TempDir,
    places: BTreeMap<Oid, PathBuf>,
}

impl Restored {
    /// An empty cluster whose pg_xact has its first page.
    fn new() -> Self {
        let scratch = TempDir::new().unwrap();
        let restored = Self { scratch, places: BTreeMap::new() };
        for directory in super::tree::DIRECTORIES {
            fs::create_dir_all(restored.path(directory)).unwrap();
        }
        fs::set_permissions(restored.path(""), fs::Permissions::from_mode(0o700)).unwrap();
        restored.file("pg_xact/0000", &[0; BLOCK_BYTES]);
        restored
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join("data").join(name)
    }

    fn outside(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn file(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    fn names(&self, directory: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(directory)).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn open(&self) -> Result<State, StateError> {
        State::open(&self.path(""), &self.places, &control(false, NEXT_XID))
    }

    /// Carries these out and ends.
    fn run(&self, effects: &[Effect]) -> Result<Vec<PathBuf>, StateError> {
        run(self.open()?, effects)
    }

    fn fails(&self, effects: &[Effect]) -> String {
        self.run(effects).unwrap_err().to_string()
    }
}

fn run(mut state: State, effects: &[Effect]) -> Result<Vec<PathBuf>, StateError> {
    for effect in effects {
        state.apply(effect, (AT.0.into(), AT.1.into()))?;
    }
    state.finish(Lsn::from(REDO))
}

fn ended(status: Ended, xids: impl IntoIterator<Item = u32>) -> Effect {
    Effect::SetStatus { status, xids: xids.into_iter().map(Xid::from).collect() }
}

/// The main data of a PREPARE.
fn prepared(xid: u32, bytes: usize) -> Vec<u8> {
    let mut main: Vec<u8> = [0x57F9_4534, bytes as u32 + 4, xid, 5, 9, 0, 10, 0, 0, 0, 0, 0, 0]
        .iter()
        .flat_map(|v: &u32| v.to_le_bytes())
        .collect();
    main.extend([0, 0, 4, 0]);
    main.resize(72, 0);
    main.extend(b"abc\0\0\0\0\0");
    main.resize(bytes, 0);
    main
}

fn prepare(xid: u32) -> Effect {
    Effect::Prepare { xid: xid.into(), state: prepared(xid, 80) }
}

#[test]
fn a_transactions_end_sets_its_bits_and_its_subtransactions_on_every_page() {
    let restored = Restored::new();
    let last = Slru::Xact.entries_per_page() - 1;
    let touched = restored
        .run(&[
            Effect::ZeroPage { slru: Slru::Xact, page: 1 },
            ended(Ended::Committed, [741, last, last + 1, last + 3]),
            ended(Ended::Aborted, [742, 743]),
        ])
        .unwrap();
    let file = restored.read("pg_xact/0000");
    assert_eq!(file.len(), 2 * BLOCK_BYTES);
    assert_eq!(
        (file[185], file[BLOCK_BYTES - 1], file[BLOCK_BYTES]),
        (0b1010_0100, 0b0100_0000, 0b0001_0001)
    );
    assert_eq!(file.iter().filter(|b| **b != 0).count(), 3);
    assert_eq!(touched, [restored.path("pg_xact"), restored.path("pg_xact/0000")]);
}

#[test]
fn more_pages_than_are_held_in_memory_are_all_written() {
    let restored = Restored::new();
    let pages = 700;
    let mut effects: Vec<_> = (1..pages).map(|page| Effect::ZeroPage { slru: Slru::Xact, page }).collect();
    effects.extend((1..pages).rev().map(|page| ended(Ended::Committed, [page * 32768])));
    effects.extend((1..pages).map(|page| ended(Ended::Aborted, [page * 32768 + 1])));
    restored.run(&effects).unwrap();
    for page in 1..pages {
        let file = restored.read(&format!("pg_xact/{:04X}", page / 32));
        assert_eq!(file[(page % 32) as usize * BLOCK_BYTES], 0b1001, "{page}");
    }
}

#[test]
fn a_page_behind_a_files_end_is_refused_but_a_file_that_is_not_there_is_zeros() {
    let restored = Restored::new();
    let path = restored.path("pg_xact/0000");
    let behind = ended(Ended::Committed, [40_000]);
    assert_eq!(
        restored.fails(&[behind]),
        format!("{} ends at byte 8192, and the log changes the page that ends at byte 16384", path.display())
    );
    // Two pages of a file that was cut off since, in any order.
    let cut = 1 << 20;
    restored
        .run(&[ended(Ended::Committed, [cut + 40_000]), ended(Ended::Committed, [cut + 80_000, cut])])
        .unwrap();
    assert_eq!(restored.read("pg_xact/0001").len(), 3 * BLOCK_BYTES);
}

#[test]
fn files_before_the_first_page_that_is_needed_go_unless_the_numbers_seem_to_have_wrapped() {
    let restored = Restored::new();
    let zero = |page| Effect::ZeroPage { slru: Slru::Xact, page };
    let cut = |page| Effect::Truncate { slru: Slru::Xact, page };
    restored.file("pg_xact/0001", &[1; 32 * BLOCK_BYTES]);
    restored.file("pg_xact/0001.old", b"");
    restored.run(&[cut(64)]).unwrap();
    assert_eq!(restored.names("pg_xact"), ["0000", "0001", "0001.old"], "the last page is 0");
    let touched = restored.run(&[zero(64), cut(63)]).unwrap();
    assert_eq!(restored.names("pg_xact"), ["0001", "0001.old", "0002"]);
    assert_eq!(touched, [restored.path("pg_xact"), restored.path("pg_xact/0002")]);
    restored.run(&[zero(64), cut(64)]).unwrap();
    assert_eq!(restored.names("pg_xact"), ["0001.old", "0002"]);
}

#[test]
fn commit_timestamps_are_kept_only_while_they_are_tracked() {
    let restored = Restored::new();
    let at = |xid: u32| Effect::CommitTimestamps {
        xids: vec![xid.into(), (xid + 1).into()],
        time: TimestampTz::from_postgres_micros(0x0102_0304_0506_0708),
        origin: 0x0A0B,
    };
    restored.run(&[at(750)]).unwrap();
    assert!(restored.names("pg_commit_ts").is_empty());
    // The page that begins with it is the next transaction's.
    restored.run(&[ended(Ended::Aborted, [1000]), Effect::TrackCommitTimestamps(true), at(1001)]).unwrap();
    let file = restored.read("pg_commit_ts/0000");
    let entry = [8, 7, 6, 5, 4, 3, 2, 1, 0x0B, 0x0A];
    let from = BLOCK_BYTES + (1001 - 819) * 10;
    assert_eq!((&file[from..from + 10], &file[from + 10..from + 20]), (&entry[..], &entry[..]));
    assert_eq!((file.len(), file.iter().filter(|b| **b != 0).count()), (2 * BLOCK_BYTES, 20));
    // A cluster that tracks them has the next transaction's page from the start.
    let state = State::open(&restored.path(""), &restored.places, &control(true, 819 * 40)).unwrap();
    run(state, &[Effect::Truncate { slru: Slru::CommitTs, page: 32 }]).unwrap();
    assert_eq!(restored.names("pg_commit_ts"), ["0001"]);
    let state = State::open(&restored.path(""), &restored.places, &control(true, 819 * 40)).unwrap();
    run(state, &[at(819 * 40 + 7), Effect::TrackCommitTimestamps(false)]).unwrap();
    assert!(restored.names("pg_commit_ts").is_empty());
}

/// The `u32`s of a file from its start.
fn words(file: &[u8]) -> Vec<u32> {
    file.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
}

fn multi(multi: u32, offset: u32, members: &[(u32, u8)]) -> Effect {
    let members = members.iter().map(|(xid, status)| (Xid::from(*xid), *status)).collect();
    Effect::MultiXact { multi, offset, members }
}

#[test]
fn a_multixact_writes_its_offset_the_next_ones_and_its_members_in_groups_of_four() {
    let restored = Restored::new();
    let zeros = [Slru::MultiXactOffset, Slru::MultiXactMember].map(|slru| Effect::ZeroPage { slru, page: 0 });
    let members: Vec<_> = (0..6).map(|n| (800 + n, n as u8)).collect();
    restored.run(&[&zeros[..], &[multi(1, 1, &members)]].concat()).unwrap();
    assert_eq!(words(&restored.read("pg_multixact/offsets/0000"))[..4], [0, 1, 7, 0]);
    let file = restored.read("pg_multixact/members/0000");
    assert_eq!((&file[..4], &file[20..24]), (&[0, 0, 1, 2][..], &[3, 4, 5, 0][..]));
    let found = words(&file);
    assert_eq!((&found[1..5], &found[6..10]), (&[0, 800, 801, 802][..], &[803, 804, 805, 0][..]));
}

#[test]
fn a_page_of_offsets_that_an_older_release_begins_too_late_is_begun_once() {
    let zero = |page| Effect::ZeroPage { slru: Slru::MultiXactOffset, page };
    let member = [Effect::ZeroPage { slru: Slru::MultiXactMember, page: 0 }, zero(0)];
    let found = |effects: &[Effect]| {
        let restored = Restored::new();
        restored.run(&[&member[..], effects].concat()).unwrap();
        words(&restored.read("pg_multixact/offsets/0000"))[2046..2050].to_vec()
    };
    let (last, next) = (multi(2047, 5, &[(800, 0), (801, 0)]), multi(2048, 7, &[(800, 0)]));
    // As before 15.16: the page is begun for the multixact that is the first of it.
    assert_eq!(found(&[last.clone(), zero(1), next.clone()]), [0, 5, 7, 8]);
    // As since: for the one before.
    assert_eq!(found(&[zero(1), last.clone(), next]), [0, 5, 7, 8]);
    assert_eq!(found(&[last.clone(), zero(1)]), [0, 5, 7, 0]);
    // What began early is begun again by a later record about another page, and by nothing else.
    assert_eq!(found(&[last, zero(2), zero(1)]), [0, 5, 0, 0]);
}

#[test]
fn a_page_of_offsets_that_the_backup_has_is_not_begun_early() {
    let restored = Restored::new();
    restored.file("pg_multixact/offsets/0000", &[3; 2 * BLOCK_BYTES]);
    restored.file("pg_multixact/members/0000", &[0; BLOCK_BYTES]);
    restored.run(&[multi(2047, 5, &[(800, 0)])]).unwrap();
    assert_eq!(
        words(&restored.read("pg_multixact/offsets/0000"))[2046..2050],
        [0x0303_0303, 5, 6, 0x0303_0303]
    );
}

#[test]
fn the_last_multixact_and_the_last_member_are_followed_by_the_first() {
    let restored = Restored::new();
    let zero = |slru, page| Effect::ZeroPage { slru, page };
    let (offsets, members) = (Slru::MultiXactOffset, Slru::MultiXactMember);
    restored
        .run(&[
            zero(offsets, offsets.page_max()),
            zero(offsets, 0),
            zero(members, members.page_max()),
            zero(members, 0),
            multi(u32::MAX, u32::MAX, &[(800, 1), (801, 2)]),
            multi(1, u32::MAX, &[(800, 1)]),
        ])
        .unwrap();
    // Zero is no offset: the member after the last number's is numbered one.
    assert_eq!(words(&restored.read("pg_multixact/offsets/0000"))[..4], [0, u32::MAX, 1, 0]);
    assert_eq!(words(&restored.read("pg_multixact/offsets/FFFF")).last(), Some(&u32::MAX));
    let last = words(&restored.read("pg_multixact/members/14078"));
    assert!(last.contains(&800) && !last.contains(&801));
    assert_eq!(words(&restored.read("pg_multixact/members/0000"))[..2], [2, 801]);
}

#[test]
fn multixacts_that_are_not_needed_go_around_the_end_of_the_numbers_too() {
    let restored = Restored::new();
    let member_files = ["0000", "0001", "0002", "14077", "14078"];
    member_files.iter().for_each(|name| restored.file(&format!("pg_multixact/members/{name}"), b""));
    ["0000", "0001", "0002"]
        .iter()
        .for_each(|name| restored.file(&format!("pg_multixact/offsets/{name}"), b""));
    let per_file = 32 * Slru::MultiXactMember.entries_per_page();
    let forget = |end, members| Effect::TruncateMultiXacts { end, members };
    // The last page is 0: nothing of the offsets goes beyond it.
    restored.run(&[forget(2 << 16, (0x14078 * per_file, per_file + 7))]).unwrap();
    assert_eq!(restored.names("pg_multixact/members"), ["0001", "0002", "14077"]);
    assert_eq!(restored.names("pg_multixact/offsets").len(), 3);
    let zero = Effect::ZeroPage { slru: Slru::MultiXactOffset, page: 70 };
    restored.run(&[zero, forget((2 << 16) + 1, (per_file, 2 * per_file))]).unwrap();
    assert_eq!(restored.names("pg_multixact/members"), ["0002", "14077"]);
    assert_eq!(restored.names("pg_multixact/offsets"), ["0002"]);
}

#[test]
fn what_is_prepared_and_not_ended_is_a_file() {
    let restored = Restored::new();
    let finish = |xid: u32| Effect::Finish { xid: xid.into() };
    let touched = restored.run(&[prepare(741), prepare(742), finish(742), finish(743)]).unwrap();
    assert_eq!(restored.names("pg_twophase"), ["000002E5"]);
    assert_eq!(restored.read("pg_twophase/000002E5"), two_phase_file(&prepared(741, 80)));
    assert_eq!(touched, [restored.path("pg_twophase"), restored.path("pg_twophase/000002E5")]);
    // Of the backup, in turn: ended by the log, ended before, prepared once more by the log, of no transaction yet.
    for xid in [700, 701, 702, 800] {
        restored.file(&format!("pg_twophase/{}", two_phase_name(xid.into())), b"torn");
    }
    restored.file("pg_twophase/000002E5.tmp", b"");
    restored.run(&[finish(700), finish(741), ended(Ended::Aborted, [701]), prepare(702)]).unwrap();
    assert_eq!(restored.names("pg_twophase"), ["000002BE", "000002E5.tmp"]);
    assert_eq!(restored.read("pg_twophase/000002BE"), two_phase_file(&prepared(702, 80)));
    assert_eq!(restored.run(&[finish(702)]).unwrap(), [restored.path("pg_twophase")]);
    assert_eq!(
        restored.fails(&[prepare(741), prepare(741)]),
        "transaction 741 was prepared again before it ended"
    );
}

#[test]
fn a_prepared_transaction_of_the_backup_that_is_damaged_is_refused() {
    let restored = Restored::new();
    let mut file = two_phase_file(&prepared(700, 80));
    restored.file("pg_twophase/000002BC", &file);
    restored.run(&[]).unwrap();
    file[20] ^= 1;
    restored.file("pg_twophase/000002BC", &file);
    let error = restored.fails(&[]);
    assert_eq!(error, format!("{} is damaged", restored.path("pg_twophase/000002BC").display()));
    restored.file("pg_twophase/000002BC", &two_phase_file(&prepared(701, 80)));
    assert_eq!(restored.fails(&[]), error, "it is another one's");
}

#[test]
fn what_is_prepared_at_the_hand_over_or_behind_it_is_no_file() {
    let restored = Restored::new();
    restored.file("pg_twophase/000002BC", b"torn");
    let mut state = restored.open().unwrap();
    let ends = |end| (Lsn::from(REDO - 8), Lsn::from(end));
    state.apply(&prepare(700), ends(REDO + 1)).unwrap();
    state.apply(&prepare(701), ends(REDO)).unwrap();
    state.finish(Lsn::from(REDO)).unwrap();
    assert_eq!(restored.names("pg_twophase"), ["000002BD"]);
}

#[test]
fn more_prepared_transactions_than_are_held_in_memory_are_written_at_once() {
    let restored = Restored::new();
    let mut state = restored.open().unwrap();
    let bytes = 6 << 20;
    for xid in 700..704 {
        let effect = Effect::Prepare { xid: xid.into(), state: prepared(xid, bytes) };
        state.apply(&effect, (Lsn::from(1), Lsn::from(2))).unwrap();
    }
    assert_eq!(restored.names("pg_twophase"), ["000002BE", "000002BF"]);
    for xid in [701, 702] {
        state.apply(&Effect::Finish { xid: xid.into() }, (Lsn::from(3), Lsn::from(4))).unwrap();
    }
    state.finish(Lsn::from(REDO)).unwrap();
    assert_eq!(restored.names("pg_twophase"), ["000002BC", "000002BF"]);
    assert_eq!(restored.read("pg_twophase/000002BF"), two_phase_file(&prepared(703, bytes)));
}

#[test]
fn a_map_is_written_and_what_a_dropped_database_had_is_forgotten() {
    let restored = Restored::new();
    let map = |db_oid, spc_oid| Effect::RelationMap { db_oid, spc_oid, map: vec![7; 512] };
    let drop = |spc_oid| Effect::DropDatabase { db_oid: 5, spc_oids: vec![spc_oid] };
    fs::create_dir_all(restored.path("base/5/sub")).unwrap();
    restored.run(&[map(0, 1664), map(5, 1663)]).unwrap();
    assert_eq!(
        (restored.read("global/pg_filenode.map"), restored.read("base/5/pg_filenode.map")),
        (vec![7; 512], vec![7; 512])
    );
    let touched = restored.run(&[map(5, 1663), drop(1663), map(5, 1663), drop(1663), drop(16400)]).unwrap();
    assert_eq!(touched, [restored.path("base")]);
    assert!(!restored.path("base/5").exists());
    assert_eq!(
        restored.fails(&[map(5, 1663)]),
        format!(
            "the log changes the database in {}, which is not there and was not dropped",
            restored.path("base/5").display()
        )
    );
    let error = "the log makes a database in tablespace 16400, which is not there and was not dropped";
    assert_eq!(restored.fails(&[map(5, 16400)]), error);
    restored.run(&[map(5, 16400), Effect::DropTablespace { spc_oid: 16400 }]).unwrap();
}

#[test]
fn a_database_is_a_directory_with_its_version() {
    let restored = Restored::new();
    let create = |spc_oid| Effect::CreateDatabase { db_oid: 5, spc_oid };
    restored.run(&[create(1663), create(1663)]).unwrap();
    assert_eq!(restored.read("base/5/PG_VERSION"), b"15\n");
    let mode = |name: &str| fs::metadata(restored.path(name)).unwrap().mode() & 0o777;
    assert_eq!((mode("base/5"), mode("base/5/PG_VERSION")), (0o700, 0o600));
    // In a tablespace that the backup came too late for it stands in the data directory until that is dropped.
    let drop = Effect::DropTablespace { spc_oid: 16400 };
    let touched = restored.run(&[create(16400), drop]).unwrap();
    assert_eq!(touched, [restored.path("pg_tblspc")]);
    assert!(restored.names("pg_tblspc").is_empty());
    let error = "the log makes a database in tablespace 16400, which is not there and was not dropped";
    assert_eq!(restored.fails(&[create(16400)]), error);
}

#[test]
fn the_group_may_read_what_is_made_where_it_may_read_the_data_directory() {
    let restored = Restored::new();
    fs::set_permissions(restored.path(""), fs::Permissions::from_mode(0o750)).unwrap();
    restored.run(&[Effect::CreateDatabase { db_oid: 5, spc_oid: 1663 }]).unwrap();
    let mode = |name: &str| fs::metadata(restored.path(name)).unwrap().mode() & 0o777;
    assert_eq!((mode("base/5"), mode("base/5/PG_VERSION")), (0o750, 0o640));
}

#[test]
fn a_tablespace_goes_where_this_restore_puts_it_and_nowhere_else() {
    let mut restored = Restored::new();
    let create = |path: &str| Effect::CreateTablespace { spc_oid: 16400, path: path.to_owned() };
    let theirs = restored.outside("theirs");
    fs::create_dir(&theirs).unwrap();
    let path = theirs.display().to_string();
    assert_eq!(
        restored.fails(&[create(&path)]),
        format!("it is not said where tablespace 16400 goes, which the log makes in {path:?}")
    );
    let place = restored.outside("new/place");
    restored.places.insert(16400, place.clone());
    let database = Effect::CreateDatabase { db_oid: 5, spc_oid: 16400 };
    let touched = restored.run(&[database.clone(), create("")]).map(|_| ());
    assert!(touched.is_err(), "what stands in the way is not removed");
    fs::remove_dir_all(restored.path("pg_tblspc/16400")).unwrap();
    let touched = restored.run(&[create(&path), create(&path), database]).unwrap();
    assert_eq!(fs::read_link(restored.path("pg_tblspc/16400")).unwrap(), place);
    let version = place.join("PG_15_202209061");
    assert_eq!(fs::read(version.join("5/PG_VERSION")).unwrap(), b"15\n");
    assert_eq!(
        touched,
        [
            restored.path("pg_tblspc"),
            place.clone(),
            version.clone(),
            version.join("5"),
            version.join("5/PG_VERSION")
        ]
    );
    // Wherever the link leads: what is known counts.
    fs::remove_file(restored.path("pg_tblspc/16400")).unwrap();
    fs::create_dir_all(theirs.join("PG_15_202209061/5")).unwrap();
    symlink(&theirs, restored.path("pg_tblspc/16400")).unwrap();
    restored.run(&[Effect::DropTablespace { spc_oid: 16400 }]).unwrap();
    assert!(restored.names("pg_tblspc").is_empty() && !version.exists() && place.exists());
    assert!(theirs.join("PG_15_202209061/5").exists());
}

#[test]
fn a_tablespace_inside_the_data_directory_stays_there() {
    let mut restored = Restored::new();
    let create = |path: &str| Effect::CreateTablespace { spc_oid: 16400, path: path.to_owned() };
    restored.run(&[create(""), Effect::CreateDatabase { db_oid: 5, spc_oid: 16400 }]).unwrap();
    assert_eq!(restored.read("pg_tblspc/16400/PG_15_202209061/5/PG_VERSION"), b"15\n");
    restored.run(&[Effect::DropTablespace { spc_oid: 16400 }]).unwrap();
    assert!(restored.names("pg_tblspc").is_empty());
    restored.places.insert(16400, restored.path("pg_tblspc/16400"));
    restored.run(&[create("/elsewhere")]).unwrap();
    assert_eq!(restored.names("pg_tblspc/16400"), ["PG_15_202209061"]);
}

#[test]
fn a_link_that_is_none_of_a_clusters_is_not_followed() {
    let restored = Restored::new();
    let victim = restored.outside("victim");
    fs::create_dir(&victim).unwrap();
    fs::write(victim.join("PG_VERSION"), "untouched").unwrap();
    symlink(&victim, restored.path("base/5")).unwrap();
    let not_its_own = |name: &str| format!("{} is not a directory of its own", restored.path(name).display());
    for effect in [
        Effect::CreateDatabase { db_oid: 5, spc_oid: 1663 },
        Effect::DropDatabase { db_oid: 5, spc_oids: vec![1663] },
        Effect::RelationMap { db_oid: 5, spc_oid: 1663, map: vec![0; 512] },
    ] {
        assert_eq!(restored.fails(&[effect]), not_its_own("base/5"));
    }
    fs::remove_file(restored.path("pg_xact/0000")).unwrap();
    symlink(victim.join("PG_VERSION"), restored.path("pg_xact/0000")).unwrap();
    let error = restored.fails(&[ended(Ended::Committed, [741])]);
    assert_eq!(error, format!("cannot read {}", restored.path("pg_xact/0000").display()));
    let error = restored.fails(&[Effect::ZeroPage { slru: Slru::Xact, page: 0 }]);
    assert_eq!(error, format!("cannot write {}", restored.path("pg_xact/0000").display()));
    symlink(&victim, restored.path("pg_tblspc/16400")).unwrap();
    let error = restored.fails(&[Effect::DropTablespace { spc_oid: 16400 }]);
    assert!(error.starts_with("it is not said where tablespace 16400 goes"), "{error}");
    assert_eq!(fs::read(victim.join("PG_VERSION")).unwrap(), b"untouched");
    fs::rename(restored.path("pg_twophase"), restored.outside("moved")).unwrap();
    symlink(restored.outside("moved"), restored.path("pg_twophase")).unwrap();
    assert_eq!(restored.open().unwrap_err().to_string(), not_its_own("pg_twophase"));
}

#[test]
fn origins_keep_their_places_and_advance() {
    const FILE: &str = "pg_logical/replorigin_checkpoint";
    let restored = Restored::new();
    let set = |origin, remote: u64, backward| Effect::SetOrigin { origin, remote: remote.into(), backward };
    restored.run(&[set(u16::MAX, 5, false)]).unwrap();
    assert!(!restored.path(FILE).exists(), "a cluster without origins may have no such file");
    let found = || -> Vec<_> {
        read_origins(&restored.read(FILE)).unwrap().into_iter().map(|(o, remote)| (o, remote.get())).collect()
    };
    restored.run(&[set(1, 9, false), set(2, 9, false), set(3, 9, false)]).unwrap();
    assert_eq!(found(), [(1, 9), (2, 9), (3, 9)]);
    let drop = |origin| Effect::DropOrigin { origin };
    restored
        .run(&[set(1, 5, false), set(2, 5, true), set(3, 11, false), drop(2), drop(8), set(4, 1, false)])
        .unwrap();
    assert_eq!(found(), [(1, 9), (4, 1), (3, 11)]);
    restored.run(&[drop(1), drop(3), drop(4)]).unwrap();
    assert_eq!(restored.read(FILE), write_origins(&[]));
    restored.file(FILE, b"damaged");
    assert_eq!(restored.fails(&[]), format!("{} is damaged", restored.path(FILE).display()));
}

fn some_effect() -> impl Strategy<Value = Effect> {
    let slru = || proptest::sample::select(Slru::ALL.to_vec());
    let xid = || prop_oneof![4 => 3u32..2000, 1 => 30_000u32..70_000, 1 => any::<u32>()];
    let xids = move || proptest::collection::vec(xid().prop_map(Xid::from), 0..5);
    let oid = || proptest::sample::select(vec![1663 as Oid, 1664, 16400, 16401, 16402, 5]);
    prop_oneof![
        (slru(), prop_oneof![0u32..80, any::<u32>()])
            .prop_map(|(slru, page)| Effect::ZeroPage { slru, page: page.min(slru.page_max()) }),
        (slru(), prop_oneof![0u32..80, any::<u32>()])
            .prop_map(|(slru, page)| Effect::Truncate { slru, page: page.min(slru.page_max()) }),
        (any::<bool>(), xids()).prop_map(|(committed, xids)| {
            Effect::SetStatus { status: if committed { Ended::Committed } else { Ended::Aborted }, xids }
        }),
        (xids(), any::<i64>(), any::<u16>()).prop_map(|(xids, time, origin)| {
            Effect::CommitTimestamps { xids, time: TimestampTz::from_postgres_micros(time), origin }
        }),
        any::<bool>().prop_map(Effect::TrackCommitTimestamps),
        (xid(), any::<bool>()).prop_map(|(xid, exact)| Effect::NextXid { xid: xid.into(), exact }),
        (
            prop_oneof![1u32..5000, 1u32..],
            any::<u32>(),
            proptest::collection::vec((any::<u32>(), 0u8..6), 0..9)
        )
            .prop_map(|(number, offset, members)| multi(number, offset, &members)),
        (1u32.., any::<(u32, u32)>()).prop_map(|(end, members)| Effect::TruncateMultiXacts { end, members }),
        (700u32..760).prop_map(prepare),
        (700u32..760).prop_map(|xid| Effect::Finish { xid: xid.into() }),
        (0u32..7, oid()).prop_map(|(db_oid, spc_oid)| Effect::RelationMap {
            db_oid,
            spc_oid,
            map: vec![1; 512]
        }),
        (1u32..7, oid()).prop_map(|(db_oid, spc_oid)| Effect::CreateDatabase { db_oid, spc_oid }),
        (1u32..7, proptest::collection::vec(oid(), 0..3))
            .prop_map(|(db_oid, spc_oids)| Effect::DropDatabase { db_oid, spc_oids }),
        (16400u32..16403, proptest::sample::select(vec!["", "/", "/nowhere/../.."]))
            .prop_map(|(spc_oid, path)| Effect::CreateTablespace { spc_oid, path: path.to_owned() }),
        (16400u32..16403).prop_map(|spc_oid| Effect::DropTablespace { spc_oid }),
        (1u16.., any::<u64>(), any::<bool>()).prop_map(|(origin, remote, backward)| Effect::SetOrigin {
            origin,
            remote: remote.into(),
            backward
        }),
        (1u16..9).prop_map(|origin| Effect::DropOrigin { origin }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn any_effects_in_any_order_are_carried_out_or_refused(
        effects in proptest::collection::vec(some_effect(), 0..60),
        tracked in any::<bool>(),
    ) {
        let mut restored = Restored::new();
        restored.places.insert(16400, restored.outside("place"));
        let victim = restored.outside("victim");
        fs::create_dir_all(victim.join("PG_15_202209061/5")).unwrap();
        symlink(&victim, restored.path("pg_tblspc/16401")).unwrap();
        let mut state = State::open(&restored.path(""), &restored.places, &control(tracked, NEXT_XID)).unwrap();
        // What is refused is left out, though nobody goes on after that.
        for effect in &effects {
            let _ = state.apply(effect, (AT.0.into(), AT.1.into()));
        }
        if let Ok(touched) = state.finish(Lsn::from(REDO)) {
            for path in touched {
                prop_assert!(path.exists(), "{path:?}");
                let inside = [restored.path(""), restored.outside("place")];
                prop_assert!(inside.iter().any(|place| path.starts_with(place)), "{path:?}");
            }
        }
        let mut names: Vec<_> = fs::read_dir(restored.scratch.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        prop_assert!(names.iter().all(|name| ["data", "place", "victim"].map(Path::new).contains(&Path::new(name))), "{names:?}");
        prop_assert!(fs::read_dir(victim.join("PG_15_202209061/5")).unwrap().next().is_none());
    }
}
