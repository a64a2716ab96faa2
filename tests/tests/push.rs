//! Segments go from real clusters into the archive, and nothing else does.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use waltide_format::archive::{Ending, Layout, StoredSegment, SystemLayout, WalFile};
use waltide_format::{SegmentName, SystemId};
use waltide_tests::oracle::{ControlData, Waldump};
use waltide_tests::{Cluster, ClusterBuilder, Scratch, StopMode, Waltide};

/// An archive, the binary that ships to it, and where everything lies.
struct Site {
    scratch: Scratch,
    archive: PathBuf,
    waltide: Waltide,
}

impl Site {
    fn new(label: &str) -> Self {
        let scratch = Scratch::new(label);
        let archive = scratch.dir("archive");
        let waltide = Waltide::new(&scratch).archive(&archive).cluster("main");
        Self { scratch, archive, waltide }
    }

    fn builder(&self, name: &str) -> ClusterBuilder {
        Cluster::builder(name).scratch(&self.scratch).setting("wal_keep_size", "4GB")
    }

    /// A cluster that is in the archive and ships to it, not yet started.
    fn create(&self, builder: ClusterBuilder) -> Cluster {
        let cluster = builder.archive_command(&self.waltide.archive_command()).create();
        self.init(&cluster);
        cluster
    }

    fn init(&self, cluster: &Cluster) {
        self.waltide.ok(["init", "--data-dir", cluster.data_dir().to_str().unwrap()]);
    }

    fn layout(&self, cluster: &Cluster) -> SystemLayout {
        let id = ControlData::read(cluster.data_dir()).system_identifier();
        Layout::new("main").unwrap().system(SystemId::from(id))
    }

    fn object(&self, cluster: &Cluster, file: &str) -> PathBuf {
        self.archive.join(self.layout(cluster).wal_file(file.parse().unwrap()))
    }

    /// Every stored segment and `.partial` of a cluster, whole and checked, by object name.
    fn stored(&self, cluster: &Cluster) -> BTreeMap<String, StoredSegment> {
        let mut found = BTreeMap::new();
        for timeline in read_dir(&self.archive.join(self.layout(cluster).wal())) {
            for object in read_dir(&timeline) {
                let name = object.file_name().unwrap().to_str().unwrap().to_owned();
                if !name.contains(".backup") && !name.contains('#') {
                    let bytes = fs::read(&object).unwrap();
                    let stored = StoredSegment::decode(&bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
                    found.insert(name, stored);
                }
            }
        }
        found
    }
}

fn read_dir(dir: &Path) -> Vec<PathBuf> {
    if !dir.is_dir() {
        return Vec::new();
    }
    let mut paths: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    paths
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
        let mut cluster = site.create(site.builder("db").segment_mb(mb));
        cluster.start();
        cluster.pgbench_init(4);
        cluster.pgbench(&["-c", "4", "-j", "2", "-T", seconds]);
        let backup = cluster.base_backup("base", &["-X", "none"]);
        assert!(backup.join("PG_VERSION").exists());
        let last = cluster.archive_all();
        let statistics = cluster.query("select archived_count, failed_count from pg_stat_archiver");
        assert!(statistics.ends_with("|0"), "{statistics}\n{}", cluster.log_tail());
        let stored = site.stored(&cluster);
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
        let notes: Vec<_> = read_dir(&site.archive.join(site.layout(&cluster).wal()).join("00000001"))
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
        let mut cluster = site.builder("db").create();
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
    let stored = &lab.site.stored(&lab.cluster)[name];
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
    let stored = &lab.site.stored(&lab.cluster)[name];
    assert_eq!(stored.index.info.ending, Ending::Fault);
    assert_eq!(stored.index.faults[0].message, "it has 100000 bytes, a segment has 1048576");
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
