//! What every command takes, and the list of commands.

use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser as _};
use clap::{ArgAction, Args, Parser};
use waltide_format::SystemId;

use crate::commands::{Command, restore};

/// WAL archiving and point-in-time recovery that reads what it keeps.
#[derive(Debug, Parser)]
#[command(
    name = "waltide",
    version,
    propagate_version = true,
    max_term_width = 110,
    disable_help_subcommand = true
)]
pub struct Cli {
    /// What every command takes.
    #[command(flatten)]
    pub(crate) global: Global,
    /// The command.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Restore the cluster as it was at a time, transaction, LSN or restore point
///
/// This is `waltide restore` under the name that operators' guides give it. A plan is made first: the base backup, the
/// WAL, the exact position at which PostgreSQL will stop, or why the target cannot be reached and which near it can.
/// Nothing is touched before that. The cluster is left ready to start; PostgreSQL's own recovery then brings it to the
/// target, with `waltide fetch` as its restore_command.
#[derive(Debug, Parser)]
#[command(name = "restore-pitr", version, max_term_width = 110)]
pub(crate) struct RestorePitr {
    /// What every command takes.
    #[command(flatten)]
    pub(crate) global: Global,
    /// What to restore, and how.
    #[command(flatten)]
    pub(crate) restore: restore::Args,
}

/// Options of every command. A flag beats the environment, which beats the configuration file.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// The archive: a directory or a file:// URL [env: WALTIDE_ARCHIVE]
    #[arg(long, global = true, value_name = "URL", help_heading = "Global options")]
    pub(crate) archive: Option<String>,
    /// The cluster in the archive [env: WALTIDE_CLUSTER] [default: main]
    #[arg(long, global = true, value_name = "NAME", help_heading = "Global options")]
    pub(crate) cluster: Option<String>,
    /// The system identifier, where the cluster has had several (pg_upgrade); the newest unless given
    #[arg(long, global = true, value_name = "ID", help_heading = "Global options")]
    pub(crate) system: Option<SystemId>,
    /// Where the catalogue cache lies; "" does without. Deleting it loses nothing
    #[arg(long, global = true, value_name = "FILE", value_parser = OsStringValueParser::new().map(PathBuf::from), help_heading = "Global options")]
    pub(crate) cache: Option<PathBuf>,
    /// The configuration file [env: WALTIDE_CONFIG] [default: /etc/waltide/waltide.toml where it exists]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Global options")]
    pub(crate) config: Option<PathBuf>,
    /// Print one JSON document instead of text
    #[arg(long, global = true, help_heading = "Global options")]
    pub(crate) json: bool,
    /// How many threads to work with [env: WALTIDE_THREADS] [default: the cores there are]
    #[arg(long, global = true, value_name = "N", help_heading = "Global options")]
    pub(crate) threads: Option<usize>,
    /// Say only what went wrong
    #[arg(long, short, global = true, conflicts_with = "verbose", help_heading = "Global options")]
    pub(crate) quiet: bool,
    /// Say more; twice, say everything
    #[arg(long, short, global = true, action = ArgAction::Count, help_heading = "Global options")]
    pub(crate) verbose: u8,
}
