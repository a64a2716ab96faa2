//! Arguments in, text or JSON out, an exit status. No decisions.
//!
//! Statuses (docs/cli.md): 0 done, 1 failed, 2 usage, 3 the archive is damaged or incomplete. `fetch` says 1 only
//! when the archive answered "not there" and 126 for all else, because PostgreSQL reads 1 to 125 from its
//! restore_command as the end of the archive.

// A test may overflow: that is a failed test.
#![cfg_attr(
    test,
    allow(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, clippy::cast_sign_loss)
)]

mod args;
mod commands;
mod config;
mod context;
mod exit;
mod output;
mod progress;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser as _;
use tokio::runtime::Builder;

pub use args::Cli;
use args::RestorePitr;
use commands::Command;
use context::Context;
use exit::{Failure, Verb};

/// Runs `waltide` with these arguments, the program's name among them.
pub fn run(args: Vec<OsString>) -> ExitCode {
    let verb = Verb::of(&args);
    exit::install_panic_hook(verb);
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(e) => return exit::clap_error(&e, verb),
    };
    match start(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => exit::report(&failure, verb),
    }
}

/// Runs `restore-pitr`, which is `waltide restore`, with these arguments, the program's name among them.
pub fn run_restore(args: Vec<OsString>) -> ExitCode {
    exit::install_panic_hook(Verb::Other);
    let cli = match RestorePitr::try_parse_from(&args) {
        Ok(RestorePitr { global, restore }) => Cli { global, command: Command::Restore(restore) },
        Err(e) => return exit::clap_error(&e, Verb::Other),
    };
    match start(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => exit::report(&failure, Verb::Other),
    }
}

fn start(cli: Cli) -> Result<(), Failure> {
    let context = Context::new(&cli.global)?;
    output::start_log(&cli.global);
    let mut builder = match &cli.command {
        // A few looks and one file: it starts no more threads than work on that.
        Command::Push(_) | Command::Fetch(_) => Builder::new_current_thread(),
        _ => Builder::new_multi_thread(),
    };
    let runtime = builder
        .worker_threads(context.threads)
        .enable_all()
        .build()
        .map_err(|e| Failure::failed("the threads could not be started", e))?;
    runtime.block_on(commands::run(cli.command, &context))
}
