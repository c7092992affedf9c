//! What this node answers.
//!
//! A query without a valid token is answered with at most [`UNPROVED_REPLY_BYTES_MAX`] and [`UNPROVED_FACTOR_MAX`] times its
//! own length, so that a forged sender gains nothing; a BEP 44 `get`, which by its nature gives more, at most
//! [`ITEM_GETS_PER_SECOND`] times in all. A node that is read-only answers nobody.

use super::address::{self, Family};
use super::query::{Budget, Purpose};
use super::rtt::Bucket;
use super::storage::Kept;
use super::table::K;
use super::{Action, DialTicket, Event, Node};
use crate::krpc::message::MalformedKind;
use crate::krpc::{
    Announce, Body, DATAGRAM_BYTES_OUT_MAX, ITEM_BYTES_MAX, Id, Malformed, Message, NodeInfo, Pv, Reply, STATEMENT_BYTES, Statement,
    Transaction, VERSION, Verb, Want, code, item_target, scan,
};
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest answer to a query without a valid token.
pub const UNPROVED_REPLY_BYTES_MAX: usize = 600;

/// The same as a multiple of the query.
pub const UNPROVED_FACTOR_MAX: usize = 6;

/// Known nodes closer to a key past which it is not this node's to keep.
pub const CLOSER_NODES_MAX: usize = 32;

/// BEP 44 items given out in a second.
pub const ITEM_GETS_PER_SECOND: f32 = 10.0;

/// Connections that this node tries for others at once.
pub const DIALS_MAX: usize = 32;

/// Connections that this node tries for others in a second.
const DIALS_PER_SECOND: f32 = 1.0;

/// Pause between two connections to one address. At most [`DIALLED_MAX`] addresses are remembered, so no more are dialled in it.
const DIAL_PAUSE: Duration = Duration::from_secs(60);

/// See [`DIAL_PAUSE`].
pub(super) const DIALLED_MAX: usize = 48;

/// What the verbs of the fleet's protocol begin with.
const EXTENSION: &[u8] = b"pf_";

/// Bencoded length of one contact in `values`, `pvs` with an empty string not counted.
fn value_bytes(family: Family) -> usize {
    match family {
        Family::V4 => 2 + 6,
        Family::V6 => 3 + 18,
    }
}

/// Bencoded length of a byte string.
fn string_bytes(length: usize) -> usize {
    length
        + if length < 10 {
            2
        } else if length < 100 {
            3
        } else {
            4
        }
}

/// `6:valuesl` and `e`; likewise for `pvs` and `sts`.
const VALUES_BYTES: usize = 10;
const PVS_BYTES: usize = 7;
const STATEMENTS_BYTES: usize = 7;

/// State of the answering side.
#[derive(Debug)]
pub(super) struct Server {
    item_gets: Bucket,
    dials: HashMap<DialTicket, (SocketAddr, Transaction, Instant)>,
    dial_rate: Bucket,
    dialled: VecDeque<(IpAddr, Instant)>,
}

impl Server {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            item_gets: Bucket::new(ITEM_GETS_PER_SECOND, now),
            dials: HashMap::new(),
            dial_rate: Bucket::new(DIALS_PER_SECOND * 5.0, now),
            dialled: VecDeque::new(),
        }
    }
}

/// Why something is not kept, as an error of KRPC.
type Refusal = (i64, &'static str);

const BAD_TOKEN: Refusal = (code::PROTOCOL, "bad token");
const BAD_PORT: Refusal = (code::PROTOCOL, "bad port");
const NOT_CLOSE: Refusal = (code::GENERIC, "key is not close");
const FULL: Refusal = (code::SERVER, "full");

impl Node {
    /// Takes one datagram that came from `from`.
    pub fn datagram(&mut self, from: SocketAddr, bytes: &[u8], now: Instant) {
        self.advance(now);
        let from = address::canonical(from);
        self.counters.datagrams_in += 1;
        self.counters.bytes_in += bytes.len() as u64;
        if !address::is_usable(from, self.config.network) {
            return;
        }
        match Message::decode(bytes) {
            Ok(Message { transaction, read_only, version, body: Body::Query { id, verb }, .. }) => {
                if !self.inbound.take(from.ip(), self.now) {
                    self.counters.limited += 1;
                    return;
                }
                let poolfs = version.is_some_and(|v| v[..2] == VERSION[..2]);
                self.on_query(from, bytes, transaction, NodeInfo { id, addr: from }, read_only, poolfs, verb);
            }
            Ok(message) => self.on_answer(from, message),
            Err(malformed) => self.on_malformed(from, bytes.len(), &malformed),
        }
        self.pump_all_if_due();
    }

    fn on_malformed(&mut self, from: SocketAddr, query_bytes: usize, malformed: &Malformed) {
        self.counters.malformed += 1;
        if !self.inbound.take(from.ip(), self.now) {
            self.counters.limited += 1;
        } else if let (Some(transaction), MalformedKind::Entry(what)) = (malformed.query, malformed.what) {
            self.refuse(from, transaction, query_bytes, (code::PROTOCOL, what));
        }
    }

    fn answer(&mut self, to: SocketAddr, transaction: Transaction, body: Body, bytes_max: usize) {
        if !self.is_active() {
            return;
        }
        let message = Message { transaction, version: Some(VERSION), read_only: false, ip: Some(to), body };
        if let Ok(bytes) = message.encode()
            && bytes.len() <= bytes_max
        {
            self.counters.answers_out += 1;
            self.peers.sent(to, self.now);
            self.transmit(to, bytes);
        }
    }

    fn refuse(&mut self, to: SocketAddr, transaction: Transaction, query_bytes: usize, (code, text): Refusal) {
        self.answer(to, transaction, Body::Error { code, text: text.to_owned() }, query_bytes * UNPROVED_FACTOR_MAX);
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of one message, borrowed apart")]
    fn on_query(
        &mut self,
        from: SocketAddr,
        bytes: &[u8],
        transaction: Transaction,
        asker: NodeInfo,
        read_only: bool,
        poolfs: bool,
        verb: Verb,
    ) {
        if self.is_clone_or_self(&asker) && self.clone_asked(from, &asker, &transaction) {
            return;
        }
        self.unsolicited(from);
        if !read_only {
            self.met(asker);
        }
        let unproved = UNPROVED_REPLY_BYTES_MAX.min(UNPROVED_FACTOR_MAX * bytes.len());
        let family = Family::of(from);
        let id = self.ids[family as usize];
        let plain = |reply: Reply| Body::Reply(Box::new(Reply { id, ..reply }));
        match verb {
            Verb::Ping => self.answer(from, transaction, plain(Reply::default()), unproved),
            Verb::FindNode { target, want } => {
                let (nodes, nodes6) = self.nodes_for(&target, want, family);
                let mut reply = Reply { id, nodes, nodes6, ..Reply::default() };
                self.trim_nodes(&mut reply, transaction, from, unproved);
                self.answer(from, transaction, Body::Reply(Box::new(reply)), unproved);
            }
            Verb::GetPeers { key, want, pv, statements, token } => {
                let proved = token.is_some_and(|token| self.tokens.check(from.ip(), &token));
                let bytes_max = if proved { DATAGRAM_BYTES_OUT_MAX } else { unproved };
                let reply = self.peers_reply(&key, want, family, transaction, from, (proved && pv, proved && statements), bytes_max);
                self.answer(from, transaction, Body::Reply(Box::new(reply)), bytes_max);
            }
            Verb::Announce(announce) => match self.on_announce(from, &announce, poolfs) {
                Ok(()) => self.answer(from, transaction, plain(Reply::default()), unproved),
                Err(why) => {
                    self.counters.refused += 1;
                    self.refuse(from, transaction, bytes.len(), why);
                }
            },
            Verb::Get { target, want } => self.on_get(from, transaction, &target, want, unproved),
            Verb::Put { value, token, mutable } => match self.on_put(from, &value, &token, mutable) {
                Ok(()) => self.answer(from, transaction, plain(Reply::default()), unproved),
                Err(why) => {
                    self.counters.refused += 1;
                    self.refuse(from, transaction, bytes.len(), why);
                }
            },
            Verb::Dial { port, token } => self.on_dial(from, transaction, bytes.len(), port, &token),
            Verb::Other { name, .. } if name.starts_with(EXTENSION) => {
                self.event(Event::Extension { from, transaction, bytes: bytes.to_vec() })
            }
            Verb::Other { .. } => self.refuse(from, transaction, bytes.len(), (code::METHOD, "unknown method")),
        }
    }

    /// A node that asks lives; one that is not in the table and could be is asked back first.
    fn met(&mut self, asker: NodeInfo) {
        let table = &mut self.tables[Family::of(asker.addr) as usize];
        table.asked(&asker, self.now);
        if table.has_room_for(&asker, self.now) {
            self.check(asker);
        }
    }

    fn nodes_for(&self, target: &Id, want: Want, family: Family) -> (Vec<NodeInfo>, Vec<NodeInfo>) {
        let asked = if want.v4 || want.v6 { [want.v4, want.v6] } else { [family == Family::V4, family == Family::V6] };
        let nodes = |family: Family| -> Vec<NodeInfo> {
            if !asked[family as usize] {
                return Vec::new();
            }
            // One that failed once is kept for this node's own use and not handed on.
            let closest = self.tables[family as usize].closest(target, 2 * K);
            closest.into_iter().filter(|e| e.failures == 0).take(K).map(|e| e.info).collect()
        };
        (nodes(Family::V4), nodes(Family::V6))
    }

    /// The answer to `get_peers`: nodes, or, where details are asked for and given, contacts with theirs instead.
    #[allow(clippy::too_many_arguments, reason = "one answer's budget and contents")]
    fn peers_reply(
        &mut self,
        key: &Id,
        want: Want,
        family: Family,
        transaction: Transaction,
        from: SocketAddr,
        details: (bool, bool),
        bytes_max: usize,
    ) -> Reply {
        let (pv, statements) = details;
        let token = Some(self.tokens.make(from.ip()).to_vec());
        let mut reply = Reply { id: self.ids[family as usize], token, ..Reply::default() };
        // What this node announces itself: it is the surest contact, and it may be among the closest to the key.
        let own = self.own_contact(family).and_then(|addr| Some((addr, self.announcer.pv(key)?)));
        let with_details = (pv && (own.is_some() || self.store.has_contacts(key, family, self.now))) || statements;
        if !with_details {
            (reply.nodes, reply.nodes6) = self.nodes_for(key, want, family);
            if reply.nodes.len() + reply.nodes6.len() > K && bytes_max < DATAGRAM_BYTES_OUT_MAX {
                // Both families were wanted: half of each leaves room for contacts.
                reply.nodes.truncate(K / 2);
                reply.nodes6.truncate(K / 2);
            }
            self.trim_nodes(&mut reply, transaction, from, bytes_max);
        }
        let shell =
            Message { transaction, version: Some(VERSION), read_only: false, ip: Some(from), body: Body::Reply(Box::new(reply.clone())) };
        let Ok(used) = shell.encode().map(|b| b.len()) else { return reply };
        let mut room = bytes_max.saturating_sub(used);
        if statements {
            room = room.saturating_sub(STATEMENTS_BYTES);
            let count = room / string_bytes(STATEMENT_BYTES);
            let now_s = self.unix_now();
            reply.statements = self.store.statements(key, count, now_s, &mut self.rng);
            return reply;
        }
        let each = value_bytes(family);
        room = room.saturating_sub(if pv { VALUES_BYTES + PVS_BYTES } else { VALUES_BYTES });
        let count_max = room / if pv { each + string_bytes(0) } else { each };
        let stored = self
            .store
            .sample(key, family, count_max, self.now, &mut self.rng)
            .into_iter()
            .map(|contact| (contact.addr, contact.pv.clone()));
        for (addr, about) in own.into_iter().chain(stored) {
            if reply.values.contains(&addr) {
                continue;
            }
            let about: &[u8] = about.as_deref().filter(|_| pv).unwrap_or_default();
            let bytes = each + if pv { string_bytes(about.len()) } else { 0 };
            if bytes > room {
                continue;
            }
            room -= bytes;
            reply.values.push(addr);
            if pv {
                reply.pvs.push(about.to_vec());
            }
        }
        reply
    }

    fn on_announce(&mut self, from: SocketAddr, announce: &Announce, poolfs: bool) -> Result<(), Refusal> {
        if !self.tokens.check(from.ip(), &announce.token) {
            return Err(BAD_TOKEN);
        }
        if let Some(statement) = &announce.statement {
            return self.on_statement(from.ip(), announce.key, statement);
        }
        let family = Family::of(from);
        let port = if announce.implied_port { from.port() } else { announce.port };
        if port == 0 {
            std::iter::once(&announce.key).chain(&announce.more).for_each(|key| self.store.withdraw(key, from));
            return Ok(());
        }
        let contact = SocketAddr::new(from.ip(), port);
        if !address::is_usable(contact, self.config.network) {
            return Err(BAD_PORT);
        }
        // A `pv` that breaks a rule is left out; the contact is worth keeping without.
        let pv: Option<Arc<[u8]>> = announce.pv.as_deref().filter(|pv| Pv::parse(pv).is_ok()).map(Arc::from);
        let limits = &self.config.limits;
        let life = if poolfs { limits.contact_life_poolfs } else { limits.contact_life_other };
        let mut refused = None;
        let mut kept = 0;
        for key in std::iter::once(&announce.key).chain(&announce.more) {
            if self.tables[family as usize].closer_than_own(key, CLOSER_NODES_MAX) >= CLOSER_NODES_MAX {
                refused = Some(NOT_CLOSE);
                continue;
            }
            match self.store.announce(*key, contact, pv.clone(), life, self.now, &mut self.rng) {
                Kept::Yes | Kept::NotDrawn => kept += 1,
                Kept::Full => refused = Some(FULL),
            }
        }
        match refused {
            Some(why) if kept == 0 => Err(why),
            _ => Ok(()),
        }
    }

    /// Statements about this very node are not kept: its own word on them would be worth nothing.
    fn on_statement(&mut self, from: IpAddr, place: Id, bytes: &[u8]) -> Result<(), Refusal> {
        if self.ids.iter().any(|id| place == id.not() || place.not().same_key(id)) {
            return Err((code::GENERIC, "about this node"));
        }
        let statement = Statement::check(bytes, self.unix_now()).map_err(|_| (code::PROTOCOL, "bad statement"))?;
        if !statement.belongs_at(&place) {
            return Err((code::PROTOCOL, "statement does not belong here"));
        }
        match self.store.speak(place, bytes, statement, from) {
            Kept::Full => Err(FULL),
            Kept::Yes | Kept::NotDrawn => Ok(()),
        }
    }

    fn on_get(&mut self, from: SocketAddr, transaction: Transaction, target: &Id, want: Want, unproved: usize) {
        let family = Family::of(from);
        let (nodes, nodes6) = self.nodes_for(target, want, family);
        let token = Some(self.tokens.make(from.ip()).to_vec());
        let mut reply = Reply { id: self.ids[family as usize], nodes, nodes6, token, ..Reply::default() };
        let mut bytes_max = unproved;
        if self.store.item(target, self.now).is_some() && self.server.item_gets.take(ITEM_GETS_PER_SECOND, ITEM_GETS_PER_SECOND, self.now) {
            reply.item = self.store.item(target, self.now).map(<[u8]>::to_vec);
            // Both families' nodes and the item do not fit one datagram.
            (reply.nodes, reply.nodes6) = if family == Family::V4 { (reply.nodes, Vec::new()) } else { (Vec::new(), reply.nodes6) };
            bytes_max = DATAGRAM_BYTES_OUT_MAX;
        }
        self.trim_nodes(&mut reply, transaction, from, bytes_max);
        self.answer(from, transaction, Body::Reply(Box::new(reply)), bytes_max);
    }

    /// Leaves out the farthest nodes, of the family that has more, until the answer fits.
    fn trim_nodes(&self, reply: &mut Reply, transaction: Transaction, to: SocketAddr, bytes_max: usize) {
        let body = Body::Reply(Box::new(Reply { nodes: Vec::new(), nodes6: Vec::new(), ..reply.clone() }));
        let shell = Message { transaction, version: Some(VERSION), read_only: false, ip: Some(to), body };
        let Ok(used) = shell.encode().map(|bytes| bytes.len()) else { return };
        let bytes = |reply: &Reply| {
            let string = |name: usize, nodes: usize| if nodes == 0 { 0 } else { name + string_bytes(nodes) };
            used + string(7, reply.nodes.len() * 26) + string(8, reply.nodes6.len() * 38)
        };
        while bytes(reply) > bytes_max {
            let longer = if reply.nodes6.len() >= reply.nodes.len() { &mut reply.nodes6 } else { &mut reply.nodes };
            if longer.pop().is_none() {
                return;
            }
        }
    }

    fn on_put(&mut self, from: SocketAddr, value: &[u8], token: &[u8], mutable: bool) -> Result<(), Refusal> {
        if !self.tokens.check(from.ip(), token) {
            return Err(BAD_TOKEN);
        }
        if mutable {
            return Err((code::METHOD, "mutable items are not kept"));
        }
        if value.len() > ITEM_BYTES_MAX {
            return Err((code::TOO_BIG, "value is too big"));
        }
        // Another writing of the same value would come out of this node with another hash.
        if !scan::scan(value).is_ok_and(|s| s.canonical) {
            return Err((code::PROTOCOL, "value is not canonical"));
        }
        let family = Family::of(from) as usize;
        let target = item_target(value);
        if self.tables[family].closer_than_own(&target, CLOSER_NODES_MAX) >= CLOSER_NODES_MAX {
            return Err(NOT_CLOSE);
        }
        let own = self.ids[family];
        match self.store.put(target, value, from.ip(), &own, self.now) {
            Kept::Full => Err(FULL),
            Kept::Yes | Kept::NotDrawn => Ok(()),
        }
    }

    /// Tries a connection to the asker itself, never to another address.
    fn on_dial(&mut self, from: SocketAddr, transaction: Transaction, query_bytes: usize, port: u16, token: &[u8]) {
        let to = SocketAddr::new(from.ip(), port);
        if !self.tokens.check(from.ip(), token) {
            return self.refuse(from, transaction, query_bytes, BAD_TOKEN);
        }
        if !address::is_usable(to, self.config.network) {
            return self.refuse(from, transaction, query_bytes, BAD_PORT);
        }
        if self.server.dials.values().any(|(asker, t, _)| *asker == from && *t == transaction) {
            return; // A repetition: the answer is under way.
        }
        let now = self.now;
        self.server.dials.retain(|_, (_, _, at)| now.saturating_duration_since(*at) < DIAL_PAUSE);
        self.server.dialled.retain(|(_, at)| now.saturating_duration_since(*at) < DIAL_PAUSE);
        let again = self.server.dialled.iter().any(|(ip, _)| *ip == from.ip());
        let room = self.server.dials.len() < DIALS_MAX && self.server.dialled.len() < DIALLED_MAX;
        if again || !room || !self.server.dial_rate.take(DIALS_PER_SECOND, DIALS_PER_SECOND * 5.0, now) {
            return self.refuse(from, transaction, query_bytes, FULL);
        }
        self.server.dialled.push_back((from.ip(), now));
        let ticket = DialTicket(self.number());
        self.server.dials.insert(ticket, (from, transaction, now));
        self.actions.push_back(Action::Dial { ticket, to });
    }

    /// Tells how an [`Action::Dial`] went; must be told for each, within a few seconds.
    pub fn dial_result(&mut self, ticket: DialTicket, ok: bool, now: Instant) {
        self.advance(now);
        if let Some((from, transaction, _)) = self.server.dials.remove(&ticket) {
            let id = self.ids[Family::of(from) as usize];
            let reply = Reply { id, dialled: Some(ok), ..Reply::default() };
            self.answer(from, transaction, Body::Reply(Box::new(reply)), UNPROVED_REPLY_BYTES_MAX);
        }
    }

    /// Whether an id is made from this node's key.
    pub(super) fn is_clone_or_self(&self, node: &NodeInfo) -> bool {
        self.ids.iter().any(|id| id.same_key(&node.id))
    }

    /// Somebody with this node's key asked. Its own datagram come round is told by its transaction id; otherwise it is asked
    /// whether it is really there. Returns whether that was all.
    fn clone_asked(&mut self, from: SocketAddr, asker: &NodeInfo, transaction: &Transaction) -> bool {
        if transaction.as_own().is_some_and(|t| self.pending.contains_key(&t)) {
            self.upkeep.is_self(from);
            return true;
        }
        if !self.upkeep.knows_self(from) {
            let _later = self.query(from, Some(asker.id), Verb::Ping, Purpose::Check, Budget::Upkeep);
        }
        false
    }

    /// Somebody with this node's key answered: not this node itself, which answers none of its own queries.
    pub(super) fn clone_answered(&mut self, from: SocketAddr) {
        if !self.upkeep.knows_self(from) && self.upkeep.tell_clone(from, self.now) {
            self.event(Event::ClonedKey(from));
        }
    }
}
