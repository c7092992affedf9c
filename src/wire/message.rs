//! What goes over the wire.

use crate::config;
use crate::control::Uploaded;
use crate::deltas::offers::{Content, DeltaOffer, FalseClaim, Offered};
use poolfs_core::{Digest, Sums};
use poolfs_fs::source::{Delivery, Giver, SourceError, Verdict, Want};
use poolfs_net::node::Snapshot;
use poolfs_net::reputation::{StatementRow, Telling};
use poolfs_net::swarm::driver::{History, PeerRow};
use poolfs_net::told::Tale;
use serde::{Deserialize, Serialize};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// Questions about the shelf that may wait for their answers: more than the server of peers has places for.
pub const FINDS_MAX: usize = 128;

/// Files told of in one message.
pub const DIGESTS_MAX: usize = 4096;

/// Characters of a text for people that came over the wire.
const TEXT_CHARS_MAX: usize = 500;

/// Bytes of a host's name.
const HOST_BYTES_MAX: usize = 255;

/// What the network process is to be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Setup {
    /// Its own directory: the node's database and what is put aside of a download.
    pub dir: PathBuf,
    /// What is logged.
    pub log: String,
    /// Peers.
    pub net: config::Net,
    /// Patience with the mirror.
    pub mirror: config::Mirror,
    /// The fleet, where this machine is of one.
    pub fleet: Option<FleetSetup>,
    /// To whom it says what it has proved of others.
    pub telling: Telling,
}

/// What a member of a fleet is.
#[derive(Clone, Serialize, Deserialize)]
pub struct FleetSetup {
    /// The fleet's key.
    pub key: [u8; 32],
    /// This machine's site.
    pub zone: String,
    /// One copy from the mirror for each zone.
    pub zone_local: bool,
    /// DNS names that list members.
    pub seeds: Vec<String>,
}

impl std::fmt::Debug for FleetSetup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FleetSetup").field("zone", &self.zone).finish_non_exhaustive()
    }
}

/// A key that the DHT is told of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Announced {
    /// The key.
    pub key: [u8; 20],
    /// Only a part of the file is here.
    pub part: bool,
}

/// What is here of a file that is arriving.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Checked {
    /// The file.
    pub file: Digest,
    /// SHA-256 of pieces that a signed list of it bears out.
    pub pieces: Vec<Digest>,
}

/// A file that members of the fleet may have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Arrived {
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
}

/// From the mounts' side.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToNet {
    /// The first message.
    Setup(Box<Setup>),
    /// A file is wanted. With a descriptor that reads what is here of it, if there is anything.
    Want {
        /// Names it from now on.
        id: u64,
        /// What is wanted.
        want: Box<Want>,
    },
    /// A delivery was taken by who writes it, and those before it are written: one more may be sent.
    Took {
        /// Of which want.
        id: u64,
    },
    /// Nobody waits for it any more.
    Leave {
        /// Which want or search.
        id: u64,
    },
    /// Deltas to a file are looked for: [`FromNet::Offer`] follows for each, at most
    /// [`OFFERS_MAX`](crate::deltas::offers::OFFERS_MAX), and one more as the end.
    Seek {
        /// Names the search from now on.
        id: u64,
        /// The file.
        new: Digest,
        /// Only members of the fleet may be asked.
        fleet_only: bool,
    },
    /// A delta does not make what was claimed. With a memfd of its bytes, where others may be told of it.
    FalseClaim(FalseClaim),
    /// Offers these deltas and no others.
    Offer(Vec<Offered>),
    /// What the delivered bytes turned out to be.
    Verdict {
        /// The file.
        digest: Digest,
        /// What it is.
        verdict: Verdict,
    },
    /// Announces these keys and no others.
    Announce(Vec<Announced>),
    /// The fleet may have these, and those no longer.
    Holdings {
        /// At most [`DIGESTS_MAX`].
        new: Vec<Arrived>,
        /// At most [`DIGESTS_MAX`].
        gone: Vec<Digest>,
    },
    /// To [`FromNet::Find`].
    Found {
        /// Which question.
        id: u64,
        /// The file's length in bytes; `None`: it cannot be had. With a descriptor that reads it, and one of its sums (see
        /// [`sums_bytes`]) where they were asked for.
        size: Option<u64>,
    },
    /// To [`FromNet::Try`].
    Tried {
        /// Which question.
        id: u64,
        /// Whether it does; `None`: that cannot be told here.
        makes: Option<bool>,
    },
    /// A question; one [`FromNet::Answer`] follows.
    Ask {
        /// Names it.
        id: u64,
        /// What is asked.
        question: Question,
    },
    /// What is logged from now on.
    Log(String),
    /// So many bytes a second may go to addresses outside of the machine's own networks from now on; 0: nothing.
    Upload(u64),
    /// Are you there?
    Ping(u64),
    /// Save what is to be saved, and end.
    Stop,
}

/// What the mounts' side may ask.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Question {
    /// How it is.
    Status,
    /// Every peer that is remembered.
    Peers,
    /// Whether another node can reach this one's port; it is asked to try.
    Port,
    /// What was said of peers.
    Statements,
    /// What was told to others since the same watcher asked last.
    Told {
        /// Names who watches.
        watcher: u64,
    },
    /// Who gave which piece of a file.
    Why(Digest),
    /// A small item of the DHT (BEP 44), by its target.
    Item([u8; 20]),
    /// Whether it is this machine's to make the delta between two files, the older first.
    IsMaker([Content; 2]),
    /// A document from a URL.
    Document {
        /// Where it is.
        url: String,
        /// Through which proxy.
        proxy: Option<String>,
        /// A longer one is not wanted.
        bytes_max: u64,
    },
}

/// From the network's side.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromNet {
    /// It is ready, with all or with some of its parts.
    Started,
    /// It cannot run; for people, with the remedy.
    Refused(String),
    /// Something for a want. A piece comes with its memfd.
    Delivery {
        /// Which want.
        id: u64,
        /// What.
        what: Delivered,
    },
    /// Something for a search.
    Offer {
        /// Which search.
        id: u64,
        /// A delta; `None`: there are no others.
        offer: Option<Box<DeltaOffer>>,
    },
    /// Is this file on the shelf?
    Find {
        /// Names the question.
        id: u64,
        /// Which file.
        digest: Digest,
        /// Who asks has shown the fleet's key.
        fleet: bool,
        /// Its sums are wanted too.
        sums: bool,
    },
    /// Does the delta in the descriptor make one file of another? One at a time; [`ToNet::Tried`] follows.
    Try {
        /// Names the question.
        id: u64,
        /// The older file.
        old: Digest,
        /// The newer one.
        new: Digest,
    },
    /// A block of a file from the shelf is not what its sum says.
    Damaged {
        /// Which file.
        digest: Digest,
        /// Which block.
        block: u64,
    },
    /// The files that are arriving and that peers may know of.
    Arriving(Vec<Digest>),
    /// What is here of them.
    Checked(Vec<Checked>),
    /// To [`ToNet::Ask`].
    Answer {
        /// Which question.
        id: u64,
        /// The answer.
        answer: Answer,
    },
    /// To [`ToNet::Ping`].
    Pong(u64),
}

/// An answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// To [`Question::Status`].
    Status(Box<NetStatus>),
    /// To [`Question::Peers`].
    Peers(Vec<PeerRow>),
    /// To [`Question::Port`]: who tried, and whether it could; `None`: nobody did.
    Port(Option<(SocketAddr, bool)>),
    /// To [`Question::Statements`].
    Statements(Vec<StatementRow>),
    /// To [`Question::Told`]; or a reason for people.
    Told(Result<Vec<Tale>, String>),
    /// To [`Question::Why`].
    Why(Option<History>),
    /// To [`Question::Item`]: its bytes; `None` where it is not found.
    Item(Option<Vec<u8>>),
    /// To [`Question::IsMaker`].
    IsMaker(bool),
    /// To [`Question::Document`]: it is in the descriptor, or a reason for people.
    Document(Result<(), String>),
}

/// How the network's side is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct NetStatus {
    /// The DHT's node; `None` where it does not run.
    pub node: Option<Snapshot>,
    /// Live members of the fleet, this machine among them; 0 where it is of none.
    pub fleet_members: usize,
    /// Files that are here, of which all who coordinate them were told.
    pub fleet_told: usize,
    /// Deltas that are offered to others.
    pub deltas_offered: usize,
    /// What was given to peers.
    pub uploaded: Uploaded,
    /// What could not be started, a line each with its remedy.
    pub problems: Vec<String>,
}

/// A delivery without its descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Delivered {
    /// A piece.
    Piece {
        /// Which one.
        index: u32,
        /// Who gave it.
        giver: Giver,
    },
    /// Bytes arrived that are compared.
    Checking {
        /// How many.
        bytes: u64,
    },
    /// All was delivered.
    Done,
    /// Nobody delivers the rest.
    Failed(SourceError),
}

impl Delivered {
    /// A delivery and its descriptors.
    pub fn of(delivery: Delivery) -> (Self, Vec<OwnedFd>) {
        match delivery {
            Delivery::Piece { index, bytes, giver } => (Self::Piece { index, giver }, vec![bytes]),
            Delivery::Checking { bytes } => (Self::Checking { bytes }, Vec::new()),
            Delivery::Done => (Self::Done, Vec::new()),
            Delivery::Failed(error) => (Self::Failed(error), Vec::new()),
        }
    }

    /// Whether nothing follows it.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Done | Self::Failed(_))
    }
}

/// Whether a giver's name is one.
pub fn is_giver(giver: &Giver) -> bool {
    match giver {
        Giver::Mirror(host) => host.len() <= HOST_BYTES_MAX && !host.chars().any(char::is_control),
        Giver::Peer(_) | Giver::Delta => true,
    }
}

/// A text that came over the wire, so that it can be printed on one line.
pub fn plain_text(text: &str) -> String {
    text.chars().take(TEXT_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// The sums of a file as the bytes of a memfd: SHA-256 of each piece, then BLAKE3 of each block.
pub fn sums_bytes(sums: &Sums) -> Vec<u8> {
    let pieces = sums.pieces.iter().flat_map(|piece| piece.0);
    pieces.chain(sums.blocks.iter().flat_map(|block| block.0)).collect()
}

/// Reads [`sums_bytes`].
pub fn read_sums(digest: Digest, size: u64, bytes: &[u8]) -> io::Result<Sums> {
    use poolfs_core::BlockSum;
    use poolfs_core::piece::{self, BLOCK_BYTES, PIECE_BYTES};
    let (chunks, rest) = bytes.as_chunks::<32>();
    let (pieces, blocks) = (piece::count(size, PIECE_BYTES), piece::count(size, BLOCK_BYTES));
    if !rest.is_empty() || chunks.len() as u64 != pieces + blocks {
        return Err(io::Error::other(format!("{} bytes of sums for {size} bytes", bytes.len())));
    }
    let (pieces, blocks) = chunks.split_at(usize::try_from(pieces).map_err(io::Error::other)?);
    let (pieces, blocks) = (pieces.iter().copied().map(Digest).collect(), blocks.iter().copied().map(BlockSum).collect());
    Ok(Sums { digest, size, pieces, blocks })
}
