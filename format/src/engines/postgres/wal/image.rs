//! Full-page images: how a record stores a page, and how the page is made of it again.

use crate::engines::postgres::wal::pglz;
use crate::error::{Corrupt, Problem};
use crate::ids::{BLOCK_BYTES, PgMajor};
use crate::reader::{Reader, Writer};

/// How an image is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not.
    None,
    /// PostgreSQL's own.
    Pglz,
    /// LZ4 block, from 15.
    Lz4,
    /// Zstandard frame, from 15.
    Zstd,
}

/// The header of an image, as decoded from the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ImageHeader {
    pub(super) bytes: u16,
    pub(super) hole_offset: u16,
    pub(super) hole_bytes: u16,
    pub(super) compression: Compression,
    pub(super) apply: bool,
    pub(super) info: u8,
}

/// `bimg_info`, whose bits were dealt out anew in 15.
fn decode_info(info: u8, major: PgMajor) -> Option<(bool, bool, Compression)> {
    const HAS_HOLE: u8 = 0x01;
    if major < PgMajor::V15 {
        const IS_COMPRESSED: u8 = 0x02;
        const APPLY: u8 = 0x04;
        if info & !(HAS_HOLE | IS_COMPRESSED | APPLY) != 0 {
            return None;
        }
        let compression = if info & IS_COMPRESSED != 0 { Compression::Pglz } else { Compression::None };
        return Some((info & HAS_HOLE != 0, info & APPLY != 0, compression));
    }
    const APPLY: u8 = 0x02;
    let compression = match info & !(HAS_HOLE | APPLY) {
        0 => Compression::None,
        0x04 => Compression::Pglz,
        0x08 => Compression::Lz4,
        0x10 => Compression::Zstd,
        _ => return None,
    };
    Some((info & HAS_HOLE != 0, info & APPLY != 0, compression))
}

impl ImageHeader {
    /// Decodes and checks an image's header; no other combination of lengths is ever written.
    pub(super) fn decode(r: &mut Reader<'_>, major: PgMajor) -> Result<Self, Corrupt> {
        #[allow(clippy::cast_possible_truncation)] // 8192
        const PAGE: u16 = BLOCK_BYTES as u16;
        let bytes_at = r.position();
        let bytes = r.u16("bimg_len")?;
        let hole_at = r.position();
        let hole_offset = r.u16("hole_offset")?;
        let info_at = r.position();
        let info = r.u8("bimg_info")?;
        let (has_hole, apply, compression) =
            decode_info(info, major).ok_or(Corrupt::invalid("bimg_info", info_at, u64::from(info)))?;
        let compressed = compression != Compression::None;
        // A compressed image may come out longer than the page without its hole would be, never than the page.
        if bytes > PAGE || (bytes == PAGE && (compressed || has_hole)) || bytes == 0 {
            return Err(Corrupt::invalid("bimg_len", bytes_at, u64::from(bytes)));
        }
        let hole_bytes = match (has_hole, compressed) {
            (true, true) => {
                let at = r.position();
                let found = r.u16("hole_length")?;
                if found == 0 || found > PAGE {
                    return Err(Corrupt::invalid("hole_length", at, u64::from(found)));
                }
                found
            }
            (false, true) => 0,
            (_, false) => PAGE.saturating_sub(bytes),
        };
        if has_hole != (hole_bytes > 0) {
            return Err(Corrupt::invalid("bimg_len", bytes_at, u64::from(bytes)));
        }
        let hole_fits = hole_offset.checked_add(hole_bytes).is_some_and(|end| end <= PAGE);
        if has_hole != (hole_offset > 0) || !hole_fits {
            return Err(Corrupt::invalid("hole_offset", hole_at, u64::from(hole_offset)));
        }
        Ok(Self { bytes, hole_offset, hole_bytes, compression, apply, info })
    }

    /// Writes it as it was read.
    pub(super) fn encode(&self, w: &mut Writer) {
        w.u16(self.bytes).u16(self.hole_offset).u8(self.info);
        if self.compression != Compression::None && self.hole_bytes > 0 {
            w.u16(self.hole_bytes);
        }
    }
}

/// A full-page image in a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Image<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) header: ImageHeader,
}

impl<'a> Image<'a> {
    /// The stored bytes.
    pub const fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Where the page's hole starts; zero where it has none.
    pub const fn hole_offset(&self) -> u16 {
        self.header.hole_offset
    }

    /// How long the hole is, which is left out and comes back as zeros.
    pub const fn hole_bytes(&self) -> u16 {
        self.header.hole_bytes
    }

    /// How the bytes are compressed.
    pub const fn compression(&self) -> Compression {
        self.header.compression
    }

    /// Whether replay restores the page from it. Without this, the image only serves
    /// `wal_consistency_checking` and replaces nothing.
    pub const fn apply(&self) -> bool {
        self.header.apply
    }

    /// `bimg_info` as written.
    pub const fn info(&self) -> u8 {
        self.header.info
    }

    /// Makes the page again. On an error `out` holds nothing of use.
    pub fn restore(&self, out: &mut [u8; BLOCK_BYTES]) -> Result<(), Corrupt> {
        let broken = Corrupt { field: "block image", at: 0, problem: Problem::Compression };
        let (hole_from, hole_bytes) =
            (usize::from(self.header.hole_offset), usize::from(self.header.hole_bytes));
        let raw_bytes = BLOCK_BYTES.saturating_sub(hole_bytes);
        // The page without its hole is made at the front, then its second part moves behind the hole.
        let raw = out.get_mut(..raw_bytes).ok_or(broken)?;
        match self.header.compression {
            Compression::None => {
                let stored =
                    self.bytes.get(..raw_bytes).filter(|_| self.bytes.len() == raw_bytes).ok_or(broken)?;
                raw.copy_from_slice(stored);
            }
            Compression::Pglz => pglz::decompress(self.bytes, raw).ok_or(broken)?,
            Compression::Lz4 => {
                let made = lz4_flex::block::decompress_into(self.bytes, raw).map_err(|_| broken)?;
                if made != raw_bytes {
                    return Err(broken);
                }
            }
            Compression::Zstd => {
                let made = zstd::bulk::decompress_to_buffer(self.bytes, raw).map_err(|_| broken)?;
                if made != raw_bytes {
                    return Err(broken);
                }
            }
        }
        if hole_bytes > 0 {
            let hole_to = hole_from.saturating_add(hole_bytes);
            if hole_to > BLOCK_BYTES {
                return Err(broken);
            }
            out.copy_within(hole_from..raw_bytes, hole_to);
            out.get_mut(hole_from..hole_to).ok_or(broken)?.fill(0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> [u8; BLOCK_BYTES] {
        let mut page = [0; BLOCK_BYTES];
        for (i, b) in page.iter_mut().enumerate() {
            *b = if (100..7000).contains(&i) { 0 } else { (i / 7) as u8 };
        }
        page
    }

    fn without_hole(page: &[u8; BLOCK_BYTES], from: usize, to: usize) -> Vec<u8> {
        [&page[..from], &page[to..]].concat()
    }

    fn header(bytes: &[u8], major: PgMajor) -> Result<ImageHeader, Corrupt> {
        ImageHeader::decode(&mut Reader::new(bytes), major)
    }

    #[test]
    fn every_compression_gives_the_page_back_and_nothing_shorter_does() {
        let page = page();
        for (from, to) in [(0usize, 0usize), (100, 7000)] {
            let raw = without_hole(&page, from, to);
            let stored = [
                (Compression::None, raw.clone()),
                (Compression::Pglz, pglz::compress(&raw)),
                (Compression::Lz4, lz4_flex::block::compress(&raw)),
                (Compression::Zstd, zstd::bulk::compress(&raw, 1).unwrap()),
            ];
            for (compression, bytes) in stored {
                let header = ImageHeader {
                    bytes: bytes.len() as u16,
                    hole_offset: from as u16,
                    hole_bytes: (to - from) as u16,
                    compression,
                    apply: true,
                    info: 0,
                };
                let mut out = [0xAA; BLOCK_BYTES];
                Image { bytes: &bytes, header }.restore(&mut out).unwrap();
                assert_eq!(out, page, "{compression:?}");
                for cut in (0..bytes.len()).step_by(17) {
                    assert!(
                        Image { bytes: &bytes[..cut], header }.restore(&mut out).is_err(),
                        "{compression:?} {cut}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_flag_bits_mean_other_things_before_15() {
        // Length 100, hole offset 64, info, hole length 300.
        let with_info = |info: u8| [100, 0, 64, 0, info, 44, 1];
        let old = header(&with_info(0x01 | 0x02 | 0x04), PgMajor::V14).unwrap();
        assert_eq!((old.compression, old.apply, old.hole_bytes), (Compression::Pglz, true, 300));
        let new = header(&with_info(0x01 | 0x02 | 0x08), PgMajor::V15).unwrap();
        assert_eq!((new.compression, new.apply, new.hole_bytes), (Compression::Lz4, true, 300));
        let uncompressed = header(&with_info(0x01 | 0x02), PgMajor::V15).unwrap();
        assert_eq!(
            (uncompressed.compression, uncompressed.apply, uncompressed.hole_bytes),
            (Compression::None, true, 8092)
        );
        assert!(header(&with_info(0x08), PgMajor::V14).is_err());
        assert!(header(&with_info(0x04 | 0x08), PgMajor::V15).is_err());
    }

    #[test]
    fn lengths_that_contradict_each_other_are_refused() {
        let cases: [(&str, u16, u16, u8, u16); 8] = [
            ("a hole in a whole page", 8192, 64, 0x03, 0),
            ("no hole in a short page", 8000, 0, 0x02, 0),
            ("a hole without an offset", 8000, 0, 0x03, 0),
            ("an offset without a hole", 8192, 64, 0x02, 0),
            ("a hole past the end", 8000, 8100, 0x03, 0),
            ("a compressed whole page", 8192, 0, 0x06, 0),
            ("a compressed hole of nothing", 100, 64, 0x07, 0),
            ("a compressed hole past the end", 100, 8000, 0x07, 400),
        ];
        for (what, len, offset, info, hole) in cases {
            let bytes =
                [&len.to_le_bytes()[..], &offset.to_le_bytes(), &[info], &hole.to_le_bytes()].concat();
            assert!(header(&bytes, PgMajor::V16).is_err(), "{what}");
        }
    }
}
