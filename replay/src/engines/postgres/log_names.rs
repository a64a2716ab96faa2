//! The names that the log shows: followed from each backup to the next, one stretch at a time.

use std::collections::BTreeSet;

use waltide_format::archive::{BackupEntry, Catalog, Lineage, SystemLayout};
use waltide_format::engines::postgres::catalogue::{Names as Followed, TableEvent};
use waltide_format::{BackupId, Lsn, Oid, RelFileLocator};
use waltide_storage::Archive;

use super::names::{NamesError, follow};
use crate::log::{DatabaseMatch, LogFilter, Meant, Names, RelationName};

/// Names out of the archive's backups and the WAL behind them. Where they cannot be known, this is said as a warning,
/// and there are none.
#[derive(Debug)]
pub struct ArchivedNames<'a> {
    archive: &'a Archive,
    layout: SystemLayout,
    catalog: &'a Catalog,
    line: &'a Lineage,
    /// In the order of their starts.
    backups: Vec<&'a BackupEntry>,
    held: Option<Held>,
    /// Backups of which it was said that names are not known.
    warned: BTreeSet<BackupId>,
}

/// What is known of the stretch behind one backup.
#[derive(Debug)]
struct Held {
    backup: usize,
    /// Up to where it was asked for.
    asked: Lsn,
    /// Up to where it was followed; a hole may come first.
    to: Lsn,
    known: Option<(Followed, Vec<TableEvent>)>,
    /// Whether they could not be followed, and not for want of WAL.
    failed: bool,
}

/// Names, what became of tables, and up to where that is known.
type Loaded = (Followed, Vec<TableEvent>, Lsn);

impl<'a> ArchivedNames<'a> {
    /// Those along `line`.
    pub fn new(archive: &'a Archive, layout: SystemLayout, catalog: &'a Catalog, line: &'a Lineage) -> Self {
        let mut backups: Vec<_> = catalog.backups.iter().filter(|b| b.is_on(line)).collect();
        backups.sort_by_key(|b| b.head.start_lsn);
        Self { archive, layout, catalog, line, backups, held: None, warned: BTreeSet::new() }
    }

    /// The backup whose names hold at a place, up to where: the last that began before it, or the first of all.
    fn nearest(&self, at: Lsn) -> Option<(usize, &'a BackupEntry, Lsn)> {
        let nth = self.backups.partition_point(|b| b.head.start_lsn <= at).saturating_sub(1);
        let next = self.backups.get(nth.saturating_add(1)).map_or(Lsn::MAX, |b| b.head.start_lsn);
        Some((nth, *self.backups.get(nth)?, next))
    }

    async fn load(&mut self, backup: &BackupEntry, to: Lsn) -> Result<Option<Loaded>, NamesError> {
        let head = &backup.head;
        let run = self.catalog.run(self.line, head.start_lsn);
        let Some(end) = run.end().filter(|end| *end >= head.stop_lsn) else { return Ok(None) };
        // A backup's files are of its start up to its end.
        let to = to.max(head.stop_lsn).min(end);
        match follow(self.archive, self.layout.clone(), backup, &run, to).await {
            Ok(followed) => {
                let events = followed.names.table_events();
                Ok(Some((followed.names, events, to)))
            }
            Err(e) => {
                let cause = std::error::Error::source(&e).map(|c| format!(": {c}")).unwrap_or_default();
                if self.warned.insert(head.id.clone()) {
                    tracing::warn!("names are not known behind backup {}: {e}{cause}", head.id);
                }
                Err(e)
            }
        }
    }

    fn known(&self, at: Lsn) -> Option<&(Followed, Vec<TableEvent>)> {
        self.held.as_ref().filter(|held| at < held.to)?.known.as_ref()
    }
}

impl Names for ArchivedNames<'_> {
    async fn come_to(&mut self, at: Lsn, until: Lsn) {
        let Some((nth, backup, next)) = self.nearest(at) else { return };
        if self.held.as_ref().is_some_and(|held| held.backup == nth && until.min(next) <= held.asked) {
            return;
        }
        let asked = until.min(next);
        let loaded = self.load(backup, asked).await;
        let failed = loaded.is_err();
        let loaded = loaded.ok().flatten();
        let to = loaded.as_ref().map_or(Lsn::ZERO, |(_, _, to)| *to);
        let known = loaded.map(|(names, mut events, _)| {
            // They come in the order of what recovery must stop before, which is earlier where a database went.
            events.sort_by_key(|e| e.commit.start);
            (names, events)
        });
        self.held = Some(Held { backup: nth, asked, to, known, failed });
    }

    fn relation(&self, file: RelFileLocator, commit: Lsn) -> Option<RelationName> {
        self.known(commit)?.0.of_file(file, commit).map(RelationName::from)
    }

    fn database(&self, oid: Oid, commit: Lsn) -> Option<String> {
        self.known(commit)?.0.database(oid, commit).map(str::to_owned)
    }

    fn events(&self, commit: Lsn) -> &[TableEvent] {
        let Some((_, events)) = self.known(commit) else { return &[] };
        let from = events.partition_point(|e| e.commit.start < commit);
        let to = events.partition_point(|e| e.commit.start <= commit);
        events.get(from..to).unwrap_or_default()
    }

    async fn meant(&mut self, filter: &LogFilter, from: Lsn, until: Lsn) -> Option<Meant> {
        let mut meant = filter.meant_by_number();
        let mut at = from;
        while let Some((_, _, next)) = self.nearest(at) {
            self.come_to(at, until).await;
            let held = self.held.as_ref()?;
            if held.failed {
                return None;
            }
            if let Some((names, events)) = &held.known {
                if let Some(relation) = &filter.relation {
                    meant.files.extend(names.files_where(|oid, name| relation.may_be(oid, name)));
                    let ours = events.iter().filter(|event| relation.has_event(event));
                    meant.commits.extend(ours.map(|event| (event.commit.start, event.commit.end)));
                }
                if let Some(DatabaseMatch::Name(name)) = &filter.database {
                    meant.databases.extend(names.databases_named(name));
                }
            }
            if next >= until {
                break;
            }
            at = next;
        }
        Some(meant)
    }
}
