//! Statements: what a node says against another, kept at the bitwise NOT of the subject's node id.
//!
//! On the wire it is a byte string of [`STATEMENT_BYTES`] under `st` in an `announce_peer` whose key is that NOT, which a
//! node of another kind stores as an ordinary contact; read back by a `get_peers` with `st` = 1 and a valid token, as the
//! list `sts`. Layout, big-endian:
//!
//! | bytes | what |
//! |---|---|
//! | 0 | version, 1 |
//! | 1 | kind, [`Kind`]: only bad ones exist |
//! | 2-5 | zero |
//! | 6-9 | piece, the first that is false |
//! | 10-17 | size of the file in bytes |
//! | 18-35 | an address: IPv6 or IPv4-mapped, port. `[::]:0`, and nobody connects to it: holders of the proof are found in the DHT |
//! | 36-67 | subject's Ed25519 key |
//! | 68-99 | speaker's Ed25519 key |
//! | 100-131 | digest of the file |
//! | 132-163 | SHA-256 of the proof |
//! | 164-171 | time, seconds since 1970 |
//! | 172-235 | signature of the speaker over "poolfs-1 statement\0" and the bytes before |
//!
//! A statement carries no weight by itself; weight and proof are not the DHT's business. An absent one means nothing.

use super::Id;
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use std::net::{Ipv6Addr, SocketAddr};

/// Length of a statement.
pub const STATEMENT_BYTES: usize = 236;

/// Bytes that the signature covers.
const SIGNED_BYTES: usize = 172;

const DOMAIN: &[u8] = b"poolfs-1 statement\0";

/// Age past which a statement is void.
pub const STATEMENT_AGE_MAX_S: u64 = 30 * 24 * 3600;

/// How far a statement's time may lie ahead of this machine's clock.
pub const STATEMENT_AHEAD_MAX_S: u64 = 10 * 60;

/// What the subject did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Signed a piece list that the file contradicts.
    FalseList = 1,
    /// Signed a delta claim that does not yield the new digest.
    FalseDelta = 2,
    /// Gave false bytes: has no proof, and weight only from a member of the reader's fleet.
    FalseBytes = 3,
}

/// A statement whose form and signature are right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    /// What the subject did.
    pub kind: Kind,
    /// The first false piece; 0 where it means nothing.
    pub piece: u32,
    /// Size of the file in bytes.
    pub size: u64,
    /// Unused: whoever speaks could send its readers anywhere by it.
    pub proof_at: SocketAddr,
    /// Key of who is spoken about.
    pub subject: [u8; 32],
    /// Key of who speaks.
    pub speaker: [u8; 32],
    /// Digest of the file.
    pub digest: [u8; 32],
    /// SHA-256 of the proof.
    pub proof: [u8; 32],
    /// Seconds since 1970.
    pub time_s: u64,
}

/// Why bytes are not a statement worth keeping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StatementError {
    /// Wrong length, version, kind or filling: also every good word about somebody.
    #[error("not a statement")]
    Form,
    /// Older than [`STATEMENT_AGE_MAX_S`] or too far ahead.
    #[error("statement is out of date")]
    Time,
    /// Signature wrong, or the speaker speaks about itself.
    #[error("statement is not signed by its speaker")]
    Signature,
}

impl Statement {
    /// Signs the statement; `speaker` is set to the key's public half.
    pub fn sign(mut self, key: &SigningKey) -> [u8; STATEMENT_BYTES] {
        self.speaker = key.verifying_key().to_bytes();
        let mut out = [0; STATEMENT_BYTES];
        out[0] = 1;
        out[1] = self.kind as u8;
        out[6..10].copy_from_slice(&self.piece.to_be_bytes());
        out[10..18].copy_from_slice(&self.size.to_be_bytes());
        let address = match self.proof_at.ip() {
            std::net::IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            std::net::IpAddr::V6(v6) => v6,
        };
        out[18..34].copy_from_slice(&address.octets());
        out[34..36].copy_from_slice(&self.proof_at.port().to_be_bytes());
        out[36..68].copy_from_slice(&self.subject);
        out[68..100].copy_from_slice(&self.speaker);
        out[100..132].copy_from_slice(&self.digest);
        out[132..164].copy_from_slice(&self.proof);
        out[164..172].copy_from_slice(&self.time_s.to_be_bytes());
        let signature = key.sign(&[DOMAIN, &out[..SIGNED_BYTES]].concat());
        out[SIGNED_BYTES..].copy_from_slice(&signature.to_bytes());
        out
    }

    /// Checks form, time against `now_s` (seconds since 1970) and signature.
    ///
    /// # Errors
    /// [`StatementError`].
    pub fn check(bytes: &[u8], now_s: u64) -> Result<Self, StatementError> {
        let bytes: &[u8; STATEMENT_BYTES] = bytes.try_into().map_err(|_| StatementError::Form)?;
        let this = Self::read(bytes)?;
        if this.time_s > now_s.saturating_add(STATEMENT_AHEAD_MAX_S) || this.time_s.saturating_add(STATEMENT_AGE_MAX_S) < now_s {
            return Err(StatementError::Time);
        }
        this.signed(bytes)
    }

    /// Checks form and signature only, of a statement whose time was looked at before.
    ///
    /// # Errors
    /// [`StatementError`].
    pub fn check_signed(bytes: &[u8; STATEMENT_BYTES]) -> Result<Self, StatementError> {
        Self::read(bytes)?.signed(bytes)
    }

    fn read(bytes: &[u8; STATEMENT_BYTES]) -> Result<Self, StatementError> {
        let kind = match bytes[1] {
            1 => Kind::FalseList,
            2 => Kind::FalseDelta,
            3 => Kind::FalseBytes,
            _ => return Err(StatementError::Form),
        };
        if bytes[0] != 1 || bytes[2..6] != [0; 4] {
            return Err(StatementError::Form);
        }
        let key32 = |from: usize| -> [u8; 32] { bytes[from..from + 32].try_into().expect("32 bytes within the layout") };
        let address: [u8; 16] = bytes[18..34].try_into().expect("16 bytes within the layout");
        Ok(Self {
            kind,
            piece: u32::from_be_bytes(bytes[6..10].try_into().expect("4 bytes within the layout")),
            size: u64::from_be_bytes(bytes[10..18].try_into().expect("8 bytes within the layout")),
            proof_at: SocketAddr::new(Ipv6Addr::from(address).to_canonical(), u16::from_be_bytes([bytes[34], bytes[35]])),
            subject: key32(36),
            speaker: key32(68),
            digest: key32(100),
            proof: key32(132),
            time_s: u64::from_be_bytes(bytes[164..172].try_into().expect("8 bytes within the layout")),
        })
    }

    fn signed(self, bytes: &[u8; STATEMENT_BYTES]) -> Result<Self, StatementError> {
        if self.speaker == self.subject {
            return Err(StatementError::Signature);
        }
        let key = VerifyingKey::from_bytes(&self.speaker).map_err(|_| StatementError::Signature)?;
        let signature = Signature::from_slice(&bytes[SIGNED_BYTES..]).map_err(|_| StatementError::Signature)?;
        key.verify_strict(&[DOMAIN, &bytes[..SIGNED_BYTES]].concat(), &signature).map_err(|_| StatementError::Signature)?;
        Ok(self)
    }

    /// Whether `place`, a DHT key, is the NOT of an id that the subject's key can have.
    pub fn belongs_at(&self, place: &Id) -> bool {
        place.not().fits_key(&self.subject)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// Every way in which a statement is void, and the place it belongs to.
    #[test]
    fn checks() {
        let key = SigningKey::from_bytes(&[3; 32]);
        let now = 1_800_000_000;
        let statement = Statement {
            kind: Kind::FalseList,
            piece: 7,
            size: 1 << 20,
            proof_at: "192.0.2.7:9977".parse().unwrap(),
            subject: [8; 32],
            speaker: key.verifying_key().to_bytes(),
            digest: [1; 32],
            proof: [2; 32],
            time_s: now,
        };
        let bytes = statement.clone().sign(&key);
        assert_eq!(Statement::check(&bytes, now), Ok(statement.clone()));
        assert!(statement.belongs_at(&Id::of_key(&[8; 32], None, 77).not()));
        assert!(!statement.belongs_at(&Id::of_key(&[8; 32], None, 77)));
        assert_eq!(Statement::check(&bytes, now + STATEMENT_AGE_MAX_S).map(drop), Ok(()));
        assert_eq!(Statement::check(&bytes, now + STATEMENT_AGE_MAX_S + 1), Err(StatementError::Time));
        assert_eq!(Statement::check(&bytes, now - STATEMENT_AHEAD_MAX_S - 1), Err(StatementError::Time));
        assert_eq!(Statement::check(&bytes[1..], now), Err(StatementError::Form));
        for (at, want) in [
            (0, StatementError::Form),
            (1, StatementError::Form),
            (3, StatementError::Form),
            (9, StatementError::Signature),
            (40, StatementError::Signature),
            (200, StatementError::Signature),
        ] {
            let mut bad = bytes;
            bad[at] ^= 0x40;
            assert_eq!(Statement::check(&bad, now), Err(want), "byte {at}");
        }
        let itself = Statement { subject: statement.speaker, ..statement }.sign(&key);
        assert_eq!(Statement::check(&itself, now), Err(StatementError::Signature));
    }
}
