//! What pg_basebackup compresses with, undone as a stream that takes bounded memory.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Read};
use std::rc::Rc;

use lz4_flex::frame::FrameDecoder;

/// The largest window that PostgreSQL's zstd asks for, at its highest level; 128 MiB.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
const INPUT_BYTES: usize = 128 << 10;

/// How a tar archive is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    Gzip,
    Lz4,
    Zstd,
}

impl Compression {
    /// The one whose files end in this.
    pub(super) fn of_suffix(suffix: &str) -> Option<Self> {
        match suffix {
            "gz" => Some(Self::Gzip),
            "lz4" => Some(Self::Lz4),
            "zst" => Some(Self::Zstd),
            _ => None,
        }
    }

    /// What decompresses files of it, on every system.
    pub(super) fn tool(self) -> &'static str {
        match self {
            Self::Gzip => "gunzip",
            Self::Lz4 => "unlz4",
            Self::Zstd => "unzstd",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Lz4 => "LZ4",
            Self::Zstd => "zstd",
        }
    }

    /// What `compressed` holds, all members or frames of it. It fails where they do not end.
    pub(super) fn decode<'a>(self, compressed: impl Read + 'a) -> io::Result<Decoded<'a>> {
        let at = Rc::new(Cell::new(0));
        let inner = BufReader::with_capacity(INPUT_BYTES, compressed);
        let input = Input { inner, at: Rc::clone(&at), ended: false };
        let decoder: Box<dyn Read + 'a> = match self {
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
            Self::Lz4 => Box::new(Lz4 { decoder: Some(FrameDecoder::new(input)), frame_end: 0 }),
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                Box::new(decoder)
            }
        };
        Ok(Decoded { compression: self, decoder, at })
    }
}

/// What something compressed holds.
pub(super) struct Decoded<'a> {
    compression: Compression,
    decoder: Box<dyn Read + 'a>,
    /// How much of what is compressed was read.
    at: Rc<Cell<u64>>,
}

impl Read for Decoded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.decoder.read(buffer) {
            // Nothing at all is not what compressing nothing gives.
            Ok(0) if self.at.get() == 0 && !buffer.is_empty() => {
                Err(self.explain(io::ErrorKind::UnexpectedEof.into()))
            }
            Ok(found) => Ok(found),
            // The disk's failures, and interruptions, are not the stream's.
            Err(e) if e.raw_os_error().is_some() || e.kind() == io::ErrorKind::Interrupted => Err(e),
            Err(e) => Err(self.explain(e)),
        }
    }
}

impl Decoded<'_> {
    fn explain(&self, e: io::Error) -> io::Error {
        let (name, tool, at) = (self.compression.name(), self.compression.tool(), self.at.get());
        let what = match e.kind() {
            io::ErrorKind::UnexpectedEof => format!("its {name} stream is cut short at byte {at}"),
            _ => format!("its {name} stream cannot be decompressed at byte {at}: {e}"),
        };
        io::Error::other(format!(
            "{what}\nhint: copy the file anew from where it was made, or make another base backup; if {tool} reads it, the \
             plain archive that it makes can be imported"
        ))
    }
}

/// The compressed bytes, counted as they are used.
struct Input<R> {
    inner: BufReader<R>,
    at: Rc<Cell<u64>>,
    /// Whether somebody wanted more than there was.
    ended: bool,
}

impl<R: Read> Input<R> {
    fn used(&self, bytes: usize) {
        self.at.set(self.at.get().saturating_add(bytes as u64));
    }
}

impl<R: Read> Read for Input<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let found = self.inner.read(buffer)?;
        self.ended |= found == 0 && !buffer.is_empty();
        self.used(found);
        Ok(found)
    }
}

impl<R: Read> BufRead for Input<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let found = self.inner.fill_buf()?;
        self.ended |= found.is_empty();
        Ok(found)
    }

    fn consume(&mut self, bytes: usize) {
        self.used(bytes);
        self.inner.consume(bytes);
    }
}

/// All frames of an LZ4 file. The decoder says "no more" at the end of a frame, and as well where the file ends between
/// two blocks of one: only an end that comes right behind a frame's is one. Each frame has a decoder of its own, because
/// one that has grown for larger blocks does not expect smaller ones.
struct Lz4<R: Read> {
    decoder: Option<FrameDecoder<Input<R>>>,
    /// Where the last frame ended.
    frame_end: u64,
}

impl<R: Read> Read for Lz4<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some(decoder) = self.decoder.as_mut().filter(|_| !buffer.is_empty()) {
            let found = decoder.read(buffer)?;
            if found > 0 {
                return Ok(found);
            }
            let input = decoder.get_ref();
            let at = input.at.get();
            if input.ended {
                return if at == self.frame_end { Ok(0) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
            self.frame_end = at;
            self.decoder = self.decoder.take().map(|done| FrameDecoder::new(done.into_inner()));
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};

    const ALL: [Compression; 3] = [Compression::Gzip, Compression::Lz4, Compression::Zstd];

    /// One member or frame.
    fn pack(compression: Compression, raw: &[u8]) -> Vec<u8> {
        match compression {
            Compression::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(raw).unwrap();
                encoder.finish().unwrap()
            }
            Compression::Lz4 => lz4(raw, BlockSize::Max64KB, BlockMode::Linked),
            Compression::Zstd => {
                let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
                encoder.write_all(raw).unwrap();
                encoder.finish().unwrap()
            }
        }
    }

    fn lz4(raw: &[u8], size: BlockSize, mode: BlockMode) -> Vec<u8> {
        let info = FrameInfo::new().block_size(size).block_mode(mode);
        let mut encoder = FrameEncoder::with_frame_info(info, Vec::new());
        encoder.write_all(raw).unwrap();
        encoder.finish().unwrap()
    }

    fn unpack(compression: Compression, packed: &[u8]) -> Result<Vec<u8>, String> {
        let mut raw = Vec::new();
        let read = compression.decode(packed).and_then(|mut decoded| decoded.read_to_end(&mut raw));
        read.map(|_| raw).map_err(|e| e.to_string())
    }

    /// Some bytes that compress, but not to nothing.
    fn some(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|i| (i.wrapping_mul(i) >> 7) as u8 ^ (i % 13) as u8).collect()
    }

    #[test]
    fn all_members_and_frames_are_read() {
        let raw = some(300_000);
        for compression in ALL {
            let mut packed = Vec::new();
            for part in raw.chunks(70_000) {
                packed.extend(pack(compression, part));
            }
            packed.extend(pack(compression, b""));
            assert!(unpack(compression, &packed).unwrap() == raw, "{compression:?}");
        }
        let mut packed = Vec::new();
        let sizes = [BlockSize::Max4MB, BlockSize::Max64KB, BlockSize::Max1MB, BlockSize::Max256KB];
        for (part, size) in raw.chunks(75_000).zip(sizes) {
            for mode in [BlockMode::Linked, BlockMode::Independent] {
                packed.extend(lz4(part, size, mode));
            }
        }
        let twice: Vec<u8> = raw.chunks(75_000).flat_map(|part| [part, part].concat()).collect();
        assert!(unpack(Compression::Lz4, &packed).unwrap() == twice);
    }

    #[test]
    fn a_stream_that_was_cut_is_refused_wherever_it_was() {
        let raw = some(200_000);
        for (compression, name) in ALL.into_iter().zip(["gzip", "LZ4", "zstd"]) {
            let packed = pack(compression, &raw);
            // Every place near both ends, where headers and footers are, and many between.
            let ends = (0..200).chain(packed.len() - 200..packed.len());
            for cut in ends.chain((200..packed.len() - 200).step_by(997)) {
                let refused = unpack(compression, &packed[..cut]).unwrap_err();
                let expected =
                    format!("its {name} stream is cut short at byte {cut}\nhint: copy the file anew");
                assert!(refused.starts_with(&expected), "{cut} of {}: {refused}", packed.len());
            }
            // Between two blocks of a frame that is not the first, too.
            let twice = [packed.clone(), packed.clone()].concat();
            for cut in [1, 5, 8, packed.len() - 4, packed.len() - 1] {
                let refused = unpack(compression, &twice[..packed.len() + cut]).unwrap_err();
                assert!(refused.contains(" is cut short at byte "), "{refused}");
            }
        }
        let frame = lz4(&raw, BlockSize::Max64KB, BlockMode::Independent);
        let block = u32::from_le_bytes(frame[7..11].try_into().unwrap()) & 0x7FFF_FFFF;
        let refused = unpack(Compression::Lz4, &frame[..11 + block as usize]).unwrap_err();
        assert!(refused.starts_with("its LZ4 stream is cut short at byte "), "{refused}");
    }

    #[test]
    fn what_was_changed_is_refused_or_gives_bytes_but_never_panics() {
        let raw = some(5000);
        for compression in ALL {
            let packed = pack(compression, &raw);
            let mut refused = 0;
            for at in 0..packed.len() {
                for bit in 0..8 {
                    let mut changed = packed.clone();
                    changed[at] ^= 1 << bit;
                    refused += usize::from(unpack(compression, &changed).is_err());
                }
            }
            // How much is noticed here is theirs to say: backup_manifest is the proof.
            assert!(refused > 0, "{compression:?}");
            let behind = [packed.as_slice(), b"something else"].concat();
            let refused = unpack(compression, &behind).unwrap_err();
            assert!(refused.contains(" stream "), "{refused}");
        }
    }

    #[test]
    fn a_window_beyond_what_postgresql_uses_is_not_given_memory() {
        // A frame's header, with a window of 2^log bytes, and an empty last block.
        let frame = |log: u8| [0x28, 0xB5, 0x2F, 0xFD, 0, (log - 10) << 3, 1, 0, 0];
        assert_eq!(unpack(Compression::Zstd, &frame(27)), Ok(Vec::new()));
        let refused = unpack(Compression::Zstd, &frame(28)).unwrap_err();
        let expected = "its zstd stream cannot be decompressed at byte 0: Frame requires too much memory for decoding\nhint: ";
        assert!(refused.starts_with(expected), "{refused}");
        assert!(
            refused.ends_with("if unzstd reads it, the plain archive that it makes can be imported"),
            "{refused}"
        );
    }

    #[test]
    fn the_disks_own_failures_are_not_the_streams() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::from_raw_os_error(5))
            }
        }
        for compression in ALL {
            let failed = compression.decode(Broken).unwrap().read(&mut [0; 10]).unwrap_err();
            assert_eq!(failed.raw_os_error(), Some(5), "{compression:?}");
        }
    }
}
