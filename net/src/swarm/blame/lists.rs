//! Step 0: signed piece lists, choosing among them, and dropping one that is contradicted.

use super::{Action, Ask, Blame, OutReason, Step, Turn, Why};
use crate::swarm::piece_list::PieceList;
use crate::swarm::{SourceId, SourceKind};
use poolfs_core::Digest;
use std::net::IpAddr;

/// Complete holders asked for their list.
pub const LIST_ASKED_MAX: usize = 3;

/// Picks up to [`LIST_ASKED_MAX`] complete holders to ask for their list, in the order given. On a public network never two
/// of one /24 (IPv6: /48), since whoever holds one address there may hold the others.
pub fn choose_list_sources(holders: impl IntoIterator<Item = (SourceId, IpAddr)>, public: bool) -> Vec<SourceId> {
    let mut chosen: Vec<(SourceId, Vec<u8>)> = Vec::new();
    for (source, address) in holders {
        let network = match address.to_canonical() {
            IpAddr::V4(v4) => v4.octets()[..3].to_vec(),
            IpAddr::V6(v6) => v6.octets()[..6].to_vec(),
        };
        if chosen.len() < LIST_ASKED_MAX && !(public && chosen.iter().any(|(_, other)| *other == network)) {
            chosen.push((source, network));
        }
    }
    chosen.into_iter().map(|(source, _)| source).collect()
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum State {
    /// None came yet.
    #[default]
    None,
    /// Index into the lists got.
    InUse(usize),
    /// They differ at this piece, and somebody neutral is to give it.
    Arbitrating(u32),
    /// Contradicted, or nobody could decide: no list counts any more in this download.
    Dropped,
}

/// The lists of one download.
#[derive(Default)]
pub(super) struct Lists {
    got: Vec<(SourceId, PieceList)>,
    /// Those that nothing contradicts yet.
    candidates: Vec<usize>,
    state: State,
}

impl Lists {
    pub(super) fn in_use(&self) -> Option<&[Digest]> {
        match self.state {
            State::InUse(index) => Some(&self.got[index].1.pieces),
            State::None | State::Arbitrating(_) | State::Dropped => None,
        }
    }

    /// The piece that is to decide, which nobody else is asked for meanwhile.
    pub(super) fn arbitrating(&self) -> Option<u32> {
        match self.state {
            State::Arbitrating(piece) => Some(piece),
            State::None | State::InUse(_) | State::Dropped => None,
        }
    }

    pub(super) fn contradicted_by(&self, pieces: &[Digest]) -> Vec<(SourceId, PieceList)> {
        self.got.iter().filter(|(_, list)| list.pieces != pieces).cloned().collect()
    }

    /// The first piece in which the candidates are not all the same.
    fn first_difference(&self) -> Option<usize> {
        let (first, others) = self.candidates.split_first()?;
        let first = &self.got[*first].1.pieces;
        others.iter().filter_map(|other| first.iter().zip(&self.got[*other].1.pieces).position(|(a, b)| a != b)).min()
    }

    fn handed_over(&self, source: SourceId) -> bool {
        self.got.iter().any(|(from, _)| *from == source)
    }
}

impl Blame {
    /// Takes a list whose signature was checked and whose signer's key is not out, from the source that was asked for it.
    ///
    /// At most [`LIST_ASKED_MAX`] are taken, and none for a file of one piece or after the first round.
    pub fn list(&mut self, source: SourceId, list: PieceList, turn: &mut Turn<'_>) {
        let fits = self.pieces > 1 && list.pieces.len() == self.pieces;
        if self.step != Step::First || !fits || self.lists.got.len() >= LIST_ASKED_MAX || source.index() >= self.sources.len() {
            return;
        }
        self.lists.got.push((source, list));
        if self.lists.state != State::Dropped {
            self.lists.candidates.push(self.lists.got.len() - 1);
            self.settle_lists(turn);
        }
        self.advance(turn);
    }

    /// The signed list that pieces are held against now, if there is one.
    pub fn list_in_use(&self) -> Option<&PieceList> {
        match self.lists.state {
            State::InUse(index) => self.lists.got.get(index).map(|(_, list)| list),
            State::None | State::Arbitrating(_) | State::Dropped => None,
        }
    }

    /// Decides among the lists as far as what was given allows.
    pub(super) fn settle_lists(&mut self, turn: &mut Turn<'_>) {
        while self.step == Step::First && !matches!(self.lists.state, State::Dropped) && !self.lists.candidates.is_empty() {
            let Some(at) = self.lists.first_difference() else {
                let index = self.lists.candidates[0];
                if self.lists.in_use().is_none() {
                    self.adopt(index, turn);
                }
                return;
            };
            let piece = u32::try_from(at).expect("pieces are u32");
            if let Some(digest) = self.arbitration(piece) {
                let got = &self.lists.got;
                self.lists.candidates.retain(|index| got[*index].1.pieces[at] == digest);
                self.lists.state = State::None;
                if self.lists.candidates.is_empty() {
                    self.drop_list();
                }
                continue;
            }
            if !self.arbiter_asked(piece) && self.arbiter(piece).is_none() {
                self.drop_list();
                return;
            }
            if self.lists.in_use().is_some() {
                self.forgive_misses();
            }
            self.lists.state = State::Arbitrating(piece);
            return;
        }
    }

    pub(super) fn arbitration_ask(&mut self, ready: &mut impl FnMut(SourceId) -> bool, turn: &mut Turn<'_>) -> Option<Ask> {
        let piece = self.lists.arbitrating()?;
        if self.arbiter_asked(piece) {
            return None;
        }
        let Some(source) = self.arbiter(piece) else {
            self.settle_lists(turn);
            return None;
        };
        ready(source).then_some(Ask { piece, source, why: Why::Arbitrate })
    }

    /// What an arbiter gave at `piece`: the mirror's word, and a neutral source's only where there is no mirror.
    fn arbitration(&self, piece: u32) -> Option<Digest> {
        let mirror = self.mirror();
        let neutral = |source| match mirror {
            Some(mirror) => source == mirror,
            None => self.is_peer(source) && !self.lists.handed_over(source),
        };
        self.gives_at(piece).find(|give| neutral(give.source)).map(|give| give.digest)
    }

    fn arbiter_asked(&self, piece: u32) -> bool {
        let mirror = self.mirror();
        self.in_flight
            .iter()
            .any(|ask| ask.piece == piece && mirror.map_or_else(|| !self.lists.handed_over(ask.source), |mirror| ask.source == mirror))
    }

    fn arbiter(&self, piece: u32) -> Option<SourceId> {
        if let Some(mirror) = self.mirror() {
            return Some(mirror).filter(|mirror| self.may_ask(*mirror, piece));
        }
        let ids = 0..u16::try_from(self.sources.len()).expect("at most SOURCES_MAX");
        ids.map(SourceId).find(|source| !self.lists.handed_over(*source) && self.may_ask(*source, piece))
    }

    /// Uses a list: what misses it among the gives so far is taken out.
    fn adopt(&mut self, index: usize, turn: &mut Turn<'_>) {
        self.lists.state = State::InUse(index);
        self.forgive_misses();
        let list = self.lists.got[index].1.pieces.clone();
        let missing: Vec<u32> =
            (0u32..).zip(&self.gives).filter(|(_, give)| give.digest != list[give.piece as usize]).map(|(id, _)| id).collect();
        for id in missing {
            let piece = self.gives[id as usize].piece as usize;
            if self.first[piece] == Some(id) {
                self.unaccept(piece);
            }
            if self.misses(id, turn) {
                return;
            }
        }
        for (piece, want) in list.iter().enumerate() {
            if self.first[piece].is_none()
                && let Some(fits) = self.gives_of[piece].iter().find(|id| self.gives[**id as usize].digest == *want)
            {
                self.accept(*fits);
            }
        }
    }

    /// Whether the list in use, if any, has these bytes at this piece; if not, the source is out as long as the list stands.
    pub(super) fn list_admits(&mut self, id: u32, turn: &mut Turn<'_>) -> bool {
        let give = self.gives[id as usize];
        let Some(list) = self.lists.in_use() else { return true };
        if list[give.piece as usize] == give.digest {
            return true;
        }
        self.misses(id, turn);
        false
    }

    /// Notes a give that misses the list. The same bytes from two sources against the list drop it, which comes back.
    fn misses(&mut self, id: u32, turn: &mut Turn<'_>) -> bool {
        let give = self.gives[id as usize];
        let known = &mut self.sources[give.source.index()];
        if known.kind == SourceKind::Peer {
            turn.budget.charge(u64::from(self.shape.piece_len(give.piece)), turn.now);
        }
        if known.kind != SourceKind::Here && !known.misses_list {
            known.misses_list = true;
            self.actions.push_back(Action::Out { source: give.source, reason: OutReason::MissesList });
        }
        // What was here from earlier may be of the same giver, so it is no second witness.
        let witness = |source: SourceId| self.sources[source.index()].kind != SourceKind::Here;
        let two = witness(give.source)
            && self.gives_at(give.piece).any(|other| other.digest == give.digest && other.source != give.source && witness(other.source));
        if two {
            self.drop_list();
        }
        two
    }

    /// Goes on without lists: who was out by one is back, and what was refused fills the pieces that are open.
    pub(super) fn drop_list(&mut self) {
        self.lists.state = State::Dropped;
        self.forgive_misses();
        for piece in 0..self.pieces {
            if self.first[piece].is_none()
                && let Some(id) = self.most_given(piece)
            {
                self.accept(id);
            }
        }
    }

    /// The give at a piece whose bytes most sources gave; the mirror's if it gave it.
    fn most_given(&self, piece: usize) -> Option<u32> {
        let ids = &self.gives_of[piece];
        let count = |digest| ids.iter().filter(|id| self.gives[**id as usize].digest == digest).count();
        ids.iter().copied().max_by_key(|id| {
            let give = self.gives[*id as usize];
            (self.is_mirror(give.source), count(give.digest))
        })
    }

    fn forgive_misses(&mut self) {
        self.sources.iter_mut().for_each(|source| source.misses_list = false);
    }
}
