//! Segments go from real clusters into the archive, and nothing else does.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use waltide_archiver::engines::postgres::push::{DEFAULT_LEVEL, Outcome, PushRequest, push};
use waltide_format::SegmentName;
use waltide_format::archive::{Ending, Layout, StoredSegment, WalFile};
use waltide_storage::{Archive, Faults};
use waltide_tests::oracle::{ControlData, Waldump};
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
        let commits: usize = stored.values().map(|s| s.index.xacts.len()).sum();
        let first = stored.keys().next().unwrap();
        let wal = cluster.data_dir().join("pg_wal");
        let (records, _) = Waldump::segments(&wal, first, Some(&last)).finish();
        let theirs = records
            .iter()
            .filter(|r| r.rmgr == "Transaction" && ["COMMIT", "ABORT"].contains(&r.kind()))
            .count();
        assert_eq!(commits, theirs);
        // The backup's note went along.
        let notes: Vec<_> = read_dir(&site.archive.join(site.names(&cluster).wal()).join("00000001"))
            .into_iter()
            .filter(|path| path.extension().is_some_and(|e| e == "backup"))
            .collect();
        let note = WalFile::decode(&fs::read(&notes[0]).unwrap()).unwrap();
        assert!(String::from_utf8_lossy(&note.contents).contains("START WAL LOCATION"), "{notes:?}");
    }
}

/// Segments of a cluster that was stopped, apart from it.
struct Lab {
    site: Site,
    cluster: Cluster,
    segments: Vec<String>,
}

impl Lab {
    fn new(label: &str) -> Self {
        let site = Site::new(label);
        let mut cluster = builder(&site, "db").create();
        site.init(&cluster);
        cluster.start();
        cluster.pgbench_init(1);
        cluster.pgbench(&["-t", "400"]);
        let last = cluster.switch_wal();
        let mut segments = cluster.wal_segments();
        segments.retain(|name| *name <= last);
        cluster.stop(StopMode::Fast);
        assert!(segments.len() > 8, "{segments:?}");
        Self { site, cluster, segments }
    }

    fn wal(&self, at: usize) -> Vec<u8> {
        fs::read(self.cluster.data_dir().join("pg_wal").join(&self.segments[at])).unwrap()
    }

    /// Puts a file alone into a directory of its own.
    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let dir = self.site.scratch.fresh_path("lab");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join(name), bytes).unwrap();
        self.site.scratch.give_tree(&dir);
        dir.join(name)
    }

    /// Pushes bytes under a name, and expects a refusal that says this.
    #[track_caller]
    fn refused(&self, name: &str, bytes: &[u8], says: &str) {
        let path = self.file(name, bytes);
        let out = self.site.waltide.fails(1, ["push", path.to_str().unwrap()]);
        assert!(out.stderr.contains(says), "expected {says:?}\n{}", out.describe());
        let object = self.site.object(&self.cluster, name);
        assert!(!object.exists(), "{} was stored", object.display());
    }
}

#[test]
fn what_is_no_segment_of_this_cluster_is_refused_with_its_reason() {
    let lab = Lab::new("refusals");
    let (name, wal) = (lab.segments[3].as_str(), lab.wal(3));
    let size: usize = 1 << 20;
    let start = name
        .parse::<SegmentName>()
        .unwrap()
        .start(waltide_format::SegmentSize::new(1 << 20).unwrap())
        .unwrap();

    let other_name = &lab.segments[5];
    let other_start = other_name
        .parse::<SegmentName>()
        .unwrap()
        .start(waltide_format::SegmentSize::new(1 << 20).unwrap())
        .unwrap();
    lab.refused(other_name, &wal, &format!("its first page is of {start}, its name says {other_start}"));
    lab.refused(name, &wal[..size / 2], "it has 524288 bytes, a segment has 1048576");
    lab.refused(name, &[wal.as_slice(), &[0; 8192]].concat(), "it has 1056768 bytes, a segment has 1048576");
    lab.refused(
        name,
        &[],
        "it does not start with a page of WAL: xlp_magic at byte 0 needs 2 bytes, 0 are left",
    );
    lab.refused(name, &vec![0; size], "it does not start with a page of WAL: xlp_magic at byte 0 is 0x0");
    lab.refused("000000010000000000001000", &wal, "no segment of 1048576 bytes has that name");
    let nameless = lab.file(&format!("00000000{}", &name[8..]), &wal);
    let out = lab.site.waltide.fails(1, ["push", nameless.to_str().unwrap()]);
    assert!(out.stderr.contains("is no file that PostgreSQL archives"), "{}", out.describe());

    let other = Cluster::builder("other").scratch(&lab.site.scratch).start();
    other.pgbench_init(1);
    let theirs = fs::read(other.data_dir().join("pg_wal").join(name)).unwrap();
    let ids = [&other, &lab.cluster].map(|c| ControlData::read(c.data_dir()).system_identifier());
    lab.refused(
        name,
        &theirs,
        &format!(
            "{name} is of another cluster: its system identifier is {}, main in the archive has {}",
            ids[0], ids[1]
        ),
    );

    let flip = |at: usize| {
        let mut bad = wal.clone();
        bad[at] ^= 0x10;
        bad
    };
    // Behind a page's header lies record data, whatever the record.
    let crc = lab.file(name, &flip(8192 * 40 + 200));
    let out = lab.site.waltide.fails(1, ["push", crc.to_str().unwrap()]);
    assert!(out.stderr.contains(&format!("{name} is refused: ")), "{}", out.describe());
    assert!(out.stderr.contains("LSN 0/"), "{}", out.describe());
    assert!(out.stderr.contains("--force-admit"), "{}", out.describe());
    lab.refused(name, &flip(8192 * 7), "xlp_magic at byte 57344 is 0xD100");
    lab.refused(name, &flip(8192 * 7 + 9), "xlp_pageaddr at byte 57352");
    // A page that claims to be of a timeline before the one it follows, and one after the name's.
    let mut tli = wal.clone();
    tli[8192 * 9 + 4] = 2;
    lab.refused(name, &tli, "xlp_tli at byte 73732 is 2, more than the 1 allowed");
    // Zeros from some page on: this is no finished segment.
    let mut cut = wal.clone();
    cut[8192 * 100..].fill(0);
    lab.refused(name, &cut, "the log stops inside it at 0/");

    // A timeline's history says which pages it may have: timeline 3 left 2, which left 1 before this segment began.
    let third = format!("00000003{}", &name[8..]);
    let path = lab.file(&third, &wal);
    fs::write(path.with_file_name("00000003.history"), "1\t0/100000\tx\n2\t0/FF000000\ty\n").unwrap();
    let out = lab.site.waltide.fails(1, ["push", path.to_str().unwrap()]);
    assert!(out.stderr.contains("xlp_tli at byte 4 is 0x1, expected 0x2"), "{}", out.describe());

    for text in ["nonsense", "", "1 0/1000000"] {
        let path = lab.file("00000002.history", text.as_bytes());
        let out = lab.site.waltide.run(["push", path.to_str().unwrap()]);
        match text {
            "nonsense" => {
                assert!(out.stderr.contains("line 1: a timeline is expected first"), "{}", out.describe())
            }
            _ => continue,
        }
        assert_eq!(out.status, 1);
    }
    lab.refused(
        &format!("{name}.00000028.backup"),
        b"START",
        "it is no backup history: START WAL LOCATION is missing",
    );
    let missing = lab.site.waltide.fails(1, ["push", "/nonexistent/000000010000000000000001"]);
    assert!(missing.stderr.contains("/nonexistent/000000010000000000000001 cannot be read"), "{missing:?}");
    lab.site.waltide.fails(2, ["push"]);
    let elsewhere = lab.site.waltide.clone().cluster("elsewhere");
    let path = lab.file(name, &wal);
    let out = elsewhere.run(["push", path.to_str().unwrap()]);
    assert_eq!(out.status, 1);
    assert!(out.stderr.contains("cluster elsewhere is not in "), "{}", out.describe());
}

#[test]
fn a_fault_is_archived_only_when_that_is_forced_and_is_noted() {
    let lab = Lab::new("force");
    let (name, mut wal) = (lab.segments[3].as_str(), lab.wal(3));
    let whole = wal.clone();
    wal[8192 * 40 + 200] ^= 0x10;
    let path = lab.file(name, &wal);
    let path = path.to_str().unwrap();
    lab.site.waltide.fails(1, ["push", path]);
    let forced = lab.site.waltide.json(["push", path, "--force-admit"]);
    assert_eq!(forced["outcome"], "stored");
    let stored = &lab.site.segments(&lab.cluster)[name];
    assert!(stored.wal == wal);
    assert_eq!(stored.index.info.ending, Ending::Fault);
    assert_eq!(stored.index.faults.len(), 1);
    assert!(
        stored.index.info.records > 0
            && stored.index.info.valid_end < stored.index.faults[0].at.saturating_add(1)
    );
    // The good segment holds more, and is put beside.
    let path = lab.file(name, &whole);
    let beside = lab.site.waltide.json(["push", path.to_str().unwrap()]);
    assert_eq!(beside["outcome"], "stored_beside");
    assert_eq!(lab.site.waltide.json(["push", path.to_str().unwrap()])["outcome"], "contained");

    // Short, or no WAL at all: stored where it is clear whose it is.
    let name = lab.segments[5].as_str();
    let path = lab.file(name, &lab.wal(5)[..100_000]);
    lab.site.waltide.ok(["push", path.to_str().unwrap(), "--force-admit"]);
    let stored = &lab.site.segments(&lab.cluster)[name];
    assert_eq!(stored.index.info.ending, Ending::Fault);
    assert_eq!(stored.index.faults[0].message, "it has 100000 bytes, a segment has 1048576");
    assert!(stored.index.info.records > 0);
    // Force changes nothing where nothing is wrong.
    for name in [lab.segments[8].clone(), format!("{}.partial", lab.segments[8])] {
        let mut bytes = lab.wal(8);
        if name.ends_with(".partial") {
            bytes[8192 * 50..].fill(0);
        }
        let path = lab.file(&name, &bytes);
        let pushed = lab.site.waltide.json(["push", path.to_str().unwrap(), "--force-admit"]);
        assert_eq!(pushed["faults"], serde_json::json!([]), "{pushed}");
    }
    let alone = lab.file(&lab.segments[6], &[7; 1 << 20]);
    lab.site.waltide.fails(1, ["push", alone.to_str().unwrap(), "--force-admit"]);
    let beside_others = alone.with_file_name(&lab.segments[7]);
    fs::write(&beside_others, lab.wal(7)).unwrap();
    lab.site.waltide.ok(["push", alone.to_str().unwrap(), "--force-admit"]);

    // Nothing overrides another cluster or a divergence.
    let mut diverging = lab.wal(7);
    lab.site.waltide.ok(["push", beside_others.to_str().unwrap()]);
    diverging[8192 * 3 + 100] ^= 1;
    let path = lab.file(&lab.segments[7], &diverging);
    lab.site.waltide.ok(["push", path.to_str().unwrap(), "--force-admit"]);
    let other = Cluster::builder("other").scratch(&lab.site.scratch).start();
    other.pgbench_init(1);
    let theirs = fs::read(other.data_dir().join("pg_wal").join(&lab.segments[2])).unwrap();
    let path = lab.file(&lab.segments[2], &theirs);
    let out = lab.site.waltide.fails(1, ["push", path.to_str().unwrap(), "--force-admit"]);
    assert!(out.stderr.contains("is of another cluster"), "{}", out.describe());
}

#[test]
fn the_same_file_twice_is_a_success_and_changes_nothing() {
    let lab = Lab::new("twice");
    let name = lab.segments[3].as_str();
    let path = lab.file(name, &lab.wal(3));
    let path = path.to_str().unwrap();
    let first = lab.site.waltide.json(["push", path]);
    assert_eq!((&first["outcome"], &first["file_bytes"]), (&"stored".into(), &(1 << 20).into()));
    let object = lab.site.object(&lab.cluster, name);
    let before = (fs::read(&object).unwrap(), fs::metadata(&object).unwrap().modified().unwrap());
    assert_eq!(lab.site.waltide.json(["push", path])["outcome"], "already_there");
    assert!(before == (fs::read(&object).unwrap(), fs::metadata(&object).unwrap().modified().unwrap()));
    // Nothing is said of a success, for PostgreSQL's log takes all that is said.
    let quiet = lab.site.waltide.ok(["push", path]);
    assert_eq!((quiet.stdout.as_str(), quiet.stderr.as_str()), ("", ""));

    for (name, text) in
        [("00000002.history", "1\t0/2000000\tno recovery target specified\n"), ("00000003.history", "")]
    {
        let path = lab.file(name, text.as_bytes());
        assert_eq!(lab.site.waltide.json(["push", path.to_str().unwrap()])["outcome"], "stored");
        assert_eq!(lab.site.waltide.json(["push", path.to_str().unwrap()])["outcome"], "already_there");
    }
    let other = lab.file("00000002.history", b"1\t0/3000000\tno recovery target specified\n");
    let out = lab.site.waltide.fails(1, ["push", other.to_str().unwrap()]);
    let object = lab.site.names(&lab.cluster).wal_file("00000002.history".parse().unwrap());
    let says = format!("00000002.history is already archived with different contents, as {object}");
    assert!(out.stderr.contains(&says), "{}", out.describe());

    // A damaged copy in the archive is no copy.
    let mut damaged = before.0.clone();
    let at = damaged.len() - 40;
    damaged[at] ^= 1;
    fs::write(lab.site.object(&lab.cluster, name), damaged).unwrap();
    let out = lab.site.waltide.fails(1, ["push", path]);
    assert!(out.stderr.contains("is damaged in the archive"), "{}", out.describe());
}

#[test]
fn a_longer_copy_lies_beside_the_shorter_and_a_divergence_is_an_error() {
    let lab = Lab::new("partial");
    let (segment, wal) = (lab.segments[4].clone(), lab.wal(4));
    let name = format!("{segment}.partial");
    // What lies behind the end of a partial segment is zeros, or an older segment's pages.
    let old = lab.wal(2);
    let cut = |pages: usize, behind: Option<&[u8]>| {
        let mut bytes = wal.clone();
        match behind {
            None => bytes[pages * 8192..].fill(0),
            Some(old) => bytes[pages * 8192..].copy_from_slice(&old[pages * 8192..]),
        }
        lab.file(&name, &bytes)
    };
    let push = |path: &Path| lab.site.waltide.json(["push", path.to_str().unwrap()]);
    assert_eq!(push(&cut(40, None))["outcome"], "stored");
    assert_eq!(push(&cut(40, Some(&old)))["outcome"], "contained");
    assert_eq!(push(&cut(20, Some(&old)))["outcome"], "contained");
    let longer = push(&cut(90, Some(&old)));
    assert_eq!(longer["outcome"], "stored_beside");
    assert!(longer["object"].as_str().unwrap().contains(&format!("/{name}@0000")), "{longer}");
    assert_eq!(push(&cut(90, Some(&old)))["outcome"], "contained");
    assert_eq!(push(&cut(60, None))["outcome"], "contained");
    let stored = lab.site.segments(&lab.cluster);
    let ends: Vec<_> = stored.values().map(|s| (s.index.info.ending, s.index.faults.len())).collect();
    assert_eq!(ends, [(Ending::EndOfLog, 0); 2]);
    // The whole segment is another name.
    assert_eq!(push(&lab.file(&segment, &wal))["outcome"], "stored");

    // Another record in the same place: made by the same server after its data directory was put back.
    let mut cluster = builder(&lab.site, "again").create();
    let again = |cluster: &mut Cluster| {
        cluster.start();
        cluster.pgbench_init(1);
        let last = cluster.switch_wal();
        cluster.stop(StopMode::Fast);
        last
    };
    let saved = lab.site.scratch.copy_tree(cluster.data_dir(), "saved");
    lab.site.waltide.ok(["init", "--data-dir", cluster.data_dir().to_str().unwrap(), "--upgrade"]);
    let last = again(&mut cluster);
    let mut twin = Cluster::with_data_dir("twin", &lab.site.scratch, saved);
    let name = last.min(again(&mut twin));
    let file = |cluster: &Cluster| cluster.data_dir().join("pg_wal").join(&name);
    assert_eq!(push(&file(&cluster))["outcome"], "stored");
    let out = lab.site.waltide.fails(1, ["push", file(&twin).to_str().unwrap()]);
    let object = lab.site.names(&cluster).wal_file(name.parse().unwrap());
    let says = format!("{name} is already archived with different contents: it differs from {object} at 0/");
    assert!(out.stderr.contains(&says), "{}", out.describe());
    assert!(out.stderr.contains("two servers may be archiving the same timeline"), "{}", out.describe());
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

/// Pushes in this process, with faults between it and the archive.
fn push_with(archive: &Archive, faults: Option<&Faults>, path: &Path) -> Result<Outcome, String> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let archive = faults.map_or_else(|| archive.clone(), |faults| archive.with_faults(faults.clone()));
    let request = PushRequest {
        archive,
        layout: Layout::new("main").unwrap(),
        path: path.to_owned(),
        threads: 2,
        level: DEFAULT_LEVEL,
        force_admit: false,
    };
    runtime.block_on(push(&request)).map(|pushed| pushed.outcome).map_err(|e| e.to_string())
}

/// A name, what is pushed under it, and what was pushed before.
type Case<'a> = (&'a str, Vec<u8>, Option<Vec<u8>>);

#[test]
fn whichever_call_to_the_archive_fails_nothing_is_half_there_and_a_retry_works() {
    let lab = Lab::new("faults");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let url = lab.site.archive.to_str().unwrap().parse().unwrap();
    let archive = runtime.block_on(Archive::open(&url)).unwrap();
    let segment = lab.segments[4].clone();
    let partial = format!("{segment}.partial");
    let wal = lab.wal(4);
    let cut = |pages: usize| {
        let mut bytes = wal.clone();
        bytes[pages * 8192..].fill(0);
        bytes
    };
    let cases: [Case<'_>; 5] = [
        (&segment, wal.clone(), None),
        (&segment, wal.clone(), Some(wal.clone())),
        (&partial, cut(90), Some(cut(40))),
        (&partial, cut(40), Some(cut(90))),
        ("00000002.history", b"1\t0/2000000\tx\n".to_vec(), None),
    ];
    for (name, bytes, before) in cases {
        let path = lab.file(name, &bytes);
        let wal_dir = lab.site.archive.join(lab.site.names(&lab.cluster).wal());
        let mut failures = 0;
        for kind in [Faults::fail_call, Faults::lose_ack, Faults::torn_write, Faults::down_from] {
            for n in 1.. {
                let _ = fs::remove_dir_all(&wal_dir);
                if let Some(before) = &before {
                    push_with(&archive, None, &lab.file(name, before)).unwrap();
                }
                let faults = kind(n);
                let outcome = push_with(&archive, Some(&faults), &path);
                // What is visible is whole, whatever happened, and what was acknowledged is there.
                let stored = || match name.ends_with(".history") {
                    true => fs::read(wal_dir.join(name))
                        .map(|b| usize::from(WalFile::decode(&b).unwrap().contents == bytes))
                        .unwrap_or(0),
                    false => lab
                        .site
                        .segments(&lab.cluster)
                        .values()
                        .filter(|s| s.wal == bytes || before.as_ref() == Some(&s.wal))
                        .count(),
                };
                let there = stored();
                if outcome.is_ok() {
                    assert!(there > 0, "{name} {faults:?}");
                } else {
                    assert!(faults.fired(), "{name} {faults:?} {outcome:?}");
                    failures += 1;
                    let again = push_with(&archive, None, &path);
                    assert!(again.is_ok(), "{name} {faults:?} {again:?}");
                }
                assert!(stored() > 0, "{name} {faults:?}");
                if !faults.fired() {
                    break;
                }
            }
        }
        assert!(failures >= 8, "{name}: {failures}");
    }
}

/// Numbers that look random and come again with the same seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

#[test]
fn a_push_killed_at_any_instant_loses_nothing_and_leaves_nothing_half_done() {
    let lab = Lab::new("kill");
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(20_261_120);
    let mut dice = Dice(seed);
    let name = lab.segments[4].as_str();
    let path = lab.file(name, &lab.wal(4));
    let path = path.to_str().unwrap();
    let object = lab.site.object(&lab.cluster, name);
    let dir = object.parent().unwrap().to_owned();
    // The shortest of several, for the machine may be busy.
    let time = || {
        let _ = fs::remove_dir_all(&dir);
        lab.site.waltide.ok(["push", path]).took
    };
    let took = (0..5).map(|_| time()).min().unwrap();
    let (mut killed, mut absent, mut whole) = (0, 0, 0);
    for round in 0..1000 {
        if killed >= 170 {
            break;
        }
        let _ = fs::remove_dir_all(&dir);
        let mut command = lab.site.waltide.runner(["push", path]).into_command();
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let micros = u64::try_from(took.as_micros()).unwrap();
        let until = Instant::now() + Duration::from_micros(dice.below(micros));
        // Spinning hits the instant; sleeping would round it.
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        let status = child.wait().unwrap();
        killed += usize::from(status.code().is_none());
        match fs::read(&object) {
            Ok(bytes) => {
                whole += 1;
                let stored = StoredSegment::decode(&bytes)
                    .unwrap_or_else(|e| panic!("round {round}, seed {seed}: {e}"));
                assert!(stored.wal == lab.wal(4), "round {round}, seed {seed}");
            }
            Err(_) => {
                absent += 1;
                assert!(!status.success(), "acknowledged and not there: round {round}, seed {seed}");
            }
        }
        lab.site.waltide.ok(["push", path]);
        assert!(lab.site.segments(&lab.cluster)[name].wal == lab.wal(4), "round {round}, seed {seed}");
    }
    assert!(killed >= 170 && absent > 20, "{killed} killed, {absent} absent, {whole} whole");
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

#[test]
fn a_flipped_bit_is_refused_wherever_a_checksum_or_a_page_header_covers_it() {
    let lab = Lab::new("flips");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let url = lab.site.archive.to_str().unwrap().parse().unwrap();
    let archive = runtime.block_on(Archive::open(&url)).unwrap();
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(7);
    let mut dice = Dice(seed);
    let name = lab.segments[4].as_str();
    let whole = lab.wal(4);
    // Its neighbours lie beside it, so that records over its edges are covered too.
    let path = lab.file(name, &whole);
    for at in [3, 5] {
        fs::write(path.with_file_name(&lab.segments[at]), lab.wal(at)).unwrap();
    }
    let object = lab.site.object(&lab.cluster, name);
    let (mut refused, rounds) = (0, 400);
    for _ in 0..rounds {
        let mut bytes = whole.clone();
        let at = usize::try_from(dice.below(whole.len() as u64)).unwrap();
        bytes[at] ^= 1 << dice.below(8);
        fs::write(&path, &bytes).unwrap();
        match push_with(&archive, None, &path) {
            Err(text) => {
                refused += 1;
                assert!(text.contains(&format!("{name} is ")), "{text}");
                assert!(!object.exists(), "byte {at}, seed {seed}");
            }
            // Only the bytes that align records and headers are covered by nothing.
            Ok(_) => {
                assert_eq!(whole[at], 0, "byte {at}, seed {seed}");
                fs::remove_file(&object).unwrap();
            }
        }
    }
    assert!(refused * 100 >= rounds * 95, "{refused} of {rounds}, seed {seed}");
}
