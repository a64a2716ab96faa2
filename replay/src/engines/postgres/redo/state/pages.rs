//! The pages of SLRUs, through a cache of fixed size that is written back.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use waltide_format::BLOCK_BYTES;
use waltide_format::engines::postgres::wal::Slru;

use super::error::{StateError, io_error};
use super::tree::{Content, Tree};

/// Pages in memory: 2 MiB.
const CACHED: usize = 256;
const PAGE_BYTES: u64 = BLOCK_BYTES as u64;

type PageBytes = Box<[u8; BLOCK_BYTES]>;

#[derive(Debug)]
struct Slot {
    slru: Slru,
    page: u32,
    bytes: PageBytes,
    is_dirty: bool,
    used: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Pages {
    slots: Vec<Slot>,
    places: HashMap<(Slru, u32), usize>,
    uses: u64,
    /// Files that the log makes anew: what nobody has written of them is zeros.
    made: BTreeSet<(Slru, u32)>,
}

const fn file_of(page: u32) -> u32 {
    page / Slru::PAGES_PER_FILE
}

fn path_of(tree: &Tree, slru: Slru, file: u32) -> PathBuf {
    tree.path(slru.directory()).join(Slru::file_name(file))
}

/// Where a page starts in its file.
const fn start_of(page: u32) -> u64 {
    ((page % Slru::PAGES_PER_FILE) as u64).saturating_mul(PAGE_BYTES)
}

impl Pages {
    /// A page, to be changed.
    pub(super) fn page(
        &mut self,
        tree: &mut Tree,
        slru: Slru,
        page: u32,
    ) -> Result<&mut [u8; BLOCK_BYTES], StateError> {
        let slot = self.find(tree, slru, page)?;
        slot.is_dirty = true;
        Ok(&mut slot.bytes)
    }

    /// A page, to be read.
    pub(super) fn look(
        &mut self,
        tree: &mut Tree,
        slru: Slru,
        page: u32,
    ) -> Result<&[u8; BLOCK_BYTES], StateError> {
        self.find(tree, slru, page).map(|slot| &*slot.bytes)
    }

    /// Begins a page with zeros.
    pub(super) fn zero(&mut self, tree: &mut Tree, slru: Slru, page: u32) -> Result<(), StateError> {
        let index = match self.places.get(&(slru, page)) {
            Some(found) => *found,
            None => self.admit(tree, slru, page, Box::new([0; BLOCK_BYTES]))?,
        };
        let slot = self.use_slot(index);
        slot.bytes.fill(0);
        slot.is_dirty = true;
        Ok(())
    }

    /// Whether a page was ever begun.
    pub(super) fn exists(&self, tree: &Tree, slru: Slru, page: u32) -> Result<bool, StateError> {
        if self.places.contains_key(&(slru, page)) {
            return Ok(true);
        }
        let path = path_of(tree, slru, file_of(page));
        let Some(file) = tree.open_to_read(&path)? else { return Ok(false) };
        let length = file.metadata().map_err(io_error("look at", &path))?.len();
        Ok(length >= start_of(page).saturating_add(PAGE_BYTES))
    }

    /// Removes the files for whose first and last page `goes` says so.
    pub(super) fn remove_files(
        &mut self,
        tree: &mut Tree,
        slru: Slru,
        goes: impl Fn(u32, u32) -> bool,
    ) -> Result<(), StateError> {
        let goes = |file: u32| {
            let first = file.wrapping_mul(Slru::PAGES_PER_FILE);
            goes(first, first.wrapping_add(Slru::PAGES_PER_FILE - 1))
        };
        let mut index = 0;
        while let Some(slot) = self.slots.get(index) {
            if slot.slru == slru && goes(file_of(slot.page)) {
                self.made.insert((slru, file_of(slot.page)));
                self.remove_slot(index);
            } else {
                index = index.saturating_add(1);
            }
        }
        for name in tree.names(&tree.path(slru.directory()))? {
            if let Some(file) = Slru::file_number(&name).filter(|file| goes(*file)) {
                self.made.insert((slru, file));
                tree.remove_file(&tree.path(slru.directory()).join(name))?;
            }
        }
        Ok(())
    }

    /// Writes what was changed.
    pub(super) fn write_back(&mut self, tree: &mut Tree) -> Result<(), StateError> {
        self.slots.sort_by_key(|slot| (slot.slru, slot.page));
        self.places.clear();
        for slot in &mut self.slots {
            write(tree, slot)?;
        }
        self.slots.clear();
        Ok(())
    }

    fn find(&mut self, tree: &mut Tree, slru: Slru, page: u32) -> Result<&mut Slot, StateError> {
        let index = match self.places.get(&(slru, page)) {
            Some(found) => *found,
            None => {
                let bytes = self.read(tree, slru, page)?;
                self.admit(tree, slru, page, bytes)?
            }
        };
        Ok(self.use_slot(index))
    }

    fn use_slot(&mut self, index: usize) -> &mut Slot {
        self.uses = self.uses.saturating_add(1);
        let slot = self.slots.get_mut(index).expect("an index names a slot");
        slot.used = self.uses;
        slot
    }

    /// Takes a page in, for which another may have to go.
    fn admit(
        &mut self,
        tree: &mut Tree,
        slru: Slru,
        page: u32,
        bytes: PageBytes,
    ) -> Result<usize, StateError> {
        if self.slots.len() >= CACHED {
            let oldest = self.slots.iter().enumerate().min_by_key(|(_, slot)| slot.used);
            let oldest = oldest.map_or(0, |(index, _)| index);
            if let Some(slot) = self.slots.get_mut(oldest) {
                write(tree, slot)?;
            }
            self.remove_slot(oldest);
        }
        let index = self.slots.len();
        self.slots.push(Slot { slru, page, bytes, is_dirty: false, used: self.uses });
        self.places.insert((slru, page), index);
        Ok(index)
    }

    fn remove_slot(&mut self, index: usize) {
        let gone = self.slots.swap_remove(index);
        self.places.remove(&(gone.slru, gone.page));
        if let Some(moved) = self.slots.get(index) {
            self.places.insert((moved.slru, moved.page), index);
        }
    }

    fn read(&mut self, tree: &Tree, slru: Slru, page: u32) -> Result<PageBytes, StateError> {
        let mut bytes = Box::new([0; BLOCK_BYTES]);
        let path = path_of(tree, slru, file_of(page));
        let Some(file) = tree.open_to_read(&path)? else {
            // Cut off since, so that the end of what follows is read once more.
            self.made.insert((slru, file_of(page)));
            return Ok(bytes);
        };
        match file.read_exact_at(&mut *bytes, start_of(page)) {
            Ok(()) => Ok(bytes),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                // Which page the server began unlogged, when it began to keep commit timestamps, is known only nearly.
                if slru == Slru::CommitTs || self.made.contains(&(slru, file_of(page))) {
                    return Ok(Box::new([0; BLOCK_BYTES]));
                }
                let found = file.metadata().map_err(io_error("look at", &path))?.len();
                let needed = start_of(page).saturating_add(PAGE_BYTES);
                Err(StateError::PageMissing { path, found, needed })
            }
            Err(e) => Err(io_error("read", &path)(e)),
        }
    }
}

fn write(tree: &mut Tree, slot: &mut Slot) -> Result<(), StateError> {
    if !slot.is_dirty {
        return Ok(());
    }
    let path = path_of(tree, slot.slru, file_of(slot.page));
    let file = tree.open_to_write(&path, Content::Kept)?;
    file.write_all_at(&*slot.bytes, start_of(slot.page)).map_err(io_error("write", &path))?;
    slot.is_dirty = false;
    Ok(())
}
