//! A segment's records as what each does, without what the segment itself makes irrelevant. Pure: no I/O.

use waltide_format::engines::postgres::effects::xact_end;
use waltide_format::engines::postgres::wal::{
    Damage, DatabaseRecord, Expected, Next, ParameterChange, Record, RecordStream, Rmgr, SegmentSpan,
    SmgrRecord, VM_HEAP_BLOCKS_PER_PAGE, XlogRecord, copy_record, implicit_vm_blocks,
};
use waltide_format::{BlockNumber, Corrupt, ForkNumber, Lsn, Oid, PgMajor, RelFileLocator};

use super::super::redo;
use super::newer::Newer;
use super::pool::{Pool, Pooled};

/// A record with more data than this besides its pages is not copied for each of them.
const MAIN_DATA_MAX: usize = 64 << 10;

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

/// Where a record's bytes lie in the arena.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    pub(super) start: Lsn,
    pub(super) end: Lsn,
    from: usize,
    bytes: usize,
}

/// What a segment's records do, in their order.
#[derive(Debug, Default)]
pub(super) struct Decoded {
    arena: Vec<u8>,
    records: Vec<Span>,
    /// Each with the record's place among the records.
    pub(super) deeds: Vec<(usize, Deed)>,
    /// Changes of settings.
    pub(super) settings: Vec<(Lsn, ParameterChange)>,
    /// A record that begins here and ends behind the next segment.
    pub(super) unfinished: Option<Lsn>,
    /// How many records there are in the range.
    pub(super) count: u64,
    /// What was left out is of no use to this stretch of the log, counted from its end.
    pub(super) stretch: usize,
}

/// A record that was seen, and whose bytes are not copied yet.
#[derive(Debug, Clone, Copy)]
struct Seen {
    start: Lsn,
    end: Lsn,
    bytes: usize,
}

/// What a record that was seen does.
#[derive(Debug, Clone, Copy)]
struct Noted {
    /// The record's place among those that were seen.
    record: usize,
    deed: Deed,
    /// Of the record, other pages' images are left out; those would be most of what is kept.
    is_cut: bool,
}

/// What a segment's records do, before it is known which of it matters.
#[derive(Debug, Default)]
pub(super) struct Draft {
    seen: Vec<Seen>,
    notes: Vec<Noted>,
    settings: Vec<(Lsn, ParameterChange)>,
    count: u64,
}

/// Where what segments were taken apart with waits for the next.
#[derive(Debug, Clone, Default)]
pub(super) struct Pools {
    drafts: Pool<Draft>,
    decoded: Pool<Decoded>,
}

/// Why a segment was not taken apart.
#[derive(Debug)]
pub(super) enum DecodeError {
    /// It is damaged.
    Damage(Damage),
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

/// Takes a segment apart. `next` is the segment that follows, where there is one. What the `newer` log makes irrelevant is
/// left out, as far as that was read.
pub(super) fn decode_segment(
    wal: &[u8],
    next: Option<&[u8]>,
    span: SegmentSpan,
    expected: Expected<'_>,
    wanted: Wanted,
    newer: &Newer,
    pools: &Pools,
) -> Result<Pooled<Decoded>, DecodeError> {
    let stream = RecordStream::new(wal, span, expected, None).map_err(DecodeError::Damage)?;
    let mut stream = match next {
        Some(next) => stream.with_next(next),
        None => stream,
    };
    let major = stream.major();
    let mut draft = pools.drafts.take();
    draft.clear();
    let mut unfinished = None;
    loop {
        match stream.next_record().map_err(DecodeError::Damage)? {
            Next::Record(record) if record.start >= wanted.until => break,
            Next::Record(record) if record.start < wanted.from => {}
            Next::Record(record) => draft.add(&record).map_err(DecodeError::Unknown)?,
            Next::NeedMore(pending) => {
                unfinished = Some(pending.start).filter(|at| (wanted.from..wanted.until).contains(at));
                break;
            }
            Next::End(_) => break,
        }
    }
    let stretch = draft.leave_out(newer);
    let mut decoded = pools.decoded.take();
    let copied = draft.copy(major, &mut decoded, |seen, bytes| {
        let at = usize::try_from(seen.start.bytes_since(span.start())).unwrap_or(usize::MAX);
        copy_record(wal, next, at, seen.bytes, bytes)
    });
    copied.map_err(DecodeError::Damage)?;
    (decoded.unfinished, decoded.stretch) = (unfinished, stretch);
    Ok(decoded)
}

/// Takes one record apart that was put together elsewhere.
pub(super) fn decode_record(record: &Record<'_>) -> Result<Decoded, DecodeError> {
    let (mut draft, mut decoded) = (Draft::default(), Decoded::default());
    draft.add(record).map_err(DecodeError::Unknown)?;
    let copied = draft.copy(record.major, &mut decoded, |_, bytes| {
        bytes.extend_from_slice(record.bytes());
        Some(())
    });
    copied.map_err(DecodeError::Damage)?;
    Ok(decoded)
}

impl Decoded {
    /// Forgets everything, and keeps the memory.
    fn clear(&mut self) {
        let Self { arena, records, deeds, settings, unfinished, count, stretch } = self;
        arena.clear();
        records.clear();
        deeds.clear();
        settings.clear();
        (*unfinished, *count, *stretch) = (None, 0, 0);
    }

    /// A record's bytes and place.
    pub(super) fn record(&self, number: usize) -> Option<(Span, &[u8])> {
        let span = *self.records.get(number)?;
        Some((span, self.arena.get(span.from..span.from.saturating_add(span.bytes))?))
    }

    fn keep(&mut self, seen: Seen, bytes: &[u8]) {
        let from = self.arena.len();
        self.arena.extend_from_slice(bytes);
        self.records.push(Span { start: seen.start, end: seen.end, from, bytes: bytes.len() });
    }
}

impl Draft {
    /// Forgets everything, and keeps the memory.
    fn clear(&mut self) {
        let Self { seen, notes, settings, count } = self;
        seen.clear();
        notes.clear();
        settings.clear();
        *count = 0;
    }

    fn add(&mut self, record: &Record<'_>) -> Result<(), Unknown> {
        self.count = self.count.saturating_add(1);
        let unknown = Unknown { at: record.start, rmgr: record.rmgr(), kind: record.kind() };
        let before = self.notes.len();
        if record.blocks().len() > 0 {
            if !redo::vouches_for(record) {
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
        if self.notes.len() > before {
            self.seen.push(Seen { start: record.start, end: record.end, bytes: record.bytes().len() });
        }
        Ok(())
    }

    /// Of the record that is about to be seen.
    fn note(&mut self, deed: Deed) {
        self.notes.push(Noted { record: self.seen.len(), deed, is_cut: false });
    }

    fn add_pages(&mut self, record: &Record<'_>) {
        let images = record.blocks().filter(|block| block.image.is_some()).count();
        let may_cut = images > 0 && record.main_data().len() <= MAIN_DATA_MAX;
        let number = self.seen.len();
        let mut note = |tag, how, anew, own_images: usize| {
            let is_cut = may_cut && images > own_images;
            self.notes.push(Noted { record: number, deed: Deed::Page { tag, how, anew }, is_cut });
        };
        for block in record.blocks() {
            let tag = PageTag { relation: block.relation, fork: block.fork, block: block.block };
            note(tag, How::Block(block.id), block.makes_page_anew(), block.image.iter().count());
        }
        for (relation, block) in implicit_vm_blocks(record) {
            let tag = PageTag { relation, fork: ForkNumber::Vm, block };
            note(tag, How::ClearVisibility, false, 0);
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
    /// Which stretch of the log the `newer` one stood in.
    fn leave_out(&mut self, newer: &Newer) -> usize {
        let newer = newer.read();
        let mut made_anew: foldhash::HashSet<PageTag> = foldhash::HashSet::default();
        let mut is_newest = true;
        let mut matters = vec![true; self.notes.len()];
        for (noted, matters) in self.notes.iter().zip(&mut matters).rev() {
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
        self.notes.retain(|_| matters.next().unwrap_or(true));
        newer.stretch()
    }

    /// Copies the records of which something is left in place of what `decoded` holds; `read` puts a record's bytes behind
    /// what it is given.
    fn copy(
        &self,
        major: PgMajor,
        decoded: &mut Decoded,
        mut read: impl FnMut(Seen, &mut Vec<u8>) -> Option<()>,
    ) -> Result<(), Damage> {
        decoded.clear();
        decoded.settings.extend_from_slice(&self.settings);
        decoded.count = self.count;
        let (mut bytes, mut blocks) = (Vec::new(), Vec::new());
        // The record whose bytes are at hand, and whether it was kept whole.
        let mut at_hand: Option<(usize, bool)> = None;
        for Noted { record: number, deed, is_cut } in self.notes.iter().copied() {
            let Some(record) = self.seen.get(number).copied() else { continue };
            let changed = |corrupt| Damage { lsn: record.start, record: Some(record.start), corrupt };
            let mut is_kept = at_hand.is_some_and(|(n, is_kept)| n == number && is_kept);
            if at_hand.is_none_or(|(n, _)| n != number) {
                bytes.clear();
                read(record, &mut bytes)
                    .ok_or_else(|| changed(Corrupt::invalid("xl_tot_len", 0, record.bytes as u64)))?;
            }
            if is_cut {
                let id = match deed {
                    Deed::Page { how: How::Block(id), .. } => Some(id),
                    _ => None,
                };
                let whole = Record::decode(&bytes, record.start, record.end, major, &mut blocks);
                decoded.keep(record, &whole.map_err(changed)?.for_block(id));
                // What follows of this record refers to its last copy.
                is_kept = false;
            } else if !is_kept {
                decoded.keep(record, &bytes);
                is_kept = true;
            }
            at_hand = Some((number, is_kept));
            decoded.deeds.push((decoded.records.len().saturating_sub(1), deed));
        }
        Ok(())
    }
}

/// A record of a kind that does not decode is as unknown as one of no known kind.
fn decoded<T>(found: Option<Result<T, Corrupt>>, unknown: &Unknown) -> Result<Option<T>, Unknown> {
    found.transpose().map_err(|_| unknown.clone())
}
