//! apt's locks, across the mount.
//!
//! The kernel keeps `fcntl` locks taken through the mount to itself, so apt inside and a program outside (another
//! namespace, an older bind mount) would not see each other. Whoever opens apt's `lock` through the mount therefore makes
//! poolfs hold an OFD lock on the backing file, until the last handle is released. Mounting and unmounting take it too,
//! so that neither happens under a running apt.

use crate::sys;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// The file that apt locks, in `archives/` and in `lists/`.
pub(crate) const LOCK_NAME: &str = "lock";

/// Between two tries for a held lock.
const TRY_EVERY: Duration = Duration::from_millis(100);

/// A held lock; dropping it lets go.
#[derive(Debug)]
pub struct Held {
    _file: File,
}

/// Takes the lock on an open backing file; `None` if somebody else holds it.
pub(crate) fn hold(file: File) -> Result<Option<Held>, Errno> {
    Ok(sys::try_lock_ofd(&file)?.then_some(Held { _file: file }))
}

/// Takes apt's lock in a covered directory, made as apt makes it, waiting at most `wait`. `None`: still held by others.
pub(crate) fn hold_in(dir: BorrowedFd<'_>, wait: Duration) -> Result<Option<Held>, Errno> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(dir, LOCK_NAME, flags, Mode::from_raw_mode(0o640))?);
    let deadline = Instant::now() + wait;
    while !sys::try_lock_ofd(&file)? {
        if Instant::now() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(TRY_EVERY);
    }
    Ok(Some(Held { _file: file }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::os::fd::AsFd as _;

    /// A second holder would mean two apts, one on each side of the mount.
    #[test]
    fn one_holder_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let fd = File::open(dir.path()).unwrap();
        let first = hold_in(fd.as_fd(), Duration::ZERO).unwrap();
        assert!(first.is_some());
        assert!(hold_in(fd.as_fd(), Duration::ZERO).unwrap().is_none());
        drop(first);
        assert!(hold_in(fd.as_fd(), Duration::ZERO).unwrap().is_some());
    }
}
