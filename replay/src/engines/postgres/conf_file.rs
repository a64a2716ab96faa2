//! What a cluster's configuration files say, read without a server: postgresql.conf, its includes, postgresql.auto.conf.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use waltide_format::archive::ConfigFile;

/// No configuration file that is read is larger.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// PostgreSQL's own limit for includes within includes.
const DEPTH_MAX: u32 = 10;
/// Files that include one another would else be read for ever.
const FILES_MAX: u32 = 200;

/// The settings of a cluster, by name in small letters; the last one counts, as in PostgreSQL.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Settings {
    /// Name and value.
    pub(crate) values: BTreeMap<String, String>,
    /// Files that were named and could not be read.
    pub(crate) unread: Vec<String>,
    files: u32,
}

/// One line that says something.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Line {
    Setting { name: String, value: String },
    Include { directive: Directive, path: String },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Directive {
    File,
    IfExists,
    Directory,
}

impl Settings {
    /// Reads the configuration of the cluster restored into `data_dir`. `brought` are the files from outside it that
    /// its backup took along; nothing else outside `data_dir` is read.
    pub(crate) fn of_cluster(data_dir: &Path, brought: &[ConfigFile]) -> Self {
        let mut found = Self::default();
        let files = Files { data_dir, brought };
        match brought.iter().find(|f| f.role == "config_file") {
            Some(file) => found.add(&files, &file.contents, Path::new(&file.path), 0),
            None => found.add_file(&files, &data_dir.join("postgresql.conf"), 0, true),
        }
        found.add_file(&files, &data_dir.join("postgresql.auto.conf"), 0, false);
        found
    }

    /// A setting's value.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    #[cfg(test)]
    pub(crate) fn of(values: &[(&str, &str)]) -> Self {
        let values = values.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Self { values, ..Self::default() }
    }

    fn add_file(&mut self, files: &Files<'_>, path: &Path, depth: u32, wanted: bool) {
        match files.read(path) {
            Some(text) => self.add(files, &text, path, depth),
            None if wanted => self.unread.push(path.display().to_string()),
            None => {}
        }
    }

    fn add(&mut self, files: &Files<'_>, text: &str, of: &Path, depth: u32) {
        for line in text.lines().filter_map(parse_line) {
            let (directive, path) = match line {
                Line::Setting { name, value } => {
                    self.values.insert(name, value);
                    continue;
                }
                Line::Include { directive, path } => (directive, of.with_file_name(path)),
            };
            if depth >= DEPTH_MAX || self.files >= FILES_MAX {
                continue;
            }
            self.files = self.files.saturating_add(1);
            let deeper = depth.saturating_add(1);
            match directive {
                Directive::File => self.add_file(files, &path, deeper, true),
                Directive::IfExists => self.add_file(files, &path, deeper, false),
                Directive::Directory => {
                    for file in files.below(&path) {
                        self.add_file(files, &file, deeper, true);
                    }
                }
            }
        }
    }
}

struct Files<'a> {
    data_dir: &'a Path,
    brought: &'a [ConfigFile],
}

impl Files<'_> {
    fn read(&self, path: &Path) -> Option<String> {
        if let Some(file) = self.brought.iter().find(|f| Path::new(&f.path) == path) {
            return Some(file.contents.clone());
        }
        if !self.is_inside(path) {
            return None;
        }
        let found = std::fs::symlink_metadata(path).ok()?;
        (found.is_file() && found.len() <= FILE_BYTES_MAX).then_some(())?;
        Some(String::from_utf8_lossy(&std::fs::read(path).ok()?).into_owned())
    }

    /// The `.conf` files of a directory, in order.
    fn below(&self, dir: &Path) -> Vec<PathBuf> {
        let wanted = |p: &Path| {
            let name = p.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            name.ends_with(".conf") && !name.starts_with('.')
        };
        let brought = self.brought.iter().map(|f| PathBuf::from(&f.path)).filter(|p| p.parent() == Some(dir));
        let mut all: Vec<PathBuf> = brought.collect();
        if self.is_inside(dir)
            && let Ok(entries) = std::fs::read_dir(dir)
        {
            all.extend(entries.filter_map(|e| Some(e.ok()?.path())));
        }
        all.retain(|p| wanted(p));
        all.sort();
        all.dedup();
        all
    }

    fn is_inside(&self, path: &Path) -> bool {
        path.starts_with(self.data_dir) && !path.components().any(|c| c == Component::ParentDir)
    }
}

/// What one line says; a line that PostgreSQL would not take says nothing here.
fn parse_line(line: &str) -> Option<Line> {
    let rest = line.trim_start();
    let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '$') || !c.is_ascii();
    let end = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
    let (name, rest) = rest.split_at_checked(end)?;
    if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let rest = rest.trim_start();
    let rest = rest.strip_prefix('=').unwrap_or(rest).trim_start();
    let value = match rest.strip_prefix('\'') {
        Some(quoted) => unquote(quoted)?,
        None => {
            let end = rest.find(|c: char| c.is_whitespace() || c == '#').unwrap_or(rest.len());
            rest.get(..end).filter(|v| !v.is_empty())?.to_owned()
        }
    };
    let name = name.to_ascii_lowercase();
    let include = match name.as_str() {
        "include" => Some(Directive::File),
        "include_if_exists" => Some(Directive::IfExists),
        "include_dir" => Some(Directive::Directory),
        _ => None,
    };
    Some(match include {
        Some(directive) => Line::Include { directive, path: value },
        None => Line::Setting { name, value },
    })
}

/// The text up to the closing quote, with `''` and backslashes taken as PostgreSQL takes them.
fn unquote(text: &str) -> Option<String> {
    let mut value = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\'' if chars.peek() == Some(&'\'') => {
                chars.next();
                value.push('\'');
            }
            '\'' => return Some(value),
            '\\' => match chars.next()? {
                'n' => value.push('\n'),
                't' => value.push('\t'),
                'r' => value.push('\r'),
                'b' => value.push('\u{8}'),
                'f' => value.push('\u{c}'),
                d @ '0'..='7' => {
                    let mut code = d.to_digit(8)?;
                    for _ in 0..2 {
                        let Some(next) = chars.peek().and_then(|c| c.to_digit(8)) else { break };
                        chars.next();
                        code = code.saturating_mul(8).saturating_add(next);
                    }
                    value.push(char::from_u32(code & 0xff)?);
                }
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    None
}

/// A value as postgresql.conf needs it.
pub(crate) fn quote(value: &str) -> String {
    let mut quoted = String::with_capacity(value.len().saturating_add(2));
    quoted.push('\'');
    for c in value.chars() {
        match c {
            '\'' => quoted.push_str("''"),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            other => quoted.push(other),
        }
    }
    quoted.push('\'');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn setting(line: &str) -> Option<(String, String)> {
        match parse_line(line)? {
            Line::Setting { name, value } => Some((name, value)),
            Line::Include { .. } => None,
        }
    }

    #[test]
    fn lines_are_taken_as_postgresql_takes_them() {
        for (line, name, value) in [
            ("a = 1", "a", "1"),
            ("  Work_Mem=64MB # so much", "work_mem", "64MB"),
            ("a 'it''s' # x", "a", "it's"),
            ("a = 'x # y'", "a", "x # y"),
            (r"a = '\\server\tx\101'", "a", "\\server\txA"),
            ("app.tenant = 'x'", "app.tenant", "x"),
        ] {
            assert_eq!(setting(line), Some((name.to_owned(), value.to_owned())), "{line}");
        }
        for line in ["", "# a = 1", "a =", "1a = 1", "a = 'open", "="] {
            assert_eq!(parse_line(line), None, "{line}");
        }
        let include = Line::Include { directive: Directive::Directory, path: "conf.d".into() };
        assert_eq!(parse_line("include_dir 'conf.d'"), Some(include));
    }

    #[test]
    fn includes_are_followed_within_the_cluster_and_what_was_brought_along_and_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let data_dir = dir.path().join("data");
        std::fs::create_dir_all(data_dir.join("more")).unwrap();
        let outside = dir.path().join("outside.conf");
        std::fs::write(&outside, "leaked = 1").unwrap();
        std::os::unix::fs::symlink(&outside, data_dir.join("link.conf")).unwrap();
        let conf = format!(
            "a = 1\nb = 1\ninclude_dir 'more'\ninclude '{}'\ninclude '../outside.conf'\n\
             include 'link.conf'\ninclude_if_exists 'none.conf'\ninclude 'loop.conf'\nc = 1\n",
            outside.display()
        );
        std::fs::write(data_dir.join("postgresql.conf"), conf).unwrap();
        std::fs::write(data_dir.join("more/1.conf"), "b = 2").unwrap();
        std::fs::write(data_dir.join("more/1.txt"), "b = 3").unwrap();
        std::fs::write(data_dir.join("loop.conf"), "include 'loop.conf'\n".repeat(20)).unwrap();
        std::fs::write(data_dir.join("postgresql.auto.conf"), "c = '2'").unwrap();
        let found = Settings::of_cluster(&data_dir, &[]);
        let values: Vec<_> = found.values.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(values, ["a=1", "b=2", "c=2"]);
        assert!(found.unread.contains(&outside.display().to_string()));

        let brought = |path: &str, role: &str, contents: &str| ConfigFile {
            path: path.into(),
            role: role.into(),
            mode: 0o644,
            contents: contents.into(),
        };
        let files = [
            brought("/etc/pg/main/postgresql.conf", "config_file", "d = 1\ninclude_dir = 'conf.d'"),
            brought("/etc/pg/main/conf.d/x.conf", "include", "d = 2"),
        ];
        let found = Settings::of_cluster(&data_dir, &files);
        assert_eq!((found.get("a"), found.get("c"), found.get("d")), (None, Some("2"), Some("2")));
    }

    proptest! {
        #[test]
        fn a_quoted_value_is_read_back(value in "[^\0]{0,40}") {
            let line = format!("a = {}", quote(&value));
            prop_assert_eq!(setting(&line), Some(("a".to_owned(), value)));
        }

        #[test]
        fn any_line_is_read_without_a_panic(line in "\\PC{0,60}|[a-z' =#\\\\0-9]{0,40}") {
            let _ = parse_line(&line);
        }
    }
}
