//! Prepared transactions: those that are not ended at the hand-over become files, for the log is not read from before it again.

use std::collections::{BTreeMap, BTreeSet};

use waltide_format::engines::postgres::cluster::{
    TWO_PHASE_BYTES_MAX, read_two_phase_file, two_phase_file, two_phase_name, two_phase_xid,
};
use waltide_format::{Corrupt, Lsn, PgMajor, Xid};

use super::error::StateError;
use super::tree::Tree;

const DIRECTORY: &str = "pg_twophase";
/// State in memory: more is written out at once.
const HELD_BYTES_MAX: usize = 16 << 20;

#[derive(Debug)]
struct Held {
    /// End of the PREPARE.
    end: Lsn,
    /// The record's main data; `None` once it is written.
    state: Option<Vec<u8>>,
    /// Whether a file of its name is there.
    has_file: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct TwoPhase {
    major: PgMajor,
    /// Files of the backup whose transactions the log did not prepare.
    older: BTreeSet<u32>,
    held: BTreeMap<u32, Held>,
    held_bytes: usize,
}

impl TwoPhase {
    /// Finds the backup's files. One of a transaction that had no number yet belongs to no one.
    pub(super) fn open(tree: &mut Tree, major: PgMajor, next_xid: Xid) -> Result<Self, StateError> {
        let directory = tree.path(DIRECTORY);
        let mut older = BTreeSet::new();
        for name in tree.names(&directory)? {
            let Some(xid) = two_phase_xid(&name) else { continue };
            if xid.precedes(next_xid) {
                older.insert(xid.get());
            } else {
                tree.remove_file(&directory.join(name))?;
            }
        }
        Ok(Self { major, older, held: BTreeMap::new(), held_bytes: 0 })
    }

    pub(super) fn prepare(
        &mut self,
        tree: &mut Tree,
        xid: Xid,
        state: &[u8],
        end: Lsn,
    ) -> Result<(), StateError> {
        if self.held.contains_key(&xid.get()) {
            return Err(StateError::PreparedTwice { xid });
        }
        // The backup may have copied the file while it was being written; the record is whole.
        let has_file = self.older.remove(&xid.get());
        let mut held = Held { end, state: None, has_file };
        if self.held_bytes.saturating_add(state.len()) > HELD_BYTES_MAX {
            write(tree, xid, state)?;
            held.has_file = true;
        } else {
            self.held_bytes = self.held_bytes.saturating_add(state.len());
            held.state = Some(state.to_vec());
        }
        self.held.insert(xid.get(), held);
        Ok(())
    }

    pub(super) fn finish(&mut self, tree: &mut Tree, xid: Xid) -> Result<(), StateError> {
        let held = self.held.remove(&xid.get());
        let bytes = held.as_ref().and_then(|held| held.state.as_ref()).map_or(0, Vec::len);
        self.held_bytes = self.held_bytes.saturating_sub(bytes);
        if self.older.remove(&xid.get()) || held.is_some_and(|held| held.has_file) {
            tree.remove_file(&tree.path(DIRECTORY).join(two_phase_name(xid)))?;
        }
        Ok(())
    }

    /// Writes the files of what was prepared before `redo`. Of the backup's own files those go whose transactions `has_ended`.
    pub(super) fn close(
        mut self,
        tree: &mut Tree,
        redo: Lsn,
        mut has_ended: impl FnMut(&mut Tree, Xid) -> Result<bool, StateError>,
    ) -> Result<(), StateError> {
        let directory = tree.path(DIRECTORY);
        for (xid, held) in std::mem::take(&mut self.held) {
            match held.state {
                Some(state) if held.end <= redo => write(tree, xid.into(), &state)?,
                _ if held.end > redo && held.has_file => {
                    tree.remove_file(&directory.join(two_phase_name(xid.into())))?;
                }
                _ => {}
            }
        }
        for xid in self.older {
            let path = directory.join(two_phase_name(xid.into()));
            if has_ended(tree, xid.into())? {
                tree.remove_file(&path)?;
                continue;
            }
            let bytes = tree.read(&path, TWO_PHASE_BYTES_MAX)?.unwrap_or_default();
            let checked = read_two_phase_file(&bytes, self.major).and_then(|prepare| {
                let found = prepare.xid.get();
                let is_its = found == xid;
                is_its.then_some(()).ok_or(Corrupt::mismatch("xid", 8, found.into(), xid.into()))
            });
            checked.map_err(|source| StateError::Damaged { path, source })?;
        }
        Ok(())
    }
}

fn write(tree: &mut Tree, xid: Xid, state: &[u8]) -> Result<(), StateError> {
    tree.write(&tree.path(DIRECTORY).join(two_phase_name(xid)), &two_phase_file(state))
}
