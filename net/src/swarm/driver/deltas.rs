//! What downloads know of deltas: who offered one, which is where it is asked for first, and whose claims proved false.

use super::hunt::Holder;
use super::{Swarm, now_s};
use crate::peer::DeltaClaim;
use crate::reputation::Conviction;
use parking_lot::Mutex;
use poolfs_core::Digest;
use std::collections::VecDeque;
use std::net::SocketAddr;

/// Holders remembered of all deltas; the oldest are forgotten first.
const HINTS_MAX: usize = 512;

/// Who said to have which delta, the newest last.
#[derive(Debug, Default)]
pub(super) struct Hints(Mutex<VecDeque<(Digest, SocketAddr)>>);

impl Hints {
    fn add(&self, digest: Digest, holder: SocketAddr) {
        let mut hints = self.0.lock();
        hints.retain(|hint| *hint != (digest, holder));
        hints.push_back((digest, holder));
        while hints.len() > HINTS_MAX {
            hints.pop_front();
        }
    }

    /// Who is to be asked for a file that no mirror has.
    pub(super) fn holders(&self, digest: &Digest) -> Vec<Holder> {
        let hints = self.0.lock();
        hints.iter().filter(|(of, _)| of == digest).map(|(_, contact)| Holder { contact: *contact, have: None }).collect()
    }
}

impl Swarm {
    /// Somebody said to have the file with this digest, which no index names: it is asked there when it is wanted.
    pub fn hint(&self, digest: Digest, holder: SocketAddr) {
        if !self.book.lock().verdicts.address_is_out(holder.ip(), now_s()) {
            self.hints.add(digest, holder);
        }
    }

    /// Whether nothing signed by `key` counts.
    pub fn key_is_out(&self, key: &[u8; 32]) -> bool {
        self.book.lock().verdicts.key_is_out(key, now_s())
    }

    /// Takes down that the delta of a signed claim does not make what it says, a file of `size` bytes, found with the right old file
    /// at hand. The claim with the delta is its own proof: whoever has the old file finds the same. `delta`: its bytes, where
    /// others may be told; `is_public`: strangers too.
    pub fn false_claim(&self, claim: &DeltaClaim, size: u64, delta: Option<Vec<u8>>, is_public: bool) {
        tracing::info!(new = %claim.new, delta = %claim.delta, "a delta that was vouched for does not make its file; nothing signed by that key counts now");
        let told = delta.map(|delta| Conviction::FalseDelta { claim: *claim, size, delta, is_public });
        self.book.lock().false_claim(claim.signer, told, now_s());
        self.save();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Strangers' offers must not grow memory, and the newest holders are the ones that still have it.
    #[test]
    fn hints_are_bounded() {
        let hints = Hints::default();
        let at = |port| SocketAddr::from(([192, 0, 2, 1], port));
        let digest = Digest::of(b"delta");
        for port in 1..=u16::try_from(HINTS_MAX + 3).unwrap_or(0) {
            hints.add(digest, at(port));
        }
        hints.add(digest, at(9));
        let holders: Vec<SocketAddr> = hints.holders(&digest).into_iter().map(|holder| holder.contact).collect();
        assert_eq!((holders.len(), holders.first(), holders.last()), (HINTS_MAX, Some(&at(4)), Some(&at(9))));
        assert!(hints.holders(&Digest::of(b"another")).is_empty());
    }
}
