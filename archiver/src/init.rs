//! Makes an archive and a cluster in it. Objects are created, never replaced; what is there already is read and must fit.

use std::io::Read as _;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use waltide_format::archive::{ClusterInfo, Envelope, Layout, ObjectKind, WaltideInfo};
use waltide_format::{Corrupt, SystemId, TimestampTz};
use waltide_storage::{Archive, ArchiveUrl, Put, StorageError};

/// The version of docs/format.md that archives are made in.
pub const FORMAT_VERSION: u32 = 1;
/// No JSON object of an archive is larger.
pub(crate) const JSON_BYTES_MAX: u64 = 1 << 20;

/// Why an archive or a cluster in it could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InitError {
    /// The archive follows a format that this program does not know.
    #[error("{archive} follows format version {found}, this program knows {FORMAT_VERSION}")]
    Version {
        /// The archive's address.
        archive: String,
        /// Its version.
        found: u32,
    },
    /// The cluster's name belongs to another kind of database.
    #[error("cluster {cluster} of {archive} is {found:?}, not {expected:?}")]
    Engine {
        /// The cluster.
        cluster: String,
        /// The archive's address.
        archive: String,
        /// The engine it has.
        found: String,
        /// The engine asked for.
        expected: String,
    },
    /// An object of the archive is not what its name says.
    #[error("{path} of {archive} is damaged")]
    Damaged {
        /// The object.
        path: String,
        /// The archive's address.
        archive: String,
        /// What is wrong with it.
        source: Corrupt,
    },
    /// No random number for the archive's identity.
    #[error("/dev/urandom cannot be read")]
    Random(#[source] std::io::Error),
    /// The archive itself failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// Whether something was made or was there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Made {
    /// It is new.
    Created,
    /// It was there and fits.
    Existing,
}

/// Makes the place and its `waltide.json`, or opens an archive that is there.
pub async fn make_archive(url: &ArchiveUrl, now: TimestampTz) -> Result<(Archive, Made), InitError> {
    let archive = Archive::create(url).await?;
    let path = Layout::WALTIDE_JSON;
    let info = WaltideInfo { format_version: FORMAT_VERSION, archive_id: random_id()?, created: now };
    match create_json(&archive, path, &info).await? {
        Put::Created => Ok((archive, Made::Created)),
        Put::Exists => {
            if let Some(info) = read_json::<WaltideInfo>(&archive, path).await? {
                known_version(&archive, &info)?;
            }
            Ok((archive, Made::Existing))
        }
    }
}

fn known_version(archive: &Archive, info: &WaltideInfo) -> Result<(), InitError> {
    if info.format_version == FORMAT_VERSION {
        return Ok(());
    }
    Err(InitError::Version { archive: archive.url().to_owned(), found: info.format_version })
}

/// Makes the cluster's own object, or checks that the one there is of this engine.
pub async fn make_cluster(
    archive: &Archive,
    layout: &Layout,
    engine: &str,
    now: TimestampTz,
) -> Result<Made, InitError> {
    let path = layout.cluster_json();
    let put = create_json(archive, &path, &ClusterInfo { engine: engine.to_owned(), created: now }).await?;
    if put == Put::Created {
        return Ok(Made::Created);
    }
    let found: Option<ClusterInfo> = read_json(archive, &path).await?;
    match found {
        Some(found) if found.engine != engine => Err(InitError::Engine {
            cluster: layout.cluster().to_owned(),
            archive: archive.url().to_owned(),
            found: found.engine,
            expected: engine.to_owned(),
        }),
        _ => Ok(Made::Existing),
    }
}

/// The system identifiers that the cluster has had, by number.
pub async fn systems(archive: &Archive, layout: &Layout) -> Result<Vec<SystemId>, StorageError> {
    let listing = archive.list_names(&layout.prefix()).await?;
    let mut systems: Vec<SystemId> = listing.dirs.iter().filter_map(|dir| dir.parse().ok()).collect();
    systems.sort_unstable();
    Ok(systems)
}

/// A JSON object of the archive, if it is there.
pub(crate) async fn read_json<T: DeserializeOwned>(
    archive: &Archive,
    path: &str,
) -> Result<Option<T>, InitError> {
    let object = match archive.get(path, JSON_BYTES_MAX).await {
        Ok(object) => object,
        Err(e) if e.is_not_found() => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let damaged =
        |source| InitError::Damaged { path: path.to_owned(), archive: archive.url().to_owned(), source };
    Envelope::open_json(&object, ObjectKind::Json).map(Some).map_err(damaged)
}

pub(crate) async fn create_json<T: Serialize>(
    archive: &Archive,
    path: &str,
    value: &T,
) -> Result<Put, StorageError> {
    archive.put_new(path, Bytes::from(Envelope::seal_json(ObjectKind::Json, value))).await
}

/// 128 random bits in hexadecimal.
fn random_id() -> Result<String, InitError> {
    let mut bits = [0; 16];
    let mut source = std::fs::File::open("/dev/urandom").map_err(InitError::Random)?;
    source.read_exact(&mut bits).map_err(InitError::Random)?;
    Ok(format!("{:032x}", u128::from_be_bytes(bits)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(dir: &tempfile::TempDir) -> ArchiveUrl {
        dir.path().join("archive").to_str().unwrap().parse().unwrap()
    }

    #[tokio::test]
    async fn an_archive_is_made_once_and_then_opened() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::new("main").unwrap();
        let now = TimestampTz::default();
        let (archive, made) = make_archive(&url(&dir), now).await.unwrap();
        assert_eq!(made, Made::Created);
        let first: WaltideInfo = read_json(&archive, Layout::WALTIDE_JSON).await.unwrap().unwrap();
        assert_eq!(first.archive_id.len(), 32);
        assert_eq!(make_cluster(&archive, &layout, "postgres", now).await.unwrap(), Made::Created);
        let (archive, made) = make_archive(&url(&dir), now).await.unwrap();
        assert_eq!(made, Made::Existing);
        assert_eq!(read_json::<WaltideInfo>(&archive, Layout::WALTIDE_JSON).await.unwrap(), Some(first));
        assert_eq!(make_cluster(&archive, &layout, "postgres", now).await.unwrap(), Made::Existing);
        let e = make_cluster(&archive, &layout, "sqlite", now).await.unwrap_err();
        assert_eq!(
            e.to_string(),
            format!("cluster main of {} is \"postgres\", not \"sqlite\"", archive.url())
        );
        assert_eq!(systems(&archive, &layout).await.unwrap(), []);
    }

    #[tokio::test]
    async fn an_archive_of_another_version_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let archive = Archive::create(&url(&dir)).await.unwrap();
        let (archive_id, created) = (random_id().unwrap(), TimestampTz::default());
        let info = WaltideInfo { format_version: 9, archive_id, created };
        create_json(&archive, Layout::WALTIDE_JSON, &info).await.unwrap();
        let e = make_archive(&url(&dir), TimestampTz::default()).await.unwrap_err();
        assert_eq!(
            e.to_string(),
            format!("{} follows format version 9, this program knows 1", archive.url())
        );
    }
}
