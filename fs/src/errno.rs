//! What an operation may fail with, and the one table that turns it into an errno.

use poolfs_core::Digest;
use poolfs_core::catalog::CatalogError;
use poolfs_core::store::StoreError;
use rustix::io::Errno;
use std::io;

/// Why an operation on the tree failed.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The backing file system said so: its errno goes to the caller unchanged.
    #[error("backing file: {0}")]
    Backing(#[from] Errno),
    /// A copy between backing files failed.
    #[error("backing file: {0}")]
    Io(#[from] io::Error),
    /// The kernel names a node that it has forgotten, or that never was.
    #[error("no node {0}")]
    NoNode(u64),
    /// The kernel names a handle that is not open.
    #[error("no open handle {0}")]
    NoHandle(u64),
    /// A ghost cannot be linked: its bytes are not here.
    #[error("a file that is not here yet cannot be linked")]
    GhostLink,
    /// apt's lock on this directory is held by a process that does not go through the mount.
    #[error("apt's lock is held outside the mount")]
    LockHeld,
    /// An extended attribute of poolfs itself, which only poolfs writes.
    #[error("attributes below user.poolfs are read-only")]
    ReservedAttribute,
    /// The bytes on disk are not the ones that were verified, and nobody delivers them again.
    #[error("{path}: block {block} is damaged and could not be repaired: {why}")]
    Damaged {
        /// The file, below the mount.
        path: String,
        /// The block, counted from the start of the file.
        block: u64,
        /// What the repair said.
        why: String,
    },
    /// The bytes are not here and nobody delivers them.
    #[error("{name} ({digest}) is not delivered: {why}")]
    Undeliverable {
        /// The file's name.
        name: String,
        /// What was asked for.
        digest: Digest,
        /// What the sources said.
        why: String,
    },
    /// The file's bytes have become an object: whoever still has it open may read it and not write it.
    #[error("the file is kept as an object and cannot be written")]
    IsObject,
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The catalog failed.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// A task that worked for this request died.
    #[error("the request's task ended without an answer")]
    Died,
}

impl FsError {
    /// Whether this is a fault of poolfs or its disk, which people must see; the others are ordinary answers.
    pub fn is_fault(&self) -> bool {
        match self {
            Self::Store(_) | Self::Catalog(_) | Self::Died | Self::NoNode(_) | Self::NoHandle(_) => true,
            Self::Backing(errno) => *errno == Errno::IO,
            // Both are logged where they are found, with what was tried.
            Self::Damaged { .. } | Self::Undeliverable { .. } => false,
            Self::Io(_) | Self::GhostLink | Self::LockHeld | Self::ReservedAttribute | Self::IsObject => false,
        }
    }

    /// The errno that the caller of the system call sees.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Backing(errno) => *errno,
            Self::Io(err) => Errno::from_io_error(err).unwrap_or(Errno::IO),
            Self::NoNode(_) => Errno::STALE,
            Self::NoHandle(_) => Errno::BADF,
            Self::GhostLink | Self::ReservedAttribute => Errno::PERM,
            Self::LockHeld => Errno::AGAIN,
            Self::Damaged { .. } | Self::Undeliverable { .. } | Self::Died => Errno::IO,
            Self::IsObject => Errno::TXTBSY,
            Self::Store(err) => store_errno(err),
            Self::Catalog(_) => Errno::IO,
        }
    }
}

/// What a failing database means to the caller: a full disk is one, all else is ours.
fn store_errno(err: &StoreError) -> Errno {
    if err.is_full() { Errno::NOSPC } else { Errno::IO }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// apt acts on errnos: EAGAIN is a held lock, ENOENT a file to fetch, EIO a failed run.
    #[test]
    fn the_table_is_the_one_that_was_agreed() {
        let digest = Digest::of(b"");
        let name = || "a.deb".to_owned();
        let cases = [
            (FsError::Backing(Errno::NOTEMPTY), Errno::NOTEMPTY),
            (FsError::Io(io::Error::from_raw_os_error(Errno::NOSPC.raw_os_error())), Errno::NOSPC),
            (FsError::Io(io::Error::other("no errno")), Errno::IO),
            (FsError::NoNode(7), Errno::STALE),
            (FsError::NoHandle(7), Errno::BADF),
            (FsError::GhostLink, Errno::PERM),
            (FsError::LockHeld, Errno::AGAIN),
            (FsError::ReservedAttribute, Errno::PERM),
            (FsError::Damaged { path: name(), block: 0, why: name() }, Errno::IO),
            (FsError::Undeliverable { name: name(), digest, why: name() }, Errno::IO),
            (FsError::IsObject, Errno::TXTBSY),
            (FsError::Died, Errno::IO),
        ];
        for (err, want) in cases {
            assert_eq!(err.errno(), want, "{err}");
        }
    }
}
