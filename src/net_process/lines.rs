//! What the network process writes to its standard error, into the log of the process of the mounts.
//!
//! It goes through a pipe: the network process holds no descriptor of the log, and cannot fill the disk by it.

use std::io::Write as _;
use std::process::ChildStderr;
use std::time::Duration;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::time::Instant;

/// Bytes taken at once.
const CHUNK_BYTES: usize = 8 * 1024;

/// Over this much time it is counted what is written.
const WINDOW: Duration = Duration::from_secs(10);

/// Bytes written in that time; what is more is left out.
const WINDOW_BYTES_MAX: usize = 1 << 20;

/// Passes on what comes, until the pipe is closed.
pub(super) fn pass_on(stderr: ChildStderr) -> std::io::Result<()> {
    let mut lines = pipe::Receiver::from_owned_fd(stderr.into())?;
    tokio::spawn(async move {
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut budget = Budget { since: Instant::now(), bytes: 0, is_told: false };
        while let Ok(count @ 1..) = lines.read(&mut chunk).await {
            let chunk = &mut chunk[..count];
            match budget.take(count, Instant::now()) {
                Some(true) => write(plain(chunk)),
                Some(false) => write(b"poolfs: the network process writes too much; a part is left out\n"),
                None => {}
            }
        }
    });
    Ok(())
}

/// What is left to be written.
#[derive(Debug)]
struct Budget {
    since: Instant,
    bytes: usize,
    is_told: bool,
}

impl Budget {
    /// Whether so many bytes may be written; `Some(false)` the first time in a window that they may not.
    fn take(&mut self, count: usize, now: Instant) -> Option<bool> {
        if now - self.since > WINDOW {
            *self = Self { since: now, bytes: 0, is_told: false };
        }
        self.bytes += count;
        if self.bytes <= WINDOW_BYTES_MAX {
            return Some(true);
        }
        (!std::mem::replace(&mut self.is_told, true)).then_some(false)
    }
}

/// Nothing that a terminal would obey.
fn plain(chunk: &mut [u8]) -> &[u8] {
    chunk.iter_mut().filter(|byte| byte.is_ascii_control() && **byte != b'\n').for_each(|byte| *byte = b' ');
    chunk
}

fn write(bytes: &[u8]) {
    // There is nowhere else to say that the log is full.
    let _ = std::io::stderr().write_all(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process gone mad must neither fill the disk nor fall silent for ever.
    #[tokio::test(start_paused = true)]
    async fn what_is_too_much_is_left_out() {
        let now = Instant::now();
        let mut budget = Budget { since: now, bytes: 0, is_told: false };
        let taken: Vec<_> = (0..5).map(|_| budget.take(WINDOW_BYTES_MAX / 3, now)).collect();
        assert_eq!(taken, [Some(true), Some(true), Some(true), Some(false), None]);
        assert_eq!(budget.take(1, now + WINDOW + Duration::from_millis(1)), Some(true));
        assert_eq!(plain(&mut b"a\x1b[2Jb\r\n".to_owned()), b"a [2Jb \n");
    }
}
