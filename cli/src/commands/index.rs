//! `waltide index`: merged indexes.

use serde::Serialize;
use waltide_archiver::merged::{Indexed, Merging};

use crate::context::Context;
use crate::exit::Failure;
use crate::output;

/// Merge the indexes of the archive's segments, so that questions about much WAL read a few objects
///
/// Makes what is missing; `watch` and `backup` do the same when they have time. Nothing depends on it: what is lost or
/// damaged is read from the segments. Ends with 3 where a damaged segment is in the way.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Read what is there too, and make what is damaged once more
    #[arg(long)]
    rebuild: bool,
}

#[derive(Serialize)]
struct Answer<'a> {
    #[serde(flatten)]
    indexed: &'a Indexed,
    seconds: f64,
}

pub(crate) async fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let begun = std::time::Instant::now();
    let (archive, layout) = (context.archive().await?, context.layout()?);
    let catalog = context.catalog(&archive, &layout).await?;
    let progress = context.progress();
    let merging = Merging {
        archive: &archive,
        layout: &layout,
        catalog: &catalog,
        rebuild: args.rebuild,
        threads: context.threads,
        progress: progress.as_ref(),
    };
    let indexed = merging.run().await?;
    drop(progress);
    let answer = Answer { indexed: &indexed, seconds: begun.elapsed().as_secs_f64() };
    output::answer(context, &answer, || text(&answer))?;
    if indexed.skipped.is_empty() { Ok(()) } else { Err(Failure::silent(3)) }
}

fn text(answer: &Answer<'_>) -> String {
    let Answer { indexed, seconds } = answer;
    let bytes = indexed.made.iter().fold(0u64, |sum, m| sum.saturating_add(m.stored_bytes));
    let made = format!("{}, {}, in {}", indexed.made.len(), output::bytes(bytes), output::duration(*seconds));
    let mut facts = vec![("made", made), ("present", indexed.present.to_string())];
    facts.extend(indexed.damaged.iter().map(|path| ("damaged", format!("{path}, made once more"))));
    facts.extend(indexed.skipped.iter().map(|s| ("SKIPPED", format!("{}: {}", s.path, s.reason))));
    output::facts(&facts)
}
