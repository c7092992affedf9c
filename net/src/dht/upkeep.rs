//! What a node does by itself: joining, keeping its tables, learning its own address, being dialled back.

use super::address::{self, Family, Network, voter_group};
use super::lookup::Kind;
use super::query::{Budget, NotSent, Purpose};
use super::{Event, Node};
use crate::krpc::{Id, NodeInfo, Reply, Verb, Want};
use rand::RngExt as _;
use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// Bootstrap addresses kept.
pub const BOOTSTRAP_MAX: usize = 64;

/// Nodes of a saved table that are taken: 512 of each family.
pub const RESTORE_MAX: usize = 1_024;

/// Rounds of upkeep.
const ROUND: Duration = Duration::from_secs(10);

/// Silent nodes of one family that are asked in one round.
const CHECKS_PER_ROUND: usize = 2;

/// Between two lookups of the own neighbourhood, and of a bucket with room.
const REFRESH: Duration = Duration::from_secs(15 * 60);

/// Buckets that are filled one after the other when the first node of a family was met.
const FILL_ROUNDS: u8 = 8;

/// First pause between two attempts to bootstrap; doubles up to [`BOOTSTRAP_PAUSE_MAX`].
const BOOTSTRAP_PAUSE_MIN: Duration = Duration::from_secs(15);

/// See [`BOOTSTRAP_PAUSE_MIN`].
const BOOTSTRAP_PAUSE_MAX: Duration = Duration::from_secs(300);

/// Between two tellings of the tables.
const SAVE_EVERY: Duration = Duration::from_secs(600);

/// Votes on the own address that are kept for a family, and how many make it known.
const VOTES_MAX: usize = 16;
const VOTES_NEEDED: usize = 3;

/// Between two requests to be dialled back, while not reachable and when the last proof is old.
const DIAL_BACK_EVERY: Duration = Duration::from_secs(300);

/// Nodes asked at once to dial back.
const DIAL_BACK_NODES: usize = 3;

/// Age at which the proof of being reachable is renewed, and at which it is worth nothing.
const PROOF_OLD: Duration = Duration::from_secs(2 * 3600);
const PROOF_VOID: Duration = Duration::from_secs(6 * 3600);

/// Addresses remembered as this machine's own, and as clones that were told of.
const SELF_MAX: usize = 16;

/// See the module.
#[derive(Debug)]
pub(super) struct Upkeep {
    network: Network,
    round_at: Instant,
    bootstrap: Vec<SocketAddr>,
    bootstrap_at: Option<Instant>,
    bootstrap_pause: Duration,
    restore: VecDeque<NodeInfo>,
    restore_at: Option<Instant>,
    refresh_at: [Option<Instant>; 2],
    fills: [u8; 2],
    last_bucket: [usize; 2],
    save_at: Instant,
    last_answer: Option<Instant>,
    votes: [VecDeque<(IpAddr, IpAddr)>; 2],
    own: [Option<IpAddr>; 2],
    proved: Option<Instant>,
    dial_back_at: Instant,
    selves: VecDeque<SocketAddr>,
    clones: VecDeque<(SocketAddr, Instant)>,
}

impl Upkeep {
    pub(super) fn new(network: Network, now: Instant) -> Self {
        Self {
            network,
            round_at: now + ROUND,
            bootstrap: Vec::new(),
            bootstrap_at: None,
            bootstrap_pause: BOOTSTRAP_PAUSE_MIN,
            restore: VecDeque::new(),
            restore_at: None,
            refresh_at: [None; 2],
            fills: [0; 2],
            last_bucket: [0; 2],
            save_at: now + SAVE_EVERY,
            last_answer: None,
            votes: [VecDeque::new(), VecDeque::new()],
            own: [None; 2],
            proved: None,
            dial_back_at: now,
            selves: VecDeque::new(),
            clones: VecDeque::new(),
        }
    }

    pub(super) fn due_at(&self) -> Instant {
        let some = [self.bootstrap_at, self.restore_at, self.refresh_at[0], self.refresh_at[1]];
        some.into_iter().flatten().fold(self.round_at, Instant::min)
    }

    pub(super) fn is_reachable(&self) -> bool {
        self.network == Network::Private || self.proved.is_some()
    }

    pub(super) fn own_addresses(&self) -> [Option<IpAddr>; 2] {
        self.own
    }

    pub(super) fn own_address(&self, family: Family) -> Option<IpAddr> {
        self.own[family as usize]
    }

    pub(super) fn last_answer(&self) -> Option<Instant> {
        self.last_answer
    }

    pub(super) fn answered(&mut self, now: Instant) {
        self.last_answer = Some(now);
    }

    /// The first node of a family is in its table: the neighbourhood is looked up, then the buckets are filled.
    pub(super) fn joined(&mut self, family: usize, now: Instant) {
        self.refresh_at[family] = Some(now + Duration::from_millis(100));
        self.fills[family] = FILL_ROUNDS;
        self.bootstrap_pause = BOOTSTRAP_PAUSE_MIN;
    }

    pub(super) fn knows_self(&self, addr: SocketAddr) -> bool {
        self.selves.contains(&addr)
    }

    pub(super) fn is_self(&mut self, addr: SocketAddr) {
        if !self.knows_self(addr) {
            if self.selves.len() == SELF_MAX {
                self.selves.pop_front();
            }
            self.selves.push_back(addr);
        }
    }

    /// Whether a clone at this address has not been told of in the last hour.
    pub(super) fn tell_clone(&mut self, addr: SocketAddr, now: Instant) -> bool {
        self.clones.retain(|(_, at)| now.saturating_duration_since(*at) < Duration::from_secs(3600));
        if self.clones.len() == SELF_MAX || self.clones.iter().any(|(known, _)| *known == addr) {
            return false;
        }
        self.clones.push_back((addr, now));
        true
    }
}

impl Node {
    /// Nodes to begin with whose ids are not known; they are asked now, and again while a table is empty. At most
    /// [`BOOTSTRAP_MAX`] are kept, the latest.
    pub fn bootstrap(&mut self, addrs: &[SocketAddr], now: Instant) {
        self.advance(now);
        for addr in addrs.iter().map(|a| address::canonical(*a)) {
            if !self.upkeep.bootstrap.contains(&addr) {
                if self.upkeep.bootstrap.len() == BOOTSTRAP_MAX {
                    self.upkeep.bootstrap.remove(0);
                }
                self.upkeep.bootstrap.push(addr);
            }
            self.bootstrap_from(addr);
        }
        self.upkeep.bootstrap_at = Some(self.now + self.upkeep.bootstrap_pause);
    }

    fn bootstrap_from(&mut self, addr: SocketAddr) {
        // Its own neighbourhood, in both families where both are spoken.
        let target = self.ids[Family::of(addr) as usize];
        let [v4, v6] = self.config.families;
        let want = if v4 && v6 { Want { v4, v6 } } else { Want::default() };
        // Not sent: the next attempt comes by itself.
        let _later = self.query(addr, None, Verb::FindNode { target, want }, Purpose::Bootstrap, Budget::Upkeep);
    }

    pub(super) fn bootstrap_answered(&mut self, reply: &Reply) {
        let nodes: Vec<NodeInfo> = reply.nodes.iter().chain(&reply.nodes6).take(4 * super::table::K).copied().collect();
        self.queue_restore(&nodes);
    }

    /// Nodes of a table saved earlier. They are asked before they are believed, at the rate of upkeep; at most
    /// [`RESTORE_MAX`] wait.
    pub fn restore(&mut self, nodes: &[NodeInfo], now: Instant) {
        self.advance(now);
        self.queue_restore(nodes);
        self.run_restore();
    }

    fn queue_restore(&mut self, nodes: &[NodeInfo]) {
        for node in nodes {
            let usable = address::is_usable(node.addr, self.config.network)
                && self.tables[Family::of(node.addr) as usize].has_room_for(node, self.now);
            if usable && self.upkeep.restore.len() < RESTORE_MAX && !self.upkeep.restore.iter().any(|n| n.addr == node.addr) {
                self.upkeep.restore.push_back(*node);
            }
        }
        if !self.upkeep.restore.is_empty() {
            self.upkeep.restore_at.get_or_insert(self.now);
        }
    }

    fn run_restore(&mut self) {
        self.upkeep.restore_at = None;
        while let Some(node) = self.upkeep.restore.pop_front() {
            if !self.tables[Family::of(node.addr) as usize].has_room_for(&node, self.now) {
                continue;
            }
            if let Err(NotSent::Until(at)) = self.query(node.addr, Some(node.id), Verb::Ping, Purpose::Check, Budget::Upkeep) {
                self.upkeep.restore.push_front(node);
                self.upkeep.restore_at = Some(at);
                return;
            }
        }
    }

    /// Puts nodes into the tables as if each had just answered after `rtt`. For the simulator's ideal tables; a live node
    /// learns by [`Self::restore`] and [`Self::bootstrap`].
    pub fn assume_answered(&mut self, nodes: &[NodeInfo], poolfs: bool, rtt: Duration, now: Instant) {
        self.advance(now);
        for node in nodes {
            self.family_rtt[Family::of(node.addr) as usize].sample(rtt);
            self.tables[Family::of(node.addr) as usize].answered(*node, poolfs, self.now);
        }
        for family in [0, 1] {
            if !self.tables[family].is_empty() && self.upkeep.refresh_at[family].is_none() {
                self.upkeep.refresh_at[family] = Some(self.now + REFRESH.mul_f32(self.rng.random_range(0.0..1.0)));
            }
        }
    }

    pub(super) fn run_upkeep(&mut self) {
        let now = self.now;
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if due(self.upkeep.bootstrap_at) {
            self.retry_bootstrap();
        }
        if due(self.upkeep.restore_at) {
            self.run_restore();
        }
        for family in [0, 1] {
            if due(self.upkeep.refresh_at[family]) {
                self.refresh(family);
            }
        }
        if self.upkeep.round_at <= now {
            self.round();
        }
    }

    fn retry_bootstrap(&mut self) {
        let lonely = (0..2).any(|f| self.config.families[f] && self.tables[f].is_empty());
        if lonely {
            let lonely_families = [0, 1].map(|f: usize| self.tables[f].is_empty());
            let addrs = self.upkeep.bootstrap.clone();
            addrs.into_iter().filter(|a| lonely_families[Family::of(*a) as usize]).for_each(|a| self.bootstrap_from(a));
            self.upkeep.bootstrap_pause = (self.upkeep.bootstrap_pause * 2).min(BOOTSTRAP_PAUSE_MAX);
        }
        self.upkeep.bootstrap_at = Some(self.now + self.upkeep.bootstrap_pause);
    }

    /// Looks up the own neighbourhood, and buckets that have room: one after the other after joining, then one each time.
    fn refresh(&mut self, family: usize) {
        let mut families = [false; 2];
        families[family] = true;
        let own = self.ids[family];
        let filling = self.upkeep.fills[family] > 0;
        if !filling || self.upkeep.fills[family] == FILL_ROUNDS {
            self.start_lookup(Kind::Refresh, own, families, &[], &[]);
        }
        if let Some(bucket) = self.tables[family].thin_bucket(self.upkeep.last_bucket[family]) {
            self.upkeep.last_bucket[family] = bucket;
            let random = self.random_id();
            let target = own.random_beside(bucket, random.0);
            self.start_lookup(Kind::Refresh, target, families, &[], &[]);
        }
        self.upkeep.fills[family] = self.upkeep.fills[family].saturating_sub(1);
        let pause = if self.upkeep.fills[family] > 0 { Duration::from_secs(2) } else { REFRESH.mul_f32(self.rng.random_range(0.9..1.1)) };
        self.upkeep.refresh_at[family] = Some(self.now + pause);
    }

    fn round(&mut self) {
        self.upkeep.round_at = self.now + ROUND;
        let unix = self.unix_now();
        self.store.sweep(self.now, unix);
        self.peers.sweep(self.now);
        self.inbound.sweep(self.now);
        for family in [0, 1] {
            for _ in 0..CHECKS_PER_ROUND {
                let Some(node) = self.tables[family].to_check(self.now) else { break };
                self.check(node);
            }
        }
        if self.upkeep.save_at <= self.now {
            self.upkeep.save_at = self.now + SAVE_EVERY;
            let nodes = self.saved_table();
            if !nodes.is_empty() {
                self.event(Event::SaveTable(nodes));
            }
        }
        self.keep_reachable();
    }

    // --- the own address

    /// `voter` says that this node's address is `own`. Three of different networks that agree make it so.
    pub(super) fn vote(&mut self, family: Family, voter: IpAddr, own: IpAddr) {
        let f = family as usize;
        if own.is_ipv4() != (family == Family::V4) {
            return;
        }
        let group = voter_group(voter, self.config.network);
        let votes = &mut self.upkeep.votes[f];
        votes.retain(|(known, _)| *known != group);
        if votes.len() == VOTES_MAX {
            votes.pop_front();
        }
        votes.push_back((group, own));
        let agree = votes.iter().filter(|(_, ip)| *ip == own).count();
        if agree < VOTES_NEEDED || self.upkeep.own[f] == Some(own) {
            return;
        }
        self.upkeep.own[f] = Some(own);
        self.event(Event::OwnAddress(own));
        if self.config.network == Network::Public && address::is_global(own) && !self.ids[f].fits_address(own) {
            let id = Id::of_key(&self.config.key, Some(own), self.rng.random());
            self.ids[f] = id;
            self.tables[f].rebuild(id, self.now);
            self.event(Event::IdChanged(family, id));
        }
    }

    /// Where others get pieces from this machine, as far as others have told it.
    pub(super) fn own_contact(&self, family: Family) -> Option<SocketAddr> {
        let contact = SocketAddr::new(self.upkeep.own_address(family)?, self.config.port);
        address::is_usable(contact, self.config.network).then_some(contact)
    }

    // --- being reachable

    /// A query came: from an address to which nothing was sent in the last 20 minutes it proves that strangers get through.
    pub(super) fn unsolicited(&mut self, from: SocketAddr) {
        let stale = self.upkeep.proved.is_none_or(|at| self.now.saturating_duration_since(at) >= PROOF_OLD);
        if self.config.network == Network::Public && stale && !self.peers.knows_ip(from.ip()) {
            self.reached();
        }
    }

    pub(super) fn reached(&mut self) {
        let first = !self.upkeep.is_reachable();
        self.upkeep.proved = Some(self.now);
        if first {
            self.event(Event::Reachable(true));
        }
    }

    fn keep_reachable(&mut self) {
        if self.config.network == Network::Private || self.config.read_only {
            return;
        }
        let age = self.upkeep.proved.map(|at| self.now.saturating_duration_since(at));
        if age.is_some_and(|age| age >= PROOF_VOID) {
            self.upkeep.proved = None;
            self.event(Event::Reachable(false));
        }
        if age.is_some_and(|age| age < PROOF_OLD) || self.upkeep.dial_back_at > self.now {
            return;
        }
        if self.ask_for_dials() > 0 {
            self.upkeep.dial_back_at = self.now + DIAL_BACK_EVERY;
        }
    }

    /// Asks a few poolfs nodes to open a connection to this node's port, on whatever network; returns how many. Each that tried is told of by
    /// [`Event::Dialled`]; one that was asked by this address in the last minute refuses, and is not.
    pub fn ask_to_be_dialled(&mut self, now: Instant) -> usize {
        self.advance(now);
        if self.config.read_only { 0 } else { self.ask_for_dials() }
    }

    fn ask_for_dials(&mut self) -> usize {
        let mut poolfs: Vec<NodeInfo> =
            self.tables.iter().flat_map(|t| t.entries()).filter(|e| e.poolfs && e.failures == 0).map(|e| e.info).collect();
        let mut asked = 0;
        while asked < DIAL_BACK_NODES && !poolfs.is_empty() {
            let node = poolfs.swap_remove(self.rng.random_range(0..poolfs.len()));
            // Its token first: who dials for a forged sender would knock at a stranger's door.
            let key = self.random_id();
            let verb = Verb::GetPeers { key, want: Want::default(), pv: false, statements: false, token: None };
            let _next_time = self.query(node.addr, Some(node.id), verb, Purpose::DialToken, Budget::Upkeep);
            asked += 1;
        }
        asked
    }

    pub(super) fn ask_dial_back(&mut self, node: NodeInfo, token: Vec<u8>) {
        let verb = Verb::Dial { port: self.config.port, token };
        let _next_time = self.query(node.addr, Some(node.id), verb, Purpose::DialBack, Budget::Upkeep);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::super::Config;
    use super::*;
    use std::net::Ipv4Addr;

    fn node() -> (Node, Instant) {
        let now = Instant::now();
        (Node::new(Config::new([1; 32], [2; 32], Network::Private, 9977), now, 0), now)
    }

    fn at(n: u32) -> SocketAddr {
        (Ipv4Addr::from_bits(0x0a00_0000 + n), 7777).into()
    }

    /// What strangers can say of this machine, and what they can make it remember, ends at its constants.
    #[test]
    fn what_is_remembered_is_bounded() {
        let (mut node, now) = node();
        let many: Vec<SocketAddr> = (1..200).map(at).collect();
        node.bootstrap(&many, now);
        assert_eq!(node.upkeep.bootstrap, many[many.len() - BOOTSTRAP_MAX..], "the latest are kept");
        for n in 1..200 {
            // Each of another network, each with another opinion.
            node.vote(Family::V4, Ipv4Addr::from_bits(0x0100_0000 * n).into(), at(n).ip());
            node.upkeep.is_self(at(n));
        }
        assert_eq!((node.upkeep.votes[0].len(), node.upkeep.selves.len()), (VOTES_MAX, SELF_MAX));
        assert!(node.upkeep.knows_self(at(199)) && !node.upkeep.knows_self(at(1)), "the latest are kept");
        let told = (1..200).filter(|n| node.upkeep.tell_clone(at(*n), now)).count();
        assert_eq!(told, SELF_MAX, "in an hour");
        assert!(node.upkeep.tell_clone(at(200), now + Duration::from_secs(3_601)));
    }
}
