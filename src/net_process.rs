//! The network process as the process of the mounts keeps it: started, asked, watched, ended and started again.
//!
//! What talks to strangers runs in a process of its own ([`crate::net_main`]), this very program executed again. Whatever
//! becomes of it, the mounts answer: when it ends, is silent or sends what is not of the protocol, it is killed and started
//! again, at once the first time and after growing pauses when it ends again and again. A download under way goes on with the
//! new process from what is here already; while there is none it fails at once, and apt fetches the file itself.
//!
//! One task keeps the process and reads what it sends; it never waits for the disk, nor for who takes deliveries.

mod deltas;
mod lines;
mod link;

pub use link::{Gone, Link, Parts, ShelfBox, Wanting};

use crate::deltas::offers::Offered;
use crate::deltas::proving::Prover;
use crate::errands::Errands;
use crate::logging;
use crate::wire::{self, Answer, Checked, FromNet, Memory, NetStatus, Question, Setup, Socket, ToNet, WireError, plain_text};
use anyhow::{Context as _, Result, anyhow};
use parking_lot::Mutex;
use poolfs_core::Digest;
use poolfs_fs::source::{Delivery, Source, SourceError, Verdict, Want};
use poolfs_net::peer::Shelf;
use poolfs_net::reputation::StatementRow;
use poolfs_net::swarm::driver::{History, PeerRow};
use poolfs_net::told::Tale;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, interval, sleep, sleep_until, timeout};

/// Pauses before the process is started again: none after its first end, then doubling up to the last.
const RESTART_PAUSES: [Duration; 7] = [
    Duration::ZERO,
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(8),
    Duration::from_secs(16),
    Duration::from_secs(30),
];

/// A process that ran this long did not end of what the one before ended of: the pauses start anew.
const RAN_LONG: Duration = Duration::from_secs(60);

/// Until a process must say that it has started: it opens its database and binds its port.
const START_PATIENCE: Duration = Duration::from_secs(30);

/// How often it is asked whether it is there.
const PING_INTERVAL: Duration = Duration::from_secs(4);

/// A process that says nothing for so long, though it was asked, is ended: it hangs, or somebody has stopped it.
const SILENCE_MAX: Duration = Duration::from_secs(12);

/// More messages in a second are no work: a fast network makes some thousand.
const MESSAGES_S_MAX: u32 = 20_000;

/// How long a download waits for a process that is being started.
const UP_PATIENCE: Duration = Duration::from_secs(10);

/// How long the end waits for the process to save what it is to save.
const END_PATIENCE: Duration = Duration::from_secs(6);

/// How long a process that closed its end may take to end.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How long one that is killed may take: a disk that hangs keeps it.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

/// How long a fault that is over is shown.
const FAULT_SHOWN: Duration = Duration::from_secs(600);

/// How long a document may take.
const DOCUMENT_PATIENCE: Duration = Duration::from_secs(600);

/// How long others may take to try its port.
const PORT_PATIENCE: Duration = Duration::from_secs(12);

/// Lines about itself that are taken from the process.
const PROBLEMS_MAX: usize = 32;

/// Addresses that its server may say it listens on.
const LISTENING_MAX: usize = 8;

/// How the process is.
#[derive(Clone, Debug)]
enum Phase {
    /// It was started and has not said that it is ready.
    Starting,
    /// It runs.
    Up(Arc<Link>),
    /// It ended, and is started again after a pause, or never.
    Down,
}

/// What was wrong, for people.
#[derive(Clone, Debug)]
struct Fault {
    text: String,
    /// Since when it is over.
    over: Option<Instant>,
}

/// The handle. Cheap to clone.
#[derive(Clone, Debug)]
pub struct NetProcess {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    runtime: Handle,
    phase: watch::Receiver<Phase>,
    fault: Mutex<Option<Fault>>,
    /// What is logged.
    log: Mutex<String>,
    /// What may go to strangers, where it is another rate than at the start.
    upload: Mutex<Option<u64>>,
    /// The deltas that are offered. Whoever sees them has them told before.
    offered: watch::Sender<Vec<Offered>>,
    parts: Parts,
    stop: mpsc::Sender<oneshot::Sender<()>>,
}

/// Where the process and its setup come from.
#[derive(Debug)]
struct Keeper {
    setup: Setup,
    errands: Errands,
    phase: watch::Sender<Phase>,
    stop: mpsc::Receiver<oneshot::Sender<()>>,
    number: u64,
}

/// Why a process is no longer there.
enum End {
    /// It was told to end, and who told so is to hear of it.
    Stopped(oneshot::Sender<()>),
    /// For people.
    Fault(String),
}

impl NetProcess {
    /// Starts the process, and from now on starts it again whenever it ends. Needs a runtime around it.
    pub fn start(setup: Setup, errands: Errands) -> Self {
        let (phase, seen) = watch::channel(Phase::Starting);
        let (stop, stopped) = mpsc::channel(1);
        let parts = Parts {
            shelf: std::sync::OnceLock::new(),
            prover: std::sync::OnceLock::new(),
            arriving: watch::Sender::new(Vec::new()),
            checked: watch::Sender::new(Vec::new()),
        };
        let log = Mutex::new(setup.log.clone());
        let inner = Arc::new(Inner {
            runtime: Handle::current(),
            phase: seen,
            fault: Mutex::default(),
            log,
            upload: Mutex::default(),
            offered: watch::Sender::default(),
            parts,
            stop,
        });
        let keeper = Keeper { setup, errands, phase, stop: stopped, number: 0 };
        tokio::spawn(keeper.keep(Arc::clone(&inner)));
        Self { inner }
    }

    /// From now on its peers may have what is on `shelf`.
    pub fn give_from(&self, shelf: Arc<dyn Shelf>) {
        // There is one store, and one shelf.
        let _ = self.inner.parts.shelf.set(ShelfBox(shelf));
    }

    /// From now on deltas that others call false are tried by `prover`.
    pub fn try_with(&self, prover: Prover) {
        let _ = self.inner.parts.prover.set(Arc::new(prover));
    }

    /// Waits until the first process is ready, or is not to be waited for any longer.
    pub async fn settled(&self) {
        let mut phase = self.inner.phase.clone();
        let settled = phase.wait_for(|phase| !matches!(phase, Phase::Starting));
        if timeout(UP_PATIENCE, settled).await.is_err() {
            tracing::warn!("the network process takes long to start; the mounts do not wait for it");
        }
    }

    /// The process that runs, if one does.
    pub fn link(&self) -> Option<Arc<Link>> {
        match &*self.inner.phase.borrow() {
            Phase::Up(link) => Some(Arc::clone(link)),
            Phase::Starting | Phase::Down => None,
        }
    }

    /// Waits until another process runs than the `number`th, and returns it; never if none ever does.
    pub async fn next_link(&self, number: u64) -> Arc<Link> {
        let mut phase = self.inner.phase.clone();
        let up = |phase: &Phase| matches!(phase, Phase::Up(link) if link.number != number);
        match phase.wait_for(up).await.map(|phase| phase.clone()) {
            Ok(Phase::Up(link)) => link,
            Ok(Phase::Starting | Phase::Down) | Err(_) => std::future::pending().await,
        }
    }

    /// The files that are arriving and that peers may know of, as they change.
    pub fn arriving(&self) -> watch::Receiver<Vec<Digest>> {
        self.inner.parts.arriving.subscribe()
    }

    /// What is here of them, as it changes.
    pub fn checked(&self) -> watch::Receiver<Vec<Checked>> {
        self.inner.parts.checked.subscribe()
    }

    /// The deltas that are offered, as they change.
    pub fn offered(&self) -> watch::Receiver<Vec<Offered>> {
        self.inner.offered.subscribe()
    }

    /// How it is, with what is wrong.
    pub async fn status(&self) -> NetStatus {
        let mut problems: Vec<String> = self.inner.fault.lock().iter().filter(|fault| fault.is_shown()).map(Fault::line).collect();
        let status = match self.link() {
            None => None,
            Some(link) => match link.ask(Question::Status, None).await {
                Ok((Answer::Status(status), _)) => Some(*status),
                Ok(_) | Err(Gone) => {
                    problems.push(format!(
                        "the network process does not answer; it is ended and started again when it says nothing for {} s",
                        SILENCE_MAX.as_secs()
                    ));
                    None
                }
            },
        };
        let mut status = status.unwrap_or_default();
        let own = std::mem::take(&mut status.problems);
        status.problems = problems;
        status.uploaded.listening.truncate(LISTENING_MAX);
        if let Some(node) = &mut status.node {
            [&mut node.v4, &mut node.v6].into_iter().flatten().for_each(|family| family.id = plain_text(&family.id));
        }
        status.problems.extend(own.iter().take(PROBLEMS_MAX).map(|problem| plain_text(problem)));
        status
    }

    /// Every peer that it remembers, most bytes first.
    pub async fn peers(&self) -> Result<Vec<PeerRow>> {
        match self.ask(Question::Peers).await? {
            (Answer::Peers(rows), _) => Ok(rows),
            _ => Err(anyhow!("the network process gave another answer than its peers")),
        }
    }

    /// What was said of peers, here and by others, the newest first.
    pub async fn statements(&self) -> Result<Vec<StatementRow>> {
        match self.ask(Question::Statements).await? {
            (Answer::Statements(rows), _) => Ok(rows.into_iter().map(plain_row).collect()),
            _ => Err(anyhow!("the network process gave another answer than what is said of peers")),
        }
    }

    /// What it told others since the same watcher asked last; nothing at its first time.
    pub async fn told(&self, watcher: u64) -> Result<Vec<Tale>> {
        match self.ask(Question::Told { watcher }).await? {
            (Answer::Told(Ok(tales)), _) => Ok(tales),
            (Answer::Told(Err(why)), _) => Err(anyhow!("{}", plain_text(&why))),
            _ => Err(anyhow!("the network process gave another answer than what it told")),
        }
    }

    /// Who gave which piece of a file, if it remembers.
    pub async fn why(&self, digest: Digest) -> Option<History> {
        let (Answer::Why(Some(history)), _) = self.ask(Question::Why(digest)).await.ok()? else { return None };
        let givers = history.givers.iter().map(|(giver, pieces)| (plain_text(giver), pieces.clone())).collect();
        Some(History { givers, ..history })
    }

    /// Fetches what is at `url`, at most `bytes_max` bytes. The error is a reason for people.
    pub async fn document(&self, url: &str, proxy: Option<&str>, bytes_max: u64) -> Result<Vec<u8>, String> {
        let link = self.up().await.map_err(|err| err.to_string())?;
        let question = Question::Document { url: url.to_owned(), proxy: proxy.map(str::to_owned), bytes_max };
        let answer = link.ask(question, Some(DOCUMENT_PATIENCE)).await.map_err(|err| err.to_string())?;
        match answer {
            (Answer::Document(Ok(())), mut fds) => {
                let memory = fds.pop().ok_or("nothing")?;
                let read = move || Memory::check(memory, bytes_max).map_err(|err| err.to_string())?.read().map_err(|err| err.to_string());
                tokio::task::spawn_blocking(read).await.map_err(|err| err.to_string())?
            }
            (Answer::Document(Err(why)), _) => Err(plain_text(&why)),
            _ => Err("the network process gave another answer than the document".to_owned()),
        }
    }

    /// Has it log by these directives from now on, also when it is started again.
    pub fn log(&self, level: &str) {
        level.clone_into(&mut self.inner.log.lock());
        if let Some(link) = self.link() {
            // One that is gone is started anew, and one that does not read is ended.
            let _ = link.try_tell(&ToNet::Log(level.to_owned()));
        }
    }

    /// Has it give so many bytes a second to addresses outside of the machine's own networks from now on, also when it is started again.
    pub fn set_upload(&self, bytes_s: u64) {
        *self.inner.upload.lock() = Some(bytes_s);
        if let Some(link) = self.link() {
            // As above.
            let _ = link.try_tell(&ToNet::Upload(bytes_s));
        }
    }

    /// Who tried to reach its port when it asked others to, and whether it could be reached; `None`: nobody did.
    pub async fn port(&self) -> Result<Option<(SocketAddr, bool)>> {
        let link = self.link().context("the network process does not run: `poolfs status` says why")?;
        match link.ask(Question::Port, Some(PORT_PATIENCE)).await.context("the network process does not answer")? {
            (Answer::Port(seen), _) => Ok(seen),
            _ => Err(anyhow!("the network process gave another answer than who reached it")),
        }
    }

    /// Ends the process for good.
    pub async fn stop(&self) {
        let (told, ended) = oneshot::channel();
        if self.inner.stop.send(told).await.is_ok() {
            // An error means that there was none.
            let _ = ended.await;
        }
    }

    async fn ask(&self, question: Question) -> Result<(Answer, Vec<OwnedFd>)> {
        let link = self.link().context("the network process does not run: `poolfs status` says why")?;
        link.ask(question, None).await.context("the network process does not answer")
    }

    /// The process, when it runs or is about to.
    async fn up(&self) -> Result<Arc<Link>, Gone> {
        let mut phase = self.inner.phase.clone();
        let settled = phase.wait_for(|phase| !matches!(phase, Phase::Starting));
        match timeout(UP_PATIENCE, settled).await {
            Ok(Ok(phase)) => match &*phase {
                Phase::Up(link) => Ok(Arc::clone(link)),
                Phase::Starting | Phase::Down => Err(Gone),
            },
            Ok(Err(_)) | Err(_) => Err(Gone),
        }
    }

    async fn deliver(&self, want: Want, incoming: Option<OwnedFd>, out: &mpsc::Sender<Delivery>) -> Result<(), Gone> {
        let wanting = self.up().await?.want(want, incoming).await?;
        hand_on(wanting, out).await
    }
}

/// Hands on what comes, by a channel with room for one.
async fn hand_on(mut wanting: Wanting, out: &mpsc::Sender<Delivery>) -> Result<(), Gone> {
    loop {
        let delivery = wanting.next().await?;
        let is_last = matches!(delivery, Delivery::Done | Delivery::Failed(_));
        // Nobody may wait for it any more.
        if out.send(delivery).await.is_err() || is_last {
            return Ok(());
        }
        // With room for the next one this one was taken, and the ones before it are in the file: only then may the process read
        // them from there.
        if out.reserve().await.is_err() {
            return Ok(());
        }
        wanting.took().await?;
    }
}

/// A row whose texts can be printed.
fn plain_row(row: StatementRow) -> StatementRow {
    StatementRow {
        subject: plain_text(&row.subject),
        speaker: plain_text(&row.speaker),
        kind: plain_text(&row.kind),
        digest: row.digest.as_deref().map(plain_text),
        ..row
    }
}

impl Source for NetProcess {
    fn want(&self, want: Want, incoming: Option<OwnedFd>) -> mpsc::Receiver<Delivery> {
        let (out, deliveries) = mpsc::channel(1);
        let this = self.clone();
        self.inner.runtime.spawn(async move {
            let end = tokio::select! {
                () = out.closed() => return,
                end = this.deliver(want, incoming, &out) => end,
            };
            if end.is_err() {
                let _ = out.send(Delivery::Failed(SourceError::Gone)).await; // Nobody may wait for it any more.
            }
        });
        deliveries
    }

    fn verdict(&self, digest: Digest, verdict: Verdict) {
        if let Some(link) = self.link()
            && link.try_tell(&ToNet::Verdict { digest, verdict }).is_err()
        {
            tracing::debug!(%digest, "the network process was not told the verdict");
        }
    }
}

impl Fault {
    fn is_shown(&self) -> bool {
        self.over.is_none_or(|over| over.elapsed() < FAULT_SHOWN)
    }

    fn line(&self) -> String {
        match self.over {
            None => self.text.clone(),
            Some(over) => format!("{}; it runs again for {} s", self.text, over.elapsed().as_secs()),
        }
    }
}

impl Keeper {
    async fn keep(mut self, inner: Arc<Inner>) {
        let mut ends = 0;
        loop {
            let started = Instant::now();
            self.number += 1;
            let end = self.once(&inner).await;
            inner.parts.arriving.send_replace(Vec::new());
            inner.parts.checked.send_replace(Vec::new());
            let why = match end {
                End::Stopped(told) => {
                    self.phase.send_replace(Phase::Down);
                    let _ = told.send(()); // Who asked may have gone.
                    return;
                }
                End::Fault(why) => why,
            };
            ends = if started.elapsed() > RAN_LONG { 0 } else { ends };
            let pause = RESTART_PAUSES[ends.min(RESTART_PAUSES.len() - 1)];
            ends += 1;
            let times = if ends > 1 { format!(", {ends} times in a row") } else { String::new() };
            let text = format!(
                "the network process was lost ({why}){times}: nothing comes from peers or the mirror until it runs again, and apt fetches by \
                 itself; its last lines are in poolfs's log"
            );
            tracing::error!("{text}; starting it again in {} s", pause.as_secs());
            *inner.fault.lock() = Some(Fault { text, over: None });
            if pause.is_zero() {
                self.phase.send_replace(Phase::Starting);
                continue;
            }
            self.phase.send_replace(Phase::Down);
            tokio::select! {
                () = sleep(pause) => {}
                told = self.stop.recv() => {
                    told.map(|told| told.send(()));
                    return;
                }
            }
            self.phase.send_replace(Phase::Starting);
        }
    }

    /// One process from its start to its end.
    async fn once(&mut self, inner: &Inner) -> End {
        let (mut child, mut socket) = match self.spawn() {
            Ok(started) => started,
            Err(err) => return End::Fault(format!("it could not be started: {err:#}")),
        };
        let link = Arc::new(Link::new(socket.outlet(), self.number));
        let end = self.run(inner, &link, &mut child, &mut socket).await;
        link.end();
        self.phase.send_replace(Phase::Starting);
        match end {
            Ok(told) => {
                if link.tell(&ToNet::Stop).await.is_err() || timeout(END_PATIENCE, child.ended()).await.is_err() {
                    tracing::warn!("the network process does not end by itself: what it knows of the network may not be saved");
                }
                child.kill().await;
                End::Stopped(told)
            }
            Err(err) => {
                // One that closed its end is about to say more by how it ended.
                if matches!(err, WireError::Closed) {
                    let _ = timeout(LAST_WORDS, child.ended()).await;
                }
                End::Fault(match (err, child.kill().await) {
                    (WireError::Closed, Some(status)) => format!("it ended: {status}"),
                    (err, _) => plain_text(&err.to_string()),
                })
            }
        }
    }

    fn spawn(&self) -> Result<(Process, Socket)> {
        let (ours, theirs) = wire::pair().context("make its socket")?;
        let program = program()?;
        let dir = self.setup.dir.clone();
        let mut child = tokio::task::block_in_place(|| {
            self.errands.run(move || {
                let mut command = std::process::Command::new(program);
                command.arg("serve-net").arg(dir).stdin(Stdio::from(theirs)).stdout(Stdio::null()).stderr(Stdio::piped()).current_dir("/");
                if logging::is_for_journal() {
                    command.env(logging::PASSED_ON, "1");
                }
                crate::sys::end_with_parent(&mut command);
                command.spawn()
            })
        })?;
        let stderr = child.stderr.take();
        let child = Process::new(child)?;
        lines::pass_on(stderr.context("it has no standard error")?)?;
        Ok((child, Socket::new(ours)?))
    }

    /// Serves the process until it is lost, or is to be stopped.
    async fn run(
        &mut self,
        inner: &Inner,
        link: &Arc<Link>,
        child: &mut Process,
        socket: &mut Socket,
    ) -> Result<oneshot::Sender<()>, WireError> {
        let mut setup = Setup { log: inner.log.lock().clone(), ..self.setup.clone() };
        setup.net.upload_bytes_s = inner.upload.lock().unwrap_or(setup.net.upload_bytes_s);
        link.tell(&ToNet::Setup(Box::new(setup))).await.map_err(|Gone| WireError::Closed)?;
        let silent = |after: Duration| WireError::Silent(after.as_secs());
        let mut started = false;
        let mut deadline = Instant::now() + START_PATIENCE;
        let mut pings = interval(PING_INTERVAL);
        let mut asked = 0;
        let mut window = (Instant::now(), 0_u32);
        loop {
            tokio::select! {
                biased;
                told = self.stop.recv() => return told.ok_or(WireError::Closed),
                // Before the deadline: what came while this process slept was in time.
                received = socket.receive::<FromNet>() => {
                    let (message, fds) = received?;
                    let now = Instant::now();
                    deadline = now + SILENCE_MAX;
                    window = if now - window.0 > Duration::from_secs(1) { (now, 1) } else { (window.0, window.1 + 1) };
                    if window.1 > MESSAGES_S_MAX {
                        return Err(WireError::garbage("a flood of messages"));
                    }
                    match message {
                        FromNet::Started if !started && fds.is_empty() => {
                            started = true;
                            {
                                // Whoever offers others waits here, and finds the link.
                                let offered = inner.offered.borrow();
                                let _ = link.try_tell(&ToNet::Offer(offered.clone()));
                                self.phase.send_replace(Phase::Up(Arc::clone(link)));
                            }
                            // Told while it was starting, it was told to nobody.
                            if let Some(bytes_s) = *inner.upload.lock() {
                                let _ = link.try_tell(&ToNet::Upload(bytes_s));
                            }
                            inner.fault.lock().iter_mut().for_each(|fault| fault.over = Some(now));
                        }
                        FromNet::Refused(why) if !started => return Err(WireError::Refused(why)),
                        // Its server may run before the rest.
                        message if started || matches!(message, FromNet::Find { .. } | FromNet::Arriving(_) | FromNet::Checked(_)) => {
                            link.take(message, fds, &inner.parts)?;
                        }
                        _ => return Err(WireError::garbage("it does not say first that it has started")),
                    }
                }
                () = child.ended() => return Err(WireError::Closed),
                _ = pings.tick(), if started => {
                    asked += 1;
                    // A queue that is full is a process that does not read, which the deadline ends.
                    let _ = link.try_tell(&ToNet::Ping(asked));
                }
                () = sleep_until(deadline) => return Err(silent(if started { SILENCE_MAX } else { START_PATIENCE })),
            }
        }
    }
}

/// This program; where it is built for tests, perhaps another one that follows no rule.
fn program() -> Result<std::path::PathBuf> {
    #[cfg(debug_assertions)]
    if let Some(other) = std::env::var_os("POOLFS_TEST_NET_PROGRAM") {
        return Ok(other.into());
    }
    crate::sys::program()
}

/// A child that is killed when it is dropped.
#[derive(Debug)]
struct Process {
    child: Child,
    /// Readable when it has ended.
    end: AsyncFd<OwnedFd>,
}

impl Process {
    fn new(child: Child) -> std::io::Result<Self> {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(std::io::ErrorKind::InvalidInput)?;
        Ok(Self { end: crate::sys::watched(pidfd_open(pid, PidfdFlags::NONBLOCK)?)?, child })
    }

    /// Waits for its end.
    async fn ended(&self) {
        // The only error is that of a runtime that ends.
        let _ = self.end.readable().await;
    }

    /// Ends it, if it has not ended, and tells how it did.
    async fn kill(&mut self) -> Option<ExitStatus> {
        if let Ok(Some(status)) = self.child.try_wait() {
            return Some(status);
        }
        // What cannot be killed has ended.
        let _ = self.child.kill();
        let _ = timeout(KILL_PATIENCE, self.ended()).await;
        self.child.try_wait().ok().flatten()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended and been waited for.
        let _ = self.child.kill();
        let _ = self.child.try_wait();
    }
}

#[cfg(test)]
mod tests;
