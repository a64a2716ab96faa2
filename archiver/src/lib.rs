//! The write side: push, watch, backup, import, retention.
