//! Records of GiST indexes.

use waltide_format::engines::postgres::wal::{Block, Record};
use waltide_format::{BlockNumber, Corrupt, Lsn, Reader};

use super::page::{HEADER_BYTES, Page};
use super::posting::take_entry_unpadded;
use super::{Applied, unknown};

const PAGE_UPDATE: u8 = 0x00;
const DELETE: u8 = 0x10;
const PAGE_REUSE: u8 = 0x20;
const PAGE_SPLIT: u8 = 0x30;
const PAGE_DELETE: u8 = 0x60;
const ASSIGN_LSN: u8 = 0x70;

/// `GISTPageOpaqueData`.
const OPAQUE_BYTES: usize = 16;
const NSN: usize = 0;
const RIGHTLINK: usize = 8;
const FLAGS: usize = 12;
const PAGE_ID: usize = 14;
const GIST_PAGE_ID: u16 = 0xFF81;

const F_LEAF: u16 = 1;
const F_DELETED: u16 = 2;
const F_TUPLES_DELETED: u16 = 4;
const F_FOLLOW_RIGHT: u16 = 8;
const F_HAS_GARBAGE: u16 = 16;

/// `GIST_ROOT_BLKNO`.
const ROOT: BlockNumber = 0;

/// Applies a record to one of its blocks.
pub(super) fn apply(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<Applied, Corrupt> {
    match (record.kind(), block.id) {
        (PAGE_UPDATE, 0) => update(record, block, page)?,
        (PAGE_UPDATE, 1) | (PAGE_SPLIT, 0) => finish_split(record, page)?,
        (DELETE, 0) => delete(record, page)?,
        (PAGE_SPLIT, 1..) => split(record, block, page)?,
        (PAGE_DELETE, 0 | 1) => delete_page(record, block, page)?,
        (PAGE_REUSE | ASSIGN_LSN, _) => return Ok(Applied::Nothing),
        _ => return Err(unknown(record)),
    }
    Ok(Applied::Changed)
}

/// Whether the record changes this block even after it was restored from an image: the change is not in the image.
pub(super) const fn edits_image(kind: u8, id: u8) -> bool {
    matches!((kind, id), (PAGE_UPDATE, 1) | (PAGE_SPLIT, 0))
}

fn check(page: &Page) -> Result<(), Corrupt> {
    page.check_items()?;
    page.check_special(OPAQUE_BYTES)
}

fn flags(page: &Page) -> u16 {
    page.u16(page.special().saturating_add(FLAGS))
}

fn set_flags(page: &mut Page, clear: u16, set: u16) {
    let flags = flags(page) & !clear | set;
    page.put_u16(page.special().saturating_add(FLAGS), flags);
}

#[allow(clippy::cast_possible_truncation)] // the two halves
fn set_nsn(page: &mut Page, nsn: Lsn) {
    let at = page.special().saturating_add(NSN);
    page.put_u32(at, (nsn.get() >> 32) as u32);
    page.put_u32(at.saturating_add(4), nsn.get() as u32);
}

/// The left half of a split has its downlink's neighbour now.
pub(super) fn finish_split(record: &Record<'_>, page: &mut Page) -> Result<(), Corrupt> {
    check(page)?;
    set_nsn(page, record.end);
    set_flags(page, F_FOLLOW_RIGHT, 0);
    Ok(())
}

fn offsets(data: &mut Reader<'_>, count: u16) -> Result<Vec<u16>, Corrupt> {
    (0..count).map(|_| data.u16("offnum")).collect()
}

fn update(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    check(page)?;
    let mut main = Reader::new(record.main_data());
    let (deleted, inserted) = (main.u16("ntodelete")?, main.u16("ntoinsert")?);
    let mut data = Reader::new(block.data);
    if deleted == 1 && inserted == 1 {
        let number = data.u16("offnum")?;
        page.replace_item(number, take_entry_unpadded(&mut data)?)?;
        return data.finish("tuples");
    }
    if deleted > 0 {
        page.delete_items(&offsets(&mut data, deleted)?)?;
        if flags(page) & F_LEAF != 0 {
            set_flags(page, 0, F_TUPLES_DELETED);
        }
    }
    append(page, &mut data, inserted)?;
    data.finish("tuples")
}

fn append(page: &mut Page, data: &mut Reader<'_>, count: u16) -> Result<(), Corrupt> {
    for _ in 0..count {
        page.insert_item(page.items().saturating_add(1), take_entry_unpadded(data)?)?;
    }
    Ok(())
}

fn delete(record: &Record<'_>, page: &mut Page) -> Result<(), Corrupt> {
    check(page)?;
    let mut main = Reader::new(record.main_data());
    main.u32("latestRemovedXid")?;
    let count = main.u16("ntodelete")?;
    page.delete_items(&offsets(&mut main, count)?)?;
    set_flags(page, F_HAS_GARBAGE, 0);
    main.finish("todelete")
}

/// Block 0, where there is one, is a child; the pages of the split follow it.
fn split(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    let right = main.u32("origrlink")?;
    main.take(4, "padding")?;
    let nsn = Lsn::from(main.u64("orignsn")?);
    let is_leaf = main.u8("origleaf")? != 0;
    main.take(1, "padding")?;
    let count = main.u16("npage")?;
    let marks = main.u8("markfollowright")? != 0;
    let is_root = block.block == ROOT;
    let root_split = record.block(1).is_some_and(|first| first.block == ROOT);
    page.init(OPAQUE_BYTES);
    page.put_u16(page.special().saturating_add(PAGE_ID), GIST_PAGE_ID);
    set_flags(page, 0, if is_leaf && !is_root { F_LEAF } else { 0 });
    let mut data = Reader::new(block.data);
    let items = data.u32("num")?;
    let items =
        u16::try_from(items).map_err(|_| Corrupt::too_large("num", 0, items.into(), u16::MAX.into()))?;
    append(page, &mut data, items)?;
    data.finish("tuples")?;
    let is_last = u16::from(block.id) >= count;
    let next = record.block(block.id.saturating_add(1)).filter(|_| !is_last);
    let link = match next {
        _ if is_root => BlockNumber::MAX,
        Some(next) => next.block,
        None if is_last => right,
        None => return Err(Corrupt::invalid("npage", 18, count.into())),
    };
    page.put_u32(page.special().saturating_add(RIGHTLINK), link);
    set_nsn(page, nsn);
    if !is_last && !root_split && marks {
        set_flags(page, 0, F_FOLLOW_RIGHT);
    }
    Ok(())
}

/// Block 0 is the page that goes, block 1 its parent.
fn delete_page(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    check(page)?;
    let mut main = Reader::new(record.main_data());
    let (xid, downlink) = (main.u64("deleteXid")?, main.u16("downlinkOffset")?);
    if block.id == 1 {
        return page.delete_item(downlink);
    }
    set_flags(page, 0, F_DELETED);
    page.set_lower(HEADER_BYTES.saturating_add(8));
    page.write(HEADER_BYTES, &xid.to_le_bytes())
}
