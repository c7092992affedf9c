//! Round-trip times and the retransmission schedule made from them.
//!
//! A query is sent at 0, d and 3d with one transaction id and the node is unreachable [`UNREACHABLE_AFTER`] the first
//! sending. d is [`DELAY_UNKNOWN`] (so 0, 2 and 6 s) until round trips are known; then smoothed RTT + 4 deviations within
//! [`DELAY_MIN`] and [`DELAY_MAX`].

use std::time::{Duration, Instant};

/// d where nothing is known: sent at 0, 2 and 6 s.
pub const DELAY_UNKNOWN: Duration = Duration::from_secs(2);

/// Smallest adapted d.
pub const DELAY_MIN: Duration = Duration::from_millis(250);

/// Largest adapted d.
pub const DELAY_MAX: Duration = Duration::from_secs(2);

/// Silence after the first sending until the node counts as failed, whatever the schedule.
pub const UNREACHABLE_AFTER: Duration = Duration::from_secs(14);

/// Answers of a family until its common estimate is used.
pub const FAMILY_SAMPLES_MIN: u32 = 8;

/// When a query is sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Schedule {
    /// At 2 and 6 s.
    Standard,
    /// At d and 3d, d from the round-trip times.
    #[default]
    Adapted,
    /// Never: for comparison in the simulator only.
    Single,
}

impl Schedule {
    /// When after the first sending the `sent`-th repetition is due (1 or 2), for this d.
    pub fn resend_after(self, sent: u8, delay: Duration) -> Option<Duration> {
        match (self, sent) {
            (Self::Single, _) => None,
            (_, 1) => Some(delay),
            (_, 2) => Some(delay * 3),
            _ => None,
        }
    }

    /// d, from what is known of the node and of its family.
    pub fn delay(self, node: Option<&Rtt>, family: &Rtt) -> Duration {
        if self != Self::Adapted {
            return DELAY_UNKNOWN;
        }
        match node {
            Some(rtt) if rtt.samples > 0 => rtt.delay(),
            _ if family.samples >= FAMILY_SAMPLES_MIN => family.delay(),
            _ => DELAY_UNKNOWN,
        }
    }
}

/// Smoothed round-trip time and mean deviation (RFC 6298).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rtt {
    smoothed_s: f32,
    deviation_s: f32,
    samples: u32,
}

impl Rtt {
    /// Takes the round trip of a query that was sent once; of one sent twice nobody knows which sending was answered.
    pub fn sample(&mut self, rtt: Duration) {
        let rtt = rtt.as_secs_f32();
        if self.samples == 0 {
            self.smoothed_s = rtt;
            self.deviation_s = rtt / 2.0;
        } else {
            self.deviation_s += ((self.smoothed_s - rtt).abs() - self.deviation_s) / 4.0;
            self.smoothed_s += (rtt - self.smoothed_s) / 8.0;
        }
        self.samples = self.samples.saturating_add(1);
    }

    /// d from these round trips.
    pub fn delay(&self) -> Duration {
        Duration::from_secs_f32((self.smoothed_s + 4.0 * self.deviation_s).max(0.0)).clamp(DELAY_MIN, DELAY_MAX)
    }

    /// The smoothed round-trip time; `None` before the first sample.
    pub fn smoothed(&self) -> Option<Duration> {
        (self.samples > 0).then(|| Duration::from_secs_f32(self.smoothed_s))
    }
}

/// A rate with a burst.
#[derive(Debug, Clone, Copy)]
pub struct Bucket {
    level: f32,
    at: Instant,
}

impl Bucket {
    /// Full.
    pub fn new(burst: f32, now: Instant) -> Self {
        Self { level: burst, at: now }
    }

    /// Takes one if there is one.
    pub fn take(&mut self, per_second: f32, burst: f32, now: Instant) -> bool {
        self.level = (self.level + now.saturating_duration_since(self.at).as_secs_f32() * per_second).min(burst);
        self.at = self.at.max(now);
        if self.level >= 1.0 {
            self.level -= 1.0;
            true
        } else {
            false
        }
    }

    /// Whether there is one, without taking it.
    pub fn has(&mut self, per_second: f32, burst: f32, now: Instant) -> bool {
        self.level = (self.level + now.saturating_duration_since(self.at).as_secs_f32() * per_second).min(burst);
        self.at = self.at.max(now);
        self.level >= 1.0
    }

    /// Whether nothing of it is used up.
    pub fn is_full(&self, per_second: f32, burst: f32, now: Instant) -> bool {
        self.level + now.saturating_duration_since(self.at).as_secs_f32() * per_second >= burst
    }

    /// When the next one will be there.
    pub fn ready_at(&self, per_second: f32) -> Instant {
        // A millisecond on top, so that rounding never wakes the caller before its time.
        self.at + Duration::from_secs_f32(((1.0 - self.level).max(0.0)) / per_second) + Duration::from_millis(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// d follows the round trips, within its limits, and the node's own come before the family's.
    #[test]
    fn delays() {
        let rtts = |rtt_ms: u64, n: usize| {
            let mut rtt = Rtt::default();
            (0..n).for_each(|_| rtt.sample(Duration::from_millis(rtt_ms)));
            rtt
        };
        assert_eq!(rtts(5, 1).delay(), DELAY_MIN);
        assert_eq!(rtts(100, 1).delay().as_millis(), 300);
        assert_eq!(rtts(1500, 1).delay(), DELAY_MAX);
        let adapted = Schedule::Adapted;
        assert_eq!(adapted.delay(None, &rtts(100, 7)), DELAY_UNKNOWN);
        assert!(adapted.delay(None, &rtts(100, 8)) < Duration::from_millis(300));
        assert_eq!(adapted.delay(Some(&rtts(100, 1)), &rtts(900, 8)).as_millis(), 300);
        assert_eq!(Schedule::Standard.delay(Some(&rtts(100, 1)), &rtts(100, 8)), DELAY_UNKNOWN);
    }

    #[test]
    fn rates() {
        let start = Instant::now();
        let mut bucket = Bucket::new(2.0, start);
        assert!(bucket.take(10.0, 2.0, start) && bucket.take(10.0, 2.0, start) && !bucket.take(10.0, 2.0, start));
        assert!(!bucket.take(10.0, 2.0, start + Duration::from_millis(99)));
        let ready = bucket.ready_at(10.0);
        assert!(bucket.take(10.0, 2.0, ready) && !bucket.take(10.0, 2.0, ready));
    }
}
