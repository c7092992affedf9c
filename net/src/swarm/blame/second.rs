//! Step 2: the second round, shifted by one, and the table that decides at each difference.

use super::{Action, Ask, Blame, Give, Seat, Step, TIES_MAX, WINDOW_PIECES, Why};
use crate::swarm::SourceId;
use poolfs_core::Digest;
use sha2::{Digest as _, Sha256};

/// A disputed piece that waits for a third source.
struct Tie {
    piece: u32,
    asked: bool,
    /// Nobody is left to ask.
    exhausted: bool,
}

/// The state of the second round.
#[derive(Default)]
pub(super) struct Second {
    seats: Vec<Seat>,
    /// `run[i]`: the second round's SHA-256 over the pieces before `i`, as far as the first difference.
    pub(super) run: Vec<Sha256>,
    /// The first piece after which the running hashes differ.
    pub(super) split: Option<usize>,
    /// Pieces before this one are decided.
    decided: usize,
    /// Per piece the version decided for, where it is not the first round's.
    pub(super) picks: Vec<Option<Digest>>,
    tie: Option<Tie>,
    ties_left: u32,
}

impl Second {
    pub(super) fn new(pieces: usize) -> Self {
        Self {
            seats: vec![Seat::Open; pieces],
            run: vec![Sha256::new()],
            split: None,
            decided: 0,
            picks: vec![None; pieces],
            tie: None,
            ties_left: TIES_MAX,
        }
    }

    pub(super) fn seat(&self, piece: u32) -> Option<Seat> {
        self.seats.get(piece as usize).copied()
    }

    pub(super) fn reopen(&mut self, piece: u32) {
        if let Some(seat) = self.seats.get_mut(piece as usize).filter(|seat| **seat == Seat::Asked) {
            *seat = Seat::Open;
        }
    }

    pub(super) fn tie_failed(&mut self) {
        if let Some(tie) = &mut self.tie {
            tie.asked = false;
        }
    }
}

impl Blame {
    pub(super) fn second_gave(&mut self, id: u32) {
        let give = self.gives[id as usize];
        if give.why == Why::Second && self.second.seats[give.piece as usize] == Seat::Asked {
            self.second.seats[give.piece as usize] = Seat::Given(id);
        }
    }

    pub(super) fn second_ask(&mut self, ready: &mut impl FnMut(SourceId) -> bool) -> Option<Ask> {
        if let Some(Tie { piece, asked: false, exhausted: false }) = self.second.tie {
            match self.tie_source(piece) {
                Some(source) if ready(source) => {
                    self.second.tie = Some(Tie { piece, asked: true, exhausted: false });
                    return Some(Ask { piece, source, why: Why::Tie });
                }
                Some(_) => {}
                // A late answer of the first round may still be the third one.
                None if self.is_asked(piece) => {}
                None => {
                    self.second.tie = Some(Tie { piece, asked: false, exhausted: true });
                    return None;
                }
            }
        }
        let window = self.second.decided..self.pieces.min(self.second.decided + WINDOW_PIECES);
        for index in window {
            if self.second.seats[index] != Seat::Open {
                continue;
            }
            let piece = u32::try_from(index).expect("pieces are u32");
            if let Some(id) = self.other_give(piece) {
                self.second.seats[index] = Seat::Given(id);
                continue;
            }
            match self.second_source(piece) {
                Some(source) if ready(source) => {
                    self.second.seats[index] = Seat::Asked;
                    return Some(Ask { piece, source, why: Why::Second });
                }
                Some(_) => {}
                None if self.is_asked(piece) => {}
                None => self.second.seats[index] = Seat::Nobody,
            }
        }
        None
    }

    /// Whom the second round asks for `piece`: the giver of the piece before, for the first piece an unused source or the
    /// giver of the last; where that is the giver of this piece or a suspect, the next in the ring that is neither. A suspect
    /// only where nobody else is left; never who gave the piece already.
    pub(super) fn second_source(&self, piece: u32) -> Option<SourceId> {
        let giver = |index: usize| self.first[index].map(|id| self.gives[id as usize].source);
        let index = piece as usize;
        let here = giver(index)?;
        let want = match index.checked_sub(1) {
            Some(before) => giver(before),
            None => self.first_unused(piece).or_else(|| giver(self.pieces - 1)),
        };
        // Its giver may not be asked again, so nobody ever follows himself.
        let fit = |source: &SourceId| self.may_ask(*source, piece);
        let trusted = |source: &SourceId| fit(source) && !self.is_suspect(*source);
        let ring = || self.ring_after(here);
        want.filter(trusted).or_else(|| ring().find(trusted)).or_else(|| self.unused_peers().find(trusted)).or_else(|| ring().find(fit))
    }

    fn first_unused(&self, piece: u32) -> Option<SourceId> {
        let unused_mirror = self.mirror().filter(|_| self.mirror_gives == 0);
        self.unused_peers().chain(unused_mirror).find(|source| self.may_ask(*source, piece))
    }

    /// The ring from the one after `source` on: the peers in order of first use, then the mirror, then from the start.
    pub(super) fn ring_after(&self, source: SourceId) -> impl Iterator<Item = SourceId> + '_ {
        let whole = || self.ring.iter().copied().chain(self.mirror());
        let next = whole().position(|member| member == source).map_or(0, |at| at + 1);
        whole().skip(next).chain(whole().take(next))
    }

    /// What another source gave already, such as a hedge's loser: as good as what the second round would ask for.
    fn other_give(&self, piece: u32) -> Option<u32> {
        let first = self.first[piece as usize]?;
        let giver = self.gives[first as usize].source;
        self.gives_of[piece as usize].iter().copied().find(|id| self.gives[*id as usize].source != giver)
    }

    /// The third source for a disputed piece: an unused one, else one that is not suspected, else the mirror.
    fn tie_source(&self, piece: u32) -> Option<SourceId> {
        let trusted = |source: &SourceId| self.may_ask(*source, piece) && !self.is_suspect(*source);
        self.unused_peers().find(trusted).or_else(|| self.ring.iter().copied().find(trusted)).or_else(|| self.mirror().filter(trusted))
    }

    pub(super) fn advance_second(&mut self) -> bool {
        let at = self.second.decided;
        if at == self.pieces {
            let assembly = self.first_assembly().into_iter().zip(&self.second.picks).map(|(first, pick)| pick.unwrap_or(first));
            let assembly = assembly.collect();
            self.check(assembly);
            return true;
        }
        if self.second.split.is_none() {
            let hashed = self.second.run.len() - 1;
            if hashed <= at {
                self.hash_second_round(hashed);
                return false;
            }
            let end = |state: &Sha256| state.clone().finalize();
            if end(&self.second.run[at + 1]) == end(&self.run[at + 1]) {
                self.second.decided += 1;
                return true;
            }
            self.second.split = Some(at);
        }
        let decided = match self.second.seats[at] {
            Seat::Open | Seat::Asked => false,
            Seat::Nobody => true,
            Seat::Given(id) => self.decide(at, id),
        };
        self.second.decided += usize::from(decided);
        decided
    }

    fn hash_second_round(&mut self, hashed: usize) {
        let mut parts = Vec::new();
        for (index, seat) in self.second.seats.iter().enumerate().skip(hashed).take(super::HASH_PARTS_MAX) {
            match (*seat, self.first[index]) {
                (Seat::Given(id), _) | (Seat::Nobody, Some(id)) => parts.push(self.version(id)),
                _ => break,
            }
        }
        if !parts.is_empty() {
            let state = self.second.run[hashed].clone();
            self.start_job(state, parts, super::JobFor::SecondRound);
        }
    }

    /// The decision table at piece `index`, whose second give is `second`. `false`: it waits for a third source.
    fn decide(&mut self, index: usize, second: u32) -> bool {
        let piece = u32::try_from(index).expect("pieces are u32");
        let a = self.gives[self.first[index].expect("the first round is complete") as usize];
        let b = self.gives[second as usize];
        if a.digest == b.digest {
            return true;
        }
        let pick = match (self.is_suspect(a.source), self.is_suspect(b.source)) {
            (true, false) => b.digest,
            (false, true) => a.digest,
            _ if self.is_mirror(a.source) => {
                self.suspect(b.source);
                a.digest
            }
            _ if self.is_mirror(b.source) => {
                self.suspect(a.source);
                b.digest
            }
            _ => match self.third_give(piece, a.source, b.source) {
                Some(t) if t.digest == a.digest => {
                    self.suspect(b.source);
                    a.digest
                }
                Some(t) if t.digest == b.digest => {
                    self.suspect(a.source);
                    b.digest
                }
                Some(t) if self.is_mirror(t.source) => {
                    self.suspect(a.source);
                    self.suspect(b.source);
                    t.digest
                }
                Some(_) => b.digest,
                None if self.wait_for_third(piece) => return false,
                None => {
                    if index > 0 {
                        self.suspect(a.source);
                    }
                    b.digest
                }
            },
        };
        self.second.tie = None;
        self.second.picks[index] = Some(pick);
        true
    }

    /// What a third source gave at a disputed piece: the one asked for it, or a hedge's loser that is not suspected.
    fn third_give(&self, piece: u32, a: SourceId, b: SourceId) -> Option<Give> {
        let third = |give: &&Give| give.source != a && give.source != b && !self.is_suspect(give.source);
        let asked = self.gives_at(piece).filter(third).find(|give| give.why == Why::Tie);
        asked.or_else(|| self.gives_at(piece).find(third)).copied()
    }

    fn wait_for_third(&mut self, piece: u32) -> bool {
        match &self.second.tie {
            Some(tie) if tie.piece == piece => !tie.exhausted,
            _ if self.second.ties_left > 0 && self.tie_source(piece).is_some() => {
                self.second.ties_left -= 1;
                self.second.tie = Some(Tie { piece, asked: false, exhausted: false });
                true
            }
            _ => false,
        }
    }

    /// Suspects a source: what it is asked for in the second round goes to others, where there are others.
    pub(super) fn suspect(&mut self, source: SourceId) {
        self.sources[source.index()].suspect = true;
        if self.step != Step::Second {
            return;
        }
        let asked: Vec<u32> =
            self.in_flight.iter().filter(|ask| ask.source == source && ask.why == Why::Second).map(|ask| ask.piece).collect();
        for piece in asked {
            if self.second_source(piece).is_some_and(|other| !self.is_suspect(other)) {
                let why = self.land(source, piece);
                self.reopen(piece, why);
                self.actions.push_back(Action::Cancel { piece, source });
            }
        }
    }
}
