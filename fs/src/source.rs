//! Where missing bytes come from: the border between the mounts and the network.
//!
//! What crosses it is plain values and file descriptors, since the other side is a process of its own that nothing is believed of: a [`Want`]
//! goes out, [`Delivery`]s come back until `Done` or `Failed`. Dropping the receiver cancels. The other side never holds a
//! writable descriptor of a file: it hands over each piece in a sealed memfd, and this side copies it into `incoming/`,
//! computes the digest itself and tells the [`Verdict`]. What it gets beside the want is a descriptor that reads what is in
//! `incoming/`: it compares givers by these bytes, and shares the pieces that it knows to be right while the rest arrives.

use poolfs_core::Digest;
pub use poolfs_core::catalog::MirrorUrl;
use poolfs_core::store::Sharing;
use serde::{Deserialize, Serialize};
use std::os::fd::OwnedFd;
use tokio::sync::mpsc;

/// Deliveries that may wait to be taken; the other side waits when it is full, so memory stays bounded.
pub const DELIVERIES_WAITING_MAX: usize = 8;

/// A file that is wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Want {
    /// What the signed index says of it.
    pub digest: Digest,
    /// Its length in bytes, from the same index.
    pub size: u64,
    /// The mirror's URLs, best first. Empty: peers only.
    pub urls: Vec<MirrorUrl>,
    /// Which pieces ([`poolfs_core::piece::PIECE_BYTES`]) are still missing, ascending. What is not named is here already.
    pub missing: Vec<u32>,
    /// What it is for: a reader waits, or nobody does.
    pub purpose: Purpose,
    /// Who may know that it is wanted, and may have what is here of it.
    pub audience: Audience,
}

/// To whom a file may be shown while it arrives, as afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Audience {
    /// To anybody.
    Everybody,
    /// To members of this machine's fleet, where it is of one; strangers are not even asked for it.
    Fleet,
}

impl Audience {
    /// The audience of a file that is shared so.
    pub fn of(sharing: Sharing) -> Self {
        match sharing {
            Sharing::Announced | Sharing::Available => Self::Everybody,
            Sharing::Withheld | Sharing::LocalOnly => Self::Fleet,
        }
    }
}

/// Who waits for a [`Want`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// A reader is blocked until the whole file has verified.
    Read,
    /// Single pieces of a file that was verified before and is damaged on disk.
    Repair,
    /// Somebody asked for it on the command line, or it is expected to be wanted soon.
    Prefetch,
}

/// What comes back for a [`Want`].
#[derive(Debug)]
pub enum Delivery {
    /// One piece, of the length that the want's size implies. Nothing in it is believed yet. A later one of the same index
    /// takes the place of this one, as long as the file is not done.
    Piece {
        /// Which piece.
        index: u32,
        /// A memfd sealed against writing, growing and shrinking, holding exactly the piece.
        bytes: OwnedFd,
        /// Who gave it.
        giver: Giver,
    },
    /// Bytes arrived that are compared with what is here and are not part of the file: it is being worked on.
    Checking {
        /// How many, since the last of these.
        bytes: u64,
    },
    /// Every missing piece was delivered, and none will be replaced any more.
    Done,
    /// Nobody delivers the rest.
    Failed(SourceError),
}

/// Who gave a piece.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Giver {
    /// A mirror, by its host name.
    Mirror(String),
    /// A peer, by its address.
    Peer(std::net::SocketAddr),
    /// Rebuilt here from an older version and a delta.
    Delta,
}

impl std::fmt::Display for Giver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Mirror(host) => f.write_str(host),
            Self::Peer(address) => write!(f, "{address}"),
            Self::Delta => f.write_str("a delta"),
        }
    }
}

/// What this side found when it had all the bytes of a [`Want`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// The digest matched.
    Right,
    /// It did not: what was delivered is thrown away.
    Wrong,
}

/// Why a [`Want`] was not delivered, by what the asker does next.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum SourceError {
    /// No source has it: do not ask again soon.
    #[error("no source has {digest}: {why}")]
    Nowhere {
        /// The file.
        digest: Digest,
        /// The last source's answer, for people.
        why: String,
    },
    /// Sources exist and could not be reached or were too slow: asking later may help.
    #[error("no source delivers {digest} now: {why}")]
    NotNow {
        /// The file.
        digest: Digest,
        /// What went wrong, for people.
        why: String,
    },
    /// The network side is not there (it is restarting).
    #[error("the network side is not running")]
    Gone,
}

/// The network, as the mounts see it.
pub trait Source: Send + Sync + 'static {
    /// Starts to deliver; returns at once. At most [`DELIVERIES_WAITING_MAX`] deliveries wait in the channel, and a piece is
    /// in `incoming/` before the next one is taken from it.
    ///
    /// `incoming` reads the file as far as it is here, at its places; `None` where single pieces of another file are wanted.
    fn want(&self, want: Want, incoming: Option<OwnedFd>) -> mpsc::Receiver<Delivery>;

    /// Tells what the delivered bytes turned out to be. After `Wrong` a new [`Want`] may follow, and other sources are preferred.
    fn verdict(&self, digest: Digest, verdict: Verdict);
}
