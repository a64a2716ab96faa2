//! PostgreSQL: its WAL and the files of a cluster.

pub mod cluster;
pub mod scan;
pub mod wal;
