//! `pv`: what poolfs nodes say about a contact, in one extra key of BEP 5 messages.
//!
//! A canonical bencoded dictionary of at most [`PV_BYTES_MAX`] bytes: `d` deltas (list), `f` flags (integer), `k` Ed25519
//! public key (32 bytes). A delta is a list: digest of the old file (32 bytes), bytes of the delta (integer), digest of
//! the delta (32 bytes), and, for one that is kept as a BEP 44 item, its target (20 bytes). Unknown entries of at most
//! [`PV_UNKNOWN_BYTES_MAX`] are kept as they came, so that later versions can add some. It is a hint: nothing in it is
//! believed before the content verifies.

use super::scan::scan;
use super::{Id, message::int};
use bt_bencode::Value;

/// Longest `pv`.
pub const PV_BYTES_MAX: usize = 512;

/// Deltas in one `pv`.
pub const PV_DELTAS_MAX: usize = 4;

/// Longest unknown entry, key and value as bencoded.
pub const PV_UNKNOWN_BYTES_MAX: usize = 64;

/// [`Pv::flags`]: the holder is still downloading.
pub const FLAG_PARTIAL: u64 = 1;

/// [`Pv::flags`]: the holder has been dialled from outside.
pub const FLAG_REACHABLE: u64 = 2;

/// A way from an older file to the announced one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delta {
    /// SHA-256 of the older file.
    pub old: [u8; 32],
    /// Length of the delta.
    pub bytes: u64,
    /// SHA-256 of the delta: it is asked for like any file.
    pub delta: [u8; 32],
    /// BEP 44 target of a delta of at most 996 bytes that was put into the DHT.
    pub target: Option<Id>,
}

/// A checked `pv`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pv {
    /// Ed25519 public key of the holder; whoever connects checks it on what the holder signed.
    pub key: [u8; 32],
    /// [`FLAG_PARTIAL`], [`FLAG_REACHABLE`]; unknown bits are kept.
    pub flags: u64,
    /// At most [`PV_DELTAS_MAX`].
    pub deltas: Vec<Delta>,
}

/// Why bytes are not a `pv`. An announce that carries them is stored without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PvError {
    /// More than [`PV_BYTES_MAX`].
    #[error("pv longer than {PV_BYTES_MAX} bytes")]
    TooLong,
    /// Not one dictionary in its canonical writing, or too deep or too many tokens.
    #[error("pv is not a canonical dictionary")]
    NotCanonical,
    /// `k` missing or not 32 bytes.
    #[error("pv has no key of 32 bytes")]
    Key,
    /// `f` not an integer from 0.
    #[error("pv flags are not a number")]
    Flags,
    /// `d` not a list of at most [`PV_DELTAS_MAX`] deltas.
    #[error("pv deltas are not a list of at most {PV_DELTAS_MAX}")]
    Deltas,
    /// An unknown entry longer than [`PV_UNKNOWN_BYTES_MAX`].
    #[error("unknown pv entry of more than {PV_UNKNOWN_BYTES_MAX} bytes")]
    Unknown,
}

impl Pv {
    /// Reads and checks one.
    ///
    /// # Errors
    /// [`PvError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, PvError> {
        if bytes.len() > PV_BYTES_MAX {
            return Err(PvError::TooLong);
        }
        if bytes.first() != Some(&b'd') || !scan(bytes).is_ok_and(|s| s.canonical) {
            return Err(PvError::NotCanonical);
        }
        let value: Value = bt_bencode::from_slice(bytes).map_err(|_| PvError::NotCanonical)?;
        let Value::Dict(dict) = value else { return Err(PvError::NotCanonical) };
        let mut pv = Self { key: [0; 32], flags: 0, deltas: Vec::new() };
        let mut has_key = false;
        for (name, value) in &dict {
            match name.as_slice() {
                b"k" => {
                    pv.key = bytes32(value).ok_or(PvError::Key)?;
                    has_key = true;
                }
                b"f" => pv.flags = value.as_u64().ok_or(PvError::Flags)?,
                b"d" => {
                    let list = value.as_list().filter(|l| l.len() <= PV_DELTAS_MAX).ok_or(PvError::Deltas)?;
                    pv.deltas = list.iter().map(delta).collect::<Option<_>>().ok_or(PvError::Deltas)?;
                }
                other => {
                    let entry = bt_bencode::to_vec(value).map_err(|_| PvError::NotCanonical)?;
                    if other.len() + other.len().to_string().len() + 1 + entry.len() > PV_UNKNOWN_BYTES_MAX {
                        return Err(PvError::Unknown);
                    }
                }
            }
        }
        if has_key { Ok(pv) } else { Err(PvError::Key) }
    }

    /// The canonical bytes. Deltas past [`PV_DELTAS_MAX`] are left out, the last ones first.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![b'd'];
        if !self.deltas.is_empty() {
            out.extend_from_slice(b"1:dl");
            for delta in self.deltas.iter().take(PV_DELTAS_MAX) {
                out.extend_from_slice(b"l32:");
                out.extend_from_slice(&delta.old);
                out.extend_from_slice(format!("i{}e32:", delta.bytes).as_bytes());
                out.extend_from_slice(&delta.delta);
                if let Some(target) = delta.target {
                    out.extend_from_slice(b"20:");
                    out.extend_from_slice(&target.0);
                }
                out.push(b'e');
            }
            out.push(b'e');
        }
        out.extend_from_slice(format!("1:fi{}e1:k32:", self.flags).as_bytes());
        out.extend_from_slice(&self.key);
        out.push(b'e');
        debug_assert!(out.len() <= PV_BYTES_MAX);
        out
    }
}

fn bytes32(value: &Value) -> Option<[u8; 32]> {
    value.as_byte_str()?.as_slice().try_into().ok()
}

fn delta(value: &Value) -> Option<Delta> {
    let list = value.as_list()?;
    let target = match list.get(3) {
        None => None,
        Some(target) => Some(Id::from_slice(target.as_byte_str()?)?),
    };
    if list.len() > 4 {
        return None;
    }
    Some(Delta { old: bytes32(list.first()?)?, bytes: u64::try_from(int(list.get(1)?)?).ok()?, delta: bytes32(list.get(2)?)?, target })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn full() -> Pv {
        let delta = |n, target| Delta { old: [n; 32], bytes: 1_234_567, delta: [n + 1; 32], target };
        Pv { key: [9; 32], flags: 3, deltas: vec![delta(1, Some(Id([5; 20]))), delta(2, None), delta(3, None), delta(4, None)] }
    }

    /// The sizes that the datagram budget is made of.
    #[test]
    fn golden_and_sizes() {
        let plain = Pv { key: [b'K'; 32], flags: 3, deltas: vec![] };
        assert_eq!(plain.encode(), format!("d1:fi3e1:k32:{}e", "K".repeat(32)).into_bytes());
        assert_eq!(plain.encode().len(), 46);
        let mut pv = full();
        assert_eq!(pv.encode().len(), 46 + 86 + 3 * 81 + 23);
        assert_eq!(Pv::parse(&pv.encode()), Ok(pv.clone()));
        pv.deltas.truncate(1);
        pv.deltas[0].target = None;
        assert_eq!(pv.encode().len(), 46 + 86);
        assert_eq!(Pv::parse(&plain.encode()), Ok(plain));
    }

    /// What must not be stored or believed: each rule with the bytes that break just it.
    #[test]
    fn refuses() {
        let k = format!("1:k32:{}", "K".repeat(32));
        let check = |text: String, want| assert_eq!(Pv::parse(text.as_bytes()).map(drop), want, "{text}");
        check(format!("d{k}e"), Ok(()));
        check(format!("d{k}1:x10:0123456789e"), Ok(()));
        check("de".into(), Err(PvError::Key));
        check("d1:k31:0123456789012345678901234567890e".into(), Err(PvError::Key));
        check("d1:ki1ee".into(), Err(PvError::Key));
        check(format!("d1:fi-1e{k}e"), Err(PvError::Flags));
        check(format!("d1:f1:3{k}e"), Err(PvError::Flags));
        check(format!("d1:dle1:fi03e{k}e"), Err(PvError::NotCanonical));
        check(format!("d{k}1:fi3ee"), Err(PvError::NotCanonical));
        check(format!("d{k}e "), Err(PvError::NotCanonical));
        check(format!("l{k}e"), Err(PvError::NotCanonical));
        check("i1e".into(), Err(PvError::NotCanonical));
        check(format!("d1:d{}{k}e", "l".repeat(50)), Err(PvError::NotCanonical));
        check(format!("d1:dlllllllllllleeeeeeeeeeee{k}e"), Err(PvError::NotCanonical));
        check(format!("d1:di1e{k}e"), Err(PvError::Deltas));
        check(format!("d1:dl{}e{k}e", "le".repeat(5)), Err(PvError::Deltas));
        check(format!("d1:dllee{k}e"), Err(PvError::Deltas));
        // Key "1:x" is 3 bytes, "58:" 3, so 58 bytes of text make the entry 64 and 59 one too many.
        check(format!("d{k}1:x58:{}e", "x".repeat(58)), Ok(()));
        check(format!("d{k}1:x59:{}e", "x".repeat(59)), Err(PvError::Unknown));
        check(format!("d{k}1:x{}e", "x".repeat(500)), Err(PvError::TooLong));
        let pad = |n: usize| format!("d{k}{}e", (0..n).map(|i| format!("3:x{i:02}40:{}", "p".repeat(40))).collect::<String>());
        check(pad(9), Ok(()));
        check(pad(10), Err(PvError::TooLong));
    }
}
