//! How fast and how reliable a peer was, as plain values that decay and can be saved.
//!
//! A rating orders whom to ask first and how much at once. It never bans: that is for verdicts. What is old counts for less
//! and less, so that a bad day is forgotten. Times are Unix seconds, since ratings outlive the process.

use super::Failure;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// Peers remembered; past that the one used longest ago is forgotten.
pub const RATINGS_MAX: usize = 10_000;

/// Half of what was measured, and of the failures, is forgotten in this time.
const HALF_LIFE_S: f64 = 6.0 * 3600.0;

/// A verified file credits a peer for this long.
const CREDIT_S: u64 = 30 * 24 * 3600;

/// A rating unused for this long says nothing any more.
pub(crate) const UNUSED_S_MAX: u64 = 30 * 24 * 3600;

/// Weight of a new sample in the running mean.
const SAMPLE_WEIGHT: f64 = 0.25;

/// Where a peer is, as far as its address tells: what to expect of it before anything was measured.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum Nearness {
    /// On a directly connected prefix.
    Lan,
    /// Elsewhere, by IPv6: usually no address translation on the way.
    FarV6,
    /// Elsewhere, by IPv4.
    FarV4,
}

impl Nearness {
    /// The nearness of an address; `on_link` if a directly connected prefix holds it.
    pub fn of(address: IpAddr, on_link: bool) -> Self {
        match address.to_canonical() {
            _ if on_link => Self::Lan,
            IpAddr::V6(_) => Self::FarV6,
            IpAddr::V4(_) => Self::FarV4,
        }
    }

    /// Round trip in seconds, and rate in bytes per second, that are assumed before a measurement.
    fn assumed(self) -> (f64, f64) {
        match self {
            Self::Lan => (0.002, 20e6),
            Self::FarV6 => (0.090, 1.1e6),
            Self::FarV4 => (0.100, 1.0e6),
        }
    }
}

/// What is known of one peer.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Rating {
    nearness: Nearness,
    latency_s: f64,
    rate_bytes_s: f64,
    /// 0: only assumed. Grows towards 1 with samples, falls with time.
    confidence: f64,
    failures: f64,
    touched_s: u64,
    credited_s: Option<u64>,
}

impl Rating {
    /// A peer of which nothing is known but where it is.
    pub fn unknown(nearness: Nearness, now_s: u64) -> Self {
        let (latency_s, rate_bytes_s) = nearness.assumed();
        Self { nearness, latency_s, rate_bytes_s, confidence: 0.0, failures: 0.0, touched_s: now_s, credited_s: None }
    }

    /// Notes a complete piece: time to the first byte, and bytes per second of all that the peer sent at that time.
    pub fn succeeded(&mut self, first_byte: Duration, rate_bytes_s: f64, now_s: u64) {
        self.decay(now_s);
        // The first sample replaces what was only assumed.
        let weight = if self.confidence == 0.0 { 1.0 } else { SAMPLE_WEIGHT };
        self.latency_s += weight * (first_byte.as_secs_f64() - self.latency_s);
        self.rate_bytes_s += weight * (rate_bytes_s.max(1.0) - self.rate_bytes_s);
        self.confidence += (1.0 - self.confidence) * 0.5;
        self.failures *= 0.5;
    }

    /// Notes a request that brought no piece.
    pub fn failed(&mut self, failure: Failure, now_s: u64) {
        self.decay(now_s);
        self.failures += match failure {
            // Being full is not being bad.
            Failure::Refused => 0.5,
            Failure::Short | Failure::Slow | Failure::Gone => 1.0,
        };
        if failure == Failure::Slow {
            self.rate_bytes_s /= 2.0;
        }
    }

    /// Notes a verified file that has a piece of this peer.
    pub fn credit(&mut self, now_s: u64) {
        self.credited_s = Some(now_s);
    }

    /// Takes the credit away: the peer gave a bad piece.
    pub fn discredit(&mut self) {
        self.credited_s = None;
    }

    /// Whether a verified file has credited it lately: until then it has one piece in flight.
    pub fn is_credited(&self, now_s: u64) -> bool {
        self.credited_s.is_some_and(|at| at.saturating_add(CREDIT_S) > now_s)
    }

    /// Seconds to the first byte, as expected.
    pub fn latency_s(&self) -> f64 {
        self.latency_s
    }

    /// Bytes per second of all its transfers together, as expected.
    pub fn rate_bytes_s(&self) -> f64 {
        self.rate_bytes_s
    }

    /// Failures that have not decayed yet.
    pub fn failures(&self) -> f64 {
        self.failures
    }

    /// How long until `bytes` are here, with all that is already asked of the peer among them.
    pub fn expected(&self, bytes: u64) -> Duration {
        #[allow(clippy::cast_precision_loss, reason = "an estimate")]
        let transfer_s = self.latency_s + bytes as f64 / self.rate_bytes_s.max(1.0);
        Duration::from_secs_f64((transfer_s * (1.0 + self.failures)).min(86_400.0))
    }

    /// Lets time take its part of what was measured, towards what is assumed of such a peer.
    pub fn decay(&mut self, now_s: u64) {
        #[allow(clippy::cast_precision_loss, reason = "an estimate")]
        let age_s = now_s.saturating_sub(self.touched_s) as f64;
        let kept = 0.5f64.powf(age_s / HALF_LIFE_S);
        let (latency_s, rate_bytes_s) = self.nearness.assumed();
        self.latency_s = latency_s + kept * (self.latency_s - latency_s);
        self.rate_bytes_s = rate_bytes_s + kept * (self.rate_bytes_s - rate_bytes_s);
        self.confidence *= kept;
        self.failures *= kept;
        self.touched_s = self.touched_s.max(now_s);
    }
}

/// The ratings of all peers met lately.
#[derive(Clone, Debug, Default)]
pub struct Ratings {
    peers: BTreeMap<SocketAddr, Rating>,
}

impl Ratings {
    /// Nobody is known.
    pub fn new() -> Self {
        Self::default()
    }

    /// A peer's rating as of now; what is assumed of it if it is not known.
    pub fn of(&self, peer: SocketAddr, nearness: Nearness, now_s: u64) -> Rating {
        let mut rating = self.peers.get(&peer).copied().unwrap_or_else(|| Rating::unknown(nearness, now_s));
        rating.decay(now_s);
        rating
    }

    /// Puts a rating in the place of the one before, or back from where it was saved.
    pub fn put(&mut self, peer: SocketAddr, rating: Rating) {
        self.peers.insert(peer, rating);
        while self.peers.len() > RATINGS_MAX {
            let oldest = self.peers.iter().min_by_key(|(_, rating)| rating.touched_s).map(|(peer, _)| *peer);
            oldest.and_then(|peer| self.peers.remove(&peer));
        }
    }

    /// Every rating, for saving and for people.
    pub fn iter(&self) -> impl Iterator<Item = (&SocketAddr, &Rating)> {
        self.peers.iter()
    }

    /// Drops what says nothing any more.
    pub fn expire(&mut self, now_s: u64) {
        self.peers.retain(|_, rating| rating.touched_s.saturating_add(UNUSED_S_MAX) > now_s);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const NOW_S: u64 = 1_800_000_000;

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() <= 0.01 * b.abs().max(1e-9)
    }

    /// A neighbour is tried before anybody else, and IPv6 before IPv4, as long as nothing was measured.
    #[test]
    fn unknown_peers_are_ordered_by_nearness() {
        let expected = |nearness| Rating::unknown(nearness, NOW_S).expected(262_144);
        assert!(expected(Nearness::Lan) < expected(Nearness::FarV6));
        assert!(expected(Nearness::FarV6) < expected(Nearness::FarV4));
        let of = |address: &str, on_link| Nearness::of(address.parse().unwrap(), on_link);
        assert_eq!(of("192.0.2.1", true), Nearness::Lan);
        assert_eq!(of("::ffff:192.0.2.1", false), Nearness::FarV4);
        assert_eq!(of("2001:db8::1", false), Nearness::FarV6);
    }

    #[test]
    fn the_first_sample_replaces_the_assumption() {
        let mut rating = Rating::unknown(Nearness::FarV4, NOW_S);
        rating.succeeded(Duration::from_millis(10), 50e6, NOW_S);
        assert!(near(rating.rate_bytes_s(), 50e6) && near(rating.latency_s(), 0.01));
        rating.succeeded(Duration::from_millis(10), 10e6, NOW_S);
        assert!(near(rating.rate_bytes_s(), 40e6));
    }

    /// Failures make a peer look slow, never banned; they and the measurements halve in six hours.
    #[test]
    fn failures_and_measurements_decay() {
        let mut rating = Rating::unknown(Nearness::FarV4, NOW_S);
        rating.succeeded(Duration::from_millis(100), 3e6, NOW_S);
        let before = rating.expected(1_000_000);
        rating.failed(Failure::Short, NOW_S);
        rating.failed(Failure::Gone, NOW_S);
        assert!(near(rating.expected(1_000_000).as_secs_f64(), 3.0 * before.as_secs_f64()));
        rating.decay(NOW_S + 6 * 3600);
        assert!(near(rating.failures(), 1.0) && near(rating.rate_bytes_s(), 2e6));
        rating.decay(NOW_S + 30 * 24 * 3600);
        assert!(rating.failures() < 0.001 && near(rating.rate_bytes_s(), 1e6));
    }

    #[test]
    fn credit_comes_from_verified_files_and_ends() {
        let mut rating = Rating::unknown(Nearness::Lan, NOW_S);
        rating.succeeded(Duration::from_millis(1), 1e8, NOW_S);
        assert!(!rating.is_credited(NOW_S), "fast bytes are not yet right bytes");
        rating.credit(NOW_S);
        assert!(rating.is_credited(NOW_S + CREDIT_S - 1) && !rating.is_credited(NOW_S + CREDIT_S));
        rating.discredit();
        assert!(!rating.is_credited(NOW_S));
    }

    /// Ten thousand and one peers: the one used longest ago is forgotten, and a saved rating comes back the same.
    #[test]
    fn memory_is_bounded() {
        let mut ratings = Ratings::new();
        for n in 0..=u16::try_from(RATINGS_MAX).unwrap() {
            let peer = SocketAddr::from(([10, 0, n.to_be_bytes()[0], n.to_be_bytes()[1]], 9977));
            ratings.put(peer, Rating::unknown(Nearness::FarV4, NOW_S + u64::from(n)));
        }
        assert_eq!(ratings.iter().count(), RATINGS_MAX);
        assert!(!ratings.iter().any(|(peer, _)| *peer == "10.0.0.0:9977".parse().unwrap()));
        let mut again = Ratings::new();
        ratings.iter().for_each(|(peer, rating)| again.put(*peer, *rating));
        assert!(ratings.iter().eq(again.iter()));
        ratings.expire(NOW_S + UNUSED_S_MAX + 5_000);
        assert_eq!(ratings.iter().count(), 5_000);
    }
}
