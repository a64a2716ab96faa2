//! Archives of local files, read object by object with nothing but the format, so that what was stored is judged
//! without the code that restores.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use waltide_format::archive::{ExtentMap, Layout, Manifest, PackBuilder, SystemLayout};
use waltide_format::engines::postgres::cluster::tablespace_map_text;
use waltide_format::{BackupId, SystemId};

use crate::{Cluster, Scratch, oracle::ControlData};

/// One system of the cluster `main` in an archive.
#[derive(Debug, Clone)]
pub struct Stored {
    root: PathBuf,
    names: SystemLayout,
}

impl Stored {
    /// The system that `cluster` is, in the archive at `root`.
    pub fn of(cluster: &Cluster, root: &Path) -> Self {
        let id = SystemId::from(ControlData::read(cluster.data_dir()).system_identifier());
        let names = Layout::new("main").expect("a legal name").system(id);
        Self { root: root.to_owned(), names }
    }

    /// Where an object lies.
    pub fn path(&self, object: &str) -> PathBuf {
        self.root.join(object)
    }

    /// The names of its objects.
    pub fn names(&self) -> &SystemLayout {
        &self.names
    }

    /// The backups that have a manifest, oldest first, and the ones that were only announced.
    pub fn backups(&self) -> (Vec<BackupId>, Vec<BackupId>) {
        let mut names: Vec<String> = match fs::read_dir(self.path(&self.names.backups())) {
            Ok(entries) => {
                entries.map(|e| e.expect("readable").file_name().to_string_lossy().into_owned()).collect()
            }
            Err(_) => Vec::new(),
        };
        names.sort();
        let complete: Vec<BackupId> = names.iter().filter_map(|name| name.parse().ok()).collect();
        let started = names.iter().filter_map(|name| name.strip_suffix(".started")?.parse().ok());
        let announced = started.filter(|id| !complete.contains(id)).collect();
        (complete, announced)
    }

    /// A backup's manifest.
    #[track_caller]
    pub fn manifest(&self, id: &BackupId) -> Manifest {
        let path = self.path(&self.names.manifest(id));
        let object = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Manifest::decode(&object).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    /// Every byte of a backup's files, by path, out of packs that are checked whole.
    #[track_caller]
    pub fn contents(&self, manifest: &Manifest) -> BTreeMap<String, Vec<u8>> {
        let maps: Vec<ExtentMap> = manifest
            .maps
            .iter()
            .map(|name| {
                let object = fs::read(self.path(&self.names.map(name))).expect("a map is there");
                ExtentMap::decode(&object).expect("a map is whole")
            })
            .collect();
        let packs: BTreeSet<&String> = maps.iter().flat_map(|map| &map.packs).collect();
        let packs: BTreeMap<&String, Vec<u8>> = packs
            .into_iter()
            .map(|name| {
                let object = fs::read(self.path(&self.names.pack(name))).expect("a pack is there");
                PackBuilder::check(&object).expect("a pack is whole");
                (name, object)
            })
            .collect();
        let mut files = BTreeMap::new();
        for file in &manifest.files {
            let mut bytes = vec![0; usize::try_from(file.bytes).expect("small enough for a test")];
            for (map, number) in &file.extents {
                let map = &maps[*map as usize];
                for extent in &map.files[*number as usize] {
                    let stored: &[u8] = match extent.stored_bytes {
                        0 => &[],
                        n => {
                            let pack = &packs[&map.packs[extent.pack as usize]];
                            let at = usize::try_from(extent.offset).expect("inside the pack");
                            &pack[at..at + n as usize]
                        }
                    };
                    let raw = extent.decode_frame(stored).unwrap_or_else(|e| panic!("{}: {e}", file.path));
                    let at = usize::try_from(extent.file_offset()).expect("inside the file");
                    bytes[at..at + raw.len()].copy_from_slice(&raw);
                }
            }
            files.insert(file.path.clone(), bytes);
        }
        files
    }

    /// Puts a backup's files into a new directory, its tablespaces beside it, and makes it recover as far as
    /// `restore_command` brings it; not started.
    #[track_caller]
    pub fn materialise(
        &self,
        manifest: &Manifest,
        scratch: &Scratch,
        name: &str,
        restore_command: &str,
    ) -> Cluster {
        let to = scratch.dir(name);
        fs::create_dir_all(to.join("pg_tblspc")).expect("the scratch can be written");
        let mut links = Vec::new();
        for tablespace in &manifest.tablespaces {
            let place = scratch.dir(&format!("{name}-{}", tablespace.oid));
            symlink(&place, to.join(format!("pg_tblspc/{}", tablespace.oid))).expect("a new link");
            links.push((tablespace.oid, place.display().to_string()));
        }
        let mode = |mode| fs::Permissions::from_mode(mode);
        for directory in &manifest.directories {
            fs::create_dir_all(to.join(&directory.path)).expect("its parents come first");
            fs::set_permissions(to.join(&directory.path), mode(directory.mode)).expect("we made it");
        }
        let contents = self.contents(manifest);
        // What a standby brings along would make it follow its primary again.
        for file in manifest.files.iter().filter(|file| file.path != "standby.signal") {
            let path = to.join(&file.path);
            let made = fs::File::create(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            made.set_len(file.bytes).expect("space is left");
            let bytes = &contents[&file.path];
            for (at, part) in (0u64..).step_by(8192).zip(bytes.chunks(8192)) {
                if part.iter().any(|b| *b != 0) {
                    made.write_all_at(part, at).expect("space is left");
                }
            }
            fs::set_permissions(&path, mode(file.mode)).expect("we made it");
        }
        fs::write(to.join("backup_label"), &manifest.backup_label).expect("space is left");
        if !links.is_empty() {
            let links = links.iter().map(|(oid, place)| (*oid, place.as_str()));
            fs::write(to.join("tablespace_map"), tablespace_map_text(links)).expect("space is left");
        }
        fs::write(to.join("recovery.signal"), "").expect("space is left");
        scratch.give_tree(&to);
        for tablespace in &manifest.tablespaces {
            scratch.give_tree(&scratch.join(format!("{name}-{}", tablespace.oid)));
        }
        let cluster = Cluster::with_data_dir(name, scratch, to);
        cluster.set("archive_mode", "off");
        cluster.set("restore_command", restore_command);
        cluster
    }
}
