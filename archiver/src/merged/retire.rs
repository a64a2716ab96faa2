//! Which merged indexes have no use any more.

use std::collections::{BTreeMap, BTreeSet};

use waltide_format::SegmentName;
use waltide_format::archive::{Catalog, MergedName};

/// Those of `merged` whose segments are all gone from `left`, and those in whose place another was made: over the same
/// segments, by a newer builder or since they were found damaged, or of the copies that readers take now.
pub(crate) fn retired<'a, T>(
    catalog: &Catalog,
    merged: &'a [(MergedName, T)],
    left: &BTreeSet<SegmentName>,
) -> Vec<&'a T> {
    let current: BTreeMap<(SegmentName, u64), u64> = match merged.is_empty() {
        true => BTreeMap::new(),
        false => {
            catalog.merge_groups(&[]).iter().map(|g| ((g.name.first, g.name.step), g.name.key)).collect()
        }
    };
    let is_current = |name: &MergedName| current.get(&(name.first, name.step)) == Some(&name.key);
    let is_replaced = |name: &MergedName| {
        merged.iter().map(|(other, _)| other).filter(|other| other.is_same_range(name)).any(|other| {
            let newer = (other.builder, other.generation) > (name.builder, name.generation);
            (other.key == name.key && newer) || (is_current(other) && !is_current(name))
        })
    };
    let is_gone = |name: &MergedName| left.range(name.first..=name.last).next().is_none();
    merged.iter().filter(|(name, _)| is_gone(name) || is_replaced(name)).map(|(_, stored)| stored).collect()
}
