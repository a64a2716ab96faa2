//! The copies of a segment that the archive has, and whether an incoming one is of the same log as they are.
//!
//! Several servers may push the same segments: a standby with `archive_mode=always` beside its primary, a promoted one
//! beside the old primary, which has half of a segment as `.partial`. As long as they are of one log, whoever comes
//! first is as good as any, and the longest copy is the one that is read. Where they are not, both are named.

use bytes::Bytes;
use waltide_format::archive::{
    Ending, PushSource, SegmentDirectory, SegmentInfo, StoredSegment, SystemLayout, WalObject,
    continuity_fault,
};
use waltide_format::engines::postgres::cluster::{History, HistoryEntry};
use waltide_format::engines::postgres::scan::{Agreement, agreement};
use waltide_format::{Corrupt, SegmentName, TimelineId, WalFileName};
use waltide_storage::Archive;

use super::parting::Parting;
use super::push::{OBJECT_BYTES_MAX, PushError, blocking};
use super::wal_dir::WalDir;

/// Holds the directory and footer of a stored segment of up to 512 MiB.
const DIRECTORY_BYTES: u64 = 8 << 10;
/// Holds what a segment's index says first as well, but for a segment with very many restore points.
const SUMMARY_BYTES: u64 = 16 << 10;

/// A segment or `.partial` that asks to be let in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Incoming<'a> {
    pub(crate) name: WalFileName,
    pub(crate) wal: &'a Bytes,
    pub(crate) pushed_by: &'a PushSource,
}

/// The segments of one system.
#[derive(Debug)]
pub(crate) struct Copies<'a> {
    archive: &'a Archive,
    names: SystemLayout,
}

impl<'a> Copies<'a> {
    pub(crate) const fn new(archive: &'a Archive, names: SystemLayout) -> Self {
        Self { archive, names }
    }

    /// The digest of the WAL that is stored as `object`, if there is such an object.
    pub(crate) async fn digest(&self, object: &str) -> Result<Option<[u8; 32]>, PushError> {
        let found = self.directory(object, DIRECTORY_BYTES).await?;
        Ok(found.map(|(directory, _, _)| directory.digest))
    }

    /// The directory of a stored segment, the object's end that it was read from, and the object's length.
    async fn directory(
        &self,
        object: &str,
        mut wanted: u64,
    ) -> Result<Option<(SegmentDirectory, Bytes, u64)>, PushError> {
        loop {
            let (tail, size) = match self.archive.get_tail(object, wanted).await {
                Ok(found) => found,
                Err(e) if e.is_not_found() => return Ok(None),
                Err(e) => return Err(e.into()),
            };
            let damaged = |source| PushError::Damaged { object: object.to_owned(), source };
            match SegmentDirectory::decode(&tail, size).map_err(damaged)? {
                Ok(directory) => return Ok(Some((directory, tail, size))),
                Err(needed) if needed > wanted && needed <= OBJECT_BYTES_MAX => wanted = needed,
                Err(needed) => {
                    return Err(damaged(Corrupt::too_large("directory", 0, needed, OBJECT_BYTES_MAX)));
                }
            }
        }
    }

    /// Every stored copy under a name.
    pub(crate) async fn of(&self, name: WalFileName) -> Result<Vec<String>, PushError> {
        let (WalFileName::Segment(segment) | WalFileName::Partial(segment)) = name else {
            return Ok(Vec::new());
        };
        let listing = self.archive.list_names(&self.names.timeline(segment.timeline())).await?;
        let is_copy = |path: &str| match self.names.parse_wal(path) {
            Some(WalObject::File(of) | WalObject::Longer { of, .. }) => of == name,
            None => false,
        };
        Ok(listing.objects.into_iter().map(|o| o.path).filter(|path| is_copy(path)).collect())
    }

    /// Every stored copy under the other name that the same segment may have: of a whole one its `.partial`, and the
    /// other way round. A longer copy lies only beside a plain one, so that one look says whether there are any.
    pub(crate) async fn of_twin(&self, name: WalFileName) -> Result<Vec<String>, PushError> {
        let twin = match name {
            WalFileName::Segment(segment) => WalFileName::Partial(segment),
            WalFileName::Partial(segment) => WalFileName::Segment(segment),
            WalFileName::History(_) | WalFileName::BackupHistory(_) => return Ok(Vec::new()),
        };
        match self.archive.head(&self.names.wal_file(twin)).await? {
            Some(_) => self.of(twin).await,
            None => Ok(Vec::new()),
        }
    }

    /// The copy, of those given, that holds every valid record of the incoming one. One that disagrees with it is an
    /// error.
    pub(crate) async fn holder(
        &self,
        incoming: Incoming<'_>,
        copies: &[String],
    ) -> Result<Option<String>, PushError> {
        let name = incoming.name;
        let mut holder = None;
        for copy in copies {
            let object = self.archive.get(copy, OBJECT_BYTES_MAX).await?;
            let damaged = |source| PushError::Damaged { object: copy.clone(), source };
            let found = blocking(name, move || StoredSegment::decode(&object)).await?.map_err(damaged)?;
            let wal = incoming.wal.clone();
            let (compared, stored_by) = blocking(name, move || {
                let info = &found.index.info;
                (agreement(&wal, &found.wal, info.name, info.size), found.index.pushed_by)
            })
            .await?;
            match compared {
                Agreement::Diverge { at: lsn } => {
                    let sources = Sources { pushed_by: incoming.pushed_by.clone(), stored_by };
                    return Err(PushError::Diverges {
                        name,
                        object: copy.clone(),
                        lsn,
                        sources: Box::new(sources),
                    });
                }
                Agreement::Same | Agreement::SecondIsLonger => holder = Some(copy.clone()),
                Agreement::FirstIsLonger => {}
            }
        }
        Ok(holder)
    }

    /// The same of the copies under the other name. A damaged one of those is no reason to refuse a segment whose own
    /// name is free.
    pub(crate) async fn twin_holder(
        &self,
        incoming: Incoming<'_>,
        twins: &[String],
    ) -> Result<Option<String>, PushError> {
        let mut holder = None;
        for twin in twins {
            match self.holder(incoming, std::slice::from_ref(twin)).await {
                Ok(found) => holder = found.or(holder),
                Err(PushError::Damaged { object, source }) => {
                    tracing::warn!(
                        "{} was not compared with {object}, which is damaged: {source}",
                        incoming.name
                    );
                }
                Err(e) => return Err(e),
            }
        }
        Ok(holder)
    }

    /// Refuses a segment whose archived neighbours are of another log. Its own directory has other neighbours then,
    /// which are refused one by one; but segments go in parallel, and a name that the other server has not come to yet
    /// is free.
    pub(crate) async fn check_neighbours(
        &self,
        name: SegmentName,
        info: &SegmentInfo,
        dir: &WalDir,
        pushed_by: &PushSource,
    ) -> Result<(), PushError> {
        let stands_apart = |why: String, object: String, parting, stored_by| {
            let sources = Sources { pushed_by: pushed_by.clone(), stored_by };
            let name = WalFileName::Segment(name);
            Err(PushError::AnotherLog { name, object, why, parting, sources: Box::new(sources) })
        };
        // What ends inside, or was let in with a fault, says nothing of what follows.
        let is_whole = |i: &SegmentInfo| matches!(i.ending, Ending::Full | Ending::Switch);
        if let Some(before) = name.previous(info.size)
            && let Some((object, found, stored_by)) = self.summary(before).await?
            && is_whole(&found)
            && let Some(why) = continuity_fault(&found, info, None)
        {
            let parting = Parting::at_the_edge(&found, info).look(self, dir, before, info.size).await;
            return stands_apart(why, object, parting, stored_by);
        }
        if let Some(after) = name.next(info.size)
            && is_whole(info)
            && let Some((object, found, stored_by)) = self.summary(after).await?
            && let Some(why) = continuity_fault(info, &found, None)
        {
            let parting = Parting::at_the_edge(info, &found).look(self, dir, after, info.size).await;
            return stands_apart(why, object, parting, stored_by);
        }
        Ok(())
    }

    /// The object of a segment under its own name, if there is one that can be read.
    pub(crate) async fn plain(&self, name: SegmentName) -> Option<Bytes> {
        let object = self.names.wal_file(WalFileName::Segment(name));
        self.archive.get(&object, OBJECT_BYTES_MAX).await.ok()
    }

    /// What the index of an archived segment says first, if that is archived and can be read.
    async fn summary(
        &self,
        name: SegmentName,
    ) -> Result<Option<(String, SegmentInfo, Option<PushSource>)>, PushError> {
        let object = self.names.wal_file(WalFileName::Segment(name));
        let found = match self.directory(&object, SUMMARY_BYTES).await {
            // A neighbour's damage is told when it is pushed or verified, and is not this segment's fault.
            Err(PushError::Damaged { .. }) => return Ok(None),
            found => found?,
        };
        let Some((directory, tail, size)) = found else { return Ok(None) };
        match directory.summary(&tail, size) {
            Ok(Ok(index)) if index.faults.is_empty() => Ok(Some((object, index.info, index.pushed_by))),
            _ => Ok(None),
        }
    }
}

/// Where two histories of one timeline part, as far as that can be said.
pub(super) fn history_difference(timeline: TimelineId, pushed: &[u8], stored: &[u8]) -> Option<String> {
    let history = |text| History::parse(timeline, text).ok();
    let (pushed, stored) = (history(pushed)?, history(stored)?);
    let mut pairs = pushed.ancestors().iter().zip(stored.ancestors());
    let told = |e: &HistoryEntry| format!("leaves timeline {} at {} ({})", e.timeline, e.switch, e.reason);
    Some(match pairs.find(|(a, b)| a != b) {
        Some((a, b)) => format!(": it {}, the archived one {}", told(a), told(b)),
        None => {
            let (a, b) = (pushed.ancestors().len(), stored.ancestors().len());
            format!(": it names {a} ancestors, the archived one {b}")
        }
    })
}

/// Whom two copies are of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sources {
    /// Who pushes the one.
    pub pushed_by: PushSource,
    /// Who pushed the other, where that was noted.
    pub stored_by: Option<PushSource>,
}

impl std::fmt::Display for Sources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "this one is of {}, the archived one of ", self.pushed_by)?;
        match &self.stored_by {
            Some(stored_by) => write!(f, "{stored_by}"),
            None => write!(f, "a server that was not noted"),
        }
    }
}
