//! Pushes that fail and pushes that are killed.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use waltide_archiver::engines::postgres::push::{DEFAULT_LEVEL, Outcome, PushRequest, push};
use waltide_format::archive::{Layout, StoredSegment, WalFile};
use waltide_storage::{Archive, Faults};

use super::lab::Lab;

/// Pushes in this process, with faults between it and the archive.
pub(crate) fn push_with(archive: &Archive, faults: Option<&Faults>, path: &Path) -> Result<Outcome, String> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let archive = faults.map_or_else(|| archive.clone(), |faults| archive.with_faults(faults.clone()));
    let request = PushRequest {
        archive,
        layout: Layout::new("main").unwrap(),
        path: path.to_owned(),
        threads: 2,
        level: DEFAULT_LEVEL,
        force_admit: false,
    };
    runtime.block_on(push(&request)).map(|pushed| pushed.outcome).map_err(|e| e.to_string())
}

/// A name, what is pushed under it, and what was pushed before.
type Case<'a> = (&'a str, Vec<u8>, Option<Vec<u8>>);

#[test]
fn whichever_call_to_the_archive_fails_nothing_is_half_there_and_a_retry_works() {
    let lab = Lab::new("faults");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let url = lab.site.archive.to_str().unwrap().parse().unwrap();
    let archive = runtime.block_on(Archive::open(&url)).unwrap();
    let segment = lab.segments[4].clone();
    let partial = format!("{segment}.partial");
    let wal = lab.wal(4);
    let cut = |pages: usize| {
        let mut bytes = wal.clone();
        bytes[pages * 8192..].fill(0);
        bytes
    };
    let cases: [Case<'_>; 5] = [
        (&segment, wal.clone(), None),
        (&segment, wal.clone(), Some(wal.clone())),
        (&partial, cut(90), Some(cut(40))),
        (&partial, cut(40), Some(cut(90))),
        ("00000002.history", b"1\t0/2000000\tx\n".to_vec(), None),
    ];
    for (name, bytes, before) in cases {
        let path = lab.file(name, &bytes);
        let wal_dir = lab.site.archive.join(lab.site.names(&lab.cluster).wal());
        let mut failures = 0;
        for kind in [Faults::fail_call, Faults::lose_ack, Faults::torn_write, Faults::down_from] {
            for n in 1.. {
                let _ = fs::remove_dir_all(&wal_dir);
                if let Some(before) = &before {
                    push_with(&archive, None, &lab.file(name, before)).unwrap();
                }
                let faults = kind(n);
                let outcome = push_with(&archive, Some(&faults), &path);
                // What is visible is whole, whatever happened, and what was acknowledged is there.
                let stored = || match name.ends_with(".history") {
                    true => fs::read(wal_dir.join(name))
                        .map(|b| usize::from(WalFile::decode(&b).unwrap().contents == bytes))
                        .unwrap_or(0),
                    false => lab
                        .site
                        .segments(&lab.cluster)
                        .values()
                        .filter(|s| s.wal == bytes || before.as_ref() == Some(&s.wal))
                        .count(),
                };
                let there = stored();
                if outcome.is_ok() {
                    assert!(there > 0, "{name} {faults:?}");
                } else {
                    assert!(faults.fired(), "{name} {faults:?} {outcome:?}");
                    failures += 1;
                    let again = push_with(&archive, None, &path);
                    assert!(again.is_ok(), "{name} {faults:?} {again:?}");
                }
                assert!(stored() > 0, "{name} {faults:?}");
                if !faults.fired() {
                    break;
                }
            }
        }
        assert!(failures >= 8, "{name}: {failures}");
    }
}

/// Numbers that look random and come again with the same seed.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

#[test]
fn a_push_killed_at_any_instant_loses_nothing_and_leaves_nothing_half_done() {
    let lab = Lab::new("kill");
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(20_261_120);
    let mut dice = Dice(seed);
    let name = lab.segments[4].as_str();
    let path = lab.file(name, &lab.wal(4));
    let path = path.to_str().unwrap();
    let object = lab.site.object(&lab.cluster, name);
    let dir = object.parent().unwrap().to_owned();
    // The shortest of several, for the machine may be busy.
    let time = || {
        let _ = fs::remove_dir_all(&dir);
        lab.site.waltide.ok(["push", path]).took
    };
    let took = (0..5).map(|_| time()).min().unwrap();
    let (mut killed, mut absent, mut whole) = (0, 0, 0);
    for round in 0..1000 {
        if killed >= 170 {
            break;
        }
        let _ = fs::remove_dir_all(&dir);
        let mut command = lab.site.waltide.runner(["push", path]).into_command();
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let micros = u64::try_from(took.as_micros()).unwrap();
        let until = Instant::now() + Duration::from_micros(dice.below(micros));
        // Spinning hits the instant; sleeping would round it.
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        let status = child.wait().unwrap();
        killed += usize::from(status.code().is_none());
        match fs::read(&object) {
            Ok(bytes) => {
                whole += 1;
                let stored = StoredSegment::decode(&bytes)
                    .unwrap_or_else(|e| panic!("round {round}, seed {seed}: {e}"));
                assert!(stored.wal == lab.wal(4), "round {round}, seed {seed}");
            }
            Err(_) => {
                absent += 1;
                assert!(!status.success(), "acknowledged and not there: round {round}, seed {seed}");
            }
        }
        lab.site.waltide.ok(["push", path]);
        assert!(lab.site.segments(&lab.cluster)[name].wal == lab.wal(4), "round {round}, seed {seed}");
    }
    assert!(killed >= 170 && absent > 20, "{killed} killed, {absent} absent, {whole} whole");
}
