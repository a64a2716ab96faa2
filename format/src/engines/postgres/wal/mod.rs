//! The write-ahead log, from page headers up to what a commit record says. Facts per major: docs/wal.md.

mod damage;
mod dbase;
mod heap;
mod image;
mod multixact;
mod origin;
mod packed;
mod page;
mod pglz;
mod record;
mod redirect;
mod rmgr;
mod rows;
mod slru;
mod smgr;
mod standby;
mod stream;
#[cfg(test)]
pub(crate) mod testing;
mod timeline_start;
mod xact;
mod xlog;

pub use damage::Damage;
pub use dbase::{DatabaseRecord, RelationMapUpdate, TablespaceRecord};
pub use heap::{VM_HEAP_BLOCKS_PER_PAGE, implicit_vm_blocks, implicit_vm_clears, vm_block_of};
pub use image::{Compression, Image};
pub use multixact::MultiXactRecord;
pub use origin::OriginRecord;
pub use packed::PackedFor;
pub use page::{LONG_HEADER_BYTES, LongHeader, PAGE_BYTES, PageFlags, PageHeader, SHORT_HEADER_BYTES};
pub use record::{Block, BlockRef, RECORD_BYTES_MAX, RECORD_HEADER_BYTES, Record, RecordHeader};
pub use redirect::{RedirectedTablespace, SegmentBytes, make_tablespace_in_place};
pub use rmgr::{Rmgr, rmgr_name};
pub use rows::{HeapTruncate, RowChange};
pub use slru::{Slru, SlruRecord};
pub use smgr::SmgrRecord;
pub use standby::{ExclusiveLocks, RunningXactsRecord};
pub use stream::{
    EndReason, Expected, LogEnd, Next, Pending, PreviousTail, RecordStream, SegmentSpan, StreamHead,
    WalBytes, copy_record,
};
pub use timeline_start::TimelineStart;
pub use xact::{Prepare, XactAssignment, XactKind, XactRecord};
pub use xlog::{
    Checkpoint, EndOfRecovery, OverwriteContrecord, ParameterChange, RestorePointRecord, XlogRecord,
};
