//! A time is read as PostgreSQL reads it, or refused: never as another moment.

use jiff::tz::TimeZone;
use waltide_format::TimestampTz;
use waltide_tests::Cluster;

const ZONES: &[&str] = &[
    "UTC",
    "America/New_York",
    "America/St_Johns",
    "Europe/Berlin",
    "Europe/Dublin",
    "Asia/Kathmandu",
    "Australia/Lord_Howe",
    "Africa/Casablanca",
    "Pacific/Apia",
];

const DAYS: &[&str] =
    &["2026-01-31", "2026-03-08", "2026-03-29", "2026-04-05", "2026-07-01", "2026-10-25", "2026-11-01"];

const CLOCKS: &[&str] = &[
    "",
    " 00:00",
    " 00:30:00",
    " 01:30:00.5",
    " 01:45:00",
    " 02:00:00",
    " 02:30:00",
    " 02:59:59.999999",
    " 12:00:60",
    "T23:59:60",
    " 24:00:00",
];

const SUFFIXES: &[&str] = &[
    "",
    "Z",
    "+00",
    "-05",
    "+05:45",
    "-0330",
    "+02:30:15",
    " UTC",
    " GMT",
    " CET",
    " CEST",
    " MET",
    " WET",
    " EET",
    " EEST",
    " EST",
    " EDT",
    " pst",
    " PDT",
    " HST",
    " BST",
    " IST",
    " JST",
    " AEST",
    " AEDT",
    " ACST",
    " NST",
    " NZDT",
    " MSK",
    " Europe/Berlin",
    " America/New_York",
    " EST5EDT",
];

#[test]
fn a_time_means_what_postgresql_takes_it_for() {
    let cluster = Cluster::builder("times").start();
    let mut compared = 0;
    for name in ZONES {
        let zone = TimeZone::get(name).unwrap();
        let texts = DAYS.iter().flat_map(|day| CLOCKS.iter().map(move |clock| format!("{day}{clock}")));
        // Only with a time of day may an offset follow.
        let texts: Vec<String> = texts
            .flat_map(|text| SUFFIXES.iter().map(move |suffix| format!("{text}{suffix}")))
            .filter(|text| text.contains(':') || text.len() == 10)
            .collect();
        let list = texts.iter().map(|text| format!("('{text}')")).collect::<Vec<_>>().join(", ");
        let answer = cluster.query(&format!(
            "set timezone = '{name}';
             select (extract(epoch from t::timestamptz) * 1000000)::bigint from (values {list}) as v (t)"
        ));
        let wanted: Vec<i64> =
            answer.lines().filter(|line| *line != "SET").map(|line| line.parse().unwrap()).collect();
        assert_eq!(wanted.len(), texts.len());
        for (text, want) in texts.iter().zip(wanted) {
            if let Ok(found) = TimestampTz::parse_in(text, &zone) {
                assert_eq!(found.unix_micros(), want, "{text} in {name}");
                compared += 1;
            }
        }
    }
    assert!(compared > 10_000, "{compared}");
}
