//! Follows the catalogues' rows from a base backup through the log.
//!
//! What is kept up is, for each place in a file, which version of which row lies there, with its columns, since an update
//! tells only what it changes. Which versions count is decided at the end, when it is known who committed. The
//! pages of an online backup may be newer than the log's start; each is made anew by the first record that touches
//! it, and what vanishes by that without an end was from the future and is taken back.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::change::{CatalogueChange, CatalogueFiles, ChangeKind};
use super::fate::Fates;
use super::map::RelationMap;
use super::names::Names;
use super::row::{Catalogue, Row};
use super::tuple::{HeapTuple, Hint, TupleId, page_tuples};
use crate::archive::{FileEvent, FileEventKind};
use crate::engines::postgres::cluster::data_page::Page;
use crate::error::Corrupt;
use crate::ids::{BlockNumber, Lsn, Oid, PgMajor, RelFileLocator, Xid};

/// A version of a row.
#[derive(Debug, Clone)]
pub(super) struct Version {
    pub(super) catalogue: Catalogue,
    /// The database it is of; zero for pg_database.
    pub(super) database: Oid,
    pub(super) row: Row,
    pub(super) xmin: Xid,
    pub(super) xmin_hint: Hint,
    /// Where it was first seen.
    pub(super) seen: Lsn,
    /// Who ended it, what is known of them, and where that was seen.
    pub(super) end: Option<(Xid, Hint, Lsn)>,
    /// Where a database's row became that of an invalid one.
    pub(super) invalid_from: Option<Lsn>,
    /// It was in a page of the base backup that was newer than the log at that point.
    taken_back: bool,
}

/// A place in a file: the version that lies there, and its columns.
#[derive(Debug, Clone)]
struct Slot {
    version: usize,
    body: Vec<u8>,
}

/// Follows the catalogues' rows from a base backup through the log.
#[derive(Debug)]
pub struct Follower {
    major: PgMajor,
    start: Lsn,
    files: CatalogueFiles,
    discovered: Vec<(RelFileLocator, Catalogue)>,
    pages: BTreeMap<(RelFileLocator, BlockNumber), BTreeMap<u16, Slot>>,
    versions: Vec<Version>,
    /// The versions of each row: catalogue, database, OID.
    by_row: HashMap<(Catalogue, Oid, Oid), Vec<usize>>,
    maps: BTreeMap<(Oid, Oid), RelationMap>,
    /// Which catalogue each mapped file ever was: database, file number.
    mapped: BTreeMap<(Oid, Oid), Oid>,
    /// Files that a transaction cut to nothing.
    cut: Vec<(Xid, RelFileLocator)>,
    /// Where the directories of databases went.
    dropped: Vec<(Lsn, Oid)>,
    /// Databases that were copied file by file into others: from and to.
    copied: Vec<(Oid, Oid)>,
    /// The transactions whose fate decides what counts.
    xids: HashSet<Xid>,
    unread: u64,
}

impl Follower {
    /// Starts where a base backup's log starts. `files` are those that changes will be told of.
    pub fn new(major: PgMajor, start: Lsn, files: CatalogueFiles) -> Self {
        Self {
            major,
            start,
            files,
            discovered: Vec::new(),
            pages: BTreeMap::new(),
            versions: Vec::new(),
            by_row: HashMap::new(),
            maps: BTreeMap::new(),
            mapped: BTreeMap::new(),
            cut: Vec::new(),
            dropped: Vec::new(),
            copied: Vec::new(),
            xids: HashSet::new(),
            unread: 0,
        }
    }

    /// Takes a relation map of the base backup in: that of `database` in `tablespace`, or the shared one (1664, 0).
    pub fn base_map(&mut self, tablespace: Oid, database: Oid, map: RelationMap) {
        self.map(tablespace, database, map);
    }

    /// Takes a page of the base backup in, of a file that a catalogue lies in.
    pub fn base_page(
        &mut self,
        file: RelFileLocator,
        block: BlockNumber,
        page: &Page,
    ) -> Result<(), Corrupt> {
        let tuples = page_tuples(page)?;
        self.page(file, block, &tuples, self.start);
        Ok(())
    }

    /// The files that catalogues are known to lie in, besides their first ones.
    pub const fn files(&self) -> &CatalogueFiles {
        &self.files
    }

    /// Files that catalogues turned out to be moved to and that `files` did not have. Where there are any, all must be
    /// followed anew with them among the files: a rewrite fills a file before it says what it is.
    pub fn discovered(&self) -> &[(RelFileLocator, Catalogue)] {
        &self.discovered
    }

    /// Rows and changes that could not be understood.
    pub const fn unread(&self) -> u64 {
        self.unread
    }

    /// Takes a change in. They come in LSN order.
    pub fn apply(&mut self, change: &CatalogueChange) {
        let (file, lsn, xid) = (change.file, change.lsn, change.xid);
        match &change.kind {
            ChangeKind::Page { block, tuples } => self.page(file, *block, tuples, lsn),
            ChangeKind::Insert { at, body } => self.insert(file, *at, body.clone(), xid, lsn),
            ChangeKind::Update { old, new, body } => {
                let before = self.slot(file, *old).map(|slot| slot.body.clone());
                self.end(file, *old, xid, lsn);
                if let Some(body) = body {
                    let shared = body.prefix > 0 || body.suffix > 0;
                    match body.apply(before.as_deref().unwrap_or_default()) {
                        Some(columns) if !shared || before.is_some() => {
                            self.insert(file, *new, columns, xid, lsn);
                        }
                        _ => self.unread = self.unread.saturating_add(1),
                    }
                }
            }
            ChangeKind::Delete { at } => self.end(file, *at, xid, lsn),
            ChangeKind::Inplace { at, body: Some(body) } => self.overwrite(file, *at, body, lsn),
            ChangeKind::Inplace { body: None, .. } => {}
            ChangeKind::Map(map) => self.map(file.spc_oid, file.db_oid, map.clone()),
        }
    }

    /// Takes what happened to files in, at its place among the changes.
    pub fn apply_event(&mut self, event: &FileEvent) {
        match &event.kind {
            FileEventKind::DatabaseCopy { to, from } => self.copy_database(*from, *to, event.start),
            FileEventKind::DatabaseDrop { db_oid, tablespaces } => {
                self.dropped.push((event.start, *db_oid));
                self.pages
                    .retain(|(file, _), _| file.db_oid != *db_oid || !tablespaces.contains(&file.spc_oid));
            }
            FileEventKind::Truncate { relation, blocks: 0, .. } if !event.xid.is_invalid() => {
                self.cut.push((event.xid, *relation));
                self.xids.insert(event.xid);
            }
            _ => {}
        }
    }

    /// Whether a transaction's fate decides what counts, as far as is known: its changes come before its end.
    pub fn concerns(&self, xid: Xid) -> bool {
        self.xids.contains(&xid)
    }

    /// All of them, as far as is known.
    pub fn xids(&self) -> impl Iterator<Item = Xid> + '_ {
        self.xids.iter().copied()
    }

    /// Those of them whose fate no row says: it stands in the log or, of old ones, in pg_xact.
    pub fn unknown_xids(&self) -> BTreeSet<u32> {
        let begun = self.versions.iter().filter(|v| v.xmin_hint == Hint::Unknown).map(|v| v.xmin);
        let ended = self.versions.iter().filter_map(|v| v.end.filter(|(_, hint, _)| *hint == Hint::Unknown));
        begun.chain(ended.map(|(xid, ..)| xid)).map(Xid::get).collect()
    }

    /// Decides what counted when, now that it is known who committed.
    pub fn finish(self, fates: &Fates) -> Names {
        let counted = self.versions.into_iter().filter(|v| !v.taken_back);
        Names::new(self.start, counted, fates, self.mapped, &self.cut, &self.dropped, self.copied)
    }

    fn slot(&self, file: RelFileLocator, at: TupleId) -> Option<&Slot> {
        self.pages.get(&(file, at.block))?.get(&at.offset)
    }

    fn page(&mut self, file: RelFileLocator, block: BlockNumber, tuples: &[(u16, HeapTuple)], lsn: Lsn) {
        let Some(catalogue) = self.files.catalogue(file) else { return };
        let before = self.pages.remove(&(file, block)).unwrap_or_default();
        let mut used = HashSet::new();
        let mut slots = BTreeMap::new();
        for (offset, tuple) in tuples {
            let Ok(row) = Row::decode(catalogue, &tuple.body, self.major) else {
                self.unread = self.unread.saturating_add(1);
                continue;
            };
            let there = before.get(offset).map(|slot| slot.version);
            let same = there.filter(|v| {
                self.versions.get(*v).is_some_and(|v| v.xmin == tuple.xmin && v.row.oid() == row.oid())
            });
            let found = same.or_else(|| self.moved_here(file, &row, tuple, &used));
            let version = match found {
                Some(version) => {
                    self.set_row(version, row.clone(), lsn);
                    version
                }
                None => self.add_version(file, row.clone(), tuple.xmin, tuple.xmin_hint, lsn),
            };
            if let (Some(xmax), Some(v)) = (tuple.xmax, self.versions.get_mut(version))
                && v.end.is_none_or(|(xid, ..)| xid == xmax)
            {
                let seen = v.end.map_or(lsn, |(.., seen)| seen);
                self.xids.insert(xmax);
                v.end = Some((xmax, tuple.xmax_hint, seen));
            }
            self.look_for_moves(file, version);
            used.insert(version);
            slots.insert(*offset, Slot { version, body: tuple.body.clone() });
        }
        for slot in before.into_values().filter(|slot| !used.contains(&slot.version)) {
            self.vanish(slot.version);
        }
        self.pages.insert((file, block), slots);
    }

    /// The version that a rewrite of its catalogue put here: the same row of the same transaction.
    fn moved_here(
        &self,
        file: RelFileLocator,
        row: &Row,
        tuple: &HeapTuple,
        used: &HashSet<usize>,
    ) -> Option<usize> {
        let catalogue = self.files.catalogue(file)?;
        let known = self.by_row.get(&(catalogue, database_of(catalogue, file), row.oid()))?;
        let same = |v: &&usize| {
            !used.contains(v) && self.versions.get(**v).is_some_and(|v| v.xmin == tuple.xmin && v.row == *row)
        };
        let ended = |v: &usize| self.versions.get(*v).and_then(|v| v.end.map(|(xid, ..)| xid));
        let exact = known.iter().rev().filter(same).find(|v| ended(v) == tuple.xmax);
        exact.or_else(|| known.iter().rev().find(same)).copied()
    }

    fn insert(&mut self, file: RelFileLocator, at: TupleId, body: Vec<u8>, xid: Xid, lsn: Lsn) {
        let Some(catalogue) = self.files.catalogue(file) else { return };
        let Ok(row) = Row::decode(catalogue, &body, self.major) else {
            self.unread = self.unread.saturating_add(1);
            return;
        };
        let there = self.slot(file, at).map(|slot| slot.version);
        let same = there.filter(|v| self.versions.get(*v).is_some_and(|v| v.xmin == xid && v.row == row));
        let version = match (same, there) {
            // A page of the base backup had it already, perhaps with what became of it later.
            (Some(version), _) => version,
            (None, there) => {
                if let Some(there) = there {
                    self.vanish(there);
                }
                self.add_version(file, row, xid, Hint::Unknown, lsn)
            }
        };
        self.look_for_moves(file, version);
        self.pages.entry((file, at.block)).or_default().insert(at.offset, Slot { version, body });
    }

    fn overwrite(&mut self, file: RelFileLocator, at: TupleId, body: &[u8], lsn: Lsn) {
        let Some(catalogue) = self.files.catalogue(file) else { return };
        let slot = self.pages.get_mut(&(file, at.block)).and_then(|page| page.get_mut(&at.offset));
        match (slot, Row::decode(catalogue, body, self.major)) {
            (Some(slot), Ok(row)) => {
                body.clone_into(&mut slot.body);
                let version = slot.version;
                self.set_row(version, row, lsn);
            }
            _ => self.unread = self.unread.saturating_add(1),
        }
    }

    fn set_row(&mut self, version: usize, row: Row, lsn: Lsn) {
        let Some(version) = self.versions.get_mut(version) else { return };
        let invalid = |row: &Row| matches!(row, Row::Database(row) if row.invalid);
        if invalid(&row) && !invalid(&version.row) {
            version.invalid_from = Some(lsn);
        }
        version.row = row;
        if std::mem::take(&mut version.taken_back) {
            version.seen = lsn;
        }
    }

    fn end(&mut self, file: RelFileLocator, at: TupleId, xid: Xid, lsn: Lsn) {
        let version = self.slot(file, at).map(|slot| slot.version);
        if let Some(version) = version.and_then(|v| self.versions.get_mut(v)) {
            version.end = Some((xid, Hint::Unknown, lsn));
            self.xids.insert(xid);
        }
    }

    /// Nothing lies at its place any more. What had an end was cleaned up; the rest never was there yet.
    fn vanish(&mut self, version: usize) {
        if let Some(version) = self.versions.get_mut(version)
            && version.end.is_none()
        {
            version.taken_back = true;
        }
    }

    fn add_version(&mut self, file: RelFileLocator, row: Row, xmin: Xid, xmin_hint: Hint, lsn: Lsn) -> usize {
        let catalogue = self.files.catalogue(file).unwrap_or(Catalogue::Class);
        let database = database_of(catalogue, file);
        let invalid = matches!(&row, Row::Database(row) if row.invalid);
        self.push_version(Version {
            catalogue,
            database,
            row,
            xmin,
            xmin_hint,
            seen: lsn,
            end: None,
            invalid_from: invalid.then_some(lsn),
            taken_back: false,
        })
    }

    fn push_version(&mut self, version: Version) -> usize {
        let number = self.versions.len();
        let key = (version.catalogue, version.database, version.row.oid());
        self.xids.insert(version.xmin);
        self.by_row.entry(key).or_default().push(number);
        self.versions.push(version);
        number
    }

    /// pg_namespace's own row in pg_class says which file it is, and so does that of pg_inherits.
    fn look_for_moves(&mut self, file: RelFileLocator, version: usize) {
        let Some(Version { row: Row::Class(row), .. }) = self.versions.get(version) else { return };
        let inherits = self.files.has_inherits().then_some(Catalogue::Inherits);
        let catalogues = std::iter::once(Catalogue::Namespace).chain(inherits);
        let found = catalogues.into_iter().find(|catalogue| catalogue.oid() == row.oid && row.file != 0);
        if let Some(catalogue) = found {
            let moved = RelFileLocator { rel_number: row.file, ..file };
            self.discover(moved, catalogue);
        }
    }

    fn map(&mut self, tablespace: Oid, database: Oid, map: RelationMap) {
        for (oid, file) in map.mappings() {
            self.mapped.insert((database, *file), *oid);
        }
        let catalogue = if database == 0 { Catalogue::Database } else { Catalogue::Class };
        if let Some(rel_number) = map.file_of(catalogue.oid()) {
            self.discover(RelFileLocator { spc_oid: tablespace, db_oid: database, rel_number }, catalogue);
        }
        self.maps.insert((tablespace, database), map);
    }

    fn discover(&mut self, file: RelFileLocator, catalogue: Catalogue) {
        if self.files.add(file, catalogue) {
            self.discovered.push((file, catalogue));
        }
    }

    /// A database's directory was copied: for another database, or for the same one in another tablespace.
    fn copy_database(&mut self, from: (Oid, Oid), to: (Oid, Oid), lsn: Lsn) {
        let place = |file: &RelFileLocator| (file.spc_oid, file.db_oid);
        let moved = |file: &RelFileLocator| RelFileLocator { spc_oid: to.0, db_oid: to.1, ..*file };
        if from.1 != to.1 {
            self.copied.push((from.1, to.1));
        }
        if let Some(map) = self.maps.get(&from).cloned() {
            self.map(to.0, to.1, map);
        }
        let files: Vec<_> = self.files.moved().filter(|(file, _)| place(file) == from).collect();
        for (file, catalogue) in files {
            self.discover(moved(&file), catalogue);
        }
        let pages: Vec<_> = self
            .pages
            .iter()
            .filter(|((file, _), _)| place(file) == from)
            .map(|(k, v)| (*k, v.clone()))
            .collect();
        let mut copies: HashMap<usize, usize> = HashMap::new();
        for ((file, block), mut slots) in pages {
            if from.1 != to.1 {
                for slot in slots.values_mut() {
                    let copy = match copies.get(&slot.version) {
                        Some(copy) => *copy,
                        None => {
                            let Some(original) = self.versions.get(slot.version) else { continue };
                            let copy = Version { database: to.1, seen: lsn, ..original.clone() };
                            self.push_version(copy)
                        }
                    };
                    copies.insert(slot.version, copy);
                    slot.version = copy;
                }
            }
            self.pages.insert((moved(&file), block), slots);
        }
    }
}

fn database_of(catalogue: Catalogue, file: RelFileLocator) -> Oid {
    if catalogue == Catalogue::Database { 0 } else { file.db_oid }
}

#[cfg(test)]
mod tests;
