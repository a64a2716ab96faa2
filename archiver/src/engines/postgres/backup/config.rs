//! Configuration files that lie outside the data directory, as Debian's do.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use tokio_postgres::Client;
use waltide_format::PgMajor;
use waltide_format::archive::ConfigFile;

/// A configuration file that is larger is none.
const CONFIG_BYTES_MAX: u64 = 16 << 20;

/// The configuration files that the server reads from outside its data directory. One that cannot be read is named in
/// `warnings`: a database can be restored without it.
pub(super) async fn config_files(
    client: &Client,
    major: PgMajor,
    data_dir: &Path,
    warnings: &mut Vec<String>,
) -> Vec<ConfigFile> {
    let mut found: BTreeMap<String, &'static str> = BTreeMap::new();
    let mut ask = vec![(
        "include",
        "SELECT DISTINCT sourcefile FROM pg_catalog.pg_file_settings WHERE sourcefile IS NOT NULL",
    )];
    if major >= PgMajor::V16 {
        ask.push(("include", "SELECT DISTINCT file_name FROM pg_catalog.pg_hba_file_rules"));
        ask.push(("include", "SELECT DISTINCT file_name FROM pg_catalog.pg_ident_file_mappings"));
    }
    // Last, so that a file which a setting names is called after the setting.
    ask.push(("config_file", "SELECT setting FROM pg_catalog.pg_settings WHERE name = 'config_file'"));
    ask.push(("hba_file", "SELECT setting FROM pg_catalog.pg_settings WHERE name = 'hba_file'"));
    ask.push(("ident_file", "SELECT setting FROM pg_catalog.pg_settings WHERE name = 'ident_file'"));
    for (role, query) in ask {
        match client.query(query, &[]).await {
            Ok(rows) => found.extend(rows.iter().filter_map(|row| Some((row.try_get(0).ok()?, role)))),
            // A role that may take backups need not be allowed to see the configuration.
            Err(e) => tracing::debug!("the server does not say which {role} files it reads: {e}"),
        }
    }
    let inside = [Some(data_dir.to_owned()), std::fs::canonicalize(data_dir).ok()];
    let mut taken = Vec::new();
    for (path, role) in found {
        if inside.iter().flatten().any(|dir| Path::new(&path).starts_with(dir)) {
            continue;
        }
        match read(&path, role) {
            Ok(file) => taken.push(file),
            Err(e) => warnings.push(format!("{role} {path} is not in the backup: {e}")),
        }
    }
    taken
}

fn read(path: &str, role: &str) -> std::io::Result<ConfigFile> {
    let about = std::fs::metadata(path)?;
    if !about.is_file() || about.len() > CONFIG_BYTES_MAX {
        return Err(std::io::Error::other("it is no configuration file"));
    }
    let contents =
        String::from_utf8(std::fs::read(path)?).map_err(|_| std::io::Error::other("it is not UTF-8"))?;
    Ok(ConfigFile { path: path.to_owned(), role: role.to_owned(), mode: about.mode() & 0o7777, contents })
}
