//! Where an archive is: a `file://` URL, or a bare path that stands for one.

use std::fmt;
use std::fmt::Write as _;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::{fs, io};

use crate::StorageError;

/// An archive's address. Printed as a URL that reads back as the same address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ArchiveUrl {
    path: String,
}

impl ArchiveUrl {
    /// The directory, for an archive made of local files.
    pub fn local_path(&self) -> Option<&Path> {
        Some(Path::new(&self.path))
    }
}

impl FromStr for ArchiveUrl {
    type Err = StorageError;

    fn from_str(text: &str) -> Result<Self, StorageError> {
        let refuse = |why| StorageError::InvalidUrl { url: text.to_owned(), why };
        let path = match text.split_once(':') {
            Some(("file", rest)) => decode(rest).map_err(refuse)?,
            Some((scheme, rest)) if rest.starts_with("//") && is_scheme(scheme) => {
                return Err(refuse("this build keeps archives in local files; give a path or file:///path"));
            }
            _ => text.to_owned(),
        };
        if path.is_empty() {
            return Err(refuse("it is empty; give a path or file:///path"));
        }
        if path.contains('\0') {
            return Err(refuse("it holds a zero byte; give a path or file:///path"));
        }
        let absolute = std::path::absolute(&path).map_err(|e| StorageError::io(text, e))?;
        let path = utf8(absolute)
            .ok_or_else(|| refuse("the working directory's name is not UTF-8; give an absolute path"))?;
        Ok(Self { path })
    }
}

impl fmt::Display for ArchiveUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("file://")?;
        for byte in self.path.bytes() {
            match byte {
                b'a'..=b'z'
                | b'A'..=b'Z'
                | b'0'..=b'9'
                | b'/'
                | b'-'
                | b'.'
                | b'_'
                | b'~'
                | b'+'
                | b'='
                | b'@' => {
                    f.write_char(char::from(byte))?;
                }
                _ => write!(f, "%{byte:02X}")?,
            }
        }
        Ok(())
    }
}

/// Where a path really leads: links are followed as far as it exists, and what is not there yet is added as it is named.
pub fn real_path(path: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    let there = path.ancestors().find(|above| above.exists()).unwrap_or(Path::new("/"));
    let mut real = fs::canonicalize(there)?;
    let rest = path.strip_prefix(there).unwrap_or(Path::new(""));
    let mut parts = rest.components();
    while let Some(part) = parts.next() {
        if part == Component::ParentDir {
            // Out of what is not there it leads to what may be there again.
            real.pop();
            return real_path(&real.join(parts.as_path()));
        }
        real.push(part);
    }
    Ok(real)
}

fn utf8(path: PathBuf) -> Option<String> {
    path.into_os_string().into_string().ok()
}

fn is_scheme(s: &str) -> bool {
    s.starts_with(|c: char| c.is_ascii_alphabetic())
        && s.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'))
}

/// The path of a file URL, from what follows `file:`.
fn decode(rest: &str) -> Result<String, &'static str> {
    let path = match rest.strip_prefix("//") {
        Some(after) => after.strip_prefix("localhost").filter(|p| p.starts_with('/')).unwrap_or(after),
        None => rest,
    };
    if !path.starts_with('/') {
        return Err("a file URL has no host and an absolute path; write file:///path");
    }
    if path.contains(['?', '#']) {
        return Err("a file URL has no query or fragment; write ? as %3F and # as %23");
    }
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.bytes();
    while let Some(byte) = rest.next() {
        let mut digit =
            || rest.next().and_then(|b| char::from(b).to_digit(16)).and_then(|d| u8::try_from(d).ok());
        bytes.push(match byte {
            b'%' => match (digit(), digit()) {
                (Some(high), Some(low)) => (high << 4) | low,
                _ => return Err("% must be followed by two hexadecimal digits; write % itself as %25"),
            },
            byte => byte,
        });
    }
    String::from_utf8(bytes).map_err(|_| "the path is not UTF-8; choose another directory")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paths_and_file_urls_name_the_same_place() {
        let parse = |s: &str| s.parse::<ArchiveUrl>().unwrap();
        assert_eq!(parse("/a b/c#1").to_string(), "file:///a%20b/c%231");
        for same in ["file:///a%20b/c%231", "file:/a%20b/c%231", "file://localhost/a%20b/c%231"] {
            assert_eq!(parse(same), parse("/a b/c#1"));
        }
        assert_eq!(parse("rel").local_path().unwrap(), std::env::current_dir().unwrap().join("rel"));
        assert_eq!(
            parse("odd:name").local_path().unwrap(),
            std::env::current_dir().unwrap().join("odd:name")
        );
    }

    #[test]
    fn a_path_leads_where_its_links_do_whether_or_not_its_end_is_there() {
        let scratch = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(scratch.path()).unwrap();
        fs::create_dir_all(root.join("site/archive")).unwrap();
        std::os::unix::fs::symlink(root.join("site"), root.join("link")).unwrap();
        for (path, want) in [
            ("", ""),
            ("link", "site"),
            ("link/archive", "site/archive"),
            ("link/new/er", "site/new/er"),
            ("link/../site", "site"),
            ("site/new/../archive", "site/archive"),
            ("new/er/../../link/archive/x", "site/archive/x"),
            ("new/../other/../link/x", "site/x"),
        ] {
            assert_eq!(real_path(&root.join(path)).unwrap(), root.join(want), "{path}");
        }
        assert_eq!(real_path(Path::new("/no/../..")).unwrap(), Path::new("/"));
    }

    #[test]
    fn an_address_this_build_cannot_use_is_explained() {
        let text = |s: &str| s.parse::<ArchiveUrl>().unwrap_err().to_string();
        assert_eq!(
            text("s3://bucket/x"),
            "\"s3://bucket/x\" is not usable as an archive's address: this build keeps archives in local files; give a path or file:///path"
        );
        for bad in [
            "",
            "file:",
            "file://",
            "file://host/x",
            "file:x",
            "file:///a?b",
            "file:///%zz",
            "file:///%ff",
            "az://c",
            "a\0b",
        ] {
            assert!(matches!(bad.parse::<ArchiveUrl>(), Err(StorageError::InvalidUrl { .. })), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back(path in "/[^\0]{0,40}") {
            let url: ArchiveUrl = path.parse().unwrap();
            prop_assert_eq!(url.to_string().parse::<ArchiveUrl>().unwrap(), url);
        }
        #[test]
        fn no_address_panics(text in ".*") {
            let _ = text.parse::<ArchiveUrl>();
        }
    }
}
