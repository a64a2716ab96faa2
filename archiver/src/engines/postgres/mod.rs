//! PostgreSQL.

mod admit;
pub mod backup;
mod checksum;
pub mod connect;
pub mod conninfo;
pub mod control;
mod copies;
mod copy;
pub mod doctor;
pub mod files;
pub mod import;
pub mod init;
mod neighbours;
mod pages;
mod parting;
pub mod postmaster;
mod publish;
pub mod push;
pub mod settings;
mod wal_dir;
mod wanted;

pub mod watch;

pub use admit::Refusal;
pub use copies::Sources;
pub use copy::CopyError;
pub use parting::Parting;
pub use publish::PublishError;
