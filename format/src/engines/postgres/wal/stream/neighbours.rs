//! What the segments beside one say of its last record.

use super::{
    Checked, Expected, Found, Next, Place, PreviousTail, RecordStream, SegmentSpan, StreamHead, WalBytes,
    align8, usize_of,
};
use crate::engines::postgres::wal::Damage;
use crate::engines::postgres::wal::page::{PAGE_BYTES, PageHeader};
use crate::engines::postgres::wal::record::Record;

impl<B: WalBytes> RecordStream<'_, B> {
    /// Makes the pending record whole from the segment that follows.
    pub(super) fn join_next(&mut self) -> Option<Found> {
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
            place: Place::Gathered,
            start: record.start,
            end: record.end,
            total_bytes: record.header.total_bytes,
        };
        self.gathered = stream.gathered;
        Some(found)
    }

    /// Yields the record that the following segment made whole. It was checked there.
    pub(super) fn finish_joined(&mut self, found: Found) -> Result<Next<'_>, Damage> {
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
                    self.gathered.bytes(),
                    &self.blocks,
                    parsed,
                )))
            }
            Err(_) => self.need_more(),
        }
    }
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
