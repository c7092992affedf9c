//! Who watches over the daemon of a control socket: the supervisor's process id, in a file beside the socket that it holds
//! locked. So it is found also while no daemon answers, between a death and the next start.

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The lock of this process; it ends with it, and with it only (the descriptor is not inherited).
#[derive(Debug)]
pub struct Held {
    _file: File,
}

fn path_of(socket: &Path) -> PathBuf {
    socket.with_extension("pid")
}

/// How long a supervisor whose daemon has ended may take to end itself.
pub const END_PATIENCE: Duration = Duration::from_secs(5);

/// Between two tries for a held lock.
const TRY_EVERY: Duration = Duration::from_millis(20);

/// Takes the file for this process, waiting at most `wait` for another supervisor to end. An error if one still has it.
pub fn hold(socket: &Path, wait: Duration) -> Result<Held> {
    let path = path_of(socket);
    let mut file = open_beside(socket, &path)?;
    if !lock(&file, &path, wait)? {
        let pid = read_pid(&mut file).map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
        bail!("another process (pid {pid}) already watches over the daemon of {}: end it with `poolfs down`", socket.display());
    }
    file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).with_context(|| format!("write {}", path.display()))?;
    Ok(Held { _file: file })
}

/// Waits for this process's turn to look for a daemon and to start one: two mounts at boot want the same one. An error when
/// it does not come within `wait`.
pub fn turn(socket: &Path, wait: Duration) -> Result<Held> {
    let path = socket.with_extension("lock");
    let file = open_beside(socket, &path)?;
    if !lock(&file, &path, wait)? {
        bail!("another process has been starting the daemon of {} for {} s: see its log", socket.display(), wait.as_secs());
    }
    Ok(Held { _file: file })
}

fn open_beside(socket: &Path, path: &Path) -> Result<File> {
    if let Some(dir) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(dir).with_context(|| {
            format!("make a directory for the control socket {}: move what is in its way, or set another control.socket", socket.display())
        })?;
    }
    let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o644).open(path);
    opened.with_context(|| format!("open {}", path.display()))
}

/// Whether the lock was had within `wait`. Tried again and again, since flock(2) has no wait that ends.
fn lock(file: &File, path: &Path, wait: Duration) -> Result<bool> {
    let deadline = Instant::now() + wait;
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(TRY_EVERY),
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(err) => return Err(err).with_context(|| format!("lock {}", path.display())),
        }
    }
}

/// The supervisor of that socket's daemon, if one runs.
pub fn holder(socket: &Path) -> Option<i32> {
    let mut file = File::open(path_of(socket)).ok()?;
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Err(Errno::WOULDBLOCK) => read_pid(&mut file),
        _ => None,
    }
}

fn read_pid(file: &mut File) -> Option<i32> {
    let mut text = String::new();
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok().filter(|pid| *pid > 0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// Two supervisors of one socket would start two daemons; a file that is left over must stop nobody.
    #[test]
    fn one_holder_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("run/control.sock");
        assert_eq!(holder(&socket), None);
        let held = hold(&socket, Duration::ZERO).unwrap();
        let me = i32::try_from(std::process::id()).unwrap();
        assert_eq!(holder(&socket), Some(me));
        let refused = hold(&socket, Duration::ZERO).unwrap_err().to_string();
        assert!(refused.contains(&format!("pid {me}")), "{refused}");
        drop(held);
        assert_eq!(holder(&socket), None);
        hold(&socket, Duration::ZERO).unwrap();
    }
}
