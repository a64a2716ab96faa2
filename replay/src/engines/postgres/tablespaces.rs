//! Keeps WAL that makes tablespaces from making them where the running server has its own.

use std::collections::BTreeMap;
use std::path::Path;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use waltide_format::Lsn;
use waltide_format::archive::{FileEventKind, Run, Step};
use waltide_format::engines::postgres::wal::{
    RedirectedTablespace, SegmentBytes, TablespaceRecord, make_tablespace_in_place,
};

use super::indexes::{ArchivedIndexes, SearchError};

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

/// Finds every CREATE TABLESPACE record that begins in `from..until` along `run`, and takes its path out.
pub(crate) async fn redirect(
    indexes: &ArchivedIndexes,
    run: &Run<'_>,
    from: Lsn,
    until: Lsn,
) -> Result<Redirected, SearchError> {
    let mut found = Redirected { segments: BTreeMap::new(), tablespaces: Vec::new() };
    let steps: Vec<_> = run.steps.iter().take_while(|step| step.start() < until).collect();
    let following = run.steps.iter().map(Some).skip(1).chain([None]);
    let pairs: Vec<_> = steps.into_iter().zip(following).collect();
    let looked = stream::iter(&pairs).map(|(step, next)| creations(indexes, step, *next)).buffered(AT_ONCE);
    let starts: Vec<_> = looked.try_collect().await?;
    for ((step, next), starts) in pairs.iter().zip(starts) {
        for record in starts {
            if from <= record && record < until.min(step.usable_end) {
                change(indexes, step, *next, record, &mut found).await?;
            }
        }
    }
    Ok(found)
}

/// Where the CREATE TABLESPACE records that begin in a segment start.
async fn creations(
    indexes: &ArchivedIndexes,
    step: &Step<'_>,
    next: Option<&Step<'_>>,
) -> Result<Vec<Lsn>, SearchError> {
    let index = indexes.index(step.entry).await?;
    let made = |kind: &FileEventKind| matches!(kind, FileEventKind::TablespaceCreate { .. });
    let mut starts: Vec<_> = index.file_events.iter().filter(|e| made(&e.kind)).map(|e| e.start).collect();
    // What was not put together when it was indexed is in no index.
    if let Some(pending) = index.info.pending.filter(|p| !p.joined)
        && let Some(next) = next
    {
        let edge = next.start();
        let pair = [step.entry, next.entry];
        let over = indexes.records(&pair, move |record| {
            let creates =
                matches!(TablespaceRecord::decode(record), Some(Ok(TablespaceRecord::Create { .. })));
            (record.end > edge).then_some(creates && record.start < edge)
        });
        if over.await? == Some(true) {
            starts.push(pending.start);
        }
    }
    Ok(starts)
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
