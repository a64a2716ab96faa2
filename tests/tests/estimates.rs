//! The plan's estimate against drills that were really run: eight of one cluster, on a machine that had other work.

use waltide_format::archive::{DrillRecord, Rates, RestoreWork};

fn drills() -> Vec<DrillRecord> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/drills.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// What a plan would have said, and what it took.
fn estimated_and_took(rates: &Rates, drill: &DrillRecord) -> (f64, f64) {
    let work = RestoreWork {
        base_bytes: drill.restored_bytes,
        files: drill.restored_files,
        wal_bytes: drill.wal_bytes,
        segments: drill.segments,
        records: 0,
    };
    let phase = |name: &str| drill.phases.iter().find(|p| p.name == name).unwrap().seconds;
    (rates.estimate(&work).total_seconds, phase("restore") + phase("recovery"))
}

#[test]
fn each_drill_is_estimated_within_a_factor_of_two_by_the_others() {
    let all = drills();
    assert_eq!(all.len(), 8);
    for (n, drill) in all.iter().enumerate() {
        let others: Vec<_> =
            all.iter().enumerate().filter(|(i, _)| *i != n).map(|(_, d)| d.clone()).collect();
        let (estimate, took) = estimated_and_took(&Rates::from_drills(&others), drill);
        let share = estimate / took;
        assert!(
            (0.5..=2.0).contains(&share),
            "{}: estimated {estimate:.1} s, took {took:.1} s",
            drill.target
        );
    }
}

#[test]
fn drills_make_the_estimate_better_from_the_first_on() {
    let all = drills();
    let off = |rates: &Rates| -> f64 {
        let shares = all.iter().map(|d| estimated_and_took(rates, d)).map(|(e, t)| (e / t).ln().abs());
        shares.sum::<f64>() / all.len() as f64
    };
    let without = off(&Rates::default());
    for count in 1..=all.len() {
        let with = off(&Rates::from_drills(&all[..count]));
        assert!(
            with < without,
            "{count} drills: off by a factor of {} instead of {}",
            with.exp(),
            without.exp()
        );
    }
}
