//! How long a restore takes, judged by what past drills took.
//!
//! Each of its two phases is a line: something that is always there, and so much for every byte. Without drills the
//! line is one that was measured elsewhere. A few drills of like sizes say by how much this machine differs from that;
//! drills of several sizes say the line itself.

use serde::Serialize;

use super::manifest::DrillRecord;

/// What a restore has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct RestoreWork {
    /// Bytes of the base backup's files.
    pub base_bytes: u64,
    /// How many files they are.
    pub files: u64,
    /// Bytes of WAL to replay.
    pub wal_bytes: u64,
    /// The segments they lie in.
    pub segments: u64,
    /// Records in those segments.
    pub records: u64,
}

/// What of it native replay does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NativeWork {
    /// Bytes of WAL.
    pub wal_bytes: u64,
    /// The segments they lie in.
    pub segments: u64,
    /// Records in those segments.
    pub records: u64,
    /// Bytes of full-page images in them.
    pub image_bytes: u64,
}

/// How long a restore will take.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Estimate {
    /// Putting the files back, native replay included.
    pub restore_seconds: f64,
    /// Native replay of it.
    #[serde(skip)]
    pub native_seconds: f64,
    /// PostgreSQL's recovery, from its start until it takes connections.
    pub recovery_seconds: f64,
    /// Both.
    pub total_seconds: f64,
    /// Whether drills of this cluster were the measure.
    pub measured: bool,
}

/// How fast things go.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rates {
    restore: Pace,
    recovery: Pace,
    /// Native replay; its items are records.
    native: Pace,
    /// Whether drills of this cluster were the measure.
    pub measured: bool,
}

/// How fast one phase goes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Pace {
    /// Measured elsewhere: on a machine with two cores and a solid state disk.
    fixed_seconds: f64,
    byte_seconds: f64,
    item_seconds: f64,
    /// How much slower this machine is.
    factor: f64,
    /// What drills of several sizes say instead.
    fit: Option<Fit>,
}

/// A line through what was measured, and where that was.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Fit {
    fixed_seconds: f64,
    byte_seconds: f64,
    bytes_min: f64,
    bytes_max: f64,
}

/// A phase of a drill.
#[derive(Debug, Clone, Copy)]
struct Measured {
    bytes: f64,
    items: f64,
    seconds: f64,
}

/// A line needs so many drills, and their sizes must differ by so much.
const FIT_DRILLS_MIN: usize = 3;
const FIT_SPREAD_MIN: f64 = 2.0;
/// So far from what was measured a line is still believed.
const FIT_REACH: f64 = 2.0;
/// What a drill did that noted neither: the files of a small cluster, segments of the usual size.
const FILES_USUAL: u64 = 1000;
const SEGMENT_BYTES_USUAL: u64 = 16 << 20;

impl Default for Rates {
    fn default() -> Self {
        let pace = |fixed_seconds, byte_seconds, item_seconds| Pace {
            fixed_seconds,
            byte_seconds,
            item_seconds,
            factor: 1.0,
            fit: None,
        };
        Self {
            restore: pace(0.05, 1.0 / 250e6, 0.001),
            recovery: pace(0.6, 1.0 / 60e6, 0.03),
            native: pace(0.05, 1.0 / 2.2e9, 0.17e-6),
            measured: false,
        }
    }
}

/// Reading the log takes this share of native replay, changing pages the rest: 0.7 and 0.57 where docs/performance.md says
/// where the time goes.
const READING_SHARE: f64 = 0.6;

impl Estimate {
    /// The phases of a restore as it tells them while it runs, each with its seconds; PostgreSQL's recovery where that is
    /// watched.
    pub fn phases(&self, recovers: bool) -> Vec<(&'static str, f64)> {
        let native = self.native_seconds;
        let phases = [
            ("read the log", native * READING_SHARE),
            ("restore", self.restore_seconds - native),
            ("replay", native * (1.0 - READING_SHARE)),
            ("recover", if recovers { self.recovery_seconds } else { 0.0 }),
        ];
        phases.into_iter().filter(|(_, seconds)| *seconds > 0.0).collect()
    }
}

impl Rates {
    /// Those of a cluster's drills, as far as they restored and recovered.
    #[allow(clippy::cast_precision_loss)]
    pub fn from_drills(drills: &[DrillRecord]) -> Self {
        let phase = |name: &str, what: fn(&DrillRecord) -> (u64, u64)| -> Vec<Measured> {
            // Where a part was replayed natively, neither phase is what it is without that.
            let measured = drills.iter().filter(|d| d.native_bytes == 0).filter_map(|d| {
                let seconds = d.phases.iter().find(|p| p.name == name)?.seconds;
                let (bytes, items) = what(d);
                (seconds > 0.0 && d.restored_bytes > 0).then_some(Measured {
                    bytes: bytes as f64,
                    items: items as f64,
                    seconds,
                })
            });
            measured.collect()
        };
        let restore = phase("restore", |d| {
            (d.restored_bytes, if d.restored_files > 0 { d.restored_files } else { FILES_USUAL })
        });
        let recovery = phase("recovery", |d| {
            let usual = d.wal_bytes.checked_div(SEGMENT_BYTES_USUAL).unwrap_or(0).saturating_add(1);
            (d.wal_bytes, if d.segments > 0 { d.segments } else { usual })
        });
        let default = Self::default();
        Self {
            restore: default.restore.measured(&restore),
            recovery: default.recovery.measured(&recovery),
            // No drill of its own tells: a machine that restores slowly is taken to replay slowly.
            native: Pace { factor: default.restore.measured(&restore).factor, ..default.native },
            measured: !restore.is_empty() || !recovery.is_empty(),
        }
    }

    /// How long this will take where a part of its WAL is replayed natively.
    #[allow(clippy::cast_precision_loss)]
    pub fn estimate_native(&self, work: &RestoreWork, native: &NativeWork) -> Estimate {
        // Of the base only that is restored which no image replaces: as much as if pages were imaged at random.
        let base_bytes = work.base_bytes as f64;
        let left = base_bytes * (-(native.image_bytes as f64) / base_bytes.max(1.0)).exp();
        let native_seconds = self.native.seconds(native.wal_bytes as f64, native.records as f64);
        let restore_seconds = self.restore.seconds(left, work.files as f64) + native_seconds;
        let recovery_seconds = self.recovery.seconds(
            work.wal_bytes.saturating_sub(native.wal_bytes) as f64,
            work.segments.saturating_sub(native.segments) as f64,
        );
        Estimate {
            restore_seconds,
            native_seconds,
            recovery_seconds,
            total_seconds: restore_seconds + recovery_seconds,
            measured: self.measured,
        }
    }

    /// How long this will take.
    #[allow(clippy::cast_precision_loss)]
    pub fn estimate(&self, work: &RestoreWork) -> Estimate {
        let restore_seconds = self.restore.seconds(work.base_bytes as f64, work.files as f64);
        let recovery_seconds = self.recovery.seconds(work.wal_bytes as f64, work.segments as f64);
        Estimate {
            restore_seconds,
            native_seconds: 0.0,
            recovery_seconds,
            total_seconds: restore_seconds + recovery_seconds,
            measured: self.measured,
        }
    }
}

impl Pace {
    /// What the machine elsewhere would take.
    fn elsewhere(&self, bytes: f64, items: f64) -> f64 {
        self.fixed_seconds + bytes * self.byte_seconds + items * self.item_seconds
    }

    fn seconds(&self, bytes: f64, items: f64) -> f64 {
        let Some(fit) = self.fit else { return self.factor * self.elsewhere(bytes, items) };
        // Far from what was measured, a line through noise leads astray: from there on it goes as elsewhere.
        let near = bytes.clamp(fit.bytes_min / FIT_REACH, fit.bytes_max * FIT_REACH);
        let line = fit.fixed_seconds + near * fit.byte_seconds;
        line * self.elsewhere(bytes, items) / self.elsewhere(near, items)
    }

    /// The same on the machine where this was measured.
    fn measured(self, drills: &[Measured]) -> Self {
        let mut factors: Vec<f64> =
            drills.iter().map(|d| d.seconds / self.elsewhere(d.bytes, d.items)).collect();
        factors.sort_by(f64::total_cmp);
        let factor = factors.get(factors.len() / 2).copied().unwrap_or(self.factor);
        Self { factor, fit: Fit::through(drills), ..self }
    }
}

impl Fit {
    /// The line whose errors, as shares of what was measured, are least by their squares. So a drill that was slow for
    /// a reason of its own counts little.
    #[allow(clippy::cast_precision_loss)]
    fn through(drills: &[Measured]) -> Option<Self> {
        let bytes_min = drills.iter().map(|d| d.bytes).min_by(f64::total_cmp)?;
        let bytes_max = drills.iter().map(|d| d.bytes).max_by(f64::total_cmp)?;
        if drills.len() < FIT_DRILLS_MIN || bytes_max < bytes_min * FIT_SPREAD_MIN || bytes_min <= 0.0 {
            return None;
        }
        // Of 1 = a/y + b·x/y, with u = 1/y and v = x/y.
        let sum = |of: fn(f64, f64) -> f64| -> f64 {
            drills.iter().map(|d| of(1.0 / d.seconds, d.bytes / d.seconds)).sum()
        };
        let (uu, uv, vv) = (sum(|u, _| u * u), sum(|u, v| u * v), sum(|_, v| v * v));
        let (u, v) = (sum(|u, _| u), sum(|_, v| v));
        let determinant = uu * vv - uv * uv;
        let (fixed, byte) = ((u * vv - v * uv) / determinant, (uu * v - uv * u) / determinant);
        // Neither can be less than nothing: the other then explains all.
        let (fixed_seconds, byte_seconds) = match (fixed.is_finite() && fixed >= 0.0, byte >= 0.0) {
            (true, true) => (fixed, byte),
            (true, false) => (u / uu, 0.0),
            (false, _) => (0.0, v / vv),
        };
        let is_line = fixed_seconds.is_finite() && byte_seconds.is_finite();
        is_line.then_some(Self { fixed_seconds, byte_seconds, bytes_min, bytes_max })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn near(estimate: f64, took: f64, share: f64) -> bool {
        estimate <= took * share && took <= estimate * share
    }

    fn drill(base_mib: u64, restore: f64, wal_mib: u64, recovery: f64) -> (Measured, Measured) {
        let phase = |mib: u64, seconds| Measured { bytes: (mib * MIB) as f64, items: 1.0, seconds };
        (phase(base_mib, restore), phase(wal_mib, recovery))
    }

    #[test]
    fn one_drill_says_how_much_slower_this_machine_is() {
        let pace = Rates::default().recovery;
        let elsewhere = pace.seconds(64e6, 4.0);
        let here = pace.measured(&[Measured { bytes: 64e6, items: 4.0, seconds: elsewhere * 3.0 }]);
        assert!(near(here.seconds(64e6, 4.0), elsewhere * 3.0, 1.001));
        assert!(near(here.seconds(640e6, 40.0), pace.seconds(640e6, 40.0) * 3.0, 1.001));
    }

    /// What `scripts/bench replay` took on the machine where the paces were measured: rich in page images over 12 checkpoints,
    /// and poor in them over one, of two lengths.
    #[test]
    fn native_replay_is_estimated_within_a_factor_of_two() {
        let took = [
            (919 * MIB, 5023 * MIB, 314, 4_701_079, 4300 * MIB, 3.6),
            (100 * MIB, 1647 * MIB, 103, 21_421_269, 45 * MIB, 4.4),
        ];
        for (base_bytes, wal_bytes, segments, records, image_bytes, seconds) in took {
            let work = RestoreWork { base_bytes, files: 1000, wal_bytes, segments, records };
            let native = NativeWork { wal_bytes, segments, records, image_bytes };
            let estimate = Rates::default().estimate_native(&work, &native);
            assert!(near(estimate.total_seconds, seconds, 2.0), "{estimate:?} for {seconds}");
        }
    }

    #[test]
    fn a_drill_that_was_slow_for_a_reason_of_its_own_counts_little() {
        let drills: Vec<_> = [(32, 1.0), (64, 1.5), (128, 2.5), (256, 4.5), (128, 25.0)]
            .map(|(m, s)| drill(m, s, m, s).0)
            .into();
        let here = Rates::default().restore.measured(&drills);
        assert!(near(here.seconds((128 * MIB) as f64, 1.0), 2.5, 2.0));
    }

    proptest! {
        #[test]
        fn drills_that_lie_on_a_line_within_noise_give_estimates_within_a_factor_of_two(
            fixed in 0.1f64..5.0,
            mib_seconds in 0.001f64..0.5,
            sizes in proptest::collection::vec((8u64..512, 0.75f64..1.33), 5..12),
            asked in 8u64..512,
        ) {
            let took = |mib: u64| fixed + mib as f64 * mib_seconds;
            let drills: Vec<_> = sizes.iter().map(|(m, noise)| drill(*m, took(*m) * noise, *m, 1.0).0).collect();
            prop_assume!(Fit::through(&drills).is_some());
            let here = Rates::default().restore.measured(&drills);
            let (least, most) = (sizes.iter().map(|s| s.0).min().unwrap(), sizes.iter().map(|s| s.0).max().unwrap());
            prop_assume!((least..=most).contains(&asked));
            let estimate = here.seconds((asked * MIB) as f64, 1.0);
            prop_assert!(near(estimate, took(asked), 2.0), "{estimate} for {}", took(asked));
        }

        #[test]
        fn any_drills_give_an_estimate_that_is_a_span(
            drills in proptest::collection::vec((0u64..1 << 50, 1e-6f64..1e6), 0..6),
            base_bytes in 0u64..1 << 50,
        ) {
            let drills: Vec<_> =
                drills.into_iter().map(|(b, seconds)| Measured { bytes: b as f64, items: 1.0, seconds }).collect();
            let here = Rates::default().restore.measured(&drills);
            let estimate = here.seconds(base_bytes as f64, 10.0);
            prop_assert!(estimate.is_finite() && estimate >= 0.0, "{estimate}");
        }
    }
}
