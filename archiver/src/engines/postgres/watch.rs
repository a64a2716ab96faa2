//! A resident shipper: everything that is ready goes as soon as it is, the backlog first.
//!
//! PostgreSQL's own archive_command runs all the same, and returns at once for what lies in the archive already. Nothing
//! is remembered that the directory does not say again after a restart.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::path::PathBuf;
use std::pin::pin;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use notify::{RecursiveMode, Watcher as _};
use tokio::sync::mpsc;
use tokio::time::Instant;
use waltide_format::WalFileName;

use super::neighbours::{lanes, one_line};
use super::push::{PushError, Pushed, Shipper};
use super::wal_dir::WalDir;

/// The directory is looked at this often even if nothing was notified: notifications get lost (overflow, NFS).
const SWEEP: Duration = Duration::from_secs(10);
/// After a failure the next try waits this long, and twice as long after each further one.
const BACK_OFF_MIN: Duration = Duration::from_secs(1);
const BACK_OFF_MAX: Duration = Duration::from_secs(60);
/// How long files on their way may still take once a stop is asked for.
const STOP_GRACE: Duration = Duration::from_secs(20);

/// What to watch.
#[derive(Debug, Clone)]
pub struct WatchRequest {
    /// The data directory.
    pub data_dir: PathBuf,
    /// Files shipped at once.
    pub threads: usize,
}

/// What a watch has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Watched {
    /// Files that it put into the archive.
    pub shipped: u64,
    /// Files that it found there.
    pub found: u64,
    /// Tries that failed.
    pub failures: u64,
}

/// Why there is nothing to watch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WatchError {
    /// The directory is not there or closed to us.
    #[error("{} cannot be watched\nhint: --data-dir names the directory with pg_wal/archive_status", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// Another resident shipper works there.
    #[error("{} is being watched already\nhint: one `waltide watch` is enough, it works in parallel", path.display())]
    Watched {
        /// The directory.
        path: PathBuf,
    },
}

/// A failure that is waited out.
#[derive(Debug, Clone)]
struct Waiting {
    until: Instant,
    delay: Duration,
    told: String,
    /// Whether the archive has another server's log in the file's place.
    is_another_log: bool,
}

impl Waiting {
    fn after(previous: Option<&Self>, told: String, is_another_log: bool) -> Self {
        let delay = previous.map_or(BACK_OFF_MIN, |w| w.delay.saturating_mul(2).min(BACK_OFF_MAX));
        Self { until: later(delay), delay, told, is_another_log }
    }
}

fn later(delay: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(delay).unwrap_or(now)
}

/// Ships what becomes ready until `stop` is done, then lets what is on its way arrive.
pub async fn watch(
    shipper: &Shipper,
    request: &WatchRequest,
    stop: impl Future<Output = ()>,
) -> Result<Watched, WatchError> {
    let dir = WalDir::new(request.data_dir.join("pg_wal"));
    let status = dir.archive_status();
    std::fs::read_dir(&status).map_err(|source| WatchError::Directory { path: status.clone(), source })?;
    let _lock = match dir.lock() {
        Ok(Some(lock)) => Some(lock),
        Ok(None) => return Err(WatchError::Watched { path: status }),
        Err(e) => {
            tracing::debug!("{} cannot be locked: {e}", status.display());
            None
        }
    };
    let (tell, mut told) = mpsc::channel::<()>(1);
    // One message that waits is enough: whoever reads it looks at everything.
    let notified = notify::recommended_watcher(move |_| {
        let _ = tell.try_send(());
    });
    let mut watcher = match notified {
        Ok(watcher) => Some(watcher),
        Err(e) => {
            tracing::warn!("no notifications, looking every {} s: {e}", SWEEP.as_secs());
            None
        }
    };
    let mut watched = Watched::default();
    let mut is_watching = false;
    // Files in the archive that PostgreSQL has not marked yet.
    let mut done: HashSet<WalFileName> = HashSet::new();
    let mut waiting: HashMap<WalFileName, Waiting> = HashMap::new();
    let mut archive_waits: Option<Waiting> = None;
    // Whether a file was found to be of the archive's log: until then one goes at a time.
    let mut is_trusted = false;
    let mut in_flight = FuturesUnordered::new();
    let mut flying: HashSet<WalFileName> = HashSet::new();
    let mut idle = shipper.idle_merge();
    let mut stop = pin!(stop);
    loop {
        if let Some(watcher) = watcher.as_mut().filter(|_| !is_watching) {
            match watcher.watch(&status, RecursiveMode::NonRecursive) {
                Ok(()) => is_watching = true,
                Err(e) => tracing::debug!("no notifications yet for {}: {e}", status.display()),
            }
        }
        let looked = {
            let dir = dir.clone();
            tokio::task::spawn_blocking(move || dir.ready()).await
        };
        let ready = match looked {
            Ok(Ok(ready)) => ready,
            Ok(Err(e)) => {
                // The data directory may be exchanged for another while we watch.
                tracing::warn!("{} cannot be read: {e}", status.display());
                is_watching = false;
                Vec::new()
            }
            Err(_) => Vec::new(),
        };
        let there: HashSet<WalFileName> = ready.iter().copied().collect();
        done.retain(|name| there.contains(name));
        waiting.retain(|name, _| there.contains(name));
        if flying.is_empty() && archive_waits.is_none() && ready.iter().all(|name| done.contains(name)) {
            idle.look(watched.shipped);
        }
        let now = Instant::now();
        let archive_rests = archive_waits.as_ref().is_some_and(|w| w.until > now);
        for name in ready {
            let length = std::fs::metadata(dir.file(name)).map_or(0, |meta| meta.len());
            // While the archive fails, one file at a time finds out whether it still does.
            let alone = archive_waits.is_some() || !is_trusted;
            let room = if alone { 1 } else { lanes(request.threads, length) };
            if archive_rests || flying.len() >= room {
                break;
            }
            let rests = waiting.get(&name).is_some_and(|w| w.until > now);
            // What lies behind a file that is refused so is of the same log as that.
            if rests && waiting.get(&name).is_some_and(|w| w.is_another_log) {
                break;
            }
            if rests || done.contains(&name) || !flying.insert(name) {
                continue;
            }
            let dir = dir.clone();
            in_flight.push(async move {
                match shipper.ship(&dir.file(name), 1).await {
                    // PostgreSQL's own command was faster, and the file has been reused under our eyes.
                    Err(_) if !dir.is_ready(name) => (name, None),
                    outcome => (name, Some(outcome)),
                }
            });
        }
        let retry = waiting.values().chain(&archive_waits).map(|w| w.until).filter(|t| *t > now).min();
        let wake = retry.map_or(later(SWEEP), |t| t.min(later(SWEEP)));
        tokio::select! {
            () = &mut stop => break,
            Some((name, outcome)) = in_flight.next() => {
                flying.remove(&name);
                settle(name, outcome, &mut watched, &mut done, &mut waiting, &mut archive_waits, &mut is_trusted);
            }
            Some(()) = told.recv(), if is_watching => {}
            () = tokio::time::sleep_until(wake) => {}
        }
    }
    let arrive = async {
        while let Some((name, outcome)) = in_flight.next().await {
            settle(name, outcome, &mut watched, &mut done, &mut waiting, &mut archive_waits, &mut is_trusted);
        }
    };
    if tokio::time::timeout(STOP_GRACE, arrive).await.is_err() {
        tracing::warn!("stopped with files on their way; the next run ships them");
    }
    Ok(watched)
}

/// Remembers what became of a file, and says it.
fn settle(
    name: WalFileName,
    outcome: Option<Result<Pushed, PushError>>,
    watched: &mut Watched,
    done: &mut HashSet<WalFileName>,
    waiting: &mut HashMap<WalFileName, Waiting>,
    archive_waits: &mut Option<Waiting>,
    is_trusted: &mut bool,
) {
    match outcome {
        None => {}
        Some(Ok(pushed)) => {
            use super::push::Outcome;
            match pushed.outcome {
                Outcome::Stored | Outcome::StoredBeside => {
                    watched.shipped = watched.shipped.saturating_add(1);
                    tracing::info!("{name} shipped: {} bytes as {}", pushed.file_bytes, pushed.stored_bytes);
                }
                Outcome::AlreadyThere | Outcome::Contained => {
                    watched.found = watched.found.saturating_add(1);
                    tracing::info!("{name} is in the archive already");
                }
            }
            if archive_waits.take().is_some() {
                tracing::warn!("the archive takes files again");
            }
            waiting.remove(&name);
            done.insert(name);
            *is_trusted = true;
        }
        Some(Err(e)) => {
            watched.failures = watched.failures.saturating_add(1);
            let text = one_line(&e);
            let previous = match e.is_archives() {
                true => archive_waits.as_ref(),
                false => waiting.get(&name),
            };
            if previous.is_none_or(|w| w.told != text) {
                tracing::warn!("{name} is not shipped: {text}");
            }
            let next = Waiting::after(previous, text, e.is_another_log());
            *is_trusted &= !next.is_another_log;
            match e.is_archives() {
                true => *archive_waits = Some(next),
                false => drop(waiting.insert(name, next)),
            }
        }
    }
}
