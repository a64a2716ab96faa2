//! What drills leave behind: their records in the archive, and how they went in all.

use std::time::Instant;

use serde::Serialize;
use waltide_format::TimestampTz;
use waltide_format::archive::{
    DrillCheck, DrillOutcome, DrillPhase, DrillRecord, DrillVerdict, SystemLayout,
};
use waltide_storage::{Archive, Bytes, StorageError};

/// No record is larger.
const RECORD_BYTES_MAX: u64 = 4 << 20;

/// What drills of one call found, and those before them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DrillReport {
    /// The archive's address.
    pub archive: String,
    /// The cluster's name in it.
    pub cluster: String,
    /// The gravest verdict.
    pub verdict: DrillVerdict,
    /// The drills, in order.
    pub drills: Vec<DrillRecord>,
    /// Earlier drills of the cluster, oldest first.
    #[serde(skip)]
    pub history: Vec<DrillRecord>,
}

impl DrillReport {
    /// A report of these drills.
    pub fn new(archive: &str, cluster: &str, drills: Vec<DrillRecord>, history: Vec<DrillRecord>) -> Self {
        let verdict = drills.iter().fold(DrillVerdict::Passed, |all, d| all.or(d.verdict));
        Self { archive: archive.to_owned(), cluster: cluster.to_owned(), verdict, drills, history }
    }
}

/// The last `count` drills of a system, oldest first. A record that cannot be read is left out, with a warning: drills
/// prove restores, none is restored from.
pub async fn past_drills(
    archive: &Archive,
    layout: &SystemLayout,
    count: usize,
) -> Result<Vec<DrillRecord>, StorageError> {
    let listed = archive.list(&layout.drills()).await?;
    // Their names start with their time.
    let from = listed.len().saturating_sub(count);
    let mut found = Vec::new();
    for object in listed.get(from..).unwrap_or_default() {
        let bytes = match archive.get(&object.path, RECORD_BYTES_MAX).await {
            Ok(bytes) => bytes,
            Err(e) => {
                tracing::warn!("{e}");
                continue;
            }
        };
        match DrillRecord::decode(&bytes) {
            Ok(record) => found.push(record),
            Err(e) => tracing::warn!("{} is damaged: {e}", object.path),
        }
    }
    Ok(found)
}

/// Puts a drill into the archive, under its own name for ever.
pub async fn record_drill(
    archive: &Archive,
    layout: &SystemLayout,
    record: &DrillRecord,
) -> Result<(), StorageError> {
    archive.put_new(&layout.drill(&record.id), Bytes::from(record.encode())).await.map(drop)
}

/// Measures phases one after the other.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    started: Instant,
    phases: Vec<DrillPhase>,
    open: Option<(&'static str, Instant)>,
}

impl Stopwatch {
    /// Starts now, or counts from `began` on.
    pub(crate) fn since(began: Option<Instant>) -> Self {
        Self { started: began.unwrap_or_else(Instant::now), phases: Vec::new(), open: None }
    }

    /// Ends the phase that is under way and begins another. What went before the first is part of it.
    pub(crate) fn phase(&mut self, name: &'static str) {
        self.end();
        let began = if self.phases.is_empty() { self.started } else { Instant::now() };
        self.open = Some((name, began));
    }

    pub(crate) fn end(&mut self) {
        if let Some((name, began)) = self.open.take() {
            let seconds = began.elapsed().as_secs_f64();
            self.phases.push(DrillPhase { name: name.to_owned(), seconds });
        }
    }

    pub(crate) fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    pub(crate) fn into_phases(mut self) -> Vec<DrillPhase> {
        self.end();
        self.phases
    }
}

/// The checks of one drill, and whose fault it is if one does not hold.
#[derive(Debug)]
pub(crate) struct Checks {
    pub(crate) done: Vec<DrillCheck>,
    pub(crate) verdict: DrillVerdict,
    began: Instant,
}

impl Checks {
    pub(crate) fn new() -> Self {
        Self { done: Vec::new(), verdict: DrillVerdict::Passed, began: Instant::now() }
    }

    /// The time that counts for the next check starts now.
    pub(crate) fn begin(&mut self) {
        self.began = Instant::now();
    }

    /// A check whose failure means `fault`.
    pub(crate) fn hold(
        &mut self,
        name: impl Into<String>,
        holds: bool,
        detail: impl Into<String>,
        fault: DrillVerdict,
    ) {
        let outcome = if holds { DrillOutcome::Passed } else { DrillOutcome::Failed };
        if !holds {
            self.verdict = self.verdict.or(fault);
        }
        self.put(name.into(), outcome, detail.into());
    }

    /// A check that could not be made.
    pub(crate) fn skip(&mut self, name: impl Into<String>, why: impl Into<String>) {
        self.put(name.into(), DrillOutcome::Skipped, why.into());
    }

    fn put(&mut self, name: String, outcome: DrillOutcome, detail: String) {
        let seconds = self.began.elapsed().as_secs_f64();
        self.done.push(DrillCheck { name, outcome, detail, seconds });
        self.begin();
    }
}

/// The moment it is, by this machine's clock.
pub(crate) fn now() -> TimestampTz {
    TimestampTz::from_jiff(jiff::Timestamp::now())
}

/// Numbers that look random and come again from the same seed: SplitMix64.
#[derive(Debug, Clone)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n`; zero where `n` is.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next().checked_rem(n).unwrap_or(0)
    }
}

/// A number nobody chose.
pub fn random_seed() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(std::process::id()) >> 11
}

#[cfg(test)]
mod tests {
    use super::*;
    use waltide_format::archive::Layout;
    use waltide_storage::ArchiveUrl;

    #[test]
    fn the_gravest_failure_is_the_verdict() {
        let mut checks = Checks::new();
        checks.skip("a", "not installed");
        checks.hold("b", true, "", DrillVerdict::ArchiveAtFault);
        assert_eq!(checks.verdict, DrillVerdict::Passed);
        checks.hold("c", false, "", DrillVerdict::ArchiveAtFault);
        checks.hold("d", false, "", DrillVerdict::Failed);
        assert_eq!(checks.verdict, DrillVerdict::ArchiveAtFault);
        assert_eq!(checks.done.len(), 4);
    }

    #[test]
    fn the_same_seed_gives_the_same_numbers() {
        let draw = |seed| {
            let mut dice = Dice::new(seed);
            (0..20).map(|_| dice.below(10)).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
        assert!(draw(7).iter().all(|n| *n < 10));
        assert_eq!(Dice::new(1).below(0), 0);
    }

    #[tokio::test]
    async fn a_record_is_found_again_and_a_damaged_one_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let url: ArchiveUrl = dir.path().to_str().unwrap().parse().unwrap();
        let archive = Archive::create(&url).await.unwrap();
        let layout = Layout::new("main").unwrap().system(7.into());
        let records: Vec<_> = (0..5).map(|n| crate::report::sample(n, DrillVerdict::Passed)).collect();
        for record in &records {
            record_drill(&archive, &layout, record).await.unwrap();
        }
        let path = layout.drill("20260101T000000Z-0000");
        archive.put_new(&path, Bytes::from_static(b"no record")).await.unwrap();
        assert_eq!(past_drills(&archive, &layout, 100).await.unwrap(), records);
        assert_eq!(past_drills(&archive, &layout, 2).await.unwrap(), records[3..]);
    }
}
