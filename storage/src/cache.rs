//! The catalogue cache: what was read from the archive and would be read again. It may vanish at any time.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::Read as _;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use redb::{Builder, Database, ReadableDatabase, TableDefinition};

use crate::sealed::SealedFile;

/// Key to version, checksum of all three, bytes. Another layout takes another name, and the old table is dropped.
const TABLE: TableDefinition<'_, &str, (&str, u32, &[u8])> = TableDefinition::new("objects 1");
const PAGE_CACHE_BYTES: usize = 16 << 20;
/// What every redb file starts with.
const MAGIC: &[u8] = b"redb\x1A\x0A\xA9\x0D\x0A";

/// A cache in a redb file. No trouble with the file is the caller's: a damaged one is made anew, and where none can
/// be had, or another process holds it, every look-up misses.
#[derive(Debug)]
pub struct CatalogueCache {
    path: PathBuf,
    database: RwLock<Option<Database>>,
}

impl CatalogueCache {
    /// Opens the file, or makes it. One that is no cache is left as it is, and nothing is cached.
    pub fn open(path: &Path) -> Self {
        if !may_be_ours(path) {
            tracing::warn!(path = %path.display(), "this is no catalogue cache, and is left as it is");
            return Self { path: path.to_owned(), database: RwLock::new(None) };
        }
        let database = match open(path) {
            Err(e) if is_damage(&e) => {
                tracing::warn!(path = %path.display(), error = %e, "the catalogue cache is damaged, making it anew");
                fs::remove_file(path).map_err(redb::Error::from).and_then(|()| open(path))
            }
            opened => opened,
        };
        let database = database
            .map_err(|e| tracing::debug!(path = %path.display(), error = %e, "going on without the catalogue cache"))
            .ok();
        Self { path: path.to_owned(), database: RwLock::new(database) }
    }

    /// The bytes kept under `key`, if they are those of `version`.
    pub fn get(&self, key: &str, version: &str) -> Option<Vec<u8>> {
        self.get_many([(key, version)]).pop().flatten()
    }

    /// [`Self::get`] for many keys in one transaction; the answers are in the order of the questions.
    pub fn get_many<'a>(&self, wanted: impl IntoIterator<Item = (&'a str, &'a str)>) -> Vec<Option<Vec<u8>>> {
        let wanted: Vec<_> = wanted.into_iter().collect();
        let found = self.with(|database| {
            let table = database.begin_read()?.open_table(TABLE)?;
            let mut found = Vec::with_capacity(wanted.len());
            for (key, version) in &wanted {
                let entry = table.get(*key)?;
                found.push(entry.and_then(|entry| {
                    let (kept, sum, bytes) = entry.value();
                    (kept == *version && sum == checksum(key, version, bytes)).then(|| bytes.to_vec())
                }));
            }
            Ok(found)
        });
        found.unwrap_or_else(|| vec![None; wanted.len()])
    }

    /// Keeps `(key, version, bytes)`, in place of what was kept under the same keys.
    pub fn put_many(&self, entries: Vec<(String, String, Vec<u8>)>) {
        self.with(|database| {
            let transaction = database.begin_write()?;
            let mut table = transaction.open_table(TABLE)?;
            for (key, version, bytes) in &entries {
                table.insert(
                    key.as_str(),
                    (version.as_str(), checksum(key, version, bytes), bytes.as_slice()),
                )?;
            }
            drop(table);
            Ok(transaction.commit()?)
        });
    }

    /// Forgets the keys that begin with `prefix` and are not among `live`.
    pub fn retain(&self, prefix: &str, live: impl IntoIterator<Item = impl Into<String>>) {
        let live: HashSet<String> = live.into_iter().map(Into::into).collect();
        self.with(|database| {
            let transaction = database.begin_write()?;
            transaction.open_table(TABLE)?.retain(|key, _| !key.starts_with(prefix) || live.contains(key))?;
            Ok(transaction.commit()?)
        });
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.retain("", std::iter::empty::<String>());
    }

    /// Runs `work`; trouble ends the use of this file, and damage the file.
    fn with<T>(&self, work: impl FnOnce(&Database) -> Result<T, redb::Error>) -> Option<T> {
        let error = {
            let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
            match work(database.as_ref()?) {
                Ok(done) => return Some(done),
                Err(e) => e,
            }
        };
        tracing::debug!(path = %self.path.display(), error = %error, "going on without the catalogue cache");
        let mut database = self.database.write().unwrap_or_else(PoisonError::into_inner);
        // Removed while it is still locked, so that it is not another process's new file.
        if database.is_some() && is_damage(&error) {
            let _ = fs::remove_file(&self.path);
        }
        *database = None;
        None
    }
}

/// Whether the file is a cache, or what is left of one: it may be written over. A name given by mistake may be that of
/// anything, of a device too.
fn may_be_ours(path: &Path) -> bool {
    let mut start = [0; 4 + MAGIC.len()];
    let read = match fs::metadata(path) {
        Err(_) => return true,
        Ok(about) if !about.is_file() => return false,
        Ok(about) if about.len() == 0 => return true,
        Ok(_) => File::open(path).and_then(|mut file| file.read(&mut start)),
    };
    // A database of somebody's own has no checksum before its first page.
    let is_foreign = start.starts_with(MAGIC);
    let is_named_so = path.extension().is_some_and(|extension| extension == "redb");
    read.is_ok() && !is_foreign && (is_named_so || start.ends_with(MAGIC))
}

fn open(path: &Path) -> Result<Database, redb::Error> {
    if let Some(dir) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    let database =
        Builder::new().set_cache_size(PAGE_CACHE_BYTES).create_with_backend(SealedFile::lock(file)?)?;
    let transaction = database.begin_write()?;
    for old in transaction.list_tables()?.collect::<Vec<_>>() {
        if redb::TableHandle::name(&old) != redb::TableHandle::name(&TABLE) {
            transaction.delete_table(old)?;
        }
    }
    transaction.open_table(TABLE)?;
    transaction.commit()?;
    Ok(database)
}

/// Whether the file is at fault, rather than the disk, the permissions or another process.
fn is_damage(e: &redb::Error) -> bool {
    use std::io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof};
    match e {
        redb::Error::Io(e) => matches!(e.kind(), InvalidData | InvalidInput | UnexpectedEof),
        redb::Error::Corrupted(_) | redb::Error::UpgradeRequired(_) | redb::Error::RepairAborted => true,
        redb::Error::TableTypeMismatch { .. } | redb::Error::TypeDefinitionChanged { .. } => true,
        _ => false,
    }
}

fn checksum(key: &str, version: &str, bytes: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    for part in [key.as_bytes(), version.as_bytes(), bytes] {
        sum.update(&(part.len() as u64).to_le_bytes());
        sum.update(part);
    }
    sum.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, version: &str, bytes: &[u8]) -> (String, String, Vec<u8>) {
        (key.into(), version.into(), bytes.into())
    }

    /// Another test's child holds our lock from its fork to its exec, so we may have to ask again.
    fn open_alone(path: &Path) -> CatalogueCache {
        let mut tries = (0..100_000).map(|_| CatalogueCache::open(path));
        let has_file = |cache: &CatalogueCache| cache.database.read().unwrap().is_some();
        tries
            .find(|cache| {
                has_file(cache) || {
                    std::thread::yield_now();
                    false
                }
            })
            .unwrap()
    }

    #[test]
    fn entries_last_and_answer_only_to_their_version() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/cache.redb");
        let cache = open_alone(&path);
        cache.put_many(vec![
            entry("a/1", "v1", b"one"),
            entry("a/2", "v1", b""),
            entry("b/1", "v1", b"three"),
        ]);
        drop(cache);
        let cache = open_alone(&path);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let wanted = [("a/1", "v1"), ("a/1", "v2"), ("a/2", "v1"), ("a/3", "v1")];
        assert_eq!(cache.get_many(wanted), [Some(b"one".to_vec()), None, Some(vec![]), None]);
        cache.put_many(vec![entry("a/1", "v2", b"newer")]);
        assert_eq!((cache.get("a/1", "v1"), cache.get("a/1", "v2")), (None, Some(b"newer".to_vec())));
        cache.retain("a/", ["a/2"]);
        assert_eq!((cache.get("a/1", "v2"), cache.get("a/2", "v1")), (None, Some(vec![])));
        assert_eq!(cache.get("b/1", "v1"), Some(b"three".to_vec()));
        cache.clear();
        assert_eq!(cache.get_many([("a/2", "v1"), ("b/1", "v1")]), [None, None]);
    }

    #[test]
    fn a_file_that_another_holds_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache.redb");
        let holder = open_alone(&path);
        holder.put_many(vec![entry("a", "v", b"kept")]);
        let other = CatalogueCache::open(&path);
        other.put_many(vec![entry("a", "v", b"lost")]);
        other.clear();
        assert_eq!(other.get("a", "v"), None);
        assert_eq!(holder.get("a", "v"), Some(b"kept".to_vec()));
        assert_eq!(CatalogueCache::open(dir.path()).get("a", "v"), None, "a directory holds nothing");
    }

    #[test]
    fn a_file_that_is_no_cache_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let plain = Database::create(dir.path().join("somebody's.redb")).unwrap();
        drop(plain);
        fs::write(dir.path().join("PG_VERSION"), "15\n").unwrap();
        fs::write(dir.path().join("zeros"), [0; 8200]).unwrap();
        for name in ["somebody's.redb", "PG_VERSION", "zeros"] {
            let path = dir.path().join(name);
            fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
            let before = fs::read(&path).unwrap();
            let cache = CatalogueCache::open(&path);
            cache.put_many(vec![entry("a", "v", b"x")]);
            assert_eq!(cache.get("a", "v"), None, "{name}");
            assert!(fs::read(&path).unwrap() == before, "{name}");
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644, "{name}");
        }
        assert!(!may_be_ours(Path::new("/dev/null")));
        // A cache is known by what it holds, whatever it is called.
        let path = dir.path().join("cache");
        open_alone(&path).put_many(vec![entry("a", "v", b"x")]);
        assert_eq!(open_alone(&path).get("a", "v"), Some(b"x".to_vec()));
    }

    #[test]
    fn a_damaged_file_is_made_anew_and_never_answers_wrongly() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache.redb");
        let fill = |cache: &CatalogueCache| {
            cache.put_many((0..50).map(|n| entry(&format!("key {n}"), "v", &[n; 3000])).collect());
        };
        fill(&open_alone(&path));
        let whole = fs::read(&path).unwrap();
        for damage in 0..150_usize {
            let mut bytes = whole.clone();
            match damage {
                0 => bytes = b"not a database".to_vec(),
                1 => bytes.truncate(whole.len() / 2),
                2 => bytes.truncate(100),
                3 => bytes.clear(),
                4 => bytes.truncate(whole.len() / 4100 / 2 * 4100),
                5 => bytes.fill(0),
                6..50 => bytes[(damage - 6) * 4100..][..4100].fill(0),
                // The first bytes are the headers; the rest is spread over the file.
                50..100 => bytes[(damage - 50) * 7] ^= 0x5a,
                _ => bytes[(damage - 100) * whole.len() / 50..][..64].fill(0xa5),
            }
            fs::write(&path, &bytes).unwrap();
            let cache = open_alone(&path);
            for n in 0..50 {
                let got = cache.get(&format!("key {n}"), "v");
                assert!(got.is_none_or(|bytes| bytes == [n; 3000]), "damage {damage}");
            }
            fill(&cache);
            drop(cache);
            let cache = open_alone(&path);
            fill(&cache);
            assert!(cache.get("key 7", "v") == Some(vec![7; 3000]), "damage {damage} is not got over");
        }
    }
}
