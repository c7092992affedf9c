//! How the next input is made of the ones that are kept.

use super::Target;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, RngExt as _, SeedableRng as _};

/// Changes on top of each other in one input.
const CHANGES_MAX: u32 = 6;

/// Numbers at which arithmetic goes wrong.
const NUMBERS: &[&str] = &[
    "0",
    "1",
    "-1",
    "127",
    "128",
    "255",
    "256",
    "32767",
    "65535",
    "65536",
    "262144",
    "524288",
    "2147483647",
    "2147483648",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
];

/// Makes inputs; the same seed and the same kept inputs make the same ones.
pub(super) struct Mutator {
    rng: StdRng,
    kept: Vec<Vec<u8>>,
    tokens: &'static [&'static str],
    bytes_max: usize,
}

impl Mutator {
    pub(super) fn new(target: &Target, seed: u64) -> Self {
        Self { rng: StdRng::seed_from_u64(seed), kept: Vec::new(), tokens: target.tokens, bytes_max: target.input_bytes_max }
    }

    pub(super) fn keep(&mut self, input: Vec<u8>) {
        self.kept.push(input);
    }

    pub(super) fn kept(&self) -> usize {
        self.kept.len()
    }

    /// One of the kept inputs, changed; now and then bytes that mean nothing.
    pub(super) fn next(&mut self) -> Vec<u8> {
        if self.rng.random_range(0..200) == 0 {
            let mut bytes = vec![0; self.rng.random_range(0..=self.bytes_max.min(2_048))];
            self.rng.fill_bytes(&mut bytes);
            return bytes;
        }
        // The newest are the least explored.
        let newest = self.kept.len().saturating_sub(64);
        let from = if self.rng.random_range(0..3) == 0 { &self.kept[newest..] } else { &self.kept[..] };
        let mut bytes = from.choose(&mut self.rng).cloned().unwrap_or_default();
        for _ in 0..self.rng.random_range(1..=CHANGES_MAX) {
            self.change(&mut bytes);
        }
        bytes.truncate(self.bytes_max);
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>) {
        let length = bytes.len();
        let at = self.rng.random_range(0..=length);
        let part = at..(at + self.short()).min(length);
        match self.rng.random_range(0..14) {
            0 if at < length => bytes[at] = self.rng.random(),
            1 if at < length => bytes[at] ^= 1 << self.rng.random_range(0..8),
            2 if at < length => bytes[at] = bytes[at].wrapping_add(if self.rng.random() { 1 } else { 255 }),
            3 => bytes.truncate(at),
            4 => drop(bytes.drain(part)),
            5 => {
                let copy = bytes[part].to_vec();
                let to = self.rng.random_range(0..=bytes.len());
                bytes.splice(to..to, copy);
            }
            6 => self.repeat(bytes, part),
            7 => {
                let token = self.token();
                bytes.splice(at..at, token);
            }
            8 => {
                let token = self.token();
                bytes.splice(part, token);
            }
            9 => self.number(bytes, at),
            10 => self.wide(bytes, at),
            11 => {
                // The head of this one and the tail of another.
                let other = self.kept.choose(&mut self.rng).map_or(&[][..], Vec::as_slice);
                let from = self.rng.random_range(0..=other.len());
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            12 => {
                // A part of another in the middle of this one.
                let other = self.kept.choose(&mut self.rng).map_or(&[][..], Vec::as_slice);
                let from = self.rng.random_range(0..=other.len());
                let to = self.rng.random_range(from..=other.len());
                bytes.splice(at..at, other[from..to].iter().copied());
            }
            _ => self.lines(bytes),
        }
    }

    /// A length that is mostly small.
    fn short(&mut self) -> usize {
        let bits = self.rng.random_range(0..12);
        self.rng.random_range(0..=1 << bits)
    }

    fn token(&mut self) -> Vec<u8> {
        match self.tokens.choose(&mut self.rng) {
            Some(token) if self.rng.random_range(0..4) != 0 => token.as_bytes().to_vec(),
            _ => NUMBERS.choose(&mut self.rng).map_or(&b""[..], |n| n.as_bytes()).to_vec(),
        }
    }

    /// The same bytes many times: what is quadratic shows, and what counts overflows.
    fn repeat(&mut self, bytes: &mut Vec<u8>, part: std::ops::Range<usize>) {
        let at = part.end;
        let copy = bytes[part].to_vec();
        let times = self.short().min(self.bytes_max / copy.len().max(1));
        bytes.splice(at..at, copy.repeat(times));
    }

    /// Another number where one is, else one more.
    fn number(&mut self, bytes: &mut Vec<u8>, at: usize) {
        let from = bytes[at..].iter().position(u8::is_ascii_digit).map_or(at, |skip| at + skip);
        let digits = bytes[from..].iter().take_while(|b| b.is_ascii_digit()).count();
        let number = match self.rng.random_range(0..3) {
            0 => NUMBERS.choose(&mut self.rng).map_or_else(String::new, |n| (*n).to_owned()),
            1 => {
                let old =
                    bytes[from..from + digits].iter().take(19).fold(0_u64, |n, b| n.wrapping_mul(10).wrapping_add(u64::from(b - b'0')));
                if self.rng.random() { old.wrapping_add(1) } else { old.wrapping_sub(1) }.to_string()
            }
            _ => (self.rng.random::<u64>() >> self.rng.random_range(0..64_u32)).to_string(),
        };
        bytes.splice(from..from + digits, number.into_bytes());
    }

    /// A binary number of 2, 4 or 8 bytes that is 0, all ones, or off by one from there.
    fn wide(&mut self, bytes: &mut [u8], at: usize) {
        let width = [2, 4, 8][self.rng.random_range(0..3_usize)];
        let Some(place) = bytes.get_mut(at..at + width) else { return };
        let number: u64 = match self.rng.random_range(0..4) {
            0 => 0,
            1 => u64::MAX,
            2 => 1,
            _ => 1 << self.rng.random_range(0..64_u32),
        };
        let number = number.to_be_bytes();
        place.copy_from_slice(&number[8 - width..]);
        if self.rng.random() {
            place.reverse();
        }
    }

    /// Two lines change places.
    fn lines(&mut self, bytes: &mut Vec<u8>) {
        let mut lines: Vec<&[u8]> = bytes.split_inclusive(|b| *b == b'\n').collect();
        if lines.len() < 2 {
            return;
        }
        let (a, b) = (self.rng.random_range(0..lines.len()), self.rng.random_range(0..lines.len()));
        lines.swap(a, b);
        *bytes = lines.concat();
    }
}
