//! The only `unsafe` of the end-to-end tests.

use rustix::thread::UnshareFlags;

/// Gives the calling thread a mount namespace of its own (unshare(2), `CLONE_NEWNS`).
pub(crate) fn unshare_mounts() -> rustix::io::Result<()> {
    // SAFETY: NEWNS (which implies FS) gives up the shared mount table and the shared working directory only; no memory
    // and no descriptor of another thread is touched.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
}
