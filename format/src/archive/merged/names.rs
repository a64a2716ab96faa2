//! What segments say about names: changes of the catalogues' rows, what happened to files of tables and databases, and
//! the ends of the transactions that did it. So that to follow names over much WAL nobody reads the WAL.
//!
//! Each segment is read by itself; a record that runs over the edge between two is put together when they are joined.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::archive::index::{
    FileEvent, FileEventKind, SegmentIndex, SegmentInfo, XactEnd, decode_file_event, decode_xact,
    encode_file_event, encode_xact, get_lsn, get_option, get_timeline, items, put_lsn, put_option,
};
use crate::engines::postgres::catalogue::{CatalogueChange, CatalogueFiles, ChangeKind, catalogue_changes};
use crate::engines::postgres::effects::{file_event, xact_end};
use crate::engines::postgres::wal::{
    Damage, Expected, LONG_HEADER_BYTES, Next, PAGE_BYTES, Pending, PreviousTail, RECORD_BYTES_MAX, Record,
    RecordStream, SHORT_HEADER_BYTES, SegmentSpan,
};
use crate::error::Corrupt;
use crate::ids::{ForkNumber, Lsn, Xid};
use crate::reader::{Reader, Writer};

use super::merge::append;

/// More than a record over an edge takes that a catalogue's row or page is in. What is longer is looked for in the WAL.
const EDGE_BYTES_MAX: usize = 512 << 10;
/// So far before a record that runs over the edge another most likely begins behind a page header.
const BEFORE_PENDING: u64 = 4 * PAGE_BYTES as u64;
/// What is longer is not stored: the step below tells it.
pub(super) const NAMES_BYTES_MAX: u64 = 64 << 20;

/// What consecutive segments say about names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NamesLog {
    /// Changes of the catalogues, in LSN order.
    pub changes: Vec<CatalogueChange>,
    /// Databases copied and dropped, tables cut to nothing by a transaction; in LSN order.
    pub events: Vec<FileEvent>,
    /// Ends of transactions, without the relations that go with them; in LSN order. Once
    /// [narrowed](NamesLog::narrowed) those that matter.
    pub ends: Vec<XactEnd>,
    /// The first segment's bytes up to the end of the record that began before it, where that may concern names.
    pub head: Option<Vec<u8>>,
    /// A record that begins here and runs over the last segment's end, where it may concern names.
    pub tail: Option<PreviousTail>,
    /// Records that could not be read, each as it is to be told. Nothing that has any is stored.
    pub unread: Vec<String>,
}

/// A record that runs over the edge between two segments.
#[derive(Debug, Default)]
pub struct OverEdge {
    /// What it says; nothing where it is told by an index.
    pub log: NamesLog,
    /// What is left for the next segment, where the record runs over that edge too.
    pub tail: Option<PreviousTail>,
}

impl NamesLog {
    /// Whether what a segment says about names is not all in its index, when catalogues lie in `files`.
    pub fn needs_wal(index: &SegmentIndex, files: &CatalogueFiles) -> bool {
        let info = &index.info;
        // Which records are not in the index because the neighbour was not at hand?
        let unjoined_head = info.continued_bytes > 0 && !info.head_joined;
        let unjoined_tail = info.pending.is_some_and(|p| !p.joined);
        touches(index, files) || unjoined_head || unjoined_tail
    }

    /// What a segment says out of the parts of its WAL that [`NamesLog::edges`] names; the rest of `wal` is zeros. None
    /// where that is not enough.
    pub fn of_edges(index: &SegmentIndex, wal: &[u8], files: &CatalogueFiles) -> Option<Self> {
        let info = &index.info;
        let mut log = Self::of_segment(index, None, files).ok()?;
        Self::edges(index, files)?;
        if let Some(pending) = info.pending {
            let tail = PreviousTail::find(wal, span_of(info)?, expected(info))?;
            let found = tail.pending.as_ref().map(|p| p.start);
            log.tail = Some(tail).filter(|_| found == Some(pending.start));
            log.tail.as_ref()?;
        }
        if info.continued_bytes > 0 {
            log.head = Some(wal.get(..head_bytes(info.continued_bytes))?.to_vec());
        }
        Some(log)
    }

    /// The parts of a segment's WAL, as distances from its start, that tell what its index does not; none where that
    /// may be anywhere.
    pub fn edges(index: &SegmentIndex, files: &CatalogueFiles) -> Option<[Range<u64>; 2]> {
        if touches(index, files) {
            return None;
        }
        let info = &index.info;
        let size = info.size.bytes();
        let head = if info.continued_bytes > 0 { head_bytes(info.continued_bytes) as u64 } else { 0 };
        let start = info.name.start(info.size).unwrap_or_default();
        // A whole record before it must be there too.
        let pending = info.pending.map(|p| p.start.bytes_since(start).saturating_sub(BEFORE_PENDING));
        Some([0..head.min(size), pending.unwrap_or(size).min(size)..size])
    }

    /// What a segment says. `wal` is needed where [`NamesLog::needs_wal`] says so.
    pub fn of_segment(
        index: &SegmentIndex,
        wal: Option<&[u8]>,
        files: &CatalogueFiles,
    ) -> Result<Self, Damage> {
        let info = &index.info;
        let mut log = Self {
            events: index.file_events.iter().filter(|e| matters(e)).cloned().collect(),
            ends: index.xacts.iter().map(without_drops).collect(),
            ..Self::default()
        };
        let (Some(wal), Some(span)) = (wal, span_of(info)) else { return Ok(log) };
        let mut stream = RecordStream::new(wal, span, expected(info), None)?;
        while let Next::Record(record) = stream.next_record()? {
            log.changes_of(&record, files);
        }
        log.tail = stream.into_tail().filter(|tail| tail.pending.is_some());
        if info.continued_bytes > 0 {
            log.head = wal.get(..head_bytes(info.continued_bytes).min(wal.len())).map(<[u8]>::to_vec);
        }
        Ok(log)
    }

    /// Puts together the record that runs from what left `tail` into what begins with `head`, the segment `after`.
    pub fn over_edge(
        tail: Option<PreviousTail>,
        head: Option<&[u8]>,
        after: &SegmentInfo,
        files: &CatalogueFiles,
    ) -> Result<OverEdge, Damage> {
        let mut over = OverEdge::default();
        let (Some(tail), Some(head), Some(span)) = (tail, head, span_of(after)) else { return Ok(over) };
        let mut stream = RecordStream::new(head, span, expected(after), Some(tail))?;
        match stream.next_record()? {
            Next::Record(record) if record.start < span.start() => {
                over.log.changes_of(&record, files);
                over.log.ends.extend(xact_end(&record).and_then(Result::ok).as_ref().map(without_drops));
                over.log.events.extend(file_event(&record).ok().flatten().filter(matters));
            }
            Next::Record(_) | Next::End(_) => {}
            Next::NeedMore(_) => over.tail = stream.into_tail(),
        }
        Ok(over)
    }

    /// Adds what the segments that follow say, of which `after` is the first. None where what runs over the edge
    /// cannot be put together.
    pub fn then(mut self, later: Self, after: &SegmentInfo) -> Option<Self> {
        let edge = after.name.start(after.size)?;
        let files = CatalogueFiles::default();
        let over = Self::over_edge(self.tail.take(), later.head.as_deref(), after, &files).ok()?;
        // A record that fills a segment and goes on is too long for what is stored.
        if over.tail.is_some() {
            return None;
        }
        self.changes.extend(over.log.changes);
        self.changes.extend(later.changes);
        for events in [over.log.events, later.events] {
            append(&mut self.events, events, edge, |e| e.start);
        }
        for ends in [over.log.ends, later.ends] {
            append(&mut self.ends, ends, edge, |x| x.start);
        }
        self.unread.extend(over.log.unread);
        self.unread.extend(later.unread);
        self.tail = later.tail;
        Some(self)
    }

    /// The same with the ends of those transactions only that wrote what is here.
    #[must_use]
    pub fn narrowed(mut self) -> Self {
        let mut xids: BTreeSet<u32> = self.writers().map(Xid::get).collect();
        for change in &self.changes {
            if let ChangeKind::Page { tuples, .. } = &change.kind {
                let of = tuples.iter().flat_map(|(_, row)| std::iter::once(row.xmin).chain(row.xmax));
                xids.extend(of.map(Xid::get));
            }
        }
        let ours = |xid: &Xid| xids.contains(&xid.get());
        self.ends.retain(|x| ours(&x.xid) || x.subxacts.iter().any(ours));
        self
    }

    /// The transactions that wrote the changes and cut the tables.
    pub fn writers(&self) -> impl Iterator<Item = Xid> + '_ {
        let changes = self.changes.iter().map(|c| c.xid);
        changes.chain(self.events.iter().map(|e| e.xid)).filter(|xid| !xid.is_invalid())
    }

    /// Whether it is small and readable enough for an object.
    pub fn is_storable(&self) -> bool {
        let tail = self.tail.as_ref().and_then(|t| t.pending.as_ref());
        self.unread.is_empty()
            && self.head.as_ref().is_none_or(|head| head.len() <= EDGE_BYTES_MAX)
            && tail.is_none_or(|pending| pending.bytes.len() <= EDGE_BYTES_MAX)
    }

    fn changes_of(&mut self, record: &Record<'_>, files: &CatalogueFiles) {
        if let Err(e) = catalogue_changes(record, files, &mut self.changes) {
            // Its CRC is right: what we know of it has a gap, which must not keep anybody from a restore.
            let (rmgr, start) = (record.rmgr(), record.start);
            self.unread.push(format!("the {rmgr} record at {start} cannot be read: {e}"));
        }
    }

    pub(super) fn encode(&self, w: &mut Writer, base: Lsn) {
        put_option(w, self.head.as_deref(), |w, head| {
            w.varint(head.len() as u64).bytes(head);
        });
        let pending = self.tail.as_ref().and_then(|tail| Some((tail, tail.pending.as_ref()?)));
        put_option(w, pending, |w, (tail, pending)| {
            put_option(w, tail.last_record, |w, lsn| put_lsn(w, base, lsn));
            w.u32(tail.timeline.get());
            put_lsn(w, base, tail.end);
            put_lsn(w, base, pending.start);
            w.u32(pending.total_bytes).varint(pending.bytes.len() as u64).bytes(&pending.bytes);
        });
        w.varint(self.changes.len() as u64);
        self.changes.iter().for_each(|change| change.encode(w, base));
        w.varint(self.events.len() as u64);
        self.events.iter().for_each(|event| encode_file_event(w, base, event));
        w.varint(self.ends.len() as u64);
        self.ends.iter().for_each(|end| encode_xact(w, base, end));
    }

    pub(super) fn decode(r: &mut Reader<'_>, base: Lsn) -> Result<Self, Corrupt> {
        let head = get_option(r, "head", |r| {
            let length = r.count(1, "head")?;
            Ok(r.take(length, "head")?.to_vec())
        })?;
        let tail = get_option(r, "tail", |r| {
            let last_record = get_option(r, "last_record", |r| get_lsn(r, base))?;
            let timeline = get_timeline(r, "xlp_tli")?;
            let (end, start) = (get_lsn(r, base)?, get_lsn(r, base)?);
            let at = r.position();
            let total_bytes = r.u32("xl_tot_len")?;
            let length = r.count(1, "pending")?;
            if total_bytes > RECORD_BYTES_MAX || length as u64 >= u64::from(total_bytes) {
                return Err(Corrupt::invalid("xl_tot_len", at, u64::from(total_bytes)));
            }
            let bytes = r.take(length, "pending")?.to_vec();
            let pending = Some(Pending { start, total_bytes, bytes });
            Ok(PreviousTail { last_record, pending, timeline, end })
        })?;
        let changes = items(r, CHANGE_BYTES_MIN, |r| CatalogueChange::decode(r, base))?;
        let events = items(r, 6, |r| decode_file_event(r, base))?;
        let ends = items(r, 19, |r| decode_xact(r, base))?;
        Ok(Self { changes, events, ends, head, tail, unread: Vec::new() })
    }
}

/// Distance, transaction, file, kind, and a byte of that at the least.
const CHANGE_BYTES_MIN: usize = 10;

/// Whether some record of a segment touches a catalogue or replaces a relation map, as far as its index says.
fn touches(index: &SegmentIndex, files: &CatalogueFiles) -> bool {
    let ours = |relation| files.catalogue(relation).is_some();
    index.blocks.iter().any(|b| b.fork == ForkNumber::Main && ours(b.relation))
        || index.file_events.iter().any(|e| matches!(e.kind, FileEventKind::RelationMap { .. }))
}

/// What concerns names: vacuum cuts tables too, but has no transaction.
fn matters(event: &FileEvent) -> bool {
    match event.kind {
        FileEventKind::DatabaseCopy { .. } | FileEventKind::DatabaseDrop { .. } => true,
        FileEventKind::Truncate { blocks, .. } => blocks == 0 && !event.xid.is_invalid(),
        _ => false,
    }
}

fn without_drops(end: &XactEnd) -> XactEnd {
    let XactEnd { kind, xid, start, end, time, db_oid, ref subxacts, ref gid, .. } = *end;
    XactEnd {
        kind,
        xid,
        start,
        end,
        time,
        db_oid,
        subxacts: subxacts.clone(),
        dropped: Vec::new(),
        gid: gid.clone(),
    }
}

fn span_of(info: &SegmentInfo) -> Option<SegmentSpan> {
    SegmentSpan::containing(info.name.start(info.size)?, info.size)
}

fn expected(info: &SegmentInfo) -> Expected<'static> {
    Expected { major: Some(info.major), ..Expected::default() }
}

/// Up to where a segment's bytes are those of a record that began before it and has so many left, and up to where the
/// next may start.
fn head_bytes(continued: u32) -> usize {
    let (mut at, mut left) = (LONG_HEADER_BYTES, continued as usize);
    loop {
        let room = PAGE_BYTES.saturating_sub(at & PAGE_BYTES.saturating_sub(1));
        let taken = room.min(left);
        at = at.saturating_add(taken);
        left = left.saturating_sub(taken);
        if left == 0 {
            return at.saturating_add(7) & !7;
        }
        at = at.saturating_add(SHORT_HEADER_BYTES);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::engines::postgres::scan::{Previous, PreviousLog, ScanContext, scan_segment};
    use crate::engines::postgres::wal::testing::{RELATION, TestBlock, WalBuilder, small_segments};
    use crate::ids::{PgMajor, RelFileLocator};

    const CLASS: RelFileLocator = RelFileLocator { spc_oid: 1663, db_oid: 5, rel_number: 1259 };

    /// A record that concerns names, or one that does not.
    #[derive(Debug, Clone, Copy)]
    enum What {
        /// A row of so many bytes, by this transaction.
        Row(u32, u16),
        /// A row of another table.
        Other(u32, u16),
        Commit(u32),
        Cut(u32),
        Message(u16),
    }

    fn write(b: &mut WalBuilder, what: What) {
        let row = |relation, bytes: u16| {
            let data = [&[33, 0, 2, 0, 24, 0][..], &vec![7; usize::from(bytes)]].concat();
            vec![TestBlock { relation, ..TestBlock::data(0, ForkNumber::Main, 3, &data) }]
        };
        match what {
            What::Row(xid, bytes) => b.push(10, 0, xid, &row(CLASS, bytes), &[1, 0, 0]),
            What::Other(xid, bytes) => b.push(10, 0, xid, &row(RELATION, bytes), &[1, 0, 0]),
            What::Commit(xid) => b.push(1, 0, xid, &[], &9i64.to_le_bytes()),
            What::Cut(xid) => {
                let mut main = Writer::new();
                main.u32(0).u32(1663).u32(5).u32(20000).u32(7);
                b.push(2, 0x20, xid, &[], main.as_bytes())
            }
            What::Message(bytes) => b.message(usize::from(bytes)),
        };
    }

    fn what() -> impl Strategy<Value = What> {
        let xid = 700..706u32;
        prop_oneof![
            (xid.clone(), 1..9000u16).prop_map(|(xid, bytes)| What::Row(xid, bytes)),
            (xid.clone(), 1..9000u16).prop_map(|(xid, bytes)| What::Other(xid, bytes)),
            xid.clone().prop_map(What::Commit),
            xid.prop_map(What::Cut),
            (1..20000u16).prop_map(What::Message),
        ]
    }

    /// What a segment holds: records at its start, how much of what then runs over the edge lies behind fillers (in
    /// eight bytes, from as many as it has on from the first again), that record, and whether each neighbour was at hand
    /// when it was pushed.
    type Held = (Vec<What>, usize, What, bool, bool);

    fn held() -> impl Strategy<Value = Held> {
        (proptest::collection::vec(what(), 0..6), 0..500usize, what(), any::<bool>(), any::<bool>())
    }

    fn segments(held: &[Held]) -> Vec<(SegmentIndex, Vec<u8>)> {
        let mut b = WalBuilder::new(PgMajor::V15, small_segments());
        for (records, left, over, ..) in held {
            records.iter().for_each(|what| write(&mut b, *what));
            let bytes = match over {
                What::Row(_, bytes) | What::Other(_, bytes) => 40 + usize::from(*bytes),
                What::Message(bytes) => 26 + usize::from(*bytes),
                What::Commit(_) => 34,
                What::Cut(_) => 50,
            };
            b.fill_segment((1 + left % (bytes / 8)) * 8);
            write(&mut b, *over);
        }
        b.fill_segment(0);
        let wals = b.finish_segments();
        let mut tail = None;
        let scanned = wals.iter().enumerate().map(|(n, (name, wal))| {
            let (_, _, _, with_previous, with_next) = held
                .get(n)
                .map_or((&[][..], 0, What::Commit(3), true, true), |h| (&h.0[..], h.1, h.2, h.3, h.4));
            let context = ScanContext::new(*name, small_segments());
            let log = tail.take().map(PreviousLog::Tail);
            let before = n.checked_sub(1).map(|n| wals[n].0);
            let previous = before.zip(log).map(|(name, log)| Previous { name, log });
            let next = wals.get(n + 1).map(|(_, wal)| &wal[..]);
            tail = scan_segment(wal, &ScanContext { previous: previous.clone(), ..context.clone() })
                .unwrap()
                .tail;
            let context = ScanContext {
                previous: previous.filter(|_| with_previous),
                next: next.filter(|_| with_next),
                ..context
            };
            (scan_segment(wal, &context).unwrap().index, wal.clone())
        });
        scanned.collect()
    }

    fn log_of((index, wal): &(SegmentIndex, Vec<u8>)) -> NamesLog {
        let files = CatalogueFiles::default();
        let wal = NamesLog::needs_wal(index, &files).then_some(&wal[..]);
        NamesLog::of_segment(index, wal, &files).unwrap()
    }

    fn joined(logs: impl IntoIterator<Item = (NamesLog, SegmentInfo)>) -> (NamesLog, SegmentInfo) {
        let mut logs = logs.into_iter();
        let first = logs.next().unwrap();
        logs.fold(first, |(log, info), (later, after)| (log.then(later, &after).unwrap(), info))
    }

    /// What all records say, read in order.
    fn read(segments: &[(SegmentIndex, Vec<u8>)]) -> NamesLog {
        let (mut log, mut tail) = (NamesLog::default(), None);
        for (index, wal) in segments {
            let mut stream =
                RecordStream::new(wal, span_of(&index.info).unwrap(), expected(&index.info), tail).unwrap();
            while let Next::Record(record) = stream.next_record().unwrap() {
                log.changes_of(&record, &CatalogueFiles::default());
                log.ends.extend(xact_end(&record).map(|end| without_drops(&end.unwrap())));
                log.events.extend(file_event(&record).unwrap().filter(matters));
            }
            tail = stream.into_tail();
        }
        log
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn segments_joined_say_what_all_records_say(held in proptest::collection::vec(held(), 2..5)) {
            let segments = segments(&held);
            let logs: Vec<_> = segments.iter().map(|s| (log_of(s), s.0.info.clone())).collect();
            let (all, _) = joined(logs.clone());
            // Where the edges are enough they say the same, whatever lies between.
            for ((index, wal), (log, _)) in segments.iter().zip(&logs) {
                let files = CatalogueFiles::default();
                let mut edges = vec![0; wal.len()];
                for range in NamesLog::edges(index, &files).into_iter().flatten() {
                    let range = range.start as usize..range.end as usize;
                    edges[range.clone()].copy_from_slice(&wal[range]);
                }
                if let Some(found) = NamesLog::of_edges(index, &edges, &files).filter(|_| NamesLog::needs_wal(index, &files)) {
                    prop_assert_eq!(&found, log);
                }
            }
            let expected = read(&segments);
            prop_assert_eq!(&all.changes, &expected.changes);
            prop_assert_eq!(&all.events, &expected.events);
            prop_assert_eq!(&all.ends, &expected.ends);
            prop_assert_eq!((&all.head, &all.unread), (&None, &Vec::new()));
            // In whatever groups.
            for at in 1..logs.len() {
                let halves = [joined(logs[..at].to_vec()), joined(logs[at..].to_vec())];
                prop_assert_eq!(&joined(halves).0, &all);
            }
            // And as they are stored.
            let base = logs[0].1.name.start(small_segments()).unwrap();
            for (log, _) in logs.iter().chain([&(all.clone().narrowed(), logs[0].1.clone())]) {
                let mut w = Writer::new();
                log.encode(&mut w, base);
                let bytes = w.into_bytes();
                let mut r = Reader::new(&bytes);
                prop_assert_eq!(&NamesLog::decode(&mut r, base).unwrap(), log);
                prop_assert!(r.is_empty());
            }
            // Those that wrote are those whose ends matter.
            let wrote: BTreeSet<u32> = all.writers().map(Xid::get).collect();
            let kept = all.clone().narrowed().ends;
            let mut ends = all.ends;
            ends.retain(|end| wrote.contains(&end.xid.get()));
            prop_assert_eq!(kept, ends);
        }

        #[test]
        fn any_bytes_are_names_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = NamesLog::decode(&mut Reader::new(&bytes), Lsn::from(1 << 24));
        }
    }

    #[test]
    fn what_no_index_tells_is_read_out_of_the_wal_alone() {
        let held = |over| vec![(vec![], 8, over, true, true); 2];
        let needs = |over| {
            let segments = segments(&held(over));
            let files = CatalogueFiles::default();
            segments.iter().map(|(index, _)| NamesLog::needs_wal(index, &files)).collect::<Vec<_>>()
        };
        assert_eq!(needs(What::Other(700, 500)), [false, false, false]);
        assert_eq!(needs(What::Row(700, 500)), [true, true, true]);
        let mut apart = held(What::Commit(700));
        (apart[0].4, apart[1].3) = (false, false);
        let read = segments(&apart)
            .into_iter()
            .map(|s| log_of(&s))
            .map(|log| (log.head.is_some(), log.tail.is_some()));
        assert_eq!(read.collect::<Vec<_>>(), [(false, true), (true, true), (false, false)]);
    }

    #[test]
    fn what_is_too_long_for_an_object_is_not_stored() {
        let segments = segments(&[
            (vec![], 8, What::Row(700, 500), false, false),
            (vec![], 8, What::Row(700, 500), true, true),
        ]);
        let log = log_of(&segments[0]);
        assert!(log.is_storable());
        let mut long = log.clone();
        long.tail.as_mut().unwrap().pending.as_mut().unwrap().bytes.resize(EDGE_BYTES_MAX + 1, 0);
        assert!(!long.is_storable());
        let unread = NamesLog { unread: vec!["a record".to_owned()], ..log };
        assert!(!unread.is_storable());
    }
}
