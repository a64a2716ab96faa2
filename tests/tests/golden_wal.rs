//! Segments and control files that each supported major version wrote (tests/golden/wal/make.sh), read
//! without a server. From 15 on, what the version's own pg_walinspect read in them lies beside them.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use waltide_format::archive::{CommitKind, Ending, FileEventKind, RelationWork, SegmentDetail, SegmentIndex};
use waltide_format::engines::postgres::cluster::{ClusterState, ControlFile};
use waltide_format::engines::postgres::detail::tell_segment;
use waltide_format::engines::postgres::scan::{Previous, PreviousLog, Scan, ScanContext, scan_segment};
use waltide_format::engines::postgres::wal::{
    Block, Compression, Expected, Next, PackedFor, Prepare, Record, RecordStream, Rmgr, SegmentSpan,
    XlogRecord,
};
use waltide_format::{
    BLOCK_BYTES, ForkNumber, Lsn, PgMajor, RelFileLocator, SegmentName, SegmentSize, Writer,
};

fn size() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

fn golden(major: PgMajor) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("golden/wal/{major}"))
}

fn unpack(path: &std::path::Path) -> Vec<u8> {
    zstd::decode_all(fs::File::open(path).unwrap()).unwrap()
}

fn segments(major: PgMajor) -> Vec<(SegmentName, Vec<u8>)> {
    let entries = fs::read_dir(golden(major)).unwrap().map(|e| e.unwrap().path());
    let named = entries.filter_map(|path| Some((path.file_stem()?.to_str()?.parse().ok()?, path)));
    let mut segments: Vec<_> = named.map(|(name, path)| (name, unpack(&path))).collect();
    segments.sort_by_key(|(name, _)| *name);
    segments
}

/// Scans every segment as push does.
fn scans(major: PgMajor) -> Vec<Scan> {
    let segments = segments(major);
    let mut scans: Vec<Scan> = Vec::new();
    for (i, (name, bytes)) in segments.iter().enumerate() {
        let previous = i.checked_sub(1).map(|i| Previous {
            name: segments[i].0,
            log: PreviousLog::Tail(scans[i].tail.clone().unwrap()),
        });
        let next = segments.get(i + 1).map(|(_, bytes)| bytes.as_slice());
        let context = ScanContext { major: Some(major), previous, next, ..ScanContext::new(*name, size()) };
        let scan = scan_segment(bytes, &context).unwrap_or_else(|e| panic!("{major} {name}: {e}"));
        assert!(scan.index.faults.is_empty(), "{major} {name}: {:?}", scan.index.faults);
        scans.push(scan);
    }
    scans
}

#[test]
fn every_major_is_read_as_its_own_server_reads_it() {
    for (major, _) in PgMajor::ALL.into_iter().filter(|(major, _)| *major >= PgMajor::V15) {
        let text = String::from_utf8(unpack(&golden(major).join("records.zst"))).unwrap();
        let mut theirs = text.lines();
        let first: Lsn = text.split(' ').next().unwrap().parse().unwrap();
        let (mut tail, mut compared) = (None, 0);
        for (name, bytes) in segments(major) {
            let span = SegmentSpan::containing(name.start(size()).unwrap(), size()).unwrap();
            let mut stream = RecordStream::new(&bytes, span, Expected::default(), tail).unwrap();
            while let Next::Record(r) = stream.next_record().unwrap() {
                if r.start < first {
                    continue;
                }
                // The segment switch came after they looked.
                let Some(theirs) = theirs.next() else { break };
                let (total, images) = (r.header.total_bytes, r.image_bytes());
                let ours = format!(
                    "{} {} {} {} {} {total} {images}",
                    r.start,
                    r.end,
                    r.header.prev,
                    r.header.xid,
                    r.rmgr()
                );
                assert_eq!(ours, theirs, "{major}");
                compared += 1;
            }
            tail = stream.into_tail();
        }
        assert_eq!(theirs.next(), None, "{major}");
        assert!(compared > 200, "{major}: {compared}");
    }
}

#[test]
fn every_majors_segments_are_admitted_and_their_index_tells_what_was_done() {
    for (major, _) in PgMajor::ALL {
        let scans = scans(major);
        let all = || scans.iter().map(|scan| &scan.index);
        assert!(scans.len() >= 2, "{major}");
        for (i, scan) in scans.iter().enumerate() {
            let last = i + 1 == scans.len();
            assert_eq!(scan.index.info.ending, if last { Ending::Switch } else { Ending::Full }, "{major}");
            assert_eq!(scan.index.info.head_joined, i > 0, "{major}");
            assert_eq!(scan.index.info.pending.map(|p| p.joined), (!last).then_some(true), "{major}");
        }
        let points: Vec<_> = all().flat_map(|i| &i.restore_points).map(|p| p.name.as_str()).collect();
        assert_eq!(points, ["start", "golden point"], "{major}");
        assert!(all().any(|i| !i.checkpoints.is_empty()) && all().any(|i| !i.running_xacts.is_empty()));

        let of = |kind: CommitKind| all().flat_map(|i| &i.xacts).filter(move |x| x.kind == kind);
        assert!(of(CommitKind::Commit).any(|x| x.subxacts.len() == 2), "{major}");
        assert!(of(CommitKind::Commit).any(|x| x.dropped.len() == 2), "{major}: a table and its index");
        assert!(of(CommitKind::Commit).all(|x| x.time.to_string().starts_with("202")), "{major}");
        assert!(of(CommitKind::Commit).any(|x| x.db_oid.is_some()), "{major}");
        assert_eq!(of(CommitKind::Abort).count(), 1, "{major}");
        let gids = |kind| of(kind).map(|x| x.gid.clone().unwrap()).collect::<Vec<_>>();
        assert_eq!(gids(CommitKind::Prepare), ["golden gid", "undone gid"], "{major}");
        assert_eq!(gids(CommitKind::CommitPrepared), ["golden gid"], "{major}");
        assert_eq!(gids(CommitKind::AbortPrepared), ["undone gid"], "{major}");
        let prepared: Vec<_> = of(CommitKind::Prepare).map(|x| x.xid).collect();
        let ended: Vec<_> =
            of(CommitKind::CommitPrepared).chain(of(CommitKind::AbortPrepared)).map(|x| x.xid).collect();
        assert_eq!(prepared, ended, "{major}");
        assert_eq!(of(CommitKind::AbortPrepared).next().unwrap().dropped.len(), 1, "{major}");

        let files = || all().flat_map(|i| &i.file_events).map(|e| &e.kind);
        assert!(
            files().any(|k| matches!(k, FileEventKind::Create { fork: ForkNumber::Main, .. })),
            "{major}"
        );
        assert!(files().any(|k| matches!(k, FileEventKind::DatabaseCopy { .. })), "{major}");
        assert!(files().any(|k| matches!(k, FileEventKind::DatabaseDrop { .. })), "{major}");
        let has_vm =
            |i: &SegmentIndex| i.blocks.iter().any(|f| f.fork == ForkNumber::Vm && !f.blocks.is_empty());
        assert!(all().any(has_vm), "{major}");
    }
}

#[test]
fn every_majors_images_and_messages_are_understood() {
    for (major, _) in PgMajor::ALL {
        let (mut tail, mut compressed, mut redo, mut toplevel, mut vm_changes) = (None, 0, false, false, 0);
        for (name, bytes) in segments(major) {
            let span = SegmentSpan::containing(name.start(size()).unwrap(), size()).unwrap();
            let mut stream = RecordStream::new(&bytes, span, Expected::default(), tail).unwrap();
            while let Next::Record(r) = stream.next_record().unwrap() {
                for image in r.blocks().filter_map(|b| b.image) {
                    let mut page = [0xEE; BLOCK_BYTES];
                    image.restore(&mut page).unwrap();
                    assert_eq!(&page[18..20], [0x04, 0x20], "{major} {}", r.start);
                    assert!(image.apply(), "{major} {}", r.start);
                    compressed += u32::from(image.compression() == Compression::Pglz);
                }
                toplevel |= r.toplevel_xid().is_some();
                vm_changes += waltide_format::engines::postgres::wal::implicit_vm_blocks(&r).count();
                if let Some(xlog) = XlogRecord::decode(&r) {
                    redo |= matches!(xlog.unwrap(), XlogRecord::CheckpointRedo { wal_level: 2 });
                }
                if let Some(prepare) = Prepare::decode(&r) {
                    let prepare = prepare.unwrap();
                    assert_eq!(usize::from(prepare.gid == "golden gid"), prepare.subxacts.len(), "{major}");
                    assert_eq!(prepare.dropped_on_abort.len(), 1, "{major}");
                }
                if r.rmgr() == Rmgr::LOGICALMSG && r.header.total_bytes > 1 << 20 {
                    assert!(r.main_data().ends_with(b"over two edges "), "{major}");
                }
            }
            tail = stream.into_tail();
        }
        assert!(compressed > 5, "{major}: {compressed}");
        assert_eq!(redo, major >= PgMajor::V17, "{major}");
        assert_eq!(toplevel, major >= PgMajor::V14, "{major}");
        assert!(vm_changes > 0, "{major}");
    }
}

#[test]
fn every_majors_rows_are_told() {
    for (major, _) in PgMajor::ALL {
        let (mut all, mut tail, mut records) = (SegmentDetail::default(), None, 0);
        for ((name, bytes), scan) in segments(major).iter().zip(scans(major)) {
            let span = SegmentSpan::containing(name.start(size()).unwrap(), size()).unwrap();
            let told = tell_segment(bytes, span, Expected::default(), tail, Lsn::MAX);
            assert_eq!(told.damage, None, "{major}");
            tail = told.tail;
            all.add(told.detail);
            records += scan.index.info.records;
        }
        assert_eq!(all.unread_records, 0, "{major}");
        let counted = all.work.iter().map(|w| w.volume.records).sum::<u64>() + all.unowned.records;
        assert_eq!(counted, records, "{major}: every record counts once");
        let mut relations: BTreeMap<_, RelationWork> = BTreeMap::new();
        for done in all.work.iter().flat_map(|w| &w.relations).filter(|r| r.relation.rel_number >= 16384) {
            relations
                .entry(done.relation)
                .or_insert(RelationWork { relation: done.relation, ..RelationWork::default() })
                .add(done);
        }
        // What make.sh does to `t`: before its TRUNCATE, and after it in another file.
        let rows: Vec<_> = relations
            .values()
            .filter(|r| r.has_rows())
            .map(|r| [r.rows_inserted(), r.updated, r.hot, r.deleted])
            .collect();
        assert_eq!(rows, [[34, 2, 2, 1], [30, 0, 0, 0]], "{major}: {relations:?}");
        let old = relations.values().find(|r| r.has_rows()).unwrap().relation;
        let [truncate] = all.truncates[..] else { panic!("{major}: {:?}", all.truncates) };
        assert_eq!((truncate.db_oid, truncate.rel_oid), (old.db_oid, old.rel_number), "{major}");
        assert!(all.locks.iter().any(|l| (l.xid, l.rel_oid) == (truncate.xid, truncate.rel_oid)), "{major}");
        assert_eq!(all.parents.len() >= 3, major >= PgMajor::V14, "{major}: {:?}", all.parents);
    }
}

#[test]
fn every_majors_control_file_is_read() {
    for (major, _) in PgMajor::ALL {
        let control = ControlFile::decode(&unpack(&golden(major).join("pg_control.zst"))).unwrap();
        assert_eq!((control.major, control.state), (major, ClusterState::ShutDown));
        assert_eq!((control.segment_size, control.has_data_checksums()), (size(), true));
        assert_eq!(
            (control.block_bytes, control.wal_block_bytes, control.relation_file_blocks),
            (8192, 8192, 131_072)
        );
        assert_eq!((control.settings.wal_level, control.settings.max_prepared_xacts), (2, 10));
        assert!(control.settings.track_commit_timestamp && control.checkpoint_copy.full_page_writes);
        let first = &segments(major)[0];
        let span = SegmentSpan::containing(first.0.start(size()).unwrap(), size()).unwrap();
        let stream = RecordStream::new(&first.1, span, Expected::default(), None).unwrap();
        assert_eq!(stream.first_page().long.unwrap().system_id, control.system_id);
        assert!(control.checkpoint > span.end());
    }
}

#[test]
fn a_changed_byte_in_any_record_of_a_real_segment_is_refused() {
    for (major, _) in PgMajor::ALL {
        let (name, bytes) = segments(major).remove(0);
        let context = ScanContext { major: Some(major), ..ScanContext::new(name, size()) };
        let whole = scan_segment(&bytes, &context).unwrap();
        let pending = whole.index.info.pending.unwrap();
        let used = pending.start.bytes_since(name.start(size()).unwrap()) as usize;
        let (mut noticed, mut tried) = (0, 0);
        for at in (0..used).step_by(used / 300) {
            let mut changed = bytes.clone();
            changed[at] ^= 0x04;
            tried += 1;
            // Padding between records and in page headers is in no checksum.
            noticed += u32::from(scan_segment(&changed, &context).is_err());
            if bytes[at] != 0 {
                assert!(scan_segment(&changed, &context).is_err(), "{major} byte {at}");
            }
        }
        assert!(noticed * 100 >= tried * 95, "{major}: {noticed} of {tried}");
    }
}

#[test]
fn a_packed_record_says_the_same_of_its_block() {
    let (mut records, mut whole, mut packed) = (0, 0, 0);
    for (major, _) in PgMajor::ALL {
        for (name, bytes) in segments(major) {
            let span = SegmentSpan::containing(name.start(size()).unwrap(), size()).unwrap();
            let mut stream = RecordStream::new(&bytes, span, Expected::default(), None).unwrap();
            let mut blocks = Vec::new();
            while let Next::Record(record) = stream.next_record().unwrap() {
                for own in record.blocks().map(Some).chain([None]) {
                    let (id, block) = (own.map(|b| b.id), own.map_or(0, |b| b.block));
                    let relation =
                        own.map_or(RelFileLocator { spc_oid: 0, db_oid: 0, rel_number: 0 }, |b| b.relation);
                    let mut w = Writer::new();
                    record.pack(id, relation, &mut w);
                    let of = PackedFor {
                        start: record.start,
                        end: record.end,
                        xid: record.header.xid,
                        relation,
                        block,
                    };
                    let less = Record::unpack(w.as_bytes(), of, major, &mut blocks);
                    let less = less.unwrap_or_else(|e| panic!("{major} {}: {e}", record.start));
                    assert_eq!(less.main_data(), record.main_data(), "{major} {}", record.start);
                    assert_eq!(
                        (less.start, less.end, less.header.xid),
                        (record.start, record.end, record.header.xid)
                    );
                    assert_eq!((less.rmgr(), less.header.info), (record.rmgr(), record.header.info));
                    assert_eq!(
                        (less.origin(), less.toplevel_xid()),
                        (record.origin(), record.toplevel_xid())
                    );
                    for (one, other) in less.blocks().zip(record.blocks()) {
                        let other = if Some(other.id) == id {
                            other
                        } else {
                            Block { image: None, data: &[], ..other }
                        };
                        assert_eq!(one, other, "{major} {}", record.start);
                    }
                    assert_eq!(less.blocks().len(), record.blocks().len());
                    if record.blocks().len() == 1 && own.is_some_and(|b| b.image.is_none()) {
                        (records, whole, packed) =
                            (records + 1, whole + record.bytes().len(), packed + w.len());
                    }
                }
            }
        }
    }
    // A header and the relation are what most records are made of.
    assert!(records > 1000 && whole - packed > records * 30, "{records} {whole} {packed}");
}
