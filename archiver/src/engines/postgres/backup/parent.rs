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
