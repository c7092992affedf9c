//! The one place of this crate where `unsafe` is allowed: system calls that rustix has not.

use rustix::io::Errno;
use std::os::fd::{AsFd, AsRawFd};

/// Takes an exclusive OFD lock on the whole file, without waiting.
///
/// An OFD lock belongs to the open file description: it excludes the classic `fcntl` locks of other processes and the
/// OFD locks of this one, and goes when the description is closed. `Ok(false)`: somebody else holds a lock.
pub(crate) fn try_lock_ofd(file: impl AsFd) -> Result<bool, Errno> {
    let request = libc::flock { l_type: F_WRLCK, l_whence: SEEK_SET, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: F_OFD_SETLK reads one `flock` from the pointer, which outlives the call; the descriptor is borrowed.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_SETLK, &raw const request) };
    if result == 0 {
        return Ok(true);
    }
    match Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO) {
        Errno::AGAIN | Errno::ACCESS => Ok(false),
        err => Err(err),
    }
}

/// `F_WRLCK` in the width of `flock.l_type`.
#[allow(clippy::cast_possible_truncation, clippy::unnecessary_cast, reason = "the constant is 1; libc's type differs by target")]
const F_WRLCK: libc::c_short = libc::F_WRLCK as libc::c_short;
/// `SEEK_SET` in the width of `flock.l_whence`.
#[allow(clippy::cast_possible_truncation, clippy::unnecessary_cast, reason = "the constant is 0")]
const SEEK_SET: libc::c_short = libc::SEEK_SET as libc::c_short;
