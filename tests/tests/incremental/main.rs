//! Incremental and differential backups of real clusters: what they read, what they refer to, what they come back as.

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
