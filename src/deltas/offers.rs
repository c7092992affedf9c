//! What the side with the store and the network tell each other of deltas: plain values, as they go over the wire.
//!
//! Whether an offer is of use is decided where the old files are; who is asked, and what strangers hear, where the network is.

use poolfs_core::Digest;
use poolfs_net::peer::CLAIM_BYTES;
use poolfs_net::reputation::proof::PROOF_BYTES_MAX;
use serde::{Deserialize, Serialize};
use std::pin::Pin;
use tokio::sync::mpsc;

/// A delta of at most this many bytes is put into the DHT (BEP 44: a value has at most 1,000 bytes with its length in front).
pub const ITEM_DELTA_BYTES_MAX: u64 = 996;

/// Deltas kept in the DHT at once; each costs a walk an hour.
pub const ITEMS_MAX: usize = 64;

/// Deltas that this machine offers at once, the smallest to each file first.
pub const OFFERED_MAX: usize = 4096;

/// Offers that one search may bring.
pub const OFFERS_MAX: usize = 64;

/// A false delta of more bytes is not told with its claim: the proof would be too long.
pub const TOLD_BYTES_MAX: u64 = (PROOF_BYTES_MAX - CLAIM_BYTES) as u64;

/// A file: its digest, and its length in bytes.
pub type Content = (Digest, u64);

/// A delta that somebody offers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeltaOffer {
    /// What it starts from.
    pub old: Digest,
    /// Its digest, by which it is fetched like any file.
    pub delta: Digest,
    /// Its length in bytes.
    pub bytes: u64,
    /// Where it lies in the DHT, if it does.
    pub target: Option<[u8; 20]>,
    /// The claim that vouches for it, as on the wire of peers; `None`: nobody does.
    pub claim: Option<Vec<u8>>,
}

/// A delta that this machine offers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offered {
    /// What it makes.
    pub new: Digest,
    /// What it starts from.
    pub old: Digest,
    /// Its digest.
    pub delta: Digest,
    /// Its length in bytes.
    pub bytes: u64,
    /// Whether strangers may hear of it.
    pub to_strangers: bool,
    /// Its bytes, of one that is to be in the DHT.
    pub item: Option<Vec<u8>>,
}

/// That a delta which was vouched for does not make its file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FalseClaim {
    /// The file.
    pub new: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// As on the wire of peers.
    pub claim: Vec<u8>,
    /// Strangers may know that both files are here.
    pub is_public: bool,
}

/// An answer that the network may take its time for.
pub type Asked<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// What the side with the store asks of the network.
pub trait Offers: Send + Sync + 'static {
    /// Starts to look for deltas to a file; the channel closes when nobody else is to be asked. Dropping it ends the search.
    fn offers(&self, new: Digest, fleet_only: bool) -> mpsc::Receiver<DeltaOffer>;

    /// The bytes of a delta in the DHT; `None` where it is not found.
    fn item(&self, target: [u8; 20]) -> Asked<Option<Vec<u8>>>;

    /// Tells of a false claim; with the bytes of the delta, where they are short enough to be told with it.
    fn false_claim(&self, false_claim: FalseClaim, delta: Option<&[u8]>);

    /// Replaces what this machine offers, at most [`OFFERED_MAX`].
    fn offer(&self, offered: Vec<Offered>);

    /// Whether it is this machine's to make the delta between two files, the older first: in a fleet one member that has both makes it
    /// for all. `None`: that cannot be said now.
    fn is_maker(&self, files: [Content; 2]) -> Asked<Option<bool>>;
}
