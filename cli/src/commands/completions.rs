//! `waltide completions`.

use clap::CommandFactory as _;

use crate::args::{Cli, RestorePitr};
use crate::exit::Failure;
use crate::output;

/// Print a completion script for a shell
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The shell
    shell: clap_complete::Shell,
    /// Of which program
    #[arg(long, value_name = "NAME", default_value = "waltide")]
    program: Program,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Program {
    Waltide,
    RestorePitr,
}

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let mut script = Vec::new();
    let (mut command, name) = match args.program {
        Program::Waltide => (Cli::command(), "waltide"),
        Program::RestorePitr => (RestorePitr::command(), "restore-pitr"),
    };
    clap_complete::generate(args.shell, &mut command, name, &mut script);
    output::raw(&script)
}
