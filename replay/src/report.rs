//! A drill's report as one HTML page: nothing to load from elsewhere, readable by day and by night, and on paper.

use std::fmt::{self, Display, Write as _};

use waltide_format::TimestampTz;
use waltide_format::archive::{DrillOutcome, DrillPhase, DrillRecord, DrillVerdict};

use crate::drill::{DrillReport, now};

/// As many earlier drills as the page shows.
const HISTORY_SHOWN: usize = 30;

const STYLE: &str = "
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1d2327;--soft:#5d6870;--line:#dfe3e6;--good:#1a7f4b;
--goodbg:#e6f4ec;--bad:#b3261e;--badbg:#fbe9e7;--warn:#8a5a00;--warnbg:#fdf3dc;--c0:#4269a5;--c1:#6a9bc3;--c2:#3f8f7f;
--c3:#c98b2b;--c4:#8d6aa8;--c5:#7b8790}
@media(prefers-color-scheme:dark){:root{--bg:#14181b;--card:#1c2226;--ink:#e5e9ec;--soft:#98a4ad;--line:#2f383e;
--good:#6fd39d;--goodbg:#173126;--bad:#ff9c92;--badbg:#3a1d1b;--warn:#f0c469;--warnbg:#352a14;--c0:#6f95d3;
--c1:#8fbbe0;--c2:#5fb8a5;--c3:#e0ab55;--c4:#b294cc;--c5:#8f9ba4}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.55 system-ui,-apple-system,'Segoe UI',sans-serif}
main{max-width:1000px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:18px;margin:32px 0 10px}h3{font-size:14px;margin:24px 0 8px;color:var(--soft);
font-weight:600}
.sub{color:var(--soft);margin:0}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:20px 22px;margin-top:20px}
.verdict{display:inline-block;border-radius:999px;padding:2px 12px;font-weight:600;font-size:14px}
.passed{color:var(--good);background:var(--goodbg)}.failed{color:var(--bad);background:var(--badbg)}
.skipped{color:var(--warn);background:var(--warnbg)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:14px;margin:18px 0}
.figure b{display:block;font-size:22px;font-weight:600}.figure span{color:var(--soft);font-size:13px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:0}dt{color:var(--soft)}dd{margin:0;
overflow-wrap:anywhere}
.bar{display:flex;height:26px;border-radius:6px;overflow:hidden;background:var(--line)}
.bar i{display:block;min-width:2px}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0 0;padding:0;list-style:none;font-size:13px}
.legend i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px}
.c0{background:var(--c0)}.c1{background:var(--c1)}.c2{background:var(--c2)}.c3{background:var(--c3)}.c4{background:var(--c4)}
.c5{background:var(--c5)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
th{text-align:left;color:var(--soft);font-weight:600;font-size:13px}
th,td{padding:6px 14px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
td.n,th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}td.t{white-space:nowrap}
td.d{overflow-wrap:anywhere;white-space:pre-line}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--badbg);border-radius:8px;padding:12px 14px;font-size:13px;
margin:14px 0 0}
code{font:13px ui-monospace,SFMono-Regular,Menlo,monospace}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font:12px system-ui,sans-serif}
ul.notes{margin:0;padding-left:18px}
footer{color:var(--soft);font-size:13px;margin-top:28px}
@media print{body{background:#fff}.card{break-inside:avoid}}
";

/// The page.
pub fn html(report: &DrillReport) -> String {
    let mut page = String::new();
    // Writing to a String does not fail.
    let _ = write_page(&mut page, report);
    page
}

fn write_page(out: &mut String, report: &DrillReport) -> fmt::Result {
    let cluster = Text(&report.cluster);
    write!(
        out,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>Recovery drill of {cluster}: {}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n",
        verdict_words(report.verdict)
    )?;
    let count = report.drills.len();
    let passed = report.drills.iter().filter(|d| d.verdict.passed()).count();
    writeln!(out, "<h1>Recovery drill of {cluster}</h1>")?;
    writeln!(out, "<p class=\"sub\">archive <code>{}</code></p>", Text(&report.archive))?;
    if count != 1 {
        let class = verdict_class(report.verdict);
        writeln!(
            out,
            "<p><span class=\"verdict {class}\">{}</span> {passed} of {count} drills passed</p>",
            verdict_words(report.verdict)
        )?;
    }
    for (i, drill) in report.drills.iter().enumerate() {
        let title =
            if count == 1 { String::new() } else { format!("Drill {} of {count}", i.saturating_add(1)) };
        write_drill(out, drill, &title)?;
    }
    write_history(out, report)?;
    writeln!(out, "<footer>Written by waltide on {}.</footer>\n</main>\n</body>\n</html>", minute(now()))
}

fn write_drill(out: &mut String, drill: &DrillRecord, title: &str) -> fmt::Result {
    writeln!(out, "<section class=\"card\">")?;
    if !title.is_empty() {
        writeln!(out, "<h2 style=\"margin-top:0\">{}</h2>", Text(title))?;
    }
    writeln!(
        out,
        "<p style=\"margin:0\"><span class=\"verdict {}\">{}</span> {}</p>",
        verdict_class(drill.verdict),
        verdict_words(drill.verdict),
        Text(summary(drill))
    )?;
    if let Some(error) = &drill.error {
        writeln!(out, "<pre>{}</pre>", Text(error))?;
    }
    writeln!(out, "<div class=\"figures\">")?;
    let mut figure = |value: String, name: &str| {
        writeln!(out, "<div class=\"figure\"><b>{}</b><span>{}</span></div>", Text(value), Text(name))
    };
    figure(drill.rto_seconds.map_or("none".into(), duration), "RTO: until the server answered")?;
    figure(drill.rpo_seconds.map_or("unknown".into(), duration), "RPO: since the last commit recovered")?;
    figure(bytes(drill.restored_bytes), "restored from the base backup")?;
    figure(bytes(drill.wal_bytes), "of WAL replayed")?;
    writeln!(out, "</div>")?;
    write_phases(out, &drill.phases)?;
    writeln!(out, "<h3>What was restored</h3>\n<dl>")?;
    let mut row =
        |name: &str, value: String| writeln!(out, "<dt>{}</dt><dd>{}</dd>", Text(name), Text(value));
    row("Target", drill.target.clone())?;
    if let Some(backup) = &drill.backup {
        row("Backup", backup.to_string())?;
    }
    if let Some(commit) = &drill.last_commit {
        row("Last commit", format!("transaction {} at {}, {}", commit.xid, commit.lsn, commit.time))?;
    }
    if let Some(lsn) = drill.end_lsn {
        let timeline = drill.timeline.map(|t| format!(" on timeline {t}")).unwrap_or_default();
        row("Recovered to", format!("{lsn}{timeline}"))?;
    }
    row("Started", format!("{} on {}", drill.started, drill.host))?;
    row("Ended", drill.ended.to_string())?;
    if let Some(version) = &drill.server_version {
        row("Server", format!("PostgreSQL {version}"))?;
    }
    if let Some(seed) = drill.seed {
        row("Drawn with", format!("--seed {seed}"))?;
    }
    row("Record", drill.id.clone())?;
    writeln!(out, "</dl>")?;
    if !drill.checks.is_empty() {
        writeln!(
            out,
            "<h3>Checks</h3>\n<div class=\"scroll\"><table>\n\
             <tr><th>Check</th><th>Result</th><th>Found</th><th class=\"n\">Took</th></tr>"
        )?;
        for check in &drill.checks {
            let (class, word) = match check.outcome {
                DrillOutcome::Passed => ("passed", "passed"),
                DrillOutcome::Failed => ("failed", "failed"),
                DrillOutcome::Skipped => ("skipped", "skipped"),
            };
            writeln!(
                out,
                "<tr><td class=\"d\">{}</td><td><span class=\"verdict {class}\">{word}</span></td>\
                 <td class=\"d\">{}</td><td class=\"n\">{}</td></tr>",
                Text(&check.name),
                Text(&check.detail),
                duration(check.seconds)
            )?;
        }
        writeln!(out, "</table></div>")?;
    }
    if !drill.settings.is_empty() {
        writeln!(
            out,
            "<h3>Settings of the cluster that the scratch server did not get</h3>\n<div class=\"scroll\"><table>\n\
             <tr><th>Setting</th><th>In the cluster</th><th>In the drill</th></tr>"
        )?;
        for setting in &drill.settings {
            writeln!(
                out,
                "<tr><td><code>{}</code></td><td class=\"d\"><code>{}</code></td><td class=\"d\"><code>{}</code></td></tr>",
                Text(&setting.name),
                Text(&setting.found),
                Text(if setting.used.is_empty() { "''" } else { &setting.used })
            )?;
        }
        writeln!(out, "</table></div>")?;
    }
    if !drill.notes.is_empty() {
        writeln!(out, "<h3>Notes</h3>\n<ul class=\"notes\">")?;
        for note in &drill.notes {
            writeln!(out, "<li>{}</li>", Text(note))?;
        }
        writeln!(out, "</ul>")?;
    }
    writeln!(out, "</section>")
}

fn write_phases(out: &mut String, phases: &[DrillPhase]) -> fmt::Result {
    let total: f64 = phases.iter().map(|p| p.seconds.max(0.0)).sum();
    if total <= 0.0 || !total.is_finite() {
        return Ok(());
    }
    writeln!(
        out,
        "<h3>Where the time went: {} in all</h3>\n<div class=\"bar\" role=\"img\" aria-label=\"phases\">",
        duration(total)
    )?;
    for (i, phase) in phases.iter().enumerate() {
        let share = phase.seconds.max(0.0) / total * 100.0;
        writeln!(
            out,
            "<i class=\"c{}\" style=\"width:{share:.2}%\" title=\"{}: {}\"></i>",
            i % 6,
            Text(&phase.name),
            duration(phase.seconds)
        )?;
    }
    writeln!(out, "</div>\n<ul class=\"legend\">")?;
    for (i, phase) in phases.iter().enumerate() {
        let text = format!("{} {}", phase.name, duration(phase.seconds));
        writeln!(out, "<li><i class=\"c{}\"></i>{}</li>", i % 6, Text(text))?;
    }
    writeln!(out, "</ul>")
}

fn write_history(out: &mut String, report: &DrillReport) -> fmt::Result {
    let all: Vec<&DrillRecord> = report.history.iter().chain(&report.drills).collect();
    if report.history.is_empty() {
        return Ok(());
    }
    let shown = all.get(all.len().saturating_sub(HISTORY_SHOWN)..).unwrap_or_default();
    let passed = shown.iter().filter(|d| d.verdict.passed()).count();
    writeln!(
        out,
        "<section class=\"card\">\n<h2 style=\"margin-top:0\">The last {} drills</h2>\n<p class=\"sub\">{passed} passed{}</p>",
        shown.len(),
        Text(trend(shown).map(|t| format!("; {t}")).unwrap_or_default())
    )?;
    write_chart(out, shown)?;
    writeln!(
        out,
        "<div class=\"scroll\"><table>\n<tr><th>Started</th><th>Result</th><th>Target</th><th class=\"n\">RTO</th>\
         <th class=\"n\">RPO</th><th class=\"n\">Restored</th></tr>"
    )?;
    for drill in shown.iter().rev() {
        writeln!(
            out,
            "<tr><td class=\"t\">{}</td><td class=\"t\"><span class=\"verdict {}\">{}</span></td><td class=\"d\">{}</td>\
             <td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td></tr>",
            minute(drill.started),
            verdict_class(drill.verdict),
            verdict_words(drill.verdict),
            Text(&drill.target),
            drill.rto_seconds.map_or("none".to_owned(), duration),
            drill.rpo_seconds.map_or("unknown".to_owned(), duration),
            bytes(drill.restored_bytes)
        )?;
    }
    writeln!(out, "</table></div>\n</section>")
}

/// A bar a drill, as high as its RTO.
fn write_chart(out: &mut String, shown: &[&DrillRecord]) -> fmt::Result {
    const HEIGHT: f64 = 120.0;
    const WIDTH: f64 = 900.0;
    let highest = shown.iter().filter_map(|d| d.rto_seconds).fold(0.0, f64::max);
    if highest <= 0.0 || !highest.is_finite() {
        return Ok(());
    }
    let step = f64::from(u32::try_from(shown.len()).unwrap_or(u32::MAX));
    let step = (WIDTH / step).min(60.0);
    writeln!(
        out,
        "<svg viewBox=\"0 0 {WIDTH:.0} {:.0}\" role=\"img\" aria-label=\"RTO of each drill\">\
         <text x=\"0\" y=\"12\">RTO, highest {}</text>",
        HEIGHT + 24.0,
        duration(highest)
    )?;
    let mut x = 0.0;
    for drill in shown {
        let height = drill.rto_seconds.map_or(3.0, |s| (s / highest * (HEIGHT - 20.0)).max(3.0));
        let colour = if drill.verdict.passed() { "--good" } else { "--bad" };
        writeln!(
            out,
            "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\" rx=\"2\" style=\"fill:var({colour})\">\
             <title>{}: {}</title></rect>",
            HEIGHT + 20.0 - height,
            (step * 0.7).max(1.0),
            minute(drill.started),
            drill.rto_seconds.map_or("no recovery".to_owned(), duration)
        )?;
        x += step;
    }
    writeln!(out, "</svg>")
}

/// How the last RTO compares with those before it.
fn trend(shown: &[&DrillRecord]) -> Option<String> {
    let (last, before) = shown.split_last()?;
    let last = last.rto_seconds?;
    let mut before: Vec<f64> = before.iter().filter_map(|d| d.rto_seconds).collect();
    before.sort_by(f64::total_cmp);
    let middle = before.get(before.len() / 2).copied().filter(|m| *m > 0.0)?;
    let change = (last / middle - 1.0) * 100.0;
    let words = match change {
        c if c > 10.0 => format!("{c:.0} % more than"),
        c if c < -10.0 => format!("{:.0} % less than", -c),
        _ => "as long as".to_owned(),
    };
    Some(format!(
        "the last took {} to recover, {words} the {} that is usual",
        duration(last),
        duration(middle)
    ))
}

/// What a drill showed, in a sentence.
pub fn summary(drill: &DrillRecord) -> String {
    let failed = drill.checks.iter().filter(|c| c.outcome == DrillOutcome::Failed).count();
    match (drill.verdict, failed) {
        (DrillVerdict::Passed, _) => format!("{} was restored and every check held", drill.target),
        (_, 0) => format!("{} was not restored", drill.target),
        (_, 1) => format!("{}: one check does not hold", drill.target),
        (_, n) => format!("{}: {n} checks do not hold", drill.target),
    }
}

/// A verdict in words.
pub const fn verdict_words(verdict: DrillVerdict) -> &'static str {
    match verdict {
        DrillVerdict::Passed => "passed",
        DrillVerdict::Failed => "failed",
        DrillVerdict::ArchiveAtFault => "archive at fault",
    }
}

const fn verdict_class(verdict: DrillVerdict) -> &'static str {
    if verdict.passed() { "passed" } else { "failed" }
}

/// Text that HTML does not take for anything else, in elements and in quoted attributes.
struct Text<T>(T);

impl<T: AsRef<str>> Display for Text<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.as_ref().chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                // These change how the text around them reads.
                '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}' => f.write_char('\u{FFFD}')?,
                c if c.is_control() && c != '\n' && c != '\t' => f.write_char('\u{FFFD}')?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

fn minute(t: TimestampTz) -> String {
    t.to_jiff().map_or("?".to_owned(), |t| t.strftime("%Y-%m-%d %H:%M UTC").to_string())
}

/// Seconds for people.
fn duration(seconds: f64) -> String {
    match seconds {
        s if !s.is_finite() => "?".to_owned(),
        s if s < 0.0095 => format!("{:.1} ms", s.max(0.0) * 1000.0),
        s if s < 1.0 => format!("{s:.2} s"),
        s if s < 120.0 => format!("{s:.1} s"),
        s if s < 7200.0 => format!("{:.0} min {:02.0} s", (s / 60.0).floor(), (s % 60.0).floor()),
        s if s < 172_800.0 => {
            format!("{:.0} h {:02.0} min", (s / 3600.0).floor(), (s % 3600.0 / 60.0).floor())
        }
        s => format!("{:.0} d {:.0} h", (s / 86_400.0).floor(), (s % 86_400.0 / 3600.0).floor()),
    }
}

/// Bytes for people.
#[allow(clippy::cast_precision_loss)]
fn bytes(n: u64) -> String {
    match n {
        0..1024 => format!("{n} B"),
        1024..1_048_576 => format!("{:.1} KiB", n as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", n as f64 / 1_048_576.0),
        _ => format!("{:.1} GiB", n as f64 / 1_073_741_824.0),
    }
}

/// A record for tests.
#[cfg(test)]
pub(crate) fn sample(number: u16, verdict: DrillVerdict) -> DrillRecord {
    use waltide_format::archive::{DrillCheck, DrillCommit, DrillSetting};
    use waltide_format::{Lsn, TimelineId};
    let started: TimestampTz = "2026-02-01T03:00:00Z".parse().unwrap();
    let started = started + std::time::Duration::from_secs(86_400 * u64::from(number));
    let id = format!("{}-{number:04x}", started.compact());
    let check = |name: &str, outcome, detail: &str| DrillCheck {
        name: name.into(),
        outcome,
        detail: detail.into(),
        seconds: 0.21,
    };
    let phase = |name: &str, seconds| DrillPhase { name: name.into(), seconds };
    DrillRecord {
        id,
        series: None,
        started,
        ended: started + std::time::Duration::from_secs(60),
        host: "db-drill".into(),
        verdict,
        error: None,
        target: "the end of the archived WAL".into(),
        seed: None,
        backup: Some("20260131T235959Z-1f4e".parse().unwrap()),
        server_version: Some("15.8".into()),
        timeline: Some(TimelineId::FIRST),
        end_lsn: Some(Lsn::from(0x300_0028)),
        last_commit: Some(DrillCommit { xid: 755, lsn: Lsn::from(0x300_0000), time: started }),
        phases: vec![
            phase("plan", 0.2),
            phase("restore", 21.0 + f64::from(number)),
            phase("recovery", 12.4),
            phase("checks", 9.0),
        ],
        checks: vec![
            check("the target was reached", DrillOutcome::Passed, "0/3000028"),
            check("select count(*) < 5 from \"t&c\"", DrillOutcome::Failed, "f"),
            check("pg_amcheck", DrillOutcome::Skipped, "it is not installed"),
        ],
        rto_seconds: Some(33.6 + f64::from(number)),
        rpo_seconds: Some(241.0),
        restored_bytes: 5 << 30,
        restored_files: 900,
        native_bytes: 0,
        wal_bytes: 312 << 20,
        segments: 20,
        settings: vec![DrillSetting {
            name: "archive_command".into(),
            found: "cp '%p' <x>".into(),
            used: String::new(),
        }],
        notes: vec!["WAL is fetched while recovery runs, and counted there".into()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> DrillReport {
        let history = (0..12)
            .map(|n| sample(n, if n == 5 { DrillVerdict::ArchiveAtFault } else { DrillVerdict::Passed }));
        let drill = DrillRecord { verdict: DrillVerdict::Failed, ..sample(12, DrillVerdict::Failed) };
        DrillReport::new("file:///archive", "main", vec![drill], history.collect())
    }

    #[test]
    fn everything_a_reader_looks_for_is_on_the_page() {
        let page = html(&report());
        for wanted in [
            "<title>Recovery drill of main: failed</title>",
            "one check does not hold",
            "45.6 s</b><span>RTO",
            "4 min 01 s</b><span>RPO",
            "title=\"restore: 33.0 s\"",
            "transaction 755 at 0/3000000",
            "archive_command",
            "The last 13 drills",
            "11 passed",
            "15 % more than",
        ] {
            assert!(page.contains(wanted), "{wanted} is not on the page:\n{page}");
        }
        if let Some(path) = std::env::var_os("WALTIDE_SAMPLE_REPORT") {
            std::fs::write(path, page).unwrap();
        }
    }

    #[test]
    fn nothing_is_loaded_from_elsewhere_and_nothing_runs() {
        let page = html(&report());
        for unwanted in ["<script", "http://", "https://", "<img", "<link", "@import", "url(", "src="] {
            assert!(!page.contains(unwanted), "{unwanted}");
        }
    }

    #[test]
    fn text_of_others_stays_text() {
        let evil = "\"><script>alert(1)</script>'&\u{202E}\u{7}";
        let mut report = report();
        report.archive = evil.into();
        report.cluster = evil.into();
        let drill = &mut report.drills[0];
        for text in [&mut drill.id, &mut drill.target, &mut drill.host] {
            *text = evil.into();
        }
        drill.error = Some(evil.into());
        drill.server_version = Some(evil.into());
        drill.notes = vec![evil.into()];
        drill.phases[0].name = evil.into();
        drill.checks[0].name = evil.into();
        drill.checks[0].detail = evil.into();
        drill.settings[0].name = evil.into();
        drill.settings[0].found = evil.into();
        drill.settings[0].used = evil.into();
        report.history[0].target = evil.into();
        let page = html(&report);
        assert!(!page.contains("<script") && !page.contains(evil) && !page.contains('\u{202E}'));
        let escaped = "&quot;&gt;&lt;script&gt;alert(1)&lt;/script&gt;&#39;&amp;\u{FFFD}\u{FFFD}";
        assert!(page.matches(escaped).count() >= 14, "{}", page.matches(escaped).count());
    }

    #[test]
    fn figures_that_make_no_sense_are_not_drawn() {
        let mut report = report();
        for drill in report.drills.iter_mut().chain(&mut report.history) {
            drill.rto_seconds = Some(f64::INFINITY);
            drill.rpo_seconds = Some(f64::NAN);
            drill.phases[0].seconds = -1.0;
            drill.phases[1].seconds = f64::NAN;
        }
        let page = html(&report);
        assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
    }
}
