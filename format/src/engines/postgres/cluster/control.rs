//! `global/pg_control`: what state a cluster is in. Layout: docs/wal.md, "pg_control".

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::engines::postgres::wal::{Checkpoint, ParameterChange};
use crate::error::Corrupt;
use crate::ids::{Lsn, PgMajor, SystemId, TimelineId};
use crate::reader::Reader;
use crate::segment::SegmentSize;
use crate::time::TimestampTz;

/// `FirstNormalUnloggedLSN`.
const FIRST_UNLOGGED_LSN: u64 = 1000;

/// `state`: what the cluster was last seen doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClusterState {
    /// Starting up.
    Startup,
    /// Shut down in order.
    ShutDown,
    /// Shut down in order while recovering.
    ShutDownInRecovery,
    /// Shutting down.
    ShuttingDown,
    /// Recovering from a crash.
    InCrashRecovery,
    /// Recovering from an archive, or following a primary.
    InArchiveRecovery,
    /// Running; or it was when it was killed.
    InProduction,
}

impl ClusterState {
    fn new(v: u32) -> Option<Self> {
        Some(match v {
            0 => Self::Startup,
            1 => Self::ShutDown,
            2 => Self::ShutDownInRecovery,
            3 => Self::ShuttingDown,
            4 => Self::InCrashRecovery,
            5 => Self::InArchiveRecovery,
            6 => Self::InProduction,
            _ => return None,
        })
    }
}

impl fmt::Display for ClusterState {
    /// As pg_controldata prints it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Startup => "starting up",
            Self::ShutDown => "shut down",
            Self::ShutDownInRecovery => "shut down in recovery",
            Self::ShuttingDown => "shutting down",
            Self::InCrashRecovery => "in crash recovery",
            Self::InArchiveRecovery => "in archive recovery",
            Self::InProduction => "in production",
        })
    }
}

/// The settings that a standby needs at least as large as its primary's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecoverySettings {
    /// `wal_level`: 0 minimal, 1 replica, 2 logical.
    pub wal_level: i32,
    /// `wal_log_hints`.
    pub wal_log_hints: bool,
    /// `max_connections`.
    pub max_connections: i32,
    /// `max_worker_processes`.
    pub max_worker_processes: i32,
    /// `max_wal_senders`.
    pub max_wal_senders: i32,
    /// `max_prepared_xacts`.
    pub max_prepared_xacts: i32,
    /// `max_locks_per_xact`.
    pub max_locks_per_xact: i32,
    /// `track_commit_timestamp`.
    pub track_commit_timestamp: bool,
}

/// `ControlFileData`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ControlFile {
    /// `system_identifier`.
    pub system_id: SystemId,
    /// The major version that `pg_control_version` and `catalog_version_no` belong to.
    pub major: PgMajor,
    /// `pg_control_version`.
    pub control_version: u32,
    /// `catalog_version_no`.
    pub catalog_version: u32,
    /// `state`.
    pub state: ClusterState,
    /// `time` of the last update, in Unix seconds.
    pub time_unix_seconds: i64,
    /// `checkPoint`: start of the last checkpoint's record.
    pub checkpoint: Lsn,
    /// `checkPointCopy`.
    pub checkpoint_copy: Checkpoint,
    /// `unloggedLSN`.
    pub unlogged_lsn: Lsn,
    /// `minRecoveryPoint`: replay must come this far before the cluster is consistent.
    pub min_recovery_point: Lsn,
    /// `minRecoveryPointTLI`.
    pub min_recovery_timeline: Option<TimelineId>,
    /// `backupStartPoint`: of the backup that is being recovered.
    pub backup_start: Lsn,
    /// `backupEndPoint`.
    pub backup_end: Lsn,
    /// `backupEndRequired`.
    pub backup_end_required: bool,
    /// The settings that a standby needs.
    pub settings: RecoverySettings,
    /// `blcksz`.
    pub block_bytes: u32,
    /// `relseg_size`: blocks in a file of a large relation.
    pub relation_file_blocks: u32,
    /// `xlog_blcksz`.
    pub wal_block_bytes: u32,
    /// `xlog_seg_size`.
    pub segment_size: SegmentSize,
    /// `data_checksum_version`: zero where pages carry none.
    pub data_checksum_version: u32,
}

/// A pg_control that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControlError {
    /// It is damaged, or torn by a write at the same moment: read it again.
    Corrupt(Corrupt),
    /// It is of a version that is not supported.
    UnknownVersion {
        /// `pg_control_version`.
        control: u32,
        /// `catalog_version_no`.
        catalog: u32,
    },
}

impl fmt::Display for ControlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Corrupt(corrupt) => corrupt.fmt(f),
            Self::UnknownVersion { control, catalog } => {
                write!(
                    f,
                    "pg_control version {control} with catalog version {catalog} is not of PostgreSQL 13 to 18"
                )
            }
        }
    }
}

impl std::error::Error for ControlError {}

impl From<Corrupt> for ControlError {
    fn from(corrupt: Corrupt) -> Self {
        Self::Corrupt(corrupt)
    }
}

/// `catalog_version_no` of each major's releases, and its `pg_control_version`: 13 to 16 share one.
const VERSIONS: [(PgMajor, u32, u32); 6] = [
    (PgMajor::V13, 1300, 202_007_201),
    (PgMajor::V14, 1300, 202_107_181),
    (PgMajor::V15, 1300, 202_209_061),
    (PgMajor::V16, 1300, 202_307_071),
    (PgMajor::V17, 1700, 202_406_281),
    (PgMajor::V18, 1800, 202_506_291),
];

impl ControlFile {
    /// The file's size; what lies behind the data is zeros.
    pub const FILE_BYTES: usize = 8192;
    /// Where the checkpoint's copy lies.
    const CHECKPOINT_OFFSET: usize = 40;

    /// Decodes the file. Its CRC is checked first: the server rewrites the file in place, so a reader beside
    /// it may see a torn one.
    pub fn decode(bytes: &[u8]) -> Result<Self, ControlError> {
        let r = &mut Reader::new(bytes);
        let system_id = SystemId::from(r.u64("system_identifier")?);
        let control_version = r.u32("pg_control_version")?;
        let catalog_version = r.u32("catalog_version_no")?;
        let known = VERSIONS.iter().find(|(_, c, v)| (*c, *v) == (control_version, catalog_version));
        let major = known.map(|(major, _, _)| *major);
        let unknown = ControlError::UnknownVersion { control: control_version, catalog: catalog_version };
        let major = major.ok_or(unknown)?;
        check_crc(bytes, major)?;

        let state = r.parse_u32("state", ClusterState::new)?;
        r.take(4, "padding")?;
        let time_unix_seconds = r.i64("time")?;
        let checkpoint = r.u64("checkPoint")?.into();
        let checkpoint_copy = Checkpoint::decode(r, major)?;
        let unlogged_lsn = r.u64("unloggedLSN")?.into();
        let min_recovery_point = r.u64("minRecoveryPoint")?.into();
        let min_recovery_timeline = TimelineId::new(r.u32("minRecoveryPointTLI")?);
        r.take(4, "padding")?;
        let backup_start = r.u64("backupStartPoint")?.into();
        let backup_end = r.u64("backupEndPoint")?.into();
        let backup_end_required = read_bool(r, "backupEndRequired")?;
        let settings = RecoverySettings {
            wal_level: r.u32("wal_level")?.cast_signed(),
            wal_log_hints: read_bool(r, "wal_log_hints")?,
            max_connections: r.u32("MaxConnections")?.cast_signed(),
            max_worker_processes: r.u32("max_worker_processes")?.cast_signed(),
            max_wal_senders: r.u32("max_wal_senders")?.cast_signed(),
            max_prepared_xacts: r.u32("max_prepared_xacts")?.cast_signed(),
            max_locks_per_xact: r.u32("max_locks_per_xact")?.cast_signed(),
            track_commit_timestamp: read_bool(r, "track_commit_timestamp")?,
        };
        r.take(4 + 8, "maxAlign, floatFormat")?;
        let block_bytes = r.u32("blcksz")?;
        let relation_file_blocks = r.u32("relseg_size")?;
        let wal_block_bytes = r.u32("xlog_blcksz")?;
        let segment_size = r.parse_u32("xlog_seg_size", |v| SegmentSize::new(u64::from(v)))?;
        r.take(4 * 5, "nameDataLen, indexMaxKeys, toast_max_chunk_size, loblksize, float8ByVal")?;
        let data_checksum_version = r.u32("data_checksum_version")?;
        Ok(Self {
            system_id,
            major,
            control_version,
            catalog_version,
            state,
            time_unix_seconds,
            checkpoint,
            checkpoint_copy,
            unlogged_lsn,
            min_recovery_point,
            min_recovery_timeline,
            backup_start,
            backup_end,
            backup_end_required,
            settings,
            block_bytes,
            relation_file_blocks,
            wal_block_bytes,
            segment_size,
            data_checksum_version,
        })
    }

    /// `time` as a moment.
    pub const fn time(&self) -> TimestampTz {
        TimestampTz::from_unix_micros(self.time_unix_seconds.saturating_mul(1_000_000))
    }

    /// Whether data pages carry checksums.
    pub const fn has_data_checksums(&self) -> bool {
        self.data_checksum_version != 0
    }

    /// Whether the server was shut down in order and stopped since.
    pub const fn is_shut_down(&self) -> bool {
        matches!(self.state, ClusterState::ShutDown | ClusterState::ShutDownInRecovery)
    }

    /// The checkpoint's copy as it lies in the file, for a pg_control made anew.
    pub fn checkpoint_bytes(file: &[u8]) -> Option<&[u8; Checkpoint::BYTES]> {
        file.get(Self::CHECKPOINT_OFFSET..)?.first_chunk()
    }
}

/// What pg_control says of a cluster whose files were brought to a checkpoint's redo point without a server.
#[derive(Debug, Clone, Copy)]
pub struct HandOver<'a> {
    /// Start of the checkpoint's record.
    pub checkpoint: Lsn,
    /// The checkpoint as its record has it.
    pub checkpoint_bytes: &'a [u8; Checkpoint::BYTES],
    /// Its redo point: what the files are.
    pub redo: Lsn,
    /// The timeline of the last byte before the redo point.
    pub timeline: TimelineId,
    /// The last change of settings before the redo point.
    pub settings: Option<ParameterChange>,
}

impl HandOver<'_> {
    /// Rewrites a pg_control in the form that pg_rewind leaves it in: recovery goes on from the checkpoint, and the
    /// cluster is consistent from its redo point on. `file` is a pg_control that was decoded.
    pub fn rewrite(&self, file: &[u8], major: PgMajor) -> Result<Vec<u8>, ControlError> {
        let state = [(16, &2u32.to_le_bytes()[..]), (32, &self.checkpoint.get().to_le_bytes())];
        let consistent =
            [(136, &self.redo.get().to_le_bytes()[..]), (144, &self.timeline.get().to_le_bytes())];
        let copy = [(ControlFile::CHECKPOINT_OFFSET, &self.checkpoint_bytes[..])];
        rewritten(file, major, &[&state[..], &copy, &consistent].concat(), self.settings)
    }
}

/// What pg_control says of a cluster that was shut down: its files hold all that its log says.
#[derive(Debug, Clone, Copy)]
pub struct CleanEnd {
    /// The checkpoint that it was shut down with; its record starts at its redo point.
    pub checkpoint: Checkpoint,
    /// The last change of settings before it.
    pub settings: Option<ParameterChange>,
}

impl CleanEnd {
    /// Rewrites a pg_control in the form that a server leaves it in. `file` is a pg_control that was decoded.
    pub fn rewrite(&self, file: &[u8], major: PgMajor) -> Result<Vec<u8>, ControlError> {
        let (time, copy) = (self.checkpoint.time_unix_seconds.to_le_bytes(), self.checkpoint.encode());
        let redo = self.checkpoint.redo.get().to_le_bytes();
        let fields = [
            (16, &1u32.to_le_bytes()[..]),
            (24, &time),
            (32, &redo),
            (ControlFile::CHECKPOINT_OFFSET, &copy),
            (128, &FIRST_UNLOGGED_LSN.to_le_bytes()),
            // minRecoveryPoint and its timeline
            (136, &[0; 12]),
        ];
        rewritten(file, major, &fields, self.settings)
    }
}

/// A pg_control with other bytes in these places, without what it says of a backup's start and end, its CRC right.
fn rewritten(
    file: &[u8],
    major: PgMajor,
    fields: &[(usize, &[u8])],
    settings: Option<ParameterChange>,
) -> Result<Vec<u8>, ControlError> {
    let mut out = file.to_vec();
    let mut put = |at: usize, bytes: &[u8]| {
        let end = at.saturating_add(bytes.len());
        let place =
            out.get_mut(at..end).ok_or(Corrupt::invalid("pg_control", at as u64, file.len() as u64))?;
        place.copy_from_slice(bytes);
        Ok::<_, Corrupt>(())
    };
    for (at, bytes) in fields {
        put(*at, bytes)?;
    }
    // backupStartPoint, backupEndPoint, backupEndRequired
    put(152, &[0; 17])?;
    if let Some(settings) = settings {
        put(172, &settings.wal_level.to_le_bytes())?;
        put(176, &[u8::from(settings.wal_log_hints)])?;
        put(180, &settings.max_connections.to_le_bytes())?;
        put(184, &settings.max_worker_processes.to_le_bytes())?;
        put(188, &settings.max_wal_senders.to_le_bytes())?;
        put(192, &settings.max_prepared_xacts.to_le_bytes())?;
        put(196, &settings.max_locks_per_xact.to_le_bytes())?;
        put(200, &[u8::from(settings.track_commit_timestamp)])?;
    }
    let at = crc_offset(major);
    let crc = out.get(..at).map(crc32c::crc32c).unwrap_or_default();
    let end = at.saturating_add(4);
    let place = out.get_mut(at..end).ok_or(Corrupt::invalid("pg_control", at as u64, file.len() as u64))?;
    place.copy_from_slice(&crc.to_le_bytes());
    ControlFile::decode(&out)?;
    Ok(out)
}

/// Takes a `bool` and the padding behind it.
fn read_bool(r: &mut Reader<'_>, field: &'static str) -> Result<bool, Corrupt> {
    let at = r.position();
    let found = r.u8(field)?;
    r.take(3, "padding")?;
    match found {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(Corrupt::invalid(field, at, u64::from(other))),
    }
}

/// Where the CRC lies: 18 put `default_char_signedness` before the nonce.
const fn crc_offset(major: PgMajor) -> usize {
    if major.get() >= 18 { 292 } else { 288 }
}

fn check_crc(bytes: &[u8], major: PgMajor) -> Result<(), Corrupt> {
    let at = crc_offset(major);
    let mut r = Reader::new(bytes);
    let covered = r.take(at, "ControlFileData")?;
    let found = r.u32("crc")?;
    let computed = crc32c::crc32c(covered);
    if found == computed {
        return Ok(());
    }
    Err(Corrupt::mismatch("crc", at as u64, u64::from(found), u64::from(computed)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of each major, made by its own initdb (tests/golden), is read in the tests of the workspace;
    /// here is one put together by hand.
    fn file(major: PgMajor) -> Vec<u8> {
        let (_, control, catalog) = VERSIONS.into_iter().find(|(m, _, _)| *m == major).unwrap();
        let mut w = crate::reader::Writer::new();
        w.u64(77).u32(control).u32(catalog).u32(6).u32(0).i64(1_763_659_800).u64(0x200_0060);
        w.u64(0x200_0028).u32(1).u32(1).u8(1).bytes(&[0; 7]).u64(740);
        w.bytes(&[0; 28]).bytes(&[0; 4]).i64(1_763_659_800).bytes(&[0; 16]);
        w.u64(1000).u64(0).u32(0).u32(0).u64(0).u64(0).u32(0);
        w.u32(1).u32(0).u32(100).u32(8).u32(10).u32(0).u32(64).u32(0);
        w.u32(8).u64(0).u32(8192).u32(131_072).u32(8192).u32(16 << 20);
        w.bytes(&[0; 20]).u32(1);
        let mut bytes = w.into_bytes();
        bytes.resize(crc_offset(major), 0);
        let crc = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes.resize(ControlFile::FILE_BYTES, 0);
        bytes
    }

    #[test]
    fn a_control_file_of_each_major_is_read_and_every_changed_byte_is_noticed() {
        for (major, _) in PgMajor::ALL {
            let bytes = file(major);
            let c = ControlFile::decode(&bytes).unwrap();
            assert_eq!(
                (c.major, c.state, c.segment_size),
                (major, ClusterState::InProduction, SegmentSize::DEFAULT)
            );
            assert_eq!(
                (c.checkpoint_copy.redo, c.checkpoint_copy.next_full_xid),
                (Lsn::from(0x200_0028), 740)
            );
            assert_eq!((c.settings.max_connections, c.has_data_checksums()), (100, true));
            for at in 0..crc_offset(major) + 4 {
                let mut changed = bytes.clone();
                changed[at] ^= 0x40;
                assert!(ControlFile::decode(&changed).is_err(), "{major} byte {at}");
                assert!(ControlFile::decode(&bytes[..at]).is_err(), "{major} cut {at}");
            }
        }
    }

    #[test]
    fn a_version_that_is_not_supported_is_named() {
        let mut bytes = file(PgMajor::V15);
        bytes[8..12].copy_from_slice(&1200u32.to_le_bytes());
        let err = ControlFile::decode(&bytes).unwrap_err();
        assert_eq!(
            err.to_string(),
            "pg_control version 1200 with catalog version 202209061 is not of PostgreSQL 13 to 18"
        );
    }

    #[test]
    fn a_cluster_is_handed_over_at_a_checkpoint() {
        for (major, _) in PgMajor::ALL {
            let before = file(major);
            let copy = *ControlFile::checkpoint_bytes(&before).unwrap();
            let settings = ParameterChange {
                max_connections: 11,
                max_worker_processes: 12,
                max_wal_senders: 13,
                max_prepared_xacts: 14,
                max_locks_per_xact: 15,
                wal_level: 2,
                wal_log_hints: true,
                track_commit_timestamp: true,
            };
            let over = HandOver {
                checkpoint: Lsn::from(0x300_0060),
                checkpoint_bytes: &copy,
                redo: Lsn::from(0x300_0028),
                timeline: TimelineId::FIRST,
                settings: Some(settings),
            };
            let c = ControlFile::decode(&over.rewrite(&before, major).unwrap()).unwrap();
            assert_eq!((c.state, c.checkpoint), (ClusterState::ShutDownInRecovery, over.checkpoint));
            assert_eq!((c.min_recovery_point, c.min_recovery_timeline), (over.redo, Some(over.timeline)));
            assert_eq!((c.backup_start, c.backup_end, c.backup_end_required), (Lsn::ZERO, Lsn::ZERO, false));
            let s = c.settings;
            assert_eq!((s.max_connections, s.max_worker_processes, s.max_wal_senders), (11, 12, 13));
            assert_eq!((s.max_prepared_xacts, s.max_locks_per_xact, s.wal_level), (14, 15, 2));
            assert!(s.wal_log_hints && s.track_commit_timestamp);
            assert!(over.rewrite(&before[..100], major).is_err());

            let handed_over = over.rewrite(&before, major).unwrap();
            let c = ControlFile::decode(&handed_over).unwrap();
            let checkpoint = Checkpoint { redo: Lsn::from(0x500_0028), ..c.checkpoint_copy };
            let ended = CleanEnd { checkpoint, settings: None }.rewrite(&handed_over, major).unwrap();
            let e = ControlFile::decode(&ended).unwrap();
            assert_eq!(
                (e.state, e.checkpoint, e.checkpoint_copy),
                (ClusterState::ShutDown, checkpoint.redo, checkpoint)
            );
            assert_eq!((e.min_recovery_point, e.min_recovery_timeline), (Lsn::ZERO, None));
            assert_eq!(e.settings, s);
            assert_eq!(ended[128..136], 1000u64.to_le_bytes());
        }
    }
}
