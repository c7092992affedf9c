//! The clients, and a server that answers with the bytes of the input.

use super::super::node::{join, split};
use crate::driver::{Subject, behaviour, kind_of, some};
use ed25519_dalek::SigningKey;
use poolfs_core::Digest;
use poolfs_core::catalog::MirrorUrl;
use poolfs_net::krpc::Pv;
use poolfs_net::mirror::{Mirror, MirrorError, MirrorFile, MirrorLimits, MirrorPiece};
use poolfs_net::peer::{About, ClientLimits, PeerClient, PeerError};
use poolfs_net::swarm::FileShape;
use poolfs_net::swarm::piece_list::PieceList;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};
use std::time::{Duration, SystemTime};

/// A server that sends what it is told, a connection after the other, and closes.
struct Liar {
    at: SocketAddr,
    /// The answers to come; an empty series closes each connection at once.
    answers: Arc<parking_lot::Mutex<std::collections::VecDeque<Vec<u8>>>>,
    /// Connections taken.
    taken: mpsc::Receiver<()>,
}

impl Liar {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let at = listener.local_addr().expect("its own address");
        let answers = Arc::<parking_lot::Mutex<std::collections::VecDeque<Vec<u8>>>>::default();
        let (told, taken) = mpsc::channel();
        let given = Arc::clone(&answers);
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("a socket's option");
                let answer = given.lock().pop_front();
                let _ended = told.send(());
                let mut request = [0; 4_096];
                // The whole request fits; without one there is nothing to answer.
                let Ok(1..) = stream.read(&mut request) else { continue };
                let _gone = stream.write_all(&answer.unwrap_or_default());
                let _gone = stream.shutdown(Shutdown::Write);
                // Until the client has gone: then it has read what it wanted.
                while stream.read(&mut request).is_ok_and(|read| read > 0) {}
            }
        });
        Self { at, answers, taken }
    }

    fn set(&self, answers: impl IntoIterator<Item = Vec<u8>>) {
        let mut all = self.answers.lock();
        all.clear();
        all.extend(answers);
        while self.taken.try_recv().is_ok() {}
    }

    fn connections(&self) -> usize {
        std::iter::from_fn(|| self.taken.try_recv().ok()).count()
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn contents(memory: OwnedFd) -> Vec<u8> {
    let mut bytes = Vec::new();
    let file = std::fs::File::from(memory);
    std::os::unix::fs::FileExt::read_at(&file, &mut [], 0).expect("it can be read");
    let length = file.metadata().expect("it has a length").len();
    bytes.resize(usize::try_from(length).expect("a piece"), 0);
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).expect("it can be read");
    bytes
}

/// The peer client.
pub(super) struct Peers {
    runtime: tokio::runtime::Runtime,
    liar: Liar,
}

impl Peers {
    pub(super) fn new() -> Self {
        Self { runtime: runtime(), liar: Liar::new() }
    }
}

fn small() -> FileShape {
    FileShape::of(Digest::of(b"ten bytes!"), 10)
}

fn large() -> FileShape {
    FileShape { digest: Digest::of(b"thirty bytes, in three pieces."), size: 30, piece_bytes: 12 }
}

impl Subject for Peers {
    fn run(&mut self, input: &[u8]) -> u64 {
        let Some((what, answer)) = input.split_first() else { return 0 };
        self.liar.set([answer.to_vec()]);
        let client = PeerClient::new(ClientLimits::default());
        let at = self.liar.at;
        let what = what % 7;
        let (small, large) = (small(), large());
        let said: Result<u64, PeerError> = self.runtime.block_on(async {
            Ok(match what {
                0 | 1 => {
                    let (shape, index) = if what == 0 { (small, 0) } else { (large, 1) };
                    let piece = client.piece(at, &shape, index, || {}).await?;
                    let bytes = contents(piece.bytes);
                    assert_eq!(bytes.len(), shape.piece_len(index) as usize, "a piece of another length");
                    assert_eq!(Digest::of(&bytes), piece.digest, "another digest than its bytes have");
                    u64::from(piece.arriving)
                }
                2 => {
                    let bits = client.have(at, &large).await?;
                    assert_eq!(bits.len(), large.pieces());
                    u64::from(bits.count())
                }
                3 => {
                    let list = client.list(at, &large).await?;
                    assert_eq!(list.pieces.len(), 3);
                    5
                }
                4 => some(client.about(at, &large.digest).await?.claims.len()).into(),
                5 => {
                    let proof = client.proof(at, &Digest::of(b"proof")).await?;
                    assert_eq!(proof, b"proof");
                    7
                }
                _ => some(client.members(at).await?.len()).into(),
            })
        });
        assert!(self.liar.connections() <= 1, "asks again by itself");
        drop(client);
        behaviour((what, said.map_err(|err| (format!("{err:?}").split(['(', ' ']).next().map(str::to_owned), kind_of(&err)))))
    }
}

pub(super) fn of_peers() -> Vec<Vec<u8>> {
    let answer = |what: u8, head: &str, body: &[u8]| {
        [&[what][..], format!("HTTP/1.1 {head}\r\ncontent-length: {}\r\n\r\n", body.len()).as_bytes(), body].concat()
    };
    let key = SigningKey::from_bytes(&[7; 32]);
    let now_s = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs();
    let pieces = b"thirty bytes, in three pieces.".chunks(12).map(Digest::of).collect();
    let list = PieceList::sign(&large(), pieces, &key, now_s).encode(&large());
    let about = About { pv: Pv { key: [3; 32], flags: 3, deltas: Vec::new() }, claims: Vec::new() }.encode();
    vec![
        answer(0, "200 OK", b"ten bytes!"),
        [&b"\0HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nten \r\n6\r\nbytes!\r\n0\r\n\r\n"[..]].concat(),
        answer(1, "206 Partial Content\r\ncontent-range: bytes 12-23/30\r\npoolfs-arriving: 1", b"s, in three "),
        answer(2, "200 OK", &[0b1010_0000]),
        answer(3, "200 OK", &list),
        answer(4, "200 OK", &about),
        answer(5, "200 OK", b"proof"),
        answer(6, "200 OK", b"le"),
        answer(0, "503 x\r\nretry-after: 5", b""),
        answer(0, "404 Not Found", b""),
    ]
}

/// The mirror client, behind a proxy, so that no redirect leads anywhere else.
pub(super) struct Mirrors {
    runtime: tokio::runtime::Runtime,
    liar: Liar,
}

/// Bytes of the file that is asked of the mirror: three pieces.
const FILE_BYTES: u64 = 2 * 262_144 + 5;

impl Mirrors {
    pub(super) fn new() -> Self {
        Self { runtime: runtime(), liar: Liar::new() }
    }
}

impl Subject for Mirrors {
    fn run(&mut self, input: &[u8]) -> u64 {
        self.liar.set(split(input).map(<[u8]>::to_vec).take(8));
        let small = input.len().is_multiple_of(2);
        let size = if small { 10 } else { FILE_BYTES };
        let url = MirrorUrl {
            url: "http://user:very-secret@mirror.example/debian/pool/a_1_all.deb".to_owned(),
            proxy: Some(format!("http://{}/", self.liar.at)),
            immutable: !input.len().is_multiple_of(3),
            private: false,
        };
        let missing = if small { vec![0] } else { vec![2] };
        let file = MirrorFile { digest: Digest([5; 32]), size, urls: vec![url], missing };
        let mirror = Mirror::new(MirrorLimits::default());
        let (result, pieces) = self.runtime.block_on(async {
            let (out, mut pieces) = tokio::sync::mpsc::channel::<MirrorPiece>(8);
            let result = mirror.fetch(&file, &out, |piece| piece).await;
            drop(out);
            let mut all = Vec::new();
            while let Some(piece) = pieces.recv().await {
                all.push(piece);
            }
            (result, all)
        });
        for MirrorPiece { index, bytes, host } in &pieces {
            assert!(file.missing.contains(index), "a piece that nobody asked for");
            let length = bytes.try_clone().map(std::fs::File::from).and_then(|file| file.metadata()).expect("a length").len();
            assert_eq!(length, if small { 10 } else { 5 }, "a piece of another length");
            assert!(!host.contains("secret"), "{host}");
        }
        assert_eq!(result.is_ok(), pieces.len() == 1, "{result:?} with {} pieces", pieces.len());
        let connections = self.liar.connections();
        assert!(connections <= 24, "{connections} connections for one piece");
        assert!(mirror.counters().bytes <= 2 * input.len() as u64, "counts more bytes than came");
        let kind = result.map_err(|err| {
            let text = err.to_string();
            assert!(!text.contains("secret") && !text.contains("user:"), "tells a password: {text}");
            (matches!(err, MirrorError::NotNow { .. }), kind_of(text))
        });
        behaviour((kind, some(connections), mirror.counters().redirects.min(3)))
    }
}

pub(super) fn of_mirrors() -> Vec<Vec<u8>> {
    let answer = |head: &str, body: &[u8]| [format!("HTTP/1.1 {head}\r\ncontent-length: {}\r\n\r\n", body.len()).as_bytes(), body].concat();
    let range = answer("206 Partial Content\r\ncontent-range: bytes 524288-524292/524293\r\netag: \"a\"", b"12345");
    let whole = answer("200 OK\r\netag: \"a\"", b"ten bytes!");
    let mut all = vec![
        whole.clone(),
        range.clone(),
        join(&[answer("302 Found\r\nlocation: /other", b""), whole.clone()]),
        join(&[answer("302 Found\r\nlocation: http://h.example/x", b""), range.clone()]),
        join(&[whole[..whole.len() - 4].to_vec(), answer("206 x\r\ncontent-range: bytes 0-9/10", b"ten bytes!")]),
        answer("404 Not Found", b"<html>"),
        answer("503 x\r\nretry-after: 1", b""),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nten \r\n6\r\nbytes!\r\n0\r\n\r\n".to_vec(),
    ];
    // Whether the small or the large file is asked for, and whether its URL may change, depends on the length.
    for at in 0..all.len() {
        for pad in 1..4 {
            let mut longer = all[at].clone();
            let head_end = longer.windows(2).position(|w| w == b"\r\n").unwrap_or(0);
            longer.splice(head_end..head_end, std::iter::repeat_n(b'K', pad));
            all.push(longer);
        }
    }
    all
}
