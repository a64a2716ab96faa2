//! Work for a cluster that a test can check afterwards.

use crate::oracle::parse_lsn;
use crate::{Cluster, Result};
use std::path::PathBuf;

/// The settings that `every_rmgr.sql` needs.
pub const EVERY_RMGR_SETTINGS: &[(&str, &str)] =
    &[("track_commit_timestamp", "on"), ("max_prepared_transactions", "10")];

/// The names of the resource managers of PostgreSQL 15, as pg_waldump prints them, in order of their number.
pub const RMGRS: [&str; 22] = [
    "XLOG",
    "Transaction",
    "Storage",
    "CLOG",
    "Database",
    "Tablespace",
    "MultiXact",
    "RelMap",
    "Standby",
    "Heap2",
    "Heap",
    "Btree",
    "Hash",
    "Gin",
    "Gist",
    "Sequence",
    "SPGist",
    "BRIN",
    "CommitTs",
    "ReplicationOrigin",
    "Generic",
    "LogicalMessage",
];

/// Makes WAL of every resource manager, in the database `postgres`, once per cluster. The cluster needs
/// [`EVERY_RMGR_SETTINGS`].
#[track_caller]
pub fn every_rmgr(cluster: &Cluster) {
    let tablespace = cluster.scratch().dir(&format!("{}-every-rmgr", cluster.name()));
    every_rmgr_with(cluster, &tablespace.display().to_string());
}

/// The same, with the tablespace at a place of one's own; an empty one lies in the data directory, which the cluster has
/// to allow (`allow_in_place_tablespaces`).
#[track_caller]
pub fn every_rmgr_with(cluster: &Cluster, tablespace: &str) {
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("sql/every_rmgr.sql");
    let run = cluster.sql_file_with("postgres", &script, &[("tablespace", tablespace)]);
    run.unwrap_or_else(|e| panic!("{e}"));
}

/// One transaction of a [`Journal`], with every name that a recovery target can call it by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The row it inserted: 1, 2, 3 …
    pub id: u64,
    /// Its transaction.
    pub xid: u64,
    /// When it was committed, in PostgreSQL's form, to the microsecond, UTC: the commit record's own time
    /// where track_commit_timestamp is on, else a moment after it and before the next step.
    pub committed_at: String,
    /// The WAL position before it: `recovery_target_lsn` with this stops before its commit.
    pub lsn_before: String,
    /// The WAL position after its commit record: `recovery_target_lsn` with this has it, and not the next.
    pub lsn_after: String,
    /// The timeline it was written on.
    pub timeline: u32,
}

impl Step {
    /// [`Step::lsn_after`] as a number.
    pub fn end(&self) -> u64 {
        parse_lsn(&self.lsn_after).expect("PostgreSQL printed it")
    }
}

/// Transactions of one row each, remembered outside the database, so that a test can say "restored to this
/// target, the rows are exactly these". Clone it where histories part.
#[derive(Clone, Debug)]
pub struct Journal {
    db: String,
    steps: Vec<Step>,
}

impl Journal {
    /// Makes the table `journal` in the database `postgres`.
    #[track_caller]
    pub fn create(cluster: &Cluster) -> Self {
        Self::create_in(cluster, "postgres")
    }

    /// Makes the table `journal` in this database.
    #[track_caller]
    pub fn create_in(cluster: &Cluster, db: &str) -> Self {
        // The number is ours: a sequence leaves gaps after a crash.
        cluster
            .sql(
                db,
                "create table journal (id bigint primary key, xid xid8 not null,
                    written_at timestamptz not null default clock_timestamp(), note text not null)",
            )
            .unwrap_or_else(|e| panic!("{e}"));
        Self { db: db.to_owned(), steps: Vec::new() }
    }

    /// Inserts the next row in a transaction of its own.
    #[track_caller]
    pub fn step(&mut self, cluster: &Cluster, note: &str) -> Step {
        let step = self.try_step(cluster, note).unwrap_or_else(|e| panic!("{e}"));
        self.steps.push(step.clone());
        step
    }

    fn try_step(&self, cluster: &Cluster, note: &str) -> Result<Step> {
        let id = self.len() + 1;
        let note = note.replace('\'', "''");
        let answer = cluster.sql(
            &self.db,
            &format!(
                "select pg_current_wal_insert_lsn() as before \\gset\n\
                 insert into journal (id, xid, note) values ({id}, pg_current_xact_id(), '{note}')
                     returning xid as xid \\gset\n\
                 select pg_current_wal_lsn() as after \\gset\n\
                 select :'xid', :'before', :'after', pg_walfile_name(:'after'),
                     to_char(case when current_setting('track_commit_timestamp') = 'on'
                         then pg_xact_commit_timestamp(:'xid'::xid8::xid) else clock_timestamp() end
                         at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || '+00'"
            ),
        )?;
        let fields: Vec<&str> = answer.split('|').collect();
        let [xid, before, after, segment, time] = fields.as_slice() else {
            panic!("unexpected answer: {answer}")
        };
        Ok(Step {
            id,
            xid: xid.parse().expect("an xid8 is a number"),
            committed_at: (*time).to_owned(),
            lsn_before: (*before).to_owned(),
            lsn_after: (*after).to_owned(),
            timeline: u32::from_str_radix(&segment[..8], 16)
                .expect("a segment's name starts with its timeline"),
        })
    }

    /// Several steps; the last of them.
    #[track_caller]
    pub fn steps_on(&mut self, cluster: &Cluster, count: u64) -> Step {
        assert!(count > 0, "no steps asked for");
        for _ in 0..count {
            self.step(cluster, "one of several");
        }
        self.steps.last().expect("there was one").clone()
    }

    /// All steps so far, in order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// How many steps there are, which is the number of the last.
    pub fn len(&self) -> u64 {
        u64::try_from(self.steps.len()).expect("it is small")
    }

    /// Whether nothing has been written.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// The history of a cluster restored to just after step `id`.
    pub fn forked_after(&self, id: u64) -> Self {
        let kept = self.steps.iter().filter(|step| step.id <= id).cloned().collect();
        Self { db: self.db.clone(), steps: kept }
    }

    /// The numbers of the rows that a cluster has.
    #[track_caller]
    pub fn rows(&self, cluster: &Cluster) -> Vec<u64> {
        let answer =
            cluster.sql(&self.db, "select id from journal order by id").unwrap_or_else(|e| panic!("{e}"));
        answer.lines().map(|line| line.parse().expect("an id is a number")).collect()
    }

    /// Panics unless the cluster has exactly the rows up to and with this one, written by our transactions.
    #[track_caller]
    pub fn assert_exactly_up_to(&self, cluster: &Cluster, last: u64) {
        let expected: Vec<(u64, u64)> =
            self.steps.iter().take_while(|step| step.id <= last).map(|step| (step.id, step.xid)).collect();
        let answer = cluster
            .sql(&self.db, "select id, xid from journal order by id")
            .unwrap_or_else(|e| panic!("{e}"));
        let found: Vec<(u64, u64)> = answer
            .lines()
            .map(|line| {
                let (id, xid) = line.split_once('|').expect("two columns");
                (id.parse().expect("a number"), xid.parse().expect("a number"))
            })
            .collect();
        assert!(
            found == expected,
            "expected the journal up to row {last}, found up to {:?}: {found:?}\nlog of {}:\n{}",
            found.last(),
            cluster.name(),
            cluster.log_tail()
        );
    }
}
