//! Names: which table is which file, at any moment, out of the catalogues' rows in a base backup and in the log.
//!
//! pg_class, pg_namespace and pg_database are heaps like any other: their rows are read from the pages of a base backup,
//! and the records that touch them say what became of the rows. Bytes of pages are not kept up, only rows: what is
//! needed is facts. Facts per major: docs/wal.md, "Catalogues".
//!
//! pg_inherits is followed where partitions are asked for, which is seldom: merged indexes do not tell of it.
//!
//! A [`Follower`] takes the backup's pages and the log's [`CatalogueChange`]s in; with the [`Fates`] of the transactions
//! it becomes [`Names`], which answer for every moment.

mod change;
mod events;
mod fate;
mod follow;
mod map;
mod names;
mod partitions;
mod row;
mod table_name;
mod there;
mod tuple;

pub use change::{CatalogueChange, CatalogueFiles, ChangeKind, UpdatedBody, catalogue_changes};
pub use events::{TableEvent, TableEventKind};
pub use fate::{Commit, Fates};
pub use follow::Follower;
pub use map::RelationMap;
pub use names::{NamedRelation, Names};
pub use partitions::PartitionsTruncated;
pub use row::{Catalogue, ClassRow, DatabaseRow, InheritsRow, NamespaceRow, Row};
pub use table_name::{TableName, TablePattern, TablePatternError};
pub use there::{DatabaseThere, FIRST_NORMAL_OID, LARGE_OBJECTS, TableThere};
pub use tuple::{HeapTuple, Hint, TupleId, page_tuples};
