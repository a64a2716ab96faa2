//! `waltide export`: tables as they were at a moment, without restoring the rest.

use std::path::PathBuf;

use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use waltide_format::engines::postgres::catalogue::TablePattern;
use waltide_replay::engines::postgres::{
    Export, ExportError, ExportFormat, ExportPlan, ExportRequest, ExportSource, ExportTables, Exported,
    ReplayMode,
};
use waltide_replay::{Goal, Plan, TargetAction};

use crate::commands::log::size;
use crate::commands::restore::{GoalArgs, choose, make_plan, own_restore_command};
use crate::context::{Context, named_backup};
use crate::exit::Failure;
use crate::output;

/// Write tables as they were at a moment, as SQL or CSV, without restoring the rest
///
/// The tables' files and the catalogues are restored into a scratch place, the real server recovers there to the target,
/// listening on a private socket alone, and pg_dump or COPY reads the tables out. What belongs to other tables is not
/// read. The scratch place is gone at the end.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A table: table, schema.table or database.schema.table, as in SQL. Repeatable; with its partitions
    #[arg(long, value_name = "TABLE", required_unless_present_any = ["schema", "database"])]
    table: Vec<TablePattern>,
    /// A whole schema: schema or database.schema. Repeatable
    #[arg(long, value_name = "SCHEMA", value_parser = schema)]
    schema: Vec<TablePattern>,
    /// The database; all of it where neither tables nor schemas are named
    #[arg(long, value_name = "NAME")]
    database: Option<String>,
    /// What and how
    #[command(flatten)]
    target: GoalArgs,
    /// The file to write
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// As pg_dump writes, or as COPY writes one table
    #[arg(long, value_name = "sql|csv", default_value = "sql")]
    format: ExportFormat,
    /// Replace the file if it is there
    #[arg(long)]
    force: bool,
    /// Print the plan and what would be read, and touch nothing
    #[arg(long)]
    dry_run: bool,
    /// Start from this backup instead of the best one
    #[arg(long, value_name = "BACKUP")]
    backup: Option<String>,
    /// How the WAL is replayed: native as far as possible, native or not at all, or by PostgreSQL alone
    #[arg(long, value_name = "auto|native|server", default_value = "auto")]
    replay: ReplayMode,
    /// So much of the WAL native replay keeps in memory; the rest goes to a file
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = size)]
    memory: u64,
    /// Below which directory to restore [default: the one for temporary files]
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Where PostgreSQL's programs lie [default: /usr/lib/postgresql/MAJOR/bin, or the PATH]
    #[arg(long, value_name = "DIR")]
    pg_bin: Option<PathBuf>,
    /// Libraries that the scratch server loads (shared_preload_libraries); none unless named
    #[arg(long, value_name = "LIBRARIES", default_value = "")]
    preload: String,
    /// The superuser to read as
    #[arg(long, value_name = "NAME", default_value = "postgres")]
    user: String,
}

fn schema(text: &str) -> Result<TablePattern, String> {
    let pattern: TablePattern = text.parse().map_err(|_| "write schema or database.schema, as in SQL")?;
    match pattern.parts() {
        1 | 2 => Ok(pattern),
        _ => Err("write schema or database.schema, as in SQL".to_owned()),
    }
}

/// What was planned and what was done.
#[derive(Debug, Serialize)]
struct Answer<'a> {
    dry_run: bool,
    plan: &'a Plan,
    export: Option<&'a ExportPlan>,
    exported: Option<&'a Exported>,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<(), Failure> {
    let mut stopped = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal);
    let [Ok(interrupt), Ok(terminate), Ok(hangup)] = &mut stopped else {
        return Err(Failure::message(1, "the signals that stop an export cannot be heard"));
    };
    let stopped = || Err(Failure::message(1, "the export was stopped; nothing of it is left"));
    // What is under way ends its server and removes its place where it is dropped.
    tokio::select! {
        result = export(args, context) => result,
        _ = interrupt.recv() => stopped(),
        _ = terminate.recv() => stopped(),
        _ = hangup.recv() => stopped(),
    }
}

async fn export(args: Args, context: &Context) -> Result<(), Failure> {
    args.target.check()?;
    let (archive, layout) = (context.archive().await?, context.layout()?);
    let catalog = context.catalog(&archive, &layout).await?;
    let goal = args.target.goal(&archive, &layout, &catalog).await?;
    let goal = Goal { action: TargetAction::Promote, ..goal };
    let backup = named_backup(&catalog, args.backup.as_deref())?;
    let plan = make_plan(&archive, &layout, &catalog, &goal, backup.as_ref()).await?;
    let replay =
        choose(&archive, &layout, &catalog, &plan, (args.replay, ReplayMode::Server), args.memory).await?;
    let progress = context.progress();
    let source = ExportSource { archive: &archive, layout: &layout, catalog: &catalog, progress: &progress };
    let request = ExportRequest {
        tables: ExportTables { tables: args.table, schemas: args.schema, database: args.database },
        format: args.format,
        output: args.output,
        force: args.force,
        scratch: args.scratch.unwrap_or_else(std::env::temp_dir),
        pg_bin: args.pg_bin,
        preload: args.preload,
        user: args.user,
        threads: context.threads,
        restore_command: own_restore_command(context)?,
    };
    let export = Export::prepare(source, &plan, replay, request).await.map_err(failed)?;
    if args.dry_run {
        let planned = export.plan().await.map_err(failed)?;
        let answer = Answer { dry_run: true, plan: &plan, export: Some(&planned), exported: None };
        return output::answer(context, &answer, || format!("{plan}{planned}nothing was touched"));
    }
    for note in &plan.notes {
        tracing::warn!("{note}");
    }
    let exported = export.carry_out().await.map_err(failed)?;
    for note in &exported.notes {
        tracing::warn!("{note}");
    }
    drop(progress);
    let answer = Answer { dry_run: false, plan: &plan, export: None, exported: Some(&exported) };
    output::answer(context, &answer, || told(&plan, &exported))
}

fn failed(e: ExportError) -> Failure {
    let status = match (e.is_damage(), e.is_usage()) {
        (true, _) => 3,
        (_, true) => 2,
        _ => 1,
    };
    Failure::from(e).status(status)
}

fn told(plan: &Plan, exported: &Exported) -> String {
    let mut text = plan.to_string();
    for table in &exported.tables {
        text.push_str(&format!("exported  {table}\n"));
    }
    text.push_str(&format!(
        "read      {} of the backup; a restore of everything reads {}\n",
        output::bytes(exported.read_bytes),
        output::bytes(exported.reads.whole_bytes)
    ));
    if let Some(replayed) = &exported.restored.replayed {
        text.push_str(&format!("replayed  natively to {}: {}\n", replayed.redo, replayed.segments()));
    }
    text.push_str(&format!(
        "written   {}, {}, in {}\n",
        exported.output.display(),
        output::bytes(exported.bytes),
        output::duration(exported.seconds)
    ));
    text
}
