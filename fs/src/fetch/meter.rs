//! How far a download is, how fast, and who gave how much.

use super::provenance_of;
use crate::source::Giver;
use poolfs_core::store::Provenance;
use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

/// The span over which the rate is taken.
const RATE_SPAN: Duration = Duration::from_secs(5);

/// What arrives within this time is one entry.
const BUCKET: Duration = Duration::from_millis(250);

/// Givers told apart; the bytes of more are counted in the total only.
const GIVERS_MAX: usize = 64;

/// The meter of one download. Takes the time as argument.
#[derive(Debug)]
pub(super) struct Meter {
    done_bytes: u64,
    started: Instant,
    recent: VecDeque<(Instant, u64)>,
    givers: HashMap<Giver, u64>,
}

impl Meter {
    pub(super) fn new(now: Instant) -> Self {
        Self { done_bytes: 0, started: now, recent: VecDeque::new(), givers: HashMap::new() }
    }

    /// A download begins with so many bytes here already.
    pub(super) fn resume(&mut self, done_bytes: u64) {
        self.done_bytes = done_bytes;
    }

    /// Notes a piece; `replaced`: it is no more of the file than was here before.
    pub(super) fn took(&mut self, now: Instant, giver: Giver, bytes: u64, replaced: bool) {
        if bytes == 0 {
            return;
        }
        if self.recent.is_empty() && self.givers.is_empty() {
            self.started = now; // The time in the queue is not the source's.
        }
        self.done_bytes += if replaced { 0 } else { bytes };
        match self.recent.back_mut() {
            Some((since, sum)) if now.duration_since(*since) < BUCKET => *sum += bytes,
            _ => self.recent.push_back((now, bytes)),
        }
        while self.recent.front().is_some_and(|(since, _)| now.duration_since(*since) > RATE_SPAN) {
            self.recent.pop_front();
        }
        if self.givers.len() < GIVERS_MAX || self.givers.contains_key(&giver) {
            *self.givers.entry(giver).or_default() += bytes;
        }
    }

    pub(super) fn done_bytes(&self) -> u64 {
        self.done_bytes
    }

    /// Bytes a second over the last [`RATE_SPAN`], or since the first byte if that is shorter, but at least over a second.
    pub(super) fn rate_bytes_s(&self, now: Instant) -> u64 {
        let bytes: u64 = self.recent.iter().filter(|(since, _)| now.duration_since(*since) <= RATE_SPAN).map(|(_, bytes)| bytes).sum();
        let span = now.duration_since(self.started).clamp(Duration::from_secs(1), RATE_SPAN);
        u64::try_from(u128::from(bytes) * 1000 / span.as_millis()).unwrap_or(u64::MAX)
    }

    /// Who gave how many bytes, most first.
    pub(super) fn givers(&self) -> Vec<(Giver, u64)> {
        let mut givers: Vec<(Giver, u64)> = self.givers.iter().map(|(giver, bytes)| (giver.clone(), *bytes)).collect();
        givers.sort_by_key(|(_, bytes)| Reverse(*bytes));
        givers
    }

    /// What gave the most; a mirror where all of it was here before.
    pub(super) fn provenance(&self) -> Provenance {
        let mut sums: HashMap<Provenance, u64> = HashMap::new();
        for (giver, bytes) in &self.givers {
            *sums.entry(provenance_of(giver)).or_default() += bytes;
        }
        sums.into_iter().max_by_key(|(provenance, bytes)| (*bytes, *provenance)).map_or(Provenance::Mirror, |(provenance, _)| provenance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mirror() -> Giver {
        Giver::Mirror("m".into())
    }

    fn peer(n: u16) -> Giver {
        Giver::Peer(([10, 0, 0, 1], n).into())
    }

    /// `watch` shows this: a stalled download must show 0, and a short one not a made-up gigabyte a second.
    #[test]
    fn rates_are_of_the_last_seconds() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut meter = Meter::new(start);
        assert_eq!(meter.rate_bytes_s(at(0)), 0);
        meter.took(at(60_000), mirror(), 1000, false);
        assert_eq!(meter.rate_bytes_s(at(60_000)), 1000, "the minute in the queue does not count");
        for n in 1..100 {
            meter.took(at(60_000 + n * 100), mirror(), 1000, false);
        }
        // 10,000 bytes a second, less at most one bucket at the span's far end.
        assert!((9_500..=10_000).contains(&meter.rate_bytes_s(at(69_900))), "{}", meter.rate_bytes_s(at(69_900)));
        assert!(meter.recent.len() <= 21);
        assert_eq!(meter.rate_bytes_s(at(80_000)), 0);
        assert_eq!(meter.done_bytes(), 100_000);
    }

    /// The file's source in the database and in its extended attribute.
    #[test]
    fn most_bytes_give_the_provenance() {
        let now = Instant::now();
        let mut meter = Meter::new(now);
        assert_eq!(meter.provenance(), Provenance::Mirror);
        meter.took(now, mirror(), 100, false);
        meter.took(now, peer(1), 60, false);
        assert_eq!(meter.provenance(), Provenance::Mirror);
        meter.took(now, peer(2), 60, false);
        assert_eq!(meter.provenance(), Provenance::Peer);
        assert_eq!(meter.givers()[0], (mirror(), 100));
        for n in 0..200 {
            meter.took(now, peer(n), 1, false);
        }
        assert_eq!(meter.givers().len(), GIVERS_MAX);
        assert_eq!(meter.done_bytes(), 420);
    }
}
