//! Whether a stored segment's WAL is what its index says, and continues the segment before.

use waltide_format::SegmentName;
use waltide_format::archive::{Ending, Lineage, SegmentIndex, StoredSegment, SystemInfo};
use waltide_format::engines::postgres::cluster::History;
use waltide_format::engines::postgres::scan::{
    Previous, PreviousLog, Scan, ScanContext, ScanError, ScanMode, scan_segment,
};
use waltide_format::engines::postgres::wal::{Expected, PreviousTail, SegmentSpan};

/// Something wrong with a segment's WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WalFault {
    /// The byte in the segment, where it is one.
    pub(crate) byte: Option<u64>,
    /// Whether it lies between this segment and the one before, rather than in this one.
    pub(crate) is_gap: bool,
    /// What.
    pub(crate) text: String,
}

/// What is known around a segment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Around<'a> {
    /// How the log stands at the end of the segment before.
    pub(crate) previous: Option<(SegmentName, PreviousTail)>,
    /// The bytes of the segment that follows.
    pub(crate) next: Option<&'a [u8]>,
    /// The history of the segment's timeline.
    pub(crate) history: Option<&'a History>,
}

/// What a check found.
#[derive(Debug, Default)]
pub(crate) struct Checked {
    pub(crate) faults: Vec<WalFault>,
    /// What the next segment has to go on from.
    pub(crate) tail: Option<PreviousTail>,
    /// Records that begin in the segment.
    pub(crate) records: u64,
}

/// Reads every record of a segment, compares what they say with its index, and joins the segment with the one before.
pub(crate) fn check_segment(
    system: &SystemInfo,
    name: SegmentName,
    stored: &StoredSegment,
    around: &Around<'_>,
) -> Checked {
    let mut checked = Checked { records: stored.index.info.records, ..Checked::default() };
    for fault in &stored.index.faults {
        let text = format!("it was admitted with a fault at {}: {}", fault.at, fault.message);
        checked.faults.push(WalFault { byte: None, is_gap: false, text });
    }
    if !checked.faults.is_empty() || stored.index.info.ending == Ending::Fault {
        return checked;
    }
    let alone = Around { previous: None, ..around.clone() };
    let scan = match scan_stored(system, name, stored, around) {
        Ok(scan) => scan,
        Err(e) => match scan_stored(system, name, stored, &alone) {
            // It is right in itself: what is wrong is the edge.
            Ok(scan) if around.previous.is_some() => {
                let text = format!("it does not continue the segment before: {e}");
                checked.faults.push(WalFault { byte: byte_of(&e), is_gap: true, text });
                scan
            }
            _ => {
                let text = format!("its WAL is broken: {e}");
                checked.faults.push(WalFault { byte: byte_of(&e), is_gap: false, text });
                return checked;
            }
        },
    };
    // What was at hand when the segment came decides where a record over the edge is indexed.
    let as_stored = |index: &SegmentIndex| {
        let joined = |i: &SegmentIndex| i.info.pending.is_some_and(|p| p.joined);
        index.info.head_joined == stored.index.info.head_joined && joined(index) == joined(&stored.index)
    };
    let found = match as_stored(&scan.index) {
        true => Some(scan.index.clone()),
        false => scan_stored(system, name, stored, &alone).ok().map(|s| s.index).filter(as_stored),
    };
    let differs = match &found {
        Some(found) => difference(found, &stored.index),
        // The neighbour it was joined with is not at hand: what does not depend on it must still hold.
        None => shape_difference(&scan.index, &stored.index),
    };
    if let Some(part) = differs {
        let text = format!("its index is not what its records say: {part} differs");
        checked.faults.push(WalFault { byte: None, is_gap: false, text });
    }
    checked.tail = scan.tail;
    checked
}

fn scan_stored(
    system: &SystemInfo,
    name: SegmentName,
    stored: &StoredSegment,
    around: &Around<'_>,
) -> Result<Scan, ScanError> {
    let system_ids = [system.system_id];
    let partial = stored.index.info.ending == Ending::EndOfLog;
    let previous = around.previous.clone();
    let context = ScanContext {
        system_ids: &system_ids,
        major: Some(system.major),
        previous: previous.map(|(name, tail)| Previous { name, log: PreviousLog::Tail(tail) }),
        next: around.next.filter(|_| stored.index.info.pending.is_some_and(|p| p.joined)),
        history: around.history,
        mode: if partial { ScanMode::Partial } else { ScanMode::Whole },
        ..ScanContext::new(name, system.segment_size)
    };
    scan_segment(&stored.wal, &context)
}

fn byte_of(e: &ScanError) -> Option<u64> {
    match e {
        ScanError::Damaged(damage) => Some(damage.corrupt.at),
        _ => None,
    }
}

/// The first part of an index that differs.
fn difference(a: &SegmentIndex, b: &SegmentIndex) -> Option<&'static str> {
    let parts = [
        ("info", a.info == b.info),
        ("xacts", a.xacts == b.xacts),
        ("restore_points", a.restore_points == b.restore_points),
        ("checkpoints", a.checkpoints == b.checkpoints),
        ("timeline_ends", a.timeline_ends == b.timeline_ends),
        ("running_xacts", a.running_xacts == b.running_xacts),
        ("file_events", a.file_events == b.file_events),
        ("blocks", a.blocks == b.blocks),
        ("rmgrs", a.rmgrs == b.rmgrs),
        // Earlier builds stored none.
        ("state", b.state.is_none() || a.state == b.state),
    ];
    parts.into_iter().find(|(_, same)| !same).map(|(name, _)| name)
}

fn shape_difference(a: &SegmentIndex, b: &SegmentIndex) -> Option<&'static str> {
    let shape = |i: &SegmentIndex| {
        let info = &i.info;
        (
            info.name,
            info.system_id,
            info.major,
            info.first_record,
            info.last_record,
            info.valid_end,
            info.ending,
        )
    };
    (shape(a) != shape(b)).then_some("info")
}

/// How the log stands at the end of a segment that is not itself looked at.
pub(crate) fn tail_of(system: &SystemInfo, name: SegmentName, wal: &[u8]) -> Option<PreviousTail> {
    let span = SegmentSpan::containing(name.start(system.segment_size)?, system.segment_size)?;
    let system_ids = [system.system_id];
    let expected = Expected {
        system_ids: &system_ids,
        major: Some(system.major),
        timeline: Some(name.timeline()),
        history: None,
    };
    PreviousTail::find(wal, span, expected)
}

/// A line as the history file it was read from.
pub(crate) fn history_of(line: &Lineage) -> Option<History> {
    let mut timelines = line.ancestors.iter().map(|(t, _)| *t).chain([line.timeline]);
    let first = History::root(timelines.next()?);
    let ends = line.ancestors.iter().map(|(_, end)| *end);
    timelines.zip(ends).try_fold(first, |history, (timeline, end)| history.branch(timeline, end, ""))
}
