//! While PostgreSQL waits for one segment, the others that are ready go too.
//!
//! PostgreSQL archives one file at a time. The runs for the neighbours come later and find them in the archive. Only
//! PostgreSQL renames `.ready`: a segment counts as archived when its own run has said so, never because of this one.

use std::path::Path;
use std::time::{Duration, Instant};

use futures_util::{FutureExt as _, StreamExt as _, future, stream};
use tokio::sync::watch;
use waltide_format::WalFileName;

use super::push::{Looked, PushError, Pushed, Shipper};
use super::wal_dir::WalDir;

/// One run ships at most this many neighbours: PostgreSQL hears of its own segment only when the run ends.
const COUNT_MAX: usize = 31;
/// And at most this much WAL.
const RUN_BYTES_MAX: u64 = 1 << 30;
/// Segments that are in memory at once take no more than this, each of them as it is and as it is stored.
const MEMORY_BYTES_MAX: u64 = 512 << 20;

/// How long a run waits for a resident shipper, and how often it looks.
const HAND_OVER: Duration = Duration::from_secs(2);
const HAND_OVER_STEP: Duration = Duration::from_millis(10);

/// Ships `path`, and beside it what else is ready. A neighbour's failure is a warning, for its own run will tell. Where
/// `path` is in the archive already, an earlier run has taken the neighbours along.
pub(crate) async fn push_with_neighbours(
    shipper: &Shipper,
    path: &Path,
    threads: usize,
) -> Result<Pushed, PushError> {
    let mut arrival = match shipper.look(path).await? {
        Looked::Done(pushed) => return Ok(pushed),
        Looked::Missing(arrival) => arrival,
    };
    let dir = WalDir::of(path);
    if dir.is_watched() {
        // A resident shipper is at it. Where it does not manage, this run does, and says why it cannot.
        let until = Instant::now().checked_add(HAND_OVER);
        while until.is_some_and(|until| Instant::now() < until) {
            if shipper.has_appeared(&arrival).await? {
                match shipper.look(path).await? {
                    Looked::Done(pushed) => return Ok(pushed),
                    Looked::Missing(again) => arrival = again,
                }
                break;
            }
            tokio::time::sleep(HAND_OVER_STEP).await;
        }
        return shipper.store(*arrival, threads).await;
    }
    let own = arrival.name();
    let chosen = {
        let dir = dir.clone();
        tokio::task::spawn_blocking(move || choose(&dir, own)).await
    };
    let (neighbours, file_bytes_max) = chosen.unwrap_or_default();
    let lanes = lanes(threads, file_bytes_max.max(arrival.file_bytes()));
    // With neighbours each file gets a thread of its own, which wastes nothing; alone, the file gets all of them.
    if neighbours.is_empty() || lanes < 2 {
        return shipper.store(*arrival, threads).await;
    }
    // The neighbours are read and compressed meanwhile, and stored once this one is: where the archive has another
    // server's log in its place, theirs would mix with that.
    let (open, gate) = watch::channel(None);
    let held = &shipper.held_until(gate);
    let own = async {
        let stored = shipper.store(*arrival, 1).await;
        let is_ours = !stored.as_ref().is_err_and(PushError::is_another_log);
        open.send_replace(Some(is_ours));
        Some(stored)
    }
    .left_future();
    let dir = &dir;
    let others = neighbours.into_iter().map(|name| {
        async move {
            match held.ship(&dir.file(name), 1).await {
                Ok(pushed) => tracing::info!("{name} went along: {:?}", pushed.outcome),
                // PostgreSQL has archived it meanwhile and reused the file.
                Err(_) if !dir.is_ready(name) => {}
                Err(PushError::HeldBack { .. }) => {}
                Err(e) => tracing::warn!("{name} did not go along: {}", one_line(&e)),
            }
            None
        }
        .right_future()
    });
    let all = stream::iter(std::iter::once(own).chain(others)).buffer_unordered(lanes);
    let mut told: Vec<_> = all.filter_map(future::ready).collect().await;
    told.pop().expect("the file itself is among them")
}

/// How many files of this length may be shipped at once.
pub(crate) fn lanes(threads: usize, file_bytes: u64) -> usize {
    let each = file_bytes.saturating_mul(2).max(1);
    let fitting = MEMORY_BYTES_MAX.checked_div(each).unwrap_or(1);
    usize::try_from(fitting).unwrap_or(usize::MAX).clamp(1, threads.max(1))
}

/// The segments to ship beside `own`, oldest first, and the length of the longest.
fn choose(dir: &WalDir, own: WalFileName) -> (Vec<WalFileName>, u64) {
    // Without archive_status this is no pg_wal, and there are no neighbours.
    let ready = dir.ready().unwrap_or_default();
    let segments = ready.into_iter().filter(|name| matches!(name, WalFileName::Segment(_)) && *name != own);
    let (mut chosen, mut bytes, mut longest) = (Vec::new(), 0u64, 0);
    for name in segments.take(COUNT_MAX) {
        let length = std::fs::metadata(dir.file(name)).map_or(0, |meta| meta.len());
        bytes = bytes.saturating_add(length);
        if bytes > RUN_BYTES_MAX {
            break;
        }
        longest = length.max(longest);
        chosen.push(name);
    }
    (chosen, longest)
}

/// An error with its causes on one line, for a log.
pub(crate) fn one_line(e: &dyn std::error::Error) -> String {
    let mut line = e.to_string().lines().collect::<Vec<_>>().join("; ");
    let mut source = e.source();
    while let Some(cause) = source {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        source = cause.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_threads_bound_how_many_go_at_once() {
        assert_eq!(lanes(8, 16 << 20), 8);
        assert_eq!(lanes(8, 64 << 20), 4);
        assert_eq!(lanes(8, 1 << 30), 1);
        assert_eq!(lanes(0, 0), 1);
    }

    #[test]
    fn the_oldest_neighbours_go_first_and_other_files_never() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = WalDir::new(scratch.path().to_owned());
        assert_eq!(choose(&dir, "000000010000000000000001".parse().unwrap()).0, []);
        std::fs::create_dir(dir.archive_status()).unwrap();
        for n in 1..=40 {
            std::fs::write(dir.archive_status().join(format!("0000000100000000000000{n:02X}.ready")), "")
                .unwrap();
        }
        std::fs::write(dir.archive_status().join("00000002.history.ready"), "").unwrap();
        let (chosen, _) = choose(&dir, "000000010000000000000002".parse().unwrap());
        assert_eq!(chosen.len(), COUNT_MAX);
        assert_eq!(chosen[0].to_string(), "000000010000000000000001");
        assert_eq!(chosen[1].to_string(), "000000010000000000000003");
        let file = std::fs::File::create(dir.file("000000010000000000000003")).unwrap();
        file.set_len(RUN_BYTES_MAX + 1).unwrap();
        assert_eq!(choose(&dir, "000000010000000000000002".parse().unwrap()).0.len(), 1);
    }
}
