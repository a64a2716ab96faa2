//! From page to page: their headers, and records that run over their edges.

use super::{
    EndReason, Found, LogEnd, Pending, Place, RecordStream, Step, StreamHead, WalBytes, align8, u32_of,
    usize_of,
};
use crate::engines::postgres::wal::Damage;
use crate::engines::postgres::wal::page::{LONG_HEADER_BYTES, PAGE_BYTES, PageHeader, SHORT_HEADER_BYTES};

/// A page that was entered, or the reason why the log stops before it.
pub(super) enum Entered {
    Page(PageHeader),
    Stop(EndReason),
}

/// What became of the rest of a record.
pub(super) enum Rest {
    /// It ends at this byte of the segment.
    Whole { end: usize },
    /// A page says that it was aborted; the stream stands behind that page's header.
    Aborted,
    /// It runs over the segment's edge.
    Over,
    /// The log stops inside it.
    Stop { reason: EndReason, at: usize },
}

/// Copies a record that a [`RecordStream`] gave, and that begins at byte `at` of its segment, behind what `record` holds;
/// page headers are taken out. `next` is the segment that follows, where the record runs over the edge. None where that is
/// not enough.
pub fn copy_record(
    segment: &[u8],
    next: Option<&[u8]>,
    at: usize,
    bytes: usize,
    record: &mut Vec<u8>,
) -> Option<()> {
    let (mut segment, mut next, mut at, mut left) = (segment, next, at, bytes);
    loop {
        if at >= segment.len() {
            segment = next.take()?;
            at = LONG_HEADER_BYTES;
        }
        let page_end = (at & !PAGE_BYTES.wrapping_sub(1)).saturating_add(PAGE_BYTES);
        let here = left.min(page_end.saturating_sub(at));
        record.extend_from_slice(segment.get(at..at.saturating_add(here))?);
        left = left.saturating_sub(here);
        if left == 0 {
            return Some(());
        }
        // The first page of the next segment has its own header.
        at = if page_end < segment.len() { page_end.saturating_add(SHORT_HEADER_BYTES) } else { page_end };
    }
}

impl<B: WalBytes> RecordStream<'_, B> {
    /// Deals with what the first page says about the record before it.
    pub(super) fn enter_first_page(&mut self) -> Result<Option<Step>, Damage> {
        let page = self.first_page;
        let tail = self.tail.take();
        let known = tail.is_some();
        let pending = tail.and_then(|tail| tail.pending);
        let rem_len_at = self.span.lsn(16);
        self.at = page.bytes();
        if page.flags.overwrites_contrecord() && !page.flags.continues_record() {
            self.head = Some(StreamHead::Overwrites);
            self.overwriting = true;
            self.aborted = pending.map(|p| p.start);
            return Ok(None);
        }
        let found = page.continued_bytes;
        let wanted = pending.as_ref().map_or(0, Pending::missing_bytes);
        if known && found != wanted {
            return Err(Damage::mismatch("xlp_rem_len", rem_len_at, u64::from(found), u64::from(wanted)));
        }
        if found == 0 {
            self.head = Some(StreamHead::Clean);
            return Ok(None);
        }
        let keep = pending.is_some();
        let (start, total_bytes) = pending.as_ref().map_or((None, 0), |p| (Some(p.start), p.total_bytes));
        self.gathered.resume(pending.map(|p| p.bytes).unwrap_or_default());
        let rest = self.collect_from(page, 0, found, keep);
        let rest = match start {
            Some(start) => rest.map_err(|e| e.in_record(start))?,
            None => rest?,
        };
        match rest {
            Rest::Whole { end } => {
                self.at = align8(end);
                let Some(start) = start else {
                    self.head = Some(StreamHead::Unjoined);
                    self.valid_end = self.span.lsn(self.at);
                    return Ok(None);
                };
                self.head = Some(StreamHead::Joined);
                let end = self.span.lsn(self.at);
                Ok(Some(Step::Found(Found { place: Place::Gathered, start, end, total_bytes })))
            }
            Rest::Aborted => {
                self.head = Some(StreamHead::Unjoined);
                self.aborted = start;
                Ok(None)
            }
            Rest::Over => {
                self.head = Some(StreamHead::Unjoined);
                self.at = self.span.bytes();
                let Some(start) = start else {
                    let (valid_end, found_at) = (self.span.end(), self.span.end());
                    return Ok(Some(Step::End(LogEnd { reason: EndReason::Continues, valid_end, found_at })));
                };
                self.pending = Some(Pending { start, total_bytes, bytes: self.gathered.take() });
                Ok(Some(Step::Pending))
            }
            Rest::Stop { reason, at } => {
                self.head = Some(StreamHead::Unjoined);
                Ok(Some(self.stop(reason, at)))
            }
        }
    }

    /// Collects the rest of a record from the page at `at` on.
    pub(super) fn collect(&mut self, at: usize, remaining: u32, keep: bool) -> Result<Rest, Damage> {
        if at >= self.span.bytes() {
            return Ok(Rest::Over);
        }
        let page = match self.enter(at)? {
            Entered::Page(page) => page,
            Entered::Stop(reason) => return Ok(Rest::Stop { reason, at }),
        };
        if page.flags.overwrites_contrecord() {
            self.overwriting = true;
            self.at = at.saturating_add(page.bytes());
            return Ok(Rest::Aborted);
        }
        self.collect_from(page, at, remaining, keep)
    }

    /// Collects the rest of a record from the page at `at`, whose header is `page`, on.
    pub(super) fn collect_from(
        &mut self,
        page: PageHeader,
        at: usize,
        remaining: u32,
        keep: bool,
    ) -> Result<Rest, Damage> {
        let (mut page, mut at, mut remaining) = (page, at, remaining);
        loop {
            if page.continued_bytes != remaining {
                let lsn = self.span.lsn(at.saturating_add(16));
                let (found, expected) = (u64::from(page.continued_bytes), u64::from(remaining));
                return Err(Damage::mismatch("xlp_rem_len", lsn, found, expected));
            }
            let from = at.saturating_add(page.bytes());
            let len = usize_of(remaining).min(PAGE_BYTES.saturating_sub(page.bytes()));
            let end = from.saturating_add(len);
            let is_there = if keep { self.keep(from..end) } else { end <= self.length };
            if !is_there {
                return Ok(Rest::Stop { reason: EndReason::BytesEnd, at: self.length });
            }
            remaining = remaining.saturating_sub(u32_of(len));
            if remaining == 0 {
                return Ok(Rest::Whole { end });
            }
            at = at.saturating_add(PAGE_BYTES);
            if at >= self.span.bytes() {
                return Ok(Rest::Over);
            }
            page = match self.enter(at)? {
                Entered::Page(page) => page,
                Entered::Stop(reason) => return Ok(Rest::Stop { reason, at }),
            };
            if page.flags.overwrites_contrecord() {
                self.overwriting = true;
                self.at = at.saturating_add(page.bytes());
                return Ok(Rest::Aborted);
            }
        }
    }

    /// Decodes and checks the header of the page at `at`.
    pub(super) fn enter(&mut self, at: usize) -> Result<Entered, Damage> {
        let span = self.span;
        let bytes = self.part(at..at.saturating_add(LONG_HEADER_BYTES).min(self.length)).unwrap_or_default();
        let Some(header) = bytes.get(..SHORT_HEADER_BYTES) else {
            return Ok(Entered::Stop(EndReason::BytesEnd));
        };
        if header.iter().all(|b| *b == 0) {
            return Ok(Entered::Stop(EndReason::ZeroPage));
        }
        let lsn = span.lsn(at);
        let page = match PageHeader::decode(bytes, lsn) {
            Ok(page) => page,
            Err(e) => match PageHeader::decode_anywhere(bytes, lsn) {
                Ok(old) if old.address < lsn => {
                    return Ok(Entered::Stop(EndReason::OldPage { address: old.address }));
                }
                _ => return Err(e),
            },
        };
        self.check_page(&page, at)?;
        self.timeline = page.timeline;
        Ok(Entered::Page(page))
    }

    /// Checks a page's header against the segment and against what is expected.
    pub(super) fn check_page(&self, page: &PageHeader, at: usize) -> Result<(), Damage> {
        let field = |offset: usize| self.span.lsn(at.saturating_add(offset));
        let major = self.expected.major.unwrap_or(self.first_page.major);
        if page.major != major {
            let (found, expected) = (u64::from(page.major.page_magic()), u64::from(major.page_magic()));
            return Err(Damage::mismatch("xlp_magic", field(0), found, expected));
        }
        if page.flags.is_long() != (at == 0) {
            return Err(Damage::mismatch(
                "xlp_info",
                field(2),
                u64::from(page.flags.is_long()),
                u64::from(at == 0),
            ));
        }
        let timeline = page.timeline;
        if timeline < self.timeline {
            let (found, expected) = (u64::from(timeline.get()), u64::from(self.timeline.get()));
            return Err(Damage::mismatch("xlp_tli", field(4), found, expected));
        }
        if let Some(max) = self.expected.timeline.filter(|max| timeline > *max) {
            return Err(Damage::too_large(
                "xlp_tli",
                field(4),
                u64::from(timeline.get()),
                u64::from(max.get()),
            ));
        }
        if let Some(held) = self.expected.history.map(|h| h.timeline_at(field(0))).filter(|t| *t != timeline)
        {
            let (found, expected) = (u64::from(timeline.get()), u64::from(held.get()));
            return Err(Damage::mismatch("xlp_tli", field(4), found, expected));
        }
        if let Some(long) = page.long {
            if let Some(expected) = self.expected.system_ids.last()
                && !self.expected.system_ids.contains(&long.system_id)
            {
                let lsn = field(SHORT_HEADER_BYTES);
                return Err(Damage::mismatch("xlp_sysid", lsn, long.system_id.get(), expected.get()));
            }
            if long.segment_size != self.span.size {
                let (found, expected) = (long.segment_size.bytes(), self.span.size.bytes());
                return Err(Damage::mismatch("xlp_seg_size", field(32), found, expected));
            }
        }
        Ok(())
    }
}
