//! What the fuzz targets do with any bytes: one call into the crate each. `tests/tests/fuzz_corpus.rs` replays the
//! committed corpora through the same functions on stable Rust.
//!
//! Objects are sealed under checksums, which no fuzzer guesses, so most targets take the bytes as they are and once more with
//! the seal put right: the decoder behind it must stand on its own.

use waltide_format::archive::{
    Envelope, ExtentMap, Footer, HEADER_BYTES, Header, Manifest, ObjectKind, SegmentDirectory, StoredSegment,
    WalFile,
};
use waltide_format::{SegmentName, TimestampTz, WalFileName};

/// A target: its name, which is its corpus' directory, and what it does.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[Target] = &[
    ("stored_segment", stored_segment),
    ("envelope", envelope),
    ("manifest", manifest),
    ("extent_map", extent_map),
    ("names", names),
];

/// A stored segment: as it is; and as chunks, sections and a directory that a right footer ends.
pub fn stored_segment(data: &[u8]) {
    let _ = StoredSegment::decode(data);
    let Some((&directory_bytes, body)) = data.split_first() else { return };
    let mut object = Header { kind: ObjectKind::Segment }.encode().to_vec();
    object.extend_from_slice(body);
    let directory_bytes = usize::from(directory_bytes).min(object.len() - HEADER_BYTES);
    Footer::append(&mut object, directory_bytes as u32);
    let _ = StoredSegment::decode(&object);
    if let Ok(Ok(directory)) = SegmentDirectory::decode(&object, object.len() as u64) {
        let _ = directory.info(&object, object.len() as u64);
        let _ = directory.index(&object, object.len() as u64);
    }
}

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
}
