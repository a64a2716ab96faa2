//! What pg_amcheck says of tables and indexes: what is corrupt, and what it could not look at.

use std::time::Duration;

/// How long a check waits for a lock. Nobody works on a scratch server: what is locked, a prepared transaction locks for
/// as long as it is there.
pub(super) const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
/// What PostgreSQL says, in English, of a wait that came to its end.
const GAVE_UP: &str = "canceling statement due to lock timeout";

/// Complaints of pg_amcheck, which begins each with the name of a table or an index and indents the rest.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Complaints {
    /// Lines that tell of corruption, or of whatever else was in its way.
    pub(super) corrupt: Vec<String>,
    /// Tables and indexes that were locked all the time.
    pub(super) locked: Vec<String>,
}

impl Complaints {
    pub(super) fn read(output: &str) -> Self {
        let mut found = Self::default();
        let mut lines = output.lines().filter(|l| !l.trim().is_empty()).peekable();
        while let Some(head) = lines.next() {
            let mut block = vec![head.to_owned()];
            while let Some(more) = lines.next_if(|l| l.starts_with(' ') || l.starts_with('\t')) {
                block.push(more.to_owned());
            }
            let said = block.iter().skip(1).any(|line| line.contains(GAVE_UP));
            match head.strip_suffix(':') {
                Some(name) if said => found.locked.push(name.to_owned()),
                _ => found.corrupt.extend(block),
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_locked_is_told_from_what_is_corrupt() {
        let output = "heap table \"postgres.public.t\":\n    ERROR:  canceling statement due to lock timeout\n\
                      heap table \"postgres.public.u\", block 3, offset 7:\n    xmin 9 precedes relation freeze threshold 0:720\n\
                      btree index \"postgres.public.t_pkey\":\n    ERROR:  canceling statement due to lock timeout\n    CONTEXT:  somewhere\n\
                      pg_amcheck: warning: something else\n";
        let found = Complaints::read(output);
        assert_eq!(
            found.locked,
            ["heap table \"postgres.public.t\"", "btree index \"postgres.public.t_pkey\""]
        );
        assert_eq!(
            found.corrupt,
            [
                "heap table \"postgres.public.u\", block 3, offset 7:",
                "    xmin 9 precedes relation freeze threshold 0:720",
                "pg_amcheck: warning: something else",
            ]
        );
        assert_eq!(Complaints::read(""), Complaints::default());
    }

    #[test]
    fn a_table_that_is_called_like_the_message_is_not_locked() {
        let name = format!("heap table \"a.b.{GAVE_UP}\", block 0, offset 1:");
        let found = Complaints::read(&format!("{name}\n    line pointer is wrong\n"));
        assert_eq!((found.locked.len(), found.corrupt.len()), (0, 2));
    }
}
