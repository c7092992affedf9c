//! The peer client: one request, one typed outcome.
//!
//! A piece streams into a memfd while its SHA-256 is computed, and is sealed when its last byte is there; what comes past
//! it is not taken. Connections are kept and used again. Dropping a future ends its request and closes the connection.

mod pool;
#[cfg(test)]
mod tests;

use super::Near;
use super::about::{ABOUT_BYTES_MAX, About};
use super::auth::{ARRIVING_HEADER, AUTH_HEADER, Auth, signed_bytes};
use crate::fleet::auth::Nonce;
use crate::memfd::{PieceMemory, SealedPiece};
use crate::swarm::bits::Bits;
use crate::swarm::piece_list::{LIST_BYTES_MAX, PieceList};
use crate::swarm::{Failure, FileShape};
use crate::told::{How, Told};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, HOST, HeaderMap, HeaderName, RANGE, RETRY_AFTER, TRANSFER_ENCODING};
use hyper::{Request, Response, StatusCode};
use pool::{Connection, Pool};
use poolfs_core::Digest;
use sha2::{Digest as _, Sha256};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::time::{Instant, timeout_at};

/// Longest list of members that is read, in bytes: 4,096 members of 120 bytes, and change.
const MEMBERS_BYTES_MAX: usize = 512 * 1024;

/// Longest time that a peer can ask to be left alone.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(3600);

/// How long a peer is waited for, and what is kept of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientLimits {
    /// Until the connection stands.
    pub connect: Duration,
    /// From the sent request to the answer's header, and from there to the first byte.
    pub first_byte: Duration,
    /// Between two reads of the body.
    pub stall: Duration,
    /// A body slower than this over its whole length is given up, in bytes a second; [`Self::stall`] is granted on top.
    pub rate_bytes_s_min: u64,
    /// Connections kept open to one peer for the next request.
    pub idle_per_peer_max: usize,
    /// Connections kept open in all.
    pub idle_max: usize,
    /// How long one is kept.
    pub idle: Duration,
}

impl Default for ClientLimits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(4),
            first_byte: Duration::from_secs(8),
            stall: Duration::from_secs(5),
            rate_bytes_s_min: 8 * 1024,
            idle_per_peer_max: 4,
            idle_max: 128,
            idle: Duration::from_secs(15),
        }
    }
}

/// Why a request brought nothing, by what the asker makes of it. None of these is guilt.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PeerError {
    /// The answer broke off.
    #[error("the answer broke off")]
    Short,
    /// Nothing came within the deadline, or too little.
    #[error("too slow")]
    Slow,
    /// 404 or 503, or another status that is no answer.
    #[error("refused")]
    Refused {
        /// When to ask again, if it said so; at most an hour.
        retry_after: Option<Duration>,
    },
    /// It cannot be reached.
    #[error("cannot be reached")]
    Gone,
    /// The answer is not one to what was asked: another range, another length, a redirect, no list.
    #[error("wrong answer: {0}")]
    Wrong(String),
}

impl From<&PeerError> for Failure {
    fn from(error: &PeerError) -> Self {
        match error {
            PeerError::Short => Self::Short,
            PeerError::Slow => Self::Slow,
            PeerError::Refused { .. } | PeerError::Wrong(_) => Self::Refused,
            PeerError::Gone => Self::Gone,
        }
    }
}

fn wrong(why: impl Into<String>) -> PeerError {
    PeerError::Wrong(why.into())
}

/// A piece as a peer gave it.
#[derive(Debug)]
pub struct PeerPiece {
    /// A memfd sealed against every change that holds exactly the piece.
    pub bytes: OwnedFd,
    /// Its SHA-256.
    pub digest: Digest,
    /// The giver says that the file is still arriving there: it does not know that these bytes are right.
    pub arriving: bool,
}

/// The client of all peers. Clones share the connections.
#[derive(Clone)]
pub struct PeerClient {
    limits: Arc<ClientLimits>,
    pool: Arc<Pool>,
    auth: Option<Arc<dyn Auth>>,
    /// Who is connected to at all; `None`: everybody.
    within: Option<Arc<Near>>,
    told: Told,
}

impl std::fmt::Debug for PeerClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerClient").field("limits", &self.limits).field("fleet", &self.auth.is_some()).finish_non_exhaustive()
    }
}

/// An answer whose header was taken.
struct Answer {
    response: Response<Incoming>,
    connection: Connection,
}

impl PeerClient {
    /// A client that speaks as a stranger.
    pub fn new(limits: ClientLimits) -> Self {
        let pool = Arc::new(Pool::new(limits.idle_per_peer_max, limits.idle_max, limits.idle));
        Self { limits: Arc::new(limits), pool, auth: None, within: None, told: Told::default() }
    }

    /// The same client, which connects to nobody else.
    pub fn within(self, within: Arc<Near>) -> Self {
        Self { within: Some(within), ..self }
    }

    /// The same client, saying what it asks for.
    #[must_use]
    pub fn telling(self, told: Told) -> Self {
        Self { told, ..self }
    }

    /// The same client for members of the fleet: requests are signed, and only signed answers count.
    pub fn for_fleet(&self, auth: Arc<dyn Auth>) -> Self {
        Self { auth: Some(auth), ..self.clone() }
    }

    /// Asks for one piece of a file. `first_byte` is called when the first byte of it has come.
    pub async fn piece(
        &self,
        peer: SocketAddr,
        shape: &FileShape,
        piece: u32,
        first_byte: impl FnOnce() + Send,
    ) -> Result<PeerPiece, PeerError> {
        let len = shape.piece_len(piece);
        if len == 0 {
            return Err(wrong(format!("{} has no piece {piece}", shape.digest)));
        }
        let start = u64::from(piece) * u64::from(shape.piece_bytes);
        let end = start + u64::from(len);
        let whole = u64::from(len) == shape.size;
        let range = if whole { String::new() } else { format!("bytes={start}-{}", end - 1) };
        let mut answer = self.ask(peer, &format!("/v1/file/{}", shape.digest), &range).await?;
        judge_piece(&answer.response, start, end, shape.size, whole)?;
        let arriving = answer.response.headers().contains_key(ARRIVING_HEADER);
        let failed = |err: std::io::Error| wrong(format!("no memory for a piece: {err}"));
        let mut memory = PieceMemory::new(piece, &(start..end)).map_err(failed)?;
        let mut sum = Sha256::new();
        let mut first_byte = Some(first_byte);
        let mut left = len as usize;
        let mut body = Timed::new(&self.limits, u64::from(len));
        loop {
            let bytes = body.next(&mut answer.response).await?.ok_or(PeerError::Short)?;
            if bytes.is_empty() {
                continue;
            }
            if let Some(tell) = first_byte.take() {
                tell();
            }
            if bytes.len() > left {
                return Err(wrong("more bytes than the piece has"));
            }
            left -= bytes.len();
            sum.update(&bytes);
            match memory.take(&bytes).map_err(failed)? {
                SealedPiece::NotYet(more) => memory = more,
                SealedPiece::Done(bytes) => {
                    self.release(peer, answer, &mut body).await?;
                    return Ok(PeerPiece { bytes, digest: Digest(sum.finalize().into()), arriving });
                }
            }
        }
    }

    /// Asks which pieces of a file it has.
    pub async fn have(&self, peer: SocketAddr, shape: &FileShape) -> Result<Bits, PeerError> {
        let len = shape.pieces().div_ceil(8) as usize;
        let bytes = self.small(peer, &format!("/v1/have/{}", shape.digest), len).await?;
        Bits::from_bytes(&bytes, shape.pieces()).map_err(|err| wrong(err.to_string()))
    }

    /// Asks for a signed list of a file's pieces. Its form, time and signature are checked; whether it is true is not known.
    pub async fn list(&self, peer: SocketAddr, shape: &FileShape) -> Result<PieceList, PeerError> {
        let bytes = self.small(peer, &format!("/v1/pieces/{}", shape.digest), PieceList::encoded_bytes(shape).min(LIST_BYTES_MAX)).await?;
        PieceList::decode(&bytes, shape, now_s()).map_err(|err| wrong(err.to_string()))
    }

    /// Asks what it says of a file. The claims' signatures are checked.
    pub async fn about(&self, peer: SocketAddr, digest: &Digest) -> Result<About, PeerError> {
        let bytes = self.small(peer, &format!("/v1/about/{digest}"), ABOUT_BYTES_MAX).await?;
        About::decode(&bytes, digest, now_s()).map_err(|err| wrong(err.to_string()))
    }

    /// Asks for the proof with this SHA-256, which is checked.
    pub async fn proof(&self, peer: SocketAddr, id: &Digest) -> Result<Vec<u8>, PeerError> {
        let bytes = self.small(peer, &format!("/v1/statement/{id}"), LIST_BYTES_MAX).await?;
        if Digest::of(&bytes) == *id { Ok(bytes) } else { Err(wrong("the proof is another one")) }
    }

    /// Asks for the fleet's members, as [`Auth::members`] gave them.
    pub async fn members(&self, peer: SocketAddr) -> Result<Vec<u8>, PeerError> {
        self.small(peer, "/v1/members", MEMBERS_BYTES_MAX).await
    }

    /// A whole answer of at most `bytes_max` bytes.
    async fn small(&self, peer: SocketAddr, path: &str, bytes_max: usize) -> Result<Vec<u8>, PeerError> {
        let mut answer = self.ask(peer, path, "").await?;
        if answer.response.status() != StatusCode::OK {
            return Err(wrong(format!("status {}", answer.response.status().as_u16())));
        }
        // The length gives the deadline, so there has to be one.
        let Some(promised) = content_length(answer.response.headers())? else { return Err(wrong("an answer without a length")) };
        if promised > bytes_max as u64 {
            return Err(wrong(format!("more than {bytes_max} bytes")));
        }
        let mut body = Timed::new(&self.limits, promised);
        let mut out = Vec::new();
        while let Some(bytes) = body.next(&mut answer.response).await? {
            out.extend_from_slice(&bytes);
        }
        self.pool.put(peer, answer.connection);
        Ok(out)
    }

    /// After the last byte of a piece: an answer that ends there leaves the connection for the next request.
    async fn release(&self, peer: SocketAddr, mut answer: Answer, body: &mut Timed) -> Result<(), PeerError> {
        if content_length(answer.response.headers())?.is_some() {
            self.pool.put(peer, answer.connection);
            return Ok(());
        }
        // A chunked answer has its end still to come; what else comes is not the piece.
        match body.next(&mut answer.response).await {
            Ok(None) => self.pool.put(peer, answer.connection),
            Ok(Some(_)) => return Err(wrong("more bytes than the piece has")),
            Err(_) => {} // The piece is here; only the connection is of no more use.
        }
        Ok(())
    }

    /// Sends one GET and takes the answer's header; what is no answer to it becomes an error here.
    async fn ask(&self, peer: SocketAddr, path: &str, range: &str) -> Result<Answer, PeerError> {
        let deadline = |wait| Instant::now() + wait;
        // A kept connection may have been closed by the other side meanwhile: then a new one, once.
        let kept = match self.pool.take(peer) {
            Some(mut connection) => {
                let (request, nonce) = self.request(peer, path, range)?;
                match timeout_at(deadline(self.limits.first_byte), connection.send(request)).await {
                    Err(_) => return Err(PeerError::Slow),
                    Ok(Ok(response)) => Some((Answer { response, connection }, nonce)),
                    Ok(Err(_)) => None,
                }
            }
            None => None,
        };
        let (answer, nonce) = match kept {
            Some(answer) => answer,
            None => {
                if self.within.as_ref().is_some_and(|within| !within.allows(peer.ip())) {
                    return Err(PeerError::Gone);
                }
                let connecting = timeout_at(deadline(self.limits.connect), Connection::open(peer)).await;
                let mut connection = connecting.map_err(|_| PeerError::Gone)?.map_err(|_| PeerError::Gone)?;
                let (request, nonce) = self.request(peer, path, range)?;
                match timeout_at(deadline(self.limits.first_byte), connection.send(request)).await {
                    Err(_) => return Err(PeerError::Slow),
                    Ok(Err(err)) if err.is_parse() || err.is_parse_too_large() => return Err(wrong(err.to_string())),
                    Ok(Err(_)) => return Err(PeerError::Short),
                    Ok(Ok(response)) => (Answer { response, connection }, nonce),
                }
            }
        };
        let headers = answer.response.headers();
        match answer.response.status().as_u16() {
            200 | 206 => {}
            code @ 300..=399 => return Err(wrong(format!("status {code}, which is not followed"))),
            _ => return Err(PeerError::Refused { retry_after: retry_after(headers) }),
        }
        if let (Some(auth), Some(nonce)) = (&self.auth, nonce)
            && !one(headers, AUTH_HEADER).is_ok_and(|header| header.is_some_and(|header| auth.check_reply(nonce, header)))
        {
            return Err(wrong("not signed by the fleet"));
        }
        if headers.contains_key(CONTENT_ENCODING) {
            return Err(wrong("encoded, which was not asked for"));
        }
        Ok(answer)
    }
}

impl PeerClient {
    /// The request, signed for the fleet if this client speaks for it: each time anew, since a nonce is taken once.
    fn request(&self, peer: SocketAddr, path: &str, range: &str) -> Result<(Request<Empty<Bytes>>, Option<Nonce>), PeerError> {
        let signed = self.auth.as_ref().map(|auth| auth.sign(&signed_bytes("GET", path, range), now_s()));
        self.told.say(peer, || How::Request { request: format!("GET {path} {range}").trim_end().to_owned(), is_member: signed.is_some() });
        let mut request = Request::get(path).header(HOST, peer.to_string());
        if !range.is_empty() {
            request = request.header(RANGE, range);
        }
        if let Some(signed) = &signed {
            request = request.header(AUTH_HEADER, &signed.header);
        }
        let request = request.body(Empty::new()).map_err(|err| wrong(err.to_string()))?;
        Ok((request, signed.map(|signed| signed.nonce)))
    }
}

/// Reads a body under its deadlines.
struct Timed {
    /// The deadline of the next read before anything came, and the pause granted later.
    first: Option<Duration>,
    stall: Duration,
    /// When the whole must be here.
    end: Instant,
}

impl Timed {
    fn new(limits: &ClientLimits, bytes: u64) -> Self {
        let whole = Duration::from_secs(bytes / limits.rate_bytes_s_min.max(1)) + limits.first_byte + limits.stall;
        Self { first: Some(limits.first_byte), stall: limits.stall, end: Instant::now() + whole }
    }

    /// The next bytes; `None` at the end.
    async fn next(&mut self, response: &mut Response<Incoming>) -> Result<Option<Bytes>, PeerError> {
        loop {
            let pause = self.first.take().unwrap_or(self.stall);
            let deadline = self.end.min(Instant::now() + pause);
            let frame = timeout_at(deadline, response.body_mut().frame()).await.map_err(|_| PeerError::Slow)?;
            match frame {
                None => return Ok(None),
                Some(Err(_)) => return Err(PeerError::Short),
                // Trailers are passed over.
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(bytes) => return Ok(Some(bytes)),
                    Err(_) => continue,
                },
            }
        }
    }
}

/// Whether the header of an answer fits the piece `start..end` of a file of `size` bytes.
fn judge_piece(response: &Response<Incoming>, start: u64, end: u64, size: u64, whole: bool) -> Result<(), PeerError> {
    let headers = response.headers();
    match response.status() {
        StatusCode::OK if whole => {}
        StatusCode::OK => return Err(wrong("the whole file to a Range")),
        _ => {
            let want = format!("bytes {start}-{}/{size}", end - 1);
            match one(headers, CONTENT_RANGE)? {
                Some(range) if range.trim().eq_ignore_ascii_case(&want) => {}
                Some(range) => return Err(wrong(format!("{range} instead of {want}"))),
                None => return Err(wrong("a range without Content-Range")),
            }
        }
    }
    match content_length(headers)? {
        Some(len) if len == end - start => Ok(()),
        // Whoever promises less has less, and whoever promises more has another file.
        Some(len) if len < end - start => Err(PeerError::Short),
        Some(len) => Err(wrong(format!("{len} bytes instead of {}", end - start))),
        None if headers.contains_key(TRANSFER_ENCODING) => Ok(()),
        None => Err(wrong("an answer without a length")),
    }
}

/// The value of a header that may come once.
fn one(headers: &HeaderMap, name: impl Into<HeaderNameOf>) -> Result<Option<&str>, PeerError> {
    let name = name.into().0;
    let mut values = headers.get_all(&name).iter();
    let value = values.next().map(|value| value.to_str().map_err(|_| wrong(format!("{name} is no text")))).transpose()?;
    if values.next().is_some() { Err(wrong(format!("two of {name}"))) } else { Ok(value) }
}

/// A header's name in either form that the constants have.
struct HeaderNameOf(HeaderName);

impl From<HeaderName> for HeaderNameOf {
    fn from(name: HeaderName) -> Self {
        Self(name)
    }
}

impl From<&'static str> for HeaderNameOf {
    fn from(name: &'static str) -> Self {
        Self(HeaderName::from_static(name))
    }
}

fn content_length(headers: &HeaderMap) -> Result<Option<u64>, PeerError> {
    let Some(text) = one(headers, CONTENT_LENGTH)? else { return Ok(None) };
    text.parse().map(Some).map_err(|_| wrong("a Content-Length that is no number"))
}

/// The seconds of a Retry-After; a date is as good as none.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds: u64 = headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds).min(RETRY_AFTER_MAX))
}

/// Unix seconds of this machine's clock.
pub(super) fn now_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}
