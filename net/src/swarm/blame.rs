//! Which bytes are the file, and who gave others.
//!
//! A download is *right* when its SHA-256 is the digest that a signed index names, and until then nothing about anybody is
//! known. This machine finds a right assembly among what sources give, at a bounded cost, and only then tells who gave what
//! the file does not hold. On the way it *suspects*, to choose whom to ask next; a suspicion ends with the download.
//!
//! 1. **Lists** ([`piece_list`](super::piece_list)): a piece that misses a signed list is not taken, its source is out for
//!    this download. A list that two sources contradict with the same bytes is dropped.
//! 2. **First round**: pieces in any order from anybody; the running hash is kept at each piece's end.
//! 3. **Second round**, if the digest is wrong: everything again with the sources shifted by one, so that none gives a piece
//!    twice. The running hashes show the first difference, the digests of the pieces the others; a third source gives a
//!    disputed piece once, and where there is none the first giver is suspected, since he has moved on to a later piece.
//! 4. **Trials**: other combinations of what is here, without traffic.
//! 5. **Repair**: disputed pieces from the mirror, then all of it; without a mirror a third round and trials again.
//!
//! **Invariants:** a source is convicted only by a verified file or by contradicting itself; no source gives the same piece
//! twice on request; at most four times the file's bytes arrive, and a usable mirror can always send the whole file within
//! them, so with an honest mirror the file is always had.
//!
//! The machine holds digests, not bytes: the caller keeps each new version of a piece by (piece, digest), and runs
//! [`HashJob`]s over them where it likes. One owner drives it; nothing here waits.

mod actions;
mod budget;
mod lists;
mod repair;
mod second;
#[cfg(test)]
mod tests;
mod verdicts;

pub use actions::{Action, Ask, Give, HashDone, HashJob, NotHad, OutReason, Outcome, Reception, SourceVerdict, Turn, Why};
pub use budget::{BUDGET_WINDOW, WASTE_BYTES_MAX, WasteBudget};
pub use lists::{LIST_ASKED_MAX, choose_list_sources};
pub use verdicts::{ADDRESSES_MAX, AddressRecord, KEYS_MAX, OUT_S_FIRST, OUT_S_MAX, Verdicts};

use super::bits::Bits;
use super::{FileShape, SOURCES_MAX, SourceId, SourceKind};
use lists::Lists;
use poolfs_core::Digest;
use second::Second;
use sha2::{Digest as _, Sha256};
use std::collections::{HashSet, VecDeque};
use std::fmt;
use std::time::Duration;

/// Disputed pieces that a third source may be asked for in one download.
pub const TIES_MAX: u32 = 8;

/// Combinations tried without traffic in one download.
pub const TRIALS_MAX: u32 = 16;

/// Of these, how many before the third round where there is no mirror: the rest must be left for after it.
const TRIALS_BEFORE_THIRD_MAX: u32 = 8;

/// Bytes that may arrive for one download, in units of the file.
pub const COST_FILES_MAX: u64 = 4;

/// Gives recorded besides [`COST_FILES_MAX`] for each piece.
const GIVES_SPARE: u64 = 16;

/// Not tried again for this long after a download that no source could make right.
pub const RETRY_AFTER: Duration = Duration::from_secs(600);

/// The mirror is asked again this often in a row before it counts as not there.
const MIRROR_FAILURES_MAX: u32 = 3;

/// Pieces looked at past the first open one when a source asks for work: bounds the cost of each call.
const WINDOW_PIECES: usize = 256;

/// Pieces in one [`HashJob`] at the frontier: bounds how long a result is waited for.
const HASH_PARTS_MAX: usize = 64;

/// What a running job is for.
enum JobFor {
    /// The running hash of the first round.
    FirstRound,
    /// The running hash of the second round, up to the first difference.
    SecondRound,
    /// The whole digest of an assembly.
    Check(Vec<Digest>),
}

#[derive(Debug)]
struct Source {
    kind: SourceKind,
    /// `None`: every piece.
    have: Option<Bits>,
    suspect: bool,
    contradicts_itself: bool,
    misses_list: bool,
    gone: bool,
    failures_in_row: u32,
}

/// Where a piece stands in a round whose sources this machine chooses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Seat {
    Open,
    Asked,
    /// Index into the gives.
    Given(u32),
    /// Nobody is left who could give it, or it is not wanted.
    Nobody,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    First,
    Second,
    Trials { after_third: bool },
    MirrorDisputed,
    MirrorRest,
    Third,
    Over,
}

/// The state machine of one download. See the module's text.
pub struct Blame {
    shape: FileShape,
    pieces: usize,
    step: Step,
    sources: Vec<Source>,
    sources_final: bool,
    /// Peers in order of first use; the mirror is thought last.
    ring: Vec<SourceId>,
    gives: Vec<Give>,
    gives_of: Vec<Vec<u32>>,
    /// Per piece the give that is the first round's.
    first: Vec<Option<u32>>,
    /// No piece before this one is open in the first round.
    first_open: usize,
    open_count: usize,
    /// `run[i]`: the first round's SHA-256 over the pieces before `i`.
    run: Vec<Sha256>,
    lists: Lists,
    second: Second,
    /// The seats of the repair that is going on.
    seats: Vec<Seat>,
    trials: Vec<Vec<SourceId>>,
    trials_left: u32,
    tried: Vec<Digest>,
    in_flight: Vec<Ask>,
    failed: HashSet<(u32, SourceId)>,
    cost_bytes: u64,
    mirror_bytes: u64,
    mirror_gives: u64,
    third_done: bool,
    /// The versions that are not the mirror's were tried, since its own do not make the file.
    without_mirror_tried: bool,
    mirror_was_wrong: bool,
    /// The hour's one leave for repeating a download is this one's.
    round_covered: bool,
    job: Option<(u64, JobFor)>,
    jobs: u64,
    actions: VecDeque<Action>,
}

impl fmt::Debug for Blame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blame")
            .field("shape", &self.shape)
            .field("step", &self.step)
            .field("gives", &self.gives.len())
            .field("in_flight", &self.in_flight)
            .field("cost_bytes", &self.cost_bytes)
            .finish_non_exhaustive()
    }
}

impl Blame {
    /// A download of `shape` of which nothing is here.
    pub fn new(shape: FileShape) -> Self {
        let pieces = shape.pieces() as usize;
        let mut this = Self {
            shape,
            pieces,
            step: Step::First,
            sources: Vec::new(),
            sources_final: false,
            ring: Vec::new(),
            gives: Vec::new(),
            gives_of: vec![Vec::new(); pieces],
            first: vec![None; pieces],
            first_open: 0,
            open_count: pieces,
            run: vec![Sha256::new()],
            lists: Lists::default(),
            second: Second::default(),
            seats: Vec::new(),
            trials: Vec::new(),
            trials_left: TRIALS_MAX,
            tried: Vec::new(),
            in_flight: Vec::new(),
            failed: HashSet::new(),
            cost_bytes: 0,
            mirror_bytes: 0,
            mirror_gives: 0,
            third_done: false,
            without_mirror_tried: false,
            mirror_was_wrong: false,
            round_covered: false,
            job: None,
            jobs: 0,
            actions: VecDeque::new(),
        };
        if pieces == 0 {
            let right = Digest::of(b"") == shape.digest;
            if right { this.verified(Vec::new()) } else { this.fail(NotHad::Undecided) }
        }
        this
    }

    /// Adds a source that has the pieces `have` (`None`: all). `None` comes back past [`SOURCES_MAX`], for a second mirror
    /// and for a bit field of another length.
    pub fn add_source(&mut self, kind: SourceKind, have: Option<Bits>) -> Option<SourceId> {
        let second_mirror = kind == SourceKind::Mirror && self.sources.iter().any(|source| source.kind == kind);
        let other_file = have.as_ref().is_some_and(|bits| bits.len() as usize != self.pieces);
        if self.sources.len() >= SOURCES_MAX || second_mirror || other_file {
            return None;
        }
        let id = SourceId(u16::try_from(self.sources.len()).expect("at most SOURCES_MAX"));
        self.sources.push(Source {
            kind,
            have,
            suspect: false,
            contradicts_itself: false,
            misses_list: false,
            gone: false,
            failures_in_row: 0,
        });
        Some(id)
    }

    /// Takes a later account of what a partial holder has. One of another length is ignored.
    pub fn set_have(&mut self, source: SourceId, have: Bits, turn: &mut Turn<'_>) {
        if have.len() as usize == self.pieces && source.index() < self.sources.len() {
            self.sources[source.index()].have = Some(have);
            self.advance(turn);
        }
    }

    /// Says that no further source will be added: a piece that nobody gives now ends the download.
    pub fn no_more_sources(&mut self, turn: &mut Turn<'_>) {
        self.sources_final = true;
        self.advance(turn);
    }

    /// Whether the file is had or given up.
    pub fn is_over(&self) -> bool {
        self.step == Step::Over
    }

    /// Whether pieces are asked in any order of anybody ([`Self::begin`]); otherwise [`Self::next_ask`] says of whom.
    pub fn is_first_round(&self) -> bool {
        self.step == Step::First
    }

    /// Whether the first round still needs `piece`.
    pub fn needs(&self, piece: u32) -> bool {
        self.is_first_round() && self.first.get(piece as usize).is_some_and(Option::is_none) && self.lists.arbitrating() != Some(piece)
    }

    /// The pieces that the first round still needs, ascending, asked already or not.
    pub fn open(&self) -> impl Iterator<Item = u32> + '_ {
        let from = u32::try_from(self.first_open).expect("pieces are u32");
        (from..self.shape.pieces()).filter(|piece| self.needs(*piece))
    }

    /// How many pieces the first round still needs.
    pub fn open_count(&self) -> usize {
        if self.is_first_round() { self.open_count } else { 0 }
    }

    /// Ends the download for a reason that this machine cannot see.
    pub fn give_up(&mut self, why: NotHad) {
        if !self.is_over() {
            self.fail(why);
        }
    }

    /// Whether `source` may be asked for `piece` now: it has it, has not given it, is not out, and the bounds allow it.
    pub fn may_ask(&self, source: SourceId, piece: u32) -> bool {
        let Some(known) = self.sources.get(source.index()) else { return false };
        known.kind != SourceKind::Here
            && !known.contradicts_itself
            && !known.misses_list
            && !known.gone
            && known.have.as_ref().is_none_or(|have| have.has(piece))
            && !self.failed.contains(&(piece, source))
            && !self.has_given(source, piece)
            && !self.in_flight.iter().any(|ask| ask.piece == piece && ask.source == source)
            && self.affordable(source, piece)
    }

    /// Whether `source` is asked for nothing more.
    pub fn is_out(&self, source: SourceId) -> bool {
        self.sources.get(source.index()).is_none_or(|known| known.contradicts_itself || known.misses_list || known.gone)
    }

    /// Notes that the first round asks `source` for `piece`; `false` if it may not. A second source for the same piece is a
    /// hedge, and whoever is first counts.
    pub fn begin(&mut self, source: SourceId, piece: u32) -> bool {
        let may = self.needs(piece) && self.may_ask(source, piece);
        if may {
            self.in_flight.push(Ask { piece, source, why: Why::First });
        }
        may
    }

    /// The next piece to ask of a source for which `ready` holds; it is then in flight. In the first round this gives only
    /// pieces that decide between lists.
    pub fn next_ask(&mut self, mut ready: impl FnMut(SourceId) -> bool, turn: &mut Turn<'_>) -> Option<Ask> {
        let ask = match self.step {
            Step::First => self.arbitration_ask(&mut ready, turn),
            Step::Second => self.second_ask(&mut ready),
            Step::MirrorDisputed | Step::MirrorRest | Step::Third => self.repair_ask(&mut ready),
            Step::Trials { .. } | Step::Over => None,
        };
        match ask {
            Some(ask) => self.in_flight.push(ask),
            // Looking may have shown that nobody is left for a piece.
            None => self.advance(turn),
        }
        ask
    }

    /// A second source for a piece that is asked and slow; it is then in flight. The first answer counts.
    pub fn hedge(&mut self, piece: u32, mut ready: impl FnMut(SourceId) -> bool) -> Option<Ask> {
        let (why, source) = match self.step {
            Step::Second if self.second.seat(piece) == Some(Seat::Asked) => (Why::Second, self.second_source(piece)),
            Step::Third if self.seats.get(piece as usize) == Some(&Seat::Asked) => (Why::Repair, self.third_source(piece)),
            _ => return None,
        };
        let ask = source.filter(|source| ready(*source)).map(|source| Ask { piece, source, why })?;
        self.in_flight.push(ask);
        Some(ask)
    }

    /// Notes a piece that was here when the download started, from the source of kind [`SourceKind::Here`].
    pub fn resumed(&mut self, here: SourceId, piece: u32, digest: Digest, turn: &mut Turn<'_>) -> Reception {
        self.record(here, piece, digest, Why::First, turn)
    }

    /// Takes a complete answer: exactly [`FileShape::piece_len`] bytes with this SHA-256. It may come late, after another
    /// source's or after it was cancelled; it is evidence all the same.
    pub fn gave(&mut self, source: SourceId, piece: u32, digest: Digest, turn: &mut Turn<'_>) -> Reception {
        let why = self.land(source, piece);
        self.record(source, piece, digest, why.unwrap_or(Why::First), turn)
    }

    /// Takes the news that a request brought no piece. Nobody is blamed for it.
    pub fn failed(&mut self, source: SourceId, piece: u32, failure: super::Failure, turn: &mut Turn<'_>) {
        let why = self.land(source, piece);
        let Some(known) = self.sources.get_mut(source.index()) else { return };
        known.failures_in_row += 1;
        if failure == super::Failure::Gone && known.kind == SourceKind::Peer {
            known.gone = true;
        }
        if known.kind == SourceKind::Mirror {
            known.gone |= failure == super::Failure::Gone || known.failures_in_row >= MIRROR_FAILURES_MAX;
        } else {
            self.failed.insert((piece, source));
        }
        self.reopen(piece, why);
        self.advance(turn);
    }

    /// Takes back a request that the caller has given up by itself, such as the loser of a hedge.
    pub fn cancelled(&mut self, source: SourceId, piece: u32, turn: &mut Turn<'_>) {
        let why = self.land(source, piece);
        self.reopen(piece, why);
        self.advance(turn);
    }

    /// Takes the result of a [`HashJob`].
    pub fn hashed(&mut self, done: HashDone, turn: &mut Turn<'_>) {
        let Some((_, job)) = self.job.take_if(|(id, _)| *id == done.id) else { return };
        let Ok(states) = done.states else { return self.fail(NotHad::LocalRead) };
        match job {
            JobFor::FirstRound => self.run.extend(states),
            JobFor::SecondRound => self.second.run.extend(states),
            JobFor::Check(assembly) => {
                let right = states.last().is_some_and(|state| self.is_right(state));
                if right { self.verified(assembly) } else { self.assembly_wrong() }
            }
        }
        self.advance(turn);
    }

    /// What to do next, oldest first; call it until it gives nothing.
    pub fn poll(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Every complete answer so far, oldest first.
    pub fn gives(&self) -> &[Give] {
        &self.gives
    }

    /// Whether `source` is suspected now. It means nothing after the download.
    pub fn is_suspect(&self, source: SourceId) -> bool {
        self.sources.get(source.index()).is_some_and(|known| known.suspect)
    }

    /// Requests that have no answer yet.
    pub fn in_flight(&self) -> &[Ask] {
        &self.in_flight
    }

    /// Bytes that have arrived.
    pub fn cost_bytes(&self) -> u64 {
        self.cost_bytes
    }

    fn record(&mut self, source: SourceId, piece: u32, digest: Digest, why: Why, turn: &mut Turn<'_>) -> Reception {
        let index = piece as usize;
        let room = (self.gives.len() as u64) < self.gives_max();
        if self.is_over() || index >= self.pieces || source.index() >= self.sources.len() || !room {
            return Reception { keep: false };
        }
        let len = u64::from(self.shape.piece_len(piece));
        let known = &mut self.sources[source.index()];
        known.failures_in_row = 0;
        match known.kind {
            SourceKind::Here => {}
            SourceKind::Peer => {
                self.cost_bytes += len;
                if !self.ring.contains(&source) {
                    self.ring.push(source);
                }
            }
            SourceKind::Mirror => {
                self.cost_bytes += len;
                self.mirror_bytes += len;
                self.mirror_gives += 1;
            }
        }
        let other_bytes = self.gives_at(piece).any(|give| give.source == source && give.digest != digest);
        let keep = !self.gives_at(piece).any(|give| give.digest == digest);
        let id = u32::try_from(self.gives.len()).expect("at most 4P+16 gives");
        self.gives.push(Give { piece, source, digest, why });
        self.gives_of[index].push(id);
        if other_bytes {
            self.contradicts_itself(source);
        }
        match self.step {
            Step::First => self.first_gave(id, turn),
            Step::Second => self.second_gave(id),
            Step::MirrorDisputed | Step::MirrorRest | Step::Third => {
                if why == Why::Repair && self.seats[index] == Seat::Asked {
                    self.seats[index] = Seat::Given(id);
                }
            }
            Step::Trials { .. } | Step::Over => {}
        }
        self.advance(turn);
        Reception { keep }
    }

    fn contradicts_itself(&mut self, source: SourceId) {
        if !self.sources[source.index()].contradicts_itself {
            self.sources[source.index()].contradicts_itself = true;
            self.actions.push_back(Action::Out { source, reason: OutReason::ContradictsItself });
            self.suspect(source);
        }
    }

    fn first_gave(&mut self, id: u32, turn: &mut Turn<'_>) {
        if self.list_admits(id, turn) && self.first[self.gives[id as usize].piece as usize].is_none() {
            self.accept(id);
        }
        self.settle_lists(turn);
    }

    /// Makes a give the first round's at its piece.
    fn accept(&mut self, id: u32) {
        let Give { piece, digest, source, .. } = self.gives[id as usize];
        self.first[piece as usize] = Some(id);
        self.open_count -= 1;
        while self.first.get(self.first_open).is_some_and(Option::is_some) {
            self.first_open += 1;
        }
        if self.sources[source.index()].kind != SourceKind::Here {
            self.actions.push_back(Action::Accept { piece, digest, source });
        }
    }

    /// Takes a piece out of the first round again, with the running hash past it.
    fn unaccept(&mut self, piece: usize) {
        self.first[piece] = None;
        self.open_count += 1;
        self.first_open = self.first_open.min(piece);
        self.run.truncate(piece + 1);
        self.job = None;
    }

    /// Goes as far as it can without anything from outside.
    fn advance(&mut self, turn: &mut Turn<'_>) {
        loop {
            if self.job.is_some() {
                return;
            }
            let moved = match self.step {
                Step::First => self.advance_first(turn),
                Step::Second => self.advance_second(),
                Step::Trials { after_third } => {
                    self.next_trial(after_third, turn);
                    true
                }
                Step::MirrorDisputed | Step::MirrorRest | Step::Third => self.advance_repair(turn),
                Step::Over => false,
            };
            if !moved {
                return;
            }
        }
    }

    fn advance_first(&mut self, turn: &mut Turn<'_>) -> bool {
        let hashed = self.run.len() - 1;
        if hashed == self.pieces {
            if self.is_right(&self.run[hashed]) {
                self.verified(self.first_assembly());
            } else {
                self.first_round_wrong(turn);
            }
            return true;
        }
        let given = self.first[hashed..].iter().map_while(|give| *give);
        let parts: Vec<_> = given.take(HASH_PARTS_MAX).map(|id| self.version(id)).collect();
        if !parts.is_empty() {
            self.start_job(self.run[hashed].clone(), parts, JobFor::FirstRound);
            return false;
        }
        self.first_stuck()
    }

    /// Whether the first open piece is given by nobody, and what then. Transient limits do not count: with something in
    /// flight there is nothing to decide yet.
    fn first_stuck(&mut self) -> bool {
        if !self.in_flight.is_empty() {
            return false;
        }
        let piece = u32::try_from(self.first_open).expect("pieces are u32");
        let ids = 0..u16::try_from(self.sources.len()).expect("at most SOURCES_MAX");
        if self.lists.arbitrating().is_some() || ids.map(SourceId).any(|source| self.may_ask(source, piece)) {
            return false;
        }
        if self.lists.in_use().is_some() {
            // Everybody who has the piece contradicts the list, or is out by it.
            self.drop_list();
            return true;
        }
        if self.sources_final {
            self.fail(NotHad::NoSource(piece));
        }
        false
    }

    fn first_round_wrong(&mut self, turn: &mut Turn<'_>) {
        self.tried.push(assembly_key(&self.first_assembly()));
        if self.lists.in_use().is_some() {
            self.drop_list();
        }
        let mut givers = self.first.iter().flatten().map(|id| self.gives[*id as usize].source);
        let one = givers.next();
        if givers.all(|giver| Some(giver) == one) {
            turn.budget.charge(if one.is_some_and(|only| self.is_peer(only)) { self.shape.size } else { 0 }, turn.now);
            return self.repair(turn);
        }
        // The hour's one leave covers every round of this download; without it the first round is waste as well.
        self.round_covered = turn.budget.take_round(turn.now);
        turn.budget.charge(if self.round_covered { 0 } else { self.shape.size }, turn.now);
        if self.leave_for_round(turn) {
            self.step = Step::Second;
            self.second = Second::new(self.pieces);
        } else {
            self.repair(turn);
        }
    }

    /// Whether the hour's budget has a whole further round from peers for this download.
    fn leave_for_round(&mut self, turn: &mut Turn<'_>) -> bool {
        self.round_covered = self.round_covered || turn.budget.take_round(turn.now);
        // Third sources are paid for beforehand, so that they never exceed it.
        let ties = u64::from(self.shape.pieces().min(TIES_MAX)) * u64::from(self.shape.piece_bytes);
        self.round_covered || turn.budget.take_bytes(self.shape.size + ties, turn.now)
    }

    fn verified(&mut self, pieces: Vec<Digest>) {
        let mut verdicts: Vec<SourceVerdict> = Vec::new();
        for (index, source) in self.sources.iter().enumerate() {
            let id = SourceId(u16::try_from(index).expect("at most SOURCES_MAX"));
            let mine = self.gives.iter().filter(|give| give.source == id);
            let (mut good, mut bad) = (0, 0);
            mine.for_each(|give| if pieces[give.piece as usize] == give.digest { good += 1 } else { bad += 1 });
            if good + bad > 0 && source.kind != SourceKind::Here {
                verdicts.push(SourceVerdict { source: id, good, bad, contradicted_itself: source.contradicts_itself });
            }
        }
        let false_lists = self.lists.contradicted_by(&pieces);
        self.end(Action::Verified(Outcome { pieces, verdicts, false_lists, cost_bytes: self.cost_bytes }));
    }

    fn fail(&mut self, why: NotHad) {
        let told = if self.mirror_was_wrong && why == NotHad::Undecided { NotHad::MirrorWrong } else { why };
        self.end(Action::Failed(told));
    }

    fn end(&mut self, last: Action) {
        self.step = Step::Over;
        self.job = None;
        for ask in std::mem::take(&mut self.in_flight) {
            self.actions.push_back(Action::Cancel { piece: ask.piece, source: ask.source });
        }
        self.actions.push_back(last);
    }

    /// Hashes `assembly` from its first change on, unless it was tried before.
    fn check(&mut self, assembly: Vec<Digest>) {
        let key = assembly_key(&assembly);
        let from = assembly.iter().zip(self.first_assembly()).position(|(new, old)| *new != old);
        match from {
            Some(from) if !self.tried.contains(&key) => {
                self.tried.push(key);
                let parts = assembly.iter().enumerate().skip(from);
                let parts = parts.map(|(piece, digest)| (u32::try_from(piece).expect("pieces are u32"), *digest)).collect();
                self.start_job(self.run[from].clone(), parts, JobFor::Check(assembly));
            }
            _ => self.assembly_wrong(),
        }
    }

    fn assembly_wrong(&mut self) {
        match self.step {
            Step::Second => self.start_trials(false),
            Step::Third => self.start_trials(true),
            Step::MirrorDisputed => self.mirror_rest(),
            // A mirror may have replaced the file since its index was made; then what the others gave may still be it.
            Step::MirrorRest if !self.without_mirror_tried => {
                self.without_mirror_tried = true;
                let mirrors: Vec<SourceId> = self.mirror().into_iter().collect();
                let assembly = self.assembly(&mirrors);
                self.check(assembly);
            }
            Step::MirrorRest => self.mirror_is_wrong(),
            Step::Trials { .. } | Step::First | Step::Over => {}
        }
    }

    /// Its whole file is another one: from here on it is as if there were no mirror, and those who have the file may still give it.
    fn mirror_is_wrong(&mut self) {
        for source in &mut self.sources {
            let is_mirror = source.kind == SourceKind::Mirror;
            source.gone |= is_mirror;
            // Whoever was suspected was so by the mirror's word.
            source.suspect = is_mirror || source.contradicts_itself;
        }
        self.mirror_was_wrong = true;
        self.trials.clear();
        self.step = Step::Trials { after_third: self.third_done };
    }

    fn start_job(&mut self, start: Sha256, parts: Vec<(u32, Digest)>, what: JobFor) {
        self.jobs += 1;
        self.job = Some((self.jobs, what));
        self.actions.push_back(Action::Hash(HashJob { id: self.jobs, start, parts }));
    }

    /// Puts a piece back among the open ones when the last request for it has failed.
    fn reopen(&mut self, piece: u32, why: Option<Why>) {
        let still = self.in_flight.iter().any(|ask| ask.piece == piece && Some(ask.why) == why);
        match why {
            _ if still => {}
            Some(Why::Second) => self.second.reopen(piece),
            Some(Why::Tie) => self.second.tie_failed(),
            Some(Why::Repair) => {
                if let Some(seat) = self.seats.get_mut(piece as usize).filter(|seat| **seat == Seat::Asked) {
                    *seat = Seat::Open;
                }
            }
            // The next arbiter is chosen when work is asked for.
            Some(Why::Arbitrate | Why::First) | None => {}
        }
    }

    fn land(&mut self, source: SourceId, piece: u32) -> Option<Why> {
        let at = self.in_flight.iter().position(|ask| ask.source == source && ask.piece == piece)?;
        Some(self.in_flight.swap_remove(at).why)
    }

    /// Whether the bounds allow one more piece from `source`. What the mirror would need to send the whole file is never
    /// spent on peers.
    fn affordable(&self, source: SourceId, piece: u32) -> bool {
        let flying: u64 = self.in_flight.iter().map(|ask| u64::from(self.shape.piece_len(ask.piece))).sum();
        let mirror = self.mirror().filter(|mirror| *mirror != source);
        let (kept_bytes, kept_gives) = match mirror {
            Some(_) => (self.shape.size.saturating_sub(self.mirror_bytes), (self.pieces as u64).saturating_sub(self.mirror_gives)),
            None => (0, 0),
        };
        let bytes = self.cost_bytes + flying + u64::from(self.shape.piece_len(piece)) + kept_bytes;
        let gives = self.gives.len() as u64 + self.in_flight.len() as u64 + 1 + kept_gives;
        bytes <= COST_FILES_MAX.saturating_mul(self.shape.size) && gives <= self.gives_max()
    }

    fn gives_max(&self) -> u64 {
        COST_FILES_MAX * self.pieces as u64 + GIVES_SPARE
    }

    fn is_right(&self, state: &Sha256) -> bool {
        Digest(state.clone().finalize().into()) == self.shape.digest
    }

    fn is_peer(&self, source: SourceId) -> bool {
        self.sources[source.index()].kind == SourceKind::Peer
    }

    fn is_mirror(&self, source: SourceId) -> bool {
        self.sources[source.index()].kind == SourceKind::Mirror
    }

    /// The mirror, if it answers.
    fn mirror(&self) -> Option<SourceId> {
        let at = self.sources.iter().position(|source| source.kind == SourceKind::Mirror && !source.gone && !source.contradicts_itself)?;
        Some(SourceId(u16::try_from(at).expect("at most SOURCES_MAX")))
    }

    /// Peers that have given nothing yet, in the order in which they were heard of.
    fn unused_peers(&self) -> impl Iterator<Item = SourceId> + '_ {
        let ids = 0..u16::try_from(self.sources.len()).expect("at most SOURCES_MAX");
        ids.map(SourceId).filter(|id| self.is_peer(*id) && !self.ring.contains(id))
    }

    fn is_asked(&self, piece: u32) -> bool {
        self.in_flight.iter().any(|ask| ask.piece == piece)
    }

    fn gives_at(&self, piece: u32) -> impl Iterator<Item = &Give> + '_ {
        self.gives_of[piece as usize].iter().map(|id| &self.gives[*id as usize])
    }

    fn has_given(&self, source: SourceId, piece: u32) -> bool {
        self.gives_of.get(piece as usize).is_some_and(|_| self.gives_at(piece).any(|give| give.source == source))
    }

    fn version(&self, id: u32) -> (u32, Digest) {
        let give = self.gives[id as usize];
        (give.piece, give.digest)
    }

    /// The first round's version of each piece.
    ///
    /// # Panics
    /// If the first round is not complete.
    fn first_assembly(&self) -> Vec<Digest> {
        self.first.iter().map(|id| self.gives[id.expect("the first round is complete") as usize].digest).collect()
    }
}

fn assembly_key(assembly: &[Digest]) -> Digest {
    let mut all = Sha256::new();
    assembly.iter().for_each(|piece| all.update(piece.0));
    Digest(all.finalize().into())
}
