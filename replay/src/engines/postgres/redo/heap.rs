//! Records of the heap: rows in, changed, out, locked, frozen and pruned, and the visibility map beside them.

use std::ops::Range;

use waltide_format::engines::postgres::wal::{
    Block, Record, Rmgr, VM_HEAP_BLOCKS_PER_PAGE, implicit_vm_clears, vm_block_of,
};
use waltide_format::{BlockNumber, Corrupt, ForkNumber, Reader, RelFileLocator};

use super::page::{HEADER_BYTES, LinePointer, Page, tid};
use super::{Applied, Cluster, unknown};

const OPMASK: u8 = 0x70;
const INIT_PAGE: u8 = 0x80;

const HEAP_INSERT: u8 = 0x00;
const HEAP_DELETE: u8 = 0x10;
const HEAP_UPDATE: u8 = 0x20;
const HEAP_TRUNCATE: u8 = 0x30;
const HEAP_HOT_UPDATE: u8 = 0x40;
const HEAP_CONFIRM: u8 = 0x50;
const HEAP_LOCK: u8 = 0x60;
const HEAP_INPLACE: u8 = 0x70;

const HEAP2_REWRITE: u8 = 0x00;
const HEAP2_PRUNE: u8 = 0x10;
const HEAP2_VACUUM: u8 = 0x20;
const HEAP2_FREEZE_PAGE: u8 = 0x30;
const HEAP2_VISIBLE: u8 = 0x40;
const HEAP2_MULTI_INSERT: u8 = 0x50;
const HEAP2_LOCK_UPDATED: u8 = 0x60;
const HEAP2_NEW_CID: u8 = 0x70;

/// `XLH_INSERT_*`.
const INSERT_ALL_VISIBLE_CLEARED: u8 = 0x01;
const INSERT_ALL_FROZEN_SET: u8 = 0x20;
/// `XLH_DELETE_*`.
const DELETE_ALL_VISIBLE_CLEARED: u8 = 0x01;
const DELETE_IS_SUPER: u8 = 0x08;
const DELETE_IS_PARTITION_MOVE: u8 = 0x10;
/// `XLH_UPDATE_*`.
const UPDATE_OLD_ALL_VISIBLE_CLEARED: u8 = 0x01;
const UPDATE_NEW_ALL_VISIBLE_CLEARED: u8 = 0x02;
const UPDATE_PREFIX_FROM_OLD: u8 = 0x20;
const UPDATE_SUFFIX_FROM_OLD: u8 = 0x40;
/// `XLH_FREEZE_XVAC`, `XLH_INVALID_XVAC`.
const FREEZE_XVAC: u8 = 0x02;
const INVALID_XVAC: u8 = 0x04;

/// `SizeofHeapTupleHeader`: `t_bits` start here.
const TUPLE_HEADER_BYTES: usize = 23;
const T_XMIN: usize = 0;
const T_XMAX: usize = 4;
/// `t_cid` or `t_xvac`.
const T_CID: usize = 8;
const T_CTID: usize = 12;
const T_INFOMASK2: usize = 18;
const T_INFOMASK: usize = 20;
const T_HOFF: usize = 22;

const XMAX_KEYSHR_LOCK: u16 = 0x0010;
const COMBOCID: u16 = 0x0020;
const XMAX_EXCL_LOCK: u16 = 0x0040;
const XMAX_LOCK_ONLY: u16 = 0x0080;
const XMAX_IS_MULTI: u16 = 0x1000;
const LOCK_MASK: u16 = XMAX_EXCL_LOCK | XMAX_KEYSHR_LOCK;
/// `HEAP_XMAX_BITS` and `HEAP_MOVED`.
const XMAX_BITS: u16 = 0x0400 | 0x0800 | XMAX_IS_MULTI | LOCK_MASK | XMAX_LOCK_ONLY;
const MOVED: u16 = 0xC000;
const KEYS_UPDATED: u16 = 0x2000;
const HOT_UPDATED: u16 = 0x4000;

const FROZEN_XID: u32 = 2;
/// `MovedPartitionsOffsetNumber`.
const MOVED_PARTITIONS: u16 = 0xFFFD;

/// `VISIBILITYMAP_VALID_BITS`, `VISIBILITYMAP_ALL_FROZEN`.
const VM_BITS: u8 = 0x03;
const VM_ALL_FROZEN: u8 = 0x02;

/// Whether redo of the record is known.
pub(super) const fn knows(rmgr: Rmgr, kind: u8) -> bool {
    let op = kind & OPMASK;
    let may_init = match rmgr {
        Rmgr::HEAP => matches!(op, HEAP_INSERT | HEAP_UPDATE | HEAP_HOT_UPDATE),
        _ => matches!(op, HEAP2_MULTI_INSERT),
    };
    kind & INIT_PAGE == 0 || may_init
}

/// Applies a heap record to one of its blocks.
pub(super) fn apply(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<Applied, Corrupt> {
    let op = record.kind() & OPMASK;
    if block.id > u8::from(matches!(op, HEAP_UPDATE | HEAP_HOT_UPDATE)) {
        return Err(unknown(record));
    }
    match op {
        HEAP_INSERT => insert(record, block, page)?,
        HEAP_DELETE => delete(record, block, page)?,
        HEAP_UPDATE | HEAP_HOT_UPDATE => update(record, block, page)?,
        HEAP_CONFIRM => confirm(record, block, page)?,
        HEAP_LOCK => lock(record, block, page)?,
        HEAP_INPLACE => inplace(record, block, page)?,
        HEAP_TRUNCATE => return Ok(Applied::Nothing),
        _ => return Err(unknown(record)),
    }
    Ok(Applied::Changed)
}

/// Applies a record of the heap's second resource manager to one of its blocks.
pub(super) fn apply2(
    record: &Record<'_>,
    block: &Block<'_>,
    page: &mut Page,
    cluster: Cluster,
) -> Result<Applied, Corrupt> {
    let op = record.kind() & OPMASK;
    if block.id > u8::from(op == HEAP2_VISIBLE) {
        return Err(unknown(record));
    }
    match op {
        HEAP2_PRUNE => prune(record, block, page)?,
        HEAP2_VACUUM => vacuum(record, block, page)?,
        HEAP2_FREEZE_PAGE => freeze(record, block, page)?,
        HEAP2_VISIBLE => return visible(record, block, page, cluster),
        HEAP2_MULTI_INSERT => multi_insert(record, block, page)?,
        HEAP2_LOCK_UPDATED => lock_updated(record, page)?,
        HEAP2_NEW_CID | HEAP2_REWRITE => return Ok(Applied::Nothing),
        _ => return Err(unknown(record)),
    }
    Ok(Applied::Changed)
}

/// A row on a page, its header to be changed.
struct Row<'a>(&'a mut [u8]);

impl<'a> Row<'a> {
    fn on(page: &'a mut Page, number: u16) -> Result<Self, Corrupt> {
        let bytes = page.normal_item_mut(number)?;
        if bytes.len() < TUPLE_HEADER_BYTES {
            return Err(Corrupt::invalid("lp_len", 0, bytes.len() as u64));
        }
        Ok(Self(bytes))
    }

    fn u16(&self, at: usize) -> u16 {
        let bytes = self.0.get(at..at.saturating_add(2)).and_then(|b| b.try_into().ok());
        u16::from_le_bytes(bytes.unwrap_or_default())
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.0.get_mut(at..at.saturating_add(bytes.len())) {
            place.copy_from_slice(bytes);
        }
    }

    /// Clears and sets bits of `t_infomask` or `t_infomask2`.
    fn mask(&mut self, at: usize, clear: u16, set: u16) {
        let bits = self.u16(at) & !clear | set;
        self.put(at, &bits.to_le_bytes());
    }

    /// Takes the marks of an earlier xmax away and puts those of a record's `infobits_set` there.
    fn set_xmax(&mut self, xmax: u32, infobits: u8) {
        self.set_infobits(infobits);
        self.put(T_XMAX, &xmax.to_le_bytes());
    }

    fn set_infobits(&mut self, infobits: u8) {
        const SET: [(u8, u16); 4] =
            [(0x01, XMAX_IS_MULTI), (0x02, XMAX_LOCK_ONLY), (0x04, XMAX_EXCL_LOCK), (0x08, XMAX_KEYSHR_LOCK)];
        let bits = SET.iter().filter(|(bit, _)| infobits & bit != 0).fold(0, |bits, (_, set)| bits | set);
        self.mask(T_INFOMASK, XMAX_BITS | MOVED, bits);
        self.mask(T_INFOMASK2, KEYS_UPDATED, if infobits & 0x10 != 0 { KEYS_UPDATED } else { 0 });
    }

    /// `FirstCommandId`, and no combined one.
    fn reset_cid(&mut self) {
        self.put(T_CID, &[0; 4]);
        self.mask(T_INFOMASK, COMBOCID, 0);
    }

    fn is_only_locked(&self) -> bool {
        let bits = self.u16(T_INFOMASK);
        bits & XMAX_LOCK_ONLY != 0 || bits & (XMAX_IS_MULTI | LOCK_MASK) == XMAX_EXCL_LOCK
    }
}

/// `xl_heap_header`.
struct TupleHeader {
    infomask2: u16,
    infomask: u16,
    hoff: u8,
}

impl TupleHeader {
    fn read(r: &mut Reader<'_>) -> Result<Self, Corrupt> {
        Ok(Self { infomask2: r.u16("t_infomask2")?, infomask: r.u16("t_infomask")?, hoff: r.u8("t_hoff")? })
    }

    /// Puts a row with that header, and with these bytes behind the fixed part of it, into a page.
    fn put_row(&self, page: &mut Page, number: u16, of: &RowOf, parts: &[Part<'_>]) -> Result<(), Corrupt> {
        let bytes = parts.iter().map(Part::len).fold(TUPLE_HEADER_BYTES, usize::saturating_add);
        let mut at = page.place_heap_item(number, bytes)?;
        let mut fixed = [0; TUPLE_HEADER_BYTES];
        let mut put = Row(&mut fixed);
        put.put(T_XMIN, &of.xmin.to_le_bytes());
        put.put(T_XMAX, &of.xmax.to_le_bytes());
        put.put(T_CTID, &tid(of.block, number));
        put.put(T_INFOMASK2, &self.infomask2.to_le_bytes());
        put.put(T_INFOMASK, &(self.infomask & !COMBOCID).to_le_bytes());
        put.put(T_HOFF, &[self.hoff]);
        page.write(at, &fixed)?;
        at = at.saturating_add(TUPLE_HEADER_BYTES);
        for part in parts {
            match part {
                Part::Bytes(bytes) => page.write(at, bytes)?,
                Part::Page(from) => page.copy(from.clone(), at)?,
            }
            at = at.saturating_add(part.len());
        }
        Ok(())
    }
}

/// What a new row's header has besides.
struct RowOf {
    xmin: u32,
    xmax: u32,
    block: BlockNumber,
}

impl RowOf {
    fn new(record: &Record<'_>, block: &Block<'_>) -> Self {
        Self { xmin: record.header.xid.get(), xmax: 0, block: block.block }
    }
}

/// Bytes of a new row.
enum Part<'a> {
    Bytes(&'a [u8]),
    /// Those that are there on its page.
    Page(Range<usize>),
}

impl Part<'_> {
    fn len(&self) -> usize {
        match self {
            Part::Bytes(bytes) => bytes.len(),
            Part::Page(range) => range.len(),
        }
    }
}

fn insert(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    let (number, flags) = (main.u16("offnum")?, main.u8("flags")?);
    if record.kind() & INIT_PAGE != 0 {
        page.init(0);
    }
    let mut data = Reader::new(block.data);
    let header = TupleHeader::read(&mut data)?;
    header.put_row(page, number, &RowOf::new(record, block), &[Part::Bytes(data.rest())])?;
    inserted(page, flags);
    Ok(())
}

fn inserted(page: &mut Page, flags: u8) {
    if flags & INSERT_ALL_VISIBLE_CLEARED != 0 {
        page.set_all_visible(false);
    }
    if flags & INSERT_ALL_FROZEN_SET != 0 {
        page.set_all_visible(true);
    }
}

fn multi_insert(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    let flags = main.u8("flags")?;
    main.take(1, "padding")?;
    let count = main.u16("ntuples")?;
    let anew = record.kind() & INIT_PAGE != 0;
    if anew {
        page.init(0);
    }
    let mut data = Reader::new(block.data);
    for i in 0..count {
        let number = if anew { i.saturating_add(1) } else { main.u16("offsets")? };
        // Each starts at an even place.
        if data.position() % 2 == 1 {
            data.take(1, "padding")?;
        }
        let length = data.u16("datalen")?;
        let header = TupleHeader::read(&mut data)?;
        let bytes = data.take(length.into(), "tuple")?;
        header.put_row(page, number, &RowOf::new(record, block), &[Part::Bytes(bytes)])?;
    }
    data.finish("tuples")?;
    inserted(page, flags);
    Ok(())
}

fn delete(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    let (xmax, number) = (main.u32("xmax")?, main.u16("offnum")?);
    let (infobits, flags) = (main.u8("infobits_set")?, main.u8("flags")?);
    let mut row = Row::on(page, number)?;
    row.mask(T_INFOMASK2, HOT_UPDATED, 0);
    row.set_infobits(infobits);
    if flags & DELETE_IS_SUPER == 0 {
        row.put(T_XMAX, &xmax.to_le_bytes());
    } else {
        row.put(T_XMIN, &[0; 4]);
    }
    row.reset_cid();
    let is_move = flags & DELETE_IS_PARTITION_MOVE != 0;
    let ctid = if is_move { tid(BlockNumber::MAX, MOVED_PARTITIONS) } else { tid(block.block, number) };
    row.put(T_CTID, &ctid);
    page.set_prunable(record.header.xid.get());
    if flags & DELETE_ALL_VISIBLE_CLEARED != 0 {
        page.set_all_visible(false);
    }
    Ok(())
}

/// `xl_heap_update`.
struct Update {
    old_xmax: u32,
    old_number: u16,
    old_infobits: u8,
    flags: u8,
    new_xmax: u32,
    new_number: u16,
}

/// Block 0 is the new row's page; block 1, where there is one, the old row's.
fn update(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    let update = Update {
        old_xmax: main.u32("old_xmax")?,
        old_number: main.u16("old_offnum")?,
        old_infobits: main.u8("old_infobits_set")?,
        flags: main.u8("flags")?,
        new_xmax: main.u32("new_xmax")?,
        new_number: main.u16("new_offnum")?,
    };
    let new_block = record.page(0).map_or(block.block, |(_, _, new)| new);
    let same_page = record.page(1).is_none_or(|(_, fork, _)| fork != ForkNumber::Main);
    if block.id == 1 || same_page {
        let mut row = Row::on(page, update.old_number)?;
        let is_hot = record.kind() & OPMASK == HEAP_HOT_UPDATE;
        row.mask(T_INFOMASK2, HOT_UPDATED, if is_hot { HOT_UPDATED } else { 0 });
        row.set_xmax(update.old_xmax, update.old_infobits);
        row.reset_cid();
        row.put(T_CTID, &tid(new_block, update.new_number));
        page.set_prunable(record.header.xid.get());
        if update.flags & UPDATE_OLD_ALL_VISIBLE_CLEARED != 0 {
            page.set_all_visible(false);
        }
    }
    if block.id == 0 {
        put_new_row(record, block, page, &update, same_page)?;
    }
    Ok(())
}

/// What the new row has in common with the old one at either end is left out where both are on one page.
fn put_new_row(
    record: &Record<'_>,
    block: &Block<'_>,
    page: &mut Page,
    update: &Update,
    same_page: bool,
) -> Result<(), Corrupt> {
    if record.kind() & INIT_PAGE != 0 {
        page.init(0);
    }
    let mut data = Reader::new(block.data);
    let mut shared = |flag, field| if update.flags & flag != 0 { data.u16(field) } else { Ok(0) };
    let prefix: usize = shared(UPDATE_PREFIX_FROM_OLD, "prefixlen")?.into();
    let suffix: usize = shared(UPDATE_SUFFIX_FROM_OLD, "suffixlen")?.into();
    let header = TupleHeader::read(&mut data)?;
    let mut old = 0..0;
    if prefix > 0 || suffix > 0 {
        if !same_page {
            return Err(Corrupt::invalid("flags", 7, update.flags.into()));
        }
        let item = page.item(update.old_number)?;
        let hoff: usize = item.get(T_HOFF).copied().unwrap_or(0).into();
        old = page.item_range(update.old_number)?;
        old.start = old.start.saturating_add(hoff).min(old.end);
    }
    let too_long = |field, length: usize| Corrupt::too_large(field, 0, length as u64, old.len() as u64);
    if prefix > old.len() {
        return Err(too_long("prefixlen", prefix));
    }
    if suffix > old.len() {
        return Err(too_long("suffixlen", suffix));
    }
    let front = Part::Page(old.start..old.start.saturating_add(prefix));
    let back = Part::Page(old.end.saturating_sub(suffix)..old.end);
    // The null bitmap and padding come before what is shared.
    let bitmap = if prefix > 0 { usize::from(header.hoff).saturating_sub(TUPLE_HEADER_BYTES) } else { 0 };
    let bitmap = data.take(bitmap, "t_bits")?;
    let parts = [Part::Bytes(bitmap), front, Part::Bytes(data.rest()), back];
    let of = RowOf { xmax: update.new_xmax, ..RowOf::new(record, block) };
    header.put_row(page, update.new_number, &of, &parts)?;
    if update.flags & UPDATE_NEW_ALL_VISIBLE_CLEARED != 0 {
        page.set_all_visible(false);
    }
    Ok(())
}

/// A row that was put in on trial is there to stay.
fn confirm(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let number = Reader::new(record.main_data()).u16("offnum")?;
    Row::on(page, number)?.put(T_CTID, &tid(block.block, number));
    Ok(())
}

fn lock(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    let (xid, number, infobits) = (main.u32("locking_xid")?, main.u16("offnum")?, main.u8("infobits_set")?);
    let mut row = Row::on(page, number)?;
    row.set_xmax(xid, infobits);
    if row.is_only_locked() {
        row.mask(T_INFOMASK2, HOT_UPDATED, 0);
        row.put(T_CTID, &tid(block.block, number));
    }
    row.reset_cid();
    Ok(())
}

fn lock_updated(record: &Record<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    let (xmax, number, infobits) = (main.u32("xmax")?, main.u16("offnum")?, main.u8("infobits_set")?);
    Row::on(page, number)?.set_xmax(xmax, infobits);
    Ok(())
}

fn inplace(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let number = Reader::new(record.main_data()).u16("offnum")?;
    let row = Row::on(page, number)?;
    let from = row.0.get(T_HOFF).copied().unwrap_or(0).into();
    let place = row.0.get_mut(from..).unwrap_or_default();
    if place.len() != block.data.len() {
        return Err(Corrupt::mismatch("lp_len", 0, place.len() as u64, block.data.len() as u64));
    }
    place.copy_from_slice(block.data);
    Ok(())
}

fn prune(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    main.u32("latestRemovedXid")?;
    let (redirected, dead) = (main.u16("nredirected")?, main.u16("ndead")?);
    let mut data = Reader::new(block.data);
    for _ in 0..redirected {
        let (from, to) = (data.u16("redirected")?, data.u16("redirected")?);
        page.set_line_pointer(from, LinePointer::redirect(to))?;
    }
    for _ in 0..dead {
        page.set_line_pointer(data.u16("nowdead")?, LinePointer::DEAD)?;
    }
    while !data.is_empty() {
        page.set_line_pointer(data.u16("nowunused")?, LinePointer::UNUSED)?;
    }
    page.repair_fragmentation()
}

fn vacuum(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let count = Reader::new(record.main_data()).u16("nunused")?;
    let mut data = Reader::new(block.data);
    for _ in 0..count {
        page.set_line_pointer(data.u16("unused")?, LinePointer::UNUSED)?;
    }
    data.finish("unused")?;
    page.truncate_line_pointers()
}

fn freeze(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    main.u32("cutoff_xid")?;
    let count = main.u16("ntuples")?;
    let mut data = Reader::new(block.data);
    for _ in 0..count {
        let (xmax, number) = (data.u32("xmax")?, data.u16("offset")?);
        let (infomask2, infomask) = (data.u16("t_infomask2")?, data.u16("t_infomask")?);
        let flags = data.u8("frzflags")?;
        data.take(1, "padding")?;
        let mut row = Row::on(page, number)?;
        row.put(T_XMAX, &xmax.to_le_bytes());
        if flags & FREEZE_XVAC != 0 {
            row.put(T_CID, &FROZEN_XID.to_le_bytes());
        }
        if flags & INVALID_XVAC != 0 {
            row.put(T_CID, &[0; 4]);
        }
        row.put(T_INFOMASK, &infomask.to_le_bytes());
        row.put(T_INFOMASK2, &infomask2.to_le_bytes());
    }
    data.finish("tuples")
}

/// Block 0 is the map's page, block 1 the heap's.
fn visible(
    record: &Record<'_>,
    block: &Block<'_>,
    page: &mut Page,
    cluster: Cluster,
) -> Result<Applied, Corrupt> {
    let mut main = Reader::new(record.main_data());
    main.u32("cutoff_xid")?;
    let flags = main.u8("flags")? & VM_BITS;
    if block.id == 1 {
        page.set_all_visible(true);
        return Ok(if cluster.logs_hints { Applied::Changed } else { Applied::Unstamped });
    }
    let heap = record.block(1).ok_or(Corrupt::invalid("block_id", 0, 1))?.block;
    let anew = page.is_new();
    if anew {
        page.init(0);
    }
    let (at, shift) = map_place(heap);
    let byte = page.bytes().get(at).copied().unwrap_or(0);
    if byte >> shift & VM_BITS == flags {
        return Ok(if anew { Applied::Unstamped } else { Applied::Nothing });
    }
    page.write(at, &[byte | flags << shift])?;
    Ok(Applied::Changed)
}

/// Clears what a record clears in a page of the map without naming that page.
pub(super) fn clear_visibility(
    record: &Record<'_>,
    relation: RelFileLocator,
    map: BlockNumber,
    page: &mut Page,
) {
    if page.is_new() {
        page.init(0);
    }
    let op = record.kind() & OPMASK;
    let locks = match record.rmgr() {
        Rmgr::HEAP => op == HEAP_LOCK,
        _ => op == HEAP2_LOCK_UPDATED,
    };
    let bits = if locks { VM_ALL_FROZEN } else { VM_BITS };
    for (of, heap) in implicit_vm_clears(record) {
        if of == relation && vm_block_of(heap) == map {
            let (at, shift) = map_place(heap);
            if let Some(byte) = page.bytes_mut().get_mut(at) {
                *byte &= !(bits << shift);
            }
        }
    }
}

/// Clears in a page of the map what it says of the blocks from `heap` on.
pub(super) fn cut_visibility(heap: BlockNumber, page: &mut Page) -> bool {
    if page.is_new() {
        return false;
    }
    let (at, shift) = map_place(heap);
    if let Some((first, rest)) = page.bytes_mut().get_mut(at..).and_then(<[u8]>::split_first_mut) {
        *first &= 1u8.wrapping_shl(shift).wrapping_sub(1);
        rest.fill(0);
    }
    true
}

/// The byte of the map's page and the place in it of a heap page's two bits.
fn map_place(heap: BlockNumber) -> (usize, u32) {
    let within = heap % VM_HEAP_BLOCKS_PER_PAGE;
    (HEADER_BYTES.saturating_add(within as usize / 4), (within % 4).saturating_mul(2))
}
