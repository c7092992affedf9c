//! Operations on backing inodes through `O_PATH` descriptors.
//!
//! An `O_PATH` descriptor names an inode without opening it: it pins the inode (its number cannot be given to another
//! file), follows renames, and works for files of every kind and mode. Where a system call wants a real path, it gets
//! `N` below a descriptor of `/proc/self/fd`, which the kernel resolves to exactly that inode. No symbolic link of the
//! covered directory is ever followed.

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

/// What tells one inode from all others while it is pinned: device and inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) dev: u64,
    pub(crate) ino: u64,
}

impl Key {
    #[allow(clippy::unnecessary_cast, reason = "the fields' types differ by architecture")]
    pub(crate) fn of(stat: &Stat) -> Self {
        Self { dev: stat.st_dev as u64, ino: stat.st_ino as u64 }
    }
}

/// A pinned backing inode.
#[derive(Debug)]
pub(crate) struct Backing {
    fd: OwnedFd,
    pub(crate) key: Key,
    pub(crate) kind: FileType,
}

/// This process's `/proc/self/fd`.
fn proc_fds() -> Result<BorrowedFd<'static>, Errno> {
    static PROC: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(fd) = PROC.get() {
        return Ok(fd.as_fd());
    }
    let fd = rustix::fs::open("/proc/self/fd", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    Ok(PROC.get_or_init(|| fd).as_fd())
}

impl Backing {
    /// Pins what `name` in `dir` is; a symbolic link itself, not its target.
    pub(crate) fn pin(dir: BorrowedFd<'_>, name: &OsStr) -> Result<(Self, Stat), Errno> {
        let fd = rustix::fs::openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        Self::of_fd(fd)
    }

    /// The inode behind a descriptor, which it keeps.
    pub(crate) fn of_fd(fd: OwnedFd) -> Result<(Self, Stat), Errno> {
        let stat = rustix::fs::fstat(&fd)?;
        Ok((Self { fd, key: Key::of(&stat), kind: FileType::from_raw_mode(stat.st_mode) }, stat))
    }

    /// The `O_PATH` descriptor.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The path below [`proc_fds`] that the kernel resolves to this inode.
    fn magic(&self) -> String {
        self.fd.as_raw_fd().to_string()
    }

    /// The full path of the same, for the calls that take no directory descriptor.
    fn magic_path(&self) -> String {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd())
    }

    pub(crate) fn stat(&self) -> Result<Stat, Errno> {
        rustix::fs::fstat(&self.fd)
    }

    /// Opens it for reading or writing. Must not be a symbolic link.
    pub(crate) fn open(&self, flags: OFlags) -> Result<File, Errno> {
        let flags = (flags & !OFlags::NOFOLLOW) | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        Ok(File::from(rustix::fs::openat(proc_fds()?, self.magic(), flags, Mode::empty())?))
    }

    /// Opens a directory for reading its entries.
    pub(crate) fn open_dir(&self) -> Result<OwnedFd, Errno> {
        rustix::fs::openat(&self.fd, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
    }

    pub(crate) fn chmod(&self, mode: u32) -> Result<(), Errno> {
        rustix::fs::chmodat(proc_fds()?, self.magic(), Mode::from_raw_mode(mode & 0o7777), AtFlags::empty())
    }

    pub(crate) fn chown(&self, uid: Option<u32>, gid: Option<u32>) -> Result<(), Errno> {
        let uid = uid.map(rustix::fs::Uid::from_raw_unchecked);
        let gid = gid.map(rustix::fs::Gid::from_raw_unchecked);
        rustix::fs::chownat(&self.fd, "", uid, gid, AtFlags::EMPTY_PATH)
    }

    pub(crate) fn truncate(&self, size: u64) -> Result<(), Errno> {
        rustix::fs::ftruncate(self.open(OFlags::WRONLY)?, size)
    }

    pub(crate) fn set_times(&self, times: &rustix::fs::Timestamps) -> Result<(), Errno> {
        rustix::fs::utimensat(&self.fd, "", times, AtFlags::EMPTY_PATH)
    }

    pub(crate) fn link_to(&self, dir: BorrowedFd<'_>, name: &OsStr) -> Result<(), Errno> {
        rustix::fs::linkat(&self.fd, "", dir, name, AtFlags::EMPTY_PATH)
    }

    pub(crate) fn read_link(&self) -> Result<Vec<u8>, Errno> {
        Ok(rustix::fs::readlinkat(&self.fd, "", Vec::new())?.into_bytes())
    }

    pub(crate) fn xattr(&self, name: &OsStr) -> Result<Vec<u8>, Errno> {
        sized(|buf| rustix::fs::getxattr(self.magic_path(), name, buf))
    }

    pub(crate) fn xattr_names(&self) -> Result<Vec<u8>, Errno> {
        sized(|buf| rustix::fs::listxattr(self.magic_path(), buf))
    }

    pub(crate) fn set_xattr(&self, name: &OsStr, value: &[u8], flags: rustix::fs::XattrFlags) -> Result<(), Errno> {
        rustix::fs::setxattr(self.magic_path(), name, value, flags)
    }

    pub(crate) fn remove_xattr(&self, name: &OsStr) -> Result<(), Errno> {
        rustix::fs::removexattr(self.magic_path(), name)
    }
}

/// The kernel's limit for the value of an attribute and for the list of names (`XATTR_SIZE_MAX`), in bytes.
const XATTR_BYTES_MAX: usize = 64 * 1024;

/// Calls `read` with a small buffer, then with the largest that can be needed.
fn sized(read: impl Fn(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    let mut small = [0; 256];
    match read(&mut small) {
        Ok(len) => Ok(small[..len].to_vec()),
        Err(Errno::RANGE) => {
            let mut large = vec![0; XATTR_BYTES_MAX];
            let len = read(&mut large)?;
            large.truncate(len);
            Ok(large)
        }
        Err(err) => Err(err),
    }
}
