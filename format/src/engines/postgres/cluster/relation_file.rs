//! The names of relations' files.

use crate::ids::{ForkNumber, Oid};

/// The name of a relation's file: of which fork, and which segment of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelationSegment {
    /// The relation's file number.
    pub number: Oid,
    /// The fork.
    pub fork: ForkNumber,
    /// The segment; each but the last is `relseg_size` blocks long.
    pub segment: u32,
    /// Whether it is a temporary relation's.
    pub temporary: bool,
}

impl RelationSegment {
    /// Reads a file's name: `16384`, `16384_vm`, `16384.1`, `t3_16384`.
    pub fn parse(name: &str) -> Option<Self> {
        let number = |digits: &str| {
            let plain =
                !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) && !digits.starts_with('0');
            plain.then(|| digits.parse::<u32>().ok()).flatten()
        };
        let (name, segment) = match name.split_once('.') {
            Some((name, segment)) => (name, number(segment)?),
            None => (name, 0),
        };
        let (temporary, name) = match name.strip_prefix('t').and_then(|rest| rest.split_once('_')) {
            Some((backend, rest)) => {
                (backend.bytes().all(|b| b.is_ascii_digit()) && !backend.is_empty(), rest)
            }
            None => (false, name),
        };
        let forks = [ForkNumber::Fsm, ForkNumber::Vm, ForkNumber::Init];
        let fork = forks.into_iter().find_map(|fork| Some((fork, name.strip_suffix(fork.suffix())?)));
        let (fork, digits) = fork.unwrap_or((ForkNumber::Main, name));
        Some(Self { number: number(digits)?, fork, segment, temporary })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relations_files_are_known_by_their_names() {
        let part = |number, fork, segment, temporary| RelationSegment { number, fork, segment, temporary };
        for (name, expected) in [
            ("16384", Some(part(16384, ForkNumber::Main, 0, false))),
            ("16384.12", Some(part(16384, ForkNumber::Main, 12, false))),
            ("16384_fsm", Some(part(16384, ForkNumber::Fsm, 0, false))),
            ("16384_vm.1", Some(part(16384, ForkNumber::Vm, 1, false))),
            ("16384_init", Some(part(16384, ForkNumber::Init, 0, false))),
            ("t3_16384_fsm", Some(part(16384, ForkNumber::Fsm, 0, true))),
            ("t3_16384.1", Some(part(16384, ForkNumber::Main, 1, true))),
            ("016384", None),
            ("16384.0", None),
            ("16384.", None),
            ("16384_x", None),
            ("_fsm", None),
            ("99999999999", None),
            ("PG_VERSION", None),
            ("pg_filenode.map", None),
        ] {
            assert_eq!(RelationSegment::parse(name), expected, "{name}");
        }
    }
}
