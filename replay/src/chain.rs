//! Whether the archive is still the one of which heads of its hash chain were written down: in merged indexes, in
//! manifests, elsewhere. Pure: catalogue and heads in, faults out.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use waltide_format::archive::{
    Catalog, ChainHash, ChainHead, ChainLink, ChainStart, Gap, GapKind, Lineage, MergedSummary, Run,
};
use waltide_format::{SegmentName, TimelineId, WalFileName};
use waltide_storage::StorageError;

use crate::verify::{Fault, FaultKind, Verification, Verify};

/// A head that was written down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeptHead {
    pub(crate) head: ChainHead,
    /// Where: an object, or the operator's own note.
    pub(crate) by: String,
}

/// Segments that something in the archive says were there, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeptLinks {
    pub(crate) links: Vec<ChainLink>,
    pub(crate) by: String,
}

/// A chain that is in the archive now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ProvedChain {
    /// The timeline along whose line it goes.
    pub timeline: TimelineId,
    /// Its head: what is to be noted elsewhere.
    pub head: ChainHead,
    /// Segments of it that are there.
    pub segments: u64,
    /// Heads that were written down and are on it.
    pub kept_heads: u64,
}

/// What the chains show.
#[derive(Debug, Default)]
pub(crate) struct ChainReport {
    pub(crate) chains: Vec<ProvedChain>,
    pub(crate) faults: Vec<Fault>,
}

/// What the operator's own head is called in faults.
pub(crate) const SINCE: &str = "--since";

/// Compares the WAL that is there with all that was written down of it.
pub(crate) fn check_chains(catalog: &Catalog, heads: &[KeptHead], links: &[KeptLinks]) -> ChainReport {
    let check = ChainCheck { catalog, heads, links };
    let mut report = ChainReport::default();
    let mut seen = BTreeSet::new();
    for line in catalog.lines() {
        for run in catalog.runs(&line) {
            check.run(&line, &run, &mut seen, &mut report);
        }
    }
    check.removed(&mut report);
    check.since(&seen, &mut report);
    report.faults.sort();
    report.faults.dedup();
    report
}

struct ChainCheck<'a> {
    catalog: &'a Catalog,
    heads: &'a [KeptHead],
    links: &'a [KeptLinks],
}

impl ChainCheck<'_> {
    /// One unbroken run: every head that was kept of it must be on a chain through it.
    fn run(&self, line: &Lineage, run: &Run<'_>, seen: &mut BTreeSet<ChainHead>, report: &mut ChainReport) {
        let own = self.heads.iter().filter(|k| k.by != SINCE);
        let anchors: Vec<ChainHead> = own.map(|k| k.head).collect();
        let Some(start) = self.catalog.chain_start(line, run, &anchors) else { return };
        let links = run.links();
        let places: BTreeMap<SegmentName, usize> = links.iter().map(|link| link.name).zip(0usize..).collect();
        let Some(first) = links.first() else { return };
        let before = self.catalog.segment_before(first.name);
        // Which heads are about this run, and how many of its segments each has behind it.
        let mut families: BTreeMap<SegmentName, Vec<(usize, &KeptHead)>> = BTreeMap::new();
        families.entry(start.origin).or_default();
        for kept in self.heads {
            let place = match places.get(&kept.head.last) {
                Some(place) => place.saturating_add(1),
                None if before == Some(kept.head.last) => 0,
                None => continue,
            };
            families.entry(kept.head.origin).or_default().push((place, kept));
        }
        for (origin, mut kept) in families {
            kept.sort_by_key(|(place, k)| (*place, k.by == SINCE));
            let (from, hash) = match (places.get(&origin), kept.first()) {
                (Some(place), _) => (*place, ChainHash::seed(self.catalog.system.system_id, origin)),
                (None, Some((place, anchor))) if anchor.by != SINCE => (*place, anchor.head.hash),
                // Nothing but the operator's note knows this chain: it is not found, and told so below.
                _ => continue,
            };
            let (mut proved, mut current, mut on_it) = (from, hash, 0u64);
            for (place, kept) in kept {
                // A note of a chain that began later says nothing of what came before.
                let Some(between) = links.get(proved..place) else { continue };
                let found = between.iter().fold(current, |hash, link| hash.link(link));
                seen.insert(kept.head);
                if found == kept.head.hash {
                    on_it = on_it.saturating_add(1);
                } else {
                    report.faults.push(self.differs(between, kept));
                }
                // What follows is measured from what the archive kept, so that the next change is found too.
                let measured = if kept.by == SINCE { found } else { kept.head.hash };
                (proved, current) = (place, measured);
            }
            if origin == start.origin
                && links.last().is_some_and(|last| last.name.timeline() == line.timeline)
                && let Some(head) = (ChainStart { origin, before: hash }).head(links.iter().skip(from))
            {
                let segments = links.len() as u64;
                let timeline = line.timeline;
                report.chains.push(ProvedChain { timeline, head, segments, kept_heads: on_it });
            }
        }
    }

    /// Names the first segment between a head that fits and one that does not.
    fn differs(&self, between: &[ChainLink], kept: &KeptHead) -> Fault {
        let names = self.catalog_names();
        for now in between {
            let of_name = self.links.iter().flat_map(|k| k.links.iter().map(move |link| (link, &k.by)));
            if let Some((was, by)) =
                of_name.into_iter().find(|(was, _)| was.name == now.name && **was != *now)
            {
                let text = format!(
                    "it was replaced: its WAL has the SHA-256 {} and ends at {}, and had {} and ended at {} when {by} was made",
                    hex(&now.digest),
                    now.valid_end,
                    hex(&was.digest),
                    was.valid_end
                );
                return Fault { object: names(now.name), kind: FaultKind::Damaged, byte: None, text };
            }
        }
        let (first, last) = match between {
            [one] => (one.name, one.name),
            [first, .., last] => (first.name, last.name),
            [] => (kept.head.last, kept.head.last),
        };
        let which = match first == last {
            true => "this segment is not what it was".to_owned(),
            false => format!("a segment from this one to {last} is not what it was, or was put elsewhere"),
        };
        let text = format!(
            "{which}: the chain up to {} does not have the hash that {} kept",
            kept.head.last, kept.by
        );
        Fault { object: names(first), kind: FaultKind::Damaged, byte: None, text }
    }

    fn catalog_names(&self) -> impl Fn(SegmentName) -> String + use<> {
        let layout = waltide_format::archive::Layout::new(&self.catalog.cluster);
        let names = layout.map(|layout| layout.system(self.catalog.system.system_id));
        move |name| {
            let file = WalFileName::Segment(name);
            names.as_ref().map_or_else(|| name.to_string(), |names| names.wal_file(file))
        }
    }

    /// Segments that were there and are gone, though older ones of their timeline are there: prune removes the oldest.
    fn removed(&self, report: &mut ChainReport) {
        let size = self.catalog.system.segment_size;
        let mut oldest: BTreeMap<TimelineId, SegmentName> = BTreeMap::new();
        for entry in &self.catalog.segments {
            let name = entry.info.name;
            let first = oldest.entry(name.timeline()).or_insert(name);
            *first = (*first).min(name);
        }
        let there: BTreeSet<SegmentName> = self.catalog.segments.iter().map(|s| s.info.name).collect();
        // What is there and cannot be read is told as damaged.
        let damaged: BTreeSet<&str> =
            self.catalog.damaged.iter().filter_map(|d| d.path.rsplit('/').next()).collect();
        let by_retention: Vec<_> =
            self.catalog.coverage().holes.into_iter().filter(|h| h.by_retention).map(|h| h.gap).collect();
        let listed = self.links.iter().flat_map(|k| k.links.iter().map(move |link| (link.name, &k.by)));
        let headed = self.heads.iter().map(|k| (k.head.last, &k.by));
        let mut gone: BTreeMap<SegmentName, &String> = BTreeMap::new();
        for (name, by) in listed.chain(headed).filter(|(name, _)| !there.contains(name)) {
            let start = name.start(size);
            let in_hole = by_retention.iter().any(|gap| {
                gap.timeline == name.timeline()
                    && start.is_some_and(|s| gap.from < s.saturating_add(size.bytes()) && s < gap.to)
            });
            let is_damaged = damaged.contains(name.to_string().as_str());
            if !in_hole && !is_damaged && oldest.get(&name.timeline()).is_some_and(|first| *first < name) {
                gone.entry(name).or_insert(by);
            }
        }
        // The first of each stretch; those that follow went with it.
        let names = self.catalog_names();
        let mut before = None;
        for (name, by) in gone {
            let follows = before.is_some_and(|b: SegmentName| b.next(size) == Some(name));
            before = Some(name);
            if !follows {
                let text = match by.as_str() {
                    SINCE => "it was removed: the head given with --since is behind it".to_owned(),
                    by => format!("it was removed: {by} was made while it was there"),
                };
                report.faults.push(Fault { object: names(name), kind: FaultKind::Missing, byte: None, text });
            }
        }
    }

    /// The first hole behind the origin of a head.
    fn hole_behind(&self, head: &ChainHead) -> Option<(SegmentName, String)> {
        let size = self.catalog.system.segment_size;
        let line = self.catalog.lineage(head.last.timeline());
        let (from, to) = (head.origin.start(size)?, head.last.end(size)?);
        let on_it = |gap: &&Gap| from <= gap.from && gap.from < to && line.holds(gap.timeline, gap.from);
        let gaps = self.catalog.gaps();
        let gap = gaps.iter().filter(on_it).min_by_key(|gap| gap.from)?;
        let first = match &gap.kind {
            GapKind::Missing { first, .. } => *first,
            _ => SegmentName::containing(gap.timeline, gap.from, size),
        };
        Some((first, gap.to_string()))
    }

    /// The operator's head must have been met on some chain.
    fn since(&self, seen: &BTreeSet<ChainHead>, report: &mut ChainReport) {
        let noted = self.heads.iter().filter(|k| k.by == SINCE && !seen.contains(&k.head));
        for kept in noted {
            let names = self.catalog_names();
            // Pruned, but kept behind what is still there.
            let others = self.heads.iter().filter(|k| k.by != SINCE);
            if others.clone().any(|k| k.head == kept.head) {
                continue;
            }
            let same = others.filter(|k| (k.head.origin, k.head.last) == (kept.head.origin, kept.head.last));
            let hole = self.hole_behind(&kept.head);
            let text = match same.map(|k| &k.by).next() {
                _ if hole.is_some() => {
                    let (first, gap) = hole.unwrap_or((kept.head.last, String::new()));
                    let text = format!("the archive does not continue {}: {gap}", kept.head);
                    report.faults.push(Fault {
                        object: names(first),
                        kind: FaultKind::Missing,
                        byte: None,
                        text,
                    });
                    continue;
                }
                Some(by) => format!(
                    "the chain up to it is another: {by} kept another hash than the one given with --since"
                ),
                None => format!(
                    "it cannot be shown that the archive continues {}: nothing in it has kept that chain",
                    kept.head
                ),
            };
            report.faults.push(Fault {
                object: names(kept.head.last),
                kind: FaultKind::Missing,
                byte: None,
                text,
            });
        }
    }
}

fn hex(digest: &[u8; 32]) -> String {
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

impl Verify<'_> {
    /// Proves the hash chains, and that `since` is on one of them.
    pub async fn prove_chain(
        &self,
        since: Option<ChainHead>,
        found: &mut Verification,
    ) -> Result<(), StorageError> {
        let catalog = self.catalog;
        let names = self.layout.system(catalog.system.system_id);
        let lines = catalog.lines();
        let begins = lines.iter().flat_map(|line| catalog.runs(line));
        let begins: BTreeSet<SegmentName> =
            begins.filter_map(|run| catalog.segment_before(run.steps.first()?.entry.info.name)).collect();
        let mut heads: Vec<KeptHead> =
            since.map(|head| KeptHead { head, by: SINCE.to_owned() }).into_iter().collect();
        heads.extend(catalog.manifest_heads().map(|(id, head)| KeptHead { head, by: names.manifest(id) }));
        let mut links = Vec::new();
        for object in self.archive.list(&names.merged()).await? {
            let Some(name) = names.parse_merged(&object.path) else { continue };
            let read = self.archive.read_end(&object.path, MergedSummary::tail_bytes(&name), |tail, size| {
                MergedSummary::decode(&name, tail, size)
            });
            // Damage of it is told where it is looked at itself.
            let index = match read.await {
                Ok(Ok(index)) => index,
                Ok(Err(_)) => continue,
                Err(e) if e.is_not_found() || e.is_bad_object() => continue,
                Err(e) => return Err(e),
            };
            let by = &object.path;
            let before = catalog.segment_before(name.first);
            let kept = |head: &ChainHead| {
                begins.contains(&head.last)
                    || head.last == name.last
                    || Some(head.last) == before
                    || since.is_some_and(|s| s.last == head.last)
            };
            let of_index = catalog.merged_heads(&index).into_iter().filter(kept);
            heads.extend(of_index.map(|head| KeptHead { head, by: by.clone() }));
            links
                .push(KeptLinks { links: index.segments.iter().map(|s| s.link()).collect(), by: by.clone() });
        }
        let report = check_chains(catalog, &heads, &links);
        for fault in report.faults {
            let known = |f: &Fault| {
                f.object == fault.object && (f.text == fault.text || f.kind == FaultKind::Damaged)
            };
            if fault.text.contains(SINCE) || !found.faults.iter().any(known) {
                found.faults.push(fault);
            }
        }
        found.faults.sort();
        found.chains = report.chains;
        Ok(())
    }
}
