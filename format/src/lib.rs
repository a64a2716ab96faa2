//! The bytes Waltide reads and writes, and what they mean: no I/O, no clock, no unsafe.
