//! What a server that must not act on the world is given instead of its cluster's settings.
//!
//! The scratch server does not read the cluster's postgresql.conf at all: only settings named here come over, so that
//! one nobody thought of cannot lead it elsewhere. What it says when it is asked questions stays the same.

use std::collections::BTreeMap;

use waltide_format::archive::DrillSetting;

use super::conf_file::Settings;

/// Settings that make the server act on, listen to or write to something outside its data directory, keep it from
/// starting elsewhere, or keep it waiting for others; and what the scratch server has instead.
const NEUTRALISED: &[(&str, &str)] = &[
    ("archive_cleanup_command", ""),
    ("archive_command", ""),
    ("archive_library", ""),
    ("archive_mode", "off"),
    ("autovacuum", "off"),
    ("bonjour", "off"),
    ("data_directory", ""),
    ("dynamic_library_path", "$libdir"),
    ("event_source", ""),
    ("external_pid_file", ""),
    ("hot_standby", "off"),
    ("huge_pages", "off"),
    ("jit_provider", "llvmjit"),
    ("listen_addresses", ""),
    ("local_preload_libraries", ""),
    ("log_destination", "stderr"),
    ("log_directory", ""),
    ("logging_collector", "off"),
    ("max_logical_replication_workers", "0"),
    ("max_wal_senders", "0"),
    ("primary_conninfo", ""),
    ("primary_slot_name", ""),
    ("promote_trigger_file", ""),
    ("recovery_end_command", ""),
    ("recovery_min_apply_delay", "0"),
    ("session_preload_libraries", ""),
    ("shared_preload_libraries", ""),
    ("ssl", "off"),
    ("ssl_passphrase_command", ""),
    ("stats_temp_directory", ""),
    ("synchronous_standby_names", ""),
    ("temp_tablespaces", ""),
    ("unix_socket_directories", ""),
    ("unix_socket_group", ""),
];

/// Those among them that the scratch server is given as they stand. The others it is not given at all: their default
/// is right, or they are not in every major version.
const GIVEN: &[&str] = &[
    "archive_mode",
    "autovacuum",
    "hot_standby",
    "huge_pages",
    "listen_addresses",
    "local_preload_libraries",
    "log_destination",
    "logging_collector",
    "max_logical_replication_workers",
    "max_wal_senders",
    "session_preload_libraries",
    "shared_preload_libraries",
    "ssl",
    "synchronous_standby_names",
];

/// Settings that come over as they are: what answers look like, how queries are planned, how recovery runs.
const KEPT: &[&str] = &[
    "allow_in_place_tablespaces",
    "array_nulls",
    "backslash_quote",
    "bytea_output",
    "checkpoint_completion_target",
    "checkpoint_timeout",
    "datestyle",
    "default_transaction_isolation",
    "effective_cache_size",
    "effective_io_concurrency",
    "escape_string_warning",
    "extra_float_digits",
    "fsync",
    "full_page_writes",
    "intervalstyle",
    "maintenance_io_concurrency",
    "maintenance_work_mem",
    "max_stack_depth",
    "max_wal_size",
    "min_wal_size",
    "quote_all_identifiers",
    "random_page_cost",
    "recovery_prefetch",
    "row_security",
    "search_path",
    "seq_page_cost",
    "standard_conforming_strings",
    "timezone",
    "track_commit_timestamp",
    "transform_null_equals",
    "wal_decode_buffer_size",
    "work_mem",
    "xmlbinary",
    "xmloption",
];

/// Counts that recovery needs to be at least as large as the cluster's, and a floor that costs little: the WAL may
/// raise them after the backup was made.
const FLOORS: &[(&str, u32)] = &[
    ("max_connections", 100),
    ("max_locks_per_transaction", 256),
    ("max_prepared_transactions", 200),
    ("max_replication_slots", 100),
    ("max_worker_processes", 8),
];

/// What restore wrote for recovery, which the scratch server follows.
const RECOVERY: &[&str] = &[
    "restore_command",
    "recovery_target",
    "recovery_target_action",
    "recovery_target_inclusive",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_timeline",
    "recovery_target_xid",
];

/// The most that a scratch server is given of the machine's memory.
const SHARED_BUFFERS_MAX_PART: u64 = 4;

/// What the scratch server is told, and what became of the cluster's own settings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ScratchSettings {
    /// By name.
    pub(crate) values: BTreeMap<String, String>,
    /// The cluster's settings that were changed because they act on the world.
    pub(crate) neutralised: Vec<DrillSetting>,
    /// Names of the cluster's settings that did not come over for no such reason.
    pub(crate) left_out: Vec<String>,
}

impl ScratchSettings {
    /// Decides every setting. `preload` are libraries that the operator wants loaded all the same.
    pub(crate) fn decide(cluster: &Settings, preload: &str, memory_bytes: Option<u64>) -> Self {
        let mut decided = Self::default();
        let mut give = |name: &str, value: &str| {
            decided.values.insert(name.to_owned(), value.to_owned());
        };
        for (name, value) in NEUTRALISED.iter().filter(|(name, _)| GIVEN.contains(name)) {
            give(name, value);
        }
        for name in KEPT {
            if let Some(value) = cluster.get(name) {
                give(name, value);
            }
        }
        // PostgreSQL takes an empty target behind one that is meant for a second one.
        for name in RECOVERY {
            if let Some(value) = cluster.get(name).filter(|v| !v.is_empty()) {
                give(name, value);
            }
        }
        for (name, floor) in FLOORS {
            let found = cluster.get(name).and_then(|v| v.trim().parse::<u32>().ok()).unwrap_or(0);
            give(name, &found.max(*floor).to_string());
        }
        give("shared_preload_libraries", preload);
        // The others keep their memory in /dev/shm.
        give("dynamic_shared_memory_type", "mmap");
        give("shared_buffers", &shared_buffers(cluster.get("shared_buffers"), memory_bytes));
        give("restart_after_crash", "off");
        give("wal_level", "replica");
        give("log_min_messages", "warning");
        give("log_line_prefix", "%m [%p] ");
        give("log_timezone", "UTC");
        give("lc_messages", "C");
        for (name, found) in &cluster.values {
            let custom = name.contains('.');
            if custom && !runs_code(name) {
                decided.values.insert(name.clone(), found.clone());
                continue;
            }
            let known = NEUTRALISED.iter().find(|(n, _)| n == name);
            let used =
                known.map(|(_, value)| if name == "shared_preload_libraries" { preload } else { value });
            match used {
                Some(used) if !same(found, used) => decided.neutralised.push(DrillSetting {
                    name: name.clone(),
                    found: found.clone(),
                    used: used.to_owned(),
                }),
                Some(_) => {}
                None if decided.values.contains_key(name) || RECOVERY.contains(&name.as_str()) => {}
                None => decided.left_out.push(name.clone()),
            }
        }
        decided
    }
}

/// Whether a parameter of an extension is a program that runs when the extension is loaded.
fn runs_code(name: &str) -> bool {
    name.rsplit('.').next().is_some_and(|last| last.starts_with("on_") || last.ends_with("init"))
}

fn same(found: &str, used: &str) -> bool {
    let off = |v: &str| matches!(v.to_ascii_lowercase().as_str(), "off" | "false" | "no" | "0");
    found == used || (off(found) && off(used))
}

/// The cluster's own size of the buffer pool, as long as the machine has four times as much memory.
fn shared_buffers(cluster: Option<&str>, memory_bytes: Option<u64>) -> String {
    const DEFAULT: u64 = 128 << 20;
    const SMALLEST: u64 = 1 << 20;
    let most = memory_bytes.and_then(|m| m.checked_div(SHARED_BUFFERS_MAX_PART)).unwrap_or(DEFAULT);
    let wanted = cluster.and_then(|v| parse_bytes(v, 8192)).unwrap_or(DEFAULT);
    format!("{}kB", wanted.min(most).max(SMALLEST) >> 10)
}

/// A size as PostgreSQL reads it; one without a unit counts in `unit`.
fn parse_bytes(text: &str, unit: u64) -> Option<u64> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, suffix) = text.split_at_checked(end)?;
    let scale = match suffix.trim() {
        "" => unit,
        "B" => 1,
        "kB" => 1 << 10,
        "MB" => 1 << 20,
        "GB" => 1 << 30,
        "TB" => 1 << 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(scale)
}

/// How much memory the machine has.
pub(crate) fn memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_acts_on_the_world_does_not_come_over_and_is_told() {
        let cluster = Settings::of(&[
            ("archive_mode", "on"),
            ("archive_command", "cp %p /archive/%f"),
            ("data_directory", "/var/lib/postgresql/15/main"),
            ("listen_addresses", "*"),
            ("primary_conninfo", "host=primary"),
            ("shared_preload_libraries", "pg_cron"),
            ("ssl", "off"),
            ("unix_socket_directories", "/var/run/postgresql"),
            ("log_statement", "all"),
            ("work_mem", "64MB"),
            ("app.tenant", "7"),
            ("plperl.on_init", "unlink '/x'"),
            ("restore_command", "waltide fetch %f %p"),
            ("recovery_target_time", ""),
            ("recovery_target_xid", "755"),
        ]);
        let decided = ScratchSettings::decide(&cluster, "", None);
        let told: Vec<_> = decided.neutralised.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(
            told,
            [
                "archive_command",
                "archive_mode",
                "data_directory",
                "listen_addresses",
                "primary_conninfo",
                "shared_preload_libraries",
                "unix_socket_directories"
            ]
        );
        assert_eq!(decided.left_out, ["log_statement", "plperl.on_init"]);
        let get = |name: &str| decided.values.get(name).map(String::as_str);
        for name in ["archive_command", "data_directory", "primary_conninfo", "unix_socket_directories"] {
            assert_eq!(get(name), None, "{name}");
        }
        assert_eq!(get("archive_mode"), Some("off"));
        assert_eq!(get("listen_addresses"), Some(""));
        assert_eq!(get("shared_preload_libraries"), Some(""));
        assert_eq!(get("max_logical_replication_workers"), Some("0"));
        assert_eq!((get("work_mem"), get("app.tenant")), (Some("64MB"), Some("7")));
        assert_eq!(get("restore_command"), Some("waltide fetch %f %p"));
        assert_eq!((get("recovery_target_time"), get("recovery_target_xid")), (None, Some("755")));
        let kept = ScratchSettings::decide(&cluster, "pg_cron", None);
        assert!(!kept.neutralised.iter().any(|s| s.name == "shared_preload_libraries"));
    }

    #[test]
    fn counts_are_never_below_the_clusters_and_memory_fits_the_machine() {
        let cluster = Settings::of(&[("max_prepared_transactions", "500"), ("shared_buffers", "16GB")]);
        let of = |memory, name: &str| {
            ScratchSettings::decide(&cluster, "", memory).values.get(name).cloned().unwrap_or_default()
        };
        assert_eq!(of(None, "max_prepared_transactions"), "500");
        assert_eq!(of(None, "max_connections"), "100");
        assert_eq!(of(None, "shared_buffers"), "131072kB");
        assert_eq!(of(Some(8 << 30), "shared_buffers"), "2097152kB");
        assert_eq!(of(Some(64 << 40), "shared_buffers"), "16777216kB");
        assert_eq!((parse_bytes("16384", 8192), parse_bytes("1 GB", 1)), (Some(128 << 20), Some(1 << 30)));
        assert_eq!(parse_bytes("many", 1), None);
    }
}
