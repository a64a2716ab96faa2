//! Which of a file's bytes a backup reads: pure, out of what the WAL changed and what the parent has.

use std::collections::BTreeMap;
use std::ops::Range;

use waltide_format::archive::{BlockSet, Manifest, ManifestFile};
use waltide_format::engines::postgres::changes::{ChangedBlocks, Changes};
use waltide_format::engines::postgres::cluster::{GLOBAL_TABLESPACE, RelationSegment};
use waltide_format::{BLOCK_BYTES, BlockNumber, ForkNumber, RelFileLocator};

use super::files::SourceFile;

/// What of a file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted<'a> {
    /// All of it.
    Whole,
    /// Some blocks; the parent has the others.
    Blocks {
        /// Changed blocks of the fork.
        changed: Option<&'a BlockSet>,
        /// The number that the file's first block has in the fork.
        base: BlockNumber,
        /// From this block of the file on everything is read.
        all_from: BlockNumber,
    },
}

impl Wanted<'_> {
    /// The first stretch of `within`, in bytes of the file, that is read.
    pub(super) fn next_stretch(&self, within: Range<u64>) -> Option<Range<u64>> {
        let Self::Blocks { changed, base, all_from } = self else {
            return Some(within).filter(|within| !within.is_empty());
        };
        let block = |at: u64| {
            let block = at.checked_div(BLOCK_BYTES as u64).unwrap_or(0);
            u32::try_from(block).unwrap_or(u32::MAX)
        };
        let bytes = |block: u32| u64::from(block).saturating_mul(BLOCK_BYTES as u64);
        let (start, end) = (block(within.start), block(within.end.next_multiple_of(BLOCK_BYTES as u64)));
        let in_fork = |block: u32| base.saturating_add(block);
        let run = changed.and_then(|set| set.next_run(in_fork(start)..in_fork(end.min(*all_from))));
        let run = match run {
            Some(run) => {
                let (from, to) = (run.start.saturating_sub(*base), run.end.saturating_sub(*base));
                // What is changed up to where everything is goes on there.
                from..if to == *all_from { end } else { to }
            }
            None => start.max(*all_from)..end,
        };
        let stretch = bytes(run.start).max(within.start)..bytes(run.end).min(within.end);
        Some(stretch).filter(|stretch| !stretch.is_empty())
    }

    /// How many bytes of a file of this length are read.
    pub(super) fn bytes(&self, length: u64) -> u64 {
        let mut sum = 0u64;
        let mut at = 0u64;
        while let Some(stretch) = self.next_stretch(at..length) {
            sum = sum.saturating_add(stretch.end.saturating_sub(stretch.start));
            at = stretch.end;
        }
        sum
    }
}

/// What of each file is read, by place, and the parent's file that has the rest.
pub(super) fn select<'a>(
    files: &[SourceFile],
    parent: &'a Manifest,
    changed: &'a ChangedBlocks,
    segment_blocks: u32,
) -> Vec<(Wanted<'a>, Option<&'a ManifestFile>)> {
    let there: BTreeMap<&str, &ManifestFile> = parent.files.iter().map(|f| (f.path.as_str(), f)).collect();
    let one = |file: &SourceFile| {
        let found = there.get(file.path.as_str()).copied();
        let wanted = found.and_then(|found| blocks_of(file, found, changed, segment_blocks));
        wanted.map_or((Wanted::Whole, None), |wanted| (wanted, found))
    };
    files.iter().map(one).collect()
}

/// What of a relation's file changed since the parent had it; none where it is read whole.
fn blocks_of<'a>(
    file: &SourceFile,
    parent: &ManifestFile,
    changed: &'a ChangedBlocks,
    segment_blocks: u32,
) -> Option<Wanted<'a>> {
    let (relation, segment) = locate(&file.path)?;
    if !matches!(segment.fork, ForkNumber::Main | ForkNumber::Vm) {
        return None;
    }
    let base = segment.segment.checked_mul(segment_blocks)?;
    // A page that the parent has a part of is read again.
    let had = parent.bytes.checked_div(BLOCK_BYTES as u64).and_then(|blocks| u32::try_from(blocks).ok())?;
    match changed.of(relation, segment.fork) {
        Changes::Everything => None,
        Changes::Nothing => Some(Wanted::Blocks { changed: None, base, all_from: had }),
        Changes::Some(changes) => Some(Wanted::Blocks {
            changed: Some(&changes.blocks),
            base,
            all_from: had.min(changes.all_from.saturating_sub(base)),
        }),
    }
    .filter(|wanted| !matches!(wanted, Wanted::Blocks { all_from: 0, .. }))
}

/// Which relation a file of a database is part of. Shared relations, which are few and small, have none.
fn locate(path: &str) -> Option<(RelFileLocator, RelationSegment)> {
    RelationSegment::locate(path).filter(|(relation, _)| relation.spc_oid != GLOBAL_TABLESPACE)
}

/// Pages that the parent has as they were, damaged, are read again. The parent names each as `path:block`.
pub(super) fn touch_damaged(parent: &Manifest, changed: &mut ChangedBlocks, segment_blocks: u32) {
    for page in &parent.damaged_pages {
        let Some((path, block)) = page.rsplit_once(':') else { continue };
        let Some((relation, segment)) = locate(path) else { continue };
        let base = segment.segment.checked_mul(segment_blocks);
        let Some(block) = base.zip(block.parse().ok()).and_then(|(base, block)| base.checked_add(block))
        else {
            continue;
        };
        changed.touch(relation, segment.fork, block);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::files::Lies;
    use super::*;

    const PAGE: u64 = BLOCK_BYTES as u64;

    fn set(blocks: &[u32]) -> BlockSet {
        let mut set = BlockSet::default();
        blocks.iter().for_each(|block| set.insert(*block));
        set
    }

    fn stretches(wanted: Wanted<'_>, within: Range<u64>) -> Vec<Range<u64>> {
        let mut found = Vec::new();
        let mut at = within.start;
        while let Some(stretch) = wanted.next_stretch(at..within.end) {
            at = stretch.end;
            found.push(stretch);
        }
        found
    }

    proptest! {
        #[test]
        fn exactly_what_changed_or_lies_behind_is_read(
            blocks in proptest::collection::vec(0u32..60, 0..20),
            base in 0u32..20, all_from in 0u32..40, from in 0u64..20, length in 0u64..40,
        ) {
            let changed = set(&blocks);
            let wanted = Wanted::Blocks { changed: Some(&changed), base, all_from };
            let found = stretches(wanted, from * PAGE..length * PAGE);
            let inside = |block: u64| found.iter().any(|s| s.start <= block * PAGE && (block + 1) * PAGE <= s.end);
            for block in 0..40 {
                let within = from <= block && block < length;
                let want = block >= u64::from(all_from) || changed.contains(base + block as u32);
                prop_assert_eq!(inside(block), within && want, "block {}", block);
            }
            prop_assert!(found.windows(2).all(|w| w[0].end < w[1].start), "{:?}", found);
            if from == 0 {
                let sum: u64 = found.iter().map(|s| s.end - s.start).sum();
                prop_assert_eq!(wanted.bytes(length * PAGE), sum);
            }
        }
    }

    #[test]
    fn a_whole_file_is_one_stretch() {
        assert_eq!(Wanted::Whole.next_stretch(5..77), Some(5..77));
        assert_eq!(Wanted::Whole.bytes(77), 77);
        assert_eq!(Wanted::Whole.next_stretch(5..5), None);
    }

    #[test]
    fn a_file_is_part_of_the_relation_its_path_says() {
        let find = |path: &str| locate(path).map(|(r, _)| (r.spc_oid, r.db_oid, r.rel_number));
        assert_eq!(find("base/5/1259"), Some((1663, 5, 1259)));
        assert_eq!(find("base/5/1259_vm.2"), Some((1663, 5, 1259)));
        assert_eq!(find("pg_tblspc/16400/PG_15_202209061/5/77.1"), Some((16400, 5, 77)));
        assert_eq!(find("global/1260"), None);
        assert_eq!(find("base/5/pg_filenode.map"), None);
        assert_eq!(find("base/5/deeper/1259"), None);
        assert_eq!(find("pg_tblspc/16400/77"), None);
    }

    #[test]
    fn what_no_record_tells_of_is_read_whole() {
        let manifest = |files: &[(&str, u64)]| -> Vec<ManifestFile> {
            let file = |(path, blocks): &(&str, u64)| ManifestFile {
                path: (*path).to_owned(),
                bytes: blocks * PAGE,
                mode: 0o600,
                modified: 0,
                extents: vec![],
            };
            files.iter().map(file).collect()
        };
        let source = |path: &str| SourceFile {
            path: path.to_owned(),
            source: path.into(),
            lies: Lies::Alone,
            bytes: 9 * PAGE,
            mode: 0o600,
            modified: 0,
            relation: RelationSegment::parse(path.rsplit('/').next().unwrap()),
        };
        let mut parent = crate::testing::backup(1, 3, 0).head;
        parent.files = manifest(&[
            ("base/5/100", 9),
            ("base/5/100_fsm", 9),
            ("base/5/100_init", 9),
            ("base/5/100_vm", 0),
            ("base/5/100.1", 4),
            ("base/5/pg_filenode.map", 9),
            ("global/1260", 9),
            ("pg_xact/0000", 9),
        ]);
        parent.damaged_pages = vec!["base/5/100.1:2".into(), "base/5/100.1:x".into(), "global/1260:1".into()];
        let mut changed = ChangedBlocks::default();
        touch_damaged(&parent, &mut changed, 1000);
        let paths = parent.files.iter().map(|f| f.path.as_str()).chain(["base/5/200"]);
        let files: Vec<SourceFile> = paths.map(source).collect();
        let read =
            files.iter().zip(select(&files, &parent, &changed, 1000)).map(|(file, (wanted, below))| {
                assert_eq!(wanted == Wanted::Whole, below.is_none());
                (file.path.as_str(), wanted.bytes(file.bytes) / PAGE)
            });
        let expected = [
            ("base/5/100", 0),
            ("base/5/100_fsm", 9),
            ("base/5/100_init", 9),
            ("base/5/100_vm", 9),
            // What was damaged, and what lies behind the length it had.
            ("base/5/100.1", 6),
            ("base/5/pg_filenode.map", 9),
            ("global/1260", 9),
            ("pg_xact/0000", 9),
            ("base/5/200", 9),
        ];
        assert_eq!(read.collect::<Vec<_>>(), expected);
    }
}
