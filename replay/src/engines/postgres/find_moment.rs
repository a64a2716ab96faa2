//! Searches an archive for the moment before a table was dropped or emptied: the newest backup's WAL first, then that
//! between each older backup and the next.

use std::collections::HashMap;

use waltide_format::archive::{Catalog, Layout};
use waltide_format::engines::postgres::catalogue::{
    CatalogueFiles, PartitionsTruncated, TableEvent, TableName,
};
use waltide_format::{Lsn, TimestampTz, Xid};
use waltide_storage::Archive;

use super::names::{NamesError, follow, follow_in};
use crate::moment::{Happened, Loss, Meaning, Moment, MomentRequest, find, near};
use crate::plan::{PlanError, candidates};
use crate::target::TargetTimeline;

/// Why no moment was found.
#[derive(Debug, thiserror::Error)]
pub enum MomentError {
    /// There is nothing to search.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The names could not be followed.
    #[error("the archive could not be searched for the table")]
    Names(#[from] NamesError),
    /// Several tables have the name.
    #[error(
        "{request} is said of more than one table:{}\nhint: say its whole name, database.schema.table, in double quotes what has upper-case letters",
        told(found)
    )]
    Ambiguous {
        /// What was asked.
        request: String,
        /// The tables, each with when it happened last.
        found: Vec<(TableName, Happened)>,
    },
    /// Nothing of the kind happened.
    #[error("the archived WAL does not say {what}\nsearched: {}{}", searched_text(searched), near_text(near))]
    NotFound {
        /// What it does not say.
        what: String,
        /// What was searched.
        searched: Vec<Searched>,
        /// What comes near.
        near: Vec<String>,
    },
}

impl MomentError {
    /// Whether the archive is at fault.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Names(e) => e.is_damage(),
            _ => false,
        }
    }
}

/// A stretch of the log that was searched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Searched {
    /// Its start, a backup's.
    pub from: Lsn,
    /// When that backup began.
    pub from_time: TimestampTz,
    /// Its end.
    pub to: Lsn,
    /// The last commit in it.
    pub to_time: Option<TimestampTz>,
    /// Rows and changes in it that could not be understood.
    pub unread: u64,
}

fn told(found: &[(TableName, Happened)]) -> String {
    found.iter().map(|(name, h)| format!("\n  {name}, by transaction {} of {}", h.xid, h.time)).collect()
}

fn searched_text(searched: &[Searched]) -> String {
    let one = |s: &Searched| {
        let until = s.to_time.map_or(String::new(), |time| format!(", {time}"));
        let unread = match s.unread {
            0 => String::new(),
            n => format!(" ({n} rows in it could not be read)"),
        };
        format!("{}, {} to {}{until}{unread}", s.from, s.from_time, s.to)
    };
    match searched {
        [] => "nothing, for no backup has its WAL".to_owned(),
        some => some.iter().map(one).collect::<Vec<_>>().join("; "),
    }
}

fn near_text(near: &[String]) -> String {
    near.iter().map(|line| format!("\nhint: {line}")).collect()
}

/// Finds the moment that is asked for along the line that `timeline` means.
pub async fn find_moment(
    archive: &Archive,
    layout: &Layout,
    catalog: &Catalog,
    timeline: TargetTimeline,
    request: &MomentRequest,
) -> Result<Moment, MomentError> {
    let system = layout.system(catalog.system.system_id);
    let candidates = candidates(catalog, timeline, None)?;
    // Backups of other lines have another past.
    let line = candidates.first().map(|newest| newest.line.clone());
    let usable = candidates.iter().filter(|c| Some(&c.line) == line.as_ref() && c.usable(catalog).is_ok());
    let mut searched: Vec<Searched> = Vec::new();
    let mut events: Vec<TableEvent> = Vec::new();
    let mut partly: Vec<PartitionsTruncated> = Vec::new();
    let mut there: Option<Vec<TableName>> = None;
    let mut prepared: HashMap<Xid, Option<String>> = HashMap::new();
    // Newest first; each up to where the one after it was searched from.
    let mut until = Lsn::MAX;
    for candidate in usable {
        let (entry, run) = (candidate.entry, &candidate.run);
        let start = entry.head.start_lsn;
        if start >= until {
            continue;
        }
        let to = run.end().unwrap_or(start).min(until);
        let followed = follow(archive, system.clone(), entry, run, to).await?;
        there.get_or_insert_with(|| followed.names.tables().collect());
        let mut found = followed.names.table_events();
        // What became of a partitioned table is what became of its partitions.
        let is_ours = |name: &TableName| request.table.matches(name);
        if request.loss == Loss::Truncate && followed.names.has_partitioned(is_ours) {
            let files = CatalogueFiles::default().with_inherits();
            let with_parents = follow_in(archive, system.clone(), entry, run, to, files).await?.names;
            let truncated = with_parents.partitions_truncated(&found).into_iter();
            let (whole, some): (Vec<_>, Vec<_>) =
                truncated.filter(|t| is_ours(&t.event.table)).partition(PartitionsTruncated::is_whole);
            found.extend(whole.into_iter().map(|t| t.event));
            found.sort_by(|a, b| (a.before, &a.table).cmp(&(b.before, &b.table)));
            partly.splice(..0, some);
        }
        events.splice(..0, found);
        for (xid, gid) in followed.prepared {
            let known = prepared.entry(xid).or_default();
            *known = known.take().or(gid);
        }
        let mut before = run.steps.iter().rev().filter(|s| s.start() < to);
        let to_time = before.find_map(|s| s.entry.info.last_commit_time);
        let (from_time, unread) = (entry.head.started, followed.unread);
        searched.push(Searched { from: start, from_time, to, to_time, unread });
        until = start;
        // A bare name may mean public's table, which may have gone earlier than others of the name.
        if !request.table.is_bare() && matches!(find(request, &events), Meaning::One(_)) {
            break;
        }
    }
    match find(request, &events) {
        Meaning::One(mut moment) => {
            if let Some(gid) = prepared.remove(&moment.xid) {
                moment.prepared = true;
                moment.gid = gid;
            }
            Ok(*moment)
        }
        Meaning::Several(found) => Err(MomentError::Ambiguous { request: request.to_string(), found }),
        Meaning::None => Err(MomentError::NotFound {
            what: request.what(),
            searched,
            near: near(request, &events, &partly, &there.unwrap_or_default()),
        }),
    }
}
