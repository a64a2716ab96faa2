//! The PostgreSQL installed on this machine, and the user its server runs as.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use waltide_format::PgMajor;

/// Where distributions put the programs of a major version.
const PLACES: [(&str, &str); 5] = [
    ("/usr/lib/postgresql/", "/bin"),
    ("/usr/pgsql-", "/bin"),
    ("/usr/lib64/pgsql/", "/bin"),
    ("/opt/homebrew/opt/postgresql@", "/bin"),
    ("/usr/local/opt/postgresql@", "/bin"),
];
/// Where an installation of one version lies.
const PLAIN_PLACES: [&str; 3] = ["/usr/bin", "/usr/local/bin", "/usr/local/pgsql/bin"];
/// Who runs the server where we are root, which PostgreSQL refuses.
const SERVER_USER: &str = "postgres";

/// Why there is no server to start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InstallError {
    /// No installation of the version was found.
    #[error(
        "no PostgreSQL {major} server is installed here; looked in {looked}\n\
         hint: install it, or say with --pg-bin where its programs lie"
    )]
    NotFound {
        /// The version looked for.
        major: PgMajor,
        /// Where.
        looked: String,
    },
    /// The installation named is of another version, or none.
    #[error("{} is PostgreSQL {found}, not {major}", bin.display())]
    OtherVersion {
        /// Its directory.
        bin: PathBuf,
        /// What it says it is.
        found: String,
        /// The version that the cluster needs.
        major: PgMajor,
    },
    /// We are root, and there is nobody to run the server as.
    #[error(
        "PostgreSQL does not run as root, and there is no user {SERVER_USER:?}\nhint: run as the user that owns the database"
    )]
    NoUser,
}

/// The programs of one PostgreSQL.
#[derive(Debug, Clone)]
pub struct Installation {
    bin: PathBuf,
    version: String,
}

impl Installation {
    /// Finds the server of a major version: in `bin` alone where it is named, else where PATH and the distributions
    /// have it.
    pub fn find(major: PgMajor, bin: Option<&Path>) -> Result<Self, InstallError> {
        let at = |bin: &Path| {
            let version = version(&bin.join("postgres"))?;
            Some(Self { bin: bin.to_owned(), version })
        };
        if let Some(bin) = bin {
            let found = at(bin);
            return match found {
                Some(found) if found.major() == Some(major.get()) => Ok(found),
                found => Err(InstallError::OtherVersion {
                    bin: bin.join("postgres"),
                    found: found.map_or("of no version that can be told".to_owned(), |f| f.version),
                    major,
                }),
            };
        }
        let versioned = PLACES.iter().map(|(before, after)| PathBuf::from(format!("{before}{major}{after}")));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let on_path = std::env::split_paths(&path).filter(|p| p.is_absolute()).collect::<Vec<_>>();
        let mut places: Vec<PathBuf> = versioned.chain(on_path).collect();
        places.extend(PLAIN_PLACES.map(PathBuf::from));
        let mut found = places.iter().filter_map(|p| at(p)).filter(|f| f.major() == Some(major.get()));
        found.next().ok_or_else(|| {
            places.dedup();
            let looked: Vec<_> = places.iter().map(|p| p.display().to_string()).collect();
            InstallError::NotFound { major, looked: looked.join(", ") }
        })
    }

    /// The directory of the programs.
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    /// The server's version, `15.8`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// One of the programs, if it is installed.
    pub fn program(&self, name: &str) -> Option<PathBuf> {
        Some(self.bin.join(name)).filter(|p| p.is_file())
    }

    fn major(&self) -> Option<u16> {
        let digits = self.version.split(|c: char| !c.is_ascii_digit()).next()?;
        digits.parse().ok()
    }
}

/// `postgres (PostgreSQL) 15.8 (Debian 15.8-0+deb12u1)` without the words around the number.
fn version(postgres: &Path) -> Option<String> {
    let mut command = Command::new(postgres);
    let out = command.arg("--version").stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8(out.stdout).ok().filter(|_| out.status.success())?;
    text.split_whitespace().find(|w| w.starts_with(|c: char| c.is_ascii_digit())).map(str::to_owned)
}

/// Who runs a server: ourselves, or `postgres` where we are root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerUser {
    other: Option<(u32, u32)>,
}

impl ServerUser {
    /// Finds the user.
    pub fn find() -> Result<Self, InstallError> {
        if !rustix::process::geteuid().is_root() {
            return Ok(Self { other: None });
        }
        let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        let ids = passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            let named = fields.next()? == SERVER_USER;
            let uid = fields.nth(1)?.parse().ok()?;
            named.then_some((uid, fields.next()?.parse().ok()?))
        });
        ids.map(|ids| Self { other: Some(ids) }).ok_or(InstallError::NoUser)
    }

    /// Ourselves, whoever we are: for files that no server is started on.
    pub const fn ourselves() -> Self {
        Self { other: None }
    }

    /// The user and group that files must be given to; none where they are ours already.
    pub const fn owner(self) -> Option<(u32, u32)> {
        self.other
    }

    /// Makes a program run as the user.
    pub fn apply(self, command: &mut Command) {
        use std::os::unix::process::CommandExt as _;
        if let Some((uid, gid)) = self.other {
            command.gid(gid).uid(uid);
        }
    }

    /// Gives a file, or a link itself, to the user.
    pub fn give(self, path: &Path) -> std::io::Result<()> {
        match self.other {
            Some((uid, gid)) => std::os::unix::fs::lchown(path, Some(uid), Some(gid)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fake(dir: &Path, says: &str) {
        use std::os::unix::fs::PermissionsExt as _;
        let path = dir.join("postgres");
        std::fs::write(&path, format!("#!/bin/sh\necho '{says}'\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn the_installation_named_is_taken_if_it_is_of_the_version() {
        let dir = tempfile::tempdir().unwrap();
        let error = Installation::find(PgMajor::V15, Some(dir.path())).unwrap_err().to_string();
        assert!(error.ends_with("is PostgreSQL of no version that can be told, not 15"), "{error}");
        fake(dir.path(), "postgres (PostgreSQL) 15.8 (Debian 15.8-0+deb12u1)");
        let found = Installation::find(PgMajor::V15, Some(dir.path())).unwrap();
        assert_eq!((found.version(), found.bin()), ("15.8", dir.path()));
        assert!(found.program("postgres").is_some() && found.program("pg_amcheck").is_none());
        let error = Installation::find(PgMajor::V16, Some(dir.path())).unwrap_err().to_string();
        assert!(error.ends_with("is PostgreSQL 15.8, not 16"), "{error}");
        fake(dir.path(), "postgres (PostgreSQL) 18beta1");
        assert_eq!(Installation::find(PgMajor::V18, Some(dir.path())).unwrap().version(), "18beta1");
    }
}
