//! A connection to a server, found the way every PostgreSQL client finds it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_postgres::config::{ChannelBinding, SslMode, TargetSessionAttrs};
use tokio_postgres::{Client, Config, NoTls};

use super::conninfo::{self, Login, Parameters, Surroundings};
use super::postmaster::Postmaster;

/// Where servers put their sockets unless told otherwise: Debian's and Red Hat's place, PostgreSQL's own.
pub(super) const DEFAULT_SOCKET_DIRS: [&str; 2] = ["/var/run/postgresql", "/tmp"];
const DEFAULT_PORT: u16 = 5432;

/// What to connect to.
#[derive(Debug, Clone, Default)]
pub struct ConnectRequest {
    /// `--connection`: libpq keywords or a URI. What it does not say comes from the environment.
    pub connection: Option<String>,
    /// The data directory whose postmaster.pid names the socket and port where neither string nor environment does.
    pub data_dir: Option<PathBuf>,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The connection string is not well formed.
    #[error("the connection string cannot be read: {why}")]
    Syntax {
        /// What is wrong.
        why: String,
    },
    /// A service file is not well formed.
    #[error("{} cannot be read: {why}", file.display())]
    ServiceFile {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The service that was asked for is not defined.
    #[error("service {service:?} is in no service file")]
    Service {
        /// The service.
        service: String,
    },
    /// A parameter's value cannot be used.
    #[error("connection parameter {key} is {value:?}: {why}")]
    Parameter {
        /// The parameter.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is wrong, and what to do.
        why: &'static str,
    },
    /// No server runs on the data directory.
    #[error(
        "no server runs on {}: it has no postmaster.pid\nhint: start the server, or say with --connection where it is",
        data_dir.display()
    )]
    NoServer {
        /// The data directory.
        data_dir: PathBuf,
    },
    /// The data directory's postmaster.pid cannot be read.
    #[error("cannot read postmaster.pid in {}", data_dir.display())]
    PidFile {
        /// The data directory.
        data_dir: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The operating system does not know who we are.
    #[error("user {uid} has no name to log in with\nhint: say user=NAME with --connection, or set PGUSER.")]
    NoUser {
        /// The user's number.
        uid: u32,
    },
    /// The server could not be reached or did not let us in.
    #[error("cannot connect to {address} as {user}")]
    Failed {
        /// Where.
        address: String,
        /// As whom.
        user: String,
        /// What the server or the operating system said.
        source: tokio_postgres::Error,
    },
}

/// Connects, and lets the connection run in a task of its own until the client is dropped.
pub async fn connect(request: &ConnectRequest) -> Result<Client, ConnectError> {
    let variable = |name: &str| std::env::var(name).ok();
    let home = std::env::home_dir();
    let targets = targets(request, &Surroundings { variable: &variable, home })?;
    let mut failed = None;
    for target in targets {
        match target.config.connect(NoTls).await {
            Ok((client, connection)) => {
                let address = target.address;
                tokio::spawn(async move {
                    if let Err(e) = connection.await {
                        tracing::debug!("the connection to {address} has ended: {e}");
                    }
                });
                return Ok(client);
            }
            Err(source) => {
                let Target { address, user, .. } = target;
                failed = Some(ConnectError::Failed { address, user, source });
            }
        }
    }
    Err(failed.expect("there is always a host to try"))
}

/// One server to try.
struct Target {
    config: Config,
    address: String,
    user: String,
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} as {}", self.address, self.user)
    }
}

/// The servers to try, in order.
fn targets(request: &ConnectRequest, around: &Surroundings<'_>) -> Result<Vec<Target>, ConnectError> {
    let mut asked = conninfo::gather(request.connection.as_deref(), around)?;
    if !asked.contains_key("host") && !asked.contains_key("hostaddr") {
        match &request.data_dir {
            Some(data_dir) => from_data_dir(&mut asked, data_dir)?,
            None => {
                asked.insert("host".to_owned(), DEFAULT_SOCKET_DIRS.join(","));
            }
        }
    }
    let user = match asked.get("user") {
        Some(user) => user.clone(),
        None => os_user(around)?,
    };
    let list = |key: &str| {
        asked.get(key).map(|v| v.split(',').map(str::trim).collect::<Vec<_>>()).unwrap_or_default()
    };
    let (hosts, addresses, ports) = (list("host"), list("hostaddr"), list("port"));
    let count = hosts.len().max(addresses.len());
    for (key, found) in [("host", &hosts), ("hostaddr", &addresses), ("port", &ports)] {
        if found.len() > 1 && found.len() != count {
            let value = found.join(",");
            let why = "there must be as many as there are hosts";
            return Err(ConnectError::Parameter { key, value, why });
        }
    }
    let mut targets = Vec::with_capacity(count);
    for i in 0..count {
        let host = hosts.get(i).copied().filter(|host| !host.is_empty());
        let address = addresses.get(i).copied().filter(|address| !address.is_empty());
        let port = match ports.get(i).or(ports.first()).copied().filter(|port| !port.is_empty()) {
            None => DEFAULT_PORT,
            Some(text) => {
                parse_number(text).filter(|port| *port > 0).ok_or_else(|| ConnectError::Parameter {
                    key: "port",
                    value: text.to_owned(),
                    why: "a port is a number from 1 to 65535",
                })?
            }
        };
        targets.push(target(&asked, (host, address, port), &user, around)?);
    }
    Ok(targets)
}

/// Fills in where the server on `data_dir` says it is.
fn from_data_dir(asked: &mut Parameters, data_dir: &Path) -> Result<(), ConnectError> {
    let read = Postmaster::read(data_dir);
    let read = read.map_err(|source| ConnectError::PidFile { data_dir: data_dir.to_owned(), source })?;
    let absent = || ConnectError::NoServer { data_dir: data_dir.to_owned() };
    let server = read.ok_or_else(absent)?;
    let host = server.socket_dir.and_then(|dir| std::path::absolute(dir).ok());
    let host = host.and_then(|dir| dir.into_os_string().into_string().ok()).or(server.listen_address);
    asked.insert("host".to_owned(), host.ok_or_else(absent)?);
    asked.entry("port".to_owned()).or_insert_with(|| server.port.to_string());
    Ok(())
}

fn target(
    asked: &Parameters,
    (host, address, port): (Option<&str>, Option<&str>, u16),
    user: &str,
    around: &Surroundings<'_>,
) -> Result<Target, ConnectError> {
    let get = |key: &str| asked.get(key).map(String::as_str);
    let refuse = |key, why| {
        let value = get(key).unwrap_or_default().to_owned();
        ConnectError::Parameter { key, value, why }
    };
    let mut config = Config::new();
    let name = host.or(address).unwrap_or("localhost");
    let is_socket = name.starts_with(['/', '@']) && address.is_none();
    config.host(name).port(port);
    if let Some(address) = address {
        config.hostaddr(address.parse().map_err(|_| refuse("hostaddr", "it is no IP address"))?);
    }
    let database = get("dbname").unwrap_or("postgres");
    config.user(user).dbname(database).application_name(get("application_name").unwrap_or("waltide"));
    if let Some(options) = get("options") {
        config.options(options);
    }
    if let Some(password) = conninfo::password(asked, &Login { host: name, port, database, user }, around) {
        config.password(password);
    }
    // Encryption is of no use on a socket; libpq does not look at these there either.
    config.ssl_mode(SslMode::Disable).channel_binding(ChannelBinding::Disable);
    if !is_socket {
        match get("sslmode") {
            None | Some("disable" | "allow" | "prefer") => {}
            Some("require" | "verify-ca" | "verify-full") => {
                return Err(refuse(
                    "sslmode",
                    "this build connects without TLS; use the server's socket, or sslmode=prefer",
                ));
            }
            Some(_) => {
                return Err(refuse(
                    "sslmode",
                    "it is disable, allow, prefer, require, verify-ca or verify-full",
                ));
            }
        }
        for key in ["gssencmode", "channel_binding"] {
            if get(key) == Some("require") {
                return Err(refuse(key, "this build connects without encryption; use the server's socket"));
            }
        }
    }
    config.target_session_attrs(match get("target_session_attrs") {
        None | Some("any" | "prefer-standby") => TargetSessionAttrs::Any,
        Some("read-write" | "primary") => TargetSessionAttrs::ReadWrite,
        Some("read-only" | "standby") => TargetSessionAttrs::ReadOnly,
        Some(_) => {
            return Err(refuse(
                "target_session_attrs",
                "it is any, read-write, read-only, primary, standby or prefer-standby",
            ));
        }
    });
    let seconds = |key: &'static str| match get(key) {
        None => Ok(None),
        Some(text) => match text.trim().parse::<i64>() {
            Ok(seconds) => Ok(u64::try_from(seconds).ok().filter(|s| *s > 0).map(Duration::from_secs)),
            Err(_) => Err(refuse(key, "it is a number of seconds")),
        },
    };
    // libpq waits two seconds at least.
    if let Some(limit) = seconds("connect_timeout")? {
        config.connect_timeout(limit.max(Duration::from_secs(2)));
    }
    if let Some(idle) = seconds("keepalives_idle")? {
        config.keepalives_idle(idle);
    }
    if let Some(interval) = seconds("keepalives_interval")? {
        config.keepalives_interval(interval);
    }
    if let Some(count) = get("keepalives_count").and_then(parse_number) {
        config.keepalives_retries(count);
    }
    config.keepalives(get("keepalives") != Some("0"));
    Ok(Target { config, address: format!("{name} port {port}"), user: user.to_owned() })
}

fn parse_number<T: std::str::FromStr>(text: &str) -> Option<T> {
    text.trim().parse().ok()
}

/// The operating system's name for who we are: the effective user's in /etc/passwd, or what the session says where
/// the user comes from elsewhere (LDAP).
fn os_user(around: &Surroundings<'_>) -> Result<String, ConnectError> {
    let uid = rustix::process::geteuid().as_raw();
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let listed = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    });
    let session = || ["LOGNAME", "USER"].iter().find_map(|name| (around.variable)(name));
    listed.or_else(session).ok_or(ConnectError::NoUser { uid })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_postgres::config::Host;

    fn find(
        connection: &str,
        data_dir: Option<&Path>,
        env: &[(&str, &str)],
    ) -> Result<Vec<Target>, ConnectError> {
        let variable = |name: &str| env.iter().find(|(k, _)| *k == name).map(|(_, v)| (*v).to_owned());
        let connection = Some(connection.to_owned()).filter(|text| !text.is_empty());
        let request = ConnectRequest { connection, data_dir: data_dir.map(Path::to_owned) };
        targets(&request, &Surroundings { variable: &variable, home: None })
    }

    #[test]
    fn the_data_directory_says_where_its_server_is_unless_something_else_does() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path();
        let message = find("", Some(dir), &[]).unwrap_err().to_string();
        assert!(message.starts_with(&format!("no server runs on {}: ", dir.display())), "{message}");
        std::fs::write(dir.join("postmaster.pid"), "1\n/d\n2\n5444\n/run/x\n\n").unwrap();
        let shown = |found: Result<Vec<Target>, ConnectError>| format!("{:?}", found.unwrap());
        assert_eq!(shown(find("user=u", Some(dir), &[])), "[/run/x port 5444 as u]");
        assert_eq!(shown(find("user=u port=1", Some(dir), &[])), "[/run/x port 1 as u]");
        assert_eq!(shown(find("user=u host=h", Some(dir), &[])), "[h port 5432 as u]");
        let env = [("PGHOST", "a,b"), ("PGPORT", "7"), ("PGUSER", "e")];
        assert_eq!(shown(find("", Some(dir), &env)), "[a port 7 as e, b port 7 as e]");
        let found = shown(find("user=u", None, &[]));
        assert_eq!(found, "[/var/run/postgresql port 5432 as u, /tmp port 5432 as u]");
    }

    #[test]
    fn parameters_reach_the_driver() {
        let uri =
            "postgresql://u:p@h:9/d?options=-c%20a%3Db&connect_timeout=1&target_session_attrs=read-only";
        let found = find(uri, None, &[]).unwrap();
        let config = &found[0].config;
        assert_eq!(config.get_hosts(), [Host::Tcp("h".into())]);
        assert_eq!(
            (config.get_ports(), config.get_user(), config.get_dbname()),
            ([9].as_slice(), Some("u"), Some("d"))
        );
        assert_eq!((config.get_password(), config.get_options()), (Some(b"p".as_slice()), Some("-c a=b")));
        assert_eq!(config.get_connect_timeout(), Some(&Duration::from_secs(2)));
        assert_eq!(config.get_target_session_attrs(), TargetSessionAttrs::ReadOnly);
        let found = find("host=/s hostaddr='' sslmode=require user=u", None, &[]).unwrap();
        assert_eq!(found[0].config.get_hosts(), [Host::Unix("/s".into())]);
        assert_eq!(
            (found[0].config.get_dbname(), found[0].config.get_application_name()),
            (Some("postgres"), Some("waltide"))
        );
    }

    #[test]
    fn what_cannot_be_done_is_said() {
        for (bad, message) in [
            (
                "host=h user=u sslmode=verify-full",
                "connection parameter sslmode is \"verify-full\": this build connects without TLS; use the server's socket, or sslmode=prefer",
            ),
            (
                "host=h user=u port=x",
                "connection parameter port is \"x\": a port is a number from 1 to 65535",
            ),
            (
                "host=h user=u port=70000",
                "connection parameter port is \"70000\": a port is a number from 1 to 65535",
            ),
            (
                "host=a,b user=u port=1,2,3",
                "connection parameter port is \"1,2,3\": there must be as many as there are hosts",
            ),
            ("hostaddr=h user=u", "connection parameter hostaddr is \"h\": it is no IP address"),
            (
                "host=h user=u connect_timeout=soon",
                "connection parameter connect_timeout is \"soon\": it is a number of seconds",
            ),
        ] {
            assert_eq!(find(bad, None, &[]).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn the_user_defaults_to_the_operating_systems() {
        assert!(!os_user(&Surroundings { variable: &|_| None, home: None }).unwrap().is_empty());
    }
}
