//! The rows of pg_class, pg_namespace and pg_database: what they say of names and files. Every column that is read here
//! lies before the first one that may be null or of any length, so its place is fixed in each major.

use crate::error::Corrupt;
use crate::ids::{Oid, PgMajor};
use crate::reader::Reader;

/// `NAMEDATALEN`.
const NAME_BYTES: usize = 64;
/// `DATCONNLIMIT_INVALID_DB`: a DROP DATABASE began and did not end.
const CONNLIMIT_INVALID: u32 = u32::MAX - 1;

/// A catalogue whose rows are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Catalogue {
    /// pg_class: tables, indexes and everything else with columns. Mapped, one in each database.
    Class,
    /// pg_namespace: schemas. One in each database.
    Namespace,
    /// pg_database. Mapped, one for the cluster.
    Database,
    /// pg_inherits: whose partition or child a table is. One in each database.
    Inherits,
}

impl Catalogue {
    /// Those that names are in.
    pub const NAMES: [Self; 3] = [Self::Class, Self::Namespace, Self::Database];

    /// Its OID, which is also its file's number until a rewrite gives it another.
    pub const fn oid(self) -> Oid {
        match self {
            Self::Class => 1259,
            Self::Namespace => 2615,
            Self::Database => 1262,
            Self::Inherits => 2611,
        }
    }

    /// The catalogue with names that has that OID.
    pub fn from_oid(oid: Oid) -> Option<Self> {
        Self::NAMES.into_iter().find(|c| c.oid() == oid)
    }
}

/// A row of pg_class.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ClassRow {
    /// `oid`.
    pub oid: Oid,
    /// `relname`.
    pub name: String,
    /// `relnamespace`.
    pub namespace: Oid,
    /// `relfilenode`; zero where there is no file, or where the relation map says it.
    pub file: Oid,
    /// `reltablespace`; zero for the database's own.
    pub tablespace: Oid,
    /// `reltoastrelid`; zero for none.
    pub toast: Oid,
    /// `relisshared`.
    pub shared: bool,
    /// `relpersistence`: `p` permanent, `u` unlogged, `t` temporary.
    pub persistence: u8,
    /// `relkind`: `r` table, `p` partitioned table, `i` index, `t` TOAST, and so on.
    pub kind: u8,
    /// `relrewrite`: the table that a rewrite is making anew here.
    pub rewrites: Oid,
}

/// A row of pg_namespace.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NamespaceRow {
    /// `oid`.
    pub oid: Oid,
    /// `nspname`.
    pub name: String,
}

/// A row of pg_database.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DatabaseRow {
    /// `oid`.
    pub oid: Oid,
    /// `datname`.
    pub name: String,
    /// `dattablespace`.
    pub tablespace: Oid,
    /// Whether a DROP DATABASE began: nobody can connect any more.
    pub invalid: bool,
}

/// A row of pg_inherits.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct InheritsRow {
    /// `inhrelid`.
    pub child: Oid,
    /// `inhparent`.
    pub parent: Oid,
}

/// A row of any of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Row {
    /// Of pg_class.
    Class(ClassRow),
    /// Of pg_namespace.
    Namespace(NamespaceRow),
    /// Of pg_database.
    Database(DatabaseRow),
    /// Of pg_inherits.
    Inherits(InheritsRow),
}

impl Row {
    /// Decodes a row's columns, which lie behind its header and null bitmap.
    pub fn decode(catalogue: Catalogue, body: &[u8], major: PgMajor) -> Result<Self, Corrupt> {
        let r = &mut Reader::new(body);
        Ok(match catalogue {
            Catalogue::Class => Self::Class(ClassRow::decode(r, major)?),
            Catalogue::Namespace => Self::Namespace(NamespaceRow { oid: oid(r)?, name: name(r, "nspname")? }),
            Catalogue::Database => Self::Database(DatabaseRow::decode(r, major)?),
            Catalogue::Inherits => Self::Inherits(InheritsRow { child: oid(r)?, parent: oid(r)? }),
        })
    }

    /// `oid`; of pg_inherits, which has none, the child's.
    pub const fn oid(&self) -> Oid {
        match self {
            Self::Inherits(row) => row.child,
            Self::Class(row) => row.oid,
            Self::Namespace(row) => row.oid,
            Self::Database(row) => row.oid,
        }
    }
}

fn oid(r: &mut Reader<'_>) -> Result<Oid, Corrupt> {
    r.parse_u32("oid", |oid| (oid != 0).then_some(oid))
}

/// Takes a `name`: text up to its first zero byte. It is in the database's encoding, which need not be UTF-8.
fn name(r: &mut Reader<'_>, field: &'static str) -> Result<String, Corrupt> {
    let bytes = r.take(NAME_BYTES, field)?;
    let text = bytes.split(|b| *b == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(text).into_owned())
}

impl ClassRow {
    fn decode(r: &mut Reader<'_>, major: PgMajor) -> Result<Self, Corrupt> {
        let oid = oid(r)?;
        let name = name(r, "relname")?;
        let namespace = r.u32("relnamespace")?;
        r.take(16, "reltype, reloftype, relowner, relam")?;
        let file = r.u32("relfilenode")?;
        let tablespace = r.u32("reltablespace")?;
        // 18 added relallfrozen.
        r.take(if major >= PgMajor::V18 { 16 } else { 12 }, "relpages, reltuples, relallvisible")?;
        let toast = r.u32("reltoastrelid")?;
        r.take(1, "relhasindex")?;
        let shared = r.u8("relisshared")? != 0;
        let persistence = r.u8("relpersistence")?;
        let kind = r.u8("relkind")?;
        r.take(12, "relnatts to relispartition")?;
        let rewrites = r.u32("relrewrite")?;
        Ok(Self { oid, name, namespace, file, tablespace, toast, shared, persistence, kind, rewrites })
    }
}

impl DatabaseRow {
    fn decode(r: &mut Reader<'_>, major: PgMajor) -> Result<Self, Corrupt> {
        let oid = oid(r)?;
        let name = name(r, "datname")?;
        let (limit, tablespace);
        if major < PgMajor::V15 {
            r.take(8, "datdba, encoding")?;
            r.take(2 * NAME_BYTES, "datcollate, datctype")?;
            r.take(4, "datistemplate, datallowconn")?;
            limit = r.u32("datconnlimit")?;
            r.take(12, "datlastsysoid, datfrozenxid, datminmxid")?;
            tablespace = r.u32("dattablespace")?;
        } else {
            // The locale's names became text, which lies behind what has a fixed place.
            r.take(12, "datdba to datallowconn")?;
            limit = r.u32("datconnlimit")?;
            r.take(8, "datfrozenxid, datminmxid")?;
            tablespace = r.u32("dattablespace")?;
        }
        Ok(Self { oid, name, tablespace, invalid: limit == CONNLIMIT_INVALID })
    }
}
