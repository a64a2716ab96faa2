//! The one pass over a segment that is made when it arrives: every check of the design's third promise, and
//! the segment's index out of the same records.

mod index_builder;
mod state_builder;

use std::fmt;

use crate::archive::{AdmittedFault, Ending, PendingRecord, SegmentIndex, SegmentInfo};
use crate::engines::postgres::cluster::History;
use crate::engines::postgres::wal::{
    Damage, EndReason, Expected, LONG_HEADER_BYTES, LogEnd, Next, PAGE_BYTES, PageHeader, PreviousTail,
    RecordStream, SHORT_HEADER_BYTES, SegmentSpan, StreamHead, WalBytes,
};
use crate::ids::{Lsn, PgMajor, SystemId};
use crate::segment::{SegmentName, SegmentSize};
use crate::zeros::is_zero;
use index_builder::IndexBuilder;

/// How strict a scan is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScanMode {
    /// A whole segment: records must fill it.
    Whole,
    /// A `.partial` or the archive's shorter copy: the log may end anywhere.
    Partial,
    /// `--force-admit`: what is wrong is written into the index.
    Forced,
}

/// The segment before, which the first records are compared with.
#[derive(Debug, Clone)]
pub struct Previous<'a> {
    /// Its name: its timeline decides whether it is this segment's past at all.
    pub name: SegmentName,
    /// How its log stands at its end.
    pub log: PreviousLog<'a>,
}

/// How the log of the segment before stands at its end.
#[derive(Debug, Clone)]
pub enum PreviousLog<'a> {
    /// As an earlier scan found it.
    Tail(PreviousTail),
    /// To be looked up in its bytes. Where they do not lead to their end, the segment before counts as
    /// unknown: what is wrong with it is not this segment's fault.
    Bytes(&'a [u8]),
}

/// What a segment has to agree with.
#[derive(Debug, Clone)]
pub struct ScanContext<'a> {
    /// Its name.
    pub name: SegmentName,
    /// `wal_segment_size`.
    pub size: SegmentSize,
    /// The system identifiers the cluster has had; any where empty.
    pub system_ids: &'a [SystemId],
    /// The major version, where known.
    pub major: Option<PgMajor>,
    /// The segment before, where at hand.
    pub previous: Option<Previous<'a>>,
    /// The bytes of the segment that follows, where at hand, so that a record that runs over the edge can be
    /// joined. Its first part is enough for most records.
    pub next: Option<&'a [u8]>,
    /// The history of the timeline in the name, where known.
    pub history: Option<&'a History>,
    /// How strict to be.
    pub mode: ScanMode,
}

impl<'a> ScanContext<'a> {
    /// The strictest context that needs no more than the name and the size.
    pub const fn new(name: SegmentName, size: SegmentSize) -> Self {
        let mode = ScanMode::Whole;
        Self { name, size, system_ids: &[], major: None, previous: None, next: None, history: None, mode }
    }

    fn expected(&self) -> Expected<'a> {
        Expected {
            system_ids: self.system_ids,
            major: self.major,
            timeline: Some(self.name.timeline()),
            history: self.history.filter(|h| h.timeline() == self.name.timeline()),
        }
    }
}

/// What a scan found.
#[derive(Debug, Clone)]
pub struct Scan {
    /// The segment's index.
    pub index: SegmentIndex,
    /// Where and why the log stops.
    pub end: LogEnd,
    /// Damage that ended the reading of a partial segment or one admitted by force.
    pub stopped_by: Option<Damage>,
    /// What the next segment has to go on from; `None` where the log stops inside this one.
    pub tail: Option<PreviousTail>,
    /// Where the void behind `XLOG_SWITCH` starts, and whether it is blank as PostgreSQL leaves it. After a
    /// crash it may hold a recycled segment's old content, which is legal.
    pub void: Option<Void>,
}

/// What follows an `XLOG_SWITCH`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Void {
    /// The byte of the segment it starts at.
    pub from: u64,
    /// Whether it is zeros and page headers.
    pub blank: bool,
}

/// Why a segment is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScanError {
    /// No segment of that size has that name.
    NoSuchName {
        /// The name.
        name: SegmentName,
        /// `wal_segment_size`.
        size: SegmentSize,
    },
    /// It is shorter or longer than a segment.
    Length {
        /// Its length.
        found: u64,
        /// `wal_segment_size`.
        expected: u64,
    },
    /// A page header or a record is broken.
    Damaged(Damage),
    /// The log stops inside it, and nothing behind that place says that it should go on. A server that
    /// followed another timeline leaves such a segment; a primary never archives one.
    EndsEarly(LogEnd),
}

impl fmt::Display for ScanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchName { name, size } => {
                write!(f, "no segment of {} bytes is called {name}", size.bytes())
            }
            Self::Length { found, expected } => write!(f, "it has {found} bytes, a segment has {expected}"),
            Self::Damaged(damage) => damage.fmt(f),
            Self::EndsEarly(end) => write!(f, "the log stops inside it at {}: {}", end.valid_end, end.reason),
        }
    }
}

impl std::error::Error for ScanError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Damaged(damage) => Some(&damage.corrupt),
            _ => None,
        }
    }
}

/// Reads a segment once, from its first byte to its last: checks it and makes its index.
pub fn scan_segment<B: WalBytes>(mut bytes: B, context: &ScanContext<'_>) -> Result<Scan, ScanError> {
    let no_such_name = ScanError::NoSuchName { name: context.name, size: context.size };
    let start = context.name.start(context.size).ok_or(no_such_name)?;
    let span = SegmentSpan::containing(start, context.size).ok_or(no_such_name)?;
    let (found, expected) = (bytes.length() as u64, context.size.bytes());
    if found > expected || (found < expected && context.mode == ScanMode::Whole) {
        return Err(ScanError::Length { found, expected });
    }
    let tail = usable_tail(&mut bytes, span, context);
    let stream = RecordStream::new(bytes, span, context.expected(), tail).map_err(ScanError::Damaged)?;
    let mut stream = stream.leaving_images();
    if let Some(next) = context.next {
        stream = stream.with_next(next);
    }
    let mut builder = IndexBuilder::new(span);
    let ended = loop {
        match stream.next_record() {
            Ok(Next::Record(record)) => builder.add(&record),
            Ok(Next::NeedMore(_)) => {
                let end = stream.valid_end();
                break Ok(LogEnd {
                    reason: EndReason::SegmentEnd { switched: false },
                    valid_end: end,
                    found_at: span.end(),
                });
            }
            Ok(Next::End(end)) => break Ok(end),
            Err(damage) => break Err(damage),
        }
    };
    let valid_end = stream.valid_end();
    let (end, stopped_by) = judge_end(stream.source(), span, context.mode, ended, valid_end)?;
    let void =
        stream.switched_at().map(|from| Void { from: from as u64, blank: is_blank(stream.source(), from) });
    let info = segment_info(context, &stream, &builder, end, stopped_by);
    let mut index = SegmentIndex::new(info);
    builder.finish(&mut index);
    if context.mode == ScanMode::Forced {
        if found < expected {
            let message = ScanError::Length { found, expected }.to_string();
            index.faults.push(AdmittedFault { at: end.valid_end, message });
        } else if let Some(damage) = stopped_by {
            index.faults.push(AdmittedFault { at: damage.lsn, message: damage.to_string() });
        } else if end.reason.is_inside() {
            let message = ScanError::EndsEarly(end).to_string();
            index.faults.push(AdmittedFault { at: end.valid_end, message });
        }
    }
    Ok(Scan { index, end, stopped_by, tail: stream.into_tail(), void })
}

/// What the segment before left, if it is this segment's past: with another timeline's segment of that
/// position this one need not go on.
fn usable_tail<B: WalBytes>(
    bytes: &mut B,
    span: SegmentSpan,
    context: &ScanContext<'_>,
) -> Option<PreviousTail> {
    let previous = context.previous.as_ref()?;
    if previous.name.end(context.size) != Some(span.start()) {
        return None;
    }
    let of = previous.name.timeline();
    let head = bytes.part(0..bytes.length().min(LONG_HEADER_BYTES))?;
    let first_page = PageHeader::decode(head, span.start()).ok()?;
    let is_past = of == context.name.timeline()
        || match context.expected().history {
            Some(history) => history.timeline_at(span.start().saturating_sub(1)) == of,
            None => first_page.timeline == of,
        };
    if !is_past {
        return None;
    }
    match &previous.log {
        PreviousLog::Tail(tail) => Some(tail.clone()),
        PreviousLog::Bytes(bytes) => {
            let span = SegmentSpan::containing(previous.name.start(context.size)?, context.size)?;
            let expected = Expected { timeline: Some(of), history: None, ..context.expected() };
            PreviousTail::find(bytes, span, expected)
        }
    }
}

/// Decides whether a log may end so.
fn judge_end<B: WalBytes>(
    bytes: &mut B,
    span: SegmentSpan,
    mode: ScanMode,
    ended: Result<LogEnd, Damage>,
    valid_end: Lsn,
) -> Result<(LogEnd, Option<Damage>), ScanError> {
    match (ended, mode) {
        (Ok(end), ScanMode::Whole) if end.reason.is_inside() => {
            // A hole inside the log, rather than its end, has pages of the same log behind it.
            if goes_on_behind(bytes, span, end.found_at) {
                return Err(ScanError::Damaged(end.as_damage(span)));
            }
            Err(ScanError::EndsEarly(end))
        }
        (Ok(end), ScanMode::Forced)
            if end.reason.is_inside() && goes_on_behind(bytes, span, end.found_at) =>
        {
            Ok((end, Some(end.as_damage(span))))
        }
        (Ok(end), _) => Ok((end, None)),
        (Err(damage), ScanMode::Whole) => Err(ScanError::Damaged(damage)),
        (Err(damage), _) => {
            let end = LogEnd { reason: EndReason::Damage, valid_end, found_at: damage.lsn };
            Ok((end, Some(damage)))
        }
    }
}

/// Whether any page behind `from` belongs there.
fn goes_on_behind<B: WalBytes>(bytes: &mut B, span: SegmentSpan, from: Lsn) -> bool {
    let from = usize::try_from(from.bytes_since(span.start())).unwrap_or(usize::MAX);
    let length = bytes.length();
    let pages = (0..length).step_by(PAGE_BYTES).skip_while(|at| *at <= from);
    let mut pages = pages.map(|at| (at, at..at.saturating_add(LONG_HEADER_BYTES).min(length)));
    pages.any(|(at, header)| {
        let place = span.start().saturating_add(at as u64);
        bytes.part(header).is_some_and(|header| PageHeader::decode(header, place).is_ok())
    })
}

/// Whether what lies behind `from` is page headers and zeros.
fn is_blank<B: WalBytes>(bytes: &mut B, from: usize) -> bool {
    let length = bytes.length();
    let mut at = from;
    while at < length {
        let page_at = at & !(PAGE_BYTES.wrapping_sub(1));
        let page_end = page_at.saturating_add(PAGE_BYTES).min(length);
        let from = if at == page_at { at.saturating_add(SHORT_HEADER_BYTES).min(page_end) } else { at };
        if !is_zero(bytes.part(from..page_end).unwrap_or_default()) {
            return false;
        }
        at = page_end;
    }
    true
}

fn segment_info<B: WalBytes>(
    context: &ScanContext<'_>,
    stream: &RecordStream<'_, B>,
    builder: &IndexBuilder,
    end: LogEnd,
    stopped_by: Option<Damage>,
) -> SegmentInfo {
    let first_page = stream.first_page();
    let span_start = context.name.start(context.size).unwrap_or_default();
    let system_id = first_page.long.map_or(SystemId::from(0), |long| long.system_id);
    let pending = stream.pending().filter(|p| p.start >= span_start).map(|p| PendingRecord {
        start: p.start,
        total_bytes: p.total_bytes,
        here_bytes: u32::try_from(p.bytes.len()).unwrap_or(u32::MAX),
        joined: stream.joined_next(),
    });
    let pending_prev = stream
        .pending()
        .and_then(|p| p.bytes.get(8..)?.first_chunk())
        .map(|b| Lsn::from(u64::from_le_bytes(*b)));
    let (first_record, first_prev) = match builder.first_record() {
        Some((start, prev)) => (Some(start), Some(prev)),
        None => (pending.map(|p| p.start), pending.and(pending_prev)),
    };
    let ending = match (end.reason, context.mode) {
        (EndReason::SegmentEnd { switched: true }, _) => Ending::Switch,
        (EndReason::SegmentEnd { switched: false } | EndReason::Continues, _) => Ending::Full,
        (_, ScanMode::Forced) if stopped_by.is_some() => Ending::Fault,
        _ => Ending::EndOfLog,
    };
    let valid_end = match ending {
        Ending::Full | Ending::Switch => context.name.end(context.size).unwrap_or(end.valid_end),
        Ending::EndOfLog | Ending::Fault => end.valid_end,
    };
    let mut info = SegmentInfo {
        system_id,
        major: first_page.major,
        name: context.name,
        size: context.size,
        first_page_timeline: first_page.timeline,
        last_page_timeline: stream.timeline(),
        continued_bytes: first_page.continued_bytes,
        overwrites_contrecord: first_page.flags.overwrites_contrecord(),
        first_record,
        first_prev,
        last_record: pending.map(|p| p.start).or(builder.last_record()),
        valid_end,
        ending,
        pending,
        head_joined: stream.head() == Some(StreamHead::Joined),
        records: 0,
        first_time: None,
        last_time: None,
        min_time: None,
        max_time: None,
        last_commit_time: None,
        commits: 0,
        image_bytes: 0,
    };
    builder.fill(&mut info, pending.is_some_and(|p| !p.joined));
    info
}

/// How two copies of a segment stand to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Agreement {
    /// Both hold the same records.
    Same,
    /// The first holds all of the second's records and more.
    FirstIsLonger,
    /// The second holds all of the first's records and more.
    SecondIsLonger,
    /// Both hold a record at this position, and not the same.
    Diverge {
        /// Where.
        at: Lsn,
    },
}

/// Compares two copies of the segment at `span`, record by record, as far as the shorter's valid records go.
/// What follows the last valid record counts in neither. An error is a first page that is none.
pub fn common_prefix(first: &[u8], second: &[u8], span: SegmentSpan) -> Result<Agreement, Damage> {
    let mut a = RecordStream::new(first, span, Expected::default(), None)?;
    let mut b = RecordStream::new(second, span, Expected::default(), None)?;
    if let Some(at) = different_heads(first, second, &a, &b, span) {
        return Ok(Agreement::Diverge { at });
    }
    loop {
        let (x, y) = (next_part(&mut a), next_part(&mut b));
        match (x, y) {
            (Part::End, Part::End) => return Ok(Agreement::Same),
            (_, Part::End) => return Ok(Agreement::FirstIsLonger),
            (Part::End, _) => return Ok(Agreement::SecondIsLonger),
            (Part::Record(x, x_bytes), Part::Record(y, y_bytes)) => {
                if x != y || x_bytes != y_bytes {
                    return Ok(Agreement::Diverge { at: x.min(y) });
                }
            }
        }
    }
}

/// How two stored copies of a segment stand to each other. A copy without a readable first page holds no record.
pub fn agreement(first: &[u8], second: &[u8], name: SegmentName, size: SegmentSize) -> Agreement {
    let span = name.start(size).and_then(|start| SegmentSpan::containing(start, size));
    let Some(span) = span else { return Agreement::FirstIsLonger };
    let holds_records = |wal| common_prefix(wal, wal, span).is_ok();
    match common_prefix(first, second, span) {
        Ok(agreement) => agreement,
        Err(_) if holds_records(second) => Agreement::SecondIsLonger,
        Err(_) if holds_records(first) => Agreement::FirstIsLonger,
        Err(_) => Agreement::Diverge { at: span.start() },
    }
}

/// A record, or the part of one that lies in the segment.
enum Part<'r> {
    Record(Lsn, &'r [u8]),
    End,
}

fn next_part<'r>(stream: &'r mut RecordStream<'_>) -> Part<'r> {
    // A pending record ends the stream, which then answers with it again and again.
    let ended = stream.pending().is_some();
    match stream.next_record() {
        Ok(Next::Record(record)) => Part::Record(record.start, record.bytes()),
        Ok(Next::NeedMore(pending)) if !ended => Part::Record(pending.start, &pending.bytes),
        _ => Part::End,
    }
}

/// Where the rests of a record from the segment before differ.
fn different_heads(
    first: &[u8],
    second: &[u8],
    a: &RecordStream<'_>,
    b: &RecordStream<'_>,
    span: SegmentSpan,
) -> Option<Lsn> {
    let (x, y) = (a.first_page(), b.first_page());
    let overwrites = |page: &PageHeader| page.flags.overwrites_contrecord();
    if x.continued_bytes != y.continued_bytes
        || overwrites(x) != overwrites(y)
        || x.long != y.long
        || x.timeline != y.timeline
    {
        return Some(span.start());
    }
    let mut left = x.continued_bytes as usize;
    for (number, (p, q)) in (0u64..).zip(first.chunks(PAGE_BYTES).zip(second.chunks(PAGE_BYTES))) {
        let header = if number == 0 { x.bytes() } else { SHORT_HEADER_BYTES };
        let len = left.min(PAGE_BYTES.saturating_sub(header));
        let range = header..header.saturating_add(len);
        if let (Some(p), Some(q)) = (p.get(range.clone()), q.get(range))
            && p != q
        {
            let page = number.saturating_mul(PAGE_BYTES as u64);
            return Some(span.start().saturating_add(page));
        }
        left = left.saturating_sub(len);
        if left == 0 {
            break;
        }
    }
    None
}

#[cfg(test)]
mod tests;
