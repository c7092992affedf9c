//! Announcing many keys in one sweep.
//!
//! Keys are walked in their order, so that one walk's answers serve the keys beside it: a node that answered within its
//! token's life is not asked again, it counts as having answered. Announces to one poolfs node are gathered while the
//! sweep is near it and go out as one datagram with `more`. Other nodes bind their token to the key, so each key costs them a
//! query of its own. Everything goes out at the rate of upkeep; what waits for it is bounded by [`OUTBOX_MAX`].

use super::address::Family;
use super::lookup::Kind;
use super::query::{Budget, NotSent, Purpose};
use super::table::K;
use super::walk::{State, Walk};
use super::{Event, LookupId, Node};
use crate::krpc::{Announce, DATAGRAM_BYTES_OUT_MAX, Id, MORE_KEYS_MAX, NodeInfo, Pv, Verb, Want};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Refresh at poolfs nodes, which forget after 2 h 30.
pub const REFRESH_POOLFS: Duration = Duration::from_secs(2 * 3600);

/// Refresh at other nodes, of which libtorrent forgets after 45 minutes.
pub const REFRESH_OTHER: Duration = Duration::from_secs(25 * 60);

/// Keys due this soon go along with those that are due.
const AHEAD: Duration = Duration::from_secs(10 * 60);

/// After a sweep that met nobody.
const RETRY: Duration = Duration::from_secs(5 * 60);

/// Nodes of the region remembered.
pub const KNOWN_MAX: usize = 256;

/// A node's batch goes out when this many keys in a row were not for it.
pub const FORGET_AFTER_KEYS: usize = 64;

/// A batch goes out at this age at the latest: its token lives for five minutes at least.
const BATCH_AGE_MAX: Duration = Duration::from_secs(4 * 60);

/// Nodes of the region that have not answered yet, and are passed over for its other keys until they do.
pub const SILENT_MAX: usize = 256;

/// Announces that wait to be sent; while there are more the sweep stands still.
pub const OUTBOX_MAX: usize = 64;

/// Withdrawals that wait to be sent, each of up to [`MORE_KEYS_MAX`] keys more; further ones are left to the contacts' expiry.
pub const WITHDRAWALS_MAX: usize = 4_096;

/// Announces that wait for a token.
const WAITING_MAX: usize = 256;

/// Nodes remembered for one key and family.
const PLACED_MAX: usize = 2 * K;

/// Bytes of an announce without `pv` and `more`, with the longest token; `more` and `pv` with their names and lengths.
const ANNOUNCE_BYTES: usize = 140 + 66;

/// A key to be announced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnnounceKey {
    /// The key.
    pub key: Id,
    /// What is said of this machine's copy.
    pub pv: Option<Pv>,
}

/// A node that already answered in this region.
#[derive(Debug, Clone, Copy)]
pub(super) struct SeedNode {
    pub(super) info: NodeInfo,
    pub(super) poolfs: bool,
    at: Instant,
    /// The key it was asked for, and how many bits of it the farthest node of that walk's result shared: what this node said
    /// is all there is to know for keys that share as many.
    target: Id,
    depth: usize,
}

impl SeedNode {
    /// Whether asking it for `key` would teach next to nothing. One bit more would reach 7.6 instead of 6.3 of the eight closest
    /// nodes among 1,000, for half as many datagrams again; a lookup needs one of them.
    pub(super) fn has_answered_for(&self, key: &Id) -> bool {
        self.target.common_bits(key) >= self.depth
    }
}

#[derive(Debug, Clone, Copy)]
struct Placed {
    addr: SocketAddr,
    poolfs: bool,
    at: Instant,
}

#[derive(Debug)]
struct KeyState {
    pv: Option<Arc<[u8]>>,
    due: [Instant; 2],
    placed: [Vec<Placed>; 2],
    outstanding: u32,
    acknowledged: u32,
}

#[derive(Debug)]
struct Batch {
    to: NodeInfo,
    keys: Vec<Id>,
    begun: Instant,
    last_step: usize,
}

/// A datagram that waits for its turn.
#[derive(Debug)]
struct Outgoing {
    to: NodeInfo,
    token: Option<Vec<u8>>,
    keys: Vec<Id>,
    pv: Option<Arc<[u8]>>,
    withdraw: bool,
    not_before: Instant,
}

type BatchKey = (SocketAddr, Option<Arc<[u8]>>);

#[derive(Debug)]
struct Sweep {
    family: Family,
    queue: VecDeque<Id>,
    walk: Option<LookupId>,
    known: Vec<SeedNode>,
    silent: VecDeque<NodeInfo>,
    batches: BTreeMap<BatchKey, Batch>,
    step: usize,
}

impl Sweep {
    /// Forgets the known nodes that are farthest from where the sweep is.
    fn keep_near(&mut self, key: &Id) {
        self.known.sort_by_key(|n| n.info.id.distance(key));
        self.known.truncate(KNOWN_MAX);
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Announcer {
    keys: BTreeMap<Id, KeyState>,
    sweep: Option<Box<Sweep>>,
    outbox: VecDeque<Outgoing>,
    waiting: BTreeMap<(Id, SocketAddr), Outgoing>,
    /// Announces that are tried a second time with a new token, by their first key.
    retried: BTreeSet<(Id, SocketAddr)>,
    next_at: Option<Instant>,
}

impl Announcer {
    pub(super) fn new() -> Self {
        Self {
            keys: BTreeMap::new(),
            sweep: None,
            outbox: VecDeque::new(),
            waiting: BTreeMap::new(),
            retried: BTreeSet::new(),
            next_at: None,
        }
    }

    pub(super) fn due_at(&self) -> Option<Instant> {
        self.next_at
    }

    pub(super) fn keys(&self) -> usize {
        self.keys.len()
    }

    /// What is announced of this key, if it is announced.
    pub(super) fn pv(&self, key: &Id) -> Option<Option<Arc<[u8]>>> {
        self.keys.get(key).map(|state| state.pv.clone())
    }
}

impl Node {
    /// Sets all that is to be announced; what was announced and is not among it any more is withdrawn. Returns how many are
    /// taken: the first [`super::ANNOUNCE_KEYS_MAX`]. See [`super::select`].
    pub fn set_announces(&mut self, keys: Vec<AnnounceKey>, now: Instant) -> usize {
        self.advance(now);
        let mut old = std::mem::take(&mut self.announcer.keys);
        let now = self.now;
        for AnnounceKey { key, pv } in keys {
            if self.announcer.keys.len() == self.config.announce_keys_max {
                break;
            }
            let pv: Option<Arc<[u8]>> = pv.map(|pv| pv.encode().into());
            let fresh = |pv| KeyState { pv, due: [now; 2], placed: [Vec::new(), Vec::new()], outstanding: 0, acknowledged: 0 };
            let state = match old.remove(&key) {
                Some(state) if state.pv == pv => state,
                Some(state) => KeyState { pv, due: [now; 2], placed: [Vec::new(), Vec::new()], ..state },
                None => fresh(pv),
            };
            self.announcer.keys.insert(key, state);
        }
        // A poolfs node takes many keys in one datagram.
        let mut gone: BTreeMap<(SocketAddr, bool), Vec<Id>> = BTreeMap::new();
        for (key, state) in old {
            for placed in state.placed.into_iter().flatten() {
                gone.entry((placed.addr, placed.poolfs)).or_default().push(key);
            }
        }
        for ((addr, poolfs), keys) in gone {
            let known = |e: &&super::table::Entry| e.info.addr == addr;
            let id = self.tables[Family::of(addr) as usize].entries().find(known).map_or(Id::default(), |e| e.info.id);
            let to = NodeInfo { id, addr };
            for keys in keys.chunks(if poolfs { keys_max(None) } else { 1 }) {
                if self.announcer.outbox.len() >= WITHDRAWALS_MAX {
                    break;
                }
                let keys = keys.to_vec();
                self.announcer.outbox.push_back(Outgoing { to, token: None, keys, pv: None, withdraw: true, not_before: now });
            }
        }
        self.announcer.next_at = Some(now);
        self.run_announcer();
        self.announcer.keys.len()
    }

    /// Does what can be done now: sends what waits, walks to the next key, begins a sweep.
    pub(super) fn run_announcer(&mut self) {
        if self.announcer.keys.is_empty() && self.announcer.outbox.is_empty() {
            self.announcer.next_at = None;
            return;
        }
        if !self.is_active() {
            self.announcer.next_at = Some(self.now + Duration::from_secs(10));
            return;
        }
        if self.announcer.next_at.is_some_and(|at| at > self.now) {
            return;
        }
        self.announcer.next_at = None;
        loop {
            self.flush_ripe();
            if let Some(at) = self.send_waiting() {
                self.announcer.next_at = Some(at);
                if self.announcer.outbox.len() >= OUTBOX_MAX {
                    return;
                }
            }
            match self.announcer.sweep.as_ref() {
                Some(sweep) if sweep.walk.is_some() => return,
                Some(_) => {
                    if !self.next_key() {
                        self.end_sweep();
                    }
                }
                None => {
                    if !self.begin_sweep() {
                        return;
                    }
                }
            }
        }
    }

    /// Takes the keys of one family that are due. Returns whether there are any; otherwise `next_at` says when.
    fn begin_sweep(&mut self) -> bool {
        let now = self.now;
        let mut next: Option<Instant> = None;
        for family in Family::ALL {
            let f = family as usize;
            if !self.config.families[f] {
                continue;
            }
            let Some(first) = self.announcer.keys.values().map(|k| k.due[f]).min() else { continue };
            if first > now {
                next = Some(next.map_or(first, |at| at.min(first)));
                continue;
            }
            if self.tables[f].is_empty() {
                let retry = now + Duration::from_secs(10);
                next = Some(next.map_or(retry, |at| at.min(retry)));
                continue;
            }
            let queue: VecDeque<Id> = self.announcer.keys.iter().filter(|(_, k)| k.due[f] <= now + AHEAD).map(|(key, _)| *key).collect();
            self.announcer.sweep = Some(Box::new(Sweep {
                family,
                queue,
                walk: None,
                known: Vec::new(),
                silent: VecDeque::new(),
                batches: BTreeMap::new(),
                step: 0,
            }));
            return true;
        }
        let waiting = self.announcer.next_at;
        self.announcer.next_at = [next, waiting].into_iter().flatten().min();
        false
    }

    /// Walks to the next key of the sweep; `false` if there is none.
    fn next_key(&mut self) -> bool {
        let now = self.now;
        let Some(sweep) = self.announcer.sweep.as_mut() else { return false };
        let Some(key) = sweep.queue.pop_front() else { return false };
        if !self.announcer.keys.contains_key(&key) {
            return true; // Withdrawn meanwhile.
        }
        sweep.step += 1;
        sweep.known.retain(|n| now.saturating_duration_since(n.at) < BATCH_AGE_MAX);
        sweep.keep_near(&key);
        let seeds: Vec<SeedNode> = sweep.known.iter().take(3 * K).copied().collect();
        let mut silent: Vec<NodeInfo> = sweep.silent.iter().copied().collect();
        silent.sort_by_key(|node| node.id.distance(&key));
        silent.truncate(2 * K);
        let mut families = [false; 2];
        families[sweep.family as usize] = true;
        let before = self.next_number;
        // The walk may end at once, and then `announce_walk_ended` has run already.
        sweep.walk = Some(LookupId(before + 1));
        let id = self.start_lookup(Kind::Announce, key, families, &seeds, &silent);
        debug_assert_eq!(id, LookupId(before + 1));
        true
    }

    /// The closest nodes of a key are known.
    pub(super) fn announce_walk_ended(&mut self, id: LookupId, key: Id, walks: &[Option<Walk>; 2]) {
        let now = self.now;
        let Some(sweep) = self.announcer.sweep.as_mut().filter(|s| s.walk == Some(id)) else { return };
        sweep.walk = None;
        let (family, step) = (sweep.family, sweep.step);
        let f = family as usize;
        self.announcer.next_at = Some(now);
        let Some(walk) = walks[f].as_ref() else { return };
        let closest = walk.closest();
        let depth = closest.last().map_or(0, |c| c.info.id.common_bits(&key));
        for candidate in walk.candidates().iter().filter(|c| c.state == State::Answered) {
            let asked = SeedNode { info: candidate.info, poolfs: candidate.poolfs, at: now, target: key, depth };
            match sweep.known.iter_mut().find(|n| n.info == candidate.info) {
                // It was not asked this time: what it knows is as old as it was.
                Some(known) if known.has_answered_for(&key) => {}
                Some(known) => *known = asked,
                None => sweep.known.push(asked),
            }
        }
        sweep.keep_near(&key);
        // Their queries are still repeated. Others tell of a dead node for each key beside it: three datagrams every time.
        for candidate in walk.candidates().iter().filter(|c| matches!(c.state, State::Silent | State::Failed)) {
            if !sweep.silent.contains(&candidate.info) {
                if sweep.silent.len() == SILENT_MAX {
                    sweep.silent.pop_front();
                }
                sweep.silent.push_back(candidate.info);
            }
        }
        let Some(state) = self.announcer.keys.get_mut(&key) else { return };
        let others = closest.iter().any(|c| !c.poolfs);
        state.due[f] = now
            + if closest.is_empty() {
                RETRY
            } else if others {
                REFRESH_OTHER
            } else {
                REFRESH_POOLFS
            };
        (state.outstanding, state.acknowledged) = (0, 0);
        for candidate in closest {
            // A poolfs node that was told lately needs no word at the pace of the others.
            let fresh = |p: &Placed| p.addr == candidate.info.addr && p.poolfs && p.at + REFRESH_POOLFS > now + AHEAD;
            if state.placed[f].iter().any(fresh) {
                continue;
            }
            state.outstanding += 1;
            if candidate.poolfs {
                let batch = sweep.batches.entry((candidate.info.addr, state.pv.clone()));
                let batch = batch.or_insert_with(|| Batch { to: candidate.info, keys: Vec::new(), begun: now, last_step: step });
                batch.keys.push(key);
                batch.last_step = step;
            } else {
                let (to, pv) = (candidate.info, state.pv.clone());
                let out = Outgoing { to, token: candidate.token, keys: vec![key], pv, withdraw: false, not_before: now };
                self.announcer.outbox.push_back(out);
            }
        }
    }

    /// A node answered after its walk was over: the next key may ask it.
    pub(super) fn heard_late(&mut self, from: SocketAddr) {
        if let Some(sweep) = self.announcer.sweep.as_mut() {
            sweep.silent.retain(|node| node.addr != from);
        }
    }

    /// Batches that are full, old, or left behind by the sweep go to the outbox.
    fn flush_ripe(&mut self) {
        let now = self.now;
        let Some(sweep) = self.announcer.sweep.as_mut() else { return };
        let step = sweep.step;
        let ripe = |(_, pv): &BatchKey, batch: &Batch| {
            batch.keys.len() >= keys_max(pv.as_deref())
                || batch.last_step + FORGET_AFTER_KEYS < step
                || now.saturating_duration_since(batch.begun) >= BATCH_AGE_MAX
        };
        let keys: Vec<BatchKey> = sweep.batches.iter().filter(|(key, batch)| ripe(key, batch)).map(|(key, _)| key.clone()).collect();
        for key in keys {
            if let Some(batch) = sweep.batches.remove(&key) {
                let out = Outgoing { to: batch.to, token: None, keys: batch.keys, pv: key.1, withdraw: false, not_before: now };
                self.announcer.outbox.push_back(out);
            }
        }
    }

    fn end_sweep(&mut self) {
        let now = self.now;
        let Some(sweep) = self.announcer.sweep.take() else { return };
        for ((_, pv), batch) in sweep.batches {
            let out = Outgoing { to: batch.to, token: None, keys: batch.keys, pv, withdraw: false, not_before: now };
            self.announcer.outbox.push_back(out);
        }
    }

    /// Sends from the outbox as the rates allow; says when to go on if they did not.
    fn send_waiting(&mut self) -> Option<Instant> {
        let mut later = VecDeque::new();
        let mut again: Option<Instant> = None;
        while let Some(mut out) = self.announcer.outbox.pop_front() {
            if out.not_before > self.now {
                again = Some(again.map_or(out.not_before, |at| at.min(out.not_before)));
                later.push_back(out);
                continue;
            }
            match self.send_out(&mut out) {
                Ok(()) => {}
                Err(NotSent::Until(at)) => {
                    again = Some(again.map_or(at, |now| now.min(at)));
                    self.announcer.outbox.push_front(out);
                    break;
                }
                Err(NotSent::AddressUntil(at)) => {
                    again = Some(again.map_or(at, |now| now.min(at)));
                    out.not_before = at;
                    later.push_back(out);
                }
                Err(NotSent::Never) => {}
            }
        }
        self.announcer.outbox.append(&mut later);
        again
    }

    fn send_out(&mut self, out: &mut Outgoing) -> Result<(), NotSent> {
        let to = out.to;
        let id = (to.id != Id::default()).then_some(to.id);
        let key = out.keys[0];
        let token = out.token.clone().or_else(|| self.peers.token(&to.addr, self.now).map(<[u8]>::to_vec));
        let Some(token) = token else {
            if self.announcer.waiting.len() >= WAITING_MAX || self.announcer.waiting.contains_key(&(key, to.addr)) {
                return Err(NotSent::Until(self.now + Duration::from_millis(100)));
            }
            let verb = Verb::GetPeers { key, want: Want::default(), pv: false, statements: false, token: None };
            self.query(to.addr, id, verb, Purpose::KeyToken(key), Budget::Upkeep)?;
            let (keys, pv) = (std::mem::take(&mut out.keys), out.pv.take());
            let waiting = Outgoing { to, token: None, keys, pv, withdraw: out.withdraw, not_before: self.now };
            self.announcer.waiting.insert((key, to.addr), waiting);
            return Ok(());
        };
        let (port, purpose) = if out.withdraw { (0, Purpose::Withdraw) } else { (self.config.port, Purpose::Announce(out.keys.clone())) };
        let pv = out.pv.as_deref().map(<[u8]>::to_vec);
        let announce = Announce { key, port, implied_port: false, token, pv, more: out.keys[1..].to_vec(), statement: None };
        self.query(to.addr, id, Verb::Announce(Box::new(announce)), purpose, Budget::Upkeep)
    }

    /// The token for one key at one node has come.
    pub(super) fn key_token(&mut self, key: &Id, from: SocketAddr, token: Option<Vec<u8>>) {
        if let Some(mut out) = self.announcer.waiting.remove(&(*key, from))
            && token.is_some()
        {
            out.token = token;
            self.announcer.outbox.push_front(out);
            self.announcer.next_at = Some(self.now);
            self.run_announcer();
        }
    }

    pub(super) fn key_token_failed(&mut self, key: &Id, from: SocketAddr) {
        if let Some(out) = self.announcer.waiting.remove(&(*key, from)).filter(|out| !out.withdraw) {
            self.announce_ended(&out.keys, from, None);
        }
    }

    /// An announce was refused, perhaps for a token that its maker forgot at a restart: once more with a new one.
    pub(super) fn announce_refused(&mut self, keys: &[Id], to: NodeInfo) {
        let first = (keys[0], to.addr);
        let pv = self.announcer.keys.get(&keys[0]).and_then(|state| state.pv.clone());
        if self.announcer.retried.len() >= WAITING_MAX || !self.announcer.retried.insert(first) {
            self.announce_ended(keys, to.addr, None);
            return;
        }
        let out = Outgoing { to, token: None, keys: keys.to_vec(), pv, withdraw: false, not_before: self.now };
        self.announcer.outbox.push_back(out);
        self.announcer.next_at = Some(self.now);
    }

    /// An announce was answered (`Some`: whether by a poolfs node) or not.
    pub(super) fn announce_ended(&mut self, keys: &[Id], from: SocketAddr, answered: Option<bool>) {
        let (f, now) = (Family::of(from) as usize, self.now);
        if let Some(first) = keys.first() {
            self.announcer.retried.remove(&(*first, from));
        }
        for key in keys {
            let Some(state) = self.announcer.keys.get_mut(key) else { continue };
            state.outstanding = state.outstanding.saturating_sub(1);
            if let Some(poolfs) = answered {
                state.acknowledged += 1;
                state.placed[f].retain(|p| p.addr != from);
                if state.placed[f].len() == PLACED_MAX {
                    state.placed[f].remove(0);
                }
                state.placed[f].push(Placed { addr: from, poolfs, at: now });
            }
            if state.outstanding == 0 && state.acknowledged > 0 {
                let event = Event::Announced { key: *key, nodes: state.acknowledged };
                self.event(event);
            }
        }
    }
}

/// Keys that fit one announce beside this `pv`.
fn keys_max(pv: Option<&[u8]>) -> usize {
    let room = DATAGRAM_BYTES_OUT_MAX.saturating_sub(ANNOUNCE_BYTES + pv.map_or(0, |pv| pv.len() + 8));
    (1 + room.saturating_sub(10) / 20).min(1 + MORE_KEYS_MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// A batch must fit its datagram with the longest token, whatever its `pv` is.
    #[test]
    fn batches_fit() {
        for pv in [None, Some(vec![0; 46]), Some(vec![0; 512])] {
            let more = vec![Id([1; 20]); keys_max(pv.as_deref()) - 1];
            let announce =
                Announce { key: Id([0; 20]), port: 65_535, implied_port: false, token: vec![0; 64], pv: pv.clone(), more, statement: None };
            let message = crate::krpc::Message {
                transaction: crate::krpc::Transaction::own([0; 4]),
                version: Some(crate::krpc::VERSION),
                read_only: true,
                ip: None,
                body: crate::krpc::Body::Query { id: Id([0; 20]), verb: Verb::Announce(Box::new(announce)) },
            };
            assert!(message.encode().is_ok(), "{} keys", keys_max(pv.as_deref()));
        }
        assert_eq!(keys_max(Some(&[0; 46])), 1 + 48);
    }

    /// A node with 400 friends that it announced to, and nobody answers any more.
    fn announcing(friends: usize, poolfs: bool, keys: usize) -> (Node, Instant) {
        let now = Instant::now();
        let mut config = super::super::Config::new([1; 32], [2; 32], super::super::Network::Private, 9977);
        config.announce_keys_max = 10_000;
        let mut node = Node::new(config, now, 0);
        for n in 0..keys {
            let mut key = [0; 20];
            key[..8].copy_from_slice(&n.to_be_bytes());
            let addr = |at: usize| (std::net::Ipv4Addr::from_bits(0x0a00_0000 + u32::try_from(at).unwrap()), 7777).into();
            let placed = (0..K).map(|k| Placed { addr: addr((n * K + k) % friends), poolfs, at: now }).collect();
            let state = KeyState { pv: None, due: [now; 2], placed: [placed, Vec::new()], outstanding: 0, acknowledged: 0 };
            node.announcer.keys.insert(Id(key), state);
        }
        (node, now)
    }

    /// Withdrawing all at once from nodes whose tokens are old: what waits for a token, and what waits for that, is bounded.
    #[test]
    fn withdrawals_are_bounded() {
        let (mut node, now) = announcing(8_000, false, 3_000);
        node.set_announces(Vec::new(), now);
        assert!(node.announcer.outbox.len() <= WITHDRAWALS_MAX, "{}", node.announcer.outbox.len());
        let mut waiting = 0;
        for step in 1..=3_000 {
            node.tick(now + Duration::from_millis(10) * step);
            while node.poll().is_some() {}
            waiting = waiting.max(node.announcer.waiting.len());
        }
        assert_eq!(waiting, WAITING_MAX, "50 a second, each waited for 6 s at least");
        // poolfs nodes are told of many keys in one datagram.
        let (mut node, now) = announcing(K, true, 490);
        node.set_announces(Vec::new(), now);
        assert_eq!(node.announcer.outbox.len() + node.announcer.waiting.len(), K * 490_usize.div_ceil(keys_max(None)));
    }

    /// A sweep past thousands of nodes remembers those that are near, its batches keep to their bound, and it stands still while
    /// too much waits to be sent.
    #[test]
    fn a_sweep_is_bounded() {
        let (mut node, now) = announcing(K, true, 400);
        let keys: Vec<Id> = node.announcer.keys.keys().copied().collect();
        node.announcer.keys.values_mut().for_each(|state| state.placed = [Vec::new(), Vec::new()]);
        let sweep = Sweep {
            family: Family::V4,
            queue: VecDeque::new(),
            walk: None,
            known: Vec::new(),
            silent: VecDeque::new(),
            batches: BTreeMap::new(),
            step: 0,
        };
        node.announcer.sweep = Some(Box::new(sweep));
        let (mut known, mut silent, mut batches) = (0, 0, 0);
        for (n, key) in (0..).zip(&keys) {
            // Sixteen nodes that no other key is near, half of them gone.
            let mut walk = Walk::new(*key, Id([0xff; 20]), super::super::Network::Private, 3);
            for at in n * 16..n * 16 + 16 {
                let mut id = key.0;
                id[16..].copy_from_slice(&u32::to_be_bytes(at));
                let info = NodeInfo { id: Id(id), addr: (std::net::Ipv4Addr::from_bits(0x0a00_0000 + at), 7777).into() };
                walk.add(info, 0, if at % 2 == 0 { State::Answered } else { State::Silent }, true);
            }
            let sweep = node.announcer.sweep.as_mut().unwrap();
            (sweep.walk, sweep.step) = (Some(LookupId(u64::from(n))), sweep.step + 1);
            node.announce_walk_ended(LookupId(u64::from(n)), *key, &[Some(walk), None]);
            node.flush_ripe();
            let sweep = node.announcer.sweep.as_ref().unwrap();
            known = known.max(sweep.known.len());
            silent = silent.max(sweep.silent.len());
            batches = batches.max(sweep.batches.len());
        }
        assert_eq!((known, silent), (KNOWN_MAX, SILENT_MAX));
        assert_eq!(batches, (FORGET_AFTER_KEYS + 1) * K);
        let late = node.announcer.sweep.as_ref().unwrap().silent[0];
        node.heard_late(late.addr);
        assert!(!node.announcer.sweep.as_ref().unwrap().silent.contains(&late), "who answers late is asked again");

        let (mut node, now_too) = announcing(K, true, 10);
        assert!(now_too >= now);
        let friend = NodeInfo { id: Id([9; 20]), addr: (std::net::Ipv4Addr::new(10, 1, 1, 1), 7777).into() };
        node.assume_answered(&[friend], true, Duration::from_millis(1), now_too);
        let later = now_too + Duration::from_secs(3_600);
        for _ in 0..OUTBOX_MAX {
            let keys = vec![Id([1; 20])];
            node.announcer.outbox.push_back(Outgoing { to: friend, token: None, keys, pv: None, withdraw: true, not_before: later });
        }
        node.run_announcer();
        assert!(node.announcer.sweep.is_none(), "no walk while {OUTBOX_MAX} datagrams wait");
        node.announcer.outbox.pop_back();
        node.announcer.next_at = None;
        node.run_announcer();
        assert!(node.announcer.sweep.is_some());
    }

    /// Forty nodes that say they took a key: the withdrawal goes to the last of them.
    #[test]
    fn placed_is_bounded() {
        let (mut node, _) = announcing(1, true, 1);
        let key = *node.announcer.keys.keys().next().unwrap();
        for n in 0..40 {
            node.announce_ended(&[key], (std::net::Ipv4Addr::new(10, 9, 9, n), 7777).into(), Some(true));
        }
        assert_eq!(node.announcer.keys[&key].placed[0].len(), PLACED_MAX);
    }
}
