//! Open files.

use super::{Answer, Bytes, Caller, Entry, Tree};
use crate::attr::SetAttr;
use crate::errno::FsError;
use crate::handle::Handle;
use crate::inode::Node;
use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::File;
use std::sync::{Arc, OnceLock};

/// A file that was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// The handle.
    pub fh: u64,
    /// Whether what the kernel has cached of it is still right.
    pub keep_cache: bool,
    /// Whether it was opened for writing: then [`Tree::flush`] wants to be told of each close.
    pub writes: bool,
}

/// Flags that are the kernel's business, or would change what a positioned read or write does.
const NOT_FOR_BACKING: OFlags = OFlags::APPEND
    .union(OFlags::DIRECT)
    .union(OFlags::CREATE)
    .union(OFlags::EXCL)
    .union(OFlags::TRUNC)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::DIRECTORY)
    .union(OFlags::from_bits_retain(0x2000)); // O_ASYNC

/// Whether a file opened with these flags may be written.
pub(crate) fn writes(flags: i32) -> bool {
    flags & libc::O_ACCMODE != libc::O_RDONLY
}

/// The caller's flags, less what is not for the backing file.
fn backing_flags(flags: i32) -> OFlags {
    OFlags::from_bits_retain(flags.cast_unsigned()) - NOT_FOR_BACKING
}

impl Tree {
    /// Opens a file. `flags`: the caller's `O_*`, without those that the kernel acts on itself.
    pub fn open(self: &Arc<Self>, ino: u64, flags: i32) -> Answer<Opened> {
        match self.open_now(ino, flags) {
            Ok(Ok(opened)) => Answer::Ready(Ok(opened)),
            Ok(Err(node)) => {
                let tree = Arc::clone(self);
                Answer::Wait(Box::pin(async move {
                    tree.settle(&node).await?;
                    // Hashed just now: what the kernel has cached may be older.
                    tree.opened(&node, flags, false)
                }))
            }
            Err(err) => Answer::Ready(Err(err)),
        }
    }

    /// `Ok(Err(node))`: to be hashed first.
    fn open_now(self: &Arc<Self>, ino: u64, flags: i32) -> Result<Result<Opened, Arc<Node>>, FsError> {
        let node = self.table.get(ino)?;
        if let (None, Some(ghost)) = (node.backing(), &node.ghost)
            && let Some(opened) = self.open_ghost(&node, ghost, flags)?
        {
            return Ok(Ok(opened));
        }
        if !self.is_recorded(&node) {
            return Ok(Ok(self.opened(&node, flags, !self.options.verify)?));
        }
        let trusted = self.trusted(&node)?;
        match trusted {
            Some(keep) => Ok(Ok(self.opened(&node, flags, keep)?)),
            // Whoever only writes needs no bytes to be right.
            None if flags & libc::O_ACCMODE == libc::O_WRONLY => Ok(Ok(self.opened(&node, flags, false)?)),
            None => Ok(Err(node)),
        }
    }

    fn opened(self: &Arc<Self>, node: &Arc<Node>, flags: i32, keep_cache: bool) -> Result<Opened, FsError> {
        let writes = writes(flags);
        if writes && node.content.state.lock().is_object {
            return Err(FsError::IsObject);
        }
        let file = node.real()?.open(backing_flags(flags))?;
        let lock = writes && self.is_lock_node(node);
        if lock {
            self.take_lock(node)?;
        }
        // dpkg opens one package after the other while it fills the disk with what is in them.
        self.leave_room();
        let fh = self.add_handle(node, file, writes, lock);
        Ok(Opened { fh, keep_cache, writes })
    }

    fn add_handle(&self, node: &Arc<Node>, file: File, writes: bool, lock: bool) -> u64 {
        {
            let mut state = node.content.state.lock();
            state.opens += 1;
            state.writers += u32::from(writes);
        }
        self.handles.add(Handle { node: Arc::clone(node), file: OnceLock::from(file), writes, lock, ghost: false })
    }

    /// Makes a file and opens it. Where one appeared meanwhile and `flags` has no `O_EXCL`, that one is opened.
    pub fn create(self: &Arc<Self>, parent: u64, name: &OsStr, mode: u32, flags: i32, caller: &Caller) -> Answer<(Entry, Opened)> {
        match self.create_now(parent, name, mode, flags, caller) {
            Err(FsError::Backing(Errno::EXIST)) if flags & libc::O_EXCL == 0 => {
                let (tree, name, caller) = (Arc::clone(self), name.to_os_string(), *caller);
                Answer::Wait(Box::pin(async move {
                    let mut entry = tree.lookup(parent, &name, &caller).get().await?;
                    let opened = match tree.open(entry.attr.ino, flags).get().await {
                        Ok(opened) => opened,
                        Err(err) => {
                            tree.forget(entry.attr.ino, 1);
                            return Err(err);
                        }
                    };
                    // The kernel believes that the file is new, so it does not ask for this any more.
                    if flags & libc::O_TRUNC != 0 && writes(flags) {
                        let cut = SetAttr { size: Some(0), ..SetAttr::default() };
                        match tree.setattr(entry.attr.ino, Some(opened.fh), cut, &caller).get().await {
                            Ok((attr, _)) => entry.attr = attr,
                            Err(err) => {
                                tree.forget(entry.attr.ino, 1);
                                tree.release(opened.fh)?;
                                return Err(err);
                            }
                        }
                    }
                    Ok((entry, opened))
                }))
            }
            other => Answer::Ready(other),
        }
    }

    fn create_now(&self, parent: u64, name: &OsStr, mode: u32, flags: i32, caller: &Caller) -> Result<(Entry, Opened), FsError> {
        let made = self.make(parent, name, mode, caller, |dir| {
            let flags = backing_flags(flags) | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let private = rustix::fs::Mode::from_raw_mode(0o600);
            Ok(Some(File::from(rustix::fs::openat(dir, name, flags, private)?)))
        })?;
        let file = made.file.ok_or(FsError::Died)?;
        if self.is_recorded(&made.node) {
            made.node.content.order.lock().restart();
            made.node.content.state.lock().set(crate::content::Claim::Nothing);
        }
        let lock = writes(flags) && self.is_lock(parent, name);
        if lock && let Err(err) = self.take_lock(&made.node) {
            self.forget(made.node.id, 1);
            return Err(err);
        }
        let fh = self.add_handle(&made.node, file, writes(flags), lock);
        Ok((made.entry, Opened { fh, keep_cache: false, writes: writes(flags) }))
    }

    /// Reads up to `size` bytes at `offset`; fewer only at the end of the file.
    pub fn read(self: &Arc<Self>, fh: u64, offset: u64, size: u32) -> Answer<Bytes> {
        match self.handles.get(fh) {
            Ok(handle) if handle.ghost => self.read_ghost(&handle, offset, size),
            Ok(handle) => self.read_real(&handle, offset, size),
            Err(err) => Answer::Ready(Err(err)),
        }
    }

    /// Writes at `offset`; returns how many bytes were taken.
    pub fn write(&self, fh: u64, offset: u64, bytes: &[u8]) -> Result<usize, FsError> {
        let handle = self.handles.get(fh)?;
        let file = writable(&handle)?;
        self.write_here(&handle.node, file, offset, bytes)
    }

    /// One descriptor of the handle was closed. Comes as often as descriptors were duplicated.
    pub fn flush(&self, fh: u64) -> Result<(), FsError> {
        let handle = self.handles.get(fh)?;
        if handle.writes {
            self.flush_written(&handle.node);
            self.note_written(&handle.node);
        }
        Ok(())
    }

    /// The last descriptor of the handle is gone.
    pub fn release(self: &Arc<Self>, fh: u64) -> Result<(), FsError> {
        // Between the end of the handle and that of the record the file is neither open nor recorded.
        let _at_work = self.at_work();
        let handle = self.handles.remove(fh)?;
        if handle.lock {
            self.drop_lock();
        }
        if handle.ghost {
            self.release_ghost(&handle.node);
        }
        let last_writer = {
            let mut state = handle.node.content.state.lock();
            state.opens = state.opens.saturating_sub(1);
            if handle.writes {
                state.writers = state.writers.saturating_sub(1);
            }
            if state.opens == 0
                && let crate::content::Claim::Known(known) = &mut state.claim
            {
                known.sums = None;
            }
            handle.writes && state.writers == 0
        };
        if last_writer {
            self.finish_writing(&handle.node);
        } else if self.is_recorded(&handle.node) {
            for link in self.table.links(handle.node.id) {
                self.parts.store.used(self.role, &link.path)?;
            }
        }
        Ok(())
    }

    /// Brings what was written to the disk.
    pub fn fsync(self: &Arc<Self>, fh: u64, data_only: bool) -> Answer<()> {
        let handle = match self.handles.get(fh) {
            Ok(handle) => handle,
            Err(err) => return Answer::Ready(Err(err)),
        };
        // The disk may take its time, and the FUSE threads are few.
        let tree = Arc::clone(self);
        Answer::Wait(Box::pin(async move {
            let sync = move |_: &Arc<Self>| match handle.file.get() {
                Some(file) if data_only => Ok(rustix::fs::fdatasync(file)?),
                Some(file) => Ok(rustix::fs::fsync(file)?),
                None => Ok(()),
            };
            tree.blocking(sync).await
        }))
    }

    /// As `fallocate(2)`. `mode`: `FALLOC_FL_*`.
    pub fn fallocate(&self, fh: u64, offset: u64, len: u64, mode: u32) -> Result<(), FsError> {
        let handle = self.handles.get(fh)?;
        let file = writable(&handle)?;
        let mut order = handle.node.content.order.lock();
        self.begin_writing(&handle.node)?;
        let flags = FallocateFlags::from_bits_retain(mode);
        if !(flags - FallocateFlags::KEEP_SIZE).is_empty() {
            order.lose();
        }
        Ok(rustix::fs::fallocate(file, flags, offset, len)?)
    }

    /// Finds data or a hole. `whence`: `SEEK_DATA` or `SEEK_HOLE`; the kernel does the others itself.
    pub fn lseek(&self, fh: u64, offset: u64, whence: i32) -> Result<u64, FsError> {
        let handle = self.handles.get(fh)?;
        if handle.file.get().is_none()
            && let Some(ghost) = &handle.node.ghost
        {
            // What is not here yet is all data: whoever was told of a hole would store zeros.
            let size = ghost.entry.size;
            return match whence {
                _ if offset >= size => Err(Errno::NXIO.into()),
                libc::SEEK_DATA => Ok(offset),
                libc::SEEK_HOLE => Ok(size),
                _ => Err(Errno::INVAL.into()),
            };
        }
        // The handle's own position is used by nothing else: reads and writes are positioned.
        let from = match whence {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL.into()),
        };
        Ok(rustix::fs::seek(handle.file.get().ok_or(Errno::NXIO)?, from)?)
    }
}

fn writable(handle: &Handle) -> Result<&File, FsError> {
    if !handle.writes {
        return Err(Errno::BADF.into());
    }
    handle.file.get().ok_or(FsError::Died)
}
