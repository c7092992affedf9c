//! The process that makes and applies deltas: it gets descriptors and numbers, and does nothing but compute.
//!
//! What it reads comes from strangers, so it is started for one delta, bounds itself before it looks at a byte (memory,
//! processor time, length of its output, no network, no other files; see [`crate::sys::forbid_all_but_computing`]), and is
//! killed when its time is over or nobody waits any more. One line of JSON goes in with the descriptors (old file, second file,
//! output) over the socket that is its standard input, one comes back.

use crate::sys;
use anyhow::{Context, Result, bail};
use poolfs_core::Digest;
use poolfs_core::delta::{self, Between, DELTA_BYTES_MAX, DeltaError, MEMORY_BYTES_MAX, Search};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// Files that go over.
const FILES: usize = 3;

/// The longest line in either direction.
const LINE_BYTES_MAX: usize = 16 * 1024;

/// Memory that may be had beside [`MEMORY_BYTES_MAX`], which is what the work itself asks for: stacks of threads, the allocator's.
const SLACK_BYTES: u64 = 32 << 20;

/// Processor seconds that any delta may take, and those for each MiB of what it unpacks to.
const PROCESSOR_S: u64 = 30;
const PROCESSOR_S_EACH_MIB: u64 = 5;

/// Seconds of the clock for each of the processor: idle priority may have to wait.
const PATIENCE: u64 = 4;

/// One delta's work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// What to do.
    pub task: Task,
    /// The older file.
    pub old: Digest,
    /// The newer file.
    pub new: Digest,
    /// The newer file's length in bytes.
    pub new_bytes: u64,
    /// Only when nobody else wants the processor and the disk.
    pub idle: bool,
}

/// What is to be done with a delta.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// Make it; the second file is the newer package.
    Make {
        /// Recipes that fitted the package before, as [`delta::write_recipes`] writes them.
        known: Vec<u8>,
        /// Try recipes until one fits, instead of taking the likeliest.
        search: bool,
        /// The most bytes it may have.
        bytes_max: u64,
    },
    /// Make the newer package; the second file is the delta.
    Apply,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// What was made, or why nothing was.
    pub result: Result<Made, Failed>,
    /// Processor milliseconds.
    pub processor_ms: u64,
    /// The most memory that it had, in KiB.
    pub peak_kib: u64,
}

/// What is in the output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    /// Its length in bytes.
    pub bytes: u64,
    /// Its SHA-256.
    pub digest: Digest,
    /// How the parts are packed, as [`delta::write_recipes`] writes it; empty after [`Task::Apply`].
    pub recipes: Vec<u8>,
}

/// Why there is no output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// For people.
    pub why: String,
    /// The delta is false, see [`DeltaError::is_proof`].
    pub proof: bool,
    /// Trying again has the same end.
    pub lasting: bool,
}

impl From<&DeltaError> for Failed {
    fn from(err: &DeltaError) -> Self {
        let lasting = match err {
            DeltaError::Read(_) | DeltaError::Write(_) => false,
            DeltaError::Form
            | DeltaError::WrongBase
            | DeltaError::Recipe
            | DeltaError::Missing { .. }
            | DeltaError::TooLarge { .. }
            | DeltaError::Patch
            | DeltaError::Mismatch
            | DeltaError::NotReproduced { .. }
            | DeltaError::NotWorthIt { .. } => true,
        };
        Self { why: err.to_string(), proof: err.is_proof(), lasting }
    }
}

impl Work {
    fn between(&self) -> Between {
        Between { old: self.old, new: self.new, new_bytes: self.new_bytes }
    }

    /// Processor seconds after which it is ended.
    fn processor_s(&self) -> u64 {
        let flat = self.new_bytes.saturating_mul(delta::FLAT_FACTOR_MAX).min(delta::FLAT_BYTES_MAX);
        let once = PROCESSOR_S + (flat >> 20) * PROCESSOR_S_EACH_MIB;
        // A search packs it again and again.
        if matches!(self.task, Task::Make { search: true, .. }) { once * 4 } else { once }
    }
}

/// The hidden command: takes one work from standard input and does it.
pub fn child() -> Result<()> {
    serve(UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().context("take the socket")?), true)
}

/// Does what comes over the socket, within limits or, in a test, on a thread without.
fn serve(socket: UnixStream, confined: bool) -> Result<()> {
    let (work, [old, second, out]) = receive(&socket)?;
    let status = File::open("/proc/self/status").context("open /proc/self/status")?;
    delta::load_libraries();
    if confined {
        confine(&work).context("give up what is not needed")?;
    }
    let result = compute(&work, &File::from(old), &File::from(second), &mut File::from(out));
    let spent = clock_gettime(ClockId::ProcessCPUTime);
    let processor_ms = u64::try_from(spent.tv_sec).unwrap_or(0) * 1000 + u64::try_from(spent.tv_nsec).unwrap_or(0) / 1_000_000;
    let done = Done { result: result.map_err(|err| Failed::from(&err)), processor_ms, peak_kib: peak_kib(&status) };
    let mut line = serde_json::to_vec(&done)?;
    line.push(b'\n');
    // By write(2): what belongs to sockets is forbidden by now.
    File::from(OwnedFd::from(socket)).write_all(&line).context("answer")
}

fn confine(work: &Work) -> Result<()> {
    let out_bytes = match work.task {
        Task::Make { bytes_max, .. } => bytes_max.min(DELTA_BYTES_MAX),
        Task::Apply => work.new_bytes,
    };
    let limit = |resource, most: u64| setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) });
    limit(Resource::Data, MEMORY_BYTES_MAX + SLACK_BYTES)?;
    // One second later it would be killed, which looks like somebody's doing.
    let (processor_s, killed_s) = (work.processor_s(), work.processor_s() + 1);
    setrlimit(Resource::Cpu, Rlimit { current: Some(processor_s), maximum: Some(killed_s) })?;
    limit(Resource::Fsize, out_bytes)?;
    limit(Resource::Core, 0)?;
    if work.idle {
        sys::give_way()?;
    }
    sys::forbid_all_but_computing()?;
    Ok(())
}

fn compute(work: &Work, old: &File, second: &File, out: &mut File) -> Result<Made, DeltaError> {
    let between = work.between();
    match &work.task {
        Task::Make { known, search, bytes_max } => {
            let search = if *search { Search::All } else { Search::Likeliest };
            let made = delta::make(old, second, &between, &delta::read_recipes(known), search, *bytes_max)?;
            out.write_all(&made.bytes).map_err(DeltaError::Write)?;
            let bytes = made.bytes.len() as u64;
            Ok(Made { bytes, digest: Digest::of(&made.bytes), recipes: delta::write_recipes(&made.recipes) })
        }
        Task::Apply => {
            let length = second.metadata().map_err(DeltaError::Read)?.len();
            if length > DELTA_BYTES_MAX {
                return Err(DeltaError::TooLarge { what: "the delta" });
            }
            let mut bytes = vec![0; usize::try_from(length).map_err(|_| DeltaError::Form)?];
            second.read_exact_at(&mut bytes, 0).map_err(DeltaError::Read)?;
            delta::apply(old, bytes, &between, out)?;
            Ok(Made { bytes: work.new_bytes, digest: work.new, recipes: Vec::new() })
        }
    }
}

fn peak_kib(status: &File) -> u64 {
    let mut text = [0; 4096];
    let got = status.read_at(&mut text, 0).unwrap_or(0);
    let text = String::from_utf8_lossy(&text[..got]);
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

fn receive(socket: &UnixStream) -> Result<(Work, [OwnedFd; FILES])> {
    let mut line = vec![0; LINE_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut length = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(&mut line)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Ok(got) => break got.bytes,
            Err(Errno::INTR) => {}
            Err(err) => return Err(err).context("take the work"),
        }
    };
    let mut files = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(sent) = message {
            files.extend(sent);
        }
    }
    while length > 0 && length < line.len() && line[length - 1] != b'\n' {
        match (&*socket).read(&mut line[length..]).context("take the work")? {
            0 => bail!("half of a work"),
            got => length += got,
        }
    }
    let work = serde_json::from_slice(&line[..length]).context("this command is for poolfs itself")?;
    let files = files.try_into().map_err(|_| anyhow::anyhow!("work without its {FILES} files"))?;
    Ok((work, files))
}

/// The files of one work.
#[derive(Debug)]
pub struct Files {
    /// The older file, to be read.
    pub old: OwnedFd,
    /// The newer file, or the delta.
    pub second: OwnedFd,
    /// What is made.
    pub out: OwnedFd,
}

/// The process ended without an answer.
#[derive(Debug)]
pub struct Ended {
    how: String,
    /// It ended by itself or by a limit: the same would happen again.
    pub lasting: bool,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the process for a delta ended without an answer ({})", self.how)?;
        f.write_str(if self.lasting { ": it took more memory or time than it may" } else { "" })
    }
}

impl std::error::Error for Ended {}

/// Does a work in a process of its own and waits for it; [`Stop`] ends both. `Err` where the process did not come to an answer:
/// it ended by a limit, was killed, or could not be started.
fn run_and_wait(work: &Work, files: &Files, socket: UnixStream, far: OwnedFd) -> Result<Done> {
    if cfg!(test) {
        // This program is then that of the tests, which has no such command; the end-to-end tests have the process.
        let serving = std::thread::spawn(move || serve(far.into(), false));
        let done = converse(work, files, &socket)?;
        drop(serving.join());
        return done.context("no answer");
    }
    let mut child = spawn(far).context("start the process for a delta")?;
    let done = converse(work, files, &socket);
    // Whatever it is doing now, nobody waits for it.
    let killed = child.kill();
    let ended = child.wait().context("wait for the process for a delta")?;
    match (done, killed) {
        (Ok(Some(done)), _) => Ok(done),
        (Ok(None), _) => {
            use std::os::unix::process::ExitStatusExt as _;
            let somebodys = ended.signal().is_some_and(|signal| [libc::SIGKILL, libc::SIGTERM, libc::SIGINT].contains(&signal));
            bail!(Ended { how: ended.to_string(), lasting: !somebodys })
        }
        (Err(err), _) => Err(err).context(format!("the process for a delta ({ended})")),
    }
}

fn spawn(far: OwnedFd) -> Result<Child> {
    let mut command = Command::new("/proc/self/exe");
    command.arg("delta-work").env_clear().stdin(Stdio::from(far)).stdout(Stdio::null()).stderr(Stdio::null());
    sys::end_with_parent(&mut command);
    Ok(command.spawn()?)
}

fn converse(work: &Work, files: &Files, socket: &UnixStream) -> Result<Option<Done>> {
    let mut line = serde_json::to_vec(work)?;
    line.push(b'\n');
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let sent = [files.old.as_fd(), files.second.as_fd(), files.out.as_fd()];
    if !ancillary.push(SendAncillaryMessage::ScmRights(&sent)) {
        bail!("no room for the files");
    }
    let length = sendmsg(socket, &[IoSlice::new(&line)], &mut ancillary, SendFlags::NOSIGNAL).context("hand the work over")?;
    let mut to = socket;
    to.write_all(&line[length..]).context("hand the work over")?;
    socket.set_read_timeout(Some(Duration::from_secs(work.processor_s() * PATIENCE)))?;
    let mut answer = Vec::new();
    let mut from = socket.take(LINE_BYTES_MAX as u64);
    from.read_to_end(&mut answer).context("wait for its answer")?;
    if answer.is_empty() { Ok(None) } else { serde_json::from_slice(&answer).context("understand its answer").map(Some) }
}

/// Ends a work when it is dropped.
#[derive(Debug)]
struct Stop(Arc<UnixStream>);

impl Drop for Stop {
    fn drop(&mut self) {
        // The waiting thread then sees the end of the answer, and kills.
        if let Err(err) = self.0.shutdown(std::net::Shutdown::Both) {
            tracing::debug!("end a delta's process: {err}");
        }
    }
}

/// As [`run_blocking`] without blocking. Dropping the future ends the process.
pub async fn run(work: Work, files: Files) -> Result<Done> {
    let (near, far) = UnixStream::pair().context("a socket for a delta's process")?;
    let stop = Stop(Arc::new(near.try_clone()?));
    let (tell, told) = tokio::sync::oneshot::channel();
    // A thread of its own: the child ends with the thread that started it, and the runtime's come and go.
    std::thread::Builder::new().name("poolfs-delta".into()).spawn(move || {
        // Nobody may wait any more.
        let _ = tell.send(run_and_wait(&work, &files, near, far.into()));
    })?;
    let done = told.await.context("a delta's process")?;
    drop(stop);
    done
}

/// Does a work in a process of its own and waits for it. `Err` where the process did not come to an answer: it ended by a limit,
/// was killed, or could not be started.
pub fn run_blocking(work: &Work, files: &Files) -> Result<Done> {
    let (near, far) = UnixStream::pair().context("a socket for a delta's process")?;
    run_and_wait(work, files, near, far.into())
}
