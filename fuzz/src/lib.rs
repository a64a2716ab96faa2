//! What the fuzz targets do with any bytes: one call into the crate each. `tests/tests/fuzz_corpus.rs` replays the
//! committed corpora through the same functions on stable Rust.
//!
//! Objects are sealed under checksums, which no fuzzer guesses, so most targets take the bytes as they are and once more with
//! the seal put right: the decoder behind it must stand on its own.

use waltide_format::archive::{
    Envelope, ExtentMap, Footer, HEADER_BYTES, Header, MERGED_SECTIONS, Manifest, MergedDirectory,
    MergedObject, MergedSection, ObjectKind, SegmentDetail, SegmentDirectory, StoredSegment, StoredWal,
    WalFile, encode_segment,
};
use waltide_format::engines::postgres::catalogue::{
    CatalogueChange, CatalogueFiles, Fates, Follower, RelationMap, TablePattern, catalogue_changes,
    page_tuples,
};
use waltide_format::engines::postgres::cluster::{
    BackupLabel, ControlFile, History, parse_tablespace_map, read_origins, read_two_phase_file,
    two_phase_file, write_origins,
};
use waltide_format::engines::postgres::detail::tell_segment;
use waltide_format::engines::postgres::scan::{
    Agreement, ScanContext, ScanMode, common_prefix as compare, scan_segment as scan,
};
use waltide_format::engines::postgres::wal::{
    DatabaseRecord, ExclusiveLocks, Expected, HeapTruncate, MultiXactRecord, Next, OriginRecord, PackedFor,
    Prepare, RECORD_HEADER_BYTES, Record, RecordStream, RelationMapUpdate, RowChange, RunningXactsRecord,
    SegmentBytes, SegmentSpan, SlruRecord, SmgrRecord, TablespaceRecord, WalBytes, XactAssignment,
    XactRecord, XlogRecord, implicit_vm_blocks, make_tablespace_in_place,
};
use waltide_format::{
    BLOCK_BYTES, BlockNumber, Lsn, PgMajor, Reader, RelFileLocator, SegmentName, SegmentSize, TimelineId,
    TimestampTz, WalFileName, Writer,
};
use waltide_replay::engines::postgres::redo::{
    Applied, Cluster as RedoCluster, Page, apply, changes_state, clear_visibility, effects as tell_effects,
    vouches_for,
};

/// A target: its name, which is its corpus' directory, and what it does.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[Target] = &[
    ("stored_segment", stored_segment),
    ("merged_index", merged_index),
    ("envelope", envelope),
    ("manifest", manifest),
    ("extent_map", extent_map),
    ("names", names),
    ("wal_stream", wal_stream),
    ("wal_record", wal_record),
    ("scan_segment", scan_segment),
    ("common_prefix", common_prefix),
    ("tablespace_redirect", tablespace_redirect),
    ("cluster_files", cluster_files),
    ("detail", detail),
    ("redo", redo),
    ("effects", effects),
];

/// The major version that a byte chooses.
fn major(byte: u8) -> PgMajor {
    PgMajor::ALL[usize::from(byte) % PgMajor::ALL.len()].0
}

/// A stored segment: as it is; and as chunks, sections and a directory that a right footer ends.
pub fn stored_segment(data: &[u8]) {
    let _ = StoredSegment::decode(data);
    let Some((&directory_bytes, body)) = data.split_first() else { return };
    let mut object = Header { kind: ObjectKind::Segment }.encode().to_vec();
    object.extend_from_slice(body);
    let directory_bytes = usize::from(directory_bytes).min(object.len() - HEADER_BYTES);
    Footer::append(&mut object, directory_bytes as u32);
    let whole = StoredSegment::decode(&object);
    if let Ok(mut wal) = StoredWal::open(&object, Vec::new()).map(|wal| wal.keeping(8192)) {
        for at in (0..wal.length().min(1 << 20)).step_by(4096) {
            let end = wal.length().min(at + 4096);
            let part = wal.part(at..end);
            if let Ok(whole) = &whole {
                assert_eq!(part, whole.wal.get(at..end));
            }
        }
    }
    if let Ok(Ok(directory)) = SegmentDirectory::decode(&object, object.len() as u64) {
        let _ = directory.info(&object, object.len() as u64);
        let _ = directory.index(&object, object.len() as u64);
    }
}

/// A merged index: as it is; and as one section of a directory that is right.
pub fn merged_index(data: &[u8]) {
    if let Ok(object) = MergedObject::decode(data) {
        assert_eq!(
            MergedObject::decode(&object.encode()),
            Ok(object),
            "what was read is written and read again the same"
        );
    }
    let Some((&choice, body)) = data.split_first() else { return };
    let (_, number, version, section) = MERGED_SECTIONS[usize::from(choice) % MERGED_SECTIONS.len()];
    let mut directory = Writer::new();
    directory.u16(1).u32(2).u8(choice >> 7).text("000000010000000000000003").bytes(&[7; 64]);
    directory.varint(INFO.len() as u64).bytes(INFO);
    let length = body.len() as u64;
    directory.varint(1).u16(number).u16(version).varint(length).varint(length).u32(crc32fast::hash(body));
    let mut object = Header { kind: ObjectKind::MergedIndex }.encode().to_vec();
    object.extend_from_slice(body);
    object.extend_from_slice(directory.as_bytes());
    Footer::append(&mut object, directory.len() as u32);
    let found = MergedDirectory::decode(&object, object.len() as u64);
    let found = found.expect("a directory that is right").expect("the object is whole");
    let _ = match section {
        MergedSection::Segments => found.read_segments(body).map(drop),
        MergedSection::Drops => found.read_drops(body).map(drop),
        MergedSection::Relations => found.read_relations(body).map(drop),
        MergedSection::Touched => found.read_touched(body).map(drop),
        MergedSection::Names => found.read_names(body).map(drop),
        _ => found.read_lists(&[(section, body)]).map(drop),
    };
    let _ = MergedObject::decode(&object);
}

/// The `info` of a first segment, as docs/format.md lays it out: PostgreSQL 15, segments of 1 MiB, nothing in it.
const INFO: &[u8] =
    b"\x2a\0\0\0\0\0\0\0\x0f\0\x18000000010000000000000010\0\0\x10\0\0\0\0\0\x01\0\0\0\x01\0\0\0\
\0\0\0\0\0\0\0\0\0\0\x10\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// The small objects.
pub fn envelope(data: &[u8]) {
    for kind in [ObjectKind::Json, ObjectKind::WalFile, ObjectKind::Pack] {
        let _ = Envelope::open(data, kind);
    }
    let _ = WalFile::decode(data);
    let _ = WalFile::decode(&Envelope::seal(ObjectKind::WalFile, data));
}

/// A manifest: sealed as it is, and as JSON that is compressed as it should be.
pub fn manifest(data: &[u8]) {
    let _ = Manifest::decode(data);
    let _ = Manifest::decode(&Envelope::seal(ObjectKind::Manifest, data));
    if let Ok(json) = std::str::from_utf8(data) {
        let _ = Manifest::from_json(json);
    }
}

/// An extent map.
pub fn extent_map(data: &[u8]) {
    let _ = ExtentMap::decode(data);
    if let Ok(map) = ExtentMap::decode(&Envelope::seal(ObjectKind::ExtentMap, data)) {
        assert_eq!(
            ExtentMap::decode(&map.encode()),
            Ok(map),
            "what was read is written and read again the same"
        );
    }
}

/// Everything that is a name or a moment in text.
pub fn names(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(name) = text.parse::<WalFileName>() {
        assert_eq!(name.to_string(), text, "a name is printed as it was read");
    }
    let _ = text.parse::<SegmentName>();
    let _ = text.parse::<TimestampTz>();
    let _ = text.parse::<TablePattern>();
}

/// A segment's first bytes, read to where its log ends. Page headers are put right as far as a byte of the input asks for,
/// since a fuzzer finds neither magic nor address by chance.
pub fn wal_stream(data: &[u8]) {
    let Some((&choice, body)) = data.split_first() else { return };
    let span = span();
    let bytes = put_right(choice, body);
    let open = || RecordStream::new(&bytes, span, Expected::default(), None);
    let (Ok(mut stream), Ok(leaving)) = (open(), open()) else { return };
    let mut leaving = leaving.leaving_images();
    loop {
        match (stream.next_record(), leaving.next_record()) {
            (Ok(Next::Record(record)), Ok(Next::Record(without))) => {
                let same = |r: &Record<'_>| {
                    (r.start, r.end, r.header, r.origin(), r.toplevel_xid(), r.image_bytes())
                };
                assert_eq!(same(&record), same(&without));
                assert_eq!(record.main_data(), without.main_data());
                let blocks =
                    record.blocks().map(|b| (b.id, b.relation, b.block, b.data, b.makes_page_anew()));
                assert!(blocks.eq(without.blocks().map(|b| (
                    b.id,
                    b.relation,
                    b.block,
                    b.data,
                    b.makes_page_anew()
                ))));
                decode_all(&record);
                decode_all(&without);
            }
            (Err(damage), other) => {
                assert_eq!(Some(damage), other.err());
                break;
            }
            (other, without) => {
                assert_eq!(format!("{other:?}"), format!("{without:?}"));
                break;
            }
        }
    }
    let _ = tell_segment(&bytes, span, Expected::default(), None, Lsn::MAX);
}

/// The segment that the targets' bytes are of.
fn span() -> SegmentSpan {
    let size = SegmentSize::new(1 << 20).expect("a legal size");
    SegmentSpan::containing(Lsn::from(0x300_0000), size).expect("far from the log's end")
}

/// A segment's first bytes with the page headers that belong there, where the byte asks for them.
fn put_right(choice: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = body.to_vec();
    if choice & 0x80 == 0 {
        return bytes;
    }
    for (number, page) in bytes.chunks_mut(8192).enumerate() {
        let long = u16::from(number == 0) * 2;
        let address = span().start().get() + number as u64 * 8192;
        let mut header = major(choice & 0x0F).page_magic().to_le_bytes().to_vec();
        header.extend((page.get(2).map_or(0, |b| u16::from(*b) & 1) | long).to_le_bytes());
        header.extend(1u32.to_le_bytes());
        header.extend(address.to_le_bytes());
        let len = header.len().min(page.len());
        page[..len].copy_from_slice(&header[..len]);
    }
    bytes
}

/// The pass over a segment that arrives, as strict as a byte asks, with the rest of the input as the segment behind it.
pub fn scan_segment(data: &[u8]) {
    let Some(([choice, mode], body)) = data.split_first_chunk::<2>() else { return };
    let span = span();
    let mut wal = put_right(*choice, body);
    let mode = match mode % 3 {
        0 => ScanMode::Whole,
        1 => ScanMode::Partial,
        _ => ScanMode::Forced,
    };
    if mode == ScanMode::Whole {
        wal.resize(span.size().bytes() as usize, 0);
    }
    let name = SegmentName::containing(TimelineId::FIRST, span.start(), span.size());
    let context = ScanContext { mode, next: Some(body), ..ScanContext::new(name, span.size()) };
    let Ok(scan) = scan(&wal, &context) else { return };
    let info = &scan.index.info;
    assert!((span.start()..=span.end()).contains(&info.valid_end), "{}", info.valid_end);
    let stored = encode_segment(&wal, &scan.index, 1, 1);
    let read = StoredSegment::decode(&stored).expect("what is stored is read");
    assert!(read.index == scan.index && read.wal == wal, "and read the same");
}

/// Two copies of a segment: whichever is put first, they stand to each other as they do.
pub fn common_prefix(data: &[u8]) {
    let Some(([choice, a, b], body)) = data.split_first_chunk::<3>() else { return };
    let (first, second) = body.split_at(usize::from(u16::from_le_bytes([*a, *b])).min(body.len()));
    let (first, second) = (put_right(*choice, first), put_right(*choice, second));
    let (Ok(one), Ok(other)) = (compare(&first, &second, span()), compare(&second, &first, span())) else {
        return;
    };
    let turned = match other {
        Agreement::FirstIsLonger => Agreement::SecondIsLonger,
        Agreement::SecondIsLonger => Agreement::FirstIsLonger,
        same => same,
    };
    assert_eq!(one, turned);
    assert_eq!(compare(&first, &first, span()), Ok(Agreement::Same));
}

/// A CREATE TABLESPACE record anywhere in two segments, whose length is put right where a byte asks for it. Nothing but
/// the record's own bytes changes.
pub fn tablespace_redirect(data: &[u8]) {
    let Some(([choice, a, b], body)) = data.split_first_chunk::<3>() else { return };
    let span = span();
    let size = span.size().bytes() as usize;
    let mut wal = vec![0u8; 2 * size];
    // Near the edge between the two: the second byte counts back from there, eight bytes a step.
    let from = size - 8 * usize::from(u16::from_le_bytes([*a, *b]) % 1100);
    let length = (body.len() as u32).to_le_bytes();
    let mut at = from;
    for (n, byte) in body.iter().enumerate() {
        // Page headers lie in between.
        if at.is_multiple_of(8192) {
            at += if at.is_multiple_of(size) { 40 } else { 24 };
        }
        let Some(place) = wal.get_mut(at) else { return };
        *place = length.get(n).filter(|_| choice & 1 != 0).copied().unwrap_or(*byte);
        at += 1;
    }
    let before = wal.clone();
    let (one, two) = wal.split_at_mut(size);
    let mut segments =
        [SegmentBytes { start: span.start(), wal: one }, SegmentBytes { start: span.end(), wal: two }];
    let record = span.start().saturating_add(from as u64);
    let made = make_tablespace_in_place(&mut segments, span.size(), record);
    assert!(made.is_ok() || wal == before, "a refusal changes nothing");
    assert!(wal[..from] == before[..from] && wal[at..] == before[at..], "what is not the record stays");
}

/// What transactions did: a section of any number.
pub fn detail(data: &[u8]) {
    let Some((&choice, body)) = data.split_first() else { return };
    let (base, section) = (Lsn::from(0x300_0000), u16::from(choice));
    let mut read = SegmentDetail::default();
    if read.decode_section(section, 1, base, body).is_ok() {
        let mut again = SegmentDetail::default();
        for (section, version, bytes) in read.encode_sections(base) {
            again.decode_section(section, version, base, &bytes).expect("what is written is read");
        }
        assert_eq!(again, read, "what was read is written and read again the same");
    }
}

/// One record whose length and CRC are put right, and everything that is decoded out of it.
pub fn wal_record(data: &[u8]) {
    let Some((&choice, body)) = data.split_first() else { return };
    with_record(major(choice), body, decode_all);
}

/// Makes a record of bytes: its length and its CRC are put right.
fn with_record(major: PgMajor, body: &[u8], take: impl FnOnce(&Record<'_>)) {
    let mut bytes = body.to_vec();
    if bytes.len() < RECORD_HEADER_BYTES {
        return;
    }
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[RECORD_HEADER_BYTES..]), &bytes[..20]);
    bytes[20..24].copy_from_slice(&crc.to_le_bytes());
    let mut blocks = Vec::new();
    let start = Lsn::from(0x300_0028);
    let end = start.saturating_add(bytes.len() as u64);
    if let Ok(record) = Record::decode(&bytes, start, end, major, &mut blocks) {
        take(&record);
    }
}

fn decode_all(record: &Record<'_>) {
    let _ = XactRecord::decode(record);
    let _ = Prepare::decode(record);
    let _ = XactAssignment::decode(record);
    let _ = XlogRecord::decode(record);
    let _ = SmgrRecord::decode(record);
    let _ = DatabaseRecord::decode(record);
    let _ = TablespaceRecord::decode(record);
    let _ = RelationMapUpdate::decode(record);
    let _ = RunningXactsRecord::decode(record);
    let _ = ExclusiveLocks::decode(record);
    let _ = RowChange::decode(record);
    let _ = HeapTruncate::decode(record);
    let _ = SlruRecord::decode(record);
    let _ = MultiXactRecord::decode(record);
    let _ = OriginRecord::decode(record);
    let _ = implicit_vm_blocks(record);
    let mut changes = Vec::new();
    let _ = catalogue_changes(record, &CatalogueFiles::default(), &mut changes);
    let mut follower = Follower::new(record.major, record.start, CatalogueFiles::default());
    for change in &changes {
        let mut stored = Writer::new();
        change.encode(&mut stored, record.start);
        let back = CatalogueChange::decode(&mut Reader::new(stored.as_bytes()), record.start);
        assert_eq!(back.as_ref(), Ok(change), "a change comes back");
        follower.apply(change);
    }
    let _ = follower.finish(&Fates::default()).table_events();
    let mut page = [0; 8192];
    for block in record.blocks() {
        if let Some(image) = block.image {
            let _ = image.restore(&mut page);
        }
    }
}

/// pg_control, timeline history, backup_label, tablespace_map, relation maps, two-phase files, replication origins.
pub fn cluster_files(data: &[u8]) {
    let _ = ControlFile::decode(data);
    let mut control = data.to_vec();
    // The CRC's place moved between majors; with both put right the fields behind it are reached.
    for at in [288, 292, 296] {
        if control.len() >= at + 4 {
            let crc = crc32c::crc32c(&control[..at]);
            control[at..at + 4].copy_from_slice(&crc.to_le_bytes());
            let _ = ControlFile::decode(&control);
        }
    }
    if let Ok(history) = History::parse(TimelineId::new(9).expect("not zero"), data) {
        let _ = history.to_text();
    }
    for (major, _) in PgMajor::ALL {
        let _ = RelationMap::decode(data, major);
    }
    let _ = read_two_phase_file(data, PgMajor::V15);
    let _ = read_two_phase_file(&two_phase_file(data), PgMajor::V15);
    if let Ok(origins) = read_origins(data) {
        assert_eq!(read_origins(&write_origins(&origins)), Ok(origins), "what is written is read");
    }
    let mut heap = [0; BLOCK_BYTES];
    let bytes = data.len().min(heap.len());
    heap[..bytes].copy_from_slice(&data[..bytes]);
    let _ = page_tuples(&heap);
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = BackupLabel::parse(text);
        let _ = parse_tablespace_map(text);
    }
}

/// A record on a page: the first byte says how many bytes, in units of 16, are put at either end of the page.
pub fn redo(data: &[u8]) {
    let Some((&ends, rest)) = data.split_first() else { return };
    let ends = usize::from(ends) * 16;
    let Some((page, body)) = rest.split_at_checked(ends * 2) else { return };
    let (front, back) = page.split_at(ends);
    let mut bytes = [0; BLOCK_BYTES];
    bytes[..ends].copy_from_slice(front);
    bytes[BLOCK_BYTES - ends..].copy_from_slice(back);
    with_record(PgMajor::V15, body, |record| {
        for block in record.blocks() {
            let mut page = Page::from(bytes);
            let done = apply(record, block.id, &mut page, RedoCluster { logs_hints: true });
            if matches!(done, Ok(Applied::Changed)) && block.image.is_none() {
                assert_eq!(page.lsn(), record.end);
            }
            with_packed(record, Some(block.id), block.relation, block.block, |packed| {
                let mut other = Page::from(bytes);
                let packed = apply(packed, block.id, &mut other, RedoCluster { logs_hints: true });
                assert!(packed == done && (done.is_err() || other == page), "what is packed says the same");
            });
        }
        for (relation, map) in implicit_vm_blocks(record) {
            let mut page = Page::from(bytes);
            clear_visibility(record, relation, map, &mut page);
            with_packed(record, None, relation, map, |packed| {
                let mut other = Page::from(bytes);
                clear_visibility(packed, relation, map, &mut other);
                assert!(other == page, "what is packed says the same");
            });
        }
    });
}

/// The record as it is kept for a page.
fn with_packed(
    record: &Record<'_>,
    own: Option<u8>,
    relation: RelFileLocator,
    block: BlockNumber,
    look: impl FnOnce(&Record<'_>),
) {
    let (mut packed, mut blocks) = (Writer::new(), Vec::new());
    record.pack(own, relation, &mut packed);
    let of = PackedFor { start: record.start, end: record.end, xid: record.header.xid, relation, block };
    look(&Record::unpack(packed.as_bytes(), of, record.major, &mut blocks).expect("what was packed unpacks"));
}

/// What a record does besides changing pages.
pub fn effects(data: &[u8]) {
    with_record(PgMajor::V15, data, |record| {
        let told = tell_effects(record);
        assert!(changes_state(record) || told == Ok(Vec::new()));
        assert!(!vouches_for(record) || told.is_ok());
    });
}
