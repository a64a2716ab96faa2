//! The name of every object, both ways.

use crate::ids::{BackupId, Lsn, SystemId, TimelineId};
use crate::segment::{SegmentName, WalFileName};

/// Names below one cluster of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    cluster: String,
}

impl Layout {
    /// The archive's own object.
    pub const WALTIDE_JSON: &'static str = "waltide.json";

    /// The names of the cluster called `cluster`: one to 63 letters, digits, `_`, `-` or `.`, not starting with a dot.
    pub fn new(cluster: &str) -> Option<Self> {
        let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
        let ok = (1..=63).contains(&cluster.len()) && cluster.bytes().all(legal) && !cluster.starts_with('.');
        (ok && cluster != Self::WALTIDE_JSON).then(|| Self { cluster: cluster.to_owned() })
    }

    /// The cluster's name.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// Where the cluster's objects lie.
    pub fn prefix(&self) -> String {
        self.cluster.clone()
    }

    /// The cluster's own object.
    pub fn cluster_json(&self) -> String {
        format!("{}/cluster.json", self.cluster)
    }

    /// The names below one system identifier.
    pub fn system(&self, system: SystemId) -> SystemLayout {
        SystemLayout { prefix: format!("{}/{system}", self.cluster) }
    }
}

/// Names below one system identifier of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemLayout {
    prefix: String,
}

/// What an object below `wal/` is, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum WalObject {
    /// The file PostgreSQL calls so.
    File(WalFileName),
    /// A longer copy of a segment or `.partial` that was there before, valid up to `valid_end`.
    Longer {
        /// The segment or `.partial`.
        of: WalFileName,
        /// Where its valid records end.
        valid_end: Lsn,
    },
}

/// What a merged index covers and who made it, as its name says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct MergedName {
    /// The first segment.
    pub first: SegmentName,
    /// How many segments it covers.
    pub step: u64,
    /// The last segment.
    pub last: SegmentName,
    /// The version of the builder: a newer one says more, or says it better.
    pub builder: u16,
    /// Counts from zero on: a damaged object is made once more under the next number.
    pub generation: u32,
    /// The first eight bytes of a hash over the WAL that it covers, so that a listing tells whether it still is that.
    pub key: u64,
}

impl SystemLayout {
    /// Where the system's objects lie.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The system's own object.
    pub fn system_json(&self) -> String {
        format!("{}/system.json", self.prefix)
    }

    /// Where all WAL lies.
    pub fn wal(&self) -> String {
        format!("{}/wal", self.prefix)
    }

    /// Where a timeline's segments lie.
    pub fn timeline(&self, timeline: TimelineId) -> String {
        format!("{}/wal/{:08X}", self.prefix, timeline.get())
    }

    /// The object of a file that PostgreSQL archives.
    pub fn wal_file(&self, name: WalFileName) -> String {
        match name {
            WalFileName::History(_) => format!("{}/wal/{name}", self.prefix),
            WalFileName::Segment(s) | WalFileName::Partial(s) => {
                format!("{}/{name}", self.timeline(s.timeline()))
            }
            WalFileName::BackupHistory(b) => format!("{}/{name}", self.timeline(b.segment.timeline())),
        }
    }

    /// The object of a WAL file or of a longer copy.
    pub fn wal_object(&self, object: WalObject) -> String {
        match object {
            WalObject::File(name) => self.wal_file(name),
            WalObject::Longer { of, valid_end } => format!("{}@{:016X}", self.wal_file(of), valid_end.get()),
        }
    }

    /// What lies at `path`, if it is a name of the WAL part.
    pub fn parse_wal(&self, path: &str) -> Option<WalObject> {
        let rest = path.strip_prefix(&self.prefix)?.strip_prefix("/wal/")?;
        let file = rest.rsplit('/').next()?;
        let object = match file.split_once('@') {
            None => WalObject::File(file.parse().ok()?),
            Some((name, end)) => {
                let digits = end.len() == 16 && end.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'));
                let valid_end = digits.then(|| u64::from_str_radix(end, 16).ok()).flatten()?;
                let of = name.parse().ok()?;
                if !matches!(of, WalFileName::Segment(_) | WalFileName::Partial(_)) {
                    return None;
                }
                WalObject::Longer { of, valid_end: valid_end.into() }
            }
        };
        (self.wal_object(object) == path).then_some(object)
    }

    /// Where merged indexes lie.
    pub fn merged(&self) -> String {
        format!("{}/index", self.prefix)
    }

    /// A merged index.
    pub fn merged_index(&self, name: &MergedName) -> String {
        let MergedName { first, step, last, builder, generation, key } = name;
        let timeline = first.timeline().get();
        format!(
            "{}/index/{timeline:08X}/{step}/{first}-{last}.{key:016x}.{builder}.{generation}",
            self.prefix
        )
    }

    /// The merged index at `path`, if it is the name of one.
    pub fn parse_merged(&self, path: &str) -> Option<MergedName> {
        let rest = path.strip_prefix(&self.prefix)?.strip_prefix("/index/")?;
        let mut parts = rest.splitn(3, '/');
        let (_, step, file) = (parts.next()?, parts.next()?, parts.next()?);
        let mut fields = file.split('.');
        let (first, last) = fields.next()?.split_once('-')?;
        let name = MergedName {
            first: first.parse().ok()?,
            step: step.parse().ok()?,
            last: last.parse().ok()?,
            key: u64::from_str_radix(fields.next()?, 16).ok()?,
            builder: fields.next()?.parse().ok()?,
            generation: fields.next()?.parse().ok()?,
        };
        let ordered = name.first <= name.last && name.first.timeline() == name.last.timeline();
        (ordered && self.merged_index(&name) == path).then_some(name)
    }

    /// Where the manifests lie.
    pub fn backups(&self) -> String {
        format!("{}/backups", self.prefix)
    }

    /// A backup's manifest.
    pub fn manifest(&self, id: &BackupId) -> String {
        format!("{}/backups/{id}", self.prefix)
    }

    /// What announces a backup while it is being made.
    pub fn started(&self, id: &BackupId) -> String {
        format!("{}/backups/{id}.started", self.prefix)
    }

    /// What pins a backup against retention.
    pub fn keep(&self, id: &BackupId) -> String {
        format!("{}/backups/{id}.keep", self.prefix)
    }

    /// Where prunes announce what they are about to remove.
    pub fn pruning(&self) -> String {
        format!("{}/pruning", self.prefix)
    }

    /// A prune's announcement.
    pub fn prune_mark(&self, id: &str) -> String {
        format!("{}/pruning/{id}", self.prefix)
    }

    /// Where packs lie.
    pub fn packs(&self) -> String {
        format!("{}/chunks/packs", self.prefix)
    }

    /// A pack, named by the backup that wrote it and a number.
    pub fn pack(&self, name: &str) -> String {
        format!("{}/chunks/packs/{name}", self.prefix)
    }

    /// Where extent maps lie.
    pub fn maps(&self) -> String {
        format!("{}/chunks/maps", self.prefix)
    }

    /// An extent map, named by the backup that wrote it.
    pub fn map(&self, name: &str) -> String {
        format!("{}/chunks/maps/{name}", self.prefix)
    }

    /// Where drills are recorded.
    pub fn drills(&self) -> String {
        format!("{}/drills", self.prefix)
    }

    /// A drill's record.
    pub fn drill(&self, id: &str) -> String {
        format!("{}/drills/{id}", self.prefix)
    }

    /// Where the ledger of verifications lies.
    pub fn ledger(&self) -> String {
        format!("{}/ledger", self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wal_object_is_found_again_by_its_name() {
        let layout = Layout::new("main").unwrap().system(7_000_000_000_000_000_001.into());
        let names = [
            "000000010000000000000003",
            "000000010000000000000003.partial",
            "00000002.history",
            "000000010000000000000003.00000028.backup",
        ];
        for name in names {
            let file: WalFileName = name.parse().unwrap();
            let path = layout.wal_file(file);
            assert_eq!(layout.parse_wal(&path), Some(WalObject::File(file)), "{path}");
        }
        let longer = WalObject::Longer {
            of: "000000010000000000000003.partial".parse().unwrap(),
            valid_end: Lsn::from(0x300_0028),
        };
        assert_eq!(layout.parse_wal(&layout.wal_object(longer)), Some(longer));
        for bad in [
            "",
            "main/7/wal/00000002.history",
            "main/7000000000000000001/wal/00000002/000000010000000000000003",
        ] {
            assert_eq!(layout.parse_wal(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_merged_index_is_found_again_by_its_name() {
        let layout = Layout::new("main").unwrap().system(7.into());
        let name = MergedName {
            first: "000000010000000000000010".parse().unwrap(),
            step: 16,
            last: "00000001000000000000001F".parse().unwrap(),
            builder: 1,
            generation: 2,
            key: 0x00ab_cdef_0123_4567,
        };
        let path = layout.merged_index(&name);
        assert_eq!(
            path,
            "main/7/index/00000001/16/000000010000000000000010-00000001000000000000001F.00abcdef01234567.1.2"
        );
        assert_eq!(layout.parse_merged(&path), Some(name));
        for cut in 0..path.len() {
            assert_eq!(layout.parse_merged(&path[..cut]), None, "{cut}");
        }
        for (from, to) in
            [("/16/", "/016/"), ("/16/", "/x16/"), (".1.2", ".1.02"), ("00ab", "00AB"), ("main/7", "main/8")]
        {
            assert_eq!(layout.parse_merged(&path.replace(from, to)), None, "{from} as {to}");
        }
    }

    #[test]
    fn a_cluster_name_cannot_leave_its_place() {
        for bad in ["", ".", "..", ".x", "a/b", "a b", "waltide.json", &"x".repeat(64)] {
            assert_eq!(Layout::new(bad), None, "{bad}");
        }
        assert!(Layout::new("main-2.eu_west").is_some());
    }
}
