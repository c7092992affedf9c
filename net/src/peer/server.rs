//! The peer server: what is here and may be had, checked as it is sent.
//!
//! One task per connection. Each request runs the same way: a slot or 503; who asks; one look at the shelf and the
//! downloads, on a thread that may block; the answer. What is not found, and what the asker may not have, is one value
//! from there on. A file goes out piece by piece: read, compared with its checksums, and that buffer sent; a piece that
//! fails its check ends the connection, and is told to the shelf.
//!
//! Addresses beyond this machine's own networks share one upload rate and a few slots; those within have slots of their
//! own and no rate. Nothing waits in a queue: who finds no slot is told when to come back.

mod answer;
mod body;
mod drain;
mod near;
mod range;
mod rate;
#[cfg(test)]
mod tests;

pub use near::Near;
pub(crate) use near::prefixes_of_machine;

use super::{Auth, Facts, Partials, Shelf};
use crate::node::listen_tcp;
use crate::told::Told;
use drain::Drained;
use ed25519_dalek::SigningKey;
use hyper::server::conn::http1::Builder;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use rate::Bucket;
use socket2::SockRef;
use std::collections::HashMap;
use std::convert::Infallible;
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;

/// Bytes of a request's header.
const HEADER_BYTES_MAX: usize = 8 * 1024;

/// Headers of a request.
const HEADERS_MAX: usize = 32;

/// Bytes that wait in a connection's own buffers beside the piece that is being sent.
const BUFFER_BYTES_MAX: usize = 16 * 1024;

/// How long an unacknowledged byte is sent again after the connection was closed.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(30);

/// Pause after the system would not give a connection (too many open files).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// To who finds no room for a connection.
const BUSY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";

/// What the server gives at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerLimits {
    /// Connections in all; a quarter of them is kept for this machine's own networks.
    pub connections_max: usize,
    /// Connections from one IPv4 address or one IPv6 /64.
    pub connections_per_address_max: u32,
    /// Answers under way to addresses beyond this machine's networks.
    pub slots: usize,
    /// Answers under way within them.
    pub slots_near: usize,
    /// Bytes a second to addresses beyond this machine's networks, all together; 0 gives them nothing.
    pub upload_bytes_s: u64,
    /// Until a request's header is complete; also how long an idle connection is kept.
    pub header_read: Duration,
    /// Over this much time spent waiting for a receiver its rate is judged; who takes nothing is left within two of them.
    pub drain_window: Duration,
    /// A receiver slower than this is left, in bytes a second.
    pub drain_bytes_s_min: u64,
    /// Until the shelf has answered.
    pub find: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            connections_max: 512,
            connections_per_address_max: 64,
            slots: 8,
            slots_near: 64,
            upload_bytes_s: 2_000_000,
            header_read: Duration::from_secs(20),
            drain_window: Duration::from_secs(15),
            drain_bytes_s_min: 2048,
            find: Duration::from_secs(10),
        }
    }
}

/// What a server is made of.
pub struct ServerParts {
    /// Addresses to listen on; see [`crate::node::expand_listen`]. Port 0 takes a free one, the same for all.
    pub listen: Vec<SocketAddr>,
    /// Limits.
    pub limits: ServerLimits,
    /// Which addresses are within this machine's networks.
    pub near: Near,
    /// Whole files.
    pub shelf: Arc<dyn Shelf>,
    /// Files on their way here.
    pub partials: Arc<Partials>,
    /// What else is known.
    pub facts: Arc<dyn Facts>,
    /// The fleet's key, if this machine is in one.
    pub auth: Option<Arc<dyn Auth>>,
    /// The node's key, which signs lists.
    pub key: watch::Receiver<SigningKey>,
}

impl std::fmt::Debug for ServerParts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerParts").field("listen", &self.listen).field("limits", &self.limits).finish_non_exhaustive()
    }
}

/// Why the server does not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// An address cannot be listened on.
    #[error("listen on TCP {address}: {source}{}", remedy(source))]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's word for it.
        source: io::Error,
    },
    /// No address of any family that this machine has.
    #[error("no address to listen on: set net.listen")]
    Nowhere,
}

fn remedy(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::AddrInUse => "; another program has this port: end it, or choose another net.listen",
        io::ErrorKind::AddrNotAvailable => "; the machine has no such address: choose another net.listen",
        io::ErrorKind::PermissionDenied => "; ports below 1024 are for root: choose another net.listen",
        _ => "; choose another net.listen",
    }
}

/// What was given since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ServerCounters {
    /// Bytes of files handed to connections.
    pub bytes: u64,
    /// Of these, to addresses beyond this machine's networks.
    pub bytes_outside: u64,
    /// Requests answered with something.
    pub answered: u64,
    /// Requests for what is not here, or not for the asker.
    pub not_found: u64,
    /// Requests and connections turned away because too many were under way.
    pub refused: u64,
    /// Answers ended because the bytes on disk were not what they should be.
    pub damaged: u64,
    /// Connections open now.
    pub connections: u64,
}

#[derive(Debug, Default)]
struct Counts {
    bytes: AtomicU64,
    bytes_outside: AtomicU64,
    answered: AtomicU64,
    not_found: AtomicU64,
    refused: AtomicU64,
    damaged: AtomicU64,
    connections: AtomicU64,
}

fn bump(count: &AtomicU64) {
    count.fetch_add(1, Ordering::Relaxed);
}

/// What all connections share.
struct Shared {
    limits: ServerLimits,
    near: Near,
    shelf: Arc<dyn Shelf>,
    partials: Arc<Partials>,
    facts: Arc<dyn Facts>,
    auth: Option<Arc<dyn Auth>>,
    key: watch::Receiver<SigningKey>,
    slots: Arc<Semaphore>,
    slots_near: Arc<Semaphore>,
    connections: Arc<Semaphore>,
    connections_outside: Arc<Semaphore>,
    bucket: Arc<Bucket>,
    by_address: Mutex<HashMap<IpAddr, u32>>,
    counts: Arc<Counts>,
    told: Told,
}

/// A running server; dropping it closes all its connections.
#[derive(Debug)]
pub struct PeerServer {
    local: Vec<SocketAddr>,
    counts: Arc<Counts>,
    bucket: Arc<Bucket>,
    _tasks: JoinSet<()>,
}

impl PeerServer {
    /// Listens and serves on the runtime of the caller. Of two wildcard addresses one may be of a family that this
    /// machine does not have.
    pub fn start(parts: ServerParts) -> Result<Self, ServeError> {
        Self::start_telling(parts, Told::default())
    }

    /// The same, saying what it answers.
    pub fn start_telling(parts: ServerParts, told: Told) -> Result<Self, ServeError> {
        let ServerParts { listen, limits, near, shelf, partials, facts, auth, key } = parts;
        let listeners = bind(&listen)?;
        let local = listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect();
        let counts = Arc::new(Counts::default());
        let bucket = Arc::new(Bucket::new(limits.upload_bytes_s));
        let shared = Arc::new(Shared {
            near,
            shelf,
            partials,
            facts,
            auth,
            key,
            slots: Arc::new(Semaphore::new(limits.slots)),
            slots_near: Arc::new(Semaphore::new(limits.slots_near)),
            connections: Arc::new(Semaphore::new(limits.connections_max)),
            connections_outside: Arc::new(Semaphore::new(limits.connections_max - limits.connections_max / 4)),
            bucket: Arc::clone(&bucket),
            by_address: Mutex::default(),
            counts: Arc::clone(&counts),
            limits,
            told,
        });
        let mut tasks = JoinSet::new();
        for listener in listeners {
            tasks.spawn(accept(listener, Arc::clone(&shared)));
        }
        Ok(Self { local, counts, bucket, _tasks: tasks })
    }

    /// Gives so many bytes a second to addresses beyond this machine's networks from now on, all together; 0: nothing more, also
    /// of what is under way.
    pub fn set_upload(&self, bytes_s: u64) {
        self.bucket.set(bytes_s);
    }

    /// The addresses that it listens on.
    pub fn local(&self) -> &[SocketAddr] {
        &self.local
    }

    /// What was given since the start.
    pub fn counters(&self) -> ServerCounters {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let counts = &self.counts;
        ServerCounters {
            bytes: get(&counts.bytes),
            bytes_outside: get(&counts.bytes_outside),
            answered: get(&counts.answered),
            not_found: get(&counts.not_found),
            refused: get(&counts.refused),
            damaged: get(&counts.damaged),
            connections: get(&counts.connections),
        }
    }
}

fn bind(listen: &[SocketAddr]) -> Result<Vec<TcpListener>, ServeError> {
    let mut listeners = Vec::new();
    let mut port = None;
    let mut missing = None;
    for address in listen {
        let mut address = *address;
        if let (0, Some(port)) = (address.port(), port) {
            address.set_port(port);
        }
        let failed = |source| ServeError::Bind { address, source };
        match listen_tcp(address) {
            Ok(listener) => {
                port = Some(listener.local_addr().map_err(failed)?.port());
                listeners.push(listener);
            }
            Err(err) if address.ip().is_unspecified() && is_family_missing(&err) => missing = Some(failed(err)),
            Err(err) => return Err(failed(err)),
        }
    }
    match missing {
        _ if !listeners.is_empty() => Ok(listeners),
        Some(err) => Err(err),
        None => Err(ServeError::Nowhere),
    }
}

fn is_family_missing(err: &io::Error) -> bool {
    err.kind() == io::ErrorKind::AddrNotAvailable || err.raw_os_error() == Some(libc::EAFNOSUPPORT)
}

/// Takes connections until the server is dropped, and all of them end with it.
async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            // Who is not to be spoken to sees a closed connection.
            Ok((_, peer)) if !shared.near.allows(peer.ip()) => bump(&shared.counts.refused),
            Ok((stream, peer)) => match Seat::take(&shared, peer) {
                Some(seat) => drop(connections.spawn(serve(stream, peer, Arc::clone(&shared), seat))),
                None => {
                    bump(&shared.counts.refused);
                    turn_away(stream);
                }
            },
            Err(err) => {
                tracing::debug!(%err, "accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Says that there is no room, if the kernel takes it at once.
fn turn_away(stream: TcpStream) {
    if let Ok(stream) = stream.into_std() {
        // Who does not get it sees a closed connection, which says the same.
        let _ = (&stream).write(BUSY);
    }
}

/// A connection's place among all and among those of its address.
struct Seat {
    shared: Arc<Shared>,
    address: IpAddr,
    _one_of_all: OwnedSemaphorePermit,
    _one_of_outside: Option<OwnedSemaphorePermit>,
}

impl Seat {
    fn take(shared: &Arc<Shared>, peer: SocketAddr) -> Option<Self> {
        let one_of_all = Arc::clone(&shared.connections).try_acquire_owned().ok()?;
        let near = shared.near.is_near(peer.ip());
        let one_of_outside = match near {
            true => None,
            false => Some(Arc::clone(&shared.connections_outside).try_acquire_owned().ok()?),
        };
        let address = holder(peer.ip());
        let mut by_address = shared.by_address.lock();
        let count = by_address.entry(address).or_default();
        // A site behind one address is this machine's own network, which the total bounds.
        if *count >= shared.limits.connections_per_address_max && !near {
            return None;
        }
        *count += 1;
        bump(&shared.counts.connections);
        Some(Self { shared: Arc::clone(shared), address, _one_of_all: one_of_all, _one_of_outside: one_of_outside })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.shared.counts.connections.fetch_sub(1, Ordering::Relaxed);
        let mut by_address = self.shared.by_address.lock();
        if let Some(count) = by_address.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                by_address.remove(&self.address);
            }
        }
    }
}

/// Whom an address belongs to: one IPv4 address, one IPv6 /64.
fn holder(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V4(v4) => v4.into(),
        IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6) >> 64 << 64).into(),
    }
}

async fn serve(stream: TcpStream, peer: SocketAddr, shared: Arc<Shared>, _seat: Seat) {
    if let Err(err) = stream.set_nodelay(true).and_then(|()| SockRef::from(&stream).set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX))) {
        tracing::debug!(%peer, %err, "socket options");
    }
    let near = shared.near.is_near(peer.ip());
    let stream = Drained::new(stream, shared.limits.drain_window, shared.limits.drain_bytes_s_min);
    let service = service_fn(|request| {
        let shared = Arc::clone(&shared);
        async move { Ok::<_, Infallible>(answer::answer_telling(&shared, near, peer, request).await) }
    });
    let mut builder = Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(shared.limits.header_read)
        .max_headers(HEADERS_MAX)
        .max_header_size(HEADER_BYTES_MAX)
        .max_buf_size(BUFFER_BYTES_MAX)
        // The clock is nobody's business, and answers of one kind are equal byte for byte.
        .auto_date_header(false);
    if let Err(err) = builder.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(%peer, "connection: {err}");
    }
}
