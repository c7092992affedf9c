//! Downloads for real: the machines of this module's parent behind sockets, clocks and tasks.
//!
//! [`Swarm::fetch`] brings one file in. As long as no peer is known, it is what it would be without any: one streaming
//! request to the mirror, whose pieces are passed on as they come. When a peer with the file turns up, the download goes over
//! to [`Schedule`](super::schedule): what is here stays, the rest comes from whoever is sooner, the mirror piece by piece among
//! them. In a fleet with other members the coordinators say what comes from where, small files too. Otherwise small files are asked of peers only where finding them is quick, or where the mirror fails.
//!
//! **Invariants.** Nothing of a private repository is asked of anybody but its mirror. A piece passed on may be replaced by a
//! later one until the file is done. Whoever waits for the pieces hashes the whole file again and alone decides that it is
//! right. Dropping the future of [`Swarm::fetch`], or its receiver, ends its requests. One download is one task with its
//! requests; what downloads share is behind one lock that is never held over a wait.

mod book;
mod deltas;
mod download;
mod hunt;
mod kept;
mod lanes;
mod led;
mod outlet;
mod repair;
mod stream;
#[cfg(test)]
mod tests;
mod way;

pub use book::{Giver, History, PeerRow};
pub use way::{Closed, DELIVERIES_WAITING_MAX, DeliveryReceiver, DeliverySender, Room, Taker, way};

use crate::fleet::Fleet;
use crate::mirror::{Mirror, MirrorError};
use crate::netdb::{NetDb, NetDbError};
use crate::peer::{Partials, PeerClient};
use crate::reputation::Conviction;
use crate::swarm::FileShape;
use crate::swarm::bits::Bits;
use crate::swarm::blame::NotHad;
use crate::swarm::schedule::HEAD_START;
use book::Book;
use download::{Download, End, Start};
use hunt::Hunt;
use outlet::Outlet;
use parking_lot::Mutex;
use poolfs_core::Digest;
use poolfs_core::catalog::MirrorUrl;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use stream::StreamEnd;
use tokio::sync::{mpsc, watch};

/// How much of a file a contact says it has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Holds {
    /// The whole file.
    All,
    /// It is downloading the file.
    Part,
    /// Nobody said: it is to be asked.
    Perhaps,
}

/// A contact that may have a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FoundPeer {
    /// Where it serves pieces.
    pub contact: SocketAddr,
    /// The key under which it announced itself, if it said so.
    pub key: Option<[u8; 32]>,
    /// How much of the file it has.
    pub holds: Holds,
}

/// Finds holders of files.
pub trait Finder: Send + Sync + 'static {
    /// Starts to look for holders of a file; the channel closes when the search is over. Dropping it ends the search.
    fn find(&self, digest: Digest, size: u64) -> mpsc::Receiver<FoundPeer>;

    /// The same for who announces one of these pieces, by their SHA-256: holders of an incomplete file, perhaps of nothing else
    /// of it.
    fn find_pieces(&self, pieces: Vec<Digest>) -> mpsc::Receiver<FoundPeer>;

    /// The median of how long lately a search took to find its first holder; `None` if there were too few.
    fn median_lookup(&self) -> Option<Duration>;
}

/// Tells others that a file is being downloaded here, so that they can ask for what is here of it.
pub trait Announcer: Send + Sync + 'static {
    /// A download that peers may know of has begun.
    fn begun(&self, digest: Digest, size: u64);

    /// These pieces of it are here and are what its signed list says.
    fn checked(&self, digest: Digest, pieces: &[Digest]);

    /// That list is not believed any more, and so its pieces are not either.
    fn unchecked(&self, digest: Digest);

    /// It is over, whatever became of it.
    fn ended(&self, digest: Digest);
}

/// A file that is wanted.
#[derive(Debug)]
pub struct SwarmWant {
    /// What a signed index says of it.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// The mirror's URLs, best first; empty: peers only.
    pub urls: Vec<MirrorUrl>,
    /// The pieces of [`PIECE_BYTES`](poolfs_core::piece::PIECE_BYTES) that are missing, ascending.
    pub missing: Vec<u32>,
    /// Reads the file as far as it is here.
    pub incoming: Option<Arc<OwnedFd>>,
    /// Single pieces of a file whose piece digests the asker knows: nothing is compared here.
    pub repair: bool,
    /// Strangers are neither asked for it nor given any of it.
    pub fleet_only: bool,
}

/// What [`Swarm::fetch`] hands over.
#[derive(Debug)]
pub enum SwarmDelivery {
    /// A piece; a later one with the same index takes its place.
    Piece {
        /// Which piece of [`PIECE_BYTES`](poolfs_core::piece::PIECE_BYTES).
        index: u32,
        /// A memfd sealed against every change that holds exactly the piece.
        bytes: OwnedFd,
        /// Who gave it.
        giver: Giver,
    },
    /// Bytes that arrived to be compared, and are not part of the file.
    Checking {
        /// How many.
        bytes: u64,
    },
}

/// Why a file was not brought in, by what the asker does next.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SwarmError {
    /// No source has it, or what they have is not it.
    #[error("{why}")]
    Nowhere {
        /// For people.
        why: String,
    },
    /// It may work later.
    #[error("{why}")]
    NotNow {
        /// For people.
        why: String,
    },
    /// Nobody waits for it any more.
    #[error("nobody waits for it any more")]
    Unwanted,
}

impl From<MirrorError> for SwarmError {
    fn from(err: MirrorError) -> Self {
        let why = err.to_string();
        match err {
            MirrorError::Nowhere { .. } => Self::Nowhere { why },
            MirrorError::NotNow { .. } => Self::NotNow { why },
            MirrorError::Unwanted => Self::Unwanted,
        }
    }
}

/// What a swarm is made of.
pub struct SwarmParts {
    /// The mirror client.
    pub mirror: Arc<Mirror>,
    /// The peer client.
    pub client: PeerClient,
    /// Finds holders.
    pub finder: Arc<dyn Finder>,
    /// Tells others.
    pub announcer: Arc<dyn Announcer>,
    /// Where the peer server finds what is being downloaded.
    pub partials: Arc<Partials>,
    /// Where verdicts and ratings are kept; `None`: nowhere.
    pub netdb: Option<Arc<NetDb>>,
    /// A directory for unlinked files, on a disk.
    pub spill_dir: PathBuf,
    /// Whether strangers are in the network.
    pub public: bool,
    /// The fleet that this machine is of, if it is of one.
    pub fleet: Option<Fleet>,
    /// Where it is told what was proved of others; `None`: nowhere.
    pub convictions: Option<mpsc::Sender<Conviction>>,
}

/// Pieces of repairs that were wrong, so that another peer is asked.
const REPAIR_DOUBTS_MAX: usize = 256;

/// Downloads files from peers and the mirror; one per process.
pub struct Swarm {
    parts: SwarmParts,
    book: Arc<Book>,
    /// Peers that gave a wrong piece to a repair, the newest last.
    repair_gave: Mutex<VecDeque<(Digest, SocketAddr, bool)>>,
    hints: deltas::Hints,
    lanes: lanes::Lanes,
}

impl std::fmt::Debug for SwarmParts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SwarmParts").field("public", &self.public).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Swarm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Swarm").field("public", &self.parts.public).finish_non_exhaustive()
    }
}

impl Swarm {
    /// Opens the book and is ready; blocks for the disk.
    pub fn new(parts: SwarmParts) -> Result<Arc<Self>, NetDbError> {
        let book = Arc::new(Book::open(parts.netdb.clone(), parts.convictions.clone(), now_s())?);
        Ok(Arc::new(Self { parts, book, repair_gave: Mutex::default(), hints: deltas::Hints::default(), lanes: lanes::Lanes::default() }))
    }

    /// Brings a file in: sends what arrives, wrapped, to `out`, and returns when every missing piece was handed over and none
    /// will be replaced any more.
    pub async fn fetch<T, F>(&self, want: SwarmWant, out: &DeliverySender<T>, wrap: F) -> Result<(), SwarmError>
    where
        T: Send,
        F: Fn(SwarmDelivery) -> T + Send + Sync,
    {
        let shape = FileShape::of(want.digest, want.size);
        let mut outlet = Outlet::new(&want, out, &wrap);
        tokio::select! {
            biased;
            () = out.closed() => Err(SwarmError::Unwanted),
            result = self.fetch_for(&want, shape, &mut outlet) => result,
        }
    }

    /// What the asker found out about the bytes of a file.
    pub fn verdict(&self, digest: &Digest, right: bool) {
        self.parts.mirror.verdict(digest, right);
        let mut gave = self.repair_gave.lock();
        if right {
            gave.retain(|(file, ..)| file != digest);
        } else {
            gave.iter_mut().filter(|(file, ..)| file == digest).for_each(|(.., wrong)| *wrong = true);
        }
    }

    /// Every peer that is remembered, most bytes first.
    pub fn peers(&self) -> Vec<PeerRow> {
        self.book.lock().peers(now_s())
    }

    /// The keys of peers that verified files have credited.
    pub fn credited_keys(&self) -> Vec<[u8; 32]> {
        self.book.lock().credited_keys(now_s())
    }

    /// Changes when another key may be among [`Self::credited_keys`].
    pub fn met(&self) -> watch::Receiver<u64> {
        self.book.met()
    }

    /// Puts all peers with this key back among the unknown; returns how many that were credited. Who gives verified files from then on
    /// is credited again.
    pub fn doubt(&self, key: &[u8; 32]) -> usize {
        let count = self.book.lock().doubt(key, now_s());
        self.save();
        count
    }

    /// Who gave which piece of a file that was downloaded since the start, if it is remembered.
    pub fn why(&self, digest: &Digest) -> Option<History> {
        self.book.lock().history(digest).cloned()
    }

    async fn fetch_for<T: Send>(&self, want: &SwarmWant, shape: FileShape, outlet: &mut Outlet<'_, T>) -> Result<(), SwarmError> {
        if want.repair {
            return self.repair(want, shape, outlet).await;
        }
        let private = want.urls.iter().any(|url| url.private);
        let affordable = want.urls.is_empty() || self.book.lock().budget.peers_allowed(want.size, std_now());
        let peers_allowed = !private && !want.fleet_only && affordable;
        // Of what no index names the coordinators know nothing, and its holders are known.
        let mut holders = if want.urls.is_empty() { self.hints.holders(&want.digest) } else { Vec::new() };
        holders.retain(|holder| !want.fleet_only || self.is_member(holder.contact));
        if !holders.is_empty() {
            let here = stream::hash_here(want, shape, outlet, &VecDeque::new()).await?;
            let start = Start { here, holders, ..Start::default() };
            return self.download(want, shape, start, Hunt::none(shape, self), None, outlet).await;
        }
        if !private && let Some(fleet) = self.parts.fleet.as_ref().filter(|fleet| fleet.members() > 0) {
            let here = stream::hash_here(want, shape, outlet, &VecDeque::new()).await?;
            let mut has = Bits::none(shape.pieces());
            here.iter().for_each(|here| has.set(here.piece));
            if let Some(plan) = fleet.plan(shape, has).await {
                let start = Start { here, fleet: Some(plan), ..Start::default() };
                return self.download(want, shape, start, Hunt::none(shape, self), None, outlet).await;
            }
        }
        let small = shape.pieces() <= 1;
        let quick = small && self.parts.finder.median_lookup().is_some_and(|median| median < HEAD_START);
        let mut start = Start::default();
        let mut hunt = (peers_allowed && (!small || quick || want.urls.is_empty())).then(|| self.hunt(shape));
        let mut mirror_error = None;
        let peers_first = quick && peers_allowed;
        if !want.urls.is_empty() && !peers_first {
            match self.stream(want, shape, hunt.as_mut(), outlet).await? {
                StreamEnd::Done => {
                    self.remember(outlet);
                    return Ok(());
                }
                StreamEnd::Peers(handed_on) => start = handed_on,
                StreamEnd::Failed(error, _) if !peers_allowed => return Err(error.into()),
                // Peers may have what the mirror has not.
                StreamEnd::Failed(error, left) => {
                    mirror_error = Some(error);
                    start = left;
                }
            }
        } else if !want.urls.is_empty() {
            start.mirror_after = Some(HEAD_START);
        }
        if start.here.is_empty() && mirror_error.is_none() {
            start.here = stream::hash_here(want, shape, outlet, &VecDeque::new()).await?;
        }
        let hunt = hunt.unwrap_or_else(|| if want.fleet_only { Hunt::none(shape, self) } else { self.hunt(shape) });
        self.download(want, shape, start, hunt, mirror_error, outlet).await
    }

    /// One download from several sources, with what follows it.
    async fn download<T: Send>(
        &self,
        want: &SwarmWant,
        shape: FileShape,
        start: Start,
        hunt: Hunt,
        mirror_error: Option<MirrorError>,
        outlet: &mut Outlet<'_, T>,
    ) -> Result<(), SwarmError> {
        let mut download = Download::new(self, want, shape, start, hunt, outlet)?;
        let end = download.run().await;
        let mirror = download.mirror_answers();
        drop(download);
        self.save();
        match end {
            Ok(()) => {
                // The fleet hears of it from whoever keeps it: not every file that is had here gets a place.
                self.remember(outlet);
                Ok(())
            }
            Err(End::Unwanted) => Err(SwarmError::Unwanted),
            // A mirror that knows no ranges is of use as a stream from the start.
            Err(End::NotHad(NotHad::NoSource(_))) if mirror.as_ref().is_some_and(|(_, no_ranges)| *no_ranges) => {
                match self.stream(want, shape, None, outlet).await? {
                    StreamEnd::Failed(error, _) => Err(error.into()),
                    StreamEnd::Done | StreamEnd::Peers(_) => {
                        self.remember(outlet);
                        Ok(())
                    }
                }
            }
            Err(End::NotHad(why)) => {
                let mirror = mirror_error.map(|error| error.to_string()).or(mirror.map(|(answers, _)| answers));
                Err(not_had(why, mirror.filter(|text| !text.is_empty())))
            }
        }
    }

    fn is_member(&self, contact: SocketAddr) -> bool {
        self.parts.fleet.as_ref().is_some_and(|fleet| fleet.is_member(contact))
    }

    /// The client that shows other members the fleet's key, where there is one.
    fn fleet_client(&self) -> PeerClient {
        let auth = self.parts.fleet.as_ref().and_then(Fleet::auth);
        auth.map_or_else(|| self.parts.client.clone(), |auth| self.parts.client.for_fleet(auth))
    }

    fn hunt(&self, shape: FileShape) -> Hunt {
        let known = self.book.lock().credited(hunt::KNOWN_ASKED_MAX, now_s());
        Hunt::new(shape, self.parts.client.clone(), Arc::clone(&self.book), known, self.parts.finder.find(shape.digest, shape.size))
    }

    /// Notes who gave what of a file that is complete.
    fn remember<T>(&self, outlet: &Outlet<'_, T>) {
        self.book.lock().remember(outlet.shape().digest, outlet.history(now_s()));
    }

    /// Writes what downloads have learned, on a thread that may block.
    fn save(&self) {
        let book = Arc::clone(&self.book);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = book.save(now_s()) {
                tracing::warn!("keep what was learned of peers: {error}");
            }
        });
    }
}

fn not_had(why: NotHad, mirror: Option<String>) -> SwarmError {
    let text = match mirror {
        Some(mirror) => format!("{why}; mirror: {mirror}"),
        None => why.to_string(),
    };
    match why {
        NotHad::MirrorWrong | NotHad::Undecided => SwarmError::Nowhere { why: text },
        NotHad::NoSource(_) | NotHad::BudgetSpent | NotHad::LocalRead => SwarmError::NotNow { why: text },
    }
}

/// Unix seconds.
fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The runtime's clock, which tests can stop, as the machines take it.
fn std_now() -> std::time::Instant {
    tokio::time::Instant::now().into_std()
}
