//! The names objects may have, checked before anything is done with them.

use object_store::path::Path;

use crate::StorageError;

/// S3's limit on a key, and the common file systems' limit on a name.
const PATH_BYTES_MAX: usize = 1024;
/// Room is left for the `#n` of a staging file.
const NAME_BYTES_MAX: usize = 240;

/// An object's path: relative, `/` between names, nothing that a file system or a store reads as something else.
pub(crate) fn object(path: &str) -> Result<Path, StorageError> {
    let refuse = |why| StorageError::InvalidPath { path: path.to_owned(), why };
    if path.is_empty() {
        return Err(refuse("it is empty; name an object"));
    }
    if path.starts_with('/') {
        return Err(refuse("it is absolute; names are relative to the archive"));
    }
    if path.len() > PATH_BYTES_MAX {
        return Err(refuse("it is longer than 1024 bytes; shorten it"));
    }
    for name in path.split('/') {
        if let Some(why) = bad_name(name) {
            return Err(refuse(why));
        }
    }
    Path::parse(path).map_err(|_| refuse("the object store does not take it; choose another name"))
}

/// A directory's path: as an object's, or empty for the whole archive; one `/` at the end is allowed.
pub(crate) fn directory(path: &str) -> Result<Path, StorageError> {
    match path.strip_suffix('/').unwrap_or(path) {
        "" if path.is_empty() => Ok(Path::ROOT),
        trimmed => object(trimmed),
    }
}

pub(crate) fn bad_name(name: &str) -> Option<&'static str> {
    match name {
        "" => Some("a part of it is empty; remove the doubled or trailing /"),
        "." | ".." => Some("a part of it is . or ..; write the path without them"),
        _ if name.len() > NAME_BYTES_MAX => Some("a part of it is longer than 240 bytes; shorten it"),
        _ if name.contains(|c: char| c.is_control() || c == '\\') => {
            Some("it holds a control character or a backslash; choose another name")
        }
        _ if name.starts_with(".nfs") => {
            Some("NFS keeps deleted files under such names; choose another name")
        }
        _ if is_leftover(name) => {
            Some("# and a number at the end mark unfinished files; choose another name")
        }
        _ => None,
    }
}

/// Whether this is the name of a staging file, `name#1`: invisible until linked under its own name.
pub(crate) fn is_leftover(name: &str) -> bool {
    name.rsplit_once('#').is_some_and(|(_, n)| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_that_could_leave_the_archive_are_refused() {
        for bad in [
            "", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "./a", "a/..", "a\0b", "a\nb", "a\\b", "a#1",
            "a#1/b", "a/.nfs01",
        ] {
            assert!(matches!(object(bad), Err(StorageError::InvalidPath { .. })), "{bad:?}");
        }
        assert!(object(&"x/".repeat(600)).is_err());
        assert!(object(&"x".repeat(241)).is_err());
        for good in ["a", "a/b.c", "main/7/wal/00000001.history", "a#b", "a#", "...", "a%2e%2e", "ä ö?"] {
            assert_eq!(object(good).unwrap().as_ref(), good);
        }
        assert_eq!(directory("").unwrap(), Path::ROOT);
        assert_eq!(directory("a/b/").unwrap().as_ref(), "a/b");
        assert!(directory("/").is_err());
        assert!(directory("a//").is_err());
    }

    proptest! {
        #[test]
        fn an_accepted_name_stays_below_the_root_and_keeps_its_spelling(
            name in prop_oneof![".{0,40}", "[a-c./#0-9%~\\\\]{0,12}"]
        ) {
            if let Ok(path) = object(&name) {
                prop_assert_eq!(path.as_ref(), name.as_str());
                let below = std::path::Path::new(&name);
                prop_assert!(below.components().all(|c| matches!(c, std::path::Component::Normal(_))));
                let respelled: Vec<_> = below.components().filter_map(|c| c.as_os_str().to_str()).collect();
                prop_assert_eq!(respelled.join("/"), name);
            }
        }
    }
}
