//! Scans segments as push does, one after the other, and prints what `pg_waldump --stats` prints: how many
//! records and bytes each resource manager wrote. scripts/bench measures it.
//!
//!     scan_wal SEGMENT_FILE...      in order; the last one may end early

use std::collections::BTreeMap;
use std::path::PathBuf;

use waltide_format::SegmentName;
use waltide_format::engines::postgres::scan::{Previous, PreviousLog, ScanContext, ScanMode, scan_segment};
use waltide_format::engines::postgres::wal::{PageHeader, rmgr_name};

fn main() {
    let paths: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let mut sums: BTreeMap<u8, (u64, u64, u64)> = BTreeMap::new();
    let mut previous = None;
    for (i, path) in paths.iter().enumerate() {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let name: SegmentName = name.parse().unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let page = PageHeader::decode_anywhere(&bytes, 0.into()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let size =
            page.long.unwrap_or_else(|| panic!("{name} does not start with a long header")).segment_size;
        let mode = if i + 1 == paths.len() { ScanMode::Partial } else { ScanMode::Whole };
        let context = ScanContext { previous: previous.take(), mode, ..ScanContext::new(name, size) };
        let scan = scan_segment(&bytes, &context).unwrap_or_else(|e| panic!("{name}: {e}"));
        for count in &scan.index.rmgrs {
            let sum = sums.entry(count.rmid).or_default();
            *sum = (sum.0 + count.records, sum.1 + count.record_bytes, sum.2 + count.image_bytes);
        }
        previous = scan.tail.map(|tail| Previous { name, log: PreviousLog::Tail(tail) });
    }
    println!("{:<20} {:>10} {:>14} {:>14}", "Type", "N", "Record size", "FPI size");
    for (rmid, (records, record_bytes, image_bytes)) in sums {
        println!("{:<20} {records:>10} {record_bytes:>14} {image_bytes:>14}", rmgr_name(rmid));
    }
}
