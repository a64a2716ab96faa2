//! Where a backup's file pieces lie: packs of frames, and the maps from blocks to frames.
//!
//! A frame is a run of consecutive 8 KiB blocks of one file, compressed alone. A map lists, file by file, the
//! frames one backup wrote; a manifest names the maps it lays over one another, the newest last.

use super::envelope::{Footer, HEADER_BYTES, Header, ObjectKind, decompress};
use super::{Envelope, FOOTER_BYTES};
use crate::error::{Corrupt, Problem};
use crate::ids::BLOCK_BYTES;
use crate::reader::{Reader, Writer};
use crate::zeros::is_zero;

/// No frame holds more than this.
pub const FRAME_BYTES_MAX: usize = 1 << 20;

/// A run of blocks of one file and the frame that holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The pack, by its place in [`ExtentMap::packs`].
    pub pack: u32,
    /// Where the frame starts in the pack.
    pub offset: u64,
    /// The frame's length there. Zero says that the run is all zeros and no frame was stored.
    pub stored_bytes: u32,
    /// The first block, in units of 8 KiB from the file's start.
    pub first_block: u32,
    /// The run's length in bytes; only a file's last run may be no multiple of 8 KiB.
    pub raw_bytes: u32,
    /// CRC-32 over the run's bytes.
    pub crc: u32,
}

impl Extent {
    /// How many blocks the run touches.
    pub fn blocks(&self) -> u32 {
        self.raw_bytes.div_ceil(u32::try_from(BLOCK_BYTES).expect("8192 fits"))
    }

    /// The run's first byte in its file.
    pub fn file_offset(&self) -> u64 {
        u64::from(self.first_block).saturating_mul(BLOCK_BYTES as u64)
    }

    /// The run's bytes out of its frame, checked. A frame as long as the run was stored as it was.
    pub fn decode_frame(&self, stored: &[u8]) -> Result<Vec<u8>, Corrupt> {
        let damaged = Corrupt { field: "frame", at: self.offset, problem: Problem::Compression };
        if stored.len() as u64 != u64::from(self.stored_bytes) {
            return Err(damaged);
        }
        let raw = match self.stored_bytes {
            0 => vec![0; usize::try_from(self.raw_bytes).unwrap_or(usize::MAX)],
            n if n == self.raw_bytes => stored.to_vec(),
            _ => decompress(stored, u64::from(self.raw_bytes)).ok_or(damaged)?,
        };
        let found = crc32fast::hash(&raw);
        if found != self.crc {
            return Err(Corrupt::mismatch("frame", self.offset, u64::from(found), u64::from(self.crc)));
        }
        Ok(raw)
    }
}

/// Makes frames one after another, without setting the compressor up for each.
pub struct FrameCompressor(Option<zstd::bulk::Compressor<'static>>);

impl std::fmt::Debug for FrameCompressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FrameCompressor")
    }
}

impl FrameCompressor {
    /// With zstd's `level`.
    pub fn new(level: i32) -> Self {
        Self(zstd::bulk::Compressor::new(level).ok())
    }

    /// Compresses a run into a frame, unless that makes it longer. Zeros give an empty frame.
    pub fn frame(&mut self, raw: &[u8]) -> Vec<u8> {
        if is_zero(raw) {
            return Vec::new();
        }
        match self.0.as_mut().map(|zstd| zstd.compress(raw)) {
            Some(Ok(packed)) if packed.len() < raw.len() => packed,
            _ => raw.to_vec(),
        }
    }
}

/// Fills one pack, frame after frame.
#[derive(Debug)]
pub struct PackBuilder {
    object: Vec<u8>,
}

impl Default for PackBuilder {
    fn default() -> Self {
        Self { object: Header { kind: ObjectKind::Pack }.encode().to_vec() }
    }
}

impl PackBuilder {
    /// Compresses a run into a frame; what [`PackBuilder::push`] then places. Zeros give an empty frame. Whoever makes
    /// many keeps a [`FrameCompressor`].
    pub fn frame(raw: &[u8], level: i32) -> Vec<u8> {
        FrameCompressor::new(level).frame(raw)
    }

    /// Places a frame and says where it lies.
    pub fn push(&mut self, frame: &[u8]) -> u64 {
        let offset = self.object.len() as u64;
        self.object.extend_from_slice(frame);
        offset
    }

    /// How long the pack is so far.
    pub fn len(&self) -> usize {
        self.object.len()
    }

    /// Whether no frame was placed.
    pub fn is_empty(&self) -> bool {
        self.object.len() == HEADER_BYTES
    }

    /// The pack's bytes.
    pub fn finish(mut self) -> Vec<u8> {
        Footer::append(&mut self.object, 0);
        self.object
    }

    /// Checks a whole pack, every byte of it.
    pub fn check(object: &[u8]) -> Result<(), Corrupt> {
        Envelope::open(object, ObjectKind::Pack).map(|_| ())
    }
}

/// The frames one backup wrote, file by file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExtentMap {
    /// The packs it refers to, by name; older backups' packs among them once a map is compacted.
    pub packs: Vec<String>,
    /// For every file, by the number the manifest knows it by, its runs in block order.
    pub files: Vec<Vec<Extent>>,
}

impl ExtentMap {
    /// The object's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.varint(self.packs.len() as u64);
        for pack in &self.packs {
            w.text(pack);
        }
        w.varint(self.files.len() as u64);
        for extents in &self.files {
            w.varint(extents.len() as u64);
            let mut next = 0u32;
            for e in extents {
                w.varint(u64::from(e.pack)).varint(e.offset).varint(u64::from(e.stored_bytes));
                w.varint(u64::from(e.first_block.wrapping_sub(next)))
                    .varint(u64::from(e.raw_bytes))
                    .u32(e.crc);
                next = e.first_block.wrapping_add(e.blocks());
            }
        }
        Envelope::seal(ObjectKind::ExtentMap, w.as_bytes())
    }

    /// Reads the object; every extent names a pack that is listed, and a file's runs do not overlap.
    pub fn decode(object: &[u8]) -> Result<Self, Corrupt> {
        let payload = Envelope::open(object, ObjectKind::ExtentMap)?;
        let mut r = Reader::with_base(payload, HEADER_BYTES as u64);
        let count = r.count(1, "packs")?;
        let packs = (0..count).map(|_| r.text("pack").map(str::to_owned)).collect::<Result<Vec<_>, _>>()?;
        let count = r.count(1, "files")?;
        let mut files = Vec::with_capacity(count);
        for _ in 0..count {
            let count = r.count(9, "extents")?;
            let mut extents = Vec::with_capacity(count);
            let mut next = 0u32;
            for _ in 0..count {
                let extent = Self::decode_extent(&mut r, packs.len() as u64, next)?;
                let end = extent.first_block.checked_add(extent.blocks());
                next =
                    end.ok_or(Corrupt::invalid("first_block", r.position(), u64::from(extent.first_block)))?;
                extents.push(extent);
            }
            files.push(extents);
        }
        r.finish("extent map")?;
        Ok(Self { packs, files })
    }

    fn decode_extent(r: &mut Reader<'_>, packs: u64, next: u32) -> Result<Extent, Corrupt> {
        let at = r.position();
        let pack = r.varint_u32("pack")?;
        let offset = r.varint("offset")?;
        let stored_bytes = r.varint_u32("stored_bytes")?;
        let skip = r.varint_u32("first_block")?;
        let raw_bytes = r.varint_u32("raw_bytes")?;
        let crc = r.u32("crc")?;
        if stored_bytes != 0 && u64::from(pack) >= packs {
            return Err(Corrupt::too_large("pack", at, u64::from(pack), packs.saturating_sub(1)));
        }
        for (field, found) in [("stored_bytes", stored_bytes), ("raw_bytes", raw_bytes)] {
            if found as usize > FRAME_BYTES_MAX {
                return Err(Corrupt::too_large(field, at, u64::from(found), FRAME_BYTES_MAX as u64));
            }
        }
        let first_block =
            next.checked_add(skip).ok_or(Corrupt::invalid("first_block", at, u64::from(skip)))?;
        let end =
            offset.checked_add(u64::from(stored_bytes)).and_then(|end| end.checked_add(FOOTER_BYTES as u64));
        if raw_bytes == 0 || end.is_none() {
            return Err(Corrupt::invalid("offset", at, offset));
        }
        Ok(Extent { pack, offset, stored_bytes, first_block, raw_bytes, crc })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map() -> impl Strategy<Value = ExtentMap> {
        let runs = proptest::collection::vec(
            (0u32..3, 16u64..1 << 40, 1u32..4000, 0u32..50, 1u32..9, any::<u32>()),
            0..6,
        );
        proptest::collection::vec(runs, 0..6).prop_map(|files| {
            let file = |runs: Vec<(u32, u64, u32, u32, u32, u32)>| {
                let mut next = 0;
                let run = |(pack, offset, stored_bytes, skip, blocks, crc)| {
                    let first_block = next + skip;
                    next = first_block + blocks;
                    Extent { pack, offset, stored_bytes, first_block, raw_bytes: blocks * 8192, crc }
                };
                runs.into_iter().map(run).collect()
            };
            ExtentMap {
                packs: vec!["a".into(), "b".into(), "c".into()],
                files: files.into_iter().map(file).collect(),
            }
        })
    }

    proptest! {
        #[test]
        fn a_map_comes_back(map in map()) {
            prop_assert_eq!(ExtentMap::decode(&map.encode()), Ok(map));
        }

        #[test]
        fn a_sealed_map_of_any_bytes_is_a_map_or_an_error(payload in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = ExtentMap::decode(&Envelope::seal(ObjectKind::ExtentMap, &payload));
        }

        #[test]
        fn a_run_comes_back_out_of_its_frame(raw in proptest::collection::vec(any::<u8>(), 1..3000), zero: bool) {
            let raw = if zero { vec![0; raw.len()] } else { raw };
            let mut pack = PackBuilder::default();
            let frame = PackBuilder::frame(&raw, 3);
            let offset = pack.push(&frame);
            let extent = Extent { pack: 0, offset, stored_bytes: frame.len() as u32, first_block: 0, raw_bytes: raw.len() as u32, crc: crc32fast::hash(&raw) };
            let object = pack.finish();
            prop_assert_eq!(PackBuilder::check(&object), Ok(()));
            let at = offset as usize;
            prop_assert_eq!(extent.decode_frame(&object[at..at + frame.len()]), Ok(raw));
        }
    }
}
