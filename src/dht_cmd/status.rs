//! A node's status socket: whoever connects is told the node's [`Status`] as one line of JSON, or, asking with the line `watch`, what the
//! node tells others from then on, each [`Tale`] as a line.
//!
//! A Unix stream socket of mode 0600.

use anyhow::{Context, Result, bail};
use poolfs_net::node::Snapshot;
use poolfs_net::told::Tale;
use serde::{Deserialize, Serialize};
use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;

/// A snapshot is far shorter, in bytes.
const SNAPSHOT_BYTES_MAX: u64 = 64 * 1024;

/// How long one reader may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// How long who connects has for its question; who asks nothing gets the snapshot.
const QUESTION_TIMEOUT: Duration = Duration::from_millis(200);

/// Who is served at once; more are closed.
const READERS_MAX: usize = 16;

/// The question for [`Tale`]s.
const WATCH: &[u8] = b"watch\n";

/// First line of the answer to it, when everything from then on is told.
const WATCHING: &str = "watching";

/// How a node is.
#[derive(Debug, Serialize, Deserialize)]
pub struct Status {
    /// In the DHT.
    #[serde(flatten)]
    pub node: Snapshot,
    /// Live members of its fleet, this node among them; 0 where it is of none.
    #[serde(default)]
    pub fleet_members: usize,
}

/// The socket of a running node; it goes with this value.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
}

impl Server {
    /// Creates the socket, in place of one that a dead node left.
    pub fn bind(path: &Path) -> Result<Self> {
        let failed = || format!("create status socket {}: give another one with --socket PATH", path.display());
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).with_context(failed)?;
        }
        if fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                bail!("a node already answers on {}: end it, or give another --socket PATH", path.display());
            }
            fs::remove_file(path).with_context(failed)?;
        }
        let listener = UnixListener::bind(path).with_context(failed)?;
        fs::set_permissions(path, Permissions::from_mode(0o600)).with_context(failed)?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Answers what `status` says, nothing where there is none, and what `told` says to each who watches, by a number of his own, until
    /// the former is an error.
    pub async fn run<S, T>(
        &self,
        status: impl Fn() -> S + Send + Sync + 'static,
        told: impl Fn(u64) -> T + Send + Sync + 'static,
    ) -> Result<()>
    where
        S: Future<Output = Result<Option<Status>>> + Send + 'static,
        T: Future<Output = Result<Vec<Tale>>> + Send + 'static,
    {
        let (status, told) = (Arc::new(status), Arc::new(told));
        let mut readers = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                Some(served) = readers.join_next() => match served {
                    // Only the node's own end is of matter here; a reader that went away is not.
                    Ok(Err(err)) => return Err(err),
                    _ => continue,
                },
            };
            let (stream, _) = accepted.context("accept on the status socket")?;
            if readers.len() < READERS_MAX {
                let (status, told) = (Arc::clone(&status), Arc::clone(&told));
                readers.spawn(async move { serve(stream, &*status, &*told).await });
            }
        }
    }
}

async fn serve<S, T>(mut stream: UnixStream, status: &(impl Fn() -> S + Sync), told: &(impl Fn(u64) -> T + Sync)) -> Result<()>
where
    S: Future<Output = Result<Option<Status>>>,
    T: Future<Output = Result<Vec<Tale>>>,
{
    let mut question = [0; WATCH.len()];
    let asked = tokio::time::timeout(QUESTION_TIMEOUT, stream.read_exact(&mut question)).await;
    let served = match asked {
        Ok(Ok(_)) if question == WATCH => watch(&mut stream, told).await,
        _ => match status().await? {
            Some(status) => write_line(&mut stream, &status).await,
            None => Ok(()),
        },
    };
    if let Err(err) = served {
        tracing::debug!("status socket: {err:#}");
    }
    Ok(())
}

async fn watch<T>(stream: &mut UnixStream, told: &impl Fn(u64) -> T) -> Result<()>
where
    T: Future<Output = Result<Vec<Tale>>>,
{
    static WATCHERS: AtomicU64 = AtomicU64::new(0);
    let watcher = WATCHERS.fetch_add(1, Ordering::Relaxed);
    // The first answer says that everything is told from then on.
    let mut tales = told(watcher).await?;
    stream.write_all(format!("{WATCHING}\n").as_bytes()).await?;
    let (mut questions, mut answers) = stream.split();
    let mut nothing = [0; 1];
    loop {
        for tale in tales {
            write_line(&mut answers, &tale).await?;
        }
        tales = tokio::select! {
            // Nothing more is asked: this tells that the reader is gone.
            _ = questions.read(&mut nothing) => return Ok(()),
            tales = told(watcher) => tales?,
        };
    }
}

async fn write_line(to: &mut (impl AsyncWrite + Unpin), value: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    tokio::time::timeout(ANSWER_TIMEOUT, to.write_all(&line)).await.context("nobody reads")??;
    Ok(())
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(err) = fs::remove_file(&self.path) {
            tracing::debug!(%err, path = %self.path.display(), "remove status socket");
        }
    }
}

async fn connect(path: &Path) -> Result<UnixStream> {
    match UnixStream::connect(path).await {
        Ok(stream) => Ok(stream),
        Err(err) if matches!(err.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            bail!("no node answers on {}: start one with `poolfs up` or `poolfs dht node`, or give its --socket PATH", path.display())
        }
        Err(err) => Err(err).with_context(|| format!("connect to {}", path.display())),
    }
}

/// Hands everything that a running node tells others to `each`, after saying `ready`, until it ends.
pub async fn follow(path: &Path, ready: impl FnOnce() -> Result<()>, mut each: impl FnMut(Tale) -> Result<()>) -> Result<()> {
    let failed = || format!("read from {}", path.display());
    let mut stream = connect(path).await?;
    stream.write_all(WATCH).await.with_context(failed)?;
    let mut lines = BufReader::new(stream).lines();
    if lines.next_line().await.with_context(failed)?.as_deref() != Some(WATCHING) {
        bail!("what answers on {} does not tell: is it of another version?", path.display());
    }
    ready()?;
    while let Some(line) = lines.next_line().await.with_context(failed)? {
        each(serde_json::from_str(&line).with_context(|| format!("understand what {} answers", path.display()))?)?;
    }
    bail!("{} was closed: the node has ended, or this reader was too slow", path.display())
}

/// Asks a running node.
pub async fn ask(path: &Path) -> Result<Status> {
    let stream = connect(path).await?;
    // That nothing is asked is told at once.
    let (stream, mut questions) = stream.into_split();
    questions.shutdown().await.with_context(|| format!("write to {}", path.display()))?;
    let mut text = String::new();
    let reading = stream.take(SNAPSHOT_BYTES_MAX).read_to_string(&mut text).await.map(drop);
    reading.with_context(|| format!("read from {}", path.display()))?;
    if text.is_empty() {
        bail!("the node of {} does not run: `poolfs status` says why", path.display());
    }
    serde_json::from_str(&text).with_context(|| format!("understand what {} answers", path.display()))
}
