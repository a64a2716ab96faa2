//! `waltide verify`: is the archive whole.

use std::time::Duration;

use waltide_archiver::catalog::{self, Known};
use waltide_format::TimestampTz;
use waltide_format::archive::ChainHead;
use waltide_replay::{FaultKind, Verification, Verify};

use crate::context::{Context, catalog_failure, find_backup};
use crate::exit::Failure;
use crate::output;

/// How long a quick look goes on unless it is said.
const QUICK_MINUTES: u64 = 10;

/// Read every object, check every checksum, every record and every gap
///
/// Without BACKUP the whole archive is verified: what never was comes first, then what was not for the longest time; the
/// ledger in the archive says. Ends with 3 on any fault.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only this backup and the WAL it needs: its name or the beginning of it, or `latest`
    #[arg(value_name = "BACKUP")]
    backup: Option<String>,
    /// Look at names, lengths, directories and gaps only, for 10 minutes unless --max-minutes says otherwise
    #[arg(long)]
    quick: bool,
    /// Prove the hash chain over the WAL as well, and print its head, which may be noted elsewhere
    #[arg(long, conflicts_with = "backup")]
    chain: bool,
    /// Prove that the archive continues this head of the chain, noted before (with --chain)
    #[arg(long, value_name = "HEAD", requires = "chain")]
    since: Option<ChainHead>,
    /// Begin nothing new after so many minutes; the next run goes on with the rest
    #[arg(long, value_name = "N")]
    max_minutes: Option<u64>,
}

pub(crate) async fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let (archive, layout) = (context.archive().await?, context.layout()?);
    // What the cache says was true once; this is about what is true now. A quick run compares the one with the other, as
    // far as its time goes.
    let cache = if args.quick { context.cache(&archive) } else { None };
    let known = if args.quick { Known::from(cache.as_ref()) } else { Known::Nothing };
    let loaded = catalog::load_settled(&archive, &layout, context.system, known, context.threads).await;
    let catalog = loaded.map_err(catalog_failure)?;
    let backup = args.backup.as_deref().map(|text| find_backup(&catalog, text)).transpose()?;
    let progress = context.progress();
    let minutes = args.max_minutes.or(args.quick.then_some(QUICK_MINUTES));
    let verify = Verify {
        archive: &archive,
        layout: &layout,
        catalog: &catalog,
        backup,
        quick: args.quick,
        time_allowed: minutes.map(|n| Duration::from_secs(n.saturating_mul(60))),
        threads: context.threads,
        progress: progress.as_ref(),
    };
    let mut found = verify.run(TimestampTz::from_jiff(jiff::Timestamp::now())).await?;
    if args.chain {
        verify.prove_chain(args.since, &mut found).await?;
    }
    drop(progress);
    output::answer(context, &found, || text(&found))?;
    if found.faults.is_empty() { Ok(()) } else { Err(Failure::silent(3)) }
}

fn text(v: &Verification) -> String {
    let what = match (&v.backup, v.quick) {
        (Some(id), false) => format!("backup {id}"),
        (Some(id), true) => format!("backup {id}, quickly"),
        (None, false) => "the archive".to_owned(),
        (None, true) => "the archive, quickly".to_owned(),
    };
    let read =
        format!("{} objects, {}, in {}", v.objects, output::bytes(v.bytes), output::duration(v.seconds));
    let mut facts = vec![
        ("verified", what),
        ("read", read),
        ("WAL", format!("{} segments, {} records", v.segments, v.records)),
        ("backups", format!("{}, {} frames of their data", v.backups, v.frames)),
    ];
    if !v.complete {
        facts
            .push(("incomplete", "the time allowed was over; the next run goes on with the rest".to_owned()));
    }
    facts.extend(v.chains.iter().map(|c| ("chain", format!("timeline {}: {}", c.timeline, c.head))));
    facts.extend(v.notes.iter().map(|n| ("note", n.clone())));
    for fault in &v.faults {
        let kind = match fault.kind {
            FaultKind::Missing => "MISSING",
            FaultKind::Damaged => "DAMAGED",
            FaultKind::Gap => "GAP",
            FaultKind::Diverged => "DIVERGED",
        };
        facts.push((kind, format!("{}: {}", fault.object, fault.text)));
    }
    let faults = if v.faults.is_empty() { "none".to_owned() } else { v.faults.len().to_string() };
    facts.push(("faults", faults));
    output::facts(&facts)
}
