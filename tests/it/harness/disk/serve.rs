//! The disk's side of FUSE.

use super::{Meta, ROOT, Shared, State};
use fuser::{
    BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, KernelConfig, LockOwner,
    OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite,
    Request, Session, SessionACL, TimeOrNow, WriteFlags,
};
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Nobody changes the disk but through its mount.
const TTL: Duration = Duration::from_secs(3600);

const BLOCK_BYTES: u32 = 4096;

/// What the disk holds where no limit is set, in blocks.
const BLOCKS: u64 = 1 << 20;

struct Serving(Arc<Shared>);

/// Serves until it is unmounted and nobody uses it any more.
pub(super) fn start(shared: &Arc<Shared>, device: OwnedFd) {
    let mut config = Config::default();
    config.acl = SessionACL::All;
    let session = Session::from_fd(Serving(Arc::clone(shared)), device, SessionACL::All, config).unwrap();
    let shared = Arc::clone(shared);
    let serve = move || {
        if let Err(error) = session.run() {
            eprintln!("the disk's session ended with: {error}");
        }
        *shared.ended.lock() = true;
        shared.end.notify_all();
    };
    std::thread::Builder::new().name("disk".into()).spawn(serve).unwrap();
}

impl State {
    fn attr(&self, ino: u64) -> Result<FileAttr, Errno> {
        let meta = self.meta(ino)?;
        let size = match meta.kind {
            FileType::RegularFile => self.bytes.get(&ino).map_or(0, Vec::len) as u64,
            FileType::Symlink => meta.target.len() as u64,
            _ => u64::from(BLOCK_BYTES),
        };
        let nlink = if meta.kind == FileType::Directory { 2 } else { self.links(ino) };
        Ok(FileAttr {
            ino: INodeNo(ino),
            size,
            blocks: size.div_ceil(512),
            atime: meta.atime,
            mtime: meta.mtime,
            ctime: meta.ctime,
            crtime: SystemTime::UNIX_EPOCH,
            kind: meta.kind,
            perm: meta.mode & 0o7777,
            nlink,
            uid: meta.uid,
            gid: meta.gid,
            rdev: meta.rdev,
            blksize: BLOCK_BYTES,
            flags: 0,
        })
    }

    fn resize(&mut self, ino: u64, size: u64) -> Result<(), Errno> {
        self.fits(ino, size)?;
        let bytes = self.bytes.get_mut(&ino).ok_or(Errno::EINVAL)?;
        bytes.resize(usize::try_from(size).map_err(|_| Errno::EFBIG)?, 0);
        self.change(ino, |meta| meta.mtime = SystemTime::now())
    }

    fn write(&mut self, ino: u64, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let end = offset + data.len() as u64;
        self.fits(ino, end)?;
        let bytes = self.bytes.get_mut(&ino).ok_or(Errno::EINVAL)?;
        let (start, end) = (usize::try_from(offset).map_err(|_| Errno::EFBIG)?, usize::try_from(end).map_err(|_| Errno::EFBIG)?);
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[start..end].copy_from_slice(data);
        self.change(ino, |meta| meta.mtime = SystemTime::now())
    }
}

fn kind(mode: u32) -> FileType {
    match mode & libc::S_IFMT {
        libc::S_IFIFO => FileType::NamedPipe,
        libc::S_IFSOCK => FileType::Socket,
        libc::S_IFCHR => FileType::CharDevice,
        libc::S_IFBLK => FileType::BlockDevice,
        libc::S_IFDIR => FileType::Directory,
        _ => FileType::RegularFile,
    }
}

fn at(time: TimeOrNow) -> SystemTime {
    match time {
        TimeOrNow::SpecificTime(time) => time,
        TimeOrNow::Now => SystemTime::now(),
    }
}

impl Serving {
    fn entry(&self, reply: ReplyEntry, changes: bool, body: impl FnOnce(&mut State) -> Result<u64, Errno>) {
        let done = self.0.call(changes).and_then(|mut state| {
            let ino = body(&mut state)?;
            state.attr(ino)
        });
        match done {
            Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
            Err(err) => reply.error(err),
        }
    }

    fn empty(&self, reply: ReplyEmpty, changes: bool, body: impl FnOnce(&mut State) -> Result<(), Errno>) {
        match self.0.call(changes).and_then(|mut state| body(&mut state)) {
            Ok(()) => reply.ok(),
            Err(err) => reply.error(err),
        }
    }
}

fn meta(request: &Request, kind: FileType, mode: u32) -> Meta {
    Meta::new(kind, u16::try_from(mode & 0o7777).unwrap(), request.uid(), request.gid())
}

#[allow(clippy::too_many_arguments, reason = "the trait is fuser's")]
impl Filesystem for Serving {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        config.set_max_write(1 << 20).map(drop).map_err(|nearest| io::Error::other(format!("max_write: {nearest}")))
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.entry(reply, false, |state| Ok(state.entry(parent.0, name)?.ino));
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.0.call(false).and_then(|state| state.attr(ino.0)) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(err) => reply.error(err),
        }
    }

    fn setattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let done = self.0.call(true).and_then(|mut state| {
            if let Some(size) = size {
                state.resize(ino.0, size)?;
            }
            state.change(ino.0, |meta| {
                meta.mode = mode.map_or(meta.mode, |mode| u16::try_from(mode & 0o7777).unwrap());
                (meta.uid, meta.gid) = (uid.unwrap_or(meta.uid), gid.unwrap_or(meta.gid));
                meta.atime = atime.map_or(meta.atime, at);
                meta.mtime = mtime.map_or(meta.mtime, at);
            })?;
            state.note();
            state.attr(ino.0)
        });
        match done {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(err) => reply.error(err),
        }
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        match self.0.call(false).and_then(|state| Ok(state.meta(ino.0)?.target.clone())) {
            Ok(target) => reply.data(&target),
            Err(err) => reply.error(err),
        }
    }

    fn mknod(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, rdev: u32, reply: ReplyEntry) {
        let made = Meta { rdev, ..meta(request, kind(mode), mode & !umask) };
        self.entry(reply, true, |state| state.make(parent.0, name, made));
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        self.entry(reply, true, |state| state.make(parent.0, name, meta(request, FileType::Directory, mode & !umask)));
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let made = Meta { target: target.as_os_str().as_bytes().to_vec(), ..meta(request, FileType::Symlink, 0o777) };
        self.entry(reply, true, |state| state.make(parent.0, name, made));
    }

    fn link(&self, _request: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        self.entry(reply, true, |state| {
            if state.entry(newparent.0, newname).is_ok() {
                return Err(Errno::EEXIST);
            }
            state.link(newparent.0, newname, ino.0)?;
            state.change(ino.0, |_| ())?;
            state.note();
            Ok(ino.0)
        });
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.empty(reply, true, |state| {
            state.unlink(parent.0, name)?;
            state.note();
            Ok(())
        });
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.empty(reply, true, |state| {
            let ino = state.entry(parent.0, name)?.ino;
            if !state.meta(ino)?.entries.is_empty() {
                return Err(Errno::ENOTEMPTY);
            }
            state.unlink(parent.0, name)?;
            state.note();
            Ok(())
        });
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        self.empty(reply, true, |state| state.rename((parent.0, name), (newparent.0, newname), flags.bits()));
    }

    fn open(&self, _request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let writes = flags.0 & libc::O_ACCMODE != libc::O_RDONLY;
        match self.0.call(writes) {
            Ok(mut state) => {
                *state.open.entry(ino.0).or_default() += 1;
                reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
            }
            Err(err) => reply.error(err),
        }
    }

    fn create(&self, request: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, _flags: i32, reply: ReplyCreate) {
        let done = self.0.call(true).and_then(|mut state| {
            let ino = state.make(parent.0, name, meta(request, FileType::RegularFile, mode & !umask))?;
            *state.open.entry(ino).or_default() += 1;
            state.attr(ino)
        });
        match done {
            Ok(attr) => reply.created(&TTL, &attr, Generation(0), FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
            Err(err) => reply.error(err),
        }
    }

    fn read(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let done = self.0.call(false).and_then(|state| {
            let bytes = state.bytes.get(&ino.0).ok_or(Errno::EINVAL)?;
            let start = usize::try_from(offset).map_err(|_| Errno::EINVAL)?.min(bytes.len());
            Ok(bytes[start..(start + size as usize).min(bytes.len())].to_vec())
        });
        match done {
            Ok(bytes) => reply.data(&bytes),
            Err(err) => reply.error(err),
        }
    }

    fn write(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.0.call(true).and_then(|mut state| state.write(ino.0, offset, data)) {
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap()),
            Err(err) => reply.error(err),
        }
    }

    fn release(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let mut state = self.0.state.lock();
        if let Some(count) = state.open.get_mut(&ino.0) {
            *count = count.saturating_sub(1);
        }
        state.collect(ino.0);
        reply.ok();
    }

    fn fsync(&self, _request: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.empty(reply, true, |state| {
            state.sync(ino.0);
            Ok(())
        });
    }

    fn fsyncdir(&self, _request: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.empty(reply, true, |state| {
            state.sync(ino.0);
            Ok(())
        });
    }

    fn readdir(&self, _request: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let listed = self.0.call(false).and_then(|state| {
            let meta = state.meta(ino.0)?;
            let mut entries: Vec<(u64, u64, FileType, std::ffi::OsString)> =
                vec![(1, ino.0, FileType::Directory, ".".into()), (2, ROOT, FileType::Directory, "..".into())];
            for (name, entry) in &meta.entries {
                entries.push((entry.cookie, entry.ino, state.meta(entry.ino)?.kind, name.clone()));
            }
            entries.sort_unstable_by_key(|entry| entry.0);
            Ok(entries)
        });
        match listed {
            Ok(entries) => {
                for (cookie, ino, kind, name) in entries.into_iter().filter(|entry| entry.0 > offset) {
                    if reply.add(INodeNo(ino), cookie, kind, name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(err) => reply.error(err),
        }
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match self.0.call(false) {
            Ok(state) => {
                let blocks = state.faults.bytes_max.map_or(BLOCKS, |bytes| bytes / u64::from(BLOCK_BYTES));
                let free = blocks.saturating_sub(state.used_bytes().div_ceil(u64::from(BLOCK_BYTES)));
                let files = state.faults.inodes_max.unwrap_or(1 << 20) as u64;
                let spare = files.saturating_sub(state.names.len() as u64);
                reply.statfs(blocks, free, free, files, spare, BLOCK_BYTES, 255, BLOCK_BYTES);
            }
            Err(err) => reply.error(err),
        }
    }

    fn fallocate(&self, _request: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, length: u64, mode: i32, reply: ReplyEmpty) {
        self.empty(reply, true, |state| match mode {
            0 => {
                let size = state.attr(ino.0)?.size.max(offset + length);
                state.resize(ino.0, size)
            }
            libc::FALLOC_FL_KEEP_SIZE => state.fits(ino.0, offset + length),
            _ => Err(Errno::EOPNOTSUPP),
        });
    }
}
