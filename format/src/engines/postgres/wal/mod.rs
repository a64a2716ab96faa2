//! The write-ahead log, from page headers up to what a commit record says.
