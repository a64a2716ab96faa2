//! Entries of B-tree indexes, and those among them that stand for many rows with one key ("posting lists").

use waltide_format::{BlockNumber, Corrupt, Reader};

use super::page::{aligned, tid};

/// `IndexTupleData`.
pub(super) const HEADER_BYTES: usize = 8;
const T_INFO: usize = 6;
const SIZE_MASK: u16 = 0x1FFF;
/// `INDEX_ALT_TID_MASK`: `t_tid` is no row's place.
const ALT_TID: u16 = 0x2000;
/// In the line pointer's half of such a `t_tid`.
const IS_POSTING: u16 = 0x2000;
const COUNT_MASK: u16 = 0x0FFF;

/// A row's place as it is written.
pub(super) type Tid = [u8; 6];

/// An index entry.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry<'a>(pub(super) &'a [u8]);

impl<'a> Entry<'a> {
    fn u16(self, at: usize) -> u16 {
        let bytes = self.0.get(at..at.saturating_add(2)).and_then(|b| b.try_into().ok());
        u16::from_le_bytes(bytes.unwrap_or_default())
    }

    /// The length that its header says.
    pub(super) fn length_of(header: &[u8]) -> usize {
        (Entry(header).u16(T_INFO) & SIZE_MASK).into()
    }

    fn check(self) -> Result<(), Corrupt> {
        let length = Self::length_of(self.0);
        if self.0.len() < HEADER_BYTES || length < HEADER_BYTES || length > self.0.len() {
            return Err(Corrupt::invalid("t_info", T_INFO as u64, length as u64));
        }
        Ok(())
    }

    fn is_posting(self) -> bool {
        self.u16(T_INFO) & ALT_TID != 0 && self.u16(4) & IS_POSTING != 0
    }

    /// The key and the header before it.
    fn key(self) -> Result<&'a [u8], Corrupt> {
        self.check()?;
        let end = if self.is_posting() {
            usize::from(self.u16(0)) << 16 | usize::from(self.u16(2))
        } else {
            Self::length_of(self.0)
        };
        let key = self.0.get(..end).filter(|key| key.len() >= HEADER_BYTES);
        key.ok_or(Corrupt::invalid("t_tid", 0, end as u64))
    }

    /// The rows it stands for, added to `rows`.
    pub(super) fn rows(self, rows: &mut Vec<Tid>) -> Result<(), Corrupt> {
        if self.is_posting() {
            rows.extend_from_slice(self.list()?);
        } else {
            self.check()?;
            rows.extend(self.0.first_chunk::<6>());
        }
        Ok(())
    }

    fn list(self) -> Result<&'a [Tid], Corrupt> {
        let broken = Corrupt::invalid("t_tid", 4, self.u16(4).into());
        if !self.is_posting() {
            return Err(broken);
        }
        let (list, _) =
            self.0.get(self.key()?.len()..Self::length_of(self.0)).ok_or(broken)?.as_chunks::<6>();
        list.get(..usize::from(self.u16(4) & COUNT_MASK)).ok_or(broken)
    }

    /// The block's half of `t_tid`, as it is written.
    pub(super) fn downlink(self) -> Result<[u8; 4], Corrupt> {
        self.0.first_chunk::<4>().copied().ok_or(Corrupt::invalid("t_tid", 0, self.0.len() as u64))
    }
}

/// An index entry with its padding.
pub(super) fn take_entry<'a>(data: &mut Reader<'a>) -> Result<&'a [u8], Corrupt> {
    data.take(aligned(length_ahead(data)?), "IndexTuple")
}

/// An index entry, as long as it says.
pub(super) fn take_entry_unpadded<'a>(data: &mut Reader<'a>) -> Result<&'a [u8], Corrupt> {
    data.take(length_ahead(data)?, "IndexTuple")
}

fn length_ahead(data: &Reader<'_>) -> Result<usize, Corrupt> {
    let length = Entry::length_of(data.clone().take(HEADER_BYTES, "IndexTuple")?);
    if length < HEADER_BYTES {
        return Err(Corrupt::invalid("t_info", data.position(), length as u64));
    }
    Ok(length)
}

/// An entry with the key of `base` for these rows.
pub(super) fn form(base: &[u8], rows: &[Tid]) -> Result<Vec<u8>, Corrupt> {
    let key = Entry(base).key()?;
    let mut entry = key.to_vec();
    if rows.len() > 1 {
        rows.iter().for_each(|row| entry.extend_from_slice(row));
        entry.resize(aligned(entry.len()), 0);
    }
    let too_long = Corrupt::too_large("t_info", T_INFO as u64, entry.len() as u64, SIZE_MASK.into());
    let length = u16::try_from(entry.len()).ok().filter(|length| *length <= SIZE_MASK).ok_or(too_long)?;
    let count = u16::try_from(rows.len()).ok().filter(|count| *count <= COUNT_MASK).ok_or(too_long)?;
    let flags = Entry(base).u16(T_INFO) & !(SIZE_MASK | ALT_TID);
    let (first, flags) = match rows {
        [only] => (*only, flags),
        _ => (tid(u32::try_from(key.len()).unwrap_or(0), count | IS_POSTING), flags | ALT_TID),
    };
    let header = [first.as_slice(), &(flags | length).to_le_bytes()].concat();
    entry.get_mut(..HEADER_BYTES).ok_or(too_long)?.copy_from_slice(&header);
    Ok(entry)
}

/// The same entry without some of its rows, named by their place in its list.
pub(super) fn without(entry: &[u8], gone: &[u16]) -> Result<Vec<u8>, Corrupt> {
    let rows = Entry(entry).list()?;
    let kept: Vec<Tid> =
        (0u16..).zip(rows).filter(|(place, _)| !gone.contains(place)).map(|(_, row)| *row).collect();
    if kept.is_empty() || kept.len().saturating_add(gone.len()) != rows.len() {
        return Err(Corrupt::invalid("ndeletedtids", 0, gone.len() as u64));
    }
    form(entry, &kept)
}

/// Puts the row of `new` into the list of `old` at `place`; the list's last row becomes that of `new`.
pub(super) fn swap(new: &mut [u8], old: &[u8], place: u16) -> Result<Vec<u8>, Corrupt> {
    let mut rows = Entry(old).list()?.to_vec();
    let place = usize::from(place);
    let broken = Corrupt::invalid("postingoff", 0, place as u64);
    let first = new.first_chunk_mut::<6>().ok_or(broken)?;
    if place == 0 || place >= rows.len() {
        return Err(broken);
    }
    rows.insert(place, *first);
    *first = rows.pop().ok_or(broken)?;
    let mut swapped = old.get(..Entry::length_of(old)).ok_or(broken)?.to_vec();
    let at = Entry(old).key()?.len();
    let list = swapped.get_mut(at..).ok_or(broken)?;
    for (place, row) in list.as_chunks_mut::<6>().0.iter_mut().zip(&rows) {
        *place = *row;
    }
    Ok(swapped)
}

/// The only entry of a half-dead leaf.
pub(super) fn top_parent(block: BlockNumber) -> [u8; HEADER_BYTES] {
    let mut entry = [0; HEADER_BYTES];
    let [a, b, c, d, ..] = tid(block, 0);
    let [e, f] = (ALT_TID | 8).to_le_bytes();
    entry.copy_from_slice(&[a, b, c, d, 0, 0, e, f]);
    entry
}
