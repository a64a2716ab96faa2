//! PostgreSQL.

pub mod connect;
pub mod conninfo;
pub mod postmaster;
