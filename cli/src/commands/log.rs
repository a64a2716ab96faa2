//! `waltide log`: the transactions in the archive.

use std::fmt::Write as _;
use std::ops::ControlFlow;

use waltide_format::archive::{Catalog, CommitKind, Lineage};
use waltide_format::{TimelineId, TimestampTz, Xid};
use waltide_replay::engines::postgres::{ArchivedIndexes, ArchivedNames};
use waltide_replay::log::{
    DatabaseMatch, Log, LogFilter, LogSink, NamedRelation, Numbers, RelationDone, RelationMatch,
    TableFateKind, Transaction,
};

use super::restore::time;
use crate::context::Context;
use crate::exit::Failure;
use crate::output::{self, Lines};

/// The first number that is no catalogue's.
const FIRST_NORMAL_OID: u32 = 16384;

/// Show the transactions in the archive, in the order of their commits, and what each did
///
/// Of each relation it says how many rows came (+), changed (~) and went (-), what was dropped, truncated, created and
/// rewritten, and how much WAL it took. Work that a savepoint rolled back is not the transaction's; --aborted shows it
/// by itself. Ends with 3 where WAL is missing between what is shown.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Ended at this time or later: RFC 3339, PostgreSQL's form, or @UNIX
    #[arg(long, value_name = "TIME", value_parser = time)]
    since: Option<TimestampTz>,
    /// Ended at this time or earlier
    #[arg(long, value_name = "TIME", value_parser = time)]
    until: Option<TimestampTz>,
    /// This transaction, or the one it is a subtransaction of
    #[arg(long, value_name = "XID")]
    xid: Option<Xid>,
    /// Touched this relation: [[database.]schema.]table as in SQL, an OID, or files as shown (1663/5/16384)
    #[arg(long, value_name = "RELATION")]
    relation: Option<RelationMatch>,
    /// In this database: its name or OID
    #[arg(long, value_name = "DATABASE")]
    database: Option<DatabaseMatch>,
    /// Dropped a relation, or the one that --relation names
    #[arg(long)]
    dropped: bool,
    /// Truncated a relation, or the one that --relation names; with --dropped, either
    #[arg(long)]
    truncated: bool,
    /// Wrote more WAL than this: bytes, or with kB, MB or GB
    #[arg(long, value_name = "SIZE", value_parser = size)]
    larger_than: Option<u64>,
    /// Also what was rolled back
    #[arg(long)]
    aborted: bool,
    /// Along the line of this timeline instead of the newest
    #[arg(long, value_name = "TIMELINE")]
    timeline: Option<TimelineId>,
    /// Show relations by number and do not look for their names in backups and the WAL behind them
    #[arg(long)]
    numbers: bool,
}

/// A size in PostgreSQL's units, which are powers of 1024.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit: u64 = match text.get(digits.len()..).unwrap_or_default().trim() {
        "" | "B" => 1,
        "kB" | "KB" | "KiB" | "k" | "K" => 1 << 10,
        "MB" | "MiB" | "M" => 1 << 20,
        "GB" | "GiB" | "G" => 1 << 30,
        "TB" | "TiB" | "T" => 1 << 40,
        _ => return Err("write a number of bytes, or one with kB, MB, GB or TB".to_owned()),
    };
    let number = digits.parse::<u64>().map_err(|e| e.to_string())?;
    number.checked_mul(unit).ok_or_else(|| "that is more than there can be".to_owned())
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<(), Failure> {
    let (archive, layout) = (context.archive().await?, context.layout()?);
    let catalog = context.catalog(&archive, &layout).await?;
    let line = line(&catalog, args.timeline)?;
    let filter = LogFilter {
        since: args.since,
        until: args.until,
        xid: args.xid,
        relation: args.relation,
        database: args.database,
        dropped: args.dropped,
        truncated: args.truncated,
        larger_than: args.larger_than,
        aborted: args.aborted,
    };
    if filter.needs_names() && args.numbers {
        return Err(Failure::usage("--numbers looks for no names, and a name is asked for"));
    }
    if filter.needs_names() && !catalog.backups.iter().any(|b| b.is_on(&line)) {
        let text =
            "names are read from a backup and the WAL behind it, and the archive has no backup on this line";
        return Err(
            Failure::message(1, text).hint("make one with `waltide backup`, or say the OID or the files")
        );
    }
    let system = layout.system(catalog.system.system_id);
    let source = ArchivedIndexes::new(archive.clone()).with_merged(system.clone());
    let log =
        Log { catalog: &catalog, line: &line, filter: &filter, source: &source, threads: context.threads };
    let mut printer = Printer { lines: Lines::new(), json: context.json, began: false };
    let told = match args.numbers {
        true => log.run(&mut Numbers, &mut printer).await,
        false => log.run(&mut ArchivedNames::new(&archive, system, &catalog, &line), &mut printer).await,
    };
    printer.lines.finish()?;
    let summary = told?;
    if summary.transactions == 0 && !context.json && !context.quiet {
        output::note("no transaction in the archive is of that kind");
    }
    if summary.holes == 0 { Ok(()) } else { Err(Failure::silent(3)) }
}

/// The line to follow.
fn line(catalog: &Catalog, asked: Option<TimelineId>) -> Result<Lineage, Failure> {
    let known = catalog.timelines();
    match asked {
        Some(timeline) if !known.contains(&timeline) => {
            let list = known.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let text = format!("the archive has nothing of timeline {timeline}; it has {list}");
            Err(Failure::message(1, text))
        }
        Some(timeline) => Ok(catalog.lineage(timeline)),
        None => Ok(catalog.lineage(known.last().copied().unwrap_or(TimelineId::FIRST))),
    }
}

/// Prints transactions as they come.
struct Printer {
    lines: Lines,
    json: bool,
    began: bool,
}

impl LogSink for Printer {
    fn transaction(&mut self, transaction: Transaction) -> ControlFlow<()> {
        if self.json {
            return self.lines.json(&transaction);
        }
        if !std::mem::replace(&mut self.began, true) {
            let head = row("TIME", "XID", "LSN", "WAL", "WHAT");
            self.lines.text(&head)?;
        }
        let t = &transaction;
        let line = row(
            &t.time.to_string(),
            &t.xid.to_string(),
            &t.commit_lsn.to_string(),
            &output::bytes(t.volume.wal_bytes),
            &what(t),
        );
        self.lines.text(&line)
    }

    fn hole(&mut self, text: &str) {
        // What was found before it stands before it.
        self.lines.flush();
        output::error(text);
    }
}

fn row(time: &str, xid: &str, lsn: &str, wal: &str, what: &str) -> String {
    format!("{time:<29}  {xid:>10}  {lsn:<17}  {wal:>10}  {what}").trim_end().to_owned()
}

/// What a transaction did, in a line.
fn what(t: &Transaction) -> String {
    let mut parts: Vec<String> = Vec::new();
    let gid = t.gid.as_deref().map(|gid| format!(" {gid:?}")).unwrap_or_default();
    match t.kind {
        CommitKind::CommitPrepared => parts.push(format!("committed prepared{gid}")),
        CommitKind::AbortPrepared => parts.push(format!("ROLLED BACK prepared{gid}")),
        CommitKind::Abort => match t.top {
            Some(top) => parts.push(format!("ROLLED BACK by {top}")),
            None => parts.push("ROLLED BACK".to_owned()),
        },
        CommitKind::Commit | CommitKind::Prepare => {}
    }
    parts.extend(t.dropped_databases.iter().map(|d| format!("DROPPED DATABASE {d}")));
    let of_users = t.tables.iter().filter(|table| !is_system(&table.name.schema));
    parts.extend(of_users.map(|table| {
        let to = table.to.as_ref().map(|to| format!(" to {to}")).unwrap_or_default();
        format!("{} {}{to}", fate(table.event), table.name)
    }));
    for (kind, list) in [
        (TableFateKind::Dropped, &t.dropped),
        (TableFateKind::Truncated, &t.truncated),
        (TableFateKind::Rewritten, &t.rewritten),
        (TableFateKind::Created, &t.created),
    ] {
        // Indexes and TOAST tables go with their table, and a database is made of copies of the template's.
        let told = |r: &&NamedRelation| match &r.name {
            Some(name) => t.tables.is_empty() && !is_system(&name.name.schema),
            None => t.created_databases.is_empty(),
        };
        parts.extend(list.iter().filter(told).map(|r| format!("{} {r}", fate(kind))));
    }
    parts.extend(t.created_databases.iter().map(|d| format!("created database {d}")));
    let is_catalogue = |r: &&RelationDone| {
        let named = r.name.as_ref().is_some_and(|n| n.toast_of.is_none() && is_system(&n.name.schema));
        named || r.work.relation.rel_number < FIRST_NORMAL_OID
    };
    let of_users = t.relations.iter().filter(|r| !is_catalogue(r));
    parts.extend(of_users.filter_map(|r| {
        let name = r.name.as_ref().map_or_else(|| r.work.relation.to_string(), ToString::to_string);
        Some(format!("{name} {}", rows(r.work.inserted, r.work.updated, r.work.deleted)?))
    }));
    let sum = |of: fn(&RelationDone) -> u64| {
        t.relations.iter().filter(is_catalogue).map(of).fold(0, u64::saturating_add)
    };
    if let Some(rows) = rows(sum(|r| r.work.inserted), sum(|r| r.work.updated), sum(|r| r.work.deleted)) {
        parts.push(format!("catalogues {rows}"));
    }
    if !t.complete {
        parts.push("(its beginning is not in the archive)".to_owned());
    }
    parts.join(", ")
}

/// Whether a schema is PostgreSQL's own.
fn is_system(schema: &str) -> bool {
    matches!(schema, "pg_catalog" | "pg_toast" | "information_schema")
}

const fn fate(kind: TableFateKind) -> &'static str {
    match kind {
        TableFateKind::Dropped => "DROPPED",
        TableFateKind::Truncated => "TRUNCATED",
        TableFateKind::Rewritten => "rewrote",
        TableFateKind::Renamed => "renamed",
        TableFateKind::Created => "created",
    }
}

fn rows(inserted: u64, updated: u64, deleted: u64) -> Option<String> {
    let mut out = String::new();
    for (sign, count) in [('+', inserted), ('~', updated), ('-', deleted)] {
        if count > 0 {
            let space = if out.is_empty() { "" } else { " " };
            // Writing to a String does not fail.
            let _ = write!(out, "{space}{sign}{count}");
        }
    }
    (!out.is_empty()).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_postgresqls_units() {
        assert_eq!([size("10"), size("64kB"), size("3 GB")], [Ok(10), Ok(65536), Ok(3 << 30)]);
        for bad in ["", "MB", "1 parsec", "99999999999TB", "-1"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_rows_that_moved_are_told() {
        assert_eq!(rows(1, 0, 20), Some("+1 -20".to_owned()));
        assert_eq!(rows(0, 0, 0), None);
    }
}
