//! What every object of the archive starts and ends with, and the small objects that are nothing more.

use std::borrow::Cow;
use std::fmt;
use std::io::{Cursor, Read as _};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::source::PushSource;
use crate::error::{Corrupt, Problem};
use crate::reader::{Reader, Writer};

/// The bytes every object starts with.
const MAGIC: [u8; 8] = *b"WALTIDE\x1a";
/// The bytes every object ends with.
const END_MAGIC: [u8; 4] = *b"EDIT";
/// The size of [`Header`].
pub const HEADER_BYTES: usize = 16;
/// So much memory is taken for what says that it will be so long once decompressed; more is taken as it comes.
const UNPROVEN_BYTES_MAX: u64 = 1 << 20;
/// The size of [`Footer`].
pub const FOOTER_BYTES: usize = 32;

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObjectKind {
    /// A WAL segment with its index.
    Segment,
    /// A timeline history or backup history file.
    WalFile,
    /// JSON that is no manifest: waltide.json, cluster.json, system.json, a started backup, a drill.
    Json,
    /// A backup's manifest.
    Manifest,
    /// A pack of frames.
    Pack,
    /// An extent map over packs.
    ExtentMap,
    /// Many segments' indexes merged.
    MergedIndex,
}

impl ObjectKind {
    const ALL: [(Self, u16); 7] = [
        (Self::Segment, 1),
        (Self::WalFile, 2),
        (Self::Json, 3),
        (Self::Manifest, 4),
        (Self::Pack, 5),
        (Self::ExtentMap, 6),
        (Self::MergedIndex, 7),
    ];

    /// The number in the header.
    pub fn code(self) -> u16 {
        Self::ALL.iter().find(|(k, _)| *k == self).map_or(0, |(_, c)| *c)
    }

    /// The newest version of the kind, which is the one written.
    pub const fn version(self) -> u16 {
        1
    }
}

/// Magic, kind, version and flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the object is.
    pub kind: ObjectKind,
}

impl Header {
    /// The header's bytes.
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let mut w = Writer::new();
        w.bytes(&MAGIC).u16(self.kind.code()).u16(self.kind.version()).u32(0);
        let mut out = [0; HEADER_BYTES];
        out.copy_from_slice(w.as_bytes());
        out
    }

    /// Reads a header; a version or a flag this reader does not know is refused, since both may change what
    /// the rest means.
    pub fn decode(bytes: &[u8]) -> Result<Self, Corrupt> {
        let mut r = Reader::new(bytes);
        let magic = r.array::<8>("magic")?;
        if magic != MAGIC {
            return Err(Corrupt::mismatch("magic", 0, u64::from_be_bytes(magic), u64::from_be_bytes(MAGIC)));
        }
        let code = r.u16("kind")?;
        let known = ObjectKind::ALL.iter().find(|(_, c)| *c == code);
        let (kind, _) = known.ok_or(Corrupt::invalid("kind", 8, u64::from(code)))?;
        let version = r.u16("version")?;
        if version != kind.version() {
            return Err(Corrupt::mismatch("version", 10, u64::from(version), u64::from(kind.version())));
        }
        let flags = r.u32("flags")?;
        if flags != 0 {
            return Err(Corrupt::invalid("flags", 12, u64::from(flags)));
        }
        Ok(Self { kind: *kind })
    }

    /// Reads a header and refuses another kind of object.
    pub fn expect(bytes: &[u8], kind: ObjectKind) -> Result<(), Corrupt> {
        let found = Self::decode(bytes)?;
        if found.kind == kind {
            return Ok(());
        }
        Err(Corrupt::mismatch("kind", 8, u64::from(found.kind.code()), u64::from(kind.code())))
    }
}

/// The last 32 bytes: where the directory lies, the object's length, and the CRC-32 over all before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footer {
    /// Where the directory starts, from the object's start; the footer's own position where there is none.
    pub directory_at: u64,
    /// How long it is.
    pub directory_bytes: u32,
    /// Its CRC-32, so that it can be read alone.
    pub directory_crc: u32,
    /// The whole object's length, this footer included.
    pub object_bytes: u64,
    /// CRC-32 over everything before this field.
    pub crc: u32,
}

impl Footer {
    /// Ends an object whose bytes so far are `object`, `directory_bytes` of them, at the end, its directory.
    pub fn append(object: &mut Vec<u8>, directory_bytes: u32) {
        let directory_at = object.len().saturating_sub(directory_bytes as usize);
        let directory_crc = crc32fast::hash(object.get(directory_at..).unwrap_or_default());
        let object_bytes = (object.len() as u64).saturating_add(FOOTER_BYTES as u64);
        let mut w = Writer::new();
        w.u64(directory_at as u64).u32(directory_bytes).u32(directory_crc).u64(object_bytes);
        object.extend_from_slice(w.as_bytes());
        let crc = crc32fast::hash(object);
        object.extend_from_slice(&crc.to_le_bytes());
        object.extend_from_slice(&END_MAGIC);
    }

    /// Reads the footer at the end of `tail`, the last bytes of an object of `object_bytes` bytes.
    pub fn decode(tail: &[u8], object_bytes: u64) -> Result<Self, Corrupt> {
        let at = object_bytes.saturating_sub(FOOTER_BYTES as u64);
        let footer = tail.len().checked_sub(FOOTER_BYTES).and_then(|from| tail.get(from..));
        let too_short = Problem::Truncated {
            needed: (HEADER_BYTES as u64).saturating_add(FOOTER_BYTES as u64),
            left: object_bytes,
        };
        let footer = footer.ok_or(Corrupt { field: "footer", at: 0, problem: too_short })?;
        let mut r = Reader::with_base(footer, at);
        let found = Self {
            directory_at: r.u64("directory_at")?,
            directory_bytes: r.u32("directory_bytes")?,
            directory_crc: r.u32("directory_crc")?,
            object_bytes: r.u64("object_bytes")?,
            crc: r.u32("crc")?,
        };
        let end = r.array::<4>("end_magic")?;
        if end != END_MAGIC {
            let (found, expected) = (u32::from_be_bytes(end), u32::from_be_bytes(END_MAGIC));
            return Err(Corrupt::mismatch(
                "end_magic",
                at.saturating_add(28),
                u64::from(found),
                u64::from(expected),
            ));
        }
        if found.object_bytes != object_bytes {
            return Err(Corrupt::mismatch(
                "object_bytes",
                at.saturating_add(16),
                found.object_bytes,
                object_bytes,
            ));
        }
        let directory_end = found.directory_at.checked_add(u64::from(found.directory_bytes));
        if found.directory_at < HEADER_BYTES as u64 || directory_end != Some(at) {
            return Err(Corrupt::invalid("directory_at", at, found.directory_at));
        }
        Ok(found)
    }

    /// The directory's bytes and where it lies, out of `tail`, the last bytes of an object of `object_bytes` bytes.
    /// `Ok(Err(n))` says that `n` bytes of tail are needed.
    pub(super) fn directory(tail: &[u8], object_bytes: u64) -> Result<Result<(&[u8], u64), u64>, Corrupt> {
        let footer = Self::decode(tail, object_bytes)?;
        let needed = object_bytes.saturating_sub(footer.directory_at);
        let from = usize::try_from(needed).ok().and_then(|needed| tail.len().checked_sub(needed));
        let Some(from) = from else { return Ok(Err(needed)) };
        let to = tail.len().saturating_sub(FOOTER_BYTES);
        let bytes = tail.get(from..to).unwrap_or_default();
        let found = crc32fast::hash(bytes);
        if found != footer.directory_crc {
            let expected = u64::from(footer.directory_crc);
            return Err(Corrupt::mismatch("directory", footer.directory_at, u64::from(found), expected));
        }
        Ok(Ok((bytes, footer.directory_at)))
    }

    /// Checks a whole object: header, length, and the checksum over every byte.
    pub fn check(object: &[u8], kind: ObjectKind) -> Result<Self, Corrupt> {
        Header::expect(object, kind)?;
        let footer = Self::decode(object, object.len() as u64)?;
        let covered = object.len().saturating_sub(8);
        let found = crc32fast::hash(object.get(..covered).unwrap_or_default());
        if found != footer.crc {
            return Err(Corrupt::mismatch("crc", covered as u64, u64::from(footer.crc), u64::from(found)));
        }
        Ok(footer)
    }
}

/// A small object: header, payload, footer.
#[derive(Debug)]
pub struct Envelope;

impl Envelope {
    /// Wraps `payload` as it is.
    pub fn seal(kind: ObjectKind, payload: &[u8]) -> Vec<u8> {
        let mut object = Header { kind }.encode().to_vec();
        object.extend_from_slice(payload);
        Footer::append(&mut object, 0);
        object
    }

    /// The payload of a whole object, every byte of it checked.
    pub fn open(object: &[u8], kind: ObjectKind) -> Result<&[u8], Corrupt> {
        Footer::check(object, kind)?;
        let end = object.len().saturating_sub(FOOTER_BYTES);
        Ok(object.get(HEADER_BYTES..end).unwrap_or_default())
    }

    /// Wraps a value as JSON, compressed where the kind is a manifest (it lists every file).
    pub fn seal_json<T: Serialize>(kind: ObjectKind, value: &T) -> Vec<u8> {
        let json =
            serde_json::to_vec(value).expect("our own values serialise: no maps with other keys than text");
        match kind {
            ObjectKind::Manifest => {
                let packed = zstd::bulk::compress(&json, 3)
                    .expect("compression into memory has no failure but memory");
                let mut w = Writer::new();
                w.u64(json.len() as u64).bytes(&packed);
                Self::seal(kind, w.as_bytes())
            }
            _ => Self::seal(kind, &json),
        }
    }

    /// Reads what [`Envelope::seal_json`] wrote. A manifest's stated length bounds what is decompressed.
    pub fn open_json<T: DeserializeOwned>(object: &[u8], kind: ObjectKind) -> Result<T, Corrupt> {
        let payload = Self::open(object, kind)?;
        let json = match kind {
            ObjectKind::Manifest => Cow::Owned(unpack(payload)?),
            _ => Cow::Borrowed(payload),
        };
        serde_json::from_slice(&json)
            .map_err(|e| Corrupt::invalid("json", HEADER_BYTES as u64, e.column() as u64))
    }
}

/// Decompresses a length-prefixed payload, taking memory only as the data really comes.
fn unpack(payload: &[u8]) -> Result<Vec<u8>, Corrupt> {
    let mut r = Reader::with_base(payload, HEADER_BYTES as u64);
    let at = r.position();
    let raw_bytes = r.u64("raw_bytes")?;
    decompress(r.rest(), raw_bytes).ok_or(Corrupt { field: "payload", at, problem: Problem::Compression })
}

/// Decompresses one zstd stream that must give exactly `raw_bytes`.
pub(crate) fn decompress(stored: &[u8], raw_bytes: u64) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    Decompressor::default().decompress_onto(&mut out, stored, raw_bytes)?;
    Some(out)
}

/// What decompresses one stream after the other: its memory is new only once.
#[derive(Default)]
pub(super) struct Decompressor(Option<zstd::bulk::Decompressor<'static>>);

impl fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decompressor").finish_non_exhaustive()
    }
}

impl Decompressor {
    /// Decompresses one zstd stream that must give exactly `raw_bytes`, behind what `out` holds.
    pub(super) fn decompress_onto(&mut self, out: &mut Vec<u8>, stored: &[u8], raw_bytes: u64) -> Option<()> {
        let before = out.len();
        if raw_bytes > UNPROVEN_BYTES_MAX {
            // Memory grows with what really comes out.
            let decoder = zstd::stream::read::Decoder::with_buffer(stored).ok()?;
            decoder.take(raw_bytes.checked_add(1)?).read_to_end(out).ok()?;
        } else {
            out.reserve(usize::try_from(raw_bytes).ok()?);
            let mut place = Cursor::new(&mut *out);
            place.set_position(before as u64);
            let inner = match &mut self.0 {
                Some(inner) => inner,
                none => none.insert(zstd::bulk::Decompressor::new().ok()?),
            };
            inner.decompress_to_buffer(stored, &mut place).ok()?;
        }
        (out.len().checked_sub(before)? as u64 == raw_bytes).then_some(())
    }
}

/// A `.history` or `.backup` file, kept with its name so that a copied object still says what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalFile {
    /// The name PostgreSQL gave the file.
    pub name: crate::WalFileName,
    /// Its bytes.
    pub contents: Vec<u8>,
    /// Who pushed it, where that was noted.
    pub pushed_by: Option<PushSource>,
}

impl WalFile {
    /// The object's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut directory = Writer::new();
        self.pushed_by.iter().for_each(|source| source.encode(&mut directory));
        let mut w = Writer::new();
        w.bytes(&Header { kind: ObjectKind::WalFile }.encode());
        w.text(&self.name.to_string()).bytes(&self.contents).bytes(directory.as_bytes());
        let mut object = w.into_bytes();
        Footer::append(&mut object, u32::try_from(directory.len()).unwrap_or(u32::MAX));
        object
    }

    /// Reads the object.
    pub fn decode(object: &[u8]) -> Result<Self, Corrupt> {
        let footer = Footer::check(object, ObjectKind::WalFile)?;
        let directory_at = usize::try_from(footer.directory_at).unwrap_or(usize::MAX);
        let end = object.len().saturating_sub(FOOTER_BYTES);
        let payload = object.get(HEADER_BYTES..directory_at).unwrap_or_default();
        let mut r = Reader::with_base(payload, HEADER_BYTES as u64);
        let at = r.position();
        let name = r.text("name")?;
        let name = name.parse().map_err(|_| Corrupt::invalid("name", at, name.len() as u64))?;
        let mut directory =
            Reader::with_base(object.get(directory_at..end).unwrap_or_default(), footer.directory_at);
        let pushed_by = match directory.is_empty() {
            true => None,
            false => Some(PushSource::decode(&mut directory)?),
        };
        Ok(Self { name, contents: r.rest().to_vec(), pushed_by })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_envelope_comes_back_and_every_flip_and_truncation_is_refused(payload in proptest::collection::vec(any::<u8>(), 0..200), bit in 0u8..8) {
            let object = Envelope::seal(ObjectKind::Json, &payload);
            prop_assert_eq!(Envelope::open(&object, ObjectKind::Json), Ok(payload.as_slice()));
            for i in 0..object.len() {
                let mut bad = object.clone();
                bad[i] ^= 1 << bit;
                prop_assert!(Envelope::open(&bad, ObjectKind::Json).is_err(), "byte {}", i);
                prop_assert!(Envelope::open(&object[..i], ObjectKind::Json).is_err(), "cut at {}", i);
            }
        }

        #[test]
        fn a_wal_file_comes_back(contents in proptest::collection::vec(any::<u8>(), 0..100), known: bool) {
            let pushed_by = known.then(|| super::super::source::sample("db1"));
            let file = WalFile { name: "00000002.history".parse().unwrap(), contents, pushed_by };
            prop_assert_eq!(WalFile::decode(&file.encode()), Ok(file));
        }
    }

    #[test]
    fn a_compressed_payload_cannot_claim_more_than_it_gives() {
        let packed = zstd::bulk::compress(&[7; 1000], 3).unwrap();
        assert!(decompress(&packed, 1000).is_some());
        assert!(decompress(&packed, 999).is_none());
        assert!(decompress(&packed, 1 << 50).is_none());
        for cut in 0..packed.len() {
            assert!(decompress(&packed[..cut], 1000).is_none());
        }
    }

    #[test]
    fn what_is_decompressed_goes_behind_what_is_there() {
        for raw_bytes in [1000u64, UNPROVEN_BYTES_MAX, UNPROVEN_BYTES_MAX + 1] {
            let raw: Vec<u8> = (0..raw_bytes).map(|i| (i % 251) as u8).collect();
            let packed = zstd::bulk::compress(&raw, 3).unwrap();
            let (mut out, mut decompressor) = (b"before".to_vec(), Decompressor::default());
            // What was refused before makes no difference.
            assert_eq!(decompressor.decompress_onto(&mut Vec::new(), &packed[..20], raw_bytes), None);
            assert_eq!(decompressor.decompress_onto(&mut out, &packed, raw_bytes), Some(()));
            assert_eq!(decompressor.decompress_onto(&mut out, &packed, raw_bytes), Some(()));
            assert_eq!(out, [b"before".as_slice(), &raw, &raw].concat());
        }
    }

    #[test]
    fn another_version_is_refused_by_name() {
        let mut object = Envelope::seal(ObjectKind::Json, b"{}");
        object[10] = 9;
        let err = Envelope::open(&object, ObjectKind::Json).unwrap_err();
        assert_eq!(err.to_string(), "version at byte 10 is 0x9, expected 0x1");
    }
}
