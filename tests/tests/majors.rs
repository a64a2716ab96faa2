//! One life of a cluster of another major version: archived, backed up, restored, drilled, told.
//!
//! `scripts/test --majors` brings the servers and runs this once for each, with `WALTIDE_PG_BIN` naming it.

use serde_json::Value;
use waltide_tests::site::text;
use waltide_tests::workload::Journal;
use waltide_tests::{Cluster, Site, StopMode};

/// Rows of one relation that a transaction inserted, updated and deleted.
type Rows = [u64; 3];

/// Runs statements in one transaction that is committed; its number.
fn transaction(cluster: &Cluster, statements: &str) -> String {
    let answer = cluster.query(&format!("begin; {statements}; select pg_current_xact_id(); commit"));
    answer.lines().last().expect("it answers").to_owned()
}

/// What the log says of a relation in a transaction.
fn told(log: &[Value], xid: &str, relation: &str) -> Rows {
    let found: Vec<_> = log.iter().filter(|t| t["xid"].to_string().trim_matches('"') == xid).collect();
    assert_eq!(found.len(), 1, "transaction {xid}: {found:?}");
    let relations = found[0]["relations"].as_array().unwrap();
    let rows = |r: &Value| ["inserted", "updated", "deleted"].map(|field| r[field].as_u64().unwrap());
    let of = relations.iter().filter(|r| r["name"] == relation).map(rows);
    of.fold([0; 3], |sum, rows| [sum[0] + rows[0], sum[1] + rows[1], sum[2] + rows[2]])
}

#[test]
#[ignore = "needs servers of other major versions: scripts/test --majors"]
fn a_cluster_lives_through_backups_restores_and_drills_and_its_log_is_told() {
    let site = Site::new("major");
    let builder = site.builder("db").setting("track_commit_timestamp", "on");
    let cluster = site.start(builder.setting("max_prepared_transactions", "4"));
    let major: u32 = cluster.query("show server_version_num").parse::<u32>().unwrap() / 10_000;
    println!("PostgreSQL {major}");
    let data_dir = text(cluster.data_dir()).to_owned();
    let mut journal = Journal::create(&cluster);
    cluster.pgbench_init(1);
    journal.steps_on(&cluster, 2);
    let full = site.waltide.json(["backup", "--type", "full", "--data-dir", &data_dir]);
    assert_eq!(full["kind"], "full", "{full:#}");
    let early = journal.steps_on(&cluster, 3);

    // What is done, and what the log must say of it.
    let mut work: Vec<(String, Rows)> = Vec::new();
    cluster.query("create table w (id int primary key, t text); create table z (id int)");
    let done = transaction(&cluster, "insert into w select n, 'new' from generate_series(1, 500) n");
    work.push((done, [500, 0, 0]));
    let copied = (501..=700).map(|n| format!("{n}\tcopied\n")).collect::<String>();
    let done = transaction(
        &cluster,
        &format!("copy w from stdin;\n{copied}\\.\n\nupdate w set t = 'x' where id = 700"),
    );
    work.push((done, [200, 1, 0]));
    work.push((transaction(&cluster, "update w set t = 'changed' where id <= 100"), [0, 100, 0]));
    work.push((transaction(&cluster, "delete from w where id between 101 and 150"), [0, 0, 50]));
    let rolled_back = "insert into w values (801, 'a'); savepoint s; insert into w values (802, 'b'), (803, 'c'); \
                       rollback to s; savepoint s2; insert into w values (804, 'd'); release s2";
    work.push((transaction(&cluster, rolled_back), [2, 0, 0]));
    let prepared = cluster.query(
        "begin; insert into w select n, 'prepared' from generate_series(901, 907) n; select pg_current_xact_id(); \
         prepare transaction 'p'",
    );
    work.push((prepared.lines().last().unwrap().to_owned(), [7, 0, 0]));
    let middle = journal.steps_on(&cluster, 2);
    cluster.query("commit prepared 'p'");
    let rows_in_w = cluster.query("select count(*), min(id), max(id) from w");
    assert_eq!(rows_in_w, "659|1|907");

    let incremental = site.waltide.json(["backup", "--type", "incremental", "--data-dir", &data_dir]);
    assert_eq!(incremental["kind"], "incremental", "{incremental:#}");
    let read = |backup: &Value| backup["read_bytes"].as_u64().unwrap_or_else(|| panic!("{backup:#}"));
    assert!(read(&incremental) < read(&full), "{incremental:#}\n{full:#}");
    cluster.pgbench(&["-c", "2", "-t", "200"]);
    let late = journal.steps_on(&cluster, 3);
    journal.steps_on(&cluster, 2);
    cluster.query("drop table w");
    let last = journal.steps_on(&cluster, 1);
    cluster.archive_all();
    let accounts = cluster.query("select count(*), sum(abalance) from pgbench_accounts");
    assert_eq!(cluster.query("select failed_count from pg_stat_archiver"), "0", "{}", cluster.log_tail());

    // The log, by what was done and by what the journal remembers.
    let out = site.waltide.run(["log", "--json"]).assert_ok();
    let log: Vec<Value> = out.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (xid, rows) in &work {
        assert_eq!(told(&log, xid, "postgres.public.w"), *rows, "transaction {xid} on {major}");
    }
    for step in journal.steps() {
        assert_eq!(told(&log, &step.xid.to_string(), "postgres.public.journal"), [1, 0, 0], "{step:?}");
    }

    // Out of the incremental to a time, an LSN and the end; out of the full; to before the drop.
    let check = |name: &str, arguments: &[&str], up_to: u64, w: &str| {
        let mut restored = site.restored(name, arguments);
        journal.assert_exactly_up_to(&restored, up_to);
        let sql = match w {
            // It is not there yet, or no more.
            "" => "select to_regclass('w') is null",
            _ => "select count(*), min(id), max(id) from w",
        };
        assert_eq!(restored.query(sql), if w.is_empty() { "t" } else { w }, "{name}");
        let end = (up_to == last.id)
            .then(|| restored.query("select count(*), sum(abalance) from pgbench_accounts"));
        assert!(end.is_none_or(|end| end == accounts), "{name}");
        restored.stop(StopMode::Fast);
    };
    check("time", &["--target-time", &late.committed_at], late.id, "659|1|907");
    check("lsn", &["--target-lsn", &late.lsn_after, "--target-exclusive"], late.id, "659|1|907");
    check("latest", &[], last.id, "");
    check("early", &["--target-time", &early.committed_at], early.id, "");
    check("xid-of-the-full", &["--target-xid", &middle.xid.to_string()], middle.id, "652|1|804");
    check("before-drop", &["--before-drop", "w"], last.id - 1, "659|1|907");

    let place = site.scratch.dir("place");
    let bin = text(cluster.install().bin_dir()).to_owned();
    let check = "select count(*) = 659 from w";
    let xid = late.xid.to_string();
    let drill =
        ["drill", "--scratch", text(&place), "--pg-bin", &bin, "--check", check, "--target-xid", &xid];
    let answer = site.waltide.json(drill);
    assert_eq!(answer["drills"][0]["verdict"], "passed", "{answer:#}");
    assert_eq!(site.waltide.json(["verify"])["faults"], serde_json::json!([]));
    let status = site.waltide.json(["status"]);
    assert_eq!((&status["health"], &status["major"]), (&"ok".into(), &major.into()), "{status:#}");
}
