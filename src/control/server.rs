//! The daemon's end of the control socket.

use super::{REQUEST_BYTES_MAX, Reply, Request};
use anyhow::{Context, Result, bail};
use std::future::Future;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};

/// Clients served at once; further ones wait to be accepted.
const CLIENTS_MAX: usize = 32;

/// How long a client may take to send its request, and to take an answer.
const CLIENT_PATIENCE: Duration = Duration::from_secs(10);

/// Replies that may wait to be sent to a slow client; who produces them waits when it is full.
const REPLIES_WAITING_MAX: usize = 16;

/// What answers requests. Replies but the last go into the channel; the last follows from the result.
pub trait Handler: Send + Sync + 'static {
    /// Carries out one request.
    fn handle(self: Arc<Self>, request: Request, replies: mpsc::Sender<Reply>) -> Pin<Box<dyn Future<Output = Result<()>> + Send>>;
}

/// The listening socket; its file goes when it is dropped.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    slots: Arc<Semaphore>,
}

impl Server {
    /// Binds `path`. A socket that nobody listens on any more is replaced; one that answers is another daemon's.
    pub fn bind(path: &Path) -> Result<Self> {
        if let Some(dir) = path.parent().filter(|dir| !dir.exists()) {
            std::fs::DirBuilder::new().recursive(true).mode(0o755).create(dir).with_context(|| format!("create {}", dir.display()))?;
        }
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            bail!("another daemon answers at {}: end it with `poolfs down`", path.display());
        }
        match std::fs::remove_file(path) {
            Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
                return Err(err).with_context(|| format!("replace the old socket {}", path.display()));
            }
            _ => {}
        }
        let listener = UnixListener::bind(path)
            .with_context(|| format!("listen at {}: the path may be at most 107 bytes, its directory must exist", path.display()))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).with_context(|| format!("protect {}", path.display()))?;
        Ok(Self { listener, path: path.to_owned(), slots: Arc::new(Semaphore::new(CLIENTS_MAX)) })
    }

    /// Serves until the future is dropped.
    pub async fn run(&self, handler: Arc<dyn Handler>) {
        loop {
            let slot = Arc::clone(&self.slots).acquire_owned().await.expect("the semaphore is never closed");
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let handler = Arc::clone(&handler);
                    tokio::spawn(async move {
                        if let Err(err) = serve(stream, handler).await {
                            tracing::debug!("control client: {err:#}");
                        }
                        drop(slot);
                    });
                }
                Err(err) => {
                    // Out of descriptors: the next accept would fail as fast.
                    tracing::warn!("accept a control client: {err}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl Server {
    /// Waits until every client that was accepted has its last answer, a slow one at most for its patience.
    pub async fn drain(&self) {
        let all = u32::try_from(CLIENTS_MAX).expect("a small number");
        if tokio::time::timeout(CLIENT_PATIENCE, self.slots.acquire_many(all)).await.is_err() {
            tracing::debug!("a control client did not take its answer");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(err) = std::fs::remove_file(&self.path) {
            tracing::debug!("remove {}: {err}", self.path.display());
        }
    }
}

async fn serve(stream: UnixStream, handler: Arc<dyn Handler>) -> Result<()> {
    let (reading, mut writing) = stream.into_split();
    let mut line = String::new();
    tokio::time::timeout(CLIENT_PATIENCE, BufReader::new(reading.take(REQUEST_BYTES_MAX)).read_line(&mut line))
        .await
        .context("no request came")??;
    let request = match serde_json::from_str(&line) {
        Ok(request) => request,
        Err(err) => {
            return send(
                &mut writing,
                &Reply::Failed { message: format!("the daemon does not know this request ({err}): are both of the same version?") },
            )
            .await;
        }
    };
    let (sender, mut replies) = mpsc::channel(REPLIES_WAITING_MAX);
    let work = handler.handle(request, sender);
    // The channel closes with the first reply that cannot be sent: work that tells how far it is ends when its client goes.
    let forward = async move {
        while let Some(reply) = replies.recv().await {
            send(&mut writing, &reply).await?;
        }
        anyhow::Ok(writing)
    };
    let (result, forwarded) = tokio::join!(work, forward);
    let mut writing = forwarded?;
    let last = match result {
        Ok(()) => Reply::Done,
        Err(err) => Reply::Failed { message: format!("{err:#}") },
    };
    send(&mut writing, &last).await
}

async fn send(writing: &mut tokio::net::unix::OwnedWriteHalf, reply: &Reply) -> Result<()> {
    let mut line = serde_json::to_vec(reply).context("encode the reply")?;
    line.push(b'\n');
    tokio::time::timeout(CLIENT_PATIENCE, writing.write_all(&line)).await.context("the client does not read")??;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{Call, Status};

    struct Echo;

    impl Handler for Echo {
        fn handle(self: Arc<Self>, request: Request, replies: mpsc::Sender<Reply>) -> Pin<Box<dyn Future<Output = Result<()>> + Send>> {
            Box::pin(async move {
                match request {
                    Request::Status => Ok(replies.send(Reply::Status(Box::new(Status { pid: 7, ..Status::default() }))).await?),
                    Request::Down => bail!("not now: wait for apt"),
                    _ => Ok(()),
                }
            })
        }
    }

    /// A client sees the answer, the error's own text, and who answers at a socket that is taken.
    #[test]
    fn requests_are_answered_and_errors_arrive_whole() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("run/control.sock");
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let _inside = runtime.enter();
        let server = Server::bind(&path).expect("bind");
        assert_eq!(path.metadata().expect("the socket").permissions().mode() & 0o777, 0o600);
        let task = runtime.spawn(async move { server.run(Arc::new(Echo)).await });
        assert_eq!(Call::status(&path).expect("a status").pid, 7);
        let refused = Call::start(&path, &Request::Down).expect("a call").next().expect_err("it is refused");
        assert_eq!(refused.to_string(), "not now: wait for apt");
        assert!(Call::start(&path, &Request::Verify { repair: true }).expect("a call").next().expect("done").is_none());
        let taken = Server::bind(&path).expect_err("the socket is taken");
        assert!(taken.to_string().starts_with("another daemon answers at "), "{taken}");
        let mut raw = std::os::unix::net::UnixStream::connect(&path).expect("connect");
        std::io::Write::write_all(&mut raw, b"{\"reboot\":{}}\n").expect("write");
        let answer = std::io::read_to_string(raw).expect("read");
        assert!(answer.starts_with("{\"failed\":{\"message\":\"the daemon does not know this request"), "{answer}");
        task.abort();
        drop(runtime.block_on(task));
        let gone = Call::status(&path).expect_err("nobody is there");
        assert!(gone.to_string().contains("start one with `poolfs up`"), "{gone}");
    }

    struct Endless(std::sync::mpsc::Sender<()>);

    impl Handler for Endless {
        fn handle(self: Arc<Self>, _request: Request, replies: mpsc::Sender<Reply>) -> Pin<Box<dyn Future<Output = Result<()>> + Send>> {
            Box::pin(async move {
                while replies.send(Reply::Progress { done_bytes: 0, total_bytes: 0, file: String::new() }).await.is_ok() {}
                self.0.send(())?;
                bail!("the client went away")
            })
        }
    }

    /// `poolfs verify` that is interrupted must not go on for ever, holding a file open and one of the clients' places.
    #[test]
    fn work_ends_with_its_client() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("control.sock");
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let _inside = runtime.enter();
        let server = Server::bind(&path).expect("bind");
        let (ended, has_ended) = std::sync::mpsc::channel();
        let task = runtime.spawn(async move { server.run(Arc::new(Endless(ended))).await });
        let mut call = Call::start(&path, &Request::Verify { repair: false }).expect("a call");
        assert!(call.next().expect("progress").is_some());
        drop(call);
        has_ended.recv_timeout(CLIENT_PATIENCE * 2).expect("the work goes on without its client");
        task.abort();
    }
}
