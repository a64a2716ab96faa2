//! The write side: push, watch, backup, import, retention.

// A test may overflow: that is a failed test.
#![cfg_attr(
    test,
    allow(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, clippy::cast_sign_loss)
)]

pub mod catalog;
pub mod engines;
pub mod host;
pub mod init;
pub mod inventory;
pub mod merged;
pub mod prune;
mod put;
pub mod retention;
pub mod status;
mod stored_segments;
#[cfg(test)]
mod testing;
pub mod window_ends;
