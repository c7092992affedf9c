//! A node's status socket: whoever connects is told the node's [`Status`] as one line of JSON.
//!
//! A Unix stream socket of mode 0600. Nothing is read from it.

use anyhow::{Context, Result, bail};
use poolfs_net::node::Snapshot;
use serde::{Deserialize, Serialize};
use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

/// A snapshot is far shorter, in bytes.
const SNAPSHOT_BYTES_MAX: u64 = 64 * 1024;

/// How long one reader may take; there is one at a time.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

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

    /// Answers what `node` says, nothing where there is none, until that is an error.
    pub async fn run<F: Future<Output = Result<Option<Status>>>>(&self, node: impl Fn() -> F) -> Result<()> {
        loop {
            let (mut stream, _) = self.listener.accept().await.context("accept on the status socket")?;
            let Some(status) = node().await? else { continue };
            let mut line = serde_json::to_vec(&status)?;
            line.push(b'\n');
            // A reader that went away or does not read is no matter of the node's.
            if let Ok(Err(err)) = tokio::time::timeout(ANSWER_TIMEOUT, stream.write_all(&line)).await {
                tracing::debug!(%err, "status socket");
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(err) = fs::remove_file(&self.path) {
            tracing::debug!(%err, path = %self.path.display(), "remove status socket");
        }
    }
}

/// Asks a running node.
pub async fn ask(path: &Path) -> Result<Status> {
    let stream = match UnixStream::connect(path).await {
        Ok(stream) => stream,
        Err(err) if matches!(err.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            bail!("no node answers on {}: start one with `poolfs up` or `poolfs dht node`, or give its --socket PATH", path.display())
        }
        Err(err) => return Err(err).with_context(|| format!("connect to {}", path.display())),
    };
    let mut text = String::new();
    let reading = stream.take(SNAPSHOT_BYTES_MAX).read_to_string(&mut text).await.map(drop);
    reading.with_context(|| format!("read from {}", path.display()))?;
    if text.is_empty() {
        bail!("the node of {} does not run: `poolfs status` says why", path.display());
    }
    serde_json::from_str(&text).with_context(|| format!("understand what {} answers", path.display()))
}
