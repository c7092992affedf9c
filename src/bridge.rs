//! Joins the mounts' border to the network, inside of the network process: what a source answers made of the swarm, and the swarm's
//! finder made of the node.
//!
//! Only plain values and descriptors go through. Each want is one task on the runtime; when its receiver is dropped, the
//! task and its connections end.

use poolfs_core::Digest;
use poolfs_fs::source::{Audience, Delivery, Giver, Purpose, SourceError, Verdict, Want};
use poolfs_net::dht::FoundContact;
use poolfs_net::krpc::{FLAG_PARTIAL, Id};
use poolfs_net::node::Dht;
use poolfs_net::swarm::driver::{self, DeliveryReceiver, Finder, FoundPeer, Holds, Swarm, SwarmDelivery, SwarmError, SwarmWant};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

const _: () = assert!(driver::DELIVERIES_WAITING_MAX <= poolfs_fs::source::DELIVERIES_WAITING_MAX, "the mounts' side calls more garbage");

/// Contacts that wait to be looked at.
const FOUND_WAITING_MAX: usize = 16;

/// The network as a source of missing pieces.
#[derive(Debug)]
pub struct NetSource {
    swarm: Arc<Swarm>,
    runtime: Handle,
}

impl NetSource {
    /// A source that asks `swarm`, with its tasks on `runtime`.
    pub fn new(swarm: Arc<Swarm>, runtime: Handle) -> Self {
        Self { swarm, runtime }
    }

    /// Starts to deliver, as [`Source::want`](poolfs_fs::source::Source::want) says.
    pub fn want(&self, want: Want, incoming: Option<OwnedFd>) -> DeliveryReceiver<Delivery> {
        let (out, deliveries) = driver::way();
        let swarm = Arc::clone(&self.swarm);
        self.runtime.spawn(async move {
            let Want { digest, size, urls, missing, purpose, audience } = want;
            let repair = purpose == Purpose::Repair;
            let want = SwarmWant {
                digest,
                size,
                urls,
                missing,
                incoming: incoming.map(Arc::new),
                repair,
                fleet_only: audience == Audience::Fleet,
            };
            // The state of a download is large, and most of it is not used where one stream is enough.
            let end = match Box::pin(swarm.fetch(want, &out, delivery)).await {
                Ok(()) => Delivery::Done,
                Err(SwarmError::Unwanted) => return,
                Err(SwarmError::Nowhere { why }) => Delivery::Failed(SourceError::Nowhere { digest, why }),
                Err(SwarmError::NotNow { why }) => Delivery::Failed(SourceError::NotNow { digest, why }),
            };
            // Nobody may wait for the end any more.
            let _ = out.send(end).await;
        });
        deliveries
    }

    /// Takes what the delivered bytes turned out to be.
    pub fn verdict(&self, digest: Digest, verdict: Verdict) {
        self.swarm.verdict(&digest, verdict == Verdict::Right);
    }
}

fn delivery(delivery: SwarmDelivery) -> Delivery {
    match delivery {
        SwarmDelivery::Piece { index, bytes, giver } => {
            let giver = match giver {
                driver::Giver::Mirror(host) => Giver::Mirror(host),
                driver::Giver::Peer(address) => Giver::Peer(address),
            };
            Delivery::Piece { index, bytes, giver }
        }
        SwarmDelivery::Checking { bytes } => Delivery::Checking { bytes },
    }
}

/// Finds holders through the node, if there is one.
#[derive(Debug)]
pub struct NodeFinder {
    dht: Option<Dht>,
}

impl NodeFinder {
    /// A finder that asks `dht`; without one it finds nobody.
    pub fn new(dht: Option<Dht>) -> Self {
        Self { dht }
    }

    /// Who is announced under these keys, looked up one after another: who has one piece mostly has others.
    fn look_up(&self, keys: Vec<Id>) -> mpsc::Receiver<FoundPeer> {
        let (out, found) = mpsc::channel(FOUND_WAITING_MAX);
        let Some(dht) = self.dht.clone() else { return found };
        let own = dht.signing_key().verifying_key().to_bytes();
        tokio::spawn(async move {
            for key in keys {
                let mut contacts = dht.stream_peers(key);
                loop {
                    tokio::select! {
                        contact = contacts.recv() => {
                            let Some(contact) = contact else { break };
                            if let Some(peer) = found_peer(&contact, &own)
                                && out.send(peer).await.is_err()
                            {
                                return;
                            }
                        }
                        // Dropping the contacts ends the lookup.
                        () = out.closed() => return,
                    }
                }
            }
        });
        found
    }
}

impl Finder for NodeFinder {
    fn find(&self, digest: Digest, _size: u64) -> mpsc::Receiver<FoundPeer> {
        self.look_up(vec![Id(digest.file_key())])
    }

    fn find_pieces(&self, pieces: Vec<Digest>) -> mpsc::Receiver<FoundPeer> {
        self.look_up(pieces.iter().map(|piece| Id(piece.piece_key())).collect())
    }

    fn median_lookup(&self) -> Option<Duration> {
        self.dht.as_ref()?.median_lookup()
    }
}

/// What a contact says of itself; `None` for this node's own.
fn found_peer(contact: &FoundContact, own: &[u8; 32]) -> Option<FoundPeer> {
    let pv = contact.pv.as_ref();
    if pv.is_some_and(|pv| pv.key == *own) {
        return None;
    }
    let contact: SocketAddr = contact.addr;
    let holds = match pv {
        Some(pv) if pv.flags & FLAG_PARTIAL == 0 => Holds::All,
        Some(_) => Holds::Part,
        // Announced through an ordinary node, which says nothing of partial files.
        None => Holds::Perhaps,
    };
    Some(FoundPeer { contact, key: pv.map(|pv| pv.key), holds })
}

#[cfg(test)]
mod tests {
    //! A download from HTTP to the file's place, through everything that is between.

    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use poolfs_core::piece::PIECE_BYTES;
    use poolfs_core::store::{Incoming, Store};
    use poolfs_fs::fetch::{FetchError, FetchLimits, Fetcher, Job};
    use poolfs_fs::source::{MirrorUrl, Purpose, Source};
    use poolfs_net::mirror::{Mirror, MirrorLimits};
    use poolfs_net::peer::{ClientLimits, Partials, PeerClient};
    use poolfs_net::swarm::driver::SwarmParts;
    use std::ffi::OsStr;
    use std::fmt::Write as _;
    use std::fs::File;
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::net::TcpListener;
    use std::os::fd::AsFd as _;
    use std::path::Path;
    use std::sync::mpsc as std_mpsc;

    /// Serves `/right`, `/wrong` (other bytes) and `/half` (the connection breaks, always); tells each request as
    /// "path range". Ends with the process of the test.
    fn serve(file: Vec<u8>) -> (String, std_mpsc::Receiver<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let (seen, requests) = std_mpsc::channel();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
                let Some(first) = lines.next() else { continue };
                let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
                let path = first.split(' ').nth(1).unwrap().to_owned();
                let range = headers.iter().find_map(|line| line.strip_prefix("range: bytes="));
                let mut bytes = file.clone();
                let mut head = String::from("HTTP/1.1 200 OK\r\nConnection: close\r\n");
                if let Some((start, last)) = range.and_then(|range| range.split_once('-')) {
                    let (start, last): (usize, usize) = (start.parse().unwrap(), last.parse().unwrap());
                    head = format!("HTTP/1.1 206 P\r\nConnection: close\r\nContent-Range: bytes {start}-{last}/{}\r\n", file.len());
                    bytes = bytes[start..=last].to_vec();
                }
                if path == "/wrong" {
                    bytes.iter_mut().for_each(|byte| *byte ^= 1);
                }
                write!(head, "Content-Length: {}\r\n\r\n", bytes.len()).unwrap();
                if path == "/half" {
                    bytes.truncate(PIECE_BYTES as usize + 10);
                }
                let _ = seen.send(format!("{path} {}", range.unwrap_or("all")));
                let _ = (&stream).write_all(head.as_bytes()).and_then(|()| (&stream).write_all(&bytes));
            }
        });
        (base, requests)
    }

    /// The network in this process.
    struct Near(NetSource);

    impl Source for Near {
        fn want(&self, want: Want, incoming: Option<OwnedFd>) -> mpsc::Receiver<Delivery> {
            let mut deliveries = self.0.want(want, incoming);
            let (out, taken) = mpsc::channel(1);
            self.0.runtime.spawn(async move {
                while let Some(delivery) = deliveries.pass_on().await {
                    if out.send(delivery).await.is_err() || out.reserve().await.is_err() {
                        return;
                    }
                    deliveries.taker().took();
                }
            });
            taken
        }

        fn verdict(&self, digest: Digest, verdict: Verdict) {
            self.0.verdict(digest, verdict);
        }
    }

    fn fetcher(dir: &Path, runtime: &Handle) -> Arc<Fetcher> {
        for name in ["incoming", "archives"] {
            std::fs::create_dir_all(dir.join(name)).unwrap();
        }
        let store = Arc::new(Store::open(&dir.join("state")).unwrap());
        let incoming = Arc::new(Incoming::open(store, File::open(dir.join("incoming")).unwrap().into()).unwrap());
        let parts = SwarmParts {
            mirror: Arc::new(Mirror::new(MirrorLimits::default())),
            client: PeerClient::new(ClientLimits::default()),
            finder: Arc::new(NodeFinder::new(None)),
            announcer: Arc::new(crate::net_side::Arriving::default()),
            partials: Arc::new(Partials::default()),
            netdb: None,
            spill_dir: dir.to_owned(),
            public: false,
            fleet: None,
            convictions: None,
        };
        let source = Arc::new(Near(NetSource::new(Swarm::new(parts).unwrap(), runtime.clone())));
        Fetcher::new(incoming, source, runtime.clone(), FetchLimits::default())
    }

    fn job(file: &[u8], base: &str, paths: &[&str]) -> Job {
        let url = |path: &&str| MirrorUrl { url: format!("{base}/{path}"), proxy: None, immutable: true, private: false };
        Job {
            digest: Digest::of(file),
            size: file.len() as u64,
            urls: paths.iter().map(url).collect(),
            purpose: Purpose::Read,
            audience: Audience::Everybody,
        }
    }

    fn file() -> Vec<u8> {
        (0..3 * PIECE_BYTES + 5).map(|at| u8::try_from(at / 9 % 251).unwrap()).collect()
    }

    /// The first URL has wrong bytes: the second is asked, and only right bytes get a name.
    #[test]
    fn the_second_url_has_the_right_bytes() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (base, requests) = serve(file());
        let fetcher = fetcher(dir.path(), runtime.handle());
        let fetched = runtime.block_on(fetcher.start(job(&file(), &base, &["wrong", "right"])).done()).unwrap();
        let archives = File::open(dir.path().join("archives")).unwrap();
        fetched.place(archives.as_fd(), OsStr::new("x.deb")).unwrap();
        assert_eq!(std::fs::read(dir.path().join("archives/x.deb")).unwrap(), file());
        assert_eq!(requests.try_iter().collect::<Vec<_>>(), ["/wrong all", "/right all"]);
    }

    /// A daemon that was started again asks for the rest, and for no byte twice.
    #[test]
    fn goes_on_after_a_restart() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (base, requests) = serve(file());
        let piece = PIECE_BYTES;
        {
            let fetcher = fetcher(dir.path(), runtime.handle());
            let error = runtime.block_on(fetcher.start(job(&file(), &base, &["half"])).done()).unwrap_err();
            assert!(matches!(error, FetchError::NotNow { .. }), "{error}");
        }
        let last = 3 * piece + 4;
        assert_eq!(requests.try_iter().collect::<Vec<_>>(), ["/half all".to_owned(), format!("/half {}-{last}", piece + 10)]);
        let fetcher = fetcher(dir.path(), runtime.handle());
        let fetched = runtime.block_on(fetcher.start(job(&file(), &base, &["right"])).done()).unwrap();
        assert_eq!(fetched.sums().digest, Digest::of(&file()));
        // The second answer had broken off behind the second piece.
        assert_eq!(requests.try_iter().collect::<Vec<_>>(), [format!("/right {}-{last}", 2 * piece)]);
    }
}
