//! Names at every moment behind a base backup: the catalogues out of its files, then their changes out of the log.
//!
//! Of the base only the catalogues' files are read, of the log only what the indexes say touches them.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use waltide_format::archive::{BackupEntry, Run, SystemLayout};
use waltide_format::engines::postgres::catalogue::{
    Catalogue, CatalogueFiles, Fates, Follower, Names, RelationMap,
};
use waltide_format::{BLOCK_BYTES, BackupId, Corrupt, Lsn, Oid, RelFileLocator, Xid};
use waltide_storage::Archive;

use super::indexes::SearchError;
use super::names_log::{Log, Told};
use super::restore::{BackupFiles, RestoreError};

/// How many of the backup's files are read at once.
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
    follow_in(archive, layout, backup, run, until, CatalogueFiles::default()).await
}

/// The same of the catalogues that lie in these files.
pub(super) async fn follow_in(
    archive: &Archive,
    layout: SystemLayout,
    backup: &BackupEntry,
    run: &Run<'_>,
    until: Lsn,
    mut files: CatalogueFiles,
) -> Result<Followed, NamesError> {
    let base = BackupFiles::open(archive, layout.clone(), &backup.head.id).await?;
    let steps: Vec<_> = run.steps.iter().take_while(|step| step.start() < until).collect();
    loop {
        let mut follower = Follower::new(backup.head.major, backup.head.start_lsn, files);
        read_base(&base, backup, &mut follower).await?;
        files = follower.files().clone();
        let known = follower.discovered().len();
        let from = backup.head.start_lsn;
        let log = Log { archive, layout: &layout, steps: &steps, from, until, files: &files };
        let Told { mut fates, prepared } = log.tell(&mut follower).await?;
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
    let maps = directories.iter().map(|(space, database, dir)| async move {
        let path = format!("{dir}/pg_filenode.map");
        let bytes = base.read(&path).await?.unwrap_or_default();
        Ok::<_, NamesError>((*space, *database, path, bytes))
    });
    let mut maps = stream::iter(maps.collect::<Vec<_>>()).buffered(AT_ONCE);
    while let Some((space, database, path, bytes)) = maps.try_next().await? {
        let map = RelationMap::decode(&bytes, major);
        let map = map.map_err(|source| NamesError::Damaged { path, backup: id.clone(), source })?;
        follower.base_map(space, database, map);
    }
    // pg_class says where pg_namespace and pg_inherits lie, so it comes first.
    let inherits = follower.files().has_inherits().then_some(Catalogue::Inherits);
    for catalogue in [Catalogue::Database, Catalogue::Class, Catalogue::Namespace].into_iter().chain(inherits)
    {
        let mut files: Vec<(RelFileLocator, &str)> = Vec::new();
        for (space, database, dir) in &directories {
            if (catalogue == Catalogue::Database) != (*database == 0) {
                continue;
            }
            let place = |rel_number| RelFileLocator { spc_oid: *space, db_oid: *database, rel_number };
            let moved =
                follower.files().moved().filter(|(_, moved)| *moved == catalogue).map(|(file, _)| file);
            let moved = moved.filter(|file| *file == place(file.rel_number));
            files.extend(std::iter::once(place(catalogue.oid())).chain(moved).map(|file| (file, *dir)));
        }
        let read = files.into_iter().map(|(file, dir)| read_relation(base, dir, file));
        let mut read = stream::iter(read.collect::<Vec<_>>()).buffered(AT_ONCE);
        while let Some((file, parts)) = read.try_next().await? {
            let mut block = 0u32;
            for (path, bytes) in parts {
                for page in bytes.as_chunks::<BLOCK_BYTES>().0 {
                    let read = follower.base_page(file, block, page);
                    read.map_err(|source| NamesError::Damaged {
                        path: path.clone(),
                        backup: id.clone(),
                        source,
                    })?;
                    block = block.saturating_add(1);
                }
            }
        }
    }
    Ok(())
}

/// A relation's files, each with its path. One that is not there lies elsewhere by now.
async fn read_relation(
    base: &BackupFiles,
    dir: &str,
    file: RelFileLocator,
) -> Result<(RelFileLocator, Vec<(String, Vec<u8>)>), NamesError> {
    let mut parts = Vec::new();
    for segment in 0u32.. {
        let path = match segment {
            0 => format!("{dir}/{}", file.rel_number),
            n => format!("{dir}/{}.{n}", file.rel_number),
        };
        let Some(bytes) = base.read(&path).await? else { break };
        parts.push((path, bytes));
    }
    Ok((file, parts))
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
