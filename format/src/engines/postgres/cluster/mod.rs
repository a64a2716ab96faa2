//! The files of a cluster that say what state it is in.
