//! Merged indexes: made, lost, damaged, made again, pruned; and never needed for an answer.

#[allow(dead_code)] // not all of it is used here
#[path = "catalogue/sample.rs"]
mod sample;

use std::sync::Arc;

use object_store::memory::InMemory;
use sample::{SECOND, SIZE, Sample, later, segment_name};
use waltide_archiver::catalog::{Known, load};
use waltide_archiver::merged::{Indexed, MergeError, Merging};
use waltide_archiver::prune::Pruning;
use waltide_archiver::retention::{ObjectRole, Policy, PrunePlan};
use waltide_format::WalFileName;
use waltide_format::archive::{Catalog, ChainHead, MergedObject, Rates};
use waltide_replay::engines::postgres::ArchivedIndexes;
use waltide_replay::{Goal, Target, TargetAction, TargetTimeline, plan};
use waltide_storage::{Archive, Faults, NoProgress};
use waltide_tests::stored::Stored;
use waltide_tests::{Cluster, Scratch, Waltide, poll_until};

/// Segments on timeline 1 that follow one another, and nothing else.
async fn of_segments(numbers: std::ops::Range<u64>) -> Sample {
    let sample = Sample::bare(Archive::from_store(Arc::new(InMemory::new()), "memory")).await;
    let mut previous = ((numbers.start - 1) * SIZE + SECOND, None);
    for number in numbers {
        previous = sample.put_segment(1, 1, number, previous, 700 + number as u32, None).await;
    }
    sample
}

/// Puts another segment in the place of one: valid, continuing the one before and continued by the one behind.
async fn exchange(sample: &Sample, number: u64) {
    sample.archive.delete(&wal(sample, number)).await.unwrap();
    sample.put_segment(1, 1, number, ((number - 1) * SIZE + SECOND, None), 9_999, None).await;
}

async fn try_index(archive: &Archive, sample: &Sample, rebuild: bool) -> Result<Indexed, MergeError> {
    let catalog = seen(sample, Known::Nothing).await;
    let layout = &sample.layout;
    Merging { archive, layout, catalog: &catalog, rebuild, threads: 2, progress: &NoProgress }.run().await
}

async fn index(sample: &Sample) -> Indexed {
    try_index(&sample.archive, sample, false).await.unwrap()
}

async fn seen(sample: &Sample, known: Known<'_>) -> Catalog {
    load(&sample.archive, &sample.layout, None, known, 2).await.unwrap()
}

/// Merged indexes that are there, by name.
async fn stored(sample: &Sample) -> Vec<(String, Vec<u8>)> {
    let objects = sample.objects().await;
    objects.into_iter().filter(|(path, _)| path.starts_with(&sample.names().merged())).collect()
}

fn wal(sample: &Sample, number: u64) -> String {
    sample.names().wal_file(WalFileName::Segment(segment_name(1, number)))
}

/// Later than the last object by the clock of the store, which counts milliseconds.
async fn tick() {
    tokio::time::sleep(std::time::Duration::from_millis(3)).await;
}

#[tokio::test]
async fn every_step_is_made_once_and_says_what_the_segments_say() {
    let sample = of_segments(250..520).await;
    let made = index(&sample).await;
    let steps: Vec<_> = made.made.iter().map(|m| m.segments).collect();
    assert_eq!((steps.iter().filter(|s| **s == 16).count(), steps.len()), (16, 17), "{made:?}");
    assert_eq!((made.present, made.skipped.len()), (0, 0));
    let again = index(&sample).await;
    assert_eq!((again.made.len(), again.present), (0, 17));
    assert_eq!(sample.verify(false).await.faults, []);
    // The same bytes out of the segments alone.
    let before = stored(&sample).await;
    for (path, _) in before.iter().filter(|(path, _)| path.contains("/16/")) {
        sample.archive.delete(path).await.unwrap();
    }
    let (upper, bytes) = before.iter().find(|(path, _)| path.contains("/256/")).unwrap();
    let names = sample.names();
    let name = names.parse_merged(upper).unwrap();
    assert_eq!((name.first, name.last), (segment_name(1, 256), segment_name(1, 511)));
    assert_eq!(MergedObject::decode(bytes).unwrap().index.segments.len(), 256);
    sample.archive.delete(upper).await.unwrap();
    index(&sample).await;
    assert_eq!(stored(&sample).await, before);
}

#[tokio::test]
async fn the_last_step_is_the_same_whatever_is_left_of_those_below_it() {
    // 4096 to 8191 are one step of 4096. A row of pg_class goes in one step of 16, and its transaction commits in another.
    let (writes, ends) = (4_100, 4_200);
    let sample = of_segments(4_090..writes).await;
    let mut previous = ((writes - 1) * SIZE + SECOND, None);
    previous = sample.put_changing_segment(writes, previous, 700 + writes as u32, 700 + ends as u32).await;
    for number in writes + 1..8_195 {
        previous = sample.put_segment(1, 1, number, previous, 700 + number as u32, None).await;
    }
    let made = index(&sample).await;
    let steps = |made: &Indexed, of: u64| made.made.iter().filter(|m| m.segments == of).count();
    assert_eq!([16, 256, 4096].map(|of| steps(&made, of)), [256, 16, 1], "{:?}", made.skipped);
    let whole = stored(&sample).await;
    let find = |part: &str| whole.iter().find(|(path, _)| path.contains(part)).unwrap().clone();
    let (last, bytes) = find("/4096/");
    let object = MergedObject::decode(&bytes).unwrap();
    let names = object.index.names.as_ref().unwrap();
    assert_eq!((object.index.segments.len(), names.changes.len(), names.ends.len()), (4096, 1, 0));

    // Few objects tell the catalogue and a transaction: of 4105 segments those before and behind it.
    tick().await;
    let faults = Faults::none();
    let counted = sample.archive.with_faults(faults.clone());
    let told = load(&counted, &sample.layout, None, Known::Merged, 2).await.unwrap();
    assert_eq!(told.segments.len(), 4105);
    assert!(faults.calls() <= 5 + 6 + 3 + 4, "{} calls", faults.calls());
    assert_eq!(told, seen(&sample, Known::Nothing).await);
    sample.put_backup(4_091, 4_091).await;
    assert_found(&sample, &[(700 + ends as u32, true), (9_999, false)], 24).await;

    // Out of objects of 256, of 16, and out of the segments themselves, where the others are damaged.
    let spoil = |path: String| {
        let sample = &sample;
        async move {
            let good = sample.archive.get(&path, 1 << 30).await.unwrap();
            sample.replace(&path, good[..good.len() - 9].to_vec()).await;
        }
    };
    let of_256 = whole.iter().filter(|(path, _)| path.contains("/256/")).map(|(path, _)| path.clone());
    let of_256: Vec<_> = of_256.collect();
    spoil(of_256[0].clone()).await;
    spoil(of_256[7].clone()).await;
    spoil(find("/16/").0).await;
    sample.archive.delete(&last).await.unwrap();
    let again = index(&sample).await;
    assert_eq!((again.made.len(), &again.made[0].path), (1, &last), "{again:?}");
    let found = stored(&sample).await.into_iter().find(|(path, _)| *path == last).unwrap().1;
    assert!(found == bytes, "another object was made of the same segments");
}

#[tokio::test]
async fn the_catalogue_is_the_same_with_merged_indexes_and_reads_few_objects() {
    let sample = of_segments(250..520).await;
    let plain = seen(&sample, Known::Nothing).await;
    tick().await;
    index(&sample).await;
    let faults = Faults::none();
    let counted = sample.archive.with_faults(faults.clone());
    let told = load(&counted, &sample.layout, None, Known::Merged, 2).await.unwrap();
    assert_eq!(told, plain);
    // system.json, three listings, one merged index, the six segments before it and the eight behind, one by one.
    assert_eq!(faults.calls(), 5 + 6 + 8 + 1);
}

#[tokio::test]
async fn a_segment_that_changed_behind_a_merged_index_is_read_itself() {
    let sample = of_segments(16..32).await;
    tick().await;
    index(&sample).await;
    tick().await;
    exchange(&sample, 20).await;
    let (plain, told) = (seen(&sample, Known::Nothing).await, seen(&sample, Known::Merged).await);
    assert_eq!(told, plain);
    sample.archive.delete(&wal(&sample, 21)).await.unwrap();
    let told = seen(&sample, Known::Merged).await;
    assert_eq!(told, seen(&sample, Known::Nothing).await);
    assert_eq!(told.gaps().len(), 1, "what is gone is gone, whatever an index covers");
}

#[tokio::test]
async fn a_segment_that_was_exchanged_for_another_valid_one_is_named() {
    let sample = of_segments(16..34).await;
    index(&sample).await;
    assert_eq!(sample.verify(false).await.faults, []);
    exchange(&sample, 20).await;
    let found = sample.verify(false).await.faults;
    let [fault] = found.as_slice() else { panic!("{found:#?}") };
    assert_eq!(fault.object, wal(&sample, 20));
    assert!(fault.text.starts_with("it was replaced: its WAL has the SHA-256 "), "{}", fault.text);
}

#[tokio::test]
async fn a_damaged_merged_index_is_named_does_no_harm_and_is_made_once_more() {
    let sample = of_segments(16..32).await;
    let plain = seen(&sample, Known::Nothing).await;
    tick().await;
    index(&sample).await;
    let (path, good) = stored(&sample).await.remove(0);
    for at in (0..good.len()).step_by(7) {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        sample.replace(&path, bad).await;
        let found = sample.verify(false).await.faults;
        assert_eq!(found.iter().map(|f| &f.object).collect::<Vec<_>>(), [&path], "byte {at}");
        assert_eq!(seen(&sample, Known::Merged).await, plain, "byte {at}");
    }
    sample.replace(&path, good[..good.len() - 9].to_vec()).await;
    assert_eq!(sample.verify(true).await.faults.len(), 1, "a shorter one is seen without reading it");
    assert_eq!(index(&sample).await.present, 1, "it is not read unless that is asked for");
    let rebuilt = try_index(&sample.archive, &sample, true).await.unwrap();
    assert_eq!((rebuilt.damaged, rebuilt.made.len()), (vec![path.clone()], 1));
    assert!(rebuilt.made[0].path.ends_with(".2.1"), "{:?}", rebuilt.made);
    assert_eq!(sample.verify(false).await.faults, [], "the one that was made once more serves");
    assert_eq!(try_index(&sample.archive, &sample, true).await.unwrap().made, []);
}

#[tokio::test]
async fn a_merged_index_that_says_something_else_than_the_segments_is_named_with_its_section() {
    let sample = of_segments(16..32).await;
    index(&sample).await;
    let (path, good) = stored(&sample).await.remove(0);
    let lie = |section: &str| {
        let mut object = MergedObject::decode(&good).unwrap();
        let names = object.index.names.as_mut().expect("names are told");
        match section {
            "xacts" => drop(object.index.all.xacts.remove(3)),
            _ => names.ends.extend(object.index.all.xacts.first().cloned()),
        }
        object.encode()
    };
    for section in ["xacts", "names"] {
        sample.replace(&path, lie(section)).await;
        let found = sample.verify(false).await.faults;
        let told: Vec<_> = found.iter().map(|f| (f.object.as_str(), f.text.clone())).collect();
        assert_eq!(told, [(path.as_str(), format!("it is not what the segments say: {section} differs"))]);
    }
    // Under the name of another range.
    let other = path.replace("10-", "20-").replace("1F.", "2F.");
    sample.replace(&path, good.clone()).await;
    sample.put(&other, good).await;
    let found = sample.verify(false).await.faults;
    assert_eq!(found.len(), 1);
    assert!(
        found[0].object == other && found[0].text.starts_with("it is not what its name says"),
        "{found:?}"
    );
}

#[tokio::test]
async fn what_an_earlier_build_merged_without_names_serves_and_is_merged_once_more() {
    let sample = of_segments(16..32).await;
    sample.put_backup(16, 16).await;
    index(&sample).await;
    let (path, good) = stored(&sample).await.remove(0);
    let mut object = MergedObject::decode(&good).unwrap();
    (object.builder, object.index.names) = (1, None);
    let old = path.replace(".2.0", ".1.0");
    sample.put(&old, object.encode()).await;
    sample.archive.delete(&path).await.unwrap();
    assert_eq!(sample.verify(false).await.faults, []);
    assert_eq!(seen(&sample, Known::Merged).await, seen(&sample, Known::Nothing).await);
    assert_eq!(index(&sample).await.made[0].path, path);
    assert_eq!(stored(&sample).await[1], (path, good));
    let gone: Vec<_> = prune(&sample).await.deletions.into_iter().map(|d| (d.role, d.path)).collect();
    assert_eq!(gone, [(ObjectRole::MergedIndex, old)]);
}

#[tokio::test]
async fn a_builder_that_is_stopped_at_any_call_does_no_harm_and_the_next_one_finishes() {
    for faults in [Faults::fail_call, Faults::lose_ack, Faults::down_from] {
        for n in 1.. {
            let sample = of_segments(16..32).await;
            let armed = faults(n);
            let outcome = try_index(&sample.archive.with_faults(armed.clone()), &sample, false).await;
            if !armed.fired() {
                outcome.unwrap();
                assert!(n > 16, "{n}");
                break;
            }
            assert_eq!(sample.verify(true).await.faults, [], "{armed:?}");
            index(&sample).await;
            assert_eq!(stored(&sample).await.len(), 1, "{armed:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn builders_at_once_make_each_object_once() {
    let sample = of_segments(16..80).await;
    let (a, b, c) = tokio::join!(index(&sample), index(&sample), index(&sample));
    assert_eq!(a.made.len() + b.made.len() + c.made.len(), 4);
    assert_eq!(stored(&sample).await.len(), 4);
    assert_eq!(sample.verify(false).await.faults, []);
}

#[tokio::test]
async fn a_damaged_segment_keeps_only_its_own_step_from_being_made() {
    let sample = of_segments(16..48).await;
    let catalog = seen(&sample, Known::Nothing).await;
    let path = wal(&sample, 20);
    let mut bad = sample.archive.get(&path, 1 << 30).await.unwrap().to_vec();
    let at = bad.len() - 200;
    bad[at] ^= 1;
    sample.replace(&path, bad).await;
    let merging = Merging {
        archive: &sample.archive,
        layout: &sample.layout,
        catalog: &catalog,
        rebuild: false,
        threads: 2,
        progress: &NoProgress,
    };
    let made = merging.run().await.unwrap();
    assert_eq!(made.made.len(), 1);
    let [skipped] = made.skipped.as_slice() else { panic!("{made:?}") };
    assert_eq!(skipped.path, path);
}

async fn prune(sample: &Sample) -> PrunePlan {
    let pruning =
        Pruning { archive: &sample.archive, layout: &sample.layout, system: None, cache: None, threads: 2 };
    let policy = Policy { count: Some(1), ..Policy::default() };
    let plan = pruning.plan(&policy, later()).await.unwrap();
    pruning.carry_out(&plan, &policy, std::time::Duration::ZERO, &NoProgress).await.unwrap().plan
}

#[tokio::test]
async fn a_prune_removes_what_is_over_gone_segments_alone_and_nothing_gone_seems_to_be_there() {
    let sample = of_segments(250..520).await;
    sample.put_backup(300, 300).await;
    index(&sample).await;
    let plan = prune(&sample).await;
    let gone = |role: ObjectRole| plan.deletions.iter().filter(move |d| d.role == role).count();
    // 250 to 299 go: the steps 256 to 271 and 272 to 287 with them, not 288 to 303 nor 256 to 511.
    assert_eq!((gone(ObjectRole::Wal), gone(ObjectRole::MergedIndex)), (50, 2));
    let names: Vec<_> = stored(&sample).await.into_iter().map(|(path, _)| path).collect();
    assert_eq!(names.len(), 15);
    assert!(
        names.iter().any(|p| p.contains("/256/")) && names.iter().any(|p| p.contains("000000120-")),
        "{names:?}"
    );
    let told = seen(&sample, Known::Merged).await;
    assert_eq!(told, seen(&sample, Known::Nothing).await);
    assert_eq!((told.segments.len(), told.segments[0].info.name), (220, segment_name(1, 300)));
    assert_eq!(sample.verify(false).await.faults, []);
    assert_eq!(prune(&sample).await.deletions, []);
}

#[tokio::test]
async fn a_prune_removes_a_damaged_merged_index_once_another_was_made() {
    let sample = of_segments(16..32).await;
    sample.put_backup(16, 16).await;
    index(&sample).await;
    let (path, good) = stored(&sample).await.remove(0);
    sample.replace(&path, good[..100].to_vec()).await;
    assert_eq!(prune(&sample).await.deletions, [], "nothing is in its place yet");
    let made = try_index(&sample.archive, &sample, true).await.unwrap().made.remove(0).path;
    let gone: Vec<_> = prune(&sample).await.deletions.into_iter().map(|d| (d.role, d.path)).collect();
    assert_eq!(gone, [(ObjectRole::MergedIndex, path)]);
    assert_eq!(stored(&sample).await.into_iter().map(|(path, _)| path).collect::<Vec<_>>(), [made]);
}

/// What verify finds with the chain, and the head of the newest one.
async fn prove(sample: &Sample, since: Option<ChainHead>) -> (Vec<(String, String)>, Option<ChainHead>) {
    let catalog = seen(sample, Known::Nothing).await;
    let verify = sample.whole(&catalog);
    let mut found = verify.run(later()).await.unwrap();
    verify.prove_chain(since, &mut found).await.unwrap();
    let head = found.chains.last().map(|c| c.head);
    let file = |path: &str| path.rsplit('/').next().unwrap().to_owned();
    (found.faults.into_iter().map(|f| (file(&f.object), f.text)).collect(), head)
}

/// Puts segments behind those that are there.
async fn lengthen(sample: &Sample, numbers: std::ops::Range<u64>) {
    let mut previous = ((numbers.start - 1) * SIZE + SECOND, None);
    for number in numbers {
        previous = sample.put_segment(1, 1, number, previous, 700 + number as u32, None).await;
    }
}

#[tokio::test]
async fn a_noted_head_is_continued_by_what_comes_later_and_after_a_prune() {
    let sample = of_segments(10..36).await;
    let (faults, noted) = prove(&sample, None).await;
    let noted = noted.unwrap();
    assert_eq!((faults, noted.origin, noted.last), (vec![], segment_name(1, 10), segment_name(1, 35)));
    index(&sample).await;
    lengthen(&sample, 36..60).await;
    let (faults, later) = prove(&sample, Some(noted)).await;
    assert_eq!(faults, []);
    let later = later.unwrap();
    assert_eq!((later.origin, later.last), (noted.origin, segment_name(1, 59)));
    index(&sample).await;
    // A merged index over what went and what stays keeps the hash between them, and so where the chain began.
    sample.put_backup(40, 40).await;
    prune(&sample).await;
    for head in [noted, later] {
        let (faults, now) = prove(&sample, Some(head)).await;
        assert_eq!((faults, now), (vec![], Some(later)), "{head}");
    }
}

#[tokio::test]
async fn a_replaced_segment_is_named_even_where_every_object_is_whole_and_fits() {
    let sample = of_segments(10..40).await;
    index(&sample).await;
    let noted = prove(&sample, None).await.1.unwrap();
    // In the part that no merged index covers.
    exchange(&sample, 36).await;
    assert_eq!(sample.verify(false).await.faults, [], "it is valid, and so is the archive");
    let (faults, head) = prove(&sample, Some(noted)).await;
    assert_ne!(head, Some(noted));
    let text = format!(
        "a segment from this one to {} is not what it was, or was put elsewhere: the chain up to {} does not have the \
         hash that --since kept",
        noted.last, noted.last
    );
    assert_eq!(faults, [(segment_name(1, 32).to_string(), text)]);
    // In the part that one covers: the segment itself.
    exchange(&sample, 20).await;
    let (faults, _) = prove(&sample, Some(noted)).await;
    let names: Vec<_> = faults.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, [segment_name(1, 20).to_string(), segment_name(1, 32).to_string()]);
    // With the merged indexes made anew over it, only what was noted elsewhere knows.
    for (path, _) in stored(&sample).await {
        sample.archive.delete(&path).await.unwrap();
    }
    index(&sample).await;
    assert_eq!(prove(&sample, None).await.0, []);
    let (faults, _) = prove(&sample, Some(noted)).await;
    assert_eq!(faults.len(), 1);
    assert!(faults[0].1.contains("--since"), "{faults:?}");
}

#[tokio::test]
async fn a_removed_segment_is_named_in_the_middle_and_at_the_end() {
    let sample = of_segments(10..48).await;
    let noted = prove(&sample, None).await.1.unwrap();
    index(&sample).await;
    for number in [46, 47] {
        sample.archive.delete(&wal(&sample, number)).await.unwrap();
    }
    assert_eq!(sample.verify(false).await.faults, [], "nothing follows them, so no hole shows");
    let (faults, _) = prove(&sample, None).await;
    let [(name, text)] = faults.as_slice() else { panic!("{faults:?}") };
    assert_eq!(*name, segment_name(1, 46).to_string());
    assert!(text.starts_with("it was removed: main/42/index/00000001/16/"), "{text}");
    sample.archive.delete(&wal(&sample, 12)).await.unwrap();
    let (faults, _) = prove(&sample, Some(noted)).await;
    let text = faults
        .iter()
        .find(|(name, _)| *name == segment_name(1, 12).to_string())
        .map(|(_, text)| text.as_str());
    assert!(text.is_some(), "{faults:?}");
}

#[tokio::test]
async fn a_swapped_and_a_duplicated_segment_are_named() {
    let sample = of_segments(16..34).await;
    index(&sample).await;
    let (a, b) = (wal(&sample, 20), wal(&sample, 24));
    let bytes = |path: String| {
        let archive = sample.archive.clone();
        async move { archive.get(&path, 1 << 30).await.unwrap().to_vec() }
    };
    let (of_a, of_b) = (bytes(a.clone()).await, bytes(b.clone()).await);
    sample.replace(&a, of_b).await;
    let (faults, _) = prove(&sample, None).await;
    assert!(
        faults.iter().any(|(name, text)| a.ends_with(name) && text.contains("its index speaks of")),
        "{faults:?}"
    );
    assert!(faults.iter().all(|(name, _)| !b.ends_with(name)), "{faults:?}");
    sample.replace(&b, of_a).await;
    let (faults, _) = prove(&sample, None).await;
    for path in [a, b] {
        assert!(faults.iter().any(|(name, _)| path.ends_with(name)), "{path}: {faults:?}");
    }
}

#[test]
fn a_real_cluster_is_indexed_by_backup_and_watch_through_kills_and_its_chain_is_proved() {
    let scratch = Scratch::new("merged");
    let archive = scratch.dir("archive");
    let waltide = Waltide::new(&scratch).archive(&archive).env("XDG_CACHE_HOME", scratch.dir("cache"));
    let command = waltide.archive_command();
    let mut cluster =
        Cluster::builder("db").scratch(&scratch).segment_mb(1).archive_command(&command).create();
    let data_dir = cluster.data_dir().to_str().unwrap().to_owned();
    waltide.ok(["init", "--data-dir", &data_dir]);
    cluster.start();
    waltide.ok(["backup", "--data-dir", &data_dir]);
    cluster.query("create table t (n int, filler text)");
    for n in 0..12 {
        cluster.query(&format!("create table gone_{n} as select generate_series(1, 1000)"));
        cluster.query("insert into t select n, repeat('x', 40) from generate_series(1, 30000) n");
        cluster.query(&format!("update t set n = n + 1 where n % 7 = 0; drop table gone_{n}"));
    }
    let xid = cluster.query("insert into t values (0, 'the one') returning pg_current_xact_id()");
    cluster.query("insert into t select n from generate_series(1, 60000) n");
    cluster.archive_all();
    waltide.ok(["backup", "--data-dir", &data_dir]);

    let stored = Stored::of(&cluster, &archive);
    let place = stored.path(&stored.names().merged());
    let listed = || {
        // A killed builder leaves a file that no reader sees.
        let whole =
            |e: std::io::Result<std::fs::DirEntry>| !e.unwrap().file_name().to_string_lossy().contains('#');
        place
            .join("00000001/16")
            .read_dir()
            .map_or(0, |dir| dir.filter_map(|e| whole(e).then_some(())).count())
    };
    let made = listed();
    assert!(made >= 2, "backup makes what is missing, and made {made}");
    waltide.ok(["index"]);
    let made = listed();
    let whole = waltide.json(["verify", "--chain"]);
    assert_eq!(whole["faults"], serde_json::json!([]));
    let head = whole["chains"][0]["head"].as_str().unwrap().to_owned();
    assert!(whole["chains"][0]["kept_heads"].as_u64().unwrap() >= 3, "merged indexes and manifests: {whole}");

    // The same plan with and without them, and nothing that a killed builder leaves matters.
    let plan = |cache: &str| {
        let args = ["restore", "--dry-run", "--target-xid", xid.trim(), "--data-dir"];
        let to = scratch.join("nowhere");
        let told = waltide.json(args.into_iter().chain([
            to.to_str().unwrap(),
            "--cache",
            scratch.join(cache).to_str().unwrap(),
        ]));
        told["plan"].clone()
    };
    let with = plan("first");
    let forget = || std::fs::remove_dir_all(&place).unwrap();
    forget();
    assert_eq!(plan("second"), with);
    for pause in [0, 10, 20, 40, 60, 80, 120] {
        let running = waltide.spawn(["index"]);
        std::thread::sleep(std::time::Duration::from_millis(pause));
        running.kill9();
    }
    let indexed = waltide.json(["index"]);
    assert_eq!(listed(), made, "{indexed}");
    assert_eq!(waltide.json(["verify", "--chain", "--since", &head])["faults"], serde_json::json!([]));
    assert_eq!(plan("third"), with);

    forget();
    let watch = waltide.spawn(["watch", "--data-dir", &data_dir]);
    poll_until("the watch merges", std::time::Duration::from_secs(60), || (listed() == made).then_some(()));
    watch.terminate().assert_ok();
    waltide.ok(["verify", "--quick"]);

    // Whoever takes the newest segments away leaves no hole behind.
    let last = head.split("..").nth(1).unwrap().split(':').next().unwrap();
    let path = stored.path(&stored.names().wal_file(last.parse().unwrap()));
    std::fs::remove_file(&path).unwrap();
    let found = waltide.json_with_status(3, ["verify", "--chain", "--since", &head]);
    let object = found["faults"].as_array().unwrap().iter().map(|f| f["object"].as_str().unwrap());
    assert!(object.into_iter().any(|object| object.ends_with(last)), "{found}");
}

#[tokio::test]
async fn a_transaction_in_a_long_archive_is_found_by_reading_a_few_objects() {
    let sample = of_segments(250..520).await;
    sample.put_backup(251, 251).await;
    index(&sample).await;
    // A listing, the step of 256, the segments before and behind it, and the one with the transaction: not 270.
    assert_found(&sample, &[(1200, true), (1219, true), (5000, false)], 24).await;
    // With more backups that each could be the base: what was read for one is not read for the next.
    for number in (260..510).step_by(25) {
        sample.put_backup(number, number).await;
    }
    assert_found(&sample, &[(1200, true), (960, true), (5000, false)], 20).await;
}

/// Plans a restore to each transaction with merged indexes and without them, and counts the calls that the former takes.
async fn assert_found(sample: &Sample, asked: &[(u32, bool)], most: u64) {
    let catalog = seen(sample, Known::Nothing).await;
    let at = TargetTimeline::Latest;
    for (xid, is_there) in asked.iter().copied() {
        let goal = Goal {
            target: Target::Xid(xid.into()),
            inclusive: true,
            timeline: at,
            action: TargetAction::Promote,
        };
        let faults = Faults::none();
        let source = ArchivedIndexes::new(sample.archive.with_faults(faults.clone()));
        let names = sample.names();
        let found = plan(&catalog, &goal, None, Rates::default(), &source.clone().with_merged(names)).await;
        let calls = faults.calls();
        let plain = plan(&catalog, &goal, None, Rates::default(), &source).await;
        assert_eq!(found.is_ok(), is_there);
        assert_eq!(format!("{found:?}"), format!("{plain:?}"), "xid {xid}");
        assert!(calls <= most, "xid {xid}: {calls} calls");
    }
}
