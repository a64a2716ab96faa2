//! Why an effect was not carried out.

use std::io;
use std::path::{Path, PathBuf};

use waltide_format::{Corrupt, Oid, Xid};

/// Why the state of a data directory was not brought forward. The directory is of no use afterwards.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The system refused it.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// With what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of the base backup, or a record, is not what it should be.
    #[error("{} is damaged", path.display())]
    Damaged {
        /// The file, or the one that the record is about.
        path: PathBuf,
        /// What is wrong with it.
        source: Corrupt,
    },
    /// A file ends before the page that a record changes.
    #[error("{} ends at byte {found}, and the log changes the page that ends at byte {needed}", path.display())]
    PageMissing {
        /// The file.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// Where the page ends.
        needed: u64,
    },
    /// What should be a directory of the cluster's own is something else, or nothing.
    #[error("{} is not a directory of its own", path.display())]
    NotADirectory {
        /// It.
        path: PathBuf,
    },
    /// It is not said where a tablespace goes.
    #[error("it is not said where tablespace {spc_oid} goes, which the log makes in {path:?}")]
    NoPlace {
        /// The tablespace.
        spc_oid: Oid,
        /// Where it was.
        path: String,
    },
    /// The log changed a database that is not there, and never says that it was dropped.
    #[error("the log changes the database in {}, which is not there and was not dropped", path.display())]
    DatabaseMissing {
        /// Its directory.
        path: PathBuf,
    },
    /// A database was made in a tablespace that is not there, and the tablespace was not dropped.
    #[error("the log makes a database in tablespace {spc_oid}, which is not there and was not dropped")]
    TablespaceMissing {
        /// The tablespace.
        spc_oid: Oid,
    },
    /// A transaction was prepared twice.
    #[error("transaction {xid} was prepared again before it ended")]
    PreparedTwice {
        /// The transaction.
        xid: Xid,
    },
}

/// Makes an [`io::Error`] say what was tried.
pub(super) fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { doing, path, source }
}
