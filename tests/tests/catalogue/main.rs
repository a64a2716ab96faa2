//! What an archive is said to hold, whether it is whole, and what may go: over small archives made in process, and
//! once over a real cluster's.

#[allow(dead_code)] // what only other tests use
mod sample;

use std::time::Duration;

use sample::{Sample, hour, later, segment_name};
use waltide_archiver::catalog::load;
use waltide_archiver::prune::{Pruning, keep};
use waltide_archiver::retention::Policy;
use waltide_format::archive::{Envelope, Keep, Layout, LedgerRecord, ObjectKind, SystemInfo};
use waltide_format::{BackupId, WalFileName};
use waltide_replay::{FaultKind, Verify};
use waltide_storage::{Archive, CatalogueCache, Faults, NoProgress};
use waltide_tests::{Cluster, Scratch, Waltide};

#[tokio::test]
async fn the_catalogue_is_the_same_with_a_cache_without_one_and_after_the_cache_is_lost_or_damaged() {
    let sample = Sample::new().await;
    let plain = sample.catalog().await;
    assert_eq!((plain.segments.len(), plain.backups.len(), plain.started.len()), (6, 2, 1));
    assert_eq!((plain.lineages.len(), plain.backups[0].files), (1, 1));
    assert_eq!((plain.gaps(), &plain.damaged), (vec![], &vec![]));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("catalogue.redb");
    for round in 0..4 {
        match round {
            2 => std::fs::remove_file(&path).unwrap(),
            3 => std::fs::write(&path, b"not redb").unwrap(),
            _ => {}
        }
        let cache = CatalogueCache::open(&path);
        let loaded = load(&sample.archive, &sample.layout, None, Some(&cache), 2).await.unwrap();
        assert_eq!(loaded, plain, "round {round}");
    }
}

#[tokio::test]
async fn with_a_cache_nothing_is_read_twice() {
    let sample = Sample::new().await;
    let dir = tempfile::tempdir().unwrap();
    let cache = CatalogueCache::open(&dir.path().join("catalogue.redb"));
    load(&sample.archive, &sample.layout, None, Some(&cache), 2).await.unwrap();
    let faults = Faults::none();
    let counted = sample.archive.with_faults(faults.clone());
    load(&counted, &sample.layout, None, Some(&cache), 2).await.unwrap();
    assert_eq!(faults.calls(), 4, "the cluster's systems, system.json, and two listings");
}

#[tokio::test]
async fn a_damaged_object_is_named_and_the_rest_is_there() {
    let sample = Sample::new().await;
    for (path, bytes) in sample.objects().await {
        let mut bad = bytes.clone();
        let at = bad.len() - 40;
        bad[at] ^= 1;
        sample.replace(&path, bad).await;
        match load(&sample.archive, &sample.layout, None, None, 2).await {
            Err(e) => assert!(path.ends_with("system.json") && e.is_damage(), "{path}: {e}"),
            Ok(catalog) => {
                let named: Vec<_> = catalog.damaged.iter().map(|d| d.path.as_str()).collect();
                let outside = ["/chunks/", "cluster.json", "waltide.json", ".backup"];
                let expected = if outside.iter().any(|o| path.contains(o)) && !path.contains("/backups/") {
                    vec![]
                } else {
                    vec![path.as_str()]
                };
                assert_eq!(named, expected);
            }
        }
        sample.replace(&path, bytes).await;
    }
}

#[tokio::test]
async fn a_segment_under_another_name_is_damaged() {
    let sample = Sample::new().await;
    let names = sample.names();
    let path = |number| names.wal_file(WalFileName::Segment(segment_name(1, number)));
    let stored = sample.archive.get(&path(3), 1 << 30).await.unwrap();
    sample.archive.put_new(&path(99), stored).await.unwrap();
    let damaged = sample.catalog().await.damaged;
    assert_eq!(damaged.len(), 1);
    assert_eq!(damaged[0].path, path(99));
    let expected = "its index speaks of 000000010000000000000003, expected 000000010000000000000063";
    assert_eq!(damaged[0].error, expected);
}

#[tokio::test]
async fn a_segment_in_flight_is_no_hole() {
    let sample = Sample::new().await;
    let path = sample.names().wal_file(WalFileName::Segment(segment_name(1, 5)));
    let bytes = sample.archive.get(&path, 1 << 30).await.unwrap();
    sample.archive.delete(&path).await.unwrap();
    assert_eq!(sample.catalog().await.gaps().len(), 1);
    let load = waltide_archiver::catalog::load_settled(&sample.archive, &sample.layout, None, None, 2);
    // It comes while the first look is being thought over.
    let (settled, ()) = tokio::join!(load, sample.put(&path, bytes.to_vec()));
    assert_eq!(settled.unwrap().gaps(), []);
}

#[tokio::test]
async fn the_newest_system_is_meant_unless_another_is_asked_for() {
    let sample = Sample::new().await;
    let newer = SystemInfo { system_id: 41.into(), created: hour(1000), ..sample.catalog().await.system };
    let path = sample.layout.system(41.into()).system_json();
    sample.put(&path, Envelope::seal_json(ObjectKind::Json, &newer)).await;
    let system = |system| load(&sample.archive, &sample.layout, system, None, 1);
    assert_eq!(system(None).await.unwrap().system, newer);
    assert_eq!(system(Some(42.into())).await.unwrap().segments.len(), 6);
    let error = system(Some(43.into())).await.unwrap_err();
    assert_eq!(error.to_string(), "cluster main has no system 43; it has 41, 42");
    let other = Layout::new("other").unwrap();
    let error = load(&sample.archive, &other, None, None, 1).await.unwrap_err();
    assert_eq!(error.to_string(), "the archive memory has no cluster other; it has main");
}

#[tokio::test]
async fn a_whole_archive_is_verified_without_a_fault_and_the_ledger_says_so() {
    let sample = Sample::new().await;
    let found = sample.verify(false).await;
    assert_eq!(found.faults, []);
    assert_eq!((found.segments, found.records, found.backups, found.frames), (6, 12, 2, 2));
    assert!(found.complete && found.notes.len() == 1, "{:?}", found.notes);
    assert!(sample.archive.head(&found.ledger.unwrap()).await.unwrap().is_some());
    assert_eq!(sample.verify(true).await.faults, []);
}

#[tokio::test]
async fn whatever_is_missing_is_missed() {
    let sample = Sample::new().await;
    for (path, bytes) in sample.objects().await {
        // Without these nothing refers to anything that is not there.
        let unmissed = path.ends_with(".started") || path.ends_with(".backup") || path.contains("abcd");
        if unmissed || path.ends_with("system.json") {
            continue;
        }
        // A manifest's own absence cannot be known, nor that of a segment at either end or of a timeline's history.
        let unknown = path.contains("/backups/") || path.ends_with("/000000010000000000000003");
        let ends = path.ends_with("/000000010000000000000007") || path.contains("00000002");
        if unknown || ends {
            continue;
        }
        sample.archive.delete(&path).await.unwrap();
        for quick in [false, true] {
            let found = sample.verify(quick).await;
            assert!(
                found.faults.iter().any(|f| f.object == path),
                "{path}, quick {quick}: {:?}",
                found.faults
            );
            assert!(found.faults.iter().all(|f| f.kind != FaultKind::Damaged), "{:?}", found.faults);
        }
        sample.put(&path, bytes).await;
    }
    assert_eq!(sample.verify(false).await.faults, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_byte_of_every_kind_of_object_that_is_changed_is_noticed() {
    let sample = Sample::small().await;
    assert_eq!(sample.verify(false).await.faults, []);
    let mut flipped = 0;
    for (path, bytes) in sample.objects().await {
        assert!(bytes.len() < 64 << 10, "{path} has {} bytes", bytes.len());
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << (at % 8);
            sample.replace(&path, bad).await;
            match load(&sample.archive, &sample.layout, None, None, 2).await {
                Err(e) => assert!(e.is_damage() && path.ends_with("system.json"), "{path} byte {at}: {e}"),
                Ok(catalog) => {
                    let found = sample.verify_catalog(&catalog, false).await;
                    let named = found.faults.iter().any(|f| f.object == path && f.kind == FaultKind::Damaged);
                    assert!(named, "{path} byte {at}: {:?}", found.faults);
                }
            }
            flipped += 1;
        }
        sample.replace(&path, bytes).await;
    }
    assert!(flipped > 2000, "{flipped}");
    assert_eq!(sample.verify(false).await.faults, []);
}

#[tokio::test]
async fn an_index_that_says_something_else_than_its_records_is_a_fault() {
    use waltide_format::archive::{StoredSegment, encode_segment};
    let sample = Sample::new().await;
    let path = sample.names().wal_file(WalFileName::Segment(segment_name(1, 5)));
    let stored = StoredSegment::decode(&sample.archive.get(&path, 1 << 30).await.unwrap()).unwrap();
    let mut index = stored.index.clone();
    index.xacts[0].xid = 1.into();
    sample.replace(&path, encode_segment(&stored.wal, &index, 1, 1)).await;
    let found = sample.verify(false).await;
    let texts: Vec<_> = found.faults.iter().map(|f| (f.object.as_str(), f.text.as_str())).collect();
    assert_eq!(texts, [(path.as_str(), "its index is not what its records say: xacts differs")]);
}

#[tokio::test]
async fn what_was_never_verified_comes_first() {
    let sample = Sample::new().await;
    let catalog = sample.catalog().await;
    let run = async |time_allowed, at| {
        let verify = Verify { time_allowed, threads: 1, ..sample.whole(&catalog) };
        verify.run(at).await.unwrap()
    };
    assert!(!run(Some(Duration::ZERO), hour(100)).await.complete, "no time, nothing done");
    let path = run(None, hour(101)).await.ledger.unwrap();
    sample.put_backup(5, 5).await;
    let catalog = sample.catalog().await;
    let verify = Verify { threads: 1, ..sample.whole(&catalog) };
    let ledger = verify.run(hour(102)).await.unwrap().ledger.unwrap();
    assert_ne!(path, ledger);
    let bytes = sample.archive.get(&ledger, 1 << 20).await.unwrap();
    let record: LedgerRecord = Envelope::open_json(&bytes, ObjectKind::Json).unwrap();
    let new = format!("backup/{}", BackupId::new(hour(5), 5));
    assert_eq!((record.units.len(), record.units[0].name.as_str()), (6, new.as_str()));
}

#[tokio::test]
async fn every_verification_of_one_second_has_a_record_of_its_own() {
    let sample = Sample::new().await;
    let catalog = sample.catalog().await;
    let mut paths = Vec::new();
    for n in 0..3 {
        let verify = Verify { quick: n == 1, ..sample.whole(&catalog) };
        let found = verify.run(hour(100)).await.unwrap();
        let path = found.ledger.unwrap();
        let bytes = sample.archive.get(&path, 1 << 20).await.unwrap();
        let record: LedgerRecord = Envelope::open_json(&bytes, ObjectKind::Json).unwrap();
        assert_eq!(record.quick, n == 1, "{path} is another's");
        assert!(path.ends_with(&format!("/{}", record.id)), "{path} calls itself {}", record.id);
        assert!(!paths.contains(&path), "{path} is there twice");
        paths.push(path);
    }
    let mut listed: Vec<_> =
        sample.archive.list(&sample.names().ledger()).await.unwrap().into_iter().map(|o| o.path).collect();
    listed.sort();
    paths.sort();
    assert_eq!(listed, paths);
}

#[tokio::test]
async fn the_ledger_forgets_what_was_looked_at_again() {
    let sample = Sample::new().await;
    let catalog = sample.catalog().await;
    for n in 0..40 {
        let verify = Verify { quick: n % 3 != 0, threads: 1, ..sample.whole(&catalog) };
        let found = verify.run(hour(100 + n)).await.unwrap();
        assert_eq!(found.faults, []);
        let records = sample.archive.list(&sample.names().ledger()).await.unwrap();
        assert_eq!(records.len() as u64, (n + 1).min(32));
        assert!(records.iter().any(|r| Some(&r.path) == found.ledger.as_ref()));
    }
}

fn pruning<'a>(archive: &'a Archive, layout: &'a Layout) -> Pruning<'a> {
    Pruning { archive, layout, system: None, cache: None, threads: 2 }
}

fn last(count: u32) -> Policy {
    Policy { count: Some(count), ..Policy::default() }
}

async fn prune(
    archive: &Archive,
    layout: &Layout,
    policy: &Policy,
) -> Result<u64, waltide_archiver::prune::PruneError> {
    let pruning = pruning(archive, layout);
    let plan = pruning.plan(policy, later()).await?;
    Ok(pruning.carry_out(&plan, policy, Duration::ZERO, &NoProgress).await?.deleted)
}

#[tokio::test]
async fn a_prune_removes_what_no_rule_keeps_and_the_leftovers_and_nothing_else() {
    let sample = Sample::new().await;
    let before: Vec<String> = sample.objects().await.into_iter().map(|(path, _)| path).collect();
    prune(&sample.archive, &sample.layout, &last(1)).await.unwrap();
    let after: Vec<String> = sample.objects().await.into_iter().map(|(path, _)| path).collect();
    let mut gone: Vec<&str> =
        before.iter().filter(|p| !after.contains(p)).map(|p| p.rsplit('/').next().unwrap()).collect();
    gone.sort_unstable();
    let (old, given_up) = (BackupId::new(hour(4), 4), BackupId::new(hour(7), 0xabcd));
    let mut expected = vec![
        old.to_string(),
        old.to_string(),
        format!("{old}-0"),
        format!("{given_up}.started"),
        format!("{given_up}-0"),
        "000000010000000000000004.00000028.backup".to_owned(),
    ];
    expected.extend((3..6).map(|n| segment_name(1, n).to_string()));
    expected.sort_unstable();
    assert_eq!(gone, expected);
    assert_eq!(sample.verify(false).await.faults, []);
    assert_eq!(prune(&sample.archive, &sample.layout, &last(1)).await.unwrap(), 0, "nothing is left to do");
}

#[tokio::test]
async fn a_prune_that_is_stopped_at_any_call_leaves_every_backup_whole_and_the_next_one_finishes() {
    for faults in [Faults::fail_call, Faults::lose_ack, Faults::down_from] {
        for n in 1.. {
            let sample = Sample::new().await;
            let armed = faults(n);
            let outcome = prune(&sample.archive.with_faults(armed.clone()), &sample.layout, &last(1)).await;
            if !armed.fired() {
                outcome.unwrap();
                assert!(n > 20, "{n}");
                break;
            }
            let catalog = sample.catalog().await;
            assert!(catalog.damaged.is_empty());
            assert!(catalog.backup(&BackupId::new(hour(6), 6)).is_some(), "call {n}");
            let found = sample.verify_catalog(&catalog, false).await;
            assert_eq!(found.faults, [], "{armed:?}");
            prune(&sample.archive, &sample.layout, &last(1)).await.unwrap();
            let catalog = sample.catalog().await;
            assert_eq!(
                (catalog.backups.len(), catalog.started.len(), catalog.segments.len()),
                (1, 0, 3),
                "{armed:?}"
            );
            assert_eq!(sample.archive.list(&sample.names().packs()).await.unwrap().len(), 1, "{armed:?}");
            assert_eq!(sample.verify_catalog(&catalog, false).await.faults, [], "{armed:?}");
        }
    }
}

/// Two prunes, a backup that becomes complete and a pin, all at once, on real files.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_prunes_a_backup_and_a_pin_at_once_lose_nothing() {
    for round in 0..40 {
        let dir = tempfile::tempdir().unwrap();
        let archive = Archive::create(&dir.path().to_str().unwrap().parse().unwrap()).await.unwrap();
        let sample = std::sync::Arc::new(Sample::on(archive).await);
        let (old, new) = (BackupId::new(hour(4), 4), BackupId::new(hour(7), 7));
        let prune_with = |policy: Policy| {
            let sample = std::sync::Arc::clone(&sample);
            tokio::spawn(async move { prune(&sample.archive, &sample.layout, &policy).await })
        };
        // A prune's clock is ten days ahead, so that only what was announced long ago counts as given up.
        let patient = Policy { give_up_after: Duration::from_secs(20 * 86_400), ..last(1) };
        let backup = tokio::spawn({
            let (sample, id) = (std::sync::Arc::clone(&sample), new.clone());
            async move {
                sample.put_announcement(&id, 7).await;
                let (map, pack, files) = sample.files(&id, 9);
                sample.put(&sample.names().pack(&format!("{id}-0")), pack).await;
                sample.put(&sample.names().map(id.as_str()), map).await;
                sample.put(&sample.names().manifest(&id), sample.manifest(&id, 7, 7, files).encode()).await;
                sample.archive.delete(&sample.names().started(&id)).await.unwrap();
            }
        });
        let pin = tokio::spawn({
            let (sample, id) = (std::sync::Arc::clone(&sample), old.clone());
            async move {
                let catalog = sample.catalog().await;
                let pin = Keep { since: later(), ..Keep::default() };
                keep(&sample.archive, &sample.layout, &catalog, &id, &pin).await
            }
        });
        let (first, second) = (prune_with(patient.clone()), prune_with(Policy { count: Some(2), ..patient }));
        first.await.unwrap().unwrap();
        second.await.unwrap().unwrap();
        backup.await.unwrap();
        let pinned = pin.await.unwrap().is_ok();
        let catalog = sample.catalog().await;
        assert!(catalog.backup(&new).is_some(), "round {round}: the new backup is there");
        if pinned {
            assert!(catalog.backup(&old).is_some_and(|b| b.keep.is_some()), "round {round}: the pin held");
        }
        let found = sample.verify_catalog(&catalog, false).await;
        assert_eq!(found.faults, [], "round {round}, pinned {pinned}");
    }
}

#[test]
fn a_deleted_segment_of_a_real_cluster_is_named_by_status_and_verify() {
    let scratch = Scratch::new("catalogue");
    let archive = scratch.dir("archive");
    let waltide =
        Waltide::new(&scratch).archive(&archive).cluster("main").env("XDG_CACHE_HOME", scratch.dir("cache"));
    let mut cluster = Cluster::builder("db")
        .scratch(&scratch)
        .segment_mb(1)
        .archive_command(&waltide.archive_command())
        .create();
    let data_dir = cluster.data_dir().to_str().unwrap().to_owned();
    waltide.ok(["init", "--data-dir", &data_dir]);
    cluster.start();
    let none = waltide.json_with_status(1, ["status"]);
    assert_eq!(none["alerts"][0]["text"], "there is no backup; make one with `waltide backup`");
    let backup = |more: &str| waltide.json(["backup", "--data-dir", &data_dir, "--description", more]);
    let first = backup("the first");
    cluster.query("create table t as select generate_series(1, 100000) n");
    for _ in 0..3 {
        cluster.query("update t set n = n + 1 where n % 100 = 0");
        cluster.switch_wal();
    }
    for n in 1..=3 {
        cluster.query(&format!("insert into t values ({n})"));
        cluster.archive_all();
    }

    let status = waltide.json(["status"]);
    assert_eq!((&status["health"], status["windows"].as_array().unwrap().len()), (&"ok".into(), 1));
    waltide.fails(1, ["status", "--max-age", "0"]);
    let list = waltide.json(["list"]);
    assert_eq!((&list[0]["id"], &list[0]["description"]), (&first["id"], &"the first".into()));
    assert!(waltide.ok(["list"]).stdout.contains("the first"));
    assert_eq!(waltide.json(["info"])["manifest"]["id"], first["id"]);
    assert!(waltide.ok(["info", "latest"]).stdout.contains("reaches"));
    let whole = waltide.json(["verify"]);
    assert_eq!(whole["faults"], serde_json::json!([]));
    assert!(whole["records"].as_u64().unwrap() > 1000);
    assert_eq!(waltide.json(["verify", "--quick"])["faults"], serde_json::json!([]));
    assert_eq!(waltide.json(["verify", "latest"])["faults"], serde_json::json!([]));

    // The segment in the middle of the window goes.
    let segments: Vec<_> =
        walk(&archive).into_iter().filter(|p| p.file_name().unwrap().len() == 24).collect();
    let lost = segments[segments.len() - 3].clone();
    let name = lost.file_name().unwrap().to_str().unwrap().to_owned();
    let bytes = std::fs::read(&lost).unwrap();
    std::fs::remove_file(&lost).unwrap();
    let status = waltide.json_with_status(3, ["status"]);
    assert_eq!(status["holes"][0]["harms"][0], first["id"]);
    // What is archived behind the hole is not what a restore brings back.
    let seconds = |field: &str| status["wal"][field].as_f64().unwrap();
    assert!(seconds("recoverable_lag_seconds") > seconds("lag_seconds"), "{status}");
    assert_eq!(status["wal"]["recoverable_to"], status["windows"][0]["to"]);
    assert!(status["alerts"][0]["text"].as_str().unwrap().contains(&format!("{name} is missing")));
    for args in [&["verify"][..], &["verify", "--quick"]] {
        let found = waltide.json_with_status(3, args);
        assert!(found["faults"][0]["object"].as_str().unwrap().ends_with(&name), "{found}");
        assert_eq!(found["faults"][0]["kind"], "gap");
    }
    waltide.ok(["verify", first["id"].as_str().unwrap()]);
    std::fs::write(&lost, &bytes).unwrap();
    std::os::unix::fs::chown(&lost, Some(postgres_uid(&archive)), None).unwrap();
    waltide.ok(["status"]);

    // A later backup lets the first one and its WAL go; a pin holds it.
    let second = backup("the second");
    let id = first["id"].as_str().unwrap();
    waltide.ok(["keep", id, "--reason", "audit"]);
    let kept = waltide.json(["prune", "--keep-count", "1", "--grace", "0"]);
    assert_eq!(kept["lost"], serde_json::json!([]));
    assert_eq!(waltide.json(["list"]).as_array().unwrap().len(), 2);
    waltide.ok(["keep", id, "--release"]);
    let planned = waltide.json(["prune", "--keep-count", "1", "--dry-run"]);
    assert!(planned["deletions"].as_array().unwrap().len() > 3 && planned["deleted"] == 0);
    assert_eq!(waltide.json(["list"]).as_array().unwrap().len(), 2);
    let done = waltide.json(["prune", "--keep-count", "1", "--grace", "0"]);
    assert_eq!(done["deleted"].as_u64().unwrap() as usize, planned["deletions"].as_array().unwrap().len());
    let left = waltide.json(["list"]);
    assert_eq!((left.as_array().unwrap().len(), &left[0]["id"]), (1, &second["id"]));
    waltide.ok(["verify"]);
    waltide.ok(["status"]);

    // Where the archive says nothing of the system, nothing is removed, and it is to blame.
    let system = walk(&archive).into_iter().find(|p| p.ends_with("system.json")).unwrap();
    let mut bytes = std::fs::read(&system).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&system, bytes).unwrap();
    for args in [&["prune"][..], &["prune", "--dry-run"], &["list"], &["verify"]] {
        let told = waltide.fails(3, args).stderr;
        assert!(told.contains("system.json is damaged"), "{told}");
    }
}

#[test]
fn a_life_with_crashes_and_promotions_is_whole_in_the_eyes_of_status_and_verify() {
    let scratch = Scratch::new("catalogue-life");
    let archive = scratch.dir("archive");
    let waltide =
        Waltide::new(&scratch).archive(&archive).cluster("main").env("XDG_CACHE_HOME", scratch.dir("cache"));
    let mut primary = Cluster::builder("db")
        .scratch(&scratch)
        .segment_mb(1)
        .archive_command(&waltide.archive_command())
        .create();
    let backup = |cluster: &Cluster| {
        waltide.json(["backup", "--data-dir", cluster.data_dir().to_str().unwrap()])["id"].clone()
    };
    waltide.ok(["init", "--data-dir", primary.data_dir().to_str().unwrap()]);
    primary.start();
    primary.pgbench_init(2);
    let first = backup(&primary);
    for _ in 0..2 {
        let _load = primary.pgbench_background(&["-c", "2", "-T", "600"]);
        primary.archive_all();
        primary.kill9();
        primary.start();
    }
    let mut standby = primary.make_standby("standby");
    standby.set("archive_mode", "on");
    standby.restart();
    let load = primary.pgbench_background(&["-c", "2", "-T", "600"]);
    primary.archive_all();
    load.kill9();
    standby.wait_caught_up(&primary);
    standby.promote();
    standby.pgbench(&["-c", "2", "-t", "500"]);
    primary.archive_all();
    let second = backup(&standby);
    standby.archive_all();

    let status = waltide.json(["status"]);
    assert_eq!(status["holes"], serde_json::json!([]));
    let windows: Vec<_> =
        status["windows"].as_array().unwrap().iter().map(|w| (&w["timeline"], &w["backups"])).collect();
    let both = serde_json::json!([first, second]);
    let only_first = serde_json::json!([first]);
    assert_eq!(windows, [(&1.into(), &only_first), (&2.into(), &both)]);
    let found = waltide.json(["verify"]);
    assert_eq!(found["faults"], serde_json::json!([]));
    assert!(found["segments"].as_u64().unwrap() > 20, "{found}");

    // Timeline 1 received WAL just now, so its base stays; on its own the first backup would go.
    let planned = waltide.json(["prune", "--keep-count", "1", "--dry-run"]);
    let kept: Vec<_> =
        planned["backups"].as_array().unwrap().iter().map(|v| (&v["id"], &v["keep"])).collect();
    assert_eq!(kept, [(&second, &true.into()), (&first, &true.into())]);
    waltide.json(["prune", "--keep-count", "1", "--grace", "0"]);
    waltide.ok(["status"]);
    assert_eq!(waltide.json(["verify"])["faults"], serde_json::json!([]));
}

/// Every file below a directory, sorted.
fn walk(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(walk(&path)) } else { files.push(path) }
    }
    files.sort();
    files
}

fn postgres_uid(of: &std::path::Path) -> u32 {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(of.join("waltide.json")).unwrap().uid()
}
