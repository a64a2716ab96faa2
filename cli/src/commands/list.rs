//! `waltide list`: the backups there are.

use serde::Serialize;
use waltide_format::archive::{BackupEntry, BackupKind, BackupMethod, Catalog, Coverage, Keep};
use waltide_format::{BackupId, Lsn, TimelineId, TimestampTz};

use crate::context::Context;
use crate::exit::Failure;
use crate::output;

/// List the backups, newest first
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only so many
    #[arg(long, short = 'n', value_name = "N")]
    last: Option<usize>,
}

/// A backup as `list` and `info` tell it.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) id: BackupId,
    pub(super) kind: BackupKind,
    method: BackupMethod,
    parent: Option<BackupId>,
    /// Why everything was read though less was asked for.
    full_because: Option<String>,
    pub(super) description: Option<String>,
    started: TimestampTz,
    pub(super) stopped: TimestampTz,
    pub(super) timeline: TimelineId,
    start_lsn: Lsn,
    pub(super) stop_lsn: Lsn,
    pub(super) files: u64,
    pub(super) cluster_bytes: u64,
    pub(super) read_bytes: u64,
    pub(super) referred_bytes: u64,
    pub(super) stored_bytes: u64,
    pub(super) keep: Option<Keep>,
    pub(super) damaged_pages: usize,
    /// Whether its WAL is there and whole, so that it can be restored at all.
    pub(super) restorable: bool,
    /// How far recovery can go from it, by timeline.
    pub(super) reaches: Vec<Reach>,
}

/// How far recovery can go along one timeline.
#[derive(Debug, Serialize)]
pub(super) struct Reach {
    pub(super) timeline: TimelineId,
    pub(super) lsn: Lsn,
    pub(super) time: Option<TimestampTz>,
}

impl Row {
    pub(super) fn new(entry: &BackupEntry, coverage: &Coverage) -> Self {
        let head = &entry.head;
        let windows = coverage.windows.iter().filter(|w| w.backups.contains(&head.id));
        let reach = windows.map(|w| Reach { timeline: w.timeline, lsn: w.to, time: w.to_time });
        Self {
            id: head.id.clone(),
            kind: head.kind,
            method: head.method,
            parent: head.parent.clone(),
            full_because: head.full_because.clone(),
            description: head.description.clone(),
            started: head.started,
            stopped: head.stopped,
            timeline: head.timeline,
            start_lsn: head.start_lsn,
            stop_lsn: head.stop_lsn,
            files: entry.files,
            cluster_bytes: head.stats.cluster_bytes,
            read_bytes: head.stats.read_bytes,
            referred_bytes: head.stats.referred_bytes,
            stored_bytes: head.stats.stored_bytes,
            keep: entry.keep.clone(),
            damaged_pages: head.damaged_pages.len(),
            restorable: !coverage.broken_backups.iter().any(|b| b.backup == head.id),
            reaches: reach.collect(),
        }
    }

    /// What a person should notice.
    pub(super) fn notes(&self) -> String {
        let mut notes = Vec::new();
        if !self.restorable {
            notes.push("NOT RESTORABLE".to_owned());
        }
        notes.extend(self.parent.iter().map(|p| format!("on {p}")));
        if self.damaged_pages > 0 {
            notes.push(format!("{} damaged pages", self.damaged_pages));
        }
        match &self.keep {
            Some(keep) if keep.standalone => notes.push("kept alone".to_owned()),
            Some(_) => notes.push("kept".to_owned()),
            None => {}
        }
        notes.extend(self.description.clone());
        notes.join("; ")
    }
}

/// The backups, newest first.
fn rows(catalog: &Catalog, last: Option<usize>) -> Vec<Row> {
    let coverage = catalog.coverage();
    let newest = catalog.backups.iter().rev().take(last.unwrap_or(usize::MAX));
    newest.map(|b| Row::new(b, &coverage)).collect()
}

pub(crate) async fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let (archive, layout) = (context.archive().await?, context.layout()?);
    let catalog = context.catalog(&archive, &layout).await?;
    let rows = rows(&catalog, args.last);
    output::answer(context, &rows, || text(&catalog, &rows))
}

fn text(catalog: &Catalog, rows: &[Row]) -> String {
    if rows.is_empty() {
        return format!("cluster {} has no backup", catalog.cluster);
    }
    let cells = rows.iter().map(|r| {
        vec![
            r.id.to_string(),
            output::word(&r.kind),
            output::time(r.stopped),
            r.timeline.to_string(),
            r.stop_lsn.to_string(),
            output::bytes(r.cluster_bytes),
            output::bytes(r.read_bytes),
            output::bytes(r.stored_bytes),
            r.notes(),
        ]
    });
    let head = ["backup", "type", "ended", "timeline", "from LSN", "size", "read", "stored", "notes"];
    output::table(&head, &cells.collect::<Vec<_>>())
}
