//! Names: which table is which file, at any moment, out of the catalogues' rows in a base backup and in the log.
//!
//! pg_class, pg_namespace and pg_database are heaps like any other: their rows are read from the pages of a base backup,
//! and the records that touch them say what became of the rows. Bytes of pages are not kept up, only rows: what is
//! needed is facts. Facts per major: docs/wal.md, "Catalogues".

mod change;
mod map;
mod row;
mod tuple;

pub use change::{CatalogueChange, CatalogueFiles, ChangeKind, UpdatedBody, catalogue_changes};
pub use map::RelationMap;
pub use row::{Catalogue, ClassRow, DatabaseRow, NamespaceRow, Row};
pub use tuple::{HeapTuple, Hint, TupleId, page_tuples};
