//! Behind native replay PostgreSQL's recovery finds its first segments in the queue.

use std::fs;
use std::path::{Path, PathBuf};

use waltide_tests::oracle::ControlData;
use waltide_tests::site::{read_dir, text};
use waltide_tests::{Cluster, Site, poll_until};

const SEGMENT_BYTES: u64 = 1 << 20;

/// Makes a checkpoint whose record lies segments behind its redo point.
#[track_caller]
fn long_checkpoint(cluster: &Cluster) {
    for round in 0.. {
        assert!(round < 10, "each checkpoint was over before a segment was full");
        cluster.query("update t set n = n + 1");
        let started = || cluster.log_text().matches("checkpoint starting").count();
        let before = started();
        // It takes its time for each page, until the session is over.
        let backup =
            cluster.client("psql").args(["-XAtqc", "select pg_backup_start('x', false)", "postgres"]);
        let backup = backup.spawn(cluster.scratch(), "backup-start");
        poll_until("the checkpoint to start", std::time::Duration::from_secs(60), || {
            (started() > before).then_some(())
        });
        for _ in 0..2 {
            cluster.switch_wal();
        }
        let out = backup.wait();
        assert_eq!(out.status, 0, "{}", out.describe());
        let control = ControlData::read(cluster.data_dir());
        if control.checkpoint() / SEGMENT_BYTES >= control.redo() / SEGMENT_BYTES + 2 {
            return;
        }
    }
}

fn entries(data_dir: &Path) -> Vec<PathBuf> {
    let mut found = read_dir(&data_dir.join("pg_wal/waltide-queue"));
    found.retain(|path| text(path).contains('.'));
    found
}

/// Nothing of the WAL is there while it is away.
struct Away {
    wal: PathBuf,
    away: PathBuf,
}

impl Away {
    fn new(site: &Site, cluster: &Cluster) -> Self {
        let wal = site.archive.join(site.names(cluster).wal());
        let away = site.scratch.join("away");
        fs::rename(&wal, &away).unwrap();
        Self { wal, away }
    }

    fn back(self) {
        fs::rename(&self.away, &self.wal).unwrap();
    }
}

#[test]
fn recovery_goes_on_without_the_archive_where_the_queue_holds_what_is_left() {
    let site = Site::new("last-stretch");
    let builder = site.builder("db").segment_mb(1).setting("autovacuum", "off");
    let cluster = site.start(builder.setting("log_checkpoints", "on"));
    cluster.query("create table t (id int, n int) with (fillfactor = 10)");
    cluster.query("insert into t select g, 0 from generate_series(1, 2000) g");
    site.back_up(&cluster);
    long_checkpoint(&cluster);
    cluster.query("create table behind as select generate_series(1, 100) as id");
    cluster.switch_wal();
    cluster.query("insert into behind values (0)");
    cluster.query("select pg_logical_emit_message(false, 'waltide', 'before the target')");
    let lsn = cluster.query("select pg_current_wal_insert_lsn()");
    cluster.query("insert into behind values (-1)");
    cluster.archive_all();
    let restore = |name: &str| {
        let dir = site.scratch.fresh_path(name);
        let fixed = ["restore", "--data-dir", text(&dir), "--archive-mode", "off", "--replay", "native"];
        let done = site.waltide.json(fixed.iter().chain(&["--target-lsn", &lsn]));
        let (replayed, segments) = (&done["restored"]["replayed"], &done["plan"]["segments"]);
        let at = |field: &str| waltide_tests::oracle::parse_lsn(replayed[field].as_str().unwrap()).unwrap();
        assert!(at("checkpoint") / SEGMENT_BYTES >= at("redo") / SEGMENT_BYTES + 2, "{done}");
        let first = format!("{:08X}{:08X}{:08X}", 1, 0, at("redo") / SEGMENT_BYTES);
        let left = segments.as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap().to_owned());
        let left: Vec<_> = left.filter(|name| *name >= first).collect();
        assert!(left.len() >= 4 && left.len() <= 8, "{left:?}");
        assert_eq!(done["restored"]["queued_segments"], left.len(), "{done}");
        let queued: Vec<_> =
            entries(&dir).iter().map(|p| p.file_name().unwrap().to_str().unwrap()[..24].to_owned()).collect();
        assert_eq!(queued, left);
        Cluster::with_data_dir(name, &site.scratch, dir)
    };
    let assert_there = |cluster: &mut Cluster| {
        cluster.start();
        cluster.wait_promoted();
        assert_eq!(cluster.query("select count(*), min(id) from behind"), "101|0");
        assert!(!cluster.data_dir().join("pg_wal/waltide-queue").exists(), "it is gone at the end");
    };
    let mut alone = restore("alone");
    let away = Away::new(&site, &cluster);
    assert_there(&mut alone);
    away.back();

    // What does not fit its name is not handed over, wherever it came from.
    let damage = |cluster: &Cluster| {
        let entry = entries(cluster.data_dir()).pop().unwrap();
        let mut bytes = fs::read(&entry).unwrap();
        bytes[100] ^= 1;
        fs::write(&entry, bytes).unwrap();
        entry
    };
    let mut damaged = restore("damaged");
    let entry = damage(&damaged);
    assert_there(&mut damaged);
    let said = format!("{} is damaged and was not used", entry.file_name().unwrap().to_str().unwrap());
    assert!(damaged.log_text().contains(&said), "{}", damaged.log_text());

    let mut damaged = restore("damaged-alone");
    damage(&damaged);
    let away = Away::new(&site, &cluster);
    damaged.spawn();
    damaged.wait_stopped();
    let said = damaged.log_text();
    assert!(said.contains("recovery ended before configured recovery target was reached"), "{said}");
    away.back();
}

#[test]
fn a_damaged_segment_of_the_last_stretch_is_found_by_the_restore() {
    let site = Site::new("last-stretch-damaged");
    let cluster = site.start(site.builder("db").segment_mb(1).setting("autovacuum", "off"));
    site.back_up(&cluster);
    cluster.query("checkpoint");
    cluster.archive_all();
    cluster.query("create table t as select generate_series(1, 100) as id");
    let last = cluster.archive_all();
    let object = site.object(&cluster, &last);
    let mut bytes = fs::read(&object).unwrap();
    // In the WAL; what the plan reads of it, its index and footer, stays whole.
    bytes[200] ^= 1;
    fs::write(&object, bytes).unwrap();
    let dir = site.scratch.fresh_path("native");
    let failed = site.waltide.fails(3, ["restore", "--data-dir", text(&dir)]);
    assert!(failed.stderr.contains(&format!("{last} is damaged")), "{}", failed.stderr);
    assert!(!dir.join("global/pg_control").exists());
}
