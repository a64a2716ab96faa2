//! A record as redo of one page needs it, without what is known where it is kept and what only others need: kept by the
//! million for as long as a replay takes, and never stored, so there is neither a version nor a checksum.
//!
//! Behind the resource manager, the info and how many blocks there are come the blocks: of the page's own the data and the
//! image, of others no more than which they are. What all of them have behind them is the main data.

use crate::engines::postgres::wal::image::ImageHeader;
use crate::engines::postgres::wal::record::{
    BlockRef, FORK_MASK, HAS_DATA, HAS_IMAGE, Parsed, Record, RecordHeader, Span, read_relation,
};
use crate::engines::postgres::wal::rmgr::Rmgr;
use crate::error::Corrupt;
use crate::ids::{BlockNumber, ForkNumber, Lsn, PgMajor, RelFileLocator, Xid};
use crate::reader::{Reader, Writer};

/// Beside the number of blocks, which is 33 at the most.
const HAS_ORIGIN: u8 = 0x40;
const HAS_TOPLEVEL_XID: u8 = 0x80;
const COUNT_MASK: u8 = 0x3F;
/// Beside a block's number in the record, which is 32 at the most: it is the page's own, it is of the page's relation.
const IS_OWN: u8 = 0x40;
const IS_NEAR: u8 = 0x80;
const ID_MASK: u8 = 0x3F;

/// What is known of a packed record where it is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedFor {
    /// Where it starts.
    pub start: Lsn,
    /// Where the next may start.
    pub end: Lsn,
    /// `xl_xid`.
    pub xid: Xid,
    /// The relation of the page that it is kept for.
    pub relation: RelFileLocator,
    /// The page's block.
    pub block: BlockNumber,
}

impl<'a> Record<'a> {
    /// Puts down what redo needs of it: of its block `own`, where one is given, or of a page of that relation that it
    /// changes without naming it.
    pub fn pack(&self, own: Option<u8>, relation: RelFileLocator, w: &mut Writer) {
        let RecordHeader { info, rmgr, .. } = self.header;
        let mut shape = u8::try_from(self.blocks.len()).unwrap_or(COUNT_MASK) & COUNT_MASK;
        shape |= if self.origin().is_some() { HAS_ORIGIN } else { 0 };
        shape |= if self.toplevel_xid().is_some() { HAS_TOPLEVEL_XID } else { 0 };
        w.bytes(&[rmgr.get(), info, shape]);
        if let Some(origin) = self.origin() {
            w.u16(origin);
        }
        if let Some(xid) = self.toplevel_xid() {
            w.u32(xid.get());
        }
        let is_own = |block: &BlockRef| Some(block.id) == own;
        for block in self.blocks {
            let own = is_own(block);
            let near = block.relation == relation;
            let id = block.id | if own { IS_OWN } else { 0 } | if near { IS_NEAR } else { 0 };
            let flags = if own { block.flags } else { block.flags & !(HAS_IMAGE | HAS_DATA) };
            w.bytes(&[id, flags]);
            if !near {
                let RelFileLocator { spc_oid, db_oid, rel_number } = block.relation;
                w.u32(spc_oid).u32(db_oid).u32(rel_number);
            }
            if !own {
                w.u32(block.block);
                continue;
            }
            if flags & HAS_DATA != 0 {
                w.varint(u64::from(block.data.bytes));
            }
            if let Some((header, _)) = block.image {
                header.encode(w);
            }
        }
        for block in self.blocks.iter().filter(|block| is_own(block)) {
            if let Some((_, image)) = block.image {
                w.bytes(image.of(self.bytes));
            }
            w.bytes(block.data.of(self.bytes));
        }
        w.bytes(self.main_data());
    }

    /// The record again that [`Record::pack`] put down. Other blocks have neither data nor images, its own length, `xl_prev`
    /// and CRC are zero, and its bytes are the packed ones. `blocks` is overwritten.
    pub fn unpack(
        bytes: &'a [u8],
        of: PackedFor,
        major: PgMajor,
        blocks: &'a mut Vec<BlockRef>,
    ) -> Result<Self, Corrupt> {
        blocks.clear();
        let r = &mut Reader::new(bytes);
        let [rmid, info, shape] = r.array("packed record")?;
        let rmgr = Rmgr::new(rmid, major).ok_or(Corrupt::invalid("xl_rmid", 0, u64::from(rmid)))?;
        let origin = if shape & HAS_ORIGIN != 0 { Some(r.u16("replication origin")?) } else { None };
        let toplevel_xid =
            if shape & HAS_TOPLEVEL_XID != 0 { Some(r.u32("toplevel_xid")?.into()) } else { None };
        for _ in 0..shape & COUNT_MASK {
            BlockRef::unpack(r, of, major, blocks)?;
        }
        let mut place = |span: &mut Span| {
            span.from = u32::try_from(r.position()).unwrap_or(u32::MAX);
            r.take(span.bytes as usize, "packed data").map(drop)
        };
        for block in blocks.iter_mut() {
            if let Some((_, span)) = &mut block.image {
                place(span)?;
            }
            place(&mut block.data)?;
        }
        let mut main = Span { from: 0, bytes: u32::try_from(r.left()).unwrap_or(u32::MAX) };
        main.from = u32::try_from(r.position()).unwrap_or(u32::MAX);
        let parsed = Parsed { main, origin, toplevel_xid };
        let header = RecordHeader { total_bytes: 0, xid: of.xid, prev: Lsn::ZERO, info, rmgr, crc: 0 };
        Ok(Self::assemble(of.start, of.end, major, header, bytes, blocks, parsed))
    }
}

impl BlockRef {
    /// Puts a block behind those that were unpacked.
    fn unpack(
        r: &mut Reader<'_>,
        of: PackedFor,
        major: PgMajor,
        blocks: &mut Vec<Self>,
    ) -> Result<(), Corrupt> {
        let at = r.position();
        let [id, flags] = r.array("packed block")?;
        let invalid = || Corrupt::invalid("fork_flags", at.saturating_add(1), u64::from(flags));
        let fork = ForkNumber::new(flags & FORK_MASK).ok_or_else(invalid)?;
        let relation = if id & IS_NEAR != 0 { of.relation } else { read_relation(r)? };
        let data = Span::default();
        let block = blocks.push_mut(Self {
            id: id & ID_MASK,
            flags,
            fork,
            relation,
            block: of.block,
            image: None,
            data,
        });
        if id & IS_OWN == 0 {
            block.block = r.u32("blkno")?;
            return Ok(());
        }
        if flags & HAS_DATA != 0 {
            block.data.bytes = r.varint_u32("data_length")?;
        }
        if flags & HAS_IMAGE != 0 {
            let header = ImageHeader::decode(r, major)?;
            block.image = Some((header, Span { from: 0, bytes: u32::from(header.bytes) }));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engines::postgres::wal::Block;
    use proptest::prelude::*;

    /// Some blocks of a record: number, flags, relation, block, data, whether there is an image.
    type Blocks = Vec<(u8, u8, u32, u32, Vec<u8>, bool)>;

    fn blocks() -> impl Strategy<Value = Blocks> {
        let flags = prop_oneof![Just(0u8), Just(2), Just(0x40)];
        let data = prop_oneof![4 => 0usize..40, 1 => 100usize..3000];
        let data = (any::<u8>(), data).prop_map(|(byte, length)| vec![byte; length]);
        let block = (flags, 0u32..3, any::<u32>(), data, prop::bool::weighted(0.3));
        proptest::collection::btree_map(0u8..33, block, 0..5).prop_map(|blocks| {
            let block =
                |(id, (flags, relation, block, data, image))| (id, flags, relation, block, data, image);
            blocks.into_iter().map(block).collect()
        })
    }

    fn record(kind: (u8, u8), from: (Option<u16>, Option<u32>), main: &[u8], blocks: &Blocks) -> Vec<u8> {
        let mut w = Writer::new();
        w.u32(0).u32(77).u64(0x900).bytes(&[kind.1, kind.0, 0, 0]).u32(0);
        for (id, flags, relation, block, data, image) in blocks {
            let has_data = if data.is_empty() { 0 } else { HAS_DATA };
            w.bytes(&[*id, flags | has_data | if *image { HAS_IMAGE } else { 0 }]).u16(data.len() as u16);
            if *image {
                // Four bytes in front of a hole.
                w.u16(4).u16(4).u8(3);
            }
            w.u32(1663).u32(5).u32(*relation).u32(*block);
        }
        if let Some(origin) = from.0 {
            w.u8(253).u16(origin);
        }
        if let Some(xid) = from.1 {
            w.u8(252).u32(xid);
        }
        w.u8(254).u32(main.len() as u32);
        for (.., data, image) in blocks {
            w.bytes(if *image { b"page" } else { b"" }).bytes(data);
        }
        let mut bytes = w.bytes(main).as_bytes().to_vec();
        let total = (bytes.len() as u32).to_le_bytes();
        bytes[..4].copy_from_slice(&total);
        let crc = crate::engines::postgres::wal::record::crc_of(&bytes).to_le_bytes();
        bytes[20..24].copy_from_slice(&crc);
        bytes
    }

    proptest! {
        #[test]
        fn what_is_unpacked_is_what_was_packed(
            kind in (0u8..22, any::<u8>()),
            from in (proptest::option::of(any::<u16>()), proptest::option::of(any::<u32>())),
            main in proptest::collection::vec(any::<u8>(), 0..300),
            blocks in blocks(),
            (start, end) in any::<(u64, u64)>(),
        ) {
            let bytes = record(kind, from, &main, &blocks);
            let (mut refs, mut unpacked_refs) = (Vec::new(), Vec::new());
            let record = Record::decode(&bytes, start.into(), end.into(), PgMajor::V15, &mut refs).unwrap();
            for own in record.blocks().map(Some).chain([None]) {
                let relation = own.map_or(RelFileLocator { spc_oid: 1663, db_oid: 5, rel_number: 1 }, |b| b.relation);
                let (mut w, id) = (Writer::new(), own.map(|b| b.id));
                record.pack(id, relation, &mut w);
                let block = own.map_or(7, |b| b.block);
                let of = PackedFor { start: record.start, end: record.end, xid: record.header.xid, relation, block };
                let found = Record::unpack(w.as_bytes(), of, PgMajor::V15, &mut unpacked_refs).unwrap();
                prop_assert_eq!((found.start, found.end, found.major), (record.start, record.end, record.major));
                prop_assert_eq!((found.rmgr(), found.header.info, found.header.xid), (record.rmgr(), record.header.info, record.header.xid));
                prop_assert_eq!((found.origin(), found.toplevel_xid()), (record.origin(), record.toplevel_xid()));
                prop_assert_eq!(found.main_data(), record.main_data());
                let expected = record.blocks().map(|b| if Some(b.id) == id { b } else { Block { image: None, data: &[], ..b } });
                prop_assert!(found.blocks().eq(expected), "{:?}", found);
            }
        }

        #[test]
        fn any_bytes_are_a_record_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let relation = RelFileLocator { spc_oid: 1663, db_oid: 5, rel_number: 1 };
            let of = PackedFor { start: Lsn::ZERO, end: Lsn::MAX, xid: 3.into(), relation, block: 0 };
            let mut refs = Vec::new();
            if let Ok(record) = Record::unpack(&bytes, of, PgMajor::V15, &mut refs) {
                let data: usize = record.blocks().map(|b| b.data.len()).sum();
                prop_assert!(record.main_data().len() + data < bytes.len());
            }
        }
    }
}
