//! A signed list of a file's pieces: who signed it says that the file verified with these pieces.
//!
//! On the wire, big-endian: the file's digest (32 bytes), its size (u64), bytes of a piece (u32), SHA-256 of each piece
//! (32 each, their number follows from the size), the signer's key (32), the time of signing (u64, Unix seconds) and the
//! signature (64) over "poolfs-1 list\0", digest, size, bytes of a piece, SHA-256 of the digests in order, time.
//!
//! Only a node that has verified the whole file signs a list, so a list that the file contradicts proves its signer a liar
//! to everybody who has the file. It is believed by nobody before the file has verified: it only makes a wrong piece show
//! at once.

use super::FileShape;
use crate::dht::PIECE_KEYS_PER_FILE_MAX;
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use poolfs_core::Digest;
use sha2::{Digest as _, Sha256};

/// Longest list that is read, in bytes on the wire.
pub const LIST_BYTES_MAX: usize = 8 * 1024 * 1024;

/// A signature older than this is void, in seconds.
pub const SIGNED_AGE_S_MAX: u64 = 30 * 24 * 3600;

/// A signature from further ahead than this is void, in seconds: clocks differ a little.
pub const SIGNED_AHEAD_S_MAX: u64 = 10 * 60;

const DOMAIN: &[u8] = b"poolfs-1 list\0";
const HEAD_BYTES: usize = 32 + 8 + 4;
const TAIL_BYTES: usize = 32 + 8 + 64;

/// A list whose signature was checked, of a file that is known.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PieceList {
    /// SHA-256 of each piece, in order.
    pub pieces: Vec<Digest>,
    /// The key that signed it.
    pub signer: [u8; 32],
    /// When, in Unix seconds.
    pub signed_at: u64,
    /// The signature, so that the list can be shown to others as proof.
    pub signature: [u8; 64],
}

/// Why bytes are not a list for this file. All of them mean the same to the caller: there is no list from this source.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotAList {
    /// Too long, too short, or not of as many pieces as the file has.
    #[error("piece list of {0} bytes does not have the file's length")]
    Length(usize),
    /// Of another file, or cut otherwise.
    #[error("piece list is of another file")]
    OtherFile,
    /// Signed too long ago, or in the future.
    #[error("piece list was signed at {0}, which is void")]
    Time(u64),
    /// The signature does not fit.
    #[error("piece list has a bad signature")]
    Signature,
}

impl PieceList {
    /// Signs the pieces of a file that was verified here, at `now_s` in Unix seconds.
    pub fn sign(shape: &FileShape, pieces: Vec<Digest>, key: &SigningKey, now_s: u64) -> Self {
        let signature = key.sign(&message(shape, &pieces, now_s)).to_bytes();
        Self { pieces, signer: key.verifying_key().to_bytes(), signed_at: now_s, signature }
    }

    /// The pieces that are announced of a file that is not whole yet, at most [`PIECE_KEYS_PER_FILE_MAX`]: those with the smallest
    /// digests. So all who have the list agree on them, and whoever looks for a holder need not guess which pieces it told of.
    pub fn told(&self) -> Vec<Digest> {
        let mut told = self.pieces.clone();
        told.sort_unstable();
        told.dedup();
        told.truncate(PIECE_KEYS_PER_FILE_MAX);
        told
    }

    /// How long the list of such a file is on the wire.
    pub fn encoded_bytes(shape: &FileShape) -> usize {
        HEAD_BYTES + 32 * shape.pieces() as usize + TAIL_BYTES
    }

    /// The list as it goes over the wire.
    pub fn encode(&self, shape: &FileShape) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::encoded_bytes(shape));
        out.extend_from_slice(&shape.digest.0);
        out.extend_from_slice(&shape.size.to_be_bytes());
        out.extend_from_slice(&shape.piece_bytes.to_be_bytes());
        self.pieces.iter().for_each(|piece| out.extend_from_slice(&piece.0));
        out.extend_from_slice(&self.signer);
        out.extend_from_slice(&self.signed_at.to_be_bytes());
        out.extend_from_slice(&self.signature);
        out
    }

    /// Reads a list for the file `shape` as it came from a stranger, and checks its time and its signature.
    pub fn decode(bytes: &[u8], shape: &FileShape, now_s: u64) -> Result<Self, NotAList> {
        let wrong_length = NotAList::Length(bytes.len());
        if bytes.len() != Self::encoded_bytes(shape) || bytes.len() > LIST_BYTES_MAX {
            return Err(wrong_length);
        }
        let (digest, rest) = bytes.split_first_chunk::<32>().ok_or(wrong_length)?;
        let (size, rest) = rest.split_first_chunk::<8>().ok_or(wrong_length)?;
        let (piece_bytes, rest) = rest.split_first_chunk::<4>().ok_or(wrong_length)?;
        let (rest, signature) = rest.split_last_chunk::<64>().ok_or(wrong_length)?;
        let (rest, time) = rest.split_last_chunk::<8>().ok_or(wrong_length)?;
        let (rest, signer) = rest.split_last_chunk::<32>().ok_or(wrong_length)?;
        let said = FileShape { digest: Digest(*digest), size: u64::from_be_bytes(*size), piece_bytes: u32::from_be_bytes(*piece_bytes) };
        if said != *shape {
            return Err(NotAList::OtherFile);
        }
        let signed_at = u64::from_be_bytes(*time);
        if signed_at > now_s.saturating_add(SIGNED_AHEAD_S_MAX) || signed_at < now_s.saturating_sub(SIGNED_AGE_S_MAX) {
            return Err(NotAList::Time(signed_at));
        }
        let (chunks, _) = rest.as_chunks::<32>();
        let pieces: Vec<Digest> = chunks.iter().map(|chunk| Digest(*chunk)).collect();
        let key = VerifyingKey::from_bytes(signer).map_err(|_| NotAList::Signature)?;
        key.verify_strict(&message(shape, &pieces, signed_at), &Signature::from_bytes(signature)).map_err(|_| NotAList::Signature)?;
        Ok(Self { pieces, signer: *signer, signed_at, signature: *signature })
    }
}

fn message(shape: &FileShape, pieces: &[Digest], time: u64) -> Vec<u8> {
    let mut list = Sha256::new();
    pieces.iter().for_each(|piece| list.update(piece.0));
    let mut out = DOMAIN.to_vec();
    out.extend_from_slice(&shape.digest.0);
    out.extend_from_slice(&shape.size.to_be_bytes());
    out.extend_from_slice(&shape.piece_bytes.to_be_bytes());
    out.extend_from_slice(&list.finalize());
    out.extend_from_slice(&time.to_be_bytes());
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const NOW_S: u64 = 1_800_000_000;

    fn example() -> (FileShape, PieceList) {
        let bytes = b"ten bytes!";
        let shape = FileShape { digest: Digest::of(bytes), size: 10, piece_bytes: 4 };
        let pieces = bytes.chunks(4).map(Digest::of).collect();
        (shape, PieceList::sign(&shape, pieces, &SigningKey::from_bytes(&[7; 32]), NOW_S))
    }

    /// What one node signs another must accept, or no list ever helps.
    #[test]
    fn round_trips() {
        let (shape, list) = example();
        let wire = list.encode(&shape);
        assert_eq!(wire.len(), 44 + 3 * 32 + 104);
        assert_eq!(PieceList::decode(&wire, &shape, NOW_S), Ok(list));
    }

    /// One changed bit anywhere, a cut or an addition: no list. A forged one could put an honest signer's key out.
    #[test]
    fn refuses_every_change() {
        let (shape, list) = example();
        let wire = list.encode(&shape);
        for index in 0..wire.len() {
            let mut forged = wire.clone();
            forged[index] ^= 1;
            assert!(PieceList::decode(&forged, &shape, NOW_S).is_err(), "byte {index}");
        }
        for length in [0, 1, 43, 44, wire.len() - 32, wire.len() - 1] {
            assert_eq!(PieceList::decode(&wire[..length], &shape, NOW_S), Err(NotAList::Length(length)));
        }
        let longer = [wire.as_slice(), &[0; 32]].concat();
        assert_eq!(PieceList::decode(&longer, &shape, NOW_S), Err(NotAList::Length(longer.len())));
        let other = FileShape { piece_bytes: 5, size: 11, ..shape };
        assert_eq!(PieceList::decode(&wire, &other, NOW_S), Err(NotAList::OtherFile));
    }

    /// Who announces and who looks must choose the same pieces, and never more than the DHT is to keep of one file.
    #[test]
    fn told_pieces_are_few_and_the_same_for_all() {
        let (_, list) = example();
        let mut all = list.pieces.clone();
        all.sort_unstable();
        assert_eq!(list.told(), all);
        let pieces: Vec<Digest> = (0..500u32).map(|n| Digest::of(&(n / 2).to_be_bytes())).collect();
        let long = PieceList { pieces: pieces.clone(), ..list.clone() };
        let turned = PieceList { pieces: pieces.iter().rev().copied().collect(), ..list };
        assert_eq!(long.told(), turned.told());
        assert_eq!(long.told().len(), PIECE_KEYS_PER_FILE_MAX);
        let last = long.told()[PIECE_KEYS_PER_FILE_MAX - 1];
        assert!(pieces.iter().all(|piece| *piece > last || long.told().contains(piece)));
    }

    /// A stale or future signature is void.
    #[test]
    fn time_is_bounded() {
        let (shape, list) = example();
        let wire = list.encode(&shape);
        for (now, fits) in [
            (NOW_S - SIGNED_AHEAD_S_MAX, true),
            (NOW_S - SIGNED_AHEAD_S_MAX - 1, false),
            (NOW_S + SIGNED_AGE_S_MAX, true),
            (NOW_S + SIGNED_AGE_S_MAX + 1, false),
        ] {
            assert_eq!(PieceList::decode(&wire, &shape, now).is_ok(), fits, "{now}");
        }
    }

    /// Golden bytes of the signature: another layout of the signed message would split the network.
    #[test]
    fn signature_is_golden() {
        let (shape, list) = example();
        let mut signed = b"poolfs-1 list\0".to_vec();
        signed.extend_from_slice(&shape.digest.0);
        signed.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 4]);
        let all: Vec<u8> = list.pieces.iter().flat_map(|piece| piece.0).collect();
        signed.extend_from_slice(&Digest::of(&all).0);
        signed.extend_from_slice(&NOW_S.to_be_bytes());
        let key = SigningKey::from_bytes(&[7; 32]);
        assert_eq!(key.sign(&signed).to_bytes(), list.signature);
    }
}
