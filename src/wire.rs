//! The wire between the process that serves the mounts and the one that talks to the network.
//!
//! A socket pair of type SOCK_SEQPACKET. What goes over it is plain values, as JSON, and descriptors. A value that is too
//! long for a packet goes in a sealed memfd of its own, so that packets stay short and one look at their size bounds them.
//!
//! | from the mounts' side | from the network's side |
//! |---|---|
//! | [`ToNet::Setup`], once, first | [`FromNet::Started`], once, first, or [`FromNet::Refused`] |
//! | [`ToNet::Want`], [`ToNet::Took`], [`ToNet::Leave`] | [`FromNet::Delivery`], at most [`DELIVERIES_WAITING_MAX`] that were not yet taken |
//! | [`ToNet::Seek`], [`ToNet::Leave`] | [`FromNet::Offer`], at most [`OFFERS_MAX`] and the end |
//! | [`ToNet::Found`] | [`FromNet::Find`], at most [`FINDS_MAX`] that were not yet answered |
//! | [`ToNet::Ask`] | [`FromNet::Answer`] |
//! | [`ToNet::Ping`] | [`FromNet::Pong`] |
//!
//! **Invariants.** The mounts' side believes nothing that comes: sizes, seals, counts, numbers and texts are checked, and
//! whatever is not as above is [`WireError::Garbage`], the end of the process that sent it. No side waits for the other
//! without a limit, and no queue grows without one. The network's side gets descriptors that only read; what it hands over are
//! sealed memfds.
//!
//! [`OFFERS_MAX`]: crate::deltas::offers::OFFERS_MAX
//! [`DELIVERIES_WAITING_MAX`]: poolfs_fs::source::DELIVERIES_WAITING_MAX

mod message;
mod packet;

pub use message::{
    Announced, Answer, Arrived, Checked, DIGESTS_MAX, Delivered, FINDS_MAX, FleetSetup, FromNet, NetStatus, Question, Setup, ToNet,
    is_giver, plain_text, read_sums, sums_bytes,
};
pub use packet::{Memory, Outlet, Socket, WireError, first, last, pair, seal};
