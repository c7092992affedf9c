//! The fleet's way onto the wire: who is in it, what they say to each other, and how they prove to be of it.
//!
//! The rules of sharing out are [`crate::swarm::fleet`]'s. [`Fleet`] runs them for this machine over the node's UDP socket: one
//! task owns [`core::Core`], which holds membership ([`members`]), the coordinator's and the asker's side, and what has been told to
//! whom. Who wants a file calls [`Fleet::plan`] and does what its [`FleetDownload`] says.
//!
//! **Invariants:** a datagram without the right tag is answered with nothing; only members are named to a download; a machine
//! without other members never enters this code for a file.

pub mod auth;
pub mod core;
mod http;
pub mod members;
mod shell;
mod tell;
pub mod wire;

pub use shell::{Fleet, FleetDo, FleetDownload, FleetOptions};

use poolfs_core::Digest;
use std::net::SocketAddr;

/// Where a piece is to come from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Origin {
    /// The mirror, by leave of a coordinator or because none helps.
    Mirror,
    /// The member that serves here.
    Member(SocketAddr),
}

/// The digest under which members tell each other, as if it were that of a file, that they have deltas to `new`: SHA-256 of a
/// prefix and the 32 bytes of `new`. Whoever asks about all holders of the file would mostly ask those that have none.
pub fn mark_of_deltas(new: &Digest) -> Digest {
    Digest::of(&[b"poolfs-1 deltas\0".as_slice(), &new.0].concat())
}
