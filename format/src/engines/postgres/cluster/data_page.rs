//! Data pages: whether a page of a relation is one, and whether its checksum is right.
//!
//! The checksum is PostgreSQL's published one: 32 FNV-1a hashes side by side over the page's 32-bit words,
//! folded with the block's number into 16 bits that are never zero.

use crate::ids::{BLOCK_BYTES, BlockNumber, Lsn};
use crate::zeros::is_zero;

/// `SizeOfPageHeaderData`.
pub const HEADER_BYTES: usize = 24;

/// How many hashes run side by side.
const LANES: usize = 32;
/// The bytes that all lanes take at once.
const ROW_BYTES: usize = LANES * 4;
const FNV_PRIME: u32 = 16_777_619;
/// What each hash starts from; the values are part of the format.
const OFFSET_BASIS: [u32; LANES] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

const CHECKSUM_OFFSET: usize = 8;
const FLAGS_OFFSET: usize = 10;
const LOWER_OFFSET: usize = 12;
const UPPER_OFFSET: usize = 14;
const SPECIAL_OFFSET: usize = 16;
/// `PD_VALID_FLAG_BITS`.
const FLAGS_KNOWN: u16 = 0x0007;

/// A page of a relation.
pub type Page = [u8; BLOCK_BYTES];

/// What a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageState {
    /// All zeros: made, never written.
    New,
    /// Its header makes sense and its checksum, where it has one, is right.
    Valid,
    /// Its header makes no sense.
    BadHeader,
    /// It does not have the checksum it says.
    BadChecksum {
        /// `pd_checksum`.
        found: u16,
        /// What it should be.
        expected: u16,
    },
}

/// Judges the page of block `block`, its number in the fork. `checksums` says whether the cluster has them.
pub fn verify_page(page: &Page, block: BlockNumber, checksums: bool) -> PageState {
    if is_new(page) {
        return if is_zero(page) { PageState::New } else { PageState::BadHeader };
    }
    if checksums {
        let (found, expected) = (stored_checksum(page), checksum(page, block));
        if found != expected {
            return PageState::BadChecksum { found, expected };
        }
    }
    let (lower, upper, special) =
        (u16_at(page, LOWER_OFFSET), u16_at(page, UPPER_OFFSET), u16_at(page, SPECIAL_OFFSET));
    let sane = u16_at(page, FLAGS_OFFSET) & !FLAGS_KNOWN == 0
        && lower <= upper
        && upper <= special
        && usize::from(special) <= BLOCK_BYTES
        && special & 7 == 0;
    if sane { PageState::Valid } else { PageState::BadHeader }
}

/// Whether a page of a cluster with checksums is new or right.
pub fn is_intact(page: &Page, block: BlockNumber) -> bool {
    matches!(verify_page(page, block, true), PageState::New | PageState::Valid)
}

/// `pd_lsn`: the end of the last record that changed the page.
pub fn lsn(page: &Page) -> Lsn {
    // Two halves, the upper one first.
    let half = |at: usize| u64::from(u32_at(page, at));
    Lsn::from(half(0) << 32 | half(4))
}

/// `pd_checksum`, as it stands.
pub fn stored_checksum(page: &Page) -> u16 {
    u16_at(page, CHECKSUM_OFFSET)
}

/// Whether the page was added to its relation and not used yet: `pd_upper` is zero.
pub fn is_new(page: &Page) -> bool {
    u16_at(page, UPPER_OFFSET) == 0
}

/// Writes the checksum that the page should carry as block `block` of its fork.
pub fn set_checksum(page: &mut Page, block: BlockNumber) {
    let sum = checksum(page, block).to_le_bytes();
    if let Some(field) = page.get_mut(CHECKSUM_OFFSET..FLAGS_OFFSET) {
        field.copy_from_slice(&sum);
    }
}

/// The checksum that belongs on the page; its own field does not count.
pub fn checksum(page: &Page, block: BlockNumber) -> u16 {
    let mut lanes = OFFSET_BASIS;
    let (rows, _) = page.as_chunks::<ROW_BYTES>();
    let mut rows = rows.iter();
    if let Some(first) = rows.next() {
        let mut first = *first;
        if let Some(field) = first.get_mut(CHECKSUM_OFFSET..FLAGS_OFFSET) {
            field.fill(0);
        }
        mix(&mut lanes, &first);
    }
    for row in rows {
        mix(&mut lanes, row);
    }
    mix(&mut lanes, &[0; ROW_BYTES]);
    mix(&mut lanes, &[0; ROW_BYTES]);
    let folded = lanes.iter().fold(0, |sum, lane| sum ^ lane) ^ block;
    let sum = (folded % 65_535).wrapping_add(1);
    u16::try_from(sum).expect("a remainder below 65535, plus one, fits 16 bits")
}

/// Takes one word into each hash. Plain loops over arrays, so that the compiler makes vectors of them.
fn mix(lanes: &mut [u32; LANES], row: &[u8; ROW_BYTES]) {
    let (words, _) = row.as_chunks::<4>();
    for (lane, word) in lanes.iter_mut().zip(words) {
        let mixed = *lane ^ u32::from_le_bytes(*word);
        *lane = mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17);
    }
}

fn u16_at(page: &Page, at: usize) -> u16 {
    page.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_le_bytes(*b))
}

fn u32_at(page: &Page, at: usize) -> u32 {
    page.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> Page {
        let mut page = [0; BLOCK_BYTES];
        for (i, b) in page.iter_mut().enumerate() {
            *b = (i * 7 / 3) as u8;
        }
        page[..24].copy_from_slice(&[
            0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 24, 0, 0, 0x20, 0, 0x20, 4, 0x20, 0, 0, 0, 0,
        ]);
        set_checksum(&mut page, 9);
        page
    }

    #[test]
    fn any_changed_byte_of_a_page_and_another_block_number_are_noticed() {
        let page = page();
        assert_eq!(verify_page(&page, 9, true), PageState::Valid);
        assert!(is_intact(&page, 9) && !is_intact(&page, 10));
        assert_eq!(lsn(&page), Lsn::from(0x0100_0000_0000_0002));
        for at in 0..BLOCK_BYTES {
            let mut changed = page;
            changed[at] ^= 0x20;
            assert!(!is_intact(&changed, 9), "byte {at}");
        }
    }

    #[test]
    fn a_page_without_checksums_is_judged_by_its_header() {
        let mut page = page();
        page[5000] ^= 1;
        assert!(matches!(verify_page(&page, 9, true), PageState::BadChecksum { .. }));
        assert_eq!(verify_page(&page, 9, false), PageState::Valid);
        page[11] = 1;
        assert_eq!(verify_page(&page, 9, false), PageState::BadHeader);
        assert_eq!(verify_page(&[0; BLOCK_BYTES], 9, true), PageState::New);
        let mut half_new = [0; BLOCK_BYTES];
        half_new[8191] = 1;
        assert_eq!(verify_page(&half_new, 9, false), PageState::BadHeader);
    }
}
