//! One record: its header, its block references, its data. Layout: docs/wal.md, "Record".

use crate::engines::postgres::wal::image::{Image, ImageHeader};
use crate::engines::postgres::wal::rmgr::Rmgr;
use crate::error::Corrupt;
use crate::ids::{BlockNumber, ForkNumber, Lsn, PgMajor, RelFileLocator, Xid};
use crate::reader::Reader;

/// `SizeOfXLogRecord`.
pub const RECORD_HEADER_BYTES: usize = 24;
/// `XLogRecordMaxSize`: nothing longer is ever written, so nothing longer is given memory.
pub const RECORD_BYTES_MAX: u32 = 1020 << 20;
/// Where `xl_crc` lies; it covers the data behind the header, then the header up to itself.
const CRC_OFFSET: usize = 20;
/// What says which blocks and data a record has is not longer, as PostgreSQL writes it: the header, an origin, a transaction,
/// 33 blocks and the length of the main data.
pub(super) const LAYOUT_BYTES_MAX: usize = 1 << 10;

/// `XLR_MAX_BLOCK_ID`.
const BLOCK_ID_MAX: u8 = 32;
const BLOCK_ID_DATA_SHORT: u8 = 255;
const BLOCK_ID_DATA_LONG: u8 = 254;
const BLOCK_ID_ORIGIN: u8 = 253;
const BLOCK_ID_TOPLEVEL_XID: u8 = 252;

pub(super) const FORK_MASK: u8 = 0x0F;
pub(super) const HAS_IMAGE: u8 = 0x10;
pub(super) const HAS_DATA: u8 = 0x20;
const WILL_INIT: u8 = 0x40;
const SAME_REL: u8 = 0x80;

/// The fixed part of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader {
    /// `xl_tot_len`.
    pub total_bytes: u32,
    /// `xl_xid`.
    pub xid: Xid,
    /// `xl_prev`: start of the record before.
    pub prev: Lsn,
    /// `xl_info`: the upper half is the resource manager's.
    pub info: u8,
    /// `xl_rmid`.
    pub rmgr: Rmgr,
    /// `xl_crc`.
    pub crc: u32,
}

impl RecordHeader {
    /// Decodes the header that `bytes` starts with.
    pub fn decode(bytes: &[u8], major: PgMajor) -> Result<Self, Corrupt> {
        let r = &mut Reader::new(bytes);
        let total_bytes = r.u32("xl_tot_len")?;
        if (total_bytes as usize) < RECORD_HEADER_BYTES {
            return Err(Corrupt::invalid("xl_tot_len", 0, u64::from(total_bytes)));
        }
        if total_bytes > RECORD_BYTES_MAX {
            return Err(Corrupt::too_large(
                "xl_tot_len",
                0,
                u64::from(total_bytes),
                u64::from(RECORD_BYTES_MAX),
            ));
        }
        let xid = r.u32("xl_xid")?.into();
        let prev = r.u64("xl_prev")?.into();
        let info = r.u8("xl_info")?;
        let rmid_at = r.position();
        let rmid = r.u8("xl_rmid")?;
        let rmgr = Rmgr::new(rmid, major).ok_or(Corrupt::invalid("xl_rmid", rmid_at, u64::from(rmid)))?;
        r.take(2, "padding")?;
        let crc = r.u32("xl_crc")?;
        Ok(Self { total_bytes, xid, prev, info, rmgr, crc })
    }

    /// The resource manager's part of `xl_info`: which kind of record.
    pub const fn kind(&self) -> u8 {
        self.info & 0xF0
    }

    /// Compares `xl_crc` with the bytes of the whole record.
    pub fn check_crc(&self, record: &[u8]) -> Result<(), Corrupt> {
        self.compare_crc(crc_of(record))
    }

    pub(super) fn compare_crc(&self, computed: u32) -> Result<(), Corrupt> {
        if computed == self.crc {
            return Ok(());
        }
        Err(Corrupt::mismatch("xl_crc", CRC_OFFSET as u64, u64::from(self.crc), u64::from(computed)))
    }
}

/// The CRC-32C that belongs into a record.
pub(super) fn crc_of(record: &[u8]) -> u32 {
    let data = record.get(RECORD_HEADER_BYTES..).unwrap_or_default();
    crc_with_header(crc32c::crc32c(data), record)
}

/// The same out of the CRC of what is behind the header, and the header.
pub(super) fn crc_with_header(data: u32, header: &[u8]) -> u32 {
    crc32c::crc32c_append(data, header.get(..CRC_OFFSET).unwrap_or_default())
}

/// A part of a record's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Span {
    pub(super) from: u32,
    pub(super) bytes: u32,
}

impl Span {
    pub(super) fn of(self, record: &[u8]) -> &[u8] {
        let from = self.from as usize;
        record.get(from..from.saturating_add(self.bytes as usize)).unwrap_or_default()
    }
}

/// A block that a record refers to, as places in the record's bytes. Kept apart from them so that one
/// buffer serves all records of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRef {
    pub(super) id: u8,
    pub(super) flags: u8,
    pub(super) fork: ForkNumber,
    pub(super) relation: RelFileLocator,
    pub(super) block: BlockNumber,
    pub(super) image: Option<(ImageHeader, Span)>,
    pub(super) data: Span,
}

/// A block that a record refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block<'a> {
    /// Its number in the record; numbers rise but may skip.
    pub id: u8,
    /// The relation.
    pub relation: RelFileLocator,
    /// The fork.
    pub fork: ForkNumber,
    /// The block.
    pub block: BlockNumber,
    /// The full-page image, where there is one.
    pub image: Option<Image<'a>>,
    /// The block's data; empty where there is none (`BKPBLOCK_HAS_DATA`).
    pub data: &'a [u8],
    /// `BKPBLOCK_WILL_INIT`: replay makes the page anew.
    pub will_init: bool,
    /// `BKPBLOCK_SAME_REL`: the relation was not repeated in the record.
    pub same_rel: bool,
}

impl Block<'_> {
    /// Whether replay needs nothing of the page as it was: it is restored from an image or made anew.
    pub fn makes_page_anew(&self) -> bool {
        self.will_init || self.image.is_some_and(|image| image.apply())
    }
}

/// What [`Record::parse`] found besides the blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parsed {
    pub(super) main: Span,
    pub(super) origin: Option<u16>,
    pub(super) toplevel_xid: Option<Xid>,
}

/// A record, borrowed from the log.
#[derive(Debug, Clone, Copy)]
pub struct Record<'a> {
    /// Where it starts: what pg_waldump calls `lsn`.
    pub start: Lsn,
    /// Where the next may start: what the pages it changes carry as `pd_lsn`.
    pub end: Lsn,
    /// The major version whose format it has.
    pub major: PgMajor,
    /// The fixed part.
    pub header: RecordHeader,
    pub(super) bytes: &'a [u8],
    pub(super) blocks: &'a [BlockRef],
    parsed: Parsed,
}

impl<'a> Record<'a> {
    /// Decodes a record whose bytes are at hand in one piece, page headers taken out; checks the CRC and
    /// every length. Positions in errors count from the record's start. `blocks` is overwritten.
    pub fn decode(
        bytes: &'a [u8],
        start: Lsn,
        end: Lsn,
        major: PgMajor,
        blocks: &'a mut Vec<BlockRef>,
    ) -> Result<Self, Corrupt> {
        let header = RecordHeader::decode(bytes, major)?;
        if header.total_bytes as usize != bytes.len() {
            return Err(Corrupt::mismatch(
                "xl_tot_len",
                0,
                u64::from(header.total_bytes),
                bytes.len() as u64,
            ));
        }
        header.check_crc(bytes)?;
        let parsed = Self::parse(bytes, major, blocks)?;
        Ok(Self::assemble(start, end, major, header, bytes, blocks, parsed))
    }

    pub(super) const fn assemble(
        start: Lsn,
        end: Lsn,
        major: PgMajor,
        header: RecordHeader,
        bytes: &'a [u8],
        blocks: &'a [BlockRef],
        parsed: Parsed,
    ) -> Self {
        Self { start, end, major, header, bytes, blocks, parsed }
    }

    /// A record that refers to no blocks, out of what was put down of it. Its bytes are the main data.
    pub fn without_blocks(
        header: RecordHeader,
        (start, end): (Lsn, Lsn),
        major: PgMajor,
        origin: Option<u16>,
        main: &'a [u8],
    ) -> Self {
        let span = Span { from: 0, bytes: u32::try_from(main.len()).unwrap_or(u32::MAX) };
        let parsed = Parsed { main: span, origin, toplevel_xid: None };
        Self::assemble(start, end, major, header, main, &[], parsed)
    }

    /// Reads everything behind the header, which must fill the record exactly.
    pub(super) fn parse(bytes: &[u8], major: PgMajor, blocks: &mut Vec<BlockRef>) -> Result<Parsed, Corrupt> {
        let mut layout = Layout::read(bytes, bytes.len(), major, blocks)?;
        layout.place(blocks, |image| image.bytes);
        Ok(layout.parsed)
    }

    /// The whole record, page headers taken out; see also [`RecordStream::leaving_images`](super::RecordStream::leaving_images).
    pub const fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The resource manager.
    pub const fn rmgr(&self) -> Rmgr {
        self.header.rmgr
    }

    /// The resource manager's part of `xl_info`: which kind of record.
    pub const fn kind(&self) -> u8 {
        self.header.kind()
    }

    /// What belongs to no block.
    pub fn main_data(&self) -> &'a [u8] {
        self.parsed.main.of(self.bytes)
    }

    /// The replication origin, where the record has one.
    pub const fn origin(&self) -> Option<u16> {
        self.parsed.origin
    }

    /// The transaction that `xl_xid` is a part of, where the record says it.
    pub const fn toplevel_xid(&self) -> Option<Xid> {
        self.parsed.toplevel_xid
    }

    /// The blocks, by rising number.
    pub fn blocks(&self) -> impl ExactSizeIterator<Item = Block<'a>> + use<'a> {
        let bytes = self.bytes;
        self.blocks.iter().map(move |block| block.view(bytes))
    }

    /// The block of that number, where there is one.
    pub fn block(&self, id: u8) -> Option<Block<'a>> {
        self.blocks.iter().find(|block| block.id == id).map(|block| block.view(self.bytes))
    }

    /// The page that the block of that number names, where there is one.
    pub fn page(&self, id: u8) -> Option<(RelFileLocator, ForkNumber, BlockNumber)> {
        let block = self.blocks.iter().find(|block| block.id == id)?;
        Some((block.relation, block.fork, block.block))
    }

    /// Bytes of full-page images. The rest is what pg_waldump calls the record's length.
    pub fn image_bytes(&self) -> u32 {
        let bytes = self.blocks.iter().filter_map(|block| block.image.map(|(header, _)| header.bytes));
        bytes.fold(0, |sum, bytes| sum.saturating_add(bytes.into()))
    }
}

/// What a record has behind its header, before it is known where.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) parsed: Parsed,
    /// Where the data begins.
    pub(super) data_from: u32,
}

impl Layout {
    /// Reads which blocks and data a record of `total` bytes has, which must fill it exactly. `head` is the record or its
    /// first part.
    pub(super) fn read(
        head: &[u8],
        total: usize,
        major: PgMajor,
        blocks: &mut Vec<BlockRef>,
    ) -> Result<Self, Corrupt> {
        blocks.clear();
        let r = &mut Reader::new(head);
        let left = |r: &Reader<'_>| total.saturating_sub(head.len().saturating_sub(r.left()));
        r.take(RECORD_HEADER_BYTES, "record header")?;
        let mut parsed = Parsed { main: Span::default(), origin: None, toplevel_xid: None };
        let mut data_bytes = 0usize;
        while left(r) > data_bytes {
            let at = r.position();
            let id = r.u8("block_id")?;
            match id {
                BLOCK_ID_DATA_SHORT | BLOCK_ID_DATA_LONG => {
                    let len = if id == BLOCK_ID_DATA_SHORT {
                        u32::from(r.u8("main data length")?)
                    } else {
                        r.u32("main data length")?
                    };
                    parsed.main.bytes = len;
                    data_bytes = data_bytes.saturating_add(len as usize);
                    break;
                }
                BLOCK_ID_ORIGIN => parsed.origin = Some(r.u16("replication origin")?),
                BLOCK_ID_TOPLEVEL_XID if major >= PgMajor::V14 => {
                    parsed.toplevel_xid = Some(r.u32("toplevel_xid")?.into());
                }
                _ => {
                    let in_order = blocks.last().is_none_or(|last: &BlockRef| last.id < id);
                    if id > BLOCK_ID_MAX || !in_order {
                        return Err(Corrupt::invalid("block_id", at, u64::from(id)));
                    }
                    let more = BlockRef::decode(r, id, major, blocks)?;
                    data_bytes = data_bytes.saturating_add(more);
                }
            }
        }
        if left(r) != data_bytes {
            return Err(Corrupt::mismatch(
                "record data length",
                r.position(),
                data_bytes as u64,
                left(r) as u64,
            ));
        }
        Ok(Self { parsed, data_from: u32::try_from(r.position()).unwrap_or(u32::MAX) })
    }

    /// Places what the blocks have, and the main data, behind each other. `there` says how many bytes of an image there are.
    pub(super) fn place(&mut self, blocks: &mut [BlockRef], there: impl Fn(&ImageHeader) -> u16) {
        let mut from = self.data_from;
        let mut place = |span: &mut Span| {
            span.from = from;
            from = from.saturating_add(span.bytes);
        };
        for block in blocks.iter_mut() {
            if let Some((header, span)) = &mut block.image {
                span.bytes = there(header).into();
                place(span);
            }
            place(&mut block.data);
        }
        place(&mut self.parsed.main);
    }
}

impl BlockRef {
    /// Puts a block behind those that were decoded; how many bytes of data and image it has. Each is put down field by field:
    /// to move one that is whole takes as long as all the rest.
    fn decode(r: &mut Reader<'_>, id: u8, major: PgMajor, blocks: &mut Vec<Self>) -> Result<usize, Corrupt> {
        let flags_at = r.position();
        let flags = r.u8("fork_flags")?;
        let invalid_flags = || Corrupt::invalid("fork_flags", flags_at, u64::from(flags));
        let fork = ForkNumber::new(flags & FORK_MASK).ok_or_else(invalid_flags)?;
        let len_at = r.position();
        let data_bytes = r.u16("data_length")?;
        if (flags & HAS_DATA != 0) != (data_bytes > 0) {
            return Err(Corrupt::invalid("data_length", len_at, u64::from(data_bytes)));
        }
        let data = Span { from: 0, bytes: u32::from(data_bytes) };
        let image = if flags & HAS_IMAGE != 0 { Some(ImageHeader::decode(r, major)?) } else { None };
        let (spc_oid, db_oid, rel_number) = if flags & SAME_REL != 0 {
            let RelFileLocator { spc_oid, db_oid, rel_number } =
                blocks.last().ok_or_else(invalid_flags)?.relation;
            (spc_oid, db_oid, rel_number)
        } else {
            (r.u32("spcOid")?, r.u32("dbOid")?, r.u32("relNumber")?)
        };
        let relation = RelFileLocator { spc_oid, db_oid, rel_number };
        let block = r.u32("blkno")?;
        let pushed = blocks.push_mut(Self { id, flags, fork, relation, block, image: None, data });
        let mut bytes = usize::from(data_bytes);
        if let Some(header) = image {
            pushed.image = Some((header, Span { from: 0, bytes: u32::from(header.bytes) }));
            bytes = bytes.saturating_add(header.bytes.into());
        }
        Ok(bytes)
    }

    fn view<'a>(&self, record: &'a [u8]) -> Block<'a> {
        Block {
            id: self.id,
            relation: self.relation,
            fork: self.fork,
            block: self.block,
            image: self.image.map(|(header, span)| Image { bytes: span.of(record), header }),
            data: self.data.of(record),
            will_init: self.flags & WILL_INIT != 0,
            same_rel: self.flags & SAME_REL != 0,
        }
    }
}

/// Takes a `RelFileLocator` (`RelFileNode` before 16).
pub(super) fn read_relation(r: &mut Reader<'_>) -> Result<RelFileLocator, Corrupt> {
    Ok(RelFileLocator { spc_oid: r.u32("spcOid")?, db_oid: r.u32("dbOid")?, rel_number: r.u32("relNumber")? })
}
