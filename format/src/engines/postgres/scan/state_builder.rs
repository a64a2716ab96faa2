//! Collects what a segment's records do besides changing pages.

use foldhash::{HashSet, HashSetExt as _};

use crate::archive::{HeadRecord, SegmentState, StateRecord};
use crate::engines::postgres::wal::{Record, Rmgr, XactRecord, implicit_vm_blocks};
use crate::ids::{ForkNumber, Xid};

/// Records with more data than this altogether are not listed: such a segment is read.
const RECORDS_BYTES_MAX: usize = 256 << 10;

/// See the module.
#[derive(Debug)]
pub(super) struct StateBuilder {
    state: SegmentState,
    kinds: HashSet<(u8, u8)>,
    /// What was added last; most often the next is of the same kind, or of the one before.
    recent: [Option<(u8, u8)>; 2],
    /// How much data the listed records have.
    bytes: usize,
}

impl Default for StateBuilder {
    fn default() -> Self {
        let state = SegmentState {
            newest_xid: Xid::INVALID,
            kinds: Vec::new(),
            page_main_bytes: 0,
            records: Vec::new(),
            head: None,
        };
        Self { state, kinds: HashSet::new(), recent: [None; 2], bytes: 0 }
    }
}

impl StateBuilder {
    /// Takes a record in, which may have begun before the segment.
    pub(super) fn add(&mut self, record: &Record<'_>, is_head: bool) {
        let (xid, changes_pages) = (record.header.xid, record.blocks().len() > 0);
        if !is_head && self.state.newest_xid.precedes(xid) {
            self.state.newest_xid = xid;
        }
        if is_head {
            let named = record.blocks().map(|block| (block.relation, block.fork, block.block));
            let maps = implicit_vm_blocks(record).map(|(relation, block)| (relation, ForkNumber::Vm, block));
            self.state.head =
                Some(HeadRecord { start: record.start, xid, pages: named.chain(maps).collect() });
        }
        if changes_pages {
            let main = u32::try_from(record.main_data().len()).unwrap_or(u32::MAX);
            self.state.page_main_bytes = self.state.page_main_bytes.max(main);
        } else if is_listed(record) {
            self.list(record);
            return;
        } else if XactRecord::is_without_origin(record) {
            return;
        }
        self.note((record.rmgr().get(), record.header.info));
    }

    fn note(&mut self, kind: (u8, u8)) {
        if !self.recent.contains(&Some(kind)) {
            self.recent = [Some(kind), self.recent[0]];
            self.kinds.insert(kind);
        }
    }

    fn list(&mut self, record: &Record<'_>) {
        self.bytes = self.bytes.saturating_add(record.main_data().len());
        if self.bytes > RECORDS_BYTES_MAX {
            self.state.records = Vec::new();
            return;
        }
        self.state.records.push(StateRecord {
            start: record.start,
            end: record.end,
            xid: record.header.xid,
            rmid: record.rmgr().get(),
            info: record.header.info,
            origin: record.origin(),
            main: record.main_data().to_vec(),
        });
    }

    /// What was collected; none where it is too much.
    pub(super) fn finish(mut self) -> Option<SegmentState> {
        self.state.kinds = self.kinds.into_iter().collect();
        self.state.kinds.sort_unstable();
        (self.bytes <= RECORDS_BYTES_MAX).then_some(self.state)
    }
}

/// Whether a record without blocks is listed whole.
fn is_listed(record: &Record<'_>) -> bool {
    match record.rmgr() {
        Rmgr::XACT => !XactRecord::is_without_origin(record) && !XactRecord::is_for_queries(record),
        Rmgr::XLOG
        | Rmgr::SMGR
        | Rmgr::CLOG
        | Rmgr::DBASE
        | Rmgr::TBLSPC
        | Rmgr::MULTIXACT
        | Rmgr::RELMAP
        | Rmgr::COMMIT_TS
        | Rmgr::REPLORIGIN => true,
        _ => false,
    }
}
