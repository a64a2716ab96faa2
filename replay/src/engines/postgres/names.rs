//! Names at every moment behind a base backup: the catalogues out of its files, then their changes out of the log.
//!
//! Of the base only the catalogues' files are read, of the log only what the indexes say touches them.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use waltide_format::archive::{
    BackupEntry, CommitKind, FileEvent, FileEventKind, Run, SegmentIndex, Step, SystemLayout, XactEnd,
};
use waltide_format::engines::postgres::catalogue::{
    Catalogue, CatalogueChange, CatalogueFiles, Commit, Fates, Follower, Names, RelationMap,
    catalogue_changes,
};
use waltide_format::engines::postgres::wal::{
    Damage, Expected, Next, PreviousTail, RecordStream, SegmentSpan,
};
use waltide_format::{BLOCK_BYTES, BackupId, Corrupt, ForkNumber, Lsn, Oid, RelFileLocator, Xid};
use waltide_storage::Archive;

use super::indexes::{ArchivedIndexes, SearchError};
use super::restore::{BackupFiles, RestoreError};
use crate::resolve::Source as _;

/// How many indexes are read at once.
const AT_ONCE: usize = 8;
/// The tablespaces of the data directory itself.
const PG_DEFAULT: Oid = 1663;
const PG_GLOBAL: Oid = 1664;
/// Transactions whose status one file of pg_xact holds, two bits each.
const XACTS_PER_FILE: u32 = 1 << 20;
const XACT_COMMITTED: u8 = 1;

/// Why names could not be followed.
#[derive(Debug, thiserror::Error)]
pub enum NamesError {
    /// The base backup could not be read.
    #[error(transparent)]
    Backup(#[from] RestoreError),
    /// The archived WAL could not be read.
    #[error(transparent)]
    Search(#[from] SearchError),
    /// A file of the base backup is not what it must be.
    #[error("{path} of backup {backup} is damaged\nhint: run `waltide verify`")]
    Damaged {
        /// The file.
        path: String,
        /// The backup.
        backup: BackupId,
        /// What is wrong with it.
        source: Corrupt,
    },
}

impl NamesError {
    /// Whether the archive is at fault, rather than the way to it.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Backup(e) => e.is_damage(),
            Self::Search(e) => e.is_damage(),
            Self::Damaged { .. } => true,
        }
    }
}

/// Names from a base backup on.
#[derive(Debug)]
pub struct Followed {
    /// The names.
    pub names: Names,
    /// Prepared transactions that matter to names, each with its global identifier where the log says it.
    pub prepared: HashMap<Xid, Option<String>>,
    /// Rows and changes that could not be understood.
    pub unread: u64,
}

/// Follows the names from a base backup along `run`, the unbroken WAL behind its start, up to `until`.
pub async fn follow(
    archive: &Archive,
    layout: SystemLayout,
    backup: &BackupEntry,
    run: &Run<'_>,
    until: Lsn,
) -> Result<Followed, NamesError> {
    let base = BackupFiles::open(archive, layout, &backup.head.id).await?;
    let indexes = ArchivedIndexes::new(archive.clone());
    let mut files = CatalogueFiles::default();
    loop {
        let mut follower = Follower::new(backup.head.major, backup.head.start_lsn, files);
        read_base(&base, backup, &mut follower).await?;
        files = follower.files().clone();
        let known = follower.discovered().len();
        let log = Log { indexes: &indexes, run, from: backup.head.start_lsn, until, files: &files };
        let (mut fates, prepared) = log.follow(&mut follower).await?;
        // A catalogue was moved: what filled its new file before that was known lies behind us.
        if follower.discovered().len() > known {
            files = follower.files().clone();
            continue;
        }
        old_fates(&base, &follower, &mut fates).await?;
        let unread = follower.unread();
        return Ok(Followed { names: follower.finish(&fates), prepared, unread });
    }
}

/// A directory of relations: its tablespace, its database (zero for the shared one), its path.
fn directories(base: &BackupFiles) -> Vec<(Oid, Oid, &str)> {
    let maps = base.files().iter().filter_map(|file| file.path.strip_suffix("/pg_filenode.map"));
    let place = |dir: &'_ str| {
        let mut parts = dir.split('/');
        match (parts.next()?, parts.next(), parts.next(), parts.next(), parts.next()) {
            ("global", None, ..) => Some((PG_GLOBAL, 0)),
            ("base", Some(database), None, ..) => Some((PG_DEFAULT, database.parse().ok()?)),
            ("pg_tblspc", Some(space), Some(_), Some(database), None) => {
                Some((space.parse().ok()?, database.parse().ok()?))
            }
            _ => None,
        }
    };
    maps.filter_map(|dir| place(dir).map(|(space, database)| (space, database, dir))).collect()
}

async fn read_base(
    base: &BackupFiles,
    backup: &BackupEntry,
    follower: &mut Follower,
) -> Result<(), NamesError> {
    let major = backup.head.major;
    let id = &backup.head.id;
    let directories = directories(base);
    for (space, database, dir) in &directories {
        let path = format!("{dir}/pg_filenode.map");
        let bytes = base.read(&path).await?.unwrap_or_default();
        let map = RelationMap::decode(&bytes, major);
        let map = map.map_err(|source| NamesError::Damaged { path, backup: id.clone(), source })?;
        follower.base_map(*space, *database, map);
    }
    // pg_class says where pg_namespace lies, so it comes first.
    for catalogue in [Catalogue::Database, Catalogue::Class, Catalogue::Namespace] {
        for (space, database, dir) in &directories {
            if (catalogue == Catalogue::Database) != (*database == 0) {
                continue;
            }
            let place = |rel_number| RelFileLocator { spc_oid: *space, db_oid: *database, rel_number };
            let moved =
                follower.files().moved().filter(|(_, moved)| *moved == catalogue).map(|(file, _)| file);
            let files: Vec<_> = std::iter::once(place(catalogue.oid()))
                .chain(moved.filter(|file| *file == place(file.rel_number)))
                .collect();
            for file in files {
                read_relation(base, id, dir, file, follower).await?;
            }
        }
    }
    Ok(())
}

/// Reads a relation's pages. A file that is not there lies elsewhere by now.
async fn read_relation(
    base: &BackupFiles,
    id: &BackupId,
    dir: &str,
    file: RelFileLocator,
    follower: &mut Follower,
) -> Result<(), NamesError> {
    let mut block = 0u32;
    for segment in 0u32.. {
        let path = match segment {
            0 => format!("{dir}/{}", file.rel_number),
            n => format!("{dir}/{}.{n}", file.rel_number),
        };
        let Some(bytes) = base.read(&path).await? else { return Ok(()) };
        for page in bytes.as_chunks::<BLOCK_BYTES>().0 {
            let read = follower.base_page(file, block, page);
            read.map_err(|source| NamesError::Damaged { path: path.clone(), backup: id.clone(), source })?;
            block = block.saturating_add(1);
        }
    }
    Ok(())
}

/// Asks the backup's pg_xact for the transactions whose fate neither a row nor the log says.
async fn old_fates(base: &BackupFiles, follower: &Follower, fates: &mut Fates) -> Result<(), NamesError> {
    let mut by_file: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
    for xid in follower.unknown_xids() {
        by_file.entry(xid.checked_div(XACTS_PER_FILE).unwrap_or(0)).or_default().insert(xid);
    }
    for (number, xids) in by_file {
        let Some(bytes) = base.read(&format!("pg_xact/{number:04X}")).await? else { continue };
        for xid in xids {
            let place = xid.checked_rem(XACTS_PER_FILE).unwrap_or(0);
            let four = bytes.get((place / 4) as usize).copied().unwrap_or(0);
            let status = four.wrapping_shr((place & 3) << 1) & 3;
            fates.add_before(xid.into(), status == XACT_COMMITTED);
        }
    }
    Ok(())
}

/// What an index says that matters to names.
struct Said {
    touched: bool,
    events: Vec<FileEvent>,
    xacts: Vec<XactEnd>,
}

/// A part of the log to be followed.
struct Log<'a> {
    indexes: &'a ArchivedIndexes,
    run: &'a Run<'a>,
    from: Lsn,
    until: Lsn,
    files: &'a CatalogueFiles,
}

impl Log<'_> {
    async fn follow(
        &self,
        follower: &mut Follower,
    ) -> Result<(Fates, HashMap<Xid, Option<String>>), NamesError> {
        let (mut fates, mut prepared) = (Fates::default(), HashMap::<Xid, Option<String>>::new());
        let steps: Vec<_> = self.run.steps.iter().take_while(|step| step.start() < self.until).collect();
        let said = stream::iter(steps.iter().map(|step| self.said(step))).buffered(AT_ONCE);
        let mut said = std::pin::pin!(said);
        let mut number = 0usize;
        // A segment's last record may run into the next one: what is left of the one before.
        let mut tail: Option<PreviousTail> = None;
        let mut runs_over = false;
        while let Some(mut found) = said.try_next().await? {
            let Some(step) = steps.get(number) else { break };
            let before = number.checked_sub(1).and_then(|n| steps.get(n)).copied();
            let info = &step.entry.info;
            // What no index has because neither segment's was made with the other beside it.
            let unjoined = before.filter(|b| {
                let open = b.entry.info.pending.is_some_and(|p| !p.joined && p.start < b.usable_end);
                open && !info.head_joined && !info.overwrites_contrecord
            });
            if let Some(before) = unjoined {
                let over = self.indexes.straddler(before.entry, step.entry).await?;
                found.xacts.splice(..0, over.xacts.iter().cloned());
            }
            let changes = if found.touched || runs_over || unjoined.is_some() {
                if info.continued_bytes > 0
                    && tail.is_none()
                    && let Some(before) = before
                {
                    tail = self.read(before, None).await?.1;
                }
                let (changes, left) = self.read(step, tail.take()).await?;
                tail = left;
                changes
            } else {
                tail = None;
                Vec::new()
            };
            runs_over = found.touched && info.pending.is_some();
            self.take(follower, changes, found.events, step);
            for xact in found.xacts.into_iter().filter(|x| self.is_here(x.start, step)) {
                let concerns =
                    follower.concerns(xact.xid) || xact.subxacts.iter().any(|x| follower.concerns(*x));
                if !concerns {
                    continue;
                }
                if xact.kind.is_commit() {
                    let XactEnd { xid, start, end, time, .. } = xact;
                    fates.add(Commit { xid, start, end, time }, &xact.subxacts);
                }
                if matches!(xact.kind, CommitKind::Prepare | CommitKind::CommitPrepared) {
                    let known = prepared.entry(xact.xid).or_insert(None);
                    *known = known.take().or(xact.gid);
                }
            }
            number = number.saturating_add(1);
        }
        Ok((fates, prepared))
    }

    fn is_here(&self, start: Lsn, step: &Step<'_>) -> bool {
        self.from <= start && start < self.until.min(step.usable_end)
    }

    /// Gives the follower the changes and what happened to files, in the order of the log.
    fn take(
        &self,
        follower: &mut Follower,
        changes: Vec<CatalogueChange>,
        events: Vec<FileEvent>,
        step: &Step<'_>,
    ) {
        let mut events = events.into_iter().filter(|e| self.is_here(e.start, step)).peekable();
        for change in changes.into_iter().filter(|c| self.is_here(c.lsn, step)) {
            while let Some(event) = events.next_if(|e| e.start <= change.lsn) {
                follower.apply_event(&event);
            }
            follower.apply(&change);
        }
        for event in events {
            follower.apply_event(&event);
        }
    }

    async fn said(&self, step: &Step<'_>) -> Result<Said, SearchError> {
        let SegmentIndex { blocks, file_events, xacts, .. } = self.indexes.index(step.entry).await?;
        let here = |relation| self.files.catalogue(relation).is_some();
        let mapped = file_events.iter().any(|e| matches!(e.kind, FileEventKind::RelationMap { .. }));
        let touched = blocks.iter().any(|b| b.fork == ForkNumber::Main && here(b.relation));
        let matters = |event: &FileEvent| {
            matches!(
                event.kind,
                FileEventKind::DatabaseCopy { .. }
                    | FileEventKind::DatabaseDrop { .. }
                    | FileEventKind::Truncate { blocks: 0, .. }
            )
        };
        let events = file_events.into_iter().filter(matters).collect();
        Ok(Said { touched: touched || mapped, events, xacts })
    }

    /// The changes in a segment, and what it leaves for the next.
    async fn read(
        &self,
        step: &Step<'_>,
        before: Option<PreviousTail>,
    ) -> Result<(Vec<CatalogueChange>, Option<PreviousTail>), SearchError> {
        let wal = self.indexes.wal(step.entry).await?;
        let (info, files) = (step.entry.info.clone(), self.files.clone());
        let work = move || -> Result<_, Damage> {
            let start = info.name.start(info.size).unwrap_or(Lsn::MAX);
            let Some(span) = SegmentSpan::containing(start, info.size) else { return Ok((Vec::new(), None)) };
            let expected = Expected { major: Some(info.major), ..Expected::default() };
            let mut stream = RecordStream::new(&wal, span, expected, before)?;
            let mut changes = Vec::new();
            while let Next::Record(record) = stream.next_record()? {
                if let Err(e) = catalogue_changes(&record, &files, &mut changes) {
                    // Its CRC is right: what we know of it has a gap, which must not keep anybody from a restore.
                    tracing::warn!("the {} record at {} cannot be read: {e}", record.rmgr(), record.start);
                }
            }
            Ok((changes, stream.into_tail()))
        };
        let done = tokio::task::spawn_blocking(work).await.expect("reading records does not panic");
        done.map_err(|source| SearchError::Wal { path: step.entry.path.clone(), source })
    }
}
