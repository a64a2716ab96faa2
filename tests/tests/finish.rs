//! Native replay to the target itself, `restore --finish native`, against PostgreSQL's own recovery to the same target.

use std::fs;

use serde_json::Value;
use waltide_tests::load::{self, Chance};
use waltide_tests::oracle::{RecoveryEnd, parse_lsn};
use waltide_tests::site::text;
use waltide_tests::workload::Journal;
use waltide_tests::{Background, Cluster, Site, StopMode};

const PAGE_BYTES: u64 = 8192;

/// Restores natively to the target itself; a server that was not started yet, and what the command says.
#[track_caller]
fn finished(site: &Site, name: &str, args: &[&str]) -> (Cluster, Value) {
    let dir = site.scratch.fresh_path(name);
    let fixed = ["restore", "--data-dir", text(&dir), "--finish", "native"];
    let done = site.waltide.json(fixed.iter().chain(args));
    assert_eq!(done["restored"]["replayed"]["finished"], true, "{done}");
    assert_eq!(done["actions"]["signal"], Value::Null, "{done}");
    for name in ["recovery.signal", "standby.signal", "backup_label", "tablespace_map"] {
        assert!(!dir.join(name).exists(), "{name}");
    }
    (Cluster::with_data_dir(name, &site.scratch, dir), done)
}

/// A session that has done this, and stays as it is.
#[track_caller]
fn in_a_transaction(cluster: &Cluster, sql: &str) -> Background {
    let open = ["-XAtq", "-c", "begin", "-c", sql, "-c", "select pg_sleep(600)", "postgres"];
    let open = cluster.client("psql").args(open).spawn(cluster.scratch(), "open");
    cluster.wait_until(
        "select count(*) = 1 from pg_stat_activity where backend_xid is not null and query like '%sleep(600)'",
    );
    open
}

/// Every way to name a target, with no checkpoint between the backup and any of them.
#[test]
fn every_kind_of_target_ends_as_postgresqls_recovery_ends_there() {
    let site = Site::new("finish-targets");
    let cluster = site.start(site.builder("db").segment_mb(1).setting("autovacuum", "off"));
    let mut journal = Journal::create(&cluster);
    cluster.query("create table gone as select generate_series(1, 100) as id");
    site.back_up(&cluster);
    journal.steps_on(&cluster, 3);
    cluster.query("select pg_create_restore_point('the point')");
    journal.steps_on(&cluster, 2);
    // Open at every target from here on, and another that comes to nothing.
    let open = in_a_transaction(&cluster, "create table never ()");
    journal.steps_on(&cluster, 2);
    cluster.query("drop table gone");
    journal.steps_on(&cluster, 2);
    cluster.archive_all();
    open.kill9();
    let step = |id: usize| &journal.steps()[id - 1];
    let xid = |id| step(id).xid.to_string();
    let (xids, times) = ([xid(5), xid(6)], [step(2).committed_at.clone(), step(6).committed_at.clone()]);
    for (n, (target, last)) in [
        (vec!["--target-xid", &xids[0]], 5),
        (vec!["--target-xid", &xids[1], "--target-exclusive"], 5),
        (vec!["--target-time", &times[0]], 2),
        (vec!["--target-time", &times[1], "--target-exclusive"], 6),
        (vec!["--target-name", "the point"], 3),
        (vec!["--target-lsn", &step(4).lsn_after], 4),
        (vec!["--target-lsn", &step(7).lsn_after, "--target-exclusive"], 7),
        (vec!["--before-drop", "gone"], 7),
        (vec!["--target", "latest"], 9),
        (vec!["--target", "immediate"], 0),
    ]
    .into_iter()
    .enumerate()
    {
        let mut server =
            site.restored(&format!("server-{n}"), &[&target[..], &["--replay", "server"]].concat());
        journal.assert_exactly_up_to(&server, last);
        server.stop(StopMode::Fast);
        let off = [&target[..], &["--archive-mode", "off"]].concat();
        let (mut native, done) = finished(&site, &format!("native-{n}"), &off);
        assert_eq!(RecoveryEnd::read(native.data_dir()), RecoveryEnd::read(server.data_dir()), "{target:?}");
        let replayed = &done["restored"]["replayed"];
        assert_eq!(
            (&replayed["timeline"], &done["actions"]["replay"]["finish"]["timeline"]),
            (&2.into(), &2.into())
        );
        assert!(!native.data_dir().join("pg_wal/archive_status/00000002.history.ready").exists());
        native.start();
        journal.assert_exactly_up_to(&native, last);
        assert_eq!(native.query("select to_regclass('never') is null"), "t");
        let gone = if last > 7 { "0" } else { "1" };
        assert_eq!(native.query("select count(*) from pg_class where relname = 'gone'"), gone);
        // Recovery from the record that it was begun with.
        native.query("create table more as select generate_series(1, 1000) as id");
        native.kill9();
        native.start();
        assert_eq!(native.query("select count(*), max(id) from more"), "1000|1000");
        journal.assert_exactly_up_to(&native, last);
    }
}

/// What is on the way, unlogged, prepared, or kept beside relations' files when the target is reached.
#[test]
fn what_is_no_page_is_there_as_after_a_recovery() {
    let site = Site::new("finish-state");
    let builder = site.builder("db").settings(load::SETTINGS).setting("track_commit_timestamp", "on");
    let cluster = site.start(builder.segment_mb(1).setting("autovacuum", "off"));
    cluster.create_tablespace("elsewhere");
    let mut journal = Journal::create(&cluster);
    cluster.query(
        "create table t (id int primary key, n int);
         insert into t select n, 0 from generate_series(1, 1000) n;
         create unlogged table passing (id serial primary key, filler text) tablespace elsewhere;
         create unlogged table near (id int primary key);
         insert into passing (filler) select 'x' from generate_series(1, 1000);
         insert into near select generate_series(1, 1000)",
    );
    cluster.query("begin; insert into t values (2001, 0); prepare transaction 'before the backup'");
    let backup = site.back_up(&cluster);
    journal.steps_on(&cluster, 3);
    cluster.query("create unlogged table later (id int primary key) tablespace elsewhere");
    cluster.query("insert into later select generate_series(1, 100)");
    cluster.query("begin; insert into t values (2002, 0); prepare transaction 'behind the backup'");
    cluster.query("begin; insert into t values (2003, 0); prepare transaction 'rolled back'");
    cluster.query("checkpoint");
    cluster.query("begin; savepoint a; insert into t values (2004, 0); savepoint b; insert into t values (2005, 0); prepare transaction 'behind the checkpoint'");
    cluster.query("rollback prepared 'rolled back'");
    // Two sessions share rows' locks: multixacts.
    let sharing = in_a_transaction(&cluster, "select 1 from t where id < 50 for share");
    cluster.query("begin; select count(*) from (select 1 from t where id < 30 for share) s; savepoint a; update t set n = 1 where id > 900; commit");
    cluster.query("create sequence counter; select nextval('counter') from generate_series(1, 50)");
    cluster.query("create table many (a int, b text, c point)");
    let target = journal.steps_on(&cluster, 2).xid.to_string();
    cluster.query("commit prepared 'behind the backup'");
    journal.steps_on(&cluster, 2);
    cluster.archive_all();
    sharing.kill9();
    let oid = backup["tablespaces"][0]["oid"].to_string();
    let args = |name: &str| {
        let place = site.scratch.fresh_path(name);
        vec![format!("--tablespace-map={oid}={}", place.display()), format!("--target-xid={target}")]
    };
    let server = args("space-1");
    let server: Vec<&str> = server.iter().map(String::as_str).chain(["--replay", "server"]).collect();
    let mut server = site.restored("server", &server);
    let seen = |cluster: &Cluster| {
        [
            "select count(*), sum(n) from t",
            "select string_agg(gid, ', ' order by gid) from pg_prepared_xacts",
            "select count(*) from passing",
            "select count(*) from near",
            "select count(*) from later",
            "select last_value, is_called from counter",
            "select string_agg(pg_xact_commit_timestamp(xid::xid)::text, ' ' order by id) from journal",
        ]
        .map(|sql| cluster.query(sql))
    };
    let expected = seen(&server);
    assert_eq!(expected[1], "before the backup, behind the backup, behind the checkpoint");
    assert_eq!(expected[2..5], ["0", "0", "0"]);
    server.stop(StopMode::Fast);
    let native = args("space-2");
    // Another version's cluster has its own directory in the tablespace.
    let space = native[0].split('=').next_back().unwrap();
    let other = |name: &str| format!("{space}/PG_14_202107181/5/{name}");
    fs::create_dir_all(other("")).unwrap();
    for name in ["16400", "16400_init"] {
        fs::write(other(name), name).unwrap();
    }
    site.scratch.give_tree(space.as_ref());
    let off = ["--archive-mode", "off", "--allow-clear"];
    let native: Vec<&str> = native.iter().map(String::as_str).chain(off).collect();
    let (mut native, _) = finished(&site, "native", &native);
    assert_eq!(fs::read_to_string(other("16400")).unwrap(), "16400");
    assert_eq!(RecoveryEnd::read(native.data_dir()), RecoveryEnd::read(server.data_dir()));
    native.start();
    assert_eq!(seen(&native), expected);
    journal.assert_exactly_up_to(&native, 5);
    for gid in ["before the backup", "behind the backup", "behind the checkpoint"] {
        native.query(&format!("commit prepared '{gid}'"));
    }
    assert_eq!(native.query("select count(*) from t where id > 2000"), "4");
    native.query("insert into passing (filler) values ('again'); insert into near values (1); insert into later values (1)");
    native.query("create extension amcheck");
    native.client("pg_amcheck").args(["--heapallindexed", "postgres"]).run().assert_ok();
}

/// The record that the timeline begins with does not fit the page or the segment, or begins one.
#[test]
fn a_target_at_the_edge_of_a_page_or_a_segment_is_reached() {
    let site = Site::new("finish-edges");
    let cluster = site.start(site.builder("db").segment_mb(1).setting("autovacuum", "off"));
    cluster.query("create table t (id int)");
    site.back_up(&cluster);
    let insert = || parse_lsn(&cluster.query("select pg_current_wal_insert_lsn()")).unwrap();
    let mut targets = Vec::new();
    for (edge, left) in [(PAGE_BYTES, 0), (PAGE_BYTES, 48), (1 << 20, 0), (1 << 20, 48)] {
        cluster.query(&format!("insert into t values ({})", targets.len() + 1));
        // Until nothing else comes in between: a message that ends so far before the edge.
        let target = (0..50).find_map(|_| {
            let at = insert();
            let room = (edge - at % edge).checked_sub(left)?;
            // Its headers, and those of the pages that it goes on in.
            let pages = (at % PAGE_BYTES + room).div_ceil(PAGE_BYTES) - 1;
            let bytes = room.checked_sub(pages * 24 + 24 + 5 + 24 + 2).filter(|bytes| *bytes > 300)?;
            cluster.query(&format!("select pg_logical_emit_message(false, 'x', repeat('x', {bytes}))"));
            let reached = insert() % edge;
            let expected = if left == 0 { [24, 40].contains(&reached) } else { reached == edge - left };
            expected.then(|| waltide_tests::oracle::format_lsn(at))
        });
        targets.push(target.expect("one attempt in fifty ends where it should"));
    }
    cluster.query("insert into t values (0)");
    // Nothing but a switch behind that, so that the log goes on with a segment.
    let switch = cluster.query("select pg_current_wal_insert_lsn()");
    cluster.query("select pg_switch_wal()");
    targets.push(switch);
    cluster.query("insert into t values (-1)");
    cluster.archive_all();
    for (n, target) in targets.iter().enumerate() {
        // Each archives a timeline of its own, with the segment that is full from its beginning.
        let (mut native, done) =
            finished(&site, &format!("native-{n}"), &["--target-timeline", "1", "--target-lsn", target]);
        let status = native.data_dir().join("pg_wal/archive_status");
        let ready = fs::read_dir(status).unwrap().flatten().map(|e| e.file_name().into_string().unwrap());
        assert_eq!(ready.count(), if n == 3 { 2 } else { 1 });
        native.start();
        let expected = if n < 4 { (n + 1).to_string() } else { "5".to_owned() };
        assert_eq!(native.query("select count(*) from t"), expected, "{target}: {done}");
        native.query("insert into t select generate_series(1, 1000)");
        native.kill9();
        native.start();
        assert_eq!(native.query("select count(*) > 1000 from t"), "t");
        native.archive_all();
        let timeline = n + 2;
        let latest = site.restored(&format!("latest-{n}"), &["--target-timeline", &timeline.to_string()]);
        assert_eq!(latest.query("select count(*) > 1000 from t"), "t");
    }
}

/// The server archives its timeline, which can be backed up and restored like any other.
/// The last record begins in one segment and ends far into the next, where a part of that is looked at.
#[test]
fn a_target_behind_a_long_record_is_reached() {
    let site = Site::new("finish-long");
    let cluster = site.start(site.builder("db").segment_mb(1).setting("autovacuum", "off"));
    cluster.query("create table t (id int)");
    site.back_up(&cluster);
    cluster.query("insert into t values (1)");
    cluster.query("select pg_switch_wal()");
    let message = |bytes| {
        cluster.query(&format!("select pg_logical_emit_message(false, 'x', repeat('x', {bytes}))"));
    };
    message(300 << 10);
    cluster.query("insert into t values (2)");
    let target = cluster.query("select pg_current_wal_insert_lsn()");
    message(1300 << 10);
    cluster.query("insert into t values (3)");
    cluster.archive_all();
    let target = ["--target-lsn", &target];
    let mut server = site.restored("server", &[&target[..], &["--replay", "server"]].concat());
    assert_eq!(server.query("select max(id) from t"), "2");
    server.stop(StopMode::Fast);
    let (mut native, _) = finished(&site, "native", &[&target[..], &["--archive-mode", "off"]].concat());
    assert_eq!(RecoveryEnd::read(native.data_dir()), RecoveryEnd::read(server.data_dir()));
    native.start();
    assert_eq!(native.query("select max(id) from t"), "2");
}

#[test]
fn the_timeline_goes_on_in_the_archive() {
    let site = Site::new("finish-archive");
    let mut cluster = site.start(site.builder("db").segment_mb(1).setting("autovacuum", "off"));
    let mut journal = Journal::create(&cluster);
    let backup = site.back_up(&cluster)["id"].as_str().unwrap().to_owned();
    let target = journal.steps_on(&cluster, 3).xid.to_string();
    journal.steps_on(&cluster, 2);
    cluster.archive_all();
    cluster.stop(StopMode::Fast);
    let dir = site.scratch.fresh_path("second");
    let args =
        ["restore", "--data-dir", text(&dir), "--finish", "native", "--start", "--target-xid", &target];
    let done = site.waltide.json(args);
    let outcome = &done["outcome"];
    assert_eq!((&outcome["state"], &outcome["timeline"]), (&"promoted".into(), &2.into()), "{done}");
    assert_eq!(outcome["as_planned"], true, "{done}");
    let second = Cluster::attach("second", &site.scratch, &dir).unwrap();
    let mut second_journal = journal.forked_after(3);
    let last = second_journal.steps_on(&second, 3);
    assert_eq!(last.timeline, 2);
    second.archive_all();
    site.back_up(&second);
    let middle = second_journal.step(&second, "behind the backup").xid.to_string();
    second_journal.step(&second, "the last one");
    second.archive_all();
    let status = site.waltide.json(["status"]);
    assert_eq!(status["health"], "ok", "{status:#}");
    assert_eq!(status["histories"][1]["reason"], format!("after transaction {target}"), "{status:#}");
    assert_eq!(site.waltide.json(["verify"])["faults"], serde_json::json!([]));
    // From the first backup over the fork: by PostgreSQL, natively up to the second backup's checkpoint, and to a timeline of
    // its own.
    for replay in ["server", "native"] {
        let more = ["--backup", &backup, "--replay", replay, "--target-xid", &middle];
        second_journal.assert_exactly_up_to(&site.restored(replay, &more), 7);
    }
    second_journal.assert_exactly_up_to(&site.restored("latest", &["--backup", &backup]), 8);
    let again = ["--backup", &backup, "--target-xid", &middle, "--archive-mode", "off"];
    let (mut third, done) = finished(&site, "third", &again);
    assert_eq!(done["restored"]["replayed"]["timeline"], 3, "{done}");
    let history = RecoveryEnd::read(third.data_dir()).history;
    assert_eq!(history.len(), 2, "{history:?}");
    third.start();
    second_journal.assert_exactly_up_to(&third, 7);
}

/// The log before a failover is there on the new timeline too, and on the old one perhaps as a `.partial` alone.
#[test]
fn what_the_old_timeline_lacks_is_taken_from_the_new_one() {
    let site = Site::new("finish-failover");
    let cluster = site.start(site.builder("db").segment_mb(1).setting("autovacuum", "off"));
    let mut journal = Journal::create(&cluster);
    site.back_up(&cluster);
    journal.steps_on(&cluster, 2);
    cluster.archive_all();
    let mut standby = cluster.make_standby("standby");
    let target = journal.steps_on(&cluster, 3).xid.to_string();
    journal.steps_on(&cluster, 2);
    standby.wait_caught_up(&cluster);
    standby.set("archive_mode", "on");
    standby.restart();
    standby.promote();
    standby.archive_all();
    let segments = site.segments(&standby);
    let partial = segments.keys().find(|name| name.ends_with(".partial")).expect("the fork's segment");
    assert!(!segments.contains_key(partial.trim_end_matches(".partial")), "{:?}", segments.keys());
    let (mut native, done) = finished(&site, "native", &["--target-xid", &target]);
    assert_eq!(done["restored"]["replayed"]["timeline"], 3, "{done}");
    let history = RecoveryEnd::read(native.data_dir()).history;
    assert_eq!(history.len(), 1, "{history:?}");
    assert!(history[0].starts_with("1\t0/"), "{history:?}");
    native.start();
    journal.assert_exactly_up_to(&native, 5);
    native.archive_all();
    assert_eq!(site.waltide.json(["verify"])["faults"], serde_json::json!([]));
}

/// PostgreSQL names the timeline that it was told to follow as the ancestor, also where it stopped before that began.
#[test]
fn a_timeline_that_was_left_before_it_began_is_no_ancestor() {
    let site = Site::new("finish-nothing");
    let mut cluster = site.start(site.builder("db").segment_mb(1).setting("autovacuum", "off"));
    let mut journal = Journal::create(&cluster);
    site.back_up(&cluster);
    journal.steps_on(&cluster, 2);
    let early = journal.step(&cluster, "early").xid.to_string();
    cluster.switch_wal();
    let late = journal.steps_on(&cluster, 3).xid.to_string();
    journal.steps_on(&cluster, 1);
    cluster.archive_all();
    cluster.stop(StopMode::Fast);
    for (name, target) in [("second", &late), ("third", &early)] {
        let dir = site.scratch.fresh_path(name);
        site.waltide.ok(["restore", "--data-dir", text(&dir), "--replay", "server", "--target-xid", target]);
        let mut restored = Cluster::with_data_dir(name, &site.scratch, &dir);
        restored.start();
        restored.wait_promoted();
        if name == "third" {
            let history = fs::read_to_string(dir.join("pg_wal/00000003.history")).unwrap();
            assert!(history.contains("\n2\t0/"), "{history}");
            journal = journal.forked_after(3);
            // Less than there was on the first timeline.
            let target = journal.step(&restored, "on the third").xid.to_string();
            journal.step(&restored, "not wanted");
            restored.archive_all();
            let (mut native, done) = finished(&site, "fourth", &["--target-xid", &target]);
            assert_eq!(done["restored"]["replayed"]["timeline"], 4, "{done}");
            let history = RecoveryEnd::read(native.data_dir()).history;
            assert!(history.len() == 3 && history[2].starts_with("3\t0/"), "{history:?}");
            native.start();
            journal.assert_exactly_up_to(&native, 4);
            native.archive_all();
            assert_eq!(site.waltide.json(["verify"])["faults"], serde_json::json!([]));
        } else {
            restored.archive_all();
        }
    }
}

/// The catalogue knows nothing of a timeline whose history cannot be read.
#[test]
fn a_number_that_the_archive_has_a_history_of_is_passed_over() {
    let site = Site::new("finish-number");
    let cluster = site.start(site.builder("db").segment_mb(1).setting("autovacuum", "off"));
    let mut journal = Journal::create(&cluster);
    site.back_up(&cluster);
    let target = journal.steps_on(&cluster, 2).xid.to_string();
    journal.steps_on(&cluster, 1);
    cluster.archive_all();
    let history = site.object(&cluster, "00000002.history");
    fs::write(&history, b"no history").unwrap();
    site.scratch.give_tree(&history);
    let (mut native, done) = finished(&site, "native", &["--target-xid", &target, "--target-timeline", "1"]);
    assert_eq!(done["actions"]["replay"]["finish"]["timeline"], 2, "{done}");
    assert_eq!(done["restored"]["replayed"]["timeline"], 3, "{done}");
    native.start();
    journal.assert_exactly_up_to(&native, 2);
}

#[test]
fn where_native_replay_cannot_come_to_the_target_it_is_said() {
    let site = Site::new("finish-refused");
    let cluster = site.start(site.builder("db").segment_mb(1).setting("autovacuum", "off"));
    let mut journal = Journal::create(&cluster);
    site.back_up(&cluster);
    journal.steps_on(&cluster, 2);
    cluster.query("checkpoint");
    let target = journal.steps_on(&cluster, 2).xid.to_string();
    journal.steps_on(&cluster, 1);
    cluster.archive_all();
    let dir = site.scratch.fresh_path("native");
    let restore = ["restore", "--data-dir", text(&dir), "--archive-mode", "off"];
    let run = |status, more: &[&str]| {
        let out = site.waltide.fails(status, restore.iter().chain(more));
        assert!(!dir.exists(), "{out:?}");
        out.stderr
    };
    for (more, why) in [
        (
            &["--target-xid", &target, "--target-action", "pause"][..],
            "a server that pauses at the target has to recover",
        ),
        (
            &["--target-xid", &target, "--target-action", "shutdown"],
            "is shut down at the target has to recover",
        ),
    ] {
        let refused = run(1, &[more, &["--finish", "native"]].concat());
        assert!(refused.contains(why) && refused.contains("--finish auto"), "{refused}");
        let auto = [&restore[..], more, &["--finish", "auto", "--dry-run", "--json"]].concat();
        let planned: Value = serde_json::from_str(&site.waltide.ok(&auto).stdout).unwrap();
        let replay = &planned["actions"]["replay"];
        assert!(replay["because"].as_str().unwrap().contains(why), "{replay}");
        assert_eq!(
            (&replay["finish"], &planned["actions"]["signal"]),
            (&Value::Null, &"recovery.signal".into())
        );
    }
    for (more, why) in [
        (&["--standby"][..], "--finish native goes to a target"),
        (&["--database", "postgres"], "--finish native restores everything"),
        (&["--replay", "server"], "--replay server is none"),
    ] {
        let refused = run(2, &[more, &["--finish", "native"]].concat());
        assert!(refused.contains(why), "{refused}");
    }
    let shown = [&restore[..], &["--target-xid", &target, "--finish", "auto", "--dry-run"]].concat();
    let shown = site.waltide.ok(shown).stdout;
    assert!(
        shown.contains("replay    native to the target, 0/") && shown.contains("where timeline 2 begins"),
        "{shown}"
    );
    assert!(!shown.contains("recovery.signal"), "{shown}");
}

/// Killed at some moment, a restore is taken up again, by either way.
#[test]
fn what_was_interrupted_is_taken_up_again() {
    let site = Site::new("finish-killed");
    let cluster = site.start(site.builder("db").settings(load::SETTINGS).segment_mb(1));
    load::prepare(&cluster);
    let backup = site.back_up(&cluster);
    let mut journal = Journal::create(&cluster);
    let mut chance = Chance::new();
    for _ in 0..5 {
        load::step(&cluster, &mut chance);
    }
    let target = journal.steps_on(&cluster, 2).xid.to_string();
    journal.steps_on(&cluster, 2);
    cluster.archive_all();
    let mut fixed = vec!["--archive-mode=off".to_owned(), format!("--target-xid={target}")];
    for space in backup["tablespaces"].as_array().unwrap() {
        let place = site.scratch.fresh_path("space");
        fixed.push(format!("--tablespace-map={}={}", space["oid"], place.display()));
    }
    let dir = site.scratch.fresh_path("native");
    let args = |finish: &str| {
        let mut args =
            vec!["restore".to_owned(), format!("--data-dir={}", dir.display()), format!("--finish={finish}")];
        args.extend(fixed.iter().cloned());
        args
    };
    let started = std::time::Instant::now();
    site.waltide.ok(args("native"));
    let took = started.elapsed();
    for (part, finish) in (1..8u32).zip(["native", "native", "server"].into_iter().cycle()) {
        let running = site.waltide.spawn([&args(finish)[..], &["--allow-clear".to_owned()]].concat());
        std::thread::sleep(took * part / 7);
        running.kill9();
    }
    for finish in ["server", "native"] {
        site.waltide.ok([&args(finish)[..], &["--allow-clear".to_owned()]].concat());
        let histories = fs::read_dir(dir.join("pg_wal")).unwrap().flatten();
        let histories = histories.filter(|e| e.file_name().to_string_lossy().ends_with(".history")).count();
        assert_eq!(histories, usize::from(finish == "native"));
        let mut restored = Cluster::with_data_dir(finish, &site.scratch, &dir);
        restored.start();
        restored.wait_promoted();
        journal.assert_exactly_up_to(&restored, 2);
        restored.stop(StopMode::Fast);
    }
}
