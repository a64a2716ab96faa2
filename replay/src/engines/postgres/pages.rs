//! Looks at every page of every relation of a cluster that is shut down.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use waltide_format::BLOCK_BYTES;
use waltide_format::engines::postgres::cluster::data_page::Page;
use waltide_format::engines::postgres::cluster::{ControlFile, PageState, verify_page};

/// Pages are read so many at a time.
const PAGES_AT_ONCE: usize = 64;
/// As many bad pages as are worth naming.
const NAMED_MAX: usize = 20;

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct PageReport {
    /// Pages looked at.
    pub(crate) pages: u64,
    /// Files they lie in.
    pub(crate) files: u64,
    /// Whether the cluster has checksums.
    pub(crate) checksums: bool,
    /// Pages that are wrong.
    pub(crate) bad: u64,
    /// The first of them, each with what is wrong.
    pub(crate) named: Vec<String>,
}

struct RelationFile {
    path: PathBuf,
    /// The number of its first block in the fork.
    first_block: u32,
}

/// Judges every page below `data_dir` on `threads` threads.
pub(crate) fn check_pages(data_dir: &Path, control: &ControlFile, threads: usize) -> io::Result<PageReport> {
    let mut files = Vec::new();
    for dir in relation_directories(data_dir)? {
        relation_files(&dir, control.relation_file_blocks, &mut files)?;
    }
    let checksums = control.has_data_checksums();
    let (next, pages, bad) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let named = Mutex::new(Vec::new());
    let failed = Mutex::new(None);
    let work = || {
        while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            let name = file.path.strip_prefix(data_dir).unwrap_or(&file.path).display();
            let looked = check_file(file, checksums, |what| {
                bad.fetch_add(1, Ordering::Relaxed);
                let mut named = named.lock().unwrap_or_else(PoisonError::into_inner);
                if named.len() < NAMED_MAX {
                    named.push(format!("{name} {what}"));
                }
            });
            match looked {
                Ok(count) => {
                    pages.fetch_add(count, Ordering::Relaxed);
                }
                Err(e) => *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(e),
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(work);
        }
    });
    if let Some(e) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(e);
    }
    let mut named = named.into_inner().unwrap_or_else(PoisonError::into_inner);
    named.sort();
    Ok(PageReport {
        pages: pages.into_inner(),
        files: files.len() as u64,
        checksums,
        bad: bad.into_inner(),
        named,
    })
}

/// Calls `wrong` with what is wrong with each bad page, and answers how many pages there are.
fn check_file(file: &RelationFile, checksums: bool, mut wrong: impl FnMut(String)) -> io::Result<u64> {
    let mut input = File::open(&file.path)?;
    let mut buffer = vec![0; PAGES_AT_ONCE.saturating_mul(BLOCK_BYTES)];
    let mut count = 0u64;
    loop {
        let got = fill(&mut input, &mut buffer)?;
        let (pages, rest) = buffer.get(..got).unwrap_or_default().as_chunks::<BLOCK_BYTES>();
        for page in pages {
            let page: &Page = page;
            let block = file.first_block.wrapping_add(u32::try_from(count).unwrap_or(u32::MAX));
            match verify_page(page, block, checksums) {
                PageState::New | PageState::Valid => {}
                PageState::BadHeader => wrong(format!("block {block}: its header makes no sense")),
                PageState::BadChecksum { found, expected } => {
                    wrong(format!(
                        "block {block}: its checksum is {found:#06x}, it should be {expected:#06x}"
                    ));
                }
            }
            count = count.saturating_add(1);
        }
        if !rest.is_empty() {
            wrong(format!(
                "ends {} bytes into block {}",
                rest.len(),
                u64::from(file.first_block).saturating_add(count)
            ));
        }
        if got < buffer.len() {
            return Ok(count);
        }
    }
}

/// Reads until the buffer is full or the file ends.
fn fill(input: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut got = 0usize;
    while let Some(rest) = buffer.get_mut(got..).filter(|rest| !rest.is_empty()) {
        match input.read(rest) {
            Ok(0) => break,
            Ok(n) => got = got.saturating_add(n),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(got)
}

/// Where relations lie: `global`, each database of `base`, each database of each tablespace.
fn relation_directories(data_dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut dirs = vec![data_dir.join("global")];
    dirs.extend(directories(&data_dir.join("base"))?);
    for space in directories(&data_dir.join("pg_tblspc"))? {
        for version in directories(&space)? {
            if version.file_name().is_some_and(|n| n.to_string_lossy().starts_with("PG_")) {
                dirs.extend(directories(&version)?);
            }
        }
    }
    Ok(dirs)
}

fn directories(of: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(of)? {
        let path = entry?.path();
        // A tablespace is a link.
        if fs::metadata(&path)?.is_dir() {
            found.push(path);
        }
    }
    Ok(found)
}

fn relation_files(dir: &Path, file_blocks: u32, files: &mut Vec<RelationFile>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if let Some(number) = name.to_str().and_then(segment_number) {
            let first_block = number.saturating_mul(file_blocks);
            files.push(RelationFile { path: entry.path(), first_block });
        }
    }
    Ok(())
}

/// Which of a fork's files one is, by its name; none of another kind of file.
fn segment_number(name: &str) -> Option<u32> {
    let (stem, number) = match name.split_once('.') {
        Some((stem, number)) => (stem, number.parse().ok()?),
        None => (name, 0),
    };
    let (relation, fork) = stem.split_once('_').unwrap_or((stem, ""));
    let digits = !relation.is_empty() && relation.bytes().all(|b| b.is_ascii_digit());
    (digits && matches!(fork, "" | "fsm" | "vm" | "init")).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use waltide_format::engines::postgres::cluster::data_page::set_checksum;

    #[test]
    fn only_files_of_relations_are_looked_at() {
        for (name, number) in [
            ("1259", Some(0)),
            ("1259.3", Some(3)),
            ("1259_fsm", Some(0)),
            ("16384_vm.1", Some(1)),
            ("16384_init", Some(0)),
            ("pg_control", None),
            ("PG_VERSION", None),
            ("pg_filenode.map", None),
            ("pg_internal.init", None),
            ("t3_16390", None),
            ("1259_old", None),
            ("1259.x", None),
        ] {
            assert_eq!(segment_number(name), number, "{name}");
        }
    }

    #[test]
    fn a_wrong_page_is_named_with_its_block() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("16384.1");
        let page = |block: u32| {
            let mut page: Page = [0; BLOCK_BYTES];
            page[12..18].copy_from_slice(&[24, 0, 0x00, 0x20, 0x00, 0x20]);
            page[100] = 7;
            set_checksum(&mut page, block);
            page
        };
        let mut bytes: Vec<u8> = (131_072..131_172).flat_map(page).collect();
        bytes.extend_from_slice(&[0; BLOCK_BYTES]);
        let look = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            let mut wrong = Vec::new();
            let file = RelationFile { path: path.clone(), first_block: 131_072 };
            let count = check_file(&file, true, |w| wrong.push(w)).unwrap();
            (count, wrong)
        };
        assert_eq!(look(&bytes), (101, vec![]));
        bytes[70 * BLOCK_BYTES + 500] ^= 1;
        let (_, wrong) = look(&bytes);
        assert!(wrong.len() == 1 && wrong[0].starts_with("block 131142: its checksum is 0x"), "{wrong:?}");
        bytes.truncate(100 * BLOCK_BYTES + 9);
        assert_eq!(look(&bytes).1[1], "ends 9 bytes into block 131172");
    }
}
