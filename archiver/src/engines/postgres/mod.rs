//! PostgreSQL.

mod admit;
pub mod backup;
#[allow(dead_code, reason = "import, which comes next, checks files with it")]
mod checksum;
pub mod connect;
pub mod conninfo;
pub mod control;
mod copy;
pub mod doctor;
pub mod files;
pub mod init;
mod neighbours;
mod pages;
pub mod postmaster;
mod publish;
pub mod push;
pub mod settings;
mod wal_dir;
pub mod watch;

pub use admit::Refusal;
pub use copy::CopyError;
pub use publish::PublishError;
