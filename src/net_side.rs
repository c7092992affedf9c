//! The network side, inside of the network process: the DHT's node, its database, the fleet, downloads and the server.
//!
//! What goes wrong here is a line in the status, and the files come from the mirror.

mod deltas;

pub use deltas::Seeker;

use crate::bridge::NodeFinder;
use crate::config;
use crate::deltas::offers::Offered;
use crate::wire::{Announced, Checked, FromNet, Outlet, Setup};
use anyhow::Result;
use deltas::{Board, OwnFacts};
use parking_lot::Mutex;
use poolfs_core::Digest;
use poolfs_net::dht::{AnnounceKey, Family, PIECE_KEYS_PER_FILE_MAX};
use poolfs_net::discovery::{DiscoveryConfig, Links};
use poolfs_net::fleet::auth::FleetKey;
use poolfs_net::fleet::{Fleet, FleetOptions};
use poolfs_net::krpc::{FLAG_PARTIAL, FLAG_REACHABLE, Id, Pv};
use poolfs_net::mirror::Mirror;
use poolfs_net::netdb::NetDb;
use poolfs_net::node::{Dht, NodeOptions, expand_listen};
use poolfs_net::peer::{ClientLimits, Near, Partials, PeerClient, PeerServer, ServerLimits, ServerParts, Shelf};
use poolfs_net::reputation::{Conviction, KeptProofs, NodeFacts, Reputation, ReputationParts, Truth};
use poolfs_net::swarm::FileShape;
use poolfs_net::swarm::driver::{Swarm, SwarmParts};
use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;

/// How long the end waits for the routing tables to be saved.
const SAVE_PATIENCE: Duration = Duration::from_secs(5);

/// A running node with its database.
#[derive(Clone, Debug)]
pub struct NetNode {
    /// The node.
    pub dht: Dht,
    /// Its database, which the modules of the network side share.
    pub netdb: Arc<NetDb>,
}

/// Files that are arriving and are announced with the partial flag; more are not told of.
pub const ARRIVING_MAX: usize = 64;

/// Shortest time between two messages of what pieces of them are here.
const CHECKED_INTERVAL: Duration = Duration::from_secs(1);

/// What was proved and waits to be spoken of; more is not told.
const CONVICTIONS_MAX: usize = 64;

/// The files that are arriving and that peers may know of.
#[derive(Debug, Default)]
pub struct Arriving {
    /// Each with its pieces that are here and that its signed list bears out, as far as they are told of.
    files: Mutex<BTreeMap<Digest, Vec<Digest>>>,
    changed: Notify,
    checked: Notify,
}

impl poolfs_net::swarm::driver::Announcer for Arriving {
    fn begun(&self, digest: Digest, _size: u64) {
        let mut files = self.files.lock();
        if files.len() < ARRIVING_MAX {
            files.insert(digest, Vec::new());
            self.changed.notify_one();
        }
    }

    fn checked(&self, digest: Digest, pieces: &[Digest]) {
        if let Some(known) = self.files.lock().get_mut(&digest) {
            for piece in pieces {
                if known.len() < PIECE_KEYS_PER_FILE_MAX && !known.contains(piece) {
                    known.push(*piece);
                    self.checked.notify_one();
                }
            }
        }
    }

    fn unchecked(&self, digest: Digest) {
        if let Some(known) = self.files.lock().get_mut(&digest).filter(|known| !known.is_empty()) {
            known.clear();
            self.checked.notify_one();
        }
    }

    fn ended(&self, digest: Digest) {
        if let Some(pieces) = self.files.lock().remove(&digest) {
            self.changed.notify_one();
            if !pieces.is_empty() {
                self.checked.notify_one();
            }
        }
    }
}

impl Arriving {
    /// Tells of every change, until the wire is closed.
    async fn tell(self: Arc<Self>, outlet: Outlet) {
        loop {
            self.changed.notified().await;
            let digests = self.files.lock().keys().copied().collect();
            if outlet.send(&FromNet::Arriving(digests), Vec::new()).await.is_err() {
                return;
            }
        }
    }

    /// Tells of pieces, a second's together, until the wire is closed.
    async fn tell_pieces(self: Arc<Self>, outlet: Outlet) {
        loop {
            self.checked.notified().await;
            tokio::time::sleep(CHECKED_INTERVAL).await;
            let checked: Vec<Checked> = {
                let files = self.files.lock();
                let some = files.iter().filter(|(_, pieces)| !pieces.is_empty());
                some.map(|(file, pieces)| Checked { file: *file, pieces: pieces.clone() }).collect()
            };
            if outlet.send(&FromNet::Checked(checked), Vec::new()).await.is_err() {
                return;
            }
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct NetSide {
    node: Option<NetNode>,
    /// The fleet, where a key is configured.
    fleet: Option<Fleet>,
    /// Holds the port of the node for the server.
    port: Option<TcpListener>,
    problems: Vec<String>,
    /// Downloads that are given from while they arrive.
    partials: Arc<Partials>,
    arriving: Arc<Arriving>,
    /// The deltas that this machine offers.
    board: Arc<Board>,
    /// What is to be announced, without them.
    announced: Vec<Announced>,
    /// A node on a public network announces only after somebody dialled it.
    flags: u64,
    /// What downloads prove of others, to who speaks of it.
    convictions: (mpsc::Sender<Conviction>, Option<mpsc::Receiver<Conviction>>),
    tasks: JoinSet<()>,
}

impl NetSide {
    /// Starts a node as `setup` says. Where it cannot, the reason is among [`Self::problems`]. What arrives is told by `outlet`.
    pub async fn start(setup: &Setup, outlet: Outlet) -> Self {
        let flags = match setup.net.network {
            config::Network::Private => 0,
            config::Network::Public => FLAG_REACHABLE,
        };
        let mut side = Self {
            node: None,
            port: None,
            fleet: None,
            problems: Vec::new(),
            partials: Arc::default(),
            arriving: Arc::default(),
            board: Arc::default(),
            announced: Vec::new(),
            flags,
            convictions: {
                let (tell, told) = mpsc::channel(CONVICTIONS_MAX);
                (tell, Some(told))
            },
            tasks: JoinSet::new(),
        };
        side.tasks.spawn(Arc::clone(&side.arriving).tell(outlet.clone()));
        side.tasks.spawn(Arc::clone(&side.arriving).tell_pieces(outlet));
        let node = match start_node(setup).await {
            Ok((node, port)) => {
                side.port = port;
                node
            }
            Err(err) => {
                side.problem(format!("no peers, all files come from mirrors: {err:#}; then `poolfs down` and `poolfs up`"));
                return side;
            }
        };
        side.fleet = start_fleet(&node, setup).await;
        side.tasks.spawn(Arc::clone(&side.board).keep_items(node.dht.clone()));
        side.node = Some(node);
        side
    }

    /// The node, if it runs.
    pub fn node(&self) -> Option<&NetNode> {
        self.node.as_ref()
    }

    /// The fleet, if this machine is of one.
    pub fn fleet(&self) -> Option<&Fleet> {
        self.fleet.as_ref()
    }

    /// What went wrong at the start, a line each with its remedy.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// Announces these keys and no others; none of them where nothing is given: who announces what nobody can get from it costs
    /// others their time.
    pub async fn announce(&mut self, keys: Vec<Announced>, is_given: bool) {
        self.announced = if is_given { keys } else { Vec::new() };
        self.tell().await;
    }

    /// Offers these deltas and no others: with the keys that are announced, and to who asks about a file.
    pub async fn offer(&mut self, offered: Vec<Offered>) {
        let (before, marks) = (self.board.by_key(), self.board.marks());
        self.board.set(offered);
        if self.board.by_key() != before {
            self.tell().await;
        }
        if let Some(fleet) = &self.fleet {
            let now = self.board.marks();
            fleet.gone(marks.difference(&now).copied().collect()).await;
            fleet.arrived(now.difference(&marks).map(|mark| FileShape::of(*mark, 1)).collect()).await;
        }
    }

    /// How many it offers.
    pub fn deltas_offered(&self) -> usize {
        self.board.len()
    }

    /// Tells the node what it is to announce.
    async fn tell(&self) {
        let Some(node) = self.node.as_ref() else { return };
        let (own, mut deltas) = (node.dht.signing_key().verifying_key().to_bytes(), self.board.by_key());
        let announce = |Announced { key, part }: &Announced| {
            let (flags, deltas) = match part {
                true => (self.flags | FLAG_PARTIAL, Vec::new()),
                false => (self.flags, deltas.remove(key).unwrap_or_default()),
            };
            AnnounceKey { key: Id(*key), pv: Some(Pv { key: own, flags, deltas }) }
        };
        let keys: Vec<_> = self.announced.iter().map(announce).collect();
        tracing::debug!(keys = keys.len(), "announcing");
        if let Err(err) = node.dht.set_announces(keys).await {
            tracing::warn!("announce what is here: {err}");
        }
    }

    /// What downloads files: from `mirror` and, where a node runs, from peers.
    pub fn swarm(&self, mirror: Arc<Mirror>, setup: &Setup) -> Result<Arc<Swarm>> {
        let parts = SwarmParts {
            mirror,
            client: self.client(&setup.net),
            finder: Arc::new(NodeFinder::new(self.node.as_ref().map(|node| node.dht.clone()))),
            announcer: Arc::clone(&self.arriving) as Arc<dyn poolfs_net::swarm::driver::Announcer>,
            partials: Arc::clone(&self.partials),
            netdb: self.node.as_ref().map(|node| Arc::clone(&node.netdb)),
            spill_dir: setup.dir.clone(),
            public: setup.net.network == config::Network::Public,
            fleet: self.fleet.clone(),
            convictions: Some(self.convictions.0.clone()),
        };
        Ok(Swarm::new(parts)?)
    }

    /// The client of peers, which says what it asks for.
    fn client(&self, config: &config::Net) -> PeerClient {
        let told = self.node.as_ref().map(|node| node.dht.told()).unwrap_or_default();
        client(config).telling(told)
    }

    /// What looks for deltas.
    pub fn seeker(&self, swarm: Arc<Swarm>, config: &config::Net) -> Seeker {
        Seeker { node: self.node.as_ref().map(|node| node.dht.clone()), client: self.client(config), fleet: self.fleet.clone(), swarm }
    }

    /// Says what was proved of others, and hears what is said of them, with the files of `shelf` as the truth. `None` where there is no node.
    pub fn reputation(&mut self, swarm: &Arc<Swarm>, shelf: &Arc<dyn Shelf>, truth: Arc<dyn Truth>, setup: &Setup) -> Option<Reputation> {
        let NetNode { dht, netdb } = self.node.clone()?;
        let parts = ReputationParts {
            dht,
            netdb,
            client: self.client(&setup.net),
            swarm: Arc::clone(swarm),
            truth,
            shelf: Arc::clone(shelf),
            fleet: self.fleet.clone(),
            telling: setup.telling,
            convictions: self.convictions.1.take()?,
        };
        match Reputation::open(parts) {
            Ok((reputation, task)) => {
                self.tasks.spawn(task);
                Some(reputation)
            }
            Err(err) => {
                self.problem(format!("what is said of peers is not heard: {err}"));
                None
            }
        }
    }

    /// Gives what is on `shelf` to peers, on the addresses of the node; `None` where there is no node, or no port for it.
    pub fn serve(&mut self, shelf: Arc<dyn Shelf>, config: &config::Net) -> Option<PeerServer> {
        let NetNode { dht, netdb } = self.node.clone()?;
        let proofs = Some(KeptProofs::new(netdb, Arc::clone(&shelf)));
        let node = NodeFacts { reachable: config.network == config::Network::Public, proofs };
        let limits = ServerLimits { upload_bytes_s: config.upload_bytes_s, slots: config.upload_slots, ..ServerLimits::default() };
        let parts = ServerParts {
            listen: Family::ALL.into_iter().filter_map(|family| dht.local(family)).collect(),
            limits,
            near: near(config),
            shelf,
            partials: Arc::clone(&self.partials),
            facts: Arc::new(OwnFacts { node, board: Arc::clone(&self.board), dht: dht.clone() }),
            auth: self.fleet.as_ref().and_then(Fleet::auth),
            key: dht.keys(),
        };
        let told = dht.told();
        // From here it is the server's.
        drop(self.port.take());
        match PeerServer::start_telling(parts, told) {
            Ok(server) => Some(server),
            Err(err) => {
                self.problem(format!("nothing is given to peers: {err}; then `poolfs down` and `poolfs up`"));
                None
            }
        }
    }

    /// Saves the routing tables and ends everything.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
        if let Some(fleet) = &self.fleet
            && tokio::time::timeout(SAVE_PATIENCE, fleet.leave()).await.is_err()
        {
            tracing::warn!("the fleet is not told that this machine leaves it: the node takes too long");
        }
        if let Some(node) = self.node
            && tokio::time::timeout(SAVE_PATIENCE, node.dht.shutdown()).await.is_err()
        {
            tracing::warn!("the routing tables are not saved: the disk takes too long");
        }
    }

    fn problem(&mut self, text: String) {
        tracing::error!("{text}");
        self.problems.push(text);
    }
}

/// Who is near, and whether nobody else is spoken to.
fn near(config: &config::Net) -> Near {
    if config.lan_only { Near::links_of_machine_only() } else { Near::of_machine() }
}

fn client(config: &config::Net) -> PeerClient {
    let client = PeerClient::new(ClientLimits::default());
    if config.lan_only { client.within(Arc::new(near(config))) } else { client }
}

/// Ports that are tried where the configuration leaves the choice to the system.
const PORTS_TRIED: u32 = 8;

/// With port 0 the system chooses one for UDP that TCP may not have: so one of TCP is held first, until the server takes it.
async fn start_node(setup: &Setup) -> Result<(NetNode, Option<TcpListener>)> {
    let listen = setup.net.listen;
    if listen.port() != 0 {
        return Ok((start_node_at(setup, listen).await?, None));
    }
    let mut tries = 1;
    loop {
        // Where there is no TCP at all the server will say so.
        let Ok(port) = TcpListener::bind(listen) else { return Ok((start_node_at(setup, listen).await?, None)) };
        let at = SocketAddr::new(listen.ip(), port.local_addr()?.port());
        match start_node_at(setup, at).await {
            Err(err) if tries < PORTS_TRIED => tracing::debug!("port {}: {err:#}", at.port()),
            started => return Ok((started?, Some(port))),
        }
        tries += 1;
    }
}

async fn start_node_at(setup: &Setup, listen: SocketAddr) -> Result<NetNode> {
    let dir = setup.dir.clone();
    let netdb = Arc::new(tokio::task::spawn_blocking(move || NetDb::open(&dir)).await??);
    let net = &setup.net;
    let bootstrap = net.bootstrap.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
    let links = net.discovers_on(net.network).then(Links::default);
    let discovery = DiscoveryConfig { bootstrap, seeds: net.seeds.clone(), links, ..DiscoveryConfig::default() };
    let within = net.lan_only.then(|| Arc::new(near(net)));
    let options = NodeOptions { discovery, within, ..NodeOptions::new(expand_listen(listen), net.network.into()) };
    let dht = Dht::start(options, Some(Arc::clone(&netdb))).await?;
    Ok(NetNode { dht, netdb })
}

/// Joins the fleet, where there is to be one.
async fn start_fleet(node: &NetNode, setup: &Setup) -> Option<Fleet> {
    let fleet = setup.fleet.as_ref()?;
    let local = Family::ALL.into_iter().find_map(|family| node.dht.local(family))?;
    let options = FleetOptions {
        zone: fleet.zone.clone(),
        zone_local: fleet.zone_local,
        seeds: fleet.seeds.clone(),
        ..FleetOptions::new(Some(FleetKey::new(fleet.key)), local.port())
    };
    Some(Fleet::start(&node.dht, options, Some(Arc::clone(&node.netdb))).await)
}

/// The node's status socket, beside the control socket.
pub fn status_socket(control: &Path) -> PathBuf {
    control.with_file_name("dht.sock")
}
