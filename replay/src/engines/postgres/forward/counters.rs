//! What a checkpoint says of a cluster besides its place, followed record by record as PostgreSQL's recovery does it: the
//! numbers that are given out next, and the oldest that are still needed. Pure. Facts: docs/wal.md, "The start of a timeline".

use waltide_format::engines::postgres::wal::{
    Checkpoint, MultiXactRecord, Record, Rmgr, XactKind, XactRecord, XlogRecord,
};
use waltide_format::{Corrupt, Oid, Xid};

const COMMIT_TS_TRUNCATE: u8 = 0x10;

/// See the module.
#[derive(Debug)]
pub(super) struct Counters {
    now: Checkpoint,
    tracks_timestamps: bool,
}

/// Whether a multixact or a member's number came before another, in the half circle.
const fn comes_before(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() < 0
}

/// Whether a record besides those that change state is needed for [`Counters`].
pub(super) fn counts(record: &Record<'_>) -> bool {
    let xlog = XlogRecord::decode(record);
    matches!(xlog, Some(Ok(XlogRecord::NextOid(_) | XlogRecord::FullPageWrites(_))))
}

impl Counters {
    /// What the checkpoint says that recovery begins with. `tracks_timestamps` as pg_control has it there.
    pub(super) fn new(checkpoint: Checkpoint, tracks_timestamps: bool) -> Self {
        let mut counters = Self { now: checkpoint, tracks_timestamps: false };
        counters.track(tracks_timestamps);
        counters
    }

    /// A transaction has written something.
    pub(super) fn saw(&mut self, xid: Xid) {
        let next = self.next_xid();
        if !xid.is_normal() || xid.precedes(next) {
            return;
        }
        let after = xid.next();
        let epoch = self.now.next_full_xid >> 32;
        let epoch = if after.get() < next.get() { epoch.saturating_add(1) } else { epoch };
        self.now.next_full_xid = epoch << 32 | u64::from(after.get());
    }

    fn next_xid(&self) -> Xid {
        Xid::from((self.now.next_full_xid & 0xFFFF_FFFF) as u32)
    }

    /// Takes a record into account that changes state, or [`counts`]. The transactions that wrote anything before it are known.
    pub(super) fn follow(&mut self, record: &Record<'_>) -> Result<(), Corrupt> {
        if let Some(xact) = XactRecord::decode(record) {
            let xact = xact?;
            self.saw(xact.xid);
            xact.subxacts.iter().for_each(|xid| self.saw(*xid));
            if matches!(xact.kind, XactKind::Commit | XactKind::CommitPrepared) {
                self.has_time(xact.subxacts.last().copied().unwrap_or(xact.xid));
            }
        }
        match XlogRecord::decode(record).transpose()? {
            Some(XlogRecord::CheckpointShutdown(found)) => {
                self.now.next_full_xid = found.next_full_xid;
                self.now.next_oid = found.next_oid;
                (self.now.next_multi, self.now.next_multi_offset) =
                    (found.next_multi, found.next_multi_offset);
                self.needs_multis(found.oldest_multi, found.oldest_multi_db);
                (self.now.oldest_xid, self.now.oldest_xid_db) = (found.oldest_xid, found.oldest_xid_db);
            }
            Some(XlogRecord::CheckpointOnline(found)) => {
                self.now.next_full_xid = self.now.next_full_xid.max(found.next_full_xid);
                self.made_multi(found.next_multi, found.next_multi_offset);
                self.needs_multis(found.oldest_multi, found.oldest_multi_db);
                if self.now.oldest_xid.precedes(found.oldest_xid) {
                    (self.now.oldest_xid, self.now.oldest_xid_db) = (found.oldest_xid, found.oldest_xid_db);
                }
            }
            Some(XlogRecord::NextOid(oid)) => self.now.next_oid = oid,
            Some(XlogRecord::FullPageWrites(on)) => self.now.full_page_writes = on,
            Some(XlogRecord::ParameterChange(settings)) => self.track(settings.track_commit_timestamp),
            _ => {}
        }
        match MultiXactRecord::decode(record).transpose()? {
            Some(MultiXactRecord::Create { multi, offset, members }) => {
                let count = u32::try_from(members.len()).unwrap_or(u32::MAX);
                self.made_multi(multi.wrapping_add(1), offset.wrapping_add(count));
                members.iter().for_each(|(xid, _)| self.saw(*xid));
            }
            Some(MultiXactRecord::Truncate { oldest_multi_db, offsets: (_, end), .. }) => {
                (self.now.oldest_multi, self.now.oldest_multi_db) = (end, oldest_multi_db);
            }
            None => {}
        }
        if record.rmgr() == Rmgr::COMMIT_TS && record.kind() == COMMIT_TS_TRUNCATE {
            // pageno, oldestXid
            let oldest = record.main_data().get(4..).and_then(|rest| rest.first_chunk::<4>());
            let oldest = oldest.ok_or(Corrupt::invalid("oldestXid", 4, record.main_data().len() as u64))?;
            let oldest = Xid::from(u32::from_le_bytes(*oldest));
            if !self.now.oldest_commit_ts_xid.is_invalid() && self.now.oldest_commit_ts_xid.precedes(oldest) {
                self.now.oldest_commit_ts_xid = oldest;
            }
        }
        Ok(())
    }

    /// What a checkpoint at this moment says, but for its place and time.
    pub(super) const fn now(&self) -> Checkpoint {
        self.now
    }

    fn made_multi(&mut self, next: u32, offset: u32) {
        if comes_before(self.now.next_multi, next) {
            self.now.next_multi = next;
        }
        if comes_before(self.now.next_multi_offset, offset) {
            self.now.next_multi_offset = offset;
        }
    }

    fn needs_multis(&mut self, oldest: u32, db: Oid) {
        if comes_before(self.now.oldest_multi, oldest) {
            (self.now.oldest_multi, self.now.oldest_multi_db) = (oldest, db);
        }
    }

    /// The transaction's commit timestamp is kept, where any is.
    fn has_time(&mut self, xid: Xid) {
        if self.tracks_timestamps && self.now.newest_commit_ts_xid.precedes(xid) {
            self.now.newest_commit_ts_xid = xid;
        }
    }

    fn track(&mut self, on: bool) {
        let before = std::mem::replace(&mut self.tracks_timestamps, on);
        if on && !before && self.now.oldest_commit_ts_xid.is_invalid() {
            let next = self.next_xid();
            (self.now.oldest_commit_ts_xid, self.now.newest_commit_ts_xid) = (next, next);
        }
        if before && !on {
            (self.now.oldest_commit_ts_xid, self.now.newest_commit_ts_xid) = (Xid::INVALID, Xid::INVALID);
        }
    }
}

#[cfg(test)]
mod tests {
    use waltide_format::{Lsn, PgMajor, TimelineId};

    use super::*;
    use crate::testing::with_record;

    const XLOG: u8 = 0;
    const XACT: u8 = 1;
    const MULTIXACT: u8 = 6;
    const COMMIT_TS: u8 = 18;

    fn checkpoint() -> Checkpoint {
        Checkpoint {
            redo: Lsn::from(0x1000),
            timeline: TimelineId::FIRST,
            previous_timeline: TimelineId::FIRST,
            full_page_writes: true,
            wal_level: None,
            next_full_xid: 5 << 32 | 700,
            next_oid: 20_000,
            next_multi: 7,
            next_multi_offset: 20,
            oldest_xid: Xid::from(600),
            oldest_xid_db: 1,
            oldest_multi: 3,
            oldest_multi_db: 1,
            time_unix_seconds: 0,
            oldest_commit_ts_xid: Xid::INVALID,
            newest_commit_ts_xid: Xid::INVALID,
            oldest_active_xid: Xid::INVALID,
        }
    }

    /// What is said after a record, which transaction 740 wrote.
    fn followed(counters: &mut Counters, (rmid, info): (u8, u8), main: &[u8]) -> Checkpoint {
        with_record((PgMajor::V15, rmid, info), None, main, |record| counters.follow(record)).unwrap();
        counters.now()
    }

    fn words(fields: &[u32]) -> Vec<u8> {
        fields.iter().flat_map(|field| field.to_le_bytes()).collect()
    }

    fn commit(subxacts: &[u32]) -> Vec<u8> {
        let count = u32::try_from(subxacts.len()).unwrap();
        [&[0; 8], words(&[2, count]).as_slice(), &words(subxacts)].concat()
    }

    #[test]
    fn the_next_transaction_is_behind_all_that_were_seen_and_goes_around() {
        let next = u64::from(u32::MAX) - 1;
        let mut counters = Counters::new(Checkpoint { next_full_xid: 5 << 32 | next, ..checkpoint() }, false);
        for (seen, expected) in [
            (0, 5 << 32 | next),
            (2, 5 << 32 | next),
            (u32::MAX - 2, 5 << 32 | next),
            (u32::MAX - 1, 5 << 32 | u64::from(u32::MAX)),
            // 0 to 2 are no transactions.
            (u32::MAX, 6 << 32 | 3),
            (u32::MAX - 5, 6 << 32 | 3),
            (9, 6 << 32 | 10),
            (8, 6 << 32 | 10),
        ] {
            counters.saw(Xid::from(seen));
            assert_eq!(counters.now().next_full_xid, expected, "{seen}");
        }
        let now = followed(&mut counters, (XACT, 0x80), &commit(&[750, 760]));
        assert_eq!(now.next_full_xid, 6 << 32 | 761);
    }

    #[test]
    fn checkpoints_say_what_records_do_not() {
        let mut counters = Counters::new(checkpoint(), false);
        let higher = Checkpoint {
            next_full_xid: 5 << 32 | 900,
            next_oid: 30_000,
            next_multi: 9,
            next_multi_offset: 40,
            oldest_xid: Xid::from(650),
            oldest_xid_db: 4,
            oldest_multi: 5,
            oldest_multi_db: 4,
            ..checkpoint()
        };
        let online = followed(&mut counters, (XLOG, 0x10), &higher.encode());
        assert_eq!(online, Checkpoint { next_oid: 20_000, ..higher });
        let now = followed(&mut counters, (XLOG, 0x10), &checkpoint().encode());
        assert_eq!(now, online, "a lower one changes nothing");
        assert_eq!(followed(&mut counters, (XLOG, 0x30), &words(&[28_192])).next_oid, 28_192);
        assert!(!followed(&mut counters, (XLOG, 0x80), &[0]).full_page_writes);
        // The numbers that were set aside and not given out come back.
        let shutdown = Checkpoint { next_oid: 20_005, next_full_xid: 5 << 32 | 901, ..higher };
        let now = followed(&mut counters, (XLOG, 0x00), &shutdown.encode());
        assert_eq!(now, Checkpoint { full_page_writes: false, ..shutdown });
    }

    #[test]
    fn multixacts_go_around_with_their_members() {
        let start = Checkpoint { next_multi: u32::MAX, next_multi_offset: u32::MAX, ..checkpoint() };
        let mut counters = Counters::new(start, false);
        let made = words(&[u32::MAX, u32::MAX, 2, 741, 1, 742, 2]);
        let now = followed(&mut counters, (MULTIXACT, 0x20), &made);
        assert_eq!((now.next_multi, now.next_multi_offset, now.next_full_xid), (0, 1, 5 << 32 | 743));
        // One that was given out before, and written later.
        let made = words(&[u32::MAX - 1, u32::MAX - 2, 1, 741, 1]);
        let now = followed(&mut counters, (MULTIXACT, 0x20), &made);
        assert_eq!((now.next_multi, now.next_multi_offset), (0, 1));
        let now = followed(&mut counters, (MULTIXACT, 0x30), &words(&[16_384, 3, 6, 1, 9]));
        assert_eq!((now.oldest_multi, now.oldest_multi_db), (6, 16_384));
    }

    #[test]
    fn commit_timestamps_are_counted_while_they_are_kept() {
        let mut counters = Counters::new(checkpoint(), false);
        let times = |now: Checkpoint| (now.oldest_commit_ts_xid.get(), now.newest_commit_ts_xid.get());
        let switched = |on: u8| [words(&[100, 8, 10, 0, 64, 1]).as_slice(), &[0, on]].concat();
        assert_eq!(times(followed(&mut counters, (XACT, 0x00), &[0; 8])), (0, 0));
        assert_eq!(times(followed(&mut counters, (XLOG, 0x60), &switched(1))), (741, 741));
        assert_eq!(times(followed(&mut counters, (XACT, 0x80), &commit(&[745, 750]))), (741, 750));
        assert_eq!(times(followed(&mut counters, (XACT, 0x20), &[0; 8])), (741, 750), "an abort has none");
        assert_eq!(times(followed(&mut counters, (COMMIT_TS, 0x10), &words(&[0, 745]))), (745, 750));
        assert_eq!(times(followed(&mut counters, (XLOG, 0x60), &switched(1))), (745, 750));
        assert_eq!(times(followed(&mut counters, (XLOG, 0x60), &switched(0))), (0, 0));
        assert_eq!(times(followed(&mut counters, (XLOG, 0x60), &switched(1))), (751, 751));
    }
}
