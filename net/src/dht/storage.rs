//! What this node keeps for others: contacts by key, small items, statements.
//!
//! Everything has a limit of its own and one in all, so that no sender, prefix or key can take the place of the others:
//! [`Limits`] names them. What is past its time is not given out, and goes within [`SWEEP`] of it. Nothing is written to
//! disk: announcers come again.

use super::address::{Family, Prefix};
use crate::krpc::{Id, Statement};
use rand::RngExt as _;
use rand::rngs::StdRng;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a contact announced by a poolfs node is kept; it comes again after 2 h.
pub const CONTACT_LIFE_POOLFS: Duration = Duration::from_secs(150 * 60);

/// How long any other node's contact is kept, as libtorrent does.
pub const CONTACT_LIFE_OTHER: Duration = Duration::from_secs(45 * 60);

/// How long a BEP 44 item is kept after its last `put`.
pub const ITEM_LIFE: Duration = Duration::from_secs(2 * 3600);

/// Every key is looked at once in this time, and what is past its time is thrown away.
pub const SWEEP: Duration = Duration::from_secs(60);

/// Quotas. The defaults are what a node uses; tests and the simulator lower or raise them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Contacts in all.
    pub contacts_max: usize,
    /// Bytes of `pv` in all, each contact's counted.
    pub pv_bytes_max: usize,
    /// Contacts of one key and family; past it a random sample stays.
    pub contacts_per_key_max: usize,
    /// Ports of one address under one key.
    pub ports_max: usize,
    /// Contacts of one address under all keys.
    pub contacts_per_address_max: usize,
    /// Contacts of one /24 or /48: 5 % of all.
    pub contacts_per_prefix_max: usize,
    /// BEP 44 items.
    pub items_max: usize,
    /// BEP 44 items put by one address.
    pub items_per_address_max: usize,
    /// Statements in all.
    pub statements_max: usize,
    /// Statements about one node.
    pub statements_per_subject_max: usize,
    /// Statements sent by one address.
    pub statements_per_address_max: usize,
    /// How long a contact announced by a poolfs node is kept.
    pub contact_life_poolfs: Duration,
    /// How long any other contact is kept.
    pub contact_life_other: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            contacts_max: 200_000,
            pv_bytes_max: 32 << 20,
            contacts_per_key_max: 200,
            ports_max: 4,
            contacts_per_address_max: 8_192,
            contacts_per_prefix_max: 10_000,
            items_max: 4_096,
            items_per_address_max: 256,
            statements_max: 4_096,
            statements_per_subject_max: 32,
            statements_per_address_max: 64,
            contact_life_poolfs: CONTACT_LIFE_POOLFS,
            contact_life_other: CONTACT_LIFE_OTHER,
        }
    }
}

/// What became of something that was to be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// It is kept, or was already.
    Yes,
    /// The key's contacts are a random sample now, and this one was not drawn.
    NotDrawn,
    /// A limit is reached.
    Full,
}

/// A contact as it is given out.
#[derive(Debug, Clone)]
pub struct Contact {
    /// Where pieces are served.
    pub addr: SocketAddr,
    /// Canonical `pv`; `None` if it came without a valid one.
    pub pv: Option<Arc<[u8]>>,
    expires: Instant,
}

#[derive(Debug, Default)]
struct Holders {
    contacts: [Vec<Contact>; 2],
    /// New contacts that came while a family was full: what a fair draw needs to know.
    passed_over: [u32; 2],
}

#[derive(Debug)]
struct Item {
    value: Vec<u8>,
    from: IpAddr,
    expires: Instant,
}

#[derive(Debug)]
struct Spoken {
    bytes: Vec<u8>,
    statement: Statement,
    from: IpAddr,
}

/// See the module.
#[derive(Debug)]
pub struct Store {
    limits: Limits,
    keys: BTreeMap<Id, Holders>,
    contacts: usize,
    pv_bytes: usize,
    by_address: HashMap<IpAddr, u32>,
    by_prefix: HashMap<Prefix, u32>,
    items: BTreeMap<Id, Item>,
    items_by_address: HashMap<IpAddr, u32>,
    statements: BTreeMap<Id, Vec<Spoken>>,
    statements_count: usize,
    statements_by_address: HashMap<IpAddr, u32>,
    swept: Option<Id>,
    swept_at: Instant,
}

fn count<K: std::hash::Hash + Eq>(map: &HashMap<K, u32>, key: &K) -> usize {
    map.get(key).map_or(0, |n| *n as usize)
}

fn less<K: std::hash::Hash + Eq>(map: &mut HashMap<K, u32>, key: &K) {
    if let Some(n) = map.get_mut(key) {
        *n -= 1;
        if *n == 0 {
            map.remove(key);
        }
    }
}

impl Store {
    /// An empty one.
    pub fn new(limits: Limits, now: Instant) -> Self {
        Self {
            limits,
            keys: BTreeMap::new(),
            contacts: 0,
            pv_bytes: 0,
            by_address: HashMap::new(),
            by_prefix: HashMap::new(),
            items: BTreeMap::new(),
            items_by_address: HashMap::new(),
            statements: BTreeMap::new(),
            statements_count: 0,
            statements_by_address: HashMap::new(),
            swept: None,
            swept_at: now,
        }
    }

    /// Keeps a contact under a key until `now + life`.
    pub fn announce(&mut self, key: Id, addr: SocketAddr, pv: Option<Arc<[u8]>>, life: Duration, now: Instant, rng: &mut StdRng) -> Kept {
        let family = Family::of(addr) as usize;
        let limits = self.limits;
        // A `pv` that does not fit is left out; the contact is worth keeping without.
        let pv = pv.filter(|pv| self.pv_bytes + pv.len() <= limits.pv_bytes_max);
        if let Some(known) = self.keys.get_mut(&key).and_then(|h| h.contacts[family].iter_mut().find(|c| c.addr == addr)) {
            self.pv_bytes -= known.pv.as_ref().map_or(0, |pv| pv.len());
            self.pv_bytes += pv.as_ref().map_or(0, |pv| pv.len());
            known.pv = pv;
            known.expires = now + life;
            return Kept::Yes;
        }
        let ip = addr.ip();
        if self.contacts >= limits.contacts_max
            || count(&self.by_address, &ip) >= limits.contacts_per_address_max
            || count(&self.by_prefix, &Prefix::of(ip)) >= limits.contacts_per_prefix_max
        {
            return Kept::Full;
        }
        let holders = self.keys.entry(key).or_default();
        let contacts = &mut holders.contacts[family];
        if contacts.iter().filter(|c| c.addr.ip() == ip).count() >= limits.ports_max {
            return Kept::Full;
        }
        if contacts.len() >= limits.contacts_per_key_max {
            holders.passed_over[family] = holders.passed_over[family].saturating_add(1);
            let seen = contacts.len() + holders.passed_over[family] as usize;
            let drawn = rng.random_range(0..seen);
            if drawn >= contacts.len() {
                return Kept::NotDrawn;
            }
            let gone = contacts.swap_remove(drawn);
            self.forget_counts(&gone);
        }
        self.contacts += 1;
        self.pv_bytes += pv.as_ref().map_or(0, |pv| pv.len());
        *self.by_address.entry(ip).or_default() += 1;
        *self.by_prefix.entry(Prefix::of(ip)).or_default() += 1;
        let holders = self.keys.entry(key).or_default();
        holders.contacts[family].push(Contact { addr, pv, expires: now + life });
        Kept::Yes
    }

    fn forget_counts(&mut self, gone: &Contact) {
        self.contacts -= 1;
        self.pv_bytes -= gone.pv.as_ref().map_or(0, |pv| pv.len());
        less(&mut self.by_address, &gone.addr.ip());
        less(&mut self.by_prefix, &Prefix::of(gone.addr.ip()));
    }

    /// Forgets the contact of a sender that withdraws: the one at its very address, else its only one.
    pub fn withdraw(&mut self, key: &Id, from: SocketAddr) {
        let family = Family::of(from) as usize;
        let Some(holders) = self.keys.get_mut(key) else { return };
        let contacts = &mut holders.contacts[family];
        let mut same_ip = contacts.iter().enumerate().filter(|(_, c)| c.addr.ip() == from.ip());
        let at = match contacts.iter().position(|c| c.addr == from) {
            Some(at) => at,
            None => match (same_ip.next(), same_ip.next()) {
                (Some((at, _)), None) => at,
                _ => return,
            },
        };
        let gone = contacts.swap_remove(at);
        if holders.contacts.iter().all(Vec::is_empty) {
            self.keys.remove(key);
        }
        self.forget_counts(&gone);
    }

    /// At most `count_max` of the key's contacts of one family, drawn at random.
    pub fn sample(&self, key: &Id, family: Family, count_max: usize, now: Instant, rng: &mut StdRng) -> Vec<&Contact> {
        let Some(holders) = self.keys.get(key) else { return Vec::new() };
        let mut live: Vec<&Contact> = holders.contacts[family as usize].iter().filter(|c| c.expires > now).collect();
        let take = count_max.min(live.len());
        for at in 0..take {
            let other = rng.random_range(at..live.len());
            live.swap(at, other);
        }
        live.truncate(take);
        live
    }

    /// Whether anybody is known to have the key.
    pub fn has_contacts(&self, key: &Id, family: Family, now: Instant) -> bool {
        self.keys.get(key).is_some_and(|h| h.contacts[family as usize].iter().any(|c| c.expires > now))
    }

    /// Keeps a BEP 44 item; the caller has checked that `target` is its hash. A full store gives up the item farthest from
    /// `own`, if that is farther than this one.
    pub fn put(&mut self, target: Id, value: &[u8], from: IpAddr, own: &Id, now: Instant) -> Kept {
        if let Some(item) = self.items.get_mut(&target) {
            item.expires = now + ITEM_LIFE;
            return Kept::Yes;
        }
        if count(&self.items_by_address, &from) >= self.limits.items_per_address_max {
            return Kept::Full;
        }
        if self.items.len() >= self.limits.items_max {
            let farthest = self.items.keys().copied().max_by_key(|id| id.distance(own));
            match farthest {
                Some(far) if far.distance(own) > target.distance(own) => self.remove_item(&far),
                _ => return Kept::Full,
            }
        }
        *self.items_by_address.entry(from).or_default() += 1;
        self.items.insert(target, Item { value: value.to_vec(), from, expires: now + ITEM_LIFE });
        Kept::Yes
    }

    fn remove_item(&mut self, target: &Id) {
        if let Some(gone) = self.items.remove(target) {
            less(&mut self.items_by_address, &gone.from);
        }
    }

    /// The item whose hash is `target`, bencoded.
    pub fn item(&self, target: &Id, now: Instant) -> Option<&[u8]> {
        self.items.get(target).filter(|item| item.expires > now).map(|item| item.value.as_slice())
    }

    /// Keeps a checked statement at `place`. One speaker has one place there, for its newest.
    pub fn speak(&mut self, place: Id, bytes: &[u8], statement: Statement, from: IpAddr) -> Kept {
        let limits = self.limits;
        let here = self.statements.entry(place).or_default();
        if let Some(same) = here.iter_mut().find(|s| s.statement.speaker == statement.speaker) {
            if same.statement.time_s < statement.time_s {
                less(&mut self.statements_by_address, &same.from);
                *self.statements_by_address.entry(from).or_default() += 1;
                *same = Spoken { bytes: bytes.to_vec(), statement, from };
            }
            return Kept::Yes;
        }
        if here.len() >= limits.statements_per_subject_max
            || self.statements_count >= limits.statements_max
            || count(&self.statements_by_address, &from) >= limits.statements_per_address_max
        {
            if here.is_empty() {
                self.statements.remove(&place);
            }
            return Kept::Full;
        }
        *self.statements_by_address.entry(from).or_default() += 1;
        self.statements_count += 1;
        here.push(Spoken { bytes: bytes.to_vec(), statement, from });
        Kept::Yes
    }

    /// At most `count_max` statements kept at `place` that are not void at `now_s` (seconds since 1970), drawn at random.
    pub fn statements(&self, place: &Id, count_max: usize, now_s: u64, rng: &mut StdRng) -> Vec<Vec<u8>> {
        let Some(here) = self.statements.get(place) else { return Vec::new() };
        let mut live: Vec<&Spoken> = here.iter().filter(|s| !s.is_void(now_s)).collect();
        let take = count_max.min(live.len());
        for at in 0..take {
            let other = rng.random_range(at..live.len());
            live.swap(at, other);
        }
        live.into_iter().take(take).map(|s| s.bytes.clone()).collect()
    }

    /// Contacts in all.
    pub fn contacts(&self) -> usize {
        self.contacts
    }

    /// Keys with a contact.
    pub fn keys(&self) -> usize {
        self.keys.len()
    }

    /// Bytes of `pv` in all.
    pub fn pv_bytes(&self) -> usize {
        self.pv_bytes
    }

    /// BEP 44 items.
    pub fn items(&self) -> usize {
        self.items.len()
    }

    /// Statements.
    pub fn statements_count(&self) -> usize {
        self.statements_count
    }

    /// Throws away what is past its time, a share of the keys at each call, all of them in [`SWEEP`].
    pub fn sweep(&mut self, now: Instant, now_s: u64) {
        let since = now.saturating_duration_since(self.swept_at);
        if since < Duration::from_secs(1) {
            return;
        }
        self.swept_at = now;
        let share = (since.as_secs_f64() / SWEEP.as_secs_f64()).min(1.0);
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a share of a bounded length"
        )]
        let keys_max = (self.keys.len() as f64 * share).ceil() as usize;
        let from = self.swept.map_or(Bound::Unbounded, Bound::Excluded);
        let part: Vec<Id> = self.keys.range((from, Bound::Unbounded)).take(keys_max).map(|(key, _)| *key).collect();
        self.swept = if part.len() < keys_max { None } else { part.last().copied() };
        for key in part {
            let Some(mut holders) = self.keys.remove(&key) else { continue };
            for family in 0..2 {
                let (live, gone): (Vec<Contact>, Vec<Contact>) =
                    std::mem::take(&mut holders.contacts[family]).into_iter().partition(|c| c.expires > now);
                gone.iter().for_each(|contact| self.forget_counts(contact));
                if live.len() < self.limits.contacts_per_key_max {
                    holders.passed_over[family] = 0;
                }
                holders.contacts[family] = live;
            }
            if holders.contacts.iter().any(|c| !c.is_empty()) {
                self.keys.insert(key, holders);
            }
        }
        let items: Vec<Id> = self.items.iter().filter(|(_, item)| item.expires <= now).map(|(target, _)| *target).collect();
        items.iter().for_each(|target| self.remove_item(target));
        let (count, by_address) = (&mut self.statements_count, &mut self.statements_by_address);
        self.statements.retain(|_, here| {
            here.retain(|spoken| {
                if spoken.is_void(now_s) {
                    *count -= 1;
                    less(by_address, &spoken.from);
                }
                !spoken.is_void(now_s)
            });
            !here.is_empty()
        });
    }
}

impl Spoken {
    fn is_void(&self, now_s: u64) -> bool {
        self.statement.time_s.saturating_add(crate::krpc::STATEMENT_AGE_MAX_S) < now_s
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use rand::SeedableRng as _;
    use std::net::Ipv4Addr;

    fn key(n: u32) -> Id {
        let mut id = [0; 20];
        id[..4].copy_from_slice(&n.wrapping_mul(0x9e37_79b9).to_be_bytes());
        id[4..8].copy_from_slice(&n.to_be_bytes());
        Id(id)
    }

    fn at(n: u32, port: u16) -> SocketAddr {
        SocketAddr::new(Ipv4Addr::from(n).into(), port)
    }

    fn store(limits: Limits) -> (Store, StdRng, Instant) {
        let now = Instant::now();
        (Store::new(limits, now), StdRng::seed_from_u64(1), now)
    }

    const LIFE: Duration = CONTACT_LIFE_POOLFS;

    /// Each quota of the real limits is reached and not passed: a flood by one sender must leave room for the others.
    #[test]
    fn quotas_hold() {
        let limits = Limits::default();
        let (mut s, mut rng, now) = store(limits);
        // One address, 100,000 keys.
        let kept = (0..100_000).filter(|n| s.announce(key(*n), at(0x0101_0101, 2000), None, LIFE, now, &mut rng) == Kept::Yes).count();
        assert_eq!((kept, s.contacts()), (limits.contacts_per_address_max, limits.contacts_per_address_max));
        // Its /24 in full: 5 % of the store.
        for host in 0..=255 {
            for n in 0..8_192 {
                s.announce(key(n), at(0x0101_0100 + host, 2000), None, LIFE, now, &mut rng);
            }
        }
        assert_eq!(s.contacts(), limits.contacts_per_prefix_max);
        // One key, 10,000 contacts of as many prefixes: a random sample of 200.
        let hot = key(1_000_000);
        for n in 0..10_000 {
            s.announce(hot, at(0x0200_0000 + n * 256, 2000), None, LIFE, now, &mut rng);
        }
        let all = s.sample(&hot, Family::V4, 1_000, now, &mut rng);
        assert_eq!(all.len(), limits.contacts_per_key_max);
        let early = all.iter().filter(|c| c.addr < at(0x0200_0000 + 5_000 * 256, 0)).count();
        assert!((60..140).contains(&early), "a sample of all comers, {early} of 200 from their first half");
        // Four ports of one address under one key.
        let ports = (0..10).filter(|n| s.announce(key(7), at(0x0909_0909, 3000 + n), None, LIFE, now, &mut rng) == Kept::Yes).count();
        assert_eq!(ports, limits.ports_max);
        // The whole store.
        let (mut s, mut rng, now) = store(limits);
        let mut full = 0;
        for n in 0..210_000 {
            full += usize::from(s.announce(key(n % 30_000), at(n * 131, 2000), None, LIFE, now, &mut rng) == Kept::Full);
        }
        assert_eq!((s.contacts(), full), (limits.contacts_max, 10_000));
    }

    /// Past the budget for `pv` the contact is kept and the `pv` is not; renewing and leaving give the bytes back.
    #[test]
    fn pv_budget() {
        let (mut s, mut rng, now) = store(Limits { pv_bytes_max: 100, ..Limits::default() });
        let pv = || Some(Arc::from(vec![1_u8; 46]));
        for n in 0..3 {
            assert_eq!(s.announce(key(n), at(n + 1, 2000), pv(), LIFE, now, &mut rng), Kept::Yes);
        }
        assert_eq!((s.contacts(), s.pv_bytes()), (3, 92));
        assert!(s.sample(&key(2), Family::V4, 9, now, &mut rng)[0].pv.is_none());
        s.announce(key(0), at(1, 2000), None, LIFE, now, &mut rng);
        assert_eq!(s.pv_bytes(), 46);
        s.withdraw(&key(1), at(2, 2000));
        assert_eq!((s.contacts(), s.pv_bytes(), s.keys()), (2, 0, 2));
        // The 32 MiB of the real limit.
        let (mut s, mut rng, now) = store(Limits::default());
        let pv: Arc<[u8]> = Arc::from(vec![1_u8; 512]);
        for n in 0..70_000 {
            assert_eq!(s.announce(key(n), at(n * 256, 2000), Some(pv.clone()), LIFE, now, &mut rng), Kept::Yes);
        }
        assert_eq!((s.contacts(), s.pv_bytes()), (70_000, 32 << 20));
    }

    /// A withdrawal from a site of two machines takes only the sender's own contact.
    #[test]
    fn withdraws_its_own() {
        let (mut s, mut rng, now) = store(Limits::default());
        s.announce(key(1), at(1, 2000), None, LIFE, now, &mut rng);
        s.announce(key(1), at(1, 2001), None, LIFE, now, &mut rng);
        s.withdraw(&key(1), at(1, 5555));
        assert_eq!(s.contacts(), 2);
        s.withdraw(&key(1), at(1, 2001));
        assert_eq!(s.sample(&key(1), Family::V4, 9, now, &mut rng)[0].addr, at(1, 2000));
        s.withdraw(&key(1), at(1, 5555));
        assert_eq!((s.contacts(), s.keys(), s.by_address.len(), s.by_prefix.len()), (0, 0, 0, 0));
    }

    /// Contacts are not given out past their time, and the sweep takes back all memory of them.
    #[test]
    fn expires() {
        let (mut s, mut rng, now) = store(Limits::default());
        for n in 0..1_000 {
            s.announce(
                key(n),
                at(n * 256 + 1, 2000),
                Some(Arc::from(vec![0; 46])),
                if n % 2 == 0 { CONTACT_LIFE_OTHER } else { LIFE },
                now,
                &mut rng,
            );
        }
        let end = now + CONTACT_LIFE_OTHER;
        assert!(s.has_contacts(&key(0), Family::V4, end - Duration::from_secs(1)) && !s.has_contacts(&key(0), Family::V4, end));
        (0..=SWEEP.as_secs() + 1).for_each(|s_| s.sweep(end + Duration::from_secs(s_), 0));
        assert_eq!((s.contacts(), s.keys(), s.pv_bytes()), (500, 500, 500 * 46));
        (0..=SWEEP.as_secs() + 1).for_each(|s_| s.sweep(now + LIFE + Duration::from_secs(s_), 0));
        assert_eq!((s.contacts(), s.keys(), s.pv_bytes(), s.by_address.len(), s.by_prefix.len()), (0, 0, 0, 0, 0));
    }

    /// Items: the farthest gives way, one address has a share, and they expire.
    #[test]
    fn items() {
        let limits = Limits { items_max: 300, ..Limits::default() };
        let (mut s, _, now) = store(limits);
        let own = Id([0; 20]);
        let one: IpAddr = at(1, 1).ip();
        let kept = (0..1_000).filter(|n| s.put(key(*n), b"1:x", one, &own, now) == Kept::Yes).count();
        assert_eq!(kept, limits.items_per_address_max);
        let (mut s, _, now) = store(limits);
        for n in 0..1_000 {
            s.put(key(n), b"1:x", at(n, 1).ip(), &own, now);
        }
        assert_eq!((s.items(), s.items_by_address.len()), (300, 300));
        let mut keys: Vec<Id> = (0..1_000).map(key).collect();
        keys.sort_unstable();
        assert!(keys[..300].iter().all(|key| s.item(key, now).is_some()) && s.item(&keys[300], now).is_none());
        assert!(s.item(&keys[0], now + ITEM_LIFE).is_none());
        s.sweep(now + ITEM_LIFE, 0);
        assert_eq!((s.items(), s.items_by_address.len()), (0, 0));
    }

    /// Statements: one for each speaker, the newest; bounded for each subject, sender and in all; void after 30 days.
    #[test]
    fn statements() {
        let (mut s, mut rng, now) = store(Limits { statements_max: 100, ..Limits::default() });
        let spoken = |speaker: u8, time_s| Statement {
            kind: crate::krpc::statement::Kind::FalseList,
            piece: 0,
            size: 0,
            proof_at: at(1, 2000),
            subject: [0; 32],
            speaker: [speaker; 32],
            digest: [0; 32],
            proof: [0; 32],
            time_s,
        };
        let ip = |n: u32| at(n, 1).ip();
        let kept = (0..200).filter(|n| s.speak(key(1), &[*n], spoken(*n, 1_000), ip(u32::from(*n))) == Kept::Yes).count();
        assert_eq!(kept, s.limits.statements_per_subject_max);
        assert_eq!(s.speak(key(1), &[99], spoken(0, 1_001), ip(0)), Kept::Yes);
        assert_eq!(s.speak(key(1), &[98], spoken(0, 999), ip(0)), Kept::Yes);
        let all = s.statements(&key(1), 99, 1_001, &mut rng);
        assert!(all.contains(&vec![99]) && !all.contains(&vec![98]) && all.len() == kept);
        let more = (0..100).filter(|n| s.speak(key(2 + n), &[1], spoken(1, 1_000), ip(77)) == Kept::Yes).count();
        assert_eq!(more, s.limits.statements_per_address_max);
        let more = (0..100).filter(|n| s.speak(key(200 + n), &[1], spoken(1, 1_000), ip(1_000 + n)) == Kept::Yes).count();
        assert_eq!((more, s.statements_count()), (100 - 32 - 64, 100));
        let late = 1_000 + crate::krpc::STATEMENT_AGE_MAX_S + 1;
        assert_eq!(s.statements(&key(1), 99, late, &mut rng), vec![vec![99]]);
        s.sweep(now + SWEEP, late + 1);
        assert_eq!((s.statements_count(), s.statements.len(), s.statements_by_address.len()), (0, 0, 0));
    }
}
