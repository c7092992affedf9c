//! The network process: the DHT's node, the fleet, the peer server, the downloads, and all that strangers send.
//!
//! It is this program as `poolfs serve-net DIR`, started by the process of the mounts ([`crate::net_process`]), at the other end
//! of the [`crate::wire`] that is its standard input. It knows of the mounts' side what comes over that wire: wants, what is
//! announced, and files as descriptors that only read. It opens nothing but its own directory, and ends with the wire.

mod shelf;

use crate::bridge::NetSource;
use crate::confine;
use crate::control::Uploaded;
use crate::deltas::offers::{OFFERS_MAX, TOLD_BYTES_MAX};
use crate::logging;
use crate::net_side::{NetSide, Seeker};
use crate::wire::{Answer, Delivered, FromNet, Memory, NetStatus, Outlet, Question, Setup, Socket, ToNet, WireError, seal};
use anyhow::{Context as _, Result, bail};
use poolfs_core::Digest;
use poolfs_fs::source::Want;
use poolfs_net::mirror::{Mirror, MirrorLimits};
use poolfs_net::peer::PeerServer;
use poolfs_net::reputation::{Reputation, Truth};
use poolfs_net::swarm::FileShape;
use poolfs_net::swarm::driver::{Swarm, Taker};
use poolfs_net::told::Watchers;
use shelf::WireShelf;
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::{AbortHandle, JoinSet};

/// Threads of the runtime: what waits for the network needs few.
const RUNTIME_THREADS: usize = 2;

/// How long the end of the process waits for tasks that still run.
const RUNTIME_PATIENCE: Duration = Duration::from_secs(2);

/// Serves until the wire is closed or it is told to end.
pub fn main() -> Result<()> {
    crate::sys::close_others();
    let wire = take_stdin().context("`poolfs serve-net` is started by the daemon: its standard input is a socket")?;
    let (ToNet::Setup(setup), _) = crate::wire::first(&wire)? else { bail!("the daemon does not say first what is to be set up") };
    logging::start(&setup.log)?;
    let confined = confine::network(&setup.dir).inspect_err(|err| {
        // The daemon may be gone, and then nobody is to be told.
        let _ = crate::wire::last(&wire, &FromNet::Refused(format!("{err:#}")));
    })?;
    tracing::info!("the network process runs as user {}; Landlock is enforced {}", confined.user, confined.landlock);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .enable_all()
        .thread_name("poolfs-net")
        .build()
        .context("start the runtime")?;
    let result = runtime.block_on(serve(wire, *setup));
    runtime.shutdown_timeout(RUNTIME_PATIENCE);
    result
}

/// The wire's end.
fn take_stdin() -> std::io::Result<OwnedFd> {
    let wire = std::io::stdin().as_fd().try_clone_to_owned()?;
    rustix::net::sockopt::socket_type(&wire)?;
    Ok(wire)
}

async fn serve(wire: OwnedFd, setup: Setup) -> Result<()> {
    let mut wire = Socket::new(wire)?;
    let outlet = wire.outlet();
    let shelf = Arc::new(WireShelf::new(outlet.clone()));
    let mut served = Served::start(setup, outlet.clone(), Arc::clone(&shelf)).await?;
    outlet.send(&FromNet::Started, Vec::new()).await?;
    loop {
        tokio::select! {
            received = wire.receive() => match received {
                Ok((message, fds)) => {
                    if served.take(message, fds).await?.is_break() {
                        break;
                    }
                }
                // Without the mounts there is nobody to work for.
                Err(WireError::Closed) => break,
                Err(err) => return Err(err.into()),
            },
            Some(ended) = served.wants.join_next_with_id() => {
                let task = match &ended {
                    Ok((task, ())) => *task,
                    Err(err) => err.id(),
                };
                served.wanted.retain(|_, wanted| wanted.task.id() != task);
                served.sought.retain(|_, search| search.id() != task);
            }
        }
    }
    served.side.stop().await;
    Ok(())
}

/// A want under way.
#[derive(Debug)]
struct Wanted {
    taker: Taker,
    task: AbortHandle,
}

/// Everything that runs here.
struct Served {
    side: NetSide,
    mirror: Arc<Mirror>,
    swarm: Arc<Swarm>,
    /// What is said of peers; `None` where there is no node.
    reputation: Option<Reputation>,
    /// Who watches what is told to others.
    watchers: Arc<Watchers>,
    source: NetSource,
    seeker: Seeker,
    /// What gives files to peers; `None` where it could not be started.
    server: Option<Arc<PeerServer>>,
    shelf: Arc<WireShelf>,
    outlet: Outlet,
    wanted: HashMap<u64, Wanted>,
    /// Searches for deltas under way.
    sought: HashMap<u64, AbortHandle>,
    /// The tasks of both.
    wants: JoinSet<()>,
}

impl Served {
    async fn start(setup: Setup, outlet: Outlet, shelf: Arc<WireShelf>) -> Result<Self> {
        let mut side = NetSide::start(&setup, outlet.clone()).await;
        let mirror = Arc::new(Mirror::new(mirror_limits(&setup.mirror)));
        let swarm = side.swarm(Arc::clone(&mirror), &setup)?;
        let source = NetSource::new(Arc::clone(&swarm), tokio::runtime::Handle::current());
        let seeker = side.seeker(Arc::clone(&swarm), &setup.net);
        let shown = Arc::clone(&shelf) as Arc<dyn poolfs_net::peer::Shelf>;
        let reputation = side.reputation(&swarm, &shown, Arc::clone(&shelf) as Arc<dyn Truth>, &setup);
        let server = side.serve(shown, &setup.net).map(Arc::new);
        let told = side.node().map(|node| node.dht.told()).unwrap_or_default();
        let watchers = Arc::new(Watchers::new(told));
        let (wanted, sought, wants) = (HashMap::new(), HashMap::new(), JoinSet::new());
        Ok(Self { side, mirror, swarm, reputation, watchers, source, seeker, server, shelf, outlet, wanted, sought, wants })
    }

    /// Does what a message says. Never waits for a stranger.
    async fn take(&mut self, message: ToNet, mut fds: Vec<OwnedFd>) -> Result<std::ops::ControlFlow<()>> {
        match message {
            ToNet::Setup(_) => bail!("the daemon sets up twice"),
            ToNet::Want { id, want } => self.want(id, *want, fds.pop()),
            ToNet::Took { id } => {
                if let Some(wanted) = self.wanted.get(&id) {
                    wanted.taker.took();
                }
            }
            ToNet::Leave { id } => {
                let task = self.wanted.remove(&id).map(|wanted| wanted.task).or_else(|| self.sought.remove(&id));
                if let Some(task) = task {
                    task.abort();
                }
            }
            ToNet::Seek { id, new, fleet_only } => self.seek(id, new, fleet_only),
            ToNet::FalseClaim(false_claim) => {
                let delta = fds.pop().map(|memory| Memory::check(memory, TOLD_BYTES_MAX)).transpose()?;
                self.seeker.false_claim(&false_claim, delta.map(|delta| delta.read()).transpose()?);
            }
            ToNet::Offer(offered) => self.side.offer(offered).await,
            ToNet::Verdict { digest, verdict } => self.source.verdict(digest, verdict),
            ToNet::Announce(keys) => self.side.announce(keys, self.server.is_some()).await,
            ToNet::Holdings { new, gone } => {
                if let Some(fleet) = self.side.fleet() {
                    fleet.gone(gone).await;
                    fleet.arrived(new.iter().map(|file| FileShape::of(file.digest, file.size)).collect()).await;
                }
            }
            ToNet::Found { id, size } => self.shelf.found(id, size, fds)?,
            ToNet::Tried { id, makes } => self.shelf.tried(id, makes)?,
            ToNet::Ask { id, question } => self.ask(id, question),
            ToNet::Log(level) => logging::set(&level)?,
            ToNet::Upload(bytes_s) => {
                if let Some(server) = &self.server {
                    server.set_upload(bytes_s);
                }
            }
            ToNet::Ping(count) => self.outlet.send(&FromNet::Pong(count), Vec::new()).await?,
            ToNet::Stop => return Ok(std::ops::ControlFlow::Break(())),
        }
        Ok(std::ops::ControlFlow::Continue(()))
    }

    fn want(&mut self, id: u64, want: Want, incoming: Option<OwnedFd>) {
        let outlet = self.outlet.clone();
        let mut deliveries = self.source.want(want, incoming);
        let taker = deliveries.taker();
        let task = self.wants.spawn(async move {
            // No more than the daemon lets wait: each takes up room until it says that it took it.
            while let Some(delivery) = deliveries.pass_on().await {
                let (what, fds) = Delivered::of(delivery);
                if outlet.send(&FromNet::Delivery { id, what }, fds).await.is_err() {
                    return;
                }
            }
        });
        self.wanted.insert(id, Wanted { taker, task });
    }

    fn seek(&mut self, id: u64, new: Digest, fleet_only: bool) {
        let (outlet, mut offers) = (self.outlet.clone(), self.seeker.offers(new, fleet_only));
        let task = self.wants.spawn(async move {
            for _ in 0..OFFERS_MAX {
                let Some(offer) = offers.recv().await else { break };
                if outlet.send(&FromNet::Offer { id, offer: Some(Box::new(offer)) }, Vec::new()).await.is_err() {
                    return;
                }
            }
            // An error means that nobody is there any more.
            let _ = outlet.send(&FromNet::Offer { id, offer: None }, Vec::new()).await;
        });
        self.sought.insert(id, task);
    }

    fn ask(&self, id: u64, question: Question) {
        let (outlet, swarm) = (self.outlet.clone(), Arc::clone(&self.swarm));
        match question {
            Question::Status => {
                let (node, server) = (self.side.node().cloned(), self.server.clone());
                let mut status = NetStatus {
                    fleet_members: self.side.fleet().map_or(0, |fleet| fleet.members() + 1),
                    fleet_told: self.side.fleet().map_or(0, poolfs_net::fleet::Fleet::told),
                    deltas_offered: self.side.deltas_offered(),
                    uploaded: server.as_deref().map(uploaded).unwrap_or_default(),
                    problems: self.side.problems().to_vec(),
                    node: None,
                };
                tokio::spawn(async move {
                    if let Some(node) = node {
                        // A node that ended has nothing to tell.
                        status.node = node.dht.status().await.ok();
                    }
                    answer(&outlet, id, Answer::Status(Box::new(status)), Vec::new()).await;
                });
            }
            Question::Peers => drop(tokio::spawn(async move { answer(&outlet, id, Answer::Peers(swarm.peers()), Vec::new()).await })),
            Question::Port => {
                let node = self.side.node().cloned();
                tokio::spawn(async move {
                    let seen = match node {
                        // One that ended is seen by nobody.
                        Some(node) => node.dht.port_seen_from_outside().await.unwrap_or_default(),
                        None => None,
                    };
                    answer(&outlet, id, Answer::Port(seen), Vec::new()).await;
                });
            }
            Question::Statements => {
                let reputation = self.reputation.clone();
                tokio::spawn(async move {
                    let rows = reputation.as_ref().map(Reputation::rows).unwrap_or_default();
                    answer(&outlet, id, Answer::Statements(rows), Vec::new()).await;
                });
            }
            Question::Told { watcher } => {
                let watchers = Arc::clone(&self.watchers);
                tokio::spawn(async move {
                    let told = watchers.next(watcher).await.map_err(|missed| missed.to_string());
                    answer(&outlet, id, Answer::Told(told), Vec::new()).await;
                });
            }
            Question::Why(digest) => drop(tokio::spawn(async move { answer(&outlet, id, why(&swarm, &digest), Vec::new()).await })),
            Question::Item(target) => {
                let seeker = self.seeker.clone();
                tokio::spawn(async move { answer(&outlet, id, Answer::Item(seeker.item(target).await), Vec::new()).await });
            }
            Question::IsMaker(files) => {
                let seeker = self.seeker.clone();
                tokio::spawn(async move { answer(&outlet, id, Answer::IsMaker(seeker.is_maker(files).await), Vec::new()).await });
            }
            Question::Document { url, proxy, bytes_max } => {
                let mirror = Arc::clone(&self.mirror);
                tokio::spawn(async move {
                    let fetched = mirror.document(&url, proxy.as_deref(), bytes_max).await;
                    match fetched.and_then(|bytes| seal(&bytes).map_err(|err| err.to_string())) {
                        Ok(memory) => answer(&outlet, id, Answer::Document(Ok(())), vec![memory]).await,
                        Err(why) => answer(&outlet, id, Answer::Document(Err(why)), Vec::new()).await,
                    }
                });
            }
        }
    }
}

fn why(swarm: &Swarm, digest: &Digest) -> Answer {
    Answer::Why(swarm.why(digest))
}

async fn answer(outlet: &Outlet, id: u64, answer: Answer, fds: Vec<OwnedFd>) {
    if let Err(err) = outlet.send(&FromNet::Answer { id, answer }, fds).await {
        tracing::debug!("an answer to the daemon: {err}");
    }
}

fn mirror_limits(config: &crate::config::Mirror) -> MirrorLimits {
    MirrorLimits {
        connect: Duration::from_secs(config.connect_timeout_s),
        first_byte: Duration::from_secs(config.first_byte_timeout_s),
        stall: Duration::from_secs(config.stall_timeout_s),
        rate_bytes_s_min: config.rate_min_bytes_s,
        ..MirrorLimits::default()
    }
}

fn uploaded(server: &PeerServer) -> Uploaded {
    let counters = server.counters();
    Uploaded {
        listening: server.local().to_vec(),
        bytes: counters.bytes,
        bytes_outside: counters.bytes_outside,
        answered: counters.answered,
        not_found: counters.not_found,
        refused: counters.refused,
        damaged: counters.damaged,
        connections: counters.connections,
    }
}
