//! A download's file, and its sums as they grow. Everything here blocks for the disk.

use poolfs_core::piece::{self, PIECE_BYTES};
use poolfs_core::store::{Incoming, Partial, StoreError};
use poolfs_core::{Digest, Summer, Sums};
use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// The seals without which the sender could change a piece while it is read.
const SEALS: SealFlags = SealFlags::WRITE.union(SealFlags::GROW).union(SealFlags::SHRINK);

/// The partial file and the sums of its complete prefix.
#[derive(Debug)]
pub(super) struct Disk {
    partial: Partial,
    missing: BTreeSet<u32>,
    /// Has taken the pieces up to the first one that was missing when it was last brought on.
    summer: Summer,
    /// A summed piece was replaced: all is summed anew at the end, not at each such piece.
    sum_at_end: bool,
}

/// What became of a piece.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Taken {
    /// Its length in bytes; 0 for one that is not what it should be.
    pub(super) bytes: u64,
    /// Whether one was there before.
    pub(super) replaced: bool,
}

impl Disk {
    /// Begins, or goes on with what an earlier download left.
    pub(super) fn begin(incoming: &Arc<Incoming>, digest: Digest, size: u64) -> Result<Self, StoreError> {
        let partial = incoming.begin(digest, size)?;
        let missing = partial.missing().into_iter().collect();
        Ok(Self { partial, missing, summer: Summer::new(), sum_at_end: false })
    }

    pub(super) fn missing(&self) -> Vec<u32> {
        self.missing.iter().copied().collect()
    }

    pub(super) fn is_complete(&self) -> bool {
        self.missing.is_empty()
    }

    pub(super) fn done_bytes(&self) -> u64 {
        self.partial.done_bytes()
    }

    /// Sums the pieces that are here from the end of the summed prefix to the next missing one.
    pub(super) fn catch_up(mut self) -> Result<Self, StoreError> {
        self.sum_prefix()?;
        Ok(self)
    }

    /// A descriptor that only reads it.
    pub(super) fn read_only(&self) -> Result<OwnedFd, StoreError> {
        self.partial.read_only()
    }

    fn sum_prefix(&mut self) -> Result<(), StoreError> {
        while self.summer.size() < self.partial.size() {
            let next = self.next_piece();
            if self.missing.contains(&next) {
                break;
            }
            let Some(bytes) = self.partial.read_piece(next)? else { break };
            self.summer.update(&bytes);
        }
        Ok(())
    }

    fn next_piece(&self) -> u32 {
        u32::try_from(self.summer.size() / u64::from(PIECE_BYTES)).expect("a download's pieces are counted in u32")
    }

    /// Takes a piece; one that is here already is replaced.
    pub(super) fn take(mut self, index: u32, memory: &OwnedFd) -> Result<(Taken, Self), StoreError> {
        let span = piece::span(index.into(), self.partial.size(), PIECE_BYTES);
        let length = span.end - span.start;
        if length == 0 {
            return Ok((Taken::default(), self));
        }
        let Some(bytes) = read_sealed(memory, length) else {
            tracing::warn!(index, digest = %self.partial.digest(), "a source handed over a piece of the wrong length or without seals");
            return Ok((Taken::default(), self));
        };
        if let Err(error) = self.partial.write_piece(index, &bytes) {
            if error.is_full() {
                self.partial.discard()?; // The room is needed more than the piece.
            }
            return Err(error);
        }
        let replaced = !self.missing.remove(&index);
        if span.start < self.summer.size() {
            self.summer = Summer::new();
            self.sum_at_end = true;
        }
        if self.sum_at_end {
            return Ok((Taken { bytes: length, replaced }, self));
        }
        if index == self.next_piece() && self.summer.size() == span.start {
            self.summer.update(&bytes);
        }
        drop(bytes);
        self.sum_prefix()?;
        Ok((Taken { bytes: length, replaced }, self))
    }

    /// Takes every missing piece from a file that is whole; returns how many bytes. A file that is shorter gives none.
    pub(super) fn fill(mut self, whole: &OwnedFd) -> Result<(u64, Self), StoreError> {
        let size = self.partial.size();
        if fstat(whole).ok().and_then(|stat| u64::try_from(stat.st_size).ok()) != Some(size) {
            return Ok((0, self));
        }
        let Ok(file) = whole.as_fd().try_clone_to_owned().map(File::from) else { return Ok((0, self)) };
        let mut taken = 0;
        for index in self.missing() {
            let span = piece::span(index.into(), size, PIECE_BYTES);
            let mut bytes = vec![0; usize::try_from(span.end - span.start).expect("at most PIECE_BYTES")];
            if file.read_exact_at(&mut bytes, span.start).is_err() {
                break;
            }
            self.partial.write_piece(index, &bytes)?;
            self.missing.remove(&index);
            taken += bytes.len() as u64;
        }
        Ok((taken, self))
    }

    /// Compares the digest. Right: the file is flushed and handed on. Wrong: it is gone.
    pub(super) fn finish(mut self) -> Result<Option<(Partial, Sums)>, StoreError> {
        self.sum_prefix()?;
        let sums = self.summer.finish();
        if sums.digest != *self.partial.digest() || sums.size != self.partial.size() {
            self.partial.discard()?;
            return Ok(None);
        }
        self.partial.sync()?;
        Ok(Some((self.partial, sums)))
    }
}

/// The `length` bytes of a piece in a sealed memfd; `None` if it is anything else, so that reading it can neither wait nor
/// change under the reader.
pub(crate) fn read_sealed(memory: &OwnedFd, length: u64) -> Option<Vec<u8>> {
    let seals = fcntl_get_seals(memory).ok()?;
    let size = u64::try_from(fstat(memory).ok()?.st_size).ok()?;
    if !seals.contains(SEALS) || size != length {
        return None;
    }
    let mut bytes = vec![0; usize::try_from(length).ok()?];
    let memory = File::from(memory.as_fd().try_clone_to_owned().ok()?);
    memory.read_exact_at(&mut bytes, 0).ok()?;
    Some(bytes)
}
