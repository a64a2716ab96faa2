//! The harness itself: what the other tests take for granted.

use waltide_tests::{Cluster, Scratch, StopMode};

#[test]
fn a_cluster_starts_answers_and_survives_every_way_of_stopping() {
    let mut cluster = Cluster::builder("life").start();
    assert_eq!(cluster.query("show wal_segment_size"), "1MB");
    assert_eq!(cluster.query("show data_checksums"), "on");
    assert_eq!(cluster.query("show listen_addresses"), "");
    cluster.query("create table t (x int); insert into t select generate_series(1, 1000);");
    for stop in [None, Some(StopMode::Immediate), Some(StopMode::Fast), Some(StopMode::Smart)] {
        cluster.query("insert into t values (0)");
        match stop {
            None => cluster.kill9(),
            Some(mode) => cluster.stop(mode),
        }
        assert!(!cluster.is_running());
        assert!(cluster.sql("postgres", "select 1").is_err());
        cluster.start();
    }
    assert_eq!(cluster.query("select count(*) from t"), "1004");
    let error = cluster.sql("postgres", "select 1; select no_such_column; select 2").unwrap_err().to_string();
    assert!(error.contains("column \"no_such_column\" does not exist"), "{error}");
}

#[test]
fn a_server_that_cannot_start_is_an_error_with_its_log() {
    let mut cluster = Cluster::builder("broken").setting("shared_buffers", "nonsense").create();
    let error = cluster.try_start().unwrap_err().to_string();
    assert!(error.contains("invalid value for parameter \"shared_buffers\""), "{error}");
}

#[test]
fn archiving_is_waited_for_and_segments_are_listed() {
    let scratch = Scratch::new("archiving");
    let archive = scratch.dir("archive");
    let cluster = Cluster::builder("db")
        .scratch(&scratch)
        .archive_command(&format!("cp %p {}/%f", archive.display()))
        .start();
    cluster.pgbench_init(1);
    let segments = cluster.wal_segments();
    let last = cluster.archive_all();
    assert_eq!(segments.last(), Some(&last));
    assert_eq!(std::fs::metadata(archive.join(&last)).unwrap().len(), 1 << 20);
}

#[test]
fn a_standby_follows_and_is_promoted() {
    let primary = Cluster::builder("primary").start();
    primary.create_tablespace("other");
    primary.query("create table t (x int) tablespace other");
    let standby = primary.make_standby("standby");
    primary.pgbench_init(1);
    let mut load = primary.pgbench_background(&["-T", "600"]);
    primary.query("insert into t values (7)");
    standby.wait_caught_up(&primary);
    assert_eq!(standby.query("select x from t"), "7");
    assert!(standby.sql("postgres", "insert into t values (8)").is_err());
    standby.promote();
    standby.query("insert into t values (9)");
    assert_eq!(standby.query("select left(pg_walfile_name(pg_current_wal_lsn()), 8)"), "00000002");
    assert!(load.is_running(), "{}", load.stderr());
    assert_eq!(load.kill9().status, 128 + 9);
}

#[test]
fn a_dropped_scratch_leaves_neither_files_nor_servers() {
    let scratch = Scratch::new("gone");
    let path = scratch.path().to_owned();
    let cluster = Cluster::builder("db").scratch(&scratch).start();
    let pid_file = std::fs::read_to_string(cluster.data_dir().join("postmaster.pid")).unwrap();
    let postmaster = pid_file.lines().next().unwrap().to_owned();
    let other = Cluster::attach("other", &scratch, cluster.data_dir()).unwrap();
    assert_eq!(other.query("select 1"), "1");
    drop(other);
    drop(cluster);
    drop(scratch);
    assert!(std::env::var_os("WALTIDE_KEEP").is_some() || !path.exists());
    assert!(!std::path::Path::new(&format!("/proc/{postmaster}")).exists());
}
