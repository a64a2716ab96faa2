//! What a stretch of a file became: extents, zeros among them.

use waltide_format::BLOCK_BYTES;
use waltide_format::archive::{Extent, FRAME_BYTES_MAX};

/// The extents of a stretch; zeros right behind zeros make one extent, as long as an extent may be.
#[derive(Default)]
pub(super) struct ExtentRun {
    extents: Vec<Extent>,
    zeros: Option<(u32, usize)>,
}

impl ExtentRun {
    pub(super) fn push(&mut self, extent: Extent) {
        self.end_zeros();
        self.extents.push(extent);
    }

    pub(super) fn zeros(&mut self, first_block: u32, raw: &[u8]) {
        match &mut self.zeros {
            Some((first, bytes))
                if bytes.saturating_add(raw.len()) <= FRAME_BYTES_MAX
                    && is_next(*first, *bytes, first_block) =>
            {
                *bytes = bytes.saturating_add(raw.len());
            }
            _ => {
                self.end_zeros();
                self.zeros = Some((first_block, raw.len()));
            }
        }
    }

    fn end_zeros(&mut self) {
        let Some((first_block, bytes)) = self.zeros.take() else { return };
        let mut crc = crc32fast::Hasher::new();
        let zeros = [0; BLOCK_BYTES];
        let mut left = bytes;
        while left > 0 {
            let some = zeros.get(..left.min(BLOCK_BYTES)).unwrap_or(&zeros);
            crc.update(some);
            left = left.saturating_sub(some.len());
        }
        let raw_bytes = u32::try_from(bytes).expect("at most FRAME_BYTES_MAX");
        self.extents.push(Extent {
            pack: 0,
            offset: 0,
            stored_bytes: 0,
            first_block,
            raw_bytes,
            crc: crc.finalize(),
        });
    }

    pub(super) fn finish(mut self) -> Vec<Extent> {
        self.end_zeros();
        self.extents
    }
}

/// Whether `bytes` from block `first` on end where block `next` starts.
fn is_next(first: u32, bytes: usize, next: u32) -> bool {
    let at = |block: u32| u64::from(block).saturating_mul(BLOCK_BYTES as u64);
    at(first).saturating_add(bytes as u64) == at(next)
}
