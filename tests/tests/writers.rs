//! Several servers write into one archive: what is of one log goes together, what is not is refused and named.

use std::fs;
use std::path::{Path, PathBuf};

use waltide_format::engines::postgres::scan::{ScanContext, scan_segment};
use waltide_format::{Lsn, SegmentName, SegmentSize};
use waltide_tests::site::text;
use waltide_tests::workload::Journal;
use waltide_tests::{Cluster, Site, StopMode};

/// A hot standby that archives what it receives.
fn archiving_standby(primary: &Cluster, name: &str) -> Cluster {
    let mut standby = primary.make_standby(name);
    standby.set("archive_mode", "always");
    standby.restart();
    standby
}

fn failed_count(cluster: &Cluster) -> String {
    cluster.query("select failed_count from pg_stat_archiver")
}

#[test]
fn a_split_brain_keeps_both_histories_and_each_is_restored_with_its_own_rows() {
    let site = Site::new("split-brain");
    let old = site.start(site.builder("old").segment_mb(1));
    old.pgbench_init(1);
    let mut journal = Journal::create(&old);
    journal.steps_on(&old, 2);
    site.back_up(&old);
    let new = archiving_standby(&old, "new");
    journal.steps_on(&old, 2);
    // Both archive the same segments while there is load.
    old.pgbench(&["-c", "2", "-t", "300"]);
    old.archive_all();
    let before = journal.step(&old, "before the fork").id;
    new.wait_caught_up(&old);
    new.promote();

    // Nobody has told the old primary.
    let (mut on_old, mut on_new) = (journal.clone(), journal.clone());
    let loads = [&old, &new].map(|c| c.pgbench_background(&["-c", "2", "-t", "400"]));
    for _ in 0..3 {
        on_old.step(&old, "the old primary goes on");
        on_new.step(&new, "the new one begins");
        old.archive_all();
        new.archive_all();
    }
    loads.into_iter().for_each(|load| {
        load.wait().assert_ok();
    });
    on_old.step(&old, "the old primary's last");
    let last_old = old.archive_all();
    on_new.steps_on(&new, 2);
    new.archive_all();
    for cluster in [&old, &new] {
        assert_eq!(failed_count(cluster), "0", "{}", cluster.log_tail());
    }
    assert!(on_old.steps().last().unwrap().timeline == 1 && on_new.steps().last().unwrap().timeline == 2);

    let status = site.waltide.json(["status"]);
    assert_eq!(status["health"], "ok", "{status:#}");
    let history = &status["histories"][1];
    assert_eq!((&history["timeline"], &history["parent"]), (&2.into(), &1.into()), "{history:#}");
    assert_eq!(history["reason"], "no recovery target specified");
    assert_eq!(history["history_pushed_by"]["directory"], text(new.data_dir()));
    let pushers = |n: usize| {
        let of = status["histories"][n]["pushed_by"].as_array().unwrap().iter();
        let mut of: Vec<_> = of.map(|p| p["directory"].as_str().unwrap().to_owned()).collect();
        of.sort();
        of
    };
    let directories = [&new, &old].map(|c| text(c.data_dir()).to_owned());
    assert_eq!(pushers(1), directories[..1], "only the new primary writes the new timeline");
    assert!(pushers(0).contains(&directories[1]), "{history:#}");
    let fork = history["forked_at"].as_str().unwrap();
    // Each timeline's window says which transactions can be named, and what a restore to its end takes.
    for (timeline, journal) in [(1, &on_old), (2, &on_new)] {
        let windows = status["windows"].as_array().unwrap();
        let window = windows.iter().find(|w| w["timeline"] == timeline).unwrap();
        let xid = |end: &str| window[end]["xid"].as_str().unwrap().parse::<u64>().unwrap();
        assert!(xid("first_commit") <= journal.steps()[2].xid, "{window:#}");
        assert!(xid("last_commit") >= journal.steps().last().unwrap().xid, "{window:#}");
        assert!(window["restore"]["records"].as_u64().unwrap() > 1000, "{window:#}");
        assert!(window["restore"]["estimate"]["total_seconds"].as_f64().unwrap() > 0.0, "{window:#}");
    }
    let shown = site.waltide.ok(["status"]).stdout;
    assert!(shown.contains(&format!("timeline 2 left timeline 1 at {fork}")), "{shown}");
    // The segment that the new primary left half full is there twice: as far as it had it, and whole.
    let segments = site.segments(&old);
    let partial = segments.keys().find(|name| name.ends_with(".partial")).expect("the fork's segment");
    assert!(segments.contains_key(partial.trim_end_matches(".partial")), "{:?}", segments.keys());
    assert!(segments.contains_key(&last_old));
    site.waltide.ok(["verify"]);

    let ends = |journal: &Journal| journal.len();
    let at = |journal: &Journal, id: u64| journal.steps()[id as usize - 1].xid.to_string();
    let check = |name: &str, journal: &Journal, last: u64, target: &[&str]| {
        journal.assert_exactly_up_to(&site.restored(name, target), last);
    };
    check("old-all", &on_old, ends(&on_old), &["--target-timeline", "1"]);
    check("new-all", &on_new, ends(&on_new), &[]);
    let middle = ends(&journal) + 2;
    check("old-middle", &on_old, middle, &["--target-xid", &at(&on_old, middle), "--target-timeline", "1"]);
    check("new-middle", &on_new, middle, &["--target-xid", &at(&on_new, middle)]);
    check("common", &journal, before - 1, &["--target-xid", &at(&journal, before - 1)]);
}

/// A cluster at work, and the same put back from a snapshot and at work too: two servers on one timeline.
struct Twins {
    site: Site,
    clusters: [Cluster; 2],
    /// The first segment that they do not share.
    first: String,
}

impl Twins {
    /// Neither has archived anything, and both are stopped, in segments of the same name.
    fn new(label: &str) -> Self {
        let site = Site::new(label);
        let mut one = Cluster::builder("one").scratch(&site.scratch).segment_mb(1).create();
        one.set("wal_keep_size", "1GB");
        site.init(&one);
        one.start();
        one.pgbench_init(1);
        let first = one.query("select pg_walfile_name(pg_current_wal_insert_lsn())");
        one.stop(StopMode::Fast);
        let two = site.scratch.copy_tree(one.data_dir(), "two");
        let two = Cluster::with_data_dir("two", &site.scratch, two);
        let mut clusters = [one, two];
        for cluster in &mut clusters {
            // Where they get to must not depend on what works beside the load.
            cluster.set("autovacuum", "off");
            cluster.start();
            cluster.pgbench(&["-t", "1500"]);
        }
        let current = |of: &Cluster| of.query("select pg_walfile_name(pg_current_wal_insert_lsn())");
        let ends = clusters.each_ref().map(|cluster| {
            cluster.switch_wal();
            current(cluster)
        });
        let end = ends.iter().max().unwrap();
        for cluster in &mut clusters {
            while current(cluster) < *end {
                cluster.switch_wal();
            }
            cluster.stop(StopMode::Fast);
        }
        Self { site, clusters, first }
    }

    /// The names of the segments that both have, from the first that differs on.
    fn segments(&self) -> Vec<String> {
        let names = self.clusters.each_ref().map(Cluster::wal_file_names);
        let both = names[0].iter().filter(|n| **n > self.first && names[1].contains(n));
        both.cloned().collect()
    }

    fn wal(&self, of: usize, name: &str) -> Vec<u8> {
        fs::read(self.clusters[of].data_dir().join("pg_wal").join(name)).unwrap()
    }

    /// Puts a file alone into a directory of its own.
    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let dir = self.site.scratch.fresh_path("file");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join(name), bytes).unwrap();
        self.site.scratch.give_tree(&dir);
        dir.join(name)
    }

    /// The same up to a page, with zeros behind it.
    fn cut(&self, name: &str, wal: &[u8], pages: usize) -> PathBuf {
        let mut bytes = wal.to_vec();
        bytes[pages * 8192..].fill(0);
        self.file(name, &bytes)
    }

    /// Pushes all of them at the same moment; their statuses.
    fn race(&self, paths: &[PathBuf]) -> Vec<(i32, String)> {
        let racing: Vec<_> = paths.iter().map(|p| self.site.waltide.spawn(["push", text(p)])).collect();
        racing.into_iter().map(|r| r.wait()).map(|out| (out.status, out.stderr)).collect()
    }

    /// What a reader gets under a name.
    fn fetched(&self, name: &str) -> Vec<u8> {
        let dir = self.site.scratch.dir("fetched");
        let dest = dir.join(name);
        let _ = fs::remove_file(&dest);
        self.site.waltide.clone().current_dir(&dir).ok(["fetch", name, text(&dest)]);
        fs::read(dest).unwrap()
    }
}

#[test]
fn racing_pushes_of_one_log_all_succeed_and_the_longest_copy_is_what_readers_get() {
    let twins = Twins::new("racing");
    let names = twins.segments();
    assert!(names.len() >= 6, "{names:?}");
    for (round, name) in names.iter().take(6).enumerate() {
        let wal = twins.wal(0, name);
        let partial = format!("{name}.partial");
        let cuts: Vec<_> = [30, 90, 60, 10].map(|pages| twins.cut(&partial, &wal, pages + round)).into();
        for (status, text) in twins.race(&cuts) {
            assert_eq!((status, text.as_str()), (0, ""));
        }
        let longest = twins.fetched(&partial);
        assert!(longest[..(90 + round) * 8192 - 8192] == wal[..(90 + round) * 8192 - 8192], "round {round}");
        // Now the whole segment, by two servers, while a shorter `.partial` comes once more.
        let more = [twins.file(name, &wal), twins.cut(&partial, &wal, 110), twins.file(name, &wal)];
        for (status, text) in twins.race(&more) {
            assert_eq!((status, text.as_str()), (0, ""));
        }
        assert!(twins.fetched(name) == wal, "round {round}");
    }
    let found = twins.site.waltide.json(["verify"]);
    assert_eq!(found["faults"], serde_json::json!([]));
}

#[test]
fn of_racing_pushes_of_two_logs_one_at_least_is_refused_and_names_both() {
    let twins = Twins::new("diverging");
    let names = twins.segments();
    let refused = |told: &[(i32, String)]| {
        let texts: Vec<_> = told.iter().filter(|(status, _)| *status != 0).map(|(_, text)| text).collect();
        assert!(!texts.is_empty() && told.iter().all(|(status, _)| *status < 2), "{told:?}");
        for text in texts {
            let says = "is already archived with different contents: it differs from main/";
            assert!(text.contains(says) && text.contains(" at 0/"), "{text}");
            assert_eq!(text.matches("-file at ").count(), 2, "both directories are named: {text}");
        }
    };
    assert!(names.len() >= 9, "{names:?}");
    // Every other segment: with its neighbour it would be refused for not continuing that.
    for (round, name) in names.iter().step_by(2).enumerate().take(6) {
        let wals = [0, 1].map(|of| twins.wal(of, name));
        let partial = format!("{name}.partial");
        let paths = match round % 3 {
            // Two whole segments, a whole one and a `.partial`, two longer copies beside a short one.
            0 => [twins.file(name, &wals[0]), twins.file(name, &wals[1])],
            1 => [twins.file(name, &wals[0]), twins.cut(&partial, &wals[1], 70)],
            _ => [twins.cut(&partial, &wals[0], 60), twins.cut(&partial, &wals[1], 80)],
        };
        refused(&twins.race(&paths));
        // Nor later: what was refused stays refused, in whatever order it comes again.
        let again: Vec<_> = paths.iter().flat_map(|path| twins.race(std::slice::from_ref(path))).collect();
        refused(&again);
    }
}

#[test]
fn a_segment_that_does_not_fit_its_archived_neighbour_is_told_with_the_lsn_at_which_the_logs_part() {
    let twins = Twins::new("parting");
    let own = |of: usize, name: &str| twins.clusters[of].data_dir().join("pg_wal").join(name);
    let names = twins.clusters[0].wal_file_names();
    let from = names.iter().position(|n| *n == twins.first).unwrap();
    let size = SegmentSize::new(1 << 20).unwrap();
    // The first byte at which the files differ; records are told by their first.
    let mut parts = None;
    for (n, name) in names.iter().enumerate().skip(from) {
        let (a, b) = (twins.wal(0, name), twins.wal(1, name));
        if let Some(at) = a.iter().zip(&b).position(|(x, y)| x != y) {
            let name: SegmentName = name.parse().unwrap();
            parts = Some((n, name.start(size).unwrap().get() + at as u64));
            break;
        }
    }
    let (parting, differs) = parts.expect("they are not one log");
    let told = |path: &Path| {
        let text = twins.site.waltide.fails(1, ["push", text(path)]).stderr;
        let part = text.split("; they part ").nth(1).unwrap_or_else(|| panic!("{text}")).to_owned();
        let mut words = part.split([' ', ';']);
        let mut lsn = || words.by_ref().find_map(|w| w.parse::<Lsn>().ok()).unwrap().get();
        (part.clone(), lsn())
    };
    // A record's checksum differs where it does, 24 bytes behind its start at the most, or a page's header more.
    let is_there = |lsn: u64| lsn <= differs && differs < lsn + 64;

    // The first edge behind that which tells them apart: as long as records only differ in what they hold, any fits.
    let info = |of: usize, n: usize| {
        let context = ScanContext::new(names[n].parse().unwrap(), size);
        scan_segment(&twins.wal(of, &names[n]), &context).unwrap().index.info
    };
    let edge = (parting + 1..names.len() - 1).find(|n| info(0, *n).last_record != info(1, n + 1).first_prev);
    let edge = edge.expect("they are told apart somewhere");
    // The archive has the one's log up to there, and lacks the segment before that in which they part.
    let push = |n: usize| twins.site.waltide.ok(["push", text(&own(0, &names[n]))]);
    for n in parting..=edge {
        push(n);
    }
    let (part, lsn) = told(&own(1, &names[edge + 1]));
    assert!(part.starts_with("at ") && part.contains(" or before; "), "{part}");
    assert!(is_there(lsn), "{part}: {differs:X}");
    // Once it has that too, it is known that they are one before.
    push(parting - 1);
    let (part, lsn) = told(&own(1, &names[edge + 1]));
    assert!(part.starts_with("at ") && !part.contains(" or before"), "{part}");
    assert!(is_there(lsn), "{part}: {differs:X}");
    // Alone in a directory the segment says only where they are not the same any more.
    let (part, lsn) = told(&twins.file(&names[edge + 1], &twins.wal(1, &names[edge + 1])));
    assert!(part.contains(" or before; ") && lsn >= differs, "{part}");

    // In front of a hole: what they have in common ends where it begins.
    push(edge + 1);
    for gone in &names[parting..=edge] {
        fs::remove_file(twins.site.object(&twins.clusters[0], gone)).unwrap();
    }
    let (part, lsn) = told(&own(1, &names[edge]));
    let start = names[parting].parse::<SegmentName>().unwrap().start(size).unwrap().get();
    assert!(part.starts_with("between ") && lsn == start, "{part}");
}

#[test]
fn two_servers_on_one_timeline_are_told_apart_before_their_segments_mix() {
    let mut twins = Twins::new("one-timeline");
    let command = twins.site.waltide.archive_command();
    let [one, two] = &mut twins.clusters;
    for cluster in [&mut *one, &mut *two] {
        cluster.set("archive_mode", "on");
        cluster.set("archive_command", &command);
    }
    one.start();
    one.archive_all();
    // The one put back from the snapshot archives what it has; it is far ahead in the end.
    two.start();
    two.pgbench(&["-t", "1500"]);
    let ahead = two.switch_wal();
    two.wait_until("select failed_count >= 2 from pg_stat_archiver");
    one.pgbench(&["-t", "300"]);
    one.archive_all();
    assert_eq!(failed_count(one), "0", "{}", one.log_tail());
    let log = two.log_text();
    let says = "is already archived with different contents: it differs from main/";
    assert!(log.contains(says), "{}", two.log_tail());
    assert!(log.contains(&format!(":{} at ", text(two.data_dir()))), "{}", two.log_tail());
    assert!(log.contains(&format!("the archived one of {}:{} at ", hostname(), text(one.data_dir()))));
    // Segments whose names were still free went along in the same runs, but not into the other server's log.
    let site = &twins.site;
    let object = |path: &Path| site.waltide.fails(1, ["push", text(path)]).stderr;
    let one_file = |c: &Cluster, name: &str| c.data_dir().join("pg_wal").join(name);
    let last = site.segments(one).into_keys().next_back().unwrap();
    let next = two.wal_segments().into_iter().find(|name| *name > last);
    let next = next.filter(|name| *name <= ahead).expect("the snapshot's server is ahead");
    let refused = object(&one_file(two, &next));
    assert!(refused.contains(&format!("{next} and the archived ")), "{refused}");
    assert!(refused.contains("are not of one log: ") && refused.contains("; they part at 0/"), "{refused}");
    let stored = site.segments(one);
    let by_two = stored.values().filter_map(|s| s.index.pushed_by.as_ref());
    let by_two = by_two.filter(|by| by.directory == text(two.data_dir())).count();
    assert_eq!(by_two, 0, "{:?}", stored.keys());
    let status = site.waltide.json_with_status(1, ["status"]);
    assert_eq!(status["holes"], serde_json::json!([]), "{status:#}");
    assert_eq!(site.waltide.json(["verify"])["faults"], serde_json::json!([]));
}

#[test]
fn two_servers_that_take_the_same_new_timeline_are_told_apart_by_their_histories() {
    let site = Site::new("same-timeline");
    let primary = site.start(site.builder("primary").segment_mb(1));
    let mut journal = Journal::create(&primary);
    site.back_up(&primary);
    let standbys = ["left", "right"].map(|name| primary.make_standby(name));
    for (n, standby) in standbys.iter().enumerate() {
        // One of them missed the other's promotion, and what the primary wrote in between.
        journal.steps_on(&primary, n as u64 + 1);
        primary.switch_wal();
        standby.wait_caught_up(&primary);
        standby.promote();
    }
    let [left, right] = &standbys;
    let push = |cluster: &Cluster, name: &str| {
        let path = cluster.data_dir().join("pg_wal").join(name);
        site.waltide.runner(["push", text(&path)]).run()
    };
    push(left, "00000002.history").assert_ok();
    let out = push(right, "00000002.history").assert_status(1);
    let says = "00000002.history is already archived with different contents";
    assert!(out.stderr.contains(says), "{}", out.describe());
    for part in [
        ": it leaves timeline 1 at 0/",
        ", the archived one leaves timeline 1 at 0/",
        "(no recovery target specified)",
        text(left.data_dir()),
        text(right.data_dir()),
        "two servers may have taken the same timeline",
    ] {
        assert!(out.stderr.contains(part), "{part:?} in {}", out.describe());
    }
    // The archive still says which history the timeline is.
    let status = site.waltide.json(["status"]);
    assert_eq!(status["histories"][1]["history_pushed_by"]["directory"], text(left.data_dir()));
}

#[test]
fn a_deleted_a_cut_a_swapped_and_a_doubled_segment_are_each_found_and_named() {
    let site = Site::new("tampered");
    let cluster = site.start(site.builder("db").segment_mb(1));
    cluster.pgbench_init(1);
    site.back_up(&cluster);
    for _ in 0..4 {
        cluster.pgbench(&["-t", "50"]);
        cluster.archive_all();
    }
    let names: Vec<String> = site.segments(&cluster).into_keys().filter(|n| n.len() == 24).collect();
    let [a, b] = [names.len() - 4, names.len() - 3].map(|n| names[n].clone());
    let [path_a, path_b] = [&a, &b].map(|name| site.object(&cluster, name));
    let [bytes_a, bytes_b] = [&path_a, &path_b].map(|path| fs::read(path).unwrap());
    let next = names.last().unwrap().parse::<SegmentName>().unwrap();
    let next = next.next(SegmentSize::new(1 << 20).unwrap()).unwrap();
    let doubled = site.object(&cluster, &next.to_string());
    // Each as an administrator's slip would do it: the file keeps its owner and mode.
    let overwrite = |path: &Path, bytes: &[u8]| {
        let _ = fs::remove_file(path);
        fs::write(path, bytes).unwrap();
        site.scratch.give_tree(path);
    };
    let found = |what: &str, named: &str| {
        let status = site.waltide.json_with_status(3, ["status"]);
        let alerts = status["alerts"].to_string();
        assert!(alerts.contains(named), "{what}: {alerts}");
        let sides = alerts.contains("the nearest that can be restored to: before it 0/");
        assert_eq!(sides, what != "doubled", "{what}: {alerts}");
        for args in [&["verify"][..], &["verify", "--quick"]] {
            let faults = site.waltide.json_with_status(3, args)["faults"].to_string();
            assert!(faults.contains(named), "{what}: {faults}");
        }
    };
    fs::remove_file(&path_a).unwrap();
    found("deleted", &format!("{a} is missing"));
    overwrite(&path_a, &bytes_a[..bytes_a.len() / 2]);
    found("cut", &a);
    overwrite(&path_a, &bytes_b);
    overwrite(&path_b, &bytes_a);
    found("swapped", &format!("{b}, expected {a}"));
    overwrite(&path_a, &bytes_a);
    overwrite(&path_b, &bytes_b);
    overwrite(&doubled, &bytes_a);
    found("doubled", &format!("{a}, expected {next}"));
    fs::remove_file(&doubled).unwrap();
    site.waltide.ok(["status"]);
    assert_eq!(site.waltide.json(["verify"])["faults"], serde_json::json!([]));
}

fn hostname() -> String {
    waltide_archiver::host::name()
}
