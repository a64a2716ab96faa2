//! Multixacts made and forgotten. Their pages are begun by [`SlruRecord`](super::SlruRecord)s.

use crate::engines::postgres::wal::Record;
use crate::engines::postgres::wal::rmgr::Rmgr;
use crate::engines::postgres::wal::xlog::read_i32;
use crate::error::Corrupt;
use crate::ids::{Oid, Xid};
use crate::reader::Reader;

const CREATE_ID: u8 = 0x20;
const TRUNCATE_ID: u8 = 0x30;
const MEMBER_BYTES: usize = 8;
/// `MaxMultiXactStatus`.
const STATUS_MAX: u32 = 5;

/// A record that makes a multixact or forgets some.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MultiXactRecord {
    /// A multixact was made.
    Create {
        /// `mid`; never zero.
        multi: u32,
        /// `moff`: its first member's number.
        offset: u32,
        /// The members: transaction and `MultiXactStatus`.
        members: Vec<(Xid, u8)>,
    },
    /// Old ones are needed no more.
    Truncate {
        /// `oldestMultiDB`.
        oldest_multi_db: Oid,
        /// `startTruncOff`, `endTruncOff`: multixacts that go, the end not included.
        offsets: (u32, u32),
        /// `startTruncMemb`, `endTruncMemb`: members that go, the end not included.
        members: (u32, u32),
    },
}

impl MultiXactRecord {
    /// Decodes it; `None` for any other record. Errors count bytes from the start of the main data.
    pub fn decode(record: &Record<'_>) -> Option<Result<Self, Corrupt>> {
        if record.rmgr() != Rmgr::MULTIXACT {
            return None;
        }
        match record.kind() {
            CREATE_ID => Some(Self::decode_create(record.main_data())),
            TRUNCATE_ID => Some(Self::decode_truncate(record.main_data())),
            _ => None,
        }
    }

    fn decode_create(main: &[u8]) -> Result<Self, Corrupt> {
        let mut r = Reader::new(main);
        let multi = r.parse_u32("mid", |v| (v != 0).then_some(v))?;
        let offset = r.u32("moff")?;
        let at = r.position();
        let count = read_i32(&mut r, "nmembers")?;
        let max = r.left().checked_div(MEMBER_BYTES).unwrap_or(0);
        let found = u64::from(count.cast_unsigned());
        let count = usize::try_from(count).ok().filter(|count| *count <= max);
        let count = count.ok_or(Corrupt::too_large("nmembers", at, found, max as u64))?;
        let mut members = Vec::with_capacity(count);
        for _ in 0..count {
            let xid = r.u32("xid")?.into();
            let status = r.parse_u32("status", |v| u8::try_from(v).ok().filter(|_| v <= STATUS_MAX))?;
            members.push((xid, status));
        }
        r.finish("members")?;
        Ok(Self::Create { multi, offset, members })
    }

    fn decode_truncate(main: &[u8]) -> Result<Self, Corrupt> {
        let mut r = Reader::new(main);
        let oldest_multi_db = r.u32("oldestMultiDB")?;
        let offsets = (r.u32("startTruncOff")?, r.parse_u32("endTruncOff", |v| (v != 0).then_some(v))?);
        let members = (r.u32("startTruncMemb")?, r.u32("endTruncMemb")?);
        r.finish("endTruncMemb")?;
        Ok(Self::Truncate { oldest_multi_db, offsets, members })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engines::postgres::wal::testing::with_record;
    use crate::ids::PgMajor;

    fn decode(info: u8, fields: &[u32], cut: usize) -> Option<Result<MultiXactRecord, Corrupt>> {
        let main: Vec<u8> = fields.iter().flat_map(|v| v.to_le_bytes()).collect();
        with_record(PgMajor::V15, 6, info, &main[..main.len() - cut], MultiXactRecord::decode)
    }

    #[test]
    fn what_is_made_and_forgotten_is_read_and_refused_at_every_truncation() {
        let made = MultiXactRecord::Create {
            multi: 7,
            offset: 21,
            members: vec![(Xid::from(740), 0), (Xid::from(741), 5)],
        };
        let forgotten = MultiXactRecord::Truncate { oldest_multi_db: 5, offsets: (1, 9), members: (1, 30) };
        for (info, fields, expected) in
            [(0x20, vec![7, 21, 2, 740, 0, 741, 5], made), (0x30, vec![5, 1, 9, 1, 30], forgotten)]
        {
            assert_eq!(decode(info, &fields, 0), Some(Ok(expected)));
            for cut in 1..=fields.len() * 4 {
                assert!(decode(info, &fields, cut).unwrap().is_err());
            }
        }
        assert_eq!(decode(0x00, &[1], 0), None);
    }

    #[test]
    fn no_multixact_a_status_that_is_none_and_a_count_too_large_are_refused() {
        let message = |fields: &[u32]| decode(0x20, fields, 0).unwrap().unwrap_err().to_string();
        assert_eq!(message(&[0, 1, 0]), "mid at byte 0 is 0x0");
        assert_eq!(message(&[1, 1, 1, 740, 6]), "status at byte 16 is 0x6");
        assert_eq!(message(&[1, 1, 2, 740, 5]), "nmembers at byte 8 is 2, more than the 1 allowed");
        assert_eq!(
            message(&[1, 1, u32::MAX, 740, 5]),
            "nmembers at byte 8 is 4294967295, more than the 1 allowed"
        );
    }
}
