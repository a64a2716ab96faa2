//! A place for one test's files, which the database's user can reach and which leaves nothing behind.

use crate::process::{Runas, kill_processes_below};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory under `TMPDIR` (or /tmp), shared by all clones. When the last one is dropped, every process
/// working below it is killed and it is removed, unless `WALTIDE_KEEP` is set.
#[derive(Clone, Debug)]
pub struct Scratch(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    counter: AtomicU32,
}

impl Scratch {
    /// A new, empty place; the label is part of its name.
    pub fn new(label: &str) -> Self {
        let root = std::env::temp_dir();
        let root = root.canonicalize().unwrap_or_else(|e| panic!("{}: {e}", root.display()));
        Self::below(&root, label)
    }

    fn below(root: &Path, label: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let process = std::process::id();
        let path = loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = root.join(format!("waltide-{process}-{number}-{label}"));
            match fs::create_dir(&path) {
                Ok(()) => break path,
                // An earlier process had our id.
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => panic!("cannot create {}: {e}", path.display()),
            }
        };
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("we own it");
        Runas::database_user().give(&path);
        Self(Arc::new(Inner { path, counter: AtomicU32::new(0) }))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The path of something in it that is not made by this call.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.path.join(name)
    }

    /// A path in it that no other call has returned.
    pub fn fresh_path(&self, name: &str) -> PathBuf {
        let number = self.0.counter.fetch_add(1, Ordering::Relaxed);
        self.join(format!("{number}-{name}"))
    }

    /// A directory in it (made where missing) that belongs to the database's user, mode 0700.
    pub fn dir(&self, name: &str) -> PathBuf {
        let path = self.join(name);
        fs::create_dir_all(&path).unwrap_or_else(|e| panic!("cannot create {}: {e}", path.display()));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("we own it or are root");
        Runas::database_user().give(&path);
        path
    }

    /// A file in it that belongs to the database's user.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.join(name);
        fs::write(&path, content).unwrap_or_else(|e| panic!("cannot write {}: {e}", path.display()));
        Runas::database_user().give(&path);
        path
    }

    /// Copies a directory tree, owners and permissions included.
    pub fn copy_tree(&self, from: &Path, name: &str) -> PathBuf {
        let to = self.join(name);
        let out = crate::Runner::as_self("cp").arg("-a").arg("--").arg(from).arg(&to).run();
        out.assert_ok();
        to
    }

    /// Gives everything below a path to the database's user.
    pub fn give_tree(&self, path: &Path) {
        Runas::database_user().give(path);
        if path.is_dir() && !path.is_symlink() {
            for entry in fs::read_dir(path).expect("readable").flatten() {
                self.give_tree(&entry.path());
            }
        }
    }

    /// A second place that is short enough for a Unix socket, whose path may have 107 bytes.
    pub(crate) fn for_socket(&self) -> Self {
        const SOCKET_NAME_MAX: usize = "/.s.PGSQL.65535.lock".len();
        const SOCKET_PATH_MAX: usize = 107;
        if self.path().as_os_str().len() + 16 + SOCKET_NAME_MAX <= SOCKET_PATH_MAX {
            self.clone()
        } else {
            Self::below(Path::new("/tmp"), "s")
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        kill_processes_below(&self.path, || {});
        if std::env::var_os("WALTIDE_KEEP").is_some() {
            eprintln!("kept {}", self.path.display());
        } else if let Err(e) = fs::remove_dir_all(&self.path) {
            eprintln!("cannot remove {}: {e}", self.path.display());
        }
    }
}
