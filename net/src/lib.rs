//! The network side of poolfs: it delivers pieces and knows no FUSE.
//!
//! **Must not know:** the FUSE crate, and where on disk a file lies. It hands over pieces in sealed memfds and believes
//! nothing of them; who asked computes the digest and says what the bytes were.
//!
//! The binary runs it in a process of its own, without root and without files but its own directory: what comes in are descriptors
//! that only read ([`peer::Shelf`], [`swarm::driver::SwarmWant`]), and nothing here opens a path outside of that directory, but
//! what name resolution, certificates and the links of the machine are read from.

pub mod dht;
pub mod discovery;
pub mod fleet;
pub mod krpc;
mod memfd;
pub mod mirror;
pub mod netdb;
pub mod node;
pub mod peer;
pub mod reputation;
#[cfg(any(test, feature = "testnet"))]
pub mod sim;
pub mod swarm;
#[cfg(any(test, feature = "testnet"))]
pub mod testnet;
pub mod told;
