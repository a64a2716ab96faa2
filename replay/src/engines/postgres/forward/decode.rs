//! A segment's records as what each does, without what the segment itself makes irrelevant. Pure: no I/O.

use waltide_format::archive::StoredWal;
use waltide_format::engines::postgres::effects::xact_end;
use waltide_format::engines::postgres::wal::{
    Damage, DatabaseRecord, Expected, Next, ParameterChange, Record, RecordStream, Rmgr, SegmentSpan,
    SmgrRecord, VM_HEAP_BLOCKS_PER_PAGE, XlogRecord, copy_record, implicit_vm_blocks,
};
use waltide_format::{BlockNumber, Corrupt, ForkNumber, Lsn, Oid, RelFileLocator, Writer, Xid};

use super::super::redo;
use super::newer::Newer;
use super::pool::{Pool, Pooled};

/// No record that changes pages has more data than this besides theirs: what they do to their pages fits a page or two. It
/// is kept for each of its pages.
const MAIN_DATA_MAX: usize = 64 << 10;
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
    /// What is packed of it: from where on, and how many bytes.
    packed: (usize, usize),
}

/// What came of a record.
enum Added {
    /// What it does was packed, or is irrelevant.
    Packed,
    /// Its images, which matter, are still to be read, and then it is packed.
    Images(Seen),
    /// It needs what was passed over.
    TooLate,
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
    /// Something of no use to it was passed over.
    passed_over: bool,
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
    // The second time nothing is passed over before all is known.
    for (kept, known) in [(source.kept, Some(newer)), (usize::MAX, None)] {
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
            Read::Again => {}
        }
    }
    decoded.leave_out(newer);
    Ok(decoded)
}

/// What came of reading a segment.
enum Read {
    All,
    /// It has to be read once more: something was passed over that is needed after all, or is no longer at hand.
    Again,
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
            Next::Record(record) => decoded.add(&record, newer).map_err(DecodeError::Unknown)?,
            Next::NeedMore(pending) => {
                decoded.unfinished =
                    Some(pending.start).filter(|at| (wanted.from..wanted.until).contains(at));
                return Ok(Read::All);
            }
            Next::End(_) => return Ok(Read::All),
        };
        let seen = match added {
            Added::Packed => continue,
            Added::Images(seen) => seen,
            Added::TooLate => return Ok(Read::Again),
        };
        let (begin, wal) = stream.source().reached();
        let at = usize::try_from(seen.start.bytes_since(span.start())).unwrap_or(usize::MAX);
        let Some(at) = at.checked_sub(begin) else { return Ok(Read::Again) };
        let changed =
            |corrupt| DecodeError::Damage(Damage { lsn: seen.start, record: Some(seen.start), corrupt });
        bytes.clear();
        copy_record(wal, None, at, seen.bytes, &mut bytes)
            .ok_or_else(|| changed(Corrupt::invalid("xl_tot_len", 0, seen.bytes as u64)))?;
        let record = Record::decode(&bytes, seen.start, seen.end, major, &mut blocks);
        decoded.pack(&record.map_err(changed)?);
    }
}

/// Takes one record apart that was put together elsewhere.
pub(super) fn decode_record(record: &Record<'_>) -> Result<Decoded, DecodeError> {
    let mut decoded = Decoded::default();
    decoded.add(record, None).map_err(DecodeError::Unknown)?;
    Ok(decoded)
}

impl Decoded {
    /// Forgets everything, and keeps the memory.
    fn clear(&mut self) {
        let Self { seen, deeds, packed, settings, unfinished, count, stretch, passed_over } = self;
        seen.clear();
        deeds.clear();
        packed.clear();
        settings.clear();
        (*unfinished, *count, *stretch, *passed_over) = (None, 0, 0, false);
    }

    /// The record of something that was noted, and what is packed of it.
    pub(super) fn record(&self, noted: &Noted) -> Option<(Seen, &[u8])> {
        let (from, bytes) = noted.packed;
        let packed = self.packed.as_bytes().get(from..from.saturating_add(bytes))?;
        Some((*self.seen.get(noted.record)?, packed))
    }

    /// Takes note of what a record does, and packs it. Images that the `newer` log makes irrelevant are passed over.
    fn add(&mut self, record: &Record<'_>, newer: Option<&Newer>) -> Result<Added, Unknown> {
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
        if self.deeds.get(before..).unwrap_or_default().iter().any(Noted::is_copy) && self.passed_over {
            return Ok(Added::TooLate);
        }
        if record.image_bytes() > 0
            && let Some(newer) = newer
        {
            self.pass_over(before, newer);
        }
        if self.deeds.len() == before {
            return Ok(Added::Packed);
        }
        let bytes = record.header.total_bytes as usize;
        let seen = Seen { start: record.start, end: record.end, xid: record.header.xid, bytes };
        self.seen.push(seen);
        if record.bytes().len() < bytes {
            return Ok(Added::Images(seen));
        }
        self.pack(record);
        Ok(Added::Packed)
    }

    /// Passes over those deeds, from the one of that number on, that the newer log makes irrelevant.
    fn pass_over(&mut self, first: usize, newer: &Newer) {
        let newer = newer.read();
        let is_irrelevant =
            |noted: &mut Noted| matches!(noted.deed, Deed::Page { tag, .. } if newer.makes_anew(tag));
        self.passed_over |= self.deeds.extract_if(first.., is_irrelevant).count() > 0;
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
    }

    /// Packs the record that was seen last.
    fn pack(&mut self, record: &Record<'_>) {
        let Self { seen, deeds, packed, .. } = self;
        let last = seen.len().saturating_sub(1);
        for noted in deeds.iter_mut().rev().take_while(|noted| noted.record == last) {
            noted.pack(record, packed);
        }
    }
}

impl Noted {
    const fn is_copy(&self) -> bool {
        matches!(self.deed, Deed::Copy(_))
    }

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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;
    use waltide_format::archive::encode_segment;
    use waltide_format::engines::postgres::scan::{ScanContext, scan_segment};
    use waltide_format::{SegmentName, SegmentSize};

    use super::*;

    /// The golden segments of 15, as they are stored, with the places in the log where they begin.
    fn golden() -> Vec<(Lsn, Vec<u8>)> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/wal/15");
        let name = |entry: std::fs::DirEntry| {
            let name = entry.file_name().into_string().unwrap();
            Some((name.strip_suffix(".zst")?.parse::<SegmentName>().ok()?, entry.path()))
        };
        let mut found: Vec<_> = dir.read_dir().unwrap().filter_map(|entry| name(entry.unwrap())).collect();
        found.sort();
        let stored = found.into_iter().map(|(name, path)| {
            let wal = zstd::decode_all(std::fs::File::open(path).unwrap()).unwrap();
            let size = SegmentSize::new(wal.len() as u64).unwrap();
            let scan = scan_segment(wal.as_slice(), &ScanContext::new(name, size)).unwrap();
            (name.start(size).unwrap(), encode_segment(&wal, &scan.index, 1, 1))
        });
        stored.collect()
    }

    /// Everything that is known of what a segment does.
    fn told(decoded: &Decoded) -> Vec<(Deed, Lsn, Lsn, Xid, Vec<u8>)> {
        let deeds = decoded.deeds.iter();
        let record = |noted: &Noted| {
            let (seen, packed) = decoded.record(noted).unwrap();
            (noted.deed, seen.start, seen.end, seen.xid, packed.to_vec())
        };
        deeds.map(record).collect()
    }

    fn taken(segments: &[(Lsn, Vec<u8>)], number: usize, kept: usize, newer: &Newer) -> Decoded {
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
                let all = told(&taken(&segments, number, usize::MAX, &newer));
                images += all.iter().filter(|(deed, ..)| matches!(deed, Deed::Page { anew: true, .. })).count();
                prop_assert!(told(&taken(&segments, number, kept, &newer)) == all, "{} {}", number, kept);
                for index in &irrelevant {
                    if let (Deed::Page { tag, .. }, ..) = index.get(&all) {
                        newer.write().made_anew_mut().insert(*tag);
                    }
                }
                // To a copy matters what the newer log makes irrelevant to everything else.
                let copy = all.iter().rposition(|(deed, ..)| matches!(deed, Deed::Copy(_))).unwrap_or(0);
                let is_left = |number: usize, deed: &Deed| {
                    number < copy || !matches!(deed, Deed::Page { tag, .. } if newer.read().makes_anew(*tag))
                };
                let left = all.iter().enumerate().filter(|(number, (deed, ..))| is_left(*number, deed));
                let left: Vec<_> = left.map(|(_, told)| told.clone()).collect();
                left_out += all.len() - left.len();
                prop_assert!(told(&taken(&segments, number, kept, &newer)) == left, "{} {}", number, kept);
            }
            prop_assert!(images > 40, "{} images", images);
            prop_assert!(irrelevant.len() < 200 || left_out > 50, "{} left out", left_out);
        }
    }
}
