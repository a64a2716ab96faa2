//! Records of B-tree indexes.

use waltide_format::engines::postgres::wal::{Block, Record};
use waltide_format::{BlockNumber, Corrupt, Reader};

use super::page::{HEADER_BYTES, Page};
use super::posting::{self, Entry, take_entry};
use super::{Applied, unknown};

const INSERT_LEAF: u8 = 0x00;
const INSERT_UPPER: u8 = 0x10;
const INSERT_META: u8 = 0x20;
const SPLIT_L: u8 = 0x30;
const SPLIT_R: u8 = 0x40;
const INSERT_POST: u8 = 0x50;
const DEDUP: u8 = 0x60;
const DELETE: u8 = 0x70;
const UNLINK_PAGE: u8 = 0x80;
const UNLINK_PAGE_META: u8 = 0x90;
const NEWROOT: u8 = 0xA0;
const MARK_PAGE_HALFDEAD: u8 = 0xB0;
const VACUUM: u8 = 0xC0;
const REUSE_PAGE: u8 = 0xD0;
const META_CLEANUP: u8 = 0xE0;

/// `BTPageOpaqueData`.
const OPAQUE_BYTES: usize = 16;
const BTPO_PREV: usize = 0;
const BTPO_NEXT: usize = 4;
const BTPO_LEVEL: usize = 8;
const BTPO_FLAGS: usize = 12;
const BTPO_CYCLEID: usize = 14;

const BTP_LEAF: u16 = 1;
const BTP_ROOT: u16 = 2;
const BTP_DELETED: u16 = 4;
const BTP_META: u16 = 8;
const BTP_HALF_DEAD: u16 = 16;
const BTP_HAS_GARBAGE: u16 = 64;
const BTP_INCOMPLETE_SPLIT: u16 = 128;
const BTP_HAS_FULLXID: u16 = 256;

/// `P_NONE`.
const NONE: BlockNumber = 0;
/// `P_HIKEY`.
const HIGH_KEY: u16 = 1;
/// `BTREE_MAGIC`.
const META_MAGIC: u32 = 0x0005_3162;
/// `BTMetaPageData`.
const META_BYTES: usize = 48;

/// Applies a record to one of its blocks.
pub(super) fn apply(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<Applied, Corrupt> {
    let done = match (record.kind(), block.id) {
        (INSERT_LEAF | INSERT_UPPER | INSERT_META, 0) => insert(record, block, page),
        (INSERT_POST, 0) => insert_post(record, block, page),
        (INSERT_UPPER | INSERT_META | NEWROOT, 1) | (SPLIT_L | SPLIT_R, 3) => {
            page.check_btree()?;
            page.set_flags(BTP_INCOMPLETE_SPLIT, 0);
            Ok(())
        }
        (INSERT_META | NEWROOT, 2) | (UNLINK_PAGE_META, 4) | (META_CLEANUP, 0) => meta(block, page),
        (SPLIT_L | SPLIT_R, 0) => split_left(record, block, page),
        (SPLIT_L | SPLIT_R, 1) => split_right(record, block, page),
        (SPLIT_L | SPLIT_R, 2) => {
            let right = record.block(1).ok_or(Corrupt::invalid("block_id", 0, 1))?.block;
            page.relink(BTPO_PREV, right)
        }
        (DEDUP, 0) => dedup(record, block, page),
        (VACUUM, 0) => vacuum(record, block, page),
        (DELETE, 0) => delete(record, block, page),
        (MARK_PAGE_HALFDEAD, 0) => half_dead(record, page),
        (MARK_PAGE_HALFDEAD, 1) => half_dead_parent(record, page),
        (UNLINK_PAGE | UNLINK_PAGE_META, 0..=3) => unlink(record, block, page),
        (NEWROOT, 0) => new_root(record, block, page),
        (REUSE_PAGE, _) => return Ok(Applied::Nothing),
        _ => Err(unknown(record)),
    };
    done.map(|()| Applied::Changed)
}

/// The special space of a B-tree's page.
trait BtreePage {
    fn opaque(&self) -> usize;
    fn check_btree(&self) -> Result<(), Corrupt>;
    fn btree_flags(&self) -> u16;
    fn set_flags(&mut self, clear: u16, set: u16);
    fn relink(&mut self, side: usize, to: BlockNumber) -> Result<(), Corrupt>;
    fn first_data_key(&self) -> u16;
    fn init_btree(&mut self, prev: BlockNumber, next: BlockNumber, level: u32, flags: u16);
    fn restore_items(&mut self, items: &[u8]) -> Result<(), Corrupt>;
}

impl BtreePage for Page {
    fn opaque(&self) -> usize {
        self.special()
    }

    fn check_btree(&self) -> Result<(), Corrupt> {
        self.check_items()?;
        self.check_special(OPAQUE_BYTES)
    }

    fn btree_flags(&self) -> u16 {
        self.u16(self.opaque().saturating_add(BTPO_FLAGS))
    }

    fn set_flags(&mut self, clear: u16, set: u16) {
        let flags = self.btree_flags() & !clear | set;
        self.put_u16(self.opaque().saturating_add(BTPO_FLAGS), flags);
    }

    fn relink(&mut self, side: usize, to: BlockNumber) -> Result<(), Corrupt> {
        self.check_btree()?;
        self.put_u32(self.opaque().saturating_add(side), to);
        Ok(())
    }

    /// The rightmost page has no high key.
    fn first_data_key(&self) -> u16 {
        if self.u32(self.opaque().saturating_add(BTPO_NEXT)) == NONE { HIGH_KEY } else { 2 }
    }

    fn init_btree(&mut self, prev: BlockNumber, next: BlockNumber, level: u32, flags: u16) {
        self.init(OPAQUE_BYTES);
        let opaque = self.opaque();
        self.put_u32(opaque.saturating_add(BTPO_PREV), prev);
        self.put_u32(opaque.saturating_add(BTPO_NEXT), next);
        self.put_u32(opaque.saturating_add(BTPO_LEVEL), level);
        self.set_flags(0, flags);
    }

    /// Items as they lay on a page, the last one first.
    fn restore_items(&mut self, items: &[u8]) -> Result<(), Corrupt> {
        let mut data = Reader::new(items);
        let mut found = Vec::new();
        while !data.is_empty() {
            found.push(take_entry(&mut data)?);
        }
        for (number, item) in (1u16..).zip(found.iter().rev()) {
            self.insert_item(number, item)?;
        }
        Ok(())
    }
}

fn insert(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    page.check_btree()?;
    page.insert_item(Reader::new(record.main_data()).u16("offnum")?, block.data)
}

/// The new entry falls into the rows of an entry that has many: it takes the place of one of them, which moves on.
fn insert_post(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    page.check_btree()?;
    let number = Reader::new(record.main_data()).u16("offnum")?;
    let mut data = Reader::new(block.data);
    let at = data.u16("postingoff")?;
    let mut entry = data.rest().to_vec();
    let before = number.saturating_sub(1);
    let swapped = posting::swap(&mut entry, page.item(before)?, at)?;
    let place = page.item_mut(before)?;
    place.get_mut(..swapped.len()).ok_or(too_long(&swapped))?.copy_from_slice(&swapped);
    page.insert_item(number, &entry)
}

fn too_long(entry: &[u8]) -> Corrupt {
    Corrupt::invalid("IndexTuple", 0, entry.len() as u64)
}

fn meta(block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut data = Reader::new(block.data);
    let fields: [u32; 6] = [
        data.u32("version")?,
        data.u32("root")?,
        data.u32("level")?,
        data.u32("fastroot")?,
        data.u32("fastlevel")?,
        data.u32("last_cleanup_num_delpages")?,
    ];
    let all_equal_image = data.u8("allequalimage")?;
    page.init_btree(NONE, NONE, 0, BTP_META);
    page.put_u32(HEADER_BYTES, META_MAGIC);
    for (at, field) in (28usize..).step_by(4).zip(fields) {
        page.put_u32(at, field);
    }
    // last_cleanup_num_heap_tuples is no longer kept.
    page.write(56, &(-1.0f64).to_le_bytes())?;
    page.write(64, &[all_equal_image])?;
    page.set_lower(HEADER_BYTES.saturating_add(META_BYTES));
    Ok(())
}

/// `xl_btree_split`.
struct Split {
    level: u32,
    first_right: u16,
    new_item: u16,
    posting: u16,
}

impl Split {
    fn read(record: &Record<'_>) -> Result<Self, Corrupt> {
        let mut main = Reader::new(record.main_data());
        Ok(Self {
            level: main.u32("level")?,
            first_right: main.u16("firstrightoff")?,
            new_item: main.u16("newitemoff")?,
            posting: main.u16("postingoff")?,
        })
    }

    const fn leaf(&self) -> u16 {
        if self.level == 0 { BTP_LEAF } else { 0 }
    }
}

fn split_right(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let split = Split::read(record)?;
    let left = record.block(0).ok_or(Corrupt::invalid("block_id", 0, 0))?.block;
    let next = record.block(2).map_or(NONE, |sibling| sibling.block);
    page.init_btree(left, next, split.level, split.leaf());
    page.restore_items(block.data)
}

fn split_left(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    page.check_btree()?;
    let split = Split::read(record)?;
    let right = record.block(1).ok_or(Corrupt::invalid("block_id", 0, 1))?.block;
    let on_left = record.kind() == SPLIT_L;
    let mut data = Reader::new(block.data);
    let mut new_item = Vec::new();
    let mut replaced = None;
    if on_left || split.posting != 0 {
        new_item = take_entry(&mut data)?.to_vec();
    }
    if split.posting != 0 {
        let number = split.new_item.saturating_sub(1);
        replaced = Some((number, posting::swap(&mut new_item, page.item(number)?, split.posting)?));
    }
    let high_key = take_entry(&mut data)?;
    let mut left = page.clone();
    left.init_btree(0, 0, 0, 0);
    left.insert_item(HIGH_KEY, high_key)?;
    let mut next = HIGH_KEY;
    let mut add = |item: &[u8]| {
        next = next.saturating_add(1);
        left.insert_item(next, item)
    };
    for number in page.first_data_key()..split.first_right {
        match &replaced {
            Some((at, entry)) if *at == number => {
                add(entry)?;
                continue;
            }
            _ => {}
        }
        if on_left && number == split.new_item {
            add(&new_item)?;
        }
        add(page.item(number)?)?;
    }
    if on_left && split.first_right == split.new_item {
        add(&new_item)?;
    }
    let opaque = page.bytes().get(page.opaque()..).unwrap_or_default().to_vec();
    left.write(left.opaque(), &opaque)?;
    left.set_flags(u16::MAX, BTP_INCOMPLETE_SPLIT | split.leaf());
    let at = left.opaque();
    left.put_u32(at.saturating_add(BTPO_NEXT), right);
    left.put_u16(at.saturating_add(BTPO_CYCLEID), 0);
    page.replace_with(left)
}

fn dedup(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    page.check_btree()?;
    let count = Reader::new(record.main_data()).u16("nintervals")?;
    let mut data = Reader::new(block.data);
    let mut intervals = Vec::new();
    for _ in 0..count {
        intervals.push((data.u16("baseoff")?, data.u16("nitems")?));
    }
    data.finish("intervals")?;
    let mut intervals = intervals.into_iter().peekable();
    let mut new = page.clone();
    new.init_btree(0, 0, 0, 0);
    let first = page.first_data_key();
    let mut next = 0u16;
    let mut add = |item: &[u8]| {
        next = next.saturating_add(1);
        new.insert_item(next, item)
    };
    if first > HIGH_KEY {
        add(page.item(HIGH_KEY)?)?;
    }
    let mut number = first;
    while number <= page.items() {
        let merged = intervals.next_if(|(base, _)| *base == number).map_or(1, |(_, items)| items.max(1));
        let base = page.item(number)?;
        if merged == 1 {
            add(base)?;
        } else {
            let mut rows = Vec::new();
            for number in number..number.saturating_add(merged) {
                Entry(page.item(number)?).rows(&mut rows)?;
            }
            add(&posting::form(base, &rows)?)?;
        }
        number = number.saturating_add(merged);
    }
    if let Some((base, _)) = intervals.next() {
        return Err(Corrupt::invalid("baseoff", 0, base.into()));
    }
    let opaque = page.bytes().get(page.opaque()..).unwrap_or_default().to_vec();
    new.write(new.opaque(), &opaque)?;
    new.set_flags(BTP_HAS_GARBAGE, 0);
    page.replace_with(new)
}

fn vacuum(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    let (deleted, updated) = (main.u16("ndeleted")?, main.u16("nupdated")?);
    take_out(block, page, deleted, updated)
}

fn delete(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    main.u32("latestRemovedXid")?;
    let (deleted, updated) = (main.u16("ndeleted")?, main.u16("nupdated")?);
    take_out(block, page, deleted, updated)
}

/// Takes whole entries out, and single rows out of entries that have many.
fn take_out(block: &Block<'_>, page: &mut Page, deleted: u16, updated: u16) -> Result<(), Corrupt> {
    page.check_btree()?;
    let mut data = Reader::new(block.data);
    let mut numbers = |count: u16, field| (0..count).map(|_| data.u16(field)).collect::<Result<Vec<_>, _>>();
    let deleted = numbers(deleted, "deleted")?;
    let updated = numbers(updated, "updated")?;
    for number in updated {
        let count = data.u16("ndeletedtids")?;
        let rows = (0..count).map(|_| data.u16("deletedtids")).collect::<Result<Vec<_>, _>>()?;
        let entry = posting::without(page.item(number)?, &rows)?;
        page.replace_item(number, &entry)?;
    }
    data.finish("deletedtids")?;
    if !deleted.is_empty() {
        page.delete_items(&deleted)?;
    }
    page.set_flags(BTP_HAS_GARBAGE, 0);
    Ok(())
}

/// `xl_btree_mark_page_halfdead`.
struct HalfDead {
    parent_item: u16,
    left: BlockNumber,
    right: BlockNumber,
    top_parent: BlockNumber,
}

impl HalfDead {
    fn read(record: &Record<'_>) -> Result<Self, Corrupt> {
        let mut main = Reader::new(record.main_data());
        let parent_item = main.u16("poffset")?;
        main.take(2, "padding")?;
        main.u32("leafblk")?;
        Ok(Self {
            parent_item,
            left: main.u32("leftblk")?,
            right: main.u32("rightblk")?,
            top_parent: main.u32("topparent")?,
        })
    }
}

fn half_dead(record: &Record<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let dead = HalfDead::read(record)?;
    half_dead_leaf(page, dead.left, dead.right, dead.top_parent)
}

/// A leaf that is to go: its only item is a key that says up to which page its parents go with it.
fn half_dead_leaf(
    page: &mut Page,
    left: BlockNumber,
    right: BlockNumber,
    top_parent: BlockNumber,
) -> Result<(), Corrupt> {
    page.init_btree(left, right, 0, BTP_HALF_DEAD | BTP_LEAF);
    page.insert_item(HIGH_KEY, &posting::top_parent(top_parent))
}

/// The page's own downlink becomes its right neighbour's, whose entry goes.
fn half_dead_parent(record: &Record<'_>, page: &mut Page) -> Result<(), Corrupt> {
    page.check_btree()?;
    let number = HalfDead::read(record)?.parent_item;
    let next = number.saturating_add(1);
    let right = Entry(page.item(next)?).downlink()?;
    let place = page.item_mut(number)?.get_mut(..4).ok_or(Corrupt::invalid("t_tid", 0, 0))?;
    place.copy_from_slice(&right);
    page.delete_item(next)
}

/// `xl_btree_unlink_page`, since 14.
fn unlink(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    let (left, right, level) = (main.u32("leftsib")?, main.u32("rightsib")?, main.u32("level")?);
    main.take(4, "padding")?;
    let safe_xid = main.u64("safexid")?;
    let (leaf_left, leaf_right) = (main.u32("leafleftsib")?, main.u32("leafrightsib")?);
    let top_parent = main.u32("leaftopparent")?;
    match block.id {
        1 => page.relink(BTPO_NEXT, right),
        2 => page.relink(BTPO_PREV, left),
        3 => half_dead_leaf(page, leaf_left, leaf_right, top_parent),
        _ => {
            let leaf = if level == 0 { BTP_LEAF } else { 0 };
            page.init_btree(left, right, level, BTP_DELETED | BTP_HAS_FULLXID | leaf);
            // What is left of it says from when on it may be used again.
            page.write(HEADER_BYTES, &safe_xid.to_le_bytes())?;
            page.set_lower(HEADER_BYTES.saturating_add(8));
            Ok(())
        }
    }
}

fn new_root(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    main.u32("rootblk")?;
    let level = main.u32("level")?;
    let leaf = if level == 0 { BTP_LEAF } else { 0 };
    page.init_btree(NONE, NONE, level, BTP_ROOT | leaf);
    if level > 0 { page.restore_items(block.data) } else { Ok(()) }
}
