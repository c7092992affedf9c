//! The routing table of one family (BEP 5, "Routing Table").
//!
//! Buckets by common bits with the own id; only the last, which holds the own id, is ever split. Only nodes that answered
//! are in it. A node is good while it answered or asked within [`QUESTIONABLE_AFTER`], bad after [`FAILURES_MAX`] queries
//! in a row to which it was unreachable; a bad one goes when another is there to take its place.

use super::address::{Network, Prefix};
use crate::krpc::{Distance, ID_BITS, Id, NodeInfo};
use std::time::{Duration, Instant};

/// Nodes in a bucket, and in an answer.
pub const K: usize = 8;

/// Nodes that wait for a place in a bucket.
pub const REPLACEMENTS_MAX: usize = K;

/// Silence after which a node is questionable.
pub const QUESTIONABLE_AFTER: Duration = Duration::from_secs(15 * 60);

/// Unreachable this often in a row: bad.
pub const FAILURES_MAX: u8 = 2;

/// A node that answered.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Id and address.
    pub info: NodeInfo,
    /// When it last answered or asked.
    pub seen: Instant,
    /// When it was last asked to show that it lives.
    pub checked: Instant,
    /// Times unreachable in a row.
    pub failures: u8,
    /// Whether it is a poolfs node.
    pub poolfs: bool,
}

impl Entry {
    /// BEP 5's good: heard of lately, and not failing.
    pub fn is_good(&self, now: Instant) -> bool {
        self.failures == 0 && now.saturating_duration_since(self.seen) < QUESTIONABLE_AFTER
    }
}

#[derive(Debug, Default)]
struct KBucket {
    nodes: Vec<Entry>,
    replacements: Vec<Entry>,
}

/// What became of a node that was offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offered {
    /// It is in the table.
    Kept,
    /// The bucket is full; it waits. Asking the questionable node named here may make room.
    Waits(Option<NodeInfo>),
    /// Not taken: a rule is against it.
    Refused,
}

/// See the module.
#[derive(Debug)]
pub struct Table {
    own: Id,
    network: Network,
    buckets: Vec<KBucket>,
}

impl Table {
    /// An empty table around `own`.
    pub fn new(own: Id, network: Network) -> Self {
        Self { own, network, buckets: vec![KBucket::default()] }
    }

    fn bucket_of(&self, id: &Id) -> usize {
        self.own.common_bits(id).min(self.buckets.len() - 1)
    }

    /// Nodes in all buckets.
    pub fn len(&self) -> usize {
        self.buckets.iter().map(|b| b.nodes.len()).sum()
    }

    /// Whether it has no node.
    pub fn is_empty(&self) -> bool {
        self.buckets.iter().all(|b| b.nodes.is_empty())
    }

    /// Number of buckets, for the status.
    pub fn buckets(&self) -> usize {
        self.buckets.len()
    }

    /// All nodes, farthest bucket first.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.buckets.iter().flat_map(|b| &b.nodes)
    }

    /// The node at this id and address.
    pub fn get(&self, info: &NodeInfo) -> Option<&Entry> {
        self.buckets[self.bucket_of(&info.id)].nodes.iter().find(|e| e.info == *info)
    }

    /// Whether a node of this id would find a place now: so whether it is worth a ping.
    pub fn has_room_for(&self, info: &NodeInfo, now: Instant) -> bool {
        if info.id == self.own || self.get(info).is_some() {
            return false;
        }
        let bucket = &self.buckets[self.bucket_of(&info.id)];
        let splits = self.bucket_of(&info.id) == self.buckets.len() - 1 && self.buckets.len() < ID_BITS;
        bucket.nodes.len() < K || splits || bucket.nodes.iter().any(|e| !e.is_good(now))
    }

    /// Takes a node that answered just now.
    pub fn answered(&mut self, info: NodeInfo, poolfs: bool, now: Instant) -> Offered {
        if info.id == self.own {
            return Offered::Refused;
        }
        let place = self.bucket_of(&info.id);
        if let Some(entry) = self.buckets[place].nodes.iter_mut().find(|e| e.info == info) {
            *entry = Entry { info, seen: now, checked: now, failures: 0, poolfs };
            return Offered::Kept;
        }
        // One id at two addresses or two ids at one address: who is there first stays while it answers.
        let twin = |e: &Entry| e.info.id == info.id || e.info.addr == info.addr;
        if let Some(other) = self.buckets.iter_mut().flat_map(|b| &mut b.nodes).find(|e| twin(e)) {
            if other.failures == 0 && now.saturating_duration_since(other.seen) < QUESTIONABLE_AFTER {
                return Offered::Refused;
            }
            let (id, addr) = (other.info.id, other.info.addr);
            self.remove(&NodeInfo { id, addr });
        }
        if self.network == Network::Public {
            let prefix = Prefix::of(info.addr.ip());
            if self.buckets[place].nodes.iter().any(|e| Prefix::of(e.info.addr.ip()) == prefix) {
                return Offered::Refused;
            }
        }
        self.insert(Entry { info, seen: now, checked: now, failures: 0, poolfs }, now)
    }

    fn insert(&mut self, entry: Entry, now: Instant) -> Offered {
        loop {
            let place = self.bucket_of(&entry.info.id);
            let last = place == self.buckets.len() - 1;
            let (network, splits) = (self.network, last && self.buckets.len() < ID_BITS);
            let bucket = &mut self.buckets[place];
            if bucket.nodes.len() < K {
                bucket.nodes.push(entry);
                return Offered::Kept;
            }
            if let Some(bad) = bucket.nodes.iter_mut().find(|e| e.failures >= FAILURES_MAX) {
                *bad = entry;
                return Offered::Kept;
            }
            if splits {
                self.split();
                continue;
            }
            // BEP 42: an id that fits its address goes before one that was chosen freely.
            let fits = |e: &Entry| e.info.id.fits_address(e.info.addr.ip());
            if network == Network::Public
                && fits(&entry)
                && let Some(free) = bucket.nodes.iter_mut().find(|e| !fits(e))
            {
                *free = entry;
                return Offered::Kept;
            }
            bucket.replacements.retain(|e| e.info.addr != entry.info.addr);
            if bucket.replacements.len() == REPLACEMENTS_MAX {
                bucket.replacements.remove(0);
            }
            bucket.replacements.push(entry);
            let oldest = bucket.nodes.iter().filter(|e| !e.is_good(now)).min_by_key(|e| e.seen);
            return Offered::Waits(oldest.map(|e| e.info));
        }
    }

    fn split(&mut self) {
        let depth = self.buckets.len() - 1;
        let old = std::mem::take(&mut self.buckets[depth]);
        self.buckets.push(KBucket::default());
        for entry in old.nodes {
            let place = self.bucket_of(&entry.info.id);
            self.buckets[place].nodes.push(entry);
        }
        for entry in old.replacements {
            let place = self.bucket_of(&entry.info.id);
            self.buckets[place].replacements.push(entry);
        }
    }

    /// Notes that a known node asked something: it lives, though it has not shown that it can be reached.
    pub fn asked(&mut self, info: &NodeInfo, now: Instant) {
        let place = self.bucket_of(&info.id);
        if let Some(entry) = self.buckets[place].nodes.iter_mut().find(|e| e.info == *info && e.failures == 0) {
            entry.seen = now;
        }
    }

    /// Notes that a node was unreachable; a bad one gives way to the newest that waits.
    pub fn failed(&mut self, info: &NodeInfo) {
        let place = self.bucket_of(&info.id);
        let bucket = &mut self.buckets[place];
        bucket.replacements.retain(|e| e.info != *info);
        if let Some(at) = bucket.nodes.iter().position(|e| e.info == *info) {
            let entry = &mut bucket.nodes[at];
            entry.failures = entry.failures.saturating_add(1);
            if let Some(next) = bucket.replacements.pop() {
                bucket.nodes[at] = next;
            } else if entry.failures >= FAILURES_MAX && bucket.nodes.len() > 1 {
                bucket.nodes.swap_remove(at);
            }
        }
    }

    fn remove(&mut self, info: &NodeInfo) {
        let place = self.bucket_of(&info.id);
        self.buckets[place].nodes.retain(|e| e.info != *info);
    }

    /// The `count` nodes closest to `target` that are not bad, closest first.
    pub fn closest(&self, target: &Id, count: usize) -> Vec<Entry> {
        let mut all: Vec<(Distance, &Entry)> = Vec::with_capacity(count * 2);
        let usable = |e: &&Entry| e.failures < FAILURES_MAX;
        // Buckets in the order of their distance to the target: the target's own, then those beyond, then those before.
        let home = self.bucket_of(target);
        for bucket in std::iter::once(home).chain(home + 1..self.buckets.len()) {
            all.extend(self.buckets[bucket].nodes.iter().filter(usable).map(|e| (e.info.id.distance(target), e)));
        }
        for bucket in (0..home).rev() {
            if all.len() >= count {
                break;
            }
            all.extend(self.buckets[bucket].nodes.iter().filter(usable).map(|e| (e.info.id.distance(target), e)));
        }
        all.sort_unstable_by_key(|(distance, _)| *distance);
        all.truncate(count);
        all.into_iter().map(|(_, e)| *e).collect()
    }

    /// Known nodes that are closer to `key` than the own id is, counted up to `limit`.
    pub fn closer_than_own(&self, key: &Id, limit: usize) -> usize {
        let own = self.own.distance(key);
        self.entries().filter(|e| e.failures == 0 && e.info.id.distance(key) < own).take(limit).count()
    }

    /// The node that has been silent and unchecked longest, if it is time to ask it, and marks it as checked.
    pub fn to_check(&mut self, now: Instant) -> Option<NodeInfo> {
        let due = |at: Instant| now.saturating_duration_since(at) >= QUESTIONABLE_AFTER;
        let entry = self.buckets.iter_mut().flat_map(|b| &mut b.nodes).filter(|e| due(e.seen) && due(e.checked)).min_by_key(|e| e.seen)?;
        entry.checked = now;
        Some(entry.info)
    }

    /// The same nodes around another own id.
    pub fn rebuild(&mut self, own: Id, now: Instant) {
        let old = std::mem::replace(self, Self::new(own, self.network));
        for entry in old.buckets.into_iter().flat_map(|b| b.nodes) {
            if entry.info.id != own {
                self.insert(entry, now);
            }
        }
    }

    /// Index of a bucket with fewer than [`K`] nodes, the one after `after`; round and round. What a refresh walks into.
    pub fn thin_bucket(&self, after: usize) -> Option<usize> {
        let count = self.buckets.len();
        (1..=count).map(|step| (after + step) % count).find(|b| self.buckets[*b].nodes.len() < K)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::net::{Ipv4Addr, SocketAddr};

    fn id(n: u64) -> Id {
        let mut id = [0; 20];
        id[..8].copy_from_slice(&n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
        Id(id)
    }

    fn node(n: u32) -> NodeInfo {
        NodeInfo { id: id(u64::from(n)), addr: SocketAddr::new(Ipv4Addr::from(0x0800_0000 + n * 256).into(), 9977) }
    }

    /// However many nodes answer, buckets hold K, and the closest ones are exactly those of a full sort.
    #[test]
    fn bounded_and_closest() {
        let now = Instant::now();
        let mut table = Table::new(id(0), Network::Private);
        for n in 1..20_000 {
            table.answered(node(n), true, now);
        }
        assert!(table.buckets.iter().all(|b| b.nodes.len() <= K && b.replacements.len() <= REPLACEMENTS_MAX));
        assert!((80..200).contains(&table.len()), "{}", table.len());
        for target in (0..200).map(|n| id(n * 77 + 5)) {
            let mut all: Vec<Id> = table.entries().map(|e| e.info.id).collect();
            all.sort_by_key(|id| id.distance(&target));
            let got: Vec<Id> = table.closest(&target, K).iter().map(|e| e.info.id).collect();
            assert_eq!(got, all[..K], "{target}");
        }
    }

    /// A failing node is replaced by one that waits, and a full bucket names whom to ask.
    #[test]
    fn replaces_the_failing() {
        let now = Instant::now();
        let mut table = Table::new(Id([0; 20]), Network::Private);
        let far = |n: u8| {
            let mut id = [0x80; 20];
            id[19] = n;
            NodeInfo { id: Id(id), addr: SocketAddr::new(Ipv4Addr::new(8, 8, n, 1).into(), 9977) }
        };
        for n in 0..8 {
            assert_eq!(table.answered(far(n), false, now), Offered::Kept);
        }
        assert_eq!(table.answered(far(8), false, now), Offered::Waits(None));
        let later = now + QUESTIONABLE_AFTER;
        assert_eq!(table.answered(far(9), false, later), Offered::Waits(Some(far(0))));
        table.failed(&far(0));
        assert!(table.get(&far(0)).is_none() && table.get(&far(9)).is_some());
        table.failed(&far(1));
        assert!(table.get(&far(8)).is_some());
        table.failed(&far(2));
        assert!(table.get(&far(2)).is_some_and(|e| e.failures == 1));
        table.failed(&far(2));
        assert!(table.get(&far(2)).is_none());
    }

    /// On a public network one /24 has one place in a bucket, and an address one id.
    #[test]
    fn one_per_prefix() {
        let now = Instant::now();
        let mut table = Table::new(Id([0; 20]), Network::Public);
        let at = |n: u8, addr: &str| NodeInfo { id: Id([0x80 | n; 20]), addr: addr.parse().unwrap() };
        assert_eq!(table.answered(at(1, "8.8.8.1:2000"), false, now), Offered::Kept);
        assert_eq!(table.answered(at(2, "8.8.8.2:2000"), false, now), Offered::Refused);
        assert_eq!(table.answered(at(2, "8.8.8.1:2000"), false, now), Offered::Refused);
        assert_eq!(table.answered(at(1, "8.8.9.1:2000"), false, now), Offered::Refused);
        assert_eq!(table.answered(at(2, "8.8.9.1:2000"), false, now), Offered::Kept);
        assert_eq!(table.answered(at(3, "8.8.9.1:2000"), false, now + QUESTIONABLE_AFTER), Offered::Kept);
        assert_eq!(table.len(), 2);
    }

    #[test]
    fn checks_the_silent_once() {
        let now = Instant::now();
        let mut table = Table::new(id(0), Network::Private);
        table.answered(node(1), false, now);
        assert_eq!(table.to_check(now), None);
        let later = now + QUESTIONABLE_AFTER;
        assert_eq!(table.to_check(later), Some(node(1)));
        assert_eq!(table.to_check(later), None);
        table.rebuild(id(9), later);
        assert_eq!(table.len(), 1);
    }
}
