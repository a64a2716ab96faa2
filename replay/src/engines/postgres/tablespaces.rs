//! Keeps WAL that makes tablespaces from making them where the running server has its own.

use std::collections::BTreeMap;
use std::path::Path;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use waltide_format::Lsn;
use waltide_format::archive::{
    Catalog, FileEvent, FileEventKind, Layout, MergedSection, Run, Step, Tablespace,
};
use waltide_format::engines::postgres::wal::{
    RedirectedTablespace, SegmentBytes, TablespaceRecord, make_tablespace_in_place,
};
use waltide_storage::Archive;

use super::indexes::{ArchivedIndexes, SearchError};
use crate::plan::Plan;

/// How many indexes are read at once.
const AT_ONCE: usize = 8;

/// A segment's bytes with the paths taken out of its CREATE TABLESPACE records.
#[derive(Debug)]
pub(crate) struct Redirected {
    /// The segments to be given to recovery instead of the archived ones, by name.
    pub(crate) segments: BTreeMap<String, Vec<u8>>,
    /// The tablespaces that will be made inside the data directory.
    pub(crate) tablespaces: Vec<RedirectedTablespace>,
}

/// The tablespaces that recovery to a plan's stop will make, wherever the WAL says: not moved by any mapping.
pub async fn made_tablespaces(
    archive: &Archive,
    layout: &Layout,
    catalog: &Catalog,
    plan: &Plan,
) -> Result<Vec<Tablespace>, SearchError> {
    let run = catalog.run(&plan.lineage, plan.start_lsn);
    let indexes = ArchivedIndexes::new(archive.clone());
    let indexes = indexes.with_merged(layout.system(catalog.system.system_id));
    let found = creations(&indexes, &run, plan.start_lsn, plan.stop.read_to).await?;
    // One without a path lies in the data directory.
    Ok(found.into_iter().map(|c| c.tablespace).filter(|t| !t.path.is_empty()).collect())
}

/// Finds every CREATE TABLESPACE record that begins in `from..until` along `run`, and takes its path out.
pub(crate) async fn redirect(
    indexes: &ArchivedIndexes,
    run: &Run<'_>,
    from: Lsn,
    until: Lsn,
) -> Result<Redirected, SearchError> {
    let mut found = Redirected { segments: BTreeMap::new(), tablespaces: Vec::new() };
    for creation in creations(indexes, run, from, until).await? {
        let next = run.steps.get(creation.step.saturating_add(1));
        if let Some(step) = run.steps.get(creation.step) {
            change(indexes, step, next, creation.record, &mut found).await?;
        }
    }
    Ok(found)
}

/// A CREATE TABLESPACE record.
#[derive(Debug)]
struct Creation {
    /// The step of the run that it begins in.
    step: usize,
    record: Lsn,
    tablespace: Tablespace,
}

/// The CREATE TABLESPACE records that begin in `from..until` along `run`.
async fn creations(
    indexes: &ArchivedIndexes,
    run: &Run<'_>,
    from: Lsn,
    until: Lsn,
) -> Result<Vec<Creation>, SearchError> {
    let steps: Vec<_> = run.steps.iter().take_while(|step| step.start() < until).collect();
    let mut found: Vec<(Lsn, Tablespace)> = Vec::new();
    let mut covered = vec![false; steps.len()];
    for cover in indexes.merged_lists(&steps, MergedSection::FileEvents).await? {
        let Some([first, .., last]) = steps.get(cover.steps.clone()) else { continue };
        // It may go on behind a fork, and have begun before what is wanted of it.
        let here = |record: Lsn| record < last.usable_end && (cover.from_first || record >= first.start());
        found.extend(made_in(cover.told.file_events).filter(|(record, _)| here(*record)));
        covered.get_mut(cover.steps).unwrap_or_default().fill(true);
    }
    let alone = steps.iter().zip(&covered).filter(|(_, covered)| !**covered);
    let read = alone.map(|(step, _)| indexes.index(step.entry));
    let mut read = stream::iter(read.collect::<Vec<_>>()).buffered(AT_ONCE);
    while let Some(index) = read.try_next().await? {
        found.extend(made_in(index.file_events));
    }
    // What was put together with neither neighbour is in no index.
    for (step, next) in steps.iter().zip(run.steps.iter().skip(1)) {
        let open = step.entry.info.pending.is_some_and(|p| !p.joined);
        if open && !next.entry.info.head_joined && !next.entry.info.overwrites_contrecord {
            found.extend(made_over_edge(indexes, step, next).await?);
        }
    }
    // A record that runs over an edge may be in both segments' indexes.
    found.sort_by_key(|(record, _)| *record);
    found.dedup_by_key(|(record, _)| *record);
    let creation = |(record, tablespace): (Lsn, Tablespace)| {
        let step = steps.partition_point(|step| step.start() <= record).checked_sub(1)?;
        let here = from <= record && record < until.min(steps.get(step)?.usable_end);
        here.then_some(Creation { step, record, tablespace })
    };
    Ok(found.into_iter().filter_map(creation).collect())
}

/// The CREATE TABLESPACE records among what happened to files.
fn made_in(events: Vec<FileEvent>) -> impl Iterator<Item = (Lsn, Tablespace)> {
    events.into_iter().filter_map(|e| match e.kind {
        FileEventKind::TablespaceCreate { spc_oid, path } => {
            Some((e.start, Tablespace { oid: spc_oid, path }))
        }
        _ => None,
    })
}

/// The CREATE TABLESPACE record that runs over the edge between two segments, if it is one.
async fn made_over_edge(
    indexes: &ArchivedIndexes,
    step: &Step<'_>,
    next: &Step<'_>,
) -> Result<Option<(Lsn, Tablespace)>, SearchError> {
    let edge = next.start();
    let pair = [step.entry, next.entry];
    let over = indexes.records(&pair, move |record| {
        let create = match TablespaceRecord::decode(record) {
            Some(Ok(TablespaceRecord::Create { spc_oid, path })) if record.start < edge => {
                Some((record.start, Tablespace { oid: spc_oid, path }))
            }
            _ => None,
        };
        (record.end > edge).then_some(create)
    });
    Ok(over.await?.flatten())
}

async fn change(
    indexes: &ArchivedIndexes,
    step: &Step<'_>,
    next: Option<&Step<'_>>,
    record: Lsn,
    found: &mut Redirected,
) -> Result<(), SearchError> {
    let size = step.entry.info.size;
    let mut parts = Vec::new();
    for part in std::iter::once(step).chain(next) {
        let name = part.entry.info.name.to_string();
        let (wal, changed) = match found.segments.remove(&name) {
            Some(wal) => (wal, true),
            None => (indexes.wal(part.entry).await?, false),
        };
        let crc = crc32fast::hash(&wal);
        parts.push((name, part.start(), wal, crc, changed));
    }
    let bytes = parts.iter_mut().map(|(_, start, wal, ..)| SegmentBytes { start: *start, wal });
    let told = make_tablespace_in_place(&mut bytes.collect::<Vec<_>>(), size, record)
        .map_err(|source| SearchError::Damaged { path: step.entry.path.clone(), source })?;
    for (name, _, mut wal, crc, changed) in parts {
        if changed || crc32fast::hash(&wal) != crc {
            // PostgreSQL takes nothing but whole segments.
            wal.resize(usize::try_from(size.bytes()).unwrap_or(wal.len()), 0);
            found.segments.insert(name, wal);
        }
    }
    found.tablespaces.push(told);
    Ok(())
}

/// The restore_command that gives recovery the segments in `dir` first.
pub(crate) fn restore_command(dir: &Path, otherwise: &str) -> String {
    let dir = dir.display().to_string().replace('\'', r"'\''").replace('%', "%%");
    format!("if [ -f '{dir}/%f' ]; then cp '{dir}/%f' \"%p\"; else {otherwise}; fi")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_changed_segments_come_first_and_the_status_of_the_other_command_stays() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("it's 100 %");
        std::fs::create_dir(&place).unwrap();
        std::fs::write(place.join("A"), "a").unwrap();
        let dest = dir.path().join("dest");
        let run = |name: &str| {
            let command = restore_command(&place, "exit 126").replace("%%", "\0");
            let command =
                command.replace("%f", name).replace("%p", dest.to_str().unwrap()).replace('\0', "%");
            std::process::Command::new("sh").arg("-c").arg(command).status().unwrap().code()
        };
        assert_eq!((run("A"), run("B")), (Some(0), Some(126)));
        assert_eq!(std::fs::read(dest).unwrap(), b"a");
    }
}
