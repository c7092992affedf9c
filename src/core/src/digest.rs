//! The digest that names a file everywhere, and the sums computed beside it.
//!
//! [`Digest`] is what a signed index says of a file. [`Sums`] are what this machine computed itself from the same bytes:
//! the digest of each piece (what is asked of one source, and blamed) and the checksum of each block (what is checked at
//! each read). [`Summer`] computes all three in one pass.

use crate::piece::{self, BLOCK_BYTES, PIECE_BYTES};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::str::FromStr;

/// SHA-256 of a file's bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The DHT key of a file: the first 20 bytes of SHA-256("poolfs-1 file\0" + digest).
    pub fn file_key(&self) -> [u8; 20] {
        dht_key(b"poolfs-1 file\0", &self.0)
    }

    /// The DHT key of a piece whose SHA-256 this is: as [`Self::file_key`] with "poolfs-1 piece\0".
    pub fn piece_key(&self) -> [u8; 20] {
        dht_key(b"poolfs-1 piece\0", &self.0)
    }
}

/// The first 20 bytes of SHA-256(`domain` + `value`): what separates the kinds of keys in the DHT.
pub fn dht_key(domain: &[u8], value: &[u8]) -> [u8; 20] {
    let full = Sha256::new().chain_update(domain).chain_update(value).finalize();
    let mut key = [0; 20];
    key.copy_from_slice(&full[..20]);
    key
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a SHA-256 digest of 64 hexadecimal digits")]
pub struct NotADigest;

impl FromStr for Digest {
    type Err = NotADigest;

    fn from_str(text: &str) -> Result<Self, NotADigest> {
        let text = text.as_bytes();
        if text.len() != 64 {
            return Err(NotADigest);
        }
        let mut out = [0; 32];
        for (byte, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
            let digit = |c: u8| char::from(c).to_digit(16).and_then(|d| u8::try_from(d).ok());
            let (Some(high), Some(low)) = (digit(pair[0]), digit(pair[1])) else {
                return Err(NotADigest);
            };
            *byte = high << 4 | low;
        }
        Ok(Self(out))
    }
}

impl TryFrom<String> for Digest {
    type Error = NotADigest;

    fn try_from(text: String) -> Result<Self, NotADigest> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// BLAKE3 of one block.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct BlockSum(pub [u8; 32]);

impl BlockSum {
    /// The checksum of one block's bytes.
    pub fn of(block: &[u8]) -> Self {
        Self(*blake3::hash(block).as_bytes())
    }
}

/// Everything computed from the bytes of one file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sums {
    /// SHA-256 of the whole file.
    pub digest: Digest,
    /// The file's length in bytes.
    pub size: u64,
    /// SHA-256 of each [`PIECE_BYTES`], the last may be shorter; none for an empty file.
    pub pieces: Vec<Digest>,
    /// BLAKE3 of each [`BLOCK_BYTES`], the last may be shorter; none for an empty file.
    pub blocks: Vec<BlockSum>,
}

impl Sums {
    /// The sums of a whole file at hand.
    pub fn of(bytes: &[u8]) -> Self {
        let mut summer = Summer::new();
        summer.update(bytes);
        summer.finish()
    }
}

/// Computes [`Sums`] from bytes that come in order.
#[derive(Clone)]
pub struct Summer {
    whole: Sha256,
    piece: Sha256,
    block: blake3::Hasher,
    size: u64,
    pieces: Vec<Digest>,
    blocks: Vec<BlockSum>,
}

impl fmt::Debug for Summer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Summer").field("size", &self.size).finish_non_exhaustive()
    }
}

impl Default for Summer {
    fn default() -> Self {
        Self::new()
    }
}

impl Summer {
    /// Starts before the first byte.
    pub fn new() -> Self {
        Self { whole: Sha256::new(), piece: Sha256::new(), block: blake3::Hasher::new(), size: 0, pieces: Vec::new(), blocks: Vec::new() }
    }

    /// Bytes taken so far: the offset that the next byte has.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Takes the next bytes of the file.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let in_block = piece::within(self.size, BLOCK_BYTES);
            let take = bytes.len().min(BLOCK_BYTES as usize - in_block);
            let (now, rest) = bytes.split_at(take);
            self.whole.update(now);
            self.piece.update(now);
            self.block.update(now);
            self.size += take as u64;
            if self.size.is_multiple_of(u64::from(BLOCK_BYTES)) {
                self.end_block();
            }
            if self.size.is_multiple_of(u64::from(PIECE_BYTES)) {
                self.end_piece();
            }
            bytes = rest;
        }
    }

    fn end_block(&mut self) {
        self.blocks.push(BlockSum(*self.block.finalize().as_bytes()));
        self.block.reset();
    }

    fn end_piece(&mut self) {
        self.pieces.push(Digest(self.piece.finalize_reset().into()));
    }

    /// Ends at the last byte taken.
    pub fn finish(mut self) -> Sums {
        if !self.size.is_multiple_of(u64::from(BLOCK_BYTES)) {
            self.end_block();
        }
        if !self.size.is_multiple_of(u64::from(PIECE_BYTES)) {
            self.end_piece();
        }
        Sums { digest: Digest(self.whole.finalize().into()), size: self.size, pieces: self.pieces, blocks: self.blocks }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    /// A wrong domain or length would make every key of the network unfindable.
    #[test]
    fn keys_are_golden() {
        let digest = Digest::of(b"poolfs");
        // printf 'poolfs-1 file\0' + the raw digest | sha256sum | cut -c1-40
        let hex = |key: [u8; 20]| key.iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!(hex(digest.file_key()), "4a8340104c1adfa51f05fc1a90429d4c9294e400");
        assert_eq!(hex(digest.piece_key()), "74378a1856f6066d8a188cfab19e7da45029f738");
    }

    #[test]
    fn hex_round_trips_and_refuses() {
        let digest = Digest::of(b"");
        assert_eq!(digest.to_string(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_eq!(digest.to_string().parse(), Ok(digest));
        for bad in ["", "e3", &"g".repeat(64), &"é".repeat(32), &"0".repeat(65)] {
            assert_eq!(bad.parse::<Digest>(), Err(NotADigest), "{bad}");
        }
    }

    /// However the bytes are cut, the sums are those of the whole; lengths around every border.
    #[test]
    fn sums_do_not_depend_on_cuts() {
        let block = BLOCK_BYTES as usize;
        let piece = PIECE_BYTES as usize;
        for len in [0, 1, block - 1, block, block + 1, piece - 1, piece, piece + 1, 2 * piece, 3 * piece + 77] {
            let bytes: Vec<u8> = (0..len).map(|i| u8::try_from(i * 31 % 251).expect("below 251")).collect();
            let pieces: Vec<_> = bytes.chunks(piece).map(Digest::of).collect();
            let blocks: Vec<_> = bytes.chunks(block).map(BlockSum::of).collect();
            let want = Sums { digest: Digest::of(&bytes), size: len as u64, pieces, blocks };
            assert_eq!(Sums::of(&bytes), want, "{len} at once");
            let mut summer = Summer::new();
            bytes.chunks(4097).for_each(|part| summer.update(part));
            assert_eq!(summer.finish(), want, "{len} in parts");
        }
    }
}
