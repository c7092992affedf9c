//! The filesystem without the kernel.
//!
//! [`Tree`] has one method for each operation that the kernel asks for, with plain types in and out. It is driven by
//! `adapter` from the FUSE threads, and by tests directly: make one with [`Tree::new`] over any directory, keep the
//! lookup counts as the kernel does (each [`Entry`] that is returned counts one, [`Tree::forget`] takes them back; the
//! root needs none), close what was opened with [`Tree::release`], and wait for the last hashing with [`Tree::settled`].
//!
//! An operation that can be answered from this machine is answered at once, on the calling thread. One that has to wait,
//! for the network or for the hashing of a large file, returns [`Answer::Wait`] with a future that owns all it needs:
//! the caller runs it in a task, so no FUSE thread ever waits for a peer.
//!
//! **Invariant:** bytes of a file whose claim is not `Writing` reach a reader only after their block's checksum matched.

pub(crate) mod bytes;
mod dir;
mod file;
mod ghosts;
#[cfg(test)]
mod interleave;
mod lists;
mod scan;
mod xattr;

pub use bytes::Bytes;
pub use dir::{DirEntry, DirPlusEntry};
pub use file::Opened;
pub use scan::Scanned;
pub(crate) use scan::note;

use crate::attr::{Attr, SetAttr, SetTime};
use crate::backing::{Backing, Key};
use crate::errno::FsError;
use crate::fetch::Fetcher;
use crate::ghost::Run;
use crate::handle::Handles;
use crate::inode::{Node, Table};
use crate::install::Installs;
use crate::names::Names;
use crate::refresh::Refresher;
use crate::supply::Mend;
use crate::update::Updates;
use poolfs_core::Role;
use poolfs_core::store::{Objects, Store};
use poolfs_core::sync::{Mutex, RwLock};
use rustix::fs::{AtFlags, FileType, Stat, Timespec, Timestamps};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{Semaphore, watch};

/// How long the kernel may believe names and attributes of files on disk: others can reach the covered directory.
pub const TTL: Duration = Duration::from_secs(1);

/// Objects leave one part in so many of the file system free.
const OBJECTS_LEAVE_FREE: u64 = 10;

/// And so many bytes at most: what a large upgrade may need, on a disk however large.
const OBJECTS_LEAVE_FREE_BYTES_MAX: u64 = 8 << 30;

/// Files hashed at the same time, so that a scan leaves the machine usable.
const HASHING_MAX: usize = 2;

/// The answer of an operation, at once or later.
pub enum Answer<T> {
    /// Answered from this machine.
    Ready(Result<T, FsError>),
    /// To be awaited in a task.
    Wait(Waiting<T>),
}

/// The rest of an operation that has to wait.
pub type Waiting<T> = Pin<Box<dyn Future<Output = Result<T, FsError>> + Send>>;

impl<T> std::fmt::Debug for Answer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Ready(Ok(_)) => "Ready(Ok)",
            Self::Ready(Err(_)) => "Ready(Err)",
            Self::Wait(_) => "Wait",
        })
    }
}

impl<T> Answer<T> {
    /// The answer, for those who can wait: in tasks and tests.
    pub async fn get(self) -> Result<T, FsError> {
        match self {
            Self::Ready(result) => result,
            Self::Wait(waiting) => waiting.await,
        }
    }
}

impl<T, E: Into<FsError>> From<Result<T, E>> for Answer<T> {
    fn from(result: Result<T, E>) -> Self {
        Self::Ready(result.map_err(Into::into))
    }
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// File system user id.
    pub uid: u32,
    /// File system group id.
    pub gid: u32,
    /// Process (thread) id in the daemon's pid namespace, 0 if it has none there.
    pub pid: u32,
}

/// A name that was found or made. Counts one lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its attributes; `attr.ino` is the node's number.
    pub attr: Attr,
    /// How long name and attributes may be believed.
    pub ttl: Duration,
}

/// How a directory is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TreeOptions {
    /// Hash and check files. Off only to measure what it costs.
    pub verify: bool,
    /// List ghosts in `readdir` too.
    pub browse: bool,
    /// Ghosts directly in `archives/`, for callers that do not use libapt.
    pub lazy_archives: bool,
    /// How long the kernel may believe names and attributes of what is on disk.
    pub ttl: Duration,
}

impl Default for TreeOptions {
    fn default() -> Self {
        Self { verify: true, browse: false, lazy_archives: true, ttl: TTL }
    }
}

/// What a tree works with.
#[derive(Clone)]
pub struct TreeParts {
    /// Records of files.
    pub store: Arc<Store>,
    /// Files kept by digest.
    pub objects: Arc<Objects>,
    /// What apt's lists say exists.
    pub names: Arc<dyn Names>,
    /// Who downloads what is not here.
    pub fetcher: Arc<Fetcher>,
    /// Who gets damaged pieces again.
    pub mend: Arc<dyn Mend>,
    /// apt's lists directory where it is none of the mounts: then it is looked through whenever apt takes a lock.
    pub lists_elsewhere: Option<Arc<OwnedFd>>,
    /// Where waiting operations and hashing run.
    pub runtime: tokio::runtime::Handle,
}

impl std::fmt::Debug for TreeParts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TreeParts").finish_non_exhaustive()
    }
}

/// What happened in a tree since it was made.
#[derive(Debug, Default)]
pub struct Counters {
    /// Blocks that failed their checksum when they were read.
    pub blocks_bad: AtomicU64,
    /// Of these, blocks that were fetched again and are right now.
    pub blocks_mended: AtomicU64,
    /// Blocks that were read and matched.
    pub blocks_checked: AtomicU64,
    /// Ghosts that were opened.
    pub ghosts_opened: AtomicU64,
    /// Files hashed from their first to their last byte.
    pub files_hashed: AtomicU64,
}

/// One mounted directory.
#[derive(Debug)]
pub struct Tree {
    pub(crate) role: Role,
    pub(crate) options: TreeOptions,
    pub(crate) parts: TreeParts,
    pub(crate) table: Table,
    pub(crate) handles: Handles,
    /// Held for reading while a path is computed and used in the database, for writing while a name changes.
    pub(crate) names_lock: RwLock<()>,
    pub(crate) counters: Counters,
    /// What the holder of apt's lock has done so far. A leaf among the locks, but for the catalog's own.
    pub(crate) run: Mutex<Run>,
    /// What apt updates, in the lists. A leaf among the locks.
    pub(crate) updates: Mutex<Updates>,
    /// What apt installs, in the archives. A leaf among the locks.
    pub(crate) installs: Mutex<Installs>,
    pub(crate) refresher: Option<Arc<Refresher>>,
    /// Whether objects lie on the covered file system, so that giving one up makes room there.
    objects_beside: bool,
    /// Whether objects are being given up.
    making_room: AtomicBool,
    hashing: Arc<Semaphore>,
    /// Hashings and recordings that still run after their request was answered.
    busy: watch::Sender<u64>,
}

impl Tree {
    /// A tree over the covered directory `root`. Without `refresher` the catalog does not follow the lists.
    pub fn new(
        role: Role,
        root: OwnedFd,
        options: TreeOptions,
        parts: TreeParts,
        refresher: Option<Arc<Refresher>>,
    ) -> Result<Arc<Self>, FsError> {
        let (root, _) = Backing::of_fd(root)?;
        if root.kind != FileType::Directory {
            return Err(Errno::NOTDIR.into());
        }
        let objects_beside = parts.objects.device()? == root.key.dev;
        let tree = Arc::new(Self {
            role,
            options,
            objects_beside,
            making_room: AtomicBool::new(false),
            parts,
            table: Table::new(root),
            handles: Handles::default(),
            names_lock: RwLock::new(()),
            counters: Counters::default(),
            run: Mutex::default(),
            updates: Mutex::default(),
            installs: Mutex::default(),
            refresher,
            hashing: Arc::new(Semaphore::new(HASHING_MAX)),
            busy: watch::Sender::new(0),
        });
        if let Some(refresher) = &tree.refresher {
            refresher.judges(&tree);
        }
        Ok(tree)
    }

    /// Which directory it is.
    pub fn role(&self) -> Role {
        self.role
    }

    /// What happened so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// How many files are open.
    pub fn open_files(&self) -> usize {
        self.handles.files_len()
    }

    /// Where waiting operations run.
    pub(crate) fn runtime(&self) -> &tokio::runtime::Handle {
        &self.parts.runtime
    }

    /// Whether something is being hashed or recorded behind an answered request.
    pub fn is_busy(&self) -> bool {
        *self.busy.borrow() > 0
    }

    /// Waits until nothing is being hashed or recorded behind an answered request.
    pub async fn settled(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.busy.subscribe().wait_for(|busy| *busy == 0).await;
    }

    /// Until this is dropped, [`Self::settled`] waits.
    pub(crate) fn at_work(self: &Arc<Self>) -> Done {
        self.busy.send_modify(|busy| *busy += 1);
        Done(Arc::clone(self))
    }

    /// Runs what may take long and belongs to no request any more.
    pub(crate) fn in_background(self: &Arc<Self>, work: impl Future<Output = ()> + Send + 'static) {
        let done = self.at_work();
        self.parts.runtime.spawn(async move {
            let _done = done;
            work.await;
        });
    }

    /// Runs blocking work that an operation waits for.
    pub(crate) async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Arc<Self>) -> Result<T, FsError> + Send + 'static,
    ) -> Result<T, FsError> {
        let tree = Arc::clone(self);
        let task = self.parts.runtime.spawn_blocking(move || work(&tree));
        task.await.unwrap_or(Err(FsError::Died))
    }

    /// Finds a name in a directory.
    pub fn lookup(self: &Arc<Self>, parent: u64, name: &OsStr, caller: &Caller) -> Answer<Entry> {
        let dir = match self.table.get(parent) {
            Ok(dir) => dir,
            Err(err) => return Answer::Ready(Err(err)),
        };
        match self.look_up_real(&dir, name) {
            Ok((node, stat)) => Answer::Ready(Ok(self.entry(&node, &stat))),
            Err(FsError::Backing(Errno::NOENT)) => self.look_up_ghost(&dir, name, caller),
            Err(err) => Answer::Ready(Err(err)),
        }
    }

    /// Finds what is on disk under that name, and counts a lookup.
    pub(crate) fn look_up_real(&self, dir: &Arc<Node>, name: &OsStr) -> Result<(Arc<Node>, Stat), FsError> {
        // A ghost's file has its name a moment before it has its node.
        let _names = self.names_lock.read();
        let dir_fd = dir.real()?.fd();
        let stat = rustix::fs::statat(dir_fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if let Some(node) = self.table.look_up_key(Key::of(&stat), dir.id, name) {
            return Ok((node, stat));
        }
        let (backing, stat) = Backing::pin(dir_fd, name)?;
        Ok((self.table.look_up(backing, dir.id, name), stat))
    }

    pub(crate) fn entry(&self, node: &Node, stat: &Stat) -> Entry {
        Entry { attr: Attr::of(node.id, stat), ttl: self.options.ttl }
    }

    /// Takes back `count` lookups of a node.
    pub fn forget(&self, ino: u64, count: u64) {
        self.table.forget(ino, count);
    }

    /// The attributes of a node, and how long they may be believed.
    pub fn getattr(&self, ino: u64) -> Result<(Attr, Duration), FsError> {
        self.attr_of(&*self.table.get(ino)?)
    }

    fn attr_of(&self, node: &Node) -> Result<(Attr, Duration), FsError> {
        match (node.backing(), &node.ghost) {
            (None, Some(ghost)) => Ok((ghost.attr(node.id), Duration::ZERO)),
            _ => Ok((Attr::of(node.id, &node.real()?.stat()?), self.options.ttl)),
        }
    }

    /// Changes attributes. `fh`: the open handle through which it is done, if there is one.
    pub fn setattr(self: &Arc<Self>, ino: u64, fh: Option<u64>, set: SetAttr, _caller: &Caller) -> Answer<(Attr, Duration)> {
        self.set_attr_here(ino, fh, set).into()
    }

    fn set_attr_here(self: &Arc<Self>, ino: u64, fh: Option<u64>, set: SetAttr) -> Result<(Attr, Duration), FsError> {
        let node = self.table.get(ino)?;
        if let (None, Some(ghost)) = (node.backing(), &node.ghost)
            && self.set_ghost_attr(&node, ghost, set)?
        {
            return self.attr_of(&node);
        }
        let backing = node.real()?;
        if set.uid.is_some() || set.gid.is_some() {
            backing.chown(set.uid, set.gid)?;
        }
        if let Some(mode) = set.mode {
            backing.chmod(mode)?;
            self.note_kept(&node);
        }
        if let Some(size) = set.size {
            self.truncate(&node, fh, size)?;
        }
        if set.atime.is_some() || set.mtime.is_some() {
            let times = Timestamps { last_access: timespec(set.atime), last_modification: timespec(set.mtime) };
            self.keeping_stamp(&node, || Ok(backing.set_times(&times)?))?;
        }
        let stat = backing.stat()?;
        Ok((Attr::of(node.id, &stat), self.options.ttl))
    }

    /// The target of a symbolic link.
    pub fn readlink(&self, ino: u64) -> Result<Vec<u8>, FsError> {
        Ok(self.table.get(ino)?.real()?.read_link()?)
    }

    /// The backing file system's figures; what objects hold counts as free, since they give way to what is written.
    pub fn statfs(&self) -> Result<rustix::fs::StatFs, FsError> {
        let mut fs = self.backing_statfs()?;
        if self.objects_beside && fs.f_bsize > 0 {
            let spare = self.parts.objects.bytes() / fs.f_bsize.unsigned_abs();
            fs.f_bfree = fs.f_bfree.saturating_add(spare).min(fs.f_blocks);
            fs.f_bavail = fs.f_bavail.saturating_add(spare).min(fs.f_blocks);
        }
        Ok(fs)
    }

    fn backing_statfs(&self) -> Result<rustix::fs::StatFs, FsError> {
        Ok(rustix::fs::fstatfs(self.table.root().real()?.fd())?)
    }

    /// Bytes that may still be written to the covered file system.
    pub(crate) fn free_bytes(&self) -> Result<u64, FsError> {
        let fs = self.backing_statfs()?;
        Ok(fs.f_bavail.saturating_mul(fs.f_bsize.unsigned_abs()))
    }

    /// Gives up objects, then downloads that nobody waits for, for what apt and dpkg need now; whether any bytes came free on
    /// the covered file system.
    pub(crate) fn make_room(&self, bytes: u64) -> bool {
        if !self.objects_beside {
            return false;
        }
        let made = self.parts.objects.make_room(bytes).and_then(|evicted| {
            let downloads = if evicted.bytes < bytes { self.parts.fetcher.give_up_idle()? } else { 0 };
            Ok((evicted, downloads))
        });
        match made {
            Ok((evicted, downloads)) => {
                let (objects, bytes) = (evicted.files, evicted.bytes);
                if objects > 0 || downloads > 0 {
                    tracing::info!(role = %self.role, objects, bytes, downloads, "made room on a disk that is full");
                }
                objects > 0 || downloads > 0
            }
            Err(err) => {
                tracing::warn!(role = %self.role, "no room could be made: {err}");
                false
            }
        }
    }

    /// Bytes that objects would have to give up for [`OBJECTS_LEAVE_FREE`] and [`OBJECTS_LEAVE_FREE_BYTES_MAX`].
    pub(crate) fn short_bytes(&self) -> u64 {
        if !self.objects_beside {
            return 0;
        }
        self.backing_statfs().map_or(0, |fs| {
            let bytes = |blocks: u64| blocks.saturating_mul(fs.f_bsize.unsigned_abs());
            bytes(fs.f_blocks / OBJECTS_LEAVE_FREE).min(OBJECTS_LEAVE_FREE_BYTES_MAX).saturating_sub(bytes(fs.f_bavail))
        })
    }

    /// Keeps objects from filling the file system: they leave a part of it free, which apt and dpkg may need any moment.
    pub(crate) fn leave_room(self: &Arc<Self>) {
        let short = self.short_bytes();
        if short == 0 || self.parts.objects.bytes() == 0 || self.making_room.swap(true, Ordering::Relaxed) {
            return;
        }
        let tree = Arc::clone(self);
        self.in_background(async move {
            let made = tree.blocking(move |tree| Ok(tree.make_room(short))).await;
            tree.making_room.store(false, Ordering::Relaxed);
            if let Err(err) = made {
                tracing::warn!("objects could not make room: {err}");
            }
        });
    }

    /// Whether the database has something to say about the file's bytes.
    pub(crate) fn is_recorded(&self, node: &Node) -> bool {
        self.options.verify && node.backing().is_some_and(|backing| backing.kind == FileType::RegularFile)
    }

    /// Notes a failure of the database that must not fail the request: the file is hashed again the next time.
    pub(crate) fn note_lost_record(&self, what: &str, err: &FsError) {
        tracing::warn!(role = %self.role, "{what}: {err}; the file is hashed again when it is next opened");
    }

    pub(crate) fn bump(&self, counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Counts a background job down, also when it panics.
pub(crate) struct Done(Arc<Tree>);

impl Drop for Done {
    fn drop(&mut self) {
        self.0.busy.send_modify(|busy| *busy -= 1);
    }
}

fn timespec(time: Option<SetTime>) -> Timespec {
    match time {
        None => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
        Some(SetTime::Now) => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW },
        Some(SetTime::At(time)) => time.timespec(),
    }
}
