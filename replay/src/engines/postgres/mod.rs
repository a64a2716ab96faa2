//! PostgreSQL's read side.

mod fetch;
mod indexes;
mod queue;
mod restore;
mod start;
pub(crate) mod verify;

pub use fetch::{FetchError, FetchOutcome, FetchRequest, Fetched, Fetcher};
pub use indexes::{ArchivedIndexes, SearchError};
pub use queue::{ReadAhead, Wanted};
pub use restore::{
    Actions, Deletion, Owner, PlaceError, Placed, Restore, RestoreError, RestoreOptions, Restored,
    restore_command,
};
pub use start::{Outcome, Server, ServerState, StartError};
