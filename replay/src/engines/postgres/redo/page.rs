//! What redo does to a page: line pointers and items put in, taken out, moved together. Every position is checked
//! before it is used, so that no page and no record can do more than be refused.

use std::ops::Range;

use waltide_format::engines::postgres::cluster::data_page;
use waltide_format::{BLOCK_BYTES, BlockNumber, Corrupt, Lsn};

pub(super) const HEADER_BYTES: usize = 24;
const LINE_POINTER_BYTES: usize = 4;
/// `MaxHeapTuplesPerPage` and `MaxIndexTuplesPerPage` of pages of 8 KiB.
const HEAP_ITEMS_MAX: u16 = 291;
const INDEX_ITEMS_MAX: u16 = 408;
/// `BLCKSZ` and `PG_PAGE_LAYOUT_VERSION`.
const PAGE_SIZE_VERSION: u16 = 8192 | 4;

const FLAGS: usize = 10;
const LOWER: usize = 12;
const UPPER: usize = 14;
const SPECIAL: usize = 16;
const SIZE_VERSION: usize = 18;
const PRUNE_XID: usize = 20;

const PD_HAS_FREE_LINES: u16 = 1;
const PD_ALL_VISIBLE: u16 = 4;

/// What a line pointer says of its item: `lp_flags`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Unused,
    Normal,
    Redirect,
    Dead,
}

/// A line pointer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LinePointer {
    pub(super) offset: u16,
    pub(super) state: State,
    pub(super) length: u16,
}

impl LinePointer {
    pub(super) const UNUSED: Self = Self { offset: 0, state: State::Unused, length: 0 };
    pub(super) const DEAD: Self = Self { offset: 0, state: State::Dead, length: 0 };

    pub(super) const fn redirect(to: u16) -> Self {
        Self { offset: to, state: State::Redirect, length: 0 }
    }

    /// Whether there are bytes behind it.
    pub(super) const fn has_storage(self) -> bool {
        self.length != 0
    }

    #[allow(clippy::cast_possible_truncation)] // masked to 15 bits
    const fn decode(word: u32) -> Self {
        let state = match (word >> 15) & 3 {
            0 => State::Unused,
            1 => State::Normal,
            2 => State::Redirect,
            _ => State::Dead,
        };
        Self { offset: (word & 0x7FFF) as u16, state, length: (word >> 17) as u16 }
    }

    const fn encode(self) -> u32 {
        let state = match self.state {
            State::Unused => 0,
            State::Normal => 1,
            State::Redirect => 2,
            State::Dead => 3,
        };
        (self.offset as u32 & 0x7FFF) | state << 15 | (self.length as u32) << 17
    }
}

/// The length of an item with its padding: `MAXALIGN`.
pub(super) const fn aligned(length: usize) -> usize {
    length.saturating_add(7) & !7
}

/// A page that records are applied to.
#[derive(Clone, PartialEq, Eq)]
pub struct Page(Box<[u8; BLOCK_BYTES]>);

impl std::fmt::Debug for Page {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Page").field("pd_lsn", &self.lsn()).finish_non_exhaustive()
    }
}

impl Default for Page {
    fn default() -> Self {
        Self(Box::new([0; BLOCK_BYTES]))
    }
}

impl From<[u8; BLOCK_BYTES]> for Page {
    fn from(bytes: [u8; BLOCK_BYTES]) -> Self {
        Self(Box::new(bytes))
    }
}

impl Page {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8; BLOCK_BYTES] {
        &self.0
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8; BLOCK_BYTES] {
        &mut self.0
    }

    /// Sets `pd_checksum`, which depends on the block that it is written to.
    pub fn set_checksum(&mut self, block: BlockNumber) {
        data_page::set_checksum(&mut self.0, block);
    }

    /// Whether it was never written: `pd_upper` is zero.
    pub fn is_new(&self) -> bool {
        self.u16(UPPER) == 0
    }

    /// `pd_lsn`: the end of the last record that changed it.
    pub fn lsn(&self) -> Lsn {
        let half = |at| u64::from(self.u32(at));
        Lsn::from(half(0) << 32 | half(4))
    }

    #[allow(clippy::cast_possible_truncation)] // the two halves
    pub(super) fn set_lsn(&mut self, lsn: Lsn) {
        self.put_u32(0, (lsn.get() >> 32) as u32);
        self.put_u32(4, lsn.get() as u32);
    }

    /// Two bytes of the header or of a place that was checked; zero beyond the page.
    pub(super) fn u16(&self, at: usize) -> u16 {
        self.slice(at, 2).map_or(0, |b| u16::from_le_bytes(b.try_into().unwrap_or_default()))
    }

    pub(super) fn u32(&self, at: usize) -> u32 {
        self.slice(at, 4).map_or(0, |b| u32::from_le_bytes(b.try_into().unwrap_or_default()))
    }

    pub(super) fn put_u16(&mut self, at: usize, v: u16) {
        let _ = self.write(at, &v.to_le_bytes());
    }

    pub(super) fn put_u32(&mut self, at: usize, v: u32) {
        let _ = self.write(at, &v.to_le_bytes());
    }

    fn slice(&self, at: usize, length: usize) -> Option<&[u8]> {
        self.0.get(at..at.checked_add(length)?)
    }

    /// Puts bytes at a place of the page.
    pub(super) fn write(&mut self, at: usize, bytes: &[u8]) -> Result<(), Corrupt> {
        let end = at.saturating_add(bytes.len());
        let place = self.0.get_mut(at..end);
        place
            .ok_or(Corrupt::too_large("offset", at as u64, end as u64, BLOCK_BYTES as u64))?
            .copy_from_slice(bytes);
        Ok(())
    }

    /// Makes it an empty page with this much special space: `PageInit`.
    pub(super) fn init(&mut self, special_bytes: usize) {
        self.0.fill(0);
        let special = u16::try_from(BLOCK_BYTES.saturating_sub(aligned(special_bytes))).unwrap_or(0);
        self.put_u16(LOWER, 24);
        self.put_u16(UPPER, special);
        self.put_u16(SPECIAL, special);
        self.put_u16(SIZE_VERSION, PAGE_SIZE_VERSION);
    }

    pub(super) fn lower(&self) -> usize {
        self.u16(LOWER).into()
    }

    pub(super) fn upper(&self) -> usize {
        self.u16(UPPER).into()
    }

    /// Where the special space starts.
    pub(super) fn special(&self) -> usize {
        self.u16(SPECIAL).into()
    }

    pub(super) fn set_lower(&mut self, lower: usize) {
        self.put_u16(LOWER, u16::try_from(lower).unwrap_or(u16::MAX));
    }

    pub(super) fn set_upper(&mut self, upper: usize) {
        self.put_u16(UPPER, u16::try_from(upper).unwrap_or(u16::MAX));
    }

    /// Refuses a page whose free space and special space make no sense.
    pub(super) fn check(&self) -> Result<(), Corrupt> {
        let (lower, upper, special) = (self.lower(), self.upper(), self.special());
        if lower < HEADER_BYTES || lower > upper {
            return Err(Corrupt::invalid("pd_lower", LOWER as u64, lower as u64));
        }
        if upper > special {
            return Err(Corrupt::invalid("pd_upper", UPPER as u64, upper as u64));
        }
        if special > BLOCK_BYTES || special != aligned(special) {
            return Err(Corrupt::invalid("pd_special", SPECIAL as u64, special as u64));
        }
        Ok(())
    }

    /// The same, and a page that has no line pointers, or more than a page can have.
    pub(super) fn check_items(&self) -> Result<(), Corrupt> {
        self.check()?;
        let lower = self.lower();
        if !lower.is_multiple_of(LINE_POINTER_BYTES) || self.items() > INDEX_ITEMS_MAX {
            return Err(Corrupt::invalid("pd_lower", LOWER as u64, lower as u64));
        }
        Ok(())
    }

    /// Refuses a page whose special space is not this long.
    pub(super) fn check_special(&self, bytes: usize) -> Result<(), Corrupt> {
        let special = self.special();
        if BLOCK_BYTES.saturating_sub(special) != bytes {
            return Err(Corrupt::invalid("pd_special", SPECIAL as u64, special as u64));
        }
        Ok(())
    }

    /// How many line pointers it has: `PageGetMaxOffsetNumber`.
    pub(super) fn items(&self) -> u16 {
        let bytes = self.lower().saturating_sub(HEADER_BYTES);
        u16::try_from(bytes / LINE_POINTER_BYTES).unwrap_or(u16::MAX)
    }

    fn line_pointer_at(number: u16) -> usize {
        HEADER_BYTES.saturating_add(usize::from(number.saturating_sub(1)).saturating_mul(LINE_POINTER_BYTES))
    }

    /// Line pointer `number`, counted from one.
    pub(super) fn line_pointer(&self, number: u16) -> Result<LinePointer, Corrupt> {
        if number == 0 || number > self.items() {
            return Err(Corrupt::too_large("offnum", 0, number.into(), self.items().into()));
        }
        Ok(LinePointer::decode(self.u32(Self::line_pointer_at(number))))
    }

    pub(super) fn set_line_pointer(&mut self, number: u16, to: LinePointer) -> Result<(), Corrupt> {
        self.line_pointer(number)?;
        self.put_u32(Self::line_pointer_at(number), to.encode());
        Ok(())
    }

    /// Where an item lies: its first byte and its length, inside the page's item space.
    fn place(&self, number: u16) -> Result<(usize, usize), Corrupt> {
        let pointer = self.line_pointer(number)?;
        let (offset, length) = (usize::from(pointer.offset), usize::from(pointer.length));
        let at = Self::line_pointer_at(number) as u64;
        if !pointer.has_storage() || offset < self.upper() || offset.saturating_add(length) > self.special() {
            return Err(Corrupt::invalid("lp_off", at, pointer.encode().into()));
        }
        Ok((offset, length))
    }

    /// Where an item's bytes are.
    pub(super) fn item_range(&self, number: u16) -> Result<Range<usize>, Corrupt> {
        let (offset, length) = self.place(number)?;
        Ok(offset..offset.saturating_add(length))
    }

    /// Copies bytes of the page to another place of it.
    pub(super) fn copy(&mut self, from: Range<usize>, to: usize) -> Result<(), Corrupt> {
        let end = to.saturating_add(from.len());
        if from.end > BLOCK_BYTES || end > BLOCK_BYTES {
            return Err(Corrupt::too_large("offset", to as u64, end as u64, BLOCK_BYTES as u64));
        }
        self.0.copy_within(from, to);
        Ok(())
    }

    /// An item's bytes.
    pub(super) fn item(&self, number: u16) -> Result<&[u8], Corrupt> {
        let (offset, length) = self.place(number)?;
        Ok(self.slice(offset, length).unwrap_or_default())
    }

    /// A normal item's bytes, to be changed in place.
    pub(super) fn normal_item_mut(&mut self, number: u16) -> Result<&mut [u8], Corrupt> {
        let pointer = self.line_pointer(number)?;
        if pointer.state != State::Normal {
            let at = Self::line_pointer_at(number) as u64;
            return Err(Corrupt::invalid("lp_flags", at, pointer.encode().into()));
        }
        self.item_mut(number)
    }

    /// An item's bytes, to be changed in place.
    pub(super) fn item_mut(&mut self, number: u16) -> Result<&mut [u8], Corrupt> {
        let (offset, length) = self.place(number)?;
        Ok(self.0.get_mut(offset..offset.saturating_add(length)).unwrap_or_default())
    }

    /// Makes room for an item of `length` bytes as `number`, which is unused or one more than there are: how the heap does
    /// it. Where its bytes go.
    pub(super) fn place_heap_item(&mut self, number: u16, length: usize) -> Result<usize, Corrupt> {
        self.place_item_as(number, length, HEAP_ITEMS_MAX)
    }

    /// Puts an item in so on an index page, whose items keep their numbers too.
    pub(super) fn put_index_item(&mut self, number: u16, item: &[u8]) -> Result<(), Corrupt> {
        let at = self.place_item_as(number, item.len(), INDEX_ITEMS_MAX)?;
        self.write(at, item)
    }

    fn place_item_as(&mut self, number: u16, length: usize, max: u16) -> Result<usize, Corrupt> {
        self.check_items()?;
        if number == 0 || number > max {
            return Err(Corrupt::too_large("offnum", 0, number.into(), max.into()));
        }
        let is_next = number == self.items().saturating_add(1);
        if !is_next && self.line_pointer(number)? != LinePointer::UNUSED {
            let at = Self::line_pointer_at(number) as u64;
            return Err(Corrupt::invalid("lp_flags", at, self.u32(Self::line_pointer_at(number)).into()));
        }
        self.place_item(number, length, is_next)
    }

    /// Puts an item in as `number`, those from there on moving up by one: how an index does it.
    pub(super) fn insert_item(&mut self, number: u16, item: &[u8]) -> Result<(), Corrupt> {
        self.check_items()?;
        if number == 0 || number > self.items().saturating_add(1) || self.items() >= INDEX_ITEMS_MAX {
            return Err(Corrupt::too_large("offnum", 0, number.into(), self.items().into()));
        }
        let (from, to) = (Self::line_pointer_at(number), self.lower());
        // The room is looked for before anything moves.
        self.room_for(item.len(), true)?;
        self.0.copy_within(from..to, from.saturating_add(LINE_POINTER_BYTES));
        let at = self.place_item(number, item.len(), true)?;
        self.write(at, item)
    }

    fn room_for(&self, length: usize, grows: bool) -> Result<(usize, usize), Corrupt> {
        let lower = self.lower().saturating_add(if grows { LINE_POINTER_BYTES } else { 0 });
        let upper = self.upper().checked_sub(aligned(length)).filter(|upper| lower <= *upper);
        let free = self.upper().saturating_sub(lower) as u64;
        let upper = upper.ok_or(Corrupt::too_large("item", UPPER as u64, length as u64, free))?;
        Ok((lower, upper))
    }

    fn place_item(&mut self, number: u16, length: usize, grows: bool) -> Result<usize, Corrupt> {
        let (lower, upper) = self.room_for(length, grows)?;
        let offset = u16::try_from(upper).unwrap_or(0);
        let length = u16::try_from(length).unwrap_or(0);
        self.set_lower(lower);
        self.set_upper(upper);
        self.set_line_pointer(number, LinePointer { offset, state: State::Normal, length })?;
        Ok(upper)
    }

    /// Takes an item and its line pointer out of an index page: `PageIndexTupleDelete`.
    pub(super) fn delete_item(&mut self, number: u16) -> Result<(), Corrupt> {
        self.check_items()?;
        let (offset, length) = self.place(number)?;
        let at = Self::line_pointer_at(number);
        let lower = self.lower();
        self.0.copy_within(at.saturating_add(LINE_POINTER_BYTES)..lower, at);
        self.set_lower(lower.saturating_sub(LINE_POINTER_BYTES));
        self.shift_items_up_to(offset, length, 0)
    }

    /// Takes an item out of an index page whose items keep their numbers: `PageIndexTupleDeleteNoCompact`.
    pub(super) fn delete_item_in_place(&mut self, number: u16) -> Result<(), Corrupt> {
        self.check_items()?;
        let (offset, length) = self.place(number)?;
        if number < self.items() {
            self.set_line_pointer(number, LinePointer::UNUSED)?;
        } else {
            self.set_lower(self.lower().saturating_sub(LINE_POINTER_BYTES));
        }
        self.shift_items_up_to(offset, length, 0)
    }

    /// Puts another item in the place of one, its neighbours moving together or apart: `PageIndexTupleOverwrite`.
    pub(super) fn replace_item(&mut self, number: u16, item: &[u8]) -> Result<(), Corrupt> {
        self.check_items()?;
        let pointer = self.line_pointer(number)?;
        let (offset, length) = self.place(number)?;
        let room = aligned(length).saturating_add(self.upper().saturating_sub(self.lower()));
        if aligned(item.len()) > room {
            return Err(Corrupt::too_large("item", offset as u64, item.len() as u64, room as u64));
        }
        self.shift_items_up_to(offset, length, item.len())?;
        let offset = offset.saturating_add(aligned(length)).saturating_sub(aligned(item.len()));
        let (at, length) = (u16::try_from(offset).unwrap_or(0), u16::try_from(item.len()).unwrap_or(0));
        self.set_line_pointer(number, LinePointer { offset: at, length, ..pointer })?;
        self.write(offset, item)
    }

    /// Moves what lies before and at `offset` so that the item there, `was` bytes long, has room for `is` bytes.
    fn shift_items_up_to(&mut self, offset: usize, was: usize, is: usize) -> Result<(), Corrupt> {
        let (was, is) = (aligned(was), aligned(is));
        let upper = self.upper();
        let moved = |at: usize| at.saturating_add(was).saturating_sub(is);
        let end = moved(offset);
        if end.saturating_add(is) > self.special() {
            return Err(Corrupt::invalid("lp_off", 0, offset as u64));
        }
        self.0.copy_within(upper..offset, moved(upper));
        self.set_upper(moved(upper));
        for number in 1..=self.items() {
            let pointer = self.line_pointer(number)?;
            if pointer.has_storage() && usize::from(pointer.offset) <= offset {
                let offset = u16::try_from(moved(pointer.offset.into())).unwrap_or(0);
                self.set_line_pointer(number, LinePointer { offset, ..pointer })?;
            }
        }
        Ok(())
    }

    /// Takes several items and their line pointers out of an index page; their numbers rise. One or two are taken out
    /// singly, as PostgreSQL does it: that leaves other bytes in the free space.
    pub(super) fn delete_items(&mut self, numbers: &[u16]) -> Result<(), Corrupt> {
        self.check_items()?;
        if let Some(pair) = numbers.windows(2).find(|pair| matches!(pair, [a, b] if a >= b)) {
            return Err(Corrupt::invalid("offnum", 0, pair.last().copied().unwrap_or(0).into()));
        }
        if numbers.len() <= 2 {
            return numbers.iter().rev().try_for_each(|number| self.delete_item(*number));
        }
        for number in numbers {
            self.line_pointer(*number)?;
        }
        let mut kept = Vec::with_capacity(self.items().into());
        for number in 1..=self.items() {
            self.place(number)?;
            if numbers.binary_search(&number).is_err() {
                kept.push(self.line_pointer(number)?);
            }
        }
        self.set_lower(kept.len().saturating_mul(LINE_POINTER_BYTES).saturating_add(HEADER_BYTES));
        for (number, pointer) in (1u16..).zip(&kept) {
            self.set_line_pointer(number, *pointer)?;
        }
        self.compact()
    }

    /// Makes line pointers of a heap page redirected, dead and unused, and moves what is left together.
    pub(super) fn repair_fragmentation(&mut self) -> Result<(), Corrupt> {
        self.check_items()?;
        let (mut unused, mut used) = (0u16, 0u16);
        for number in 1..=self.items() {
            let pointer = self.line_pointer(number)?;
            if pointer.state == State::Unused {
                self.set_line_pointer(number, LinePointer::UNUSED)?;
                unused = unused.saturating_add(1);
            } else {
                used = number;
            }
        }
        self.compact()?;
        // Those behind the last one in use go.
        unused = unused.saturating_sub(self.items().saturating_sub(used));
        self.set_lower(Self::line_pointer_at(used.saturating_add(1)));
        self.set_flag(PD_HAS_FREE_LINES, unused > 0);
        Ok(())
    }

    /// Drops unused line pointers at the end of a heap page; one is always left: `PageTruncateLinePointerArray`.
    pub(super) fn truncate_line_pointers(&mut self) -> Result<(), Corrupt> {
        self.check_items()?;
        let unused = |page: &Self, number| page.line_pointer(number).map(|p| p.state == State::Unused);
        let mut last = self.items();
        while last > 1 && unused(self, last)? {
            last = last.saturating_sub(1);
        }
        self.set_lower(Self::line_pointer_at(last.saturating_add(1)));
        let mut free = false;
        for number in 1..=last {
            free |= unused(self, number)?;
        }
        self.set_flag(PD_HAS_FREE_LINES, free);
        Ok(())
    }

    /// Moves all items to the end of their space, the first line pointer's last: `compactify_tuples`.
    fn compact(&mut self) -> Result<(), Corrupt> {
        let special = self.special();
        let mut upper = special;
        // Where they lie in that order already, none is moved over one that is still to be moved.
        let before = if self.is_in_order()? { None } else { Some(self.0.clone()) };
        for number in 1..=self.items() {
            let pointer = self.line_pointer(number)?;
            if !pointer.has_storage() {
                continue;
            }
            let (from, length) = (usize::from(pointer.offset), aligned(pointer.length.into()));
            let broken = || Corrupt::invalid("lp_off", Self::line_pointer_at(number) as u64, from as u64);
            let end = from.saturating_add(length);
            if from < self.upper() || end > special {
                return Err(broken());
            }
            upper = upper.checked_sub(length).filter(|upper| *upper >= self.lower()).ok_or_else(broken)?;
            match &before {
                Some(before) => self.write(upper, before.get(from..end).unwrap_or_default())?,
                None if upper == from => continue,
                None => self.copy(from..end, upper)?,
            }
            let offset = u16::try_from(upper).unwrap_or(0);
            self.set_line_pointer(number, LinePointer { offset, ..pointer })?;
        }
        self.set_upper(upper);
        Ok(())
    }

    /// Whether the items lie behind each other from the page's end, the first line pointer's last.
    fn is_in_order(&self) -> Result<bool, Corrupt> {
        let mut end = self.special();
        for number in 1..=self.items() {
            let pointer = self.line_pointer(number)?;
            let (from, length) = (usize::from(pointer.offset), aligned(pointer.length.into()));
            if pointer.has_storage() && from.saturating_add(length) > end {
                return Ok(false);
            }
            if pointer.has_storage() {
                end = from;
            }
        }
        Ok(true)
    }

    /// Becomes the page that was made out of it.
    pub(super) fn replace_with(&mut self, made: Self) -> Result<(), Corrupt> {
        made.check_items()?;
        *self = made;
        Ok(())
    }

    fn set_flag(&mut self, flag: u16, set: bool) {
        let flags = self.u16(FLAGS);
        self.put_u16(FLAGS, if set { flags | flag } else { flags & !flag });
    }

    /// `PD_ALL_VISIBLE`.
    pub(super) fn set_all_visible(&mut self, set: bool) {
        self.set_flag(PD_ALL_VISIBLE, set);
    }

    /// Notes that the transaction may leave something to prune: the earliest such one counts. Numbers wrap.
    pub(super) fn set_prunable(&mut self, xid: u32) {
        let before = self.u32(PRUNE_XID);
        // The two numbers below three that may stand here precede nothing.
        let is_earlier =
            if xid < 3 || before < 3 { xid < before } else { xid.wrapping_sub(before).cast_signed() < 0 };
        if before == 0 || is_earlier {
            self.put_u32(PRUNE_XID, xid);
        }
    }
}

/// A row's place, as tuples and index entries write it: the block's halves, upper first, then the line pointer.
#[allow(clippy::cast_possible_truncation)] // the two halves
pub(super) fn tid(block: BlockNumber, number: u16) -> [u8; 6] {
    let [a, b] = ((block >> 16) as u16).to_le_bytes();
    let [c, d] = (block as u16).to_le_bytes();
    let [e, f] = number.to_le_bytes();
    [a, b, c, d, e, f]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn items_move_together_whatever_their_order(
            lengths in proptest::collection::vec(1usize..90, 1..40),
            again in proptest::collection::vec((any::<prop::sample::Index>(), 1usize..90), 0..10),
            unused in proptest::collection::vec(any::<prop::sample::Index>(), 0..10),
        ) {
            let mut page = Page::default();
            page.init(16);
            let mut items: Vec<Vec<u8>> = vec![Vec::new(); lengths.len()];
            let put = |page: &mut Page, items: &mut Vec<Vec<u8>>, i: usize, length: usize| {
                items[i] = (0..length).map(|b| (i * 7 + b) as u8).collect();
                let at = page.place_heap_item(i as u16 + 1, length).unwrap();
                page.write(at, &items[i]).unwrap();
            };
            for (i, length) in lengths.iter().enumerate() {
                put(&mut page, &mut items, i, *length);
            }
            for (index, length) in &again {
                let i = index.index(items.len());
                page.set_line_pointer(i as u16 + 1, LinePointer::UNUSED).unwrap();
                put(&mut page, &mut items, i, *length);
            }
            for index in &unused {
                let i = index.index(items.len());
                page.set_line_pointer(i as u16 + 1, LinePointer::UNUSED).unwrap();
                items[i].clear();
            }
            page.repair_fragmentation().unwrap();
            let mut upper = page.special();
            for (number, item) in (1..=page.items()).zip(&items) {
                if item.is_empty() {
                    prop_assert_eq!(page.line_pointer(number).unwrap(), LinePointer::UNUSED);
                } else {
                    upper -= aligned(item.len());
                    prop_assert_eq!(page.item_range(number).unwrap(), upper..upper + item.len());
                    prop_assert_eq!(page.item(number).unwrap(), item);
                }
            }
            prop_assert_eq!(page.upper(), upper);
            prop_assert!(items.iter().skip(page.items().into()).all(Vec::is_empty));
        }
    }

    #[test]
    fn pruning_takes_away_the_unused_line_pointers_at_the_end() {
        let mut page = Page::default();
        page.init(0);
        for number in 1..=5 {
            let at = page.place_heap_item(number, 40).unwrap();
            page.write(at, &[u8::try_from(number).unwrap(); 40]).unwrap();
        }
        for number in [2, 4, 5] {
            page.set_line_pointer(number, LinePointer::UNUSED).unwrap();
        }
        page.repair_fragmentation().unwrap();
        assert_eq!((page.items(), page.upper()), (3, BLOCK_BYTES - 2 * 40));
        assert_eq!((page.item(1).unwrap(), page.item(3).unwrap()), (&[1; 40][..], &[3; 40][..]));
        assert_eq!(page.u16(FLAGS) & PD_HAS_FREE_LINES, PD_HAS_FREE_LINES);
        // The one between goes with the last in use.
        page.set_line_pointer(3, LinePointer::UNUSED).unwrap();
        page.repair_fragmentation().unwrap();
        assert_eq!((page.items(), page.u16(FLAGS) & PD_HAS_FREE_LINES), (1, 0));
        page.set_line_pointer(1, LinePointer::UNUSED).unwrap();
        page.repair_fragmentation().unwrap();
        assert_eq!((page.items(), page.upper()), (0, BLOCK_BYTES));
    }
}
