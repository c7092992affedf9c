//! What a new process needs: this program's file, the calls between fork and exec, and who it is to be; and descriptors that the
//! runtime waits for. The only `unsafe` of the binary.

use anyhow::{Context as _, Result};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use tokio::io::unix::AsyncFd;

/// This program. Where an upgrade has replaced it, the new one: the kernel names the old file, which is gone.
pub fn program() -> Result<PathBuf> {
    let program = std::env::current_exe().context("find the poolfs program")?;
    Ok(match program.as_os_str().as_bytes().strip_suffix(b" (deleted)") {
        Some(name) if !program.exists() => PathBuf::from(std::ffi::OsString::from_vec(name.to_vec())),
        _ => program,
    })
}

/// Gives up every capability and becomes this user, with no other groups, for good: also for the programs that are started
/// from here. For a process of one thread.
pub fn become_user(user: u32, group: u32) -> std::io::Result<()> {
    let checked = |result: libc::c_int| if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) };
    // SAFETY: these calls take plain numbers, and an array that is not read since its length is 0.
    unsafe {
        for capability in 0..=CAPABILITY_MAX {
            // The kernel has fewer.
            if libc::prctl(libc::PR_CAPBSET_READ, capability, UNUSED, UNUSED, UNUSED) == 1 {
                checked(libc::prctl(libc::PR_CAPBSET_DROP, capability, UNUSED, UNUSED, UNUSED))?;
            }
        }
        checked(libc::setgroups(0, std::ptr::null()))?;
        checked(libc::setresgid(group, group, group))?;
        // With root's number its capabilities go.
        checked(libc::setresuid(user, user, user))?;
        checked(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, YES, UNUSED, UNUSED, UNUSED))
    }
}

/// Closes every descriptor but the standard ones: what a parent left open by mistake would outlive what is given up. For a
/// process that has opened nothing yet.
pub fn close_others() {
    // SAFETY: nothing in this process owns one of these descriptors, as the caller says. A kernel without the call (before 5.9) has
    // them closed by their own close-on-exec mark.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
}

/// Arguments of prctl(2), which takes them all as this type.
const YES: libc::c_ulong = 1;
const UNUSED: libc::c_ulong = 0;

/// Capabilities that may come to be.
const CAPABILITY_MAX: libc::c_ulong = 63;

/// Lets this process get SIGKILL when its parent dies: becoming another user has undone [`end_with_parent`].
pub fn end_with_parent_now() -> std::io::Result<()> {
    // SAFETY: prctl takes plain numbers here.
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Lets the child get SIGTERM when its parent dies (prctl(2), `PR_SET_PDEATHSIG`).
pub fn end_with_parent(command: &mut Command) {
    let parent = std::process::id().cast_signed();
    // SAFETY: prctl and getppid are async-signal-safe, take plain numbers and touch no memory of the parent.
    unsafe {
        command.pre_exec(move || match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) {
            // Who died before that call sends nothing any more.
            0 if libc::getppid() != parent => Err(std::io::Error::from_raw_os_error(libc::ESRCH)),
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
}

/// Puts the child into a session of its own, so that the terminal's signals do not reach it (setsid(2)).
pub fn new_session(command: &mut Command) {
    // SAFETY: setsid is async-signal-safe, takes nothing and touches no memory of the parent.
    unsafe {
        command.pre_exec(|| rustix::process::setsid().map(|_| ()).map_err(Into::into));
    }
}

/// A descriptor that the runtime around it waits for.
pub fn watched(fd: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is the same open descriptor until it is dropped, and what is made here owns it.
    let watched = unsafe { AsyncFd::register(fd) };
    watched.map_err(std::io::Error::from)
}
