//! The peer server with a shelf of three files, of which a stranger may have one.

use crate::driver::{Subject, behaviour, some};
use ed25519_dalek::SigningKey;
use poolfs_core::{Digest, Sums};
use poolfs_net::peer::{Audience, Near, NoFacts, Partials, PeerServer, ServerLimits, ServerParts, Shelf, Shelved};
use std::fs::File;
use std::io::{Read, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

/// What no stranger may ever see.
const SECRET: &[u8] = b"this never leaves the machine. ";

/// Bytes of an answer that are read: past any that is asked for.
const ANSWER_BYTES_MAX: usize = 4 << 20;

/// Ends a connection, whatever state it is in.
const LAST: &[u8] = b"\r\n\r\nGET /v1/members HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";

/// A file that strangers may have, and one that they may not.
struct TwoFiles {
    shared: (tempfile::NamedTempFile, Arc<Sums>),
    secret: (tempfile::NamedTempFile, Arc<Sums>),
}

fn shared_bytes() -> Vec<u8> {
    (0..3_000_u32).flat_map(|n| n.to_be_bytes()).collect()
}

fn file_of(bytes: &[u8]) -> (tempfile::NamedTempFile, Arc<Sums>) {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(bytes).expect("it can be written");
    (file, Arc::new(Sums::of(bytes)))
}

impl Shelf for TwoFiles {
    fn find(&self, digest: &Digest, to: Audience) -> Option<Shelved> {
        let give = |(file, sums): &(tempfile::NamedTempFile, Arc<Sums>)| {
            let file = File::open(file.path()).expect("it is there").into();
            (sums.digest == *digest).then(|| Shelved { file, sums: Arc::clone(sums) })
        };
        give(&self.shared).or_else(|| give(&self.secret).filter(|_| to == Audience::Fleet))
    }

    fn damaged(&self, digest: &Digest, block: u64) {
        panic!("{digest} is found damaged in block {block}, and is not");
    }
}

/// A running server.
pub(super) struct Served {
    _runtime: tokio::runtime::Runtime,
    _server: PeerServer,
    at: SocketAddr,
    turns: u64,
}

impl Served {
    pub(super) fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let inside = runtime.enter();
        let shelf = TwoFiles { shared: file_of(&shared_bytes()), secret: file_of(&SECRET.repeat(300)) };
        let server = PeerServer::start(ServerParts {
            listen: vec![SocketAddr::from(([127, 0, 0, 1], 0))],
            // Who leaves a request open waits that long: a matter of how many inputs are tried, not of what is asserted.
            limits: ServerLimits { upload_bytes_s: 1 << 40, header_read: Duration::from_secs(2), ..ServerLimits::default() },
            near: Near::of_machine(),
            shelf: Arc::new(shelf),
            partials: Arc::new(Partials::default()),
            facts: Arc::new(NoFacts::default()),
            auth: None,
            key: tokio::sync::watch::channel(SigningKey::from_bytes(&[9; 32])).1,
        })
        .expect("a server");
        drop(inside);
        let at = server.local()[0];
        Self { _runtime: runtime, _server: server, at, turns: 0 }
    }

    /// Sends all of it and one more request, which ends the connection, and takes what comes.
    fn ask(&self, request: &[u8]) -> Vec<u8> {
        let mut stream = TcpStream::connect(self.at).expect("the server listens");
        // A reset at the end leaves no port behind that waits.
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("a socket's option");
        stream.set_read_timeout(Some(Duration::from_secs(25))).expect("a socket's option");
        let mut answer = Vec::new();
        // A server that has refused the head closes before it has taken the rest; what it said first is there all the same.
        let _refused = stream.write_all(&[request, LAST].concat());
        match Read::by_ref(&mut stream).take(ANSWER_BYTES_MAX as u64).read_to_end(&mut answer) {
            Err(err) if err.kind() == std::io::ErrorKind::WouldBlock => panic!("holds a connection for ever"),
            Ok(_) | Err(_) => {}
        }
        answer
    }
}

impl Subject for Served {
    fn run(&mut self, input: &[u8]) -> u64 {
        let answer = self.ask(input);
        assert!(!contains(&answer, &SECRET[..20]), "gives away what no stranger may have");
        assert!(answer.len() < 64 * 1024 + 14_000 * (1 + input.len() / 16), "{} bytes for a request of {}", answer.len(), input.len());
        let mut seen = answer.len().next_power_of_two().min(16_384) as u64;
        if !answer.is_empty() {
            assert!(
                answer.starts_with(b"HTTP/1.1 ") || answer.starts_with(b"HTTP/1.0 "),
                "no HTTP: {}",
                answer[..answer.len().min(60)].escape_ascii()
            );
            let status = std::str::from_utf8(&answer[9..12]).expect("a status").parse::<u16>().expect("a number");
            assert!((200..=599).contains(&status) || status == 100, "status {status}");
            let answers = answer.windows(9).filter(|window| window.starts_with(b"HTTP/1.1 ")).count();
            seen = behaviour((seen, status, some(answers)));
            check_range(&answer);
        }
        // Whatever came before, the next one is served.
        self.turns += 1;
        if self.turns.is_multiple_of(64) {
            let right = format!("GET /v1/file/{} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", Digest::of(&shared_bytes()));
            let answer = self.ask(right.as_bytes());
            let want = shared_bytes();
            let given = answer.windows(want.len()).any(|window| window == want);
            assert!(answer.starts_with(b"HTTP/1.1 200 ") && given, "serves no more: {}", answer.escape_ascii());
        }
        seen
    }
}

/// If it is one answer with a range, its bytes are those of the file.
fn check_range(answer: &[u8]) {
    let Some(head_end) = answer.windows(4).position(|window| window == b"\r\n\r\n") else { return };
    let (head, body) = (String::from_utf8_lossy(&answer[..head_end]), &answer[head_end + 4..]);
    let Some((_, range)) = head.split_once("content-range: bytes ") else { return };
    let Some((from, to)) = range.split('/').next().and_then(|span| span.split_once('-')) else { return };
    let (Ok(from), Ok(to)) = (from.parse::<usize>(), to.parse::<usize>()) else { return };
    let want = shared_bytes();
    let want = want.get(from..=to).expect("a range within the file");
    let length = want.len().min(body.len());
    assert_eq!(&body[..length], &want[..length], "other bytes than the range has");
}

fn contains(all: &[u8], part: &[u8]) -> bool {
    all.windows(part.len()).any(|window| window == part)
}

pub(super) fn requests() -> Vec<Vec<u8>> {
    let (shared, secret) = (Digest::of(&shared_bytes()), Digest::of(&SECRET.repeat(300)));
    let get = |path: String, more: &str| format!("GET {path} HTTP/1.1\r\nhost: x\r\n{more}\r\n").into_bytes();
    let mut all = Vec::new();
    for digest in [shared, secret] {
        for what in ["file", "have", "pieces", "about", "statement"] {
            all.push(get(format!("/v1/{what}/{digest}"), ""));
        }
        all.push(get(format!("/v1/file/{digest}"), "range: bytes=100-4999\r\n"));
    }
    all.push(get("/v1/members".into(), "poolfs-auth: 00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff\r\n"));
    all.push(format!("HEAD /v1/file/{shared} HTTP/1.0\r\n\r\n").into_bytes());
    all.push([get(format!("/v1/have/{shared}"), ""), get(format!("/v1/file/{shared}"), "range: bytes=-5\r\n")].concat());
    all.push(
        format!("POST /v1/file/{shared} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n").into_bytes(),
    );
    all
}
