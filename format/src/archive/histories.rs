//! Which history each timeline is: what it left, where and why, and who wrote it.

use serde::Serialize;

use super::catalog::Catalog;
use super::source::PushSource;
use crate::ids::{Lsn, TimelineId};
use crate::time::TimestampTz;

/// One timeline's history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TimelineHistory {
    /// The timeline.
    pub timeline: TimelineId,
    /// The timeline it left.
    pub parent: Option<TimelineId>,
    /// Where it left that one.
    pub forked_at: Option<Lsn>,
    /// Why, in the words of the server that did it.
    pub reason: Option<String>,
    /// Who pushed the history file, where that was noted.
    pub history_pushed_by: Option<PushSource>,
    /// Who pushed its segments, the one that pushed last first.
    pub pushed_by: Vec<Pusher>,
}

/// A server that pushed segments of a timeline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pusher {
    /// The machine.
    pub host: String,
    /// The data directory.
    pub directory: String,
    /// How many of the archived segments it pushed.
    pub segments: u64,
    /// When it pushed the last of them.
    pub last_pushed: TimestampTz,
    /// Whether it was recovering then: a standby that archives too.
    pub recovering: Option<bool>,
}

impl Catalog {
    /// The history of every timeline that there is anything of, oldest first.
    pub fn histories(&self) -> Vec<TimelineHistory> {
        self.timelines().into_iter().map(|timeline| self.history(timeline)).collect()
    }

    fn history(&self, timeline: TimelineId) -> TimelineHistory {
        let left = self.lineages.get(&timeline).and_then(|line| line.ancestors.last());
        let beginning = self.beginnings.get(&timeline);
        let mut pushed_by: Vec<Pusher> = Vec::new();
        let of_timeline = self.segments.iter().filter(|s| s.info.name.timeline() == timeline);
        for source in of_timeline.filter_map(|s| s.pushed_by.as_ref()) {
            let server = |p: &&mut Pusher| (&p.host, &p.directory) == (&source.host, &source.directory);
            match pushed_by.iter_mut().find(server) {
                Some(known) => {
                    known.segments = known.segments.saturating_add(1);
                    if source.pushed > known.last_pushed {
                        (known.last_pushed, known.recovering) = (source.pushed, source.recovering);
                    }
                }
                None => pushed_by.push(Pusher {
                    host: source.host.clone(),
                    directory: source.directory.clone(),
                    segments: 1,
                    last_pushed: source.pushed,
                    recovering: source.recovering,
                }),
            }
        }
        pushed_by.sort_by_key(|p| std::cmp::Reverse(p.last_pushed));
        TimelineHistory {
            timeline,
            parent: left.map(|(parent, _)| *parent),
            forked_at: left.map(|(_, at)| *at),
            reason: beginning.and_then(|b| b.reason.clone()),
            history_pushed_by: beginning.and_then(|b| b.pushed_by.clone()),
            pushed_by,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::catalog::samples::*;
    use super::super::source::sample;
    use super::super::{Beginning, Lineage};
    use super::*;

    #[test]
    fn a_timeline_tells_what_it_left_and_who_wrote_it() {
        let at = TimestampTz::from_postgres_micros;
        let by = |host: &str, n: i64| Some(PushSource { pushed: at(n), ..sample(host) });
        let mut segments: Vec<_> = (3..6).map(|n| segment(1, n)).collect();
        for (segment, source) in segments.iter_mut().zip([by("old", 10), by("new", 30), by("old", 20)]) {
            segment.pushed_by = source;
        }
        let mut c = catalog(segments);
        let fork = Lsn::from(5 * SIZE + 100);
        c.lineages.insert(t(2), Lineage { ancestors: vec![(t(1), fork)], timeline: t(2) });
        let beginning = Beginning { reason: Some("no recovery target".into()), pushed_by: by("new", 40) };
        c.beginnings.insert(t(2), beginning);
        let [one, two] = &c.histories()[..] else { panic!() };
        assert_eq!((one.parent, one.forked_at, &one.reason), (None, None, &None));
        let told: Vec<_> =
            one.pushed_by.iter().map(|p| (p.host.as_str(), p.segments, p.last_pushed)).collect();
        assert_eq!(told, [("new", 1, at(30)), ("old", 2, at(20))]);
        assert_eq!((two.parent, two.forked_at, two.pushed_by.len()), (Some(t(1)), Some(fork), 0));
        assert_eq!(two.reason.as_deref(), Some("no recovery target"));
        assert_eq!(two.history_pushed_by.as_ref().map(|s| s.host.as_str()), Some("new"));
    }
}
