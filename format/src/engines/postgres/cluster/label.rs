//! backup_label and tablespace_map: where recovery from a base backup begins, and where its tablespaces lay.

use std::fmt;

use crate::ids::{Lsn, Oid, TimelineId};

/// What backup_label says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupLabel {
    /// START WAL LOCATION: the redo point, where replay begins.
    pub start_lsn: Lsn,
    /// CHECKPOINT LOCATION: the checkpoint's record.
    pub checkpoint_lsn: Lsn,
    /// BACKUP METHOD.
    pub method: String,
    /// Whether BACKUP FROM says standby.
    pub from_standby: bool,
    /// LABEL.
    pub label: String,
    /// START TIMELINE.
    pub timeline: TimelineId,
    /// INCREMENTAL FROM LSN: the files are only what pg_combinebackup puts together.
    pub incremental_from: Option<Lsn>,
}

/// A backup_label or tablespace_map that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LabelError {
    file: &'static str,
    missing: &'static str,
}

impl fmt::Display for LabelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} has no usable {}", self.file, self.missing)
    }
}

impl std::error::Error for LabelError {}

impl BackupLabel {
    /// Reads the file's text.
    pub fn parse(text: &str) -> Result<Self, LabelError> {
        let line = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let missing = |missing| LabelError { file: "backup_label", missing };
        let start = line("START WAL LOCATION").and_then(|rest| rest.split(' ').next()?.parse().ok());
        let checkpoint = line("CHECKPOINT LOCATION").and_then(|rest| rest.trim().parse().ok());
        // The label's own text comes before the timeline, and may be anything.
        let timeline = text.lines().rev().find_map(|line| line.strip_prefix("START TIMELINE: "));
        Ok(Self {
            start_lsn: start.ok_or(missing("START WAL LOCATION"))?,
            checkpoint_lsn: checkpoint.ok_or(missing("CHECKPOINT LOCATION"))?,
            method: line("BACKUP METHOD").ok_or(missing("BACKUP METHOD"))?.to_owned(),
            from_standby: line("BACKUP FROM") == Some("standby"),
            label: line("LABEL").unwrap_or_default().to_owned(),
            timeline: timeline.and_then(|rest| rest.parse().ok()).ok_or(missing("START TIMELINE"))?,
            incremental_from: line("INCREMENTAL FROM LSN").and_then(|rest| rest.trim().parse().ok()),
        })
    }
}

/// Reads tablespace_map: an OID and a path a line; `\` stands before a line end, a carriage return and itself.
pub fn parse_tablespace_map(text: &str) -> Result<Vec<(Oid, String)>, LabelError> {
    let wrong = || LabelError { file: "tablespace_map", missing: "OID and path" };
    let mut found = Vec::new();
    let mut chars = text.chars().peekable();
    while chars.peek().is_some() {
        let mut line = String::new();
        while let Some(c) = chars.next() {
            match c {
                '\\' => line.push(chars.next().ok_or_else(wrong)?),
                '\n' => break,
                c => line.push(c),
            }
        }
        let (oid, path) = line.split_once(' ').ok_or_else(wrong)?;
        let oid = oid.parse().ok().filter(|oid| *oid > 0).ok_or_else(wrong)?;
        if path.is_empty() {
            return Err(wrong());
        }
        found.push((oid, path.to_owned()));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\n\
        CHECKPOINT LOCATION: 0/2000060\nBACKUP METHOD: streamed\nBACKUP FROM: primary\n\
        START TIME: 2026-01-31 23:59:59 GMT\nLABEL: nightly\nSTART TIMELINE: 3\n";

    #[test]
    fn a_label_is_read() {
        let label = BackupLabel::parse(TEXT).unwrap();
        assert_eq!((label.start_lsn, label.checkpoint_lsn), (0x200_0028.into(), 0x200_0060.into()));
        assert_eq!((label.timeline.get(), label.label.as_str(), label.from_standby), (3, "nightly", false));
        assert_eq!(label.incremental_from, None);
        let standby = TEXT.replace("primary", "standby");
        assert!(BackupLabel::parse(&standby).unwrap().from_standby);
        let incremental = format!("{TEXT}INCREMENTAL FROM LSN: 0/1000028\nINCREMENTAL FROM TLI: 1\n");
        assert_eq!(BackupLabel::parse(&incremental).unwrap().incremental_from, Some(0x100_0028.into()));
    }

    #[test]
    fn a_label_without_what_recovery_needs_is_refused() {
        for missing in ["START WAL LOCATION", "CHECKPOINT LOCATION", "BACKUP METHOD", "START TIMELINE"] {
            let text = TEXT.replace(missing, "ELSE");
            let err = BackupLabel::parse(&text).unwrap_err().to_string();
            assert_eq!(err, format!("backup_label has no usable {missing}"));
        }
    }

    #[test]
    fn a_tablespace_map_is_read_with_its_escapes() {
        let text = "16400 /a b/c\n16401 /new\\\nline\\\\x\n";
        let expected = vec![(16400, "/a b/c".to_owned()), (16401, "/new\nline\\x".to_owned())];
        assert_eq!(parse_tablespace_map(text), Ok(expected));
        assert_eq!(parse_tablespace_map(""), Ok(Vec::new()));
        for bad in ["16400\n", "x /a\n", "0 /a\n", "16400 \n", "\n", "16400 /a\\"] {
            assert!(parse_tablespace_map(bad).is_err(), "{bad:?}");
        }
    }
}
