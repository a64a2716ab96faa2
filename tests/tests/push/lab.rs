//! Segments to push by themselves.

use std::fs;
use std::path::PathBuf;

use waltide_tests::{Cluster, Site, StopMode};

use super::builder;

/// Segments of a cluster that was stopped, apart from it.
pub(crate) struct Lab {
    pub(crate) site: Site,
    pub(crate) cluster: Cluster,
    pub(crate) segments: Vec<String>,
}

impl Lab {
    pub(crate) fn new(label: &str) -> Self {
        let site = Site::new(label);
        let mut cluster = builder(&site, "db").create();
        site.init(&cluster);
        cluster.start();
        cluster.pgbench_init(1);
        cluster.pgbench(&["-t", "400"]);
        let last = cluster.switch_wal();
        let mut segments = cluster.wal_segments();
        segments.retain(|name| *name <= last);
        cluster.stop(StopMode::Fast);
        assert!(segments.len() > 8, "{segments:?}");
        Self { site, cluster, segments }
    }

    pub(crate) fn wal(&self, at: usize) -> Vec<u8> {
        fs::read(self.cluster.data_dir().join("pg_wal").join(&self.segments[at])).unwrap()
    }

    /// Puts a file alone into a directory of its own.
    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let dir = self.site.scratch.fresh_path("lab");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join(name), bytes).unwrap();
        self.site.scratch.give_tree(&dir);
        dir.join(name)
    }

    /// Pushes bytes under a name, and expects a refusal that says this.
    #[track_caller]
    pub(crate) fn refused(&self, name: &str, bytes: &[u8], says: &str) {
        let path = self.file(name, bytes);
        let out = self.site.waltide.fails(1, ["push", path.to_str().unwrap()]);
        assert!(out.stderr.contains(says), "expected {says:?}\n{}", out.describe());
        let object = self.site.object(&self.cluster, name);
        assert!(!object.exists(), "{} was stored", object.display());
    }
}
