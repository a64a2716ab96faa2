//! What PostgreSQL's own tools say about WAL and control files: the truth our readers are held against.
//! Nothing here uses our own crates.

use crate::{Failure, PgInstall, Result};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread::JoinHandle;

/// One record as `pg_waldump --bkp-details` prints it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalRecord {
    /// Where it starts.
    pub lsn: u64,
    /// Where the one before it starts.
    pub prev: u64,
    /// Its transaction, 0 for none.
    pub xid: u32,
    /// The resource manager's name.
    pub rmgr: String,
    /// Its length without page images (pg_waldump's `rec`).
    pub rec_len: u32,
    /// Its whole length (pg_waldump's `tot`).
    pub total_len: u32,
    /// The description, `INSERT off 1 flags 0x00`.
    pub desc: String,
    /// The blocks it refers to.
    pub blocks: Vec<BlockRef>,
}

impl WalRecord {
    /// The first word of the description: `INSERT`, `COMMIT`, `SPLIT_L`.
    pub fn kind(&self) -> &str {
        self.desc.split_whitespace().next().unwrap_or("")
    }
}

/// One block reference of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockRef {
    /// Its number in the record.
    pub id: u8,
    /// Tablespace.
    pub spc: u32,
    /// Database.
    pub db: u32,
    /// The relation's file number.
    pub rel: u32,
    /// `main`, `fsm`, `vm` or `init`.
    pub fork: String,
    /// The block in the fork.
    pub blk: u32,
    /// The page image, if it has one.
    pub image: Option<PageImage>,
}

/// The image of a page in a block reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageImage {
    /// False if it is only for wal_consistency_checking.
    pub apply: bool,
    /// Where the hole that was left out starts.
    pub hole_offset: u16,
    /// How long it is.
    pub hole_length: u16,
    /// `pglz`, `lz4` or `zstd`, if it is compressed.
    pub compression: Option<String>,
}

/// `0/1A2B3C4D` as a number.
pub fn parse_lsn(text: &str) -> Option<u64> {
    let (high, low) = text.split_once('/')?;
    let half = |digits: &str| u32::from_str_radix(digits, 16).ok().map(u64::from);
    Some(half(high)? << 32 | half(low)?)
}

/// A number as `0/1A2B3C4D`.
pub fn format_lsn(lsn: u64) -> String {
    format!("{:X}/{:X}", lsn >> 32, lsn & 0xffff_ffff)
}

/// A running pg_waldump: an iterator over its records, read as they come.
#[derive(Debug)]
pub struct Waldump {
    child: Child,
    records: Records<BufReader<std::process::ChildStdout>>,
    stderr: Option<JoinHandle<String>>,
}

/// How a pg_waldump ended.
#[derive(Clone, Debug)]
pub struct WaldumpEnd {
    /// Whether it reached the end it was given. Running into the end of the WAL is no success.
    pub success: bool,
    /// What it complained about: why the log ended.
    pub message: String,
}

impl Waldump {
    /// From the first record of segment `first` to the end of segment `last`, or to the end of the log.
    pub fn segments(wal_dir: &Path, first: &str, last: Option<&str>) -> Self {
        let mut args = vec!["-p".to_owned(), wal_dir.display().to_string(), first.to_owned()];
        args.extend(last.map(str::to_owned));
        Self::start(&args)
    }

    /// From `start` to `end`, on one timeline.
    pub fn range(wal_dir: &Path, timeline: u32, start: u64, end: Option<u64>) -> Self {
        let mut args = vec![
            "-p".to_owned(),
            wal_dir.display().to_string(),
            format!("--timeline={timeline}"),
            format!("--start={}", format_lsn(start)),
        ];
        args.extend(end.map(|lsn| format!("--end={}", format_lsn(lsn))));
        Self::start(&args)
    }

    fn start(args: &[String]) -> Self {
        let runner = PgInstall::find().runner("pg_waldump").arg("--bkp-details").args(args);
        let mut child = runner
            .into_command()
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("pg_waldump can be started");
        let stdout = child.stdout.take().expect("it is piped");
        let mut stderr = child.stderr.take().expect("it is piped");
        let reader = std::thread::spawn(move || {
            let mut text = Vec::new();
            stderr.read_to_end(&mut text).expect("a pipe can be read");
            String::from_utf8_lossy(&text).into_owned()
        });
        Self { child, records: Records::new(BufReader::new(stdout)), stderr: Some(reader) }
    }

    /// Reads what is left and says how it ended.
    pub fn finish(mut self) -> (Vec<WalRecord>, WaldumpEnd) {
        let rest: Vec<WalRecord> = self.by_ref().collect();
        let success = self.child.wait().expect("a child can be waited for").success();
        let reader = self.stderr.take().expect("it is taken only here");
        let message = reader.join().expect("the reader does not panic");
        (rest, WaldumpEnd { success, message })
    }
}

impl Iterator for Waldump {
    type Item = WalRecord;

    fn next(&mut self) -> Option<WalRecord> {
        self.records.next().map(|record| record.unwrap_or_else(|e| panic!("{e}")))
    }
}

impl Drop for Waldump {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The records in pg_waldump's output.
#[derive(Debug)]
pub struct Records<R> {
    input: R,
    /// The line that ended the record before.
    ahead: Option<String>,
}

impl<R: BufRead> Records<R> {
    /// Reads the output of `pg_waldump --bkp-details`.
    pub fn new(input: R) -> Self {
        Self { input, ahead: None }
    }

    fn line(&mut self) -> Result<Option<String>> {
        // Not read_line: descriptions may hold bytes of any encoding.
        let mut bytes = Vec::new();
        let read =
            self.input.read_until(b'\n', &mut bytes).map_err(|e| Failure::new(format!("pg_waldump: {e}")))?;
        if read == 0 {
            return Ok(None);
        }
        let text = String::from_utf8_lossy(&bytes);
        Ok(Some(text.strip_suffix('\n').unwrap_or(&text).to_owned()))
    }

    fn record(&mut self) -> Result<Option<WalRecord>> {
        let mut first = self.ahead.take();
        while first.is_none() {
            match self.line()? {
                None => return Ok(None),
                // Said when the segment starts in the middle of a record.
                Some(line) if line.is_empty() || line.starts_with("first record is after") => {}
                Some(line) => first = Some(line),
            }
        }
        let first = first.expect("the loop ends with one");
        let mut record =
            parse_record(&first).ok_or_else(|| Failure::new(format!("not a record: {first}")))?;
        while let Some(line) = self.line()? {
            if line.starts_with("rmgr: ") {
                self.ahead = Some(line);
                break;
            }
            if let Some(text) = line.strip_prefix("\tblkref #") {
                let block = parse_block(text).ok_or_else(|| Failure::new(format!("not a block: {line}")))?;
                record.blocks.push(block);
            } else if !line.is_empty() {
                // Text from the database may have line ends.
                record.desc.push('\n');
                record.desc.push_str(&line);
            }
        }
        Ok(Some(record))
    }
}

impl<R: BufRead> Iterator for Records<R> {
    type Item = Result<WalRecord>;

    fn next(&mut self) -> Option<Result<WalRecord>> {
        self.record().transpose()
    }
}

/// `rmgr: Heap        len (rec/tot):    233/   233, tx:          0, lsn: 0/00800068, prev 0/007FDFF0, desc: …`
fn parse_record(line: &str) -> Option<WalRecord> {
    let rest = line.strip_prefix("rmgr: ")?;
    let (rmgr, rest) = rest.split_once("len (rec/tot):")?;
    let (rec_len, rest) = rest.split_once('/')?;
    let (total_len, rest) = rest.split_once(", tx:")?;
    let (xid, rest) = rest.split_once(", lsn:")?;
    let (lsn, rest) = rest.split_once(", prev ")?;
    let (prev, desc) = rest.split_once(", desc:")?;
    Some(WalRecord {
        lsn: parse_lsn(lsn.trim())?,
        prev: parse_lsn(prev.trim())?,
        xid: xid.trim().parse().ok()?,
        rmgr: rmgr.trim().to_owned(),
        rec_len: rec_len.trim().parse().ok()?,
        total_len: total_len.trim().parse().ok()?,
        desc: desc.trim().to_owned(),
        blocks: Vec::new(),
    })
}

/// `0: rel 1663/1/1259 fork main blk 9 (FPW); hole: offset: 0, length: 0, compression saved: 1, method: pglz`
fn parse_block(text: &str) -> Option<BlockRef> {
    let (id, rest) = text.split_once(": rel ")?;
    let (locator, rest) = rest.split_once(" fork ")?;
    let (fork, rest) = rest.split_once(" blk ")?;
    let (blk, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    let mut locator = locator.split('/').map(|part| part.parse::<u32>().ok());
    let (spc, db, rel) = (locator.next()??, locator.next()??, locator.next()??);
    let image = if rest.trim().is_empty() { None } else { Some(parse_image(rest)?) };
    Some(BlockRef {
        id: id.parse().ok()?,
        spc,
        db,
        rel,
        fork: fork.to_owned(),
        blk: blk.trim().parse().ok()?,
        image,
    })
}

fn parse_image(text: &str) -> Option<PageImage> {
    let (what, rest) = text.split_once("; hole: offset: ")?;
    let (offset, rest) = rest.split_once(", length: ")?;
    let (length, rest) = rest.split_once(',').unwrap_or((rest, ""));
    let compression = rest.split_once("method: ").map(|(_, method)| method.trim().to_owned());
    Some(PageImage {
        apply: !what.contains("WAL verification"),
        hole_offset: offset.parse().ok()?,
        hole_length: length.trim().parse().ok()?,
        compression,
    })
}

/// The counts and bytes of one resource manager, by `pg_waldump --stats`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RmgrStats {
    /// How many records.
    pub count: u64,
    /// Their bytes without page images.
    pub record_bytes: u64,
    /// The bytes of the page images.
    pub image_bytes: u64,
}

/// `pg_waldump --stats` over segments, by resource manager; the last line is `Total`.
pub fn waldump_stats(wal_dir: &Path, first: &str, last: Option<&str>) -> BTreeMap<String, RmgrStats> {
    let out = PgInstall::find()
        .runner("pg_waldump")
        .args(["--stats=rmgr", "-p"])
        .arg(wal_dir)
        .arg(first)
        .args(last)
        // The status is 1 whenever the log ends before the last segment does.
        .run();
    parse_stats(&out.stdout).unwrap_or_else(|| panic!("no statistics: {}", out.describe()))
}

fn parse_stats(text: &str) -> Option<BTreeMap<String, RmgrStats>> {
    let mut found = BTreeMap::new();
    let lines = text.lines().skip_while(|line| !line.starts_with("----")).skip(1);
    for line in lines {
        let words: Vec<&str> =
            line.split_whitespace().filter(|word| !word.ends_with(')') && *word != "(").collect();
        let stats = match words.as_slice() {
            ["Total", count, record, _, image, ..] => Some((
                "Total",
                RmgrStats {
                    count: count.parse().ok()?,
                    record_bytes: record.parse().ok()?,
                    image_bytes: image.parse().ok()?,
                },
            )),
            [name, count, record, image, _combined] => Some((
                *name,
                RmgrStats {
                    count: count.parse().ok()?,
                    record_bytes: record.parse().ok()?,
                    image_bytes: image.parse().ok()?,
                },
            )),
            _ => None,
        };
        found.extend(stats.map(|(name, stats)| (name.to_owned(), stats)));
    }
    found.contains_key("Total").then_some(found)
}

/// What pg_controldata prints.
#[derive(Clone, Debug)]
pub struct ControlData(BTreeMap<String, String>);

impl ControlData {
    /// Runs pg_controldata on a data directory.
    pub fn read(data_dir: &Path) -> Self {
        let out = PgInstall::find().runner("pg_controldata").arg("-D").arg(data_dir).run().assert_ok();
        Self::parse(&out.stdout)
    }

    fn parse(text: &str) -> Self {
        let pairs = text.lines().filter_map(|line| line.split_once(':'));
        Self(pairs.map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned())).collect())
    }

    /// The value of a line, by the text before its colon.
    #[track_caller]
    pub fn get(&self, key: &str) -> &str {
        self.0.get(key).unwrap_or_else(|| panic!("pg_controldata prints no {key:?}: {:?}", self.0.keys()))
    }

    /// A value that is a number.
    #[track_caller]
    pub fn number(&self, key: &str) -> u64 {
        let value = self.get(key);
        value.parse().unwrap_or_else(|_| panic!("{key} is {value:?}, not a number"))
    }

    /// A value that is an LSN.
    #[track_caller]
    pub fn lsn(&self, key: &str) -> u64 {
        let value = self.get(key);
        parse_lsn(value).unwrap_or_else(|| panic!("{key} is {value:?}, not an LSN"))
    }

    /// The system identifier.
    pub fn system_identifier(&self) -> u64 {
        self.number("Database system identifier")
    }

    /// `in production`, `shut down`, `in archive recovery` …
    pub fn state(&self) -> &str {
        self.get("Database cluster state")
    }

    /// Where the latest checkpoint record starts.
    pub fn checkpoint(&self) -> u64 {
        self.lsn("Latest checkpoint location")
    }

    /// Where redo from the latest checkpoint starts.
    pub fn redo(&self) -> u64 {
        self.lsn("Latest checkpoint's REDO location")
    }

    /// The latest checkpoint's timeline.
    pub fn timeline(&self) -> u64 {
        self.number("Latest checkpoint's TimeLineID")
    }
}

/// What the end of a recovery says besides files: counters and settings in pg_control, and the history of the timeline
/// that it began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoveryEnd {
    control: BTreeMap<String, String>,
    /// The lines of the history.
    pub history: Vec<String>,
}

impl RecoveryEnd {
    /// Of a server that was shut down before it did anything else.
    #[track_caller]
    pub fn read(data_dir: &Path) -> Self {
        let told = ControlData::read(data_dir);
        let history = data_dir.join(format!("pg_wal/{:08X}.history", told.timeline()));
        let history =
            std::fs::read_to_string(&history).unwrap_or_else(|e| panic!("{}: {e}", history.display()));
        let history = history.lines().map(str::trim_end).filter(|line| !line.is_empty()).map(str::to_owned);
        let place = |key: &str| ["REDO", "PrevTimeLineID", "location"].iter().any(|part| key.contains(part));
        let is_told = |key: &str| {
            ["setting", "checkpoint's", "cluster state", "Minimum", "Min recovery", "Backup", "End-of"]
                .iter()
                .any(|part| key.contains(part))
                && !(key.contains("checkpoint") && place(key))
        };
        let control = told.0.into_iter().filter(|(key, _)| is_told(key)).collect();
        Self { control, history: history.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(text: &str) -> Vec<WalRecord> {
        Records::new(text.as_bytes()).map(|record| record.unwrap()).collect()
    }

    #[test]
    fn records_with_images_and_texts_of_several_lines_are_read() {
        let text = "first record is after 0/1000000, at 0/1000028, skipping over 40 bytes\n\
            rmgr: Heap        len (rec/tot):     54/  8150, tx:        735, lsn: 1/01528B28, prev 0/01528AF0, desc: INSERT off 1 flags 0x00\n\
            \tblkref #0: rel 1663/5/16384 fork main blk 7 (FPW); hole: offset: 100, length: 200\n\
            \tblkref #1: rel 1663/5/16384 fork vm blk 0 (FPW for WAL verification); hole: offset: 0, length: 0, compression saved: 8000, method: lz4\n\
            \tblkref #2: rel 1663/5/16384 fork fsm blk 2\n\
            rmgr: LogicalMessage len (rec/tot):     50/    50, tx:          0, lsn: 1/0152AB00, prev 1/01528B28, desc: MESSAGE non-transactional, prefix \"a\n\
            b, desc: \"; payload (1 bytes): 00\n";
        let found = records(text);
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].lsn, found[0].prev), (0x1_0152_8B28, 0x0152_8AF0));
        assert_eq!((found[0].rec_len, found[0].total_len, found[0].xid), (54, 8150, 735));
        assert_eq!((found[0].rmgr.as_str(), found[0].kind()), ("Heap", "INSERT"));
        let image = found[0].blocks[0].image.clone().unwrap();
        assert_eq!(
            (image.apply, image.hole_offset, image.hole_length, image.compression),
            (true, 100, 200, None)
        );
        let image = found[0].blocks[1].image.clone().unwrap();
        assert_eq!((image.apply, image.compression.as_deref()), (false, Some("lz4")));
        let plain = &found[0].blocks[2];
        assert_eq!((plain.id, plain.fork.as_str(), plain.blk, &plain.image), (2, "fsm", 2, &None));
        assert_eq!(
            found[1].desc,
            "MESSAGE non-transactional, prefix \"a\nb, desc: \"; payload (1 bytes): 00"
        );
    }

    #[test]
    fn a_line_that_is_no_record_is_an_error() {
        let error = Records::new(&b"rmgr: Heap nonsense\n"[..]).next().unwrap().unwrap_err();
        assert_eq!(error.to_string(), "not a record: rmgr: Heap nonsense");
    }

    #[test]
    fn positions_read_as_they_print() {
        assert_eq!(parse_lsn("1/0152AB00"), Some(0x1_0152_AB00));
        assert_eq!(format_lsn(0x1_0152_AB00), "1/152AB00");
        assert_eq!(parse_lsn("152AB00"), None);
        assert_eq!(parse_lsn("1/1152AB00F"), None);
    }
}
