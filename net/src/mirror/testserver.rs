//! An HTTP origin on loopback that is faulty on purpose.

#![allow(clippy::unwrap_used, reason = "tests")]

use parking_lot::Mutex;
use std::fmt::Write as _;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// How the server answers.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// As it should, ranges and If-Range included.
    None,
    /// This status and a page.
    Status(u16),
    /// A page of another length, with 200.
    Html,
    /// A page that happens to be of the file's length, with 200.
    HtmlOfTheSize,
    /// Announces this many bytes fewer than the file has, and sends them.
    Short(usize),
    /// Announces more bytes than the file has.
    Long(usize),
    /// The file and more, in chunks without a length.
    ChunkedLong,
    /// Redirects to itself for ever.
    RedirectLoop,
    /// Redirects there.
    RedirectTo(String),
    /// Redirects without saying where.
    RedirectNowhere,
    /// One byte, a pause, one byte.
    Drip,
    /// Announces the file and sends these bytes, then nothing for ever.
    Stall(usize),
    /// Accepts and never answers.
    Silence,
    /// Ignores Range.
    NoRanges,
    /// 206 with the range one byte off.
    WrongContentRange,
    /// 206 with another total.
    WrongTotal,
    /// After the first answer the file has other bytes and another ETag.
    ReplacedBetweenRanges,
    /// As before, but ranges of the new bytes are given without looking at If-Range.
    ReplacedAndCareless,
    /// Closes after this many bytes of a body, this many times, then behaves.
    Reset { after: usize, times: u32 },
    /// Sends the file compressed, or says so.
    Encoded,
    /// No HTTP at all.
    Garbage,
}

/// One request as the server saw it.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// The request line's target.
    pub(crate) target: String,
    /// First byte and one past the last.
    pub(crate) range: Option<Range<usize>>,
    /// All header lines, lower-case names.
    pub(crate) headers: Vec<(String, String)>,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str())
    }
}

#[derive(Debug)]
struct State {
    fault: Fault,
    file: Vec<u8>,
    etag: Option<String>,
    seen: Vec<Seen>,
    body_bytes: usize,
    resets: u32,
}

/// The server; it ends when dropped.
#[derive(Debug)]
pub(crate) struct TestServer {
    state: Arc<Mutex<State>>,
    port: u16,
    answers: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl TestServer {
    /// Serves `file` at every path.
    pub(crate) async fn start(fault: Fault, file: &[u8]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = State { fault, file: file.to_owned(), etag: None, seen: Vec::new(), body_bytes: 0, resets: 0 };
        let state = Arc::new(Mutex::new(state));
        let shared = Arc::clone(&state);
        let answers = watch::Sender::new(true);
        let may_answer = answers.subscribe();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&shared), may_answer.clone()));
            }
        });
        Self { state, port, answers, task }
    }

    /// Whether it answers; requests that come meanwhile are answered later.
    pub(crate) fn answers(&self, answers: bool) {
        self.answers.send_replace(answers);
    }

    pub(crate) fn with_etag(self, etag: &str) -> Self {
        self.state.lock().etag = Some(etag.to_owned());
        self
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}/pool/file.deb", self.port)
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.state.lock().seen.clone()
    }

    /// Bytes of bodies sent.
    pub(crate) fn body_bytes(&self) -> usize {
        self.state.lock().body_bytes
    }
}

/// A URL on which nothing listens.
pub(crate) async fn closed_port_url() -> String {
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    format!("http://127.0.0.1:{port}/pool/file.deb")
}

async fn serve(mut stream: TcpStream, state: Arc<Mutex<State>>, mut may_answer: watch::Receiver<bool>) {
    let mut buffer = Vec::new();
    loop {
        let end = loop {
            if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break end;
            }
            let mut part = [0; 4096];
            match stream.read(&mut part).await {
                Ok(read @ 1..) => buffer.extend_from_slice(&part[..read]),
                _ => return,
            }
        };
        let head = String::from_utf8(buffer.drain(..end + 4).collect()).unwrap();
        if may_answer.wait_for(|may| *may).await.is_err() {
            return; // The server ended.
        }
        if !answer(&mut stream, &state, parse(&head)).await {
            return;
        }
    }
}

fn parse(head: &str) -> Seen {
    let mut lines = head.lines();
    let target = lines.next().unwrap().split(' ').nth(1).unwrap().to_owned();
    let headers: Vec<(String, String)> =
        lines.filter_map(|line| line.split_once(':')).map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned())).collect();
    let mut seen = Seen { target, range: None, headers };
    seen.range = seen.header("range").map(|range| {
        let (start, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        start.parse().unwrap()..last.parse::<usize>().unwrap() + 1
    });
    seen
}

/// Answers one request; false ends the connection.
async fn answer(stream: &mut TcpStream, state: &Mutex<State>, seen: Seen) -> bool {
    let (fault, file, etag, nth, reset) = {
        let mut state = state.lock();
        let nth = state.seen.len();
        if nth == 1 && matches!(state.fault, Fault::ReplacedBetweenRanges | Fault::ReplacedAndCareless) {
            state.file.iter_mut().for_each(|byte| *byte ^= 0xff);
            state.etag = Some("\"replaced\"".to_owned());
        }
        let reset = match state.fault {
            Fault::Reset { after, times } if state.resets < times => {
                state.resets += 1;
                Some(after)
            }
            _ => None,
        };
        state.seen.push(seen.clone());
        (state.fault.clone(), state.file.clone(), state.etag.clone(), nth, reset)
    };
    let page = b"<html>please log in</html>".to_vec();
    let mut headers = format!("Date: Sun, 22 Nov 2026 12:00:0{} GMT\r\n", nth % 10);
    if let Some(etag) = &etag {
        write!(headers, "ETag: {etag}\r\n").unwrap();
    }
    let changed = seen.header("if-range").is_some_and(|validator| Some(validator) != etag.as_deref());
    let range = seen.range.clone().filter(|_| !changed || matches!(fault, Fault::ReplacedAndCareless));
    let (code, body) = match &fault {
        Fault::Status(code) => (*code, page),
        Fault::Html => (200, page),
        Fault::HtmlOfTheSize => (200, page.iter().copied().cycle().take(file.len()).collect()),
        Fault::Short(less) => (200, file[..file.len() - less].to_vec()),
        Fault::Long(more) => (200, [file.clone(), vec![b'x'; *more]].concat()),
        Fault::RedirectLoop | Fault::RedirectTo(_) | Fault::RedirectNowhere => {
            match &fault {
                Fault::RedirectTo(to) => write!(headers, "Location: {to}\r\n").unwrap(),
                Fault::RedirectLoop => write!(headers, "Location: /again/{nth}\r\n").unwrap(),
                _ => {}
            }
            (302, Vec::new())
        }
        Fault::ChunkedLong => {
            let mut text = format!("HTTP/1.1 200 OK\r\n{headers}Transfer-Encoding: chunked\r\n\r\n").into_bytes();
            for part in [&file[..], b"and more"] {
                text.extend(format!("{:x}\r\n", part.len()).bytes());
                text.extend(part);
                text.extend(b"\r\n");
            }
            text.extend(b"0\r\n\r\n");
            return stream.write_all(&text).await.is_ok();
        }
        Fault::Silence => {
            std::future::pending::<()>().await;
            return false;
        }
        Fault::Garbage => {
            let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2p1\r\n\r\n").await;
            return false;
        }
        _ => match range {
            Some(range) if !matches!(fault, Fault::NoRanges) => {
                let shift = usize::from(matches!(fault, Fault::WrongContentRange));
                let total = file.len() + usize::from(matches!(fault, Fault::WrongTotal));
                write!(headers, "Content-Range: bytes {}-{}/{total}\r\n", range.start + shift, range.end - 1 + shift).unwrap();
                (206, file[range].to_vec())
            }
            _ => (200, file.clone()),
        },
    };
    if matches!(fault, Fault::Encoded) {
        headers.push_str("Content-Encoding: gzip\r\n");
    }
    let head = format!("HTTP/1.1 {code} X\r\n{headers}Content-Length: {}\r\n\r\n", body.len());
    if stream.write_all(head.as_bytes()).await.is_err() {
        return false;
    }
    let send = match (&fault, reset) {
        (Fault::Stall(bytes), _) => *bytes,
        (_, Some(after)) => after.min(body.len()),
        _ => body.len(),
    };
    if matches!(fault, Fault::Drip) {
        for byte in &body {
            if stream.write_all(&[*byte]).await.is_err() {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        return true;
    }
    for part in body[..send].chunks(16 * 1024) {
        if stream.write_all(part).await.is_err() {
            return false;
        }
        state.lock().body_bytes += part.len();
    }
    if matches!(fault, Fault::Stall(_)) {
        std::future::pending::<()>().await;
    }
    send == body.len()
}
