//! What this machine has to give: the border between the server and who holds the files.

use poolfs_core::{Digest, Sums};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Audience {
    /// Anybody.
    Stranger,
    /// A member of this machine's fleet, who has shown the fleet's key.
    Fleet,
}

/// A file that may be given.
#[derive(Debug)]
pub struct Shelved {
    /// The file, open for reading only.
    pub file: OwnedFd,
    /// What its blocks and pieces must be. Each block is checked before it is sent.
    pub sums: Arc<Sums>,
}

/// Verified files by digest. Called from threads that may block.
pub trait Shelf: Send + Sync + 'static {
    /// The file with this digest, if `to` may have it.
    ///
    /// `None` for what is not here, what is not verified, what never leaves the machine, and for a stranger what is
    /// withheld; an implementation does the same work for all of them, as far as the asker can measure.
    fn find(&self, digest: &Digest, to: Audience) -> Option<Shelved>;

    /// Tells that block `block` of a file handed out under this digest is not what its sum says.
    fn damaged(&self, digest: &Digest, block: u64);
}
