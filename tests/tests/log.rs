//! `waltide log` tells what the server did: the same as pg_waldump, and as a journal of the work itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use serde_json::Value;
use waltide_format::archive::Layout;
use waltide_tests::oracle::{ControlData, WalRecord, Waldump, parse_lsn};
use waltide_tests::{Cluster, Scratch, Waltide};

/// A cluster that ships to an archive, in segments of a megabyte so that transactions span them.
struct Site {
    archive: PathBuf,
    waltide: Waltide,
    cluster: Cluster,
}

impl Site {
    fn start(label: &str, settings: &[(&str, &str)]) -> Self {
        let scratch = Scratch::new(label);
        let archive = scratch.dir("archive");
        let waltide = Waltide::new(&scratch).archive(&archive).cluster("main");
        let mut cluster = Cluster::builder("a")
            .scratch(&scratch)
            .segment_mb(1)
            .setting("wal_keep_size", "4GB")
            .setting("max_prepared_transactions", "10")
            .settings(settings)
            .archive_command(&waltide.archive_command())
            .create();
        waltide.ok(["init", "--data-dir", cluster.data_dir().to_str().unwrap()]);
        cluster.start();
        Self { archive, waltide, cluster }
    }

    /// The lines of `waltide log --json` with these arguments.
    fn log(&self, status: i32, args: &[&str]) -> Vec<Value> {
        let args = ["log", "--json"].iter().chain(args);
        let output = self.waltide.run(args).assert_status(status);
        output.stdout.lines().map(|line| serde_json::from_str(line).expect("a line is a document")).collect()
    }

    fn object(&self, segment: &str) -> PathBuf {
        let id = ControlData::read(self.cluster.data_dir()).system_identifier();
        let names = Layout::new("main").unwrap().system(id.into());
        self.archive.join(names.wal_file(segment.parse().unwrap()))
    }

    /// A table's files, as the log names them.
    fn files(&self, table: &str) -> String {
        let path = self.cluster.query(&format!("select pg_relation_filepath('{table}')"));
        let mut parts = path.split('/').skip(1);
        format!("1663/{}/{}", parts.next().unwrap(), parts.next().unwrap())
    }

    /// Runs statements; the last line they answer is a transaction's number.
    fn xid(&self, sql: &str) -> String {
        self.cluster.query(sql).lines().last().expect("it answers").to_owned()
    }
}

/// Rows that came, changed, changed in place (HOT), and went.
type Rows = [u64; 4];

/// What a transaction did: records, bytes of WAL, rows by files.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Work {
    records: u64,
    wal_bytes: u64,
    rows: BTreeMap<String, Rows>,
}

impl Work {
    fn add(&mut self, other: &Self) {
        self.records += other.records;
        self.wal_bytes += other.wal_bytes;
        for (files, rows) in &other.rows {
            let mine = self.rows.entry(files.clone()).or_default();
            mine.iter_mut().zip(rows).for_each(|(mine, more)| *mine += more);
        }
    }

    fn without_nothing(mut self) -> Self {
        self.rows.retain(|_, rows| *rows != Rows::default());
        self
    }
}

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_else(|| panic!("{field} of {value}"))
}

/// What the log says of a transaction.
fn told(transaction: &Value) -> Work {
    let mut work = Work {
        records: transaction["records"].as_u64().unwrap(),
        wal_bytes: transaction["wal_bytes"].as_u64().unwrap(),
        rows: BTreeMap::new(),
    };
    for relation in transaction["relations"].as_array().unwrap() {
        let rows = ["inserted", "updated", "hot", "deleted"].map(|field| relation[field].as_u64().unwrap());
        work.rows.insert(text(relation, "relation").to_owned(), rows);
    }
    work.without_nothing()
}

fn list<'a>(transaction: &'a Value, field: &str) -> Vec<&'a str> {
    transaction[field].as_array().unwrap().iter().map(|r| text(r, "relation")).collect()
}

/// A transaction's end as pg_waldump prints it.
#[derive(Debug)]
struct End {
    xid: u32,
    lsn: u64,
    kind: &'static str,
    subxacts: Vec<u32>,
    dropped: BTreeSet<String>,
}

/// What pg_waldump says of every transaction, and of their ends in order.
fn waldump(records: &[WalRecord]) -> (BTreeMap<u32, Work>, Vec<End>) {
    let (mut work, mut ends) = (BTreeMap::<u32, Work>::new(), Vec::new());
    for record in records {
        if record.xid != 0 {
            let mine = work.entry(record.xid).or_default();
            mine.records += 1;
            mine.wal_bytes += u64::from(record.total_len);
            count_rows(record, mine);
        }
        let kind = match record.kind().trim_end_matches(':') {
            "COMMIT" => "commit",
            "ABORT" => "abort",
            "COMMIT_PREPARED" => "commit_prepared",
            "ABORT_PREPARED" => "abort_prepared",
            _ => continue,
        };
        if record.rmgr == "Transaction" {
            let numbered = record.desc.split_whitespace().nth(1).unwrap().trim_end_matches(':');
            let xid = if kind.ends_with("prepared") { numbered.parse().unwrap() } else { record.xid };
            let part = |name: &str| {
                let part = record.desc.split(';').map(str::trim).find_map(|p| p.strip_prefix(name));
                part.unwrap_or_default().split_whitespace().map(str::to_owned).collect::<Vec<_>>()
            };
            let dropped = part("rels:").iter().map(|path| path.replacen("base", "1663", 1)).collect();
            let subxacts = part("subxacts:").iter().map(|x| x.parse().unwrap()).collect();
            ends.push(End { xid, lsn: record.lsn, kind, subxacts, dropped });
        }
    }
    (work, ends)
}

fn count_rows(record: &WalRecord, work: &mut Work) {
    let kind = record.kind().trim_end_matches("+INIT");
    let mut words = record.desc.split_whitespace().skip(1);
    let rows: Rows = match (record.rmgr.as_str(), kind) {
        ("Heap", "INSERT") => [1, 0, 0, 0],
        ("Heap2", "MULTI_INSERT") => [words.next().unwrap().parse().unwrap(), 0, 0, 0],
        ("Heap", "UPDATE") => [0, 1, 0, 0],
        ("Heap", "HOT_UPDATE") => [0, 1, 1, 0],
        ("Heap", "DELETE") => {
            let flags = words.skip_while(|w| *w != "flags").nth(1).expect("a delete has flags");
            let flags = u8::from_str_radix(flags.trim_start_matches("0x"), 16).unwrap();
            assert_eq!(flags & 8, 0, "no test of rows taken back runs here");
            [0, 0, 0, 1]
        }
        _ => return,
    };
    let block = record.blocks.iter().find(|b| b.id == 0).expect("a row is in a block");
    let files = format!("{}/{}/{}", block.spc, block.db, block.rel);
    let one = Work { rows: BTreeMap::from([(files, rows)]), ..Work::default() };
    work.add(&one);
}

/// Work of every kind. What each transaction must have done to which files is written down beside it.
fn work_of_every_kind(site: &Site) -> Vec<(String, BTreeMap<String, Rows>)> {
    let cluster = &site.cluster;
    let mut journal = Vec::new();
    let mut note = |xid: String, rows: &[(&str, Rows)]| {
        let rows = rows.iter().map(|(files, rows)| ((*files).to_owned(), *rows)).collect();
        journal.push((xid, rows));
    };
    cluster.query("create table t (id int primary key, v text); create table u (id int, v text)");
    let (t, u) = (site.files("t"), site.files("u"));
    let own = "select pg_current_xact_id()";
    let xid = site
        .xid(&format!("begin; insert into t select g, 'x' from generate_series(1, 100) g; {own}; commit"));
    note(xid, &[(&t, [100, 0, 0, 0])]);
    // The key changes in the first update, so it is in the index and not HOT.
    let xid = site.xid(&format!(
        "begin; update t set id = id + 1000 where id <= 10; update t set v = 'y' where id between 20 and 24;
         delete from t where id = 50; {own}; commit"
    ));
    note(xid, &[(&t, [0, 15, 5, 1])]);
    let xid = site.xid(&format!(
        "begin; {own} as xid \\gset\n copy u from program 'seq -f ''%g\tcopied'' 1 20000';\n commit; select :'xid'"
    ));
    note(xid, &[(&u, [20000, 0, 0, 0])]);
    let xid = site.xid(&format!(
        "begin; insert into u values (1, 'a'); savepoint a; insert into u values (2, 'b'); release a;
         savepoint b; insert into u values (3, 'c'); insert into t values (5000); rollback to b;
         savepoint c; savepoint d; delete from u where v = 'b'; release c; {own}; commit"
    ));
    note(xid, &[(&u, [2, 0, 0, 1])]);
    let prepared = site.xid(&format!(
        "begin; insert into t values (6000); savepoint a; insert into t values (6001); release a; {own};
         prepare transaction 'moved money'"
    ));
    let given_up =
        site.xid(&format!("begin; insert into t values (7000); {own}; prepare transaction 'not this'"));
    let xid = site.xid(&format!("begin; delete from t where id = 51; {own}; commit"));
    note(xid, &[(&t, [0, 0, 0, 1])]);
    cluster.query("commit prepared 'moved money'");
    note(prepared, &[(&t, [2, 0, 0, 0])]);
    cluster.query("rollback prepared 'not this'");
    note(given_up, &[]);
    journal
}

#[test]
fn the_log_agrees_with_pg_waldump_and_with_the_journal() {
    let site = Site::start("log-agrees", &[]);
    let cluster = &site.cluster;
    let first_of_ours: u32 = site.xid("select pg_current_xact_id()").parse().unwrap();
    cluster.pgbench_init(1);
    let background = cluster.pgbench_background(&["-c", "2", "-t", "400"]);
    let journal = work_of_every_kind(&site);
    // Begins in one segment, ends many later, and others end meanwhile.
    let spanning = site.xid(
        "begin; insert into u select g, repeat('x', 500) from generate_series(1, 6000) g;
         select pg_current_xact_id(); commit",
    );
    cluster.query("create table gone (id int primary key, v text); insert into gone values (1, 'x')");
    cluster.query("create unlogged table fast (id int); create index on t (v)");
    cluster.query("begin; truncate gone; drop table u; commit; drop table fast; vacuum full t");
    background.wait().assert_ok();
    let last = cluster.archive_all();

    let segments = cluster.wal_segments();
    let wal = cluster.data_dir().join("pg_wal");
    let (records, end) = Waldump::segments(&wal, segments.first().unwrap(), Some(&last)).finish();
    assert!(end.success, "{}", end.message);
    let (work, ends) = waldump(&records);

    let log = site.log(0, &["--aborted"]);
    let order: Vec<_> = log.iter().map(|t| (text(t, "xid").parse().unwrap(), text(t, "kind"))).collect();
    let expected: Vec<_> = ends.iter().map(|e| (e.xid, e.kind)).collect();
    assert_eq!(order, expected, "every end, in order");
    for (transaction, end) in log.iter().zip(&ends) {
        let mut sum = work.get(&end.xid).cloned().unwrap_or_default();
        // A savepoint above another that wrote something has a number and no record.
        end.subxacts.iter().filter_map(|sub| work.get(sub)).for_each(|work| sum.add(work));
        assert_eq!(told(transaction), sum.without_nothing(), "{end:?}");
        assert_eq!(parse_lsn(text(transaction, "commit_lsn")), Some(end.lsn));
        let lists = ["dropped", "truncated", "rewritten"].map(|field| list(transaction, field));
        let gone: BTreeSet<String> = lists.iter().flatten().map(|f| (*f).to_owned()).collect();
        if end.kind == "commit" {
            assert_eq!(gone, end.dropped, "{end:?}");
        }
        // Whether initdb's last transaction began before the archive did, nothing says.
        assert!(transaction["complete"] == true || end.xid < first_of_ours, "{end:?}");
        assert_eq!(transaction["timeline"], 1);
    }
    let of = |xid: &str| log.iter().find(|t| text(t, "xid") == xid).unwrap_or_else(|| panic!("{xid}"));
    for (xid, rows) in &journal {
        let transaction = of(xid);
        if text(transaction, "kind").starts_with("commit") {
            assert_eq!(told(transaction).rows, *rows, "{transaction}");
        }
    }
    let gids: Vec<_> = log.iter().filter_map(|t| Some((t["gid"].as_str()?, text(t, "kind")))).collect();
    assert_eq!(gids, [("moved money", "commit_prepared"), ("not this", "abort_prepared")]);
    let long = of(&spanning);
    assert!(long["wal_bytes"].as_u64().unwrap() > 3 << 20, "it spans segments");
}

#[test]
fn a_missing_segment_is_said_and_what_can_be_shown_is_shown() {
    let site = Site::start("log-hole", &[]);
    let cluster = &site.cluster;
    cluster.query("create table t (id int primary key)");
    let files = site.files("t");
    let insert = |id: u32| {
        site.xid(&format!("begin; insert into t values ({id}); select pg_current_xact_id(); commit"))
    };
    let before = insert(1);
    cluster.query("begin; insert into t values (2), (3); prepare transaction 'over the hole'");
    cluster.archive_all();
    let in_the_hole = insert(4);
    let hole = cluster.archive_all();
    cluster.query("commit prepared 'over the hole'; checkpoint");
    let after = insert(5);
    cluster.archive_all();
    let whole = site.log(0, &[]);
    fs::remove_file(site.object(&hole)).unwrap();

    let output = site.waltide.run(["log", "--json"]).assert_status(3);
    assert_eq!(output.stderr, format!("waltide: {hole} is missing\n"));
    let log: Vec<Value> = output.stdout.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let find = |log: &[Value], xid: &str| log.iter().find(|t| text(t, "xid") == xid).cloned();
    for xid in [&before, &after] {
        assert_eq!(find(&log, xid), find(&whole, xid), "it is told as if nothing were missing");
    }
    assert_eq!((find(&log, &in_the_hole), find(&whole, &in_the_hole).is_some()), (None, true));
    let over = log.iter().find(|t| t["gid"] == "over the hole").unwrap();
    assert_eq!(over["complete"], false, "it may have done more in the hole");
    assert_eq!(told(over).rows, BTreeMap::from([(files, [2, 0, 0, 0])]));

    let since = text(&find(&whole, &after).unwrap(), "time").to_owned();
    let late = site.log(0, &["--since", &since]);
    assert_eq!(late.first(), find(&whole, &after).as_ref(), "a hole before what is asked for is no matter");
    let text = site.waltide.run(["log"]).assert_status(3).stdout;
    assert!(text.lines().any(|l| l.contains("committed prepared \"over the hole\"")), "{text}");
}

#[test]
fn filters_tell_the_same_as_looking_through_everything() {
    let site = Site::start("log-filters", &[("log_min_messages", "warning")]);
    let cluster = &site.cluster;
    cluster.query("create table t (id int primary key, v text); create table doomed (id int); create table emptied (id int)");
    let (t, doomed, emptied) = (site.files("t"), site.files("doomed"), site.files("emptied"));
    cluster.query("insert into emptied select generate_series(1, 100)");
    let undone = site.xid("begin; insert into t values (0); select pg_current_xact_id(); rollback");
    cluster.query("begin; insert into t values (1, 'early'); savepoint a; insert into t values (2, 'early'); prepare transaction 'long'");
    for round in 0..4 {
        cluster.query(&format!("insert into t select g, repeat('x', 1000) from generate_series({round}0000, {round}0000 + 900) g where g > 9"));
        cluster.query("checkpoint");
        cluster.archive_all();
    }
    cluster.query("drop table doomed");
    cluster.query("truncate emptied");
    cluster.archive_all();
    cluster.query("commit prepared 'long'");
    cluster.query("create database other");
    cluster.sql("other", "create table elsewhere (id int)").unwrap();
    cluster.archive_all();

    let all = site.log(0, &["--aborted"]);
    let same = |args: &[&str], wanted: &dyn Fn(&Value) -> bool| {
        let expected: Vec<_> = all.iter().filter(|x| wanted(x)).cloned().collect();
        assert!(!expected.is_empty(), "{args:?}");
        assert_eq!(site.log(0, args), expected, "{args:?}");
        expected
    };
    let commit = |x: &Value| text(x, "kind").starts_with("commit");
    let long = all.iter().find(|x| x["gid"] == "long").unwrap();
    assert_eq!(told(long).rows[&t], [2, 0, 0, 0]);
    assert_eq!(long["complete"], true);
    same(&[], &commit);
    same(&["--aborted", "--xid", &undone], &|x| text(x, "xid") == undone);
    same(&["--xid", text(long, "xid")], &|x| x["gid"] == "long");
    let sub = long["subxacts"][0].as_str().unwrap();
    same(&["--xid", sub], &|x| x["gid"] == "long");
    // Times are written alike, so that they compare as text.
    let (at, end) = (text(long, "time"), text(all.last().unwrap(), "time"));
    let late = same(&["--since", at], &|x| text(x, "time") >= at);
    assert_eq!(late[0], *long, "it began long before");
    same(&["--until", at], &|x| commit(x) && text(x, "time") <= at);
    same(&["--since", at, "--until", end], &|x| text(x, "time") >= at);
    let [dropped] = &same(&["--dropped"], &|x| !list(x, "dropped").is_empty())[..] else {
        panic!("one drop")
    };
    assert_eq!(list(dropped, "dropped"), [doomed.as_str()]);
    let [truncated] = &same(&["--truncated"], &|x| !list(x, "truncated").is_empty())[..] else {
        panic!("one")
    };
    assert_eq!(list(truncated, "truncated"), [emptied.as_str()]);
    same(&["--dropped", "--relation", &doomed], &|x| list(x, "dropped").contains(&doomed.as_str()));
    assert_eq!(site.log(0, &["--dropped", "--relation", &t]), Vec::<Value>::new());
    let touches =
        |x: &Value, files: &str| x["relations"].as_array().unwrap().iter().any(|r| r["relation"] == files);
    same(&["--relation", &t], &|x| commit(x) && (touches(x, &t) || list(x, "created").contains(&t.as_str())));
    same(&["--larger-than", "500kB"], &|x| x["wal_bytes"].as_u64().unwrap() > 500 << 10);
    let other = cluster.query("select oid from pg_database where datname = 'other'");
    same(&["--database", &other], &|x| x["database"].as_u64() == other.parse().ok());
}

#[test]
fn a_crash_and_a_promotion_leave_what_was_committed_on_the_line() {
    let mut site = Site::start("log-lines", &[("wal_level", "logical"), ("max_wal_senders", "4")]);
    site.cluster.query("create table t (id int primary key, v text)");
    let files = site.files("t");
    let insert = |cluster: &Cluster, id: u32| -> String {
        let sql = format!("begin; insert into t values ({id}); select pg_current_xact_id(); commit");
        cluster.query(&sql).lines().last().unwrap().to_owned()
    };
    let halved = site.xid(
        "begin; insert into t values (-1); savepoint a; insert into t values (-2); rollback to a;
         select pg_current_xact_id(); commit",
    );
    let first = insert(&site.cluster, 1);
    let truncate =
        site.xid("begin; truncate t; insert into t values (2); select pg_current_xact_id(); commit");
    // What is open when the server dies has no end in the log, but its records are there.
    let held =
        site.cluster.psql("postgres").arg("-c").arg("begin; insert into t values (3); select pg_sleep(600)");
    let held = held.spawn(site.cluster.scratch(), "held");
    site.cluster.wait_until("select count(*) = 1 from pg_stat_activity where wait_event = 'PgSleep'");
    let beside = insert(&site.cluster, 4);
    site.cluster.kill9();
    held.wait();
    site.cluster.start();
    let after_crash = insert(&site.cluster, 5);

    let mut standby = site.cluster.make_standby("b");
    standby.set("archive_mode", "on");
    standby.restart();
    let common = insert(&site.cluster, 6);
    standby.wait_caught_up(&site.cluster);
    standby.promote();
    standby.wait_promoted();
    let left_behind = insert(&site.cluster, 7);
    let (on_2, also_on_2) = (insert(&standby, 8), insert(&standby, 9));
    assert_eq!(left_behind, on_2, "the same number on two timelines");
    site.cluster.archive_all();
    standby.archive_all();

    let both = [&first, &truncate, &beside, &after_crash, &common];
    let line = |rest: &[(&String, u64)]| -> BTreeSet<(String, u64)> {
        let both = both.iter().map(|xid| ((*xid).clone(), 1));
        both.chain(rest.iter().map(|(xid, timeline)| ((*xid).clone(), *timeline))).collect()
    };
    let of_line = |args: &[&str]| -> BTreeSet<(String, u64)> {
        let log = site.log(0, args);
        let ours = log.iter().filter(|t| text(t, "xid").parse::<u32>().unwrap() >= first.parse().unwrap());
        ours.map(|t| (text(t, "xid").to_owned(), t["timeline"].as_u64().unwrap())).collect()
    };
    assert_eq!(of_line(&["--aborted"]), line(&[(&on_2, 2), (&also_on_2, 2)]));
    assert_eq!(of_line(&["--aborted", "--timeline", "1"]), line(&[(&left_behind, 1)]));
    let all = site.log(0, &["--aborted"]);
    let undone: Vec<_> = all.iter().filter(|t| text(t, "kind") == "abort").collect();
    let [undone] = undone[..] else { panic!("one savepoint was rolled back: {undone:?}") };
    assert_eq!(text(undone, "top"), halved, "wal_level = logical says whose it was");
    let truncates = site.log(0, &["--truncated"]);
    let [only] = &truncates[..] else { panic!("{truncates:?}") };
    assert_eq!(text(only, "xid"), truncate);
    assert!(list(only, "truncated").contains(&files.as_str()), "{only}");
    let output = site.waltide.run(["log", "--timeline", "3"]).assert_status(1);
    assert_eq!(output.stderr, "waltide: the archive has nothing of timeline 3; it has 1, 2\n");
}

#[test]
fn tables_are_told_by_the_names_they_had() {
    let site = Site::start("log-names", &[]);
    let cluster = &site.cluster;
    cluster.query("create schema shop; create table shop.orders (id int primary key, note text); create table plain (id int)");
    cluster.query("create table parted (id int) partition by list (id); create table parted_1 partition of parted for values in (1)");
    let data_dir = cluster.data_dir().to_str().unwrap();
    site.waltide.ok(["backup", "--data-dir", data_dir]);
    let own = "select pg_current_xact_id()";
    let run = |sql: &str| site.xid(&format!("begin; {sql}; {own}; commit"));
    let filled = run("insert into shop.orders select g, 'x' from generate_series(1, 10) g");
    let toasted = run(
        "insert into shop.orders select 1000, string_agg(md5(g::text), '') from generate_series(1, 1000) g",
    );
    let renamed = run("alter table shop.orders rename to \"Old Orders\"");
    let again = run("create table shop.orders (id int primary key); insert into shop.orders values (1)");
    let emptied = run("truncate shop.orders; drop table plain; insert into shop.orders values (2)");
    let retyped = run("alter table shop.orders alter id type bigint");
    cluster.query("vacuum full shop.orders");
    let dropped = run("drop table shop.orders");
    let dropped_parted = run("drop table parted");
    let made = run("create table shop.orders (id int); drop table \"shop\".\"Old Orders\"");
    cluster.query("create database other");
    cluster.sql("other", "create table lost (id int); insert into lost values (1)").unwrap();
    cluster.query("drop database other");
    cluster.archive_all();

    let log = site.log(0, &[]);
    let fates = |xid: &str| -> Vec<String> {
        let found = log.iter().find(|t| text(t, "xid") == xid).unwrap_or_else(|| panic!("{xid}"));
        let one = |f: &Value| {
            format!(
                "{} {}{}",
                text(f, "event"),
                text(f, "name"),
                f["to"].as_str().map(|to| format!(" to {to}")).unwrap_or_default()
            )
        };
        found["tables"].as_array().map(|all| all.iter().map(one).collect()).unwrap_or_default()
    };
    let names = |xid: &str| -> BTreeSet<String> {
        let found = log.iter().find(|t| text(t, "xid") == xid).unwrap();
        let with_rows =
            found["relations"].as_array().unwrap().iter().filter(|r| r["inserted"].as_u64() > Some(0));
        let ours = with_rows.filter(|r| !text(r, "name").contains(".pg_catalog."));
        ours.map(|r| {
            r["toast_of"].as_str().map_or_else(|| text(r, "name").to_owned(), |t| format!("{t} (TOAST)"))
        })
        .collect()
    };
    let set = |all: &[&str]| all.iter().map(|s| (*s).to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(names(&filled), set(&["postgres.shop.orders"]));
    assert_eq!(names(&toasted), set(&["postgres.shop.orders", "postgres.shop.orders (TOAST)"]));
    assert_eq!(fates(&renamed), ["renamed postgres.shop.orders to postgres.shop.\"Old Orders\""]);
    assert_eq!(fates(&again), ["created postgres.shop.orders"]);
    assert_eq!(fates(&emptied), ["dropped postgres.public.plain", "truncated postgres.shop.orders"]);
    assert_eq!(fates(&retyped), ["rewritten postgres.shop.orders"]);
    assert_eq!(fates(&dropped), ["dropped postgres.shop.orders"]);
    assert_eq!(
        fates(&dropped_parted),
        ["dropped postgres.public.parted", "dropped postgres.public.parted_1"]
    );
    assert_eq!(fates(&made), ["dropped postgres.shop.\"Old Orders\"", "created postgres.shop.orders"]);

    let xids =
        |args: &[&str]| site.log(0, args).iter().map(|t| text(t, "xid").to_owned()).collect::<Vec<_>>();
    assert_eq!(xids(&["--dropped", "--relation", "shop.orders"]), std::slice::from_ref(&dropped));
    assert_eq!(xids(&["--truncated", "--relation", "orders"]), std::slice::from_ref(&emptied));
    assert_eq!(xids(&["--dropped", "--relation", "parted"]), [dropped_parted]);
    assert_eq!(xids(&["--relation", "shop.\"Old Orders\""]), [renamed, made]);
    let whole_database: Vec<_> = site
        .log(0, &["--dropped"])
        .into_iter()
        .filter(|t| t["dropped_databases"][0]["name"] == "other")
        .collect();
    assert_eq!(whole_database.len(), 1);
    let elsewhere = site.log(0, &["--database", "other"]);
    assert!(
        elsewhere.iter().any(|t| fates(text(t, "xid")) == ["created other.public.lost"]),
        "{elsewhere:?}"
    );
    let numbers = site.log(0, &["--numbers", "--xid", &dropped]);
    assert!(numbers[0].get("tables").is_none() && numbers[0]["relations"][0].get("name").is_none());
    let said = site.waltide.ok(["log", "--dropped"]).stdout;
    assert!(
        said.contains("DROPPED postgres.shop.orders") && said.contains("DROPPED DATABASE other"),
        "{said}"
    );
    site.waltide.fails(2, ["log", "--numbers", "--relation", "orders"]);
}

#[test]
fn a_name_cannot_be_asked_for_where_there_is_no_backup() {
    let site = Site::start("log-nameless", &[]);
    site.cluster.query("create table t (id int); drop table t");
    site.cluster.archive_all();
    let output = site.waltide.fails(1, ["log", "--relation", "t"]);
    assert_eq!(
        output.stderr,
        "waltide: names are read from a backup and the WAL behind it, and the archive has no backup on this line\n  \
         hint: make one with `waltide backup`, or say the OID or the files\n"
    );
    assert_eq!(site.log(0, &["--dropped"]).len(), 1);
}
