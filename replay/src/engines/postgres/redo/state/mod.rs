//! What of a data directory is not pages of relations, brought forward by [`Effect`](super::Effect)s: the files that PostgreSQL's own recovery
//! leaves at the same place in the log. Facts: docs/wal.md, "State besides pages".

mod databases;
mod error;
mod multixact;
mod origins;
mod pages;
#[cfg(test)]
mod tests;
mod tree;
mod two_phase;
mod xact;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use waltide_format::engines::postgres::cluster::ControlFile;
use waltide_format::engines::postgres::wal::Slru;
use waltide_format::{Lsn, Oid, Xid};

pub use error::StateError;

use self::databases::Databases;
use self::multixact::MultiXacts;
use self::origins::Origins;
use self::pages::Pages;
use self::tree::Tree;
use self::two_phase::TwoPhase;
use self::xact::Xacts;
use super::effects::Effect;

/// A data directory whose state besides pages follows the log. What it holds in memory does not grow with the log.
///
/// A database's or a tablespace's directory is made and removed, with all that is in it, when its effect is applied. So either every
/// page that the log leaves is written behind the last effect, or those of a relation before the effect that removes it.
#[derive(Debug)]
pub struct State {
    tree: Tree,
    pages: Pages,
    xacts: Xacts,
    multixacts: MultiXacts,
    two_phase: TwoPhase,
    databases: Databases,
    origins: Origins,
}

impl State {
    /// Takes up a restored base backup: `control` is its pg_control, `places` where each tablespace goes, those included that the log
    /// makes. A tablespace that the log makes inside the data directory needs none.
    pub fn open(
        data_dir: &Path,
        places: &BTreeMap<Oid, PathBuf>,
        control: &ControlFile,
    ) -> Result<Self, StateError> {
        let mut tree = Tree::open(data_dir, places, control)?;
        let mut pages = Pages::default();
        let checkpoint = &control.checkpoint_copy;
        let next_xid = Xid::from((checkpoint.next_full_xid & 0xFFFF_FFFF) as u32);
        let tracked = control.settings.track_commit_timestamp;
        let xacts = Xacts::open(&mut tree, &mut pages, next_xid, tracked)?;
        let two_phase = TwoPhase::open(&mut tree, control.major, next_xid)?;
        let origins = Origins::open(&tree)?;
        let multixacts = MultiXacts::new(checkpoint.next_multi);
        Ok(Self { tree, pages, xacts, multixacts, two_phase, databases: Databases::default(), origins })
    }

    /// A transaction wrote a record before what is carried out next.
    pub fn saw(&mut self, xid: Xid) {
        self.xacts.saw(xid);
    }

    /// Carries out an effect of the record that starts and ends `at`. They come in the log's order, from the base's redo point on.
    pub fn apply(&mut self, effect: &Effect, at: (Lsn, Lsn)) -> Result<(), StateError> {
        let Self { tree, pages, xacts, multixacts, two_phase, databases, origins } = self;
        match effect {
            Effect::ZeroPage { slru: Slru::MultiXactOffset, page } => {
                multixacts.zero_offsets(tree, pages, *page)
            }
            Effect::ZeroPage { slru: Slru::MultiXactMember, page } => {
                pages.zero(tree, Slru::MultiXactMember, *page)
            }
            Effect::ZeroPage { slru, page } => xacts.zero_page(tree, pages, *slru, *page),
            Effect::Truncate { slru, page } => xacts.truncate(tree, pages, *slru, *page),
            Effect::SetStatus { status, xids } => xacts.set_status(tree, pages, *status, xids),
            Effect::CommitTimestamps { xids, time, origin } => {
                xacts.set_time(tree, pages, xids, *time, *origin)
            }
            Effect::TrackCommitTimestamps(on) => xacts.track(tree, pages, *on),
            Effect::NextXid { xid, exact } => {
                xacts.advance(*xid, *exact);
                Ok(())
            }
            Effect::MultiXact { multi, offset, members } => {
                multixacts.create(tree, pages, *multi, *offset, members)
            }
            Effect::TruncateMultiXacts { end, members } => multixacts.truncate(tree, pages, *end, *members),
            Effect::Prepare { xid, state } => two_phase.prepare(tree, *xid, state, at.1),
            Effect::Finish { xid } => two_phase.finish(tree, *xid),
            Effect::RelationMap { db_oid, spc_oid, map } => databases.map(tree, *db_oid, *spc_oid, map),
            Effect::CreateDatabase { db_oid, spc_oid } => databases.create(tree, *db_oid, *spc_oid),
            Effect::DropDatabase { db_oid, spc_oids } => databases.drop(tree, *db_oid, spc_oids),
            Effect::CreateTablespace { spc_oid, path } => databases.create_tablespace(tree, *spc_oid, path),
            Effect::DropTablespace { spc_oid } => databases.drop_tablespace(tree, *spc_oid),
            Effect::SetOrigin { origin, remote, backward } => {
                origins.set(*origin, *remote, *backward);
                Ok(())
            }
            Effect::DropOrigin { origin } => {
                origins.drop(*origin);
                Ok(())
            }
        }
    }

    /// Leaves the directory as it is at `redo`: no effect of a record from there on may have been applied. Answers every file and directory
    /// that was written to, made, or lost an entry; they are to be synced.
    pub fn finish(self, redo: Lsn) -> Result<Vec<PathBuf>, StateError> {
        let Self { mut tree, mut pages, xacts, two_phase, databases, origins, .. } = self;
        two_phase.close(&mut tree, redo, |tree, xid| xacts.has_ended(tree, &mut pages, xid))?;
        databases.close()?;
        origins.close(&mut tree)?;
        pages.write_back(&mut tree)?;
        Ok(tree.into_touched())
    }
}

/// Puts bytes into a page; those that do not fit, which the callers' arithmetic excludes, are left out.
fn put<const N: usize>(page: &mut [u8], at: usize, bytes: [u8; N]) {
    if let Some(place) = page.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<N>()) {
        *place = bytes;
    }
}
