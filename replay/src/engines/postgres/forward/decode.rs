//! A segment's records as what each does, without what the segment itself makes irrelevant. Pure: no I/O.

use waltide_format::archive::StoredWal;
use waltide_format::engines::postgres::effects::xact_end;
use waltide_format::engines::postgres::wal::{
    Damage, DatabaseRecord, Expected, Next, ParameterChange, Record, RecordStream, Rmgr, SegmentSpan,
    SmgrRecord, VM_HEAP_BLOCKS_PER_PAGE, XlogRecord, copy_record, implicit_vm_blocks,
};
use waltide_format::{BlockNumber, Corrupt, ForkNumber, Lsn, Oid, PgMajor, RelFileLocator, Writer, Xid};

use super::super::redo;
use super::newer::Newer;
use super::pool::{Pool, Pooled};

/// No record that changes pages has more data than this besides theirs: what they do to their pages fits a page or two. It
/// is kept for each of its pages.
const MAIN_DATA_MAX: usize = 64 << 10;
/// A record without images that is not longer is packed as it is met: to look at it twice takes longer.
const SHORT_BYTES: usize = 512;
/// Of what is kept for no page.
pub(super) const NO_RELATION: RelFileLocator = RelFileLocator { spc_oid: 0, db_oid: 0, rel_number: 0 };

/// A page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct PageTag {
    pub(super) relation: RelFileLocator,
    pub(super) fork: ForkNumber,
    pub(super) block: BlockNumber,
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

/// What a record does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Deed {
    /// It changes a page; `anew` where nothing of the page as it was is needed.
    Page { tag: PageTag, how: How, anew: bool },
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
    /// It changes what is not in relations' files.
    State,
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

impl Deed {
    /// The block reference whose page it changes, and the page's relation.
    const fn own(&self) -> (Option<u8>, RelFileLocator) {
        match self {
            Self::Page { tag, how: How::Block(id), .. } => (Some(*id), tag.relation),
            Self::Page { tag, .. } => (None, tag.relation),
            _ => (None, NO_RELATION),
        }
    }

    /// Whether the record is needed when it is done.
    const fn needs_record(&self) -> bool {
        matches!(self, Self::Page { .. } | Self::State)
    }
}

/// A record of which something matters.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    pub(super) start: Lsn,
    pub(super) end: Lsn,
    pub(super) xid: Xid,
    bytes: usize,
}

/// What a record does.
#[derive(Debug, Clone, Copy)]
pub(super) struct Noted {
    pub(super) deed: Deed,
    /// The record's place among those that were seen.
    record: usize,
    /// What is packed of it: from where on, and how many bytes; none yet where that is zero.
    packed: (usize, usize),
}

/// What a segment's records do, in their order.
#[derive(Debug, Default)]
pub(super) struct Decoded {
    seen: Vec<Seen>,
    pub(super) deeds: Vec<Noted>,
    packed: Writer,
    /// Changes of settings.
    pub(super) settings: Vec<(Lsn, ParameterChange)>,
    /// A record that begins here and ends behind the next segment.
    pub(super) unfinished: Option<Lsn>,
    /// How many records there are in the range.
    pub(super) count: u64,
    /// What was left out is of no use to this stretch of the log, counted from its end.
    pub(super) stretch: usize,
}

/// Where what segments were taken apart with waits for the next.
pub(super) type Pools = Pool<Decoded>;

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

/// Takes a segment apart. `next` is the first part of the segment that follows, where there is one. What the `newer` log makes
/// irrelevant is left out, as far as that was read.
pub(super) fn decode_segment(
    wal: &mut StoredWal<'_>,
    next: Option<&[u8]>,
    span: SegmentSpan,
    expected: Expected<'_>,
    wanted: Wanted,
    newer: &Newer,
    pools: &Pools,
) -> Result<Pooled<Decoded>, DecodeError> {
    let mut decoded = pools.take();
    decoded.clear();
    let major = read_records(wal, next, span, expected, wanted, &mut decoded);
    // Where it cannot be decompressed, the log seems to end.
    if let Some(fault) = wal.fault() {
        return Err(DecodeError::Stored(fault));
    }
    let major = major?;
    decoded.leave_out(newer);
    let wal = wal.reached();
    let packed = decoded.pack(major, |seen, bytes| {
        let at = usize::try_from(seen.start.bytes_since(span.start())).unwrap_or(usize::MAX);
        copy_record(wal, next, at, seen.bytes, bytes)
    });
    packed.map_err(DecodeError::Damage)?;
    Ok(decoded)
}

/// Reads what a segment's records do; the major version whose format they have.
fn read_records(
    wal: &mut StoredWal<'_>,
    next: Option<&[u8]>,
    span: SegmentSpan,
    expected: Expected<'_>,
    wanted: Wanted,
    decoded: &mut Decoded,
) -> Result<PgMajor, DecodeError> {
    let stream = RecordStream::new(wal, span, expected, None).map_err(DecodeError::Damage)?.leaving_images();
    let mut stream = match next {
        Some(next) => stream.with_next(next),
        None => stream,
    };
    let major = stream.major();
    loop {
        match stream.next_record().map_err(DecodeError::Damage)? {
            Next::Record(record) if record.start >= wanted.until => break,
            Next::Record(record) if record.start < wanted.from => {}
            Next::Record(record) => decoded.add(&record).map_err(DecodeError::Unknown)?,
            Next::NeedMore(pending) => {
                decoded.unfinished =
                    Some(pending.start).filter(|at| (wanted.from..wanted.until).contains(at));
                break;
            }
            Next::End(_) => break,
        }
    }
    Ok(major)
}

/// Takes one record apart that was put together elsewhere.
pub(super) fn decode_record(record: &Record<'_>) -> Result<Decoded, DecodeError> {
    let mut decoded = Decoded::default();
    decoded.add(record).map_err(DecodeError::Unknown)?;
    let packed = decoded.pack(record.major, |_, bytes| {
        bytes.extend_from_slice(record.bytes());
        Some(())
    });
    packed.map_err(DecodeError::Damage)?;
    Ok(decoded)
}

impl Decoded {
    /// Forgets everything, and keeps the memory.
    fn clear(&mut self) {
        let Self { seen, deeds, packed, settings, unfinished, count, stretch } = self;
        seen.clear();
        deeds.clear();
        packed.clear();
        settings.clear();
        (*unfinished, *count, *stretch) = (None, 0, 0);
    }

    /// The record of something that was noted, and what is packed of it.
    pub(super) fn record(&self, noted: &Noted) -> Option<(Seen, &[u8])> {
        let (from, bytes) = noted.packed;
        let packed = self.packed.as_bytes().get(from..from.saturating_add(bytes))?;
        Some((*self.seen.get(noted.record)?, packed))
    }

    fn add(&mut self, record: &Record<'_>) -> Result<(), Unknown> {
        self.count = self.count.saturating_add(1);
        let unknown = Unknown { at: record.start, rmgr: record.rmgr(), kind: record.kind() };
        let before = self.deeds.len();
        if record.blocks().len() > 0 {
            if !redo::vouches_for(record) || record.main_data().len() > MAIN_DATA_MAX {
                return Err(unknown);
            }
            self.add_pages(record);
        } else if let Some(DatabaseRecord::Copy { db_oid, spc_oid, from_db_oid, from_spc_oid }) =
            decoded(DatabaseRecord::decode(record), &unknown)?
        {
            let (from, to) = ((from_spc_oid, from_db_oid), (spc_oid, db_oid));
            self.note(Deed::Copy(DatabaseCopy { at: record.start, from, to }));
        } else {
            if !redo::vouches_for(record) {
                return Err(unknown);
            }
            self.add_files(record, &unknown)?;
            if let Some(XlogRecord::ParameterChange(change)) = decoded(XlogRecord::decode(record), &unknown)?
            {
                self.settings.push((record.start, change));
            }
            if redo::changes_state(record) {
                self.note(Deed::State);
            }
        }
        let noted = self.deeds.get_mut(before..).unwrap_or_default();
        if !noted.is_empty() {
            let (bytes, xid) = (record.header.total_bytes as usize, record.header.xid);
            self.seen.push(Seen { start: record.start, end: record.end, xid, bytes });
            if bytes <= SHORT_BYTES && record.image_bytes() == 0 {
                noted.iter_mut().for_each(|noted| noted.pack(record, &mut self.packed));
            }
        }
        Ok(())
    }

    /// Of the record that is about to be seen.
    fn note(&mut self, deed: Deed) {
        self.deeds.push(Noted { record: self.seen.len(), deed, packed: (0, 0) });
    }

    fn add_pages(&mut self, record: &Record<'_>) {
        for block in record.blocks() {
            let tag = PageTag { relation: block.relation, fork: block.fork, block: block.block };
            self.note(Deed::Page { tag, how: How::Block(block.id), anew: block.makes_page_anew() });
        }
        for (relation, block) in implicit_vm_blocks(record) {
            let tag = PageTag { relation, fork: ForkNumber::Vm, block };
            self.note(Deed::Page { tag, how: How::ClearVisibility, anew: false });
        }
    }

    /// What the record does to relations' files.
    fn add_files(&mut self, record: &Record<'_>, unknown: &Unknown) -> Result<(), Unknown> {
        match decoded(SmgrRecord::decode(record), unknown)? {
            Some(SmgrRecord::Create { relation, fork }) => self.note(Deed::Create { relation, fork }),
            Some(SmgrRecord::Truncate { relation, blocks, flags }) => {
                if flags & SmgrRecord::TRUNCATE_VM != 0 && !blocks.is_multiple_of(VM_HEAP_BLOCKS_PER_PAGE) {
                    let block = blocks.checked_div(VM_HEAP_BLOCKS_PER_PAGE).unwrap_or(0);
                    let tag = PageTag { relation, fork: ForkNumber::Vm, block };
                    self.note(Deed::Page { tag, how: How::CutVisibility(blocks), anew: false });
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

    /// Of a page that is made anew, nothing that was done to it before matters, but to a copy that was made in between.
    fn leave_out(&mut self, newer: &Newer) {
        let newer = newer.read();
        let mut made_anew: foldhash::HashSet<PageTag> = foldhash::HashSet::default();
        let mut is_newest = true;
        let mut matters = vec![true; self.deeds.len()];
        for (noted, matters) in self.deeds.iter().zip(&mut matters).rev() {
            match &noted.deed {
                Deed::Copy(_) => {
                    made_anew.clear();
                    is_newest = false;
                }
                Deed::Page { tag, anew, .. } => {
                    let is_made_anew = made_anew.contains(tag) || is_newest && newer.makes_anew(*tag);
                    *matters = !is_made_anew;
                    if *matters && *anew {
                        made_anew.insert(*tag);
                    }
                }
                _ => {}
            }
        }
        let mut matters = matters.into_iter();
        self.deeds.retain(|_| matters.next().unwrap_or(true));
        self.stretch = newer.stretch();
    }

    /// Packs what is left and was not packed at once; `read` puts a record's bytes behind what it is given.
    fn pack(
        &mut self,
        major: PgMajor,
        mut read: impl FnMut(Seen, &mut Vec<u8>) -> Option<()>,
    ) -> Result<(), Damage> {
        let Self { seen, deeds, packed, .. } = self;
        let (mut bytes, mut blocks, mut at_hand) = (Vec::new(), Vec::new(), None);
        let is_left = |noted: &&mut Noted| noted.packed.1 == 0 && noted.deed.needs_record();
        for noted in deeds.iter_mut().filter(is_left) {
            let Some(seen) = seen.get(noted.record).copied() else { continue };
            let changed = |corrupt| Damage { lsn: seen.start, record: Some(seen.start), corrupt };
            if at_hand != Some(noted.record) {
                bytes.clear();
                read(seen, &mut bytes)
                    .ok_or_else(|| changed(Corrupt::invalid("xl_tot_len", 0, seen.bytes as u64)))?;
                at_hand = Some(noted.record);
            }
            let record = Record::decode(&bytes, seen.start, seen.end, major, &mut blocks);
            noted.pack(&record.map_err(changed)?, packed);
        }
        Ok(())
    }
}

impl Noted {
    fn pack(&mut self, record: &Record<'_>, packed: &mut Writer) {
        if self.deed.needs_record() {
            let (from, (own, relation)) = (packed.len(), self.deed.own());
            record.pack(own, relation, packed);
            self.packed = (from, packed.len().saturating_sub(from));
        }
    }
}

/// A record of a kind that does not decode is as unknown as one of no known kind.
fn decoded<T>(found: Option<Result<T, Corrupt>>, unknown: &Unknown) -> Result<Option<T>, Unknown> {
    found.transpose().map_err(|_| unknown.clone())
}
