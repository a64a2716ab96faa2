//! How far replication origins have come. PostgreSQL's own list has places that are used again; so has this one, to write the
//! file that PostgreSQL would write.

use waltide_format::Lsn;
use waltide_format::engines::postgres::cluster::{ORIGINS_BYTES_MAX, read_origins, write_origins};

use super::error::StateError;
use super::tree::Tree;

const FILE: &str = "pg_logical/replorigin_checkpoint";
/// `DoNotReplicateId`: marks what is to be replicated no further, and is no origin.
const NO_ORIGIN: u16 = u16::MAX;

/// See the module.
#[derive(Debug)]
pub(super) struct Origins {
    places: Vec<Option<(u16, Lsn)>>,
    has_file: bool,
}

impl Origins {
    pub(super) fn open(tree: &Tree) -> Result<Self, StateError> {
        let path = tree.path(FILE);
        let Some(bytes) = tree.read(&path, ORIGINS_BYTES_MAX)? else {
            return Ok(Self { places: Vec::new(), has_file: false });
        };
        let found = read_origins(&bytes).map_err(|source| StateError::Damaged { path, source })?;
        Ok(Self { places: found.into_iter().map(Some).collect(), has_file: true })
    }

    pub(super) fn set(&mut self, origin: u16, remote: Lsn, backward: bool) {
        if origin == NO_ORIGIN {
            return;
        }
        let known = self.places.iter_mut().flatten().find(|(known, _)| *known == origin);
        if let Some((_, before)) = known {
            if backward || *before < remote {
                *before = remote;
            }
            return;
        }
        match self.places.iter_mut().find(|place| place.is_none()) {
            Some(free) => *free = Some((origin, remote)),
            None => self.places.push(Some((origin, remote))),
        }
    }

    pub(super) fn drop(&mut self, origin: u16) {
        let place = self.places.iter_mut().find(|place| place.is_some_and(|(known, _)| known == origin));
        if let Some(place) = place {
            *place = None;
        }
    }

    /// Writes the file, but for a server that never had one nor needs one.
    pub(super) fn close(self, tree: &mut Tree) -> Result<(), StateError> {
        let entries: Vec<_> = self.places.into_iter().flatten().collect();
        if entries.is_empty() && !self.has_file {
            return Ok(());
        }
        tree.write(&tree.path(FILE), &write_origins(&entries))
    }
}
