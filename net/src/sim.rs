//! A network of [`Node`]s in one process, with a clock that jumps from event to event.
//!
//! The nodes are the ones that run behind sockets; only datagrams and time are imitated: a delay of half a round trip with
//! some jitter, independent loss, hosts that are gone. Rates are not imitated, a link carries anything. Everything follows
//! from the seed: the same seed gives the same run. For tests and for `examples/dht_sim.rs`; nothing of it is in the daemon.

use crate::dht::table::K;
use crate::dht::{Action, Config, Event, Family, Network, Node, Schedule};
use crate::krpc::{Body, Id, Message, NodeInfo, Transaction, Verb};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

/// Port of every simulated host.
pub const PORT: u16 = 9977;

/// Seconds since 1970 at the start of every simulation.
pub const UNIX_START_S: u64 = 1_800_000_000;

/// What lies between two hosts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// Mean round trip.
    pub rtt: Duration,
    /// Each way takes half of `rtt` times 1 ± this.
    pub jitter: f64,
    /// Share of datagrams that are lost.
    pub loss: f64,
    /// Share of datagrams that arrive twice.
    pub duplicates: f64,
}

impl Default for Link {
    fn default() -> Self {
        Self { rtt: Duration::from_millis(50), jitter: 0.2, loss: 0.0, duplicates: 0.0 }
    }
}

/// One machine.
#[derive(Debug)]
struct Host {
    id: Id,
    /// `None`: gone; datagrams to it vanish.
    node: Option<Box<Node>>,
    wake_at: u64,
    /// Says nothing of being a poolfs node.
    foreign: bool,
    /// Counts up when the node is replaced, so that wakes of the old one are void.
    life: u32,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Deliver { to: u32, from: SocketAddr, bytes: Box<[u8]> },
    Wake { host: u32, life: u32 },
}

/// Datagrams of the whole network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Sent, lost ones too.
    pub datagrams: u64,
    /// Their bytes, without headers.
    pub bytes: u64,
    /// Those among them that ask `get_peers` or answer it.
    pub get_peers: u64,
}

/// Whether a datagram is a `get_peers` or its answer: by bytes that stand in no other message, since all of a network's
/// datagrams pass here.
fn is_get_peers(bytes: &[u8]) -> bool {
    let has = |text: &[u8]| bytes.windows(text.len()).any(|window| window == text);
    if bytes.ends_with(b"1:y1:re") { has(b"5:token") } else { has(b"1:q9:get_peers") }
}

/// What one host sent and received, by kind: see [`Sim::watch`]. Datagrams and their bytes without headers.
pub type Tally = BTreeMap<&'static str, (u64, u64)>;

#[derive(Debug)]
struct Watch {
    host: u32,
    tally: Tally,
    /// Transactions of queries that were sent already.
    sent: HashSet<Transaction>,
}

impl Watch {
    fn count(&mut self, kind: &'static str, bytes: usize) {
        let (datagrams, all) = self.tally.entry(kind).or_default();
        *datagrams += 1;
        *all += bytes as u64;
    }

    fn sent(&mut self, bytes: &[u8]) {
        let kind = match Message::decode(bytes) {
            Ok(Message { transaction, body: Body::Query { verb, .. }, .. }) => {
                let first = self.sent.insert(transaction);
                match verb {
                    Verb::Announce(_) if first => "announces",
                    Verb::Announce(_) => "announces again",
                    Verb::GetPeers { .. } if first => "get_peers",
                    Verb::GetPeers { .. } => "get_peers again",
                    _ if first => "upkeep",
                    _ => "upkeep again",
                }
            }
            _ => "answers to others",
        };
        self.count(kind, bytes.len());
    }

    fn received(&mut self, bytes: &[u8]) {
        let query = Message::decode(bytes).is_ok_and(|message| matches!(message.body, Body::Query { .. }));
        self.count(if query { "queries of others" } else { "answers" }, bytes.len());
    }
}

/// See the module.
#[derive(Debug)]
pub struct Sim {
    start: Instant,
    now_ns: u64,
    heap: BinaryHeap<Reverse<(u64, u64, What)>>,
    sequence: u64,
    hosts: Vec<Host>,
    sorted: Vec<(Id, u32)>,
    link: Link,
    rng: StdRng,
    schedule: Schedule,
    keys_max: usize,
    concurrency: usize,
    events: Vec<(u32, Event)>,
    traffic: Traffic,
    watch: Option<Watch>,
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Sim {
    /// An empty network.
    pub fn new(seed: u64, link: Link, schedule: Schedule) -> Self {
        Self {
            start: Instant::now(), // Only a place to count from: all times are sums on it.
            now_ns: 0,
            heap: BinaryHeap::new(),
            sequence: 0,
            hosts: Vec::new(),
            sorted: Vec::new(),
            link,
            rng: StdRng::seed_from_u64(seed),
            schedule,
            keys_max: crate::dht::ANNOUNCE_KEYS_MAX,
            concurrency: crate::dht::CONCURRENCY,
            events: Vec::new(),
            traffic: Traffic::default(),
            watch: None,
        }
    }

    /// Raises the number of keys that nodes made from now on announce.
    pub fn set_announce_keys_max(&mut self, keys_max: usize) {
        self.keys_max = keys_max;
    }

    /// Sets how many queries lookups of nodes made from now on have under way.
    pub fn set_concurrency(&mut self, concurrency: usize) {
        self.concurrency = concurrency;
    }

    /// Changes what lies between hosts.
    pub fn set_link(&mut self, link: Link) {
        self.link = link;
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        Duration::from_nanos(self.now_ns)
    }

    /// The clock that nodes see.
    pub fn now(&self) -> Instant {
        self.start + self.elapsed()
    }

    /// Where a host listens: 10.0.0.0/8.
    pub fn address(host: u32) -> SocketAddr {
        SocketAddr::new(Ipv4Addr::from(0x0a00_0001 + host).into(), PORT)
    }

    fn host_at(&self, addr: SocketAddr) -> Option<u32> {
        let std::net::IpAddr::V4(v4) = addr.ip() else { return None };
        let host = u32::from(v4).checked_sub(0x0a00_0001)?;
        (addr.port() == PORT && (host as usize) < self.hosts.len()).then_some(host)
    }

    /// Adds a host whose node knows nobody.
    pub fn add_host(&mut self) -> u32 {
        let host = u32::try_from(self.hosts.len()).expect("a simulation has fewer than 2^24 hosts");
        let node = self.make_node();
        self.hosts.push(Host { id: node.id(Family::V4), node: Some(Box::new(node)), wake_at: u64::MAX, foreign: false, life: 0 });
        self.schedule_wake(host);
        host
    }

    fn make_node(&mut self) -> Node {
        let mut config = Config::new(self.rng.random(), self.rng.random(), Network::Private, PORT);
        config.families = [true, false];
        config.schedule = self.schedule;
        config.announce_keys_max = self.keys_max;
        config.concurrency = self.concurrency;
        Node::new(config, self.now(), UNIX_START_S + self.elapsed().as_secs())
    }

    /// Hosts so far, gone ones too.
    pub fn len(&self) -> u32 {
        u32::try_from(self.hosts.len()).expect("a simulation has fewer than 2^24 hosts")
    }

    /// Whether there is no host.
    pub fn is_empty(&self) -> bool {
        self.hosts.is_empty()
    }

    /// Id and address of a host.
    pub fn info(&self, host: u32) -> NodeInfo {
        NodeInfo { id: self.hosts[host as usize].id, addr: Self::address(host) }
    }

    /// Whether the host is there.
    pub fn is_alive(&self, host: u32) -> bool {
        self.hosts[host as usize].node.is_some()
    }

    /// A random host that is there.
    pub fn random_host(&mut self) -> u32 {
        loop {
            let host = self.rng.random_range(0..self.len());
            if self.is_alive(host) {
                return host;
            }
        }
    }

    /// The host's node, for looking.
    pub fn node(&self, host: u32) -> Option<&Node> {
        self.hosts[host as usize].node.as_deref()
    }

    /// From now on the host's datagrams carry another program's `v`: others treat it as an ordinary node.
    pub fn make_foreign(&mut self, host: u32) {
        self.hosts[host as usize].foreign = true;
    }

    /// Takes a host off the network without a word.
    pub fn kill(&mut self, host: u32) {
        let host = &mut self.hosts[host as usize];
        host.node = None;
        host.life += 1;
        host.wake_at = u64::MAX;
    }

    /// Another machine with a new id at the address of one that is gone.
    pub fn revive(&mut self, host: u32) {
        let node = self.make_node();
        let at = &mut self.hosts[host as usize];
        at.id = node.id(Family::V4);
        at.node = Some(Box::new(node));
        at.life += 1;
        self.schedule_wake(host);
    }

    /// Gives every node the table it would have after an hour of quiet: in each bucket K random nodes of those that
    /// exist there.
    pub fn seed_ideal_tables(&mut self) {
        self.sort_ids();
        for host in 0..self.len() {
            let known = self.ideal_table(host);
            let (now, rtt) = (self.now(), self.link.rtt);
            if let Some(node) = self.hosts[host as usize].node.as_mut() {
                node.assume_answered(&known, true, rtt, now);
            }
            self.schedule_wake(host);
        }
    }

    fn sort_ids(&mut self) {
        self.sorted = self.hosts.iter().zip(0..).map(|(h, n)| (h.id, n)).collect();
        self.sorted.sort_unstable();
    }

    fn ideal_table(&mut self, host: u32) -> Vec<NodeInfo> {
        let own = self.hosts[host as usize].id;
        let mut known = Vec::new();
        // The range of ids that share at least `bits` bits with the own id, narrowed bit by bit.
        let (mut from, mut to) = (0, self.sorted.len());
        for bits in 0..crate::krpc::ID_BITS {
            let set = own.0[bits / 8] & (0x80 >> (bits % 8)) != 0;
            let middle = from + self.sorted[from..to].partition_point(|(id, _)| id.0[bits / 8] & (0x80 >> (bits % 8)) == 0);
            let other = if set { from..middle } else { middle..to };
            (from, to) = if set { (middle, to) } else { (from, middle) };
            if other.len() <= K {
                known.extend(self.sorted[other].iter().map(|(id, n)| NodeInfo { id: *id, addr: Self::address(*n) }));
            } else {
                let mut taken: Vec<usize> = Vec::with_capacity(K);
                while taken.len() < K {
                    let at = self.rng.random_range(other.clone());
                    if !taken.contains(&at) {
                        taken.push(at);
                    }
                }
                known.extend(taken.iter().map(|at| NodeInfo { id: self.sorted[*at].0, addr: Self::address(self.sorted[*at].1) }));
            }
            if to - from <= 1 {
                break;
            }
        }
        known
    }

    /// The `count` hosts that are there and closest to `key`: what a lookup ought to find. By a look at every host, which
    /// shares nothing with the routing tables.
    pub fn closest_alive(&self, key: &Id, count: usize) -> Vec<u32> {
        let mut all: Vec<_> = self.hosts.iter().zip(0..).filter(|(h, _)| h.node.is_some()).map(|(h, n)| (h.id.distance(key), n)).collect();
        let count = count.min(all.len());
        if count > 0 && count < all.len() {
            all.select_nth_unstable(count);
        }
        all.truncate(count);
        all.sort_unstable();
        all.into_iter().map(|(_, n)| n).collect()
    }

    /// Gives a command to a host's node.
    ///
    /// # Panics
    /// If the host is gone.
    pub fn with<R>(&mut self, host: u32, command: impl FnOnce(&mut Node, Instant) -> R) -> R {
        let now = self.now();
        let node = self.hosts[host as usize].node.as_mut().expect("a command goes to a host that is there");
        let result = command(node, now);
        self.drain(host);
        result
    }

    /// Puts a datagram on the network as if it came from `from`, without loss or delay.
    pub fn inject(&mut self, from: SocketAddr, to: u32, bytes: &[u8]) {
        self.push(self.now_ns, What::Deliver { to, from, bytes: bytes.into() });
    }

    fn push(&mut self, at: u64, what: What) {
        self.sequence += 1;
        self.heap.push(Reverse((at, self.sequence, what)));
    }

    fn drain(&mut self, host: u32) {
        while let Some(action) = self.hosts[host as usize].node.as_mut().and_then(|n| n.poll()) {
            match action {
                Action::Send { to, bytes } => self.send(host, to, bytes),
                Action::Event(event) => self.events.push((host, event)),
                Action::Dial { ticket, to } => {
                    let ok = self.host_at(to).is_some_and(|h| self.is_alive(h));
                    let now = self.now();
                    if let Some(node) = self.hosts[host as usize].node.as_mut() {
                        node.dial_result(ticket, ok, now);
                    }
                }
            }
        }
        self.schedule_wake(host);
    }

    fn send(&mut self, host: u32, to: SocketAddr, mut bytes: Vec<u8>) {
        if self.hosts[host as usize].foreign
            && let Some(at) = bytes.windows(7).rposition(|w| w == b"1:v4:PF")
        {
            bytes[at + 5..at + 7].copy_from_slice(b"LT");
        }
        self.traffic.datagrams += 1;
        self.traffic.bytes += bytes.len() as u64;
        self.traffic.get_peers += u64::from(is_get_peers(&bytes));
        if let Some(watch) = self.watch.as_mut().filter(|watch| watch.host == host) {
            watch.sent(&bytes);
        }
        let from = Self::address(host);
        let Some(to) = self.host_at(to) else { return };
        if self.link.loss > 0.0 && self.rng.random_bool(self.link.loss) {
            return;
        }
        let copies = if self.link.duplicates > 0.0 && self.rng.random_bool(self.link.duplicates) { 2 } else { 1 };
        for _ in 0..copies {
            let factor = if self.link.jitter > 0.0 { self.rng.random_range(1.0 - self.link.jitter..=1.0 + self.link.jitter) } else { 1.0 };
            let at = self.now_ns + nanos(self.link.rtt.mul_f64(factor / 2.0));
            self.push(at, What::Deliver { to, from, bytes: bytes.as_slice().into() });
        }
    }

    fn schedule_wake(&mut self, host: u32) {
        let at = &mut self.hosts[host as usize];
        let Some(node) = at.node.as_ref() else { return };
        let due = nanos(node.next_timeout().saturating_duration_since(self.start)).max(self.now_ns);
        if due < at.wake_at {
            at.wake_at = due;
            let life = at.life;
            self.push(due, What::Wake { host, life });
        }
    }

    /// Runs until `until` after the start, or until `stop` says so after an event. Returns whether it was `stop`.
    pub fn run(&mut self, until: Duration, mut stop: impl FnMut(&mut Self) -> bool) -> bool {
        let until = nanos(until);
        loop {
            if !self.events.is_empty() && stop(self) {
                return true;
            }
            match self.heap.peek() {
                Some(Reverse((at, _, _))) if *at <= until => self.one_event(),
                _ => break,
            }
        }
        self.now_ns = self.now_ns.max(until);
        false
    }

    /// Runs for a time.
    pub fn run_for(&mut self, time: Duration) {
        self.run(self.elapsed() + time, |_| false);
    }

    fn one_event(&mut self) {
        let Some(Reverse((at, _, what))) = self.heap.pop() else { return };
        self.now_ns = self.now_ns.max(at);
        let now = self.now();
        match what {
            What::Deliver { to, from, bytes } => {
                if let Some(watch) = self.watch.as_mut().filter(|watch| watch.host == to) {
                    watch.received(&bytes);
                }
                let Some(node) = self.hosts[to as usize].node.as_mut() else { return };
                node.datagram(from, &bytes, now);
                self.drain(to);
            }
            What::Wake { host, life } => {
                let this = &mut self.hosts[host as usize];
                let Some(node) = this.node.as_mut().filter(|_| this.life == life) else { return };
                if this.wake_at != at {
                    return; // An earlier wake took its place.
                }
                this.wake_at = u64::MAX;
                node.tick(now);
                self.drain(host);
            }
        }
    }

    /// From now on counts what this host sends and receives, by kind.
    pub fn watch(&mut self, host: u32) {
        self.watch = Some(Watch { host, tally: Tally::new(), sent: HashSet::new() });
    }

    /// What the watched host sent and received; empty without one.
    pub fn tally(&self) -> Tally {
        self.watch.as_ref().map(|watch| watch.tally.clone()).unwrap_or_default()
    }

    /// Events since the last call, each with the host it happened at.
    pub fn take_events(&mut self) -> Vec<(u32, Event)> {
        std::mem::take(&mut self.events)
    }

    /// Datagrams of the whole network since the start.
    pub fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// The simulation's own randomness.
    pub fn rng(&mut self) -> &mut StdRng {
        &mut self.rng
    }
}

pub mod runs;
#[cfg(test)]
mod tests;
