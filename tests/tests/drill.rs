//! Drills of real clusters: what they find, what they record, and that they touch nothing else.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use waltide_tests::workload::Journal;
use waltide_tests::{Cluster, ClusterBuilder, Scratch, StopMode, Waltide, poll_until};

/// An archive with a cluster that ships to it, and a place to drill in.
struct Site {
    scratch: Scratch,
    archive: PathBuf,
    place: PathBuf,
    waltide: Waltide,
}

impl Site {
    fn new(label: &str) -> Self {
        let scratch = Scratch::new(label);
        let archive = scratch.dir("archive");
        let place = scratch.dir("place");
        let waltide = Waltide::new(&scratch).archive(&archive).cluster("main");
        Self { scratch, archive, place, waltide }
    }

    fn builder(&self) -> ClusterBuilder {
        Cluster::builder("db").scratch(&self.scratch).archive_command(&self.waltide.archive_command())
    }

    fn start(&self, builder: ClusterBuilder) -> Cluster {
        let mut cluster = builder.create();
        self.waltide.ok(["init", "--data-dir", cluster.data_dir().to_str().unwrap()]);
        cluster.start();
        cluster
    }

    fn back_up(&self, cluster: &Cluster) {
        let data_dir = cluster.data_dir().to_str().unwrap();
        self.waltide.ok(["backup", "--type", "full", "--checkpoint", "fast", "--data-dir", data_dir]);
    }

    /// A drill in our place; the document it prints.
    #[track_caller]
    fn drill(&self, status: i32, args: &[&str]) -> Value {
        let place = self.place.to_str().unwrap();
        let answer = self.waltide.json_with_status(status, [&["drill", "--scratch", place], args].concat());
        assert_eq!(entries(&self.place), Vec::<PathBuf>::new(), "the scratch place is gone");
        answer
    }

    /// Every object whose path has this in it, in order.
    fn objects(&self, part: &str) -> Vec<PathBuf> {
        let all = snapshot(&self.archive).into_keys().filter(|p| p.is_file());
        all.filter(|p| p.to_str().unwrap().contains(part)).collect()
    }
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect()
}

/// Every file below a directory with its identity, length and times of change.
fn snapshot(dir: &Path) -> BTreeMap<PathBuf, (u64, u64, i64, i64, i64, i64)> {
    let mut found = BTreeMap::new();
    let mut left = vec![dir.to_owned()];
    while let Some(path) = left.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            left.extend(entries(&path));
        }
        let times = (meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec());
        found.insert(path, (meta.ino(), meta.len(), times.0, times.1, times.2, times.3));
    }
    found
}

fn outcomes(drill: &Value) -> Vec<(&str, &str)> {
    let checks = drill["checks"].as_array().unwrap().iter();
    checks.map(|c| (c["name"].as_str().unwrap(), c["outcome"].as_str().unwrap())).collect()
}

#[track_caller]
fn assert_passed(drill: &Value) {
    assert_eq!(drill["verdict"], "passed", "{drill:#}");
    let outcomes = outcomes(drill);
    for name in [
        "the archived WAL has no hole",
        "every checksum of the base backup",
        "the target was reached",
        "the last commit of the index is there",
        "pg_amcheck --heapallindexed",
        "every page's checksum",
    ] {
        assert!(outcomes.contains(&(name, "passed")), "{name}: {drill:#}");
    }
    assert!(outcomes.iter().all(|(_, outcome)| *outcome == "passed"), "{drill:#}");
    let phases: Vec<_> =
        drill["phases"].as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap()).collect();
    assert_eq!(phases, ["plan", "restore", "recovery", "checks"]);
    assert!(drill["rto_seconds"].as_f64().unwrap() > 0.0);
    assert!(drill["rpo_seconds"].as_f64().unwrap() >= 0.0);
}

#[test]
fn a_good_archive_passes_at_every_kind_of_target_and_every_drill_is_recorded() {
    let site = Site::new("drill-good");
    let cluster = site.start(site.builder().setting("track_commit_timestamp", "on"));
    let mut journal = Journal::create(&cluster);
    journal.step(&cluster, "before");
    site.back_up(&cluster);
    let steps: Vec<_> = (0..12).map(|n| journal.step(&cluster, &format!("after {n}"))).collect();
    cluster.archive_all();
    cluster.query("create database other");
    cluster.sql("other", "create table t as select 7 as x").unwrap();
    cluster.archive_all();

    let report = site.scratch.dir("reports").join("drill.html");
    let answer = site.drill(
        0,
        &[
            "--check",
            "select count(*) = 13 from journal",
            "--check",
            "other:select x from t",
            "--report",
            report.to_str().unwrap(),
        ],
    );
    assert_passed(&answer["drills"][0]);
    assert_eq!(outcomes(&answer["drills"][0]).len(), 9, "{answer:#}");
    let page = fs::read_to_string(&report).unwrap();
    assert!(
        page.contains("every check held") && page.contains("archive_command") && !page.contains("<script")
    );
    assert!(!page.contains("The last"), "there are no drills before it");

    let step = &steps[5];
    // The journal keeps a microsecond's last zeros, which PostgreSQL does not print.
    let moment: waltide_format::TimestampTz = step.committed_at.parse().unwrap();
    for (args, target) in [
        (["--target-time", &step.committed_at], format!("time {moment}")),
        (["--target-xid", &step.xid.to_string()], format!("transaction {}", step.xid)),
    ] {
        let check = format!("select max(id) = {} from journal", step.id);
        let answer = site.drill(0, &[&args[..], &["--check", &check]].concat());
        let drill = &answer["drills"][0];
        assert_passed(drill);
        assert_eq!(drill["target"], target.as_str());
        assert_eq!(drill["last_commit"]["xid"], step.xid);
        assert!(outcomes(drill).contains(&("the next commit is not there", "passed")));
        assert!(outcomes(drill).contains(&("its commit time is that of the index", "passed")));
    }

    let answer = site.drill(0, &["--random", "2", "--seed", "7", "--report", report.to_str().unwrap()]);
    let drills = answer["drills"].as_array().unwrap();
    assert_eq!(drills.len(), 2);
    drills.iter().for_each(assert_passed);
    assert!(drills.iter().all(|d| d["seed"] == 7 && d["series"] == drills[0]["id"]));
    let again = site.drill(0, &["--random", "1", "--seed", "7"]);
    assert_eq!(again["drills"][0]["target"], drills[0]["target"], "the same seed draws the same");
    assert_eq!(site.objects("/drills/").len(), 6);
    let page = fs::read_to_string(&report).unwrap();
    assert!(page.contains("2 of 2 drills passed") && page.contains("The last 5 drills"), "{page}");
}

#[test]
fn what_the_archive_cannot_be_blamed_for_is_status_1() {
    let site = Site::new("drill-failed");
    let cluster = site.start(site.builder());
    let mut journal = Journal::create(&cluster);
    site.back_up(&cluster);
    journal.step(&cluster, "only");
    cluster.archive_all();
    let failing = [
        ("select count(*) = 2 from journal", "f"),
        ("select 0.0", "0.0"),
        ("select null", "its value is null"),
        ("select id, xid from journal", "it answers 2 columns, one is needed"),
        ("select 1 where false", "it answers no row"),
        ("select 'many'", "many"),
        ("select * from nowhere", "ERROR: relation \"nowhere\" does not exist"),
    ];
    let args: Vec<_> = failing.iter().flat_map(|(check, _)| ["--check", check]).collect();
    let answer = site.drill(1, &args);
    let drill = &answer["drills"][0];
    assert_eq!(drill["verdict"], "failed");
    let checks = drill["checks"].as_array().unwrap().iter().filter(|c| c["outcome"] != "passed");
    let failed: Vec<_> =
        checks.map(|c| (c["name"].as_str().unwrap(), c["detail"].as_str().unwrap())).collect();
    assert_eq!(failed, failing, "{drill:#}");
    // One that passed and cannot be reported is told, and is no success.
    let answer = site.drill(1, &["--report", "/dev/null/report.html"]);
    assert_eq!(answer["drills"][0]["verdict"], "passed");
    let answer = site.drill(1, &["--pg-bin", "/nonexistent"]);
    assert_eq!(answer["drills"][0]["verdict"], "failed");
    let error = answer["drills"][0]["error"].as_str().unwrap();
    assert!(error.contains("/nonexistent"), "{error}");
    let answer = site.drill(1, &["--user", "nobody_of_that_name"]);
    let error = answer["drills"][0]["error"].as_str().unwrap();
    assert!(error.contains("nobody_of_that_name"), "{error}");
}

#[test]
fn an_archive_at_fault_is_status_3() {
    let site = Site::new("drill-damaged");
    let cluster = site.start(site.builder());
    let mut journal = Journal::create(&cluster);
    site.back_up(&cluster);
    let mut archived = Vec::new();
    for n in 0..4 {
        journal.step(&cluster, &n.to_string());
        archived.push(cluster.archive_all());
    }
    let last = journal.step(&cluster, "last");
    cluster.archive_all();

    // Beyond the end of what there is.
    let answer = site.drill(3, &["--target-lsn", "7F/0"]);
    assert_eq!(answer["drills"][0]["verdict"], "archive_at_fault");
    assert!(answer["drills"][0]["error"].as_str().unwrap().contains("cannot be reached"));
    // Whether a report of it can be written or not.
    let answer = site.drill(3, &["--target-lsn", "7F/0", "--report", "/dev/null/report.html"]);
    assert_eq!(answer["drills"][0]["verdict"], "archive_at_fault");

    let segment = &site.objects(&archived[1])[0];
    let aside = site.scratch.join("aside");
    fs::rename(segment, &aside).unwrap();
    let answer = site.drill(3, &[]);
    let drill = &answer["drills"][0];
    assert_eq!(drill["verdict"], "archive_at_fault", "{drill:#}");
    assert!(outcomes(drill).contains(&("the archived WAL has no hole", "failed")), "{drill:#}");
    site.drill(3, &["--target-xid", &last.xid.to_string()]);
    fs::rename(&aside, segment).unwrap();
    assert_passed(&site.drill(0, &[])["drills"][0]);

    let pack = &site.objects("/packs/")[0];
    let file = fs::OpenOptions::new().read(true).write(true).open(pack).unwrap();
    let middle = file.metadata().unwrap().len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], middle).unwrap();
    let answer = site.drill(3, &[]);
    let drill = &answer["drills"][0];
    assert_eq!(drill["verdict"], "archive_at_fault", "{drill:#}");
    assert!(drill["error"].as_str().unwrap().contains("/packs/"), "{drill:#}");
}

#[test]
fn a_drill_touches_nothing_outside_its_scratch_place() {
    let site = Site::new("drill-apart");
    let outside = site.scratch.dir("outside");
    let mut publisher = Cluster::builder("publisher")
        .scratch(&site.scratch)
        .settings(&[("wal_level", "logical"), ("log_connections", "on"), ("log_replication_commands", "on")])
        .start();
    publisher.query(
        "create table t (x int primary key); insert into t values (1); create publication p for table t",
    );

    let witness = outside.join("archived");
    let pid_file = outside.join("server.pid");
    let command = format!("{} && touch {}", site.waltide.archive_command(), witness.display());
    let builder = site.builder().archive_command(&command).settings(&[
        ("external_pid_file", pid_file.to_str().unwrap()),
        ("shared_preload_libraries", "auto_explain"),
        ("logging_collector", "on"),
        ("log_directory", outside.to_str().unwrap()),
    ]);
    let mut cluster = site.start(builder);
    let before = cluster.create_tablespace("before");
    cluster.query("create table a tablespace before as select generate_series(1, 1000) as x");
    cluster.query("create table t (x int primary key)");
    cluster.query(&format!("create subscription s connection '{}' publication p", publisher.connection()));
    cluster.wait_until("select count(*) = 1 from t");
    site.back_up(&cluster);
    // Its making is replayed, and names this very place.
    let after = cluster.create_tablespace("after");
    cluster.query("create table b tablespace after as select generate_series(1, 2000) as x");
    publisher.query("insert into t values (2)");
    cluster.wait_until("select count(*) = 2 from t");
    cluster.archive_all();
    cluster.stop(StopMode::Fast);
    publisher.query("insert into t values (3)");
    publisher.wait_until("select not active from pg_replication_slots");
    fs::remove_file(&witness).unwrap();

    let world = [&outside, &before, &after, &cluster.data_dir().to_owned()].map(|dir| snapshot(dir));
    let slots = "select slot_name, active, confirmed_flush_lsn, restart_lsn from pg_replication_slots";
    let (slots_before, connections) =
        (publisher.query(slots), publisher.log_text().matches("replication connection").count());
    let answer = site.drill(
        0,
        &[
            "--check",
            "select count(*) = 1000 from a",
            "--check",
            "select count(*) = 2000 from b",
            "--check",
            "select max(x) = 2 from t",
            "--check",
            "select not exists (select from pg_stat_subscription where pid is not null)",
        ],
    );
    let drill = &answer["drills"][0];
    assert_passed(drill);
    assert_eq!(world, [&outside, &before, &after, &cluster.data_dir().to_owned()].map(|dir| snapshot(dir)));
    assert!(!witness.exists() && !pid_file.exists());
    assert_eq!(publisher.query(slots), slots_before);
    assert_eq!(publisher.query("select count(*) from pg_stat_replication"), "0");
    assert_eq!(publisher.log_text().matches("replication connection").count(), connections);
    let told: Vec<_> =
        drill["settings"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
    for name in
        ["archive_command", "archive_mode", "external_pid_file", "log_directory", "shared_preload_libraries"]
    {
        assert!(told.contains(&name), "{name}: {told:?}");
    }
    let notes = drill["notes"].to_string();
    assert!(notes.contains(after.to_str().unwrap()), "{notes}");

    // A restore that is kept follows the WAL, but not over what is there.
    let elsewhere = site.scratch.join("elsewhere");
    let map = format!("{}={}", before.display(), site.scratch.join("moved").display());
    let args = ["restore", "--data-dir", elsewhere.to_str().unwrap(), "--tablespace-map", &map];
    let refused = site.waltide.fails(1, args);
    assert!(refused.stderr.contains(&format!("{} is not empty", after.display())), "{}", refused.describe());
    assert_eq!(world, [&outside, &before, &after, &cluster.data_dir().to_owned()].map(|dir| snapshot(dir)));
    assert!(!elsewhere.exists());

    // The cluster it was taken from still goes on where it was.
    cluster.start();
    cluster.wait_until("select max(x) = 3 from t");
    assert_eq!(cluster.query("select count(*) from b"), "2000");
    cluster.stop(StopMode::Fast);
    publisher.stop(StopMode::Fast);
}

#[test]
fn a_drill_that_is_stopped_leaves_nothing_and_one_that_is_killed_is_tidied_up_after() {
    let site = Site::new("drill-stopped");
    let cluster = site.start(site.builder());
    let mut journal = Journal::create(&cluster);
    site.back_up(&cluster);
    journal.step(&cluster, "only");
    cluster.archive_all();
    let place = site.place.to_str().unwrap();
    let start = || {
        let args = ["drill", "--scratch", place, "--check", "select pg_sleep(600) is null"];
        let drill = site.waltide.spawn(args);
        let asked = |dir: &PathBuf| {
            fs::read_to_string(dir.join("data/postmaster.pid")).is_ok_and(|t| t.contains("ready"))
        };
        poll_until("the scratch server", Duration::from_secs(60), || {
            entries(&site.place).iter().any(asked).then_some(())
        });
        drill
    };
    let stopped = start().terminate();
    assert_eq!(stopped.status, 1, "{}", stopped.describe());
    assert!(stopped.stderr.contains("stopped"), "{}", stopped.describe());
    assert_eq!(entries(&site.place), Vec::<PathBuf>::new());
    let stopped = start().interrupt();
    assert_eq!(stopped.status, 1, "{}", stopped.describe());
    assert_eq!(entries(&site.place), Vec::<PathBuf>::new());

    start().kill9();
    let left = entries(&site.place);
    assert_eq!(left.len(), 1);
    let server = fs::read_to_string(left[0].join("data/postmaster.pid")).unwrap();
    let server = Path::new("/proc").join(server.lines().next().unwrap()).join("stat");
    // An orphan that is dead may wait a while for somebody to take note of it.
    let lives = || fs::read_to_string(&server).is_ok_and(|stat| !stat.contains(") Z "));
    assert!(lives(), "its server outlives it");
    assert_passed(&site.drill(0, &[])["drills"][0]);
    assert!(!lives());

    let kept = site.waltide.json(["drill", "--scratch", place, "--keep-scratch"]);
    assert_passed(&kept["drills"][0]);
    let left = entries(&site.place);
    assert!(left.len() == 1 && left[0].join("data/PG_VERSION").exists());
    assert!(!left[0].join("data/postmaster.pid").exists(), "kept, and not running");
}

#[test]
fn what_a_prepared_transaction_locks_is_said_and_the_rest_is_checked() {
    let site = Site::new("drill-locked");
    let cluster = site.start(site.builder().setting("max_prepared_transactions", "4"));
    let mut journal = Journal::create(&cluster);
    site.back_up(&cluster);
    journal.step(&cluster, "only");
    cluster.query("create table locked (id int primary key); insert into locked values (1)");
    cluster.query("begin; lock table locked in access exclusive mode; prepare transaction 'it''s open'");
    cluster.archive_all();
    let holder = "prepared transaction 'it''s open' (";
    let detail = |drill: &Value, name: &str| {
        let check = drill["checks"].as_array().unwrap().iter().find(|c| c["name"] == name);
        check.unwrap_or_else(|| panic!("{name}: {drill:#}"))["detail"].as_str().unwrap().to_owned()
    };

    let answer = site.drill(0, &["--check", "select count(*) = 1 from journal"]);
    let drill = &answer["drills"][0];
    assert_eq!(drill["verdict"], "passed", "{drill:#}");
    let found = outcomes(drill);
    assert!(found.contains(&("pg_amcheck --heapallindexed", "passed")), "{drill:#}");
    assert!(found.contains(&("pg_amcheck of what is locked", "skipped")), "{drill:#}");
    assert_eq!(detail(drill, "pg_amcheck --heapallindexed"), "no corruption in any other table or index");
    let locked = detail(drill, "pg_amcheck of what is locked");
    assert!(locked.starts_with(&format!("2 not looked at, locked by {holder}")), "{locked}");
    for name in ["heap table \"postgres.public.locked\"", "btree index \"postgres.public.locked_pkey\""] {
        assert!(locked.contains(name), "{locked}");
    }

    let check = "select count(*) = 1 from locked";
    let answer = site.drill(1, &["--check", check]);
    let why = detail(&answer["drills"][0], check);
    let expected = format!("ERROR: canceling statement due to lock timeout; held by {holder}");
    assert!(why.starts_with(&expected), "{why}");

    // Once it has ended everything is looked at.
    cluster.query("rollback prepared 'it''s open'");
    cluster.archive_all();
    assert_passed(&site.drill(0, &["--check", check])["drills"][0]);
}

#[test]
fn a_drill_replays_natively_where_that_is_asked_for() {
    let site = Site::new("drill-native");
    let cluster = site.start(site.builder());
    let mut journal = Journal::create(&cluster);
    site.back_up(&cluster);
    let steps: Vec<_> = (0..6)
        .map(|n| {
            cluster.query("checkpoint");
            journal.step(&cluster, &format!("{n}"))
        })
        .collect();
    cluster.archive_all();
    let check = format!("select count(*) = {} from journal", steps[5].id);
    let answer = site.drill(0, &["--replay", "native", "--check", &check]);
    let drill = &answer["drills"][0];
    assert_passed(drill);
    assert!(drill["checks"].to_string().contains("but for pages that replay makes anew"), "{drill:#}");
    assert!(drill["notes"].to_string().contains("records were replayed natively to"), "{drill:#}");
    let check = format!("select count(*) = {} from journal", steps[3].id);
    let target = steps[3].xid.to_string();
    let answer = site.drill(0, &["--finish", "native", "--target-xid", &target, "--check", &check]);
    let drill = &answer["drills"][0];
    assert_passed(drill);
    assert!(drill["notes"].to_string().contains("the server had nothing to recover"), "{drill:#}");
    let answer = site.drill(0, &["--finish", "auto", "--target-xid", &target, "--check", &check]);
    let notes = answer["drills"][0]["notes"].to_string();
    assert!(notes.contains("the server had nothing to recover"), "{answer:#}");
    // Between the backup and the first step no checkpoint need have ended.
    let lsn = site.waltide.json(["list"])[0]["stop_lsn"].as_str().unwrap().to_owned();
    let answer = site.drill(0, &["--replay", "auto", "--target-lsn", &lsn]);
    assert!(
        answer["drills"][0]["notes"].to_string().contains("PostgreSQL replayed everything"),
        "{answer:#}"
    );
    let answer = site.drill(1, &["--replay", "native", "--target-lsn", &lsn]);
    let error = answer["drills"][0]["error"].to_string();
    assert!(error.contains("cannot be replayed natively: no checkpoint lies between"), "{answer:#}");
}
