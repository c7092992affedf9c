//! What goes into the machine and what comes out of it: plain values.

use super::WasteBudget;
use crate::swarm::SourceId;
use crate::swarm::piece_list::PieceList;
use poolfs_core::Digest;
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::io;
use std::time::Instant;

/// The time of an event, and what all downloads together may waste.
#[derive(Debug)]
pub struct Turn<'a> {
    /// When it happens.
    pub now: Instant,
    /// The hour's budget.
    pub budget: &'a mut WasteBudget,
}

/// Why a piece is asked of a source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Why {
    /// It is not here yet.
    First,
    /// Two signed lists differ in it.
    Arbitrate,
    /// The second round.
    Second,
    /// Two sources gave different bytes: a third decides.
    Tie,
    /// Repair: from the mirror, or the third round.
    Repair,
}

/// A request of one piece from one source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ask {
    /// Which piece.
    pub piece: u32,
    /// Whom.
    pub source: SourceId,
    /// What for.
    pub why: Why,
}

/// One complete answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Give {
    /// Which piece.
    pub piece: u32,
    /// Who gave it.
    pub source: SourceId,
    /// SHA-256 of what he gave.
    pub digest: Digest,
    /// What it was asked for.
    pub why: Why,
}

/// What the caller does with the bytes of a give.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reception {
    /// Keep them by (piece, digest) until the download is over: no give before had these bytes at this piece.
    pub keep: bool,
}

/// Why a source is asked for nothing more in this download.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OutReason {
    /// It gave a piece that misses the signed list. Not guilt: the list may be false, and then it is asked again.
    MissesList,
    /// It gave two different versions of one piece: proved, whatever the file turns out to be.
    ContradictsItself,
}

/// What to do next.
#[derive(Debug)]
pub enum Action {
    /// These bytes are now the file's at this piece, as far as anybody knows: hand them on. A later one for the same piece
    /// takes the place of this one.
    Accept {
        /// Which piece.
        piece: u32,
        /// Which of its versions.
        digest: Digest,
        /// Who gave it.
        source: SourceId,
    },
    /// The answer to this is no longer wanted.
    Cancel {
        /// Which piece.
        piece: u32,
        /// Who was asked.
        source: SourceId,
    },
    /// Ask this source for nothing more.
    Out {
        /// Who.
        source: SourceId,
        /// Why.
        reason: OutReason,
    },
    /// Run this over the kept bytes and hand the result to [`Blame::hashed`](super::Blame::hashed).
    Hash(HashJob),
    /// The file is had; nothing more will come.
    Verified(Outcome),
    /// The file is not had; nothing more will come.
    Failed(NotHad),
}

/// Why a file is not had. Nobody is blamed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotHad {
    /// Some piece is given by nobody.
    #[error("no source gives piece {0}")]
    NoSource(u32),
    /// The mirror sent the whole file and it is not what the index names: not to be tried again for [`RETRY_AFTER`](super::RETRY_AFTER).
    #[error("the mirror's file does not have the digest that its index names")]
    MirrorWrong,
    /// What sources gave does not make the file, and the bounds are reached: not to be tried again for [`RETRY_AFTER`](super::RETRY_AFTER).
    #[error("no combination of what the sources gave has the right digest")]
    Undecided,
    /// Liars have used up the hour's allowance, and there is no mirror.
    #[error("this hour's allowance for repeated downloads is spent, and no mirror has the file")]
    BudgetSpent,
    /// The kept bytes cannot be read.
    #[error("the pieces kept on this machine cannot be read back")]
    LocalRead,
}

/// A verified file, and what it proves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// The right version of each piece; where it is not the one accepted last, hand it on first.
    pub pieces: Vec<Digest>,
    /// What each source gave, in order of [`SourceId`].
    pub verdicts: Vec<SourceVerdict>,
    /// The lists that the file contradicts, with who handed them over: their signers lied, and the list is the proof.
    pub false_lists: Vec<(SourceId, PieceList)>,
    /// Bytes that arrived for it.
    pub cost_bytes: u64,
}

/// What a verified file says of one source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SourceVerdict {
    /// Who.
    pub source: SourceId,
    /// Pieces it gave that are the file's.
    pub good: u32,
    /// Pieces it gave that are not.
    pub bad: u32,
    /// It gave two versions of one piece.
    pub contradicted_itself: bool,
}

impl SourceVerdict {
    /// Whether the source is convicted.
    pub fn is_guilty(&self) -> bool {
        self.bad > 0 || self.contradicted_itself
    }
}

/// A SHA-256 to be run over kept pieces, from a saved state.
#[derive(Clone)]
pub struct HashJob {
    pub(super) id: u64,
    pub(super) start: Sha256,
    pub(super) parts: Vec<(u32, Digest)>,
}

impl fmt::Debug for HashJob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HashJob").field("id", &self.id).field("parts", &self.parts.len()).finish()
    }
}

/// What a [`HashJob`] found: the state after each part, or the reason why a part could not be read.
pub struct HashDone {
    pub(super) id: u64,
    pub(super) states: io::Result<Vec<Sha256>>,
}

impl fmt::Debug for HashDone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let states = self.states.as_ref().map(Vec::len);
        f.debug_struct("HashDone").field("id", &self.id).field("states", &states).finish()
    }
}

impl HashJob {
    /// The kept versions that it reads, in order: piece and SHA-256.
    pub fn parts(&self) -> &[(u32, Digest)] {
        &self.parts
    }

    /// Reads the parts in order and hashes them; may take as long as reading the whole file does.
    pub fn run<B: AsRef<[u8]>>(self, mut read: impl FnMut(u32, &Digest) -> io::Result<B>) -> HashDone {
        let mut state = self.start;
        let mut states = Vec::with_capacity(self.parts.len());
        for (piece, digest) in &self.parts {
            match read(*piece, digest) {
                Ok(bytes) => state.update(bytes.as_ref()),
                Err(err) => return HashDone { id: self.id, states: Err(err) },
            }
            states.push(state.clone());
        }
        HashDone { id: self.id, states: Ok(states) }
    }
}
