//! Where two logs part that are not one: the one that a server has beside the file it pushes, and the archived one.

use std::fmt;

use waltide_format::archive::{SegmentInfo, StoredSegment};
use waltide_format::engines::postgres::scan::{Agreement, agreement};
use waltide_format::{Lsn, SegmentName, SegmentSize, WalFileName};

use super::copies::Copies;
use super::push::blocking;
use super::wal_dir::WalDir;

/// So many segments are looked back through at the most.
const SEGMENTS_MAX: usize = 64;

/// Where two logs part, as far as that can be said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parting {
    /// They are the same before, and not here.
    At(Lsn),
    /// They are the same before the first position, and not the same at the second.
    Between(Lsn, Lsn),
    /// They are not the same here; what is before was not compared.
    By(Lsn),
}

impl fmt::Display for Parting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(lsn) => write!(f, "they part at {lsn}"),
            Self::Between(from, to) => write!(f, "they part between {from} and {to}"),
            Self::By(lsn) => write!(f, "they part at {lsn} or before"),
        }
    }
}

impl Parting {
    /// What is known of it where `after` does not continue `before`: no later than where the two say that the last record
    /// before the edge begins, if they say so.
    pub(super) fn at_the_edge(before: &SegmentInfo, after: &SegmentInfo) -> Self {
        let edge = after.name.start(after.size).unwrap_or_default();
        let ends = before.last_record.zip(after.first_prev).filter(|(a, b)| a != b);
        Self::By(ends.map_or(edge, |(a, b)| a.min(b)))
    }

    /// Looks back from `newest` on through the segments that both the archive and `dir` have. What cannot be read tells
    /// nothing: this is told with an error, and must not become another.
    pub(super) async fn look(
        self,
        copies: &Copies<'_>,
        dir: &WalDir,
        newest: SegmentName,
        size: SegmentSize,
    ) -> Self {
        let mut found = self;
        // Where what was not compared begins, right behind a segment that is the same.
        let mut unseen: Option<Lsn> = None;
        let older = std::iter::successors(Some(newest), |n| n.previous(size));
        for name in older.take(SEGMENTS_MAX) {
            let (Some(start), Some(end)) = (name.start(size), name.end(size)) else { break };
            match compare(copies, dir, name, size).await {
                Some(Agreement::Diverge { at }) => {
                    (found, unseen) = (Self::By(found.latest().min(at)), None);
                }
                Some(_) => {
                    let at = found.latest();
                    return match unseen {
                        _ if at < end => found,
                        Some(from) if from < at => Self::Between(from, at),
                        _ => Self::At(at),
                    };
                }
                // The segment that is refused is not archived, and the one behind it may not be here.
                None => unseen = Some(start),
            }
        }
        found
    }

    /// Where they are surely not the same.
    const fn latest(self) -> Lsn {
        match self {
            Self::At(lsn) | Self::Between(_, lsn) | Self::By(lsn) => lsn,
        }
    }
}

/// How the segment in `dir` and the archived one stand to each other; none where either is missing or damaged.
async fn compare(
    copies: &Copies<'_>,
    dir: &WalDir,
    name: SegmentName,
    size: SegmentSize,
) -> Option<Agreement> {
    let (of, dir) = (WalFileName::Segment(name), dir.clone());
    let ours = blocking(of, move || dir.segment(name)).await.ok()??;
    let theirs = copies.plain(name).await?;
    let compared = blocking(of, move || {
        let theirs = StoredSegment::decode(&theirs).ok()?;
        Some(agreement(&ours, &theirs.wal, name, size))
    });
    compared.await.ok()?
}
