//! The read side: plan, fetch, restore, verify, drill.

// A test may overflow: that is a failed test.
#![cfg_attr(
    test,
    allow(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, clippy::cast_sign_loss)
)]

mod chain;
mod drill;
pub mod engines;
mod ledger;
pub mod log;
mod moment;
mod plan;
mod report;
mod resolve;
mod target;
#[cfg(test)]
mod testing;
mod verify;

pub use chain::ProvedChain;
pub use drill::{DrillReport, past_drills, random_seed, record_drill};
pub use moment::{Happened, Loss, Moment, MomentRequest};
pub use plan::{
    Attempt, Plan, PlanError, PlannedSegment, Reachable, Unreachable, Window, plan, reachable_windows,
};
pub use report::{html, summary, verdict_words};
pub use resolve::{Events, LastCommit, Lost, Source, Stop, StopKind};
pub use target::{Goal, GoalError, Target, TargetAction, TargetTimeline};
pub use verify::{Fault, FaultKind, Verification, Verify};
