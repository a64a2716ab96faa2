//! PostgreSQL's read side.

mod amcheck;
mod conf_file;
mod covers;
mod databases;
mod drill;
mod export;
mod fetch;
mod file_system;
mod find_moment;
mod forward;
mod indexes;
mod install;
mod log_names;
pub(crate) mod merged;
mod names;
mod names_log;
mod pages;
mod queue;
pub mod redo;
mod restore;
mod scratch_cluster;
mod scratch_server;
mod scratch_settings;
mod selection;
mod start;
mod tablespaces;
mod tellings;
pub(crate) mod verify;

pub use databases::{ChosenDatabases, DatabaseName, DatabasesError, choose_databases};
pub use drill::{DrillError, DrillRequest, DrillSource, drill, random_targets};
pub use export::{
    Export, ExportError, ExportFormat, ExportPlan, ExportRequest, ExportSource, ExportTables, Exported,
};
pub use fetch::{FetchError, FetchOutcome, FetchRequest, Fetched, Fetcher};
pub use find_moment::{MomentError, Searched, find_moment};
pub use forward::{
    Finish, Forward, ForwardError, Point, Replay, ReplayMode, ReplayPlan, Replayed, Unknown, choose_replay,
};
pub use indexes::{ArchivedIndexes, SearchError};
pub use install::{InstallError, Installation, ServerUser};
pub use log_names::ArchivedNames;
pub use names::{Followed, NamesError, follow};
pub use queue::{ReadAhead, Wanted};
pub use restore::{
    Actions, BroughtForward, Deletion, Owner, PlaceError, Placed, Reads, Restore, RestoreError,
    RestoreOptions, Restored, restore_command,
};
pub use scratch_server::{ScratchError, ScratchPlace, ScratchServer};
pub use selection::Selection;
pub use start::{Outcome, Server, ServerState, StartError};
pub use tablespaces::made_tablespaces;
pub use tellings::SegmentPart;
