//! The status page, the metrics, and whether the daemon is well, over HTTP on loopback.
//!
//! It shows [`Facts`], plain values, and reaches nothing else of the daemon. Every local user may read it, and every page that a
//! local browser shows may try to: so there is nothing secret on it, nothing that a request could change, and an answer only
//! to who asked for this machine by a name that no stranger's DNS can lead here.

mod chart;
mod metrics;
mod page;

use crate::facts::{Facts, Witness};
use anyhow::{Context as _, Result};
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body as _, Incoming};
use hyper::header::{self, HeaderValue};
use hyper::server::conn::http1::Builder;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinSet;

/// Connections at once; further ones are closed.
const CONNECTIONS_MAX: usize = 32;

/// A connection is closed when it is this old: a browser opens the next.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(120);

/// Until a request's header is complete; also how long an idle connection is kept.
const HEADER_PATIENCE: Duration = Duration::from_secs(15);

/// Bytes of a request's header.
const HEADER_BYTES_MAX: usize = 16 * 1024;

/// Headers of a request.
const HEADERS_MAX: usize = 64;

/// Facts are gathered at most this often, whoever asks.
const FACTS_KEPT: Duration = Duration::from_millis(500);

/// Until the facts are gathered.
const FACTS_PATIENCE: Duration = Duration::from_secs(10);

/// Pause after the system would not give a connection (too many open files).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the page may do in a browser: nothing but show itself and ask this server again.
const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const STYLE: &str = include_str!("web/style.css");
const SCRIPT: &str = include_str!("web/live.js");
const ICON: &str = include_str!("web/icon.svg");

/// A running server; dropping it closes all its connections.
#[derive(Debug)]
pub struct Web {
    local: SocketAddr,
    _tasks: JoinSet<()>,
}

struct Shared {
    witness: Arc<dyn Witness>,
    /// Gathered lately. Held while they are gathered: who asks meanwhile gets the same.
    kept: Mutex<Option<(Instant, Arc<Facts>)>>,
    connections: Arc<Semaphore>,
}

/// Listens at `address`, one of loopback. To be done before the process gives up the network, which leaves it what is open.
pub fn listen(address: SocketAddr) -> Result<std::net::TcpListener> {
    let bound = || format!("listen at {address}: another program has this port, end it or choose another status.listen");
    std::net::TcpListener::bind(address).with_context(bound)
}

impl Web {
    /// Shows who comes to `listener` what `witness` knows. On the runtime of the caller.
    pub fn start(listener: std::net::TcpListener, witness: Arc<dyn Witness>) -> Result<Self> {
        listener.set_nonblocking(true)?;
        let local = listener.local_addr()?;
        let shared = Shared { witness, kept: Mutex::default(), connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)) };
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(TcpListener::from_std(listener)?, Arc::new(shared)));
        Ok(Self { local, _tasks: tasks })
    }

    /// Where it listens.
    pub fn local(&self) -> SocketAddr {
        self.local
    }
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
            Ok((stream, _)) => {
                // Who finds no room sees a closed connection.
                let Ok(seat) = Arc::clone(&shared.connections).try_acquire_owned() else { continue };
                let shared = Arc::clone(&shared);
                connections.spawn(async move {
                    if tokio::time::timeout(CONNECTION_AGE_MAX, serve(stream, shared)).await.is_err() {
                        tracing::trace!("a connection to the status page is old and closed");
                    }
                    drop(seat);
                });
            }
            Err(err) => {
                tracing::debug!(%err, "accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    let service = service_fn(|request| {
        let shared = Arc::clone(&shared);
        async move { Ok::<_, Infallible>(answer(&shared, &request).await) }
    });
    let mut builder = Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_PATIENCE)
        .max_headers(HEADERS_MAX)
        .max_header_size(HEADER_BYTES_MAX)
        .max_buf_size(HEADER_BYTES_MAX)
        .auto_date_header(false);
    if let Err(err) = builder.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!("a connection to the status page: {err}");
    }
}

async fn answer(shared: &Shared, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let head = request.method() == Method::HEAD;
    let mut response = if !request.body().is_end_stream() {
        // It is not read: the connection ends with the answer.
        let mut response = text(StatusCode::BAD_REQUEST, "a request has no body\n");
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        response
    } else if !head && request.method() != Method::GET {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        response
    } else if !is_this_machine(request) {
        text(StatusCode::MISDIRECTED_REQUEST, "ask for this page by localhost, 127.0.0.1 or [::1]\n")
    } else {
        found(shared, request.uri().path(), request.uri().query()).await
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
        (header::HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        (header::HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    if head {
        // With the length that a GET would have.
        let length = response.body().size_hint().exact().unwrap_or_default();
        response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
        *response.body_mut() = Full::default();
    }
    response
}

/// Whether the request names a loopback address or `localhost`. A name that a stranger's DNS leads to this machine would
/// let his page in a local browser read this one.
fn is_this_machine(request: &Request<Incoming>) -> bool {
    let hosts = request.headers().get_all(header::HOST);
    let mut named = hosts.iter().map(HeaderValue::to_str);
    let (Some(Ok(host)), None) = (named.next(), named.next()) else { return false };
    request.uri().authority().is_none_or(|authority| authority.as_str() == host) && is_local_name(host)
}

/// Of `HOST` or `HOST:PORT`. A tunnel may have another port than this one.
fn is_local_name(host: &str) -> bool {
    if let Ok(address) = host.parse::<SocketAddr>() {
        return address.ip().is_loopback();
    }
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.parse::<u16>().is_ok() && !name.contains(':') => name,
        _ => host,
    };
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

async fn found(shared: &Shared, path: &str, query: Option<&str>) -> Response<Full<Bytes>> {
    match path {
        "/style.css" => return full(StatusCode::OK, "text/css; charset=utf-8", STYLE),
        "/live.js" => return full(StatusCode::OK, "text/javascript; charset=utf-8", SCRIPT),
        "/icon.svg" => return full(StatusCode::OK, "image/svg+xml", ICON),
        "/" | "/metrics" | "/facts.json" | "/health" | "/ready" => {}
        _ => return text(StatusCode::NOT_FOUND, "here are /, /metrics, /facts.json, /health and /ready\n"),
    }
    let facts = match facts(shared).await {
        Ok(facts) => facts,
        Err(err) => return text(StatusCode::SERVICE_UNAVAILABLE, format!("the daemon does not answer: {err:#}\n")),
    };
    match path {
        "/metrics" => match metrics::text(&facts) {
            Ok(text) => full(StatusCode::OK, prometheus::TEXT_FORMAT, text),
            Err(err) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{err:#}\n")),
        },
        "/facts.json" => match serde_json::to_vec(&*facts) {
            Ok(json) => full(StatusCode::OK, "application/json", json),
            Err(err) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{err}\n")),
        },
        "/health" => well(&facts.ailments()),
        "/ready" => well(&facts.unready()),
        _ => full(StatusCode::OK, "text/html; charset=utf-8", page::page(&facts, page::Span::of(query)).into_string()),
    }
}

/// 200, or 503 with what is wrong, a line each.
fn well(wrong: &[String]) -> Response<Full<Bytes>> {
    match wrong {
        [] => text(StatusCode::OK, "ok\n"),
        _ => text(StatusCode::SERVICE_UNAVAILABLE, wrong.join("\n") + "\n"),
    }
}

async fn facts(shared: &Shared) -> Result<Arc<Facts>> {
    let gather = async {
        let mut kept = shared.kept.lock().await;
        if let Some((at, facts)) = &*kept
            && at.elapsed() < FACTS_KEPT
        {
            return Ok(Arc::clone(facts));
        }
        let facts = Arc::new(Arc::clone(&shared.witness).facts().await?);
        *kept = Some((Instant::now(), Arc::clone(&facts)));
        Ok(facts)
    };
    tokio::time::timeout(FACTS_PATIENCE, gather).await.context("the facts take too long")?
}

fn text(status: StatusCode, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    full(status, "text/plain; charset=utf-8", text)
}

fn full(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stranger's name that is accepted is DNS rebinding; a way that people have to this page and is not is a page nobody sees.
    #[test]
    fn only_names_of_this_machine() {
        for good in ["localhost", "LOCALHOST:9978", "127.0.0.1", "127.0.0.1:1", "127.9.9.9:80", "[::1]", "[::1]:9978"] {
            assert!(is_local_name(good), "{good}");
        }
        for bad in [
            "",
            ":",
            "evil.example",
            "evil.example:9978",
            "localhost.evil.example",
            "localhost:x",
            "127.0.0.1.evil.example",
            "10.0.0.1",
            "[::2]:9978",
            "localhost:80:80",
            "[localhost]",
            "0.0.0.0",
        ] {
            assert!(!is_local_name(bad), "{bad}");
        }
    }
}
