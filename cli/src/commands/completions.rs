//! `waltide completions`.

use clap::CommandFactory as _;

use crate::args::Cli;
use crate::exit::Failure;
use crate::output;

/// Print a completion script for a shell
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The shell
    shell: clap_complete::Shell,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "waltide", &mut script);
    output::raw(&script)
}
