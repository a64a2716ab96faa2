//! Records of SP-GiST indexes. Tuples lie in the main data; a block reference only says which page they go to.

use waltide_format::engines::postgres::wal::{Block, Record};
use waltide_format::{BlockNumber, Corrupt, Reader};

use super::page::{Page, tid};
use super::posting::Entry;
use super::{Applied, unknown};

const ADD_LEAF: u8 = 0x10;
const MOVE_LEAFS: u8 = 0x20;
const ADD_NODE: u8 = 0x30;
const SPLIT_TUPLE: u8 = 0x40;
const PICKSPLIT: u8 = 0x50;
const VACUUM_LEAF: u8 = 0x60;
const VACUUM_ROOT: u8 = 0x70;
const VACUUM_REDIRECT: u8 = 0x80;

/// `SpGistPageOpaqueData`.
const OPAQUE_BYTES: usize = 8;
const N_REDIRECTION: usize = 2;
const N_PLACEHOLDER: usize = 4;
const PAGE_ID: usize = 6;
const SPGIST_PAGE_ID: u16 = 0xFF82;
const LEAF: u16 = 4;
const NULLS: u16 = 8;

/// `tupstate`, the lowest bits of a tuple.
const REDIRECT: u8 = 1;
const DEAD: u8 = 2;
const PLACEHOLDER: u8 = 3;
/// `SGDTSIZE`.
const DEAD_BYTES: u32 = 16;
/// The part of a leaf tuple's `t_info` that names the next one in its chain.
const NEXT_MASK: u16 = 0x3FFF;

/// Applies a record to one of its blocks.
pub(super) fn apply(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<Applied, Corrupt> {
    match (record.kind(), block.id) {
        (ADD_LEAF, 0 | 1) => add_leaf(record, block, page)?,
        (MOVE_LEAFS, 0..=2) => move_leafs(record, block, page)?,
        (ADD_NODE, 0..=2) => return add_node(record, block, page),
        (SPLIT_TUPLE, 0 | 1) => split_tuple(record, block, page)?,
        (PICKSPLIT, 0..=3) => pick_split(record, block, page)?,
        (VACUUM_LEAF, 0) => vacuum_leaf(record, page)?,
        (VACUUM_ROOT, 0) => {
            let mut main = Reader::new(record.main_data());
            let count = main.u16("nDelete")?;
            main.take(10, "stateSrc")?;
            check(page)?;
            page.delete_items(&numbers(&mut main, count)?)?;
        }
        (VACUUM_REDIRECT, 0) => vacuum_redirect(record, page)?,
        _ => return Err(unknown(record)),
    }
    Ok(Applied::Changed)
}

fn check(page: &Page) -> Result<(), Corrupt> {
    page.check_items()?;
    page.check_special(OPAQUE_BYTES)
}

fn init(page: &mut Page, flags: u16) {
    page.init(OPAQUE_BYTES);
    page.put_u16(page.special(), flags);
    page.put_u16(page.special().saturating_add(PAGE_ID), SPGIST_PAGE_ID);
}

/// Adds to a counter of the special space, or takes away.
fn count(page: &mut Page, counter: usize, by: i32) -> Result<(), Corrupt> {
    let at = page.special().saturating_add(counter);
    let sum = i32::from(page.u16(at)).saturating_add(by);
    let sum =
        u16::try_from(sum).map_err(|_| Corrupt::invalid("nPlaceholder", at as u64, page.u16(at).into()))?;
    page.put_u16(at, sum);
    Ok(())
}

fn numbers(main: &mut Reader<'_>, count: u16) -> Result<Vec<u16>, Corrupt> {
    (0..count).map(|_| main.u16("offnum")).collect()
}

fn flag(main: &mut Reader<'_>, field: &'static str) -> Result<bool, Corrupt> {
    main.u8(field).map(|v| v != 0)
}

/// `spgxlogState`: the transaction, and whether the index is being built.
struct State {
    xid: u32,
    is_build: bool,
}

impl State {
    fn read(main: &mut Reader<'_>) -> Result<Self, Corrupt> {
        let state = Self { xid: main.u32("myXid")?, is_build: flag(main, "isBuild")? };
        main.take(3, "padding")?;
        Ok(state)
    }

    /// What is left of a tuple that moved on or is gone.
    fn remains(&self, state: u8, to: (BlockNumber, u16)) -> Vec<u8> {
        let moved = state == REDIRECT;
        let pointer = if moved { tid(to.0, to.1) } else { tid(BlockNumber::MAX, 0) };
        let xid = if moved { self.xid } else { 0 };
        let head = (DEAD_BYTES << 2 | u32::from(state)).to_le_bytes();
        [head.as_slice(), &[0, 0], &pointer, &xid.to_le_bytes()].concat()
    }

    /// Puts what is left in the place of tuples; the first one named may leave something else than the rest.
    fn bury(
        &self,
        page: &mut Page,
        gone: &[u16],
        (first, rest): (u8, u8),
        to: (BlockNumber, u16),
    ) -> Result<(), Corrupt> {
        let mut sorted = gone.to_vec();
        sorted.sort_unstable();
        page.delete_items(&sorted)?;
        for number in sorted {
            let state = if gone.first() == Some(&number) { first } else { rest };
            page.insert_item(number, &self.remains(state, to))?;
            match state {
                REDIRECT => count(page, N_REDIRECTION, 1)?,
                PLACEHOLDER => count(page, N_PLACEHOLDER, 1)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// What takes the place of a tuple that goes to another page.
    const fn moved(&self) -> u8 {
        if self.is_build { PLACEHOLDER } else { REDIRECT }
    }
}

/// A leaf tuple, whose first word ends in its length.
fn take_leaf<'a>(main: &mut Reader<'a>) -> Result<&'a [u8], Corrupt> {
    let length = main.clone().u32("SpGistLeafTuple")? >> 2;
    main.take(length as usize, "SpGistLeafTuple")
}

/// An inner tuple, whose length follows its first word.
fn take_inner<'a>(main: &mut Reader<'a>) -> Result<&'a [u8], Corrupt> {
    let mut ahead = main.clone();
    ahead.u32("SpGistInnerTuple")?;
    let length = ahead.u16("size")?;
    main.take(length.into(), "SpGistInnerTuple")
}

/// Puts a tuple in, in the place of a placeholder where there is an item of that number.
fn put(page: &mut Page, number: u16, tuple: &[u8]) -> Result<(), Corrupt> {
    if number <= page.items() {
        let state = page.item(number)?.first().copied().unwrap_or(0) & 3;
        if state != PLACEHOLDER {
            return Err(Corrupt::mismatch("tupstate", 0, state.into(), PLACEHOLDER.into()));
        }
        count(page, N_PLACEHOLDER, -1)?;
        page.delete_item(number)?;
    }
    page.insert_item(number, tuple)
}

fn replace(page: &mut Page, number: u16, tuple: &[u8]) -> Result<(), Corrupt> {
    page.delete_item(number)?;
    page.insert_item(number, tuple)
}

/// Lets a node of an inner tuple point elsewhere.
fn link(page: &mut Page, number: u16, node: u16, to: (BlockNumber, u16)) -> Result<(), Corrupt> {
    check(page)?;
    let tuple = page.item(number)?;
    let broken = Corrupt::invalid("nodeI", 0, node.into());
    let head = tuple.first_chunk::<4>().map(|head| u32::from_le_bytes(*head)).ok_or(broken)?;
    if u32::from(node) >= head >> 3 & 0x1FFF {
        return Err(broken);
    }
    let mut at = 8usize.saturating_add((head >> 16) as usize);
    for _ in 0..node {
        let length = Entry::length_of(tuple.get(at..).unwrap_or_default());
        at = at.saturating_add(length.max(8));
    }
    let place = page.item_mut(number)?.get_mut(at..at.saturating_add(6)).ok_or(broken)?;
    place.copy_from_slice(&tid(to.0, to.1));
    Ok(())
}

fn set_next(page: &mut Page, number: u16, next: u16) -> Result<(), Corrupt> {
    let place = page.item_mut(number)?.get_mut(4..6).ok_or(Corrupt::invalid("t_info", 4, number.into()))?;
    let before = u16::from_le_bytes(place.try_into().unwrap_or_default());
    place.copy_from_slice(&(before & !NEXT_MASK | next & NEXT_MASK).to_le_bytes());
    Ok(())
}

fn block_number(record: &Record<'_>, id: u8) -> Result<BlockNumber, Corrupt> {
    record.block(id).map(|b| b.block).ok_or(Corrupt::invalid("block_id", 0, id.into()))
}

const fn leaf_flags(nulls: bool) -> u16 {
    if nulls { LEAF | NULLS } else { LEAF }
}

/// Block 0 is the leaf's page, block 1 its parent's.
fn add_leaf(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    let (new_page, nulls) = (flag(&mut main, "newPage")?, flag(&mut main, "storesNulls")?);
    let (leaf, head) = (main.u16("offnumLeaf")?, main.u16("offnumHeadLeaf")?);
    let (parent, node) = (main.u16("offnumParent")?, main.u16("nodeI")?);
    if block.id == 1 {
        return link(page, parent, node, (block_number(record, 0)?, leaf));
    }
    if new_page {
        init(page, leaf_flags(nulls));
    }
    check(page)?;
    let tuple = take_leaf(&mut main)?;
    if leaf == head {
        // A dead one.
        return replace(page, leaf, tuple);
    }
    put(page, leaf, tuple)?;
    if head == 0 { Ok(()) } else { set_next(page, head, leaf) }
}

/// Blocks: where the tuples were, where they are, the parent's page.
fn move_leafs(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    let moves = main.u16("nMoves")?;
    let (new_page, replaces_dead) = (flag(&mut main, "newPage")?, flag(&mut main, "replaceDead")?);
    let nulls = flag(&mut main, "storesNulls")?;
    main.take(1, "padding")?;
    let (parent, node) = (main.u16("offnumParent")?, main.u16("nodeI")?);
    main.take(2, "padding")?;
    let state = State::read(&mut main)?;
    let gone = numbers(&mut main, moves)?;
    let places = numbers(&mut main, if replaces_dead { 1 } else { moves.saturating_add(1) })?;
    let to = (block_number(record, 1)?, places.last().copied().unwrap_or(0));
    match block.id {
        0 => {
            check(page)?;
            state.bury(page, &gone, (state.moved(), PLACEHOLDER), to)
        }
        1 => {
            if new_page {
                init(page, leaf_flags(nulls));
            }
            check(page)?;
            places.iter().try_for_each(|place| put(page, *place, take_leaf(&mut main)?))
        }
        _ => link(page, parent, node, to),
    }
}

/// Blocks: where the tuple was, where it goes if it moves, the parent's page if it is neither.
fn add_node(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<Applied, Corrupt> {
    let mut main = Reader::new(record.main_data());
    let (old, new) = (main.u16("offnum")?, main.u16("offnumNew")?);
    let (new_page, parent_block) = (flag(&mut main, "newPage")?, main.u8("parentBlk")?);
    let (parent, node) = (main.u16("offnumParent")?, main.u16("nodeI")?);
    main.take(2, "padding")?;
    let state = State::read(&mut main)?;
    let tuple = take_inner(&mut main)?;
    let Some(to) = record.block(1).map(|to| (to.block, new)) else {
        check(page)?;
        replace(page, old, tuple)?;
        return Ok(Applied::Changed);
    };
    match block.id {
        0 => {
            check(page)?;
            let left = state.moved();
            replace(page, old, &state.remains(left, to))?;
            count(page, if left == REDIRECT { N_REDIRECTION } else { N_PLACEHOLDER }, 1)?;
        }
        1 => {
            if new_page {
                init(page, 0);
            }
            check(page)?;
            put(page, new, tuple)?;
        }
        _ => {}
    }
    if parent_block == block.id {
        link(page, parent, node, to)?;
    } else if block.id == 2 {
        return Err(Corrupt::invalid("parentBlk", 5, parent_block.into()));
    }
    Ok(Applied::Changed)
}

/// Block 0 is the prefix tuple's page, block 1 the postfix tuple's, where that is another one.
fn split_tuple(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    let (prefix_at, postfix_at) = (main.u16("offnumPrefix")?, main.u16("offnumPostfix")?);
    let (new_page, same) = (flag(&mut main, "newPage")?, flag(&mut main, "postfixBlkSame")?);
    let (prefix, postfix) = (take_inner(&mut main)?, take_inner(&mut main)?);
    if block.id == 1 {
        if new_page {
            init(page, 0);
        }
        check(page)?;
        return put(page, postfix_at, postfix);
    }
    check(page)?;
    replace(page, prefix_at, prefix)?;
    if same { put(page, postfix_at, postfix) } else { Ok(()) }
}

/// Blocks: the leaf page that is split, another one for its tuples, the new inner tuple's page, its parent's.
fn pick_split(record: &Record<'_>, block: &Block<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    main.take(2, "isRootSplit")?;
    let (deletes, inserts) = (main.u16("nDelete")?, main.u16("nInsert")?);
    let (init_source, init_dest) = (flag(&mut main, "initSrc")?, flag(&mut main, "initDest")?);
    let inner = main.u16("offnumInner")?;
    let (init_inner, nulls) = (flag(&mut main, "initInner")?, flag(&mut main, "storesNulls")?);
    let inner_is_parent = flag(&mut main, "innerIsParent")?;
    main.take(1, "padding")?;
    let (parent, node) = (main.u16("offnumParent")?, main.u16("nodeI")?);
    main.take(2, "padding")?;
    let state = State::read(&mut main)?;
    let gone = numbers(&mut main, deletes)?;
    let places = numbers(&mut main, inserts)?;
    let selected = main.take(inserts.into(), "leafPageSelect")?;
    let tuple = take_inner(&mut main)?;
    let to = (block_number(record, 2)?, inner);
    match block.id {
        0 | 1 => {
            if if block.id == 0 { init_source } else { init_dest } {
                init(page, leaf_flags(nulls));
            }
            check(page)?;
            if block.id == 0 && !init_source {
                state.bury(page, &gone, (state.moved(), PLACEHOLDER), to)?;
            }
            for (place, on_dest) in places.iter().zip(selected) {
                let leaf = take_leaf(&mut main)?;
                if (*on_dest != 0) == (block.id == 1) {
                    put(page, *place, leaf)?;
                }
            }
            Ok(())
        }
        2 => {
            if init_inner {
                init(page, if nulls { NULLS } else { 0 });
            }
            check(page)?;
            put(page, inner, tuple)?;
            if inner_is_parent { link(page, parent, node, to) } else { Ok(()) }
        }
        _ => link(page, parent, node, to),
    }
}

fn vacuum_leaf(record: &Record<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    let (dead, placeholders) = (main.u16("nDead")?, main.u16("nPlaceholder")?);
    let (moves, chains) = (main.u16("nMove")?, main.u16("nChain")?);
    let state = State::read(&mut main)?;
    let (dead, placeholders) = (numbers(&mut main, dead)?, numbers(&mut main, placeholders)?);
    let (from, to) = (numbers(&mut main, moves)?, numbers(&mut main, moves)?);
    let (chained, next) = (numbers(&mut main, chains)?, numbers(&mut main, chains)?);
    check(page)?;
    let nowhere = (BlockNumber::MAX, 0);
    state.bury(page, &dead, (DEAD, DEAD), nowhere)?;
    state.bury(page, &placeholders, (PLACEHOLDER, PLACEHOLDER), nowhere)?;
    for (from, to) in from.iter().zip(&to) {
        let (a, b) = (page.line_pointer(*from)?, page.line_pointer(*to)?);
        page.set_line_pointer(*from, b)?;
        page.set_line_pointer(*to, a)?;
    }
    state.bury(page, &from, (PLACEHOLDER, PLACEHOLDER), nowhere)?;
    chained.iter().zip(&next).try_for_each(|(number, next)| set_next(page, *number, *next))
}

/// Pointers to where tuples went are no longer needed; those at the end of the page go altogether.
fn vacuum_redirect(record: &Record<'_>, page: &mut Page) -> Result<(), Corrupt> {
    let mut main = Reader::new(record.main_data());
    let (redirects, first) = (main.u16("nToPlaceholder")?, main.u16("firstPlaceholder")?);
    main.u32("newestRedirectXid")?;
    check(page)?;
    for number in numbers(&mut main, redirects)? {
        let tuple = page.item_mut(number)?;
        let head = tuple.first_mut().ok_or(Corrupt::invalid("tupstate", 0, 0))?;
        if *head & 3 != REDIRECT {
            return Err(Corrupt::mismatch("tupstate", 0, (*head & 3).into(), REDIRECT.into()));
        }
        *head = *head & !3 | PLACEHOLDER;
        let pointer = tuple.get_mut(6..12).ok_or(Corrupt::invalid("pointer", 6, number.into()))?;
        pointer.copy_from_slice(&tid(BlockNumber::MAX, 0));
    }
    count(page, N_REDIRECTION, i32::from(redirects).saturating_neg())?;
    count(page, N_PLACEHOLDER, redirects.into())?;
    if first != 0 {
        let last: Vec<u16> = (first..=page.items()).collect();
        count(page, N_PLACEHOLDER, i32::try_from(last.len()).unwrap_or(i32::MAX).saturating_neg())?;
        page.delete_items(&last)?;
    }
    Ok(())
}
