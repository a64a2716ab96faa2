//! Who pushed a file into the archive, as far as the pusher knew: where several servers write, an error names them.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::Corrupt;
use crate::ids::TimelineId;
use crate::reader::{Reader, Writer};
use crate::time::TimestampTz;

/// A machine and the data directory on it, at a moment.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PushSource {
    /// The machine's name.
    pub host: String,
    /// The data directory; the file's own directory where it lies in no `pg_wal`.
    pub directory: String,
    /// When the file was pushed, by that machine's clock.
    pub pushed: TimestampTz,
    /// The timeline that the directory's pg_control was on.
    pub timeline: Option<TimelineId>,
    /// Whether pg_control said that the server was recovering: a standby, mostly.
    pub recovering: Option<bool>,
}

impl PushSource {
    /// Whether both are the same data directory of the same machine.
    pub fn is_same_server(&self, other: &Self) -> bool {
        (&self.host, &self.directory) == (&other.host, &other.directory)
    }

    pub(in crate::archive) fn encode(&self, w: &mut Writer) {
        w.text(&self.host).text(&self.directory).i64(self.pushed.postgres_micros());
        w.u32(self.timeline.map_or(0, TimelineId::get));
        w.u8(match self.recovering {
            None => 0,
            Some(false) => 1,
            Some(true) => 2,
        });
    }

    /// Reads what [`PushSource::encode`] wrote; what a later writer put behind it is left alone.
    pub(in crate::archive) fn decode(r: &mut Reader<'_>) -> Result<Self, Corrupt> {
        let (host, directory) = (r.text("host")?.to_owned(), r.text("directory")?.to_owned());
        let pushed = TimestampTz::from_postgres_micros(r.i64("pushed")?);
        let timeline = TimelineId::new(r.u32("timeline")?);
        let at = r.position();
        let recovering = match r.u8("recovering")? {
            0 => None,
            1 => Some(false),
            2 => Some(true),
            v => return Err(Corrupt::invalid("recovering", at, u64::from(v))),
        };
        Ok(Self { host, directory, pushed, timeline, recovering })
    }
}

impl fmt::Display for PushSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let role = match self.recovering {
            Some(true) => " (recovering)",
            _ => "",
        };
        write!(f, "{}:{}{role} at {}", self.host, self.directory, self.pushed)
    }
}

/// Sources for the tests of this crate.
#[cfg(test)]
pub(super) fn sample(host: &str) -> PushSource {
    PushSource {
        host: host.to_owned(),
        directory: "/srv/data".to_owned(),
        pushed: TimestampTz::from_postgres_micros(1),
        timeline: Some(TimelineId::FIRST),
        recovering: Some(true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_comes_back_and_every_truncation_is_refused() {
        for (timeline, recovering) in [(None, None), (Some(TimelineId::FIRST), Some(false))] {
            let source = PushSource { timeline, recovering, ..sample("db1") };
            let mut w = Writer::new();
            source.encode(&mut w);
            let bytes = w.into_bytes();
            assert_eq!(PushSource::decode(&mut Reader::new(&bytes)), Ok(source));
            for i in 0..bytes.len() {
                assert!(PushSource::decode(&mut Reader::new(&bytes[..i])).is_err(), "cut at {i}");
            }
        }
    }

    #[test]
    fn the_same_directory_of_another_machine_is_another_server() {
        let later = PushSource { pushed: TimestampTz::from_postgres_micros(9), ..sample("a") };
        assert!(sample("a").is_same_server(&later) && !sample("a").is_same_server(&sample("b")));
        assert_eq!(sample("a").to_string(), "a:/srv/data (recovering) at 2000-01-01 00:00:00.000001+00");
    }
}
