//! As far as proven, then PostgreSQL: what native replay does with a log that has records which PostgreSQL passes over and the
//! engine does not know.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use waltide_format::SegmentName;
use waltide_format::engines::postgres::wal::{Expected, Next, RecordStream, Rmgr, SegmentSpan};
use waltide_format::{Lsn, SegmentSize};
use waltide_tests::site::{read_dir, text};
use waltide_tests::{Cluster, Output, Runner, Site, Waltide};

/// What became a record of the kind 0xE0 of the resource manager XLOG: 15 has none, and its recovery passes over it.
const SAID: &str = "native replay does not know the XLOG record at 0/";

/// A backup and the log behind it: a row, the mark a, a row, a checkpoint, and the same with b, then with c, but for a
/// checkpoint behind that. Then a row.
struct Marked {
    site: Site,
    /// The segments behind the backup, which are not in the archive yet.
    segments: PathBuf,
}

/// An archive in which some of the marks became records that are not known.
struct Variant<'a> {
    marked: &'a Marked,
    waltide: Waltide,
    name: String,
}

impl Marked {
    fn new() -> Self {
        let site = Site::new("vouching");
        let cluster = site.start(site.builder("db").segment_mb(1).setting("autovacuum", "off"));
        cluster.query("create table t (id int)");
        site.back_up(&cluster);
        let segments = site.scratch.dir("held-back");
        cluster.set("archive_command", &format!("cp %p {}/%f", text(&segments)));
        cluster.reload();
        // Whatever the archiver was about to do, it does so from here on.
        cluster.switch_wal();
        cluster.wait_until(
            "select pg_sleep(0.1) is not null and current_setting('archive_command') like 'cp %'",
        );
        let mut rows = 1..;
        let mut row = || drop(cluster.query(&format!("insert into t values ({})", rows.next().unwrap())));
        for mark in ["a", "b", "c"] {
            row();
            // One of two lies in a page as a whole.
            for _ in 0..2 {
                cluster.query(&format!("select pg_logical_emit_message(true, 'mark', 'mark {mark}')"));
            }
            row();
            if mark != "c" {
                cluster.query("checkpoint");
            }
        }
        cluster.archive_all();
        Self { site, segments }
    }

    /// The archive with these marks as records that are not known.
    fn variant(&self, marks: &[&str]) -> Variant<'_> {
        let name = format!("variant-{}", marks.concat());
        let archive = self.site.scratch.fresh_path(&name);
        let copy = ["-a", text(&self.site.archive), text(&archive)];
        Runner::as_postgres("cp").args(copy).run().assert_ok();
        let waltide = self.site.waltide.clone().archive(&archive);
        let edited = self.site.scratch.dir(&format!("{name}-segments"));
        let mut made = 0;
        for path in read_dir(&self.segments) {
            let to = edited.join(path.file_name().unwrap());
            let mut bytes = fs::read(&path).unwrap();
            made += make_unknown(&path, &mut bytes, marks);
            fs::write(&to, bytes).unwrap();
            self.site.scratch.give_tree(&edited);
            waltide.ok(["push", text(&to)]);
        }
        assert!(made >= marks.len(), "{made} of {marks:?}");
        Variant { marked: self, waltide, name }
    }
}

/// Makes the messages that say one of the marks records that are not known; how many.
fn make_unknown(path: &Path, bytes: &mut [u8], marks: &[&str]) -> usize {
    let name: SegmentName = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
    let size = SegmentSize::new(bytes.len() as u64).unwrap();
    let start = name.start(size).unwrap();
    let mut found = Vec::new();
    {
        let span = SegmentSpan::containing(start, size).unwrap();
        let mut stream = RecordStream::new(&*bytes, span, Expected::default(), None).unwrap();
        while let Next::Record(record) = stream.next_record().unwrap() {
            let says = |mark: &&str| record.main_data().ends_with(format!("mark {mark}").as_bytes());
            let (at, length) = (record.start.bytes_since(start), u64::from(record.header.total_bytes));
            let is_whole = at / 8192 == (at + length - 1) / 8192;
            if record.rmgr() == Rmgr::LOGICALMSG && is_whole && marks.iter().any(says) {
                found.push((at as usize, length as usize));
            }
        }
    }
    for (at, length) in &found {
        let record = &mut bytes[*at..at + length];
        (record[16], record[17]) = (0xE0, Rmgr::XLOG.get());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&record[24..]), &record[..20]);
        record[20..24].copy_from_slice(&crc.to_le_bytes());
    }
    found.len()
}

impl Variant<'_> {
    fn args<'a>(dir: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
        [&["restore", "--data-dir", text(dir), "--archive-mode", "off"], more].concat()
    }

    /// Restores everything; what is said, and on stderr. All rows are there.
    #[track_caller]
    fn restored(&self, label: &str, more: &[&str]) -> (Value, String) {
        let dir = self.marked.site.scratch.fresh_path(&format!("{}-{label}", self.name));
        let out = self.waltide.ok([&Self::args(&dir, more)[..], &["--json"]].concat());
        let mut cluster = Cluster::with_data_dir(label, &self.marked.site.scratch, &dir);
        cluster.start();
        cluster.wait_promoted();
        let rows = cluster.query("select string_agg(id::text, ' ' order by id) from t");
        assert_eq!(rows, "1 2 3 4 5 6", "{}", out.describe());
        (serde_json::from_str(&out.stdout).unwrap(), out.stderr)
    }

    #[track_caller]
    fn refused(&self, more: &[&str]) -> Output {
        let dir = self.marked.site.scratch.fresh_path("refused");
        let out = self.waltide.fails(1, Self::args(&dir, more));
        assert!(out.stderr.contains(SAID) && out.stderr.contains("(kind 0xE0)"), "{out:?}");
        assert!(!dir.exists(), "{out:?}");
        out
    }
}

fn lsn(found: &Value) -> Lsn {
    found.as_str().unwrap_or_else(|| panic!("{found}")).parse().unwrap()
}

#[test]
fn a_record_that_is_not_known_ends_native_replay_before_it() {
    let marked = Marked::new();
    let all = marked.variant(&[]);
    let (done, _) = all.restored("native", &["--replay", "native"]);
    let newest = lsn(&done["restored"]["replayed"]["redo"]);
    assert_eq!(done["restored"]["because"], Value::Null, "{done}");

    // Between two checkpoints: the older one it is.
    let between = marked.variant(&["b"]);
    let (done, said) = between.restored("auto", &[]);
    assert_eq!(lsn(&done["actions"]["replay"]["hand_over"]["redo"]), newest, "{done}");
    let restored = &done["restored"];
    let older = lsn(&restored["replayed"]["redo"]);
    let because = restored["because"].as_str().unwrap();
    assert!(older < newest && because.contains(SAID), "{done}");
    assert!(because.ends_with(&format!("it ends earlier, at {older}")) && said.contains(because), "{said}");
    between.refused(&["--replay", "native"]);
    // What is not known may be what an export needs, too.
    let out = marked.site.scratch.dir("out").join("t.sql");
    let place = marked.site.scratch.dir("place");
    let export = ["export", "--table", "t", "--scratch", text(&place), "--output", text(&out)];
    let exported = between.waltide.json(export);
    assert_eq!(exported["exported"]["restored"]["because"], *because, "{exported}");
    assert!(fs::read_to_string(&out).unwrap().contains("\n6\n"));
    let advanced = between.waltide.fails(1, ["advance", "--scratch", text(&place)]);
    assert!(advanced.stderr.contains(SAID), "{advanced:?}");

    // Before any checkpoint PostgreSQL does it all.
    for marks in [&["a"][..], &["a", "b", "c"]] {
        let (done, said) = marked.variant(marks).restored("server", &[]);
        let because = done["restored"]["because"].as_str().unwrap();
        assert!(because.contains(SAID) && because.ends_with(": PostgreSQL replays everything"), "{done}");
        assert!(done["restored"]["replayed"].is_null() && said.contains(because), "{said}");
    }

    // Behind the last checkpoint it is in the way of nothing but of an end without PostgreSQL.
    let behind = marked.variant(&["c"]);
    let (done, _) = behind.restored("native", &["--replay", "native"]);
    assert_eq!(done["restored"]["because"], Value::Null, "{done}");
    for how in ["auto", "native"] {
        let (done, said) = behind.restored(how, &["--replay", how, "--finish", "auto"]);
        assert!(done["actions"]["replay"]["finish"]["lsn"].is_string(), "{done}");
        let restored = &done["restored"];
        assert_eq!(
            (&restored["replayed"]["finished"], lsn(&restored["replayed"]["redo"])),
            (&false.into(), newest)
        );
        assert!(
            restored["because"].as_str().is_some_and(|why| why.contains(SAID)) && said.contains(SAID),
            "{said}"
        );
    }
    behind.refused(&["--finish", "native"]);
    // Before the newest checkpoint it is an error where replay has to be native.
    between.refused(&["--replay", "native", "--finish", "auto"]);
}
