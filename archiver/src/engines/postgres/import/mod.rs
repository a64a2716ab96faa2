//! A base backup that pg_basebackup made becomes a backup of the archive.

mod compression;
mod manifest;
mod source;
mod tar;

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use waltide_format::archive::{BackupKind, BackupMethod, Layout, Manifest, ManifestStats, WalFile};
use waltide_format::engines::postgres::cluster::{
    BackupHistory, BackupLabel, ControlError, LabelError, tablespace_map_text,
};
use waltide_format::{BLOCK_BYTES, BackupHistoryName, BackupId, Lsn, TimestampTz, WalFileName};
use waltide_storage::{Archive, NoProgress, Progress, StorageError};

use self::manifest::{BackupManifest, WalRange};
use self::source::{Source, WalFiles};
use self::tar::TarStream;
use super::backup::{Backup, DatabaseCopies};
use super::checksum::Checksum;
use super::control::ControlFileError;
use super::copy::{Copied, CopyError, CopyJob, FileStream, copy};
use super::files::{CONTROL_FILE, ScanError, SourceFile, is_left_out};
use super::pages::PageRule;
use super::publish::{Destination, PublishError, WalSource, assemble, damaged_pages, segments};
use super::push::{PushError, Shipper};
use super::wal_dir::TEXT_BYTES_MAX;

/// Files that are made or changed after backup_manifest was written (`pg_basebackup -R`), so that it cannot speak of them.
const UNLISTED: [&str; 3] = ["postgresql.auto.conf", "standby.signal", "recovery.signal"];

/// What to take in, and how.
#[derive(Debug, Clone)]
pub struct ImportRequest {
    /// Where to.
    pub archive: Archive,
    /// As which cluster.
    pub layout: Layout,
    /// What pg_basebackup made: a directory of files, or of tar archives, compressed or not.
    pub dir: PathBuf,
    /// The operator's words.
    pub description: Option<String>,
    /// Whether a backup without backup_manifest is refused; without one nothing says that it is whole.
    pub require_manifest: bool,
    /// Whether damaged pages end the import, rather than being written down.
    pub refuse_damaged_pages: bool,
    /// How many threads copy.
    pub threads: usize,
    /// zstd's level.
    pub level: i32,
    /// How long to wait for WAL that neither the archive nor the backup has.
    pub archive_timeout: Duration,
}

/// Why there is no backup.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// Nothing of the kind lies there.
    #[error(
        "{} holds no base backup\nhint: name the directory that pg_basebackup wrote: PG_VERSION lies in it, or base.tar, or \
         base.tar.gz, .lz4 or .zst",
        dir.display()
    )]
    NoBackup {
        /// The directory.
        dir: PathBuf,
    },
    /// A part of the backup is there in two forms.
    #[error("{} and {} are the same part of a base backup\nhint: move one of them elsewhere", path.display(), other.display())]
    TwoForms {
        /// The one.
        path: PathBuf,
        /// The other.
        other: PathBuf,
    },
    /// A tar archive that pg_basebackup does not make.
    #[error("{} is no part of a base backup\nhint: move it elsewhere", path.display())]
    Stranger {
        /// The archive.
        path: PathBuf,
    },
    /// Something could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said, or what is wrong with it.
        source: io::Error,
    },
    /// The data directory does not say what it is.
    #[error(transparent)]
    ControlFile(#[from] ControlFileError),
    /// pg_control cannot be used.
    #[error("pg_control in {} cannot be used", path.display())]
    Control {
        /// Where it is.
        path: PathBuf,
        /// What is wrong.
        source: ControlError,
    },
    /// Pages are not of the one size that is supported.
    #[error("the backup has pages of {found} bytes, only {BLOCK_BYTES} are supported")]
    BlockSize {
        /// `blcksz`.
        found: u32,
    },
    /// The directory could not be listed.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// backup_label, tablespace_map or a backup history file makes no sense.
    #[error("the backup cannot be used")]
    Label(#[from] LabelError),
    /// The backup is only a part of one.
    #[error("the backup is an incremental one\nhint: put it together with pg_combinebackup first")]
    Incremental,
    /// There is no backup_manifest.
    #[error(
        "{} has no backup_manifest, so nothing says that it is whole\nhint: --no-manifest takes it nevertheless",
        dir.display()
    )]
    NoManifest {
        /// The directory.
        dir: PathBuf,
    },
    /// backup_manifest is damaged.
    #[error("backup_manifest cannot be used: {why}")]
    Manifest {
        /// What is wrong.
        why: String,
    },
    /// A file is not there.
    #[error("{path} is missing from the backup")]
    Missing {
        /// The file.
        path: String,
    },
    /// A file is there that does not belong to the backup.
    #[error("{path} is in the backup's directory, and backup_manifest does not list it")]
    Extra {
        /// The file.
        path: String,
    },
    /// A file has another length.
    #[error("{path} has {found} bytes, backup_manifest says {expected}")]
    Length {
        /// The file.
        path: String,
        /// Its length.
        found: u64,
        /// What it should be.
        expected: u64,
    },
    /// Nothing says where the backup ended.
    #[error(
        "nothing says where the backup ended: it has no backup_manifest, and {history} is not in the archive\nhint: push that \
         file from the server's pg_wal"
    )]
    NoEnd {
        /// The backup history file.
        history: WalFileName,
    },
    /// Pages are damaged, and the backup was to be refused then.
    #[error(
        "{count} pages do not have their checksum, the first is {first}\nhint: --damaged-pages warn takes it nevertheless"
    )]
    DamagedPages {
        /// How many.
        count: usize,
        /// The first.
        first: String,
    },
    /// The files could not be copied, or are not what backup_manifest says.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// The backup's own WAL was not admitted.
    #[error(transparent)]
    Push(#[from] PushError),
    /// The archive failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The backup did not come into the archive.
    #[error(transparent)]
    Publish(#[from] PublishError),
}

impl ImportError {
    /// Whether the archive is at fault.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Publish(e) if e.is_damage())
    }
}

/// Takes a base backup in. Every file is checked against backup_manifest in the pass that stores it.
pub async fn import(request: &ImportRequest, progress: Arc<dyn Progress>) -> Result<Backup, ImportError> {
    let begun = Instant::now();
    let (dir, required, watching) = (request.dir.clone(), request.require_manifest, Arc::clone(&progress));
    let source = blocking(move || Source::open(&dir, required, &*watching)).await?;
    if source.control.block_bytes as usize != BLOCK_BYTES {
        return Err(ImportError::BlockSize { found: source.control.block_bytes });
    }
    let checksums = match &source.manifest {
        Some(listed) => check_list(&source, listed)?,
        None => Vec::new(),
    };
    let label = BackupLabel::parse(&source.label)?;
    if label.incremental_from.is_some() {
        return Err(ImportError::Incremental);
    }
    let to = Destination::find(&request.archive, &request.layout, &source.control).await?;
    let ranges = match &source.manifest {
        Some(listed) => listed.ranges.clone(),
        None => vec![range_without_manifest(&to, &source, &label).await?],
    };
    let stop_lsn = ranges.iter().map(|r| r.end).max().unwrap_or(label.start_lsn);

    let started = moment(&label, &source);
    let id = to.announce(started, BackupKind::Full, None).await?;
    let (source, mut copied) =
        copy_files(request, &to, &id, source, checksums, label.start_lsn, &progress).await?;
    let copy_seconds = begun.elapsed().as_secs_f64();
    let mut warnings = source.scan.warnings.clone();
    let damaged_pages = damaged_pages(&source.scan, &mut copied, stop_lsn, &mut warnings);
    if let Some(first) = damaged_pages.first().filter(|_| request.refuse_damaged_pages) {
        return Err(ImportError::DamagedPages { count: copied.damaged.len(), first: first.clone() });
    }
    let (read_bytes, pack_bytes) = (copied.read_bytes, copied.stored_bytes);
    let (map, files) = assemble(&source.scan, copied);
    let map_bytes = to.put_map(&id, &map).await?;

    ship_wal(request, &to, &id, &source.wal, &ranges).await?;
    let timelines: Vec<_> = ranges.iter().map(|r| r.timeline).collect();
    let mut copies = DatabaseCopies::default();
    for range in &ranges {
        let mut either = vec![range.timeline];
        either.extend(timelines.iter().copied().filter(|t| *t != range.timeline));
        let span = (range.start, range.end);
        let wal = to.await_wal(&either, span, request.archive_timeout, &*progress, &NoSource).await?;
        copies.read(&to, &wal, span, request.threads).await?;
    }
    warnings.extend(copies.judge().map_err(PublishError::from)?);

    let control = &source.control;
    let stopped = source.scan.files.iter().find(|f| f.path == CONTROL_FILE).map_or(0, |f| f.modified);
    let stopped = TimestampTz::from_unix_micros(stopped.saturating_mul(1_000_000)).max(started);
    let links = source.scan.tablespaces.iter().map(|t| (t.oid, t.path.as_str()));
    let manifest = Manifest {
        maps: vec![id.as_str().to_owned()],
        id,
        kind: BackupKind::Full,
        method: BackupMethod::Import,
        parent: None,
        full_because: None,
        description: request.description.clone(),
        started,
        stopped,
        system_id: control.system_id,
        major: control.major,
        server_version: control.major.to_string(),
        segment_size: control.segment_size,
        data_checksums: control.has_data_checksums(),
        timeline: label.timeline,
        start_lsn: label.start_lsn,
        stop_lsn,
        checkpoint_lsn: label.checkpoint_lsn,
        tablespace_map: source.tablespace_map.unwrap_or_else(|| tablespace_map_text(links)),
        backup_label: source.label,
        from_standby: label.from_standby,
        tablespaces: source.scan.tablespaces,
        config_files: Vec::new(),
        directories: source.scan.directories,
        stats: ManifestStats {
            cluster_bytes: files.iter().fold(0, |sum, file| sum.saturating_add(file.bytes)),
            read_bytes,
            referred_bytes: 0,
            stored_bytes: pack_bytes.saturating_add(map_bytes),
            copy_seconds,
            total_seconds: begun.elapsed().as_secs_f64(),
        },
        files,
        damaged_pages,
        chain: None,
    };
    to.publish(&manifest).await?;
    Ok(Backup { manifest, warnings })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImportError> + Send + 'static,
) -> Result<T, ImportError> {
    tokio::task::spawn_blocking(work).await.expect("reading a backup does not panic")
}

/// Compares what is there with what backup_manifest lists; the checksums of the files, by place, are what is left to
/// compare.
fn check_list(source: &Source, listed: &BackupManifest) -> Result<Vec<Option<Checksum>>, ImportError> {
    if let Some(other) = listed.system_id.filter(|id| *id != source.control.system_id.get()) {
        let why = format!("it is of system {other}, pg_control of {}", source.control.system_id);
        return Err(ImportError::Manifest { why });
    }
    let mut left: BTreeMap<&str, _> = listed.files.iter().map(|file| (file.path.as_str(), file)).collect();
    let mut take = |path: &str, bytes: u64| match left.remove(path) {
        _ if UNLISTED.contains(&path) => Ok(None),
        None => Err(ImportError::Extra { path: path.to_owned() }),
        Some(file) if file.bytes != bytes => {
            Err(ImportError::Length { path: path.to_owned(), found: bytes, expected: file.bytes })
        }
        Some(file) => Ok(file.checksum.clone()),
    };
    let checksums =
        source.scan.files.iter().map(|file| take(&file.path, file.bytes)).collect::<Result<_, _>>()?;
    for (path, bytes) in &source.notes {
        if let Some(expected) = take(path, bytes.len() as u64)? {
            let mut hasher = expected.hasher();
            hasher.update(bytes);
            expected.compare(hasher).map_err(|(found, said)| CopyError::Checksum {
                path: path.clone(),
                algorithm: expected.algorithm(),
                found,
                expected: said,
            })?;
        }
    }
    match left.keys().find(|path| !is_left_out(path) && !UNLISTED.contains(path)) {
        Some(path) => Err(ImportError::Missing { path: (*path).to_owned() }),
        None => Ok(checksums),
    }
}

/// Where a backup ended that has no backup_manifest: a standby's at the least recovery point that pg_control has, a
/// primary's where the backup history file in the archive says.
async fn range_without_manifest(
    to: &Destination,
    source: &Source,
    label: &BackupLabel,
) -> Result<WalRange, ImportError> {
    let range = |end| WalRange { timeline: label.timeline, start: label.start_lsn, end };
    if label.from_standby {
        return Ok(range(source.control.min_recovery_point.max(label.checkpoint_lsn)));
    }
    let start = to.segment_size.floor(label.start_lsn);
    let offset = u32::try_from(label.start_lsn.bytes_since(start)).unwrap_or(0);
    let history = WalFileName::BackupHistory(BackupHistoryName { segment: label.start_segment, offset });
    let path = to.system.wal_file(history);
    let object = match to.archive.get(&path, TEXT_BYTES_MAX).await {
        Ok(object) => object,
        Err(e) if e.is_not_found() => return Err(ImportError::NoEnd { history }),
        Err(e) => return Err(e.into()),
    };
    let file = WalFile::decode(&object).map_err(|source| PublishError::Damaged { path, source })?;
    Ok(range(BackupHistory::parse(&file.contents)?.stop_lsn))
}

/// When the backup was made. Its label says so in the server's time zone, whose abbreviation may say little; its last
/// checkpoint was made just before.
fn moment(label: &BackupLabel, source: &Source) -> TimestampTz {
    label.start_time.parse().unwrap_or_else(|_| source.control.time())
}

async fn copy_files(
    request: &ImportRequest,
    to: &Destination,
    id: &BackupId,
    source: Source,
    checksums: Vec<Option<Checksum>>,
    start_lsn: Lsn,
    progress: &Arc<dyn Progress>,
) -> Result<(Source, Copied), ImportError> {
    let runtime = Handle::current();
    let (to, id, progress) = (to.clone(), id.clone(), Arc::clone(progress));
    let (threads, level) = (request.threads, request.level);
    blocking(move || {
        progress.phase("copy", Some(source.scan.bytes()));
        let rule = PageRule { start_lsn, segment_blocks: source.control.relation_file_blocks };
        let stream = |tar| TarStream { tar, files: &source.scan.files };
        let streams: Vec<_> = source.compressed.iter().map(stream).collect();
        let streams: Vec<_> = streams.iter().map(|stream| stream as &dyn FileStream).collect();
        let job = CopyJob {
            archive: &to.archive,
            system: &to.system,
            id: &id,
            files: &source.scan.files,
            checksums: &checksums,
            wanted: &[],
            streams: &streams,
            pages: source.control.has_data_checksums().then_some(rule),
            threads,
            level,
            progress: &*progress,
            stop: &AtomicBool::new(false),
        };
        let copied = copy(&job, &runtime, None)?;
        // Nobody has a reason to remove files from a backup at rest.
        let gone = source.scan.files.iter().zip(&copied.files).find(|(_, copied)| copied.is_none());
        match gone {
            Some((file, _)) => Err(ImportError::Missing { path: file.path.clone() }),
            None => Ok((source, copied)),
        }
    })
    .await
}

/// Ships those files of the backup's own WAL that the archive lacks.
async fn ship_wal(
    request: &ImportRequest,
    to: &Destination,
    id: &BackupId,
    wal: &WalFiles,
    ranges: &[WalRange],
) -> Result<(), ImportError> {
    let mut wanted: Vec<WalFileName> = ranges.iter().map(|r| WalFileName::History(r.timeline)).collect();
    for range in ranges {
        for segment in segments(range.timeline, range.start, range.end, to.segment_size) {
            if to.find_segment(&[range.timeline], segment, range.end).await?.is_none() {
                wanted.push(WalFileName::Segment(segment));
            }
        }
    }
    let shipper = Shipper::new(request.archive.clone(), request.layout.clone(), request.level);
    match wal {
        WalFiles::Directory(dir) => {
            for name in wanted {
                let path = dir.join(name.to_string());
                if path.is_file() {
                    shipper.ship(&path, request.threads).await?;
                }
            }
        }
        WalFiles::Tars(tars, files) => {
            let place = Place::new(id)?;
            let mut found = Vec::new();
            for name in wanted {
                if let Some(file) = files.get(&name.to_string()) {
                    check_length(name, file, to)?;
                    found.push((file, place.0.join(name.to_string())));
                }
            }
            for tar in tars {
                let of_tar = found.iter().filter(|(file, _)| file.source == tar.path);
                let of_tar: Vec<_> = of_tar.map(|(file, to)| (file.path.clone(), to.clone())).collect();
                if !of_tar.is_empty() {
                    let tar = tar.clone();
                    blocking(move || tar.extract(&of_tar, &NoProgress)).await?;
                }
            }
            for (_, path) in found {
                shipper.ship(&path, request.threads).await?;
            }
        }
    }
    Ok(())
}

/// Whether a file of WAL in a tar archive may be as long as it says it is.
fn check_length(name: WalFileName, file: &SourceFile, to: &Destination) -> Result<(), ImportError> {
    let most = match name {
        WalFileName::Segment(_) => to.segment_size.bytes(),
        _ => TEXT_BYTES_MAX,
    };
    if file.bytes <= most {
        return Ok(());
    }
    let text = format!("{} has {} bytes, more than the {most} that it can have", file.path, file.bytes);
    Err(ImportError::Read { path: file.source.clone(), source: io::Error::other(text) })
}

/// A directory for the time of an import.
struct Place(PathBuf);

impl Place {
    fn new(id: &BackupId) -> Result<Self, ImportError> {
        let path = std::env::temp_dir().join(format!("waltide-import-{id}-{}", std::process::id()));
        let made = std::fs::DirBuilder::new().mode(0o700).create(&path);
        made.map_err(|source| ImportError::Read { path: path.clone(), source })?;
        Ok(Self(path))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let path: &Path = &self.0;
        if let Err(e) = std::fs::remove_dir_all(path) {
            tracing::warn!("{} stays behind: {e}", path.display());
        }
    }
}

/// Nobody knows when the WAL comes that an imported backup lacks.
struct NoSource;

impl WalSource for NoSource {
    async fn archived(&self) -> Option<i64> {
        None
    }

    async fn why_not(&self) -> String {
        "the backup does not have it either\nhint: push it from the server's pg_wal, then import again"
            .to_owned()
    }
}
