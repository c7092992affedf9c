//! What nodes say of each other, and what comes of it here: statements ([`crate::krpc::Statement`]) are made, kept, read and weighed.
//!
//! A machine that has proved a signature false says so where the subject's key is looked for ([`place`]), and keeps the proof for who asks.
//! A machine that has credited a peer looks there in the background, at most [`READS_PER_HOUR`] times an hour, and weighs what it finds:
//!
//! | statement | weight |
//! |---|---|
//! | a false list or delta claim, whose proof contradicts a verified file of this machine | it lowers the subject |
//! | any, of a member of this machine's fleet | it lowers the subject |
//! | everything else: no such file here, no proof to be had, or one that proves nothing | none |
//!
//! **Invariants.** To be lowered is to be as unknown as a stranger, and no more: nobody is out because of a word. A word counts once, however
//! often it comes again. Nobody is connected to because a statement says so: proofs are looked for in the DHT, where a contact is the
//! sender's own by construction. An absent statement means nothing.
//!
//! [`ledger`] and [`proof`] are pure; `shell` has the clock and the tasks.

pub mod ledger;
pub mod proof;
mod shell;

pub use proof::{Checked, ShelfTruth, Truth, shelf_truth};
#[cfg(test)]
pub(crate) use shell::Task;
pub use shell::{KeptProofs, NodeFacts, Reputation, ReputationParts, StatementRow, Telling};

use crate::krpc::Id;
use crate::swarm::FileShape;
use crate::swarm::piece_list::PieceList;
use poolfs_core::Digest;
use poolfs_core::digest::dht_key;

/// Places looked at and proofs fetched in an hour.
pub const READS_PER_HOUR: usize = 10;

/// The node id for which statements about the holder of `key` are kept, at its bitwise NOT.
///
/// It is made of the key alone. The subject's real id begins with bits that follow its address on a public network and ends with a byte
/// of its choice: by those it could move away from what is said of it. It refuses to keep statements about its own key wherever it is.
pub fn place(key: &[u8; 32]) -> Id {
    Id::of_key(key, None, 0)
}

/// The key under which holders of a proof are found.
pub fn proof_key(id: &Digest) -> Id {
    Id(dht_key(b"poolfs-1 proof\0", &id.0))
}

/// Something that a download has proved of the holder of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Conviction {
    /// It signed a list that the verified file contradicts.
    FalseList {
        /// The file.
        shape: FileShape,
        /// The list, with its signature.
        list: PieceList,
        /// The first false piece.
        piece: u32,
        /// Whether strangers may know that this machine has the file.
        is_public: bool,
    },
    /// It signed that this delta makes a file, and it makes another one or none.
    FalseDelta {
        /// The claim, with its signature.
        claim: crate::peer::DeltaClaim,
        /// Length of the file that was claimed, in bytes.
        size: u64,
        /// The delta.
        delta: Vec<u8>,
        /// Whether strangers may know that this machine has both files.
        is_public: bool,
    },
    /// It gave wrong bytes so often that its address is out.
    FalseBytes {
        /// Its key.
        subject: [u8; 32],
    },
}
