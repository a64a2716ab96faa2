//! Which databases of a cluster a restore brings back, where not all are asked for.

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;
use waltide_format::archive::{Catalog, Layout};
use waltide_format::engines::postgres::catalogue::FIRST_NORMAL_OID;
use waltide_format::{Lsn, Oid};
use waltide_storage::Archive;

use super::names::{NamesError, follow};
use super::selection::Selection;
use crate::plan::Plan;

/// What initdb makes and programs connect to or copy from. They come back whatever is asked for.
const BUILT_IN: [&str; 3] = ["template0", "template1", "postgres"];

/// The databases at a target, as far as they come back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChosenDatabases {
    /// Those that come back.
    pub restored: Vec<DatabaseName>,
    /// Those whose relations come back empty.
    pub absent: Vec<DatabaseName>,
    #[serde(skip)]
    wanted: BTreeSet<Oid>,
}

/// A database that is there at the target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DatabaseName {
    /// `pg_database.oid`.
    pub oid: Oid,
    /// Its name.
    pub name: String,
}

/// Why databases could not be chosen.
#[derive(Debug, thiserror::Error)]
pub enum DatabasesError {
    /// The names could not be followed.
    #[error("the archive could not be searched for the databases")]
    Names(#[from] NamesError),
    /// There is none of that name.
    #[error("there is no database {name} at the target, {at}\nhint: there are {}", known.join(", "))]
    NotFound {
        /// What was asked.
        name: String,
        /// How far replay goes.
        at: Lsn,
        /// The names of those there are.
        known: Vec<String>,
    },
}

impl DatabasesError {
    /// Whether the archive is at fault.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Names(e) => e.is_damage(),
            Self::NotFound { .. } => false,
        }
    }
}

impl ChosenDatabases {
    /// What of the cluster is restored; none where that is everything.
    pub fn selection(&self) -> Option<Selection> {
        (!self.absent.is_empty()).then(|| Selection::databases(self.wanted.clone()))
    }

    /// What the operator should know; none where everything is restored.
    pub fn note(&self) -> Option<String> {
        let absent: Vec<_> = self.absent.iter().map(|d| d.name.as_str()).collect();
        (!absent.is_empty()).then(|| {
            format!(
                "not restored: {}. They are there by name, and sessions in them are refused: drop them once the server \
                 is promoted, then ALTER SYSTEM RESET ignore_invalid_pages",
                absent.join(", ")
            )
        })
    }
}

impl fmt::Display for ChosenDatabases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |databases: &[DatabaseName]| {
            let names: Vec<_> = databases.iter().map(|d| format!("{} ({})", d.name, d.oid)).collect();
            names.join(", ")
        };
        writeln!(f, "databases {}", list(&self.restored))?;
        match self.absent.is_empty() {
            true => writeln!(f, "leave out nothing: these are all"),
            false => writeln!(f, "leave out {}", list(&self.absent)),
        }
    }
}

/// Finds the databases of these names at a plan's target, and those that always come along.
pub async fn choose_databases(
    archive: &Archive,
    layout: &Layout,
    catalog: &Catalog,
    plan: &Plan,
    asked: &[String],
) -> Result<ChosenDatabases, DatabasesError> {
    let entry = catalog.backup(&plan.backup).expect("a plan's backup is in its catalogue");
    let run = catalog.run(&plan.lineage, plan.start_lsn);
    let at = plan.stop.lsn;
    let names = follow(archive, layout.system(plan.system_id), entry, &run, at).await?.names;
    let there: Vec<_> = names.databases_at(at).collect();
    for name in asked {
        if !there.iter().any(|d| d.name == name) {
            let known = there.iter().map(|d| d.name.to_owned()).collect();
            return Err(DatabasesError::NotFound { name: name.clone(), at, known });
        }
    }
    let comes_back = |oid: Oid, name: &str| {
        oid < FIRST_NORMAL_OID || BUILT_IN.contains(&name) || asked.iter().any(|asked| asked == name)
    };
    let wanted = there.iter().filter(|d| comes_back(d.oid, d.name)).map(|d| d.oid);
    let wanted = names.with_sources(wanted);
    let named: Vec<_> = there.iter().map(|d| DatabaseName { oid: d.oid, name: d.name.to_owned() }).collect();
    // What one that comes back was copied from file by file has its files read, and may as well stay.
    let (restored, absent) = named.into_iter().partition(|d| wanted.contains(&d.oid));
    Ok(ChosenDatabases { restored, absent, wanted })
}
