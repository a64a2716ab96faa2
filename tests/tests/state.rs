//! What is not pages of relations, brought forward by a record's effects, against PostgreSQL's own recovery of the same base backup to
//! the same place in the log: byte for byte.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use waltide_format::engines::postgres::cluster::{BackupLabel, ControlFile};
use waltide_format::engines::postgres::wal::{Expected, Next, Record, RecordStream, Rmgr, SegmentSpan, Slru};
use waltide_format::{Lsn, Oid, SegmentName, SegmentSize};
use waltide_replay::engines::postgres::redo::{Effect, Ended, State, changes_state, effects, vouches_for};
use waltide_tests::workload::{EVERY_RMGR_SETTINGS, RMGRS, every_rmgr};
use waltide_tests::{Cluster, ClusterBuilder, Scratch, StopMode};

const SEGMENT_MB: u32 = 16;

/// Near where all the logs' first files end, so that a short load comes past.
const NEXT_XID: u32 = 1_030_000;
const NEXT_MULTI: u32 = 64_000;
const NEXT_MEMBER: u32 = 50_000;

const SETTINGS: &[(&str, &str)] = &[
    ("max_prepared_transactions", "20"),
    ("wal_level", "logical"),
    ("wal_keep_size", "100GB"),
    ("max_wal_size", "100GB"),
    ("checkpoint_timeout", "1h"),
    ("autovacuum", "off"),
    ("lock_timeout", "60s"),
];

fn primary(scratch: &Scratch, settings: &[(&str, &str)]) -> ClusterBuilder {
    let builder = Cluster::builder("primary").scratch(scratch).segment_mb(SEGMENT_MB);
    builder.settings(SETTINGS).settings(settings)
}

/// Counts on as if the cluster had been used for long.
fn age(cluster: &Cluster) {
    for slru in [Slru::Xact, Slru::MultiXactOffset, Slru::MultiXactMember] {
        let path = cluster.data_dir().join(slru.directory()).join("0000");
        fs::OpenOptions::new().write(true).open(path).unwrap().set_len(32 * 8192).unwrap();
    }
    let reset = cluster.install().runner("pg_resetwal").arg("-D").arg(cluster.data_dir());
    reset
        .args(["-x", &NEXT_XID.to_string(), "-O", &NEXT_MEMBER.to_string()])
        .args(["-m", &format!("{NEXT_MULTI},1")])
        .run()
        .assert_ok();
}

/// A checkpoint's redo point.
fn checkpoint(cluster: &Cluster) -> Lsn {
    cluster.query("checkpoint");
    cluster.query("select redo_lsn from pg_control_checkpoint()").parse().unwrap()
}

/// Everything that [`State`] answers for, by name.
fn contents(data: &Path, places: &BTreeMap<Oid, PathBuf>) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut take = |name: String, path: &Path| {
        if let Ok(bytes) = fs::read(path) {
            found.insert(name, bytes);
        }
    };
    let names = |directory: &Path| -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    };
    for directory in Slru::ALL.map(Slru::directory).into_iter().chain(["pg_twophase"]) {
        for name in names(&data.join(directory)) {
            take(format!("{directory}/{name}"), &data.join(directory).join(&name));
        }
    }
    for name in ["global/pg_filenode.map", "pg_logical/replorigin_checkpoint"] {
        take(name.to_owned(), &data.join(name));
    }
    let mut roots = vec![("base".to_owned(), data.join("base"))];
    for name in names(&data.join("pg_tblspc")) {
        let place = &places[&name.parse().unwrap()];
        let link = fs::read_link(data.join("pg_tblspc").join(&name)).unwrap();
        assert_eq!(&link, place, "{name}");
        let versions = names(place);
        assert_eq!(versions.len(), 1, "{name}");
        roots.push((format!("pg_tblspc/{name}/{}", versions[0]), place.join(&versions[0])));
    }
    for (root, path) in roots {
        take(format!("{root}/"), Path::new("/dev/null"));
        // Where only a relation was put PostgreSQL makes a directory without a version.
        for name in names(&path).iter().filter(|name| path.join(name).join("PG_VERSION").exists()) {
            for file in ["PG_VERSION", "pg_filenode.map"] {
                take(format!("{root}/{name}/{file}"), &path.join(name).join(file));
            }
        }
    }
    found
}

/// A base backup, where its tablespaces lie, and where its replay begins.
struct Base {
    data: PathBuf,
    places: BTreeMap<Oid, PathBuf>,
    start: Lsn,
}

impl Base {
    fn take(cluster: &Cluster, name: &str, args: &[&str]) -> Self {
        let data = cluster.base_backup(name, &[&["-X", "none"], args].concat());
        let label = fs::read_to_string(data.join("backup_label")).unwrap();
        let start = BackupLabel::parse(&label).unwrap().start_lsn;
        let links = fs::read_dir(data.join("pg_tblspc")).unwrap().map(|e| e.unwrap().path());
        let place = |link: PathBuf| (oid_of(&link), fs::read_link(&link).unwrap());
        Self { places: links.map(place).collect(), data, start }
    }

    /// A copy of its own, tablespaces included.
    fn copy(&self, scratch: &Scratch, name: &str) -> Self {
        let data = scratch.copy_tree(&self.data, name);
        let mut places = BTreeMap::new();
        for (oid, place) in &self.places {
            let copied = scratch.copy_tree(place, &format!("{name}-{oid}"));
            let link = data.join(format!("pg_tblspc/{oid}"));
            fs::remove_file(&link).unwrap();
            symlink(&copied, &link).unwrap();
            places.insert(*oid, copied);
        }
        Self { data, places, start: self.start }
    }
}

fn oid_of(link: &Path) -> Oid {
    link.file_name().unwrap().to_str().unwrap().parse().unwrap()
}

/// Each record of a stopped cluster's log that starts in `from..until`.
fn each_record(cluster: &Cluster, from: Lsn, until: Lsn, mut take: impl FnMut(&Record<'_>)) {
    let size = SegmentSize::new(u64::from(SEGMENT_MB) << 20).unwrap();
    let mut tail = None;
    for name in cluster.wal_file_names() {
        let start = name.parse::<SegmentName>().unwrap().start(size).unwrap();
        if start >= until || start.saturating_add(size.bytes()) <= from {
            continue;
        }
        let bytes = fs::read(cluster.data_dir().join("pg_wal").join(&name)).unwrap();
        let span = SegmentSpan::containing(start, size).unwrap();
        let mut stream = RecordStream::new(&bytes, span, Expected::default(), tail).unwrap();
        while let Next::Record(record) = stream.next_record().unwrap() {
            if record.start >= from && record.start < until {
                take(&record);
            }
        }
        tail = stream.into_tail();
    }
}

/// Brings a base forward; answers which effects there were.
fn replay(cluster: &Cluster, base: &mut Base, until: Lsn, scratch: &Scratch) -> BTreeSet<String> {
    let mut all = Vec::new();
    each_record(cluster, base.start, until, |record| {
        assert!(vouches_for(record), "{} {:#04X} at {}", record.rmgr(), record.header.info, record.start);
        if changes_state(record) {
            all.extend(
                effects(record).unwrap().into_iter().map(|effect| (effect, (record.start, record.end))),
            );
        }
    });
    for (effect, _) in &all {
        if let Effect::CreateTablespace { spc_oid, .. } = effect {
            base.places.insert(*spc_oid, scratch.join(format!("ours-{spc_oid}")));
        }
    }
    let control = ControlFile::decode(&fs::read(base.data.join("global/pg_control")).unwrap()).unwrap();
    let mut state = State::open(&base.data, &base.places, &control).unwrap();
    for (effect, at) in &all {
        state.apply(effect, *at).unwrap_or_else(|e| panic!("{e} at {}", at.0));
    }
    for path in state.finish(until).unwrap() {
        assert!(path.exists(), "{}", path.display());
    }
    all.iter().map(|(effect, _)| name_of(effect)).collect()
}

/// An effect's name, with what it is an effect on.
fn name_of(effect: &Effect) -> String {
    match effect {
        Effect::ZeroPage { slru, .. } => format!("zero {}", slru.directory()),
        Effect::Truncate { slru, .. } => format!("truncate {}", slru.directory()),
        Effect::SetStatus { status: Ended::Aborted, .. } => "aborted".to_owned(),
        Effect::RelationMap { db_oid: 0, .. } => "shared RelationMap".to_owned(),
        Effect::CommitTimestamps { origin, .. } if *origin != 0 => "replicated".to_owned(),
        other => format!("{other:?}").split(['(', ' ']).next().unwrap().to_owned(),
    }
}

/// Lets PostgreSQL recover a base up to `until`, and no record further.
fn recover(primary: &Cluster, base: &Base, until: Lsn, scratch: &Scratch) {
    let mut cluster = Cluster::with_data_dir("recovered", scratch, &base.data);
    let wal = primary.data_dir().join("pg_wal");
    for (key, value) in [
        ("restore_command", format!("cp {}/%f %p", wal.display()).as_str()),
        ("recovery_target_lsn", &until.to_string()),
        ("recovery_target_inclusive", "off"),
        ("recovery_target_action", "shutdown"),
        ("hot_standby", "off"),
        // Pages are written at shutdown, since a checkpoint was replayed, and not before.
        ("checkpoint_timeout", "1h"),
    ] {
        cluster.set(key, value);
    }
    scratch.give_tree(&scratch.file("signal", ""));
    fs::rename(scratch.join("signal"), base.data.join("recovery.signal")).unwrap();
    cluster.spawn();
    cluster.wait_stopped();
    let log = cluster.log_text();
    assert!(log.contains(&format!("recovery stopping before WAL location (LSN) \"{until}\"")), "{log}");
    assert!(!log.contains("PANIC") && log.contains("restartpoint complete"), "{log}");
}

/// Brings a copy of a base forward and compares it with what PostgreSQL makes of the base; answers which effects there were.
fn compare(primary: &Cluster, mut base: Base, until: Lsn, scratch: &Scratch) -> BTreeSet<String> {
    let name = base.data.file_name().unwrap().to_str().unwrap().to_owned();
    let before = contents(&base.data, &base.places);
    let mut ours = base.copy(scratch, &format!("{name}-ours"));
    let told = replay(primary, &mut ours, until, scratch);
    recover(primary, &base, until, scratch);
    for link in fs::read_dir(base.data.join("pg_tblspc")).unwrap().map(|e| e.unwrap().path()) {
        base.places.insert(oid_of(&link), fs::read_link(&link).unwrap());
    }
    let (found, expected) = (contents(&ours.data, &ours.places), contents(&base.data, &base.places));
    let names = |of: &BTreeMap<String, Vec<u8>>| of.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&found), names(&expected));
    assert_ne!(expected, before);
    for (file, expected) in &expected {
        let found = &found[file];
        let differs = found.iter().zip(expected).position(|(a, b)| a != b);
        assert_eq!((differs, found.len()), (None, expected.len()), "{name}: {file}");
    }
    told
}

/// Prepared transactions that end at once, later or not at all, and checkpoints that write some of them down.
const TWO_PHASE: &str = "
\\set choice random(1, 40)
begin;
savepoint a;
insert into shared values (:choice);
prepare transaction 'of :client_id, :choice';
\\if :choice > 20
commit prepared 'of :client_id, :choice';
\\elif :choice > 2
rollback prepared 'of :client_id, :choice';
\\else
checkpoint;
commit prepared 'of :client_id, :choice';
\\endif
";

/// Databases that come and go, and a catalogue that moves.
const CHURN: &str = "
create database churned strategy wal_log;
vacuum full pg_class;
drop database churned;
";

/// Many subtransactions, each of which updates a row that the transaction has locked: as many multixacts.
const MULTIXACTS: &str = "
create table many (id int primary key, x int);
insert into many select n, 0 from generate_series(1, 2500) n;
do $$
begin
    perform 1 from many for key share;
    for i in 1 .. 2500 loop
        begin
            update many set x = 1 where id = i;
        exception when division_by_zero then null;
        end;
    end loop;
end $$;";

/// Enough subtransactions for three pages of pg_xact.
const SUBTRANSACTIONS: &str = "
create table counted (x int);
do $$
begin
    for i in 1 .. 70000 loop
        begin
            insert into counted values (i);
        exception when division_by_zero then null;
        end;
    end loop;
end $$;
begin;
insert into counted values (0);
savepoint a; insert into counted values (-1); savepoint b; insert into counted values (-2);
rollback to b;
rollback;";

/// Commits, rolls back and prepares what another cluster is said to have sent.
const REPLICATED: &str = "
select pg_replication_origin_session_setup('followed');
begin;
select pg_replication_origin_xact_setup('0/AABBCCDD', '2020-02-02 12:00+00');
insert into counted values (1);
commit;
begin;
select pg_replication_origin_xact_setup('0/AABBCCEE', '2020-02-02 12:01+00');
insert into counted values (2);
rollback;
begin;
select pg_replication_origin_xact_setup('0/AABBCCFF', '2020-02-02 12:02+00');
insert into counted values (3);
prepare transaction 'from elsewhere';
commit prepared 'from elsewhere';";

fn prepare(cluster: &Cluster, name: &str, statement: &str) {
    cluster.query(&format!("begin; {statement}; prepare transaction '{name}'"));
}

#[test]
fn everything_besides_pages_is_as_postgresqls_recovery_leaves_it() {
    let scratch = Scratch::new("state");
    let mut cluster = primary(&scratch, &[("track_commit_timestamp", "on")]).create();
    age(&cluster);
    cluster.start();
    cluster.pgbench_init(1);
    let place = |name: &str| scratch.dir(&format!("place-{name}")).display().to_string();
    cluster.create_tablespace("kept");
    cluster.create_tablespace("emptied");
    cluster.query(
        "create table elsewhere (x int) tablespace emptied;
         create database doomed strategy wal_log;
         create database moved tablespace kept strategy wal_log;
         create table locked as select 1 as id; create table shared (x int);
         select pg_replication_origin_create('followed'), pg_replication_origin_create('forgotten'),
             pg_replication_origin_create('late');
         select pg_replication_origin_advance('forgotten', '0/99')",
    );
    // It locks a row that others come to lock too.
    prepare(&cluster, "locker", "select from locked for key share; select pg_current_xact_id() is null");

    let script = |name: &str, text: &str| scratch.file(name, text).display().to_string();
    let (churn, two_phase) = (script("churn.sql", CHURN), script("two_phase.sql", TWO_PHASE));
    let ordinary = cluster.pgbench_background(&["-c", "2", "-T", "120", "-f", &two_phase, "-b", "tpcb-like"]);
    let churning = cluster.pgbench_background(&["-T", "120", "-f", &churn]);
    // Slow enough that much changes while it is read.
    let first = Base::take(&cluster, "first", &["-r", "12M"]);
    ordinary.terminate();
    churning.terminate();
    for name in cluster.query("select gid from pg_prepared_xacts where gid <> 'locker'").lines() {
        cluster.query(&format!("rollback prepared '{name}'"));
    }

    cluster.query(MULTIXACTS);
    let lock = script("lock.sql", "select from locked for key share; select from locked for share;");
    cluster.pgbench(&["-c", "3", "-t", "100", "-f", &lock]);
    cluster.query("commit prepared 'locker'");
    cluster.query(SUBTRANSACTIONS);
    // It recovers, and goes on behind a checkpoint of its own.
    cluster.kill9();
    cluster.start();
    cluster.query(REPLICATED);
    // Nothing of the logs' first files is needed any more.
    cluster.query("alter database template0 allow_connections true");
    cluster.client("vacuumdb").args(["--all", "--freeze", "-q"]).run().assert_ok();
    cluster.query(
        "vacuum full pg_class; vacuum full pg_database; drop table elsewhere; drop tablespace emptied;
         select pg_replication_origin_drop('forgotten');
         select pg_replication_origin_advance('late', '0/1234'), pg_replication_origin_advance('late', '0/123')",
    );
    cluster.query("drop database doomed");
    cluster.query("create database made strategy wal_log template template0");
    for name in ["new", "gone"] {
        cluster.query(&format!("create tablespace {name} location '{}'", place(name)));
    }
    cluster.query("create database inside tablespace new strategy wal_log");
    cluster.query("drop tablespace gone; create database brief tablespace new strategy wal_log");
    cluster.query("drop database brief");

    for name in ["ended later", "undone later", "kept for long"] {
        prepare(
            &cluster,
            name,
            "insert into counted values (9); savepoint a; insert into counted values (10)",
        );
    }
    let second = Base::take(&cluster, "second", &[]);
    cluster.query("commit prepared 'ended later'");
    prepare(&cluster, "short", "insert into counted values (9)");
    cluster.query("rollback prepared 'undone later'; rollback prepared 'short'");
    prepare(&cluster, "kept too", "create table not_yet as select 1; drop table shared");
    // PostgreSQL writes prepared transactions down at the checkpoint behind them; it replays one before the hand-over.
    cluster.query("checkpoint");
    cluster.pgbench(&["-c", "2", "-t", "500"]);
    cluster.query("vacuum full pg_type");
    let redo = checkpoint(&cluster);
    prepare(&cluster, "behind", "insert into locked values (9)");
    cluster.query("create database behind; drop database made; vacuum full pg_class");
    cluster.pgbench(&["-c", "2", "-t", "500"]);
    cluster.stop(StopMode::Fast);

    let told = compare(&cluster, first, redo, &scratch);
    let expected = [
        "CommitTimestamps",
        "CreateDatabase",
        "CreateTablespace",
        "DropDatabase",
        "DropOrigin",
        "DropTablespace",
        "Finish",
        "MultiXact",
        "NextXid",
        "Prepare",
        "RelationMap",
        "SetOrigin",
        "SetStatus",
        "TruncateMultiXacts",
        "aborted",
        "replicated",
        "shared RelationMap",
        "truncate pg_commit_ts",
        "truncate pg_xact",
        "zero pg_commit_ts",
        "zero pg_multixact/members",
        "zero pg_multixact/offsets",
        "zero pg_xact",
    ];
    assert_eq!(told, expected.map(str::to_owned).into());
    compare(&cluster, second, redo, &scratch);
    // What is compared is there, and what went has gone.
    let names: Vec<_> = Slru::ALL
        .map(|slru| scratch.join("first-ours").join(slru.directory()).join("0000").exists())
        .into_iter()
        .collect();
    assert_eq!(names, [false; 4]);
    assert_eq!(fs::read_dir(scratch.join("second-ours/pg_twophase")).unwrap().count(), 2);
}

#[test]
fn commit_timestamps_that_are_switched_on_in_the_log_are_kept_from_there_on() {
    let scratch = Scratch::new("state-timestamps");
    let mut cluster = primary(&scratch, &[]).create();
    age(&cluster);
    cluster.start();
    cluster.pgbench_init(1);
    let base = Base::take(&cluster, "base", &[]);
    cluster.pgbench(&["-t", "1000"]);
    cluster.set("track_commit_timestamp", "on");
    cluster.restart();
    cluster.pgbench(&["-t", "1000"]);
    let redo = checkpoint(&cluster);
    cluster.set("track_commit_timestamp", "off");
    cluster.restart();
    let off = checkpoint(&cluster);
    cluster.stop(StopMode::Fast);
    let mut without = base.copy(&scratch, "without");
    let told = compare(&cluster, base, redo, &scratch);
    assert!(told.contains("TrackCommitTimestamps"));
    assert!(fs::read_dir(scratch.join("base-ours/pg_commit_ts")).unwrap().count() > 0);
    replay(&cluster, &mut without, off, &scratch);
    assert_eq!(fs::read_dir(scratch.join("without/pg_commit_ts")).unwrap().count(), 0);
}

#[test]
fn of_all_that_postgresql_logs_only_a_database_copied_file_by_file_is_not_vouched_for() {
    let scratch = Scratch::new("state-known");
    let mut cluster = primary(&scratch, EVERY_RMGR_SETTINGS).start();
    every_rmgr(&cluster);
    cluster.kill9();
    cluster.start();
    cluster.stop(StopMode::Fast);
    let (mut rmgrs, mut others) = (BTreeSet::new(), BTreeSet::new());
    each_record(&cluster, Lsn::ZERO, Lsn::MAX, |record| {
        rmgrs.insert(record.rmgr());
        if !vouches_for(record) {
            others.insert((record.rmgr(), record.kind()));
        }
    });
    assert_eq!(rmgrs.len(), RMGRS.len());
    assert_eq!(others, [(Rmgr::DBASE, 0x00)].into());
}
