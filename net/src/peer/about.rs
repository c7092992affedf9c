//! What a node says of a file beside its bytes: the same as its `pv` in the DHT, and the signed claims behind the deltas.
//!
//! On the wire a canonical bencoded dictionary: `c` a list of claims, each old, new and delta digest (32 bytes each), key
//! (32), time (u64, Unix seconds, big-endian) and signature (64) over "poolfs-1 delta\0", old, new, delta, time; `pv` the
//! bytes of [`Pv`].

use crate::krpc::{Delta, PV_BYTES_MAX, PV_DELTAS_MAX, Pv};
use crate::swarm::piece_list::{SIGNED_AGE_S_MAX, SIGNED_AHEAD_S_MAX};
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use poolfs_core::Digest;

/// Longest answer that is read, in bytes.
pub const ABOUT_BYTES_MAX: usize = 2048;

const DOMAIN: &[u8] = b"poolfs-1 delta\0";

/// Bytes of a claim.
pub const CLAIM_BYTES: usize = 4 * 32 + 8 + 64;

/// Who signed it says that `delta` applied to `old` gives `new`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeltaClaim {
    /// Digest of the file that it starts from.
    pub old: Digest,
    /// Digest of the file that it makes.
    pub new: Digest,
    /// Digest of the delta.
    pub delta: Digest,
    /// Who says so.
    pub signer: [u8; 32],
    /// When, in Unix seconds.
    pub signed_at: u64,
    /// The signature.
    pub signature: [u8; 64],
}

/// Why bytes are not an [`About`] of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ClaimError {
    /// Not the form above, or too long.
    #[error("not an about")]
    Form,
    /// A claim about another file, out of date, or with a bad signature.
    #[error("a delta claim is void")]
    Claim,
}

impl DeltaClaim {
    /// Signs that `delta` makes `new` of `old`, at `now_s` in Unix seconds.
    pub fn sign(old: Digest, new: Digest, delta: Digest, key: &SigningKey, now_s: u64) -> Self {
        let mut claim = Self { old, new, delta, signer: key.verifying_key().to_bytes(), signed_at: now_s, signature: [0; 64] };
        claim.signature = key.sign(&claim.message()).to_bytes();
        claim
    }

    fn message(&self) -> Vec<u8> {
        [DOMAIN, &self.old.0, &self.new.0, &self.delta.0, &self.signed_at.to_be_bytes()].concat()
    }

    /// The bytes on the wire.
    pub fn encode(&self) -> Vec<u8> {
        [&self.old.0[..], &self.new.0, &self.delta.0, &self.signer, &self.signed_at.to_be_bytes(), &self.signature].concat()
    }

    /// Reads and checks a claim as it came from a stranger.
    pub fn decode(bytes: &[u8], now_s: u64) -> Result<Self, ClaimError> {
        let (chunks, _) = bytes.as_chunks::<32>();
        let ([old, new, delta, signer, ..], CLAIM_BYTES) = (chunks, bytes.len()) else { return Err(ClaimError::Form) };
        let tail = &bytes[4 * 32..];
        let (time, signature) = tail.split_first_chunk::<8>().ok_or(ClaimError::Form)?;
        let signature: [u8; 64] = signature.try_into().map_err(|_| ClaimError::Form)?;
        let signed_at = u64::from_be_bytes(*time);
        let claim = Self { old: Digest(*old), new: Digest(*new), delta: Digest(*delta), signer: *signer, signed_at, signature };
        if signed_at > now_s.saturating_add(SIGNED_AHEAD_S_MAX) || signed_at < now_s.saturating_sub(SIGNED_AGE_S_MAX) {
            return Err(ClaimError::Claim);
        }
        let key = VerifyingKey::from_bytes(signer).map_err(|_| ClaimError::Claim)?;
        key.verify_strict(&claim.message(), &Signature::from_bytes(&signature)).map_err(|_| ClaimError::Claim)?;
        Ok(claim)
    }
}

/// What a node says of one file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct About {
    /// As in the DHT.
    pub pv: Pv,
    /// The claims behind its deltas, at most [`PV_DELTAS_MAX`].
    pub claims: Vec<DeltaClaim>,
}

impl About {
    /// The bytes that go out.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = b"d1:cl".to_vec();
        for claim in self.claims.iter().take(PV_DELTAS_MAX) {
            out.extend_from_slice(format!("{CLAIM_BYTES}:").as_bytes());
            out.extend_from_slice(&claim.encode());
        }
        let pv = self.pv.encode();
        out.extend_from_slice(format!("e2:pv{}:", pv.len()).as_bytes());
        out.extend_from_slice(&pv);
        out.push(b'e');
        debug_assert!(out.len() <= ABOUT_BYTES_MAX);
        out
    }

    /// Reads what a stranger says of the file `digest`. Each claim must be about it, be in date and be signed.
    pub fn decode(bytes: &[u8], digest: &Digest, now_s: u64) -> Result<Self, ClaimError> {
        let mut rest = bytes.strip_prefix(b"d1:cl").filter(|_| bytes.len() <= ABOUT_BYTES_MAX).ok_or(ClaimError::Form)?;
        let mut claims = Vec::new();
        while let Some(after) = rest.strip_prefix(b"200:") {
            let (claim, after) = after.split_at_checked(CLAIM_BYTES).ok_or(ClaimError::Form)?;
            let claim = DeltaClaim::decode(claim, now_s)?;
            if claim.new != *digest {
                return Err(ClaimError::Claim);
            }
            claims.push(claim);
            rest = after;
        }
        let rest = rest.strip_prefix(b"e2:pv").filter(|_| claims.len() <= PV_DELTAS_MAX).ok_or(ClaimError::Form)?;
        let colon = rest.iter().position(|byte| *byte == b':').filter(|at| *at <= 3).ok_or(ClaimError::Form)?;
        let len = str::from_utf8(&rest[..colon]).ok().and_then(|text| text.parse::<usize>().ok()).ok_or(ClaimError::Form)?;
        let pv = rest[colon + 1..].strip_suffix(b"e").filter(|pv| pv.len() == len && len <= PV_BYTES_MAX).ok_or(ClaimError::Form)?;
        Ok(Self { pv: Pv::parse(pv).map_err(|_| ClaimError::Form)?, claims })
    }
}

const _: () = assert!(CLAIM_BYTES == 200);

/// What the server cannot know by itself: filled by who announces, makes deltas and keeps proofs.
pub trait Facts: Send + Sync + 'static {
    /// Whether other nodes have reached this one.
    fn reachable(&self) -> bool;

    /// The deltas that make this file, with their claims; at most [`PV_DELTAS_MAX`].
    fn deltas(&self, digest: &Digest) -> Vec<(Delta, DeltaClaim)>;

    /// The proof with this SHA-256.
    fn proof(&self, id: &Digest) -> Option<Vec<u8>>;
}

/// A node that has neither deltas nor proofs.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoFacts {
    /// Whether other nodes have reached it.
    pub reachable: bool,
}

impl Facts for NoFacts {
    fn reachable(&self) -> bool {
        self.reachable
    }

    fn deltas(&self, _: &Digest) -> Vec<(Delta, DeltaClaim)> {
        Vec::new()
    }

    fn proof(&self, _: &Digest) -> Option<Vec<u8>> {
        None
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const NOW_S: u64 = 1_800_000_000;

    fn about() -> (Digest, About) {
        let key = SigningKey::from_bytes(&[5; 32]);
        let new = Digest::of(b"new");
        let claim = DeltaClaim::sign(Digest::of(b"old"), new, Digest::of(b"delta"), &key, NOW_S);
        let pv = Pv { key: key.verifying_key().to_bytes(), flags: 2, deltas: Vec::new() };
        (new, About { pv, claims: vec![claim; PV_DELTAS_MAX] })
    }

    /// What one node writes the other must read, at its longest too.
    #[test]
    fn round_trips() {
        let (new, mut about) = about();
        let wire = about.encode();
        assert_eq!(About::decode(&wire, &new, NOW_S), Ok(about.clone()));
        about.claims.clear();
        assert_eq!(about.encode(), [&b"d1:cle2:pv46:"[..], &about.pv.encode(), b"e"].concat());
        assert_eq!(About::decode(&about.encode(), &new, NOW_S), Ok(about));
    }

    /// A claim that is forged, old or about another file would blame an honest signer.
    #[test]
    fn refuses() {
        let (new, about) = about();
        let wire = about.encode();
        assert_eq!(About::decode(&wire, &Digest::of(b"other"), NOW_S), Err(ClaimError::Claim));
        assert_eq!(About::decode(&wire, &new, NOW_S + SIGNED_AGE_S_MAX + 1), Err(ClaimError::Claim));
        assert_eq!(About::decode(&wire, &new, NOW_S - SIGNED_AHEAD_S_MAX - 1), Err(ClaimError::Claim));
        for at in [9, 41, 73, 105, 137, 145, 208] {
            let mut bad = wire.clone();
            bad[at] ^= 1;
            assert_eq!(About::decode(&bad, &new, NOW_S), Err(ClaimError::Claim), "byte {at}");
        }
        for cut in [0, 4, 5, 100, wire.len() - 47, wire.len() - 1] {
            assert_eq!(About::decode(&wire[..cut], &new, NOW_S), Err(ClaimError::Form), "{cut}");
        }
        assert_eq!(About::decode(&[&wire[..], b"e"].concat(), &new, NOW_S), Err(ClaimError::Form));
        let five = About { claims: vec![about.claims[0]; 5], ..about };
        assert_eq!(five.encode(), wire, "a fifth is not sent");
    }
}
