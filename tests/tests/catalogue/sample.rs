//! A small archive made without PostgreSQL: real WAL of a few records, backups over it, and everything around them.

use std::sync::Arc;

use object_store::memory::InMemory;
use waltide_archiver::catalog::{Known, load};
use waltide_format::archive::{
    BackupKind, BackupMethod, Catalog, ClusterInfo, Envelope, Extent, ExtentMap, Keep, Layout, Manifest,
    ManifestFile, ManifestStats, ObjectKind, PackBuilder, StartedBackup, SystemInfo, SystemLayout, WalFile,
    WalObject, WaltideInfo, encode_segment,
};
use waltide_format::engines::postgres::cluster::History;
use waltide_format::engines::postgres::scan::{Previous, PreviousLog, ScanContext, ScanMode, scan_segment};
use waltide_format::engines::postgres::wal::PreviousTail;
use waltide_format::*;
use waltide_replay::{Verification, Verify};
use waltide_storage::{Archive, NoProgress};

/// The segments' size.
pub(crate) const SIZE: u64 = 1 << 20;
/// The system identifier.
pub(crate) const SYSTEM: u64 = 42;

/// An archive, and what is needed to add to it.
pub(crate) struct Sample {
    pub(crate) archive: Archive,
    pub(crate) layout: Layout,
}

/// The moment `n` hours after 2000-01-01.
pub(crate) fn hour(n: u64) -> TimestampTz {
    TimestampTz::from_postgres_micros(n as i64 * 3_600_000_000)
}

/// Long after everything in the archive was stored.
pub(crate) fn later() -> TimestampTz {
    let ten_days = jiff::SignedDuration::from_hours(240);
    TimestampTz::from_jiff(jiff::Timestamp::now() + ten_days)
}

fn size() -> SegmentSize {
    SegmentSize::new(SIZE).unwrap()
}

pub(crate) fn segment_name(timeline: u32, number: u64) -> SegmentName {
    SegmentName::containing(TimelineId::new(timeline).unwrap(), Lsn::from(number * SIZE), size())
}

/// A record without blocks.
fn record(rmid: u8, info: u8, xid: u32, prev: u64, main: &[u8]) -> Vec<u8> {
    record_of(rmid, info, xid, prev, Vec::new(), main)
}

/// The same of blocks, by their headers.
fn record_of(rmid: u8, info: u8, xid: u32, prev: u64, blocks: Vec<u8>, main: &[u8]) -> Vec<u8> {
    let mut data = blocks;
    if !main.is_empty() {
        data.extend([255, main.len() as u8]);
        data.extend(main);
    }
    let mut header = Writer::new();
    header.u32(24 + data.len() as u32).u32(xid).u64(prev).u8(info).u8(rmid).u16(0);
    let crc = crc32c::crc32c_append(crc32c::crc32c(&data), header.as_bytes());
    header.u32(crc).bytes(&data);
    let mut bytes = header.into_bytes();
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// A segment of what it begins with.
fn whole(begin: Writer) -> Vec<u8> {
    let mut wal = vec![0; SIZE as usize];
    wal[..begin.len()].copy_from_slice(begin.as_bytes());
    wal
}

/// The header that a segment begins with.
fn first_page(timeline: u32, number: u64) -> Writer {
    let mut w = Writer::new();
    w.u16(PgMajor::V15.page_magic()).u16(2).u32(timeline).u64(number * SIZE).u32(0).u32(0);
    w.u64(SYSTEM).u32(SIZE as u32).u32(8192);
    w
}

/// A segment with a commit at `number` o'clock and an XLOG_SWITCH behind it; the records before it begin at `prev`.
/// Gives its bytes and where its last record begins.
fn segment(first_page_timeline: u32, number: u64, prev: u64, xid: u32) -> (Vec<u8>, u64) {
    let start = number * SIZE;
    let mut w = first_page(first_page_timeline, number);
    w.bytes(&record(1, 0, xid, prev, &hour(number).postgres_micros().to_le_bytes()));
    let switch = start + w.len() as u64;
    w.bytes(&record(0, 0x40, 0, start + 40, &[]));
    (whole(w), switch)
}

/// The same with a row of pg_class deleted before the switch, by a transaction that does not end here.
fn changing_segment(number: u64, prev: u64, xid: u32, deletes: u32) -> (Vec<u8>, u64) {
    let start = number * SIZE;
    let mut w = first_page(1, number);
    w.bytes(&record(1, 0, xid, prev, &hour(number).postgres_micros().to_le_bytes()));
    let second = start + w.len() as u64;
    let mut block = Writer::new();
    // The first block that it names, without data: of pg_class in database 5, block 0.
    block.u8(0).u8(0).u16(0).u32(1663).u32(5).u32(1259).u32(0);
    let mut delete = Writer::new();
    delete.u32(deletes).u16(1).u16(0);
    w.bytes(&record_of(10, 0x10, deletes, start + 40, block.into_bytes(), delete.as_bytes()));
    let switch = start + w.len() as u64;
    w.bytes(&record(0, 0x40, 0, second, &[]));
    (whole(w), switch)
}

/// Where the second record of a segment begins.
pub(crate) const SECOND: u64 = 40 + 40;

impl Sample {
    /// Five segments on timeline 1, a sixth on timeline 2 which leaves it in the last, two backups, and one that was
    /// announced.
    pub(crate) async fn new() -> Self {
        Self::on(Archive::from_store(Arc::new(InMemory::new()), "memory")).await
    }

    /// The same in another place.
    pub(crate) async fn on(archive: Archive) -> Self {
        let sample = Self::bare(archive).await;
        sample.put_timelines().await;
        sample
            .put_file("000000010000000000000004.00000028.backup", b"START WAL LOCATION: 0/400028\n".to_vec())
            .await;
        sample.put_backup(4, 5).await;
        sample.put_backup(6, 6).await;
        sample.announce(7).await;
        sample
    }

    /// Five segments on timeline 1, and a sixth on timeline 2 with its history; gives where its last record begins.
    pub(crate) async fn put_timelines(&self) -> u64 {
        let mut prev = (2 * SIZE + SECOND, None);
        for number in 3..8 {
            prev = self.put_segment(1, 1, number, prev, 700 + number as u32, None).await;
        }
        let fork = Lsn::from(7 * SIZE + SECOND);
        let history = History::root(TimelineId::FIRST).branch(
            TimelineId::new(2).unwrap(),
            fork,
            "no recovery target specified",
        );
        let history = history.unwrap();
        self.put_file("00000002.history", history.to_text().into_bytes()).await;
        let before = (6 * SIZE + SECOND, prev.1.clone().filter(|_| false));
        self.put_segment(2, 1, 7, before, 707, Some(&history)).await.0
    }

    /// Puts a copy of a `.partial` of timeline 2, the log of which ends behind `commits` commits; the records before it
    /// begin at `prev`. A longer copy where there is one. Gives its path.
    pub(crate) async fn put_partial(&self, number: u64, prev: u64, commits: u64) -> String {
        let name = segment_name(2, number);
        let mut w = first_page(2, number);
        let mut prev = prev;
        for n in 0..commits {
            let start = number * SIZE + w.len() as u64;
            w.bytes(&record(1, 0, 900 + n as u32, prev, &hour(number).postgres_micros().to_le_bytes()));
            prev = start;
        }
        let mut wal = whole(w);
        let context = ScanContext { mode: ScanMode::Partial, ..ScanContext::new(name, size()) };
        let index = scan_segment(&wal, &context).unwrap().index;
        let valid_end = index.info.valid_end;
        wal.truncate(valid_end.bytes_since(name.start(size()).unwrap()) as usize);
        let plain = WalObject::File(WalFileName::Partial(name));
        let longer = WalObject::Longer { of: WalFileName::Partial(name), valid_end };
        let is_there = self.archive.head(&self.names().wal_object(plain)).await.unwrap().is_some();
        let path = self.names().wal_object(if is_there { longer } else { plain });
        self.put(&path, encode_segment(&wal, &index, 1, 1)).await;
        path
    }

    /// One segment, one pinned backup in it, a history file, an announced backup: one object of every kind.
    pub(crate) async fn small() -> Self {
        let sample = Self::bare(Archive::from_store(Arc::new(InMemory::new()), "memory")).await;
        sample.put_segment(1, 1, 4, (3 * SIZE + SECOND, None), 704, None).await;
        sample.put_file("00000002.history", b"1\t0/500000\tpromoted\n".to_vec()).await;
        sample
            .put_file("000000010000000000000004.00000028.backup", b"START WAL LOCATION: 0/400028\n".to_vec())
            .await;
        let id = sample.put_backup(4, 4).await;
        let keep = Keep { since: hour(5), reason: Some("audit".into()), standalone: false };
        sample.put(&sample.names().keep(&id), Envelope::seal_json(ObjectKind::Json, &keep)).await;
        sample.announce(7).await;
        sample
    }

    /// An archive of nothing yet.
    pub(crate) async fn bare(archive: Archive) -> Self {
        let sample = Self { archive, layout: Layout::new("main").unwrap() };
        let json = |value: serde_json::Value| Envelope::seal_json(ObjectKind::Json, &value);
        let waltide = WaltideInfo { format_version: 1, archive_id: "a1".into(), created: hour(0) };
        sample.put(Layout::WALTIDE_JSON, json(serde_json::to_value(waltide).unwrap())).await;
        let cluster = ClusterInfo { engine: "postgres".into(), created: hour(0) };
        sample.put(&sample.layout.cluster_json(), json(serde_json::to_value(cluster).unwrap())).await;
        let system = SystemInfo {
            system_id: SYSTEM.into(),
            major: PgMajor::V15,
            block_bytes: 8192,
            segment_size: size(),
            created: hour(0),
        };
        sample.put(&sample.names().system_json(), json(serde_json::to_value(system).unwrap())).await;
        sample
    }

    pub(crate) fn names(&self) -> SystemLayout {
        self.layout.system(SYSTEM.into())
    }

    pub(crate) async fn put(&self, path: &str, bytes: Vec<u8>) {
        self.archive.put_new(path, bytes.into()).await.unwrap();
    }

    /// Puts other bytes under a name, as no one but a broken disk does.
    pub(crate) async fn replace(&self, path: &str, bytes: Vec<u8>) {
        self.archive.delete(path).await.unwrap();
        self.put(path, bytes).await;
    }

    pub(crate) async fn put_file(&self, name: &str, contents: Vec<u8>) {
        let name: WalFileName = name.parse().unwrap();
        self.put(&self.names().wal_file(name), WalFile { name, contents, pushed_by: None }.encode()).await;
    }

    /// Puts a segment whose records follow those of `previous`; gives the same for the next.
    pub(crate) async fn put_segment(
        &self,
        timeline: u32,
        first_page_timeline: u32,
        number: u64,
        previous: (u64, Option<(SegmentName, PreviousTail)>),
        xid: u32,
        history: Option<&History>,
    ) -> (u64, Option<(SegmentName, PreviousTail)>) {
        let wal = segment(first_page_timeline, number, previous.0, xid);
        self.put_wal(segment_name(timeline, number), wal, previous, history).await
    }

    /// The same in which another transaction deletes a row of pg_class, on timeline 1.
    pub(crate) async fn put_changing_segment(
        &self,
        number: u64,
        previous: (u64, Option<(SegmentName, PreviousTail)>),
        xid: u32,
        deletes: u32,
    ) -> (u64, Option<(SegmentName, PreviousTail)>) {
        let wal = changing_segment(number, previous.0, xid, deletes);
        self.put_wal(segment_name(1, number), wal, previous, None).await
    }

    async fn put_wal(
        &self,
        name: SegmentName,
        (wal, last): (Vec<u8>, u64),
        previous: (u64, Option<(SegmentName, PreviousTail)>),
        history: Option<&History>,
    ) -> (u64, Option<(SegmentName, PreviousTail)>) {
        let previous = previous.1.map(|(name, tail)| Previous { name, log: PreviousLog::Tail(tail) });
        let context = ScanContext { previous, history, ..ScanContext::new(name, size()) };
        let scan = scan_segment(&wal, &context).unwrap();
        let object = encode_segment(&wal, &scan.index, 1, 1);
        self.put(&self.names().wal_file(WalFileName::Segment(name)), object).await;
        (last, scan.tail.map(|tail| (name, tail)))
    }

    /// A backup from the first record of one segment to behind that of another, with a map and a pack of its own.
    pub(crate) async fn put_backup(&self, first: u64, last: u64) -> BackupId {
        let id = BackupId::new(hour(first), first as u16);
        let (map, pack, files) = self.files(&id, first as u8);
        self.put(&self.names().pack(&format!("{id}-0")), pack).await;
        self.put(&self.names().map(id.as_str()), map).await;
        self.put(&self.names().manifest(&id), self.manifest(&id, first, last, files).encode()).await;
        id
    }

    /// The map, the pack and the files of a backup.
    pub(crate) fn files(&self, id: &BackupId, seed: u8) -> (Vec<u8>, Vec<u8>, Vec<ManifestFile>) {
        let raw: Vec<u8> = (0..9000u32).map(|i| (i / 64) as u8 ^ seed).collect();
        let mut pack = PackBuilder::default();
        let frame = PackBuilder::frame(&raw, 1);
        let extent = Extent {
            pack: 0,
            offset: pack.push(&frame),
            stored_bytes: frame.len() as u32,
            first_block: 0,
            raw_bytes: raw.len() as u32,
            crc: crc32fast::hash(&raw),
        };
        let map = ExtentMap { packs: vec![format!("{id}-0")], files: vec![vec![extent]] };
        let file = ManifestFile {
            path: "base/1/1".into(),
            bytes: raw.len() as u64,
            mode: 0o600,
            modified: 0,
            extents: vec![(0, 0)],
        };
        (map.encode(), pack.finish(), vec![file])
    }

    pub(crate) fn manifest(
        &self,
        id: &BackupId,
        first: u64,
        last: u64,
        files: Vec<ManifestFile>,
    ) -> Manifest {
        Manifest {
            id: id.clone(),
            kind: BackupKind::Full,
            method: BackupMethod::Backup,
            parent: None,
            full_because: None,
            description: None,
            started: hour(first),
            stopped: hour(last),
            system_id: SYSTEM.into(),
            major: PgMajor::V15,
            server_version: "15.18".into(),
            segment_size: size(),
            data_checksums: true,
            timeline: TimelineId::FIRST,
            start_lsn: Lsn::from(first * SIZE + 40),
            stop_lsn: Lsn::from(last * SIZE + SECOND),
            checkpoint_lsn: Lsn::from(first * SIZE + 40),
            backup_label: String::new(),
            tablespace_map: String::new(),
            from_standby: false,
            tablespaces: vec![],
            config_files: vec![],
            maps: vec![id.to_string()],
            directories: vec![],
            files,
            damaged_pages: vec![],
            chain: None,
            stats: ManifestStats::default(),
        }
    }

    /// A backup that has not come further than its first pack.
    pub(crate) async fn announce(&self, at: u64) -> BackupId {
        let id = BackupId::new(hour(at), 0xabcd);
        self.put_announcement(&id, at).await;
        let (_, pack, _) = self.files(&id, 77);
        self.put(&self.names().pack(&format!("{id}-0")), pack).await;
        id
    }

    pub(crate) async fn put_announcement(&self, id: &BackupId, at: u64) {
        let kind = BackupKind::Full;
        let note = StartedBackup {
            id: id.clone(),
            started: hour(at),
            host: "elsewhere".into(),
            pid: 1,
            kind,
            parent: None,
        };
        self.put(&self.names().started(id), Envelope::seal_json(ObjectKind::Json, &note)).await;
    }

    pub(crate) async fn catalog(&self) -> Catalog {
        load(&self.archive, &self.layout, None, Known::Nothing, 2).await.unwrap()
    }

    /// Every object with its bytes, the ledger left out.
    pub(crate) async fn objects(&self) -> Vec<(String, Vec<u8>)> {
        let mut objects = Vec::new();
        for object in self.archive.list("").await.unwrap() {
            if !object.path.contains("/ledger/") {
                let bytes = self.archive.get(&object.path, 1 << 30).await.unwrap();
                objects.push((object.path, bytes.to_vec()));
            }
        }
        objects
    }

    pub(crate) async fn verify(&self, quick: bool) -> Verification {
        let catalog = self.catalog().await;
        self.verify_catalog(&catalog, quick).await
    }

    pub(crate) async fn verify_catalog(&self, catalog: &Catalog, quick: bool) -> Verification {
        Verify { quick, ..self.whole(catalog) }.run(hour(100)).await.unwrap()
    }

    /// A verification of everything.
    pub(crate) fn whole<'a>(&'a self, catalog: &'a Catalog) -> Verify<'a> {
        Verify {
            archive: &self.archive,
            layout: &self.layout,
            catalog,
            backup: None,
            quick: false,
            time_allowed: None,
            threads: 2,
            progress: &NoProgress,
        }
    }
}
