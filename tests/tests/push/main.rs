//! Segments go from real clusters into the archive, and nothing else does.

mod admission;
mod faults;
mod lab;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use waltide_format::archive::{Ending, StoredSegment, WalFile};
use waltide_tests::oracle::Waldump;
use waltide_tests::site::read_dir;
use waltide_tests::{Cluster, ClusterBuilder, Site, StopMode, Waltide, poll_until};

/// A cluster that keeps its WAL.
fn builder(site: &Site, name: &str) -> ClusterBuilder {
    Cluster::builder(name).scratch(&site.scratch).setting("wal_keep_size", "4GB")
}

/// A cluster that is in the archive and ships to it, not yet started.
fn create(site: &Site, builder: ClusterBuilder) -> Cluster {
    let cluster = builder.archive_command(&site.waltide.archive_command()).create();
    site.init(&cluster);
    cluster
}

/// Ships a file as PostgreSQL does, in the data directory.
fn push_in(site: &Site, cluster: &Cluster) -> Waltide {
    site.waltide.clone().current_dir(cluster.data_dir())
}

/// Every pair of neighbours among the stored segments of one timeline joins, and none has a fault.
fn assert_chain(stored: &BTreeMap<String, StoredSegment>) {
    let mut last: Option<&StoredSegment> = None;
    for (name, segment) in stored.iter().filter(|(name, _)| name.len() == 24) {
        let info = &segment.index.info;
        assert_eq!(segment.index.faults, [], "{name}");
        assert!(matches!(info.ending, Ending::Full | Ending::Switch), "{name}: {:?}", info.ending);
        if let Some(before) = last.filter(|b| b.index.info.name.timeline() == info.name.timeline()) {
            let before = &before.index.info;
            assert_eq!(before.name.next(before.size), Some(info.name), "a gap before {name}");
            let pending = before.pending.map_or(0, |p| p.total_bytes - p.here_bytes);
            if !info.overwrites_contrecord {
                assert_eq!(pending, info.continued_bytes, "{name}");
                let told = before.pending.map(|p| p.start).or(before.last_record);
                assert!(info.first_prev.is_none() || info.first_prev == told, "{name}");
            }
        }
        last = Some(segment);
    }
}

#[test]
fn a_cluster_under_load_is_archived_whole() {
    for (mb, seconds) in [(1, "4"), (64, "3")] {
        let site = Site::new("load");
        let mut cluster = create(&site, builder(&site, "db").segment_mb(mb));
        cluster.start();
        cluster.pgbench_init(4);
        cluster.pgbench(&["-c", "4", "-j", "2", "-T", seconds]);
        let backup = cluster.base_backup("base", &["-X", "none"]);
        assert!(backup.join("PG_VERSION").exists());
        let last = cluster.archive_all();
        let statistics = cluster.query("select archived_count, failed_count from pg_stat_archiver");
        assert!(statistics.ends_with("|0"), "{statistics}\n{}", cluster.log_tail());
        let stored = site.segments(&cluster);
        assert_chain(&stored);
        assert!(stored.contains_key(&last));
        for (name, segment) in &stored {
            assert!(fs::read(cluster.data_dir().join("pg_wal").join(name)).unwrap() == segment.wal, "{name}");
        }
        // A record over the edge is joined on one side or the other wherever both files were there.
        let joined = stored.values().filter(|s| s.index.info.head_joined).count();
        assert!(mb > 1 || joined > 3, "{joined} of {}", stored.len());
        // One over an edge is in both neighbours' indexes where both were there when they were pushed.
        let commits: BTreeSet<_> =
            stored.values().flat_map(|s| s.index.xacts.iter().map(|end| end.start)).collect();
        let first = stored.keys().next().unwrap();
        let wal = cluster.data_dir().join("pg_wal");
        let (records, _) = Waldump::segments(&wal, first, Some(&last)).finish();
        let theirs = records
            .iter()
            .filter(|r| r.rmgr == "Transaction" && ["COMMIT", "ABORT"].contains(&r.kind()))
            .count();
        assert_eq!(commits.len(), theirs);
        // The backup's note went along.
        let notes: Vec<_> = read_dir(&site.archive.join(site.names(&cluster).wal()).join("00000001"))
            .into_iter()
            .filter(|path| path.extension().is_some_and(|e| e == "backup"))
            .collect();
        let note = WalFile::decode(&fs::read(&notes[0]).unwrap()).unwrap();
        assert!(String::from_utf8_lossy(&note.contents).contains("START WAL LOCATION"), "{notes:?}");
    }
}

#[test]
fn nothing_is_refused_after_promotions() {
    let site = Site::new("promotions");
    let mut primary = create(&site, builder(&site, "primary"));
    primary.start();
    primary.pgbench_init(2);
    let mut standbys = Vec::new();
    for round in 0..3 {
        let mut standby = primary.make_standby(&format!("standby{round}"));
        // The harness makes standbys that do not archive.
        standby.set("archive_mode", "on");
        standby.restart();
        let mut load = primary.pgbench_background(&["-c", "2", "-T", "600"]);
        // A segment of its own is begun and left half full at another place each time.
        primary.archive_all();
        primary.query(&format!(
            "create table t{round} as select generate_series(1, {}) as n",
            3000 * (round + 1)
        ));
        standby.wait_caught_up(&primary);
        load.is_running();
        load.kill9();
        standby.wait_caught_up(&primary);
        standby.promote();
        standby.pgbench(&["-c", "2", "-t", "300"]);
        standby.archive_all();
        let statistics = standby.query("select failed_count from pg_stat_archiver");
        assert_eq!(statistics, "0", "{}", standby.log_tail());
        primary.stop(StopMode::Fast);
        standbys.push(std::mem::replace(&mut primary, standby));
    }
    let stored = site.segments(&primary);
    assert_chain(&stored);
    let names: Vec<&str> = stored.keys().map(String::as_str).collect();
    for timeline in ["00000002", "00000003", "00000004"] {
        let first = names.iter().find(|n| n.starts_with(timeline)).unwrap();
        let info = &stored[*first].index.info;
        assert!(info.first_page_timeline < info.name.timeline(), "{first} begins with its ancestor's pages");
        assert!(site.object(&primary, &format!("{timeline}.history")).exists());
    }
    assert!(names.iter().any(|name| name.ends_with(".partial")), "{names:?}");
}

#[test]
fn nothing_is_refused_after_crashes() {
    let site = Site::new("crashes");
    let mut cluster = create(&site, builder(&site, "db").setting("wal_writer_flush_after", "0"));
    cluster.start();
    cluster.pgbench_init(2);
    // Large records run over several pages and over segments' edges, and a crash cuts them off there.
    cluster.query("create table big (t text); alter table big alter t set storage external");
    let big = site.scratch.file("big.sql", "insert into big select string_agg(md5(random()::text), '') from generate_series(1, 60000);\nselect pg_logical_emit_message(random() < 0.5, 'big', repeat('x', (random() * 300000)::int));\n");
    for round in 0..8 {
        let script = big.to_str().unwrap().to_owned();
        let load = cluster.pgbench_background(&["-n", "-c", "3", "-T", "600", "-f", &script]);
        let started = cluster.query("select pg_current_wal_insert_lsn()");
        cluster.wait_until(&format!(
            "select pg_current_wal_insert_lsn() - '{started}' > {}",
            3_000_000 + round * 777_777
        ));
        cluster.kill9();
        drop(load);
        cluster.start();
    }
    let last = cluster.archive_all();
    assert_eq!(cluster.query("select failed_count from pg_stat_archiver"), "0", "{}", cluster.log_tail());
    let stored = site.segments(&cluster);
    assert!(stored.contains_key(&last));
    assert_chain(&stored);
    let overwrites = stored.values().filter(|s| s.index.info.overwrites_contrecord).count();
    println!("{overwrites} segments begin after an aborted record");
}

#[test]
fn a_standby_that_archives_what_its_primary_archives_is_welcome() {
    let site = Site::new("always");
    let mut primary = create(&site, builder(&site, "primary"));
    primary.start();
    primary.pgbench_init(1);
    let mut standby = primary.make_standby("standby");
    standby.set("archive_mode", "always");
    standby.restart();
    for _ in 0..3 {
        primary.pgbench(&["-c", "2", "-t", "200"]);
        // What a switch leaves void is the same on both.
        primary.archive_all();
    }
    let last = primary.archive_all();
    standby.wait_caught_up(&primary);
    standby.wait_archived(&last);
    for cluster in [&primary, &standby] {
        let statistics = cluster.query("select archived_count > 5, failed_count from pg_stat_archiver");
        assert_eq!(statistics, "t|0", "{}", cluster.log_tail());
    }
    let stored = site.segments(&primary);
    assert_chain(&stored);
    assert!(stored.keys().all(|name| !name.contains('@')), "{:?}", stored.keys());
}

/// The segments that PostgreSQL waits to have archived.
fn ready(cluster: &Cluster) -> Vec<String> {
    let status = cluster.data_dir().join("pg_wal/archive_status");
    let names = read_dir(&status).into_iter().map(|p| p.file_name().unwrap().to_str().unwrap().to_owned());
    names.filter_map(|name| name.strip_suffix(".ready").map(str::to_owned)).collect()
}

/// A cluster whose archiver fails, so that a backlog of segments is ready.
fn with_backlog(site: &Site) -> Cluster {
    let cluster = builder(site, "db").archive_command("/bin/false").start();
    site.init(&cluster);
    cluster.pgbench_init(2);
    cluster.switch_wal();
    cluster
}

#[test]
fn neighbours_that_are_ready_go_along_and_only_postgresql_marks_them() {
    let site = Site::new("neighbours");
    let mut cluster = with_backlog(&site);
    let before = ready(&cluster);
    assert!(before.len() > 12, "{before:?}");
    // One of them is broken; that is for its own run to say.
    let broken = cluster.data_dir().join("pg_wal").join(&before[6]);
    let whole = fs::read(&broken).unwrap();
    let mut bytes = whole.clone();
    bytes[8192 * 5] ^= 1;
    fs::write(&broken, &bytes).unwrap();
    let push = push_in(&site, &cluster);
    let out = push.ok(["push", &format!("pg_wal/{}", before[2]), "-v"]);
    assert!(
        out.stderr.contains(&format!("{} did not go along: {} is refused", before[6], before[6])),
        "{out:?}"
    );
    assert_eq!(ready(&cluster), before, "only PostgreSQL renames .ready");
    let stored = site.segments(&cluster);
    let expected: Vec<&String> = before.iter().filter(|name| **name != before[6]).take(32).collect();
    assert_eq!(stored.keys().collect::<Vec<_>>(), expected);
    // Its own run says it.
    let out = push.fails(1, ["push", &format!("pg_wal/{}", before[6])]);
    assert!(out.stderr.contains("is refused"), "{out:?}");
    assert_eq!(push.json(["push", &format!("pg_wal/{}", before[0])])["outcome"], "already_there");
    fs::write(&broken, &whole).unwrap();

    // The runs that follow return at once.
    cluster.set("archive_command", &site.waltide.archive_command());
    cluster.reload();
    cluster.archive_all();
    assert_chain(&site.segments(&cluster));
    assert_eq!(ready(&cluster), Vec::<String>::new());
    cluster.stop(StopMode::Fast);
}

#[test]
fn watch_ships_the_backlog_and_what_follows_through_kills_and_an_archive_that_goes_away() {
    let site = Site::new("watch");
    let cluster = with_backlog(&site);
    let data_dir = cluster.data_dir().to_str().unwrap().to_owned();
    let watch = || site.waltide.spawn(["watch", "--data-dir", &data_dir, "-v"]);
    let all_shipped = |what: &str| {
        let names = ready(&cluster);
        poll_until(what, Duration::from_secs(60), || {
            names.iter().all(|name| site.object(&cluster, name).exists()).then_some(())
        });
        assert_eq!(ready(&cluster), names, "only PostgreSQL renames .ready");
    };
    // Killed while it ships the backlog, again and again.
    for _ in 0..10 {
        let running = watch();
        let count = site.segments(&cluster).len();
        poll_until("a segment is shipped", Duration::from_secs(30), || {
            (ready(&cluster).len() <= count || site.segments(&cluster).len() > count).then_some(())
        });
        running.kill9();
    }
    let running = watch();
    all_shipped("the backlog is shipped");
    let second = site.waltide.fails(1, ["watch", "--data-dir", &data_dir]);
    assert!(second.stderr.contains("pg_wal/archive_status is being watched already"), "{second:?}");

    // What becomes ready goes within less than a sweep, because it is notified.
    let started = Instant::now();
    let segment = cluster.switch_wal();
    let object = site.object(&cluster, &segment);
    poll_until("the new segment is shipped", Duration::from_secs(30), || object.exists().then_some(()));
    assert!(started.elapsed() < Duration::from_secs(9), "{:?}", started.elapsed());
    // It is there before it is acknowledged.
    poll_until("the new segment is acknowledged", Duration::from_secs(30), || {
        running.stderr().contains(&format!("{segment} shipped")).then_some(())
    });

    // The archive is gone for a while.
    let away = site.archive.with_file_name("away");
    fs::rename(&site.archive, &away).unwrap();
    let segment = cluster.switch_wal();
    poll_until("the failure is told", Duration::from_secs(30), || {
        running.stderr().contains(&format!("{segment} is not shipped")).then_some(())
    });
    fs::rename(&away, &site.archive).unwrap();
    all_shipped("the segment is shipped once the archive is back");
    let out = running.terminate();
    assert_eq!(out.status, 0, "{}", out.describe());
    assert!(out.stderr.contains("the archive takes files again"), "{}", out.describe());
    assert!(out.stdout.contains("shipped "), "{}", out.describe());
    assert_chain(&site.segments(&cluster));

    // archive_command finds it all there; an interrupt stops a watch as well.
    let running = watch();
    cluster.set("archive_command", &site.waltide.archive_command());
    cluster.reload();
    cluster.archive_all();
    assert_eq!(
        cluster.query("select failed_count from pg_stat_archiver where last_archived_wal is null"),
        ""
    );
    let out = running.interrupt();
    assert_eq!(out.status, 0, "{}", out.describe());
}

#[test]
fn doctor_follows_a_segment_and_says_what_is_wrong() {
    let site = Site::new("doctor");
    let mut cluster = create(&site, builder(&site, "db"));
    cluster.start();
    cluster.set("archive_timeout", "60s");
    cluster.reload();
    let data_dir = cluster.data_dir().to_str().unwrap().to_owned();
    let connection = cluster.connection();
    let arguments = ["doctor", "--data-dir", &data_dir, "--connection", &connection, "--wait", "20"];
    let result = |answer: &serde_json::Value, name: &str| {
        let checks = answer["checks"].as_array().unwrap();
        let found =
            checks.iter().find(|c| c["name"] == name).unwrap_or_else(|| panic!("no {name}: {answer}"));
        (found["result"].as_str().unwrap().to_owned(), found["found"].as_str().unwrap().to_owned())
    };
    let healthy = site.waltide.json(arguments);
    for check in healthy["checks"].as_array().unwrap() {
        let is_fsync = check["name"] == "fsync";
        assert!(check["result"] == "ok" || is_fsync && check["result"] == "warning", "{check}");
    }
    let (_, found) = result(&healthy, "round trip");
    assert!(found.contains("the same as in pg_wal"), "{found}");
    let quiet = site.waltide.json([&arguments[..], &["--no-switch"]].concat());
    assert_eq!(result(&quiet, "round trip").0, "ok");
    // A base backup's history file is archived last of all that the backup leaves behind.
    cluster.query("select pg_backup_start('doctor', true); select pg_backup_stop()");
    cluster.wait_until("select last_archived_wal like '%.backup' from pg_stat_archiver");
    let quiet = site.waltide.json([&arguments[..], &["--no-switch"]].concat());
    assert_eq!(result(&quiet, "round trip").0, "ok", "{quiet}");
    let text = site.waltide.ok(arguments).stdout;
    assert!(text.starts_with("result   check"), "{text}");
    let leftovers: Vec<_> = read_dir(&site.archive.join(site.names(&cluster).prefix()))
        .into_iter()
        .filter(|path| path.to_string_lossy().contains("probe"))
        .collect();
    assert_eq!(leftovers, Vec::<PathBuf>::new());

    // A segment that counts as archived is changed, then missing: the archive is at fault.
    let last = cluster.archive_all();
    let object = site.object(&cluster, &last);
    let whole = fs::read(&object).unwrap();
    let mut bad = whole.clone();
    bad[100] ^= 1;
    fs::write(&object, bad).unwrap();
    let quiet = [&arguments[..], &["--no-switch"]].concat();
    let answer = site.waltide.json_with_status(3, quiet.clone());
    assert!(result(&answer, "round trip").1.contains("is damaged"), "{answer}");
    fs::remove_file(&object).unwrap();
    let answer = site.waltide.json_with_status(3, quiet.clone());
    assert!(
        result(&answer, "round trip").1.contains("counts as archived and is not in the archive"),
        "{answer}"
    );

    // The command fails, ships elsewhere, or archiving is off.
    cluster.set("archive_command", "/bin/false");
    cluster.set("full_page_writes", "off");
    cluster.reload();
    let answer = site
        .waltide
        .json_with_status(1, ["doctor", "--data-dir", &data_dir, "--connection", &connection, "--wait", "2"]);
    assert_eq!(result(&answer, "full_page_writes").0, "failed");
    assert_eq!(result(&answer, "archive_command").0, "warning");
    assert!(result(&answer, "round trip").1.contains("is not in the archive after 2 s"), "{answer}");
    cluster.set("archive_command", &site.waltide.clone().archive("/elsewhere").archive_command());
    cluster.reload();
    let answer = site
        .waltide
        .json_with_status(1, ["doctor", "--data-dir", &data_dir, "--connection", &connection, "--wait", "0"]);
    assert!(
        result(&answer, "archive_command").1.contains("it ships to another archive than file://"),
        "{answer}"
    );
    cluster.stop(StopMode::Fast);
    let answer = site.waltide.json_with_status(1, ["doctor", "--data-dir", &data_dir]);
    assert_eq!(result(&answer, "server").0, "failed");
    assert_eq!(result(&answer, "round trip").0, "skipped");
}
