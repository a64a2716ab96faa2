//! What a segment needs while it is taken apart, used again for the next: fresh memory costs more than what is done with it,
//! and what many threads give back to the allocator stays with it.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where things wait for their next use.
#[derive(Debug, Default)]
pub(super) struct Pool<T>(Arc<Mutex<Vec<T>>>);

impl<T> Clone for Pool<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T: Default> Pool<T> {
    /// One that waits, as it was left, or a new one.
    pub(super) fn take(&self) -> Pooled<T> {
        Pooled { value: self.idle().pop().unwrap_or_default(), home: self.clone() }
    }
}

impl<T> Pool<T> {
    fn idle(&self) -> MutexGuard<'_, Vec<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Something in use, which waits for its next use afterwards.
#[derive(Debug, Default)]
pub(super) struct Pooled<T: Default> {
    value: T,
    home: Pool<T>,
}

impl<T: Default> From<T> for Pooled<T> {
    /// One that nobody else uses afterwards.
    fn from(value: T) -> Self {
        Self { value, home: Pool::default() }
    }
}

impl<T: Default> Deref for Pooled<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: Default> DerefMut for Pooled<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

impl<T: Default> Drop for Pooled<T> {
    fn drop(&mut self) {
        let value = std::mem::take(&mut self.value);
        self.home.idle().push(value);
    }
}
