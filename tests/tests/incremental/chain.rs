//! Chains of incrementals under load, against a full backup and PostgreSQL's own recovery.

use std::time::{Duration, Instant};

use serde_json::Value;
use waltide_tests::Cluster;
use waltide_tests::load::{self, Chance};

use crate::site::{Site, number};

/// A full and `links` backups on it, while chance and pgbench work on the cluster; then the older ones go, and the last
/// must recover to what a full recovers to.
fn chain(site: &Site, cluster: &mut Cluster, links: usize, chance: &mut Chance) {
    cluster.pgbench_init(1);
    load::prepare(cluster);
    site.full(cluster);
    let (mut last, mut merged) = (Value::Null, false);
    let mut maps = 1;
    for link in 0..links {
        for _ in 0..1 + chance.below(4) {
            load::step(cluster, chance);
        }
        if chance.below(8) == 0 {
            cluster.kill9();
            cluster.start();
        }
        let bench = cluster.pgbench_background(&["-c", "2", "-R", "150", "-T", "300"]);
        let kind = if link == 2 { "differential" } else { "incremental" };
        let running = site.waltide.spawn(site.args(cluster, &["--type", kind, "--json"]));
        load::step(cluster, chance);
        let mut done = running.wait();
        if done.status == 1 && done.stderr.contains("take another backup, while no database is moved") {
            done = site.waltide.runner(site.args(cluster, &["--type", kind, "--json"])).run();
        }
        let done = done.assert_ok();
        bench.terminate();
        last = serde_json::from_str(&done.stdout).unwrap();
        assert_eq!(last["kind"], kind, "link {link}: {last}");
        let count = site.manifest(cluster, &last).maps.len();
        assert!(count <= 16, "link {link} names {count} maps");
        merged |= count < maps && link > 2;
        maps = count;
    }
    assert!(merged || links < 20, "no maps were ever made one");
    // CREATE DATABASE with WAL_LOG logs visibility maps as pages with a hole, and their bits are where the hole is: the
    // server's files have them, what is recovered from its WAL has not. After a crash the server has what recovery makes.
    cluster.kill9();
    cluster.start();
    let full = site.full(cluster);
    // A backup that was refused is given up: until then its parent stays.
    site.waltide.ok(["prune", "--keep-count", "2", "--grace", "0", "--give-up-hours", "0"]);
    assert_eq!(site.waltide.json(["list"]).as_array().unwrap().len(), 2);
    site.assert_same(cluster, &last, &full);
    let verified = site.waltide.json(["verify"]);
    assert_eq!(verified["notes"], serde_json::json!([]), "{verified}");
}

#[test]
fn a_chain_of_incrementals_under_random_load_comes_back_as_a_full_does() {
    let site = Site::new("incremental-chain");
    let mut cluster = site.start(|b| b.settings(load::SETTINGS).segment_mb(4));
    let mut chance = Chance::new();
    chain(&site, &mut cluster, 20, &mut chance);
}

/// `WALTIDE_SOAK=<minutes>` makes chains of other lengths on clusters with and without checksums, for so long.
#[test]
fn chains_of_many_lengths_come_back_as_fulls_do() {
    let Ok(minutes) = std::env::var("WALTIDE_SOAK") else { return };
    let until =
        Instant::now() + Duration::from_secs(60 * minutes.parse::<u64>().expect("a number of minutes"));
    let mut chance = Chance::new();
    while Instant::now() < until {
        let site = Site::new("incremental-soak");
        let checksums = chance.below(2) == 0;
        let mut cluster = site.start(|b| b.settings(load::SETTINGS).checksums(checksums));
        let links = 3 + usize::try_from(chance.below(40)).unwrap();
        chain(&site, &mut cluster, links, &mut chance);
    }
}

#[test]
fn one_page_in_a_hundred_costs_a_twentieth() {
    let site = Site::new("incremental-cost");
    let cluster = site.start(|b| b.segment_mb(4).setting("max_wal_size", "1GB"));
    // What comes before the full is of no interest.
    let ship = site.waltide.archive_command();
    cluster.set("archive_command", "true");
    cluster.reload();
    cluster.query(
        "create table pages (id int, n int, filler text) with (fillfactor = 50);
         alter table pages alter filler set storage plain;
         insert into pages select id, 0, (select string_agg(md5((id * 1000 + n)::text), '') from generate_series(1, 125) n)
             from generate_series(1, 16000) id",
    );
    cluster.query("vacuum (freeze) pages");
    cluster.archive_all();
    assert_eq!(cluster.query("select pg_relation_size('pages') / 8192"), "16000");
    cluster.set("archive_command", &ship);
    cluster.reload();
    let full = site.full(&cluster);
    cluster.query("select setseed(0.5)\\; update pages set n = n + 1 where random() < 0.01");
    let pages: u64 = cluster.query("select count(*) from pages where n > 0").parse().unwrap();
    assert!((100..220).contains(&pages), "{pages}");
    let done = site.incremental(&cluster);
    for field in ["read_bytes", "stored_bytes"] {
        let (cost, whole) = (number(&done, field), number(&full, field));
        assert!(cost * 20 <= whole, "{field}: {cost} of {whole}");
        eprintln!("{field}: {cost} of {whole}, {:.2} %", cost as f64 * 100.0 / whole as f64);
    }
}
