//! Archives, and records, for the tests of this crate.

use waltide_format::archive::*;
use waltide_format::engines::postgres::wal;
use waltide_format::*;

/// The segment size of the tests.
pub(crate) fn size() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

pub(crate) fn timeline(n: u32) -> TimelineId {
    TimelineId::new(n).unwrap()
}

pub(crate) fn segment_name(number: u64) -> SegmentName {
    SegmentName::containing(TimelineId::FIRST, Lsn::from(number << 20), size())
}

pub(crate) fn system(id: u64) -> SystemInfo {
    SystemInfo {
        system_id: id.into(),
        major: PgMajor::V15,
        block_bytes: 8192,
        segment_size: size(),
        created: TimestampTz::default(),
    }
}

/// What is said of a segment that joins its neighbours: one record begins 40 bytes in, one ends it.
pub(crate) fn info(system: u64, name: SegmentName, ending: Ending) -> SegmentInfo {
    let start = name.start(size()).unwrap();
    let at = |n: u64| start.saturating_add(n);
    let end = if ending == Ending::EndOfLog { 8192 } else { 1 << 20 };
    SegmentInfo {
        system_id: system.into(),
        major: PgMajor::V15,
        name,
        size: size(),
        first_page_timeline: name.timeline(),
        last_page_timeline: name.timeline(),
        continued_bytes: 0,
        overwrites_contrecord: false,
        first_record: Some(at(40)),
        first_prev: Some(start.saturating_sub(100)),
        last_record: Some(at(end - 100)),
        valid_end: at(end),
        ending,
        pending: None,
        head_joined: false,
        records: 2,
        first_time: None,
        last_time: None,
        min_time: None,
        max_time: None,
        last_commit_time: None,
        commits: 0,
        image_bytes: 0,
    }
}

/// A segment whose log stops behind its first page header: name, WAL, object.
pub(crate) fn stored_segment(system: u64, number: u64, ending: Ending) -> (SegmentName, Vec<u8>, Vec<u8>) {
    let name = segment_name(number);
    let mut w = Writer::new();
    w.u16(PgMajor::V15.page_magic()).u16(2).u32(1).u64(number << 20).u32(0).u32(0);
    w.u64(system).u32(1 << 20).u32(8192);
    let mut wal = w.into_bytes();
    wal.resize(if ending == Ending::EndOfLog { 8192 } else { 1 << 20 }, 0);
    let object = encode_segment(&wal, &SegmentIndex::new(info(system, name, ending)), 1, 1);
    (name, wal, object)
}

/// A backup of the default length that ends nowhere yet.
pub(crate) fn manifest(system: u64, salt: u16) -> Manifest {
    Manifest {
        id: BackupId::new("2026-01-31T23:59:59Z".parse().unwrap(), salt),
        kind: BackupKind::Full,
        method: BackupMethod::Backup,
        parent: None,
        full_because: None,
        description: None,
        started: TimestampTz::default(),
        stopped: TimestampTz::default(),
        system_id: system.into(),
        major: PgMajor::V15,
        server_version: "15.18".into(),
        segment_size: size(),
        data_checksums: true,
        timeline: TimelineId::FIRST,
        start_lsn: Lsn::ZERO,
        stop_lsn: Lsn::ZERO,
        checkpoint_lsn: Lsn::ZERO,
        backup_label: String::new(),
        tablespace_map: String::new(),
        from_standby: false,
        tablespaces: Vec::new(),
        config_files: Vec::new(),
        maps: Vec::new(),
        directories: Vec::new(),
        files: Vec::new(),
        damaged_pages: Vec::new(),
        chain: None,
        stats: ManifestStats::default(),
    }
}

/// A record without blocks, with a replication origin where one is given.
pub(crate) fn with_record<T>(
    (major, rmid, info): (PgMajor, u8, u8),
    origin: Option<u16>,
    main: &[u8],
    take: impl FnOnce(&wal::Record<'_>) -> T,
) -> T {
    let mut body = Vec::new();
    if let Some(origin) = origin {
        body.push(253);
        body.extend(origin.to_le_bytes());
    }
    if !main.is_empty() {
        body.push(254);
        body.extend((main.len() as u32).to_le_bytes());
        body.extend(main);
    }
    let mut record = ((wal::RECORD_HEADER_BYTES + body.len()) as u32).to_le_bytes().to_vec();
    record.extend(740u32.to_le_bytes());
    record.extend(0x900u64.to_le_bytes());
    record.extend([info, rmid, 0, 0]);
    let crc = crc32c::crc32c_append(crc32c::crc32c(&body), &record);
    record.extend(crc.to_le_bytes());
    record.extend(body);
    let (start, end) = (Lsn::from(0x1000), Lsn::from(0x2000));
    take(&wal::Record::decode(&record, start, end, major, &mut Vec::new()).unwrap())
}
