//! What to restore to, in PostgreSQL's words.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize, Serializer};
use waltide_format::{Lsn, TimelineId, TimestampTz, Xid};

use crate::moment::Moment;

/// A moment in the life of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind", content = "value")]
pub enum Target {
    /// The end of the archived WAL.
    Latest,
    /// As early as the base backup allows.
    Immediate,
    /// `recovery_target_time`.
    Time(TimestampTz),
    /// `recovery_target_xid`.
    Xid(Xid),
    /// `recovery_target_lsn`.
    Lsn(Lsn),
    /// `recovery_target_name`.
    Name(String),
    /// Before a table was dropped or emptied: `recovery_target_lsn`, exclusive.
    Moment(Box<Moment>),
}

impl Target {
    /// The position that is compared, where it is one.
    pub fn lsn(&self) -> Option<Lsn> {
        match self {
            Self::Lsn(lsn) => Some(*lsn),
            Self::Moment(moment) => Some(moment.lsn),
            _ => None,
        }
    }
}

/// Along which timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TargetTimeline {
    /// The newest one that a backup lies on.
    #[default]
    Latest,
    /// The one that the backup was made on.
    Current,
    /// This one.
    Id(TimelineId),
}

/// What the server does at the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TargetAction {
    /// Goes on as a server of its own, on a new timeline.
    #[default]
    Promote,
    /// Stays as it is and answers questions.
    Pause,
    /// Ends.
    Shutdown,
}

/// A target with all that belongs to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Goal {
    /// The moment.
    pub target: Target,
    /// Whether the moment itself is part of it: `recovery_target_inclusive`.
    pub inclusive: bool,
    /// Along which timeline.
    pub timeline: TargetTimeline,
    /// What to do there.
    pub action: TargetAction,
}

/// A target that cannot be meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GoalError {
    /// Only times, transactions and positions can be left out.
    #[error("an exclusive target is a time, a transaction or an LSN")]
    NothingToExclude,
    /// PostgreSQL keeps a name in 63 bytes.
    #[error("a restore point's name has between 1 and 63 bytes")]
    Name,
}

impl Goal {
    /// A target, inclusive, on the newest timeline, to be promoted there.
    pub const fn new(target: Target) -> Self {
        Self { target, inclusive: true, timeline: TargetTimeline::Latest, action: TargetAction::Promote }
    }

    /// A moment before something happened: what stands there is left out.
    pub fn before(moment: Moment) -> Self {
        Self { inclusive: false, ..Self::new(Target::Moment(Box::new(moment))) }
    }

    /// Whether the parts belong together.
    pub fn check(&self) -> Result<(), GoalError> {
        match &self.target {
            Target::Latest | Target::Immediate | Target::Name(_) if !self.inclusive => {
                Err(GoalError::NothingToExclude)
            }
            Target::Name(name) if !(1..=63).contains(&name.len()) || name.contains('\0') => {
                Err(GoalError::Name)
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("the end of the archived WAL"),
            Self::Immediate => f.write_str("the earliest consistent moment of the backup"),
            Self::Time(time) => write!(f, "time {time}"),
            Self::Xid(xid) => write!(f, "transaction {xid}"),
            Self::Lsn(lsn) => write!(f, "LSN {lsn}"),
            Self::Name(name) => write!(f, "restore point {name:?}"),
            Self::Moment(moment) => write!(f, "{moment}"),
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let says_it = self.inclusive || matches!(self.target, Target::Moment(_));
        let exclusive = if says_it { "" } else { ", exclusive" };
        write!(f, "{}{exclusive}", self.target)
    }
}

impl fmt::Display for TargetTimeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("latest"),
            Self::Current => f.write_str("current"),
            Self::Id(timeline) => write!(f, "{timeline}"),
        }
    }
}

impl Serialize for TargetTimeline {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl FromStr for TargetTimeline {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        match s {
            "latest" => Ok(Self::Latest),
            "current" => Ok(Self::Current),
            _ => s
                .parse()
                .map(Self::Id)
                .map_err(|_| format!("{s:?} is no timeline: say latest, current or a number from 1")),
        }
    }
}

impl TargetAction {
    /// PostgreSQL's word for it.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Promote => "promote",
            Self::Pause => "pause",
            Self::Shutdown => "shutdown",
        }
    }
}

impl FromStr for TargetAction {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let all = [Self::Promote, Self::Pause, Self::Shutdown];
        let found = all.into_iter().find(|a| a.word() == s);
        found.ok_or_else(|| format!("{s:?} is no action: say promote, pause or shutdown"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_as_they_are_printed() {
        for word in ["latest", "current", "7"] {
            assert_eq!(word.parse::<TargetTimeline>().unwrap().to_string(), word);
        }
        for word in ["promote", "pause", "shutdown"] {
            assert_eq!(word.parse::<TargetAction>().unwrap().word(), word);
        }
        for bad in ["", "0", "newest"] {
            assert!(bad.parse::<TargetTimeline>().is_err() && bad.parse::<TargetAction>().is_err());
        }
    }

    #[test]
    fn what_cannot_be_left_out_is_refused() {
        let goal = |target, inclusive| Goal { inclusive, ..Goal::new(target) }.check();
        assert_eq!(goal(Target::Xid(7.into()), false), Ok(()));
        assert_eq!(goal(Target::Latest, false), Err(GoalError::NothingToExclude));
        assert_eq!(goal(Target::Name("a".into()), false), Err(GoalError::NothingToExclude));
        assert_eq!(goal(Target::Name("a".repeat(64)), true), Err(GoalError::Name));
        assert_eq!(goal(Target::Name("before the move".into()), true), Ok(()));
    }
}
