//! The FUSE side of poolfs: mounts over apt's directories, ghosts, reads that are verified.
//!
//! **Must not know:** the network crate. Missing files are asked for through [`source::Source`].

pub mod source;
