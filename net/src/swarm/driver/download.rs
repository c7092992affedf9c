//! One download from several sources: the machine [`Schedule`] with its requests, clocks and kept bytes.

use super::hunt::{Holder, Hunt};
use super::kept::{Kept, Place};
use super::lanes::Lane;
use super::led::{self, Led};
use super::outlet::Outlet;
use super::stream::Here;
use super::{Giver, Swarm, SwarmError, SwarmWant, now_s, std_now};
use crate::fleet::FleetDownload;
use crate::mirror::{Mirror, RangeError, RangedFile};
use crate::peer::{Partial, PeerClient, PeerError, PeerPiece};
use crate::swarm::bits::Bits;
use crate::swarm::blame::{Give, HashDone, HashJob, NotHad, OutReason, Outcome, Turn};
use crate::swarm::piece_list::PieceList;
use crate::swarm::rating::Rating;
use crate::swarm::schedule::{Do, FlightId, NewSource, Rules, Schedule};
use crate::swarm::{Failure, FileShape, SourceId, SourceKind};
use poolfs_core::Digest;
use poolfs_core::piece;
use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::sleep_until;

/// With this many pieces waiting to be handed over no answer is taken: then the requests in flight fill up, and no more begin.
const PENDING_MAX: usize = 8;

/// Requests in flight while a fleet leads: a lone asker is leased whole groups, which a slow line could not bring at once. With 4 the last
/// of eight machines behind 50 Mbit/s took 35 s where it took 29 s. How many there are in all is [`super::lanes`]'s.
const LED_FLIGHTS_MAX: usize = 16;

/// Bytes that are compared before it is said that the file is being worked on.
const CHECKING_BYTES: u64 = 1024 * 1024;

/// Pieces that are looked for in one search, each a lookup: who has one of them says what else it has.
const PIECES_SOUGHT_MAX: usize = 8;

/// Searches for pieces in one download.
const PIECE_SEARCHES_MAX: u32 = 3;

/// How long the pieces of a file that is had are given as those of an arriving one: until then it has got its name.
const OFFERED_AFTER: Duration = Duration::from_secs(10);

/// What a download begins with.
#[derive(Default)]
pub(super) struct Start {
    /// When the mirror may be used; `None`: it is no source.
    pub(super) mirror_after: Option<Duration>,
    /// Holders that were found already.
    pub(super) holders: Vec<Holder>,
    /// Pieces that are here.
    pub(super) here: Vec<Here>,
    /// The fleet that shares the file out.
    pub(super) fleet: Option<FleetDownload>,
}

/// Why a download ended without the file.
#[derive(Debug)]
pub(super) enum End {
    Unwanted,
    NotHad(NotHad),
}

pub(super) enum Whom {
    Here,
    Mirror,
    Peer(SocketAddr, /* complete */ bool),
    /// Named by the fleet.
    Member(SocketAddr),
}

/// What a request or a job came to.
enum Event {
    Piece { flight: FlightId, first_byte: Option<Instant>, result: Result<PeerPiece, (Failure, Option<Duration>)> },
    List(SourceId, Option<PieceList>),
    Have(SourceId, Option<Bits>),
    Hashed(HashDone),
}

/// When the first byte of an answer came.
type FirstByte = Arc<OnceLock<Instant>>;

/// Tries of one range at the mirror before it counts as a failure: a kept connection that breaks says nothing of the mirror.
const MIRROR_TRIES_MAX: u32 = 3;

/// A part of a piece on its way out.
struct Part {
    index: u32,
    bytes: OwnedFd,
    giver: Giver,
    /// The piece and the version that are out with it, if it is the last part.
    last: Option<(u32, Digest)>,
}

/// Takes back what others were told of a download, however it ends.
pub(super) struct Told<'a> {
    swarm: &'a Swarm,
    digest: Digest,
    pub(super) announced: bool,
    /// The pieces that may be announced besides.
    of_pieces: HashSet<Digest>,
    pub(super) offered: bool,
    /// The file is had: what is offered stays so until the file itself is found by who gives.
    had: bool,
}

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if self.announced {
            self.swarm.parts.announcer.ended(self.digest);
        }
        match (self.offered, self.had) {
            (false, _) => {}
            (true, false) => self.swarm.parts.partials.remove(&self.digest),
            (true, true) => {
                let (partials, digest) = (Arc::clone(&self.swarm.parts.partials), self.digest);
                tokio::spawn(async move {
                    tokio::time::sleep(OFFERED_AFTER).await;
                    partials.remove(&digest);
                });
            }
        }
    }
}

/// See the module's text.
pub(super) struct Download<'a, 'b, T> {
    pub(super) swarm: &'a Swarm,
    pub(super) shape: FileShape,
    pub(super) incoming: Option<Arc<OwnedFd>>,
    pub(super) schedule: Schedule,
    pub(super) whom: Vec<Whom>,
    ranged: Option<Arc<RangedFile>>,
    kept: Kept,
    outlet: &'a mut Outlet<'b, T>,
    /// Versions to be handed over as soon as there is room: their bytes stay where they are kept until then.
    due: VecDeque<(u32, Digest, SourceId)>,
    pending: VecDeque<Part>,
    /// Handed over, perhaps not yet in the incoming file: piece, version and the number of its delivery.
    unsettled: VecDeque<(u32, Digest, u64)>,
    tasks: JoinSet<Event>,
    flights: HashMap<FlightId, (AbortHandle, SourceId, u32, FirstByte)>,
    /// Those of the flights that take one, and since when.
    pub(super) lanes: HashMap<FlightId, (Lane, Instant)>,
    pub(super) hunt: Hunt,
    /// Strangers are not to hear of it.
    pub(super) fleet_only: bool,
    pub(super) hunting: bool,
    /// Searches for pieces that were begun.
    piece_searches: u32,
    pub(super) told: Told<'a>,
    pub(super) list: Option<Arc<PieceList>>,
    pub(super) led: Option<Led>,
    /// Pieces whose givers had not seen the whole file, and so cannot be convicted for them: source, piece and version. Nothing tells a
    /// liar who says so of all that he gives from his victim, which may have had another list when it gave. So he is out for the
    /// download, never credited, and costs at most what liars may waste in an hour.
    arriving: HashSet<(SourceId, u32, Digest)>,
    /// The delivery that was sent to know when those before it are dealt with.
    marked: u64,
    contradictors: Vec<SourceId>,
    /// Who passed on a list that somebody else signed.
    relays: HashSet<SourceId>,
    checking_bytes: u64,
    end: Option<Result<(), NotHad>>,
}

impl<'a, 'b, T: Send> Download<'a, 'b, T> {
    pub(super) fn new(
        swarm: &'a Swarm,
        want: &SwarmWant,
        shape: FileShape,
        start: Start,
        hunt: Hunt,
        outlet: &'a mut Outlet<'b, T>,
    ) -> Result<Self, SwarmError> {
        let local = |error: io::Error| SwarmError::NotNow { why: format!("keep pieces for comparison: {error}") };
        let kept = Kept::new(shape, want.incoming.clone(), swarm.parts.spill_dir.clone()).map_err(local)?;
        let rules = Rules { mirror_after: start.mirror_after, public: swarm.parts.public, now_s: now_s() };
        let announced = shape.pieces() > 1 && !want.fleet_only && !want.urls.iter().any(|url| url.private);
        if announced {
            swarm.parts.announcer.begun(shape.digest, shape.size);
        }
        let was_led = start.fleet.is_some();
        let with_mirror = start.mirror_after.is_some() || (was_led && !want.urls.is_empty());
        let ranged = with_mirror.then(|| Arc::new(RangedFile::new(shape.digest, shape.size, want.urls.clone())));
        let mut this = Self {
            swarm,
            shape,
            incoming: want.incoming.clone(),
            schedule: Schedule::new(shape, rules, std_now()),
            whom: Vec::new(),
            ranged,
            kept,
            outlet,
            due: VecDeque::new(),
            pending: VecDeque::new(),
            unsettled: VecDeque::new(),
            tasks: JoinSet::new(),
            flights: HashMap::new(),
            lanes: HashMap::new(),
            hunt,
            fleet_only: want.fleet_only,
            hunting: !was_led,
            piece_searches: 0,
            told: Told { swarm, digest: shape.digest, announced, of_pieces: HashSet::new(), offered: false, had: false },
            list: None,
            led: start.fleet.map(|download| Led::new(download, shape.pieces(), swarm.lanes.clone())),
            arriving: HashSet::new(),
            marked: 0,
            contradictors: Vec::new(),
            relays: HashSet::new(),
            checking_bytes: 0,
            end: None,
        };
        if was_led {
            this.turn(|schedule, turn| schedule.lead(true, turn));
        }
        this.take_over(start.here).map_err(local)?;
        if let Some(ranged) = &this.ranged {
            let rating = swarm.book.lock().mirror(&ranged.host(), now_s());
            this.add(SourceKind::Mirror, Whom::Mirror, None, None, rating);
        }
        start.holders.into_iter().for_each(|holder| this.add_peer(holder));
        Ok(this)
    }

    /// The pieces that are here, from givers that are not remembered.
    fn take_over(&mut self, here: Vec<Here>) -> io::Result<()> {
        if here.is_empty() {
            return Ok(());
        }
        let rating = Rating::unknown(crate::swarm::rating::Nearness::Lan, now_s());
        self.add(SourceKind::Here, Whom::Here, None, None, rating);
        let source = SourceId(u16::try_from(self.whom.len() - 1).expect("the first"));
        for Here { piece, digest, bytes } in here {
            self.kept.handed_over(piece, digest)?;
            match bytes {
                Some(bytes) => {
                    self.kept.keep(piece, digest, bytes.try_clone()?)?;
                    self.unsettled.push_back((piece, digest, self.outlet.sent()));
                }
                None => {
                    self.kept.settled(piece, digest);
                    self.give_to_fleet(piece, digest);
                }
            }
            self.turn(|schedule, turn| schedule.resumed(source, piece, digest, turn));
        }
        Ok(())
    }

    /// Runs to the end.
    pub(super) async fn run(&mut self) -> Result<(), End> {
        loop {
            self.act();
            self.take_back_left();
            self.go_alone_in_doubt();
            self.act();
            self.deliver_due();
            self.tell_fleet().await;
            // Members are told of a whole file that they can have.
            let flush_first = self.led.is_some() && self.told.had && self.incoming.is_some() && !self.unsettled.is_empty();
            if self.pending.is_empty()
                && self.due.is_empty()
                && !flush_first
                && let Some(end) = self.end.take()
            {
                self.record();
                return end.map_err(End::NotHad);
            }
            let has_room = self.due.is_empty() && self.pending.len() < PENDING_MAX && self.end.is_none();
            let timeout = self.schedule.next_timeout(std_now());
            let channel = self.outlet.channel();
            // Others may have a piece as soon as it is surely here; then it is worth knowing at once.
            let flush = self.pending.is_empty() && !self.unsettled.is_empty() && (self.led.is_some() || self.list.is_some());
            tokio::select! {
                biased;
                room = channel.reserve(), if !self.pending.is_empty() => {
                    let room = room.map_err(|_| End::Unwanted)?;
                    if let Some(part) = self.pending.pop_front() {
                        self.outlet.put(room, part.index, part.bytes, part.giver);
                        if let Some((piece, digest)) = part.last {
                            self.unsettled.push_back((piece, digest, self.outlet.sent()));
                        }
                        self.settle();
                    }
                }
                all = channel.reserve_all(), if flush && self.incoming.is_some() => {
                    let all = all.map_err(|_| End::Unwanted)?;
                    if self.marked == self.outlet.sent() {
                        drop(all);
                    } else {
                        self.outlet.mark(all);
                        self.marked = self.outlet.sent();
                    }
                    self.settle();
                }
                Some(event) = self.tasks.join_next(), if has_room && !self.tasks.is_empty() => match event {
                    Ok(event) => self.happened(event),
                    Err(error) if error.is_cancelled() => {}
                    Err(error) => tracing::error!(digest = %self.shape.digest, "a request of a download failed: {error}"),
                },
                // What the fleet says next is asked for when there is a slot for it; the lease is renewed meanwhile.
                order = led::next(&mut self.led), if has_room && self.takes_orders() => self.follow(order),
                holder = self.hunt.next(), if has_room && self.hunting => match holder {
                    Some(holder) => self.add_peer(holder),
                    None => {
                        self.hunting = false;
                        if !self.seek_pieces() {
                            self.turn(|schedule, turn| schedule.no_more_sources(turn));
                        }
                    }
                },
                () = sleep_until(timeout.unwrap_or_else(std_now).into()), if has_room && timeout.is_some() => {
                    let first: Vec<(FlightId, Instant)> =
                        self.flights.iter().filter_map(|(id, (.., first))| Some((*id, *first.get()?))).collect();
                    first.into_iter().for_each(|(id, at)| self.schedule.first_byte(id, at));
                    self.turn(|schedule, turn| schedule.tick(turn));
                }
            }
        }
    }

    /// Looks for who announces pieces that no peer is known to have, once a signed list says what they are. Returns whether it does.
    ///
    /// Their holders have nothing else in common by which they could be found, where they announce pieces only.
    fn seek_pieces(&mut self) -> bool {
        let (Some(list), true, None) = (&self.list, self.told.announced, &self.led) else { return false };
        let unheld: HashSet<Digest> = self.schedule.unheld().into_iter().map(|piece| list.pieces[piece as usize]).collect();
        if self.hunting || unheld.is_empty() || self.piece_searches >= PIECE_SEARCHES_MAX || !self.schedule.more_sources() {
            return false;
        }
        // Of a long file not every piece is told of: then any that is leads to holders, who say what else they have.
        let mut pieces = list.told();
        if pieces.iter().any(|piece| unheld.contains(piece)) {
            pieces.retain(|piece| unheld.contains(piece));
        }
        pieces = pieces.into_iter().skip(self.piece_searches as usize * PIECES_SOUGHT_MAX).take(PIECES_SOUGHT_MAX).collect();
        if pieces.is_empty() {
            return false;
        }
        tracing::debug!(digest = %self.shape.digest, pieces = pieces.len(), "looking for holders of pieces");
        self.piece_searches += 1;
        self.hunt.go_on(self.swarm.parts.finder.find_pieces(pieces));
        self.hunting = true;
        true
    }

    /// Whether there is a slot for what the fleet says; what is left to others needs none.
    fn takes_orders(&self) -> bool {
        self.schedule.flights() < LED_FLIGHTS_MAX || self.schedule.has_whole(std_now())
    }

    /// What the mirror said where it is out, and whether it would give the whole file in one piece only.
    pub(super) fn mirror_answers(&self) -> Option<(String, bool)> {
        self.ranged.as_ref().map(|ranged| (ranged.answers(), ranged.knows_no_ranges()))
    }

    pub(super) fn turn<R>(&mut self, f: impl FnOnce(&mut Schedule, &mut Turn<'_>) -> R) -> R {
        let mut book = self.swarm.book.lock();
        f(&mut self.schedule, &mut Turn { now: std_now(), budget: &mut book.budget })
    }

    pub(super) fn add(&mut self, kind: SourceKind, whom: Whom, address: Option<SocketAddr>, have: Option<Bits>, rating: Rating) {
        let source = NewSource { kind, address: address.map(|address| address.ip()), have, rating };
        if let Some(id) = self.turn(|schedule, turn| schedule.add_source(source, turn)) {
            debug_assert_eq!(id.index(), self.whom.len());
            self.whom.push(whom);
        }
    }

    fn add_peer(&mut self, holder: Holder) {
        let rating = self.swarm.book.lock().rating(holder.contact, now_s());
        let complete = holder.have.is_none();
        self.add(SourceKind::Peer, Whom::Peer(holder.contact, complete), Some(holder.contact), holder.have, rating);
    }

    fn peer(&self, source: SourceId) -> Option<SocketAddr> {
        match self.whom.get(source.index()) {
            Some(Whom::Peer(contact, _) | Whom::Member(contact)) => Some(*contact),
            _ => None,
        }
    }

    /// The client that asks this source: of a member more may be had with the fleet's key than without.
    fn client_for(&self, source: SourceId) -> PeerClient {
        match self.whom.get(source.index()) {
            Some(Whom::Member(_)) => self.swarm.fleet_client(),
            Some(Whom::Peer(contact, _)) if self.swarm.is_member(*contact) => self.swarm.fleet_client(),
            _ => self.swarm.parts.client.clone(),
        }
    }

    /// Does what the machine wants.
    fn act(&mut self) {
        while let Some(action) = self.schedule.poll() {
            match action {
                Do::Fetch { flight, source, piece } => self.fetch(flight, source, piece),
                Do::Abort(flight) => {
                    if let Some((handle, _, piece, _)) = self.flights.remove(&flight) {
                        handle.abort();
                        if let Some((lane, began)) = self.lanes.remove(&flight) {
                            lane.given_up(began, std_now());
                        }
                        let needed = self.schedule.blame().needs(piece);
                        self.answered(flight, needed.then_some(Failure::Slow));
                    }
                }
                Do::AskList(source) => {
                    if let Some(contact) = self.peer(source) {
                        let (client, shape) = (self.client_for(source), self.shape);
                        self.tasks.spawn(async move { Event::List(source, client.list(contact, &shape).await.ok()) });
                    }
                }
                Do::AskHave(source) => self.ask_have(source),
                Do::Deliver { piece, digest, source } => self.due.push_back((piece, digest, source)),
                Do::Out(source, reason) => {
                    tracing::debug!(digest = %self.shape.digest, peer = ?self.peer(source), ?reason, "asked for nothing more in this download");
                    if reason == OutReason::ContradictsItself {
                        self.contradictors.push(source);
                    }
                }
                Do::Hash(job) => self.hash(job),
                Do::Verified(outcome) => self.verified(&outcome),
                Do::Failed(why) => self.end = Some(Err(why)),
            }
        }
        self.offer();
    }

    pub(super) fn ask_have(&mut self, source: SourceId) {
        if let Some(contact) = self.peer(source) {
            let (client, shape) = (self.client_for(source), self.shape);
            self.tasks.spawn(async move { Event::Have(source, client.have(contact, &shape).await.ok()) });
        }
    }

    fn fetch(&mut self, flight: FlightId, source: SourceId, piece: u32) {
        let shape = self.shape;
        let first = Arc::new(OnceLock::new());
        let (told, came) = (Arc::clone(&first), Arc::clone(&first));
        let first_byte = move || {
            told.get_or_init(std_now);
        };
        let done = move |result| Event::Piece { flight, first_byte: first.get().copied(), result };
        let handle = match &self.whom[source.index()] {
            Whom::Peer(..) | Whom::Member(_) => {
                let Some(contact) = self.peer(source) else { return };
                let complete = matches!(&self.whom[source.index()], Whom::Peer(_, true));
                let client = self.client_for(source);
                self.tasks.spawn(async move {
                    let result = client.piece(contact, &shape, piece, first_byte).await;
                    done(result.map_err(|error| failure(&error, complete)))
                })
            }
            Whom::Mirror => {
                let (mirror, ranged) = (Arc::clone(&self.swarm.parts.mirror), self.ranged.clone());
                self.tasks.spawn(async move {
                    let Some(ranged) = ranged else { return done(Err((Failure::Gone, None))) };
                    let span = piece::span(u64::from(piece), shape.size, shape.piece_bytes);
                    let result = mirror_range(&mirror, &ranged, &span, first_byte).await;
                    let given = result.map(|(bytes, digest)| PeerPiece { bytes, digest, arriving: false });
                    done(given.map_err(|error| match error {
                        RangeError::Out(why) => {
                            tracing::debug!(digest = %shape.digest, why, "the mirror is out for this file");
                            (Failure::Gone, None)
                        }
                        RangeError::Again(_) => (Failure::Short, None),
                    }))
                })
            }
            Whom::Here => return,
        };
        self.flights.insert(flight, (handle, source, piece, came));
    }

    fn happened(&mut self, event: Event) {
        match event {
            Event::Piece { flight, first_byte, result } => {
                let Some((_, source, piece, _)) = self.flights.remove(&flight) else { return };
                match result {
                    Ok(PeerPiece { bytes, digest, arriving }) => {
                        if let Some((lane, began)) = self.lanes.remove(&flight) {
                            lane.brought(began, std_now());
                        }
                        if arriving {
                            self.arriving.insert((source, piece, digest));
                        }
                        if let Some(at) = first_byte {
                            self.schedule.first_byte(flight, at);
                        }
                        let keep = self.turn(|schedule, turn| schedule.piece(flight, digest, turn));
                        // A piece that misses the list is still needed: the fleet has to name another source.
                        let missed = self.schedule.blame().needs(piece).then_some(Failure::Refused);
                        self.answered(flight, missed);
                        if keep {
                            self.keep(piece, digest, bytes);
                        }
                        if !self.schedule.blame().is_first_round() {
                            self.compared(piece);
                        }
                    }
                    Err((failure, retry_after)) => {
                        self.lanes.remove(&flight);
                        self.answered(flight, Some(failure));
                        self.turn(|schedule, turn| schedule.failed(flight, failure, retry_after, turn));
                    }
                }
            }
            Event::List(source, Some(list)) => {
                if matches!(self.whom.get(source.index()), Some(Whom::Peer(_, false))) {
                    self.relays.insert(source);
                } else if let Some(peer) = self.peer(source) {
                    self.swarm.book.lock().signed(peer, list.signer);
                }
                let out = self.swarm.book.lock().verdicts.key_is_out(&list.signer, now_s());
                if !out {
                    self.turn(|schedule, turn| schedule.list(source, list, turn));
                }
            }
            // Of a member that has not all of it the coordinators know better what it has.
            Event::Have(source, Some(have)) if matches!(self.whom.get(source.index()), Some(Whom::Member(_))) => {
                if have.is_full() {
                    self.turn(|schedule, turn| schedule.whole(source, turn));
                }
            }
            Event::Have(source, Some(have)) => {
                if let Some(Whom::Peer(_, complete)) = self.whom.get_mut(source.index()) {
                    *complete = have.is_full();
                }
                self.turn(|schedule, turn| schedule.have(source, have, turn));
            }
            Event::List(_, None) | Event::Have(_, None) => {}
            Event::Hashed(done) => self.turn(|schedule, turn| schedule.hashed(done, turn)),
        }
    }

    fn keep(&mut self, piece: u32, digest: Digest, bytes: OwnedFd) {
        if let Err(error) = self.kept.keep(piece, digest, bytes) {
            tracing::warn!(digest = %self.shape.digest, "keep pieces for comparison: {error}");
            self.fail_locally();
        }
    }

    /// Says now and then that bytes arrive though none are handed over.
    fn compared(&mut self, piece: u32) {
        self.checking_bytes += u64::from(self.shape.piece_len(piece));
        if self.checking_bytes >= CHECKING_BYTES.min(self.shape.size) && self.outlet.checking(self.checking_bytes) {
            self.checking_bytes = 0;
        }
    }

    /// Takes what is due out of where it is kept, a few pieces at a time: a correction may be as long as the file.
    fn deliver_due(&mut self) {
        while self.pending.len() < PENDING_MAX
            && let Some((piece, digest, source)) = self.due.pop_front()
        {
            self.deliver(piece, digest, source);
        }
    }

    fn deliver(&mut self, piece: u32, digest: Digest, source: SourceId) {
        let giver = match &self.whom[source.index()] {
            Whom::Peer(contact, _) | Whom::Member(contact) => Giver::Peer(*contact),
            Whom::Mirror | Whom::Here => Giver::Mirror(self.ranged.as_ref().map(|ranged| ranged.host()).unwrap_or_default()),
        };
        let cut = || -> io::Result<Vec<Part>> {
            let whole = self.kept.sealed(piece, &digest)?;
            let cut = |index| Ok(Part { index, bytes: self.outlet.cut(piece, index, &whole)?, giver: giver.clone(), last: None });
            self.outlet.parts(piece).map(cut).collect()
        };
        let handed = cut().and_then(|mut parts| {
            self.kept.handed_over(piece, digest)?;
            if let Some(part) = parts.last_mut() {
                part.last = Some((piece, digest));
            }
            self.pending.extend(parts);
            Ok(())
        });
        if let Err(error) = handed {
            tracing::warn!(digest = %self.shape.digest, piece, "hand over a piece that was kept: {error}");
            self.fail_locally();
        }
    }

    /// What is needed cannot be kept or read here: the download ends, and nothing more of it goes out.
    fn fail_locally(&mut self) {
        self.due.clear();
        self.end = Some(Err(NotHad::LocalRead));
    }

    /// Notes what is surely in the incoming file by now, and lets others ask for it.
    fn settle(&mut self) {
        while let Some((piece, digest, nth)) = self.unsettled.front().copied()
            && self.outlet.is_settled(nth)
        {
            self.unsettled.pop_front();
            if self.kept.settled(piece, digest) {
                if self.list.as_ref().is_some_and(|list| list.pieces.get(piece as usize) == Some(&digest)) {
                    self.swarm.parts.partials.arrived(&self.shape.digest, piece);
                    if self.told.announced && self.told.of_pieces.contains(&digest) {
                        self.swarm.parts.announcer.checked(self.shape.digest, &[digest]);
                    }
                }
                self.give_to_fleet(piece, digest);
            }
        }
    }

    /// Offers the download to others as soon as a signed list says which of its pieces are right, and no longer when that list
    /// is dropped.
    fn offer(&mut self) {
        let used = self.schedule.blame().list_in_use();
        if used.map(|list| &list.pieces) == self.list.as_ref().map(|list| &list.pieces) {
            return;
        }
        self.list = used.cloned().map(Arc::new);
        let (Some(list), Some(file), true) = (&self.list, &self.incoming, self.told.announced) else {
            self.swarm.parts.partials.remove(&self.shape.digest);
            if self.told.announced {
                self.swarm.parts.announcer.unchecked(self.shape.digest);
            }
            return;
        };
        let mut have = Bits::none(self.shape.pieces());
        self.told.of_pieces = list.told().into_iter().collect();
        let mut checked = Vec::new();
        for (piece, digest) in (0u32..).zip(&list.pieces) {
            if self.kept.is_settled(piece, digest) {
                have.set(piece);
                checked.extend(Some(*digest).filter(|digest| self.told.of_pieces.contains(digest)));
            }
        }
        self.swarm.parts.announcer.unchecked(self.shape.digest);
        self.swarm.parts.announcer.checked(self.shape.digest, &checked);
        let partial = Partial { file: Arc::clone(file), shape: self.shape, list: Arc::clone(list), have, fleet_only: false };
        self.told.offered |= self.swarm.parts.partials.put(partial);
        self.seek_pieces();
    }

    fn hash(&mut self, job: HashJob) {
        let places: Vec<Option<Place>> = job.parts().iter().map(|(piece, digest)| self.kept.place(*piece, digest)).collect();
        let shape = self.shape;
        self.tasks.spawn_blocking(move || {
            let mut places = places.into_iter();
            let gone = || io::Error::new(io::ErrorKind::NotFound, "a version that is not kept any more");
            Event::Hashed(job.run(|piece, _| places.next().flatten().ok_or_else(gone)?.read(shape.piece_len(piece))))
        });
    }

    /// Whether the source answered for all that it gave.
    fn vouches(&self, source: SourceId) -> bool {
        !self.arriving.iter().any(|(giver, ..)| *giver == source)
    }

    fn verified(&mut self, outcome: &Outcome) {
        let gives = self.schedule.blame().gives().to_vec();
        self.due.retain(|(piece, digest, _)| outcome.pieces[*piece as usize] == *digest);
        let due: HashSet<u32> = self.due.iter().map(|(piece, ..)| *piece).collect();
        for (piece, digest) in (0u32..).zip(&outcome.pieces) {
            if self.kept.here(piece) != Some(*digest)
                && !due.contains(&piece)
                && let Some(give) = gives.iter().find(|give| give.piece == piece && give.digest == *digest)
            {
                self.due.push_back((piece, *digest, give.source));
            }
        }
        // Who gives what it has not verified yet may be an honest machine that a liar gave it to.
        let mut outcome = outcome.clone();
        for verdict in &mut outcome.verdicts {
            let arriving = |give: &&Give| self.arriving.contains(&(give.source, give.piece, give.digest));
            let of_source = || gives.iter().filter(|give| give.source == verdict.source);
            let excused = of_source().filter(arriving).filter(|give| outcome.pieces[give.piece as usize] != give.digest).count();
            verdict.bad = verdict.bad.saturating_sub(u32::try_from(excused).unwrap_or(u32::MAX));
            verdict.contradicted_itself &= self.vouches(verdict.source);
        }
        let signer = |source| self.peer(source).filter(|_| !self.relays.contains(&source));
        let is_public = self.told.announced;
        self.swarm.book.lock().verified(&self.shape, is_public, &outcome, |source| self.peer(source), signer, now_s());
        self.contradictors.clear();
        self.told.had = true;
        if self.end.is_none() {
            self.end = Some(Ok(()));
        }
    }

    /// Puts what was learned of the sources into the book.
    fn record(&mut self) {
        self.write_down();
        self.swarm.book.rated();
    }

    fn write_down(&mut self) {
        let mut book = self.swarm.book.lock();
        for report in self.schedule.report() {
            match &self.whom[report.source.index()] {
                Whom::Peer(contact, _) | Whom::Member(contact) => book.rate(*contact, report.rating, report.pieces, report.bytes),
                Whom::Mirror => {
                    if let Some(ranged) = &self.ranged {
                        book.rate_mirror(ranged.host(), report.rating);
                    }
                }
                Whom::Here => {}
            }
        }
        // Two versions of one piece from one source need no truth.
        for contact in std::mem::take(&mut self.contradictors).into_iter().filter(|source| self.vouches(*source)) {
            self.peer(contact).into_iter().for_each(|peer| book.bad(peer, self.shape.digest, 1, now_s()));
        }
    }
}

/// A range of the mirror's, asked for again where the connection broke or another URL is next.
pub(super) async fn mirror_range(
    mirror: &Mirror,
    ranged: &RangedFile,
    span: &std::ops::Range<u64>,
    first_byte: impl Fn() + Send + Sync,
) -> Result<(OwnedFd, Digest), RangeError> {
    let mut tries = MIRROR_TRIES_MAX;
    loop {
        tries -= 1;
        match mirror.range(ranged, span.clone(), &first_byte).await {
            Err(RangeError::Again(why)) if tries > 0 => {
                tracing::debug!(why, tries, "asked of the mirror again");
            }
            result => return result,
        }
    }
}

/// What a peer's answer means here. One that is no answer at all, or that has not what it said it has, is asked no more.
fn failure(error: &PeerError, complete: bool) -> (Failure, Option<Duration>) {
    match error {
        PeerError::Short => (Failure::Short, None),
        PeerError::Slow => (Failure::Slow, None),
        PeerError::Refused { retry_after: None } if complete => (Failure::Gone, None),
        PeerError::Refused { retry_after } => (Failure::Refused, *retry_after),
        PeerError::Gone | PeerError::Wrong(_) => (Failure::Gone, None),
    }
}
