//! Writes WAL for tests: segments with whatever records a test wants.

use crate::engines::postgres::wal::image::Compression;
use crate::engines::postgres::wal::record::crc_of;
use crate::engines::postgres::wal::{PAGE_BYTES, Record, pglz};
use crate::ids::{BLOCK_BYTES, BlockNumber, ForkNumber, Lsn, PgMajor, RelFileLocator, SystemId, TimelineId};
use crate::reader::Writer;
use crate::segment::{SegmentName, SegmentSize};

/// The cluster that tests write.
pub(crate) const SYSTEM_ID: u64 = 7_300_000_000_000_000_001;
/// The relation of a block that names no other.
pub(crate) const RELATION: RelFileLocator = RelFileLocator { spc_oid: 1663, db_oid: 5, rel_number: 16384 };

/// The smallest segments, so that edges are near.
pub(crate) fn small_segments() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

/// The cluster that tests write.
pub(crate) fn system_id() -> SystemId {
    SystemId::from(SYSTEM_ID)
}

/// A block reference to write.
#[derive(Debug, Clone)]
pub(crate) struct TestBlock {
    pub(crate) id: u8,
    pub(crate) relation: RelFileLocator,
    pub(crate) fork: ForkNumber,
    pub(crate) block: BlockNumber,
    pub(crate) will_init: bool,
    pub(crate) data: Vec<u8>,
    pub(crate) image: Option<TestImage>,
}

/// An image to write.
#[derive(Debug, Clone)]
pub(crate) struct TestImage {
    pub(crate) page: Box<[u8; BLOCK_BYTES]>,
    pub(crate) hole: (u16, u16),
    pub(crate) compression: Compression,
    pub(crate) apply: bool,
}

impl TestBlock {
    pub(crate) fn data(id: u8, fork: ForkNumber, block: BlockNumber, data: &[u8]) -> Self {
        Self { id, relation: RELATION, fork, block, will_init: false, data: data.to_vec(), image: None }
    }

    pub(crate) fn image(id: u8, block: BlockNumber, image: TestImage) -> Self {
        Self { image: Some(image), ..Self::data(id, ForkNumber::Main, block, b"") }
    }
}

impl TestImage {
    /// A page with a hole from `hole.0`, `hole.1` bytes long, and noise around it.
    pub(crate) fn new(seed: u8, hole: (u16, u16), compression: Compression) -> Self {
        let mut page = Box::new([0; BLOCK_BYTES]);
        for (i, b) in page.iter_mut().enumerate() {
            let in_hole = (usize::from(hole.0)..usize::from(hole.0) + usize::from(hole.1)).contains(&i);
            *b = if in_hole { 0 } else { (i / 5) as u8 ^ seed };
        }
        Self { page, hole, compression, apply: true }
    }

    /// This page, as it is.
    pub(crate) fn of(page: &[u8; BLOCK_BYTES]) -> Self {
        Self { page: Box::new(*page), hole: (0, 0), compression: Compression::None, apply: true }
    }

    fn encode(&self, major: PgMajor) -> (Vec<u8>, Vec<u8>) {
        let (offset, len) = (usize::from(self.hole.0), usize::from(self.hole.1));
        let raw = [&self.page[..offset], &self.page[offset + len..]].concat();
        let stored = match self.compression {
            Compression::None => raw,
            Compression::Pglz => pglz::compress(&raw),
            Compression::Lz4 => lz4_flex::block::compress(&raw),
            Compression::Zstd => zstd::bulk::compress(&raw, 1).unwrap(),
        };
        let has_hole = u8::from(len > 0);
        let info = if major < PgMajor::V15 {
            let compressed = u8::from(self.compression != Compression::None);
            has_hole | compressed << 1 | u8::from(self.apply) << 2
        } else {
            let method = match self.compression {
                Compression::None => 0,
                Compression::Pglz => 4,
                Compression::Lz4 => 8,
                Compression::Zstd => 16,
            };
            has_hole | u8::from(self.apply) << 1 | method
        };
        let mut header = Writer::new();
        header.u16(stored.len() as u16).u16(self.hole.0).u8(info);
        if len > 0 && self.compression != Compression::None {
            header.u16(self.hole.1);
        }
        (header.into_bytes(), stored)
    }
}

/// A record's bytes, its CRC right.
pub(crate) fn record_bytes(
    major: PgMajor,
    rmid: u8,
    info: u8,
    xid: u32,
    prev: Lsn,
    blocks: &[TestBlock],
    main: &[u8],
) -> Vec<u8> {
    let (mut headers, mut data) = (Writer::new(), Writer::new());
    let mut last = None;
    for block in blocks {
        let same = last == Some(block.relation);
        last = Some(block.relation);
        let flags = block.fork.get()
            | if block.image.is_some() { 0x10 } else { 0 }
            | if block.data.is_empty() { 0 } else { 0x20 }
            | if block.will_init { 0x40 } else { 0 }
            | if same { 0x80 } else { 0 };
        headers.u8(block.id).u8(flags).u16(block.data.len() as u16);
        if let Some(image) = &block.image {
            let (header, stored) = image.encode(major);
            headers.bytes(&header);
            data.bytes(&stored);
        }
        if !same {
            let r = block.relation;
            headers.u32(r.spc_oid).u32(r.db_oid).u32(r.rel_number);
        }
        headers.u32(block.block);
        data.bytes(&block.data);
    }
    match main.len() {
        0 => {}
        1..256 => {
            headers.u8(255).u8(main.len() as u8);
        }
        len => {
            headers.u8(254).u32(len as u32);
        }
    }
    data.bytes(main);
    let total = 24 + headers.len() + data.len();
    let mut w = Writer::new();
    w.u32(total as u32).u32(xid).u64(prev.get()).u8(info).u8(rmid).u16(0).u32(0);
    w.bytes(headers.as_bytes()).bytes(data.as_bytes());
    let mut bytes = w.into_bytes();
    let crc = crc_of(&bytes);
    bytes[20..24].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Makes a record without blocks and hands it over.
pub(crate) fn with_record<T>(
    major: PgMajor,
    rmid: u8,
    info: u8,
    main: &[u8],
    take: impl FnOnce(&Record<'_>) -> T,
) -> T {
    let bytes = record_bytes(major, rmid, info, 740, Lsn::from(0x100_0028), &[], main);
    let start = Lsn::from(0x100_0060);
    let end = start.saturating_add(bytes.len() as u64);
    take(&Record::decode(&bytes, start, end, major, &mut Vec::new()).unwrap())
}

/// Writes a log from the start of segment 16 on (of 1 MiB).
#[derive(Debug, Clone)]
pub(crate) struct WalBuilder {
    major: PgMajor,
    size: SegmentSize,
    start: Lsn,
    timeline: TimelineId,
    log: Vec<u8>,
    prev: Lsn,
    /// Start of each record, in order.
    pub(crate) records: Vec<Lsn>,
}

impl WalBuilder {
    pub(crate) fn new(major: PgMajor, size: SegmentSize) -> Self {
        let start = Lsn::from(0x100_0000);
        let timeline = TimelineId::FIRST;
        let mut builder = Self {
            major,
            size,
            start,
            timeline,
            log: Vec::new(),
            prev: Lsn::from(0xFF_0000),
            records: Vec::new(),
        };
        builder.page_header(0, false);
        builder
    }

    pub(crate) fn at(&self) -> Lsn {
        self.start.saturating_add(self.log.len() as u64)
    }

    /// Pages from here on carry this timeline.
    pub(crate) fn switch_timeline(&mut self, timeline: TimelineId) {
        self.timeline = timeline;
    }

    fn page_header(&mut self, continued: u32, overwrites: bool) {
        let address = self.at();
        let long = self.size.floor(address) == address;
        let info = u16::from(continued > 0) | u16::from(long) << 1 | u16::from(overwrites) << 3;
        let mut w = Writer::new();
        w.u16(self.major.page_magic())
            .u16(info)
            .u32(self.timeline.get())
            .u64(address.get())
            .u32(continued)
            .u32(0);
        if long {
            w.u64(SYSTEM_ID).u32(self.size.bytes() as u32).u32(PAGE_BYTES as u32);
        }
        self.log.extend_from_slice(w.as_bytes());
    }

    fn page_left(&self) -> usize {
        PAGE_BYTES - self.log.len() % PAGE_BYTES
    }

    fn start_record(&mut self, overwrites: bool) -> Lsn {
        if self.log.len().is_multiple_of(PAGE_BYTES) {
            self.page_header(0, overwrites);
        }
        self.at()
    }

    fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.log.len().is_multiple_of(PAGE_BYTES) {
                self.page_header(bytes.len() as u32, false);
            }
            let (now, rest) = bytes.split_at(bytes.len().min(self.page_left()));
            self.log.extend_from_slice(now);
            bytes = rest;
        }
        self.log.resize(self.log.len().next_multiple_of(8), 0);
    }

    fn put(
        &mut self,
        rmid: u8,
        info: u8,
        xid: u32,
        blocks: &[TestBlock],
        main: &[u8],
        overwrites: bool,
    ) -> Lsn {
        let start = self.start_record(overwrites);
        let bytes = record_bytes(self.major, rmid, info, xid, self.prev, blocks, main);
        self.write(&bytes);
        self.prev = start;
        self.records.push(start);
        start
    }

    /// Writes a record and answers its start.
    pub(crate) fn push(&mut self, rmid: u8, info: u8, xid: u32, blocks: &[TestBlock], main: &[u8]) -> Lsn {
        self.put(rmid, info, xid, blocks, main, false)
    }

    /// A logical message of `bytes` bytes, which stands for any record.
    pub(crate) fn message(&mut self, bytes: usize) -> Lsn {
        let main: Vec<u8> = (0..bytes).map(|i| (i % 251) as u8).collect();
        self.push(21, 0, 7, &[], &main)
    }

    /// Fills up with messages until `left` bytes are left of the segment, a multiple of 8.
    pub(crate) fn fill_segment(&mut self, left: usize) {
        let segment = self.size.bytes() as usize;
        loop {
            let room = segment - self.log.len() % segment - left;
            match room {
                0 => return,
                room if room == segment => return,
                // Header, data header and data fill what is left of the last page.
                1..=200 => self.message(room - 26),
                _ => self.message((room - 200).clamp(40, 2900)),
            };
        }
    }

    /// Writes the first part of a record that a crash cut off at the page's end, and the record that says so.
    pub(crate) fn abort_record(&mut self, bytes: usize) -> Lsn {
        let start = self.start_record(false);
        let record = record_bytes(self.major, 21, 0, 7, self.prev, &[], &vec![3; bytes]);
        assert!(record.len() > self.page_left(), "an aborted record reaches over the page's end");
        let part = self.page_left();
        self.log.extend_from_slice(&record[..part]);
        let mut main = start.get().to_le_bytes().to_vec();
        main.extend_from_slice(&[0; 8]);
        self.put(0, 0xD0, 0, &[], &main, true);
        start
    }

    /// `XLOG_SWITCH`, then blank pages to the segment's end.
    pub(crate) fn switch(&mut self) -> Lsn {
        let start = self.push(0, 0x40, 0, &[], &[]);
        while !(self.log.len() as u64).is_multiple_of(self.size.bytes()) {
            if self.log.len().is_multiple_of(PAGE_BYTES) {
                self.page_header(0, false);
            }
            self.log.resize(self.log.len().next_multiple_of(PAGE_BYTES), 0);
        }
        start
    }

    /// The segments; the last one is filled up with zeros.
    pub(crate) fn finish_segments(&self) -> Vec<(SegmentName, Vec<u8>)> {
        let segment = self.size.bytes() as usize;
        let cut = self.log.chunks(segment).enumerate().map(|(i, bytes)| {
            let at = self.start.saturating_add((i * segment) as u64);
            let mut bytes = bytes.to_vec();
            bytes.resize(segment, 0);
            (SegmentName::containing(self.timeline, at, self.size), bytes)
        });
        cut.collect()
    }
}
