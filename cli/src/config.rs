//! The configuration file, and the `.env` file that it may ask for.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::exit::Failure;

/// Where the configuration lies unless another place is named.
pub(crate) const DEFAULT_PATH: &str = "/etc/waltide/waltide.toml";

/// waltide.toml. Every key has a flag that beats it; a key that does not exist is an error.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// `--archive`.
    pub(crate) archive: Option<String>,
    /// `--cluster`.
    pub(crate) cluster: Option<String>,
    /// `--threads`.
    pub(crate) threads: Option<usize>,
    /// `--connection`.
    pub(crate) connection: Option<String>,
    /// `--data-dir`.
    pub(crate) data_dir: Option<PathBuf>,
    /// `--compression-level`: zstd's, 1 to 19.
    pub(crate) compression_level: Option<i32>,
    /// Where the catalogue cache lies; `""` turns it off.
    pub(crate) cache: Option<PathBuf>,
    /// Whether a `.env` in the working directory stands in for variables that the environment lacks.
    #[serde(default)]
    pub(crate) dotenv: bool,
}

impl Config {
    /// Reads the file named, or the default one where it exists.
    pub(crate) fn load(named: Option<&Path>) -> Result<(Self, Option<PathBuf>), Failure> {
        let path = match named {
            Some(path) => path,
            None if Path::new(DEFAULT_PATH).exists() => Path::new(DEFAULT_PATH),
            None => return Ok((Self::default(), None)),
        };
        let text = std::fs::read_to_string(path).map_err(|e| {
            Failure::usage(format!("the configuration file {} cannot be read: {e}", path.display()))
        })?;
        let config = Self::parse(&text).map_err(|e| {
            Failure::usage(format!("the configuration file {} is wrong: {e}", path.display()))
        })?;
        let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Ok((config, Some(absolute)))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|e| e.to_string())?;
        match config.compression_level {
            Some(level) if !(1..=19).contains(&level) => {
                Err(format!("compression_level {level} is not between 1 and 19"))
            }
            _ => Ok(config),
        }
    }
}

/// Reads `NAME=value` lines; `export`, quotes and comments as shells have them.
pub(crate) fn parse_dotenv(text: &str) -> BTreeMap<String, String> {
    let entry = |line: &str| {
        let line = line.trim();
        let line = line.strip_prefix("export ").unwrap_or(line);
        let (name, value) = line.split_once('=')?;
        let name = name.trim();
        let legal = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        legal.then(|| (name.to_owned(), unquote(value.trim())))
    };
    text.lines().filter(|l| !l.trim_start().starts_with('#')).filter_map(entry).collect()
}

fn unquote(value: &str) -> String {
    for quote in ['"', '\''] {
        // Behind the closing quote a comment may stand.
        if let Some((inner, _)) = value.strip_prefix(quote).and_then(|v| v.split_once(quote)) {
            return inner.to_owned();
        }
    }
    value.split(" #").next().unwrap_or_default().trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dotenv_file_is_read_as_shells_write_it() {
        let text = "# comment\nexport A=1\nB = 'x # y' # z\nC=\"z\" \nD=v # note\nbad line\n=x\n";
        let found: Vec<_> = parse_dotenv(text).into_iter().collect();
        let want = [("A", "1"), ("B", "x # y"), ("C", "z"), ("D", "v")];
        assert_eq!(found, want.map(|(k, v)| (k.to_owned(), v.to_owned())));
    }

    #[test]
    fn a_key_that_does_not_exist_is_refused() {
        let err = Config::parse("archiv = 'x'").unwrap_err();
        assert!(err.contains("unknown field `archiv`"), "{err}");
    }

    #[test]
    fn a_level_that_zstd_does_not_have_is_refused_whatever_the_command() {
        let level = |text: &str| Config::parse(text).map(|config| config.compression_level);
        assert_eq!(level("compression_level = 19"), Ok(Some(19)));
        for bad in [0, 20, -1] {
            let want = format!("compression_level {bad} is not between 1 and 19");
            assert_eq!(level(&format!("compression_level = {bad}")), Err(want));
        }
    }
}
