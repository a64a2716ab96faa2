//! What a base backup says about itself: backup_label, tablespace_map, and the backup history file.

use std::fmt;

use crate::ids::{Lsn, Oid, TimelineId};
use crate::segment::SegmentName;

/// `backup_label`: where recovery from a base backup begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupLabel {
    /// `START WAL LOCATION`: the redo point of its checkpoint, where replay begins.
    pub start_lsn: Lsn,
    /// The segment that holds it.
    pub start_segment: SegmentName,
    /// `CHECKPOINT LOCATION`: the checkpoint's record.
    pub checkpoint_lsn: Lsn,
    /// `BACKUP METHOD`: `streamed`, before 15 also `pg_start_backup`; with `pg_rewind` replay awaits no
    /// end-of-backup record.
    pub method: String,
    /// `BACKUP FROM`: whether a standby.
    pub from_standby: bool,
    /// `START TIME`, in the server's log_timezone.
    pub start_time: String,
    /// `LABEL`.
    pub label: String,
    /// `START TIMELINE`.
    pub timeline: TimelineId,
    /// `INCREMENTAL FROM LSN`, from 17: the files are only what pg_combinebackup puts together.
    pub incremental_from: Option<Lsn>,
}

/// `<segment>.<offset>.backup`: archived when a base backup ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupHistory {
    /// `START WAL LOCATION`.
    pub start_lsn: Lsn,
    /// The segment that holds it.
    pub start_segment: SegmentName,
    /// `STOP WAL LOCATION`: a cluster made of the backup is consistent from there on.
    pub stop_lsn: Lsn,
    /// The segment that holds it.
    pub stop_segment: SegmentName,
    /// `CHECKPOINT LOCATION`.
    pub checkpoint_lsn: Lsn,
    /// `BACKUP FROM`: whether a standby.
    pub from_standby: bool,
    /// `START TIME`, in the server's log_timezone.
    pub start_time: String,
    /// `STOP TIME`, in the server's log_timezone.
    pub stop_time: String,
    /// `LABEL`.
    pub label: String,
    /// `START TIMELINE`.
    pub timeline: TimelineId,
    /// `STOP TIMELINE`.
    pub stop_timeline: Option<TimelineId>,
}

/// A line that is missing or not of its form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelError {
    key: &'static str,
    found: Option<String>,
}

impl LabelError {
    fn new(key: &'static str, found: Option<&str>) -> Self {
        Self { key, found: found.map(|f| f.chars().take(80).collect()) }
    }
}

impl fmt::Display for LabelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.found {
            Some(found) => write!(f, "{} is {found:?}, which is not its form", self.key),
            None => write!(f, "{} is missing", self.key),
        }
    }
}

impl std::error::Error for LabelError {}

/// The lines of such a file, each `KEY: value`. The label is its user's and may hold lines that look like
/// others, so what stands before it is the first of its key, what stands behind it the last.
struct Lines<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Lines<'a> {
    fn new(text: &'a str) -> Self {
        let line = |line: &'a str| line.trim_end_matches('\r').split_once(": ");
        Self(text.lines().filter_map(line).collect())
    }

    fn before_label(&self, key: &str) -> Option<&'a str> {
        self.0.iter().find(|(k, _)| *k == key).map(|(_, v)| *v)
    }

    fn behind_label(&self, key: &str) -> Option<&'a str> {
        self.0.iter().rev().find(|(k, _)| *k == key).map(|(_, v)| *v)
    }

    fn lsn(&self, key: &'static str) -> Result<Lsn, LabelError> {
        read(key, self.before_label(key), |text| text.parse().ok())
    }

    /// Reads `0/2000028 (file 000000010000000000000002)`.
    fn location(&self, key: &'static str) -> Result<(Lsn, SegmentName), LabelError> {
        read(key, self.before_label(key), |text| {
            let (lsn, file) = text.split_once(" (file ")?;
            Some((lsn.parse().ok()?, file.strip_suffix(')')?.parse().ok()?))
        })
    }

    fn text(&self, key: &str) -> String {
        self.before_label(key).unwrap_or_default().to_owned()
    }

    fn is_from_standby(&self) -> bool {
        self.before_label("BACKUP FROM") == Some("standby")
    }

    fn timeline(&self, key: &'static str) -> Result<TimelineId, LabelError> {
        read(key, self.behind_label(key), |text| text.parse().ok())
    }
}

/// Reads a value that must be there.
fn read<T>(
    key: &'static str,
    found: Option<&str>,
    read: impl FnOnce(&str) -> Option<T>,
) -> Result<T, LabelError> {
    found.and_then(|found| read(found.trim())).ok_or_else(|| LabelError::new(key, found))
}

impl BackupLabel {
    /// Reads the file's text.
    pub fn parse(text: &str) -> Result<Self, LabelError> {
        let lines = Lines::new(text);
        let (start_lsn, start_segment) = lines.location("START WAL LOCATION")?;
        let incremental = lines.behind_label("INCREMENTAL FROM LSN");
        Ok(Self {
            start_lsn,
            start_segment,
            checkpoint_lsn: lines.lsn("CHECKPOINT LOCATION")?,
            method: read("BACKUP METHOD", lines.before_label("BACKUP METHOD"), |text| Some(text.to_owned()))?,
            from_standby: lines.is_from_standby(),
            start_time: lines.text("START TIME"),
            label: lines.text("LABEL"),
            timeline: lines.timeline("START TIMELINE")?,
            incremental_from: match incremental {
                Some(_) => Some(read("INCREMENTAL FROM LSN", incremental, |text| text.parse().ok())?),
                None => None,
            },
        })
    }

    /// The file's text, as PostgreSQL writes and reads it.
    pub fn to_text(&self) -> String {
        let one_line = |text: &str| text.replace(['\n', '\r'], " ");
        let from = if self.from_standby { "standby" } else { "primary" };
        let mut out = format!(
            "START WAL LOCATION: {} (file {})\nCHECKPOINT LOCATION: {}\nBACKUP METHOD: {}\nBACKUP FROM: {from}\n\
             START TIME: {}\nLABEL: {}\nSTART TIMELINE: {}\n",
            self.start_lsn,
            self.start_segment,
            self.checkpoint_lsn,
            one_line(&self.method),
            one_line(&self.start_time),
            one_line(&self.label),
            self.timeline,
        );
        if let Some(lsn) = self.incremental_from {
            out.push_str(&format!("INCREMENTAL FROM LSN: {lsn}\n"));
        }
        out
    }
}

impl BackupHistory {
    /// Reads the file.
    pub fn parse(text: &[u8]) -> Result<Self, LabelError> {
        let text = String::from_utf8_lossy(text);
        let lines = Lines::new(&text);
        let (start_lsn, start_segment) = lines.location("START WAL LOCATION")?;
        let (stop_lsn, stop_segment) = lines.location("STOP WAL LOCATION")?;
        let stop_timeline = lines.behind_label("STOP TIMELINE").map(|_| lines.timeline("STOP TIMELINE"));
        Ok(Self {
            start_lsn,
            start_segment,
            stop_lsn,
            stop_segment,
            checkpoint_lsn: lines.lsn("CHECKPOINT LOCATION")?,
            from_standby: lines.is_from_standby(),
            start_time: lines.text("START TIME"),
            stop_time: lines.behind_label("STOP TIME").unwrap_or_default().to_owned(),
            label: lines.text("LABEL"),
            timeline: lines.timeline("START TIMELINE")?,
            stop_timeline: stop_timeline.transpose()?,
        })
    }
}

/// Reads `tablespace_map`: an OID, a space and a path a line; a backslash stands before a line end, a
/// carriage return and itself.
pub fn parse_tablespace_map(text: &str) -> Result<Vec<(Oid, String)>, LabelError> {
    let (mut links, mut line, mut chars) = (Vec::new(), String::new(), text.chars());
    loop {
        let c = chars.next();
        match c {
            Some('\\') => line.extend(chars.next()),
            None | Some('\n') => {
                if !line.is_empty() {
                    links.push(tablespace(&line)?);
                    line.clear();
                }
                if c.is_none() {
                    return Ok(links);
                }
            }
            Some(c) => line.push(c),
        }
    }
}

fn tablespace(line: &str) -> Result<(Oid, String), LabelError> {
    let link = line.split_once(' ').and_then(|(oid, path)| {
        let oid: Oid = oid.parse().ok().filter(|oid| *oid > 0)?;
        (!path.is_empty()).then(|| (oid, path.to_owned()))
    });
    link.ok_or_else(|| LabelError::new("a line of tablespace_map", Some(line)))
}

/// The text of `tablespace_map`.
pub fn tablespace_map_text<'a>(links: impl IntoIterator<Item = (Oid, &'a str)>) -> String {
    let mut out = String::new();
    for (oid, path) in links {
        out.push_str(&format!("{oid} "));
        for c in path.chars() {
            if matches!(c, '\n' | '\r' | '\\') {
                out.push('\\');
            }
            out.push(c);
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LABEL: &str = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)
CHECKPOINT LOCATION: 0/2000060
BACKUP METHOD: streamed
BACKUP FROM: primary
START TIME: 2026-01-31 12:00:00 UTC
LABEL: nightly: the second
START TIMELINE: 1
";

    #[test]
    fn a_label_is_read_and_written_as_postgresql_does() {
        let label = BackupLabel::parse(LABEL).unwrap();
        assert_eq!((label.start_lsn, label.method.as_str()), (Lsn::from(0x200_0028), "streamed"));
        assert_eq!((label.from_standby, label.label.as_str()), (false, "nightly: the second"));
        assert_eq!(label.to_text(), LABEL);
        let incremental = BackupLabel::parse(&format!("{LABEL}INCREMENTAL FROM LSN: 0/1000028\n")).unwrap();
        assert_eq!(incremental.incremental_from, Some(Lsn::from(0x100_0028)));
    }

    #[test]
    fn a_label_cannot_speak_for_other_lines() {
        let label = LABEL.replace("nightly", "x\nSTART TIMELINE: 9\nBACKUP METHOD: pg_rewind\ny");
        let label = BackupLabel::parse(&label).unwrap();
        assert_eq!((label.timeline, label.method.as_str()), (TimelineId::FIRST, "streamed"));
    }

    #[test]
    fn a_line_that_is_missing_or_wrong_is_named() {
        for key in ["START WAL LOCATION", "CHECKPOINT LOCATION", "BACKUP METHOD", "START TIMELINE"] {
            let missing = BackupLabel::parse(&LABEL.replace(key, "ELSE")).unwrap_err();
            assert_eq!(missing.to_string(), format!("{key} is missing"));
        }
        let wrong = BackupLabel::parse(&LABEL.replace("0/2000060", "nowhere")).unwrap_err();
        assert_eq!(wrong.to_string(), "CHECKPOINT LOCATION is \"nowhere\", which is not its form");
        for text in ["16400", "0 /path", "x /path", "16400 "] {
            assert!(parse_tablespace_map(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_backup_history_file_tells_where_the_backup_stops() {
        let stop = "STOP WAL LOCATION: 0/3000050 (file 000000010000000000000003)\nCHECKPOINT";
        let text =
            LABEL.replace("CHECKPOINT", stop) + "STOP TIME: 2026-01-31 12:05:00 UTC\nSTOP TIMELINE: 1\n";
        let h = BackupHistory::parse(text.as_bytes()).unwrap();
        assert_eq!((h.stop_lsn, h.stop_timeline), (Lsn::from(0x300_0050), Some(TimelineId::FIRST)));
        assert_eq!(h.stop_segment.to_string(), "000000010000000000000003");
        assert!(BackupHistory::parse(LABEL.as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn a_tablespace_map_comes_back(links in proptest::collection::vec((1u32.., "[a-z/\\\\ \n\r]{1,20}"), 0..5)) {
            let text = tablespace_map_text(links.iter().map(|(oid, path)| (*oid, path.as_str())));
            prop_assert_eq!(parse_tablespace_map(&text), Ok(links));
        }

        #[test]
        fn any_text_is_a_label_or_an_error(text in "(START|STOP|WAL|LOCATION|[ :\n/0-9A-Fa-z()]){0,60}") {
            let _ = BackupLabel::parse(&text);
            let _ = BackupHistory::parse(text.as_bytes());
            let _ = parse_tablespace_map(&text);
        }
    }
}
