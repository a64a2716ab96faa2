//! Durable local files behind `object_store`'s trait.
//!
//! The layout is that of `object_store`'s own `LocalFileSystem` (a staging file `name#1`, linked under its name), the
//! code is not, because its `with_fsync` promises less than we do: it syncs the directories it made itself but not
//! those of a writer that was killed, nor an object that it finds in place; its modes come from the umask; it follows
//! symbolic links; and a root that is not mounted looks to it like an object that is not there.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use tokio::runtime::{Handle, RuntimeFlavor};

use crate::error::Refused;
use crate::path::{bad_name, is_leftover};

const NAME: &str = "local files";
const DIR_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

/// A directory tree used as an object store. Cloning is cheap.
#[derive(Clone, Debug)]
pub(crate) struct LocalFiles {
    root: Arc<PathBuf>,
    /// Whose what we make is to be where we are root and the archive is another's: what root leaves behind in it would
    /// be closed to the server that ships to it.
    owner: Option<(u32, u32)>,
    #[cfg(test)]
    pub(crate) synced: Arc<std::sync::Mutex<Vec<PathBuf>>>,
}

/// Which files a walk is about: objects, or what killed writers left.
#[derive(Clone, Copy, PartialEq)]
enum Wanted {
    Objects,
    Leftovers,
}

impl LocalFiles {
    /// The tree below `root`, which must be there.
    pub(crate) fn open(root: &std::path::Path) -> io::Result<Self> {
        let root = fs::canonicalize(root)?;
        let meta = fs::metadata(&root)?;
        if !meta.is_dir() {
            return Err(io::Error::new(
                ErrorKind::NotADirectory,
                format!("{} is not a directory", root.display()),
            ));
        }
        let foreign = rustix::process::geteuid().is_root() && meta.uid() != 0;
        Ok(Self {
            root: Arc::new(root),
            owner: foreign.then(|| (meta.uid(), meta.gid())),
            #[cfg(test)]
            synced: Arc::default(),
        })
    }

    /// Makes `root` and what is missing above it. The directory above the first new one is synced too; where none is
    /// new, the one above `root`, because whoever made it may have been killed before that.
    pub(crate) fn create(root: &std::path::Path) -> io::Result<Self> {
        let missing: Vec<_> = root.ancestors().take_while(|dir| !dir.exists()).collect();
        for dir in missing.iter().rev() {
            match make_directory(dir) {
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                done => done?,
            }
        }
        let files = Self::open(root)?;
        let canonical = Arc::clone(&files.root);
        for (at, dir) in canonical.ancestors().enumerate().take(missing.len().max(1).saturating_add(1)) {
            match files.sync_directory(dir) {
                // What lies above may be closed to us. A new entry in it is then synced with its whole file system.
                Err(e) if e.kind() == ErrorKind::PermissionDenied && at >= missing.len().max(1) => {
                    if !missing.is_empty() {
                        rustix::fs::syncfs(File::open(&*canonical)?)?;
                    }
                }
                done => done?,
            }
        }
        Ok(files)
    }

    fn file(&self, at: &Path) -> PathBuf {
        match at.is_root() {
            true => self.root.to_path_buf(),
            false => self.root.join(at.as_ref()),
        }
    }

    fn root_is_there(&self) -> Result<()> {
        match fs::metadata(&*self.root) {
            Ok(meta) if meta.is_dir() => Ok(()),
            Err(e) if e.kind() != ErrorKind::NotFound => Err(failed(e)),
            _ => Err(failed(io::Error::new(
                ErrorKind::NotFound,
                format!("the archive's directory {} is not there", self.root.display()),
            ))),
        }
    }

    /// "No such object", which only an archive that is there can say.
    fn missing(&self, at: &Path) -> Error {
        match self.root_is_there() {
            Ok(()) => Error::NotFound { path: at.to_string(), source: "no such file".into() },
            Err(e) => e,
        }
    }

    /// What lies at `at`, no link followed on the way.
    fn look(&self, at: &Path) -> Result<Option<(PathBuf, Metadata)>> {
        let mut file = self.root.to_path_buf();
        let mut found = None;
        for name in at.as_ref().split('/').filter(|name| !name.is_empty()) {
            file.push(name);
            match fs::symlink_metadata(&file) {
                Ok(meta) if meta.is_symlink() => {
                    return Err(refused(
                        "a symbolic link lies there; the archive follows none, put the files in its place",
                    ));
                }
                Ok(meta) => found = Some(meta),
                Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                    return Ok(None);
                }
                Err(e) => return Err(failed(e)),
            }
        }
        Ok(found.map(|meta| (file, meta)))
    }

    /// The object at `at`. Opening a pipe could block for ever, so only regular files pass.
    fn object(&self, at: &Path) -> Result<Option<(PathBuf, Metadata)>> {
        match self.look(at)? {
            Some((_, meta)) if !meta.is_file() && !meta.is_dir() => {
                Err(refused("neither a file nor a directory lies there; move it out of the archive"))
            }
            found => Ok(found.filter(|(_, meta)| meta.is_file())),
        }
    }

    fn put(&self, at: &Path, payload: &PutPayload) -> Result<()> {
        self.root_is_there()?;
        if self.object(at)?.is_some() {
            return self.already_there(at);
        }
        let dest = self.file(at);
        let (file, staging) = self.stage(at, &dest)?;
        let linked = self.fill(file, &staging, payload).map(|()| fs::hard_link(&staging, &dest));
        let _ = fs::remove_file(&staging);
        match linked.map_err(failed)? {
            Ok(()) => self.sync_directories(at).map_err(failed),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => self.already_there(at),
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::PERM.raw_os_error()) => {
                let why = "this file system has no hard links, which creating an object exactly once needs";
                Err(failed(io::Error::new(ErrorKind::Unsupported, why)))
            }
            Err(e) => Err(failed(e)),
        }
    }

    fn fill(&self, mut file: File, staging: &std::path::Path, payload: &PutPayload) -> io::Result<()> {
        for part in payload {
            file.write_all(part)?;
        }
        self.sync_file(&file, staging)
    }

    /// The writer of an object that is in place may have been killed before it synced the entry, so we do.
    fn already_there(&self, at: &Path) -> Result<()> {
        match self.sync(at) {
            Ok(()) => Err(Error::AlreadyExists { path: at.to_string(), source: "the file exists".into() }),
            Err(Error::NotFound { .. }) => match self.look(at)? {
                Some(_) => Err(refused("a directory has this name; choose another")),
                None => Err(failed(io::Error::other("another process deleted it meanwhile"))),
            },
            Err(e) => Err(e),
        }
    }

    /// Half of a put whose writer died.
    pub(crate) fn tear(&self, at: &Path, payload: &PutPayload) -> Result<()> {
        let (mut file, _) = self.stage(at, &self.file(at))?;
        let mut half = payload.content_length().div_euclid(2);
        for part in payload {
            let (torn, _) = part.split_at(half.min(part.len()));
            file.write_all(torn).map_err(failed)?;
            half = half.saturating_sub(part.len());
        }
        Ok(())
    }

    fn stage(&self, at: &Path, dest: &std::path::Path) -> Result<(File, PathBuf)> {
        self.make_directories(at)?;
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(FILE_MODE);
        for n in 1_u32.. {
            let mut staging = dest.as_os_str().to_owned();
            staging.push(format!("#{n}"));
            match options.open(&staging) {
                Ok(file) => {
                    file.set_permissions(Permissions::from_mode(FILE_MODE)).map_err(failed)?;
                    self.give(&file).map_err(failed)?;
                    return Ok((file, staging.into()));
                }
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(failed(e)),
            }
        }
        Err(refused("unfinished files have used up its names; sweep the archive"))
    }

    fn give(&self, file: &File) -> io::Result<()> {
        match self.owner {
            Some((uid, gid)) => std::os::unix::fs::fchown(file, Some(uid), Some(gid)),
            None => Ok(()),
        }
    }

    /// Gives away a directory, and nothing that someone may have put in its place.
    fn give_directory(&self, dir: &std::path::Path) -> io::Result<()> {
        if self.owner.is_none() {
            return Ok(());
        }
        use rustix::fs::{Mode, OFlags};
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        self.give(&File::from(rustix::fs::open(dir, flags, Mode::empty())?))
    }

    fn make_directories(&self, at: &Path) -> Result<()> {
        let mut dir = self.root.to_path_buf();
        let Some((parents, _)) = at.as_ref().rsplit_once('/') else { return Ok(()) };
        for name in parents.split('/') {
            dir.push(name);
            match make_directory(&dir).and_then(|()| self.give_directory(&dir)) {
                Err(e) if e.kind() == ErrorKind::AlreadyExists => match fs::symlink_metadata(&dir) {
                    Ok(meta) if meta.is_dir() => {}
                    Ok(_) => {
                        return Err(refused(
                            "an object lies where one of its directories should; choose another name",
                        ));
                    }
                    Err(e) => return Err(failed(e)),
                },
                done => done.map_err(failed)?,
            }
        }
        Ok(())
    }

    /// Makes the object and every directory entry on the way to it durable.
    pub(crate) fn sync(&self, at: &Path) -> Result<()> {
        let Some((file, _)) = self.object(at)? else { return Err(self.missing(at)) };
        File::open(&file).and_then(|opened| self.sync_file(&opened, &file)).map_err(failed)?;
        self.sync_directories(at).map_err(failed)
    }

    /// Syncs the directories of `at`, from its own up to the root: any of them may be new, whoever made it.
    fn sync_directories(&self, at: &Path) -> io::Result<()> {
        let file = self.file(at);
        for dir in file.ancestors().skip(1).take_while(|dir| dir.starts_with(&*self.root)) {
            self.sync_directory(dir)?;
        }
        Ok(())
    }

    fn sync_directory(&self, dir: &std::path::Path) -> io::Result<()> {
        match self.sync_file(&File::open(dir)?, dir) {
            // A file system that cannot sync directories says EINVAL; PostgreSQL takes it the same way.
            Err(e) if e.kind() == ErrorKind::InvalidInput => Ok(()),
            done => done,
        }
    }

    #[cfg_attr(not(test), expect(clippy::unused_self, reason = "tests look at what was synced"))]
    fn sync_file(&self, file: &File, _path: &std::path::Path) -> io::Result<()> {
        #[cfg(test)]
        self.synced.lock().unwrap().push(_path.to_owned());
        file.sync_all()
    }

    fn get(&self, at: &Path, options: &GetOptions) -> Result<GetResult> {
        let Some((path, _)) = self.object(at)? else { return Err(self.missing(at)) };
        let file = match File::open(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Err(self.missing(at)),
            opened => opened.map_err(failed)?,
        };
        let meta = describe(at.clone(), &file.metadata().map_err(failed)?);
        options.check_preconditions(&meta)?;
        let range = match &options.range {
            Some(range) => {
                range.as_range(meta.size).map_err(|e| Error::Generic { store: NAME, source: e.into() })?
            }
            None => 0..meta.size,
        };
        let payload = GetResultPayload::File(file, path);
        Ok(GetResult { payload, meta, range, attributes: Default::default(), extensions: Default::default() })
    }

    /// The files below `dir`, and the directories in it where `deep` is false. What storage could not have
    /// made, links above all, is passed over: an archive does not become unreadable by a stray file.
    fn walk(&self, dir: &Path, deep: bool, wanted: Wanted) -> Result<(Vec<Path>, Vec<ObjectMeta>)> {
        self.root_is_there()?;
        let (mut dirs, mut files) = (Vec::new(), Vec::new());
        let mut pending = match dir.is_root() || self.look(dir)?.is_some_and(|(_, meta)| meta.is_dir()) {
            true => vec![dir.clone()],
            false => Vec::new(),
        };
        while let Some(dir) = pending.pop() {
            let entries = match fs::read_dir(self.file(&dir)) {
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                entries => entries.map_err(failed)?,
            };
            for entry in entries {
                let entry = entry.map_err(failed)?;
                let meta = match entry.metadata() {
                    Err(e) if e.kind() == ErrorKind::NotFound => continue,
                    meta => meta.map_err(failed)?,
                };
                let name = entry.file_name();
                let leftover = meta.is_file() && name.to_str().is_some_and(is_leftover);
                let usable = leftover || name.to_str().is_some_and(|name| bad_name(name).is_none());
                let at = name
                    .to_str()
                    .filter(|_| usable)
                    .and_then(|name| Path::parse(format!("{dir}/{name}")).ok());
                match at {
                    // Where the archive is a file system of its own, this belongs to fsck.
                    Some(_) if dir.is_root() && name == "lost+found" => {}
                    Some(at) if meta.is_dir() && deep => pending.push(at),
                    Some(at) if meta.is_dir() => dirs.push(at),
                    Some(at) if meta.is_file() => {
                        if leftover == (wanted == Wanted::Leftovers) {
                            files.push(describe(at, &meta));
                        }
                    }
                    _ => tracing::warn!(path = %entry.path().display(), "not the archive's, passed over"),
                }
            }
        }
        Ok((dirs, files))
    }

    fn remove(&self, at: &Path) -> Result<()> {
        let found = self.object(at)?.map(|(file, _)| fs::remove_file(file));
        let gone = match found {
            Some(Ok(())) => Ok(()),
            Some(Err(e)) if e.kind() != ErrorKind::NotFound => return Err(failed(e)),
            _ => Err(self.missing(at)),
        };
        // Also when another removed it: that one may have been killed before this.
        match self.file(at).parent().map(|dir| self.sync_directory(dir)) {
            Some(Err(e)) if !matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                Err(failed(e))
            }
            _ => gone,
        }
    }

    /// The leftovers below `dir` that nobody has written to for `older_than`, removed unless `dry_run`.
    pub(crate) fn sweep(&self, dir: &Path, older_than: Duration, dry_run: bool) -> Result<Vec<ObjectMeta>> {
        let (_, mut leftovers) = self.walk(dir, true, Wanted::Leftovers)?;
        let mut swept = Vec::new();
        leftovers.sort_unstable_by(|a, b| a.location.cmp(&b.location));
        for leftover in leftovers {
            let file = self.file(&leftover.location);
            // Looked at again, because a writer may have come back to the name since the walk.
            let modified = match fs::symlink_metadata(&file).and_then(|meta| meta.modified()) {
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                modified => modified.map_err(failed)?,
            };
            // A time in the future has no age: the clocks disagree, so it may be a live writer's.
            if SystemTime::now().duration_since(modified).is_ok_and(|age| age >= older_than) {
                if !dry_run {
                    match fs::remove_file(&file) {
                        Err(e) if e.kind() == ErrorKind::NotFound => {}
                        done => done.map_err(failed)?,
                    }
                    if let Some(dir) = file.parent() {
                        self.sync_directory(dir).map_err(failed)?;
                    }
                }
                swept.push(leftover);
            }
        }
        Ok(swept)
    }

    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let files = self.clone();
        tokio::task::spawn_blocking(move || work(&files)).await?
    }

    /// The same for what takes no longer than a look at some names.
    async fn looking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        if has_one_thread() { work(self) } else { self.blocking(work).await }
    }
}

/// Whether the runtime has one thread: it is a command's that is over soon, and has done a small thing itself before another
/// thread would have begun to.
pub(crate) fn has_one_thread() -> bool {
    Handle::current().runtime_flavor() == RuntimeFlavor::CurrentThread
}

/// Makes one directory, 0700 whatever the umask takes away.
fn make_directory(dir: &std::path::Path) -> io::Result<()> {
    DirBuilder::new().mode(DIR_MODE).create(dir)?;
    fs::set_permissions(dir, Permissions::from_mode(DIR_MODE))
}

fn describe(location: Path, meta: &Metadata) -> ObjectMeta {
    let modified = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    let e_tag = format!("{:x}-{:x}.{:x}-{:x}", meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.len());
    ObjectMeta {
        location,
        last_modified: modified.into(),
        size: meta.len(),
        e_tag: Some(e_tag),
        version: None,
    }
}

fn failed(e: io::Error) -> Error {
    Error::Generic { store: NAME, source: e.into() }
}

fn refused(why: &'static str) -> Error {
    Error::Generic { store: NAME, source: Refused(why).into() }
}

fn unsupported(operation: &str) -> Error {
    Error::NotImplemented { operation: operation.to_owned(), implementer: NAME.to_owned() }
}

impl std::fmt::Display for LocalFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.root.display())
    }
}

#[async_trait]
impl ObjectStore for LocalFiles {
    async fn put_opts(&self, at: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        if options.mode != PutMode::Create {
            return Err(unsupported("a put that may replace"));
        }
        let at = at.clone();
        self.blocking(move |files| files.put(&at, &payload)).await?;
        Ok(PutResult { e_tag: None, version: None, extensions: Default::default() })
    }

    async fn put_multipart_opts(&self, _: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        Err(unsupported("a put in parts, which may replace"))
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        let at = at.clone();
        self.looking(move |files| files.get(&at, &options)).await
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let files = self.clone();
        paths
            .and_then(move |at| {
                let files = files.clone();
                async move { files.blocking(move |files| files.remove(&at).map(|()| at)).await }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (files, dir) = (self.clone(), prefix.cloned().unwrap_or_default());
        stream::once(
            async move { files.blocking(move |files| files.walk(&dir, true, Wanted::Objects)).await },
        )
        .map_ok(|(_, objects)| stream::iter(objects).map(Ok))
        .try_flatten()
        .boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let dir = prefix.cloned().unwrap_or_default();
        let (common_prefixes, objects) =
            self.blocking(move |files| files.walk(&dir, false, Wanted::Objects)).await?;
        Ok(ListResult { common_prefixes, objects, extensions: Default::default() })
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        Err(unsupported("a copy"))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use bytes::Bytes;

    use super::*;
    use crate::StorageError;

    fn tree() -> (tempfile::TempDir, LocalFiles) {
        let dir = tempfile::tempdir().unwrap();
        let files = LocalFiles::create(&dir.path().join("root")).unwrap();
        (dir, files)
    }

    fn put(files: &LocalFiles, path: &str) -> std::result::Result<(), StorageError> {
        let bytes = Bytes::from_static(b"whole").into();
        files.put(&Path::from(path), &bytes).map_err(|e| StorageError::from_store(path, e))
    }

    fn read(files: &LocalFiles, path: &str) -> std::result::Result<GetResult, StorageError> {
        files.get(&Path::from(path), &GetOptions::default()).map_err(|e| StorageError::from_store(path, e))
    }

    fn mode(path: &std::path::Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    /// What was synced since the last call, below and including the root.
    fn synced(files: &LocalFiles) -> Vec<String> {
        let inside = |path: PathBuf| Some(path.strip_prefix(&*files.root).ok()?.to_str()?.to_owned());
        files.synced.lock().unwrap().drain(..).filter_map(inside).collect()
    }

    #[test]
    fn a_put_is_synced_up_to_the_root_whether_it_creates_or_finds() {
        let (_dir, files) = tree();
        assert_eq!(synced(&files), [""]);
        put(&files, "a/b/c").unwrap();
        assert_eq!(synced(&files), ["a/b/c#1", "a/b", "a", ""]);
        // As if another writer had been killed after making the directory, and after linking the object.
        fs::create_dir_all(files.root.join("x/y")).unwrap();
        fs::write(files.root.join("x/y/z"), "whole").unwrap();
        put(&files, "x/y/other").unwrap();
        assert_eq!(synced(&files), ["x/y/other#1", "x/y", "x", ""]);
        assert!(matches!(files.put(&"x/y/z".into(), &"".into()), Err(Error::AlreadyExists { .. })));
        assert_eq!(synced(&files), ["x/y/z", "x/y", "x", ""]);
        files.remove(&"x/y/z".into()).unwrap();
        assert_eq!(synced(&files), ["x/y"]);
    }

    #[test]
    fn what_root_puts_into_anothers_archive_is_the_others() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let (_dir, files) = tree();
        assert_eq!(files.owner, None);
        std::os::unix::fs::chown(&*files.root, Some(65534), Some(65533)).unwrap();
        let files = LocalFiles::open(&files.root).unwrap();
        put(&files, "a/b/c").unwrap();
        for made in ["a", "a/b", "a/b/c"] {
            let meta = fs::metadata(files.root.join(made)).unwrap();
            assert_eq!((meta.uid(), meta.gid()), (65534, 65533), "{made}");
        }
    }

    #[test]
    fn directories_are_0700_and_files_0600_whatever_the_umask() {
        // The umask belongs to the process, so a child has its own.
        if std::env::var_os("WALTIDE_TEST_UMASK").is_none() {
            let this = "local::tests::directories_are_0700_and_files_0600_whatever_the_umask";
            for umask in ["000", "022", "077", "0377"] {
                let run = std::process::Command::new("sh")
                    .args(["-c", &format!("umask {umask}; exec \"$0\" --exact {this}")])
                    .arg(std::env::current_exe().unwrap())
                    .env("WALTIDE_TEST_UMASK", umask)
                    .output()
                    .unwrap();
                assert!(run.status.success(), "umask {umask}: {run:?}");
                assert!(String::from_utf8_lossy(&run.stdout).contains("1 passed"), "{run:?}");
            }
            return;
        }
        let dir = std::env::temp_dir().join(format!("waltide-umask-{}", std::process::id()));
        make_directory(&dir).unwrap();
        let files = LocalFiles::create(&dir.join("new/root")).unwrap();
        put(&files, "a/b").unwrap();
        put(&files, "top").unwrap();
        for made in ["new", "new/root", "new/root/a"] {
            assert_eq!(mode(&dir.join(made)), 0o700, "{made}");
        }
        for made in ["new/root/a/b", "new/root/top"] {
            assert_eq!(mode(&dir.join(made)), 0o600, "{made}");
        }
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_root_that_is_gone_is_not_an_object_that_is_not_there() {
        let (dir, files) = tree();
        put(&files, "a/b").unwrap();
        assert!(read(&files, "a/c").unwrap_err().is_not_found());
        assert!(read(&files, "a").unwrap_err().is_not_found());
        assert!(read(&files, "a/b/c").unwrap_err().is_not_found());
        fs::rename(&*files.root, dir.path().join("unmounted")).unwrap();
        let list = files.walk(&Path::ROOT, true, Wanted::Objects).map(drop);
        let failures = [read(&files, "a/b").map(drop), put(&files, "a/b"), put(&files, "top")].into_iter();
        let more = [files.remove(&"a/b".into()), files.sync(&"a/b".into()), list].into_iter();
        for failure in failures.chain(more.map(|e| e.map_err(|e| StorageError::from_store("a/b", e)))) {
            let error = failure.unwrap_err();
            assert!(matches!(error, StorageError::Unreachable { .. }), "{error:?}");
            let cause = std::error::Error::source(&error).unwrap().to_string();
            assert_eq!(cause, format!("the archive's directory {} is not there", files.root.display()));
        }
        assert!(!files.root.exists(), "a put does not make it up");
    }

    #[test]
    fn permission_denied_is_not_an_object_that_is_not_there() {
        let (dir, files) = tree();
        for path in ["shut/a", "open/a"] {
            put(&files, path).unwrap();
        }
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(&*files.root, Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(files.root.join("shut"), Permissions::from_mode(0o0)).unwrap();
        fs::set_permissions(files.root.join("open"), Permissions::from_mode(0o555)).unwrap();
        fs::set_permissions(files.root.join("open/a"), Permissions::from_mode(0o0)).unwrap();
        // Root may do anything, so a thread without its rights has to try.
        let tried = std::thread::spawn(move || {
            if rustix::process::geteuid().is_root() {
                let nobody = rustix::process::Uid::from_raw(65534);
                rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            }
            let list = files.walk(&Path::ROOT, true, Wanted::Objects).map(drop);
            let tried = vec![
                read(&files, "shut/a").map(drop),
                read(&files, "shut/missing").map(drop),
                read(&files, "open/a").map(drop),
                put(&files, "open/new"),
                put(&files, "shut/new"),
                list.map_err(|e| StorageError::from_store("", e)),
            ];
            (files, tried)
        });
        let (files, tried) = tried.join().unwrap();
        for (at, outcome) in tried.into_iter().enumerate() {
            assert!(matches!(outcome, Err(StorageError::Denied { .. })), "{at}: {outcome:?}");
        }
        fs::set_permissions(files.root.join("shut"), Permissions::from_mode(0o700)).unwrap();
        fs::set_permissions(files.root.join("open"), Permissions::from_mode(0o700)).unwrap();
    }

    #[test]
    fn links_and_pipes_are_refused_by_name_and_passed_over_in_listings() {
        let (dir, files) = tree();
        put(&files, "a/b").unwrap();
        fs::write(dir.path().join("outside"), "secret").unwrap();
        symlink(dir.path().join("outside"), files.root.join("a/link")).unwrap();
        symlink(dir.path(), files.root.join("a/up")).unwrap();
        symlink("nowhere", files.root.join("a/broken")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            files.root.join("a/pipe"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        for path in ["a/link", "a/up/outside", "a/up/new", "a/broken", "a/pipe"] {
            for refused in [read(&files, path).map(drop), put(&files, path)] {
                assert!(matches!(refused, Err(StorageError::InvalidPath { .. })), "{path}: {refused:?}");
            }
        }
        for path in ["a/b/c", "a"] {
            assert!(matches!(put(&files, path), Err(StorageError::InvalidPath { .. })), "{path}");
        }
        fs::write(files.root.join("a/line\nbreak"), "").unwrap();
        let (_, found) = files.walk(&Path::ROOT, true, Wanted::Objects).unwrap();
        assert_eq!(found.iter().map(|meta| meta.location.as_ref()).collect::<Vec<_>>(), ["a/b"]);
        assert!(!dir.path().join("new").exists());
    }

    #[test]
    fn leftovers_are_hidden_and_swept_once_they_are_old() {
        let (_dir, files) = tree();
        let old = SystemTime::now() - Duration::from_secs(3600);
        for path in ["a/b", "a/b", "c"] {
            files.tear(&path.into(), &"unfinished".into()).unwrap();
        }
        for (name, time) in [("a/b#1", old), ("c#1", SystemTime::now() + Duration::from_secs(3600))] {
            File::options().write(true).open(files.root.join(name)).unwrap().set_modified(time).unwrap();
        }
        put(&files, "a/b").unwrap();
        let names =
            |found: Vec<ObjectMeta>| found.into_iter().map(|m| m.location.to_string()).collect::<Vec<_>>();
        assert_eq!(names(files.walk(&Path::ROOT, true, Wanted::Objects).unwrap().1), ["a/b"]);
        let hour = Duration::from_secs(3600);
        for dry_run in [true, false] {
            assert_eq!(names(files.sweep(&Path::ROOT, hour, dry_run).unwrap()), ["a/b#1"]);
        }
        assert_eq!(names(files.sweep(&"a".into(), Duration::ZERO, false).unwrap()), ["a/b#2"]);
        assert_eq!(
            names(files.sweep(&Path::ROOT, Duration::ZERO, false).unwrap()),
            [""; 0],
            "c is from the future"
        );
        assert!(files.root.join("a/b").exists() && files.root.join("c#1").exists());
    }

    /// Not a test of its own: the writer that the next one kills.
    #[test]
    fn writer_to_be_killed() {
        let Some(root) = std::env::var_os("WALTIDE_TEST_ROOT") else { return };
        let files = LocalFiles::open(std::path::Path::new(&root)).unwrap();
        for n in 0_u64.. {
            let bytes = Bytes::from(n.to_le_bytes().repeat(20_000));
            files.put(&format!("{}/{n}", n % 7).into(), &bytes.into()).unwrap();
            // To stderr, which the test harness does not hold back when it is written to directly.
            writeln!(io::stderr(), "{n}").unwrap();
        }
    }

    #[test]
    fn a_killed_writer_loses_nothing_it_acknowledged_and_shows_nothing_half() {
        use std::io::BufRead;
        use std::process::{Command, Stdio};

        for acknowledged in [1, 4, 9, 16, 25_usize] {
            let (_dir, files) = tree();
            let mut writer = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "local::tests::writer_to_be_killed", "--nocapture"])
                .env("WALTIDE_TEST_ROOT", &*files.root)
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let mut lines = io::BufReader::new(writer.stderr.take().unwrap()).lines();
            let seen: Vec<_> = lines.by_ref().take(acknowledged).map(|line| line.unwrap()).collect();
            writer.kill().unwrap();
            writer.wait().unwrap();
            let seen: Vec<u64> = seen.iter().map(|n| n.parse().unwrap()).collect();
            assert_eq!(seen.len(), acknowledged);
            let (_, found) = files.walk(&Path::ROOT, true, Wanted::Objects).unwrap();
            assert!(
                seen.iter().all(|n| found.iter().any(|m| m.location.as_ref() == format!("{}/{n}", n % 7)))
            );
            for meta in found {
                let n: u64 = meta.location.filename().unwrap().parse().unwrap();
                assert_eq!(fs::read(files.file(&meta.location)).unwrap(), n.to_le_bytes().repeat(20_000));
            }
        }
    }
}
