//! What makes everything go, however a run ends.
//!
//! Three processes. The one that was started listens for signals and holds a pipe. Its child plays, as the first process of a PID
//! namespace: when that one dies the kernel kills all others in it, daemons too, and with the last of them go its mount and network
//! namespaces; and it dies with its parent. In its mount namespace the run's own directory lies over `/var/tmp`. The third process waits
//! for the end of the pipe, which comes also when the first one is killed, then for the child's end, and removes the directory.
//! A directory that is left all the same (a machine that lost power) is removed by the next run: its lock is free then.

use crate::harness::mounts;
use rustix::fs::{FlockOperation, flock};
use rustix::mount::mount_bind;
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, Signal, getrlimit, kill_process, pidfd_open, setrlimit};
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use tokio::signal::unix::{SignalKind, signal};

/// First argument of the one that plays.
pub(crate) const INSIDE: &str = "inside";

/// First argument of the one that cleans up.
pub(crate) const WATCH: &str = "watch";

/// Tells the one that plays its directory.
const DIRECTORY: &str = "POOLFS_LAB_DIR";

const PREFIX: &str = "poolfs-lab-";

/// Files and sockets of hundreds of daemons.
const FILES_MAX: u64 = 65_536;

/// Plays what the arguments say in a cage of its own.
pub(crate) fn run(arguments: &[String]) -> ExitCode {
    sweep();
    let directory = tempfile::Builder::new().prefix(PREFIX).tempdir_in("/var/tmp").unwrap().keep();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o1777)).unwrap();
    let mut watcher = start_watcher(&directory);
    let mut pipe = watcher.stdin.take().expect("it was asked for");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let code = runtime.block_on(async {
        // Listened for before there is anything to end.
        let mut ends = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(|kind| signal(kind).unwrap());
        let (started, pid) = tokio::sync::oneshot::channel();
        let (done, ended) = tokio::sync::oneshot::channel();
        let (arguments, inside_of) = (arguments.to_owned(), directory.clone());
        // A thread, since the next child of whoever leaves a PID namespace is the first of another one; and since the child dies with
        // the thread that made it, this one stays.
        std::thread::spawn(move || {
            let mut child = start_inside(&arguments, &inside_of);
            let _ = started.send(child.id());
            let _ = done.send(child.wait().unwrap());
        });
        let pid = pid.await.expect("the lab starts");
        writeln!(pipe, "{pid}").unwrap();
        let [terminate, interrupt, hangup] = &mut ends;
        let number = tokio::select! {
            status = ended => {
                let status = status.expect("it ends");
                return ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or_else(|| {
                    eprintln!("the lab was killed by signal {:?}", status.signal());
                    1
                }));
            }
            _ = terminate.recv() => 15,
            _ = interrupt.recv() => 2,
            _ = hangup.recv() => 1,
        };
        eprintln!("ended by signal {number}: cleaning up");
        let _ = kill_process(Pid::from_raw(pid.cast_signed()).expect("a process"), Signal::KILL);
        ExitCode::from(128 + number)
    });
    drop(pipe);
    let cleaned = watcher.wait().unwrap();
    if !cleaned.success() {
        eprintln!("{} may be left behind", directory.display());
    }
    code
}

/// The first process of a PID namespace is a shell that takes in who loses his parent, and ends when the lab does.
fn start_inside(arguments: &[String], directory: &Path) -> Child {
    let own = std::env::current_exe().unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "unshare", "--mount", "--propagation", "private", "--mount-proc", "--"]);
    command.args(["sh", "-c", "\"$@\"; exit $?", "lab"]).arg(own).arg(INSIDE).args(arguments).env(DIRECTORY, directory);
    crate::harness::sys::unshare_pids().expect("the lab needs root (a PID namespace)");
    // Not of the group that a terminal or timeout(1) signals: it is ended by this process, after which nothing of it is left.
    command.process_group(0).stdin(Stdio::null());
    command.spawn().expect("setpriv and unshare are of util-linux")
}

fn start_watcher(directory: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg(WATCH).arg(directory).process_group(0).stdin(Stdio::piped()).stdout(Stdio::null());
    command.spawn().expect("this program starts again")
}

/// Waits for the end of whoever plays below `directory`, then removes it.
pub(crate) fn watch(directory: &Path) -> ExitCode {
    let lock = File::create(lock_of(directory)).unwrap();
    flock(&lock, FlockOperation::NonBlockingLockExclusive).expect("nobody else has this directory");
    let mut told = Vec::new();
    let mut pipe = std::io::stdin().lock();
    let mut byte = [0];
    // Up to the end of the line, as long as its process surely lives.
    while pipe.read(&mut byte).is_ok_and(|bytes| bytes > 0) && byte != *b"\n" {
        told.push(byte[0]);
    }
    let pid = String::from_utf8_lossy(&told).parse().ok().and_then(Pid::from_raw);
    let inside = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let _ = pipe.read_to_end(&mut told);
    if let Some(inside) = inside {
        // Readable when the whole namespace is empty.
        let mut wait = [rustix::event::PollFd::new(&inside, rustix::event::PollFlags::IN)];
        while rustix::event::poll(&mut wait, None) == Err(rustix::io::Errno::INTR) {}
    }
    remove(directory)
}

fn remove(directory: &Path) -> ExitCode {
    let removed = fs::remove_dir_all(directory).and_then(|()| fs::remove_file(lock_of(directory)));
    match removed {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("remove {}: {error}", directory.display());
            ExitCode::FAILURE
        }
    }
}

/// Held for as long as somebody cares for the directory; beside it, since the lab's `/var/tmp` is the directory.
fn lock_of(directory: &Path) -> PathBuf {
    directory.with_extension("lock")
}

/// Removes what earlier runs left that nobody cares for any more.
fn sweep() {
    for entry in fs::read_dir("/var/tmp").unwrap().flatten() {
        let path = entry.path();
        let ours = entry.file_name().to_string_lossy().starts_with(PREFIX);
        if !ours || !path.is_dir() {
            continue;
        }
        // Without a lock file it has just been made.
        let Ok(lock) = File::open(lock_of(&path)) else { continue };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            eprintln!("removing {}, which an earlier run left", path.display());
            remove(&path);
        }
    }
}

/// Makes the run's directory `/var/tmp`, and lets it have enough files.
pub(crate) fn enter() {
    mounts::enter_namespace();
    let directory = std::env::var_os(DIRECTORY).expect("told by the one that started it");
    mount_bind(Path::new(&directory), "/var/tmp").unwrap();
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.map_or(FILES_MAX, |maximum| maximum.min(FILES_MAX));
    setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum: limit.maximum }).unwrap();
}
