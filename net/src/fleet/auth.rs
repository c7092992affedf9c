//! The fleet key: what shows that a datagram or request comes from a machine of the same fleet.
//!
//! A question carries a *tag* of [`TAG_BYTES`]: the time, a nonce and 16 bytes of HMAC-SHA256 over both and everything that is
//! asked. Its answer carries [`REPLY_TAG_BYTES`] of HMAC over the question's nonce and everything that is answered, so that an
//! answer fits one question only. Layout of a tag, big-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0-7 | seconds since 1970 |
//! | 8-15 | nonce |
//! | 16-31 | HMAC |
//!
//! In a datagram the tag is the value of the key `ha`, in a request and its answer that of the header [`HEADER`], in
//! lower-case hex. A [`Gate`] takes a tag once, and only within [`TIME_DIFFERENCE_S_MAX`] of this machine's clock. Whoever has
//! the key can do what any member can; it hides nothing, since packages are public.

use crate::krpc::Id;
use hmac::{Hmac, KeyInit as _, Mac as _};
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use subtle::ConstantTimeEq as _;

/// Bytes of a fleet key.
pub const KEY_BYTES: usize = 32;

/// Bytes of a question's tag.
pub const TAG_BYTES: usize = 32;

/// Bytes of an answer's tag.
pub const REPLY_TAG_BYTES: usize = 16;

/// The HTTP header that holds a tag in hex.
pub const HEADER: &str = "Poolfs-Auth";

/// How far a tag's time may lie from this machine's clock, either way.
pub const TIME_DIFFERENCE_S_MAX: u64 = 300;

/// Nonces remembered. Past it the oldest go, and with them everything as old is refused: what comes without delay still passes.
pub const NONCES_MAX: usize = 200_000;

/// Seconds that share one set of nonces.
const SLOT_S: u64 = 10;

const QUESTION: &[u8] = b"poolfs-1 fleet question\0";
const ANSWER: &[u8] = b"poolfs-1 fleet answer\0";

/// Longest key file that is read: hex with space around it.
const KEY_FILE_BYTES_MAX: u64 = 1024;

/// Why a key file is not used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It cannot be read.
    #[error("read fleet key {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's word for it.
        source: io::Error,
    },
    /// It holds something else.
    #[error(
        "fleet key {path} has neither {KEY_BYTES} bytes nor {} hexadecimal digits; make one with `openssl rand -hex 32`",
        2 * KEY_BYTES
    )]
    Form {
        /// The file.
        path: PathBuf,
    },
}

/// Why a tag is not taken. Whoever sent it is told nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Not [`TAG_BYTES`] long.
    #[error("tag has a wrong length")]
    Form,
    /// Made with another key, or for another question.
    #[error("tag does not fit the fleet key")]
    Key,
    /// Too old or from the future: one of the two clocks is wrong, or somebody kept it.
    #[error("tag is {TIME_DIFFERENCE_S_MAX} s or more off this machine's clock")]
    Time,
    /// It was here before.
    #[error("tag was used before")]
    Replayed,
}

/// What names one question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Nonce(pub [u8; 8]);

/// The key that the machines of a fleet share.
#[derive(Clone)]
pub struct FleetKey([u8; KEY_BYTES]);

impl fmt::Debug for FleetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FleetKey(..)")
    }
}

impl FleetKey {
    /// A key from its bytes.
    pub fn new(key: [u8; KEY_BYTES]) -> Self {
        Self(key)
    }

    /// Its bytes, for the process that joins.
    pub fn to_bytes(&self) -> [u8; KEY_BYTES] {
        self.0
    }

    /// The key of the machines that have none: anybody can make its tags, and they prove nothing.
    pub fn open() -> Self {
        Self(Sha256::digest(b"poolfs-1 fleet without a key\0").into())
    }

    /// Reads a key file: [`KEY_BYTES`] bytes as they are, or in hexadecimal digits with white space around.
    ///
    /// # Errors
    /// [`KeyFileError`], which names the file and never what is in it.
    pub fn load(path: &Path) -> Result<Self, KeyFileError> {
        let read = || -> io::Result<Vec<u8>> {
            let mut bytes = Vec::new();
            fs::File::open(path)?.take(KEY_FILE_BYTES_MAX).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let bytes = read().map_err(|source| KeyFileError::Read { path: path.to_owned(), source })?;
        let raw = <[u8; KEY_BYTES]>::try_from(bytes.as_slice()).ok();
        let key = raw.or_else(|| from_hex(bytes.trim_ascii())?.try_into().ok());
        key.map(Self).ok_or_else(|| KeyFileError::Form { path: path.to_owned() })
    }

    /// The DHT key under which the fleet's members find each other; it tells nothing of the fleet key.
    pub fn topic(&self) -> Id {
        let mut mac = self.mac();
        mac.update(b"topic");
        let hash = Sha256::new().chain_update(b"poolfs-1 fleet\0").chain_update(mac.finalize().into_bytes()).finalize();
        Id::from_slice(&hash[..20]).expect("20 bytes of 32")
    }

    /// The tag of a question. `parts` is what is asked; their number and lengths count too.
    pub fn sign(&self, nonce: Nonce, now_s: u64, parts: &[&[u8]]) -> [u8; TAG_BYTES] {
        let mut tag = [0; TAG_BYTES];
        tag[..8].copy_from_slice(&now_s.to_be_bytes());
        tag[8..16].copy_from_slice(&nonce.0);
        let mac = self.over(QUESTION, &tag[..16], parts);
        tag[16..].copy_from_slice(&mac);
        tag
    }

    /// The tag of the answer to the question with this nonce.
    pub fn sign_reply(&self, nonce: Nonce, parts: &[&[u8]]) -> [u8; REPLY_TAG_BYTES] {
        self.over(ANSWER, &nonce.0, parts)
    }

    /// Whether `tag` is that of an answer to the question with this nonce; takes the same time whichever byte differs.
    pub fn check_reply(&self, nonce: Nonce, tag: &[u8], parts: &[&[u8]]) -> bool {
        self.sign_reply(nonce, parts).as_slice().ct_eq(tag).into()
    }

    fn mac(&self) -> Hmac<Sha256> {
        Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length")
    }

    fn over(&self, domain: &[u8], head: &[u8], parts: &[&[u8]]) -> [u8; 16] {
        let mut mac = self.mac();
        mac.update(domain);
        mac.update(head);
        for part in parts {
            mac.update(&(part.len() as u64).to_be_bytes());
            mac.update(part);
        }
        let (mac, _) = mac.finalize().into_bytes().split_first_chunk::<16>().map(|(a, b)| (*a, b.len())).expect("SHA-256 has 32 bytes");
        mac
    }
}

/// Takes tags of questions, each once.
#[derive(Debug)]
pub struct Gate {
    key: FleetKey,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    /// By the slot of the tag's time.
    slots: BTreeMap<u64, HashSet<Nonce>>,
    count: usize,
    /// Slots before this one are forgotten, and refused.
    floor: u64,
}

impl Gate {
    /// Nothing was seen yet. A restart forgets what was seen, so that a question of the last minutes passes once more; all
    /// that members ask may be asked twice.
    pub fn new(key: FleetKey) -> Self {
        Self { key, seen: Mutex::default() }
    }

    /// The key.
    pub fn key(&self) -> &FleetKey {
        &self.key
    }

    /// Takes a question's tag.
    ///
    /// # Errors
    /// [`Refused`]: no answer of any kind, or the one that a stranger gets.
    pub fn check(&self, tag: &[u8], now_s: u64, parts: &[&[u8]]) -> Result<Nonce, Refused> {
        let tag: &[u8; TAG_BYTES] = tag.try_into().map_err(|_| Refused::Form)?;
        let (head, mac) = tag.split_at(16);
        if !bool::from(self.key.over(QUESTION, head, parts).as_slice().ct_eq(mac)) {
            return Err(Refused::Key);
        }
        let (time, nonce) = head.split_at(8);
        let time_s = u64::from_be_bytes(time.try_into().expect("8 of 16 bytes"));
        let nonce = Nonce(nonce.try_into().expect("the other 8"));
        if time_s.abs_diff(now_s) >= TIME_DIFFERENCE_S_MAX {
            return Err(Refused::Time);
        }
        self.seen.lock().take(time_s / SLOT_S, nonce, now_s)?;
        Ok(nonce)
    }
}

impl Seen {
    fn take(&mut self, slot: u64, nonce: Nonce, now_s: u64) -> Result<(), Refused> {
        let oldest = now_s.saturating_sub(TIME_DIFFERENCE_S_MAX) / SLOT_S;
        while let Some(entry) = self.slots.first_entry().filter(|entry| *entry.key() < oldest) {
            self.count -= entry.remove().len();
        }
        if slot < self.floor {
            return Err(Refused::Time);
        }
        if self.count >= NONCES_MAX {
            let (forgotten, nonces) = self.slots.pop_first().expect("they are counted");
            self.count -= nonces.len();
            self.floor = forgotten + 1;
            if slot < self.floor {
                return Err(Refused::Time);
            }
        }
        if !self.slots.entry(slot).or_default().insert(nonce) {
            return Err(Refused::Replayed);
        }
        self.count += 1;
        Ok(())
    }
}

/// A tag as the header [`HEADER`] has it.
pub fn to_header(tag: &[u8]) -> String {
    tag.iter().flat_map(|byte| [byte >> 4, byte & 15]).filter_map(|digit| char::from_digit(digit.into(), 16)).collect()
}

/// Reads the header [`HEADER`]; `None` for what is no tag of a question or answer.
pub fn from_header(text: &[u8]) -> Option<Vec<u8>> {
    let lower = text.iter().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(c));
    from_hex(text).filter(|tag| lower && (tag.len() == TAG_BYTES || tag.len() == REPLY_TAG_BYTES))
}

fn from_hex(text: &[u8]) -> Option<Vec<u8>> {
    if text.len() > 2 * KEY_BYTES || !text.len().is_multiple_of(2) {
        return None;
    }
    let digit = |c: u8| char::from(c).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    text.chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn key() -> FleetKey {
        FleetKey::new(*b"0123456789abcdef0123456789abcdef")
    }

    fn nonce(n: u64) -> Nonce {
        Nonce(n.to_be_bytes())
    }

    /// Two versions of the program could not talk to each other; the values were computed with Python's hmac module.
    #[test]
    fn tags_are_golden() {
        let tag = key().sign(nonce(7), NOW, &[b"GET", b"/v1/members"]);
        assert_eq!(to_header(&tag), "000000006b49d2000000000000000007dd7bf3b0b33d1af9818f86e709323205");
        assert_eq!(to_header(&key().sign_reply(nonce(7), &[b"200"])), "bf94fbb4e3a99cf7beaff8ce2ef25001");
        assert_eq!(key().topic().to_string(), "64d9000caff04d10775594844b78188db2f17176");
        assert_eq!(from_header(to_header(&tag).as_bytes()).unwrap(), tag);
        for bad in ["", "0", "zz", "00", &to_header(&tag)[1..], &to_header(&tag).to_uppercase(), &"0".repeat(66)] {
            assert_eq!(from_header(bad.as_bytes()), None, "{bad}");
        }
    }

    /// A tag that fits anything else, or passes twice, would let a stranger in.
    #[test]
    fn a_tag_passes_once_and_only_for_its_question() {
        let gate = Gate::new(key());
        let parts: [&[u8]; 2] = [b"GET", b"/v1/have"];
        let tag = key().sign(nonce(1), NOW, &parts);
        for (parts, at) in [(&[b"GET".as_slice(), b"/v1/file"], 0), (&[b"GET/v1".as_slice(), b"/have"], 0)] {
            assert_eq!(gate.check(&tag, NOW + at, parts), Err(Refused::Key));
        }
        assert_eq!(gate.check(&tag, NOW, &[b"GET/v1/have"]), Err(Refused::Key), "other borders of the parts");
        for byte in 0..TAG_BYTES {
            let mut other = tag;
            other[byte] ^= 1;
            assert_eq!(gate.check(&other, NOW, &parts), Err(Refused::Key), "byte {byte}");
        }
        for len in [0, 16, 31] {
            assert_eq!(gate.check(&tag[..len], NOW, &parts), Err(Refused::Form));
        }
        assert_eq!(gate.check(&tag, NOW + 300, &parts), Err(Refused::Time));
        assert_eq!(gate.check(&tag, NOW - 300, &parts), Err(Refused::Time));
        assert_eq!(Gate::new(FleetKey::new([1; 32])).check(&tag, NOW, &parts), Err(Refused::Key));
        assert_eq!(gate.check(&tag, NOW + 299, &parts), Ok(nonce(1)));
        assert_eq!(gate.check(&tag, NOW + 299, &parts), Err(Refused::Replayed));
    }

    /// An answer kept from another question, or made without the key, would send this machine where a stranger likes.
    #[test]
    fn an_answer_fits_one_question() {
        let tag = key().sign_reply(nonce(1), &[b"body"]);
        assert!(key().check_reply(nonce(1), &tag, &[b"body"]));
        assert!(!key().check_reply(nonce(2), &tag, &[b"body"]) && !key().check_reply(nonce(1), &tag, &[b"other"]));
        assert!(!key().check_reply(nonce(1), &tag[1..], &[b"body"]) && !key().check_reply(nonce(1), b"", &[b"body"]));
        assert!(!FleetKey::open().check_reply(nonce(1), &tag, &[b"body"]));
    }

    /// What a flood of good tags may take is bounded, and a forgotten nonce never passes again.
    #[test]
    fn nonces_are_bounded() {
        let gate = Gate::new(key());
        let at = |n: u64| NOW - 250 + n / 1_000;
        let take = |n: u64, now_s| gate.check(&key().sign(nonce(n), at(n), &[]), now_s, &[]);
        let many = NONCES_MAX as u64 + 20_000;
        for n in 0..many {
            assert_eq!(take(n, NOW), Ok(nonce(n)));
            assert!(gate.seen.lock().count <= NONCES_MAX);
        }
        assert_eq!(take(0, NOW), Err(Refused::Time), "forgotten");
        assert_eq!(take(many - 1, NOW), Err(Refused::Replayed));
        assert_eq!(gate.check(&key().sign(nonce(many), NOW + 1_000, &[]), NOW + 1_000, &[]), Ok(nonce(many)));
        assert_eq!(gate.seen.lock().count, 1, "what is too old to pass is not remembered");
    }

    /// A key file with a newline is what people make; anything else must be said, and never shown.
    #[test]
    fn key_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let load = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            FleetKey::load(&path)
        };
        assert_eq!(load(&[9; 32]).unwrap().0, [9; 32]);
        assert_eq!(load(format!(" {}\n", "0A".repeat(32)).as_bytes()).unwrap().0, [10; 32]);
        for bad in [&b""[..], &[9; 31], &[9; 33], "0g".repeat(32).as_bytes(), "00".repeat(33).as_bytes()] {
            let text = load(bad).unwrap_err().to_string();
            let want = format!(
                "fleet key {} has neither 32 bytes nor 64 hexadecimal digits; make one with `openssl rand -hex 32`",
                path.display()
            );
            assert_eq!(text, want);
        }
        let missing = FleetKey::load(&dir.path().join("none")).unwrap_err().to_string();
        assert!(missing.starts_with("read fleet key ") && missing.ends_with("No such file or directory (os error 2)"), "{missing}");
        assert_eq!(format!("{:?}", key()), "FleetKey(..)");
    }
}
