//! One piece in a memfd, sealed when it is complete.

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::OwnedFd;

/// A piece that is not complete yet.
#[derive(Debug)]
pub(crate) struct PieceMemory {
    index: u32,
    /// Bytes of the file that are still to come.
    rest: Range<u64>,
    memory: File,
}

/// What a piece is after some more bytes.
#[derive(Debug)]
pub(crate) enum SealedPiece {
    /// Bytes are still to come.
    NotYet(PieceMemory),
    /// Complete: nobody can change it any more, not even who holds a descriptor.
    Done(OwnedFd),
}

impl PieceMemory {
    /// Memory for the piece that is the bytes `span` of the file.
    pub(crate) fn new(index: u32, span: &Range<u64>) -> io::Result<Self> {
        let memory = memfd_create("poolfs-piece", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        Ok(Self { index, rest: span.clone(), memory: File::from(memory) })
    }

    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    /// The offset in the file of the next byte taken.
    pub(crate) fn next_offset(&self) -> u64 {
        self.rest.start
    }

    /// Takes the next bytes, at most to the piece's end.
    pub(crate) fn take(mut self, bytes: &[u8]) -> io::Result<SealedPiece> {
        self.rest.start += bytes.len() as u64;
        assert!(self.rest.start <= self.rest.end, "bytes were cut at the piece's end");
        self.memory.write_all(bytes)?;
        if self.rest.start < self.rest.end {
            return Ok(SealedPiece::NotYet(self));
        }
        let memory = OwnedFd::from(self.memory);
        fcntl_add_seals(&memory, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        Ok(SealedPiece::Done(memory))
    }
}
