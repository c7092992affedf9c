//! What is remembered of addresses: round trips, tokens, how much was sent to them and came from them.

use super::rtt::{Bucket, Rtt};
use super::token::SECRET_LIFE;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// Addresses remembered; past it the half that was longest unused goes.
pub const PEERS_MAX: usize = 2_048;

/// How long an unused address is remembered: longer than the pause between two checks of a table's node.
const PEER_LIFE: Duration = Duration::from_secs(20 * 60);

/// Queries and answers to one address in [`WINDOW`] before no further query is sent to it: half of what makes libtorrent
/// ignore the sender for five minutes.
pub const DATAGRAMS_PER_WINDOW_MAX: u16 = 25;

/// The same towards a poolfs node of a private network, where no addresses are shared: half of what one takes for ever. Two
/// machines of a class room have only each other to ask, for each package.
pub const NEIGHBOUR_DATAGRAMS_PER_WINDOW_MAX: u16 = 100;

/// See [`DATAGRAMS_PER_WINDOW_MAX`].
pub const WINDOW: Duration = Duration::from_secs(10);

/// A token is used this long after it was given; its maker changes the secret every [`SECRET_LIFE`] and takes the last.
pub const TOKEN_USE: Duration = Duration::from_secs(SECRET_LIFE.as_secs() - 30);

/// Queries a second taken from one address.
pub const IN_PER_ADDRESS: f32 = 20.0;

/// Queries taken from one address at once.
pub const IN_PER_ADDRESS_BURST: f32 = 100.0;

/// Queries a second taken in all.
pub const IN_ALL: f32 = 200.0;

/// Queries taken in all at once.
pub const IN_ALL_BURST: f32 = 400.0;

/// Addresses whose rate is watched; a new one past it shares one rate with all others.
pub const IN_ADDRESSES_MAX: usize = 4_096;

/// What is known of one address.
#[derive(Debug)]
pub struct Peer {
    /// Round trips to it.
    pub rtt: Rtt,
    token: Option<(Box<[u8]>, Instant)>,
    window_start: Instant,
    window_count: u16,
    used: Instant,
    /// Its last answer was one of this program.
    pub poolfs: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Peers {
    known: HashMap<SocketAddr, Peer>,
}

impl Peers {
    /// Addresses remembered.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// What is known of an address.
    pub fn get(&self, addr: &SocketAddr) -> Option<&Peer> {
        self.known.get(addr)
    }

    /// The same, made if there is none.
    pub fn entry(&mut self, addr: SocketAddr, now: Instant) -> &mut Peer {
        if self.known.len() >= PEERS_MAX && !self.known.contains_key(&addr) {
            let mut used: Vec<Instant> = self.known.values().map(|p| p.used).collect();
            let middle = used.len() / 2;
            let (_, median, _) = used.select_nth_unstable(middle);
            let median = *median;
            self.known.retain(|_, peer| peer.used > median);
        }
        let peer = self.known.entry(addr).or_insert_with(|| Peer {
            rtt: Rtt::default(),
            token: None,
            window_start: now,
            window_count: 0,
            used: now,
            poolfs: false,
        });
        peer.used = now;
        peer
    }

    /// Whether any port of this address was asked anything lately.
    pub fn knows_ip(&self, ip: IpAddr) -> bool {
        self.known.keys().any(|addr| addr.ip() == ip)
    }

    /// A token that the address gave lately.
    pub fn token(&self, addr: &SocketAddr, now: Instant) -> Option<&[u8]> {
        let (token, given) = self.known.get(addr)?.token.as_ref()?;
        (now.saturating_duration_since(*given) < TOKEN_USE).then_some(token)
    }

    /// Whether another query may go to the address, on a private network or another; if so it is counted.
    pub fn may_send(&mut self, addr: SocketAddr, private: bool, now: Instant) -> bool {
        let peer = self.entry(addr, now);
        peer.roll(now);
        let most = if private && peer.poolfs { NEIGHBOUR_DATAGRAMS_PER_WINDOW_MAX } else { DATAGRAMS_PER_WINDOW_MAX };
        if peer.window_count >= most {
            return false;
        }
        peer.window_count += 1;
        true
    }

    /// Counts a datagram that goes whatever the count is: an answer or a repetition. An address that nothing was ever asked of
    /// is not remembered for it.
    pub fn sent(&mut self, addr: SocketAddr, now: Instant) {
        if let Some(peer) = self.known.get_mut(&addr) {
            peer.roll(now);
            peer.window_count = peer.window_count.saturating_add(1);
        }
    }

    /// When a query may go to the address again.
    pub fn ready_at(&self, addr: &SocketAddr, now: Instant) -> Instant {
        self.known.get(addr).map_or(now, |peer| peer.window_start + WINDOW)
    }

    /// Forgets who was not used for long.
    pub fn sweep(&mut self, now: Instant) {
        self.known.retain(|_, peer| now.saturating_duration_since(peer.used) < PEER_LIFE);
        if self.known.capacity() > 4 * self.known.len() {
            self.known.shrink_to_fit();
        }
    }
}

impl Peer {
    fn roll(&mut self, now: Instant) {
        if now.saturating_duration_since(self.window_start) >= WINDOW {
            self.window_start = now;
            self.window_count = 0;
        }
    }

    /// Keeps the token of a poolfs node, which is good for any key.
    pub fn set_token(&mut self, token: Option<&[u8]>, now: Instant) {
        self.token = token.map(|token| (token.into(), now));
    }
}

/// Rates of queries that come in.
#[derive(Debug)]
pub struct Inbound {
    all: Bucket,
    others: Bucket,
    by_address: HashMap<IpAddr, Bucket>,
}

impl Inbound {
    /// All rates full.
    pub fn new(now: Instant) -> Self {
        let full = Bucket::new(IN_PER_ADDRESS_BURST, now);
        Self { all: Bucket::new(IN_ALL_BURST, now), others: full, by_address: HashMap::new() }
    }

    /// Whether one more datagram of this address is looked at.
    pub fn take(&mut self, ip: IpAddr, now: Instant) -> bool {
        let known = self.by_address.len() < IN_ADDRESSES_MAX || self.by_address.contains_key(&ip);
        let bucket =
            if known { self.by_address.entry(ip).or_insert_with(|| Bucket::new(IN_PER_ADDRESS_BURST, now)) } else { &mut self.others };
        bucket.take(IN_PER_ADDRESS, IN_PER_ADDRESS_BURST, now) && self.all.take(IN_ALL, IN_ALL_BURST, now)
    }

    /// Forgets the addresses whose rate is full again.
    pub fn sweep(&mut self, now: Instant) {
        self.by_address.retain(|_, bucket| !bucket.is_full(IN_PER_ADDRESS, IN_PER_ADDRESS_BURST, now));
        if self.by_address.capacity() > 64 && self.by_address.capacity() > 4 * self.by_address.len() {
            self.by_address.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn at(n: u32) -> SocketAddr {
        SocketAddr::new(Ipv4Addr::from(n).into(), 9977)
    }

    /// However many addresses are met, the memory of them is bounded and the latest are in it.
    #[test]
    fn peers_are_bounded() {
        let start = Instant::now();
        let mut peers = Peers::default();
        for n in 0..10_000 {
            peers.entry(at(n), start + Duration::from_millis(u64::from(n)));
            assert!(peers.len() <= PEERS_MAX);
        }
        assert!(peers.get(&at(9_999)).is_some() && peers.get(&at(9_000)).is_some() && peers.get(&at(0)).is_none());
        peers.sweep(start + Duration::from_secs(3_600));
        assert_eq!(peers.len(), 0);
    }

    /// The 26th query in ten seconds would bring us half-way to being ignored by libtorrent for five minutes.
    #[test]
    fn one_address_gets_25_in_10_s() {
        let start = Instant::now();
        let mut peers = Peers::default();
        let sent = (0..100).filter(|_| peers.may_send(at(1), true, start)).count();
        assert_eq!(sent, 25);
        assert!(peers.may_send(at(2), true, start));
        let ready = peers.ready_at(&at(1), start);
        assert!(!peers.may_send(at(1), true, ready - Duration::from_millis(1)) && peers.may_send(at(1), true, ready));
        (0..50).for_each(|_| peers.sent(at(2), start));
        assert!(!peers.may_send(at(2), true, start), "answers count too");
        for (private, most) in [(true, 100), (false, 25)] {
            let mut peers = Peers::default();
            peers.entry(at(1), start).poolfs = true;
            assert_eq!((0..200).filter(|_| peers.may_send(at(1), private, start)).count(), most);
        }
    }

    /// A flood from one address leaves room for others, one from many is held in all, and memory is bounded.
    #[test]
    fn inbound_rates() {
        let start = Instant::now();
        let mut inbound = Inbound::new(start);
        let ip = |n: u32| at(n).ip();
        assert_eq!((0..10_000).filter(|_| inbound.take(ip(1), start)).count(), 100);
        assert!(inbound.take(ip(2), start));
        assert_eq!((0..60).filter(|_| inbound.take(ip(1), start + Duration::from_secs(1))).count(), 20);
        let mut inbound = Inbound::new(start);
        assert_eq!((0..10_000).filter(|n| inbound.take(ip(*n), start)).count(), 400);
        assert_eq!(inbound.by_address.len(), IN_ADDRESSES_MAX);
        inbound.sweep(start + Duration::from_secs(60));
        assert_eq!(inbound.by_address.len(), 0);
    }

    #[test]
    fn tokens_age() {
        let start = Instant::now();
        let mut peers = Peers::default();
        peers.entry(at(1), start).set_token(Some(b"token"), start);
        assert_eq!(peers.token(&at(1), start), Some(&b"token"[..]));
        assert_eq!(peers.token(&at(1), start + TOKEN_USE), None);
    }
}
