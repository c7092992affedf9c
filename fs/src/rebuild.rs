//! Files that can be made here from an older version: what a download asks before it asks a source.

use crate::source::Audience;
use poolfs_core::Digest;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::time::Duration;

/// A file that is about to be downloaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// What a signed index says of it.
    pub digest: Digest,
    /// Its length in bytes, from the same index.
    pub size: u64,
    /// Bytes of it that are missing.
    pub missing_bytes: u64,
    /// Who may know that it is wanted.
    pub audience: Audience,
    /// It is of a private repository: nobody may be asked for anything.
    pub private: bool,
}

/// Makes files from older versions that are here.
pub trait Rebuild: Send + Sync + 'static {
    /// The whole file, opened for reading, if it was made: sooner than a download would have brought it, as far as can be
    /// told. `None`: download it as if there were no such thing. Every wait in here ends. What is given is not believed: its
    /// digest is compared as that of every download.
    fn rebuild(&self, wish: Wish) -> Pin<Box<dyn Future<Output = Option<OwnedFd>> + Send>>;

    /// Tells how long a download of so many bytes took, so that the next choice is better.
    fn downloaded(&self, bytes: u64, took: Duration);
}
