//! Work drawn by chance that touches files in every way there is: pages, forks, relations, databases, tablespaces.

use crate::Cluster;

/// A source of chance that repeats itself from its seed.
#[derive(Debug)]
pub struct Chance(u64);

impl Chance {
    /// From `SEED` in the environment, else from the clock; says which, so that a run can be repeated.
    #[allow(clippy::new_without_default)] // it says what it made
    pub fn new() -> Self {
        let now = || std::time::UNIX_EPOCH.elapsed().expect("after 1970").subsec_nanos().into();
        let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(now);
        eprintln!("SEED={seed}");
        Self(seed)
    }

    /// A number from zero to before `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % n
    }

    /// One of them.
    pub fn of<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[usize::try_from(self.below(words.len() as u64)).unwrap()]
    }
}

/// What the load needs of the server.
pub const SETTINGS: &[(&str, &str)] = &[("max_prepared_transactions", "10")];

/// The tables, indexes of every kind, databases and tablespaces that the load works on.
pub fn prepare(cluster: &Cluster) {
    for space in ["one", "two"] {
        cluster.create_tablespace(space);
    }
    cluster.query(
        "create table t (id int primary key, k int, filler text) with (fillfactor = 80);
         insert into t select n, n, repeat(md5(n::text), 6) from generate_series(1, 5000) n;
         create table moving (id int primary key, filler text);
         insert into moving select n, md5(n::text) from generate_series(1, 2000) n;
         create table cut (id int);
         insert into cut select generate_series(1, 40000);
         create table kinds (k int, words text[], p point, s text);
         create index on kinds using hash (k);
         create index on kinds using gin (words);
         create index on kinds using gist (p);
         create index on kinds using spgist (s);
         create index on kinds using brin (k) with (pages_per_range = 1);
         insert into kinds select n, array['w' || n % 50, 'u' || n], point(n % 71, n % 97), 'p/' || md5(n::text)
             from generate_series(1, 2000) n;
         create unlogged table passing (id int primary key);
         create sequence counter",
    );
    cluster.query("create database other");
    cluster.sql("other", "create table t as select n as id from generate_series(1, 5000) n").unwrap();
}

/// Does one thing drawn by chance.
pub fn step(cluster: &Cluster, chance: &mut Chance) {
    let n = chance.below(97);
    let space = chance.of(&["pg_default", "one", "two"]);
    let run = |text: &str| {
        for statement in text.split("\n\n") {
            cluster.query(statement);
        }
    };
    match chance.below(16) {
        0 => run(&format!("update t set k = k + 1, filler = md5(random()::text) where id % 97 = {n}")),
        1 => run(&format!(
            "delete from t where id > {n} * 40\n\nvacuum t\n\n
             insert into t select n, n, repeat(md5(random()::text), 5) from generate_series({n} * 40 + 1, 5000) n"
        )),
        2 => run(&format!(
            "truncate cut; insert into cut select generate_series(1, {n} * 400)\n\nvacuum (freeze) cut"
        )),
        3 => run(&format!(
            "drop table if exists again; create table again as select n as id from generate_series(1, {n} * 100) n"
        )),
        4 => {
            run("drop database if exists copied");
            let strategy = chance.of(&["file_copy", "wal_log"]);
            run(&format!("create database copied template other strategy {strategy} tablespace {space}"));
            cluster.sql("copied", "update t set id = -id where id % 10 = 0").unwrap();
        }
        5 => run("drop database if exists copied"),
        6 => run(&format!(
            "alter table moving set tablespace {space}; update moving set filler = '{n}' where id % 97 = {n}"
        )),
        7 => run(&format!("alter database other set tablespace {space}")),
        8 => run(&format!(
            "insert into kinds select n, array['w' || n % 50, 'v' || n], point(n % 71, {n}), 'q/' || md5(n::text)
                 from generate_series(1, 300) n\n\ndelete from kinds where k % 97 = {n}\n\nvacuum kinds"
        )),
        9 => run(chance.of(&["vacuum full moving", "cluster moving using moving_pkey", "reindex table kinds"])),
        10 => run("vacuum (freeze) t"),
        11 => run(&format!("select count(nextval('counter')) from generate_series(1, {n})")),
        12 => run(&format!(
            "insert into passing select {n} * 100 + n from generate_series(1, 50) n on conflict do nothing\n\n
             alter table passing set {}",
            chance.of(&["logged", "unlogged"])
        )),
        13 => run("begin; create table undone as select generate_series(1, 3000) as id;
                   savepoint s; update t set k = 0 where id < 50; rollback to s; delete from t where id = 77; rollback"),
        14 => run(&format!(
            "begin; update t set k = -k where id % 97 = {n}; prepare transaction 'p'\n\n{}",
            chance.of(&["commit prepared 'p'", "rollback prepared 'p'"])
        )),
        _ => run("select sum(k) from t\n\ncheckpoint"),
    }
}
