//! Is the archive whole: every object, every checksum, every record, every gap. Faults are a value, not an error.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt, TryStreamExt};
use serde::Serialize;
use waltide_format::archive::{
    BackupEntry, BackupKind, Catalog, Envelope, Extent, ExtentMap, FOOTER_BYTES, Footer, GapKind, Layout,
    LedgerRecord, LedgerUnit, Lineage, Manifest, MergedName, ObjectKind, PackBuilder, SegmentDirectory,
    SegmentEntry, StoredSegment, SystemLayout, WalFile, WalObject,
};
use waltide_format::engines::postgres::cluster::History;
use waltide_format::engines::postgres::scan::{Agreement, agreement};
use waltide_format::engines::postgres::wal::PreviousTail;
use waltide_format::{BackupId, Corrupt, SegmentName, TimelineId, TimestampTz, WalFileName};
use waltide_storage::{Archive, Bytes, ObjectInfo, Progress, StorageError};

use crate::chain::ProvedChain;
use crate::engines::postgres::merged::{CheckedIndex, IndexCheck};
use crate::engines::postgres::verify::{Around, Checked, check_segment, history_of, tail_of};
use crate::ledger::Ledger;

/// No object is larger: a segment of 1 GiB that does not compress, with its index.
const OBJECT_BYTES_MAX: u64 = 3 << 30;
/// Segments verified as one unit of the ledger.
const SPAN_SEGMENTS: u64 = 256;
/// Memory for segments that are being verified, all threads together.
const SEGMENT_MEMORY_BYTES: u64 = 2 << 30;
/// Holds what a segment's index says first, but for a segment with very many restore points.
const SUMMARY_BYTES: u64 = 16 << 10;

/// What kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// An object that something refers to is not there.
    Missing,
    /// An object is not what it was when it was stored.
    Damaged,
    /// WAL is missing, or does not continue what is before it.
    Gap,
    /// Two copies of a segment hold different records in the same place.
    Diverged,
}

/// Something that is wrong with the archive.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Fault {
    /// The object.
    pub object: String,
    /// What kind.
    pub kind: FaultKind,
    /// The byte it was seen at: of the object, or of the segment's WAL where the text speaks of that.
    pub byte: Option<u64>,
    /// What was found, what was expected, whom it harms.
    pub text: String,
}

/// What a verification found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verification {
    /// When it started.
    pub started: TimestampTz,
    /// How long it took.
    pub seconds: f64,
    /// The backup it was limited to.
    pub backup: Option<BackupId>,
    /// Whether only names, lengths, directories and gaps were looked at.
    pub quick: bool,
    /// Whether everything asked for was looked at: the time allowed was enough.
    pub complete: bool,
    /// Objects read.
    pub objects: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Segments verified.
    pub segments: u64,
    /// Their records.
    pub records: u64,
    /// Backups verified.
    pub backups: u64,
    /// Frames of packs decoded.
    pub frames: u64,
    /// What is wrong.
    pub faults: Vec<Fault>,
    /// What is odd, and does no harm.
    pub notes: Vec<String>,
    /// The hash chains, where they were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub chains: Vec<ProvedChain>,
    /// The ledger's record of this run, where it could be written.
    pub ledger: Option<String>,
}

/// What to verify, and how.
#[allow(missing_debug_implementations)] // a dyn Progress has none
pub struct Verify<'a> {
    /// The archive.
    pub archive: &'a Archive,
    /// The cluster.
    pub layout: &'a Layout,
    /// What it holds, read without the cache.
    pub catalog: &'a Catalog,
    /// This backup with its WAL, or everything.
    pub backup: Option<&'a BackupEntry>,
    /// Names, lengths, directories and gaps only.
    pub quick: bool,
    /// No part is begun after so long.
    pub time_allowed: Option<Duration>,
    /// How many objects are worked on at a time.
    pub threads: usize,
    /// Who wants to know how far it is.
    pub progress: &'a dyn Progress,
}

/// A part that is verified as a whole.
enum Unit<'a> {
    Backup(&'a BackupEntry),
    /// With its place in the ledger.
    Span(TimelineId, String, Vec<SegmentName>),
    Index,
    Rest,
}

impl Unit<'_> {
    fn name(&self) -> String {
        match self {
            Self::Backup(b) => format!("backup/{}", b.head.id),
            Self::Span(_, name, _) => format!("wal/{name}"),
            Self::Index => "index".to_owned(),
            Self::Rest => "rest".to_owned(),
        }
    }
}

#[derive(Default)]
struct Tally {
    faults: Mutex<BTreeSet<Fault>>,
    objects: AtomicU64,
    bytes: AtomicU64,
    segments: AtomicU64,
    records: AtomicU64,
    backups: AtomicU64,
    frames: AtomicU64,
}

/// One run.
struct Run<'a> {
    what: &'a Verify<'a>,
    names: SystemLayout,
    packs: BTreeMap<String, u64>,
    maps: BTreeMap<String, u64>,
    histories: BTreeMap<TimelineId, History>,
    merged: Vec<(MergedName, ObjectInfo)>,
    /// Maps and packs that were looked at.
    seen: Mutex<HashSet<String>>,
    tally: Tally,
}

impl Verify<'_> {
    /// Looks at everything asked for. An error is an archive that cannot be reached; what is wrong with it is in
    /// the answer.
    pub async fn run(&self, now: TimestampTz) -> Result<Verification, StorageError> {
        let begun = Instant::now();
        let names = self.layout.system(self.catalog.system.system_id);
        let named = |objects: Vec<ObjectInfo>| {
            let name = |o: &ObjectInfo| o.path.rsplit('/').next().unwrap_or_default().to_owned();
            objects.iter().map(|o| (name(o), o.size)).collect::<BTreeMap<_, _>>()
        };
        let merged = self.archive.list(&names.merged()).await?;
        let run = Run {
            merged: merged.into_iter().filter_map(|o| Some((names.parse_merged(&o.path)?, o))).collect(),
            packs: named(self.archive.list(&names.packs()).await?),
            maps: named(self.archive.list(&names.maps()).await?),
            histories: self
                .catalog
                .lineages
                .values()
                .filter_map(|l| Some((l.timeline, history_of(l)?)))
                .collect(),
            what: self,
            names,
            seen: Mutex::default(),
            tally: Tally::default(),
        };
        run.take_from_catalog();
        let mut units = run.units();
        let ledger = Ledger::read(self.archive, &run.names).await?;
        if self.backup.is_none() {
            // What was never verified comes first, then what was not for the longest time.
            let looked = ledger.last_looked(self.quick);
            units.sort_by_key(|u| looked.get(u.name().as_str()).copied());
        }
        self.progress.phase("verify", Some(run.expected_bytes(&units)));
        let mut done = Vec::new();
        let mut complete = true;
        for unit in &units {
            if self.time_allowed.is_some_and(|allowed| begun.elapsed() >= allowed) {
                complete = false;
                break;
            }
            let before = run.counts();
            run.unit(unit).await?;
            let after = run.counts();
            done.push(LedgerUnit {
                name: unit.name(),
                objects: after.0.saturating_sub(before.0),
                bytes: after.1.saturating_sub(before.1),
                faults: after.2.saturating_sub(before.2),
            });
        }
        let seconds = begun.elapsed().as_secs_f64();
        let mut notes = if self.backup.is_none() && complete { run.notes() } else { Vec::new() };
        let id = format!("{}-{}", now.compact(), std::process::id());
        let mut record = LedgerRecord { id, started: now, seconds, quick: self.quick, units: done };
        let path = match Ledger::write(self.archive, &run.names, &mut record).await {
            Ok(path) => path,
            Err(e) => {
                notes.push(format!("the ledger could not be written: {e}"));
                None
            }
        };
        if path.is_some() && self.backup.is_none() {
            let parts = units.iter().map(Unit::name).collect();
            if let Err(e) = ledger.tidy(self.archive, &run.names, record, &parts).await {
                notes.push(format!("the ledger could not be tidied: {e}"));
            }
        }
        let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let tally = run.tally;
        Ok(Verification {
            started: now,
            seconds,
            backup: self.backup.map(|b| b.head.id.clone()),
            quick: self.quick,
            complete,
            objects: load(&tally.objects),
            bytes: load(&tally.bytes),
            segments: load(&tally.segments),
            records: load(&tally.records),
            backups: load(&tally.backups),
            frames: load(&tally.frames),
            faults: tally.faults.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter().collect(),
            notes,
            chains: Vec::new(),
            ledger: path,
        })
    }
}

impl<'a> Run<'a> {
    fn fault(&self, object: &str, kind: FaultKind, byte: Option<u64>, text: String) {
        let fault = Fault { object: object.to_owned(), kind, byte, text };
        let mut faults = self.tally.faults.lock().unwrap_or_else(PoisonError::into_inner);
        // The catalogue told the same without the byte.
        let again = fault.byte.is_some() && faults.remove(&Fault { byte: None, ..fault.clone() });
        if faults.insert(fault.clone()) && !again {
            self.what.progress.message(&format!("{}: {}", fault.object, fault.text));
        }
    }

    fn corrupt(&self, object: &str, e: Corrupt) {
        self.fault(object, FaultKind::Damaged, Some(e.at), e.to_string());
    }

    fn counts(&self) -> (u64, u64, u64) {
        let faults = self.tally.faults.lock().unwrap_or_else(PoisonError::into_inner).len() as u64;
        (self.tally.objects.load(Ordering::Relaxed), self.tally.bytes.load(Ordering::Relaxed), faults)
    }

    fn read(&self, bytes: u64) {
        self.tally.objects.fetch_add(1, Ordering::Relaxed);
        self.tally.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.what.progress.advance(bytes);
    }

    /// Whether an object of a map or pack name was not looked at before.
    fn is_new(&self, path: &str) -> bool {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned())
    }

    /// What the catalogue, which was read just now, says already: damaged objects, holes, backups without their WAL.
    fn take_from_catalog(&self) {
        let catalog = self.what.catalog;
        let wanted = |id: &BackupId| self.what.backup.is_none_or(|b| b.head.id == *id);
        let coverage = catalog.coverage();
        for object in catalog.damaged.iter().filter(|_| self.what.backup.is_none()) {
            self.fault(&object.path, FaultKind::Damaged, None, object.error.clone());
        }
        for hole in coverage.holes.iter().filter(|h| !h.by_retention) {
            let limited = self.what.backup.is_some_and(|b| !hole.harms.contains(&b.head.id));
            // A hole behind a backup's end does not keep that backup from being restored.
            let behind = self.what.backup.is_some_and(|b| hole.gap.from >= b.head.stop_lsn);
            if limited || behind {
                continue;
            }
            let at = SegmentName::containing(hole.gap.timeline, hole.gap.from, catalog.system.segment_size);
            let first = match &hole.gap.kind {
                GapKind::Missing { first, .. } => *first,
                _ => at,
            };
            let harms: Vec<_> = hole.harms.iter().map(ToString::to_string).collect();
            let harms = match harms.as_slice() {
                [] => "no backup needs it".to_owned(),
                ids => format!("it ends recovery from {}", ids.join(", ")),
            };
            let object = self.names.wal_file(WalFileName::Segment(first));
            self.fault(&object, FaultKind::Gap, None, format!("{}; {harms}", hole.gap));
        }
        for broken in coverage.broken_backups.iter().filter(|b| wanted(&b.backup)) {
            let text = format!(
                "it cannot be restored: its WAL is whole up to {}, needed up to {}: {}",
                broken.whole_until, broken.needed_until, broken.reason
            );
            self.fault(&self.names.manifest(&broken.backup), FaultKind::Gap, None, text);
        }
    }

    fn units(&self) -> Vec<Unit<'a>> {
        let catalog = self.what.catalog;
        if let Some(backup) = self.what.backup {
            let line = catalog.lineage(backup.head.timeline);
            let run = catalog.run(&line, backup.head.start_lsn);
            let steps = run.steps.iter().filter(|s| s.start() < backup.head.stop_lsn);
            let mut spans: BTreeMap<TimelineId, Vec<SegmentName>> = BTreeMap::new();
            for name in steps.map(|s| s.entry.info.name) {
                spans.entry(name.timeline()).or_default().push(name);
            }
            // Not the whole of a part that the ledger knows.
            let place =
                |names: &[SegmentName]| names.iter().map(ToString::to_string).next().unwrap_or_default();
            let spans = spans.into_iter().map(|(timeline, names)| {
                Unit::Span(timeline, format!("{}+{}", place(&names), names.len()), names)
            });
            return std::iter::once(Unit::Backup(backup)).chain(spans).collect();
        }
        let mut units = vec![Unit::Rest];
        if !self.merged.is_empty() {
            units.push(Unit::Index);
        }
        units.extend(catalog.backups.iter().rev().map(Unit::Backup));
        let size = catalog.system.segment_size;
        let mut spans: BTreeMap<(TimelineId, u64), Vec<SegmentName>> = BTreeMap::new();
        for entry in &catalog.segments {
            let name = entry.info.name;
            let number = size.segment_number(name.start(size).unwrap_or_default());
            let span = number.checked_div(SPAN_SEGMENTS).unwrap_or(0);
            let names = spans.entry((name.timeline(), span)).or_default();
            if names.last() != Some(&name) {
                names.push(name);
            }
        }
        // Named by where it starts, whether or not its first segment is there.
        units.extend(spans.into_iter().rev().map(|((timeline, span), names)| {
            let start = span.saturating_mul(SPAN_SEGMENTS).saturating_mul(size.bytes());
            let place = SegmentName::containing(timeline, start.into(), size).to_string();
            Unit::Span(timeline, place, names)
        }));
        units
    }

    fn expected_bytes(&self, units: &[Unit<'_>]) -> u64 {
        let sum = |values: &mut dyn Iterator<Item = u64>| values.fold(0u64, u64::saturating_add);
        if self.what.quick {
            return 0;
        }
        let wal = |timeline: &TimelineId, names: &[SegmentName]| {
            let range = names.first().zip(names.last());
            let entries = self.what.catalog.segments.iter().filter(|s| {
                let name = s.info.name;
                name.timeline() == *timeline && range.is_some_and(|(a, b)| (*a..=*b).contains(&name))
            });
            sum(&mut entries.map(|s| s.stored_bytes))
        };
        let of = |unit: &Unit<'_>| match unit {
            Unit::Span(timeline, _, names) => wal(timeline, names),
            Unit::Backup(b) => {
                let id = b.head.id.as_str();
                let own = self.packs.iter().filter(|(name, _)| name.starts_with(id));
                sum(&mut own.map(|(_, bytes)| *bytes))
            }
            Unit::Index | Unit::Rest => 0,
        };
        sum(&mut units.iter().map(of))
    }

    async fn unit(&self, unit: &Unit<'a>) -> Result<(), StorageError> {
        match unit {
            Unit::Index => self.index().await,
            Unit::Rest => self.rest().await,
            Unit::Backup(backup) => self.backup(backup).await,
            Unit::Span(_, _, names) if self.what.quick => self.glance(names).await,
            Unit::Span(timeline, _, names) => self.span(*timeline, names).await,
        }
    }

    /// A whole object; none where it is gone, or at fault, which is then told.
    async fn get(&self, path: &str) -> Result<Option<Bytes>, StorageError> {
        match self.what.archive.get(path, OBJECT_BYTES_MAX).await {
            Ok(bytes) => {
                self.read(bytes.len() as u64);
                Ok(Some(bytes))
            }
            Err(e) if e.is_not_found() => Ok(None),
            Err(e) if e.is_bad_object() => {
                self.fault(path, FaultKind::Damaged, None, e.to_string());
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// Objects that are neither segments nor parts of a backup.
    async fn rest(&self) -> Result<(), StorageError> {
        let layout = self.what.layout;
        let mut json = vec![Layout::WALTIDE_JSON.to_owned(), layout.cluster_json(), self.names.system_json()];
        for path in &json {
            if self.what.archive.head(path).await?.is_none() {
                self.fault(path, FaultKind::Missing, None, "it is not there".to_owned());
            }
        }
        for dir in [self.names.drills(), self.names.ledger(), self.names.pruning()] {
            json.extend(self.what.archive.list(&dir).await?.into_iter().map(|o| o.path));
        }
        let backups = self.what.archive.list(&self.names.backups()).await?;
        let notes = |o: &&ObjectInfo| o.path.ends_with(".started") || o.path.ends_with(".keep");
        json.extend(backups.iter().filter(notes).map(|o| o.path.clone()));
        for path in json {
            if let Some(bytes) = self.get(&path).await?
                && let Err(e) = Envelope::open_json::<serde::de::IgnoredAny>(&bytes, ObjectKind::Json)
            {
                self.corrupt(&path, e);
            }
        }
        for object in self.what.archive.list(&self.names.wal()).await? {
            let Some(WalObject::File(name)) = self.names.parse_wal(&object.path) else { continue };
            if !matches!(name, WalFileName::History(_) | WalFileName::BackupHistory(_)) {
                continue;
            }
            let Some(bytes) = self.get(&object.path).await? else { continue };
            match WalFile::decode(&bytes) {
                Err(e) => self.corrupt(&object.path, e),
                Ok(file) if file.name != name => {
                    self.fault(&object.path, FaultKind::Damaged, None, format!("it holds {}", file.name));
                }
                Ok(file) => {
                    if let WalFileName::History(timeline) = name
                        && let Err(e) = History::parse(timeline, &file.contents)
                    {
                        self.fault(&object.path, FaultKind::Damaged, None, e.to_string());
                    }
                }
            }
        }
        self.unreferenced().await
    }

    /// Merged indexes, each against the segments that it was made from.
    async fn index(&self) -> Result<(), StorageError> {
        let (archive, catalog, quick) = (self.what.archive, self.what.catalog, self.what.quick);
        let check = IndexCheck { archive, names: &self.names, catalog, quick };
        let (check, listed) = (&check, &self.merged);
        let jobs = listed.iter().map(|(name, object)| async move {
            let checked = check.check(name, object).await?;
            Ok::<_, StorageError>((name, checked))
        });
        let jobs: Vec<_> = jobs.collect();
        let mut checked = stream::iter(jobs).buffer_unordered(self.what.threads.clamp(1, 64));
        while let Some((name, CheckedIndex { faults, bytes })) = checked.try_next().await? {
            self.read(bytes);
            // One that was made once more harms nobody.
            let made_again = listed.iter().any(|(other, _)| {
                other.is_same_range(name) && other.key == name.key && other.generation > name.generation
            });
            let path = self.names.merged_index(name);
            for fault in faults.into_iter().filter(|f| !made_again || f.object != path) {
                self.fault(&fault.object, FaultKind::Damaged, fault.byte, fault.text);
            }
        }
        Ok(())
    }

    /// Maps and packs that no backup refers to still must be what they were.
    async fn unreferenced(&self) -> Result<(), StorageError> {
        // A backup that refers to an older one's map names it; the map's packs are named like the map.
        let heads = self.what.catalog.backups.iter().map(|b| &b.head);
        let ids: BTreeSet<&str> =
            heads.flat_map(|h| h.maps.iter().map(String::as_str).chain([h.id.as_str()])).collect();
        let foreign = |name: &&String| name.get(..21).is_none_or(|id| !ids.contains(id));
        for name in self.maps.keys().filter(foreign) {
            let path = self.names.map(name);
            if let Some(bytes) = self.get(&path).await?
                && let Err(e) = ExtentMap::decode(&bytes)
            {
                self.corrupt(&path, e);
            }
        }
        for name in self.packs.keys().filter(foreign).filter(|_| !self.what.quick) {
            let path = self.names.pack(name);
            if let Some(bytes) = self.get(&path).await?
                && let Err(e) = PackBuilder::check(&bytes)
            {
                self.corrupt(&path, e);
            }
        }
        Ok(())
    }

    async fn backup(&self, backup: &BackupEntry) -> Result<(), StorageError> {
        let path = self.names.manifest(&backup.head.id);
        let Some(bytes) = self.get(&path).await? else { return Ok(()) };
        let decoded = tokio::task::spawn_blocking(move || Manifest::decode(&bytes)).await;
        let manifest = match decoded.expect("a decoder does not panic") {
            Ok(manifest) => manifest,
            Err(e) => {
                self.corrupt(&path, e);
                return Ok(());
            }
        };
        self.tally.backups.fetch_add(1, Ordering::Relaxed);
        let last = manifest.maps.len().saturating_sub(1);
        for (number, name) in manifest.maps.iter().enumerate() {
            let Some(map) = self.map(&path, name).await? else { continue };
            // What an older backup stored may go on behind where the file ends now.
            let alone = manifest.kind == BackupKind::Full && number == last;
            self.check_files(&path, &manifest, number, alone, &map);
            if self.is_new(&self.names.map(name)) {
                self.map_packs(&path, name, map).await?;
            }
        }
        Ok(())
    }

    /// An object that `by` refers to is not there; that is no fault where `by` was pruned meanwhile.
    async fn missing(&self, path: &str, by: &str) -> Result<(), StorageError> {
        if self.what.archive.head(by).await?.is_some() {
            self.fault(path, FaultKind::Missing, None, format!("it is not there, and {by} needs it"));
        }
        Ok(())
    }

    async fn map(&self, by: &str, name: &str) -> Result<Option<Arc<ExtentMap>>, StorageError> {
        let path = self.names.map(name);
        if !self.maps.contains_key(name) && self.what.archive.head(&path).await?.is_none() {
            self.missing(&path, by).await?;
            return Ok(None);
        }
        let Some(bytes) = self.get(&path).await? else { return Ok(None) };
        let decoded = tokio::task::spawn_blocking(move || ExtentMap::decode(&bytes)).await;
        match decoded.expect("a decoder does not panic") {
            Ok(map) => Ok(Some(Arc::new(map))),
            Err(e) => {
                self.corrupt(&path, e);
                Ok(None)
            }
        }
    }

    /// Every file's runs are there and, in a map of the backup's alone, inside the file.
    fn check_files(&self, path: &str, manifest: &Manifest, number: usize, alone: bool, map: &ExtentMap) {
        for file in &manifest.files {
            for (_, at) in file.extents.iter().filter(|(m, _)| *m as usize == number) {
                let Some(extents) = map.files.get(*at as usize) else {
                    let text =
                        format!("{} is file {at} of its map, which has {}", file.path, map.files.len());
                    self.fault(path, FaultKind::Damaged, None, text);
                    continue;
                };
                let end = |e: &Extent| e.file_offset().saturating_add(u64::from(e.raw_bytes));
                let end = extents.last().map_or(0, end);
                if alone && end > file.bytes {
                    let text = format!("{} has {} bytes, its map goes to {end}", file.path, file.bytes);
                    self.fault(path, FaultKind::Damaged, None, text);
                }
            }
        }
    }

    /// Reads every pack of a map once, and every frame of it.
    async fn map_packs(&self, by: &str, map_name: &str, map: Arc<ExtentMap>) -> Result<(), StorageError> {
        let mut frames: BTreeMap<u32, Vec<Extent>> =
            (0u32..).zip(&map.packs).map(|(n, _)| (n, Vec::new())).collect();
        for extent in map.files.iter().flatten().filter(|e| e.stored_bytes > 0) {
            frames.entry(extent.pack).or_default().push(*extent);
        }
        let jobs = frames.into_iter().filter_map(|(n, frames)| {
            let pack = map.packs.get(n as usize)?.clone();
            Some(self.pack(by, map_name, pack, frames))
        });
        stream::iter(jobs.collect::<Vec<_>>())
            .buffer_unordered(self.what.threads.clamp(1, 64))
            .try_collect::<()>()
            .await
    }

    async fn pack(&self, by: &str, map: &str, name: String, frames: Vec<Extent>) -> Result<(), StorageError> {
        let path = self.names.pack(&name);
        self.is_new(&path);
        let Some(size) = self.packs.get(&name).copied() else {
            return match self.what.archive.head(&path).await? {
                Some(_) => Ok(()),
                None => self.missing(&path, by).await,
            };
        };
        let room = size.saturating_sub(FOOTER_BYTES as u64);
        let outside = |e: &&Extent| e.offset.saturating_add(u64::from(e.stored_bytes)) > room;
        if let Some(e) = frames.iter().find(outside) {
            let text = format!(
                "map {map} has a frame of {} bytes at {}, beyond its {size} bytes",
                e.stored_bytes, e.offset
            );
            self.fault(&path, FaultKind::Damaged, Some(e.offset), text);
        }
        if self.what.quick {
            return self.footer(&path).await;
        }
        let Some(bytes) = self.get(&path).await? else {
            return match self.what.archive.head(&path).await? {
                Some(_) => Ok(()),
                None => self.missing(&path, by).await,
            };
        };
        let count = frames.len() as u64;
        let check = move || {
            let mut found: Vec<Corrupt> = PackBuilder::check(&bytes).err().into_iter().collect();
            for e in &frames {
                let from = usize::try_from(e.offset).unwrap_or(usize::MAX);
                let to = from.saturating_add(e.stored_bytes as usize);
                if let Some(stored) = bytes.get(from..to) {
                    found.extend(e.decode_frame(stored).err());
                }
            }
            found
        };
        let found = tokio::task::spawn_blocking(check).await.expect("a decoder does not panic");
        self.tally.frames.fetch_add(count, Ordering::Relaxed);
        found.into_iter().for_each(|e| self.corrupt(&path, e));
        Ok(())
    }

    /// A footer says how long the object must be.
    async fn footer(&self, path: &str) -> Result<(), StorageError> {
        match self.what.archive.get_tail(path, FOOTER_BYTES as u64).await {
            Ok((tail, size)) => {
                self.read(tail.len() as u64);
                if let Err(e) = Footer::decode(&tail, size) {
                    self.corrupt(path, e);
                }
                Ok(())
            }
            Err(e) if e.is_not_found() => Ok(()),
            Err(e) if e.is_bad_object() => {
                self.fault(path, FaultKind::Damaged, None, e.to_string());
                Ok(())
            }
            Err(e) => Err(e),
        }
    }

    /// Whether every copy of some segments still says at its end what the catalogue, which may have it from a cache, says.
    async fn glance(&self, names: &[SegmentName]) -> Result<(), StorageError> {
        let range = names.first().zip(names.last());
        let of_span = |s: &&SegmentEntry| range.is_some_and(|(a, b)| (*a..=*b).contains(&s.info.name));
        let jobs = self.what.catalog.segments.iter().filter(of_span).map(|entry| self.glance_at(entry));
        let at_once = self.what.threads.clamp(1, 64);
        stream::iter(jobs.collect::<Vec<_>>()).buffer_unordered(at_once).try_collect::<()>().await
    }

    async fn glance_at(&self, entry: &SegmentEntry) -> Result<(), StorageError> {
        let mut wanted = SUMMARY_BYTES;
        // The footer says how long the directory is, the directory how long the sections are.
        for _ in 0..3 {
            let (tail, size) = match self.what.archive.get_tail(&entry.path, wanted).await {
                Ok(found) => found,
                // Pruned meanwhile.
                Err(e) if e.is_not_found() => return Ok(()),
                Err(e) if e.is_bad_object() => {
                    self.fault(&entry.path, FaultKind::Damaged, None, e.to_string());
                    return Ok(());
                }
                Err(e) => return Err(e),
            };
            self.read(tail.len() as u64);
            let told = SegmentDirectory::decode(&tail, size).and_then(|directory| match directory {
                Ok(directory) => Ok(directory.summary(&tail, size)?.map(|index| (directory, index))),
                Err(needed) => Ok(Err(needed)),
            });
            match told {
                Err(e) => self.corrupt(&entry.path, e),
                Ok(Err(needed)) if needed > wanted => {
                    wanted = needed.min(OBJECT_BYTES_MAX);
                    continue;
                }
                Ok(Err(_)) => {}
                Ok(Ok((directory, index))) => {
                    let digest: String = directory.digest.iter().map(|b| format!("{b:02x}")).collect();
                    if (digest.as_str(), &index.info) != (entry.digest.as_str(), &entry.info) {
                        let text = "it says something else of itself than it said before".to_owned();
                        self.fault(&entry.path, FaultKind::Damaged, None, text);
                    }
                }
            }
            break;
        }
        self.tally.segments.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Segments that follow one another, each joined with the one before, and every other copy of them.
    async fn span(&self, timeline: TimelineId, names: &[SegmentName]) -> Result<(), StorageError> {
        let catalog = self.what.catalog;
        let best: Vec<&SegmentEntry> = names.iter().filter_map(|n| catalog.best_copy(*n)).collect();
        // Held at a time per worker: object, WAL, and the same of the next.
        let each = catalog.system.segment_size.bytes().saturating_mul(4);
        let room = SEGMENT_MEMORY_BYTES.checked_div(each).unwrap_or(1);
        let workers = self.what.threads.clamp(1, usize::try_from(room).unwrap_or(1).max(1));
        let share = best.len().div_ceil(workers).max(1);
        let jobs = best.chunks(share).map(|part| self.chain(timeline, part));
        stream::iter(jobs.collect::<Vec<_>>()).buffer_unordered(workers).try_collect::<()>().await?;
        let range = names.first().zip(names.last());
        let of_span = |s: &&SegmentEntry| range.is_some_and(|(a, b)| (*a..=*b).contains(&s.info.name));
        let others =
            catalog.segments.iter().filter(of_span).filter(|s| best.iter().all(|b| b.path != s.path));
        for other in others {
            if let Some(stored) = self.segment(other).await? {
                self.check(other, Arc::clone(&stored), None, None).await;
                self.compare(other, stored).await?;
            }
        }
        Ok(())
    }

    /// Whether a copy holds the same records as the one that readers take, as far as both go.
    async fn compare(&self, copy: &SegmentEntry, stored: Arc<StoredSegment>) -> Result<(), StorageError> {
        let (name, size) = (copy.info.name, copy.info.size);
        let Some(best) = self.what.catalog.best_copy(name) else { return Ok(()) };
        let Some(other) = self.peek(best).await? else { return Ok(()) };
        let compared =
            tokio::task::spawn_blocking(move || agreement(&stored.wal, &other.wal, name, size)).await;
        if let Agreement::Diverge { at } = compared.expect("a scan does not panic") {
            let by = |entry: &SegmentEntry| {
                entry.pushed_by.as_ref().map_or("a server that was not noted".to_owned(), ToString::to_string)
            };
            let text = format!(
                "it differs from {} at {at}: this copy is of {}, the other of {}",
                best.path,
                by(copy),
                by(best)
            );
            self.fault(&copy.path, FaultKind::Diverged, None, text);
        }
        Ok(())
    }

    async fn chain(&self, timeline: TimelineId, entries: &[&SegmentEntry]) -> Result<(), StorageError> {
        let system = &self.what.catalog.system;
        let mut before: Option<(SegmentName, PreviousTail)> = None;
        if let Some(entry) = entries.first().and_then(|first| self.before(timeline, first.info.name))
            && let Some(stored) = self.peek(entry).await?
        {
            let (system, name) = (system.clone(), entry.info.name);
            let tail = tokio::task::spawn_blocking(move || tail_of(&system, name, &stored.wal)).await;
            before = tail.expect("a scan does not panic").map(|tail| (name, tail));
        }
        let mut ahead: Option<(String, Arc<StoredSegment>)> = None;
        for entry in entries {
            let stored = match ahead.take().filter(|(path, _)| *path == entry.path) {
                Some((_, stored)) => {
                    self.read(entry.stored_bytes);
                    Some(stored)
                }
                None => self.segment(entry).await?,
            };
            let Some(stored) = stored else {
                before = None;
                continue;
            };
            let mut next = None;
            if stored.index.info.pending.is_some_and(|p| p.joined)
                && let Some(entry) =
                    entry.info.name.next(system.segment_size).and_then(|n| self.what.catalog.best_copy(n))
                && let Some(found) = self.peek(entry).await?
            {
                next = Some(Arc::clone(&found));
                ahead = Some((entry.path.clone(), found));
            }
            let name = entry.info.name;
            before = self.check(entry, stored, before, next).await.map(|tail| (name, tail));
        }
        Ok(())
    }

    /// The segment whose records this one's continue.
    fn before(&self, timeline: TimelineId, name: SegmentName) -> Option<&'a SegmentEntry> {
        let catalog = self.what.catalog;
        let size = catalog.system.segment_size;
        let same = name.previous(size)?;
        let line = catalog.lineages.get(&timeline).cloned().unwrap_or(Lineage::root(timeline));
        let ancestor = same.on(line.timeline_at(name.start(size)?.saturating_sub(1)));
        catalog.best_copy(same).or_else(|| catalog.best_copy(ancestor))
    }

    /// A segment's WAL and index, every checksum of it checked.
    async fn segment(&self, entry: &SegmentEntry) -> Result<Option<Arc<StoredSegment>>, StorageError> {
        let Some(bytes) = self.get(&entry.path).await? else { return Ok(None) };
        let decoded = tokio::task::spawn_blocking(move || StoredSegment::decode(&bytes)).await;
        match decoded.expect("a decoder does not panic") {
            Ok(stored) => Ok(Some(Arc::new(stored))),
            Err(e) => {
                self.corrupt(&entry.path, e);
                Ok(None)
            }
        }
    }

    /// The same of a neighbour, whose own faults are told when its turn comes.
    async fn peek(&self, entry: &SegmentEntry) -> Result<Option<Arc<StoredSegment>>, StorageError> {
        let bytes = match self.what.archive.get(&entry.path, OBJECT_BYTES_MAX).await {
            Ok(bytes) => bytes,
            Err(e) if e.is_not_found() || e.is_bad_object() => return Ok(None),
            Err(e) => return Err(e),
        };
        let decoded = tokio::task::spawn_blocking(move || StoredSegment::decode(&bytes)).await;
        Ok(decoded.expect("a decoder does not panic").ok().map(Arc::new))
    }

    /// Reads a segment's records; gives what the next one has to go on from.
    async fn check(
        &self,
        entry: &SegmentEntry,
        stored: Arc<StoredSegment>,
        previous: Option<(SegmentName, PreviousTail)>,
        next: Option<Arc<StoredSegment>>,
    ) -> Option<PreviousTail> {
        let (system, name) = (self.what.catalog.system.clone(), entry.info.name);
        let history = self.histories.get(&name.timeline()).cloned();
        let work = move || {
            let next = next.as_ref().map(|n| n.wal.as_slice());
            check_segment(&system, name, &stored, &Around { previous, next, history: history.as_ref() })
        };
        let Checked { faults, tail, records } =
            tokio::task::spawn_blocking(work).await.expect("a scan does not panic");
        self.tally.segments.fetch_add(1, Ordering::Relaxed);
        self.tally.records.fetch_add(records, Ordering::Relaxed);
        for fault in faults {
            let kind = if fault.is_gap { FaultKind::Gap } else { FaultKind::Damaged };
            self.fault(&entry.path, kind, fault.byte, fault.text);
        }
        tail
    }

    /// What is odd, and does no harm.
    fn notes(&self) -> Vec<String> {
        let known: BTreeSet<&str> = self.what.catalog.backups.iter().map(|b| b.head.id.as_str()).collect();
        let foreign = |name: &&String| name.get(..21).is_none_or(|id| !known.contains(id));
        let (packs, maps) = (self.packs.keys().filter(foreign), self.maps.keys().filter(foreign));
        let paths = packs.map(|name| self.names.pack(name)).chain(maps.map(|name| self.names.map(name)));
        // What a backup that stays refers to was looked at for it, whoever stored it.
        let count = paths.filter(|path| self.is_new(path)).count();
        let left =
            "packs and extent maps belong to no complete backup: one is being made, or prune removes them";
        if count == 0 { Vec::new() } else { vec![format!("{count} {left}")] }
    }
}
