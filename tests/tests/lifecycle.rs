//! One life of a cluster, from `init` to a restore, where the cluster itself is out of the ordinary.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use waltide_tests::workload::Journal;
use waltide_tests::{Cluster, PgInstall, Scratch, StopMode, Waltide};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn segments_of_every_size_lead_back_to_the_transaction_asked_for() {
    for size in [1, 64] {
        let scratch = Scratch::new(&format!("life-{size}"));
        let waltide = Waltide::new(&scratch).archive(scratch.dir("archive"));
        let builder = Cluster::builder("db").scratch(&scratch).segment_mb(size);
        let mut cluster = builder.archive_command(&waltide.archive_command()).create();
        waltide.ok(["init", "--data-dir", text(cluster.data_dir())]);
        cluster.start();
        let mut journal = Journal::create(&cluster);
        waltide.ok(["backup", "--data-dir", text(cluster.data_dir())]);
        let at = journal.steps_on(&cluster, 5);
        journal.steps_on(&cluster, 2);
        cluster.archive_all();
        cluster.stop(StopMode::Fast);

        let data_dir = scratch.fresh_path("restored");
        let xid = at.xid.to_string();
        waltide.ok(["restore", "--data-dir", text(&data_dir), "--target-xid", &xid]);
        let mut restored = Cluster::with_data_dir("restored", &scratch, &data_dir);
        restored.start();
        restored.wait_promoted();
        journal.assert_exactly_up_to(&restored, at.id);
        assert_eq!(waltide.json(["verify"])["faults"].as_array().map(Vec::len), Some(0));
    }
}

#[test]
fn a_transaction_prepared_before_the_backup_and_committed_after_it_is_where_the_target_puts_it() {
    let scratch = Scratch::new("prepared");
    let waltide = Waltide::new(&scratch).archive(scratch.dir("archive"));
    let builder = Cluster::builder("db").scratch(&scratch).setting("max_prepared_transactions", "5");
    let mut cluster = builder.archive_command(&waltide.archive_command()).create();
    waltide.ok(["init", "--data-dir", text(cluster.data_dir())]);
    cluster.start();
    cluster.query("create table t (a int)");
    cluster.query("begin; insert into t values (1); prepare transaction 'across'");
    waltide.ok(["backup", "--data-dir", text(cluster.data_dir())]);
    cluster.query("insert into t values (2)");
    cluster.query("select pg_create_restore_point('still prepared')");
    cluster.query("commit prepared 'across'");
    cluster.query("select pg_create_restore_point('committed')");
    cluster.archive_all();
    cluster.stop(StopMode::Fast);

    let restore = |name: &str, point: &str| {
        let data_dir = scratch.fresh_path(name);
        let target = ["--target-name", point, "--archive-mode", "off"];
        waltide.ok(["restore", "--data-dir", text(&data_dir)].into_iter().chain(target));
        let mut restored = Cluster::with_data_dir(name, &scratch, &data_dir);
        restored.start();
        restored.wait_promoted();
        restored
    };
    let restored = restore("before", "still prepared");
    assert_eq!(restored.query("select a from t order by a"), "2");
    assert_eq!(restored.query("select gid from pg_prepared_xacts"), "across");
    restored.query("commit prepared 'across'");
    assert_eq!(restored.query("select count(*) from t"), "2");

    let restored = restore("after", "committed");
    assert_eq!(restored.query("select string_agg(a::text, ',' order by a) from t"), "1,2");
    assert_eq!(restored.query("select count(*) from pg_prepared_xacts"), "0");
}

/// A cluster of Debian's own tools, dropped with the value.
struct DebianCluster {
    name: String,
}

impl DebianCluster {
    fn run(program: &str, arguments: &[&str]) {
        let output = Command::new(program).args(arguments).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{program} {arguments:?}: {told}");
    }
}

impl Drop for DebianCluster {
    fn drop(&mut self) {
        let _ = Command::new("pg_dropcluster").args(["--stop", "15", &self.name]).output();
    }
}

/// Debian's tools write below /etc, so this needs root and them; elsewhere there is no such cluster to try.
#[test]
fn a_cluster_made_by_pg_createcluster_is_restored_with_its_configuration_and_leaves_the_old_one_alone() {
    let tool = Path::new("/usr/bin/pg_createcluster");
    if !rustix::process::geteuid().is_root() || !tool.exists() {
        eprintln!("skipped: needs root and {}", tool.display());
        return;
    }
    let scratch = Scratch::new("debian");
    let waltide = Waltide::new(&scratch).archive(scratch.dir("archive"));
    let cluster = DebianCluster { name: format!("waltide{}", std::process::id()) };
    let sockets = scratch.dir("sockets");
    let data: PathBuf = scratch.dir("data");
    let archive_command = format!("archive_command={}", waltide.archive_command());
    let arguments = ["--datadir", text(&data), "--socketdir", text(&sockets), "--start-conf=manual"];
    let options =
        ["-o", "archive_mode=on", "-o", &archive_command, "-o", "listen_addresses=", "15", &cluster.name];
    let own = ["--", "--auth-local=trust"];
    DebianCluster::run(text(tool), &[&arguments[..], &options, &own].concat());
    assert!(!data.join("postgresql.conf").exists(), "Debian keeps it below /etc");
    waltide.ok(["init", "--data-dir", text(&data)]);
    DebianCluster::run("pg_ctlcluster", &["15", &cluster.name, "start"]);

    let psql = |sql: &str| {
        let port =
            fs::read_to_string(data.join("postmaster.pid")).unwrap().lines().nth(3).unwrap().to_owned();
        let client = PgInstall::find().runner("psql").args(["-XAtq", "-h", text(&sockets), "-p", &port]);
        client
            .args(["-U", "postgres", "-d", "postgres", "-c", sql])
            .run()
            .assert_ok()
            .stdout
            .trim()
            .to_owned()
    };
    psql("create table t as select 7 as a");
    // Debian's certificate is for members of ssl-cert, which the harness's database user is not.
    psql("alter system set ssl = off");
    waltide.ok(["backup", "--data-dir", text(&data)]);
    psql("select pg_switch_wal()");
    let before = fs::read_to_string(format!("/etc/postgresql/15/{}/postgresql.conf", cluster.name)).unwrap();

    let data_dir = scratch.fresh_path("restored");
    waltide.ok(["restore", "--data-dir", text(&data_dir), "--target", "immediate", "--archive-mode", "off"]);
    assert!(data_dir.join("postgresql.conf").exists() && data_dir.join("pg_hba.conf").exists());
    let mut restored = Cluster::with_data_dir("restored", &scratch, &data_dir);
    restored.start();
    restored.wait_promoted();
    assert_eq!(restored.query("select a from t"), "7");
    assert_eq!(restored.query("show data_directory"), text(&data_dir));
    psql("insert into t values (8)");
    assert_eq!(psql("select count(*) from t"), "2", "the old cluster runs on, on its own files");
    let after = fs::read_to_string(format!("/etc/postgresql/15/{}/postgresql.conf", cluster.name)).unwrap();
    assert_eq!(before, after);
}
