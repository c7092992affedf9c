//! Programs that tests run: output kept, an outer limit, ended by their own process group.

use super::LIMIT;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// A program that has ended.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) out: String,
    pub(crate) err: String,
    what: String,
}

impl Finished {
    /// Fails the test with everything the program said, unless it exited 0.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert!(self.status.success(), "{self}");
        self
    }

    /// Fails the test if the program exited 0.
    #[track_caller]
    pub(crate) fn failed(self) -> Self {
        assert!(!self.status.success(), "expected a failure of {self}");
        self
    }

    /// The exit code; -1 if a signal ended it.
    pub(crate) fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    /// Fails the test unless standard output or error contains `text`.
    #[track_caller]
    pub(crate) fn says(self, text: &str) -> Self {
        assert!(self.out.contains(text) || self.err.contains(text), "{text:?} is not said by {self}");
        self
    }

    /// Paths of the `GET` requests that apt's http method printed (`Debug::Acquire::http`), in order. Behind a proxy
    /// these are whole URLs.
    pub(crate) fn gets(&self) -> Vec<&str> {
        let requests = self.err.lines().chain(self.out.lines());
        requests.filter_map(|line| line.trim_end().strip_prefix("GET ")?.split(' ').next()).collect()
    }

    /// The `GET`s of packages.
    pub(crate) fn deb_gets(&self) -> Vec<&str> {
        self.gets().into_iter().filter(|path| path.ends_with(".deb")).collect()
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}\n{}\n--- standard output\n{}\n--- standard error\n{}", self.what, self.status, self.out, self.err)
    }
}

/// A program that runs, in a process group of its own.
///
/// Its output goes to unlinked files: nobody has to read along, and a child that outlives it holds no pipe open.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    out: File,
    err: File,
    what: String,
    waited: bool,
}

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
        let out = tempfile::tempfile_in("/var/tmp").unwrap();
        let err = tempfile::tempfile_in("/var/tmp").unwrap();
        let what = format!("{command:?}");
        command.process_group(0).stdin(Stdio::null());
        command.stdout(out.try_clone().unwrap()).stderr(err.try_clone().unwrap());
        let child = command.spawn().unwrap_or_else(|error| panic!("start {what}: {error}"));
        Self { child, out, err, what, waited: false }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// What it has said so far on standard output and standard error.
    pub(crate) fn said(&self) -> (String, String) {
        (contents(&self.out), contents(&self.err))
    }

    /// Sends `signal` to the program alone.
    pub(crate) fn signal(&self, signal: Signal) {
        // It may have ended by itself in the meantime, which is for `wait` to say.
        let _ = rustix::process::kill_process(self.pid(), signal);
    }

    /// Waits for its end, for [`LIMIT`] at most; past that everything in its process group is ended and the test fails.
    #[track_caller]
    pub(crate) fn wait(self) -> Finished {
        self.wait_within(LIMIT)
    }

    /// The same with another limit.
    #[track_caller]
    pub(crate) fn wait_within(mut self, limit: Duration) -> Finished {
        let ended = await_exit(self.pid(), limit);
        if !ended {
            let _ = rustix::process::kill_process_group(self.pid(), Signal::KILL);
        }
        let status = self.child.wait().unwrap();
        self.waited = true;
        let (out, err) = self.said();
        let finished = Finished { status, out, err, what: self.what.clone() };
        assert!(ended, "still running after {limit:?}: {finished}");
        finished
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.waited {
            return;
        }
        let _ = rustix::process::kill_process_group(self.pid(), Signal::KILL);
        let _ = self.child.wait();
        if std::thread::panicking() {
            let (out, err) = self.said();
            eprintln!("--- {} said\n{out}{err}", self.what);
        }
    }
}

/// Runs a program to its end. See [`Running::wait`].
#[track_caller]
pub(crate) fn run(command: &mut Command) -> Finished {
    Running::start(command).wait()
}

/// True if the process has ended within `limit` (also if it is gone already).
pub(crate) fn await_exit(pid: Pid, limit: Duration) -> bool {
    let Ok(descriptor) = pidfd_open(pid, PidfdFlags::empty()) else { return true };
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap();
        match poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&timeout)) {
            Ok(0) if left.is_zero() => return false,
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return true,
            Err(error) => panic!("poll a process: {error}"),
        }
    }
}

/// Processes whose command line contains `text`, other than this one.
pub(crate) fn with_argument(text: &str) -> Vec<Pid> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let here = i32::try_from(std::process::id()).unwrap();
        if number != here && line.windows(text.len()).any(|window| window == text.as_bytes()) {
            found.extend(Pid::from_raw(number));
        }
    }
    found
}

/// What ended a process by signal, for messages.
pub(crate) fn signal_of(status: ExitStatus) -> Option<i32> {
    status.signal()
}

fn contents(file: &File) -> String {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    // The offset is shared with the program that still writes, so the read names its own.
    match file.read_exact_at(&mut bytes, 0) {
        Ok(()) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => String::new(),
        Err(error) => panic!("read a program's output: {error}"),
    }
}
