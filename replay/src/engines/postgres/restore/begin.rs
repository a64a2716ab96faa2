//! Puts the timeline that begins at the target into pg_wal, as a server's recovery leaves it there.

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::PathBuf;

use waltide_format::engines::postgres::cluster::History;
use waltide_format::{Corrupt, Lsn, SegmentName, TimelineId, WalFileName};

use super::super::fetch::FetchRequest;
use super::super::forward::{Begun, Ready};
use super::super::indexes::ArchivedIndexes;
use super::super::queue::ReadAhead;
use super::error::io_error;
use super::{Restore, RestoreError, blocking, write};

/// Zeros are written in such pieces.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

impl Restore {
    /// Takes the next number for the timeline that is to begin, where the archive has a history of the one that was planned.
    pub(super) async fn choose_timeline(&self, ready: &mut Ready) -> Result<(), RestoreError> {
        let Some(timeline) = ready.timeline_mut() else { return Ok(()) };
        while self.archive.head(&self.layout.wal_file(WalFileName::History(*timeline))).await?.is_some() {
            let next = timeline.get().checked_add(1).and_then(TimelineId::new);
            *timeline = next.ok_or(RestoreError::NoTimeline)?;
        }
        Ok(())
    }

    /// Writes the log from where the timeline begins, in segments of its own, and its history. The first segment holds what
    /// its ancestor's holds before that place.
    pub(super) async fn begin_timeline(
        &self,
        place: &write::Place,
        begun: &Begun,
    ) -> Result<(), RestoreError> {
        let size = self.manifest.segment_size;
        let (mut at, mut bytes) = (begun.at, begun.bytes.as_slice());
        let mut before = self.segment_before(begun).await?;
        while !bytes.is_empty() {
            let name = SegmentName::containing(begun.timeline, at, size);
            let room = size.bytes().saturating_sub(before.len() as u64);
            let (here, rest) = bytes.split_at(bytes.len().min(usize::try_from(room).unwrap_or(usize::MAX)));
            before.extend_from_slice(here);
            blocking(|| self.begin_segment(place, name, &before))?;
            if before.len() as u64 == size.bytes() {
                // The server goes on behind it.
                self.make_ready(place, &name.to_string())?;
            }
            at = at.saturating_add(here.len() as u64);
            bytes = rest;
            before.clear();
        }
        let parent = self.history_before(place, begun.before).await?;
        let history = parent.branch(begun.timeline, begun.at, &begun.reason);
        let text = history.expect("its number is higher than all in the archive").to_text();
        let name = WalFileName::History(begun.timeline).to_string();
        blocking(|| {
            place.put(&format!("pg_wal/{name}"), text.as_bytes(), self.file_mode())?;
            self.make_ready(place, &name)?;
            // What an earlier shutdown left is of another state.
            place.remove("pg_stat/pgstat.stat")
        })
    }

    /// Says that the server is to archive a file of pg_wal.
    fn make_ready(&self, place: &write::Place, name: &str) -> Result<(), RestoreError> {
        match self.options.archive_off {
            true => Ok(()),
            false => place.put(&format!("pg_wal/archive_status/{name}.ready"), b"", self.file_mode()),
        }
    }

    /// What the segment in which the timeline begins holds before that.
    async fn segment_before(&self, begun: &Begun) -> Result<Vec<u8>, RestoreError> {
        let Some(entry) = &begun.segment else { return Ok(Vec::new()) };
        let into = begun.at.bytes_since(self.manifest.segment_size.floor(begun.at));
        let into = usize::try_from(into).unwrap_or(usize::MAX);
        let mut wal = ArchivedIndexes::new(self.archive.clone())
            .wal(entry)
            .await
            .map_err(|e| RestoreError::Forward(e.into()))?;
        if wal.len() < into {
            let source = Corrupt::too_large("valid_end", 0, into as u64, wal.len() as u64);
            return Err(self.damaged(Some(&entry.path), source));
        }
        wal.truncate(into);
        Ok(wal)
    }

    /// Makes a segment's file of what it begins with, and zeros.
    fn begin_segment(
        &self,
        place: &write::Place,
        name: SegmentName,
        begin: &[u8],
    ) -> Result<(), RestoreError> {
        let path = place.path(&format!("pg_wal/{name}"));
        let write = || -> io::Result<()> {
            let mut options = fs::OpenOptions::new();
            let file = options.write(true).create(true).truncate(true).mode(0o600).open(&path)?;
            file.set_permissions(fs::Permissions::from_mode(self.file_mode()))?;
            file.write_all_at(begin, 0)?;
            // No hole: a server that finds the disk full in a segment's midst ends.
            let (mut at, end) = (begin.len() as u64, self.manifest.segment_size.bytes());
            while at < end {
                let left = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX);
                let zeros = ZEROS.get(..left).unwrap_or(&ZEROS);
                file.write_all_at(zeros, at)?;
                at = at.saturating_add(zeros.len() as u64);
            }
            Ok(())
        };
        write().map_err(io_error("write", &path))?;
        place.own(&path)
    }

    /// The history of a timeline that the archive has.
    async fn history_before(
        &self,
        place: &write::Place,
        timeline: TimelineId,
    ) -> Result<History, RestoreError> {
        let begins = self.plan.lineage.newest_first().find(|(t, ..)| *t == timeline);
        if begins.is_none_or(|(_, begin, _)| begin == Lsn::ZERO) {
            return Ok(History::root(timeline));
        }
        let name = WalFileName::History(timeline);
        let to = format!("pg_wal/{name}");
        let request = FetchRequest {
            name,
            dest: PathBuf::from(&to),
            data_dir: self.options.data_dir.clone(),
            system_id: Some(self.plan.system_id),
            ahead: ReadAhead { segments: 0, bytes: 0 },
        };
        self.fetcher.fetch(&request).await?;
        let path = place.path(&to);
        let text = fs::read(&path).map_err(io_error("read", &path))?;
        // The new one's says all that it says.
        place.remove(&to)?;
        History::parse(timeline, &text).map_err(|e| RestoreError::History { name, source: e })
    }
}
