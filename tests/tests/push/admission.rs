//! What is refused, what is the same, what is longer.

use std::fs;
use std::path::Path;

use waltide_format::SegmentName;
use waltide_format::archive::Ending;
use waltide_storage::Archive;
use waltide_tests::oracle::ControlData;
use waltide_tests::{Cluster, StopMode};

use super::builder;
use super::faults::{Dice, push_with};
use super::lab::Lab;

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

    let history = lab.file("00000002.history", b"1\t0/2000000\tno recovery target specified\n");
    assert_eq!(lab.site.waltide.json(["push", history.to_str().unwrap()])["outcome"], "stored");
    assert_eq!(lab.site.waltide.json(["push", history.to_str().unwrap()])["outcome"], "already_there");
    // A timeline without ancestors could never be followed to: no server writes such a file.
    let empty = lab.file("00000003.history", b"");
    let out = lab.site.waltide.fails(1, ["push", empty.to_str().unwrap()]);
    assert!(out.stderr.contains("the timeline that this one left is expected"), "{}", out.describe());
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
