//! Our reading of WAL, held against pg_waldump: every record, by position, transaction, length and blocks.

use std::collections::BTreeMap;
use std::fs;

use waltide_format::archive::{CommitKind, Ending, SegmentIndex};
use waltide_format::engines::postgres::cluster::{ControlFile, History};
use waltide_format::engines::postgres::scan::{
    Previous, PreviousLog, Scan, ScanContext, ScanMode, scan_segment,
};
use waltide_format::engines::postgres::wal::{
    Compression, Expected, Next, RecordStream, SegmentSpan, rmgr_name,
};
use waltide_format::{BLOCK_BYTES, SegmentName, SegmentSize, SystemId, TimelineId};
use waltide_tests::oracle::{BlockRef, ControlData, PageImage, WalRecord, Waldump, parse_lsn, waldump_stats};
use waltide_tests::workload::{EVERY_RMGR_SETTINGS, RMGRS, every_rmgr};
use waltide_tests::{Cluster, Scratch, StopMode};

/// A stopped cluster's segments that hold WAL, with their bytes, in order.
struct Log {
    cluster: Cluster,
    size: SegmentSize,
    segments: Vec<(SegmentName, Vec<u8>)>,
}

impl Log {
    fn of(mut cluster: Cluster) -> Self {
        let names = cluster.wal_segments();
        cluster.stop(StopMode::Fast);
        let control = fs::read(cluster.data_dir().join("global/pg_control")).unwrap();
        let size = ControlFile::decode(&control).unwrap().segment_size;
        let wal = cluster.data_dir().join("pg_wal");
        // The checkpoint at shutdown may have needed one more.
        let last = names.last().unwrap().parse::<SegmentName>().unwrap().next(size).unwrap();
        let names = names.iter().map(|name| name.parse().unwrap()).chain([last]);
        let read = |name: SegmentName| Some((name, fs::read(wal.join(name.to_string())).ok()?));
        let mut segments: Vec<_> = names.filter_map(read).collect();
        let begun = |name: SegmentName, bytes: &[u8]| {
            let span = SegmentSpan::containing(name.start(size).unwrap(), size).unwrap();
            RecordStream::new(bytes, span, Expected::default(), None).is_ok()
        };
        segments.retain(|(name, bytes)| begun(*name, bytes));
        Self { cluster, size, segments }
    }

    fn names(&self) -> (String, String) {
        let name = |at: Option<&(SegmentName, Vec<u8>)>| at.unwrap().0.to_string();
        (name(self.segments.first()), name(self.segments.last()))
    }

    /// Every record, read segment by segment, in pg_waldump's terms; and each image restored.
    fn records(&self) -> Vec<WalRecord> {
        let (mut records, mut tail) = (Vec::new(), None);
        for (name, bytes) in &self.segments {
            let span = SegmentSpan::containing(name.start(self.size).unwrap(), self.size).unwrap();
            let mut stream = RecordStream::new(bytes, span, Expected::default(), tail).unwrap();
            while let Next::Record(record) = stream.next_record().unwrap() {
                for image in record.blocks().filter_map(|block| block.image) {
                    let mut page = [0xEE; BLOCK_BYTES];
                    image.restore(&mut page).unwrap();
                    let version = u16::from_le_bytes([page[18], page[19]]);
                    assert!(page == [0; BLOCK_BYTES] || version == 0x2004, "{}: {version:#x}", record.start);
                }
                let blocks = record.blocks().map(|block| BlockRef {
                    id: block.id,
                    spc: block.relation.spc_oid,
                    db: block.relation.db_oid,
                    rel: block.relation.rel_number,
                    fork: match block.fork.suffix() {
                        "" => "main".to_owned(),
                        suffix => suffix[1..].to_owned(),
                    },
                    blk: block.block,
                    image: block.image.map(|image| PageImage {
                        apply: image.apply(),
                        hole_offset: image.hole_offset(),
                        hole_length: image.hole_bytes(),
                        compression: match image.compression() {
                            Compression::None => None,
                            Compression::Pglz => Some("pglz".to_owned()),
                            Compression::Lz4 => Some("lz4".to_owned()),
                            Compression::Zstd => Some("zstd".to_owned()),
                        },
                    }),
                });
                records.push(WalRecord {
                    lsn: record.start.get(),
                    prev: record.header.prev.get(),
                    xid: record.header.xid.get(),
                    rmgr: record.rmgr().to_string(),
                    rec_len: record.header.total_bytes - record.image_bytes(),
                    total_len: record.header.total_bytes,
                    desc: String::new(),
                    blocks: blocks.collect(),
                });
            }
            tail = stream.into_tail();
        }
        records
    }

    /// Compares every record, and answers pg_waldump's.
    fn assert_same_records(&self) -> Vec<WalRecord> {
        let wal = self.cluster.data_dir().join("pg_wal");
        let (first, last) = self.names();
        let (theirs, _) = Waldump::segments(&wal, &first, Some(&last)).finish();
        let ours = self.records();
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert_eq!(*ours, WalRecord { desc: String::new(), ..theirs.clone() });
        }
        assert_eq!(ours.len(), theirs.len(), "their last is {:?}", theirs.last());
        theirs
    }

    /// Scans every segment as push does; all but the last are whole.
    fn scan_all(&self) -> Vec<Scan> {
        let system_id = SystemId::from(ControlData::read(self.cluster.data_dir()).system_identifier());
        let mut scans = Vec::new();
        for (i, (name, bytes)) in self.segments.iter().enumerate() {
            let previous = i.checked_sub(1).map(|i| &self.segments[i]);
            let is_last = i + 1 == self.segments.len();
            let context = ScanContext {
                system_ids: &[system_id],
                previous: previous
                    .map(|(name, bytes)| Previous { name: *name, log: PreviousLog::Bytes(bytes) }),
                next: self.segments.get(i + 1).map(|(_, bytes)| bytes.as_slice()),
                mode: if is_last { ScanMode::Partial } else { ScanMode::Whole },
                ..ScanContext::new(*name, self.size)
            };
            let scan = scan_segment(bytes, &context).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert!(scan.index.faults.is_empty(), "{name}: {:?}", scan.index.faults);
            assert_eq!(scan.stopped_by, None, "{name}");
            // A crash may end the log with a segment, too.
            let ends_inside = is_last && Some(scan.index.info.valid_end) != name.end(self.size);
            assert_eq!(scan.index.info.ending == Ending::EndOfLog, ends_inside, "{name}: {:?}", scan.end);
            if previous.is_some() {
                assert_eq!(scan.index.info.head_joined, scan.index.info.continued_bytes > 0, "{name}");
            }
            scans.push(scan);
        }
        // A record over the edge is joined, unless a crash aborted it: then the next segment says so, or there is none.
        for (i, scan) in scans.iter().enumerate() {
            let info = &scan.index.info;
            let is_cut_off = scans.get(i + 1).is_none_or(|next| next.index.info.overwrites_contrecord);
            let joined = info.pending.is_none_or(|pending| pending.joined != is_cut_off);
            assert!(joined, "{}: {:?}", info.name, info.pending);
        }
        scans
    }
}

/// Compares the indexes with what pg_waldump says of the same records.
fn assert_same_index(log: &Log, records: &[WalRecord], scans: &[Scan]) {
    let all = || scans.iter().map(|scan| &scan.index);
    let wal = log.cluster.data_dir().join("pg_wal");
    let (first, last) = log.names();
    let stats = waldump_stats(&wal, &first, Some(&last));
    let mut counts: BTreeMap<String, (u64, u64, u64)> = BTreeMap::new();
    for count in all().flat_map(|index| &index.rmgrs) {
        let sum = counts.entry(rmgr_name(count.rmid)).or_default();
        *sum = (sum.0 + count.records, sum.1 + count.record_bytes, sum.2 + count.image_bytes);
    }
    for (name, theirs) in stats.iter().filter(|(name, theirs)| *name != "Total" && theirs.count > 0) {
        let theirs = (theirs.count, theirs.record_bytes, theirs.image_bytes);
        assert_eq!(counts.remove(name), Some(theirs), "{name}");
    }
    assert_eq!(counts, BTreeMap::new());

    // An edge record is in both neighbours' indexes.
    let mut ends: BTreeMap<u64, (CommitKind, u32, usize, usize, String)> = BTreeMap::new();
    for x in all().flat_map(|index| &index.xacts) {
        let of = (x.kind, x.xid.get(), x.subxacts.len(), x.dropped.len(), x.time.to_string());
        ends.insert(x.start.get(), of);
    }
    for record in records.iter().filter(|record| record.rmgr == "Transaction") {
        let kind = match record.kind() {
            "COMMIT" => CommitKind::Commit,
            "ABORT" => CommitKind::Abort,
            "PREPARE" => CommitKind::Prepare,
            "COMMIT_PREPARED" => CommitKind::CommitPrepared,
            "ABORT_PREPARED" => CommitKind::AbortPrepared,
            "ASSIGNMENT" | "INVALIDATION" => continue,
            other => panic!("{other}"),
        };
        let (ours, xid, subxacts, dropped, time) =
            ends.remove(&record.lsn).unwrap_or_else(|| panic!("{record:?}"));
        assert_eq!(ours, kind, "{record:?}");
        let words_after = |what: &str| {
            let list = record.desc.split("; ").find_map(|part| part.strip_prefix(what));
            list.map_or(0, |list| list.split_whitespace().count())
        };
        assert_eq!(subxacts, words_after("subxacts: "), "{record:?}");
        if kind != CommitKind::Prepare {
            assert_eq!(dropped, words_after("rels: "), "{record:?}");
        }
        // pg_waldump prints all six digits of the microsecond and its own zone; ours leaves out zeros.
        let time = time.strip_suffix("+00").unwrap();
        let told = record.desc.split([';', ' ']).collect::<Vec<_>>().join(" ");
        assert!(told.contains(time), "{time}: {record:?}");
        match kind {
            CommitKind::Commit | CommitKind::Abort | CommitKind::Prepare => {
                assert_eq!(xid, record.xid, "{record:?}")
            }
            CommitKind::CommitPrepared | CommitKind::AbortPrepared => {
                assert!(record.desc.contains(&format!(" {xid}: ")), "{xid}: {record:?}");
            }
        }
    }
    assert!(ends.is_empty(), "{ends:?}");

    let starts = |of: fn(&SegmentIndex) -> Vec<u64>| {
        let mut starts: Vec<u64> = all().flat_map(of).collect();
        starts.dedup();
        starts
    };
    let theirs = |rmgr: &str, kinds: &[&str]| -> Vec<u64> {
        let of_kind = records.iter().filter(|r| r.rmgr == rmgr && kinds.contains(&r.kind()));
        of_kind.map(|r| r.lsn).collect()
    };
    assert_eq!(
        starts(|index| index.checkpoints.iter().map(|c| c.start.get()).collect()),
        theirs("XLOG", &["CHECKPOINT_SHUTDOWN", "CHECKPOINT_ONLINE"])
    );
    assert_eq!(
        starts(|index| index.restore_points.iter().map(|p| p.start.get()).collect()),
        theirs("XLOG", &["RESTORE_POINT"])
    );
    assert_eq!(
        starts(|index| index.running_xacts.iter().map(|x| x.start.get()).collect()),
        theirs("Standby", &["RUNNING_XACTS"])
    );
    let mut files = Vec::new();
    for rmgr in ["Storage", "Database", "Tablespace", "RelMap"] {
        files.extend(records.iter().filter(|r| r.rmgr == rmgr).map(|r| r.lsn));
    }
    files.sort_unstable();
    assert_eq!(starts(|index| index.file_events.iter().map(|e| e.start.get()).collect()), files);

    // Every block that a record refers to is there, with the place of its last image.
    type Block = (u32, u32, u32, String, u32);
    let mut touched: BTreeMap<(u64, Block), Option<u64>> = BTreeMap::new();
    for record in records {
        let segment = log.size.floor(record.lsn.into()).get();
        for block in &record.blocks {
            let key = (segment, (block.spc, block.db, block.rel, block.fork.clone(), block.blk));
            let entry = touched.entry(key).or_default();
            if block.image.as_ref().is_some_and(|image| image.apply) {
                *entry = Some(record.lsn);
            }
        }
    }
    for index in all() {
        let segment = index.info.name.start(log.size).unwrap().get();
        for fork in &index.blocks {
            let r = fork.relation;
            let suffix = fork.fork.suffix().trim_start_matches('_');
            let name = if suffix.is_empty() { "main" } else { suffix }.to_owned();
            for block in &fork.blocks {
                let key = (segment, (r.spc_oid, r.db_oid, r.rel_number, name.clone(), block.block));
                if let Some(image) = touched.remove(&key) {
                    // pg_waldump does not print re-initialisations, which count like images.
                    assert!(block.last_image.map(|lsn| lsn.get()) >= image, "{key:?} {block:?} {image:?}");
                }
            }
        }
    }
    assert!(touched.is_empty(), "{:?}", touched.iter().next());
}

fn check(cluster: Cluster) -> Vec<WalRecord> {
    let log = Log::of(cluster);
    let records = log.assert_same_records();
    let scans = log.scan_all();
    assert_same_index(&log, &records, &scans);
    let control = ControlData::read(log.cluster.data_dir());
    let ours =
        ControlFile::decode(&fs::read(log.cluster.data_dir().join("global/pg_control")).unwrap()).unwrap();
    assert_eq!(ours.checkpoint.get(), control.checkpoint());
    assert_eq!(ours.checkpoint_copy.redo.get(), control.redo());
    assert_eq!(ours.state.to_string(), control.state());
    assert_eq!(ours.system_id.get(), control.system_identifier());
    let last = scans.iter().flat_map(|scan| &scan.index.checkpoints).next_back().unwrap();
    assert_eq!((last.start, last.redo), (ours.checkpoint, ours.checkpoint_copy.redo));
    records
}

#[test]
fn every_kind_of_record_is_read_as_pg_waldump_reads_it() {
    let cluster = Cluster::builder("kinds")
        .settings(EVERY_RMGR_SETTINGS)
        .setting("wal_level", "logical")
        .setting("wal_keep_size", "10GB")
        .setting("wal_compression", "lz4")
        .start();
    every_rmgr(&cluster);
    let records = check(cluster);
    for rmgr in RMGRS {
        assert!(records.iter().any(|record| record.rmgr == rmgr), "{rmgr}");
    }
}

#[test]
fn images_for_consistency_checks_and_every_compression_are_read() {
    let cluster = Cluster::builder("images")
        .setting("wal_keep_size", "10GB")
        .setting("wal_consistency_checking", "all")
        .setting("max_wal_size", "64MB")
        .start();
    cluster.pgbench_init(1);
    for compression in ["off", "pglz", "lz4", "zstd"] {
        cluster.query(&format!("alter system set wal_compression = {compression}"));
        cluster.reload();
        cluster.wait_until(&format!("select current_setting('wal_compression') = '{compression}'"));
        cluster.query("checkpoint");
        cluster.pgbench(&["-t", "200", "-c", "2"]).assert_ok();
    }
    let records = check(cluster);
    let images = || records.iter().flat_map(|r| &r.blocks).filter_map(|b| b.image.as_ref());
    for method in [None, Some("pglz"), Some("lz4"), Some("zstd")] {
        assert!(images().any(|image| image.compression.as_deref() == method), "{method:?}");
    }
    assert!(images().any(|image| !image.apply) && images().any(|image| image.apply));
}

#[test]
fn pgbench_in_segments_of_16_mib_is_read_as_pg_waldump_reads_it() {
    let cluster = Cluster::builder("pgbench").segment_mb(16).setting("wal_keep_size", "10GB").start();
    cluster.pgbench_init(2);
    cluster.query("select pg_create_restore_point('between')");
    cluster.query("checkpoint");
    cluster.pgbench(&["-t", "2000", "-c", "4"]).assert_ok();
    cluster.query("select pg_switch_wal()");
    cluster.pgbench(&["-t", "500", "-c", "4"]).assert_ok();
    let records = check(cluster);
    assert!(records.len() > 10_000);
}

#[test]
fn records_that_a_crash_aborted_are_read_as_pg_waldump_reads_them() {
    let scratch = Scratch::new("crashes");
    // The log is written out in the middle of records, as it is under load.
    let mut cluster = Cluster::builder("db")
        .scratch(&scratch)
        .setting("wal_keep_size", "10GB")
        .setting("synchronous_commit", "off")
        .setting("wal_writer_delay", "1ms")
        .setting("wal_writer_flush_after", "0")
        .start();
    cluster.pgbench_init(1);
    let long = "select pg_logical_emit_message(false, 'x', repeat('x', 20000 + (random() * 60000)::int));";
    let script = scratch.file("long.sql", long);
    let wal = cluster.data_dir().join("pg_wal");
    for _ in 0..20 {
        let load =
            cluster.pgbench_background(&["-T", "600", "-c", "2", "-n", "-f", &script.display().to_string()]);
        let lsn = cluster.query("select pg_current_wal_lsn()");
        cluster.wait_until(&format!("select pg_current_wal_lsn() - '{lsn}' > 1500000"));
        cluster.kill9();
        drop(load);
        cluster.start();
        let (first, last) = (parse_lsn(&lsn).unwrap(), cluster.wal_segments().pop().unwrap());
        let first =
            SegmentName::containing(TimelineId::FIRST, first.into(), SegmentSize::new(1 << 20).unwrap());
        let (records, _) = Waldump::segments(&wal, &first.to_string(), Some(&last)).finish();
        if records.iter().any(|record| record.kind() == "OVERWRITE_CONTRECORD") {
            break;
        }
    }
    cluster.pgbench(&["-t", "500", "-c", "2"]).assert_ok();
    let records = check(cluster);
    assert!(records.iter().any(|record| record.kind() == "OVERWRITE_CONTRECORD"));
}

#[test]
fn the_first_segment_after_a_promotion_carries_its_ancestors_pages() {
    let primary = Cluster::builder("primary").setting("wal_keep_size", "10GB").start();
    let mut standby = primary.make_standby("standby");
    primary.pgbench_init(1);
    standby.wait_caught_up(&primary);
    standby.promote();
    standby.wait_promoted();
    standby.pgbench(&["-t", "2000", "-c", "2"]).assert_ok();
    standby.query("select pg_switch_wal()");
    standby.stop(StopMode::Fast);

    let wal = standby.data_dir().join("pg_wal");
    let text = fs::read(wal.join("00000002.history")).unwrap();
    let history = History::parse("2".parse().unwrap(), &text).unwrap();
    let fork = history.ancestors()[0].switch;
    let size = SegmentSize::new(1 << 20).unwrap();
    let first = SegmentName::containing(history.timeline(), fork, size);
    let bytes = fs::read(wal.join(first.to_string())).unwrap();
    let before = first.on("1".parse().unwrap()).previous(size).unwrap();
    let before_bytes = fs::read(wal.join(before.to_string())).unwrap();
    let context = ScanContext {
        history: Some(&history),
        previous: Some(Previous { name: before, log: PreviousLog::Bytes(&before_bytes) }),
        ..ScanContext::new(first, size)
    };
    let scan = scan_segment(&bytes, &context).unwrap();
    let info = &scan.index.info;
    assert_eq!((info.first_page_timeline.get(), info.last_page_timeline.get()), (1, 2));
    let end = &scan.index.timeline_ends[0];
    assert_eq!((end.start, end.timeline.get(), end.previous_timeline.get()), (fork, 2, 1));
    assert_eq!(info.head_joined, info.continued_bytes > 0);

    // Under timeline 1's name, the same bytes are none of its segments.
    let named = first.on("1".parse().unwrap());
    let err = scan_segment(&bytes, &ScanContext::new(named, size)).unwrap_err();
    assert!(err.to_string().starts_with("xlp_tli at byte "), "{err}");
    // The old timeline's segment ends at the fork or goes on alone.
    let old = fs::read_dir(&wal).unwrap().filter_map(|e| e.unwrap().file_name().into_string().ok());
    for name in old.filter(|name| name.starts_with(&format!("{named}")) && name.ends_with(".partial")) {
        let bytes = fs::read(wal.join(&name)).unwrap();
        let partial = ScanContext { mode: ScanMode::Partial, ..ScanContext::new(named, size) };
        assert_eq!(scan_segment(&bytes, &partial).unwrap().index.info.valid_end, fork);
    }
}
