//! The settings a restored cluster gets: ours in, those of its earlier life that would lead it astray out.

use std::collections::BTreeMap;
use std::path::Path;

use waltide_format::PgMajor;
use waltide_format::archive::ConfigFile;

/// Settings that say how a server recovers. None of the backup's own survives.
const RECOVERY: [&str; 13] = [
    "restore_command",
    "archive_cleanup_command",
    "recovery_end_command",
    "recovery_min_apply_delay",
    "promote_trigger_file",
    "recovery_target",
    "recovery_target_action",
    "recovery_target_inclusive",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_timeline",
    "recovery_target_xid",
];
/// Where a standby's WAL comes from.
const STANDBY: [&str; 2] = ["primary_conninfo", "primary_slot_name"];
/// Two of these at once are fatal, so each that is not meant is emptied.
const TARGETS: [&str; 5] = [
    "recovery_target",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_xid",
];
/// Settings that name files of the place that a configuration came from.
const PLACES: [&str; 6] =
    ["config_file", "data_directory", "external_pid_file", "hba_file", "ident_file", "stats_temp_directory"];
/// Our part of postgresql.auto.conf begins so.
const OURS: &str = "# Written by waltide restore.";
/// Configuration files include one another no deeper than this; PostgreSQL's own limit is 10.
const INCLUDE_DEPTH_MAX: u32 = 10;

/// A string of postgresql.conf.
pub(super) fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\\', r"\\").replace('\'', "''"))
}

/// A word for `sh`, in a setting in which PostgreSQL replaces %f and %p.
fn command_word(word: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/._-+=:,@%".contains(&b);
    let word = match !word.is_empty() && word.bytes().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    };
    word.replace('%', "%%")
}

/// A restore_command that runs `program` with these arguments; none if a word cannot stand in a setting.
pub fn restore_command(program: &Path, arguments: &[String]) -> Option<String> {
    let program = program.to_str()?;
    let words = std::iter::once(program).chain(arguments.iter().map(String::as_str));
    let words: Vec<_> = words.chain(["fetch"]).map(command_word).collect();
    let command = format!("{} %f %p", words.join(" "));
    (!command.contains(['\n', '\r', '\0'])).then_some(command)
}

/// The name that a line of a configuration file sets.
fn setting_of(line: &str) -> Option<String> {
    let line = line.trim_start();
    let end = line.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '.'));
    let (name, rest) = line.split_at(end.unwrap_or(line.len()));
    let set = !name.is_empty() && rest.trim_start().starts_with(|c: char| c != '#');
    set.then(|| name.to_ascii_lowercase())
}

/// postgresql.auto.conf: what was in it, less what must not stay, and `settings` behind it.
pub(super) fn auto_conf(old: &str, standby: bool, settings: &[(String, String)]) -> String {
    let dropped = |name: &String| {
        RECOVERY.contains(&name.as_str())
            || (!standby && STANDBY.contains(&name.as_str()))
            || settings.iter().any(|(n, _)| n == name)
    };
    let kept = old.lines().filter(|line| *line != OURS && !setting_of(line).as_ref().is_some_and(dropped));
    let kept = kept.map(|line| format!("{line}\n"));
    let ours = settings.iter().map(|(name, value)| format!("{name} = {}\n", quoted(value)));
    kept.chain([format!("{OURS}\n")]).chain(ours).collect()
}

/// All settings of a recovery: `target` says where it stops, and stands last, because an empty target after
/// another one counts as a second.
pub(super) fn recovery_settings(
    major: PgMajor,
    restore_command: &str,
    target: &[(String, String)],
) -> Vec<(String, String)> {
    let is_target = |name: &str| TARGETS.contains(&name);
    let mut settings: Vec<(String, String)> = Vec::new();
    let mut set = |name: &str, value: &str| settings.push((name.to_owned(), value.to_owned()));
    set("restore_command", restore_command);
    set("archive_cleanup_command", "");
    set("recovery_end_command", "");
    set("recovery_min_apply_delay", "0");
    if major <= PgMajor::V15 {
        set("promote_trigger_file", "");
    }
    for name in TARGETS.into_iter().filter(|n| target.iter().all(|(t, _)| t != n)) {
        set(name, "");
    }
    for (name, value) in target.iter().filter(|(n, _)| !is_target(n)) {
        set(name, value);
    }
    for (name, value) in target.iter().filter(|(n, _)| is_target(n)) {
        set(name, value);
    }
    settings
}

/// The files that make a data directory start by itself, out of those that lay outside it: name and text.
pub(super) fn brought_home(
    files: &[ConfigFile],
    notes: &mut Vec<String>,
) -> Vec<(&'static str, String, u32)> {
    let by_path: BTreeMap<&str, &ConfigFile> = files.iter().map(|f| (f.path.as_str(), f)).collect();
    let mut home = Vec::new();
    for (role, name) in
        [("config_file", "postgresql.conf"), ("hba_file", "pg_hba.conf"), ("ident_file", "pg_ident.conf")]
    {
        let Some(file) = files.iter().find(|f| f.role == role) else { continue };
        let text = match role {
            "config_file" => expanded(file, &by_path, 0, notes),
            _ => file.contents.clone(),
        };
        home.push((name, text, file.mode & 0o777));
    }
    home
}

/// A postgresql.conf with what it includes put in its place, and without the places it named.
fn expanded(
    file: &ConfigFile,
    files: &BTreeMap<&str, &ConfigFile>,
    depth: u32,
    notes: &mut Vec<String>,
) -> String {
    let mut out = String::new();
    for line in file.contents.lines() {
        let name = setting_of(line).unwrap_or_default();
        match name.as_str() {
            "include" | "include_if_exists" | "include_dir" if depth < INCLUDE_DEPTH_MAX => {
                out.push_str(&format!("# {line}\n"));
                let included = included(file, &name, line, files);
                if included.is_empty() && name == "include" {
                    notes
                        .push(format!("{} includes a file that the backup does not have: {line}", file.path));
                }
                for part in included {
                    out.push_str(&format!(
                        "# {}\n{}",
                        part.path,
                        expanded(part, files, depth.saturating_add(1), notes)
                    ));
                }
            }
            place if PLACES.contains(&place) => out.push_str(&format!("# {line}\n")),
            _ => out.push_str(&format!("{line}\n")),
        }
    }
    out
}

/// The files that an include line means, in PostgreSQL's order.
fn included<'a>(
    file: &ConfigFile,
    directive: &str,
    line: &str,
    files: &BTreeMap<&str, &'a ConfigFile>,
) -> Vec<&'a ConfigFile> {
    let value = line.trim_start().get(directive.len()..).unwrap_or_default();
    let value = value.trim_start_matches([' ', '\t', '=']);
    let value = match value.strip_prefix('\'') {
        Some(rest) => rest.split('\'').next().unwrap_or_default(),
        None => value.split([' ', '\t', '#']).next().unwrap_or_default(),
    };
    let here = Path::new(&file.path).parent().unwrap_or(Path::new("/"));
    let meant = here.join(value);
    if directive != "include_dir" {
        return files.values().copied().filter(|f| Path::new(&f.path) == meant).collect();
    }
    let belongs = |f: &&&ConfigFile| {
        let path = Path::new(&f.path);
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        path.parent() == Some(meant.as_path()) && name.ends_with(".conf") && !name.starts_with('.')
    };
    files.values().filter(belongs).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
    }

    #[test]
    fn what_would_lead_the_server_astray_does_not_stay() {
        let old = "# Do not edit this file manually!\nwork_mem = '8MB'\nRecovery_Target_Time = '2020-01-01'\n\
                   restore_command='cp /x/%f %p'\nprimary_conninfo = 'host=a'\nmy.recovery_target = '1'\n";
        let new = auto_conf(old, false, &pairs(&[("recovery_target_xid", "7"), ("archive_mode", "off")]));
        assert_eq!(
            new,
            "# Do not edit this file manually!\nwork_mem = '8MB'\nmy.recovery_target = '1'\n\
             # Written by waltide restore.\nrecovery_target_xid = '7'\narchive_mode = 'off'\n"
        );
        assert_eq!(
            auto_conf(&new, false, &pairs(&[("recovery_target_xid", "7"), ("archive_mode", "off")])),
            new
        );
        assert!(auto_conf(old, true, &[]).contains("primary_conninfo"));
    }

    #[test]
    fn the_target_that_is_meant_stands_behind_those_that_are_emptied() {
        let target =
            pairs(&[("recovery_target_time", "2026-01-01 00:00:00+00"), ("recovery_target_action", "pause")]);
        let settings = recovery_settings(PgMajor::V15, "x", &target);
        assert_eq!(settings.last(), Some(&target[0]));
        let named: Vec<_> = settings.iter().map(|(n, _)| n.as_str()).collect();
        assert!(TARGETS.iter().all(|t| named.iter().filter(|n| *n == t).count() == 1), "{named:?}");
        assert!(
            recovery_settings(PgMajor::V16, "x", &target).iter().all(|(n, _)| n != "promote_trigger_file")
        );
    }

    #[test]
    fn a_command_survives_postgresql_and_the_shell() {
        let args = ["--archive".to_owned(), "file:///a%20b".into(), "--cluster".into(), "o'x".into()];
        assert_eq!(
            restore_command(Path::new("/opt/my bin/waltide"), &args).unwrap(),
            r"'/opt/my bin/waltide' --archive file:///a%%20b --cluster 'o'\''x' fetch %f %p"
        );
        assert_eq!(restore_command(Path::new("/a\nb"), &[]), None);
    }

    #[test]
    fn a_configuration_from_elsewhere_is_made_one_file_without_its_places() {
        let file = |path: &str, role: &str, contents: &str| ConfigFile {
            path: path.into(),
            role: role.into(),
            mode: 0o644,
            contents: contents.into(),
        };
        let files = [
            file("/etc/pg/conf.d/20-b.conf", "include", "port = 2\n"),
            file("/etc/pg/conf.d/10-a.conf", "include", "port = 1\ninclude 'deep/x.conf'\n"),
            file("/etc/pg/conf.d/deep/x.conf", "include", "work_mem = 1MB\n"),
            file("/etc/pg/hba.conf", "hba_file", "local all all trust\n"),
            file(
                "/etc/pg/postgresql.conf",
                "config_file",
                "data_directory = '/data'\nhba_file='/etc/pg/hba.conf' # x\nport = 5432\n#include 'no'\n\
                 include_dir = 'conf.d'\ninclude_if_exists = 'gone'\ninclude '/lost.conf'\n",
            ),
        ];
        let mut notes = Vec::new();
        let home = brought_home(&files, &mut notes);
        assert_eq!(home.iter().map(|(n, _, _)| *n).collect::<Vec<_>>(), ["postgresql.conf", "pg_hba.conf"]);
        let live: Vec<_> = home[0].1.lines().filter(|l| !l.starts_with('#')).collect();
        assert_eq!(live, ["port = 5432", "port = 1", "work_mem = 1MB", "port = 2"]);
        assert_eq!(
            notes,
            ["/etc/pg/postgresql.conf includes a file that the backup does not have: include '/lost.conf'"]
        );
    }

    #[test]
    fn a_file_that_includes_itself_ends() {
        let file = ConfigFile {
            path: "/a.conf".into(),
            role: "config_file".into(),
            mode: 0,
            contents: "include 'a.conf'\nport = 1\n".into(),
        };
        let home = brought_home(&[file], &mut Vec::new());
        assert_eq!(home[0].1.lines().filter(|l| *l == "port = 1").count(), 11);
    }
}
