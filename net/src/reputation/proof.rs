//! Proofs: what somebody signed, in the form in which he handed it over, so that whoever has the truth can compare.
//!
//! | kind | bytes of the proof |
//! |---|---|
//! | false list | the list as on the wire ([`PieceList::encode`]) |
//! | false delta claim | the claim as on the wire (200 bytes), then the delta |
//!
//! Its name is its SHA-256, which stands in the statement.

use crate::krpc::Statement;
use crate::krpc::statement::Kind;
use crate::peer::{Audience, CLAIM_BYTES, DeltaClaim, Shelf};
use crate::swarm::FileShape;
use crate::swarm::piece_list::{LIST_BYTES_MAX, PieceList};
use poolfs_core::Digest;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Longest proof, in bytes.
pub const PROOF_BYTES_MAX: usize = LIST_BYTES_MAX;

/// What this machine knows to be true: called where it may block.
pub trait Truth: Send + Sync + 'static {
    /// Length and piece digests of a verified file that is here; `None` if it is not.
    fn file(&self, digest: &Digest) -> Option<(u64, Vec<Digest>)>;

    /// Whether `delta` makes the claimed file of the old one; `None` where that cannot be told here.
    fn delta(&self, claim: &DeltaClaim, delta: &[u8]) -> Option<bool>;
}

/// The files on a shelf.
pub struct ShelfTruth(pub Arc<dyn Shelf>);

impl std::fmt::Debug for ShelfTruth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("ShelfTruth").finish()
    }
}

impl Truth for ShelfTruth {
    fn file(&self, digest: &Digest) -> Option<(u64, Vec<Digest>)> {
        shelf_truth(&*self.0, digest)
    }

    fn delta(&self, _: &DeltaClaim, _: &[u8]) -> Option<bool> {
        None
    }
}

/// [`Truth::file`] of what is on a shelf.
pub fn shelf_truth(shelf: &(impl Shelf + ?Sized), digest: &Digest) -> Option<(u64, Vec<Digest>)> {
    let sums = shelf.find(digest, Audience::Fleet)?.sums;
    let is_one_piece = FileShape::of(*digest, sums.size).pieces() == 1;
    Some((sums.size, if is_one_piece { vec![*digest] } else { sums.pieces.clone() }))
}

/// What a proof came to here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Checked {
    /// The subject signed it, and a verified file of this machine contradicts it.
    Right,
    /// This machine has not what it takes to tell.
    NoCopy,
    /// It is of somebody else, of another file, out of date, not signed, or true.
    Wrong,
}

/// Holds a proof against what is true here, at `now_s` in Unix seconds.
pub fn check(statement: &Statement, proof: &[u8], truth: &dyn Truth, now_s: u64) -> Checked {
    let digest = Digest(statement.digest);
    if Digest::of(proof).0 != statement.proof || proof.len() > PROOF_BYTES_MAX {
        return Checked::Wrong;
    }
    match statement.kind {
        Kind::FalseList => {
            let Some((size, pieces)) = truth.file(&digest) else { return Checked::NoCopy };
            match PieceList::decode(proof, &FileShape::of(digest, size), now_s) {
                Ok(list) if list.signer == statement.subject && list.pieces != pieces => Checked::Right,
                _ => Checked::Wrong,
            }
        }
        Kind::FalseDelta => {
            let Some((claim, delta)) = proof.split_at_checked(CLAIM_BYTES) else { return Checked::Wrong };
            let Ok(claim) = DeltaClaim::decode(claim, now_s) else { return Checked::Wrong };
            if claim.signer != statement.subject || claim.new != digest || Digest::of(delta) != claim.delta {
                return Checked::Wrong;
            }
            match truth.delta(&claim, delta) {
                Some(false) => Checked::Right,
                Some(true) => Checked::Wrong,
                None => Checked::NoCopy,
            }
        }
        Kind::FalseBytes => Checked::Wrong,
    }
}

/// The proof of a false delta claim; `None` if it is too long for one.
pub fn of_delta(claim: &DeltaClaim, delta: &[u8]) -> Option<Vec<u8>> {
    let proof = [&claim.encode()[..], delta].concat();
    (proof.len() <= PROOF_BYTES_MAX).then_some(proof)
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use ed25519_dalek::SigningKey;
    use std::collections::HashMap;

    pub(crate) const NOW_S: u64 = 1_800_000_000;

    /// Files and deltas that are known.
    #[derive(Default)]
    pub(crate) struct Known {
        pub(crate) files: HashMap<Digest, Vec<u8>>,
        /// What a delta makes.
        pub(crate) deltas: HashMap<Digest, Digest>,
    }

    impl Known {
        pub(crate) fn of(files: &[&[u8]]) -> Self {
            Self { files: files.iter().map(|file| (Digest::of(file), file.to_vec())).collect(), deltas: HashMap::new() }
        }
    }

    impl Truth for Known {
        fn file(&self, digest: &Digest) -> Option<(u64, Vec<Digest>)> {
            let bytes = self.files.get(digest)?;
            let shape = FileShape::of(*digest, bytes.len() as u64);
            Some((shape.size, bytes.chunks(shape.piece_bytes as usize).map(Digest::of).collect()))
        }

        fn delta(&self, claim: &DeltaClaim, delta: &[u8]) -> Option<bool> {
            self.files.get(&claim.old)?;
            Some(self.deltas.get(&Digest::of(delta)) == Some(&claim.new))
        }
    }

    pub(crate) fn key(n: u8) -> SigningKey {
        SigningKey::from_bytes(&[n; 32])
    }

    pub(crate) fn public(n: u8) -> [u8; 32] {
        key(n).verifying_key().to_bytes()
    }

    /// A list of `file` whose piece 1 is false, if `is_false`, signed by `signer`; with the shape.
    pub(crate) fn list(file: &[u8], signer: u8, is_false: bool) -> Vec<u8> {
        let shape = FileShape::of(Digest::of(file), file.len() as u64);
        let mut pieces: Vec<Digest> = file.chunks(shape.piece_bytes as usize).map(Digest::of).collect();
        if is_false {
            pieces[1] = Digest::of(b"false");
        }
        PieceList::sign(&shape, pieces, &key(signer), NOW_S).encode(&shape)
    }

    pub(crate) fn statement(kind: Kind, file: &[u8], subject: u8, speaker: u8, proof: &[u8]) -> Statement {
        Statement {
            kind,
            piece: 1,
            size: file.len() as u64,
            proof_at: "[::]:0".parse().unwrap(),
            subject: public(subject),
            speaker: public(speaker),
            digest: Digest::of(file).0,
            proof: Digest::of(proof).0,
            time_s: NOW_S,
        }
    }

    pub(crate) fn file() -> Vec<u8> {
        (0..700_000u32).map(|at| u8::try_from(at / 3 % 251).unwrap()).collect()
    }

    /// Whoever could make a proof count that proves nothing could lower honest peers; who cannot check must not believe.
    #[test]
    fn lists() {
        let file = file();
        let here = Known::of(&[&file]);
        let proof = list(&file, 7, true);
        let said = |proof: &[u8]| statement(Kind::FalseList, &file, 7, 1, proof);
        assert_eq!(check(&said(&proof), &proof, &here, NOW_S), Checked::Right);
        assert_eq!(check(&said(&proof), &proof, &Known::default(), NOW_S), Checked::NoCopy, "has not the file");
        let honest = list(&file, 7, false);
        assert_eq!(check(&said(&honest), &honest, &here, NOW_S), Checked::Wrong, "a true list");
        let of_another = list(&file, 8, true);
        assert_eq!(check(&said(&of_another), &of_another, &here, NOW_S), Checked::Wrong, "signed by somebody else");
        assert_eq!(check(&said(&proof), &of_another, &here, NOW_S), Checked::Wrong, "not the proof that was named");
        let mut forged = proof.clone();
        forged[60] ^= 1;
        assert_eq!(check(&said(&forged), &forged, &here, NOW_S), Checked::Wrong, "not signed");
        assert_eq!(check(&said(&proof), &proof, &here, NOW_S + 31 * 86_400), Checked::Wrong, "out of date");
        let bytes = Statement { kind: Kind::FalseBytes, ..said(&proof) };
        assert_eq!(check(&bytes, &proof, &here, NOW_S), Checked::Wrong, "bytes have no proof");
    }

    /// A false claim is shown by the delta itself, to who has the old file.
    #[test]
    fn delta_claims() {
        let (old, new) = (b"old".as_slice(), b"new".as_slice());
        let delta = b"a delta".as_slice();
        let claim = DeltaClaim::sign(Digest::of(old), Digest::of(new), Digest::of(delta), &key(7), NOW_S);
        let proof = of_delta(&claim, delta).unwrap();
        let said = statement(Kind::FalseDelta, new, 7, 1, &proof);
        let mut here = Known::of(&[old]);
        assert_eq!(check(&said, &proof, &here, NOW_S), Checked::Right);
        assert_eq!(check(&said, &proof, &Known::of(&[new]), NOW_S), Checked::NoCopy);
        here.deltas.insert(Digest::of(delta), Digest::of(new));
        assert_eq!(check(&said, &proof, &here, NOW_S), Checked::Wrong, "it does make the file");
        let other = of_delta(&claim, b"another delta").unwrap();
        let said = statement(Kind::FalseDelta, new, 7, 1, &other);
        assert_eq!(check(&said, &other, &Known::of(&[old]), NOW_S), Checked::Wrong, "of a delta that he did not sign for");
        assert!(of_delta(&claim, &vec![0; PROOF_BYTES_MAX]).is_none());
    }
}
