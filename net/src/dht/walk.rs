//! One family's part of a lookup: which node is asked next, and when the closest ones are known.
//!
//! Knows no clock and no datagram: it is told what was sent, answered, silent and unreachable. The closest [`K`] candidates
//! that are neither silent nor unreachable are asked, closest first, a bounded number at a time; when all of them have
//! answered, they are the result. On a public network one candidate of a /24 or /48 counts among them.

use super::address::{Network, Prefix};
use super::table::K;
use crate::krpc::{Id, NodeInfo};

/// Candidates kept: the farthest that nobody asked are given up.
pub const CANDIDATES_MAX: usize = 64;

/// Nodes that one answer can add.
pub const NODES_PER_ANSWER_MAX: usize = 2 * K;

/// Queries more than usual under way where nodes are silent: one for each of them up to this.
pub const EXTRA_MAX: usize = 2;

/// What became of a candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Not asked yet.
    Fresh,
    /// Asked, and within its time.
    Waiting,
    /// Asked, past its time; may still answer.
    Silent,
    /// Answered, now or for an earlier key of the same region.
    Answered,
    /// Unreachable, not who it should be, or not to be asked now.
    Failed,
}

/// A node that the walk has heard of.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Id and address as told.
    pub info: NodeInfo,
    /// What became of it.
    pub state: State,
    /// Steps from the own table, 0 for a node in it.
    pub hop: u8,
    /// What it gave for an announce of this very key.
    pub token: Option<Vec<u8>>,
    /// Whether it is a poolfs node.
    pub poolfs: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Walk {
    target: Id,
    own: Id,
    network: Network,
    concurrency: usize,
    candidates: Vec<Candidate>,
}

impl Walk {
    /// A walk towards `target` by the node `own`, with at most `concurrency` queries under way.
    pub fn new(target: Id, own: Id, network: Network, concurrency: usize) -> Self {
        Self { target, own, network, concurrency, candidates: Vec::new() }
    }

    /// Where it goes.
    pub fn target(&self) -> Id {
        self.target
    }

    /// Every candidate, closest first.
    pub fn candidates(&self) -> &[Candidate] {
        &self.candidates
    }

    /// Adds a candidate unless its id or address is there already; the caller has checked the address.
    pub fn add(&mut self, info: NodeInfo, hop: u8, state: State, poolfs: bool) {
        if info.id == self.own || self.candidates.iter().any(|c| c.info.id == info.id || c.info.addr == info.addr) {
            return;
        }
        let distance = info.id.distance(&self.target);
        let at = self.candidates.partition_point(|c| c.info.id.distance(&self.target) < distance);
        self.candidates.insert(at, Candidate { info, state, hop, token: None, poolfs });
        if self.candidates.len() > CANDIDATES_MAX {
            match self.candidates.iter().rposition(|c| matches!(c.state, State::Fresh | State::Failed)) {
                Some(far) => drop(self.candidates.remove(far)),
                None => drop(self.candidates.pop()),
            }
        }
    }

    /// The closest candidates that count: not silent, not failed, one of a prefix; at most [`K`].
    fn counting(&self) -> impl Iterator<Item = (usize, &Candidate)> {
        let mut seen: Vec<Prefix> = Vec::new();
        let public = self.network == Network::Public;
        let live = self.candidates.iter().enumerate().filter(|(_, c)| !matches!(c.state, State::Silent | State::Failed));
        live.filter(move |(_, c)| {
            let prefix = Prefix::of(c.info.addr.ip());
            let first = !public || !seen.contains(&prefix);
            if public && first {
                seen.push(prefix);
            }
            first
        })
        .take(K)
    }

    /// Whom to ask now; it counts as asked from here on.
    pub fn next_to_ask(&mut self) -> Option<(NodeInfo, u8)> {
        let count = |state| self.candidates.iter().filter(|c| c.state == state).count();
        if count(State::Waiting) >= self.concurrency + count(State::Silent).min(EXTRA_MAX) {
            return None;
        }
        let at = self.counting().find(|(_, c)| c.state == State::Fresh).map(|(at, _)| at)?;
        self.candidates[at].state = State::Waiting;
        Some((self.candidates[at].info, self.candidates[at].hop))
    }

    fn find(&mut self, info: &NodeInfo) -> Option<&mut Candidate> {
        self.candidates.iter_mut().find(|c| c.info == *info)
    }

    /// Its query could not be sent yet: it is asked later.
    pub fn postponed(&mut self, info: &NodeInfo) {
        self.set(info, State::Waiting, State::Fresh);
    }

    /// Past its time; its place goes to the next.
    pub fn silent(&mut self, info: &NodeInfo) {
        self.set(info, State::Waiting, State::Silent);
    }

    /// Will not answer any more.
    pub fn failed(&mut self, info: &NodeInfo) {
        self.set(info, State::Waiting, State::Failed);
        self.set(info, State::Silent, State::Failed);
    }

    fn set(&mut self, info: &NodeInfo, from: State, to: State) {
        if let Some(candidate) = self.find(info).filter(|c| c.state == from) {
            candidate.state = to;
        }
    }

    /// The node that was asked as `old` says that it is `new`, at the same address: it takes a new place in the order. Returns
    /// whether it was asked and can count under the new id.
    pub fn renamed(&mut self, old: &NodeInfo, new: NodeInfo) -> bool {
        let Some(at) = self.candidates.iter().position(|c| c.info == *old && matches!(c.state, State::Waiting | State::Silent)) else {
            return false;
        };
        if new.id == self.own || self.candidates.iter().any(|c| c.info.id == new.id) {
            self.candidates[at].state = State::Failed;
            return false;
        }
        let mut candidate = self.candidates.remove(at);
        candidate.info = new;
        let distance = new.id.distance(&self.target);
        let at = self.candidates.partition_point(|c| c.info.id.distance(&self.target) < distance);
        self.candidates.insert(at, candidate);
        true
    }

    /// Answered, late or in time. Returns its hop; `None` if nothing was asked of it or it had answered already.
    pub fn answered(&mut self, info: &NodeInfo, nodes: &[NodeInfo], token: Option<Vec<u8>>, poolfs: bool) -> Option<u8> {
        let candidate = self.find(info).filter(|c| c.state != State::Answered && c.state != State::Fresh)?;
        candidate.state = State::Answered;
        candidate.token = token;
        candidate.poolfs = poolfs;
        let hop = candidate.hop;
        for node in nodes.iter().take(NODES_PER_ANSWER_MAX) {
            self.add(*node, hop.saturating_add(1), State::Fresh, false);
        }
        Some(hop)
    }

    /// Whether the [`K`] closest have answered. With `give_up_silent`, fewer will do if none can be asked any more.
    pub fn is_finished(&self, give_up_silent: bool) -> bool {
        let mut counted = 0;
        for (_, candidate) in self.counting() {
            if candidate.state != State::Answered {
                return false;
            }
            counted += 1;
        }
        counted == K || give_up_silent || !self.candidates.iter().any(|c| c.state == State::Silent)
    }

    /// Whether only silent nodes could still change the result.
    pub fn waits_for_silent_only(&self) -> bool {
        !self.is_finished(false) && self.is_finished(true)
    }

    /// Whether anybody answered.
    pub fn has_answer(&self) -> bool {
        self.candidates.iter().any(|c| c.state == State::Answered)
    }

    /// The closest that answered, closest first, at most [`K`].
    pub fn closest(&self) -> Vec<Candidate> {
        self.counting().filter(|(_, c)| c.state == State::Answered).map(|(_, c)| c.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::net::{Ipv4Addr, SocketAddr};

    fn node(n: u8) -> NodeInfo {
        let mut id = [0; 20];
        id[0] = n;
        NodeInfo { id: Id(id), addr: SocketAddr::new(Ipv4Addr::new(8, 8, n, 8).into(), 9977) }
    }

    fn walk(network: Network) -> Walk {
        Walk::new(Id([0; 20]), Id([0xff; 20]), network, 3)
    }

    /// Closest first, no more than the concurrency; a silent one's place goes on and its late answer counts.
    #[test]
    fn asks_the_closest() {
        let mut walk = walk(Network::Private);
        (1..=20).rev().for_each(|n| walk.add(node(n), 0, State::Fresh, false));
        let asked: Vec<u8> = std::iter::from_fn(|| walk.next_to_ask()).map(|(n, _)| n.id.0[0]).collect();
        assert_eq!(asked, [1, 2, 3]);
        walk.silent(&node(1));
        assert_eq!(walk.next_to_ask().map(|n| n.0), Some(node(4)));
        assert_eq!(walk.answered(&node(1), &[], None, false), Some(0));
        assert_eq!(walk.answered(&node(1), &[], None, false), None, "a second answer is ignored");
        assert_eq!(walk.answered(&node(9), &[], None, false), None, "nobody asked it");
        walk.failed(&node(2));
        for n in [3, 4, 5, 6, 7, 8] {
            while walk.next_to_ask().is_some() {}
            assert!(!walk.is_finished(true));
            walk.answered(&node(n), &[], None, false);
        }
        while walk.next_to_ask().is_some() {}
        walk.answered(&node(9), &[], None, false);
        assert!(walk.is_finished(false));
        let closest: Vec<u8> = walk.closest().iter().map(|c| c.info.id.0[0]).collect();
        assert_eq!(closest, [1, 3, 4, 5, 6, 7, 8, 9]);
    }

    /// A flood of nodes in an answer neither grows the walk nor drives out those that answered.
    #[test]
    fn bounded() {
        let mut walk = walk(Network::Private);
        walk.add(node(200), 0, State::Fresh, false);
        walk.next_to_ask();
        let many: Vec<NodeInfo> = (1..=100).map(node).collect();
        walk.answered(&node(200), &many, None, false);
        assert_eq!(walk.candidates().len(), 1 + NODES_PER_ANSWER_MAX);
        many.iter().for_each(|n| walk.add(*n, 1, State::Fresh, false));
        assert_eq!(walk.candidates().len(), CANDIDATES_MAX);
        assert!(walk.has_answer());
        assert_eq!(walk.next_to_ask(), Some((node(1), 1)));
    }

    /// Fifty ids of one /24 near the key are one candidate on a public network.
    #[test]
    fn one_of_a_prefix() {
        let mut walk = walk(Network::Public);
        for n in 1..=50 {
            walk.add(NodeInfo { addr: SocketAddr::new(Ipv4Addr::new(9, 9, 9, n).into(), 9977), ..node(n) }, 0, State::Fresh, false);
        }
        walk.add(node(60), 0, State::Fresh, false);
        let asked: Vec<u8> = std::iter::from_fn(|| walk.next_to_ask()).map(|(n, _)| n.id.0[0]).collect();
        assert_eq!(asked, [1, 60]);
    }

    /// In a small network the walk ends although a silent node is left, once the caller gives it up.
    #[test]
    fn small_networks_end() {
        let mut walk = walk(Network::Private);
        assert!(walk.is_finished(false) && !walk.has_answer());
        (1..=3).for_each(|n| walk.add(node(n), 0, State::Fresh, false));
        while walk.next_to_ask().is_some() {}
        walk.answered(&node(1), &[], None, true);
        walk.answered(&node(2), &[], None, true);
        assert!(!walk.is_finished(true));
        walk.silent(&node(3));
        assert!(walk.waits_for_silent_only());
        walk.failed(&node(3));
        assert!(walk.is_finished(false));
    }
}
