//! Files out of what can only be read from its start: one thread reads, the copying threads take.

use std::io::Read;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use super::super::checksum::Checksum;
use super::super::files::SourceFile;
use super::{CopyError, FRAME_BYTES, Shared};

/// What a copying thread takes at once. Zeros that follow each other become one extent within it.
const STRETCH_BYTES: usize = 8 * FRAME_BYTES;
/// Stretches that are read ahead of those that are being copied.
const AHEAD: usize = 2;

/// Something whose files come one after the other.
pub(in super::super) trait FileStream: Sync {
    /// Gives every file of the job that is in it to `take`: its place in the job, and its bytes.
    fn read(
        &self,
        take: &mut dyn FnMut(usize, &mut dyn Read) -> Result<(), CopyError>,
    ) -> Result<(), CopyError>;
}

/// Some bytes of a file.
pub(super) struct Stretch {
    pub(super) file: usize,
    /// Where in the file they start.
    pub(super) at: u64,
    buffer: Vec<u8>,
    length: usize,
}

impl Stretch {
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        self.buffer.get_mut(..self.length).unwrap_or_default()
    }
}

/// Both ends of what leads from the thread that reads to `threads` that copy. The buffers that go round are all the
/// memory it takes.
pub(super) fn pipe(threads: usize) -> (Feeder, Taker) {
    let (full, taken) = channel();
    let (empty, spare) = channel();
    for _ in 0..threads.saturating_add(AHEAD) {
        let _ = empty.send(vec![0; STRETCH_BYTES]);
    }
    (Feeder { full, spare }, Taker { taken: Arc::new(Mutex::new(taken)), empty })
}

/// The end that reads. It ends when there is nobody left who copies.
pub(super) struct Feeder {
    full: Sender<Stretch>,
    spare: Receiver<Vec<u8>>,
}

/// The end that copies.
#[derive(Clone)]
pub(super) struct Taker {
    taken: Arc<Mutex<Receiver<Stretch>>>,
    empty: Sender<Vec<u8>>,
}

impl Taker {
    /// What was read next; none when all has been.
    pub(super) fn next(&self) -> Option<Stretch> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
    }

    /// Lets the reading thread use the buffer again.
    pub(super) fn give_back(&self, stretch: Stretch) {
        // Nobody wants it any more where all has been read.
        let _ = self.empty.send(stretch.buffer);
    }
}

impl Feeder {
    /// Reads all streams.
    pub(super) fn run(self, shared: &Shared<'_>) -> Result<(), CopyError> {
        for stream in shared.job.streams {
            stream.read(&mut |file, contents| match shared.job.files.get(file) {
                Some(source) => self.file(shared, (file, source), contents),
                None => Ok(()),
            })?;
        }
        Ok(())
    }

    /// Reads one file, and compares what it adds up to. An empty one is a stretch, too.
    fn file(
        &self,
        shared: &Shared<'_>,
        (file, source): (usize, &SourceFile),
        contents: &mut dyn Read,
    ) -> Result<(), CopyError> {
        let failed = |e| CopyError::Read { path: source.source.clone(), source: e };
        let checksum = shared.job.checksum(file);
        let mut hasher = checksum.map(Checksum::hasher);
        let length = source.copied_bytes(source.bytes, checksum);
        let mut at = 0u64;
        loop {
            shared.go_on()?;
            let mut buffer = self.spare.recv().map_err(|_| CopyError::Interrupted)?;
            let left = usize::try_from(length.saturating_sub(at)).unwrap_or(usize::MAX);
            let room = left.min(buffer.len());
            let raw = buffer.get_mut(..room).unwrap_or_default();
            contents.read_exact(raw).map_err(failed)?;
            if let Some(hasher) = &mut hasher {
                hasher.update(raw);
            }
            let stretch = Stretch { file, at, buffer, length: room };
            self.full.send(stretch).map_err(|_| CopyError::Interrupted)?;
            at = at.saturating_add(room as u64);
            if at >= length {
                break;
            }
        }
        source.compare(checksum, hasher)
    }
}
