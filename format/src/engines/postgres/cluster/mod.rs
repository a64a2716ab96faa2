//! The files of a cluster that say what state it is in.

mod control;
pub mod data_page;
mod history;
mod label;
mod relation_file;

pub use control::{ClusterState, ControlError, ControlFile, RecoverySettings};
pub use data_page::{PageState, verify_page};
pub use history::{History, HistoryEntry, HistoryError};
pub use label::{BackupHistory, BackupLabel, LabelError, parse_tablespace_map, tablespace_map_text};
pub use relation_file::RelationSegment;
