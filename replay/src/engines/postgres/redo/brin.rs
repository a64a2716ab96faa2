//! Records of BRIN indexes: summaries of block ranges, and the map from ranges to them.

use waltide_format::engines::postgres::wal::{Block, Record};
use waltide_format::{BlockNumber, Corrupt, Reader};

use super::page::{HEADER_BYTES, Page, tid};
use super::{Applied, unknown};

const OPMASK: u8 = 0x70;
const INIT_PAGE: u8 = 0x80;
const CREATE_INDEX: u8 = 0x00;
const INSERT: u8 = 0x10;
const UPDATE: u8 = 0x20;
const SAMEPAGE_UPDATE: u8 = 0x30;
const REVMAP_EXTEND: u8 = 0x40;
const DESUMMARIZE: u8 = 0x50;

/// `BrinSpecialSpace`, whose last two bytes are the page's type.
const SPECIAL_BYTES: usize = 8;
const TYPE_AT: usize = 6;
const META: u16 = 0xF091;
const REVMAP: u16 = 0xF092;
const REGULAR: u16 = 0xF093;
/// `BRIN_META_MAGIC`.
const META_MAGIC: u32 = 0xA810_9CFA;
/// `BrinMetaPageData`, and where `lastRevmapPage` lies in it.
const META_BYTES: usize = 16;
const LAST_REVMAP_PAGE: usize = 12;
/// `REVMAP_PAGE_MAXITEMS`.
const REVMAP_ITEMS: u32 = 1360;

/// Applies a record to one of its blocks.
pub(super) fn apply(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<Applied, Corrupt> {
    let mut main = Reader::new(record.main_data());
    let op = record.kind() & OPMASK;
    match (op, block.id) {
        (CREATE_INDEX, 0) => {
            let (range, version) = (main.u32("pagesPerRange")?, main.u16("version")?);
            init(page, META);
            for (at, field) in (HEADER_BYTES..).step_by(4).zip([META_MAGIC, version.into(), range, 0]) {
                page.put_u32(at, field);
            }
            page.set_lower(HEADER_BYTES.saturating_add(META_BYTES));
        }
        (UPDATE, 2) => page.delete_item_in_place(main.u16("oldOffnum")?)?,
        (INSERT | UPDATE, 0 | 1) => {
            if op == UPDATE {
                main.take(4, "oldOffnum")?;
            }
            let (heap, range) = (main.u32("heapBlk")?, main.u32("pagesPerRange")?);
            let number = main.u16("offnum")?;
            if block.id == 0 {
                if record.kind() & INIT_PAGE != 0 {
                    init(page, REGULAR);
                }
                page.put_index_item(number, block.data)?;
            } else {
                let regular = record.block(0).ok_or(Corrupt::invalid("block_id", 0, 0))?.block;
                set_summary(page, heap, range, tid(regular, number))?;
            }
        }
        (SAMEPAGE_UPDATE, 0) => page.replace_item(main.u16("offnum")?, block.data)?,
        (REVMAP_EXTEND, 0) => {
            page.check()?;
            page.put_u32(HEADER_BYTES.saturating_add(LAST_REVMAP_PAGE), main.u32("targetBlk")?);
            page.set_lower(HEADER_BYTES.saturating_add(META_BYTES));
        }
        (REVMAP_EXTEND, 1) => init(page, REVMAP),
        (DESUMMARIZE, 0 | 1) => {
            let (range, heap) = (main.u32("pagesPerRange")?, main.u32("heapBlk")?);
            if block.id == 0 {
                set_summary(page, heap, range, tid(BlockNumber::MAX, 0))?;
            } else {
                page.delete_item_in_place(main.u16("regOffset")?)?;
            }
        }
        _ => return Err(unknown(record)),
    }
    Ok(Applied::Changed)
}

fn init(page: &mut Page, kind: u16) {
    page.init(SPECIAL_BYTES);
    page.put_u16(page.special().saturating_add(TYPE_AT), kind);
}

/// Says on a page of the map where a range's summary lies.
fn set_summary(page: &mut Page, heap: BlockNumber, range: u32, at: [u8; 6]) -> Result<(), Corrupt> {
    page.check()?;
    let range = heap.checked_div(range).ok_or(Corrupt::invalid("pagesPerRange", 0, 0))?;
    let place = (range % REVMAP_ITEMS) as usize;
    page.write(HEADER_BYTES.saturating_add(place.saturating_mul(6)), &at)
}
