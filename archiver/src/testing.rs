//! Catalogues for the tests of this crate.

use std::collections::BTreeMap;

use waltide_format::archive::{
    BackupEntry, BackupKind, BackupMethod, Catalog, Ending, Manifest, ManifestStats, SegmentEntry,
    SegmentInfo, SystemInfo,
};
use waltide_format::{BackupId, Lsn, PgMajor, SegmentName, SegmentSize, TimelineId, TimestampTz};

pub(crate) const SIZE: u64 = 1 << 20;
pub(crate) const HOUR: i64 = 3_600_000_000;

pub(crate) fn hour(n: i64) -> TimestampTz {
    TimestampTz::from_postgres_micros(n * HOUR)
}

pub(crate) fn t(n: u32) -> TimelineId {
    TimelineId::new(n).unwrap()
}

pub(crate) fn size() -> SegmentSize {
    SegmentSize::new(SIZE).unwrap()
}

/// A segment that joins its neighbours; one is written every hour.
pub(crate) fn segment(timeline: u32, number: u64) -> SegmentEntry {
    let start = number * SIZE;
    let name = SegmentName::containing(t(timeline), Lsn::from(start), size());
    let time = Some(hour(number as i64));
    let info = SegmentInfo {
        system_id: 42.into(),
        major: PgMajor::V15,
        name,
        size: size(),
        first_page_timeline: t(timeline),
        last_page_timeline: t(timeline),
        continued_bytes: 0,
        overwrites_contrecord: false,
        first_record: Some(Lsn::from(start + 40)),
        first_prev: Some(Lsn::from(start - 100)),
        last_record: Some(Lsn::from(start + SIZE - 100)),
        valid_end: Lsn::from(start + SIZE),
        ending: Ending::Full,
        pending: None,
        head_joined: false,
        records: 2,
        first_time: time,
        last_time: time,
        min_time: time,
        max_time: time,
        last_commit_time: time,
        commits: 1,
        image_bytes: 0,
    };
    let path = format!("main/42/wal/{timeline:08X}/{name}");
    let digest = String::new();
    SegmentEntry {
        path,
        stored_bytes: 10,
        info,
        restore_points: vec![],
        faults: vec![],
        digest,
        pushed_by: None,
    }
}

/// A backup that takes `span` segments' time from the middle of segment `number` on.
pub(crate) fn backup(timeline: u32, number: u64, span: u64) -> BackupEntry {
    let (start, stop) = (number * SIZE + 500, (number + span) * SIZE + 700);
    let started = hour(number as i64);
    let head = Manifest {
        id: BackupId::new(started, timeline as u16),
        kind: BackupKind::Full,
        method: BackupMethod::Backup,
        parent: None,
        full_because: None,
        description: None,
        started,
        stopped: hour((number + span) as i64),
        system_id: 42.into(),
        major: PgMajor::V15,
        server_version: "15.18".into(),
        segment_size: size(),
        data_checksums: true,
        timeline: t(timeline),
        start_lsn: start.into(),
        stop_lsn: stop.into(),
        checkpoint_lsn: start.into(),
        backup_label: String::new(),
        tablespace_map: String::new(),
        from_standby: false,
        tablespaces: vec![],
        config_files: vec![],
        maps: vec![],
        directories: vec![],
        files: vec![],
        damaged_pages: vec![],
        chain: None,
        stats: ManifestStats::default(),
    };
    BackupEntry { head, files: 0, keep: None }
}

/// A catalogue of these segments, in any order, and backups.
pub(crate) fn catalog(mut segments: Vec<SegmentEntry>, backups: Vec<BackupEntry>) -> Catalog {
    segments.sort_by(|a, b| (a.info.name, &a.path).cmp(&(b.info.name, &b.path)));
    let system = SystemInfo {
        system_id: 42.into(),
        major: PgMajor::V15,
        block_bytes: 8192,
        segment_size: size(),
        created: TimestampTz::default(),
    };
    Catalog {
        cluster: "main".into(),
        system,
        backups,
        started: vec![],
        segments,
        lineages: BTreeMap::new(),
        beginnings: BTreeMap::new(),
        damaged: vec![],
    }
}
