//! A segment's records as what each does, without what the segment itself makes irrelevant. Pure: no I/O.

use waltide_format::engines::postgres::effects::xact_end;
use waltide_format::engines::postgres::wal::{
    Damage, DatabaseRecord, Expected, Next, ParameterChange, Record, RecordStream, Rmgr, SegmentSpan,
    SmgrRecord, VM_HEAP_BLOCKS_PER_PAGE, XlogRecord, implicit_vm_blocks,
};
use waltide_format::{BlockNumber, Corrupt, ForkNumber, Lsn, Oid, RelFileLocator};

use super::super::redo;

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
#[derive(Debug, Clone, PartialEq, Eq)]
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

/// Takes a segment apart. `next` is the segment that follows, where there is one.
pub(super) fn decode_segment(
    wal: &[u8],
    next: Option<&[u8]>,
    span: SegmentSpan,
    expected: Expected<'_>,
    wanted: Wanted,
) -> Result<Decoded, DecodeError> {
    let stream = RecordStream::new(wal, span, expected, None).map_err(DecodeError::Damage)?;
    let mut stream = match next {
        Some(next) => stream.with_next(next),
        None => stream,
    };
    let mut decoded = Decoded::default();
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
    decoded.leave_out_what_is_overwritten();
    Ok(decoded)
}

/// Takes one record apart that was put together elsewhere.
pub(super) fn decode_record(record: &Record<'_>) -> Result<Decoded, Unknown> {
    let mut decoded = Decoded::default();
    decoded.add(record)?;
    Ok(decoded)
}

impl Decoded {
    /// A record's bytes and place.
    pub(super) fn record(&self, number: usize) -> Option<(Span, &[u8])> {
        let span = *self.records.get(number)?;
        Some((span, self.arena.get(span.from..span.from.saturating_add(span.bytes))?))
    }

    fn add(&mut self, record: &Record<'_>) -> Result<(), Unknown> {
        self.count = self.count.saturating_add(1);
        let unknown = Unknown { at: record.start, rmgr: record.rmgr(), kind: record.kind() };
        if record.blocks().len() > 0 {
            if !redo::vouches_for(record) {
                return Err(unknown);
            }
            for block in record.blocks() {
                let tag = PageTag { relation: block.relation, fork: block.fork, block: block.block };
                let how = How::Block(block.id);
                self.add_page(record, tag, how, block.makes_page_anew());
            }
            for (relation, block) in implicit_vm_blocks(record) {
                let tag = PageTag { relation, fork: ForkNumber::Vm, block };
                self.add_page(record, tag, How::ClearVisibility, false);
            }
            return Ok(());
        }
        let number = self.records.len();
        let before = self.deeds.len();
        if let Some(DatabaseRecord::Copy { db_oid, spc_oid, from_db_oid, from_spc_oid }) =
            decoded(DatabaseRecord::decode(record), &unknown)?
        {
            let (from, to) = ((from_spc_oid, from_db_oid), (spc_oid, db_oid));
            self.deeds.push((number, Deed::Copy(DatabaseCopy { at: record.start, from, to })));
        } else {
            if !redo::vouches_for(record) {
                return Err(unknown);
            }
            self.add_files(number, record, &unknown)?;
            if let Some(XlogRecord::ParameterChange(change)) = decoded(XlogRecord::decode(record), &unknown)?
            {
                self.settings.push((record.start, change));
            }
            if redo::changes_state(record) {
                self.deeds.push((number, Deed::State));
            }
        }
        if self.deeds.len() > before {
            self.keep(record, record.bytes());
        }
        Ok(())
    }

    /// A page needs of the record no other page's image; those would be most of what is kept.
    fn add_page(&mut self, record: &Record<'_>, tag: PageTag, how: How, anew: bool) {
        let id = match how {
            How::Block(id) => Some(id),
            How::ClearVisibility | How::CutVisibility(_) => None,
        };
        // One copy serves all of the record's pages where there are no images to leave out, or little would be left out.
        let is_shared = record.image_bytes() == 0 || record.main_data().len() > MAIN_DATA_MAX;
        if !is_shared {
            self.keep(record, &record.for_block(id));
        } else if self.records.last().is_none_or(|last| last.start != record.start) {
            self.keep(record, record.bytes());
        }
        self.deeds.push((self.records.len().saturating_sub(1), Deed::Page { tag, how, anew }));
    }

    fn keep(&mut self, record: &Record<'_>, bytes: &[u8]) {
        let from = self.arena.len();
        self.arena.extend_from_slice(bytes);
        self.records.push(Span { start: record.start, end: record.end, from, bytes: bytes.len() });
    }

    /// What the record does to relations' files.
    fn add_files(&mut self, number: usize, record: &Record<'_>, unknown: &Unknown) -> Result<(), Unknown> {
        let mut put = |deed: Deed| self.deeds.push((number, deed));
        match decoded(SmgrRecord::decode(record), unknown)? {
            Some(SmgrRecord::Create { relation, fork }) => put(Deed::Create { relation, fork }),
            Some(SmgrRecord::Truncate { relation, blocks, flags }) => {
                if flags & SmgrRecord::TRUNCATE_VM != 0 && !blocks.is_multiple_of(VM_HEAP_BLOCKS_PER_PAGE) {
                    let block = blocks.checked_div(VM_HEAP_BLOCKS_PER_PAGE).unwrap_or(0);
                    let tag = PageTag { relation, fork: ForkNumber::Vm, block };
                    put(Deed::Page { tag, how: How::CutVisibility(blocks), anew: false });
                }
                put(Deed::Cut { relation, blocks, flags });
            }
            None => {}
        }
        if let Some(DatabaseRecord::Drop { db_oid, spc_oids }) =
            decoded(DatabaseRecord::decode(record), unknown)?
        {
            for spc_oid in spc_oids {
                put(Deed::DropDatabase { spc_oid, db_oid });
            }
        }
        if let Some(end) = decoded(xact_end(record), unknown)? {
            for relation in end.dropped {
                put(Deed::Drop(relation));
            }
        }
        Ok(())
    }

    /// Of a page that is made anew, nothing that was done to it before matters.
    fn leave_out_what_is_overwritten(&mut self) {
        let mut last: foldhash::HashMap<PageTag, usize> = foldhash::HashMap::default();
        for (i, (_, deed)) in self.deeds.iter().enumerate() {
            if let Deed::Page { tag, anew: true, .. } = deed {
                last.insert(*tag, i);
            }
        }
        let mut i = 0usize;
        self.deeds.retain(|(_, deed)| {
            let here = i;
            i = i.saturating_add(1);
            match deed {
                Deed::Page { tag, .. } => last.get(tag).is_none_or(|last| here >= *last),
                _ => true,
            }
        });
    }
}

/// A record of a kind that does not decode is as unknown as one of no known kind.
fn decoded<T>(found: Option<Result<T, Corrupt>>, unknown: &Unknown) -> Result<Option<T>, Unknown> {
    found.transpose().map_err(|_| unknown.clone())
}
