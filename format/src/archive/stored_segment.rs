//! One object per segment: header, independently compressed chunks, index sections, directory, footer.

use std::convert::Infallible;
use std::io;
use std::ops::Range;

use sha2::{Digest as _, Sha256};

use super::envelope::{Decompressor, Footer, HEADER_BYTES, Header, ObjectKind};
use super::index::{INFO_SECTION, SECTION_VERSION, SUMMARY_SECTIONS, SegmentIndex, SegmentInfo, decode_info};
use super::packing::{self, Chunks, Compressor, Packed};
use super::stored_wal::StoredWal;
use super::stretch::{SectionAt, Stretch, Stretches, pack_with};
use crate::engines::postgres::wal::WalBytes;
use crate::error::{Corrupt, Problem};
use crate::reader::{Reader, Writer};

/// How much WAL one chunk holds; the last may hold less. Twice as much would make ordinary WAL one to two hundredths smaller,
/// and cost `push` three of its time: memory that is new has its price.
pub(super) const CHUNK_BYTES: usize = 1 << 19;
/// The largest segment there is.
const SEGMENT_BYTES_MAX: u64 = 1 << 30;

/// Makes the stored object of a segment out of its bytes and its index. Chunks are compressed on `threads` threads.
pub fn encode_segment(wal: &[u8], index: &SegmentIndex, level: i32, threads: usize) -> Vec<u8> {
    let add = |(), compressor: Option<&mut Compressor<'_>>| pack_sections(index, compressor);
    let (read, no_index) = (read_from(wal), |_: &mut dyn WalBytes| Ok::<_, Infallible>(()));
    let packed = packing::pack(wal.len(), read, level, threads, &header(), no_index, add);
    let Ok(Packed { digest, chunks, made: sections }) = packed.expect("memory is there to be read");
    PackedSegment { wal_bytes: wal.len() as u64, digest, chunks, sections }.seal()
}

/// Reads a segment that is in memory, for [`pack_segment`].
pub fn read_from(wal: &[u8]) -> impl FnMut(usize, &mut [u8]) -> io::Result<()> {
    |from, part| {
        let there = wal.get(from..from.saturating_add(part.len()));
        part.copy_from_slice(there.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// SHA-256 over a segment's WAL, which is what its stored object says about itself.
pub fn wal_digest(wal: &[u8]) -> [u8; 32] {
    Sha256::digest(wal).into()
}

/// The same over WAL that comes in parts.
#[derive(Debug, Clone, Default)]
pub struct WalDigest(Sha256);

impl WalDigest {
    /// Nothing so far.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next part.
    pub fn update(&mut self, part: &[u8]) {
        self.0.update(part);
    }

    /// SHA-256 over all parts.
    pub fn finish(self) -> [u8; 32] {
        self.0.finalize().into()
    }
}

/// A segment's WAL and index, compressed and summed up: all that its stored object is made of.
#[derive(Debug, Clone)]
pub struct PackedSegment {
    wal_bytes: u64,
    digest: [u8; 32],
    chunks: Chunks,
    sections: Vec<PackedSection>,
}

#[derive(Debug, Clone)]
struct PackedSection {
    id: u16,
    raw_bytes: usize,
    stored: Vec<u8>,
}

/// Compresses a segment of `length` bytes on `threads` threads while `read` reads it, from the byte that it is given on;
/// `index` makes its index out of the same bytes. Every byte is read once, and few are in memory at a time. Where `read`
/// fails that is the outer error, and what `index` said counts for nothing.
pub fn pack_segment<E>(
    length: usize,
    read: impl FnMut(usize, &mut [u8]) -> io::Result<()>,
    level: i32,
    threads: usize,
    index: impl FnOnce(&mut dyn WalBytes) -> Result<SegmentIndex, E>,
) -> io::Result<Result<(PackedSegment, SegmentIndex), E>> {
    let add = |index, compressor: Option<&mut Compressor<'_>>| (pack_sections(&index, compressor), index);
    let packed = packing::pack(length, read, level, threads, &header(), index, add)?;
    Ok(packed.map(|Packed { digest, chunks, made: (sections, index) }| {
        (PackedSegment { wal_bytes: length as u64, digest, chunks, sections }, index)
    }))
}

fn header() -> [u8; HEADER_BYTES] {
    Header { kind: ObjectKind::Segment }.encode()
}

fn pack_sections(index: &SegmentIndex, mut compressor: Option<&mut Compressor<'_>>) -> Vec<PackedSection> {
    let sections = index.encode_sections().into_iter();
    let pack = |(id, raw): (u16, Vec<u8>)| {
        let stored = pack_with(compressor.as_deref_mut(), &raw);
        PackedSection { id, raw_bytes: raw.len(), stored }
    };
    sections.map(pack).collect()
}

impl PackedSegment {
    /// SHA-256 over the WAL.
    pub const fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// The stored object's bytes.
    pub fn seal(self) -> Vec<u8> {
        let mut directory = Writer::new();
        directory.u64(self.wal_bytes).u32(u32::try_from(CHUNK_BYTES).unwrap_or(u32::MAX)).bytes(&self.digest);
        directory.varint(self.chunks.each.len() as u64);
        for (stored_bytes, crc) in &self.chunks.each {
            directory.varint(*stored_bytes as u64).u32(*crc);
        }
        directory.varint(self.sections.len() as u64);
        for PackedSection { id, raw_bytes, stored } in &self.sections {
            directory.u16(*id).u16(SECTION_VERSION);
            directory.varint(stored.len() as u64).varint(*raw_bytes as u64).u32(crc32fast::hash(stored));
        }
        let mut object = self.chunks.stored;
        for section in &self.sections {
            object.extend_from_slice(&section.stored);
        }
        object.extend_from_slice(directory.as_bytes());
        Footer::append(&mut object, u32::try_from(directory.len()).unwrap_or(u32::MAX));
        object
    }
}

/// Where everything in a stored segment lies; enough to read any part by range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentDirectory {
    /// How much WAL the segment holds.
    pub wal_bytes: u64,
    /// SHA-256 over that WAL.
    pub digest: [u8; 32],
    /// Where the sections start: everything before is chunks.
    pub sections_at: u64,
    pub(super) chunks: Vec<Stretch>,
    sections: Vec<SectionAt>,
}

impl SegmentDirectory {
    /// Reads the directory out of `tail`, the last bytes of an object of `object_bytes` bytes. `Ok(Err(n))`
    /// says that `n` bytes of tail are needed.
    pub fn decode(tail: &[u8], object_bytes: u64) -> Result<Result<Self, u64>, Corrupt> {
        match Footer::directory(tail, object_bytes)? {
            Ok((bytes, at)) => Self::parse(bytes, at).map(Ok),
            Err(needed) => Ok(Err(needed)),
        }
    }

    fn parse(bytes: &[u8], base: u64) -> Result<Self, Corrupt> {
        let mut r = Reader::with_base(bytes, base);
        let at = r.position();
        let wal_bytes = r.u64("wal_bytes")?;
        if wal_bytes > SEGMENT_BYTES_MAX {
            return Err(Corrupt::too_large("wal_bytes", at, wal_bytes, SEGMENT_BYTES_MAX));
        }
        let chunk_bytes = r.parse_u32("chunk_bytes", |v| (v > 0).then_some(u64::from(v)))?;
        let digest = r.array::<32>("digest")?;
        let at = r.position();
        let count = r.count(5, "chunks")?;
        if count as u64 != wal_bytes.div_ceil(chunk_bytes) {
            return Err(Corrupt::mismatch("chunks", at, count as u64, wal_bytes.div_ceil(chunk_bytes)));
        }
        let mut stretches = Stretches::before(base);
        let mut chunks = Vec::with_capacity(count);
        let mut left = wal_bytes;
        for _ in 0..count {
            let raw = left.min(chunk_bytes);
            left = left.saturating_sub(raw);
            chunks.push(stretches.read(&mut r, Some(raw))?);
        }
        let sections_at = stretches.next_at();
        let sections = stretches.read_sections(r)?;
        Ok(Self { wal_bytes, digest, sections_at, chunks, sections })
    }

    /// Where the chunks lie that hold these bytes of the WAL.
    pub fn chunks(&self, wal: &Range<u64>) -> Range<u64> {
        let held = self.held(wal);
        let (from, to) = (held.first().map(|(_, s)| s.at), held.last().map(|(_, s)| s.end()));
        from.zip(to).map_or(0..0, |(from, to)| from..to)
    }

    /// The chunks that hold these bytes of the WAL, out of what was read of their [place](SegmentDirectory::chunks), and
    /// where in the WAL they begin.
    pub fn read_chunks(&self, wal: &Range<u64>, stored: &[u8]) -> Result<(u64, Vec<u8>), Corrupt> {
        let held = self.held(wal);
        let (begin, at) = held.first().map_or((0, 0), |(begin, s)| (*begin, s.at));
        let (mut bytes, mut decompressor) = (Vec::new(), Decompressor::default());
        for (_, stretch) in held {
            let here = Stretch { at: stretch.at.saturating_sub(at), ..stretch };
            here.read_onto(&mut bytes, stored, "chunk", &mut decompressor).map_err(|e| e.offset_by(at))?;
        }
        Ok((begin, bytes))
    }

    /// The chunks that hold these bytes of the WAL, each with its place there.
    fn held(&self, wal: &Range<u64>) -> Vec<(u64, Stretch)> {
        let places = self.chunks.iter().scan(0u64, |next, stretch| {
            let begin = *next;
            *next = begin.saturating_add(stretch.raw_bytes);
            Some((begin, *next, *stretch))
        });
        let held = places.filter(|(begin, end, _)| *begin < wal.end && wal.start < *end);
        held.map(|(begin, _, stretch)| (begin, stretch)).collect()
    }

    /// How many bytes at the object's end hold sections, directory and footer.
    pub fn tail_bytes(&self, object_bytes: u64) -> u64 {
        object_bytes.saturating_sub(self.sections_at)
    }

    /// Reads the index out of `tail`, which must hold the sections ([`SegmentDirectory::tail_bytes`]).
    pub fn index(&self, tail: &[u8], object_bytes: u64) -> Result<SegmentIndex, Corrupt> {
        let mut index = SegmentIndex::new(self.info(tail, object_bytes)?);
        for (id, version, stretch) in &self.sections {
            if *id == INFO_SECTION || *version != SECTION_VERSION {
                continue;
            }
            let raw = Self::in_tail(*stretch, tail, object_bytes)?;
            index.decode_section(*id, &raw).map_err(|e| e.offset_by(stretch.at))?;
        }
        // It says what the others do not, which has to be known then.
        if self.sections.iter().any(|(_, version, _)| *version != SECTION_VERSION) {
            index.state = None;
        }
        Ok(index)
    }

    /// The directory and the whole index out of `tail`, the last bytes of an object of `object_bytes` bytes. `Ok(Err(n))`
    /// says that `n` bytes of tail are needed.
    pub fn with_index(tail: &[u8], object_bytes: u64) -> Result<Result<(Self, SegmentIndex), u64>, Corrupt> {
        let directory = match Self::decode(tail, object_bytes)? {
            Ok(directory) => directory,
            Err(needed) => return Ok(Err(needed)),
        };
        match directory.tail_bytes(object_bytes) {
            needed if needed > tail.len() as u64 => Ok(Err(needed)),
            _ => directory.index(tail, object_bytes).map(|index| Ok((directory, index))),
        }
    }

    /// Reads what a catalogue needs: the index's info, restore points, faults and source, nothing else. `Ok(Err(n))`
    /// says that `n` bytes of tail are needed.
    pub fn summary(&self, tail: &[u8], object_bytes: u64) -> Result<Result<SegmentIndex, u64>, Corrupt> {
        let wanted = |id: &u16, version: &u16| SUMMARY_SECTIONS.contains(id) && *version == SECTION_VERSION;
        let parts = || self.sections.iter().filter(|(id, version, _)| wanted(id, version));
        let from = parts().map(|(_, _, s)| s.at).min().unwrap_or(self.sections_at);
        let needed = object_bytes.saturating_sub(from);
        if needed > tail.len() as u64 {
            return Ok(Err(needed));
        }
        let mut index = SegmentIndex::new(self.info(tail, object_bytes)?);
        for (id, _, stretch) in parts().filter(|(id, _, _)| *id != INFO_SECTION) {
            let raw = Self::in_tail(*stretch, tail, object_bytes)?;
            index.decode_section(*id, &raw).map_err(|e| e.offset_by(stretch.at))?;
        }
        Ok(Ok(index))
    }

    /// Reads the info section alone.
    pub fn info(&self, tail: &[u8], object_bytes: u64) -> Result<SegmentInfo, Corrupt> {
        let info =
            self.sections.iter().find(|(id, version, _)| *id == INFO_SECTION && *version == SECTION_VERSION);
        let (_, _, stretch) = info.ok_or(Corrupt::invalid("sections", self.sections_at, 0))?;
        let raw = Self::in_tail(*stretch, tail, object_bytes)?;
        decode_info(&raw).map_err(|e| e.offset_by(stretch.at))
    }

    fn in_tail(stretch: Stretch, tail: &[u8], object_bytes: u64) -> Result<Vec<u8>, Corrupt> {
        let tail_at = object_bytes.saturating_sub(tail.len() as u64);
        let short = Corrupt {
            field: "section",
            at: stretch.at,
            problem: Problem::Truncated { needed: stretch.stored_bytes, left: 0 },
        };
        let local = Stretch { at: stretch.at.checked_sub(tail_at).ok_or(short)?, ..stretch };
        local.read(tail, "section").map_err(|e| e.offset_by(tail_at))
    }
}

/// A whole stored segment, every byte of it checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredSegment {
    /// The WAL, as PostgreSQL had it.
    pub wal: Vec<u8>,
    /// What it says.
    pub index: SegmentIndex,
    /// SHA-256 over the WAL.
    pub digest: [u8; 32],
}

impl StoredSegment {
    /// Reads a whole object: footer, every checksum, the digest, and that the index speaks of this length of WAL.
    pub fn decode(object: &[u8]) -> Result<Self, Corrupt> {
        let (directory, wal) = Self::decode_wal(object)?;
        let index = directory.index(object, object.len() as u64)?;
        let found: [u8; 32] = Sha256::digest(&wal).into();
        if found != directory.digest {
            let word = |d: &[u8; 32]| d.first_chunk::<8>().map_or(0, |c| u64::from_be_bytes(*c));
            return Err(Corrupt::mismatch("digest", 0, word(&found), word(&directory.digest)));
        }
        if directory.wal_bytes > index.info.size.bytes() {
            return Err(Corrupt::too_large("wal_bytes", 0, directory.wal_bytes, index.info.size.bytes()));
        }
        Ok(Self { wal, index, digest: directory.digest })
    }

    /// Reads the WAL of a whole object under its checksums, without its index.
    pub fn decode_wal(object: &[u8]) -> Result<(SegmentDirectory, Vec<u8>), Corrupt> {
        let mut wal = StoredWal::open(object, Vec::new())?;
        wal.reach(usize::MAX)?;
        Ok((wal.directory().clone(), wal.into_bytes()))
    }
}

/// Indexes for the tests of this crate.
#[cfg(test)]
pub(crate) mod samples {
    use super::super::index::*;
    use super::super::state::{HeadRecord, SegmentState, StateRecord};
    use crate::*;
    use proptest::prelude::*;

    pub(crate) fn info(wal_bytes: u64) -> SegmentInfo {
        let start = Lsn::from(0x300_0000);
        SegmentInfo {
            system_id: 42.into(),
            major: PgMajor::V15,
            name: "000000010000000000000003".parse().unwrap(),
            size: SegmentSize::DEFAULT,
            first_page_timeline: TimelineId::FIRST,
            last_page_timeline: TimelineId::FIRST,
            continued_bytes: 12,
            overwrites_contrecord: false,
            first_record: Some(start.saturating_add(40)),
            first_prev: Some(start.saturating_sub(100)),
            last_record: None,
            valid_end: start.saturating_add(wal_bytes),
            ending: Ending::Full,
            pending: Some(PendingRecord { start, total_bytes: 100, here_bytes: 20, joined: true }),
            head_joined: true,
            records: 9,
            first_time: Some(TimestampTz::from_postgres_micros(5)),
            last_time: None,
            min_time: None,
            max_time: None,
            last_commit_time: Some(TimestampTz::from_postgres_micros(-5)),
            commits: 3,
            image_bytes: 77,
        }
    }

    prop_compose! {
        pub(crate) fn index()(
            lsns in proptest::collection::vec(0u64..1 << 24, 0..6),
            name in ".{0,12}",
            rels in proptest::collection::btree_set((any::<u32>(), proptest::collection::btree_set(any::<u32>(), 0..5)), 0..4),
            n: u32,
            redo: u64,
        ) -> SegmentIndex {
            let at = |l: u64| Lsn::from(0x300_0000 + l);
            let relation = |rel_number| RelFileLocator { spc_oid: 1663, db_oid: 5, rel_number };
            let mut i = SegmentIndex::new(info(1 << 24));
            for &l in &lsns {
                i.xacts.push(XactEnd {
                    kind: CommitKind::CommitPrepared, xid: n.into(), start: at(l), end: at(l + 40), time: TimestampTz::from_postgres_micros(-7),
                    db_oid: Some(n), subxacts: vec![3.into(), n.into()], dropped: vec![relation(n)], gid: Some(name.clone()),
                });
                i.restore_points.push(RestorePoint { name: name.clone(), time: TimestampTz::default(), start: at(l), end: at(l) });
                i.checkpoints.push(CheckpointInfo {
                    kind: CheckpointKind::Online, start: at(l), end: at(l), redo: Lsn::from(redo), timeline: TimelineId::FIRST,
                    previous_timeline: TimelineId::FIRST, full_page_writes: true, next_full_xid: redo, oldest_active_xid: n.into(),
                    time: TimestampTz::default(),
                });
                i.timeline_ends.push(TimelineEnd { start: at(l), timeline: TimelineId::FIRST, previous_timeline: TimelineId::FIRST, time: TimestampTz::default() });
                i.running_xacts.push(RunningXacts { start: at(l), next_xid: n.into(), oldest_running_xid: n.into(), running: n });
                i.faults.push(AdmittedFault { at: at(l), message: name.clone() });
                let event = |kind| FileEvent { start: at(l), xid: n.into(), kind };
                i.file_events.extend([
                    event(FileEventKind::Create { relation: relation(n), fork: ForkNumber::Vm }),
                    event(FileEventKind::Truncate { relation: relation(1), blocks: n, flags: 7 }),
                    event(FileEventKind::DatabaseCopy { to: (1, n), from: (2, 3) }),
                    event(FileEventKind::DatabaseCreate { database: (1, n) }),
                    event(FileEventKind::DatabaseDrop { db_oid: n, tablespaces: vec![1, n] }),
                    event(FileEventKind::TablespaceCreate { spc_oid: n, path: name.clone() }),
                    event(FileEventKind::TablespaceDrop { spc_oid: n }),
                    event(FileEventKind::RelationMap { spc_oid: n, db_oid: 0 }),
                ]);
            }
            for (rel, blocks) in rels {
                let blocks = blocks.into_iter().map(|block| IndexedBlock { block, last_image: (block % 2 == 0).then(|| at(u64::from(block % 999))), records_after: block }).collect();
                i.blocks.push(ForkBlocks { relation: relation(rel), fork: ForkNumber::Main, blocks });
            }
            let records = lsns.iter().map(|&l| StateRecord {
                start: at(l), end: at(l + 40), xid: n.into(), rmid: 6, info: 0x20, origin: (l % 2 == 0).then_some(7),
                main: name.as_bytes().to_vec(),
            });
            let head = HeadRecord {
                start: Lsn::from(0x2FF_FFF0), xid: n.into(), pages: lsns.iter().map(|_| (relation(n), ForkNumber::Vm, n)).collect(),
            };
            i.state = (n % 3 > 0).then(|| SegmentState {
                newest_xid: n.into(), kinds: vec![(1, 2), (10, n as u8)], page_main_bytes: n, records: records.collect(),
                head: (n % 3 > 1).then_some(head),
            });
            i.pushed_by = (n % 2 == 0).then(|| super::super::source::sample(&name));
            i.rmgrs.push(RmgrCount { rmid: 10, records: redo, record_bytes: 1, image_bytes: 2 });
            i
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn any_part_of_a_segment_is_read_by_its_chunks(seed: u64, from in 0u64..3_000_000, length in 0u64..2_000_000) {
            let wal: Vec<u8> = (0..3_000_000u64).map(|i| (i.wrapping_mul(seed) >> 60) as u8).collect();
            let object = encode_segment(&wal, &SegmentIndex::new(samples::info(3_000_000)), 1, 1);
            let directory = SegmentDirectory::decode(&object, object.len() as u64).unwrap().unwrap();
            let part = from..(from + length).min(3_000_000);
            let place = directory.chunks(&part);
            let stored = &object[place.start as usize..place.end as usize];
            let (begin, bytes) = directory.read_chunks(&part, stored).unwrap();
            prop_assert_eq!(bytes.is_empty(), part.is_empty());
            if !part.is_empty() {
                let begin = begin as usize;
                prop_assert!(begin <= part.start as usize && begin + bytes.len() >= part.end as usize);
                prop_assert!(bytes.len() <= length as usize + 2 * CHUNK_BYTES);
                prop_assert!(bytes == wal[begin..begin + bytes.len()]);
                let mut bad = stored.to_vec();
                bad[(seed % stored.len() as u64) as usize] ^= 1;
                prop_assert!(directory.read_chunks(&part, &bad).is_err());
                prop_assert!(directory.read_chunks(&part, &stored[1..]).is_err());
            }
        }

        #[test]
        fn a_segment_comes_back_with_its_index(index in samples::index(), seed: u64, threads in 1usize..3) {
            let wal: Vec<u8> = (0..3_000_000u64).map(|i| (i.wrapping_mul(seed) >> 60) as u8).collect();
            let object = encode_segment(&wal, &index, 1, threads);
            let back = StoredSegment::decode(&object).unwrap();
            prop_assert_eq!(&back.index, &index);
            prop_assert!(back.wal == wal);
            let directory = SegmentDirectory::decode(&object, object.len() as u64).unwrap().unwrap();
            let tail = &object[object.len() - directory.tail_bytes(object.len() as u64) as usize..];
            prop_assert_eq!(&directory.index(tail, object.len() as u64).unwrap(), &index);
            // Of a section of another version nothing is known, nor what the state leaves to it.
            let mut later = directory.clone();
            let found = later.sections.iter_mut().find(|(id, ..)| *id != INFO_SECTION);
            if let Some((_, version, _)) = found {
                *version = 2;
                prop_assert_eq!(later.index(tail, object.len() as u64).unwrap().state, None);
            }
            let summary = directory.summary(tail, object.len() as u64).unwrap().unwrap();
            let faults = (&summary.faults, &summary.restore_points, &summary.pushed_by);
            prop_assert_eq!((&summary.info, faults), (&index.info, (&index.faults, &index.restore_points, &index.pushed_by)));
            let Err(needed) = directory.summary(&tail[tail.len() - 32..], object.len() as u64).unwrap() else { panic!() };
            let short = &object[object.len() - needed as usize..];
            prop_assert_eq!(directory.summary(short, object.len() as u64).unwrap().unwrap(), summary);
        }

        #[test]
        fn any_bytes_are_a_segment_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(StoredSegment::decode(&bytes).is_err());
            let _ = SegmentDirectory::decode(&bytes, bytes.len() as u64);
        }
    }

    #[test]
    fn every_flipped_byte_and_every_truncation_is_refused() {
        let wal = vec![3; 5000];
        let object = encode_segment(&wal, &SegmentIndex::new(samples::info(5000)), 1, 1);
        assert!(StoredSegment::decode(&object).is_ok());
        for i in 0..object.len() {
            let mut bad = object.clone();
            bad[i] ^= 0x40;
            assert!(StoredSegment::decode(&bad).is_err(), "byte {i}");
            assert!(StoredSegment::decode(&object[..i]).is_err(), "cut at {i}");
        }
    }

    #[test]
    fn a_section_this_reader_does_not_know_is_skipped() {
        let mut index = SegmentIndex::new(samples::info(0));
        assert_eq!(index.decode_section(999, &[1, 2, 3]), Ok(()));
    }
}
