//! The network side of poolfs.

pub mod krpc;
pub mod netdb;
