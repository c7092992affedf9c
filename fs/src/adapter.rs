//! The kernel's requests, translated: the only file that names fuser.
//!
//! Each request has one span. What the tree answers at once is sent from the FUSE thread; what has to wait takes its reply
//! into a task. A panic is caught per request: the caller gets EIO, one line is logged, and the mount lives on.

use crate::attr::{Attr, SetAttr, SetTime, Time};
use crate::errno::FsError;
use crate::tree::{Answer, Caller, Entry, Opened, Tree};
use fuser::{
    AccessFlags, BsdFileFlags, Config, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, Session, SessionACL,
    TimeOrNow, WriteFlags,
};
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tracing::{Span, debug_span};

/// Requests that may be pending in the background (read-ahead, asynchronous I/O) before the kernel makes others wait.
const BACKGROUND_MAX: u16 = 512;

/// The largest write request, in bytes; reads are bounded by the same number of pages.
const WRITE_BYTES_MAX: u32 = 1024 * 1024;

/// Names are never given to another inode while the kernel knows them.
const GENERATION: Generation = Generation(0);

/// A tree as fuser wants it.
#[derive(Debug)]
pub(crate) struct Adapter {
    tree: Arc<Tree>,
}

/// Serves a tree on an open `/dev/fuse` whose mount has just been made. Blocks until the kernel has said hello.
pub(crate) fn session(tree: Arc<Tree>, device: OwnedFd, threads: usize) -> io::Result<Session<Adapter>> {
    let mut config = Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(threads.max(1));
    Session::from_fd(Adapter { tree }, device, SessionACL::All, config)
}

fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid(), pid: request.pid() }
}

fn errno(err: &FsError) -> Errno {
    if err.is_fault() {
        tracing::error!("{err}");
    } else {
        tracing::debug!("{err}");
    }
    Errno::from_i32(err.errno().raw_os_error())
}

fn guarded<T>(body: impl FnOnce() -> Result<T, FsError>) -> Result<T, FsError> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let what = panic.downcast_ref::<&str>().map(|s| (*s).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
        tracing::error!("a request panicked: {}", what.unwrap_or_default());
        Err(FsError::Died)
    })
}

/// A reply that can say that it failed.
trait Fails: Send + 'static {
    fn fail(self, err: Errno);
}

macro_rules! fails {
    ($($reply:ty),+) => { $(impl Fails for $reply { fn fail(self, err: Errno) { self.error(err); } })+ };
}
fails!(
    ReplyAttr,
    ReplyCreate,
    ReplyData,
    ReplyDirectory,
    ReplyDirectoryPlus,
    ReplyEmpty,
    ReplyEntry,
    ReplyLseek,
    ReplyOpen,
    ReplyStatfs,
    ReplyWrite,
    ReplyXattr
);

/// Answers a request that never waits.
fn answer<T, R: Fails>(span: &Span, reply: R, body: impl FnOnce() -> Result<T, FsError>, send: impl FnOnce(R, T)) {
    let _in = span.enter();
    match guarded(body) {
        Ok(value) => send(reply, value),
        Err(err) => reply.fail(errno(&err)),
    }
}

impl Adapter {
    /// Answers a request that may wait: then the reply moves into a task.
    fn answer_later<T: Send + 'static, R: Fails>(
        &self,
        span: Span,
        reply: R,
        body: impl FnOnce() -> Answer<T>,
        send: impl FnOnce(R, T) + Send + 'static,
    ) {
        let entered = span.enter();
        let answered = guarded(|| Ok(body()));
        drop(entered);
        let waiting = match answered {
            Ok(Answer::Ready(Ok(value))) => return span.in_scope(|| send(reply, value)),
            Ok(Answer::Ready(Err(err))) | Err(err) => return span.in_scope(|| reply.fail(errno(&err))),
            Ok(Answer::Wait(waiting)) => waiting,
        };
        use tracing::Instrument as _;
        let runtime = self.tree.runtime().clone();
        // The inner task catches what panics; the outer one holds the reply.
        let work = runtime.spawn(waiting.instrument(span.clone()));
        runtime.spawn(
            async move {
                match work.await.unwrap_or(Err(FsError::Died)) {
                    Ok(value) => send(reply, value),
                    Err(err) => reply.fail(errno(&err)),
                }
            }
            .instrument(span),
        );
    }
}

/// A request's span. `fh` of 0 is no handle.
macro_rules! request_span {
    ($request:expr, $op:literal, $ino:expr $(, $($fields:tt)+)?) => {
        debug_span!($op, id = $request.unique().0, ino = u64::from($ino), pid = $request.pid() $(, $($fields)+)?)
    };
}

fn system_time(time: Time) -> SystemTime {
    let nanos = Duration::from_nanos(time.nsec.into());
    let seconds = Duration::from_secs(time.sec.unsigned_abs());
    if time.sec < 0 { SystemTime::UNIX_EPOCH - seconds + nanos } else { SystemTime::UNIX_EPOCH + seconds + nanos }
}

fn time(time: SystemTime) -> Time {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => Time { sec: since.as_secs().cast_signed(), nsec: since.subsec_nanos() },
        Err(before) => {
            let before = before.duration();
            let sec = -before.as_secs().cast_signed();
            match before.subsec_nanos() {
                0 => Time { sec, nsec: 0 },
                nsec => Time { sec: sec - 1, nsec: 1_000_000_000 - nsec },
            }
        }
    }
}

fn kind(kind: rustix::fs::FileType) -> FileType {
    use rustix::fs::FileType as Kind;
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::CharacterDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
        Kind::RegularFile | Kind::Unknown => FileType::RegularFile,
    }
}

fn file_attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino),
        size: attr.size,
        blocks: attr.blocks,
        atime: system_time(attr.atime),
        mtime: system_time(attr.mtime),
        ctime: system_time(attr.ctime),
        crtime: SystemTime::UNIX_EPOCH,
        kind: kind(attr.kind),
        perm: attr.mode,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: attr.blksize,
        flags: 0,
    }
}

fn set_time(time_or_now: TimeOrNow) -> SetTime {
    match time_or_now {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(at) => SetTime::At(time(at)),
    }
}

fn send_entry(reply: ReplyEntry, entry: Entry) {
    reply.entry(&entry.ttl, &file_attr(&entry.attr), GENERATION);
}

fn send_xattr(reply: ReplyXattr, size: u32, value: &[u8]) {
    let len = u32::try_from(value.len()).unwrap_or(u32::MAX);
    if size == 0 {
        reply.size(len);
    } else if len > size {
        reply.error(Errno::ERANGE);
    } else {
        reply.data(value);
    }
}

fn open_flags(opened: Opened) -> FopenFlags {
    let mut flags = FopenFlags::empty();
    flags.set(FopenFlags::FOPEN_KEEP_CACHE, opened.keep_cache);
    // A close(2) that has nothing to tell us is not waited for.
    flags.set(FopenFlags::FOPEN_NOFLUSH, !opened.writes);
    flags
}

#[allow(clippy::too_many_arguments, reason = "the trait is fuser's")]
impl Filesystem for Adapter {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Offered by every kernel since 5.10; on an older one the mount is only slower. Locks stay with the kernel:
        // FUSE_POSIX_LOCKS and FUSE_FLOCK_LOCKS are not asked for.
        for flag in [
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_AUTO_INVAL_DATA,
        ] {
            if let Err(missing) = config.add_capabilities(flag) {
                tracing::debug!("the kernel does not offer {missing:?}");
            }
        }
        let limit = |what: &str, result: Result<u16, u16>| {
            if let Err(nearest) = result {
                tracing::warn!("{what} cannot be set; the nearest is {nearest}");
            }
        };
        limit("max_background", config.set_max_background(BACKGROUND_MAX));
        limit("congestion_threshold", config.set_congestion_threshold(BACKGROUND_MAX));
        if let Err(nearest) = config.set_max_write(WRITE_BYTES_MAX) {
            tracing::warn!("max_write cannot be set; the nearest is {nearest}");
        }
        Ok(())
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let span = request_span!(request, "lookup", parent, name = ?name);
        self.answer_later(span, reply, || self.tree.lookup(parent.0, name, &caller(request)), send_entry);
    }

    fn forget(&self, _request: &Request, ino: INodeNo, nlookup: u64) {
        // No reply, so nothing to fail.
        let _ = guarded(|| {
            self.tree.forget(ino.0, nlookup);
            Ok(())
        });
    }

    fn getattr(&self, request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let span = request_span!(request, "getattr", ino);
        answer(&span, reply, || self.tree.getattr(ino.0), |reply, (attr, ttl)| reply.attr(&ttl, &file_attr(&attr)));
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let span = request_span!(request, "setattr", ino, size = size);
        let set = SetAttr { mode, uid, gid, size, atime: atime.map(set_time), mtime: mtime.map(set_time) };
        self.answer_later(
            span,
            reply,
            || self.tree.setattr(ino.0, fh.map(|fh| fh.0), set, &caller(request)),
            |reply, (attr, ttl)| reply.attr(&ttl, &file_attr(&attr)),
        );
    }

    fn readlink(&self, request: &Request, ino: INodeNo, reply: ReplyData) {
        let span = request_span!(request, "readlink", ino);
        answer(&span, reply, || self.tree.readlink(ino.0), |reply, target| reply.data(&target));
    }

    fn mknod(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, _umask: u32, rdev: u32, reply: ReplyEntry) {
        let span = request_span!(request, "mknod", parent, name = ?name);
        answer(&span, reply, || self.tree.mknod(parent.0, name, mode, rdev, &caller(request)), send_entry);
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, _umask: u32, reply: ReplyEntry) {
        let span = request_span!(request, "mkdir", parent, name = ?name);
        answer(&span, reply, || self.tree.mkdir(parent.0, name, mode, &caller(request)), send_entry);
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let span = request_span!(request, "unlink", parent, name = ?name);
        answer(&span, reply, || self.tree.unlink(parent.0, name), |reply, ()| reply.ok());
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let span = request_span!(request, "rmdir", parent, name = ?name);
        answer(&span, reply, || self.tree.rmdir(parent.0, name), |reply, ()| reply.ok());
    }

    fn symlink(&self, request: &Request, parent: INodeNo, link_name: &OsStr, target: &Path, reply: ReplyEntry) {
        let span = request_span!(request, "symlink", parent, name = ?link_name);
        answer(&span, reply, || self.tree.symlink(parent.0, link_name, target.as_os_str(), &caller(request)), send_entry);
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let span = request_span!(request, "rename", parent, name = ?name, to = newparent.0, new_name = ?newname);
        self.answer_later(span, reply, || self.tree.rename((parent.0, name), (newparent.0, newname), flags.bits()), |reply, ()| reply.ok());
    }

    fn link(&self, request: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        let span = request_span!(request, "link", ino, to = newparent.0, new_name = ?newname);
        answer(&span, reply, || self.tree.link(ino.0, newparent.0, newname), send_entry);
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let span = request_span!(request, "open", ino, flags = flags.0);
        self.answer_later(
            span,
            reply,
            || self.tree.open(ino.0, flags.0),
            |reply, opened| reply.opened(FileHandle(opened.fh), open_flags(opened)),
        );
    }

    fn read(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let span = request_span!(request, "read", ino, fh = fh.0, offset = offset, size = size);
        self.answer_later(span, reply, || self.tree.read(fh.0, offset, size), |reply, bytes| reply.data(&bytes));
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let span = request_span!(request, "write", ino, fh = fh.0, offset = offset, size = data.len());
        answer(
            &span,
            reply,
            || self.tree.write(fh.0, offset, data),
            |reply, len| reply.written(u32::try_from(len).expect("no more than was given")),
        );
    }

    fn flush(&self, request: &Request, ino: INodeNo, fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        let span = request_span!(request, "flush", ino, fh = fh.0);
        answer(&span, reply, || self.tree.flush(fh.0), |reply, ()| reply.ok());
    }

    fn release(
        &self,
        request: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let span = request_span!(request, "release", ino, fh = fh.0);
        answer(&span, reply, || self.tree.release(fh.0), |reply, ()| reply.ok());
    }

    fn fsync(&self, request: &Request, ino: INodeNo, fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        let span = request_span!(request, "fsync", ino, fh = fh.0);
        self.answer_later(span, reply, || self.tree.fsync(fh.0, datasync), |reply, ()| reply.ok());
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let span = request_span!(request, "opendir", ino);
        answer(&span, reply, || self.tree.opendir(ino.0), |reply, fh| reply.opened(FileHandle(fh), FopenFlags::empty()));
    }

    fn readdir(&self, request: &Request, ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let span = request_span!(request, "readdir", ino, fh = fh.0, offset = offset);
        let _in = span.enter();
        let listed =
            guarded(|| self.tree.readdir(fh.0, offset, |entry| reply.add(INodeNo(entry.ino), entry.next, kind(entry.kind), &entry.name)));
        match listed {
            Ok(()) => reply.ok(),
            Err(err) => reply.error(errno(&err)),
        }
    }

    fn readdirplus(&self, request: &Request, ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        let span = request_span!(request, "readdirplus", ino, fh = fh.0, offset = offset);
        let _in = span.enter();
        let listed = guarded(|| {
            self.tree.readdirplus(fh.0, offset, |plus| {
                let attr = file_attr(&plus.entry.attr);
                reply.add(attr.ino, plus.dir.next, &plus.dir.name, &plus.entry.ttl, &attr, GENERATION)
            })
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(err) => reply.error(errno(&err)),
        }
    }

    fn releasedir(&self, request: &Request, ino: INodeNo, fh: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        let span = request_span!(request, "releasedir", ino, fh = fh.0);
        answer(&span, reply, || self.tree.releasedir(fh.0), |reply, ()| reply.ok());
    }

    fn fsyncdir(&self, request: &Request, ino: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let span = request_span!(request, "fsyncdir", ino, fh = fh.0);
        self.answer_later(span, reply, || self.tree.fsyncdir(fh.0), |reply, ()| reply.ok());
    }

    fn statfs(&self, request: &Request, ino: INodeNo, reply: ReplyStatfs) {
        let span = request_span!(request, "statfs", ino);
        answer(
            &span,
            reply,
            || self.tree.statfs(),
            |reply, fs| {
                // The kernel's figures are never negative and its sizes fit 32 bits.
                let small = |n: i64| u32::try_from(n).unwrap_or(u32::MAX);
                reply.statfs(
                    fs.f_blocks,
                    fs.f_bfree,
                    fs.f_bavail,
                    fs.f_files,
                    fs.f_ffree,
                    small(fs.f_bsize),
                    small(fs.f_namelen),
                    small(fs.f_frsize),
                );
            },
        );
    }

    fn setxattr(&self, request: &Request, ino: INodeNo, name: &OsStr, value: &[u8], flags: i32, _position: u32, reply: ReplyEmpty) {
        let span = request_span!(request, "setxattr", ino, name = ?name);
        answer(&span, reply, || self.tree.setxattr(ino.0, name, value, flags.cast_unsigned()), |reply, ()| reply.ok());
    }

    fn getxattr(&self, request: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let span = request_span!(request, "getxattr", ino, name = ?name);
        answer(&span, reply, || self.tree.getxattr(ino.0, name), |reply, value| send_xattr(reply, size, &value));
    }

    fn listxattr(&self, request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let span = request_span!(request, "listxattr", ino);
        answer(&span, reply, || self.tree.listxattr(ino.0), |reply, names| send_xattr(reply, size, &names));
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let span = request_span!(request, "removexattr", ino, name = ?name);
        answer(&span, reply, || self.tree.removexattr(ino.0, name), |reply, ()| reply.ok());
    }

    fn access(&self, _request: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // default_permissions: the kernel decides from the attributes.
        reply.error(Errno::ENOSYS);
    }

    fn create(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, _umask: u32, flags: i32, reply: ReplyCreate) {
        let span = request_span!(request, "create", parent, name = ?name, flags = flags);
        self.answer_later(
            span,
            reply,
            || self.tree.create(parent.0, name, mode, flags, &caller(request)),
            |reply, (entry, opened)| {
                reply.created(&entry.ttl, &file_attr(&entry.attr), GENERATION, FileHandle(opened.fh), open_flags(opened));
            },
        );
    }

    fn fallocate(&self, request: &Request, ino: INodeNo, fh: FileHandle, offset: u64, length: u64, mode: i32, reply: ReplyEmpty) {
        let span = request_span!(request, "fallocate", ino, fh = fh.0, offset = offset, size = length);
        answer(&span, reply, || self.tree.fallocate(fh.0, offset, length, mode.cast_unsigned()), |reply, ()| reply.ok());
    }

    fn lseek(&self, request: &Request, ino: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let span = request_span!(request, "lseek", ino, fh = fh.0, offset = offset);
        let seek = || {
            let offset = u64::try_from(offset).map_err(|_| rustix::io::Errno::NXIO)?;
            self.tree.lseek(fh.0, offset, whence)
        };
        answer(&span, reply, seek, |reply, at| reply.offset(at.cast_signed()));
    }

    fn copy_file_range(
        &self,
        _request: &Request,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        // The kernel copies by reading and writing then, and both are checked and summed as always.
        reply.error(Errno::ENOSYS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Times before 1970 must come back as they went: pjdfstest and tar set them.
    #[test]
    fn times_survive_both_ways() {
        for at in [(0, 0), (1, 999_999_999), (-1, 0), (-1, 1), (-62_135_596_800, 5), (4_294_967_296, 0)] {
            let at = Time { sec: at.0, nsec: at.1 };
            assert_eq!(time(system_time(at)), at);
        }
    }
}
