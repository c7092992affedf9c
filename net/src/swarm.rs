//! Which piece from whom, and who lied: the machines that bring a file in from many peers that may not be trusted.
//!
//! Nothing here opens a socket, reads a clock or starts a task. Each machine takes events and the time and returns what
//! to do next, so that the same code runs behind sockets and in a simulator at any size. A piece's length is a parameter.
//!
//! - [`blame`] decides which bytes are the file and who gave others.
//! - [`piece_list`] is the signed list that lets one wrong piece be told at once.
//!
//! **Invariant:** guilt comes only from bytes that contradict the whole file's digest, from two answers of one source
//! that contradict each other, or from a signature; never from slowness, silence or suspicion.

pub mod bits;
pub mod blame;
pub mod driver;
pub mod fleet;
pub mod piece_list;
pub mod rating;
pub mod schedule;

use poolfs_core::Digest;
use poolfs_core::piece::{self, PIECE_BYTES, SMALL_FILE_BYTES_MAX};

/// Sources that one download knows at once.
pub const SOURCES_MAX: usize = 64;

/// One source within one download: its index in the order in which the download heard of it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SourceId(pub u16);

impl SourceId {
    /// The index into tables of sources.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// What kind of source it is: the mirror is trusted more than a peer, and what lies here is asked of nobody.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SourceKind {
    /// Pieces that were here when the download started, from givers not remembered.
    Here,
    /// A node that serves pieces over HTTP.
    Peer,
    /// The HTTP origin. A download has at most one.
    Mirror,
}

/// Why a request for a piece brought no piece. None of these is ever guilt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failure {
    /// Fewer bytes than promised, or a broken transfer: thrown away, the piece is wholly the next source's.
    Short,
    /// Past its deadline and given up.
    Slow,
    /// 404 or 503 for what it announced.
    Refused,
    /// It cannot be reached.
    Gone,
}

/// What a download is of, and how it is cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileShape {
    /// SHA-256 of the whole file.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Bytes of a piece; only the last may be shorter.
    pub piece_bytes: u32,
}

impl FileShape {
    /// The shape that every node gives a file: one piece up to [`SMALL_FILE_BYTES_MAX`], past that [`PIECE_BYTES`] each.
    pub fn of(digest: Digest, size: u64) -> Self {
        let piece_bytes = if size <= SMALL_FILE_BYTES_MAX { u32::try_from(size.max(1)).expect("at most 512 KiB") } else { PIECE_BYTES };
        Self { digest, size, piece_bytes }
    }

    /// How many pieces it has: none for an empty file.
    ///
    /// # Panics
    /// If the file has more than `u32::MAX` pieces: the catalog refuses such a size.
    pub fn pieces(&self) -> u32 {
        u32::try_from(piece::count(self.size, self.piece_bytes)).expect("the catalog holds no file of 2^32 pieces")
    }

    /// Bytes of piece `index`: 0 past the end.
    pub fn piece_len(&self, index: u32) -> u32 {
        let span = piece::span(u64::from(index), self.size, self.piece_bytes);
        u32::try_from(span.end - span.start).expect("a piece's length is a u32")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file at the border of one piece must be cut the same on every node, or lists and piece requests do not fit.
    #[test]
    fn shapes_at_the_borders() {
        let digest = Digest::of(b"");
        for (size, pieces, last) in [
            (0, 0, 0),
            (1, 1, 1),
            (SMALL_FILE_BYTES_MAX, 1, 524_288),
            (SMALL_FILE_BYTES_MAX + 1, 3, 1),
            (4 * u64::from(PIECE_BYTES), 4, PIECE_BYTES),
        ] {
            let shape = FileShape::of(digest, size);
            assert_eq!(shape.pieces(), pieces, "{size}");
            assert_eq!(shape.piece_len(pieces.saturating_sub(1)), last, "{size}");
            assert_eq!(shape.piece_len(pieces), 0, "{size}");
        }
    }
}
