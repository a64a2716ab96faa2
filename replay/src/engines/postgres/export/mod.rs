//! `waltide export`: tables as they were at a moment, written as SQL or CSV. Only their files are restored, and the
//! catalogues'; the real server is started on that, and its own programs read the tables out.
//!
//! Which files those are is said by the names that the log tells, before anything is restored, and asked of the server once
//! it is at the target. Where it names more, partitions above all, everything is done once more with them.

mod find;
mod write;

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio_postgres::Client;
use waltide_format::archive::{BackupEntry, Catalog, Layout};
use waltide_format::engines::postgres::catalogue::{LARGE_OBJECTS, TableName, TablePattern};
use waltide_format::{BackupId, Lsn, Oid};
use waltide_storage::{Archive, Progress};

use super::forward::{Replay, ReplayMode, ReplayPlan, Replayed};
use super::indexes::{ArchivedIndexes, SearchError};
use super::install::{InstallError, Installation, ServerUser};
use super::names::{NamesError, follow};
use super::restore::{Reads, Restore, RestoreError, RestoreOptions, Restored};
use super::scratch_cluster;
use super::scratch_server::{ScratchError, ScratchPlace, ScratchServer};
use super::scratch_settings::{ScratchSettings, memory_bytes};
use super::selection::Selection;
use super::tablespaces::{self, Redirected};
use crate::drill::{now, random_seed};
use crate::plan::Plan;
use find::Found;
use write::Output;

/// Room for what recovery itself writes, besides segments.
const SPARE_BYTES: u64 = 64 << 20;
/// Everything is done so many times at the most. Each time more files are known; twice is enough.
const ROUNDS_MAX: usize = 3;

/// How tables are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum ExportFormat {
    /// As pg_dump writes them.
    #[default]
    Sql,
    /// As COPY writes one table, with a line of column names.
    Csv,
}

impl FromStr for ExportFormat {
    type Err = &'static str;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        match s {
            "sql" => Ok(Self::Sql),
            "csv" => Ok(Self::Csv),
            _ => Err("sql or csv"),
        }
    }
}

/// What is exported; a whole database where neither tables nor schemas are named.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExportTables {
    /// Tables.
    pub tables: Vec<TablePattern>,
    /// Schemas: `schema` or `database.schema`.
    pub schemas: Vec<TablePattern>,
    /// The database they are in.
    pub database: Option<String>,
}

/// What to export, and how.
#[derive(Debug, Clone)]
pub struct ExportRequest {
    /// What.
    pub tables: ExportTables,
    /// In which form.
    pub format: ExportFormat,
    /// The file to write.
    pub output: PathBuf,
    /// Whether a file that is there may be replaced.
    pub force: bool,
    /// Below which directory the scratch place is made.
    pub scratch: PathBuf,
    /// Where the programs of PostgreSQL lie.
    pub pg_bin: Option<PathBuf>,
    /// `shared_preload_libraries` of the scratch server.
    pub preload: String,
    /// The superuser to read as.
    pub user: String,
    /// How many threads to work with.
    pub threads: usize,
    /// The command that brings WAL, with `%f` and `%p`.
    pub restore_command: String,
}

/// Where to export from.
#[derive(Clone, Copy)]
pub struct ExportSource<'a> {
    /// The archive.
    pub archive: &'a Archive,
    /// The names of the cluster's objects.
    pub layout: &'a Layout,
    /// What the archive holds.
    pub catalog: &'a Catalog,
    /// Who wants to know how far it is.
    pub progress: &'a Arc<dyn Progress>,
}

/// Why nothing was exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The names could not be followed.
    #[error("the archive could not be searched for the tables")]
    Names(#[from] NamesError),
    /// The WAL could not be looked through.
    #[error(transparent)]
    Search(#[from] SearchError),
    /// There is no server to start.
    #[error(transparent)]
    Install(#[from] InstallError),
    /// The scratch place or its server failed.
    #[error(transparent)]
    Scratch(#[from] ScratchError),
    /// The files could not be put back.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The server was asked and did not answer.
    #[error("the scratch server does not answer")]
    Ask(#[from] tokio_postgres::Error),
    /// Native replay was asked for.
    #[error(
        "a tablespace is made on the way to the target, which native replay cannot put into the scratch place\nhint: export with --replay auto or --replay server"
    )]
    NotNative,
    /// What was asked for is not there.
    #[error("there is no {what} at the target, {at}{}", near.iter().map(|line| format!("\nhint: {line}")).collect::<String>())]
    NotFound {
        /// What was asked.
        what: String,
        /// How far replay goes.
        at: Lsn,
        /// What comes near.
        near: Vec<String>,
    },
    /// Several are of the name.
    #[error(
        "{what} is said of more than one:{}\nhint: say its whole name, database.schema.table, in double quotes what has upper-case letters",
        found.iter().map(|name| format!("\n  {name}")).collect::<String>()
    )]
    Ambiguous {
        /// What was asked.
        what: String,
        /// What it may mean.
        found: Vec<String>,
    },
    /// A session sees one database.
    #[error("what is to be exported lies in more than one database: {}\nhint: export from one after the other", found.join(", "))]
    Databases {
        /// They.
        found: Vec<String>,
    },
    /// CSV has one table.
    #[error("{what} cannot be written as CSV\nhint: name one table, or use --format sql")]
    NotCsv {
        /// What was asked.
        what: String,
    },
    /// The file is there.
    #[error("{} is already there\nhint: name another file, or replace it with --force", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The file could not be written.
    #[error("cannot {doing} {}", path.display())]
    Local {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The log and the backup do not fit.
    #[error(
        "the log changes block {block} of {path}, which the backup does not have\nhint: run `waltide verify`; export from another backup with --backup"
    )]
    MissingPage {
        /// The file, as the server names it.
        path: String,
        /// The block.
        block: u32,
    },
    /// Recovery ended elsewhere.
    #[error("the target was not reached: {detail}\nhint: run `waltide verify`")]
    NotReached {
        /// Where it ended.
        detail: String,
    },
    /// The server has other files than were restored, again and again.
    #[error("{} files of what is exported were not restored, the first that of {first}", numbers.len())]
    Unsettled {
        /// Their numbers.
        numbers: BTreeSet<Oid>,
        /// One of what they belong to.
        first: String,
    },
    /// A program is not installed.
    #[error("{} has no {program}\nhint: install PostgreSQL's client programs, or say with --pg-bin where they lie", bin.display())]
    NoProgram {
        /// The program.
        program: &'static str,
        /// Where it was looked for.
        bin: PathBuf,
    },
    /// A program failed.
    #[error("pg_dump ended with {status}\nit said:\n{said}")]
    Program {
        /// How.
        status: std::process::ExitStatus,
        /// What it said.
        said: String,
    },
}

impl ExportError {
    /// Whether the archive is at fault.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Names(e) => e.is_damage(),
            Self::Search(e) => e.is_damage(),
            Self::Restore(e) => e.is_damage(),
            Self::Scratch(e) => e.is_damage(),
            Self::NotReached { .. } | Self::MissingPage { .. } => true,
            _ => false,
        }
    }

    /// Whether what was asked is at fault.
    pub const fn is_usage(&self) -> bool {
        matches!(self, Self::Ambiguous { .. } | Self::Databases { .. } | Self::NotCsv { .. })
    }
}

/// What will be exported, and what that takes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExportPlan {
    /// The database.
    pub database: String,
    /// The tables by name, as far as they are named or lie in the schemas; of a whole database all.
    pub tables: Vec<TableName>,
    /// How the log will be replayed.
    pub replay: ReplayPlan,
    /// What is read of the backup.
    pub reads: Reads,
    /// The file.
    pub output: PathBuf,
    /// Its form.
    pub format: ExportFormat,
}

impl fmt::Display for ExportPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for table in &self.tables {
            writeln!(f, "export    {table}")?;
        }
        writeln!(f, "read      {}", self.reads)?;
        writeln!(f, "replay    {}", self.replay)?;
        writeln!(f, "write     {}", self.output.display())
    }
}

/// What was exported.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Exported {
    /// The file.
    pub output: PathBuf,
    /// Its bytes.
    pub bytes: u64,
    /// The tables that hold what was written, partitions among them; none where it is a whole database.
    pub tables: Vec<TableName>,
    /// What could be read of the backup, and what a restore of everything reads.
    pub reads: Reads,
    /// Bytes that were read of the backup's packs, in all rounds.
    pub read_bytes: u64,
    /// The restore that it was read out of, the last.
    pub restored: Restored,
    /// How often files were restored: more than once where the server knew of more.
    pub rounds: usize,
    /// What a reader should know.
    pub notes: Vec<String>,
    /// Seconds it took.
    pub seconds: f64,
}

/// An export that was looked into and can be carried out.
pub struct Export<'a> {
    source: ExportSource<'a>,
    plan: &'a Plan,
    request: ExportRequest,
    entry: &'a BackupEntry,
    found: Found,
    selection: Selection,
    redirected: Redirected,
    replay: Replay,
    install: Installation,
    user: ServerUser,
}

impl<'a> Export<'a> {
    /// Finds out what is meant and what it takes; changes nothing.
    pub async fn prepare(
        source: ExportSource<'a>,
        plan: &'a Plan,
        replay: Replay,
        request: ExportRequest,
    ) -> Result<Self, ExportError> {
        let ExportSource { archive, layout, catalog, progress } = source;
        write::check(&request.output, request.force)?;
        progress.phase("names", None);
        let entry = catalog.backup(&plan.backup).expect("a plan's backup is in its catalogue");
        let run = catalog.run(&plan.lineage, plan.start_lsn);
        let at = plan.stop.lsn;
        let followed = follow(archive, layout.system(plan.system_id), entry, &run, at).await?;
        let found = find::find(&followed.names, at, &request.tables, request.format)?;
        let selection = found.selection(&followed.names);
        let indexes = ArchivedIndexes::new(archive.clone());
        let redirected = tablespaces::redirect(&indexes, &run, plan.start_lsn, plan.stop.read_to).await?;
        let replay = match replay {
            Replay::Native(forward) if !redirected.segments.is_empty() => {
                if forward.mode() == ReplayMode::Native {
                    return Err(ExportError::NotNative);
                }
                Replay::Server(Some("a tablespace is made on the way to the target".to_owned()))
            }
            replay => replay,
        };
        let install = Installation::find(plan.major, request.pg_bin.as_deref())?;
        if request.format == ExportFormat::Sql {
            write::pg_dump(&install)?;
        }
        let user = ServerUser::find()?;
        Ok(Self { source, plan, request, entry, found, selection, redirected, replay, install, user })
    }

    fn options(&self, root: &Path) -> RestoreOptions {
        let (command, threads) = (self.request.restore_command.clone(), self.request.threads);
        RestoreOptions {
            replay: self.replay.clone(),
            selection: Some(self.selection.clone()),
            ..scratch_cluster::restore_options(self.plan, root, self.user, command, threads)
        }
    }

    async fn restore(&self, root: &Path) -> Result<Restore, RestoreError> {
        let ExportSource { archive, layout, .. } = self.source;
        Restore::prepare(archive, layout, self.plan, self.options(root)).await
    }

    /// What will be exported, and what that takes.
    pub async fn plan(&self) -> Result<ExportPlan, ExportError> {
        let restore = self.restore(&self.request.scratch.join(new_id())).await?;
        Ok(ExportPlan {
            database: self.found.database.clone(),
            tables: self.found.tables.iter().map(|t| t.name.clone()).collect(),
            replay: ReplayPlan::from(&self.replay),
            reads: restore.reads()?,
            output: self.request.output.clone(),
            format: self.request.format,
        })
    }

    /// Does it. The scratch place is gone afterwards.
    pub async fn carry_out(mut self) -> Result<Exported, ExportError> {
        let started = Instant::now();
        let (mut read_bytes, mut round) = (0u64, 0usize);
        let output = Output::create(&self.request.output)?;
        loop {
            round = round.saturating_add(1);
            let place = ScratchPlace::create(&self.request.scratch, &new_id(), self.user, false)?;
            place.directory("spaces")?;
            let restore = self.restore(place.path()).await?;
            let reads = restore.reads()?;
            let segment_bytes = self.source.catalog.system.segment_size.bytes();
            let wal_room = segment_bytes.saturating_mul(8).saturating_add(SPARE_BYTES);
            place.check_room(restore.actions().bytes.saturating_add(wal_room))?;
            let restored = restore.carry_out(self.source.progress).await?;
            read_bytes = read_bytes.saturating_add(restored.read_bytes);
            let mut server = self.start(&place, restored.replayed.as_ref()).await?;
            let client = server.connect(&self.found.database, &self.request.user, Duration::ZERO).await?;
            let size = self.source.catalog.system.segment_size;
            let reached = scratch_cluster::reached(&client, self.plan, size).await?;
            if !reached.holds {
                return Err(ExportError::NotReached { detail: reached.detail });
            }
            let mut notes = end_prepared(&client).await?;
            let stored = self.stored(&client).await?;
            let missing: Vec<_> = stored.iter().filter(|s| !self.selection.wants_number(s.file)).collect();
            if let Some(first) = missing.first() {
                let numbers: BTreeSet<Oid> = missing.iter().map(|s| s.file).collect();
                if round >= ROUNDS_MAX {
                    return Err(ExportError::Unsettled { numbers, first: first.name.to_string() });
                }
                tracing::info!("{} more files are needed, the first of {}", numbers.len(), first.name);
                self.selection.add(numbers);
                continue;
            }
            if !self.found.is_whole() {
                notes.extend(large_objects(&client).await?);
            }
            self.source.progress.phase("write", None);
            let tables: Vec<&Stored> = stored.iter().filter(|s| self.is_written(s)).collect();
            self.write(&server, &client, &tables, &output).await?;
            drop(client);
            server.stop().await?;
            drop((server, place));
            let bytes = output.finish(self.request.force)?;
            return Ok(Exported {
                output: self.request.output,
                bytes,
                tables: tables.into_iter().map(|s| s.name.clone()).collect(),
                reads,
                read_bytes,
                restored,
                rounds: round,
                notes,
                seconds: started.elapsed().as_secs_f64(),
            });
        }
    }

    async fn start(
        &self,
        place: &ScratchPlace,
        replayed: Option<&Replayed>,
    ) -> Result<ScratchServer, ExportError> {
        let from = replayed.map_or(self.plan.start_lsn, |replayed| replayed.redo);
        let progress = self.source.progress;
        let brought = self.entry.head.config_files.as_slice();
        let cluster = scratch_cluster::settings(place, brought, &self.redirected)?;
        let mut settings = ScratchSettings::decide(&cluster, &self.request.preload, memory_bytes());
        // Pages of what was not restored are no fault.
        settings.values.insert("ignore_invalid_pages".to_owned(), "on".to_owned());
        progress.phase("recover", Some(self.plan.left_from(from)));
        let mut server = ScratchServer::start(&self.install, place, &settings)?;
        let segment_bytes = self.source.catalog.system.segment_size.bytes();
        let mut missing = None;
        let recovered = server.wait_ready(|line| {
            if line.contains("restored log file") {
                progress.advance(segment_bytes);
            }
            let wanted = |(path, _): &(&str, u32)| self.selection.wants_file(path);
            if let Some((path, block)) = missing_page(line).filter(wanted) {
                missing.get_or_insert_with(|| (path.to_owned(), block));
            }
        });
        recovered.await?;
        match missing {
            Some((path, block)) => Err(ExportError::MissingPage { path, block }),
            None => Ok(server),
        }
    }

    /// What the server has files for and the export reads.
    async fn stored(&self, client: &Client) -> Result<Vec<Stored>, ExportError> {
        let Some(chosen) = self.found.condition() else { return Ok(Vec::new()) };
        let [large, large_index] = LARGE_OBJECTS;
        let sql = format!(
            "with recursive wanted(oid) as (
                 select c.oid from pg_class c join pg_namespace n on n.oid = c.relnamespace where {chosen}
                 union
                 select i.inhrelid from wanted w
                     join pg_class c on c.oid = w.oid and c.relkind = 'p' join pg_inherits i on i.inhparent = w.oid),
             long_values(oid) as (
                 select c.reltoastrelid from wanted w join pg_class c on c.oid = w.oid),
             stored(oid) as (
                 select oid from wanted union select oid from long_values
                 union select i.indexrelid from long_values l join pg_index i on i.indrelid = l.oid
                 union select c.oid from pg_class c where c.relkind = 'S'
                 union select c.oid from pg_class c
                     where c.oid < 16384 and c.oid not in ({large}, {large_index}) and not c.relisshared)
             select current_database()::text, n.nspname::text, c.relname::text, coalesce(pg_relation_filenode(c.oid), 0),
                 c.oid in (select oid from wanted) and c.relkind in ('r', 'p', 'm', 'S'), c.relkind::text, c.oid
             from stored s join pg_class c on c.oid = s.oid join pg_namespace n on n.oid = c.relnamespace
             order by 2, 3"
        );
        let rows = client.query(&sql, &[]).await?;
        let stored = rows.iter().map(|row| Stored {
            name: TableName { database: row.get(0), schema: row.get(1), table: row.get(2) },
            file: row.get(3),
            is_wanted: row.get(4),
            kind: row.get(5),
            oid: row.get(6),
        });
        let stored: Vec<_> = stored.collect();
        let gone = self.found.tables.iter().find(|t| !stored.iter().any(|s| s.oid == t.oid));
        match gone.filter(|_| self.found.schemas.is_empty()) {
            Some(table) => {
                let near =
                    vec!["the names that the WAL tells are not the server's: restore the cluster".to_owned()];
                Err(ExportError::NotFound {
                    what: format!("table {}", table.name),
                    at: self.plan.stop.lsn,
                    near,
                })
            }
            None => Ok(stored),
        }
    }

    /// Whether it comes into the file. Of a partitioned table also partitions in other schemas do, of a schema not.
    fn is_written(&self, stored: &Stored) -> bool {
        let schemas = &self.found.schemas;
        stored.is_wanted && (schemas.is_empty() || schemas.contains(&stored.name.schema))
    }

    async fn write(
        &self,
        server: &ScratchServer,
        client: &Client,
        tables: &[&Stored],
        output: &Output,
    ) -> Result<(), ExportError> {
        match (self.request.format, tables) {
            (ExportFormat::Csv, tables) => {
                let root = self.found.tables.first().map_or(0, |t| t.oid);
                write::csv(client, root, tables, output).await
            }
            (ExportFormat::Sql, tables) => {
                let mut command = server.client(&write::pg_dump(&self.install)?, &self.request.user);
                command.arg(write::dbname(&self.found.database));
                if !self.found.schemas.is_empty() {
                    command.args(self.found.schemas.iter().map(|s| format!("--schema={}", write::quoted(s))));
                } else if !self.found.is_whole() {
                    let named = self.found.tables.iter().map(|t| &t.name);
                    let names: BTreeSet<&TableName> = named.chain(tables.iter().map(|s| &s.name)).collect();
                    command.args(names.into_iter().map(|name| format!("--table={}", write::qualified(name))));
                }
                write::run(command, output).await
            }
        }
    }
}

/// A relation of the restored database.
#[derive(Debug)]
struct Stored {
    name: TableName,
    oid: Oid,
    kind: String,
    /// The number of its file; zero for none.
    file: Oid,
    /// Whether it is exported, rather than needed to read what is.
    is_wanted: bool,
}

/// Rolls back what was prepared and never committed: its rows are not there for anybody, but it may keep tables locked.
async fn end_prepared(client: &Client) -> Result<Vec<String>, ExportError> {
    let sql = "select quote_literal(gid) from pg_prepared_xacts where database = current_database()";
    let mut notes = Vec::new();
    for row in client.query(sql, &[]).await? {
        let gid: String = row.get(0);
        client.simple_query(&format!("rollback prepared {gid}")).await?;
        notes.push(format!("the prepared transaction {gid} was open at the target: what it did is left out"));
    }
    Ok(notes)
}

/// The page that a line of the server's log says is not there, where it changes: without `ignore_invalid_pages` it would
/// have ended.
fn missing_page(line: &str) -> Option<(&str, u32)> {
    let (_, said) = line.split_once("WARNING:  page ")?;
    let (block, said) = said.split_once(" of relation ")?;
    let (path, state) = said.split_once(' ')?;
    let is_it = state.starts_with("is uninitialized") || state.starts_with("does not exist");
    Some((path, block.parse().ok().filter(|_| is_it)?))
}

/// Says that large objects are not among what is exported, where there are any.
async fn large_objects(client: &Client) -> Result<Option<String>, ExportError> {
    let row = client.query_one("select count(*) from pg_largeobject_metadata", &[]).await?;
    let count: i64 = row.get(0);
    Ok((count > 0).then(|| {
        format!(
            "the database has {count} large objects, which come with no table and no schema: export the whole of it, with \
             --database alone, to have them"
        )
    }))
}

/// A name for a scratch place.
fn new_id() -> String {
    BackupId::new(now(), u16::try_from(random_seed() & 0xFFFF).unwrap_or(0)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_not_there_is_heard_of() {
        let said =
            "2026-01-01 00:00:00.000 UTC [7] WARNING:  page 3 of relation base/5/16400 is uninitialized";
        assert_eq!(missing_page(said), Some(("base/5/16400", 3)));
        let said = "WARNING:  page 70 of relation pg_tblspc/16390/PG_15_202209061/5/16400_vm does not exist";
        assert_eq!(missing_page(said), Some(("pg_tblspc/16390/PG_15_202209061/5/16400_vm", 70)));
        for other in [
            "WARNING:  page x of relation base/5/1 is uninitialized",
            "WARNING:  page 1 of relation base/5/1",
            "LOG:  page 3 of relation base/5/16400 is uninitialized",
        ] {
            assert_eq!(missing_page(other), None, "{other}");
        }
    }
}
