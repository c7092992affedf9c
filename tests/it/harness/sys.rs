//! The only `unsafe` of the end-to-end tests.

use rustix::thread::UnshareFlags;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;

/// Gives the calling thread a mount namespace of its own (unshare(2), `CLONE_NEWNS`).
pub(crate) fn unshare_mounts() -> rustix::io::Result<()> {
    // SAFETY: NEWNS (which implies FS) gives up the shared mount table and the shared working directory only; no memory
    // and no descriptor of another thread is touched.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
}

/// A TAP device (Linux, Documentation/networking/tuntap.rst) in the calling thread's network namespace; it goes when the file is closed.
pub(crate) fn tap(name: &str) -> io::Result<File> {
    let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: a request of zeros is one, with an empty name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    assert!(name.len() < libc::IFNAMSIZ, "{name}");
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_TAP | libc::IFF_NO_PI).expect("two small flags");
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives here.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// Makes the next process that the calling thread starts the first of a PID namespace (unshare(2), `CLONE_NEWPID`). The thread can start
/// no thread after that.
#[allow(dead_code, reason = "only the laboratory makes one")]
pub(crate) fn unshare_pids() -> rustix::io::Result<()> {
    // SAFETY: it only decides where children are put; no memory and no descriptor is touched.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }
}
