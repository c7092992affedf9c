//! What is open: files and directories, by the number that the kernel gets.

use crate::errno::FsError;
use crate::inode::Node;
use crate::tree::DirEntry;
use poolfs_core::sync::{Mutex, RwLock};
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// An open file.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) node: Arc<Node>,
    /// The backing file; not there while the node is a ghost.
    pub(crate) file: OnceLock<File>,
    /// Opened for writing.
    pub(crate) writes: bool,
    /// Holds apt's lock on the covered directory.
    pub(crate) lock: bool,
    /// Opened while the node was a ghost.
    pub(crate) ghost: bool,
}

/// An open directory.
#[derive(Debug)]
pub(crate) struct DirHandle {
    pub(crate) node: Arc<Node>,
    pub(crate) dir: OwnedFd,
    /// The entries as they were when reading began: offsets into it stay good while the directory changes.
    pub(crate) entries: Mutex<Option<Arc<[DirEntry]>>>,
}

/// All open handles of one mount.
#[derive(Debug, Default)]
pub(crate) struct Handles {
    next: AtomicU64,
    files: RwLock<HashMap<u64, Arc<Handle>>>,
    dirs: RwLock<HashMap<u64, Arc<DirHandle>>>,
}

impl Handles {
    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(crate) fn add(&self, handle: Handle) -> u64 {
        let fh = self.number();
        self.files.write().insert(fh, Arc::new(handle));
        fh
    }

    pub(crate) fn get(&self, fh: u64) -> Result<Arc<Handle>, FsError> {
        self.files.read().get(&fh).cloned().ok_or(FsError::NoHandle(fh))
    }

    pub(crate) fn remove(&self, fh: u64) -> Result<Arc<Handle>, FsError> {
        self.files.write().remove(&fh).ok_or(FsError::NoHandle(fh))
    }

    pub(crate) fn files_len(&self) -> usize {
        self.files.read().len()
    }

    pub(crate) fn add_dir(&self, handle: DirHandle) -> u64 {
        let fh = self.number();
        self.dirs.write().insert(fh, Arc::new(handle));
        fh
    }

    pub(crate) fn dir(&self, fh: u64) -> Result<Arc<DirHandle>, FsError> {
        self.dirs.read().get(&fh).cloned().ok_or(FsError::NoHandle(fh))
    }

    pub(crate) fn remove_dir(&self, fh: u64) -> Result<Arc<DirHandle>, FsError> {
        self.dirs.write().remove(&fh).ok_or(FsError::NoHandle(fh))
    }
}
