//! Objects of the archive that cannot be read, and what of a plan they stand in the way of.

use waltide_format::archive::{
    Catalog, DamagedObject, Ending, Layout, Lineage, Run, Step, SystemLayout, WalObject,
};
use waltide_format::{Lsn, SegmentName, SegmentSize, TimelineId, WalFileName};

use crate::target::TargetTimeline;

/// The damaged objects that recovery would ask for, or that name what could be recovered.
pub(super) struct Damage<'a> {
    segments: Vec<(WalObject, SegmentName, &'a DamagedObject)>,
    histories: Vec<(TimelineId, &'a DamagedObject)>,
    manifests: Vec<&'a DamagedObject>,
    size: SegmentSize,
}

impl<'a> Damage<'a> {
    pub(super) fn of(catalog: &'a Catalog) -> Self {
        let mut found = Self {
            segments: Vec::new(),
            histories: Vec::new(),
            manifests: Vec::new(),
            size: catalog.system.segment_size,
        };
        let Some(names) = Layout::new(&catalog.cluster).map(|l| l.system(catalog.system.system_id)) else {
            return found;
        };
        for object in &catalog.damaged {
            match names.parse_wal(&object.path) {
                Some(
                    wal @ (WalObject::File(WalFileName::Segment(name) | WalFileName::Partial(name))
                    | WalObject::Longer {
                        of: WalFileName::Segment(name) | WalFileName::Partial(name),
                        ..
                    }),
                ) => found.segments.push((wal, name, object)),
                Some(WalObject::File(WalFileName::History(timeline))) => {
                    found.histories.push((timeline, object));
                }
                _ if is_manifest(&names, &object.path) => found.manifests.push(object),
                _ => {}
            }
        }
        found
    }

    /// The first segment that cannot be read of those that follow `run` along `line`.
    pub(super) fn behind(&self, line: &Lineage, run: &Run<'_>) -> Option<&'a DamagedObject> {
        let last = run.steps.last()?;
        let from = last.start();
        let follows = |(wal, name, _): &&(WalObject, SegmentName, &DamagedObject)| {
            let start = name.start(self.size);
            start.is_some_and(|start| {
                let later = start > from || is_taken_before(last, *wal, *name);
                start >= from && later && self.is_on(line, *name, start)
            })
        };
        let found = self.segments.iter().filter(follows).min_by_key(|(_, name, _)| name.start(self.size));
        found.map(|(.., object)| *object)
    }

    /// The copy of the segment at `lsn` on `line` that cannot be read.
    pub(super) fn at(&self, line: &Lineage, lsn: Lsn) -> Option<&'a DamagedObject> {
        let start = self.size.floor(lsn);
        let holds = |(_, name, _): &&(WalObject, SegmentName, &DamagedObject)| {
            name.start(self.size) == Some(start) && self.is_on(line, *name, start)
        };
        self.segments.iter().find(holds).map(|(.., object)| *object)
    }

    /// A history file without which nobody knows that `line` is the one that `wanted` means.
    pub(super) fn history(&self, line: &Lineage, wanted: TargetTimeline) -> Option<&'a DamagedObject> {
        let latest = wanted == TargetTimeline::Latest;
        let matters = |t: TimelineId| t == line.timeline || (latest && t > line.timeline);
        self.histories.iter().find(|(timeline, _)| matters(*timeline)).map(|(_, object)| *object)
    }

    /// Manifests: backups that are not looked at.
    pub(super) fn manifests(&self) -> &[&'a DamagedObject] {
        &self.manifests
    }

    /// Everything without which there may be fewer backups and timelines than the archive has, a line each, each
    /// begun by a line break.
    pub(super) fn told(&self) -> String {
        let histories = self.histories.iter().map(|(_, object)| *object);
        let lines =
            self.manifests.iter().copied().chain(histories).map(|object| format!("\n{}", told(object)));
        lines.collect()
    }

    /// Recovery asks for a segment of the timeline that is in force anywhere in it.
    fn is_on(&self, line: &Lineage, name: SegmentName, start: Lsn) -> bool {
        line.newest_first().any(|(timeline, begin, end)| {
            timeline == name.timeline()
                && self.size.floor(begin) <= start
                && end.is_none_or(|end| start < end)
        })
    }
}

/// What is wrong with an object.
pub(super) fn told(object: &DamagedObject) -> String {
    format!("{} is damaged: {}", object.path, object.error)
}

/// Whether fetch reads this copy of the segment that a run ends in although the run has another.
fn is_taken_before(last: &Step<'_>, wal: WalObject, name: SegmentName) -> bool {
    let info = &last.entry.info;
    let settled = matches!(info.ending, Ending::Full | Ending::Switch);
    match wal {
        _ if name != info.name => name.timeline() > info.name.timeline(),
        WalObject::File(WalFileName::Segment(_)) => last.entry.is_partial(),
        WalObject::File(_) => !settled && !last.entry.is_partial(),
        WalObject::Longer { valid_end, .. } => !settled && valid_end > info.valid_end,
    }
}

fn is_manifest(names: &SystemLayout, path: &str) -> bool {
    let file = path.strip_prefix(names.backups().as_str()).and_then(|rest| rest.strip_prefix('/'));
    file.and_then(|id| id.parse().ok()).is_some_and(|id| names.manifest(&id) == path)
}
