//! The network side of the daemon: the DHT's node, its database, its status socket, and what it announces.
//!
//! It is there for the mounts, never the other way round: what goes wrong here is a line in the status, and the files come
//! from the mirror. It begins before the mounts, so that their source may ask it, and ends after them.

use crate::advisories::AdvisoryKeeper;
use crate::announcer::{Announcer, Arriving};
use crate::apt_names::AptNames;
use crate::bridge::NodeFinder;
use crate::config::{self, Config};
use crate::dht_cmd;
use crate::holdings::Holdings;
use crate::lists_age::ListsAge;
use anyhow::Result;
use poolfs_core::store::Store;
use poolfs_fs::refresh::Refresher;
use poolfs_net::dht::Family;
use poolfs_net::discovery::{DiscoveryConfig, Links};
use poolfs_net::fleet::auth::FleetKey;
use poolfs_net::fleet::{Fleet, FleetOptions};
use poolfs_net::mirror::Mirror;
use poolfs_net::netdb::NetDb;
use poolfs_net::node::{Dht, NodeOptions, expand_listen};
use poolfs_net::peer::{ClientLimits, Near, NoFacts, Partials, PeerClient, PeerServer, ServerLimits, ServerParts, Shelf};
use poolfs_net::swarm::driver::{Swarm, SwarmParts};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
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
    /// The status socket and the announcer.
    tasks: JoinSet<()>,
}

impl NetSide {
    /// Starts a node as `[net]` says. Where it cannot, the reason is among [`Self::problems`].
    pub async fn start(config: &Config) -> Self {
        let mut side = Self {
            node: None,
            port: None,
            fleet: None,
            problems: Vec::new(),
            partials: Arc::default(),
            arriving: Arc::default(),
            tasks: JoinSet::new(),
        };
        let node = match start_node(config).await {
            Ok((node, port)) => {
                side.port = port;
                node
            }
            Err(err) => {
                side.problem(format!("no peers, all files come from mirrors: {err:#}; then `poolfs down` and `poolfs up`"));
                return side;
            }
        };
        match dht_cmd::StatusServer::bind(&status_socket(&config.control.socket), node.dht.clone()) {
            Ok(server) => {
                side.tasks.spawn(async move {
                    if let Err(err) = server.run().await {
                        tracing::warn!("the node's status socket is closed: {err:#}");
                    }
                });
            }
            Err(err) => side.problem(format!("`poolfs dht status` does not answer: {err:#}")),
        }
        match start_fleet(&node, &config.fleet).await {
            Ok(fleet) => side.fleet = fleet,
            Err(err) => side.problem(format!("no fleet: {err}; then `poolfs down` and `poolfs up`")),
        }
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

    /// Tells the fleet what `store` has, and the DHT too where this machine is to be of no fleet or its gateway, from now on.
    /// A fleet whose key cannot be read is one all the same: its members announce nothing outside.
    ///
    /// Nothing is told before everything was judged: what the database says is how it was judged when the daemon last ran.
    pub fn announce(
        &mut self,
        store: Arc<Store>,
        names: Arc<AptNames>,
        config: &config::Net,
        fleet: &config::Fleet,
        judged: &watch::Receiver<bool>,
    ) {
        if let Some(fleet) = &self.fleet {
            self.tasks.spawn(after(judged.clone(), Holdings::new(Arc::clone(&store), fleet.clone()).run()));
        }
        if let Some(node) = self.node.as_ref().filter(|_| fleet.gateway || fleet.key_file.is_none()) {
            let arriving = Arc::clone(&self.arriving);
            self.tasks.spawn(after(
                judged.clone(),
                Announcer::new(store, arriving, names, node.dht.clone(), config.announce, config.network).run(),
            ));
        }
    }

    /// Has what is here judged again when its lists have grown old, or other advisories are there.
    pub fn judge(&mut self, lists: ListsAge, advisories: Arc<AdvisoryKeeper>, refresher: Arc<Refresher>) {
        self.tasks.spawn(lists.run());
        self.tasks.spawn(advisories.run(refresher));
    }

    /// What downloads files: from `mirror` and, where a node runs, from peers.
    pub fn swarm(&self, mirror: Arc<Mirror>, config: &Config) -> Result<Arc<Swarm>> {
        let parts = SwarmParts {
            mirror,
            client: PeerClient::new(ClientLimits::default()),
            finder: Arc::new(NodeFinder::new(self.node.as_ref().map(|node| node.dht.clone()))),
            announcer: Arc::clone(&self.arriving) as Arc<dyn poolfs_net::swarm::driver::Announcer>,
            partials: Arc::clone(&self.partials),
            netdb: self.node.as_ref().map(|node| Arc::clone(&node.netdb)),
            spill_dir: config.store.state_dir.clone(),
            public: config.net.network == config::Network::Public,
            fleet: self.fleet.clone(),
        };
        Ok(Swarm::new(parts)?)
    }

    /// Gives what is on `shelf` to peers, on the addresses of the node; `None` where there is no node, or no port for it.
    pub fn serve(&mut self, shelf: Arc<dyn Shelf>, config: &config::Net) -> Option<PeerServer> {
        let dht = self.node.as_ref()?.dht.clone();
        let limits = ServerLimits { upload_bytes_s: config.upload_bytes_s, slots: config.upload_slots, ..ServerLimits::default() };
        let parts = ServerParts {
            listen: Family::ALL.into_iter().filter_map(|family| dht.local(family)).collect(),
            limits,
            near: Near::of_machine(),
            shelf,
            partials: Arc::clone(&self.partials),
            facts: Arc::new(NoFacts { reachable: config.network == config::Network::Public }),
            auth: self.fleet.as_ref().and_then(Fleet::auth),
            key: dht.keys(),
        };
        // From here it is the server's.
        drop(self.port.take());
        match PeerServer::start(parts) {
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

/// Runs `task` once everything was judged.
async fn after(mut judged: watch::Receiver<bool>, task: impl Future<Output = ()>) {
    // Without its sender nothing is ever judged.
    if judged.wait_for(|judged| *judged).await.is_ok() {
        task.await;
    }
}

/// Ports that are tried where the configuration leaves the choice to the system.
const PORTS_TRIED: u32 = 8;

/// With port 0 the system chooses one for UDP that TCP may not have: so one of TCP is held first, until the server takes it.
async fn start_node(config: &Config) -> Result<(NetNode, Option<TcpListener>)> {
    let listen = config.net.listen;
    if listen.port() != 0 {
        return Ok((start_node_at(config, listen).await?, None));
    }
    let mut tries = 1;
    loop {
        // Where there is no TCP at all the server will say so.
        let Ok(port) = TcpListener::bind(listen) else { return Ok((start_node_at(config, listen).await?, None)) };
        let at = SocketAddr::new(listen.ip(), port.local_addr()?.port());
        match start_node_at(config, at).await {
            Err(err) if tries < PORTS_TRIED => tracing::debug!("port {}: {err:#}", at.port()),
            started => return Ok((started?, Some(port))),
        }
        tries += 1;
    }
}

async fn start_node_at(config: &Config, listen: SocketAddr) -> Result<NetNode> {
    let dir = config.store.state_dir.join("net");
    let netdb = Arc::new(tokio::task::spawn_blocking(move || NetDb::open(&dir)).await??);
    let net = &config.net;
    let bootstrap = net.bootstrap.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
    let links = net.discovers_on(net.network).then(Links::default);
    let discovery = DiscoveryConfig { bootstrap, seeds: net.seeds.clone(), links, name_servers: Vec::new() };
    let options = NodeOptions { discovery, ..NodeOptions::new(expand_listen(listen), net.network.into()) };
    let dht = Dht::start(options, Some(Arc::clone(&netdb))).await?;
    Ok(NetNode { dht, netdb })
}

/// Joins the fleet whose key is configured.
async fn start_fleet(node: &NetNode, config: &config::Fleet) -> Result<Option<Fleet>> {
    let Some(key_file) = config.key_file.clone() else { return Ok(None) };
    let key = tokio::task::spawn_blocking(move || FleetKey::load(&key_file)).await??;
    let Some(local) = Family::ALL.into_iter().find_map(|family| node.dht.local(family)) else { return Ok(None) };
    let options = FleetOptions {
        zone: config.zone.clone(),
        zone_local: config.zone_local,
        seeds: config.seeds.clone(),
        ..FleetOptions::new(Some(key), local.port())
    };
    Ok(Some(Fleet::start(&node.dht, options, Some(Arc::clone(&node.netdb))).await))
}

/// The node's status socket, beside the control socket.
pub fn status_socket(control: &Path) -> PathBuf {
    control.with_file_name("dht.sock")
}
