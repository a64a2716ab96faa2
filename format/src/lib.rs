//! The bytes Waltide reads and writes, and what they mean: no I/O, no clock, no unsafe.
//!
//! Every decoder takes bytes from a [`Reader`], which cannot run past its end, checks a length before it
//! takes memory, and answers damage with [`Corrupt`]: what, at which byte, what was found.

// A test may overflow: that is a failed test.
#![cfg_attr(
    test,
    allow(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, clippy::cast_sign_loss)
)]

pub mod archive;
pub mod engines;
mod error;
mod ids;
mod reader;
mod segment;
mod time;
mod zeros;

pub use error::{Corrupt, Problem};
pub use ids::{
    BLOCK_BYTES, BackupId, BlockNumber, ForkNumber, Lsn, Oid, PgMajor, RelFileLocator, SystemId, TimelineId,
    Xid,
};
pub use reader::{Reader, Writer};
pub use segment::{BackupHistoryName, SegmentName, SegmentSize, WalFileName};
pub use time::{TimeError, TimestampTz};
