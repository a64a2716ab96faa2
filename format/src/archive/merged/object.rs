//! A merged index as an object: sections, each compressed and checked on its own, and a directory of them, so that a
//! question reads the sections it needs.

use std::ops::Range;

use super::merge::{MergedIndex, MergedSegment, RelationSegments, TouchedFork};
use super::names::{NAMES_BYTES_MAX, NamesLog};
use crate::archive::chain::{ChainHash, ChainHead, ChainStart};
use crate::archive::envelope::{Footer, Header, ObjectKind};
use crate::archive::index::{
    SECTION_VERSION, SegmentIndex, SegmentInfo, XactEnd, decode_info, decode_xact, encode_info, encode_xact,
    get_bool, get_fork, get_info, get_option, get_relation, items, list, put_option, put_relation, section,
};
use crate::archive::source::PushSource;
use crate::archive::stretch::{SectionAt, Stretch, Stretches, pack_with};
use crate::error::Corrupt;
use crate::ids::Lsn;
use crate::reader::{Reader, Writer};
use crate::segment::SegmentName;

/// The level that merged indexes are compressed at: they are made once, when there is time, and read often.
const LEVEL: i32 = 3;
/// More segments than any step covers.
const SEGMENTS_MAX: u32 = 1 << 16;

/// A section of a merged index. Those that a segment's index has too have its numbers and its form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum MergedSection {
    /// Ends of transactions; in the first step only.
    Xacts,
    /// Restore points.
    RestorePoints,
    /// Checkpoints.
    Checkpoints,
    /// Where timelines begin.
    TimelineEnds,
    /// Running transactions; in the first step only.
    RunningXacts,
    /// Files made, cut, dropped and copied.
    FileEvents,
    /// Blocks with their images; in the first step only.
    Blocks,
    /// Counts by resource manager.
    Rmgrs,
    /// The segments, each with what its own index says first.
    Segments,
    /// Ends of transactions with which relations go.
    Drops,
    /// Which segments touch a relation.
    Relations,
    /// Blocks touched; in all steps but the first.
    Touched,
    /// What concerns names; not where that is too much.
    Names,
}

/// Every section that is written: its name on docs/format.md, its number, its version. What is large comes first, what a
/// catalogue needs last.
pub const MERGED_SECTIONS: [(&str, u16, u16, MergedSection); 13] = [
    ("blocks", section::BLOCKS, SECTION_VERSION, MergedSection::Blocks),
    ("xacts", section::XACTS, SECTION_VERSION, MergedSection::Xacts),
    ("touched", 67, SECTION_VERSION, MergedSection::Touched),
    ("relations", 66, SECTION_VERSION, MergedSection::Relations),
    ("running_xacts", section::RUNNING_XACTS, SECTION_VERSION, MergedSection::RunningXacts),
    ("file_events", section::FILE_EVENTS, SECTION_VERSION, MergedSection::FileEvents),
    ("checkpoints", section::CHECKPOINTS, SECTION_VERSION, MergedSection::Checkpoints),
    ("timeline_ends", section::TIMELINE_ENDS, SECTION_VERSION, MergedSection::TimelineEnds),
    ("rmgrs", section::RMGRS, SECTION_VERSION, MergedSection::Rmgrs),
    ("names", 68, SECTION_VERSION, MergedSection::Names),
    ("drops", 65, SECTION_VERSION, MergedSection::Drops),
    ("restore_points", section::RESTORE_POINTS, SECTION_VERSION, MergedSection::RestorePoints),
    ("segments", 64, SECTION_VERSION, MergedSection::Segments),
];

impl MergedSection {
    fn number(self) -> u16 {
        MERGED_SECTIONS.iter().find(|(.., s)| *s == self).map_or(0, |(_, number, ..)| *number)
    }
}

/// A whole merged index as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MergedObject {
    /// What wrote it.
    pub builder: u16,
    /// The hash chain before the first segment.
    pub chain: ChainStart,
    /// What it says.
    pub index: MergedIndex,
}

/// Where everything in a merged index lies, and what it covers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MergedDirectory {
    /// What wrote it.
    pub builder: u16,
    /// How many segments it covers.
    pub segments: u32,
    /// Whether what is bulky was left out.
    pub is_reduced: bool,
    /// The hash chain before the first segment.
    pub chain: ChainStart,
    /// The hash behind the last.
    pub after: ChainHash,
    /// What the first segment's own index says first.
    pub first: SegmentInfo,
    sections: Vec<SectionAt>,
}

impl MergedObject {
    /// The object's bytes. The index has at least one segment, as every [`MergedIndex`] does.
    pub fn encode(&self) -> Vec<u8> {
        let index = &self.index;
        let mut object = Header { kind: ObjectKind::MergedIndex }.encode().to_vec();
        let mut first = Writer::new();
        encode_info(&mut first, &index.all.info);
        let after = index.links().fold(self.chain.before, |hash, link| hash.link(&link));
        let mut directory = Writer::new();
        directory.u16(self.builder).u32(u32::try_from(index.segments.len()).unwrap_or(u32::MAX));
        directory.u8(u8::from(index.is_reduced)).text(&self.chain.origin.to_string());
        directory.bytes(self.chain.before.bytes()).bytes(after.bytes());
        directory.varint(first.len() as u64).bytes(first.as_bytes());
        let sections = MERGED_SECTIONS.iter().map(|(_, number, version, section)| {
            let mut w = Writer::new();
            encode_section(index, *section, &mut w);
            (*number, *version, w.into_bytes())
        });
        let names = MergedSection::Names.number();
        let stored = |(number, _, raw): &(u16, u16, Vec<u8>)| {
            !raw.is_empty() && (*number != names || raw.len() as u64 <= NAMES_BYTES_MAX)
        };
        let sections: Vec<_> = sections.filter(stored).collect();
        directory.varint(sections.len() as u64);
        let mut compressor = zstd::bulk::Compressor::new(LEVEL).ok();
        for (number, version, raw) in &sections {
            let stored = pack_with(compressor.as_mut(), raw);
            directory.u16(*number).u16(*version);
            directory.varint(stored.len() as u64).varint(raw.len() as u64).u32(crc32fast::hash(&stored));
            object.extend_from_slice(&stored);
        }
        object.extend_from_slice(directory.as_bytes());
        Footer::append(&mut object, u32::try_from(directory.len()).unwrap_or(u32::MAX));
        object
    }

    /// Reads a whole object: every checksum, that its segments follow one another, and that its chain is theirs.
    pub fn decode(object: &[u8]) -> Result<Self, Corrupt> {
        Footer::check(object, ObjectKind::MergedIndex)?;
        let object_bytes = object.len() as u64;
        let directory = MergedDirectory::decode(object, object_bytes)?;
        let directory =
            directory.map_err(|needed| Corrupt::too_large("directory", 0, needed, object_bytes))?;
        let part = |section| directory.stretch(section).map(|s| s.read(object, "section")).transpose();
        let mut index = MergedIndex {
            segments: directory.segments(&part(MergedSection::Segments)?.unwrap_or_default())?,
            all: SegmentIndex::new(directory.first.clone()),
            drops: Vec::new(),
            relations: Vec::new(),
            touched: Vec::new(),
            names: None,
            is_reduced: directory.is_reduced,
        };
        for (_, number, _, section) in &MERGED_SECTIONS {
            let Some(raw) = part(*section)? else { continue };
            let at = directory.stretch(*section).map_or(0, |s| s.at);
            let decoded = match section {
                MergedSection::Segments => Ok(()),
                MergedSection::Drops => directory.drops(&raw).map(|drops| index.drops = drops),
                MergedSection::Relations => directory.relations(&raw).map(|r| index.relations = r),
                MergedSection::Touched => directory.touched(&raw).map(|t| index.touched = t),
                MergedSection::Names => directory.names(&raw).map(|names| index.names = Some(names)),
                _ => index.all.decode_section(*number, &raw),
            };
            decoded.map_err(|e| e.offset_by(at))?;
        }
        let after = index.links().fold(directory.chain.before, |hash, link| hash.link(&link));
        if after != directory.after {
            let word = |h: ChainHash| h.bytes().first_chunk::<8>().map_or(0, |c| u64::from_be_bytes(*c));
            return Err(Corrupt::mismatch("chain", 0, word(after), word(directory.after)));
        }
        Ok(Self { builder: directory.builder, chain: directory.chain, index })
    }

    /// The chain's head behind the last segment.
    pub fn head(&self) -> Option<ChainHead> {
        let links: Vec<_> = self.index.links().collect();
        self.chain.head(&links)
    }
}

impl MergedDirectory {
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
        let builder = r.u16("builder")?;
        let segments = r.parse_u32("segments", |n| (1..=SEGMENTS_MAX).contains(&n).then_some(n))?;
        let is_reduced = get_bool(&mut r, "is_reduced")?;
        let at = r.position();
        let origin = r.text("origin")?;
        let origin =
            origin.parse::<SegmentName>().map_err(|_| Corrupt::invalid("origin", at, origin.len() as u64))?;
        let before = ChainHash::from(r.array::<32>("before")?);
        let after = ChainHash::from(r.array::<32>("after")?);
        let length = r.count(1, "first")?;
        let at = r.position();
        let first = decode_info(r.take(length, "first")?).map_err(|e| e.offset_by(at))?;
        let sections = Stretches::before(base).read_sections(r)?;
        let chain = ChainStart { origin, before };
        Ok(Self { builder, segments, is_reduced, chain, after, first, sections })
    }

    fn stretch(&self, section: MergedSection) -> Option<Stretch> {
        let number = section.number();
        let known = |(n, version, _): &&SectionAt| *n == number && *version == SECTION_VERSION;
        let found = self.sections.iter().find(known).map(|(.., stretch)| *stretch);
        // What nobody stores is not read: the segments tell it.
        found.filter(|s| section != MergedSection::Names || s.raw_bytes <= NAMES_BYTES_MAX)
    }

    /// Where a section lies; none where it would be empty, or is of a version that this reader does not know.
    pub fn range(&self, section: MergedSection) -> Option<Range<u64>> {
        self.stretch(section).map(|s| s.at..s.end())
    }

    /// A section's stored bytes out of `tail`, the last bytes of the object, of `object_bytes` bytes; or how many of the
    /// last bytes are needed.
    pub fn in_tail<'a>(
        &self,
        section: MergedSection,
        tail: &'a [u8],
        object_bytes: u64,
    ) -> Result<&'a [u8], u64> {
        let Some(range) = self.range(section) else { return Ok(&[]) };
        let tail_at = object_bytes.saturating_sub(tail.len() as u64);
        let local = |at: u64| at.checked_sub(tail_at).and_then(|at| usize::try_from(at).ok());
        let found = local(range.start).zip(local(range.end)).and_then(|(from, to)| tail.get(from..to));
        found.ok_or(object_bytes.saturating_sub(range.start))
    }

    /// A section's bytes out of what was read of its range, checked and decompressed.
    fn open(&self, section: MergedSection, stored: &[u8]) -> Result<Vec<u8>, Corrupt> {
        let Some(stretch) = self.stretch(section) else { return Ok(Vec::new()) };
        Stretch { at: 0, ..stretch }.read(stored, "section").map_err(|e| e.offset_by(stretch.at))
    }

    /// The segments, out of what was read of [`MergedSection::Segments`].
    pub fn read_segments(&self, stored: &[u8]) -> Result<Vec<MergedSegment>, Corrupt> {
        self.segments(&self.open(MergedSection::Segments, stored)?)
    }

    /// The drops, out of what was read of [`MergedSection::Drops`].
    pub fn read_drops(&self, stored: &[u8]) -> Result<Vec<XactEnd>, Corrupt> {
        self.drops(&self.open(MergedSection::Drops, stored)?)
    }

    /// Which segments touch a relation, out of what was read of [`MergedSection::Relations`].
    pub fn read_relations(&self, stored: &[u8]) -> Result<Vec<RelationSegments>, Corrupt> {
        self.relations(&self.open(MergedSection::Relations, stored)?)
    }

    /// Blocks touched, out of what was read of [`MergedSection::Touched`].
    pub fn read_touched(&self, stored: &[u8]) -> Result<Vec<TouchedFork>, Corrupt> {
        self.touched(&self.open(MergedSection::Touched, stored)?)
    }

    /// What concerns names, out of what was read of [`MergedSection::Names`]; none where the object does not tell it.
    pub fn read_names(&self, stored: &[u8]) -> Result<Option<NamesLog>, Corrupt> {
        match self.stretch(MergedSection::Names) {
            Some(_) => self.names(&self.open(MergedSection::Names, stored)?).map(Some),
            None => Ok(None),
        }
    }

    /// The lists of a segment's index, out of what was read of their sections' ranges; the rest stays empty.
    pub fn read_lists(&self, parts: &[(MergedSection, &[u8])]) -> Result<SegmentIndex, Corrupt> {
        let mut index = SegmentIndex::new(self.first.clone());
        for (section, stored) in parts {
            if let Some(stretch) = self.stretch(*section) {
                let raw = self.open(*section, stored)?;
                index.decode_section(section.number(), &raw).map_err(|e| e.offset_by(stretch.at))?;
            }
        }
        Ok(index)
    }

    fn segments(&self, raw: &[u8]) -> Result<Vec<MergedSegment>, Corrupt> {
        let mut r = Reader::new(raw);
        let segments = items(&mut r, 100, |r| {
            Ok(MergedSegment {
                digest: r.array("digest")?,
                stored_bytes: r.varint("stored_bytes")?,
                is_longer_copy: get_bool(r, "is_longer_copy")?,
                pushed_by: get_option(r, "pushed_by", PushSource::decode)?,
                xids: get_option(r, "xids", |r| Ok((r.u32("least")?, r.u32("greatest")?)))?,
                info: get_info(r)?,
            })
        })?;
        r.finish("segments")?;
        if segments.len() as u64 != u64::from(self.segments) {
            let (found, expected) = (segments.len() as u64, u64::from(self.segments));
            return Err(Corrupt::mismatch("segments", 0, found, expected));
        }
        let size = self.first.size;
        let mut expected = Some(self.first.name);
        for (at, segment) in (0u64..).zip(&segments) {
            let info = &segment.info;
            let ours = info.size == size && info.system_id == self.first.system_id;
            if expected != Some(info.name) || !ours {
                return Err(Corrupt::invalid("segments", at, info.name.start(size).map_or(0, Lsn::get)));
            }
            expected = info.name.next(size);
        }
        match segments.first() {
            Some(first) if first.info == self.first => Ok(segments),
            _ => Err(Corrupt::invalid("first", 0, 0)),
        }
    }

    fn drops(&self, raw: &[u8]) -> Result<Vec<XactEnd>, Corrupt> {
        let base = self.first.name.start(self.first.size).unwrap_or_default();
        lists(raw, 19, |r| decode_xact(r, base))
    }

    fn relations(&self, raw: &[u8]) -> Result<Vec<RelationSegments>, Corrupt> {
        let max = u64::from(self.segments);
        lists(raw, 4, |r| {
            let (relation, segments) = (get_relation(r)?, get_runs(r)?);
            let end = segments
                .last()
                .map_or(0, |(first, count)| u64::from(*first).saturating_add(u64::from(*count)));
            if end > max {
                return Err(Corrupt::too_large("segment", 0, end, max));
            }
            Ok(RelationSegments { relation, segments })
        })
    }

    fn names(&self, raw: &[u8]) -> Result<NamesLog, Corrupt> {
        let base = self.first.name.start(self.first.size).unwrap_or_default();
        let mut r = Reader::new(raw);
        let names = NamesLog::decode(&mut r, base)?;
        r.finish("section")?;
        Ok(names)
    }

    #[allow(clippy::unused_self)] // beside its siblings
    fn touched(&self, raw: &[u8]) -> Result<Vec<TouchedFork>, Corrupt> {
        lists(raw, 5, |r| {
            Ok(TouchedFork { relation: get_relation(r)?, fork: get_fork(r)?, runs: get_runs(r)? })
        })
    }
}

/// A section that is one list; nothing at all is an empty one.
fn lists<'a, T>(
    raw: &'a [u8],
    item_bytes: usize,
    get: impl FnMut(&mut Reader<'a>) -> Result<T, Corrupt>,
) -> Result<Vec<T>, Corrupt> {
    if raw.is_empty() {
        return Ok(Vec::new());
    }
    let mut r = Reader::new(raw);
    let found = items(&mut r, item_bytes, get)?;
    r.finish("section")?;
    Ok(found)
}

fn encode_section(index: &MergedIndex, section: MergedSection, w: &mut Writer) {
    let base = index.all.info.name.start(index.all.info.size).unwrap_or_default();
    match section {
        MergedSection::Segments => list(w, &index.segments, |w, s| {
            w.bytes(&s.digest).varint(s.stored_bytes).u8(u8::from(s.is_longer_copy));
            put_option(w, s.pushed_by.as_ref(), |w, source| source.encode(w));
            put_option(w, s.xids, |w, (least, greatest)| {
                w.u32(least).u32(greatest);
            });
            encode_info(w, &s.info);
        }),
        MergedSection::Drops => list(w, &index.drops, |w, x| encode_xact(w, base, x)),
        MergedSection::Relations => list(w, &index.relations, |w, r| {
            put_relation(w, r.relation);
            put_runs(w, &r.segments);
        }),
        MergedSection::Touched => list(w, &index.touched, |w, t| {
            put_relation(w, t.relation);
            w.u8(t.fork.get());
            put_runs(w, &t.runs);
        }),
        MergedSection::Names => index.names.iter().for_each(|names| names.encode(w, base)),
        _ => index.all.encode_section(section.number(), w),
    }
}

/// Each run as how many numbers were skipped since the one before, and how many it has, less one.
fn put_runs(w: &mut Writer, runs: &[(u32, u32)]) {
    w.varint(runs.len() as u64);
    let mut next = 0u64;
    for &(first, count) in runs {
        w.varint(u64::from(first).saturating_sub(next)).varint(u64::from(count.saturating_sub(1)));
        next = u64::from(first).saturating_add(u64::from(count));
    }
}

fn get_runs(r: &mut Reader<'_>) -> Result<Vec<(u32, u32)>, Corrupt> {
    let mut next = 0u64;
    items(r, 2, |r| {
        let at = r.position();
        let first = next.saturating_add(u64::from(r.varint_u32("skipped")?));
        let count = u64::from(r.varint_u32("count")?).saturating_add(1);
        next = first.saturating_add(count);
        let fits = u32::try_from(first).ok().zip(u32::try_from(count).ok());
        fits.filter(|_| next <= 1 << 32).ok_or(Corrupt::too_large("run", at, next, 1 << 32))
    })
}
