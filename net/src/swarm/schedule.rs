//! Which piece is asked of whom, and when a second source is asked.
//!
//! One machine per download. It joins the machine that finds the truth ([`Blame`]) with what time tells: how fast each
//! source is ([`Rating`]), how many requests it may have, when an answer is overdue. It takes events with the time and
//! returns [`Do`]s; bytes stay with the caller.
//!
//! - In the first round a source with a free slot gets the next piece if it would bring it before the rest of the file is
//!   here anyway; so a slow source helps and never delays.
//! - A source that no verified file has credited, or that was overdue three times, has one piece in flight.
//! - An overdue piece is asked of a second source. When nothing is left to ask for, pieces in flight are asked for again
//!   where another source would be sooner. The loser may end within a second, since its bytes are evidence too.
//! - The mirror is a source like any other from the time at which the download may use it.
//! - While somebody else leads ([`Schedule::lead`]), the first round asks for what he says, and of whom is known to have the
//!   whole file ([`Schedule::whole`]) for whatever is missing: what many have needs nobody to share it out.
//!
//! **Bounds:** requests in flight, requests of one source, pieces ahead of the first missing one, two requests for a piece.

#[cfg(test)]
mod tests;

use super::bits::Bits;
use super::blame::{Action, Ask, Blame, HashDone, HashJob, LIST_ASKED_MAX, NotHad, OutReason, Outcome, Turn, choose_list_sources};
use super::piece_list::PieceList;
use super::rating::Rating;
use super::{Failure, FileShape, SourceId, SourceKind};
use poolfs_core::Digest;
use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// The small-file rule: how long the mirror waits for peers where they have lately been found sooner than this.
pub const HEAD_START: Duration = Duration::from_millis(300);

/// Requests in flight for one download.
pub const FLIGHTS_MAX: usize = 64;

/// Requests in flight to one credited peer.
pub const SLOTS_MAX: u32 = 8;

/// Requests in flight to the mirror: stock apt keeps one connection and pipelines ten.
pub const MIRROR_SLOTS: u32 = 4;

/// Pieces asked for past the first one missing: bounds what waits out of order.
pub const AHEAD_PIECES_MAX: usize = 256;

/// A piece is overdue after this, or [`OVERDUE_MEDIANS`] times the median piece's time if that is longer.
pub const OVERDUE_MIN: Duration = Duration::from_secs(2);

/// See [`OVERDUE_MIN`].
pub const OVERDUE_MEDIANS: u32 = 4;

/// A request is given up after so many times the time at which it is overdue.
const GIVE_UP_OVERDUES: u32 = 4;

/// A request that is being answered and that nobody else could answer is given up after this: on a slow line each piece takes
/// long, and asking for it again takes longer.
const GIVE_UP_ALONE: Duration = Duration::from_secs(60);

/// A source that was overdue this often has one piece in flight.
const OVERDUE_COUNT_MAX: u32 = 3;

/// What the loser of a hedge has left to end.
const LOSER_STAYS: Duration = Duration::from_secs(1);

/// How often a partial holder is asked again what it has.
const HAVE_AGAIN: Duration = Duration::from_secs(2);

/// How long a download without progress waits for a partial holder to get what nobody has.
pub const PARTIAL_PATIENCE: Duration = Duration::from_secs(20);

/// A source that says it is full this often in a row has refused.
const FULL_COUNT_MAX: u32 = 5;

/// Piece times of which the median is taken.
const TIMES_KEPT: usize = 32;

/// What a download is told at its start.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// When the mirror may be asked: at once, after a head start of the peers, or (`None`) only once
    /// [`Schedule::allow_mirror`] says so, as in a fleet.
    pub mirror_after: Option<Duration>,
    /// Whether the network is public: then no two lists are taken of one address range.
    pub public: bool,
    /// Unix seconds at the start: ratings outlive the process.
    pub now_s: u64,
}

/// A source as the caller knows it.
#[derive(Clone, Debug)]
pub struct NewSource {
    /// What it is.
    pub kind: SourceKind,
    /// Its address, where it is a peer.
    pub address: Option<IpAddr>,
    /// What it has; `None`: every piece.
    pub have: Option<Bits>,
    /// How it was until now.
    pub rating: Rating,
}

/// A request in flight, numbered within its download.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FlightId(pub u64);

/// What the caller is to do.
#[derive(Debug)]
pub enum Do {
    /// Ask `source` for `piece`, and report with this number.
    Fetch {
        /// The request.
        flight: FlightId,
        /// Whom.
        source: SourceId,
        /// What.
        piece: u32,
    },
    /// Break this request off: nothing is reported for it any more.
    Abort(FlightId),
    /// Ask for the signed piece list, and hand it to [`Schedule::list`] if there is one.
    AskList(SourceId),
    /// Ask what the source has by now, and hand it to [`Schedule::have`].
    AskHave(SourceId),
    /// Hand this version of the piece on to who waits for the file; a later one takes its place.
    Deliver {
        /// Which piece.
        piece: u32,
        /// Which version.
        digest: Digest,
        /// Who gave it.
        source: SourceId,
    },
    /// The source is asked for nothing more in this download.
    Out(SourceId, OutReason),
    /// Run this over the kept bytes, off the tasks that must not wait, and hand the result to [`Schedule::hashed`].
    Hash(HashJob),
    /// The file is had; nothing more comes.
    Verified(Outcome),
    /// The file is not had; nothing more comes.
    Failed(NotHad),
}

#[derive(Debug)]
struct Known {
    kind: SourceKind,
    address: Option<IpAddr>,
    rating: Rating,
    partial: bool,
    overdue: u32,
    full: u32,
    wait_until: Option<Instant>,
    have_asked: Option<Instant>,
    list_asked: bool,
    /// It has a part of the file only, and was asked for the list that it got of somebody else.
    relay_asked: bool,
    /// It was seen to have the whole file.
    whole: bool,
    pieces: u32,
    bytes: u64,
}

#[derive(Debug)]
struct Flight {
    id: FlightId,
    source: SourceId,
    piece: u32,
    started: Instant,
    expected: Duration,
    first_byte: Option<Instant>,
    overdue: bool,
    /// Not given up before: nobody else could bring the piece.
    spared_until: Option<Instant>,
    /// Another source has brought the piece.
    lost_at: Option<Instant>,
}

impl Flight {
    /// When it is given up, where requests are overdue after `overdue`, which changes while it is on its way.
    fn given_up_at(&self, overdue: Duration) -> Instant {
        let at = self.started + overdue * GIVE_UP_OVERDUES;
        self.spared_until.map_or(at, |until| at.max(until))
    }
}

/// What one source has brought.
#[derive(Clone, Debug)]
pub struct SourceReport {
    /// Who.
    pub source: SourceId,
    /// Complete pieces.
    pub pieces: u32,
    /// Their bytes.
    pub bytes: u64,
    /// Its rating as this download has changed it.
    pub rating: Rating,
}

/// The state machine of one download's requests. See the module's text.
#[derive(Debug)]
pub struct Schedule {
    blame: Blame,
    shape: FileShape,
    rules: Rules,
    started: Instant,
    mirror_from: Option<Instant>,
    known: Vec<Known>,
    flights: Vec<Flight>,
    next_flight: u64,
    times: VecDeque<Duration>,
    waiters: u32,
    led: bool,
    todo: VecDeque<Do>,
    peers_allowed: Option<bool>,
    sources_final: bool,
    /// The machine below was told so.
    final_told: bool,
    progress_at: Instant,
}

impl Schedule {
    /// A download of `shape` for which one caller waits.
    pub fn new(shape: FileShape, rules: Rules, now: Instant) -> Self {
        Self {
            blame: Blame::new(shape),
            shape,
            rules,
            started: now,
            mirror_from: rules.mirror_after.map(|after| now + after),
            known: Vec::new(),
            flights: Vec::new(),
            next_flight: 0,
            times: VecDeque::new(),
            waiters: 1,
            led: false,
            todo: VecDeque::new(),
            peers_allowed: None,
            sources_final: false,
            final_told: false,
            progress_at: now,
        }
    }

    /// Adds a source; `None` if the download has enough of them or it does not fit, see [`Blame::add_source`].
    pub fn add_source(&mut self, source: NewSource, turn: &mut Turn<'_>) -> Option<SourceId> {
        let partial = source.have.as_ref().is_some_and(|have| !have.is_full());
        let id = self.blame.add_source(source.kind, source.have)?;
        self.known.push(Known {
            kind: source.kind,
            address: source.address,
            rating: source.rating,
            partial,
            overdue: 0,
            full: 0,
            wait_until: None,
            have_asked: None,
            list_asked: false,
            relay_asked: false,
            whole: false,
            pieces: 0,
            bytes: 0,
        });
        self.choose_lists();
        self.pump(turn);
        Some(id)
    }

    /// Notes a piece that is here from an earlier run. All of them come before the first [`Self::poll`].
    pub fn resumed(&mut self, here: SourceId, piece: u32, digest: Digest, turn: &mut Turn<'_>) {
        self.blame.resumed(here, piece, digest, turn);
        self.pump(turn);
    }

    /// Says that no further source will be added: a piece that nobody gives now ends the download, though partial holders
    /// have [`PARTIAL_PATIENCE`] to get it.
    pub fn no_more_sources(&mut self, turn: &mut Turn<'_>) {
        self.sources_final = true;
        self.pump(turn);
    }

    /// Takes [`Self::no_more_sources`] back where it has not ended the download yet. Returns whether it has not.
    pub fn more_sources(&mut self) -> bool {
        let open = !self.final_told && !self.blame.is_over();
        self.sources_final &= !open;
        open
    }

    /// The missing pieces that no peer is known to give.
    pub fn unheld(&self) -> Vec<u32> {
        let peers: Vec<SourceId> = (0..self.known.len()).filter(|at| self.known[*at].kind == SourceKind::Peer).map(source_id).collect();
        self.blame.open().filter(|piece| !self.is_asked(*piece) && !peers.iter().any(|peer| self.blame.may_ask(*peer, *piece))).collect()
    }

    /// Lets the mirror be used from now on.
    pub fn allow_mirror(&mut self, turn: &mut Turn<'_>) {
        self.mirror_from = Some(self.mirror_from.map_or(turn.now, |from| from.min(turn.now)));
        self.pump(turn);
    }

    /// Says whether somebody else chooses what the first round asks of whom, through [`Self::ask`]. Later rounds are this
    /// machine's own.
    pub fn lead(&mut self, led: bool, turn: &mut Turn<'_>) {
        self.led = led;
        self.pump(turn);
    }

    /// Notes that a source has the whole file: it is asked for whatever is missing, though somebody else leads.
    pub fn whole(&mut self, source: SourceId, turn: &mut Turn<'_>) {
        if let Some(known) = self.known.get_mut(source.index()) {
            known.whole = true;
            self.pump(turn);
        }
    }

    /// Whether somebody who has the whole file gives it in time, so that no other source is needed.
    pub fn has_whole(&self, now: Instant) -> bool {
        let good = |(at, known): (usize, &Known)| known.whole && known.overdue == 0 && self.is_usable(source_id(at), now);
        self.known.iter().enumerate().any(good)
    }

    /// Asks this source for this piece; `None` if that piece is here, or the source may not be asked for it.
    pub fn ask(&mut self, source: SourceId, piece: u32, turn: &mut Turn<'_>) -> Option<FlightId> {
        let may = self.flights.len() < FLIGHTS_MAX && source.index() < self.known.len() && self.blame.begin(source, piece);
        let flight = FlightId(self.next_flight);
        if may {
            self.take_off(Ask { piece, source, why: super::blame::Why::First }, turn.now);
        }
        self.pump(turn);
        may.then_some(flight)
    }

    /// One more caller waits for this download.
    pub fn join(&mut self) {
        self.waiters += 1;
    }

    /// A caller no longer waits. With the last one gone all requests are broken off, and `true` comes back: the download is
    /// to be dropped, its pieces may be resumed.
    pub fn leave(&mut self) -> bool {
        self.waiters = self.waiters.saturating_sub(1);
        if self.waiters == 0 {
            self.abort_all();
        }
        self.waiters == 0
    }

    /// Takes a checked list from a source.
    pub fn list(&mut self, source: SourceId, list: PieceList, turn: &mut Turn<'_>) {
        self.blame.list(source, list, turn);
        self.pump(turn);
    }

    /// Takes what a source has by now.
    pub fn have(&mut self, source: SourceId, have: Bits, turn: &mut Turn<'_>) {
        if let Some(known) = self.known.get_mut(source.index()) {
            known.partial = !have.is_full();
            self.blame.set_have(source, have, turn);
            self.choose_lists();
            self.pump(turn);
        }
    }

    /// Notes that the first byte of an answer is here.
    pub fn first_byte(&mut self, flight: FlightId, now: Instant) {
        if let Some(flight) = self.flights.iter_mut().find(|other| other.id == flight) {
            flight.first_byte.get_or_insert(now);
        }
    }

    /// Takes a complete piece: exactly the asked bytes, with this SHA-256. `true`: keep the bytes by (piece, digest) until
    /// the download is over.
    pub fn piece(&mut self, flight: FlightId, digest: Digest, turn: &mut Turn<'_>) -> bool {
        let at_once = self.flights.iter().find(|other| other.id == flight).map(|flight| self.in_flight(flight.source));
        let Some(flight) = self.take(flight) else { return false };
        let now_s = self.now_s(turn.now);
        let bytes = u64::from(self.shape.piece_len(flight.piece));
        let known = &mut self.known[flight.source.index()];
        let first_byte = flight.first_byte.unwrap_or(turn.now);
        // All transfers of the source share its rate.
        let seconds = turn.now.saturating_duration_since(first_byte).max(Duration::from_micros(100)).as_secs_f64();
        #[allow(clippy::cast_precision_loss, reason = "an estimate")]
        let rate = bytes as f64 * f64::from(at_once.unwrap_or(1)) / seconds;
        known.rating.succeeded(first_byte.saturating_duration_since(flight.started), rate, now_s);
        known.full = 0;
        known.pieces += 1;
        known.bytes += bytes;
        self.progress_at = turn.now;
        self.times.push_back(turn.now.saturating_duration_since(flight.started));
        if self.times.len() > TIMES_KEPT {
            self.times.pop_front();
        }
        for other in self.flights.iter_mut().filter(|other| other.piece == flight.piece) {
            other.lost_at.get_or_insert(turn.now);
        }
        let reception = self.blame.gave(flight.source, flight.piece, digest, turn);
        self.pump(turn);
        reception.keep
    }

    /// Takes the news that a request brought no piece. `retry_after`: the source says that it is full until then.
    pub fn failed(&mut self, flight: FlightId, failure: Failure, retry_after: Option<Duration>, turn: &mut Turn<'_>) {
        let Some(flight) = self.take(flight) else { return };
        let now_s = self.now_s(turn.now);
        let known = &mut self.known[flight.source.index()];
        known.rating.failed(failure, now_s);
        known.full += u32::from(retry_after.is_some());
        match retry_after {
            Some(after) if known.full <= FULL_COUNT_MAX => {
                known.wait_until = Some(turn.now + after);
                self.blame.cancelled(flight.source, flight.piece, turn);
            }
            _ => self.blame.failed(flight.source, flight.piece, failure, turn),
        }
        self.pump(turn);
    }

    /// Takes the result of a [`HashJob`].
    pub fn hashed(&mut self, done: HashDone, turn: &mut Turn<'_>) {
        self.blame.hashed(done, turn);
        self.pump(turn);
    }

    /// Acts on the time; call it when [`Self::next_timeout`] is reached.
    pub fn tick(&mut self, turn: &mut Turn<'_>) {
        let overdue = self.overdue_after();
        let now_s = self.now_s(turn.now);
        let mut over = Vec::new();
        for flight in &mut self.flights {
            let age = turn.now.saturating_duration_since(flight.started);
            if age >= overdue && !flight.overdue {
                flight.overdue = true;
                let known = &mut self.known[flight.source.index()];
                known.overdue += 1;
                known.rating.failed(Failure::Slow, now_s);
            }
            if flight.lost_at.is_some_and(|at| turn.now >= at + LOSER_STAYS) {
                over.push((flight.id, true));
            } else if turn.now >= flight.given_up_at(overdue) {
                over.push((flight.id, false));
            }
        }
        for (id, lost) in over {
            if !lost && self.spare(id, turn.now) {
                continue;
            }
            if let Some(flight) = self.take(id) {
                self.todo.push_back(Do::Abort(id));
                if lost {
                    self.blame.cancelled(flight.source, flight.piece, turn);
                } else {
                    self.blame.failed(flight.source, flight.piece, Failure::Slow, turn);
                }
            }
        }
        self.pump(turn);
    }

    /// Lets a request go on that is being answered, if nobody else is there for its piece; `false`: it is to be given up.
    fn spare(&mut self, id: FlightId, now: Instant) -> bool {
        let Some(at) = self.flights.iter().position(|flight| flight.id == id) else { return false };
        let Flight { source, piece, started, first_byte, .. } = self.flights[at];
        let other = |at: usize| source_id(at) != source && self.is_choice(at) && self.is_usable(source_id(at), now);
        let alone = self.blame.needs(piece) && !(0..self.known.len()).any(|at| other(at) && self.blame.may_ask(source_id(at), piece));
        let spared = alone && first_byte.is_some() && now < started + GIVE_UP_ALONE;
        if spared {
            self.flights[at].spared_until = Some((now + OVERDUE_MIN).min(started + GIVE_UP_ALONE));
        }
        spared
    }

    /// When [`Self::tick`] is to be called at the latest, a time that is past: now; `None`: nothing depends on time.
    pub fn next_timeout(&self, now: Instant) -> Option<Instant> {
        let overdue = self.overdue_after();
        let of_flight = |flight: &Flight| {
            let end = if flight.overdue { flight.given_up_at(overdue) } else { flight.started + overdue };
            flight.lost_at.map_or(end, |at| end.min(at + LOSER_STAYS))
        };
        let flights = self.flights.iter().map(of_flight);
        let waiting = self.known.iter().filter_map(|known| known.wait_until);
        let haves = self.known.iter().filter(|known| known.partial).filter_map(|known| known.have_asked.map(|at| at + HAVE_AGAIN));
        // What is past among these every event has acted on already; an overdue request only `tick` acts on.
        let others = waiting.chain(haves).chain(self.mirror_from).chain(self.partial_until(now)).filter(|at| *at > now);
        flights.chain(others).min()
    }

    /// What to do next, oldest first; call it until it gives nothing.
    pub fn poll(&mut self) -> Option<Do> {
        self.todo.pop_front()
    }

    /// Whether the file is had or given up.
    pub fn is_over(&self) -> bool {
        self.blame.is_over()
    }

    /// The machine that finds the truth, to be looked at.
    pub fn blame(&self) -> &Blame {
        &self.blame
    }

    /// Requests in flight.
    pub fn flights(&self) -> usize {
        self.flights.len()
    }

    /// What each source has brought so far.
    pub fn report(&self) -> Vec<SourceReport> {
        let report = |(id, known): (u16, &Known)| SourceReport {
            source: SourceId(id),
            pieces: known.pieces,
            bytes: known.bytes,
            rating: known.rating,
        };
        (0u16..).zip(&self.known).map(report).collect()
    }

    /// Asks for all that may be asked for now.
    fn pump(&mut self, turn: &mut Turn<'_>) {
        self.drain();
        let was_allowed = self.peers_allowed;
        if was_allowed.is_none() && self.known.iter().any(|known| known.kind == SourceKind::Peer) {
            self.peers_allowed = Some(turn.budget.peers_allowed(self.shape.size, turn.now));
        }
        if self.sources_final && self.peers_allowed == Some(false) && !self.known.iter().any(|known| known.kind == SourceKind::Mirror) {
            self.blame.give_up(NotHad::BudgetSpent);
        }
        if self.sources_final && !self.final_told && self.partial_until(turn.now).is_none() {
            self.final_told = true;
            self.blame.no_more_sources(turn);
            self.drain();
        }
        for known in &mut self.known {
            known.wait_until = known.wait_until.filter(|until| *until > turn.now);
        }
        if self.blame.is_first_round() && self.waiters > 0 && (!self.led || self.known.iter().any(|known| known.whole)) {
            while self.flights.len() < FLIGHTS_MAX && self.ask_in_first_round(turn.now) {}
            self.hedge_in_first_round(turn.now);
        }
        while self.flights.len() < FLIGHTS_MAX && self.waiters > 0 {
            let ready: Vec<bool> = (0..self.known.len()).map(|at| self.is_ready(source_id(at), turn.now)).collect();
            let Some(ask) = self.blame.next_ask(|source| ready[source.index()], turn) else { break };
            self.take_off(ask, turn.now);
        }
        if !self.blame.is_first_round() {
            self.hedge_later_rounds(turn.now);
        }
        self.ask_haves(turn.now);
        self.drain();
    }

    /// Hands on what the machine below wants.
    fn drain(&mut self) {
        while let Some(action) = self.blame.poll() {
            match action {
                Action::Accept { piece, digest, source } => self.todo.push_back(Do::Deliver { piece, digest, source }),
                Action::Cancel { piece, source } => {
                    let at = self.flights.iter().position(|flight| flight.piece == piece && flight.source == source);
                    if let Some(at) = at {
                        let flight = self.flights.swap_remove(at);
                        self.todo.push_back(Do::Abort(flight.id));
                    }
                }
                Action::Out { source, reason } => self.todo.push_back(Do::Out(source, reason)),
                Action::Hash(job) => self.todo.push_back(Do::Hash(job)),
                Action::Verified(outcome) => {
                    self.credit(&outcome);
                    self.abort_all();
                    self.todo.push_back(Do::Verified(outcome));
                }
                Action::Failed(why) => {
                    self.abort_all();
                    self.todo.push_back(Do::Failed(why));
                }
            }
        }
    }

    fn credit(&mut self, outcome: &Outcome) {
        for verdict in &outcome.verdicts {
            let now_s = self.rules.now_s;
            let rating = &mut self.known[verdict.source.index()].rating;
            if verdict.is_guilty() {
                rating.discredit();
            } else if verdict.good > 0 {
                rating.credit(now_s);
            }
        }
    }

    fn abort_all(&mut self) {
        for flight in std::mem::take(&mut self.flights) {
            self.todo.push_back(Do::Abort(flight.id));
        }
    }

    /// Asks one more piece of the source that would bring it soonest; `false` if there is none to ask now.
    fn ask_in_first_round(&mut self, now: Instant) -> bool {
        if self.shape.pieces() == 1 && !self.led && self.small_file_at_mirror(now) {
            return true;
        }
        let open: Vec<u32> = self.blame.open().take(AHEAD_PIECES_MAX).filter(|piece| !self.is_asked(*piece)).collect();
        if open.is_empty() {
            return false;
        }
        let len = u64::from(self.shape.piece_bytes);
        let finish = |at: usize| self.known[at].rating.expected(len * (1 + u64::from(self.in_flight(source_id(at)))));
        // Who has nothing of what is open brings nothing of it, however fast.
        let of_use = |source| self.is_usable(source, now) && open.iter().any(|piece| self.blame.may_ask(source, *piece));
        let mut order: Vec<(Duration, SourceId)> = (0..self.known.len())
            .filter(|at| self.is_choice(*at) && of_use(source_id(*at)))
            .map(|at| (finish(at), source_id(at)))
            .collect();
        order.sort();
        let Some((soonest, _)) = order.first().copied() else { return false };
        let rates: f64 = order.iter().map(|(_, source)| self.known[source.index()].rating.rate_bytes_s()).sum();
        #[allow(clippy::cast_precision_loss, reason = "an estimate")]
        let rest_s = (self.blame.open_count() as u64 * len) as f64 / rates.max(1.0);
        let in_time = Duration::from_secs_f64(rest_s.min(86_400.0)).max(soonest);
        for (finish, source) in order {
            if finish > in_time {
                break;
            }
            if !self.has_slot(source, now) {
                continue;
            }
            if let Some(piece) = open.iter().copied().find(|piece| self.blame.may_ask(source, *piece))
                && self.blame.begin(source, piece)
            {
                self.take_off(Ask { piece, source, why: super::blame::Why::First }, now);
                return true;
            }
        }
        false
    }

    /// A small file comes from the mirror as soon as the mirror may be used, whoever else was asked: the first one wins.
    fn small_file_at_mirror(&mut self, now: Instant) -> bool {
        let mirror = (0..self.known.len()).map(source_id).find(|source| self.known[source.index()].kind == SourceKind::Mirror);
        let Some(mirror) = mirror.filter(|mirror| self.has_slot(*mirror, now) && self.in_flight(*mirror) == 0) else { return false };
        let begun = self.blame.begin(mirror, 0);
        if begun {
            self.take_off(Ask { piece: 0, source: mirror, why: super::blame::Why::First }, now);
        }
        begun
    }

    /// Asks a second source for what is overdue and, when nothing else is left to ask for, for what would come sooner.
    fn hedge_in_first_round(&mut self, now: Instant) {
        let all_asked = self.blame.open().take(AHEAD_PIECES_MAX).all(|piece| self.is_asked(piece));
        let slowest: Vec<(u32, Duration, bool)> = self
            .flights
            .iter()
            .filter(|flight| flight.lost_at.is_none() && self.blame.needs(flight.piece))
            .filter(|flight| self.flights.iter().filter(|other| other.piece == flight.piece).count() == 1)
            .map(|flight| (flight.piece, remaining(flight, now), flight.overdue))
            .collect();
        for (piece, remains, overdue) in slowest {
            if self.flights.len() >= FLIGHTS_MAX || !(overdue || all_asked) {
                continue;
            }
            let len = u64::from(self.shape.piece_len(piece));
            let finish = |source: &SourceId| self.known[source.index()].rating.expected(len * (1 + u64::from(self.in_flight(*source))));
            let second = (0..self.known.len())
                .filter(|at| self.is_choice(*at))
                .map(source_id)
                .filter(|source| self.has_slot(*source, now) && self.blame.may_ask(*source, piece))
                .min_by_key(finish);
            if let Some(source) = second.filter(|source| overdue || finish(source) < remains)
                && self.blame.begin(source, piece)
            {
                self.take_off(Ask { piece, source, why: super::blame::Why::First }, now);
            }
        }
    }

    fn hedge_later_rounds(&mut self, now: Instant) {
        let overdue: Vec<u32> = self.flights.iter().filter(|flight| flight.overdue && flight.lost_at.is_none()).map(|f| f.piece).collect();
        for piece in overdue {
            let alone = self.flights.iter().filter(|flight| flight.piece == piece).count() == 1;
            let ready: Vec<bool> = (0..self.known.len()).map(|at| self.is_ready(source_id(at), now)).collect();
            if alone
                && self.flights.len() < FLIGHTS_MAX
                && let Some(ask) = self.blame.hedge(piece, |source| ready[source.index()])
            {
                self.take_off(ask, now);
            }
        }
    }

    fn take_off(&mut self, ask: Ask, now: Instant) {
        let id = FlightId(self.next_flight);
        self.next_flight += 1;
        let bytes = u64::from(self.shape.piece_len(ask.piece)) + u64::from(self.in_flight(ask.source)) * u64::from(self.shape.piece_bytes);
        let expected = self.known[ask.source.index()].rating.expected(bytes);
        let flight = Flight {
            id,
            source: ask.source,
            piece: ask.piece,
            started: now,
            expected,
            first_byte: None,
            overdue: false,
            spared_until: None,
            lost_at: None,
        };
        self.flights.push(flight);
        self.todo.push_back(Do::Fetch { flight: id, source: ask.source, piece: ask.piece });
    }

    fn take(&mut self, id: FlightId) -> Option<Flight> {
        let at = self.flights.iter().position(|flight| flight.id == id)?;
        Some(self.flights.swap_remove(at))
    }

    /// Asks complete holders for their lists, a few of them, none twice. Where none is known, partial holders pass on what they
    /// got.
    fn choose_lists(&mut self) {
        if self.shape.pieces() < 2 {
            return;
        }
        let asked = |known: &Known| known.list_asked;
        let complete =
            (0u16..).zip(&self.known).filter(|(_, known)| known.kind == SourceKind::Peer && (!known.partial || known.list_asked));
        // Those asked before come first, so that what is chosen beside them fits them.
        let mut holders: Vec<(bool, SourceId, IpAddr)> =
            complete.filter_map(|(id, known)| Some((!asked(known), SourceId(id), known.address?))).collect();
        holders.sort_by_key(|(new, source, _)| (*new, *source));
        let chosen = choose_list_sources(holders.into_iter().map(|(_, source, address)| (source, address)), self.rules.public);
        debug_assert!(chosen.len() <= LIST_ASKED_MAX);
        let relays = self.known.iter().filter(|known| known.relay_asked).count();
        if chosen.is_empty()
            && self.blame.list_in_use().is_none()
            && relays < LIST_ASKED_MAX
            && let Some(at) = self.known.iter().position(|known| known.kind == SourceKind::Peer && known.partial && !known.relay_asked)
        {
            self.known[at].relay_asked = true;
            self.todo.push_back(Do::AskList(source_id(at)));
        }
        for source in chosen {
            let known = &mut self.known[source.index()];
            if !known.list_asked {
                known.list_asked = true;
                self.todo.push_back(Do::AskList(source));
            }
        }
    }

    /// Asks partial holders that have nothing more to give what they have by now.
    fn ask_haves(&mut self, now: Instant) {
        if self.blame.is_over() {
            return;
        }
        for at in 0..self.known.len() {
            let idle = self.in_flight(source_id(at)) == 0 && self.is_usable(source_id(at), now);
            let known = &mut self.known[at];
            if known.partial && idle && known.have_asked.is_none_or(|asked| now >= asked + HAVE_AGAIN) {
                known.have_asked = Some(now);
                self.todo.push_back(Do::AskHave(source_id(at)));
            }
        }
    }

    /// Until when a partial holder may still get what nobody has; `None`: there is none, or it is over.
    fn partial_until(&self, now: Instant) -> Option<Instant> {
        let partial = |(at, known): (usize, &Known)| known.partial && !self.blame.is_out(source_id(at));
        let until = self.progress_at + PARTIAL_PATIENCE;
        (now < until && self.known.iter().enumerate().any(partial)).then_some(until)
    }

    /// Whether the source is this machine's to choose.
    fn is_choice(&self, at: usize) -> bool {
        !self.led || self.known[at].whole
    }

    /// Whether anything may be asked of the source now, slots aside.
    fn is_usable(&self, source: SourceId, now: Instant) -> bool {
        let known = &self.known[source.index()];
        let allowed = match known.kind {
            SourceKind::Here => false,
            SourceKind::Mirror => self.mirror_from.is_some_and(|from| now >= from),
            SourceKind::Peer => self.peers_allowed != Some(false),
        };
        allowed && known.wait_until.is_none_or(|until| now >= until) && !self.blame.is_out(source)
    }

    fn has_slot(&self, source: SourceId, now: Instant) -> bool {
        self.is_usable(source, now) && self.in_flight(source) < self.slots(source, now)
    }

    /// As [`Self::has_slot`] for what the machine below decides: there the mirror is not waited for.
    fn is_ready(&self, source: SourceId, now: Instant) -> bool {
        let known = &self.known[source.index()];
        let mirror = known.kind == SourceKind::Mirror && known.wait_until.is_none_or(|until| now >= until) && !self.blame.is_out(source);
        (mirror || self.is_usable(source, now)) && self.in_flight(source) < self.slots(source, now)
    }

    fn slots(&self, source: SourceId, now: Instant) -> u32 {
        let known = &self.known[source.index()];
        match known.kind {
            SourceKind::Here => 0,
            _ if known.overdue >= OVERDUE_COUNT_MAX => 1,
            SourceKind::Mirror => MIRROR_SLOTS,
            SourceKind::Peer if !known.rating.is_credited(self.now_s(now)) => 1,
            SourceKind::Peer => {
                // What fills the line while one answer is on its way, and one more.
                let in_line = known.rating.rate_bytes_s() * known.rating.latency_s() / f64::from(self.shape.piece_bytes);
                #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
                let slots = in_line.ceil().clamp(1.0, f64::from(SLOTS_MAX - 1)) as u32 + 1;
                slots
            }
        }
    }

    fn in_flight(&self, source: SourceId) -> u32 {
        let count = self.flights.iter().filter(|flight| flight.source == source).count();
        u32::try_from(count).expect("at most FLIGHTS_MAX")
    }

    fn is_asked(&self, piece: u32) -> bool {
        self.flights.iter().any(|flight| flight.piece == piece)
    }

    /// How old a request is when it is overdue.
    fn overdue_after(&self) -> Duration {
        let mut times: Vec<Duration> = self.times.iter().copied().collect();
        times.sort_unstable();
        times.get(times.len() / 2).map_or(OVERDUE_MIN, |median| (*median * OVERDUE_MEDIANS).max(OVERDUE_MIN))
    }

    fn now_s(&self, now: Instant) -> u64 {
        self.rules.now_s + now.saturating_duration_since(self.started).as_secs()
    }
}

/// How long a request will still take: what is expected, and when that is over as long again as it has taken.
fn remaining(flight: &Flight, now: Instant) -> Duration {
    let age = now.saturating_duration_since(flight.started);
    if age < flight.expected { flight.expected - age } else { age }
}

fn source_id(at: usize) -> SourceId {
    SourceId(u16::try_from(at).expect("at most SOURCES_MAX"))
}
