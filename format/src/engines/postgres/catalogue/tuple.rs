//! Rows as they lie in a heap page. Layout: docs/wal.md, "Catalogues".

use crate::engines::postgres::cluster::data_page::{HEADER_BYTES, Page, is_new};
use crate::error::Corrupt;
use crate::ids::{BLOCK_BYTES, BlockNumber, Xid};
use crate::reader::Reader;

/// `SizeofHeapTupleHeader`: where the null bitmap starts.
pub(super) const TUPLE_HEADER_BYTES: usize = 23;
/// `sizeof(ItemIdData)`.
const LINE_POINTER_BYTES: usize = 4;
/// `LP_NORMAL`: the line pointer leads to a row.
const LP_NORMAL: u32 = 1;

const XMIN_COMMITTED: u16 = 0x0100;
const XMIN_INVALID: u16 = 0x0200;
const XMAX_COMMITTED: u16 = 0x0400;
const XMAX_INVALID: u16 = 0x0800;
const XMAX_IS_MULTI: u16 = 0x1000;
const XMAX_LOCK_ONLY: u16 = 0x0080;

/// A row's place in its file: `ctid`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TupleId {
    /// The block.
    pub block: BlockNumber,
    /// The line pointer in it, from 1.
    pub offset: u16,
}

/// What a row's header says of the transaction that made or ended it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Hint {
    /// It committed.
    Committed,
    /// It did not commit.
    Aborted,
    /// Nothing.
    Unknown,
}

impl Hint {
    /// The number that stands for it in the archive.
    pub(super) const fn code(self) -> u8 {
        match self {
            Self::Unknown => 0,
            Self::Committed => 1,
            Self::Aborted => 2,
        }
    }

    pub(super) const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Unknown),
            1 => Some(Self::Committed),
            2 => Some(Self::Aborted),
            _ => None,
        }
    }
}

/// A version of a row, as it lies in a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeapTuple {
    /// The transaction that made it.
    pub xmin: Xid,
    /// What is known of that transaction.
    pub xmin_hint: Hint,
    /// The transaction that deleted or replaced it; none where it was only locked, or by several, or where that is
    /// known not to have committed.
    pub xmax: Option<Xid>,
    /// What else is known of that transaction.
    pub xmax_hint: Hint,
    /// The columns: what lies behind the header, the null bitmap and the padding.
    pub body: Vec<u8>,
}

impl HeapTuple {
    fn decode(bytes: &[u8], at: u64) -> Result<Self, Corrupt> {
        let r = &mut Reader::with_base(bytes, at);
        let xmin = r.u32("t_xmin")?.into();
        let xmax = r.u32("t_xmax")?.into();
        r.take(4, "t_cid")?;
        r.take(6, "t_ctid")?;
        r.u16("t_infomask2")?;
        let infomask = r.u16("t_infomask")?;
        let hoff_at = r.position();
        let hoff = usize::from(r.u8("t_hoff")?);
        if hoff < TUPLE_HEADER_BYTES {
            return Err(Corrupt::invalid("t_hoff", hoff_at, hoff as u64));
        }
        r.take(hoff.saturating_sub(TUPLE_HEADER_BYTES), "t_bits")?;
        let has = |bits: u16| infomask & bits == bits;
        let xmin_hint = match (has(XMIN_COMMITTED), has(XMIN_INVALID)) {
            // Both at once: frozen.
            (true, _) => Hint::Committed,
            (false, true) => Hint::Aborted,
            (false, false) => Hint::Unknown,
        };
        let ended = !Xid::is_invalid(xmax) && infomask & (XMAX_LOCK_ONLY | XMAX_IS_MULTI | XMAX_INVALID) == 0;
        let xmax_hint = if ended && has(XMAX_COMMITTED) { Hint::Committed } else { Hint::Unknown };
        Ok(Self { xmin, xmin_hint, xmax: ended.then_some(xmax), xmax_hint, body: r.rest().to_vec() })
    }
}

/// The rows of a heap page, each with its line pointer. A new page has none.
pub fn page_tuples(page: &Page) -> Result<Vec<(u16, HeapTuple)>, Corrupt> {
    if is_new(page) {
        return Ok(Vec::new());
    }
    let r = &mut Reader::new(page);
    r.take(12, "page header")?;
    let lower_at = r.position();
    let lower = usize::from(r.u16("pd_lower")?);
    let pointers = lower
        .checked_sub(HEADER_BYTES)
        .and_then(|bytes| page.get(HEADER_BYTES..HEADER_BYTES.checked_add(bytes)?))
        .ok_or(Corrupt::invalid("pd_lower", lower_at, lower as u64))?;
    let mut tuples = Vec::new();
    for (offset, pointer) in (1u16..).zip(pointers.as_chunks::<LINE_POINTER_BYTES>().0) {
        // lp_off: 15 bits, lp_flags: 2, lp_len: 15.
        let pointer = u32::from_le_bytes(*pointer);
        if pointer >> 15 & 3 != LP_NORMAL {
            continue;
        }
        let (from, len) = ((pointer & 0x7FFF) as usize, (pointer >> 17) as usize);
        let at = (HEADER_BYTES as u64).saturating_add(u64::from(offset).saturating_sub(1).saturating_mul(4));
        let bytes = from.checked_add(len).and_then(|to| page.get(from..to));
        let bytes = bytes.filter(|_| from >= lower && from < BLOCK_BYTES);
        let bytes = bytes.ok_or(Corrupt::invalid("line pointer", at, u64::from(pointer)))?;
        tuples.push((offset, HeapTuple::decode(bytes, from as u64)?));
    }
    Ok(tuples)
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    /// A row to put on a page: line pointer, xmin, xmax, infomask, columns.
    pub(crate) type Row<'a> = (u16, u32, u32, u16, &'a [u8]);

    /// A heap page with these rows.
    pub(crate) fn heap_page(rows: &[Row<'_>]) -> Page {
        let mut page = [0; BLOCK_BYTES];
        let mut upper = BLOCK_BYTES;
        let mut lower = HEADER_BYTES;
        for (offset, xmin, xmax, infomask, body) in rows {
            let mut tuple = Vec::new();
            tuple.extend_from_slice(&xmin.to_le_bytes());
            tuple.extend_from_slice(&xmax.to_le_bytes());
            tuple.extend_from_slice(&[0; 10]);
            tuple.extend_from_slice(&33u16.to_le_bytes());
            tuple.extend_from_slice(&infomask.to_le_bytes());
            tuple.extend_from_slice(&[32, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0, 0]);
            tuple.extend_from_slice(body);
            upper = (upper - tuple.len()) & !7;
            page[upper..upper + tuple.len()].copy_from_slice(&tuple);
            let at = HEADER_BYTES + usize::from(*offset - 1) * 4;
            let pointer = upper as u32 | LP_NORMAL << 15 | (tuple.len() as u32) << 17;
            page[at..at + 4].copy_from_slice(&pointer.to_le_bytes());
            lower = lower.max(at + 4);
        }
        page[12..14].copy_from_slice(&(lower as u16).to_le_bytes());
        page[14..16].copy_from_slice(&(upper as u16).to_le_bytes());
        page[16..18].copy_from_slice(&(BLOCK_BYTES as u16).to_le_bytes());
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_rows_of_a_page_are_told_with_what_is_known_of_their_transactions() {
        let page = testing::heap_page(&[
            (1, 700, 0, XMIN_COMMITTED | XMAX_INVALID, b"first row"),
            (3, 701, 702, 0, b"second"),
            (4, 3, 703, XMIN_COMMITTED | XMIN_INVALID | XMAX_LOCK_ONLY, b"frozen and locked"),
            (5, 704, 9, XMIN_INVALID | XMAX_IS_MULTI, b"undone"),
            (6, 705, 706, XMAX_COMMITTED, b""),
        ]);
        let found = page_tuples(&page).unwrap();
        let told: Vec<_> = found
            .iter()
            .map(|(n, t)| {
                (*n, t.xmin.get(), t.xmin_hint, t.xmax.map(Xid::get), t.xmax_hint, t.body.as_slice())
            })
            .collect();
        use Hint::{Aborted, Committed, Unknown};
        assert_eq!(
            told,
            [
                (1, 700, Committed, None, Unknown, b"first row".as_slice()),
                (3, 701, Unknown, Some(702), Unknown, b"second"),
                (4, 3, Committed, None, Unknown, b"frozen and locked"),
                (5, 704, Aborted, None, Unknown, b"undone"),
                (6, 705, Unknown, Some(706), Committed, b""),
            ]
        );
        assert_eq!(page_tuples(&[0; BLOCK_BYTES]), Ok(Vec::new()));
    }

    #[test]
    fn a_line_pointer_that_leaves_the_page_is_refused() {
        let mut page = testing::heap_page(&[(1, 700, 0, 0, b"row")]);
        page[HEADER_BYTES..HEADER_BYTES + 4].copy_from_slice(&(8190u32 | 1 << 15 | 40 << 17).to_le_bytes());
        assert_eq!(page_tuples(&page).unwrap_err().field, "line pointer");
    }

    proptest! {
        #[test]
        fn any_page_is_read_or_refused(
            lower: u16, upper in 1u16.., noise in proptest::collection::vec(any::<u8>(), BLOCK_BYTES), pointers in proptest::collection::vec(any::<u32>(), 0..20),
        ) {
            let mut page: Page = noise.try_into().unwrap();
            page[12..14].copy_from_slice(&lower.to_le_bytes());
            page[14..16].copy_from_slice(&upper.to_le_bytes());
            for (i, pointer) in pointers.iter().enumerate() {
                let normal = pointer & !(3 << 15) | 1 << 15;
                page[24 + i * 4..28 + i * 4].copy_from_slice(&normal.to_le_bytes());
            }
            let _ = page_tuples(&page);
            page[12..14].copy_from_slice(&(24 + 4 * pointers.len() as u16).to_le_bytes());
            if let Ok(found) = page_tuples(&page) {
                prop_assert!(found.len() <= pointers.len());
            }
        }
    }
}
