//! Redo: a record applied to a page, without a server. Pure and total: any record on any page is applied or refused.
//! What is not a page goes through one ordered list of effects, which [`State`] carries out. Facts: docs/wal.md. Of pages, known are PostgreSQL 15's XLOG, Heap, Heap2, Btree,
//! Hash, GIN, GiST, SP-GiST, BRIN, Sequence and Generic.

mod brin;
mod btree;
mod effects;
mod gin;
mod gist;
mod hash;
mod heap;
mod other;
mod page;
mod posting;
mod spgist;
mod state;

use waltide_format::engines::postgres::wal::{Block, Record, Rmgr};
use waltide_format::{BlockNumber, Corrupt, ForkNumber, Lsn, PgMajor, RelFileLocator};

pub use effects::{Effect, Ended, changes_state, effects, vouches_for, vouches_for_pages};
pub use page::Page;
pub use state::{State, StateError};

/// `XLOG_FPI_FOR_HINT`: the one record with a block and neither image nor change.
const FPI_FOR_HINT: u8 = 0xA0;

/// What redo has to know of the cluster at the record's place in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cluster {
    /// Whether hint bits are logged: page checksums, or `wal_log_hints`.
    pub logs_hints: bool,
}

/// What became of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// The record changed it, and it carries the record's end as its `pd_lsn`.
    Changed,
    /// It was changed, but its `pd_lsn` stays.
    Unstamped,
    /// The record does not change this page.
    Nothing,
    /// It has this change already: its `pd_lsn` is not before the record's end.
    Ahead,
}

/// Why a record was not applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the {rmgr} record at {at} (kind {kind:#04X}) cannot be applied to block {block} of {relation}{}", fork.suffix())]
pub struct RedoError {
    /// Start of the record.
    pub at: Lsn,
    /// Its resource manager.
    pub rmgr: Rmgr,
    /// The resource manager's part of `xl_info`.
    pub kind: u8,
    /// The relation.
    pub relation: RelFileLocator,
    /// The fork.
    pub fork: ForkNumber,
    /// The block.
    pub block: BlockNumber,
    /// What is wrong with the record or the page.
    pub source: Corrupt,
}

/// Whether redo knows this kind of record. To be asked of all of them before anything is written.
pub fn knows(record: &Record<'_>) -> bool {
    record.major == PgMajor::V15 && knows_kind(record.rmgr(), record.kind())
}

fn knows_kind(rmgr: Rmgr, kind: u8) -> bool {
    match rmgr {
        Rmgr::HEAP | Rmgr::HEAP2 => heap::knows(rmgr, kind),
        Rmgr::XLOG
        | Rmgr::BTREE
        | Rmgr::HASH
        | Rmgr::GIN
        | Rmgr::GIST
        | Rmgr::SPGIST
        | Rmgr::BRIN
        | Rmgr::SEQ
        | Rmgr::GENERIC => true,
        _ => false,
    }
}

/// Applies a record to the page that its block reference `id` names. On an error the page holds nothing of use.
pub fn apply(record: &Record<'_>, id: u8, page: &mut Page, cluster: Cluster) -> Result<Applied, RedoError> {
    let Some(block) = record.block(id) else { return Ok(Applied::Nothing) };
    let applied = apply_block(record, &block, page, cluster);
    applied.map_err(|source| error(record, block.relation, block.fork, block.block, source))
}

fn apply_block(
    record: &Record<'_>,
    block: &Block<'_>,
    page: &mut Page,
    cluster: Cluster,
) -> Result<Applied, Corrupt> {
    if let Some(image) = block.image.filter(|image| image.apply()) {
        image.restore(page.bytes_mut())?;
        // Some changes are not in the image of the page they are made to.
        match record.rmgr() {
            Rmgr::GIST if gist::edits_image(record.kind(), block.id) => gist::finish_split(record, page)?,
            Rmgr::HASH if hash::edits_image(record.kind(), block.id) => {
                hash::apply(record, block, page)?;
            }
            _ => {}
        }
        if !page.is_new() {
            page.set_lsn(record.end);
        }
        return Ok(Applied::Changed);
    }
    if !knows(record) {
        return Err(unknown(record));
    }
    if block.will_init {
        // Whatever stood there, redo begins with nothing.
        *page = Page::default();
    } else if page.lsn() >= record.end {
        return Ok(Applied::Ahead);
    }
    let applied = match record.rmgr() {
        Rmgr::HEAP => heap::apply(record, block, page)?,
        Rmgr::HEAP2 => heap::apply2(record, block, page, cluster)?,
        Rmgr::BTREE => btree::apply(record, block, page)?,
        Rmgr::HASH => hash::apply(record, block, page)?,
        Rmgr::GIN => gin::apply(record, block, page)?,
        Rmgr::GIST => gist::apply(record, block, page)?,
        Rmgr::SPGIST => spgist::apply(record, block, page)?,
        Rmgr::BRIN => brin::apply(record, block, page)?,
        Rmgr::SEQ => other::sequence(record, page).map(|()| Applied::Changed)?,
        Rmgr::GENERIC => other::generic(block, page).map(|()| Applied::Changed)?,
        // A hint that needed no image.
        Rmgr::XLOG if record.kind() == FPI_FOR_HINT => Applied::Nothing,
        _ => return Err(unknown(record)),
    };
    match applied {
        Applied::Changed => {
            page.check()?;
            page.set_lsn(record.end);
        }
        _ if block.will_init => return Err(unknown(record)),
        _ => {}
    }
    Ok(applied)
}

/// Clears in a page of a visibility map what a record clears there without naming that page. Such pages are those of
/// [`implicit_vm_blocks`](waltide_format::engines::postgres::wal::implicit_vm_blocks); their `pd_lsn` stays.
pub fn clear_visibility(record: &Record<'_>, relation: RelFileLocator, map: BlockNumber, page: &mut Page) {
    heap::clear_visibility(record, relation, map, page);
}

/// Clears in a page of a visibility map what it says of the heap's blocks from `heap` on, as cutting the heap does;
/// whether there was a page. Its `pd_lsn` stays.
pub fn cut_visibility(heap: BlockNumber, page: &mut Page) -> bool {
    heap::cut_visibility(heap, page)
}

/// Whether the record only says that hint bits were set, for which a page need not be there.
pub fn is_hint(record: &Record<'_>) -> bool {
    record.rmgr() == Rmgr::XLOG && record.kind() == FPI_FOR_HINT
}

fn error(
    record: &Record<'_>,
    relation: RelFileLocator,
    fork: ForkNumber,
    block: BlockNumber,
    source: Corrupt,
) -> RedoError {
    RedoError { at: record.start, rmgr: record.rmgr(), kind: record.kind(), relation, fork, block, source }
}

/// The record is of a kind that redo does not know.
fn unknown(record: &Record<'_>) -> Corrupt {
    Corrupt::invalid("xl_info", 16, record.header.info.into())
}

#[cfg(test)]
mod tests;
