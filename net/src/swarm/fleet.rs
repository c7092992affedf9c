//! The fleet: machines that share out the mirror's load, so that many of them cost it one copy.
//!
//! A file's pieces are cut in groups of [`GROUP_PIECES`]. Each group has a coordinator, the live member with the greatest
//! weight by rendezvous hash, so everybody finds it without an election. It hands out *leases* ("take these from the mirror")
//! and addresses of holders ("from these members"), and never fetches for anybody. [`Coordinator`] is that side,
//! [`Asker`] is the side of who wants a file; every member runs both.
//!
//! Views differ for a while when members come and go: a coordinator that is not first in its own view names the one that is
//! (`see`), and only one of strictly greater weight, so that an asker never goes in a circle. Nothing said here is believed
//! of the bytes: they go through blame like all others.
//!
//! **Invariants:** only known members are ever connected to, whatever a coordinator says; a lone machine never enters this
//! code; a piece is fetched from the mirror at most three times in ten minutes by leave of one coordinator.

mod asker;
mod coordinator;
#[cfg(any(test, feature = "testnet"))]
pub mod sim;
#[cfg(test)]
mod tests;

pub use asker::{AskDo, Asker, GROUPS_AT_ONCE, Origin};
pub use coordinator::{Answer, Coordinator, GROUPS_MAX, HELD_MAX, Local};

use super::FileShape;
use parking_lot::Mutex;
use poolfs_core::Digest;
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// Pieces of one group: what is asked of a coordinator at once.
pub const GROUP_PIECES: u32 = 16;

/// Members of a fleet; past that a sample is the fleet.
pub const MEMBERS_MAX: usize = 4_096;

/// Coordinators that are tried for a group, by weight.
pub const RANKS: usize = 3;

/// Groups whose ranks are remembered for one view.
const RANKED_GROUPS_MAX: usize = 10_000;

/// Members remembered by weight for each group: some may be down for the asker.
const RANKED_MAX: usize = 8;

/// A member: the first 20 bytes of SHA-256 of its key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MemberId(pub [u8; 20]);

/// One group of one file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GroupKey {
    /// The file.
    pub digest: Digest,
    /// Which group of its pieces.
    pub group: u32,
}

/// A live member.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Member {
    /// Who.
    pub id: MemberId,
    /// Where it serves.
    pub contact: SocketAddr,
    /// Where it serves as well, by the other family: others may name it so.
    pub also: Option<SocketAddr>,
    /// Its zone's label; holders of the asker's own zone are named first.
    pub zone: Arc<str>,
}

/// The live members as one machine sees them at one time, itself among them. A change makes a new one.
#[derive(Debug)]
pub struct View {
    members: Vec<Member>,
    by_id: HashMap<MemberId, usize>,
    by_contact: HashMap<SocketAddr, usize>,
    ranked: Mutex<HashMap<GroupKey, Arc<[MemberId]>>>,
}

impl View {
    /// A view of these members; past [`MEMBERS_MAX`] the rest is left out.
    pub fn new(members: impl IntoIterator<Item = Member>) -> Self {
        let members: Vec<Member> = members.into_iter().take(MEMBERS_MAX).collect();
        let by_id = members.iter().enumerate().map(|(at, member)| (member.id, at)).collect();
        let contacts = |member: &Member| [Some(member.contact), member.also].into_iter().flatten();
        let by_contact = members.iter().enumerate().flat_map(|(at, member)| contacts(member).map(move |contact| (contact, at))).collect();
        Self { members, by_id, by_contact, ranked: Mutex::default() }
    }

    /// How many members there are.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether there is nobody.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Each member and where it serves, in no order.
    pub fn contacts(&self) -> impl Iterator<Item = (MemberId, SocketAddr)> + '_ {
        self.members.iter().map(|member| (member.id, member.contact))
    }

    /// A member by its id.
    pub fn member(&self, id: MemberId) -> Option<&Member> {
        self.by_id.get(&id).map(|at| &self.members[*at])
    }

    /// A member by where it serves: what a stranger's address is not.
    pub fn at(&self, contact: &SocketAddr) -> Option<&Member> {
        self.by_contact.get(contact).map(|at| &self.members[*at])
    }

    /// The members of greatest weight for a group, greatest first, a few more than are ever asked.
    pub fn ranked(&self, key: &GroupKey) -> Arc<[MemberId]> {
        if let Some(known) = self.ranked.lock().get(key) {
            return Arc::clone(known);
        }
        let hash = group_hash(key);
        let mut all: Vec<(u64, MemberId)> = self.members.iter().map(|member| (hashed_weight(&member.id, &hash), member.id)).collect();
        all.sort_unstable_by(|a, b| b.cmp(a));
        let top: Arc<[MemberId]> = all.into_iter().take(RANKED_MAX).map(|(_, id)| id).collect();
        let mut ranked = self.ranked.lock();
        if ranked.len() >= RANKED_GROUPS_MAX {
            ranked.clear();
        }
        ranked.insert(*key, Arc::clone(&top));
        top
    }
}

fn group_hash(key: &GroupKey) -> [u8; 32] {
    Sha256::new().chain_update(key.digest.0).chain_update(key.group.to_be_bytes()).finalize().into()
}

fn hashed_weight(member: &MemberId, group: &[u8; 32]) -> u64 {
    let all = Sha256::new().chain_update(member.0).chain_update(group).finalize();
    let (first, _) = all.split_first_chunk::<8>().expect("SHA-256 has 32 bytes");
    u64::from_be_bytes(*first)
}

/// A member's weight for a group: the first 8 bytes of SHA-256(id + SHA-256(digest + group)). The greatest coordinates.
pub fn weight(member: &MemberId, key: &GroupKey) -> u64 {
    hashed_weight(member, &group_hash(key))
}

/// How many groups a file has.
pub fn groups(shape: &FileShape) -> u32 {
    shape.pieces().div_ceil(GROUP_PIECES)
}

/// The pieces of one group as bits, the first piece in bit 0; none past the file's end.
pub fn group_bits(shape: &FileShape, group: u32) -> u16 {
    let pieces = shape.pieces().saturating_sub(group.saturating_mul(GROUP_PIECES)).min(GROUP_PIECES);
    if pieces == GROUP_PIECES { u16::MAX } else { (1u16 << pieces) - 1 }
}

/// What an asker tells a coordinator (`pf_want`).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Want {
    /// Which group.
    pub key: GroupKey,
    /// The file's size in bytes: what the group's length follows from.
    pub size: u64,
    /// The pieces of the group that the asker has.
    pub have: u16,
    /// Holders that failed it lately.
    pub bad: Vec<SocketAddr>,
    /// Coordinators that did not answer it just now: it is not sent to them, and they may be good holders all the same.
    pub silent: Vec<SocketAddr>,
    /// The mirror failed it lately.
    pub mirror_bad: bool,
    /// How long the mirror takes for a piece, where that is long: see [`Asker::mirror_pace`].
    pub mirror_pace: Option<Duration>,
    /// Pieces that the asker would begin to fetch from the mirror now: it gets no lease for more.
    pub room: u8,
    /// The asker coordinates this group itself and has just joined: it asks who has what, and for no lease.
    pub newcomer: bool,
}

/// What a coordinator answers. Several parts may come together; none at all is an answer to who has everything.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Reply {
    /// Fetch these pieces of the group from the mirror; the lease lasts so long and is renewed by each want.
    pub take: Option<(u16, Duration)>,
    /// Fetch these pieces from these members.
    pub from: Vec<(SocketAddr, u16)>,
    /// Nothing now: ask again after this.
    pub wait: Option<Duration>,
    /// Another member coordinates this group.
    pub see: Option<SocketAddr>,
    /// The coordinator gives up on the group: fetch what is missing from the mirror.
    pub free: bool,
}

/// Holders named in one reply.
pub const FROM_MAX: usize = 4;

/// Silent coordinators told in one want.
pub const SILENT_MAX: usize = RANKS;

/// Pieces from the mirror that one machine fetches at once, at most: its word for no limit.
pub const ROOM_MAX: u8 = 16;

/// Failed contacts told in one want.
pub const BAD_MAX: usize = 8;
