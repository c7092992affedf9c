//! Mounting over apt's directories, and unmounting.
//!
//! [`prepare`] does what has to be done before anything is mounted: it detaches a dead mount of ours that lies on top,
//! clones the file system's mount with `open_tree` and opens, relative to that one clone, the covered directories,
//! `objects/` and `incoming/`. A rename between two of them then stays on one mount, and what is mounted on top later
//! (this file system, an autofs) is not in the way. [`Mounts::mount`] mounts and serves.
//!
//! Mounting and unmounting take apt's own lock in the directory first, so that neither happens under a running apt.

mod pulse;
mod table;

pub use pulse::answers;

use crate::adapter;
use crate::errno::FsError;
use crate::lock;
pub use crate::lock::Held;
use crate::refresh::Refresher;
use crate::tree::{self, Tree, TreeOptions, TreeParts};
use poolfs_core::Role;
use poolfs_core::catalog::Vanished;
use poolfs_core::store::{self, Counts, StoreError};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, OpenTreeFlags, UnmountFlags};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::ffi::{CString, OsStr};

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use table::MountLine;
use tokio::sync::watch;

/// The file system type in the mount table.
pub const FSTYPE: &str = "fuse.poolfs";

/// How long mounting and unmounting wait for an apt that is running.
pub const LOCK_WAIT: Duration = Duration::from_secs(30);

/// How long an unmount waits for files that are still open, before the caller has to decide.
const BUSY_WAIT: Duration = Duration::from_secs(2);

/// How long an unmount waits for the session to end.
const SESSION_WAIT: Duration = Duration::from_secs(5);

/// Between two tries to unmount.
const BUSY_TRY_EVERY: Duration = Duration::from_millis(50);

/// How long an unmount waits for the last files to be hashed and recorded. What is not is hashed at the next start.
const RECORD_WAIT: Duration = Duration::from_secs(20);

/// Dead mounts detached from one directory; more than that is something else going wrong.
const DEAD_MAX: usize = 16;

/// Descriptors wanted: one for each file that the kernel remembers.
const DESCRIPTORS: u64 = 1 << 20;

/// Read-ahead of the mounts in KiB: the kernel's own 128 would cost a request for every two blocks.
const READ_AHEAD_KIB: &str = "1024";

/// Why something could not be mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// Mounting needs root.
    #[error("mounting needs root (CAP_SYS_ADMIN); run it with sudo")]
    NotRoot,
    /// The kernel's FUSE device cannot be opened.
    #[error("open /dev/fuse: {0}; load the module with `modprobe fuse`, or give the container the device")]
    NoDevice(Errno),
    /// What is to be mounted over is not a directory.
    #[error("{0} is not a directory; create it, or name another in the config")]
    NotADirectory(PathBuf),
    /// A living poolfs is there already.
    #[error("{0} is served by a poolfs already; `poolfs down` ends it")]
    AlreadyMounted(PathBuf),
    /// apt is running and did not end in time.
    #[error("{0} is locked by a running apt; wait until it has ended and try again")]
    Locked(PathBuf),
    /// Files below it are open.
    #[error("{0} is in use; close what is open there (`fuser -m {0}`), or detach it with `umount -l`")]
    Busy(PathBuf),
    /// A step failed.
    #[error("{what} {path}")]
    Step {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The tree could not be made.
    #[error(transparent)]
    Tree(#[from] FsError),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn step<E: Into<io::Error>>(what: &'static str, path: &Path) -> impl FnOnce(E) -> MountError {
    move |source| MountError::Step { what, path: path.to_owned(), source: source.into() }
}

/// What to mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountSpec {
    /// What the directory is to apt.
    pub role: Role,
    /// The directory.
    pub path: PathBuf,
    /// How.
    pub options: MountOptions,
}

/// Mount options, as after `-o`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// `ro`: nothing is written through it.
    pub read_only: bool,
    /// `browse`: ghosts are listed.
    pub browse: bool,
    /// `nosuid`: set-id bits have no effect.
    pub nosuid: bool,
    /// `nodev`: device nodes have no effect.
    pub nodev: bool,
    /// `noexec`: no file is executed from it.
    pub noexec: bool,
    /// `noatime`: reads do not change access times.
    pub noatime: bool,
    /// Ghosts directly in `archives/` are not shown, not even to those that do not use libapt.
    pub no_lazy_archives: bool,
    /// How long the kernel may believe names and attributes of what is on disk; `None`: [`crate::tree::TTL`].
    pub ttl: Option<Duration>,
}

/// A covered directory, reached beneath whatever is mounted on it.
#[derive(Debug)]
pub struct PreparedMount {
    /// What was asked for; the path is without symbolic links now.
    pub spec: MountSpec,
    /// The covered directory.
    pub dir: OwnedFd,
}

impl PreparedMount {
    /// Takes apt's lock in the directory, waiting [`LOCK_WAIT`] for it. Blocks.
    pub fn lock(&self) -> Result<Held, MountError> {
        let held = lock::hold_in(self.dir.as_fd(), LOCK_WAIT).map_err(step("lock", &self.spec.path))?;
        held.ok_or_else(|| MountError::Locked(self.spec.path.clone()))
    }
}

/// Everything that has to be open before mounting.
#[derive(Debug)]
pub struct Prepared {
    /// The covered directories, as asked for.
    pub mounts: Vec<PreparedMount>,
    /// `objects/` below the cache directory.
    pub objects: OwnedFd,
    /// `incoming/` below the cache directory.
    pub incoming: OwnedFd,
    /// For directories that are mounted over later.
    pub places: Places,
}

impl Prepared {
    /// The covered directory of that role.
    pub fn dir(&self, role: Role) -> Option<BorrowedFd<'_>> {
        self.mounts.iter().find(|mount| mount.spec.role == role).map(|mount| mount.dir.as_fd())
    }
}

/// Opens all directories. Creates `objects/` and `incoming/` below `cache_dir`, and `partial/` nowhere: that is apt's.
pub fn prepare(wanted: &[MountSpec], cache_dir: &Path) -> Result<Prepared, MountError> {
    if !rustix::process::geteuid().is_root() {
        return Err(MountError::NotRoot);
    }
    raise_descriptors();
    let mut specs = Vec::new();
    for spec in wanted {
        specs.push(MountSpec { path: clear(&spec.path)?, ..spec.clone() });
    }
    for name in ["objects", "incoming"] {
        use std::os::unix::fs::DirBuilderExt as _;
        let dir = cache_dir.join(name);
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&dir).map_err(step("create", &dir))?;
    }
    let cache_dir = cache_dir.canonicalize().map_err(step("find", cache_dir))?;
    let mut places = Places { mounts: table_now()?, open: Vec::new() };
    let mounts =
        specs.into_iter().map(|spec| Ok(PreparedMount { dir: places.open_dir(&spec.path)?, spec })).collect::<Result<_, MountError>>()?;
    let objects = places.open_dir(&cache_dir.join("objects"))?;
    let incoming = places.open_dir(&cache_dir.join("incoming"))?;
    Ok(Prepared { mounts, objects, incoming, places })
}

fn table_now() -> Result<Vec<MountLine>, MountError> {
    table::read().map_err(step("read", Path::new("/proc/self/mountinfo")))
}

/// The path without symbolic links, and without dead mounts of ours on it.
fn clear(path: &Path) -> Result<PathBuf, MountError> {
    let absolute = std::path::absolute(path).map_err(step("find", path))?;
    let parent = absolute.parent().unwrap_or(Path::new("/"));
    let missing = |err: io::Error| match err.kind() {
        io::ErrorKind::NotFound => MountError::NotADirectory(absolute.clone()),
        _ => step("find", &absolute)(err),
    };
    let parent = parent.canonicalize().map_err(missing)?;
    let mut target = absolute.file_name().map_or_else(|| parent.clone(), |name| parent.join(name));
    for _ in 0..DEAD_MAX {
        let mounts = table_now()?;
        match table::top(&mounts, &target) {
            Some(mount) if mount.fstype == FSTYPE => match alive(&target) {
                true => return Err(MountError::AlreadyMounted(target)),
                false => {
                    tracing::warn!("{} has a mount whose poolfs is dead; it is detached", target.display());
                    detach(&target)?;
                }
            },
            // An autofs would mount something if it were looked into; what it covers is reached by the clone.
            Some(mount) if mount.fstype == "autofs" => return Ok(target),
            Some(_) | None => {
                let real = target.canonicalize().map_err(missing)?;
                if !std::fs::metadata(&real).map_err(step("find", &real))?.is_dir() {
                    return Err(MountError::NotADirectory(target));
                }
                if real == target {
                    return Ok(target);
                }
                // A symbolic link: what it leads to may have a dead mount too.
                target = real;
            }
        }
    }
    Err(MountError::Busy(target))
}

/// Whether somebody serves the mount at `path`: the kernel answers ENOTCONN for a dead one.
fn alive(path: &Path) -> bool {
    // What the kernel remembers of a dead one for a second would make it look alive.
    let flags = AtFlags::NO_AUTOMOUNT | AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_FORCE_SYNC;
    let asked = rustix::fs::statx(rustix::fs::CWD, path, flags, StatxFlags::BASIC_STATS);
    !matches!(asked, Err(Errno::NOTCONN | Errno::CONNABORTED))
}

/// Detaches what is mounted at `path`; open files below it keep it until they are closed.
pub fn detach(path: &Path) -> Result<(), MountError> {
    rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).map_err(step("detach", path))
}

/// Stands for the id of a mount that is not listed; the kernel gives none of this number.
const NO_MOUNT: u64 = 0;

/// The cloned mounts that directories are opened in, one per mount: who is mounted over later is opened in the clone that is
/// there, since a rename between two clones fails with EXDEV.
pub struct Places {
    mounts: Vec<MountLine>,
    open: Vec<(u64, PathBuf, OwnedFd)>,
}

impl std::fmt::Debug for Places {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Places").field("clones", &self.open.len()).finish_non_exhaustive()
    }
}

impl Places {
    /// As [`prepare`] for one more directory.
    pub fn add(&mut self, spec: &MountSpec) -> Result<PreparedMount, MountError> {
        let spec = MountSpec { path: clear(&spec.path)?, ..spec.clone() };
        self.mounts = table_now()?;
        Ok(PreparedMount { dir: self.open_dir(&spec.path)?, spec })
    }

    fn open_dir(&mut self, path: &Path) -> Result<OwnedFd, MountError> {
        let covers = |mount: &MountLine| mount.fstype == FSTYPE || mount.fstype == "autofs";
        // In a chroot(2) whose root is no mount, the table lists none that contains it; the root can be cloned all the same.
        let containing = table::containing(&self.mounts, path, covers);
        let (id, point) = containing.map_or((NO_MOUNT, Path::new("/")), |mount| (mount.id, &*mount.point));
        let known = self.open.iter().position(|(known, ..)| *known == id);
        let at = match known {
            Some(at) => at,
            None => {
                let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
                let clone = rustix::mount::open_tree(rustix::fs::CWD, point, flags).map_err(|err| match err {
                    Errno::PERM => MountError::NotRoot,
                    err => step("clone the mount of", path)(err),
                })?;
                self.open.push((id, point.to_owned(), clone));
                self.open.len() - 1
            }
        };
        let (_, point, clone) = &self.open[at];
        let below = path.strip_prefix(point).unwrap_or(Path::new(""));
        let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
        rustix::fs::openat2(clone, below, flags, Mode::empty(), resolve).map_err(|err| match err {
            Errno::NOTDIR => MountError::NotADirectory(path.to_owned()),
            err => step("open", path)(err),
        })
    }
}

fn raise_descriptors() {
    let now = getrlimit(Resource::Nofile);
    let wanted = Rlimit { current: Some(DESCRIPTORS), maximum: Some(now.maximum.map_or(DESCRIPTORS, |max| max.max(DESCRIPTORS))) };
    let most = Rlimit { current: now.maximum, maximum: now.maximum };
    if setrlimit(Resource::Nofile, wanted).is_err() && setrlimit(Resource::Nofile, most).is_err() {
        tracing::warn!("the limit of open files stays at {:?}; a listing of more files than that will fail", now.current);
    }
}

/// One mounted directory, as `status` shows it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MountStats {
    /// What it is to apt.
    pub role: Role,
    /// Where it is mounted.
    pub path: PathBuf,
    /// Its device, as in the mount table: `major:minor`.
    pub device: String,
    /// Its files by state.
    pub counts: Counts,
    /// Ghosts that were opened since the start.
    pub ghosts_opened: u64,
    /// Blocks that matched their checksum when they were read, since the start.
    pub blocks_checked: u64,
    /// Blocks that did not.
    pub blocks_bad: u64,
    /// Of these, blocks that were fetched again.
    pub blocks_mended: u64,
    /// Files hashed from first to last byte since the start.
    pub files_hashed: u64,
    /// Bytes that are missing of the part of this file system that objects leave free; while any are, no removed file is kept.
    pub objects_short_bytes: u64,
}

/// One directory that is mounted and served.
#[derive(Debug)]
pub struct Mount {
    spec: MountSpec,
    tree: Arc<Tree>,
    dir: OwnedFd,
    device: String,
    thread: Option<JoinHandle<io::Result<()>>>,
    /// Set by the thread before it tells of its end: it may be a moment yet until it is finished.
    over: Arc<AtomicBool>,
}

/// All mounts of this process. Dropping it detaches them.
#[derive(Debug)]
pub struct Mounts {
    mounts: Vec<Mount>,
    /// How many sessions have ended.
    ended: watch::Sender<u64>,
    refresher: Arc<Refresher>,
    /// What every mount of this process is served with.
    terms: Terms,
}

/// How all mounts of a process are served.
#[derive(Debug)]
struct Terms {
    parts: TreeParts,
    /// Off only to measure what checking costs.
    verify: bool,
    /// FUSE threads of each mount.
    threads: usize,
}

impl Mounts {
    /// Mounts what was prepared and serves it with `threads` FUSE threads each. What was mounted is detached again if a
    /// later one fails. `verify` is off only to measure what checking costs.
    ///
    /// With a lists directory among them, added later, or elsewhere, the catalog is refreshed in the background, now and
    /// whenever apt changes it.
    /// The caller starts [`Tree::scan`] of each tree when it has the time.
    pub fn mount(prepared: Vec<PreparedMount>, parts: &TreeParts, verify: bool, threads: usize) -> Result<Self, MountError> {
        let refresher = Refresher::new(Arc::clone(&parts.names), parts.lists_elsewhere.clone(), false, parts.runtime.clone());
        let terms = Terms { parts: parts.clone(), verify, threads };
        let mut mounts = Self { mounts: Vec::new(), ended: watch::Sender::new(0), refresher, terms };
        // Before the first tree is asked anything: it looks the lists through itself only if nobody follows them.
        for lists in prepared.iter().filter(|mount| mount.spec.role == Role::Lists) {
            mounts.follow(lists)?;
        }
        for one in prepared {
            let lock = one.lock()?;
            mounts.start(one, lock)?;
        }
        mounts.refresher.request(Vanished::Drop);
        Ok(mounts)
    }

    /// Mounts one more directory, whose lock the caller took by [`PreparedMount::lock`], as the others are. Returns its tree.
    pub fn add(&mut self, prepared: PreparedMount, lock: Held) -> Result<Arc<Tree>, MountError> {
        let is_lists = prepared.spec.role == Role::Lists;
        if is_lists {
            self.follow(&prepared)?;
        }
        if let Err(err) = self.start(prepared, lock) {
            if is_lists {
                self.refresher.unfollow();
            }
            return Err(err);
        }
        // Also where the lists were there before: what is here of the new one is to be judged.
        self.refresher.request(Vanished::Drop);
        Ok(Arc::clone(&self.mounts.last().expect("it was just added").tree))
    }

    /// What follows the lists, and judges what is here by them.
    pub fn refresher(&self) -> &Arc<Refresher> {
        &self.refresher
    }

    fn follow(&self, lists: &PreparedMount) -> Result<(), MountError> {
        self.refresher.follow(Arc::new(lists.dir.try_clone().map_err(step("open", &lists.spec.path))?));
        Ok(())
    }

    fn start(&mut self, PreparedMount { spec, dir }: PreparedMount, lock: Held) -> Result<(), MountError> {
        if let Err(err) = store::sweep(dir.as_fd()) {
            tracing::warn!("half a copy may be left in {}: {err}", spec.path.display());
        }
        // What a crash left half copied under a name of our own.
        for below in [".", "partial"] {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let Ok(swept) = rustix::fs::openat(&dir, below, flags, Mode::empty()) else { continue };
            poolfs_core::store::sweep(swept.as_fd()).map_err(step("sweep", &spec.path))?;
        }
        let options = TreeOptions {
            verify: self.terms.verify,
            browse: spec.options.browse,
            lazy_archives: !spec.options.no_lazy_archives,
            ttl: spec.options.ttl.unwrap_or(tree::TTL),
        };
        let root = dir.try_clone().map_err(step("open", &spec.path))?;
        let tree = Tree::new(spec.role, root, options, self.terms.parts.clone(), Some(Arc::clone(&self.refresher)))?;
        self.mounts.push(Mount::start(spec, tree, dir, lock, self.terms.threads, self.ended.clone())?);
        Ok(())
    }

    /// Changes the options of the mount at `path` that the kernel keeps: all but `browse` and what is shown of ghosts.
    pub fn remount(&mut self, path: &Path, options: MountOptions) -> Result<(), MountError> {
        let Some(mount) = self.mounts.iter_mut().find(|mount| mount.spec.path == path) else {
            return Err(step("remount", path)(io::Error::from(io::ErrorKind::NotFound)));
        };
        rustix::mount::mount_remount(path, flags(&options), c"").map_err(step("remount", path))?;
        mount.spec.options = options;
        Ok(())
    }

    /// Asks for the catalog to be read anew, since apt's sources may be others; returns at once.
    pub fn refresh(&self) {
        self.refresher.request(Vanished::Drop);
    }

    /// What is mounted, and how.
    pub fn specs(&self) -> impl Iterator<Item = &MountSpec> {
        self.mounts.iter().map(|mount| &mount.spec)
    }

    /// Whether the mount table still shows our mount at `path`: the session may be a moment behind an `umount`.
    pub fn is_mounted(&self, path: &Path) -> bool {
        self.mounts.iter().any(|mount| mount.spec.path == path && mount.is_mounted())
    }

    /// The trees that are served.
    pub fn trees(&self) -> impl Iterator<Item = &Arc<Tree>> {
        self.mounts.iter().map(|mount| &mount.tree)
    }

    /// Where they are mounted: what a supervisor detaches when this process dies.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.mounts.iter().map(|mount| mount.spec.path.as_path())
    }

    /// Where they are mounted, each with its device as in the mount table, for [`answers`].
    pub fn devices(&self) -> Vec<(PathBuf, String)> {
        self.mounts.iter().map(|mount| (mount.spec.path.clone(), mount.device.clone())).collect()
    }

    /// The figures of each mount.
    pub fn stats(&self) -> Result<Vec<MountStats>, StoreError> {
        self.mounts.iter().map(Mount::stats).collect()
    }

    /// Changes whenever a session has ended: somebody called `umount`, or the kernel gave up on it. [`Self::reap`] tells which.
    pub fn ended(&self) -> watch::Receiver<u64> {
        self.ended.subscribe()
    }

    /// Takes out the mounts whose sessions have ended; the error is one of a session that did not end by an unmount.
    pub fn reap(&mut self) -> Result<Vec<PathBuf>, MountError> {
        let mut gone = Vec::new();
        let mut index = 0;
        while let Some(mount) = self.mounts.get_mut(index) {
            if !mount.over.load(Ordering::Acquire) {
                index += 1;
                continue;
            }
            if mount.is_mounted() {
                return Err(step("serve", &mount.spec.path)(io::Error::other("the session ended while it was mounted")));
            }
            mount.join();
            let mount = self.mounts.remove(index);
            if mount.spec.role == Role::Lists {
                self.refresher.unfollow();
            }
            gone.push(mount.spec.path);
        }
        Ok(gone)
    }

    /// Whether all are still served: somebody may have called `umount`.
    pub fn all_served(&self) -> bool {
        self.mounts.iter().all(|mount| !mount.over.load(Ordering::Acquire))
    }

    /// Whether nothing is left to serve.
    pub fn is_empty(&self) -> bool {
        self.mounts.is_empty()
    }

    /// Apt's locks of all mounts, for [`Self::unmount_locked`].
    pub fn locks(&self) -> Result<Locks, MountError> {
        let lock = |mount: &Mount| Ok((mount.spec.path.clone(), mount.dir.try_clone().map_err(step("lock", &mount.spec.path))?));
        Ok(Locks { wanted: self.mounts.iter().filter(|mount| mount.is_mounted()).map(lock).collect::<Result<_, MountError>>()? })
    }

    /// Unmounts all under apt's locks, waiting for them; if one is held, all stay mounted.
    pub fn unmount(&mut self) -> Result<(), MountError> {
        let held = self.locks()?.hold()?;
        self.unmount_locked(&held)
    }

    /// Unmounts all. If one is busy it and those before it stay mounted.
    pub fn unmount_locked(&mut self, _held: &HeldLocks) -> Result<(), MountError> {
        while let Some(mount) = self.mounts.last_mut() {
            mount.unmount()?;
            self.mounts.pop();
        }
        Ok(())
    }

    /// Detaches all at once, whoever uses them. Files that are open stay served until they are closed.
    pub fn detach(&mut self) {
        for mut mount in self.mounts.drain(..).rev() {
            mount.detach();
        }
    }
}

/// Apt's locks in the covered directories, not yet taken.
#[derive(Debug)]
pub struct Locks {
    wanted: Vec<(PathBuf, OwnedFd)>,
}

/// Apt's locks in the covered directories, held until dropped.
#[derive(Debug)]
pub struct HeldLocks {
    _held: Vec<Held>,
}

impl Locks {
    /// Takes all, waiting [`LOCK_WAIT`] for each. Blocks.
    pub fn hold(self) -> Result<HeldLocks, MountError> {
        let one = |(path, dir): (PathBuf, OwnedFd)| {
            let held = lock::hold_in(dir.as_fd(), LOCK_WAIT).map_err(step("lock", &path))?;
            held.ok_or(MountError::Locked(path))
        };
        Ok(HeldLocks { _held: self.wanted.into_iter().map(one).collect::<Result<_, _>>()? })
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        self.detach();
    }
}

impl Mount {
    fn start(
        spec: MountSpec,
        tree: Arc<Tree>,
        dir: OwnedFd,
        lock: Held,
        threads: usize,
        ended: watch::Sender<u64>,
    ) -> Result<Self, MountError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let device = rustix::fs::open("/dev/fuse", flags, Mode::empty()).map_err(MountError::NoDevice)?;
        mount_at(&spec, &device)?;
        // An apt that opens the lock from now on is answered by the session: it must not find us in its way.
        drop(lock);
        let over = Arc::new(AtomicBool::new(false));
        let tells = Arc::clone(&over);
        let served = (|| {
            let session = adapter::session(Arc::clone(&tree), device, threads).map_err(step("serve", &spec.path))?;
            let run = move || {
                let end = session.run();
                tells.store(true, Ordering::Release);
                ended.send_modify(|count| *count += 1);
                end
            };
            std::thread::Builder::new().name(format!("poolfs-{}", spec.role)).spawn(run).map_err(step("serve", &spec.path))
        })();
        match served {
            Ok(thread) => {
                let device = device_of(&spec.path);
                read_ahead(&device);
                Ok(Self { spec, tree, dir, device, thread: Some(thread), over })
            }
            Err(err) => {
                detach(&spec.path)?;
                Err(err)
            }
        }
    }

    fn stats(&self) -> Result<MountStats, StoreError> {
        let counters = self.tree.counters();
        Ok(MountStats {
            role: self.spec.role,
            path: self.spec.path.clone(),
            device: self.device.clone(),
            counts: self.tree.parts.store.counts(self.spec.role)?,
            ghosts_opened: counters.ghosts_opened.load(Ordering::Relaxed),
            blocks_checked: counters.blocks_checked.load(Ordering::Relaxed),
            blocks_bad: counters.blocks_bad.load(Ordering::Relaxed),
            blocks_mended: counters.blocks_mended.load(Ordering::Relaxed),
            files_hashed: counters.files_hashed.load(Ordering::Relaxed),
            objects_short_bytes: self.tree.short_bytes(),
        })
    }

    /// Whether the mount table still shows this mount on top of its directory.
    fn is_mounted(&self) -> bool {
        let mounts = table::read().unwrap_or_default();
        table::top(&mounts, &self.spec.path).is_some_and(|mount| mount.fstype == FSTYPE && mount.device == self.device)
    }

    fn unmount(&mut self) -> Result<(), MountError> {
        if self.is_mounted() {
            let deadline = std::time::Instant::now() + BUSY_WAIT;
            loop {
                match rustix::mount::unmount(&self.spec.path, UnmountFlags::NOFOLLOW) {
                    Ok(()) => break,
                    Err(Errno::BUSY) if std::time::Instant::now() < deadline => std::thread::sleep(BUSY_TRY_EVERY),
                    Err(Errno::BUSY) => return Err(MountError::Busy(self.spec.path.clone())),
                    Err(err) => return Err(step("unmount", &self.spec.path)(err)),
                }
            }
        }
        // A namespace that was made meanwhile may have a copy of the mount, and nobody knows for how long.
        let deadline = std::time::Instant::now() + SESSION_WAIT;
        while !self.over.load(Ordering::Acquire) && std::time::Instant::now() < deadline {
            std::thread::sleep(BUSY_TRY_EVERY);
        }
        if self.over.load(Ordering::Acquire) {
            self.join();
        } else {
            tracing::warn!("{} is still mounted in another namespace, where it ends with this process", self.spec.path.display());
        }
        // What was written last is recorded before anybody takes the database away.
        let deadline = std::time::Instant::now() + RECORD_WAIT;
        while self.tree.is_busy() && std::time::Instant::now() < deadline {
            std::thread::sleep(BUSY_TRY_EVERY);
        }
        Ok(())
    }

    fn detach(&mut self) {
        if self.is_mounted()
            && let Err(err) = detach(&self.spec.path)
        {
            tracing::error!("{err}");
        }
    }

    /// Waits for the FUSE threads, which end when the last user of the mount has gone.
    fn join(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        match thread.join() {
            Ok(Ok(())) => {}
            Ok(Err(err)) => tracing::warn!("{}: the session ended with: {err}", self.spec.path.display()),
            Err(_) => tracing::error!("{}: the session's thread panicked", self.spec.path.display()),
        }
    }
}

/// mount(2) with our own options: fuser's would want libfuse's helper for some of them.
fn mount_at(spec: &MountSpec, device: &OwnedFd) -> Result<(), MountError> {
    let data = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions", device.as_raw_fd());
    let data = CString::new(data).expect("no zero byte in it");
    // The source as fstab has it: mount(8) knows by it that a line is mounted already.
    rustix::mount::mount(spec.role.as_str(), &spec.path, FSTYPE, flags(&spec.options), data.as_c_str()).map_err(|err| match err {
        Errno::PERM => MountError::NotRoot,
        Errno::NODEV => MountError::NoDevice(err),
        err => step("mount", &spec.path)(err),
    })
}

fn flags(options: &MountOptions) -> MountFlags {
    let all = [
        (options.read_only, MountFlags::RDONLY),
        (options.nosuid, MountFlags::NOSUID),
        (options.nodev, MountFlags::NODEV),
        (options.noexec, MountFlags::NOEXEC),
        (options.noatime, MountFlags::NOATIME),
    ];
    all.into_iter().filter(|(wanted, _)| *wanted).map(|(_, flag)| flag).collect()
}

/// The mount's device as `major:minor`, empty if it is gone already.
fn device_of(path: &Path) -> String {
    let mounts = table::read().unwrap_or_default();
    table::top(&mounts, path).map_or_else(String::new, |mount| mount.device.clone())
}

/// Larger read-ahead than the kernel offers at first. Costs nothing but speed where /sys is not writable.
fn read_ahead(device: &str) {
    let path = Path::new("/sys/class/bdi").join(OsStr::new(device)).join("read_ahead_kb");
    if let Err(err) = std::fs::write(&path, READ_AHEAD_KIB) {
        tracing::debug!("{}: {err}", path.display());
    }
}
