//! Whether a mirror is too slow to wait for.

use std::time::Duration;

/// Judges bytes against the time that was spent waiting for them, window by window. Time in which the taker of the pieces
/// was slow is not told to it and does not count.
#[derive(Debug)]
pub(super) struct Pace {
    window: Duration,
    bytes_s_min: u64,
    waited: Duration,
    bytes: u64,
}

impl Pace {
    pub(super) fn new(window: Duration, bytes_s_min: u64) -> Self {
        Self { window, bytes_s_min, waited: Duration::ZERO, bytes: 0 }
    }

    /// Takes `bytes` that took `waited` to come; true at the end of a window below the minimum rate.
    pub(super) fn too_slow(&mut self, waited: Duration, bytes: u64) -> bool {
        self.waited += waited;
        self.bytes += bytes;
        if self.waited < self.window {
            return false;
        }
        let slow = u128::from(self.bytes) * 1000 < u128::from(self.bytes_s_min) * self.waited.as_millis();
        self.waited = Duration::ZERO;
        self.bytes = 0;
        slow
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A byte a second never trips a stall timeout: it has to trip this, at the end of its first window and not before.
    #[test]
    fn a_byte_a_second_is_too_slow() {
        let mut pace = Pace::new(Duration::from_secs(10), 100);
        let second = Duration::from_secs(1);
        for _ in 0..9 {
            assert!(!pace.too_slow(second, 1));
        }
        assert!(pace.too_slow(second, 1));
        for _ in 0..30 {
            assert!(!pace.too_slow(second, 100), "just fast enough");
        }
        assert!(!pace.too_slow(Duration::from_secs(9), 0), "a pause within a window");
        assert!(!pace.too_slow(second, 1000));
        assert!(pace.too_slow(Duration::from_secs(10), 999));
    }
}
