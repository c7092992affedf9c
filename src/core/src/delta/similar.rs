//! What of the new file is nearly what the old one has, as differences of bytes (the idea of bsdiff, C. Percival 2003).
//!
//! A program that was compiled again has every address a little further on: no long run of bytes stays, while the differences are
//! few and alike. [`subtract`] turns the new file into one that is mostly zeros and says in commands where it was taken from;
//! [`add`] turns it back. Both work in place, so that no third file lies in memory.
//!
//! A command is three numbers: bytes that are differences, bytes that are themselves, and how far the old file's place lies from
//! where the last command's differences ended (zigzag). Bytes behind the last command are themselves.

use super::recipe::{put_number, take_number};

/// The most bytes of commands.
pub(super) const COMMANDS_BYTES_MAX: usize = 4 << 20;

/// A stretch has at least this many equal bytes to begin with: with fewer, chance finds too many.
const SEED_BYTES: usize = 48;

/// Every so many bytes of the old file can be found: an index of 64 MiB for the largest.
const INDEX_STEP: usize = 8;

/// Another place has to have so many more equal bytes than the present one.
const BETTER_BY: usize = 16;

/// As far as places are compared: bounds the time by a multiple of the file's length.
const COMPARED_BYTES_MAX: usize = 256;

/// No place.
const NONE: u32 = u32::MAX;

/// Where the old file has which bytes: the first place of each hash.
struct Index<'a> {
    old: &'a [u8],
    places: Vec<u32>,
    bits: u32,
}

impl<'a> Index<'a> {
    fn of(old: &'a [u8]) -> Self {
        let bits = (usize::BITS - (old.len() / INDEX_STEP).leading_zeros()).clamp(10, 25);
        let mut places = vec![NONE; 1 << bits];
        for (at, seed) in old.windows(SEED_BYTES).enumerate().step_by(INDEX_STEP) {
            let place = &mut places[hash(seed, bits)];
            if *place == NONE {
                *place = u32::try_from(at).unwrap_or(NONE);
            }
        }
        Self { old, places, bits }
    }

    /// A place with at least [`SEED_BYTES`] of the first bytes of `new`, and how many are equal.
    fn find(&self, new: &[u8]) -> Option<(usize, usize)> {
        let place = self.places[hash(new.get(..SEED_BYTES)?, self.bits)];
        let at = usize::try_from(place).ok().filter(|_| place != NONE)?;
        let equal = equal_bytes(&self.old[at..], new);
        (equal >= SEED_BYTES).then_some((at, equal))
    }
}

/// Of the first and the last eight bytes.
fn hash(seed: &[u8], bits: u32) -> usize {
    let word = |bytes: Option<&[u8; 8]>| bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let mixed = word(seed.first_chunk()).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ word(seed.last_chunk()).rotate_left(31).wrapping_mul(0xc2b2_ae3d_27d4_eb4f);
    usize::try_from(mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - bits)).unwrap_or(0)
}

/// How many of the first bytes are equal, up to [`COMPARED_BYTES_MAX`].
fn equal_bytes(a: &[u8], b: &[u8]) -> usize {
    let most = a.len().min(b.len()).min(COMPARED_BYTES_MAX);
    let words = a[..most].chunks_exact(8).zip(b[..most].chunks_exact(8)).take_while(|(a, b)| a == b).count() * 8;
    words + a[words..most].iter().zip(&b[words..most]).take_while(|(a, b)| a == b).count()
}

/// How many of the pairs to take so that more than half of them are equal by as much as possible.
fn best_length(pairs: impl Iterator<Item = bool>) -> usize {
    let (mut score, mut best, mut length) = (0_isize, 0, 0);
    for (index, equal) in pairs.enumerate() {
        score += if equal { 1 } else { -1 };
        if score > best {
            (best, length) = (score, index + 1);
        }
    }
    length
}

/// Turns `new` into its differences from `old`, and returns the commands that [`add`] wants.
pub(super) fn subtract(old: &[u8], new: &mut [u8]) -> Vec<u8> {
    let index = Index::of(old);
    let mut commands = Commands::default();
    // The stretch that is open: where it began in both files.
    let (mut begin, mut begin_old) = (0_usize, 0_usize);
    let mut scan = 0;
    while scan < new.len() {
        let (at, equal) = next_place(&index, new, scan, begin_old.wrapping_sub(begin));
        scan = at;
        let place = equal.map(|(place, _)| place);
        let forward = best_length(new[begin..scan].iter().zip(old.get(begin_old..).unwrap_or_default()).map(|(new, old)| new == old));
        let backward =
            place.map_or(0, |place| best_length(new[begin..scan].iter().rev().zip(old[..place].iter().rev()).map(|(new, old)| new == old)));
        let (forward, backward) = match place {
            Some(place) => divide(old, new, (begin, begin_old, forward), (scan, place, backward)),
            None => (forward, 0),
        };
        let plain = scan - backward - begin - forward;
        if !commands.push(forward, plain, begin_old) {
            return commands.bytes;
        }
        new[begin..begin + forward].iter_mut().zip(&old[begin_old..]).for_each(|(new, old)| *new = new.wrapping_sub(*old));
        let Some((place, equal)) = equal else { break };
        (begin, begin_old) = (scan - backward, place - backward);
        scan += equal;
    }
    commands.bytes
}

/// From `scan` on, the first byte from which another place of the old file has clearly more equal bytes than the open stretch,
/// whose bytes lie `shift` further on there; the place, and how many. The end of `new` if there is none.
fn next_place(index: &Index<'_>, new: &[u8], mut scan: usize, shift: usize) -> (usize, Option<(usize, usize)>) {
    let is_kept = |at: usize| index.old.get(at.wrapping_add(shift)) == Some(&new[at]);
    // Of the bytes from `scan` to `counted`, those that the open stretch has.
    let (mut kept, mut counted) = (0_usize, scan);
    while scan < new.len() {
        let here = index.old.get(scan.wrapping_add(shift)..).map_or(0, |old| equal_bytes(old, &new[scan..]));
        let found = if here < COMPARED_BYTES_MAX { index.find(&new[scan..]).filter(|(_, equal)| *equal > here) } else { None };
        let equal = found.map_or(here, |(_, equal)| equal);
        while counted < scan + equal {
            kept += usize::from(is_kept(counted));
            counted += 1;
        }
        if let Some((place, equal)) = found.filter(|(_, equal)| *equal > kept + BETTER_BY) {
            return (scan, Some((place, equal)));
        }
        let step = if equal == kept && equal > 0 { equal } else { 1 };
        for _ in 0..step {
            kept -= usize::from(scan < counted && is_kept(scan));
            scan += 1;
        }
        counted = counted.max(scan);
    }
    (new.len(), None)
}

/// Where two stretches overlap, the byte up to which the earlier one is the better one: the new lengths, forward of the first
/// and backward of the second. Each is where it begins in `new` and in `old`, and its length.
fn divide(old: &[u8], new: &[u8], first: (usize, usize, usize), second: (usize, usize, usize)) -> (usize, usize) {
    let ((begin, begin_old, forward), (scan, place, backward)) = (first, second);
    let Some(overlap) = (begin + forward + backward).checked_sub(scan).filter(|overlap| *overlap > 0) else {
        return (forward, backward);
    };
    let (mut score, mut best, mut length) = (0_isize, 0, 0);
    for at in 0..overlap {
        let byte = new[scan - backward + at];
        score += isize::from(byte == old[begin_old + forward - overlap + at]) - isize::from(byte == old[place - backward + at]);
        if score > best {
            (best, length) = (score, at + 1);
        }
    }
    (forward + length - overlap, backward - length)
}

#[derive(Default)]
struct Commands {
    bytes: Vec<u8>,
    /// Where the last one's differences ended in the old file.
    place: usize,
}

impl Commands {
    /// Adds one; `false`: there are too many.
    fn push(&mut self, differences: usize, plain: usize, place: usize) -> bool {
        // A number has at most ten bytes.
        if self.bytes.len() + 30 > COMMANDS_BYTES_MAX {
            return false;
        }
        let signed = place.cast_signed().wrapping_sub(self.place.cast_signed()) as i64;
        put_number(differences as u64, &mut self.bytes);
        put_number(plain as u64, &mut self.bytes);
        put_number(((signed << 1) ^ (signed >> 63)).cast_unsigned(), &mut self.bytes);
        self.place = place + differences;
        true
    }
}

/// Turns differences back into the new file. `None`: commands that lead out of either file, or that are none.
pub(super) fn add(old: &[u8], body: &mut [u8], mut commands: &[u8]) -> Option<()> {
    let (mut at, mut place) = (0_usize, 0_usize);
    while !commands.is_empty() {
        let mut number = || take_number(&mut commands).ok();
        let (differences, plain, zigzag) = (number()?, number()?, number()?);
        let signed = (zigzag >> 1).cast_signed() ^ -((zigzag & 1).cast_signed());
        let differences = usize::try_from(differences).ok()?;
        place = place.checked_add_signed(isize::try_from(signed).ok()?)?;
        let (end, end_old) = (at.checked_add(differences)?, place.checked_add(differences)?);
        let (body, old) = (body.get_mut(at..end)?, old.get(place..end_old)?);
        body.iter_mut().zip(old).for_each(|(body, old)| *body = body.wrapping_add(*old));
        at = end.checked_add(usize::try_from(plain).ok()?)?;
        place = end_old;
    }
    (at <= body.len()).then_some(())
}
