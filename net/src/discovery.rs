//! Where the first addresses come from: configured hosts, DNS seeds, hellos on the link.
//!
//! There is no built-in list of hosts: a machine that is configured with nothing talks to its own links and to nobody
//! else. Addresses found here are hints; whether one is a node shows when it answers a KRPC ping. The saved routing table is the
//! fourth source and comes from [`crate::netdb`].
//!
//! [`Discovery`] decides what is asked when and which hellos are worth an answer. It takes `now` and returns
//! [`Action`]s; [`run`] owns the sockets and the resolver and carries them out. Everything that a stranger can make it
//! remember or send is bounded by a constant of this module.
//!
//! # Hello
//! ```text
//! "poolfs-1 hello\0"   15 bytes
//! flags                 1 byte: 1 = the sender has not joined yet and would like to be asked
//! port                  2 bytes, big-endian: where the sender speaks KRPC, at the datagram's source address
//! node id              20 bytes
//! (more)               ignored, up to 512 bytes in all: room for later versions
//! ```
//! Sent to 239.255.80.70 and ff12::706f:6f6c:6673, UDP port 9978, with TTL 1. The IPv6 group is a transient one of
//! link-local scope (RFC 4291, 2.7), since ff02:: groups are assigned by IANA.

mod hello;
mod multicast;
mod seeds;
mod shell;

pub use hello::Hello;
pub use multicast::{GROUP_PORT, Links};
pub use seeds::{SeedError, Seeds};
pub use shell::{Standing, run};

use crate::told::Told;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::{Duration, Instant};

/// The port of KRPC and the peer protocol where nothing else is said.
pub const DEFAULT_PORT: u16 = 9977;

/// Configured hosts and seeds together; more in a configuration is an error.
pub const ORIGINS_MAX: usize = 64;

/// How often an origin is asked while nobody has answered this node.
const ASK_UNTIL_JOINED: Duration = Duration::from_secs(60);

/// How often an origin is asked once this node has joined.
const ASK_WHEN_JOINED: Duration = Duration::from_secs(3600);

/// When an origin that failed is asked again: at boot the resolver is often there before the network is.
const ASK_AFTER_FAILURE: Duration = Duration::from_secs(10);

/// The shortest time between two hellos of a node that has joined.
const HELLO_INTERVAL_MIN: Duration = Duration::from_secs(30);

/// All members of a link together send at most this many hellos a second.
const HELLOS_PER_SECOND_ON_LINK: u32 = 20;

/// A node that has not joined says hello at 0, 1, 3, 7 and 15 s, then at the usual interval.
const HELLO_FIRST_DELAY: Duration = Duration::from_secs(1);

/// How many nodes should answer one hello, on average, however many hear it.
const HELLO_ANSWERS: usize = 8;

/// Senders remembered, for twice the time in which each of them speaks: who is on the link, and who was just pinged.
const HEARD_MAX: usize = 4096;

/// A sender that was heard this lately is not pinged again, unless he is still alone.
const CONTACT_AGAIN_AFTER: Duration = Duration::from_secs(30);

/// At most this many contacts a second come out of hellos, in bursts of as many.
const HELLO_CONTACTS_PER_SECOND: u32 = 20;

/// Shortest distance of two [`Discovery::tick`]s that [`Discovery::deadline`] asks for.
const TICK_MIN: Duration = Duration::from_millis(10);

/// A host name or address with a port, as configured.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// A DNS name or an address without brackets.
    pub host: String,
    /// The UDP port, never 0.
    pub port: u16,
}

/// A text that is not `HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not HOST:PORT, for example dht.example.org:9977 or [2001:db8::1]:9977")]
pub struct NotHostPort(String);

impl FromStr for HostPort {
    type Err = NotHostPort;

    fn from_str(text: &str) -> Result<Self, NotHostPort> {
        let parse = || {
            let (host, port) = text.rsplit_once(':')?;
            let port = port.parse().ok().filter(|port| *port != 0)?;
            let host = match host.strip_prefix('[') {
                Some(inside) => inside.strip_suffix(']').filter(|inside| inside.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6()))?,
                None => host,
            };
            let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
            let is_host = host.parse::<IpAddr>().is_ok() && text.starts_with('[') == host.contains(':') || host.chars().all(is_name);
            (is_host && !host.is_empty()).then(|| Self { host: host.to_owned(), port })
        };
        parse().ok_or_else(|| NotHostPort(text.to_owned()))
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') { write!(f, "[{}]:{}", self.host, self.port) } else { write!(f, "{}:{}", self.host, self.port) }
    }
}

/// Somebody who may know addresses of nodes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Origin {
    /// A node itself: its A and AAAA records.
    Bootstrap(HostPort),
    /// A DNS name: the targets of its `_poolfs._udp` SRV records, else its own addresses at [`DEFAULT_PORT`].
    Seed(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bootstrap(host) => write!(f, "bootstrap host {host}"),
            Self::Seed(name) => write!(f, "DNS seed {name}"),
        }
    }
}

/// What to look for nodes with.
#[derive(Debug, Clone, Default)]
pub struct DiscoveryConfig {
    /// Nodes by host and port.
    pub bootstrap: Vec<HostPort>,
    /// DNS names that list nodes.
    pub seeds: Vec<String>,
    /// Where hellos are sent and heard; `None`: nowhere.
    pub links: Option<Links>,
    /// Name servers for the seeds instead of the system's.
    pub name_servers: Vec<SocketAddr>,
    /// Where it is said what goes out.
    pub told: Told,
}

/// What [`run`] has to do for [`Discovery`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Find the origin's addresses and hand them to [`Discovery::resolved`].
    Resolve(Origin),
    /// Say hello on every link, with this flag; id and ports are the caller's.
    Hello {
        /// Nobody has answered this node yet.
        joining: bool,
    },
}

#[derive(Debug)]
struct Asked {
    origin: Origin,
    /// An answer is outstanding: not asked a second time.
    waiting: bool,
    /// When it was last asked, and whether that failed.
    last: Option<(Instant, bool)>,
}

/// The state behind discovery, without sockets.
#[derive(Debug)]
pub struct Discovery {
    id: [u8; 20],
    joined: bool,
    members: usize,
    asked: Vec<Asked>,
    /// `None` where there are no links.
    hello_at: Option<Instant>,
    /// Hellos sent since this node was last without company; says when the next is due.
    lonely_hellos: u32,
    heard: HashMap<SocketAddr, Instant>,
    contacts: Bucket,
    rng: SmallRng,
}

impl Discovery {
    /// Starts with everything due at `now`.
    ///
    /// `id` is the own one, to know the own hellos by; `seed` is for the jitter. Origins past [`ORIGINS_MAX`] are left out.
    pub fn new(config: &DiscoveryConfig, id: [u8; 20], now: Instant, seed: u64) -> Self {
        let bootstrap = config.bootstrap.iter().cloned().map(Origin::Bootstrap);
        let origins = bootstrap.chain(config.seeds.iter().cloned().map(Origin::Seed)).take(ORIGINS_MAX);
        Self {
            id,
            joined: false,
            members: 0,
            asked: origins.map(|origin| Asked { origin, waiting: false, last: None }).collect(),
            hello_at: config.links.is_some().then_some(now),
            lonely_hellos: 0,
            heard: HashMap::new(),
            contacts: Bucket { tokens_ms: 1000 * HELLO_CONTACTS_PER_SECOND, at: now },
            rng: SmallRng::seed_from_u64(seed),
        }
    }

    /// Tells whether any node answers this one, and how many it knows on its links and elsewhere.
    pub fn set_standing(&mut self, now: Instant, joined: bool, members: usize) {
        self.members = members;
        if self.joined && !joined {
            // Alone again: as at the start.
            self.lonely_hellos = 0;
            if let Some(at) = &mut self.hello_at {
                *at = now;
            }
        }
        self.joined = joined;
    }

    /// When [`Self::tick`] has something to do, unless the standing changes before; `None`: nothing configured.
    pub fn deadline(&self) -> Option<Instant> {
        let asks = self.asked.iter().filter(|asked| !asked.waiting).map(|asked| self.due(asked));
        // `None` of an origin means that it was never asked.
        let asks = asks.map(|due| due.unwrap_or(self.contacts.at));
        asks.chain(self.hello_at).min()
    }

    fn due(&self, asked: &Asked) -> Option<Instant> {
        let (last, failed) = asked.last?;
        Some(
            last + match (self.joined, failed) {
                (true, _) => ASK_WHEN_JOINED,
                (false, true) => ASK_AFTER_FAILURE,
                (false, false) => ASK_UNTIL_JOINED,
            },
        )
    }

    /// What is due at `now`.
    pub fn tick(&mut self, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        for index in 0..self.asked.len() {
            let asked = &self.asked[index];
            if !asked.waiting && self.due(asked).is_none_or(|due| due <= now) {
                let asked = &mut self.asked[index];
                asked.waiting = true;
                actions.push(Action::Resolve(asked.origin.clone()));
            }
        }
        if self.hello_at.is_some_and(|at| at <= now) {
            actions.push(Action::Hello { joining: !self.joined });
            let remembered = 2 * self.steady_interval() + CONTACT_AGAIN_AFTER;
            self.heard.retain(|_, at| now.saturating_duration_since(*at) < remembered);
            self.hello_at = Some(now + self.hello_delay());
        }
        actions
    }

    /// The nodes that may hear a hello, as far as known.
    fn known(&self) -> usize {
        self.members.max(self.heard.len())
    }

    /// The interval at which all who are known share the link's bound.
    fn steady_interval(&self) -> Duration {
        let known = u32::try_from(self.known()).unwrap_or(u32::MAX);
        (Duration::from_secs(1).saturating_mul(known) / HELLOS_PER_SECOND_ON_LINK).max(HELLO_INTERVAL_MIN)
    }

    /// The time to the next hello, just after one was sent.
    fn hello_delay(&mut self) -> Duration {
        let steady = self.steady_interval();
        let delay = if self.joined {
            steady
        } else {
            self.lonely_hellos = self.lonely_hellos.saturating_add(1);
            HELLO_FIRST_DELAY.saturating_mul(1 << (self.lonely_hellos - 1).min(16)).min(steady)
        };
        // Machines that start together, as after a power cut, must not go on speaking together. Only later, never earlier:
        // the link's bound holds.
        delay + delay.mul_f64(self.rng.random_range(0.0..0.1))
    }

    /// An origin's answer. The addresses that are worth a ping come back, in the order given.
    pub fn resolved(&mut self, now: Instant, origin: &Origin, answer: Result<Vec<SocketAddr>, SeedError>) -> Vec<SocketAddr> {
        let Some(asked) = self.asked.iter_mut().find(|asked| asked.origin == *origin) else { return Vec::new() };
        asked.waiting = false;
        let addresses = answer.unwrap_or_default();
        asked.last = Some((now, addresses.is_empty()));
        addresses
    }

    /// A datagram that came to the group. Returns whom to ping, if that is worth it.
    pub fn heard(&mut self, now: Instant, from: SocketAddr, datagram: &[u8]) -> Option<SocketAddr> {
        let hello = Hello::parse(datagram)?;
        // A link-local address cannot be handed on to others and means nothing without its interface.
        let unusable = matches!(from.ip(), IpAddr::V6(ip) if ip.is_unicast_link_local());
        if hello.id == self.id || unusable || from.ip().is_unspecified() || from.ip().is_multicast() {
            return None;
        }
        let contact = SocketAddr::new(from.ip(), hello.port);
        let again = self.heard.get(&contact).is_some_and(|at| now.saturating_duration_since(*at) < CONTACT_AGAIN_AFTER);
        if again && !hello.joining || !self.heard.contains_key(&contact) && self.heard.len() >= HEARD_MAX {
            return None;
        }
        self.heard.insert(contact, now);
        // Everybody hears each hello; of all of them some HELLO_ANSWERS should move.
        let known = self.known();
        let wanted = !self.joined || known <= HELLO_ANSWERS || self.rng.random_range(0..known) < HELLO_ANSWERS;
        (wanted && self.contacts.take(now)).then_some(contact)
    }
}

/// A token bucket, in thousandths of a token.
#[derive(Debug)]
struct Bucket {
    tokens_ms: u32,
    at: Instant,
}

impl Bucket {
    fn take(&mut self, now: Instant) -> bool {
        let passed_ms = u32::try_from(now.saturating_duration_since(self.at).as_millis()).unwrap_or(u32::MAX);
        let full = 1000 * HELLO_CONTACTS_PER_SECOND;
        self.tokens_ms = self.tokens_ms.saturating_add(passed_ms.saturating_mul(HELLO_CONTACTS_PER_SECOND)).min(full);
        self.at = now.max(self.at);
        let there = self.tokens_ms >= 1000;
        if there {
            self.tokens_ms -= 1000;
        }
        there
    }
}

#[cfg(test)]
pub(crate) mod tests;
