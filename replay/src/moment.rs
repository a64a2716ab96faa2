//! The moment before a table was dropped or emptied, found by the table's name among what became of tables.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};
use waltide_format::engines::postgres::catalogue::{
    PartitionsTruncated, TableEvent, TableEventKind, TableName, TablePattern,
};
use waltide_format::{Lsn, TimestampTz, Xid};

/// As many names as a message lists.
const LISTED_MAX: usize = 8;

/// What must not have happened yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// DROP, of the table or of what it goes with.
    Drop,
    /// TRUNCATE.
    Truncate,
}

impl Loss {
    fn is(self, kind: &TableEventKind) -> bool {
        match self {
            Self::Drop => matches!(kind, TableEventKind::Dropped { .. }),
            Self::Truncate => matches!(kind, TableEventKind::Truncated),
        }
    }

    const fn done(self) -> &'static str {
        match self {
            Self::Drop => "dropped",
            Self::Truncate => "truncated",
        }
    }
}

/// A moment asked for by a table's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MomentRequest {
    /// What must not have happened yet.
    pub loss: Loss,
    /// To which table.
    pub table: TablePattern,
    /// The last time it happened by then; the last time of all where nothing is said.
    pub until: Option<TimestampTz>,
}

impl MomentRequest {
    /// What must have happened for it to mean something.
    pub(crate) fn what(&self) -> String {
        let by_then = self.until.map_or(String::new(), |until| format!(" by {until}"));
        format!("that a table {} was {}{by_then}", self.table, self.loss.done())
    }
}

impl fmt::Display for MomentRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "before {} was {}", self.table, self.loss.done())?;
        match self.until {
            Some(until) => write!(f, ", by {until}"),
            None => Ok(()),
        }
    }
}

/// A time at which it happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Happened {
    /// The transaction.
    pub xid: Xid,
    /// When it committed.
    pub time: TimestampTz,
    /// Where recovery must stop so that it did not happen.
    pub lsn: Lsn,
}

impl Happened {
    const fn of(event: &TableEvent) -> Self {
        Self { xid: event.commit.xid, time: event.commit.time, lsn: event.before }
    }
}

/// The moment before a table was dropped or emptied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// What did not happen yet.
    pub loss: Loss,
    /// The table, by the name it had then: `database.schema.table`.
    pub table: String,
    /// `pg_class.oid`.
    pub oid: u32,
    /// The transaction that did it.
    pub xid: Xid,
    /// When it committed.
    pub time: TimestampTz,
    /// Start of its commit record.
    pub commit_lsn: Lsn,
    /// The end of that record, where it was just found: then it need not be looked for.
    #[serde(skip)]
    pub commit_end: Option<Lsn>,
    /// Where recovery stops: before the record that starts here. It is the commit record, but for the end of a whole
    /// database, which begins before that.
    pub lsn: Lsn,
    /// Whether the whole database went.
    pub with_database: bool,
    /// Whether the transaction stays prepared there.
    pub prepared: bool,
    /// Under which global identifier, where the log that was searched says it.
    pub gid: Option<String>,
    /// What else the same transaction did it to.
    pub also: Vec<String>,
    /// When else it happened to a table of this name, as far back as was looked, oldest first.
    pub others: Vec<Happened>,
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { loss, table, xid, time, lsn, .. } = self;
        write!(f, "before {table} was {} by transaction {xid} of {time}, at {lsn}", loss.done())
    }
}

impl Moment {
    /// What an operator should know of it, a line each.
    pub(crate) fn told(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let done = self.loss.done();
        if self.with_database {
            lines.push(format!("the whole database was {done} by transaction {}", self.xid));
        }
        if !self.also.is_empty() {
            let count = self.also.len();
            let names = listed(self.also.iter());
            lines.push(format!("the same transaction also {done} {count} more: {names}"));
        }
        if !self.others.is_empty() {
            let times = self.others.iter().map(|o| format!("{} (transaction {})", o.time, o.xid));
            let times = listed(times.collect::<Vec<_>>().iter());
            lines
                .push(format!("{} was {done} at other times too: {times}; --until TIME chooses", self.table));
        }
        if self.prepared {
            let gid = self.gid.as_ref().map(|gid| format!(" '{}'", gid.replace('\'', "''")));
            let gid = gid.unwrap_or(" and what pg_prepared_xacts calls it".to_owned());
            lines.push(format!(
                "the transaction stays prepared and keeps the table locked: end it with ROLLBACK PREPARED{gid}"
            ));
        }
        lines
    }
}

/// The first names of a list, and how many more there are.
fn listed<'a>(names: impl ExactSizeIterator<Item = &'a String>) -> String {
    let more = names.len().saturating_sub(LISTED_MAX);
    let mut text = names.take(LISTED_MAX).cloned().collect::<Vec<_>>().join(", ");
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    text
}

/// What a request means among what is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// This.
    One(Box<Moment>),
    /// Several tables have the name: each with when it happened last.
    Several(Vec<(TableName, Happened)>),
    /// Nothing.
    None,
}

/// Finds what a request means among what became of tables, in LSN order.
pub(crate) fn find(request: &MomentRequest, events: &[TableEvent]) -> Meaning {
    let by_then = |e: &&TableEvent| request.until.is_none_or(|until| e.commit.time <= until);
    let is_it = |e: &&TableEvent| request.loss.is(&e.kind);
    let mut matching: Vec<_> =
        events.iter().filter(is_it).filter(|e| request.table.matches(&e.table)).filter(by_then).collect();
    let names: BTreeSet<_> = matching.iter().map(|e| &e.table).collect();
    if names.len() > 1 {
        let public: BTreeSet<_> = names.iter().filter(|name| name.schema == "public").collect();
        match (request.table.is_bare(), public.first()) {
            // A bare name means public's table, as with PostgreSQL's own search path.
            (true, Some(name)) if public.len() == 1 => matching.retain(|e| e.table == ***name),
            _ => {
                let last = |name: &&TableName| {
                    let event = matching.iter().rev().find(|e| e.table == **name)?;
                    Some(((*name).clone(), Happened::of(event)))
                };
                return Meaning::Several(names.iter().filter_map(last).collect());
            }
        }
    }
    let Some(event) = matching.pop() else { return Meaning::None };
    let same = |e: &&TableEvent| e.commit.start == event.commit.start && *e != event;
    let others = events.iter().filter(is_it).filter(|e| e.table == event.table && *e != event);
    Meaning::One(Box::new(Moment {
        loss: request.loss,
        table: event.table.to_string(),
        oid: event.oid,
        xid: event.commit.xid,
        time: event.commit.time,
        commit_lsn: event.commit.start,
        commit_end: Some(event.commit.end),
        lsn: event.before,
        with_database: event.kind == TableEventKind::Dropped { with_database: true },
        prepared: false,
        gid: None,
        also: events.iter().filter(is_it).filter(same).map(|e| e.table.to_string()).collect(),
        others: others.map(Happened::of).collect(),
    }))
}

/// What comes near a request that means nothing: what happened to some partitions of such a table, or to tables of such a
/// name instead, what is there under it, and names like it.
pub(crate) fn near(
    request: &MomentRequest,
    events: &[TableEvent],
    partly: &[PartitionsTruncated],
    there: &[TableName],
) -> Vec<String> {
    let some = |t: &PartitionsTruncated| {
        let PartitionsTruncated { event, partitions, truncated } = t;
        let names = listed(truncated.iter().map(ToString::to_string).collect::<Vec<_>>().iter());
        let (count, xid, time) = (truncated.len(), event.commit.xid, event.commit.time);
        format!(
            "of the {partitions} partitions of {} transaction {xid} of {time} truncated {count}: {names}; name one of them",
            event.table
        )
    };
    let mut lines: Vec<_> = partly.iter().rev().map(some).collect();
    for event in events.iter().filter(|e| request.table.matches(&e.table)) {
        let what = match &event.kind {
            TableEventKind::Renamed { to } => format!("renamed to {to}"),
            TableEventKind::Dropped { .. } => "dropped".to_owned(),
            TableEventKind::Truncated => "truncated".to_owned(),
            TableEventKind::Created | TableEventKind::Rewritten => continue,
        };
        let (xid, time) = (event.commit.xid, event.commit.time);
        lines.push(format!("{} was {what} by transaction {xid} of {time}", event.table));
    }
    lines.extend(
        there
            .iter()
            .filter(|name| request.table.matches(name))
            .map(|name| format!("{name} is there where the archived WAL ends")),
    );
    let wanted = request.table.table().to_lowercase();
    let like = |name: &&TableName| {
        let name = name.table.to_lowercase();
        let far = (wanted.chars().count().saturating_add(1) / 3).max(1);
        distance(&wanted, &name) <= far || (wanted.len() > 3 && name.contains(&wanted))
    };
    let happened = events.iter().filter(|e| request.loss.is(&e.kind)).map(|e| &e.table);
    let alike: BTreeSet<_> = happened.filter(|name| !request.table.matches(name)).filter(like).collect();
    if !alike.is_empty() {
        let names: Vec<_> = alike.iter().map(ToString::to_string).collect();
        lines.push(format!("{} under a name like it: {}", request.loss.done(), listed(names.iter())));
    }
    lines.truncate(LISTED_MAX);
    lines
}

/// How many characters must be changed, added or left out to make one word of the other.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, c) in a.chars().enumerate() {
        let mut left = i.saturating_add(1);
        let mut next = vec![left];
        for (d, pair) in b.iter().zip(row.windows(2)) {
            let (diagonal, up) = (pair.first().copied().unwrap_or(0), pair.last().copied().unwrap_or(0));
            let change = diagonal.saturating_add(usize::from(*d != c));
            left = change.min(up.saturating_add(1)).min(left.saturating_add(1));
            next.push(left);
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use waltide_format::engines::postgres::catalogue::Commit;

    fn event(kind: TableEventKind, name: &str, xid: u32) -> TableEvent {
        let mut parts = name.split('.').map(str::to_owned);
        let mut part = || parts.next().unwrap();
        let table = TableName { database: part(), schema: part(), table: part() };
        let start = Lsn::from(u64::from(xid) * 0x100);
        let time = TimestampTz::from_postgres_micros(i64::from(xid) * 1_000_000);
        let commit = Commit { xid: xid.into(), start, end: start.saturating_add(40), time };
        TableEvent { kind, table, database: 5, oid: 16_384, relkind: b'r', commit, before: start }
    }

    fn dropped(name: &str, xid: u32) -> TableEvent {
        event(TableEventKind::Dropped { with_database: false }, name, xid)
    }

    fn request(table: &str) -> MomentRequest {
        MomentRequest { loss: Loss::Drop, table: table.parse().unwrap(), until: None }
    }

    #[test]
    fn the_last_drop_is_meant_and_the_others_and_what_went_with_it_are_told() {
        let events = [
            dropped("shop.public.orders", 1),
            event(TableEventKind::Truncated, "shop.public.orders", 2),
            dropped("shop.public.items", 3),
            dropped("shop.public.orders", 3),
        ];
        let Meaning::One(moment) = find(&request("public.orders"), &events) else { panic!() };
        assert_eq!((moment.xid, moment.lsn), (Xid::from(3), Lsn::from(0x300)));
        assert_eq!(moment.also, ["shop.public.items"]);
        assert_eq!(moment.others.iter().map(|o| o.xid.get()).collect::<Vec<_>>(), [1]);
        let told = moment.told();
        assert_eq!(told[0], "the same transaction also dropped 1 more: shop.public.items");
        assert!(
            told[1].starts_with("shop.public.orders was dropped at other times too: 2000-01-01"),
            "{told:?}"
        );

        let early =
            MomentRequest { until: Some(TimestampTz::from_postgres_micros(2_500_000)), ..request("orders") };
        let Meaning::One(moment) = find(&early, &events) else { panic!() };
        assert_eq!((moment.xid, moment.others[0].xid), (Xid::from(1), Xid::from(3)));
        let truncate = MomentRequest { loss: Loss::Truncate, ..request("orders") };
        let Meaning::One(moment) = find(&truncate, &events) else { panic!() };
        assert_eq!(
            moment.to_string(),
            format!("before shop.public.orders was truncated by transaction 2 of {}, at 0/200", moment.time)
        );
    }

    #[test]
    fn a_bare_name_is_publics_and_else_must_be_the_only_one() {
        let events = [
            dropped("shop.sales.orders", 1),
            dropped("shop.public.orders", 2),
            dropped("crm.sales.items", 3),
            dropped("shop.sales.items", 4),
        ];
        assert!(matches!(find(&request("orders"), &events), Meaning::One(m) if m.xid == Xid::from(2)));
        assert!(matches!(find(&request("sales.orders"), &events), Meaning::One(m) if m.xid == Xid::from(1)));
        let Meaning::Several(found) = find(&request("items"), &events) else { panic!() };
        assert_eq!(
            found.iter().map(|(n, _)| n.to_string()).collect::<Vec<_>>(),
            ["crm.sales.items", "shop.sales.items"]
        );
        assert!(matches!(find(&request("sales.items"), &events), Meaning::Several(_)));
        assert!(matches!(find(&request("crm.sales.items"), &events), Meaning::One(_)));
        assert_eq!(find(&request("nothing"), &events), Meaning::None);
    }

    #[test]
    fn what_means_nothing_is_answered_with_what_comes_near() {
        let to = TableName { database: "shop".into(), schema: "public".into(), table: "orders_old".into() };
        let events = [
            event(TableEventKind::Renamed { to: to.clone() }, "shop.public.orders", 1),
            dropped("shop.public.orders_old", 2),
        ];
        let lines = near(&request("orders"), &events, &[], &[]);
        assert!(
            lines[0]
                .starts_with("shop.public.orders was renamed to shop.public.orders_old by transaction 1 of"),
            "{lines:?}"
        );
        assert_eq!(lines[1], "dropped under a name like it: shop.public.orders_old");
        assert_eq!(
            near(&request("ordres_old"), &events, &[], &[]),
            ["dropped under a name like it: shop.public.orders_old"]
        );
        assert_eq!(
            near(&request("orders_old"), &[], &[], &[to]),
            ["shop.public.orders_old is there where the archived WAL ends"]
        );
        assert_eq!(near(&request("unlike"), &events, &[], &[]), Vec::<String>::new());
    }

    proptest! {
        #[test]
        fn a_distance_is_zero_only_for_the_same_and_no_longer_than_the_words(a in "[ab]{0,6}", b in "[ab]{0,6}") {
            let d = distance(&a, &b);
            prop_assert_eq!(d, distance(&b, &a));
            prop_assert_eq!(d == 0, a == b);
            prop_assert!(d <= a.len().max(b.len()) && d >= a.len().abs_diff(b.len()));
        }
    }
}
