//! Merged indexes: made, lost, damaged, made again, pruned; and never needed for an answer.

#[allow(dead_code)] // not all of it is used here
#[path = "catalogue/sample.rs"]
mod sample;

use std::sync::Arc;

use object_store::memory::InMemory;
use sample::{SECOND, SIZE, Sample, segment_name};
use waltide_archiver::catalog::{Known, load};
use waltide_archiver::merged::{Indexed, MergeError, Merging};
use waltide_format::WalFileName;
use waltide_format::archive::{Catalog, MergedObject};
use waltide_storage::{Archive, Faults, NoProgress};

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
    assert!(rebuilt.made[0].path.ends_with(".1.1"), "{:?}", rebuilt.made);
    assert_eq!(sample.verify(false).await.faults, [], "the one that was made once more serves");
    assert_eq!(try_index(&sample.archive, &sample, true).await.unwrap().made, []);
}

#[tokio::test]
async fn a_merged_index_that_says_something_else_than_the_segments_is_named_with_its_section() {
    let sample = of_segments(16..32).await;
    index(&sample).await;
    let (path, good) = stored(&sample).await.remove(0);
    let mut object = MergedObject::decode(&good).unwrap();
    object.index.all.xacts.remove(3);
    sample.replace(&path, object.encode()).await;
    let found = sample.verify(false).await.faults;
    let told: Vec<_> = found.iter().map(|f| (f.object.as_str(), f.text.as_str())).collect();
    assert_eq!(told, [(path.as_str(), "it is not what the segments say: xacts differs")]);
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
