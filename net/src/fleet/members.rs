//! Who is in the fleet: how members are found, and how it is noticed that they went.
//!
//! An address from anywhere (a hello on the link, DNS, the DHT, the saved table) is a hint: it is pinged, and who answers is a
//! member. One answer is to have joined; then the first two who answer are asked for their lists, and every
//! [`COMPARE_INTERVAL`], sooner while much is new, a list that differs from the own one is asked for again. Every [`PING_INTERVAL`] one member, in
//! shuffled order, is pinged; up to six changes ride along, each told about 3 log2(n) times (as in SWIM). A member that is
//! unreachable is told to be suspect, and out [`SUSPECT_FOR`] later unless it answers or contradicts with a higher incarnation.
//! Who is out is remembered for a while, so that old lists do not bring it back, and asked now and then whether it came back.
//!
//! Lists are asked for by datagram (`pf_list`), not by `GET /v1/members`: a machine that joins has an address that answered by UDP and
//! perhaps none that takes connections, the tags are the same, and 1,000 members are some sixty answers. The HTTP form is for people and
//! tools. A machine that ends says farewell ([`Members::farewell`]), so that nobody waits for it as a coordinator.
//!
//! With the fleet key, members are believed about each other. Without one anybody can speak, so members are only those that
//! answer at an address on one of this machine's own links; what is told of others is a hint like any other.
//!
//! **Bounds:** [`MEMBERS_MAX`] members and as many that went; [`HINTS_MAX`] addresses waiting, [`HINTS_PER_SECOND`] pinged.

use super::wire::{CHANGES_MAX, Change, LIST_BYTES_MAX, Ping, Record, State, ZONE_BYTES_MAX};
use crate::swarm::fleet::{MEMBERS_MAX, Member, MemberId, View};
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One member is pinged this often.
pub const PING_INTERVAL: Duration = Duration::from_secs(5);

/// A suspect that says nothing for this long is out.
pub const SUSPECT_FOR: Duration = Duration::from_secs(30);

/// Lists of members are compared this often.
pub const COMPARE_INTERVAL: Duration = Duration::from_secs(300);

/// The same after joining, and after a list that held more news than a few pings tell; doubled each time.
const COMPARE_INTERVAL_FIRST: Duration = Duration::from_secs(5);

/// Who is out is remembered for this long.
const OUT_KEPT: Duration = Duration::from_secs(3600);

/// One of those who are out is pinged this often: after a split of the network nobody else would bring the halves together.
const OUT_PING_INTERVAL: Duration = Duration::from_secs(30);

/// Addresses that wait to be pinged; more are left out.
pub const HINTS_MAX: usize = 1_024;

/// Addresses pinged for the first time in a second.
pub const HINTS_PER_SECOND: u32 = 50;

/// An address that was pinged is not pinged again as a hint for this long.
const HINT_AGAIN_AFTER: Duration = Duration::from_secs(30);

/// Lists asked for on joining.
const LISTS_ON_JOINING: u8 = 2;

/// A list that is not complete after this long is given up.
const LIST_PATIENCE: Duration = Duration::from_secs(60);

/// A start time further ahead than this is a lie or a broken clock, and would outlast every contradiction.
const INCARNATION_AHEAD_S_MAX: u64 = 24 * 3600;

/// Changes that wait to be told; the ones told most often go first.
const RUMOURS_MAX: usize = 2 * MEMBERS_MAX;

/// A prefix of addresses, those of a link: IPv4 in its mapped form, and the bits of 128.
pub type Near = (Ipv6Addr, u8);

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MembersDo {
    /// Ping this address, see [`Members::ping`].
    Ping {
        /// Where.
        to: SocketAddr,
        /// Who is expected there.
        member: Option<MemberId>,
    },
    /// Ask this member for its list from here on.
    List {
        /// Where.
        to: SocketAddr,
        /// Who.
        member: MemberId,
        /// The last one known.
        after: MemberId,
    },
}

/// What this machine is within the fleet.
#[derive(Clone, Debug)]
pub struct Me {
    /// Its id.
    pub id: MemberId,
    /// The port of its UDP and TCP sockets.
    pub port: u16,
    /// When it started, in seconds since 1970.
    pub started_s: u64,
    /// Its zone; cut to [`ZONE_BYTES_MAX`] bytes.
    pub zone: String,
    /// Coordinators are chosen within the zone only.
    pub zone_local: bool,
    /// Whether a fleet key proves who speaks; without one only these prefixes count.
    pub near: Option<Vec<Near>>,
}

#[derive(Debug)]
struct Known {
    record: Record,
    state: State,
    /// Since when it is in this state.
    since: Instant,
    /// Where it answered this machine last.
    answered: Option<SocketAddr>,
}

#[derive(Debug)]
struct Rumour {
    told: u32,
}

#[derive(Debug)]
struct Listing {
    member: MemberId,
    to: SocketAddr,
    began: Instant,
    /// Members before it.
    live: usize,
}

/// The members as this machine knows them. Sans I/O: takes what came and the time, gives [`MembersDo`].
#[derive(Debug)]
pub struct Members {
    me: Record,
    zone_local: bool,
    near: Option<Vec<Near>>,
    port: u16,
    now_s: (Instant, u64),
    known: BTreeMap<MemberId, Known>,
    /// Of those not out.
    live: usize,
    digest: u64,
    rumours: HashMap<MemberId, Rumour>,
    /// Whom to ping next, shuffled.
    round: Vec<MemberId>,
    ping_at: Instant,
    out_ping_at: Instant,
    hints: VecDeque<SocketAddr>,
    hinted: HashMap<SocketAddr, Instant>,
    hint_at: Instant,
    lists_wanted: u8,
    listing: Option<Listing>,
    listed: Vec<MemberId>,
    compare_at: Instant,
    compare_interval: Duration,
    compare: bool,
    changed: bool,
    rng: SmallRng,
    todo: VecDeque<MembersDo>,
}

fn id_digest(id: &MemberId) -> u64 {
    let hash = Sha256::digest(id.0);
    let (first, _) = hash.split_first_chunk::<8>().expect("SHA-256 has 32 bytes");
    u64::from_be_bytes(*first)
}

/// Whether an address lies in a prefix.
fn is_in(ip: IpAddr, (prefix, bits): &Near) -> bool {
    let ip = match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    (u128::from(ip) ^ u128::from(*prefix)).leading_zeros() >= u32::from(*bits)
}

impl Members {
    /// Nobody is known yet; `seed` is for the order of pings.
    pub fn new(me: Me, seed: u64, now: Instant) -> Self {
        let mut zone = me.zone;
        while zone.len() > ZONE_BYTES_MAX {
            zone.pop();
        }
        Self {
            me: Record { id: me.id, incarnation: me.started_s, v4: None, v6: None, zone: zone.into() },
            zone_local: me.zone_local,
            near: me.near,
            port: me.port,
            now_s: (now, me.started_s),
            known: BTreeMap::new(),
            live: 0,
            digest: id_digest(&me.id),
            rumours: HashMap::new(),
            round: Vec::new(),
            ping_at: now + PING_INTERVAL,
            out_ping_at: now + OUT_PING_INTERVAL,
            hints: VecDeque::new(),
            hinted: HashMap::new(),
            hint_at: now,
            lists_wanted: LISTS_ON_JOINING,
            listing: None,
            listed: Vec::new(),
            compare_at: now + COMPARE_INTERVAL_FIRST,
            compare_interval: COMPARE_INTERVAL_FIRST,
            compare: false,
            changed: true,
            rng: SmallRng::seed_from_u64(seed),
            todo: VecDeque::new(),
        }
    }

    /// Other members that are not out.
    pub fn len(&self) -> usize {
        self.live
    }

    /// Whether this machine is alone.
    pub fn is_empty(&self) -> bool {
        self.live == 0
    }

    /// Of all members' ids, this machine's too: equal where the members are.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// What is known of a member that is not out.
    pub fn record(&self, id: &MemberId) -> Option<&Record> {
        self.known.get(id).filter(|known| known.state != State::Out).map(|known| &known.record)
    }

    /// Whether something changed since this was last asked: then a new view is due.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// The live members, this machine among them.
    pub fn view(&self) -> View {
        let of_zone = |record: &&Known| !self.zone_local || record.record.zone == self.me.zone;
        let others = self.known.values().filter(|known| known.state != State::Out).filter(of_zone).filter_map(|known| {
            let contact = self.contact_of(known)?;
            let all = [known.record.v4.map(SocketAddr::from), known.record.v6.map(SocketAddr::from)];
            let also = all.into_iter().flatten().find(|other| *other != contact);
            Some(Member { id: known.record.id, contact, also, zone: Arc::clone(&known.record.zone) })
        });
        let own = [self.me.v4.map(SocketAddr::from), self.me.v6.map(SocketAddr::from)];
        let contact = own.into_iter().flatten().next().unwrap_or(super::wire::ANSWERER);
        let also = own[1].filter(|also| *also != contact);
        View::new(others.chain([Member { id: self.me.id, contact, also, zone: Arc::clone(&self.me.zone) }]))
    }

    /// Where a member is asked: where it has answered, else as it says, IPv6 where this machine is reached by it too.
    fn contact_of(&self, known: &Known) -> Option<SocketAddr> {
        let (v4, v6) = (known.record.v4.map(SocketAddr::from), known.record.v6.map(SocketAddr::from));
        let told = if self.me.v6.is_some() { v6.or(v4) } else { v4.or(v6) };
        known.answered.or(told)
    }

    /// Addresses of members, for the next start.
    pub fn contacts(&self) -> Vec<(MemberId, SocketAddr)> {
        let live = self.known.values().filter(|known| known.state != State::Out);
        live.filter_map(|known| Some((known.record.id, self.contact_of(known)?))).collect()
    }

    /// Members after `after` by their ids, as many as fit an answer, and whether no more follow.
    pub fn list(&self, after: &MemberId) -> (Vec<Change>, bool) {
        let mut bytes = 0;
        let mut all = self.known.range((std::ops::Bound::Excluded(*after), std::ops::Bound::Unbounded)).map(|(_, known)| known);
        let mut list = Vec::new();
        for known in all.by_ref().filter(|known| known.state != State::Out) {
            bytes += 54 + known.record.zone.len();
            if bytes > LIST_BYTES_MAX {
                return (list, false);
            }
            list.push(Change { state: known.state, record: self.told(known) });
        }
        (list, true)
    }

    /// All members with this machine itself, as changes.
    pub fn all(&self) -> Vec<Change> {
        let live = self.known.values().filter(|known| known.state != State::Out);
        let me = Change { state: State::Alive, record: self.me.clone() };
        [me].into_iter().chain(live.map(|known| Change { state: known.state, record: self.told(known) })).collect()
    }

    /// A member's record with the address at which it answers this machine.
    fn told(&self, known: &Known) -> Record {
        let mut record = known.record.clone();
        if let Some(at) = known.answered {
            set_contact(&mut record, at);
        }
        record
    }

    /// Takes an address at which a member may be.
    pub fn hint(&mut self, at: SocketAddr, now: Instant) {
        let own = self.me.v4.map(SocketAddr::from) == Some(at) || self.me.v6.map(SocketAddr::from) == Some(at);
        let again = self.hinted.get(&at).is_some_and(|then| now.saturating_duration_since(*then) < HINT_AGAIN_AFTER);
        if own || again || !self.is_near(at.ip()) || self.hints.len() >= HINTS_MAX {
            return;
        }
        if self.hinted.len() >= 4 * HINTS_MAX {
            self.hinted.retain(|_, then| now.saturating_duration_since(*then) < HINT_AGAIN_AFTER);
        }
        if self.hinted.len() < 4 * HINTS_MAX {
            self.hinted.insert(at, now);
            self.hints.push_back(at);
            self.run_hints(now);
        }
    }

    /// Tells anew which prefixes this machine has a link to; without meaning where a key proves who speaks.
    pub fn set_near(&mut self, prefixes: Vec<Near>) {
        if let Some(near) = &mut self.near {
            *near = prefixes;
        }
    }

    /// Without a key: whether it is on one of this machine's links.
    pub fn is_near(&self, ip: IpAddr) -> bool {
        self.near.as_ref().is_none_or(|near| near.iter().any(|prefix| is_in(ip, prefix)))
    }

    /// What a ping to, or an answer for, this address says.
    pub fn ping(&mut self, to: Option<MemberId>) -> Ping {
        let mut changes = Vec::new();
        // What is rumoured of the receiver comes first: only it can contradict.
        let of_receiver = to.and_then(|to| self.known.get(&to)).filter(|known| known.state != State::Alive);
        changes.extend(of_receiver.map(|known| Change { state: known.state, record: known.record.clone() }));
        let mut fresh: Vec<(u32, MemberId)> =
            self.rumours.iter().filter(|(id, _)| Some(**id) != to).map(|(id, rumour)| (rumour.told, *id)).collect();
        let room = CHANGES_MAX - changes.len();
        if fresh.len() > room {
            fresh.select_nth_unstable(room);
        }
        fresh.truncate(room);
        let enough = 3 * (usize::BITS - self.live.leading_zeros() + 1);
        for (told, id) in fresh {
            if id == self.me.id {
                changes.push(Change { state: State::Alive, record: self.me.clone() });
            } else if let Some(known) = self.known.get(&id) {
                changes.push(Change { state: known.state, record: self.told(known) });
            }
            match self.rumours.get_mut(&id) {
                Some(rumour) if told + 1 < enough => rumour.told = told + 1,
                _ => drop(self.rumours.remove(&id)),
            }
        }
        Ping { sender: self.me.clone(), changes }
    }

    /// What a machine says that ends: others need not find out by its silence.
    pub fn farewell(&self) -> Ping {
        Ping { sender: self.me.clone(), changes: vec![Change { state: State::Out, record: self.me.clone() }] }
    }

    /// Takes a ping whose tag was right. Whether it is to be answered.
    pub fn asked(&mut self, from: SocketAddr, ping: &Ping, now: Instant) -> bool {
        if !self.is_near(from.ip()) || ping.sender.id == self.me.id {
            return false;
        }
        let known = self.known.get(&ping.sender.id).filter(|known| known.state == State::Alive);
        match known.filter(|known| known.answered == Some(from)) {
            // Its address is proved already.
            Some(_) => self.met(from, &ping.sender, now),
            None => self.hint(from, now),
        }
        self.changes(&ping.changes, now);
        true
    }

    /// Takes the answer to a ping: who answers is a member.
    pub fn answered(&mut self, from: SocketAddr, ping: &Ping, digest: u64, seen_as: Option<SocketAddr>, now: Instant) {
        if !self.is_near(from.ip()) || ping.sender.id == self.me.id {
            return;
        }
        if let Some(seen) = seen_as.map(|seen| SocketAddr::new(seen.ip(), self.port)) {
            let before = (self.me.v4, self.me.v6);
            set_contact(&mut self.me, seen);
            self.changed |= before != (self.me.v4, self.me.v6);
        }
        self.met(from, &ping.sender, now);
        self.changes(&ping.changes, now);
        let id = ping.sender.id;
        if self.listing.is_none() && !self.listed.contains(&id) && self.known.contains_key(&id) {
            if self.lists_wanted > 0 {
                self.lists_wanted -= 1;
                self.begin_list(id, from, now);
            } else if self.compare {
                self.compare = false;
                if digest != self.digest {
                    self.begin_list(id, from, now);
                }
            }
        }
    }

    fn begin_list(&mut self, member: MemberId, to: SocketAddr, now: Instant) {
        self.listing = Some(Listing { member, to, began: now, live: self.live });
        self.todo.push_back(MembersDo::List { to, member, after: MemberId([0; 20]) });
    }

    /// Takes part of a member's list.
    pub fn listed(&mut self, from: MemberId, members: &[Change], end: bool, now: Instant) {
        let Some(listing) = self.listing.take_if(|listing| listing.member == from) else { return };
        self.changes(members, now);
        match members.last() {
            Some(last) if !end && now.saturating_duration_since(listing.began) < LIST_PATIENCE => {
                self.todo.push_back(MembersDo::List { to: listing.to, member: from, after: last.record.id });
                self.listing = Some(listing);
            }
            _ => {
                self.listed.push(from);
                if self.live > listing.live + CHANGES_MAX {
                    self.compare_interval = COMPARE_INTERVAL_FIRST;
                    self.compare_at = self.compare_at.min(now + COMPARE_INTERVAL_FIRST);
                }
            }
        }
    }

    /// Notes that a list does not come: another member is asked for one.
    pub fn list_failed(&mut self, from: MemberId) {
        if self.listing.take_if(|listing| listing.member == from).is_some() {
            self.lists_wanted = self.lists_wanted.saturating_add(1).min(LISTS_ON_JOINING);
        }
    }

    /// Notes that a member answered anything at all.
    pub fn heard(&mut self, id: MemberId, from: SocketAddr, now: Instant) {
        if let Some(known) = self.known.get_mut(&id).filter(|known| known.answered == Some(from) && known.state == State::Suspect) {
            known.state = State::Alive;
            known.since = now;
        }
    }

    /// Notes that nobody answers at an address, by the rule of retransmission.
    pub fn unreachable(&mut self, member: Option<MemberId>, at: SocketAddr, now: Instant) {
        let Some(id) = member else { return };
        let is_there = |known: &&mut Known| known.state == State::Alive && known.answered.is_none_or(|answered| answered == at);
        if let Some(known) = self.known.get_mut(&id).filter(is_there) {
            known.state = State::Suspect;
            known.since = now;
            self.rumour(id);
        }
    }

    /// A member answered at this address, or asked from the one where it had answered.
    fn met(&mut self, from: SocketAddr, sender: &Record, now: Instant) {
        let mut record = sender.clone();
        set_contact(&mut record, from);
        if !self.is_plausible(record.incarnation, now) {
            return;
        }
        if let Some(known) = self.known.get_mut(&sender.id) {
            if known.state == State::Out && sender.incarnation <= known.record.incarnation {
                // It hears of its death with the next ping, and contradicts.
                return;
            }
            let contact = known.answered.replace(from);
            if sender.incarnation >= known.record.incarnation && known.record != record {
                self.changed = true;
                known.record = record;
            }
            self.changed |= contact != Some(from);
            if known.state != State::Alive {
                let back = known.state == State::Out;
                known.state = State::Alive;
                known.since = now;
                self.changed |= back;
                if back {
                    self.live += 1;
                    self.digest ^= id_digest(&sender.id);
                }
                self.rumour(sender.id);
            }
            return;
        }
        self.insert(record, State::Alive, Some(from), now);
    }

    /// Tells the wall clock anew: it may have been set since the start.
    pub(super) fn set_unix_time(&mut self, now: Instant, unix_s: u64) {
        self.now_s = (now, unix_s);
    }

    fn is_plausible(&self, incarnation: u64, now: Instant) -> bool {
        let now_s = self.now_s.1 + now.saturating_duration_since(self.now_s.0).as_secs();
        incarnation <= now_s.saturating_add(INCARNATION_AHEAD_S_MAX)
    }

    fn insert(&mut self, record: Record, state: State, answered: Option<SocketAddr>, now: Instant) {
        if self.live + 1 >= MEMBERS_MAX || self.known.len() >= 2 * MEMBERS_MAX {
            return;
        }
        let id = record.id;
        self.known.insert(id, Known { record, state, since: now, answered });
        self.live += 1;
        self.digest ^= id_digest(&id);
        self.changed = true;
        // Into the round at a random place, so that it is pinged within one round and a half.
        let at = self.rng.random_range(0..=self.round.len());
        self.round.insert(at, id);
        self.rumour(id);
    }

    fn rumour(&mut self, id: MemberId) {
        if self.near.is_none() && (self.rumours.len() < RUMOURS_MAX || self.rumours.contains_key(&id)) {
            self.rumours.insert(id, Rumour { told: 0 });
        }
    }

    /// Takes what a member tells of others.
    fn changes(&mut self, changes: &[Change], now: Instant) {
        for change in changes {
            let record = &change.record;
            if record.id == self.me.id {
                if change.state != State::Alive && record.incarnation >= self.me.incarnation && self.is_plausible(record.incarnation, now) {
                    self.me.incarnation = record.incarnation + 1;
                    self.rumour(self.me.id);
                }
                continue;
            }
            if self.near.is_some() {
                // Hearsay: it is a member if it answers.
                for at in [record.v4.map(SocketAddr::from), record.v6.map(SocketAddr::from)].into_iter().flatten() {
                    if change.state == State::Alive && !self.known.contains_key(&record.id) {
                        self.hint(at, now);
                    }
                }
            } else if self.is_plausible(record.incarnation, now) {
                self.told_of(change, now);
            }
        }
    }

    fn told_of(&mut self, change: &Change, now: Instant) {
        let record = &change.record;
        let Some(known) = self.known.get_mut(&record.id) else {
            // Who is unknown and gone is of no interest.
            if change.state != State::Out && (record.v4.is_some() || record.v6.is_some()) {
                self.insert(record.clone(), change.state, None, now);
            }
            return;
        };
        let (old, new) = (known.record.incarnation, record.incarnation);
        let wins = match (change.state, known.state) {
            (State::Alive, _) => new > old,
            (State::Suspect, State::Alive) | (State::Out, State::Alive | State::Suspect) => new >= old,
            (State::Suspect, State::Suspect) | (_, State::Out) => new > old,
        };
        if !wins {
            return;
        }
        let (was_out, is_out) = (known.state == State::Out, change.state == State::Out);
        if known.state != change.state {
            known.since = now;
        }
        known.state = change.state;
        if new > old && change.state == State::Alive {
            // Where it has answered is known better than what is told, unless it started again elsewhere.
            let told = [record.v4.map(SocketAddr::from), record.v6.map(SocketAddr::from)];
            known.answered = known.answered.filter(|at| told.contains(&Some(*at)));
            known.record = record.clone();
            self.changed = true;
        } else {
            known.record.incarnation = new;
        }
        if was_out != is_out {
            self.digest ^= id_digest(&record.id);
            self.live = if is_out { self.live - 1 } else { self.live + 1 };
            self.changed = true;
            if !is_out && !self.round.contains(&record.id) {
                self.round.push(record.id);
            }
        }
        self.rumour(record.id);
    }

    /// Acts on the time.
    pub fn tick(&mut self, now: Instant) {
        self.run_hints(now);
        if now >= self.ping_at {
            self.ping_at = now + PING_INTERVAL;
            self.end_suspects(now);
            self.ping_next();
        }
        if now >= self.out_ping_at {
            self.out_ping_at = now + OUT_PING_INTERVAL;
            self.forget_out(now);
            let out: Vec<&Known> = self.known.values().filter(|known| known.state == State::Out).collect();
            if !out.is_empty() {
                let one = out[self.rng.random_range(0..out.len())];
                if let Some(to) = self.contact_of(one) {
                    self.todo.push_back(MembersDo::Ping { to, member: Some(one.record.id) });
                }
            }
        }
        if now >= self.compare_at {
            self.compare_at = now + self.compare_interval;
            self.compare_interval = (self.compare_interval * 2).min(COMPARE_INTERVAL);
            self.compare = true;
            self.listed.clear();
            self.listing.take_if(|listing| now.saturating_duration_since(listing.began) >= LIST_PATIENCE);
        }
    }

    /// When [`Self::tick`] is to be called at the latest.
    pub fn next_timeout(&self) -> Instant {
        let hint = (!self.hints.is_empty()).then_some(self.hint_at);
        let suspect = self.known.values().filter(|known| known.state == State::Suspect).map(|known| known.since + SUSPECT_FOR).min();
        // Who is out is looked for with the pings.
        let suspect = suspect.map(|at| at.max(self.ping_at));
        [hint, suspect, Some(self.ping_at), Some(self.out_ping_at)].into_iter().flatten().min().unwrap_or(self.ping_at)
    }

    /// What to do next; call it until it gives nothing.
    pub fn poll(&mut self) -> Option<MembersDo> {
        self.todo.pop_front()
    }

    fn run_hints(&mut self, now: Instant) {
        while now >= self.hint_at {
            let Some(to) = self.hints.pop_front() else { return };
            self.hint_at =
                self.hint_at.max(now.checked_sub(Duration::from_secs(1)).unwrap_or(now)) + Duration::from_secs(1) / HINTS_PER_SECOND;
            self.todo.push_back(MembersDo::Ping { to, member: None });
        }
    }

    fn ping_next(&mut self) {
        for _ in 0..=self.round.len() {
            let Some(id) = self.round.pop() else { break };
            let Some(known) = self.known.get(&id).filter(|known| known.state != State::Out) else { continue };
            let Some(to) = self.contact_of(known) else { continue };
            self.todo.push_back(MembersDo::Ping { to, member: Some(id) });
            break;
        }
        if self.round.is_empty() {
            self.round = self.known.iter().filter(|(_, known)| known.state != State::Out).map(|(id, _)| *id).collect();
            for at in (1..self.round.len()).rev() {
                let other = self.rng.random_range(0..=at);
                self.round.swap(at, other);
            }
        }
    }

    fn end_suspects(&mut self, now: Instant) {
        let over = |known: &Known| known.state == State::Suspect && now.saturating_duration_since(known.since) >= SUSPECT_FOR;
        let gone: Vec<MemberId> = self.known.iter().filter(|(_, known)| over(known)).map(|(id, _)| *id).collect();
        for id in gone {
            if let Some(known) = self.known.get_mut(&id) {
                known.state = State::Out;
                known.since = now;
                self.live -= 1;
                self.digest ^= id_digest(&id);
                self.changed = true;
                self.rumour(id);
            }
        }
    }

    fn forget_out(&mut self, now: Instant) {
        self.known.retain(|_, known| known.state != State::Out || now.saturating_duration_since(known.since) < OUT_KEPT);
        self.rumours.retain(|id, _| self.known.contains_key(id) || *id == self.me.id);
    }
}

fn set_contact(record: &mut Record, at: SocketAddr) {
    match at {
        SocketAddr::V4(v4) => record.v4 = Some(v4),
        SocketAddr::V6(v6) => record.v6 = Some(v6),
    }
}
