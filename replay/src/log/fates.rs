//! What became of relations whose files went with a transaction: dropped, emptied, or put into other files.
//!
//! The log says which files a commit removes, not why. TRUNCATE, like every rewrite, gives a relation a new file and
//! removes the old one. Where names are known, a relation that has a new file under its old OID was not dropped; else
//! the rows that the transaction changed in pg_class tell: a drop deletes one, TRUNCATE only updates some.

use std::collections::BTreeMap;

use waltide_format::archive::RelationWork;
use waltide_format::engines::postgres::catalogue::{TableEvent, TableEventKind};
use waltide_format::{Oid, RelFileLocator};

/// The number of pg_class' first file in every database; it gets another by VACUUM FULL only.
const PG_CLASS: Oid = 1259;

/// What a transaction did that bears on its files.
#[derive(Debug, Clone, Copy)]
pub(super) struct Evidence<'a> {
    /// The files that went, in the order of the commit's record: the last to be given up first.
    pub(super) gone: &'a [RelFileLocator],
    /// The files that were made, in order.
    pub(super) made: &'a [RelFileLocator],
    /// What it did to relations, by rising file.
    pub(super) relations: &'a [RelationWork],
    /// Relations that it cut to no block at all.
    pub(super) emptied: &'a [RelFileLocator],
    /// Whether a TRUNCATE command is in the log.
    pub(super) truncate_logged: bool,
}

/// What became of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Fates {
    pub(super) created: Vec<RelFileLocator>,
    pub(super) dropped: Vec<RelFileLocator>,
    pub(super) truncated: Vec<RelFileLocator>,
    pub(super) rewritten: Vec<RelFileLocator>,
}

/// Judges the files of one transaction. `oid_of` tells whose a file was, where that is known, and `events` what became
/// of tables.
pub(super) fn fates(
    evidence: &Evidence<'_>,
    oid_of: impl Fn(RelFileLocator) -> Option<Oid>,
    events: &[TableEvent],
) -> Fates {
    // What came and went with the transaction was never there for anybody else.
    let without = |files: &[RelFileLocator], others: &[RelFileLocator]| -> Vec<_> {
        files.iter().filter(|file| !others.contains(file)).copied().collect()
    };
    let (gone, made) = (without(evidence.gone, evidence.made), without(evidence.made, evidence.gone));
    let evidence = &Evidence { gone: &gone, made: &made, ..*evidence };
    let pairs = pairs(evidence, &oid_of);
    let became = |file: RelFileLocator| {
        let oid = oid_of(file)?;
        let is_it = |e: &&TableEvent| (e.database, e.oid) == (file.db_oid, oid);
        events.iter().filter(is_it).find(|e| !matches!(e.kind, TableEventKind::Renamed { .. }))
    };
    let mut fates = Fates::default();
    for gone in evidence.gone {
        let kind = became(*gone).map(|event| &event.kind);
        match pairs.iter().find(|(old, _)| old == gone) {
            _ if kind == Some(&TableEventKind::Truncated) => fates.truncated.push(*gone),
            _ if kind == Some(&TableEventKind::Rewritten) => fates.rewritten.push(*gone),
            Some((old, Some(new))) if is_emptied(evidence, *old, *new) => fates.truncated.push(*gone),
            Some(_) => fates.rewritten.push(*gone),
            None => fates.dropped.push(*gone),
        }
    }
    let is_new = |file: &&RelFileLocator| !pairs.iter().any(|(_, new)| *new == Some(**file));
    fates.created = evidence.made.iter().filter(is_new).copied().collect();
    // A relation is emptied in place where the same transaction made its file.
    fates.truncated.extend(evidence.emptied.iter().filter(|file| evidence.made.contains(file)));
    fates
}

/// The files that went while their relation stayed, each with the new one where it is known.
fn pairs(
    evidence: &Evidence<'_>,
    oid_of: &impl Fn(RelFileLocator) -> Option<Oid>,
) -> Vec<(RelFileLocator, Option<RelFileLocator>)> {
    let (gone, made) = (evidence.gone, evidence.made);
    if made.is_empty() {
        return Vec::new();
    }
    let oids: BTreeMap<Oid, RelFileLocator> =
        made.iter().filter_map(|file| Some((oid_of(*file)?, *file))).collect();
    if !oids.is_empty() {
        let named = |old: &RelFileLocator| Some((*old, Some(*oids.get(&oid_of(*old)?)?)));
        return gone.iter().filter_map(named).collect();
    }
    let pg_class = evidence.relations.iter().filter(|r| r.relation.rel_number == PG_CLASS);
    let (updated, deleted) =
        pg_class.fold((0u64, 0u64), |(u, d), r| (u.saturating_add(r.updated), d.saturating_add(r.deleted)));
    if deleted > 0 || (updated == 0 && !evidence.truncate_logged) {
        return Vec::new();
    }
    if gone.len() != made.len() {
        return gone.iter().map(|old| (*old, None)).collect();
    }
    gone.iter().copied().zip(made.iter().rev().copied().map(Some)).collect()
}

/// Whether nothing but new rows went into the new file, which lies where the old one lay: indexes are never empty, and
/// a relation that moves to another tablespace is copied by images. (A hint bit may be logged by an image, of rows.)
fn is_emptied(evidence: &Evidence<'_>, old: RelFileLocator, new: RelFileLocator) -> bool {
    let written = evidence.relations.iter().find(|r| r.relation == new);
    (old.spc_oid, old.db_oid) == (new.spc_oid, new.db_oid)
        && written.is_none_or(|r| r.other_records == 0 || r.has_rows())
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn file(rel_number: Oid) -> RelFileLocator {
        RelFileLocator { spc_oid: 1663, db_oid: 5, rel_number }
    }

    const fn pg_class(inserted: u64, updated: u64, deleted: u64) -> RelationWork {
        let relation = file(PG_CLASS);
        RelationWork {
            relation,
            inserted,
            updated,
            deleted,
            records: 9,
            other_records: 0,
            taken_back: 0,
            hot: 0,
        }
    }

    fn judge(gone: &[Oid], made: &[Oid], relations: &[RelationWork]) -> [Vec<Oid>; 4] {
        judge_named(gone, made, relations, |_| None)
    }

    fn judge_named(
        gone: &[Oid],
        made: &[Oid],
        relations: &[RelationWork],
        oid_of: impl Fn(RelFileLocator) -> Option<Oid>,
    ) -> [Vec<Oid>; 4] {
        let files = |numbers: &[Oid]| numbers.iter().map(|n| file(*n)).collect::<Vec<_>>();
        let evidence = Evidence {
            gone: &files(gone),
            made: &files(made),
            relations,
            emptied: &[],
            truncate_logged: false,
        };
        let Fates { created, dropped, truncated, rewritten } = fates(&evidence, oid_of, &[]);
        [created, dropped, truncated, rewritten].map(|list| list.iter().map(|f| f.rel_number).collect())
    }

    /// A bare image, as the first page of an index is logged.
    fn index(number: Oid) -> RelationWork {
        RelationWork { relation: file(number), records: 1, other_records: 1, ..RelationWork::default() }
    }

    #[test]
    fn a_drop_deletes_from_pg_class() {
        assert_eq!(judge(&[20, 21], &[], &[pg_class(0, 0, 2)]), [vec![], vec![20, 21], vec![], vec![]]);
        assert_eq!(judge(&[20], &[], &[]), [vec![], vec![20], vec![], vec![]]);
        let own = judge(&[20, 30], &[30], &[pg_class(1, 0, 2)]);
        assert_eq!(own, [vec![], vec![20], vec![], vec![]], "30 was its own affair");
    }

    #[test]
    fn a_truncate_gives_new_files_and_deletes_nothing() {
        // The table, then its index, got new files; the commit lists the old ones backwards.
        let found = judge(&[21, 20], &[30, 31], &[pg_class(0, 2, 0), index(31)]);
        assert_eq!(found, [vec![], vec![], vec![20], vec![21]]);
    }

    #[test]
    fn a_table_filled_after_its_truncate_is_truncated() {
        let rows = RelationWork {
            relation: file(30),
            records: 6,
            other_records: 1,
            inserted: 5,
            ..RelationWork::default()
        };
        assert_eq!(judge(&[20], &[30], &[pg_class(0, 1, 0), rows]), [vec![], vec![], vec![20], vec![]]);
    }

    #[test]
    fn a_table_dropped_and_made_again_in_one_transaction_is_dropped() {
        assert_eq!(judge(&[20], &[30], &[pg_class(1, 0, 1)]), [vec![30], vec![20], vec![], vec![]]);
    }

    #[test]
    fn where_files_cannot_be_paired_nothing_is_called_dropped() {
        let found = judge(&[20], &[30, 31], &[pg_class(1, 1, 0)]);
        assert_eq!(found, [vec![30, 31], vec![], vec![], vec![20]]);
    }

    #[test]
    fn names_decide_where_they_are_known() {
        // VACUUM FULL deletes the row of its transient table.
        let oid = |f: RelFileLocator| Some(if f.rel_number == 30 { 20 } else { f.rel_number });
        let rewrite = [pg_class(1, 2, 1), index(30)];
        assert_eq!(judge_named(&[20], &[30], &rewrite, oid), [vec![], vec![], vec![], vec![20]]);
        let own = |f: RelFileLocator| Some(f.rel_number);
        assert_eq!(
            judge_named(&[20], &[30], &[pg_class(0, 9, 0)], own),
            [vec![30], vec![20], vec![], vec![]]
        );
    }

    #[test]
    fn what_the_same_transaction_made_is_emptied_in_place() {
        let evidence = Evidence {
            gone: &[],
            made: &[file(30)],
            relations: &[],
            emptied: &[file(30), file(40)],
            truncate_logged: false,
        };
        let found = fates(&evidence, |_| None, &[]);
        assert_eq!(
            (found.created, found.truncated),
            (vec![file(30)], vec![file(30)]),
            "vacuum cut the other"
        );
    }
}
