//! Merged indexes: made of segments' indexes when there is time, and read instead of those.

mod build;
mod read;

pub use build::{Indexed, MadeIndex, MergeError, Merging, SkippedIndex};
pub(crate) use read::tell;
