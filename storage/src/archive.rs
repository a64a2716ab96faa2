//! One archive: what the rest of Waltide may do with stored objects.

use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::TryStreamExt;
use object_store::path::Path;
use object_store::{
    Error, GetOptions, GetRange, GetResult, GetResultPayload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMode,
};

use crate::faulty::{Faults, FaultyStore};
use crate::local::{LocalFiles, has_one_thread};
use crate::{ArchiveUrl, StorageError, path};

/// So much is read as soon as another thread is told to.
const SMALL_BYTES: u64 = 64 << 10;

/// A place that keeps objects. Cloning is cheap. Its methods need a tokio runtime.
#[derive(Clone, Debug)]
pub struct Archive(Arc<Inner>);

#[derive(Clone, Debug)]
struct Inner {
    url: String,
    store: Arc<dyn ObjectStore>,
    /// What local files can do and object stores in general cannot: sync and sweep.
    files: Option<LocalFiles>,
    faults: Option<Faults>,
}

/// What a put found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// The object is new and holds the given bytes.
    Created,
    /// An object of that name was there and is unchanged; whether it holds the same bytes is for the caller to see.
    Exists,
}

/// An object, as a listing describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// The object's whole path in the archive.
    pub path: String,
    /// Its size in bytes.
    pub size: u64,
    /// When it was stored, in milliseconds since 1970.
    pub modified_unix_ms: i64,
    /// Changes when the object does; compared for equality only.
    pub version: String,
}

/// One level of the archive, both parts sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// The names of the directories, without the path they lie in.
    pub dirs: Vec<String>,
    /// The objects, with their whole paths.
    pub objects: Vec<ObjectInfo>,
}

/// An unfinished file of a writer that was killed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// Its path in the archive.
    pub path: String,
    /// Its size in bytes.
    pub size: u64,
    /// When it was last written to, in milliseconds since 1970.
    pub modified_unix_ms: i64,
}

impl Archive {
    /// Makes the place, or opens it where it is already there. Local: directories 0700, synced.
    pub async fn create(url: &ArchiveUrl) -> Result<Self, StorageError> {
        Self::local(url, LocalFiles::create).await
    }

    /// Opens a place that is there.
    pub async fn open(url: &ArchiveUrl) -> Result<Self, StorageError> {
        Self::local(url, LocalFiles::open).await
    }

    async fn local(
        url: &ArchiveUrl,
        open: fn(&std::path::Path) -> std::io::Result<LocalFiles>,
    ) -> Result<Self, StorageError> {
        let name = url.to_string();
        let why = "this build keeps archives in local files; give a path or file:///path";
        let invalid = || StorageError::InvalidUrl { url: name.clone(), why };
        let root = url.local_path().ok_or_else(invalid)?.to_owned();
        let opened = tokio::task::spawn_blocking(move || open(&root)).await;
        let files = opened
            .map_err(|e| StorageError::Other { path: name.clone(), source: e.into() })?
            .map_err(|e| StorageError::io(&name, e))?;
        Ok(Self(Arc::new(Inner {
            url: name,
            store: Arc::new(files.clone()),
            files: Some(files),
            faults: None,
        })))
    }

    /// An archive on any object store.
    pub fn from_store(store: Arc<dyn ObjectStore>, name: &str) -> Self {
        Self(Arc::new(Inner { url: name.to_owned(), store, files: None, faults: None }))
    }

    /// The same place, with faults between it and the caller.
    #[must_use]
    pub fn with_faults(&self, faults: Faults) -> Self {
        let mut inner = (*self.0).clone();
        inner.store = Arc::new(FaultyStore::new(inner.store, inner.files.clone(), faults.clone()));
        inner.faults = Some(faults);
        Self(Arc::new(inner))
    }

    /// The archive's address, for messages.
    pub fn url(&self) -> &str {
        &self.0.url
    }

    /// Creates an object, unless there is one of that name. Durable when it returns, in both cases: an object that is
    /// already there is synced, with its directories up to the root, because its writer may have been killed.
    pub async fn put_new(&self, path: &str, bytes: Bytes) -> Result<Put, StorageError> {
        let at = path::object(path)?;
        match self.0.store.put_opts(&at, bytes.into(), PutMode::Create.into()).await {
            Ok(_) => Ok(Put::Created),
            Err(e @ (Error::AlreadyExists { .. } | Error::Precondition { .. })) => {
                // A store may also say so while another's put of that name is still under way, and may yet fail.
                if self.0.files.is_none() && self.head(path).await?.is_none() {
                    return Err(StorageError::Unreachable { path: path.to_owned(), source: e.into() });
                }
                Ok(Put::Exists)
            }
            Err(e) => Err(StorageError::from_store(path, e)),
        }
    }

    /// A whole object of at most `max_bytes`; its size is checked before memory is taken.
    pub async fn get(&self, path: &str, max_bytes: u64) -> Result<Bytes, StorageError> {
        let found = self.get_opts(path, GetOptions::default()).await?;
        match found.meta.size {
            size if size > max_bytes => {
                Err(StorageError::TooLarge { path: path.to_owned(), size, max: max_bytes })
            }
            _ => collect(path, found).await,
        }
    }

    /// A part of an object. A range that the object does not hold in full is [`StorageError::OutOfRange`].
    pub async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, StorageError> {
        let Range { start, end } = range;
        let out_of = |size| StorageError::OutOfRange { path: path.to_owned(), start, end, size };
        if start < end {
            let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() };
            match self.get_opts(path, options).await {
                Ok(found) if found.meta.size < end => return Err(out_of(found.meta.size)),
                Ok(found) => return collect(path, found).await,
                Err(e @ (StorageError::NotFound { .. } | StorageError::Denied { .. })) => return Err(e),
                // Stores differ in how they refuse a range, so the object's size decides what it was.
                Err(e) => match self.head(path).await {
                    Ok(Some(info)) if info.size < end => return Err(out_of(info.size)),
                    _ => return Err(e),
                },
            }
        }
        match self.head(path).await? {
            Some(info) if start > end || info.size < end => Err(out_of(info.size)),
            Some(_) => Ok(Bytes::new()),
            None => Err(StorageError::NotFound { path: path.to_owned() }),
        }
    }

    /// The last `bytes` bytes of an object, or all of a shorter one, and the object's size.
    pub async fn get_tail(&self, path: &str, bytes: u64) -> Result<(Bytes, u64), StorageError> {
        if bytes > 0 {
            let options = GetOptions { range: Some(GetRange::Suffix(bytes)), ..GetOptions::default() };
            match self.get_opts(path, options).await {
                Ok(found) => {
                    let size = found.meta.size;
                    return Ok((collect(path, found).await?, size));
                }
                // Not every store can count from the end.
                Err(StorageError::Other { .. }) => {}
                // Stores differ in what the end of an empty object is.
                Err(e) => match self.head(path).await {
                    Ok(Some(info)) if info.size == 0 => return Ok((Bytes::new(), 0)),
                    _ => return Err(e),
                },
            }
        }
        let info = self.head(path).await?.ok_or_else(|| StorageError::NotFound { path: path.to_owned() })?;
        let tail = self.get_range(path, info.size.saturating_sub(bytes)..info.size).await?;
        Ok((tail, info.size))
    }

    /// Reads an object from its end on. `decode` gets the last bytes and the object's size, at first so many as `bytes`
    /// says, and answers with how many it needs where those are too few.
    pub async fn read_end<T, E>(
        &self,
        path: &str,
        mut bytes: u64,
        mut decode: impl FnMut(&[u8], u64) -> Result<Result<T, u64>, E>,
    ) -> Result<Result<T, E>, StorageError> {
        loop {
            let (tail, size) = self.get_tail(path, bytes).await?;
            match decode(&tail, size) {
                Ok(Ok(found)) => return Ok(Ok(found)),
                Ok(Err(needed)) if needed <= tail.len() as u64 || needed > size => {
                    let start = size.saturating_sub(needed);
                    return Err(StorageError::OutOfRange { path: path.to_owned(), start, end: size, size });
                }
                Ok(Err(needed)) => bytes = needed,
                Err(e) => return Ok(Err(e)),
            }
        }
    }

    /// What is known of an object without reading it; none if it is not there.
    pub async fn head(&self, path: &str) -> Result<Option<ObjectInfo>, StorageError> {
        match self.get_opts(path, GetOptions { head: true, ..GetOptions::default() }).await {
            Ok(found) => Ok(Some(found.meta.into())),
            Err(e) if e.is_not_found() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Every object below a directory (`""` is the whole archive), sorted by path. A directory that is not there is
    /// empty. Leftovers of killed writers are not shown.
    pub async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>, StorageError> {
        let dir = path::directory(prefix)?;
        let found = self.0.store.list(some(&dir)).try_collect().await;
        Ok(objects(found.map_err(|e| self.failed(prefix, e))?))
    }

    /// One level of the archive.
    pub async fn list_names(&self, dir: &str) -> Result<Listing, StorageError> {
        let at = path::directory(dir)?;
        let found = self.0.store.list_with_delimiter(some(&at)).await.map_err(|e| self.failed(dir, e))?;
        let mut dirs: Vec<_> =
            found.common_prefixes.iter().filter_map(|dir| dir.filename()).map(str::to_owned).collect();
        dirs.sort_unstable();
        Ok(Listing { dirs, objects: objects(found.objects) })
    }

    /// Removes an object; one that is not there is removed already.
    pub async fn delete(&self, path: &str) -> Result<(), StorageError> {
        match self.0.store.delete(&path::object(path)?).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(StorageError::from_store(path, e)),
        }
    }

    /// Makes an object that is there durable, with its directories up to the root.
    pub async fn sync(&self, path: &str) -> Result<(), StorageError> {
        let at = path::object(path)?;
        match &self.0.files {
            Some(files) => self.blocking(path, files, move |files| files.sync(&at)).await,
            None => self.get_opts(path, GetOptions { head: true, ..GetOptions::default() }).await.map(drop),
        }
    }

    /// Removes what killed writers left below `prefix`, or only names it in a dry run. `older_than` must exceed the
    /// time that the slowest live writer takes between two writes, and the clocks' difference.
    pub async fn sweep(
        &self,
        prefix: &str,
        older_than: Duration,
        dry_run: bool,
    ) -> Result<Vec<Leftover>, StorageError> {
        let dir = path::directory(prefix)?;
        let Some(files) = &self.0.files else { return Ok(Vec::new()) };
        let swept = self.blocking(prefix, files, move |files| files.sweep(&dir, older_than, dry_run)).await?;
        let leftover = |meta: ObjectMeta| Leftover {
            path: meta.location.into(),
            size: meta.size,
            modified_unix_ms: meta.last_modified.timestamp_millis(),
        };
        Ok(swept.into_iter().map(leftover).collect())
    }

    async fn get_opts(&self, path: &str, options: GetOptions) -> Result<GetResult, StorageError> {
        let found = self.0.store.get_opts(&path::object(path)?, options).await;
        found.map_err(|e| StorageError::from_store(path, e))
    }

    async fn blocking<T: Send + 'static>(
        &self,
        path: &str,
        files: &LocalFiles,
        work: impl FnOnce(&LocalFiles) -> object_store::Result<T> + Send + 'static,
    ) -> Result<T, StorageError> {
        let done = match &self.0.faults {
            Some(faults) => faults.around(files.blocking(work)).await,
            None => files.blocking(work).await,
        };
        done.map_err(|e| self.failed(path, e))
    }

    fn failed(&self, path: &str, e: Error) -> StorageError {
        StorageError::from_store(if path.is_empty() { self.url() } else { path }, e)
    }
}

impl From<ObjectMeta> for ObjectInfo {
    fn from(meta: ObjectMeta) -> Self {
        let modified_unix_ms = meta.last_modified.timestamp_millis();
        let version = match (meta.e_tag, meta.version) {
            (Some(tag), _) | (None, Some(tag)) => tag,
            (None, None) => format!("{}-{modified_unix_ms}", meta.size),
        };
        Self { path: meta.location.into(), size: meta.size, modified_unix_ms, version }
    }
}

fn some(dir: &Path) -> Option<&Path> {
    (!dir.is_root()).then_some(dir)
}

fn objects(found: Vec<ObjectMeta>) -> Vec<ObjectInfo> {
    let usable = |meta: &ObjectMeta| path::object(meta.location.as_ref()).is_ok();
    let mut objects: Vec<ObjectInfo> = found.into_iter().filter(usable).map(ObjectInfo::from).collect();
    objects.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    objects
}

/// The bytes of a range whose length is known to be bearable. A store that sends more or fewer is not believed.
async fn collect(path: &str, found: GetResult) -> Result<Bytes, StorageError> {
    let failed = |e| StorageError::from_store(path, e);
    let expected = found.range.end.saturating_sub(found.range.start);
    let bytes = match found.payload {
        GetResultPayload::File(..) if expected == 0 => Bytes::new(),
        GetResultPayload::File(file, _) if expected <= SMALL_BYTES && has_one_thread() => {
            let mut bytes = vec![0; usize::try_from(expected).unwrap_or_default()];
            match file.read_exact_at(&mut bytes, found.range.start) {
                Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Err(changed(path)),
                read => read.map_err(|e| StorageError::io(path, e))?,
            }
            bytes.into()
        }
        GetResultPayload::File(..) => found.bytes().await.map_err(failed)?,
        GetResultPayload::Stream(mut parts) => {
            let mut bytes = BytesMut::new();
            while let Some(part) = parts.try_next().await.map_err(failed)? {
                if part.len().saturating_add(bytes.len()) as u64 > expected {
                    return Err(changed(path));
                }
                bytes.extend_from_slice(&part);
            }
            bytes.freeze()
        }
    };
    if bytes.len() as u64 == expected { Ok(bytes) } else { Err(changed(path)) }
}

fn changed(path: &str) -> StorageError {
    let source = "its size changed while it was read".into();
    StorageError::Unreachable { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;

    /// A runtime of one thread does small things itself.
    #[tokio::test]
    async fn every_back_end_conforms_in_a_runtime_of_one_thread() {
        every_back_end_conforms_with_and_without_faults_in_front().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn every_back_end_conforms_in_a_runtime_of_several() {
        every_back_end_conforms_with_and_without_faults_in_front().await;
    }

    async fn every_back_end_conforms_with_and_without_faults_in_front() {
        let dir = tempfile::tempdir().unwrap();
        let url = dir.path().join("made/for it").to_str().unwrap().parse().unwrap();
        let memory = Archive::from_store(Arc::new(InMemory::new()), "memory");
        for archive in [Archive::create(&url).await.unwrap(), Archive::open(&url).await.unwrap(), memory] {
            crate::conformance(&archive).await;
            let unarmed = Faults::none();
            crate::conformance(&archive.with_faults(unarmed.clone())).await;
            assert!(unarmed.calls() > 50 && !unarmed.fired());
        }
    }

    #[tokio::test]
    async fn an_archive_that_is_not_there_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let url: ArchiveUrl = dir.path().join("gone").to_str().unwrap().parse().unwrap();
        let error = Archive::open(&url).await.unwrap_err();
        assert!(matches!(error, StorageError::Unreachable { .. }));
        assert_eq!(
            error.to_string(),
            format!(
                "the archive cannot serve {url}; check that it is mounted, reachable and healthy, then retry"
            )
        );
    }

    #[tokio::test]
    async fn a_large_object_is_refused_before_memory_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let archive = Archive::create(&dir.path().to_str().unwrap().parse().unwrap()).await.unwrap();
        let size = 1 << 40;
        std::fs::File::create(dir.path().join("sparse")).unwrap().set_len(size).unwrap();
        let error = archive.get("sparse", 1 << 20).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "sparse has 1099511627776 bytes where 1048576 are the most; it is not what its name says, inspect it"
        );
        let (tail, found) = archive.get_tail("sparse", 7).await.unwrap();
        assert_eq!((&tail[..], found), (&[0; 7][..], size));
        assert_eq!(archive.get_range("sparse", size - 2..size).await.unwrap(), &[0; 2][..]);
        assert!(archive.get_range("sparse", 0..size + 1).await.is_err());
    }
}
