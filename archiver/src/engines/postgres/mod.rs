//! PostgreSQL.

pub mod connect;
pub mod conninfo;
pub mod postmaster;
pub mod settings;
