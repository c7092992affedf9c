//! The upload rate: a bucket that fills with time and may be emptied at once.

use parking_lot::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// How much of a second's bytes may go at once.
const BURST: Duration = Duration::from_millis(500);

/// One rate for all who share it. Each taker is told from when on it may send; who asks first goes first.
#[derive(Debug)]
pub(super) struct Bucket {
    bytes_s: AtomicU64,
    /// When all that was taken is paid for at this rate, counted from a start with a full bucket.
    paid: Mutex<Instant>,
}

impl Bucket {
    /// A full bucket of `bytes_s` bytes a second.
    pub(super) fn new(bytes_s: u64) -> Self {
        Self { bytes_s: AtomicU64::new(bytes_s), paid: Mutex::new(Instant::now()) }
    }

    /// Whether nothing ever comes out of it.
    pub(super) fn is_shut(&self) -> bool {
        self.bytes_s.load(Ordering::Relaxed) == 0
    }

    /// Another rate from now on; what was taken stays paid at the old one.
    pub(super) fn set(&self, bytes_s: u64) {
        self.bytes_s.store(bytes_s, Ordering::Relaxed);
    }

    /// Takes `bytes` and gives the time from which on they may be sent.
    pub(super) fn take(&self, bytes: usize) -> Instant {
        let now = Instant::now();
        let nanos = bytes as u128 * 1_000_000_000 / u128::from(self.bytes_s.load(Ordering::Relaxed).max(1));
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let mut paid = self.paid.lock();
        let before = (*paid).max(now);
        *paid = before + cost;
        // The bucket lends a burst: what is within it goes at once.
        (*paid).checked_sub(BURST).map_or(now, |at| at.max(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bucket that lends more than its burst, or forgets what it lent, is no limit; one that never refills is a wall.
    #[tokio::test(start_paused = true)]
    async fn gives_its_rate() {
        let bucket = Bucket::new(1_000_000);
        let start = Instant::now();
        let ms = |at: Instant| at.duration_since(start).as_millis();
        assert_eq!(ms(bucket.take(400_000)), 0);
        assert_eq!(ms(bucket.take(100_000)), 0, "the burst is spent");
        assert_eq!(ms(bucket.take(100_000)), 100);
        assert_eq!(ms(bucket.take(300_000)), 400, "who asks later waits behind");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(ms(bucket.take(500_000)), 1000, "full again, and not fuller");
        assert_eq!(ms(bucket.take(1_000)), 1001);
        bucket.set(100_000);
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(ms(bucket.take(60_000)), 61_100, "a tenth of the rate, and a tenth of the burst");
        assert!(!bucket.is_shut() && Bucket::new(0).is_shut());
        bucket.set(0);
        assert!(bucket.is_shut());
    }
}
