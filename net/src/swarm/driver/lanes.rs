//! How many pieces a machine asks the members of its fleet for at once, over all its downloads.
//!
//! A line that many requests share brings all of them late: their connections starve each other, requests are given up that were
//! half answered, and the mirror, which is on the same line, seems dead. So there are fewer when pieces take long and more when they
//! come soon. The mirror's pieces have a measure of their own, [`crate::swarm::fleet::Asker`]'s.

use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Requests at once: at the start, at least and at most.
const LANES_FIRST: usize = 32;
const LANES_MIN: usize = 8;
const LANES_MAX: usize = 128;

/// A piece that took longer costs a lane, one that came sooner brings another.
const SLOW: Duration = Duration::from_secs(4);
const QUICK: Duration = Duration::from_secs(2);

/// See the module. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Lanes {
    free: Arc<Semaphore>,
    all: Arc<Mutex<usize>>,
}

impl Default for Lanes {
    fn default() -> Self {
        Self { free: Arc::new(Semaphore::new(LANES_FIRST)), all: Arc::new(Mutex::new(LANES_FIRST)) }
    }
}

impl Lanes {
    /// Waits for a free lane. Cancelling it loses nothing but the place.
    pub(super) async fn enter(&self) -> Lane {
        let place = Arc::clone(&self.free).acquire_owned().await.expect("never closed");
        Lane { lanes: self.clone(), place }
    }

    fn leave(&self, place: OwnedSemaphorePermit, took: Duration) {
        let mut all = self.all.lock();
        if took > SLOW && *all > LANES_MIN {
            *all -= 1;
            place.forget();
        } else if took < QUICK && *all < LANES_MAX {
            *all += 1;
            self.free.add_permits(1);
        }
    }
}

/// A lane that is taken; dropping it frees it and says nothing of the line.
#[derive(Debug)]
pub(super) struct Lane {
    lanes: Lanes,
    place: OwnedSemaphorePermit,
}

impl Lane {
    /// The piece that was asked for then is here.
    pub(super) fn brought(self, began: Instant, now: Instant) {
        self.lanes.leave(self.place, now.saturating_duration_since(began));
    }

    /// The request that began then is given up: that says something only if it took long.
    pub(super) fn given_up(self, began: Instant, now: Instant) {
        self.lanes.leave(self.place, now.saturating_duration_since(began).max(QUICK));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use tokio::time::timeout;

    async fn enter_all(lanes: &Lanes) -> Vec<Lane> {
        let mut all = Vec::new();
        while let Ok(lane) = timeout(Duration::from_millis(1), lanes.enter()).await {
            all.push(lane);
        }
        all
    }

    /// A slow line is left with few requests and not with none; one that is quick again has many again.
    #[tokio::test(start_paused = true)]
    async fn as_many_as_the_line_bears() {
        let (lanes, now) = (Lanes::default(), Instant::now());
        for (took, want) in [(SLOW, LANES_FIRST), (SLOW + QUICK, LANES_MIN), (Duration::ZERO, LANES_MAX)] {
            for _ in 0..LANES_MAX {
                lanes.enter().await.brought(now, now + took);
            }
            assert_eq!(enter_all(&lanes).await.len(), want, "pieces took {took:?}");
        }
    }

    /// What is cancelled or given up without an answer says nothing, and leaves no lane taken.
    #[tokio::test(start_paused = true)]
    async fn nothing_is_lost() {
        let lanes = Lanes::default();
        let all = enter_all(&lanes).await;
        assert_eq!(all.len(), LANES_FIRST);
        assert!(timeout(Duration::from_millis(1), lanes.enter()).await.is_err(), "there is no more");
        let now = Instant::now();
        all.into_iter().for_each(|lane| lane.given_up(now, now));
        assert_eq!(enter_all(&lanes).await.len(), LANES_FIRST);
    }
}
