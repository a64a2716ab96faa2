//! How far replication origins have come, where it is told without a commit.

use crate::engines::postgres::wal::Record;
use crate::engines::postgres::wal::rmgr::Rmgr;
use crate::error::Corrupt;
use crate::ids::Lsn;
use crate::reader::Reader;

/// A record of the resource manager ReplicationOrigin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OriginRecord {
    /// An origin's progress was set.
    Set {
        /// `node_id`; never zero.
        origin: u16,
        /// `remote_lsn`.
        remote: Lsn,
        /// `force`: even where it is less than before.
        backward: bool,
    },
    /// An origin was dropped.
    Drop {
        /// `node_id`; never zero.
        origin: u16,
    },
}

impl OriginRecord {
    /// Decodes it; `None` for any other record. Errors count bytes from the start of the main data.
    pub fn decode(record: &Record<'_>) -> Option<Result<Self, Corrupt>> {
        (record.rmgr() == Rmgr::REPLORIGIN).then(|| Self::decode_kind(record.kind(), record.main_data()))
    }

    fn decode_kind(kind: u8, main: &[u8]) -> Result<Self, Corrupt> {
        let mut r = Reader::new(main);
        let decoded = match kind {
            0x00 => {
                let remote = r.u64("remote_lsn")?.into();
                let origin = read_origin(&mut r)?;
                let backward = r.u8("force")? != 0;
                r.take(5, "padding")?;
                Self::Set { origin, remote, backward }
            }
            0x10 => Self::Drop { origin: read_origin(&mut r)? },
            other => return Err(Corrupt::invalid("xl_info", 0, other.into())),
        };
        r.finish("node_id")?;
        Ok(decoded)
    }
}

fn read_origin(r: &mut Reader<'_>) -> Result<u16, Corrupt> {
    let at = r.position();
    match r.u16("node_id")? {
        0 => Err(Corrupt::invalid("node_id", at, 0)),
        origin => Ok(origin),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_and_drops_are_read_and_refused_at_every_truncation() {
        let mut set = 0x1234u64.to_le_bytes().to_vec();
        set.extend([9, 0, 1, 0, 0, 0, 0, 0]);
        let expected = OriginRecord::Set { origin: 9, remote: Lsn::from(0x1234), backward: true };
        for (kind, main, expected) in
            [(0x00, set, expected), (0x10, vec![9, 0], OriginRecord::Drop { origin: 9 })]
        {
            assert_eq!(OriginRecord::decode_kind(kind, &main), Ok(expected));
            for cut in 0..main.len() {
                assert!(OriginRecord::decode_kind(kind, &main[..cut]).is_err());
            }
        }
        assert!(OriginRecord::decode_kind(0x20, &[9, 0]).is_err());
        assert_eq!(
            OriginRecord::decode_kind(0x10, &[0, 0]).unwrap_err().to_string(),
            "node_id at byte 0 is 0x0"
        );
    }
}
