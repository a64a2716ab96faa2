//! What can go wrong in the archive, told apart by what the caller must do about it.

use std::io;

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A failed operation on the archive. The text names the object and what to do; the cause is the `source`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// The archive was reached and has no such object.
    #[error("{path} is not in the archive; check the name and the archive's address")]
    NotFound {
        /// The object.
        path: String,
    },
    /// The object is larger than anything of its kind can be.
    #[error("{path} has {size} bytes where {max} are the most; it is not what its name says, inspect it")]
    TooLarge {
        /// The object.
        path: String,
        /// Its size in bytes.
        size: u64,
        /// The most that the caller was ready to read.
        max: u64,
    },
    /// A range reaches past the object's end.
    #[error(
        "bytes {start}..{end} of {path} were asked for, it has {size}; it is damaged or cut short, run verify"
    )]
    OutOfRange {
        /// The object.
        path: String,
        /// The first byte asked for.
        start: u64,
        /// The byte after the last one asked for.
        end: u64,
        /// The object's size in bytes.
        size: u64,
    },
    /// The archive could not be reached, or failed while it was used; retries are used up.
    #[error("the archive cannot serve {path}; check that it is mounted, reachable and healthy, then retry")]
    Unreachable {
        /// The object, or the archive's address.
        path: String,
        /// What the operating system or the object store said.
        source: Cause,
    },
    /// No space or quota is left.
    #[error("the archive has no room for {path}; free or add space, nothing was stored")]
    Full {
        /// The object.
        path: String,
        /// What the operating system said.
        source: Cause,
    },
    /// The archive refused access.
    #[error("access to {path} is denied; check the archive's owner, permissions or credentials")]
    Denied {
        /// The object, or the archive's address.
        path: String,
        /// What the operating system or the object store said.
        source: Cause,
    },
    /// The name cannot be an object's name, or something that is not an object lies under it.
    #[error("{path:?} is not usable as an object's name: {why}")]
    InvalidPath {
        /// The name.
        path: String,
        /// What is wrong with it, and what to do.
        why: &'static str,
    },
    /// The archive's address cannot be used.
    #[error("{url:?} is not usable as an archive's address: {why}")]
    InvalidUrl {
        /// The address.
        url: String,
        /// What is wrong with it, and what to do.
        why: &'static str,
    },
    /// Anything else.
    #[error("the archive could not carry out the operation on {path}; the cause says why")]
    Other {
        /// The object.
        path: String,
        /// What the object store said.
        source: Cause,
    },
}

/// How the local back end says "this name will not do" through `object_store`'s error type.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refused(pub(crate) &'static str);

impl StorageError {
    /// Whether the archive answered that the object is not there. Never true for an archive that is itself missing.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// Whether one object is at fault, rather than the way to the archive: it is not of the size it must be, or the
    /// medium under it cannot be read. Others may still be read.
    pub fn is_bad_object(&self) -> bool {
        let medium = |source: &Cause| {
            let os = source.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
            os == Some(rustix::io::Errno::IO.raw_os_error())
        };
        match self {
            Self::TooLarge { .. } | Self::OutOfRange { .. } => true,
            Self::Unreachable { source, .. } => medium(source),
            _ => false,
        }
    }

    pub(crate) fn io(path: &str, e: io::Error) -> Self {
        let path = path.to_owned();
        match e.kind() {
            io::ErrorKind::PermissionDenied => Self::Denied { path, source: e.into() },
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::Full { path, source: e.into() }
            }
            _ => Self::Unreachable { path, source: e.into() },
        }
    }

    pub(crate) fn from_store(path: &str, e: object_store::Error) -> Self {
        use object_store::Error as E;
        let owned = || path.to_owned();
        match e {
            E::NotFound { .. } => Self::NotFound { path: owned() },
            E::PermissionDenied { source, .. } | E::Unauthenticated { source, .. } => {
                Self::Denied { path: owned(), source }
            }
            E::Generic { source, .. } => match source.downcast::<io::Error>() {
                Ok(e) => Self::io(path, *e),
                Err(source) => match source.downcast_ref::<Refused>() {
                    Some(Refused(why)) => Self::InvalidPath { path: owned(), why },
                    None => Self::Unreachable { path: owned(), source },
                },
            },
            E::InvalidPath { .. } => Self::InvalidPath {
                path: owned(),
                why: "the object store does not take it; choose another name",
            },
            e => Self::Other { path: owned(), source: e.into() },
        }
    }
}
