//! The network side of poolfs: it delivers pieces and knows no FUSE.
//!
//! **Must not know:** the FUSE crate, and where on disk a file lies. It hands over pieces in sealed memfds and believes
//! nothing of them; who asked computes the digest and says what the bytes were.

pub mod dht;
pub mod discovery;
pub mod fleet;
pub mod krpc;
mod memfd;
pub mod mirror;
pub mod netdb;
pub mod node;
pub mod peer;
#[cfg(any(test, feature = "testnet"))]
pub mod sim;
pub mod swarm;
#[cfg(any(test, feature = "testnet"))]
pub mod testnet;
