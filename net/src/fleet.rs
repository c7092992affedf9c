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

use std::net::SocketAddr;

/// Where a piece is to come from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Origin {
    /// The mirror, by leave of a coordinator or because none helps.
    Mirror,
    /// The member that serves here.
    Member(SocketAddr),
}
