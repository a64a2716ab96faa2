//! Putting objects whose names nobody else can have.

use waltide_storage::{Archive, Bytes, Put, StorageError};

/// Creates an object under a name that is this writer's alone. One that is there already is our own, put by an attempt
/// whose acknowledgement was lost, or it is somebody else's and the name was not ours: its bytes tell.
pub(crate) async fn put_own(archive: &Archive, path: &str, object: Bytes) -> Result<(), StorageError> {
    match archive.put_new(path, object.clone()).await? {
        Put::Created => Ok(()),
        Put::Exists => match archive.get(path, object.len() as u64).await {
            Ok(found) if found == object => Ok(()),
            Ok(_) | Err(StorageError::TooLarge { .. }) => {
                let source = "an object of this name is there, with other contents".into();
                Err(StorageError::Other { path: path.to_owned(), source })
            }
            Err(e) => Err(e),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_object_of_that_name_is_success_only_with_the_same_bytes() {
        let scratch = tempfile::tempdir().unwrap();
        let url = scratch.path().join("a").to_str().unwrap().parse().unwrap();
        let archive = Archive::create(&url).await.unwrap();
        for _ in 0..2 {
            put_own(&archive, "m/x", Bytes::from_static(b"one")).await.unwrap();
        }
        for other in ["two", "on", "longer"] {
            let e = put_own(&archive, "m/x", Bytes::from(other)).await.unwrap_err();
            assert!(matches!(e, StorageError::Other { .. }), "{other}: {e}");
        }
    }
}
