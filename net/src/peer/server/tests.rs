//! The server over real sockets: what it gives, to whom, and how long it bears with whom.

#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::fleet::auth::{FleetKey, Gate};
use crate::krpc::{Delta, FLAG_PARTIAL, FLAG_REACHABLE};
use crate::peer::auth::tests::KeyAuth;
use crate::peer::{Audience, ClientLimits, DeltaClaim, Partial, PeerClient, PeerError, PeerPiece, Shelved};
use crate::swarm::FileShape;
use crate::swarm::bits::Bits;
use crate::swarm::piece_list::PieceList;
use poolfs_core::piece::{BLOCK_BYTES, PIECE_BYTES};
use poolfs_core::{Digest, Sums};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::Instant;

const PIECE: usize = PIECE_BYTES as usize;
const KEY: [u8; 32] = [9; 32];

/// Who may have a file of the test's shelf.
#[derive(Clone, Copy, PartialEq, Eq)]
enum For {
    All,
    Fleet,
    Nobody,
}

/// A shelf of files in a temporary directory.
struct TestShelf {
    dir: tempfile::TempDir,
    files: Mutex<HashMap<Digest, (Arc<Sums>, For)>>,
    damaged: Mutex<Vec<(Digest, u64)>>,
    /// Whoever holds it for writing is a disk that hangs.
    disk: parking_lot::RwLock<()>,
}

impl TestShelf {
    fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.path().join(digest.to_string())
    }

    fn add(&self, bytes: &[u8], to: For) -> Digest {
        let sums = Sums::of(bytes);
        std::fs::write(self.path(&sums.digest), bytes).unwrap();
        self.files.lock().insert(sums.digest, (Arc::new(sums.clone()), to));
        sums.digest
    }
}

impl Shelf for TestShelf {
    fn find(&self, digest: &Digest, to: Audience) -> Option<Shelved> {
        let _disk = self.disk.read();
        let (sums, whose) = self.files.lock().get(digest)?.clone();
        let may = whose == For::All || (whose == For::Fleet && to == Audience::Fleet);
        may.then(|| Shelved { file: File::open(self.path(digest)).unwrap().into(), sums })
    }

    fn damaged(&self, digest: &Digest, block: u64) {
        self.damaged.lock().push((*digest, block));
    }
}

/// Facts about one file.
struct OneFact(Digest);

impl Facts for OneFact {
    fn reachable(&self) -> bool {
        true
    }

    fn deltas(&self, digest: &Digest) -> Vec<(Delta, DeltaClaim)> {
        let old = Digest::of(b"old");
        let delta = Delta { old: old.0, bytes: 5, delta: [4; 32], target: None };
        let claim = DeltaClaim::sign(old, *digest, Digest([4; 32]), &SigningKey::from_bytes(&KEY), crate::peer::client::now_s());
        if *digest == self.0 { vec![(delta, claim)] } else { Vec::new() }
    }

    fn proof(&self, id: &Digest) -> Option<Vec<u8>> {
        (*id == Digest::of(b"proof")).then(|| b"proof".to_vec())
    }
}

struct Rig {
    shelf: Arc<TestShelf>,
    partials: Arc<Partials>,
    server: PeerServer,
    address: SocketAddr,
}

struct Setup {
    limits: ServerLimits,
    near: Near,
    auth: Option<Arc<dyn Auth>>,
}

impl Default for Setup {
    fn default() -> Self {
        Self { limits: ServerLimits::default(), near: Near::of_machine(), auth: None }
    }
}

fn rig() -> Rig {
    rig_with(Setup::default())
}

fn rig_with(setup: Setup) -> Rig {
    let dir = tempfile::tempdir().unwrap();
    let shelf = Arc::new(TestShelf { dir, files: Mutex::default(), damaged: Mutex::default(), disk: parking_lot::RwLock::default() });
    let partials = Arc::new(Partials::default());
    let parts = ServerParts {
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        limits: setup.limits,
        near: setup.near,
        shelf: Arc::clone(&shelf) as Arc<dyn Shelf>,
        partials: Arc::clone(&partials),
        facts: Arc::new(OneFact(Digest::of(b"with a delta"))),
        auth: setup.auth,
        key: watch::channel(SigningKey::from_bytes(&KEY)).1,
    };
    let server = PeerServer::start(parts).unwrap();
    let address = server.local()[0];
    Rig { shelf, partials, server, address }
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from(at * 13 % 251).unwrap()).collect()
}

fn client() -> PeerClient {
    PeerClient::new(ClientLimits::default())
}

impl Rig {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// All bytes of the answer to one request on a connection of its own.
    async fn exchange(&self, request: &str) -> Vec<u8> {
        let mut stream = self.connect().await;
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut out = Vec::new();
        stream.read_to_end(&mut out).await.unwrap();
        out
    }

    /// As [`Self::exchange`], for a method and path, with more headers.
    async fn ask(&self, what: &str, headers: &str) -> (String, Vec<u8>) {
        let answer = self.exchange(&format!("{what} HTTP/1.1\r\nhost: x\r\n{headers}connection: close\r\n\r\n")).await;
        let end = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
        (String::from_utf8(answer[..end].to_vec()).unwrap(), answer[end..].to_vec())
    }
}

const NOT_FOUND: &str = "HTTP/1.1 404 Not Found\r\ncontent-type: text/plain\r\ncontent-length: 10\r\nconnection: close\r\n\r\n";

/// What curl and every other client sees; the header to the letter, since it must tell nothing of the machine.
#[tokio::test]
async fn files_and_ranges() {
    let rig = rig();
    let file = bytes(3 * PIECE + 77);
    let digest = rig.shelf.add(&file, For::All);
    let path = format!("GET /v1/file/{digest}");
    let head = |status: &str, len: usize, more: &str| {
        format!(
            "HTTP/1.1 {status}\r\ncontent-type: application/octet-stream\r\naccept-ranges: bytes\r\ncontent-length: {len}\r\n\
             etag: \"{digest}\"\r\n{more}connection: close\r\n\r\n"
        )
    };
    assert_eq!(rig.ask(&path, "").await, (head("200 OK", file.len(), ""), file.clone()));
    let block = BLOCK_BYTES as usize;
    for (start, end) in
        [(0, 1), (0, file.len()), (5, 6), (block - 1, block + 1), (PIECE - 1, PIECE + 1), (PIECE, 2 * PIECE), (3 * PIECE, file.len())]
    {
        let range = format!("range: bytes={start}-{}\r\n", end - 1);
        let want = head("206 Partial Content", end - start, &format!("content-range: bytes {start}-{}/{}\r\n", end - 1, file.len()));
        assert_eq!(rig.ask(&path, &range).await, (want, file[start..end].to_vec()), "{range}");
    }
    let (start, tail) = rig.ask(&path, "range: bytes=-3\r\n").await;
    assert!(
        start.contains(&format!("content-range: bytes {}-{}/{}\r\n", file.len() - 3, file.len() - 1, file.len()))
            && tail == file[file.len() - 3..]
    );
    let (start, _) = rig.ask(&path, &format!("range: bytes={}-\r\n", file.len())).await;
    assert!(start.starts_with("HTTP/1.1 416 ") && start.contains(&format!("content-range: bytes */{}\r\n", file.len())), "{start}");
    assert!(rig.ask(&path, "range: bytes=0-1,3-4\r\n").await.0.starts_with("HTTP/1.1 416 "), "one range only");
    assert!(rig.ask(&path, "range: bytes=0-0\r\nif-range: \"other\"\r\n").await.0.starts_with("HTTP/1.1 200 "));
    assert!(rig.ask(&path, &format!("range: bytes=0-0\r\nif-range: \"{digest}\"\r\n")).await.0.starts_with("HTTP/1.1 206 "));
    let of_head = format!("HEAD /v1/file/{digest}");
    assert_eq!(rig.ask(&of_head, "").await, (head("200 OK", file.len(), ""), Vec::new()));
    let empty = rig.shelf.add(b"", For::All);
    let (start, body) = rig.ask(&format!("GET /v1/file/{empty}"), "").await;
    assert!(start.starts_with("HTTP/1.1 200 OK\r\n") && start.contains("content-length: 0\r\n") && body.is_empty(), "{start}");
    assert_eq!(rig.server.counters().damaged, 0);
}

/// Our client takes from our server every piece of files around every border, and what both know of lists, bits and claims fits.
#[tokio::test]
async fn client_and_server_agree() {
    let rig = rig();
    let client = client();
    for len in [1, 65_537, 300_000, 524_288, 524_289, 3 * PIECE, 3 * PIECE + 1] {
        let file = bytes(len);
        let digest = rig.shelf.add(&file, For::All);
        let shape = FileShape::of(digest, len as u64);
        let list = client.list(rig.address, &shape).await.unwrap();
        assert_eq!(list.signer, SigningKey::from_bytes(&KEY).verifying_key().to_bytes());
        assert!(client.have(rig.address, &shape).await.unwrap().is_full());
        for piece in 0..shape.pieces() {
            let PeerPiece { bytes: fd, digest: sum, arriving: false } = client.piece(rig.address, &shape, piece, || {}).await.unwrap()
            else {
                panic!("a whole file is answered for")
            };
            assert_eq!(sum, list.pieces[piece as usize], "piece {piece} of {len}");
            assert_eq!(File::from(fd).metadata().unwrap().len(), u64::from(shape.piece_len(piece)));
        }
    }
    let digest = rig.shelf.add(b"with a delta", For::All);
    let about = client.about(rig.address, &digest).await.unwrap();
    assert_eq!((about.pv.flags, about.pv.deltas.len(), about.claims.len()), (FLAG_REACHABLE, 1, 1));
    assert_eq!(client.proof(rig.address, &Digest::of(b"proof")).await, Ok(b"proof".to_vec()));
    let counters = rig.server.counters();
    assert_eq!((counters.bytes_outside, counters.connections), (0, 1), "loopback is inside, and one connection did for all");
}

/// A difference of one byte tells a watcher that this machine has a file that it keeps back.
#[tokio::test]
async fn the_same_answer_for_all_that_may_not_be_had() {
    let auth = Arc::new(KeyAuth::new(Gate::new(FleetKey::new([1; 32])), Vec::new));
    let rig = rig_with(Setup { auth: Some(auth), ..Setup::default() });
    let large = bytes(600_000);
    let shown = rig.shelf.add(b"shown", For::All);
    let private = rig.shelf.add(&large, For::Nobody);
    let withheld = rig.shelf.add(b"withheld", For::Fleet);
    let unknown = Digest::of(b"unknown");
    let arriving = Digest::of(b"arriving");
    rig.partials.put(partial(arriving, b"arriving", true));
    for what in ["file", "have", "pieces", "about", "statement"] {
        for digest in [private, withheld, unknown, arriving] {
            for headers in ["", "range: bytes=0-0\r\n", "range: bytes=900000-\r\n", "range: x\r\n", "poolfs-auth: 00\r\n"] {
                let got = rig.ask(&format!("GET /v1/{what}/{digest}"), headers).await;
                assert_eq!(got, (NOT_FOUND.to_owned(), b"not found\n".to_vec()), "{what} {headers}");
            }
            assert_eq!(rig.ask(&format!("HEAD /v1/{what}/{digest}"), "").await, (NOT_FOUND.to_owned(), Vec::new()), "{what}");
        }
    }
    let upper = shown.to_string().to_uppercase();
    for path in ["/v1/members", "/", "/v1/file/", "/v1/file/xyz", "/v2/file/x", "/v1/other/x", &format!("/v1/file/{upper}")] {
        assert_eq!(rig.ask(&format!("GET {path}"), "").await, (NOT_FOUND.to_owned(), b"not found\n".to_vec()), "{path}");
    }
    assert_eq!(rig.server.counters().answered, 0);
}

/// The fleet's key opens what is withheld, once per nonce, and only the right one, in time.
#[tokio::test]
async fn members_of_the_fleet() {
    let gate = |key: u8| KeyAuth::new(Gate::new(FleetKey::new([key; 32])), || b"the members".to_vec());
    let rig = rig_with(Setup { auth: Some(Arc::new(gate(1))), ..Setup::default() });
    let withheld = rig.shelf.add(b"withheld", For::Fleet);
    let nobody = rig.shelf.add(b"nobody", For::Nobody);
    let arriving = Digest::of(b"arriving");
    rig.partials.put(partial(arriving, b"arriving", true));
    let shape = |digest, len| FileShape::of(digest, len);
    let stranger = client();
    let member = stranger.for_fleet(Arc::new(gate(1)));
    let other = stranger.for_fleet(Arc::new(gate(2)));
    let refused = Err(PeerError::Refused { retry_after: None });
    for (digest, len) in [(withheld, 8), (arriving, 8)] {
        assert!(member.piece(rig.address, &shape(digest, len), 0, || {}).await.is_ok());
        for client in [&stranger, &other] {
            assert_eq!(client.piece(rig.address, &shape(digest, len), 0, || {}).await.map(drop), refused);
        }
    }
    assert_eq!(member.piece(rig.address, &shape(nobody, 6), 0, || {}).await.map(drop), refused, "never leaves the machine");
    assert_eq!(member.members(rig.address).await, Ok(b"the members".to_vec()));
    assert_eq!(other.members(rig.address).await.map(drop), refused);

    let now = crate::peer::client::now_s();
    let path = format!("/v1/file/{withheld}");
    let request = crate::peer::auth::signed_bytes("GET", &path, "");
    let given = async |header: &str, path: &str| rig.ask(&format!("GET {path}"), &format!("poolfs-auth: {header}\r\n")).await;
    let header = gate(1).sign(&request, now).header;
    let (head, body) = given(&header, &path).await;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("poolfs-auth: ") && body == b"withheld", "{head}");
    for (header, path, why) in [
        (header.clone(), path.clone(), "a nonce twice"),
        (gate(1).sign(&request, now - 301).header, path.clone(), "too old"),
        (gate(1).sign(&request, now + 400).header, path.clone(), "from the future"),
        (gate(2).sign(&request, now).header, path.clone(), "another key"),
        (gate(1).sign(&request, now).header, format!("/v1/have/{withheld}"), "signed for another path"),
        (String::new(), path.clone(), "nothing"),
    ] {
        assert_eq!(given(&header, &path).await, (NOT_FOUND.to_owned(), b"not found\n".to_vec()), "{why}");
    }
}

fn partial(digest: Digest, file: &[u8], fleet_only: bool) -> Partial {
    let shape = FileShape::of(digest, file.len() as u64);
    let pieces = file.chunks(shape.piece_bytes as usize).map(Digest::of).collect();
    let list = PieceList::sign(&shape, pieces, &SigningKey::from_bytes(&[5; 32]), crate::peer::client::now_s());
    let dir = tempfile::tempfile().unwrap();
    dir.write_all_at(file, 0).unwrap();
    Partial { file: Arc::new(OwnedFd::from(dir)), shape, list: Arc::new(list), have: Bits::all(shape.pieces()), fleet_only }
}

/// A victim of a liar must not pass the lies on: of a file on its way only what the signed list bears out is given, and the
/// list is the one that was got, since this node has not seen the whole file.
#[tokio::test]
async fn files_on_their_way() {
    let rig = rig();
    let client = client();
    let file = bytes(4 * PIECE + 9);
    let digest = Digest::of(&file);
    let mut offered = partial(digest, &file, false);
    offered.have = Bits::none(5);
    File::from(offered.file.try_clone().unwrap()).write_all_at(b"lie", 2 * PIECE as u64 + 5).unwrap();
    let (shape, list) = (offered.shape, Arc::clone(&offered.list));
    assert!(rig.partials.put(offered));
    let got = async |piece| {
        let piece = client.piece(rig.address, &shape, piece, || {}).await?;
        assert!(piece.arriving, "who gives it cannot answer for it, and says so");
        Ok(piece.digest)
    };
    let refused = Err(PeerError::Refused { retry_after: None });
    assert_eq!(got(0).await, refused);
    for index in [0, 1, 2] {
        assert!(rig.partials.arrived(&digest, index));
    }
    assert_eq!(got(0).await, Ok(Digest::of(&file[..PIECE])));
    assert_eq!(got(1).await, Ok(Digest::of(&file[PIECE..2 * PIECE])));
    assert_eq!(got(2).await, refused, "its bytes are not those of the list");
    assert_eq!(got(3).await, refused, "not here");
    assert_eq!(client.have(rig.address, &shape).await.unwrap().as_bytes(), [0xe0]);
    assert_eq!(client.list(rig.address, &shape).await.as_ref(), Ok(&*list));
    assert_eq!(client.about(rig.address, &digest).await.unwrap().pv.flags, FLAG_PARTIAL | FLAG_REACHABLE);
    let path = format!("GET /v1/file/{digest}");
    let (_, body) = rig.ask(&path, &format!("range: bytes=7-{}\r\n", 2 * PIECE - 1)).await;
    assert_eq!(body, file[7..2 * PIECE], "over two pieces");
    for headers in ["", "range: bytes=0-786432\r\n", "range: bytes=-1\r\n"] {
        assert_eq!(rig.ask(&path, headers).await.0, NOT_FOUND, "{headers}");
    }
    rig.partials.remove(&digest);
    assert_eq!(got(0).await, refused);
    assert!(!rig.partials.arrived(&digest, 3) && rig.partials.is_empty());
}

/// Bytes that rotted on disk never leave: not as the first of an answer, and not in the middle of one.
#[tokio::test]
async fn rot_is_not_given() {
    let rig = rig();
    let file = bytes(6 * PIECE);
    let digest = rig.shelf.add(&file, For::All);
    let on_disk = File::options().write(true).open(rig.shelf.path(&digest)).unwrap();
    let at = 4 * PIECE + 2 * BLOCK_BYTES as usize + 17;
    on_disk.write_all_at(&[!file[at]], at as u64).unwrap();
    let path = format!("GET /v1/file/{digest}");
    let (head, body) = rig.ask(&path, "").await;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"));
    assert_eq!(body, file[..4 * PIECE], "cut where the piece with the bad block begins");
    assert_eq!(*rig.shelf.damaged.lock(), [(digest, 18)]);
    let range = |start: usize, len: usize| format!("range: bytes={start}-{}\r\n", start + len - 1);
    assert_eq!(rig.ask(&path, &range(at, 1)).await.0, NOT_FOUND);
    assert_eq!(rig.ask(&path, &range(at + 1000, 10)).await.0, NOT_FOUND, "the same block");
    let (_, body) = rig.ask(&path, &range(4 * PIECE, BLOCK_BYTES as usize)).await;
    assert_eq!(body, file[4 * PIECE..][..BLOCK_BYTES as usize], "another block of the piece");
    on_disk.set_len(5 * PIECE as u64 + 3).unwrap();
    assert_eq!(rig.ask(&path, &range(5 * PIECE, 10)).await.0, NOT_FOUND, "cut off on disk");
    assert_eq!(rig.server.counters().damaged, 4);
}

/// A request is a line and a few headers; whatever else comes is answered and the connection closed, before it costs memory.
#[tokio::test]
async fn odd_requests() {
    let rig = rig();
    let digest = rig.shelf.add(b"shown", For::All);
    let status = async |request: &str| {
        let answer = rig.exchange(request).await;
        String::from_utf8_lossy(&answer).split(' ').nth(1).unwrap_or("closed").to_owned()
    };
    let get = format!("GET /v1/file/{digest} HTTP/1.1\r\nhost: x\r\n");
    assert_eq!(status(&format!("{get}content-length: 5\r\n\r\nhello")).await, "400");
    assert_eq!(status(&format!("{get}transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")).await, "400");
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "BREW"] {
        assert_eq!(status(&format!("{method} /v1/file/{digest} HTTP/1.1\r\nconnection: close\r\n\r\n")).await, "405", "{method}");
    }
    assert_eq!(status(&format!("{get}x: {}\r\n\r\n", "y".repeat(9000))).await, "431");
    assert_eq!(status(&format!("{get}{}\r\n", "x: y\r\n".repeat(40))).await, "431");
    assert_eq!(status(&format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(20_000))).await, "431");
    assert_eq!(status("\0\u{1}\u{2} not http\r\n\r\n").await, "400");
    assert_eq!(status(&format!("GET /v1/file/{digest} HTTP/1.0\r\n\r\n")).await, "200");
    // Two requests at once are answered in turn.
    let both = rig.exchange(&format!("{get}\r\n{get}connection: close\r\n\r\n")).await;
    assert_eq!(String::from_utf8(both).unwrap().matches("shown").count(), 2);
}

/// Slow writers of requests, idle connections and receivers that take nothing are let go, to the second; else a few hundred of
/// them keep everybody else out.
#[tokio::test(start_paused = true)]
async fn nobody_holds_a_connection_for_long() {
    let rig = rig();
    let file = bytes(40 << 20);
    let digest = rig.shelf.add(&file, For::All);
    let start = Instant::now();
    let mut loris = rig.connect().await;
    let mut idle = rig.connect().await;
    let drip = async {
        for byte in format!("GET /v1/file/{digest} HTTP/1.1\r\n").bytes().cycle() {
            if loris.write_all(&[byte]).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    let mut rest = Vec::new();
    let (_, _) = tokio::join!(drip, idle.read_to_end(&mut rest));
    assert!((20..=22).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());

    let mut stalled = rig.connect().await;
    stalled.write_all(format!("GET /v1/file/{digest} HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
    while rig.server.counters().connections == 0 {
        tokio::task::yield_now().await;
    }
    let start = Instant::now();
    while rig.server.counters().connections > 0 {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    // In the first window the kernel's own buffers took enough; the second finds that the receiver takes nothing.
    assert!((29..=32).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
    assert!(rig.server.counters().bytes < file.len() as u64);
}

/// Five hundred connections are served; what is past the limit is turned away at once, and room that is given back is used.
#[tokio::test]
async fn five_hundred_connections() {
    let limits = ServerLimits { connections_max: 500, ..ServerLimits::default() };
    let rig = rig_with(Setup { limits, ..Setup::default() });
    let digest = rig.shelf.add(b"shown", For::All);
    let mut held = Vec::new();
    for _ in 0..500 {
        held.push(rig.connect().await);
    }
    let request = format!("GET /v1/file/{digest} HTTP/1.1\r\n\r\n");
    for stream in &mut held {
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = vec![0; 1024];
        let len = stream.read(&mut answer).await.unwrap();
        assert!(answer[..len].starts_with(b"HTTP/1.1 200 OK\r\n"));
    }
    assert_eq!(rig.server.counters().connections, 500);
    let mut answer = Vec::new();
    rig.connect().await.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, BUSY);
    held.truncate(499);
    while rig.server.counters().connections == 500 {
        tokio::task::yield_now().await;
    }
    assert!(rig.ask(&format!("GET /v1/file/{digest}"), "").await.0.starts_with("HTTP/1.1 200 OK\r\n"));
}

/// One stranger cannot take all connections; nor can strangers take the slots of this machine's own networks.
#[tokio::test]
async fn strangers_share_little() {
    let limits = ServerLimits { connections_max: 4, connections_per_address_max: 9, ..ServerLimits::default() };
    let rig = rig_with(Setup { limits, near: Near::nobody(), ..Setup::default() });
    let held = [rig.connect().await, rig.connect().await, rig.connect().await];
    let mut answer = Vec::new();
    rig.connect().await.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, BUSY, "the fourth place is not for strangers");
    drop(held);

    let limits = ServerLimits { connections_per_address_max: 3, slots: 0, ..ServerLimits::default() };
    let rig = rig_with(Setup { limits: limits.clone(), near: Near::nobody(), ..Setup::default() });
    let digest = rig.shelf.add(b"shown", For::All);
    let path = format!("GET /v1/file/{digest}");
    let (full, body) = rig.ask(&path, "").await;
    assert!(full.starts_with("HTTP/1.1 503 ") && full.contains("retry-after: 1\r\n") && body == b"busy\n", "{full}");
    assert_eq!(rig.ask("GET /v1/file/nothing", "").await.0, full, "full is full, whatever is asked");
    while rig.server.counters().connections > 0 {
        tokio::task::yield_now().await;
    }
    let held = [rig.connect().await, rig.connect().await, rig.connect().await];
    let mut answer = Vec::new();
    rig.connect().await.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, BUSY);
    drop(held);
    let near = rig_with(Setup { limits, ..Setup::default() });
    near.shelf.add(b"shown", For::All);
    assert!(near.ask(&path, "").await.0.starts_with("HTTP/1.1 200 "), "slots of their own");
    let shut = rig_with(Setup { limits: ServerLimits { upload_bytes_s: 0, ..ServerLimits::default() }, near: Near::nobody(), auth: None });
    assert!(shut.ask(&path, "").await.0.contains("retry-after: 3600\r\n"));
}

/// Quiet hours begin: what is under way ends too, and begins again with them over.
#[tokio::test(start_paused = true)]
async fn giving_is_stopped_and_taken_up() {
    let limits = ServerLimits { upload_bytes_s: 100_000, ..ServerLimits::default() };
    let rig = rig_with(Setup { limits, near: Near::nobody(), ..Setup::default() });
    let file = bytes(4 * PIECE);
    let path = format!("GET /v1/file/{}", rig.shelf.add(&file, For::All));
    let mut stream = rig.connect().await;
    stream.write_all(format!("{path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
    stream.read_exact(&mut [0; 10_000]).await.unwrap();
    rig.server.set_upload(0);
    let mut rest = Vec::new();
    // A reset says the same as an end.
    let _ = stream.read_to_end(&mut rest).await;
    assert!(rest.len() < file.len() / 2, "{} bytes came all the same", rest.len());
    assert!(rig.ask(&path, "").await.0.contains("retry-after: 3600\r\n"));
    rig.server.set_upload(10_000_000);
    let (head, body) = rig.ask(&path, "").await;
    assert!(head.starts_with("HTTP/1.1 200 ") && body == file, "{head}");
}

/// Who is on none of this machine's links gets no word, not even that there is nothing.
#[tokio::test]
async fn only_links_are_spoken_to() {
    let closed = rig_with(Setup { near: Near::links_of_machine_only(), ..Setup::default() });
    let path = format!("GET /v1/file/{}", closed.shelf.add(b"shown", For::All));
    assert!(closed.ask(&path, "").await.0.starts_with("HTTP/1.1 200 "), "loopback is a link");
    let far: std::net::SocketAddr = "192.0.2.1:9".parse().unwrap();
    let client = client().within(Arc::new(Near::links_of_machine_only()));
    let asked = client.have(far, &FileShape::of(Digest::of(b"shown"), 5)).await;
    assert!(matches!(asked, Err(PeerError::Gone)), "{asked:?}");
}

/// The uplink is somebody's: all strangers together get the rate and not more, and each gets some of it.
#[tokio::test(start_paused = true)]
async fn strangers_share_the_rate() {
    let limits = ServerLimits { upload_bytes_s: 1_000_000, ..ServerLimits::default() };
    let rig = rig_with(Setup { limits: limits.clone(), near: Near::nobody(), ..Setup::default() });
    let file = bytes(5_000_000);
    let digest = rig.shelf.add(&file, For::All);
    let path = format!("GET /v1/file/{digest}");
    let start = Instant::now();
    let (one, two) = tokio::join!(rig.ask(&path, ""), rig.ask(&path, "range: bytes=0-2499999\r\n"));
    assert!(one.1 == file && two.1 == file[..2_500_000]);
    // 7.5 MB at 1 MB/s, half a second of which is lent.
    let took = start.elapsed().as_millis();
    assert!((6_980..7_060).contains(&took), "{took} ms");
    assert_eq!(rig.server.counters().bytes_outside, 7_500_000);
    let near = rig_with(Setup { limits, ..Setup::default() });
    near.shelf.add(&file, For::All);
    let start = Instant::now();
    assert_eq!(near.ask(&path, "").await.1, file);
    assert!(start.elapsed() < Duration::from_secs(1), "no rate inside");
}

/// A slot is free again when the answer has gone, also when its receiver left in the middle.
#[tokio::test(start_paused = true)]
async fn slots_come_back() {
    let limits = ServerLimits { slots: 1, upload_bytes_s: 100_000, ..ServerLimits::default() };
    let rig = rig_with(Setup { limits, near: Near::nobody(), ..Setup::default() });
    let file = bytes(1_000_000);
    let digest = rig.shelf.add(&file, For::All);
    let path = format!("GET /v1/file/{digest}");
    let mut leaves = rig.connect().await;
    leaves.write_all(format!("{path} HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
    let mut some = vec![0; 1000];
    leaves.read_exact(&mut some).await.unwrap();
    assert!(rig.ask(&path, "").await.0.starts_with("HTTP/1.1 503 "));
    drop(leaves);
    while rig.server.counters().connections > 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(rig.ask(&path, "").await.1, file);
    assert_eq!(rig.server.counters().refused, 1);
}

/// A disk that hangs costs slots and not one thread after the other, and who asks is told to come back.
#[tokio::test(start_paused = true)]
async fn a_disk_that_hangs() {
    let rig = rig_with(Setup { limits: ServerLimits { slots_near: 1, ..ServerLimits::default() }, ..Setup::default() });
    let digest = rig.shelf.add(b"shown", For::All);
    let path = format!("GET /v1/file/{digest}");
    let shelf = Arc::clone(&rig.shelf);
    let (hangs, hanging) = std::sync::mpsc::channel();
    let (heals, healing) = std::sync::mpsc::channel::<()>();
    let disk = std::thread::spawn(move || {
        let _disk = shelf.disk.write();
        hangs.send(()).unwrap();
        healing.recv().unwrap();
    });
    hanging.recv().unwrap();
    let clock = async {
        while rig.server.counters().refused == 0 {
            tokio::time::advance(Duration::from_secs(1)).await;
        }
    };
    let start = Instant::now();
    let ((first, _), ()) = tokio::join!(rig.ask(&path, ""), clock);
    assert!(first.starts_with("HTTP/1.1 503 ") && start.elapsed().as_secs() >= 10, "{first}");
    assert!(rig.ask(&path, "").await.0.starts_with("HTTP/1.1 503 "), "the slot is still taken");
    heals.send(()).unwrap();
    disk.join().unwrap();
    while !rig.ask(&path, "").await.0.starts_with("HTTP/1.1 200 ") {}
}

/// A port that somebody else has is told with what to do, and the two families share one port that is free.
#[tokio::test]
async fn ports() {
    let rig = rig();
    let parts = |listen: &[&str]| ServerParts {
        listen: listen.iter().map(|address| address.parse().unwrap()).collect(),
        limits: ServerLimits::default(),
        near: Near::of_machine(),
        shelf: Arc::clone(&rig.shelf) as Arc<dyn Shelf>,
        partials: Arc::default(),
        facts: Arc::new(crate::peer::NoFacts::default()),
        auth: None,
        key: watch::channel(SigningKey::from_bytes(&KEY)).1,
    };
    let taken = rig.address.to_string();
    let err = PeerServer::start(parts(&[&taken])).expect_err("taken");
    assert_eq!(
        err.to_string(),
        format!(
            "listen on TCP {taken}: Address already in use (os error 98); another program has this port: end it, or choose another net.listen"
        )
    );
    assert!(matches!(PeerServer::start(parts(&[])), Err(ServeError::Nowhere)));
    let both = PeerServer::start(parts(&["127.0.0.1:0", "[::1]:0"])).unwrap();
    assert_eq!((both.local().len(), both.local()[0].port()), (2, both.local()[1].port()));
    let address = both.local()[0];
    drop(both);
    while TcpStream::connect(address).await.is_ok() {
        tokio::task::yield_now().await;
    }
}
