//! Connections to peers, kept for the next request.

use bytes::Bytes;
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio::time::Instant;

/// Bytes of an answer's header; a longer one is no answer.
const HEADER_BYTES_MAX: usize = 8 * 1024;

/// Headers of an answer.
const HEADERS_MAX: usize = 32;

/// Bytes read at once.
const READ_BYTES_MAX: usize = 64 * 1024;

/// One connection; dropping it closes it.
#[derive(Debug)]
pub(super) struct Connection {
    sender: SendRequest<Empty<Bytes>>,
    task: AbortHandle,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Connection {
    pub(super) async fn open(peer: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(peer).await?;
        stream.set_nodelay(true)?;
        let mut builder = Builder::new();
        builder.max_headers(HEADERS_MAX).max_header_size(HEADER_BYTES_MAX).max_buf_size(READ_BYTES_MAX);
        let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        let task = tokio::spawn(async move {
            if let Err(err) = connection.await {
                tracing::trace!(%peer, "connection: {err}");
            }
        });
        Ok(Self { sender, task: task.abort_handle() })
    }

    /// Sends a request and waits for the answer's header.
    pub(super) async fn send(&mut self, request: Request<Empty<Bytes>>) -> hyper::Result<Response<Incoming>> {
        // The answer before may have ended only just now, with the connection's task still to notice.
        self.sender.ready().await?;
        self.sender.send_request(request).await
    }
}

/// Idle connections by peer.
#[derive(Debug)]
pub(super) struct Pool {
    per_peer_max: usize,
    all_max: usize,
    keep: Duration,
    idle: Mutex<Idle>,
}

#[derive(Debug, Default)]
struct Idle {
    /// Latest last.
    by_peer: HashMap<SocketAddr, Vec<(Instant, Connection)>>,
    count: usize,
}

impl Pool {
    pub(super) fn new(per_peer_max: usize, all_max: usize, keep: Duration) -> Self {
        Self { per_peer_max, all_max, keep, idle: Mutex::default() }
    }

    /// The connection to `peer` that was used last, unless it is closed or too old.
    pub(super) fn take(&self, peer: SocketAddr) -> Option<Connection> {
        let now = Instant::now();
        let mut idle = self.idle.lock();
        let Idle { by_peer, count } = &mut *idle;
        let kept = by_peer.get_mut(&peer)?;
        let mut found = None;
        while let (None, Some((since, connection))) = (&found, kept.pop()) {
            *count -= 1;
            if now.duration_since(since) < self.keep && !connection.sender.is_closed() {
                found = Some(connection);
            }
        }
        if kept.is_empty() {
            by_peer.remove(&peer);
        }
        found
    }

    /// Keeps a connection whose last answer was taken whole.
    pub(super) fn put(&self, peer: SocketAddr, connection: Connection) {
        let now = Instant::now();
        let mut idle = self.idle.lock();
        let Idle { by_peer, count } = &mut *idle;
        if *count >= self.all_max {
            by_peer.retain(|_, kept| {
                kept.retain(|(since, connection)| now.duration_since(*since) < self.keep && !connection.sender.is_closed());
                !kept.is_empty()
            });
            *count = by_peer.values().map(Vec::len).sum();
        }
        if *count >= self.all_max {
            return;
        }
        let kept = by_peer.entry(peer).or_default();
        if kept.len() < self.per_peer_max {
            kept.push((now, connection));
            *count += 1;
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.idle.lock().count
    }
}
