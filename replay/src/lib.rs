//! The read side: plan, fetch, restore, verify, drill.
