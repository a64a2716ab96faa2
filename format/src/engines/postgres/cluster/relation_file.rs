//! The names of relations' files.

use crate::ids::{ForkNumber, Oid, PgMajor, RelFileLocator};

/// `DEFAULTTABLESPACE_OID`: what lies below `base`.
pub const DEFAULT_TABLESPACE: Oid = 1663;
/// `GLOBALTABLESPACE_OID`: what lies in `global`.
pub const GLOBAL_TABLESPACE: Oid = 1664;

/// The directory that a server has in a tablespace: `TABLESPACE_VERSION_DIRECTORY`.
pub fn version_directory(major: PgMajor, catalog_version: u32) -> String {
    format!("PG_{major}_{catalog_version}")
}

/// Where below a data directory a segment of a relation's fork lies; `version` is the [`version_directory`].
pub fn relation_path(relation: RelFileLocator, fork: ForkNumber, segment: u32, version: &str) -> String {
    let RelFileLocator { spc_oid, db_oid, rel_number } = relation;
    let directory = match spc_oid {
        GLOBAL_TABLESPACE => "global".to_owned(),
        DEFAULT_TABLESPACE => format!("base/{db_oid}"),
        _ => format!("pg_tblspc/{spc_oid}/{version}/{db_oid}"),
    };
    let part = if segment == 0 { String::new() } else { format!(".{segment}") };
    format!("{directory}/{rel_number}{}{part}", fork.suffix())
}

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

    /// Reads the path of a relation's file below a data directory; `None` for any other file.
    pub fn locate(path: &str) -> Option<(RelFileLocator, Self)> {
        let parts: Vec<&str> = path.split('/').collect();
        let (spc_oid, db_oid, name) = match parts.as_slice() {
            ["global", name] => (GLOBAL_TABLESPACE, 0, name),
            ["base", db_oid, name] => (DEFAULT_TABLESPACE, db_oid.parse().ok()?, name),
            ["pg_tblspc", spc_oid, _, db_oid, name] => (spc_oid.parse().ok()?, db_oid.parse().ok()?, name),
            _ => return None,
        };
        let segment = Self::parse(name)?;
        Some((RelFileLocator { spc_oid, db_oid, rel_number: segment.number }, segment))
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

    #[test]
    fn a_relations_path_leads_back_to_it() {
        let version = version_directory(PgMajor::V15, 202_209_061);
        for (spc_oid, db_oid) in [(GLOBAL_TABLESPACE, 0), (DEFAULT_TABLESPACE, 5), (16400, 5)] {
            let relation = RelFileLocator { spc_oid, db_oid, rel_number: 1259 };
            for (fork, segment) in [(ForkNumber::Main, 0), (ForkNumber::Vm, 1), (ForkNumber::Init, 0)] {
                let path = relation_path(relation, fork, segment, &version);
                let (found, part) = RelationSegment::locate(&path).unwrap();
                assert_eq!((found, part.fork, part.segment), (relation, fork, segment), "{path}");
            }
        }
        assert_eq!(
            relation_path(
                RelFileLocator { spc_oid: 16400, db_oid: 5, rel_number: 7 },
                ForkNumber::Vm,
                2,
                &version
            ),
            "pg_tblspc/16400/PG_15_202209061/5/7_vm.2"
        );
        for path in ["base/5/PG_VERSION", "pg_xact/0000", "base/x/5", "global/pg_control", "base/5/6/7"] {
            assert_eq!(RelationSegment::locate(path), None, "{path}");
        }
    }
}
