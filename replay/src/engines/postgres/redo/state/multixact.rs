//! Multixacts: where their members start, and the members.

use waltide_format::Xid;
use waltide_format::engines::postgres::wal::Slru;

use super::error::StateError;
use super::pages::Pages;
use super::put;
use super::tree::Tree;

/// Four members: a byte of flags for each, then their transactions.
const GROUP_BYTES: u32 = 20;
const GROUP_MEMBERS: u32 = 4;

/// See the module.
#[derive(Debug)]
pub(super) struct MultiXacts {
    /// The last page of offsets: nothing is cut off beyond it.
    last_page: u32,
    /// The page of offsets begun last, once one was.
    begun: Option<u32>,
    /// A page of offsets that a multixact began, since its last member's end is noted there, before the log says so. Minor releases
    /// before 15.16 wrote such logs.
    begun_early: Option<u32>,
}

/// `FirstMultiXactId`.
const FIRST: u32 = 1;

const OFFSETS: Slru = Slru::MultiXactOffset;
const MEMBERS: Slru = Slru::MultiXactMember;

/// Whether a number came before another, in the half circle.
const fn comes_before(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() < 0
}

/// Whether all multixacts of page `a` came before all of page `b`.
fn precedes(a: u32, b: u32) -> bool {
    let first = |page: u32| page.wrapping_mul(OFFSETS.entries_per_page()).wrapping_add(FIRST + 1);
    let last = first(b).wrapping_add(OFFSETS.entries_per_page().saturating_sub(1));
    comes_before(first(a), first(b)) && comes_before(first(a), last)
}

/// Where a multixact's offset lies in its page.
const fn offset_place(multi: u32) -> usize {
    (OFFSETS.entry_of(multi) as usize).saturating_mul(4)
}

impl MultiXacts {
    pub(super) const fn new(next_multi: u32) -> Self {
        Self { last_page: OFFSETS.page_of(next_multi), begun: None, begun_early: None }
    }

    pub(super) fn zero_offsets(
        &mut self,
        tree: &mut Tree,
        pages: &mut Pages,
        page: u32,
    ) -> Result<(), StateError> {
        // It holds an offset already.
        if self.begun_early.take() == Some(page) {
            return Ok(());
        }
        self.begin_offsets(tree, pages, page)
    }

    fn begin_offsets(&mut self, tree: &mut Tree, pages: &mut Pages, page: u32) -> Result<(), StateError> {
        pages.zero(tree, OFFSETS, page)?;
        self.last_page = page;
        self.begun = Some(page);
        Ok(())
    }

    pub(super) fn create(
        &mut self,
        tree: &mut Tree,
        pages: &mut Pages,
        multi: u32,
        offset: u32,
        members: &[(Xid, u8)],
    ) -> Result<(), StateError> {
        self.begun_early = None;
        let next = multi.checked_add(1).unwrap_or(FIRST);
        let (page, next_page) = (OFFSETS.page_of(multi), OFFSETS.page_of(next));
        if next_page != page {
            let is_begun = match self.begun {
                Some(begun) => begun != page,
                None => pages.exists(tree, OFFSETS, next_page)?,
            };
            if !is_begun {
                self.begin_offsets(tree, pages, next_page)?;
                self.begun_early = Some(next_page);
            }
        }
        put(pages.page(tree, OFFSETS, page)?, offset_place(multi), offset.to_le_bytes());
        // The end of its members is where the next one's start; zero is no offset.
        let count = u32::try_from(members.len()).unwrap_or(u32::MAX);
        let end = offset.wrapping_add(count).max(1);
        put(pages.page(tree, OFFSETS, next_page)?, offset_place(next), end.to_le_bytes());
        self.put_members(tree, pages, offset, members)
    }

    fn put_members(
        &self,
        tree: &mut Tree,
        pages: &mut Pages,
        offset: u32,
        members: &[(Xid, u8)],
    ) -> Result<(), StateError> {
        let mut number = offset;
        for (xid, status) in members {
            let index = MEMBERS.entry_of(number);
            let (group, member) = (index / GROUP_MEMBERS, index % GROUP_MEMBERS);
            let flags = group.saturating_mul(GROUP_BYTES);
            let page = pages.page(tree, MEMBERS, MEMBERS.page_of(number))?;
            put(page, flags.saturating_add(member) as usize, [*status]);
            let place = flags.saturating_add(GROUP_MEMBERS).saturating_add(member.saturating_mul(4));
            put(page, place as usize, xid.get().to_le_bytes());
            number = number.wrapping_add(1);
        }
        Ok(())
    }

    /// Forgets the multixacts before `end`, and `members`.
    pub(super) fn truncate(
        &mut self,
        tree: &mut Tree,
        pages: &mut Pages,
        end: u32,
        members: (u32, u32),
    ) -> Result<(), StateError> {
        let file = |member: u32| MEMBERS.page_of(member) / Slru::PAGES_PER_FILE;
        let (from, to) = (file(members.0), file(members.1));
        let goes = |file: u32| match from <= to {
            true => (from..to).contains(&file),
            // Around the end of the numbers.
            false => (from..=MEMBERS.page_max() / Slru::PAGES_PER_FILE).contains(&file) || file < to,
        };
        pages.remove_files(tree, MEMBERS, |first, _| goes(first / Slru::PAGES_PER_FILE))?;
        // The one before, for the page of the next one to come need not be there.
        let before = if end == FIRST { u32::MAX } else { end.wrapping_sub(1) };
        let cutoff = OFFSETS.page_of(before);
        // The server then takes it that the numbers have wrapped around, and leaves everything.
        if precedes(self.last_page, cutoff) {
            return Ok(());
        }
        pages.remove_files(tree, OFFSETS, |first, last| precedes(first, cutoff) && precedes(last, cutoff))
    }
}
