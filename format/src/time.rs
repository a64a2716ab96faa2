//! PostgreSQL's `timestamptz`: microseconds since 2000-01-01 00:00:00 UTC.

use std::fmt;
use std::str::FromStr;

use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, Offset, TimeZone};
use jiff::{Timestamp, Zoned};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Seconds from 1970-01-01 to 2000-01-01.
const POSTGRES_EPOCH_SECONDS: i64 = 946_684_800;

/// A moment, as PostgreSQL keeps it in commit records.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct TimestampTz(i64);

impl TimestampTz {
    /// From microseconds since 2000-01-01 UTC.
    pub const fn from_postgres_micros(micros: i64) -> Self {
        Self(micros)
    }

    /// Microseconds since 2000-01-01 UTC.
    pub const fn postgres_micros(self) -> i64 {
        self.0
    }

    /// From microseconds since 1970-01-01 UTC.
    pub const fn from_unix_micros(micros: i64) -> Self {
        Self(micros.saturating_sub(POSTGRES_EPOCH_SECONDS * 1_000_000))
    }

    /// Microseconds since 1970-01-01 UTC.
    pub const fn unix_micros(self) -> i64 {
        self.0.saturating_add(POSTGRES_EPOCH_SECONDS * 1_000_000)
    }

    /// The moment for jiff, where its calendar reaches that far (years -9999 to 9999).
    pub fn to_jiff(self) -> Option<Timestamp> {
        Timestamp::from_microsecond(self.0.checked_add(POSTGRES_EPOCH_SECONDS * 1_000_000)?).ok()
    }

    /// The moment of a jiff timestamp.
    pub fn from_jiff(t: Timestamp) -> Self {
        Self::from_unix_micros(t.as_microsecond())
    }

    /// Seconds from `earlier` to here.
    #[allow(clippy::cast_precision_loss)]
    pub fn seconds_since(self, earlier: Self) -> f64 {
        self.0.saturating_sub(earlier.0) as f64 / 1e6
    }

    /// As in `20260131T235959Z`, for names.
    pub fn compact(self) -> String {
        match self.to_jiff() {
            Some(t) => t.strftime("%Y%m%dT%H%M%SZ").to_string(),
            None => "99991231T235959Z".to_owned(),
        }
    }

    /// Reads RFC 3339, PostgreSQL's own form, or `@` and Unix seconds. A moment without an offset is in
    /// `zone`, like PostgreSQL takes it in its own `TimeZone`: what its clocks showed twice is standard time.
    pub fn parse_in(text: &str, zone: &TimeZone) -> Result<Self, TimeError> {
        let error = || TimeError { found: text.chars().take(80).collect() };
        let trimmed = text.trim();
        // jiff takes a leap second for the second before it.
        if let Some(before) = before_leap_second(trimmed) {
            let moment = Self::parse_in(&before, zone).map_err(|_| error())?;
            return Ok(Self(moment.0.saturating_add(1_000_000)));
        }
        if let Some(unix) = trimmed.strip_prefix('@') {
            return parse_unix(unix).ok_or_else(error);
        }
        if let Ok(t) = trimmed.parse::<Timestamp>() {
            return Ok(Self::from_jiff(t));
        }
        if let Ok(zoned) = trimmed.parse::<Zoned>() {
            return Ok(Self::from_jiff(zoned.timestamp()));
        }
        let (civil, offset) = split_offset(trimmed);
        let civil: DateTime = civil.trim_end().parse().map_err(|_| error())?;
        let zone = match offset {
            None => zone.clone(),
            Some(name) => zone_of(name).ok_or_else(error)?,
        };
        let moment = zone.to_ambiguous_timestamp(civil);
        let moment = match moment.offset() {
            AmbiguousOffset::Fold { .. } => moment.later(),
            _ => moment.compatible(),
        };
        Ok(Self::from_jiff(moment.map_err(|_| error())?))
    }
}

/// The text with second 59 where it has second 60.
fn before_leap_second(text: &str) -> Option<String> {
    let after_date = text.find(['T', 't', ' '])?.checked_add(1)?;
    let time = text.get(after_date..)?;
    let colons = time.as_bytes().get(2) == Some(&b':');
    let (minute, second, end) = if colons { (3, 6, 8) } else { (2, 4, 6) };
    let digits = |from, to| time.get(from..to).filter(|t| t.bytes().all(|b| b.is_ascii_digit()));
    let is_whole = digits(0, 2).is_some() && digits(minute, minute.checked_add(2)?).is_some();
    let is_leap = digits(second, end)? == "60" && (!colons || time.as_bytes().get(5) == Some(&b':'));
    let at = after_date.checked_add(second)?;
    (is_whole && is_leap)
        .then(|| format!("{}59{}", text.get(..at).unwrap_or_default(), time.get(end..).unwrap_or_default()))
}

/// `1763659800` or `1763659800.25`.
fn parse_unix(text: &str) -> Option<TimestampTz> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if fraction.len() > 6 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let seconds: i64 = whole.parse().ok()?;
    let micros: i64 = format!("{fraction:0<6}").parse().ok()?;
    let signed = if whole.starts_with('-') { micros.checked_neg()? } else { micros };
    let unix = seconds.checked_mul(1_000_000)?.checked_add(signed)?;
    let moment = TimestampTz::from_unix_micros(unix);
    moment.to_jiff().map(|_| moment)
}

/// Parts `2026-01-31 12:00:00+02` before its offset or zone name.
fn split_offset(text: &str) -> (&str, Option<&str>) {
    let time = text.find(':').unwrap_or(text.len());
    let zone = text
        .char_indices()
        .skip_while(|(i, _)| *i < time)
        .find(|(_, c)| matches!(c, '+' | '-') || c.is_alphabetic());
    match zone {
        Some((i, _)) => {
            let (civil, zone) = text.split_at(i);
            (civil, Some(zone))
        }
        None => (text, None),
    }
}

/// What PostgreSQL's default abbreviations mean, in minutes east of Greenwich, all the year round. Those whose meaning
/// has changed are left out; so are those that few know by heart.
const ABBREVIATIONS: &[(&str, i32)] = &[
    ("ACDT", 630),
    ("ACST", 570),
    ("ADT", -180),
    ("AEDT", 660),
    ("AEST", 600),
    ("AKDT", -480),
    ("AKST", -540),
    ("AST", -240),
    ("AWST", 480),
    ("BST", 60),
    ("CDT", -300),
    ("CEST", 120),
    ("CET", 60),
    ("CST", -360),
    ("EDT", -240),
    ("EEST", 180),
    ("EET", 120),
    ("EST", -300),
    ("GMT", 0),
    ("HKT", 480),
    ("HST", -600),
    ("IST", 120),
    ("JST", 540),
    ("KST", 540),
    ("MDT", -360),
    ("MEST", 120),
    ("MET", 60),
    ("MST", -420),
    ("NDT", -150),
    ("NST", -210),
    ("NZDT", 780),
    ("NZST", 720),
    ("PDT", -420),
    ("PST", -480),
    ("SAST", 120),
    ("UTC", 0),
    ("WET", 0),
    ("Z", 0),
];

/// A zone from `Z`, `UTC`, `CEST`, `+02`, `+0230`, `+02:30`, `+02:30:15` or an IANA name.
fn zone_of(name: &str) -> Option<TimeZone> {
    // Before IANA's names: CET is one of those, too, and has a summer there.
    if let Some((_, minutes)) = ABBREVIATIONS.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)) {
        return Some(Offset::from_seconds(minutes.checked_mul(60)?).ok()?.to_time_zone());
    }
    let Some(rest) = name.strip_prefix(['+', '-']) else { return TimeZone::get(name).ok() };
    let digits: String = rest.chars().filter(|c| *c != ':').collect();
    if !rest.bytes().all(|b| b.is_ascii_digit() || b == b':') || !matches!(digits.len(), 2 | 4 | 6) {
        return None;
    }
    let part = |from: usize| digits.get(from..from.checked_add(2)?)?.parse::<i32>().ok();
    let (h, m, s) = (part(0)?, part(2).unwrap_or(0), part(4).unwrap_or(0));
    if m > 59 || s > 59 {
        return None;
    }
    let seconds = h.checked_mul(3600)?.checked_add(m.checked_mul(60)?)?.checked_add(s)?;
    let signed = if name.starts_with('-') { seconds.checked_neg()? } else { seconds };
    Some(Offset::from_seconds(signed).ok()?.to_time_zone())
}

impl fmt::Display for TimestampTz {
    /// As PostgreSQL prints it with `TimeZone = 'UTC'`: `2026-01-31 23:59:59.123456+00`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(t) = self.to_jiff() else { return write!(f, "{} µs since 2000-01-01", self.0) };
        write!(f, "{}", t.strftime("%Y-%m-%d %H:%M:%S"))?;
        let micros = self.0.rem_euclid(1_000_000);
        if micros != 0 {
            let digits = format!("{micros:06}");
            write!(f, ".{}", digits.trim_end_matches('0'))?;
        }
        f.write_str("+00")
    }
}

impl fmt::Debug for TimestampTz {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for TimestampTz {
    type Err = TimeError;

    /// Reads any form of [`TimestampTz::parse_in`]; one without an offset is UTC.
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::parse_in(s, &TimeZone::UTC)
    }
}

/// In JSON a moment is RFC 3339 in UTC, with all six digits of the microsecond.
impl Serialize for TimestampTz {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self.to_jiff() {
            Some(t) => s.collect_str(&t.strftime("%Y-%m-%dT%H:%M:%S%.6fZ")),
            None => s.serialize_i64(self.0),
        }
    }
}

impl<'de> Deserialize<'de> for TimestampTz {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Micros(i64),
            Text(String),
        }
        match Form::deserialize(d)? {
            Form::Micros(v) => Ok(Self(v)),
            Form::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

impl std::ops::Add<std::time::Duration> for TimestampTz {
    type Output = Self;

    fn add(self, rhs: std::time::Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(rhs.as_micros()).unwrap_or(i64::MAX)))
    }
}

impl std::ops::Sub<std::time::Duration> for TimestampTz {
    type Output = Self;

    fn sub(self, rhs: std::time::Duration) -> Self {
        Self(self.0.saturating_sub(i64::try_from(rhs.as_micros()).unwrap_or(i64::MAX)))
    }
}

/// The text is no moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimeError {
    found: String,
}

impl fmt::Display for TimeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} is no time: write 2026-01-31T23:59:59Z, '2026-01-31 23:59:59+00' or @1769903999",
            self.found
        )
    }
}

impl std::error::Error for TimeError {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_form_of_a_moment_is_read() {
        let want: TimestampTz = "2026-01-31T21:59:59.5Z".parse().unwrap();
        for text in [
            "2026-01-31 21:59:59.5+00",
            "2026-01-31 23:59:59.5+02",
            "2026-01-31 23:59:59.5+02:00",
            "2026-01-31 23:59:59.5 +0200",
            "2026-01-31T18:59:59.5-03:00",
            "2026-01-31 21:59:59.5 UTC",
            "2026-01-31 22:59:59.5 Europe/Berlin",
            "2026-01-31 21:59:59.5",
            "@1769896799.5",
        ] {
            assert_eq!(text.parse::<TimestampTz>(), Ok(want), "{text}");
        }
        assert_eq!(want.to_string(), "2026-01-31 21:59:59.5+00");
        for bad in [
            "",
            "yesterday",
            "2026-13-01 00:00:00",
            "@",
            "@x",
            "2026-01-31 21:59:59+99",
            "@99999999999999999",
        ] {
            assert!(bad.parse::<TimestampTz>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_moment_without_an_offset_is_in_the_zone_given() {
        let berlin = TimeZone::get("Europe/Berlin").unwrap();
        let moment = TimestampTz::parse_in("2026-01-31 12:00:00", &berlin).unwrap();
        assert_eq!(moment.to_string(), "2026-01-31 11:00:00+00");
    }

    #[test]
    fn what_clocks_show_twice_or_never_is_taken_as_postgresql_takes_it() {
        let zone = TimeZone::get("America/New_York").unwrap();
        for (text, want) in [
            ("2026-11-01 00:59:59", "2026-11-01 04:59:59+00"),
            ("2026-11-01 01:30:00", "2026-11-01 06:30:00+00"),
            ("2026-11-01 02:00:00", "2026-11-01 07:00:00+00"),
            ("2026-03-08 02:30:00", "2026-03-08 07:30:00+00"),
            ("2026-07-01 12:00:00 CET", "2026-07-01 11:00:00+00"),
            ("2026-07-01 12:00:00 cest", "2026-07-01 10:00:00+00"),
            ("2026-07-01 12:00:00 Europe/Berlin", "2026-07-01 10:00:00+00"),
            ("2026-12-31 23:59:60+00", "2027-01-01 00:00:00+00"),
            ("20261231T235960Z", "2027-01-01 00:00:00+00"),
            ("2026-12-31T23:59:60.25Z", "2027-01-01 00:00:00.25+00"),
        ] {
            assert_eq!(TimestampTz::parse_in(text, &zone).unwrap().to_string(), want, "{text}");
        }
        for bad in ["2026-12-31 23:60:00", "2026-12-31 23:59:61", "2026-12-31 12:00 XYZ"] {
            assert!(TimestampTz::parse_in(bad, &zone).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_moment_is_read_as_it_is_printed(micros in -60_000_000_000_000_000i64..250_000_000_000_000_000) {
            let moment = TimestampTz::from_postgres_micros(micros);
            prop_assert_eq!(moment.to_string().parse::<TimestampTz>(), Ok(moment));
            let json = serde_json::to_string(&moment).unwrap();
            prop_assert_eq!(serde_json::from_str::<TimestampTz>(&json).unwrap(), moment);
        }

        #[test]
        fn any_text_is_a_moment_or_an_error(s in ".{0,40}") {
            let _ = s.parse::<TimestampTz>();
        }
    }
}
