//! A running node of the DHT: [`crate::dht::Node`] behind real sockets.
//!
//! [`Dht::start`] binds one UDP socket per family and gives the state machine to one task, the driver, which owns it for
//! good. The handle, [`Dht`], is cheap to clone; it speaks to the driver through a bounded channel, and what it asked for comes
//! back through channels of its own. The driver also saves the routing tables in [`crate::netdb`], begins with the saved ones,
//! feeds in what [`crate::discovery`] finds, and takes a new identity when another live node shows the same key.
//!
//! Nothing here retries or judges: lost datagrams, full socket buffers and unreachable networks are what the state machine's
//! retransmission is for.

mod driver;
mod snapshot;
mod sockets;

pub use snapshot::{FamilySnapshot, Rates, Snapshot};
pub use sockets::{expand_listen, listen_tcp};

use crate::dht::{self, AnnounceKey, CommandError, Family, FoundContact, Limits, Network, Outcome, Schedule};
use crate::discovery::{DiscoveryConfig, HostPort, Origin, SeedError, Seeds, Standing};
use crate::krpc::{Id, NodeInfo};
use crate::netdb::{NetDb, NetDbError};
use crate::peer::Near;
use crate::told::Told;
use driver::{Command, Driver};
use ed25519_dalek::SigningKey;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

/// Commands that wait for the driver; more callers than that wait in turn.
const COMMANDS_MAX: usize = 256;

/// Events kept for a slow reader of [`Dht::events`]; it is told how many it missed.
const EVENTS_MAX: usize = 1024;

/// How long others may take to try a connection and say so.
const DIALS_PATIENCE: Duration = Duration::from_secs(8);

/// Findings of one lookup that wait for its reader; past that, later contacts are left out.
const FINDINGS_MAX: usize = 64;

/// Keys announced beside those of files.
pub const BESIDE_MAX: usize = 64;

/// What a node is to be.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// Addresses to bind, at most one of each family; port 0 takes a free one. See [`expand_listen`].
    pub listen: Vec<SocketAddr>,
    /// The TCP port that announces name; `None`: the one of the first address bound.
    pub port: Option<u16>,
    /// Whether strangers are in the network.
    pub network: Network,
    /// Never answers and never announces: for a command that only asks.
    pub read_only: bool,
    /// When queries are repeated.
    pub schedule: Schedule,
    /// What is kept for others.
    pub limits: Limits,
    /// Where the first nodes come from, besides the saved table.
    pub discovery: DiscoveryConfig,
    /// Who is spoken to at all; `None`: everybody.
    pub within: Option<Arc<Near>>,
}

impl NodeOptions {
    /// A node on `listen` that looks nowhere and has all defaults.
    pub fn new(listen: Vec<SocketAddr>, network: Network) -> Self {
        Self {
            listen,
            port: None,
            network,
            read_only: false,
            schedule: Schedule::Adapted,
            limits: Limits::default(),
            discovery: DiscoveryConfig::default(),
            within: None,
        }
    }
}

/// Why a node cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address cannot be bound.
    #[error("listen on UDP {address}: {source}{}", remedy(source))]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's word for it.
        source: io::Error,
    },
    /// Nothing to bind, or two addresses of one family.
    #[error("{0} addresses to listen on: give one of IPv4, one of IPv6, or one of each")]
    Listen(usize),
    /// The key or the saved tables cannot be read.
    #[error(transparent)]
    NetDb(#[from] NetDbError),
}

fn remedy(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::AddrInUse => "; another node runs on this port: end it or choose another port",
        io::ErrorKind::AddrNotAvailable => "; the machine has no such address",
        io::ErrorKind::PermissionDenied => "; ports below 1024 are for root",
        _ => "",
    }
}

/// Why an answer never comes.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The node ended, or took a new identity, while the answer was under way.
    #[error("the node was stopped")]
    Stopped,
    /// The node would not begin.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The host to ping has no address.
    #[error(transparent)]
    Resolve(#[from] SeedError),
    /// The host to ping resolves to nothing.
    #[error("{0} has no address")]
    NoAddress(HostPort),
}

/// A node that answered a ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pong {
    /// Who.
    pub node: NodeInfo,
    /// From the first sending to the answer.
    pub took: Duration,
    /// Whether it is a poolfs node.
    pub poolfs: bool,
}

/// What goes to the fleet, see [`Dht::tap`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tapped {
    /// A datagram of the fleet's, unchecked.
    Datagram(SocketAddr, Vec<u8>),
    /// An address at which discovery presumes a node.
    Contact(SocketAddr),
}

/// What a lookup finds on its way.
#[derive(Debug, Clone, PartialEq)]
pub enum Finding {
    /// Contacts announced under the key; the same one may come again with its `pv`.
    Contacts(Vec<FoundContact>),
    /// The immutable item, bencoded; its hash is right.
    Item(Vec<u8>),
    /// Statements about a node, each valid in itself.
    Statements(Vec<Vec<u8>>),
}

/// A lookup under way. Dropping it cancels it.
#[derive(Debug)]
pub struct Lookup {
    findings: mpsc::Receiver<Finding>,
    done: oneshot::Receiver<Result<Outcome, NodeError>>,
    _cancel: Cancel,
}

impl Lookup {
    /// What was found next; `None` when the lookup is over and everything was taken.
    pub async fn next(&mut self) -> Option<Finding> {
        self.findings.recv().await
    }

    /// Waits for the end; findings that were not taken are lost.
    pub async fn outcome(mut self) -> Result<Outcome, NodeError> {
        while self.next().await.is_some() {}
        (&mut self.done).await.unwrap_or(Err(NodeError::Stopped))
    }

    /// Everything that is found up to the end, and how it ended.
    pub async fn collect(mut self) -> Result<(Vec<Finding>, Outcome), NodeError> {
        let mut findings = Vec::new();
        while let Some(finding) = self.next().await {
            findings.push(finding);
        }
        Ok((findings, (&mut self.done).await.unwrap_or(Err(NodeError::Stopped))?))
    }
}

#[derive(Debug)]
struct Cancel {
    number: u64,
    commands: mpsc::Sender<Command>,
}

impl Drop for Cancel {
    fn drop(&mut self) {
        // A full queue only means that the lookup runs to its own end.
        drop(self.commands.try_send(Command::Cancel(self.number)));
    }
}

/// The handle of a running node. The node ends when all handles are dropped.
#[derive(Debug, Clone)]
pub struct Dht {
    commands: mpsc::Sender<Command>,
    events: broadcast::Sender<dht::Event>,
    local: [Option<SocketAddr>; 2],
    key: watch::Receiver<SigningKey>,
    standing: watch::Receiver<Standing>,
    median: watch::Receiver<Option<Duration>>,
    numbers: Arc<AtomicU64>,
    told: Told,
}

impl Dht {
    /// Binds the sockets and starts the node; with `netdb` it has the key and the nodes of earlier runs, otherwise new ones.
    pub async fn start(options: NodeOptions, netdb: Option<Arc<NetDb>>) -> Result<Self, StartError> {
        let (dht, driver) = Self::prepare(options, netdb).await?;
        tokio::spawn(driver.run());
        Ok(dht)
    }

    /// Everything but running it.
    async fn prepare(options: NodeOptions, netdb: Option<Arc<NetDb>>) -> Result<(Self, Driver), StartError> {
        let mut sockets = sockets::Sockets::bind(&options.listen)?;
        sockets.keep_within(options.within.clone());
        let local = sockets.local();
        let (commands, commands_out) = mpsc::channel(COMMANDS_MAX);
        let events = broadcast::Sender::new(EVENTS_MAX);
        let driver = Driver::new(options, sockets, netdb, commands_out, events.clone()).await?;
        let (key, standing, median, told) = (driver.key(), driver.standing(), driver.median(), driver.told());
        Ok((Self { commands, events, local, key, standing, median, numbers: Arc::default(), told }, driver))
    }

    /// The address bound in a family.
    pub fn local(&self, family: Family) -> Option<SocketAddr> {
        self.local[family as usize]
    }

    /// The key pair that the id comes from and that this machine signs with. It can change, see the module.
    pub fn signing_key(&self) -> SigningKey {
        self.key.borrow().clone()
    }

    /// As [`Self::signing_key`], as it changes.
    pub fn keys(&self) -> watch::Receiver<SigningKey> {
        self.key.clone()
    }

    /// What happens in the node beside the answers to commands.
    pub fn events(&self) -> broadcast::Receiver<dht::Event> {
        self.events.subscribe()
    }

    /// Where it is said what this node tells others.
    pub fn told(&self) -> Told {
        self.told.clone()
    }

    /// Waits until at least `count` nodes of both families together are in the routing tables.
    pub async fn knows(&self, count: usize) -> Result<(), NodeError> {
        let mut standing = self.standing.clone();
        standing.wait_for(|standing| standing.members >= count).await.map(drop).map_err(|_| NodeError::Stopped)
    }

    /// Asks `to` to show itself. `None`: nothing came back in 14 s.
    pub async fn ping(&self, to: SocketAddr) -> Result<Option<Pong>, NodeError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Ping { to, reply }).await?;
        answer.await.map_err(|_| NodeError::Stopped)
    }

    /// Asks the first of a host's addresses that answers.
    pub async fn ping_host(&self, host: &HostPort) -> Result<Option<Pong>, NodeError> {
        let addresses = Seeds::default().resolve(&Origin::Bootstrap(host.clone())).await?;
        let usable: Vec<SocketAddr> = addresses.into_iter().filter(|address| self.local[Family::of(*address) as usize].is_some()).collect();
        if usable.is_empty() {
            return Err(NodeError::NoAddress(host.clone()));
        }
        for address in usable {
            if let Some(pong) = self.ping(address).await? {
                return Ok(Some(pong));
            }
        }
        Ok(None)
    }

    /// Addresses that may be nodes: they are asked, and kept if they answer.
    pub async fn bootstrap(&self, addresses: Vec<SocketAddr>) -> Result<(), NodeError> {
        self.send(Command::Bootstrap(addresses)).await
    }

    /// Looks for contacts under a key.
    pub async fn get_peers(&self, key: Id) -> Result<Lookup, NodeError> {
        self.lookup(driver::Ask::Peers(key)).await
    }

    /// Contacts under a key, one by one as they come, at most [`dht::FOUND_MAX`]; the same one may come again with its `pv`.
    ///
    /// Returns at once, needs a runtime around it. The channel closes when the lookup is over, or could not be begun;
    /// dropping the receiver cancels the lookup.
    pub fn stream_peers(&self, key: Id) -> mpsc::Receiver<FoundContact> {
        let (out, contacts) = mpsc::channel(FINDINGS_MAX);
        let dht = self.clone();
        tokio::spawn(async move {
            let mut lookup = match dht.get_peers(key).await {
                Ok(lookup) => lookup,
                Err(err) => return tracing::debug!(%err, "no lookup"),
            };
            let forward = async {
                while let Some(finding) = lookup.next().await {
                    let Finding::Contacts(found) = finding else { continue };
                    for contact in found {
                        if out.send(contact).await.is_err() {
                            return;
                        }
                    }
                }
            };
            // Without the second branch a lookup that finds nothing would run on after its asker went away.
            tokio::select! {
                () = forward => {}
                () = out.closed() => {}
            }
        });
        contacts
    }

    /// Median time of this node's last lookups to their first contact, or to their end without one; `None` before the first.
    pub fn median_lookup(&self) -> Option<Duration> {
        *self.median.borrow()
    }

    /// Looks for the nodes closest to an id.
    pub async fn find_node(&self, target: Id) -> Result<Lookup, NodeError> {
        self.lookup(driver::Ask::Node(target)).await
    }

    /// Looks for an immutable item (BEP 44).
    pub async fn get_item(&self, target: Id) -> Result<Lookup, NodeError> {
        self.lookup(driver::Ask::Item(target)).await
    }

    /// Stores an immutable item, a bencoded value of at most 1,000 bytes, at the nodes closest to its hash.
    pub async fn put_item(&self, value: Vec<u8>) -> Result<Lookup, NodeError> {
        self.lookup(driver::Ask::Put(value)).await
    }

    /// Looks for statements about a node.
    pub async fn get_statements(&self, subject: Id) -> Result<Lookup, NodeError> {
        self.lookup(driver::Ask::Statements(subject)).await
    }

    /// Stores a signed statement about a node.
    pub async fn speak(&self, subject: Id, statement: Vec<u8>) -> Result<Lookup, NodeError> {
        self.lookup(driver::Ask::Speak(subject, statement)).await
    }

    /// Replaces the keys that are announced, and kept announced; what falls away is withdrawn.
    pub async fn set_announces(&self, keys: Vec<AnnounceKey>) -> Result<(), NodeError> {
        self.send(Command::SetAnnounces(keys)).await
    }

    /// Replaces the keys that are announced beside those of [`Self::set_announces`], with nothing said of them: at most [`BESIDE_MAX`].
    pub async fn announce_beside(&self, keys: Vec<Id>) -> Result<(), NodeError> {
        self.send(Command::AnnounceBeside(keys)).await
    }

    /// Sends a datagram of another protocol on the node's port: where there is a [`Self::tap`] as often as its owner's own rates
    /// say, otherwise at the rate of [`dht::Node::send_raw`], past which it is lost.
    pub async fn send_raw(&self, to: SocketAddr, bytes: Vec<u8>) -> Result<(), NodeError> {
        self.send(Command::SendRaw(to, bytes)).await
    }

    /// Has the fleet's datagrams and the addresses of discovery sent to `tap`, and announces the fleet's key beside the others.
    /// When the node ends the channel is closed.
    pub async fn tap(&self, tap: mpsc::Sender<Tapped>, topic: Option<Id>) -> Result<(), NodeError> {
        self.send(Command::Tap(tap, topic)).await
    }

    /// How the node is.
    pub async fn status(&self) -> Result<Snapshot, NodeError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Status(reply)).await?;
        answer.await.map_err(|_| NodeError::Stopped)
    }

    /// Asks a few other poolfs nodes whether they can open a connection to this node's port: one that tried, and how it went. `None` where
    /// nobody is known, or nobody tried within some seconds.
    pub async fn port_seen_from_outside(&self) -> Result<Option<(SocketAddr, bool)>, NodeError> {
        let mut events = self.events();
        let (reply, asked) = oneshot::channel();
        self.send(Command::AskDials(reply)).await?;
        let mut open = asked.await.map_err(|_| NodeError::Stopped)?;
        let mut seen = None;
        let listen = async {
            while open > 0 {
                match events.recv().await {
                    Ok(dht::Event::Dialled { by, reached }) => {
                        open -= 1;
                        seen = Some((by, reached));
                        // One who reached it proves that it can be reached.
                        if reached {
                            return;
                        }
                    }
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return,
                }
            }
        };
        // Whoever has not answered by then cannot or will not.
        let _late = tokio::time::timeout(DIALS_PATIENCE, listen).await;
        Ok(seen)
    }

    /// Saves the routing tables and ends the node, whoever else has a handle.
    pub async fn shutdown(&self) {
        let (reply, ended) = oneshot::channel();
        if self.send(Command::Shutdown(reply)).await.is_ok() {
            // An error means that it ended meanwhile, which is what was wanted.
            drop(ended.await);
        }
    }

    async fn lookup(&self, ask: driver::Ask) -> Result<Lookup, NodeError> {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let (findings_in, findings) = mpsc::channel(FINDINGS_MAX);
        let (done_in, done) = oneshot::channel();
        let cancel = Cancel { number, commands: self.commands.clone() };
        self.send(Command::Lookup { number, ask, findings: findings_in, done: done_in }).await?;
        Ok(Lookup { findings, done, _cancel: cancel })
    }

    async fn send(&self, command: Command) -> Result<(), NodeError> {
        self.commands.send(command).await.map_err(|_| NodeError::Stopped)
    }
}

#[cfg(test)]
mod tests;
