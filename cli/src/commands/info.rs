//! `waltide info`: one backup.

use serde::Serialize;
use waltide_format::archive::Manifest;

use super::list::Row;
use crate::context::{Context, find_backup};
use crate::exit::Failure;
use crate::output;

/// Show one backup: what it holds, what it took, how far recovery can go from it
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Its name or the beginning of it, or `latest`
    #[arg(value_name = "BACKUP", default_value = "latest")]
    backup: String,
}

#[derive(Debug, Serialize)]
struct Answer<'a> {
    #[serde(flatten)]
    row: &'a Row,
    /// The manifest's head; its files and directories are left out.
    manifest: &'a Manifest,
}

pub(crate) async fn run(args: &Args, context: &Context) -> Result<(), Failure> {
    let (archive, layout) = (context.archive().await?, context.layout()?);
    let catalog = context.catalog(&archive, &layout).await?;
    let entry = find_backup(&catalog, &args.backup)?;
    let row = Row::new(entry, &catalog.coverage());
    let answer = Answer { row: &row, manifest: &entry.head };
    output::answer(context, &answer, || text(&row, &entry.head))
}

fn text(row: &Row, head: &Manifest) -> String {
    let mut lines: Vec<(&str, String)> = vec![
        ("backup", row.id.to_string()),
        ("type", format!("{}, by waltide {}", output::word(&row.kind), output::word(&head.method))),
        ("started", output::time(head.started)),
        (
            "ended",
            format!("{} after {}", output::time(head.stopped), output::duration(head.stats.total_seconds)),
        ),
        ("server", format!("PostgreSQL {}, system {}", head.server_version, head.system_id)),
        ("checksums", if head.data_checksums { "on" } else { "off" }.to_owned()),
        ("timeline", head.timeline.to_string()),
        ("WAL", format!("{} to {}", head.start_lsn, head.stop_lsn)),
        ("size", format!("{} in {} files", output::bytes(row.cluster_bytes), row.files)),
        ("read", output::bytes(row.read_bytes)),
        ("stored", output::bytes(row.stored_bytes)),
    ];
    lines.extend(head.parent.iter().map(|p| {
        let referred = output::bytes(row.referred_bytes);
        ("parent", format!("{p}; {referred} are in the packs of older backups"))
    }));
    lines.extend(head.full_because.iter().map(|why| ("full because", why.clone())));
    lines.extend(head.description.iter().map(|d| ("description", d.clone())));
    lines.extend(head.tablespaces.iter().map(|t| ("tablespace", format!("{} at {}", t.oid, t.path))));
    lines.extend(head.config_files.iter().map(|c| ("outside", format!("{} ({})", c.path, c.role))));
    lines.extend(head.damaged_pages.iter().map(|p| ("damaged page", p.clone())));
    lines.extend(row.keep.iter().map(|k| {
        let alone = if k.standalone { ", without the WAL behind its end" } else { "" };
        let reason = k.reason.as_ref().map(|r| format!(": {r}")).unwrap_or_default();
        ("kept", format!("since {}{alone}{reason}", output::time(k.since)))
    }));
    if !row.restorable {
        lines.push(("restorable", "NO: its WAL is not whole; see `waltide status`".to_owned()));
    }
    lines.extend(row.reaches.iter().map(|r| {
        let time = r.time.map(|t| format!(", the last commit at {}", output::time(t))).unwrap_or_default();
        ("reaches", format!("{} on timeline {}{time}", r.lsn, r.timeline))
    }));
    output::facts(&lines)
}
