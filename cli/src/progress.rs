//! A bar on stderr, shown only where a person can see it and only for work that takes a while.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{HumanCount, ProgressBar, ProgressDrawTarget, ProgressStyle};
use waltide_storage::{Counted, Progress};

use crate::output;

/// Work shorter than this shows no bar.
const QUIET: Duration = Duration::from_millis(250);

/// A bar for the phase that is running.
pub(crate) struct Bars {
    shown: Mutex<Shown>,
    started: Instant,
}

/// What is shown.
struct Shown {
    bar: ProgressBar,
    /// What was counted in the phase.
    counted: Option<(Counted, u64)>,
    /// How much is left of all, where that was expected.
    left: Option<(Left, Instant)>,
}

impl Bars {
    pub(crate) fn new() -> Self {
        let shown = Shown { bar: ProgressBar::hidden(), counted: None, left: None };
        Self { shown: Mutex::new(shown), started: Instant::now() }
    }

    fn with(&self, f: impl FnOnce(&mut Shown)) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if shown.bar.is_hidden() && self.started.elapsed() > QUIET {
            shown.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        f(&mut shown);
    }
}

impl Shown {
    /// What stands behind the bytes.
    fn tell(&self) {
        let counted = self.counted.map(|(what, count)| match what {
            Counted::Records => format!("{} records", HumanCount(count)),
            Counted::Pages => format!("{} pages", HumanCount(count)),
        });
        let left = self.left.as_ref().map(|(left, since)| {
            let part = match self.bar.length() {
                #[allow(clippy::cast_precision_loss)]
                Some(length) if length > 0 => self.bar.position() as f64 / length as f64,
                _ => 0.0,
            };
            let seconds = left.seconds(part, since.elapsed().as_secs_f64());
            match seconds {
                ..60.0 => format!("about {seconds:.0} s left of all"),
                _ => format!("about {} left of all", output::duration(seconds)),
            }
        });
        self.bar.set_prefix([counted, left].into_iter().flatten().collect::<Vec<_>>().join(", "));
    }
}

impl Progress for Bars {
    fn expect(&self, phases: &[(&'static str, f64)]) {
        self.with(|shown| shown.left = Some((Left::new(phases), Instant::now())));
    }

    fn phase(&self, name: &str, total_bytes: Option<u64>) {
        let bar = ProgressBar::hidden();
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let style = match (total_bytes, &shown.left) {
            (Some(_), Some(_)) => "{msg:12} {bar:32} {bytes}/{total_bytes} {bytes_per_sec} {prefix}",
            (Some(_), None) => "{msg:12} {bar:32} {bytes}/{total_bytes} {bytes_per_sec} {eta} left {prefix}",
            (None, _) => "{msg:12} {spinner} {bytes} {elapsed} {prefix}",
        };
        if let Some(total) = total_bytes {
            bar.set_length(total);
        }
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        bar.set_message(name.to_owned());
        shown.bar.finish_and_clear();
        (shown.bar, shown.counted) = (bar, None);
        if let Some((left, _)) = &mut shown.left {
            left.begin(name);
        }
        shown.tell();
    }

    fn advance(&self, bytes: u64) {
        self.with(|shown| {
            // A segment that recovery asks for twice is no more than all.
            let left = shown.bar.length().map(|length| length.saturating_sub(shown.bar.position()));
            shown.bar.inc(left.map_or(bytes, |left| bytes.min(left)));
            shown.tell();
        });
    }

    fn count(&self, what: Counted, more: u64) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let before = shown.counted.filter(|(counted, _)| *counted == what).map_or(0, |(_, count)| count);
        shown.counted = Some((what, before.saturating_add(more)));
    }

    fn message(&self, text: &str) {
        self.with(|shown| shown.bar.println(text));
    }

    fn warn(&self, text: &str) {
        // A line that goes past the bar would tear it apart.
        self.with(|shown| match shown.bar.is_hidden() {
            true => tracing::warn!("{text}"),
            false => shown.bar.println(text),
        });
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        self.with(|shown| shown.bar.finish_and_clear());
    }
}

/// How much is left of work whose phases were expected to take so long: what was expected of the rest, as many times longer
/// or shorter as what is over took. While little is over, that says little.
#[derive(Debug)]
struct Left {
    phases: Vec<(&'static str, f64)>,
    /// So many are over.
    over: usize,
    /// Whether the one behind them runs.
    runs: bool,
}

impl Left {
    /// Once this share of all is over, half of what that took longer is believed of the rest.
    const HALF_BELIEVED: f64 = 0.02;

    fn new(phases: &[(&'static str, f64)]) -> Self {
        Self { phases: phases.to_vec(), over: 0, runs: false }
    }

    /// A phase begins. What fails may begin again with an earlier one.
    fn begin(&mut self, name: &str) {
        let found = self.phases.iter().position(|(phase, _)| *phase == name);
        self.over = found.unwrap_or_else(|| self.over.saturating_add(usize::from(self.runs)));
        self.runs = found.is_some();
    }

    /// So many seconds are left where a part of the phase that runs is over, and all took so long until now.
    fn seconds(&self, part: f64, took: f64) -> f64 {
        let expected = |phases: &[(&str, f64)]| phases.iter().map(|(_, seconds)| seconds).sum::<f64>();
        let all = expected(&self.phases);
        let (over, rest) = self.phases.split_at_checked(self.over).unwrap_or((&self.phases, &[]));
        let running = rest.first().filter(|_| self.runs).map_or(0.0, |(_, seconds)| *seconds);
        let done = expected(over) + running * part.clamp(0.0, 1.0);
        if done <= 0.0 || took <= 0.0 {
            return all;
        }
        let share = done / all;
        let pace = (took / done).powf(share / (share + Self::HALF_BELIEVED));
        pace * (all - done).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PHASES: [&str; 3] = ["read the log", "restore", "replay"];

    proptest! {
        /// However much slower or faster a machine is than was expected, and each phase besides.
        #[test]
        fn after_a_quarter_of_the_time_what_is_left_is_known_within_a_factor_of_two(
            phases in proptest::collection::vec((0.5f64..60.0, 0.8f64..1.25), 3..4),
            machine in 0.25f64..8.0,
            at in 0.25f64..0.95,
        ) {
            let expected: Vec<_> = PHASES.into_iter().zip(&phases).map(|(name, (seconds, _))| (name, *seconds)).collect();
            let took: Vec<f64> = phases.iter().map(|(seconds, more)| seconds * more * machine).collect();
            let all: f64 = took.iter().sum();
            let mut left = Left::new(&expected);
            let mut before = 0.0;
            let mut part = 0.0;
            for (name, took) in PHASES.into_iter().zip(&took) {
                if before + took > all * at {
                    left.begin(name);
                    part = (all * at - before) / took;
                    break;
                }
                left.begin(name);
                before += took;
            }
            let (told, really) = (left.seconds(part, all * at), all * (1.0 - at));
            prop_assert!(told <= really * 2.0 && really <= told * 2.0, "{} for {}", told, really);
        }
    }

    #[test]
    fn phases_that_were_not_expected_and_those_that_begin_again_are_counted_right() {
        let mut left = Left::new(&[("read the log", 10.0), ("restore", 20.0), ("replay", 10.0)]);
        assert_eq!(left.seconds(0.0, 0.0), 40.0);
        left.begin("read the log");
        assert_eq!(left.seconds(0.5, 5.0), 35.0);
        left.begin("prepare");
        assert_eq!(left.seconds(0.9, 10.0), 30.0);
        left.begin("restore");
        left.begin("replay");
        assert_eq!(left.seconds(1.0, 40.0), 0.0);
        left.begin("restore");
        // What was read again took twice as long as it was expected to.
        assert!((55.0..60.0).contains(&left.seconds(0.0, 20.0)), "{left:?}");
        left.begin("replay");
        left.begin("sync");
        assert_eq!(left.seconds(0.3, 50.0), 0.0);
        assert_eq!(Left::new(&[]).seconds(0.5, 1.0), 0.0);
    }
}
