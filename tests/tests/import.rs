//! Base backups that pg_basebackup made become backups of the archive, or are refused for a reason.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use waltide_archiver::engines::postgres::import::{ImportRequest, import};
use waltide_format::archive::Layout;
use waltide_storage::{Archive, ArchiveUrl, Faults, NoProgress};
use waltide_tests::site::{read_dir, text};
use waltide_tests::stored::Stored;
use waltide_tests::workload::Journal;
use waltide_tests::{Cluster, Output, Site, StopMode};

/// What these tests do with an archive.
trait Imports {
    fn import(&self, dir: &Path, more: &[&str]) -> serde_json::Value;
    fn refused(&self, dir: &Path, more: &[&str]) -> Output;
}

impl Imports for Site {
    #[track_caller]
    fn import(&self, dir: &Path, more: &[&str]) -> serde_json::Value {
        self.waltide.json([&["import", dir.to_str().unwrap()], more].concat())
    }

    #[track_caller]
    fn refused(&self, dir: &Path, more: &[&str]) -> Output {
        self.waltide.fails(1, [&["import", dir.to_str().unwrap()], more].concat())
    }
}

/// A copy of a base backup that something was done to.
fn spoiled(site: &Site, from: &Path, spoil: &dyn Fn(&Path)) -> PathBuf {
    let dir = site.scratch.copy_tree(from, text(&site.scratch.fresh_path("bad")));
    spoil(&dir);
    dir
}

#[test]
fn every_form_of_a_base_backup_comes_back_as_the_database_was() {
    comes_back(
        "import-forms",
        &[
            ("plain", &["-X", "stream"]),
            ("recovering", &["-X", "fetch", "-R"]),
            ("tar", &["-Ft", "-X", "stream"]),
            ("tar-fetch", &["-Ft", "-X", "fetch", "--manifest-checksums=SHA256"]),
            ("unchecked", &["-X", "none", "--manifest-checksums=NONE"]),
        ],
    );
}

#[test]
fn every_compression_of_a_base_backup_comes_back_as_the_database_was() {
    comes_back(
        "import-compressed",
        &[
            ("gzip", &["-Ft", "-z", "-X", "stream"]),
            ("lz4", &["-Ft", "--compress=client-lz4", "-X", "stream", "--manifest-checksums=SHA512"]),
            ("zstd", &["-Ft", "--compress=client-zstd", "-X", "fetch", "-R"]),
            ("server-gzip", &["-Ft", "--compress=server-gzip", "-X", "fetch"]),
            ("server-lz4", &["-Ft", "--compress=server-lz4", "-X", "none", "--manifest-checksums=NONE"]),
            ("server-zstd", &["-Ft", "--compress=server-zstd:workers=2", "-X", "stream"]),
        ],
    );
}

/// Takes base backups of these names and arguments under load, imports and restores each, and compares the databases.
#[track_caller]
fn comes_back(label: &str, forms: &[(&str, &[&str])]) {
    let site = Site::new(label);
    let cluster = site.start_db(|b| b);
    let stored = Stored::of(&cluster, &site.archive);
    for name in ["one", "two"] {
        cluster.create_tablespace(name);
    }
    cluster.pgbench_init(2);
    cluster.query(
        "create table here (id bigserial, filler text) tablespace one;
         create unlogged table volatile (id bigserial) tablespace two",
    );
    let mut journal = Journal::create(&cluster);
    journal.steps_on(&cluster, 3);
    let load = cluster.pgbench_background(&["-c", "2", "-T", "60"]);
    let mut taken = Vec::new();
    for (name, args) in forms {
        taken.push((*name, cluster.base_backup(name, args)));
        journal.step(&cluster, name);
    }
    load.terminate();
    cluster.archive_all();
    let balance = "select sum(abalance), (select count(*) from pgbench_history) from pgbench_accounts";
    let expected = cluster.query(balance);
    for (name, dir) in taken {
        let answer = site.import(&dir, &["--description", name]);
        assert_eq!(
            (&answer["description"], &answer["damaged_pages"]),
            (&name.into(), &serde_json::json!([]))
        );
        assert_eq!(answer["tablespaces"].as_array().unwrap().len(), 2, "{answer}");
        let mut restored = site.materialised(&stored, &answer, &format!("{name}-restored"));
        journal.assert_exactly_up_to(&restored, journal.len());
        assert_eq!(restored.query(balance), expected, "{name}");
        restored.stop(StopMode::Fast);
    }
    let list = site.waltide.json(["list"]);
    let list = list.as_array().unwrap();
    assert!(
        list.len() == forms.len() && list.iter().all(|b| b["restorable"] == true && b["method"] == "import"),
        "{list:?}"
    );
}

#[test]
fn a_backup_brings_its_own_wal_along() {
    let site = Site::new("import-wal");
    let mut cluster = site.start_db(|b| b.archive_command("false"));
    let mut journal = Journal::create(&cluster);
    journal.steps_on(&cluster, 3);
    let stored = Stored::of(&cluster, &site.archive);
    let bare = cluster.base_backup("bare", &["-X", "stream", "--no-manifest"]);
    let tar = cluster.base_backup("tar", &["-Ft", "-X", "stream"]);
    journal.steps_on(&cluster, 3);
    let gzip = cluster.base_backup("gzip", &["-Ft", "-z", "-X", "stream"]);
    journal.steps_on(&cluster, 2);
    let fetched = cluster.base_backup("fetched", &["-Ft", "--compress=lz4", "-X", "fetch"]);
    journal.steps_on(&cluster, 1);
    let plain = cluster.base_backup("plain", &["-X", "stream"]);
    let standby = cluster.make_standby("standby");
    standby.wait_caught_up(&cluster);

    let refused = site.refused(&bare, &["--no-manifest"]);
    assert!(refused.stderr.contains(".backup is not in the archive"), "{refused:?}");
    let answers = [tar, gzip, fetched, plain].map(|dir| site.import(&dir, &[]));
    for (answer, rows) in answers.iter().zip([3, 6, 8, 9]) {
        let restored = site.materialised(&stored, answer, &format!("restored-{rows}"));
        journal.assert_exactly_up_to(&restored, rows);
    }
    // A site that moves over: from here on the server ships itself, its backlog first.
    cluster.set("archive_command", &site.waltide.archive_command());
    cluster.reload();
    journal.steps_on(&cluster, 3);
    let of_standby = standby.base_backup("of-standby", &["-X", "stream"]);
    cluster.archive_all();
    let from_standby = site.import(&of_standby, &["--archive-timeout", "60"]);
    assert_eq!(from_standby["from_standby"], true);
    let bare = site.import(&bare, &["--no-manifest"]);
    for (n, answer) in [&answers[0], &bare, &from_standby].into_iter().enumerate() {
        let restored = site.materialised(&stored, answer, &format!("later-{n}"));
        journal.assert_exactly_up_to(&restored, 12);
    }
    cluster.stop(StopMode::Fast);
}

#[test]
fn a_database_that_is_moved_under_pg_basebackup_makes_its_backup_none() {
    let site = Site::new("import-moved");
    let cluster = site.start_db(|b| b);
    for space in ["one", "two"] {
        cluster.create_tablespace(space);
    }
    cluster.query("create database moving");
    // Tablespaces are sent before everything else, and this one for so long that the database is gone by then.
    cluster.query("create table large tablespace two as select n, repeat(md5(n::text), 4) from generate_series(1, 80000) n");
    assert!(cluster.query("select pg_relation_size('large')").parse::<u64>().unwrap() > 12 << 20);
    let taken = std::thread::scope(|scope| {
        let backup = scope.spawn(|| cluster.base_backup("taken", &["-X", "none", "--max-rate", "4M"]));
        cluster
            .wait_until("select count(*) = 1 from pg_stat_progress_basebackup where phase like 'streaming%'");
        cluster.query("alter database moving set tablespace one");
        backup.join().unwrap()
    });
    cluster.archive_all();
    let refused = site.refused(&taken, &[]);
    assert!(refused.stderr.contains("take another backup, while no database is moved"), "{refused:?}");
    assert_eq!(site.waltide.json(["list"]).as_array().unwrap().len(), 0);

    // What it would have come to: PostgreSQL recovers it without a complaint.
    fs::write(taken.join("recovery.signal"), "").unwrap();
    let mut recovered = Cluster::with_data_dir("recovered", &site.scratch, &taken);
    recovered.set("restore_command", &site.waltide.restore_command());
    recovered.set("archive_mode", "off");
    recovered.start();
    recovered.wait_promoted();
    assert_eq!(recovered.query("select count(*) from pg_database where datname = 'moving'"), "1");
    let gone = recovered.sql("moving", "select 1").unwrap_err();
    assert!(gone.to_string().contains("is not a valid data directory"), "{gone}");
}

#[test]
fn a_backup_that_is_not_what_its_manifest_says_is_refused() {
    let site = Site::new("import-refused");
    let cluster = site.start_db(|b| b);
    cluster.query("create table t as select generate_series(1, 10000) as id");
    let file = cluster.query("select pg_relation_filepath('t')");
    let good = cluster.base_backup("good", &["-X", "stream"]);
    let tar = cluster.base_backup("tar", &["-Ft", "-X", "stream"]);
    let write = |path: &Path, bytes: &[u8], at: u64| {
        fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
    };
    let cases: [(PathBuf, String); 8] = [
        (
            spoiled(&site, &good, &|dir| write(&dir.join(&file), b"x", 5000)),
            format!("{file} has the CRC32C checksum "),
        ),
        (
            spoiled(&site, &good, &|dir| write(&dir.join(&file), b"x", 10 << 20)),
            format!("{file} has 10485761 bytes, backup_manifest says "),
        ),
        (
            spoiled(&site, &good, &|dir| fs::remove_file(dir.join(&file)).unwrap()),
            format!("{file} is missing from the backup"),
        ),
        (
            spoiled(&site, &good, &|dir| {
                drop(site.scratch.file(dir.join("base/1/99999").to_str().unwrap(), "x"))
            }),
            "base/1/99999 is in the backup's directory, and backup_manifest does not list it".to_owned(),
        ),
        (
            spoiled(&site, &good, &|dir| write(&dir.join("backup_label"), b"X", 100)),
            "backup_label has the CRC32C checksum ".to_owned(),
        ),
        (
            spoiled(&site, &good, &|dir| write(&dir.join("backup_manifest"), b"4", 150)),
            "backup_manifest cannot be used: ".to_owned(),
        ),
        (
            spoiled(&site, &good, &|dir| fs::remove_file(dir.join("backup_manifest")).unwrap()),
            "has no backup_manifest, so nothing says that it is whole".to_owned(),
        ),
        (spoiled(&site, &tar, &|dir| write(&dir.join("base.tar"), &[9; 2048], 10 << 20)), "".to_owned()),
    ];
    for (dir, expected) in cases {
        let refused = site.refused(&dir, &[]);
        assert!(refused.stderr.contains(&expected), "{expected}: {refused:?}");
    }
    let nothing = site.refused(&site.scratch.dir("nothing"), &[]);
    assert!(nothing.stderr.contains("holds no base backup"), "{nothing:?}");

    let other = Cluster::builder("other").scratch(&site.scratch).start();
    let others = other.base_backup("others", &["-X", "stream"]);
    let refused = site.refused(&others, &[]);
    assert!(
        refused.stderr.contains("cluster main of") && refused.stderr.contains("has no system"),
        "{refused:?}"
    );

    let cut = spoiled(&site, &tar, &|dir| {
        let base = fs::OpenOptions::new().write(true).open(dir.join("base.tar")).unwrap();
        base.set_len(base.metadata().unwrap().len() / 2).unwrap();
    });
    site.refused(&cut, &[]);
    let stored = Stored::of(&cluster, &site.archive);
    assert_eq!(stored.backups().0, []);
    site.import(&good, &[]);
    assert_eq!(stored.backups().0.len(), 1);
}

#[test]
fn a_compressed_backup_that_is_not_whole_is_refused() {
    let site = Site::new("import-cut");
    let cluster = site.start_db(|b| b);
    cluster.create_tablespace("space");
    cluster.query(
        "create table t tablespace space as select id, md5(id::text) from generate_series(1, 50000) id",
    );
    let stored = Stored::of(&cluster, &site.archive);
    let mut good = Vec::new();
    for (method, name) in [("gzip", "gzip"), ("lz4", "LZ4"), ("zstd", "zstd")] {
        let from = cluster.base_backup(method, &["-Ft", &format!("--compress={method}"), "-X", "fetch"]);
        let tars: Vec<_> =
            read_dir(&from).into_iter().filter(|p| p.to_str().unwrap().contains(".tar.")).collect();
        assert_eq!(tars.len(), 2, "the data directory and the tablespace: {tars:?}");
        for tar in &tars {
            let file = tar.file_name().unwrap();
            let length = fs::metadata(tar).unwrap().len();
            let open = |dir: &Path| fs::OpenOptions::new().write(true).open(dir.join(file)).unwrap();
            for cut in [0, 10, length / 2, length - 1] {
                let dir = spoiled(&site, &from, &|dir| open(dir).set_len(cut).unwrap());
                let refused = site.refused(&dir, &[]);
                for expected in [
                    format!("cannot read {}", dir.join(file).display()),
                    format!("its {name} stream is cut short at byte {cut}"),
                    "hint: copy the file anew from where it was made".to_owned(),
                ] {
                    assert!(refused.stderr.contains(&expected), "{expected}: {refused:?}");
                }
            }
            // The stream does not always tell, backup_manifest does.
            let dir = spoiled(&site, &from, &|dir| open(dir).write_all_at(&[0xA5; 64], length / 2).unwrap());
            let refused = site.refused(&dir, &[]);
            let told =
                [format!("cannot read {}", dir.join(file).display()), "backup_manifest says".to_owned()];
            assert!(told.iter().any(|told| refused.stderr.contains(told)), "{refused:?}");
        }
        let twice =
            spoiled(&site, &from, &|dir| drop(fs::copy(&tars[0], dir.join(tars[0].file_stem().unwrap()))));
        let refused = site.refused(&twice, &[]);
        assert!(refused.stderr.contains("are the same part of a base backup"), "{refused:?}");
        good.push(from);
    }
    assert_eq!(stored.backups().0, []);
    assert_eq!(site.waltide.json(["list"]), serde_json::json!([]));
    for dir in &good {
        site.import(dir, &[]);
    }
    assert_eq!(stored.backups().0.len(), 3);
}

#[test]
fn whatever_call_of_the_storage_fails_a_compressed_backup_is_whole_or_not_there() {
    let site = Site::new("import-faults");
    let cluster = site.start_db(|b| b.archive_command("false"));
    cluster.pgbench_init(3);
    let dir = cluster.base_backup("zstd", &["-Ft", "--compress=zstd", "-X", "fetch"]);
    let stored = Stored::of(&cluster, &site.archive);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let url: ArchiveUrl = site.archive.to_str().unwrap().parse().unwrap();
    let archive = runtime.block_on(Archive::open(&url)).unwrap();
    let mut failures = 0;
    for (make, step) in [Faults::fail_call, Faults::torn_write, Faults::down_from].into_iter().zip([1, 2, 3])
    {
        for n in (1..).step_by(step) {
            let faults = make(n);
            let request = ImportRequest {
                archive: archive.with_faults(faults.clone()),
                layout: Layout::new("main").unwrap(),
                dir: dir.clone(),
                description: None,
                require_manifest: true,
                refuse_damaged_pages: true,
                threads: 2,
                level: 1,
                archive_timeout: Duration::ZERO,
            };
            let (before, _) = stored.backups();
            let done = runtime.block_on(import(&request, Arc::new(NoProgress)));
            let (after, _) = stored.backups();
            let new: Vec<_> = after.iter().filter(|id| !before.contains(id)).collect();
            match &done {
                Ok(backup) => assert_eq!(new, [&backup.manifest.id]),
                // The last step of all may fail behind the manifest; then the backup is there, and whole.
                Err(_) => assert!(new.len() <= 1),
            }
            for id in new {
                stored.contents(&stored.manifest(id));
            }
            failures += usize::from(done.is_err());
            if !faults.fired() {
                assert!(done.is_ok(), "{done:?}");
                break;
            }
        }
    }
    assert!(failures > 20, "{failures}");
}
