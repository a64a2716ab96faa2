//! A byte of the archive that has changed is never handed over: every read of the object is refused by its name, or
//! does not need the byte.

#[allow(dead_code)] // not all of it is used here
#[path = "catalogue/sample.rs"]
mod sample;

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use object_store::memory::InMemory;
use sample::{SYSTEM, Sample, hour, later};
use waltide_archiver::catalog::load;
use waltide_archiver::init::{make_archive, make_cluster};
use waltide_format::archive::{
    Envelope, Extent, ExtentMap, FOOTER_BYTES, Footer, HEADER_BYTES, Keep, Layout, ManifestFile, ObjectKind,
    PackBuilder, Rates, WalObject,
};
use waltide_format::engines::postgres::cluster::ControlFile;
use waltide_format::{BackupId, WalFileName};
use waltide_replay::engines::postgres::{
    ArchivedIndexes, FetchOutcome, FetchRequest, Fetcher, Owner, ReadAhead, Replay, Restore, RestoreOptions,
};
use waltide_replay::{Goal, Target, plan};
use waltide_storage::{Archive, NoProgress, Progress};

/// Where restores go: nothing of them need outlive a crash here.
fn place() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

/// An error with all its causes, as the command line prints it.
fn told(e: &dyn Error) -> String {
    let causes = std::iter::successors(e.source(), |cause| (*cause).source());
    causes.fold(e.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// The pg_control of a real server, made that of the sample's system.
fn control_file() -> Vec<u8> {
    let packed = include_bytes!("../golden/wal/15/pg_control.zst");
    let mut bytes = zstd::bulk::decompress(packed, 1 << 16).unwrap();
    let crc_at = |bytes: &[u8]| {
        let holds = |at: &usize| bytes[*at..at + 4] == crc32c::crc32c(&bytes[..*at]).to_le_bytes();
        (8..512).find(holds).unwrap()
    };
    let at = crc_at(&bytes);
    bytes[..8].copy_from_slice(&SYSTEM.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..at]);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(ControlFile::decode(&bytes).unwrap().system_id, SYSTEM.into());
    bytes
}

/// Bytes that do not compress.
fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..count).map(next).collect()
}

/// An archive with every kind of object that a restore of timeline 2 to its end needs, and some that it does not.
struct Site {
    sample: Sample,
    files: BTreeMap<String, Vec<u8>>,
    /// Where each frame of the pack lies, and whether it is stored as it is.
    frames: Vec<(std::ops::Range<usize>, bool)>,
    pack: String,
}

/// What a restore and the recovery behind it were given.
#[derive(Debug, Clone, PartialEq)]
struct Given {
    backup: BackupId,
    stop: String,
    files: BTreeMap<PathBuf, Vec<u8>>,
}

impl Site {
    /// The last of the cluster's files has so many bytes.
    async fn new(large: usize) -> Self {
        let sample = Sample::bare(Archive::from_store(Arc::new(InMemory::new()), "memory")).await;
        let last = sample.put_timelines().await;
        for commits in [1, 2] {
            sample.put_partial(8, last, commits).await;
        }
        sample
            .put_file("000000010000000000000005.00000028.backup", b"START WAL LOCATION: 0/5\n".into())
            .await;
        let files = BTreeMap::from([
            ("PG_VERSION".to_owned(), b"15\n".to_vec()),
            ("base/5/100".to_owned(), noise(large)),
            ("global/pg_control".to_owned(), control_file()),
            ("postgresql.conf".to_owned(), b"port = 1\n".to_vec()),
        ]);
        let id = BackupId::new(hour(5), 5);
        let mut pack = PackBuilder::default();
        let mut map = ExtentMap { packs: vec![format!("{id}-0")], files: Vec::new() };
        let (mut listed, mut frames) = (Vec::new(), Vec::new());
        for (n, (path, bytes)) in (0..).zip(&files) {
            let mut extents = Vec::new();
            for (i, raw) in (0..).zip(bytes.chunks(16 * 8192)) {
                let frame = PackBuilder::frame(raw, 1);
                let offset = pack.push(&frame);
                let range = offset as usize..offset as usize + frame.len();
                frames.push((range, path == "base/5/100"));
                extents.push(Extent {
                    pack: 0,
                    offset,
                    stored_bytes: frame.len() as u32,
                    first_block: i * 16,
                    raw_bytes: raw.len() as u32,
                    crc: crc32fast::hash(raw),
                });
            }
            map.files.push(extents);
            let bytes = bytes.len() as u64;
            listed.push(ManifestFile {
                path: path.clone(),
                bytes,
                mode: 0o600,
                modified: 0,
                extents: vec![(0, n)],
            });
        }
        let names = sample.names();
        let mut manifest = sample.manifest(&id, 5, 6, listed);
        manifest.directories = ["base", "base/5", "global", "pg_wal"]
            .map(|path| waltide_format::archive::ManifestDirectory { path: path.into(), mode: 0o700 })
            .into();
        let pack_path = names.pack(&format!("{id}-0"));
        sample.put(&pack_path, pack.finish()).await;
        sample.put(&names.map(id.as_str()), map.encode()).await;
        sample.put(&names.manifest(&id), manifest.encode()).await;
        let keep = Keep { since: hour(6), reason: Some("audit".into()), standalone: false };
        sample.put(&names.keep(&id), Envelope::seal_json(ObjectKind::Json, &keep)).await;
        sample.put_announcement(&BackupId::new(hour(7), 7), 7).await;
        Self { sample, files, frames, pack: pack_path }
    }

    /// Plans and carries out a restore to the end of the archive, and fetches what recovery will ask for.
    async fn restore(&self) -> Result<Given, String> {
        let Sample { archive, layout } = &self.sample;
        let catalog = load(archive, layout, None, None, 2).await.map_err(|e| told(&e))?;
        let source = ArchivedIndexes::new(archive.clone()).with_merged(self.sample.names());
        let plan = plan(&catalog, &Goal::new(Target::Latest), None, Rates::default(), &source).await;
        let plan = plan.map_err(|e| told(&e))?;
        let place = place();
        let data_dir = place.path().join("data");
        let options = RestoreOptions {
            selection: None,
            data_dir: data_dir.clone(),
            tablespace_map: Vec::new(),
            made: Vec::new(),
            allow_clear: false,
            delta: false,
            standby: false,
            replay: Replay::Server(None),
            archive_off: false,
            // The tests may run as root, who starts no server.
            owner: Owner::parse("65534:65534").filter(|_| rustix::process::geteuid().is_root()),
            restore_command: "waltide fetch %f %p".into(),
            settings: Vec::new(),
            threads: 2,
            files_only: false,
        };
        let restore = Restore::prepare(archive, layout, &plan, options).await.map_err(|e| told(&e))?;
        let progress: Arc<dyn Progress> = Arc::new(NoProgress);
        restore.carry_out(&progress).await.map_err(|e| told(&e))?;
        for segment in plan.segments.iter().filter(|s| !s.partial) {
            self.fetch(&WalFileName::Segment(segment.name), &data_dir).await?;
        }
        self.fetch(&"00000002.history".parse().unwrap(), &data_dir).await?;
        let mut files = BTreeMap::new();
        let mut left = vec![data_dir.clone()];
        while let Some(dir) = left.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    left.push(path);
                } else {
                    let bytes = fs::read(&path).unwrap();
                    files.insert(path.strip_prefix(&data_dir).unwrap().to_owned(), bytes);
                }
            }
        }
        let stop = format!("{:?} on {}", plan.stop, plan.timeline);
        Ok(Given { backup: plan.backup, stop, files })
    }

    /// What recovery is given for a name; it must be told of a failure, not of the archive's end.
    async fn fetch(&self, name: &WalFileName, data_dir: &Path) -> Result<Vec<u8>, String> {
        let request = FetchRequest {
            name: *name,
            dest: Path::new("pg_wal").join(name.to_string()),
            data_dir: data_dir.to_owned(),
            system_id: Some(SYSTEM.into()),
            ahead: ReadAhead { segments: 0, bytes: 0 },
        };
        let dest = data_dir.join(&request.dest);
        fs::create_dir_all(dest.parent().unwrap()).unwrap();
        let fetcher = Fetcher::new(self.sample.archive.clone(), self.sample.layout.clone());
        match fetcher.fetch(&request).await {
            Ok(_) => Ok(fs::read(dest).unwrap()),
            Err(e) => {
                assert_eq!(e.outcome(data_dir), FetchOutcome::Failed, "{e}");
                assert!(!dest.exists(), "{e}");
                Err(told(&e))
            }
        }
    }

    /// The file of WAL that is read out of an object.
    fn wal_name(&self, path: &str) -> Option<WalFileName> {
        match self.sample.names().parse_wal(path)? {
            WalObject::File(name) | WalObject::Longer { of: name, .. } => Some(name),
        }
    }

    /// Every byte of a small object; of a large one those around what `edges` says, its ends, and some of the others.
    fn places(bytes: &[u8], edges: &[usize]) -> Vec<usize> {
        if bytes.len() <= 64 << 10 {
            return (0..bytes.len()).collect();
        }
        let footer = Footer::decode(bytes, bytes.len() as u64).unwrap();
        let ends = [0, HEADER_BYTES, footer.directory_at as usize, bytes.len() - FOOTER_BYTES, bytes.len()];
        let near = |at: &usize| at.saturating_sub(2)..(at + 2).min(bytes.len());
        let mut places: Vec<_> = ends.iter().chain(edges).flat_map(near).collect();
        places.extend(bytes.len() - FOOTER_BYTES..bytes.len());
        places.extend((0..bytes.len()).step_by(bytes.len() / 97));
        places.sort_unstable();
        places.dedup();
        places
    }

    /// Changes bytes of every object in turn and reads it; how many were changed.
    async fn change_all(&self, wanted: impl Fn(&str) -> bool) -> usize {
        let good = self.restore().await.unwrap();
        for (path, bytes) in &self.files {
            assert!(good.files[Path::new(path)] == *bytes, "{path}");
        }
        let names = self.sample.names();
        let place = place();
        let mut changed = 0;
        for (path, bytes) in self.sample.objects().await.into_iter().filter(|(path, _)| wanted(path)) {
            let wal = self.wal_name(&path);
            let fetched = match &wal {
                Some(name) => Some(self.fetch(name, place.path()).await.unwrap()),
                None => None,
            };
            let edges: Vec<_> = match path == self.pack {
                true => self.frames.iter().flat_map(|(f, _)| [f.start, f.end]).collect(),
                false => Vec::new(),
            };
            for at in Self::places(&bytes, &edges) {
                let mut bad = bytes.clone();
                bad[at] ^= 1 << (at % 8);
                self.sample.replace(&path, bad).await;
                changed += 1;
                if let Some(name) = &wal {
                    let _ = fs::remove_dir_all(place.path().join("pg_wal"));
                    match self.fetch(name, place.path()).await {
                        Err(e) => assert!(e.contains(&path), "{path} byte {at}: {e}"),
                        // The longer copy beside it has all that this one had.
                        Ok(found) => {
                            assert!(path.ends_with(".partial"), "{path} byte {at}");
                            assert!(Some(found) == fetched, "{path} byte {at}");
                        }
                    }
                }
                match self.restore().await {
                    Err(e) => assert!(e.contains(&path), "{path} byte {at}: {e}"),
                    Ok(given) => {
                        assert!(given == good, "{path} byte {at}: {} is not {}", given.stop, good.stop);
                        assert!(self.is_needless(&path, at, &names.backups()), "{path} byte {at}");
                    }
                }
            }
            self.sample.replace(&path, bytes).await;
        }
        assert_eq!(self.restore().await.as_ref(), Ok(&good));
        changed
    }

    /// Whether a restore needs nothing of the byte: verify finds it.
    fn is_needless(&self, path: &str, at: usize, backups: &str) -> bool {
        // A frame's checksum is over what comes out of it: bits that zstd passes over change nothing.
        let of_frame = || self.frames.iter().any(|(frame, plain)| *plain && frame.contains(&at));
        let before_its_start =
            |name| ["000000010000000000000003", "000000010000000000000004"].contains(&name);
        let file = path.rsplit('/').next().unwrap();
        match path {
            _ if path == self.pack => !of_frame(),
            _ if path == Layout::WALTIDE_JSON || path == self.sample.layout.cluster_json() => true,
            _ if path.starts_with(backups) => path.ends_with(".keep") || path.ends_with(".started"),
            // Not on the line, or not the copy that is read.
            _ => {
                before_its_start(file)
                    || file == "000000010000000000000007"
                    || path.ends_with(".backup")
                    || path.ends_with(".partial")
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_changed_byte_of_a_small_object_is_handed_over() {
    let site = Site::new(100).await;
    let changed = site.change_all(|path| !path.contains("/packs/")).await;
    assert!(changed > 4000, "{changed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_changed_byte_of_a_pack_is_restored() {
    let site = Site::new(8192 + 100).await;
    let small = site.change_all(|path| path == site.pack).await;
    assert!(small > 8192, "{small}");
    let site = Site::new(40 * 8192).await;
    let large = site.change_all(|path| path == site.pack).await;
    assert!((150..400).contains(&large), "{large}");
}

/// Whoever goes on with an archive reads these first.
#[tokio::test]
async fn no_changed_byte_of_what_an_archive_says_of_itself_is_believed() {
    let dir = tempfile::tempdir().unwrap();
    let url = dir.path().join("archive").to_str().unwrap().parse().unwrap();
    let sample = Sample::bare(Archive::create(&url).await.unwrap()).await;
    for path in [Layout::WALTIDE_JSON.to_owned(), sample.layout.cluster_json()] {
        let bytes = sample.archive.get(&path, 1 << 20).await.unwrap().to_vec();
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << (at % 8);
            sample.replace(&path, bad).await;
            let opened = match make_archive(&url, later()).await {
                Ok((archive, _)) => {
                    make_cluster(&archive, &sample.layout, "postgres", later()).await.map(|_| ())
                }
                Err(e) => Err(e),
            };
            let e = told(&opened.unwrap_err());
            assert!(e.contains(&path), "{path} byte {at}: {e}");
        }
        sample.replace(&path, bytes).await;
    }
}
