//! Carries a plan out: files out of packs, recovery's settings, and pg_control last, without which no server
//! starts on what an interrupted restore left.

mod backup_files;
mod begin;
mod conf;
mod error;
mod pieces;
mod place;
mod write;

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use futures_util::{StreamExt as _, TryStreamExt as _};
use serde::Serialize;
use waltide_format::archive::{ExtentMap, Manifest, SystemLayout, Tablespace};
use waltide_format::engines::postgres::cluster::RelationSegment;
use waltide_format::{BLOCK_BYTES, BackupId, Corrupt, WalFileName};
use waltide_storage::{Archive, ArchiveUrl, Progress};

use super::fetch::{FetchRequest, Fetcher};
use super::forward::{
    ForwardError, Over, PART_BLOCKS, Place as ForwardPlace, Ready, Replay, ReplayMode, ReplayPlan, Replayed,
};
use super::queue::{Filled, ReadAhead};
use super::selection::Selection;
use crate::plan::Plan;
use crate::target::TargetTimeline;
use error::io_error;
use pieces::Piece;

pub(crate) use backup_files::BackupFiles;
pub use conf::restore_command;
pub use error::RestoreError;
pub use place::{Deletion, Owner, PlaceError, Placed};

/// No manifest and no map comes near this.
const OBJECT_BYTES_MAX: u64 = 1 << 30;
/// Read, and written, when all else is there.
const CONTROL_FILE: &str = "global/pg_control";
/// Which timeline recovery follows.
const TIMELINE: &str = "recovery_target_timeline";
/// What a backup may bring along, a standby's its signal, and a restored cluster must not start with.
const STALE: [&str; 6] = [
    "recovery.signal",
    "standby.signal",
    "tablespace_map",
    "postmaster.pid",
    "postmaster.opts",
    "recovery.conf",
];
/// Says in a data directory that a restore into it has not come to its end.
pub(super) const MARKER: &str = "waltide.restoring";

/// How to carry a plan out.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// Where the cluster goes.
    pub data_dir: PathBuf,
    /// Where tablespaces go: old path or OID, new path.
    pub tablespace_map: Vec<(String, PathBuf)>,
    /// Tablespaces that recovery makes where the WAL says ([`super::made_tablespaces`]).
    pub made: Vec<Tablespace>,
    /// Whether what is there may be deleted.
    pub allow_clear: bool,
    /// Whether what is there already is kept where it is the same.
    pub delta: bool,
    /// Whether the cluster becomes a standby.
    pub standby: bool,
    /// How the log is replayed.
    pub replay: Replay,
    /// Whether the cluster archives nothing.
    pub archive_off: bool,
    /// Whose the files are to be.
    pub owner: Option<Owner>,
    /// `restore_command`.
    pub restore_command: String,
    /// Settings that stand behind all others.
    pub settings: Vec<(String, String)>,
    /// The relations that are wanted, where not all are; others come back empty.
    pub selection: Option<Selection>,
    /// How many threads to work with.
    pub threads: usize,
    /// Whether only the files are wanted, for no server to start on: whose they are does not matter then.
    pub files_only: bool,
}

impl RestoreOptions {
    /// Whether a file of the backup is to have its content.
    fn wants(&self, path: &str) -> bool {
        self.selection.as_ref().is_none_or(|selection| selection.wants_file(path))
    }
}

/// What a restore will delete and write.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Actions {
    /// The data directory.
    pub data_dir: PathBuf,
    /// Tablespaces and where they go.
    pub tablespaces: Vec<Placed>,
    /// What is deleted; of a delta only what does not belong.
    pub deletions: Vec<Deletion>,
    /// Whether files that are the same stay.
    pub delta: bool,
    /// How many files are written.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The server's settings, as they stand in postgresql.auto.conf.
    pub settings: Vec<(String, String)>,
    /// `recovery.signal` or `standby.signal`; none where no recovery is left.
    pub signal: Option<&'static str>,
    /// How the log will be replayed.
    pub replay: ReplayPlan,
    /// Whose the files will be, where not ours.
    pub owner: Option<Owner>,
    /// What the operator should know.
    pub notes: Vec<String>,
}

impl fmt::Display for Actions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for d in &self.deletions {
            writeln!(f, "delete    {} ({} files, {} bytes)", d.path.display(), d.files, d.bytes)?;
        }
        let how = if self.delta { "rewrite what differs of" } else { "write" };
        writeln!(f, "{how:9} {} ({} files, {} bytes)", self.data_dir.display(), self.files, self.bytes)?;
        for t in &self.tablespaces {
            let moved =
                if Path::new(&t.from) == t.to { String::new() } else { format!(", which lay at {}", t.from) };
            writeln!(f, "write     {} (tablespace {}{moved})", t.to.display(), t.oid)?;
        }
        if let Some(signal) = self.signal {
            writeln!(f, "write     {}", self.data_dir.join(signal).display())?;
        }
        writeln!(f, "write     {}:", self.data_dir.join("postgresql.auto.conf").display())?;
        for (name, value) in &self.settings {
            writeln!(f, "            {name} = {}", conf::quoted(value))?;
        }
        writeln!(f, "replay    {}", self.replay)?;
        for note in &self.notes {
            writeln!(f, "note      {note}")?;
        }
        Ok(())
    }
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Restored {
    /// The data directory.
    pub data_dir: PathBuf,
    /// Files of the backup.
    pub files: u64,
    /// Bytes of the cluster.
    pub bytes: u64,
    /// Bytes that were written.
    pub written_bytes: u64,
    /// Bytes read from the archive.
    pub read_bytes: u64,
    /// What native replay did.
    pub replayed: Option<Replayed>,
    /// Why it ended earlier than it was to, or PostgreSQL replays everything after all.
    pub because: Option<String>,
    /// Segments behind that which recovery need not fetch any more.
    pub queued_segments: u64,
    /// Seconds it took.
    pub seconds: f64,
}

/// What a restore of a part reads of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Reads {
    /// Files.
    pub files: u64,
    /// Bytes of packs.
    pub bytes: u64,
    /// Files of the whole backup.
    pub whole_files: u64,
    /// Bytes of packs that a restore of the whole backup reads.
    pub whole_bytes: u64,
}

impl fmt::Display for Reads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { files, bytes, whole_files, whole_bytes } = self;
        write!(f, "{bytes} bytes of the backup for {files} files; of {whole_bytes} for {whole_files}")
    }
}

/// A backup's files brought to a checkpoint's redo point, and what makes a cluster of them.
#[derive(Debug, Clone, PartialEq)]
pub struct BroughtForward {
    /// What native replay did.
    pub replayed: Replayed,
    /// The backup_label with which recovery goes on there.
    pub backup_label: String,
}

/// A restore that was looked into and can be carried out.
#[derive(Debug)]
pub struct Restore {
    archive: Archive,
    layout: SystemLayout,
    fetcher: Fetcher,
    plan: Plan,
    manifest: Manifest,
    maps: Vec<ExtentMap>,
    options: RestoreOptions,
    actions: Actions,
    config_files: Vec<(&'static str, String, u32)>,
}

/// What was written of a cluster.
struct Written {
    total: u64,
    read_bytes: u64,
    /// What native replay left.
    over: Option<Over>,
    /// Why that is less than was to be.
    because: Option<String>,
    /// The backup's pg_control.
    control: Vec<u8>,
}

impl Restore {
    /// Looks into everything that could stand in the way; changes nothing.
    pub async fn prepare(
        archive: &Archive,
        layout: &waltide_format::archive::Layout,
        plan: &Plan,
        mut options: RestoreOptions,
    ) -> Result<Self, RestoreError> {
        let system = layout.system(plan.system_id);
        let manifest = read_manifest(archive, &system, &plan.backup).await?;
        let maps = read_maps(archive, &system, &manifest).await?;
        options.data_dir =
            std::path::absolute(&options.data_dir).map_err(io_error("find", &options.data_dir))?;
        let mut notes = Vec::new();
        let has = |name: &str| manifest.files.iter().any(|f| f.path == name);
        for what in [CONTROL_FILE, "PG_VERSION"] {
            if !has(what) {
                return Err(RestoreError::Incomplete { backup: plan.backup.clone(), what });
            }
        }
        let mut config_files = Vec::new();
        if !has("postgresql.conf") {
            config_files = conf::brought_home(&manifest.config_files, &mut notes);
            config_files.retain(|(name, ..)| !has(name));
            match config_files.iter().any(|(name, ..)| *name == "postgresql.conf") {
                true => notes.push(
                    "the configuration lay outside the data directory: a copy of it is put into the data directory"
                        .to_owned(),
                ),
                false => notes.push(
                    "the backup has no postgresql.conf: start the server with -c config_file=…".to_owned(),
                ),
            }
        }
        let (manifest, maps, options, actions) = blocking(|| {
            actions(archive, plan, &manifest, &mut options, notes).map(|a| (manifest, maps, options, a))
        })?;
        Ok(Self {
            archive: archive.clone(),
            layout: system,
            fetcher: Fetcher::new(archive.clone(), layout.clone()),
            plan: plan.clone(),
            manifest,
            maps,
            options,
            actions,
            config_files,
        })
    }

    /// How it comes to its target.
    pub const fn way(&self) -> &Replay {
        &self.options.replay
    }

    /// What it will delete and write.
    pub const fn actions(&self) -> &Actions {
        &self.actions
    }

    /// The backup it restores.
    pub const fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Does it. What is there when this fails is no cluster that a server would start on, and the next restore may
    /// replace it.
    pub async fn carry_out(&self, progress: &Arc<dyn Progress>) -> Result<Restored, RestoreError> {
        let started = Instant::now();
        let place = write::Place::new(&self.options.data_dir, self.plan.major, &self.actions);
        let Written { total, read_bytes, over, because, control } =
            self.write_cluster(&place, progress).await?;
        let last = self.plan.segments.iter().filter(|s| s.partial);
        for segment in last {
            // PostgreSQL asks for no .partial, so it has to lie in pg_wal under the segment's name.
            let request = FetchRequest {
                name: WalFileName::Partial(segment.name),
                dest: PathBuf::from("pg_wal").join(segment.name.to_string()),
                data_dir: self.options.data_dir.clone(),
                system_id: Some(self.plan.system_id),
                ahead: ReadAhead { segments: 0, bytes: 0 },
            };
            self.fetcher.fetch(&request).await?;
            place.own(&self.options.data_dir.join(&request.dest))?;
        }
        if let Some(selection) = &self.options.selection {
            blocking(|| place.close_databases(selection))?;
        }
        let queued = match &over {
            Some(Over { begun: Some(begun), .. }) => {
                self.begin_timeline(&place, begun).await?;
                0
            }
            Some(Over { replayed, .. }) => self.fill_queue(&place, replayed, progress).await?,
            None => 0,
        };
        blocking(|| self.write_settings(&place, over.as_ref().map(|over| &over.replayed)))?;
        progress.phase("sync", None);
        let files = match &over {
            Some(_) => write::Synced::Everything,
            None => write::Synced::Backup(&self.manifest),
        };
        let (replayed, control) = match over {
            Some(over) => (Some(over.replayed), over.control),
            None => (None, control),
        };
        let written_bytes = total.saturating_add(control.len() as u64);
        blocking(|| place.finish(files, CONTROL_FILE, &control, self.control_mode()))?;
        Ok(Restored {
            data_dir: self.options.data_dir.clone(),
            files: self.actions.files,
            bytes: self.actions.bytes,
            written_bytes,
            read_bytes,
            replayed,
            because,
            queued_segments: queued,
            seconds: started.elapsed().as_secs_f64(),
        })
    }

    /// Puts the segments that PostgreSQL goes on with where `fetch` finds them at once, as many as there may be.
    async fn fill_queue(
        &self,
        place: &write::Place,
        replayed: &Replayed,
        progress: &Arc<dyn Progress>,
    ) -> Result<u64, RestoreError> {
        let size = self.manifest.segment_size;
        let left =
            self.plan.segments.iter().filter(|s| s.name.end(size).is_some_and(|end| end > replayed.redo));
        let left: Vec<_> = left.take_while(|s| !s.partial).map(|s| s.name).collect();
        let request = FetchRequest {
            name: WalFileName::History(self.plan.timeline),
            dest: PathBuf::from("pg_wal/RECOVERYXLOG"),
            data_dir: self.options.data_dir.clone(),
            system_id: Some(self.plan.system_id),
            ahead: ReadAhead::default(),
        };
        if !self.fetcher.has_room(&request, self.plan.system_id) {
            return Ok(0);
        }
        progress.phase("fetch", None);
        // The checkpoint's record may run over the edge of its segment.
        let again_until = replayed.checkpoint.saturating_add(size.bytes());
        let filled = Filled { timeline: self.plan.timeline, again_until };
        let count = self.fetcher.fill(&request, (self.plan.system_id, size), filled, &left).await?;
        blocking(|| place.own_everything_below("pg_wal"))?;
        Ok(count)
    }

    /// Writes the backup's files, and brings them forward where the log is replayed natively. pg_control is not among them.
    async fn write_cluster(
        &self,
        place: &write::Place,
        progress: &Arc<dyn Progress>,
    ) -> Result<Written, RestoreError> {
        let pieces = self.pieces()?;
        let is_control = |p: &Piece| self.manifest.files.get(p.file).is_some_and(|f| f.path == CONTROL_FILE);
        let (control, pieces): (Vec<_>, Vec<_>) = pieces.into_iter().partition(is_control);
        let (control, file_blocks) = self.control_file(control).await?;
        let mut because = None;
        let mut ready = match file_blocks.checked_rem(PART_BLOCKS) {
            Some(0) => self.read_log(progress, &mut because).await?,
            // No release is built so, but one may be.
            _ if self.is_native_only() => return Err(RestoreError::FileBlocks { found: file_blocks }),
            _ => {
                if let Replay::Native(_) = &self.options.replay {
                    let text = format!(
                        "relseg_size is {file_blocks} blocks, and native replay knows multiples of {PART_BLOCKS}: PostgreSQL replays everything"
                    );
                    progress.warn(&text);
                    because = Some(text);
                }
                None
            }
        };
        let (total, read_bytes, over) = loop {
            let superseding = ready.as_ref().map(|ready| (ready, file_blocks));
            let (total, read_bytes) = self.write_files(place, pieces.clone(), superseding, progress).await?;
            let Some(forward) = &mut ready else { break (total, read_bytes, None) };
            self.choose_timeline(forward).await?;
            let forward = &*forward;
            match blocking(|| self.replay(place, forward, &control, progress.as_ref())) {
                Ok(over) => break (total, read_bytes, Some(over)),
                Err(e) if self.is_native_only() => return Err(e.into()),
                // Never patch and go on: what is there is thrown away, and PostgreSQL does it all.
                Err(e) => {
                    let text = format!("native replay failed, PostgreSQL replays everything: {}", causes(&e));
                    progress.warn(&text);
                    because = Some(text);
                    ready = None;
                    blocking(|| place.discard(&self.actions.tablespaces))?;
                }
            }
        };
        Ok(Written { total, read_bytes, over, because, control })
    }

    /// Writes the backup's files and brings them forward natively, and nothing that a restore adds: no settings, no label,
    /// no signal. pg_control is the new one. Nothing is synced.
    pub async fn bring_forward(&self, progress: &Arc<dyn Progress>) -> Result<BroughtForward, RestoreError> {
        let place = write::Place::new(&self.options.data_dir, self.plan.major, &self.actions);
        let written = self.write_cluster(&place, progress).await?;
        let Over { replayed, control, .. } = written.over.ok_or(RestoreError::NotNative)?;
        let backup_label = replayed.backup_label(self.manifest.segment_size);
        blocking(|| {
            place.put(CONTROL_FILE, &control, self.control_mode())?;
            place.remove(MARKER)
        })?;
        Ok(BroughtForward { replayed, backup_label })
    }

    fn control_mode(&self) -> u32 {
        self.manifest.files.iter().find(|f| f.path == CONTROL_FILE).map_or(0o600, |f| f.mode & 0o777)
    }

    /// Permission bits of new files, as a server of the cluster gives them.
    fn file_mode(&self) -> u32 {
        let group = self.manifest.directories.iter().any(|d| d.mode & 0o050 == 0o050);
        if group { 0o640 } else { 0o600 }
    }

    fn is_native_only(&self) -> bool {
        matches!(&self.options.replay, Replay::Native(forward) if forward.mode() == ReplayMode::Native)
    }

    /// Reads the log before anything is written, where it is replayed natively; `because` of what that is less than was to be.
    async fn read_log(
        &self,
        progress: &Arc<dyn Progress>,
        because: &mut Option<String>,
    ) -> Result<Option<Ready>, RestoreError> {
        let Replay::Native(forward) = &self.options.replay else { return Ok(None) };
        let dir = &self.options.data_dir;
        let scratch = dir.ancestors().find(|dir| dir.is_dir()).unwrap_or(dir);
        let mut forward = forward.as_ref().clone();
        let selection = self.options.selection.as_ref();
        match forward.read(scratch, selection, self.options.threads, progress.as_ref()).await {
            Ok(Ok(ready)) => {
                *because = ready.because().map(str::to_owned);
                return Ok(Some(ready));
            }
            Ok(Err(unknown)) if self.is_native_only() => return Err(unknown.into()),
            Ok(Err(unknown)) => *because = Some(unknown.to_string()),
            // Too little room for what is set aside stops no restore.
            Err(e @ ForwardError::Spill(_)) if !self.is_native_only() => *because = Some(causes(&e)),
            Err(e) => return Err(e.into()),
        }
        let text = because.get_or_insert_default();
        text.push_str(": PostgreSQL replays everything");
        progress.warn(text);
        Ok(None)
    }

    /// Makes the place and writes the backup's files, without what replay writes anew: bytes written and read.
    async fn write_files(
        &self,
        place: &write::Place,
        mut pieces: Vec<Piece>,
        ready: Option<(&Ready, u32)>,
        progress: &Arc<dyn Progress>,
    ) -> Result<(u64, u64), RestoreError> {
        progress.phase("prepare", None);
        if let Some((ready, file_blocks)) = ready {
            pieces.retain(|piece| !self.is_superseded(piece, ready, file_blocks));
        }
        let pieces = blocking(|| {
            place.clear(&self.actions)?;
            place.make(&self.manifest, &self.actions.tablespaces, self.options.threads)?;
            self.without_what_is_there(place, pieces, progress.as_ref())
        })?;
        let total: u64 =
            pieces.iter().filter(|p| !p.is_zeros()).fold(0, |sum, p| sum.saturating_add(p.bytes()));
        progress.phase("restore", Some(total));
        Ok((total, self.write_pieces(place, pieces, progress).await?))
    }

    /// Whether replay writes every page of a part anew, or removes it.
    fn is_superseded(&self, piece: &Piece, ready: &Ready, file_blocks: u32) -> bool {
        let file = self.manifest.files.get(piece.file);
        let Some((relation, part)) = file.and_then(|f| RelationSegment::locate(&f.path)) else {
            return false;
        };
        let base = part.segment.checked_mul(file_blocks);
        const PAGE: u64 = BLOCK_BYTES as u64;
        let first = piece.file_offset() / PAGE;
        let last = piece.file_offset().saturating_add(piece.bytes()).div_ceil(PAGE);
        !part.temporary
            && (first..last).all(|block| {
                let block = u32::try_from(block).ok().and_then(|block| base?.checked_add(block));
                block.is_some_and(|block| ready.is_superseded(relation, part.fork, block))
            })
    }

    /// Brings the files forward, and gives new ones their owner; pg_control as it then has to be.
    fn replay(
        &self,
        place: &write::Place,
        ready: &Ready,
        control: &[u8],
        progress: &dyn Progress,
    ) -> Result<Over, ForwardError> {
        let tablespaces = self.actions.tablespaces.iter().map(|t| (t.oid, t.to.clone())).collect();
        let forward_place = ForwardPlace {
            data_dir: &self.options.data_dir,
            tablespaces: &tablespaces,
            control,
            mode: self.file_mode(),
            threads: self.options.threads,
            durable: !self.options.files_only,
        };
        let done = ready.apply(&forward_place, progress)?;
        place.own_everything().map_err(|e| match e {
            RestoreError::Io { doing, path, source } => ForwardError::Io { doing, path, source },
            e => ForwardError::Spill(io::Error::other(e.to_string())),
        })?;
        Ok(done)
    }

    /// The parts of the files that are wanted.
    fn pieces(&self) -> Result<Vec<Piece>, RestoreError> {
        self.pieces_of(|path| self.options.wants(path))
    }

    fn pieces_of(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<Piece>, RestoreError> {
        let files = self.manifest.files.iter().enumerate().filter(|(_, file)| wanted(&file.path));
        let flat = files.map(|(i, f)| pieces::flatten(i, f, &self.maps));
        let flat = flat.collect::<Result<Vec<_>, _>>().map_err(|source| self.damaged(None, source))?;
        Ok(flat.into_iter().flatten().collect())
    }

    /// What of the backup's packs is read at the most, and what a restore of everything reads.
    pub fn reads(&self) -> Result<Reads, RestoreError> {
        let read = |pieces| {
            let jobs = pieces::jobs(pieces, &self.maps).map_err(|source| self.damaged(None, source))?;
            let bytes = jobs.iter().map(|job| job.range.end.saturating_sub(job.range.start));
            Ok::<_, RestoreError>(bytes.fold(0, u64::saturating_add))
        };
        Ok(Reads {
            files: self.actions.files,
            bytes: read(self.pieces()?)?,
            whole_files: self.manifest.files.len() as u64,
            whole_bytes: read(self.pieces_of(|_| true)?)?,
        })
    }

    fn damaged(&self, path: Option<&str>, source: Corrupt) -> RestoreError {
        backup_files::damaged(&self.layout, &self.plan.backup, path, source)
    }

    /// Leaves out, in a delta, what the files have already, and puts zeros where they belong.
    fn without_what_is_there(
        &self,
        place: &write::Place,
        pieces: Vec<Piece>,
        progress: &dyn Progress,
    ) -> Result<Vec<Piece>, RestoreError> {
        if !self.actions.delta {
            return Ok(pieces);
        }
        progress.phase("compare", Some(self.actions.bytes));
        let mut by_file: Vec<Vec<Piece>> = vec![Vec::new(); self.manifest.files.len()];
        for piece in pieces {
            if let Some(list) = by_file.get_mut(piece.file) {
                list.push(piece);
            }
        }
        let files: Vec<_> = self.manifest.files.iter().zip(by_file).collect();
        let share = files.len().div_ceil(self.options.threads.max(1)).max(1);
        let results: Vec<Result<Vec<Piece>, RestoreError>> = std::thread::scope(|scope| {
            let compare = |part: &[(&waltide_format::archive::ManifestFile, Vec<Piece>)]| {
                let mut left = Vec::new();
                for (file, pieces) in part {
                    if file.path == CONTROL_FILE {
                        left.extend(pieces.iter().copied());
                    } else {
                        left.extend(place.differing(&file.path, file.bytes, pieces)?);
                    }
                    progress.advance(file.bytes);
                }
                Ok(left)
            };
            let handles: Vec<_> =
                files.chunks(share).map(|part| scope.spawn(move || compare(part))).collect();
            handles.into_iter().map(|h| h.join().expect("comparing files does not panic")).collect()
        });
        let left = results.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(left.into_iter().flatten().collect())
    }

    /// Reads each stretch of a pack once and writes its parts; the bytes read.
    async fn write_pieces(
        &self,
        place: &write::Place,
        pieces: Vec<Piece>,
        progress: &Arc<dyn Progress>,
    ) -> Result<u64, RestoreError> {
        let jobs = pieces::jobs(pieces, &self.maps).map_err(|source| self.damaged(None, source))?;
        let work = |job: pieces::Job| {
            let (place, progress) = (place.clone(), Arc::clone(progress));
            let paths: Vec<_> = job
                .pieces
                .iter()
                .map(|p| self.manifest.files.get(p.file).map(|f| f.path.clone()).unwrap_or_default())
                .collect();
            async move {
                let path = self.layout.pack(&job.pack);
                let stored = self.archive.get_range(&path, job.range.clone()).await?;
                let read = stored.len() as u64;
                let written = tokio::task::spawn_blocking(move || {
                    place.write(&stored, &job, &paths, progress.as_ref())
                });
                match written.await.expect("writing files does not panic") {
                    Ok(()) => Ok(read),
                    Err(write::WriteError::Io(e)) => Err(e),
                    Err(write::WriteError::Damaged(source)) => Err(self.damaged(Some(&path), source)),
                }
            }
        };
        let at_once = self.options.threads.saturating_add(1);
        let done = futures_util::stream::iter(jobs).map(work).buffer_unordered(at_once);
        done.try_fold(0u64, async |sum, read| Ok(sum.saturating_add(read))).await
    }

    /// pg_control as the backup has it, and what it says of large relations' files.
    async fn control_file(&self, pieces: Vec<Piece>) -> Result<(Vec<u8>, u32), RestoreError> {
        let file = self.manifest.files.iter().find(|f| f.path == CONTROL_FILE);
        let bytes = file.map_or(0, |f| f.bytes).min(1 << 16);
        let (archive, layout, id) = (&self.archive, &self.layout, &self.plan.backup);
        let contents = backup_files::contents(archive, layout, id, &self.maps, pieces, bytes).await?;
        let decoded = waltide_format::engines::postgres::cluster::ControlFile::decode(&contents);
        match decoded {
            Ok(control) if control.system_id == self.plan.system_id => {
                Ok((contents, control.relation_file_blocks))
            }
            Ok(control) => {
                let found = control.system_id.get();
                let source = Corrupt::mismatch("system_identifier", 0, found, self.plan.system_id.get());
                Err(self.damaged(None, source))
            }
            Err(_) => Err(self.damaged(None, Corrupt::invalid("pg_control", 0, 0))),
        }
    }

    fn write_settings(&self, place: &write::Place, replayed: Option<&Replayed>) -> Result<(), RestoreError> {
        for (name, text, mode) in &self.config_files {
            place.put(name, text.as_bytes(), *mode)?;
        }
        let auto = place.path("postgresql.auto.conf");
        let old = match fs::read(&auto) {
            Ok(old) => String::from_utf8_lossy(&old).into_owned(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(io_error("read", &auto)(e)),
        };
        let text = conf::auto_conf(&old, self.options.standby, &self.actions.settings);
        place.put("postgresql.auto.conf", text.as_bytes(), 0o600)?;
        for stale in STALE {
            place.remove(stale)?;
        }
        let label = match replayed {
            // It starts as after a shutdown.
            Some(replayed) if replayed.finished => return place.remove("backup_label"),
            Some(replayed) => replayed.backup_label(self.manifest.segment_size),
            None => self.manifest.backup_label.clone(),
        };
        place.put("backup_label", label.as_bytes(), 0o600)?;
        place.put(signal(&self.options), b"", 0o600)
    }
}

/// Runs blocking work where the runtime allows it.
pub(super) fn blocking<T>(work: impl FnOnce() -> T) -> T {
    use tokio::runtime::{Handle, RuntimeFlavor};
    match Handle::try_current().map(|h| h.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

/// An error and what caused it.
fn causes(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut cause = e.source();
    while let Some(e) = cause {
        text.push_str(&format!(": {e}"));
        cause = e.source();
    }
    text
}

async fn read_manifest(
    archive: &Archive,
    layout: &SystemLayout,
    id: &BackupId,
) -> Result<Manifest, RestoreError> {
    let path = layout.manifest(id);
    let object = archive.get(&path, OBJECT_BYTES_MAX).await?;
    let manifest = Manifest::decode(&object).map_err(|source| RestoreError::Damaged {
        path: path.clone(),
        backup: id.clone(),
        source,
    })?;
    match manifest.id == *id {
        true => Ok(manifest),
        false => Err(RestoreError::Foreign { path, found: manifest.id }),
    }
}

async fn read_maps(
    archive: &Archive,
    layout: &SystemLayout,
    manifest: &Manifest,
) -> Result<Vec<ExtentMap>, RestoreError> {
    let read = |name: &String| {
        let path = layout.map(name);
        async move {
            let object = archive.get(&path, OBJECT_BYTES_MAX).await?;
            let backup = manifest.id.clone();
            ExtentMap::decode(&object).map_err(|source| RestoreError::Damaged { path, backup, source })
        }
    };
    futures_util::stream::iter(manifest.maps.iter().map(read)).buffered(4).try_collect().await
}

/// What [`MARKER`] says: the backup and every tablespace's place.
pub(super) fn marker_text(manifest: &Manifest, tablespaces: &[Placed]) -> String {
    let places = tablespaces.iter().map(|t| format!("{} {}\n", t.oid, t.to.display()));
    std::iter::once(format!("{}\n", manifest.id)).chain(places).collect()
}

/// What makes the server recover.
const fn signal(options: &RestoreOptions) -> &'static str {
    if options.standby { "standby.signal" } else { "recovery.signal" }
}

/// Checks the place and says what will happen to it.
fn actions(
    archive: &Archive,
    plan: &Plan,
    manifest: &Manifest,
    options: &mut RestoreOptions,
    mut notes: Vec<String>,
) -> Result<Actions, RestoreError> {
    let data_dir = &options.data_dir.clone();
    if let Some(pid) = place::running_server(data_dir)? {
        return Err(PlaceError::Running { path: data_dir.clone(), pid }.into());
    }
    let (made, map) = (&options.made, &options.tablespace_map);
    let tablespaces = place::map_tablespaces(&manifest.tablespaces, made, map, data_dir)?;
    let wal = data_dir.join("pg_wal");
    let linked = fs::read_link(&wal).ok().map(|elsewhere| data_dir.join(elsewhere));
    let url = archive.url().starts_with("file:").then(|| archive.url().parse::<ArchiveUrl>());
    if let Some(Ok(url)) = url
        && let Some(archive) = url.local_path()
    {
        let spaces = tablespaces.iter().map(|t| t.to.as_path());
        let places: Vec<_> =
            std::iter::once(data_dir.as_path()).chain(linked.as_deref()).chain(spaces).collect();
        place::apart_from(archive, &places)?;
    }
    let owner = match options.files_only {
        true => None,
        false => place::owner(data_dir, options.owner)?,
    };
    // Only a restore of this very backup to these very places may go on without being allowed to clear.
    let marker = fs::read_to_string(data_dir.join(MARKER));
    let unfinished = marker.is_ok_and(|found| found == marker_text(manifest, &tablespaces));
    let delta = options.delta || unfinished;
    let mut there = place::contents(data_dir)?;
    // A pg_wal elsewhere stays where it is, empty.
    if let Some(linked) = &linked {
        there.retain(|d| d.path != wal);
        there.extend(place::contents(linked)?);
    }
    // Of a tablespace's place only the directories that the backup fills are ours to clear.
    let mut spaces = Vec::new();
    for t in &tablespaces {
        let link = format!("pg_tblspc/{}", t.oid);
        let own: BTreeSet<_> = manifest
            .directories
            .iter()
            .filter_map(|d| d.path.strip_prefix(&link)?.strip_prefix('/')?.split('/').next())
            .collect();
        let found = place::contents(&t.to)?;
        // What the WAL makes fills the directory of its major version.
        let version = format!("PG_{}_", plan.major);
        let is_made = !manifest.tablespaces.iter().any(|m| m.oid == t.oid);
        let ours = |n: &str| own.contains(n) || (is_made && n.starts_with(&version));
        let mine = |d: &Deletion| d.path.file_name().and_then(|n| n.to_str()).is_some_and(ours);
        if !found.is_empty() && !options.allow_clear && !unfinished {
            return Err(not_empty(&t.to, &found));
        }
        spaces.extend(found.into_iter().filter(mine));
    }
    if !there.is_empty() && !options.allow_clear && !unfinished {
        return Err(not_empty(data_dir, &there));
    }
    if unfinished {
        notes.push(format!(
            "{} holds a restore that was interrupted; it is taken up again",
            data_dir.display()
        ));
    }
    for path in std::iter::once(data_dir).chain(tablespaces.iter().map(|t| &t.to)) {
        place::check_writable(path)?;
    }
    there.extend(spaces);
    let freed = |root: &Path| {
        there.iter().filter(|d| d.path.starts_with(root)).fold(0u64, |sum, d| sum.saturating_add(d.bytes))
    };
    let link = |oid| format!("pg_tblspc/{oid}/");
    let needed = |options: &RestoreOptions, wanted: &dyn Fn(&str) -> bool| {
        let files = manifest.files.iter().filter(|f| wanted(&f.path) && options.wants(&f.path));
        files.fold(0u64, |sum, f| sum.saturating_add(f.bytes))
    };
    let elsewhere = |path: &str| tablespaces.iter().any(|t| path.starts_with(&link(t.oid)));
    let mut rooms = vec![(data_dir.clone(), needed(options, &|p| !elsewhere(p)), freed(data_dir))];
    for t in &tablespaces {
        rooms.push((t.to.clone(), needed(options, &|p| p.starts_with(&link(t.oid))), freed(&t.to)));
    }
    place::check_room(&rooms)?;
    // Of a part's restore little is kept, and nobody knows how much.
    if options.selection.is_none()
        && let Some(reason) = no_room_to_set_aside(&options.replay, &rooms, options.threads)?
    {
        options.replay = Replay::Server(Some(reason));
    }

    let target: Vec<_> = match (options.standby, plan.goal.timeline) {
        (true, TargetTimeline::Latest) => vec![(TIMELINE.to_owned(), "latest".to_owned())],
        // What was replayed natively of one timeline can follow no other.
        (true, _) => plan.settings.iter().filter(|(name, _)| name == TIMELINE).cloned().collect(),
        (false, _) => plan.settings.clone(),
    };
    let mut settings = conf::recovery_settings(plan.major, &options.restore_command, &target);
    if plan.goal.action == crate::TargetAction::Pause {
        settings.insert(0, ("hot_standby".to_owned(), "on".to_owned()));
    }
    if options.archive_off {
        settings.insert(0, ("archive_mode".to_owned(), "off".to_owned()));
    }
    // Recovery meets pages of what is not restored, and that is no fault.
    if options.selection.is_some() {
        settings.insert(0, ("ignore_invalid_pages".to_owned(), "on".to_owned()));
    }
    // Targets stay last.
    for (i, setting) in options.settings.iter().enumerate() {
        settings.retain(|(name, _)| *name != setting.0);
        settings.insert(i.min(settings.len()), setting.clone());
    }
    let deletions = if delta { place::strangers(manifest, data_dir, &tablespaces)? } else { there };
    Ok(Actions {
        data_dir: data_dir.clone(),
        tablespaces,
        deletions,
        delta,
        files: manifest.files.iter().filter(|f| options.wants(&f.path)).count() as u64,
        bytes: needed(options, &|_| true),
        settings,
        replay: ReplayPlan::from(&options.replay),
        signal: match &options.replay {
            Replay::Native(forward) if forward.finish().is_some() => None,
            _ => Some(signal(options)),
        },
        owner,
        notes,
    })
}

/// Why native replay is not tried, where what it may set aside of the log does not go onto the data directory's file system
/// beside the files. Where it must be native it is tried: it may be less.
fn no_room_to_set_aside(
    replay: &Replay,
    rooms: &[(PathBuf, u64, u64)],
    threads: usize,
) -> Result<Option<String>, PlaceError> {
    let (Replay::Native(forward), Some((data_dir, ..))) = (replay, rooms.first()) else { return Ok(None) };
    let file_bytes = rooms.iter().fold(0u64, |sum, (_, needed, _)| sum.saturating_add(*needed));
    let aside = (data_dir.clone(), forward.set_aside_max(threads, file_bytes), 0);
    if forward.mode() == ReplayMode::Native || aside.1 == 0 {
        return Ok(None);
    }
    // First what is to be deleted is still there, then the files are.
    let with_files: Vec<_> = [aside.clone()].into_iter().chain(rooms.iter().cloned()).collect();
    for rooms in [std::slice::from_ref(&aside), with_files.as_slice()] {
        match place::check_room(rooms) {
            Err(PlaceError::NoRoom { free, needed, .. }) => {
                return Ok(Some(format!(
                    "{} bytes of the log may have to be set aside beside the files: {needed} bytes are needed at {}, and {free} are free",
                    aside.1,
                    data_dir.display()
                )));
            }
            other => other?,
        }
    }
    Ok(None)
}

fn not_empty(path: &Path, found: &[Deletion]) -> RestoreError {
    let names = found.iter().filter_map(|d| d.path.file_name().map(|n| n.to_string_lossy().into_owned()));
    let mut names: Vec<_> = names.take(4).collect();
    if found.len() > names.len() {
        names.push("…".to_owned());
    }
    PlaceError::NotEmpty { path: path.to_owned(), found: names }.into()
}

#[cfg(test)]
mod tests;
