//! A download that a fleet shares out: the coordinators say which piece comes from the mirror and which from what member.
//!
//! The first round asks for what they say and for nothing else, so that the mirror is not raced. Each piece that is here is
//! told of at once and given to other members, before the whole file is verified: who gives such a piece does not know that it
//! is right, and says so with it. Nobody is convicted for those; who gave wrong bytes of a file that it says it has is convicted
//! as anywhere else.
//!
//! Members that the coordinators name are asked whether they have the whole file. Of those that have it this machine chooses by
//! itself, by their rates: what several have needs no sharing out, and one that is slow would otherwise give its even share.
//!
//! When the fleet's task ends, or the mirror is of no use, the download goes on as one of a lone machine.

use super::download::{Download, Whom};
use super::hunt::Hunt;
use super::lanes::{Lane, Lanes};
use super::{now_s, std_now};
use crate::fleet::{FleetDo, FleetDownload, Origin};
use crate::peer::Partial;
use crate::swarm::bits::Bits;
use crate::swarm::piece_list::PieceList;
use crate::swarm::schedule::FlightId;
use crate::swarm::{Failure, SourceId, SourceKind};
use poolfs_core::Digest;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;

/// What the fleet is to be told.
#[derive(Clone, Copy, Debug)]
enum Tell {
    Fetched(u32),
    Failed(u32, Origin, bool),
}

/// The fleet's part in one download.
pub(super) struct Led {
    download: FleetDownload,
    asked: HashMap<FlightId, (u32, Origin)>,
    tells: VecDeque<Tell>,
    /// What is surely here, piece by piece.
    here: Vec<Option<Digest>>,
    /// What the fleet says that is left to those who have the whole file.
    left: HashMap<u32, Origin>,
    /// Pieces to ask members for, which wait for a lane each.
    waiting: VecDeque<(u32, Origin)>,
    lanes: Lanes,
    /// Every piece is here: nothing more is said.
    done: bool,
}

impl Led {
    pub(super) fn new(download: FleetDownload, pieces: u32, lanes: Lanes) -> Self {
        Self {
            download,
            asked: HashMap::new(),
            tells: VecDeque::new(),
            here: vec![None; pieces as usize],
            left: HashMap::new(),
            waiting: VecDeque::new(),
            lanes,
            done: false,
        }
    }
}

/// What a download is to do next.
pub(super) enum Order {
    /// What the fleet wants, or that it ended.
    Fleet(Option<FleetDo>),
    /// A lane is free for what waits for one.
    Lane(Lane),
}

/// The next order; none for ever where no fleet leads. Cancelling it loses nothing.
pub(super) async fn next(led: &mut Option<Led>) -> Order {
    let Some(Led { download, waiting, lanes, done, .. }) = led else { return std::future::pending().await };
    tokio::select! {
        biased;
        // The mirror's pieces are not to wait behind those of members.
        todo = download.next(), if !*done => Order::Fleet(todo),
        lane = lanes.enter(), if !waiting.is_empty() => Order::Lane(lane),
        else => std::future::pending().await,
    }
}

impl<T: Send> Download<'_, '_, T> {
    /// Does what the fleet says.
    pub(super) fn follow(&mut self, order: Order) {
        match order {
            Order::Fleet(Some(FleetDo::Fetch { piece, from: Origin::Mirror })) => self.fetch_for_fleet(piece, Origin::Mirror, None),
            Order::Fleet(Some(FleetDo::Fetch { piece, from })) => self.led.iter_mut().for_each(|led| led.waiting.push_back((piece, from))),
            Order::Fleet(Some(FleetDo::Done)) => self.led.iter_mut().for_each(|led| led.done = true),
            Order::Fleet(None) => self.go_alone(),
            Order::Lane(lane) => {
                if let Some((piece, from)) = self.led.as_mut().and_then(|led| led.waiting.pop_front()) {
                    self.fetch_for_fleet(piece, from, Some(lane));
                }
            }
        }
    }

    fn fetch_for_fleet(&mut self, piece: u32, from: Origin, lane: Option<Lane>) {
        let needed = self.schedule.blame().needs(piece);
        if needed && self.schedule.has_whole(std_now()) {
            // A member that is named is one more that may have all of it.
            self.source_of(from);
            if let Some(led) = &mut self.led {
                led.left.insert(piece, from);
            }
            return;
        }
        let source = if needed { self.source_of(from) } else { None };
        let flight = source.and_then(|source| self.turn(|schedule, turn| schedule.ask(source, piece, turn)));
        let mirror_out = from == Origin::Mirror && flight.is_none() && needed;
        let Some(led) = &mut self.led else { return };
        match flight {
            Some(flight) => {
                led.asked.insert(flight, (piece, from));
                if let Some(lane) = lane {
                    self.lanes.insert(flight, (lane, std_now()));
                }
            }
            // It came some other way: so that the fleet does not wait for it.
            None if !needed => led.tells.push_back(Tell::Fetched(piece)),
            None => led.tells.push_back(Tell::Failed(piece, from, false)),
        }
        if mirror_out && self.mirror_source().is_none_or(|mirror| self.schedule.blame().is_out(mirror)) {
            self.go_alone();
        }
    }

    fn mirror_source(&self) -> Option<SourceId> {
        let at = self.whom.iter().position(|whom| matches!(whom, Whom::Mirror))?;
        u16::try_from(at).ok().map(SourceId)
    }

    /// The source that the fleet names; a member that was not named before is added.
    fn source_of(&mut self, from: Origin) -> Option<SourceId> {
        let Origin::Member(contact) = from else { return self.mirror_source() };
        if let Some(source) = self.source_at(contact) {
            return Some(source);
        }
        if self.swarm.book.lock().verdicts.address_is_out(contact.ip(), now_s()) {
            return None;
        }
        let rating = self.swarm.book.lock().rating(contact, now_s());
        // A member has what the fleet says that it has, so what it may lack is not its complete list.
        self.add(SourceKind::Peer, Whom::Member(contact), Some(contact), None, rating);
        let source = self.source_at(contact)?;
        if self.shape.pieces() > 1 {
            self.ask_have(source);
        }
        Some(source)
    }

    /// When nobody with the whole file is of use any more, what was left to them goes the way that the fleet said.
    pub(super) fn take_back_left(&mut self) {
        let Some(led) = &mut self.led else { return };
        if led.left.is_empty() || self.schedule.has_whole(std_now()) {
            return;
        }
        for (piece, from) in std::mem::take(&mut led.left) {
            self.fetch_for_fleet(piece, from, None);
        }
    }

    /// All was here once, and something is needed again: the bytes were not the file's, and whose they were is found out as
    /// without a fleet.
    pub(super) fn go_alone_in_doubt(&mut self) {
        let blame = self.schedule.blame();
        if self.led.as_ref().is_some_and(|led| led.done) && (!blame.is_first_round() || blame.open().next().is_some()) {
            self.go_alone();
        }
    }

    fn source_at(&self, contact: SocketAddr) -> Option<SourceId> {
        let at = self.whom.iter().position(|whom| matches!(whom, Whom::Peer(other, _) | Whom::Member(other) if *other == contact))?;
        u16::try_from(at).ok().map(SourceId)
    }

    /// Goes on as a lone machine.
    fn go_alone(&mut self) {
        if self.led.take().is_some() {
            tracing::debug!(digest = %self.shape.digest, "the fleet leads no more");
            self.hunt = if self.fleet_only { Hunt::none(self.shape, self.swarm) } else { self.swarm.hunt(self.shape) };
            self.hunting = true;
            self.turn(|schedule, turn| {
                schedule.lead(false, turn);
                schedule.allow_mirror(turn);
            });
        }
    }

    /// Notes how a request of the fleet's went.
    pub(super) fn answered(&mut self, flight: FlightId, failure: Option<Failure>) {
        let Some(led) = &mut self.led else { return };
        if let Some((piece, from)) = led.asked.remove(&flight)
            && let Some(failure) = failure
        {
            led.tells.push_back(Tell::Failed(piece, from, failure == Failure::Gone));
        }
    }

    /// A piece is surely in the incoming file: members may have it from now on.
    pub(super) fn give_to_fleet(&mut self, piece: u32, digest: Digest) {
        let Some(led) = &mut self.led else { return };
        led.here[piece as usize] = Some(digest);
        led.left.remove(&piece);
        led.tells.push_back(Tell::Fetched(piece));
        if self.list.is_some() && self.told.announced {
            return; // Offered to everybody, by a list.
        }
        let Some(file) = &self.incoming else { return };
        let mut have = Bits::none(self.shape.pieces());
        (0u32..).zip(&led.here).filter(|(_, here)| here.is_some()).for_each(|(piece, _)| have.set(piece));
        // Signed by nobody, so no list to anybody: the server compares what it reads with it.
        let pieces = led.here.iter().map(|here| here.unwrap_or(Digest([0; 32]))).collect();
        let list = Arc::new(PieceList { pieces, signer: [0; 32], signed_at: 0, signature: [0; 64] });
        let partial = Partial { file: Arc::clone(file), shape: self.shape, list, have, fleet_only: true };
        self.told.offered |= self.swarm.parts.partials.put(partial);
    }

    /// Says to the fleet what is to be said.
    pub(super) async fn tell_fleet(&mut self) {
        while let Some(led) = &mut self.led
            && let Some(tell) = led.tells.pop_front()
        {
            match tell {
                Tell::Fetched(piece) => led.download.fetched(piece).await,
                Tell::Failed(piece, from, gone) => led.download.failed(piece, from, gone).await,
            }
        }
    }
}
