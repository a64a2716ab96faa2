use std::path::PathBuf;
use std::process::Stdio;

use clap::ArgAction;
use serde::Serialize;
use waltide_format::{SegmentName, SegmentSize, WalFileName};
use waltide_replay::engines::postgres::{
    FetchError, FetchOutcome, FetchRequest, Fetched, Fetcher, ReadAhead, Wanted,
};

use crate::context::Context;
use crate::exit::Failure;
use crate::output;

/// Bring a file of WAL out of the archive: PostgreSQL's restore_command
///
/// Every checksum and record is checked before the file gets its name. Exit statuses: 0 it is there, 1 the archive
/// does not have it, 126 anything else. Where standby.signal lies in the working directory, an archive that cannot
/// be reached is 1 as well.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The file: %f
    name: WalFileName,
    /// Where it belongs: %p
    dest: PathBuf,
    /// How many segments to bring ahead; 0 brings none
    #[arg(long, value_name = "N", default_value_t = ReadAhead::default().segments)]
    read_ahead: u64,
    /// Only bring ahead, in the background: the segment size
    #[arg(long, hide = true, action = ArgAction::Set)]
    ahead_of: Option<u64>,
}

/// A file that was brought.
#[derive(Debug, Serialize)]
struct Answer {
    name: String,
    bytes: u64,
    /// Whether it lay in the queue already.
    from_queue: bool,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<(), Failure> {
    // Whatever goes wrong, PostgreSQL must not read "not there" from it.
    bring(args, context).await.map_err(|f| if f.is_not_there() { f } else { f.status(126) })
}

async fn bring(args: Args, context: &Context) -> Result<(), Failure> {
    let (url, layout) = (context.archive_url()?, context.layout()?);
    let ahead = ReadAhead { segments: args.read_ahead, ..ReadAhead::default() };
    let data_dir = std::env::current_dir()?;
    let request =
        FetchRequest { name: args.name, dest: args.dest, data_dir, system_id: context.system, ahead };
    let opened = Fetcher::open(&url, layout).await;
    if let (Some(bytes), WalFileName::Segment(after)) = (args.ahead_of, request.name) {
        let size = SegmentSize::try_from(bytes).map_err(Failure::usage)?;
        let system = request.system_id.ok_or_else(|| Failure::usage("--ahead-of needs --system"))?;
        opened?.read_ahead(&request, Wanted { after, size, system }).await?;
        return Ok(());
    }
    let fetched = match opened {
        Ok(fetcher) => fetcher.fetch(&request).await,
        Err(e) => Err(e),
    };
    match fetched {
        Ok(fetched) => {
            if let Some(wanted) = fetched.ahead {
                start_reading_ahead(context, &request, wanted);
            }
            if !context.json {
                return Ok(());
            }
            let Fetched { bytes, from_queue, .. } = fetched;
            let answer = Answer { name: request.name.to_string(), bytes, from_queue };
            output::answer(context, &answer, String::new)
        }
        Err(e) => Err(told(e, &request)),
    }
}

fn told(e: FetchError, request: &FetchRequest) -> Failure {
    match e.outcome(&request.data_dir) {
        FetchOutcome::NotThere => Failure::not_there(e.to_string()),
        FetchOutcome::TryAgain => {
            tracing::warn!("the archive cannot be reached; the standby will ask again");
            Failure::not_there(e.to_string())
        }
        FetchOutcome::Failed => e.into(),
    }
}

/// PostgreSQL waits for this process, so another one reads ahead; it inherits nothing that anyone waits for.
fn start_reading_ahead(context: &Context, request: &FetchRequest, wanted: Wanted) {
    use std::os::unix::process::CommandExt as _;
    let after: SegmentName = wanted.after;
    let spawn = || -> Result<_, Failure> {
        let mut command = std::process::Command::new(std::env::current_exe()?);
        command.args(context.own_arguments()?).arg("fetch");
        command.args(["--system", &wanted.system.to_string()]);
        command.args(["--ahead-of", &wanted.size.bytes().to_string()]);
        command.args(["--read-ahead", &request.ahead.segments.to_string()]);
        command.arg("--").arg(after.to_string()).arg(&request.dest);
        Ok(command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?)
    };
    if let Err(failure) = spawn() {
        tracing::warn!("no process could be started to read ahead: {}", failure.text());
    }
}
