//! Segments out of the archive: their indexes, and their WAL.

use waltide_format::Corrupt;
use waltide_format::archive::{SegmentDirectory, SegmentIndex, StoredSegment};
use waltide_storage::{Archive, StorageError};

/// Most indexes lie in this much of their object's end.
const TAIL_BYTES: u64 = 64 << 10;
/// No segment's object is larger: 1 GiB of WAL that does not compress, with its index.
const OBJECT_BYTES_MAX: u64 = 3 << 30;

/// Why a segment could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    /// The archive failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The object is damaged.
    #[error("{path} is damaged: {source}")]
    Damaged {
        /// The object.
        path: String,
        /// What is wrong with it.
        source: Corrupt,
    },
}

impl ReadError {
    /// Whether the object is at fault, rather than the way to it.
    pub(crate) fn is_bad_object(&self) -> bool {
        match self {
            Self::Storage(e) => e.is_not_found() || e.is_bad_object(),
            Self::Damaged { .. } => true,
        }
    }
}

/// A segment's index, out of its object's end.
pub(crate) async fn read_index(archive: &Archive, path: &str) -> Result<SegmentIndex, ReadError> {
    let read = archive.read_end(path, TAIL_BYTES, SegmentDirectory::with_index).await?;
    let (_, index) = read.map_err(|source| ReadError::Damaged { path: path.to_owned(), source })?;
    Ok(index)
}

/// A whole segment, every checksum of it checked.
pub(crate) async fn read_stored(archive: &Archive, path: &str) -> Result<StoredSegment, ReadError> {
    let object = archive.get(path, OBJECT_BYTES_MAX).await?;
    let decoded = tokio::task::spawn_blocking(move || StoredSegment::decode(&object)).await;
    let decoded = decoded.expect("decoding a segment does not panic");
    decoded.map_err(|source| ReadError::Damaged { path: path.to_owned(), source })
}
