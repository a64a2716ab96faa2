//! Incremental and differential backups of real clusters: what they read, what they refer to, what they come back as.

mod chain;
mod copied;
mod map;
mod reasons;
mod site;

use std::time::{Duration, Instant};

use site::{Site, number};

#[test]
fn an_incremental_comes_back_as_a_full_does() {
    let site = Site::new("incremental");
    let cluster = site.start(|b| b);
    cluster.query(
        "create table t (id int primary key, filler text);
         insert into t select n, repeat(md5(n::text), 10) from generate_series(1, 20000) n;
         vacuum t",
    );
    let full = site.backup(&cluster, &[]);
    assert_eq!((full["kind"].as_str(), full["full_because"].as_str()), (Some("full"), None), "{full}");
    cluster.query(
        "update t set filler = 'changed' where id between 5000 and 5020; delete from t where id = 20000",
    );
    let incremental = site.incremental(&cluster);
    assert_eq!(incremental["parent"], full["id"]);
    assert!(number(&incremental, "read_bytes") * 4 < number(&full, "read_bytes"), "{incremental}");
    assert!(number(&incremental, "stored_bytes") * 4 < number(&full, "stored_bytes"), "{incremental}");
    let total = number(&incremental, "cluster_bytes");
    assert_eq!(number(&incremental, "referred_bytes"), total - number(&incremental, "read_bytes"));
    let again = site.full(&cluster);
    site.assert_same(&cluster, &incremental, &again);
    let rows = site.waltide.json(["list"]);
    assert_eq!((&rows[1]["kind"], &rows[1]["parent"]), (&"incremental".into(), &full["id"]), "{rows}");
    site.waltide.ok(["verify"]);
}

#[test]
fn an_interrupted_incremental_leaves_nothing_half_visible() {
    let site = Site::new("incremental-kill");
    let cluster = site.start(|b| b);
    cluster.query("create table t as select generate_series(1, 50000) as id");
    let full = site.backup(&cluster, &[]);
    let change = || cluster.query("update t set id = id where id % 100 = 0");
    change();
    let began = Instant::now();
    site.incremental(&cluster);
    let whole = began.elapsed();
    let rounds = 15;
    let mut killed = 0;
    for round in 0..rounds {
        change();
        let mut running = site.waltide.spawn(site.args(&cluster, &[]));
        // Spread over the whole run.
        let until = Instant::now() + whole * round / rounds + Duration::from_millis(5);
        while running.is_running() && Instant::now() < until {
            std::hint::spin_loop();
        }
        killed += usize::from(running.kill9().status == 137);
        let stored = site.stored(&cluster);
        for id in stored.backups().0 {
            stored.contents(&stored.manifest(&id));
        }
    }
    assert!(killed > 5, "{killed} of {rounds}");
    let last = site.incremental(&cluster);
    assert_ne!(last["parent"], full["id"]);
    site.assert_same(&cluster, &last, &site.full(&cluster));
    site.waltide.ok(["verify"]);
}

#[test]
fn records_over_the_edges_count_where_push_could_not_join_them() {
    let site = Site::new("incremental-edges");
    let cluster = site.start(|b| b);
    // Each segment comes alone, so that no index has the record over its edge.
    let place = site.scratch.dir("alone");
    let place = place.display();
    let alone = site.waltide.archive_command().replace(" push %p", &format!(" push {place}/%f"));
    cluster.set("archive_command", &format!("cp %p {place}/%f && {alone} && rm {place}/%f"));
    cluster.reload();
    cluster.query(
        "create table t (id int, filler text) with (fillfactor = 50);
         alter table t alter filler set storage plain;
         insert into t select n, repeat(md5(n::text), 120) from generate_series(1, 3000) n",
    );
    cluster.query("vacuum (freeze) t");
    site.full(&cluster);
    for part in 0..4 {
        cluster.query(&format!("checkpoint\\; update t set id = id + 1 where id % 4 = {part}"));
    }
    cluster.archive_all();
    let stored = site.stored(&cluster);
    let segments = std::fs::read_dir(stored.path(&format!("{}/00000001", stored.names().wal()))).unwrap();
    let indexes = segments.filter_map(|entry| {
        let object = std::fs::read(entry.unwrap().path()).unwrap();
        Some(waltide_format::archive::StoredSegment::decode(&object).ok()?.index.info)
    });
    let open = indexes.filter(|info| info.pending.is_some_and(|p| !p.joined) && !info.head_joined).count();
    assert!(open > 5, "{open} records run over an edge unjoined");
    let done = site.incremental(&cluster);
    let full = site.full(&cluster);
    site.assert_same(&cluster, &done, &full);
}

#[test]
fn a_standby_is_backed_up_on_what_its_primary_backed_up() {
    let site = Site::new("incremental-standby");
    let cluster = site.start(|b| b);
    cluster.query("create table t as select generate_series(1, 20000) as id");
    let full = site.full(&cluster);
    let standby = cluster.make_standby("standby");
    cluster.query("update t set id = -id where id % 100 = 0");
    cluster.query("checkpoint");
    cluster.archive_all();
    standby.wait_caught_up(&cluster);
    let backup = |kind: &str| -> serde_json::Value {
        let mut running = site.waltide.spawn(site.args(&standby, &["--type", kind, "--json"]));
        while running.is_running() {
            cluster.switch_wal();
        }
        serde_json::from_str(&running.wait().assert_ok().stdout).unwrap()
    };
    let done = backup("incremental");
    assert_eq!((done["kind"].as_str(), &done["parent"]), (Some("incremental"), &full["id"]), "{done}");
    assert_eq!(done["from_standby"], true);
    // Nothing new was replayed that a backup could start from.
    let again = backup("incremental");
    let why = again["full_because"].as_str().unwrap();
    assert!(why.contains("a standby has to replay a checkpoint in between"), "{again}");
    site.assert_same(&cluster, &done, &site.full(&cluster));
}

#[test]
fn a_differential_is_made_against_the_last_full() {
    let site = Site::new("differential");
    let cluster = site.start(|b| b);
    cluster.query("create table t as select generate_series(1, 100000) as id");
    let full = site.full(&cluster);
    for part in 0..3 {
        cluster
            .query(&format!("update t set id = id where id between {part} * 1000 and {part} * 1000 + 100"));
        site.incremental(&cluster);
    }
    // Two at once do not see one another.
    let kinds = ["incremental", "differential"];
    let both = kinds.map(|kind| site.waltide.spawn(site.args(&cluster, &["--type", kind, "--json"])));
    for (kind, running) in kinds.iter().zip(both) {
        let done: serde_json::Value = serde_json::from_str(&running.wait().assert_ok().stdout).unwrap();
        assert_eq!(done["kind"], *kind, "{done}");
    }
    let done = site.backup(&cluster, &["--type", "differential"]);
    assert_eq!((done["kind"].as_str(), &done["parent"]), (Some("differential"), &full["id"]), "{done}");
    assert_eq!(site.manifest(&cluster, &done).maps.len(), 2);
    let text = site.waltide.ok(["info", done["id"].as_str().unwrap()]).stdout;
    assert!(
        text.contains("differential, by waltide backup") && text.contains(full["id"].as_str().unwrap()),
        "{text}"
    );
    site.assert_same(&cluster, &done, &site.full(&cluster));
}
