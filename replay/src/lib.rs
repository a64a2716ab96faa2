//! The read side: plan, fetch, restore, verify, drill.

// A test may overflow: that is a failed test.
#![cfg_attr(
    test,
    allow(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, clippy::cast_sign_loss)
)]

pub mod engines;
