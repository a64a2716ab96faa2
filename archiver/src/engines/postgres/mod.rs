//! PostgreSQL.

mod admit;
pub mod connect;
pub mod conninfo;
pub mod control;
pub mod doctor;
pub mod init;
mod neighbours;
pub mod postmaster;
pub mod push;
pub mod settings;
mod wal_dir;
pub mod watch;

pub use admit::Refusal;
