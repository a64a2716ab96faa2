//! Base backups that pg_basebackup made become backups of the archive, or are refused for a reason.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

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

#[test]
fn every_form_of_a_base_backup_comes_back_as_the_database_was() {
    let site = Site::new("import-forms");
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
    let forms: [(&str, &[&str]); 5] = [
        ("plain", &["-X", "stream"]),
        ("recovering", &["-X", "fetch", "-R"]),
        ("tar", &["-Ft", "-X", "stream"]),
        ("tar-fetch", &["-Ft", "-X", "fetch", "--manifest-checksums=SHA256"]),
        ("unchecked", &["-X", "none", "--manifest-checksums=NONE"]),
    ];
    let mut taken = Vec::new();
    for (name, args) in forms {
        taken.push((name, cluster.base_backup(name, args)));
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
        list.len() == 5 && list.iter().all(|b| b["restorable"] == true && b["method"] == "import"),
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
    let plain = cluster.base_backup("plain", &["-X", "stream"]);
    let standby = cluster.make_standby("standby");
    standby.wait_caught_up(&cluster);

    let refused = site.refused(&bare, &["--no-manifest"]);
    assert!(refused.stderr.contains(".backup is not in the archive"), "{refused:?}");
    let answers = [site.import(&tar, &[]), site.import(&plain, &[])];
    for (answer, rows) in answers.iter().zip([3, 6]) {
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
        journal.assert_exactly_up_to(&restored, 9);
    }
    cluster.stop(StopMode::Fast);
}

#[test]
fn a_backup_that_is_not_what_its_manifest_says_is_refused() {
    let site = Site::new("import-refused");
    let cluster = site.start_db(|b| b);
    cluster.query("create table t as select generate_series(1, 10000) as id");
    let file = cluster.query("select pg_relation_filepath('t')");
    let good = cluster.base_backup("good", &["-X", "stream"]);
    let tar = cluster.base_backup("tar", &["-Ft", "-X", "stream"]);
    let gz = cluster.base_backup("gz", &["-Ft", "-z", "-X", "stream"]);
    let mut number = 0;
    let mut spoiled = |from: &Path, spoil: &dyn Fn(&Path)| {
        number += 1;
        let dir = site.scratch.copy_tree(from, &format!("bad-{number}"));
        spoil(&dir);
        dir
    };
    let write = |path: &Path, bytes: &[u8], at: u64| {
        fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
    };
    let cases: [(PathBuf, String); 9] = [
        (
            spoiled(&good, &|dir| write(&dir.join(&file), b"x", 5000)),
            format!("{file} has the CRC32C checksum "),
        ),
        (
            spoiled(&good, &|dir| write(&dir.join(&file), b"x", 10 << 20)),
            format!("{file} has 10485761 bytes, backup_manifest says "),
        ),
        (
            spoiled(&good, &|dir| fs::remove_file(dir.join(&file)).unwrap()),
            format!("{file} is missing from the backup"),
        ),
        (
            spoiled(&good, &|dir| drop(site.scratch.file(dir.join("base/1/99999").to_str().unwrap(), "x"))),
            "base/1/99999 is in the backup's directory, and backup_manifest does not list it".to_owned(),
        ),
        (
            spoiled(&good, &|dir| write(&dir.join("backup_label"), b"X", 100)),
            "backup_label has the CRC32C checksum ".to_owned(),
        ),
        (
            spoiled(&good, &|dir| write(&dir.join("backup_manifest"), b"4", 150)),
            "backup_manifest cannot be used: ".to_owned(),
        ),
        (
            spoiled(&good, &|dir| fs::remove_file(dir.join("backup_manifest")).unwrap()),
            "has no backup_manifest, so nothing says that it is whole".to_owned(),
        ),
        (spoiled(&tar, &|dir| write(&dir.join("base.tar"), &[9; 2048], 10 << 20)), "".to_owned()),
        (gz, "base.tar.gz is compressed, and only plain tar archives are read".to_owned()),
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

    let cut = spoiled(&tar, &|dir| {
        let base = fs::OpenOptions::new().write(true).open(dir.join("base.tar")).unwrap();
        base.set_len(base.metadata().unwrap().len() / 2).unwrap();
    });
    site.refused(&cut, &[]);
    let stored = Stored::of(&cluster, &site.archive);
    assert_eq!(stored.backups().0, []);
    site.import(&good, &[]);
    assert_eq!(stored.backups().0.len(), 1);
}
