//! Replay to the target itself: what PostgreSQL's recovery leaves where it ends, so that a server starts there as after a
//! shutdown. Facts: docs/wal.md, "The start of a timeline".

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde::Serialize;
use waltide_format::archive::{Catalog, Lineage, SegmentEntry};
use waltide_format::engines::postgres::cluster::{ControlFile, RelationSegment, version_directory};
use waltide_format::{ForkNumber, Lsn, TimelineId, TimestampTz, Xid};

use super::ForwardError;
use crate::plan::Plan;
use crate::resolve::StopKind;
use crate::target::{Target, TargetAction};

/// Replay ends at the target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finish {
    /// Records that start before are replayed.
    pub lsn: Lsn,
    /// The timeline that begins there, or a later one where the archive has that by then.
    pub timeline: TimelineId,
    /// Start of the checkpoint that the backup begins with.
    #[serde(skip)]
    pub(super) base: Lsn,
    /// The line that is left.
    #[serde(skip)]
    line: Lineage,
    #[serde(skip)]
    target: Target,
    #[serde(skip)]
    kind: StopKind,
    /// The transaction whose end it is, and the time of what it is.
    #[serde(skip)]
    of: (Option<Xid>, Option<TimestampTz>),
}

/// A timeline that was begun, and is not in pg_wal yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Begun {
    /// It.
    pub(in super::super) timeline: TimelineId,
    /// Where it begins: the end of the last record that was replayed.
    pub(in super::super) at: Lsn,
    /// The timeline that it leaves.
    pub(in super::super) before: TimelineId,
    /// Why, in PostgreSQL's words.
    pub(in super::super) reason: String,
    /// The segment that holds what comes before it in the same segment, where anything does.
    pub(in super::super) segment: Option<SegmentEntry>,
    /// Its log, from there on.
    pub(in super::super) bytes: Vec<u8>,
}

impl Finish {
    /// The target of a plan, or why a server has to come to it.
    pub(super) fn of(catalog: &Catalog, plan: &Plan) -> Result<Self, String> {
        match plan.goal.action {
            TargetAction::Promote => {}
            TargetAction::Pause => return Err("a server that pauses at the target has to recover".to_owned()),
            TargetAction::Shutdown => {
                return Err("a server that is shut down at the target has to recover".to_owned());
            }
        }
        let newest = catalog.timelines().last().copied().unwrap_or(plan.timeline).max(plan.timeline);
        let timeline = newest.get().checked_add(1).and_then(TimelineId::new);
        let timeline = timeline.ok_or("there is no higher timeline than the newest")?;
        let backup = catalog.backup(&plan.backup).ok_or("its backup is gone")?;
        Ok(Self {
            lsn: plan.stop.lsn,
            timeline,
            base: backup.head.checkpoint_lsn,
            line: plan.lineage.clone(),
            target: plan.goal.target.clone(),
            kind: plan.stop.kind,
            of: (plan.stop.xid, plan.stop.time),
        })
    }

    /// The timeline of the last byte before a place.
    pub(super) fn before(&self, at: Lsn) -> TimelineId {
        self.line.timeline_at(Lsn::from(at.get().saturating_sub(1)))
    }

    /// Why recovery stops there, as PostgreSQL's history files say it.
    pub(super) fn reason(&self, last_record: Lsn) -> String {
        let side = if self.kind == StopKind::After { "after" } else { "before" };
        match (&self.target, self.of) {
            _ if self.kind == StopKind::End => "no recovery target specified".to_owned(),
            _ if self.kind == StopKind::Consistent => "reached consistency".to_owned(),
            (Target::Name(name), _) => format!("at restore point \"{name}\""),
            (Target::Xid(_), (Some(xid), _)) => format!("{side} transaction {xid}"),
            (Target::Time(_), (_, Some(time))) => format!("{side} {time}"),
            _ if self.kind == StopKind::After => format!("after LSN {last_record}"),
            _ => format!("before LSN {}", self.lsn),
        }
    }
}

/// Makes unlogged relations what they are when a server has recovered: as their init forks have them.
pub(super) fn reset_unlogged(data_dir: &Path, control: &ControlFile) -> Result<(), ForwardError> {
    let version = version_directory(control.major, control.catalog_version);
    let mut databases = below(&data_dir.join("base"))?;
    for space in below(&data_dir.join("pg_tblspc"))? {
        databases.extend(below(&space.join(&version))?);
    }
    for database in databases.iter().filter(|path| path.is_dir()) {
        let mut files = Vec::new();
        for path in below(database)? {
            let relative = path.strip_prefix(data_dir).ok().and_then(Path::to_str).unwrap_or_default();
            let located = RelationSegment::locate(relative).filter(|(_, part)| !part.temporary);
            files.extend(located.map(|(relation, part)| (relation.rel_number, part.fork, path)));
        }
        let init = files.iter().filter(|(_, fork, _)| *fork == ForkNumber::Init);
        let unlogged: BTreeSet<u32> = init.map(|(number, ..)| *number).collect();
        for (_, _, path) in
            files.iter().filter(|(number, fork, _)| unlogged.contains(number) && *fork != ForkNumber::Init)
        {
            fs::remove_file(path).map_err(ForwardError::io("delete", path))?;
        }
        for (.., path) in files.iter().filter(|(_, fork, _)| *fork == ForkNumber::Init) {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let main = path.with_file_name(name.replace(ForkNumber::Init.suffix(), ""));
            fs::copy(path, &main).map_err(ForwardError::io("write", &main))?;
        }
    }
    Ok(())
}

/// What a directory holds; nothing, where it is none.
fn below(dir: &Path) -> Result<Vec<std::path::PathBuf>, ForwardError> {
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(dir).map_err(ForwardError::io("list", dir))?;
    let paths = entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>();
    paths.map_err(ForwardError::io("list", dir))
}
