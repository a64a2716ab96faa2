//! `waltide man`.

use std::path::PathBuf;

use clap::CommandFactory as _;

use crate::args::Cli;
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
    std::fs::create_dir_all(&args.directory)?;
    clap_mangen::generate_to(Cli::command(), &args.directory)?;
    let mut pages: Vec<_> = std::fs::read_dir(&args.directory)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("waltide"))
        .collect();
    pages.sort();
    output::answer(context, &pages, || pages.join("\n"))
}
