//! A segment's records as what each does, part by part, without what the newer log makes irrelevant. Pure: no I/O.

use std::sync::Arc;

use foldhash::HashMap;
use waltide_format::archive::StoredWal;
use waltide_format::engines::postgres::effects::xact_end;
use waltide_format::engines::postgres::wal::{
    Damage, DatabaseRecord, Expected, Next, ParameterChange, Record, RecordStream, Rmgr, SegmentSpan,
    SmgrRecord, VM_HEAP_BLOCKS_PER_PAGE, XlogRecord, copy_record, implicit_vm_blocks,
};
use waltide_format::{BlockNumber, Corrupt, ForkNumber, Lsn, Oid, RelFileLocator, Writer, Xid};

use super::super::redo;
use super::super::selection::Selection;
use super::batch::{Batch, Entry, Idle, PART_BLOCKS, PIECE_BYTES, PartTag};
use super::counters;
use super::newer::{Blocks, Newer};
use super::pool::{Pool, Pooled};

/// No record that changes pages has more data than this besides theirs: what they do to their pages fits a page or two. It
/// is kept for each of its pages.
pub(super) const MAIN_DATA_MAX: usize = 64 << 10;
/// A record with an image of each of 33 blocks is not longer.
pub(super) const KEPT_BYTES: usize = 288 << 10;
/// Of what is kept for no page.
pub(super) const NO_RELATION: RelFileLocator = RelFileLocator { spc_oid: 0, db_oid: 0, rel_number: 0 };

/// A page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct PageTag {
    pub(super) relation: RelFileLocator,
    pub(super) fork: ForkNumber,
    pub(super) block: BlockNumber,
}

impl PageTag {
    /// The part that it belongs to.
    pub(super) const fn part(&self) -> PartTag {
        PartTag { relation: self.relation, fork: self.fork, part: self.block / PART_BLOCKS }
    }
}

/// How a record changes a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// As its block reference of that number says.
    Block(u8),
    /// By clearing bits of a visibility map that it does not refer to.
    ClearVisibility,
    /// By clearing what a visibility map says of the heap's blocks from this one on.
    CutVisibility(BlockNumber),
}

/// What a record does to files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Deed {
    /// It makes a fork's file.
    Create { relation: RelFileLocator, fork: ForkNumber },
    /// It cuts a relation's forks.
    Cut { relation: RelFileLocator, blocks: BlockNumber, flags: u32 },
    /// It removes a relation's files.
    Drop(RelFileLocator),
    /// It removes what a database has in a tablespace.
    DropDatabase { spc_oid: Oid, db_oid: Oid },
    /// It copies a database's files as they are at that moment.
    Copy(DatabaseCopy),
}

/// CREATE DATABASE by file copies, or ALTER DATABASE SET TABLESPACE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DatabaseCopy {
    pub(super) at: Lsn,
    /// Tablespace and database that are copied.
    pub(super) from: (Oid, Oid),
    /// What they are copied to.
    pub(super) to: (Oid, Oid),
}

/// What a segment's records do, in their order.
#[derive(Debug)]
pub(super) enum Step {
    /// What they do to pages of one part, or to what is not in relations' files.
    Entries(Batch),
    /// What one does to files, behind all that comes before.
    Files(Deed),
}

/// A batch that is being added to.
#[derive(Debug, Default)]
struct Open {
    batch: Batch,
    /// What the newer log makes anew of the part, as far as that is known.
    newer: Option<Arc<Blocks>>,
    /// From this block on it cuts what was there.
    cap: Option<BlockNumber>,
    /// Nothing that was done to it matters.
    is_lost: bool,
    /// Nothing of it is wanted but its length.
    is_unwanted: bool,
}

/// Something that a record does to a page.
#[derive(Debug, Clone, Copy)]
struct Change {
    tag: PageTag,
    how: How,
    anew: bool,
}

/// What came of a record.
enum Added {
    /// What it does was added, or is irrelevant.
    All,
    /// Its images, which matter, are still to be read: then what it does to pages is added.
    Images,
    /// It needs what was passed over.
    TooLate,
}

/// What a segment's records do.
#[derive(Debug, Default)]
pub(super) struct Decoded {
    /// What is complete, in its order but for that of batches of different parts.
    pub(super) steps: Vec<Step>,
    open: Vec<Open>,
    /// Where the open batch of a part is.
    places: HashMap<Option<PartTag>, usize>,
    /// Where the one is that was added to last.
    last: usize,
    /// Batches for their next use.
    spare: Vec<Batch>,
    idle: Idle,
    selection: Option<Arc<Selection>>,
    packed: Writer,
    /// Changes of settings.
    pub(super) settings: Vec<(Lsn, ParameterChange)>,
    /// The newest transaction that wrote anything before a change of settings, and before the last record's end.
    pub(super) newest_xids: Vec<(Lsn, Xid)>,
    newest_xid: Xid,
    /// Start and end of the last record in the range.
    pub(super) last_record: Option<(Lsn, Lsn)>,
    /// A record that begins here and ends behind the next segment.
    pub(super) unfinished: Option<Lsn>,
    /// How many records there are in the range.
    pub(super) count: u64,
    /// What was left out is of no use to this stretch of the log, counted from its end.
    pub(super) stretch: usize,
    /// Something of no use to it was passed over.
    passed_over: bool,
}

/// Where what segments were taken apart with waits for the next.
#[derive(Debug, Clone, Default)]
pub(super) struct Pools {
    decoded: Pool<Decoded>,
    idle: Idle,
    selection: Option<Arc<Selection>>,
}

impl Pools {
    /// One that takes pieces of memory from there, and of the pages that are not selected notes how many there are.
    pub(super) fn new(idle: Idle, selection: Option<Arc<Selection>>) -> Self {
        Self { decoded: Pool::default(), idle, selection }
    }

    /// One without anything in it.
    pub(super) fn take(&self) -> Pooled<Decoded> {
        let mut decoded = self.decoded.take();
        (decoded.idle, decoded.selection) = (self.idle.clone(), self.selection.clone());
        decoded.clear();
        decoded
    }

    /// Whether some relations are selected, and others not.
    pub(super) const fn selects_some(&self) -> bool {
        self.selection.is_some()
    }

    /// Whether a relation's pages are selected.
    pub(super) fn selects(&self, relation: RelFileLocator) -> bool {
        self.selection.as_ref().is_none_or(|selection| selection.wants(relation))
    }
}

/// Why a segment was not taken apart.
#[derive(Debug)]
pub(super) enum DecodeError {
    /// Its WAL is damaged.
    Damage(Damage),
    /// The object that holds it is.
    Stored(Corrupt),
    /// A record that the engine cannot vouch for.
    Unknown(Unknown),
}

/// A record that the engine cannot vouch for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("native replay does not know the {rmgr} record at {at} (kind {kind:#04X})")]
pub struct Unknown {
    /// Start of the record.
    pub at: Lsn,
    /// Its resource manager.
    pub rmgr: Rmgr,
    /// The resource manager's part of `xl_info`.
    pub kind: u8,
}

/// The records that matter.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    /// They start here or later.
    pub(super) from: Lsn,
    /// They start before.
    pub(super) until: Lsn,
}

/// A segment as it is stored.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    /// The object.
    pub(super) object: &'a [u8],
    /// The first part of the segment that follows, where there is one.
    pub(super) next: Option<&'a [u8]>,
    pub(super) span: SegmentSpan,
    pub(super) expected: Expected<'a>,
    /// So much of its WAL before a place is at hand while that is read.
    pub(super) kept: usize,
}

/// Takes a segment apart. `buffer` is memory for its WAL. What the `newer` log makes irrelevant is left out, as far as that
/// was read.
pub(super) fn decode_segment(
    source: Source<'_>,
    buffer: &mut Vec<u8>,
    wanted: Wanted,
    newer: &Newer,
    pools: &Pools,
) -> Result<Pooled<Decoded>, DecodeError> {
    let mut decoded = pools.take();
    let (mut kept, mut known) = (source.kept, Some(newer));
    loop {
        decoded.clear();
        decoded.stretch = newer.read().stretch();
        let wal = StoredWal::open(source.object, std::mem::take(buffer)).map_err(DecodeError::Stored)?;
        let mut wal = wal.keeping(kept);
        let read = read_records(&mut wal, source, wanted, known, &mut decoded);
        let fault = wal.fault();
        *buffer = wal.into_bytes();
        // Where it cannot be decompressed, the log seems to end.
        if let Some(fault) = fault {
            return Err(DecodeError::Stored(fault));
        }
        match read? {
            Read::All => break,
            Read::TooLate => known = None,
            Read::Gone => kept = usize::MAX,
        }
    }
    decoded.end();
    Ok(decoded)
}

/// What came of reading a segment.
enum Read {
    All,
    /// Something was passed over that is needed after all: it has to be read once more, and nothing be passed over.
    TooLate,
    /// Something is no longer at hand: it has to be read once more with all of it at hand.
    Gone,
}

/// Reads what a segment's records do, without those images that the `newer` log makes irrelevant.
fn read_records(
    wal: &mut StoredWal<'_>,
    Source { next, span, expected, .. }: Source<'_>,
    wanted: Wanted,
    newer: Option<&Newer>,
    decoded: &mut Decoded,
) -> Result<Read, DecodeError> {
    let stream = RecordStream::new(wal, span, expected, None).map_err(DecodeError::Damage)?.leaving_images();
    let mut stream = match next {
        Some(next) => stream.with_next(next),
        None => stream,
    };
    let major = stream.major();
    let (mut bytes, mut blocks) = (Vec::new(), Vec::new());
    loop {
        let added = match stream.next_record().map_err(DecodeError::Damage)? {
            Next::Record(record) if record.start >= wanted.until => return Ok(Read::All),
            Next::Record(record) if record.start < wanted.from => continue,
            Next::Record(record) => {
                let added = decoded.add(&record, newer).map_err(DecodeError::Unknown)?;
                (added, (record.start, record.end, record.header.total_bytes))
            }
            Next::NeedMore(pending) => {
                decoded.unfinished =
                    Some(pending.start).filter(|at| (wanted.from..wanted.until).contains(at));
                return Ok(Read::All);
            }
            Next::End(_) => return Ok(Read::All),
        };
        let (start, end, length) = match added {
            (Added::All, _) => continue,
            (Added::Images, of) => of,
            (Added::TooLate, _) => return Ok(Read::TooLate),
        };
        let (begin, wal) = stream.source().reached();
        let at = usize::try_from(start.bytes_since(span.start())).unwrap_or(usize::MAX);
        let Some(at) = at.checked_sub(begin) else { return Ok(Read::Gone) };
        let changed = |corrupt| DecodeError::Damage(Damage { lsn: start, record: Some(start), corrupt });
        bytes.clear();
        copy_record(wal, None, at, length as usize, &mut bytes)
            .ok_or_else(|| changed(Corrupt::invalid("xl_tot_len", 0, length.into())))?;
        let record = Record::decode(&bytes, start, end, major, &mut blocks);
        decoded.add_pages(&record.map_err(changed)?, newer);
    }
}

/// Takes one record apart that was put together elsewhere.
pub(super) fn decode_record(record: &Record<'_>) -> Result<Decoded, DecodeError> {
    let mut decoded = Decoded::default();
    decoded.add(record, None).map_err(DecodeError::Unknown)?;
    decoded.end();
    Ok(decoded)
}

impl Open {
    /// Whether nothing that is done to the block matters.
    fn is_irrelevant(&self, block: BlockNumber) -> bool {
        self.is_lost
            || self.cap.is_some_and(|cap| block >= cap)
            || self.newer.as_ref().is_some_and(|newer| newer.contains(block))
    }
}

/// What a record does to pages.
fn changes(record: &Record<'_>) -> impl Iterator<Item = Change> {
    let named = record.blocks().map(|block| {
        let tag = PageTag { relation: block.relation, fork: block.fork, block: block.block };
        Change { tag, how: How::Block(block.id), anew: block.makes_page_anew() }
    });
    named.chain(implicit_vm_blocks(record).map(|(relation, block)| {
        let tag = PageTag { relation, fork: ForkNumber::Vm, block };
        Change { tag, how: How::ClearVisibility, anew: false }
    }))
}

impl Decoded {
    /// Forgets everything, and keeps the memory.
    fn clear(&mut self) {
        self.close();
        while let Some(step) = self.steps.pop() {
            if let Step::Entries(batch) = step {
                self.take_back(batch);
            }
        }
        self.settings.clear();
        self.newest_xids.clear();
        (self.newest_xid, self.last_record) = (Xid::INVALID, None);
        (self.unfinished, self.count, self.stretch, self.passed_over) = (None, 0, 0, false);
    }

    /// Keeps a batch's memory for the next, a whole piece for any.
    pub(super) fn take_back(&mut self, mut batch: Batch) {
        if batch.bytes.capacity() >= PIECE_BYTES {
            self.idle.give(std::mem::take(&mut batch.bytes));
        }
        self.spare.push(batch);
    }

    /// Takes note of a record without blocks that the segment's index tells of.
    pub(super) fn add_told(&mut self, record: &Record<'_>, newer: &Newer) -> Result<(), Unknown> {
        self.add(record, Some(newer)).map(drop)
    }

    /// Takes note of a page that is there, and that nothing else matters of.
    pub(super) fn add_reach(&mut self, tag: PageTag, newer: &Newer) {
        let at = self.opened(Some(tag.part()), Some(newer));
        if let Some(open) = self.open.get_mut(at) {
            open.batch.reach = open.batch.reach.max(tag.block.saturating_add(1));
        }
    }

    /// Whether a record was added that copies a database.
    pub(super) fn copies_database(&self) -> bool {
        self.steps.iter().any(|step| matches!(step, Step::Files(Deed::Copy(_))))
    }

    /// No record follows that the index tells of. So many there were, and before `at` this was the newest transaction that
    /// wrote any.
    pub(super) fn end_told(&mut self, count: u64, (at, newest_xid): (Lsn, Xid)) {
        self.close();
        (self.count, self.last_record) = (count, None);
        self.newest_xids.push((at, newest_xid));
    }

    /// Takes note of what a record does. What the `newer` log makes irrelevant is passed over.
    fn add(&mut self, record: &Record<'_>, newer: Option<&Newer>) -> Result<Added, Unknown> {
        self.count = self.count.saturating_add(1);
        self.last_record = Some((record.start, record.end));
        if self.newest_xid.precedes(record.header.xid) {
            self.newest_xid = record.header.xid;
        }
        let unknown = Unknown { at: record.start, rmgr: record.rmgr(), kind: record.kind() };
        if record.blocks().len() > 0 {
            if !redo::vouches_for(record) || record.main_data().len() > MAIN_DATA_MAX {
                return Err(unknown);
            }
            if record.bytes().len() < record.header.total_bytes as usize && self.matters(record, newer) {
                return Ok(Added::Images);
            }
            self.add_pages(record, newer);
            return Ok(Added::All);
        }
        if let Some(DatabaseRecord::Copy { db_oid, spc_oid, from_db_oid, from_spc_oid }) =
            decoded(DatabaseRecord::decode(record), &unknown)?
        {
            if self.passed_over {
                return Ok(Added::TooLate);
            }
            let (from, to) = ((from_spc_oid, from_db_oid), (spc_oid, db_oid));
            self.note(Deed::Copy(DatabaseCopy { at: record.start, from, to }));
            return Ok(Added::All);
        }
        if !redo::vouches_for(record) {
            return Err(unknown);
        }
        self.add_files(record, newer, &unknown)?;
        if let Some(XlogRecord::ParameterChange(change)) = decoded(XlogRecord::decode(record), &unknown)? {
            self.settings.push((record.start, change));
            self.newest_xids.push((record.start, self.newest_xid));
        }
        if redo::changes_state(record) || counters::counts(record) {
            self.put(None, record, newer);
        }
        Ok(Added::All)
    }

    /// Whether something matters that a record does to pages.
    fn matters(&mut self, record: &Record<'_>, newer: Option<&Newer>) -> bool {
        changes(record).any(|change| self.place_for(Some(change), newer).is_some())
    }

    /// Takes note of a change to files: what is added to batches from now on lies behind it.
    fn note(&mut self, deed: Deed) {
        // Where a file is made does not matter to what is done to its pages.
        if !matches!(deed, Deed::Create { .. }) {
            self.close();
        }
        self.steps.push(Step::Files(deed));
    }

    /// No record follows.
    fn end(&mut self) {
        self.close();
        self.newest_xids.extend(self.last_record.map(|(_, end)| (end, self.newest_xid)));
    }

    /// Completes all batches.
    fn close(&mut self) {
        for Open { batch, .. } in self.open.drain(..) {
            self.places.remove(&batch.of);
            if batch.is_empty() {
                self.spare.push(batch);
            } else {
                self.steps.push(Step::Entries(batch));
            }
        }
    }

    /// Where the open batch of a part is, or of what is in no relation's file.
    fn opened(&mut self, of: Option<PartTag>, newer: Option<&Newer>) -> usize {
        // Most records are about what the one before was about.
        if self.open.get(self.last).is_some_and(|open| open.batch.of == of) {
            return self.last;
        }
        if let Some(at) = self.places.get(&of) {
            self.last = *at;
            return *at;
        }
        let mut open = Open { batch: self.spare.pop().unwrap_or_default(), ..Open::default() };
        open.batch.begin(of);
        if let (Some(part), Some(selection)) = (of, &self.selection) {
            open.is_unwanted = !selection.wants(part.relation);
        }
        if let (Some(part), Some(newer)) = (of, newer) {
            let newer = newer.read();
            open.newer = newer.made_anew().blocks(part).cloned();
            open.cap = newer.made_anew().cap(part.relation, part.fork);
            open.is_lost = newer.made_anew().has_lost(part.relation);
        }
        let at = self.open.len();
        self.places.insert(of, at);
        self.open.push(open);
        self.last = at;
        at
    }

    /// Adds what a record does to pages.
    fn add_pages(&mut self, record: &Record<'_>, newer: Option<&Newer>) {
        for change in changes(record) {
            self.put(Some(change), record, newer);
        }
    }

    /// Adds what a record does to a page, or to what is in no relation's file.
    fn put(&mut self, change: Option<Change>, record: &Record<'_>, newer: Option<&Newer>) {
        let Some(at) = self.place_for(change, newer) else { return };
        let mut packed = std::mem::take(&mut self.packed);
        packed.clear();
        let own = match change {
            Some(Change { how: How::Block(id), .. }) => Some(id),
            _ => None,
        };
        record.pack(own, change.map_or(NO_RELATION, |change| change.tag.relation), &mut packed);
        self.push(
            at,
            &Entry {
                start: record.start,
                end: record.end,
                xid: record.header.xid,
                how: change.map_or(How::Block(0), |change| change.how),
                block: change.map_or(0, |change| change.tag.block),
                anew: change.is_some_and(|change| change.anew),
                packed: packed.as_bytes(),
            },
        );
        self.packed = packed;
    }

    /// The open batch that a change belongs to, if it matters.
    fn place_for(&mut self, change: Option<Change>, newer: Option<&Newer>) -> Option<usize> {
        let at = self.opened(change.map(|change| change.tag.part()), newer);
        let open = self.open.get_mut(at)?;
        let Some(Change { tag, how, .. }) = change else { return Some(at) };
        // Clearing the map of blocks that are cut makes nothing that was not there.
        if !matches!(how, How::CutVisibility(_)) {
            open.batch.reach = open.batch.reach.max(tag.block.saturating_add(1));
        }
        if open.is_unwanted {
            return None;
        }
        let matters = !open.is_irrelevant(tag.block);
        self.passed_over |= !matters;
        matters.then_some(at)
    }

    /// Adds an entry to an open batch, or to another one behind it.
    fn push(&mut self, at: usize, entry: &Entry<'_>) {
        let Some(Open { batch, .. }) = self.open.get_mut(at) else { return };
        if batch.is_full_for(entry.packed.len()) {
            let mut next = self.spare.pop().unwrap_or_default();
            next.begin(batch.of);
            // It will be as long as that.
            self.idle.reserve(&mut next.bytes, PIECE_BYTES);
            self.steps.push(Step::Entries(std::mem::replace(batch, next)));
        }
        batch.put(entry, &self.idle);
    }

    /// What the record does to relations' files.
    fn add_files(
        &mut self,
        record: &Record<'_>,
        newer: Option<&Newer>,
        unknown: &Unknown,
    ) -> Result<(), Unknown> {
        match decoded(SmgrRecord::decode(record), unknown)? {
            Some(SmgrRecord::Create { relation, fork }) => self.note(Deed::Create { relation, fork }),
            Some(SmgrRecord::Truncate { relation, blocks, flags }) => {
                if flags & SmgrRecord::TRUNCATE_VM != 0 && !blocks.is_multiple_of(VM_HEAP_BLOCKS_PER_PAGE) {
                    let block = blocks.checked_div(VM_HEAP_BLOCKS_PER_PAGE).unwrap_or(0);
                    let tag = PageTag { relation, fork: ForkNumber::Vm, block };
                    let change = Change { tag, how: How::CutVisibility(blocks), anew: false };
                    self.put(Some(change), record, newer);
                }
                self.note(Deed::Cut { relation, blocks, flags });
            }
            None => {}
        }
        if let Some(DatabaseRecord::Drop { db_oid, spc_oids }) =
            decoded(DatabaseRecord::decode(record), unknown)?
        {
            for spc_oid in spc_oids {
                self.note(Deed::DropDatabase { spc_oid, db_oid });
            }
        }
        if let Some(end) = decoded(xact_end(record), unknown)? {
            for relation in end.dropped {
                self.note(Deed::Drop(relation));
            }
        }
        Ok(())
    }
}

/// A record of a kind that does not decode is as unknown as one of no known kind.
fn decoded<T>(found: Option<Result<T, Corrupt>>, unknown: &Unknown) -> Result<Option<T>, Unknown> {
    found.transpose().map_err(|_| unknown.clone())
}

#[cfg(test)]
impl Decoded {
    /// What segments do that no record is there of: changes to pages, each with its record's place, and what is done to files.
    /// None where something was passed over that is needed after all.
    pub(super) fn of(
        steps: &[Result<(PageTag, bool, Lsn), Deed>],
        newer: &Newer,
        known: bool,
    ) -> Option<Self> {
        let mut decoded = Self { stretch: newer.read().stretch(), ..Self::default() };
        for step in steps {
            match *step {
                Ok((tag, anew, start)) => {
                    let (how, block) = (How::Block(0), tag.block);
                    let change = Change { tag, how, anew };
                    let Some(at) = decoded.place_for(Some(change), known.then_some(newer)) else { continue };
                    let end = start.saturating_add(8);
                    decoded
                        .push(at, &Entry { start, end, xid: 3.into(), how, block, anew, packed: &[7; 40] });
                }
                Err(Deed::Copy(_)) if decoded.passed_over => return None,
                Err(deed) => decoded.note(deed),
            }
        }
        decoded.close();
        Some(decoded)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;

    use proptest::prelude::*;
    use waltide_format::archive::encode_segment;
    use waltide_format::engines::postgres::scan::{Previous, PreviousLog, ScanContext, scan_segment};
    use waltide_format::{SegmentName, SegmentSize, Xid};

    use super::*;

    /// The golden segments of 15, as they are stored, with the places in the log where they begin.
    pub(in super::super) fn golden() -> Vec<(Lsn, Vec<u8>)> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/wal/15");
        let name = |entry: std::fs::DirEntry| {
            let name = entry.file_name().into_string().unwrap();
            Some((name.strip_suffix(".zst")?.parse::<SegmentName>().ok()?, entry.path()))
        };
        let mut found: Vec<_> = dir.read_dir().unwrap().filter_map(|entry| name(entry.unwrap())).collect();
        found.sort();
        let mut before = None;
        let stored = found.into_iter().map(|(name, path)| {
            let wal = zstd::decode_all(std::fs::File::open(path).unwrap()).unwrap();
            let size = SegmentSize::new(wal.len() as u64).unwrap();
            let context = ScanContext { previous: before.take(), ..ScanContext::new(name, size) };
            let scan = scan_segment(wal.as_slice(), &context).unwrap();
            before = scan.tail.map(|tail| Previous { name, log: PreviousLog::Tail(tail) });
            (name.start(size).unwrap(), encode_segment(&wal, &scan.index, 1, 1))
        });
        stored.collect()
    }

    /// What is known of something that a segment does: to which part, how, and what is packed of its record.
    pub(in super::super) type Told = (Lsn, Option<PageTag>, How, bool, Lsn, Xid, Vec<u8>);

    /// Everything that a segment does to pages and to what is in no relation's file, and what it does to files.
    pub(in super::super) fn told(mut decoded: Decoded) -> (Vec<Told>, Vec<Deed>) {
        let (mut told, mut deeds) = (Vec::new(), Vec::new());
        for step in decoded.steps.drain(..) {
            match step {
                Step::Entries(batch) => {
                    let mut entries = batch.entries();
                    while let Some(e) = entries.next_entry() {
                        let tag =
                            |of: PartTag| PageTag { relation: of.relation, fork: of.fork, block: e.block };
                        told.push((
                            e.start,
                            batch.of.map(tag),
                            e.how,
                            e.anew,
                            e.end,
                            e.xid,
                            e.packed.to_vec(),
                        ));
                    }
                    assert!(entries.is_empty());
                }
                Step::Files(deed) => deeds.push(deed),
            }
        }
        told.sort_by_key(|(start, tag, how, ..)| {
            (*start, tag.map(|t| (t.relation, t.fork, t.block)), format!("{how:?}"))
        });
        (told, deeds)
    }

    pub(in super::super) fn taken(
        segments: &[(Lsn, Vec<u8>)],
        number: usize,
        kept: usize,
        newer: &Newer,
    ) -> Decoded {
        let (start, object) = &segments[number];
        let size = SegmentSize::new(1 << 20).unwrap();
        let mut next = segments.get(number + 1).map(|(_, o)| StoredWal::open(o, Vec::new()).unwrap());
        let next = next.as_mut().map(|next| {
            next.reach(1).unwrap();
            next.reached().1
        });
        let span = SegmentSpan::containing(*start, size).unwrap();
        let source = Source { object, next, span, expected: Expected::default(), kept };
        let wanted = Wanted { from: Lsn::ZERO, until: Lsn::MAX };
        let (mut buffer, pools) = (Vec::new(), Pools::default());
        let mut decoded = decode_segment(source, &mut buffer, wanted, newer, &pools).unwrap();
        std::mem::take(&mut *decoded)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        /// However much of the WAL is at hand, and whatever the newer log makes irrelevant.
        #[test]
        fn a_segment_does_the_same_however_it_is_read(
            kept in prop_oneof![Just(0usize), Just(8192), Just(KEPT_BYTES)],
            irrelevant in proptest::collection::vec(any::<prop::sample::Index>(), 0..300),
        ) {
            let segments = golden();
            let (mut images, mut left_out) = (0, 0);
            for number in 0..segments.len() {
                let newer = Newer::default();
                let (all, deeds) = told(taken(&segments, number, usize::MAX, &newer));
                images += all.iter().filter(|(.., anew, _, _, _)| *anew).count();
                prop_assert!(told(taken(&segments, number, kept, &newer)) == (all.clone(), deeds.clone()), "{} {}", number, kept);
                for index in &irrelevant {
                    if let (_, Some(tag), ..) = index.get(&all) {
                        newer.write().made_anew_mut().blocks_mut(tag.part()).insert(tag.block);
                    }
                }
                let copy = deeds.iter().filter_map(|deed| match deed {
                    Deed::Copy(copy) => Some(copy.at),
                    _ => None,
                });
                let copy = copy.max();
                let is_irrelevant = |(_, tag, ..): &Told| tag.is_some_and(|tag| newer.read().made_anew().contains(tag));
                // To a copy matters what the newer log makes irrelevant to everything else: then all is left.
                let is_all = all.iter().any(|told| is_irrelevant(told) && copy.is_some_and(|at| told.0 < at));
                let left: Vec<_> = all.iter().filter(|told| is_all || !is_irrelevant(told)).cloned().collect();
                left_out += all.len() - left.len();
                prop_assert!(told(taken(&segments, number, kept, &newer)) == (left, deeds), "{} {}", number, kept);
            }
            prop_assert!(images > 40, "{} images", images);
            prop_assert!(irrelevant.len() < 200 || left_out > 50, "{} left out", left_out);
        }
    }
}
