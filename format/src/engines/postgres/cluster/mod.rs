//! The files of a cluster that say what state it is in.

mod control;
pub mod data_page;
mod history;
mod label;
mod origins;
mod relation_file;
mod two_phase;

pub use control::{CleanEnd, ClusterState, ControlError, ControlFile, HandOver, RecoverySettings};
pub use data_page::{PageState, verify_page};
pub use history::{History, HistoryEntry, HistoryError};
pub use label::{BackupHistory, BackupLabel, LabelError, parse_tablespace_map, tablespace_map_text};
pub use origins::{ORIGINS_BYTES_MAX, read_origins, write_origins};
pub use relation_file::{
    DEFAULT_TABLESPACE, GLOBAL_TABLESPACE, RelationSegment, relation_path, version_directory,
};
pub use two_phase::{
    TWO_PHASE_BYTES_MAX, check_two_phase, read_two_phase_file, two_phase_file, two_phase_name, two_phase_xid,
};
