//! How long work tells how far it is; the libraries report, the command line shows.

/// What is counted besides bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// Records of a log.
    Records,
    /// Pages written.
    Pages,
}

/// Someone who wants to know how far a piece of work is.
pub trait Progress: Send + Sync {
    /// The phases that are to come, each with the seconds that it is expected to take. Some may not come, and others besides.
    fn expect(&self, _phases: &[(&'static str, f64)]) {}
    /// A phase begins; `total_bytes` where it is known.
    fn phase(&self, name: &str, total_bytes: Option<u64>);
    /// So many bytes more are done.
    fn advance(&self, bytes: u64);
    /// So many more of these are done in the phase. Shown with the next [`Progress::advance`].
    fn count(&self, _what: Counted, _more: u64) {}
    /// Something the operator may want to read meanwhile.
    fn message(&self, text: &str);
    /// Something the operator has to know, whoever looks.
    fn warn(&self, text: &str) {
        tracing::warn!("{text}");
    }
}

/// Nobody wants to know.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn phase(&self, _: &str, _: Option<u64>) {}
    fn advance(&self, _: u64) {}
    fn message(&self, _: &str) {}
}
