//! The only place that prints: stdout is the answer, stderr the rest.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::io::Write as _;
use std::ops::ControlFlow;

use serde::Serialize;
use tracing_subscriber::filter::LevelFilter;
use waltide_format::TimestampTz;

use crate::args::Global;
use crate::context::Context;
use crate::exit::Failure;

/// Prints the answer: the value as one JSON document, or as the text made of it.
pub(crate) fn answer<T: Serialize>(
    context: &Context,
    value: &T,
    text: impl FnOnce() -> String,
) -> Result<(), Failure> {
    let out = match context.json {
        true => serde_json::to_string_pretty(value)?,
        false => text(),
    };
    raw(format!("{}\n", out.trim_end_matches('\n')).as_bytes())
}

/// Prints bytes as they are.
pub(crate) fn raw(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    arrived(stdout.write_all(bytes).and_then(|()| stdout.flush()))
}

/// Whether the answer got where it was to go. A reader that went away (`| head`) is no failure of ours.
fn arrived(written: std::io::Result<()>) -> Result<(), Failure> {
    match written {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::failed("the answer could not be written to stdout", e))
        }
        _ => Ok(()),
    }
}

/// An answer that comes line by line.
#[derive(Debug)]
pub(crate) struct Lines {
    out: std::io::BufWriter<std::io::Stdout>,
    written: std::io::Result<()>,
}

impl Lines {
    /// None so far.
    pub(crate) fn new() -> Self {
        Self { out: std::io::BufWriter::with_capacity(64 << 10, std::io::stdout()), written: Ok(()) }
    }

    /// A line; breaks where it could not be written.
    pub(crate) fn text(&mut self, line: &str) -> ControlFlow<()> {
        let written = writeln!(self.out, "{}", printable(line));
        self.went(written)
    }

    /// A value as JSON, on a line of its own.
    pub(crate) fn json<T: Serialize>(&mut self, value: &T) -> ControlFlow<()> {
        let written = serde_json::to_writer(&mut self.out, value).map_err(std::io::Error::from);
        let written = written.and_then(|()| writeln!(self.out));
        self.went(written)
    }

    /// Puts out what was kept back.
    pub(crate) fn flush(&mut self) {
        let flushed = self.out.flush();
        let _ = self.went(flushed);
    }

    /// The end.
    pub(crate) fn finish(mut self) -> Result<(), Failure> {
        self.flush();
        arrived(self.written)
    }

    fn went(&mut self, written: std::io::Result<()>) -> ControlFlow<()> {
        if self.written.is_ok() {
            self.written = written;
        }
        match self.written {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    }
}

/// Something that is good to know.
pub(crate) fn note(text: &str) {
    eprintln!("waltide: {text}");
}

/// What went wrong.
pub(crate) fn error(text: &str) {
    eprintln!("waltide: {text}");
}

/// What was behind it.
pub(crate) fn cause(text: &str) {
    eprintln!("  because: {text}");
}

/// What to do about it.
pub(crate) fn hint(text: &str) {
    eprintln!("  hint: {text}");
}

/// The libraries' own words go to stderr, as much of them as -q and -v ask for.
pub(crate) fn start_log(global: &Global) {
    let level = match (global.quiet, global.verbose) {
        (true, _) => LevelFilter::ERROR,
        (false, 0) => LevelFilter::WARN,
        (false, 1) => LevelFilter::INFO,
        (false, _) => LevelFilter::DEBUG,
    };
    let log = tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr);
    let _ = log.with_target(false).with_ansi(false).compact().try_init();
}

/// The text on one line, with nothing that a terminal would obey: what databases call things is anybody's.
pub(crate) fn printable(text: &str) -> String {
    let told = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(told).collect()
}

/// No column is made wider for a cell that is; `format!` itself panics beyond 65535.
const COLUMN_CHARS_MAX: usize = 200;

/// A table for people: columns as wide as their widest cell, two spaces apart.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|r| r.iter().map(|cell| printable(cell)).collect()).collect();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count());
        cells.chain(head.get(column).map(|h| h.chars().count())).max().unwrap_or(0).min(COLUMN_CHARS_MAX)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded: Vec<_> = cells.iter().zip(&widths).map(|(c, w)| format!("{c:<w$}")).collect();
        padded.join("  ").trim_end().to_owned()
    };
    let body = rows.iter().map(|r| line(r.iter().map(String::as_str).collect()));
    std::iter::once(line(head.to_vec())).chain(body).collect::<Vec<_>>().join("\n")
}

/// What is known of one thing, a fact a line.
pub(crate) fn facts(lines: &[(&str, String)]) -> String {
    let width = lines.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    let line = |(name, text): &(&str, String)| {
        let lines: Vec<_> = text.lines().map(printable).collect();
        let indented = lines.join(&format!("\n{:width$}  ", ""));
        format!("{name:<width$}  {indented}").trim_end().to_owned()
    };
    lines.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A name of ours, as JSON has it.
pub(crate) fn word<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}

/// A moment, to the second.
pub(crate) fn time(t: TimestampTz) -> String {
    t.to_jiff().map_or_else(|| t.to_string(), |t| t.strftime("%Y-%m-%d %H:%M:%S UTC").to_string())
}

/// Bytes for people: 1.5 GiB.
#[allow(clippy::cast_precision_loss)]
pub(crate) fn bytes(n: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = n as f64;
    let mut unit = 0usize;
    while value >= 1024.0 && unit < units.len().saturating_sub(1) {
        value /= 1024.0;
        unit = unit.saturating_add(1);
    }
    let name = units.get(unit).copied().unwrap_or("PiB");
    if unit == 0 { format!("{n} {name}") } else { format!("{value:.1} {name}") }
}

/// Seconds for people: 0.4 s, 2 min 5 s, 3 h 12 min.
pub(crate) fn duration(seconds: f64) -> String {
    if seconds < 60.0 {
        return format!("{seconds:.1} s");
    }
    let whole = std::time::Duration::try_from_secs_f64(seconds).map_or(u64::MAX, |d| d.as_secs());
    let (hours, minutes, rest) = (whole / 3600, whole / 60 % 60, whole % 60);
    match hours {
        0 => format!("{minutes} min {rest} s"),
        1..=47 => format!("{hours} h {minutes} min"),
        _ => format!("{} d {} h", hours / 24, hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_spans_are_told_as_people_say_them() {
        assert_eq!([bytes(5), bytes(1536), bytes(3 << 30)], ["5 B", "1.5 KiB", "3.0 GiB"]);
        assert_eq!(
            [duration(0.44), duration(125.0), duration(11_520.0), duration(200_000.0)],
            ["0.4 s", "2 min 5 s", "3 h 12 min", "2 d 7 h"]
        );
    }

    #[test]
    fn a_table_lines_its_columns_up() {
        let rows = vec![vec!["1".into(), "x".into()], vec!["22".into(), "y".into()]];
        assert_eq!(table(&["n", "name"], &rows), "n   name\n1   x\n22  y");
    }

    #[test]
    fn what_somebody_called_a_thing_neither_breaks_a_line_nor_commands_a_terminal() {
        assert_eq!(printable("ü\u{1b}[2J\n\t\u{9b}x"), "ü\\u{1b}[2J\\n\\t\\u{9b}x");
        assert_eq!(table(&["n"], &[vec!["a\nb".into()]]), "n\na\\nb");
        let long = "x".repeat(100_000);
        assert_eq!(
            table(&["n", "m"], &[vec![long.clone(), "y".into()]]).lines().last(),
            Some(&*format!("{long}  y"))
        );
        assert_eq!(facts(&[("name", "a\u{7}\nfaults  none".into())]), "name  a\\u{7}\n      faults  none");
    }

    #[test]
    fn an_answer_that_got_nowhere_is_a_failure_unless_nobody_reads_it() {
        let written = |kind: std::io::ErrorKind| arrived(Err(kind.into())).is_ok();
        assert!(written(std::io::ErrorKind::BrokenPipe) && !written(std::io::ErrorKind::StorageFull));
    }
}
