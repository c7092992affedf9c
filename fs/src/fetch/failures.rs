//! Files that could not be had lately.

use super::FetchError;
use poolfs_core::Digest;
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

/// The memory; bounded in time and number.
#[derive(Debug)]
pub(super) struct Failures {
    lasts: Duration,
    files_max: usize,
    by_digest: HashMap<Digest, (Instant, FetchError)>,
    /// In the order of failing; may name what was removed since.
    order: VecDeque<(Instant, Digest)>,
}

impl Failures {
    pub(super) fn new(lasts: Duration, files_max: usize) -> Self {
        Self { lasts, files_max, by_digest: HashMap::new(), order: VecDeque::new() }
    }

    pub(super) fn insert(&mut self, digest: Digest, error: FetchError, now: Instant) {
        self.by_digest.insert(digest, (now, error));
        self.order.push_back((now, digest));
        while let Some((since, oldest)) = self.order.front().copied()
            && (self.order.len() > self.files_max || now.duration_since(since) >= self.lasts)
        {
            self.order.pop_front();
            // Not if it failed again later.
            if self.by_digest.get(&oldest).is_some_and(|(at, _)| *at == since) {
                self.by_digest.remove(&oldest);
            }
        }
    }

    pub(super) fn get(&self, digest: &Digest, now: Instant) -> Option<&FetchError> {
        self.by_digest.get(digest).filter(|(since, _)| now.duration_since(*since) < self.lasts).map(|(_, error)| error)
    }

    pub(super) fn remove(&mut self, digest: &Digest) {
        self.by_digest.remove(digest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ghost that was withdrawn has to come back after its time, and a thousand failures must not become a leak.
    #[test]
    fn forgets_by_time_and_number() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let digest = |n: u8| Digest([n; 32]);
        let error = |n| FetchError::Wrong { digest: digest(n) };
        let mut failures = Failures::new(Duration::from_secs(600), 2);
        failures.insert(digest(1), error(1), at(0));
        assert!(failures.get(&digest(1), at(599)).is_some());
        assert!(failures.get(&digest(1), at(600)).is_none());
        failures.insert(digest(1), error(1), at(300));
        assert!(failures.get(&digest(1), at(899)).is_some(), "failed again");
        failures.insert(digest(2), error(2), at(301));
        failures.insert(digest(3), error(3), at(302));
        let here: Vec<u8> = (1..=3).filter(|n| failures.get(&digest(*n), at(303)).is_some()).collect();
        assert_eq!(here, [2, 3], "the oldest made room");
        failures.remove(&digest(3));
        assert!(failures.get(&digest(3), at(303)).is_none());
        failures.insert(digest(4), error(4), at(2000));
        assert_eq!((failures.by_digest.len(), failures.order.len()), (1, 1));
    }
}
