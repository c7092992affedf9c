//! The DHT's node without sockets, clock or threads.
//!
//! [`Node`] is driven from outside: datagrams go in with [`Node::datagram`], time with [`Node::tick`], wishes with the
//! methods named after them; what is to be done comes out of [`Node::poll`] as [`Action`]s, to be drained after each of
//! these calls. [`Node::next_timeout`] says when the next `tick` is due at the latest. Nobody else owns any of its state, nothing
//! in it blocks, and all of `now` must come from one monotonic clock: so the same code runs behind a UDP socket and, ten
//! thousand times, in a simulator with a virtual clock.
//!
//! ```text
//! loop {
//!     while let Some(action) = node.poll() { match action {
//!         Action::Send { to, bytes } => socket.send_to(&bytes, to),        // errors: ignore, retransmission covers them
//!         Action::Dial { ticket, to } => spawn a TCP connect of at most 2 s, then node.dial_result(ticket, ok, now),
//!         Action::Event(event) => hand to whoever asked,
//!     } }
//!     wait for a datagram (node.datagram), a command, or node.next_timeout() (node.tick)
//! }
//! ```
//!
//! Commands: [`Node::bootstrap`], [`Node::restore`] (the saved table), [`Node::ping`], [`Node::find_node`], [`Node::get_peers`],
//! [`Node::get_item`], [`Node::put_item`], [`Node::speak`], [`Node::set_announces`], [`Node::cancel`].
//!
//! What runs by itself: retransmission, the upkeep of two routing tables (BEP 32), the vote on the own address and the id
//! that follows from it (BEP 42), bootstrap until somebody answers, announces of the set keys and their refresh, and on a
//! public network being dialled back, before which the node is read-only (BEP 43) and announces nothing.

pub mod address;
mod announce;
mod lookup;
pub mod peers;
mod query;
pub mod rtt;
mod select;
mod server;
pub mod storage;
pub mod table;
#[cfg(test)]
mod tests;
pub mod token;
mod upkeep;
pub mod walk;

pub use address::{Family, Network};
pub use announce::{AnnounceKey, FORGET_AFTER_KEYS, KNOWN_MAX, OUTBOX_MAX, REFRESH_OTHER, REFRESH_POOLFS, SILENT_MAX, WITHDRAWALS_MAX};
pub use lookup::{DETAILS_MAX, FOUND_MAX, LOOKUPS_MAX, QUERIES_MAX, STATEMENTS_MAX};
pub use query::PENDING_MAX;
pub use rtt::Schedule;
pub use select::{ANNOUNCE_KEYS_MAX, AnnounceMode, LARGE_BYTES, Offer, PIECE_KEYS_PER_FILE_MAX, select};
pub use server::{CLOSER_NODES_MAX, DIALS_MAX, ITEM_GETS_PER_SECOND, UNPROVED_FACTOR_MAX, UNPROVED_REPLY_BYTES_MAX};
pub use storage::Limits;
pub use upkeep::{BOOTSTRAP_MAX, RESTORE_MAX};

use crate::krpc::{Id, NodeInfo, Pv, Transaction};
use announce::Announcer;
use lookup::Lookup;
use peers::{Inbound, Peers};
use query::Pending;
use rand::rngs::StdRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use rtt::{Bucket, Rtt};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};
use storage::Store;
use table::Table;
use token::Tokens;

/// Queries of the node's own lookups a second.
pub const OUT_LOOKUPS_PER_SECOND: f32 = 500.0;

/// Queries of lookups sent at once.
pub const OUT_LOOKUPS_BURST: f32 = 100.0;

/// Queries of announces, refresh and checks a second.
pub const OUT_UPKEEP_PER_SECOND: f32 = 50.0;

/// Queries of announces, refresh and checks sent at once.
pub const OUT_UPKEEP_BURST: f32 = 25.0;

/// How a [`Node`] is to behave. Plain values; see [`Config::new`] for the defaults.
#[derive(Debug, Clone)]
pub struct Config {
    /// Ed25519 public key: bytes 3 to 18 of the id come from it.
    pub key: [u8; 32],
    /// Seeds ids of transactions, token secrets and the sampling: 32 unpredictable bytes, other ones at each start.
    pub seed: [u8; 32],
    /// Whether strangers are in the network.
    pub network: Network,
    /// When queries are repeated.
    pub schedule: Schedule,
    /// Which families there is a socket for, indexed by [`Family`].
    pub families: [bool; 2],
    /// Where pieces are served (TCP); what is announced.
    pub port: u16,
    /// Never answers and never announces, even when it could be reached.
    pub read_only: bool,
    /// Quotas of what is kept for others.
    pub limits: Limits,
    /// Announced keys, [`ANNOUNCE_KEYS_MAX`] but in a simulation.
    pub announce_keys_max: usize,
    /// Queries that one lookup has under way in a family.
    pub concurrency: usize,
}

/// Queries that one lookup has under way in a family: 3 finds the closest nodes with 14 queries among 10,000.
pub const CONCURRENCY: usize = 3;

impl Config {
    /// Both families, adapted retransmission, all limits as documented.
    pub fn new(key: [u8; 32], seed: [u8; 32], network: Network, port: u16) -> Self {
        Self {
            key,
            seed,
            network,
            schedule: Schedule::Adapted,
            families: [true, true],
            port,
            read_only: false,
            limits: Limits::default(),
            announce_keys_max: ANNOUNCE_KEYS_MAX,
            concurrency: CONCURRENCY,
        }
    }
}

/// Names a lookup, item or statement under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LookupId(u64);

/// Names a ping under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PingId(u64);

/// Names a TCP connection that this node was asked to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DialTicket(u64);

/// What the owner of the sockets has to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Send a datagram, from the socket of the address's family.
    Send {
        /// Where.
        to: SocketAddr,
        /// At most [`crate::krpc::DATAGRAM_BYTES_OUT_MAX`].
        bytes: Vec<u8>,
    },
    /// Try to open a TCP connection, close it at once and tell [`Node::dial_result`].
    Dial {
        /// For the answer.
        ticket: DialTicket,
        /// The address of the very sender of the request, and the port it named.
        to: SocketAddr,
    },
    /// Something happened.
    Event(Event),
}

/// A contact that a lookup found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundContact {
    /// Where pieces are served.
    pub addr: SocketAddr,
    /// What its announcer said of itself: a hint. `None` if nothing (yet): the same contact may come again with one.
    pub pv: Option<Pv>,
}

/// How a lookup ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The closest nodes that answered, at most 8 of each family, closest first.
    pub closest: Vec<NodeInfo>,
    /// Queries sent, repetitions not counted.
    pub queries: u32,
    /// Answers to them.
    pub answers: u32,
    /// Steps from the own table to the farthest of `closest`.
    pub hops: u8,
    /// From the command to the end.
    pub took: Duration,
    /// From the command to the first contact, item or statement; `None` if there was none.
    pub first_after: Option<Duration>,
    /// Nodes that took the item or the statement; 0 for a lookup.
    pub stored: u32,
}

/// What a node tells its owner.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A ping was answered.
    Pong {
        /// Which.
        ping: PingId,
        /// By whom.
        node: NodeInfo,
        /// First sending to answer; includes waiting if it was sent twice.
        took: Duration,
        /// Whether it is a poolfs node.
        poolfs: bool,
    },
    /// A ping was not answered within 14 s.
    Unreachable {
        /// Which.
        ping: PingId,
        /// Who.
        to: SocketAddr,
    },
    /// Somebody who was asked to has tried to open a connection to this node's port.
    Dialled {
        /// Who.
        by: SocketAddr,
        /// Whether it stood.
        reached: bool,
    },
    /// Contacts, as they come; each at most once without and once with `pv`.
    Found {
        /// Of which lookup.
        lookup: LookupId,
        /// At least one.
        contacts: Vec<FoundContact>,
    },
    /// The item; its hash is right.
    Item {
        /// Of which lookup.
        lookup: LookupId,
        /// Bencoded.
        value: Vec<u8>,
    },
    /// Statements whose form, time and signature are right, and that belong at the key. Weight and proof are the reader's.
    Statements {
        /// Of which lookup.
        lookup: LookupId,
        /// The bytes, each at most once.
        statements: Vec<Vec<u8>>,
    },
    /// The lookup is over.
    Done {
        /// Which.
        lookup: LookupId,
        /// How it ended.
        outcome: Outcome,
    },
    /// All nodes that could be had for a key of [`Node::set_announces`] have it.
    Announced {
        /// The key.
        key: Id,
        /// Nodes that took it.
        nodes: u32,
    },
    /// The routing tables, for keeping: every 10 minutes while they are not empty.
    SaveTable(Vec<NodeInfo>),
    /// The own id changed, since the own address became known.
    IdChanged(Family, Id),
    /// Three nodes of different networks agree on this node's own address.
    OwnAddress(IpAddr),
    /// Another node reached this one, or the node stopped being sure of it.
    Reachable(bool),
    /// A node at this address has this node's key: one of the two is a copy of the other's disk.
    ClonedKey(SocketAddr),
    /// A query that the DHT does not know, whose name begins with `pf_`; [`Node::send_raw`] answers it.
    Extension {
        /// By whom.
        from: SocketAddr,
        /// To be echoed.
        transaction: Transaction,
        /// The whole datagram.
        bytes: Vec<u8>,
    },
}

/// Counters since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Datagrams received.
    pub datagrams_in: u64,
    /// Their bytes, without IP and UDP headers.
    pub bytes_in: u64,
    /// Datagrams sent.
    pub datagrams_out: u64,
    /// Their bytes, without IP and UDP headers.
    pub bytes_out: u64,
    /// Queries sent, repetitions not counted.
    pub queries_out: u64,
    /// Repetitions.
    pub repeated: u64,
    /// Answers taken.
    pub answers_in: u64,
    /// Queries that nobody answered in 14 s.
    pub unreachable: u64,
    /// Queries answered.
    pub answers_out: u64,
    /// Datagrams that were no message.
    pub malformed: u64,
    /// Answers to nothing: late, twice, or from an address that was not asked.
    pub foreign: u64,
    /// Queries not looked at because of a rate.
    pub limited: u64,
    /// Announces, puts and statements refused because of a quota, a token or a rule.
    pub refused: u64,
}

/// A view of the node for people.
#[derive(Debug, Clone, PartialEq)]
pub struct Status {
    /// The id of each family.
    pub ids: [Id; 2],
    /// Nodes in each table.
    pub nodes: [usize; 2],
    /// Good ones (BEP 5) among them.
    pub good: [usize; 2],
    /// poolfs nodes among them.
    pub poolfs: [usize; 2],
    /// The own address of each family, if three nodes agreed on it.
    pub own_address: [Option<IpAddr>; 2],
    /// Whether another node has reached this one; always true on a private network.
    pub reachable: bool,
    /// Keys with contacts kept for others.
    pub stored_keys: usize,
    /// Contacts kept for others.
    pub stored_contacts: usize,
    /// Items kept for others.
    pub stored_items: usize,
    /// Statements kept for others.
    pub stored_statements: usize,
    /// Keys set to be announced.
    pub announced_keys: usize,
    /// Lookups under way.
    pub lookups: usize,
    /// Median and 95th percentile of the last lookups' time to the first contact, or to their end without any.
    pub lookup_p50: Option<Duration>,
    /// See `lookup_p50`.
    pub lookup_p95: Option<Duration>,
    /// Smoothed round-trip time of each family.
    pub rtt: [Option<Duration>; 2],
    /// Counters since the start.
    pub counters: Counters,
}

/// Why a command is not begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// [`LOOKUPS_MAX`] are under way.
    #[error("{LOOKUPS_MAX} lookups are under way; try again when one has ended")]
    Busy,
    /// An item over 1,000 bytes, or not canonical bencode.
    #[error("not a canonical bencoded value of at most 1000 bytes")]
    NotAnItem,
    /// Not a statement, void, or about a node that it does not name.
    #[error("not a valid statement about this node")]
    NotAStatement,
}

/// A node of the DHT. See the module.
#[derive(Debug)]
pub struct Node {
    config: Config,
    ids: [Id; 2],
    rng: StdRng,
    now: Instant,
    unix: (Instant, u64),
    tables: [Table; 2],
    peers: Peers,
    family_rtt: [Rtt; 2],
    tokens: Tokens,
    store: Store,
    inbound: Inbound,
    out_lookups: Bucket,
    out_upkeep: Bucket,
    pending: HashMap<[u8; 4], Pending>,
    timers: BinaryHeap<Reverse<(Instant, [u8; 4])>>,
    lookups: BTreeMap<LookupId, Lookup>,
    pump_at: Option<Instant>,
    announcer: Announcer,
    server: server::Server,
    upkeep: upkeep::Upkeep,
    next_number: u64,
    recent: VecDeque<Duration>,
    actions: VecDeque<Action>,
    counters: Counters,
}

impl Node {
    /// A node that knows nobody. `unix_s`: seconds since 1970 at `now`, for the times in statements.
    pub fn new(config: Config, now: Instant, unix_s: u64) -> Self {
        let mut rng = StdRng::from_seed(config.seed);
        let ids = [0, 1].map(|_| Id::of_key(&config.key, None, rng.random()));
        // Both families begin with one id: on a private network it stays the same in both.
        let ids = [ids[0], ids[0]];
        let tokens = Tokens::new(rng.random(), rng.random(), now);
        Self {
            ids,
            tables: ids.map(|id| Table::new(id, config.network)),
            peers: Peers::default(),
            family_rtt: [Rtt::default(); 2],
            tokens,
            store: Store::new(config.limits, now),
            inbound: Inbound::new(now),
            out_lookups: Bucket::new(OUT_LOOKUPS_BURST, now),
            out_upkeep: Bucket::new(OUT_UPKEEP_BURST, now),
            pending: HashMap::new(),
            timers: BinaryHeap::new(),
            lookups: BTreeMap::new(),
            pump_at: None,
            announcer: Announcer::new(),
            server: server::Server::new(now),
            upkeep: upkeep::Upkeep::new(config.network, now),
            next_number: 0,
            recent: VecDeque::new(),
            actions: VecDeque::new(),
            counters: Counters::default(),
            unix: (now, unix_s),
            now,
            rng,
            config,
        }
    }

    /// The id in a family.
    pub fn id(&self, family: Family) -> Id {
        self.ids[family as usize]
    }

    /// How the node was configured.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The next thing to do; `None` when all is done for now.
    pub fn poll(&mut self) -> Option<Action> {
        let action = self.actions.pop_front();
        if action.is_none() && self.actions.capacity() > 64 {
            self.actions = VecDeque::new();
        }
        action
    }

    /// Tells the wall clock anew: `unix_s` seconds since 1970 at `now`.
    pub fn set_unix_time(&mut self, now: Instant, unix_s: u64) {
        self.unix = (now, unix_s);
    }

    fn unix_now(&self) -> u64 {
        self.unix.1.saturating_add(self.now.saturating_duration_since(self.unix.0).as_secs())
    }

    /// When [`Self::tick`] is due at the latest.
    pub fn next_timeout(&self) -> Instant {
        let timer = self.timers.peek().map(|Reverse((at, _))| *at);
        [timer, self.pump_at, self.announcer.due_at()].into_iter().flatten().fold(self.upkeep.due_at(), Instant::min)
    }

    /// Does what is due at `now`. May be called at any time.
    pub fn tick(&mut self, now: Instant) {
        self.advance(now);
        self.run_timers();
        if self.pump_at.is_some_and(|at| at <= self.now) {
            self.pump_at = None;
            self.pump_all();
        }
        self.run_announcer();
        self.run_upkeep();
    }

    /// Time never goes back: a caller's older `now` is taken as the newest.
    fn advance(&mut self, now: Instant) {
        self.now = self.now.max(now);
        let rng = &mut self.rng;
        self.tokens.rotate(self.now, || rng.random());
    }

    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    fn event(&mut self, event: Event) {
        self.actions.push_back(Action::Event(event));
    }

    fn transmit(&mut self, to: SocketAddr, bytes: Vec<u8>) {
        self.counters.datagrams_out += 1;
        self.counters.bytes_out += bytes.len() as u64;
        self.actions.push_back(Action::Send { to, bytes });
    }

    /// Sends a datagram of another protocol on the same port, made by the caller, at the rate of upkeep. Returns `false` if that
    /// is used up: it was not sent.
    pub fn send_raw(&mut self, to: SocketAddr, bytes: Vec<u8>, now: Instant) -> bool {
        self.advance(now);
        let may = self.out_upkeep.take(OUT_UPKEEP_PER_SECOND, OUT_UPKEEP_BURST, self.now);
        if may {
            self.transmit(to, bytes);
        } else {
            self.counters.limited += 1;
        }
        may
    }

    fn random_id(&mut self) -> Id {
        let mut id = [0; 20];
        self.rng.fill_bytes(&mut id);
        Id(id)
    }

    /// Whether this node announces, answers and lets itself be kept in tables.
    fn is_active(&self) -> bool {
        !self.config.read_only && self.upkeep.is_reachable()
    }

    /// The routing tables' nodes that are not failing, for keeping over a restart.
    pub fn saved_table(&self) -> Vec<NodeInfo> {
        self.tables.iter().flat_map(Table::entries).filter(|e| e.failures == 0).map(|e| e.info).collect()
    }

    /// Counters since the start.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// A view for people and metrics.
    pub fn status(&self) -> Status {
        let mut sorted: Vec<Duration> = self.recent.iter().copied().collect();
        sorted.sort_unstable();
        let at = |percent: usize| sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).copied();
        Status {
            ids: self.ids,
            nodes: [0, 1].map(|f| self.tables[f].len()),
            good: [0, 1].map(|f| self.tables[f].entries().filter(|e| e.is_good(self.now)).count()),
            poolfs: [0, 1].map(|f| self.tables[f].entries().filter(|e| e.poolfs).count()),
            own_address: self.upkeep.own_addresses(),
            reachable: self.upkeep.is_reachable(),
            stored_keys: self.store.keys(),
            stored_contacts: self.store.contacts(),
            stored_items: self.store.items(),
            stored_statements: self.store.statements_count(),
            announced_keys: self.announcer.keys(),
            lookups: self.lookups.values().filter(|l| l.is_command()).count(),
            lookup_p50: at(50),
            lookup_p95: at(95),
            rtt: [0, 1].map(|f: usize| self.family_rtt[f].smoothed()),
            counters: self.counters,
        }
    }

    /// Whether a contact of the key is kept here, for tests and people.
    pub fn holds(&self, key: &Id) -> bool {
        Family::ALL.into_iter().any(|family| self.store.has_contacts(key, family, self.now))
    }

    /// Nodes of one family's table, closest bucket last, for people.
    pub fn table(&self, family: Family) -> Vec<table::Entry> {
        self.tables[family as usize].entries().copied().collect()
    }
}
