//! Puts a whole file under its name so that a crash leaves the old state or the new one, and nothing between.

use crate::crash_point::crash_point;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, Timestamps};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::atomic::{AtomicU64, Ordering};

/// How the names begin under which a copy grows. They are not files of the directory: do not list them, and see [`sweep`].
pub const TEMP_PREFIX: &str = ".poolfs-new-";

/// Whether a file that has the name already is replaced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Replace {
    /// Fails with [`io::ErrorKind::AlreadyExists`].
    Never,
    /// The old file is gone.
    Yes,
}

/// Moves a whole regular file to its name, durably: when this returns, a power loss does not take it away.
///
/// The file is flushed, renamed, and the target directory flushed. Across file systems it is copied under a temporary
/// name in the target directory first (owner, mode and mtime are kept; the inode is another) and then unlinked.
/// On an error the source is still there, unless the error came from the last flush.
pub fn place(from_dir: BorrowedFd<'_>, from: &OsStr, to_dir: BorrowedFd<'_>, to: &OsStr, replace: Replace) -> io::Result<()> {
    let source = open_regular(from_dir, from)?;
    source.sync_all()?;
    crash_point("place.synced");
    match rename(from_dir, from, to_dir, to, replace) {
        Err(Errno::XDEV) => {
            copy_from(&source, to_dir, to, replace)?;
            crash_point("place.copied");
            return Ok(rustix::fs::unlinkat(from_dir, from, AtFlags::empty())?);
        }
        other => other?,
    }
    crash_point("place.renamed");
    flush_directory(to_dir)
}

/// Waits until a directory's names would outlive a power loss.
pub fn flush_directory(dir: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::fs::fsync(dir)?)
}

/// As [`place`], but the source stays; shares the blocks where the file system can.
pub fn copy(from_dir: BorrowedFd<'_>, from: &OsStr, to_dir: BorrowedFd<'_>, to: &OsStr, replace: Replace) -> io::Result<()> {
    copy_from(&open_regular(from_dir, from)?, to_dir, to, replace)
}

/// Removes what an interrupted [`place`] or [`copy`] left in a directory and, if there is one, in its `partial/`;
/// returns how many files that were.
///
/// Only at start, when nothing is being placed.
pub fn sweep(dir: BorrowedFd<'_>) -> io::Result<usize> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let below = match rustix::fs::openat(dir, "partial", flags, Mode::empty()) {
        Ok(partial) => sweep_one(partial.as_fd())?,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => 0,
        Err(err) => return Err(err.into()),
    };
    Ok(below + sweep_one(dir)?)
}

fn sweep_one(dir: BorrowedFd<'_>) -> io::Result<usize> {
    let mut left = Vec::new();
    for entry in rustix::fs::Dir::read_from(dir)? {
        let entry = entry?;
        if entry.file_name().to_bytes().starts_with(TEMP_PREFIX.as_bytes()) && !entry.file_type().is_dir() {
            left.push(entry.file_name().to_owned());
        }
    }
    for name in &left {
        rustix::fs::unlinkat(dir, name.as_c_str(), AtFlags::empty())?;
    }
    Ok(left.len())
}

/// Renames within one file system. `Replace::Never` holds also where the file system knows no `RENAME_NOREPLACE`.
pub fn rename(from_dir: BorrowedFd<'_>, from: &OsStr, to_dir: BorrowedFd<'_>, to: &OsStr, replace: Replace) -> Result<(), Errno> {
    if replace == Replace::Yes {
        return rustix::fs::renameat(from_dir, from, to_dir, to);
    }
    match rustix::fs::renameat_with(from_dir, from, to_dir, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS) => {
            rustix::fs::linkat(from_dir, from, to_dir, to, AtFlags::empty())?;
            rustix::fs::unlinkat(from_dir, from, AtFlags::empty())
        }
        other => other,
    }
}

pub(super) fn open_regular(dir: BorrowedFd<'_>, name: &OsStr) -> io::Result<File> {
    // NONBLOCK: a fifo under this name must not hang us.
    let fd = rustix::fs::openat(dir, name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) != FileType::RegularFile {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(File::from(fd))
}

/// Copies a file into a directory under a temporary name, which is the answer, and flushes it.
pub(super) fn copy_unnamed(source: &File, to_dir: BorrowedFd<'_>) -> io::Result<OsString> {
    let (temp, target) = create_temp(to_dir)?;
    if let Err(err) = fill(source, &target) {
        // The first error is the one to tell; what is left here goes at the next start.
        let _left = rustix::fs::unlinkat(to_dir, &temp, AtFlags::empty());
        return Err(err);
    }
    crash_point("place.filled");
    Ok(temp)
}

fn copy_from(source: &File, to_dir: BorrowedFd<'_>, to: &OsStr, replace: Replace) -> io::Result<()> {
    if replace == Replace::Never && rustix::fs::statat(to_dir, to, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
        return Err(Errno::EXIST.into()); // Before a gigabyte is copied in vain; the rename below decides.
    }
    let temp = copy_unnamed(source, to_dir)?;
    if let Err(err) = rename(to_dir, &temp, to_dir, to, replace) {
        let _left = rustix::fs::unlinkat(to_dir, &temp, AtFlags::empty());
        return Err(err.into());
    }
    flush_directory(to_dir)
}

fn create_temp(dir: BorrowedFd<'_>) -> io::Result<(OsString, File)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        let name = OsString::from(format!("{TEMP_PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(dir, &name, flags, Mode::from_raw_mode(0o600)) {
            Ok(fd) => return Ok((name, File::from(fd))),
            Err(Errno::EXIST) => {} // Left by a process that had our number.
            Err(err) => return Err(err.into()),
        }
    }
}

fn fill(source: &File, target: &File) -> io::Result<()> {
    let stat = rustix::fs::fstat(source)?;
    if rustix::fs::ioctl_ficlone(target.as_fd(), source.as_fd()).is_err() {
        let mut from = source.try_clone()?;
        std::io::Seek::rewind(&mut from)?;
        let copied = io::copy(&mut from, &mut &*target)?;
        if i64::try_from(copied) != Ok(stat.st_size) {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file changed while it was copied"));
        }
    }
    let owner = (rustix::fs::Uid::from_raw(stat.st_uid), rustix::fs::Gid::from_raw(stat.st_gid));
    rustix::fs::fchown(target, Some(owner.0), Some(owner.1))?;
    rustix::fs::fchmod(target, Mode::from_raw_mode(stat.st_mode))?;
    let time = |tv_sec, nsec| rustix::fs::Timespec { tv_sec, tv_nsec: i64::try_from(nsec).unwrap_or(0) };
    let times =
        Timestamps { last_access: time(stat.st_atime, stat.st_atime_nsec), last_modification: time(stat.st_mtime, stat.st_mtime_nsec) };
    rustix::fs::futimens(target, &times)?;
    target.sync_all()
}

/// A name for messages: not every file name is text.
pub(super) fn shown(name: &OsStr) -> String {
    String::from_utf8_lossy(name.as_bytes()).into_owned()
}
