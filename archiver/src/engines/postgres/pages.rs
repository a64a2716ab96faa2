//! Whether a page read from under a running server is damaged, or only being written.

use std::time::Duration;

use waltide_format::engines::postgres::cluster::data_page;
use waltide_format::{BLOCK_BYTES, BlockNumber, Lsn};

/// How often a page without its checksum is read again before it counts as damaged. A server that is writing it has
/// long finished by then.
const READS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(10);

/// How pages are judged.
#[derive(Debug, Clone, Copy)]
pub(super) struct PageRule {
    /// Where the backup started: the log holds every page changed since as a whole.
    pub(super) start_lsn: Lsn,
    /// `relseg_size`.
    pub(super) segment_blocks: u32,
}

/// What a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It has its checksum, or is new, or is gone.
    Good,
    /// It has not, but its LSN says that it was written since the backup started.
    BeingWritten(Lsn),
    /// It has not, and nothing excuses that.
    Damaged(Lsn),
}

impl PageRule {
    /// A block's number in its fork, out of its number in a file of the fork.
    pub(super) fn block_of_fork(&self, segment: u32, block: u32) -> BlockNumber {
        segment.wrapping_mul(self.segment_blocks).wrapping_add(block)
    }

    /// Judges a page; `read_again` puts what is on disk now into it, or says that it is gone.
    pub(super) fn judge(
        &self,
        page: &mut [u8; BLOCK_BYTES],
        block: BlockNumber,
        mut read_again: impl FnMut(&mut [u8; BLOCK_BYTES]) -> bool,
    ) -> Verdict {
        if self.judge_once(page, block) == Verdict::Good {
            return Verdict::Good;
        }
        for read in 0..READS {
            let mut again = [0; BLOCK_BYTES];
            if !read_again(&mut again) {
                // Truncated or dropped meanwhile: the log says so too.
                return Verdict::Good;
            }
            *page = again;
            match self.judge_once(page, block) {
                Verdict::Damaged(_) if read > 0 => std::thread::sleep(PAUSE),
                Verdict::Damaged(_) => {}
                verdict => return verdict,
            }
        }
        Verdict::Damaged(data_page::lsn(page))
    }

    /// Judges a page as it is, which nobody is writing any more.
    pub(super) fn judge_once(&self, page: &[u8; BLOCK_BYTES], block: BlockNumber) -> Verdict {
        match data_page::lsn(page) {
            _ if data_page::is_intact(page, block) => Verdict::Good,
            lsn if lsn >= self.start_lsn => Verdict::BeingWritten(lsn),
            lsn => Verdict::Damaged(lsn),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: PageRule = PageRule { start_lsn: Lsn::ZERO, segment_blocks: 131_072 };

    fn page(lsn: u64, fill: u8) -> [u8; BLOCK_BYTES] {
        let mut page = [fill; BLOCK_BYTES];
        page[..8].copy_from_slice(&[0; 8]);
        page[4..8].copy_from_slice(&(lsn as u32).to_le_bytes());
        page[8..24].copy_from_slice(&[0, 0, 0, 0, 24, 0, 0, 0x20, 0, 0x20, 4, 0x20, 0, 0, 0, 0]);
        let sum = data_page::checksum(&page, 7);
        page[8..10].copy_from_slice(&sum.to_le_bytes());
        page
    }

    #[test]
    fn a_torn_page_is_read_again() {
        let rule = PageRule { start_lsn: Lsn::from(1000), ..RULE };
        let (old, new) = (page(10, 1), page(20, 2));
        let mut torn = old;
        torn[4096..].copy_from_slice(&new[4096..]);
        let mut reads = 0;
        let verdict = rule.judge(&mut torn, 7, |page| {
            reads += 1;
            *page = if reads == 1 { torn_again(&old, &new) } else { new };
            true
        });
        assert_eq!((verdict, reads, torn), (Verdict::Good, 2, new));
    }

    fn torn_again(old: &[u8; BLOCK_BYTES], new: &[u8; BLOCK_BYTES]) -> [u8; BLOCK_BYTES] {
        let mut torn = *old;
        torn[512..].copy_from_slice(&new[512..]);
        torn
    }

    #[test]
    fn only_a_page_written_since_the_start_is_excused() {
        let rule = PageRule { start_lsn: Lsn::from(1000), ..RULE };
        for (lsn, expected) in [
            (999, Verdict::Damaged(Lsn::from(999))),
            (1000, Verdict::BeingWritten(Lsn::from(1000))),
            (1001, Verdict::BeingWritten(Lsn::from(1001))),
        ] {
            let mut bad = page(lsn, 1);
            bad[5000] ^= 1;
            let disk = bad;
            let verdict = rule.judge(&mut bad, 7, |page| {
                *page = disk;
                true
            });
            assert_eq!(verdict, expected);
        }
        let mut good = page(5, 1);
        assert_eq!(rule.judge(&mut good, 7, |_| unreachable!()), Verdict::Good);
        assert_ne!(
            rule.judge(&mut good, 8, |page| {
                *page = good_page();
                true
            }),
            Verdict::Good
        );
        assert_eq!(rule.judge(&mut [0; BLOCK_BYTES], 7, |_| unreachable!()), Verdict::Good);
        let mut bad = page(5, 1);
        bad[100] ^= 1;
        assert_eq!(rule.judge(&mut bad, 7, |_| false), Verdict::Good);
    }

    fn good_page() -> [u8; BLOCK_BYTES] {
        page(5, 1)
    }

    #[test]
    fn a_later_file_of_a_fork_counts_on() {
        assert_eq!(RULE.block_of_fork(0, 7), 7);
        assert_eq!(RULE.block_of_fork(2, 7), 262_151);
    }
}
