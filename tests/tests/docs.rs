//! The tables of docs/format.md and the code say the same.

use waltide_format::archive::{Envelope, FOOTER_BYTES, HEADER_BYTES, Header, ObjectKind};

fn page() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/format.md");
    std::fs::read_to_string(path).expect("docs/format.md is there")
}

/// The rows of the table whose head is `head`, cell by cell.
fn table(page: &str, head: &str) -> Vec<Vec<String>> {
    let mut lines = page.lines().skip_while(|l| *l != head);
    assert_eq!(lines.next(), Some(head), "docs/format.md has no table {head}");
    let cells = |l: &str| l.trim_matches('|').split('|').map(|c| c.trim().to_owned()).collect();
    lines.skip(1).take_while(|l| l.starts_with('|')).map(cells).collect()
}

#[test]
fn the_kinds_of_objects_have_the_codes_of_the_page() {
    let kinds = [
        ("segment", ObjectKind::Segment),
        ("wal-file", ObjectKind::WalFile),
        ("json", ObjectKind::Json),
        ("manifest", ObjectKind::Manifest),
        ("pack", ObjectKind::Pack),
        ("extent-map", ObjectKind::ExtentMap),
        ("merged-index", ObjectKind::MergedIndex),
    ];
    let rows = table(&page(), "| Kind | Code | What lies between header and footer |");
    let told: Vec<_> = rows.iter().map(|r| (r[0].as_str(), r[1].parse::<u16>().unwrap())).collect();
    assert_eq!(told, kinds.map(|(name, kind)| (name, kind.code())));
}

#[test]
fn header_and_footer_have_the_fields_of_the_page() {
    let page = page();
    let mut tables = page.split("| Offset | Size | Field | Meaning |").skip(1).map(|t| {
        let rows = t.lines().skip(2).take_while(|l| l.starts_with('|'));
        rows.map(|l| {
            let cells: Vec<_> = l.trim_matches('|').split('|').map(str::trim).collect();
            (cells[0].parse::<usize>().unwrap(), cells[1].parse::<usize>().unwrap())
        })
        .collect::<Vec<_>>()
    });
    for size in [HEADER_BYTES, FOOTER_BYTES] {
        let fields = tables.next().unwrap();
        let end = fields.iter().fold(0, |at, (offset, bytes)| {
            assert_eq!(*offset, at);
            at + bytes
        });
        assert_eq!(end, size);
    }
    let bytes = |hex: &str| hex.split(' ').map(|h| u8::from_str_radix(h, 16).unwrap()).collect::<Vec<_>>();
    let object = Envelope::seal(ObjectKind::Json, b"{}");
    assert!(page.contains("`57 41 4C 54 49 44 45 1A`") && page.contains("`45 44 49 54`"));
    assert_eq!(object[..8], bytes("57 41 4C 54 49 44 45 1A"));
    assert_eq!(object[object.len() - 4..], bytes("45 44 49 54"));
    assert_eq!(object[..HEADER_BYTES], Header { kind: ObjectKind::Json }.encode());
}

#[test]
fn the_sections_have_the_numbers_of_the_page() {
    let rows = table(&page(), "| Section | Number | Version | Content |");
    let told: Vec<_> = rows
        .iter()
        .map(|r| (r[0].as_str(), r[1].parse::<u16>().unwrap(), r[2].parse::<u16>().unwrap()))
        .collect();
    assert_eq!(told, waltide_format::archive::SECTIONS);
}

#[test]
fn the_sections_of_a_merged_index_have_the_numbers_of_the_page() {
    let rows = table(&page(), "| Merged section | Number | Version | Content |");
    let told =
        rows.iter().map(|r| (r[0].as_str(), r[1].parse::<u16>().unwrap(), r[2].parse::<u16>().unwrap()));
    let known =
        waltide_format::archive::MERGED_SECTIONS.map(|(name, number, version, _)| (name, number, version));
    assert_eq!(told.collect::<Vec<_>>(), known);
}
