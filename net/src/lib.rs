//! The network side of poolfs.

pub mod netdb;
