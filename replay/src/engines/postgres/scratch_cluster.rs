//! A base backup in a scratch place and the server on it: what drills and exports have in common.

use std::path::Path;

use tokio_postgres::Client;
use waltide_format::archive::ConfigFile;
use waltide_format::engines::postgres::wal::{LONG_HEADER_BYTES, PAGE_BYTES, SHORT_HEADER_BYTES};
use waltide_format::{Lsn, SegmentSize};

use super::conf_file::Settings;
use super::forward::Replay;
use super::install::ServerUser;
use super::restore::{Owner, RestoreOptions};
use super::scratch_server::{ScratchError, ScratchPlace};
use super::tablespaces::{self, Redirected};
use crate::plan::Plan;
use crate::resolve::StopKind;

/// How the base backup comes into the scratch place `root`: with every tablespace in it, and replayed by the server.
pub(super) fn restore_options(
    plan: &Plan,
    root: &Path,
    user: ServerUser,
    restore_command: String,
    threads: usize,
) -> RestoreOptions {
    let spaces = root.join("spaces");
    let moved = plan.tablespaces.iter().map(|t| (t.oid.to_string(), spaces.join(t.oid.to_string())));
    RestoreOptions {
        data_dir: root.join("data"),
        tablespace_map: moved.collect(),
        // The path of those is taken out of the WAL.
        made: Vec::new(),
        allow_clear: false,
        delta: false,
        standby: false,
        replay: Replay::Server(None),
        // The server is given a configuration of our own; this one is only reported.
        archive_off: false,
        owner: user.owner().map(|(uid, gid)| Owner { uid, gid }),
        restore_command,
        settings: Vec::new(),
        selection: None,
        threads,
        files_only: false,
    }
}

/// The settings that the restore left in the data directory, with a restore_command that gives recovery the changed
/// segments.
pub(super) fn settings(
    place: &ScratchPlace,
    brought: &[ConfigFile],
    redirected: &Redirected,
) -> Result<Settings, ScratchError> {
    let mut cluster = Settings::of_cluster(&place.data_dir(), brought);
    if !redirected.segments.is_empty() {
        let dir = place.directory("server/wal")?;
        for (name, wal) in &redirected.segments {
            place.file(&format!("server/wal/{name}"), wal)?;
        }
        if let Some(command) = cluster.values.get_mut("restore_command") {
            *command = tablespaces::restore_command(&dir, command);
        }
    }
    Ok(cluster)
}

/// How far a server's recovery came.
#[derive(Debug)]
pub(super) struct Reached {
    /// The end of what it replayed.
    pub(super) at: Option<Lsn>,
    /// Whether that is where the plan said.
    pub(super) holds: bool,
    /// Both.
    pub(super) detail: String,
}

/// Asks a server whether its replay ended where the plan said; of one that had nothing to replay, whether its timeline
/// begins there.
pub(super) async fn reached(
    client: &Client,
    plan: &Plan,
    size: SegmentSize,
) -> Result<Reached, tokio_postgres::Error> {
    let sql =
        "select coalesce(pg_last_wal_replay_lsn(), (select redo_lsn from pg_control_checkpoint()))::text";
    let row = client.query_one(sql, &[]).await?;
    let at: Option<Lsn> = row.get::<_, Option<String>>(0).and_then(|text| text.parse().ok());
    let (holds, detail) = match at {
        Some(lsn) => {
            let exact = matches!(plan.stop.kind, StopKind::Before | StopKind::After);
            let (found, wanted) = (next_record(lsn, size), next_record(plan.stop.lsn, size));
            let holds = if exact { found == wanted } else { found >= wanted };
            (holds, format!("replayed up to {lsn}, planned {}", plan.stop.lsn))
        }
        None => (false, "the server says that it has replayed nothing".to_owned()),
    };
    Ok(Reached { at, holds, detail })
}

/// Where the record after `end` would begin: a page's first byte and the first behind its header are the same place.
fn next_record(end: Lsn, size: SegmentSize) -> Lsn {
    let aligned = end.get().saturating_add(7) & !7;
    let in_page = aligned.checked_rem(PAGE_BYTES as u64).unwrap_or(0);
    let page = aligned.saturating_sub(in_page);
    let header = match size.floor(page.into()).get() == page {
        true => LONG_HEADER_BYTES,
        false => SHORT_HEADER_BYTES,
    };
    page.saturating_add(in_page.max(header as u64)).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_before_and_behind_a_page_header_are_the_same() {
        let next = |lsn: u64| next_record(lsn.into(), SegmentSize::DEFAULT).get();
        assert_eq!(next(0x300_0000), 0x300_0028);
        assert_eq!(next(0x300_0028), 0x300_0028);
        assert_eq!(next(0x300_2000), 0x300_2018);
        assert_eq!(next(0x300_1FF9), 0x300_2018);
        assert_eq!(next(0x300_2018), 0x300_2018);
        assert_eq!(next(0x300_2021), 0x300_2028);
    }
}
