//! A set of piece indexes as it goes over the wire: bits, most significant first.

use std::fmt;

/// Which pieces of a file somebody has.
#[derive(Clone, PartialEq, Eq)]
pub struct Bits {
    bytes: Vec<u8>,
    len: u32,
}

/// A bit field of the wrong length, or with bits set past its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not a bit field of {len} pieces")]
pub struct NotBits {
    /// How many pieces it should tell of.
    pub len: u32,
}

impl Bits {
    /// No piece of `len`.
    pub fn none(len: u32) -> Self {
        Self { bytes: vec![0; len.div_ceil(8) as usize], len }
    }

    /// Every piece of `len`.
    pub fn all(len: u32) -> Self {
        let mut bits = Self::none(len);
        (0..len).for_each(|index| bits.set(index));
        bits
    }

    /// Reads a field of `len` pieces as it came from a stranger.
    pub fn from_bytes(bytes: &[u8], len: u32) -> Result<Self, NotBits> {
        let bits = Self { bytes: bytes.to_vec(), len };
        let spare = bits.bytes.len() * 8 - (len as usize).min(bits.bytes.len() * 8);
        let padding = bytes.last().is_some_and(|last| spare < 8 && last & ((1u16 << spare) - 1).to_le_bytes()[0] != 0);
        if bytes.len() != len.div_ceil(8) as usize || padding { Err(NotBits { len }) } else { Ok(bits) }
    }

    /// The field as it goes out: `ceil(len / 8)` bytes, unused bits 0.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many pieces it tells of.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether it tells of no piece at all, because the file has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether piece `index` is in the set; false past the end.
    pub fn has(&self, index: u32) -> bool {
        index < self.len && self.bytes[(index / 8) as usize] & (0x80 >> (index % 8)) != 0
    }

    /// Adds piece `index`; past the end nothing happens.
    pub fn set(&mut self, index: u32) {
        if index < self.len {
            self.bytes[(index / 8) as usize] |= 0x80 >> (index % 8);
        }
    }

    /// Takes piece `index` out.
    pub fn clear(&mut self, index: u32) {
        if index < self.len {
            self.bytes[(index / 8) as usize] &= !(0x80 >> (index % 8));
        }
    }

    /// How many pieces are in the set.
    pub fn count(&self) -> u32 {
        self.bytes.iter().map(|byte| byte.count_ones()).sum()
    }

    /// Whether every piece is in the set.
    pub fn is_full(&self) -> bool {
        self.count() == self.len
    }

    /// The pieces in the set, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.len).filter(|index| self.has(*index))
    }
}

impl fmt::Debug for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// The order of bits is on the wire; a reader with the other order would ask for pieces that are not there.
    #[test]
    fn most_significant_first() {
        let mut bits = Bits::none(10);
        bits.set(0);
        bits.set(9);
        bits.set(10);
        assert_eq!(bits.as_bytes(), [0x80, 0x40]);
        assert_eq!(bits.iter().collect::<Vec<_>>(), [0, 9]);
        bits.clear(0);
        assert_eq!((bits.count(), bits.has(0), bits.has(9), bits.has(10)), (1, false, true, false));
    }

    /// A field that does not fit the file is refused whole, and never read past its end.
    #[test]
    fn refuses_what_does_not_fit() {
        for (bytes, len, fits) in [
            (&[0xff][..], 8, true),
            (&[0xff], 7, false),
            (&[0xfe], 7, true),
            (&[], 0, true),
            (&[0], 0, false),
            (&[0xff], 9, false),
            (&[0xff, 0x80], 9, true),
            (&[0xff, 0xc0], 9, false),
            (&[0, 0, 0], 9, false),
        ] {
            assert_eq!(Bits::from_bytes(bytes, len).is_ok(), fits, "{bytes:?} of {len}");
        }
        assert!(Bits::all(13).is_full());
        assert_eq!(Bits::from_bytes(Bits::all(13).as_bytes(), 13).unwrap(), Bits::all(13));
    }
}
