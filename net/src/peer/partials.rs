//! Files that are being downloaded here and are given to others meanwhile, piece by piece.

use super::Audience;
use crate::swarm::FileShape;
use crate::swarm::bits::Bits;
use crate::swarm::piece_list::PieceList;
use parking_lot::RwLock;
use poolfs_core::Digest;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Downloads that are given from at once; more are simply not given.
const PARTIALS_MAX: usize = 1024;

/// A download in progress that has a signed piece list.
#[derive(Clone, Debug)]
pub struct Partial {
    /// The incoming file, open for reading only.
    pub file: Arc<OwnedFd>,
    /// What it is to become.
    pub shape: FileShape,
    /// The list that each piece is checked against once more before it is sent.
    pub list: Arc<PieceList>,
    /// The pieces that are here and match the list.
    pub have: Bits,
    /// Strangers do not get it: it comes from a source that strangers are not to hear of.
    pub fleet_only: bool,
}

/// The downloads that are given from, by digest: filled by who downloads, read by the server.
#[derive(Debug, Default)]
pub struct Partials {
    by_digest: RwLock<HashMap<Digest, Partial>>,
}

impl Partials {
    /// Offers a download, or replaces what was said of it. `false`: there are too many, it is not given.
    pub fn put(&self, partial: Partial) -> bool {
        let mut all = self.by_digest.write();
        let digest = partial.shape.digest;
        let room = all.len() < PARTIALS_MAX || all.contains_key(&digest);
        if room {
            all.insert(digest, partial);
        }
        room
    }

    /// Piece `index` is here and matches the list; `false` if the download is not offered.
    pub fn arrived(&self, digest: &Digest, index: u32) -> bool {
        self.by_digest.write().get_mut(digest).map(|partial| partial.have.set(index)).is_some()
    }

    /// Gives it no longer: it is whole, was given up, or its list was found false.
    pub fn remove(&self, digest: &Digest) {
        self.by_digest.write().remove(digest);
    }

    /// What is offered to `to` under this digest.
    pub fn get(&self, digest: &Digest, to: Audience) -> Option<Partial> {
        self.by_digest.read().get(digest).filter(|partial| to == Audience::Fleet || !partial.fleet_only).cloned()
    }

    /// How many downloads are offered.
    pub fn len(&self) -> usize {
        self.by_digest.read().len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
