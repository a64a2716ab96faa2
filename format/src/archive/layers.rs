//! Several extent maps made into one, so that a chain of incrementals is read from few.

use std::collections::BTreeMap;
use std::collections::HashMap;

use super::block_set::BlockSet;
use super::extents::{Extent, ExtentMap};
use super::manifest::ManifestFile;
use crate::error::Corrupt;
use crate::ids::BLOCK_BYTES;

/// Makes one map of the newest maps of a manifest, `maps`, the first of which is its map `first`; the files' layers in
/// them become layers in the one map that takes that place. No frame is read or written: the map names the old packs,
/// and those that no run is left in it does not name.
pub fn merge_maps(maps: &[ExtentMap], first: u32, files: &mut [ManifestFile]) -> Result<ExtentMap, Corrupt> {
    let mut merged = ExtentMap::default();
    let mut packs: HashMap<&str, u32> = HashMap::new();
    for (place, file) in (0u64..).zip(files) {
        let at = file.extents.partition_point(|(map, _)| *map < first);
        let layers = file.extents.split_off(at);
        let layers = layers.iter().map(|(map, number)| {
            let wrong = Corrupt::invalid("files.extents", place, u64::from(*number));
            let map = map.checked_sub(first).and_then(|map| maps.get(usize::try_from(map).ok()?));
            let map = map.ok_or(wrong)?;
            let extents = usize::try_from(*number).ok().and_then(|number| map.files.get(number));
            Ok((map, extents.ok_or(wrong)?.as_slice()))
        });
        let layers: Vec<(&ExtentMap, &[Extent])> = layers.collect::<Result<_, Corrupt>>()?;
        for layer in merge_file(&layers, file.bytes) {
            let mut runs = Vec::with_capacity(layer.len());
            for (map, mut extent) in layer {
                if extent.stored_bytes > 0 {
                    let name = usize::try_from(extent.pack).ok().and_then(|pack| map.packs.get(pack));
                    let name = name.ok_or(Corrupt::invalid("pack", extent.offset, u64::from(extent.pack)))?;
                    let next = number_of(merged.packs.len());
                    extent.pack = *packs.entry(name).or_insert(next);
                    if extent.pack == next {
                        merged.packs.push(name.clone());
                    }
                }
                runs.push(extent);
            }
            file.extents.push((first, number_of(merged.files.len())));
            merged.files.push(runs);
        }
    }
    Ok(merged)
}

fn number_of(count: usize) -> u32 {
    u32::try_from(count).expect("fewer than the maps that were merged had")
}

/// A file's layers, oldest first, without the runs that do not show, in as few layers as runs that overlap leave.
fn merge_file<'a>(layers: &[(&'a ExtentMap, &'a [Extent])], bytes: u64) -> Vec<Vec<(&'a ExtentMap, Extent)>> {
    let mut covered = BlockSet::default();
    let mut shown = Vec::new();
    for (age, (map, extents)) in layers.iter().enumerate().rev() {
        for extent in extents.iter().rev().filter(|e| e.file_offset() < bytes) {
            let mut blocks = extent.first_block..end_of(extent);
            if blocks.any(|block| !covered.contains(block) && inside(block, bytes)) {
                shown.push((*map, *extent));
            }
        }
        // Nothing lies below the oldest.
        if age > 0 {
            extents.iter().flat_map(|e| e.first_block..end_of(e)).for_each(|block| covered.insert(block));
        }
    }
    let mut merged: Vec<BTreeMap<u32, (&ExtentMap, Extent)>> = Vec::new();
    for (map, extent) in shown.into_iter().rev() {
        let overlaps = |layer: &BTreeMap<u32, (&ExtentMap, Extent)>| {
            let before = layer.range(..end_of(&extent)).next_back();
            before.is_some_and(|(_, (_, other))| end_of(other) > extent.first_block)
        };
        let place = merged.iter().rposition(overlaps).map_or(0, |under| under.saturating_add(1));
        if place == merged.len() {
            merged.push(BTreeMap::new());
        }
        if let Some(layer) = merged.get_mut(place) {
            layer.insert(extent.first_block, (map, extent));
        }
    }
    merged.into_iter().map(|layer| layer.into_values().collect()).collect()
}

fn end_of(extent: &Extent) -> u32 {
    extent.first_block.saturating_add(extent.blocks())
}

fn inside(block: u32, bytes: u64) -> bool {
    u64::from(block).saturating_mul(BLOCK_BYTES as u64) < bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a block of a file shows: the pack's name and the place in it of the run that has it, and how far into that.
    fn shows(file: &ManifestFile, maps: &[ExtentMap], block: u32) -> Option<(String, u64, u32)> {
        file.extents.iter().rev().find_map(|(map, number)| {
            let map = &maps[*map as usize];
            let extents = &map.files[*number as usize];
            let extent = extents.iter().find(|e| (e.first_block..end_of(e)).contains(&block))?;
            let name = match extent.stored_bytes {
                0 => "zeros".to_owned(),
                _ => map.packs[extent.pack as usize].clone(),
            };
            let place = if extent.stored_bytes == 0 { 0 } else { extent.offset };
            Some((name, place, if extent.stored_bytes == 0 { 0 } else { block - extent.first_block }))
        })
    }

    type Run = (u32, u32, bool);

    fn map_of(number: usize, files: &[Vec<Run>]) -> ExtentMap {
        let mut offset = 16;
        let extents = |runs: &Vec<Run>| {
            let mut next = 0;
            let mut extent = |(skip, blocks, zeros): &Run| {
                let first_block = next + skip;
                next = first_block + blocks;
                offset += 100;
                let stored_bytes = if *zeros { 0 } else { 100 };
                Extent {
                    pack: u32::from(!zeros),
                    offset,
                    stored_bytes,
                    first_block,
                    raw_bytes: blocks * 8192,
                    crc: 1,
                }
            };
            runs.iter().map(&mut extent).collect()
        };
        let files = files.iter().map(extents).collect();
        ExtentMap { packs: vec![format!("unused{number}"), format!("pack{number}")], files }
    }

    fn files() -> impl Strategy<Value = Vec<Vec<Run>>> {
        let run = (0u32..6, 1u32..7, prop::bool::weighted(0.2));
        proptest::collection::vec(proptest::collection::vec(run, 0..8), 3..4)
    }

    proptest! {
        #[test]
        fn merged_maps_show_what_the_layers_showed(
            maps in proptest::collection::vec(files(), 1..6),
            first in 0usize..3,
            sizes in proptest::collection::vec(0u64..50 * 8192, 3..4),
            left_out in proptest::collection::vec(any::<bool>(), 18..19),
        ) {
            let maps: Vec<_> = maps.iter().enumerate().map(|(n, files)| map_of(n, files)).collect();
            let first = first.min(maps.len() - 1);
            let file = |n: usize| ManifestFile {
                path: format!("f{n}"), bytes: sizes[n], mode: 0o600, modified: 0,
                extents: (0..maps.len()).filter(|m| !left_out[m * 3 + n]).map(|m| (m as u32, n as u32)).collect(),
            };
            let before: Vec<_> = (0..3).map(file).collect();
            let mut after = before.clone();
            let merged = merge_maps(&maps[first..], first as u32, &mut after).unwrap();
            prop_assert_eq!(ExtentMap::decode(&merged.encode()), Ok(merged.clone()));
            let used: std::collections::BTreeSet<u32> =
                merged.files.iter().flatten().filter(|e| e.stored_bytes > 0).map(|e| e.pack).collect();
            prop_assert_eq!(used.len(), merged.packs.len());
            let mut now = maps[..first].to_vec();
            now.push(merged);
            for (was, is) in before.iter().zip(&after) {
                prop_assert!(is.extents.iter().all(|(map, _)| *map as usize <= first));
                for block in (0..60).filter(|block| inside(*block, was.bytes)) {
                    prop_assert_eq!(shows(was, &maps, block), shows(is, &now, block), "block {}", block);
                }
            }
        }
    }

    #[test]
    fn what_does_not_overlap_becomes_one_layer() {
        let single = |block| map_of(block as usize, &[vec![(block, 1, false)]]);
        let maps: Vec<_> = (0..20).map(single).collect();
        let extents = (0..20).map(|map| (map, 0)).collect();
        let mut files =
            [ManifestFile { path: "f".into(), bytes: 20 * 8192, mode: 0o600, modified: 0, extents }];
        let merged = merge_maps(&maps, 0, &mut files).unwrap();
        assert_eq!((files[0].extents.len(), merged.files.len(), merged.files[0].len()), (1, 1, 20));
    }

    #[test]
    fn a_layer_that_no_map_has_is_refused() {
        let extents = vec![(0, 3)];
        let mut files = [ManifestFile { path: "f".into(), bytes: 1, mode: 0, modified: 0, extents }];
        let err = merge_maps(&[map_of(0, &[])], 0, &mut files).unwrap_err();
        assert_eq!(err.to_string(), "files.extents at byte 0 is 0x3");
    }
}
