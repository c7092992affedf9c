//! What liars may cost in an hour, over all downloads.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The window over which waste is counted.
pub const BUDGET_WINDOW: Duration = Duration::from_secs(3600);

/// Bytes that may be wasted in the window besides one second round.
pub const WASTE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Entries kept: past this the oldest two become one, which keeps the sum and forgets it later.
const ENTRIES_MAX: usize = 256;

/// The waste of the last hour: the rounds of one download whatever its size, and [`WASTE_BYTES_MAX`].
///
/// "Waste" is bytes from peers that had to be asked for again. What the mirror sends instead is not counted: stock apt
/// would have asked it for the same.
#[derive(Debug, Default)]
pub struct WasteBudget {
    round_at: Option<Instant>,
    spent: VecDeque<(Instant, u64)>,
}

impl WasteBudget {
    /// Nothing wasted yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes wasted in the last hour besides the one second round.
    pub fn spent_bytes(&self, now: Instant) -> u64 {
        self.spent.iter().filter(|(at, _)| within(*at, now)).map(|(_, bytes)| bytes).sum()
    }

    /// Whether a file of `size` bytes may be asked of peers at all: past the budget, the mirror only.
    pub fn peers_allowed(&self, size: u64, now: Instant) -> bool {
        self.round_is_free(now) || self.spent_bytes(now).saturating_add(size) <= WASTE_BYTES_MAX
    }

    /// Takes the hour's one leave to repeat a download whatever its size; `false` if it is taken.
    pub fn take_round(&mut self, now: Instant) -> bool {
        let free = self.round_is_free(now);
        if free {
            self.round_at = Some(now);
        }
        free
    }

    /// Takes leave to waste `bytes` more; `false` if the hour has less left.
    pub fn take_bytes(&mut self, bytes: u64, now: Instant) -> bool {
        if self.spent_bytes(now).saturating_add(bytes) > WASTE_BYTES_MAX {
            return false;
        }
        self.charge(bytes, now);
        true
    }

    /// Notes waste that has already happened.
    pub fn charge(&mut self, bytes: u64, now: Instant) {
        while self.spent.front().is_some_and(|(at, _)| !within(*at, now)) {
            self.spent.pop_front();
        }
        if self.spent.len() >= ENTRIES_MAX
            && let (Some((_, oldest)), Some(next)) = (self.spent.pop_front(), self.spent.front_mut())
        {
            next.1 = next.1.saturating_add(oldest);
        }
        self.spent.push_back((now, bytes));
    }

    fn round_is_free(&self, now: Instant) -> bool {
        self.round_at.is_none_or(|at| !within(at, now))
    }
}

fn within(at: Instant, now: Instant) -> bool {
    now.saturating_duration_since(at) < BUDGET_WINDOW
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    /// One second round of any size and 64 MiB, then nothing until the hour is over.
    #[test]
    fn one_round_and_64_mib_an_hour() {
        let start = Instant::now();
        let mut budget = WasteBudget::new();
        assert!(budget.peers_allowed(1000 * MIB, start));
        assert!(budget.take_round(start));
        assert!(!budget.peers_allowed(65 * MIB, start));
        assert!(!budget.take_round(start));
        assert!(!budget.take_bytes(65 * MIB, start));
        assert!(budget.take_bytes(60 * MIB, start));
        assert!(budget.take_bytes(4 * MIB, start));
        assert!(!budget.take_bytes(1, start));
        assert!(!budget.peers_allowed(1, start));
        let just_before = start + BUDGET_WINDOW - Duration::from_secs(1);
        assert!(!budget.peers_allowed(1, just_before));
        assert!(budget.peers_allowed(1000 * MIB, start + BUDGET_WINDOW));
        assert_eq!(budget.spent_bytes(start + BUDGET_WINDOW), 0);
    }

    /// Ten thousand small wastes keep the sum and not the memory.
    #[test]
    fn entries_are_bounded() {
        let start = Instant::now();
        let mut budget = WasteBudget::new();
        (0..10_000).for_each(|_| budget.charge(1, start));
        assert_eq!(budget.spent_bytes(start), 10_000);
        assert!(budget.spent.len() <= ENTRIES_MAX);
    }
}
