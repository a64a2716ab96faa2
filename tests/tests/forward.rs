//! Native replay against PostgreSQL's own recovery: the same base, the same log, the same files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use waltide_tests::load::{self, Chance};
use waltide_tests::oracle::RecoveryEnd;
use waltide_tests::workload::{EVERY_RMGR_SETTINGS, every_rmgr_with};
use waltide_tests::{Cluster, Runner, Site, StopMode, pages};

/// A cluster whose archive is replayed in two ways.
struct Twice {
    site: Site,
    backup: Value,
}

impl Twice {
    /// Restores into a directory of that name, not started.
    #[track_caller]
    fn restore(&self, name: &str, args: &[&str]) -> (Cluster, Value) {
        self.restore_archiving(name, "off", args)
    }

    #[track_caller]
    fn restore_archiving(&self, name: &str, mode: &str, args: &[&str]) -> (Cluster, Value) {
        let dir = self.site.scratch.fresh_path(name);
        let mut all: Vec<String> = ["restore", "--data-dir", dir.to_str().unwrap(), "--archive-mode", mode]
            .iter()
            .map(|s| (*s).to_owned())
            .collect();
        let planned = self.backup["tablespaces"].as_array().unwrap();
        for space in planned {
            let place = self.site.scratch.fresh_path(&format!("{name}-{}", space["oid"]));
            all.push("--tablespace-map".to_owned());
            all.push(format!("{}={}", space["oid"], place.display()));
        }
        all.extend(args.iter().map(|s| (*s).to_owned()));
        let done = self.site.waltide.json(&all);
        let name = dir.file_name().unwrap().to_str().unwrap().to_owned();
        (Cluster::with_data_dir(&name, &self.site.scratch, dir), done)
    }

    /// Lets PostgreSQL recover to its target, and shut down there with every page on disk.
    fn recover(cluster: &mut Cluster, promote: bool) {
        for (key, value) in [("hot_standby", "off"), ("checkpoint_timeout", "1h"), ("max_wal_size", "64GB")] {
            cluster.set(key, value);
        }
        if promote {
            cluster.start();
            cluster.wait_promoted();
            cluster.stop(StopMode::Fast);
        } else {
            cluster.spawn();
            cluster.wait_stopped();
        }
        assert!(cluster.log_text().contains("shutting down"), "{}", cluster.log_text());
    }

    /// What native replay leaves must be what PostgreSQL's recovery comes to at the same place, and what PostgreSQL makes
    /// of it up to the target what it makes of the base.
    #[track_caller]
    fn assert_same(&self, target: &str, more: &[&str]) -> Value {
        let native: Vec<&str> =
            ["--target-lsn", target, "--replay", "native"].iter().chain(more).copied().collect();
        let (mut native, done) = self.restore("native", &native);
        let replayed = &done["restored"]["replayed"];
        let redo = replayed["redo"].as_str().unwrap_or_else(|| panic!("{done}"));
        let exclusive = ["--target-lsn", redo, "--target-exclusive", "--target-action", "shutdown"];
        let exclusive: Vec<&str> = exclusive.iter().chain(&["--replay", "server"]).copied().collect();
        let (mut server, _) = self.restore("server", &exclusive);
        Self::recover(&mut server, false);
        assert_no_difference("at the hand-over", server.data_dir(), native.data_dir());
        // What is replayed behind its only checkpoint is written by the promotion alone.
        Self::recover(&mut native, true);
        let (mut server, _) = self.restore("server", &["--target-lsn", target, "--replay", "server"]);
        Self::recover(&mut server, true);
        assert_no_difference("at the target", server.data_dir(), native.data_dir());
        self.assert_finished(target, more, &server);
        replayed.clone()
    }

    /// Native replay to the target itself leaves what PostgreSQL's recovery has left at its end, before any server is started
    /// on it and afterwards.
    #[track_caller]
    fn assert_finished(&self, target: &str, more: &[&str], server: &Cluster) {
        let finish: Vec<&str> =
            ["--target-lsn", target, "--finish", "native"].iter().chain(more).copied().collect();
        let (mut finished, done) = self.restore("finished", &finish);
        assert_eq!(done["restored"]["replayed"]["finished"], true, "{done}");
        assert_eq!(RecoveryEnd::read(server.data_dir()), RecoveryEnd::read(finished.data_dir()));
        let shutdown = ["--target-lsn", target, "--target-action", "shutdown", "--replay", "server"];
        let (mut at_the_end, _) = self.restore("at-the-end", &shutdown);
        Self::recover(&mut at_the_end, false);
        // A server that is shut down in recovery has not put unlogged relations back yet.
        let (pages, mut differences) = pages::compare(at_the_end.data_dir(), finished.data_dir());
        differences.retain(|told| {
            let main = finished.data_dir().join(told.split(' ').next().unwrap());
            let init = main.with_file_name(format!("{}_init", main.file_name().unwrap().to_str().unwrap()));
            !init.exists() || std::fs::read(&main).unwrap() != std::fs::read(&init).unwrap()
        });
        assert!(pages > 1000 && differences.is_empty(), "where it ends: {differences:#?}");
        Self::recover(&mut finished, true);
        let log = finished.log_text();
        assert!(log.contains("database system was shut down at") && !log.contains("redo starts"), "{log}");
        assert_no_difference("once a server was started", server.data_dir(), finished.data_dir());
        finished.start();
        finished.query("create extension if not exists amcheck");
        finished.client("pg_amcheck").args(["--heapallindexed", "postgres"]).run().assert_ok();
    }
}

#[track_caller]
fn assert_no_difference(at: &str, server: &Path, native: &Path) {
    let (pages, differences) = pages::compare(server, native);
    let shown: Vec<_> = differences.iter().take(40).collect();
    let count = differences.len();
    assert!(pages > 1000 && differences.is_empty(), "{at} {count} of {pages} pages differ: {shown:#?}");
    // A file of zeros is none to what compares pages.
    for logs in ["pg_xact", "pg_commit_ts", "pg_multixact/offsets", "pg_multixact/members"] {
        let names = |root: &Path| {
            let names = std::fs::read_dir(root.join(logs)).unwrap().map(|entry| entry.unwrap().file_name());
            names.collect::<BTreeSet<_>>()
        };
        assert_eq!(names(server), names(native), "{at}: {logs}");
    }
}

/// A checkpoint that PostgreSQL is handed over at, what comes behind it, and a position to go to.
fn checkpoint_and_more(cluster: &Cluster, chance: &mut Chance) -> String {
    cluster.query("checkpoint");
    load::step(cluster, chance);
    // A recovery that is shut down writes its pages where a checkpoint lies behind its beginning.
    cluster.query("checkpoint");
    load::step(cluster, chance);
    cluster.query("select pg_logical_emit_message(false, 'waltide', 'before the target')");
    let lsn = cluster.query("select pg_current_wal_insert_lsn()");
    cluster.query("select pg_logical_emit_message(false, 'waltide', 'the target')");
    cluster.archive_all();
    lsn
}

#[test]
fn a_random_load_is_replayed_to_the_same_files() {
    let mut chance = Chance::new();
    for checksums in [true, false] {
        random_load(&mut chance, checksums, 12);
    }
}

/// `WALTIDE_SOAK=<minutes>` replays loads of many lengths for so long.
#[test]
fn loads_of_many_lengths_are_replayed_to_the_same_files() {
    let Ok(minutes) = std::env::var("WALTIDE_SOAK") else { return };
    let until =
        Instant::now() + Duration::from_secs(60 * minutes.parse::<u64>().expect("a number of minutes"));
    let mut chance = Chance::new();
    while Instant::now() < until {
        let checksums = chance.below(2) == 0;
        let steps = 3 + chance.below(60);
        random_load(&mut chance, checksums, steps);
    }
}

fn random_load(chance: &mut Chance, checksums: bool, steps: u64) {
    let site = Site::new("forward");
    let builder = site.builder("db").settings(load::SETTINGS).checksums(checksums).segment_mb(4);
    let builder = builder.setting("wal_log_hints", chance.of(&["on", "off"]));
    let mut cluster = site.start(builder.setting("autovacuum", "off"));
    cluster.pgbench_init(1);
    load::prepare(&cluster);
    let bench = cluster.pgbench_background(&["-c", "2", "-R", "100", "-T", "300"]);
    let backup = site.back_up(&cluster);
    for _ in 0..steps {
        load::step(&cluster, chance);
    }
    bench.terminate();
    if chance.below(2) == 0 {
        cluster.kill9();
        cluster.start();
    }
    let lsn = checkpoint_and_more(&cluster, chance);
    let replayed = Twice { site, backup }.assert_same(&lsn, &["--memory", "1MB"]);
    assert!(replayed["pages"].as_u64().unwrap() > 100, "{replayed}");
}

#[test]
fn every_resource_manager_is_replayed_to_the_same_files() {
    let site = Site::new("forward-rmgrs");
    let builder = site.builder("db").settings(EVERY_RMGR_SETTINGS).setting("autovacuum", "off");
    let mut chance = Chance::new();
    let cluster = site.start(builder.setting("allow_in_place_tablespaces", "on"));
    load::prepare(&cluster);
    let backup = site.back_up(&cluster);
    every_rmgr_with(&cluster, "");
    let lsn = checkpoint_and_more(&cluster, &mut chance);
    // More threads than a runtime has for what blocks.
    let replayed = Twice { site, backup }.assert_same(&lsn, &["--threads", "600"]);
    assert!(replayed["records"].as_u64().unwrap() > 10_000, "{replayed}");
}

/// The page is changed, copied with its database and made anew, all of it in one segment: what came before the copy matters
/// to the copy alone.
#[test]
fn a_page_made_anew_behind_a_copy_of_its_database_is_copied_as_it_was() {
    let site = Site::new("forward-copy");
    let builder = site.builder("db").settings(load::SETTINGS).setting("autovacuum", "off");
    let cluster = site.start(builder);
    load::prepare(&cluster);
    cluster.query("create database source");
    let source = |sql: &str| cluster.sql("source", sql).unwrap();
    source("create table t as select n, 0 changed from generate_series(1, 100) n");
    let backup = site.back_up(&cluster);
    source("update t set changed = 1");
    cluster.query("create database copied template source strategy file_copy");
    source("update t set changed = 2");
    let lsn = checkpoint_and_more(&cluster, &mut Chance::new());
    Twice { site, backup }.assert_same(&lsn, &[]);
}

/// The same, with the page made anew much later, in a segment that is read long before that of the copy: what was passed over
/// there is needed after all.
#[test]
fn a_page_made_anew_long_after_a_copy_of_its_database_is_copied_as_it_was() {
    let site = Site::new("forward-late");
    let builder = site.builder("db").settings(load::SETTINGS).setting("autovacuum", "off").segment_mb(1);
    let cluster = site.start(builder);
    load::prepare(&cluster);
    cluster.query("create database source");
    let source = |sql: &str| cluster.sql("source", sql).unwrap();
    source("create table t as select n, 0 changed from generate_series(1, 100) n");
    // Without hint bits to be set, the update is what logs the image.
    source("vacuum freeze t");
    let backup = site.back_up(&cluster);
    cluster.query("checkpoint");
    source("update t set changed = 1");
    cluster.query("create database copied template source strategy file_copy");
    for n in 1..16 {
        cluster.query("select pg_switch_wal()");
        cluster.query(&format!("create table later_{n} ()"));
    }
    cluster.query("checkpoint");
    source("update t set changed = 2");
    let lsn = checkpoint_and_more(&cluster, &mut Chance::new());
    Twice { site, backup }.assert_same(&lsn, &[]);
}

/// While much is loaded that is dropped later, transactions end in every way: of most of those segments the index tells all.
#[test]
fn segments_of_which_no_page_matters_are_not_read() {
    let site = Site::new("forward-spared");
    let builder = site.builder("db").settings(load::SETTINGS).segment_mb(1).setting("autovacuum", "off");
    let cluster = site.start(builder.setting("track_commit_timestamp", "on"));
    load::prepare(&cluster);
    cluster.query("select pg_replication_origin_create('elsewhere')");
    let backup = site.back_up(&cluster);
    let scripts = site.scratch.dir("scripts");
    let mut chance = Chance::new();
    for n in 1..=3 {
        let ends = [
            "select pg_current_xact_id();",
            "begin; select pg_current_xact_id(); rollback;",
            "do $$ begin perform pg_current_xact_id();
                begin perform pg_current_xact_id(); exception when others then null; end; end $$;",
            &format!(
                "begin; select pg_current_xact_id(); prepare transaction 'p{n}'; commit prepared 'p{n}';"
            ),
            &format!(
                "begin; select pg_current_xact_id(); prepare transaction 'q{n}'; rollback prepared 'q{n}';"
            ),
            "select pg_replication_origin_session_setup('elsewhere');
             do $$ begin for i in 1..300 loop perform pg_replication_origin_xact_setup('7/' || i, now());
                perform pg_current_xact_id(); perform pg_sleep(0.01); commit; end loop; end $$;
             select pg_replication_origin_session_reset();",
        ];
        let running = ends.iter().enumerate().map(|(i, script)| {
            let path = scripts.join(format!("{n}-{i}.sql"));
            std::fs::write(&path, script.replace("; ", ";\n")).unwrap();
            cluster.pgbench_background(&["-R", "100", "-T", "300", "-f", path.to_str().unwrap()])
        });
        let running: Vec<_> = running.collect();
        cluster.query(
            "create table bulk as select g, repeat(md5(g::text), 4) filler from generate_series(1, 80000) g",
        );
        cluster.query("create index on bulk (g)");
        running.into_iter().for_each(|bench| drop(bench.terminate()));
        cluster.query("drop table bulk");
        load::step(&cluster, &mut chance);
    }
    let lsn = checkpoint_and_more(&cluster, &mut chance);
    let replayed = Twice { site, backup }.assert_same(&lsn, &["--memory", "1MB"]);
    let segments = |key: &str| replayed[key].as_u64().unwrap();
    assert!(segments("segments_spared") > 20, "{replayed}");
    assert!(segments("segments_read") > 3, "{replayed}");
}

/// How many positions of a long run are gone to: `WALTIDE_TARGETS`, else a few.
fn targets() -> u64 {
    std::env::var("WALTIDE_TARGETS").map_or(4, |n| n.parse().expect("a number of targets"))
}

/// What a client sees of a cluster, in an order of its own.
fn seen(cluster: &Cluster) -> String {
    let dump = cluster.client("pg_dump").args(["--data-only", "--inserts", "postgres"]).run().assert_ok();
    let mut lines: Vec<_> = dump.stdout.lines().filter(|line| line.starts_with("INSERT")).collect();
    lines.sort_unstable();
    lines.join("\n")
}

#[test]
fn any_moment_of_a_long_run_is_reached_whole() {
    let site = Site::new("forward-targets");
    let cluster = site.start(site.builder("db").segment_mb(1).setting("autovacuum_naptime", "1s"));
    cluster.pgbench_init(1);
    cluster.query("create extension amcheck; create table journal (id int primary key, filler text)");
    let backup = site.back_up(&cluster);
    let mut chance = Chance::new();
    let mut moments = Vec::new();
    let bench = cluster.pgbench_background(&["-c", "2", "-R", "400", "-T", "300"]);
    for id in 1..=3 * targets() {
        cluster.query(&format!("insert into journal select {id}, repeat('x', {})", chance.below(2000)));
        moments.push((id, cluster.query("select pg_current_wal_insert_lsn()")));
        cluster.query("select pg_sleep(0.2)");
        if id % 2 == 0 {
            cluster.query("checkpoint");
        }
    }
    bench.terminate();
    cluster.archive_all();
    let twice = Twice { site, backup };
    // Before the third no checkpoint need have ended behind the backup.
    for n in 0..targets() {
        let (id, lsn) = &moments[usize::try_from(chance.below(moments.len() as u64 - 3)).unwrap() + 3];
        let finish = ["native", "server"][usize::try_from(n % 2).unwrap()];
        let (mut native, done) = twice.restore(
            "native",
            &["--target-lsn", lsn, "--replay", "native", "--finish", finish, "--memory", "256kB"],
        );
        let replayed = &done["restored"]["replayed"];
        assert_eq!(replayed["finished"], finish == "native", "{replayed}");
        assert!(replayed["spilled_bytes"].as_u64().unwrap() > 0, "{replayed}");
        native.start();
        native.wait_promoted();
        assert_eq!(native.query("select count(*), max(id) from journal"), format!("{id}|{id}"), "{lsn}");
        let sums =
            "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history),
            (select sum(bbalance) from pgbench_branches) = (select sum(tbalance) from pgbench_tellers)";
        assert_eq!(native.query(sums), "t|t", "{lsn}");
        native.client("pg_amcheck").args(["--heapallindexed", "postgres"]).run().assert_ok();
        if n == 0 {
            let (mut server, _) = twice.restore("server", &["--target-lsn", lsn, "--replay", "server"]);
            server.start();
            server.wait_promoted();
            assert_eq!(seen(&native), seen(&server), "{lsn}");
        }
    }
}

#[test]
fn where_no_checkpoint_lies_between_postgresql_does_it_all() {
    let site = Site::new("forward-none");
    let cluster = site.start(site.builder("db").setting("autovacuum", "off"));
    let backup = site.back_up(&cluster);
    cluster.query("create table t as select generate_series(1, 100) as id");
    cluster.archive_all();
    let twice = Twice { site, backup };
    let dir = twice.site.scratch.fresh_path("native");
    let dir = dir.to_str().unwrap();
    let refused = twice.site.waltide.fails(1, ["restore", "--data-dir", dir, "--replay", "native"]);
    assert!(
        refused.stderr.contains("no checkpoint lies between the backup's end and the target"),
        "{refused:?}"
    );
    assert!(!Path::new(dir).exists());
    let (mut cluster, done) = twice.restore("auto", &[]);
    assert_eq!(done["actions"]["replay"]["how"], "server", "{done}");
    assert_eq!(done["restored"]["replayed"], Value::Null, "{done}");
    cluster.start();
    cluster.wait_promoted();
    assert_eq!(cluster.query("select count(*) from t"), "100");
}

#[test]
fn what_fails_while_it_is_written_is_thrown_away() {
    let site = Site::new("forward-failing");
    let builder = site.builder("db").checksums(false).setting("autovacuum", "off");
    let mut cluster = site.start(builder.setting("full_page_writes", "off"));
    cluster.create_tablespace("elsewhere");
    cluster.query("create table t (id int, n int) with (fillfactor = 50)");
    cluster.query("insert into t select n, 0 from generate_series(1, 1000) n");
    cluster.query("vacuum t; checkpoint");
    let file = cluster.data_dir().join(cluster.query("select pg_relation_filepath('t')"));
    cluster.stop(StopMode::Fast);
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, vec![0; whole.len()]).unwrap();
    cluster.start();
    // The backup has the table's pages empty; the log behind it changes pages that are full, and has no images of them.
    let backup = site.back_up(&cluster);
    cluster.stop(StopMode::Fast);
    std::fs::write(&file, whole).unwrap();
    cluster.start();
    cluster.query("update t set n = 1 where id = 7");
    cluster.query("checkpoint");
    cluster.archive_all();
    let twice = Twice { site, backup };
    let dir = twice.site.scratch.fresh_path("native");
    let dir_text = dir.to_str().unwrap();
    // Another version's cluster has its own directory in the tablespace.
    let space = twice.site.scratch.fresh_path("space");
    let other = space.join("PG_14_202107181/5/16400");
    std::fs::create_dir_all(other.parent().unwrap()).unwrap();
    std::fs::write(&other, "another cluster's").unwrap();
    twice.site.scratch.give_tree(&space);
    let map = format!("--tablespace-map={}={}", twice.backup["tablespaces"][0]["oid"], space.display());
    let restore = ["restore", "--data-dir", dir_text, "--archive-mode", "off", "--allow-clear", &map];
    let failed = twice.site.waltide.fails(1, [&restore[..], &["--replay", "native"]].concat());
    assert!(failed.stderr.contains("which is not there"), "{failed:?}");
    assert!(!dir.join("global/pg_control").exists());
    // Taken up again by PostgreSQL alone, it is what PostgreSQL's alone is.
    let out = twice.site.waltide.ok(restore);
    assert!(out.stderr.contains("PostgreSQL replays everything"), "{out:?}");
    assert_eq!(std::fs::read_to_string(&other).unwrap(), "another cluster's");
    std::fs::remove_dir_all(space.join("PG_14_202107181")).unwrap();
    let (server, _) = twice.restore("server", &["--replay", "server"]);
    let files = |root: &Path| -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut left = vec![root.to_owned()];
        while let Some(directory) = left.pop() {
            for entry in std::fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    left.push(path);
                } else {
                    let name = path.strip_prefix(root).unwrap().display().to_string();
                    files.insert(name, std::fs::read(&path).unwrap());
                }
            }
        }
        files
    };
    let (one, other) = (files(&dir), files(server.data_dir()));
    assert_eq!(one.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>());
    for (name, bytes) in one {
        assert!(bytes == other[&name], "{name}");
    }
}

#[test]
fn prepared_transactions_come_along() {
    let site = Site::new("forward-prepared");
    let cluster = site.start(site.builder("db").settings(load::SETTINGS).setting("autovacuum", "off"));
    cluster.query("create table t (id int primary key)");
    cluster.query("begin; insert into t values (1); prepare transaction 'before the backup'");
    cluster.query("begin; insert into t values (2); prepare transaction 'gone before the checkpoint'");
    let backup = site.back_up(&cluster);
    for id in 3..=6 {
        cluster.query(&format!("begin; insert into t values ({id}); prepare transaction 'number {id}'"));
    }
    cluster.query("rollback prepared 'gone before the checkpoint'");
    cluster.query("commit prepared 'number 3'");
    cluster.query("checkpoint");
    cluster.query("commit prepared 'number 4'");
    cluster.query("rollback prepared 'number 5'");
    cluster.query("begin; insert into t values (7); prepare transaction 'behind the checkpoint'");
    cluster.archive_all();
    let (mut native, _) = Twice { site, backup }.restore("native", &["--replay", "native"]);
    native.start();
    native.wait_promoted();
    let open = native.query("select string_agg(gid, ', ' order by gid) from pg_prepared_xacts");
    assert_eq!(open, "before the backup, behind the checkpoint, number 6");
    assert_eq!(native.query("select string_agg(id::text, ' ' order by id) from t"), "3 4");
    for gid in open.split(", ") {
        native.query(&format!("commit prepared '{gid}'"));
    }
    assert_eq!(native.query("select string_agg(id::text, ' ' order by id) from t"), "1 3 4 6 7");
}

#[test]
fn what_was_interrupted_is_taken_up_again() {
    let site = Site::new("forward-killed");
    let cluster = site.start(site.builder("db").settings(load::SETTINGS).segment_mb(4));
    cluster.pgbench_init(2);
    load::prepare(&cluster);
    let backup = site.back_up(&cluster);
    let mut chance = Chance::new();
    for _ in 0..6 {
        cluster.pgbench(&["-c", "2", "-t", "200"]);
        load::step(&cluster, &mut chance);
    }
    let lsn = checkpoint_and_more(&cluster, &mut chance);
    let spaces: Vec<_> =
        backup["tablespaces"].as_array().unwrap().iter().map(|s| s["oid"].to_string()).collect();
    let twice = Twice { site, backup };
    let dir = twice.site.scratch.fresh_path("native");
    let mut args: Vec<String> =
        ["restore", "--data-dir", dir.to_str().unwrap(), "--target-lsn", &lsn, "--replay", "native"]
            .map(str::to_owned)
            .to_vec();
    args.extend(["--archive-mode".to_owned(), "off".to_owned()]);
    for oid in spaces {
        let place = twice.site.scratch.fresh_path("space");
        args.extend(["--tablespace-map".to_owned(), format!("{oid}={}", place.display())]);
    }
    let started = Instant::now();
    twice.site.waltide.ok(&args);
    let took = started.elapsed();
    std::fs::remove_file(dir.join("recovery.signal")).unwrap();
    let whole: Vec<_> = [&args[..], &["--allow-clear".to_owned()]].concat();
    for part in 1..6u32 {
        let running = twice.site.waltide.spawn(&whole);
        std::thread::sleep(took * part / 6);
        running.kill9();
    }
    // The mark of an interrupted restore is enough: nothing else lies there.
    twice.site.waltide.ok(&whole);
    let (mut server, _) = twice.restore("server", &["--target-lsn", &lsn, "--replay", "server"]);
    Twice::recover(&mut server, true);
    let name = dir.file_name().unwrap().to_str().unwrap().to_owned();
    let mut native = Cluster::with_data_dir(&name, &twice.site.scratch, dir);
    Twice::recover(&mut native, true);
    assert_no_difference("after five kills", server.data_dir(), native.data_dir());
}

#[test]
fn a_base_from_a_standby_is_replayed_to_the_same_files() {
    let site = Site::new("forward-standby");
    let builder = site.builder("db").settings(load::SETTINGS).segment_mb(1).setting("autovacuum", "off");
    let cluster = site.start(builder);
    cluster.pgbench_init(1);
    load::prepare(&cluster);
    let standby = cluster.make_standby("standby");
    let bench = cluster.pgbench_background(&["-c", "2", "-R", "100", "-T", "300"]);
    cluster.query("checkpoint");
    standby.wait_caught_up(&cluster);
    // Its end is a position that the standby replayed, in a segment that only the primary can end.
    let mut running =
        site.waltide.spawn(["backup", "--data-dir", standby.data_dir().to_str().unwrap(), "--json"]);
    while running.is_running() {
        cluster.query("update t set k = k + 1 where id % 50 = 0");
        cluster.switch_wal();
    }
    let backup: Value = serde_json::from_str(&running.wait().assert_ok().stdout).unwrap();
    assert_eq!(backup["from_standby"], true, "{backup}");
    let mut chance = Chance::new();
    for _ in 0..8 {
        load::step(&cluster, &mut chance);
    }
    bench.terminate();
    let lsn = checkpoint_and_more(&cluster, &mut chance);
    let replayed = Twice { site, backup }.assert_same(&lsn, &["--memory", "1MB"]);
    assert!(replayed["pages"].as_u64().unwrap() > 100, "{replayed}");
}

/// It answers queries while it follows, with transactions that were open where it was handed over.
#[test]
fn a_standby_is_brought_forward_and_follows_from_there() {
    let site = Site::new("forward-follower");
    let builder = site.builder("db").settings(load::SETTINGS).segment_mb(1).setting("autovacuum", "off");
    let cluster = site.start(builder);
    cluster.pgbench_init(1);
    cluster.query("create extension amcheck; create table t (id int primary key)");
    site.back_up(&cluster);
    let bench = cluster.pgbench_background(&["-c", "2", "-R", "200", "-T", "300"]);
    cluster.query("begin; insert into t values (1); prepare transaction 'prepared'");
    let open = "begin;
        do $$ begin for i in 2..20 loop begin insert into t values (i); exception when others then null; end; end loop; end $$;
        select pg_sleep(600);";
    let script = site.scratch.dir("scripts").join("open.sql");
    std::fs::write(&script, open).unwrap();
    let open = cluster.pgbench_background(&["-t", "1", "-f", script.to_str().unwrap()]);
    cluster
        .wait_until("select exists (select from pg_stat_activity where query like 'select pg_sleep(600)%')");
    for _ in 0..3 {
        cluster.query("select pg_sleep(1)");
        cluster.query("checkpoint");
    }
    cluster.query("insert into t values (100)");
    cluster.archive_all();
    let dir = site.scratch.fresh_path("standby");
    let restore = ["restore", "--standby", "--replay", "native", "--archive-mode", "off", "--data-dir"];
    let done = site.waltide.json(restore.iter().chain(&[dir.to_str().unwrap()]));
    let replayed = &done["restored"]["replayed"];
    assert!(replayed["pages"].as_u64().unwrap() > 100 && dir.join("standby.signal").exists(), "{done}");
    // It follows the timeline that was replayed, where that was said.
    for (more, followed) in [(&[][..], "latest"), (&["--target-timeline", "1"], "1")] {
        let planned = restore.iter().chain(&["other", "--dry-run"]).chain(more);
        let settings = site.waltide.json(planned)["actions"]["settings"].to_string();
        assert!(settings.contains(&format!("[\"recovery_target_timeline\",\"{followed}\"]")), "{settings}");
    }
    let mut standby = Cluster::with_data_dir("standby", &site.scratch, &dir);
    standby.set("wal_retrieve_retry_interval", "200ms");
    standby.start();
    standby.wait_until("select count(*) = 1 from t");
    assert_eq!(standby.query("select pg_is_in_recovery()"), "t");
    let redo = replayed["redo"].as_str().unwrap();
    assert!(standby.log_text().contains(&format!("redo starts at {redo}")), "{}", standby.log_text());
    open.terminate();
    bench.terminate();
    cluster.query("insert into t values (101); commit prepared 'prepared'");
    cluster.archive_all();
    standby.wait_until("select count(*) = 3 from t");
    assert_eq!(standby.query("select string_agg(id::text, ' ' order by id) from t"), "1 100 101");
    assert_eq!(seen(&standby), seen(&cluster));
    standby.promote();
    standby.query("insert into t select generate_series(200, 300)");
    standby.client("pg_amcheck").args(["--heapallindexed", "postgres"]).run().assert_ok();
}

#[test]
fn a_promotion_inside_the_range_is_followed_to_the_same_files() {
    let site = Site::new("forward-promotion");
    let builder = site.builder("db").settings(load::SETTINGS).segment_mb(1).setting("autovacuum", "off");
    let cluster = site.start(builder);
    cluster.pgbench_init(1);
    load::prepare(&cluster);
    // From the promotion on: the primary is not started again.
    cluster.set("track_commit_timestamp", "on");
    let backup = site.back_up(&cluster);
    let mut chance = Chance::new();
    let mut standby = cluster.make_standby("standby");
    for _ in 0..4 {
        load::step(&cluster, &mut chance);
    }
    cluster.pgbench(&["-c", "2", "-t", "200"]);
    cluster.query("create table forked (id int); insert into forked select generate_series(1, 5000)");
    cluster.archive_all();
    cluster.query("insert into forked values (0)");
    // At the promotion, where commit timestamps are switched on, one is running that has numbers in two of their files.
    let next: u64 = cluster.query("select pg_current_xact_id()").parse().unwrap();
    let burnt = 32 * 819 - (next + 6) % (32 * 819);
    cluster.query(&format!(
        "set synchronous_commit = off; do $$ begin for i in 1..{burnt} loop perform pg_current_xact_id(); commit; end loop; end $$"
    ));
    let script = site.scratch.dir("scripts").join("running.sql");
    let running = "begin;
        do $$ begin for i in 1..10 loop begin insert into forked values (-i); exception when others then null; end; end loop; end $$;
        select pg_sleep(600);";
    std::fs::write(&script, running).unwrap();
    let running = cluster.pgbench_background(&["-t", "1", "-f", script.to_str().unwrap()]);
    cluster
        .wait_until("select exists (select from pg_stat_activity where query like 'select pg_sleep(600)%')");
    // Nothing that bears a number comes behind it.
    cluster.query("select pg_switch_wal()");
    standby.wait_caught_up(&cluster);
    standby.set("archive_mode", "on");
    standby.restart();
    standby.promote();
    running.terminate();
    // Both go on from the middle of a segment; what the old one does is on no way to the target.
    cluster.query("delete from forked; vacuum forked; drop table t");
    cluster.query("checkpoint");
    cluster.archive_all();
    standby.query("update forked set id = -id where id % 7 = 0");
    for _ in 0..4 {
        load::step(&standby, &mut chance);
    }
    standby.pgbench(&["-c", "2", "-t", "200"]);
    let lsn = checkpoint_and_more(&standby, &mut chance);
    let twice = Twice { site, backup };
    let replayed = twice.assert_same(&lsn, &["--memory", "1MB"]);
    assert_eq!(replayed["timeline"], 2, "{replayed}");
}

#[test]
fn a_timeline_that_begins_with_the_checkpoint_is_followed_to_the_same_files() {
    let site = Site::new("forward-fork");
    let builder = site.builder("db").settings(load::SETTINGS).segment_mb(1).setting("autovacuum", "off");
    let mut cluster = site.start(builder);
    cluster.pgbench_init(1);
    load::prepare(&cluster);
    let backup = site.back_up(&cluster);
    cluster.pgbench(&["-c", "2", "-t", "200"]);
    let mut chance = Chance::new();
    let lsn = checkpoint_and_more(&cluster, &mut chance);
    cluster.query("create table lost as select generate_series(1, 5000) as id");
    cluster.query("checkpoint");
    cluster.archive_all();
    cluster.stop(StopMode::Fast);
    let twice = Twice { site, backup };
    // A recovery that ends at its target begins its timeline with a checkpoint, whose redo point is the fork.
    let (mut second, _) = twice.restore_archiving("second", "preserve", &["--target-lsn", &lsn]);
    second.start();
    second.wait_promoted();
    second.query("create table kept as select generate_series(1, 5000) as id");
    let end = second.query("select pg_current_wal_insert_lsn()");
    second.query("select pg_logical_emit_message(false, 'waltide', 'the target')");
    second.archive_all();
    let replayed = twice.assert_same(&end, &["--memory", "1MB"]);
    assert_eq!(replayed["timeline"], 2, "{replayed}");
    assert_eq!(replayed["checkpoint"], replayed["redo"], "{replayed}");
}

/// A file system of its own, unmounted when dropped.
struct SmallPlace(PathBuf);

impl SmallPlace {
    /// None where this process may not mount one.
    fn new(site: &Site, megabytes: u64) -> Option<Self> {
        let dir = site.scratch.dir("small");
        let options = format!("size={megabytes}m,mode=0777");
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "waltide-test"]).arg(&dir).output();
        match mount {
            Ok(out) if out.status.success() => Some(Self(dir)),
            failed => {
                eprintln!("skipped: no small file system can be mounted here: {failed:?}");
                None
            }
        }
    }
}

impl Drop for SmallPlace {
    fn drop(&mut self) {
        // What works in it was killed when its cluster was dropped.
        let done = Command::new("umount").arg(&self.0).status();
        assert!(
            done.is_ok_and(|status| status.success()) || std::thread::panicking(),
            "{}",
            self.0.display()
        );
    }
}

/// The rows of the table `t`, summed up.
fn rows(cluster: &Cluster) -> String {
    cluster.query("select md5(string_agg(t::text, ',' order by id)) from t")
}

/// The cluster once its recovery has ended.
fn promoted(mut cluster: Cluster) -> Cluster {
    cluster.start();
    cluster.wait_promoted();
    cluster
}

/// Much more log than there is room, nearly all of it images of the same pages: of them the newest are set aside.
#[test]
fn images_of_a_page_count_once_for_the_room_that_is_needed() {
    let site = Site::new("forward-images");
    let Some(small) = SmallPlace::new(&site, 140) else { return };
    let builder = site.builder("db").segment_mb(1).setting("autovacuum", "off");
    let cluster = site.start(builder.setting("max_wal_size", "8MB"));
    cluster.query("create table t (id int primary key, changed int, filler text) with (fillfactor = 70)");
    cluster.query("alter table t alter filler set storage plain");
    cluster.query("insert into t select g, 0, repeat('x', 1000) from generate_series(1, 5000) g");
    site.back_up(&cluster);
    let begin = cluster.query("select pg_current_wal_insert_lsn()");
    for n in 1..=24 {
        cluster.query("checkpoint");
        cluster.query(&format!("update t set changed = {n} where id % 5 = 0"));
    }
    let written =
        cluster.query(&format!("select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '{begin}')::bigint"));
    assert!(written.parse::<u64>().unwrap() > 140 << 20, "{written}");
    cluster.query("checkpoint");
    cluster.archive_all();
    let expected = rows(&cluster);
    let dir = small.0.join("native");
    let restore =
        ["restore", "--archive-mode", "off", "--memory", "1MB", "--data-dir", dir.to_str().unwrap()];
    let done = site.waltide.json(restore);
    let replayed = &done["restored"]["replayed"];
    assert!(replayed["spilled_bytes"].as_u64().is_some_and(|bytes| bytes > 1 << 20), "{done}");
    assert_eq!(rows(&promoted(Cluster::with_data_dir("restored", &site.scratch, &dir))), expected);
    drop(small);
}

#[test]
fn where_the_log_cannot_be_set_aside_postgresql_does_it_all() {
    let site = Site::new("forward-room");
    // The files fit; what is kept of the log, which is more, does not.
    let Some(small) = SmallPlace::new(&site, 100) else { return };
    // Without images of pages all of it is kept, and recovery, which has a checkpoint now and then, keeps few segments.
    let builder = site.builder("db").checksums(false).segment_mb(1).setting("autovacuum", "off");
    let cluster = site.start(builder.setting("full_page_writes", "off").setting("max_wal_size", "8MB"));
    cluster.query("create table t (id int primary key, filler text) with (fillfactor = 50)");
    cluster.query("alter table t alter filler set storage plain");
    cluster.query("insert into t select g, repeat('x', 1000) from generate_series(1, 100) g");
    site.back_up(&cluster);
    cluster.query("checkpoint");
    let change = "update t set filler = (select string_agg(md5((random() + id + g)::text), '') from generate_series(1, 40) g)";
    let begin = cluster.query("select pg_current_wal_insert_lsn()");
    cluster.query(&format!("do $$ begin for n in 1..1000 loop {change}; commit; end loop; end $$"));
    let written =
        cluster.query(&format!("select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '{begin}')::bigint"));
    assert!(written.parse::<u64>().unwrap() > 120 << 20, "{written}");
    cluster.query("checkpoint");
    cluster.query("insert into t values (0, 'behind the checkpoint')");
    cluster.archive_all();
    let expected = rows(&cluster);
    let dir = small.0.join("native");
    let fixed = ["restore", "--archive-mode", "off", "--memory", "1MB", "--data-dir", dir.to_str().unwrap()];
    let failed = site.waltide.fails(1, fixed.iter().chain(&["--replay", "native"]));
    assert!(failed.stderr.contains("what is set aside of the log could not be"), "{failed:?}");
    assert!(failed.stderr.contains("No space left on device"), "{failed:?}");
    assert!(std::fs::read_dir(&small.0).unwrap().next().is_none(), "nothing is left: {failed:?}");
    // Unless it must be native, that is known from the log's length.
    let planned = site.waltide.json(fixed.iter().chain(&["--dry-run"]));
    let because = planned["actions"]["replay"]["because"].as_str().unwrap_or_default();
    assert!(because.contains(" bytes of the log may have to be set aside"), "{planned}");
    // What that takes is said as where PostgreSQL is asked for.
    let asked = site.waltide.json(fixed.iter().chain(&["--dry-run", "--replay", "server"]));
    let native = site.waltide.json(fixed.iter().chain(&["--dry-run", "--replay", "native"]));
    assert_eq!(planned["plan"]["estimate"], asked["plan"]["estimate"]);
    let recovery = |answer: &Value| answer["plan"]["estimate"]["recovery_seconds"].as_f64().unwrap();
    assert!(recovery(&native) < recovery(&asked) / 2.0, "{native}");
    let text = site.waltide.ok(fixed.iter().chain(&["--dry-run"])).stdout;
    assert!(text.contains(&format!("replay    by PostgreSQL: {because}")), "{text}");
    assert!(std::fs::read_dir(&small.0).unwrap().next().is_none(), "nothing was written");
    let out = site.waltide.ok(fixed);
    assert!(!out.stdout.contains("replayed  "), "{out:?}");
    assert_eq!(rows(&promoted(Cluster::with_data_dir("restored", &site.scratch, &dir))), expected);
    // Where there seems to be room, and no file may be so long after all, it is known when nothing is written yet.
    let dir = site.scratch.fresh_path("limited");
    let script = "trap '' XFSZ; ulimit -f 51200; exec \"$@\"";
    let archive = site.archive.to_str().unwrap();
    let waltide = Runner::as_postgres("bash").args(["-c", script, "bash"]).arg(site.waltide.program());
    let waltide = waltide.args(["--archive", archive, "--cluster", "main", "restore", "--memory", "1MB"]);
    let out = waltide.args(["--archive-mode", "off", "--data-dir", dir.to_str().unwrap()]).run().assert_ok();
    assert!(out.stderr.contains("what is set aside of the log could not be"), "{out:?}");
    assert!(out.stderr.contains("PostgreSQL replays everything"), "{out:?}");
    assert_eq!(rows(&promoted(Cluster::with_data_dir("limited", &site.scratch, &dir))), expected);
    drop(small);
}
