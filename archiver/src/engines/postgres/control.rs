//! Reads `global/pg_control` and PG_VERSION of a data directory, with its server running or not.

use std::path::{Path, PathBuf};

use waltide_format::PgMajor;
use waltide_format::engines::postgres::cluster::{ControlError, ControlFile};

use super::wal_dir::read_head;

/// pg_control is 8192 bytes long in every version.
const CONTROL_BYTES: u64 = 8192;
/// The server rewrites pg_control in place, so a reader may see half of it; it is small, and written at once.
const TRIES: u32 = 20;

/// Why a data directory says nothing about itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlFileError {
    /// A file could not be read.
    #[error("{} cannot be read\nhint: --data-dir names the directory with PG_VERSION and global/pg_control", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The major version is not one that is understood.
    #[error("{} is of PostgreSQL {found}, which is not one of the supported majors 13 to 18", data_dir.display())]
    Version {
        /// The data directory.
        data_dir: PathBuf,
        /// What PG_VERSION says.
        found: String,
    },
    /// The control file is damaged.
    #[error("{} cannot be used", path.display())]
    Control {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ControlError,
    },
}

/// What a data directory says about itself.
pub fn read_control(data_dir: &Path) -> Result<ControlFile, ControlFileError> {
    read_control_bytes(data_dir).map(|(_, control)| control)
}

/// The same, and the file as it was read.
pub fn read_control_bytes(data_dir: &Path) -> Result<(Vec<u8>, ControlFile), ControlFileError> {
    let path = data_dir.join("global/pg_control");
    let mut left = TRIES;
    loop {
        let bytes = read_head(&path, CONTROL_BYTES)
            .map_err(|source| ControlFileError::Read { path: path.clone(), source })?;
        left = left.saturating_sub(1);
        match ControlFile::decode(&bytes) {
            Ok(control) => return Ok((bytes, control)),
            Err(ControlError::Corrupt(_)) if left > 0 => std::thread::yield_now(),
            Err(source) => return Err(ControlFileError::Control { path, source }),
        }
    }
}

/// The major version that PG_VERSION names.
pub fn read_version(data_dir: &Path) -> Result<PgMajor, ControlFileError> {
    let path = data_dir.join("PG_VERSION");
    let text = read_head(&path, 64).map_err(|source| ControlFileError::Read { path, source })?;
    let found = String::from_utf8_lossy(&text).trim().to_owned();
    let major = found.parse().ok().and_then(PgMajor::new);
    major.ok_or_else(|| ControlFileError::Version { data_dir: data_dir.to_owned(), found })
}
