//! The way out: pieces to who waits for them, in the units that they count in.

use super::kept::sealed;
use super::way::{DeliverySender, Room};
use super::{Giver, History, SwarmDelivery, SwarmError, SwarmWant};
use crate::swarm::FileShape;
use poolfs_core::piece::{self, PIECE_BYTES};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;

/// What goes out, and what went.
pub(super) struct Outlet<'a, T> {
    out: &'a DeliverySender<T>,
    wrap: &'a (dyn Fn(SwarmDelivery) -> T + Send + Sync),
    shape: FileShape,
    /// Pieces of [`PIECE_BYTES`] that were not handed over yet.
    missing: BTreeSet<u32>,
    givers: Vec<Option<Giver>>,
    sent: u64,
}

impl<'a, T: Send> Outlet<'a, T> {
    pub(super) fn new(want: &SwarmWant, out: &'a DeliverySender<T>, wrap: &'a (dyn Fn(SwarmDelivery) -> T + Send + Sync)) -> Self {
        let pieces = usize::try_from(piece::count(want.size, PIECE_BYTES)).expect("the catalog refuses such a size");
        let missing = want.missing.iter().copied().filter(|index| (*index as usize) < pieces).collect();
        Self { out, wrap, shape: FileShape::of(want.digest, want.size), missing, givers: vec![None; pieces], sent: 0 }
    }

    /// The channel, to wait for room in it.
    pub(super) fn channel(&self) -> &'a DeliverySender<T> {
        self.out
    }

    /// Deliveries so far.
    pub(super) fn sent(&self) -> u64 {
        self.sent
    }

    /// Whether the delivery with this number, counted from 1, was surely dealt with: a later one was taken, and each is dealt
    /// with before the next is taken. To be asked with no room reserved.
    pub(super) fn is_settled(&self, nth: u64) -> bool {
        self.sent.saturating_sub(self.out.waiting() as u64) > nth
    }

    /// Sends a delivery of nothing: when it is taken, everything before it was dealt with.
    pub(super) fn mark(&mut self, room: Room<'_, T>) {
        self.sent += 1;
        room.send((self.wrap)(SwarmDelivery::Checking { bytes: 0 }));
    }

    pub(super) fn missing(&self) -> &BTreeSet<u32> {
        &self.missing
    }

    /// Whether all of a piece of the swarm's was here or was handed over.
    pub(super) fn has(&self, piece: u32) -> bool {
        self.parts(piece).all(|index| !self.missing.contains(&index))
    }

    /// The pieces of [`PIECE_BYTES`] that make a piece of the swarm's.
    pub(super) fn parts(&self, piece: u32) -> impl Iterator<Item = u32> + use<T> {
        let span = piece::span(u64::from(piece), self.shape.size, self.shape.piece_bytes);
        let parts = piece::covering(span, self.shape.size, PIECE_BYTES);
        parts.map(|index| u32::try_from(index).expect("the catalog refuses such a size"))
    }

    /// One part of a piece of the swarm's, cut out of it.
    pub(super) fn cut(&self, piece: u32, index: u32, whole: &OwnedFd) -> io::Result<OwnedFd> {
        let from = piece::span(u64::from(piece), self.shape.size, self.shape.piece_bytes);
        let part = piece::span(u64::from(index), self.shape.size, PIECE_BYTES);
        if from == part {
            return whole.try_clone();
        }
        let mut bytes = vec![0; usize::try_from(part.end - part.start).expect("at most PIECE_BYTES")];
        File::from(whole.try_clone()?).read_exact_at(&mut bytes, part.start - from.start)?;
        sealed(&bytes)
    }

    /// Hands a part over, waiting for room.
    pub(super) async fn send(&mut self, index: u32, bytes: OwnedFd, giver: Giver) -> Result<(), SwarmError> {
        let room = self.out.reserve().await.map_err(|_| SwarmError::Unwanted)?;
        self.put(room, index, bytes, giver);
        Ok(())
    }

    /// Hands a part over where there is room.
    pub(super) fn put(&mut self, room: Room<'_, T>, index: u32, bytes: OwnedFd, giver: Giver) {
        self.missing.remove(&index);
        if let Some(slot) = self.givers.get_mut(index as usize) {
            *slot = Some(giver.clone());
        }
        self.sent += 1;
        room.send((self.wrap)(SwarmDelivery::Piece { index, bytes, giver }));
    }

    /// Says that bytes came in to be compared; `false` if there is no room to say so now.
    pub(super) fn checking(&mut self, bytes: u64) -> bool {
        let Some(room) = self.out.try_reserve() else { return false };
        self.sent += 1;
        room.send((self.wrap)(SwarmDelivery::Checking { bytes }));
        true
    }
}

impl<T> Outlet<'_, T> {
    pub(super) fn shape(&self) -> &FileShape {
        &self.shape
    }

    /// Who gave what was handed over.
    pub(super) fn history(&self, now_s: u64) -> History {
        let mut givers: BTreeMap<String, Vec<u32>> = BTreeMap::new();
        for (index, giver) in (0u32..).zip(&self.givers) {
            match giver {
                Some(Giver::Mirror(host)) => givers.entry(host.clone()).or_default().push(index),
                Some(Giver::Peer(address)) => givers.entry(address.to_string()).or_default().push(index),
                None => {}
            }
        }
        History { size: self.shape.size, piece_bytes: PIECE_BYTES, done_at: now_s, givers }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::swarm::driver::way;
    use poolfs_core::Digest;

    /// A piece that is on its way to who writes it must not be read back from the file: it would be zeros, and the mirror's file wrong.
    #[tokio::test]
    async fn a_piece_is_settled_when_the_one_after_it_is_taken() {
        let (digest, size) = (Digest::of(b"x"), 3 * u64::from(PIECE_BYTES));
        let want = SwarmWant { digest, size, urls: vec![], missing: vec![0, 1, 2], incoming: None, repair: false, fleet_only: false };
        let (out, mut deliveries) = way();
        let mut outlet = Outlet::new(&want, &out, &|delivery| delivery);
        for index in 0..3 {
            outlet.send(index, sealed(b"piece").unwrap(), Giver::Mirror("here".into())).await.unwrap();
            assert!(matches!(deliveries.pass_on().await, Some(SwarmDelivery::Piece { .. })));
        }
        assert!(!outlet.is_settled(1), "all are on their way");
        deliveries.taker().took();
        assert!(!outlet.is_settled(1), "it is being written");
        deliveries.taker().took();
        assert!(outlet.is_settled(1) && !outlet.is_settled(2));
    }
}
