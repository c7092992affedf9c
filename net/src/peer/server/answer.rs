//! From a request to its answer.

use super::body::{Body, FileBody, Reader};
use super::range::{self, Part};
use super::{Shared, bump};
use crate::krpc::{FLAG_PARTIAL, FLAG_REACHABLE, Pv};
use crate::peer::auth::{ARRIVING_HEADER, AUTH_HEADER, signed_bytes};
use crate::peer::client::now_s;
use crate::peer::{About, Audience, Partial, Shelved};
use crate::swarm::FileShape;
use crate::swarm::bits::Bits;
use crate::swarm::piece_list::PieceList;
use crate::told::How;
use bytes::Bytes;
use hyper::body::{Body as _, Incoming};
use hyper::header::{
    ACCEPT_RANGES, ALLOW, CONNECTION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderMap, HeaderValue, IF_RANGE, RANGE,
    RETRY_AFTER,
};
use hyper::{Method, Request, Response, StatusCode};
use poolfs_core::Digest;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;

/// Characters of a path that are shown to who watches.
const SHOWN_PATH_CHARS_MAX: usize = 100;

/// Seconds after which a full server is asked again.
const RETRY_FULL_S: u32 = 1;

/// Seconds after which a server that gives nothing outside of its networks is asked again.
const RETRY_SHUT_S: u32 = 3600;

/// What a path asks for.
enum Wanted {
    File(Digest),
    Have(Digest),
    Pieces(Digest),
    About(Digest),
    Statement(Digest),
    Members,
}

impl Wanted {
    fn of(path: &str) -> Option<Self> {
        let rest = path.strip_prefix("/v1/")?;
        if rest == "members" {
            return Some(Self::Members);
        }
        let (what, digest) = rest.split_once('/')?;
        // One name for each file: upper-case digits are another path.
        let digest = digest.parse().ok().filter(|parsed: &Digest| parsed.to_string() == digest)?;
        match what {
            "file" => Some(Self::File(digest)),
            "have" => Some(Self::Have(digest)),
            "pieces" => Some(Self::Pieces(digest)),
            "about" => Some(Self::About(digest)),
            "statement" => Some(Self::Statement(digest)),
            _ => None,
        }
    }
}

/// What was found for a request. Whatever is not there or not for the asker is no value of this.
enum Found {
    Bytes(Vec<u8>),
    File(FileFound),
    Unsatisfiable(u64),
}

struct FileFound {
    reader: Reader,
    digest: Digest,
    size: u64,
    range: Range<u64>,
    /// Whether a part was asked for.
    part: bool,
    /// The first bytes of it, read and checked; none for HEAD.
    first: Bytes,
}

/// A file that is here, wholly or partly.
enum Here {
    Whole(Shelved),
    Part(Partial),
}

/// What of a request the search needs, as values that can go to another thread.
struct Question {
    wanted: Wanted,
    to: Audience,
    head: bool,
    range: Option<Vec<u8>>,
    if_range: Option<Vec<u8>>,
}

/// Answers one request, and says so to who watches.
pub(super) async fn answer_telling(shared: &Arc<Shared>, near: bool, peer: SocketAddr, request: Request<Incoming>) -> Response<Body> {
    let range = request.headers().get(RANGE).map_or("", |range| range.to_str().unwrap_or("range?"));
    // The path is the asker's text: as much of it as a path of ours has.
    let path: String = request.uri().path().chars().take(SHOWN_PATH_CHARS_MAX).collect();
    let asked = format!("{} {path} {range}", request.method()).trim_end().to_owned();
    let response = answer(shared, near, request).await;
    shared.told.say(peer, || How::Answer {
        request: asked,
        status: response.status().as_u16(),
        bytes: response.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok()),
        is_member: response.headers().contains_key(AUTH_HEADER),
    });
    response
}

/// Answers one request. What goes wrong on the way is an answer too.
async fn answer(shared: &Arc<Shared>, near: bool, request: Request<Incoming>) -> Response<Body> {
    // Nothing asked here has a body, and none is read: the connection ends with the answer.
    if !request.body().is_end_stream() {
        let mut response = plain(StatusCode::BAD_REQUEST, "a request has no body\n");
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        return response;
    }
    let head = match *request.method() {
        Method::GET => false,
        Method::HEAD => true,
        _ => {
            let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
    };
    if !near && shared.bucket.is_shut() {
        bump(&shared.counts.refused);
        return busy(RETRY_SHUT_S);
    }
    let slots = if near { &shared.slots_near } else { &shared.slots };
    let Ok(slot) = Arc::clone(slots).try_acquire_owned() else {
        bump(&shared.counts.refused);
        return busy(RETRY_FULL_S);
    };
    let signed = audience(shared, &request);
    let to = if signed.is_some() { Audience::Fleet } else { Audience::Stranger };
    let value = |name| request.headers().get(name).map(|value: &HeaderValue| value.as_bytes().to_vec());
    let question =
        Wanted::of(request.uri().path()).map(|wanted| Question { wanted, to, head, range: value(RANGE), if_range: value(IF_RANGE) });
    let searching = Arc::clone(shared);
    // The slot goes along: a disk that hangs takes slots, and not one thread after the other.
    let search = tokio::task::spawn_blocking(move || (question.and_then(|question| find(&searching, &question)), slot));
    let mut response = match tokio::time::timeout(shared.limits.find, search).await {
        Ok(Ok((Some(found), slot))) => {
            bump(&shared.counts.answered);
            respond(shared, near, head, found, slot)
        }
        Ok(Ok((None, _))) => {
            bump(&shared.counts.not_found);
            plain(StatusCode::NOT_FOUND, "not found\n")
        }
        Ok(Err(err)) => {
            tracing::error!(%err, "a search for a peer's request ended badly");
            plain(StatusCode::INTERNAL_SERVER_ERROR, "internal error\n")
        }
        Err(_) => {
            bump(&shared.counts.refused);
            busy(RETRY_FULL_S)
        }
    };
    if head && let Body::Full(bytes) = response.body_mut() {
        *bytes = None;
    }
    if let Some(signed) = signed {
        response.headers_mut().insert(AUTH_HEADER, signed);
    }
    response
}

/// The header of the answer to a member of the fleet; `None` for everybody else.
fn audience(shared: &Shared, request: &Request<Incoming>) -> Option<HeaderValue> {
    let auth = shared.auth.as_ref()?;
    let text = |name: &str| request.headers().get(name).map(|value| value.to_str().ok());
    let header = text(AUTH_HEADER)??;
    let range = match text(RANGE.as_str()) {
        None => "",
        Some(range) => range?,
    };
    let signed = signed_bytes(request.method().as_str(), request.uri().path(), range);
    HeaderValue::try_from(auth.check(&signed, header, now_s())?).ok()
}

/// Looks for what is asked. Runs where it may block; `None` is the one answer for everything that cannot be had.
fn find(shared: &Shared, question: &Question) -> Option<Found> {
    let here = |digest: &Digest| {
        let whole = shared.shelf.find(digest, question.to);
        let part = shared.partials.get(digest, question.to);
        whole.map(Here::Whole).or(part.map(Here::Part))
    };
    match &question.wanted {
        Wanted::File(digest) => find_file(shared, question, digest, here(digest)?),
        Wanted::Have(digest) => Some(Found::Bytes(match here(digest)? {
            Here::Whole(shelved) => Bits::all(FileShape::of(*digest, shelved.sums.size).pieces()).as_bytes().to_vec(),
            Here::Part(partial) => partial.have.as_bytes().to_vec(),
        })),
        Wanted::Pieces(digest) => Some(Found::Bytes(match here(digest)? {
            Here::Whole(shelved) => {
                let shape = FileShape::of(*digest, shelved.sums.size);
                let pieces = if shape.pieces() == 1 { vec![*digest] } else { shelved.sums.pieces.clone() };
                let key = shared.key.borrow().clone();
                PieceList::sign(&shape, pieces, &key, now_s()).encode(&shape)
            }
            // Somebody else's word, passed on as it is: this node has not seen the whole file.
            Here::Part(partial) => partial.list.encode(&partial.shape),
        })),
        Wanted::About(digest) => {
            let partial = matches!(here(digest)?, Here::Part(_));
            let (deltas, claims) = shared.facts.deltas(digest).into_iter().unzip();
            let flags = if partial { FLAG_PARTIAL } else { 0 } | if shared.facts.reachable() { FLAG_REACHABLE } else { 0 };
            let pv = Pv { key: shared.key.borrow().verifying_key().to_bytes(), flags, deltas };
            Some(Found::Bytes(About { pv, claims }.encode()))
        }
        Wanted::Statement(id) => shared.facts.proof(id).map(Found::Bytes),
        Wanted::Members => match (question.to, &shared.auth) {
            (Audience::Fleet, Some(auth)) => Some(Found::Bytes(auth.members())),
            _ => None,
        },
    }
}

fn find_file(shared: &Shared, question: &Question, digest: &Digest, here: Here) -> Option<Found> {
    let (reader, size) = match here {
        Here::Whole(shelved) => {
            let size = shelved.sums.size;
            (Reader::Whole { shelved, digest: *digest, shelf: Arc::clone(&shared.shelf) }, size)
        }
        Here::Part(partial) => {
            let size = partial.shape.size;
            (Reader::Part(partial), size)
        }
    };
    // A range of another version's bytes is of no use: then all of this one (RFC 9110, 13.1.5).
    let same = question.if_range.as_ref().is_none_or(|tag| tag.as_slice() == etag(digest).as_bytes());
    let asked = range::parse(question.range.as_deref().filter(|_| same), size);
    let (range, part) = match asked {
        Part::Whole => (0..size, false),
        Part::Bytes(range) => (range, true),
        Part::Unsatisfiable => return Some(Found::Unsatisfiable(size)),
    };
    if let Reader::Part(partial) = &reader
        && !has_all(partial, &range)
    {
        return None;
    }
    let first = if question.head || range.is_empty() {
        Bytes::new()
    } else {
        match reader.read(&range) {
            Ok(first) => first,
            Err(err) => {
                bump(&shared.counts.damaged);
                tracing::debug!(%digest, %err, "not given");
                return None;
            }
        }
    };
    Some(Found::File(FileFound { reader, digest: *digest, size, range, part, first }))
}

/// Whether every piece that holds some of `range` is here.
fn has_all(partial: &Partial, range: &Range<u64>) -> bool {
    let shape = &partial.shape;
    poolfs_core::piece::covering(range.clone(), shape.size, shape.piece_bytes)
        .all(|index| u32::try_from(index).is_ok_and(|index| partial.have.has(index)))
}

fn etag(digest: &Digest) -> String {
    format!("\"{digest}\"")
}

fn respond(shared: &Shared, near: bool, head: bool, found: Found, slot: tokio::sync::OwnedSemaphorePermit) -> Response<Body> {
    let FileFound { reader, digest, size, range, part, first } = match found {
        Found::Bytes(bytes) => return with_bytes(StatusCode::OK, "application/octet-stream", bytes.into()),
        Found::Unsatisfiable(size) => {
            let mut response = plain(StatusCode::RANGE_NOT_SATISFIABLE, "no such bytes\n");
            put(response.headers_mut(), CONTENT_RANGE, format!("bytes */{size}"));
            return response;
        }
        Found::File(found) => found,
    };
    let len = range.end - range.start;
    let arriving = matches!(reader, Reader::Part(_));
    let status = if part { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
    let content_range = format!("bytes {}-{}/{size}", range.start, range.end.saturating_sub(1));
    let body = match head || len == 0 {
        true => Body::Full(None),
        false => {
            let bucket = (!near).then(|| Arc::clone(&shared.bucket));
            Body::File(Box::new(FileBody::new(reader, range, first, bucket, Arc::clone(&shared.counts), slot)))
        }
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers.insert(CONTENT_LENGTH, len.into());
    put(headers, ETAG, etag(&digest));
    if arriving {
        headers.insert(ARRIVING_HEADER, HeaderValue::from_static("1"));
    }
    if part {
        put(headers, CONTENT_RANGE, content_range);
    }
    response
}

fn put(headers: &mut HeaderMap, name: hyper::header::HeaderName, value: String) {
    headers.insert(name, HeaderValue::try_from(value).expect("digits, digests and punctuation"));
}

fn busy(after_s: u32) -> Response<Body> {
    let mut response = plain(StatusCode::SERVICE_UNAVAILABLE, "busy\n");
    response.headers_mut().insert(RETRY_AFTER, after_s.into());
    response
}

fn plain(status: StatusCode, text: &'static str) -> Response<Body> {
    with_bytes(status, "text/plain", Bytes::from_static(text.as_bytes()))
}

fn with_bytes(status: StatusCode, kind: &'static str, bytes: Bytes) -> Response<Body> {
    let mut response = Response::new(Body::Full(None));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response.headers_mut().insert(CONTENT_LENGTH, bytes.len().into());
    *response.body_mut() = Body::Full(Some(bytes));
    response
}
