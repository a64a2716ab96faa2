//! How a PostgreSQL client learns what to connect to: connection strings, the environment, service and password files.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::connect::ConnectError;

/// libpq's parameters by name.
pub type Parameters = BTreeMap<String, String>;

/// Where libpq's environment variables put their values.
const ENVIRONMENT: [(&str, &str); 12] = [
    ("PGHOST", "host"),
    ("PGHOSTADDR", "hostaddr"),
    ("PGPORT", "port"),
    ("PGDATABASE", "dbname"),
    ("PGUSER", "user"),
    ("PGPASSWORD", "password"),
    ("PGPASSFILE", "passfile"),
    ("PGOPTIONS", "options"),
    ("PGAPPNAME", "application_name"),
    ("PGSSLMODE", "sslmode"),
    ("PGCONNECT_TIMEOUT", "connect_timeout"),
    ("PGTARGETSESSIONATTRS", "target_session_attrs"),
];

/// Parameters that only concern encryption, authentication methods or encodings that are not used here, and so change
/// nothing.
const IGNORED: [&str; 24] = [
    "sslcompression",
    "sslcert",
    "sslkey",
    "sslpassword",
    "sslcertmode",
    "sslrootcert",
    "sslcrl",
    "sslcrldir",
    "sslsni",
    "sslnegotiation",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
    "min_protocol_version",
    "max_protocol_version",
    "krbsrvname",
    "gsslib",
    "gssdelegation",
    "client_encoding",
    "fallback_application_name",
    "load_balance_hosts",
    "replication",
    "requirepeer",
    "require_auth",
    "tty",
];

/// Parameters that are used.
const USED: [&str; 19] = [
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "passfile",
    "service",
    "options",
    "application_name",
    "sslmode",
    "gssencmode",
    "channel_binding",
    "connect_timeout",
    "target_session_attrs",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_count",
];

/// What surrounds a client: the environment's variables and the home directory.
pub struct Surroundings<'a> {
    /// Looks up a variable.
    pub variable: &'a dyn Fn(&str) -> Option<String>,
    /// The home directory.
    pub home: Option<PathBuf>,
}

impl std::fmt::Debug for Surroundings<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Surroundings").field("home", &self.home).finish_non_exhaustive()
    }
}

/// What is asked for, by order of precedence: the connection string, its service or PGSERVICE, the environment.
pub fn gather(connection: Option<&str>, around: &Surroundings<'_>) -> Result<Parameters, ConnectError> {
    let mut found = match connection {
        Some(text) => parse(text)?,
        None => Parameters::new(),
    };
    let variable = |name: &str| (around.variable)(name).filter(|value| !value.is_empty());
    if let Some(service) = found.get("service").cloned().or_else(|| variable("PGSERVICE")) {
        for (key, value) in service_parameters(&service, around)? {
            found.entry(key).or_insert(value);
        }
    }
    for (name, key) in ENVIRONMENT {
        if let Some(value) = variable(name) {
            found.entry(key.to_owned()).or_insert(value);
        }
    }
    found.retain(|_, value| !value.is_empty());
    Ok(found)
}

/// A connection string: a URI, or keywords with values.
pub fn parse(text: &str) -> Result<Parameters, ConnectError> {
    let found = match text.strip_prefix("postgresql://").or_else(|| text.strip_prefix("postgres://")) {
        Some(rest) => parse_uri(rest),
        None => parse_keywords(text),
    };
    let found = found.map_err(|why| ConnectError::Syntax { why })?;
    for key in found.keys() {
        check_name(key).map_err(|why| ConnectError::Syntax { why })?;
    }
    Ok(found)
}

fn check_name(key: &str) -> Result<(), String> {
    if USED.contains(&key) || IGNORED.contains(&key) {
        return Ok(());
    }
    Err(format!("{key:?} is no parameter of a connection"))
}

/// `key = value` pairs, a value with spaces in single quotes, `\` before a quote or itself.
fn parse_keywords(text: &str) -> Result<Parameters, String> {
    let mut found = Parameters::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (key, after) = rest.split_once('=').ok_or_else(|| format!("\"=\" is missing behind {rest:?}"))?;
        let key = key.trim_end();
        if key.is_empty() || key.contains(char::is_whitespace) {
            return Err(format!("{key:?} is no parameter's name; a value with spaces needs single quotes"));
        }
        let after = after.trim_start();
        let quoted = after.strip_prefix('\'');
        let mut value = String::new();
        let mut chars = quoted.unwrap_or(after).chars();
        let mut closed = false;
        while let Some(c) = chars.next() {
            match c {
                '\\' => value.extend(chars.next()),
                '\'' if quoted.is_some() => {
                    closed = true;
                    break;
                }
                c if quoted.is_none() && c.is_whitespace() => break,
                c => value.push(c),
            }
        }
        if quoted.is_some() && !closed {
            return Err(format!("the value of {key} has no closing quote"));
        }
        found.insert(key.to_owned(), value);
        rest = chars.as_str().trim_start();
    }
    Ok(found)
}

/// What follows `postgresql://`.
fn parse_uri(rest: &str) -> Result<Parameters, String> {
    let mut found = Parameters::new();
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, database) = place.split_once('/').unwrap_or((place, ""));
    let (user, hosts) = match authority.rsplit_once('@') {
        Some((user, hosts)) => (user, hosts),
        None => ("", authority),
    };
    let (user, password) = user.split_once(':').unwrap_or((user, ""));
    let mut names = Vec::new();
    let mut ports = Vec::new();
    for host in hosts.split(',') {
        let (name, port) = match host.strip_prefix('[').map(|inner| inner.split_once(']')) {
            Some(None) => return Err(format!("{host:?} has no closing bracket")),
            Some(Some((name, after))) => (name, after.strip_prefix(':').unwrap_or(after)),
            None => host.split_once(':').unwrap_or((host, "")),
        };
        names.push(decode(name)?);
        ports.push(decode(port)?);
    }
    let list =
        |parts: Vec<String>| if parts.iter().all(String::is_empty) { String::new() } else { parts.join(",") };
    for (key, value) in [
        ("user", decode(user)?),
        ("password", decode(password)?),
        ("host", list(names)),
        ("port", list(ports)),
        ("dbname", decode(database)?),
    ] {
        if !value.is_empty() {
            found.insert(key.to_owned(), value);
        }
    }
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or_else(|| format!("\"=\" is missing in {pair:?}"))?;
        match (decode(key)?, decode(value)?) {
            (key, value) if key == "ssl" && value == "true" => {
                found.insert("sslmode".to_owned(), "require".to_owned());
            }
            (key, value) => {
                found.insert(key, value);
            }
        }
    }
    Ok(found)
}

fn decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit =
            || rest.next().and_then(|b| char::from(b).to_digit(16)).and_then(|d| u8::try_from(d).ok());
        match (digit(), digit()) {
            (Some(high), Some(low)) if (high, low) != (0, 0) => bytes.push(high << 4 | low),
            _ => return Err(format!("% must be followed by two hexadecimal digits in {text:?}")),
        }
    }
    String::from_utf8(bytes).map_err(|_| format!("{text:?} is not UTF-8"))
}

/// What a service file says of a service: the user's own, then the system's.
fn service_parameters(service: &str, around: &Surroundings<'_>) -> Result<Parameters, ConnectError> {
    let variable = |name: &str| (around.variable)(name).filter(|value| !value.is_empty());
    let own = variable("PGSERVICEFILE").map(PathBuf::from);
    let own = own.or_else(|| around.home.as_ref().map(|home| home.join(".pg_service.conf")));
    let system = variable("PGSYSCONFDIR").unwrap_or_else(|| "/etc/postgresql-common".to_owned());
    let system = Path::new(&system).join("pg_service.conf");
    for file in own.into_iter().chain([system]) {
        let Ok(text) = std::fs::read_to_string(&file) else { continue };
        if let Some(found) = service_section(&text, service) {
            for key in found.keys() {
                check_name(key).map_err(|why| ConnectError::ServiceFile { file: file.clone(), why })?;
            }
            return Ok(found);
        }
    }
    Err(ConnectError::Service { service: service.to_owned() })
}

fn service_section(text: &str, service: &str) -> Option<Parameters> {
    let mut lines = text.lines().map(str::trim).skip_while(|line| {
        line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).is_none_or(|name| name != service)
    });
    lines.next()?;
    let pairs = lines.take_while(|line| !line.starts_with('[')).filter(|line| !line.starts_with('#'));
    Some(pairs.filter_map(|line| line.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect())
}

/// The password for a server: given, or from the password file. A file that others may read is not used, and that is
/// said.
pub fn password(asked: &Parameters, at: &Login<'_>, around: &Surroundings<'_>) -> Option<String> {
    if let Some(password) = asked.get("password") {
        return Some(password.clone());
    }
    let file = asked.get("passfile").map(PathBuf::from);
    let file = file.or_else(|| around.home.as_ref().map(|home| home.join(".pgpass")))?;
    let about = std::fs::metadata(&file).ok()?;
    if !about.is_file() {
        tracing::warn!("password file {} is not a plain file and is not used", file.display());
        return None;
    }
    if about.permissions().mode() & 0o077 != 0 {
        tracing::warn!(
            "password file {} is open to group or others and is not used; chmod 0600 it",
            file.display()
        );
        return None;
    }
    find_password(&std::fs::read_to_string(&file).ok()?, at)
}

/// What a line of a password file must match.
#[derive(Debug, Clone, Copy)]
pub struct Login<'a> {
    /// The host's name, or the socket directory.
    pub host: &'a str,
    /// The port.
    pub port: u16,
    /// The database.
    pub database: &'a str,
    /// The user.
    pub user: &'a str,
}

fn find_password(text: &str, at: &Login<'_>) -> Option<String> {
    let port = at.port.to_string();
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let mut fields = split_fields(line);
        let password = fields.pop().filter(|_| fields.len() == 4)?;
        let local = super::connect::DEFAULT_SOCKET_DIRS.contains(&at.host);
        let wanted = [at.host, &port, at.database, at.user];
        let matches = fields.iter().zip(wanted).enumerate().all(|(i, (field, wanted))| {
            field == "*" || field == wanted || (i == 0 && local && field == "localhost")
        });
        matches.then_some(password)
    })
}

/// The five fields of a line, split at colons; `\` makes the next character a plain one.
fn split_fields(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        let enough = fields.len() == 5;
        match (c, fields.last_mut()) {
            ('\\', Some(field)) => field.extend(chars.next()),
            (':', _) if !enough => fields.push(String::new()),
            (c, Some(field)) => field.push(c),
            (_, None) => {}
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(pairs: &[(&str, &str)]) -> Parameters {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn keywords_are_read_as_libpq_reads_them() {
        let found = parse(r"host = /run/pg  port=5433 user='o''x' ").unwrap_err().to_string();
        assert!(found.starts_with("the connection string cannot be read: "), "{found}");
        let found = parse(r"host = /run/pg  port=5433 password='a b\'c\\d' dbname=x\ y").unwrap();
        assert_eq!(
            found,
            parameters(&[("host", "/run/pg"), ("port", "5433"), ("password", r"a b'c\d"), ("dbname", "x y")])
        );
        assert_eq!(parse("").unwrap(), Parameters::new());
        for (bad, why) in [
            ("postgres", "\"=\" is missing behind \"postgres\""),
            ("host=a b=c d", "\"=\" is missing behind \"d\""),
            ("password='x", "the value of password has no closing quote"),
            ("hots=x", "\"hots\" is no parameter of a connection"),
        ] {
            let message = parse(bad).unwrap_err().to_string();
            assert_eq!(message, format!("the connection string cannot be read: {why}"));
        }
    }

    #[test]
    fn uris_are_read_as_libpq_reads_them() {
        let found =
            parse("postgresql://me:s%40y@h1:5433,[::1]:5434/db%20x?sslmode=disable&application_name=a")
                .unwrap();
        let expected = [
            ("user", "me"),
            ("password", "s@y"),
            ("host", "h1,::1"),
            ("port", "5433,5434"),
            ("dbname", "db x"),
            ("sslmode", "disable"),
            ("application_name", "a"),
        ];
        assert_eq!(found, parameters(&expected));
        let found = parse("postgres://%2Fvar%2Frun/db?host=/tmp").unwrap();
        assert_eq!(found, parameters(&[("host", "/tmp"), ("dbname", "db")]));
        assert_eq!(parse("postgresql://").unwrap(), Parameters::new());
        for bad in [
            "postgresql://[::1/db",
            "postgresql://a%zz",
            "postgresql://a?b",
            "postgresql://a?b=c",
            "postgresql://a%00",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_string_beats_its_service_beats_the_environment() {
        let scratch = tempfile::tempdir().unwrap();
        let text = "# ours\n[other]\nhost=o\n[mine]\nhost=s\nport=1\n# port=2\nuser=s\n\n[more]\nuser=m\n";
        std::fs::write(scratch.path().join(".pg_service.conf"), text).unwrap();
        let variable = |name: &str| match name {
            "PGHOST" | "PGUSER" | "PGDATABASE" => Some("e".to_owned()),
            "PGPASSWORD" => Some(String::new()),
            "PGSYSCONFDIR" => Some("/nonexistent".to_owned()),
            _ => None,
        };
        let around = Surroundings { variable: &variable, home: Some(scratch.path().to_owned()) };
        let found = gather(Some("user=c service=mine"), &around).unwrap();
        let expected = [("user", "c"), ("service", "mine"), ("host", "s"), ("port", "1"), ("dbname", "e")];
        assert_eq!(found, parameters(&expected));
        let message = gather(Some("service=none"), &around).unwrap_err().to_string();
        assert_eq!(message, "service \"none\" is in no service file");
    }

    #[test]
    fn a_password_comes_from_the_first_line_that_matches() {
        let text = "# h:1:d:u:comment\nh:1:d:other:no\n*:5432:d:u:wild\nh:1:*:u:a\\:b\\\\c:d\nlocalhost:*:*:*:local\n";
        let at = |host, port| Login { host, port, database: "d", user: "u" };
        assert_eq!(find_password(text, &at("h", 1)).as_deref(), Some(r"a:b\c:d"));
        assert_eq!(find_password(text, &at("x", 5432)).as_deref(), Some("wild"));
        assert_eq!(find_password(text, &at("/var/run/postgresql", 1)).as_deref(), Some("local"));
        assert_eq!(find_password(text, &at("/elsewhere", 1)), None);
        assert_eq!(find_password("too:few:fields", &at("h", 1)), None);
    }

    #[test]
    fn a_password_file_that_others_may_read_is_not_used() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join(".pgpass");
        std::fs::write(&file, "*:*:*:*:secret\n").unwrap();
        let around = Surroundings { variable: &|_| None, home: Some(scratch.path().to_owned()) };
        let at = Login { host: "h", port: 1, database: "d", user: "u" };
        for (mode, expected) in
            [(0o600, Some("secret")), (0o400, Some("secret")), (0o640, None), (0o604, None)]
        {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(password(&Parameters::new(), &at, &around).as_deref(), expected, "{mode:o}");
        }
        let asked = parameters(&[("password", "given")]);
        assert_eq!(password(&asked, &at, &around).as_deref(), Some("given"));
    }
}
