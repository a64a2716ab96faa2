//! What each database's files mean, a folder per engine.

pub mod postgres;
