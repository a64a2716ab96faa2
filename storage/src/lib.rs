//! The archive as a place: create-only puts, durable local files, the catalogue cache. It knows no database.
//!
//! What holds for every back end, and is checked by [`conformance`]:
//! - an object is whole or absent, and once created it is never replaced;
//! - a put that returned is durable, whether it made the object or found it;
//! - [`StorageError::NotFound`] means that the archive was there and answered "no such object".

mod archive;
mod cache;
mod conformance;

mod error;
mod faulty;
mod local;
mod path;
mod progress;
mod sealed;
mod url;

pub use archive::{Archive, Leftover, Listing, ObjectInfo, Put};
pub use bytes::Bytes;
pub use cache::CatalogueCache;
pub use conformance::conformance;

pub use error::StorageError;
pub use faulty::Faults;
pub use progress::{Counted, NoProgress, Progress};
pub use url::{ArchiveUrl, real_path};
