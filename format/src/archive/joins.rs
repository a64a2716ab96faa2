//! Whether one segment continues another, as far as their indexes say.

use super::catalog::{GapKind, Step};
use super::index::{Ending, SegmentInfo};
use crate::engines::postgres::wal::{LONG_HEADER_BYTES, PAGE_BYTES, SHORT_HEADER_BYTES};
use crate::ids::Lsn;
use crate::segment::SegmentSize;

/// What keeps `after` from continuing `before`, both of neighbouring positions.
pub(super) fn join_fault(before: &Step<'_>, after: &Step<'_>, last_record: Option<Lsn>) -> Option<GapKind> {
    let (a, b) = (&before.entry.info, &after.entry.info);
    let broken = |reason: String| Some(GapKind::Broken { reason });
    if let Some(fault) = before.entry.faults.first() {
        return Some(GapKind::Admitted { fault: fault.message.clone() });
    }
    // A server that crashed and started again goes on inside the segment where its log ended, so a copy
    // that ends early can be followed only by a record that says what was aborted.
    if a.ending == Ending::EndOfLog && before.usable_end == a.valid_end && !b.overwrites_contrecord {
        return broken(format!("{} ends at {} and {} follows", a.name, a.valid_end, b.name));
    }
    // Past a fork the ancestor's own last record is not what the successor continues, and the successor's
    // own copy of that segment is not there.
    if before.usable_end < a.valid_end {
        let first = a.name.on(b.name.timeline());
        return Some(GapKind::Missing { first, last: first, count: 1 });
    }
    continuity_fault(a, b, last_record).map(|reason| GapKind::Broken { reason })
}

/// What keeps a segment from being the one that follows `before` in the same log, where that one's log fills it.
/// `last_record` is where the last record before both begins, for the case that none begins in `before`.
pub fn continuity_fault(
    before: &SegmentInfo,
    after: &SegmentInfo,
    last_record: Option<Lsn>,
) -> Option<String> {
    let (a, b) = (before, after);
    if !b.overwrites_contrecord
        && let Some(reason) = open_record_fault(a, b)
    {
        return Some(reason);
    }
    let expected = a.last_record.or(last_record)?;
    match b.first_prev {
        // After an aborted record xl_prev names the record before it.
        Some(found) if found != expected && !b.overwrites_contrecord => Some(format!(
            "the first record of {} follows {found}, the last one before it is {expected}",
            b.name
        )),
        _ => None,
    }
}

/// Whether what `before` leaves of a record is what `after` begins with.
fn open_record_fault(before: &SegmentInfo, after: &SegmentInfo) -> Option<String> {
    let (a, found) = (before, after.continued_bytes);
    let lacks = |start: Option<Lsn>, rest: u64| {
        let record =
            start.map_or("the record that runs through it".to_owned(), |s| format!("the record at {s}"));
        (rest != u64::from(found))
            .then(|| format!("{record} lacks {rest} bytes and {} continues {found}", after.name))
    };
    match a.pending {
        // Not even its length is in this segment, so that only a record without a rest is surely wrong.
        Some(p) if p.total_bytes == 0 => (found == 0).then(|| {
            format!("the record at {} is never continued: {} begins with another", p.start, after.name)
        }),
        Some(p) => lacks(Some(p.start), u64::from(p.total_bytes.saturating_sub(p.here_bytes))),
        None if a.first_record.is_some() => (found != 0).then(|| {
            format!("{} continues a record by {found} bytes and {} leaves none open", after.name, a.name)
        }),
        // Nothing begins in it: a record runs through it, or ends in it and is all it has.
        None => {
            let rest = u64::from(a.continued_bytes).checked_sub(payload_bytes(a.size))?;
            lacks(None, rest)
        }
    }
}

/// How many bytes of records a segment holds.
fn payload_bytes(size: SegmentSize) -> u64 {
    let (page, short, long) = (PAGE_BYTES as u64, SHORT_HEADER_BYTES as u64, LONG_HEADER_BYTES as u64);
    let pages = size.bytes().checked_div(page).unwrap_or(0);
    let headers = pages.saturating_mul(short).saturating_add(long.saturating_sub(short));
    size.bytes().saturating_sub(headers)
}

#[cfg(test)]
mod tests {
    use super::super::catalog::samples::*;
    use super::super::{Gap, PendingRecord};
    use super::*;

    /// What breaks between segments that were all stored without a fault.
    fn breaks(segments: Vec<super::super::SegmentEntry>) -> Vec<String> {
        let reason = |gap: Gap| match gap.kind {
            GapKind::Broken { reason } => reason,
            other => panic!("{other:?}"),
        };
        catalog(segments).gaps().into_iter().map(reason).collect()
    }

    #[test]
    fn a_record_over_the_edge_that_is_never_continued_is_a_gap() {
        let mut open = segment(1, 3);
        let start = Lsn::from(4 * SIZE - 100);
        open.info.pending = Some(PendingRecord { start, total_bytes: 300, here_bytes: 100, joined: false });
        let next = |continued| {
            let mut next = segment(1, 4);
            next.info.continued_bytes = continued;
            next
        };
        assert_eq!(breaks(vec![open.clone(), next(200)]), Vec::<String>::new());
        let says = "the record at 0/3FFFF9C lacks 200 bytes and 000000010000000000000004 continues 0";
        assert_eq!(breaks(vec![open.clone(), next(0)]), [says]);
        // The server crashed, and says so.
        let mut aborted = next(0);
        aborted.info.overwrites_contrecord = true;
        assert_eq!(breaks(vec![open, aborted]), Vec::<String>::new());
        let says = "000000010000000000000004 continues a record by 7 bytes and 000000010000000000000003 leaves none open";
        assert_eq!(breaks(vec![segment(1, 3), next(7)]), [says]);
    }

    #[test]
    fn a_record_that_runs_through_a_whole_segment_goes_on_where_it_must() {
        let payload = payload_bytes(SegmentSize::DEFAULT) as u32;
        assert_eq!(u64::from(payload), SIZE - 2048 * 24 - 16);
        let mut open = segment(1, 3);
        let start = Lsn::from(4 * SIZE - 100);
        let total_bytes = payload + 1100;
        open.info.pending = Some(PendingRecord { start, total_bytes, here_bytes: 100, joined: false });
        let mut through = segment(1, 4);
        through.info.continued_bytes = payload + 1000;
        (through.info.first_record, through.info.first_prev) = (None, None);
        (through.info.last_record, through.info.records) = (None, 0);
        let ends = |continued| {
            let mut ends = segment(1, 5);
            ends.info.continued_bytes = continued;
            ends.info.first_prev = Some(Lsn::from(4 * SIZE - 100));
            vec![open.clone(), through.clone(), ends]
        };
        assert_eq!(breaks(ends(1000)), Vec::<String>::new());
        let says =
            "the record that runs through it lacks 1000 bytes and 000000010000000000000005 continues 999";
        assert_eq!(breaks(ends(999)), [says]);
    }
}
