//! What apt's lists say exists, as the trees see it.

use crate::errno::FsError;
use poolfs_core::Digest;
use poolfs_core::catalog::{Catalog, Entry, Vanished};
use std::os::fd::BorrowedFd;

/// The catalog. A trait, so that a tree can be tested over a handful of names.
pub trait Names: Send + Sync + 'static {
    /// What should be under this name in `archives/`.
    fn archive(&self, name: &[u8]) -> Result<Option<Entry>, FsError>;

    /// What the file with this digest is.
    fn by_digest(&self, digest: &Digest) -> Result<Option<Entry>, FsError>;

    /// The names of all packages, for a browsing mount.
    fn packages(&self) -> Result<Vec<String>, FsError>;

    /// Reads again what changed in the lists directory. Blocks for the disk. Names that never change need none.
    fn refresh(&self, lists: BorrowedFd<'_>, vanished: Vanished) -> Result<(), FsError> {
        let _ = (lists, vanished);
        Ok(())
    }
}

impl Names for Catalog {
    fn archive(&self, name: &[u8]) -> Result<Option<Entry>, FsError> {
        Ok(Self::archive(self, name)?)
    }

    fn by_digest(&self, digest: &Digest) -> Result<Option<Entry>, FsError> {
        Ok(Self::by_digest(self, digest)?)
    }

    fn packages(&self) -> Result<Vec<String>, FsError> {
        Ok(self.package_names()?)
    }

    fn refresh(&self, lists: BorrowedFd<'_>, vanished: Vanished) -> Result<(), FsError> {
        let refreshed = Self::refresh(self, lists, vanished)?;
        for problem in &refreshed.problems {
            tracing::warn!("the catalog: {problem}");
        }
        tracing::info!(parsed = refreshed.parsed, kept = refreshed.kept, dropped = refreshed.dropped, "the catalog is up to date");
        Ok(())
    }
}
