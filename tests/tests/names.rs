//! Tables are found by their names at the moment before they were lost, and come back with exactly their rows.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde_json::Value;
use waltide_archiver::catalog::{Known, load};
use waltide_format::TimelineId;
use waltide_format::archive::{Layout, Rates};
use waltide_replay::engines::postgres::{
    ArchivedIndexes, ArchivedNames, ReplayMode, ReplayPlan, choose_replay, find_moment, made_tablespaces,
};
use waltide_replay::log::{DatabaseMatch, Log, LogFilter, LogSink, Transaction};
use waltide_replay::{Goal, Loss, Moment, MomentRequest, Plan, TargetTimeline, plan};
use waltide_storage::{Archive, ArchiveUrl, Faults};
use waltide_tests::stored::Stored;
use waltide_tests::workload::Journal;
use waltide_tests::{Cluster, Scratch, StopMode, Waltide};

/// An archive, a cluster that ships to it, and the binaries.
struct Site {
    scratch: Scratch,
    waltide: Waltide,
    cluster: Cluster,
    journal: Journal,
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

impl Site {
    fn new(label: &str) -> Self {
        Self::made(label, |_| {})
    }

    /// One whose WAL begins with this segment.
    fn beginning(label: &str, first: &str) -> Self {
        Self::made(label, |cluster| {
            let reset = cluster.install().runner("pg_resetwal");
            reset.args(["-l", first, "-D", text(cluster.data_dir())]).run().assert_ok();
        })
    }

    fn made(label: &str, prepare: impl FnOnce(&Cluster)) -> Self {
        let scratch = Scratch::new(label);
        let waltide = Waltide::new(&scratch).archive(scratch.dir("archive")).cluster("main");
        let builder = Cluster::builder("db").scratch(&scratch).segment_mb(1);
        let builder =
            builder.setting("track_commit_timestamp", "on").setting("max_prepared_transactions", "5");
        let mut cluster = builder.archive_command(&waltide.archive_command()).create();
        prepare(&cluster);
        waltide.ok(["init", "--data-dir", text(cluster.data_dir())]);
        cluster.start();
        let journal = Journal::create(&cluster);
        Self { scratch, waltide, cluster, journal }
    }

    fn backup(&self) {
        self.waltide.ok(["backup", "--type", "full", "--data-dir", text(self.cluster.data_dir())]);
    }

    /// Does something in one transaction of a database, between two rows of the journal: its xid, and the row before.
    #[track_caller]
    fn does(&mut self, db: &str, sql: &str) -> (u64, u64) {
        let before = self.journal.step(&self.cluster, sql).id;
        let transaction = format!("begin; select pg_current_xact_id(); {sql}; commit");
        let answer = self.cluster.sql(db, &transaction).unwrap_or_else(|e| panic!("{e}"));
        self.journal.step(&self.cluster, "after it");
        (answer.lines().next().unwrap().parse().unwrap(), before)
    }

    fn sql(&self, db: &str, sql: &str) -> String {
        self.cluster.sql(db, sql).unwrap_or_else(|e| panic!("{e}"))
    }

    /// The plan for a target.
    #[track_caller]
    fn plan(&self, arguments: &[&str]) -> Value {
        let place = self.scratch.fresh_path("planned");
        // Nothing is cleared: it is where a tablespace that the WAL makes lies.
        let base = ["restore", "--dry-run", "--allow-clear", "--data-dir", text(&place)];
        self.waltide.json([&base[..], arguments].concat())["plan"].take()
    }

    #[track_caller]
    fn assert_moment(&self, arguments: &[&str], table: &str, xid: u64) -> Value {
        let plan = self.plan(arguments);
        let moment = &plan["goal"]["target"]["value"];
        assert_eq!((&moment["table"], &moment["xid"]), (&table.into(), &xid.to_string().into()), "{plan:#}");
        assert_eq!(plan["stop"]["kind"], "before");
        assert_eq!(plan["stop"]["lsn"], moment["lsn"]);
        assert_eq!(plan["stop"]["time"], moment["time"]);
        plan
    }

    /// WAL to fill so many segments with, in records that run over their edges now and then.
    fn pad(segments: u32) -> String {
        format!(
            "select count(pg_logical_emit_message(false, 'pad', repeat('x', 97003))) from generate_series(1, {})",
            segments * 11
        )
    }

    /// Merges what can be merged, and makes sure that the same is answered as before, and that the archive is whole.
    #[track_caller]
    fn assert_merging_changes_nothing(&self, asked: &[&[&str]]) {
        let everything = self.waltide.ok(["log", "--json"]).stdout;
        let all: Vec<Value> = everything.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let time = |nth: usize| all[nth]["time"].as_str().unwrap();
        let (early, late) = (time(all.len() / 3), time(all.len() * 2 / 3));
        let touched =
            |transaction: &Value| Some(transaction["relations"][0]["relation"].as_str()?.to_owned());
        let files = all.iter().skip(all.len() / 2).find_map(touched).unwrap();
        let logs: &[&[&str]] = &[
            &[],
            &["--dropped"],
            &["--truncated"],
            &["--truncated", "--since", early],
            &["--dropped", "--truncated", "--until", late],
            &["--dropped", "--relation", "public.precious"],
            &["--truncated", "--relation", "precious"],
            &["--truncated", "--relation", "counters"],
            &["--relation", "precious"],
            &["--relation", "journal", "--since", early, "--until", late],
            &["--relation", "again", "--aborted"],
            &["--relation", "pg_catalog.pg_class", "--since", late],
            &["--relation", &files],
            &["--relation", &files, "--numbers"],
            &["--relation", "1259", "--until", early],
            &["--relation", "postgres.public.many"],
            &["--database", "crm"],
            &["--database", "template"],
            &["--database", "1", "--numbers"],
            &["--database", "crm", "--relation", "orders"],
            &["--xid", all[all.len() / 2]["xid"].as_str().unwrap()],
        ];
        let answers = || {
            let place = self.scratch.join("alike");
            let base = ["restore", "--dry-run", "--allow-clear", "--data-dir", text(&place)];
            // The running server's own tablespaces lie where a restore would clear, and it makes and deletes files there.
            let plan = |arguments: &&[&str]| {
                let mut told = self.waltide.json([&base[..], arguments].concat());
                told["actions"]["deletions"].take();
                told
            };
            let plans = asked.iter().map(plan).collect::<Vec<_>>();
            let told =
                |arguments: &&[&str]| self.waltide.ok([&["log", "--json"], *arguments].concat()).stdout;
            (plans, logs.iter().map(told).collect::<Vec<_>>())
        };
        let _ = std::fs::remove_dir_all(self.merged());
        let before = answers();
        let indexed = self.waltide.json(["index"]);
        assert!(indexed["made"].as_array().unwrap().len() >= 2, "{indexed:#}");
        let after = answers();
        for (asked, (before, after)) in asked.iter().zip(before.0.iter().zip(&after.0)) {
            assert_eq!(before, after, "{asked:?}");
        }
        for (asked, (before, after)) in logs.iter().zip(before.1.iter().zip(&after.1)) {
            assert_eq!(before, after, "{asked:?}");
        }
        assert_eq!(self.waltide.json(["verify"])["faults"], serde_json::json!([]));
    }

    /// Where merged indexes lie.
    fn merged(&self) -> PathBuf {
        let stored = Stored::of(&self.cluster, &self.scratch.join("archive"));
        stored.path(&stored.names().merged())
    }

    /// The moment before a table was dropped, the plan of a restore to it and how it would replay; and how many calls of the
    /// archive that took.
    fn find(&self, table: &str) -> (Moment, (Plan, ReplayPlan), u64) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let url: ArchiveUrl = text(&self.scratch.join("archive")).parse().unwrap();
        let faults = Faults::none();
        let layout = Layout::new("main").unwrap();
        let request = MomentRequest { loss: Loss::Drop, table: table.parse().unwrap(), until: None };
        let (moment, plan) = runtime.block_on(async {
            let archive = Archive::open(&url).await.unwrap();
            let catalog = load(&archive, &layout, None, Known::Nothing, 2).await.unwrap();
            let counted = archive.with_faults(faults.clone());
            let found = find_moment(&counted, &layout, &catalog, TargetTimeline::Latest, &request).await;
            let moment = found.unwrap();
            let goal = Goal::before(moment.clone());
            let source = ArchivedIndexes::new(counted.clone());
            let source = source.with_merged(layout.system(catalog.system.system_id));
            let planned = plan(&catalog, &goal, None, Rates::default(), &source).await.unwrap();
            let made = made_tablespaces(&counted, &layout, &catalog, &planned).await.unwrap();
            assert!(made.is_empty(), "{made:?}");
            let (mode, memory) = (ReplayMode::Auto, 1 << 30);
            let replay =
                choose_replay(&counted, &layout, &catalog, &planned, mode, ReplayMode::Server, memory)
                    .await
                    .unwrap();
            (moment, (planned, ReplayPlan::from(&replay)))
        });
        (moment, plan, faults.calls())
    }

    /// What the log tells, and how many calls of the archive that took.
    fn log(&self, filter: &LogFilter) -> (Vec<String>, u64) {
        struct Told(Vec<String>);
        impl LogSink for Told {
            fn transaction(&mut self, transaction: Transaction) -> ControlFlow<()> {
                self.0.push(serde_json::to_string(&transaction).unwrap());
                ControlFlow::Continue(())
            }
            fn hole(&mut self, text: &str) {
                panic!("{text}");
            }
        }
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let url: ArchiveUrl = text(&self.scratch.join("archive")).parse().unwrap();
        let (faults, layout) = (Faults::none(), Layout::new("main").unwrap());
        let mut told = Told(Vec::new());
        runtime.block_on(async {
            let archive = Archive::open(&url).await.unwrap();
            let catalog = load(&archive, &layout, None, Known::Nothing, 2).await.unwrap();
            let counted = archive.with_faults(faults.clone());
            let (line, system) =
                (catalog.lineage(TimelineId::FIRST), layout.system(catalog.system.system_id));
            let source = ArchivedIndexes::new(counted.clone()).with_merged(system.clone());
            let mut names = ArchivedNames::new(&counted, system, &catalog, &line);
            let log = Log { catalog: &catalog, line: &line, filter, source: &source, threads: 2 };
            log.run(&mut names, &mut told).await.unwrap();
        });
        (told.0, faults.calls())
    }

    /// Restores to a target and starts the server.
    #[track_caller]
    fn restored(&self, name: &str, arguments: &[&str]) -> Cluster {
        let data_dir = self.scratch.fresh_path(name);
        let base = ["restore", "--archive-mode", "off", "--data-dir", text(&data_dir)];
        self.waltide.ok([&base[..], arguments].concat());
        let mut cluster = Cluster::with_data_dir(name, &self.scratch, &data_dir);
        cluster.start();
        cluster.wait_promoted();
        cluster
    }
}

#[test]
fn what_was_lost_is_found_by_name_and_comes_back_with_its_rows() {
    let mut site = Site::new("names-lost");
    site.sql("postgres", "create table orders as select i, i * 7 as v from generate_series(1, 900) i");
    site.sql("postgres", "create table counters as select i from generate_series(1, 50) i");
    site.sql(
        "postgres",
        "create schema app; create table app.a as select 1 as x; create table app.b as select 2 as x",
    );
    site.sql("postgres", "create database crm");
    site.sql("crm", "create table orders as select i from generate_series(1, 20) i");
    site.backup();

    site.sql("postgres", "insert into orders select i, i from generate_series(1000, 1100) i");
    let orders = site.sql("postgres", "select count(*), sum(v) from orders");
    let (dropped, before_dropped) = site.does("postgres", "drop table orders");
    site.sql("postgres", "delete from counters where i % 2 = 0");
    let (truncated, before_truncated) = site.does("postgres", "truncate counters");
    site.sql("postgres", "insert into counters values (1)");
    let (schema, _) = site.does("postgres", "drop schema app cascade");
    // What is made after the backup, renamed, rewritten, dropped, and made again.
    site.sql(
        "postgres",
        "create schema \"New One\"; create table \"New One\".\"Mixed.Case\" as select 1 as x",
    );
    site.sql("postgres", "alter table \"New One\".\"Mixed.Case\" add y int default random()");
    site.sql("postgres", "vacuum full \"New One\".\"Mixed.Case\"");
    site.sql("postgres", "alter table \"New One\".\"Mixed.Case\" rename to second");
    let (renamed, _) = site.does("postgres", "drop table \"New One\".second");
    site.sql("postgres", "create table again as select 1 as x");
    let (first, _) = site.does("postgres", "savepoint a; drop table again; release a");
    let between = site.journal.step(&site.cluster, "between the two").committed_at;
    site.sql("postgres", "create table again as select 2 as x");
    site.sql("postgres", "begin; drop table again; rollback");
    site.sql(
        "postgres",
        "begin; savepoint a; drop table again; rollback to a; insert into again values (3); commit",
    );
    let (second, _) = site.does("postgres", "drop table again");
    // Not in a transaction block.
    let before_database = site.journal.step(&site.cluster, "before the database goes").id;
    site.sql("postgres", "drop database crm");
    site.journal.step(&site.cluster, "after it");
    site.cluster.archive_all();

    let orders_name = "postgres.public.orders";
    let plan = site.assert_moment(&["--before-drop", orders_name], orders_name, dropped);
    let lost = &plan["lost"];
    assert!(lost["transactions"].as_u64().unwrap() > 15, "{lost:#}");
    assert!(lost["first_time"].as_str() <= lost["last_time"].as_str());
    site.assert_moment(&["--before-truncate", "COUNTERS"], "postgres.public.counters", truncated);
    let plan = site.assert_moment(&["--before-drop", "app.b"], "postgres.app.b", schema);
    assert_eq!(plan["goal"]["target"]["value"]["also"], serde_json::json!(["postgres.app.a"]));
    site.assert_moment(&["--before-drop", "\"New One\".second"], "postgres.\"New One\".second", renamed);
    let plan = site.assert_moment(&["--before-drop", "again"], "postgres.public.again", second);
    let others = &plan["goal"]["target"]["value"]["others"];
    assert_eq!((others.as_array().unwrap().len(), &others[0]["xid"]), (1, &first.to_string().into()));
    site.assert_moment(&["--before-drop", "again", "--until", &between], "postgres.public.again", first);
    let plan = site.plan(&["--before-drop", "crm.public.orders"]);
    assert_eq!(plan["goal"]["target"]["value"]["with_database"], true, "{plan:#}");
    assert!(plan["stop"]["xid"].is_null(), "it begins before the transaction's end");

    let refused = |status, arguments: &[&str]| {
        let all = [&["restore", "--data-dir", "/nonexistent/dir"][..], arguments].concat();
        site.waltide.fails(status, all).stderr
    };
    let several = refused(2, &["--before-drop", "public.orders", "--until", "2099-01-01 00:00Z"]);
    assert!(
        several.contains("postgres.public.orders, by transaction") && several.contains("crm.public.orders"),
        "{several}"
    );
    let former = refused(1, &["--before-drop", "\"Mixed.Case\""]);
    assert!(
        former.contains("\"Mixed.Case\" was renamed to postgres.\"New One\".second by transaction"),
        "{former}"
    );
    assert!(former.contains("searched: "), "{former}");
    let rewritten = refused(1, &["--before-truncate", "second"]);
    assert!(rewritten.contains("does not say that a table second was truncated"), "{rewritten}");
    let alike = refused(1, &["--before-drop", "agian"]);
    assert!(alike.contains("dropped under a name like it: postgres.public.again"), "{alike}");
    let there = refused(1, &["--before-drop", "journal"]);
    assert!(there.contains("postgres.public.journal is there where the archived WAL ends"), "{there}");
    assert!(refused(2, &["--before-drop", "a.b.c.d"]).contains("names no table"));
    assert!(refused(2, &["--until", "2099-01-01 00:00Z"]).contains("--until goes with --before-drop"));

    site.sql("postgres", &Site::pad(32));
    site.cluster.archive_all();
    site.assert_merging_changes_nothing(&[
        &["--before-drop", orders_name],
        &["--before-truncate", "COUNTERS"],
        &["--before-drop", "app.b"],
        &["--before-drop", "\"New One\".second"],
        &["--before-drop", "again"],
        &["--before-drop", "again", "--until", &between],
        &["--before-drop", "crm.public.orders"],
    ]);
    assert_eq!(refused(1, &["--before-drop", "\"Mixed.Case\""]).lines().next(), former.lines().next());

    let mut cluster = site.restored("dropped", &["--before-drop", "postgres.public.orders"]);
    assert_eq!(cluster.query("select count(*), sum(v) from orders"), orders);
    site.journal.assert_exactly_up_to(&cluster, before_dropped);
    cluster.stop(StopMode::Fast);
    let mut cluster = site.restored("truncated", &["--before-truncate", "counters"]);
    assert_eq!(cluster.query("select count(*) from counters"), "25");
    site.journal.assert_exactly_up_to(&cluster, before_truncated);
    cluster.stop(StopMode::Fast);
    let mut cluster = site.restored("database", &["--before-drop", "crm.public.orders"]);
    assert_eq!(cluster.sql("crm", "select count(*) from orders").unwrap(), "20");
    site.journal.assert_exactly_up_to(&cluster, before_database);
    cluster.stop(StopMode::Fast);
}

#[test]
fn names_are_followed_where_catalogues_move_and_databases_are_copied() {
    let mut site = Site::new("names-moved");
    site.sql("postgres", "vacuum full pg_namespace");
    site.sql("postgres", "create database template");
    site.sql("template", "create schema s; create table s.t as select i from generate_series(1, 30) i");
    site.sql("template", "vacuum full pg_class");
    site.sql("postgres", "create table precious as select i from generate_series(1, 40) i");
    site.sql("postgres", "create table parent (i int) partition by range (i)");
    site.sql("postgres", "create table part_1 partition of parent for values from (0) to (10)");
    site.backup();

    site.sql("postgres", "create schema late; create table late.t as select i from generate_series(1, 60) i");
    site.sql("postgres", "vacuum full pg_class");
    site.sql("postgres", "vacuum full pg_namespace");
    site.sql("postgres", "vacuum full pg_database");
    site.sql(
        "postgres",
        "create schema later; create table later.t as select 1 as x; alter schema later rename to latest",
    );
    let (late, before_late) = site.does("postgres", "drop table late.t");
    let (latest, _) = site.does("postgres", "drop table latest.t");
    let (parent, _) = site.does("postgres", "drop table parent");
    site.sql("postgres", "create database logged template template strategy wal_log");
    site.sql("postgres", "create database copied template template strategy file_copy");
    let (in_logged, _) = site.does("logged", "drop table s.t");
    site.sql("copied", "alter table s.t rename to u");
    let (in_copied, _) = site.does("copied", "drop schema s cascade");
    let (emptied, _) = site
        .does("postgres", "truncate precious; alter table precious alter i type bigint; truncate precious");
    let prepare = "begin; select pg_current_xact_id(); drop table precious; prepare transaction 'it''s gone'";
    let prepared = site.sql("postgres", prepare).parse().unwrap();
    let before_prepared = site.journal.step(&site.cluster, "while it is prepared").id;
    site.sql("postgres", "commit prepared 'it''s gone'");
    site.cluster.create_tablespace("elsewhere");
    site.sql("postgres", "alter database copied set tablespace elsewhere");
    site.sql("copied", "create table moved as select 1 as x");
    let (moved, _) = site.does("copied", "drop table moved");
    // A table that goes to another tablespace gets another file, too, and keeps its rows.
    for table in ["placed", "cut_there", "cut_apart", "cut_first"] {
        site.sql("postgres", &format!("create table {table} as select i from generate_series(1, 10) i"));
    }
    let to = |table: &str| format!("alter table {table} set tablespace elsewhere");
    site.sql("postgres", &to("placed"));
    let (cut_there, _) = site.does("postgres", &format!("{}; truncate cut_there", to("cut_there")));
    let apart = format!("{}; savepoint a; truncate cut_apart; release a", to("cut_apart"));
    let (cut_apart, _) = site.does("postgres", &apart);
    let (cut_first, _) = site.does("postgres", &format!("truncate cut_first; {}", to("cut_first")));
    site.cluster.archive_all();

    let drop = |name: &str| ["--before-drop".to_owned(), name.to_owned()];
    for (name, found, xid) in [
        ("late.t", "postgres.late.t", late),
        ("latest.t", "postgres.latest.t", latest),
        ("parent", "postgres.public.parent", parent),
        ("part_1", "postgres.public.part_1", parent),
        ("logged.s.t", "logged.s.t", in_logged),
        ("s.u", "copied.s.u", in_copied),
        ("moved", "copied.public.moved", moved),
        ("precious", "postgres.public.precious", prepared),
    ] {
        site.assert_moment(&drop(name).each_ref().map(String::as_str), found, xid);
    }
    let place = site.scratch.fresh_path("told");
    let told = site
        .waltide
        .ok(["restore", "--dry-run", "--data-dir", text(&place), "--before-drop", "precious"])
        .stdout;
    assert!(told.contains("end it with ROLLBACK PREPARED 'it''s gone'"), "{told}");
    assert!(told.contains("target    before postgres.public.precious was dropped by transaction"), "{told}");
    site.assert_moment(&["--before-truncate", "precious"], "postgres.public.precious", emptied);
    for (table, xid) in [("cut_there", cut_there), ("cut_apart", cut_apart), ("cut_first", cut_first)] {
        site.assert_moment(&["--before-truncate", table], &format!("postgres.public.{table}"), xid);
    }
    let placed = ["restore", "--data-dir", "/nonexistent/dir", "--before-truncate", "placed"];
    let placed = site.waltide.fails(1, placed).stderr;
    assert!(placed.contains("does not say that a table placed was truncated"), "{placed}");

    site.sql("postgres", &Site::pad(32));
    site.cluster.archive_all();
    let asked = ["late.t", "latest.t", "part_1", "logged.s.t", "s.u", "moved", "precious"];
    let asked = asked.map(|name| ["--before-drop", name]);
    let mut asked: Vec<&[&str]> = asked.iter().map(|arguments| &arguments[..]).collect();
    asked.push(&["--before-truncate", "precious"]);
    site.assert_merging_changes_nothing(&asked);

    let mut cluster = site.restored("late", &["--before-drop", "late.t"]);
    assert_eq!(cluster.query("select count(*) from late.t"), "60");
    site.journal.assert_exactly_up_to(&cluster, before_late);
    cluster.stop(StopMode::Fast);
    let mut cluster = site.restored("prepared", &["--before-drop", "precious"]);
    cluster.query("rollback prepared 'it''s gone'");
    assert_eq!(cluster.query("select count(*) from precious"), "0", "it was emptied before");
    site.journal.assert_exactly_up_to(&cluster, before_prepared);
    cluster.stop(StopMode::Fast);

    let scratch = site.scratch.dir("place");
    let check = "select count(*) = 60 from late.t";
    let drill = ["drill", "--scratch", text(&scratch), "--before-drop", "late.t", "--check", check];
    let answer = site.waltide.json(drill);
    let record = &answer["drills"][0];
    assert_eq!(record["verdict"], "passed", "{answer:#}");
    let target = format!("before postgres.late.t was dropped by transaction {late} of ");
    assert!(record["target"].as_str().unwrap().starts_with(&target), "{record:#}");
    let again = site.waltide.json(["drill", "--scratch", text(&scratch), "--before-drop", "precious"]);
    assert_eq!(again["verdict"], "passed", "{again:#}");
}

#[test]
fn a_partitioned_table_is_truncated_where_all_its_partitions_are() {
    // A step of 16 segments begins here, so that merged indexes come to tell of all of it.
    let mut site = Site::beginning("names-partitions", "000000010000000000000020");
    let part = |name: &str, of: &str, values: &str| {
        format!("create table {name} partition of {of} for values {values};")
    };
    site.sql("postgres", "create table sales (n int, region text) partition by list (region)");
    site.sql("postgres", &part("north", "sales", "in ('n')"));
    site.sql("postgres", "create table other_sales (n int, region text) partition by range (n)");
    site.sql("postgres", &part("low", "other_sales", "from (0) to (100)"));
    site.sql(
        "postgres",
        "create table plain (n int); create table child () inherits (plain); create index on sales (n)",
    );
    site.backup();

    // What was made, attached and moved behind the backup counts, and so does a catalogue that was moved.
    let sub = "create table south partition of sales for values in ('s', 't') partition by range (n);";
    site.sql("postgres", &format!("{sub} {}", part("south_1", "south", "from (0) to (10)")));
    site.sql("postgres", "create table south_2 (n int, region text)");
    site.sql("postgres", "alter table south attach partition south_2 for values from (10) to (20)");
    let fill =
        "insert into sales select i, 's' from generate_series(0, 19) i; insert into sales values (1, 'n')";
    site.sql("postgres", fill);
    site.sql("postgres", "insert into low values (1)");
    let (both, before_both) = site.does("postgres", "truncate sales, other_sales");
    site.sql("postgres", fill);
    let (south, _) = site.does("postgres", "truncate south");
    let (north, _) = site.does("postgres", "truncate north");
    let late = site.journal.step(&site.cluster, "before it is truncated once more").committed_at;
    site.sql("postgres", "alter table sales detach partition north");
    // That is known from the catalogue's first file alone; the step of 16 behind it is of where it was moved.
    site.sql("postgres", &Site::pad(16));
    site.sql("postgres", "vacuum full pg_inherits");
    site.sql("postgres", fill.split(';').next().unwrap());
    // All that it has left.
    let (rest, before_rest) =
        site.does("postgres", "truncate south_2; savepoint a; truncate only south_1; release a");
    site.sql("postgres", "begin; truncate sales; rollback; truncate low, child");
    site.sql("postgres", "create table empty (n int) partition by range (n); truncate empty");
    site.sql("postgres", "create table single (n int) partition by range (n)");
    site.sql("postgres", &part("single_1", "single", "from (0) to (10)"));
    site.sql("postgres", &part("single_2", "single", "from (10) to (20)"));
    let (some, _) = site.does("postgres", "truncate single_1");
    let (dropped, _) = site.does("postgres", "drop table sales");
    site.cluster.archive_all();

    let cut = |name: &'static str| ["--before-truncate", name];
    let last = site.assert_moment(&cut("sales"), "postgres.public.sales", rest);
    let moment = &last["goal"]["target"]["value"];
    let others = |value: &Value| {
        value["others"].as_array().unwrap().iter().map(|o| o["xid"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(others(moment), [serde_json::json!(both.to_string())]);
    let also = ["postgres.public.south_1", "postgres.public.south_2"];
    assert_eq!(moment["also"], serde_json::json!(also));
    let first = site.assert_moment(
        &["--before-truncate", "public.sales", "--until", &late],
        "postgres.public.sales",
        both,
    );
    let also = ["low", "north", "south_1", "south_2"].map(|t| format!("postgres.public.{t}"));
    assert_eq!(first["goal"]["target"]["value"]["also"], serde_json::json!(also));
    let middle =
        site.assert_moment(&["--before-truncate", "south", "--until", &late], "postgres.public.south", south);
    assert_eq!(others(&middle["goal"]["target"]["value"]).len(), 2);
    site.assert_moment(&cut("north"), "postgres.public.north", north);
    site.assert_moment(&["--before-drop", "sales"], "postgres.public.sales", dropped);
    let refused = |name: &str| {
        let asked = ["restore", "--data-dir", "/nonexistent/dir", "--before-truncate", name];
        site.waltide.fails(1, asked).stderr
    };
    // Its child was truncated by itself, and that partition had a sister.
    assert!(refused("plain").contains("does not say that a table plain was truncated"));
    let told = refused("single");
    let hint = "of the 2 partitions of postgres.public.single transaction ";
    assert!(told.contains(&format!("{hint}{some} of ")), "{told}");
    assert!(told.contains(" truncated 1: postgres.public.single_1; name one of them"), "{told}");
    assert!(refused("empty").contains("postgres.public.empty is there where the archived WAL ends"));

    site.sql("postgres", &Site::pad(36));
    site.cluster.archive_all();
    site.assert_merging_changes_nothing(&[
        &cut("sales"),
        &["--before-truncate", "public.sales", "--until", &late],
        &["--before-truncate", "south", "--until", &late],
        &cut("other_sales"),
        &cut("north"),
    ]);
    let hints =
        |text: &str| text.lines().filter(|l| l.starts_with("hint: ")).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(hints(&refused("single")), hints(&told));

    for (name, arguments, before, rows) in [
        ("both", &["--before-truncate", "sales", "--until", &late][..], before_both, "21"),
        ("rest", &["--before-truncate", "sales"][..], before_rest, "20"),
    ] {
        let mut cluster = site.restored(name, arguments);
        assert_eq!(cluster.query("select count(*) from sales"), rows);
        site.journal.assert_exactly_up_to(&cluster, before);
        cluster.stop(StopMode::Fast);
    }
}

#[test]
fn few_objects_are_read_to_find_a_name_in_much_wal() {
    // From where on steps of 16 segments begin, and soon one of 256.
    let mut site = Site::beginning("names-merged", "0000000100000000000000FB");
    site.sql("postgres", "create database crm");
    for table in ["gone", "slow", "cut", "again", "sub", "two", "many"] {
        site.sql("postgres", &format!("create table {table} as select generate_series(1, 100) n"));
    }
    site.backup();
    let pad = Site::pad(20);
    for _ in 0..5 {
        site.sql("postgres", &Site::pad(4));
        site.sql("postgres", "checkpoint");
    }
    let (gone, _) = site.does("postgres", "drop table gone");
    let (cut, _) = site.does("postgres", "truncate cut");
    site.sql("postgres", "drop table again; create table again as select 1 as n");
    site.sql("crm", "create schema s; create table s.t as select 1 as n");
    // Transactions that write under one merged index and end under another.
    let (slow, _) = site.does("postgres", &format!("drop table slow; {pad}"));
    let (sub, _) = site.does("postgres", &format!("savepoint a; drop table sub; release a; {pad}"));
    let prepare =
        format!("begin; select pg_current_xact_id(); drop table two; {pad}; prepare transaction 'far off'");
    let two: u64 = site.sql("postgres", &prepare).lines().next().unwrap().parse().unwrap();
    for _ in 0..5 {
        site.sql("postgres", &Site::pad(4));
        site.sql("postgres", "checkpoint");
    }
    site.sql("postgres", "commit prepared 'far off'");
    site.sql("postgres", "alter table again rename to other; alter table other rename to again");
    let (again, _) = site.does("postgres", "drop table again");
    let (in_crm, _) = site.does("crm", "drop schema s cascade");
    site.sql("postgres", "checkpoint");
    // A catalogue's rows over many edges.
    for n in 0..6 {
        let make = format!(
            "do $$ begin for i in 1..60 loop execute 'create table many_{n}_' || i || ' (n int)'; end loop; end $$"
        );
        site.sql("postgres", &make);
        site.sql("postgres", "checkpoint");
    }
    let (many, _) = site.does("postgres", "drop table many, many_0_1, many_5_60");
    site.sql("postgres", "checkpoint");
    let switch = "do $$ begin for i in 1..170 loop perform pg_logical_emit_message(false, 'p', 'x'); \
                  perform pg_switch_wal(); end loop; end $$";
    site.sql("postgres", switch);
    site.cluster.archive_all();

    let tables = [
        ("gone", "postgres.public.gone", gone),
        ("slow", "postgres.public.slow", slow),
        ("sub", "postgres.public.sub", sub),
        ("two", "postgres.public.two", two),
        ("again", "postgres.public.again", again),
        ("s.t", "crm.s.t", in_crm),
        ("many_5_60", "postgres.public.many_5_60", many),
    ];
    let plain: Vec<_> = tables.iter().map(|(table, ..)| site.find(table)).collect();
    let none = LogFilter::default;
    let relation = |name: &str| Some(name.parse().unwrap());
    let filters = [
        LogFilter { dropped: true, ..none() },
        LogFilter { truncated: true, ..none() },
        LogFilter { truncated: true, relation: relation("cut"), ..none() },
        LogFilter { dropped: true, relation: relation("crm.s.t"), ..none() },
        LogFilter { relation: relation("postgres.public.gone"), ..none() },
        LogFilter { relation: relation("two"), ..none() },
        LogFilter { database: Some(DatabaseMatch::Name("crm".into())), ..none() },
        LogFilter { xid: Some(u32::try_from(many).unwrap().into()), ..none() },
    ];
    let logs = filters.each_ref().map(|filter| site.log(filter));
    let asked: Vec<_> = tables.iter().map(|(table, ..)| ["--before-drop", table]).collect();
    let mut asked: Vec<&[&str]> = asked.iter().map(|arguments| &arguments[..]).collect();
    asked.push(&["--before-truncate", "cut"]);
    site.assert_merging_changes_nothing(&asked);
    assert!(site.merged().join("00000001/256").is_dir(), "there is a step of 256");
    site.assert_moment(&["--before-truncate", "cut"], "postgres.public.cut", cut);
    assert_eq!(plain[3].0.gid.as_deref(), Some("far off"));
    for ((table, name, xid), (moment, plan, calls)) in tables.iter().zip(&plain) {
        let (found, planned, fewer) = site.find(table);
        assert_eq!((&found.table.to_string()[..], u64::from(found.xid.get())), (*name, *xid));
        assert_eq!((&found, &planned), (moment, plan));
        // The object of 256, the segments before and behind it, those in which a transaction may have ended that wrote
        // under another step of 16, and the backup's catalogues.
        assert!(*calls > 256 && fewer < 80, "{table}: {calls} calls, {fewer} with merged indexes");
    }
    // Besides those, the WAL from where all had begun to where all had ended that may have done it: less where the
    // background writer notes the running transactions in between, as it does every 15 seconds.
    let most = [250, 250, 200, 250, 200, 250, 250, 200];
    for ((filter, most), (told, calls)) in filters.iter().zip(most).zip(logs) {
        let (found, fewer) = site.log(filter);
        assert_eq!(found, told, "{filter:?}");
        assert!(!told.is_empty(), "{filter:?}");
        assert!(fewer < most && fewer + 50 < calls, "{filter:?}: {calls} calls, {fewer} with merged indexes");
    }
}
