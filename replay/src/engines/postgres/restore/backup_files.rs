//! Single files of a backup, read without restoring the rest.

use waltide_format::archive::{ExtentMap, Manifest, ManifestFile, SystemLayout};
use waltide_format::{BackupId, Corrupt};
use waltide_storage::Archive;

use super::pieces::{Piece, flatten, jobs};
use super::{RestoreError, read_manifest, read_maps, write};

/// PostgreSQL cuts relations into files of this length.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// The files of a backup, to be read one by one.
#[derive(Debug)]
pub(crate) struct BackupFiles {
    archive: Archive,
    layout: SystemLayout,
    manifest: Manifest,
    maps: Vec<ExtentMap>,
}

impl BackupFiles {
    /// Reads the backup's manifest and extent maps.
    pub(crate) async fn open(
        archive: &Archive,
        layout: SystemLayout,
        id: &BackupId,
    ) -> Result<Self, RestoreError> {
        let manifest = read_manifest(archive, &layout, id).await?;
        let maps = read_maps(archive, &layout, &manifest).await?;
        Ok(Self { archive: archive.clone(), layout, manifest, maps })
    }

    /// The files there are.
    pub(crate) fn files(&self) -> &[ManifestFile] {
        &self.manifest.files
    }

    /// A file's content; `None` where the backup has no such file.
    pub(crate) async fn read(&self, path: &str) -> Result<Option<Vec<u8>>, RestoreError> {
        let found = self.manifest.files.iter().enumerate().find(|(_, file)| file.path == path);
        let Some((number, file)) = found else { return Ok(None) };
        let id = &self.manifest.id;
        let pieces = flatten(number, file, &self.maps);
        let pieces = pieces.map_err(|source| damaged(&self.layout, id, None, source))?;
        contents(&self.archive, &self.layout, id, &self.maps, pieces, file.bytes).await.map(Some)
    }
}

/// Damage in a pack, or else in what the manifest says.
pub(super) fn damaged(
    layout: &SystemLayout,
    id: &BackupId,
    path: Option<&str>,
    source: Corrupt,
) -> RestoreError {
    let path = path.map_or_else(|| layout.manifest(id), str::to_owned);
    RestoreError::Damaged { path, backup: id.clone(), source }
}

/// The content of a file of `bytes` bytes whose pieces these are.
pub(super) async fn contents(
    archive: &Archive,
    layout: &SystemLayout,
    id: &BackupId,
    maps: &[ExtentMap],
    pieces: Vec<Piece>,
    bytes: u64,
) -> Result<Vec<u8>, RestoreError> {
    let damaged = |path: Option<&str>, source| damaged(layout, id, path, source);
    // Memory is taken for what is stored, and for the zeros between that; a length that nothing backs is refused.
    let end = pieces.iter().map(|p| p.file_offset().saturating_add(p.bytes())).max().unwrap_or(0);
    let len = bytes.min(end);
    if len > FILE_BYTES_MAX {
        return Err(damaged(None, Corrupt::too_large("files.bytes", 0, len, FILE_BYTES_MAX)));
    }
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    let mut contents = vec![0; len];
    for job in jobs(pieces, maps).map_err(|source| damaged(None, source))? {
        let path = layout.pack(&job.pack);
        let stored = archive.get_range(&path, job.range.clone()).await?;
        for piece in &job.pieces {
            let raw = write::frame(&stored, &job, piece).map_err(|e| damaged(Some(&path), e))?;
            let at = usize::try_from(piece.file_offset()).unwrap_or(usize::MAX);
            let to = at.saturating_add(raw.len());
            if let Some(place) = contents.get_mut(at..to) {
                place.copy_from_slice(&raw);
            }
        }
    }
    Ok(contents)
}
