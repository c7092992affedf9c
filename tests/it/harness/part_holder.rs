//! A machine that has a part of a file, and tells of it as it is told to: by the file's key, or by those of its pieces alone.

use super::{Host, LIMIT};
use poolfs_core::Digest;
use poolfs_net::dht::{AnnounceKey, Family, Network};
use poolfs_net::discovery::{DiscoveryConfig, Links};
use poolfs_net::krpc::{FLAG_PARTIAL, Id, Pv};
use poolfs_net::node::{Dht, NodeOptions};
use poolfs_net::peer::{Audience, Near, NoFacts, Partial, Partials, PeerServer, ServerLimits, ServerParts, Shelf, Shelved};
use poolfs_net::swarm::FileShape;
use poolfs_net::swarm::bits::Bits;
use poolfs_net::swarm::piece_list::PieceList;
use std::io::Write as _;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::oneshot;

/// The port of every machine on the wire.
const PORT: u16 = 9977;

/// What a part is told of by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ToldBy {
    /// The file's key, with the flag that it is a part.
    File,
    /// The keys of its pieces, and nothing else.
    Pieces,
}

/// Runs until it is dropped.
#[derive(Debug)]
pub(crate) struct PartHolder {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Nothing is whole here.
#[derive(Debug)]
struct Empty;

impl Shelf for Empty {
    fn find(&self, _: &Digest, _: Audience) -> Option<Shelved> {
        None
    }

    fn damaged(&self, digest: &Digest, block: u64) {
        panic!("block {block} of {digest}, which is not here");
    }
}

impl PartHolder {
    /// Has these pieces of the file `bytes`, on this host. Returns when it has announced them.
    pub(crate) fn start(host: &Host, bytes: &[u8], pieces: Range<u32>, told_by: ToldBy) -> Self {
        let at = SocketAddr::new(host.address.into(), PORT);
        let bytes = bytes.to_vec();
        let (ready, joined) = std::sync::mpsc::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = host.spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let running = tokio::time::timeout(LIMIT, join(at, &bytes, pieces, told_by));
                let _running = running.await.expect("the holder of a part knows nobody");
                ready.send(()).unwrap();
                // An error means that the test is over, too.
                drop(stopped.await);
            });
        });
        joined.recv().expect("the holder of a part does not start");
        Self { stop: Some(stop), thread: Some(thread) }
    }
}

impl Drop for PartHolder {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("the holder of a part ended badly");
        }
    }
}

async fn join(at: SocketAddr, bytes: &[u8], pieces: Range<u32>, told_by: ToldBy) -> (Dht, PeerServer) {
    let discovery = DiscoveryConfig { links: Some(Links::default()), ..DiscoveryConfig::default() };
    let dht = Dht::start(NodeOptions { discovery, ..NodeOptions::new(vec![at], Network::Private) }, None).await.unwrap();
    let shape = FileShape::of(Digest::of(bytes), bytes.len() as u64);
    let digests: Vec<Digest> = bytes.chunks(shape.piece_bytes as usize).map(Digest::of).collect();
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let list = Arc::new(PieceList::sign(&shape, digests.clone(), &dht.signing_key(), now_s));
    let mut have = Bits::none(shape.pieces());
    pieces.clone().for_each(|piece| have.set(piece));
    // What is not here is not in the file either.
    let mut file = tempfile::tempfile().unwrap();
    for piece in 0..shape.pieces() {
        let start = piece as usize * shape.piece_bytes as usize;
        let part = &bytes[start..bytes.len().min(start + shape.piece_bytes as usize)];
        file.write_all(&if have.has(piece) { part.to_vec() } else { vec![0; part.len()] }).unwrap();
    }
    let partials = Arc::new(Partials::default());
    assert!(partials.put(Partial { file: Arc::new(file.into()), shape, list, have, fleet_only: false }));
    let parts = ServerParts {
        listen: vec![dht.local(Family::V4).unwrap()],
        limits: ServerLimits::default(),
        near: Near::of_machine(),
        shelf: Arc::new(Empty),
        partials,
        facts: Arc::new(NoFacts { reachable: true }),
        auth: None,
        key: dht.keys(),
    };
    let server = PeerServer::start(parts).unwrap();
    dht.knows(2).await.unwrap();
    let pv = Pv { key: dht.signing_key().verifying_key().to_bytes(), flags: FLAG_PARTIAL, deltas: Vec::new() };
    let keys: Vec<Id> = match told_by {
        ToldBy::File => vec![Id(shape.digest.file_key())],
        ToldBy::Pieces => pieces.map(|piece| Id(digests[piece as usize].piece_key())).collect(),
    };
    let mut events = dht.events();
    let count = keys.len();
    dht.set_announces(keys.into_iter().map(|key| AnnounceKey { key, pv: Some(pv.clone()) }).collect()).await.unwrap();
    let mut announced = 0;
    while announced < count {
        if let poolfs_net::dht::Event::Announced { nodes: 1.., .. } = events.recv().await.unwrap() {
            announced += 1;
        }
    }
    (dht, server)
}
