//! Whether a segment may enter the archive. What is legal after promotions and crashes is never refused, what would stop
//! a restore always is.

use std::fmt;

use waltide_format::archive::{AdmittedFault, Ending, SegmentIndex, SegmentInfo, SystemInfo};
use waltide_format::engines::postgres::cluster::History;
use waltide_format::engines::postgres::scan::{
    Previous, PreviousLog, ScanContext, ScanError, ScanMode, scan_segment,
};
use waltide_format::engines::postgres::wal::{
    Damage, Expected, LONG_HEADER_BYTES, LongHeader, PageHeader, PreviousTail, SegmentSpan, WalBytes,
};
use waltide_format::{Lsn, PgMajor, SegmentName, SystemId};

use super::wal_dir::WalDir;

/// How much of the next segment is read at first to finish a record that runs over the edge.
const NEXT_BYTES: u64 = 64 << 10;
/// How much is read where the record goes on beyond that. The rare one that goes on further still is joined when the next
/// segment is shipped.
const NEXT_BYTES_MAX: u64 = 1 << 20;

/// Why a segment is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// Its first page is none.
    NotWal {
        /// What is wrong with it.
        damage: Damage,
    },
    /// Its first page has no long header, so it is the middle of a segment.
    NoLongHeader,
    /// It is shorter or longer than a segment.
    Length {
        /// Its length.
        found: u64,
        /// `wal_segment_size`.
        expected: u64,
    },
    /// Its header says that segments have another size.
    SegmentSize {
        /// `xlp_seg_size`.
        found: u64,
        /// system.json's.
        expected: u64,
    },
    /// Segments of this size are not called so.
    NoSuchName {
        /// `wal_segment_size`.
        size: u64,
    },
    /// It holds another part of the log than its name says.
    Address {
        /// Where its first page belongs.
        found: Lsn,
        /// Where its name says it starts.
        expected: Lsn,
    },
    /// It was written by another major version.
    Version {
        /// The version of its pages.
        found: PgMajor,
        /// system.json's.
        expected: PgMajor,
    },
    /// What the scan of its records found.
    Scan(ScanError),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotWal { damage } => write!(f, "it does not start with a page of WAL: {damage}"),
            Self::NoLongHeader => f.write_str("its first page is not a segment's first"),
            Self::Length { found, expected } => write!(f, "it has {found} bytes, a segment has {expected}"),
            Self::SegmentSize { found, expected } => {
                write!(f, "its header says segments of {found} bytes, the cluster's have {expected}")
            }
            Self::NoSuchName { size } => write!(f, "no segment of {size} bytes has that name"),
            Self::Address { found, expected } => {
                write!(f, "its first page is of {found}, its name says {expected}")
            }
            Self::Version { found, expected } => {
                write!(f, "its pages are of PostgreSQL {found}, the cluster is of {expected}")
            }
            Self::Scan(e) => write!(f, "{e}"),
        }
    }
}

impl std::error::Error for Refusal {}

/// The long header of a segment's first page, wherever it belongs.
pub(crate) fn identify(wal: &[u8]) -> Result<LongHeader, Refusal> {
    let page = PageHeader::decode_anywhere(wal, Lsn::ZERO).map_err(|damage| Refusal::NotWal { damage })?;
    page.long.ok_or(Refusal::NoLongHeader)
}

/// A segment that asks to be let in, and all that is known around it.
#[derive(Debug)]
pub(crate) struct Admission {
    /// Its name.
    pub(crate) segment: SegmentName,
    /// Whether the log may end anywhere in it.
    pub(crate) partial: bool,
    /// What the archive says of its system.
    pub(crate) system: SystemInfo,
    /// The history of its timeline, where known.
    pub(crate) history: Option<History>,
    /// Where it lies, and its neighbours with it.
    pub(crate) dir: WalDir,
    /// Whether what is wrong is noted instead of refused.
    pub(crate) force: bool,
}

/// What a segment is compared with.
struct Around {
    system_ids: [SystemId; 1],
    previous: Option<Previous<'static>>,
    next: Option<Vec<u8>>,
}

impl Admission {
    /// Checks a segment that can be read once, and makes its index. None where that is not enough, because its last record
    /// goes far into the next segment.
    pub(crate) fn scan_once(&self, wal: &mut dyn WalBytes) -> Result<Option<SegmentIndex>, Refusal> {
        let (span, length) = (self.span()?, wal.length());
        let first_page = wal.part(0..length.min(LONG_HEADER_BYTES)).unwrap_or_default();
        self.check_shape(first_page, length as u64, span)?;
        let around = self.around(span);
        let scan = scan_segment(wal, &self.context(&around)).map_err(Refusal::Scan)?;
        Ok((!goes_on_beyond(&scan.index, around.next.as_deref())).then_some(scan.index))
    }

    /// Checks a segment and makes its index, or, where it is forced, a note of what is wrong with it.
    pub(crate) fn scan(&self, wal: &[u8]) -> Result<SegmentIndex, Refusal> {
        let span = self.span()?;
        if let Err(why) = self.check_shape(wal, wal.len() as u64, span) {
            // A segment cut short still has the records of its beginning.
            let is_cut = matches!(why, Refusal::Length { found, expected } if found < expected);
            if !(self.force && is_cut) {
                return self.only_if_forced(wal, span, why);
            }
        }
        let around = self.around(span);
        let context = self.context(&around);
        let mut scanned = scan_segment(wal, &context);
        if scanned.as_ref().is_ok_and(|scan| goes_on_beyond(&scan.index, around.next.as_deref())) {
            let longer = self.next(span, NEXT_BYTES_MAX);
            scanned = scan_segment(wal, &ScanContext { next: longer.as_deref(), ..context.clone() });
        }
        let refused = match scanned {
            Ok(scan) => return Ok(scan.index),
            Err(e) => e,
        };
        if self.force
            && let Ok(scan) = scan_segment(wal, &ScanContext { mode: ScanMode::Forced, ..context })
        {
            let mut index = scan.index;
            index.info.ending = Ending::Fault;
            return Ok(index);
        }
        self.only_if_forced(wal, span, Refusal::Scan(refused))
    }

    fn span(&self) -> Result<SegmentSpan, Refusal> {
        let size = self.system.segment_size;
        let span = self.segment.start(size).and_then(|start| SegmentSpan::containing(start, size));
        span.ok_or(Refusal::NoSuchName { size: size.bytes() })
    }

    fn around(&self, span: SegmentSpan) -> Around {
        let system_ids = [self.system.system_id];
        Around { system_ids, previous: self.previous(span), next: self.next(span, NEXT_BYTES) }
    }

    fn context<'a>(&'a self, around: &'a Around) -> ScanContext<'a> {
        ScanContext {
            system_ids: &around.system_ids,
            major: Some(self.system.major),
            previous: around.previous.clone(),
            next: around.next.as_deref(),
            history: self.history.as_ref(),
            mode: if self.partial { ScanMode::Partial } else { ScanMode::Whole },
            ..ScanContext::new(self.segment, self.system.segment_size)
        }
    }

    /// The first bytes of the segment that follows, where it lies beside.
    fn next(&self, span: SegmentSpan, bytes: u64) -> Option<Vec<u8>> {
        self.dir.segment_head(self.segment.next(span.size())?, bytes)
    }

    /// Checks what can be told without reading records: whether the file, of `length` bytes, is what its name says.
    fn check_shape(&self, first_page: &[u8], length: u64, span: SegmentSpan) -> Result<(), Refusal> {
        let page = PageHeader::decode_anywhere(first_page, span.start())
            .map_err(|damage| Refusal::NotWal { damage })?;
        let long = page.long.ok_or(Refusal::NoLongHeader)?;
        let size = span.size().bytes();
        if long.segment_size != span.size() {
            return Err(Refusal::SegmentSize { found: long.segment_size.bytes(), expected: size });
        }
        if length != size {
            return Err(Refusal::Length { found: length, expected: size });
        }
        if page.address != span.start() {
            return Err(Refusal::Address { found: page.address, expected: span.start() });
        }
        if page.major != self.system.major {
            return Err(Refusal::Version { found: page.major, expected: self.system.major });
        }
        Ok(())
    }

    /// How the log stands at the end of the segment before, where that one lies beside.
    fn previous(&self, span: SegmentSpan) -> Option<Previous<'static>> {
        let size = span.size();
        let same = self.segment.previous(size)?;
        // The last byte before this segment says which timeline went on into it.
        let last = span.start().saturating_sub(1);
        let ancestor = self.history.as_ref().map(|history| same.on(history.timeline_at(last)));
        let names = [Some(same), ancestor.filter(|name| *name != same)];
        let name = names.into_iter().flatten().find(|name| self.dir.file(name).exists())?;
        let before = SegmentSpan::containing(name.start(size)?, size)?;
        let system_ids = [self.system.system_id];
        let expected = Expected {
            system_ids: &system_ids,
            major: Some(self.system.major),
            timeline: Some(name.timeline()),
            history: None,
        };
        // Its last pages nearly always tell.
        let ends =
            self.dir.segment_ends(name, size).and_then(|bytes| PreviousTail::find(&bytes, before, expected));
        let tail = ends.or_else(|| PreviousTail::find(&self.dir.segment(name)?, before, expected))?;
        Some(Previous { name, log: PreviousLog::Tail(tail) })
    }

    /// A segment whose records cannot be read at all is admitted with nothing but its fault. Longer than a segment is
    /// more than the archive can hold under the name.
    fn only_if_forced(&self, wal: &[u8], span: SegmentSpan, why: Refusal) -> Result<SegmentIndex, Refusal> {
        let size = span.size();
        if !self.force || wal.len() as u64 > size.bytes() {
            return Err(why);
        }
        let mut index = SegmentIndex::new(SegmentInfo {
            system_id: self.system.system_id,
            major: self.system.major,
            name: self.segment,
            size,
            first_page_timeline: self.segment.timeline(),
            last_page_timeline: self.segment.timeline(),
            continued_bytes: 0,
            overwrites_contrecord: false,
            first_record: None,
            first_prev: None,
            last_record: None,
            valid_end: span.start(),
            ending: Ending::Fault,
            pending: None,
            head_joined: false,
            records: 0,
            first_time: None,
            last_time: None,
            min_time: None,
            max_time: None,
            last_commit_time: None,
            commits: 0,
            image_bytes: 0,
        });
        index.faults.push(AdmittedFault { at: span.start(), message: why.to_string() });
        Ok(index)
    }
}

/// Whether the segment's last record could not be joined because too little of the next segment was read.
fn goes_on_beyond(index: &SegmentIndex, next: Option<&[u8]>) -> bool {
    let is_cut = next.is_some_and(|next| next.len() as u64 == NEXT_BYTES);
    is_cut && index.info.pending.is_some_and(|pending| !pending.joined)
}
