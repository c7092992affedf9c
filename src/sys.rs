//! What a new process needs: this program's file, and the calls between fork and exec; and descriptors that the runtime waits
//! for. The only `unsafe` of the binary.

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
