//! The objects of the archive: their names, their bytes, and what they say together. Spec: docs/format.md.

mod block_set;
mod catalog;
mod chain;
mod detail;
mod envelope;
mod estimate;
mod extents;
mod histories;
mod index;
mod joins;
mod layers;
mod layout;
mod manifest;
mod merged;
mod packing;
mod reach;
mod source;
mod state;
mod stored_segment;
mod stored_wal;
mod stretch;
mod windows;

pub use block_set::BlockSet;
pub use catalog::{
    BackupEntry, Beginning, Catalog, DamagedObject, Gap, GapKind, Keep, Lineage, Run, SegmentEntry, Step,
    WalRange,
};
pub use chain::{ChainHash, ChainHead, ChainLink, ChainStart, digest_from_hex};
pub use detail::{
    DETAIL_SECTIONS, ExclusiveLock, RelationWork, SegmentDetail, SubXact, TruncatedOid, Volume, XactWork,
};
pub use envelope::{Envelope, FOOTER_BYTES, Footer, HEADER_BYTES, Header, ObjectKind, WalFile};
pub use estimate::{Estimate, NativeWork, Rates, RestoreWork};
pub use extents::{Extent, ExtentMap, FRAME_BYTES_MAX, FrameCompressor, PackBuilder};
pub use histories::{Pusher, TimelineHistory};
pub use index::{
    AdmittedFault, CheckpointInfo, CheckpointKind, CommitKind, DroppedRelation, Ending, FileEvent,
    FileEventKind, ForkBlocks, IndexedBlock, PendingRecord, RestorePoint, RmgrCount, RunningXacts, SECTIONS,
    SegmentIndex, SegmentInfo, TimelineEnd, XactEnd,
};
pub use joins::continuity_fault;
pub use layers::merge_maps;
pub use layout::{Layout, MergedName, SystemLayout, WalObject};
pub use manifest::{
    BackupChain, BackupKind, BackupMethod, ClusterInfo, ConfigFile, DrillCheck, DrillCommit, DrillOutcome,
    DrillPhase, DrillRecord, DrillSetting, DrillVerdict, LedgerRecord, LedgerUnit, Manifest,
    ManifestDirectory, ManifestFile, ManifestStats, PruneMark, StartedBackup, SystemInfo, Tablespace,
    WaltideInfo,
};
pub use merged::{
    MERGE_BUILDER, MERGE_STEPS, MERGED_SECTIONS, MergeGroup, MergedDirectory, MergedIndex, MergedObject,
    MergedSection, MergedSegment, MergedSummary, NamesLog, OverEdge, RelationSegments, TouchedFork,
};
pub use reach::Reach;
pub use source::PushSource;
pub use state::{HeadRecord, PageRef, SegmentState, StateRecord};
pub use stored_segment::{
    PackedSegment, SegmentDirectory, StoredSegment, WalDigest, encode_segment, pack_segment, read_from,
    wal_digest,
};
pub use stored_wal::StoredWal;
pub use windows::{
    BrokenBackup, Coverage, EndedWindow, Hole, Moment, RecoveryWindow, Stretch, WindowCommit, WindowRestore,
};

#[cfg(test)]
pub(crate) use stored_segment::samples;
