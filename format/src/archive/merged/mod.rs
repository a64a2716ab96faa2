//! Many segments' indexes as one, merged upwards in steps, so that a question over a year of WAL reads a few objects.
//!
//! Made of segments that follow one another on one timeline; never needed for an answer. Spec: docs/format.md,
//! "Merged index".

mod groups;
mod merge;
mod names;
mod object;
mod summary;
#[cfg(test)]
mod tests;

pub use groups::MergeGroup;
pub use merge::{MergedIndex, MergedSegment, RelationSegments, TouchedFork};
pub use names::{NamesLog, OverEdge};
pub use object::{MERGED_SECTIONS, MergedDirectory, MergedObject, MergedSection};
pub use summary::MergedSummary;

/// How many segments an object of each step covers. Each step reads sixteen objects of the one below: 256 MiB, 4 GiB and
/// 64 GiB of WAL where segments have 16 MiB.
pub const MERGE_STEPS: [u64; 3] = [16, 256, 4096];

/// What the builder writes. Raised whenever it learns to say more, so that its objects take precedence.
pub const MERGE_BUILDER: u16 = 2;
