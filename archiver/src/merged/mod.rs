//! Merged indexes: made of segments' indexes when there is time, and read instead of those.

mod build;
mod chain;
mod idle;
mod read;
mod retire;

pub use build::{Indexed, MadeIndex, MergeError, Merging, SkippedIndex};
pub(crate) use chain::Chaining;
pub(crate) use idle::IdleMerge;
pub use idle::catch_up;
pub(crate) use read::{ListedIndex, get, list, newest, tell};
pub(crate) use retire::retired;
