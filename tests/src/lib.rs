//! Harness and end-to-end tests against real PostgreSQL.
//!
//! A test makes a [`Scratch`], a [`Cluster`] in it and a [`Waltide`] that knows the archive; dropping them
//! kills every server and removes every file. `WALTIDE_KEEP=1` keeps the files of a run to look at,
//! `WALTIDE_PG_BIN` names another PostgreSQL than Debian's version 15, of another major version too (`scripts/test --majors`).

mod error;
pub mod load;
pub mod oracle;
pub mod pages;
mod postgres;
mod process;
mod scratch;
pub mod site;
pub mod stored;
mod waltide;
pub mod workload;

pub use error::{Failure, Result};
pub use postgres::{Cluster, ClusterBuilder, PgInstall, StopMode};
pub use process::{Background, Output, Runner, poll_until};
pub use scratch::Scratch;
pub use site::Site;
pub use waltide::Waltide;
