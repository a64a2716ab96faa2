//! A page of a relation: its LSN and its checksum. Layout: docs/wal.md, "Data page".

use crate::ids::{BLOCK_BYTES, BlockNumber, Lsn};

/// One page.
pub type Page = [u8; BLOCK_BYTES];

/// Where `pd_checksum` lies.
const CHECKSUM_AT: usize = 8;
/// Where `pd_upper` lies.
const UPPER_AT: usize = 14;
/// The page is summed in this many columns of 32-bit words.
const COLUMNS: usize = 32;
const FNV_PRIME: u32 = 16_777_619;
/// What each column starts from, fixed by PostgreSQL.
const SEEDS: [u32; COLUMNS] = [
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

fn u16_at(page: &Page, at: usize) -> u16 {
    page.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u16::from_le_bytes(*bytes))
}

/// `pd_lsn`: the end of the last record that changed the page.
pub fn lsn(page: &Page) -> Lsn {
    // Two halves, the high one first, each in the machine's order.
    let half = |at: usize| {
        page.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes))
    };
    Lsn::from(u64::from(half(0)) << 32 | u64::from(half(4)))
}

/// `pd_checksum`.
pub fn stored_checksum(page: &Page) -> u16 {
    u16_at(page, CHECKSUM_AT)
}

/// The checksum that the page should carry as block `block` of its fork.
pub fn checksum(page: &Page, block: BlockNumber) -> u16 {
    let step = |sum: u32, word: u32| {
        let mixed = sum ^ word;
        mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17)
    };
    let mut sums = SEEDS;
    let (rows, _) = page.as_chunks::<{ COLUMNS * 4 }>();
    for (number, row) in rows.iter().enumerate() {
        let (words, _) = row.as_chunks::<4>();
        for (column, (sum, word)) in sums.iter_mut().zip(words).enumerate() {
            let mut word = u32::from_le_bytes(*word);
            if number == 0 && column == CHECKSUM_AT / 4 {
                // The checksum does not cover itself.
                word &= 0xFFFF_0000;
            }
            *sum = step(*sum, word);
        }
    }
    for _ in 0..2 {
        for sum in &mut sums {
            *sum = step(*sum, 0);
        }
    }
    let folded = sums.iter().fold(0, |all, sum| all ^ sum) ^ block;
    // Never zero: that is what pages without a checksum have.
    u16::try_from(folded % 65_535).unwrap_or(0).saturating_add(1)
}

/// Whether the page was added to its relation and not used yet: `pd_upper` is zero.
pub fn is_new(page: &Page) -> bool {
    u16_at(page, UPPER_AT) == 0
}

/// Whether the server would take the page where checksums are on: its checksum is right, or it is all zeros.
pub fn is_intact(page: &Page, block: BlockNumber) -> bool {
    match is_new(page) {
        true => page.iter().all(|b| *b == 0),
        false => stored_checksum(page) == checksum(page, block),
    }
}

/// Writes the checksum that the page should carry as block `block` of its fork.
pub fn set_checksum(page: &mut Page, block: BlockNumber) {
    let sum = checksum(page, block).to_le_bytes();
    if let Some(place) = page.get_mut(CHECKSUM_AT..).and_then(|rest| rest.first_chunk_mut()) {
        *place = sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> Page {
        let mut page = [0x5A; BLOCK_BYTES];
        page[..24].copy_from_slice(&[
            1, 0, 0, 0, 0x28, 0, 0, 2, 0, 0, 0, 0, 24, 0, 0, 0x20, 0, 0x20, 4, 0x20, 0, 0, 0, 0,
        ]);
        page
    }

    #[test]
    fn every_changed_byte_and_another_place_are_noticed() {
        let mut page = page();
        set_checksum(&mut page, 7);
        assert!(is_intact(&page, 7));
        assert!(!is_intact(&page, 8));
        assert_eq!(lsn(&page), "1/2000028".parse().unwrap());
        for at in 0..BLOCK_BYTES {
            let mut changed = page;
            changed[at] ^= 1;
            assert!(!is_intact(&changed, 7), "byte {at}");
        }
    }

    #[test]
    fn a_new_page_is_all_zeros() {
        let mut page = [0; BLOCK_BYTES];
        assert!(is_new(&page) && is_intact(&page, 7));
        page[5000] = 1;
        assert!(is_new(&page) && !is_intact(&page, 7));
    }
}
