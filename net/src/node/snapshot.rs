//! How a node is, as plain values for people, metrics and other processes.

use crate::dht::{Counters, Status};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// Rates are means over about this time.
const RATE_WINDOW: Duration = Duration::from_secs(60);

/// Shortest time between two samples of the counters.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(5);

/// One address family of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FamilySnapshot {
    /// The bound address.
    pub listen: SocketAddr,
    /// The own id, in hexadecimal.
    pub id: String,
    /// Nodes in the routing table.
    pub nodes: usize,
    /// Those heard of in the last quarter of an hour.
    pub good: usize,
    /// poolfs nodes among them.
    pub poolfs: usize,
    /// The own address as others see it.
    pub seen_as: Option<IpAddr>,
    /// Smoothed round-trip time, in microseconds.
    pub rtt_us: Option<u64>,
}

/// Means over about the last minute; bytes without IP and UDP headers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Datagrams received a second.
    pub datagrams_in: f64,
    /// Datagrams sent a second.
    pub datagrams_out: f64,
    /// Bytes received a second.
    pub bytes_in: f64,
    /// Bytes sent a second.
    pub bytes_out: f64,
}

/// A node at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// IPv4.
    pub v4: Option<FamilySnapshot>,
    /// IPv6.
    pub v6: Option<FamilySnapshot>,
    /// Whether another node has reached this one; true on a private network.
    pub reachable: bool,
    /// Keys kept for others.
    pub stored_keys: usize,
    /// Contacts kept for others.
    pub stored_contacts: usize,
    /// BEP 44 items kept for others.
    pub stored_items: usize,
    /// Statements kept for others.
    pub stored_statements: usize,
    /// Keys that this node announces.
    pub announced_keys: usize,
    /// Lookups under way.
    pub lookups: usize,
    /// Median time of the last lookups to their first contact, or to their end without one, in microseconds.
    pub lookup_p50_us: Option<u64>,
    /// The same, 95th percentile.
    pub lookup_p95_us: Option<u64>,
    /// Datagrams and bytes a second.
    pub rates: Rates,
    /// Datagrams received since the start.
    pub datagrams_in: u64,
    /// Datagrams sent since the start.
    pub datagrams_out: u64,
    /// Bytes received since the start.
    pub bytes_in: u64,
    /// Bytes sent since the start.
    pub bytes_out: u64,
    /// Queries sent since the start, without their repetitions.
    pub queries_out: u64,
    /// Repetitions.
    pub repeated: u64,
    /// Queries that nobody answered in 14 s.
    pub unreachable: u64,
    /// Datagrams received that were no message.
    pub malformed: u64,
    /// Queries not looked at because somebody asks too much.
    pub limited: u64,
    /// Announces and items refused.
    pub refused: u64,
    /// Datagrams that the kernel would not take.
    pub unsent: u64,
}

impl Snapshot {
    pub(super) fn new(status: &Status, local: [Option<SocketAddr>; 2], rates: Rates, unsent: u64) -> Self {
        let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let family = |f: usize| {
            local[f].map(|listen| FamilySnapshot {
                listen,
                id: status.ids[f].to_string(),
                nodes: status.nodes[f],
                good: status.good[f],
                poolfs: status.poolfs[f],
                seen_as: status.own_address[f],
                rtt_us: status.rtt[f].map(us),
            })
        };
        let counters = status.counters;
        Self {
            v4: family(0),
            v6: family(1),
            reachable: status.reachable,
            stored_keys: status.stored_keys,
            stored_contacts: status.stored_contacts,
            stored_items: status.stored_items,
            stored_statements: status.stored_statements,
            announced_keys: status.announced_keys,
            lookups: status.lookups,
            lookup_p50_us: status.lookup_p50.map(us),
            lookup_p95_us: status.lookup_p95.map(us),
            rates,
            datagrams_in: counters.datagrams_in,
            datagrams_out: counters.datagrams_out,
            bytes_in: counters.bytes_in,
            bytes_out: counters.bytes_out,
            queries_out: counters.queries_out,
            repeated: counters.repeated,
            unreachable: counters.unreachable,
            malformed: counters.malformed,
            limited: counters.limited,
            refused: counters.refused,
            unsent,
        }
    }
}

/// Remembers counters of the last minute.
#[derive(Debug, Default)]
pub(super) struct Meter {
    samples: VecDeque<(Instant, Counters)>,
}

impl Meter {
    /// Takes a sample if the last one is old enough. Called whenever the driver is awake anyway.
    pub(super) fn sample(&mut self, now: Instant, counters: Counters) {
        if self.samples.back().is_some_and(|(at, _)| now.saturating_duration_since(*at) < SAMPLE_INTERVAL) {
            return;
        }
        self.samples.push_back((now, counters));
        // The second is kept as long as it is older than the window, so that there is always one from before it.
        while self.samples.get(1).is_some_and(|(at, _)| now.saturating_duration_since(*at) >= RATE_WINDOW) {
            self.samples.pop_front();
        }
    }

    /// The means from the oldest sample to now.
    pub(super) fn rates(&self, now: Instant, counters: Counters) -> Rates {
        let Some((at, first)) = self.samples.front() else { return Rates::default() };
        let seconds = now.saturating_duration_since(*at).as_secs_f64().max(1.0);
        #[allow(clippy::cast_precision_loss, reason = "a rate for people")]
        let rate = |new: u64, old: u64| new.saturating_sub(old) as f64 / seconds;
        Rates {
            datagrams_in: rate(counters.datagrams_in, first.datagrams_in),
            datagrams_out: rate(counters.datagrams_out, first.datagrams_out),
            bytes_in: rate(counters.bytes_in, first.bytes_in),
            bytes_out: rate(counters.bytes_out, first.bytes_out),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A rate over the node's whole life would hide what happens now; the memory of it is bounded.
    #[test]
    fn rates_are_of_the_last_minute() {
        let start = Instant::now();
        let mut meter = Meter::default();
        let counters = |n: u64| Counters { datagrams_in: n, bytes_out: 100 * n, ..Counters::default() };
        for second in 0..1000_u64 {
            // 10 a second, and 2 a second for the last two minutes.
            let n = if second < 880 { 10 * second } else { 8800 + 2 * (second - 880) };
            meter.sample(start + Duration::from_secs(second), counters(n));
        }
        let rates = meter.rates(start + Duration::from_secs(1000), counters(8800 + 240));
        assert!((rates.datagrams_in - 2.0).abs() < 0.01 && (rates.bytes_out - 200.0).abs() < 1.0, "{rates:?}");
        assert!(meter.samples.len() <= 14, "{}", meter.samples.len());
        assert_eq!(Meter::default().rates(start, counters(5)), Rates::default());
    }
}
