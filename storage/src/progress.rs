//! How long work tells how far it is; the libraries report, the command line shows.

/// Someone who wants to know how far a piece of work is.
pub trait Progress: Send + Sync {
    /// A phase begins; `total_bytes` where it is known.
    fn phase(&self, name: &str, total_bytes: Option<u64>);
    /// So many bytes more are done.
    fn advance(&self, bytes: u64);
    /// Something the operator may want to read meanwhile.
    fn message(&self, text: &str);
}

/// Nobody wants to know.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn phase(&self, _: &str, _: Option<u64>) {}
    fn advance(&self, _: u64) {}
    fn message(&self, _: &str) {}
}
