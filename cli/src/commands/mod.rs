//! One small file per verb.

mod completions;
mod man;

use clap::Subcommand;

use crate::context::Context;
use crate::exit::Failure;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Completions(completions::Args),
    Man(man::Args),
}

/// Runs a verb.
pub(crate) async fn run(command: Command, context: &Context) -> Result<(), Failure> {
    match command {
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => man::run(&args, context),
    }
}
