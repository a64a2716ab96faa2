//! Which merged indexes an archive can have: whole steps of segments that follow one another without a hole.

use crate::archive::catalog::{Catalog, Lineage, Run, SegmentEntry, Step};
use crate::archive::chain::{ChainHead, ChainLink, ChainStart};
use crate::archive::layout::MergedName;
use crate::archive::manifest::BackupChain;
use crate::ids::{BackupId, Lsn, SystemId, TimelineId};
use crate::segment::SegmentName;

use super::{MERGE_BUILDER, MERGE_STEPS, MergedSummary};

/// Segments that a merged index can be made of.
#[derive(Debug, Clone, PartialEq)]
pub struct MergeGroup<'a> {
    /// What its object is called, before any of that name was found damaged.
    pub name: MergedName,
    /// The segments, in order.
    pub entries: Vec<&'a SegmentEntry>,
    /// The hash chain before the first of them.
    pub chain: ChainStart,
}

impl MergedName {
    /// The key of a name: the first eight bytes of the hash over a chain of these segments alone.
    pub fn key_of(system: SystemId, links: &[ChainLink]) -> u64 {
        let head = links.first().and_then(|first| ChainStart::new(system, first.name).head(links));
        head.and_then(|head| head.hash.bytes().first_chunk::<8>().map(|c| u64::from_be_bytes(*c)))
            .unwrap_or(0)
    }

    /// Whether both cover the same segments.
    pub fn is_same_range(&self, other: &Self) -> bool {
        (self.first, self.step, self.last) == (other.first, other.step, other.last)
    }
}

impl Catalog {
    /// Every unbroken run of WAL along `line`, in order.
    pub fn runs(&self, line: &Lineage) -> Vec<Run<'_>> {
        let size = self.system.segment_size;
        let on_line = |entry: &&SegmentEntry| {
            let name = entry.info.name;
            let Some(start) = name.start(size) else { return false };
            line.newest_first().any(|(t, begin, end)| {
                t == name.timeline() && size.floor(begin) <= start && end.is_none_or(|end| start < end)
            })
        };
        let mut starts: Vec<_> =
            self.segments.iter().filter(on_line).filter_map(|s| s.info.name.start(size)).collect();
        starts.sort_unstable();
        starts.dedup();
        let mut starts = starts.into_iter().peekable();
        let mut runs = Vec::new();
        while let Some(start) = starts.next() {
            let run = self.run(line, start);
            let Some(end) = run.steps.last().and_then(|s| s.entry.info.name.end(size)) else { continue };
            while starts.next_if(|next| *next < end).is_some() {}
            runs.push(run);
        }
        runs
    }

    /// Where the chain stands before the first segment of a run: where one of `anchors`, heads that were written down when
    /// the segments before were still there, stands right before it; else it begins with this segment.
    pub fn chain_start(&self, line: &Lineage, run: &Run<'_>, anchors: &[ChainHead]) -> Option<ChainStart> {
        let first = run.steps.first()?.entry.info.name;
        let size = self.system.segment_size;
        let start = first.start(size)?;
        let before = |a: &&ChainHead| {
            let at = a.last.start(size);
            a.last.end(size) == Some(start) && at.is_some_and(|at| line.holds(a.last.timeline(), at))
        };
        let anchor = anchors.iter().filter(before).min_by_key(|a| (a.origin.start(size), a.origin, a.hash));
        Some(match anchor {
            Some(a) => ChainStart { origin: a.origin, before: a.hash },
            None => ChainStart::new(self.system.system_id, first),
        })
    }

    /// The segment that comes before, on the line of this one's timeline.
    pub fn segment_before(&self, name: SegmentName) -> Option<SegmentName> {
        let size = self.system.segment_size;
        let before = name.start(size)?.get().checked_sub(1).map(Lsn::from)?;
        Some(SegmentName::containing(self.lineage(name.timeline()).timeline_at(before), before, size))
    }

    /// The heads that a merged index has kept: behind each of its segments, and before the first if the chain did not
    /// begin there.
    pub fn merged_heads(&self, index: &MergedSummary) -> Vec<ChainHead> {
        let first = index.segments.first().map(|s| s.info.name);
        let before = first.filter(|first| *first != index.chain.origin).and_then(|first| {
            let last = self.segment_before(first)?;
            Some(ChainHead { origin: index.chain.origin, last, hash: index.chain.before })
        });
        before.into_iter().chain(index.heads()).collect()
    }

    /// The heads that manifests have kept, each with the backup: before the segment it starts in if the chain did not begin
    /// there, and behind the last that it needs.
    pub fn manifest_heads(&self) -> impl Iterator<Item = (&BackupId, ChainHead)> + '_ {
        self.backups.iter().filter_map(|b| Some((&b.head.id, b.head.chain?))).flat_map(|(id, chain)| {
            let BackupChain { first, start, head } = chain;
            let before = self.segment_before(first).filter(|_| first != start.origin);
            let before = before.map(|last| ChainHead { origin: start.origin, last, hash: start.before });
            before.into_iter().chain([head]).map(move |head| (id, head))
        })
    }

    /// The chain over a backup's WAL; none where that is not unbroken, or its last segment still open.
    pub fn backup_chain(
        &self,
        timeline: TimelineId,
        start: Lsn,
        stop: Lsn,
        anchors: &[ChainHead],
    ) -> Option<BackupChain> {
        let size = self.system.segment_size;
        let line = self.lineage(timeline);
        let holds = |step: &Step<'_>, lsn: Lsn| step.start() == size.floor(lsn);
        let run = self.runs(&line).into_iter().find(|run| run.steps.iter().any(|step| holds(step, start)))?;
        let links = run.links();
        let of_run = self.chain_start(&line, &run, anchors)?;
        let from = run.steps.iter().position(|step| holds(step, start))?;
        let before = links.get(..from)?.iter().fold(of_run.before, |hash, link| hash.link(link));
        let chain = ChainStart { origin: of_run.origin, before };
        // A backup that ends right where a segment begins needs nothing of that one.
        let last = size.floor(stop.saturating_sub(1));
        let needed = links.get(from..)?.iter().take_while(|link| link.name.start(size) <= Some(last));
        let needed: Vec<_> = needed.copied().collect();
        let head = chain.head(&needed).filter(|head| head.last.start(size) == Some(last))?;
        Some(BackupChain { first: needed.first()?.name, start: chain, head })
    }

    /// Every merged index that can be made, lower steps first.
    pub fn merge_groups(&self, anchors: &[ChainHead]) -> Vec<MergeGroup<'_>> {
        let mut groups = Vec::new();
        for line in self.lines() {
            for run in self.runs(&line) {
                self.run_groups(&line, &run, anchors, &mut groups);
            }
        }
        groups.sort_by_key(|g: &MergeGroup<'_>| (g.name.step, g.name.first));
        groups
    }

    fn run_groups<'a>(
        &'a self,
        line: &Lineage,
        run: &Run<'a>,
        anchors: &[ChainHead],
        groups: &mut Vec<MergeGroup<'a>>,
    ) {
        let size = self.system.segment_size;
        let Some(start) = self.chain_start(line, run, anchors) else { return };
        let links = run.links();
        // The chain before each segment, of the line's own timeline only: an ancestor's are merged on its own line.
        let mut own: Vec<(u64, &'a SegmentEntry, ChainLink, ChainStart)> = Vec::new();
        let mut hash = start.before;
        for (step, link) in run.steps.iter().zip(&links) {
            let before = ChainStart { origin: start.origin, before: hash };
            hash = hash.link(link);
            if link.name.timeline() == line.timeline {
                let number = link.name.start(size).map_or(0, |lsn| size.segment_number(lsn));
                own.push((number, step.entry, *link, before));
            }
        }
        for step in MERGE_STEPS {
            for part in own.chunk_by(|a, b| a.0.checked_div(step) == b.0.checked_div(step)) {
                let [(_, first, _, chain), .., (_, last, _, _)] = part else { continue };
                // What was admitted with a fault has an index that stops there.
                if part.len() as u64 != step || part.iter().any(|(_, e, ..)| !e.faults.is_empty()) {
                    continue;
                }
                let links: Vec<_> = part.iter().map(|(_, _, link, _)| *link).collect();
                let name = MergedName {
                    first: first.info.name,
                    step,
                    last: last.info.name,
                    builder: MERGE_BUILDER,
                    generation: 0,
                    key: MergedName::key_of(self.system.system_id, &links),
                };
                let entries = part.iter().map(|(_, entry, ..)| *entry).collect();
                groups.push(MergeGroup { name, entries, chain: *chain });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::catalog::samples::*;

    fn ranges(c: &Catalog) -> Vec<(u64, String, String)> {
        let name = |g: MergeGroup<'_>| (g.name.step, g.name.first.to_string(), g.name.last.to_string());
        c.merge_groups(&[]).into_iter().map(name).collect()
    }

    #[test]
    fn only_whole_steps_without_a_hole_are_merged() {
        let group = |step: u64, first: &str, last: &str| (step, first.to_owned(), last.to_owned());
        let found = ranges(&digested(3..40));
        assert_eq!(found, [group(16, "000000010000000000000010", "00000001000000000000001F")]);
        let mut holed = digested(3..80);
        holed.segments.retain(|s| s.info.name.to_string() != "00000001000000000000002A");
        let firsts: Vec<_> = ranges(&holed).into_iter().map(|(_, first, _)| first).collect();
        assert_eq!(
            firsts,
            ["000000010000000000000010", "000000010000000000000030", "000000010000000000000040"]
        );
        let mut broken = digested(3..40);
        broken.segments[20].info.first_prev = Some(Lsn::from(7));
        assert_eq!(ranges(&broken), []);
        assert_eq!(ranges(&digested(256..512)).len(), 17);
    }

    #[test]
    fn a_segment_whose_log_ends_inside_is_merged_once_another_follows() {
        let mut c = digested(16..32);
        c.segments[15].info.ending = crate::archive::Ending::EndOfLog;
        assert_eq!(ranges(&c), []);
        let mut partial = digested(16..32);
        partial.segments[15].path.push_str(".partial");
        assert_eq!(ranges(&partial), []);
    }

    #[test]
    fn another_copy_of_a_segment_is_another_name() {
        let c = digested(16..32);
        let mut other = c.clone();
        other.segments[4].digest = format!("{:064x}", 99);
        let name = |c: &Catalog| c.merge_groups(&[])[0].name;
        assert!(name(&c).is_same_range(&name(&other)));
        assert_ne!(name(&c), name(&other));
    }

    #[test]
    fn the_chain_goes_on_from_a_head_that_was_written_down() {
        let whole = digested(3..64);
        let groups = whole.merge_groups(&[]);
        let heads: Vec<_> = groups
            .iter()
            .map(|g| {
                g.chain.head(&g.entries.iter().filter_map(|e| ChainLink::of(e)).collect::<Vec<_>>()).unwrap()
            })
            .collect();
        assert_eq!(
            groups[1].chain,
            ChainStart { origin: whole.segments[0].info.name, before: heads[0].hash }
        );
        let mut pruned = whole.clone();
        pruned.segments.retain(|s| s.info.name > heads[0].last);
        assert_eq!(pruned.merge_groups(&heads)[0].chain, groups[1].chain);
        assert_eq!(pruned.merge_groups(&[])[0].chain.origin, pruned.segments[0].info.name);
    }
}
