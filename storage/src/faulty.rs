//! Faults on demand: any call to the archive fails, loses its acknowledgement, or is torn.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

use crate::local::LocalFiles;

/// Which call goes wrong, and how. Clones share their counters, so keep one to ask afterwards. Calls count from 1.
#[derive(Clone, Debug)]
pub struct Faults(Arc<State>);

#[derive(Debug)]
struct State {
    kind: Kind,
    at: u64,
    calls: AtomicU64,
    fired: AtomicU64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Fail,
    LoseAck,
    Tear,
    Down,
}

impl Faults {
    fn new(kind: Kind, at: u64) -> Self {
        Self(Arc::new(State { kind, at, calls: AtomicU64::new(0), fired: AtomicU64::new(0) }))
    }

    /// Nothing goes wrong; calls are counted.
    pub fn none() -> Self {
        Self::new(Kind::Fail, 0)
    }

    /// The `n`-th call fails without effect.
    pub fn fail_call(n: u64) -> Self {
        Self::new(Kind::Fail, n)
    }

    /// The `n`-th call takes effect, and fails.
    pub fn lose_ack(n: u64) -> Self {
        Self::new(Kind::LoseAck, n)
    }

    /// The `n`-th call fails; a put leaves half of its bytes in an unfinished file, as a killed writer does.
    pub fn torn_write(n: u64) -> Self {
        Self::new(Kind::Tear, n)
    }

    /// The `n`-th call and all after it fail without effect: the archive, or the caller, is gone.
    pub fn down_from(n: u64) -> Self {
        Self::new(Kind::Down, n)
    }

    /// How many calls were made.
    pub fn calls(&self) -> u64 {
        self.0.calls.load(Ordering::SeqCst)
    }

    /// Whether any call went wrong. A loop over n = 1, 2, 3 … ends when this stays false.
    pub fn fired(&self) -> bool {
        self.0.fired.load(Ordering::SeqCst) > 0
    }

    /// Counts a call; the fault that it meets, if any.
    fn next(&self) -> Option<(Kind, Error)> {
        let State { kind, at, calls, fired } = &*self.0;
        let call = calls.fetch_add(1, Ordering::SeqCst).wrapping_add(1);
        if call != *at && !(*kind == Kind::Down && call > *at) {
            return None;
        }
        fired.fetch_add(1, Ordering::SeqCst);
        let source = std::io::Error::other(format!("fault injected at call {call}"));
        Some((*kind, Error::Generic { store: "faults", source: source.into() }))
    }

    pub(crate) async fn around<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        match self.next() {
            None => call.await,
            Some((Kind::LoseAck, e)) => {
                let _ = call.await;
                Err(e)
            }
            Some((_, e)) => Err(e),
        }
    }
}

/// An object store behind faults.
#[derive(Debug)]
pub(crate) struct FaultyStore {
    inner: Arc<dyn ObjectStore>,
    files: Option<LocalFiles>,
    faults: Faults,
}

impl FaultyStore {
    pub(crate) fn new(inner: Arc<dyn ObjectStore>, files: Option<LocalFiles>, faults: Faults) -> Self {
        Self { inner, files, faults }
    }
}

impl std::fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} with faults", self.inner)
    }
}

#[async_trait]
impl ObjectStore for FaultyStore {
    async fn put_opts(&self, at: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        match (self.faults.next(), &self.files) {
            (None, _) => self.inner.put_opts(at, payload, options).await,
            (Some((Kind::LoseAck, e)), _) => {
                let _ = self.inner.put_opts(at, payload, options).await;
                Err(e)
            }
            (Some((Kind::Tear, e)), Some(files)) => {
                let at = at.clone();
                files.blocking(move |files| files.tear(&at, &payload)).await?;
                Err(e)
            }
            (Some((_, e)), _) => Err(e),
        }
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        o: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.faults.around(self.inner.put_multipart_opts(at, o)).await
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        self.faults.around(self.inner.get_opts(at, options)).await
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let (inner, faults) = (Arc::clone(&self.inner), self.faults.clone());
        paths
            .and_then(move |at| {
                let (inner, faults) = (Arc::clone(&inner), faults.clone());
                let one = stream::once(async move { Ok(at) }).boxed();
                async move {
                    let deleted = faults.around(async { inner.delete_stream(one).try_next().await }).await?;
                    deleted.ok_or(Error::Generic { store: "faults", source: "nothing was deleted".into() })
                }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.faults.next() {
            Some((_, e)) => stream::once(async { Err(e) }).boxed(),
            None => self.inner.list(prefix),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.faults.around(self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.faults.around(self.inner.copy_opts(from, to, options)).await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;

    use super::*;
    use crate::{Archive, Put, StorageError};

    async fn archive() -> (tempfile::TempDir, Archive) {
        let dir = tempfile::tempdir().unwrap();
        let archive = Archive::create(&dir.path().to_str().unwrap().parse().unwrap()).await.unwrap();
        (dir, archive)
    }

    #[tokio::test]
    async fn each_call_fails_in_turn_and_a_retry_works() {
        async fn life(archive: &Archive) -> std::result::Result<(), StorageError> {
            archive.put_new("a/b", Bytes::from_static(b"whole")).await?;
            archive.sync("a/b").await?;
            archive.get("a/b", 5).await?;
            archive.get_range("a/b", 1..2).await?;
            archive.get_tail("a/b", 2).await?;
            archive.list("a").await?;
            archive.list_names("a").await?;
            archive.sweep("", Duration::ZERO, false).await?;
            archive.delete("a/b").await
        }
        for faults in [Faults::fail_call, Faults::lose_ack, Faults::torn_write, Faults::down_from] {
            let (dir, archive) = archive().await;
            let mut failures = 0;
            for n in 1.. {
                let armed = faults(n);
                let outcome = life(&archive.with_faults(armed.clone())).await;
                assert_eq!(outcome.is_err(), armed.fired(), "{armed:?}");
                if let Ok(bytes) = archive.get("a/b", 5).await {
                    assert_eq!(bytes, "whole");
                }
                let Err(error) = outcome else { break };
                assert!(matches!(error, StorageError::Unreachable { .. }), "{error:?}");
                let source = std::error::Error::source(&error).unwrap().to_string();
                assert_eq!(source, format!("fault injected at call {n}"));
                life(&archive).await.unwrap();
                failures += 1;
            }
            assert_eq!(failures, 9);
            assert_eq!(std::fs::read_dir(dir.path().join("a")).unwrap().count(), 0, "nothing is left over");
        }
    }

    #[tokio::test]
    async fn a_lost_acknowledgement_leaves_the_object_and_a_torn_write_does_not() {
        let (dir, archive) = archive().await;
        let put = async |faults: Faults| {
            archive.with_faults(faults).put_new("a/b", Bytes::from_static(b"whole")).await
        };
        put(Faults::torn_write(1)).await.unwrap_err();
        assert_eq!(archive.head("a/b").await.unwrap(), None);
        assert_eq!(archive.list("").await.unwrap(), []);
        assert_eq!(std::fs::read(dir.path().join("a/b#1")).unwrap(), b"wh");
        put(Faults::lose_ack(1)).await.unwrap_err();
        assert_eq!(archive.get("a/b", 5).await.unwrap(), "whole");
        assert_eq!(put(Faults::lose_ack(2)).await.unwrap(), Put::Exists);
        let down = archive.with_faults(Faults::down_from(2));
        down.head("a/b").await.unwrap();
        for _ in 0..3 {
            assert!(!down.head("a/c").await.unwrap_err().is_not_found());
        }
    }
}
