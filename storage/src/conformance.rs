//! One suite that every back end runs, with or without (unarmed) faults in front.

use bytes::Bytes;

use crate::{Archive, Put, StorageError};

/// Checks that an empty `archive` keeps the promises of this crate, and leaves it empty.
///
/// # Panics
/// Where it does not.
pub async fn conformance(archive: &Archive) {
    objects_are_created_once(archive).await;
    reads_are_bounded(archive).await;
    listings_are_sorted_and_by_directory(archive).await;
    deleting_is_repeatable(archive).await;
    names_are_checked_everywhere(archive).await;
    one_of_many_writers_creates(archive).await;
    assert_eq!(archive.list("").await.expect("the archive lists"), [], "the suite leaves nothing");
}

async fn put(archive: &Archive, path: &str, bytes: &'static [u8]) -> Put {
    archive.put_new(path, Bytes::from_static(bytes)).await.expect("a put works")
}

async fn objects_are_created_once(archive: &Archive) {
    assert_eq!(archive.head("a/one").await.expect("a look works"), None);
    assert!(archive.get("a/one", 9).await.expect_err("it is not there").is_not_found());
    assert_eq!(put(archive, "a/one", b"first").await, Put::Created);
    assert_eq!(put(archive, "a/one", b"second").await, Put::Exists);
    assert_eq!(archive.get("a/one", 5).await.expect("it is there"), "first");
    archive.sync("a/one").await.expect("it can be synced");
    assert!(archive.sync("a/two").await.expect_err("it is not there").is_not_found());
    let info = archive.head("a/one").await.expect("a look works").expect("it is there");
    assert_eq!((info.path.as_str(), info.size), ("a/one", 5));
    assert_eq!(archive.list("a").await.expect("it lists"), [info], "a listing and a look agree");
    archive.delete("a/one").await.expect("it can go");
}

async fn reads_are_bounded(archive: &Archive) {
    put(archive, "r/ten", b"0123456789").await;
    put(archive, "r/none", b"").await;
    match archive.get("r/ten", 9).await {
        Err(StorageError::TooLarge { path, size: 10, max: 9 }) => assert_eq!(path, "r/ten"),
        other => unreachable!("ten bytes into nine: {other:?}"),
    }
    assert_eq!(archive.get("r/none", 0).await.expect("it is there"), "");
    for (start, end, expected) in
        [(0, 10, "0123456789"), (3, 5, "34"), (9, 10, "9"), (4, 4, ""), (10, 10, "")]
    {
        assert_eq!(archive.get_range("r/ten", start..end).await.expect("within"), expected, "{start}..{end}");
    }
    for (start, end) in [(0, 11), (9, 11), (10, 11), (11, 11), (5, 4), (0, u64::MAX), (u64::MAX, u64::MAX)] {
        match archive.get_range("r/ten", start..end).await {
            Err(StorageError::OutOfRange { size: 10, .. }) => {}
            other => unreachable!("{start}..{end} of ten bytes: {other:?}"),
        }
    }
    for (bytes, expected) in
        [(0, ""), (1, "9"), (10, "0123456789"), (11, "0123456789"), (u64::MAX, "0123456789")]
    {
        let (tail, size) = archive.get_tail("r/ten", bytes).await.expect("a tail");
        assert_eq!((&tail[..], size), (expected.as_bytes(), 10), "the last {bytes}");
    }
    assert_eq!(archive.get_tail("r/none", 4).await.expect("a tail"), (Bytes::new(), 0));
    assert!(archive.get_range("r/two", 0..1).await.expect_err("it is not there").is_not_found());
    assert!(archive.get_range("r/two", 0..0).await.expect_err("it is not there").is_not_found());
    assert!(archive.get_tail("r/two", 1).await.expect_err("it is not there").is_not_found());
    for path in ["r/ten", "r/none"] {
        archive.delete(path).await.expect("it can go");
    }
}

async fn listings_are_sorted_and_by_directory(archive: &Archive) {
    let paths = ["l/b/2", "l/a", "l/b/10", "l-x", "l/b-c", "l/c/d/e"];
    for path in paths {
        assert_eq!(put(archive, path, b"x").await, Put::Created);
    }
    let below = async |dir: &str| -> Vec<String> {
        archive.list(dir).await.expect("it lists").into_iter().map(|info| info.path).collect()
    };
    assert_eq!(below("").await, ["l-x", "l/a", "l/b-c", "l/b/10", "l/b/2", "l/c/d/e"]);
    assert_eq!(below("l").await, ["l/a", "l/b-c", "l/b/10", "l/b/2", "l/c/d/e"]);
    assert_eq!(below("l/b/").await, ["l/b/10", "l/b/2"], "l/b-c is another name");
    for empty in ["l/a", "l/nothing", "nothing/at/all"] {
        assert_eq!(below(empty).await, [""; 0], "{empty}");
    }
    let level = archive.list_names("l").await.expect("it lists");
    assert_eq!(level.dirs, ["b", "c"]);
    assert_eq!(level.objects.iter().map(|info| info.path.as_str()).collect::<Vec<_>>(), ["l/a", "l/b-c"]);
    assert_eq!(archive.list_names("l/nothing").await.expect("it lists"), crate::Listing::default());
    for path in paths {
        archive.delete(path).await.expect("it can go");
    }
}

async fn deleting_is_repeatable(archive: &Archive) {
    put(archive, "d/one", b"x").await;
    for path in ["d/one", "d/one", "d/never", "never/at/all"] {
        archive.delete(path).await.expect("what is not there is deleted");
    }
    assert_eq!(archive.head("d/one").await.expect("a look works"), None);
    assert_eq!(put(archive, "d/one", b"again").await, Put::Created, "a deleted name is free");
    archive.delete("d/one").await.expect("it can go");
}

async fn names_are_checked_everywhere(archive: &Archive) {
    for bad in ["", "/a", "a/../b", "a//b", "a#1"] {
        let refusals = [
            archive.put_new(bad, Bytes::new()).await.err(),
            archive.get(bad, 1).await.err(),
            archive.get_range(bad, 0..1).await.err(),
            archive.get_tail(bad, 1).await.err(),
            archive.head(bad).await.err(),
            archive.delete(bad).await.err(),
            archive.sync(bad).await.err(),
        ];
        for refusal in refusals {
            assert!(matches!(refusal, Some(StorageError::InvalidPath { .. })), "{bad:?}: {refusal:?}");
        }
    }
    assert!(archive.list("..").await.is_err());
    assert!(archive.list_names("/").await.is_err());
}

async fn one_of_many_writers_creates(archive: &Archive) {
    let writers = (0..8_u8).map(|writer| {
        let archive = archive.clone();
        let bytes = Bytes::from(vec![writer; 100_000]);
        tokio::spawn(async move { archive.put_new("w/same/name", bytes).await.expect("a put works") })
    });
    let mut created = 0_u32;
    for writer in writers.collect::<Vec<_>>() {
        created = created.saturating_add(u32::from(writer.await.expect("it ends") == Put::Created));
    }
    assert_eq!(created, 1, "exactly one writer creates the object");
    let bytes = archive.get("w/same/name", 100_000).await.expect("it is there");
    assert!(
        bytes.len() == 100_000 && bytes.iter().all(|byte| Some(byte) == bytes.first()),
        "by one writer, whole"
    );
    archive.delete("w/same/name").await.expect("it can go");
}
