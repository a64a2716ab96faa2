//! The first and the last commit of each recovery window, out of the few indexes that have them.

use waltide_format::Lsn;
use waltide_format::archive::{Catalog, RecoveryWindow, SegmentEntry, SegmentIndex, Step, WindowCommit};
use waltide_storage::{Archive, StorageError};

use crate::stored_segments::{ReadError, read_index};

/// Fills in the commits at the ends of windows. One whose segment cannot be read stays unknown: what is wrong with that
/// segment is told by whoever looks at segments.
pub async fn fill(
    archive: &Archive,
    catalog: &Catalog,
    windows: &mut [RecoveryWindow],
) -> Result<(), StorageError> {
    for window in windows {
        let run = catalog.run(&catalog.lineage(window.timeline), window.from);
        window.first_commit = search(archive, holding(&run.steps, window, false), window, false).await?;
        window.last_commit = search(archive, holding(&run.steps, window, true), window, true).await?;
    }
    Ok(())
}

/// The segments that have commits of the window, the one nearest to the end that is asked for first.
fn holding<'a>(steps: &[Step<'a>], window: &RecoveryWindow, last: bool) -> Vec<&'a SegmentEntry> {
    let has = |s: &&Step<'_>| s.entry.info.commits > 0 && s.start() < window.to;
    let mut found: Vec<_> = steps.iter().filter(has).map(|s| s.entry).collect();
    if last {
        found.reverse();
    }
    found
}

/// The segment in which a window begins or ends may have commits only outside of it, so that the next one is needed;
/// a third only where all of a segment's commits lie in a part of it that is not on the line.
async fn search(
    archive: &Archive,
    segments: Vec<&SegmentEntry>,
    window: &RecoveryWindow,
    last: bool,
) -> Result<Option<WindowCommit>, StorageError> {
    for entry in segments {
        let index = match read_index(archive, &entry.path).await {
            Ok(index) => index,
            Err(e) if e.is_bad_object() => return Ok(None),
            Err(ReadError::Storage(e)) => return Err(e),
            Err(ReadError::Damaged { .. }) => return Ok(None),
        };
        let found = commit(&index, window.from, window.to, last);
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// The first or the last commit of an index that ends in `from..=to`, its own part of it. A commit that ends at `from`
/// itself is in the backup.
fn commit(index: &SegmentIndex, from: Lsn, to: Lsn, last: bool) -> Option<WindowCommit> {
    let inside = index.xacts.iter().filter(|x| x.kind.is_commit() && from < x.end && x.end <= to);
    let mut commits = inside.map(|x| WindowCommit { xid: x.xid, time: x.time, lsn: x.end });
    if last { commits.next_back() } else { commits.next() }
}
