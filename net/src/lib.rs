//! The network side of poolfs.

pub mod discovery;
pub mod krpc;
pub mod netdb;
