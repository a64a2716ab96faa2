//! The block map against the truth: two states of a cluster's files and the archived WAL between them.

use std::collections::BTreeMap;
use std::fs;

use waltide_archiver::catalog;
use waltide_archiver::engines::postgres::backup::changed_blocks;
use waltide_format::archive::{Layout, Lineage};
use waltide_format::engines::postgres::changes::{ChangedBlocks, Changes};
use waltide_format::engines::postgres::cluster::RelationSegment;
use waltide_format::{BLOCK_BYTES, ForkNumber, Lsn, RelFileLocator, TimelineId};
use waltide_storage::{Archive, ArchiveUrl};
use waltide_tests::load::{self, Chance};
use waltide_tests::{Cluster, pages};

use crate::site::Site;

const RELATION_FILE_BLOCKS: u32 = 131_072;

/// Relations' files as they are on disk after a checkpoint, by path, and its redo point.
fn state(cluster: &Cluster) -> (BTreeMap<String, Vec<u8>>, Lsn) {
    cluster.query("checkpoint");
    let redo = cluster.query("select redo_lsn from pg_control_checkpoint()").parse().unwrap();
    let files = pages::relation_files(cluster.data_dir());
    let unlogged: Vec<String> =
        files.keys().filter_map(|path| Some(path.strip_suffix("_init")?.to_owned())).collect();
    let logged = files.into_iter().filter(|(path, _)| {
        let name = path.split(['.', '_']).next().unwrap_or_default();
        path.ends_with("_init") || !unlogged.iter().any(|u| u == name)
    });
    (logged.map(|(path, file)| (path, fs::read(file).unwrap())).collect(), redo)
}

/// What the archived WAL between two positions says has changed.
async fn changed(site: &Site, from: Lsn, until: Lsn) -> ChangedBlocks {
    let url: ArchiveUrl = site.archive.to_str().unwrap().parse().unwrap();
    let archive = Archive::open(&url).await.unwrap();
    let layout = Layout::new("main").unwrap();
    let catalog = catalog::load(&archive, &layout, None, None, 2).await.unwrap();
    let run = catalog.run(&Lineage::root(TimelineId::FIRST), from);
    let steps: Vec<_> = run.steps.into_iter().take_while(|step| step.start() < until).collect();
    assert!(steps.last().unwrap().usable_end >= until);
    let names = layout.system(catalog.system.system_id);
    changed_blocks(&archive, &names, &steps, from, 2).await.unwrap()
}

fn locate(path: &str) -> Option<(RelFileLocator, ForkNumber, u32)> {
    let parts: Vec<&str> = path.split('/').collect();
    let (spc_oid, db_oid, name) = match parts.as_slice() {
        ["base", db, name] => (1663, *db, *name),
        ["pg_tblspc", space, _, db, name] => (space.parse().unwrap(), *db, *name),
        _ => return None,
    };
    let part = RelationSegment::parse(name)?;
    let relation = RelFileLocator { spc_oid, db_oid: db_oid.parse().unwrap(), rel_number: part.number };
    Some((relation, part.fork, part.segment * RELATION_FILE_BLOCKS))
}

#[test]
fn every_block_that_differs_is_in_the_map() {
    let site = Site::new("incremental-map");
    let cluster = site.start(|b| b.settings(load::SETTINGS));
    let mut chance = Chance::new();
    load::prepare(&cluster);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (mut before, mut first) = state(&cluster);
    let begin = first;
    let (mut differing, mut spared) = (0, 0);
    for round in 0..4 {
        for _ in 0..12 {
            load::step(&cluster, &mut chance);
        }
        let (after, last) = state(&cluster);
        cluster.archive_all();
        let changed = runtime.block_on(changed(&site, first, last));

        for (path, now) in &after {
            let (Some(was), Some((relation, fork, base))) = (before.get(path), locate(path)) else {
                continue;
            };
            for block in 0..was.len().min(now.len()) / BLOCK_BYTES {
                let [a, b] = [was, now].map(|bytes| pages::masked(&pages::page_at(bytes, block), Some(fork)));
                let number = base + u32::try_from(block).unwrap();
                let told = match changed.of(relation, fork) {
                    Changes::Everything => true,
                    Changes::Nothing => false,
                    Changes::Some(changes) => changes.blocks.contains(number) || number >= changes.all_from,
                };
                assert!(told || a == b, "round {round}: {path} block {block} differs and is not in the map");
                differing += usize::from(a != b);
                spared += usize::from(!told);
            }
        }
        (before, first) = (after, last);
    }
    // Chance may leave one round with little to do.
    assert!(differing > 200 && spared > 4000, "{differing} differ, {spared} are not in the map");
    // The indexes of many segments say the same as those of each, and so do damaged ones, which are not believed.
    // However little chance wrote, there are segments for two.
    for _ in 0..32 {
        cluster.switch_wal();
    }
    cluster.archive_all();
    let of_each = runtime.block_on(changed(&site, begin, first));
    let made = site.waltide.json(["index"]);
    let made: Vec<_> = made["made"].as_array().unwrap().iter().map(|m| m["path"].as_str().unwrap()).collect();
    assert!(made.len() > 1, "{made:?}");
    assert_eq!(runtime.block_on(changed(&site, begin, first)), of_each);
    for path in made {
        let path = site.archive.join(path);
        let mut object = fs::read(&path).unwrap();
        let at = object.len() / 2;
        object[at] ^= 1;
        fs::write(&path, object).unwrap();
    }
    assert_eq!(runtime.block_on(changed(&site, begin, first)), of_each);
}
