//! Which backup an incremental or a differential is made against, and whether the archived WAL leads from there to
//! here. Pure: every "no" is a reason for a full, in words.

use waltide_format::archive::{BackupEntry, BackupKind, Catalog, Ending, Lineage, Manifest, Step};
use waltide_format::engines::postgres::wal::LONG_HEADER_BYTES;
use waltide_format::{BackupId, Lsn, SegmentName, SegmentSize, TimelineId};

use super::super::publish::DAMAGED_PAGES_MAX;

/// The reason for a full backup that nobody wonders about.
pub(super) const NO_BACKUP: &str = "there is no backup yet";

/// What is known of the server before its backup starts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Here {
    pub(super) timeline: TimelineId,
    pub(super) data_checksums: bool,
}

/// The newest backup that one of `kind` can be made against, or why there is none.
pub(super) fn choose(
    catalog: &Catalog,
    kind: BackupKind,
    here: Here,
    being_pruned: &[BackupId],
) -> Result<BackupEntry, String> {
    let fits = |b: &&BackupEntry| kind != BackupKind::Differential || b.head.kind == BackupKind::Full;
    let mut found: Vec<&BackupEntry> = catalog.backups.iter().filter(fits).collect();
    found.sort_by(|a, b| (b.head.stopped, &b.head.id).cmp(&(a.head.stopped, &a.head.id)));
    let line = catalog.lineage(here.timeline);
    let unfit = |b: &BackupEntry| match being_pruned.contains(&b.head.id) {
        true => Some(format!("backup {} is being removed by a prune", b.head.id)),
        false => unfit(&b.head, &line, here),
    };
    let mut first = None;
    for backup in found {
        match unfit(backup) {
            None => return Ok(backup.clone()),
            Some(why) => first = first.or(Some(why)),
        }
    }
    Err(first.unwrap_or_else(|| match kind {
        BackupKind::Differential => "there is no full backup yet".to_owned(),
        _ => NO_BACKUP.to_owned(),
    }))
}

/// Why a backup cannot be a parent.
fn unfit(parent: &Manifest, line: &Lineage, here: Here) -> Option<String> {
    let Manifest { id, timeline, stop_lsn, .. } = parent;
    if !line.holds(*timeline, *stop_lsn) {
        let ended = format!("backup {id} ended at {stop_lsn} on timeline {timeline}");
        return Some(match line.ancestors.is_empty() && line.timeline > *timeline {
            true => format!(
                "{ended}, and the archive does not have the history of timeline {}, the server's",
                line.timeline
            ),
            false => {
                format!("{ended}, which is not in the past of timeline {}, the server's", line.timeline)
            }
        });
    }
    if parent.data_checksums != here.data_checksums {
        let word = |on| if on { "on" } else { "off" };
        return Some(format!(
            "data checksums are {} and were {} in backup {id}: pg_checksums wrote every page",
            word(here.data_checksums),
            word(parent.data_checksums)
        ));
    }
    if parent.damaged_pages.len() >= DAMAGED_PAGES_MAX {
        return Some(format!("backup {id} has more damaged pages than it names"));
    }
    None
}

/// Why a parent that fits cannot be used once it is known where the new backup starts.
pub(super) fn unfit_for_start(parent: &Manifest, start: Lsn) -> Option<String> {
    (parent.stop_lsn > start).then(|| {
        format!(
            "backup {} ended at {}, behind {start}, where this one starts: a standby has to replay a checkpoint in between",
            parent.id, parent.stop_lsn
        )
    })
}

/// The position up to which WAL must be in the archive so that every record before `start`, where a backup starts, is:
/// no record lies between a segment's beginning and its first record.
pub(super) fn needed_end(start: Lsn, size: SegmentSize) -> Lsn {
    let floor = size.floor(start);
    if start.bytes_since(floor) <= LONG_HEADER_BYTES as u64 { floor } else { start }
}

/// Whether the archive has the WAL between two positions.
#[derive(Debug, PartialEq)]
pub(super) enum Cover<'a> {
    /// All of it, in these segments.
    Whole(Vec<Step<'a>>),
    /// All there is, but it ends too early: more may be on its way, from here on.
    NotYet(Lsn),
    /// It never will have.
    Broken(String),
}

/// Looks along `line` for the WAL from `from` up to `until`, which [`needed_end`] gave.
pub(super) fn cover<'a>(catalog: &'a Catalog, line: &Lineage, from: Lsn, until: Lsn) -> Cover<'a> {
    let size = catalog.system.segment_size;
    if until <= from {
        return Cover::Whole(Vec::new());
    }
    let run = catalog.run(line, from);
    if let Some(gap) = run.broken.as_ref().filter(|gap| gap.to < until) {
        return Cover::Broken(format!("the WAL since then is not whole: {gap}"));
    }
    let steps: Vec<Step<'a>> = run.steps.into_iter().take_while(|s| s.start() < until).collect();
    let end = steps.last().map_or(size.floor(from), |last| {
        let whole = matches!(last.entry.info.ending, Ending::Full | Ending::Switch);
        let edge = last.entry.info.name.end(size).unwrap_or(Lsn::MAX);
        // What an ancestor's segment holds behind a fork is not of this line.
        if whole && last.usable_end == last.entry.info.valid_end { edge } else { last.usable_end }
    });
    if end >= until {
        return Cover::Whole(steps);
    }
    let on_line = |timeline: TimelineId, start: Lsn| {
        let mut parts = line.newest_first();
        parts.any(|(t, _, until)| t == timeline && until.is_none_or(|until| start < until))
    };
    let starts =
        catalog.segments.iter().filter_map(|s| Some((s.info.name.timeline(), s.info.name.start(size)?)));
    let beyond = starts.filter(|(timeline, start)| *start > end && on_line(*timeline, *start));
    match beyond.map(|(_, start)| start).min() {
        Some(next) => {
            let first = SegmentName::containing(line.timeline_at(end), end, size);
            let count = next.bytes_since(size.floor(end)).div_ceil(size.bytes());
            let more =
                if count > 1 { format!(" and {} after it", count.saturating_sub(1)) } else { String::new() };
            let unread = catalog.damaged.iter().any(|d| d.path.contains(&first.to_string()));
            let what = if unread { "cannot be read" } else { "is missing" };
            Cover::Broken(format!("the WAL since then is not whole: {first}{more} {what}"))
        }
        None => Cover::NotYet(end),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use waltide_format::archive::SegmentEntry;

    use super::*;
    use crate::testing::*;

    fn here(timeline: u32) -> Here {
        Here { timeline: t(timeline), data_checksums: true }
    }

    fn segments(timeline: u32, numbers: impl IntoIterator<Item = u64>) -> Vec<SegmentEntry> {
        numbers.into_iter().map(|n| segment(timeline, n)).collect()
    }

    fn chosen(catalog: &Catalog, kind: BackupKind, here: Here) -> Result<Lsn, String> {
        choose(catalog, kind, here, &[]).map(|b| b.head.start_lsn)
    }

    /// Three backups, the first and the last of them full.
    fn three() -> Catalog {
        let mut backups = [3, 6, 9].map(|n| backup(1, n, 0));
        backups[1].head.kind = BackupKind::Incremental;
        backups[2].head.kind = BackupKind::Incremental;
        catalog(segments(1, 2..12), backups.to_vec())
    }

    #[test]
    fn an_incremental_is_made_against_the_newest_and_a_differential_against_the_newest_full() {
        let c = three();
        assert_eq!(chosen(&c, BackupKind::Incremental, here(1)), Ok(c.backups[2].head.start_lsn));
        assert_eq!(chosen(&c, BackupKind::Differential, here(1)), Ok(c.backups[0].head.start_lsn));
        let pruned = [c.backups[2].head.id.clone()];
        let found = choose(&c, BackupKind::Incremental, here(1), &pruned).unwrap();
        assert_eq!(found.head.start_lsn, c.backups[1].head.start_lsn);
        let none = catalog(vec![], vec![]);
        assert_eq!(chosen(&none, BackupKind::Incremental, here(1)), Err(NO_BACKUP.to_owned()));
        let why = Err("there is no full backup yet".to_owned());
        assert_eq!(chosen(&none, BackupKind::Differential, here(1)), why);
    }

    #[test]
    fn what_ended_behind_a_fork_is_no_parent() {
        let mut c = three();
        let why = chosen(&c, BackupKind::Incremental, here(2)).unwrap_err();
        assert!(why.ends_with("the archive does not have the history of timeline 2, the server's"), "{why}");
        let at = c.backups[1].head.stop_lsn;
        c.lineages.insert(t(2), Lineage { ancestors: vec![(t(1), at)], timeline: t(2) });
        assert_eq!(chosen(&c, BackupKind::Incremental, here(2)), Ok(c.backups[1].head.start_lsn));
        // It started before the fork and ended behind it: its files may hold what timeline 2 never saw.
        let fork = at.saturating_sub(1);
        c.lineages.insert(t(2), Lineage { ancestors: vec![(t(1), fork)], timeline: t(2) });
        assert_eq!(chosen(&c, BackupKind::Incremental, here(2)), Ok(c.backups[0].head.start_lsn));
        c.backups.remove(0);
        let why = chosen(&c, BackupKind::Incremental, here(2)).unwrap_err();
        assert!(
            why.ends_with("on timeline 1, which is not in the past of timeline 2, the server's"),
            "{why}"
        );
    }

    #[test]
    fn a_parent_has_the_same_pages_and_names_all_that_are_damaged() {
        let mut c = catalog(segments(1, 2..12), vec![backup(1, 3, 0)]);
        let off = Here { data_checksums: false, ..here(1) };
        let why = chosen(&c, BackupKind::Incremental, off).unwrap_err();
        assert!(why.starts_with("data checksums are off and were on in backup "), "{why}");
        c.backups[0].head.damaged_pages = vec!["base/5/1:1".into(); DAMAGED_PAGES_MAX];
        let why = chosen(&c, BackupKind::Incremental, here(1)).unwrap_err();
        assert!(why.ends_with("has more damaged pages than it names"), "{why}");
        let parent = backup(1, 3, 0).head;
        assert_eq!(unfit_for_start(&parent, parent.stop_lsn), None);
        let why = unfit_for_start(&parent, parent.stop_lsn.saturating_sub(1)).unwrap();
        assert!(why.contains("a standby has to replay a checkpoint in between"), "{why}");
    }

    #[test]
    fn nothing_before_a_segments_first_record_has_to_be_there() {
        let at = |n: u64| Lsn::from(5 * SIZE + n);
        assert_eq!(needed_end(at(0), size()), at(0));
        assert_eq!(needed_end(at(40), size()), at(0));
        assert_eq!(needed_end(at(41), size()), at(41));
    }

    #[test]
    fn the_ancestors_segments_behind_a_fork_do_not_make_a_hole() {
        let mut c = catalog([segments(1, 2..12), segments(2, 5..7)].concat(), vec![]);
        let fork = Lsn::from(5 * SIZE + 900);
        let line = Lineage { ancestors: vec![(t(1), fork)], timeline: t(2) };
        let (from, until) = (Lsn::from(3 * SIZE + 500), Lsn::from(7 * SIZE + 50));
        assert_eq!(cover(&c, &line, from, until), Cover::NotYet(Lsn::from(7 * SIZE)));
        c.segments.extend(segments(2, [7]));
        let Cover::Whole(steps) = cover(&c, &line, from, until) else { panic!("not whole") };
        let names: Vec<_> = steps.iter().map(|s| s.entry.info.name.timeline().get()).collect();
        assert_eq!(names, [1, 1, 2, 2, 2]);
    }

    #[test]
    fn a_hole_is_named() {
        let mut c = catalog(segments(1, [2, 3, 6, 7]), vec![]);
        let line = Lineage::root(t(1));
        let of = |c: &Catalog| match cover(c, &line, Lsn::from(2 * SIZE), Lsn::from(7 * SIZE)) {
            Cover::Broken(why) => why,
            other => panic!("{other:?}"),
        };
        let first = segment(1, 4);
        let more = format!("the WAL since then is not whole: {} and 1 after it is missing", first.info.name);
        assert_eq!(of(&c), more);
        let error = "xl_crc".to_owned();
        c.damaged.push(waltide_format::archive::DamagedObject { path: first.path, error });
        assert!(of(&c).ends_with("and 1 after it cannot be read"), "{}", of(&c));
        c.segments.extend(segments(1, [4, 5]));
        c = catalog(c.segments, vec![]);
        c.segments[3].info.first_prev = Some(Lsn::from(7));
        assert!(of(&c).starts_with("the WAL since then is not whole: the WAL breaks at "), "{}", of(&c));
    }

    proptest! {
        #[test]
        fn the_wal_is_whole_exactly_where_every_segment_is_there(
            there in proptest::collection::btree_set(1u64..12, 0..12),
            from in SIZE..10 * SIZE, bytes in 1..5 * SIZE,
        ) {
            let (from, until) = (Lsn::from(from), Lsn::from(from + bytes));
            let c = catalog(segments(1, there.iter().copied()), vec![]);
            let mut needed = from.get() / SIZE..=(until.get() - 1) / SIZE;
            let missing = needed.clone().find(|n| !there.contains(n));
            match cover(&c, &Lineage::root(t(1)), from, until) {
                Cover::Whole(steps) => {
                    prop_assert_eq!(missing, None);
                    prop_assert!(needed.by_ref().eq(steps.iter().map(|s| s.start().get() / SIZE)));
                }
                Cover::NotYet(at) => {
                    prop_assert_eq!(missing.map(|n| n * SIZE), Some(at.get()));
                    prop_assert!(there.iter().all(|n| n * SIZE <= at.get()));
                }
                Cover::Broken(_) => prop_assert!(missing.is_some_and(|n| there.iter().any(|m| *m > n))),
            }
        }
    }
}
