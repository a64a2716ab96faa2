//! An archive, a cluster that ships to it, and what the tests ask of them.

use std::path::PathBuf;

use serde_json::Value;
use waltide_format::archive::Manifest;
use waltide_tests::stored::Stored;
use waltide_tests::{Cluster, ClusterBuilder, Output, Scratch, StopMode, Waltide, pages};

/// An archive, and the binary that writes to it.
pub(crate) struct Site {
    pub(crate) scratch: Scratch,
    pub(crate) archive: PathBuf,
    pub(crate) waltide: Waltide,
}

impl Site {
    pub(crate) fn new(label: &str) -> Self {
        let scratch = Scratch::new(label);
        let archive = scratch.dir("archive");
        let waltide = Waltide::new(&scratch).archive(&archive).cluster("main");
        Self { scratch, archive, waltide }
    }

    /// A cluster that ships to the archive; nothing but the tests touches its pages.
    pub(crate) fn start(&self, builder: impl FnOnce(ClusterBuilder) -> ClusterBuilder) -> Cluster {
        let base = Cluster::builder("db").scratch(&self.scratch).segment_mb(1).setting("autovacuum", "off");
        let mut cluster = builder(base.archive_command(&self.waltide.archive_command())).create();
        self.waltide.ok(["init", "--data-dir", cluster.data_dir().to_str().unwrap()]);
        cluster.start();
        cluster
    }

    pub(crate) fn args(&self, cluster: &Cluster, more: &[&str]) -> Vec<String> {
        let data_dir = cluster.data_dir().to_str().unwrap();
        [&["backup", "--data-dir", data_dir], more].concat().into_iter().map(str::to_owned).collect()
    }

    /// A backup of the default type.
    #[track_caller]
    pub(crate) fn backup(&self, cluster: &Cluster, more: &[&str]) -> Value {
        self.waltide.json(self.args(cluster, more))
    }

    /// A backup of the default type that has to be an incremental.
    #[track_caller]
    pub(crate) fn incremental(&self, cluster: &Cluster) -> Value {
        let done = self.backup(cluster, &[]);
        assert_eq!(done["kind"], "incremental", "{done}");
        done
    }

    #[track_caller]
    pub(crate) fn full(&self, cluster: &Cluster) -> Value {
        self.backup(cluster, &["--type", "full"])
    }

    /// A full backup though an incremental was asked for, and what it says of that.
    #[track_caller]
    pub(crate) fn falls_back(&self, cluster: &Cluster) -> String {
        let out: Output =
            self.waltide.runner(self.args(cluster, &["--type", "incremental", "--json"])).run().assert_ok();
        let done: Value = serde_json::from_str(&out.stdout).unwrap();
        assert_eq!((done["kind"].as_str(), done["parent"].as_str()), (Some("full"), None), "{done}");
        let why = done["full_because"].as_str().unwrap().to_owned();
        assert!(out.stderr.contains(&format!("a full backup is made: {why}")), "{out:?}");
        assert_eq!(self.manifest(cluster, &done).full_because.as_deref(), Some(why.as_str()));
        why
    }

    pub(crate) fn stored(&self, cluster: &Cluster) -> Stored {
        Stored::of(cluster, &self.archive)
    }

    #[track_caller]
    pub(crate) fn manifest(&self, cluster: &Cluster, backup: &Value) -> Manifest {
        self.stored(cluster).manifest(&id(backup).parse().unwrap())
    }

    /// A backup restored, recovered by PostgreSQL up to `lsn`, and shut down there with every page on disk.
    #[track_caller]
    pub(crate) fn recovered(&self, backup: &Value, lsn: &str, name: &str) -> Cluster {
        let dir = self.scratch.dir(name);
        let mut args = vec!["restore".to_owned(), "--data-dir".to_owned(), dir.display().to_string()];
        let spaces = backup["tablespaces"].as_array().unwrap();
        for space in spaces {
            let place = self.scratch.dir(&format!("{name}-{}", space["oid"]));
            args.push("--tablespace-map".to_owned());
            args.push(format!("{}={}", space["oid"], place.display()));
        }
        for arg in ["--backup", id(backup), "--target-lsn", lsn, "--target-action", "shutdown"] {
            args.push(arg.to_owned());
        }
        args.extend(["--archive-mode".to_owned(), "off".to_owned()]);
        self.waltide.ok(&args);
        let mut cluster = Cluster::with_data_dir(name, &self.scratch, dir);
        for (key, value) in [("hot_standby", "off"), ("checkpoint_timeout", "1h"), ("max_wal_size", "64GB")] {
            cluster.set(key, value);
        }
        cluster.spawn();
        cluster.wait_stopped();
        assert!(cluster.log_text().contains("shutting down"), "{}", cluster.log_text());
        cluster
    }

    /// Panics unless both backups come to the same pages at the same position of the log, which has a checkpoint before
    /// it: otherwise a recovery that is shut down leaves its pages in memory.
    #[track_caller]
    pub(crate) fn assert_same(&self, cluster: &Cluster, one: &Value, other: &Value) {
        cluster.query("checkpoint");
        cluster.query("select pg_logical_emit_message(false, 'waltide', 'before the target')");
        let lsn = cluster.query("select pg_current_wal_insert_lsn()");
        cluster.query("select pg_logical_emit_message(false, 'waltide', 'the target')");
        cluster.archive_all();
        let [one, other] = [one, other].map(|backup| {
            let name = self.scratch.fresh_path("recovered");
            self.recovered(backup, &lsn, name.file_name().unwrap().to_str().unwrap())
        });
        let (pages, differences) = pages::compare(one.data_dir(), other.data_dir());
        assert!(pages > 1000 && differences.is_empty(), "{pages} pages: {differences:#?}");
    }
}

pub(crate) fn id(backup: &Value) -> &str {
    backup["id"].as_str().unwrap()
}

pub(crate) fn number(backup: &Value, field: &str) -> u64 {
    backup[field].as_u64().unwrap_or_else(|| panic!("no {field} in {backup}"))
}

/// Stops it, changes how it starts, starts it again.
pub(crate) fn restart_with(cluster: &mut Cluster, settings: &[(&str, &str)]) {
    cluster.stop(StopMode::Fast);
    for (key, value) in settings {
        cluster.set(key, value);
    }
    cluster.start();
}
