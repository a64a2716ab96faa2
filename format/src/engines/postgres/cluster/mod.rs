//! The files of a cluster that say what state it is in.

mod history;

pub use history::{History, HistoryEntry, HistoryError};
