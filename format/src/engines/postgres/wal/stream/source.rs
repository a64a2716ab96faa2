//! Where the bytes of a segment come from: memory, or a file that is read while its records are.

use std::ops::Range;

/// The bytes of a segment or of its first part. They are asked for forwards: once a page was asked for, none before it is
/// asked for again.
pub trait WalBytes {
    /// How many there are.
    fn length(&self) -> usize;

    /// Those in `range`, which lies within one page; `None` where there are not so many.
    fn part(&mut self, range: Range<usize>) -> Option<&[u8]>;
}

impl<T: AsRef<[u8]> + ?Sized> WalBytes for &T {
    fn length(&self) -> usize {
        T::as_ref(self).len()
    }

    fn part(&mut self, range: Range<usize>) -> Option<&[u8]> {
        T::as_ref(self).get(range)
    }
}

impl<B: WalBytes + ?Sized> WalBytes for &mut B {
    fn length(&self) -> usize {
        (**self).length()
    }

    fn part(&mut self, range: Range<usize>) -> Option<&[u8]> {
        (**self).part(range)
    }
}
