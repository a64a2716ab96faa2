//! backup_manifest, in which a base backup says what it consists of.

use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use waltide_format::{Lsn, TimelineId};

use super::super::checksum::{Checksum, parse_hex};

/// A backup_manifest whose own checksum was right.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BackupManifest {
    pub(super) files: Vec<ListedFile>,
    /// The WAL that the backup needs, by timeline.
    pub(super) ranges: Vec<WalRange>,
    /// From version 2 on.
    pub(super) system_id: Option<u64>,
}

/// A file that the backup consists of.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ListedFile {
    pub(super) path: String,
    pub(super) bytes: u64,
    pub(super) checksum: Option<Checksum>,
}

/// A stretch of one timeline's WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WalRange {
    pub(super) timeline: TimelineId,
    pub(super) start: Lsn,
    pub(super) end: Lsn,
}

#[derive(Deserialize)]
struct RawManifest {
    #[serde(rename = "PostgreSQL-Backup-Manifest-Version")]
    version: u32,
    #[serde(rename = "System-Identifier")]
    system_id: Option<u64>,
    #[serde(rename = "Files")]
    files: Vec<RawFile>,
    #[serde(rename = "WAL-Ranges")]
    ranges: Vec<RawRange>,
    #[serde(rename = "Manifest-Checksum")]
    checksum: String,
}

#[derive(Deserialize)]
struct RawFile {
    #[serde(rename = "Path")]
    path: Option<String>,
    #[serde(rename = "Encoded-Path")]
    encoded_path: Option<String>,
    #[serde(rename = "Size")]
    size: u64,
    #[serde(rename = "Checksum-Algorithm")]
    algorithm: Option<String>,
    #[serde(rename = "Checksum")]
    checksum: Option<String>,
}

#[derive(Deserialize)]
struct RawRange {
    #[serde(rename = "Timeline")]
    timeline: TimelineId,
    #[serde(rename = "Start-LSN")]
    start: Lsn,
    #[serde(rename = "End-LSN")]
    end: Lsn,
}

impl BackupManifest {
    /// Reads the file. Its last line holds the SHA-256 of all lines before.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let raw: RawManifest = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        if !(1..=2).contains(&raw.version) {
            return Err(format!("its version is {}, only 1 and 2 are known", raw.version));
        }
        let text = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        let covered = text.iter().rposition(|b| *b == b'\n').map_or(0, |at| at.saturating_add(1));
        let digest = Sha256::digest(text.get(..covered).unwrap_or_default());
        if parse_hex(&raw.checksum).as_deref() != Some(digest.as_slice()) {
            return Err("its own checksum is wrong".to_owned());
        }
        let files = raw.files.into_iter().map(ListedFile::new).collect::<Result<Vec<_>, _>>()?;
        let range = |r: RawRange| WalRange { timeline: r.timeline, start: r.start, end: r.end };
        let ranges: Vec<_> = raw.ranges.into_iter().map(range).collect();
        if ranges.is_empty() || ranges.iter().any(|r| r.start >= r.end) {
            return Err("its WAL-Ranges say nothing".to_owned());
        }
        Ok(Self { files, ranges, system_id: raw.system_id })
    }
}

impl ListedFile {
    fn new(raw: RawFile) -> Result<Self, String> {
        let path = match (raw.path, raw.encoded_path) {
            (Some(path), _) => path,
            (None, Some(hex)) => {
                let path = parse_hex(&hex).and_then(|bytes| String::from_utf8(bytes).ok());
                path.ok_or(format!("the path {hex} is not UTF-8"))?
            }
            (None, None) => return Err("a file has no path".to_owned()),
        };
        let checksum = match (raw.algorithm, raw.checksum) {
            (Some(algorithm), Some(value)) => {
                let checksum = Checksum::parse(&algorithm, &value);
                Some(checksum.ok_or(format!("{path} has the checksum {algorithm} {value}, which is none"))?)
            }
            _ => None,
        };
        Ok(Self { path, bytes: raw.size, checksum })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seal(text: &str) -> String {
        let digest: String = Sha256::digest(text).iter().map(|b| format!("{b:02x}")).collect();
        format!("{text}\"Manifest-Checksum\": \"{digest}\"}}\n")
    }

    const TEXT: &str = "{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [\n\
        { \"Path\": \"base/5/1259\", \"Size\": 8192, \"Last-Modified\": \"2026-11-20 19:02:17 GMT\", \
        \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"dd9f0e77\" },\n\
        { \"Encoded-Path\": \"6162\", \"Size\": 0, \"Last-Modified\": \"2026-11-20 19:02:17 GMT\" }\n],\n\
        \"WAL-Ranges\": [\n{ \"Timeline\": 1, \"Start-LSN\": \"0/2000028\", \"End-LSN\": \"0/2000100\" }\n],\n";

    #[test]
    fn a_manifest_is_read() {
        let found = BackupManifest::parse(seal(TEXT).as_bytes()).unwrap();
        assert_eq!(found.files[0].path, "base/5/1259");
        assert_eq!(found.files[0].checksum, Checksum::parse("CRC32C", "dd9f0e77"));
        assert_eq!((found.files[1].path.as_str(), found.files[1].bytes), ("ab", 0));
        assert_eq!(found.files[1].checksum, None);
        let range =
            WalRange { timeline: TimelineId::FIRST, start: 0x200_0028.into(), end: 0x200_0100.into() };
        assert_eq!((found.ranges, found.system_id), (vec![range], None));
    }

    #[test]
    fn a_manifest_that_was_changed_is_refused() {
        let text = seal(TEXT);
        for at in 0..text.len() - 1 {
            let mut changed = text.clone().into_bytes();
            changed[at] ^= 1;
            assert!(BackupManifest::parse(&changed).is_err(), "byte {at}");
            assert!(BackupManifest::parse(&text.as_bytes()[..at]).is_err(), "cut at {at}");
        }
        let newer = seal(&TEXT.replace("Version\": 1", "Version\": 3"));
        assert_eq!(
            BackupManifest::parse(newer.as_bytes()).unwrap_err(),
            "its version is 3, only 1 and 2 are known"
        );
        let empty = seal(&TEXT.replace("0/2000100", "0/2000028"));
        assert_eq!(BackupManifest::parse(empty.as_bytes()).unwrap_err(), "its WAL-Ranges say nothing");
    }
}
