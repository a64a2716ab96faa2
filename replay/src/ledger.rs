//! The ledger of verifications: what was looked at when, and how, so that the next run does the rest first.

use std::collections::{BTreeMap, BTreeSet};

use waltide_format::TimestampTz;
use waltide_format::archive::{Envelope, LedgerRecord, LedgerUnit, ObjectKind, SystemLayout};
use waltide_storage::{Archive, Put, StorageError};

/// No record is larger.
const RECORD_BYTES_MAX: u64 = 16 << 20;
/// The newest records stay, whatever they say, for people who want to know how often it is looked.
const KEPT: usize = 32;

/// The records of a system, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    records: Vec<LedgerRecord>,
}

impl Ledger {
    /// Reads it. A record that cannot be read says nothing; it is told as damaged where everything is verified.
    pub(crate) async fn read(archive: &Archive, names: &SystemLayout) -> Result<Self, StorageError> {
        let mut records = Vec::new();
        for object in archive.list(&names.ledger()).await? {
            let Ok(bytes) = archive.get(&object.path, RECORD_BYTES_MAX).await else { continue };
            records.extend(Envelope::open_json::<LedgerRecord>(&bytes, ObjectKind::Json));
        }
        records.sort_by(|a: &LedgerRecord, b| (a.started, &a.id).cmp(&(b.started, &b.id)));
        Ok(Self { records })
    }

    /// When each part was looked at last, as thoroughly as now.
    pub(crate) fn last_looked(&self, quick: bool) -> BTreeMap<&str, TimestampTz> {
        let as_thorough = self.records.iter().filter(|r| !r.quick || quick);
        as_thorough.flat_map(|r| r.units.iter().map(|u| (u.name.as_str(), r.started))).collect()
    }

    /// Writes what a run has looked at, under a name that no other run has: it is added to the record's, if another
    /// began in the same second. Where the record lies.
    pub(crate) async fn write(
        archive: &Archive,
        names: &SystemLayout,
        record: &mut LedgerRecord,
    ) -> Result<Option<String>, StorageError> {
        let wanted = record.id.clone();
        for n in 1u32..=u32::MAX {
            let path = format!("{}/{}", names.ledger(), record.id);
            let bytes = Envelope::seal_json(ObjectKind::Json, record);
            if archive.put_new(&path, bytes.into()).await? == Put::Created {
                return Ok(Some(path));
            }
            record.id = format!("{wanted}-{n}");
        }
        Ok(None)
    }

    /// Removes the records that [`superseded`] names. `newest` is the one just written.
    pub(crate) async fn tidy(
        mut self,
        archive: &Archive,
        names: &SystemLayout,
        newest: LedgerRecord,
        parts: &BTreeSet<String>,
    ) -> Result<(), StorageError> {
        self.records.push(newest);
        for id in superseded(&self.records, parts, KEPT) {
            archive.delete(&format!("{}/{id}", names.ledger())).await?;
        }
        Ok(())
    }
}

/// The records that nothing hangs on: whatever they looked at was looked at again since, as thoroughly, or is no part
/// of the archive any more. So the ledger has no more records than there are parts, twice, and the newest `kept`.
fn superseded<'a>(records: &'a [LedgerRecord], parts: &BTreeSet<String>, kept: usize) -> Vec<&'a str> {
    let (mut quick, mut thorough): (BTreeSet<&str>, BTreeSet<&str>) = Default::default();
    let mut found = Vec::new();
    for (age, record) in records.iter().rev().enumerate() {
        let again = |u: &LedgerUnit| {
            let name = u.name.as_str();
            !parts.contains(name) || thorough.contains(name) || (record.quick && quick.contains(name))
        };
        if age >= kept && record.units.iter().all(again) {
            found.push(record.id.as_str());
            continue;
        }
        let looked = if record.quick { &mut quick } else { &mut thorough };
        looked.extend(record.units.iter().map(|u| u.name.as_str()));
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(n: i64, quick: bool, units: &[&str]) -> LedgerRecord {
        let unit = |name: &&str| LedgerUnit { name: (*name).to_owned(), objects: 1, bytes: 1, faults: 0 };
        LedgerRecord {
            id: format!("r{n}"),
            started: TimestampTz::from_postgres_micros(n),
            seconds: 1.0,
            quick,
            units: units.iter().map(unit).collect(),
        }
    }

    fn parts(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_record_goes_once_all_it_looked_at_was_looked_at_again_as_thoroughly() {
        let records = [
            record(1, false, &["a", "gone"]),
            record(2, false, &["b"]),
            record(3, true, &["a", "b"]),
            record(4, false, &["a"]),
            record(5, true, &["b"]),
        ];
        let parts = parts(&["a", "b"]);
        // The first is done again by the fourth, the third by the fourth and fifth; only the second knows b thoroughly.
        assert_eq!(superseded(&records, &parts, 0), ["r3", "r1"]);
        assert_eq!(superseded(&records, &parts, 3), ["r1"]);
        let ledger = Ledger { records: records.to_vec() };
        let at = |n| TimestampTz::from_postgres_micros(n);
        assert_eq!(ledger.last_looked(false), BTreeMap::from([("a", at(4)), ("b", at(2)), ("gone", at(1))]));
        assert_eq!(ledger.last_looked(true), BTreeMap::from([("a", at(4)), ("b", at(5)), ("gone", at(1))]));
    }

    proptest! {
        #[test]
        fn what_goes_changes_nothing_that_the_ledger_says_and_what_stays_is_bounded(
            runs in proptest::collection::vec((any::<bool>(), proptest::collection::vec(0usize..6, 0..5)), 0..60),
            kept in 0usize..5,
        ) {
            let all = ["a", "b", "c", "d", "e", "no part"];
            let parts = parts(&all[..5]);
            let records: Vec<_> = (0..).zip(&runs).map(|(n, (quick, units))| {
                record(n, *quick, &units.iter().map(|i| all[*i]).collect::<Vec<_>>())
            }).collect();
            let gone: Vec<_> = superseded(&records, &parts, kept).into_iter().map(str::to_owned).collect();
            let left: Vec<_> = records.iter().filter(|r| !gone.contains(&r.id)).cloned().collect();
            prop_assert!(left.len() <= 2 * parts.len() + kept);
            for quick in [false, true] {
                let says = |records: &[LedgerRecord]| {
                    let ledger = Ledger { records: records.to_vec() };
                    let looked = ledger.last_looked(quick);
                    looked.into_iter().filter(|(name, _)| parts.contains(*name)).map(|(n, t)| (n.to_owned(), t)).collect::<Vec<_>>()
                };
                prop_assert_eq!(says(&records), says(&left));
            }
        }
    }
}
