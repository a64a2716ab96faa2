//! Records of hash indexes.

use waltide_format::engines::postgres::wal::{Block, Record};
use waltide_format::{BlockNumber, Corrupt, Reader};

use super::page::{HEADER_BYTES, Page};
use super::posting::take_entry;
use super::{Applied, unknown};

const INIT_META_PAGE: u8 = 0x00;
const INIT_BITMAP_PAGE: u8 = 0x10;
const INSERT: u8 = 0x20;
const ADD_OVFL_PAGE: u8 = 0x30;
const SPLIT_ALLOCATE_PAGE: u8 = 0x40;
const SPLIT_COMPLETE: u8 = 0x60;
const MOVE_PAGE_CONTENTS: u8 = 0x70;
const SQUEEZE_PAGE: u8 = 0x80;
const DELETE: u8 = 0x90;
const SPLIT_CLEANUP: u8 = 0xA0;
const UPDATE_META_PAGE: u8 = 0xB0;
const VACUUM_ONE_PAGE: u8 = 0xC0;

/// `HashPageOpaqueData`.
const OPAQUE_BYTES: usize = 16;
const PREVBLKNO: usize = 0;
const NEXTBLKNO: usize = 4;
const BUCKET: usize = 8;
const FLAG: usize = 12;
const PAGE_ID: usize = 14;
const HASHO_PAGE_ID: u16 = 0xFF80;

const LH_OVERFLOW_PAGE: u16 = 1;
const LH_BITMAP_PAGE: u16 = 4;
const LH_META_PAGE: u16 = 8;
const LH_BUCKET_NEEDS_SPLIT_CLEANUP: u16 = 64;
const LH_PAGE_HAS_DEAD_TUPLES: u16 = 128;

/// `HashMetaPageData`, behind the page's header.
mod meta {
    pub(super) const MAGIC: usize = 24;
    pub(super) const VERSION: usize = 28;
    pub(super) const NTUPLES: usize = 32;
    pub(super) const FFACTOR: usize = 40;
    pub(super) const BSIZE: usize = 42;
    pub(super) const BMSIZE: usize = 44;
    pub(super) const BMSHIFT: usize = 46;
    pub(super) const MAXBUCKET: usize = 48;
    pub(super) const HIGHMASK: usize = 52;
    pub(super) const LOWMASK: usize = 56;
    pub(super) const OVFLPOINT: usize = 60;
    pub(super) const FIRSTFREE: usize = 64;
    pub(super) const NMAPS: usize = 68;
    pub(super) const PROCID: usize = 72;
    pub(super) const SPARES: usize = 76;
    pub(super) const MAPP: usize = 468;
    /// Where it ends, padding included.
    pub(super) const END: usize = 4568;
    pub(super) const SPLITPOINTS_MAX: u32 = 98;
    pub(super) const BITMAPS_MAX: u32 = 1024;
}

/// `XLH_SPLIT_META_UPDATE_*`.
const UPDATES_MASKS: u8 = 1;
const UPDATES_SPLITPOINT: u8 = 2;

/// Applies a record to one of its blocks.
pub(super) fn apply(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<Applied, Corrupt> {
    let mut main = Reader::new(record.main_data());
    match (record.kind(), block.id) {
        (INIT_META_PAGE, 0) => init_meta(&mut main, page)?,
        (INIT_BITMAP_PAGE, 0) => init_bitmap(page, main.u16("bmsize")?)?,
        (INIT_BITMAP_PAGE, 1) => {
            check(page)?;
            let buckets = page.u32(meta::MAXBUCKET).saturating_add(1);
            add_map(page, buckets.saturating_add(1))?;
        }
        (INSERT, 0) => {
            check(page)?;
            page.insert_item(main.u16("offnum")?, block.data)?;
        }
        (INSERT, 1) => add_tuples(page, 1.0)?,
        (ADD_OVFL_PAGE, 0..=4) => add_overflow(record, block, page)?,
        (SPLIT_ALLOCATE_PAGE, 0..=2) => split_allocate(record, block, page)?,
        (SPLIT_COMPLETE, 0 | 1) => {
            check(page)?;
            let old = main.u16("old_bucket_flag")?;
            let flag = if block.id == 0 { old } else { main.u16("new_bucket_flag")? };
            page.put_u16(page.special().saturating_add(FLAG), flag);
        }
        // Held for its lock only.
        (MOVE_PAGE_CONTENTS | SQUEEZE_PAGE | DELETE, 0) => return Ok(Applied::Nothing),
        (MOVE_PAGE_CONTENTS, 1) => take_in(block, page, main.u16("ntups")?)?,
        (MOVE_PAGE_CONTENTS, 2) => take_out(page, block.data)?,
        (SQUEEZE_PAGE, 1..=6) => squeeze(&mut main, block, page)?,
        (DELETE, 1) => {
            take_out(page, block.data)?;
            if main.u8("clear_dead_marking")? != 0 {
                set_flags(page, LH_PAGE_HAS_DEAD_TUPLES);
            }
        }
        (SPLIT_CLEANUP, 0) => {
            check(page)?;
            set_flags(page, LH_BUCKET_NEEDS_SPLIT_CLEANUP);
        }
        (UPDATE_META_PAGE, 0) => {
            check(page)?;
            page.write(meta::NTUPLES, main.take(8, "ntuples")?)?;
        }
        (VACUUM_ONE_PAGE, 0 | 1) => vacuum(&mut main, block, page)?,
        _ => return Err(unknown(record)),
    }
    Ok(Applied::Changed)
}

/// Whether the record changes this block even after it was restored from an image: the change is not in the image.
pub(super) const fn edits_image(kind: u8, id: u8) -> bool {
    matches!((kind, id), (SPLIT_ALLOCATE_PAGE, 0) | (SPLIT_COMPLETE, 0 | 1))
}

fn check(page: &Page) -> Result<(), Corrupt> {
    page.check()?;
    page.check_special(OPAQUE_BYTES)
}

fn set_flags(page: &mut Page, clear: u16) {
    let at = page.special().saturating_add(FLAG);
    page.put_u16(at, page.u16(at) & !clear);
}

fn init(page: &mut Page, prev: BlockNumber, bucket: u32, flag: u16) {
    page.init(OPAQUE_BYTES);
    let opaque = page.special();
    page.put_u32(opaque.saturating_add(PREVBLKNO), prev);
    page.put_u32(opaque.saturating_add(NEXTBLKNO), BlockNumber::MAX);
    page.put_u32(opaque.saturating_add(BUCKET), bucket);
    page.put_u16(opaque.saturating_add(FLAG), flag);
    page.put_u16(opaque.saturating_add(PAGE_ID), HASHO_PAGE_ID);
}

/// The group of buckets that is added at a time: powers of two up to 512, then quarters of them.
fn splitpoint(buckets: u32) -> u32 {
    let group = buckets.max(1).next_power_of_two().trailing_zeros();
    if group < 10 {
        return group;
    }
    let phase = (buckets.saturating_sub(1) >> group.saturating_sub(3)) & 3;
    group.saturating_sub(10).saturating_mul(4).saturating_add(10).saturating_add(phase)
}

/// How many buckets there are once a group has been added.
fn buckets_at(splitpoint: u32) -> u32 {
    if splitpoint < 10 {
        return 1 << splitpoint;
    }
    let above = splitpoint.saturating_sub(10);
    let half = 1u32.checked_shl(above.saturating_div(4).saturating_add(9)).unwrap_or(0);
    half.saturating_add((half >> 2).saturating_mul((above & 3).saturating_add(1)))
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // between 2 and 2^30
fn init_meta(main: &mut Reader<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let tuples = f64::from_bits(main.u64("num_tuples")?);
    let (procid, fill) = (main.u32("procid")?, main.u16("ffactor")?);
    let wanted = tuples / f64::from(fill);
    let buckets =
        if wanted > 2.0 { buckets_at(splitpoint(wanted.min(f64::from(0x4000_0000)) as u32)) } else { 2 };
    let point = splitpoint(buckets);
    let high = buckets.saturating_add(1).next_power_of_two().saturating_sub(1);
    init(page, BlockNumber::MAX, u32::MAX, LH_META_PAGE);
    for (at, v) in [
        (meta::MAGIC, 0x0644_0640),
        (meta::VERSION, 4),
        (meta::MAXBUCKET, buckets.saturating_sub(1)),
        (meta::HIGHMASK, high),
        (meta::LOWMASK, high >> 1),
        (meta::OVFLPOINT, point),
        (meta::PROCID, procid),
    ] {
        page.put_u32(at, v);
    }
    // The room of a page, and the power of two below it as bytes and as a shift of bits.
    for (at, v) in [(meta::FFACTOR, fill), (meta::BSIZE, 8152), (meta::BMSIZE, 4096), (meta::BMSHIFT, 15)] {
        page.put_u16(at, v);
    }
    page.put_u32(spare(point)?, 1);
    page.set_lower(meta::END);
    Ok(())
}

/// Where the metapage counts the overflow pages of a splitpoint.
fn spare(point: u32) -> Result<usize, Corrupt> {
    if point >= meta::SPLITPOINTS_MAX {
        return Err(Corrupt::too_large("hashm_ovflpoint", 0, point.into(), meta::SPLITPOINTS_MAX.into()));
    }
    Ok(meta::SPARES.saturating_add((point as usize).saturating_mul(4)))
}

fn init_bitmap(page: &mut Page, bytes: u16) -> Result<(), Corrupt> {
    init(page, BlockNumber::MAX, u32::MAX, LH_BITMAP_PAGE);
    let end = HEADER_BYTES.saturating_add(bytes.into());
    let too_large = Corrupt::too_large("bmsize", 0, bytes.into(), page.special() as u64);
    let special = page.special();
    let bits = page.bytes_mut().get_mut(HEADER_BYTES..end).filter(|_| end <= special).ok_or(too_large)?;
    bits.fill(0xFF);
    page.set_lower(end);
    Ok(())
}

/// One more bitmap page in the metapage's list.
fn add_map(page: &mut Page, block: BlockNumber) -> Result<(), Corrupt> {
    let maps = page.u32(meta::NMAPS);
    if maps >= meta::BITMAPS_MAX {
        let max = meta::BITMAPS_MAX.into();
        return Err(Corrupt::too_large("hashm_nmaps", meta::NMAPS as u64, maps.into(), max));
    }
    page.put_u32(meta::MAPP.saturating_add((maps as usize).saturating_mul(4)), block);
    page.put_u32(meta::NMAPS, maps.saturating_add(1));
    Ok(())
}

fn add_tuples(page: &mut Page, count: f64) -> Result<(), Corrupt> {
    check(page)?;
    let halves = [page.u32(meta::NTUPLES), page.u32(meta::NTUPLES.saturating_add(4))].map(u64::from);
    let before = f64::from_bits(halves[0] | halves[1] << 32);
    page.write(meta::NTUPLES, &(before + count).to_le_bytes())
}

/// Sets or clears a bit of a bitmap page.
fn set_bit(page: &mut Page, bit: u32, set: bool) -> Result<(), Corrupt> {
    check(page)?;
    let at = HEADER_BYTES.saturating_add(((bit >> 5) as usize).saturating_mul(4));
    if at >= page.lower() {
        return Err(Corrupt::too_large("bitmap_page_bit", 0, bit.into(), page.lower() as u64));
    }
    let mask = 1 << (bit & 31);
    let word = page.u32(at);
    page.put_u32(at, if set { word | mask } else { word & !mask });
    Ok(())
}

/// Blocks: the new page, the one before it, the bitmap page, a new bitmap page, the metapage.
fn add_overflow(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    let (bytes, found) = (main.u16("bmsize")?, main.u8("bmpage_found")? != 0);
    let mut data = Reader::new(block.data);
    let number = |id| record.block(id).map(|b| b.block).ok_or(Corrupt::invalid("block_id", 0, id.into()));
    match block.id {
        0 => init(page, number(1)?, data.u32("num_bucket")?, LH_OVERFLOW_PAGE),
        1 => {
            check(page)?;
            page.put_u32(page.special().saturating_add(NEXTBLKNO), number(0)?);
        }
        2 => set_bit(page, data.u32("bitmap_page_bit")?, true)?,
        3 => init_bitmap(page, bytes)?,
        _ => {
            check(page)?;
            page.put_u32(meta::FIRSTFREE, data.u32("firstfree")?);
            if !found {
                let spare = spare(page.u32(meta::OVFLPOINT))?;
                let mut pages = 1;
                if let Some(map) = record.block(3) {
                    add_map(page, map.block)?;
                    pages = 2;
                }
                page.put_u32(spare, page.u32(spare).wrapping_add(pages));
            }
        }
    }
    Ok(())
}

/// Blocks: the bucket that is split, the new one, the metapage.
fn split_allocate(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    let bucket = main.u32("new_bucket")?;
    let (old_flag, new_flag) = (main.u16("old_bucket_flag")?, main.u16("new_bucket_flag")?);
    let flags = main.u8("flags")?;
    match block.id {
        0 => {
            check(page)?;
            let opaque = page.special();
            page.put_u16(opaque.saturating_add(FLAG), old_flag);
            page.put_u32(opaque.saturating_add(PREVBLKNO), bucket);
        }
        1 => init(page, bucket, bucket, new_flag),
        _ => {
            check(page)?;
            let mut data = Reader::new(block.data);
            page.put_u32(meta::MAXBUCKET, bucket);
            if flags & UPDATES_MASKS != 0 {
                page.put_u32(meta::LOWMASK, data.u32("lowmask")?);
                page.put_u32(meta::HIGHMASK, data.u32("highmask")?);
            }
            if flags & UPDATES_SPLITPOINT != 0 {
                let (point, pages) = (data.u32("ovflpoint")?, data.u32("ovflpages")?);
                page.put_u32(spare(point)?, pages);
                page.put_u32(meta::OVFLPOINT, point);
            }
        }
    }
    Ok(())
}

/// Entries from another page, each with the place it takes.
fn take_in(block: &Block<'_>, page: &mut Page, count: u16) -> Result<(), Corrupt> {
    check(page)?;
    let mut data = Reader::new(block.data);
    let places = (0..count).map(|_| data.u16("towrite")).collect::<Result<Vec<_>, _>>()?;
    for place in places {
        page.insert_item(place, take_entry(&mut data)?)?;
    }
    data.finish("tuples")
}

fn take_out(page: &mut Page, data: &[u8]) -> Result<(), Corrupt> {
    check(page)?;
    let mut data = Reader::new(data);
    let mut numbers = Vec::new();
    while !data.is_empty() {
        numbers.push(data.u16("offnum")?);
    }
    page.delete_items(&numbers)
}

/// Blocks: (the bucket), the page that takes entries in, the one that is freed, those before and behind it, the bitmap
/// page, the metapage.
fn squeeze(main: &mut Reader<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let (prev, next) = (main.u32("prevblkno")?, main.u32("nextblkno")?);
    let count = main.u16("ntups")?;
    main.u8("is_prim_bucket_same_wrt")?;
    let is_prev = main.u8("is_prev_bucket_same_wrt")? != 0;
    let mut data = Reader::new(block.data);
    let relink = |page: &mut Page, side: usize, to| {
        check(page)?;
        page.put_u32(page.special().saturating_add(side), to);
        Ok(())
    };
    match block.id {
        1 => {
            take_in(block, page, count)?;
            if is_prev { relink(page, NEXTBLKNO, next) } else { Ok(()) }
        }
        2 => {
            init(page, BlockNumber::MAX, u32::MAX, 0);
            Ok(())
        }
        3 => relink(page, NEXTBLKNO, next),
        4 => relink(page, PREVBLKNO, prev),
        5 => set_bit(page, data.u32("bitmap_page_bit")?, false),
        _ => {
            check(page)?;
            page.put_u32(meta::FIRSTFREE, data.u32("firstfree")?);
            Ok(())
        }
    }
}

/// `xl_hash_vacuum_one_page` up to 15, the entries' numbers behind it.
fn vacuum(main: &mut Reader<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    main.u32("latestRemovedXid")?;
    let count = main.u32("ntuples")?;
    if block.id == 1 {
        return add_tuples(page, -f64::from(count));
    }
    take_out(page, main.rest())?;
    set_flags(page, LH_PAGE_HAS_DEAD_TUPLES);
    Ok(())
}
