//! The task that owns the state machine and its sockets.

use super::snapshot::Meter;
use super::sockets::Sockets;
use super::{BESIDE_MAX, Finding, NodeError, NodeOptions, Pong, Snapshot, StartError, Tapped};
use crate::dht::{Action, AnnounceKey, Config, DialTicket, Event, Family, LookupId, Node, Outcome, PingId};
use crate::discovery::{self, DiscoveryConfig, Standing};
use crate::fleet::wire::is_fleet;
use crate::krpc::{Id, NodeInfo};
use crate::netdb::{self, KeyOrigin, NetDb, SavedNode};
use crate::told::{How, Told};
use ed25519_dalek::SigningKey;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::net::TcpStream;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinSet;

/// How long a node that asked to be dialled back has to accept.
const DIAL_TIMEOUT: Duration = Duration::from_secs(2);

/// A new identity is taken at most this often: anybody can show our key, and must not keep us changing.
const IDENTITY_CHANGE_INTERVAL: Duration = Duration::from_secs(3600);

/// Shortest time between two looks at the tables and counters, while datagrams arrive.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Shortest time between two looks while none arrive.
const IDLE_LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// Addresses from discovery that wait for the driver.
const CONTACTS_MAX: usize = 64;

/// What a lookup looks for, or stores.
#[derive(Debug)]
pub(super) enum Ask {
    Peers(Id),
    Node(Id),
    Item(Id),
    Put(Vec<u8>),
    Statements(Id),
    Speak(Id, Vec<u8>),
}

/// What handles ask of the driver.
#[derive(Debug)]
pub(super) enum Command {
    Ping { to: SocketAddr, reply: oneshot::Sender<Option<Pong>> },
    Bootstrap(Vec<SocketAddr>),
    Lookup { number: u64, ask: Ask, findings: mpsc::Sender<Finding>, done: oneshot::Sender<Result<Outcome, NodeError>> },
    Cancel(u64),
    SetAnnounces(Vec<AnnounceKey>),
    AnnounceBeside(Vec<Id>),
    SendRaw(SocketAddr, Vec<u8>),
    Tap(mpsc::Sender<Tapped>, Option<Id>),
    Status(oneshot::Sender<Snapshot>),
    AskDials(oneshot::Sender<usize>),
    Shutdown(oneshot::Sender<()>),
}

/// Somebody who waits for a lookup.
#[derive(Debug)]
struct Waiting {
    number: u64,
    findings: mpsc::Sender<Finding>,
    done: oneshot::Sender<Result<Outcome, NodeError>>,
}

#[derive(Debug)]
pub(super) struct Driver {
    options: NodeOptions,
    node: Node,
    sockets: Sockets,
    netdb: Option<Arc<NetDb>>,
    machine: Option<[u8; 32]>,
    commands: mpsc::Receiver<Command>,
    events: broadcast::Sender<Event>,
    contacts: mpsc::Receiver<SocketAddr>,
    /// For the discovery that follows a change of identity.
    contacts_in: mpsc::Sender<SocketAddr>,
    standing: watch::Sender<Standing>,
    median: watch::Sender<Option<Duration>>,
    /// Discovery under the present id; it ends with this value.
    discovering: JoinSet<()>,
    key: watch::Sender<SigningKey>,
    pings: HashMap<PingId, oneshot::Sender<Option<Pong>>>,
    lookups: HashMap<LookupId, Waiting>,
    announces: Vec<AnnounceKey>,
    /// Keys beside them, of which nothing is said.
    beside: Vec<Id>,
    /// The fleet's: its datagrams go there, and its key is announced beside the others.
    tap: Option<mpsc::Sender<Tapped>>,
    topic: Option<Id>,
    dials: JoinSet<(DialTicket, bool)>,
    told: Told,
    /// The database's work; at most one piece at a time.
    saving: JoinSet<()>,
    meter: Meter,
    unsent: u64,
    looked_at: Instant,
    looked_datagrams: u64,
    identity_changed: Option<Instant>,
}

impl Driver {
    pub(super) async fn new(
        options: NodeOptions,
        sockets: Sockets,
        netdb: Option<Arc<NetDb>>,
        commands: mpsc::Receiver<Command>,
        events: broadcast::Sender<Event>,
    ) -> Result<Self, StartError> {
        let machine = netdb::machine_hash();
        let (key, saved) = match &netdb {
            Some(netdb) => {
                let netdb = Arc::clone(netdb);
                let read = move || -> Result<_, netdb::NetDbError> { Ok((netdb.identity(machine)?, netdb.saved_nodes()?)) };
                let ((key, origin), saved) = tokio::task::spawn_blocking(read).await.expect("reading the database does not panic")?;
                if origin == KeyOrigin::ReplacedClone {
                    tracing::warn!("this machine was copied from another: it takes a node key of its own");
                }
                (key, saved)
            }
            None => (SigningKey::from_bytes(&rand::random()), Vec::new()),
        };
        let node = new_node(&options, &sockets, &key);
        let (contacts_in, contacts) = mpsc::channel(CONTACTS_MAX);
        let mut driver = Self {
            node,
            options,
            sockets,
            netdb,
            machine,
            commands,
            events,
            contacts,
            contacts_in,
            standing: watch::Sender::new(Standing::default()),
            median: watch::Sender::new(None),
            discovering: JoinSet::new(),
            key: watch::Sender::new(key),
            pings: HashMap::new(),
            lookups: HashMap::new(),
            announces: Vec::new(),
            beside: Vec::new(),
            tap: None,
            topic: None,
            dials: JoinSet::new(),
            told: Told::default(),
            saving: JoinSet::new(),
            meter: Meter::default(),
            unsent: 0,
            looked_at: Instant::now(),
            looked_datagrams: 0,
            identity_changed: None,
        };
        let saved: Vec<NodeInfo> = saved.into_iter().map(|node| NodeInfo { id: Id(node.id), addr: node.address }).collect();
        driver.begin(&saved);
        Ok(driver)
    }

    pub(super) fn told(&self) -> Told {
        self.told.clone()
    }

    pub(super) fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.subscribe()
    }

    pub(super) fn median(&self) -> watch::Receiver<Option<Duration>> {
        self.median.subscribe()
    }

    pub(super) fn key(&self) -> watch::Receiver<SigningKey> {
        self.key.subscribe()
    }

    /// Starts a fresh state machine: with the nodes known already, and discovery under its id.
    fn begin(&mut self, known: &[NodeInfo]) {
        let now = Instant::now();
        self.meter = Meter::default();
        self.meter.sample(now, self.node.status().counters);
        self.node.restore(known, now);
        self.standing.send_replace(Standing::default());
        let (standing, contacts) = (self.standing.subscribe(), self.contacts_in.clone());
        let ports = self.sockets.local().map(|address| address.map(|address| address.port()));
        let id = self.node.id(Family::V4).0;
        self.discovering = JoinSet::new();
        let discovery = DiscoveryConfig { told: self.told.clone(), ..self.options.discovery.clone() };
        self.discovering.spawn(discovery::run(discovery, id, ports, standing, contacts));
    }

    pub(super) async fn run(mut self) {
        let ended = loop {
            self.act();
            let look_at = self.look();
            let timeout = look_at.into_iter().fold(self.node.next_timeout(), Instant::min);
            tokio::select! {
                // Commands first: a flood of datagrams must not keep the owner from stopping the node.
                biased;
                command = self.commands.recv() => match command {
                    Some(Command::Shutdown(ended)) => break Some(ended),
                    Some(command) => self.command(command),
                    None => break None,
                },
                Some(dial) = self.dials.join_next() => {
                    // Cancelled with the whole runtime: nobody is left to be told.
                    if let Ok((ticket, reached)) = dial {
                        self.node.dial_result(ticket, reached, Instant::now());
                    }
                }
                Some(()) = finished(&mut self.saving) => {}
                Some(contact) = self.contacts.recv() => {
                    self.node.bootstrap(&[contact], Instant::now());
                    // A full queue only means that the fleet hears of it with the next hello.
                    let _full = self.tap.as_ref().map(|tap| tap.try_send(Tapped::Contact(contact)));
                }
                () = tokio::time::sleep_until(timeout.into()) => self.node.tick(Instant::now()),
                () = self.sockets.readable() => {
                    let now = Instant::now();
                    let (node, tap) = (&mut self.node, &self.tap);
                    self.sockets.receive(|from, bytes| match tap {
                        Some(tap) if is_fleet(bytes) => {
                            // A full queue loses it, as a full socket would.
                            let _full = tap.try_send(Tapped::Datagram(from, bytes.to_vec()));
                        }
                        _ => node.datagram(from, bytes, now),
                    });
                }
            }
        };
        // What is being written is older than what is now known.
        while finished(&mut self.saving).await.is_some() {}
        self.save(self.node.saved_table());
        while finished(&mut self.saving).await.is_some() {}
        // Whoever waits for the end may bind the port and open the database at once.
        drop(self);
        if let Some(ended) = ended {
            let _ = ended.send(());
        }
    }

    /// Does all that the state machine wants done.
    fn act(&mut self) {
        while let Some(action) = self.node.poll() {
            match action {
                Action::Send { to, bytes } => {
                    self.send(to, bytes);
                }
                // Only who was heard is dialled; the network may be another one by now.
                Action::Dial { ticket, to } if !self.sockets.allows(to) => self.node.dial_result(ticket, false, Instant::now()),
                Action::Dial { ticket, to } => {
                    self.dials.spawn(async move {
                        let reached = tokio::time::timeout(DIAL_TIMEOUT, TcpStream::connect(to)).await;
                        (ticket, matches!(reached, Ok(Ok(_))))
                    });
                }
                Action::Event(event) => self.event(event),
            }
        }
    }

    fn send(&mut self, to: SocketAddr, bytes: Vec<u8>) {
        if self.sockets.send(to, &bytes) {
            self.told.say(to, || How::Datagram { bytes });
        } else {
            self.unsent += 1;
        }
    }

    /// Looks at the tables and counters; if it was just done, says when it is to be done again.
    fn look(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let next = self.looked_at + LOOK_INTERVAL;
        let heard = self.node.counters();
        if heard.datagrams_in == self.looked_datagrams && self.looked_at + IDLE_LOOK_INTERVAL > now {
            return None;
        }
        if next > now {
            return Some(next);
        }
        self.looked_datagrams = heard.datagrams_in;
        self.looked_at = now;
        self.node.set_unix_time(now, unix_s());
        let status = self.node.status();
        self.meter.sample(now, status.counters);
        self.median.send_if_modified(|known| std::mem::replace(known, status.lookup_p50) != status.lookup_p50);
        let members = status.nodes.iter().sum();
        let standing = Standing { joined: members > 0, members };
        self.standing.send_if_modified(|known| std::mem::replace(known, standing) != standing);
        None
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Pong { ping, node, took, poolfs } => {
                if let Some(reply) = self.pings.remove(&ping) {
                    let _ = reply.send(Some(Pong { node, took, poolfs }));
                }
            }
            Event::Unreachable { ping, .. } => {
                if let Some(reply) = self.pings.remove(&ping) {
                    let _ = reply.send(None);
                }
            }
            Event::Found { lookup, contacts } => self.found(lookup, Finding::Contacts(contacts)),
            Event::Item { lookup, value } => self.found(lookup, Finding::Item(value)),
            Event::Statements { lookup, statements } => self.found(lookup, Finding::Statements(statements)),
            Event::Done { lookup, outcome } => {
                if let Some(waiting) = self.lookups.remove(&lookup) {
                    let _ = waiting.done.send(Ok(outcome));
                }
            }
            Event::SaveTable(nodes) => self.save(nodes),
            Event::ClonedKey(at) => {
                self.take_new_identity(at);
                drop(self.events.send(Event::ClonedKey(at)));
            }
            // An error means that nobody listens.
            other => drop(self.events.send(other)),
        }
    }

    /// Announces the keys that were set, and the fleet's and others beside them.
    fn announce(&mut self, now: Instant) {
        let beside = self.topic.iter().chain(&self.beside).map(|key| AnnounceKey { key: *key, pv: None });
        self.node.set_announces(beside.chain(self.announces.iter().cloned()).collect(), now);
    }

    fn found(&mut self, lookup: LookupId, finding: Finding) {
        if let Some(waiting) = self.lookups.get(&lookup)
            && let Err(mpsc::error::TrySendError::Full(_)) = waiting.findings.try_send(finding)
        {
            tracing::debug!("a reader is slower than its lookup: later contacts are left out");
        }
    }

    fn command(&mut self, command: Command) {
        let now = Instant::now();
        match command {
            Command::Ping { to, reply } => {
                let ping = self.node.ping(to, now);
                self.pings.insert(ping, reply);
            }
            Command::Bootstrap(addresses) => self.node.bootstrap(&addresses, now),
            Command::Lookup { number, ask, findings, done } => {
                let begun = match ask {
                    Ask::Peers(key) => self.node.get_peers(key, now),
                    Ask::Node(target) => self.node.find_node(target, now),
                    Ask::Item(target) => self.node.get_item(target, now),
                    Ask::Put(value) => self.node.put_item(value, now),
                    Ask::Statements(subject) => self.node.get_statements(subject, now),
                    Ask::Speak(subject, statement) => self.node.speak(subject, statement, now),
                };
                match begun {
                    Ok(lookup) => {
                        self.lookups.insert(lookup, Waiting { number, findings, done });
                    }
                    Err(err) => {
                        let _ = done.send(Err(err.into()));
                    }
                }
            }
            Command::Cancel(number) => {
                let of_number = self.lookups.iter().find(|(_, waiting)| waiting.number == number).map(|(lookup, _)| *lookup);
                if let Some(lookup) = of_number {
                    self.lookups.remove(&lookup);
                    self.node.cancel(lookup);
                }
            }
            Command::SetAnnounces(keys) => {
                self.announces = keys;
                self.announce(now);
            }
            Command::AnnounceBeside(mut keys) => {
                keys.truncate(BESIDE_MAX);
                self.beside = keys;
                self.announce(now);
            }
            Command::Tap(tap, topic) => {
                (self.tap, self.topic) = (Some(tap), topic);
                self.announce(now);
            }
            // The fleet keeps rates of its own; what the socket refuses is lost like any datagram, and counted.
            Command::SendRaw(to, bytes) if self.tap.is_some() => self.send(to, bytes),
            Command::SendRaw(to, bytes) => drop(self.node.send_raw(to, bytes, now)),
            Command::AskDials(reply) => {
                let _ = reply.send(self.node.ask_to_be_dialled(now));
            }
            Command::Status(reply) => {
                let status = self.node.status();
                let rates = self.meter.rates(now, status.counters);
                let _ = reply.send(Snapshot::new(&status, self.sockets.local(), rates, self.unsent));
            }
            Command::Shutdown(_) => unreachable!("run takes it"),
        }
    }

    /// Writes the routing tables in the background, unless the last writing still goes on.
    fn save(&mut self, nodes: Vec<NodeInfo>) {
        let Some(netdb) = &self.netdb else { return };
        if !self.saving.is_empty() || nodes.is_empty() {
            return;
        }
        let netdb = Arc::clone(netdb);
        self.saving.spawn_blocking(move || {
            let nodes: Vec<SavedNode> = nodes.iter().map(|node| SavedNode { id: node.id.0, address: node.addr }).collect();
            if let Err(err) = netdb.save_nodes(&nodes) {
                tracing::error!(%err, "the routing tables are not saved");
            }
        });
    }

    /// Another machine runs with this node's key: from now on this one has its own.
    fn take_new_identity(&mut self, other: SocketAddr) {
        let now = Instant::now();
        if self.identity_changed.is_some_and(|at| now.saturating_duration_since(at) < IDENTITY_CHANGE_INTERVAL) {
            return;
        }
        let key = match &self.netdb {
            // Rare enough to wait for the disk right here.
            Some(netdb) => match netdb.replace_identity(self.machine) {
                Ok(key) => key,
                Err(err) => {
                    tracing::error!(%err, %other, "another node has this node's key, and no new one can be stored");
                    return;
                }
            },
            None => SigningKey::from_bytes(&rand::random()),
        };
        tracing::warn!(%other, "another node has this node's key: taking a new one");
        self.identity_changed = Some(now);
        let known = self.node.saved_table();
        self.node = new_node(&self.options, &self.sockets, &key);
        let (old, new) = (self.key.borrow().verifying_key().to_bytes(), key.verifying_key().to_bytes());
        for pv in self.announces.iter_mut().filter_map(|announce| announce.pv.as_mut()).filter(|pv| pv.key == old) {
            pv.key = new;
        }
        self.key.send_replace(key);
        // Who waits is told by the closed channel; the numbers of the old state machine mean nothing to the new one.
        self.pings.clear();
        self.lookups.clear();
        self.dials.abort_all();
        self.dials = JoinSet::new();
        self.begin(&known);
        self.announce(now);
    }
}

/// The next finished writing; `None` where nothing is being written.
async fn finished(saving: &mut JoinSet<()>) -> Option<()> {
    // Where the runtime ends first the writing is cancelled, and the next start has an older table.
    saving.join_next().await.map(drop)
}

fn new_node(options: &NodeOptions, sockets: &Sockets, key: &SigningKey) -> Node {
    let local = sockets.local();
    let bound_port = local.into_iter().flatten().next().map_or(0, |address| address.port());
    let mut config = Config::new(key.verifying_key().to_bytes(), rand::random(), options.network, options.port.unwrap_or(bound_port));
    config.schedule = options.schedule;
    config.families = local.map(|address| address.is_some());
    config.read_only = options.read_only;
    config.limits = options.limits;
    Node::new(config, Instant::now(), unix_s())
}

fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests;
