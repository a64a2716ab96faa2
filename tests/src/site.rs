//! An archive, the binary that works on it, and where everything of a test lies.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use waltide_format::SystemId;
use waltide_format::archive::{Layout, StoredSegment, SystemLayout};

use crate::oracle::ControlData;
use crate::stored::Stored;
use crate::{Cluster, ClusterBuilder, Scratch, Waltide};

/// A test's archive with the cluster `main` in it, and the way to it.
#[derive(Debug)]
pub struct Site {
    /// Where everything of the test lies.
    pub scratch: Scratch,
    /// The archive's directory.
    pub archive: PathBuf,
    /// The binary, told of the archive.
    pub waltide: Waltide,
}

impl Site {
    /// An archive without anything in it.
    pub fn new(label: &str) -> Self {
        let scratch = Scratch::new(label);
        let archive = scratch.dir("archive");
        let waltide = Waltide::new(&scratch).archive(&archive).cluster("main");
        Self { scratch, archive, waltide }
    }

    /// A cluster that ships to the archive once it is in it.
    pub fn builder(&self, name: &str) -> ClusterBuilder {
        Cluster::builder(name).scratch(&self.scratch).archive_command(&self.waltide.archive_command())
    }

    /// A running cluster that is in the archive and ships to it.
    #[track_caller]
    pub fn start(&self, builder: ClusterBuilder) -> Cluster {
        let mut cluster = builder.create();
        self.init(&cluster);
        cluster.start();
        cluster
    }

    /// The same of a cluster `db` with segments of 4 MiB, which `more` may change.
    #[track_caller]
    pub fn start_db(&self, more: impl FnOnce(ClusterBuilder) -> ClusterBuilder) -> Cluster {
        self.start(more(self.builder("db").segment_mb(4)))
    }

    /// Makes a cluster known to the archive.
    #[track_caller]
    pub fn init(&self, cluster: &Cluster) {
        self.waltide.ok(["init", "--data-dir", text(cluster.data_dir())]);
    }

    /// A full backup; what the command prints.
    #[track_caller]
    pub fn back_up(&self, cluster: &Cluster) -> Value {
        self.waltide.json(["backup", "--data-dir", text(cluster.data_dir())])
    }

    /// Restores into a fresh directory and starts the server, which archives nothing.
    #[track_caller]
    pub fn restored(&self, name: &str, target: &[&str]) -> Cluster {
        let data_dir = self.scratch.fresh_path(name);
        let fixed = ["restore", "--data-dir", text(&data_dir), "--archive-mode", "off"];
        self.waltide.ok(fixed.iter().chain(target));
        let mut cluster = Cluster::with_data_dir(name, &self.scratch, &data_dir);
        cluster.start();
        cluster.wait_promoted();
        cluster
    }

    /// A backup, by what the command that made it printed, put together without the code that restores, started and
    /// recovered to the end of the archive.
    #[track_caller]
    pub fn materialised(&self, stored: &Stored, backup: &Value, name: &str) -> Cluster {
        let id = backup["id"].as_str().and_then(|id| id.parse().ok()).expect("it names the backup");
        let manifest = stored.manifest(&id);
        let mut cluster = stored.materialise(&manifest, &self.scratch, name, &self.waltide.restore_command());
        cluster.start();
        cluster.wait_promoted();
        cluster
    }

    /// The names of the cluster's objects.
    pub fn names(&self, cluster: &Cluster) -> SystemLayout {
        let id = ControlData::read(cluster.data_dir()).system_identifier();
        Layout::new("main").expect("it is a name").system(SystemId::from(id))
    }

    /// The object of a file that PostgreSQL archives.
    #[track_caller]
    pub fn object(&self, cluster: &Cluster, file: &str) -> PathBuf {
        self.archive
            .join(self.names(cluster).wal_file(file.parse().expect("PostgreSQL archives such a file")))
    }

    /// Every stored segment and `.partial` of a cluster, whole and checked, by object name.
    #[track_caller]
    pub fn segments(&self, cluster: &Cluster) -> BTreeMap<String, StoredSegment> {
        let mut found = BTreeMap::new();
        for timeline in read_dir(&self.archive.join(self.names(cluster).wal())) {
            for object in read_dir(&timeline) {
                let name = object.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
                if !name.contains(".backup") && !name.contains('#') {
                    let bytes = fs::read(&object).expect("it is there");
                    let stored = StoredSegment::decode(&bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
                    found.insert(name, stored);
                }
            }
        }
        found
    }
}

/// A path as an argument.
#[track_caller]
pub fn text(path: &Path) -> &str {
    path.to_str().expect("the harness makes no other paths")
}

/// What lies in a directory, in order; nothing where there is none.
pub fn read_dir(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    let mut paths: Vec<_> = entries.map(|e| e.expect("it can be read").path()).collect();
    paths.sort();
    paths
}
