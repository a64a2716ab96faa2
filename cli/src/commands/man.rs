//! `waltide man`.

use std::path::PathBuf;

use clap::CommandFactory as _;

use crate::args::{Cli, RestorePitr};
use crate::context::Context;
use crate::exit::Failure;
use crate::output;

/// Write the manual pages into a directory
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The directory, made if it is not there
    directory: PathBuf,
}

pub(crate) fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let dir = &args.directory;
    let failed = |e| Failure::failed(format!("the manual pages cannot be written into {}", dir.display()), e);
    std::fs::create_dir_all(dir).map_err(failed)?;
    clap_mangen::generate_to(Cli::command(), dir).map_err(failed)?;
    clap_mangen::generate_to(RestorePitr::command(), dir).map_err(failed)?;
    let mut pages: Vec<_> = std::fs::read_dir(dir)
        .map_err(failed)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("waltide") || name == "restore-pitr.1")
        .collect();
    pages.sort();
    output::answer(context, &pages, || pages.join("\n"))
}
