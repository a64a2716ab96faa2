//! PostgreSQL's read side.

mod fetch;
mod queue;

pub use fetch::{FetchError, FetchOutcome, FetchRequest, Fetched, Fetcher};
pub use queue::{ReadAhead, Wanted};
