//! PostgreSQL.

pub mod connect;
pub mod conninfo;
pub mod control;
pub mod init;
pub mod postmaster;
pub mod settings;
#[expect(dead_code, reason = "push, which comes next, reads segments with it")]
mod wal_dir;
