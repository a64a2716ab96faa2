//! How transactions ended, and when.

use waltide_format::engines::postgres::wal::Slru;
use waltide_format::{TimestampTz, Xid};

use super::error::StateError;
use super::pages::Pages;
use super::put;
use super::tree::Tree;
use crate::engines::postgres::redo::effects::Ended;

/// `TRANSACTION_STATUS_COMMITTED`.
const COMMITTED: u8 = 1;
/// `TRANSACTION_STATUS_ABORTED`.
const ABORTED: u8 = 2;
/// `CommitTimestampEntry`: time and origin.
const TIMESTAMP_BYTES: u32 = 10;

/// See the module.
#[derive(Debug)]
pub(super) struct Xacts {
    next_xid: Xid,
    /// The last page of pg_xact: nothing is cut off beyond it.
    last_page: u32,
    tracks_timestamps: bool,
}

/// Byte in the page and bits in the byte where a transaction's status lies.
const fn place_of(xid: u32) -> (usize, u32) {
    let index = Slru::Xact.entry_of(xid);
    ((index >> 2) as usize, (index & 3) << 1)
}

/// Whether all that page `a` tells of came before all that page `b` tells of.
fn precedes(slru: Slru, a: u32, b: u32) -> bool {
    // Past the numbers that stand for no transaction.
    let first = |page: u32| page.wrapping_mul(slru.entries_per_page()).wrapping_add(4);
    let last = first(b).wrapping_add(slru.entries_per_page().saturating_sub(1));
    let a = Xid::from(first(a));
    a.precedes(first(b).into()) && a.precedes(last.into())
}

impl Xacts {
    pub(super) fn open(
        tree: &mut Tree,
        pages: &mut Pages,
        next_xid: Xid,
        tracked: bool,
    ) -> Result<Self, StateError> {
        let last_page = Slru::Xact.page_of(next_xid.get());
        let mut xacts = Self { next_xid, last_page, tracks_timestamps: false };
        if tracked {
            xacts.track(tree, pages, true)?;
        }
        Ok(xacts)
    }

    /// The next transaction has this number, or no lower one.
    pub(super) fn advance(&mut self, next_xid: Xid, exact: bool) {
        if exact || self.next_xid.precedes(next_xid) {
            self.next_xid = next_xid;
        }
    }

    /// A transaction has written something.
    pub(super) fn saw(&mut self, xid: Xid) {
        if xid.is_normal() {
            self.advance(xid.next(), false);
        }
    }

    pub(super) fn zero_page(
        &mut self,
        tree: &mut Tree,
        pages: &mut Pages,
        slru: Slru,
        page: u32,
    ) -> Result<(), StateError> {
        if slru == Slru::Xact {
            self.last_page = page;
        }
        pages.zero(tree, slru, page)
    }

    pub(super) fn truncate(
        &mut self,
        tree: &mut Tree,
        pages: &mut Pages,
        slru: Slru,
        cutoff: u32,
    ) -> Result<(), StateError> {
        // The server then takes it that the numbers have wrapped around, and leaves everything.
        if slru == Slru::Xact && precedes(slru, self.last_page, cutoff) {
            return Ok(());
        }
        pages.remove_files(tree, slru, |first, last| {
            precedes(slru, first, cutoff) && precedes(slru, last, cutoff)
        })
    }

    pub(super) fn set_status(
        &mut self,
        tree: &mut Tree,
        pages: &mut Pages,
        status: Ended,
        xids: &[Xid],
    ) -> Result<(), StateError> {
        let bits = match status {
            Ended::Committed => COMMITTED,
            Ended::Aborted => ABORTED,
        };
        for group in xids.chunk_by(|a, b| Slru::Xact.page_of(a.get()) == Slru::Xact.page_of(b.get())) {
            let Some(first) = group.first() else { continue };
            let page = pages.page(tree, Slru::Xact, Slru::Xact.page_of(first.get()))?;
            for xid in group {
                let (byte, shift) = place_of(xid.get());
                if let Some(byte) = page.get_mut(byte) {
                    *byte = *byte & !(3 << shift) | bits << shift;
                }
            }
        }
        xids.iter().for_each(|xid| self.saw(*xid));
        Ok(())
    }

    /// Whether a transaction was committed or rolled back.
    pub(super) fn has_ended(&self, tree: &mut Tree, pages: &mut Pages, xid: Xid) -> Result<bool, StateError> {
        let (byte, shift) = place_of(xid.get());
        let page = pages.look(tree, Slru::Xact, Slru::Xact.page_of(xid.get()))?;
        Ok(matches!(page.get(byte).map(|byte| byte >> shift & 3), Some(COMMITTED | ABORTED)))
    }

    pub(super) fn set_time(
        &self,
        tree: &mut Tree,
        pages: &mut Pages,
        xids: &[Xid],
        time: TimestampTz,
        origin: u16,
    ) -> Result<(), StateError> {
        if !self.tracks_timestamps {
            return Ok(());
        }
        let slru = Slru::CommitTs;
        for group in xids.chunk_by(|a, b| slru.page_of(a.get()) == slru.page_of(b.get())) {
            let Some(first) = group.first() else { continue };
            let page = pages.page(tree, slru, slru.page_of(first.get()))?;
            for xid in group {
                let at = slru.entry_of(xid.get()).saturating_mul(TIMESTAMP_BYTES) as usize;
                put(page, at, time.postgres_micros().to_le_bytes());
                put(page, at.saturating_add(8), origin.to_le_bytes());
            }
        }
        Ok(())
    }

    /// Begins to keep commit timestamps, with the next transaction's page, or forgets them all.
    pub(super) fn track(&mut self, tree: &mut Tree, pages: &mut Pages, on: bool) -> Result<(), StateError> {
        let before = std::mem::replace(&mut self.tracks_timestamps, on);
        match (before, on) {
            (false, true) => {
                let page = Slru::CommitTs.page_of(self.next_xid.get());
                if !pages.exists(tree, Slru::CommitTs, page)? {
                    pages.zero(tree, Slru::CommitTs, page)?;
                }
                Ok(())
            }
            (true, false) => pages.remove_files(tree, Slru::CommitTs, |_, _| true),
            _ => Ok(()),
        }
    }
}
