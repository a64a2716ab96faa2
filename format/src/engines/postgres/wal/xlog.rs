//! Records of the log about itself: checkpoints, the end of a recovery, restore points, settings.

use crate::engines::postgres::wal::Record;
use crate::engines::postgres::wal::rmgr::Rmgr;
use crate::error::Corrupt;
use crate::ids::{Lsn, Oid, PgMajor, TimelineId, Xid};
use crate::reader::{Reader, Writer};
use crate::time::TimestampTz;

pub(super) const CHECKPOINT_SHUTDOWN: u8 = 0x00;
const CHECKPOINT_ONLINE: u8 = 0x10;
const NOOP: u8 = 0x20;
const NEXTOID: u8 = 0x30;
pub(super) const SWITCH: u8 = 0x40;
const BACKUP_END: u8 = 0x50;
const PARAMETER_CHANGE: u8 = 0x60;
const RESTORE_POINT: u8 = 0x70;
const FPW_CHANGE: u8 = 0x80;
const END_OF_RECOVERY: u8 = 0x90;
const FPI_FOR_HINT: u8 = 0xA0;
const FPI: u8 = 0xB0;
pub(super) const OVERWRITE_CONTRECORD: u8 = 0xD0;
const CHECKPOINT_REDO: u8 = 0xE0;

/// `MAXFNAMELEN`: the room for a restore point's name.
const RESTORE_POINT_NAME_BYTES: usize = 64;

/// A record of the resource manager XLOG.
#[derive(Debug, Clone, PartialEq)]
pub enum XlogRecord {
    /// A checkpoint at shutdown.
    CheckpointShutdown(Checkpoint),
    /// A checkpoint of a running server.
    CheckpointOnline(Checkpoint),
    /// Where an online checkpoint's redo starts, from 17.
    CheckpointRedo {
        /// `wal_level`.
        wal_level: i32,
    },
    /// Nothing.
    Noop,
    /// Object identifiers up to this one may be used.
    NextOid(Oid),
    /// The rest of the segment is void.
    Switch,
    /// A base backup that started there is complete.
    BackupEnd {
        /// `startpoint`.
        start: Lsn,
    },
    /// Settings that standbys depend on changed.
    ParameterChange(ParameterChange),
    /// `pg_create_restore_point`.
    RestorePoint(RestorePointRecord),
    /// `full_page_writes` changed.
    FullPageWrites(bool),
    /// A recovery ended and its timeline begins.
    EndOfRecovery(EndOfRecovery),
    /// Full-page images, of hint bits or of pages written anew.
    FullPageImage {
        /// Whether for hint bits only.
        for_hint: bool,
    },
    /// The record before was aborted by a crash.
    OverwriteContrecord(OverwriteContrecord),
}

/// `CheckPoint`: the state that a checkpoint writes down, in its record and in pg_control.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    /// `redo`: where a recovery starts.
    pub redo: Lsn,
    /// `ThisTimeLineID`.
    pub timeline: TimelineId,
    /// `PrevTimeLineID`: another one where this record begins a timeline.
    pub previous_timeline: TimelineId,
    /// `fullPageWrites`.
    pub full_page_writes: bool,
    /// `wal_level`, from 17.
    pub wal_level: Option<i32>,
    /// `nextXid`, with the epoch in the upper half.
    pub next_full_xid: u64,
    /// `nextOid`.
    pub next_oid: Oid,
    /// `nextMulti`.
    pub next_multi: u32,
    /// `nextMultiOffset`.
    pub next_multi_offset: u32,
    /// `oldestXid`.
    pub oldest_xid: Xid,
    /// `oldestXidDB`.
    pub oldest_xid_db: Oid,
    /// `oldestMulti`.
    pub oldest_multi: u32,
    /// `oldestMultiDB`.
    pub oldest_multi_db: Oid,
    /// `time`, in Unix seconds.
    pub time_unix_seconds: i64,
    /// `oldestCommitTsXid`.
    pub oldest_commit_ts_xid: Xid,
    /// `newestCommitTsXid`.
    pub newest_commit_ts_xid: Xid,
    /// `oldestActiveXid`; invalid at shutdown.
    pub oldest_active_xid: Xid,
}

impl Checkpoint {
    /// `sizeof(CheckPoint)`, the same from 13 to 18: 17 put `wal_level` into what was padding.
    pub const BYTES: usize = 88;

    /// Decodes it from a record or from pg_control.
    pub fn decode(r: &mut Reader<'_>, major: PgMajor) -> Result<Self, Corrupt> {
        let redo = r.u64("redo")?.into();
        let timeline = r.parse_u32("ThisTimeLineID", TimelineId::new)?;
        let previous_timeline = r.parse_u32("PrevTimeLineID", TimelineId::new)?;
        let full_page_writes = r.u8("fullPageWrites")? != 0;
        r.take(3, "padding")?;
        let at_20 = r.u32("wal_level")?.cast_signed();
        let next_full_xid = r.u64("nextXid")?;
        let next_oid = r.u32("nextOid")?;
        let next_multi = r.u32("nextMulti")?;
        let next_multi_offset = r.u32("nextMultiOffset")?;
        let oldest_xid = r.u32("oldestXid")?.into();
        let oldest_xid_db = r.u32("oldestXidDB")?;
        let oldest_multi = r.u32("oldestMulti")?;
        let oldest_multi_db = r.u32("oldestMultiDB")?;
        r.take(4, "padding")?;
        let time_unix_seconds = r.i64("time")?;
        let oldest_commit_ts_xid = r.u32("oldestCommitTsXid")?.into();
        let newest_commit_ts_xid = r.u32("newestCommitTsXid")?.into();
        let oldest_active_xid = r.u32("oldestActiveXid")?.into();
        r.take(4, "padding")?;
        Ok(Self {
            redo,
            timeline,
            previous_timeline,
            full_page_writes,
            wal_level: (major >= PgMajor::V17).then_some(at_20),
            next_full_xid,
            next_oid,
            next_multi,
            next_multi_offset,
            oldest_xid,
            oldest_xid_db,
            oldest_multi,
            oldest_multi_db,
            time_unix_seconds,
            oldest_commit_ts_xid,
            newest_commit_ts_xid,
            oldest_active_xid,
        })
    }

    /// As a record or pg_control has it.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut w = Writer::new();
        w.u64(self.redo.get()).u32(self.timeline.get()).u32(self.previous_timeline.get());
        w.u8(u8::from(self.full_page_writes)).bytes(&[0; 3]).u32(self.wal_level.unwrap_or(0).cast_unsigned());
        w.u64(self.next_full_xid).u32(self.next_oid).u32(self.next_multi).u32(self.next_multi_offset);
        w.u32(self.oldest_xid.get()).u32(self.oldest_xid_db).u32(self.oldest_multi).u32(self.oldest_multi_db);
        w.u32(0).i64(self.time_unix_seconds);
        w.u32(self.oldest_commit_ts_xid.get()).u32(self.newest_commit_ts_xid.get());
        w.u32(self.oldest_active_xid.get()).u32(0);
        w.into_bytes().try_into().expect("the fields above have that many bytes")
    }

    /// `time` as a moment.
    pub const fn time(&self) -> TimestampTz {
        TimestampTz::from_unix_micros(self.time_unix_seconds.saturating_mul(1_000_000))
    }
}

/// `xl_end_of_recovery`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndOfRecovery {
    /// `end_time`.
    pub time: TimestampTz,
    /// `ThisTimeLineID`.
    pub timeline: TimelineId,
    /// `PrevTimeLineID`.
    pub previous_timeline: TimelineId,
    /// `wal_level`, from 17.
    pub wal_level: Option<i32>,
}

/// `xl_restore_point`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestorePointRecord {
    /// `rp_time`.
    pub time: TimestampTz,
    /// `rp_name`.
    pub name: String,
}

/// `xl_overwrite_contrecord`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OverwriteContrecord {
    /// `overwritten_lsn`: start of the aborted record.
    pub overwritten: Lsn,
    /// `overwrite_time`.
    pub time: TimestampTz,
}

impl OverwriteContrecord {
    pub(super) fn decode(main: &[u8]) -> Result<Self, Corrupt> {
        let r = &mut Reader::new(main);
        Ok(Self { overwritten: r.u64("overwritten_lsn")?.into(), time: read_time(r, "overwrite_time")? })
    }
}

/// `xl_parameter_change`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParameterChange {
    /// `MaxConnections`.
    pub max_connections: i32,
    /// `max_worker_processes`.
    pub max_worker_processes: i32,
    /// `max_wal_senders`.
    pub max_wal_senders: i32,
    /// `max_prepared_xacts`.
    pub max_prepared_xacts: i32,
    /// `max_locks_per_xact`.
    pub max_locks_per_xact: i32,
    /// `wal_level`.
    pub wal_level: i32,
    /// `wal_log_hints`.
    pub wal_log_hints: bool,
    /// `track_commit_timestamp`.
    pub track_commit_timestamp: bool,
}

impl ParameterChange {
    fn decode(r: &mut Reader<'_>) -> Result<Self, Corrupt> {
        Ok(Self {
            max_connections: read_i32(r, "MaxConnections")?,
            max_worker_processes: read_i32(r, "max_worker_processes")?,
            max_wal_senders: read_i32(r, "max_wal_senders")?,
            max_prepared_xacts: read_i32(r, "max_prepared_xacts")?,
            max_locks_per_xact: read_i32(r, "max_locks_per_xact")?,
            wal_level: read_i32(r, "wal_level")?,
            wal_log_hints: r.u8("wal_log_hints")? != 0,
            track_commit_timestamp: r.u8("track_commit_timestamp")? != 0,
        })
    }
}

/// Takes an `int`.
pub(super) fn read_i32(r: &mut Reader<'_>, field: &'static str) -> Result<i32, Corrupt> {
    r.u32(field).map(u32::cast_signed)
}

/// Takes a `TimestampTz`.
pub(super) fn read_time(r: &mut Reader<'_>, field: &'static str) -> Result<TimestampTz, Corrupt> {
    r.i64(field).map(TimestampTz::from_postgres_micros)
}

impl XlogRecord {
    /// Decodes a record of XLOG; `None` for another resource manager's. Errors count bytes from the start
    /// of the main data.
    pub fn decode(record: &Record<'_>) -> Option<Result<Self, Corrupt>> {
        (record.rmgr() == Rmgr::XLOG)
            .then(|| Self::decode_kind(record.kind(), record.main_data(), record.major))
    }

    fn decode_kind(kind: u8, main: &[u8], major: PgMajor) -> Result<Self, Corrupt> {
        let r = &mut Reader::new(main);
        Ok(match kind {
            CHECKPOINT_SHUTDOWN => Self::CheckpointShutdown(Checkpoint::decode(r, major)?),
            CHECKPOINT_ONLINE => Self::CheckpointOnline(Checkpoint::decode(r, major)?),
            NOOP => Self::Noop,
            NEXTOID => Self::NextOid(r.u32("nextOid")?),
            SWITCH => Self::Switch,
            BACKUP_END => Self::BackupEnd { start: r.u64("startpoint")?.into() },
            PARAMETER_CHANGE => Self::ParameterChange(ParameterChange::decode(r)?),
            RESTORE_POINT => {
                let time = read_time(r, "rp_time")?;
                let name = r.take(RESTORE_POINT_NAME_BYTES, "rp_name")?;
                let name = name.split(|b| *b == 0).next().unwrap_or_default();
                Self::RestorePoint(RestorePointRecord {
                    time,
                    name: String::from_utf8_lossy(name).into_owned(),
                })
            }
            FPW_CHANGE => Self::FullPageWrites(r.u8("fullPageWrites")? != 0),
            END_OF_RECOVERY => {
                let time = read_time(r, "end_time")?;
                let timeline = r.parse_u32("ThisTimeLineID", TimelineId::new)?;
                let previous_timeline = r.parse_u32("PrevTimeLineID", TimelineId::new)?;
                let wal_level = if major >= PgMajor::V17 { Some(read_i32(r, "wal_level")?) } else { None };
                Self::EndOfRecovery(EndOfRecovery { time, timeline, previous_timeline, wal_level })
            }
            FPI_FOR_HINT => Self::FullPageImage { for_hint: true },
            FPI => Self::FullPageImage { for_hint: false },
            OVERWRITE_CONTRECORD => Self::OverwriteContrecord(OverwriteContrecord::decode(main)?),
            CHECKPOINT_REDO if major >= PgMajor::V17 => {
                Self::CheckpointRedo { wal_level: read_i32(r, "wal_level")? }
            }
            other => return Err(Corrupt::invalid("xl_info", 0, u64::from(other))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint() -> Vec<u8> {
        let mut w = Writer::new();
        w.u64(0x5000028).u32(2).u32(1).u8(1).bytes(&[0; 3]).u32(2).u64(1 << 32 | 740);
        for v in [16384, 1, 2, 722, 1, 1, 5, 0] {
            w.u32(v);
        }
        w.i64(1_763_659_800).u32(0).u32(0).u32(740).u32(0);
        w.into_bytes()
    }

    #[test]
    fn a_checkpoint_tells_its_wal_level_from_17_on() {
        let bytes = checkpoint();
        assert_eq!(bytes.len(), Checkpoint::BYTES);
        let decode = |major| Checkpoint::decode(&mut Reader::new(&bytes), major).unwrap();
        assert_eq!(decode(PgMajor::V16).wal_level, None);
        let c = decode(PgMajor::V17);
        assert_eq!((c.wal_level, c.next_full_xid, c.oldest_multi_db), (Some(2), 1 << 32 | 740, 5));
        assert_eq!(c.time().to_string(), "2025-11-20 17:30:00+00");
        assert_eq!(c.encode().as_slice(), bytes);
        for cut in 0..bytes.len() {
            assert!(Checkpoint::decode(&mut Reader::new(&bytes[..cut]), PgMajor::V17).is_err());
        }
    }

    #[test]
    fn a_checkpoint_redo_record_is_none_before_17() {
        assert!(XlogRecord::decode_kind(CHECKPOINT_REDO, &[1, 0, 0, 0], PgMajor::V16).is_err());
        let redo = XlogRecord::decode_kind(CHECKPOINT_REDO, &[1, 0, 0, 0], PgMajor::V17).unwrap();
        assert_eq!(redo, XlogRecord::CheckpointRedo { wal_level: 1 });
    }

    #[test]
    fn a_restore_point_ends_at_its_zero_byte() {
        let mut main = 0i64.to_le_bytes().to_vec();
        main.extend_from_slice(b"before migration");
        main.resize(72, 0);
        let point = XlogRecord::decode_kind(RESTORE_POINT, &main, PgMajor::V13).unwrap();
        assert!(matches!(point, XlogRecord::RestorePoint(p) if p.name == "before migration"));
        assert!(XlogRecord::decode_kind(RESTORE_POINT, &main[..71], PgMajor::V13).is_err());
    }
}
