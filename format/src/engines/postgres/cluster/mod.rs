//! The files of a cluster that say what state it is in.

mod control;
pub mod data_page;
mod history;
mod label;

pub use control::{ClusterState, ControlError, ControlFile, RecoverySettings};
pub use history::{History, HistoryEntry, HistoryError};
pub use label::{BackupLabel, LabelError, parse_tablespace_map};
