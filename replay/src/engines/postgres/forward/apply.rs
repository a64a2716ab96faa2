//! What is kept of the log, written into the files: range after range, each page once.

use std::cmp::Reverse;
use std::fs::{self, File};
use std::io::{self, IoSlice};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};

use waltide_format::engines::postgres::cluster::{ControlFile, relation_path, version_directory};
use waltide_format::engines::postgres::wal::Record;
use waltide_format::{BLOCK_BYTES, BlockNumber, ForkNumber, RelFileLocator};
use waltide_storage::{Counted, Progress};

use super::super::file_system::is_local;
use super::super::redo::{self, Page};
use super::batch::{Entry, PART_BLOCKS, PartTag};
use super::decode::How;
use super::keep::{Fork, Kept, Log};
use super::newer::Blocks;
use super::spill::Chain;
use super::{ForwardError, Place};

/// So many pages go to a file at once.
const WRITE_PAGES: usize = 128;
/// So many that lie side by side go around the page cache, where they are synced anyway and none of them was read.
const DIRECT_PAGES: usize = 64;
/// The page cache may hold so many in one piece. What goes around it must not meet a piece that another thread writes to.
const CACHED_PAGES: u32 = 256;
/// A file to which so many went goes on to the disk while others are written.
const SYNC_PAGES: u64 = 512;
/// So many files wait for that. Any more are left for the end.
const SYNCING: usize = 64;

/// What the files are like.
#[derive(Debug, Clone)]
pub(super) struct Files {
    data_dir: PathBuf,
    version: String,
    /// Blocks in a file of a large relation.
    file_blocks: u32,
    control: ControlFile,
    mode: u32,
    /// Whether all of them are synced in the end.
    durable: bool,
}

impl Files {
    pub(super) fn new(place: &Place<'_>, control: ControlFile) -> Self {
        let &Place { data_dir, mode, durable, .. } = place;
        let version = version_directory(control.major, control.catalog_version);
        let file_blocks = control.relation_file_blocks.max(1);
        Self { data_dir: data_dir.to_owned(), version, file_blocks, control, mode, durable }
    }

    fn path(&self, relation: RelFileLocator, fork: ForkNumber, segment: u32) -> PathBuf {
        self.data_dir.join(relation_path(relation, fork, segment, &self.version))
    }

    /// The directory of a database in a tablespace.
    pub(super) fn database(&self, (spc_oid, db_oid): (u32, u32)) -> PathBuf {
        let any = RelFileLocator { spc_oid, db_oid, rel_number: 1 };
        self.path(any, ForkNumber::Main, 0).parent().map(Path::to_owned).unwrap_or_default()
    }

    fn open(&self, path: &Path) -> Result<File, ForwardError> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).mode(self.mode);
        let opened = match (options.open(path), path.parent()) {
            // A database's directory in a tablespace comes with its first file there.
            (Err(e), Some(directory)) if e.kind() == io::ErrorKind::NotFound => {
                let mut builder = fs::DirBuilder::new();
                builder.recursive(true).mode(self.directory_mode());
                builder.create(directory).map_err(ForwardError::io("make", directory))?;
                options.open(path)
            }
            (opened, _) => opened,
        };
        opened.map_err(ForwardError::io("open", path))
    }

    /// Who may read its files may look into a directory.
    const fn directory_mode(&self) -> u32 {
        self.mode | (self.mode & 0o444) >> 2
    }
}

/// What was written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) pages: u64,
    /// Pages whose content the base backup gave.
    pub(super) read: u64,
    /// Changes to them.
    pub(super) changes: u64,
}

impl Written {
    pub(super) const fn add(&mut self, more: &Self) {
        self.pages = self.pages.saturating_add(more.pages);
        self.read = self.read.saturating_add(more.read);
        self.changes = self.changes.saturating_add(more.changes);
    }
}

/// Removes and cuts files as the log did.
pub(super) fn shape(files: &Files, kept: &Kept) -> Result<(), ForwardError> {
    for (relation, state) in &kept.relations {
        for (fork, state) in state.forks() {
            let Some(cap) = kept.cap(*relation, fork) else { continue };
            for segment in 0u32.. {
                let path = files.path(*relation, fork, segment);
                let bytes = match fs::metadata(&path) {
                    Ok(about) => about.len(),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => break,
                    Err(e) => return Err(ForwardError::io("look at", &path)(e)),
                };
                let left =
                    cap.saturating_sub(segment.saturating_mul(files.file_blocks)).min(files.file_blocks);
                let left_bytes = u64::from(left).saturating_mul(BLOCK_BYTES as u64);
                if state.exists == Some(false) || (left == 0 && segment > 0) {
                    fs::remove_file(&path).map_err(ForwardError::io("delete", &path))?;
                } else if bytes > left_bytes {
                    let file = files.open(&path)?;
                    file.set_len(left_bytes).map_err(ForwardError::io("cut", &path))?;
                }
            }
        }
    }
    Ok(())
}

/// Applies what is kept of pages with `threads` threads.
pub(super) fn pages(
    files: &Files,
    log: &Log,
    kept: &Kept,
    threads: usize,
    progress: &dyn Progress,
) -> Result<Written, ForwardError> {
    let mut parts = Vec::new();
    for (relation, state) in &kept.relations {
        for (fork, state) in state.forks() {
            for (number, chain) in &state.parts {
                let tag = PartTag { relation: *relation, fork, part: *number };
                let made_anew = kept.made_anew(tag);
                let part = Part { files, log, relation: *relation, fork, number: *number, made_anew, chain };
                parts.push((part, state.blocks));
            }
        }
    }
    let work = divided(parts, threads);
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let all = Mutex::new(Written::default());
    let first_error = Mutex::new(None);
    let fail = |e| {
        failed.store(true, Ordering::Relaxed);
        first_error.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(e);
    };
    std::thread::scope(|scope| {
        let (syncing, to_sync) = mpsc::sync_channel::<(File, PathBuf)>(SYNCING);
        let (work, fail, next, failed, all) = (&work, &fail, &next, &failed, &all);
        scope.spawn(move || {
            for (file, path) in to_sync {
                file.sync_data().unwrap_or_else(|e| fail(ForwardError::io("sync", &path)(e)));
            }
        });
        for _ in 0..threads.max(1) {
            let syncing = syncing.clone();
            scope.spawn(move || {
                // Memory for one range after the other: so much that is new each time would cost much of the work.
                let mut memory = Memory::default();
                while !failed.load(Ordering::Relaxed) {
                    let Some(range) = work.get(next.fetch_add(1, Ordering::Relaxed)) else { return };
                    match range.apply(&mut memory) {
                        Ok((written, file, path)) => {
                            all.lock().unwrap_or_else(|e| e.into_inner()).add(&written);
                            progress.count(Counted::Pages, written.pages);
                            progress.advance(range.bytes);
                            if files.durable && written.pages >= SYNC_PAGES {
                                let _ = syncing.try_send((file, path));
                            }
                        }
                        Err(e) => fail(e),
                    }
                }
            });
        }
    });
    if let Some(e) = first_error.into_inner().unwrap_or_else(|e| e.into_inner()) {
        return Err(e);
    }
    for (relation, state) in &kept.relations {
        for (fork, state) in state.forks() {
            lengthen(files, *relation, fork, state)?;
        }
    }
    Ok(all.into_inner().unwrap_or_else(|e| e.into_inner()))
}

/// Makes a fork as long as the log made it: blocks that nothing wrote are zeros.
fn lengthen(
    files: &Files,
    relation: RelFileLocator,
    fork: ForkNumber,
    state: &Fork,
) -> Result<(), ForwardError> {
    if state.exists != Some(true) {
        return Ok(());
    }
    let last = state.blocks.saturating_sub(1).checked_div(files.file_blocks).unwrap_or(0);
    for segment in 0..=last {
        let path = files.path(relation, fork, segment);
        let blocks = state.blocks.saturating_sub(segment.saturating_mul(files.file_blocks));
        let bytes = u64::from(blocks.min(files.file_blocks)).saturating_mul(BLOCK_BYTES as u64);
        let file = files.open(&path)?;
        let there = file.metadata().map_err(ForwardError::io("look at", &path))?.len();
        if there < bytes {
            file.set_len(bytes).map_err(ForwardError::io("lengthen", &path))?;
        }
    }
    Ok(())
}

/// A part of a fork, and what is kept of it.
#[derive(Clone, Copy)]
struct Part<'a> {
    files: &'a Files,
    log: &'a Log,
    relation: RelFileLocator,
    fork: ForkNumber,
    number: u32,
    /// Blocks of which nothing from before is left.
    made_anew: Option<&'a Blocks>,
    chain: &'a Chain,
}

/// Divides what would make one thread work longer than the others, for which each then passes over what the others change.
/// `parts` come with how many blocks their fork has.
fn divided(mut parts: Vec<(Part<'_>, BlockNumber)>, threads: usize) -> Vec<Range<'_>> {
    parts
        .sort_by_cached_key(|(part, _)| (Reverse(part.chain.bytes()), part.relation, part.fork, part.number));
    let bytes: Vec<u64> = parts.iter().map(|(part, _)| part.chain.bytes()).collect();
    let (mut whole, mut shared) = (Vec::new(), Vec::new());
    for ((part, blocks), shares) in parts.into_iter().zip(shares(&bytes, threads)) {
        part.divide(blocks, shares, if shares == 1 { &mut whole } else { &mut shared });
    }
    whole.sort_by_key(|range: &Range<'_>| (range.part.relation, range.part.fork, range.blocks.start));
    whole.append(&mut shared);
    whole
}

/// Among how many threads each of these amounts of work is shared, of which the largest comes first: among all where it
/// would keep the thread that has least to do notably longer than an equal share of everything.
fn shares(amounts: &[u64], threads: usize) -> Vec<u32> {
    let threads = threads.max(1);
    let count = u32::try_from(threads).unwrap_or(u32::MAX);
    let total = amounts.iter().fold(0u64, |sum, amount| sum.saturating_add(*amount));
    let equal = total.div_ceil(threads as u64);
    let most = equal.saturating_add(equal / 8);
    let mut loads = vec![0u64; threads];
    let share = |amount: &u64| {
        if let Some(least) = loads.iter_mut().min()
            && least.saturating_add(*amount) <= most
        {
            *least = least.saturating_add(*amount);
            return 1;
        }
        let each = amount.div_ceil(threads as u64);
        loads.iter_mut().for_each(|load| *load = load.saturating_add(each));
        count
    };
    amounts.iter().map(share).collect()
}

impl<'a> Part<'a> {
    /// Divides it among so many threads. `blocks` are how many the fork has.
    fn divide(self, blocks: BlockNumber, shares: u32, work: &mut Vec<Range<'a>>) {
        let ranges = ranges(self.number, blocks, shares);
        let bytes = self.chain.bytes().checked_div(ranges.len() as u64).unwrap_or(0);
        work.extend(ranges.into_iter().map(|blocks| Range { part: self, blocks, bytes }));
    }
}

/// A part's blocks, in so many ranges as long as each other where the fork has `blocks`.
fn ranges(part: u32, blocks: BlockNumber, shares: u32) -> Vec<std::ops::Range<BlockNumber>> {
    let first = part.saturating_mul(PART_BLOCKS);
    let count = blocks.saturating_sub(first).min(PART_BLOCKS);
    let shares = shares.clamp(1, count.max(1));
    let share = count.checked_div(shares).unwrap_or(count);
    let share = share.saturating_sub(if share < CACHED_PAGES { 0 } else { share % CACHED_PAGES });
    let range = |number: u32| {
        let start = first.saturating_add(share.saturating_mul(number));
        let is_last = number.saturating_add(1) == shares;
        start..if is_last { first.saturating_add(PART_BLOCKS) } else { start.saturating_add(share) }
    };
    (0..shares).map(range).collect()
}

/// A range of blocks that is being written.
struct Range<'a> {
    part: Part<'a>,
    blocks: std::ops::Range<BlockNumber>,
    /// Its share of what is kept of the part.
    bytes: u64,
}

/// What a thread applies one range after the other with.
#[derive(Default)]
struct Memory {
    /// A place for each block of the range, as far as the last that is changed.
    places: Vec<Option<Changing>>,
    /// Pages on their way around the page cache.
    direct: Vec<Aligned>,
}

/// A page where a device can take it from.
#[derive(Clone)]
#[repr(align(4096))]
struct Aligned([u8; BLOCK_BYTES]);

/// A page on its way.
struct Changing {
    page: Page,
    changed: bool,
}

impl Range<'_> {
    /// What was written, and to which file.
    fn apply(&self, memory: &mut Memory) -> Result<(Written, File, PathBuf), ForwardError> {
        let Memory { places: pages, direct } = memory;
        let Part { files, log, relation, fork, number, made_anew, chain } = self.part;
        let part = number.saturating_mul(PART_BLOCKS);
        let first = self.blocks.start;
        let (segment, within) = match first.checked_div(files.file_blocks) {
            Some(segment) => (segment, first.checked_rem(files.file_blocks).unwrap_or(0)),
            None => (0, first),
        };
        let path = files.path(relation, fork, segment);
        let file = files.open(&path)?;
        let at = |block: BlockNumber| {
            u64::from(within.saturating_add(block.saturating_sub(first))).saturating_mul(BLOCK_BYTES as u64)
        };
        pages.clear();
        let mut blocks = Vec::new();
        let (mut read, mut changes) = (0u64, 0u64);
        let wanted = first.saturating_sub(part)..self.blocks.end.saturating_sub(part);
        chain.oldest_first(&log.spill, &wanted, |entry| -> Result<(), ForwardError> {
            if !self.blocks.contains(&entry.block) {
                let is_here = (part..part.saturating_add(PART_BLOCKS)).contains(&entry.block);
                return if is_here { Ok(()) } else { Err(ForwardError::Kept { at: entry.start }) };
            }
            let number = entry.block.saturating_sub(first) as usize;
            if pages.len() <= number {
                pages.resize_with(number.saturating_add(1), || None);
            }
            let Some(place) = pages.get_mut(number) else { return Ok(()) };
            let changing = match place {
                Some(changing) => changing,
                None => {
                    let page = if entry.anew {
                        Page::default()
                    } else if made_anew.is_some_and(|blocks| blocks.contains(entry.block)) {
                        // That is still to come.
                        return Ok(());
                    } else {
                        read = read.saturating_add(1);
                        read_page(&file, at(entry.block)).map_err(ForwardError::io("read", &path))?
                    };
                    place.insert(Changing { page, changed: false })
                }
            };
            let (of, major) = (entry.of(relation), files.control.major);
            let record = Record::unpack(entry.packed, of, major, &mut blocks);
            let record = record.map_err(|_| ForwardError::Kept { at: entry.start })?;
            changes = changes.saturating_add(1);
            self.change(&entry, &record, changing)
        })?;
        // What was read is in the page cache, and would go to the device twice.
        let is_long = pages.len() >= DIRECT_PAGES && self.keeps_apart();
        let around = if files.durable && read == 0 && is_long { open_direct(&path) } else { None };
        let to = To { file: &file, around, direct };
        let written = self.write(to, pages, at).map_err(ForwardError::io("write", &path))?;
        Ok((Written { pages: written, read, changes }, file, path))
    }

    /// Whether no piece of the page cache holds pages of it and of its neighbours.
    fn keeps_apart(&self) -> bool {
        self.blocks.start.is_multiple_of(CACHED_PAGES) && self.blocks.end.is_multiple_of(CACHED_PAGES)
    }

    fn change(
        &self,
        entry: &Entry<'_>,
        record: &Record<'_>,
        changing: &mut Changing,
    ) -> Result<(), ForwardError> {
        let page = &mut changing.page;
        match entry.how {
            How::ClearVisibility => {
                redo::clear_visibility(record, self.part.relation, entry.block, page);
                changing.changed = true;
            }
            How::CutVisibility(heap) => changing.changed |= redo::cut_visibility(heap, page),
            How::Block(id) => {
                let needed = !entry.anew
                    && !matches!(self.part.fork, ForkNumber::Vm | ForkNumber::Fsm)
                    && !redo::is_hint(record);
                if needed && page.is_new() {
                    return Err(ForwardError::Missing {
                        relation: self.part.relation,
                        fork: self.part.fork,
                        block: entry.block,
                        at: entry.start,
                    });
                }
                let cluster = redo::Cluster {
                    logs_hints: self.part.log.logs_hints(&self.part.files.control, entry.start),
                };
                let applied = redo::apply(record, id, page, cluster)?;
                changing.changed |= matches!(applied, redo::Applied::Changed | redo::Applied::Unstamped);
            }
        }
        Ok(())
    }

    /// Writes what was changed, neighbours together; how many pages.
    fn write(
        &self,
        mut to: To<'_>,
        pages: &mut [Option<Changing>],
        at: impl Fn(BlockNumber) -> u64,
    ) -> io::Result<u64> {
        let first = self.blocks.start;
        if self.part.files.control.has_data_checksums() {
            for (block, place) in (first..).zip(&mut *pages) {
                if let Some(Changing { page, changed: true }) = place
                    && !page.is_new()
                {
                    page.set_checksum(block);
                }
            }
        }
        let changed = |place: &Option<Changing>| place.as_ref().is_some_and(|place| place.changed);
        let (mut block, mut count) = (first, 0u64);
        for run in pages.chunk_by(|a, b| changed(a) == changed(b)) {
            for run in run.chunks(WRITE_PAGES) {
                let changed = run.iter().flatten().filter(|place| place.changed).map(|place| &place.page);
                let neighbours: Vec<_> = changed.collect();
                to.write(&neighbours, at(block))?;
                count = count.saturating_add(neighbours.len() as u64);
                block = block.saturating_add(u32::try_from(run.len()).unwrap_or(u32::MAX));
            }
        }
        Ok(count)
    }
}

/// Where pages are written.
struct To<'a> {
    file: &'a File,
    /// The same file, but what is written goes around the page cache.
    around: Option<File>,
    direct: &'a mut Vec<Aligned>,
}

impl To<'_> {
    /// Writes pages that lie side by side.
    fn write(&mut self, pages: &[&Page], at: u64) -> io::Result<()> {
        if let Some(around) = self.around.as_ref().filter(|_| pages.len() >= DIRECT_PAGES) {
            self.direct.resize(self.direct.len().max(pages.len()), Aligned([0; BLOCK_BYTES]));
            for (place, page) in self.direct.iter_mut().zip(pages) {
                place.0 = *page.bytes();
            }
            let slices: Vec<_> = self.direct.iter().take(pages.len()).map(|p| IoSlice::new(&p.0)).collect();
            if rustix::io::pwritev(around, &slices, at) == Ok(pages.len().saturating_mul(BLOCK_BYTES)) {
                return Ok(());
            }
            // Not every file system can, and not with every device.
            self.around = None;
        }
        let slices: Vec<_> = pages.iter().map(|page| IoSlice::new(page.bytes())).collect();
        write_all_at(self.file, &slices, at)
    }
}

/// The file, for writing around the page cache, where its file system has that.
fn open_direct(path: &Path) -> Option<File> {
    let flags = rustix::fs::OFlags::DIRECT.bits();
    let opened = File::options().write(true).custom_flags(flags.try_into().ok()?).open(path).ok();
    opened.filter(is_local)
}

/// Writes pages that lie side by side.
fn write_all_at(file: &File, pages: &[IoSlice<'_>], at: u64) -> io::Result<()> {
    let (mut pages, mut at) = (pages, at);
    while !pages.is_empty() {
        let written = match rustix::io::pwritev(file, pages, at) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => written,
            Err(rustix::io::Errno::INTR) => continue,
            Err(e) => return Err(e.into()),
        };
        let (whole, more) = (written / BLOCK_BYTES, written % BLOCK_BYTES);
        pages = pages.get(whole..).unwrap_or_default();
        at = at.saturating_add(written as u64);
        // A page of which a part was written is written on from there, and then the rest.
        if more > 0
            && let Some(page) = pages.first()
        {
            file.write_all_at(page.get(more..).unwrap_or_default(), at)?;
            at = at.saturating_add(BLOCK_BYTES.saturating_sub(more) as u64);
            pages = pages.get(1..).unwrap_or_default();
        }
    }
    Ok(())
}

/// A page of a file; zeros behind its end.
fn read_page(file: &File, at: u64) -> io::Result<Page> {
    let mut bytes = [0; BLOCK_BYTES];
    let mut filled = 0usize;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, at.saturating_add(filled as u64)) {
            Ok(0) => break,
            Ok(read) => filled = filled.saturating_add(read),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(Page::from(bytes))
}

/// Copies a database's directory as it is, over whatever is there.
pub(super) fn copy_database(files: &Files, from: (u32, u32), to: (u32, u32)) -> Result<(), ForwardError> {
    let (from, to) = (files.database(from), files.database(to));
    match fs::remove_dir_all(&to) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(ForwardError::io("delete", &to)(e)),
        _ => {}
    }
    fs::create_dir_all(&to).map_err(ForwardError::io("make", &to))?;
    let mode = fs::metadata(&from).map_err(ForwardError::io("look at", &from))?.permissions();
    fs::set_permissions(&to, mode).map_err(ForwardError::io("make", &to))?;
    for entry in fs::read_dir(&from).map_err(ForwardError::io("list", &from))? {
        let entry = entry.map_err(ForwardError::io("list", &from))?;
        let path = entry.path();
        if entry.file_type().map_err(ForwardError::io("look at", &path))?.is_file() {
            fs::copy(&path, to.join(entry.file_name())).map_err(ForwardError::io("copy", &path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page(number: usize) -> Page {
        Page::from([(number % 251) as u8; BLOCK_BYTES])
    }

    /// Whether they go around the page cache, through it, or the one after the other fails.
    #[test]
    fn pages_are_written_whichever_way_the_file_system_has() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pages");
        let all: Vec<Page> = (0..WRITE_PAGES).map(page).collect();
        let pages: Vec<&Page> = all.iter().collect();
        let read_only = || {
            File::create(&path).unwrap();
            File::open(&path).ok()
        };
        for open in [None, Some(true), Some(false)] {
            let file = File::create(&path).unwrap();
            let around = match open {
                None => None,
                Some(true) => open_direct(&path),
                // What is not open for writing cannot be written.
                Some(false) => read_only(),
            };
            let can = around.is_some();
            let mut direct = Vec::new();
            let mut to = To { file: &file, around, direct: &mut direct };
            to.write(&pages, 3 * BLOCK_BYTES as u64).unwrap();
            assert_eq!(to.around.is_some(), can && open == Some(true));
            to.write(&pages[..DIRECT_PAGES - 1], 0).unwrap();
            to.write(&pages[..DIRECT_PAGES], (200 * BLOCK_BYTES) as u64).unwrap();
            let written = fs::read(&path).unwrap();
            assert_eq!(written.len(), (200 + DIRECT_PAGES) * BLOCK_BYTES);
            let expected = |block: usize| match block {
                0..63 => Some(block),
                63..131 => Some(block - 3),
                200.. => Some(block - 200),
                _ => None,
            };
            for (block, found) in written.as_chunks::<BLOCK_BYTES>().0.iter().enumerate() {
                let expected = expected(block).map_or([0; BLOCK_BYTES], |number| *page(number).bytes());
                assert!(*found == expected, "block {block}");
            }
        }
    }

    #[test]
    fn only_what_would_be_waited_for_is_shared() {
        assert_eq!(shares(&[10, 10, 10], 2), [1, 1, 2]);
        assert_eq!(shares(&[10; 8], 8), [1; 8]);
        assert_eq!(shares(&[90, 5, 5], 2), [2, 1, 1]);
        assert_eq!(shares(&[7, 3, 2], 1), [1; 3]);
        assert_eq!(shares(&[], 4), [0u32; 0]);
        assert_eq!(shares(&[1], 0), [1]);
    }

    proptest! {
        #[test]
        fn ranges_of_a_part_lie_side_by_side(part in 0u32..100, blocks in 0u32..101 * PART_BLOCKS, shares in 0u32..20) {
            let ranges = ranges(part, blocks, shares);
            prop_assert!(!ranges.is_empty() && ranges.len() <= shares.max(1) as usize);
            prop_assert!(ranges.iter().all(|range| range.start < range.end));
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
            prop_assert_eq!(ranges[0].start, part * PART_BLOCKS);
            prop_assert_eq!(ranges[ranges.len() - 1].end, (part + 1) * PART_BLOCKS);
            let apart = ranges.iter().filter(|range| range.start.is_multiple_of(CACHED_PAGES)).count();
            let length = ranges[0].end - ranges[0].start;
            prop_assert!(length < CACHED_PAGES || apart == ranges.len(), "{ranges:?}");
        }

        #[test]
        fn no_thread_has_much_more_than_an_equal_share(
            mut amounts in proptest::collection::vec(0u64..1000, 0..40),
            threads in 1usize..9,
        ) {
            amounts.sort_unstable_by(|a, b| b.cmp(a));
            let mut loads = vec![0f64; threads];
            let total: u64 = amounts.iter().sum();
            let shares = shares(&amounts, threads);
            // Whoever is free takes the next, those that are shared last.
            let (whole, shared): (Vec<_>, Vec<_>) = amounts.iter().zip(&shares).partition(|(_, shares)| **shares == 1);
            let pieces = shared.iter().flat_map(|(amount, shares)| vec![**amount as f64 / f64::from(**shares); **shares as usize]);
            for amount in whole.iter().map(|(amount, _)| **amount as f64).chain(pieces) {
                *loads.iter_mut().min_by(|a, b| a.total_cmp(b)).unwrap() += amount;
            }
            let most = loads.into_iter().fold(0f64, f64::max);
            prop_assert!(most <= total as f64 / threads as f64 * 1.125 + 2.0 * amounts.len() as f64, "{most} of {total}");
        }
    }
}
