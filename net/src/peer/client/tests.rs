//! The client against peers that are faulty or hostile, over real sockets under a clock that moves only when all wait.

#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::fleet::auth::{FleetKey, Gate};
use crate::peer::auth::tests::KeyAuth;
use ed25519_dalek::SigningKey;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::sync::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

const PIECE: usize = poolfs_core::piece::PIECE_BYTES as usize;

/// What a scripted peer does after it has read a request.
#[derive(Clone)]
enum Step {
    Send(Vec<u8>),
    /// One byte after each pause.
    Drip(Vec<u8>, Duration),
    Close,
    Reset,
    Hang,
}
use Step::{Close, Drip, Hang, Reset, Send};

/// A peer that answers the n-th request with the n-th script and tells each request's head.
struct Peer {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<String>>>,
    connections: Arc<Mutex<u32>>,
}

impl Peer {
    async fn with(scripts: Vec<Vec<Step>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (seen, connections) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(0)));
        let (told, counted) = (Arc::clone(&seen), Arc::clone(&connections));
        let scripts = Arc::new(Mutex::new(scripts.into_iter()));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                *counted.lock().unwrap() += 1;
                tokio::spawn(play(stream, Arc::clone(&scripts), Arc::clone(&told)));
            }
        });
        Self { address, seen, connections }
    }

    fn requests(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

async fn play(mut stream: TcpStream, scripts: Arc<Mutex<std::vec::IntoIter<Vec<Step>>>>, seen: Arc<Mutex<Vec<String>>>) {
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            match stream.read_u8().await {
                Ok(byte) => head.push(byte),
                Err(_) => return,
            }
        }
        seen.lock().unwrap().push(String::from_utf8(head).unwrap());
        let Some(steps) = scripts.lock().unwrap().next() else { return };
        for step in steps {
            match step {
                // The client may have gone.
                Send(bytes) => drop(stream.write_all(&bytes).await),
                Drip(bytes, pause) => {
                    for byte in bytes {
                        tokio::time::sleep(pause).await;
                        if stream.write_all(&[byte]).await.is_err() {
                            return;
                        }
                    }
                }
                Close => return,
                Reset => {
                    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
                    return;
                }
                Hang => std::future::pending().await,
            }
        }
    }
}

fn file() -> (Vec<u8>, FileShape) {
    let bytes: Vec<u8> = (0..3 * PIECE + 77).map(|at| u8::try_from(at * 7 % 251).unwrap()).collect();
    let shape = FileShape::of(Digest::of(&bytes), bytes.len() as u64);
    (bytes, shape)
}

fn answer(status: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut out = format!("HTTP/1.1 {status}\r\n");
    headers.iter().for_each(|(name, value)| out.push_str(&format!("{name}: {value}\r\n")));
    [out.as_bytes(), b"\r\n", body].concat()
}

/// The right answer to a request for piece 1 of [`file`], with `body` in place of the piece.
fn piece_answer(body: &[u8]) -> Vec<u8> {
    let (range, len) = (format!("bytes {PIECE}-{}/{}", 2 * PIECE - 1, 3 * PIECE + 77), PIECE.to_string());
    answer("206 Partial Content", &[("Content-Range", &range), ("Content-Length", &len)], body)
}

fn client() -> PeerClient {
    PeerClient::new(ClientLimits::default())
}

fn contents(fd: OwnedFd) -> Vec<u8> {
    let file = File::from(fd);
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Asks a peer with these steps for piece 1 of [`file`].
async fn outcome(steps: Vec<Step>) -> Result<Vec<u8>, PeerError> {
    let peer = Peer::with(vec![steps]).await;
    let (_, shape) = file();
    client().piece(peer.address, &shape, 1, || {}).await.map(|piece| contents(piece.bytes))
}

fn right() -> Vec<u8> {
    file().0[PIECE..2 * PIECE].to_vec()
}

/// The bytes, the digest, the seal and the header: what everything above builds on. The connection serves the next request.
#[tokio::test(start_paused = true)]
async fn a_piece_arrives_sealed_and_hashed() {
    let (bytes, shape) = file();
    let last = answer(
        "206 Partial Content",
        &[("content-range", &format!("bytes {}-{}/{}", 3 * PIECE, 3 * PIECE + 76, 3 * PIECE + 77)), ("content-length", "77")],
        &bytes[3 * PIECE..],
    );
    let peer = Peer::with(vec![vec![Send(piece_answer(&right()))], vec![Send(last)]]).await;
    let client = client();
    let mut told = 0;
    let PeerPiece { bytes: fd, digest, .. } = client.piece(peer.address, &shape, 1, || told += 1).await.unwrap();
    assert_eq!((told, digest), (1, Digest::of(&right())));
    assert!(File::from(fd.try_clone().unwrap()).write_all(b"x").is_err(), "sealed");
    assert_eq!(contents(fd), right());
    let PeerPiece { bytes: fd, .. } = client.piece(peer.address, &shape, 3, || {}).await.unwrap();
    assert_eq!(contents(fd), &bytes[3 * PIECE..]);
    assert_eq!(*peer.connections.lock().unwrap(), 1, "used again");
    let head =
        format!("GET /v1/file/{} HTTP/1.1\r\nhost: {}\r\nrange: bytes={PIECE}-{}\r\n\r\n", shape.digest, peer.address, 2 * PIECE - 1);
    assert_eq!(peer.requests()[0], head);
    assert!(matches!(client.piece(peer.address, &shape, 4, || {}).await, Err(PeerError::Wrong(_))), "there is no fifth piece");
}

/// Each way to give less or other than was asked has its own outcome, and none of them gives bytes.
#[tokio::test(start_paused = true)]
async fn faulty_answers() {
    let right = right();
    let twice = [&right[..], &right].concat();
    let all = file().0;
    let len = PIECE.to_string();
    let range = format!("bytes {PIECE}-{}/{}", 2 * PIECE - 1, all.len());
    let with = |range: &str, len: &str| answer("206 P", &[("content-range", range), ("content-length", len)], &right);
    let refused = |retry_after| PeerError::Refused { retry_after };
    let check = async |steps: Vec<Step>, want: PeerError| {
        let got = outcome(steps).await.expect_err("no bytes");
        match (&got, &want) {
            (PeerError::Wrong(got), PeerError::Wrong(want)) => assert!(got.contains(want.as_str()), "{got:?} says nothing of {want:?}"),
            _ => assert_eq!(got, want),
        }
    };
    let short = [Send(piece_answer(&right[..PIECE - 1])), Close].to_vec();
    check(short, PeerError::Short).await;
    check(vec![Send(piece_answer(&right[..PIECE / 2])), Reset], PeerError::Short).await;
    check(vec![Send(with(&range, "262143"))], PeerError::Short).await;
    check(vec![Close], PeerError::Short).await;
    check(vec![Reset], PeerError::Short).await;
    check(vec![Send(answer("206 P", &[("content-range", &range), ("content-length", "524288")], &twice))], wrong("524288 bytes")).await;
    check(vec![Send(answer("200 OK", &[("content-length", &all.len().to_string())], &all)), Hang], wrong("the whole file")).await;
    check(vec![Send(with(&format!("bytes 0-{}/{}", PIECE - 1, all.len()), &len))], wrong("bytes 0-")).await;
    check(vec![Send(with(&format!("bytes {PIECE}-{}/{}", 2 * PIECE - 1, all.len() + 1), &len))], wrong("instead of")).await;
    check(vec![Send(answer("206 P", &[("content-length", &len)], &right))], wrong("without Content-Range")).await;
    let two = [("content-range", &*range), ("content-range", &*range), ("content-length", &len)];
    check(vec![Send(answer("206 P", &two, &right))], wrong("two of content-range")).await;
    check(vec![Send(answer("206 P", &[("content-range", &range)], &right)), Close], wrong("without a length")).await;
    let encoded = [("content-range", &*range), ("content-length", &len), ("content-encoding", "gzip")];
    check(vec![Send(answer("206 P", &encoded, &right))], wrong("encoded")).await;
    check(vec![Send(b"SSH-2.0-OpenSSH_9.2p1\r\n".to_vec()), Hang], wrong("")).await;
    check(vec![Send(answer("206 P", &[("x", &"y".repeat(100_000))], b"")), Hang], wrong("")).await;
    let many: Vec<(&str, &str)> = vec![("x", "y"); 100];
    check(vec![Send(answer("206 P", &many, b"")), Hang], wrong("")).await;
    check(vec![Send(answer("404 N", &[("content-length", "0")], b""))], refused(None)).await;
    check(vec![Send(answer("503 B", &[("retry-after", "7"), ("content-length", "0")], b""))], refused(Some(Duration::from_secs(7)))).await;
    check(vec![Send(answer("503 B", &[("retry-after", "99999999")], b""))], refused(Some(RETRY_AFTER_MAX))).await;
    check(vec![Send(answer("503 B", &[("retry-after", "Sun, 22 Nov 2026 00:00:00 GMT")], b""))], refused(None)).await;
    check(vec![Send(answer("500 E", &[], b"")), Close], refused(None)).await;
}

/// Bytes that come behind the piece are not part of it, however they are sent; and the answer to the next request is not
/// looked for among them.
#[tokio::test(start_paused = true)]
async fn bytes_past_the_piece_are_not_taken() {
    let right = right();
    assert_eq!(outcome(vec![Send(piece_answer(&[&right[..], &right].concat()))]).await, Ok(right.clone()));
    let range = format!("bytes {PIECE}-{}/{}", 2 * PIECE - 1, 3 * PIECE + 77);
    let chunked = |parts: &[&[u8]]| {
        let mut body = Vec::new();
        for part in parts {
            body.extend_from_slice(format!("{:x}\r\n", part.len()).as_bytes());
            body.extend_from_slice(part);
            body.extend_from_slice(b"\r\n");
        }
        body.extend_from_slice(b"0\r\n\r\n");
        answer("206 P", &[("content-range", &range), ("transfer-encoding", "chunked")], &body)
    };
    assert_eq!(outcome(vec![Send(chunked(&[&right[..5], &right[5..]]))]).await, Ok(right.clone()));
    let long = outcome(vec![Send(chunked(&[&right, b"more"]))]).await;
    assert!(matches!(long, Err(PeerError::Wrong(_))), "{long:?}");
    assert_eq!(outcome(vec![Send(chunked(&[&right[..5]]))]).await, Err(PeerError::Short));

    let peer = Peer::with(vec![
        vec![Send(piece_answer(&[&right[..], b"HTTP/1.1 200 OK\r\n\r\n"].concat())), Hang],
        vec![Send(piece_answer(&right))],
    ])
    .await;
    let (client, (_, shape)) = (client(), file());
    for _ in 0..2 {
        let PeerPiece { bytes: fd, .. } = client.piece(peer.address, &shape, 1, || {}).await.unwrap();
        assert_eq!(contents(fd), right);
    }
    assert_eq!(*peer.connections.lock().unwrap(), 2, "a connection with something in it is not used again");
}

/// Who waits for a byte a second waits for hours. Every step has its end, to the second.
#[tokio::test(start_paused = true)]
async fn slowness_ends() {
    let seconds = Duration::from_secs;
    let check = async |steps: Vec<Step>, want_s: u64| {
        let start = Instant::now();
        assert_eq!(outcome(steps).await, Err(PeerError::Slow));
        assert_eq!(start.elapsed().as_secs(), want_s);
    };
    check(vec![Hang], 8).await;
    check(vec![Drip(piece_answer(&right()), seconds(1))], 8).await;
    check(vec![Send(piece_answer(b"")), Hang], 8).await;
    check(vec![Send(piece_answer(b"some")), Hang], 5).await;
    // 256 KiB at 8 KiB/s, and the 13 s that a start and a pause may take.
    check(vec![Send(piece_answer(b"")), Drip(right(), seconds(1))], 45).await;
    check(vec![Send(piece_answer(b"")), Drip(right(), seconds(6))], 11).await;
}

/// Whatever is not there is found gone at once, and what swallows connections within the deadline.
#[tokio::test(start_paused = true)]
async fn nobody_there() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    assert_eq!(client().piece(address, &file().1, 0, || {}).await.map(drop), Err(PeerError::Gone));
    // A backlog of one that nobody takes from: further connections get no answer.
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
    socket.listen(0).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    let _held = (TcpStream::connect(address).await.unwrap(), std::net::TcpStream::connect_timeout(&address, Duration::from_millis(50)));
    let start = Instant::now();
    assert_eq!(client().piece(address, &file().1, 0, || {}).await.map(drop), Err(PeerError::Gone));
    assert_eq!(start.elapsed().as_secs(), 4);
}

/// A peer must not be able to make this machine connect to a third one.
#[tokio::test(start_paused = true)]
async fn no_redirect_is_followed() {
    let third = Peer::with(vec![vec![Send(piece_answer(&right()))]]).await;
    for status in ["301 M", "302 F", "303 S", "307 T", "308 P", "300 C"] {
        let location = format!("http://{}/v1/file/x", third.address);
        let got = outcome(vec![Send(answer(status, &[("location", &location), ("content-length", "0")], b""))]).await;
        assert!(matches!(got, Err(PeerError::Wrong(_))), "{status}: {got:?}");
    }
    assert_eq!(*third.connections.lock().unwrap(), 0);
}

/// A server that closed a kept connection meanwhile is not a failure; a piece that was begun and broke is not asked for twice.
#[tokio::test(start_paused = true)]
async fn a_closed_connection_is_opened_again() {
    let right = right();
    let (client, (_, shape)) = (client(), file());
    let peer = Peer::with(vec![
        vec![Send(piece_answer(&right)), Close],
        vec![Send(piece_answer(&right))],
        vec![Close],
        vec![Send(piece_answer(&right[..9])), Close],
    ])
    .await;
    for _ in 0..2 {
        assert!(client.piece(peer.address, &shape, 1, || {}).await.is_ok());
    }
    // The third request meets a connection that closes under it, so a new one is made, whose answer breaks off.
    assert_eq!(client.piece(peer.address, &shape, 1, || {}).await.map(drop), Err(PeerError::Short));
    assert_eq!((peer.requests().len(), *peer.connections.lock().unwrap()), (4, 3));
}

/// Kept connections are bounded per peer and in time, or a fleet leaves thousands of sockets behind.
#[tokio::test(start_paused = true)]
async fn kept_connections_are_few() {
    let (client, (_, shape)) = (PeerClient::new(ClientLimits { idle_per_peer_max: 2, idle_max: 3, ..ClientLimits::default() }), file());
    let scripts = || vec![vec![Send(piece_answer(&right()))]; 8];
    let (one, two) = (Peer::with(scripts()).await, Peer::with(scripts()).await);
    let three = async |peer: &Peer| {
        let ask = || client.piece(peer.address, &shape, 1, || {});
        let (a, b, c) = tokio::join!(ask(), ask(), ask());
        assert!(a.is_ok() && b.is_ok() && c.is_ok());
    };
    three(&one).await;
    assert_eq!(client.pool.len(), 2);
    three(&two).await;
    assert_eq!(client.pool.len(), 3);
    tokio::time::advance(Duration::from_secs(16)).await;
    three(&one).await;
    assert_eq!(client.pool.len(), 2, "old ones made room");
    assert_eq!(*one.connections.lock().unwrap(), 6, "and were not used");
}

/// The short answers: right ones are read, and each that does not fit the file is refused whole.
#[tokio::test(start_paused = true)]
async fn short_answers() {
    let (bytes, shape) = file();
    let key = SigningKey::from_bytes(&[3; 32]);
    let list = PieceList::sign(&shape, bytes.chunks(PIECE).map(Digest::of).collect(), &key, now_s());
    let ok = |body: &[u8]| vec![Send(answer("200 OK", &[("content-length", &body.len().to_string())], body)), Close];
    let mut forged = list.encode(&shape);
    forged[50] ^= 1;
    let old = PieceList::sign(&shape, list.pieces.clone(), &key, now_s() - 31 * 24 * 3600).encode(&shape);
    let huge = answer("200 OK", &[("content-length", "9000000")], b"");
    let endless = [answer("200 OK", &[], b""), vec![0; 3000]].concat();
    let scripts = vec![
        ok(&[0xf0]),
        ok(&[0xf8]),
        ok(&[0xf0, 0]),
        ok(&list.encode(&shape)),
        ok(&forged),
        ok(&old),
        vec![Send(huge), Hang],
        vec![Send(endless), Hang],
        ok(b"proof"),
        ok(b"other"),
        vec![Send(answer("206 P", &[("content-length", "1")], b"x"))],
    ];
    let peer = Peer::with(scripts).await;
    let client = client();
    let is_wrong = |result: Result<(), PeerError>| assert!(matches!(result, Err(PeerError::Wrong(_))), "{result:?}");
    assert!(client.have(peer.address, &shape).await.unwrap().is_full());
    is_wrong(client.have(peer.address, &shape).await.map(drop));
    is_wrong(client.have(peer.address, &shape).await.map(drop));
    assert_eq!(client.list(peer.address, &shape).await, Ok(list));
    is_wrong(client.list(peer.address, &shape).await.map(drop));
    is_wrong(client.list(peer.address, &shape).await.map(drop));
    is_wrong(client.list(peer.address, &shape).await.map(drop));
    is_wrong(client.about(peer.address, &shape.digest).await.map(drop));
    assert_eq!(client.proof(peer.address, &Digest::of(b"proof")).await, Ok(b"proof".to_vec()));
    is_wrong(client.proof(peer.address, &Digest::of(b"proof")).await.map(drop));
    is_wrong(client.have(peer.address, &shape).await.map(drop));
    let paths: Vec<String> = peer.requests().iter().map(|head| head.split(' ').nth(1).unwrap().to_owned()).collect();
    assert_eq!(paths[0], format!("/v1/have/{}", shape.digest));
    assert_eq!(paths[3], format!("/v1/pieces/{}", shape.digest));
    assert_eq!(paths[7], format!("/v1/about/{}", shape.digest));
    assert_eq!(paths[8], format!("/v1/statement/{}", Digest::of(b"proof")));
}

/// Among members an answer counts only if who answers has the key: another machine may have taken the address over.
#[tokio::test(start_paused = true)]
async fn members_must_sign_their_answers() {
    let auth = Arc::new(KeyAuth::new(Gate::new(FleetKey::new([1; 32])), Vec::new));
    let peer = Peer::with(vec![vec![Send(piece_answer(&right())), Close], vec![Send(answer("404 N", &[], b"")), Close]]).await;
    let (client, (_, shape)) = (client().for_fleet(auth), file());
    let got = client.piece(peer.address, &shape, 1, || {}).await.map(drop);
    assert_eq!(got, Err(wrong("not signed by the fleet")));
    assert!(peer.requests()[0].contains("\r\npoolfs-auth: "));
    let got = client.piece(peer.address, &shape, 1, || {}).await.map(drop);
    assert_eq!(got, Err(PeerError::Refused { retry_after: None }), "who gives nothing need not sign it");
}
