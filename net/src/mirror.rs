//! The mirror client: pieces of one file from HTTP origins.
//!
//! Contiguous missing pieces are one Range request, a whole missing file is a plain GET. The body is cut at piece borders as
//! it streams in: each piece goes into a memfd, is sealed and handed over; at most one unfinished piece is held here, and who
//! takes the pieces slowly slows the connection down. Nothing is believed of the bytes; status, Content-Range and lengths
//! have to fit the index before the first of them is taken.
//!
//! **Invariants.** A URL that contradicts the index is out for this file; nothing waits without a limit ([`MirrorLimits`]);
//! https never becomes http; user names, passwords and queries of URLs are in no error and no log line; no environment
//! variable is read (which proxy is used is part of each [`MirrorUrl`]).
//!
//! Runs on the caller's tokio runtime; dropping the future of [`Mirror::fetch`] ends its requests.

mod answer;
mod document;
mod doubt;
mod pace;
mod ranged;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod testserver;

pub use ranged::{RangeError, RangedFile};

use crate::memfd::{PieceMemory, SealedPiece};
use answer::{Asked, Body};
use doubt::Doubts;
use pace::Pace;
use parking_lot::Mutex;
use poolfs_core::Digest;
use poolfs_core::catalog::MirrorUrl;
use poolfs_core::piece::{self, PIECE_BYTES};
use reqwest::header::{ACCEPT_ENCODING, CACHE_CONTROL, HeaderValue, IF_RANGE, LOCATION, RANGE};
use reqwest::{Client, Response, StatusCode, Url};
use std::collections::{BTreeSet, HashMap};
use std::error::Error;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

/// URLs tried for one file; the rest of a longer list is not looked at.
const URLS_MAX: usize = 8;

/// Redirects followed for one request.
const REDIRECTS_MAX: u32 = 5;

/// Clients kept, one per proxy; more distinct proxies than that start the table afresh.
const CLIENTS_MAX: usize = 16;

/// Idle connections kept per host.
const IDLE_CONNECTIONS_MAX: usize = 4;

/// Seconds that an idle connection is kept.
const IDLE_CONNECTION_S: u64 = 30;

/// The proxies that apt knows too.
const PROXY_SCHEMES: [&str; 3] = ["http", "https", "socks5h"];

/// Bytes of a redirect's `Location` that are looked at.
const LOCATION_BYTES_MAX: usize = 8192;

/// How long and how often a mirror is waited for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorLimits {
    /// Until the connection (with proxy and TLS) stands.
    pub connect: Duration,
    /// From the standing connection to the answer's header.
    pub first_byte: Duration,
    /// Between two reads of the body.
    pub stall: Duration,
    /// The span over which the rate is judged; only time spent waiting for the mirror counts.
    pub rate_window: Duration,
    /// Below this many bytes a second over [`Self::rate_window`] the mirror is too slow.
    pub rate_bytes_s_min: u64,
    /// Broken connections after which the same URL is asked to go on, per file.
    pub breaks_max: u32,
    /// Bytes after which one more broken connection is forgiven: a large file may cross several.
    pub forgive_after_bytes: u64,
}

impl Default for MirrorLimits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(8),
            first_byte: Duration::from_secs(15),
            stall: Duration::from_secs(10),
            rate_window: Duration::from_secs(10),
            rate_bytes_s_min: 2048,
            breaks_max: 1,
            forgive_after_bytes: 32 * 1024 * 1024,
        }
    }
}

/// A file wanted from mirrors.
#[derive(Clone, Debug)]
pub struct MirrorFile {
    /// What the signed index says of it; names it in the memory of wrong bytes.
    pub digest: Digest,
    /// Its length in bytes, from the same index.
    pub size: u64,
    /// Where to ask, best first.
    pub urls: Vec<MirrorUrl>,
    /// The pieces wanted, ascending, of [`PIECE_BYTES`].
    pub missing: Vec<u32>,
}

/// One piece as a mirror gave it.
#[derive(Debug)]
pub struct MirrorPiece {
    /// Which piece.
    pub index: u32,
    /// A memfd sealed against writing, growing and shrinking, holding exactly the piece.
    pub bytes: OwnedFd,
    /// The mirror's host name.
    pub host: String,
}

/// Why a mirror delivered less than it was asked for, by what the asker does next. `why` holds no credentials.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MirrorError {
    /// No URL has these bytes: asking again soon is of no use.
    #[error("no mirror has it: {why}")]
    Nowhere {
        /// Each URL's answer, for people.
        why: String,
    },
    /// At least one URL could not be reached, broke off or was too slow: it may work later.
    #[error("no mirror delivers it now: {why}")]
    NotNow {
        /// Each URL's answer, for people.
        why: String,
    },
    /// Nobody takes the pieces any more.
    #[error("nobody waits for it any more")]
    Unwanted,
}

/// What the mirror client has done since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MirrorCounters {
    /// Requests sent, redirects and retries included.
    pub requests: u64,
    /// Redirects followed.
    pub redirects: u64,
    /// Redirects from https to http, or one too many, refused.
    pub redirects_refused: u64,
    /// Connections that broke while an answer came in.
    pub breaks: u64,
    /// Bytes of bodies read, wasted ones included.
    pub bytes: u64,
}

#[derive(Debug, Default)]
struct Counts {
    requests: AtomicU64,
    redirects: AtomicU64,
    redirects_refused: AtomicU64,
    breaks: AtomicU64,
    bytes: AtomicU64,
}

/// The mirror client; one per process, shared by all downloads.
#[derive(Debug)]
pub struct Mirror {
    limits: MirrorLimits,
    /// By proxy. Held only to look up or insert.
    clients: Mutex<HashMap<Option<String>, Client>>,
    tls: OnceLock<rustls::ClientConfig>,
    doubts: Mutex<Doubts>,
    counts: Counts,
}

/// What became of one URL.
#[derive(Debug)]
enum Failure {
    /// It does not have this file: the next URL.
    Out(String),
    /// It answers a Range with the whole file: the next URL, and this one again for the whole file if no other is left.
    NoRanges(String),
    /// It cannot be reached, is overloaded or too slow: the next URL, and later perhaps again.
    Unwell(String),
    /// The connection broke: once more where it was.
    Broken(String),
    /// The receiver is gone.
    Unwanted,
}

/// The pieces still missing, and whom they go to.
struct Job<'a, T, F> {
    file: &'a MirrorFile,
    missing: BTreeSet<u32>,
    out: &'a mpsc::Sender<T>,
    wrap: F,
}

/// What is known of one URL while it is asked.
struct Asking<'a> {
    url: &'a MirrorUrl,
    host: String,
    client: Client,
    /// Strong validator of the first answer: later ranges must be of the same bytes.
    validator: Option<HeaderValue>,
    /// The piece that is not complete yet, kept when a connection breaks.
    unfinished: Option<PieceMemory>,
    breaks_left: u32,
    bytes_since_break: u64,
    fresh: bool,
}

impl Mirror {
    /// A client with these limits. Certificates are read at the first request.
    pub fn new(limits: MirrorLimits) -> Self {
        Self {
            limits,
            clients: Mutex::new(HashMap::new()),
            tls: OnceLock::new(),
            doubts: Mutex::new(Doubts::default()),
            counts: Counts::default(),
        }
    }

    /// Fetches the missing pieces of `file` from its URLs in turn and sends each, wrapped, to `out`.
    ///
    /// Ends when all were sent, when no URL is left, or with [`MirrorError::Unwanted`] when `out` has no receiver any more.
    /// Pieces come in ascending order from one URL, in any order over several.
    pub async fn fetch<T, F>(&self, file: &MirrorFile, out: &mpsc::Sender<T>, wrap: F) -> Result<(), MirrorError>
    where
        T: Send,
        F: Fn(MirrorPiece) -> T + Send,
    {
        let pieces = piece::count(file.size, PIECE_BYTES);
        let missing = file.missing.iter().copied().filter(|index| u64::from(*index) < pieces).collect();
        let mut job = Job { file, missing, out, wrap };
        tokio::select! {
            biased;
            () = out.closed() => Err(MirrorError::Unwanted),
            result = self.ask_all(&mut job) => result,
        }
    }

    /// What the bytes delivered for `digest` turned out to be. After wrong ones the URLs that gave them are asked last, and
    /// past any cache on the way.
    pub fn verdict(&self, digest: &Digest, right: bool) {
        self.doubts.lock().verdict(digest, right);
    }

    /// What was done since the start.
    pub fn counters(&self) -> MirrorCounters {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        MirrorCounters {
            requests: get(&self.counts.requests),
            redirects: get(&self.counts.redirects),
            redirects_refused: get(&self.counts.redirects_refused),
            breaks: get(&self.counts.breaks),
            bytes: get(&self.counts.bytes),
        }
    }

    async fn ask_all<T: Send, F: Fn(MirrorPiece) -> T + Send>(&self, job: &mut Job<'_, T, F>) -> Result<(), MirrorError> {
        let mut urls: Vec<&MirrorUrl> = job.file.urls.iter().take(URLS_MAX).collect();
        urls.sort_by_cached_key(|url| self.doubts.lock().doubted(&job.file.digest, &url.url));
        let mut answers = Vec::new();
        let mut later = false;
        let mut without_ranges = None;
        for url in urls {
            if job.missing.is_empty() {
                break;
            }
            match self.ask(job, url, false).await {
                Ok(()) => {}
                Err(Failure::Unwanted) => return Err(MirrorError::Unwanted),
                Err(Failure::NoRanges(why)) => {
                    without_ranges.get_or_insert(url);
                    answers.push(why);
                }
                Err(Failure::Out(why)) => answers.push(why),
                Err(Failure::Unwell(why) | Failure::Broken(why)) => {
                    later = true;
                    answers.push(why);
                }
            }
        }
        // The last resort: a mirror that knows no ranges gives the file from its start, and what is here already is passed over.
        if let Some(url) = without_ranges
            && !job.missing.is_empty()
        {
            match self.ask(job, url, true).await {
                Ok(()) => {}
                Err(Failure::Unwanted) => return Err(MirrorError::Unwanted),
                Err(Failure::NoRanges(why) | Failure::Out(why)) => answers.push(why),
                Err(Failure::Unwell(why) | Failure::Broken(why)) => {
                    later = true;
                    answers.push(why);
                }
            }
        }
        if job.missing.is_empty() {
            return Ok(());
        }
        let why = if answers.is_empty() { "no URL is known".to_owned() } else { answers.join("; ") };
        Err(if later { MirrorError::NotNow { why } } else { MirrorError::Nowhere { why } })
    }

    async fn ask<T: Send, F: Fn(MirrorPiece) -> T + Send>(
        &self,
        job: &mut Job<'_, T, F>,
        url: &MirrorUrl,
        whole: bool,
    ) -> Result<(), Failure> {
        let host = host_of(&url.url);
        let client = self.client(url.proxy.as_deref()).map_err(|why| Failure::Out(format!("{host}: {why}")))?;
        let mut asking = Asking {
            url,
            host,
            client,
            validator: None,
            unfinished: None,
            breaks_left: self.limits.breaks_max,
            bytes_since_break: 0,
            fresh: self.doubts.lock().doubted(&job.file.digest, &url.url),
        };
        while let Some(asked) = job.next(whole, asking.unfinished.as_ref()) {
            match self.one_answer(job, &mut asking, asked).await {
                Ok(()) => {}
                Err(Failure::Broken(why)) => {
                    self.counts.breaks.fetch_add(1, Ordering::Relaxed);
                    if asking.breaks_left == 0 {
                        return Err(Failure::Broken(format!("{}: {why}", asking.host)));
                    }
                    tracing::debug!(host = %asking.host, digest = %job.file.digest, why, "connection broke, going on where it was");
                    asking.breaks_left -= 1;
                    asking.bytes_since_break = 0;
                    if !url.immutable && asking.validator.is_none() {
                        asking.unfinished = None; // Half a piece of bytes that may have changed since.
                    }
                }
                Err(Failure::Out(why)) => return Err(Failure::Out(format!("{}: {why}", asking.host))),
                Err(Failure::NoRanges(why)) => return Err(Failure::NoRanges(format!("{}: {why}", asking.host))),
                Err(Failure::Unwell(why)) => return Err(Failure::Unwell(format!("{}: {why}", asking.host))),
                Err(Failure::Unwanted) => return Err(Failure::Unwanted),
            }
        }
        Ok(())
    }

    /// Sends one request and takes from its answer what is missing.
    async fn one_answer<T: Send, F: Fn(MirrorPiece) -> T + Send>(
        &self,
        job: &mut Job<'_, T, F>,
        asking: &mut Asking<'_>,
        asked: Asked,
    ) -> Result<(), Failure> {
        let response = self.send(asking, &asked).await?;
        let body = answer::judge(response.status(), response.headers(), &asked, asking.validator.as_ref())?;
        if !asking.url.immutable && asking.validator.is_none() {
            asking.validator = answer::validator(response.headers());
        }
        self.doubts.lock().gave(&job.file.digest, &asking.url.url);
        self.take_body(job, asking, response, body).await
    }

    async fn take_body<T: Send, F: Fn(MirrorPiece) -> T + Send>(
        &self,
        job: &mut Job<'_, T, F>,
        asking: &mut Asking<'_>,
        mut response: Response,
        body: Body,
    ) -> Result<(), Failure> {
        let mut offset = body.start;
        let mut unfinished = asking.unfinished.take().filter(|unfinished| unfinished.next_offset() == offset);
        let mut pace = Pace::new(self.limits.rate_window, self.limits.rate_bytes_s_min);
        let result = loop {
            // Past the last missing piece of this body nothing more is read, and the connection is closed.
            if !job.wants_from(offset, body.end) {
                break Ok(());
            }
            let started = Instant::now();
            let mut chunk = match timeout(self.limits.stall, response.chunk()).await {
                Err(_) => break Err(Failure::Unwell(format!("nothing came for {} s", self.limits.stall.as_secs_f32()))),
                Ok(Err(err)) => break Err(Failure::Broken(chain(err))),
                Ok(Ok(None)) => break Err(Failure::Broken(format!("the answer ended at byte {offset} of {}", job.file.size))),
                Ok(Ok(Some(chunk))) => chunk,
            };
            let came = chunk.len() as u64;
            self.counts.bytes.fetch_add(came, Ordering::Relaxed);
            asking.bytes_since_break += came;
            if asking.bytes_since_break >= self.limits.forgive_after_bytes {
                asking.breaks_left = self.limits.breaks_max;
            }
            while !chunk.is_empty() && offset < body.end {
                let index = offset / u64::from(PIECE_BYTES);
                let span = piece::span(index, job.file.size, PIECE_BYTES);
                let part = chunk.split_to(chunk.len().min(usize::try_from(span.end - offset).unwrap_or(usize::MAX)));
                let index = u32::try_from(index).expect("pieces of a job are counted in u32");
                if job.missing.contains(&index) {
                    let memory = match unfinished.take() {
                        Some(memory) => Ok(memory),
                        None => PieceMemory::new(index, &span),
                    };
                    match memory.and_then(|memory| memory.take(&part)) {
                        Err(err) => return Err(Failure::Unwell(format!("no memory for a piece: {err}"))),
                        Ok(SealedPiece::NotYet(memory)) => unfinished = Some(memory),
                        Ok(SealedPiece::Done(bytes)) => {
                            let piece = MirrorPiece { index, bytes, host: asking.host.clone() };
                            job.out.send((job.wrap)(piece)).await.map_err(|_| Failure::Unwanted)?;
                            job.missing.remove(&index);
                        }
                    }
                }
                offset += part.len() as u64;
            }
            if pace.too_slow(started.elapsed(), came) {
                break Err(Failure::Unwell(format!("slower than {} bytes a second", self.limits.rate_bytes_s_min)));
            }
        };
        asking.unfinished = unfinished;
        result
    }

    /// Sends the request and follows redirects, up to the header of the answer that counts.
    async fn send(&self, asking: &Asking<'_>, asked: &Asked) -> Result<Response, Failure> {
        let mut url = Url::parse(&asking.url.url).map_err(|err| Failure::Out(format!("bad URL: {err}")))?;
        for _ in 0..=REDIRECTS_MAX {
            if !matches!(url.scheme(), "http" | "https") {
                return Err(Failure::Out(format!("cannot fetch {}: URLs", url.scheme())));
            }
            let mut request = asking.client.get(url.clone()).header(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
            if let Some(range) = asked.range_header() {
                request = request.header(RANGE, range);
                if let Some(validator) = &asking.validator {
                    request = request.header(IF_RANGE, validator);
                }
            }
            if asking.fresh {
                request = request.header(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
            }
            self.counts.requests.fetch_add(1, Ordering::Relaxed);
            let response = match timeout(self.limits.connect + self.limits.first_byte, request.send()).await {
                Err(_) => return Err(Failure::Unwell(format!("no answer in {} s", self.limits.first_byte.as_secs_f32()))),
                Ok(Err(err)) if err.is_connect() || err.is_timeout() => return Err(Failure::Unwell(chain(err))),
                Ok(Err(err)) if err.is_builder() => return Err(Failure::Out(chain(err))),
                Ok(Err(err)) => return Err(Failure::Broken(chain(err))),
                Ok(Ok(response)) => response,
            };
            if !is_redirect(response.status()) {
                return Ok(response);
            }
            url = self.redirected(&url, response.status(), response.headers().get(LOCATION))?;
        }
        self.counts.redirects_refused.fetch_add(1, Ordering::Relaxed);
        Err(Failure::Out(format!("more than {REDIRECTS_MAX} redirects")))
    }

    fn redirected(&self, from: &Url, status: StatusCode, location: Option<&HeaderValue>) -> Result<Url, Failure> {
        let to = location
            .and_then(|location| location.to_str().ok())
            .filter(|location| location.len() <= LOCATION_BYTES_MAX)
            .and_then(|location| from.join(location).ok());
        let Some(mut to) = to else {
            return Err(Failure::Out(format!("answered {} without a usable Location", status.as_u16())));
        };
        if from.scheme() == "https" && to.scheme() != "https" {
            self.counts.redirects_refused.fetch_add(1, Ordering::Relaxed);
            return Err(Failure::Out("redirects from https to http, which is refused".to_owned()));
        }
        // Credentials go on to the same origin only.
        if to.origin() == from.origin() && to.username().is_empty() {
            let _ = to.set_username(from.username()); // Fails only for URLs without a host, which `from` has.
            let _ = to.set_password(from.password());
        }
        self.counts.redirects.fetch_add(1, Ordering::Relaxed);
        Ok(to)
    }

    fn client(&self, proxy: Option<&str>) -> Result<Client, String> {
        let key = proxy.map(str::to_owned);
        if let Some(client) = self.clients.lock().get(&key) {
            return Ok(client.clone());
        }
        let mut builder = Client::builder()
            .user_agent(concat!("poolfs/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .connect_timeout(self.limits.connect)
            .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
            .pool_idle_timeout(Duration::from_secs(IDLE_CONNECTION_S))
            .tls_backend_preconfigured(self.tls().clone())
            .no_proxy();
        if let Some(proxy) = proxy {
            // The proxy's URL may hold a password: only the kind of error is told.
            let unusable = "its proxy is no http, https or socks5h URL; check Acquire::http::Proxy";
            let parsed = Url::parse(proxy).map_err(|_| unusable)?;
            // A scheme that reqwest does not know would be passed over in silence, and the mirror asked directly.
            if !PROXY_SCHEMES.contains(&parsed.scheme()) {
                return Err(unusable.to_owned());
            }
            builder = builder.proxy(reqwest::Proxy::all(parsed).map_err(|_| unusable)?);
        }
        let client = builder.build().map_err(chain)?;
        let mut clients = self.clients.lock();
        if clients.len() >= CLIENTS_MAX {
            clients.clear();
        }
        clients.insert(key, client.clone());
        Ok(client)
    }

    /// The machine's certificates with ring as provider, named here so that it depends on no process-wide default. A
    /// machine without certificates has http mirrors only, as with apt.
    fn tls(&self) -> &rustls::ClientConfig {
        self.tls.get_or_init(|| {
            let mut roots = rustls::RootCertStore::empty();
            let found = rustls_native_certs::load_native_certs();
            let (taken, refused) = roots.add_parsable_certificates(found.certs);
            if taken == 0 {
                tracing::warn!(refused, "no certificates found, so https mirrors cannot be used; install ca-certificates");
            }
            rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .expect("ring supports the default TLS versions")
                .with_root_certificates(roots)
                .with_no_client_auth()
        })
    }
}

impl<T, F> Job<'_, T, F> {
    /// The next bytes to ask for: the first contiguous run of missing pieces, from where an unfinished piece of it ends; or
    /// the whole file.
    fn next(&self, whole: bool, unfinished: Option<&PieceMemory>) -> Option<Asked> {
        let size = self.file.size;
        let first = *self.missing.first()?;
        if whole {
            return Some(Asked { start: 0, end: size, size });
        }
        let run = self.missing.iter().zip(first..).take_while(|(have, expected)| **have == *expected).count();
        let last = u64::from(first) + run as u64 - 1;
        let start = match unfinished {
            Some(unfinished) if unfinished.index() == first => unfinished.next_offset(),
            _ => piece::span(first.into(), size, PIECE_BYTES).start,
        };
        Some(Asked { start, end: piece::span(last, size, PIECE_BYTES).end, size })
    }

    /// Whether a byte of `offset..end` belongs to a missing piece.
    fn wants_from(&self, offset: u64, end: u64) -> bool {
        let pieces = piece::covering(offset..end, self.file.size, PIECE_BYTES);
        let narrow = |index: u64| u32::try_from(index).unwrap_or(u32::MAX);
        self.missing.range(narrow(pieces.start)..narrow(pieces.end)).next().is_some()
    }
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// The host of a URL, for people and for [`MirrorPiece::host`].
fn host_of(url: &str) -> String {
    Url::parse(url).ok().and_then(|url| url.host_str().map(str::to_owned)).unwrap_or_else(|| "bad URL".to_owned())
}

/// An error with its causes on one line, without the URL, which may hold a password.
fn chain(err: reqwest::Error) -> String {
    let err = err.without_url();
    let mut text = err.to_string();
    let mut cause = err.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}
