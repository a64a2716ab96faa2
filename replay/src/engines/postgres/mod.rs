//! PostgreSQL's read side.

mod fetch;
mod indexes;
mod queue;
pub(crate) mod verify;

pub use fetch::{FetchError, FetchOutcome, FetchRequest, Fetched, Fetcher};
pub use indexes::{ArchivedIndexes, SearchError};
pub use queue::{ReadAhead, Wanted};
