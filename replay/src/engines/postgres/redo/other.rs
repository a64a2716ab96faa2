//! Records of sequences, and those that any access method may write: changed byte ranges.

use waltide_format::engines::postgres::wal::{Block, Record};
use waltide_format::{Corrupt, Reader};

use super::page::Page;

/// `SEQ_MAGIC`.
const SEQUENCE_MAGIC: u32 = 0x1717;
/// `RelFileNode`.
const LOCATOR_BYTES: usize = 12;

/// A sequence's page has one row and is written anew each time.
pub(super) fn sequence(record: &Record<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    main.take(LOCATOR_BYTES, "node")?;
    page.init(4);
    page.put_u32(page.special(), SEQUENCE_MAGIC);
    let at = page.place_heap_item(1, main.left())?;
    page.write(at, main.rest())
}

/// Ranges of bytes as they are now; the page's hole is zeros.
pub(super) fn generic(block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut data = Reader::new(block.data);
    while !data.is_empty() {
        let (at, length) = (data.u16("offset")?, data.u16("length")?);
        page.write(at.into(), data.take(length.into(), "delta")?)?;
    }
    page.check()?;
    let hole = page.lower()..page.upper();
    let broken = Corrupt::invalid("pd_lower", 12, hole.start as u64);
    page.bytes_mut().get_mut(hole).ok_or(broken)?.fill(0);
    Ok(())
}
