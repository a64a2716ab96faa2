//! The only code that takes bytes off an input, and its counterpart that puts them down.

use crate::error::{Corrupt, Problem};

/// Takes little-endian fields off a byte slice, tells its position, and cannot run past the end.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    base: u64,
}

impl<'a> Reader<'a> {
    /// Reads `bytes` from their start.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, base: 0 }
    }

    /// Reads `bytes`, which lie `base` bytes into the object that errors speak of.
    pub const fn with_base(bytes: &'a [u8], base: u64) -> Self {
        Self { bytes, at: 0, base }
    }

    /// The position in the object, for errors.
    pub const fn position(&self) -> u64 {
        self.base.saturating_add(self.at as u64)
    }

    /// How many bytes are left.
    pub const fn left(&self) -> usize {
        self.bytes.len().saturating_sub(self.at)
    }

    /// Whether nothing is left.
    pub const fn is_empty(&self) -> bool {
        self.left() == 0
    }

    /// What is left, without taking it.
    pub fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }

    /// Takes `len` bytes.
    pub fn take(&mut self, len: usize, field: &'static str) -> Result<&'a [u8], Corrupt> {
        let end = self.at.checked_add(len);
        match end.and_then(|end| self.bytes.get(self.at..end).map(|taken| (taken, end))) {
            Some((taken, end)) => {
                self.at = end;
                Ok(taken)
            }
            None => Err(Corrupt {
                field,
                at: self.position(),
                problem: Problem::Truncated { needed: len as u64, left: self.left() as u64 },
            }),
        }
    }

    /// Takes exactly `N` bytes.
    pub fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], Corrupt> {
        let taken = self.take(N, field)?;
        let mut out = [0; N];
        out.copy_from_slice(taken);
        Ok(out)
    }

    /// Takes one byte.
    pub fn u8(&mut self, field: &'static str) -> Result<u8, Corrupt> {
        self.array::<1>(field).map(|[b]| b)
    }

    /// Takes a little-endian `u16`.
    pub fn u16(&mut self, field: &'static str) -> Result<u16, Corrupt> {
        self.array(field).map(u16::from_le_bytes)
    }

    /// Takes a little-endian `u32`.
    pub fn u32(&mut self, field: &'static str) -> Result<u32, Corrupt> {
        self.array(field).map(u32::from_le_bytes)
    }

    /// Takes a little-endian `u64`.
    pub fn u64(&mut self, field: &'static str) -> Result<u64, Corrupt> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// Takes a little-endian `i64`.
    pub fn i64(&mut self, field: &'static str) -> Result<i64, Corrupt> {
        self.array(field).map(i64::from_le_bytes)
    }

    /// Takes a LEB128 unsigned integer of at most 64 bits.
    pub fn varint(&mut self, field: &'static str) -> Result<u64, Corrupt> {
        let start = self.position();
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8(field)?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Corrupt::invalid(field, start, value))
    }

    /// Takes a varint that counts items of at least `item_bytes` bytes each, so that a count that the
    /// rest of the input cannot hold is refused before memory is taken for it.
    pub fn count(&mut self, item_bytes: usize, field: &'static str) -> Result<usize, Corrupt> {
        let at = self.position();
        let found = self.varint(field)?;
        let max = self.left().checked_div(item_bytes).unwrap_or(usize::MAX) as u64;
        if found > max {
            return Err(Corrupt::too_large(field, at, found, max));
        }
        Ok(usize::try_from(found).unwrap_or(usize::MAX))
    }

    /// Takes a varint that must fit a `u32`.
    pub fn varint_u32(&mut self, field: &'static str) -> Result<u32, Corrupt> {
        let at = self.position();
        let found = self.varint(field)?;
        u32::try_from(found).map_err(|_| Corrupt::too_large(field, at, found, u64::from(u32::MAX)))
    }

    /// Takes text that its length precedes.
    pub fn text(&mut self, field: &'static str) -> Result<&'a str, Corrupt> {
        let len = self.count(1, field)?;
        let at = self.position();
        let bytes = self.take(len, field)?;
        std::str::from_utf8(bytes).map_err(|_| Corrupt { field, at, problem: Problem::NotUtf8 })
    }

    /// Takes a `u32` and gives it a meaning, or refuses it.
    pub fn parse_u32<T>(
        &mut self,
        field: &'static str,
        parse: impl FnOnce(u32) -> Option<T>,
    ) -> Result<T, Corrupt> {
        let at = self.position();
        let found = self.u32(field)?;
        parse(found).ok_or(Corrupt::invalid(field, at, u64::from(found)))
    }

    /// Takes a `u64` and gives it a meaning, or refuses it.
    pub fn parse_u64<T>(
        &mut self,
        field: &'static str,
        parse: impl FnOnce(u64) -> Option<T>,
    ) -> Result<T, Corrupt> {
        let at = self.position();
        let found = self.u64(field)?;
        parse(found).ok_or(Corrupt::invalid(field, at, found))
    }

    /// Refuses anything that is left.
    pub fn finish(self, field: &'static str) -> Result<(), Corrupt> {
        if self.is_empty() {
            return Ok(());
        }
        let left = self.left() as u64;
        Err(Corrupt { field, at: self.position(), problem: Problem::TrailingBytes { left } })
    }
}

/// Puts down what [`Reader`] takes.
#[derive(Debug, Clone, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// An empty writer.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many bytes were put down.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was put down.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The bytes.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// The bytes so far.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Forgets everything, and keeps the memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    /// Puts bytes down as they are.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// Puts one byte down.
    pub fn u8(&mut self, v: u8) -> &mut Self {
        self.bytes(&[v])
    }

    /// Puts a little-endian `u16` down.
    pub fn u16(&mut self, v: u16) -> &mut Self {
        self.bytes(&v.to_le_bytes())
    }

    /// Puts a little-endian `u32` down.
    pub fn u32(&mut self, v: u32) -> &mut Self {
        self.bytes(&v.to_le_bytes())
    }

    /// Puts a little-endian `u64` down.
    pub fn u64(&mut self, v: u64) -> &mut Self {
        self.bytes(&v.to_le_bytes())
    }

    /// Puts a little-endian `i64` down.
    pub fn i64(&mut self, v: i64) -> &mut Self {
        self.bytes(&v.to_le_bytes())
    }

    /// Puts a LEB128 unsigned integer down.
    pub fn varint(&mut self, mut v: u64) -> &mut Self {
        while v >= 0x80 {
            self.bytes.push((v & 0x7f) as u8 | 0x80);
            v >>= 7;
        }
        self.bytes.push((v & 0x7f) as u8);
        self
    }

    /// Puts text down behind its length.
    pub fn text(&mut self, v: &str) -> &mut Self {
        self.varint(v.len() as u64).bytes(v.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_varint_comes_back_and_every_truncation_is_refused(v: u64) {
            let mut w = Writer::new();
            w.varint(v);
            let bytes = w.into_bytes();
            prop_assert_eq!(Reader::new(&bytes).varint("v"), Ok(v));
            for cut in 0..bytes.len() {
                prop_assert!(Reader::new(&bytes[..cut]).varint("v").is_err());
            }
        }

        #[test]
        fn a_varint_of_any_bytes_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..16)) {
            let _ = Reader::new(&bytes).varint("v");
        }
    }

    #[test]
    fn a_count_that_the_input_cannot_hold_is_refused() {
        let mut w = Writer::new();
        w.varint(1000).bytes(&[0; 8]);
        let err = Reader::new(w.as_bytes()).count(4, "items").unwrap_err();
        assert_eq!(err.to_string(), "items at byte 0 is 1000, more than the 2 allowed");
    }
}
