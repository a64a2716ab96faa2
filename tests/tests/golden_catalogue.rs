//! The catalogues' rows in segments that each supported major version wrote (tests/golden/wal/make.sh).

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use waltide_format::engines::postgres::catalogue::{
    Catalogue, CatalogueChange, CatalogueFiles, ChangeKind, Row, catalogue_changes,
};
use waltide_format::engines::postgres::wal::{Expected, Next, RecordStream, SegmentSpan};
use waltide_format::{PgMajor, SegmentName, SegmentSize};

/// Every change of a catalogue in a major's segments.
fn changes(major: PgMajor) -> Vec<CatalogueChange> {
    let size = SegmentSize::new(1 << 20).unwrap();
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("golden/wal/{major}"));
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let named = entries.filter_map(|p| Some((p.file_stem()?.to_str()?.parse::<SegmentName>().ok()?, p)));
    let mut segments: Vec<_> = named.collect();
    segments.sort();
    let (mut tail, mut found) = (None, Vec::new());
    for (name, path) in segments {
        let bytes = zstd::decode_all(fs::File::open(path).unwrap()).unwrap();
        let span = SegmentSpan::containing(name.start(size).unwrap(), size).unwrap();
        let mut stream = RecordStream::new(&bytes, span, Expected::default(), tail).unwrap();
        while let Next::Record(record) = stream.next_record().unwrap() {
            catalogue_changes(&record, &CatalogueFiles::default(), &mut found)
                .unwrap_or_else(|e| panic!("{major} {}: {e}", record.start));
        }
        tail = stream.into_tail();
    }
    found
}

#[test]
fn every_major_tells_its_names_and_files_at_the_places_we_know() {
    for (major, _) in PgMajor::ALL {
        let changes = changes(major);
        let mut rows: BTreeSet<(String, String)> = BTreeSet::new();
        let mut bodies = Vec::new();
        for change in &changes {
            let catalogue = Catalogue::from_oid(change.file.rel_number);
            match (&change.kind, catalogue) {
                (ChangeKind::Page { tuples, .. }, Some(catalogue)) => {
                    bodies.extend(tuples.iter().map(|(_, t)| (catalogue, t.body.clone())));
                }
                (ChangeKind::Insert { body, .. }, Some(catalogue)) => bodies.push((catalogue, body.clone())),
                _ => {}
            }
        }
        for (catalogue, body) in bodies {
            let row = Row::decode(catalogue, &body, major).unwrap_or_else(|e| panic!("{major}: {e}"));
            match row {
                Row::Class(c) => {
                    assert!(b"riStvmcfpI".contains(&c.kind), "{major} {c:?}");
                    assert!(b"put".contains(&c.persistence), "{major} {c:?}");
                    assert!(c.shared == (c.tablespace == 1664), "{major} {c:?}");
                    assert_eq!(c.rewrites, 0, "{major} {c:?}");
                    rows.insert((format!("class {}", char::from(c.kind)), c.name));
                }
                Row::Namespace(n) => {
                    rows.insert(("namespace".into(), n.name));
                }
                Row::Database(d) => {
                    assert_eq!(d.tablespace, 1663, "{major} {d:?}");
                    rows.insert(("database".into(), d.name));
                }
                Row::Inherits(i) => panic!("{major} {i:?}: nobody asked for it"),
            }
        }
        let has = |kind: &str, name: &str| rows.contains(&(kind.to_owned(), name.to_owned()));
        for (kind, name) in [
            ("class r", "dropped_with_gid"),
            ("class r", "t"),
            ("class i", "t_pkey"),
            ("class r", "doomed"),
            ("class S", "counter"),
            ("database", "copied"),
            ("database", "postgres"),
        ] {
            assert!(has(kind, name), "{major}: {kind} {name} is not among {rows:?}");
        }
        let updates = changes.iter().filter(|c| matches!(c.kind, ChangeKind::Update { .. })).count();
        let deletes = changes.iter().filter(|c| matches!(c.kind, ChangeKind::Delete { .. })).count();
        assert!(updates > 0 && deletes > 1, "{major}: {updates} updates, {deletes} deletes");
    }
}
