//! Bytes by source over time, a day back, by the minute. Takes the time as argument.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

const MINUTE: Duration = Duration::from_secs(60);

/// Minutes remembered: a day.
const MINUTES_MAX: usize = 24 * 60;

/// Minutes in one part of the day.
const DAY_STEP: usize = 30;

/// Bytes by where they came from, and given away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// From mirrors.
    pub mirror: u64,
    /// From peers.
    pub peer: u64,
    /// Rebuilt from deltas.
    pub delta: u64,
    /// Given to peers.
    pub given: u64,
}

impl Totals {
    /// Bytes that arrived.
    pub fn received(&self) -> u64 {
        self.mirror.saturating_add(self.peer).saturating_add(self.delta)
    }

    fn add(&mut self, other: &Self) {
        self.mirror += other.mirror;
        self.peer += other.peer;
        self.delta += other.delta;
        self.given += other.given;
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            mirror: self.mirror.saturating_sub(before.mirror),
            peer: self.peer.saturating_sub(before.peer),
            delta: self.delta.saturating_sub(before.delta),
            given: self.given.saturating_sub(before.given),
        }
    }
}

/// Remembers how counters grew.
#[derive(Debug)]
pub struct Recorder {
    start: Instant,
    last: Totals,
    /// The newest is of the minute `newest` since the start.
    minutes: VecDeque<Totals>,
    newest: u64,
}

impl Recorder {
    /// Nothing has come yet.
    pub fn new(start: Instant) -> Self {
        Self { start, last: Totals::default(), minutes: VecDeque::from([Totals::default()]), newest: 0 }
    }

    /// Counters as they stand; what came since the last call counts for now.
    pub fn record(&mut self, now: Instant, counters: Totals) {
        let minute = now.saturating_duration_since(self.start).as_secs() / MINUTE.as_secs();
        // A machine that slept long fills no more than it remembers.
        for _ in 0..minute.saturating_sub(self.newest).min(MINUTES_MAX as u64) {
            self.minutes.push_back(Totals::default());
        }
        self.newest = self.newest.max(minute);
        while self.minutes.len() > MINUTES_MAX {
            self.minutes.pop_front();
        }
        if let Some(newest) = self.minutes.back_mut() {
            newest.add(&counters.since(&self.last));
        }
        self.last = counters;
    }

    /// The last hour, by minute.
    pub fn hour(&self) -> Vec<Totals> {
        self.parts(60, 1)
    }

    /// The last day, by half hour.
    pub fn day(&self) -> Vec<Totals> {
        self.parts(MINUTES_MAX / DAY_STEP, DAY_STEP)
    }

    fn parts(&self, parts: usize, step: usize) -> Vec<Totals> {
        let mut out = vec![Totals::default(); parts];
        for (ago, minute) in self.minutes.iter().rev().take(parts * step).enumerate() {
            out[parts - 1 - ago / step].add(minute);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(mirror: u64, given: u64) -> Totals {
        Totals { mirror, given, ..Totals::default() }
    }

    /// Bytes drawn in the wrong minute, twice, or never; memory that grows with the uptime.
    #[test]
    fn bytes_are_in_their_minute() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut recorder = Recorder::new(start);
        recorder.record(at(0), counters(5, 0));
        recorder.record(at(59), counters(7, 1));
        recorder.record(at(60), counters(17, 1));
        recorder.record(at(60), counters(17, 1));
        let hour = recorder.hour();
        assert_eq!((hour.len(), hour[58], hour[59]), (60, counters(7, 1), counters(10, 0)));
        assert_eq!((recorder.day().len(), recorder.day()[47]), (48, counters(17, 1)));
        recorder.record(at(60 * 40), counters(17, 1));
        assert_eq!((recorder.hour()[59], recorder.hour()[19], recorder.hour()[20]), (counters(0, 0), counters(7, 1), counters(10, 0)));
        assert_eq!((recorder.day()[46], recorder.day()[47]), (counters(17, 1), counters(0, 0)));
        // Clocks of callers may be a moment apart.
        recorder.record(at(60 * 39), counters(20, 1));
        assert_eq!(recorder.hour()[59], counters(3, 0));
        recorder.record(at(60 * 60 * 1000), counters(21, 1));
        assert_eq!(
            (recorder.minutes.len(), recorder.day()[47], recorder.day()[..47].iter().map(Totals::received).sum::<u64>()),
            (MINUTES_MAX, counters(1, 0), 0)
        );
        for minute in 0..5_000 {
            recorder.record(at(60 * (60_000 + minute)), counters(21 + minute, 1));
        }
        assert_eq!(recorder.minutes.len(), MINUTES_MAX);
        assert_eq!(recorder.day().iter().map(Totals::received).sum::<u64>(), 24 * 60);
    }
}
