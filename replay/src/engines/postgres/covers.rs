//! Merged indexes that tell of some of a run's segments, so that those are not read one by one.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use tokio::sync::OnceCell;
use waltide_format::archive::{
    MERGE_STEPS, MergedDirectory, MergedName, MergedSection, MergedSegment, Step, SystemLayout,
};
use waltide_format::{Corrupt, SegmentName};
use waltide_storage::Archive;

use super::indexes::SearchError;

/// How many are read at once.
const AT_ONCE: usize = 8;
/// What is read of an object's end at first, and as much more for each segment that it covers.
const TAIL_BYTES: u64 = 64 << 10;
const TAIL_BYTES_PER_SEGMENT: u64 = 192;
/// An object is read for more segments than one of the step below would tell of.
const OBJECTS_BELOW: u64 = 16;

/// Looks for merged indexes.
#[derive(Debug)]
pub(super) struct Covers<'a> {
    pub(super) archive: &'a Archive,
    pub(super) layout: &'a SystemLayout,
    /// The segments to be told of, in order.
    pub(super) steps: &'a [&'a Step<'a>],
    /// Whether only those serve that leave nothing out.
    pub(super) whole: bool,
    /// What there is.
    pub(super) listing: &'a Listing,
}

/// The merged indexes that an archive has, listed once.
#[derive(Debug, Clone, Default)]
pub(super) struct Listing(Arc<OnceCell<Vec<(MergedName, String)>>>);

/// What a merged index tells of some steps.
#[derive(Debug)]
pub(super) struct Cover<T> {
    /// The steps.
    pub(super) steps: Range<usize>,
    /// What it says of their segments.
    pub(super) segments: Vec<MergedSegment>,
    /// The place of the first of them among all that it covers.
    pub(super) offset: usize,
    /// Whether its first segment is among them.
    pub(super) from_first: bool,
    /// Whether its last one is.
    pub(super) to_last: bool,
    /// What was read of it, of all its segments.
    pub(super) told: T,
}

impl Covers<'_> {
    /// Merged indexes that were made of these very segments, each step in one at the most. `read` makes something of
    /// `sections`, as they are stored, or says that the object does not tell it; `fits` may refuse that for the segments
    /// that it would be used for. What is refused or damaged leaves its segments to objects that cover less.
    pub(super) async fn find<T: Send + 'static>(
        &self,
        sections: &[MergedSection],
        read: impl Fn(&MergedDirectory, &[Vec<u8>]) -> Result<Option<T>, Corrupt> + Clone + Send + 'static,
        fits: impl Fn(&T, &[MergedSegment]) -> bool,
    ) -> Result<Vec<Cover<T>>, SearchError> {
        let mut open = self.numbers();
        let mut found = Vec::new();
        if open.len() < 2 {
            return Ok(found);
        }
        let mut listed = self.listed(&open).await?;
        // Those that cover most come first, and of one range the newest.
        listed.sort_by_key(|(name, _)| std::cmp::Reverse((name.step, name.builder, name.generation)));
        while !listed.is_empty() {
            let mut left = open.clone();
            let (chosen, others): (Vec<_>, Vec<_>) = listed.into_iter().partition(|(name, _)| {
                let chosen = worth_it(name, &left);
                if chosen {
                    take(&mut left, name);
                }
                chosen
            });
            if chosen.is_empty() {
                break;
            }
            listed = others;
            let objects = chosen.iter().map(|(name, path)| self.read(name, path, sections, read.clone()));
            let mut objects = stream::iter(objects.collect::<Vec<_>>()).buffered(AT_ONCE);
            while let Some(object) = objects.try_next().await? {
                let cover = object.and_then(|(segments, told)| self.cover(&open, segments, told));
                let Some(cover) = cover.filter(|cover| fits(&cover.told, &cover.segments)) else { continue };
                for segment in &cover.segments {
                    open.remove(&segment.info.name);
                }
                found.push(cover);
            }
        }
        found.sort_by_key(|cover| cover.steps.start);
        Ok(found)
    }

    /// How many of the steps there are merged indexes of, by their names alone.
    pub(super) async fn count(&self) -> Result<usize, SearchError> {
        let mut open = self.numbers();
        let all = open.len();
        for (name, _) in self.listed(&open).await? {
            take(&mut open, &name);
        }
        Ok(all.saturating_sub(open.len()))
    }

    /// The steps' numbers by their segments.
    fn numbers(&self) -> BTreeMap<SegmentName, usize> {
        self.steps.iter().enumerate().map(|(n, step)| (step.entry.info.name, n)).collect()
    }

    /// The objects that may serve.
    async fn listed(
        &self,
        open: &BTreeMap<SegmentName, usize>,
    ) -> Result<Vec<(MergedName, String)>, SearchError> {
        let list = || async {
            let listed = self.archive.list(&self.layout.merged()).await?.into_iter();
            Ok::<_, SearchError>(
                listed.filter_map(|o| Some((self.layout.parse_merged(&o.path)?, o.path))).collect(),
            )
        };
        let listed = self.listing.0.get_or_try_init(list).await?;
        let (Some((first, _)), Some((last, _))) = (open.first_key_value(), open.last_key_value()) else {
            return Ok(Vec::new());
        };
        let [first_step, ..] = MERGE_STEPS;
        let serves = |(name, _): &&(MergedName, String)| {
            let near = name.first <= *last && *first <= name.last;
            near && (!self.whole || name.step == first_step) && worth_it(name, open)
        };
        Ok(listed.iter().filter(serves).cloned().collect())
    }

    /// Reads one; none where it is gone, damaged, or does not tell what is wanted.
    async fn read<T: Send + 'static>(
        &self,
        name: &MergedName,
        path: &str,
        sections: &[MergedSection],
        read: impl Fn(&MergedDirectory, &[Vec<u8>]) -> Result<Option<T>, Corrupt> + Send + 'static,
    ) -> Result<Option<(Vec<MergedSegment>, T)>, SearchError> {
        let bytes = TAIL_BYTES.saturating_add(name.step.saturating_mul(TAIL_BYTES_PER_SEGMENT));
        let object = self.archive.read_end(path, bytes, |tail, size| {
            let directory = match MergedDirectory::decode(tail, size)? {
                Ok(directory) => directory,
                Err(needed) => return Ok(Err(needed)),
            };
            if directory.first.name != name.first || u64::from(directory.segments) != name.step {
                let found = u64::from(directory.segments);
                return Err(Corrupt::mismatch("segments", 0, found, name.step));
            }
            let (mut stored, mut needed) = (Vec::new(), None);
            for section in std::iter::once(&MergedSection::Segments).chain(sections) {
                match directory.in_tail(*section, tail, size) {
                    Ok(found) => stored.push(found.to_vec()),
                    Err(bytes) => needed = needed.max(Some(bytes)),
                }
            }
            Ok(needed.map_or(Ok((directory, stored)), Err))
        });
        let damaged = |e: Corrupt| {
            tracing::warn!("{path} is damaged, reading the segments instead: {e}");
            None
        };
        let (directory, stored) = match object.await {
            Ok(Ok(found)) => found,
            Ok(Err(e)) => return Ok(damaged(e)),
            Err(e) if e.is_not_found() || e.is_bad_object() => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let decode = move || -> Result<Option<(Vec<MergedSegment>, T)>, Corrupt> {
            let Some((segments, wanted)) = stored.split_first() else { return Ok(None) };
            let segments = directory.read_segments(segments)?;
            Ok(read(&directory, wanted)?.map(|told| (segments, told)))
        };
        let decoded = tokio::task::spawn_blocking(decode).await.expect("decoding does not panic");
        Ok(decoded.unwrap_or_else(damaged))
    }

    /// The open steps that an object tells of; none where it was made of other copies.
    fn cover<T>(
        &self,
        open: &BTreeMap<SegmentName, usize>,
        segments: Vec<MergedSegment>,
        told: T,
    ) -> Option<Cover<T>> {
        let places = segments.iter().enumerate();
        let ours: Vec<_> = places.filter_map(|(at, s)| Some((at, s, *open.get(&s.info.name)?))).collect();
        let ((first, _, begin), (last, _, end)) = (*ours.first()?, *ours.last()?);
        let is_same = |(at, segment, number): &(usize, &MergedSegment, usize)| {
            let in_order = number.checked_sub(begin) == at.checked_sub(first);
            in_order && self.steps.get(*number).is_some_and(|step| segment.is_of(step.entry))
        };
        let covered = segments.get(first..=last)?;
        let fits = ours.len() == covered.len() && ours.iter().all(is_same);
        fits.then(|| Cover {
            steps: begin..end.saturating_add(1),
            segments: covered.to_vec(),
            offset: first,
            from_first: first == 0,
            to_last: last.saturating_add(1) == segments.len(),
            told,
        })
    }
}

/// Takes the segments out that an object covers.
fn take(open: &mut BTreeMap<SegmentName, usize>, name: &MergedName) {
    let covered: Vec<_> = open.range(name.first..=name.last).map(|(segment, _)| *segment).collect();
    for segment in covered {
        open.remove(&segment);
    }
}

/// Whether an object tells of more segments than one of the step below would.
fn worth_it(name: &MergedName, open: &BTreeMap<SegmentName, usize>) -> bool {
    let below = name.step.checked_div(OBJECTS_BELOW).unwrap_or(1);
    open.range(name.first..=name.last).count() as u64 > below
}
