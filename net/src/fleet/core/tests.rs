//! Whole machines of a fleet under a virtual clock, with the datagrams that real ones send.
#![allow(clippy::unwrap_used, reason = "tests")]

mod hostile;
mod membership;
mod newcomer;

use super::*;
use crate::fleet::wire::State;
use std::cell::Cell;
use std::collections::HashSet;

const UNIX_START_S: u64 = 1_800_000_000;
const FETCH_TAKES: Duration = Duration::from_millis(20);

fn key() -> FleetKey {
    FleetKey::new([5; 32])
}

fn contact(at: usize) -> SocketAddr {
    SocketAddr::from(([10, 1, 0, u8::try_from(at).unwrap()], 9977))
}

fn id(at: usize) -> MemberId {
    MemberId(*Digest::of(&at.to_be_bytes()).0.first_chunk().unwrap())
}

fn file(nth: usize, pieces: u64) -> FileShape {
    FileShape::of(Digest::of(&nth.to_le_bytes()), pieces * u64::from(poolfs_core::piece::PIECE_BYTES))
}

fn me(at: usize, near: Option<Vec<Near>>) -> Me {
    Me { id: id(at), port: 9977, started_s: UNIX_START_S, zone: String::new(), zone_local: false, near }
}

struct Machine {
    core: Core,
    alive: bool,
    has: HashSet<(Digest, u32)>,
    done: Option<Duration>,
    wants: usize,
    /// What came of each coordinator that was asked for holders.
    named: Vec<Vec<SocketAddr>>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Datagram { from: SocketAddr, to: SocketAddr, bytes: Vec<u8> },
    Fetched { by: usize, digest: [u8; 32], piece: u32, from: Option<SocketAddr> },
}

type Reach = Box<dyn Fn(SocketAddr, SocketAddr, Duration) -> bool>;
type Lie = Box<dyn Fn(&Want) -> Reply>;

/// Wants on their way, by asker, asked and transaction: their bytes, and how many are not answered.
type Asked = HashMap<(SocketAddr, SocketAddr, Vec<u8>), (usize, Cell<u32>)>;

struct Net {
    start: Instant,
    now: Instant,
    machines: Vec<Machine>,
    events: BinaryHeap<Reverse<(Instant, u64, What)>>,
    count: u64,
    reach: Reach,
    /// Of three datagrams one is lost.
    lossy: Option<StdRng>,
    /// Who answers wants as it likes.
    liar: Option<(usize, Lie)>,
    mirror_takes: Duration,
    /// How often each piece was fetched from the mirror.
    mirror: HashMap<(Digest, u32), u32>,
    /// Addresses that pieces were fetched from.
    connected: HashSet<SocketAddr>,
    asked: Asked,
    datagrams: u64,
}

impl Net {
    /// `count` machines that know nobody, without a key if `near` is given.
    fn new(count: usize, near: Option<Vec<Near>>) -> Self {
        let start = Instant::now();
        let machine = |at| {
            let key = near.is_none().then(key);
            let seed = [u8::try_from(at).unwrap(); 32];
            let core = Core::new(me(at, near.clone()), key, seed, start, UNIX_START_S);
            Machine { core, alive: true, has: HashSet::new(), done: None, wants: 0, named: Vec::new() }
        };
        Self {
            start,
            now: start,
            machines: (0..count).map(machine).collect(),
            events: BinaryHeap::new(),
            count: 0,
            reach: Box::new(|_, _, _| true),
            lossy: None,
            liar: None,
            mirror_takes: Duration::from_millis(30),
            mirror: HashMap::new(),
            connected: HashSet::new(),
            asked: HashMap::new(),
            datagrams: 0,
        }
    }

    /// Machines that all know each other.
    fn joined(count: usize) -> Self {
        let mut net = Self::new(count, None);
        (1..count).for_each(|at| net.hint(at, contact(0)));
        net.run_until(Duration::from_secs(60), |net| net.all_know(count));
        net
    }

    fn age(&self) -> Duration {
        self.now - self.start
    }

    fn all_know(&self, count: usize) -> bool {
        self.machines.iter().filter(|machine| machine.alive).all(|machine| machine.core.view().len() == count)
    }

    fn hint(&mut self, at: usize, of: SocketAddr) {
        self.machines[at].core.hint(of, self.now);
        self.drain(at);
    }

    fn kill(&mut self, at: usize) {
        self.machines[at].alive = false;
    }

    /// Everybody alive wants the file now.
    fn want(&mut self, shape: FileShape) {
        for at in 0..self.machines.len() {
            self.want_at(at, shape);
        }
    }

    fn want_at(&mut self, at: usize, shape: FileShape) {
        if self.machines[at].alive {
            self.machines[at].wants += 1;
            assert!(self.machines[at].core.want(shape, |_| false, self.now), "machine {at} is alone");
            self.drain(at);
        }
    }

    fn is_done(&self) -> bool {
        self.machines.iter().all(|machine| !machine.alive || machine.wants == 0)
    }

    /// Runs from event to event until `condition`, or panics after `limit`.
    fn run_until(&mut self, limit: Duration, condition: impl Fn(&Self) -> bool) {
        let until = self.now + limit;
        while !condition(self) {
            assert!(self.now < until, "it does not come to that within {limit:?}");
            self.step(until);
        }
    }

    fn run(&mut self, takes: Duration) {
        let until = self.now + takes;
        while self.now < until {
            self.step(until);
        }
    }

    fn step(&mut self, until: Instant) {
        let wake = self.machines.iter().filter(|machine| machine.alive).map(|machine| machine.core.next_timeout()).min();
        let event = self.events.peek().map(|Reverse((at, ..))| *at);
        let next = [wake, event].into_iter().flatten().min().unwrap_or(until);
        self.now = self.now.max(next).min(until);
        while let Some(Reverse((_, _, what))) = self.events.pop_if_due(self.now) {
            self.happen(what);
        }
        for at in 0..self.machines.len() {
            if self.machines[at].alive && self.machines[at].core.next_timeout() <= self.now {
                self.machines[at].core.tick(self.now);
                self.drain(at);
                assert!(self.machines[at].core.next_timeout() > self.now, "machine {at} spins");
            }
        }
    }

    fn later(&mut self, after: Duration, what: What) {
        self.count += 1;
        self.events.push(Reverse((self.now + after, self.count, what)));
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Datagram { from, to, bytes } => {
                let Some(at) = self.machine_at(to).filter(|at| self.machines[*at].alive) else { return };
                let lost = self.lossy.as_mut().is_some_and(|rng| rng.random_range(0..3) == 0);
                if !lost && (self.reach)(from, to, self.age()) && !self.lie(at, from, &bytes) {
                    self.machines[at].core.datagram(from, &bytes, self.now);
                    self.drain(at);
                }
            }
            What::Fetched { by, digest, piece, from } => self.fetch_ends(by, Digest(digest), piece, from),
        }
    }

    fn machine_at(&self, contact: SocketAddr) -> Option<usize> {
        (0..self.machines.len()).find(|at| self::contact(*at) == contact)
    }

    fn lie(&mut self, at: usize, from: SocketAddr, bytes: &[u8]) -> bool {
        let Some((_, lie)) = self.liar.as_ref().filter(|(liar, _)| *liar == at) else { return false };
        let envelope = Envelope::read(bytes).unwrap();
        let Some((_, Ask::Want(want))) = envelope.is_query.then(|| envelope.query()).flatten() else { return false };
        let nonce = Nonce(envelope.tag[8..16].try_into().unwrap());
        let bytes = wire::answer(&key(), id(at), &envelope.transaction, nonce, from, &Answer::Reply(lie(&want)));
        self.later(Duration::from_millis(2), What::Datagram { from: contact(at), to: from, bytes });
        true
    }

    fn fetch_ends(&mut self, by: usize, digest: Digest, piece: u32, from: Option<SocketAddr>) {
        if !self.machines[by].alive {
            return;
        }
        let outcome = match from {
            None => Ok(()),
            Some(contact) => match self.machine_at(contact) {
                Some(at) if self.machines[at].alive && (self.reach)(self::contact(by), contact, self.age()) => {
                    self.machines[at].has.contains(&(digest, piece)).then_some(()).ok_or(false)
                }
                _ => Err(true),
            },
        };
        let core = &mut self.machines[by].core;
        match outcome {
            Ok(()) => {
                self.machines[by].has.insert((digest, piece));
                self.machines[by].core.fetched(digest, piece, self.now);
            }
            Err(gone) => core.failed(digest, piece, Origin::Member(from.unwrap()), gone, self.now),
        }
        self.drain(by);
    }

    fn drain(&mut self, at: usize) {
        while let Some(todo) = self.machines[at].core.poll() {
            match todo {
                CoreDo::Send { to, bytes } => {
                    self.datagrams += 1;
                    self.watch(contact(at), to, &bytes);
                    self.later(Duration::from_millis(2), What::Datagram { from: contact(at), to, bytes });
                }
                CoreDo::Fetch { digest, piece, from } => {
                    let (takes, from) = match from {
                        Origin::Mirror => {
                            *self.mirror.entry((digest, piece)).or_default() += 1;
                            (self.mirror_takes, None)
                        }
                        Origin::Member(contact) => {
                            self.connected.insert(contact);
                            (FETCH_TAKES, Some(contact))
                        }
                    };
                    self.later(takes, What::Fetched { by: at, digest: digest.0, piece, from });
                }
                CoreDo::Holders { holders, .. } => self.machines[at].named.push(holders),
                CoreDo::Done(_) => {
                    self.machines[at].wants -= 1;
                    self.machines[at].done = Some(self.now - self.start);
                }
            }
        }
    }

    /// A want causes at most one datagram, no larger than itself plus 64 bytes.
    fn watch(&mut self, from: SocketAddr, to: SocketAddr, bytes: &[u8]) {
        let envelope = Envelope::read(bytes).unwrap();
        let transaction = envelope.transaction.as_slice().to_vec();
        if envelope.is_query {
            if matches!(envelope.query(), Some((_, Ask::Want(_) | Ask::Who(_)))) {
                let asked = self.asked.entry((from, to, transaction)).or_insert((bytes.len(), Cell::new(0)));
                asked.0 = bytes.len();
                asked.1.set(asked.1.get() + 1);
            }
        } else if let Some((asked_bytes, left)) = self.asked.get(&(to, from, transaction)) {
            assert!(bytes.len() <= asked_bytes + 64, "{} bytes for {asked_bytes}", bytes.len());
            assert!(left.get() > 0, "two datagrams for one want");
            left.set(left.get() - 1);
        }
    }

    fn coordinator_of(&self, shape: &FileShape) -> usize {
        let ranked =
            self.machines.iter().find(|machine| machine.alive).unwrap().core.view().ranked(&GroupKey { digest: shape.digest, group: 0 });
        (0..self.machines.len()).find(|at| id(*at) == ranked[0]).unwrap()
    }

    fn mirror_most(&self) -> u32 {
        self.mirror.values().copied().max().unwrap_or_default()
    }

    fn slowest(&self) -> Duration {
        self.machines.iter().filter_map(|machine| machine.done).max().unwrap()
    }
}

trait PopIfDue {
    fn pop_if_due(&mut self, now: Instant) -> Option<Reverse<(Instant, u64, What)>>;
}

impl PopIfDue for BinaryHeap<Reverse<(Instant, u64, What)>> {
    fn pop_if_due(&mut self, now: Instant) -> Option<Reverse<(Instant, u64, What)>> {
        self.peek().is_some_and(|Reverse((at, ..))| *at <= now).then(|| self.pop()).flatten()
    }
}

/// The datagrams of twenty machines bring a file of three groups to all of them for one copy.
#[test]
fn twenty_machines_one_copy() {
    let mut net = Net::joined(20);
    let (began, shape) = (net.age(), file(1, 40));
    net.want(shape);
    net.run_until(Duration::from_secs(20), Net::is_done);
    assert_eq!(net.mirror.values().sum::<u32>(), 40, "one copy: {:?}", net.mirror);
    assert!(net.slowest() - began < Duration::from_secs(3), "{:?}", net.slowest() - began);
}

/// Machines that have a file tell its coordinators, so that one that comes later fetches nothing from the mirror; when a
/// coordinator goes, the next one is told.
#[test]
fn who_has_a_file_is_known() {
    let mut net = Net::joined(6);
    let shape = file(1, 40);
    net.machines[2].has.extend((0..40).map(|piece| (shape.digest, piece)));
    let now = net.now;
    net.machines[2].core.arrived(&[shape], now);
    net.drain(2);
    net.run(Duration::from_secs(1));
    net.want_at(4, shape);
    net.run_until(Duration::from_secs(10), Net::is_done);
    assert_eq!(net.mirror.len(), 0);
    // Another file, whose coordinator dies: until it is out, ranks 0 and 1 have been told.
    let other = (2..).map(|nth| file(nth, 1)).find(|other| ![2, 5].contains(&net.coordinator_of(other))).unwrap();
    net.machines[2].has.insert((other.digest, 0));
    net.machines[2].core.arrived(&[other], net.now);
    net.drain(2);
    net.run(Duration::from_secs(1));
    let coordinator = net.coordinator_of(&other);
    net.kill(coordinator);
    net.want_at(5, other);
    net.run_until(Duration::from_secs(10), Net::is_done);
    assert_eq!(net.mirror.len(), 0, "coordinator {coordinator}");
}

/// One of many has something that is not asked for piece by piece: everybody finds out who, also when a coordinator is dead, and
/// learns of nobody that has not said so.
#[test]
fn who_told_of_it_is_named() {
    let mut net = Net::joined(20);
    let mark = file(7, 1);
    let asks = |net: &mut Net, at: usize| {
        let now = net.now;
        let asked = net.machines[at].core.who(mark.digest, now);
        net.drain(at);
        net.run_until(Duration::from_secs(60), |net| net.machines[at].named.len() == asked);
        assert_eq!(net.machines[at].named.len(), asked, "each question has one end");
        let named: HashSet<SocketAddr> = std::mem::take(&mut net.machines[at].named).into_iter().flatten().collect();
        named
    };
    assert_eq!(asks(&mut net, 3), HashSet::new());
    let now = net.now;
    net.machines[2].core.arrived(&[mark], now);
    net.drain(2);
    net.run(Duration::from_secs(1));
    for at in (0..20).filter(|at| *at != 2) {
        assert_eq!(asks(&mut net, at), HashSet::from([contact(2)]), "asked by {at}");
    }
    assert_eq!(asks(&mut net, 2), HashSet::new(), "nobody is told of itself");
    let coordinator = net.coordinator_of(&mark);
    net.kill(coordinator);
    let other = (0..20).find(|at| ![2, coordinator].contains(at)).unwrap();
    assert_eq!(asks(&mut net, other), HashSet::from([contact(2)]));
}

/// An answer to an earlier want that comes after a later one was sent is not the answer to that: the asker would take it for all
/// that there is to say, and wait.
#[test]
fn an_answer_to_an_earlier_want() {
    let mut net = Net::joined(2);
    net.run(Duration::from_secs(70));
    let shape = (0..).map(|nth| file(nth, 16)).find(|shape| net.coordinator_of(shape) == 0).unwrap();
    let core = &mut net.machines[1].core;
    let now = net.now;
    let sent = |core: &mut Core| -> Vec<Vec<u8>> {
        let todo = std::iter::from_fn(|| core.poll());
        todo.filter_map(|todo| if let CoreDo::Send { bytes, .. } = todo { Some(bytes) } else { None }).collect()
    };
    assert!(core.want(shape, |_| false, now));
    core.tick(now + PLAN_DELAY);
    let first = sent(core).pop().expect("a want");
    // A piece came some other way, and the coordinator is told.
    core.fetched(shape.digest, 3, now + PLAN_DELAY);
    let second = sent(core).pop().expect("another want");
    let reply = |bytes: &[u8], pieces: u16| {
        let envelope = Envelope::read(bytes).unwrap();
        let nonce = Nonce(envelope.tag[8..16].try_into().unwrap());
        let reply = Reply { take: Some((pieces, Duration::from_secs(5))), ..Reply::default() };
        wire::answer(&key(), id(0), &envelope.transaction, nonce, contact(1), &Answer::Reply(reply))
    };
    let fetches = |core: &mut Core| std::iter::from_fn(|| core.poll()).filter(|todo| matches!(todo, CoreDo::Fetch { .. })).count();
    core.datagram(contact(0), &reply(&first, 0b1111), now + PLAN_DELAY);
    assert_eq!(fetches(core), 0);
    core.datagram(contact(0), &reply(&second, 0b0011), now + PLAN_DELAY);
    assert_eq!(fetches(core), 2);
}
