//! What is particular to one kind of database: a folder per engine.

pub mod postgres;
