//! Databases whose files are copied while a backup runs, between its start and the listing of its files.

use std::time::Duration;

use serde_json::Value;
use waltide_tests::{Cluster, Output, poll_until};

use crate::site::Site;

/// From now on no segment is archived, and there is one that should be.
fn stop_archiving(cluster: &Cluster) {
    let failed = || cluster.query("select failed_count from pg_stat_archiver");
    let before = failed();
    cluster.set("archive_command", "false");
    cluster.reload();
    // The archiver may ship another before it has heard of that.
    poll_until("the archiver to fail", Duration::from_secs(60), || {
        cluster.switch_wal();
        (failed() != before).then_some(())
    });
}

/// An incremental during which `meanwhile` is run: it has begun, and waits for the WAL that it learns of changes from.
fn incremental_while(site: &Site, cluster: &Cluster, meanwhile: impl FnOnce()) -> Output {
    stop_archiving(cluster);
    let running = site.waltide.spawn(site.args(cluster, &["--type", "incremental", "--json"]));
    // What it asks of the server while it waits, and its last statement.
    cluster.wait_until("select count(*) = 1 from pg_stat_activity where query like 'SELECT archived_count%'");
    meanwhile();
    cluster.set("archive_command", &site.waltide.archive_command());
    cluster.reload();
    running.wait()
}

fn warnings(done: Output) -> Vec<String> {
    let done: Value = serde_json::from_str(&done.assert_ok().stdout).unwrap();
    assert_eq!(done["kind"], "incremental", "{done}");
    done["warnings"].as_array().unwrap().iter().map(|w| w.as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_database_that_is_moved_while_a_backup_runs_makes_it_none() {
    let site = Site::new("incremental-copied");
    let cluster = site.start(|b| b);
    cluster.create_tablespace("one");
    cluster.query("create database moving");
    cluster.sql("moving", "create table t as select generate_series(1, 1000) as id").unwrap();
    site.full(&cluster);

    let during = |meanwhile: &dyn Fn()| incremental_while(&site, &cluster, meanwhile);
    let refused =
        during(&|| drop(cluster.query("alter database moving set tablespace one"))).assert_status(1);
    let oids = cluster.query(
        "select format('database %s (tablespace %s)', d.oid, dattablespace) from pg_database d where datname = 'moving'",
    );
    assert!(refused.stderr.contains(&format!("the files of {oids} were copied from ")), "{refused:?}");
    assert_eq!(site.waltide.json(["list"]).as_array().unwrap().len(), 1);

    // One that is made of another's files stands or falls with what comes after.
    let make = || drop(cluster.query("create database made template moving strategy file_copy"));
    let unmake = || drop(cluster.query("drop database made"));
    assert_eq!(warnings(during(&make)), [""; 0]);
    unmake();
    assert_eq!(warnings(during(&|| (make(), unmake()).0)), [""; 0]);
    let changed = during(&|| {
        make();
        cluster.sql("moving", "update t set id = -id").unwrap();
    });
    let changed = warnings(changed);
    assert!(matches!(&*changed, [only] if only.contains("may have changed since")), "{changed:?}");
    unmake();
    let refused = during(&|| (make(), drop(cluster.query("drop database moving"))).0).assert_status(1);
    assert!(refused.stderr.contains("take another backup"), "{refused:?}");
    // Before the backup begins all of that is no matter.
    cluster.query("alter database made set tablespace pg_default");
    let last = site.incremental(&cluster);
    site.assert_same(&cluster, &last, &site.full(&cluster));
}

#[test]
fn a_move_that_a_standby_replays_while_it_is_backed_up_makes_the_backup_none() {
    let site = Site::new("incremental-copied-standby");
    let cluster = site.start(|b| b);
    cluster.create_tablespace("one");
    cluster.query("create database moving");
    site.full(&cluster);
    let standby = cluster.make_standby("standby");
    // What the backup starts from is in a segment that is not archived: it waits before it looks at files.
    stop_archiving(&cluster);
    cluster.query("checkpoint");
    standby.wait_caught_up(&cluster);
    standby.query("checkpoint");
    let mut running = site.waltide.spawn(site.args(&standby, &["--type", "incremental"]));
    standby.wait_until(
        "select count(*) = 1 from pg_stat_activity where query like '%pg_backup_start%' and state = 'idle'",
    );
    cluster.query("alter database moving set tablespace one");
    standby.wait_caught_up(&cluster);
    cluster.set("archive_command", &site.waltide.archive_command());
    cluster.reload();
    while running.is_running() {
        cluster.switch_wal();
    }
    let refused = running.wait().assert_status(1);
    assert!(refused.stderr.contains("take another backup, while no database is moved"), "{refused:?}");
}
