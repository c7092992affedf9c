//! A peer on loopback that is honest, faulty or false on purpose, and a finder that knows what it is told.

#![allow(clippy::unwrap_used, reason = "tests")]

use super::super::{FoundPeer, Holds};
use crate::swarm::FileShape;
use crate::swarm::bits::Bits;
use crate::swarm::driver::Finder;
use crate::swarm::piece_list::PieceList;
use ed25519_dalek::SigningKey;
use parking_lot::Mutex;
use poolfs_core::Digest;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// How a peer answers for pieces.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    None,
    /// Other bytes in these pieces.
    Lies(Vec<u32>),
    /// The same, as one who says that the file is still arriving.
    PassesOnLies(Vec<u32>),
    /// Other bytes in each answer, never right ones.
    Changes,
    /// Other bytes in so many answers, and then nothing any more.
    LiesThenStalls(u32),
    /// Half of the piece, and then the connection is reset.
    Resets,
    /// Another piece, and says so.
    OtherRange,
    /// Closes one byte before the end.
    Short,
    /// One byte, a second, one byte.
    Drips,
    /// Promises and sends twice as much.
    Twice,
    /// The whole file to every Range.
    Whole,
    /// Never answers.
    Stalls,
    /// Closes everything after so many pieces.
    Dies(u32),
    /// 404.
    NotFound,
    /// 503 and a second, so many times.
    Full(u32),
}

/// Where the next peer listens: each has an address of its own, since verdicts are held against addresses.
static NEXT: AtomicU32 = AtomicU32::new(1);

pub(crate) struct FakePeer {
    pub(crate) contact: SocketAddr,
    pub(crate) asked: Arc<Mutex<Vec<u32>>>,
    asked_times: watch::Receiver<usize>,
    pub(crate) sent_bytes: Arc<AtomicUsize>,
    /// Pieces that were being asked of it at the same time, at most.
    pub(crate) at_once_max: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Drop for FakePeer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Serving {
    file: Vec<u8>,
    shape: FileShape,
    fault: Fault,
    list: Option<Vec<u8>>,
    /// The pieces that it says it has.
    has: Bits,
    asked: Arc<Mutex<Vec<u32>>>,
    asked_times: watch::Sender<usize>,
    sent_bytes: Arc<AtomicUsize>,
    at_once: AtomicUsize,
    at_once_max: Arc<AtomicUsize>,
}

impl FakePeer {
    pub(crate) async fn start(file: &[u8], fault: Fault) -> Self {
        Self::with_list(file, fault, None).await
    }

    /// With a list that this key signs over the pieces of `listed`.
    pub(crate) async fn with_list(file: &[u8], fault: Fault, list: Option<(&[u8], [u8; 32])>) -> Self {
        Self::with_part(file, 0..u32::MAX, fault, list).await
    }

    /// The same of one who has these pieces only.
    pub(crate) async fn with_part(file: &[u8], part: std::ops::Range<u32>, fault: Fault, list: Option<(&[u8], [u8; 32])>) -> Self {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let [_, b, c, d] = (n + 1).to_be_bytes();
        Self::part_at([127, b, c, d], file, part, fault, list).await
    }

    /// At this address.
    pub(crate) async fn at(address: [u8; 4], file: &[u8], fault: Fault, list: Option<(&[u8], [u8; 32])>) -> Self {
        Self::part_at(address, file, 0..u32::MAX, fault, list).await
    }

    async fn part_at(address: [u8; 4], file: &[u8], part: std::ops::Range<u32>, fault: Fault, list: Option<(&[u8], [u8; 32])>) -> Self {
        let listener = TcpListener::bind((std::net::Ipv4Addr::from(address), 0)).await.unwrap();
        let contact = listener.local_addr().unwrap();
        let shape = FileShape::of(Digest::of(file), file.len() as u64);
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let list = list.map(|(listed, key)| {
            let pieces = listed.chunks(shape.piece_bytes as usize).map(Digest::of).collect();
            PieceList::sign(&shape, pieces, &SigningKey::from_bytes(&key), now_s).encode(&shape)
        });
        let (asked, sent_bytes) = (Arc::<Mutex<Vec<u32>>>::default(), Arc::<AtomicUsize>::default());
        let at_once_max = Arc::<AtomicUsize>::default();
        let (count, asked_times) = watch::channel(0);
        let mut has = Bits::none(shape.pieces());
        part.take_while(|piece| *piece < shape.pieces()).for_each(|piece| has.set(piece));
        let serving = Arc::new(Serving {
            file: file.to_owned(),
            shape,
            fault,
            list,
            has,
            asked: Arc::clone(&asked),
            asked_times: count,
            sent_bytes: Arc::clone(&sent_bytes),
            at_once: AtomicUsize::new(0),
            at_once_max: Arc::clone(&at_once_max),
        });
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => {
                        connections.spawn(serve(accepted.unwrap().0, Arc::clone(&serving)));
                    }
                    Some(ended) = connections.join_next() => {
                        if ended.is_ok_and(|dies| dies) {
                            return; // With the listener and every connection.
                        }
                    }
                }
            }
        });
        Self { contact, asked, asked_times, sent_bytes, at_once_max, task }
    }

    pub(crate) fn found(&self) -> FoundPeer {
        FoundPeer { contact: self.contact, key: None, holds: Holds::All }
    }

    /// As one who says that it has a part.
    pub(crate) fn found_part(&self) -> FoundPeer {
        FoundPeer { holds: Holds::Part, ..self.found() }
    }

    pub(crate) fn pieces(&self) -> usize {
        self.asked.lock().len()
    }

    /// Waits until so many pieces were asked of it. Of an unknown peer the second one is asked when the first one has come.
    pub(crate) async fn is_asked(&self, times: usize) {
        self.asked_times.clone().wait_for(|asked| *asked >= times).await.unwrap();
    }
}

/// Serves one connection; `true`: the whole peer dies.
async fn serve(mut stream: TcpStream, serving: Arc<Serving>) -> bool {
    let mut buffer = Vec::new();
    loop {
        let end = loop {
            if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break end;
            }
            let mut part = [0; 4096];
            match stream.read(&mut part).await {
                Ok(read @ 1..) => buffer.extend_from_slice(&part[..read]),
                _ => return false,
            }
        };
        let head = String::from_utf8(buffer.drain(..end + 4).collect()).unwrap();
        let path = head.split(' ').nth(1).unwrap().to_owned();
        let full = |body: &[u8]| [format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len()).as_bytes(), body].concat();
        let not_found = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n".to_vec();
        if path.starts_with("/v1/file/") {
            let range = head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
            let (start, last) = match range.as_deref().and_then(|range| range.split_once('-')) {
                Some((start, last)) => (start.parse().unwrap(), last.trim().parse().unwrap()),
                None => (0, serving.file.len() - 1),
            };
            let running = serving.at_once.fetch_add(1, Ordering::Relaxed) + 1;
            serving.at_once_max.fetch_max(running, Ordering::Relaxed);
            let next = piece(&mut stream, &serving, start, last, range.is_some()).await;
            serving.at_once.fetch_sub(1, Ordering::Relaxed);
            match next {
                Next::Go => continue,
                Next::Close => return false,
                Next::Die => return true,
            }
        }
        let answer = match &serving.list {
            Some(list) if path.starts_with("/v1/pieces/") => full(list),
            _ if path.starts_with("/v1/have/") => full(serving.has.as_bytes()),
            _ => not_found,
        };
        if stream.write_all(&answer).await.is_err() {
            return false;
        }
    }
}

enum Next {
    Go,
    Close,
    Die,
}

async fn piece(stream: &mut TcpStream, serving: &Serving, start: usize, last: usize, ranged: bool) -> Next {
    let index = u32::try_from(start / serving.shape.piece_bytes as usize).unwrap();
    let nth = {
        let mut asked = serving.asked.lock();
        asked.push(index);
        serving.asked_times.send_replace(asked.len());
        u32::try_from(asked.len()).unwrap()
    };
    let mut body = serving.file[start..=last].to_vec();
    let mut range = format!("Content-Range: bytes {start}-{last}/{}\r\n", serving.file.len());
    let mut code = if ranged { 206 } else { 200 };
    let mut send = body.len();
    match &serving.fault {
        Fault::Lies(pieces) if pieces.contains(&index) => body.iter_mut().for_each(|byte| *byte ^= 0x55),
        Fault::PassesOnLies(pieces) => {
            range += "Poolfs-Arriving: 1\r\n";
            if pieces.contains(&index) {
                body.iter_mut().for_each(|byte| *byte ^= 0x55);
            }
        }
        Fault::Changes => body.iter_mut().for_each(|byte| *byte ^= u8::try_from(nth % 255).unwrap() + 1),
        Fault::LiesThenStalls(answers) if nth <= *answers => body.iter_mut().for_each(|byte| *byte ^= 0x55),
        Fault::LiesThenStalls(_) => std::future::pending().await,
        Fault::Resets => send /= 2,
        Fault::OtherRange => {
            let (start, last) = if start == 0 { (1, last + 1) } else { (start - 1, last - 1) };
            body = serving.file[start..=last].to_vec();
            range = format!("Content-Range: bytes {start}-{last}/{}\r\n", serving.file.len());
        }
        Fault::Short => send -= 1,
        Fault::Twice => {
            body = body.repeat(2);
            send = body.len();
        }
        Fault::Whole => {
            code = 200;
            range.clear();
            body.clone_from(&serving.file);
            send = body.len();
        }
        Fault::Stalls => std::future::pending().await,
        Fault::Dies(after) if nth > *after => return Next::Die,
        _ if !serving.has.has(index) => (code, body, send) = (404, Vec::new(), 0),
        Fault::NotFound => (code, body, send) = (404, Vec::new(), 0),
        Fault::Full(times) if nth <= *times => {
            range = "Retry-After: 1\r\n".to_owned();
            (code, body, send) = (503, Vec::new(), 0);
        }
        _ => {}
    }
    if !ranged || code == 404 {
        range.clear();
    }
    let head = format!("HTTP/1.1 {code} X\r\n{range}content-length: {}\r\n\r\n", body.len());
    if stream.write_all(head.as_bytes()).await.is_err() {
        return Next::Close;
    }
    if matches!(serving.fault, Fault::Drips) {
        for byte in &body {
            if stream.write_all(&[*byte]).await.is_err() {
                return Next::Close;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        return Next::Go;
    }
    for part in body[..send].chunks(16 * 1024) {
        if stream.write_all(part).await.is_err() {
            return Next::Close;
        }
        serving.sent_bytes.fetch_add(part.len(), Ordering::Relaxed);
    }
    if matches!(serving.fault, Fault::Resets) {
        socket2::SockRef::from(&*stream).set_linger(Some(Duration::ZERO)).unwrap();
    }
    if send == body.len() { Next::Go } else { Next::Close }
}

/// Finds what it is told, at once or later.
#[derive(Default)]
pub(crate) struct FakeFinder {
    pub(crate) found: Mutex<Vec<FoundPeer>>,
    pub(crate) median: Mutex<Option<Duration>>,
    pub(crate) searches: AtomicUsize,
    /// Who announces which piece, and what was sought.
    pub(crate) of_pieces: Mutex<Vec<(Digest, FoundPeer)>>,
    pub(crate) sought: Mutex<Vec<Vec<Digest>>>,
    /// Whether a search goes on, so that [`Self::finds`] adds to it.
    pub(crate) goes_on: AtomicBool,
    searching: Mutex<Vec<mpsc::Sender<FoundPeer>>>,
}

impl FakeFinder {
    /// The searches that go on find these peers too, and end.
    pub(crate) fn finds(&self, peers: &[FakePeer]) {
        for search in self.searching.lock().drain(..) {
            peers.iter().for_each(|peer| search.try_send(peer.found()).unwrap());
        }
    }
}

impl Finder for FakeFinder {
    fn find(&self, _digest: Digest, _size: u64) -> mpsc::Receiver<FoundPeer> {
        self.searches.fetch_add(1, Ordering::Relaxed);
        let found = self.found.lock().clone();
        let (tell, told) = mpsc::channel(found.len() + 8);
        found.into_iter().for_each(|peer| tell.try_send(peer).unwrap());
        if self.goes_on.load(Ordering::Relaxed) {
            self.searching.lock().push(tell);
        }
        told
    }

    fn find_pieces(&self, pieces: Vec<Digest>) -> mpsc::Receiver<FoundPeer> {
        let holders = self.of_pieces.lock();
        let found: Vec<FoundPeer> = holders.iter().filter(|(piece, _)| pieces.contains(piece)).map(|(_, peer)| *peer).collect();
        self.sought.lock().push(pieces);
        let (tell, told) = mpsc::channel(found.len().max(1));
        found.into_iter().for_each(|peer| tell.try_send(peer).unwrap());
        told
    }

    fn median_lookup(&self) -> Option<Duration> {
        *self.median.lock()
    }
}
