//! What an answer sends: a few bytes at hand, or a file piece by piece, each checked in the buffer that is sent.

use super::Counts;
use super::rate::Bucket;
use crate::peer::{Partial, Shelf, Shelved};
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use poolfs_core::piece::{self, BLOCK_BYTES, PIECE_BYTES};
use poolfs_core::{BlockSum, Digest};
use rustix::io::Errno;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinHandle;
use tokio::time::{Instant, Sleep, sleep_until};

/// Bytes sent at once where the rate is limited: small, so that each of many receivers gets some all the time.
const LIMITED_BYTES: usize = 16 * 1024;

/// Where the bytes of a file come from, and what they must be.
pub(super) enum Reader {
    /// A verified file: BLAKE3 of each block.
    Whole { shelved: Shelved, digest: Digest, shelf: Arc<dyn Shelf> },
    /// A file on its way here: SHA-256 of each piece as its signed list says.
    Part(Partial),
}

impl Reader {
    /// Reads from `range.start` to the end of its piece, or of the range. Blocks for the disk.
    ///
    /// Everything read is checked before any of it is given. Where a block is not what its sum says, the shelf is told.
    pub(super) fn read(&self, range: &Range<u64>) -> io::Result<Bytes> {
        let (unit, size) = match self {
            Self::Whole { shelved, .. } => (PIECE_BYTES, shelved.sums.size),
            Self::Part(partial) => (partial.shape.piece_bytes, partial.shape.size),
        };
        let index = range.start / u64::from(unit);
        let mut span = piece::span(index, size, unit);
        let end = span.end.min(range.end);
        let bad = || io::Error::new(io::ErrorKind::InvalidData, "the bytes on disk are not what they should be");
        let bytes = match self {
            Self::Whole { shelved, digest, shelf } => {
                // Only the blocks that hold some of the range.
                let blocks = piece::covering(range.start..end, size, BLOCK_BYTES);
                span = piece::span(blocks.start, size, BLOCK_BYTES).start..piece::span(blocks.end - 1, size, BLOCK_BYTES).end;
                let bytes = read_exact(&shelved.file, &span)?;
                let wrong = bytes.chunks(BLOCK_BYTES as usize).zip(blocks).find(|(block, index)| {
                    let sum = usize::try_from(*index).ok().and_then(|index| shelved.sums.blocks.get(index));
                    sum != Some(&BlockSum::of(block))
                });
                if let Some((_, block)) = wrong {
                    shelf.damaged(digest, block);
                    return Err(bad());
                }
                bytes
            }
            Self::Part(partial) => {
                let index = u32::try_from(index).map_err(|_| bad())?;
                let sum = partial.list.pieces.get(index as usize).filter(|_| partial.have.has(index)).ok_or_else(bad)?;
                let bytes = read_exact(&partial.file, &span)?;
                if Digest::of(&bytes) != *sum {
                    return Err(bad());
                }
                bytes
            }
        };
        let within = |offset: u64| usize::try_from(offset - span.start).expect("less than a piece");
        Ok(Bytes::from(bytes).slice(within(range.start)..within(end)))
    }
}

/// The bytes `span` of a file; an error where it ends before.
fn read_exact(file: &impl AsFd, span: &Range<u64>) -> io::Result<Vec<u8>> {
    let len = usize::try_from(span.end - span.start).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let at = span.start + bytes.len() as u64;
        match rustix::io::pread(file, rustix::buffer::spare_capacity(&mut bytes), at) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(err) => return Err(err.into()),
        }
    }
    // The allocator may have given more room than was asked for.
    bytes.truncate(len);
    Ok(bytes)
}

/// The body of an answer.
pub(super) enum Body {
    /// At hand.
    Full(Option<Bytes>),
    /// From a file.
    File(Box<FileBody>),
}

/// A part of a file on its way out.
pub(super) struct FileBody {
    reader: Arc<Reader>,
    /// What is still to be read; what was read lies in `state`.
    rest: Range<u64>,
    state: State,
    /// The shared rate, for who is beyond this machine's networks.
    bucket: Option<Arc<Bucket>>,
    counts: Arc<Counts>,
    /// The place among the answers under way, free again when the body is dropped and no read of it hangs.
    slot: Arc<OwnedSemaphorePermit>,
}

enum State {
    Read(Bytes),
    Reading(JoinHandle<io::Result<Bytes>>),
    /// Until it may go.
    Waiting(Pin<Box<Sleep>>, Bytes, Bytes),
    End,
}

impl FileBody {
    /// `range` of the file, of which `first` was read already.
    pub(super) fn new(
        reader: Reader,
        range: Range<u64>,
        first: Bytes,
        bucket: Option<Arc<Bucket>>,
        counts: Arc<Counts>,
        slot: OwnedSemaphorePermit,
    ) -> Self {
        let rest = range.start + first.len() as u64..range.end;
        Self { reader: Arc::new(reader), rest, state: State::Read(first), bucket, counts, slot: Arc::new(slot) }
    }

    /// Begins to read what comes next, while what is here goes out.
    fn read_on(&mut self) {
        if self.rest.is_empty() {
            self.state = State::End;
            return;
        }
        let (reader, rest, slot) = (Arc::clone(&self.reader), self.rest.clone(), Arc::clone(&self.slot));
        self.state = State::Reading(tokio::task::spawn_blocking(move || {
            let _held = slot;
            reader.read(&rest)
        }));
    }

    fn send(&mut self, now: Bytes, later: Bytes) -> Bytes {
        let len = now.len() as u64;
        self.counts.bytes.fetch_add(len, Ordering::Relaxed);
        if self.bucket.is_some() {
            self.counts.bytes_outside.fetch_add(len, Ordering::Relaxed);
        }
        if later.is_empty() {
            self.read_on();
        } else {
            self.state = State::Read(later);
        }
        now
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        loop {
            match std::mem::replace(&mut self.state, State::End) {
                State::End => return Poll::Ready(None),
                State::Read(mut bytes) => {
                    let Some(bucket) = &self.bucket else { return Poll::Ready(Some(Ok(self.send(bytes, Bytes::new())))) };
                    if bucket.is_shut() {
                        // Who waits for the rest would hold a slot until he gives up.
                        return Poll::Ready(Some(Err(io::Error::other("nothing is given any more"))));
                    }
                    let now = bytes.split_to(bytes.len().min(LIMITED_BYTES));
                    let at = bucket.take(now.len());
                    if at <= Instant::now() {
                        return Poll::Ready(Some(Ok(self.send(now, bytes))));
                    }
                    self.state = State::Waiting(Box::pin(sleep_until(at)), now, bytes);
                }
                State::Waiting(mut sleep, now, later) => {
                    if sleep.as_mut().poll(cx).is_pending() {
                        self.state = State::Waiting(sleep, now, later);
                        return Poll::Pending;
                    }
                    return Poll::Ready(Some(Ok(self.send(now, later))));
                }
                State::Reading(mut task) => {
                    let Poll::Ready(read) = Pin::new(&mut task).poll(cx) else {
                        self.state = State::Reading(task);
                        return Poll::Pending;
                    };
                    match read.map_err(io::Error::other).flatten() {
                        Ok(bytes) => {
                            self.rest.start += bytes.len() as u64;
                            self.state = State::Read(bytes);
                        }
                        Err(err) => {
                            super::bump(&self.counts.damaged);
                            tracing::debug!(%err, "an answer is cut");
                            return Poll::Ready(Some(Err(err)));
                        }
                    }
                }
            }
        }
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match &mut *self {
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::File(file) => Poll::Ready(ready!(file.poll(cx)).map(|read| read.map(Frame::data))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(bytes) => bytes.is_none(),
            Self::File(file) => matches!(file.state, State::End),
        }
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(match self {
            Self::Full(bytes) => bytes.as_ref().map_or(0, |bytes| bytes.len() as u64),
            Self::File(file) => {
                let held = match &file.state {
                    State::Read(bytes) => bytes.len(),
                    State::Waiting(_, now, later) => now.len() + later.len(),
                    State::Reading(_) | State::End => 0,
                };
                file.rest.end - file.rest.start + held as u64
            }
        })
    }
}
