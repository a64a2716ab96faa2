//! A base backup of a running server, taken from its files.

mod advance;
mod base;
mod changes;
mod config;
mod copied;
mod layers;
mod parent;
mod server;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::runtime::Handle;
use waltide_format::archive::{BackupKind, BackupMethod, Layout, Manifest, ManifestFile, ManifestStats};
use waltide_format::engines::postgres::cluster::{BackupLabel, LabelError, version_directory};
use waltide_format::{BLOCK_BYTES, BackupId, Lsn, TimestampTz};
use waltide_storage::{Archive, Progress};

pub use self::advance::{Advance, AdvanceRequest, AdvancedFiles};
use self::base::{Base, Search};
pub use self::changes::{ChangesError, changed_blocks};
use self::config::config_files;
pub(super) use self::copied::DatabaseCopies;
pub use self::copied::LostCopy;
use self::layers::{Layered, lay};
use self::parent::NO_BACKUP;
use self::server::Server;
use super::connect::{ConnectError, ConnectRequest};
use super::control::{ControlFileError, read_control, read_control_bytes};
use super::copy::{Copied, CopyError, CopyJob, Last, copy};
use super::files::{CONTROL_FILE, Scan, ScanError, scan};
use super::pages::PageRule;
use super::publish::{Destination, PublishError, assemble, damaged_pages};
use super::wanted::{Wanted, select};
use crate::catalog::CatalogError;
use crate::merged::Chaining;

/// zstd's level unless another is asked for.
pub const DEFAULT_LEVEL: i32 = 1;
/// How often the session that holds the backup open is looked at.
const WATCH: Duration = Duration::from_millis(500);

/// What to back up, and how.
#[derive(Debug, Clone)]
pub struct BackupRequest {
    /// Where to.
    pub archive: Archive,
    /// As which cluster.
    pub layout: Layout,
    /// The data directory.
    pub data_dir: PathBuf,
    /// `--connection`.
    pub connection: Option<String>,
    /// What is asked for; none: an incremental where there is something to make it against.
    pub kind: Option<BackupKind>,
    /// Where the catalogue cache lies, if it is used.
    pub cache: Option<PathBuf>,
    /// The operator's words.
    pub description: Option<String>,
    /// Whether the first checkpoint is made at once, rather than spread over time.
    pub fast_checkpoint: bool,
    /// Whether damaged pages end the backup, rather than being written down.
    pub refuse_damaged_pages: bool,
    /// How many threads copy.
    pub threads: usize,
    /// zstd's level.
    pub level: i32,
    /// How long no segment may reach the archive while the backup waits for its own.
    pub archive_timeout: Duration,
}

/// A backup that is in the archive.
#[derive(Debug, Clone)]
pub struct Backup {
    /// What it is.
    pub manifest: Manifest,
    /// What the operator should know.
    pub warnings: Vec<String>,
}

/// Why there is no backup.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackupError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The server did not do what it was asked.
    #[error("the server refused a step of the backup")]
    Server(#[from] tokio_postgres::Error),
    /// The server answered something else than it should.
    #[error("the server answered {found:?} where {what} was expected")]
    Answer {
        /// What was expected.
        what: &'static str,
        /// What came.
        found: String,
    },
    /// The connection leads to another server than the data directory's.
    #[error(
        "the connection is not to the server of {}: {why}\nhint: --connection and --data-dir must name the same server",
        data_dir.display()
    )]
    AnotherServer {
        /// The data directory.
        data_dir: PathBuf,
        /// What tells them apart.
        why: String,
    },
    /// postmaster.pid cannot be read.
    #[error("cannot read postmaster.pid in {}", data_dir.display())]
    PidFile {
        /// The data directory.
        data_dir: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// Pages are not of the one size that is supported.
    #[error("{} has pages of {found} bytes, only {BLOCK_BYTES} are supported", data_dir.display())]
    BlockSize {
        /// The data directory.
        data_dir: PathBuf,
        /// `blcksz`.
        found: u32,
    },
    /// The catalogue cannot be read.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// The archived WAL is another server's.
    #[error(
        "the archive's WAL does not have this server's checkpoint at {checkpoint}: it is of another history\nhint: see          which servers push to this archive; `waltide backup --type full` does not rely on that WAL, a restore from it does."
    )]
    AnotherHistory {
        /// Where the checkpoint's record is.
        checkpoint: Lsn,
    },
    /// The server went over to another timeline meanwhile.
    #[error("the server changed its timeline while it was backed up\nhint: take another backup")]
    TimelineChanged,
    /// The session that held the backup open has ended.
    #[error("the server ended the session of the backup\nhint: its log says why; take another backup")]
    SessionLost,
    /// The data directory does not say what it is.
    #[error(transparent)]
    Control(#[from] ControlFileError),
    /// The data directory could not be listed.
    #[error(transparent)]
    Scan(#[from] ScanError),
    /// The files could not be copied.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// The backup label makes no sense.
    #[error("the server's backup label cannot be used")]
    Label(#[from] LabelError),
    /// A backup cannot be brought forward.
    #[error("backup {backup} cannot be advanced: {why}")]
    NotAdvanced {
        /// The backup.
        backup: BackupId,
        /// What stands in the way.
        why: String,
    },
    /// Pages are damaged, and the backup was to be refused then.
    #[error(
        "{count} pages do not have their checksum, the first is {first}\nhint: find the hardware at fault; --damaged-pages warn takes the backup nevertheless."
    )]
    DamagedPages {
        /// How many.
        count: usize,
        /// The first.
        first: String,
    },
    /// The backup did not come into the archive.
    #[error(transparent)]
    Publish(#[from] PublishError),
}

impl BackupError {
    /// Whether the archive is at fault.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Publish(e) => e.is_damage(),
            Self::Catalog(e) => e.is_damage(),
            Self::AnotherHistory { .. } => true,
            _ => false,
        }
    }
}

/// The moment it is.
fn now() -> TimestampTz {
    TimestampTz::from_jiff(Timestamp::now())
}

/// Takes a backup: of the kind asked for, or a full one where there is nothing that tells what has changed since another.
/// It is seen only when every file, page and segment that it needs is in the archive; what an
/// interrupted one leaves behind is announced, and is prune's to remove.
pub async fn backup(request: &BackupRequest, progress: Arc<dyn Progress>) -> Result<Backup, BackupError> {
    let begun = Instant::now();
    let control = read_control(&request.data_dir)?;
    if control.block_bytes as usize != BLOCK_BYTES {
        return Err(BackupError::BlockSize {
            data_dir: request.data_dir.clone(),
            found: control.block_bytes,
        });
    }
    let to = Destination::find(&request.archive, &request.layout, &control).await?;
    let connection =
        ConnectRequest { connection: request.connection.clone(), data_dir: Some(request.data_dir.clone()) };
    let server = Server::of(&connection, &request.data_dir, &control).await?;

    let started = now();
    let search = Search { request, to: &to, server: &server, progress: &*progress };
    let asked = match request.kind {
        Some(BackupKind::Full) => None,
        kind => Some(kind.unwrap_or(BackupKind::Incremental)),
    };
    let parent = match asked {
        Some(kind) => {
            let found = search.parent(kind, &control, started).await?;
            found.map_err(|why| Some(why).filter(|why| request.kind.is_some() || why != NO_BACKUP))
        }
        None => Err(None),
    };
    let kind = asked.filter(|_| parent.is_ok()).unwrap_or(BackupKind::Full);
    let id = to.announce(started, kind, parent.as_ref().ok().map(|p| &p.head.id)).await?;
    progress.phase("checkpoint", None);
    let begin = async {
        let start_lsn = server.start(&format!("waltide {id}"), request.fast_checkpoint).await?;
        // The server has written the checkpoint into its own pg_control before it answered.
        let control = read_control(&request.data_dir)?;
        if control.checkpoint_copy.redo < start_lsn {
            let why = format!("its checkpoint at {start_lsn} is not in the directory's pg_control");
            return Err(BackupError::AnotherServer { data_dir: request.data_dir.clone(), why });
        }
        let base = match &parent {
            Ok(parent) => search.base(parent, &control, start_lsn, started).await?.map_err(Some),
            Err(why) => Err(why.clone()),
        };
        Ok((start_lsn, control, base))
    };
    let (start_lsn, control, base) = match begin.await {
        Ok(begun) => begun,
        Err(e) => {
            to.withdraw(&id).await;
            return Err(e);
        }
    };

    let rule = PageRule { start_lsn, segment_blocks: control.relation_file_blocks };
    let version_directory = version_directory(control.major, control.catalog_version);
    let pages = control.has_data_checksums().then_some(rule);
    let (base, full_because) = match base {
        Ok(base) => (Some(Arc::new(Against { base, segment_blocks: rule.segment_blocks })), None),
        Err(why) => (None, why),
    };
    let how = How { version_directory, pages, base: base.clone() };
    let (scan, mut copied) = copy_files(request, &to, &server, &id, how, &progress).await?;
    let copy_seconds = begun.elapsed().as_secs_f64();
    let mut warnings = scan.warnings.clone();
    warnings.extend(full_because.iter().map(|why| format!("a full backup is made: {why}")));
    let config_files = config_files(&server.client, server.major, &request.data_dir, &mut warnings).await;

    let stopped = server.stop().await?;
    let finished = now();
    let label = BackupLabel::parse(&stopped.label)?;
    let damaged_pages = damaged_pages(&scan, &mut copied, stopped.lsn, &mut warnings);
    if let Some(first) = damaged_pages.first().filter(|_| request.refuse_damaged_pages) {
        return Err(BackupError::DamagedPages { count: copied.damaged.len(), first: first.clone() });
    }

    let (read_bytes, pack_bytes) = (copied.read_bytes, copied.stored_bytes);
    let mut layered = match &base {
        Some(base) => lay(&scan, copied, &base.base.parent, &base.kept(&scan)),
        None => {
            let (map, files) = assemble(&scan, copied);
            Layered { map, files, maps: Vec::new(), referred_bytes: 0 }
        }
    };
    layered.compact(&to).await?;
    let Layered { map, files, mut maps, referred_bytes } = layered;
    let map_bytes = to.put_map(&id, &map).await?;
    maps.push(id.as_str().to_owned());

    let mut timelines = vec![label.timeline];
    if server.is_standby {
        // What it follows may have moved to another timeline meanwhile; the archive has the segment on either.
        let control = read_control(&request.data_dir)?;
        timelines.extend(control.min_recovery_timeline.filter(|t| *t != label.timeline));
    }
    let range = (label.start_lsn, stopped.lsn);
    let wal = to.await_wal(&timelines, range, request.archive_timeout, &*progress, &server).await?;
    let mut copies = DatabaseCopies::default();
    copies.read(&to, &wal, range, request.threads).await?;
    warnings.extend(copies.judge().map_err(PublishError::from)?);
    if base.is_some() {
        if (label.timeline, label.start_lsn) != (control.checkpoint_copy.timeline, start_lsn) {
            return Err(BackupError::TimelineChanged);
        }
        let checkpoint = label.checkpoint_lsn;
        if !search.is_ours(&control, checkpoint, label.start_lsn).await? {
            return Err(BackupError::AnotherHistory { checkpoint });
        }
    }

    let chain = Chaining { archive: &request.archive, layout: &request.layout, threads: request.threads };
    let chain = chain.of_backup(request.cache.as_deref(), label.timeline, range.0, range.1).await;
    let manifest = Manifest {
        id,
        kind: if base.is_some() { kind } else { BackupKind::Full },
        method: BackupMethod::Backup,
        parent: base.as_ref().map(|base| base.base.parent.id.clone()),
        full_because,
        description: request.description.clone(),
        started,
        stopped: finished,
        system_id: control.system_id,
        major: control.major,
        server_version: server.version.clone(),
        segment_size: control.segment_size,
        data_checksums: control.has_data_checksums(),
        timeline: label.timeline,
        start_lsn: label.start_lsn,
        stop_lsn: stopped.lsn,
        checkpoint_lsn: label.checkpoint_lsn,
        backup_label: stopped.label,
        tablespace_map: stopped.tablespace_map,
        from_standby: label.from_standby,
        tablespaces: scan.tablespaces,
        config_files,
        maps,
        directories: scan.directories,
        stats: ManifestStats {
            cluster_bytes: files.iter().fold(0, |sum, file| sum.saturating_add(file.bytes)),
            read_bytes,
            referred_bytes,
            stored_bytes: pack_bytes.saturating_add(map_bytes),
            copy_seconds,
            total_seconds: begun.elapsed().as_secs_f64(),
        },
        files,
        damaged_pages,
        chain,
    };
    to.publish(&manifest).await?;
    Ok(Backup { manifest, warnings })
}

/// What an incremental is made against.
#[derive(Debug)]
struct Against {
    base: Base,
    segment_blocks: u32,
}

impl Against {
    /// The parent's files of which blocks are still of use, by path.
    fn kept<'a>(&'a self, scan: &'a Scan) -> BTreeMap<&'a str, &'a ManifestFile> {
        let chosen = select(&scan.files, &self.base.parent, &self.base.changed, self.segment_blocks);
        let kept =
            scan.files.iter().zip(chosen).filter_map(|(file, (_, kept))| Some((file.path.as_str(), kept?)));
        kept.collect()
    }

    /// What of each file is read.
    fn wanted(&self, scan: &Scan) -> Vec<Wanted<'_>> {
        let chosen = select(&scan.files, &self.base.parent, &self.base.changed, self.segment_blocks);
        chosen.into_iter().map(|(wanted, _)| wanted).collect()
    }
}

/// How files are found and read.
struct How {
    version_directory: String,
    pages: Option<PageRule>,
    base: Option<Arc<Against>>,
}

/// Lists and copies, while the session that holds the backup open lives.
async fn copy_files(
    request: &BackupRequest,
    to: &Destination,
    server: &Server,
    id: &BackupId,
    how: How,
    progress: &Arc<dyn Progress>,
) -> Result<(Scan, Copied), BackupError> {
    let stop = Arc::new(AtomicBool::new(false));
    let runtime = Handle::current();
    let work = {
        let (request, to, id) = (request.clone(), to.clone(), id.clone());
        let (progress, stop, major) = (Arc::clone(progress), Arc::clone(&stop), server.major);
        move || -> Result<(Scan, Copied), BackupError> {
            let scan = scan(&request.data_dir, major, &how.version_directory)?;
            let wanted = how.base.as_ref().map(|base| base.wanted(&scan)).unwrap_or_default();
            let bytes = match how.base.is_some() {
                true => scan
                    .files
                    .iter()
                    .zip(&wanted)
                    .fold(0, |sum: u64, (f, w)| sum.saturating_add(w.bytes(f.bytes))),
                false => scan.bytes(),
            };
            progress.phase("copy", Some(bytes));
            let job = CopyJob {
                archive: &to.archive,
                system: &to.system,
                id: &id,
                files: &scan.files,
                checksums: &[],
                wanted: &wanted,
                streams: &[],
                pages: how.pages,
                threads: request.threads,
                level: request.level,
                progress: &*progress,
                stop: &stop,
            };
            let read = || Ok(read_control_bytes(&request.data_dir)?.0);
            let last = scan.files.iter().position(|file| file.path == CONTROL_FILE);
            let copied = copy(&job, &runtime, last.map(|file| Last { file, read: &read }))?;
            Ok((scan, copied))
        }
    };
    let mut copying = tokio::task::spawn_blocking(work);
    loop {
        tokio::select! {
            done = &mut copying => return done.expect("copying does not panic"),
            () = tokio::time::sleep(WATCH) => {
                if server.client.is_closed() {
                    stop.store(true, Ordering::Relaxed);
                    // What it was doing ends at its next look.
                    let _ = copying.await;
                    return Err(BackupError::SessionLost);
                }
            }
        }
    }
}
