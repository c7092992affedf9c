//! A machine that gives other bytes than it says, with everything else of poolfs as it should be: its node announces, its
//! fleet names it as a holder, its lists of pieces are signed, and its answers fit the digests that they do not have.

use super::{Host, LIMIT};
use ed25519_dalek::SigningKey;
use poolfs_core::{Digest, Sums};
use poolfs_net::dht::{AnnounceKey, Family, Network};
use poolfs_net::discovery::{DiscoveryConfig, Links};
use poolfs_net::fleet::auth::FleetKey;
use poolfs_net::fleet::{Fleet, FleetOptions};
use poolfs_net::krpc::{Delta, Id, Pv};
use poolfs_net::node::{Dht, NodeOptions};
use poolfs_net::peer::{Audience, DeltaClaim, Facts, Near, PeerServer, ServerLimits, ServerParts, Shelf, Shelved};
use poolfs_net::swarm::FileShape;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use tokio::sync::oneshot;

/// The port of every machine on the wire.
const PORT: u16 = 9977;

/// A running liar; it ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Liar {
    given: Arc<AtomicU64>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Files with false bytes under true digests.
#[derive(Debug)]
struct FalseShelf {
    files: BTreeMap<Digest, (File, Arc<Sums>)>,
    given: Arc<AtomicU64>,
}

impl FalseShelf {
    /// As [`Self::new`], with one true file: a delta.
    fn with(mut self, bytes: &[u8]) -> Self {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        self.files.insert(Digest::of(bytes), (file, Arc::new(Sums::of(bytes))));
        self
    }

    fn new(files: &[(Digest, u64)], given: Arc<AtomicU64>) -> Self {
        let lie = |(digest, size): &(Digest, u64)| {
            let bytes: Vec<u8> = (0..*size).map(|at| u8::try_from((at / 5 + at / 4093) % 251).unwrap()).collect();
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&bytes).unwrap();
            // Its own checks find nothing wrong with it.
            (*digest, (file, Arc::new(Sums { digest: *digest, ..Sums::of(&bytes) })))
        };
        Self { files: files.iter().map(lie).collect(), given }
    }
}

impl Shelf for FalseShelf {
    fn find(&self, digest: &Digest, _: Audience) -> Option<Shelved> {
        let (file, sums) = self.files.get(digest)?;
        self.given.fetch_add(1, Ordering::Relaxed);
        Some(Shelved { file: file.try_clone().unwrap().into(), sums: Arc::clone(sums) })
    }

    fn damaged(&self, digest: &Digest, block: u64) {
        panic!("the lie about {digest} contradicts itself in block {block}");
    }
}

/// A delta that does not make what the liar signs that it makes.
#[derive(Clone, Debug)]
pub(crate) struct FalseDelta {
    pub(crate) old: Digest,
    pub(crate) new: Digest,
    pub(crate) bytes: Vec<u8>,
}

/// Vouches for the delta, with the key of the node that is being started.
struct FalseFacts {
    lie: Option<FalseDelta>,
    key: tokio::sync::watch::Receiver<SigningKey>,
}

impl FalseDelta {
    fn in_pv(&self) -> Delta {
        Delta { old: self.old.0, bytes: self.bytes.len() as u64, delta: Digest::of(&self.bytes).0, target: None }
    }
}

impl Facts for FalseFacts {
    fn reachable(&self) -> bool {
        true
    }

    fn deltas(&self, digest: &Digest) -> Vec<(Delta, DeltaClaim)> {
        let lie = self.lie.iter().filter(|lie| lie.new == *digest);
        let now_s = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        let sign = |lie: &FalseDelta| DeltaClaim::sign(lie.old, lie.new, Digest::of(&lie.bytes), &self.key.borrow(), now_s);
        lie.map(|lie| (lie.in_pv(), sign(lie))).collect()
    }

    fn proof(&self, _: &Digest) -> Option<Vec<u8>> {
        None
    }
}

impl Liar {
    /// Says on this host, to everybody, that it has this file, and signs that the delta makes it.
    pub(crate) fn with_delta(host: &Host, file: (Digest, u64), lie: FalseDelta) -> Self {
        Self::run(host, &[file], None, Some(lie))
    }

    /// Says on this host that it has these files: to the fleet of this key, or without one to everybody. Returns when it has joined.
    pub(crate) fn start(host: &Host, files: &[(Digest, u64)], key: Option<PathBuf>) -> Self {
        Self::run(host, files, key, None)
    }

    fn run(host: &Host, files: &[(Digest, u64)], key: Option<PathBuf>, lie: Option<FalseDelta>) -> Self {
        let given = Arc::<AtomicU64>::default();
        let shelf = FalseShelf::new(files, Arc::clone(&given));
        let shelf = Arc::new(lie.iter().fold(shelf, |shelf, lie| shelf.with(&lie.bytes)));
        let files = files.to_vec();
        let at = SocketAddr::new(host.address.into(), PORT);
        let (ready, joined) = std::sync::mpsc::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = host.spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let _running = tokio::time::timeout(LIMIT, join(at, &files, key, shelf, lie)).await.expect("the liar knows nobody");
                ready.send(()).unwrap();
                // An error means that the test is over, too.
                drop(stopped.await);
            });
        });
        joined.recv().expect("the liar does not start");
        Self { given, stop: Some(stop), thread: Some(thread) }
    }

    /// How often it was asked for one of its files.
    pub(crate) fn asked(&self) -> u64 {
        self.given.load(Ordering::Relaxed)
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("the liar ended badly");
        }
    }
}

/// Waits until another machine is known, and tells what there is.
async fn join(
    at: SocketAddr,
    files: &[(Digest, u64)],
    key: Option<PathBuf>,
    shelf: Arc<FalseShelf>,
    lie: Option<FalseDelta>,
) -> (Dht, Option<Fleet>, PeerServer) {
    let discovery = DiscoveryConfig { links: Some(Links::default()), ..DiscoveryConfig::default() };
    let dht = Dht::start(NodeOptions { discovery, ..NodeOptions::new(vec![at], Network::Private) }, None).await.unwrap();
    let key = key.map(|file| FleetKey::load(&file).unwrap());
    let fleet = match key {
        Some(key) => Some(Fleet::start(&dht, FleetOptions::new(Some(key), PORT), None).await),
        None => None,
    };
    let parts = ServerParts {
        listen: vec![dht.local(Family::V4).unwrap()],
        limits: ServerLimits::default(),
        near: Near::of_machine(),
        shelf,
        partials: Arc::default(),
        facts: Arc::new(FalseFacts { lie: lie.clone(), key: dht.keys() }),
        auth: fleet.as_ref().and_then(Fleet::auth),
        key: dht.keys(),
    };
    let server = PeerServer::start(parts).unwrap();
    match &fleet {
        Some(fleet) => {
            assert!(fleet.knows(2).await, "the fleet ended");
            fleet.arrived(files.iter().map(|(digest, size)| FileShape::of(*digest, *size)).collect()).await;
        }
        None => {
            dht.knows(2).await.unwrap();
            let deltas = lie.iter().map(FalseDelta::in_pv).collect();
            let pv = Pv { key: dht.signing_key().verifying_key().to_bytes(), flags: 0, deltas };
            let announce = |(digest, _): &(Digest, u64)| AnnounceKey { key: Id(digest.file_key()), pv: Some(pv.clone()) };
            dht.set_announces(files.iter().map(announce).collect()).await.unwrap();
        }
    }
    (dht, fleet, server)
}
