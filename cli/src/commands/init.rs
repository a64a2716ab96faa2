//! `waltide init`.

use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::Serialize;
use waltide_archiver::engines::postgres::init::{Applied, InitRequest, Initialised, apply, init};
use waltide_archiver::engines::postgres::settings::ArchiveSettings;
use waltide_archiver::init::Made;
use waltide_format::TimestampTz;

use crate::config::DEFAULT_PATH;
use crate::context::Context;
use crate::exit::Failure;
use crate::output;

/// Make the archive and the cluster in it, and print the settings that the database needs
///
/// The server may run or not. What is there already is kept; doing it again changes nothing.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The data directory
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// The kind of database
    #[arg(long, value_name = "ENGINE", default_value = "postgres")]
    engine: Engine,
    /// Take the database in although its system identifier is new: pg_upgrade made it
    #[arg(long)]
    upgrade: bool,
    /// Set the settings: with ALTER SYSTEM where the server runs, else in postgresql.auto.conf
    #[arg(long)]
    apply: bool,
    /// How to reach the server: libpq keywords or a URI [default: by the data directory's postmaster.pid]
    #[arg(long, value_name = "CONNINFO")]
    connection: Option<String>,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Engine {
    Postgres,
}

#[derive(Serialize)]
struct Answer<'a> {
    #[serde(flatten)]
    made: &'a Initialised,
    archive_command: &'a str,
    settings: serde_json::Map<String, serde_json::Value>,
    applied: Option<&'a Applied>,
}

pub(crate) async fn run(args: Args, context: &Context) -> Result<(), Failure> {
    let Engine::Postgres = args.engine;
    let data_dir = context.data_dir(args.data_dir)?;
    let (url, layout) = (context.archive_url()?, context.layout()?);
    // The default one is found without being named.
    let config = context.config_path.as_deref().filter(|path| *path != Path::new(DEFAULT_PATH));
    let settings = ArchiveSettings::new(&std::env::current_exe()?, &url, layout.cluster(), config)?;
    let now = TimestampTz::from_jiff(jiff::Timestamp::now());
    let request = InitRequest { url, layout, data_dir: data_dir.clone(), upgrade: args.upgrade, now };
    let (_, made) = init(&request).await?;
    let owner = |path: &Path| std::fs::metadata(path).ok().map(|about| about.uid());
    if let (Some(ours), Some(theirs)) = (request.url.local_path().and_then(owner), owner(&data_dir))
        && ours != theirs
    {
        tracing::warn!(
            "the archive belongs to user {ours}, the data directory to user {theirs}, as whom PostgreSQL pushes and \
             fetches: give it the archive (chown -R)"
        );
    }
    let connection = args.connection.or_else(|| context.config.connection.clone());
    let applied = match args.apply {
        true => Some(apply(&data_dir, connection.as_deref(), &settings).await?),
        false => None,
    };
    let answer = Answer {
        made: &made,
        archive_command: &settings.archive_command,
        settings: settings.settings.iter().map(|(n, v)| ((*n).to_owned(), v.clone().into())).collect(),
        applied: applied.as_ref(),
    };
    output::answer(context, &answer, || text(&made, &settings, applied.as_ref()))
}

fn text(made: &Initialised, settings: &ArchiveSettings, applied: Option<&Applied>) -> String {
    let word = |m: Made| match m {
        Made::Created => "made",
        Made::Existing => "there already",
    };
    let mut text = format!(
        "archive  {} ({})\ncluster  {} ({})\nsystem   {} ({}): PostgreSQL {}, segments of {}\n",
        made.archive,
        word(made.archive_json),
        made.cluster,
        word(made.cluster_json),
        made.system_id,
        word(made.system_json),
        made.major,
        output::bytes(made.segment_size.bytes()),
    );
    let Some(applied) = applied else {
        let _ = write!(
            text,
            "\nThe database needs these settings (`waltide init --apply` sets the first three); archive_timeout bounds \
             what a quiet database can lose:\n\n{}",
            settings.to_conf()
        );
        return text;
    };
    let _ = match applied.changed.is_empty() {
        true => writeln!(text, "\nThe settings are as they should be."),
        false => {
            let names: Vec<&str> = applied.changed.iter().map(|(name, _)| name.as_str()).collect();
            writeln!(text, "\nSet in {}: {}.", applied.written_to, names.join(", "))
        }
    };
    if !applied.restart_needed_for.is_empty() {
        let _ = writeln!(
            text,
            "Restart the server: {} take effect only then.",
            applied.restart_needed_for.join(" and ")
        );
    }
    text
}
