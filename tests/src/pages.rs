//! Data files of two clusters at the same position of the log, compared page by page.
//!
//! The masks are those of PostgreSQL's wal_consistency_checking: what replay need not reproduce, because PostgreSQL may
//! lose it in a crash. Masked on every page: `pd_lsn`, `pd_checksum`, `pd_prune_xid`, the flags of `pd_flags` (they are
//! hints), and the hole between `pd_lower` and `pd_upper`. By kind of page:
//!
//! | Page | Masked besides |
//! |---|---|
//! | heap | a tuple's hint bits (not those that say frozen), its command id, padding behind it |
//! | B-tree | dead line pointers, garbage and split-end flags, the cycle of the vacuum |
//! | hash | dead line pointers, the dead-tuples flag, unused pages |
//! | GIN | deleted pages, `pd_lower` and `pd_upper` included |
//! | GiST | dead line pointers, garbage and follow-right flags, the sequence number of splits |
//! | SP-GiST | the cache of pages with room on the metapage, which is never logged |
//! | BRIN | the evacuation flag |
//! | sequence | its tuple: replay hands out the next 32 values at once |
//!
//! Visibility maps have no hole: every bit of theirs counts. Free space maps are not compared, nothing logs them. Pages of
//! zeros behind a file's end are no difference: files grow without a record, and an empty one may be gone.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use waltide_format::engines::postgres::cluster::RelationSegment;
use waltide_format::{BLOCK_BYTES, ForkNumber};

/// One page.
pub type Page = [u8; BLOCK_BYTES];

/// Directories of which every byte counts.
const NOT_RELATIONS: [&str; 4] = ["pg_xact", "pg_multixact", "pg_commit_ts", "pg_twophase"];
const HEADER: usize = 24;
const LP_UNUSED: u32 = 0;
const LP_NORMAL: u32 = 1;

/// Compares the data files below two data directories, tablespaces included, and the commit logs. Says how many pages
/// were compared and which differ, each with the first byte that does. Commit logs and their like count byte by byte.
pub fn compare(one: &Path, other: &Path) -> (usize, Vec<String>) {
    let (one, other) = (relation_files(one), relation_files(other));
    let mut names: Vec<&String> = one.keys().chain(other.keys()).collect();
    names.sort();
    names.dedup();
    let (mut count, mut differences) = (0, Vec::new());
    for name in names {
        let read = |files: &BTreeMap<String, PathBuf>| files.get(name).map_or_else(Vec::new, |p| read(p));
        let (a, b) = (read(&one), read(&other));
        count += a.len().max(b.len()) / BLOCK_BYTES;
        differences.extend(compare_file(name, &a, &b));
    }
    (count, differences)
}

fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Compares two states of a file; its name says which kind of pages it has.
pub fn compare_file(name: &str, one: &[u8], other: &[u8]) -> Vec<String> {
    let fork = RelationSegment::parse(name.rsplit('/').next().unwrap_or(name)).map(|r| r.fork);
    let mut differences = Vec::new();
    for block in 0..one.len().max(other.len()).div_ceil(BLOCK_BYTES) {
        let [a, b] = [one, other].map(|bytes| masked(&page_at(bytes, block), fork));
        if let Some(at) = (0..BLOCK_BYTES).find(|at| a[*at] != b[*at]) {
            let around = |page: &Page| format!("{:02x?}", &page[at..(at + 8).min(BLOCK_BYTES)]);
            differences.push(format!("{name} block {block} byte {at}: {} and {}", around(&a), around(&b)));
        }
    }
    differences
}

/// A page of a file; zeros behind its end.
pub fn page_at(bytes: &[u8], block: usize) -> Page {
    let mut page = [0; BLOCK_BYTES];
    let from = bytes.len().min(block * BLOCK_BYTES);
    let found = &bytes[from..bytes.len().min(from + BLOCK_BYTES)];
    page[..found.len()].copy_from_slice(found);
    page
}

/// Relations' files but free space maps, and those of the commit logs, multixacts, commit times and prepared
/// transactions, by path.
pub fn relation_files(data_dir: &Path) -> BTreeMap<String, PathBuf> {
    let mut files = BTreeMap::new();
    let mut dirs = vec![
        "global",
        "pg_xact",
        "pg_multixact/offsets",
        "pg_multixact/members",
        "pg_commit_ts",
        "pg_twophase",
    ]
    .into_iter()
    .map(str::to_owned)
    .collect::<Vec<_>>();
    dirs.extend(below(data_dir, "base"));
    for space in below(data_dir, "pg_tblspc") {
        for version in below(data_dir, &space) {
            dirs.extend(below(data_dir, &version));
        }
    }
    for dir in dirs {
        for entry in fs::read_dir(data_dir.join(&dir)).expect("readable") {
            let entry = entry.expect("readable");
            let name = entry.file_name().into_string().expect("PostgreSQL's names are ASCII");
            let relation = RelationSegment::parse(&name);
            let wanted = match relation {
                _ if NOT_RELATIONS.iter().any(|of| dir.starts_with(of)) => true,
                Some(r) => r.fork != ForkNumber::Fsm && !r.temporary,
                None => name == "pg_filenode.map" || name == "PG_VERSION",
            };
            if wanted {
                files.insert(format!("{dir}/{name}"), entry.path());
            }
        }
    }
    files
}

fn below(data_dir: &Path, dir: &str) -> Vec<String> {
    let entries = fs::read_dir(data_dir.join(dir)).expect("readable");
    let paths = entries.map(|e| e.expect("readable").path());
    let dirs = paths.filter(|p| fs::metadata(p).is_ok_and(|m| m.is_dir()));
    dirs.map(|p| format!("{dir}/{}", p.file_name().expect("an entry has one").to_string_lossy())).collect()
}

fn u16_at(page: &Page, at: usize) -> usize {
    usize::from(u16::from_le_bytes([page[at], page[at + 1]]))
}

fn u32_at(page: &Page, at: usize) -> u32 {
    u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]])
}

/// The page as far as replay must reproduce it. `fork` is none for what is no relation's.
pub fn masked(page: &Page, fork: Option<ForkNumber>) -> Page {
    let mut page = *page;
    if fork.is_none() || page.iter().all(|b| *b == 0) {
        return page;
    }
    let (lower, upper, special) = (u16_at(&page, 12), u16_at(&page, 14), u16_at(&page, 16));
    page[..12].fill(0);
    page[20..24].fill(0);
    if fork == Some(ForkNumber::Vm) {
        return page;
    }
    assert!(
        HEADER <= lower && lower <= upper && upper <= special && special <= BLOCK_BYTES,
        "no page header"
    );
    if special == BLOCK_BYTES {
        mask_heap(&mut page, lower);
    } else {
        mask_special(&mut page, lower, special);
    }
    // A GIN page of posting lists, and some metapages, keep nothing in pd_lower.
    if lower > HEADER || special == BLOCK_BYTES {
        page[lower..upper].fill(0);
    }
    page
}

fn line_pointers(page: &Page, lower: usize) -> impl Iterator<Item = (usize, u32)> + use<> {
    let page = *page;
    (HEADER..lower).step_by(4).map(move |at| (at, u32_at(&page, at)))
}

fn mask_heap(page: &mut Page, lower: usize) {
    for (_, pointer) in line_pointers(page, lower) {
        let (from, flags, length) =
            (pointer as usize & 0x7FFF, (pointer >> 15) & 3, (pointer >> 17) as usize);
        if flags != LP_NORMAL || length < 23 {
            continue;
        }
        page[from + 8..from + 12].fill(0);
        let mut infomask = u16_at(page, from + 20) as u16;
        infomask &= !0x0020;
        infomask &= if infomask & 0x0300 == 0x0300 { !0x0C00 } else { !0x0F00 };
        page[from + 20..from + 22].copy_from_slice(&infomask.to_le_bytes());
        let end = from + length;
        page[end..end.next_multiple_of(8).min(BLOCK_BYTES)].fill(0);
    }
}

/// Line pointers as the masks of indexes leave them: only where they point to.
fn mask_line_pointers(page: &mut Page, lower: usize) {
    for (at, pointer) in line_pointers(page, lower) {
        if (pointer >> 15) & 3 != LP_UNUSED {
            page[at..at + 4].copy_from_slice(&(pointer & !(3 << 15)).to_le_bytes());
        }
    }
}

fn mask_special(page: &mut Page, lower: usize, special: usize) {
    let last = u16_at(page, BLOCK_BYTES - 2);
    let flags_at = BLOCK_BYTES - 4;
    let clear = |page: &mut Page, bits: u16| {
        let flags = u16_at(page, flags_at) as u16 & !bits;
        page[flags_at..flags_at + 2].copy_from_slice(&flags.to_le_bytes());
    };
    match (BLOCK_BYTES - special, last) {
        // GiST: flags are leaf 1, deleted 2, tuples deleted 4, follow right 8, garbage 16
        (16, 0xFF81) => {
            clear(page, 8 | 16);
            page[special..special + 8].fill(0);
            if u16_at(page, flags_at) & 1 != 0 {
                mask_line_pointers(page, lower);
            }
        }
        // hash: flags are overflow 1, bucket 2, …; dead tuples 128
        (16, 0xFF80) => {
            clear(page, 128);
            match u16_at(page, flags_at) & 0x0F {
                0 => page[HEADER..special].fill(0),
                1 | 2 => mask_line_pointers(page, lower),
                _ => {}
            }
        }
        // B-tree: flags are leaf 1, …, split end 32, garbage 64
        (16, _) => {
            clear(page, 32 | 64);
            page[BLOCK_BYTES - 2..].fill(0);
            if u16_at(page, flags_at) & 1 != 0 {
                mask_line_pointers(page, lower);
            }
        }
        // SP-GiST: flags, at the special space's start, are meta 1
        (8, 0xFF82) if u16_at(page, special) & 1 != 0 => page[HEADER..special].fill(0),
        (8, 0xFF82) => {}
        (8, 0xF091..=0xF093) => clear(page, 1),
        (8, _) if u32_at(page, special) == 0x1717 => page[HEADER..special].fill(0),
        // GIN: flags are … deleted 4; the server leaves on such a page what was there, replay makes it anew
        (8, flags) if flags & 4 != 0 => {
            page[12..16].fill(0);
            page[HEADER..BLOCK_BYTES - 2].fill(0);
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heap(infomask: u16, cid: u32) -> Page {
        let mut page = [0; BLOCK_BYTES];
        page[..8].copy_from_slice(&[7; 8]);
        page[12..14].copy_from_slice(&28u16.to_le_bytes());
        page[14..16].copy_from_slice(&8160u16.to_le_bytes());
        page[16..18].copy_from_slice(&8192u16.to_le_bytes());
        let pointer: u32 = 8160 | LP_NORMAL << 15 | 27 << 17;
        page[24..28].copy_from_slice(&pointer.to_le_bytes());
        page[8160 + 8..8160 + 12].copy_from_slice(&cid.to_le_bytes());
        page[8160 + 20..8160 + 22].copy_from_slice(&infomask.to_le_bytes());
        page[8160 + 24] = 9;
        page
    }

    #[test]
    fn hints_and_command_ids_are_no_difference_and_everything_else_is() {
        let one = heap(0x0100 | 0x0800 | 0x0020, 3);
        let other = heap(0x0200 | 0x0400, 77);
        assert!(compare_file("base/5/77", &one, &other).is_empty());
        // Frozen is no hint.
        assert_eq!(compare_file("base/5/77", &one, &heap(0x0300, 3)).len(), 1);
        for at in [8184, 8163, 8160 + 18, 24] {
            let mut changed = one;
            changed[at] ^= 1;
            let found = compare_file("base/5/77", &one, &changed);
            assert!(found.len() == 1 && found[0].starts_with("base/5/77 block 0 byte"), "{at}: {found:?}");
        }
        let mut hole = one;
        hole[5000] = 1;
        assert!(compare_file("base/5/77", &one, &hole).is_empty());
        // A visibility map has no hole.
        assert_eq!(compare_file("base/5/77_vm", &one, &hole).len(), 1);
    }

    #[test]
    fn zeros_behind_the_end_are_no_difference() {
        let one = heap(0, 0);
        let longer = [one, [0; BLOCK_BYTES]].concat();
        assert!(compare_file("base/5/77", &one, &longer).is_empty());
        assert_eq!(compare_file("base/5/77", &one, &[]).len(), 1);
    }
}
