//! Base backups of real clusters: what is in them, what they come back as, and what an interrupted one leaves.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use waltide_archiver::engines::postgres::backup::{BackupRequest, backup};
use waltide_format::archive::{BackupKind, Layout};
use waltide_storage::{Archive, ArchiveUrl, Faults, NoProgress};
use waltide_tests::stored::Stored;
use waltide_tests::workload::Journal;
use waltide_tests::{Background, Cluster, Output, Site, StopMode};

/// What these tests do with an archive.
trait Backups {
    fn backup_args(&self, cluster: &Cluster, more: &[&str]) -> Vec<String>;
    fn backup(&self, cluster: &Cluster, more: &[&str]) -> serde_json::Value;
    fn refused(&self, cluster: &Cluster, more: &[&str]) -> Output;
    fn stored(&self, cluster: &Cluster) -> Stored;
}

impl Backups for Site {
    fn backup_args(&self, cluster: &Cluster, more: &[&str]) -> Vec<String> {
        let mut args = vec!["backup".to_owned(), "--data-dir".to_owned()];
        args.push(cluster.data_dir().display().to_string());
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        args
    }

    #[track_caller]
    fn backup(&self, cluster: &Cluster, more: &[&str]) -> serde_json::Value {
        self.waltide.json(self.backup_args(cluster, more))
    }

    #[track_caller]
    fn refused(&self, cluster: &Cluster, more: &[&str]) -> Output {
        self.waltide.fails(1, self.backup_args(cluster, more))
    }

    fn stored(&self, cluster: &Cluster) -> Stored {
        Stored::of(cluster, &self.archive)
    }
}

fn id(backup: &serde_json::Value) -> waltide_format::BackupId {
    backup["id"].as_str().unwrap().parse().unwrap()
}

/// A digest of every ordinary table that is kept, by name.
fn digests(cluster: &Cluster) -> BTreeMap<String, String> {
    let tables = cluster.query(
        "select oid::regclass from pg_class where relkind = 'r' and relpersistence = 'p'
         and relnamespace = 'public'::regnamespace order by 1",
    );
    let digest = |table: &str| {
        cluster.query(&format!("select count(*), sum(hashtextextended(t::text, 0)) from {table} t"))
    };
    tables.lines().map(|table| (table.to_owned(), digest(table))).collect()
}

/// pgbench with a script of its own, beside the test.
fn script(cluster: &Cluster, name: &str, text: &str, args: &[&str]) -> Background {
    let path = cluster.scratch().file(name, text);
    let path = path.to_str().unwrap();
    cluster.pgbench_background(&[&["-f", path, "-T", "60"], args].concat())
}

#[test]
fn a_backup_under_load_comes_back_as_the_database_was() {
    let site = Site::new("backup-load");
    let cluster = site.start_db(|b| b.setting("max_wal_size", "64MB").setting("checkpoint_timeout", "30s"));
    for name in ["fast", "slow"] {
        cluster.create_tablespace(name);
    }
    cluster.pgbench_init(5);
    cluster.query(
        "create table in_fast (id bigserial primary key, filler text) tablespace fast;
         create table in_slow (id bigserial primary key, filler text) tablespace slow;
         create unlogged table volatile (id bigserial primary key, filler text) tablespace slow;
         create unlogged table volatile_here (id int);
         insert into volatile (filler) select repeat('x', 100) from generate_series(1, 1000);
         insert into volatile_here select generate_series(1, 1000);
         create table shrinking as select generate_series(1, 100000) as id",
    );
    // Larger than the stretch that one thread takes, nearly all of it a hole.
    let sparse = fs::File::create(cluster.data_dir().join("sparse")).unwrap();
    sparse.set_len(150 << 20).unwrap();
    sparse.write_all_at(b"the end", (150 << 20) - 7).unwrap();
    site.scratch.give_tree(&cluster.data_dir().join("sparse"));

    let load = [
        cluster.pgbench_background(&["-c", "2", "-T", "60"]),
        script(
            &cluster,
            "growth.sql",
            "insert into in_fast (filler) select repeat('f', 500) from generate_series(1, 20);
             insert into in_slow (filler) select repeat('s', 500) from generate_series(1, 20);
             insert into volatile (filler) values ('v');",
            &[],
        ),
        script(
            &cluster,
            "churn.sql",
            "create table gone as select generate_series(1, 500) as id;
             drop table gone;
             truncate shrinking;
             insert into shrinking select generate_series(1, 2000);",
            &[],
        ),
    ];
    cluster.wait_until("select count(*) > 200 from in_slow");
    let mut answers: Vec<serde_json::Value> = Vec::new();
    for n in 0..3 {
        let rows = cluster.query("select count(*) from in_slow");
        answers.push(site.backup(&cluster, &["--description", &format!("number {n}"), "--threads", "3"]));
        // The load went on meanwhile.
        cluster.wait_until(&format!("select count(*) > {rows} from in_slow"));
    }
    for load in load {
        load.terminate();
    }
    cluster.archive_all();
    let expected = digests(&cluster);
    assert!(expected.contains_key("pgbench_history") && expected.contains_key("in_slow"), "{expected:?}");
    let stored = site.stored(&cluster);
    let (complete, announced) = stored.backups();
    assert_eq!(complete.iter().map(ToString::to_string).collect::<Vec<_>>().len(), 3);
    assert_eq!(announced, []);

    for (n, answer) in answers.iter().enumerate() {
        assert_eq!(answer["description"], format!("number {n}"));
        assert_eq!(answer["damaged_pages"], serde_json::json!([]), "{answer}");
        let manifest = stored.manifest(&id(answer));
        assert_eq!(manifest.tablespaces.len(), 2);
        assert!(manifest.stats.stored_bytes * 2 < manifest.stats.cluster_bytes, "{:?}", manifest.stats);
        let sparse = manifest.files.iter().find(|f| f.path == "sparse").unwrap();
        assert_eq!(sparse.bytes, 150 << 20);
        assert!(stored.contents(&manifest)["sparse"].ends_with(b"\0the end"));
    }
    for answer in [&answers[0], &answers[2]] {
        let name = format!("restored-{}", answer["id"].as_str().unwrap());
        let mut restored = site.materialised(&stored, answer, &name);
        assert_eq!(digests(&restored), expected);
        assert_eq!(
            restored.query("select (select count(*) from volatile) + (select count(*) from volatile_here)"),
            "0"
        );
        restored.stop(StopMode::Fast);
        restored
            .install()
            .runner("pg_checksums")
            .args(["--check", "-D"])
            .arg(restored.data_dir())
            .run()
            .assert_ok();
    }
}

#[test]
fn the_files_are_those_that_pg_basebackup_takes() {
    let site = Site::new("backup-files");
    let cluster = site.start_db(|b| b);
    cluster.create_tablespace("space");
    cluster.query(
        "create table t (id int) tablespace space; create unlogged table u (id int primary key);
         insert into u values (1)",
    );
    cluster.query("create database other");
    cluster.query("select pg_create_physical_replication_slot('slot', true)");
    let mut temporary = cluster
        .psql("postgres")
        .args([
            "-c",
            "create temp table passing as select generate_series(1, 1000) as id",
            "-c",
            "select pg_sleep(600)",
        ])
        .spawn(&site.scratch, "psql");
    cluster.wait_until("select count(*) = 1 from pg_class where relname = 'passing'");
    cluster.query("checkpoint");
    let answer = site.backup(&cluster, &[]);
    assert!(temporary.is_running());
    let theirs = cluster.base_backup("theirs", &["-X", "none", "--no-manifest"]);
    let stored = site.stored(&cluster);
    let manifest = stored.manifest(&id(&answer));

    let mut files = BTreeMap::new();
    let mut directories = BTreeSet::new();
    walk(&theirs, "", &mut files, &mut directories);
    for name in ["backup_label", "tablespace_map"] {
        files.remove(name);
    }
    let ours = stored.contents(&manifest);
    let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&ours), names(&files));
    let differing: Vec<_> =
        ours.iter().filter(|(path, bytes)| files[*path] != **bytes).map(|(p, _)| p).collect();
    // Their backup made a checkpoint of its own.
    assert!(differing.iter().all(|path| *path == "global/pg_control"), "{differing:?}");
    let ours: BTreeSet<_> = manifest.directories.iter().map(|d| d.path.clone()).collect();
    assert_eq!(ours, directories);
    assert!(manifest.directories.iter().all(|d| d.mode == 0o700));
    assert!(manifest.files.iter().all(|f| f.mode == 0o600), "{:?}", manifest.files);
}

fn walk(
    dir: &std::path::Path,
    at: &str,
    files: &mut BTreeMap<String, Vec<u8>>,
    directories: &mut BTreeSet<String>,
) {
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let path = if at.is_empty() { name } else { format!("{at}/{name}") };
        if fs::metadata(entry.path()).unwrap().is_dir() {
            walk(&entry.path(), &path, files, directories);
            directories.insert(path);
        } else {
            files.insert(path, fs::read(entry.path()).unwrap());
        }
    }
}

#[test]
fn a_damaged_page_is_named_and_the_backup_goes_on_unless_told_otherwise() {
    let site = Site::new("backup-damage");
    let mut cluster = site.start_db(|b| b);
    cluster.query("create table t as select generate_series(1, 10000) as id; checkpoint");
    let file = cluster.query("select pg_relation_filepath('t')");
    cluster.stop(StopMode::Fast);
    let path = cluster.data_dir().join(&file);
    let damaged = fs::OpenOptions::new().write(true).open(&path).unwrap();
    damaged.write_all_at(b"damage", 7 * 8192 + 5000).unwrap();
    // Its LSN lies in the future: it was not written by this server.
    damaged.write_all_at(&[0xFF; 8], 9 * 8192).unwrap();
    // A page with no header that is not all zeros was never written by any.
    damaged.write_all_at(&[0; 24], 11 * 8192).unwrap();
    // A new page is as it should be.
    damaged.write_all_at(&[0; 8192], 13 * 8192).unwrap();
    cluster.start();

    let refused = site.refused(&cluster, &["--damaged-pages", "refuse"]);
    let expected = format!("3 pages do not have their checksum, the first is {file}:7");
    assert!(refused.stderr.contains(&expected), "{refused:?}");
    let stored = site.stored(&cluster);
    assert_eq!(stored.backups().0, []);

    let answer = site.backup(&cluster, &[]);
    let named: Vec<String> = [7, 9, 11].iter().map(|block| format!("{file}:{block}")).collect();
    assert_eq!(answer["damaged_pages"], serde_json::json!(named));
    let warned = site.waltide.ok(site.backup_args(&cluster, &[]));
    let expected = format!("3 damaged pages are in the backup as they are on disk: {}", named.join(", "));
    assert!(warned.stderr.contains(&expected), "{warned:?}");
    // They are taken as they are.
    let contents = stored.contents(&stored.manifest(&id(&answer)));
    assert!(contents[&file] == fs::read(&path).unwrap());
}

#[test]
fn a_connection_to_another_server_is_refused() {
    let site = Site::new("backup-other");
    let mut cluster = site.start_db(|b| b);
    let other = Cluster::builder("other").scratch(&site.scratch).start();
    let standby = cluster.make_standby("standby");
    let directory = cluster.data_dir().display().to_string();
    let refused = site.refused(&cluster, &["--connection", &other.connection()]);
    assert!(
        refused.stderr.contains(&format!(
            "the connection is not to the server of {directory}: its system identifier is "
        )),
        "{refused:?}"
    );
    let refused = site.refused(&cluster, &["--connection", &standby.connection()]);
    assert!(refused.stderr.contains("its postmaster.pid is not the one in the directory"), "{refused:?}");

    // So is it for a role that may not read files, and has to believe.
    cluster.query(
        "create role keeper login; grant execute on function pg_backup_start, pg_backup_stop to keeper;
         grant pg_read_all_settings to keeper",
    );
    standby.wait_caught_up(&cluster);
    let keeper = |cluster: &Cluster| cluster.connection().replace("user=postgres", "user=keeper");
    let refused = site.refused(&cluster, &["--connection", &keeper(&standby)]);
    assert!(refused.stderr.contains("its data_directory is "), "{refused:?}");
    site.backup(&cluster, &["--connection", &keeper(&cluster)]);

    let unknown = site.waltide.fails(1, ["backup", "--data-dir", other.data_dir().to_str().unwrap()]);
    assert!(unknown.stderr.contains("waltide init --data-dir DIR makes it"), "{unknown:?}");
    cluster.stop(StopMode::Fast);
    let stopped = site.refused(&cluster, &[]);
    assert!(stopped.stderr.contains(&format!("no server runs on {directory}")), "{stopped:?}");
}

#[test]
fn configuration_that_lies_elsewhere_is_taken_along() {
    let site = Site::new("backup-config");
    let mut cluster = site.start_db(|b| b);
    cluster.stop(StopMode::Fast);
    // As pg_createcluster puts it: nothing in the data directory, and a directory of pieces.
    let etc = site.scratch.dir("etc");
    let data = cluster.data_dir().to_owned();
    for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
        fs::rename(data.join(name), etc.join(name)).unwrap();
    }
    fs::create_dir(etc.join("conf.d")).unwrap();
    fs::write(etc.join("conf.d/mine.conf"), "work_mem = '5MB'\n").unwrap();
    let text = fs::read_to_string(etc.join("postgresql.conf")).unwrap();
    let text = format!(
        "{text}\ndata_directory = '{}'\nhba_file = '{1}/pg_hba.conf'\nident_file = '{1}/pg_ident.conf'\ninclude_dir = 'conf.d'\n",
        data.display(),
        etc.display()
    );
    fs::write(etc.join("postgresql.conf"), &text).unwrap();
    site.scratch.give_tree(&etc);
    let _server = cluster
        .install()
        .runner("postgres")
        .arg("-D")
        .arg(&etc)
        .arg("-k")
        .arg(cluster.socket_dir())
        .spawn(&site.scratch, "postgres");
    cluster.wait_until("select current_setting('work_mem') = '5MB'");

    let answer = site.backup(&cluster, &[]);
    let manifest = site.stored(&cluster).manifest(&id(&answer));
    let found: Vec<_> = manifest.config_files.iter().map(|f| (f.role.as_str(), f.path.clone())).collect();
    let at = |name: &str| etc.join(name).display().to_string();
    let expected = [
        ("include", at("conf.d/mine.conf")),
        ("hba_file", at("pg_hba.conf")),
        ("ident_file", at("pg_ident.conf")),
        ("config_file", at("postgresql.conf")),
    ];
    assert_eq!(found, expected);
    assert_eq!(manifest.config_files[3].contents, text);
    assert!(manifest.files.iter().all(|f| f.path != "postgresql.conf"));
}

#[test]
fn a_standby_can_be_backed_up() {
    let site = Site::new("backup-standby");
    let cluster = site.start_db(|b| b);
    let mut journal = Journal::create(&cluster);
    journal.steps_on(&cluster, 5);
    let standby = cluster.make_standby("standby");
    // It begins with a checkpoint of the primary's in a segment that nothing has ended yet.
    journal.step(&cluster, "on both");
    cluster.query("checkpoint");
    standby.wait_caught_up(&cluster);
    let late = site.refused(&standby, &["--archive-timeout", "1"]);
    assert!(late.stderr.contains("a standby cannot end a segment"), "{late:?}");
    assert!(late.stderr.contains("which has not reached the archive in 1 s"), "{late:?}");
    let stored = site.stored(&cluster);
    assert_eq!(stored.backups().0, []);

    let mut running = site.waltide.spawn(site.backup_args(&standby, &["--json"]));
    while running.is_running() {
        journal.step(&cluster, "while the standby is backed up");
        cluster.switch_wal();
    }
    let done = running.wait().assert_ok();
    let answer: serde_json::Value = serde_json::from_str(&done.stdout).unwrap();
    assert_eq!(answer["from_standby"], true);
    journal.steps_on(&cluster, 5);
    cluster.archive_all();
    let restored = site.materialised(&stored, &answer, "restored");
    journal.assert_exactly_up_to(&restored, journal.len());
}

#[test]
fn an_interrupted_backup_leaves_nothing_half_visible() {
    let site = Site::new("backup-kill");
    let cluster = site.start_db(|b| b);
    let stored = site.stored(&cluster);
    let started = Instant::now();
    site.backup(&cluster, &[]);
    let whole = started.elapsed();
    let rounds = 40;
    let (mut killed, mut seen) = (0, 1);
    for round in 0..rounds {
        let mut running = site.waltide.spawn(site.backup_args(&cluster, &[]));
        // Spread over the whole run, a little past its end.
        let until = Instant::now() + whole * (round + 1) / (rounds - 4);
        while running.is_running() && Instant::now() < until {
            std::hint::spin_loop();
        }
        let out = running.kill9();
        let (complete, announced) = stored.backups();
        killed += usize::from(out.status == 137);
        assert!(out.status == 137 || complete.len() == seen + 1, "{out:?}");
        seen = complete.len();
        for id in &complete {
            stored.contents(&stored.manifest(id));
        }
        assert!(announced.len() <= killed, "{announced:?}");
    }
    assert!(killed > 20, "{killed} of {rounds}");
    let (complete, announced) = stored.backups();
    let list = site.waltide.json(["list"]);
    assert_eq!(list.as_array().unwrap().len(), complete.len());
    assert!(!announced.is_empty());
    assert!(list.as_array().unwrap().iter().all(|b| b["restorable"] == true), "{list}");
    // No session of a killed backup holds the server.
    cluster.wait_until("select count(*) = 0 from pg_stat_activity where application_name = 'waltide'");
    site.backup(&cluster, &[]);
}

#[test]
fn a_failure_of_any_call_to_the_archive_leaves_nothing_half_visible() {
    let site = Site::new("backup-faults");
    let cluster = site.start_db(|b| b.segment_mb(1));
    cluster.query("create table t as select generate_series(1, 100) as id");
    let stored = site.stored(&cluster);
    let url: ArchiveUrl = site.archive.to_str().unwrap().parse().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let archive = runtime.block_on(Archive::open(&url)).unwrap();
    // What earlier attempts left behind is read by later ones: without this, each would have more calls to fail.
    let system = fs::read_dir(site.archive.join("main")).unwrap().map(|e| e.unwrap().path());
    let system = system.into_iter().find(|path| path.is_dir()).unwrap();
    let tidy = || {
        for kept in ["backups", "chunks"] {
            let _ = fs::remove_dir_all(system.join(kept));
        }
        let segments = fs::read_dir(system.join("wal/00000001")).into_iter().flatten();
        let mut segments: Vec<_> = segments.map(|e| e.unwrap().path()).collect();
        segments.sort();
        segments.truncate(segments.len().saturating_sub(4));
        segments.iter().for_each(|old| fs::remove_file(old).unwrap());
    };
    let attempt = |faults: &Faults| {
        let request = BackupRequest {
            archive: archive.with_faults(faults.clone()),
            layout: Layout::new("main").unwrap(),
            data_dir: cluster.data_dir().to_owned(),
            kind: Some(BackupKind::Full),
            cache: None,
            connection: Some(cluster.connection()),
            description: None,
            fast_checkpoint: true,
            refuse_damaged_pages: false,
            threads: 2,
            level: 1,
            archive_timeout: Duration::from_secs(60),
        };
        runtime.block_on(backup(&request, Arc::new(NoProgress)))
    };
    let mut failures = 0;
    // Every call fails once; the other ways to fail, which take as long each, are tried at some of them.
    let makes = [Faults::fail_call, Faults::lose_ack, Faults::torn_write, Faults::down_from];
    for (make, step) in makes.into_iter().zip([1, 2, 3, 5]) {
        for n in (1..).step_by(step) {
            tidy();
            let (before, _) = stored.backups();
            let faults = make(n);
            let done = attempt(&faults);
            let (after, _) = stored.backups();
            let new: Vec<_> = after.iter().filter(|id| !before.contains(id)).collect();
            match &done {
                Ok(backup) => assert_eq!(new, [&backup.manifest.id]),
                // The acknowledgement of the last step may be lost; then the backup is there, and whole.
                Err(_) => assert!(new.len() <= 1),
            }
            failures += usize::from(done.is_err());
            for id in new {
                stored.contents(&stored.manifest(id));
            }
            if !faults.fired() {
                assert!(done.is_ok(), "{done:?}");
                break;
            }
        }
    }
    assert!(failures > 20, "{failures}");
}

#[test]
fn two_backups_at_once_are_both_whole() {
    let site = Site::new("backup-two");
    let cluster = site.start_db(|b| b);
    let mut journal = Journal::create(&cluster);
    journal.steps_on(&cluster, 3);
    let args = site.backup_args(&cluster, &["--json"]);
    let running: Vec<Background> = (0..2).map(|_| site.waltide.spawn(&args)).collect();
    let answers: Vec<serde_json::Value> =
        running.into_iter().map(|r| serde_json::from_str(&r.wait().assert_ok().stdout).unwrap()).collect();
    assert_ne!(answers[0]["id"], answers[1]["id"]);
    journal.steps_on(&cluster, 3);
    cluster.archive_all();
    for (n, answer) in answers.iter().enumerate() {
        let restored = site.materialised(&site.stored(&cluster), answer, &format!("restored-{n}"));
        journal.assert_exactly_up_to(&restored, 6);
    }
}

#[test]
fn what_the_backup_waits_for_is_said() {
    let site = Site::new("backup-waits");
    let mut cluster = site.start_db(|b| b);
    cluster.set("archive_command", "false");
    cluster.reload();
    let late = site.refused(&cluster, &["--archive-timeout", "2"]);
    assert!(late.stderr.contains("archive_command fails for 0000000100000000000000"), "{late:?}");
    cluster.set("archive_mode", "off");
    cluster.restart();
    let late = site.refused(&cluster, &["--archive-timeout", "1"]);
    assert!(late.stderr.contains("archive_mode is off"), "{late:?}");
}

#[test]
fn a_backup_whose_wal_is_damaged_in_the_archive_is_none() {
    let site = Site::new("backup-bad-wal");
    let cluster = site.start_db(|b| b);
    cluster.query("create table t as select generate_series(1, 1000) as id");
    cluster.archive_all();
    // From here on every segment is changed on its way, and admitted by force.
    let place = site.scratch.dir("changed");
    let place = place.display();
    let push = site.waltide.archive_command().replace(" push %p", &format!(" push --force-admit {place}/%f"));
    let change = format!("printf XXXX | dd of={place}/%f bs=1 seek=100 conv=notrunc status=none");
    cluster.set("archive_command", &format!("cp %p {place}/%f && {change} && {push}"));
    cluster.reload();
    let refused = site.waltide.fails(3, site.backup_args(&cluster, &[]));
    assert!(refused.stderr.contains("which was admitted with a fault at "), "{refused:?}");
    assert_eq!(site.stored(&cluster).backups().0, []);
}
