//! What replay needs of a segment of whose pages nothing matters, so that its WAL need not be read.

use serde::Serialize;

use super::index::{get_fork, get_lsn, get_option, get_relation, items, put_lsn, put_option, put_relation};
use crate::error::Corrupt;
use crate::ids::{BlockNumber, ForkNumber, Lsn, RelFileLocator, Xid};
use crate::reader::{Reader, Writer};

/// A block reference: relation, fork, block.
pub type PageRef = (RelFileLocator, ForkNumber, BlockNumber);

/// What a segment's records do besides changing pages, as far as the index's other lists do not tell it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SegmentState {
    /// The newest transaction that wrote any of the records, `head` not included.
    pub newest_xid: Xid,
    /// `xl_rmid` and `xl_info` of the records that are neither in `records` nor in the index's `xacts`, each pair once, in order.
    pub kinds: Vec<(u8, u8)>,
    /// The longest main data that a record which refers to blocks has, in bytes.
    pub page_main_bytes: u32,
    /// Records without blocks that change more than pages, in LSN order. Of ends of transactions those that the index's `xacts`
    /// do not tell all of.
    pub records: Vec<StateRecord>,
    /// The record that began in the segment before and was joined with its end here.
    pub head: Option<HeadRecord>,
}

/// A record without blocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StateRecord {
    /// Where it starts.
    pub start: Lsn,
    /// Where the next may start.
    pub end: Lsn,
    /// `xl_xid`.
    pub xid: Xid,
    /// `xl_rmid`.
    pub rmid: u8,
    /// `xl_info`.
    pub info: u8,
    /// The replication origin, where the record has one.
    pub origin: Option<u16>,
    /// The main data.
    pub main: Vec<u8>,
}

/// A record that began in the segment before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HeadRecord {
    /// Where it starts.
    pub start: Lsn,
    /// `xl_xid`.
    pub xid: Xid,
    /// The pages it changes, those of visibility maps that it does not name included. They are among the index's blocks, too.
    pub pages: Vec<PageRef>,
}

impl SegmentState {
    /// Positions are written as distances from `base`.
    pub(super) fn encode(&self, base: Lsn, w: &mut Writer) {
        w.u32(self.newest_xid.get()).u32(self.page_main_bytes).varint(self.kinds.len() as u64);
        for (rmid, info) in &self.kinds {
            w.u8(*rmid).u8(*info);
        }
        w.varint(self.records.len() as u64);
        for record in &self.records {
            put_lsn(w, base, record.start);
            w.varint(record.end.bytes_since(record.start));
            w.u32(record.xid.get()).u8(record.rmid).u8(record.info);
            put_option(w, record.origin, |w, origin| {
                w.u16(origin);
            });
            w.varint(record.main.len() as u64).bytes(&record.main);
        }
        put_option(w, self.head.as_ref(), |w, head| {
            put_lsn(w, base, head.start);
            w.u32(head.xid.get()).varint(head.pages.len() as u64);
            for (relation, fork, block) in &head.pages {
                put_relation(w, *relation);
                w.u8(fork.get()).varint(u64::from(*block));
            }
        });
    }

    pub(super) fn decode(r: &mut Reader<'_>, base: Lsn) -> Result<Self, Corrupt> {
        let (newest_xid, page_main_bytes) = (r.u32("newest_xid")?.into(), r.u32("page_main_bytes")?);
        let kinds = items(r, 2, |r| Ok((r.u8("xl_rmid")?, r.u8("xl_info")?)))?;
        let records = items(r, 10, |r| {
            let start = get_lsn(r, base)?;
            Ok(StateRecord {
                start,
                end: start.saturating_add(r.varint("record_bytes")?),
                xid: r.u32("xl_xid")?.into(),
                rmid: r.u8("xl_rmid")?,
                info: r.u8("xl_info")?,
                origin: get_option(r, "origin", |r| r.u16("origin"))?,
                main: {
                    let length = r.count(1, "main_data")?;
                    r.take(length, "main_data")?.to_vec()
                },
            })
        })?;
        let head = get_option(r, "head", |r| {
            let (start, xid) = (get_lsn(r, base)?, r.u32("xl_xid")?.into());
            let pages = items(r, 5, |r| Ok((get_relation(r)?, get_fork(r)?, r.varint_u32("block")?)))?;
            Ok(HeadRecord { start, xid, pages })
        })?;
        Ok(Self { newest_xid, kinds, page_main_bytes, records, head })
    }
}
