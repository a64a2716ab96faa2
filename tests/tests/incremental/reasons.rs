//! Where the WAL cannot tell what changed, a full backup is made, and says why.

use std::fs;
use std::path::PathBuf;

use waltide_archiver::host;
use waltide_format::TimestampTz;
use waltide_format::archive::{Envelope, ObjectKind, PruneMark};
use waltide_tests::{Cluster, StopMode};

use crate::site::{Site, id, restart_with};

fn segment_path(site: &Site, cluster: &Cluster, segment: &str) -> PathBuf {
    let stored = site.stored(cluster);
    stored.path(&format!("{}/{}/{segment}", stored.names().wal(), &segment[..8]))
}

#[test]
fn without_the_wal_since_the_parent_a_full_is_made() {
    let site = Site::new("incremental-reasons");
    let mut cluster = site.start(|b| b);
    cluster.query("create table t as select generate_series(1, 1000) as id");
    assert_eq!(site.falls_back(&cluster), "there is no backup yet");

    // A hole.
    let segment = cluster.archive_all();
    cluster.archive_all();
    fs::remove_file(segment_path(&site, &cluster, &segment)).unwrap();
    let why = site.falls_back(&cluster);
    assert_eq!(why, format!("the WAL since then is not whole: {segment} is missing"));
    site.incremental(&cluster);

    // An object that is not what it was.
    let segment = cluster.archive_all();
    let path = segment_path(&site, &cluster, &segment);
    let mut object = fs::read(&path).unwrap();
    let at = object.len() - 40;
    object[at] ^= 1;
    fs::write(&path, object).unwrap();
    let why = site.falls_back(&cluster);
    assert!(why.contains("not whole: ") && why.contains(&format!("{segment}, which is damaged: ")), "{why}");
    site.incremental(&cluster);

    // One that was damaged when it came, and was let in.
    let place = site.scratch.dir("changed");
    let place = place.display();
    let ship = site.waltide.archive_command();
    let force = ship.replace(" push %p", &format!(" push --force-admit {place}/%f"));
    let change = format!("printf XXXX | dd of={place}/%f bs=1 seek=100 conv=notrunc status=none");
    cluster.set("archive_command", &format!("cp %p {place}/%f && {change} && {force}"));
    cluster.reload();
    let segment = cluster.archive_all();
    cluster.set("archive_command", &ship);
    cluster.reload();
    let why = site.falls_back(&cluster);
    assert!(why.contains("admitted with a fault at ") && why.contains("not whole"), "{segment}: {why}");
    site.incremental(&cluster);

    // Rows that are in no log.
    restart_with(
        &mut cluster,
        &[("archive_mode", "off"), ("wal_level", "minimal"), ("max_wal_senders", "0")],
    );
    cluster.query("begin; truncate t; insert into t select generate_series(1, 500); commit");
    restart_with(
        &mut cluster,
        &[("archive_mode", "on"), ("wal_level", "replica"), ("max_wal_senders", "10")],
    );
    let why = site.falls_back(&cluster);
    assert!(why.contains("does not tell all that changed: wal_level was minimal from "), "{why}");
    // A start alone is no reason.
    cluster.restart();
    let last = site.incremental(&cluster);

    // Pages that were written behind the server's back.
    cluster.stop(StopMode::Fast);
    cluster
        .install()
        .runner("pg_checksums")
        .args(["--disable", "-D"])
        .arg(cluster.data_dir())
        .run()
        .assert_ok();
    cluster.start();
    let why = site.falls_back(&cluster);
    let parent = id(&last);
    assert_eq!(
        why,
        format!("data checksums are off and were on in backup {parent}: pg_checksums wrote every page")
    );
    let last = site.incremental(&cluster);

    // A map that is gone, and a parent that is about to go.
    let stored = site.stored(&cluster);
    let map = stored.names().map(id(&last));
    fs::rename(stored.path(&map), site.scratch.join("map")).unwrap();
    let parent = id(&last);
    assert_eq!(site.falls_back(&cluster), format!("{map}, which backup {parent} needs, is missing"));
    fs::rename(site.scratch.join("map"), stored.path(&map)).unwrap();
    let (complete, _) = stored.backups();
    let mark = PruneMark {
        started: TimestampTz::default(),
        host: host::name(),
        pid: std::process::id(),
        backups: complete.clone(),
    };
    let path = stored.path(&stored.names().prune_mark("ours"));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, Envelope::seal_json(ObjectKind::Json, &mark)).unwrap();
    site.scratch.give_tree(path.parent().unwrap());
    let newest = site.waltide.json(["list"])[0]["id"].clone();
    let why = site.falls_back(&cluster);
    assert_eq!(why, format!("backup {} is being removed by a prune", newest.as_str().unwrap()));
    fs::remove_file(&path).unwrap();

    // A role that may not end a segment. Between the switch and the checkpoint of a busy server lies WAL of others.
    cluster.query(
        "create role keeper login; grant execute on function pg_backup_start, pg_backup_stop to keeper;
         grant pg_read_all_settings to keeper",
    );
    let keeper = cluster.connection().replace("user=postgres", "user=keeper");
    let script = site.scratch.file("busy.sql", "insert into t values (1);");
    let busy = cluster.pgbench_background(&["-c", "2", "-T", "60", "-f", script.to_str().unwrap()]);
    let mut refused = false;
    for _ in 0..20 {
        let done = site.backup(&cluster, &["--connection", &keeper]);
        refused = done["full_because"].as_str().is_some_and(|why| why.contains("may not run pg_switch_wal"));
        assert!(refused || done["kind"] == "incremental", "{done}");
        if refused {
            break;
        }
    }
    busy.terminate();
    assert!(refused, "no backup began behind a segment's beginning");
    site.waltide.ok(["verify", "--quick", "latest"]);
}

#[test]
fn the_wal_of_another_history_is_noticed() {
    let site = Site::new("incremental-twin");
    let mut cluster = site.start(|b| b);
    cluster.query("create table t as select generate_series(1, 1000) as id");
    site.full(&cluster);
    cluster.stop(StopMode::Fast);
    let twin = site.scratch.copy_tree(cluster.data_dir(), "twin");
    cluster.start();
    cluster.query("insert into t values (0)");
    for _ in 0..4 {
        cluster.archive_all();
    }
    cluster.stop(StopMode::Fast);
    // The same timeline, the same positions, other records: the archive has the first server's.
    let mut twin = Cluster::with_data_dir("twin", &site.scratch, twin);
    twin.start();
    twin.query("delete from t");
    let refused = site.waltide.fails(3, site.args(&twin, &["--type", "incremental"]));
    assert!(refused.stderr.contains("it is of another history"), "{refused:?}");
    assert_eq!(site.stored(&twin).backups().0.len(), 1);
}

#[test]
fn a_parent_is_in_the_past_of_the_servers_timeline() {
    let site = Site::new("incremental-fork");
    let cluster = site.start(|b| b);
    cluster.query("create table t as select generate_series(1, 20000) as id");
    let shared = site.full(&cluster);
    let mut standby = cluster.make_standby("standby");
    cluster.query("update t set id = -id where id % 100 = 0");
    standby.wait_caught_up(&cluster);
    standby.set("archive_mode", "on");
    standby.restart();
    standby.promote();
    // The old primary goes on alone, and so does the new one.
    cluster.query("update t set id = 1000000 where id = 5");
    let on_the_old = site.incremental(&cluster);
    standby.query("update t set id = 2000000 where id = 7");
    standby.archive_all();

    let done = site.incremental(&standby);
    assert_eq!(done["parent"], shared["id"], "{done}");
    assert_eq!(done["timeline"], 2);
    let full = site.full(&standby);
    site.assert_same(&standby, &done, &full);
    // Without the older one there is nothing that both have.
    let stored = site.stored(&cluster);
    for backup in [&shared, &done, &full] {
        fs::remove_file(stored.path(&stored.names().manifest(&id(backup).parse().unwrap()))).unwrap();
    }
    let why = site.falls_back(&standby);
    let expected = format!(
        "backup {} ended at {} on timeline 1",
        id(&on_the_old),
        on_the_old["stop_lsn"].as_str().unwrap()
    );
    assert_eq!(why, format!("{expected}, which is not in the past of timeline 2, the server's"));
}
