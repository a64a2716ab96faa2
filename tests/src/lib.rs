//! Harness and end-to-end tests against real PostgreSQL.
