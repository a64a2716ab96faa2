//! Walks a segment's pages and puts its records together, over page edges and over segment edges.

mod ending;
mod gather;
mod neighbours;
mod pages;
mod source;
mod span;

use std::ops::Range;

use crate::engines::postgres::wal::page::{LONG_HEADER_BYTES, PAGE_BYTES, PageHeader, SHORT_HEADER_BYTES};
use crate::engines::postgres::wal::record::{
    BlockRef, Parsed, RECORD_BYTES_MAX, RECORD_HEADER_BYTES, Record, RecordHeader, crc_of,
};
use crate::engines::postgres::wal::rmgr::Rmgr;
use crate::engines::postgres::wal::{Damage, xlog};
use crate::ids::{Lsn, PgMajor, TimelineId};
use crate::segment::SegmentSize;
use gather::Gathered;
use pages::{Entered, Rest};

pub use ending::{EndReason, LogEnd, Pending, PreviousTail};
pub use pages::copy_record;
pub use source::WalBytes;
pub use span::{Expected, SegmentSpan};

/// What [`RecordStream::next_record`] found.
#[derive(Debug)]
pub enum Next<'r> {
    /// A record.
    Record(Record<'r>),
    /// A record that begins here and ends in a later segment, which was not given or does not go on with it.
    NeedMore(&'r Pending),
    /// The log stops.
    End(LogEnd),
}

/// How the segment's first page joins the segment before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamHead {
    /// A record starts behind the page header.
    Clean,
    /// It goes on with a record that began before; that record was put together and is right.
    Joined,
    /// It goes on with a record whose beginning is not known.
    Unjoined,
    /// The record that should go on was aborted by a crash.
    Overwrites,
}

/// The records of one segment.
///
/// Damage is an error and final. An error names the byte in the segment file that holds the position; the
/// position says which segment, as a record may have begun in the one before.
#[derive(Debug)]
pub struct RecordStream<'a, B = &'a [u8]> {
    span: SegmentSpan,
    bytes: B,
    /// How many bytes of the segment there are.
    length: usize,
    next: Option<&'a [u8]>,
    expected: Expected<'a>,
    first_page: PageHeader,
    /// What the segment before left, until the first page was looked at.
    tail: Option<PreviousTail>,
    head: Option<StreamHead>,
    /// The next byte to read.
    at: usize,
    timeline: TimelineId,
    /// Start of the last whole record.
    prev: Option<Lsn>,
    /// End of the last whole record.
    valid_end: Lsn,
    /// The current page says that its first record replaces an aborted one.
    overwriting: bool,
    /// Start of the aborted record, where known.
    aborted: Option<Lsn>,
    switched_at: Option<usize>,
    pending: Option<Pending>,
    joined_next: bool,
    finished: Option<Result<LogEnd, Damage>>,
    gathered: Gathered,
    leaves_images: bool,
    blocks: Vec<BlockRef>,
}

/// Where a record's bytes are.
enum Place {
    Segment(usize),
    Gathered,
}

/// A record found, not yet checked.
struct Found {
    place: Place,
    start: Lsn,
    end: Lsn,
    total_bytes: u32,
}

/// A record that was found and checked.
struct Checked {
    header: RecordHeader,
    parsed: Parsed,
    end: Lsn,
}

/// What the search for the next record's bytes ends with.
enum Step {
    Found(Found),
    Pending,
    End(LogEnd),
}

const fn align8(v: usize) -> usize {
    v.saturating_add(7) & !7
}

const fn usize_of(v: u32) -> usize {
    v as usize
}

fn u32_of(v: usize) -> u32 {
    u32::try_from(v).unwrap_or(u32::MAX)
}

impl<'a, B: WalBytes> RecordStream<'a, B> {
    /// A stream over `bytes`, a segment or its first part. `tail` is what the segment before left, so that
    /// a record that runs over the edge can be put together and `xl_prev` compared.
    pub fn new(
        mut bytes: B,
        span: SegmentSpan,
        expected: Expected<'a>,
        tail: Option<PreviousTail>,
    ) -> Result<Self, Damage> {
        let length = bytes.length().min(span.bytes());
        let tail = tail.filter(|tail| tail.end == span.start);
        let head = bytes.part(0..length.min(LONG_HEADER_BYTES)).unwrap_or_default();
        let first_page =
            PageHeader::decode(head, span.start).map_err(|e| e.in_segments_of(span.size.bytes()))?;
        let mut stream = Self {
            span,
            bytes,
            length,
            next: None,
            expected,
            first_page,
            at: 0,
            timeline: tail.as_ref().map_or(TimelineId::FIRST, |tail| tail.timeline),
            prev: tail.as_ref().and_then(|tail| tail.last_record),
            tail,
            head: None,
            valid_end: span.start,
            overwriting: false,
            aborted: None,
            switched_at: None,
            pending: None,
            joined_next: false,
            finished: None,
            gathered: Gathered::default(),
            leaves_images: false,
            blocks: Vec::new(),
        };
        stream.check_page(&first_page, 0).map_err(|e| e.in_segments_of(span.size.bytes()))?;
        stream.timeline = first_page.timeline;
        Ok(stream)
    }

    /// Gives the segment that follows, so that a record that runs over the edge can be put together. It is
    /// only looked at for that, and nothing that is wrong with it is this segment's damage.
    #[must_use]
    pub fn with_next(self, next: &'a [u8]) -> Self {
        Self { next: Some(next), ..self }
    }

    /// Leaves full-page images out of records that go over a page's edge: checked, but without bytes, so that none of them can
    /// be restored, and the record's bytes go on behind them. A record that goes over the segment's edge is whole.
    #[must_use]
    pub fn leaving_images(self) -> Self {
        Self { leaves_images: true, ..self }
    }

    /// What it reads.
    pub const fn source(&mut self) -> &mut B {
        &mut self.bytes
    }

    /// The first page's header.
    pub const fn first_page(&self) -> &PageHeader {
        &self.first_page
    }

    /// The major version.
    pub const fn major(&self) -> PgMajor {
        self.first_page.major
    }

    /// How the first page joins the segment before; known once the first record was asked for.
    pub const fn head(&self) -> Option<StreamHead> {
        self.head
    }

    /// `xlp_tli` of the last page that was read.
    pub const fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// The end of the last whole record.
    pub const fn valid_end(&self) -> Lsn {
        self.valid_end
    }

    /// Start of the last whole record.
    pub fn last_record(&self) -> Option<Lsn> {
        self.pending.as_ref().filter(|_| self.joined_next).map(|p| p.start).or(self.prev)
    }

    /// Where in the segment the void behind an `XLOG_SWITCH` starts.
    pub const fn switched_at(&self) -> Option<usize> {
        self.switched_at
    }

    /// A record that begins here and runs over the edge, once it was met; also after the segment that
    /// follows made it whole.
    pub const fn pending(&self) -> Option<&Pending> {
        self.pending.as_ref()
    }

    /// Whether that record was made whole.
    pub const fn joined_next(&self) -> bool {
        self.joined_next
    }

    /// What the next segment has to go on from, once this one was read to its end.
    pub fn into_tail(self) -> Option<PreviousTail> {
        match self.finished {
            Some(Ok(LogEnd { reason: EndReason::SegmentEnd { .. }, .. })) => Some(PreviousTail {
                last_record: self.prev,
                pending: self.pending,
                timeline: self.timeline,
                end: self.span.end(),
            }),
            _ => None,
        }
    }

    /// The next record. After the end, or after damage, the same answer again.
    pub fn next_record(&mut self) -> Result<Next<'_>, Damage> {
        if let Some(finished) = self.finished {
            return match (finished, &self.pending) {
                (Ok(LogEnd { reason: EndReason::SegmentEnd { .. }, .. }), Some(pending))
                    if !self.joined_next =>
                {
                    Ok(Next::NeedMore(pending))
                }
                (end, _) => end.map(Next::End),
            };
        }
        let step = self.step();
        let found = match step {
            Ok(Step::Found(found)) => found,
            Ok(Step::End(end)) => {
                self.finished = Some(Ok(end));
                return Ok(Next::End(end));
            }
            Ok(Step::Pending) => {
                if let Some(found) = self.join_next() {
                    return self.finish_joined(found);
                }
                return self.need_more();
            }
            Err(e) => return Err(self.fail(e)),
        };
        match self.check(&found) {
            Ok(Checked { header, parsed, end }) => {
                self.prev = Some(found.start);
                self.valid_end = end.min(self.span.end());
                let bytes = Self::bytes_of(&mut self.bytes, &self.gathered, &found);
                let major = self.first_page.major;
                Ok(Next::Record(Record::assemble(
                    found.start,
                    end,
                    major,
                    header,
                    bytes,
                    &self.blocks,
                    parsed,
                )))
            }
            Err(e) => Err(self.fail(e)),
        }
    }

    fn fail(&mut self, e: Damage) -> Damage {
        let e = e.in_segments_of(self.span.size.bytes());
        self.finished = Some(Err(e));
        e
    }

    fn segment_end(&self) -> LogEnd {
        let reason = EndReason::SegmentEnd { switched: self.switched_at.is_some() };
        LogEnd { reason, valid_end: self.span.end(), found_at: self.span.end() }
    }

    fn need_more(&mut self) -> Result<Next<'_>, Damage> {
        let end = LogEnd { valid_end: self.valid_end, ..self.segment_end() };
        self.finished = Some(Ok(end));
        match &self.pending {
            Some(pending) => Ok(Next::NeedMore(pending)),
            None => Ok(Next::End(end)),
        }
    }

    fn stop(&self, reason: EndReason, at: usize) -> Step {
        Step::End(LogEnd { reason, valid_end: self.valid_end, found_at: self.span.lsn(at) })
    }

    /// Finds the bytes of the next record.
    fn step(&mut self) -> Result<Step, Damage> {
        if self.head.is_none()
            && let Some(step) = self.enter_first_page()?
        {
            return Ok(step);
        }
        loop {
            if self.at >= self.span.bytes() {
                return Ok(Step::End(self.segment_end()));
            }
            if self.at.is_multiple_of(PAGE_BYTES) {
                let page = match self.enter(self.at)? {
                    Entered::Page(page) => page,
                    Entered::Stop(reason) => return Ok(self.stop(reason, self.at)),
                };
                if page.flags.continues_record() {
                    let lsn = self.span.lsn(self.at.saturating_add(16));
                    return Err(Damage::mismatch("xlp_rem_len", lsn, u64::from(page.continued_bytes), 0));
                }
                self.overwriting = page.flags.overwrites_contrecord();
                self.at = self.at.saturating_add(page.bytes());
            }
            let start_at = self.at;
            let start = self.span.lsn(start_at);
            // Records are aligned to 8 bytes, so a record's length never runs over a page's edge.
            let Some(total_bytes) = self.read_u32(start_at) else {
                return Ok(self.stop(EndReason::BytesEnd, start_at));
            };
            if total_bytes == 0 {
                return Ok(self.stop(EndReason::ZeroLength, start_at));
            }
            Self::check_length(total_bytes, start)?;
            let total = usize_of(total_bytes);
            let page_end = (start_at & !(PAGE_BYTES.wrapping_sub(1))).saturating_add(PAGE_BYTES);
            let whole_end = start_at.saturating_add(total);
            if whole_end <= page_end {
                if whole_end > self.length {
                    return Ok(self.stop(EndReason::BytesEnd, self.length));
                }
                self.at = align8(whole_end);
                let end = self.span.lsn(self.at);
                return Ok(Step::Found(Found { place: Place::Segment(start_at), start, end, total_bytes }));
            }
            self.gathered.begin(total_bytes, self.leaves_images && self.fits(page_end, whole_end));
            if !self.keep(start_at..page_end) {
                return Ok(self.stop(EndReason::BytesEnd, self.length));
            }
            let remaining = total_bytes.saturating_sub(self.gathered.read());
            match self.collect(page_end, remaining, true).map_err(|e| e.in_record(start))? {
                Rest::Whole { end } => {
                    self.at = align8(end);
                    let end = self.span.lsn(self.at);
                    return Ok(Step::Found(Found { place: Place::Gathered, start, end, total_bytes }));
                }
                Rest::Aborted => self.aborted = Some(start),
                Rest::Over => {
                    self.pending = Some(Pending { start, total_bytes, bytes: self.gathered.take() });
                    return Ok(Step::Pending);
                }
                Rest::Stop { reason, at } => return Ok(self.stop(reason, at)),
            }
        }
    }

    /// What there is in `range`, which lies in one page.
    fn part(&mut self, range: Range<usize>) -> Option<&[u8]> {
        if range.end > self.length { None } else { self.bytes.part(range) }
    }

    fn read_u32(&mut self, at: usize) -> Option<u32> {
        let field = self.part(at..at.saturating_add(4))?.first_chunk::<4>()?;
        Some(u32::from_le_bytes(*field))
    }

    fn check_length(total_bytes: u32, start: Lsn) -> Result<(), Damage> {
        if usize_of(total_bytes) < RECORD_HEADER_BYTES {
            return Err(Damage::invalid("xl_tot_len", start, u64::from(total_bytes)).in_record(start));
        }
        if total_bytes > RECORD_BYTES_MAX {
            let (found, max) = (u64::from(total_bytes), u64::from(RECORD_BYTES_MAX));
            return Err(Damage::too_large("xl_tot_len", start, found, max).in_record(start));
        }
        Ok(())
    }

    /// Whether a record ends in this segment that would end at `whole_end`, were there no pages from `page_end` on.
    fn fits(&self, page_end: usize, whole_end: usize) -> bool {
        let pages = self.span.bytes().saturating_sub(page_end) / PAGE_BYTES;
        whole_end.saturating_sub(page_end)
            <= pages.saturating_mul(PAGE_BYTES.saturating_sub(SHORT_HEADER_BYTES))
    }

    /// Puts a part of a page behind what is kept of a record; false where the bytes end before.
    fn keep(&mut self, range: Range<usize>) -> bool {
        let part = if range.end > self.length { None } else { self.bytes.part(range) };
        part.map(|part| self.gathered.add(part, self.first_page.major, &mut self.blocks)).is_some()
    }

    fn bytes_of<'s>(segment: &'s mut B, gathered: &'s Gathered, found: &Found) -> &'s [u8] {
        let total = usize_of(found.total_bytes);
        match found.place {
            Place::Segment(at) => segment.part(at..at.saturating_add(total)).unwrap_or_default(),
            Place::Gathered => gathered.bytes(),
        }
    }

    /// Checks a record that was found, and what it says about the log around it.
    fn check(&mut self, found: &Found) -> Result<Checked, Damage> {
        let major = self.first_page.major;
        let bytes = Self::bytes_of(&mut self.bytes, &self.gathered, found);
        let (length, crc) = match found.place {
            Place::Segment(_) => (u32_of(bytes.len()), crc_of(bytes)),
            Place::Gathered => (self.gathered.read(), self.gathered.crc()),
        };
        let damage = |corrupt: crate::Corrupt| Damage {
            lsn: lsn_in_record(found.start, corrupt.at, self.span.size),
            record: Some(found.start),
            corrupt,
        };
        let end = found.end;
        let header = RecordHeader::decode(bytes, major).map_err(damage)?;
        if header.total_bytes != length {
            let (found, expected) = (u64::from(header.total_bytes), u64::from(length));
            return Err(damage(crate::Corrupt::mismatch("xl_tot_len", 0, found, expected)));
        }
        let prev =
            |expected: u64| damage(crate::Corrupt::mismatch("xl_prev", 8, header.prev.get(), expected));
        match self.prev {
            Some(expected) if expected != header.prev => return Err(prev(expected.get())),
            None if header.prev >= found.start => return Err(prev(found.start.get())),
            _ => {}
        }
        header.compare_crc(crc).map_err(damage)?;
        let parsed = match found.place {
            Place::Segment(_) => Record::parse(bytes, major, &mut self.blocks),
            Place::Gathered => self.gathered.parse(major, &mut self.blocks),
        };
        let parsed = parsed.map_err(damage)?;
        let overwriting = std::mem::take(&mut self.overwriting);
        let aborted = if overwriting { self.aborted.take() } else { None };
        if header.rmgr == Rmgr::XLOG {
            let record = Record::assemble(found.start, found.end, major, header, bytes, &self.blocks, parsed);
            if header.kind() == xlog::OVERWRITE_CONTRECORD {
                let told = xlog::OverwriteContrecord::decode(record.main_data()).map_err(damage)?;
                let expected = aborted.unwrap_or(told.overwritten);
                if !overwriting || told.overwritten != expected {
                    let at = bytes.len().saturating_sub(record.main_data().len()) as u64;
                    return Err(damage(crate::Corrupt::mismatch(
                        "overwritten_lsn",
                        at,
                        told.overwritten.get(),
                        aborted.map_or(0, Lsn::get),
                    )));
                }
                return Ok(Checked { header, parsed, end });
            }
            if header.kind() == xlog::SWITCH {
                let end = switched_end(end, self.span.size);
                // The rest of the segment is void.
                if self.at < self.span.bytes() {
                    self.switched_at = Some(self.at);
                }
                self.at = self.span.bytes();
                return Ok(Checked { header, parsed, end });
            }
        }
        if overwriting {
            let found = u64::from(header.rmgr.get());
            return Err(damage(crate::Corrupt::mismatch("xl_rmid", 17, found, u64::from(Rmgr::XLOG.get()))));
        }
        Ok(Checked { header, parsed, end })
    }
}

/// The position of byte `at` of a record that starts at `start`, page headers passed over.
fn lsn_in_record(start: Lsn, at: u64, size: SegmentSize) -> Lsn {
    let page_bytes = PAGE_BYTES as u64;
    let page_of = |lsn: Lsn| lsn.saturating_sub(lsn.get() & page_bytes.wrapping_sub(1));
    let (mut lsn, mut left) = (start, at);
    loop {
        let edge = page_of(lsn).saturating_add(page_bytes);
        let here = edge.bytes_since(lsn);
        if left < here || edge == Lsn::MAX {
            return lsn.saturating_add(left);
        }
        left = left.saturating_sub(here);
        let long = size.floor(edge) == edge;
        lsn = edge.saturating_add(if long { LONG_HEADER_BYTES } else { SHORT_HEADER_BYTES } as u64);
    }
}

/// `XLOG_SWITCH` rounds a record's end up to the segment's.
fn switched_end(end: Lsn, size: SegmentSize) -> Lsn {
    let floor = size.floor(end);
    if floor == end { end } else { floor.saturating_add(size.bytes()) }
}

#[cfg(test)]
mod tests;
