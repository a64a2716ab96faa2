//! Records of GIN indexes: entry trees, posting trees, the list of what is still to be sorted in.

use waltide_format::engines::postgres::wal::{Block, Record};
use waltide_format::{BlockNumber, Corrupt, Reader};

use super::page::Page;
use super::posting::take_entry_unpadded;
use super::{Applied, unknown};

const CREATE_PTREE: u8 = 0x10;
const INSERT: u8 = 0x20;
const SPLIT: u8 = 0x30;
const DELETE_PAGE: u8 = 0x50;
const UPDATE_META_PAGE: u8 = 0x60;
const INSERT_LISTPAGE: u8 = 0x70;
const DELETE_LISTPAGE: u8 = 0x80;
const VACUUM_DATA_LEAF_PAGE: u8 = 0x90;

/// `GIN_INSERT_ISDATA`, `GIN_INSERT_ISLEAF`.
const IS_DATA: u16 = 1;
const IS_LEAF: u16 = 2;

/// `GinPageOpaqueData`.
const OPAQUE_BYTES: usize = 8;
const RIGHTLINK: usize = 0;
const MAXOFF: usize = 4;
const FLAGS: usize = 6;
const GIN_DATA: u16 = 1;
const GIN_LEAF: u16 = 2;
const GIN_DELETED: u16 = 4;
const GIN_META: u16 = 8;
const GIN_LIST: u16 = 16;
const GIN_LIST_FULLROW: u16 = 32;
const GIN_INCOMPLETE_SPLIT: u16 = 64;
const GIN_COMPRESSED: u16 = 128;

/// `GinMetaPageData`, and where it lies on its page.
const META_BYTES: usize = 56;
const META_AT: usize = 24;
/// Where a posting tree's page has its items, behind the right bound.
const ITEMS_AT: usize = 32;
/// `PostingItem`: a child's block and the key it goes up to.
const POSTING_ITEM_BYTES: usize = 10;
/// `pd_prune_xid`, where a deleted page says until when it may still be read.
const DELETE_XID: usize = 20;

/// `GIN_SEGMENT_*`.
const SEGMENT_DELETE: u8 = 1;
const SEGMENT_INSERT: u8 = 2;
const SEGMENT_REPLACE: u8 = 3;
const SEGMENT_ADDITEMS: u8 = 4;
/// `MaxHeapTuplesPerPageBits`: a row's place as one number has that many bits for the line pointer.
const OFFSET_BITS: u32 = 11;
const OFFSET_MASK: u64 = 0x7FF;

/// Applies a record to one of its blocks.
pub(super) fn apply(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<Applied, Corrupt> {
    let mut main = Reader::new(record.main_data());
    match (record.kind(), block.id) {
        (CREATE_PTREE, 0) => {
            let length = main.u32("size")?;
            let list = main.take(length as usize, "GinPostingList")?;
            init(page, GIN_DATA | GIN_LEAF | GIN_COMPRESSED);
            put_list(page, list)?;
        }
        (INSERT, 0) => insert(&mut main, block, page)?,
        (INSERT, 1) | (SPLIT, 3) => {
            check(page)?;
            set_flags(page, GIN_INCOMPLETE_SPLIT, 0);
        }
        (VACUUM_DATA_LEAF_PAGE, 0) => recompress(page, &mut Reader::new(block.data))?,
        (DELETE_PAGE, 0..=2) => delete_page(&mut main, block, page)?,
        (UPDATE_META_PAGE, 0) => {
            main.take(16, "node")?;
            set_meta(page, main.take(META_BYTES, "metadata")?)?;
        }
        (UPDATE_META_PAGE, 1) => {
            main.take(META_BYTES.saturating_add(20), "metadata")?;
            let (right, count) = (main.u32("newRightlink")?, main.u32("ntuples")?);
            check(page)?;
            if count == 0 {
                page.put_u32(page.special().saturating_add(RIGHTLINK), right);
            } else {
                append(page, block.data, count)?;
                let at = page.special().saturating_add(MAXOFF);
                page.put_u16(at, page.u16(at).wrapping_add(1));
            }
        }
        (INSERT_LISTPAGE, 0) => {
            let (right, count) = (main.u32("rightlink")?, main.u32("ntuples")?);
            let is_tail = right == BlockNumber::MAX;
            init(page, if is_tail { GIN_LIST | GIN_LIST_FULLROW } else { GIN_LIST });
            page.put_u32(page.special().saturating_add(RIGHTLINK), right);
            page.put_u16(page.special().saturating_add(MAXOFF), u16::from(is_tail));
            append(page, block.data, count)?;
        }
        (DELETE_LISTPAGE, 0) => set_meta(page, main.take(META_BYTES, "metadata")?)?,
        (DELETE_LISTPAGE, _) => init(page, GIN_DELETED),
        _ => return Err(unknown(record)),
    }
    Ok(Applied::Changed)
}

fn check(page: &Page) -> Result<(), Corrupt> {
    page.check()?;
    page.check_special(OPAQUE_BYTES)
}

fn init(page: &mut Page, flags: u16) {
    page.init(OPAQUE_BYTES);
    page.put_u32(page.special().saturating_add(RIGHTLINK), BlockNumber::MAX);
    set_flags(page, u16::MAX, flags);
}

fn flags(page: &Page) -> u16 {
    page.u16(page.special().saturating_add(FLAGS))
}

fn set_flags(page: &mut Page, clear: u16, set: u16) {
    let flags = flags(page) & !clear | set;
    page.put_u16(page.special().saturating_add(FLAGS), flags);
}

fn set_meta(page: &mut Page, meta: &[u8]) -> Result<(), Corrupt> {
    init(page, GIN_META);
    page.set_lower(META_AT.saturating_add(META_BYTES));
    page.write(META_AT, meta)
}

fn append(page: &mut Page, tuples: &[u8], count: u32) -> Result<(), Corrupt> {
    let mut data = Reader::new(tuples);
    for _ in 0..count {
        page.insert_item(page.items().saturating_add(1), take_entry_unpadded(&mut data)?)?;
    }
    data.finish("tuples")
}

/// A block's number as two halves, the upper one first.
fn block_halves(block: BlockNumber) -> [u8; 4] {
    let [a, b, c, d] = block.to_le_bytes();
    [c, d, a, b]
}

fn insert(main: &mut Reader<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    check(page)?;
    let flags = main.u16("flags")?;
    let is_leaf = flags & IS_LEAF != 0;
    let mut right = BlockNumber::MAX;
    if !is_leaf {
        main.take(4, "left child")?;
        right = u32::from(main.u16("right child")?) << 16 | u32::from(main.u16("right child")?);
    }
    let mut data = Reader::new(block.data);
    match (flags & IS_DATA != 0, is_leaf) {
        (true, true) => recompress(page, &mut data),
        (true, false) => {
            let number = data.u16("offset")?;
            let item = data.take(POSTING_ITEM_BYTES, "newitem")?;
            // What pointed to the page that was split points to its right half now.
            let at = posting_item(page, number)?;
            page.write(at, &block_halves(right))?;
            insert_posting_item(page, number, item)
        }
        (false, _) => {
            let number = data.u16("offset")?;
            let replaces = data.u8("isDelete")? != 0;
            data.take(1, "padding")?;
            let entry = take_entry_unpadded(&mut data)?;
            if right != BlockNumber::MAX {
                let link = page.item_mut(number)?.get_mut(..6);
                let [a, b, c, d] = block_halves(right);
                link.ok_or(Corrupt::invalid("t_tid", 0, number.into()))?.copy_from_slice(&[a, b, c, d, 0, 0]);
            }
            if replaces {
                page.delete_item(number)?;
            }
            page.insert_item(number, entry)
        }
    }
}

fn posting_items(page: &Page) -> u16 {
    page.u16(page.special().saturating_add(MAXOFF))
}

/// Where an item of an inner page of a posting tree lies.
fn posting_item(page: &Page, number: u16) -> Result<usize, Corrupt> {
    let items = posting_items(page);
    if number == 0 || number > items {
        return Err(Corrupt::too_large("offset", 0, number.into(), items.into()));
    }
    let before = usize::from(number.saturating_sub(1)).saturating_mul(POSTING_ITEM_BYTES);
    Ok(ITEMS_AT.saturating_add(before))
}

/// Says how many items there are, and where they end.
fn set_posting_items(page: &mut Page, items: u16) -> Result<usize, Corrupt> {
    let end = ITEMS_AT.saturating_add(usize::from(items).saturating_mul(POSTING_ITEM_BYTES));
    if end > page.upper() {
        return Err(Corrupt::too_large("maxoff", 0, items.into(), page.upper() as u64));
    }
    page.put_u16(page.special().saturating_add(MAXOFF), items);
    page.set_lower(end);
    Ok(end)
}

fn insert_posting_item(page: &mut Page, number: u16, item: &[u8]) -> Result<(), Corrupt> {
    let at = posting_item(page, number)?;
    let items = posting_items(page);
    let end = posting_item(page, items)?.saturating_add(POSTING_ITEM_BYTES);
    set_posting_items(page, items.saturating_add(1))?;
    page.bytes_mut().copy_within(at..end, at.saturating_add(POSTING_ITEM_BYTES));
    page.write(at, item)
}

/// Blocks: the page that goes, its parent, its left neighbour.
fn delete_page(main: &mut Reader<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    check(page)?;
    let number = main.u16("parentOffset")?;
    main.take(2, "padding")?;
    let (right, xid) = (main.u32("rightLink")?, main.u32("deleteXid")?);
    match block.id {
        0 => {
            set_flags(page, 0, GIN_DELETED);
            page.put_u32(DELETE_XID, xid);
            Ok(())
        }
        1 => {
            let at = posting_item(page, number)?;
            let items = posting_items(page);
            let end = posting_item(page, items)?.saturating_add(POSTING_ITEM_BYTES);
            if end > page.upper() {
                return Err(Corrupt::too_large("maxoff", 0, items.into(), page.upper() as u64));
            }
            page.bytes_mut().copy_within(at.saturating_add(POSTING_ITEM_BYTES)..end, at);
            set_posting_items(page, items.saturating_sub(1)).map(|_| ())
        }
        _ => {
            page.put_u32(page.special().saturating_add(RIGHTLINK), right);
            Ok(())
        }
    }
}

/// Puts a leaf's lists of rows in place.
fn put_list(page: &mut Page, list: &[u8]) -> Result<(), Corrupt> {
    let end = ITEMS_AT.saturating_add(list.len());
    if end > page.upper() {
        return Err(Corrupt::too_large("GinPostingList", 0, list.len() as u64, page.upper() as u64));
    }
    page.set_lower(end);
    page.write(ITEMS_AT, list)
}

/// One list of rows as it is stored: the first row, how many bytes follow, the distances between the rows.
fn take_list<'a>(data: &mut Reader<'a>) -> Result<&'a [u8], Corrupt> {
    let mut ahead = data.clone();
    ahead.take(6, "first")?;
    let bytes = usize::from(ahead.u16("nbytes")?);
    data.take(bytes.saturating_add(9) & !1, "GinPostingList")
}

/// Changes a leaf's lists one by one.
fn recompress(page: &mut Page, data: &mut Reader<'_>) -> Result<(), Corrupt> {
    check(page)?;
    if flags(page) & GIN_COMPRESSED == 0 {
        // Leaves of indexes older than 9.4, which every change converts first.
        return Err(Corrupt::invalid("flags", page.special() as u64, flags(page).into()));
    }
    let before = page.bytes().get(ITEMS_AT..page.lower()).unwrap_or_default().to_vec();
    let mut lists = Reader::new(&before);
    let (mut made, mut at) = (Vec::with_capacity(before.len()), 0u16);
    let actions = data.u16("nactions")?;
    for _ in 0..actions {
        let (number, action) = (u16::from(data.u8("segno")?), data.u8("type")?);
        while at < number {
            made.extend_from_slice(take_list(&mut lists)?);
            at = at.saturating_add(1);
        }
        if action != SEGMENT_INSERT {
            at = at.saturating_add(1);
        }
        match action {
            SEGMENT_DELETE => {
                take_list(&mut lists)?;
            }
            SEGMENT_INSERT => made.extend_from_slice(take_list(data)?),
            SEGMENT_REPLACE => {
                take_list(&mut lists)?;
                made.extend_from_slice(take_list(data)?);
            }
            SEGMENT_ADDITEMS => {
                let count = data.u16("nitems")?;
                let added = (0..count).map(|_| take_row(data)).collect::<Result<Vec<_>, _>>()?;
                let mut rows = unpack(take_list(&mut lists)?)?;
                rows.extend(added);
                rows.sort_unstable();
                rows.dedup();
                made.extend(pack(&rows)?);
            }
            _ => return Err(Corrupt::invalid("type", data.position(), action.into())),
        }
    }
    made.extend_from_slice(lists.rest());
    put_list(page, &made)
}

/// A row's place as one number.
fn take_row(data: &mut Reader<'_>) -> Result<u64, Corrupt> {
    let block = u64::from(data.u16("ip_blkid")?) << 16 | u64::from(data.u16("ip_blkid")?);
    Ok(block << OFFSET_BITS | u64::from(data.u16("ip_posid")?))
}

/// The rows of a list: distances are written seven bits at a time, the lowest first.
fn unpack(list: &[u8]) -> Result<Vec<u64>, Corrupt> {
    let mut data = Reader::new(list);
    let mut row = take_row(&mut data)?;
    let bytes = data.u16("nbytes")?;
    let mut steps = Reader::new(data.take(bytes.into(), "bytes")?);
    let mut rows = vec![row];
    while !steps.is_empty() {
        row = row.saturating_add(steps.varint("bytes")?);
        rows.push(row);
    }
    Ok(rows)
}

#[allow(clippy::cast_possible_truncation)] // parts of a number
fn pack(rows: &[u64]) -> Result<Vec<u8>, Corrupt> {
    let first = rows.first().copied().unwrap_or(0);
    let mut steps = waltide_format::Writer::new();
    for pair in rows.windows(2) {
        if let [before, row] = pair {
            steps.varint(row.saturating_sub(*before));
        }
    }
    let bytes = u16::try_from(steps.len()).map_err(|_| Corrupt::invalid("nbytes", 6, steps.len() as u64))?;
    let mut list = block_halves((first >> OFFSET_BITS) as u32).to_vec();
    let number = (first & OFFSET_MASK) as u16;
    list.extend_from_slice(&number.to_le_bytes());
    list.extend_from_slice(&bytes.to_le_bytes());
    list.extend_from_slice(steps.as_bytes());
    list.resize(list.len().next_multiple_of(2), 0);
    Ok(list)
}
