use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use waltide_format::archive::*;
use waltide_format::engines::postgres::cluster::ControlFile;
use waltide_storage::{Faults, NoProgress};

use super::*;
use crate::engines::postgres::ArchivedIndexes;
use crate::testing;
use crate::{Goal, Target};

const SPACE: &str = "pg_tblspc/16400";
const AUTO: &str = "work_mem = '9MB'\nrecovery_target_time = '2001-01-01'\n";

/// A backup of a few files in an archive, in two layers.
struct Site {
    dir: tempfile::TempDir,
    archive: Archive,
    layout: Layout,
    plan: Plan,
    files: BTreeMap<String, Vec<u8>>,
    pack: String,
}

fn golden_control() -> Vec<u8> {
    let packed = include_bytes!("../../../../../tests/golden/wal/15/pg_control.zst");
    zstd::bulk::decompress(packed, 1 << 16).unwrap()
}

fn pages(seed: u8, count: usize) -> Vec<u8> {
    (0..count * 8192).map(|i| (i / 8192 * 31 + i % 251) as u8 ^ seed).collect()
}

fn cluster() -> BTreeMap<String, Vec<u8>> {
    let mut holes = pages(3, 40);
    holes[8192 * 4..8192 * 34].fill(0);
    let files: [(&str, Vec<u8>); 8] = [
        ("PG_VERSION", b"15\n".to_vec()),
        ("base/5/100", pages(1, 37)),
        ("base/5/101", holes),
        ("base/5/102", Vec::new()),
        (CONTROL_FILE, golden_control()),
        ("pg_tblspc/16400/PG_15_202209061/5/200", pages(9, 3)),
        ("postgresql.auto.conf", AUTO.into()),
        ("postgresql.conf", b"port = 1\n".to_vec()),
    ];
    files.into_iter().map(|(path, bytes)| (path.to_owned(), bytes)).collect()
}

/// Packs `files`, 16 blocks a frame, and only the blocks that `wanted` says.
fn layer(
    files: &BTreeMap<String, Vec<u8>>,
    pack_name: &str,
    wanted: impl Fn(&str, usize) -> bool,
) -> (Vec<u8>, ExtentMap) {
    let mut pack = PackBuilder::default();
    let mut map = ExtentMap { packs: vec![pack_name.to_owned()], files: Vec::new() };
    for (path, bytes) in files {
        let mut extents = Vec::new();
        for (i, raw) in bytes.chunks(16 * 8192).enumerate().filter(|(i, _)| wanted(path, *i)) {
            let frame = PackBuilder::frame(raw, 1);
            let offset = pack.push(&frame);
            extents.push(Extent {
                pack: 0,
                offset,
                stored_bytes: frame.len() as u32,
                first_block: i as u32 * 16,
                raw_bytes: raw.len() as u32,
                crc: crc32fast::hash(raw),
            });
        }
        map.files.push(extents);
    }
    (pack.finish(), map)
}

async fn site() -> Site {
    let dir = tempfile::tempdir().unwrap();
    let url = dir.path().join("archive").to_str().unwrap().parse().unwrap();
    let archive = Archive::create(&url).await.unwrap();
    let layout = Layout::new("main").unwrap();
    let files = cluster();
    let system = ControlFile::decode(&files[CONTROL_FILE]).unwrap().system_id.get();
    let names = layout.system(system.into());
    let mut manifest = testing::manifest(system, 1);
    // The first layer had other bytes where the second has some.
    let mut older = files.clone();
    older.insert("base/5/100".into(), pages(77, 60));
    let (pack, map) = layer(&older, "one", |_, _| true);
    let (newer_pack, newer_map) = layer(&files, "two", |path, _| path == "base/5/100");
    for (name, bytes) in [("one", pack), ("two", newer_pack)] {
        archive.put_new(&names.pack(name), bytes.into()).await.unwrap();
    }
    for (name, map) in [("one", map), ("two", newer_map)] {
        archive.put_new(&names.map(name), map.encode().into()).await.unwrap();
    }
    manifest.maps = vec!["one".into(), "two".into()];
    manifest.files = (0..)
        .zip(&files)
        .map(|(n, (path, bytes))| ManifestFile {
            path: path.clone(),
            bytes: bytes.len() as u64,
            mode: 0o640,
            modified: 0,
            extents: vec![(0, n), (1, n)],
        })
        .collect();
    let directories = [
        "base",
        "base/5",
        "global",
        "pg_tblspc",
        SPACE,
        "pg_tblspc/16400/PG_15_202209061",
        "pg_tblspc/16400/PG_15_202209061/5",
        "pg_wal",
    ];
    manifest.directories =
        directories.map(|path| ManifestDirectory { path: path.into(), mode: 0o750 }).to_vec();
    manifest.tablespaces =
        vec![Tablespace { oid: 16400, path: dir.path().join("space").to_str().unwrap().into() }];
    manifest.backup_label = "START WAL LOCATION".into();
    manifest.start_lsn = waltide_format::Lsn::from((3 << 20) + 40);
    manifest.stop_lsn = waltide_format::Lsn::from((3 << 20) + 400);
    manifest.stats.cluster_bytes = files.values().map(|f| f.len() as u64).sum();
    archive.put_new(&names.manifest(&manifest.id), manifest.encode().into()).await.unwrap();
    let segment = SegmentEntry {
        path: "x".into(),
        stored_bytes: 1,
        info: testing::info(system, testing::segment_name(3), Ending::Full),
        restore_points: vec![],
        faults: vec![],
        digest: String::new(),
        pushed_by: None,
    };
    let catalog = Catalog {
        cluster: "main".into(),
        system: testing::system(system),
        backups: vec![BackupEntry { head: manifest, files: 8, keep: None }],
        started: vec![],
        segments: vec![segment],
        lineages: BTreeMap::new(),
        beginnings: BTreeMap::new(),
        damaged: vec![],
    };
    let goal = Goal::new(Target::Immediate);
    let source = ArchivedIndexes::new(archive.clone());
    let plan = crate::plan(&catalog, &goal, None, Rates::default(), &source).await.unwrap();
    let pack = names.pack("one");
    Site { dir, archive, layout, plan, files, pack }
}

impl Site {
    fn options(&self) -> RestoreOptions {
        RestoreOptions {
            selection: None,
            replay: Replay::Server(None),
            data_dir: self.data_dir(),
            tablespace_map: vec![],
            made: Vec::new(),
            allow_clear: false,
            delta: false,
            standby: false,
            archive_off: false,
            // A test may run as root: PostgreSQL's user is anybody then.
            owner: Some(Owner { uid: 65534, gid: 65534 }).filter(|_| rustix::process::geteuid().is_root()),
            restore_command: "waltide fetch %f %p".into(),
            settings: vec![],
            threads: 2,
            files_only: false,
        }
    }

    fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    async fn restore(&self, archive: &Archive, options: RestoreOptions) -> Result<Restored, RestoreError> {
        let restore = Restore::prepare(archive, &self.layout, &self.plan, options).await?;
        restore.carry_out(&(Arc::new(NoProgress) as Arc<dyn Progress>)).await
    }

    fn assert_whole(&self) {
        for (path, bytes) in &self.files {
            let found = fs::read(self.data_dir().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
            match path.as_str() {
                "postgresql.auto.conf" => {
                    let text = String::from_utf8(found).unwrap();
                    assert!(text.starts_with("work_mem = '9MB'\n# Written by waltide restore.\n"), "{text}");
                    assert!(text.ends_with("recovery_target = 'immediate'\n"), "{text}");
                    assert!(!text.contains("2001"), "{text}");
                }
                _ => assert!(found == *bytes, "{path}"),
            }
        }
        let there: Vec<_> = place::contents(&self.data_dir()).unwrap();
        let names: Vec<_> = there.iter().map(|d| d.path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(
            names,
            [
                "PG_VERSION",
                "backup_label",
                "base",
                "global",
                "pg_tblspc",
                "pg_wal",
                "postgresql.auto.conf",
                "postgresql.conf",
                "recovery.signal",
            ]
        );
    }
}

#[tokio::test]
async fn a_backup_comes_back_with_its_modes_links_and_holes() {
    let site = site().await;
    let restored = site.restore(&site.archive, site.options()).await.unwrap();
    site.assert_whole();
    assert_eq!(restored.files, 8);
    let data = site.data_dir();
    let mode = |path: &str| fs::metadata(data.join(path)).unwrap().permissions().mode() & 0o777;
    assert_eq!(
        [mode(""), mode("base/5"), mode("base/5/100"), mode("pg_wal/archive_status")],
        [0o750, 0o750, 0o640, 0o750]
    );
    assert_eq!(fs::read_link(data.join(SPACE)).unwrap(), site.dir.path().join("space"));
    // Thirty of its pages are zeros, and so is one of its frames as a whole.
    let sparse = fs::metadata(data.join("base/5/101")).unwrap();
    assert!(sparse.blocks() * 512 < sparse.len(), "{} of {}", sparse.blocks() * 512, sparse.len());
    if let Some(owner) = site.options().owner {
        assert_eq!(fs::metadata(data.join("base/5/100")).unwrap().uid(), owner.uid);
    }
}

#[tokio::test]
async fn whatever_call_fails_no_server_starts_on_the_rest_and_the_next_restore_takes_it_up() {
    let site = site().await;
    let (mut failures, mut n) = (0, 1);
    loop {
        let faults = Faults::fail_call(n);
        let faulty = site.archive.with_faults(faults.clone());
        let done = site.restore(&faulty, site.options()).await;
        if !faults.fired() {
            done.unwrap();
            site.assert_whole();
            break;
        }
        done.unwrap_err();
        failures += 1;
        assert!(!site.data_dir().join(CONTROL_FILE).exists(), "call {n}");
        site.restore(&site.archive, site.options()).await.unwrap_or_else(|e| panic!("after call {n}: {e}"));
        site.assert_whole();
        for made in ["data", "space"] {
            fs::remove_dir_all(site.dir.path().join(made)).unwrap();
        }
        n += 1;
    }
    assert!(failures >= 5, "manifest, two maps and two packs are read");
}

#[tokio::test]
async fn no_flipped_byte_of_a_backup_is_restored() {
    let site = site().await;
    let root = site.dir.path().join("archive");
    let names = site.layout.system(site.plan.system_id);
    for object in [site.pack.clone(), names.map("two"), names.manifest(&site.plan.backup)] {
        let path = root.join(&object);
        let whole = fs::read(&path).unwrap();
        let used =
            if object == site.pack { HEADER_BYTES..whole.len() - FOOTER_BYTES } else { 0..whole.len() };
        for at in used.clone().step_by(used.len() / 23 + 1) {
            let mut bad = whole.clone();
            bad[at] ^= 0x20;
            fs::write(&path, bad).unwrap();
            let done = site.restore(&site.archive, site.options()).await;
            match done {
                // The first layer has bytes that the second covers.
                Ok(_) => {
                    assert_eq!(object, site.pack);
                    site.assert_whole();
                }
                Err(e) => {
                    assert!(e.is_damage(), "{object} byte {at}: {e}");
                    assert!(!site.data_dir().join(CONTROL_FILE).exists());
                }
            }
            for made in ["data", "space"] {
                let _ = fs::remove_dir_all(site.dir.path().join(made));
            }
        }
        fs::write(&path, whole).unwrap();
    }
}

#[tokio::test]
async fn a_delta_writes_only_what_differs_and_removes_what_is_strange() {
    let site = site().await;
    site.restore(&site.archive, site.options()).await.unwrap();
    let data = site.data_dir();
    let unchanged = |options| async { site.restore(&site.archive, options).await.unwrap().written_bytes };
    let options = RestoreOptions { delta: true, allow_clear: true, ..site.options() };
    let small = unchanged(options.clone()).await;
    assert_eq!(small, 8192 + AUTO.len() as u64, "pg_control and the settings");
    let mut bytes = site.files["base/5/100"].clone();
    bytes[20 * 8192] ^= 1;
    bytes.extend([7; 900]);
    fs::write(data.join("base/5/100"), bytes).unwrap();
    let mut holes = site.files["base/5/101"].clone();
    holes[8192 * 20] = 1;
    fs::write(data.join("base/5/101"), holes).unwrap();
    fs::remove_file(data.join("PG_VERSION")).unwrap();
    fs::create_dir(data.join("base/6")).unwrap();
    fs::write(data.join("base/6/strange"), "x").unwrap();
    fs::write(site.dir.path().join("space/PG_15_202209061/5/strange"), "x").unwrap();
    fs::create_dir(site.dir.path().join("space/PG_14_1")).unwrap();
    fs::write(data.join("pg_wal/000000010000000000000001"), "old").unwrap();
    let restore = Restore::prepare(&site.archive, &site.layout, &site.plan, options.clone()).await.unwrap();
    let deleted: Vec<_> = restore.actions().deletions.iter().map(|d| d.path.clone()).collect();
    let wanted = [
        "data/backup_label",
        "data/base/6",
        "data/pg_wal/000000010000000000000001",
        "data/recovery.signal",
        "space/PG_15_202209061/5/strange",
    ];
    assert_eq!(deleted, wanted.map(|p| site.dir.path().join(p)));
    assert!(data.join("base/6").exists(), "a plan touches nothing");
    let written = unchanged(options).await;
    assert!(written < 3 * 16 * 8192 + small, "{written}");
    site.assert_whole();
    assert!(site.dir.path().join("space/PG_14_1").exists(), "another version's");
}

#[tokio::test]
async fn a_place_that_is_not_empty_is_left_as_it_is() {
    let site = site().await;
    fs::create_dir(site.data_dir()).unwrap();
    fs::write(site.data_dir().join("precious"), "x").unwrap();
    let err = site.restore(&site.archive, site.options()).await.unwrap_err().to_string();
    assert!(err.contains("data is not empty: precious\nhint: --allow-clear"), "{err}");
    fs::remove_dir_all(site.data_dir()).unwrap();
    fs::create_dir_all(site.dir.path().join("space/PG_15_202209061")).unwrap();
    let err = site.restore(&site.archive, site.options()).await.unwrap_err().to_string();
    assert!(err.contains("space is not empty: PG_15_202209061"), "{err}");
    assert!(!site.data_dir().exists());
    let options = RestoreOptions { allow_clear: true, ..site.options() };
    site.restore(&site.archive, options).await.unwrap();
    site.assert_whole();
}
