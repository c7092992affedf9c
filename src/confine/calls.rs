//! Filters of system calls (seccomp).

use anyhow::{Context as _, Result};
use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition as Condition, SeccompFilter, SeccompRule,
    apply_filter,
};
use std::collections::BTreeMap;

/// What a server needs with files of its own, sockets, memory, threads and clocks. Nothing that starts a program, mounts,
/// traces, loads, or names another process.
const ALLOWED: &[c_long] = &[
    // Files.
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fchown,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_memfd_create,
    libc::SYS_mkdirat,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_sendfile,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_sync_file_range,
    libc::SYS_umask,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
    libc::SYS_write,
    libc::SYS_writev,
    // Sockets, and waiting.
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_pipe2,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_socketpair,
    // Memory, threads, signals to itself, clocks.
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_get_robust_list,
    libc::SYS_getcpu,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mlock,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munlock,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_sigaltstack,
    libc::SYS_sysinfo,
    libc::SYS_tgkill,
    libc::SYS_uname,
    // Who it is.
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getresgid,
    libc::SYS_getresuid,
    libc::SYS_getuid,
];

/// The older names of some of them, which only this architecture has.
#[cfg(target_arch = "x86_64")]
const ALLOWED_OLD: &[c_long] = &[
    libc::SYS_access,
    libc::SYS_dup2,
    libc::SYS_epoll_create,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd,
    libc::SYS_getdents,
    libc::SYS_lstat,
    libc::SYS_mkdir,
    libc::SYS_open,
    libc::SYS_pipe,
    libc::SYS_poll,
    libc::SYS_readlink,
    libc::SYS_rename,
    libc::SYS_select,
    libc::SYS_stat,
    libc::SYS_time,
    libc::SYS_unlink,
    libc::SYS_arch_prctl,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_OLD: &[c_long] = &[];

/// What a thread may not be started with: a namespace of its own.
const NAMESPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u64;

/// Families that the network process may have sockets of: netlink tells it the addresses of the machine.
const FAMILIES: [libc::c_int; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// Requests of ioctl(2): blocking or not, how much is there, what a terminal is asked, and the links of the machine.
const REQUESTS: [u64; 10] = [
    libc::FIONBIO,
    libc::FIOCLEX,
    libc::FIONREAD,
    libc::TCGETS,
    libc::TIOCGWINSZ,
    libc::SIOCGIFCONF,
    libc::SIOCGIFFLAGS,
    libc::SIOCGIFINDEX,
    libc::SIOCGIFNAME,
    libc::SIOCGIFMTU,
];

/// Requests of prctl(2): the names of threads and of memory.
const NAMES: [u64; 3] = [libc::PR_SET_NAME as u64, libc::PR_GET_NAME as u64, libc::PR_SET_VMA as u64];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Leaves the calling thread, and those that it starts, the calls of a server; all others are not known to it any more, so that
/// libraries use what they used before these existed.
pub(super) fn network() -> Result<()> {
    let mut rules: Rules = ALLOWED.iter().chain(ALLOWED_OLD).map(|call| (*call, Vec::new())).collect();
    let one_of =
        |argument: u8, values: &[u64]| -> Result<Vec<SeccompRule>> { values.iter().map(|value| rule(argument, Op::Eq, *value)).collect() };
    let families: Vec<u64> = FAMILIES.iter().map(|family| u64::from(family.cast_unsigned())).collect();
    rules.insert(libc::SYS_socket, one_of(0, &families)?);
    rules.insert(libc::SYS_ioctl, one_of(1, &REQUESTS)?);
    rules.insert(libc::SYS_prctl, one_of(0, &NAMES)?);
    // clone3 has its flags where no filter sees them: without it this is what threads are made by.
    rules.insert(libc::SYS_clone, vec![rule(0, Op::MaskedEq(NAMESPACES), 0)?]);
    // Limits are read, of itself.
    rules.insert(libc::SYS_prlimit64, vec![SeccompRule::new(vec![condition(0, Op::Eq, 0)?, condition(2, Op::Eq, 0)?])?]);
    apply(rules, SeccompAction::Errno(libc::ENOSYS.cast_unsigned()), SeccompAction::Allow)
}

/// Takes from the calling thread, and those that it starts, every socket that is no Unix socket.
pub(super) fn mounts() -> Result<()> {
    let mut rules = Rules::new();
    rules.insert(libc::SYS_socket, vec![rule(0, Op::Ne, u64::from(libc::AF_UNIX.cast_unsigned()))?]);
    // It makes sockets too, where no filter sees them.
    rules.insert(libc::SYS_io_uring_setup, Vec::new());
    apply(rules, SeccompAction::Allow, SeccompAction::Errno(libc::EACCES.cast_unsigned()))
}

fn condition(argument: u8, op: Op, value: u64) -> Result<Condition> {
    Ok(Condition::new(argument, Len::Dword, op, value)?)
}

fn rule(argument: u8, op: Op, value: u64) -> Result<SeccompRule> {
    Ok(SeccompRule::new(vec![condition(argument, op, value)?])?)
}

fn apply(rules: Rules, others: SeccompAction, these: SeccompAction) -> Result<()> {
    let arch = std::env::consts::ARCH.try_into().with_context(|| format!("no filter of system calls for {}", std::env::consts::ARCH))?;
    let program: BpfProgram = SeccompFilter::new(rules, others, these, arch)?.try_into()?;
    apply_filter(&program).context("give up system calls")
}
