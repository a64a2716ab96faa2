//! The settings that make PostgreSQL archive, quoted for each place they pass through.

use std::path::Path;

use serde::Serialize;
use waltide_storage::ArchiveUrl;

/// Settings by name, in the order they are told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ArchiveSettings {
    /// `archive_command`.
    pub archive_command: String,
    /// What goes into postgresql.conf: name and unquoted value.
    pub settings: Vec<(&'static str, String)>,
}

/// A path or an address that no setting can hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} cannot stand in a setting of PostgreSQL: it is not UTF-8 or has a line break")]
pub struct Unquotable(String);

impl ArchiveSettings {
    /// The settings that ship WAL with `program` to `cluster` of the archive at `url`, as a configuration file says where
    /// one is given.
    pub fn new(
        program: &Path,
        url: &ArchiveUrl,
        cluster: &str,
        config: Option<&Path>,
    ) -> Result<Self, Unquotable> {
        let text = |path: &Path| {
            let usable = path.to_str().filter(|text| !text.contains(['\n', '\r', '\0']));
            usable.map(str::to_owned).ok_or_else(|| Unquotable(path.to_string_lossy().into_owned()))
        };
        let archive = match url.local_path() {
            Some(path) => text(path)?,
            None => url.to_string(),
        };
        let (program, config) = (text(program)?, config.map(text).transpose()?);
        let config = config.iter().flat_map(|config| ["--config", config]);
        let words = [&program, "--archive", &archive, "--cluster", cluster].into_iter().chain(config);
        // PostgreSQL replaces %p and %f, and makes one % out of two.
        let quoted = |word: &str| shell_word(word).replace('%', "%%");
        let words: Vec<String> = words.chain(["push"]).map(quoted).collect();
        let archive_command = format!("{} %p", words.join(" "));
        let settings = vec![
            ("wal_level", "replica".to_owned()),
            ("archive_mode", "on".to_owned()),
            ("archive_command", archive_command.clone()),
            ("archive_timeout", "60s".to_owned()),
        ];
        Ok(Self { archive_command, settings })
    }

    /// The lines of postgresql.conf.
    pub fn to_conf(&self) -> String {
        self.settings.iter().map(|(name, value)| format!("{name} = {}\n", conf_string(value))).collect()
    }

    /// Those without which nothing is archived; archive_timeout only bounds what can be lost.
    pub fn needed(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.settings
            .iter()
            .filter(|(name, _)| *name != "archive_timeout")
            .map(|(name, value)| (*name, value.as_str()))
    }

    /// Whether a setting's current value serves as well as the one wanted.
    pub fn suffices(name: &str, current: &str, wanted: &str) -> bool {
        match name {
            "wal_level" => matches!(current, "replica" | "logical"),
            "archive_mode" => matches!(current, "on" | "always"),
            _ => current == wanted,
        }
    }
}

/// A word for `sh`.
pub(crate) fn shell_word(word: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/._-+=:,@%".contains(&b);
    match !word.is_empty() && word.bytes().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

/// A string of postgresql.conf.
pub(crate) fn conf_string(value: &str) -> String {
    format!("'{}'", value.replace('\\', r"\\").replace('\'', "''"))
}

/// A string constant of SQL, whatever `standard_conforming_strings` says.
pub(crate) fn sql_string(value: &str) -> String {
    format!("E'{}'", value.replace('\\', r"\\").replace('\'', "''"))
}

/// Splits a command line as `sh` does, as far as quoting goes; `None` where quotes stay open.
pub(crate) fn shell_words(command: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = command.chars();
    while let Some(c) = chars.next() {
        match c {
            ' ' | '\t' | '\n' => words.extend(word.take()),
            '\'' => {
                let open = word.get_or_insert_default();
                loop {
                    match chars.next()? {
                        '\'' => break,
                        c => open.push(c),
                    }
                }
            }
            '"' => {
                let open = word.get_or_insert_default();
                loop {
                    match chars.next()? {
                        '"' => break,
                        '\\' => match chars.next()? {
                            c @ ('"' | '\\' | '$' | '`') => open.push(c),
                            c => open.extend(['\\', c]),
                        },
                        c => open.push(c),
                    }
                }
            }
            '\\' => word.get_or_insert_default().push(chars.next()?),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    Some(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What PostgreSQL hands to the shell.
    fn expand(command: &str, p: &str) -> String {
        let mut out = String::new();
        let mut chars = command.chars();
        while let Some(c) = chars.next() {
            match (c, (c == '%').then(|| chars.next()).flatten()) {
                ('%', Some('p')) => out.push_str(p),
                ('%', Some('%')) => out.push('%'),
                ('%', other) => panic!("%{other:?} in {command}"),
                (c, _) => out.push(c),
            }
        }
        out
    }

    #[test]
    fn plain_paths_stay_readable() {
        let url = "/var/lib/waltide".parse().unwrap();
        let settings = ArchiveSettings::new(Path::new("/usr/bin/waltide"), &url, "main", None).unwrap();
        assert_eq!(
            settings.to_conf(),
            "wal_level = 'replica'\narchive_mode = 'on'\narchive_command = '/usr/bin/waltide --archive \
             /var/lib/waltide --cluster main push %p'\narchive_timeout = '60s'\n"
        );
    }

    #[test]
    fn a_path_with_a_line_break_is_refused() {
        let url = "/a".parse().unwrap();
        let e = ArchiveSettings::new(Path::new("/b\nin"), &url, "main", None).unwrap_err();
        assert!(e.to_string().starts_with("\"/b\\nin\" cannot stand in a setting"), "{e}");
    }

    proptest! {
        #[test]
        fn the_shell_gets_the_words_back(
            program in "/[ -~äß]{1,20}",
            archive in "/[ -~]{1,20}",
            config in proptest::option::of("/[ -~]{1,20}"),
        ) {
            let url: ArchiveUrl = archive.parse().unwrap();
            let settings = ArchiveSettings::new(Path::new(&program), &url, "main", config.as_deref().map(Path::new)).unwrap();
            let line = expand(&settings.archive_command, "pg_wal/1");
            let archive = url.local_path().unwrap().to_str().unwrap().to_owned();
            let mut want = vec![program.as_str(), "--archive", &archive, "--cluster", "main"];
            want.extend(config.iter().flat_map(|config| ["--config", config]));
            want.extend(["push", "pg_wal/1"]);
            prop_assert_eq!(&shell_words(&line).unwrap(), &want);
            let out = std::process::Command::new("sh").arg("-c").arg(format!("printf '%s\\0' {line}")).output().unwrap();
            let words: Vec<_> = out.stdout.split(|b| *b == 0).map(|w| String::from_utf8_lossy(w).into_owned()).collect();
            prop_assert_eq!(&words[..want.len()], want);
        }

        #[test]
        fn any_command_line_is_split_or_refused(text in "[ -~\\n]{0,40}") {
            let _ = shell_words(&text);
        }
    }
}
