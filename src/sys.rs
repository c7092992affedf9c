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

/// What a process that works on strangers' bytes may no longer do, whatever these bytes bring about: reach the network, open or
/// change files beside those that it has, start programs, look into other processes. Each fails with EPERM; where the
/// architecture is not known to this function, nothing is forbidden and it says so.
pub fn forbid_all_but_computing() -> std::io::Result<bool> {
    #[cfg(target_arch = "x86_64")]
    const ARCHITECTURE: u32 = 0xc000_003e;
    #[cfg(target_arch = "aarch64")]
    const ARCHITECTURE: u32 = 0xc000_00b7;
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    const ARCHITECTURE: u32 = 0;
    if ARCHITECTURE == 0 {
        return Ok(false);
    }
    let mut forbidden = vec![
        libc::SYS_socket,
        libc::SYS_socketpair,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_listen,
        libc::SYS_accept,
        libc::SYS_accept4,
        libc::SYS_sendto,
        libc::SYS_sendmsg,
        libc::SYS_sendmmsg,
        libc::SYS_openat,
        libc::SYS_openat2,
        libc::SYS_open_by_handle_at,
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_kill,
        libc::SYS_pidfd_open,
        libc::SYS_pidfd_getfd,
        libc::SYS_pidfd_send_signal,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_open_tree,
        libc::SYS_move_mount,
        libc::SYS_fsopen,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_chdir,
        libc::SYS_fchdir,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_bpf,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_kexec_load,
        libc::SYS_reboot,
        libc::SYS_swapon,
        libc::SYS_swapoff,
        libc::SYS_unlinkat,
        libc::SYS_renameat2,
        libc::SYS_linkat,
        libc::SYS_symlinkat,
        libc::SYS_mkdirat,
        libc::SYS_mknodat,
        libc::SYS_fchmod,
        libc::SYS_fchmodat,
        libc::SYS_fchown,
        libc::SYS_fchownat,
        libc::SYS_io_uring_setup,
        libc::SYS_perf_event_open,
        libc::SYS_userfaultfd,
        libc::SYS_prlimit64,
        libc::SYS_setuid,
        libc::SYS_setgid,
        libc::SYS_setpriority,
        libc::SYS_clock_settime,
        libc::SYS_settimeofday,
        libc::SYS_sethostname,
        libc::SYS_quotactl,
        libc::SYS_acct,
    ];
    #[cfg(target_arch = "x86_64")]
    forbidden.extend([
        libc::SYS_open,
        libc::SYS_creat,
        libc::SYS_unlink,
        libc::SYS_rename,
        libc::SYS_renameat,
        libc::SYS_link,
        libc::SYS_symlink,
        libc::SYS_mkdir,
        libc::SYS_rmdir,
        libc::SYS_mknod,
        libc::SYS_chmod,
        libc::SYS_chown,
        libc::SYS_lchown,
        libc::SYS_fork,
        libc::SYS_vfork,
    ]);
    /// Where the number of the call and the architecture lie in what the filter is given (`struct seccomp_data`).
    const NUMBER_AT: u32 = 0;
    const ARCHITECTURE_AT: u32 = 4;
    const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const IF_AT_LEAST: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
    const ANSWER: u16 = 0x06; // BPF_RET | BPF_K
    const REFUSE: u32 = 0x0005_0000 | 1; // SECCOMP_RET_ERRNO | EPERM
    const ALLOW: u32 = 0x7fff_0000; // SECCOMP_RET_ALLOW
    /// The second set of numbers on x86-64.
    const X32: u32 = 0x4000_0000;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut filter = vec![
        step(LOAD, 0, 0, ARCHITECTURE_AT),
        step(IF_EQUAL, 1, 0, ARCHITECTURE),
        step(ANSWER, 0, 0, REFUSE),
        step(LOAD, 0, 0, NUMBER_AT),
        step(IF_AT_LEAST, 0, 1, X32),
        step(ANSWER, 0, 0, REFUSE),
    ];
    for number in forbidden {
        filter.push(step(IF_EQUAL, 0, 1, u32::try_from(number).expect("numbers of calls are small")));
        filter.push(step(ANSWER, 0, 0, REFUSE));
    }
    filter.push(step(ANSWER, 0, 0, ALLOW));
    rustix::thread::set_no_new_privs(true)?;
    let program = libc::sock_fprog { len: u16::try_from(filter.len()).expect("a short filter"), filter: filter.as_mut_ptr() };
    // SAFETY: the program names live memory of its length for the time of the call, and the kernel copies it.
    let done = unsafe {
        libc::syscall(libc::SYS_seccomp, 1 /* SECCOMP_SET_MODE_FILTER */, 0, &raw const program)
    };
    if done == 0 { Ok(true) } else { Err(std::io::Error::last_os_error()) }
}

/// Takes the processor and the disk only when nobody else wants them (`SCHED_IDLE`, the idle class of ioprio_set(2)).
pub fn give_way() -> std::io::Result<()> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    const IOPRIO_CLASS_IDLE: libc::c_int = 3 << 13;
    rustix::process::nice(19)?;
    let none = libc::sched_param { sched_priority: 0 };
    // SAFETY: this process, a constant and a pointer to a live struct.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const none) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: takes plain numbers.
    match unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_CLASS_IDLE) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
