//! PostgreSQL: its WAL and the files of a cluster.

pub mod catalogue;
pub mod changes;
pub mod cluster;
pub mod detail;
pub mod effects;
pub mod scan;
pub mod wal;
