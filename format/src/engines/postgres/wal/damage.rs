//! Damage in the log: what is wrong, at which byte of which position.

use std::fmt;

use crate::error::Corrupt;
use crate::ids::Lsn;

/// Bytes of a log that are not what WAL must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Damage {
    /// The position of the field that is wrong.
    pub lsn: Lsn,
    /// Start of the record that was being read, where it was one.
    pub record: Option<Lsn>,
    /// The field, its byte in the segment file, and what is wrong with it.
    pub corrupt: Corrupt,
}

impl Damage {
    /// A field with a value it never has.
    pub(crate) const fn invalid(field: &'static str, lsn: Lsn, found: u64) -> Self {
        Self { lsn, record: None, corrupt: Corrupt::invalid(field, 0, found) }
    }

    /// A field with another value than belongs there.
    pub(crate) const fn mismatch(field: &'static str, lsn: Lsn, found: u64, expected: u64) -> Self {
        Self { lsn, record: None, corrupt: Corrupt::mismatch(field, 0, found, expected) }
    }

    /// A length beyond what the format allows.
    pub(crate) const fn too_large(field: &'static str, lsn: Lsn, found: u64, max: u64) -> Self {
        Self { lsn, record: None, corrupt: Corrupt::too_large(field, 0, found, max) }
    }

    /// The same damage, found while the record at `start` was read.
    #[must_use]
    pub(crate) const fn in_record(self, start: Lsn) -> Self {
        Self { record: Some(start), ..self }
    }

    /// The same damage, its byte counted from the start of the segment that holds it.
    #[must_use]
    pub(crate) const fn in_segments_of(self, segment_bytes: u64) -> Self {
        let at = self.lsn.get() & segment_bytes.wrapping_sub(1);
        Self { corrupt: Corrupt { at, ..self.corrupt }, ..self }
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, LSN {}", self.corrupt, self.lsn)?;
        match self.record {
            Some(start) if start != self.lsn => write!(f, ", in the record at {start}"),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for Damage {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.corrupt)
    }
}
