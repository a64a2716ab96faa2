//! Tables taken out of past moments: what is written holds the rows the source had, and little is read for it.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use waltide_format::archive::ExtentMap;
use waltide_tests::site::{read_dir, text};
use waltide_tests::stored::Stored;
use waltide_tests::{Cluster, Output, Site, StopMode, poll_until};

/// A site with a place for exports and what they write.
struct Exports {
    site: Site,
    place: PathBuf,
    out: PathBuf,
}

impl Exports {
    fn new(label: &str) -> Self {
        let site = Site::new(label);
        let (place, out) = (site.scratch.dir("place"), site.scratch.dir("out"));
        Self { site, place, out }
    }

    fn start(&self) -> Cluster {
        let builder = self.site.builder("db").segment_mb(4).setting("autovacuum", "off");
        self.site.start(builder.setting("max_prepared_transactions", "5").setting("wal_level", "logical"))
    }

    fn args<'a>(&'a self, output: &'a str, args: &[&'a str]) -> Vec<&'a str> {
        [&["export", "--scratch", text(&self.place), "--output", output], args].concat()
    }

    /// Exports into a file of that name; where it is and what was said.
    #[track_caller]
    fn export(&self, name: &str, args: &[&str]) -> (PathBuf, Value) {
        let path = self.out.join(name);
        let answer = self.site.waltide.json(self.args(text(&path), args));
        assert!(path.is_file());
        self.assert_clean(&answer);
        (path, answer["exported"].clone())
    }

    #[track_caller]
    fn refused(&self, status: i32, output: &str, args: &[&str]) -> String {
        let out = self.site.waltide.fails(status, self.args(output, args));
        self.assert_clean(&out.describe());
        out.stderr
    }

    #[track_caller]
    fn assert_stopped(&self, stopped: &Output) {
        assert_eq!(stopped.status, 1, "{}", stopped.describe());
        assert!(stopped.stderr.contains("the export was stopped"), "{}", stopped.describe());
        self.assert_clean(&stopped.describe());
    }

    #[track_caller]
    fn assert_clean(&self, said: &impl std::fmt::Debug) {
        assert_eq!(read_dir(&self.place), Vec::<PathBuf>::new(), "the scratch place is gone: {said:?}");
        let left: Vec<_> = read_dir(&self.out).into_iter().filter(|p| text(p).contains("/.")).collect();
        assert_eq!(left, Vec::<PathBuf>::new(), "nothing half is left: {said:?}");
    }
}

/// All rows of a table, in an order of their own.
#[track_caller]
fn rows(cluster: &Cluster, database: &str, table: &str) -> String {
    let sql = format!(
        "select count(*) || ' ' || coalesce(md5(string_agg(md5(t::text), ',' order by md5(t::text))), '') from {table} t"
    );
    cluster.sql(database, &sql).unwrap_or_else(|e| panic!("{table} of {database}: {e}"))
}

/// Loads what was exported into a new database.
#[track_caller]
fn load(cluster: &Cluster, database: &str, file: &std::path::Path, before: &str) {
    cluster.query(&format!("create database {database}"));
    cluster.sql(database, before).unwrap();
    cluster.sql_file(database, file).unwrap();
}

/// A position in the log: what is committed by now lies before it.
fn moment(cluster: &Cluster) -> String {
    cluster.query("select pg_logical_emit_message(false, 'waltide', 'before the target')");
    let lsn = cluster.query("select pg_current_wal_insert_lsn()");
    cluster.query("select pg_logical_emit_message(false, 'waltide', 'the target')");
    lsn
}

const LONG: &str = "(select string_agg(md5(g::text || n::text), '') from generate_series(1, 200) n)";

/// Tables of every kind that matters, and much that does not.
fn prepare(cluster: &Cluster) {
    for sql in [
        "create table bulk as select g, md5(random()::text) || md5(random()::text) as a, md5(random()::text) as b
             from generate_series(1, 300000) g",
        "create index on bulk (g)",
        "create table toasted (id serial primary key, long text, n int default 0)",
        "alter table toasted alter long set storage external",
        &format!("insert into toasted (long) select {LONG} from generate_series(1, 60) g"),
        "create table parts (id int, at int, note text) partition by range (at)",
        "create table parts_1 partition of parts for values from (0) to (100)",
        "create schema other",
        "create table other.parts_2 (note text, at int, id int)",
        "alter table parts attach partition other.parts_2 for values from (100) to (200)",
        "insert into parts select g, g % 200, 'row ' || g from generate_series(1, 4000) g",
        "create table rewritten (id int primary key, long text, n int)",
        "alter table rewritten alter long set storage external",
        &format!("insert into rewritten select g, {LONG}, 0 from generate_series(1, 40) g"),
        "create table refilled (id int, note text)",
        "insert into refilled select g, 'first' from generate_series(1, 2000) g",
    ] {
        cluster.query(sql);
    }
}

/// What happens to them; `step` tells one time from another.
fn change(cluster: &Cluster, step: u32) {
    for sql in [
        "update bulk set a = md5(random()::text) where g % 10 = 0",
        "vacuum full rewritten",
        &format!("update rewritten set n = {step}, long = long || 'more' where id % 3 = {step} % 3"),
        "truncate refilled",
        &format!("insert into refilled select g, 'step {step}' from generate_series(1, 1000) g"),
        &format!("insert into toasted (long, n) select {LONG}, {step} from generate_series(1000, 1010) g"),
        &format!("delete from toasted where id % 17 = {step} % 17"),
        &format!(
            "create table parts_late_{step} partition of parts for values from ({0}) to ({0} + 100)",
            200 + step * 100
        ),
        &format!(
            "insert into parts select g, {0} + g % 100, 'late' from generate_series(1, 500) g",
            200 + step * 100
        ),
        "update parts set note = note || '.' where id % 7 = 0",
        "vacuum rewritten, toasted",
    ] {
        cluster.query(sql);
    }
}

const TABLES: [&str; 4] = ["toasted", "parts", "rewritten", "refilled"];

#[test]
fn tables_are_exported_as_they_were_and_little_is_read_for_it() {
    let exports = Exports::new("export");
    let cluster = exports.start();
    prepare(&cluster);
    exports.site.back_up(&cluster);
    change(&cluster, 1);
    cluster.query("vacuum full pg_class");
    cluster.query("vacuum full pg_attribute");
    cluster.query("checkpoint");
    change(&cluster, 2);
    let lsn = moment(&cluster);
    let expected = TABLES.map(|table| rows(&cluster, "postgres", table));
    let last = cluster.query("select last_value from toasted_id_seq");
    change(&cluster, 3);
    cluster.query("drop table toasted, parts, rewritten");
    cluster.archive_all();
    for how in ["auto", "server"] {
        let named = TABLES.map(|table| ["--table", table]).concat();
        let args = [named.as_slice(), &["--target-lsn", &lsn, "--replay", how]].concat();
        let (file, exported) = exports.export(&format!("{how}.sql"), &args);
        let native = exported["restored"]["replayed"]["redo"].is_string();
        assert_eq!(native, how == "auto", "{exported:#}");
        let [read, whole] = [&exported["read_bytes"], &exported["reads"]["whole_bytes"]];
        let rounds = exported["rounds"].as_u64().unwrap();
        // Partitions are known by the server alone, and then all is read once more.
        assert_eq!(rounds, 2, "{exported:#}");
        assert!(read.as_u64().unwrap() * 5 < whole.as_u64().unwrap(), "{read} of {whole} is not little");
        let tables: Vec<_> =
            exported["tables"].as_array().unwrap().iter().map(|t| t["table"].as_str().unwrap()).collect();
        let mut written = vec!["parts_2", "parts", "parts_1", "parts_late_1", "parts_late_2"];
        written.extend(["refilled", "rewritten", "toasted"]);
        assert_eq!(tables, written, "{exported:#}");
        load(&cluster, how, &file, "create schema other");
        let found = TABLES.map(|table| rows(&cluster, how, table));
        assert_eq!(found, expected, "by {how}");
        let sequence = cluster.sql(how, "select last_value from toasted_id_seq").unwrap();
        // The log has a sequence as it will be 32 values on.
        let (sequence, last): (u64, u64) = (sequence.parse().unwrap(), last.parse().unwrap());
        assert!((last..=last + 32).contains(&sequence), "{sequence}, not {last}");
    }
    // Nothing but one table is read where nothing else is named, and the target lies before the checkpoint.
    let (file, exported) =
        exports.export("one.sql", &["--table", "public.rewritten", "--target", "immediate"]);
    assert_eq!((&exported["rounds"], &exported["restored"]["replayed"]), (&1.into(), &Value::Null));
    load(&cluster, "one", &file, "select");
    assert_eq!(cluster.sql("one", "select count(*), max(n) from rewritten").unwrap(), "40|0");

    let (file, exported) =
        exports.export("schema.sql", &["--schema", "other", "--target-lsn", &lsn, "--database", "postgres"]);
    assert_eq!(exported["tables"].as_array().unwrap().len(), 1, "{exported:#}");
    assert!(std::fs::read_to_string(file).unwrap().contains("CREATE SCHEMA other"));
}

/// Under a load on other tables the table itself changes now and then.
#[test]
fn of_the_log_little_is_read_but_what_is_about_the_table() {
    let exports = Exports::new("export-log");
    let builder = exports.site.builder("db").segment_mb(1).setting("autovacuum", "off");
    let cluster = exports.site.start(builder);
    cluster.pgbench_init(2);
    cluster.query("create table few (id serial primary key, note text)");
    cluster.query("insert into few (note) select md5(g::text) from generate_series(1, 5000) g");
    exports.site.back_up(&cluster);
    for n in 0..3 {
        cluster.pgbench(&["-c", "2", "-t", "1000"]);
        cluster.query(&format!("update few set note = note || '{n}' where id % 3 = {n}"));
        cluster.query(&format!("insert into few (note) select '{n}' from generate_series(1, 500)"));
        cluster.query("checkpoint");
    }
    let lsn = moment(&cluster);
    let expected = rows(&cluster, "postgres", "few");
    cluster.query("drop table few");
    cluster.archive_all();
    let (file, exported) = exports.export("few.sql", &["--table", "few", "--target-lsn", &lsn]);
    let segments = |key: &str| exported["restored"]["replayed"][key].as_u64().unwrap();
    let (read, spared) = (segments("segments_read"), segments("segments_spared"));
    assert!(spared > 2 * read, "{exported:#}");
    load(&cluster, "back", &file, "select");
    assert_eq!(rows(&cluster, "back", "few"), expected);
    let out = exports
        .site
        .waltide
        .ok(exports.args(text(&file), &["--force", "--table", "few", "--target-lsn", &lsn]));
    assert!(out.stdout.contains(&format!("{read} segments read, of {spared} only the index")), "{out:?}");
}

#[test]
fn a_dropped_table_comes_back_and_one_of_a_younger_database_too() {
    let exports = Exports::new("export-drop");
    let cluster = exports.start();
    cluster.query("create table precious (id int primary key, long text)");
    cluster.query(
        "create table \"Odd \"\"name\" (id int, \"a,b\" text, twice int generated always as (id * 2) stored)",
    );
    exports.site.back_up(&cluster);
    cluster.query(&format!("insert into precious select g, {LONG} from generate_series(1, 300) g"));
    cluster.query("insert into \"Odd \"\"name\" select g, 'x, \"' || g from generate_series(1, 3) g");
    for strategy in ["wal_log", "file_copy"] {
        cluster.query(&format!("create database younger_{strategy} strategy {strategy}"));
        let database = format!("younger_{strategy}");
        cluster
            .sql(&database, "create table t as select g, md5(g::text) from generate_series(1, 500) g")
            .unwrap();
    }
    cluster.query("checkpoint");
    cluster.query("begin; insert into precious values (1000, 'prepared'); lock precious in access exclusive mode; prepare transaction 'it''s open'");
    let odd = moment(&cluster);
    cluster.query("commit prepared 'it''s open'");
    let expected = rows(&cluster, "postgres", "precious");
    cluster.query("drop table precious");
    cluster.query("create table precious (other text)");
    cluster.archive_all();

    let (file, exported) =
        exports.export("precious.sql", &["--table", "public.precious", "--before-drop", "public.precious"]);
    assert!(exported["restored"]["replayed"]["redo"].is_string(), "{exported:#}");
    load(&cluster, "back", &file, "select");
    assert_eq!(rows(&cluster, "back", "precious"), expected);

    // What was prepared and not committed is in nobody's way, and in no file.
    let (file, exported) =
        exports.export("odd.csv", &["--format", "csv", "--table", "\"Odd \"\"name\"", "--target-lsn", &odd]);
    assert_eq!(
        std::fs::read_to_string(file).unwrap(),
        "id,\"a,b\"\n1,\"x, \"\"1\"\n2,\"x, \"\"2\"\n3,\"x, \"\"3\"\n"
    );
    assert!(exported["notes"][0].as_str().unwrap().contains("'it''s open'"), "{exported:#}");
    let (file, _) =
        exports.export("precious.csv", &["--format", "csv", "--table", "precious", "--target-lsn", &odd]);
    assert_eq!(std::fs::read_to_string(file).unwrap().lines().count(), 301);

    for database in ["younger_wal_log", "younger_file_copy"] {
        let (file, _) = exports.export(database, &["--table", &format!("{database}.public.t")]);
        let loaded = format!("{database}_loaded");
        load(&cluster, &loaded, &file, "select");
        assert_eq!(rows(&cluster, &loaded, "t"), rows(&cluster, database, "t"));
        let (file, _) = exports.export(&format!("{database}.all"), &["--database", database]);
        let loaded = format!("{database}_all");
        load(&cluster, &loaded, &file, "select");
        assert_eq!(rows(&cluster, &loaded, "t"), rows(&cluster, database, "t"));
    }
    refusals(&exports);
}

#[test]
fn an_export_that_is_stopped_leaves_nothing() {
    let exports = Exports::new("export-stopped");
    let cluster = exports.start();
    cluster.query("create table long as select g, md5(g::text) from generate_series(1, 2000000) g");
    exports.site.back_up(&cluster);
    cluster.archive_all();
    let output = exports.out.join("long.sql");
    let start = |stage: &str, is_there: &dyn Fn() -> bool| {
        let export = exports.site.waltide.spawn(exports.args(text(&output), &["--table", "long"]));
        poll_until(stage, Duration::from_secs(120), || is_there().then_some(()));
        export
    };
    // While files are restored, and while pg_dump writes.
    let restoring = || read_dir(&exports.place).iter().any(|place| place.join("data/global").exists());
    let stopped = start("the restore", &restoring).terminate();
    exports.assert_stopped(&stopped);
    let unfinished = || read_dir(&exports.out).iter().any(|f| f.metadata().is_ok_and(|m| m.len() > 0));
    let stopped = start("pg_dump", &unfinished).interrupt();
    exports.assert_stopped(&stopped);
    assert_eq!(read_dir(&exports.out), Vec::<PathBuf>::new());
}

fn refusals(exports: &Exports) {
    let precious = text(&exports.out.join("precious.sql")).to_owned();
    let before = std::fs::read(&precious).unwrap();
    let said = exports.refused(1, &precious, &["--table", "postgres.public.precious"]);
    assert!(said.contains("precious.sql is already there") && said.contains("--force"), "{said}");
    assert_eq!(std::fs::read(&precious).unwrap(), before);
    exports.export("precious.sql", &["--table", "postgres.public.precious", "--force"]);
    assert_ne!(std::fs::read(&precious).unwrap(), before);

    let new = text(&exports.out.join("new")).to_owned();
    let said = exports.refused(1, &new, &["--table", "Precius"]);
    assert!(said.contains("there is no table Precius at the target"), "{said}");
    let said = exports.refused(1, &new, &["--table", "precious", "--database", "none"]);
    assert!(said.contains("there is no database none") && said.contains("postgres"), "{said}");
    let said = exports.refused(2, &new, &["--table", "t"]);
    assert!(
        said.contains("younger_file_copy.public.t\n") && said.contains("younger_wal_log.public.t\n"),
        "{said}"
    );
    let two = ["--table", "postgres.public.precious", "--table", "younger_wal_log.public.t"];
    let said = exports.refused(2, &new, &two);
    assert!(said.contains("more than one database: "), "{said}");
    let said = exports.refused(2, &new, &["--format", "csv", "--schema", "postgres.public"]);
    assert!(said.contains("cannot be written as CSV"), "{said}");
    exports.refused(2, &new, &[]);
    exports.refused(2, &new, &["--schema", "a.b.c"]);
    exports.refused(1, &format!("{new}/below"), &["--table", "postgres.public.precious"]);
    let said = exports.refused(
        3,
        &new,
        &["--table", "postgres.public.precious", "--target-time", "2020-01-01 00:00:00+00"],
    );
    assert!(said.contains("backup"), "{said}");

    let dry =
        exports.site.waltide.json(exports.args(&new, &["--table", "postgres.public.precious", "--dry-run"]));
    let (reads, tables) = (&dry["export"]["reads"], &dry["export"]["tables"]);
    assert_eq!(tables[0]["table"], "precious", "{dry:#}");
    assert!(reads["bytes"].as_u64().unwrap() < reads["whole_bytes"].as_u64().unwrap(), "{dry:#}");
    assert!(!std::path::Path::new(&new).exists());
}

#[test]
fn tables_come_out_of_tablespaces_and_of_inheritance_and_large_objects_of_whole_databases() {
    let exports = Exports::new("export-kinds");
    let cluster = exports.start();
    cluster.create_tablespace("space");
    for sql in [
        "create table bulk as select g, md5(g::text) from generate_series(1, 20000) g",
        &format!(
            "create table placed tablespace space as select g as id, {LONG} as long from generate_series(1, 30) g"
        ),
        "alter table placed alter long set storage external",
        "create table parent (id int, note text)",
        "create table child (more int) inherits (parent)",
        "create table grandchild (even_more int) inherits (child) tablespace space",
        "insert into parent select g, 'parent' from generate_series(1, 100) g",
        "insert into child select g, 'child', g from generate_series(1, 200) g",
        "insert into grandchild select g, 'grandchild', g, g from generate_series(1, 300) g",
        "create table parts (id int, at int) partition by list (at)",
        "create table parts_1 partition of parts for values in (1) tablespace space",
        "create table parts_2 partition of parts for values in (2) partition by range (id)",
        "create table parts_2_low partition of parts_2 for values from (0) to (100)",
        "create table parts_rest partition of parts default tablespace space",
        "insert into parts select g, g % 5 from generate_series(0, 99) g",
        "create table pictures (id int, picture oid)",
        "insert into pictures select g, lo_from_bytea(0, convert_to(repeat('picture ' || g, 1000), 'UTF8')) from generate_series(1, 5) g",
    ] {
        cluster.query(sql);
    }
    exports.site.back_up(&cluster);
    for sql in [
        "checkpoint",
        &format!("insert into placed select g, {LONG} from generate_series(31, 60) g"),
        "alter table placed set tablespace pg_default",
        "alter table child set tablespace space",
        "update parent set note = note || '.' where id % 3 = 0",
        "update parts set at = (at + 1) % 5 where id % 4 = 0",
        "insert into pictures select g, lo_from_bytea(0, convert_to(repeat('later ' || g, 1000), 'UTF8')) from generate_series(6, 9) g",
        "select lo_unlink(picture) from pictures where id = 1",
        "delete from pictures where id = 1",
        "checkpoint",
        "insert into grandchild values (0, 'last', 0, 0)",
        "alter table placed set tablespace space",
    ] {
        cluster.query(sql);
    }
    let lsn = moment(&cluster);
    let tables = ["placed", "parent", "child", "grandchild", "parts", "pictures"];
    let expected = tables.map(|table| rows(&cluster, "postgres", table));
    let only = cluster.query("select count(*) from only parent");
    let pictures = "select string_agg(md5(lo_get(picture)), ' ' order by id) from pictures";
    let shown = cluster.query(pictures);
    cluster.query("drop table placed, parent, child, grandchild, parts");
    cluster.query("select lo_unlink(picture) from pictures where id > 4");
    cluster.archive_all();
    let named = tables.map(|table| ["--table", table]).concat();
    for how in ["native", "server"] {
        let args = [named.as_slice(), &["--target-lsn", &lsn, "--replay", how]].concat();
        let (file, exported) = exports.export(&format!("{how}.sql"), &args);
        load(&cluster, how, &file, "select");
        assert_eq!(tables.map(|table| rows(&cluster, how, table)), expected, "by {how}");
        let space = "select count(*) from pg_class join pg_tablespace t on t.oid = reltablespace where spcname = 'space' and relkind = 'r'";
        assert_eq!(cluster.sql(how, space).unwrap(), "5", "by {how}");
        // What lies in no table is not exported with it, and that is said.
        let said = exported["notes"].to_string();
        assert!(said.contains("the database has 8 large objects, which come with no table"), "{exported:#}");
        cluster.sql(how, "select lo_get(picture) from pictures").expect_err("it was not exported");
    }
    // Of a parent its own rows come, and no child's that is not named.
    let (file, exported) = exports.export("parent.sql", &["--table", "parent", "--target-lsn", &lsn]);
    assert_eq!(exported["tables"].as_array().unwrap().len(), 1, "{exported:#}");
    load(&cluster, "parent_alone", &file, "select");
    assert_eq!(cluster.sql("parent_alone", "select count(*) from parent").unwrap(), only);
    let (file, exported) = exports.export("all.sql", &["--database", "postgres", "--target-lsn", &lsn]);
    assert!(!exported["notes"].to_string().contains("large objects"), "{exported:#}");
    load(&cluster, "whole", &file, "select");
    assert_eq!(tables.map(|table| rows(&cluster, "whole", table)), expected);
    assert_eq!(cluster.sql("whole", pictures).unwrap(), shown);
}

/// The pack that a table's first page is in, and a byte of it there.
fn stored_page(site: &Site, cluster: &Cluster, backup: &Value, table: &str) -> (PathBuf, usize) {
    let stored = Stored::of(cluster, &site.archive);
    let manifest = stored.manifest(&backup["id"].as_str().unwrap().parse().unwrap());
    let path = cluster.query(&format!("select pg_relation_filepath('{table}')"));
    let file = manifest.files.iter().find(|f| f.path == path).expect("the backup has it");
    let (map, number) = file.extents[0];
    let map = stored.path(&stored.names().map(&manifest.maps[map as usize]));
    let map = ExtentMap::decode(&std::fs::read(map).unwrap()).unwrap();
    let extent = &map.files[number as usize][0];
    let pack = stored.path(&stored.names().pack(&map.packs[extent.pack as usize]));
    (pack, usize::try_from(extent.offset).unwrap() + extent.stored_bytes as usize / 2)
}

#[test]
fn a_damaged_object_that_is_needed_ends_an_export_with_its_name() {
    let exports = Exports::new("export-damaged");
    let cluster = exports.start();
    cluster.query("create table t as select g, md5(g::text) as a from generate_series(1, 100000) g");
    let backup = exports.site.back_up(&cluster);
    cluster.query("insert into t values (0, 'behind the backup')");
    let segment = cluster.archive_all();
    cluster.query("checkpoint; insert into t values (-1, 'behind the checkpoint')");
    let last = cluster.archive_all();
    let output = text(&exports.out.join("t.sql")).to_owned();
    let (pack, at) = stored_page(&exports.site, &cluster, &backup, "t");
    let segments = [segment, last].map(|name| exports.site.object(&cluster, &name));
    let middle = |object: &PathBuf| usize::try_from(object.metadata().unwrap().len()).unwrap() / 2;
    let segments = segments.map(|object| (object.clone(), middle(&object)));
    for (object, at) in [(pack, at)].into_iter().chain(segments) {
        let whole = std::fs::read(&object).unwrap();
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        std::fs::write(&object, &bytes).unwrap();
        for how in ["auto", "server"] {
            let said = exports.refused(3, &output, &["--table", "t", "--replay", how]);
            let name = object.file_name().unwrap().to_str().unwrap();
            assert!(said.contains(name) && said.contains("damaged"), "{name} by {how}: {said}");
            assert_eq!(read_dir(&exports.out), Vec::<PathBuf>::new());
        }
        std::fs::write(&object, whole).unwrap();
    }
    let (file, _) = exports.export("t.sql", &["--table", "t"]);
    load(&cluster, "loaded", &file, "select");
    assert_eq!(rows(&cluster, "loaded", "t"), rows(&cluster, "postgres", "t"));
}

#[test]
fn a_page_that_is_wanted_and_not_there_is_no_empty_page() {
    let exports = Exports::new("export-missing");
    let builder = exports.site.builder("db").checksums(false).setting("autovacuum", "off");
    let mut cluster = exports.site.start(builder.setting("full_page_writes", "off"));
    cluster.query("create table t (id int, n int) with (fillfactor = 50)");
    cluster.query("create table other as select generate_series(1, 100) as id");
    cluster.query("insert into t select n, 0 from generate_series(1, 1000) n");
    cluster.query("vacuum t; checkpoint");
    let file = cluster.data_dir().join(cluster.query("select pg_relation_filepath('t')"));
    cluster.stop(StopMode::Fast);
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, vec![0; whole.len()]).unwrap();
    cluster.start();
    // The backup has the table's pages empty; the log behind it changes pages that are full, and has no images of them.
    exports.site.back_up(&cluster);
    cluster.stop(StopMode::Fast);
    std::fs::write(&file, whole).unwrap();
    cluster.start();
    cluster.query("update t set n = 1 where id = 7");
    cluster.query("checkpoint");
    cluster.archive_all();
    let output = text(&exports.out.join("t.sql")).to_owned();
    for how in ["auto", "server"] {
        let said = exports.refused(3, &output, &["--table", "t", "--replay", how]);
        assert!(said.contains("the log changes block 0 of base/5/"), "by {how}: {said}");
        let (file, _) = exports.export(&format!("{how}.sql"), &["--table", "other", "--replay", how]);
        load(&cluster, how, &file, "select");
        assert_eq!(rows(&cluster, how, "other"), rows(&cluster, "postgres", "other"));
    }
}
