//! Backups made of older ones and archived WAL: what they come back as, what they cost, what may be built on them.

use std::time::{Duration, Instant};

use serde_json::Value;
use waltide_format::Lsn;
use waltide_tests::load::{self, Chance};
use waltide_tests::stored::Stored;
use waltide_tests::{Cluster, Site, pages};

/// The bytes of a name's beginning, as the command names its scratch places.
const SCRATCH: &str = "waltide-advance-";

/// A backup made of the newest one, whose scratch place is gone.
#[track_caller]
fn advance(site: &Site, more: &[&str]) -> Value {
    let scratch = site.scratch.dir("below");
    let done = site.waltide.json(["advance", "--scratch", scratch.to_str().unwrap()].iter().chain(more));
    let left: Vec<_> = std::fs::read_dir(&scratch).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    done
}

fn id(backup: &Value) -> &str {
    backup["id"].as_str().unwrap_or_else(|| panic!("{backup}"))
}

fn number(backup: &Value, field: &str) -> u64 {
    backup[field].as_u64().unwrap_or_else(|| panic!("no {field} in {backup}"))
}

fn lsn(backup: &Value, field: &str) -> Lsn {
    backup[field].as_str().unwrap_or_else(|| panic!("no {field} in {backup}")).parse().unwrap()
}

/// A backup restored, recovered up to `lsn` and shut down there with every page on disk.
#[track_caller]
fn recovered(site: &Site, backup: &Value, lsn: &str, replay: &str) -> Cluster {
    let dir = site.scratch.fresh_path("recovered");
    let name = dir.file_name().unwrap().to_str().unwrap().to_owned();
    let mut args = vec!["restore".to_owned(), "--data-dir".to_owned(), dir.display().to_string()];
    for space in backup["tablespaces"].as_array().unwrap() {
        let place = site.scratch.fresh_path(&format!("{name}-{}", space["oid"]));
        args.push("--tablespace-map".to_owned());
        args.push(format!("{}={}", space["oid"], place.display()));
    }
    let fixed = ["--target-action", "shutdown", "--archive-mode", "off"];
    args.extend(["--backup", id(backup), "--target-lsn", lsn, "--replay", replay].map(str::to_owned));
    args.extend(fixed.map(str::to_owned));
    site.waltide.ok(&args);
    let mut cluster = Cluster::with_data_dir(&name, &site.scratch, dir);
    for (key, value) in [("hot_standby", "off"), ("checkpoint_timeout", "1h"), ("max_wal_size", "64GB")] {
        cluster.set(key, value);
    }
    cluster.spawn();
    cluster.wait_stopped();
    assert!(cluster.log_text().contains("shutting down"), "{}", cluster.log_text());
    cluster
}

/// A position behind a checkpoint: a recovery that is shut down leaves its pages in memory where there is none.
fn target(cluster: &Cluster) -> String {
    cluster.query("checkpoint");
    cluster.query("select pg_logical_emit_message(false, 'waltide', 'before the target')");
    let lsn = cluster.query("select pg_current_wal_insert_lsn()");
    cluster.query("select pg_logical_emit_message(false, 'waltide', 'the target')");
    cluster.archive_all();
    lsn
}

#[track_caller]
fn assert_same(one: &Cluster, other: &Cluster) {
    let (pages, differences) = pages::compare(one.data_dir(), other.data_dir());
    let shown: Vec<_> = differences.iter().take(40).collect();
    assert!(
        pages > 1000 && differences.is_empty(),
        "{} of {pages} pages differ: {shown:#?}",
        differences.len()
    );
}

fn checkpointed(cluster: &Cluster) {
    cluster.query("checkpoint");
    cluster.archive_all();
}

fn steps(cluster: &Cluster, chance: &mut Chance, most: u64) {
    for _ in 0..1 + chance.below(most) {
        load::step(cluster, chance);
    }
}

/// Under a random load: advanced twice, an incremental on that; each must come to what a full comes to.
fn under_load(chance: &mut Chance, checksums: bool) {
    let site = Site::new("advance-load");
    let builder = site.builder("db").settings(load::SETTINGS).checksums(checksums).segment_mb(4);
    let mut cluster = site.start(builder.setting("autovacuum", "off"));
    cluster.pgbench_init(1);
    load::prepare(&cluster);
    let full = site.back_up(&cluster);
    let bench = cluster.pgbench_background(&["-c", "2", "-R", "100", "-T", "300"]);
    steps(&cluster, chance, 12);
    checkpointed(&cluster);
    let first = advance(&site, &["--memory", "1MB"]);
    assert_eq!((&first["from"], &first["parent"]), (&full["id"], &full["id"]), "{first}");
    assert_eq!(first["kind"], "advanced", "{first}");
    steps(&cluster, chance, 12);
    bench.terminate();
    if chance.below(2) == 0 {
        // ALTER DATABASE SET TABLESPACE removes the old directory, then logs it, and waits for neither: a server killed in
        // between has lost the record, and no recovery removes the directory. A commit brings it to disk.
        cluster.query("select pg_logical_emit_message(true, 'waltide', 'before the crash')");
        cluster.kill9();
        cluster.start();
    }
    cluster.query(
        "create table seen (id int primary key); begin; insert into seen values (1); prepare transaction 'open'",
    );
    checkpointed(&cluster);
    let second = advance(&site, &[]);
    assert_eq!(second["parent"], first["id"], "{second}");
    assert!(lsn(&second, "start_lsn") >= lsn(&first, "stop_lsn"), "{first}\n{second}");
    cluster.query("commit prepared 'open'");
    steps(&cluster, chance, 6);
    let on_it = site.back_up(&cluster);
    assert_eq!((&on_it["kind"], &on_it["parent"]), (&"incremental".into(), &second["id"]), "{on_it}");
    // Of a database made with WAL_LOG the server's files have bits of visibility maps that recovery from its WAL, whose
    // images have a hole there, does not bring back.
    cluster.query("drop database if exists copied");
    let data_dir = cluster.data_dir().to_str().unwrap();
    let fresh = site.waltide.json(["backup", "--data-dir", data_dir, "--type", "full"]);
    steps(&cluster, chance, 6);
    let lsn = target(&cluster);
    let expected = recovered(&site, &fresh, &lsn, "server");
    for (backup, replay) in [(&first, "native"), (&second, "server"), (&second, "native"), (&on_it, "server")]
    {
        assert_same(&expected, &recovered(&site, backup, &lsn, replay));
    }
    let verified = site.waltide.json(["verify"]);
    assert_eq!((&verified["faults"], &verified["notes"]), (&Value::Array(vec![]), &Value::Array(vec![])));
}

#[test]
fn an_advanced_backup_comes_back_as_a_full_does() {
    let mut chance = Chance::new();
    for checksums in [true, false] {
        under_load(&mut chance, checksums);
    }
}

/// `WALTIDE_SOAK=<minutes>` goes on for so long.
#[test]
fn advanced_backups_under_many_loads_come_back_as_fulls_do() {
    let Ok(minutes) = std::env::var("WALTIDE_SOAK") else { return };
    let until =
        Instant::now() + Duration::from_secs(60 * minutes.parse::<u64>().expect("a number of minutes"));
    let mut chance = Chance::new();
    while Instant::now() < until {
        let checksums = chance.below(2) == 0;
        under_load(&mut chance, checksums);
    }
}

#[test]
fn only_what_changed_is_stored_and_the_original_may_go() {
    let site = Site::new("advance-cost");
    let builder = site.builder("db").segment_mb(4).setting("autovacuum", "off");
    let cluster = site.start(builder.setting("max_wal_size", "1GB"));
    cluster.create_tablespace("space");
    cluster.query(
        "create table pages (id int, n int, filler text) with (fillfactor = 50);
         alter table pages alter filler set storage plain;
         insert into pages select id, 0, (select string_agg(md5((id * 1000 + n)::text), '') from generate_series(1, 125) n)
             from generate_series(1, 16000) id;
         create table elsewhere tablespace space as select generate_series(1, 1000) as id",
    );
    cluster.query("vacuum (freeze) pages");
    let full = site.back_up(&cluster);
    cluster.query("select setseed(0.5)\\; update pages set n = n + 1 where random() < 0.01");
    cluster.create_tablespace("later");
    cluster.query("create table there tablespace later as select generate_series(1, 100) as id");
    checkpointed(&cluster);
    cluster.query("update elsewhere set id = id + 1");
    let updated = cluster.query("select now()");
    cluster.archive_all();
    let planned = site.waltide.json(["advance", "--dry-run"]);
    assert_eq!((&planned["dry_run"], &planned["from"]), (&true.into(), &full["id"]), "{planned}");
    assert_eq!(site.waltide.json(["list"]).as_array().unwrap().len(), 1);
    let done = advance(&site, &["--description", "rolled forward"]);
    assert_eq!(done["to"], planned["to"], "{done}");
    assert_eq!(done["tablespaces"].as_array().unwrap().len(), 2, "{done}");
    for field in ["read_bytes", "stored_bytes"] {
        let (cost, whole) = (number(&done, field), number(&full, field));
        assert!(cost * 20 <= whole, "{field}: {cost} of {whole}");
    }
    // What lies before its redo point is the original's to serve, and what lies behind its own.
    let serving = |args: &[&str]| {
        let dir = site.scratch.fresh_path("nowhere");
        let fixed = ["restore", "--dry-run", "--allow-clear", "--data-dir", dir.to_str().unwrap()];
        site.waltide.json(fixed.iter().chain(args))["plan"]["backup"].clone()
    };
    assert_eq!(serving(&["--target-time", &updated]), done["id"]);
    let time = |backup: &Value, field: &str| backup[field].as_str().unwrap().to_owned();
    assert_eq!(serving(&["--target-time", &time(&done, "stopped")]), done["id"]);
    assert_eq!(serving(&["--target-time", &time(&full, "stopped")]), full["id"]);
    assert_eq!(serving(&["--target-lsn", &time(&done, "stop_lsn")]), done["id"]);
    assert_eq!(serving(&["--target-lsn", &time(&done, "start_lsn")]), full["id"]);

    site.waltide.ok(["prune", "--keep-count", "1", "--grace", "0"]);
    let rows = site.waltide.json(["list"]);
    assert_eq!(rows.as_array().unwrap().len(), 1, "{rows}");
    let row = &rows[0];
    assert_eq!(
        (&row["id"], &row["kind"], &row["method"]),
        (&done["id"], &"advanced".into(), &"advance".into())
    );
    let verified = site.waltide.json(["verify"]);
    assert_eq!((&verified["faults"], &verified["notes"]), (&Value::Array(vec![]), &Value::Array(vec![])));
    for target in ["immediate", "latest"] {
        let drill = site.waltide.json([
            "drill",
            "--target",
            target,
            "--check",
            "select sum(n) between 100 and 220 from pages",
            "--check",
            "select count(*) = 1000 from elsewhere",
            "--check",
            "select count(*) = 100 from there",
        ]);
        assert_eq!(drill["drills"][0]["verdict"], "passed", "{drill}");
    }
}

#[test]
fn a_killed_advance_leaves_nothing_visible() {
    let site = Site::new("advance-kill");
    let cluster = site.start(site.builder("db").segment_mb(1).setting("autovacuum", "off"));
    cluster.query("create table t as select generate_series(1, 50000) as id");
    site.back_up(&cluster);
    let change = || {
        cluster.query("update t set id = id where id % 100 = 0");
        checkpointed(&cluster);
    };
    change();
    let began = Instant::now();
    advance(&site, &[]);
    let whole = began.elapsed();
    let scratch = site.scratch.dir("below");
    let stored = Stored::of(&cluster, &site.archive);
    let (rounds, mut killed, mut left) = (15, 0, 0);
    for round in 0..rounds {
        change();
        let mut running = site.waltide.spawn(["advance", "--scratch", scratch.to_str().unwrap()]);
        // Spread over the whole run.
        let until = Instant::now() + whole * round / rounds + Duration::from_millis(5);
        while running.is_running() && Instant::now() < until {
            std::hint::spin_loop();
        }
        killed += usize::from(running.kill9().status == 137);
        let names = std::fs::read_dir(&scratch).unwrap().map(|e| e.unwrap().file_name());
        left += names.filter(|name| name.to_str().unwrap().starts_with(SCRATCH)).count();
        for id in stored.backups().0 {
            stored.contents(&stored.manifest(&id));
        }
    }
    assert!(killed > 5 && left > 0, "{killed} of {rounds}, {left} scratch places");
    change();
    // It cleans up what the others left.
    let last = advance(&site, &[]);
    let lsn = target(&cluster);
    let data_dir = cluster.data_dir().to_str().unwrap();
    site.waltide.ok(["backup", "--data-dir", data_dir, "--type", "full"]);
    assert!(!recovered(&site, &last, &lsn, "server").log_text().is_empty());
    let verified = site.waltide.json(["verify"]);
    assert_eq!(verified["faults"], Value::Array(vec![]), "{verified}");
}

#[test]
fn what_cannot_be_advanced_is_said() {
    let site = Site::new("advance-not");
    let cluster = site.start(site.builder("db").segment_mb(1).setting("autovacuum", "off"));
    let full = site.back_up(&cluster);
    cluster.query("create table t as select generate_series(1, 1000) as id");
    cluster.archive_all();
    let out = site.waltide.fails(1, ["advance"]);
    let expected = format!(
        "backup {} cannot be advanced: no checkpoint lies between the backup's end and the target",
        id(&full)
    );
    assert!(out.stderr.contains(&expected), "{}", out.stderr);
    let before = cluster.query("select pg_current_wal_lsn()");
    checkpointed(&cluster);
    let out = site.waltide.fails(1, ["advance", "--to", &before]);
    assert!(out.stderr.contains(&expected), "{}", out.stderr);
    let out = site.waltide.fails(2, ["advance", "--to", "yesterdayish"]);
    assert!(out.stderr.contains("neither an LSN nor a time"), "{}", out.stderr);
    site.waltide.fails(1, ["advance", "--backup", "19990101"]);
    assert!(Stored::of(&cluster, &site.archive).backups().0.len() == 1);
    let done = advance(&site, &["--backup", id(&full)]);
    assert_eq!(done["parent"], full["id"]);
}

#[test]
fn what_is_advanced_to_a_time_serves_it() {
    let site = Site::new("advance-time");
    let cluster = site.start(site.builder("db").segment_mb(1).setting("autovacuum", "off"));
    let full = site.back_up(&cluster);
    cluster.query("create table t as select generate_series(1, 1000) as id");
    cluster.query("checkpoint");
    cluster.query("insert into t values (0)");
    cluster
        .wait_until("select clock_timestamp() > (pg_control_checkpoint()).checkpoint_time + interval '1 s'");
    let between = cluster.query("select clock_timestamp()");
    // A checkpoint's time is in whole seconds, and nothing commits before it.
    cluster.wait_until(&format!(
        "select extract(epoch from clock_timestamp())::bigint - 1
        > extract(epoch from '{between}'::timestamptz)::bigint"
    ));
    cluster.query("checkpoint");
    cluster.query("insert into t values (-1)");
    checkpointed(&cluster);
    let done = advance(&site, &["--to", &between]);
    assert_eq!(done["from"], full["id"], "{done}");
    let dir = site.scratch.fresh_path("served");
    let fixed = ["restore", "--dry-run", "--data-dir", dir.to_str().unwrap(), "--target-time", &between];
    let plan = &site.waltide.json(fixed)["plan"];
    assert_eq!(plan["backup"], done["id"], "{plan}");
    let restored = site.restored("restored", &["--target-time", &between]);
    assert_eq!(restored.query("select count(*), min(id) from t"), "1001|0");
    // Before the first checkpoint there is none that could serve it.
    let out = site.waltide.fails(1, ["advance", "--to", full["stopped"].as_str().unwrap()]);
    assert!(
        out.stderr.contains("no checkpoint lies between the backup's end and the target"),
        "{}",
        out.stderr
    );
}

#[test]
fn a_backup_is_advanced_over_a_promotion() {
    let site = Site::new("advance-promotion");
    let cluster = site.start(site.builder("db").settings(load::SETTINGS).segment_mb(1));
    cluster.pgbench_init(1);
    let full = site.back_up(&cluster);
    let mut standby = cluster.make_standby("standby");
    cluster.pgbench(&["-t", "200"]);
    cluster.query("create table kept as select generate_series(1, 3000) as id");
    cluster.query("begin; insert into kept values (0); prepare transaction 'over the promotion'");
    cluster.archive_all();
    standby.wait_caught_up(&cluster);
    standby.set("archive_mode", "on");
    standby.restart();
    standby.promote();
    // What the old primary still does is of no concern.
    cluster.query("truncate pgbench_history");
    cluster.archive_all();
    standby.query("insert into kept values (-1)");
    standby.pgbench(&["-t", "200"]);
    checkpointed(&standby);
    standby.query("commit prepared 'over the promotion'");
    standby.pgbench(&["-t", "100"]);
    let data_dir = standby.data_dir().to_str().unwrap();
    let done = advance(&site, &[]);
    assert_eq!((&done["from"], &done["timeline"]), (&full["id"], &2.into()), "{done}");
    let fresh = site.waltide.json(["backup", "--data-dir", data_dir, "--type", "full"]);
    standby.pgbench(&["-t", "100"]);
    let lsn = target(&standby);
    let expected = recovered(&site, &fresh, &lsn, "server");
    for replay in ["native", "server"] {
        assert_same(&expected, &recovered(&site, &done, &lsn, replay));
    }
    // The old timeline's end is not in its reach.
    let out = site.waltide.fails(3, ["advance", "--backup", id(&done), "--target-timeline", "1"]);
    assert!(out.stderr.contains("no backup lies on timeline 1"), "{}", out.stderr);
}

#[test]
fn an_advance_over_a_damaged_object_names_it_and_leaves_nothing() {
    let site = Site::new("advance-damaged");
    let cluster = site.start(site.builder("db").segment_mb(1).checksums(false).setting("autovacuum", "off"));
    cluster.query("create table t (id int primary key, filler text)");
    cluster.query("insert into t select g, md5(g::text) from generate_series(1, 20000) g");
    site.back_up(&cluster);
    cluster.query("update t set filler = 'changed' where id < 100");
    checkpointed(&cluster);
    let last = cluster.query(
        "select pg_walfile_name('0/0'::pg_lsn + (select redo_lsn - '0/0' from pg_control_checkpoint()))",
    );
    let stored = Stored::of(&cluster, &site.archive);
    let objects = || -> Vec<String> {
        let mut found = Vec::new();
        let mut left = vec![site.archive.clone()];
        while let Some(dir) = left.pop() {
            for path in waltide_tests::site::read_dir(&dir) {
                match path.is_dir() {
                    true => left.push(path),
                    false => found.push(path.display().to_string()),
                }
            }
        }
        found.sort();
        found
    };
    let manifest = stored.manifest(&stored.backups().0[0]);
    let pack = objects().into_iter().find(|o| o.contains("/chunks/packs/")).unwrap();
    let map = stored.path(&stored.names().map(&manifest.maps[0])).display().to_string();
    let segment = site.object(&cluster, &last).display().to_string();
    let before = objects();
    for damaged in [pack, map, segment] {
        let whole = std::fs::read(&damaged).unwrap();
        let mut bytes = whole.clone();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&damaged, &bytes).unwrap();
        let scratch = site.scratch.dir("below");
        let out = site.waltide.fails(3, ["advance", "--scratch", scratch.to_str().unwrap()]);
        let name = damaged.rsplit('/').next().unwrap();
        assert!(out.stderr.contains(name) && out.stderr.contains("damaged"), "{damaged}: {}", out.stderr);
        assert_eq!(objects(), before, "{damaged}");
        assert_eq!(std::fs::read_dir(&scratch).unwrap().count(), 0, "{damaged}");
        assert_eq!(stored.backups().1, [], "{damaged}");
        std::fs::write(&damaged, whole).unwrap();
    }
    advance(&site, &[]);
}
