//! The harness itself: what the other tests take for granted.

use std::collections::BTreeMap;
use waltide_tests::oracle::{ControlData, RmgrStats, Waldump, waldump_stats};
use waltide_tests::workload::{EVERY_RMGR_SETTINGS, Journal, RMGRS, every_rmgr};
use waltide_tests::{Cluster, Scratch, StopMode, Waltide};

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

#[test]
fn the_script_makes_wal_of_every_resource_manager_and_the_oracle_counts_as_pg_waldump_does() {
    let mut cluster =
        Cluster::builder("rmgrs").settings(EVERY_RMGR_SETTINGS).setting("wal_keep_size", "1GB").start();
    every_rmgr(&cluster);
    let segments = cluster.wal_segments();
    cluster.stop(StopMode::Fast);
    let wal = cluster.data_dir().join("pg_wal");
    let (first, last) = (segments.first().unwrap(), segments.last().unwrap());

    let (records, end) = Waldump::segments(&wal, first, Some(last)).finish();
    assert!(end.success || end.message.contains("invalid record length"), "{end:?}");
    let mut ours: BTreeMap<String, RmgrStats> = BTreeMap::new();
    for record in &records {
        for name in [record.rmgr.as_str(), "Total"] {
            let stats = ours.entry(name.to_owned()).or_default();
            stats.count += 1;
            stats.record_bytes += u64::from(record.rec_len);
            stats.image_bytes += u64::from(record.total_len - record.rec_len);
        }
    }
    let theirs = waldump_stats(&wal, first, Some(last));
    assert_eq!(ours, theirs);
    for rmgr in RMGRS {
        assert!(theirs.get(rmgr).is_some_and(|stats| stats.count > 0), "no record of {rmgr}: {theirs:?}");
    }
    assert!(records.iter().flat_map(|record| &record.blocks).any(|block| block.image.is_some()));
    assert!(records.windows(2).all(|pair| pair[1].prev == pair[0].lsn));

    let control = ControlData::read(cluster.data_dir());
    assert_eq!(control.state(), "shut down");
    assert_eq!(control.number("Bytes per WAL segment"), 1 << 20);
    let checkpoint = records.last().unwrap();
    assert_eq!((checkpoint.lsn, checkpoint.kind()), (control.checkpoint(), "CHECKPOINT_SHUTDOWN"));
    let (tail, end) = Waldump::range(&wal, 1, control.redo(), None).finish();
    assert_eq!(tail.as_slice(), std::slice::from_ref(checkpoint));
    assert!(!end.success && end.message.contains("invalid record length"), "{end:?}");
}

#[test]
fn a_journal_knows_its_transactions() {
    let mut cluster = Cluster::builder("journal").setting("track_commit_timestamp", "on").start();
    let mut journal = Journal::create(&cluster);
    let first = journal.step(&cluster, "it's the first");
    let last = journal.steps_on(&cluster, 9);
    journal.assert_exactly_up_to(&cluster, 10);
    assert_eq!((first.id, last.id, journal.len(), first.timeline), (1, 10, 10, 1));
    assert!(journal.steps().windows(2).all(|pair| pair[0].committed_at < pair[1].committed_at));
    assert!(journal.steps().windows(2).all(|pair| pair[0].end() < pair[1].end()));

    // Each commit record lies where the journal says, and is of the transaction it says.
    cluster.stop(StopMode::Fast);
    let wal = cluster.data_dir().join("pg_wal");
    let start = waltide_tests::oracle::parse_lsn(&first.lsn_before).unwrap();
    let (records, _) = Waldump::range(&wal, 1, start, None).finish();
    for step in journal.steps() {
        let commit = records
            .iter()
            .find(|record| record.kind() == "COMMIT" && u64::from(record.xid) == step.xid)
            .unwrap_or_else(|| panic!("no commit of {step:?}"));
        let before = waltide_tests::oracle::parse_lsn(&step.lsn_before).unwrap();
        assert!(before <= commit.lsn && commit.lsn < step.end(), "{step:?} {commit:?}");
        let time = step.committed_at.strip_suffix("+00").unwrap();
        assert!(commit.desc.contains(time), "{step:?} {commit:?}");
    }
    cluster.start();
    journal.step(&cluster, "after a restart");
    assert_eq!(journal.rows(&cluster).len(), 11);
    let fork = journal.forked_after(4);
    assert_eq!(fork.steps(), &journal.steps()[..4]);
    assert!(std::panic::catch_unwind(|| fork.assert_exactly_up_to(&cluster, 4)).is_err());
}

#[test]
fn the_built_binaries_run_as_the_databases_user() {
    let scratch = Scratch::new("binaries");
    let waltide = Waltide::new(&scratch).archive(scratch.dir("archive")).cluster("main");
    assert_eq!(
        waltide.archive_command(),
        format!("{0}/bin/waltide --archive {0}/archive --cluster main push %p", scratch.path().display())
    );
    for waltide in [Waltide::new(&scratch), Waltide::new(&scratch).restore_pitr(), waltide.as_self()] {
        waltide.ok(["--version"]);
    }
}
