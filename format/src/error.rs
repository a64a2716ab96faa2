//! Damage: what was read, at which byte, and what was found there.

use std::fmt;

/// Bytes that are not what their format says. `at` counts from the start of the object that was decoded
/// (a segment, a record, a manifest); the caller names the object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Corrupt {
    /// The field, by the name its format gives it (PostgreSQL's own where it has one).
    pub field: &'static str,
    /// The byte the field starts at.
    pub at: u64,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Problem {
    /// The input ends inside the field.
    Truncated {
        /// Bytes the field needs.
        needed: u64,
        /// Bytes that are left.
        left: u64,
    },
    /// The value is one the field never has.
    Invalid {
        /// The value found.
        found: u64,
    },
    /// The value must be another one.
    Mismatch {
        /// The value found.
        found: u64,
        /// The value that belongs there.
        expected: u64,
    },
    /// The value is larger than anything the format allows.
    TooLarge {
        /// The value found.
        found: u64,
        /// The largest legal value.
        max: u64,
    },
    /// The bytes are not text in UTF-8.
    NotUtf8,
    /// The bytes do not decompress, or not to the length they promise.
    Compression,
    /// Bytes follow where the object should end.
    TrailingBytes {
        /// How many.
        left: u64,
    },
}

impl Corrupt {
    /// A field with a value it never has.
    pub const fn invalid(field: &'static str, at: u64, found: u64) -> Self {
        Self { field, at, problem: Problem::Invalid { found } }
    }

    /// A field with another value than the one that belongs there.
    pub const fn mismatch(field: &'static str, at: u64, found: u64, expected: u64) -> Self {
        Self { field, at, problem: Problem::Mismatch { found, expected } }
    }

    /// A length beyond what the format allows.
    pub const fn too_large(field: &'static str, at: u64, found: u64, max: u64) -> Self {
        Self { field, at, problem: Problem::TooLarge { found, max } }
    }

    /// The same damage, its position counted from `base` bytes earlier.
    #[must_use]
    pub const fn offset_by(self, base: u64) -> Self {
        Self { at: self.at.saturating_add(base), ..self }
    }
}

impl fmt::Display for Corrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { field, at, problem } = self;
        match problem {
            Problem::Truncated { needed, left } => {
                write!(f, "{field} at byte {at} needs {needed} bytes, {left} are left")
            }
            Problem::Invalid { found } => write!(f, "{field} at byte {at} is {found:#X}"),
            Problem::Mismatch { found, expected } => {
                write!(f, "{field} at byte {at} is {found:#X}, expected {expected:#X}")
            }
            Problem::TooLarge { found, max } => {
                write!(f, "{field} at byte {at} is {found}, more than the {max} allowed")
            }
            Problem::NotUtf8 => write!(f, "{field} at byte {at} is not UTF-8"),
            Problem::Compression => {
                write!(f, "{field} at byte {at} does not decompress to its stated length")
            }
            Problem::TrailingBytes { left } => write!(f, "{left} bytes follow {field} at byte {at}"),
        }
    }
}

impl std::error::Error for Corrupt {}
