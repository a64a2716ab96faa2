//! Ships one file of pg_wal into the archive: `archive_command`. Acknowledged means durable, nothing is overwritten,
//! nothing is believed.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;
use tokio::sync::{OnceCell, watch};
use waltide_format::archive::{
    AdmittedFault, ClusterInfo, Layout, PackedSegment, PushSource, SegmentIndex, SystemInfo, WalDigest,
    WalFile, WalObject, pack_segment, read_from, wal_digest,
};
use waltide_format::engines::postgres::cluster::{BackupHistory, History, HistoryError};
use waltide_format::engines::postgres::wal::{LONG_HEADER_BYTES, WalBytes};
use waltide_format::{Corrupt, Lsn, SegmentName, SystemId, TimelineId, WalFileName};
use waltide_storage::{Archive, Put, StorageError};

use super::admit::{self, Admission, Refusal};
use super::copies::{Copies, Incoming, Sources, history_difference};
use super::parting::Parting;
use super::wal_dir::{OpenFile, SEGMENT_BYTES_MAX, TEXT_BYTES_MAX, WalDir, read_whole};
use crate::init::{self, InitError, read_json};
use crate::merged::IdleMerge;

/// How segments are compressed unless the operator says otherwise: measured, docs/performance.md.
pub const DEFAULT_LEVEL: i32 = 1;
/// No stored segment is larger: its WAL, which is stored as it is where it does not compress, and its index.
pub(crate) const OBJECT_BYTES_MAX: u64 = 3 << 29;

/// What to ship, and where to.
#[derive(Debug, Clone)]
pub struct PushRequest {
    /// The archive.
    pub archive: Archive,
    /// The cluster in it.
    pub layout: Layout,
    /// The file: PostgreSQL's `%p`.
    pub path: PathBuf,
    /// Threads that work at once.
    pub threads: usize,
    /// zstd's level.
    pub level: i32,
    /// Stores a damaged segment with a note of its faults instead of refusing it.
    pub force_admit: bool,
}

/// What became of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pushed {
    /// The file.
    pub name: WalFileName,
    /// The object that holds it.
    pub object: String,
    /// How it got there.
    pub outcome: Outcome,
    /// The file's length.
    pub file_bytes: u64,
    /// What the archive grew by.
    pub stored_bytes: u64,
    /// What was let through because it was forced.
    pub faults: Vec<AdmittedFault>,
}

/// How a file got into the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It is new.
    Stored,
    /// The same bytes were there, and are durable.
    AlreadyThere,
    /// A copy was there that holds every valid record of this one.
    Contained,
    /// A shorter copy was there; this one lies beside it.
    StoredBeside,
}

/// Why a file was not acknowledged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PushError {
    /// PostgreSQL archives no file of that name.
    #[error("{} is no file that PostgreSQL archives: {why}", path.display())]
    Name {
        /// The file.
        path: PathBuf,
        /// What is wrong with its name.
        why: String,
    },
    /// The file could not be read.
    #[error("{} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The cluster is not in the archive.
    #[error("cluster {cluster} is not in {archive}\nhint: make it with `waltide init --data-dir DIR`")]
    NotInitialised {
        /// The cluster.
        cluster: String,
        /// The archive's address.
        archive: String,
    },
    /// The file is of a database that the cluster does not know.
    #[error(
        "{name} is of another cluster: its system identifier is {found}, {cluster} in the archive has {known}\nhint: \
         two servers may share one archive_command; give each its own --cluster. After pg_upgrade run `waltide init \
         --upgrade`."
    )]
    OtherCluster {
        /// The file.
        name: WalFileName,
        /// Its system identifier.
        found: SystemId,
        /// The cluster.
        cluster: String,
        /// The system identifiers it has.
        known: String,
    },
    /// Nothing says which database a file without a system identifier is of.
    #[error(
        "nothing says which database {name} is of: neither pg_control nor a segment lies near it, and {cluster} has had \
         {count}\nhint: push it from its pg_wal"
    )]
    UnknownSystem {
        /// The file.
        name: WalFileName,
        /// The cluster.
        cluster: String,
        /// How many system identifiers it has.
        count: usize,
    },
    /// The segment is not what it should be.
    #[error(
        "{name} is refused: {why}\nhint: it would stop every restore that needs it. Where the disk must not fill, \
         `waltide push --force-admit` archives it with a note of the fault."
    )]
    Refused {
        /// The file.
        name: WalFileName,
        /// What is wrong.
        why: Refusal,
    },
    /// The archive has other records under that name.
    #[error(
        "{name} is already archived with different contents: it differs from {object} at {lsn}; {sources}\nhint: two \
         servers may be archiving the same timeline; stop one of them and compare."
    )]
    Diverges {
        /// The file.
        name: WalFileName,
        /// The stored copy.
        object: String,
        /// The first position at which they differ.
        lsn: Lsn,
        /// Whose they are.
        sources: Box<Sources>,
    },
    /// The archived segment beside this one is of another log.
    #[error(
        "{name} and the archived {object} are not of one log: {why}; {parting}; {sources}\nhint: two servers may be archiving the \
         same timeline; stop one of them and compare."
    )]
    AnotherLog {
        /// The file.
        name: WalFileName,
        /// Its archived neighbour.
        object: String,
        /// What does not fit.
        why: String,
        /// Where the two logs part.
        parting: Parting,
        /// Whose they are.
        sources: Box<Sources>,
    },
    /// The archive has another text under that name.
    #[error(
        "{name} is already archived with different contents, as {object}{how}; {sources}\nhint: two servers may have \
         taken the same timeline; stop one of them and compare."
    )]
    Differs {
        /// The file.
        name: WalFileName,
        /// The stored copy.
        object: String,
        /// What differs, where that can be told.
        how: String,
        /// Whose they are.
        sources: Box<Sources>,
    },
    /// A history file that is none.
    #[error("{name} is refused: it is no timeline history")]
    History {
        /// The file.
        name: WalFileName,
        /// What is wrong.
        source: HistoryError,
    },
    /// A backup history file that is none.
    #[error("{name} is refused: it is no backup history: {why}")]
    BackupHistory {
        /// The file.
        name: WalFileName,
        /// What is wrong.
        why: String,
    },
    /// An object of the archive is not what its name says.
    #[error("{object} is damaged in the archive\nhint: run `waltide verify`")]
    Damaged {
        /// The object.
        object: String,
        /// What is wrong with it.
        source: Corrupt,
    },
    /// The archive could not serve.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A segment that went along was not stored, because the one it went along with was refused.
    #[error("{name} is held back: a segment before it differs from the archive's")]
    HeldBack {
        /// The file.
        name: WalFileName,
    },
    /// Work that was handed to another thread did not come back.
    #[error("the work on {name} was cut short")]
    Interrupted {
        /// The file.
        name: WalFileName,
    },
}

impl PushError {
    /// Whether the archive has another server's log in the file's place. What lies behind the file in its own directory
    /// must not be stored then, for its names may still be free.
    pub const fn is_another_log(&self) -> bool {
        matches!(self, Self::Diverges { .. } | Self::AnotherLog { .. } | Self::Differs { .. })
    }

    /// Whether the same file may pass later without anybody doing something about the file: the archive failed, not it.
    pub fn is_archives(&self) -> bool {
        matches!(self, Self::Storage(_) | Self::NotInitialised { .. } | Self::Interrupted { .. })
    }
}

impl From<InitError> for PushError {
    fn from(e: InitError) -> Self {
        match e {
            InitError::Damaged { path, source, .. } => Self::Damaged { object: path, source },
            InitError::Storage(e) => Self::Storage(e),
            e => {
                Self::Storage(StorageError::Other { path: Layout::WALTIDE_JSON.to_owned(), source: e.into() })
            }
        }
    }
}

/// Ships one file, and with it the neighbours that are ready.
pub async fn push(request: &PushRequest) -> Result<Pushed, PushError> {
    let shipper = Shipper::new(request.archive.clone(), request.layout.clone(), request.level)
        .force_admit(request.force_admit);
    super::neighbours::push_with_neighbours(&shipper, &request.path, request.threads).await
}

/// Ships files to one cluster of an archive. Cloning is cheap.
#[derive(Debug, Clone)]
pub struct Shipper(Arc<Inner>);

#[derive(Debug, Clone)]
struct Inner {
    archive: Archive,
    layout: Layout,
    level: i32,
    force_admit: bool,
    /// Whether anything may be stored, where that is not known yet.
    gate: Option<Gate>,
    /// The systems of the cluster, read when first needed and again when one is not among them.
    systems: OnceCell<Vec<SystemInfo>>,
}

/// Tells whether the first segment of a run was found to be of the archive's log, once that is known.
pub(crate) type Gate = watch::Receiver<Option<bool>>;

/// A segment as it came, once it is clear whose it is.
#[derive(Debug)]
pub(crate) struct Arrival {
    dir: WalDir,
    name: WalFileName,
    segment: SegmentName,
    partial: bool,
    file: Arc<OpenFile>,
    path: PathBuf,
    system_id: SystemId,
    object: String,
    /// Whether nothing was stored under its name when it was looked at.
    is_free: bool,
}

impl Arrival {
    pub(crate) fn name(&self) -> WalFileName {
        self.name
    }

    pub(crate) fn file_bytes(&self) -> u64 {
        self.file.length()
    }
}

/// What a look at the archive said of a file.
#[derive(Debug)]
pub(crate) enum Looked {
    /// It is there.
    Done(Pushed),
    /// It, or what it holds more than the stored copy, is not.
    Missing(Box<Arrival>),
}

impl Shipper {
    /// What merges the indexes of what was shipped.
    pub(super) fn idle_merge(&self) -> IdleMerge {
        IdleMerge::new(self.0.archive.clone(), self.0.layout.clone())
    }

    /// Ships to the cluster of `layout`, compressing at `level`.
    pub fn new(archive: Archive, layout: Layout, level: i32) -> Self {
        Self(Arc::new(Inner {
            archive,
            layout,
            level,
            force_admit: false,
            gate: None,
            systems: OnceCell::new(),
        }))
    }

    /// Whether damaged segments are stored with a note of their faults.
    #[must_use]
    pub fn force_admit(self, force_admit: bool) -> Self {
        Self(Arc::new(Inner { force_admit, ..(*self.0).clone() }))
    }

    /// Stores nothing until the gate opens, and nothing at all where it does not.
    #[must_use]
    pub(crate) fn held_until(&self, gate: Gate) -> Self {
        Self(Arc::new(Inner { gate: Some(gate), ..(*self.0).clone() }))
    }

    /// Ships the file at `path`, working on `threads` threads.
    pub async fn ship(&self, path: &Path, threads: usize) -> Result<Pushed, PushError> {
        match self.look(path).await? {
            Looked::Done(pushed) => Ok(pushed),
            Looked::Missing(arrival) => self.store(*arrival, threads).await,
        }
    }

    /// Sees whether a segment is in the archive already: this is how the run of one that a neighbour's run has shipped
    /// returns at once. Its digest proves it, before anything is scanned. A text file is shipped here and now.
    pub(crate) async fn look(&self, path: &Path) -> Result<Looked, PushError> {
        let file_name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let name: WalFileName =
            file_name.parse().map_err(|e| PushError::Name { path: path.to_owned(), why: format!("{e}") })?;
        let dir = WalDir::of(path);
        let (segment, partial) = match name {
            WalFileName::Segment(segment) => (segment, false),
            WalFileName::Partial(segment) => (segment, true),
            WalFileName::History(_) | WalFileName::BackupHistory(_) => {
                return self.ship_text(dir, path, name).await.map(Looked::Done);
            }
        };
        let unreadable = |source| PushError::Read { path: path.to_owned(), source };
        let file = Arc::new(OpenFile::open(path, SEGMENT_BYTES_MAX).map_err(unreadable)?);
        let head = file.head(LONG_HEADER_BYTES as u64).map_err(unreadable)?;
        let system_id = match admit::identify(&head) {
            Ok(long) => long.system_id,
            // A first page that cannot be read says nothing; where it is forced, the directory tells whose it is.
            Err(why) if self.0.force_admit => {
                let dir = dir.clone();
                let system = blocking(name, move || dir.system()).await?;
                system.ok_or(PushError::Refused { name, why })?
            }
            Err(why) => return Err(PushError::Refused { name, why }),
        };
        let object = self.0.layout.system(system_id).wal_file(name);
        let copies = self.copies(system_id);
        let stored = copies.digest(&object).await?;
        let is_free = stored.is_none();
        if let Some(stored) = stored {
            let found = {
                let file = Arc::clone(&file);
                blocking(name, move || digest_of(&file)).await?
            };
            if found.map_err(unreadable)? == stored {
                let twins = copies.of_twin(name).await?;
                if !twins.is_empty() {
                    // It was stored while its twin was: neither has been compared with the other yet.
                    let whole = Whole { name, path, file: &file, digest: Some(stored) };
                    let (wal, pushed_by) = (whole.read().await?, source_of(&dir, name).await?);
                    copies.twin_holder(Incoming { name, wal: &wal, pushed_by: &pushed_by }, &twins).await?;
                }
                return self.already_there(name, object, file.length()).await.map(Looked::Done);
            }
        }
        let path = path.to_owned();
        let arrival = Arrival { dir, name, segment, partial, file, path, system_id, object, is_free };
        Ok(Looked::Missing(Box::new(arrival)))
    }

    async fn already_there(
        &self,
        name: WalFileName,
        object: String,
        file_bytes: u64,
    ) -> Result<Pushed, PushError> {
        self.0.archive.sync(&object).await?;
        let (outcome, stored_bytes, faults) = (Outcome::AlreadyThere, 0, Vec::new());
        Ok(Pushed { name, object, outcome, file_bytes, stored_bytes, faults })
    }

    /// Admits a segment and stores it, beside a shorter copy if there is one.
    pub(crate) async fn store(&self, arrival: Arrival, threads: usize) -> Result<Pushed, PushError> {
        let Arrival { dir, name, segment, partial, file, path, system_id, object, is_free } = arrival;
        let file_bytes = file.length();
        let system = self.0.layout.system(system_id);
        let info = self.system(name, system_id).await?;
        let history = self.history(&dir, segment, system_id).await?;
        let pushed_by = source_of(&dir, name).await?;
        let copies = self.copies(system_id);
        let twins = copies.of_twin(name).await?;
        let wal_dir = dir.clone();
        let force = self.0.force_admit;
        let admission = Arc::new(Admission { segment, partial, system: info, history, dir, force });
        let packing = Packing { admission, level: self.0.level, threads, pushed_by: pushed_by.clone() };
        let mut whole = Whole { name, path: &path, file: &file, digest: None };
        // Nearly always one look at the file is enough.
        let once = if is_free && !partial && !force && twins.is_empty() {
            let (packing, file) = (packing.clone(), Arc::clone(&file));
            let packed = blocking(name, move || packing.once(&file)).await?;
            packed.map_err(|source| whole.unreadable(source))?.transpose()
        } else {
            None
        };
        let (parcel, twin_holder) = match once {
            Some(parcel) => (parcel, None),
            None => {
                let wal = whole.read().await?;
                let incoming = Incoming { name, wal: &wal, pushed_by: &pushed_by };
                // A `.partial` of which the whole segment holds everything adds nothing.
                let twin_holder = copies.twin_holder(incoming, &twins).await?.filter(|_| partial);
                (blocking(name, move || packing.whole(&wal)).await?, twin_holder)
            }
        };
        let Parcel { index, digest, stored_object } =
            parcel.map_err(|why| PushError::Refused { name, why })?;
        whole.digest = Some(digest);
        let faults = index.faults.clone();
        let valid_end = index.info.valid_end;
        let stored_bytes = stored_object.len() as u64;
        let pushed = |object, outcome, stored_bytes| Pushed {
            name,
            object,
            outcome,
            file_bytes,
            stored_bytes,
            faults,
        };
        if let Some(holder) = twin_holder {
            self.0.archive.sync(&holder).await?;
            return Ok(pushed(holder, Outcome::Contained, 0));
        }
        if is_free && !partial && !self.0.force_admit {
            copies.check_neighbours(segment, &index.info, &wal_dir, &pushed_by).await?;
        }
        if let Some(mut gate) = self.0.gate.clone() {
            let passed = gate.wait_for(Option::is_some).await;
            if !passed.is_ok_and(|passed| *passed == Some(true)) {
                return Err(PushError::HeldBack { name });
            }
        }
        if is_free {
            if self.0.archive.put_new(&object, stored_object.clone()).await? == Put::Created {
                self.compare_with_latecomers(whole, &pushed_by, &twins, system_id).await?;
                return Ok(pushed(object, Outcome::Stored, stored_bytes));
            }
            // A watch and PostgreSQL's own command may ship the same file at the same time.
            if copies.digest(&object).await? == Some(digest) {
                return self.already_there(name, object, file_bytes).await;
            }
        }

        // Other bytes are there under that name: every copy must agree as far as both go. Where another run puts a copy
        // there between the look and the put, the next look sees it.
        let wal = whole.read().await?;
        let incoming = Incoming { name, wal: &wal, pushed_by: &pushed_by };
        let beside = system.wal_object(WalObject::Longer { of: name, valid_end });
        let mut known: Vec<String> = Vec::new();
        let mut is_stored = false;
        loop {
            let mut fresh = copies.of(name).await?;
            fresh.retain(|copy| !known.contains(copy) && (!is_stored || *copy != beside));
            if is_stored && fresh.is_empty() {
                self.compare_with_latecomers(whole, &pushed_by, &twins, system_id).await?;
                return Ok(pushed(beside, Outcome::StoredBeside, stored_bytes));
            }
            let holder = copies.holder(incoming, &fresh).await?;
            known.append(&mut fresh);
            if is_stored {
                continue;
            }
            if let Some(copy) = holder {
                self.0.archive.sync(&copy).await?;
                return Ok(pushed(copy, Outcome::Contained, 0));
            }
            is_stored = self.0.archive.put_new(&beside, stored_object.clone()).await? == Put::Created;
            if !is_stored && known.contains(&beside) {
                let source = Corrupt::invalid("valid_end", 0, valid_end.get());
                return Err(PushError::Damaged { object: beside, source });
            }
        }
    }

    /// Compares what has just been stored with copies under the segment's other name that came at the same time: of two
    /// that disagree, one at least is not acknowledged.
    async fn compare_with_latecomers(
        &self,
        whole: Whole<'_>,
        pushed_by: &PushSource,
        known: &[String],
        system_id: SystemId,
    ) -> Result<(), PushError> {
        let (name, copies) = (whole.name, self.copies(system_id));
        let mut twins = copies.of_twin(name).await?;
        twins.retain(|twin| !known.contains(twin));
        if twins.is_empty() {
            return Ok(());
        }
        let wal = whole.read().await?;
        copies.twin_holder(Incoming { name, wal: &wal, pushed_by }, &twins).await.map(|_| ())
    }

    fn copies(&self, system_id: SystemId) -> Copies<'_> {
        Copies::new(&self.0.archive, self.0.layout.system(system_id))
    }

    async fn ship_text(&self, dir: WalDir, path: &Path, name: WalFileName) -> Result<Pushed, PushError> {
        let (read, beside) = {
            let (path, dir) = (path.to_owned(), dir.clone());
            blocking(name, move || (read_whole(&path, TEXT_BYTES_MAX), dir.system())).await?
        };
        let contents = read.map_err(|source| PushError::Read { path: path.to_owned(), source })?;
        match name {
            WalFileName::History(timeline) => {
                History::parse(timeline, &contents).map_err(|source| PushError::History { name, source })?;
            }
            WalFileName::BackupHistory(wanted) => {
                let why = |why: String| PushError::BackupHistory { name, why };
                let found = BackupHistory::parse(&contents).map_err(|e| why(e.to_string()))?;
                if found.start_segment != wanted.segment {
                    let told = found.start_segment;
                    return Err(why(format!("it speaks of a backup that starts in {told}")));
                }
            }
            WalFileName::Segment(_) | WalFileName::Partial(_) => {}
        }
        let system_id = match beside {
            Some(system_id) => system_id,
            None => {
                let known = self.systems().await?;
                match known {
                    [only] => only.system_id,
                    _ => {
                        let (cluster, count) = (self.0.layout.cluster().to_owned(), known.len());
                        return Err(PushError::UnknownSystem { name, cluster, count });
                    }
                }
            }
        };
        self.system(name, system_id).await?;
        let object = self.0.layout.system(system_id).wal_file(name);
        let file_bytes = contents.len() as u64;
        let pushed_by = source_of(&dir, name).await?;
        let wal_file = WalFile { name, contents, pushed_by: Some(pushed_by.clone()) };
        let encoded = Bytes::from(wal_file.encode());
        let stored_bytes = encoded.len() as u64;
        let pushed = |outcome, stored_bytes| Pushed {
            name,
            object: object.clone(),
            outcome,
            file_bytes,
            stored_bytes,
            faults: Vec::new(),
        };
        if self.0.archive.put_new(&object, encoded).await? == Put::Created {
            return Ok(pushed(Outcome::Stored, stored_bytes));
        }
        let found = self.0.archive.get(&object, TEXT_BYTES_MAX.saturating_mul(2)).await?;
        let found = WalFile::decode(&found)
            .map_err(|source| PushError::Damaged { object: object.clone(), source })?;
        if (found.name, &found.contents) == (wal_file.name, &wal_file.contents) {
            return Ok(pushed(Outcome::AlreadyThere, 0));
        }
        let how = match name {
            WalFileName::History(timeline) => {
                history_difference(timeline, &wal_file.contents, &found.contents).unwrap_or_default()
            }
            _ => String::new(),
        };
        let sources = Box::new(Sources { pushed_by, stored_by: found.pushed_by });
        Err(PushError::Differs { name, object, how, sources })
    }

    /// Whether something lies under a name that was free when it was looked at.
    pub(crate) async fn has_appeared(&self, arrival: &Arrival) -> Result<bool, PushError> {
        Ok(arrival.is_free && self.0.archive.head(&arrival.object).await?.is_some())
    }

    /// The systems that the cluster has had.
    async fn systems(&self) -> Result<&[SystemInfo], PushError> {
        let read = async || {
            let Inner { archive, layout, .. } = &*self.0;
            if read_json::<ClusterInfo>(archive, &layout.cluster_json()).await?.is_none() {
                let (cluster, archive) = (layout.cluster().to_owned(), archive.url().to_owned());
                return Err(PushError::NotInitialised { cluster, archive });
            }
            let mut known = Vec::new();
            for system_id in init::systems(archive, layout).await? {
                known
                    .extend(read_json::<SystemInfo>(archive, &layout.system(system_id).system_json()).await?);
            }
            Ok(known)
        };
        self.0.systems.get_or_try_init(read).await.map(Vec::as_slice)
    }

    /// What the archive says of a system, which must be one of the cluster's.
    async fn system(&self, name: WalFileName, system_id: SystemId) -> Result<SystemInfo, PushError> {
        let known = self.systems().await?;
        if let Some(found) = known.iter().find(|info| info.system_id == system_id) {
            return Ok(found.clone());
        }
        // A resident shipper lives through `init --upgrade`.
        let path = self.0.layout.system(system_id).system_json();
        if let Some(found) = read_json::<SystemInfo>(&self.0.archive, &path).await? {
            return Ok(found);
        }
        let known: Vec<String> = known.iter().map(|info| info.system_id.to_string()).collect();
        Err(PushError::OtherCluster {
            name,
            found: system_id,
            cluster: self.0.layout.cluster().to_owned(),
            known: if known.is_empty() { "none".to_owned() } else { known.join(", ") },
        })
    }

    /// The history of a segment's timeline: the file beside the segment, else the archived one.
    async fn history(
        &self,
        dir: &WalDir,
        segment: SegmentName,
        system_id: SystemId,
    ) -> Result<Option<History>, PushError> {
        let timeline = segment.timeline();
        if timeline == TimelineId::FIRST {
            return Ok(None);
        }
        let name = WalFileName::History(timeline);
        let beside = {
            let dir = dir.clone();
            blocking(name, move || dir.history(timeline)).await?
        };
        if beside.is_some() {
            return Ok(beside);
        }
        let object = self.0.layout.system(system_id).wal_file(name);
        let found = match self.0.archive.get(&object, TEXT_BYTES_MAX.saturating_mul(2)).await {
            Ok(found) => found,
            Err(e) if e.is_not_found() => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let found = WalFile::decode(&found).map_err(|source| PushError::Damaged { object, source })?;
        History::parse(timeline, &found.contents)
            .map(Some)
            .map_err(|source| PushError::History { name, source })
    }
}

/// How a segment becomes what is stored of it.
#[derive(Debug, Clone)]
struct Packing {
    admission: Arc<Admission>,
    level: i32,
    threads: usize,
    pushed_by: PushSource,
}

/// What is stored of a segment.
struct Parcel {
    index: SegmentIndex,
    digest: [u8; 32],
    stored_object: Bytes,
}

impl Packing {
    /// Reads a file once, checks and compresses it. None where it must be read as a whole.
    fn once(&self, file: &OpenFile) -> io::Result<Result<Option<Parcel>, Refusal>> {
        let length = usize::try_from(file.length()).map_err(io::Error::other)?;
        let read = |at: usize, part: &mut [u8]| file.read(at as u64, part);
        let packed = pack_segment(length, read, self.level, self.threads, |wal| {
            match self.admission.scan_once(wal) {
                Ok(Some(index)) => Ok(self.signed(index)),
                Ok(None) => Err(None),
                Err(why) => Err(Some(why)),
            }
        })?;
        Ok(match packed {
            Ok(packed) => Ok(Some(Parcel::new(packed))),
            Err(None) => Ok(None),
            Err(Some(why)) => Err(why),
        })
    }

    /// The same of a segment that is in memory.
    fn whole(&self, wal: &[u8]) -> Result<Parcel, Refusal> {
        let index = |_: &mut dyn WalBytes| self.admission.scan(wal).map(|index| self.signed(index));
        let packed = pack_segment(wal.len(), read_from(wal), self.level, self.threads, index);
        packed.expect("memory is there to be read").map(Parcel::new)
    }

    fn signed(&self, index: SegmentIndex) -> SegmentIndex {
        SegmentIndex { pushed_by: Some(self.pushed_by.clone()), ..index }
    }
}

impl Parcel {
    fn new((packed, index): (PackedSegment, SegmentIndex)) -> Self {
        let digest = packed.digest();
        Self { index, digest, stored_object: Bytes::from(packed.seal()) }
    }
}

/// A file that may have to be read as a whole.
#[derive(Debug, Clone, Copy)]
struct Whole<'a> {
    name: WalFileName,
    path: &'a Path,
    file: &'a Arc<OpenFile>,
    /// What it had when it was read before.
    digest: Option<[u8; 32]>,
}

impl Whole<'_> {
    fn unreadable(&self, source: io::Error) -> PushError {
        PushError::Read { path: self.path.to_owned(), source }
    }

    async fn read(&self) -> Result<Bytes, PushError> {
        let (file, digest) = (Arc::clone(self.file), self.digest);
        let read = blocking(self.name, move || {
            let wal = file.whole()?;
            match digest.filter(|digest| *digest != wal_digest(&wal)) {
                Some(_) => Err(io::Error::other("it changed while it was archived")),
                None => Ok(Bytes::from(wal)),
            }
        });
        read.await?.map_err(|source| self.unreadable(source))
    }
}

/// SHA-256 of a file, in little memory.
fn digest_of(file: &OpenFile) -> io::Result<[u8; 32]> {
    let (mut digest, mut part) = (WalDigest::new(), vec![0; 256 << 10]);
    let mut at = 0u64;
    while at < file.length() {
        let left = usize::try_from(file.length().saturating_sub(at)).unwrap_or(usize::MAX);
        let bytes = left.min(part.len());
        let part = part.get_mut(..bytes).unwrap_or_default();
        file.read(at, part)?;
        digest.update(part);
        at = at.saturating_add(bytes as u64);
    }
    Ok(digest.finish())
}

/// Who pushes a file that lies in `dir`.
async fn source_of(dir: &WalDir, name: WalFileName) -> Result<PushSource, PushError> {
    let dir = dir.clone();
    blocking(name, move || dir.source()).await
}

/// Runs work that computes or waits for the disk where it holds up nobody.
pub(crate) async fn blocking<T: Send + 'static>(
    name: WalFileName,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, PushError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| PushError::Interrupted { name })
}
