//! A bar on stderr, shown only where a person can see it and only for work that takes a while.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use waltide_storage::Progress;

/// Work shorter than this shows no bar.
const QUIET: Duration = Duration::from_millis(250);

/// A bar for the phase that is running.
pub(crate) struct Bars {
    bar: Mutex<ProgressBar>,
    started: Instant,
}

impl Bars {
    pub(crate) fn new() -> Self {
        Self { bar: Mutex::new(ProgressBar::hidden()), started: Instant::now() }
    }

    fn with(&self, f: impl FnOnce(&ProgressBar)) {
        let bar = self.bar.lock().unwrap_or_else(PoisonError::into_inner);
        if bar.is_hidden() && self.started.elapsed() > QUIET {
            bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        f(&bar);
    }
}

impl Progress for Bars {
    fn phase(&self, name: &str, total_bytes: Option<u64>) {
        let bar = ProgressBar::hidden();
        let style = match total_bytes {
            Some(total) => {
                bar.set_length(total);
                "{msg:12} {bar:32} {bytes}/{total_bytes} {bytes_per_sec} {eta} left"
            }
            None => "{msg:12} {spinner} {bytes} {elapsed}",
        };
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        bar.set_message(name.to_owned());
        let mut held = self.bar.lock().unwrap_or_else(PoisonError::into_inner);
        held.finish_and_clear();
        *held = bar;
    }

    fn advance(&self, bytes: u64) {
        self.with(|bar| bar.inc(bytes));
    }

    fn message(&self, text: &str) {
        self.with(|bar| bar.println(text));
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        self.with(ProgressBar::finish_and_clear);
    }
}
