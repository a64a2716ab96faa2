//! What one record of the log changes in the catalogues, kept small enough to be stored in an index.

use std::collections::BTreeMap;

use super::map::RelationMap;
use super::row::Catalogue;
use super::tuple::{HeapTuple, Hint, TUPLE_HEADER_BYTES, TupleId, page_tuples};
use crate::engines::postgres::wal::{Block, Record, RelationMapUpdate, Rmgr};
use crate::error::Corrupt;
use crate::ids::{BLOCK_BYTES, BlockNumber, ForkNumber, Lsn, Oid, RelFileLocator, Xid};
use crate::reader::{Reader, Writer};

const OPMASK: u8 = 0x70;
const INIT_PAGE: u8 = 0x80;
const HEAP_INSERT: u8 = 0x00;
const HEAP_DELETE: u8 = 0x10;
const HEAP_UPDATE: u8 = 0x20;
const HEAP_HOT_UPDATE: u8 = 0x40;
const HEAP_INPLACE: u8 = 0x70;
const HEAP2_MULTI_INSERT: u8 = 0x50;
const UPDATE_PREFIX_FROM_OLD: u8 = 1 << 5;
const UPDATE_SUFFIX_FROM_OLD: u8 = 1 << 6;

/// The files in which catalogues lie.
///
/// A catalogue's first file carries its OID as number, in every database and in every cluster that initdb made, and no
/// other file ever gets such a number. Files that a rewrite (VACUUM FULL, CLUSTER) puts a catalogue into must be
/// added: relation maps name those of pg_class and pg_database, pg_class those of pg_namespace and pg_inherits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CatalogueFiles {
    moved: BTreeMap<RelFileLocator, Catalogue>,
    with_inherits: bool,
}

impl CatalogueFiles {
    /// The same and those of pg_inherits.
    #[must_use]
    pub fn with_inherits(self) -> Self {
        Self { with_inherits: true, ..self }
    }

    /// Whether pg_inherits is among the catalogues.
    pub const fn has_inherits(&self) -> bool {
        self.with_inherits
    }

    /// The catalogue that lies in this file.
    pub fn catalogue(&self, file: RelFileLocator) -> Option<Catalogue> {
        let first = Catalogue::from_oid(file.rel_number).or(self.inherits(file));
        first.or_else(|| self.moved.get(&file).copied())
    }

    fn inherits(&self, file: RelFileLocator) -> Option<Catalogue> {
        (self.with_inherits && file.rel_number == Catalogue::Inherits.oid()).then_some(Catalogue::Inherits)
    }

    /// Whether merged indexes leave out what happened in this file, because they speak of other catalogues and of first
    /// files alone.
    pub fn is_left_out(&self, file: RelFileLocator) -> bool {
        self.inherits(file).is_some() || self.moved.contains_key(&file)
    }

    /// Whether there may be such a file.
    pub fn leaves_out(&self) -> bool {
        self.with_inherits || !self.moved.is_empty()
    }

    /// Adds a file that a catalogue was moved to. Whether that was news.
    pub fn add(&mut self, file: RelFileLocator, catalogue: Catalogue) -> bool {
        let known = self.catalogue(file).is_some();
        if !known {
            self.moved.insert(file, catalogue);
        }
        !known
    }

    /// The files that were added.
    pub fn moved(&self) -> impl Iterator<Item = (RelFileLocator, Catalogue)> + '_ {
        self.moved.iter().map(|(file, catalogue)| (*file, *catalogue))
    }
}

/// What one record changes in the catalogues; a record may be several, to be taken in the order they came.
///
/// They are facts about places in files, not yet rows with names: an update often says only what it changes of the row
/// that was there, so rows come out where all changes since a base backup are followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CatalogueChange {
    /// Start of the record.
    pub lsn: Lsn,
    /// `xl_xid`: the transaction, or the part of one, that wrote it; invalid for none.
    pub xid: Xid,
    /// The file. Of a relation map tablespace and database, and no number.
    pub file: RelFileLocator,
    /// What changed.
    pub kind: ChangeKind,
}

/// What changed in a file of a catalogue, or in a relation map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChangeKind {
    /// The page holds these rows and no others: it was restored from an image, or made anew.
    Page {
        /// The block.
        block: BlockNumber,
        /// Line pointer and row.
        tuples: Vec<(u16, HeapTuple)>,
    },
    /// A row was added.
    Insert {
        /// Where.
        at: TupleId,
        /// Its columns.
        body: Vec<u8>,
    },
    /// A row was replaced.
    Update {
        /// Where the old version is.
        old: TupleId,
        /// Where the new one is.
        new: TupleId,
        /// Its columns; none where the record has an image of the page, which comes before this.
        body: Option<UpdatedBody>,
    },
    /// A row was deleted.
    Delete {
        /// Where.
        at: TupleId,
    },
    /// A row was overwritten, whatever becomes of the transaction.
    Inplace {
        /// Where.
        at: TupleId,
        /// Its columns; none where the record has an image of the page, which comes before this.
        body: Option<Vec<u8>>,
    },
    /// A relation map was replaced.
    Map(RelationMap),
}

/// A new version's columns: a part of the old one's start, then its own bytes, then a part of the old one's end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpdatedBody {
    /// How many bytes are the old version's first.
    pub prefix: u16,
    /// How many bytes are the old version's last.
    pub suffix: u16,
    /// What lies between them.
    pub middle: Vec<u8>,
}

impl UpdatedBody {
    /// The columns, out of the old version's; `None` where that is too short for it.
    pub fn apply(&self, old: &[u8]) -> Option<Vec<u8>> {
        let head = old.get(..usize::from(self.prefix))?;
        let tail = old.get(old.len().checked_sub(usize::from(self.suffix))?..)?;
        Some([head, &self.middle, tail].concat())
    }
}

/// The columns of a row out of what a record holds of it: header, null bitmap and padding, columns.
fn read_body<'a>(r: &mut Reader<'a>) -> Result<&'a [u8], Corrupt> {
    r.take(4, "t_infomask2, t_infomask")?;
    let at = r.position();
    let hoff = usize::from(r.u8("t_hoff")?);
    let nulls = hoff.checked_sub(TUPLE_HEADER_BYTES).ok_or(Corrupt::invalid("t_hoff", at, hoff as u64))?;
    r.take(nulls, "t_bits")?;
    r.take(r.left(), "tuple data")
}

/// Adds to `out` what `record` changes in the catalogues that lie in `files`.
pub fn catalogue_changes(
    record: &Record<'_>,
    files: &CatalogueFiles,
    out: &mut Vec<CatalogueChange>,
) -> Result<(), Corrupt> {
    let change = |file, kind| CatalogueChange { lsn: record.start, xid: record.header.xid, file, kind };
    if let Some(map) = RelationMapUpdate::decode(record) {
        let RelationMapUpdate { db_oid, spc_oid, map } = map?;
        let file = RelFileLocator { spc_oid, db_oid, rel_number: 0 };
        out.push(change(file, ChangeKind::Map(RelationMap::decode(map, record.major)?)));
        return Ok(());
    }
    let ours =
        |block: &Block<'_>| block.fork == ForkNumber::Main && files.catalogue(block.relation).is_some();
    if !record.blocks().any(|block| ours(&block)) {
        return Ok(());
    }
    let heap = record.rmgr() == Rmgr::HEAP;
    let makes_anew = matches!(record.rmgr(), Rmgr::HEAP | Rmgr::HEAP2) && record.kind() & INIT_PAGE != 0;
    for block in record.blocks().filter(ours) {
        if let Some(image) = block.image.filter(|image| image.apply()) {
            let mut page = [0; BLOCK_BYTES];
            image.restore(&mut page)?;
            let tuples = page_tuples(&page)?;
            out.push(change(block.relation, ChangeKind::Page { block: block.block, tuples }));
        } else if makes_anew && block.id == 0 {
            out.push(change(block.relation, ChangeKind::Page { block: block.block, tuples: Vec::new() }));
        }
    }
    let Some(first) = record.block(0).filter(ours) else { return Ok(()) };
    let imaged = first.image.is_some_and(|image| image.apply());
    let at = |block: &Block<'_>, offset| TupleId { block: block.block, offset };
    let main = &mut Reader::new(record.main_data());
    let data = &mut Reader::new(first.data);
    let kind = match (heap, record.kind() & OPMASK) {
        (true, HEAP_INSERT) if !imaged => {
            ChangeKind::Insert { at: at(&first, main.u16("offnum")?), body: read_body(data)?.to_vec() }
        }
        (true, HEAP_DELETE) => {
            main.take(4, "xmax")?;
            ChangeKind::Delete { at: at(&first, main.u16("offnum")?) }
        }
        (true, HEAP_UPDATE | HEAP_HOT_UPDATE) => {
            main.take(4, "old_xmax")?;
            let old_offset = main.u16("old_offnum")?;
            main.take(1, "old_infobits_set")?;
            let flags = main.u8("flags")?;
            main.take(4, "new_xmax")?;
            let new = at(&first, main.u16("new_offnum")?);
            // Only an update that leaves the page names the old one.
            let old = record.block(1).filter(|b| b.fork == ForkNumber::Main);
            let old = at(old.as_ref().unwrap_or(&first), old_offset);
            let body = if imaged { None } else { Some(updated_body(data, flags)?) };
            ChangeKind::Update { old, new, body }
        }
        (true, HEAP_INPLACE) => {
            let at = at(&first, main.u16("offnum")?);
            ChangeKind::Inplace { at, body: (!imaged).then(|| first.data.to_vec()) }
        }
        (false, HEAP2_MULTI_INSERT) if record.rmgr() == Rmgr::HEAP2 && !imaged => {
            main.take(2, "flags")?;
            let count = main.u16("ntuples")?;
            for i in 0..count {
                let offset = if makes_anew { i.saturating_add(1) } else { main.u16("offsets")? };
                let body = multi_insert_body(data)?;
                out.push(change(first.relation, ChangeKind::Insert { at: at(&first, offset), body }));
            }
            return Ok(());
        }
        _ => return Ok(()),
    };
    out.push(change(first.relation, kind));
    Ok(())
}

fn updated_body(data: &mut Reader<'_>, flags: u8) -> Result<UpdatedBody, Corrupt> {
    let mut shared = |flag, field| if flags & flag != 0 { data.u16(field) } else { Ok(0) };
    let prefix = shared(UPDATE_PREFIX_FROM_OLD, "prefix length")?;
    let suffix = shared(UPDATE_SUFFIX_FROM_OLD, "suffix length")?;
    Ok(UpdatedBody { prefix, suffix, middle: read_body(data)?.to_vec() })
}

/// Each row of a multi-insert starts at an even byte of the block's data.
fn multi_insert_body(data: &mut Reader<'_>) -> Result<Vec<u8>, Corrupt> {
    if !data.position().is_multiple_of(2) {
        data.take(1, "padding")?;
    }
    let len = usize::from(data.u16("datalen")?);
    let at = data.position();
    let header = data.take(5, "xl_multi_insert_tuple")?;
    let row = [header, data.take(len, "tuple data")?].concat();
    Ok(read_body(&mut Reader::with_base(&row, at))?.to_vec())
}

/// The numbers of the kinds in the archive. A number is never used again for something else.
mod code {
    pub(super) const PAGE: u8 = 1;
    pub(super) const INSERT: u8 = 2;
    pub(super) const UPDATE: u8 = 3;
    pub(super) const UPDATE_IN_IMAGE: u8 = 4;
    pub(super) const DELETE: u8 = 5;
    pub(super) const INPLACE: u8 = 6;
    pub(super) const INPLACE_IN_IMAGE: u8 = 7;
    pub(super) const MAP: u8 = 8;
}

fn put_bytes(w: &mut Writer, bytes: &[u8]) {
    w.varint(bytes.len() as u64).bytes(bytes);
}

fn get_bytes(r: &mut Reader<'_>, field: &'static str) -> Result<Vec<u8>, Corrupt> {
    let len = r.count(1, field)?;
    Ok(r.take(len, field)?.to_vec())
}

fn put_at(w: &mut Writer, at: TupleId) {
    w.varint(u64::from(at.block)).varint(u64::from(at.offset));
}

fn get_u16(r: &mut Reader<'_>, field: &'static str) -> Result<u16, Corrupt> {
    let at = r.position();
    let found = r.varint(field)?;
    u16::try_from(found).map_err(|_| Corrupt::too_large(field, at, found, u64::from(u16::MAX)))
}

fn get_at(r: &mut Reader<'_>) -> Result<TupleId, Corrupt> {
    Ok(TupleId { block: r.varint_u32("block")?, offset: get_u16(r, "offset")? })
}

fn get_hint(r: &mut Reader<'_>) -> Result<Hint, Corrupt> {
    let at = r.position();
    let code = r.u8("hint")?;
    Hint::from_code(code).ok_or(Corrupt::invalid("hint", at, u64::from(code)))
}

fn put_tuple(w: &mut Writer, tuple: &HeapTuple) {
    w.u32(tuple.xmin.get()).u8(tuple.xmin_hint.code());
    // No row is ended by the invalid transaction.
    w.u32(tuple.xmax.map_or(0, Xid::get)).u8(tuple.xmax_hint.code());
    put_bytes(w, &tuple.body);
}

fn get_tuple(r: &mut Reader<'_>) -> Result<HeapTuple, Corrupt> {
    let xmin = r.u32("xmin")?.into();
    let xmin_hint = get_hint(r)?;
    let xmax = Xid::from(r.u32("xmax")?);
    let xmax_hint = get_hint(r)?;
    let xmax = (!xmax.is_invalid()).then_some(xmax);
    Ok(HeapTuple { xmin, xmin_hint, xmax, xmax_hint, body: get_bytes(r, "body")? })
}

impl CatalogueChange {
    /// Puts the change down for an index, its position counted from `base`, which is not after it.
    pub fn encode(&self, w: &mut Writer, base: Lsn) {
        w.varint(self.lsn.bytes_since(base)).u32(self.xid.get());
        for oid in [self.file.spc_oid, self.file.db_oid, self.file.rel_number] {
            w.varint(u64::from(oid));
        }
        match &self.kind {
            ChangeKind::Page { block, tuples } => {
                w.u8(code::PAGE).varint(u64::from(*block)).varint(tuples.len() as u64);
                for (offset, tuple) in tuples {
                    w.varint(u64::from(*offset));
                    put_tuple(w, tuple);
                }
            }
            ChangeKind::Insert { at, body } => {
                w.u8(code::INSERT);
                put_at(w, *at);
                put_bytes(w, body);
            }
            ChangeKind::Update { old, new, body } => {
                w.u8(if body.is_some() { code::UPDATE } else { code::UPDATE_IN_IMAGE });
                put_at(w, *old);
                put_at(w, *new);
                if let Some(body) = body {
                    w.varint(u64::from(body.prefix)).varint(u64::from(body.suffix));
                    put_bytes(w, &body.middle);
                }
            }
            ChangeKind::Delete { at } => {
                w.u8(code::DELETE);
                put_at(w, *at);
            }
            ChangeKind::Inplace { at, body } => {
                w.u8(if body.is_some() { code::INPLACE } else { code::INPLACE_IN_IMAGE });
                put_at(w, *at);
                if let Some(body) = body {
                    put_bytes(w, body);
                }
            }
            ChangeKind::Map(map) => {
                w.u8(code::MAP).varint(map.mappings().len() as u64);
                for (oid, file) in map.mappings() {
                    w.varint(u64::from(*oid)).varint(u64::from(*file));
                }
            }
        }
    }

    /// Takes a change that [`CatalogueChange::encode`] put down with the same `base`.
    pub fn decode(r: &mut Reader<'_>, base: Lsn) -> Result<Self, Corrupt> {
        let at = r.position();
        let distance = r.varint("lsn")?;
        let lsn = base.checked_add(distance).ok_or(Corrupt::invalid("lsn", at, distance))?;
        let xid = r.u32("xid")?.into();
        let mut oid = |field| r.varint_u32(field);
        let file =
            RelFileLocator { spc_oid: oid("spcOid")?, db_oid: oid("dbOid")?, rel_number: oid("relNumber")? };
        let code_at = r.position();
        let kind = match r.u8("kind")? {
            code::PAGE => {
                let block = r.varint_u32("block")?;
                let count = r.count(12, "tuples")?;
                let tuple = |_| Ok((get_u16(r, "offset")?, get_tuple(r)?));
                ChangeKind::Page { block, tuples: (0..count).map(tuple).collect::<Result<_, _>>()? }
            }
            code::INSERT => ChangeKind::Insert { at: get_at(r)?, body: get_bytes(r, "body")? },
            code::UPDATE => {
                let (old, new) = (get_at(r)?, get_at(r)?);
                let (prefix, suffix) = (get_u16(r, "prefix")?, get_u16(r, "suffix")?);
                let body = Some(UpdatedBody { prefix, suffix, middle: get_bytes(r, "body")? });
                ChangeKind::Update { old, new, body }
            }
            code::UPDATE_IN_IMAGE => ChangeKind::Update { old: get_at(r)?, new: get_at(r)?, body: None },
            code::DELETE => ChangeKind::Delete { at: get_at(r)? },
            code::INPLACE => ChangeKind::Inplace { at: get_at(r)?, body: Some(get_bytes(r, "body")?) },
            code::INPLACE_IN_IMAGE => ChangeKind::Inplace { at: get_at(r)?, body: None },
            code::MAP => {
                let count = r.count(2, "mappings")?;
                let mapping = |_| Ok((r.varint_u32("mapoid")?, r.varint_u32("mapfilenumber")?));
                ChangeKind::Map(RelationMap::new(
                    (0..count).map(mapping).collect::<Result<Vec<(Oid, Oid)>, _>>()?,
                ))
            }
            other => return Err(Corrupt::invalid("kind", code_at, u64::from(other))),
        };
        Ok(Self { lsn, xid, file, kind })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tuple::testing::heap_page;
    use super::*;
    use crate::engines::postgres::wal::testing::{TestBlock, TestImage, record_bytes};
    use crate::ids::PgMajor;

    fn body() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(any::<u8>(), 0..40)
    }

    fn tuple_id() -> impl Strategy<Value = TupleId> {
        (any::<u32>(), any::<u16>()).prop_map(|(block, offset)| TupleId { block, offset })
    }

    fn hint() -> impl Strategy<Value = Hint> {
        prop_oneof![Just(Hint::Unknown), Just(Hint::Committed), Just(Hint::Aborted)]
    }

    fn tuple() -> impl Strategy<Value = HeapTuple> {
        (any::<u32>(), hint(), proptest::option::of(1u32..), hint(), body()).prop_map(
            |(xmin, h, xmax, g, body)| HeapTuple {
                xmin: xmin.into(),
                xmin_hint: h,
                xmax: xmax.map(Xid::from),
                xmax_hint: g,
                body,
            },
        )
    }

    fn kind() -> impl Strategy<Value = ChangeKind> {
        let updated = (any::<u16>(), any::<u16>(), body()).prop_map(|(prefix, suffix, middle)| UpdatedBody {
            prefix,
            suffix,
            middle,
        });
        prop_oneof![
            (any::<u32>(), proptest::collection::vec((any::<u16>(), tuple()), 0..4))
                .prop_map(|(block, tuples)| ChangeKind::Page { block, tuples }),
            (tuple_id(), body()).prop_map(|(at, body)| ChangeKind::Insert { at, body }),
            (tuple_id(), tuple_id(), proptest::option::of(updated))
                .prop_map(|(old, new, body)| ChangeKind::Update { old, new, body }),
            tuple_id().prop_map(|at| ChangeKind::Delete { at }),
            (tuple_id(), proptest::option::of(body()))
                .prop_map(|(at, body)| ChangeKind::Inplace { at, body }),
            proptest::collection::vec(any::<(u32, u32)>(), 0..4)
                .prop_map(|m| ChangeKind::Map(RelationMap::new(m))),
        ]
    }

    proptest! {
        #[test]
        fn a_change_comes_back_and_every_truncation_is_refused(kind in kind(), distance in 0u64..1 << 40, xid: u32, file: (u32, u32, u32)) {
            let base = Lsn::from(0x300_0000);
            let file = RelFileLocator { spc_oid: file.0, db_oid: file.1, rel_number: file.2 };
            let change = CatalogueChange { lsn: base.saturating_add(distance), xid: xid.into(), file, kind };
            let mut w = Writer::new();
            change.encode(&mut w, base);
            let bytes = w.into_bytes();
            prop_assert_eq!(CatalogueChange::decode(&mut Reader::new(&bytes), base), Ok(change));
            for cut in 0..bytes.len() {
                prop_assert!(CatalogueChange::decode(&mut Reader::new(&bytes[..cut]), base).is_err());
            }
        }

        #[test]
        fn any_bytes_are_a_change_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = CatalogueChange::decode(&mut Reader::new(&bytes), Lsn::MAX);
        }

        #[test]
        fn any_heap_record_on_a_catalogue_is_read_or_refused(
            heap2: bool, info: u8, main in body(), data in body(), old in proptest::option::of(0u32..3),
        ) {
            let mut blocks = vec![TestBlock::data(0, ForkNumber::Main, 1, &data)];
            blocks.extend(old.map(|block| TestBlock::data(1, ForkNumber::Main, block, b"")));
            let _ = changes(if heap2 { 9 } else { 10 }, info & 0xF0, &main, &blocks);
        }
    }

    const FILE: RelFileLocator = RelFileLocator { spc_oid: 1663, db_oid: 5, rel_number: 1259 };

    fn changes(rmid: u8, info: u8, main: &[u8], blocks: &[TestBlock]) -> Result<Vec<ChangeKind>, Corrupt> {
        let blocks: Vec<_> = blocks.iter().map(|b| TestBlock { relation: FILE, ..b.clone() }).collect();
        let bytes = record_bytes(PgMajor::V15, rmid, info, 7, Lsn::from(0x28), &blocks, main);
        let mut refs = Vec::new();
        let record =
            Record::decode(&bytes, Lsn::from(0x100), Lsn::from(0x200), PgMajor::V15, &mut refs).unwrap();
        let mut out = Vec::new();
        catalogue_changes(&record, &CatalogueFiles::default(), &mut out)?;
        assert!(out.iter().all(|c| c.lsn == Lsn::from(0x100) && c.xid == Xid::from(7) && c.file == FILE));
        Ok(out.into_iter().map(|c| c.kind).collect())
    }

    fn logged(body: &[u8]) -> Vec<u8> {
        [&[33, 0, 2, 0, 32, 1, 2, 3, 4, 5, 6, 7, 8, 0][..], body].concat()
    }

    fn at(block: u32, offset: u16) -> TupleId {
        TupleId { block, offset }
    }

    #[test]
    fn each_kind_of_heap_record_says_what_it_changes() {
        let block = |id, number, data: &[u8]| TestBlock::data(id, ForkNumber::Main, number, data);
        let insert = changes(10, 0x00, &[4, 0, 0], &[block(0, 3, &logged(b"columns"))]).unwrap();
        assert_eq!(insert, [ChangeKind::Insert { at: at(3, 4), body: b"columns".to_vec() }]);
        let first = changes(10, 0x80, &[1, 0, 0], &[block(0, 3, &logged(b"columns"))]).unwrap();
        assert_eq!(first[0], ChangeKind::Page { block: 3, tuples: Vec::new() });
        assert_eq!(first[1], ChangeKind::Insert { at: at(3, 1), body: b"columns".to_vec() });
        let delete = changes(10, 0x10, &[7, 0, 0, 0, 5, 0, 0, 0], &[block(0, 3, b"")]).unwrap();
        assert_eq!(delete, [ChangeKind::Delete { at: at(3, 5) }]);
        let inplace = changes(10, 0x70, &[5, 0], &[block(0, 3, b"all of it")]).unwrap();
        assert_eq!(inplace, [ChangeKind::Inplace { at: at(3, 5), body: Some(b"all of it".to_vec()) }]);

        let update = |flags| [7, 0, 0, 0, 5, 0, 0, flags, 0, 0, 0, 0, 6, 0];
        let data = [&[2, 0, 3, 0][..], &logged(b"new")].concat();
        let hot = changes(10, 0x40, &update(0x60), &[block(0, 3, &data)]).unwrap();
        let ChangeKind::Update { old, new, body: Some(body) } = &hot[0] else { panic!("{hot:?}") };
        assert_eq!((*old, *new), (at(3, 5), at(3, 6)));
        assert_eq!(body.apply(b"old row"), Some(b"olnewrow".to_vec()));
        assert_eq!(body.apply(b"ro"), None);
        let moved = changes(10, 0x20, &update(0), &[block(0, 9, &logged(b"new")), block(1, 3, b"")]).unwrap();
        let body = UpdatedBody { prefix: 0, suffix: 0, middle: b"new".to_vec() };
        assert_eq!(moved, [ChangeKind::Update { old: at(3, 5), new: at(9, 6), body: Some(body) }]);

        let row = |body: &[u8]| [&(9 + body.len() as u16).to_le_bytes()[..], &logged(body)].concat();
        let rows = [row(b"odd"), vec![0], row(b"even")].concat();
        let rows = if row(b"odd").len() % 2 == 0 { [row(b"odd"), row(b"even")].concat() } else { rows };
        let many = changes(9, 0x50, &[0, 0, 2, 0, 7, 0, 9, 0], &[block(0, 3, &rows)]).unwrap();
        let inserted = |offset, body: &[u8]| ChangeKind::Insert { at: at(3, offset), body: body.to_vec() };
        assert_eq!(many, [inserted(7, b"odd"), inserted(9, b"even")]);
        assert_eq!(changes(9, 0x10, &[0; 8], &[block(0, 3, b"pruned")]), Ok(Vec::new()));
        assert!(changes(10, 0x00, &[4, 0, 0], &[block(0, 3, b"too")]).is_err());
    }

    #[test]
    fn an_image_says_all_rows_of_its_page_and_the_record_who_changed_which() {
        let page = heap_page(&[(1, 3, 0, 0x300, b"kept"), (2, 700, 7, 0, b"deleted")]);
        let image = TestImage::of(&page);
        let block = TestBlock { image: Some(image), ..TestBlock::data(0, ForkNumber::Main, 3, b"") };
        let found = changes(10, 0x10, &[7, 0, 0, 0, 2, 0, 0, 0], &[block]).unwrap();
        let ChangeKind::Page { block: 3, tuples } = &found[0] else { panic!("{found:?}") };
        assert_eq!((tuples.len(), tuples[1].1.xmax), (2, Some(Xid::from(7))));
        assert_eq!(found[1], ChangeKind::Delete { at: at(3, 2) });
    }

    #[test]
    fn what_lies_elsewhere_is_left_alone_until_a_catalogue_is_moved_there() {
        let mut files = CatalogueFiles::default();
        let moved = RelFileLocator { rel_number: 20_000, ..FILE };
        assert_eq!((files.catalogue(FILE), files.catalogue(moved)), (Some(Catalogue::Class), None));
        assert!(files.add(moved, Catalogue::Class) && !files.add(moved, Catalogue::Class));
        assert!(!files.add(FILE, Catalogue::Class), "a first file is always known");
        assert_eq!(files.catalogue(moved), Some(Catalogue::Class));
        assert_eq!(files.moved().collect::<Vec<_>>(), [(moved, Catalogue::Class)]);
    }
}
