//! Walks a segment's pages and puts its records together, over page edges and over segment edges.

use std::fmt;

use crate::engines::postgres::cluster::History;
use crate::engines::postgres::wal::page::{LONG_HEADER_BYTES, PAGE_BYTES, PageHeader, SHORT_HEADER_BYTES};
use crate::engines::postgres::wal::record::{
    BlockRef, Parsed, RECORD_BYTES_MAX, RECORD_HEADER_BYTES, Record, RecordHeader,
};
use crate::engines::postgres::wal::rmgr::Rmgr;
use crate::engines::postgres::wal::{Damage, xlog};
use crate::ids::{Lsn, PgMajor, SystemId, TimelineId};
use crate::segment::SegmentSize;

/// Which part of the log a segment holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentSpan {
    start: Lsn,
    size: SegmentSize,
}

impl SegmentSpan {
    /// The segment of `size` that holds `lsn`; `None` where the log would end inside it.
    pub fn containing(lsn: Lsn, size: SegmentSize) -> Option<Self> {
        let start = size.floor(lsn);
        start.checked_add(size.bytes()).map(|_| Self { start, size })
    }

    /// Where it starts.
    pub const fn start(self) -> Lsn {
        self.start
    }

    /// Where the next starts.
    pub const fn end(self) -> Lsn {
        self.start.saturating_add(self.size.bytes())
    }

    /// `wal_segment_size`.
    pub const fn size(self) -> SegmentSize {
        self.size
    }

    fn bytes(self) -> usize {
        usize::try_from(self.size.bytes()).unwrap_or(usize::MAX)
    }

    fn lsn(self, offset: usize) -> Lsn {
        self.start.saturating_add(offset as u64)
    }
}

/// What a segment's pages must agree with. What is left open is not checked.
#[derive(Debug, Clone, Copy, Default)]
pub struct Expected<'a> {
    /// System identifiers, one of which the segment carries; any where empty.
    pub system_ids: &'a [SystemId],
    /// The major version.
    pub major: Option<PgMajor>,
    /// The timeline in the segment's name: no page is of a later one.
    pub timeline: Option<TimelineId>,
    /// That timeline's history: each page is of the timeline that held its position.
    pub history: Option<&'a History>,
}

/// A record whose beginning is known and whose end lies in a later segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    /// Where it starts.
    pub start: Lsn,
    /// Its whole length, `xl_tot_len`.
    pub total_bytes: u32,
    /// What is known of it, page headers taken out.
    pub bytes: Vec<u8>,
}

impl Pending {
    /// How many bytes are still to come.
    pub fn missing_bytes(&self) -> u32 {
        self.total_bytes.saturating_sub(u32::try_from(self.bytes.len()).unwrap_or(u32::MAX))
    }
}

/// How the log stands at the end of a segment: what the next one has to go on from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreviousTail {
    /// Start of the last record that was read whole: what the next record's `xl_prev` says.
    pub last_record: Option<Lsn>,
    /// A record that runs over the edge.
    pub pending: Option<Pending>,
    /// `xlp_tli` of the last page.
    pub timeline: TimelineId,
    /// The end of the segment, where the next one starts.
    pub end: Lsn,
}

/// Why the log stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// The segment ends, and the last record with it or earlier in `XLOG_SWITCH`.
    SegmentEnd {
        /// Whether `XLOG_SWITCH` ended it; what follows that record is void.
        switched: bool,
    },
    /// A record that began in an earlier, unknown segment fills all of this one and goes on.
    Continues,
    /// Where a record should start there are zeros.
    ZeroLength,
    /// Where a page should start there are zeros.
    ZeroPage,
    /// The next page holds an earlier position: a recycled segment's old content.
    OldPage {
        /// The position it claims.
        address: Lsn,
    },
    /// The bytes given end before the segment does.
    BytesEnd,
    /// A page or record is broken, where a broken one may end the log.
    Damage,
}

impl EndReason {
    /// Whether the log stops inside the segment.
    pub const fn is_inside(self) -> bool {
        !matches!(self, Self::SegmentEnd { .. } | Self::Continues)
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SegmentEnd { switched: false } | Self::Continues => f.write_str("the segment ends"),
            Self::SegmentEnd { switched: true } => f.write_str("the server switched to the next segment"),
            Self::ZeroLength => f.write_str("there are zeros where a record should start"),
            Self::ZeroPage => f.write_str("there are zeros where a page should start"),
            Self::OldPage { address } => write!(f, "the next page is an old one, of {address}"),
            Self::BytesEnd => f.write_str("the file ends"),
            Self::Damage => f.write_str("what follows is broken"),
        }
    }
}

/// Where and why the log stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogEnd {
    /// Why.
    pub reason: EndReason,
    /// The end of the last record that is whole.
    pub valid_end: Lsn,
    /// Where the reason was found.
    pub found_at: Lsn,
}

impl LogEnd {
    /// The same, for a log that should go on there.
    pub(crate) fn as_damage(&self, span: SegmentSpan) -> Damage {
        let at = self.found_at;
        let damage = match self.reason {
            EndReason::OldPage { address } => {
                Damage::mismatch("xlp_pageaddr", at.saturating_add(8), address.get(), at.get())
            }
            EndReason::ZeroLength => Damage::invalid("xl_tot_len", at, 0),
            _ => Damage::invalid("xlp_magic", at, 0),
        };
        damage.in_segments_of(span.size.bytes())
    }
}

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
pub struct RecordStream<'a> {
    span: SegmentSpan,
    bytes: &'a [u8],
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
    scratch: Vec<u8>,
    blocks: Vec<BlockRef>,
}

/// A page that was entered, or the reason why the log stops before it.
enum Entered {
    Page(PageHeader),
    Stop(EndReason),
}

/// What became of the rest of a record.
enum Rest {
    /// It ends at this byte of the segment.
    Whole { end: usize },
    /// A page says that it was aborted; the stream stands behind that page's header.
    Aborted,
    /// It runs over the segment's edge.
    Over,
    /// The log stops inside it.
    Stop { reason: EndReason, at: usize },
}

/// Where a record's bytes are.
enum Place {
    Segment(usize),
    Scratch,
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

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..)?.first_chunk::<4>()?;
    Some(u32::from_le_bytes(*field))
}

impl<'a> RecordStream<'a> {
    /// A stream over `bytes`, a segment or its first part. `tail` is what the segment before left, so that
    /// a record that runs over the edge can be put together and `xl_prev` compared.
    pub fn new(
        bytes: &'a [u8],
        span: SegmentSpan,
        expected: Expected<'a>,
        tail: Option<PreviousTail>,
    ) -> Result<Self, Damage> {
        let bytes = bytes.get(..span.bytes()).unwrap_or(bytes);
        let tail = tail.filter(|tail| tail.end == span.start);
        let first_page =
            PageHeader::decode(bytes, span.start).map_err(|e| e.in_segments_of(span.size.bytes()))?;
        let mut stream = Self {
            span,
            bytes,
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
            scratch: Vec::new(),
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
                let bytes = Self::bytes_of(self.bytes, &self.scratch, &found);
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
            let Some(total_bytes) = read_u32(self.bytes, start_at) else {
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
                if whole_end > self.bytes.len() {
                    return Ok(self.stop(EndReason::BytesEnd, self.bytes.len()));
                }
                self.at = align8(whole_end);
                let end = self.span.lsn(self.at);
                return Ok(Step::Found(Found { place: Place::Segment(start_at), start, end, total_bytes }));
            }
            let Some(first_part) = self.bytes.get(start_at..page_end) else {
                return Ok(self.stop(EndReason::BytesEnd, self.bytes.len()));
            };
            self.scratch.clear();
            self.scratch.extend_from_slice(first_part);
            let remaining = total_bytes.saturating_sub(u32_of(first_part.len()));
            match self.collect(page_end, remaining, true).map_err(|e| e.in_record(start))? {
                Rest::Whole { end } => {
                    self.at = align8(end);
                    let end = self.span.lsn(self.at);
                    return Ok(Step::Found(Found { place: Place::Scratch, start, end, total_bytes }));
                }
                Rest::Aborted => self.aborted = Some(start),
                Rest::Over => {
                    self.pending =
                        Some(Pending { start, total_bytes, bytes: std::mem::take(&mut self.scratch) });
                    return Ok(Step::Pending);
                }
                Rest::Stop { reason, at } => return Ok(self.stop(reason, at)),
            }
        }
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

    /// Deals with what the first page says about the record before it.
    fn enter_first_page(&mut self) -> Result<Option<Step>, Damage> {
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
        self.scratch = pending.map(|p| p.bytes).unwrap_or_default();
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
                Ok(Some(Step::Found(Found { place: Place::Scratch, start, end, total_bytes })))
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
                self.pending = Some(Pending { start, total_bytes, bytes: std::mem::take(&mut self.scratch) });
                Ok(Some(Step::Pending))
            }
            Rest::Stop { reason, at } => {
                self.head = Some(StreamHead::Unjoined);
                Ok(Some(self.stop(reason, at)))
            }
        }
    }

    /// Collects the rest of a record from the page at `at` on.
    fn collect(&mut self, at: usize, remaining: u32, keep: bool) -> Result<Rest, Damage> {
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
    fn collect_from(
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
            let Some(part) = self.bytes.get(from..end) else {
                return Ok(Rest::Stop { reason: EndReason::BytesEnd, at: self.bytes.len() });
            };
            if keep {
                self.scratch.extend_from_slice(part);
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
    fn enter(&mut self, at: usize) -> Result<Entered, Damage> {
        let bytes = self.bytes.get(at..).unwrap_or_default();
        let Some(header) = bytes.get(..SHORT_HEADER_BYTES) else {
            return Ok(Entered::Stop(EndReason::BytesEnd));
        };
        if header.iter().all(|b| *b == 0) {
            return Ok(Entered::Stop(EndReason::ZeroPage));
        }
        let lsn = self.span.lsn(at);
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
    fn check_page(&self, page: &PageHeader, at: usize) -> Result<(), Damage> {
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

    fn bytes_of<'s>(segment: &'s [u8], scratch: &'s [u8], found: &Found) -> &'s [u8] {
        let total = usize_of(found.total_bytes);
        match found.place {
            Place::Segment(at) => segment.get(at..at.saturating_add(total)).unwrap_or_default(),
            Place::Scratch => scratch,
        }
    }

    /// Checks a record that was found, and what it says about the log around it.
    fn check(&mut self, found: &Found) -> Result<Checked, Damage> {
        let major = self.first_page.major;
        let bytes = Self::bytes_of(self.bytes, &self.scratch, found);
        let damage = |corrupt: crate::Corrupt| Damage {
            lsn: lsn_in_record(found.start, corrupt.at, self.span.size),
            record: Some(found.start),
            corrupt,
        };
        let end = found.end;
        let header = RecordHeader::decode(bytes, major).map_err(damage)?;
        if header.total_bytes as usize != bytes.len() {
            return Err(damage(crate::Corrupt::mismatch(
                "xl_tot_len",
                0,
                u64::from(header.total_bytes),
                bytes.len() as u64,
            )));
        }
        let prev =
            |expected: u64| damage(crate::Corrupt::mismatch("xl_prev", 8, header.prev.get(), expected));
        match self.prev {
            Some(expected) if expected != header.prev => return Err(prev(expected.get())),
            None if header.prev >= found.start => return Err(prev(found.start.get())),
            _ => {}
        }
        header.check_crc(bytes).map_err(damage)?;
        let parsed = Record::parse(bytes, major, &mut self.blocks).map_err(damage)?;
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
                self.switch();
                return Ok(Checked { header, parsed, end });
            }
        }
        if overwriting {
            let found = u64::from(header.rmgr.get());
            return Err(damage(crate::Corrupt::mismatch("xl_rmid", 17, found, u64::from(Rmgr::XLOG.get()))));
        }
        Ok(Checked { header, parsed, end })
    }

    /// The rest of the segment is void.
    fn switch(&mut self) {
        if self.at < self.span.bytes() {
            self.switched_at = Some(self.at);
        }
        self.at = self.span.bytes();
    }

    /// Makes the pending record whole from the segment that follows.
    fn join_next(&mut self) -> Option<Found> {
        let next = self.next?;
        let pending = self.pending.as_ref()?;
        let next_span = SegmentSpan::containing(self.span.end(), self.span.size)?;
        let expected = Expected {
            major: Some(self.first_page.major),
            system_ids: self.expected.system_ids,
            ..Expected::default()
        };
        let tail = PreviousTail {
            last_record: self.prev,
            pending: Some(pending.clone()),
            timeline: self.timeline,
            end: self.span.end(),
        };
        let mut stream = RecordStream::new(next, next_span, expected, Some(tail)).ok()?;
        let Ok(Next::Record(record)) = stream.next_record() else { return None };
        if record.start != pending.start {
            return None;
        }
        let found = Found {
            place: Place::Scratch,
            start: record.start,
            end: record.end,
            total_bytes: record.header.total_bytes,
        };
        self.scratch = stream.scratch;
        Some(found)
    }

    /// Yields the record that the following segment made whole. It was checked there.
    fn finish_joined(&mut self, found: Found) -> Result<Next<'_>, Damage> {
        self.at = self.span.bytes();
        match self.check(&found) {
            Ok(Checked { header, parsed, end }) => {
                self.joined_next = true;
                self.valid_end = self.span.end();
                self.finished = Some(Ok(self.segment_end()));
                let major = self.first_page.major;
                Ok(Next::Record(Record::assemble(
                    found.start,
                    end,
                    major,
                    header,
                    &self.scratch,
                    &self.blocks,
                    parsed,
                )))
            }
            Err(_) => self.need_more(),
        }
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

impl PreviousTail {
    /// Finds how a segment ends without reading all of it: goes back to a page behind whose header a record
    /// can start, and reads from there. `None` where no such page leads to the segment's end; only what is
    /// proved by a CRC is believed.
    pub fn find(bytes: &[u8], span: SegmentSpan, expected: Expected<'_>) -> Option<Self> {
        let bytes = bytes.get(..span.bytes())?;
        let mut at = span.bytes();
        while let Some(page_at) = at.checked_sub(PAGE_BYTES) {
            at = page_at;
            let page = PageHeader::decode(bytes.get(page_at..)?, span.lsn(page_at)).ok()?;
            let continued = align8(usize_of(page.continued_bytes));
            if continued >= PAGE_BYTES.saturating_sub(page.bytes()) {
                continue;
            }
            let first = page_at.saturating_add(page.bytes()).saturating_add(continued);
            let mut stream = RecordStream::new(bytes, span, expected, None).ok()?;
            stream.head = Some(StreamHead::Unjoined);
            stream.tail = None;
            stream.at = first;
            stream.timeline = page.timeline;
            stream.overwriting = page.flags.overwrites_contrecord();
            loop {
                if !matches!(stream.next_record(), Ok(Next::Record(_))) {
                    break;
                }
            }
            // A pending record alone proves nothing: some whole record before it must.
            if stream.prev.is_some() {
                return stream.into_tail();
            }
        }
        None
    }
}

#[cfg(test)]
mod tests;
