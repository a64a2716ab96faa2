//! A file of blocks that each carry their checksum. redb panics on some damaged pages, so it must not get to see any.
//!
//! On disk a block is its CRC-32 in four bytes, little-endian, and 4096 bytes of data. The checksum covers the block's
//! number and the data, so that a block in another's place, or one of zeros that a crash left, is damage too.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;

const DATA: usize = 4096;
const SEALED: usize = DATA + 4;
const DATA_BYTES: u64 = DATA as u64;
const SEALED_BYTES: u64 = SEALED as u64;

/// The file, locked for this process until it is dropped.
#[derive(Debug)]
pub(crate) struct SealedFile(File);

impl SealedFile {
    /// Fails with `WouldBlock` where another process, or another part of this one, has the file.
    pub(crate) fn lock(file: File) -> io::Result<Self> {
        file.try_lock()?;
        Ok(Self(file))
    }

    /// The blocks that `len` bytes at `offset` lie in: the first block's number, how many, the offset in the first.
    fn blocks(offset: u64, len: usize) -> io::Result<(u64, usize, usize)> {
        let skip = usize::try_from(offset % DATA_BYTES).map_err(io::Error::other)?;
        let bytes = skip.checked_add(len).ok_or(ErrorKind::FileTooLarge)?;
        Ok((offset / DATA_BYTES, bytes.div_ceil(DATA), skip))
    }

    fn place(block: u64) -> io::Result<u64> {
        block.checked_mul(SEALED_BYTES).ok_or_else(|| ErrorKind::FileTooLarge.into())
    }

    /// The data of `count` blocks from `first` on.
    fn load(&self, first: u64, count: usize) -> io::Result<Vec<u8>> {
        let bytes = count.checked_mul(SEALED).ok_or(ErrorKind::FileTooLarge)?;
        let end = u64::try_from(bytes).ok().and_then(|bytes| bytes.checked_add(Self::place(first).ok()?));
        // A damaged length must not make us take its memory.
        if end.is_none_or(|end| self.0.metadata().is_ok_and(|meta| meta.len() < end)) {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let mut sealed = vec![0; bytes];
        self.0.read_exact_at(&mut sealed, Self::place(first)?)?;
        let mut data = Vec::with_capacity(count.saturating_mul(DATA));
        for (block, number) in sealed.chunks_exact(SEALED).zip(first..) {
            let (sum, content) = block.split_at(4);
            if sum != seal(number, content) {
                return Err(io::Error::new(ErrorKind::InvalidData, format!("block {number} is damaged")));
            }
            data.extend_from_slice(content);
        }
        Ok(data)
    }
}

impl redb::StorageBackend for SealedFile {
    fn len(&self) -> io::Result<u64> {
        match self.0.metadata()?.len() {
            len if !len.is_multiple_of(SEALED_BYTES) => {
                Err(io::Error::new(ErrorKind::InvalidData, "the file is cut short"))
            }
            len => Ok((len / SEALED_BYTES).saturating_mul(DATA_BYTES)),
        }
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let (first, count, skip) = Self::blocks(offset, out.len())?;
        let data = self.load(first, count)?;
        let wanted =
            data.get(skip..).and_then(|data| data.get(..out.len())).ok_or(ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(wanted);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if !len.is_multiple_of(DATA_BYTES) {
            return Err(ErrorKind::Unsupported.into());
        }
        let zeros = [0; DATA * 64];
        let mut end = self.len()?;
        while end < len {
            let missing = len.saturating_sub(end).min(zeros.len() as u64);
            let part =
                usize::try_from(missing).ok().and_then(|n| zeros.get(..n)).ok_or(ErrorKind::FileTooLarge)?;
            self.write(end, part)?;
            end = end.saturating_add(missing);
        }
        self.0.set_len(Self::place(len / DATA_BYTES)?)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let (first, count, skip) = Self::blocks(offset, data.len())?;
        let whole = skip == 0 && data.len().is_multiple_of(DATA);
        let mut merged = Vec::new();
        if !whole {
            merged = self.load(first, count)?;
            let part = merged.get_mut(skip..).and_then(|rest| rest.get_mut(..data.len()));
            part.ok_or(ErrorKind::UnexpectedEof)?.copy_from_slice(data);
        }
        let mut sealed = Vec::with_capacity(count.saturating_mul(SEALED));
        for (content, number) in if whole { data } else { &merged }.chunks_exact(DATA).zip(first..) {
            sealed.extend_from_slice(&seal(number, content));
            sealed.extend_from_slice(content);
        }
        self.0.write_all_at(&sealed, Self::place(first)?)
    }
}

fn seal(number: u64, content: &[u8]) -> [u8; 4] {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&number.to_le_bytes());
    sum.update(content);
    sum.finalize().to_le_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use redb::StorageBackend;

    use super::*;

    proptest! {
        #[test]
        fn it_reads_like_a_plain_file_and_refuses_every_flipped_byte(
            writes in prop::collection::vec((0..30_000_u64, 1..9000_usize, any::<u8>()), 1..8),
            flip in 0..SEALED_BYTES * 10,
        ) {
            let file = SealedFile::lock(tempfile::tempfile().unwrap()).unwrap();
            file.set_len(DATA_BYTES * 10).unwrap();
            let mut plain = vec![0; DATA * 10];
            for (offset, len, byte) in writes {
                let start = usize::try_from(offset).unwrap();
                plain[start..][..len].fill(byte);
                file.write(offset, &vec![byte; len]).unwrap();
            }
            prop_assert_eq!(file.len().unwrap(), DATA_BYTES * 10);
            let mut read = vec![1; DATA * 10];
            file.read(0, &mut read).unwrap();
            prop_assert_eq!(&read, &plain);
            file.read(5000, &mut read[..7000]).unwrap();
            prop_assert_eq!(&read[..7000], &plain[5000..12_000]);
            prop_assert!(file.read(40_959, &mut [0; 2]).is_err());

            let mut byte = [0];
            file.0.read_exact_at(&mut byte, flip).unwrap();
            file.0.write_all_at(&[byte[0] ^ 1], flip).unwrap();
            prop_assert_eq!(file.read(0, &mut read).unwrap_err().kind(), ErrorKind::InvalidData);
        }
    }
}
