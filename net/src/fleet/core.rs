//! One machine's part of a fleet without sockets, clock or tasks: membership, coordinator and asker behind datagrams.
//!
//! Datagrams go in with [`Core::datagram`], time with [`Core::tick`], wishes with the methods named after them; what is to be
//! done comes out of [`Core::poll`]. [`Core::next_timeout`] says when the next tick is due. The same code runs behind the node's
//! sockets and, many times, under a virtual clock.
//!
//! Nothing is answered to a datagram whose tag is not right, not even an error. A query repeated has the same transaction id and
//! another nonce; an answer counts if it fits any nonce of its query, comes from where that was sent, and from who was asked.

use super::Origin;
use super::auth::{FleetKey, Gate, Nonce};
use super::members::{Me, Members, MembersDo, Near};
use super::tell::Teller;
use super::wire::{self, ANSWERER, Answer, Ask, Envelope, Kind};
use crate::dht::address;
use crate::dht::rtt::{Bucket, Rtt, Schedule, UNREACHABLE_AFTER};
use crate::krpc::Transaction;
use crate::swarm::FileShape;
use crate::swarm::fleet::{
    Answer as Coordinated, AskDo, Asker, Coordinator, GroupKey, HELD_MAX, Local, Member, MemberId, Origin as AskOrigin, RANKS, Reply, View,
    Want, group_bits,
};
use poolfs_core::Digest;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Datagrams of live members a second, in and out.
pub const MEMBERS_PER_SECOND: f32 = 2_000.0;

/// Of one address.
pub const ADDRESS_PER_SECOND: f32 = 100.0;

/// What one address may send at once.
const ADDRESS_BURST: f32 = 200.0;

/// Datagrams a second of addresses that are no member's: each costs an HMAC.
pub const STRANGERS_PER_SECOND: f32 = 200.0;

/// Addresses whose rate is known; past it those that are idle are forgotten, then newcomers refused.
const ADDRESSES_MAX: usize = 8_192;

/// Queries under way.
pub const CALLS_MAX: usize = 4_096;

/// A want is waited for so long after it was last sent; the asker repeats it.
const WANT_KEPT: Duration = Duration::from_secs(5);

/// A want without an answer is sent again after this, twice: less than the second after which the asker takes its coordinator for
/// silent. Most answers that take as long are held, and the repetition changes nothing.
const WANT_AGAIN: Duration = Duration::from_millis(330);

/// Sendings of a query whose answers count.
const NONCES_KEPT: usize = 3;

/// Files wanted within this are one plan: only then is the order chosen in which they are asked for.
const PLAN_DELAY: Duration = Duration::from_millis(10);

/// A new view is made at most this often.
const VIEW_INTERVAL: Duration = Duration::from_millis(100);

/// Members that are told that this machine leaves; the others hear it of them.
const FAREWELLS_MAX: usize = 64;

/// Held answers and what is to be told are looked at this often.
const STEP: Duration = Duration::from_millis(100);

/// What is to be done.
#[derive(Clone, PartialEq, Debug)]
pub enum CoreDo {
    /// Send a datagram.
    Send {
        /// Where.
        to: SocketAddr,
        /// The datagram.
        bytes: Vec<u8>,
    },
    /// Fetch a piece.
    Fetch {
        /// The file.
        digest: Digest,
        /// The piece.
        piece: u32,
        /// From where.
        from: Origin,
    },
    /// Every piece of the file is here.
    Done(Digest),
    /// What came of one of the coordinators that [`Core::who`] asks, members all of them.
    Holders {
        /// What was asked for.
        digest: Digest,
        /// Whom it named, or nobody.
        holders: Vec<SocketAddr>,
    },
}

/// What came in and was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Datagrams taken.
    pub taken: u64,
    /// Of which the tag was wrong, too old or used before.
    pub refused: u64,
    /// Past a rate.
    pub limited: u64,
    /// Answers to nothing.
    pub foreign: u64,
    /// Datagrams not sent because of the rate.
    pub unsent: u64,
}

#[derive(Debug)]
struct Call {
    to: SocketAddr,
    member: Option<MemberId>,
    ask: Ask,
    nonces: VecDeque<Nonce>,
    first: Instant,
    sent: Instant,
    delay: Duration,
    step: u8,
}

/// An asker whose answer is held: where it goes.
#[derive(Debug)]
struct Waiting {
    to: SocketAddr,
    transaction: Transaction,
    nonce: Nonce,
}

/// See the module.
#[derive(Debug)]
pub struct Core {
    me: MemberId,
    keyed: bool,
    gate: Arc<Gate>,
    unix: (Instant, u64),
    members: Members,
    view: Arc<View>,
    view_stale: bool,
    view_at: Instant,
    coordinator: Coordinator,
    asker: Asker,
    teller: Teller,
    calls: HashMap<[u8; 4], Call>,
    wants: HashMap<(MemberId, GroupKey), [u8; 4]>,
    timers: BinaryHeap<Reverse<(Instant, [u8; 4])>>,
    held: HashMap<(MemberId, GroupKey), Waiting>,
    /// Pieces being fetched, by where from; `None`: the mirror.
    fetching: BTreeMap<(Digest, u32, Option<SocketAddr>), AskOrigin>,
    plan_at: Option<Instant>,
    step_at: Instant,
    has_left: bool,
    rtt: Rtt,
    into: Bucket,
    strangers: Bucket,
    out: Bucket,
    addresses: HashMap<SocketAddr, Bucket>,
    rng: StdRng,
    counters: Counters,
    todo: VecDeque<CoreDo>,
}

impl Core {
    /// A machine that knows nobody. `seed`: 32 unpredictable bytes, other ones at each start.
    pub fn new(me: Me, key: Option<FleetKey>, seed: [u8; 32], now: Instant, unix_s: u64) -> Self {
        let mut rng = StdRng::from_seed(seed);
        let id = me.id;
        let keyed = key.is_some();
        let members = Members::new(me, rng.random(), now);
        Self {
            me: id,
            keyed,
            gate: Arc::new(Gate::new(key.unwrap_or_else(FleetKey::open))),
            unix: (now, unix_s),
            view: Arc::new(members.view()),
            members,
            view_stale: false,
            view_at: now,
            coordinator: Coordinator::new(id),
            asker: Asker::new(id, rng.random()),
            teller: Teller::new(id),
            calls: HashMap::new(),
            wants: HashMap::new(),
            timers: BinaryHeap::new(),
            held: HashMap::new(),
            fetching: BTreeMap::new(),
            plan_at: None,
            step_at: now + STEP,
            has_left: false,
            rtt: Rtt::default(),
            into: Bucket::new(MEMBERS_PER_SECOND, now),
            strangers: Bucket::new(STRANGERS_PER_SECOND, now),
            out: Bucket::new(MEMBERS_PER_SECOND, now),
            addresses: HashMap::new(),
            rng,
            counters: Counters::default(),
            todo: VecDeque::new(),
        }
    }

    /// The live members as they are now.
    pub fn view(&self) -> &Arc<View> {
        &self.view
    }

    /// Who is in it.
    pub fn members(&self) -> &Members {
        &self.members
    }

    /// Takes tags of the fleet key, each once.
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// What came in and was not taken.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Tells the wall clock anew.
    pub fn set_unix_time(&mut self, now: Instant, unix_s: u64) {
        self.unix = (now, unix_s);
        self.members.set_unix_time(now, unix_s);
    }

    /// Tells anew which prefixes this machine has a link to.
    pub fn set_near(&mut self, prefixes: Vec<Near>) {
        self.members.set_near(prefixes);
    }

    fn unix_s(&self, now: Instant) -> u64 {
        self.unix.1.saturating_add(now.saturating_duration_since(self.unix.0).as_secs())
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<CoreDo> {
        self.todo.pop_front()
    }

    /// When [`Self::tick`] is due at the latest.
    pub fn next_timeout(&self) -> Instant {
        let step = (self.coordinator.is_holding() || self.teller.is_busy()).then_some(self.step_at);
        let view = self.view_stale.then_some(self.view_at);
        let timer = self.timers.peek().map(|Reverse((at, _))| *at);
        let tell = self.teller.next_timeout().map(|at| at.max(self.step_at));
        let all = [self.asker.next_timeout(), self.plan_at, step, view, timer, tell];
        all.into_iter().flatten().fold(self.members.next_timeout(), Instant::min)
    }

    /// Takes an address at which a member may be.
    pub fn hint(&mut self, at: SocketAddr, now: Instant) {
        self.members.hint(address::canonical(at), now);
        self.settle(now);
    }

    /// Wants a file. `false`: nobody else is there, or too much waits: it goes the way of a lone machine.
    pub fn want(&mut self, shape: FileShape, has: impl Fn(u32) -> bool, now: Instant) -> bool {
        let begun = self.view.len() > 1 && shape.size <= wire::SIZE_MAX && self.asker.want(shape, has);
        if begun {
            self.plan_at.get_or_insert(now + PLAN_DELAY);
            self.settle(now);
        }
        begun
    }

    /// No longer wants a file.
    pub fn forget(&mut self, digest: &Digest, now: Instant) {
        self.asker.forget(digest, &self.view, now);
        self.fetching.retain(|(of, ..), _| of != digest);
        self.settle(now);
    }

    /// Notes that a piece is here.
    pub fn fetched(&mut self, digest: Digest, piece: u32, now: Instant) {
        let all: Vec<_> = self.fetching.range((digest, piece, None)..(digest, piece + 1, None)).map(|(key, _)| *key).collect();
        for key in &all {
            self.fetching.remove(key);
        }
        self.asker.fetched(&self.view, digest, piece, now);
        self.settle(now);
    }

    /// Notes that a piece did not come from there. `gone`: the member cannot be reached.
    pub fn failed(&mut self, digest: Digest, piece: u32, from: Origin, gone: bool, now: Instant) {
        let contact = match from {
            Origin::Mirror => None,
            Origin::Member(contact) => Some(contact),
        };
        if let Some(origin) = self.fetching.remove(&(digest, piece, contact)) {
            self.asker.fetch_failed(&self.view, digest, piece, origin, gone, now);
        }
        self.settle(now);
    }

    /// Notes files that are whole and right here, and may be given to the fleet.
    pub fn arrived(&mut self, files: &[FileShape], now: Instant) {
        self.teller.arrived(files);
        self.settle(now);
    }

    /// Files that are here, of which all who coordinate them were told.
    pub fn told(&self) -> usize {
        self.teller.told()
    }

    /// Notes files that are here no more.
    pub fn gone(&mut self, digests: &[Digest]) {
        self.teller.gone(digests);
    }

    /// Asks the coordinators of a digest who has told them of it, at most [`RANKS`], and says how many: so often
    /// [`CoreDo::Holders`] comes of it.
    pub fn who(&mut self, digest: Digest, now: Instant) -> usize {
        let ranked = self.view.ranked(&GroupKey { digest, group: 0 });
        let mut asked = 0;
        for id in ranked.iter().take(RANKS) {
            let Some(contact) = self.view.member(*id).map(|member| member.contact) else { continue };
            if *id == self.me {
                let holders = self.coordinator.holders(&self.view, self.me, &digest, now);
                self.todo.push_back(CoreDo::Holders { digest, holders });
            } else if self.calls.len() < CALLS_MAX {
                self.call(contact, Some(*id), Ask::Who(digest), now);
            } else {
                self.counters.unsent += 1;
                continue;
            }
            asked += 1;
        }
        self.settle(now);
        asked
    }

    /// Says farewell to the members, so that nobody waits for this machine as a coordinator. From here on it is deaf: an answer would
    /// bring it back to life.
    pub fn leave(&mut self, now: Instant) {
        self.has_left = true;
        let farewell = Ask::Ping(self.members.farewell());
        let others: Vec<_> = self.view.contacts().filter(|(id, _)| *id != self.me).take(FAREWELLS_MAX).collect();
        for (id, contact) in others {
            self.call(contact, Some(id), farewell.clone(), now);
        }
    }

    /// Takes a datagram for which [`wire::is_fleet`] holds.
    pub fn datagram(&mut self, from: SocketAddr, bytes: &[u8], now: Instant) {
        if self.has_left {
            return;
        }
        let from = address::canonical(from);
        let Some(envelope) = Envelope::read(bytes) else { return };
        if envelope.is_query {
            self.on_query(from, &envelope, now)
        } else {
            self.on_answer(from, &envelope, now)
        }
        self.settle(now);
    }

    /// Acts on the time.
    pub fn tick(&mut self, now: Instant) {
        while let Some(Reverse((at, transaction))) = self.timers.peek().copied() {
            if at > now {
                break;
            }
            self.timers.pop();
            self.call_due(transaction, now);
        }
        self.members.tick(now);
        if self.plan_at.take_if(|at| *at <= now).is_some() || self.asker.next_timeout().is_some_and(|at| at <= now) {
            self.asker.tick(&self.view, now);
        }
        if now >= self.step_at {
            self.step_at = now + STEP;
            for (to, key, reply) in self.coordinator.tick(&self.view, now) {
                self.held_answer(to, key, &reply, now);
            }
            for (to, digests) in self.teller.step(&self.view, |id| self.members.record(&id).map(|record| record.incarnation), now) {
                if let Some(contact) = self.view.member(to).map(|member| member.contact) {
                    self.call(contact, Some(to), Ask::Have(digests), now);
                }
            }
        }
        self.settle(now);
    }

    /// Does what came of an event within this machine.
    fn settle(&mut self, now: Instant) {
        loop {
            while let Some(todo) = self.members.poll() {
                match todo {
                    MembersDo::Ping { to, member } => {
                        let ping = self.members.ping(member);
                        self.call(to, member, Ask::Ping(ping), now);
                    }
                    MembersDo::List { to, member, after } => self.call(to, Some(member), Ask::List { after }, now),
                }
            }
            self.view_stale |= self.members.take_changed();
            if self.view_stale && now >= self.view_at {
                self.view_stale = false;
                self.view_at = now + VIEW_INTERVAL;
                let was_alone = self.view.len() <= 1;
                self.view = Arc::new(self.members.view());
                if was_alone && self.view.len() > 1 {
                    self.asker.joined(now);
                    self.coordinator.joined(now);
                }
                self.teller.ranks_changed(now);
            }
            for (to, key, reply) in self.coordinator.poll(now) {
                self.held_answer(to, key, &reply, now);
            }
            let Some(todo) = self.asker.poll() else { return };
            self.ask_do(todo, now);
        }
    }

    fn ask_do(&mut self, todo: AskDo, now: Instant) {
        match todo {
            AskDo::Want { to, want } if to == self.me => {
                let me = self.view.member(self.me).cloned();
                let Some(me) = me else { return };
                let answer = self.coordinate(&me, &want, now);
                tracing::trace!(?want, ?answer, "asked of itself");
                match answer {
                    Coordinated::Now(reply) => self.asker.reply(&self.view, self.me, want.key, &reply, now),
                    Coordinated::Held | Coordinated::Ignored => {}
                }
            }
            AskDo::Want { to, want } => {
                if let Some(contact) = self.view.member(to).map(|member| member.contact) {
                    tracing::trace!(?want, %contact, "to ask");
                    self.call(contact, Some(to), Ask::Want(want), now);
                }
            }
            AskDo::Fetch { digest, piece, from } => {
                let (contact, origin) = match from {
                    AskOrigin::Mirror => (None, Some(Origin::Mirror)),
                    AskOrigin::Member(id) => {
                        let contact = self.view.member(id).map(|member| member.contact);
                        (contact, contact.map(Origin::Member))
                    }
                };
                match origin {
                    Some(origin) => {
                        self.fetching.insert((digest, piece, contact), from);
                        self.todo.push_back(CoreDo::Fetch { digest, piece, from: origin });
                    }
                    // It left the fleet between the hint and now.
                    None => self.asker.fetch_failed(&self.view, digest, piece, from, true, now),
                }
            }
            AskDo::Done(digest) => self.todo.push_back(CoreDo::Done(digest)),
        }
    }

    fn coordinate(&mut self, asker: &Member, want: &Want, now: Instant) -> Coordinated {
        let shape = FileShape::of(want.key.digest, want.size);
        let whole = if self.teller.has(&shape) { group_bits(&shape, want.key.group) } else { 0 };
        let down = |id| self.asker.is_down(id, now);
        let mirror_pace = self.asker.mirror_pace(now);
        let local = Local { have: whole | self.asker.have(&want.key), down: &down, mirror_pace };
        self.coordinator.want(&self.view, asker, want, &local, now)
    }

    fn held_answer(&mut self, to: MemberId, key: GroupKey, reply: &Reply, now: Instant) {
        tracing::trace!(?key, ?reply, "held until now");
        if to == self.me {
            self.asker.reply(&self.view, self.me, key, reply, now);
        } else if let Some(waiting) = self.held.remove(&(to, key)) {
            self.answer_want(waiting.to, &waiting.transaction, waiting.nonce, reply.clone(), now);
        }
    }

    fn answer_want(&mut self, to: SocketAddr, transaction: &Transaction, nonce: Nonce, mut reply: Reply, now: Instant) {
        // Others may reach this machine at an address that it does not know.
        for (contact, _) in &mut reply.from {
            if self.view.at(contact).is_some_and(|member| member.id == self.me) {
                *contact = ANSWERER;
            }
        }
        self.answer(to, transaction, nonce, &Answer::Reply(reply), now);
    }

    fn answer(&mut self, to: SocketAddr, transaction: &Transaction, nonce: Nonce, with: &Answer, now: Instant) {
        let bytes = wire::answer(self.gate.key(), self.me, transaction, nonce, to, with);
        self.send(to, bytes, now);
    }

    fn send(&mut self, to: SocketAddr, bytes: Vec<u8>, now: Instant) {
        if self.out.take(MEMBERS_PER_SECOND, MEMBERS_PER_SECOND, now) {
            self.todo.push_back(CoreDo::Send { to, bytes });
        } else {
            self.counters.unsent += 1;
        }
    }

    /// Sends a query for the first time; a want that is under way is sent again.
    fn call(&mut self, to: SocketAddr, member: Option<MemberId>, ask: Ask, now: Instant) {
        let want = match (&ask, member) {
            (Ask::Want(want), Some(member)) => Some((member, want.key)),
            _ => None,
        };
        if let Some(transaction) = want.and_then(|want| self.wants.get(&want).copied())
            && let Some(call) = self.calls.get_mut(&transaction)
        {
            // An answer to what was asked before is not one to this: it would be taken for all that there is to say.
            call.nonces.clear();
            (call.ask, call.to, call.first, call.step) = (ask, to, now, 0);
            self.timers.push(Reverse((now + WANT_AGAIN, transaction)));
            return self.transmit(transaction, now);
        }
        if self.calls.len() >= CALLS_MAX {
            self.counters.unsent += 1;
            return;
        }
        let transaction = loop {
            let transaction: [u8; 4] = self.rng.random();
            if !self.calls.contains_key(&transaction) {
                break transaction;
            }
        };
        let delay = if want.is_some() { WANT_AGAIN } else { Schedule::Adapted.delay(None, &self.rtt) };
        self.timers.push(Reverse((now + delay, transaction)));
        self.calls.insert(transaction, Call { to, member, ask, nonces: VecDeque::new(), first: now, sent: now, delay, step: 0 });
        if let Some(want) = want {
            self.wants.insert(want, transaction);
        }
        self.transmit(transaction, now);
    }

    fn transmit(&mut self, transaction: [u8; 4], now: Instant) {
        let (nonce, unix_s) = (Nonce(self.rng.random()), self.unix_s(now));
        let Some(call) = self.calls.get_mut(&transaction) else { return };
        call.sent = now;
        call.nonces.push_back(nonce);
        while call.nonces.len() > NONCES_KEPT {
            call.nonces.pop_front();
        }
        let bytes = wire::query(self.gate.key(), self.me, transaction, nonce, unix_s, &call.ask);
        let to = call.to;
        self.send(to, bytes, now);
    }

    fn call_due(&mut self, transaction: [u8; 4], now: Instant) {
        let Some(call) = self.calls.get_mut(&transaction) else { return };
        if call.ask.kind() == Kind::Want {
            if call.step < 2 && now >= call.sent + WANT_AGAIN {
                call.step += 1;
                self.timers.push(Reverse((now + if call.step == 1 { WANT_AGAIN } else { WANT_KEPT }, transaction)));
                self.transmit(transaction, now);
            } else if now >= call.sent + WANT_KEPT {
                self.end_call(transaction);
            }
            return;
        }
        call.step += 1;
        let (first, delay, step) = (call.first, call.delay, call.step);
        match step {
            1 => self.timers.push(Reverse((first + delay * 3, transaction))),
            2 => self.timers.push(Reverse((first + UNREACHABLE_AFTER, transaction))),
            _ => {
                let Some(call) = self.end_call(transaction) else { return };
                if let Ask::Who(digest) = call.ask {
                    self.todo.push_back(CoreDo::Holders { digest, holders: Vec::new() });
                }
                self.members.unreachable(call.member, call.to, now);
                if let Some(member) = call.member {
                    self.asker.member_failed(member, now);
                    if call.ask.kind() == Kind::List {
                        self.members.list_failed(member);
                    }
                }
                return;
            }
        }
        self.transmit(transaction, now);
    }

    fn end_call(&mut self, transaction: [u8; 4]) -> Option<Call> {
        let call = self.calls.remove(&transaction)?;
        if let (Ask::Want(want), Some(member)) = (&call.ask, call.member) {
            self.wants.remove(&(member, want.key));
        }
        Some(call)
    }

    /// Whether an address may send another datagram now.
    fn admit(&mut self, from: SocketAddr, now: Instant) -> bool {
        let is_member = self.view.at(&from).is_some();
        // All strangers of one address are one, whatever their ports.
        let who = if is_member { from } else { SocketAddr::new(from.ip(), 0) };
        if self.addresses.len() >= ADDRESSES_MAX && !self.addresses.contains_key(&who) {
            self.addresses.retain(|_, bucket| !bucket.is_full(ADDRESS_PER_SECOND, ADDRESS_BURST, now));
            if self.addresses.len() >= ADDRESSES_MAX {
                return false;
            }
        }
        let of_address = self.addresses.entry(who).or_insert_with(|| Bucket::new(ADDRESS_BURST, now));
        let of_all = if is_member { (&mut self.into, MEMBERS_PER_SECOND) } else { (&mut self.strangers, STRANGERS_PER_SECOND) };
        of_address.take(ADDRESS_PER_SECOND, ADDRESS_BURST, now) && of_all.0.take(of_all.1, of_all.1, now)
    }

    fn on_query(&mut self, from: SocketAddr, envelope: &Envelope<'_>, now: Instant) {
        if !self.is_spoken_to(from.ip()) {
            self.counters.refused += 1;
            return;
        }
        if !self.admit(from, now) {
            self.counters.limited += 1;
            return;
        }
        let Ok(nonce) = self.gate.check(envelope.tag, self.unix_s(now), &[&envelope.tagged]) else {
            self.counters.refused += 1;
            return;
        };
        let Some((id, ask)) = envelope.query() else { return };
        if id == self.me {
            return;
        }
        self.counters.taken += 1;
        let transaction = &envelope.transaction;
        match ask {
            Ask::Ping(ping) => {
                if self.members.asked(from, &ping, now) {
                    let pong = Answer::Pong {
                        ping: self.members.ping(Some(id)),
                        digest: self.members.digest(),
                        count: u32::try_from(self.members.len()).unwrap_or(u32::MAX),
                    };
                    self.answer(from, transaction, nonce, &pong, now);
                }
            }
            Ask::Want(want) => {
                let Some(asker) = self.speaker(id, from, now) else { return };
                let answer = self.coordinate(&asker, &want, now);
                tracing::trace!(?want, ?answer, %from, "asked by a member");
                match answer {
                    Coordinated::Now(reply) => {
                        self.held.remove(&(id, want.key));
                        self.answer_want(from, transaction, nonce, reply, now);
                    }
                    Coordinated::Held if self.held.len() < HELD_MAX || self.held.contains_key(&(id, want.key)) => {
                        self.held.insert((id, want.key), Waiting { to: from, transaction: *transaction, nonce });
                    }
                    Coordinated::Held | Coordinated::Ignored => {}
                }
            }
            Ask::Have(digests) => {
                if self.speaker(id, from, now).is_some() {
                    self.coordinator.told(&self.view, id, &digests, now);
                    self.answer(from, transaction, nonce, &Answer::Had, now);
                }
            }
            Ask::Who(digest) => {
                if self.speaker(id, from, now).is_some() {
                    let mut holders = self.coordinator.holders(&self.view, id, &digest, now);
                    if self.teller.tells_of(&digest) {
                        holders.insert(0, ANSWERER);
                    }
                    self.answer(from, transaction, nonce, &Answer::Who(holders), now);
                }
            }
            Ask::List { after } => {
                if self.speaker(id, from, now).is_some() {
                    let (members, end) = self.members.list(&after);
                    self.answer(from, transaction, nonce, &Answer::List { members, end }, now);
                }
            }
        }
    }

    /// Whether a machine at this address can be of the fleet at all.
    fn is_spoken_to(&self, ip: IpAddr) -> bool {
        self.keyed || self.members.is_near(ip)
    }

    /// The member that speaks. With the key also one that is not known yet, but its address is asked first.
    fn speaker(&mut self, id: MemberId, from: SocketAddr, now: Instant) -> Option<Member> {
        let known = self.view.member(id).cloned();
        if self.keyed {
            return known.or_else(|| {
                self.members.hint(from, now);
                Some(Member { id, contact: from, also: None, zone: Arc::from("") })
            });
        }
        // Without it an id is anybody's to write: it has to come from where its holder has answered.
        known.filter(|member| member.contact == from || member.also == Some(from))
    }

    fn on_answer(&mut self, from: SocketAddr, envelope: &Envelope<'_>, now: Instant) {
        let transaction = envelope.transaction.as_own();
        let call = transaction.and_then(|transaction| self.calls.get(&transaction)).filter(|call| call.to == from);
        let (Some(transaction), Some(call)) = (transaction, call) else {
            self.counters.foreign += 1;
            return;
        };
        let fits = |nonce: &Nonce| self.gate.key().check_reply(*nonce, envelope.tag, &[&envelope.tagged]);
        if !call.nonces.iter().any(fits) {
            self.counters.refused += 1;
            return;
        }
        let Some((id, answer, seen_as)) = envelope.answer(call.ask.kind()) else { return };
        if id == self.me || call.member.is_some_and(|member| member != id) {
            // Another machine has taken the address: who was there does not answer.
            if let Answer::Pong { ping, digest, .. } = &answer {
                self.members.answered(from, ping, *digest, seen_as, now);
            }
            return;
        }
        let Some(call) = self.end_call(transaction) else { return };
        self.counters.taken += 1;
        if call.nonces.len() == 1 && call.ask.kind() != Kind::Want {
            self.rtt.sample(now.saturating_duration_since(call.first));
        }
        self.members.heard(id, from, now);
        match (answer, call.ask) {
            (Answer::Pong { ping, digest, .. }, _) => self.members.answered(from, &ping, digest, seen_as, now),
            (Answer::Reply(mut reply), Ask::Want(want)) => {
                let contact = self.view.member(id).map(|member| member.contact);
                reply.from.retain_mut(|(named, _)| {
                    if *named == ANSWERER {
                        *named = contact.unwrap_or(ANSWERER);
                    }
                    *named != ANSWERER
                });
                tracing::trace!(key = ?want.key, ?reply, %from, "answered");
                self.asker.reply(&self.view, id, want.key, &reply, now);
            }
            (Answer::Who(mut holders), Ask::Who(digest)) => {
                let answerer = self.view.member(id).map(|member| member.contact);
                holders.iter_mut().filter(|holder| **holder == ANSWERER).for_each(|holder| *holder = answerer.unwrap_or(ANSWERER));
                // Nobody is connected to because somebody names it.
                holders.retain(|holder| self.view.at(holder).is_some_and(|member| member.id != self.me));
                self.todo.push_back(CoreDo::Holders { digest, holders });
            }
            (Answer::List { members, end }, _) => self.members.listed(id, &members, end, now),
            (Answer::Had | Answer::Reply(_) | Answer::Who(_), _) => {}
        }
    }
}

#[cfg(test)]
mod tests;
