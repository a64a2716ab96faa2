//! Puts a record together from the parts of it that pages hold.

use super::{u32_of, usize_of};
use crate::Corrupt;
use crate::engines::postgres::wal::record::{
    BlockRef, LAYOUT_BYTES_MAX, Layout, Parsed, RECORD_HEADER_BYTES, Record, Span, crc_with_header,
};
use crate::ids::PgMajor;

/// A record, or what there is of it so far.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    /// Its bytes, without the images that are left out.
    bytes: Vec<u8>,
    /// How many bytes of it there were.
    read: usize,
    /// The CRC of those behind the header.
    crc: u32,
    /// Where its images are left out, its length, until that is known which they are.
    leaving: Option<usize>,
    /// Places in the record that are left out, in their order.
    left_out: Vec<Span>,
    /// What it has, where something is left out.
    parsed: Option<Parsed>,
}

impl Gathered {
    /// Begins with another record, of `total` bytes; `leaves_images` says whether they may be left out.
    pub(super) fn begin(&mut self, total: u32, leaves_images: bool) {
        self.bytes.clear();
        self.left_out.clear();
        (self.read, self.crc, self.parsed) = (0, 0, None);
        self.leaving = Some(usize_of(total)).filter(|_| leaves_images);
    }

    /// Goes on with what was gathered before.
    pub(super) fn resume(&mut self, bytes: Vec<u8>) {
        self.begin(0, false);
        self.crc = crc32c::crc32c(bytes.get(RECORD_HEADER_BYTES..).unwrap_or_default());
        (self.read, self.bytes) = (bytes.len(), bytes);
    }

    /// Adds what follows. `blocks` is overwritten while images may still be left out.
    pub(super) fn add(&mut self, part: &[u8], major: PgMajor, blocks: &mut Vec<BlockRef>) {
        let header = RECORD_HEADER_BYTES.saturating_sub(self.read);
        self.crc = crc32c::crc32c_append(self.crc, part.get(header..).unwrap_or_default());
        let mut part = part;
        if let Some(total) = self.leaving {
            let wanted = LAYOUT_BYTES_MAX.min(total);
            let (head, rest) = part.split_at(wanted.saturating_sub(self.read).min(part.len()));
            self.keep(head);
            part = rest;
            if self.read == wanted {
                self.leaving = None;
                self.leave(total, major, blocks);
            }
        }
        self.keep(part);
    }

    /// Leaves the images out of what was gathered, and of what is added from now on. Of a record that makes no sense, and of
    /// one whose blocks fill more than PostgreSQL ever writes, nothing is.
    fn leave(&mut self, total: usize, major: PgMajor, blocks: &mut Vec<BlockRef>) {
        let Ok(mut layout) = Layout::read(&self.bytes, total, major, blocks) else { return };
        layout.place(blocks, |image| image.bytes);
        self.left_out.extend(blocks.iter().filter_map(|block| block.image.map(|(_, span)| span)));
        if self.left_out.is_empty() {
            return;
        }
        layout.place(blocks, |_| 0);
        self.parsed = Some(layout.parsed);
        let at = usize_of(layout.data_from).min(self.bytes.len());
        let head = self.bytes.split_off(at);
        self.read = at;
        self.keep(&head);
    }

    /// Keeps what follows, but for what is left out.
    fn keep(&mut self, part: &[u8]) {
        let end = self.read.saturating_add(part.len());
        let of = |from: usize, until: usize| {
            let from = from.saturating_sub(self.read);
            part.get(from..until.saturating_sub(self.read)).unwrap_or_default()
        };
        let mut from = self.read;
        for span in &self.left_out {
            let begin = usize_of(span.from);
            if begin >= end {
                break;
            }
            if begin > from {
                self.bytes.extend_from_slice(of(from, begin));
            }
            from = from.max(begin.saturating_add(usize_of(span.bytes)));
        }
        if from < end {
            self.bytes.extend_from_slice(of(from, end));
        }
        self.read = end;
    }

    /// How many bytes of the record there were.
    pub(super) fn read(&self) -> u32 {
        u32_of(self.read)
    }

    /// The record's bytes, but for those that were left out.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Its bytes; afterwards there are none.
    pub(super) fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }

    /// The CRC-32C that belongs into it.
    pub(super) fn crc(&self) -> u32 {
        crc_with_header(self.crc, &self.bytes)
    }

    /// What it has.
    pub(super) fn parse(&self, major: PgMajor, blocks: &mut Vec<BlockRef>) -> Result<Parsed, Corrupt> {
        self.parsed.map_or_else(|| Record::parse(&self.bytes, major, blocks), Ok)
    }
}
