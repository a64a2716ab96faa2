//! What can be restored to before a prune and not after it.

use std::collections::{BTreeMap, BTreeSet};

use waltide_format::archive::{Catalog, Coverage, RecoveryWindow};
use waltide_format::{BackupId, Lsn, TimestampTz};

use super::{Deletion, LostWindow, Verdict};

/// The catalogue as it will be.
pub(super) fn without(
    catalog: &Catalog,
    deletions: &[Deletion],
    verdicts: &BTreeMap<BackupId, Verdict>,
) -> Catalog {
    let gone: BTreeSet<&str> = deletions.iter().map(|d| d.path.as_str()).collect();
    let mut after = catalog.clone();
    after.segments.retain(|s| !gone.contains(s.path.as_str()));
    after.backups.retain(|b| verdicts.get(&b.head.id).is_none_or(|v| v.keep));
    after
}

/// What can be restored to before and not after.
pub(super) fn lost_windows(before: &Coverage, after: &Coverage) -> Vec<LostWindow> {
    let mut lost = Vec::new();
    for window in &before.windows {
        let mut left = after.windows.iter().filter(|w| w.timeline == window.timeline).collect::<Vec<_>>();
        left.sort_by_key(|w| w.from);
        let mut from = (window.from, window.from_time);
        for kept in left.iter().filter(|w| w.from <= window.to && w.to >= window.from) {
            if kept.from > from.0 {
                lost.push(lost_window(window, from, (kept.from, Some(kept.from_time))));
            }
            let after_kept = (kept.to, kept.to_time.unwrap_or(kept.from_time));
            from = from.max(after_kept);
        }
        if from.0 < window.to {
            lost.push(lost_window(window, from, (window.to, window.to_time)));
        }
    }
    lost
}

fn lost_window(
    window: &RecoveryWindow,
    from: (Lsn, TimestampTz),
    to: (Lsn, Option<TimestampTz>),
) -> LostWindow {
    LostWindow { timeline: window.timeline, from: from.0, from_time: from.1, to: to.0, to_time: to.1 }
}
