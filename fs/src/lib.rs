//! The FUSE side of poolfs: mounts over apt's directories, ghosts, reads that are verified.
//!
//! **Must not know:** the network crate, nor any socket. Missing files are asked for through [`source::Source`], whose other side is
//! another process; the one that this runs in has no network.

pub mod fetch;
pub mod source;

mod adapter;
pub mod attr;
mod backing;
mod content;
pub mod errno;
mod ghost;
mod handle;
mod inode;
pub mod install;
mod judging;
mod lock;
pub mod mount;
pub mod names;
pub mod rebuild;
pub mod refresh;
pub mod repair;
pub mod supply;
#[allow(unsafe_code, reason = "the one module with system calls that rustix has not")]
mod sys;
pub mod tree;
pub mod update;
pub mod verify;

pub use errno::FsError;
pub use mount::{MountError, MountOptions, MountSpec, MountStats, Mounts, Prepared, prepare};
pub use tree::{Tree, TreeOptions, TreeParts};
