//! `waltide doctor`.

use std::path::PathBuf;
use std::time::Duration;

use waltide_archiver::engines::postgres::doctor::{CheckResult, Checkup, DoctorRequest, doctor};

use crate::context::Context;
use crate::exit::Failure;
use crate::output;

/// Check the whole set-up: settings, rights, space, clocks, and a segment that goes into the archive and back
///
/// Exits 1 when a check fails, 3 when the archive is at fault.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The data directory
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// How to reach the server: libpq keywords or a URI [default: by the data directory's postmaster.pid]
    #[arg(long, value_name = "CONNINFO")]
    connection: Option<String>,
    /// Switch no segment; look at the last one archived
    #[arg(long)]
    no_switch: bool,
    /// How many seconds the segment may take
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    wait: u64,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<(), Failure> {
    let request = DoctorRequest {
        archive: context.archive().await?,
        url: context.archive_url()?,
        layout: context.layout()?,
        data_dir: context.data_dir(args.data_dir)?,
        connection: args.connection.or_else(|| context.config.connection.clone()),
        switch: !args.no_switch,
        wait: Duration::from_secs(args.wait),
    };
    let checkup = doctor(&request).await;
    output::answer(context, &checkup, || text(&checkup))?;
    match (checkup.is_archive_at_fault(), checkup.has_failed()) {
        (true, _) => Err(Failure::silent(3)),
        (false, true) => Err(Failure::silent(1)),
        (false, false) => Ok(()),
    }
}

fn text(checkup: &Checkup) -> String {
    let mut rows = Vec::new();
    for check in &checkup.checks {
        let result = match check.result {
            CheckResult::Ok => "ok",
            CheckResult::Warning => "WARNING",
            CheckResult::Failed => "FAILED",
            CheckResult::Skipped => "skipped",
        };
        rows.push(vec![result.to_owned(), check.name.to_owned(), check.found.clone()]);
        if let Some(hint) = &check.hint {
            rows.push(vec![String::new(), String::new(), format!("hint: {hint}")]);
        }
    }
    output::table(&["result", "check", "found"], &rows)
}
