//! Why a restore was not done.

use std::io;
use std::path::{Path, PathBuf};

use waltide_format::engines::postgres::cluster::HistoryError;
use waltide_format::{BackupId, Corrupt, WalFileName};
use waltide_storage::StorageError;

use super::super::fetch::FetchError;
use super::super::forward::{ForwardError, PART_BLOCKS, Unknown};
use super::PlaceError;

/// Why a restore was not done.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The place will not do.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The archive failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// An object of the backup is damaged.
    #[error(
        "{path} is damaged, backup {backup} cannot be restored\nhint: run `waltide verify`; restore from another backup with --backup"
    )]
    Damaged {
        /// The object.
        path: String,
        /// The backup.
        backup: BackupId,
        /// What is wrong with it.
        source: Corrupt,
    },
    /// The manifest is another backup's.
    #[error("{path} says that it is backup {found}\nhint: run `waltide verify`")]
    Foreign {
        /// The object.
        path: String,
        /// What it says.
        found: BackupId,
    },
    /// The backup lacks what every cluster has.
    #[error("backup {backup} has no {what}: it is no cluster's backup")]
    Incomplete {
        /// The backup.
        backup: BackupId,
        /// What it lacks.
        what: &'static str,
    },
    /// A segment that recovery needs could not be put ready.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// A timeline's history cannot be read.
    #[error("{name} is no timeline history\nhint: run `waltide verify`")]
    History {
        /// The file.
        name: WalFileName,
        /// What is wrong.
        source: HistoryError,
    },
    /// No timeline's number is left.
    #[error("the archive has a history of the highest timeline there can be")]
    NoTimeline,
    /// Native replay was asked for, and the log has what it does not know.
    #[error("{0}\nhint: restore with --replay auto or --replay server, without --finish native")]
    Unknown(#[from] Unknown),
    /// Native replay was asked for, and the cluster's large relations are cut into files of another size.
    #[error(
        "relseg_size is {found} blocks, and native replay knows multiples of {PART_BLOCKS}\nhint: restore with --replay auto or --replay server, without --finish native"
    )]
    FileBlocks {
        /// Blocks in a file.
        found: u32,
    },
    /// Native replay failed.
    #[error("native replay failed\nhint: restore with --replay server, without --finish native")]
    Forward(#[from] ForwardError),
    /// Files can be brought forward natively alone.
    #[error("the files can be brought forward natively only, and PostgreSQL was to replay the log")]
    NotNative,
    /// A file could not be written.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

impl RestoreError {
    /// Whether the archive is at fault.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Damaged { .. } | Self::Foreign { .. } | Self::Incomplete { .. } | Self::History { .. } => {
                true
            }
            Self::Storage(e) => e.is_not_found() || matches!(e, StorageError::OutOfRange { .. }),
            Self::Fetch(e) => matches!(
                e,
                FetchError::NotThere { .. }
                    | FetchError::Damaged { .. }
                    | FetchError::Wal { .. }
                    | FetchError::Foreign { .. }
            ),
            Self::Forward(e) => e.is_damage(),
            Self::Place(_)
            | Self::Unknown(_)
            | Self::FileBlocks { .. }
            | Self::NotNative
            | Self::NoTimeline
            | Self::Io { .. } => false,
        }
    }
}

/// The error of an operation on a file that failed.
pub(super) fn io_error<'a>(
    doing: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> RestoreError + 'a {
    move |source| RestoreError::Io { doing, path: path.to_owned(), source }
}
