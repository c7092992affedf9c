//! Node ids and keys: 160 bits, XOR distance, BEP 42.

use sha2::{Digest as _, Sha256};
use std::fmt;
use std::net::IpAddr;

/// Bits of an id, and the number of different bucket indexes.
pub const ID_BITS: usize = 160;

/// A node id or a key: both live in the same 160-bit space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Id(pub [u8; 20]);

/// The XOR of two ids, ordered as a number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Distance(pub [u8; 20]);

impl Id {
    /// The id in exactly 20 bytes; `None` for any other length.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The id in 40 hexadecimal digits; `None` for anything else.
    pub fn from_hex(text: &str) -> Option<Self> {
        let text = text.as_bytes();
        if text.len() != 40 {
            return None;
        }
        let mut out = [0; 20];
        for (byte, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
            let digit = |c: u8| char::from(c).to_digit(16).and_then(|d| u8::try_from(d).ok());
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Some(Self(out))
    }

    /// How far `other` is.
    pub fn distance(&self, other: &Self) -> Distance {
        let mut out = [0; 20];
        for ((out, a), b) in out.iter_mut().zip(self.0).zip(other.0) {
            *out = a ^ b;
        }
        Distance(out)
    }

    /// Leading bits that both have in common, 0 to [`ID_BITS`].
    pub fn common_bits(&self, other: &Self) -> usize {
        self.distance(other).leading_zeros()
    }

    /// Every bit turned: where statements about this node are kept, as far from it as can be.
    pub fn not(&self) -> Self {
        Self(self.0.map(|b| !b))
    }

    /// A random id whose first `bits` bits are those of `self` and whose next bit differs.
    pub fn random_beside(&self, bits: usize, random: [u8; 20]) -> Self {
        let mut out = random;
        for bit in 0..=bits.min(ID_BITS - 1) {
            let mask = 0x80 >> (bit % 8);
            let wanted = if bit == bits { !self.0[bit / 8] } else { self.0[bit / 8] };
            out[bit / 8] = (out[bit / 8] & !mask) | (wanted & mask);
        }
        Self(out)
    }

    /// The id of the holder of an Ed25519 public key.
    ///
    /// Bytes 3 to 18 are those of SHA-256(key), so that a clone of the key shows itself. With a public address the first
    /// 21 bits are as BEP 42 computes them from it and from `random`, which is the last byte; otherwise bytes 0 to 2 are
    /// the hash's too.
    pub fn of_key(key: &[u8; 32], address: Option<IpAddr>, random: u8) -> Self {
        let hash = Sha256::digest(key);
        let mut id = [0; 20];
        id.copy_from_slice(&hash[..20]);
        id[19] = random;
        if let Some(address) = address {
            let prefix = bep42_prefix(address, random);
            id[0] = prefix[0];
            id[1] = prefix[1];
            id[2] = (prefix[2] & 0xf8) | (id[2] & 0x07);
        }
        Self(id)
    }

    /// Whether bytes 3 to 18 are those of SHA-256(key): whether this id can belong to the key's holder.
    pub fn fits_key(&self, key: &[u8; 32]) -> bool {
        self.0[3..19] == Sha256::digest(key)[3..19]
    }

    /// Whether both ids come from one key: their bytes 3 to 18 are equal.
    pub fn same_key(&self, other: &Self) -> bool {
        self.0[3..19] == other.0[3..19]
    }

    /// Whether the id is one that BEP 42 lets the holder of `address` have.
    pub fn fits_address(&self, address: IpAddr) -> bool {
        let prefix = bep42_prefix(address, self.0[19]);
        self.0[0] == prefix[0] && self.0[1] == prefix[1] && (self.0[2] ^ prefix[2]) & 0xf8 == 0
    }
}

/// The first three bytes of BEP 42: CRC32-C of the masked address with three bits of `random` in its top; only the first
/// 21 bits count.
fn bep42_prefix(address: IpAddr, random: u8) -> [u8; 3] {
    const MASK_V4: [u8; 4] = [0x03, 0x0f, 0x3f, 0xff];
    const MASK_V6: [u8; 8] = [0x01, 0x03, 0x07, 0x0f, 0x1f, 0x3f, 0x7f, 0xff];
    let mut octets = [0; 8];
    let length = match address {
        IpAddr::V4(v4) => {
            octets[..4].copy_from_slice(&v4.octets());
            octets.iter_mut().zip(MASK_V4).for_each(|(byte, mask)| *byte &= mask);
            4
        }
        IpAddr::V6(v6) => {
            octets.copy_from_slice(&v6.octets()[..8]);
            octets.iter_mut().zip(MASK_V6).for_each(|(byte, mask)| *byte &= mask);
            8
        }
    };
    octets[0] |= (random & 0x07) << 5;
    let crc = crc32c::crc32c(&octets[..length]).to_be_bytes();
    [crc[0], crc[1], crc[2]]
}

impl Distance {
    /// Leading zero bits: the common bits of the two ids.
    pub fn leading_zeros(&self) -> usize {
        let bytes = self.0.iter().take_while(|b| **b == 0).count();
        bytes * 8 + self.0.get(bytes).map_or(0, |b| b.leading_zeros() as usize)
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// The five examples of BEP 42: an id computed otherwise is refused by every node that enforces it.
    #[test]
    fn bep42_vectors() {
        for (address, random, id) in [
            ("124.31.75.21", 1, "5fbfbff10c5d6a4ec8a88e4c6ab4c28b95eee401"),
            ("21.75.31.124", 86, "5a3ce9c14e7a08645677bbd1cfe7d8f956d53256"),
            ("65.23.51.170", 22, "a5d43220bc8f112a3d426c84764f8c2a1150e616"),
            ("84.124.73.14", 65, "1b0321dd1bb1fe518101ceef99462b947a01ff41"),
            ("43.213.53.83", 90, "e56f6cbf5b7c4be0237986d5243b87aa6d51305a"),
        ] {
            let id = Id::from_hex(id).unwrap();
            let address: IpAddr = address.parse().unwrap();
            assert!(id.fits_address(address), "{address}");
            let made = Id::of_key(&[7; 32], Some(address), random);
            assert_eq!((made.0[0], made.0[1], made.0[2] & 0xf8), (id.0[0], id.0[1], id.0[2] & 0xf8), "{address}");
            assert!(made.fits_key(&[7; 32]) && made.fits_address(address));
            assert!(!id.fits_address("8.8.8.8".parse().unwrap()));
        }
    }

    /// The id keeps the key's bytes 3 to 18 whatever the address is: that is what shows a clone.
    #[test]
    fn ids_show_their_key() {
        let a = Id::of_key(&[1; 32], None, 3);
        let b = Id::of_key(&[1; 32], Some("2001:db8::1".parse().unwrap()), 99);
        assert!(a.same_key(&b) && a != b);
        assert!(!a.same_key(&Id::of_key(&[2; 32], None, 3)));
        assert!(!b.fits_key(&[2; 32]));
    }

    #[test]
    fn distances() {
        let zero = Id([0; 20]);
        assert_eq!(zero.common_bits(&zero), ID_BITS);
        assert_eq!(zero.not().0, [0xff; 20]);
        for bits in [0, 1, 7, 8, 9, 100, 159] {
            let beside = zero.not().random_beside(bits, [0x5a; 20]);
            assert_eq!(beside.common_bits(&zero.not()), bits);
        }
        assert_eq!(Id::from_hex(&zero.not().to_string()), Some(zero.not()));
        assert_eq!(Id::from_hex("00"), None);
    }
}
