//! `waltide fetch`, PostgreSQL's restore_command: one file of WAL, checked before it gets its name.
//!
//! PostgreSQL reads "the archive ends here" from every failure that it does not read as fatal, and goes on with
//! data missing. So "not there" is answered only where an archive that is surely ours surely lacks the file.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _};
use waltide_format::archive::{
    Ending, Envelope, Layout, ObjectKind, SegmentInfo, StoredSegment, SystemInfo, SystemLayout, WalFile,
    WalObject,
};
use waltide_format::engines::postgres::wal::{Damage, Expected, Next, RecordStream, SegmentSpan};
use waltide_format::{Corrupt, Lsn, Reader, SegmentName, SegmentSize, SystemId, WalFileName};
use waltide_storage::{Archive, ArchiveUrl, Bytes, StorageError};

use super::queue::{Durable, Filled, Queue, ReadAhead, Wanted, remove_unfinished};

/// The largest segment, stored as it is, and its index.
pub(crate) const SEGMENT_OBJECT_BYTES_MAX: u64 = (1 << 30) + (256 << 20);
/// No history file, backup note or JSON object is larger.
const SMALL_OBJECT_BYTES_MAX: u64 = 1 << 20;
/// The waits between attempts to reach the archive.
const RETRIES: [Duration; 3] =
    [Duration::from_millis(100), Duration::from_millis(400), Duration::from_millis(1500)];
/// How many segments are brought at once by someone who reads ahead.
const AHEAD_AT_ONCE: usize = 2;

/// Why a file was not handed over.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The archive is there, is the right one, and has no such file.
    #[error("{path} is not in the archive")]
    NotThere {
        /// The object.
        path: String,
    },
    /// Something answers under the archive's address, and it is no archive: not mounted, most likely.
    #[error("{url} holds no waltide.json\nhint: is the archive mounted there?")]
    NoArchive {
        /// The archive's address.
        url: String,
    },
    /// The archive has nothing of this system.
    #[error(
        "cluster {cluster} of the archive has no system {system}\nhint: --cluster and --archive must be those that this database's WAL was pushed to"
    )]
    NoSystem {
        /// The cluster's name.
        cluster: String,
        /// The system identifier looked for, or words for any.
        system: String,
    },
    /// The archive could not be asked.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The object's bytes are not what was stored.
    #[error(
        "{path} is damaged\nhint: run `waltide verify`; a copy of the segment may still be in a server's pg_wal"
    )]
    Damaged {
        /// The object.
        path: String,
        /// What is wrong with it.
        source: Corrupt,
    },
    /// The WAL in the object is not WAL, although it is what was stored.
    #[error(
        "the WAL in {path} is damaged\nhint: run `waltide verify`; a copy of the segment may still be in a server's pg_wal"
    )]
    Wal {
        /// The object.
        path: String,
        /// What is wrong with it.
        source: Damage,
    },
    /// The object holds something else than its name says.
    #[error(
        "{path} holds {found}, not {expected}\nhint: run `waltide verify`; do not use this archive to restore"
    )]
    Foreign {
        /// The object.
        path: String,
        /// What it says it is.
        found: String,
        /// What was asked for.
        expected: String,
    },
    /// A file on this machine could not be used.
    #[error("cannot {doing} {path}")]
    Local {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

/// What PostgreSQL must be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FetchOutcome {
    /// Exit 1: the archive ends here.
    NotThere,
    /// Exit 1 as well, with a warning: a standby tries again by itself, and a failure would end it.
    TryAgain,
    /// Exit 126: recovery must stop.
    Failed,
}

impl FetchError {
    /// What PostgreSQL, working in `data_dir`, must be told.
    pub fn outcome(&self, data_dir: &Path) -> FetchOutcome {
        let unreachable =
            matches!(self, Self::NoArchive { .. } | Self::Storage(StorageError::Unreachable { .. }));
        match self {
            Self::NotThere { .. } => FetchOutcome::NotThere,
            _ if unreachable && data_dir.join("standby.signal").exists() => FetchOutcome::TryAgain,
            _ => FetchOutcome::Failed,
        }
    }

    /// Whether another attempt may help.
    fn is_passing(&self) -> bool {
        matches!(self, Self::Storage(StorageError::Unreachable { .. }))
    }
}

/// What to bring, and where to.
#[derive(Debug, Clone)]
pub struct FetchRequest {
    /// The file: `%f`.
    pub name: WalFileName,
    /// Where it belongs: `%p`.
    pub dest: PathBuf,
    /// The data directory: the working directory of a restore_command.
    pub data_dir: PathBuf,
    /// The system it must be of, where the data directory does not say so.
    pub system_id: Option<SystemId>,
    /// How far to read ahead.
    pub ahead: ReadAhead,
}

/// A file that was brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// Its length.
    pub bytes: u64,
    /// Whether it had been brought before.
    pub from_queue: bool,
    /// What is worth bringing next, by a process of its own ([`Fetcher::read_ahead`]).
    pub ahead: Option<Wanted>,
}

/// An archive to fetch from.
#[derive(Debug)]
pub struct Fetcher {
    archive: Archive,
    layout: Layout,
}

impl Fetcher {
    /// Opens the archive, trying more than once.
    pub async fn open(url: &ArchiveUrl, layout: Layout) -> Result<Self, FetchError> {
        let archive = retrying(async || Ok(Archive::open(url).await?)).await?;
        Ok(Self::new(archive, layout))
    }

    /// Fetches from an archive that is open.
    pub const fn new(archive: Archive, layout: Layout) -> Self {
        Self { archive, layout }
    }

    /// Brings a file: under its name lie all of its bytes, synced, or it is not touched.
    pub async fn fetch(&self, request: &FetchRequest) -> Result<Fetched, FetchError> {
        let dest = request.data_dir.join(&request.dest);
        let system = self.system_of(request).await?;
        let layout = self.layout.system(system);
        let queue = self.queue(request, system);
        let WalFileName::Segment(name) = request.name else {
            // Recovery asks for history files where it begins and where it ends.
            if let (WalFileName::History(timeline), Some(queue)) = (request.name, &queue) {
                queue.history_asked(timeline);
            }
            let contents = self.other_file(&layout, system, request.name).await?;
            write(&dest, &contents, contents.len() as u64)?;
            return Ok(Fetched { bytes: contents.len() as u64, from_queue: false, ahead: None });
        };
        let local = |source| FetchError::Local { doing: "use the queue for", path: dest.clone(), source };
        if let Some(queue) = &queue {
            queue.segment_asked();
        }
        if let Some(queue) = &queue
            && let Some(bytes) = queue.take(name, &dest).map_err(local)?
        {
            let size = SegmentSize::new(bytes);
            let ahead =
                size.and_then(|size| next_ahead(queue, Wanted { after: name, size, system }, request));
            return Ok(Fetched { bytes, from_queue: true, ahead });
        }
        let segment = self.segment(&layout, system, request.name).await?;
        let size = segment.index.info.size;
        write(&dest, &segment.wal, size.bytes())?;
        // A segment whose log ends inside is the archive's last.
        let ended = segment.index.info.ending == Ending::EndOfLog;
        let ahead = queue.filter(|_| !ended);
        let ahead = ahead.and_then(|q| next_ahead(&q, Wanted { after: name, size, system }, request));
        Ok(Fetched { bytes: size.bytes(), from_queue: false, ahead })
    }

    /// Fills the queue with the segments that follow. Done at once where another process is at it.
    pub async fn read_ahead(&self, request: &FetchRequest, wanted: Wanted) -> Result<u64, FetchError> {
        let Some(queue) = self.queue(request, wanted.system) else { return Ok(0) };
        let local =
            |source| FetchError::Local { doing: "fill the queue for", path: request.dest.clone(), source };
        let Some(_lock) = queue.lock().map_err(local)? else { return Ok(0) };
        let layout = self.layout.system(wanted.system);
        let following = std::iter::successors(wanted.after.next(wanted.size), |n| n.next(wanted.size));
        let count = usize::try_from(request.ahead.count(wanted.size)).unwrap_or(0);
        let missing: Vec<_> = following.take(count).filter(|name| !queue.holds(*name)).collect();
        let bring = |name| {
            let layout = &layout;
            let of = WalFileName::Segment(name);
            async move { Ok::<_, FetchError>((name, self.segment(layout, wanted.system, of).await?)) }
        };
        let brought = futures_util::stream::iter(missing).map(bring).buffered(AHEAD_AT_ONCE);
        let put = async |count: u64, (name, segment): (SegmentName, StoredSegment)| {
            // A longer copy of a segment whose log ends inside may come while this one waits.
            let info = &segment.index.info;
            let final_copy = matches!(info.ending, Ending::Full | Ending::Switch) && info.size == wanted.size;
            let whole = segment.wal.len() as u64 == info.size.bytes();
            let put = || queue.put(name, &segment.wal, request.ahead, Durable::Now).map_err(local);
            match final_copy && whole && put()? {
                true => Ok(count.saturating_add(1)),
                false => Err(FetchError::NotThere { path: layout.wal_file(WalFileName::Segment(name)) }),
            }
        };
        match brought.try_fold(0, put).await {
            Err(FetchError::NotThere { .. }) => Ok(0),
            other => other,
        }
    }

    /// Puts segments into the queue of a data directory, in order, before a server starts on it: as many as it may hold.
    /// What they are is checked as for [`Fetcher::fetch`]. Who calls it syncs them.
    pub(super) async fn fill(
        &self,
        request: &FetchRequest,
        (system, size): (SystemId, SegmentSize),
        filled: Filled,
        segments: &[SegmentName],
    ) -> Result<u64, FetchError> {
        let Some(queue) = self.queue(request, system) else { return Ok(0) };
        let local =
            |source| FetchError::Local { doing: "fill the queue for", path: request.dest.clone(), source };
        let layout = self.layout.system(system);
        let limit = usize::try_from(request.ahead.count(size)).unwrap_or(usize::MAX);
        let _lock = queue.lock().map_err(local)?;
        queue.note_filled(filled).map_err(local)?;
        let bring = |name: &SegmentName| {
            let (layout, queue, name, ahead) = (&layout, queue.clone(), *name, request.ahead);
            async move {
                let segment = self.segment(layout, system, WalFileName::Segment(name)).await?;
                let put = move || {
                    let info = &segment.index.info;
                    // A longer copy of one whose log ends inside may come before recovery does.
                    let settled = matches!(info.ending, Ending::Full | Ending::Switch);
                    let whole = segment.wal.len() as u64 == info.size.bytes();
                    match settled && whole {
                        true => queue.put(name, &segment.wal, ahead, Durable::Later),
                        false => Ok(false),
                    }
                };
                Ok::<_, FetchError>(tokio::task::spawn_blocking(put).await.expect("putting does not panic"))
            }
        };
        let brought = futures_util::stream::iter(segments.iter().take(limit)).map(bring);
        // All of them, as nobody may be writing any more when what lies there gets its owner.
        let brought: Vec<_> = brought.buffered(AHEAD_AT_ONCE).collect().await;
        let mut count = 0usize;
        for put in brought {
            if !put?.map_err(local)? {
                break;
            }
            count = count.saturating_add(1);
        }
        // Recovery ends with the last segment there is, and asks for it again, more than once.
        let last = segments.last().filter(|_| count == segments.len());
        if let Some(last) = last.and_then(|name| name.start(size)) {
            let filled = Filled { again_until: filled.again_until.max(last), ..filled };
            queue.note_filled(filled).map_err(local)?;
        }
        if count == 0 {
            queue.clear();
        }
        Ok(count as u64)
    }

    /// Whether the queue that such a request has may take what it may.
    pub(super) fn has_room(&self, request: &FetchRequest, system: SystemId) -> bool {
        self.queue(request, system).is_some_and(|queue| queue.has_room(request.ahead))
    }

    fn queue(&self, request: &FetchRequest, system: SystemId) -> Option<Queue> {
        (request.ahead.segments > 0).then_some(())?;
        let source = (self.archive.url(), self.layout.cluster(), system.get());
        Queue::beside(&request.dest, &request.data_dir, source)
    }

    /// The system whose WAL is wanted: the one that the data directory is of, else the one named, else the newest.
    async fn system_of(&self, request: &FetchRequest) -> Result<SystemId, FetchError> {
        if let Some(found) = system_of_data_dir(&request.data_dir)? {
            return Ok(found);
        }
        match request.system_id {
            Some(named) => Ok(named),
            None => Ok(self.newest_system().await?.system_id),
        }
    }

    async fn newest_system(&self) -> Result<SystemInfo, FetchError> {
        let listing = retrying(async || Ok(self.archive.list_names(&self.layout.prefix()).await?)).await?;
        let mut newest: Option<SystemInfo> = None;
        for system in listing.dirs.iter().filter_map(|d| d.parse::<SystemId>().ok()) {
            let path = self.layout.system(system).system_json();
            let object = match self.get(&path, SMALL_OBJECT_BYTES_MAX).await {
                Err(FetchError::Storage(e)) if e.is_not_found() => continue,
                other => other?,
            };
            let info: SystemInfo = Envelope::open_json(&object, ObjectKind::Json)
                .map_err(|source| FetchError::Damaged { path, source })?;
            if newest.as_ref().is_none_or(|n| n.created < info.created) {
                newest = Some(info);
            }
        }
        match newest {
            Some(info) => Ok(info),
            None => Err(self.nothing_of(None).await),
        }
    }

    /// Why the archive has nothing of a system.
    async fn nothing_of(&self, system: Option<SystemId>) -> FetchError {
        match self.there(Layout::WALTIDE_JSON).await {
            Ok(false) => FetchError::NoArchive { url: self.archive.url().to_owned() },
            Ok(true) => FetchError::NoSystem {
                cluster: self.layout.cluster().to_owned(),
                system: system.map_or("at all".to_owned(), |s| s.to_string()),
            },
            Err(e) => e,
        }
    }

    /// "Not there", once the archive has proved that it is the one that would have it.
    async fn not_there(&self, layout: &SystemLayout, system: SystemId, path: String) -> FetchError {
        match self.there(&layout.system_json()).await {
            Ok(true) => FetchError::NotThere { path },
            Ok(false) => self.nothing_of(Some(system)).await,
            Err(e) => e,
        }
    }

    async fn there(&self, path: &str) -> Result<bool, FetchError> {
        retrying(async || Ok(self.archive.head(path).await?.is_some())).await
    }

    async fn get(&self, path: &str, bytes_max: u64) -> Result<Bytes, FetchError> {
        retrying(async || Ok(self.archive.get(path, bytes_max).await?)).await
    }

    /// The copy of a segment, or of a `.partial`, that reaches furthest, checked.
    async fn segment(
        &self,
        layout: &SystemLayout,
        system: SystemId,
        of: WalFileName,
    ) -> Result<StoredSegment, FetchError> {
        let (WalFileName::Segment(name) | WalFileName::Partial(name)) = of else {
            return Err(self.not_there(layout, system, layout.wal_file(of)).await);
        };
        let plain = match self.copy(layout.wal_file(of), system, name).await {
            Err(FetchError::Storage(e)) if e.is_not_found() => {
                return Err(self.not_there(layout, system, layout.wal_file(of)).await);
            }
            other => other,
        };
        // Only a copy whose log ends inside, or that is damaged, can have a longer one beside it.
        let settled = |s: &StoredSegment| matches!(s.index.info.ending, Ending::Full | Ending::Switch);
        if plain.as_ref().is_ok_and(settled) || matches!(plain, Err(FetchError::Storage(_))) {
            return plain;
        }
        let listed =
            retrying(async || Ok(self.archive.list_names(&layout.timeline(name.timeline())).await?)).await?;
        // A whole segment that a standby cut short may be shorter than the `.partial` of one that was promoted. Where
        // the plain copy is damaged nobody knows whether it was.
        let partial = WalFileName::Partial(name);
        let twin = (of != partial && plain.is_ok()).then_some(partial);
        let mut furthest = plain;
        for wanted in std::iter::once(of).chain(twin) {
            let copies = listed.objects.iter().filter_map(|o| match layout.parse_wal(&o.path)? {
                WalObject::Longer { of: found, valid_end } if found == wanted => {
                    Some((valid_end, o.path.clone()))
                }
                WalObject::File(found) if found == wanted && found != of => Some((Lsn::ZERO, o.path.clone())),
                _ => None,
            });
            let Some((_, path)) = copies.max() else { continue };
            let found = self.copy(path, system, name).await?;
            let valid_end = found.index.info.valid_end;
            if furthest.as_ref().map_or(true, |f| f.index.info.valid_end < valid_end) {
                furthest = Ok(found);
            }
        }
        furthest
    }

    async fn copy(
        &self,
        path: String,
        system: SystemId,
        name: SegmentName,
    ) -> Result<StoredSegment, FetchError> {
        let object = self.get(&path, SEGMENT_OBJECT_BYTES_MAX).await?;
        let checked = tokio::task::spawn_blocking(move || check(&object, path, system, name)).await;
        checked.expect("checking a segment does not panic")
    }

    /// A `.history`, `.backup` or `.partial`, checked.
    async fn other_file(
        &self,
        layout: &SystemLayout,
        system: SystemId,
        name: WalFileName,
    ) -> Result<Vec<u8>, FetchError> {
        if matches!(name, WalFileName::Partial(_)) {
            let found = self.segment(layout, system, name).await?;
            let mut wal = found.wal;
            wal.resize(usize::try_from(found.index.info.size.bytes()).unwrap_or(0), 0);
            return Ok(wal);
        }
        let path = layout.wal_file(name);
        let object = match self.get(&path, SMALL_OBJECT_BYTES_MAX).await {
            Err(FetchError::Storage(e)) if e.is_not_found() => {
                return Err(self.not_there(layout, system, path).await);
            }
            other => other?,
        };
        let file =
            WalFile::decode(&object).map_err(|source| FetchError::Damaged { path: path.clone(), source })?;
        if file.name != name {
            let (found, expected) = (file.name.to_string(), name.to_string());
            return Err(FetchError::Foreign { path, found, expected });
        }
        Ok(file.contents)
    }
}

/// Everything that a stored segment must be before a server may read it.
fn check(
    object: &[u8],
    path: String,
    system: SystemId,
    name: SegmentName,
) -> Result<StoredSegment, FetchError> {
    let segment = match StoredSegment::decode(object) {
        Ok(segment) => segment,
        Err(source) => return Err(FetchError::Damaged { path, source }),
    };
    let info = &segment.index.info;
    if (info.system_id, info.name) != (system, name) {
        let found = format!("{} of system {}", info.name, info.system_id);
        return Err(FetchError::Foreign { path, found, expected: format!("{name} of system {system}") });
    }
    match check_records(&segment.wal, info) {
        // The operator chose to archive it so; recovery will stop at the damage.
        Err(damage) if !segment.index.faults.is_empty() => {
            tracing::warn!("{path} was archived with a fault on purpose: {damage}");
        }
        Err(source) => return Err(FetchError::Wal { path, source }),
        Ok(()) => {}
    }
    Ok(segment)
}

/// Every page header and every record's checksum, as far as the log goes.
fn check_records(wal: &[u8], info: &SegmentInfo) -> Result<(), Damage> {
    let start = info.name.start(info.size).unwrap_or(Lsn::MAX);
    let Some(span) = SegmentSpan::containing(start, info.size) else { return Ok(()) };
    let system_ids = [info.system_id];
    let timeline = Some(info.name.timeline());
    let expected = Expected { system_ids: &system_ids, major: Some(info.major), timeline, history: None };
    let mut stream = RecordStream::new(wal, span, expected, None)?.leaving_images();
    while let Next::Record(_) = stream.next_record()? {}
    Ok(())
}

fn next_ahead(queue: &Queue, wanted: Wanted, request: &FetchRequest) -> Option<Wanted> {
    // What a restore put there lasts for a while.
    let next = wanted.after.next(wanted.size);
    if queue.is_asked_again(wanted.after, wanted.size) && next.is_some_and(|next| queue.holds(next)) {
        return None;
    }
    queue.tidy(wanted.after, wanted.size, request.ahead);
    let count = request.ahead.count(wanted.size);
    let following = std::iter::successors(wanted.after.next(wanted.size), |n| n.next(wanted.size));
    let held = following.take(usize::try_from(count).unwrap_or(0)).filter(|n| queue.holds(*n)).count();
    let low = (held as u64).saturating_mul(2) <= count;
    (count > 0 && low && queue.has_room(request.ahead)).then_some(wanted)
}

async fn retrying<T>(attempt: impl AsyncFn() -> Result<T, FetchError>) -> Result<T, FetchError> {
    for wait in RETRIES {
        match attempt().await {
            Err(e) if e.is_passing() => tracing::info!("{e}, trying again in {wait:?}"),
            other => return other,
        }
        tokio::time::sleep(wait).await;
    }
    attempt().await
}

/// The system identifier in pg_control; none where there is no pg_control.
fn system_of_data_dir(data_dir: &Path) -> Result<Option<SystemId>, FetchError> {
    let path = data_dir.join("global/pg_control");
    let mut first = [0; 8];
    match File::open(&path).and_then(|mut file| file.read_exact(&mut first)) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(FetchError::Local { doing: "read", path, source }),
    }
    match Reader::new(&first).u64("system_identifier") {
        Ok(found) => Ok(Some(found.into())),
        Err(source) => Err(FetchError::Damaged { path: path.display().to_string(), source }),
    }
}

/// Writes `contents` and zeros up to `bytes` under another name, syncs them, and gives them their name.
fn write(dest: &Path, contents: &[u8], bytes: u64) -> Result<(), FetchError> {
    let file_name = dest.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let dir = dest.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    remove_unfinished(dir, &file_name);
    let unfinished = dir.join(format!("{file_name}.tmp-{}", std::process::id()));
    let put = || {
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
        file.write_all(contents)?;
        file.set_len(bytes)?;
        file.sync_all()?;
        fs::rename(&unfinished, dest)?;
        File::open(dir)?.sync_all()
    };
    put().map_err(|source| {
        let _ = fs::remove_file(&unfinished);
        FetchError::Local { doing: "write", path: dest.to_owned(), source }
    })
}

#[cfg(test)]
mod tests {
    use waltide_format::archive::WaltideInfo;
    use waltide_format::{SegmentSize, TimelineId};

    use super::*;
    use crate::testing;

    const SYSTEM: u64 = 7_300_000_000_000_000_001;

    struct Place {
        _dirs: (tempfile::TempDir, tempfile::TempDir),
        archive: Archive,
        fetcher: Fetcher,
        data_dir: PathBuf,
        layout: SystemLayout,
    }

    /// An archive and a data directory of the same system.
    async fn place() -> Place {
        let dirs = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let archive = Archive::create(&dirs.0.path().to_str().unwrap().parse().unwrap()).await.unwrap();
        let layout = Layout::new("main").unwrap();
        let info = WaltideInfo { format_version: 1, archive_id: "00".into(), created: Default::default() };
        put(&archive, Layout::WALTIDE_JSON, Envelope::seal_json(ObjectKind::Json, &info)).await;
        let system = layout.system(SYSTEM.into());
        let info = testing::system(SYSTEM);
        put(&archive, &system.system_json(), Envelope::seal_json(ObjectKind::Json, &info)).await;
        let data_dir = dirs.1.path().to_owned();
        fs::create_dir_all(data_dir.join("pg_wal")).unwrap();
        fs::create_dir_all(data_dir.join("global")).unwrap();
        fs::write(data_dir.join("PG_VERSION"), "15\n").unwrap();
        fs::write(data_dir.join("global/pg_control"), SYSTEM.to_le_bytes()).unwrap();
        let fetcher = Fetcher::new(archive.clone(), layout);
        Place { _dirs: dirs, archive, fetcher, data_dir, layout: system }
    }

    async fn put(archive: &Archive, path: &str, bytes: Vec<u8>) {
        archive.put_new(path, bytes.into()).await.unwrap();
    }

    impl Place {
        fn request(&self, name: &str) -> FetchRequest {
            FetchRequest {
                name: name.parse().unwrap(),
                dest: "pg_wal/RECOVERYXLOG".into(),
                data_dir: self.data_dir.clone(),
                system_id: None,
                ahead: ReadAhead { segments: 4, bytes: 8 << 20 },
            }
        }

        async fn fetch(&self, name: &str) -> Result<Fetched, FetchError> {
            self.fetcher.fetch(&self.request(name)).await
        }

        async fn put_segment(&self, number: u64, ending: Ending) -> Vec<u8> {
            let (name, wal, object) = testing::stored_segment(SYSTEM, number, ending);
            put(&self.archive, &self.layout.wal_file(WalFileName::Segment(name)), object).await;
            wal
        }

        fn dest(&self) -> Option<Vec<u8>> {
            fs::read(self.data_dir.join("pg_wal/RECOVERYXLOG")).ok()
        }

        fn failed(&self, e: &FetchError) -> bool {
            e.outcome(&self.data_dir) == FetchOutcome::Failed
        }
    }

    #[tokio::test]
    async fn a_segment_is_brought_and_the_next_ones_wait_in_the_queue() {
        let place = place().await;
        let mut wals = Vec::new();
        for n in 3..10 {
            wals.push(place.put_segment(n, Ending::Full).await);
        }
        let first = place.fetch("000000010000000000000003").await.unwrap();
        assert_eq!((first.bytes, first.from_queue), (1 << 20, false));
        assert!(place.dest().unwrap() == wals[0]);
        let request = place.request("000000010000000000000003");
        let brought = place.fetcher.read_ahead(&request, first.ahead.unwrap()).await.unwrap();
        assert_eq!(brought, 4);
        // What waits is taken even where the archive is gone.
        for n in 4..8 {
            let name = testing::segment_name(n);
            place.archive.delete(&place.layout.wal_file(WalFileName::Segment(name))).await.unwrap();
            let fetched = place.fetch(&name.to_string()).await.unwrap();
            assert_eq!(fetched.ahead.is_some(), n >= 5, "half of them are still there after segment 4");
            assert!(fetched.from_queue && place.dest().unwrap() == wals[n as usize - 3]);
        }
        assert!(!place.fetch("000000010000000000000008").await.unwrap().from_queue);
        let _ = place.fetch("00000002.history").await.unwrap_err();
        assert!(!place.data_dir.join("pg_wal/waltide-queue").exists(), "recovery begins or ends here");
    }

    #[tokio::test]
    async fn the_copy_that_reaches_furthest_is_brought_and_filled_up_with_zeros() {
        let place = place().await;
        let short = place.put_segment(3, Ending::EndOfLog).await;
        let fetched = place.fetch("000000010000000000000003").await.unwrap();
        assert_eq!(fetched.ahead, None, "nothing follows a log that ends");
        assert!(short.len() < 1 << 20);
        let found = place.dest().unwrap();
        assert!(found.len() == 1 << 20 && found.starts_with(&short));
        assert!(found[short.len()..].iter().all(|b| *b == 0));

        let (name, wal, object) = testing::stored_segment(SYSTEM, 3, Ending::Full);
        let of = WalFileName::Segment(name);
        let longer = WalObject::Longer { of, valid_end: Lsn::from(4 << 20) };
        put(&place.archive, &place.layout.wal_object(longer), object).await;
        place.fetch("000000010000000000000003").await.unwrap();
        assert!(place.dest().unwrap() == wal);
    }

    #[tokio::test]
    async fn every_flipped_byte_of_a_segment_is_found_and_nothing_gets_the_name() {
        let place = place().await;
        let (name, _, object) = testing::stored_segment(SYSTEM, 3, Ending::Full);
        for at in (0..object.len()).step_by(7) {
            let mut bad = object.clone();
            bad[at] ^= 0x10;
            let err = check(&bad, "x".into(), SYSTEM.into(), name).unwrap_err();
            assert!(place.failed(&err), "byte {at}");
        }
        let mut bad = object.clone();
        bad[20] ^= 1;
        put(&place.archive, &place.layout.wal_file(WalFileName::Segment(name)), bad).await;
        let err = place.fetch("000000010000000000000003").await.unwrap_err();
        assert!(
            place.failed(&err)
                && err
                    .to_string()
                    .starts_with("main/7300000000000000001/wal/00000001/000000010000000000000003 is damaged"),
            "{err}"
        );
        assert_eq!((place.dest(), fs::read_dir(place.data_dir.join("pg_wal")).unwrap().count()), (None, 0));
    }

    #[tokio::test]
    async fn a_record_that_is_damaged_under_right_checksums_is_found() {
        let (name, mut wal, object) = testing::stored_segment(SYSTEM, 3, Ending::Full);
        let index = StoredSegment::decode(&object).unwrap().index;
        wal[2] = 0xFF; // xlp_info
        let object = waltide_format::archive::encode_segment(&wal, &index, 1, 1);
        let err = check(&object, "x".into(), SYSTEM.into(), name).unwrap_err();
        assert!(matches!(err, FetchError::Wal { .. }), "{err}");
    }

    #[tokio::test]
    async fn a_segment_of_another_name_or_system_is_not_handed_over() {
        let place = place().await;
        let (_, _, object) = testing::stored_segment(SYSTEM, 4, Ending::Full);
        let (three, _, foreign) = testing::stored_segment(99, 3, Ending::Full);
        let path = place.layout.wal_file(WalFileName::Segment(three));
        for object in [object, foreign] {
            put(&place.archive, &path, object).await;
            let err = place.fetch("000000010000000000000003").await.unwrap_err();
            assert!(matches!(err, FetchError::Foreign { .. }) && place.failed(&err), "{err}");
            place.archive.delete(&path).await.unwrap();
        }
    }

    #[tokio::test]
    async fn not_there_is_answered_only_by_the_archive_that_would_have_it() {
        let place = place().await;
        for name in ["000000010000000000000003", "00000002.history", "000000010000000000000003.partial"] {
            let err = place.fetch(name).await.unwrap_err();
            assert_eq!(err.outcome(&place.data_dir), FetchOutcome::NotThere, "{err}");
        }
        // Another system's data directory.
        fs::write(place.data_dir.join("global/pg_control"), 5u64.to_le_bytes()).unwrap();
        let err = place.fetch("000000010000000000000003").await.unwrap_err();
        assert!(matches!(err, FetchError::NoSystem { .. }) && place.failed(&err), "{err}");
        // A mount point with nothing mounted.
        let empty = tempfile::tempdir().unwrap();
        let archive = Archive::create(&empty.path().to_str().unwrap().parse().unwrap()).await.unwrap();
        let fetcher = Fetcher::new(archive, Layout::new("main").unwrap());
        let err = fetcher.fetch(&place.request("000000010000000000000003")).await.unwrap_err();
        assert!(matches!(err, FetchError::NoArchive { .. }) && place.failed(&err), "{err}");
        fs::write(place.data_dir.join("standby.signal"), "").unwrap();
        assert_eq!(err.outcome(&place.data_dir), FetchOutcome::TryAgain);
    }

    #[tokio::test]
    async fn without_a_data_directory_the_newest_system_is_meant() {
        let place = place().await;
        let mut newer = testing::system(SYSTEM + 1);
        newer.created = "2030-01-01T00:00:00Z".parse().unwrap();
        let path = Layout::new("main").unwrap().system((SYSTEM + 1).into()).system_json();
        put(&place.archive, &path, Envelope::seal_json(ObjectKind::Json, &newer)).await;
        let wal = place.put_segment(3, Ending::Full).await;
        let out = tempfile::tempdir().unwrap();
        let mut request = place.request("000000010000000000000003");
        request.data_dir = out.path().to_owned();
        request.dest = "segment".into();
        let err = place.fetcher.fetch(&request).await.unwrap_err();
        assert_eq!(err.outcome(out.path()), FetchOutcome::NotThere, "the newest has no WAL: {err}");
        request.system_id = Some(SYSTEM.into());
        let fetched = place.fetcher.fetch(&request).await.unwrap();
        assert_eq!(fetched.ahead, None, "there is no pg_wal to put a queue in");
        assert!(fs::read(out.path().join("segment")).unwrap() == wal);
    }

    #[tokio::test]
    async fn a_history_file_is_brought_under_its_own_name_only() {
        let place = place().await;
        let two = WalFileName::History(TimelineId::new(2).unwrap());
        let file = WalFile { name: two, contents: b"1\t0/3000000\tx\n".to_vec(), pushed_by: None };
        put(&place.archive, &place.layout.wal_file(two), file.encode()).await;
        place.fetch("00000002.history").await.unwrap();
        assert_eq!(place.dest().unwrap(), file.contents);
        let three = WalFileName::History(TimelineId::new(3).unwrap());
        put(&place.archive, &place.layout.wal_file(three), file.encode()).await;
        let err = place.fetch("00000003.history").await.unwrap_err();
        assert!(matches!(err, FetchError::Foreign { .. }), "{err}");
    }

    #[test]
    fn a_queue_never_holds_more_than_it_may() {
        let size = |mb: u64| SegmentSize::new(mb << 20).unwrap();
        let count = |mb| ReadAhead::default().count(size(mb));
        assert_eq!([count(1), count(16), count(64), count(1024)], [8, 8, 2, 0]);
    }
}
