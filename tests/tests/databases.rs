//! One database of a cluster restored: it is what a restore of everything makes of it, and the others can be dropped.

use serde_json::Value;
use waltide_tests::site::text;
use waltide_tests::{Cluster, Site, StopMode};

/// A cluster with databases of which one is wanted.
struct Databases {
    site: Site,
    backup: Value,
}

impl Databases {
    /// Restores into a fresh directory of that name, not started.
    #[track_caller]
    fn restore(&self, name: &str, args: &[&str]) -> (Cluster, Value) {
        let dir = self.site.scratch.fresh_path(name);
        let mut all: Vec<String> = ["restore", "--data-dir", text(&dir)].map(str::to_owned).to_vec();
        for space in self.backup["tablespaces"].as_array().unwrap() {
            let place = self.site.scratch.fresh_path(&format!("{name}-{}", space["oid"]));
            all.extend(["--tablespace-map".to_owned(), format!("{}={}", space["oid"], place.display())]);
        }
        all.extend(args.iter().map(|s| (*s).to_owned()));
        let done = self.site.waltide.json(&all);
        (Cluster::with_data_dir(name, &self.site.scratch, dir), done)
    }

    /// Refuses and leaves no directory.
    #[track_caller]
    fn refused(&self, status: i32, args: &[&str]) -> String {
        let dir = self.site.scratch.fresh_path("refused");
        let out = self.site.waltide.fails(status, [&["restore", "--data-dir", text(&dir)], args].concat());
        assert!(!dir.exists(), "{}", out.describe());
        out.stderr
    }
}

#[track_caller]
fn sql(cluster: &Cluster, database: &str, text: &str) -> String {
    cluster.sql(database, text).unwrap_or_else(|e| panic!("{database}: {e}"))
}

#[track_caller]
fn dump(cluster: &Cluster, database: &str) -> String {
    let dump = cluster.client("pg_dump").arg(database).run().assert_ok().stdout;
    // Newer ones put a word drawn by chance around it.
    dump.lines()
        .filter(|line| !line.starts_with("\\restrict ") && !line.starts_with("\\unrestrict "))
        .collect::<Vec<_>>()
        .join("\n")
}

#[track_caller]
fn assert_dumps(cluster: &Cluster, database: &str, expected: &str, what: &str) {
    let found = dump(cluster, database);
    let differs = found.lines().zip(expected.lines()).find(|(a, b)| a != b);
    assert!(
        found == expected,
        "{what} {database} is another: {differs:?}, {} and {} bytes",
        found.len(),
        expected.len()
    );
}

fn names(list: &Value) -> Vec<&str> {
    let mut names: Vec<_> = list.as_array().unwrap().iter().map(|d| d["name"].as_str().unwrap()).collect();
    names.sort_unstable();
    names
}

/// Rows and definitions change in a database; `step` tells one time from another.
#[track_caller]
fn change(cluster: &Cluster, database: &str, step: u32) {
    cluster.client("pgbench").args(["-n", "-c", "2", "-t", "100", database]).run().assert_ok();
    for text in [
        &format!("create table made_{step} as select g, md5(g::text) as a from generate_series(1, 2000) g"),
        &format!("create index on made_{step} (a)"),
        &format!("alter table pgbench_branches add column more_{step} int default {step}"),
        "delete from pgbench_accounts where aid % 11 = 3",
        "vacuum full pgbench_tellers",
        "truncate refilled",
        &format!("insert into refilled select g, {step} from generate_series(1, 500) g"),
        "select lo_from_bytea(0, convert_to(repeat('large', 1000), 'UTF8'))",
        "vacuum pgbench_accounts",
    ] {
        sql(cluster, database, text);
    }
    if step > 1 {
        sql(cluster, database, &format!("drop table if exists made_{}", step - 1));
    }
}

#[test]
fn one_database_comes_back_and_the_others_can_be_dropped() {
    let site = Site::new("databases");
    // Without checksums marking a page all-visible logs no image of it: recovery meets pages that were not restored.
    let builder = site.builder("db").segment_mb(1).checksums(false).setting("autovacuum", "off");
    let builder = builder.setting("max_prepared_transactions", "5").setting("wal_level", "logical");
    let cluster = site.start(builder);
    cluster.create_tablespace("space");
    for database in ["wanted", "other", "spare"] {
        cluster.query(&format!("create database {database}"));
        cluster.client("pgbench").args(["-i", "-q", "-I", "dtgp", "-s", "2", database]).run().assert_ok();
        sql(&cluster, database, "create table refilled (id int, n int) tablespace space");
        sql(&cluster, database, "create table quiet as select generate_series(1, 5000) as id");
    }
    sql(&cluster, "wanted", "create extension amcheck");
    for database in ["other", "spare"] {
        let ballast = "select md5(g::text) || md5((-g)::text) as a from generate_series(1, 100000) g";
        sql(&cluster, database, &format!("create table ballast as {ballast}"));
    }
    let backup = site.back_up(&cluster);
    let databases = Databases { site, backup };
    for database in ["wanted", "other", "spare"] {
        change(&cluster, database, 1);
    }
    cluster.query("create database copied template other strategy file_copy");
    cluster.query("create database logged template other strategy wal_log");
    cluster.query("create database gone; drop database gone");
    cluster.query("checkpoint");
    for database in ["wanted", "other", "copied"] {
        change(&cluster, database, 2);
        sql(&cluster, database, "vacuum quiet");
    }
    sql(&cluster, "other", "begin; insert into refilled values (0, 0); prepare transaction 'open'");
    sql(
        &cluster,
        "spare",
        "create subscription s connection 'host=/nowhere' publication p with (connect = false)",
    );
    sql(&cluster, "wanted", "insert into refilled values (-1, -1)");
    let lsn = cluster.query("select pg_current_wal_insert_lsn()");
    for database in ["wanted", "spare"] {
        change(&cluster, database, 3);
    }
    cluster.archive_all();

    let target = ["--target-lsn", &lsn];
    let (mut whole, done) = databases.restore("whole", &[&target[..], &["--archive-mode", "off"]].concat());
    let whole_bytes = done["restored"]["read_bytes"].as_u64().unwrap();
    assert_eq!(done["part"], Value::Null, "{done}");
    whole.start();
    whole.wait_promoted();
    let expected = dump(&whole, "wanted");
    assert!(expected.contains("made_2") && expected.contains("-1\t-1"));
    let logged = dump(&whole, "logged");
    let copied = dump(&whole, "copied");
    whole.stop(StopMode::Fast);

    for how in ["native", "server"] {
        let args = [&target[..], &["--replay", how, "--database", "wanted"]].concat();
        let (mut cluster, done) = databases.restore(how, &args);
        assert_eq!(done["restored"]["replayed"].is_object(), how == "native", "{done}");
        let part = &done["part"];
        assert_eq!(names(&part["restored"]), ["postgres", "template0", "template1", "wanted"], "{part}");
        assert_eq!(names(&part["absent"]), ["copied", "logged", "other", "spare"], "{part}");
        let read = done["restored"]["read_bytes"].as_u64().unwrap();
        let [most, all] = ["bytes", "whole_bytes"].map(|field| part["reads"][field].as_u64().unwrap());
        assert!(
            read <= most && most * 2 < all && read * 2 < whole_bytes,
            "{read}, {most}, {all}, {whole_bytes}"
        );
        assert!(done["actions"]["settings"].to_string().contains("[\"archive_mode\",\"off\"]"), "{done}");
        cluster.start();
        cluster.wait_promoted();
        assert!(cluster.log_text().contains("is uninitialized"), "pages were met that are not there");
        assert_dumps(&cluster, "wanted", &expected, how);
        cluster.client("pg_amcheck").args(["--heapallindexed", "wanted"]).run().assert_ok();
        for database in ["other", "spare", "copied"] {
            let refused = cluster.sql(database, "select 1").expect_err("nothing of it is there").to_string();
            assert!(refused.contains("is not a valid data directory"), "{refused}");
        }
        cluster.sql("postgres", "drop database spare").expect_err("a subscription is in it");
        cluster.query("delete from pg_subscription where subname = 's'");
        for database in ["spare", "copied", "logged"] {
            cluster.query(&format!("drop database {database}"));
        }
        // Nobody can roll back what was prepared where no session can be.
        cluster.sql("postgres", "drop database other").expect_err("a prepared transaction is open in it");
        let gid = "select transaction::text from pg_prepared_xacts where gid = 'open'";
        let xid: u32 = cluster.query(gid).parse().unwrap();
        cluster.query("checkpoint");
        cluster.stop(StopMode::Fast);
        std::fs::remove_file(cluster.data_dir().join(format!("pg_twophase/{xid:08X}"))).unwrap();
        cluster.start();
        cluster.query("drop database other");
        cluster.query("alter system reset ignore_invalid_pages");
        cluster.stop(StopMode::Fast);
        cluster.start();
        assert_eq!(cluster.query("show ignore_invalid_pages"), "off");
        assert_dumps(&cluster, "wanted", &expected, "in the end");
        cluster.query("create database another");
    }
    // Made behind the backup: out of the log alone, or out of another's files, which then come along.
    for (database, expected, along) in [("logged", &logged, false), ("copied", &copied, true)] {
        let args = [&target[..], &["--replay", "native", "--database", database]].concat();
        let (mut cluster, done) = databases.restore(database, &args);
        assert_eq!(names(&done["part"]["restored"]).contains(&"other"), along, "{done}");
        cluster.start();
        cluster.wait_promoted();
        assert_dumps(&cluster, database, expected, "made behind the backup");
    }
    refusals(&databases, &target);
}

fn refusals(databases: &Databases, target: &[&str]) {
    let with = |more: &[&'static str]| -> Vec<String> {
        target.iter().chain(more).map(|s| (*s).to_owned()).collect()
    };
    let refused = |status: i32, args: Vec<String>| {
        databases.refused(status, &args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let said = refused(1, with(&["--database", "wanted", "--database", "gone"]));
    assert!(said.contains("there is no database gone at the target, "), "{said}");
    assert!(said.contains("hint: there are ") && said.contains("spare"), "{said}");
    let said = refused(2, vec!["--database".to_owned(), "wanted".to_owned(), "--standby".to_owned()]);
    assert!(said.contains("--database restores a part of the cluster, and a standby follows all"), "{said}");
    let said = refused(2, with(&["--database", "wanted", "--delta"]));
    assert!(
        said.contains("--database leaves the files of other databases empty, and --delta keeps"),
        "{said}"
    );

    let dir = databases.site.scratch.fresh_path("dry");
    let args = with(&["--database", "wanted", "--database", "spare", "--dry-run"]);
    let mut all = vec!["restore".to_owned(), "--data-dir".to_owned(), text(&dir).to_owned()];
    for space in databases.backup["tablespaces"].as_array().unwrap() {
        let place = databases.site.scratch.fresh_path("dry-space");
        all.extend(["--tablespace-map".to_owned(), format!("{}={}", space["oid"], place.display())]);
    }
    all.extend(args);
    let dry = databases.site.waltide.ok(&all).stdout;
    for part in
        ["databases ", "wanted (", "leave out ", "other (", "read      ", "ignore_invalid_pages = 'on'"]
    {
        assert!(dry.contains(part), "{part}: {dry}");
    }
    assert!(!dir.exists());
}

#[test]
fn a_page_of_the_database_that_is_not_there_is_a_fault() {
    let site = Site::new("databases-missing");
    let builder = site.builder("db").segment_mb(1).checksums(false).setting("autovacuum", "off");
    let mut cluster = site.start(builder.setting("full_page_writes", "off"));
    for database in ["broken", "whole"] {
        cluster.query(&format!("create database {database}"));
        sql(&cluster, database, "create table t (id int, n int) with (fillfactor = 50)");
        sql(&cluster, database, "insert into t select n, 0 from generate_series(1, 1000) n");
        sql(&cluster, database, "vacuum t; checkpoint");
    }
    let file = cluster.data_dir().join(sql(&cluster, "broken", "select pg_relation_filepath('t')"));
    cluster.stop(StopMode::Fast);
    let there = std::fs::read(&file).unwrap();
    std::fs::write(&file, vec![0; there.len()]).unwrap();
    cluster.start();
    // The backup has the table's pages empty; the log behind it changes pages that are full, and has no images of them.
    site.back_up(&cluster);
    cluster.stop(StopMode::Fast);
    std::fs::write(&file, there).unwrap();
    cluster.start();
    for database in ["broken", "whole"] {
        sql(&cluster, database, "update t set n = 1 where id = 7");
    }
    cluster.archive_all();
    // The restored server listens where the old one did.
    cluster.stop(StopMode::Fast);
    for (database, status) in [("broken", 3), ("whole", 0)] {
        let dir = site.scratch.fresh_path(database);
        let args = ["restore", "--data-dir", text(&dir), "--database", database, "--start"];
        let out = site.waltide.run(args).assert_status(status);
        let said = "recovery needed a page of what was restored, which is not there: ";
        assert_eq!(out.stderr.contains(said), status == 3, "{}", out.describe());
        let stop = cluster.install().runner("pg_ctl").args(["stop", "-m", "fast", "-D", text(&dir)]);
        stop.run().assert_ok();
    }
}
