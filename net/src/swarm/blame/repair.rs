//! Steps 3 and 4: trials without traffic, then the mirror, and a third round where there is none, or one whose whole file is another.

use super::{Ask, Blame, NotHad, Seat, Step, TRIALS_BEFORE_THIRD_MAX, TRIALS_MAX, Turn, Why};
use crate::swarm::SourceId;
use poolfs_core::Digest;
use std::collections::BTreeMap;

/// Disputants that trials look at, those in most disputes first: bounds the pairs.
const DISPUTANTS_MAX: usize = 16;

impl Blame {
    /// Lines up whom to leave out: the suspects, then each single disputant and each pair. Of the latter two the sets that
    /// leave the fewest disputes unexplained come first, and of those the smaller.
    pub(super) fn start_trials(&mut self, after_third: bool) {
        let disputed = self.disputed();
        let mut in_disputes: BTreeMap<SourceId, usize> = BTreeMap::new();
        for piece in &disputed {
            self.gives_at(*piece).for_each(|give| *in_disputes.entry(give.source).or_default() += 1);
        }
        let mut disputants: Vec<(SourceId, usize)> = in_disputes.into_iter().collect();
        disputants.sort_by_key(|(_, disputes)| std::cmp::Reverse(*disputes));
        disputants.truncate(DISPUTANTS_MAX);
        let disputants: Vec<SourceId> = disputants.into_iter().map(|(source, _)| source).filter(|id| !self.is_mirror(*id)).collect();
        let mut sets: Vec<Vec<SourceId>> = disputants.iter().map(|one| vec![*one]).collect();
        for (at, one) in disputants.iter().enumerate() {
            sets.extend(disputants[at + 1..].iter().map(|other| vec![*one, *other]));
        }
        sets.sort_by_cached_key(|set| (self.unexplained(&disputed, set), set.len()));
        let suspects = self.suspects();
        self.trials = std::iter::once(suspects).chain(sets).collect();
        // Taken from the end.
        self.trials.reverse();
        self.step = Step::Trials { after_third };
    }

    /// Starts the next trial, or goes on to the repair where none is left.
    pub(super) fn next_trial(&mut self, after_third: bool, turn: &mut Turn<'_>) {
        let kept_for_later = if after_third || self.mirror().is_some() { 0 } else { TRIALS_MAX - TRIALS_BEFORE_THIRD_MAX };
        let next = if self.trials_left > kept_for_later { self.trials.pop() } else { None };
        match next {
            Some(left_out) => {
                let assembly = self.assembly(&left_out);
                self.check(assembly);
                self.trials_left -= u32::from(self.job.is_some());
            }
            None if after_third => self.fail(NotHad::Undecided),
            None => self.repair(turn),
        }
    }

    /// Step 4: the mirror's word on what is disputed; without a mirror a third round.
    pub(super) fn repair(&mut self, turn: &mut Turn<'_>) {
        if self.mirror().is_some() {
            self.step = Step::MirrorDisputed;
            self.seats = vec![Seat::Nobody; self.pieces];
            for piece in self.disputed() {
                self.seats[piece as usize] = Seat::Open;
            }
            self.leave_out_given_by_mirror();
            if self.seats.iter().all(|seat| *seat == Seat::Nobody) {
                self.mirror_rest();
            }
            return;
        }
        let somebody = (0u32..).take(self.pieces).any(|piece| self.third_source(piece).is_some());
        if self.third_done || !somebody || !self.leave_for_round(turn) {
            return self.fail(NotHad::Undecided);
        }
        self.third_done = true;
        self.step = Step::Third;
        // A wrong mirror has cost a copy: what two agree on is not asked for once more.
        let settled = |piece: u32| self.mirror_was_wrong && self.agreed(piece);
        self.seats = (0u32..).take(self.pieces).map(|piece| if settled(piece) { Seat::Nobody } else { Seat::Open }).collect();
    }

    /// Whether two who are not suspected gave the same.
    fn agreed(&self, piece: u32) -> bool {
        let trusted = || self.gives_at(piece).filter(|give| !self.is_suspect(give.source));
        trusted().any(|one| trusted().any(|other| other.source != one.source && other.digest == one.digest))
    }

    /// All that the mirror has not given yet.
    pub(super) fn mirror_rest(&mut self) {
        self.step = Step::MirrorRest;
        self.seats = vec![Seat::Open; self.pieces];
        self.leave_out_given_by_mirror();
    }

    fn leave_out_given_by_mirror(&mut self) {
        let Some(mirror) = self.mirror() else { return };
        for piece in (0u32..).take(self.pieces) {
            if self.has_given(mirror, piece) {
                self.seats[piece as usize] = Seat::Nobody;
            }
        }
    }

    pub(super) fn advance_repair(&mut self, turn: &mut Turn<'_>) -> bool {
        let open = self.seats.iter().any(|seat| matches!(seat, Seat::Open | Seat::Asked));
        if open && self.step != Step::Third && self.mirror().is_none() {
            self.repair(turn);
            return true;
        }
        if open {
            return false;
        }
        let assembly = self.assembly(&self.suspects());
        self.check(assembly);
        true
    }

    pub(super) fn repair_ask(&mut self, ready: &mut impl FnMut(SourceId) -> bool) -> Option<Ask> {
        for index in 0..self.pieces {
            if self.seats[index] != Seat::Open {
                continue;
            }
            let piece = u32::try_from(index).expect("pieces are u32");
            let source = if self.step == Step::Third { self.third_source(piece) } else { self.mirror() };
            match source {
                Some(source) if !ready(source) => {}
                Some(source) if self.may_ask(source, piece) => {
                    self.seats[index] = Seat::Asked;
                    return Some(Ask { piece, source, why: Why::Repair });
                }
                _ if self.is_asked(piece) => {}
                _ => self.seats[index] = Seat::Nobody,
            }
        }
        None
    }

    /// Somebody who has not given the piece, a suspect last; spread over those there are.
    pub(super) fn third_source(&self, piece: u32) -> Option<SourceId> {
        let ids = 0..u16::try_from(self.sources.len()).expect("at most SOURCES_MAX");
        let fit: Vec<SourceId> = ids.map(SourceId).filter(|source| self.may_ask(*source, piece)).collect();
        let trusted: Vec<SourceId> = fit.iter().copied().filter(|source| !self.is_suspect(*source)).collect();
        let from = if trusted.is_empty() { fit } else { trusted };
        from.get(piece as usize % from.len().max(1)).copied()
    }

    /// The pieces of which there is more than one version.
    pub(super) fn disputed(&self) -> Vec<u32> {
        let differ = |piece: &u32| {
            let mut gives = self.gives_at(*piece);
            gives.next().is_some_and(|first| gives.any(|give| give.digest != first.digest))
        };
        (0u32..).take(self.pieces).filter(differ).collect()
    }

    fn suspects(&self) -> Vec<SourceId> {
        let ids = 0..u16::try_from(self.sources.len()).expect("at most SOURCES_MAX");
        ids.map(SourceId).filter(|source| self.is_suspect(*source)).collect()
    }

    /// Disputes that would remain if what `set` gave did not count, or of which then nothing remains.
    fn unexplained(&self, disputed: &[u32], set: &[SourceId]) -> usize {
        let remains = |piece: &&u32| {
            let mut others = self.gives_at(**piece).filter(|give| !set.contains(&give.source));
            !others.next().is_some_and(|first| others.all(|give| give.digest == first.digest))
        };
        disputed.iter().filter(remains).count()
    }

    /// Each piece in the version that most sources gave, not counting `left_out` unless nobody else gave it; the mirror's
    /// where it gave one and is not left out itself.
    pub(super) fn assembly(&self, left_out: &[SourceId]) -> Vec<Digest> {
        (0u32..).take(self.pieces).map(|piece| self.best_version(piece, left_out)).collect()
    }

    fn best_version(&self, piece: u32, left_out: &[SourceId]) -> Digest {
        let rank = |digest: Digest| {
            let givers = || self.gives_at(piece).filter(move |give| give.digest == digest).map(|give| give.source);
            let mirror = givers().any(|source| self.is_mirror(source) && !self.is_suspect(source) && !left_out.contains(&source));
            let counted = givers().filter(|source| !left_out.contains(source) && !self.sources[source.index()].contradicts_itself).count();
            let trusted = givers().filter(|source| !self.is_suspect(*source)).count();
            (mirror, counted, trusted)
        };
        // Of equals the last, which is of the later round.
        self.gives_at(piece).map(|give| give.digest).max_by_key(|digest| rank(*digest)).expect("the first round is complete")
    }
}
