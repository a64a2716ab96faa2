//! One small file per verb.

mod advance;
mod backup;
mod completions;
mod doctor;
mod drill;
mod export;
mod fetch;
mod import;
mod index;
mod info;
mod init;
mod keep;
mod list;
mod log;
mod man;
mod prune;
mod push;
pub(crate) mod restore;
mod status;
mod verify;
mod watch;

use clap::Subcommand;

use crate::context::Context;
use crate::exit::Failure;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Init(init::Args),
    Push(push::Args),
    Watch(watch::Args),
    Doctor(doctor::Args),
    Fetch(fetch::Args),
    Backup(backup::Args),
    Import(import::Args),
    Advance(advance::Args),
    Index(index::Args),
    List(list::Args),
    Info(info::Args),
    Log(log::Args),
    Restore(restore::Args),
    Status(status::Args),
    Verify(verify::Args),
    Prune(prune::Args),
    Keep(keep::Args),
    Export(export::Args),
    Drill(drill::Args),
    Completions(completions::Args),
    Man(man::Args),
}

/// Runs a verb.
pub(crate) async fn run(command: Command, context: &Context) -> Result<(), Failure> {
    match command {
        Command::Init(args) => init::run(args, context).await,
        Command::Push(args) => push::run(args, context).await,
        Command::Watch(args) => watch::run(args, context).await,
        Command::Doctor(args) => doctor::run(args, context).await,
        Command::Backup(args) => backup::run(args, context).await,
        Command::Import(args) => import::run(args, context).await,
        Command::Advance(args) => advance::run(args, context).await,
        Command::Index(args) => index::run(&args, context).await,
        Command::Fetch(args) => fetch::run(args, context).await,
        Command::List(args) => list::run(&args, context).await,
        Command::Info(args) => info::run(&args, context).await,
        Command::Log(args) => log::run(args, context).await,
        Command::Restore(args) => restore::run(args, context).await,
        Command::Status(args) => status::run(&args, context).await,
        Command::Verify(args) => verify::run(&args, context).await,
        Command::Prune(args) => prune::run(&args, context).await,
        Command::Keep(args) => keep::run(&args, context).await,
        Command::Export(args) => export::run(args, context).await,
        Command::Drill(args) => drill::run(args, context).await,
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => man::run(&args, context),
    }
}
