//! Large buffers that are used again: fresh memory costs more than what is done with it.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// More than so many are not kept.
const IDLE_MAX: usize = 8;

/// Where buffers wait for their next use.
#[derive(Debug, Clone, Default)]
pub(super) struct Buffers(Arc<Mutex<Vec<Vec<u8>>>>);

impl Buffers {
    /// An empty buffer, which may have memory already.
    pub(super) fn take(&self) -> Vec<u8> {
        let mut bytes = self.idle().pop().unwrap_or_default();
        bytes.clear();
        bytes
    }

    /// Wraps what was taken, so that it comes back.
    pub(super) fn wrap(&self, bytes: Vec<u8>) -> Buffer {
        Buffer { bytes, home: self.clone() }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A buffer in use.
#[derive(Default)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    home: Buffers,
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer").field("bytes", &self.bytes.len()).finish_non_exhaustive()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut idle = self.home.idle();
        if idle.len() < IDLE_MAX && self.bytes.capacity() > 0 {
            idle.push(std::mem::take(&mut self.bytes));
        }
    }
}
