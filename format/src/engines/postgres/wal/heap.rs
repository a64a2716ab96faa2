//! The visibility-map pages that heap records change without naming them.
//!
//! A heap record that clears a page's all-visible or all-frozen bit says so only in its flags; replay
//! clears the bits in the map by itself. From minor releases 17.11 and 18.6 on the map's page is a block
//! reference as well, so both forms can stand in one log.

use crate::engines::postgres::wal::Record;
use crate::engines::postgres::wal::rmgr::Rmgr;
use crate::ids::{BLOCK_BYTES, BlockNumber, ForkNumber, RelFileLocator};

const OPMASK: u8 = 0x70;
const HEAP_INSERT: u8 = 0x00;
const HEAP_DELETE: u8 = 0x10;
const HEAP_UPDATE: u8 = 0x20;
const HEAP_HOT_UPDATE: u8 = 0x40;
const HEAP_LOCK: u8 = 0x60;
const HEAP2_MULTI_INSERT: u8 = 0x50;
const HEAP2_LOCK_UPDATED: u8 = 0x60;

const ALL_VISIBLE_CLEARED: u8 = 0x01;
const NEW_ALL_VISIBLE_CLEARED: u8 = 0x02;

/// How many heap pages one page of the map covers, at two bits each behind a 24-byte page header.
#[allow(clippy::cast_possible_truncation)] // 8192
pub const VM_HEAP_BLOCKS_PER_PAGE: u32 = (BLOCK_BYTES as u32 - 24) * 4;

/// The map's page that covers a heap page.
pub const fn vm_block_of(heap_block: BlockNumber) -> BlockNumber {
    heap_block / VM_HEAP_BLOCKS_PER_PAGE
}

/// The map's pages that a heap record changes and does not refer to.
pub fn implicit_vm_blocks(record: &Record<'_>) -> impl Iterator<Item = (RelFileLocator, BlockNumber)> {
    let [first, second] =
        clears(record).map(|heap| heap.map(|(relation, heap)| (relation, vm_block_of(heap))));
    let second = second.filter(|second| Some(*second) != first);
    first.into_iter().chain(second)
}

/// The heap's pages whose bits a record clears in such pages of the map.
pub fn implicit_vm_clears(record: &Record<'_>) -> impl Iterator<Item = (RelFileLocator, BlockNumber)> {
    clears(record).into_iter().flatten()
}

fn clears(record: &Record<'_>) -> [Option<(RelFileLocator, BlockNumber)>; 2] {
    if matches!(record.rmgr(), Rmgr::HEAP | Rmgr::HEAP2) { cleared(record) } else { [None; 2] }
}

fn cleared(record: &Record<'_>) -> [Option<(RelFileLocator, BlockNumber)>; 2] {
    let main = record.main_data();
    let flags_at = |offset: usize| main.get(offset).copied().unwrap_or(0);
    let map_of = |id: u8| {
        let (relation, _, heap) = record.page(id)?;
        let block = vm_block_of(heap);
        let named =
            record.blocks().any(|b| b.fork == ForkNumber::Vm && b.relation == relation && b.block == block);
        (!named).then_some((relation, heap))
    };
    let one = |set: bool| [if set { map_of(0) } else { None }, None];
    if record.rmgr() == Rmgr::HEAP {
        return match record.kind() & OPMASK {
            // offnum, flags
            HEAP_INSERT => one(flags_at(2) & ALL_VISIBLE_CLEARED != 0),
            // xmax, offnum, infobits_set, flags; of a lock the flag means all-frozen
            HEAP_DELETE | HEAP_LOCK => one(flags_at(7) & ALL_VISIBLE_CLEARED != 0),
            // old_xmax, old_offnum, old_infobits_set, flags; block 1 is the old page where it is another one
            HEAP_UPDATE | HEAP_HOT_UPDATE => {
                let flags = flags_at(7);
                let old = record.page(1).is_some_and(|(_, fork, _)| fork == ForkNumber::Main).into();
                [
                    if flags & ALL_VISIBLE_CLEARED != 0 { map_of(old) } else { None },
                    if flags & NEW_ALL_VISIBLE_CLEARED != 0 { map_of(0) } else { None },
                ]
            }
            _ => [None; 2],
        };
    }
    match record.kind() & OPMASK {
        HEAP2_MULTI_INSERT => one(flags_at(0) & ALL_VISIBLE_CLEARED != 0),
        HEAP2_LOCK_UPDATED => one(flags_at(7) & ALL_VISIBLE_CLEARED != 0),
        _ => [None; 2],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engines::postgres::wal::testing::{TestBlock, record_bytes};
    use crate::ids::{Lsn, PgMajor};

    fn implicit(rmid: u8, info: u8, main: &[u8], blocks: &[TestBlock]) -> Vec<BlockNumber> {
        let bytes = record_bytes(PgMajor::V15, rmid, info, 7, Lsn::from(0x28), blocks, main);
        let mut refs = Vec::new();
        let record =
            Record::decode(&bytes, Lsn::from(0x100), Lsn::from(0x200), PgMajor::V15, &mut refs).unwrap();
        implicit_vm_blocks(&record).map(|(_, block)| block).collect()
    }

    #[test]
    fn each_heap_record_that_clears_bits_names_the_map_pages_it_changes() {
        let at = |id, block| TestBlock::data(id, ForkNumber::Main, block, b"x");
        assert_eq!(implicit(10, 0x00, &[1, 0, 1], &[at(0, 40_000)]), [1]);
        assert_eq!(implicit(10, 0x00, &[1, 0, 0], &[at(0, 40_000)]), [0u32; 0]);
        assert_eq!(implicit(10, 0x10, &[0, 0, 0, 0, 1, 0, 0, 1], &[at(0, 5)]), [0]);
        let update = |flags| [0, 0, 0, 0, 1, 0, 0, flags, 0, 0, 0, 0, 2, 0];
        assert_eq!(implicit(10, 0x20, &update(3), &[at(0, 5), at(1, 40_000)]), [1, 0]);
        assert_eq!(implicit(10, 0x20, &update(2), &[at(0, 5), at(1, 40_000)]), [0]);
        assert_eq!(implicit(10, 0x40, &update(3), &[at(0, 40_000)]), [1]);
        assert_eq!(implicit(10, 0x60, &[0, 0, 0, 0, 1, 0, 0, 1], &[at(0, 5)]), [0]);
        assert_eq!(implicit(9, 0x50 | 0x80, &[1, 0, 1, 0], &[at(0, 5)]), [0]);
        assert_eq!(implicit(9, 0x60, &[0, 0, 0, 0, 1, 0, 0, 1], &[at(0, 70_000)]), [2]);
        assert_eq!(implicit(11, 0x00, &[1, 0, 1], &[at(0, 5)]), [0u32; 0]);
    }

    #[test]
    fn a_map_page_that_the_record_refers_to_is_not_implicit() {
        let heap = TestBlock::data(0, ForkNumber::Main, 5, b"x");
        let map = TestBlock::data(1, ForkNumber::Vm, 0, b"y");
        assert_eq!(implicit(10, 0x00, &[1, 0, 1], &[heap, map]), [0u32; 0]);
    }
}
