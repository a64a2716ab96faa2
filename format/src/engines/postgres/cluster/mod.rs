//! The files of a cluster that say what state it is in.

mod control;
mod history;

pub use control::{ClusterState, ControlError, ControlFile, RecoverySettings};
pub use history::{History, HistoryEntry, HistoryError};
