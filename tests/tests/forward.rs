//! Native replay against PostgreSQL's own recovery: the same base, the same log, the same files.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use waltide_tests::load::{self, Chance};
use waltide_tests::workload::{EVERY_RMGR_SETTINGS, every_rmgr_with};
use waltide_tests::{Cluster, Site, StopMode, pages};

/// A cluster whose archive is replayed in two ways.
struct Twice {
    site: Site,
    backup: Value,
}

impl Twice {
    /// Restores into a directory of that name, not started.
    #[track_caller]
    fn restore(&self, name: &str, args: &[&str]) -> (Cluster, Value) {
        let dir = self.site.scratch.fresh_path(name);
        let mut all: Vec<String> = ["restore", "--data-dir", dir.to_str().unwrap(), "--archive-mode", "off"]
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
        replayed.clone()
    }
}

#[track_caller]
fn assert_no_difference(at: &str, server: &Path, native: &Path) {
    let (pages, differences) = pages::compare(server, native);
    let shown: Vec<_> = differences.iter().take(40).collect();
    let count = differences.len();
    assert!(pages > 1000 && differences.is_empty(), "{at} {count} of {pages} pages differ: {shown:#?}");
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
    let replayed = Twice { site, backup }.assert_same(&lsn, &[]);
    assert!(replayed["records"].as_u64().unwrap() > 10_000, "{replayed}");
}
