//! What a running server says of itself in its data directory: postmaster.pid.

use std::io;
use std::path::{Path, PathBuf};

/// The lines of postmaster.pid that say how to reach the server and which one it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Postmaster {
    /// The process; negative for a single-user backend.
    pub pid: i64,
    /// The data directory, as the server calls it.
    pub data_dir: PathBuf,
    /// Seconds since 1970 of its start.
    pub started: i64,
    /// The port, also the number in the socket's name.
    pub port: u16,
    /// The first socket directory; none where the server has no sockets.
    pub socket_dir: Option<PathBuf>,
    /// The first address it listens on; none where it listens on none.
    pub listen_address: Option<String>,
}

impl Postmaster {
    /// Reads `data_dir`'s postmaster.pid; none where there is no such file, or where the server that writes it has
    /// not come far enough to say how it is reached.
    pub fn read(data_dir: &Path) -> io::Result<Option<Self>> {
        match std::fs::read(data_dir.join("postmaster.pid")) {
            Ok(text) => Ok(Self::parse(&String::from_utf8_lossy(&text), data_dir)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Reads the file's text.
    pub(super) fn parse(text: &str, data_dir: &Path) -> Option<Self> {
        let mut lines = text.lines().map(str::trim);
        let pid = lines.next()?.parse().ok()?;
        let directory = PathBuf::from(lines.next()?);
        let started = lines.next()?.parse().ok()?;
        let port = lines.next()?.parse().ok()?;
        // A relative socket directory is relative to the data directory, where the server runs.
        let socket_dir = lines.next().filter(|dir| !dir.is_empty()).map(|dir| data_dir.join(dir));
        let listen_address =
            lines.next().filter(|address| !address.is_empty()).map(|address| match address {
                "*" | "0.0.0.0" => "localhost".to_owned(),
                "::" => "::1".to_owned(),
                other => other.to_owned(),
            });
        Some(Self { pid, data_dir: directory, started, port, socket_dir, listen_address })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_file_says_where_the_server_is() {
        let text = "4711\n/var/lib/postgresql/15/main\n1769903999\n5433\n/var/run/postgresql\n*\n  5433001  32768\nready   \n";
        let found = Postmaster::parse(text, Path::new("/d")).unwrap();
        assert_eq!(found.pid, 4711);
        assert_eq!(found.started, 1_769_903_999);
        assert_eq!(found.port, 5433);
        assert_eq!(found.socket_dir, Some("/var/run/postgresql".into()));
        assert_eq!(found.listen_address.as_deref(), Some("localhost"));
        let relative = Postmaster::parse("1\n/d\n2\n3\nsock\n\n", Path::new("/d")).unwrap();
        assert_eq!((relative.socket_dir, relative.listen_address), (Some("/d/sock".into()), None));
    }

    #[test]
    fn a_pid_file_that_is_not_all_written_says_nothing() {
        let text = "4711\n/d\n1769903999\n5433\n";
        assert!(Postmaster::parse(text, Path::new("/d")).is_some());
        for cut in 0..text.len() - 5 {
            assert_eq!(Postmaster::parse(&text[..cut], Path::new("/d")), None, "cut at {cut}");
        }
    }
}
