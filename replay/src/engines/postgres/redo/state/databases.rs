//! Directories of databases and tablespaces, and relation maps.

use std::collections::BTreeSet;
use std::path::PathBuf;

use waltide_format::Oid;

use super::error::StateError;
use super::tree::Tree;
use crate::engines::postgres::redo::effects::GLOBAL_TABLESPACE;

/// A backup may miss a database that was dropped while it was made. The log names it until then; what it says is nothing, unless
/// the drop never comes.
#[derive(Debug, Default)]
pub(super) struct Databases {
    /// Directories that are not there.
    missing: BTreeSet<PathBuf>,
    /// Tablespaces that are not there, which lie in the data directory until they are dropped.
    stand_ins: BTreeSet<Oid>,
}

impl Databases {
    pub(super) fn map(
        &mut self,
        tree: &mut Tree,
        db_oid: Oid,
        spc_oid: Oid,
        map: &[u8],
    ) -> Result<(), StateError> {
        let directory = if spc_oid == GLOBAL_TABLESPACE {
            tree.path("global")
        } else {
            match tree.tablespace(spc_oid)? {
                Some(tablespace) => tablespace.join(db_oid.to_string()),
                None => {
                    self.stand_ins.insert(spc_oid);
                    return Ok(());
                }
            }
        };
        if !tree.is_directory(&directory)? {
            self.missing.insert(directory);
            return Ok(());
        }
        tree.write(&directory.join("pg_filenode.map"), map)
    }

    pub(super) fn create(&mut self, tree: &mut Tree, db_oid: Oid, spc_oid: Oid) -> Result<(), StateError> {
        let tablespace = match tree.tablespace(spc_oid)? {
            Some(tablespace) => {
                tree.make_directory(&tablespace)?;
                tablespace
            }
            None => {
                self.stand_ins.insert(spc_oid);
                tree.make_stand_in(spc_oid)?
            }
        };
        let directory = tablespace.join(db_oid.to_string());
        tree.make_directory(&directory)?;
        let version = tree.version.clone();
        tree.write(&directory.join("PG_VERSION"), version.as_bytes())?;
        self.missing.remove(&directory);
        Ok(())
    }

    pub(super) fn drop(&mut self, tree: &mut Tree, db_oid: Oid, spc_oids: &[Oid]) -> Result<(), StateError> {
        for spc_oid in spc_oids {
            if let Some(tablespace) = tree.tablespace(*spc_oid)? {
                let directory = tablespace.join(db_oid.to_string());
                tree.remove_tree(&directory)?;
                self.missing.remove(&directory);
            }
        }
        Ok(())
    }

    pub(super) fn create_tablespace(
        &mut self,
        tree: &mut Tree,
        spc_oid: Oid,
        path: &str,
    ) -> Result<(), StateError> {
        tree.make_tablespace(spc_oid, path)?;
        self.stand_ins.remove(&spc_oid);
        Ok(())
    }

    pub(super) fn drop_tablespace(&mut self, tree: &mut Tree, spc_oid: Oid) -> Result<(), StateError> {
        if let Some(tablespace) = tree.tablespace(spc_oid)? {
            self.missing.retain(|directory| !directory.starts_with(&tablespace));
        }
        tree.remove_tablespace(spc_oid)?;
        self.stand_ins.remove(&spc_oid);
        Ok(())
    }

    pub(super) fn close(self) -> Result<(), StateError> {
        if let Some(spc_oid) = self.stand_ins.into_iter().next() {
            return Err(StateError::TablespaceMissing { spc_oid });
        }
        match self.missing.into_iter().next() {
            Some(path) => Err(StateError::DatabaseMissing { path }),
            None => Ok(()),
        }
    }
}
