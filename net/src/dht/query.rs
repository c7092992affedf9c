//! Queries under way: sending, repeating, giving up, and whose an answer is.

use super::address::{self, Family};
use super::lookup::LookupId;
use super::rtt::UNREACHABLE_AFTER;
use super::table::Offered;
use super::{Event, Network, Node, PingId};
use crate::krpc::{Body, Id, Message, NodeInfo, Reply, Transaction, VERSION, Verb};
use rand::RngExt as _;
use std::cmp::Reverse;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Queries under way at once; past it no new one is sent until some have ended.
pub const PENDING_MAX: usize = 4_096;

/// Why a query was sent, and so what its answer means.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Purpose {
    /// A person's or program's ping.
    Ping(PingId),
    /// To see whether a node lives and can be kept.
    Check,
    /// To an address whose id is not known: what it knows about the own neighbourhood.
    Bootstrap,
    /// A step of a lookup.
    Walk(LookupId),
    /// A second query of a lookup, with the token of the first.
    Details(LookupId),
    /// An item or statement of a lookup's second half.
    Store(LookupId),
    /// A get_peers for the token that goes with one key only.
    KeyToken(Id),
    /// Announces these keys.
    Announce(Vec<Id>),
    /// Withdraws a key.
    Withdraw,
    /// For the token to ask to be dialled back with.
    DialToken,
    /// Asks to be dialled back.
    DialBack,
}

/// One query, from its first sending to its answer or to [`UNREACHABLE_AFTER`].
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) to: SocketAddr,
    pub(super) id: Option<Id>,
    pub(super) purpose: Purpose,
    bytes: Box<[u8]>,
    first: Instant,
    delay: Duration,
    sent: u8,
    step: u8,
}

impl Pending {
    /// Whether its last repetition is still to come.
    pub(super) fn may_be_repeated(&self) -> bool {
        self.step < 2
    }
}

/// Which budget a query comes out of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Budget {
    /// Lookups that somebody waits for.
    Lookup,
    /// Everything that can wait.
    Upkeep,
}

/// Why a query was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NotSent {
    /// Nothing may be sent before.
    Until(Instant),
    /// Not to this address before.
    AddressUntil(Instant),
    /// No socket of that family, a forbidden address, or a message that does not fit.
    Never,
}

impl Node {
    /// Sends a query for the first time.
    pub(super) fn query(&mut self, to: SocketAddr, id: Option<Id>, verb: Verb, purpose: Purpose, budget: Budget) -> Result<(), NotSent> {
        let family = Family::of(to);
        if !self.config.families[family as usize] || !address::is_usable(to, self.config.network) {
            return Err(NotSent::Never);
        }
        if self.pending.len() >= PENDING_MAX {
            let next = self.timers.peek().map_or(self.now, |Reverse((at, _))| *at);
            return Err(NotSent::Until(next.max(self.now + Duration::from_millis(10))));
        }
        let (bucket, rate, burst) = match budget {
            Budget::Lookup => (&mut self.out_lookups, super::OUT_LOOKUPS_PER_SECOND, super::OUT_LOOKUPS_BURST),
            Budget::Upkeep => (&mut self.out_upkeep, super::OUT_UPKEEP_PER_SECOND, super::OUT_UPKEEP_BURST),
        };
        if !bucket.has(rate, burst, self.now) {
            return Err(NotSent::Until(bucket.ready_at(rate)));
        }
        let private = self.config.network == Network::Private;
        if !self.peers.may_send(to, private, self.now) {
            return Err(NotSent::AddressUntil(self.peers.ready_at(&to, self.now)));
        }
        bucket.take(rate, burst, self.now);
        let transaction = loop {
            let transaction: [u8; 4] = self.rng.random();
            if !self.pending.contains_key(&transaction) {
                break transaction;
            }
        };
        let own = self.ids[family as usize];
        let read_only = !self.is_active();
        let message = Message {
            transaction: Transaction::own(transaction),
            version: Some(VERSION),
            read_only,
            ip: None,
            body: Body::Query { id: own, verb },
        };
        let Ok(bytes) = message.encode() else {
            return Err(NotSent::Never);
        };
        let delay = self.config.schedule.delay(self.peers.get(&to).map(|p| &p.rtt), &self.family_rtt[family as usize]);
        self.timers.push(Reverse((self.now + delay, transaction)));
        let pending = Pending { to, id, purpose, bytes: bytes.clone().into(), first: self.now, delay, sent: 1, step: 0 };
        self.pending.insert(transaction, pending);
        self.counters.queries_out += 1;
        self.transmit(to, bytes);
        Ok(())
    }

    /// Repeats, passes slots on and gives up, as far as it is time.
    pub(super) fn run_timers(&mut self) {
        while let Some(Reverse((at, transaction))) = self.timers.peek().copied() {
            if at > self.now {
                break;
            }
            self.timers.pop();
            self.step(transaction);
        }
        if self.timers.is_empty() && self.timers.capacity() > 256 {
            self.timers.shrink_to_fit();
            self.pending.shrink_to_fit();
        }
    }

    fn step(&mut self, transaction: [u8; 4]) {
        let Some(pending) = self.pending.get_mut(&transaction) else { return };
        pending.step += 1;
        let step = pending.step;
        if step == 3 {
            let gone = self.pending.remove(&transaction).expect("it was there a line before");
            self.unreachable(gone);
            return;
        }
        let (to, first, delay) = (pending.to, pending.first, pending.delay);
        let repeat = self.config.schedule.resend_after(step, delay).is_some().then(|| pending.bytes.to_vec());
        let next = if step == 1 { first + delay * 3 } else { first + UNREACHABLE_AFTER };
        pending.sent += u8::from(repeat.is_some());
        let silent = (step == 1).then(|| (pending.id, pending.purpose.clone()));
        self.timers.push(Reverse((next, transaction)));
        if let Some(bytes) = repeat {
            self.counters.repeated += 1;
            self.peers.sent(to, self.now);
            self.transmit(to, bytes);
        }
        match silent {
            Some((Some(id), Purpose::Walk(lookup))) => self.walk_silent(lookup, NodeInfo { id, addr: to }),
            Some((_, Purpose::Details(lookup))) => self.second_half_over(lookup, to, false),
            None => self.last_repeated(transaction),
            Some(_) => {}
        }
    }

    /// The last repetition is out: who waits for this answer alone waits no longer; it is still taken when it comes.
    fn last_repeated(&mut self, transaction: [u8; 4]) {
        let Some(pending) = self.pending.get(&transaction) else { return };
        let to = pending.to;
        match pending.purpose.clone() {
            Purpose::Walk(lookup) => self.walk_patience(lookup),
            Purpose::Store(lookup) => self.second_half_over(lookup, to, false),
            Purpose::KeyToken(key) => self.key_token_failed(&key, to),
            _ => {}
        }
    }

    fn unreachable(&mut self, gone: Pending) {
        self.counters.unreachable += 1;
        // If nobody at all answered since, it is this machine that is cut off, and the table is worth keeping.
        let alone = self.upkeep.last_answer().is_none_or(|at| at < gone.first);
        if let Some(id) = gone.id.filter(|_| !alone) {
            self.tables[Family::of(gone.to) as usize].failed(&NodeInfo { id, addr: gone.to });
        }
        match gone.purpose {
            Purpose::Ping(ping) => self.event(Event::Unreachable { ping, to: gone.to }),
            Purpose::Walk(lookup) => {
                if let Some(id) = gone.id {
                    self.walk_failed(lookup, NodeInfo { id, addr: gone.to });
                }
            }
            Purpose::Details(lookup) | Purpose::Store(lookup) => self.second_half_over(lookup, gone.to, false),
            Purpose::Announce(keys) => self.announce_ended(&keys, gone.to, None),
            Purpose::Check | Purpose::Bootstrap | Purpose::KeyToken(_) | Purpose::Withdraw | Purpose::DialToken | Purpose::DialBack => {}
        }
    }

    /// An answer or an error. Counts only from the address that was asked, and once.
    pub(super) fn on_answer(&mut self, from: SocketAddr, message: Message) {
        let asked = message.transaction.as_own().filter(|t| self.pending.get(t).is_some_and(|p| p.to == from));
        let Some(pending) = asked.and_then(|t| self.pending.remove(&t)) else {
            self.counters.foreign += 1;
            return;
        };
        self.counters.answers_in += 1;
        let family = Family::of(from);
        let took = self.now.saturating_duration_since(pending.first);
        if pending.sent == 1 {
            self.family_rtt[family as usize].sample(took);
            self.peers.entry(from, self.now).rtt.sample(took);
        }
        self.upkeep.answered(self.now);
        let poolfs = message.is_poolfs();
        let (ip, read_only) = (message.ip, message.read_only);
        let reply = match message.body {
            Body::Reply(reply) => reply,
            Body::Error { code, .. } => {
                self.on_error(pending, code);
                return;
            }
            Body::Query { .. } => return,
        };
        if let Some(ip) = ip {
            self.vote(family, from.ip(), ip.ip());
        }
        self.peers.entry(from, self.now).poolfs = poolfs;
        let node = NodeInfo { id: reply.id, addr: from };
        if self.is_clone_or_self(&node) {
            self.clone_answered(from);
        }
        if let Some(expected) = pending.id.filter(|id| *id != reply.id) {
            // Another node took the address: the one that was asked is gone.
            let other = NodeInfo { id: expected, addr: from };
            for _ in 0..super::table::FAILURES_MAX {
                self.tables[family as usize].failed(&other);
            }
        }
        if !read_only {
            self.offer(node, poolfs);
        }
        let token = reply.token.as_deref().filter(|_| poolfs);
        if token.is_some() {
            let now = self.now;
            self.peers.entry(from, now).set_token(token, now);
        }
        self.finish_answer(pending, node, poolfs, *reply, took);
    }

    /// Puts a node that answered into its table; asks a questionable one whose place it could have.
    fn offer(&mut self, node: NodeInfo, poolfs: bool) {
        let family = Family::of(node.addr) as usize;
        let was_empty = self.tables[family].is_empty();
        match self.tables[family].answered(node, poolfs, self.now) {
            Offered::Waits(Some(questionable)) => self.check(questionable),
            Offered::Kept if was_empty => self.upkeep.joined(family, self.now),
            _ => {}
        }
    }

    /// Asks a node whether it lives, unless the budget is used up: it will be noticed again.
    pub(super) fn check(&mut self, node: NodeInfo) {
        if !self.pending.values().any(|p| p.to == node.addr && p.purpose == Purpose::Check) {
            let _later = self.query(node.addr, Some(node.id), Verb::Ping, Purpose::Check, Budget::Upkeep);
        }
    }

    fn on_error(&mut self, pending: Pending, code: i64) {
        if code == crate::krpc::code::PROTOCOL {
            // Perhaps the token: it is asked for anew next time.
            let now = self.now;
            self.peers.entry(pending.to, now).set_token(None, now);
        }
        match pending.purpose {
            Purpose::Walk(lookup) => {
                if let Some(id) = pending.id {
                    self.walk_failed(lookup, NodeInfo { id, addr: pending.to });
                }
            }
            Purpose::Details(lookup) | Purpose::Store(lookup) => self.second_half_over(lookup, pending.to, false),
            Purpose::KeyToken(key) => self.key_token_failed(&key, pending.to),
            Purpose::Announce(keys) if code == crate::krpc::code::PROTOCOL => {
                self.announce_refused(&keys, NodeInfo { id: pending.id.unwrap_or_default(), addr: pending.to });
            }
            Purpose::Announce(keys) => self.announce_ended(&keys, pending.to, None),
            Purpose::Ping(ping) => self.event(Event::Unreachable { ping, to: pending.to }),
            Purpose::Check | Purpose::Bootstrap | Purpose::Withdraw | Purpose::DialToken | Purpose::DialBack => {}
        }
    }

    fn finish_answer(&mut self, pending: Pending, node: NodeInfo, poolfs: bool, reply: Reply, took: Duration) {
        match pending.purpose {
            Purpose::Ping(ping) => self.event(Event::Pong { ping, node, took, poolfs }),
            Purpose::Check | Purpose::Withdraw => {}
            Purpose::Bootstrap => self.bootstrap_answered(&reply),
            Purpose::Walk(lookup) => self.walk_answered(lookup, pending.id, node, poolfs, reply),
            Purpose::Details(lookup) => {
                self.take_results(lookup, &reply);
                self.second_half_over(lookup, node.addr, true);
            }
            Purpose::Store(lookup) => self.second_half_over(lookup, node.addr, true),
            Purpose::KeyToken(key) => self.key_token(&key, node.addr, reply.token),
            Purpose::Announce(keys) => self.announce_ended(&keys, node.addr, Some(poolfs)),
            Purpose::DialToken => {
                if let Some(token) = reply.token {
                    self.ask_dial_back(node, token);
                }
            }
            Purpose::DialBack => {
                if reply.dialled == Some(true) {
                    self.reached();
                }
                if let Some(reached) = reply.dialled {
                    self.event(Event::Dialled { by: node.addr, reached });
                }
            }
        }
    }

    /// Asks somebody whether it is there.
    pub fn ping(&mut self, to: SocketAddr, now: Instant) -> PingId {
        self.advance(now);
        let ping = PingId(self.number());
        let to = address::canonical(to);
        if self.query(to, None, Verb::Ping, Purpose::Ping(ping), Budget::Lookup).is_err() {
            self.event(Event::Unreachable { ping, to });
        }
        ping
    }
}
