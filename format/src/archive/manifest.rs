//! What a backup is: everything a restore needs to know that is not in the packs. And the archive's other JSON.

use serde::{Deserialize, Serialize};

use super::chain::{ChainHead, ChainStart};
use crate::error::Corrupt;
use crate::ids::{BackupId, Lsn, Oid, PgMajor, SystemId, TimelineId};
use crate::segment::{SegmentName, SegmentSize};
use crate::time::TimestampTz;

use super::{Envelope, ObjectKind};

/// `waltide.json`: the archive itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaltideInfo {
    /// The version of docs/format.md the archive follows.
    pub format_version: u32,
    /// A random number in hexadecimal that tells this archive from a copy of another's name.
    pub archive_id: String,
    /// When it was made.
    pub created: TimestampTz,
}

/// `cluster.json`: one database in the archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterInfo {
    /// The engine: `postgres`.
    pub engine: String,
    /// When it was made.
    pub created: TimestampTz,
}

/// `system.json`: one life of a cluster, from `initdb` or `pg_upgrade` on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemInfo {
    /// `system_identifier`.
    pub system_id: SystemId,
    /// The major version.
    pub major: PgMajor,
    /// `block_size`.
    pub block_bytes: u32,
    /// `wal_segment_size`.
    pub segment_size: SegmentSize,
    /// When it was added.
    pub created: TimestampTz,
}

/// How a backup came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackupKind {
    /// Everything was read.
    Full,
    /// What changed since the last backup was read.
    Incremental,
    /// What changed since the last full was read.
    Differential,
    /// Archived WAL was replayed onto an older backup, and what that changed was stored.
    Advanced,
}

/// Who made a backup's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackupMethod {
    /// `waltide backup`.
    Backup,
    /// `waltide import`, out of a pg_basebackup.
    Import,
    /// `waltide advance`, out of an older backup and archived WAL.
    Advance,
}

/// A tablespace apart from the two of the data directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tablespace {
    /// `pg_tablespace.oid`, the name of its link in pg_tblspc.
    pub oid: Oid,
    /// Where it lay.
    pub path: String,
}

/// A directory of the backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestDirectory {
    /// Relative to the data directory; a tablespace's under `pg_tblspc/<oid>`.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
}

/// A file of the backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    /// Relative to the data directory; a tablespace's under `pg_tblspc/<oid>`.
    pub path: String,
    /// Its length.
    pub bytes: u64,
    /// Permission bits.
    pub mode: u32,
    /// Seconds since 1970 of its last modification.
    pub modified: i64,
    /// Where its blocks lie: map (by its place in [`Manifest::maps`]) and file number in it, oldest first; a later
    /// one's blocks replace an earlier one's. Blocks that none has, up to `bytes`, are zeros.
    pub extents: Vec<(u32, u32)>,
}

/// A configuration file from outside the data directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigFile {
    /// Its absolute path.
    pub path: String,
    /// Which setting named it: `config_file`, `hba_file`, `ident_file`, or `include`.
    pub role: String,
    /// Permission bits.
    pub mode: u32,
    /// Its text.
    pub contents: String,
}

/// What making a backup took.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct ManifestStats {
    /// Bytes of all its files.
    pub cluster_bytes: u64,
    /// Bytes read from them.
    pub read_bytes: u64,
    /// Bytes of them that were not read: older backups' packs have them.
    #[serde(default)]
    pub referred_bytes: u64,
    /// Bytes added to the archive.
    pub stored_bytes: u64,
    /// Seconds from start to the last file.
    pub copy_seconds: f64,
    /// Seconds from start to end.
    pub total_seconds: f64,
}

/// The hash chain over a backup's WAL, as it was when the backup was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupChain {
    /// The segment that the backup starts in.
    pub first: SegmentName,
    /// The chain before it: prune may remove all that comes before.
    pub start: ChainStart,
    /// Its head behind the last segment that the backup needs.
    pub head: ChainHead,
}

/// A backup: it restores on its own, whatever it refers to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Its name.
    pub id: BackupId,
    /// How it came to be.
    pub kind: BackupKind,
    /// Who made its files.
    pub method: BackupMethod,
    /// What it was made against.
    pub parent: Option<BackupId>,
    /// Why everything was read though less was asked for.
    #[serde(default)]
    pub full_because: Option<String>,
    /// The operator's words.
    #[serde(default)]
    pub description: Option<String>,
    /// When it started, by the clock of the machine that made it.
    pub started: TimestampTz,
    /// When its last file was read.
    pub stopped: TimestampTz,
    /// The cluster.
    pub system_id: SystemId,
    /// The major version.
    pub major: PgMajor,
    /// `server_version`.
    pub server_version: String,
    /// `wal_segment_size`.
    pub segment_size: SegmentSize,
    /// Whether pages carry checksums.
    pub data_checksums: bool,
    /// The timeline it started on.
    pub timeline: TimelineId,
    /// START WAL LOCATION: where replay must begin.
    pub start_lsn: Lsn,
    /// Where the backup ended: no target lies before.
    pub stop_lsn: Lsn,
    /// CHECKPOINT LOCATION.
    pub checkpoint_lsn: Lsn,
    /// backup_label, as PostgreSQL gave it.
    pub backup_label: String,
    /// tablespace_map, as PostgreSQL gave it; empty without tablespaces.
    pub tablespace_map: String,
    /// Whether it was taken from a standby.
    #[serde(default)]
    pub from_standby: bool,
    /// Tablespaces.
    pub tablespaces: Vec<Tablespace>,
    /// Configuration files from outside the data directory.
    #[serde(default)]
    pub config_files: Vec<ConfigFile>,
    /// The names of the extent maps, oldest first.
    pub maps: Vec<String>,
    /// Directories, parents before children.
    pub directories: Vec<ManifestDirectory>,
    /// Files, by path.
    pub files: Vec<ManifestFile>,
    /// Pages whose checksum was wrong when they were read, as `path:block`.
    #[serde(default)]
    pub damaged_pages: Vec<String>,
    /// The hash chain over its WAL, where it could be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chain: Option<BackupChain>,
    /// What it took.
    pub stats: ManifestStats,
}

impl Manifest {
    /// The object's bytes.
    pub fn encode(&self) -> Vec<u8> {
        Envelope::seal_json(ObjectKind::Manifest, self)
    }

    /// Reads the object, and refuses a manifest whose paths leave the data directory or whose extents name no map.
    pub fn decode(object: &[u8]) -> Result<Self, Corrupt> {
        Self::check(Envelope::open_json(object, ObjectKind::Manifest)?)
    }

    /// Reads the JSON inside the object, and refuses what [`Manifest::decode`] does.
    pub fn from_json(json: &str) -> Result<Self, Corrupt> {
        let parsed = serde_json::from_str(json);
        Self::check(parsed.map_err(|e| Corrupt::invalid("json", 0, e.column() as u64))?)
    }

    fn check(manifest: Self) -> Result<Self, Corrupt> {
        let maps = manifest.maps.len() as u64;
        for (i, file) in (0u64..).zip(&manifest.files) {
            if !is_inside(&file.path) {
                return Err(Corrupt::invalid("files.path", i, 0));
            }
            if let Some((map, _)) = file.extents.iter().find(|(map, _)| u64::from(*map) >= maps) {
                return Err(Corrupt::too_large("files.extents", i, u64::from(*map), maps.saturating_sub(1)));
            }
        }
        for (i, directory) in (0u64..).zip(&manifest.directories) {
            if !is_inside(&directory.path) {
                return Err(Corrupt::invalid("directories.path", i, 0));
            }
        }
        Ok(manifest)
    }
}

/// Whether a relative path stays below where it is put.
fn is_inside(path: &str) -> bool {
    !path.is_empty() && !path.contains('\0') && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// `<id>.started`: a backup that is being made, announced before it refers to anything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartedBackup {
    /// The backup.
    pub id: BackupId,
    /// When it started.
    pub started: TimestampTz,
    /// The machine.
    pub host: String,
    /// The process there.
    pub pid: u32,
    /// The kind asked for.
    pub kind: BackupKind,
    /// The backup it refers to, which must stay.
    pub parent: Option<BackupId>,
}

/// `pruning/<id>`: what a prune is about to remove. Whoever refers to a backup announces that first and looks for
/// these afterwards; a prune writes this first and looks for references afterwards: one of the two sees the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PruneMark {
    /// When it was written.
    pub started: TimestampTz,
    /// The machine.
    pub host: String,
    /// The process there.
    pub pid: u32,
    /// The backups that are about to go.
    pub backups: Vec<BackupId>,
}

/// `ledger/<id>`: what a run of `verify` checked, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LedgerRecord {
    /// Its name.
    pub id: String,
    /// When it started.
    pub started: TimestampTz,
    /// How long it took.
    pub seconds: f64,
    /// Whether only names, lengths, directories and gaps were looked at.
    pub quick: bool,
    /// What was checked to its end.
    pub units: Vec<LedgerUnit>,
}

/// A part of an archive that is verified as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerUnit {
    /// `backup/<id>`, `wal/<first segment of a span>` or `rest`.
    pub name: String,
    /// Objects read.
    pub objects: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Faults found.
    pub faults: u64,
}

/// What a drill restored, checked and measured. A drill that failed is recorded too, with as much as it found out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DrillRecord {
    /// Its name: when it started and four hexadecimal digits.
    pub id: String,
    /// The first drill of the call that made it, where that call made several.
    #[serde(default)]
    pub series: Option<String>,
    /// When it started.
    pub started: TimestampTz,
    /// When it ended.
    pub ended: TimestampTz,
    /// The machine it ran on.
    #[serde(default)]
    pub host: String,
    /// How it went.
    pub verdict: DrillVerdict,
    /// Why it ended early, if it did.
    #[serde(default)]
    pub error: Option<String>,
    /// The target, in words.
    pub target: String,
    /// What chose the target, where chance did.
    #[serde(default)]
    pub seed: Option<u64>,
    /// The backup restored; none where no plan could be made.
    pub backup: Option<BackupId>,
    /// The version of the server that was started.
    #[serde(default)]
    pub server_version: Option<String>,
    /// The timeline that recovery followed.
    #[serde(default)]
    pub timeline: Option<TimelineId>,
    /// Where recovery ended.
    pub end_lsn: Option<Lsn>,
    /// The last commit recovered, as the index knows it.
    #[serde(default)]
    pub last_commit: Option<DrillCommit>,
    /// The phases, in order.
    pub phases: Vec<DrillPhase>,
    /// The checks, in order.
    pub checks: Vec<DrillCheck>,
    /// Recovery time: seconds from the start until the server answered at the target.
    pub rto_seconds: Option<f64>,
    /// Recovery point: seconds between the last commit recovered and the moment asked for (or the start, for `latest`).
    pub rpo_seconds: Option<f64>,
    /// Bytes restored from the base backup.
    pub restored_bytes: u64,
    /// How many files that were; 0 where it was not noted.
    #[serde(default)]
    pub restored_files: u64,
    /// Bytes of WAL between the base backup's start and the target.
    pub wal_bytes: u64,
    /// The segments they lay in; 0 where it was not noted.
    #[serde(default)]
    pub segments: u64,
    /// Of `wal_bytes`, what was replayed natively: its time is part of the restore's.
    #[serde(default)]
    pub native_bytes: u64,
    /// Settings that the backup brought along and the scratch server did not get.
    #[serde(default)]
    pub settings: Vec<DrillSetting>,
    /// What a reader of the result should know.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// How a drill went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrillVerdict {
    /// Everything held.
    Passed,
    /// Something did not hold that the archive cannot be blamed for: a check, the machine, the installation.
    Failed,
    /// The archive is damaged or incomplete, or what came out of it is.
    ArchiveAtFault,
}

impl DrillVerdict {
    /// Whether everything held.
    pub const fn passed(self) -> bool {
        matches!(self, Self::Passed)
    }

    /// The graver of two.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::ArchiveAtFault, _) | (_, Self::ArchiveAtFault) => Self::ArchiveAtFault,
            (Self::Failed, _) | (_, Self::Failed) => Self::Failed,
            (Self::Passed, Self::Passed) => Self::Passed,
        }
    }
}

/// A commit that a drill looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrillCommit {
    /// The transaction.
    pub xid: u32,
    /// End of its commit record.
    pub lsn: Lsn,
    /// When it was committed.
    pub time: TimestampTz,
}

/// One phase of a drill.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DrillPhase {
    /// Its name.
    pub name: String,
    /// How long it took.
    pub seconds: f64,
}

/// One check of a drill.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DrillCheck {
    /// What was checked.
    pub name: String,
    /// Whether it held.
    pub outcome: DrillOutcome,
    /// What was found.
    pub detail: String,
    /// How long it took.
    #[serde(default)]
    pub seconds: f64,
}

/// Whether a check held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrillOutcome {
    /// It held.
    Passed,
    /// It did not.
    Failed,
    /// It could not be made, for the reason given.
    Skipped,
}

/// A setting of the cluster that a scratch server did not get.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrillSetting {
    /// Its name.
    pub name: String,
    /// Its value in the cluster.
    pub found: String,
    /// Its value in the scratch server.
    pub used: String,
}

impl DrillRecord {
    /// The object's bytes.
    pub fn encode(&self) -> Vec<u8> {
        Envelope::seal_json(ObjectKind::Json, self)
    }

    /// Reads the object.
    pub fn decode(object: &[u8]) -> Result<Self, Corrupt> {
        Envelope::open_json(object, ObjectKind::Json)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            id: "20260131T235959Z-1f4e".parse().unwrap(),
            kind: BackupKind::Full,
            method: BackupMethod::Backup,
            parent: None,
            full_because: None,
            description: Some("before the move".into()),
            started: TimestampTz::default(),
            stopped: TimestampTz::default(),
            system_id: 7.into(),
            major: PgMajor::V15,
            server_version: "15.18".into(),
            segment_size: SegmentSize::DEFAULT,
            data_checksums: true,
            timeline: TimelineId::FIRST,
            start_lsn: Lsn::from(0x200_0028),
            stop_lsn: Lsn::from(0x200_0100),
            checkpoint_lsn: Lsn::from(0x200_0060),
            backup_label: "START WAL LOCATION".into(),
            tablespace_map: String::new(),
            from_standby: false,
            tablespaces: Vec::new(),
            config_files: Vec::new(),
            maps: vec!["20260131T235959Z-1f4e".into()],
            directories: vec![ManifestDirectory { path: "base".into(), mode: 0o700 }],
            files: vec![ManifestFile {
                path: "base/5/1259".into(),
                bytes: 8192,
                mode: 0o600,
                modified: 0,
                extents: vec![(0, 0)],
            }],
            damaged_pages: Vec::new(),
            chain: None,
            stats: ManifestStats::default(),
        }
    }

    #[test]
    fn a_manifest_comes_back_and_every_flip_and_truncation_is_refused() {
        let object = manifest().encode();
        assert_eq!(Manifest::decode(&object), Ok(manifest()));
        for i in 0..object.len() {
            let mut bad = object.clone();
            bad[i] ^= 1;
            assert!(Manifest::decode(&bad).is_err(), "byte {i}");
            assert!(Manifest::decode(&object[..i]).is_err(), "cut at {i}");
        }
    }

    #[test]
    fn a_manifest_that_writes_outside_the_data_directory_is_refused() {
        for path in ["../etc/passwd", "/etc/passwd", "base//x", "base/./x", "", "a/../../b"] {
            let mut bad = manifest();
            bad.files[0].path = path.into();
            assert!(Manifest::decode(&bad.encode()).is_err(), "{path}");
        }
        let mut bad = manifest();
        bad.files[0].extents = vec![(1, 0)];
        let err = Manifest::decode(&bad.encode()).unwrap_err();
        assert_eq!(err.to_string(), "files.extents at byte 0 is 1, more than the 0 allowed");
    }
}
